"""Widgets over `plots`: the same figures with sliders.

A notebook draws the static figure first and asserts on it; the widget below it calls the same function. A
widget shows its figure as a PNG in an `ipywidgets.Image`, whose <img> gets a new src at every change. When
drawing fails, the picture is removed, the error stands in its place in red and is raised again, so that
neither a reader nor a log can miss it; the very first drawing raises in the cell itself.

Sliders whose change costs model evaluations redraw on release only.
"""

import html
import io
import traceback
from dataclasses import fields, replace

import ipywidgets
import numpy as np
import torch

from nfhelpers import evaluate, metrics, plots, samplers

WIDE = {"description_width": "11em"}


def panel(draw, controls):
    """A column of controls above the figure that `draw` returns for their values.

    Args:
        draw: function of the controls' values by name that returns a matplotlib Figure, or (Figure, text);
            the text is shown above the figure.
        controls: dict of name -> ipywidgets widget with a `value`.

    Returns an ipywidgets.VBox: the controls, an HTML line for the text or the error, and an Image. What
    `draw` raises is raised here on the first drawing; on later ones it is shown in the HTML line and raised
    in the callback.
    """
    image = ipywidgets.Image(format="png", layout={"max_width": "100%", "object_fit": "contain"})
    text = ipywidgets.HTML()

    def redraw(change=None):
        try:
            drawn = draw(**{name: control.value for name, control in controls.items()})
            figure, caption = drawn if isinstance(drawn, tuple) else (drawn, "")
            png = io.BytesIO()
            figure.savefig(png, format="png")
        except Exception as error:
            # The old picture would belong to other settings.
            image.layout.display = "none"
            message = "".join(traceback.format_exception_only(error))
            text.value = f'<pre class="nf-error" style="color:#b00020">{html.escape(message)}</pre>'
            raise
        image.layout.display = None
        text.value = f"<code>{html.escape(caption)}</code>" if caption else ""
        image.value = png.getvalue()

    redraw()
    for control in controls.values():
        control.observe(redraw, names="value")
    return ipywidgets.VBox([*controls.values(), text, image])


def _slider(value, low, high, step, description, continuous_update=False):
    kind = ipywidgets.IntSlider if isinstance(step, int) else ipywidgets.FloatSlider
    return kind(
        value=value,
        min=low,
        max=high,
        step=step,
        description=description,
        continuous_update=continuous_update,
        style=WIDE,
    )


def _choice(options, value, description):
    return ipywidgets.Dropdown(options=options, value=value, description=description, style=WIDE)


# ---------------------------------------------------------------- reconstruction


def reconstruction_figure(
    model, images, image=0, observed=0.2, sampler="posterior mean", steps=10, seed=0, title=None
):
    """One image observed, reconstructed and compared: what `reconstruction_panel` draws.

    Args:
        model: a sparse-field velocity model.
        images: (N, H, W, 3) uint8 or floats in [0, 1].
        image: index of the image.
        observed: fraction of observed pixels, in (0, 1].
        sampler: "posterior mean" (one step; `steps` is not used) or, for a sample, a key of
            `samplers.SAMPLERS`.
        steps: solver steps of a sample.
        seed: of the observed pixels and the noise.

    Returns (Figure, text with PSNR and SSIM). Raises ValueError for an index or sampler that does not exist.
    """
    if not 0 <= image < len(images):
        raise ValueError(f"image={image} does not exist; pass an index from 0 to {len(images) - 1}")
    fields_ = evaluate.observe_images(images[image : image + 1], observed, seed)
    if sampler == "posterior mean":
        result, name = evaluate.reconstruct(model, fields_, seed=seed), "posterior mean"
    else:
        result = evaluate.reconstruct(model, fields_, kind="sample", method=sampler, steps=steps, seed=seed)
        name = f"sample ({sampler}, {steps})"
    target = result["images"]
    psnr = float(metrics.psnr(result["fields"], target)[0])
    ssim = float(metrics.ssim(result["fields"], target)[0])
    figure = plots.reconstruction_row(
        plots.observed_pixels(target, result["mask"]), result["fields"], target, title=title, name=name
    )
    return figure, f"{name}: PSNR {psnr:.2f} dB, SSIM {ssim:.3f}"


