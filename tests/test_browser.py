"""Widgets in a real JupyterLab and browser: a slider is moved by keyboard, and the picture changes."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import closing, contextmanager

import nbformat
import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
    "--no-first-run",
]
SETTINGS = {
    # Cells out of view stay in the page, so that they can be looked at.
    "@jupyterlab/notebook-extension/tracker.jupyterlab-settings": '{"windowingMode": "none"}',
    "@jupyterlab/apputils-extension/notification.jupyterlab-settings": '{"fetchNews": "false"}',
}
PANEL = ".jp-OutputArea-child:has([role=slider])"
# An exception of a cell, or one that a widget shows in place of its picture. JupyterLab renders a traceback
# as it renders a line on stderr, but only a traceback has the name of its exception in red.
ERROR = '[data-mime-type="application/vnd.jupyter.stderr"]:has(.ansi-red-fg), .nf-error'
NOT_RUN, RUNNING = "[ ]:", "[*]:"  # prompts of code cells

TINY = """\
import ipywidgets, numpy as np
from IPython.display import display
from matplotlib.figure import Figure

def draw(decay):
    figure = Figure(figsize=(3, 2))
    figure.subplots().plot(np.exp(-decay * np.arange(20)))
    display(figure)

ipywidgets.interact(draw, decay=ipywidgets.FloatSlider(0.5, min=0, max=2, continuous_update=False));
"""


@pytest.fixture(scope="module")
def page():
    """A page of the installed chromium. Skips without one, unless NF_REQUIRE_BROWSER is set."""
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        missing = f"none of {', '.join(BROWSERS)} is installed"
        if os.environ.get("NF_REQUIRE_BROWSER"):
            pytest.fail(f"NF_REQUIRE_BROWSER is set, but {missing}")
        pytest.skip(missing)
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=executable, args=CHROMIUM_FLAGS)
        yield browser.new_page(viewport={"width": 1400, "height": 1000})
        browser.close()


@contextmanager
def jupyterlab(folder):
    """A JupyterLab server on a free port of this machine, serving `folder`; yields its address."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name, text in SETTINGS.items():
        path = folder / "settings" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    own = {
        "NF_PRESET": "smoke",
        "OMP_NUM_THREADS": "1",
        "JUPYTER_PREFER_ENV_PATH": "1",
        "JUPYTER_CONFIG_DIR": str(folder / "config"),
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
    }
    flags = [f"--ServerApp.port={port}", f"--ServerApp.root_dir={folder}", "--ServerApp.allow_root=True"]
    log = folder / "server.log"
    with log.open("w") as out:
        server = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "jupyterlab",
                "--no-browser",
                "--ip=127.0.0.1",
                "--IdentityProvider.token=",
                *flags,
            ],
            cwd=folder,
            env={**os.environ, **own},
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"{address}/api/status", timeout=5).close()
                break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                if server.poll() is not None or time.monotonic() > deadline:
                    pytest.fail(f"JupyterLab did not start:\n{log.read_text()[-3000:]}")
                time.sleep(0.2)
        yield address
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:  # its kernels have not ended: nothing of a test stays behind
            server.kill()


def run_all_cells(page, address, notebook, timeout):
    """Open a notebook, run all cells, wait (seconds) until the last has ended; fails on an error output."""
    page.goto(f"{address}/lab/tree/{notebook}")
    page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=60_000)
    page.get_by_text("| Idle").wait_for(timeout=60_000)  # the status bar: the kernel is connected
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    prompts = page.locator(".jp-CodeCell .jp-InputPrompt")
    deadline = time.monotonic() + timeout
    states = {NOT_RUN}
    while states & {NOT_RUN, RUNNING}:
        assert time.monotonic() < deadline, f"{notebook} was still running after {timeout} s: {states}"
        page.wait_for_timeout(250)
        states = {text.strip() for text in prompts.all_inner_texts()}
        # After the prompts: the error of the last cell is in the page before its prompt has a number.
        if page.locator(ERROR).count():
            pytest.fail(f"{notebook} shows an error:\n{page.locator(ERROR).first.inner_text()}")


def move_sliders(page, panels=PANEL, slider="[role=slider]", image="img", timeout=30):
    """In each panel move the first slider one step by keyboard and wait (seconds) until a picture changes."""
    page.locator(panels).first.wait_for(timeout=30_000)
    for number, panel in enumerate(page.locator(panels).all(), start=1):
        handle, pictures = panel.locator(slider).first, panel.locator(image)
        before = pictures.evaluate_all("all => all.map(x => x.src)")
        assert before, f"panel {number} has no picture"
        value = handle.get_attribute("aria-valuenow")
        handle.scroll_into_view_if_needed()
        handle.focus()
        handle.press("ArrowLeft" if value == handle.get_attribute("aria-valuemax") else "ArrowRight")
        assert handle.get_attribute("aria-valuenow") != value, f"the slider of panel {number} did not move"
        deadline = time.monotonic() + timeout
        while True:
            after = pictures.evaluate_all("all => all.map(x => x.src)")
            if len(after) == len(before) and after != before:
                break
            assert not page.locator(ERROR).count(), page.locator(ERROR).first.inner_text()
            assert time.monotonic() < deadline, f"the slider of panel {number} moved, its picture did not"
            page.wait_for_timeout(100)


def write_notebook(path, *sources):
    kernel = {"name": "python3", "display_name": "Python 3"}
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)


def test_slider_redraws_the_picture(page, tmp_path):
    write_notebook(tmp_path / "tiny.ipynb", TINY)
    with jupyterlab(tmp_path) as address:
        run_all_cells(page, address, "tiny.ipynb", timeout=60)
        move_sliders(page)
        assert not page.locator(ERROR).count()


@pytest.mark.parametrize(
    ("source", "message"),
    [("raise ValueError('this value')", "ValueError: this value"), ("1 +", "SyntaxError")],
)
def test_a_failed_cell_fails_at_once(page, tmp_path, source, message):
    log = "import sys; print('only a warning', file=sys.stderr)"
    write_notebook(tmp_path / "bad.ipynb", log, source, "print('never')")
    with jupyterlab(tmp_path) as address:
        with pytest.raises(pytest.fail.Exception, match="bad.ipynb shows an error") as failed:
            run_all_cells(page, address, "bad.ipynb", timeout=60)
    # The first output that counts as an error is the exception, not the warning above it.
    assert message in str(failed.value) and "only a warning" not in str(failed.value)


@pytest.mark.parametrize(
    "name", ["01_ssm_basics", "02_flow_matching_v1", "03_multidirectional_scan", "04_bidirectional_v2"]
)
def test_notebook_widgets(page, tmp_path, repository, name):
    path = repository / "notebooks" / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:  # a copy without outputs: whatever shows was made by this run
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    (tmp_path / "notebooks").mkdir()
    nbformat.write(notebook, tmp_path / "notebooks" / path.name)
    shutil.copy(repository / "pyproject.toml", tmp_path)
    (tmp_path / "nfhelpers").mkdir()  # run.repository_root looks for it
    (tmp_path / "checkpoints").symlink_to(repository / "checkpoints")
    with jupyterlab(tmp_path) as address:
        run_all_cells(page, address, f"notebooks/{path.name}", timeout=180)
        move_sliders(page)
        assert not page.locator(ERROR).count()
