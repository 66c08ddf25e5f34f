"""Static figures: everything a widget or a notebook shows is drawn by a function here.

Every function returns a new `matplotlib.figure.Figure` that is not registered with pyplot: a notebook
displays it as the last value of a cell, a script calls `figure.savefig`, and nothing has to be closed. Images
and fields are arrays or tensors (..., H, W, 3) with values in [0, 1]. `title` stands above the whole figure
(notebooks put the preset there).
"""

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap, LogNorm, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from matplotlib.ticker import MaxNLocator

from nfhelpers import metrics
from nfhelpers.evaluate import COMPARED
from nfhelpers.images import grid_coords
from nfhelpers.kernels.orders import grid_order, inverse_order, neighbour_steps, point_order

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette: distinct for every common kind of colour vision; curves have
markers of their own too."""

MARKERS = "osD^vPX"
UNOBSERVED = 0.75
"""Grey on which observed pixels are drawn."""

KIND_STYLE = {"mean": (COLOURS[0], "o"), "sample": (COLOURS[1], "s"), "classical": (COLOURS[2], "D")}
TILE = 1.9  # inches of one picture
DPI = 80
MANY_POINTS = 2000
"""Of a curve, from which on a legend does not look for the best place: it would look at every point."""


# ---------------------------------------------------------------- shared pieces


def _array(x):
    """An array or a tensor on any device, as a NumPy array."""
    return x.detach().cpu().numpy() if hasattr(x, "detach") else np.asarray(x)


def _fields(x, name):
    """A stack of fields (N, H, W, 3) as an array; one field (H, W, 3) becomes a stack of one."""
    x = _array(x)
    if x.ndim == 3:
        x = x[None]
    if x.ndim != 4 or x.shape[-1] != 3 or len(x) == 0:
        raise ValueError(f"{name} has shape {x.shape}; pass (N, H, W, 3) or (H, W, 3)")
    if x.dtype == np.uint8:
        x = x / 255.0
    return x


def _grid(rows, columns, title, width=TILE, height=TILE, **options):
    """A figure of rows x columns axes, and the axes as a 2-D array."""
    figure = Figure(
        figsize=(columns * width, rows * height + (0.35 if title else 0.1)), dpi=DPI, layout="constrained"
    )
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure, axes


def _picture(ax, image, title=None, label=None):
    """One RGB picture with hard pixels; `label` stands at its left."""
    ax.imshow(np.clip(image, 0, 1), interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    if title:
        ax.set_title(title, fontsize=9)
    if label:
        ax.set_ylabel(label, fontsize=9)


def _map(figure, ax, values, title, cmap="magma", vmax=None, **options):
    """One scalar map (H, W) from zero, with its colour bar."""
    shown = ax.imshow(values, cmap=cmap, vmin=0, vmax=vmax, interpolation="nearest", **options)
    ax.set(xticks=[], yticks=[])
    ax.set_title(title, fontsize=9)
    bar = figure.colorbar(shown, ax=ax, shrink=0.8)
    bar.ax.tick_params(labelsize=7)
    return shown


def _curve_axes(ax, xlabel, ylabel, title=None):
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    if title:
        ax.set_title(title, fontsize=10)


def _scores(prediction, target):
    """ "PSNR 24.1 dB, SSIM 0.85" of one field."""
    psnr = metrics.psnr(prediction[None], target[None])[0]
    ssim = metrics.ssim(prediction[None], target[None])[0]
    return f"{psnr:.1f} dB, SSIM {ssim:.2f}"


def observed_pixels(images, mask):
    """Images (N, H, W, 3) with every pixel outside `mask` (N, H, W) replaced by grey, as an array."""
    images, mask = _fields(images, "images"), _array(mask).astype(bool)
    mask = mask[None] if mask.ndim == 2 else mask
    if mask.shape != images.shape[:3]:
        raise ValueError(f"mask has shape {mask.shape}; the images ask for {images.shape[:3]}")
    return np.where(mask[..., None], images, UNOBSERVED)


# ---------------------------------------------------------------- fields and reconstructions


def sparse_field(images, mask, title=None):
    """Images above and, below each, its observed pixels on grey. images (N, H, W, 3), mask (N, H, W) bool."""
    images = _fields(images, "images")
    sparse = observed_pixels(images, mask)
    figure, axes = _grid(2, len(images), title)
    fraction = _array(mask).mean()
    for column, (image, points) in enumerate(zip(images, sparse, strict=True)):
        _picture(axes[0, column], image, label="image" if column == 0 else None)
        _picture(axes[1, column], points, label=f"{100 * fraction:.0f}% observed" if column == 0 else None)
    return figure


def reconstruction_row(sparse, reconstruction, target, title=None, name="reconstruction"):
    """One row an image: observed pixels, reconstruction with its PSNR and SSIM, target, and map of the error.

    All (N, H, W, 3) in [0, 1]; `sparse` may be of another size. The error is the root mean square over the
    colours and all rows share its scale.
    """
    sparse, reconstruction, target = (
        _fields(x, n) for x, n in ((sparse, "sparse"), (reconstruction, "reconstruction"), (target, "target"))
    )
    if reconstruction.shape != target.shape or len(sparse) != len(target):
        raise ValueError(
            f"sparse {sparse.shape}, reconstruction {reconstruction.shape}, target {target.shape} do not "
            "match; pass as many of each, reconstruction and target of one size"
        )
    error = np.sqrt(np.square(reconstruction - target).mean(axis=-1))  # (N, H, W)
    figure, axes = _grid(len(target), 4, title, width=TILE * 1.15, height=TILE * 1.1)
    for row, ax in enumerate(axes):
        _picture(ax[0], sparse[row], "observed")
        _picture(ax[1], reconstruction[row], f"{name}\n{_scores(reconstruction[row], target[row])}")
        _picture(ax[2], target[row], "target")
        _map(figure, ax[3], error[row], "error (RMS)", vmax=max(error.max(), 1e-3))
    return figure


def comparison_grid(methods, target, title=None):
    """Methods as columns and images as rows, the target last; each picture titled with its PSNR and SSIM.

    methods: dict of name -> (N, H, W, 3); "observed" and fields of another size than the target's are shown
    without scores. target: (N, H, W, 3).
    """
    if not methods:
        raise ValueError("methods is empty; pass a dict such as {'linear': fields}")
    target = _fields(target, "target")
    columns = {name: _fields(fields, name) for name, fields in methods.items()}
    figure, axes = _grid(len(target), len(columns) + 1, title, height=TILE * 1.2)
    for row, ax in enumerate(axes):
        for column, (name, fields) in enumerate(columns.items()):
            scored = fields.shape == target.shape and name != "observed"
            scores = f"\n{_scores(fields[row], target[row])}" if scored else ""
            _picture(ax[column], fields[row], f"{name if row == 0 else ''}{scores}")
        _picture(ax[-1], target[row], "target" if row == 0 else None)
    return figure


def multiscale_grid(fields, title=None):
    """One image at several scales: methods as rows, scales as columns, PSNR and SSIM where there is a target.

    fields: dict of scale -> dict of method -> (H, W, 3); the method named "target" is the ground truth and
    may be missing or None.
    """
    if not fields:
        raise ValueError("fields is empty; pass {32: {'linear': field, 'target': field}}")
    scales = sorted(fields)
    methods = [m for m in dict.fromkeys(m for s in scales for m in fields[s]) if m != "target"]
    names = [*methods, "target"] if any(fields[s].get("target") is not None for s in scales) else methods
    figure, axes = _grid(len(names), len(scales), title, height=TILE * 1.12)
    for column, scale in enumerate(scales):
        target = fields[scale].get("target")
        for row, method in enumerate(names):
            ax, field = axes[row, column], fields[scale].get(method)
            if field is None:
                ax.set(xticks=[], yticks=[], ylabel=method if column == 0 else "")
                ax.yaxis.label.set_fontsize(9)
                ax.spines[:].set_visible(False)
                ax.text(
                    0.5,
                    0.5,
                    "no ground truth" if method == "target" else "not computed",
                    ha="center",
                    fontsize=8,
                )
                continue
            scored = target is not None and method != "target"
            head = f"{scale}x{scale}" if row == 0 else ""
            score = _scores(_array(field), _array(target)) if scored else ""
            _picture(
                ax, _array(field), "\n".join(filter(None, (head, score))), method if column == 0 else None
            )
    return figure


def resolution_row(sparse, fields, title=None):
    """Observed pixels (h, w, 3), then fields (H, W, 3) of one size beside each other, a detail below each.

    fields: dict of name -> (H, W, 3); None, for what there is not, is left out. The detail is their centre.
    PSNR and SSIM stand above fields where there is one named "target". Raises ValueError for no fields.
    """
    there = {name: _array(field) for name, field in fields.items() if field is not None}
    if not there:
        raise ValueError("fields is empty; pass {'posterior mean': field, 'target': None}")
    columns, target = {"observed": _array(sparse), **there}, there.get("target")
    figure, axes = _grid(2, len(columns), title, height=TILE * 1.08)
    for column, (name, field) in enumerate(columns.items()):
        height, width = field.shape[:2]
        scored = target is not None and name not in ("target", "observed")
        score = _scores(field, target) if scored else f"{width}x{height}"
        detail = field[height // 4 : height - height // 4, width // 4 : width - width // 4]
        _picture(axes[0, column], field, f"{name}\n{score}")
        _picture(axes[1, column], detail, label="centre" if column == 0 else None)
    return figure


def uncertainty_map(mean, std, target, title=None):
    """Posterior mean, its standard deviation and its error on one scale. All (N, H, W, 3) in [0, 1]."""
    mean, std, target = (_fields(x, n) for x, n in ((mean, "mean"), (std, "std"), (target, "target")))
    if not mean.shape == std.shape == target.shape:
        raise ValueError(f"shapes {mean.shape}, {std.shape}, {target.shape} of mean, std and target differ")
    if np.isnan(std).any():
        raise ValueError("std is NaN: one draw has no spread; pass the result of draws >= 2")
    spread = np.sqrt(np.square(std).mean(axis=-1))  # (N, H, W)
    error = np.sqrt(np.square(mean - target).mean(axis=-1))
    vmax = max(np.quantile(np.stack([spread, error]), 0.99), 1e-3)
    figure, axes = _grid(len(mean), 4, title, width=TILE * 1.15)
    for row, ax in enumerate(axes):
        _picture(ax[0], mean[row], "posterior mean")
        _map(figure, ax[1], spread[row], "spread (std)", vmax=vmax)
        _map(figure, ax[2], error[row], "error of the mean", vmax=vmax)
        _picture(ax[3], target[row], "target")
    return figure


def path_figure(states, times, title=None, labels=None):
    """States x_t along the flow, a row an image. states (T, N, H, W, 3) in [0, 1], times (T,), N labels."""
    states, times = _array(states), np.asarray(times, dtype=float)
    if states.ndim != 5 or states.shape[-1] != 3 or len(states) != len(times):
        raise ValueError(
            f"states has shape {states.shape}, times {times.shape}; pass (T, N, H, W, 3) and (T,)"
        )
    figure, axes = _grid(states.shape[1], len(times), title, width=TILE * 0.8, height=TILE * 0.85)
    for row in range(states.shape[1]):
        for column, t in enumerate(times):
            label = labels[row] if labels and column == 0 else None
            _picture(axes[row, column], states[column, row], f"t = {t:.2f}" if row == 0 else None, label)
    return figure


# ---------------------------------------------------------------- curves

LINE_STYLES = ("-", "--", "-.", ":")


def curves(panels, title=None, width=4.4, height=3.3, markers=False):
    """Lines against numbers, for what has no figure of its own here; marks are added to `figure.axes`.

    panels: dict of heading -> dict of lines (label -> (x, y) or (x, y, options of `Axes.plot`)), xlabel,
    ylabel, and anything that `Axes.set` takes, such as yscale="log". Lines differ in colour and in style, or
    with `markers` in marker; one whose label starts with "_" is not in the legend. Raises ValueError for no
    panels.
    """
    if not panels:
        raise ValueError("panels is empty; pass {'': {'lines': {'loss': (step, loss)}, 'xlabel': 'step'}}")
    figure, axes = _grid(1, len(panels), title, width, height)
    for ax, (heading, panel) in zip(axes[0], panels.items(), strict=True):
        for index, (label, (x, y, *options)) in enumerate(panel["lines"].items()):
            style = {"color": COLOURS[index % 7], "label": label, "linewidth": 1.3}
            if markers:
                style |= {"marker": MARKERS[index % 7], "markersize": 4}
            else:
                style["linestyle"] = LINE_STYLES[index % 4]
            ax.plot(_array(x), _array(y), **{**style, **(options[0] if options else {})})
        ax.set(**{key: value for key, value in panel.items() if key not in ("lines", "xlabel", "ylabel")})
        _curve_axes(ax, panel.get("xlabel", ""), panel.get("ylabel", ""), heading)
        if ax.get_legend_handles_labels()[1]:
            ax.legend(fontsize=7)
    return figure


def steps_curve(rows, title=None):
    """PSNR and SSIM against solver steps: samples as a curve, the posterior means as horizontal lines.

    rows: from `evaluate.steps_curve`.
    """
    samples = [r for r in rows if r["kind"] == "sample"]
    means = [r for r in rows if r["kind"] == "mean"]
    if not samples:
        raise ValueError("rows has no row of kind 'sample'; pass the result of evaluate.steps_curve")
    figure, axes = _grid(1, 2, title, width=4.4, height=3.1)
    for ax, name, label in zip(axes[0], ("psnr", "ssim"), ("PSNR (dB)", "SSIM"), strict=True):
        colour, marker = KIND_STYLE["sample"]
        steps, values = [r["steps"] for r in samples], [r[name] for r in samples]
        error = [r[f"{name}_se"] or 0 for r in samples]
        ax.errorbar(steps, values, error, color=colour, marker=marker, capsize=3, label=samples[0]["method"])
        for index, row in enumerate(means):
            ax.axhline(
                row[name], color=COLOURS[0], linestyle=("-", "--", ":")[index % 3], label=row["method"]
            )
        ax.set_xscale("log")
        ax.set_xticks(steps, [str(s) for s in steps])
        ax.minorticks_off()
        _curve_axes(ax, "solver steps", label)
    axes[0, 0].legend(fontsize=8)
    return figure


def training_figure(history, fields=None, title=None):
    """Loss and validation PSNR against steps and, below, fields as they are reconstructed while training.

    history: dict of lists step and loss, and val_step, val_loss, val_psnr (these may be missing or empty; a
    PSNR that is NaN throughout, as that of grids is, has no panel).
    fields: None, or dict of label -> (k, H, W, 3) in [0, 1], a row each, of one k.
    Raises ValueError for a history without step or loss.
    """
    if "step" not in history or "loss" not in history:
        raise ValueError(
            f"history has the keys {sorted(history)}; pass the history of train.fit, with step and loss"
        )
    step, loss = _array(history["step"]), _array(history["loss"]).astype(float)
    val_step = _array(history.get("val_step", []))
    val_loss, val_psnr = history.get("val_loss", []), history.get("val_psnr", [])
    shown = {name: _fields(values, name) for name, values in (fields or {}).items()}
    panels = 1 if len(val_psnr) and np.isnan(_array(val_psnr)).all() else 2

    height = 1.45 * len(shown)
    figure = Figure(figsize=(6.5 if panels == 1 else 9, 2.9 + height), dpi=DPI, layout="constrained")
    parts = figure.subfigures(2, 1, height_ratios=[2.9, height]) if shown else [figure.subfigures(1, 1)]
    left, *right = parts[0].subplots(1, panels, squeeze=False)[0]
    left.plot(step, loss, color=COLOURS[5], linewidth=0.8, alpha=0.6, label="training")
    if len(loss) > 20:
        window = max(1, len(loss) // 25)
        left.plot(
            step[window - 1 :], _running_mean(loss, window), color=COLOURS[0], label=f"mean of {window}"
        )
    if len(val_loss):
        left.plot(val_step, val_loss, color=COLOURS[1], marker="s", markersize=4, label="validation")
    if len(loss) and np.nanmin(loss) > 0:
        left.set_yscale("log")
    if left.lines and len(loss):
        left.legend(fontsize=8, loc="best" if len(loss) < MANY_POINTS else "upper right")
    _curve_axes(left, "step", "loss", "flow matching")
    for ax in right:
        ax.plot(val_step, val_psnr, color=COLOURS[1], marker="s", markersize=4)
        _curve_axes(ax, "step", "PSNR (dB)", "validation, full field, posterior mean")
    if shown:
        axes = parts[1].subplots(len(shown), len(next(iter(shown.values()))), squeeze=False)
        for row, (name, pictures) in zip(axes, shown.items(), strict=True):
            for column, (ax, picture) in enumerate(zip(row, pictures, strict=True)):
                _picture(ax, picture, label=name if column == 0 else None)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def _running_mean(values, window):
    """Mean of each run of `window` neighbours, (n - window + 1,)."""
    return np.convolve(values, np.full(window, 1 / window), mode="valid")


def fourier_kernel(distance, kernels, title=None):
    """Similarity of two Fourier-encoded points against their distance.

    distance: (n,) in pixels; kernels: dict of label -> (n,) measured or theoretical kernel. A label that
    starts with "theory" is drawn as a dashed black line.
    """
    figure, axes = _grid(1, 1, title, width=6.2, height=3.2)
    ax, index = axes[0, 0], 0
    for label, values in kernels.items():
        if label.startswith("theory"):
            ax.plot(distance, values, color="black", linestyle="--", linewidth=1, label=label)
        else:
            ax.plot(distance, values, color=COLOURS[index % len(COLOURS)], label=label)
            index += 1
    ax.axhline(0, color="grey", linewidth=0.6)
    ax.legend(fontsize=8)
    _curve_axes(ax, "distance of two points (pixels)", "normalised inner product")
    return figure


def similarity_maps(maps, title=None):
    """Maps of a similarity in [-1, 1], one panel each. maps: dict of label -> (H, W)."""
    figure, axes = _grid(1, len(maps), title, width=TILE * 1.2, height=TILE * 1.15)
    for ax, (label, values) in zip(axes[0], maps.items(), strict=True):
        shown = ax.imshow(_array(values), cmap="PuOr", norm=TwoSlopeNorm(0, -1, 1), interpolation="nearest")
        ax.set(xticks=[], yticks=[])
        ax.set_title(label, fontsize=9)
    figure.colorbar(shown, ax=axes[0].tolist(), shrink=0.8)
    return figure


def cost_curve(rows, title=None, length=None):
    """Time and memory against sequence length on logarithmic axes, with each method's fitted exponent.

    rows: list of dicts with method, length, seconds and memory (bytes; None or missing where not measured).
    length: a length to mark; the fits give its cost in the legend.
    """
    if not rows:
        raise ValueError("rows is empty; pass dicts with method, length, seconds and memory")
    figure, axes = _grid(1, 2, title, width=4.6, height=3.6)
    names = list(dict.fromkeys(r["method"] for r in rows))
    for ax, key, scale, label in zip(
        axes[0], ("seconds", "memory"), (1e-3, 2**20), ("time (ms)", "memory (MiB)"), strict=True
    ):
        for index, name in enumerate(names):
            points = [(r["length"], r[key] / scale) for r in rows if r["method"] == name and r.get(key)]
            if not points:
                continue
            x, y = np.array(sorted(points), dtype=float).T
            text = name
            if len(x) > 1:
                exponent, offset = power_law(x, y)
                text += f": $L^{{{exponent:.2f}}}$"
                if length is not None:
                    there = np.exp(offset) * length**exponent
                    text += f", {there:.3g} at {length}"
                    ax.plot([x[-1], length], [y[-1], there], color=COLOURS[index % 7], linestyle=":")
            ax.plot(x, y, color=COLOURS[index % 7], marker=MARKERS[index % 7], markersize=4, label=text)
        if length is not None:
            ax.axvline(length, color="grey", linestyle=":")
        ax.set(xscale="log", yscale="log")
        _curve_axes(ax, "sequence length L", label)
        if ax.lines:
            ax.legend(fontsize=7)
    return figure


def power_law(x, y):
    """Least-squares fit of `y = exp(offset) * x**exponent`; returns (exponent, offset)."""
    exponent, offset = np.polyfit(np.log(x), np.log(y), 1)
    return float(exponent), float(offset)


def impulse_response(a, delta, length=64, title=None):
    """Response of a one-state system `h' = a h + u` to one unit input at k = 0, discretised in two ways.

    Zero-order hold: `exp(delta a)**k (exp(delta a) - 1) / a`; forward Euler: `(1 + delta a)**k delta`. Both
    are compared with the exact `exp(a t)` of the continuous system after a unit pulse of width delta. Euler
    is unstable for `delta > -2/a`.

    a: decay rate, negative for a stable system; delta: step, positive; length: samples.
    """
    if not delta > 0:
        raise ValueError(f"delta={delta} is not positive; pass a step such as 0.1")
    if length < 1:
        raise ValueError(f"length={length} is below 1; pass a number of samples such as 64")
    k = np.arange(length)
    gain = np.expm1(delta * a) / a if a else delta
    hold = np.exp(delta * a * k) * gain
    euler = (1 + delta * a) ** k * delta
    time = np.linspace(0, length - 1, 8 * (length - 1) + 1)
    figure, axes = _grid(1, 1, title, width=6.2, height=3.2)
    ax = axes[0, 0]
    ax.plot(time, np.exp(delta * a * time) * gain, color="grey", linewidth=1, label="continuous")
    ax.plot(k, hold, linestyle="", marker="o", markersize=4, color=COLOURS[0], label="zero-order hold")
    ax.plot(k, euler, marker="s", markersize=3, linewidth=0.7, color=COLOURS[1], label="forward Euler")
    limit = 1.5 * max(np.abs(hold).max(), delta)
    ax.set_ylim(max(-limit, min(euler.min(), hold.min(), 0) - 0.1 * limit), limit)
    ax.legend(
        fontsize=8, title=f"a = {a:.3g}, $\\Delta$ = {delta:.3g}, decay {np.exp(delta * a):.4f} a token"
    )
    _curve_axes(ax, "token k", "state h")
    return figure


def token_rows(ids, title=None, shaded=None, xlabel="position"):
    """Sequences of tokens, one a row: ids (rows, L) whole numbers, a colour each; negative ones are blank.

    shaded: (first, last) positions behind which grey stands; xlabel says what is what.
    """
    ids = _array(ids)
    figure, axes = _grid(1, 1, title, width=8.6, height=0.6 + 0.26 * len(ids))
    ax = axes[0, 0]
    if shaded:
        ax.axvspan(shaded[0] - 0.5, shaded[1] + 0.5, color="lightgrey", zorder=0)
        ax.axvline(shaded[1] + 0.5, color="black")
    ax.imshow(np.ma.masked_less(ids, 0), cmap=PATH_COLOURS, aspect="auto", interpolation="nearest", zorder=1)
    ax.set(xlabel=xlabel, yticks=[])
    return figure


def step_figure(delta, kinds, order, title=None):
    """Steps of one selective layer on one sequence: a map of all channels, and their mean by kind of token.

    delta: (L, D), positive; kinds: dict of kind -> (L,) bool; order: (D,) channels from the top of the map.
    """
    delta = _array(delta)
    figure, axes = _grid(1, 2, title, width=5.2, height=3.3)
    left, right = axes[0]
    shown = left.imshow(
        np.log10(delta[:, _array(order)]).T, aspect="auto", cmap="magma", interpolation="nearest"
    )
    figure.colorbar(shown, ax=left, label="log10 Δ")
    left.set(xlabel="position", ylabel="channel (most selective first)")
    left.set_title("every channel", fontsize=10)
    mean, position = delta.mean(axis=1), np.arange(len(delta))
    right.plot(position, mean, color="grey", linewidth=0.7)
    for index, (kind, mask) in enumerate(kinds.items()):
        mask = _array(mask)
        right.plot(position[mask], mean[mask], MARKERS[index], color=COLOURS[index], markersize=5, label=kind)
    right.set_yscale("log")
    right.legend(fontsize=7)
    _curve_axes(right, "position", "Δ, mean over channels", "mean")
    return figure


# ---------------------------------------------------------------- scans of the plane

PATH_COLOURS = "viridis"
_INFLUENCE = LogNorm(1e-3, 1)


def scan_paths(points, kinds, title=None, labels=None):
    """The paths along which scans visit sets of points: a row a set, a column an order; lines brighten.

    points: tensor (B, L, 2), (x, y) in [0, 1], y downwards; kinds: orders of `kernels.orders.point_order`;
    labels: B names. Raises ValueError as `point_order`, and for no orders.
    """
    if len(kinds) == 0:
        raise ValueError("kinds is empty; pass orders of points such as ('row', 'column')")
    orders = {kind: point_order(points, kind) for kind in kinds}
    figure, axes = _grid(len(points), len(kinds), title, width=TILE * 0.92, height=TILE)
    for row, coords in enumerate(_array(points)):
        for ax, (kind, order) in zip(axes[row], orders.items(), strict=True):
            _path(ax, coords[_array(order[row])], kind if row == 0 else None)
        if labels:
            axes[row, 0].set_ylabel(labels[row], fontsize=9)
    return figure


def _path(ax, visited, title):
    """A path through points (L, 2) in the order given: lines that brighten, and a square at the start."""
    lines = np.stack([visited[:-1], visited[1:]], axis=1)  # (L-1, 2, 2)
    ax.add_collection(
        LineCollection(lines, array=np.arange(len(lines)), cmap=PATH_COLOURS, linewidths=1.1, zorder=1)
    )
    ax.plot(*visited.T, ".", color="black", markersize=2.5, zorder=2)
    ax.plot(*visited[0], "s", color=COLOURS[1], markersize=6, zorder=3)
    _plane(ax, title)


def _plane(ax, title):
    """Axes of the unit square, y downwards as in a picture."""
    ax.set(xlim=(-0.03, 1.03), ylim=(1.03, -0.03), xticks=[], yticks=[], aspect="equal")
    if title:
        ax.set_title(title, fontsize=9)


def neighbour_ranks(steps, title=None):
    """How many steps of a scan lie between a point and its true neighbours: shares of them within n steps.

    steps: dict of panel -> dict of curve -> numbers of steps (any shape, at least 1; inf: never). A curve
    whose name starts with "best" is drawn as a thick black line. Legends give medians. Raises ValueError for
    no panels and steps below 1.
    """
    if not steps:
        raise ValueError("steps is empty; pass {'32 px grid': {'row': steps}}")
    figure, axes = _grid(1, len(steps), title, width=3.5, height=3.3, sharey=True)
    highest = 1
    for ax, (panel, curves) in zip(axes[0], steps.items(), strict=True):
        for index, (name, values) in enumerate(curves.items()):
            values = np.sort(_array(values).astype(float), axis=None)
            if len(values) == 0 or not values[0] >= 1:
                raise ValueError(f"steps of {name!r} are empty or below 1; pass numbers of steps, |n| >= 1")
            best = name.startswith("best")
            share = np.arange(1, len(values) + 1) / len(values)
            finite = np.isfinite(values)
            highest = max([highest, *values[finite]])
            ax.step(
                values[finite],
                share[finite],
                where="post",
                color="black" if best else COLOURS[index % 6],
                linestyle=(0, (3, 3)) if index % 2 and not best else "-",  # curves that coincide both show
                linewidth=2.2 if best else 1.6,
                zorder=3 if best else 2,
                label=f"{name}: {_steps(np.median(values))}",
            )
        ax.set(xscale="log", ylim=(0, 1.03))
        _curve_axes(ax, "steps of the scan", "", panel)
        ax.legend(fontsize=7, title="median", title_fontsize=7, loc="lower right")
    for ax in axes[0]:
        ax.set_xlim(0.9, 1.2 * highest)
    axes[0, 0].set_ylabel("share of the nearest neighbours")
    return figure


def _steps(number):
    return f"{number:.4g}" if np.isfinite(number) else "never"


def influence_map(maps, query, title=None):
    """How much one pixel depends on the others, each map relative to its largest entry outside that pixel.

    maps: dict of label -> (H, W), not negative, such as `evaluate.pixel_influence` gives; query: the pixel's
    (row, column), marked by a cross. Exact zeros and NaN are grey; the scale is logarithmic over three
    decades. Raises ValueError for no maps, another shape, and a pixel outside.
    """
    if not maps:
        raise ValueError("maps is empty; pass {'row': evaluate.token_influence(...).reshape(32, 32)}")
    figure, axes = _grid(1, len(maps), title, width=TILE * 1.25, height=TILE * 1.3)
    for ax, (label, values) in zip(axes[0], maps.items(), strict=True):
        values = _array(values)
        if values.ndim != 2 or not (0 <= query[0] < len(values) and 0 <= query[1] < values.shape[1]):
            raise ValueError(
                f"the map {label!r} has shape {values.shape}; pass (H, W) that holds pixel {query}"
            )
        shown = ax.imshow(_relative(values, tuple(query)), cmap=_influence_colours(), norm=_INFLUENCE)
        ax.plot(query[1], query[0], "x", color=COLOURS[5], markersize=8, markeredgewidth=2)
        ax.set(xticks=[], yticks=[])
        ax.set_title(label, fontsize=9)
    _influence_bar(figure, shown, ax=axes[0].tolist(), shrink=0.85)
    return figure


def _influence_colours():
    return colormaps["magma"].with_extremes(bad=str(UNOBSERVED))


def _influence_bar(figure, shown, **place):
    bar = figure.colorbar(shown, extend="min", **place)
    bar.set_label("influence / largest (grey: none)", fontsize=8)
    bar.ax.tick_params(labelsize=7)


def _relative(values, query):
    """Influences over their largest, the query's own left out; zeros masked, the rest at least 0.001."""
    values = np.ma.masked_invalid(np.asarray(values, dtype=float))
    values = np.ma.masked_equal(values, 0)
    values[query] = np.ma.masked
    largest = values.max()
    return values if largest is np.ma.masked else np.ma.maximum(values / largest, 1e-3)


