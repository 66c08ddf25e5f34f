"""Static figures: everything a widget or a notebook shows is drawn by a function here.

Every function returns a new `matplotlib.figure.Figure` that is not registered with pyplot: a notebook
displays it as the last value of a cell, a script calls `figure.savefig`, and nothing has to be closed. Images
and fields are arrays or tensors (..., H, W, 3) with values in [0, 1]. `title` stands above the whole figure
(notebooks put the preset there).
"""

import numpy as np
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nfhelpers import metrics
from nfhelpers.evaluate import COMPARED

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette: distinct for every common kind of colour vision; curves have
markers of their own too."""

MARKERS = "osD^vPX"
UNOBSERVED = 0.75
"""Grey on which observed pixels are drawn."""

KIND_STYLE = {"mean": (COLOURS[0], "o"), "sample": (COLOURS[1], "s"), "classical": (COLOURS[2], "D")}
TILE = 1.9  # inches of one picture
DPI = 80


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

    history: dict of lists step and loss, and val_step, val_loss, val_psnr (these may be missing or empty).
    fields: None, or dict of sparse, reconstruction and target, each (k, H, W, 3) in [0, 1].
    Raises ValueError for a history without step or loss.
    """
    if "step" not in history or "loss" not in history:
        raise ValueError(
            f"history has the keys {sorted(history)}; pass the history of train.fit, with step and loss"
        )
    step, loss = _array(history["step"]), _array(history["loss"]).astype(float)
    val_step = _array(history.get("val_step", []))
    val_loss, val_psnr = history.get("val_loss", []), history.get("val_psnr", [])
    shown = {} if fields is None else {name: _fields(fields[name], name) for name in _FIELD_ROWS}
    count = len(shown["target"]) if shown else 0

    figure = Figure(figsize=(9, 2.9 + (1.45 * 3 if count else 0)), dpi=DPI, layout="constrained")
    parts = figure.subfigures(2, 1, height_ratios=[2.9, 4.35]) if count else [figure.subfigures(1, 1)]
    left, right = parts[0].subplots(1, 2)
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
        left.legend(fontsize=8)
    _curve_axes(left, "step", "loss", "flow matching")
    right.plot(val_step, val_psnr, color=COLOURS[1], marker="s", markersize=4)
    _curve_axes(right, "step", "PSNR (dB)", "validation, full field, posterior mean")
    if count:
        axes = parts[1].subplots(3, count, squeeze=False)
        for row, name in enumerate(_FIELD_ROWS):
            for column in range(count):
                _picture(axes[row, column], shown[name][column], label=name if column == 0 else None)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


_FIELD_ROWS = ("sparse", "reconstruction", "target")


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
