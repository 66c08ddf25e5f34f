"""Widgets over `plots`: the same figures with sliders.

A notebook draws the static figure first and asserts on it; the widget below it calls the same function. A
widget shows its figure as a PNG in an `ipywidgets.Image`, whose <img> gets a new src at every change. When
drawing fails, the picture is removed, the error stands in its place in red and is raised again, so that
neither a reader nor a log can miss it; the very first drawing raises in the cell itself. Sliders redraw on
release only.
"""

import base64
import functools
import html
import io
import signal
import threading
import time
import traceback
from contextlib import contextmanager
from dataclasses import fields, replace

import ipywidgets
import numpy as np
import torch
from IPython.display import display
from PIL import Image

from nfhelpers import evaluate, images, metrics, plots, samplers, spectrograms
from nfhelpers.kernels.orders import POINT_ORDERS, neighbour_steps, point_order
from nfhelpers.models.local_mamba import sample_grids
from nfhelpers.models.ssm import MultiDirectionalSSM

WIDE = {"description_width": "11em"}


def panel(draw, controls, *, button=None, cache=32):
    """A column of controls above the figure that `draw` returns for their values.

    Args:
        draw: function of the controls' values by name that returns a matplotlib Figure, (Figure, text) or
            (Figure, text, HTML); the text is shown above the figure, the HTML (a player, a download) below.
            Figures that are not registered with pyplot, as those of `plots`, need no closing.
        controls: dict of name -> ipywidgets widget with a `value`. None of them updates continuously.
        button: label of a button. With one, a change of a control draws nothing until it is pressed.
        cache: how many drawings are kept by the values of the controls, which are to decide everything that
            `draw` returns and to be hashable; 0 for none.

    Returns an ipywidgets.VBox: the controls, the button, an HTML line for the text, the notice that it is
    computing or the error, an Image and the HTML below it. What `draw` raises is raised here on the first
    drawing; on later ones it is shown in the line and raised in the callback. However fast a control is
    moved, JupyterLab sends one value at a time and skips those that came meanwhile, so no drawings queue up.
    """
    # At its own size where there is room: a column would stretch it to its full width.
    image = ipywidgets.Image(format="png", layout={"max_width": "100%", "align_self": "flex-start"})
    text, below = ipywidgets.HTML(layout={"min_height": "2em"}), ipywidgets.HTML()

    def render(*values):
        drawn = draw(**dict(zip(controls, values, strict=True)))
        figure, *texts = drawn if isinstance(drawn, tuple) else (drawn,)
        png = io.BytesIO()
        figure.savefig(png, format="png")
        caption, markup = (*texts, "", "")[:2]
        return png.getvalue(), f"<code>{html.escape(caption)}</code>" if caption else "", markup

    rendered = functools.lru_cache(cache)(render) if cache else render

    def redraw(change=None):
        text.value = '<code class="nf-busy" style="color:#555555">computing ...</code>'
        try:
            image.value, text.value, below.value = rendered(*(control.value for control in controls.values()))
        except (Exception, KeyboardInterrupt) as error:
            # The old picture would belong to other settings.
            image.layout.display = below.layout.display = "none"
            message = "".join(traceback.format_exception_only(error))
            text.value = f'<pre class="nf-error" style="color:#b00020">{html.escape(message)}</pre>'
            raise
        image.layout.display = below.layout.display = None

    def invite(change):
        text.value = f"<code>settings changed: press {html.escape(button)}</code>"

    redraw()
    for control in controls.values():
        if control.has_trait("continuous_update"):
            control.continuous_update = False
        control.observe(redraw if button is None else invite, names="value")
    if button is None:
        return ipywidgets.VBox([*controls.values(), text, image, below])
    press = ipywidgets.Button(description=button, layout={"width": "max-content"})
    press.on_click(redraw)
    return ipywidgets.VBox([*controls.values(), press, text, image, below])


def _slider(value, low, high, step, description):
    kind = ipywidgets.IntSlider if isinstance(step, int) else ipywidgets.FloatSlider
    return kind(value=value, min=low, max=high, step=step, description=description, style=WIDE)


