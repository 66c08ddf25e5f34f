"""Notebooks as they are committed (nbmake runs them), and the runner of `make notebooks`."""

import ast
import inspect
import os
import re
import statistics
import subprocess
import sys

import nbformat
import pytest
import run_all
from nbconvert import HTMLExporter

from nfhelpers import run, widgets

NOTEBOOKS = sorted(run_all.FOLDER.glob("*.ipynb"))
SOLUTIONS = sorted((run_all.FOLDER / "solutions").glob("*.ipynb"))
LONGEST_CELL, MEDIAN_CELL = 60, 10
"""Lines that a code cell may have, and that half of them may have."""

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
with_solutions = pytest.mark.parametrize("path", NOTEBOOKS + SOLUTIONS, ids=lambda path: path.stem)


def code_cells(path):
    cells = nbformat.read(path, as_version=4).cells
    return [cell for cell in cells if cell.cell_type == "code" and cell.source.strip()]


def parsed(cell):
    return ast.parse(cell.source.replace("%matplotlib inline", ""))


def called(tree):
    """Names of the functions that are called, without the modules they are of."""
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return {getattr(function, "attr", getattr(function, "id", None)) for function in calls}


def prose(path):
    cells = nbformat.read(path, as_version=4).cells
    return "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def test_every_notebook_has_presets():
    assert {path.stem for path in NOTEBOOKS} == set(run.SECTIONS)


def test_every_notebook_has_solutions():
    assert [path.stem for path in SOLUTIONS] == [f"{path.stem[:2]}_solutions" for path in NOTEBOOKS]


# ---------------------------------------------------------------- as committed


