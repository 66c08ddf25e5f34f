"""Run the notebooks on copies and write their outputs back when a run ends well: `make notebooks`.

Each notebook runs from its first cell to its last in the kernel of this interpreter. Outputs replace those of
the notebook file only if every cell ended well and the result passes `problems`; otherwise the file stays as
it was and the failing copy lies in build/notebooks. Under NF_PRESET=smoke nothing is written back: committed
outputs come from demo or full.

What an earlier run left in runs/<notebook>/<preset> is removed first, so that the outputs are of a run that
trained. Not so under full, where training takes hours: a run that was stopped goes on where it was.

    python notebooks/run_all.py                       # all of them
    python notebooks/run_all.py 01_ssm_basics.ipynb --timeout 1200
    python notebooks/run_all.py 01_solutions.ipynb    # solutions run only when they are named
"""

import argparse
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

from nfhelpers.run import resolve_preset

FOLDER = Path(__file__).resolve().parent
BUILD = FOLDER.parent / "build" / "notebooks"
LARGEST = 1_000_000
"""Bytes a notebook may have, outputs included."""

CELL_TIMEOUT = 900
"""Seconds a cell may take in smoke and demo; a cell of the full preset may train for as long as it needs."""

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
MACHINE_PATH = re.compile(r"(?<![\w.:/])/(?:home|root|tmp|work|Users|mnt)/[^\s\"'<>]*")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "notebooks", nargs="*", metavar="NOTEBOOK", help="file names; all notebooks if none is given"
    )
    parser.add_argument(
        "--timeout", type=int, help=f"seconds a cell may take (default: {CELL_TIMEOUT}, none in full)"
    )
    options = parser.parse_args(arguments)

    preset = resolve_preset()
    timeout = options.timeout or (None if preset == "full" else CELL_TIMEOUT)
    paths = [locate(name) for name in options.notebooks] or sorted(FOLDER.glob("*.ipynb"))
    missing = [path.name for path in paths if not path.is_file()]
    if missing or not paths:
        print(
            f"error: no such notebook in {FOLDER.name}/: {', '.join(missing) or '*.ipynb'}", file=sys.stderr
        )
        return 2
    BUILD.mkdir(parents=True, exist_ok=True)
    failed = []
    for path in paths:
        print(f"{path.name} ({preset}) ...", flush=True)
        if preset != "full":
            forget(path.stem, preset)
        start = time.monotonic()
        notebook, complaints = execute(path, preset, timeout)
        seconds = time.monotonic() - start
        if complaints:
            failed.append(path.name)
            write(notebook, BUILD / path.name)
            print(f"{path.name} FAILED after {seconds:.0f} s; its copy is build/notebooks/{path.name}")
            print(textwrap.indent("\n".join(complaints), "  "), flush=True)
        else:
            target = BUILD / path.name if preset == "smoke" else path
            write(notebook, target)
            print(f"{path.name} ok in {seconds:.0f} s -> {target.relative_to(FOLDER.parent)}", flush=True)
    print(f"{len(paths) - len(failed)} of {len(paths)} notebooks ended well")
    return 1 if failed else 0


def locate(name):
    """The notebook of this file name, whatever folder is written before it; solutions have their own."""
    name = Path(name).name
    return FOLDER / "solutions" / name if name.endswith("_solutions.ipynb") else FOLDER / name


def forget(notebook, preset):
    """Remove what an earlier run of a notebook left; a finished training would be found and not repeated."""
    folder = FOLDER.parent / "runs" / notebook / preset
    if folder.is_dir():
        shutil.rmtree(folder)


def execute(path, preset, timeout):
    """Run a copy of one notebook; returns the copy with its outputs and a list of complaints."""
    notebook = nbformat.read(path, as_version=4)
    os.environ["NF_PRESET"] = preset  # the kernel inherits it
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        record_timing=False,
        store_widget_state=False,
        resources={"metadata": {"path": str(path.parent)}},
    )
    complaints = []
    try:
        client.execute()
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        complaints.append(str(error).strip())
    tidy(notebook)
    return notebook, complaints or problems(notebook)


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


def last_lines(outputs):
    """Outputs with neighbouring streams joined, and what a carriage return overwrote left out."""
    joined = []
    for output in outputs:
        previous = joined[-1] if joined else {}
        if output.output_type == "stream" and previous.get("name") == output.name:
            previous.text += output.text
        else:
            joined.append(output)
    for output in joined:
        if output.output_type == "stream":
            output.text = "\n".join(line.rsplit("\r", 1)[-1] for line in output.text.split("\n"))
    return joined


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
    size = len(nbformat.writes(notebook).encode())
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
            # A path may stand in any text, but base64 pictures are not text.
            texts = [
                output.get("text", ""),
                *(v for k, v in output.get("data", {}).items() if k != "image/png"),
            ]
            shown = MACHINE_PATH.search(json.dumps(texts))
            if shown:
                found.append(f"code cell {number} shows a path of this machine: {shown.group()}")
    return found


def write(notebook, path):
    """Write a notebook so that a reader sees the old file or the new one, never a part."""
    partial = path.with_suffix(".ipynb.part")
    nbformat.write(notebook, partial)
    os.replace(partial, path)


if __name__ == "__main__":
    sys.exit(main())
