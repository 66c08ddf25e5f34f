"""Widgets in a real JupyterLab and browser: a reader runs all cells of two notebooks, in smoke or NF_PRESET,
and moves the controls (test_notebooks.py does so in the others). Screenshots: runs/browser/<preset>/."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

PRESET = os.environ.get("NF_PRESET", "smoke")
TIMEOUT = 240 if PRESET == "smoke" else 1200  # seconds that a notebook may take
NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("0[46]_*.ipynb"))
FLAGS = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--no-first-run"]
SETTINGS = {"notebook-extension/tracker": '{"windowingMode": "none"}'}  # cells out of view stay in the page
SETTINGS["apputils-extension/notification"] = '{"fetchNews": "false"}'
PANEL = ".jp-OutputArea-child:has(img.widget-image)"
STDERR = '[data-mime-type="application/vnd.jupyter.stderr"]'
# Only a traceback has the name of its exception in red; a panel shows its error in place of its picture.
ERROR = f"{STDERR}:has(.ansi-red-fg), .nf-error"
# Asked within the page, which is cheap: an error is shown, or no cell waits or runs any more.
ENDED = """error => document.querySelector(error) ||
    ![...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].some(x => x.textContent.match(/[ *]]/))"""
BUTTON = "button.jupyter-button:enabled:not(.widget-upload)"


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """(folder, address) of a JupyterLab server of this test process."""
    folder = tmp_path_factory.mktemp("lab")
    for name, text in SETTINGS.items():
        setting = folder / "config" / "lab" / "user-settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        setting.parent.mkdir(parents=True, exist_ok=True)
        setting.write_text(text)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    own = {"JUPYTER_CONFIG_DIR": str(folder / "config"), "JUPYTER_RUNTIME_DIR": str(folder / "runtime")}
    own |= {"NF_PRESET": PRESET} | ({"OMP_NUM_THREADS": "1"} if PRESET == "smoke" else {})
    flags = f"--ServerApp.port={port} --ServerApp.root_dir={folder} --ip=127.0.0.1"
    flags += " --no-browser --allow-root --IdentityProvider.token= --ServerApp.disable_check_xsrf=True"
    command = [sys.executable, "-m", "jupyterlab", *flags.split()]
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(command, cwd=folder, env={**os.environ, **own}, stdout=log, stderr=log)
    deadline = time.monotonic() + 90
    while not (folder / "server.log").read_text().count("is running at"):
        assert server.poll() is None and time.monotonic() < deadline, (folder / "server.log").read_text()
        time.sleep(0.2)
    yield folder, f"http://127.0.0.1:{port}"
    server.terminate()
    server.wait(60)


@pytest.fixture(scope="module")
def browser():
    """The installed chromium. Skips without one, unless NF_REQUIRE_BROWSER is set."""
    names = ("chromium", "chromium-browser", "google-chrome")
    executable = next(filter(None, map(shutil.which, names)), None)
    assert executable or not os.environ.get("NF_REQUIRE_BROWSER"), f"none of {names} is installed"
    if executable is None:
        pytest.skip(f"none of {names} is installed")
    with pytest.importorskip("playwright.sync_api").sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, lab):
    """A page without errors in its console; the kernels that it started end with it."""
    page, complaints = browser.new_page(viewport={"width": 1400, "height": 1000}), []
    page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    yield page
    page.close()
    for session in json.load(urllib.request.urlopen(f"{lab[1]}/api/sessions")):
        request = urllib.request.Request(f"{lab[1]}/api/sessions/{session['id']}", method="DELETE")
        urllib.request.urlopen(request).close()
    # JupyterLab's debugger asks a kernel for its state at the very moment at which it is restarted.
    assert [text for text in complaints if "restore the debugger state" not in text] == []


def run_cells(page, lab, name, sources, timeout=60):
    """Write a notebook, open it and run all cells; waits until they have ended, unless timeout is 0."""
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    nbformat.write(new_notebook(cells=list(map(new_code_cell, sources)), metadata=kernel), lab[0] / name)
    page.goto(f"{lab[1]}/lab/tree/{name}?reset")
    page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=60_000)
    page.get_by_text("| Idle").wait_for(timeout=60_000)  # the status bar: the kernel is connected
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Restart Kernel and Run All Cells…", exact=True).click()
    page.get_by_role("button", name="Confirm Kernel Restart").click()
    if timeout:
        page.wait_for_function(ENDED, arg=ERROR, timeout=1000 * timeout, polling=250)
        assert not page.locator(ERROR).count(), page.locator(ERROR).first.inner_text()


def change(page, panel):
    """Move the first slider of a panel, press its button if it has one, wait for another picture."""
    picture, button = panel.locator("img.widget-image"), panel.locator(BUTTON)
    before, handle = picture.get_attribute("src"), panel.locator("[role=slider]").first
    at_end = handle.get_attribute("aria-valuenow") == handle.get_attribute("aria-valuemax")
    handle.press("ArrowLeft" if at_end else "ArrowRight")
    if button.count():
        panel.get_by_text("settings changed").wait_for()
        button.click()
    done = "([picture, before]) => picture.src != before && !document.querySelector('.nf-busy')"
    page.wait_for_function(done, arg=[picture.element_handle(), before], timeout=60_000)


PANELS = """\
import time, ipywidgets
from matplotlib.figure import Figure
from nfhelpers import widgets