def _steps(options, value, description):
    """A slider over these values only."""
    return ipywidgets.SelectionSlider(options=options, value=value, description=description, style=WIDE)


def _choice(options, value, description):
    return ipywidgets.Dropdown(options=options, value=value, description=description, style=WIDE)


@contextmanager
def training_monitor(epochs):
    """A line on how far a training is and a button that stops it, in the output of the cell that trains:

        with widgets.training_monitor(config.epochs) as callback:
            result = train.fit(model, data, config, callback=callback)

    The button stops after the current epoch, an interrupt of the kernel after the current step. Both leave
    the state and the model `latest`, and running the cell again goes on from there, or says that nothing is
    left to do.

    The button needs a kernel that hears it while a cell runs, by the subshells of JupyterLab 4.4 and
    ipykernel 7; elsewhere interrupt the kernel. `epochs`: of the whole run. Yields the callback.
    """
    pressed, begin, done = threading.Event(), time.perf_counter(), []
    button = ipywidgets.Button(description="stop training", icon="stop")
    line = ipywidgets.HTML("<code>before the first epoch</code>")

    def stop(button):
        pressed.set()
        button.disabled = True
        button.description = "stopping ..."

    def callback(epoch, history, fields):
        done.append(epoch)
        left = (time.perf_counter() - begin) / len(done) * (epochs - epoch)
        parts = [f"epoch {epoch} of {epochs}", f"loss {history['loss'][-1]:.3f}"]
        if history["val_loss"]:
            parts.append(f"validation {history['val_loss'][-1]:.3f}")
            if np.isfinite(history["val_psnr"][-1]):  # of fields; grids have none
                parts.append(f"{history['val_psnr'][-1]:.2f} dB")
        line.value = f"<code>{', '.join(parts)}, about {left:.0f} s left</code>"
        if pressed.is_set():
            raise KeyboardInterrupt  # which `train.fit` takes as a wish to stop, and saves

    button.on_click(stop)
    display(ipywidgets.HBox([button, line]))
    # ipykernel 7.4 sends the messages of a widget to the shell that spoke to it last, which is busy training;
    # without this note they go where JupyterLab addressed them, to the subshell of widgets.
    vars(button.comm).pop("_reply_subshell_id", None)
    try:
        with _noted_interrupts(pressed):
            yield callback
        if not done and not pressed.is_set():  # `train.fit` returned without an epoch
            done.append(epochs)
            line.value = f"<code>epoch {epochs} of {epochs}: finished before, nothing left to do</code>"
    finally:
        button.disabled = True
        finished = bool(done) and done[-1] == epochs
        button.description = "trained" if finished else "stopped"


