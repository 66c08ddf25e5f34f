"""Widgets in a real JupyterLab and browser: a reader's moves, and pictures and numbers that follow them.

The notebooks run in smoke, or in the preset that NF_PRESET names; as a reader of demo meets them:

    NF_PRESET=demo .venv/bin/python -m pytest tests/test_browser.py -k runs_all

Screenshots of each notebook and of its panels before and after, and the seconds that they took, are left in
runs/browser/<preset>/<notebook>/.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import closing, contextmanager
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image

PRESET = os.environ.get("NF_PRESET", "smoke")
TIMEOUT = 180 if PRESET == "smoke" else 1200
"""Seconds that a notebook may take."""

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
STDERR = '[data-mime-type="application/vnd.jupyter.stderr"]'
PROGRESS = re.compile(r"\d+%\|.*\|")  # a line of tqdm, which writes to stderr what is no warning
BUSY = ".nf-busy"
BUTTON = "button.jupyter-button:enabled:not(.widget-upload)"
# JupyterLab's debugger asks a kernel for its state at the very moment at which JupyterLab restarts it.
RESTART_NOISE = "Could not restore the debugger state: Canceled future"
NOT_RUN, RUNNING = "[ ]:", "[*]:"  # prompts of code cells

IMPORTS = """\
import time
import ipywidgets, numpy as np
from IPython.display import display
from matplotlib.figure import Figure
from nfhelpers import images, models, train, widgets
from nfhelpers.run import field_datasets, load_settings

def bars(height):
    figure = Figure(figsize=(3, 2))
    figure.subplots().bar([0, 1], [1, height])
    return figure
"""
PANEL_OF = "widgets.panel({}, dict(height=ipywidgets.IntSlider(0, 0, 50, description='height')){})"
TINY_V1 = """\
def tiny():
    return models.MambaDiffusion(models.MambaDiffusionConfig(
        d_model=16, num_layers=1, d_state=2, num_fourier_features=8, num_heads=2))