def scan_view(points, kinds, query, influence, title=None, neighbours=4):
    """One point of a scan of the plane: its true neighbours on every path, their steps, its influence map.

    Above, the paths with the point (cross) and its nearest neighbours (rings: blue if the scan meets them
    before the point, orange if after). Below, on the left, the steps between them in every order, filled if
    before and hollow if after; on the right `influence`, relative to its largest and grey where it is zero.

    points: tensor (L, 2) in [0, 1]; kinds: orders of `kernels.orders.point_order`; query: index of the point;
    influence: (L,), such as `evaluate.token_influence` gives. Raises ValueError as `point_order` and
    `neighbour_steps`, for no orders, a point that does not exist and an influence of another length.
    """
    if len(kinds) == 0:
        raise ValueError("kinds is empty; pass orders of points such as ('row', 'column')")
    if not 0 <= query < len(points) or len(influence) != len(points):
        raise ValueError(
            f"query={query}, {len(influence)} influences and {len(points)} points do not fit; pass an index "
            "of a point, and one influence a point"
        )
    orders = torch.stack([point_order(points[None], kind) for kind in kinds], dim=1)  # (1, K, L)
    steps = neighbour_steps(points[None], orders, neighbours)[0, :, query].cpu().numpy()  # (K, M)
    place = inverse_order(orders)[0, :, query].cpu().numpy()  # (K,)
    coords, orders = _array(points), _array(orders[0])

    width = max(7.2, 1.4 * len(kinds))
    figure = Figure(figsize=(width, 5.4), dpi=DPI)  # places are given: a layout engine would draw it twice
    paths = figure.add_gridspec(1, len(kinds), left=0.01, right=0.99, bottom=0.6, top=0.88, wspace=0.05)
    for k, ax in enumerate(paths.subplots(squeeze=False)[0]):
        visited = coords[orders[k]]
        _path(ax, visited, kinds[k])
        near = visited[place[k] - steps[k]]
        edges = [COLOURS[0] if n > 0 else COLOURS[1] for n in steps[k]]
        ax.scatter(*near.T, s=50, facecolors="none", edgecolors=edges, linewidths=2, zorder=4)
        ax.plot(*coords[query], "x", color="black", markersize=7, markeredgewidth=2, zorder=5)
    left, right = figure.add_axes((0.08, 0.07, 0.48, 0.42)), figure.add_axes((0.58, 0.07, 0.3, 0.42))
    bar = 0.8 / len(kinds)
    for k, kind in enumerate(kinds):
        x = np.arange(neighbours) + (k - (len(kinds) - 1) / 2) * bar
        face = [COLOURS[k % 7] if n > 0 else "none" for n in steps[k]]
        left.bar(x, abs(steps[k]) - 0.5, 0.85 * bar, 0.5, color=face, edgecolor=COLOURS[k % 7])
        left.plot([], [], "s", color=COLOURS[k % 7], label=kind)
    left.set(yscale="log", ylim=(0.5, 4 * len(coords)))
    left.minorticks_off()
    left.set_xticks(range(neighbours), [f"nearest {m + 1}" for m in range(neighbours)], fontsize=8)
    left.legend(fontsize=7, ncols=3, loc="upper center")
    _curve_axes(left, "", "steps", "filled: met before; hollow: met after")
    shade = _relative(_array(influence), query).filled(np.nan)
    size = 3500 / len(coords)
    shown = right.scatter(
        *coords.T, s=size, c=shade, cmap=_influence_colours(), norm=_INFLUENCE, plotnonfinite=True
    )
    right.plot(*coords[query], "x", color=COLOURS[5], markersize=8, markeredgewidth=2)
    _plane(right, "influence of every point")
    _influence_bar(figure, shown, cax=figure.add_axes((0.9, 0.1, 0.015, 0.36)))
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


