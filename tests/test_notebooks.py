"""Notebooks as they are committed, most of their widgets, and the runner of `make notebooks`."""

import ast
import base64
import io
import re
import statistics

import nbformat
import numpy as np
import pytest
import run_all
from nbformat.v4 import new_code_cell, new_notebook, new_output
from PIL import Image
from test_browser import NOTEBOOKS as IN_BROWSER

from nfhelpers import run

NOTEBOOKS = sorted(run_all.FOLDER.glob("*.ipynb"))
SOLUTIONS = sorted((run_all.FOLDER / "solutions").glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
with_solutions = pytest.mark.parametrize("path", NOTEBOOKS + SOLUTIONS, ids=lambda path: path.stem)


def code_cells(path):
    cells = nbformat.read(path, as_version=4).cells
    return [cell for cell in cells if cell.cell_type == "code" and cell.source.strip()]


def tree_of(cell):
    return ast.parse(cell.source.replace("%matplotlib inline", ""))


def calls(tree):
    """(module or "", name, call) of every call in a syntax tree."""
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        function = call.func
        module = getattr(getattr(function, "value", None), "id", "")
        yield module, getattr(function, "attr", getattr(function, "id", "")), call


def test_every_notebook_has_presets_and_solutions():
    assert {path.stem for path in NOTEBOOKS} == set(run.SECTIONS)
    assert [path.stem for path in SOLUTIONS] == [f"{path.stem[:2]}_solutions" for path in NOTEBOOKS]


@every_notebook
def test_outputs_are_of_one_clean_run(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert run_all.problems(notebook) == []
    shown = "".join(output.get("text", "") for cell in code_cells(path)[:4] for output in cell.outputs)
    preset = re.search(r"^preset +(\w+)", shown, re.MULTILINE)
    assert preset and preset.group(1) != "smoke", "the first cells show a preset that is worth committing"
    for cell in code_cells(path):
        if any(name == "save_figure" for _, name, _ in calls(tree_of(cell))):
            assert any("image/png" in output.get("data", {}) for output in cell.outputs), cell.source


@with_solutions
def test_parameters_are_literals(path):
    (cell,) = [cell for cell in code_cells(path) if "parameters" in cell.metadata.get("tags", [])]
    names = {s.targets[0].id: ast.literal_eval(s.value) for s in ast.parse(cell.source).body}
    assert names["PRESET"] is None and names["OVERRIDES"] == {}


@every_notebook
def test_it_teaches_in_short_cells(path):
    cells = nbformat.read(path, as_version=4).cells
    lengths = [cell.source.count("\n") + 1 for cell in code_cells(path)]
    assert 40 <= len(cells) <= 80 and max(lengths) <= 60 and statistics.median(lengths) <= 15
    prose = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown").lower()
    assert {"exercises", "references"} <= set(re.findall(r"^#+ (\w+)$", prose, re.MULTILINE))
    assert not re.findall(r"seed 00|issue \d|\.\./shared", prose)
    called = (found[:2] for cell in code_cells(path) for found in calls(tree_of(cell)))
    assert len(used := {name for module, name in called if module == "evaluate"}) <= 6, used


@every_notebook
def test_every_widget_has_a_static_twin_above_it(path):
    """What a panel draws was called plainly before: its figure is in the file, and a run sees its errors."""
    above, draws = set(), {}
    for statement in (node for cell in code_cells(path) for node in tree_of(cell).body):
        names = {name for _, name, _ in calls(statement)}
        if isinstance(statement, ast.FunctionDef):
            draws[statement.name] = {statement.name, *(names & draws.keys())}
            continue
        for module, name, call in calls(statement):
            if (module, name) == ("widgets", "panel"):
                assert draws[call.args[0].id] & above, f"{call.args[0].id} is drawn by no cell above"
        above |= names


MOVE = """
import ipywidgets
panels = [out for out in Out.values() if isinstance(out, ipywidgets.VBox)]
for panel in panels:
    picture = next(x for x in panel.children if isinstance(x, ipywidgets.Image))
    slider, before = next(x for x in panel.children if hasattr(x, "readout")), picture.value
    ends = slider.options if hasattr(slider, "options") else (slider.min, slider.max)
    slider.value = ends[slider.value == ends[0]]
    [x.click() for x in panel.children if type(x) is ipywidgets.Button]
    assert picture.value != before, slider
print(len(panels))
"""


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p not in IN_BROWSER], ids=lambda p: p.stem)
def test_a_kernel_runs_all_and_moves_the_widgets(path, monkeypatch):
    monkeypatch.setenv("NF_PRESET", "smoke")
    monkeypatch.setattr(run_all, "PEAK", MOVE)  # the last cell
    notebook, moved, complaints = run_all.execute(path, "smoke", timeout=300)
    panels = sum(name == "panel" for cell in code_cells(path) for _, name, _ in calls(tree_of(cell)))
    assert complaints == [] and moved == str(panels)
    said = "".join(x.text for c in notebook.cells for x in c.get("outputs", []) if x.get("name") == "stderr")
    assert re.findall(r"^(?!.*\d+%\|.*\|).*\S", said, re.MULTILINE) == [], "warnings"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A repository whose notebooks the runner runs; the environment variable it sets is put back."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "figures").mkdir()
    monkeypatch.setattr(run_all, "FOLDER", tmp_path / "notebooks")
    monkeypatch.setenv("NF_PRESET", "demo")
    return tmp_path


