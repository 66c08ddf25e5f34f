"""Run the notebooks into build/notebooks, as .ipynb and .html: `make notebooks`. The checkout stays as it is.

Each notebook runs from its first cell to its last in the kernel of this interpreter; its figures go to
build/figures. `--promote` (`make outputs`) then copies notebooks and figures of a good run into notebooks/
and figures/, which is how committed outputs are made.

What an earlier run left is removed first, so that the outputs are of a run that trained: of a notebook the
folder runs/<notebook>/<preset>, of its solutions the folders solution-* in it. Not so under full, where
training takes hours: a run that was stopped goes on where it was.

    python notebooks/run_all.py                       # all of them
    python notebooks/run_all.py 01_ssm_basics.ipynb --timeout 1200
    python notebooks/run_all.py 01_solutions.ipynb    # solutions run only when they are named
    python notebooks/run_all.py --promote
"""

import argparse
import base64
import io
import json
import os
import re
import shutil
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbconvert import HTMLExporter
from nbformat.v4 import new_code_cell
from PIL import Image

from nfhelpers.run import resolve_preset

FOLDER = Path(__file__).resolve().parent
LARGEST = 1_000_000
"""Bytes a notebook may have, outputs included."""

CELL_TIMEOUT = 900
"""Seconds a cell may take; under full a cell may train for as long as it needs."""

PEAK = """
import sys
torch = sys.modules.get("torch")
if torch and torch.cuda.is_initialized():
    print(f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB of GPU memory used", end="")
    print(f", {torch.cuda.max_memory_reserved() / 2**30:.1f} reserved")
"""
"""A last cell, which the copy does not keep."""

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
MACHINE_PATH = re.compile(r"(?<![\w.:/])/(?:home|root|tmp|work|Users|mnt)/[^\s\"'<>]*")
BAR = re.compile(r"(\S[^:]*): +(\d+)%\|")
EMPTY_TABLE = re.compile(r"<tbody>\s*</tbody>|Empty DataFrame|(?:^|\n)[ -]*---[ -]*\s*$")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("notebooks", nargs="*", metavar="NOTEBOOK", help="file names; all if none is given")
    parser.add_argument(
        "--timeout", type=int, help=f"seconds a cell may take (default: {CELL_TIMEOUT}, under full no limit)"
    )
    parser.add_argument(
        "--promote", action="store_true", help="copy the last run's outputs into the checkout"
    )
    options = parser.parse_args(arguments)

    paths = [locate(name) for name in options.notebooks] or sorted(FOLDER.glob("*.ipynb"))
    missing = [path.name for path in paths if not path.is_file()]
    if missing or not paths:
        print(f"error: no such notebook in notebooks/: {', '.join(missing) or '*.ipynb'}", file=sys.stderr)
        return 2
    if options.promote:
        return promote(paths)
    preset = resolve_preset()
    timeout = options.timeout or (CELL_TIMEOUT if preset != "full" else None)
    failed = [path.name for path in paths if not run(path, preset, timeout)]
    print(f"{len(paths) - len(failed)} of {len(paths)} notebooks ended well")
    return 1 if failed else 0


def locate(name):
    """The notebook of this file name, whatever folder is written before it; solutions have their own."""
    name = Path(name).name
    return FOLDER / "solutions" / name if name.endswith("_solutions.ipynb") else FOLDER / name


def run(path, preset, timeout):
    """Run one notebook into build/notebooks and say how it went; True if it ended well."""
    build = FOLDER.parent / "build" / "notebooks"
    build.mkdir(parents=True, exist_ok=True)
    print(f"{path.name} ({preset}) ...", flush=True)
    if preset != "full":  # a finished training would be found and not repeated
        solution = f"{path.stem[:2]}_*/{preset}/solution-*"
        pattern = solution if path.parent.name == "solutions" else f"{path.stem}/{preset}"
        for left in (FOLDER.parent / "runs").glob(pattern):
            shutil.rmtree(left, ignore_errors=True)
    for figure in (FOLDER.parent / "build" / "figures").glob(f"{path.stem}_*.png"):
        figure.unlink()
    start = time.monotonic()
    notebook, peak, complaints = execute(path, preset, timeout)
    nbformat.write(notebook, build / path.name)
    page, _ = HTMLExporter().from_notebook_node(notebook)
    (build / f"{path.stem}.html").write_text(page, encoding="utf-8")
    ended = "FAILED after" if complaints else "ok in"
    print(f"{path.name} {ended} {time.monotonic() - start:.0f} s{peak} -> build/notebooks/{path.name}")
    print(textwrap.indent("".join(f"{line}\n" for line in complaints), "  "), end="", flush=True)
    return not complaints