def reconstruction_panel(model, images, title=None, steps=10, max_steps=50):
    """Sliders for image, observed fraction, sampler, steps and seed over `reconstruction_figure`."""
    controls = {
        "image": _slider(0, 0, len(images) - 1, 1, "image"),
        "observed": _slider(0.2, 0.05, 0.8, 0.05, "observed fraction"),
        "sampler": _choice(["posterior mean", *samplers.SAMPLERS], "posterior mean", "sampler"),
        "steps": _slider(steps, 1, max_steps, 1, "steps (samples)"),
        "seed": _slider(0, 0, 20, 1, "seed"),
    }
    return panel(lambda **values: reconstruction_figure(model, images, title=title, **values), controls)


# ---------------------------------------------------------------- cost before training


def hyperparameter_figure(model_class, config, n_inputs=204, n_queries=204, batch_size=64, title=None):
    """Parameters, FLOPs and training memory of a configuration beside the defaults, from shapes alone.

    Args:
        model_class: a class of `nfhelpers.models`; `config`: an instance of its config.
        n_inputs, n_queries, batch_size: as in `evaluate.model_cost`.

    Returns (Figure, text with the three numbers).
    """
    with torch.device("meta"):
        models = {"this": model_class(config), "default": model_class(type(config)())}
    costs = {name: evaluate.model_cost(m, n_inputs, n_queries, batch_size) for name, m in models.items()}
    this = costs["this"]
    text = (
        f"{this['parameters'] / 1e6:.2f} M parameters, {this['flops_forward'] / 1e9:.1f} GFLOP forward, "
        f"about {this['training_bytes'] / 2**30:.2f} GiB to train a batch of {batch_size}"
    )
    return plots.cost_bars(costs, title=title), text


def hyperparameter_panel(model_class, config, n_inputs=204, batch_size=64, title=None):
    """Sliders for a model's sizes, queries and batch size that show its cost before anything is trained."""
    legal = {field.name for field in fields(config)}
    ranges = {
        "d_model": [64, 128, 192, 256, 384, 512, 768],
        "num_layers": list(range(1, 13)),
        "d_state": [4, 8, 16, 32, 64],
        "expand": [1, 2, 3, 4],
        "neighbours": [4, 8, 16, 32],
        "num_fourier_features": [16, 32, 64, 128, 256, 512],
    }
    sizes = {}
    for name, options in ranges.items():
        if name in legal:
            value = getattr(config, name)
            sizes[name] = ipywidgets.SelectionSlider(
                options=sorted({*options, value}),
                value=value,
                description=name,
                style=WIDE,
                continuous_update=False,
            )
    rest = {
        "n_queries": _slider(n_inputs, 64, 1024, 4, "queries"),
        "batch_size": _slider(batch_size, 1, 256, 1, "batch size"),
    }

    def draw(n_queries, batch_size, **values):
        return hyperparameter_figure(
            model_class, replace(config, **values), n_inputs, n_queries, batch_size, title=title
        )

    return panel(draw, {**sizes, **rest})


# ---------------------------------------------------------------- SSM basics


def impulse_panel(title=None):
    """Sliders for decay rate and step over `plots.impulse_response`, wide enough to see Euler diverge."""
    controls = {
        "a": _slider(-1.0, -8.0, 0.5, 0.1, "decay rate a", continuous_update=True),
        "delta": _slider(0.1, 0.01, 1.0, 0.01, "step Δ", continuous_update=True),
    }
    return panel(lambda a, delta: plots.impulse_response(a, delta, title=title), controls)


def cost_panel(rows, title=None):
    """A slider for the sequence length over `plots.cost_curve`: the fits' cost at that length.

    rows: list of dicts with method, length, seconds and memory, as `plots.cost_curve` takes.
    """
    lengths = [row["length"] for row in rows]
    low, high = np.log10(min(lengths)), np.log10(max(lengths)) + 1
    length = ipywidgets.FloatLogSlider(
        value=max(lengths),
        min=low,
        max=high,
        step=0.05,
        readout_format=".0f",
        description="length L",
        continuous_update=False,
        style=WIDE,
    )
    return panel(lambda length: plots.cost_curve(rows, title=title, length=round(length)), {"length": length})
