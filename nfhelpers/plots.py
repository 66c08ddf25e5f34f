"""Figures that several notebooks draw. Each function returns a matplotlib Figure that pyplot does not know:
as the last value of a cell it is shown, and nothing has to be closed. Arrays may be tensors."""

import textwrap

import numpy as np
from cycler import cycler
from matplotlib import colormaps
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito's
MARKERS, LINES = "osD^vPX", ("-", "--", "-.", ":")
GREY = 0.75  # of unobserved pixels, and of what a map does not know
DPI = 96


def _array(x):
    return x.detach().cpu().numpy() if hasattr(x, "detach") else np.asarray(x)


def _unit(image):
    image = _array(image)
    return image / 255 if image.dtype == np.uint8 else image


def subplots(rows=1, columns=1, width=4.4, height=3.2, title=None, plain=False, **options):
    """`Figure.subplots` in the style of the series: (figure, axes). Sizes are of one panel, in inches;
    `plain` ones, for pictures, have a whole frame and no lines behind."""
    height = rows * height + 0.3 * bool(title)
    figure = Figure((columns * width, height), dpi=DPI, layout="constrained")
    axes = figure.subplots(rows, columns, **options)
    for ax in np.ravel(axes):
        ax.set(prop_cycle=cycler(color=COLOURS), axisbelow=True)
        ax.tick_params(which="both", labelsize=8)
        ax.spines[["top", "right"]].set_visible(plain)
        if not plain:
            ax.grid(color="#dddddd")
    figure.suptitle(title or "", fontsize=11)
    return figure, axes


