"""Widgets over `plots`: the same figures with sliders.

A notebook draws the static figure first and asserts on it; the widget below it calls the same function. A
widget shows its figure as a PNG in an `ipywidgets.Image`, whose <img> gets a new src at every change. When
drawing fails, the picture is removed, the error stands in its place in red and is raised again, so that
neither a reader nor a log can miss it; the very first drawing raises in the cell itself.

Sliders whose change costs model evaluations redraw on release only.
"""

import html
import io
import time
import traceback
from dataclasses import fields, replace

import ipywidgets
import numpy as np
import torch

from nfhelpers import evaluate, images, metrics, plots, samplers
from nfhelpers.kernels.orders import POINT_ORDERS, neighbour_steps, point_order
from nfhelpers.models.ssm import MultiDirectionalSSM

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


RESOLUTIONS = (32, 48, 64, 96, 128, 192, 256)
"""Sides that `resolution_panel` offers."""


def resolution_figure(
    model, source, image=0, size=64, *, observed=0.2, observed_size=32, seed=0, title=None, cache=None
):
    """One test image at any size from the same observed pixels: what `resolution_panel` draws.

    Observed pixels, the one-step posterior mean at `size`, that at the observed size upsampled bicubically,
    and the target where the source has one of that size.

    Args:
        model: a sparse-field velocity model.
        source: of `images.load_images`.
        image: index of the test image; size: side of the field.
        observed, observed_size: fraction of observed pixels and the side of the grid they are observed on.
        seed: of the observed pixels and the noise.
        cache: dict that keeps fields from one call to the next, of one model, source, observed fraction and
            seed; None for none.

    Returns (Figure, text with queries, seconds of the model, and the PSNR of both).
    Raises ValueError for an image that does not exist and a size below the window of SSIM.
    """
    if size < metrics.SSIM_WINDOW:
        raise ValueError(
            f"size={size} is below {metrics.SSIM_WINDOW}, the window of SSIM; pass a side such as 64"
        )
    test = images.load_images(source, "test", observed_size, limit=image + 1 if image >= 0 else None)
    if not 0 <= image < len(test):
        raise ValueError(f"image={image} does not exist; pass an index from 0, such as 0")
    fields_ = evaluate.observe_images(test[image : image + 1], observed, seed)
    cache = {} if cache is None else cache
    for side in {observed_size, size}:
        if (image, side) not in cache:
            start = time.perf_counter()
            made = evaluate.reconstruct(model, fields_, size=side, seed=seed)["fields"]
            cache[image, side] = made[0], time.perf_counter() - start
    field, seconds = cache[image, size]
    upsampled = evaluate.resize_field(cache[image, observed_size][0], size, size)
    try:
        target = images.load_images(source, "test", size, limit=image + 1)[image] / 255
    except ValueError:  # the source is not as fine as that
        target = None
    sparse = plots.observed_pixels(fields_["images"], fields_["mask"])[0]
    columns = {"posterior mean": field, f"bicubic of {observed_size} px": upsampled, "target": target}
    figure = plots.resolution_row(sparse, columns, title=title)
    text = f"{size}x{size}: {size * size:,} queries in {seconds:.2f} s"
    if target is None:
        return figure, f"{text}, no ground truth"
    scores = [float(metrics.psnr(made[None], target[None])[0]) for made in (field, upsampled)]
    return figure, f"{text}, PSNR {scores[0]:.2f} dB, bicubic of {observed_size} px {scores[1]:.2f} dB"


def resolution_panel(model, source, *, count=8, sizes=RESOLUTIONS, title=None, cache=None, **options):
    """Sliders for resolution and image over `resolution_figure`; what was computed once is not again.

    count: of test images to choose from; sizes: sides to choose from; cache, options: as there.
    """
    cache = {} if cache is None else cache
    size = ipywidgets.SelectionSlider(
        options=sorted(sizes),
        value=min(sizes),
        description="resolution (px)",
        style=WIDE,
        continuous_update=False,
    )
    controls = {"size": size, "image": _slider(0, 0, count - 1, 1, "image")}
    return panel(
        lambda size, image: resolution_figure(
            model, source, image, size, title=title, cache=cache, **options
        ),
        controls,
    )


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


# ---------------------------------------------------------------- scans of the plane

LAYOUTS = ("grid", "random pixels", "random points")
"""Sets of points of `scan_figure`."""


def scan_figure(orders=("row",), layout="grid", size=12, x=0.5, y=0.5, seed=0, title=None):
    """Scans of a set of points in some orders, as one point sees them: what `scan_panel` draws.

    Args:
        orders: some of `kernels.orders.POINT_ORDERS`.
        layout: "grid", size x size pixel centres; "random pixels", as many of a grid of twice the side;
            "random points", as many anywhere.
        size: from 3; x, y: position in [0, 1] whose nearest point is looked at.
        seed: of the points and of the layer.

    The influence is that of a `MultiDirectionalSSM` of width 8 as it is initialised, on random tokens.

    Returns (Figure, text). Raises ValueError for no or unknown orders, an unknown layout and a size below 3.
    """
    if not orders:
        raise ValueError(f"orders={orders!r} is empty; choose at least one of {POINT_ORDERS}")
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is unknown; pass one of {LAYOUTS}")
    if size < 3:
        raise ValueError(f"size={size} is below 3; pass a side such as 12")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if layout == "grid":
            points = images.grid_coords(size, size)  # (L, 2)
        elif layout == "random pixels":
            points = images.grid_coords(2 * size, 2 * size)[torch.randperm(4 * size**2)[: size**2]]
        else:
            points = torch.rand(size**2, 2)
        tokens = torch.randn(len(points), 8)
        layer = MultiDirectionalSSM(8, 8, 2, len(orders), False, False, True, 0.0)
    query = int((points - torch.tensor([x, y])).square().sum(-1).argmin())
    stacked = torch.stack([point_order(points[None], kind) for kind in orders], dim=1)  # (1, K, L)
    influence = evaluate.token_influence(layer, tokens, query, stacked)  # (L,)
    figure = plots.scan_view(points, tuple(orders), query, influence, title)
    steps = neighbour_steps(points[None], stacked)[0]  # (K, L, 4)
    place = int((stacked[0, 0] == query).nonzero())
    nearest = stacked[0, 0, place - steps[0, query]]  # (4,), of the first order as of any
    others = influence.sum() - influence[query]
    share = float(influence[nearest].sum() / others) if others else 0.0
    best, single = (n.double().quantile(0.5) for n in (steps.abs().amin(0), steps.abs()))
    before = int((steps[:, query] > 0).any(0).sum())
    text = (
        f"{len(points)} points: median steps to the 4 nearest {single:g} in a single order, {best:g} in the "
        f"best; this point: {before} of them come before it in some order; they have {share:.0%} of all "
        "influence"
    )
    return figure, text


def scan_panel(title=None):
    """Orders, layout, number of points and the point looked at, over `scan_figure`."""
    controls = {
        "orders": ipywidgets.SelectMultiple(
            options=POINT_ORDERS, value=("row",), rows=len(POINT_ORDERS), description="orders", style=WIDE
        ),
        "layout": _choice(LAYOUTS, "grid", "points"),
        "size": _slider(12, 6, 16, 1, "points a side"),
        "x": _slider(0.5, 0.0, 1.0, 0.1, "point at x"),
        "y": _slider(0.5, 0.0, 1.0, 0.1, "point at y"),
        "seed": _slider(0, 0, 20, 1, "seed"),
    }
    return panel(lambda **values: scan_figure(title=title, **values), controls)