"""


@pytest.fixture(scope="module")
def browser():
    """The installed chromium. Skips without one, unless NF_REQUIRE_BROWSER is set."""
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        missing = f"none of {', '.join(BROWSERS)} is installed"
        if os.environ.get("NF_REQUIRE_BROWSER"):
            pytest.fail(f"NF_REQUIRE_BROWSER is set, but {missing}")
        pytest.skip(missing)
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=executable, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    """A page whose `complaints` are the errors of its console."""
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.complaints = []

    def note(said):
        if said.type == "error" and not said.text.startswith(RESTART_NOISE):
            page.complaints.append(said.text)

    page.on("console", note)
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    yield page
    page.close()


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
        "NF_PRESET": PRESET,
        **({"OMP_NUM_THREADS": "1"} if PRESET == "smoke" else {}),
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


def start_all_cells(page, address, notebook):
    """Open a notebook, restart its kernel and run all cells."""
    page.goto(f"{address}/lab/tree/{notebook}")
    page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=60_000)
    page.get_by_text("| Idle").wait_for(timeout=60_000)  # the status bar: the kernel is connected
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Restart Kernel and Run All Cells…", exact=True).click()
    page.get_by_role("button", name="Confirm Kernel Restart").click()


def wait_until_run(page, notebook, timeout):
    """Wait (seconds) until the last cell has ended; fails on an error output."""
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
    page.get_by_text("| Idle").wait_for(timeout=30_000)


def warnings_of(page):
    """What the cells wrote to stderr, without bars of progress."""
    lines = "\n".join(page.locator(STDERR).all_inner_texts()).splitlines()
    return [line for line in lines if line.strip() and not PROGRESS.search(line)]


def photograph(page, folder):
    """The whole notebook from its top, in parts: notebook_1.png, notebook_2.png ..."""
    before = page.viewport_size
    page.set_viewport_size({**before, "height": 3000})
    shown = page.locator(".jp-WindowedPanel-outer")
    height, part = shown.evaluate("notebook => [notebook.scrollHeight, notebook.clientHeight]")
    for number, top in enumerate(range(0, height, part), start=1):
        shown.evaluate("(notebook, top) => { notebook.scrollTop = top }", top)
        shown.screenshot(path=folder / f"notebook_{number}.png")
    page.set_viewport_size(before)


def press(page, panel):
    """In a panel move the first slider a step by keyboard; of one with a button all, and press it.

    Returns when the last key or the button was pressed.
    """
    button = panel.locator(BUTTON)
    handles = panel.locator("[role=slider]").all()
    for handle in handles if button.count() else handles[:1]:
        value = handle.get_attribute("aria-valuenow")
        handle.scroll_into_view_if_needed()
        handle.focus()
        key = "ArrowLeft" if value == handle.get_attribute("aria-valuemax") else "ArrowRight"
        begin = time.monotonic()
        handle.press(key)
        assert handle.get_attribute("aria-valuenow") != value, "the slider did not move"
    if button.count():
        panel.get_by_text("settings changed").wait_for()
        begin = time.monotonic()
        button.click()
    return begin


def move_sliders(page, folder=None, timeout=30):
    """In each panel change a setting and wait (seconds) until picture and number change; seconds each took.

    Writes panel_1_before.png, panel_1_after.png ... into `folder`.
    """
    page.locator(PANEL).first.wait_for(timeout=30_000)
    taken = []
    for number, panel in enumerate(page.locator(PANEL).all(), start=1):
        picture = panel.locator("img")
        before = picture.get_attribute("src"), panel.inner_text()
        if folder:
            panel.screenshot(path=folder / f"panel_{number}_before.png")
        begin = press(page, panel)
        while True:
            after = picture.get_attribute("src"), panel.inner_text()
            if all(x != y for x, y in zip(after, before, strict=True)) and not panel.locator(BUSY).count():
                break
            assert not page.locator(ERROR).count(), page.locator(ERROR).first.inner_text()
            assert time.monotonic() - begin < timeout, f"panel {number} was changed, its picture was not"
            page.wait_for_timeout(100)  # looking more often would take a processor from the kernel
        taken.append(time.monotonic() - begin)
        page.wait_for_function("picture => picture.complete", arg=picture.element_handle())
        if folder:
            panel.screenshot(path=folder / f"panel_{number}_after.png")
    return taken


def write_notebook(path, *sources):
    kernel = {"name": "python3", "display_name": "Python 3"}
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)


def run_all_cells(page, address, notebook, timeout):
    start_all_cells(page, address, notebook)
    wait_until_run(page, notebook, timeout)


@contextmanager
def opened(page, folder, *sources, timeout=60):
    """A notebook of these cells, run in JupyterLab; ends with a look at the errors of its page."""
    write_notebook(folder / "tiny.ipynb", *sources)
    with jupyterlab(folder) as address:
        run_all_cells(page, address, "tiny.ipynb", timeout=timeout)
        yield
        assert page.complaints == []


@pytest.mark.parametrize(
    ("source", "message"),
    [("raise ValueError('this value')", "ValueError: this value"), ("1 +", "SyntaxError")],
)
def test_a_failed_cell_fails_at_once(page, tmp_path, source, message):
    log = "import sys; print('only a warning', file=sys.stderr)"
    with pytest.raises(pytest.fail.Exception, match="tiny.ipynb shows an error") as failed:
        with opened(page, tmp_path, log, source, "print('never')"):
            pass
    # The first output that counts as an error is the exception, not the warning above it.
    assert message in str(failed.value) and "only a warning" not in str(failed.value)


def test_a_warning_is_seen_and_a_bar_of_progress_is_none(page, tmp_path):
    bar = "from tqdm import tqdm; import sys\nfor _ in tqdm(range(3), desc='train'): pass\n"
    with opened(page, tmp_path, bar + "print('a warning', file=sys.stderr)"):
        assert page.get_by_text("train: 100%").count() == 1
        assert warnings_of(page) == ["a warning"]


def test_a_slow_panel_says_so_and_skips_what_it_cannot_keep_up_with(page, tmp_path):
    draw = """\
drawn = []

def draw(height):
    drawn.append(height)
    time.sleep(0.3 if len(drawn) > 1 else 0)
    return bars(height), f"height {height}, {len(drawn)} drawings" """
    with opened(page, tmp_path, IMPORTS + draw, PANEL_OF.format("draw", "")):
        handle = page.locator(PANEL).locator("[role=slider]")
        handle.focus()
        for _ in range(20):
            handle.press("ArrowRight")
        page.locator(BUSY).wait_for(timeout=5000)
        page.get_by_text("height 20,").wait_for(timeout=5000)
        page.wait_for_timeout(1000)
        text = page.locator(PANEL).locator("code").inner_text()
    # The first value is drawn while the others are made; of those the last is, and one may slip in between.
    assert text in [f"height 20, {count} drawings" for count in (2, 3, 4)], text


def test_a_panel_shows_its_error_in_place_of_the_picture_and_recovers(page, tmp_path):
    draw = "def draw(height):\n    assert height != 1, f'no {height}'\n    return bars(height)\n"
    with opened(page, tmp_path, IMPORTS + draw, PANEL_OF.format("draw", "")):
        panel = page.locator(PANEL)
        handle, picture = panel.locator("[role=slider]"), panel.locator("img")
        assert picture.is_visible()
        handle.press("ArrowRight")
        page.get_by_text("AssertionError: no 1").wait_for(timeout=5000)
        assert not picture.is_visible()
        handle.press("ArrowRight")
        picture.wait_for(state="visible", timeout=5000)
        assert not page.locator(ERROR).count()


def test_the_stop_button_stops_a_running_training_and_leaves_a_checkpoint(page, tmp_path):
    settings = """\