# ---------------------------------------------------------------- comparisons of models and samplers


def window_maps(maps, title=None):
    """Which window each pixel of a grid belongs to: one panel each, neighbouring numbers in other colours.

    maps: dict of label -> (H, W) whole numbers from 0. Raises ValueError for no maps and another shape.
    """
    if not maps:
        raise ValueError("maps is empty; pass {'hilbert': numbers of shape (96, 96)}")
    colours = ListedColormap(COLOURS[:6])
    figure, axes = _grid(1, len(maps), title, width=TILE * 1.35, height=TILE * 1.45)
    for ax, (label, values) in zip(axes[0], maps.items(), strict=True):
        values = _array(values)
        if values.ndim != 2:
            raise ValueError(f"the map {label!r} has shape {values.shape}; pass (H, W) whole numbers")
        ax.imshow(values % 6, cmap=colours, vmin=-0.5, vmax=5.5, interpolation="nearest")
        ax.set(xticks=[], yticks=[])
        ax.set_title(label, fontsize=9)
    return figure


def parts_chart(rows, title=None):
    """Posterior means of several models as points with standard errors: PSNR, and what is paired with the
    first model, whose row stands on top.

    rows: from `evaluate.compare_means`. Raises ValueError for no rows.
    """
    if not rows:
        raise ValueError("rows is empty; pass the result of evaluate.compare_means")
    figure, axes = _grid(1, 2, title, width=4.3, height=0.9 + 0.36 * len(rows))
    place, names = np.arange(len(rows)), [row["model"] for row in rows]
    panels = (
        ("psnr", "PSNR (dB), posterior mean"),
        ("versus_first", f"paired difference to {names[0]} (dB)"),
    )
    for column, (ax, (key, label)) in enumerate(zip(axes[0], panels, strict=True)):
        values = np.array([np.nan if row[key] is None else row[key] for row in rows])
        errors = [row[f"{key}_se"] or 0 for row in rows]
        ax.errorbar(values, place, xerr=errors, fmt="o", color=COLOURS[0], capsize=3)
        ax.set_yticks(place, names if column == 0 else [""] * len(rows), fontsize=8)
        ax.invert_yaxis()
        _curve_axes(ax, label, "")
    axes[0, 1].axvline(0, color="grey", linewidth=0.8)
    return figure