def execute(path, preset, timeout):
    """Run a copy of one notebook; returns it with its outputs, its GPU memory, and a list of complaints."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:  # of a run that ends early, no cell shows what an earlier run found
        cell.update({"outputs": [], "execution_count": None} if cell.cell_type == "code" else {})
    notebook.cells.append(new_code_cell(PEAK))
    os.environ["NF_PRESET"] = preset  # the kernel inherits it
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        extra_arguments=["--log-level=ERROR"],  # of the kernel: no warning that it listens on this machine
        record_timing=False,
        store_widget_state=False,
        resources={"metadata": {"path": str(path.parent)}},
    )
    complaints = []
    try:
        client.execute()
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        complaints.append(str(error).strip())
    peak = "".join(output.get("text", "") for output in notebook.cells.pop().outputs).strip()
    tidy(notebook)
    shrink(notebook)
    return notebook, peak, complaints or problems(notebook)


def tidy(notebook):
    """Drop from the outputs, in place, what is worth nothing in a committed file.

    Live views of widgets cannot be shown without their kernel, so a line of text takes their place; of a
    progress bar its last state stays; paths of this machine are shortened.
    """
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        for output in cell.outputs:
            if WIDGET_VIEW in output.get("data", {}):
                output.data = nbformat.from_dict({"text/plain": "(a widget: run the notebook to use it)"})
        outputs = last_lines(cell.outputs)
        cell.outputs = nbformat.from_dict(json.loads(shorten_paths(json.dumps(outputs))))


def size_of(notebook):
    return len(nbformat.writes(notebook).encode())


def shrink(notebook):
    """Give the pictures of a notebook that is too large fewer shades a channel, which the eye hardly sees."""
    for shades in (64, 32, 16):
        if size_of(notebook) <= LARGEST:
            return
        table = [round(round(v * (shades - 1) / 255) * 255 / (shades - 1)) for v in range(256)]
        for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
            if png := output.get("data", {}).get("image/png"):
                picture, file = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"), io.BytesIO()
                picture.point(3 * table).save(file, "png", optimize=True)
                output.data["image/png"] = base64.b64encode(file.getvalue()).decode()


def last_lines(outputs):
    """Outputs with neighbouring streams joined, without what a carriage return overwrote.

    Of a progress bar's states in a cell, the last one and those at 100% stay.
    """
    joined = []
    for output in outputs:
        previous = joined[-1] if joined else {}
        if output.output_type == "stream" and previous.get("name") == output.name:
            previous.text += output.text
        else:
            joined.append(output)
    later = set()  # progress bars that go on further down: a figure may stand between two of their states
    for output in reversed(joined):
        if output.output_type == "stream":
            lines = [line.removesuffix("\r").rsplit("\r", 1)[-1] for line in output.text.split("\n")]
            kept = []
            for line in reversed(lines):
                bar = BAR.match(line)
                if not bar or bar[2] == "100" or bar[1] not in later:
                    kept.append(line)
                later |= {bar[1]} if bar else set()
            output.text = "\n".join(reversed(kept))
    return [output for output in joined if output.get("text", "shown").strip()]


def shorten_paths(text):
    """Replace this machine's folders: a cell's temporary file, the environment, the repository, the home."""
    text = re.sub(re.escape(tempfile.gettempdir()) + r"/ipykernel_\d+/\d+\.py", "<cell>", text)
    for folder, name in ((sys.prefix, "<env>"), (FOLDER.parent, "."), (Path.home(), "~")):
        text = re.sub(re.escape(str(folder)) + r"(?=[/\s\"'\\:),]|$)", name, text)
    return text


def problems(notebook):
    """What keeps a notebook with outputs from being committed, one line each."""
    found = []
    if "widgets" in notebook.metadata:
        found.append("metadata.widgets is set")
    size = size_of(notebook)
    if size > LARGEST:
        found.append(f"{size:,} bytes is more than {LARGEST:,}; draw smaller figures")
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    counts = [cell.execution_count for cell in code]
    if counts != list(range(1, len(code) + 1)):
        found.append(f"execution counts are {counts}, not 1 to {len(code)}: not one clean run")
    for number, cell in enumerate(code, start=1):
        for output in cell.outputs:
            if output.output_type == "error":
                found.append(f"code cell {number} holds an error: {output.ename}: {output.evalue}")
            data = {kind: text for kind, text in output.get("data", {}).items() if kind != "image/png"}
            for text in map(str, (output.get("text", ""), *data.values())):
                if shown := MACHINE_PATH.search(text):
                    found.append(f"code cell {number} shows a path of this machine: {shown.group()}")
                if EMPTY_TABLE.search(text):
                    found.append(f"code cell {number} shows a table without rows")
    return found


def promote(paths):
    """Copy notebooks of build/notebooks that ended well, and their figures, over those of the checkout."""
    built, committed = FOLDER.parent / "build", FOLDER.parent / "figures"
    for path in paths:
        source = built / "notebooks" / path.name
        if not source.is_file():
            print(f"error: {path.name} has not run: `make notebooks`", file=sys.stderr)
            return 1
        notebook = nbformat.read(source, as_version=4)
        complaints = problems(notebook)
        if re.search(r"preset +smoke", nbformat.writes(notebook)):
            complaints.append("its outputs are of the preset smoke")
        if complaints:
            print(f"error: {path.name}: {'; '.join(complaints)}", file=sys.stderr)
            return 1
        shutil.copyfile(source, path)
        for old in committed.glob(f"{path.stem}_*.png"):
            old.unlink()
        figures = sorted((built / "figures").glob(f"{path.stem}_*.png"))
        for figure in figures:
            shutil.copyfile(figure, committed / figure.name)
        print(f"{path.name}, {len(figures)} figures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