data = {**load_settings("v1", "smoke")["data"], "size": 16, "train_images": 8, "validation_images": 2}
config = train.TrainConfig("stopped", epochs=100_000, batch_size=8, cpu=True, visualise_every=100_000)
datasets, model = field_datasets(data, 0), tiny()
"""
    fit = """\
with widgets.training_monitor(config.epochs) as callback:
    result = train.fit(model, datasets, config, callback=callback)
saved = models.load_model(result.latest)
print("interrupted" if result.interrupted else "finished", type(saved).__name__, result.steps > 0)
"""
    write_notebook(tmp_path / "tiny.ipynb", IMPORTS + TINY_V1 + settings, fit)
    with jupyterlab(tmp_path) as address:
        start_all_cells(page, address, "tiny.ipynb")
        # Any epoch: on a quick machine a certain one is gone before the page is looked at.
        page.get_by_text(re.compile(r"epoch \d+ of 100000, loss")).first.wait_for(timeout=60_000)
        page.get_by_role("button", name="stop training").click()
        page.get_by_text("interrupted MambaDiffusion True").wait_for(timeout=20_000)
        assert page.get_by_role("button", name="stopped").is_disabled()
        wait_until_run(page, "tiny.ipynb", 20)
        assert page.complaints == []
    assert (tmp_path / "stopped" / "state.safetensors").is_file()


def test_an_image_of_ones_own_is_uploaded_and_its_reconstruction_downloaded(page, tmp_path):
    Image.new("RGB", (40, 60), (0, 128, 255)).save(tmp_path / "mine.png")
    show = "widgets.own_image_panel({'v1': tiny()}, np.zeros((32, 32, 3), np.uint8), sizes=(16, 32))"
    with opened(page, tmp_path, IMPORTS + TINY_V1, show):
        panel = page.locator(PANEL)
        before = panel.locator("img").get_attribute("src")
        with page.expect_file_chooser() as chooser:
            panel.locator(".widget-upload").click()
        chooser.value.set_files(tmp_path / "mine.png")
        page.get_by_text("settings changed").wait_for(timeout=5000)
        panel.locator(BUTTON).click()
        page.wait_for_function(
            "([picture, before]) => picture.src !== before",
            arg=[panel.locator("img").element_handle(), before],
        )
        with page.expect_download() as download:
            page.get_by_text("download reconstruction.png").click()
        download.value.save_as(tmp_path / "made.png")
    with Image.open(tmp_path / "made.png") as made:
        assert made.size == (16, 16)
        ours = (np.asarray(made) == (0, 128, 255)).all(-1).sum()
    assert ours >= round(0.2 * 16**2), "the observed pixels are those of the upload"


NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_reader_runs_all_and_moves_the_widgets(page, tmp_path, repository, path):
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:  # a copy without outputs: whatever shows was made by this run
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    (tmp_path / "notebooks").mkdir()
    nbformat.write(notebook, tmp_path / "notebooks" / path.name)
    shutil.copy(repository / "pyproject.toml", tmp_path)
    (tmp_path / "nfhelpers").mkdir()  # run.repository_root looks for it
    (tmp_path / "checkpoints").symlink_to(repository / "checkpoints")
    screenshots = repository / "runs" / "browser" / PRESET / path.stem
    screenshots.mkdir(parents=True, exist_ok=True)
    with jupyterlab(tmp_path) as address:
        begin = time.monotonic()
        run_all_cells(page, address, f"notebooks/{path.name}", timeout=TIMEOUT)
        seconds = {"notebook": time.monotonic() - begin}
        photograph(page, screenshots)
        taken = move_sliders(page, screenshots)
        assert not page.locator(ERROR).count()
        assert page.complaints == [] and warnings_of(page) == []
    seconds |= {f"panel_{number}": value for number, value in enumerate(taken, start=1)}
    seconds = {name: round(value, 2) for name, value in seconds.items()}
    (screenshots / "seconds.json").write_text(json.dumps(seconds, indent=1) + "\n")
    print(f"{path.stem}: seconds", seconds)
    assert len(taken) == sum("_panel(" in cell.source for cell in notebook.cells if cell.cell_type == "code")