_SAMPLE_SCORES = (
    ("psnr", "PSNR (dB)"),
    ("speckle", "speckle"),
    ("sharpness", "sharpness (1: as the target)"),
)


def sampler_curves(rows, title=None):
    """Posterior samples against network evaluations, a curve a sampler: PSNR, speckle and sharpness.

    rows: from `evaluate.compare_samplers`; posterior means are left out. Raises ValueError without samples.
    """
    samples = [row for row in rows if row["kind"] == "sample"]
    if not samples:
        raise ValueError("rows has no row of kind 'sample'; pass the result of evaluate.compare_samplers")
    names = list(dict.fromkeys(row["method"] for row in samples))
    figure, axes = _grid(1, 3, title, width=3.4, height=3.5)
    ticks = sorted({row["evaluations"] for row in samples})
    for ax, (key, label) in zip(axes[0], _SAMPLE_SCORES, strict=True):
        for index, name in enumerate(names):
            points = [(r["evaluations"], r[key]) for r in samples if r["method"] == name]
            ax.plot(
                *np.array(points, dtype=float).T,
                color=COLOURS[index % 7],
                marker=MARKERS[index % 7],
                linestyle=("-", "--", ":", "-.")[index % 4],
                markersize=5 + 3 * (index % 2),
                fillstyle="none" if index % 2 else "full",
                label=name,
            )
        ax.set_xscale("log")
        ax.set_xticks(ticks, [str(n) for n in ticks])
        ax.minorticks_off()
        _curve_axes(ax, "network evaluations a sample", "", label)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    return figure


