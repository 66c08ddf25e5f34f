"""Widgets: moving a control redraws the picture with the library's numbers, and no error is hidden."""

import io

import ipywidgets
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from nfhelpers import evaluate, metrics, widgets
from nfhelpers.models import (
    LocalImplicitField,
    LocalImplicitFieldConfig,
    MambaDiffusion,
    MambaDiffusionConfig,
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LocalImplicitField(LocalImplicitFieldConfig(d_model=16, num_heads=2, neighbours=4, num_layers=1))


@pytest.fixture(scope="module")
def pictures():
    return np.random.default_rng(0).uniform(size=(3, 12, 12, 3)).astype(np.float32)


def control(box, description):
    """The control of a panel with this description."""
    return next(child for child in box.children if getattr(child, "description", None) == description)


def parts(box):
    """The HTML line and the picture of a panel."""
    return box.children[-2], box.children[-1]


def line(height):
    figure = Figure(figsize=(2, 2))
    figure.subplots().plot([0, height])
    return figure, f"height {height}"


def test_panel_redraws_on_change():
    box = widgets.panel(line, {"height": ipywidgets.IntSlider(1, 1, 5, description="height")})
    text, image = parts(box)
    before = image.value
    assert Image.open(io.BytesIO(before)).format == "PNG"
    assert "height 1" in text.value
    control(box, "height").value = 3
    assert image.value != before
    assert "height 3" in text.value


def test_panel_shows_and_raises_errors_then_recovers():
    def draw(height):
        if height == 2:
            raise ValueError("height=2 is <bad>; pass 3")
        return line(height)

    box = widgets.panel(draw, {"height": ipywidgets.IntSlider(1, 1, 5, description="height")})
    text, image = parts(box)
    with pytest.raises(ValueError, match="height=2"):
        control(box, "height").value = 2
    assert "ValueError: height=2 is &lt;bad&gt;; pass 3" in text.value and "nf-error" in text.value
    assert image.layout.display == "none", "a picture of other settings must not stay"
    control(box, "height").value = 3
    assert image.layout.display is None and "nf-error" not in text.value


def test_first_drawing_raises_in_the_cell():
    with pytest.raises(ZeroDivisionError):
        widgets.panel(lambda height: 1 / 0, {"height": ipywidgets.IntSlider()})


def test_reconstruction_panel_agrees_with_the_library(model, pictures):
    box = widgets.reconstruction_panel(model, pictures, steps=2)
    text, image = parts(box)
    seen = {image.value}
    control(box, "image").value = 1
    seen.add(image.value)
    control(box, "observed fraction").value = 0.4
    seen.add(image.value)
    control(box, "sampler").value = "heun"
    seen.add(image.value)
    control(box, "seed").value = 3
    seen.add(image.value)
    assert len(seen) == 5
    fields = evaluate.observe_images(pictures[1:2], 0.4, 3)
    result = evaluate.reconstruct(model, fields, kind="sample", method="heun", steps=2, seed=3)
    psnr = metrics.psnr(result["fields"], pictures[1:2])[0]
    assert f"sample (heun, 2): PSNR {psnr:.2f} dB" in text.value
    assert not control(box, "image").continuous_update
    with pytest.raises(ValueError, match="image=3"):
        widgets.reconstruction_figure(model, pictures, image=3)


def test_hyperparameter_panel_states_the_cost():
    config = MambaDiffusionConfig(d_model=64, num_layers=2, num_fourier_features=16)
    box = widgets.hyperparameter_panel(MambaDiffusion, config, batch_size=4)
    text, image = parts(box)
    before = image.value
    control(box, "d_model").value = 128
    assert image.value != before
    wanted = evaluate.model_cost(
        MambaDiffusion(MambaDiffusionConfig(d_model=128, num_layers=2, num_fourier_features=16)), 204, 204, 4
    )
    assert f"{wanted['parameters'] / 1e6:.2f} M parameters" in text.value
    assert f"{wanted['flops_forward'] / 1e9:.1f} GFLOP" in text.value


def test_ssm_panels():
    box = widgets.impulse_panel()
    before = parts(box)[1].value
    control(box, "step Δ").value = 0.5
    assert parts(box)[1].value != before
    rows = [{"method": "scan", "length": n, "seconds": n * 1e-6, "memory": n * 8} for n in (64, 128, 256)]
    box = widgets.cost_panel(rows)
    before = parts(box)[1].value
    control(box, "length L").value = 1000
    assert parts(box)[1].value != before