@contextmanager
def _noted_interrupts(event):
    """Set the event on SIGINT, then do what would have been done; of the main thread only, as signals are."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return

    def note(number, frame):
        event.set()
        before(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


# ---------------------------------------------------------------- reconstruction


def reconstruction_figure(
    model, images, image=0, observed=0.2, sampler="posterior mean", steps=4, seed=0, title=None
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
    result, name = _reconstruct(model, fields_, sampler, steps, seed)
    target = result["images"]
    psnr = float(metrics.psnr(result["fields"], target)[0])
    ssim = float(metrics.ssim(result["fields"], target)[0])
    figure = plots.reconstruction_row(
        plots.observed_pixels(target, result["mask"]), result["fields"], target, title=title, name=name
    )
    return figure, f"{name}: PSNR {psnr:.2f} dB, SSIM {ssim:.3f}"


def _reconstruct(model, fields_, sampler, steps, seed):
    """Result of `evaluate.reconstruct`, and what to call it."""
    if sampler == "posterior mean":
        return evaluate.reconstruct(model, fields_, seed=seed), sampler
    options = {"kind": "sample", "method": sampler, "steps": steps}
    return evaluate.reconstruct(model, fields_, seed=seed, **options), f"sample ({sampler}, {steps})"


def reconstruction_panel(model, images, title=None, steps=4, max_steps=50):
    """Sliders for image, observed fraction, sampler, steps and seed over `reconstruction_figure`."""
    controls = {
        "image": _slider(0, 0, len(images) - 1, 1, "image"),
        "observed": _slider(0.2, 0.05, 0.8, 0.05, "observed fraction"),
        "sampler": _choice(["posterior mean", *samplers.SAMPLERS], "posterior mean", "sampler"),
        "steps": _slider(steps, 1, max_steps, 1, "steps (samples)"),
        "seed": _slider(0, 0, 20, 1, "seed"),
    }
    return panel(lambda **values: reconstruction_figure(model, images, title=title, **values), controls)


def own_image_figure(
    models,
    source,
    model=None,
    size=32,
    observed=0.2,
    sampler="posterior mean",
    steps=4,
    crop=0.5,
    seed=0,
    title=None,
):
    """An image of one's own, sparsely observed and reconstructed: what `own_image_panel` draws.

    Args:
        models: dict of name -> sparse-field velocity model; `model`: a name, the first if None.
        source, size, crop: of `images.load_image`: the image, the side that it is shrunk to and on which it
            is observed, and which square of it.
        observed, sampler, steps, seed: as in `reconstruction_figure`.

    Returns (Figure of observed pixels, reconstruction, biharmonic inpainting and target, text with PSNR and
    SSIM of both, reconstruction (size, size, 3) in [0, 1]). Raises ValueError for an unknown model, as
    `images.load_image`, and for an unknown sampler.
    """
    model = next(iter(models)) if model is None else model
    if model not in models:
        raise ValueError(f"model={model!r} is unknown; pass one of {', '.join(models)}")
    picture = images.load_image(source, size, crop)
    fields_ = evaluate.observe_images(picture[None], observed, seed)
    result, name = _reconstruct(models[model], fields_, sampler, steps, seed)
    coords, values = fields_["input_coords"][0], images.to_image(fields_["input_values"][0])
    smooth = evaluate.classical_baselines(coords, values, size, size, methods=("biharmonic",))
    target = result["images"]
    made = {f"{model}, {name}": result["fields"], "biharmonic": smooth["biharmonic"][None]}
    columns = {"observed": plots.observed_pixels(target, result["mask"])}
    columns |= {label.replace(", ", "\n"): field for label, field in made.items()}
    scores = [
        f"{label}: PSNR {metrics.psnr(x, target)[0]:.2f} dB, SSIM {metrics.ssim(x, target)[0]:.3f}"
        for label, x in made.items()
    ]
    return plots.comparison_grid(columns, target, title), "; ".join(scores), result["fields"][0]


def own_image_panel(models, source, *, sizes=(32, 48, 64, 96), title=None, max_steps=20):
    """Upload or path, crop, size, observed fraction, model and sampler over `own_image_figure`, drawn on the
    press of a button; below the picture a link that downloads the reconstruction as PNG.

    models: as there; source: the image to start with; sizes: sides to choose from. On a CPU a sample at 96 px
    takes many seconds: every step evaluates the model on all pixels, once to four times.
    """
    controls = {
        "upload": ipywidgets.FileUpload(accept="image/*", description="your image"),
        "path": ipywidgets.Text(placeholder="or its path", description="path", style=WIDE),
        "model": _choice(list(models), next(iter(models)), "model"),
        "size": _steps(sizes, min(sizes), "side (px)"),
        "observed": _slider(0.2, 0.05, 0.8, 0.05, "observed fraction"),
        "crop": _slider(0.5, 0.0, 1.0, 0.05, "crop, from left or top"),
        "sampler": _choice(["posterior mean", *samplers.SAMPLERS], "posterior mean", "sampler"),
        "steps": _slider(4, 1, max_steps, 1, "steps (samples)"),
        "seed": _slider(0, 0, 20, 1, "seed"),
    }

    def draw(upload, path, **values):
        chosen = upload[0]["content"].tobytes() if upload else path.strip() or source
        figure, text, field = own_image_figure(models, chosen, title=title, **values)
        return figure, text, download_link(field, "reconstruction.png")

    return panel(draw, controls, button="reconstruct", cache=0)


def download_link(image, name):
    """HTML of a link that downloads an image (H, W, 3) in [0, 1] as the PNG file `name`."""
    png = io.BytesIO()
    Image.fromarray(np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)).save(png, "png")
    data = base64.b64encode(png.getvalue()).decode()
    return f'<a download="{html.escape(name)}" href="data:image/png;base64,{data}">download {name}</a>'


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
    size = _steps(sorted(sizes), min(sizes), "resolution (px)")
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
            sizes[name] = _steps(sorted({*options, value}), value, name)
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
        "a": _slider(-1.0, -8.0, 0.5, 0.1, "decay rate a"),
        "delta": _slider(0.1, 0.01, 1.0, 0.01, "step Δ"),
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


# ---------------------------------------------------------------- latents


def traversal_figure(model, latents, directions, image=0, moves=(0.0,), size=32, title=None):
    """A latent moved along directions: what `traversal_panel` draws.

    Args:
        model: a `MambaDiffusionAutoencoder`.
        latents: (N, C) as `evaluate.encode_images` returns them; `image` is the index of the one to move.
        directions: (K, C), such as `evaluate.principal_directions` returns.
        moves: how far along each of the directions, in their lengths.
        size: side of the decodings.

    Returns (Figure of the decoding, the moved decoding and their difference, text). Raises ValueError for an
    index that does not exist, and moves that are not as many as the directions.
    """
    if not 0 <= image < len(latents):
        raise ValueError(f"image={image} does not exist; pass an index from 0 to {len(latents) - 1}")
    if len(moves) != len(directions):
        raise ValueError(f"moves={moves} are not one for each of {len(directions)} directions; pass as many")
    moved = latents[image] + torch.tensor(moves, dtype=torch.float32) @ directions  # (C,)
    before, after = evaluate.decode_latents(model, torch.stack([latents[image], moved]), size)
    change = 0.5 + (after - before) / 2
    heads = ["decoding", "moved", "difference / 2"]
    figure = plots.strips({f"{size} px": [before, after, change]}, heads, title)
    difference = float(np.sqrt(np.square(after - before).mean()))
    return figure, f"moved by {', '.join(f'{move:+.2f}' for move in moves)}: RMS difference {difference:.3f}"


def traversal_panel(model, latents, directions, size=32, title=None):
    """Sliders along each of the directions, and for the image, over `traversal_figure`."""
    controls = {
        f"move{index}": _slider(0.0, -3.0, 3.0, 0.25, f"direction {index + 1}")
        for index in range(len(directions))
    }
    controls["image"] = _slider(0, 0, len(latents) - 1, 1, "image")

    def draw(image, **moves):
        return traversal_figure(model, latents, directions, image, tuple(moves.values()), size, title)

    return panel(draw, controls)


def interpolation_figure(model, images, first=0, second=1, alpha=0.5, steps=10, title=None, cache=None):
    """Two images and what lies between them in three ways: what `interpolation_panel` draws.

    Args:
        model: a `MambaDiffusionAutoencoder`; one of phase 1 has no way through noise.
        images: (N, H, W, 3) uint8 or floats in [0, 1].
        first, second: indices of the ends; alpha: position, 0 is the first.
        steps: Heun steps of the way through noise.
        cache: dict that keeps the codes of images from one call to the next, of one model, images and steps;
            None for none.

    Returns (Figure with a row a way, text with the contrast of each frame). Raises ValueError for an index
    that does not exist and an alpha outside [0, 1].
    """
    for name, index in (("first", first), ("second", second)):
        if not 0 <= index < len(images):
            raise ValueError(f"{name}={index} does not exist; pass an index from 0 to {len(images) - 1}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha} is outside [0, 1]; pass a position such as 0.5")
    cache = {} if cache is None else cache
    for index in (first, second):
        if index not in cache:
            cache[index] = evaluate.image_codes(model, images[index : index + 1], steps)
    latents, noises = zip(cache[first], cache[second], strict=True)
    codes = torch.cat(latents), None if noises[0] is None else torch.cat(noises)
    ends = evaluate.observe_images(images[[first, second]], 1.0)["images"].numpy()  # in [0, 1]
    paths = evaluate.interpolation_paths(model, ends, alphas=(alpha,), steps=steps, codes=codes)
    rows = {way: [ends[0], frames[0], ends[1]] for way, frames in paths.items()}
    figure = plots.strips(rows, [f"image {first}", f"alpha {alpha:.2f}", f"image {second}"], title)
    contrasts = [f"{way} {evaluate.contrast(frames[0], ends):.2f}" for way, frames in paths.items()]
    return figure, f"contrast, 1 is that of the ends: {', '.join(contrasts)}"


def interpolation_panel(model, images, steps=10, title=None, cache=None):
    """Sliders for the position and both images over `interpolation_figure`; codes are found once an image."""
    cache = {} if cache is None else cache
    controls = {
        "alpha": _slider(0.5, 0.0, 1.0, 0.05, "alpha"),
        "first": _slider(0, 0, len(images) - 1, 1, "first image"),
        "second": _slider(1, 0, len(images) - 1, 1, "second image"),
    }
    return panel(
        lambda **values: interpolation_figure(model, images, steps=steps, title=title, cache=cache, **values),
        controls,
    )


# ---------------------------------------------------------------- sound


def audio_players(sounds, sample_rate):
    """HTML of an audio player for each sound, with its name; all scaled to one peak.

    sounds: dict of name -> (S,) samples; sample_rate in Hz. The sounds are held in it as 16-bit wav files.
    """
    players = []
    for name, samples in sounds.items():
        wav = io.BytesIO()
        spectrograms.write_wav(wav, samples, sample_rate, normalise=True)
        data = base64.b64encode(wav.getvalue()).decode()
        players.append(
            f'<figure style="display: inline-block; margin: 2px 8px"><figcaption>{html.escape(name)}'
            f'</figcaption><audio controls src="data:audio/wav;base64,{data}"></audio></figure>'
        )
    return "".join(players)


def generated_figure(
    model, meta, label=0, guidance=2.5, steps=12, seed=0, *, size=64, iterations=64, title=None
):
    """One generated spectrogram and its sound: what `generated_panel` draws.

    Args:
        model: a `LocalMamba2D` with classes.
        meta: `spectrograms.SpectrogramMeta` of what it was trained on, or `spectrograms.generated_meta`.
        label: index of the class; guidance, steps: of `local_mamba.sample_grids`, by Heun's method; seed: of
            the noise and of the phases.
        size: side of the spectrogram, that of meta; iterations: of Griffin-Lim.

    Returns (Figure, text, HTML of a player). Raises ValueError for a class that does not exist, and as
    `sample_grids` and `spectrograms.to_audio`.
    """
    if not 0 <= label < len(meta.class_names):
        raise ValueError(f"label={label} does not exist; pass an index from 0 to {len(meta.class_names) - 1}")
    generator = torch.Generator().manual_seed(seed)
    options = {"labels": torch.tensor([label]), "guidance": guidance, "steps": steps, "generator": generator}
    start = time.perf_counter()
    grid = sample_grids(model, 1, size, size, **options).cpu()  # (1, 1, H, W)
    taken = time.perf_counter() - start
    sound = spectrograms.to_audio(grid, meta, iterations=iterations, generator=generator)[0]
    name = meta.class_names[label]
    text = f"{name}: guidance {guidance:g}, {steps} Heun steps in {taken:.1f} s"
    figure = plots.spectrogram_grid(grid, [name], meta, title=title)
    return figure, text, audio_players({name: sound}, meta.sample_rate)


def generated_panel(model, meta, *, steps=12, max_steps=25, size=64, title=None):
    """Class, guidance, steps and seed over `generated_figure`, drawn and heard on the press of a button."""
    classes = [(name, index) for index, name in enumerate(meta.class_names)]
    controls = {
        "label": _choice(classes, 0, "class"),
        "guidance": _slider(2.5, 0.0, 8.0, 0.5, "guidance"),
        "steps": _slider(steps, 1, max_steps, 1, "steps"),
        "seed": _slider(0, 0, 20, 1, "seed"),
    }
    return panel(
        lambda **values: generated_figure(model, meta, size=size, title=title, **values),
        controls,
        button="generate",
    )


DIRECTIONS = ("h", "h_flip", "v", "v_flip", "w2", "w2_flip", "w7", "w7_flip")
"""Directions of a scan that `directions_panel` offers."""


def directions_figure(config, directions, size=32, *, batch_size=1, repeats=1, device="cpu", title=None):
    """Cost of a set of scan directions beside attention: what `directions_panel` draws.

    config: `LocalMamba2DConfig`, whose directions are replaced; the others: as in `evaluate.mixer_costs`.
    Returns (Figure, text with the ratios). Raises ValueError for directions that are not legal, and as there.
    """
    settings = {"batch_size": batch_size, "repeats": repeats, "device": device}
    scans, attention = evaluate.mixer_costs(replace(config, scan_directions=directions), (size,), **settings)
    name = ", ".join(directions)
    figure = plots.mixer_bars([{**scans, "mixer": name}, attention], title)
    keys = {"parameters": "parameters", "FLOPs": "flops_forward", "time": "seconds", "memory": "memory"}
    ratios = [f"{word} {scans[key] / attention[key]:.2f}" for word, key in keys.items() if scans[key]]
    return figure, f"{name}, of attention's at {size} x {size}: {', '.join(ratios)}"


def directions_panel(config, *, sizes=(32, 64, 96), title=None, **options):
    """Directions and side of the grid over `directions_figure`; options: batch_size, repeats, device."""
    controls = {
        "directions": ipywidgets.SelectMultiple(
            options=tuple(dict.fromkeys((*DIRECTIONS, *config.scan_directions))),
            value=config.scan_directions,
            rows=8,
            description="directions",
            style=WIDE,
        ),
        "size": _steps(sizes, min(sizes), "side of the grid"),
    }
    return panel(lambda **values: directions_figure(config, title=title, **values, **options), controls)


def own_sound_figure(source, size=64, iterations=64, seed=0, title=None):
    """A sound of one's own as a spectrogram, and back: what `own_sound_panel` draws.

    Args:
        source: a wav file, its path or its bytes.
        size: side of the spectrogram; iterations: of Griffin-Lim, from phases drawn by `seed`.

    Returns (Figure of the spectrogram and of that of the sound that was found, text with the spectral
    convergence, HTML of players of both sounds). Raises ValueError as `spectrograms.load_clip`.
    """
    made, clip = spectrograms.load_clip(io.BytesIO(source) if isinstance(source, bytes) else source, size)
    meta, generator = made.meta, torch.Generator().manual_seed(seed)
    sound = spectrograms.to_audio(
        made.spectrograms, meta, reference=meta.reference, iterations=iterations, generator=generator
    )  # (1, S)
    magnitude = spectrograms.to_magnitude(made.spectrograms[:, 0], meta.reference, meta.dynamic_range)
    convergence = spectrograms.spectral_convergence(magnitude, sound, meta.hop).item()
    found = spectrograms.magnitude_of(sound, meta.n_fft, meta.hop)
    found = spectrograms.to_values(found, meta.reference, meta.dynamic_range)[:, None]  # (1, 1, H, W)
    both = {"as it is": clip[0], "back from its spectrogram": sound[0]}
    figure = plots.spectrogram_grid(torch.cat([made.spectrograms, found]), list(both), meta, title=title)
    text = (
        f"{clip.shape[1] / meta.sample_rate:.2f} s at {meta.sample_rate} Hz, {meta.n_fft} samples a frame, "
        f"{meta.hop} from frame to frame: spectral convergence {convergence:.3f}"
    )
    return figure, text, audio_players(both, meta.sample_rate)


def own_sound_panel(source, *, sizes=(32, 64, 128, 256), title=None):
    """Upload or path of a wav file, side of the spectrogram and iterations over `own_sound_figure`, drawn on
    the press of a button; below the picture the players. source: the sound to start with, as there."""
    controls = {
        "upload": ipywidgets.FileUpload(accept=".wav", description="your sound"),
        "path": ipywidgets.Text(placeholder="or its path", description="path", style=WIDE),
        "size": _steps(sizes, 64, "side (frames, bins)"),
        "iterations": _slider(64, 1, 256, 1, "Griffin-Lim iterations"),
        "seed": _slider(0, 0, 20, 1, "seed"),
    }

    def draw(upload, path, **values):
        chosen = upload[0]["content"].tobytes() if upload else path.strip() or source
        return own_sound_figure(chosen, title=title, **values)

    return panel(draw, controls, button="to spectrogram and back", cache=0)