def perception_distortion(rows, title=None):
    """Error against looks: sharpness and speckle over PSNR, posterior samples and posterior means apart.

    rows: from `evaluate.compare_samplers`. The samples of one sampler are joined, from few evaluations
    (small) to many (large). Raises ValueError for no rows.
    """
    if not rows:
        raise ValueError("rows is empty; pass the result of evaluate.compare_samplers")
    figure, axes = _grid(1, 2, title, width=4.4, height=3.6)
    for ax, (key, label) in zip(axes[0], _SAMPLE_SCORES[:0:-1], strict=True):
        for kind in ("sample", "mean"):
            colour, marker = KIND_STYLE[kind]
            shown = [row for row in rows if row["kind"] == kind and row[key] is not None]
            for name in dict.fromkeys(row["method"] for row in shown):
                points = sorted((r["evaluations"], r["psnr"], r[key]) for r in shown if r["method"] == name)
                _, x, y = np.array(points, dtype=float).T
                first = name == shown[0]["method"]
                ax.plot(x, y, color=colour, linewidth=0.8, alpha=0.5)
                sizes = np.linspace(15, 70, len(x)) if len(x) > 1 else [70]
                text = f"posterior {kind}" if first else None
                ax.scatter(x, y, s=sizes, color=colour, marker=marker, alpha=0.8, label=text)
                if kind == "mean":
                    ax.annotate(
                        name, (x[-1], y[-1]), (-4, -14), textcoords="offset points", fontsize=7, ha="right"
                    )
        _curve_axes(ax, "PSNR (dB)", label)
        ax.margins(0.12)
    axes[0, 0].axhline(1, color="grey", linewidth=0.8, linestyle="--")
    axes[0, 0].legend(fontsize=8)
    return figure