def write_notebook(folder, name, *sources):
    notebook = new_notebook(cells=list(map(new_code_cell, sources)))
    nbformat.write(notebook, folder / "notebooks" / f"{name}.ipynb")
    return folder / "notebooks" / f"{name}.ipynb"


def test_runner_writes_to_build_and_promotes_good_notebooks_only(folder, capsys):
    show = "import os, sys, ipywidgets\nprint(os.getcwd(), sys.executable)\nipywidgets.IntSlider(3)"
    save = "open('../build/figures/good_x.png', 'w').write('new')"
    good = write_notebook(folder, "good", show, f"os.makedirs('../build/figures', exist_ok=True)\n{save}")
    bad = write_notebook(folder, "bad", "print('first')", "1 / 0", "print('never')")
    (folder / "runs" / "good" / "demo").mkdir(parents=True)
    (folder / "figures" / "good_old.png").touch()
    before = good.read_bytes(), bad.read_bytes()
    assert run_all.main([]) == 1 and not (folder / "runs" / "good" / "demo").exists()
    assert (good.read_bytes(), bad.read_bytes()) == before, "the checkout is as it was"
    said = capsys.readouterr()
    assert "1 of 2 notebooks ended well" in said.out and "ZeroDivisionError" in said.out
    built = {path.name for path in (folder / "build" / "notebooks").iterdir()}
    assert built == {"good.ipynb", "good.html", "bad.ipynb", "bad.html"}

    assert run_all.main(["--promote", "bad.ipynb"]) == 1 and bad.read_bytes() == before[1]
    assert run_all.main(["--promote", "good.ipynb"]) == 0
    assert [path.name for path in (folder / "figures").iterdir()] == ["good_x.png"]
    first, second = nbformat.read(good, as_version=4).cells
    assert (first.execution_count, second.execution_count) == (1, 2)
    printed, widget = first.outputs
    assert re.fullmatch(r"\./notebooks <env>/bin/python\S*\n", printed.text)
    assert widget.data == {"text/plain": "(a widget: run the notebook to use it)"}


def test_runner_stops_slow_cells_and_promotes_no_smoke(folder):
    write_notebook(folder, "slow", "import time; time.sleep(60)")
    write_notebook(folder, "quick", "print('preset    smoke')")
    assert run_all.main(["slow.ipynb", "--timeout", "1"]) == 1
    assert run_all.main(["quick.ipynb"]) == 0 and run_all.main(["--promote", "quick.ipynb"]) == 1
    assert run_all.main(["no.ipynb"]) == 2
    left = [folder / "runs" / "04_x" / "demo" / name for name in ("train-a", "solution-a")]
    [path.mkdir(parents=True) for path in (*left, folder / "notebooks" / "solutions")]
    write_notebook(folder, "solutions/04_solutions", "1")
    assert run_all.main(["04_solutions.ipynb"]) == 0 and [path.exists() for path in left] == [True, False]


def test_large_notebooks_get_fewer_shades():
    picture = np.random.default_rng(0).integers(0, 256, (500, 500, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "png")
    output = new_output("display_data", {"image/png": base64.b64encode(file.getvalue()).decode()})
    notebook = new_notebook(cells=[new_code_cell("x", outputs=[output])])
    assert run_all.size_of(notebook) > run_all.LARGEST
    run_all.shrink(notebook)
    shown = Image.open(io.BytesIO(base64.b64decode(notebook.cells[0].outputs[0].data["image/png"])))
    assert run_all.size_of(notebook) <= run_all.LARGEST
    assert np.abs(np.asarray(shown).astype(int) - picture).max() <= 255 / 15 / 2 + 1


def test_problems_are_found():
    def problems_of(output, count=1):
        cell = new_code_cell("x", execution_count=count, outputs=[output])
        return run_all.problems(new_notebook(cells=[cell]))

    def text(words):
        return new_output("stream", name="stdout", text=words)

    table = "<table><thead><tr><th>PSNR</th></tr></thead><tbody>{}</tbody></table>"
    for fine in ("12 steps/s, 1/2, https://x.org/tmp/a", "name  dB\n----  --\na      3\n"):
        assert problems_of(text(fine)) == []
    assert problems_of(new_output("display_data", {"text/html": table.format("<tr></tr>")})) == []
    wrong = [text(f"in {path}: warning") for path in ("/home/me/x.py", "/tmp/ipykernel_1/2.py", "/work/b")]
    wrong += [text("name  dB\n----  --\n"), text("Empty DataFrame\nColumns: [a]\nIndex: []")]
    wrong += [new_output("display_data", {"text/html": table.format("\n ")})]
    wrong += [new_output("error", ename="KeyError", evalue="'a'", traceback=[])]
    wrong += [new_output("display_data", {"image/png": "A" * run_all.LARGEST})]
    assert [len(problems_of(output)) for output in wrong] == [1] * len(wrong)
    assert len(problems_of(text("ok"), count=2)) == 1
    bar = [new_output("stream", name="stderr", text=text) for text in ("start\n", "\r 0%", "\r100%\n")]
    assert [output.text for output in run_all.last_lines(bar)] == ["start\n100%\n"]
    a, b, c = (f"train:  {n}%|#| {n}/100" for n in (17, 60, 100))
    bar = [text(a), new_output("display_data", {}), text("so far\n" + b), text("\r" + c)]
    assert [output.get("text") for output in run_all.last_lines(bar)] == [None, "so far\n" + c]