@every_notebook
def test_outputs_are_of_one_clean_run(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size < run_all.LARGEST
    assert run_all.problems(notebook) == []


@every_notebook
def test_it_starts_with_imports_and_the_run(path):
    first, *rest = code_cells(path)
    assert re.search(r"^(import|from) ", first.source, re.MULTILINE), "cell 1 imports"
    (start,) = [cell for cell in (first, *rest[:3]) if f'start("{path.stem}"' in cell.source]
    shown = "".join(output.get("text", "") for output in start.outputs)
    preset = re.search(r"^preset +(\w+)$", shown, re.MULTILINE)
    assert preset, "the cell that calls start shows what is used"
    assert preset.group(1) in ("demo", "full"), "outputs are committed from demo or full"


@with_solutions
def test_parameters_are_literals(path):
    (cell,) = [cell for cell in code_cells(path) if "parameters" in cell.metadata.get("tags", [])]
    names = {}
    for statement in ast.parse(cell.source).body:
        assert isinstance(statement, ast.Assign), f"only assignments: {ast.unparse(statement)}"
        (target,) = statement.targets
        names[target.id] = ast.literal_eval(statement.value)
    assert names["PRESET"] is None, "NF_PRESET decides"
    assert names["OVERRIDES"] == {}


@with_solutions
def test_cells_are_short_and_free_of_tricks(path):
    lengths = [cell.source.count("\n") + 1 for cell in code_cells(path)]
    assert path in SOLUTIONS or statistics.median(lengths) <= MEDIAN_CELL, sorted(lengths)
    for number, (cell, lines) in enumerate(zip(code_cells(path), lengths, strict=True), start=1):
        assert lines <= LONGEST_CELL, f"code cell {number} has {lines} lines"
        for trick in ("%matplotlib widget", "sys.path", "!pip", "%pip"):
            assert trick not in cell.source, f"code cell {number} uses {trick}"


@every_notebook
def test_it_ends_with_exercises_and_references(path):
    headings = re.findall(r"^#+ +(.*)$", prose(path), re.MULTILINE)
    for wanted in ("measured", "exercises", "references"):
        assert any(wanted in heading.lower() for heading in headings), f"no heading on {wanted}: {headings}"


def test_no_code_is_in_two_notebooks():
    """Functions and classes, whatever their names, and cells of more than two lines; imports are left out."""
    seen = {}
    for path in NOTEBOOKS + SOLUTIONS:
        for cell in code_cells(path):
            tree = parsed(cell)
            pieces = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
            statements = [node for node in tree.body if not isinstance(node, ast.Import | ast.ImportFrom)]
            if len(statements) > 2:
                pieces.append(ast.Module(statements, []))
            for piece in pieces:
                if hasattr(piece, "name"):
                    piece.name = ""
                seen.setdefault(ast.dump(piece), []).append((path.stem, cell.source))
    twice = [places for places in seen.values() if len({stem for stem, _ in places}) > 1]
    assert not twice, twice


@every_notebook
def test_every_widget_has_a_static_twin_above_it(path):
    """Some cell above calls what draws the widget's picture, and ends in a figure."""
    above = set()
    for cell in code_cells(path):
        for name in (name for name in called(parsed(cell)) if str(name).endswith("_panel")):
            draws = called(ast.parse(inspect.getsource(getattr(widgets, name))))
            figures = {f for f in draws if f.endswith("_figure") or f in ("impulse_response", "cost_curve")}
            assert figures and figures <= above, f"{name} draws {figures}, which no cell above shows"
        above |= called(parsed(cell))


@every_notebook
def test_figures_show_without_a_kernel(path):
    """In HTML, as on GitHub, every cell that ends in a saved figure has its picture."""
    notebook = nbformat.read(path, as_version=4)
    page, _ = HTMLExporter(template_name="basic").from_notebook_node(notebook)
    endings = [parsed(cell).body[-1] for cell in code_cells(path)]
    figures = [node for node in endings if "save_figure" in called(node)]
    assert len(figures) > 3
    assert page.count('src="data:image/png;base64') >= len(figures)
    assert "application/vnd.jupyter.widget" not in page


def test_papermill_runs_a_notebook_from_another_folder(tmp_path, repository):
    path = NOTEBOOKS[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "JUPYTER_PREFER_ENV_PATH": "1"}
    command = [sys.executable, "-m", "papermill", str(path), "out.ipynb", "-p", "PRESET", "smoke"]
    before = set((repository / "runs" / path.stem).glob("smoke/*"))
    subprocess.run(
        [*command, "--no-progress-bar", "-k", "python3"], cwd=tmp_path, env=environment, check=True
    )
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.ipynb"], "all else is in the repository"
    cells = code_cells(tmp_path / "out.ipynb")
    shown = "".join(output.get("text", "") for cell in cells for output in cell.outputs)
    assert re.search(r"^preset +smoke$", shown, re.MULTILINE)
    assert all(cell.execution_count for cell in cells)
    (folder,) = set((repository / "runs" / path.stem).glob("smoke/*")) - before
    assert (folder / f"{path.stem}_reconstruction.png").is_file()


# ---------------------------------------------------------------- the runner


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A repository whose notebooks the runner runs; the environment variable it sets is put back."""
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setattr(run_all, "FOLDER", tmp_path / "notebooks")
    monkeypatch.setattr(run_all, "BUILD", tmp_path / "build" / "notebooks")
    monkeypatch.setenv("NF_PRESET", "demo")
    return tmp_path


def write_notebook(folder, name, *sources):
    path = folder / "notebooks" / f"{name}.ipynb"
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    return path


GOOD = """\
import os, sys, ipywidgets
print(os.environ["NF_PRESET"], os.getcwd(), sys.executable, flush=True)
ipywidgets.IntSlider(3)"""


def test_runner_promotes_good_notebooks_and_keeps_bad_ones(folder, capsys):
    good = write_notebook(folder, "good", GOOD, "6 * 7")
    bad = write_notebook(folder, "bad", "print('first')", "1 / 0", "print('never')")
    before = bad.read_bytes()
    assert run_all.main([]) == 1
    out = capsys.readouterr().out
    assert "good.ipynb ok" in out and "1 of 2 notebooks ended well" in out
    assert "ZeroDivisionError" in out and "build/notebooks/bad.ipynb" in out

    notebook = nbformat.read(good, as_version=4)
    assert [cell.execution_count for cell in notebook.cells] == [1, 2]
    printed, widget = notebook.cells[0].outputs
    # The kernel is this interpreter, it runs in notebooks/, and neither path is of this machine.
    preset, where, executable = printed.text.split()
    assert preset == "demo"
    assert where == "./notebooks"
    assert executable.startswith("<env>/bin/python")
    assert widget.data == {"text/plain": "(a widget: run the notebook to use it)"}
    assert "widgets" not in notebook.metadata
    assert notebook.cells[1].outputs[0].data["text/plain"] == "42"

    assert bad.read_bytes() == before
    failed = nbformat.read(folder / "build" / "notebooks" / "bad.ipynb", as_version=4)
    assert failed.cells[1].outputs[0].ename == "ZeroDivisionError"
    assert failed.cells[2].execution_count is None
    assert not list(folder.rglob("*.part"))


def test_runner_stops_slow_cells_and_smoke_writes_nothing_back(folder, capsys, monkeypatch):
    slow = write_notebook(folder, "slow", "import time; time.sleep(60)")
    before = slow.read_bytes()
    assert run_all.main(["slow.ipynb", "--timeout", "2"]) == 1
    assert "timed out" in capsys.readouterr().out.lower()
    assert slow.read_bytes() == before

    monkeypatch.setenv("NF_PRESET", "smoke")
    quick = write_notebook(folder, "quick", "1 + 1")
    before = quick.read_bytes()
    assert run_all.main(["quick.ipynb"]) == 0
    assert quick.read_bytes() == before
    assert (folder / "build" / "notebooks" / "quick.ipynb").is_file()


def test_runner_runs_solutions_only_when_they_are_named(folder, monkeypatch):
    ran = []
    monkeypatch.setattr(
        run_all,
        "execute",
        lambda path, *_: (ran.append(path.name), nbformat.read(path, as_version=4), [])[1:],
    )
    write_notebook(folder, "quick", "1 + 1")
    (folder / "notebooks" / "solutions").mkdir()
    write_notebook(folder, "solutions/01_solutions", "1 + 1")
    assert run_all.main([]) == 0 and ran == ["quick.ipynb"]
    assert run_all.main(["notebooks/solutions/01_solutions.ipynb"]) == 0
    assert ran == ["quick.ipynb", "01_solutions.ipynb"]


def test_runner_names_a_missing_notebook(folder, capsys):
    assert run_all.main(["no.ipynb"]) == 2
    assert "no.ipynb" in capsys.readouterr().err
    assert run_all.main([]) == 2


def notebook_of(output, count=1):
    cell = nbformat.v4.new_code_cell("x", execution_count=count, outputs=[output])
    return nbformat.v4.new_notebook(cells=[cell])


def test_problems_are_found():
    text = nbformat.v4.new_output
    fine = notebook_of(text("stream", name="stdout", text="12 steps/s, 1/2, https://x.org/tmp/a"))
    assert run_all.problems(fine) == []
    (problem,) = run_all.problems(notebook_of(text("stream", name="stdout", text="ok"), count=2))
    assert "not one clean run" in problem
    (problem,) = run_all.problems(notebook_of(text("error", ename="KeyError", evalue="'a'", traceback=[])))
    assert "KeyError" in problem
    for path in ("/home/me/x.py", "/tmp/ipykernel_1/2.py", "/root/a", "/work/b"):
        (problem,) = run_all.problems(notebook_of(text("stream", name="stderr", text=f"in {path}: warning")))
        assert path in problem
    big = notebook_of(text("display_data", data={"image/png": "A" * run_all.LARGEST}))
    (problem,) = run_all.problems(big)
    assert "draw smaller figures" in problem
    fine.metadata["widgets"] = {}
    assert run_all.problems(fine) == ["metadata.widgets is set"]


@pytest.mark.parametrize(("preset", "kept"), [("smoke", False), ("demo", False), ("full", True)])
def test_runner_removes_what_an_earlier_run_trained(folder, capsys, monkeypatch, preset, kept):
    """A finished run would be found and nothing trained; under full a stopped one is to go on."""
    monkeypatch.setenv("NF_PRESET", preset)
    monkeypatch.setattr(run_all, "execute", lambda path, *_: (nbformat.read(path, as_version=4), []))
    write_notebook(folder, "quick", "1 + 1")
    old = folder / "runs" / "quick" / preset / "state.pt"
    others = [folder / "runs" / "quick" / "other" / "state.pt", folder / "runs" / "v1" / preset / "state.pt"]
    for path in (old, *others):
        path.parent.mkdir(parents=True)
        path.touch()
    assert run_all.main(["quick.ipynb"]) == 0
    assert old.exists() == kept
    assert all(path.exists() for path in others)


def test_of_a_progress_bar_its_last_state_stays():
    def stream(name, text):
        return nbformat.v4.new_output("stream", name=name, text=text)

    picture = nbformat.v4.new_output("display_data", data={"image/png": "AAAA"})
    outputs = [
        stream("stdout", "start\n"),
        stream("stderr", "\r 0%"),
        stream("stderr", "\r50%"),
        picture,
        stream("stderr", "\r99%"),
        stream("stderr", "\r100%\n"),
    ]
    kept = [output.get("text") for output in run_all.last_lines(outputs)]
    assert kept == ["start\n", "50%", None, "100%\n"]