# ---------------------------------------------------------------- tables as figures


def cost_bars(costs, title=None):
    """Parameters, FLOPs and training memory of one or more models before any training.

    costs: dict of name -> the dict that `evaluate.model_cost` returns.
    """
    if not costs:
        raise ValueError("costs is empty; pass {'v1': evaluate.model_cost(...)}")
    panels = (
        ("parameters", 1e6, "parameters (million)"),
        ("flops_forward", 1e9, "forward (GFLOP)"),
        ("training_bytes", 2**30, "training memory (GiB)"),
    )
    figure, axes = _grid(1, 3, title, width=3.1, height=0.9 + 0.45 * len(costs))
    names = list(costs)
    for column, (ax, (key, unit, label)) in enumerate(zip(axes[0], panels, strict=True)):
        values = [costs[name][key] / unit for name in names]
        bars = ax.barh(names, values, color=[COLOURS[i % 7] for i in range(len(names))])
        ax.bar_label(bars, fmt="%.3g", padding=3, fontsize=8)
        ax.set_xlim(0, 1.3 * max(values))
        ax.xaxis.set_major_locator(MaxNLocator(4))
        ax.invert_yaxis()
        ax.set_title(label, fontsize=9)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8, labelleft=column == 0)
    return figure


def improvement_chart(rows, names=("A", "B"), title=None):
    """Two models on the same images: their scores above and, below, B's improvement on every single image.

    Above, mean and standard error of each model, for the posterior mean and for samples apart; below, a dot
    an image, the mean improvement with its standard error in black, and the p-value of Wilcoxon's test. Above
    the line at zero B is the better one, in every panel.

    rows: from `evaluate.compare`; names: of A and B. Raises ValueError for no rows.
    """
    if not rows:
        raise ValueError("rows is empty; pass the result of evaluate.compare")
    metrics_shown = list(dict.fromkeys(row["metric"] for row in rows))
    figure, axes = _grid(2, len(metrics_shown), title, width=2.7, height=2.7)
    for column, metric in enumerate(metrics_shown):
        label, sign, _ = COMPARED[metric]
        shown = [row for row in rows if row["metric"] == metric]
        place = np.arange(len(shown))
        kinds = [row["kind"] for row in shown]
        top, bottom = axes[:, column]
        for shift, key, name, colour in ((-0.2, "a", names[0], COLOURS[0]), (0.2, "b", names[1], COLOURS[4])):
            values, errors = (
                [row[entry] or 0 for row in shown] for entry in (key, f"{key}_se")
            )  # an undefined score has no bar
            bars = top.bar(place + shift, values, 0.38, yerr=errors, capsize=3, color=colour, label=name)
            top.bar_label(bars, fmt="%.3g", fontsize=7, padding=2)
        top.set_ylim(0, 1.2 * max(top.get_ylim()[1], 1e-12))
        for x, row in zip(place, shown, strict=True):
            dots = np.array(row["differences"])
            spread = np.linspace(-0.18, 0.18, len(dots)) if len(dots) > 1 else np.zeros(len(dots))
            bottom.plot(x + spread, dots, ".", color=COLOURS[5], markersize=4)
            if row["improvement"] is not None:
                bottom.errorbar(
                    x, row["improvement"], row["improvement_se"], color="black", marker="D", capsize=5
                )
        bottom.axhline(0, color="grey", linewidth=0.8)
        bottom.set_xlim(-0.5, len(shown) - 0.5)
        for ax, heading in ((top, f"{label}, {'more' if sign > 0 else 'less'} is better"), (bottom, None)):
            _curve_axes(ax, "", "", heading)
            ax.set_axisbelow(True)
            ax.tick_params(axis="y", labelsize=8)
        top.set_xticks(place, [f"posterior\n{kind}" for kind in kinds], fontsize=8)
        tests = ["" if row["p_wilcoxon"] is None else f"\np = {row['p_wilcoxon']:.1g}" for row in shown]
        bottom.set_xticks(
            place, [f"posterior\n{kind}{test}" for kind, test in zip(kinds, tests, strict=True)], fontsize=8
        )
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=9)
    axes[1, 0].set_ylabel(f"{names[1]} better by", fontsize=9)
    return figure


# ---------------------------------------------------------------- autoencoders and latents