def image_grid(rows, titles=None, captions=None, title=None, tile=1.5):
    """Rows of pictures: labels on the left, titles above the columns, captions under the pictures.

    rows: dict of label -> pictures (H, W, 3) or (H, W), uint8 or in [0, 1], of any sizes; None leaves a gap.
    captions: dict of label -> strings such as "24.1 dB". tile: inches of a picture."""
    rows = {label: [None if p is None else _unit(p) for p in pictures] for label, pictures in rows.items()}
    sizes = np.array([p.shape[:2] for pictures in rows.values() for p in pictures if p is not None])
    widest = sizes[:, 1].max()
    cell = max(1, round(tile * DPI / widest)) * widest  # pixels of the screen, whole ones for each pixel
    tall = round(cell * (sizes[:, 0] / sizes[:, 1]).max())
    columns, captions = max(map(len, rows.values())), captions or {}
    names = [textwrap.fill(str(label), 16) for label in rows]
    left = max([7 * len(line) + 8 for name in names for line in name.split("\n") if line], default=2)
    top = 30 * bool(title) + 16 * max([head.count("\n") + 1 for head in titles or ()], default=0) + 2
    note = 6 + 15 * max([text.count("\n") + 1 for texts in captions.values() for text in texts], default=0)
    width, height = left + columns * (cell + 6), top + len(rows) * (tall + note)
    figure = Figure((width / DPI, height / DPI), dpi=DPI)
    place = {"left": left / width, "right": 1 - 6 / width, "bottom": note / height, "top": 1 - top / height}
    place |= {"wspace": 6 / cell, "hspace": note / tall}
    axes = figure.subplots(len(rows), columns, squeeze=False, gridspec_kw=place)
    for row, name, (label, pictures) in zip(axes, names, rows.items(), strict=True):
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", size=9)
        for ax, text in zip(row, captions.get(label, ()), strict=False):
            ax.set_xlabel(text, size=8, labelpad=2)
        for ax, picture in zip(row, pictures, strict=False):
            if picture is not None:
                ax.imshow(np.clip(picture, 0, 1), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    for ax, head in zip(axes.flat, [*(titles or ()), *[""] * axes.size], strict=False):
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
        ax.set_title(head, size=9, pad=4)
    figure.suptitle(title or "", y=1 - 4 / height, va="top", fontsize=11)
    return figure


def observed_pixels(images, mask):
    """Images (..., H, W, 3) with every pixel outside `mask` (..., H, W) replaced by grey, in [0, 1]."""
    return np.where(_array(mask).astype(bool)[..., None], _unit(images), GREY)


def curves(panels, title=None, width=4.4, height=3.2, markers=False):
    """Lines against numbers, a panel each; draw more on `figure.axes`.

    panels: dict of heading -> dict of lines (label -> (x, y), or (x, y, options of `Axes.errorbar` such as
    yerr)) and what `Axes.set` takes: xlabel, ylabel, yscale="log". A label "_..." stays out of the legend."""
    figure, axes = subplots(1, len(panels), width, height, title, squeeze=False)
    for ax, (heading, panel) in zip(axes[0], panels.items(), strict=True):
        for index, (label, (x, y, *options)) in enumerate(panel["lines"].items()):
            style = {"label": label, "color": COLOURS[index % 7], "lw": 1.4, "capsize": 2, "ms": 4}
            style |= {"marker": MARKERS[index % 7]} if markers else {"linestyle": LINES[index % 4]}
            ax.errorbar(_array(x), _array(y), **style | (options[0] if options else {}))
        ax.set(**{key: value for key, value in panel.items() if key != "lines"})
        ax.set_title(heading, fontsize=10)
        if any(ax.get_legend_handles_labels()):
            ax.legend(fontsize=8)
    return figure


def training_figure(history, fields=None, title=None):
    """Loss and validation PSNR against steps; below, pictures as they are reconstructed while training.

    history: of `train.fit`; a PSNR that is missing or NaN throughout has no panel. fields: None, or dict of
    label -> pictures (k, H, W, 3), a row each."""
    loss, psnr = _array(history["loss"]).astype(float), _array(history.get("val_psnr", []))
    panels = {"loss": history.get("val_loss", [])}
    panels |= {"PSNR (dB)": psnr} if np.isfinite(psnr).any() else {}
    figure, axes = subplots(1 + bool(fields), len(panels), 4.4, 2.9, title, squeeze=False)
    axes[0, 0].plot(history["step"], loss, color=COLOURS[5], linewidth=0.8, alpha=0.6, label="training")
    if (window := len(loss) // 25) > 1:
        mean = [np.convolve(x, np.full(window, 1 / window), "valid") for x in (history["step"], loss)]
        axes[0, 0].plot(*mean, color=COLOURS[0], label=f"mean of {window}")
    for ax, (name, values) in zip(axes[0], panels.items(), strict=True):
        ax.plot(history.get("val_step", []), values, "s-", color=COLOURS[1], ms=4, label="validation")
        ax.set(xlabel="step", ylabel=name)
        ax.legend(fontsize=8)
    axes[0, 0].set_yscale("log" if len(loss) and np.nanmin(loss) > 0 else "linear")
    if fields:
        rows = np.stack([_array(row) for row in fields.values()])  # (rows, k, H, W, 3)
        rows = np.pad(rows, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)), constant_values=1)
        for ax in axes[1]:
            ax.remove()
        ax = figure.add_subplot(axes[0, 0].get_gridspec()[1, :], xticks=[])
        ax.imshow(np.clip(np.vstack([np.hstack(row) for row in rows]), 0, 1), interpolation="nearest")
        ax.set_yticks([(i + 0.5) * rows.shape[2] for i in range(len(rows))], fields, fontsize=8)
        ax.spines[:].set_visible(False)
    return figure


def maps(values, title=None, mark=None, cmap="magma", limits=None, log=False, label=None):
    """Maps of numbers beside each other, with one scale; NaN, and zeros if `log`, are grey.

    values: dict of name -> (H, W), or a picture (H, W, 3) outside that scale. mark: (x, y) of a cross.
    limits: (low, high) of the colours, else those of the data. label: of the colour bar."""
    values = {name: _array(field) for name, field in values.items()}
    values = {name: np.where((field > 0) | (not log), field, np.nan) for name, field in values.items()}
    every = np.concatenate([field.ravel() for field in values.values() if field.ndim == 2])
    low, high = limits or (np.nanmin(every), np.nanmax(every))
    norm = LogNorm(low, high, clip=True) if log else Normalize(low, high)
    colours = colormaps[cmap].with_extremes(bad=str(GREY))
    figure, axes = subplots(1, len(values), 2.5, 2.6, title, plain=True, squeeze=False)
    for ax, (name, field) in zip(axes[0], values.items(), strict=True):
        shown = ax.imshow(field, cmap=colours, norm=norm, interpolation="nearest")
        if mark is not None:
            ax.plot(*mark, "x", color=COLOURS[5], markersize=8, markeredgewidth=2)
        ax.set(xticks=[], yticks=[])
        ax.set_title(name, fontsize=9)
    figure.colorbar(shown, ax=list(axes[0]), shrink=0.9, label=label)
    return figure
