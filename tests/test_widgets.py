"""Panels redraw when a control moves, and hide no error; the monitor of a training stops it."""

import io
from datetime import datetime

import ipywidgets
import pytest
from matplotlib.figure import Figure
from PIL import Image

from nfhelpers import widgets


def bars(height):
    figure = Figure(figsize=(2, 2))
    figure.subplots().bar([0, 1], [1, height])
    return figure, f"height <{height}>", f"<b>{height}</b>"


def parts(box):
    """The slider, the line of text, the picture and the HTML below of a panel."""
    return box.children[0], *box.children[-3:]


def test_a_panel_redraws_and_keeps_some_drawings():
    drawn = []

    def draw(height):
        drawn.append(height)
        return bars(height)

    controls = {"height": widgets.slider(1, 1, 5, 1, "height")}
    slider, text, image, below = parts(widgets.panel(draw, controls, cache=2))
    first = image.value
    assert Image.open(io.BytesIO(first)).size == (200, 200) and not slider.continuous_update
    for height in (2, 1, 3, 2):  # 1 is kept; 3 takes the place of 2
        slider.value = height
    assert drawn == [1, 2, 3, 2] and image.value != first
    assert "&lt;2&gt;" in text.value and below.value == "<b>2</b>"


def test_a_panel_shows_its_error_in_place_of_the_picture_and_recovers():
    def draw(height):
        if height == 2:
            raise ValueError("not <2>")
        return bars(height)[0]

    slider, text, image, _ = parts(widgets.panel(draw, {"height": ipywidgets.IntSlider(1, 1, 5)}))
    with pytest.raises(ValueError, match="not <2>"):
        slider.value = 2
    assert "nf-error" in text.value and "not &lt;2&gt;" in text.value and image.layout.display == "none"
    slider.value = 3
    assert image.layout.display is None and text.value == ""
    with pytest.raises(ZeroDivisionError):  # the first drawing fails in the cell
        widgets.panel(lambda height: 1 / 0, {"height": ipywidgets.IntSlider()})


def test_a_control_without_effect_is_greyed_out():
    controls = {"height": widgets.slider(1, 1, 5, 1, "height"), "kind": widgets.choice("ab", "a", "kind")}
    widgets.panel(lambda height, kind: bars(height), controls, uses={"height": ("kind", ["b"])})
    assert controls["height"].disabled
    controls["kind"].value = "b"
    assert not controls["height"].disabled


def test_a_panel_with_a_button_waits_for_it():
    box = widgets.panel(bars, {"height": widgets.steps([1, 2, 4], 1, "height")}, button="draw")
    slider, _, image, below = parts(box)
    before = image.value
    slider.value = 4
    assert image.value == before and below.value == "<b>1</b>"
    box.children[1].click()
    assert image.value != before and below.value == "<b>4</b>"


def test_a_panel_names_the_upload_that_it_draws():
    upload = ipywidgets.FileUpload()
    box = widgets.panel(lambda upload: bars(len(upload))[0], {"upload": upload}, button="draw", cache=0)
    text = box.children[-3]
    assert "none" in text.value
    file = {"name": "<my>.png", "type": "", "size": 3, "last_modified": datetime.now()}
    upload.value = [file | {"content": memoryview(b"abc")}]
    assert "&lt;my&gt;.png, 3 bytes" in text.value and "draw" in text.value
    box.children[1].click()
    assert "&lt;my&gt;.png, 3 bytes" in text.value and "draw" not in text.value


def test_a_pressed_stop_button_ends_the_training_after_the_epoch(monkeypatch):
    shown, ended = [], []
    monkeypatch.setattr(widgets, "display", shown.append)
    history = {"loss": [0.5]}
    with pytest.raises(KeyboardInterrupt), widgets.training_monitor(4) as callback:
        button, line = shown[0].children
        for epoch in (1, 2, 3, 4):
            if epoch == 2:
                button.click()
            callback(epoch, history, None)
            ended.append(epoch)
    assert ended == [1] and button.disabled
    assert "epoch 2 of 4, loss 0.500" in line.value