def strips(rows, heads=None, title=None):
    """Rows of pictures of one length: ways of an interpolation, neighbours, one latent at several sizes.

    rows: dict of label -> list or array of pictures (H, W, 3), which may differ in size; a None leaves its
    place empty. heads: titles of the columns. Raises ValueError for no rows and rows of other lengths.
    """
    lengths = {len(pictures) for pictures in rows.values()} | ({len(heads)} if heads else set())
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(f"the rows (and heads) have lengths {sorted(lengths)}; pass one length, at least 1")
    figure, axes = _grid(len(rows), lengths.pop(), title, width=TILE * 0.64, height=TILE * 0.72)
    for row, (label, pictures) in enumerate(rows.items()):
        for column, picture in enumerate(pictures):
            ax, head = axes[row, column], heads[column] if heads and row == 0 else None
            if picture is None:
                ax.set_axis_off()
            else:
                _picture(ax, _array(picture), head, label if column == 0 else None)
    return figure


def latent_map(points, images, labels=None, names=None, title=None):
    """Pictures at two coordinates each, such as the first principal components of their latents.

    points: (N, 2); images: (N, H, W, 3); labels: (N,) whole numbers, the colour of each picture's frame, and
    their names, at most as many as `COLOURS`. Raises ValueError for shapes that do not fit.
    """
    points, images = _array(points), _fields(images, "images")
    if points.shape != (len(images), 2) or (labels is not None and len(labels) != len(images)):
        raise ValueError(
            f"points are {points.shape} for {len(images)} images; pass (N, 2), and N labels or None"
        )
    figure, axes = _grid(1, 1, title, width=7.2, height=5.4)
    ax = axes[0, 0]
    for index, (point, image) in enumerate(zip(points, images, strict=True)):
        colour = "grey" if labels is None else COLOURS[labels[index] % len(COLOURS)]
        box = AnnotationBbox(
            OffsetImage(np.clip(image, 0, 1), zoom=24 / image.shape[0], interpolation="nearest"),
            point,
            pad=0.12,
            bboxprops={"facecolor": colour, "edgecolor": colour, "linewidth": 0.5},
        )
        ax.add_artist(box)
    for label, name in enumerate(names or ()):
        ax.plot([], [], "s", color=COLOURS[label % len(COLOURS)], label=name)
    if names:
        ax.legend(fontsize=8, ncols=2)
    low, high = points.min(0), points.max(0)
    edge = 0.08 * np.maximum(high - low, 1e-9)
    ax.set(xlim=(low[0] - edge[0], high[0] + edge[0]), ylim=(low[1] - edge[1], high[1] + edge[1]))
    _curve_axes(ax, "first principal component", "second principal component")
    return figure


def estimate_scatter(pairs, title=None):
    """Estimates against what they estimate, a panel each, with the root mean square error and the diagonal.

    pairs: dict of label -> (true, estimated), arrays of one shape. Raises ValueError for none.
    """
    if not pairs:
        raise ValueError("pairs is empty; pass {'mean over points': (true, estimated)}")
    figure, axes = _grid(1, len(pairs), title, width=3.1, height=3.1, sharex=True, sharey=True)
    for ax, (label, (true, estimated)) in zip(axes[0], pairs.items(), strict=True):
        true, estimated = _array(true).ravel(), _array(estimated).ravel()
        error = np.sqrt(np.square(estimated - true).mean())
        ax.plot(true, estimated, ".", color=COLOURS[0], markersize=3, alpha=0.5)
        ax.axline((0, 0), slope=1, color="black", linewidth=0.8)
        _curve_axes(ax, "from all pixels", "from the observed", f"{label}: error {error:.3g}")
    return figure


def scale_curves(rows, title=None):
    """PSNR against the real image, gain over the own field upsampled, and consistency, against the size.

    rows: from `evaluate.scale_scores`. Raises ValueError for no rows.
    """
    if not rows:
        raise ValueError("rows is empty; pass the result of evaluate.scale_scores")
    panels = (
        ("psnr", "PSNR (dB)"),
        ("versus_bicubic", "PSNR - own field, bicubic (dB)"),
        ("consistency", "consistency with the smallest (dB)"),
    )
    figure, axes = _grid(1, 3, title, width=3.4, height=3.1)
    for ax, (key, label) in zip(axes[0], panels, strict=True):
        for index, name in enumerate(dict.fromkeys(row["model"] for row in rows)):
            shown = [row for row in rows if row["model"] == name and row[key] is not None]
            ax.errorbar(
                [row["scale"] for row in shown],
                [row[key] for row in shown],
                [row[f"{key}_se"] or 0 for row in shown],
                color=COLOURS[index % 7],
                marker=MARKERS[index % 7],
                capsize=3,
                label=name,
            )
        ax.set_xticks(sorted({row["scale"] for row in rows}))
        _curve_axes(ax, "side (px)", label)
    axes[0, 1].axhline(0, color="grey", linewidth=0.8)
    axes[0, 0].legend(fontsize=8)
    return figure


def inversion_curve(steps, psnr, goal=None, title=None):
    """PSNR of fields from latent and inverted noise against solver steps, a thin line an image, mean thick.

    steps: (S,); psnr: (S, N) in dB; goal: a level to mark. Raises ValueError for shapes that do not fit.
    """
    steps, psnr = np.asarray(steps), np.asarray(psnr, dtype=float)
    if psnr.ndim != 2 or len(steps) != len(psnr):
        raise ValueError(f"steps are {steps.shape} and psnr {psnr.shape}; pass (S,) and (S, N)")
    figure, axes = _grid(1, 1, title, width=5.2, height=3.1)
    ax = axes[0, 0]
    ax.plot(steps, psnr, color=COLOURS[5], linewidth=0.8)
    ax.plot(steps, psnr.mean(axis=1), color=COLOURS[0], marker="o", linewidth=2, label="mean of the images")
    if goal is not None:
        ax.axhline(goal, color="black", linestyle="--", linewidth=1, label=f"{goal:g} dB")
    ax.set_xscale("log")
    ax.set_xticks(steps, [str(n) for n in steps])
    ax.minorticks_off()
    ax.legend(fontsize=8)
    _curve_axes(ax, "Heun steps, each way", "PSNR (dB)")
    return figure


def loss_curves(curves, title=None, window=20):
    """Losses of trainings against steps and against seconds, as running means.

    curves: dict of label -> (losses, seconds): one loss a step, and what all steps took. Raises ValueError
    for none.
    """
    if not curves:
        raise ValueError("curves is empty; pass {'latent': (losses, 12.3)}")
    figure, axes = _grid(1, 2, title, width=4.0, height=3.1, sharey=True)
    for index, (label, (losses, seconds)) in enumerate(curves.items()):
        mean = _running_mean(np.asarray(losses, dtype=float), min(window, len(losses)))
        step = np.arange(len(losses) - len(mean), len(losses)) + 1
        for ax, unit in zip(axes[0], (1, seconds / len(losses)), strict=True):
            ax.plot(step * unit, mean, color=COLOURS[index % 7], label=label)
    for ax, label in zip(axes[0], ("step", "seconds"), strict=True):
        _curve_axes(ax, label, "loss" if label == "step" else "")
    axes[0, 0].legend(fontsize=8)
    return figure