def draw(height, upload=()):
    assert height != 1, f"no {height}"
    time.sleep(0.3)
    figure = Figure(figsize=(3, 2))
    figure.subplots().bar([0, 1], [1, height])
    content = upload[0]["content"].tobytes() if upload else b""
    return figure, f"height {height}, {len(content)} bytes"
"""


def test_panels_keep_up_show_their_errors_and_take_files(page, lab, tmp_path):
    plain = "widgets.panel(draw, {'height': widgets.slider(0, 0, 50, 1, 'height')})"
    own = "widgets.panel(draw, {'upload': ipywidgets.FileUpload(), 'height': ipywidgets.IntSlider(2)}, "
    run_cells(page, lab, "panels.ipynb", [PANELS, plain, own + "button='draw', cache=0)"])
    first, second = page.locator(PANEL).all()
    handle, picture = first.locator("[role=slider]"), first.locator("img")
    assert first.locator(".slider-container").bounding_box()["width"] > 400  # the track uses the width
    handle.press("ArrowRight")
    first.get_by_text("AssertionError: no 1").wait_for(timeout=10_000)
    assert not picture.is_visible()
    for _ in range(19):  # faster than they are drawn: what comes meanwhile is skipped
        handle.press("ArrowRight")
    first.get_by_text("height 20,").wait_for(timeout=20_000)
    assert picture.is_visible() and not page.locator(ERROR).count()
    (tmp_path / "mine.png").write_bytes(bytes(12 * 2**20))  # over Jupyter's own limit, see the Makefile
    with page.expect_file_chooser() as chooser:
        second.locator(".widget-upload").click()
    chooser.value.set_files(tmp_path / "mine.png")
    second.get_by_text("mine.png, 12,582,912 bytes").wait_for(timeout=20_000)
    second.locator(BUTTON).click()
    second.get_by_text(f"{12 * 2**20} bytes").wait_for(timeout=20_000)


def test_the_stop_button_is_heard_while_a_cell_runs(page, lab):
    training = """\
history = {"loss": [1.0]}
try:
    with widgets.training_monitor(100_000) as callback:
        for epoch in range(1, 100_001):
            time.sleep(0.1)
            callback(epoch, history, None)
except KeyboardInterrupt:
    print(f"stopped after {epoch > 0}")
"""
    run_cells(page, lab, "stop.ipynb", [PANELS, training], timeout=0)
    page.get_by_text(re.compile(r"epoch \d+ of 100000, loss")).first.wait_for(timeout=60_000)
    page.get_by_role("button", name="stop training").click()
    page.get_by_text("stopped after True").wait_for(timeout=20_000)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_reader_runs_all_and_moves_the_widgets(page, lab, repository, path):
    sources = [c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    for name in ("notebooks", "nfhelpers"):  # looks like the repository, see run.repository_root
        (lab[0] / path.stem / name).mkdir(parents=True)
    for name in ("pyproject.toml", "checkpoints"):
        (lab[0] / path.stem / name).symlink_to(repository / name)
    run_cells(page, lab, f"{path.stem}/notebooks/{path.name}", sources, TIMEOUT)
    panels = page.locator(PANEL).all()
    assert len(panels) == sum("widgets.panel(" in source for source in sources)
    for number, panel in enumerate(panels, start=1):
        change(page, panel)
        panel.screenshot(path=repository / "runs" / "browser" / PRESET / f"{path.stem}_{number}.png")
    lines = "\n".join(page.locator(STDERR).all_inner_texts()).splitlines()
    assert [line for line in lines if line.strip() and not re.search(r"\d+%\|.*\|", line)] == [], "warnings"