def smoothness_bars(rows, title=None):
    """Length and second difference of ways between images, a group a space and a bar a way; and contrast.

    rows: from `evaluate.interpolation_scores`. Raises ValueError for no rows.
    """
    if not rows:
        raise ValueError("rows is empty; pass the result of evaluate.interpolation_scores")
    spaces, ways = (list(dict.fromkeys(row[key] for row in rows)) for key in ("space", "way"))
    panels = (
        ("ratio", "length / direct (1: straight)", spaces),
        ("bend", "second difference / direct", spaces),
        ("contrast", "contrast halfway (1: as the ends)", spaces[:1]),
    )
    figure, axes = _grid(1, 3, title, width=3.4, height=3.3)
    for ax, (key, label, groups) in zip(axes[0], panels, strict=True):
        for index, way in enumerate(ways):
            shown = [row for space in groups for row in rows if (row["way"], row["space"]) == (way, space)]
            place = np.arange(len(groups)) + (index - (len(ways) - 1) / 2) * 0.8 / len(ways)
            values, errors = [row[key] for row in shown], [row[f"{key}_se"] or 0 for row in shown]
            ax.bar(place, values, 0.75 / len(ways), yerr=errors, capsize=2, color=COLOURS[index], label=way)
        ax.set_xticks(range(len(groups)), groups if len(groups) > 1 else [""], fontsize=8)
        _curve_axes(ax, "", "", label)
        ax.set_axisbelow(True)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    return figure


# ---------------------------------------------------------------- grids and spectrograms


def grid_paths(height, width, kinds, title=None):
    """The paths along which scans visit the pixels of a grid, a panel an order; lines brighten.

    kinds: orders of `kernels.orders.grid_order`. Raises ValueError as `grid_order`, and for no orders.
    """
    if len(kinds) == 0:
        raise ValueError("kinds is empty; pass orders of a grid such as ('h', 'v', 'w7')")
    points = _array(grid_coords(height, width))  # (L, 2)
    figure, axes = _grid(1, len(kinds), title, width=TILE * 0.98, height=TILE)
    for ax, kind in zip(axes[0], kinds, strict=True):
        _path(ax, points[_array(grid_order(height, width, kind))], kind)
    return figure


def spectrogram_grid(spectrograms, labels=None, meta=None, columns=5, title=None):
    """Spectrograms beside each other, frequency upwards, with one bar of levels.

    spectrograms: (N, 1, H, W) in [-1, 1]; labels: N titles; meta: `spectrograms.SpectrogramMeta`, for axes in
    seconds and kHz and levels in dB; columns: panels a row. Raises ValueError for other shapes.
    """
    values = _array(spectrograms)
    if values.ndim != 4 or values.shape[1] != 1 or 0 in values.shape:
        raise ValueError(f"spectrograms have shape {values.shape}; pass (N, 1, H, W), not empty")
    labels = [None] * len(values) if labels is None else labels
    if len(labels) != len(values):
        raise ValueError(f"{len(labels)} labels for {len(values)} spectrograms; pass one for each, or None")
    height, width = values.shape[2:]
    columns = min(columns, len(values))
    extent = (0, width, 0, height)  # frames and bins
    if meta is not None:
        extent = (0, (width - 1) * meta.hop / meta.sample_rate, 0, meta.sample_rate / 2000)
        values = (values - 1) / 2 * meta.dynamic_range  # dB below the loudest entry
    low, high = (-1, 1) if meta is None else (-meta.dynamic_range, 0)
    side = TILE * (0.85 if columns > 3 else 1.1)
    # Hard pixels of one colour a decibel make files of half the size: a notebook holds many of them.
    colours = colormaps["magma"].resampled(61)
    style = {"origin": "lower", "extent": extent, "aspect": "auto", "interpolation": "nearest"}
    style |= {"cmap": colours, "vmin": low, "vmax": high}
    width = side if columns > 1 else 2 * side  # a title needs room
    figure, axes = _grid(-(-len(values) // columns), columns, title, width=width, height=side)
    for index, ax in enumerate(axes.flat):
        if index >= len(values):
            ax.set_axis_off()
            continue
        shown = ax.imshow(values[index, 0], **style)
        ax.tick_params(
            labelsize=7, labelleft=index % columns == 0, labelbottom=index + columns >= len(values)
        )
        if labels[index] is not None:
            ax.set_title(labels[index], fontsize=9)
    bar = figure.colorbar(shown, ax=axes.ravel().tolist(), shrink=0.85)
    bar.ax.tick_params(labelsize=7)
    if meta is not None:
        bar.set_label("dB", fontsize=8)
        figure.supxlabel("time (s)", fontsize=8)
        figure.supylabel("frequency (kHz)", fontsize=8)
    return figure


def mixer_bars(rows, title=None):
    """Parameters, FLOPs, time and memory of a training step, a group a size and a bar a mixer.

    rows: of `evaluate.mixer_costs`; what was not measured (None) has no panel. Raises ValueError for no rows.
    """
    if not rows:
        raise ValueError("rows is empty; pass the result of evaluate.mixer_costs")
    panels = {
        "parameters": (1e6, "parameters (million)"),
        "flops_forward": (1e9, "forward (GFLOP)"),
        "seconds": (1e-3, "a training step (ms)"),
        "memory": (2**20, "a training step (MiB)"),
    }
    panels = {key: panel for key, panel in panels.items() if all(row[key] is not None for row in rows)}
    sizes, mixers = (list(dict.fromkeys(row[key] for row in rows)) for key in ("size", "mixer"))
    figure, axes = _grid(1, len(panels), title, width=2.7, height=2.8)
    for ax, (key, (unit, label)) in zip(axes[0], panels.items(), strict=True):
        for index, mixer in enumerate(mixers):
            values = [row[key] / unit for row in rows if row["mixer"] == mixer]
            place = np.arange(len(values)) + (index - (len(mixers) - 1) / 2) * 0.8 / len(mixers)
            bars = ax.bar(place, values, 0.75 / len(mixers), color=COLOURS[index % 7], label=mixer)
            ax.bar_label(bars, fmt="%.3g", fontsize=6, padding=1, rotation=0 if len(mixers) < 3 else 45)
        ax.set_xticks(range(len(sizes)), [f"{size} x {size}" for size in sizes], fontsize=8)
        ax.set_ylim(0, 1.15 * ax.get_ylim()[1])
        _curve_axes(ax, "", "", label)
        ax.set_axisbelow(True)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(mixers), fontsize=8)
    return figure


def guidance_curves(rows, title=None):
    """Accuracy and Frechet distance of generated spectrograms against guidance, those of real clips as lines.

    rows: of `evaluate.evaluate_generated`. Raises ValueError where none of them is generated.
    """
    generated = sorted((row for row in rows if row["guidance"] is not None), key=lambda row: row["guidance"])
    if not generated:
        raise ValueError("rows has no generated one; pass the result of evaluate.evaluate_generated")
    figure, axes = _grid(1, 2, title, width=4.2, height=3.0)
    guidance = [row["guidance"] for row in generated]
    panels = (("accuracy", 100, "accuracy (%)"), ("frechet", 1, "Fréchet distance to test clips"))
    for ax, (key, scale, label) in zip(axes[0], panels, strict=True):
        values = [scale * row[key] for row in generated]
        errors = [scale * (row["accuracy_se"] or 0) for row in generated] if key == "accuracy" else None
        ax.errorbar(guidance, values, errors, color=COLOURS[1], marker="s", capsize=3, label="generated")
        for row in rows:
            if row["source"] == "training clips":
                ax.axhline(scale * row[key], color=COLOURS[0], linestyle="--", label=row["source"])
        _curve_axes(ax, "guidance", label)
    axes[0, 0].legend(fontsize=8)
    return figure
