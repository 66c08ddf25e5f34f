"""Evaluation: whole fields from sparse pixels, at several sizes, beside classical interpolation.

Two things hold in every number of this module:

- **Observed pixels are kept.** At the resolution at which pixels were observed every method returns them
  unchanged (it knows them). A model is asked for the other pixels only, which is also how it was trained. At
  any other size no pixel of the output was observed and all of them are asked for.
- **A posterior mean and a posterior sample are never mixed.** A sample has about twice the squared error of
  the mean (3 dB less PSNR) by construction, so every row carries `kind`: "mean", "sample" or "classical".
"""

import copy
import itertools
import json
import math
import platform
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from scipy.fft import dctn
from scipy.interpolate import (
    CloughTocher2DInterpolator,
    LinearNDInterpolator,
    NearestNDInterpolator,
    RBFInterpolator,
)
from scipy.linalg import eigh, solve
from scipy.spatial import QhullError
from scipy.spatial.distance import cdist
from skimage import data
from skimage.restoration import inpaint_biharmonic
from skimage.transform import resize
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from nfhelpers import images as image_sources
from nfhelpers import metrics, samplers
from nfhelpers.images import data_folder, grid_coords, to_image
from nfhelpers.models import LocalMamba2D, MambaDiffusionAutoencoder
from nfhelpers.models.local_mamba import MIXERS, batch_keys, grid_flow_loss, guided_velocity, sample_grids
from nfhelpers.run import gpu_name, versions

CLASSICAL = ("linear", "cubic", "rbf", "biharmonic")
"""Keys of `classical_baselines`, in the order in which they are printed; `wiener` comes after them."""

WIENER_RIDGE = 1e-4
"""Added to the variances of the observed pixels in `wiener`, as a part of the mean variance of a pixel."""

WIENER_TRAIN_IMAGES = 2048
"""Training images from which `multiscale` estimates the covariance of `wiener`."""

ONE_STEP_MEAN = "posterior mean (1 step)"
"""Name of the one-step estimate of the posterior mean in the tables."""

TOKENS_PER_FORWARD = 32_768
"""Images are grouped so that one forward pass sees about this many tokens (queries and inputs together)."""


# ---------------------------------------------------------------- classical interpolation


def _as_points(input_coords, input_values):
    """The two point arrays as checked float64 NumPy arrays."""
    coords = np.asarray(input_coords, dtype=np.float64)
    values = np.asarray(input_values, dtype=np.float64)
    if coords.ndim != 2 or coords.shape[1] != 2:
        raise ValueError(f"input_coords has shape {coords.shape}; pass (Ni, 2), the (x, y) of each pixel")
    if values.shape != (len(coords), 3):
        raise ValueError(
            f"input_values has shape {values.shape}; pass ({len(coords)}, 3), one RGB value a point"
        )
    if len(coords) < 3:
        raise ValueError(f"{len(coords)} observed points do not span a plane; pass at least 3")
    if not (np.isfinite(coords).all() and coords.min() >= 0 and coords.max() <= 1):
        raise ValueError(
            "input_coords has entries outside [0, 1]; pass pixel centres such as images.grid_coords(32, 32)"
        )
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
        raise ValueError(
            "input_values has entries outside [0, 1]; images.to_image converts from the model's [-1, 1]"
        )
    return coords, values


def resize_field(field, height, width, order=3):
    """Resample a field (H, W, C) in [0, 1] to (height, width, C) by splines with aligned pixel centres.

    `order` is 1 (bilinear) or 3 (bicubic). The result is clipped to [0, 1]; a
    smaller size is low-pass filtered first. Raises ValueError for another shape, dtype, range, size or order.
    """
    field = np.asarray(field)
    if field.ndim != 3 or field.size == 0:
        raise ValueError(f"field has shape {field.shape}; pass (H, W, C), not empty")
    if not np.issubdtype(field.dtype, np.floating):
        raise ValueError(f"field has dtype {field.dtype}; pass floats in [0, 1] (uint8: divide by 255)")
    field = field.astype(np.float64)
    if not (np.isfinite(field).all() and field.min() >= 0 and field.max() <= 1):
        raise ValueError(
            f"field spans [{field.min():.4g}, {field.max():.4g}]; pass values in [0, 1], such as "
            "images.to_image makes of the model's [-1, 1]"
        )
    _check_counts(height=height, width=width)
    if order not in (1, 3):
        raise ValueError(f"order={order!r} is unknown; pass 1 (bilinear) or 3 (bicubic)")
    if field.shape[:2] == (height, width):
        return field.clip(0, 1)
    shrinks = height < field.shape[0] or width < field.shape[1]
    resized = resize(field, (height, width), order=order, mode="edge", anti_aliasing=shrinks)
    return resized.clip(0, 1)


def classical_baselines(input_coords, input_values, height, width, *, observed_size=None, methods=CLASSICAL):
    """Fields interpolated from scattered observed pixels, without learning.

    Args:
        input_coords: (Ni, 2) pixel centres (x, y) in [0, 1] of the observed pixels.
        input_values: (Ni, 3) their values in [0, 1].
        height, width: size of the fields to return.
        observed_size: (H, W) of the grid from which the pixels were observed; (height, width) if None.
            Only the biharmonic inpainting needs it: it fills that grid, then resamples it bicubically.
        methods: some of `CLASSICAL`.

    Returns:
        dict of (height, width, 3) float64 arrays clipped to [0, 1], one a method:
        "linear", on the Delaunay triangles, and "cubic", Clough-Tocher on the same triangles (both take the
        nearest observed pixel outside the convex hull); "rbf", thin-plate spline through all points;
        "biharmonic".

    Raises ValueError for wrong shapes, values outside [0, 1], fewer than three points, points on one line
    (all methods but biharmonic) or off the observed grid (biharmonic), and for a method that is none.

    Sources: scipy.interpolate and skimage.restoration.inpaint_biharmonic (Damelin and Hoang, 2018).
    """
    coords, values = _as_points(input_coords, input_values)
    if height < 1 or width < 1:
        raise ValueError(f"the size {height}x{width} is empty; pass positive sizes such as 32, 32")
    unknown = [name for name in methods if name not in CLASSICAL]
    if unknown:
        raise ValueError(f"methods {unknown} are unknown; pass some of {CLASSICAL}")
    query = grid_coords(height, width).numpy().astype(np.float64)  # (H*W, 2)
    found = {}
    for name in methods:
        if name == "biharmonic":
            filled = _biharmonic(coords, values, *(observed_size or (height, width)))
            found[name] = resize_field(filled, height, width, order=3)
            continue
        try:
            if name == "rbf":
                field = RBFInterpolator(coords, values, kernel="thin_plate_spline")(query)  # (H*W, 3)
            else:
                kind = LinearNDInterpolator if name == "linear" else CloughTocher2DInterpolator
                field = kind(coords, values)(query)  # (H*W, 3)
        except (QhullError, np.linalg.LinAlgError) as error:
            raise ValueError(
                f"the {len(coords)} observed points cannot be triangulated (all on one line?); pass points "
                "that span the plane"
            ) from error
        outside = np.isnan(field).any(axis=1)
        if outside.any():
            field[outside] = NearestNDInterpolator(coords, values)(query[outside])
        found[name] = field.reshape(height, width, 3).clip(0, 1)
    return found


def _biharmonic(coords, values, height, width):
    """Biharmonic inpainting of the (height, width) grid on which the points lie."""
    position = coords * [width, height] - 0.5  # (Ni, 2), whole numbers on the grid
    column, row = position.round().astype(int).T
    if np.abs(position - position.round()).max() > 1e-3 or column.max() >= width or row.max() >= height:
        raise ValueError(
            f"the observed points are not pixel centres of a {height}x{width} grid; pass the grid they were "
            "observed on as observed_size=(H, W)"
        )
    field = np.zeros((height, width, 3))
    missing = np.ones((height, width), dtype=bool)
    field[row, column] = values
    missing[row, column] = False
    if not missing.any():
        return field
    return inpaint_biharmonic(field, missing, channel_axis=-1).clip(0, 1)


def wiener(fields, train_images, size=None):
    """The best linear estimate (linear MMSE, Wiener filter) of the unobserved pixels from the observed ones.

        v_u = m_u + C_uo (C_oo + ridge)^-1 (v_o - m_o)

    with one mean colour m and a covariance C of pixels that depends on their offset alone, all three channels
    jointly, of training images that are mirrored at their borders: what can be had from stationary second
    moments. A network that does not beat it has learned no more than those.

    Args:
        fields: the dict of `observe_images`.
        train_images: (M, H, W, 3) uint8 or floats in [0, 1], of the observed size.
        size: side of the square fields to return, resampled bicubically from the observed grid; that grid if
            None.

    Returns:
        (N, H, W, 3) float64 in [0, 1], or (N, size, size, 3); at the observed size observed pixels are kept.

    Raises ValueError for a dict without the entries of `observe_images`, training images of another size, and
    a size below 1. Time is O(Ni^3) an image, memory O(Ni^2): seconds for 64 images of 32 px.

    Sources: Wiener, "Extrapolation, Interpolation, and Smoothing of Stationary Time Series", 1949; simple
    kriging in geostatistics.
    """
    fields = _observed(fields, None, None)
    if size is not None:
        _check_counts(size=size)
    train_images = _as_images(train_images)
    count, height, width = fields["mask"].shape
    if train_images.shape[1:3] != (height, width):
        raise ValueError(
            f"train_images are {train_images.shape[1]}x{train_images.shape[2]}, the observed grid is "
            f"{height}x{width}; pass images.load_images(source, 'train', {height})"
        )
    mean, covariance = _covariance_of_offsets(train_images)
    lags = [np.abs(np.fft.fftfreq(2 * side, 1 / (2 * side))).astype(int) for side in (height, width)]
    # Zero-padded to twice the size, the circular convolution is the sum over the observed pixels.
    kernel = np.fft.rfft2(covariance[np.ix_(*lags)], axes=(0, 1))  # (2H, W+1, 3, 3)
    ridge = WIENER_RIDGE * np.trace(covariance[0, 0]) / 3 + 1e-12  # the last for images of one colour
    made = np.empty((count, height, width, 3))
    images, masks = fields["images"].numpy(), fields["mask"].numpy()
    for field, image, mask in zip(made, images, masks, strict=True):
        row, column = mask.nonzero()  # (Ni,) each
        among = covariance[np.abs(row[:, None] - row), np.abs(column[:, None] - column)]  # (Ni, Ni, 3, 3)
        among = among.transpose(0, 2, 1, 3).reshape(3 * len(row), -1)  # (3 Ni, 3 Ni)
        among[np.diag_indices_from(among)] += ridge
        weights = np.zeros((2 * height, 2 * width, 3))
        known = (image[mask] - mean).ravel()
        weights[row, column] = solve(among, known, assume_a="pos").reshape(-1, 3)
        spread = np.einsum("yxij,yxj->yxi", kernel, np.fft.rfft2(weights, axes=(0, 1)))
        spread = np.fft.irfft2(spread, s=(2 * height, 2 * width), axes=(0, 1))[:height, :width]
        field[:] = np.where(mask[..., None], image, (mean + spread).clip(0, 1))
    if size is None or (size, size) == (height, width):
        return made
    return np.stack([resize_field(field, size, size, order=3) for field in made])


def _covariance_of_offsets(images):
    """Mean colour (3,) of images (M, H, W, 3) and the covariance (H+1, W+1, 3, 3) of two pixels by their
    distances in rows and in columns."""
    # A stationary covariance, of the images mirrored at their borders: it is a mean over all positions, so
    # that a few images suffice, and a power spectrum, that of the DCT, so that it is positive definite as it
    # stands. The alternatives, on 64 training images that were held out (CIFAR-10, photos; dB at 20%):
    #   this one                                                                22.96  23.19
    #   stationary, mean over the pairs of pixels of each offset (indefinite)   22.71  23.13
    #   plain covariance of all pixels, the best of four ridges                 22.70  22.56
    #   half of each of the last two                                            22.76  22.97
    # Weighing images by their contrast is worth less than 0.01 dB.
    height, width = images.shape[1:3]
    mean = images.mean(axis=(0, 1, 2), dtype=np.float64)
    spectra = dctn(images - mean, axes=(1, 2), norm="ortho")  # (M, H, W, 3)
    power = np.einsum("mhwi,mhwj->hwij", spectra, spectra) / len(images)  # (H, W, 3, 3)
    cosines = [np.cos(np.pi * np.outer(np.arange(n + 1), np.arange(n)) / n) / n for n in (height, width)]
    return mean, np.einsum("yh,xw,hwij->yxij", *cosines, power, optimize=True)


# ---------------------------------------------------------------- reconstruction with a model


def observe_images(images, observed=0.2, seed=0):
    """Observe a fraction of each image's pixels, image i with seed (seed, i) as in `images.SparseFields`.

    Args:
        images: (N, H, W, 3) uint8, or floats in [0, 1].
        observed: fraction of the pixels, in (0, 1].
        seed: int.

    Returns:
        dict with input_coords (N, Ni, 2), input_values (N, Ni, 3) in [-1, 1], mask (N, H, W) bool, True where
        observed, and images (N, H, W, 3) float32 in [0, 1]: the same for every method that is compared.
    """
    images = _as_images(images)
    drawn = [image_sources.observe(image, observed, (seed, index)) for index, image in enumerate(images)]
    coords, values, masks = zip(*drawn, strict=True)
    return {
        "input_coords": torch.stack(coords),
        "input_values": torch.stack(values),
        "mask": torch.stack(masks),
        "images": torch.from_numpy(images),
    }


def _as_images(images):
    """Images as a checked float32 array (N, H, W, 3) in [0, 1]."""
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] != 3 or images.size == 0:
        raise ValueError(f"images has shape {images.shape}; pass (N, H, W, 3) with N >= 1")
    if images.dtype == np.uint8:
        return images.astype(np.float32) / 255
    if not np.issubdtype(images.dtype, np.floating):
        raise ValueError(f"images has dtype {images.dtype}; pass uint8 or floats in [0, 1]")
    if not np.isfinite(images).all() or images.min() < 0 or images.max() > 1:
        raise ValueError("images has values outside [0, 1]; pass uint8 or floats in [0, 1]")
    return images.astype(np.float32)


def _check_counts(**counts):
    """Raise ValueError unless every named value is a whole number of at least 1."""
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise ValueError(f"{name}={value!r} is not a whole number of at least 1; pass a count such as 32")


def _check_device(device):
    """`device` as a torch.device; ValueError if torch does not know it or finds none of its kind here."""
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:  # AssertionError: torch without CUDA
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={device!r} cannot be used: {reason}; pass 'cpu'") from error
    return device


def _observed(images, observed, seed):
    """`images`, observed unless they already are: the checked dict of `observe_images`."""
    if not isinstance(images, dict):
        return observe_images(images, observed, seed)
    missing = {"input_coords", "input_values", "mask", "images"} - set(images)
    if missing:
        raise ValueError(
            f"images is a dict without {sorted(missing)}; pass an array (N, H, W, 3) or the dict that "
            "observe_images returns"
        )
    return images


def reconstruct(
    model,
    images,
    observed=0.2,
    size=None,
    *,
    kind="mean",
    draws=1,
    method="heun",
    steps=None,
    temperature=1.0,
    seed=0,
    device=None,
    callback=None,
    share=(0, 1),
):
    """Observe a fraction of each image's pixels and reconstruct the whole field with a sparse-field model.

    Args:
        model: a sparse-field velocity model (`nfhelpers.models`).
        images: (N, H, W, 3) uint8 or floats in [0, 1], or the dict that `observe_images` returns.
        observed: fraction of pixels to observe, in (0, 1]; not used when `images` is already observed.
        size: side of the square field to return; the images' own size if None. At the images' own size the
            observed pixels are kept and only the others are asked for.
        kind: "mean", the posterior mean and its standard deviation, or "sample", one posterior draw.
        draws: for "mean", how many draws are averaged (the standard deviation of one draw is undefined: NaN).
        method: sampler of "sample", a key of `samplers.SAMPLERS`.
        steps: sampler steps; 1 for "mean" (the one-step estimate) and 50 for "sample" if None. A mean of
            draws with many steps each is the mean of that many samples, and only then is `std` the spread of
            the posterior.
        temperature: of "sample", see `samplers.sample`.
        seed: of the noise, drawn on the CPU so that it is the same on every device, and, when `images` is not
            yet observed, of the observed pixels.
        device: where to compute; the model's device if None.
        callback: of the sampler, callback(step, t, x) with x (N, asked pixels, 3) in [-1, 1].
        share: (i, n) reconstructs the images i, i + n, i + 2n, ... alone, with the noise that they have among
            all, so that n processes make together what one makes, up to float error.

    Returns, of these images:
        dict: fields (N, h, w, 3) float32 in [0, 1]; std (N, h, w, 3) in the same units, 0 where observed,
        None for a sample; mask (N, H, W); images (N, H, W, 3) in [0, 1].

    Raises ValueError for wrong shapes and values, an unknown kind, method or device, steps or draws below 1,
    a temperature below 0, and a share that is none.
    """
    samplers.check_method(method)
    if kind not in ("mean", "sample"):
        raise ValueError(f"kind={kind!r} is unknown; pass 'mean' or 'sample'")
    if kind == "sample" and draws != 1:
        raise ValueError(f"kind='sample' with draws={draws}; a sample is one draw, pass draws=1")
    if steps is None:
        steps = 1 if kind == "mean" else 50
    if size is not None:
        _check_counts(size=size)
    device = model_device(model) if device is None else _check_device(device)
    fields = _observed(images, observed, seed)
    count, height, width = fields["mask"].shape
    if not 0 <= share[0] < share[1] <= count:
        raise ValueError(f"share={share} of {count} images; pass (i, n) with 0 <= i < n <= {count}")
    shape = (height, width) if size is None else (size, size)
    keep = shape == (height, width)

    grid = grid_coords(*shape)  # (h*w, 2)
    if keep:
        # Each image is asked for its own unobserved pixels; their number is the same,
        # as the observed number is.
        ask = ~fields["mask"].reshape(count, -1)  # (N, h*w)
    else:
        ask = torch.ones(count, shape[0] * shape[1], dtype=torch.bool)
    asked = int(ask[0].sum())
    query = grid.expand(count, -1, -1)[ask].reshape(count, asked, 2)

    generator = torch.Generator().manual_seed(seed)
    if asked:
        batch = [part.to(device) for part in (query, fields["input_coords"], fields["input_values"])]
        options = {
            "steps": steps,
            "generator": generator,
            "max_batch": max(1, TOKENS_PER_FORWARD // (asked + fields["input_coords"].shape[1])),
        }
        if share != (0, 1):
            model = _Share(model, *share)
            options["max_batch"] *= share[1]
        if kind == "mean":
            values, spread = samplers.posterior_mean(model, *batch, draws=draws, **options)
        else:
            values = samplers.sample(
                model, *batch, method=method, temperature=temperature, callback=callback, **options
            )

    own = slice(share[0], None, share[1])
    ask, known, mask = ask[own], fields["images"][own], fields["mask"][own]
    count = len(ask)
    out = torch.zeros(count, shape[0] * shape[1], 3)
    deviation = torch.zeros_like(out) if kind == "mean" else None
    if keep:
        out[~ask] = known.reshape(count, -1, 3)[~ask]
    if asked:
        out[ask] = to_image(values[own]).float().cpu().reshape(-1, 3)
        if kind == "mean":
            deviation[ask] = spread[own].float().cpu().reshape(-1, 3) / 2  # [-1, 1] is twice as wide
    result = (count, *shape, 3)
    return {
        "fields": out.reshape(result).numpy(),
        "std": None if deviation is None else deviation.reshape(result).numpy(),
        "mask": mask.numpy(),
        "images": known.numpy(),
    }


class _Share(nn.Module):
    """A velocity model that computes the images i, i + n, i + 2n, ... of a batch alone; the others stay where
    they are. Batches start at multiples of n images."""

    def __init__(self, model, i, n):
        super().__init__()
        self.model, self.own = model, slice(i, None, n)
        if hasattr(model, "prepare"):
            self.prepare = lambda *points: model.prepare(*self.part(points))

    def part(self, arguments):
        return [argument[self.own] for argument in arguments]

    def forward(self, *arguments, **prepared):
        velocity, own = torch.zeros_like(arguments[0]), self.part(arguments)
        if len(own[0]):
            velocity[self.own] = self.model(*own, **prepared)
        return velocity


def _share(sharded, images):
    """(index of this process, number of processes) among which so many images are divided; (0, 1) if not."""
    if not (sharded and torch.distributed.is_initialized()):
        return 0, 1
    count = torch.distributed.get_world_size()
    if images < count:
        raise ValueError(f"images={images} are fewer than the {count} processes; pass images={count} or more")
    return torch.distributed.get_rank(), count


def _gather(own, count):
    """The array (N, ...) of all images from those of the shares of `count` processes, in order."""
    if count == 1:
        return own
    parts = [None] * count
    torch.distributed.all_gather_object(parts, own)
    whole = np.empty((sum(map(len, parts)), *own.shape[1:]), own.dtype)
    for index, part in enumerate(parts):
        whole[index::count] = part
    return whole


def model_device(model):
    """The device of a model's first parameter; the CPU for a model without parameters."""
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


# ---------------------------------------------------------------- tables of results


def _score(prediction, target):
    """PSNR, SSIM and speckle of each image, (N,) arrays in a dict; every value NaN without a target."""
    if target is None:
        return {name: np.full(len(prediction), np.nan) for name in ("psnr", "ssim", "speckle")}
    return {
        "psnr": metrics.psnr(prediction, target),
        "ssim": metrics.ssim(prediction, target),
        "speckle": metrics.speckle(prediction, target),
    }


def _mean_and_error(values):
    """Mean and its standard error; None where undefined: no ground truth, a perfect score, one value."""
    return tuple(x if math.isfinite(x) else None for x in metrics.mean_and_error(values))


def _row(method, kind, scores, **extra):
    row = {"method": method, "kind": kind, **extra, "images": len(scores["psnr"])}
    for name in ("psnr", "ssim", "speckle"):
        row[name], row[f"{name}_se"] = _mean_and_error(scores[name])
    return row


def multiscale(
    model,
    source="photos",
    *,
    scales=(32, 64, 96, 128),
    sample_scales=None,
    steps=50,
    method="heun",
    temperature=1.0,
    draws=1,
    images=16,
    observed=0.2,
    observed_size=32,
    seed=0,
    device=None,
    progress=False,
    callback=None,
    sharded=False,
):
    """Reconstruct test images at several sizes from the same observed pixels, by the model and without it.

    Every method sees the same pixels, a fraction `observed` of each image at `observed_size`, and is compared
    with the real image at each scale (`images.load_images(source, "test", scale)`), so differences between
    methods are paired. Where the source has no finer ground truth, fields are made all the same and the row
    says "no ground truth". Beside the model stand `classical_baselines` and, where the source has training
    images, the best linear estimate (`wiener`).

    Args:
        model: a sparse-field velocity model.
        source: of `images.load_images`.
        scales: sides of the square fields.
        sample_scales: scales at which posterior samples (many steps each) are drawn too; all if None.
        steps, method: of the posterior samples; several names of methods give a row each.
        temperature: of the method "sde" alone; the others draw at 1, so that all are posterior samples.
        draws: one-step estimates averaged for the posterior mean.
        images: how many test images.
        observed, observed_size: fraction of observed pixels and the side of the grid they are observed on.
        seed: of observed pixels and noise.
        device: the model's if None.
        progress: show a bar.
        callback: callback(scale, method, fields (N, h, w, 3), target (N, h, w, 3) or None), to keep pictures.
        sharded: divide the images among the processes of `torch.distributed`, if there are several. All of
            them make the same call and get the same result, that of one process up to float error.

    Returns:
        list of dicts, one a scale and method: scale, method, kind ("mean", "sample", "classical"), images,
        psnr, ssim and speckle with their standard errors `*_se`, versus_biharmonic (mean paired difference of
        PSNR in dB) and versus_biharmonic_se, seconds (all images; of the slowest process), note.

    Raises ValueError, before anything is computed, for no scales, a scale below the window of SSIM,
    sample_scales that are not among the scales, an unknown method or device, counts below 1, a temperature
    below 0 or that no method uses, and fewer images than processes.
    """
    _check_scales(scales, sample_scales)
    methods = (method,) if isinstance(method, str) else tuple(method)
    for name in methods:
        samplers.check_method(name)
    samplers.check_temperature(temperature)
    if temperature != 1 and "sde" not in methods:
        raise ValueError(f"temperature={temperature} is that of 'sde', which is not in {methods}; add 'sde'")
    _check_counts(steps=steps, draws=draws, images=images, observed_size=observed_size)
    if device is not None:
        _check_device(device)
    truth = _ground_truth(source, scales, observed_size, images)
    fields = observe_images(truth[observed_size], observed, seed)
    index, processes = share = _share(sharded, len(fields["images"]))
    own = {name: part[index::processes] for name, part in fields.items()}
    sample_scales = scales if sample_scales is None else sample_scales
    low = _model_mean(model, fields, observed_size, draws, seed, device, share)  # upsampled for larger scales
    start = time.perf_counter()
    train_images = _train_images(source, observed_size)
    linear = None if train_images is None else wiener(own, train_images)  # upsampled, too
    linear_seconds = time.perf_counter() - start
    rows = []
    for scale in tqdm(scales, desc="scales", disable=not progress):
        target = truth[scale]
        predictions = []  # (method, kind, fields, seconds) of this process

        def add(name, kind, make, predictions=predictions):
            start = time.perf_counter()
            predictions.append((name, kind, make(), time.perf_counter() - start))

        add(
            ONE_STEP_MEAN,
            "mean",
            lambda s=scale: _model_mean(model, fields, s, draws, seed, device, share),
        )
        for name in methods if scale in sample_scales else ():
            options = {"method": name, "steps": steps, "seed": seed, "device": device, "share": share}
            heat = ""
            if name == "sde":
                options["temperature"] = temperature
                heat = f", temperature {temperature:g}"
            add(
                f"sample ({name}, {steps} steps{heat})",
                "sample",
                lambda s=scale, o=options: reconstruct(model, fields, size=s, kind="sample", **o)["fields"],
            )
        start = time.perf_counter()
        classical = _classical_fields(own, scale)
        seconds = time.perf_counter() - start
        predictions += [(name, "classical", classical[name], seconds / len(CLASSICAL)) for name in CLASSICAL]
        if linear is not None:
            start = time.perf_counter()
            estimate = np.stack([resize_field(field, scale, scale) for field in linear])
            seconds = linear_seconds + time.perf_counter() - start
            predictions.append(("wiener", "classical", estimate, seconds))
        if scale != observed_size:
            for name, order in (("bilinear", 1), ("bicubic", 3)):
                add(
                    f"{name} of {observed_size} px mean",
                    "mean",
                    lambda s=scale, o=order: np.stack([resize_field(f, s, s, o) for f in low]),
                )

        own_target = None if target is None else target[index::processes]
        reference = _score(classical["biharmonic"], own_target)["psnr"]
        for name, kind, prediction, seconds in predictions:
            scores = _score(prediction, own_target)
            scores["versus_biharmonic"] = scores["psnr"] - reference
            scores = {key: _gather(values, processes) for key, values in scores.items()}
            row = {"scale": scale, **_row(name, kind, scores)}
            row["versus_biharmonic"], row["versus_biharmonic_se"] = _mean_and_error(
                scores["versus_biharmonic"]
            )
            row["seconds"] = _gather(np.array([seconds]), processes).max().item()
            row["note"] = "" if target is not None else "no ground truth"
            rows.append(row)
            if callback is not None:
                callback(scale, name, _gather(prediction, processes), target)
    return rows


def _check_scales(scales, sample_scales):
    if len(scales) == 0:
        raise ValueError("scales is empty; pass sides such as (32, 64)")
    for scale in scales:
        _check_counts(scale=scale)
        if scale < metrics.SSIM_WINDOW:
            raise ValueError(
                f"scale={scale} is smaller than the {metrics.SSIM_WINDOW} px window of SSIM; "
                "pass scales such as (32, 64)"
            )
    others = [] if sample_scales is None else [scale for scale in sample_scales if scale not in scales]
    if others:
        raise ValueError(
            f"sample_scales has {others}, which are not in scales={scales}; pass a part of scales"
        )


def _ground_truth(source, scales, observed_size, count):
    """Dict of scale -> test images (N, scale, scale, 3) in [0, 1], None above what the source holds."""
    truth = {observed_size: _as_images(image_sources.load_images(source, "test", observed_size, limit=count))}
    for scale in scales:
        try:
            truth[scale] = _as_images(image_sources.load_images(source, "test", scale, limit=count))
        except ValueError:
            # The same call has just succeeded at the observed size: what it refuses is the larger size.
            if scale <= observed_size:
                raise
            truth[scale] = None
    return truth


def _train_images(source, size):
    """The first training images of a source, None where it has none."""
    try:
        return image_sources.load_images(source, "train", size, limit=WIENER_TRAIN_IMAGES)
    except ValueError:  # its test images have just been loaded
        return None


def _model_mean(model, fields, scale, draws, seed, device, share=(0, 1)):
    options = {"draws": draws, "seed": seed, "device": device, "share": share}
    return reconstruct(model, fields, size=scale, **options)["fields"]


def _classical_fields(fields, scale):
    """Classical baselines of every observed image, dict of (N, scale, scale, 3); observed pixels kept."""
    height, width = fields["mask"].shape[1:]
    values = to_image(fields["input_values"])
    every = [
        classical_baselines(coords, value, scale, scale, observed_size=(height, width))
        for coords, value in zip(fields["input_coords"], values, strict=True)
    ]
    stacked = {name: np.stack([one[name] for one in every]) for name in CLASSICAL}
    if (scale, scale) == (height, width):
        mask, known = fields["mask"].numpy(), fields["images"].numpy()
        for field in stacked.values():
            field[mask] = known[mask]
    return stacked


def side_by_side(models, source="photos", **options):
    """`multiscale` of several models on the same pixels, with the same noise, as one table.

    Args:
        models: dict of name -> sparse-field velocity model; all are compared with the first.
        source, options: as in `multiscale`, but for its callback.

    Returns:
        (rows, pictures). rows: those of `multiscale` for every model's posterior mean and samples, with
        `model`, its name, versus_first and versus_first_se, the mean paired difference of its PSNR to that of
        the first model at the same scale by the same method, and versus_first_p, the p-value of its paired
        t-test, None where undefined, and parameters, their number; at each scale the rows of the classical
        methods, of model "-", are last.
        pictures: dict of (scale, name of a model) -> posterior means (N, h, w, 3) in [0, 1]; there are also
        the names "biharmonic" and "target" (None without ground truth).

    Raises ValueError for no models, a model named "biharmonic", "target" or "-", and as `multiscale`.
    """
    taken = {"biharmonic", "target", "-"} & set(models)
    if not models or taken:
        raise ValueError(f"models has the names {list(models)}; pass at least one, such as {{'v1': model}}")
    first, rows, made, pictures = next(iter(models)), [], {}, {}
    nothing = ("parameters", "versus_first", "versus_first_se", "versus_first_p")
    for name, model in models.items():

        def keep(scale, method, prediction, target, name=name):
            made[scale, name, method] = prediction
            if method in (ONE_STEP_MEAN, "biharmonic"):
                pictures[scale, method if method == "biharmonic" else name] = prediction
            pictures[scale, "target"] = target

        for row in multiscale(model, source, callback=keep, **options):
            if row["method"] == ONE_STEP_MEAN or row["kind"] == "sample":
                parameters = sum(p.numel() for p in model.parameters())
                rows.append({"model": name, **row, "parameters": parameters})
            elif row["kind"] == "classical" and name == first:
                rows.append({"model": "-", **row, **dict.fromkeys(nothing)})
    for row in rows:
        if row["model"] != "-":
            target = pictures[row["scale"], "target"]
            own, other = (
                _score(made[row["scale"], name, row["method"]], target)["psnr"]
                for name in (row["model"], first)
            )
            row["versus_first"], row["versus_first_se"] = _mean_and_error(own - other)
            p = metrics.paired_test(own - other)[0]
            row["versus_first_p"] = p if math.isfinite(p) else None
    return sorted(rows, key=lambda row: (row["scale"], row["model"] == "-")), pictures


def steps_curve(
    model,
    images,
    *,
    steps=(1, 2, 5, 10, 20, 50),
    method="euler",
    temperature=1.0,
    draws=8,
    observed=0.2,
    seed=0,
    device=None,
    progress=False,
):
    """Quality of posterior samples against the number of solver steps, beside the posterior mean: the trade
    between distortion and perception (Blau and Michaeli, 2018).

    One Euler step from noise *is* the one-step estimate of the mean, so with `method="euler"` the curve
    starts there and falls by about 3 dB as the samples become real samples, whose squared error is twice that
    of the mean.

    Args:
        model: a sparse-field velocity model.
        images: (N, H, W, 3) uint8 or floats in [0, 1], or the dict of `observe_images`.
        steps: numbers of solver steps to try.
        method: sampler, a key of `samplers.SAMPLERS`; temperature: its own, see `samplers.sample`.
        draws: K of the mean of K samples, each drawn with the largest number of steps; 0 leaves that row out.
        observed, seed, device: as in `reconstruct`.
        progress: show a bar.

    Returns:
        list of dicts: method, kind, steps, draws, images, psnr, ssim and speckle with `*_se`. The rows of
        kind "mean" are "posterior mean (1 step)" and "mean of K samples".
    """
    fields = _observed(images, observed, seed)
    target = fields["images"].numpy()
    options = {"seed": seed, "device": device}
    rows = []
    for count in tqdm(steps, desc="steps", disable=not progress):
        drawn = {"kind": "sample", "method": method, "steps": count, "temperature": temperature}
        sampled = reconstruct(model, fields, **drawn, **options)["fields"]
        rows.append(_row(f"sample ({method})", "sample", _score(sampled, target), steps=count, draws=1))
    mean = reconstruct(model, fields, **options)["fields"]
    rows.append(_row(ONE_STEP_MEAN, "mean", _score(mean, target), steps=1, draws=1))
    if draws:
        mean = reconstruct(model, fields, draws=draws, steps=max(steps), **options)["fields"]
        rows.append(
            _row(f"mean of {draws} samples", "mean", _score(mean, target), steps=max(steps), draws=draws)
        )
    return rows


def compare_samplers(
    model,
    images,
    *,
    methods=tuple(samplers.SAMPLERS),
    temperatures=(0.5, 1.0),
    evaluations=(4, 8, 16),
    draws=4,
    observed=0.2,
    seed=0,
    device=None,
    progress=False,
):
    """Posterior samples of several samplers at equal numbers of network evaluations, and posterior means.

    All start from the same noise. Sharpness is that of `metrics.sharpness`: 1 is as sharp as the target.

    Args:
        model: a sparse-field velocity model.
        images: (N, H, W, 3) uint8 or floats in [0, 1], or the dict of `observe_images`.
        methods: keys of `samplers.SAMPLERS`; "sde" gives a row for each of `temperatures`.
        evaluations: numbers of network evaluations a sample may cost; each a multiple of what a step of every
            method takes (`samplers.EVALUATIONS`), such as multiples of 4, and at least 2.
        draws: K of the mean of K samples (Heun, with the largest number of evaluations each); 0 leaves it
            out.
        observed, seed, device: as in `reconstruct`.
        progress: show a bar.

    Returns:
        list of dicts: method, kind, budget (evaluations that one draw may cost), evaluations (that the whole
        row did cost: the last step of "heun" and "sde" saves one), steps, draws, images, and psnr, ssim,
        speckle and sharpness with their standard errors `*_se`. Rows of kind "sample" come first, then those
        of kind "mean": "posterior mean (1 step)" and "mean of K samples".

    Raises ValueError for unknown methods, a temperature below 0, and numbers of evaluations that are not such
    multiples.
    """
    if not methods:
        raise ValueError("methods is empty; pass some such as ('euler', 'heun')")
    for method in methods:
        samplers.check_method(method)
    for temperature in temperatures:
        samplers.check_temperature(temperature)
    _check_counts(**{f"evaluations[{i}]": count for i, count in enumerate(evaluations)})
    need = math.lcm(2, *(samplers.EVALUATIONS[method] for method in methods))
    if not evaluations or any(count % need for count in evaluations):
        raise ValueError(
            f"evaluations={evaluations!r} are not all multiples of {need}, which a step of each of {methods} "
            f"fits into; pass some such as {(need, 2 * need)}"
        )
    fields = _observed(images, observed, seed)
    target = fields["images"].numpy()
    runs = []
    for method in methods:
        for heat in temperatures if method == "sde" else (1.0,):
            name = f"sde, temperature {heat:g}" if method == "sde" else method
            drawn = {"kind": "sample", "method": method, "temperature": heat}
            saved = method in ("heun", "sde")
            for budget in evaluations:
                steps = budget // samplers.EVALUATIONS[method]
                cost = {"budget": budget, "evaluations": budget - saved, "steps": steps, "draws": 1}
                runs.append((name, cost, drawn))
    runs.append((ONE_STEP_MEAN, {"budget": 1, "evaluations": 1, "steps": 1, "draws": 1}, {"kind": "mean"}))
    if draws:
        most = max(evaluations)
        cost = {"budget": most, "evaluations": draws * (most - 1), "steps": most // 2, "draws": draws}
        runs.append((f"mean of {draws} samples", cost, {"kind": "mean", "draws": draws}))
    rows = []
    for name, cost, options in tqdm(runs, desc="samplers", disable=not progress):
        options = {"steps": cost["steps"], "seed": seed, "device": device, **options}
        made = reconstruct(model, fields, **options)["fields"]
        row = _row(name, options["kind"], _score(made, target), **cost)
        row["sharpness"], row["sharpness_se"] = _mean_and_error(metrics.sharpness(made, target))
        rows.append(row)
    return rows


def compare_means(models, images, *, observed=0.2, seed=0, device=None):
    """One-step posterior means of several models on the same pixels of the same images, beside the first.

    Args:
        models: dict of name -> sparse-field velocity model.
        images: (N, H, W, 3) uint8 or floats in [0, 1], or the dict of `observe_images`.
        observed, seed, device: as in `reconstruct`.

    Returns:
        list of dicts: model, parameters (their number), method, kind ("mean"), images, psnr, ssim and speckle
        with their standard errors `*_se`, and versus_first with versus_first_se, the mean paired difference
        of PSNR (dB) to the first model.

    Raises ValueError for no models.
    """
    if not models:
        raise ValueError("models is empty; pass some such as {'v1': model}")
    fields = _observed(images, observed, seed)
    target, rows, first = fields["images"].numpy(), [], None
    for name, model in models.items():
        scores = _score(reconstruct(model, fields, seed=seed, device=device)["fields"], target)
        first = scores["psnr"] if first is None else first
        row = {"model": name, "parameters": sum(p.numel() for p in model.parameters())}
        row |= _row(ONE_STEP_MEAN, "mean", scores)
        row["versus_first"], row["versus_first_se"] = _mean_and_error(scores["psnr"] - first)
        rows.append(row)
    return rows


def format_means(rows):
    """Rows of `compare_means` as an aligned text table; ValueError for none."""
    if not rows:
        raise ValueError("rows is empty; pass the result of compare_means")
    head = [ONE_STEP_MEAN, "parameters", "PSNR (dB)", "SSIM", f"PSNR - {rows[0]['model']}"]
    lines = [
        [
            row["model"],
            f"{row['parameters']:,}",
            _plus_minus(row["psnr"], row["psnr_se"], 2, False),
            f"{row['ssim']:.3f}",
            _plus_minus(row["versus_first"], row["versus_first_se"], 2, True),
        ]
        for row in rows
    ]
    return align(head, lines, left=1)


def format_samplers(rows):
    """Rows of `compare_samplers` as an aligned text table, of samples or of means: not of both in one.

    Raises ValueError for no rows and for rows of two kinds.
    """
    if len({row["kind"] for row in rows}) != 1:
        raise ValueError(
            "rows are none or of two kinds; pass those of kind 'sample', or those of kind 'mean'"
        )
    scores = ("psnr", "ssim", "speckle", "sharpness")
    lines = [
        [row["method"], str(row["evaluations"]), *(_plus_minus(row[key], None, 3, False) for key in scores)]
        for row in rows
    ]
    return align(["method", "evaluations", "PSNR (dB)", "SSIM", *scores[2:]], lines, left=1)


COMPARED = {
    "psnr": ("PSNR (dB)", 1, 2),
    "ssim": ("SSIM", 1, 4),
    "speckle": ("speckle", -1, 4),
    "seconds": ("seconds", -1, 3),
}
"""What `compare` compares: its name in tables, 1 if more is better and -1 if less is, digits to print."""


def compare(
    model_a,
    model_b,
    source="photos",
    *,
    images=50,
    observed=0.2,
    observed_size=32,
    steps=50,
    seed=0,
    device=None,
    progress=False,
    callback=None,
    sharded=False,
):
    """Compare two models on the same pixels of the same test images with the same noise, image by image.

    Posterior means (one step) and posterior samples (Heun) are compared apart. Images are reconstructed one
    at a time, so `seconds` is the time of one image; each model has run once before its clock starts.

    Args:
        model_a, model_b: sparse-field velocity models.
        source: of `images.load_images`.
        images: how many test images, at least 2.
        observed, observed_size: fraction of observed pixels and the side of the images.
        steps: Heun steps of a sample, or a pair of them, A's and B's.
        seed: of observed pixels and noise.
        device: the model's if None.
        progress: show a bar.
        callback: callback(kind, fields_a, fields_b, target, mask) for each kind at the end, to keep pictures:
            fields and target (N, H, W, 3) in [0, 1], mask (N, H, W).
        sharded: as in `multiscale`.

    Returns:
        list of dicts, one a kind ("mean", "sample") and metric ("psnr", "ssim", "speckle", "seconds"):
        method, kind, metric; a and b, the means over the images, and their standard errors a_se and b_se;
        improvement, the mean of the paired differences, positive if B is better (B - A, or A - B for speckle
        and seconds), improvement_se, and percent, of A's mean; p_t and p_wilcoxon of `metrics.paired_test`;
        differences, a list of the improvements of single images; images, their number. What is undefined
        (speckle of an image without flat regions, PSNR of a perfect field) is left out pairwise, and None
        where nothing is left.

    Raises ValueError, before anything is computed, for fewer than two images or fewer than processes, sizes
    or steps below 1 and an unknown device.
    Source: seed 003 (eval_v1_vs_v2).
    """
    both = tuple(steps) if isinstance(steps, tuple | list) else (steps, steps)
    if len(both) != 2:
        raise ValueError(f"steps={steps!r} are {len(both)} numbers; pass one for both models, or two")
    _check_counts(steps=both[0], images=images, observed_size=observed_size)
    _check_counts(steps=both[1])
    if images < 2:
        raise ValueError(f"images={images} cannot be compared in pairs; pass at least 2, such as 50")
    if observed_size < metrics.SSIM_WINDOW:
        raise ValueError(
            f"observed_size={observed_size} is below SSIM's window; pass at least 11, such as 32"
        )
    if device is not None:
        _check_device(device)
    fields = observe_images(
        image_sources.load_images(source, "test", observed_size, limit=images), observed, seed
    )
    target = fields["images"].numpy()
    share, processes = _share(sharded, len(target))
    own = range(share, len(target), processes)
    options = [
        {"mean": {"kind": "mean"}, "sample": {"kind": "sample", "method": "heun", "steps": count}}
        for count in both
    ]
    for model in (model_a, model_b):
        reconstruct(model, {name: part[:1] for name, part in fields.items()}, device=device)
    made = {kind: ([], []) for kind in ("mean", "sample")}
    seconds = {kind: ([], []) for kind in made}
    for index in tqdm(own, desc="images", disable=not progress):
        one = {name: part[index : index + 1] for name, part in fields.items()}
        for kind in made:
            for which, model in enumerate((model_a, model_b)):
                start = time.perf_counter()
                result = reconstruct(model, one, seed=seed + index, device=device, **options[which][kind])
                seconds[kind][which].append(time.perf_counter() - start)
                made[kind][which].append(result["fields"][0])
    counts = str(both[0]) if both[0] == both[1] else f"{both[0]} and {both[1]}"
    names = {"mean": ONE_STEP_MEAN, "sample": f"sample (heun, {counts} steps)"}
    rows = []
    for kind in made:
        stacks = [np.stack(made[kind][which]) for which in (0, 1)]
        scores = [
            {**_score(stack, target[own]), "seconds": np.array(spent)}
            for stack, spent in zip(stacks, seconds[kind], strict=True)
        ]
        for metric in COMPARED:
            a, b = (_gather(score[metric], processes) for score in scores)
            rows.append({"method": names[kind], "kind": kind, "metric": metric, **_paired(metric, a, b)})
        if callback is not None:
            stacks = [_gather(stack, processes) for stack in stacks]
            callback(kind, *stacks, target, fields["mask"].numpy())
    return rows


def _paired(metric, a, b):
    """The numbers of one row of `compare` from a metric's values (N,) of A and of B."""
    defined = np.isfinite(a) & np.isfinite(b)
    a, b = a[defined], b[defined]
    differences = COMPARED[metric][1] * (b - a)
    row = {}
    for name, values in (("a", a), ("b", b), ("improvement", differences)):
        row[name], row[f"{name}_se"] = _mean_and_error(values)
    row["percent"] = 100 * row["improvement"] / row["a"] if row["a"] else None
    row["p_t"], row["p_wilcoxon"] = (
        p if math.isfinite(p) else None for p in metrics.paired_test(differences)
    )
    return {**row, "differences": differences.tolist(), "images": int(defined.sum())}


def format_comparison(rows, names=("A", "B")):
    """Rows of `compare` as text: a table each for posterior mean and sample; "-" where undefined."""
    if not rows:
        raise ValueError("rows is empty; pass the result of compare")
    head = ["", *names, "improvement", "relative", "paired t", "Wilcoxon", "images"]
    parts = []
    for method in dict.fromkeys(row["method"] for row in rows):
        lines = []
        for row in (row for row in rows if row["method"] == method):
            label, _, digits = COMPARED[row["metric"]]
            values = [
                _plus_minus(row[name], row[f"{name}_se"], digits, name == "improvement")
                for name in ("a", "b", "improvement")
            ]
            percent = "-" if row["percent"] is None else f"{row['percent']:+.1f}%"
            tests = [_p_value(row[name]) for name in ("p_t", "p_wilcoxon")]
            lines.append([label, *values, percent, *tests, str(row["images"])])
        parts.append(f"{method}\n{align(head, lines, left=1)}")
    return "\n\n".join(parts)


def _p_value(p):
    if p is None:
        return "-"
    return f"p = {p:.3f}" if p >= 1e-3 else f"p = {p:.0e}"


def calibrate(model, images, *, observed=0.2, draws=8, steps=20, seed=0, device=None):
    """Does the spread of posterior samples match the error of their mean? Over unobserved pixels only.

    Args:
        images: (N, H, W, 3) uint8 or floats in [0, 1], or the dict of `observe_images`.
        draws, steps: number of samples and solver steps of each.

    Returns:
        (result of `reconstruct`, dict of `metrics.calibration`).
    """
    if draws < 2:
        raise ValueError(f"draws={draws} has no spread; pass at least 2")
    result = reconstruct(model, images, observed, draws=draws, steps=steps, seed=seed, device=device)
    hidden = ~result["mask"]
    points = [result[name][hidden][None, None] for name in ("fields", "std", "images")]  # (1, 1, M, 3) each
    return result, metrics.calibration(*points)


def format_table(rows):
    """Rows of `multiscale`, `side_by_side` or `steps_curve` as an aligned text table; "-" where undefined."""
    if not rows:
        raise ValueError("rows is empty; pass the result of multiscale or steps_curve")
    names = ("scale", "model", "method", "kind", "steps", "draws", "images")
    names = [name for name in names if name in rows[0]]
    numbers = [
        ("PSNR (dB)", "psnr", 2),
        ("SSIM", "ssim", 3),
        ("speckle", "speckle", 4),
        ("sharpness", "sharpness", 2),
        ("PSNR - biharmonic", "versus_biharmonic", 2),
        ("PSNR - first", "versus_first", 2),
    ]
    numbers = [(head, key, digits) for head, key, digits in numbers if key in rows[0]]
    notes = any(row.get("note") for row in rows)
    head = [*names, *(head for head, _, _ in numbers), *(["note"] if notes else [])]
    lines = []
    for row in rows:
        line = [str(row[name]) for name in names]
        line += [
            _plus_minus(row[key], row[f"{key}_se"], digits, "versus" in key) for _, key, digits in numbers
        ]
        lines.append([*line, *([row["note"]] if notes else [])])
    return align(head, lines, left=3 + ("model" in names))


def align(head, lines, left=None):
    """A head and lines of texts as one text with aligned columns, the first `left` of them (all if None) to
    the left, the others to the right.

    Raises ValueError for a line with another number of columns than the head.
    """
    left = len(head) if left is None else left
    for line in lines:
        if len(line) != len(head):
            raise ValueError(f"a line has {len(line)} columns, the head has {len(head)}: {line}")
    table = [head, *lines]
    widths = [max(len(line[i]) for line in table) for i in range(len(head))]
    text = [
        "  ".join(
            cell.ljust(w) if i < left else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in table
    ]
    text.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in text)


def find_row(rows, **wanted):
    """The first row whose entries equal `wanted`, such as `scale=32, kind="mean"`; None if there is none."""
    return next((row for row in rows if all(row.get(key) == value for key, value in wanted.items())), None)


def reading(rows, scale, key, digits=2):
    """A score of the model at a scale as text, its mean and, where there is one, its sample.

    rows: from `multiscale`; key: "psnr", "ssim" or "speckle". "24.31 ± 0.92 (mean), 21.98 ± 0.88 (sample)";
    "-" if there is neither.
    """
    found = {
        "mean": find_row(rows, scale=scale, method=ONE_STEP_MEAN),
        "sample": find_row(rows, scale=scale, kind="sample"),
    }
    parts = [
        f"{_plus_minus(row[key], row[f'{key}_se'], digits, False)} ({kind})"
        for kind, row in found.items()
        if row
    ]
    return ", ".join(parts) or "-"


def _plus_minus(value, error, digits, signed):
    if value is None:
        return "-"
    text = f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"
    return text if error is None else f"{text} ± {error:.{digits}f}"


def write_results(rows, path, *, command, config=None):
    """Write rows as JSON with what is needed to repeat them: command, config, versions and kind of device.

    Args:
        rows: list of row dicts.
        path: file to write; its folder is made.
        command: the command line that produced the rows, as a user would type it in the repository.
        config: settings worth keeping, JSON-able.

    Returns the Path. Raises ValueError if a value is not finite (write None for undefined ones).
    """
    path = Path(path)
    document = {
        "command": command,
        "config": config or {},
        "versions": {**versions(), **{name: version(name) for name in ("numpy", "scipy", "scikit-image")}},
        "device": gpu_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})",
        "rows": rows,
    }
    text = json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")
    return path


# ---------------------------------------------------------------- influence


def token_influence(mixer, tokens, token, *arguments):
    """How much the output of one token depends on each token of the sequence, by gradients, exactly.

    Args:
        mixer: function (n, L, D), with any `arguments` -> (n, L, D), such as `models.ssm.SelectiveSSM`, that
            keeps the samples of a batch apart.
        tokens: (L, D) floating.
        token: position of the token whose output is looked at.
        arguments: further tensors that `mixer` takes, of a batch of one, such as orders (1, K, L).

    Returns:
        (L,) float32 on the CPU: the Frobenius norm of the Jacobian d mixer(tokens)[token] / d tokens[i] for
        every i. It takes a backward pass for each of the D channels, as many as fit at a time.

    Raises ValueError for tokens of another shape and a token that does not exist.
    Source: effective receptive fields, Luo et al., NeurIPS 2016.
    """
    shape = tuple(getattr(tokens, "shape", ()))
    if len(shape) != 2 or 0 in shape or not tokens.is_floating_point():
        raise ValueError(f"tokens has shape {shape}; pass floating tokens (L, D) of one sequence")
    length, width = shape
    _check_index("token", token, length)
    total = torch.zeros(length)
    for channels in torch.arange(width).split(max(1, TOKENS_PER_FORWARD // length)):
        copies = len(channels)
        batch = tokens.detach().repeat(copies, 1, 1).requires_grad_()  # (n, L, D)
        given = [argument.expand(copies, *argument.shape[1:]) for argument in arguments]
        with torch.enable_grad():
            output = mixer(batch, *given)[:, token]  # (n, D)
            row = output[torch.arange(copies, device=output.device), channels.to(output.device)]
        (gradient,) = torch.autograd.grad(row.sum(), batch)  # copy n holds the gradient of channel n
        total += gradient.float().square().sum(dim=(0, 2)).cpu()
    return total.sqrt()


def pixel_influence(model, image, pixel, *, observed=0.2, draws=8, seed=0, device=None):
    """How much one reconstructed pixel depends on the observed ones, by gradients, over random draws of them.

    Each draw observes other pixels of the image, `pixel` never among them, and reconstructs it in one step
    (the posterior mean). A map over all pixels comes together, although each draw observes a fraction.

    Args:
        model: a sparse-field velocity model.
        image: (H, W, 3) uint8 or floats in [0, 1].
        pixel: (row, column) of the reconstructed pixel.
        observed: fraction of observed pixels; at least one pixel must stay unobserved.
        draws: how many draws of observed pixels.
        seed: of the observed pixels and the noise.
        device: where to compute; the model's device if None.

    Returns:
        (H, W) float32: the Frobenius norm of d field(pixel) / d value(i), 3 x 3 colours, at every pixel i, a
        mean over the draws that observed i; NaN where none did, as at `pixel` itself.

    Raises ValueError for wrong shapes and values, a pixel outside the image, draws below 1, and when every
    pixel would be observed.
    """
    image = _as_images(np.asarray(image)[None])[0]
    height, width, _ = image.shape
    if not isinstance(pixel, tuple | list) or len(pixel) != 2:
        raise ValueError(f"pixel={pixel!r} is not a pair; pass (row, column) such as (16, 16)")
    _check_index("pixel's row", pixel[0], height)
    _check_index("pixel's column", pixel[1], width)
    _check_counts(draws=draws)
    device = model_device(model) if device is None else _check_device(device)
    target, seen, attempt = int(pixel[0]) * width + int(pixel[1]), [], 0
    while len(seen) < draws:
        coords, values, mask = image_sources.observe(image, observed, (seed, attempt))
        if mask.all():
            raise ValueError(f"observed={observed} of {height * width} pixels is all of them; pass 0.2")
        if not mask.flatten()[target]:
            seen.append((coords, values, mask.flatten()))
        attempt += 1
    coords, values, masks = (torch.stack(part) for part in zip(*seen, strict=True))
    asked = int((~masks[0]).sum())
    query = grid_coords(height, width).expand(draws, -1, -1)[~masks].reshape(draws, asked, 2)
    place = (~masks[:, :target]).sum(-1)  # (draws,), where the pixel stands among the queries
    noise = torch.randn(draws, asked, 3, generator=torch.Generator().manual_seed(seed))
    total = torch.zeros(draws, height * width)
    for part in torch.arange(draws).split(max(1, TOKENS_PER_FORWARD // (height * width))):
        given = values[part].to(device).requires_grad_()
        batch = [x[part].to(device) for x in (noise, query, coords)]
        with torch.enable_grad(), samplers.evaluation_mode(model):
            velocity = model(*batch[:2], torch.zeros(len(part), device=device), batch[2], given)
            colours = velocity[torch.arange(len(part), device=device), place[part].to(device)]  # (n, 3)
        rows = [
            torch.autograd.grad(colours[:, c].sum(), given, retain_graph=c < 2)[0].float().square().sum(-1)
            for c in range(3)
        ]
        total[part] = total[part].masked_scatter(masks[part], sum(rows).sqrt().cpu())
    return (total.sum(0) / masks.sum(0)).reshape(height, width).numpy()  # 0 / 0 is NaN


def _check_index(name, index, length):
    """Raise ValueError unless `index` is a whole number from 0 to length - 1."""
    if isinstance(index, bool) or not isinstance(index, int | np.integer) or not 0 <= index < length:
        raise ValueError(f"{name}={index!r} does not exist; pass a whole number from 0 to {length - 1}")


# ---------------------------------------------------------------- cost before training


def model_cost(model, n_inputs=204, n_queries=204, batch_size=64):
    """Parameters, FLOPs and training memory of a sparse-field model, from shapes alone: nothing is computed.

    The forward pass runs on the meta device. Matrix products are counted by PyTorch's FlopCounterMode (a
    multiply and an add are two). The selective scan, which it does not know, adds `9 B L D N + 2 B L D` per
    call, the usual count of the recurrence, its exponentials and its gate (VMamba, Liu et al. 2024).
    Pointwise operations are not counted. Activation memory is what autograd keeps for the backward pass, each
    storage once, parameters not counted; the scan keeps its inputs and, as counted here, a state every 32
    steps (the chunked backend; native keeps one every 64, triton one every 8).

    Args:
        model: torch module with a velocity field's forward.
        n_inputs, n_queries: observed points and queries of each image.
        batch_size: images.

    Returns:
        dict: parameters; flops_forward and, of these, flops_scan, for the whole batch; activation_bytes
        (float32); training_bytes, the activations plus weights, gradients, two Adam moments and an EMA copy;
        estimate, a text saying how the bytes were obtained. Workspaces inside operations and fragmentation
        come on top.

    Raises ValueError for sizes that are not whole numbers of at least 1.
    """
    _check_counts(n_inputs=n_inputs, n_queries=n_queries, batch_size=batch_size)
    shapes = ((n_queries, 3), (n_queries, 2), (), (n_inputs, 2), (n_inputs, 3))
    return _cost(model, [torch.empty(batch_size, *shape, device="meta") for shape in shapes])


def _cost(model, arguments):
    """What `model_cost` returns, of a call with these arguments on the meta device."""
    parameters = list(model.parameters())
    # A copy of the model in which every tensor, shared ones once, is of its shape only.
    shapes_only = {id(p): nn.Parameter(_shape_of(p), p.requires_grad) for p in parameters}
    shapes_only |= {id(buffer): _shape_of(buffer) for buffer in model.buffers()}
    own = {tensor.untyped_storage()._cdata for tensor in shapes_only.values()}
    twin = copy.deepcopy(model, shapes_only).train()  # as in training: dropout keeps its masks
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # holding the storage keeps its identity unique
        return tensor

    scan = torch.ops.nfhelpers.scan_chunked  # the one that tensors without data take
    with (
        FlopCounterMode(display=False, custom_mapping={scan: _scan_flops}) as counter,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        twin(*arguments)
    count = sum(p.numel() for p in parameters)
    activations = sum(storage.nbytes() for storage in kept.values())
    scan_flops = counter.get_flop_counts()["Global"].get(scan, 0)
    return {
        "parameters": count,
        "flops_forward": counter.get_total_flops(),
        "flops_scan": scan_flops,
        "activation_bytes": activations,
        "training_bytes": activations + 5 * 4 * count,
        "estimate": "float32 tensors that autograd saves (meta device), plus 5 copies of the parameters",
    }


def equal_size(model_class, config, parameters):
    """`config` with the width of its token-wise networks (mlp_ratio) such that the model has `parameters`.

    What a part of a model is worth is seen only beside a model of the same size without it. Depth, width of
    the tokens and everything else stay; the number is met to within half a column of each network.

    Args:
        model_class: a class of `nfhelpers.models`; `config`: an instance of its config, with mlp_ratio.
        parameters: how many.

    Returns the config. Raises ValueError when the model without those networks is larger already.
    """
    _check_counts(parameters=parameters)

    def count(hidden):
        ratio = (hidden + 0.5) / config.d_model  # the models round hidden columns down
        with torch.device("meta"):
            model = model_class(replace(config, mlp_ratio=ratio))
        return sum(p.numel() for p in model.parameters())

    least, column = count(1), count(2) - count(1)
    hidden = 1 + round((parameters - least) / column) if column else 1
    if hidden < 1 or not column:
        raise ValueError(
            f"parameters={parameters} cannot be met: {model_class.__name__} has {least} of them with the "
            f"smallest networks; pass at least those, or a smaller d_model than {config.d_model}"
        )
    return replace(config, mlp_ratio=(hidden + 0.5) / config.d_model)


def query_cost(model, sizes, *, n_inputs=205, repeats=1, device=None):
    """Seconds and peak memory of one forward pass of one image at several sizes, from a fixed input.

    Args:
        model: a sparse-field velocity model.
        sizes: sides of square fields; all their pixels are queries.
        n_inputs: observed points.
        repeats: the smallest of so many times counts; the first pass of all is not timed.
        device: the model's if None.

    Returns:
        list of dicts as `plots.cost_curve` takes them: method ("one forward pass"), length (queries),
        seconds, memory (bytes of tensors beyond the model and its arguments; None where no allocation was
        recorded; not what the native scan allocates for itself).

    Raises ValueError for no sizes, and counts below 1.
    """
    if len(sizes) == 0:
        raise ValueError("sizes is empty; pass sides such as (32, 64)")
    _check_counts(n_inputs=n_inputs, repeats=repeats, **{f"sizes[{i}]": s for i, s in enumerate(sizes)})
    device = model_device(model) if device is None else _check_device(device)
    generator = torch.Generator().manual_seed(0)
    coords, values = (torch.rand(1, n_inputs, width, generator=generator).to(device) for width in (2, 3))
    rows = []
    for size in sizes:
        query = grid_coords(size, size)[None].to(device)
        noise = torch.randn(1, size * size, 3, generator=generator).to(device)

        def call(query=query, noise=noise):
            with torch.no_grad(), samplers.evaluation_mode(model):
                model(noise, query, torch.zeros(1, device=device), coords, 2 * values - 1)

        row = {"method": "one forward pass", "length": size * size}
        row["seconds"] = best_seconds(call, device, repeats)
        rows.append({**row, "memory": peak_bytes(call, device)})
    return rows


def best_seconds(call, device, repeats=3, budget=math.inf):
    """Seconds that `call()` takes at best, after one call that compiles kernels and takes workspaces.

    device: what to wait for, a torch.device; repeats: calls that are timed, fewer once they have taken
    `budget` seconds together. On a machine that does other things the smallest time is what the code needs.
    """
    taken = []
    while len(taken) <= repeats and sum(taken[1:]) < budget:
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
    return min(taken[1:])


def peak_bytes(call, device):
    """Most bytes that `call()` held at a time beyond those held before; None if nothing was recorded.

    On a GPU the CUDA allocator counts, on the CPU the profiler: what is taken without PyTorch's allocators,
    as by FFT libraries and the native scan, is not seen.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return int(np.cumsum(changes).max()) if changes else None


def _shape_of(tensor):
    """A tensor without data, float32 where it is floating."""
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return torch.empty_like(tensor, device="meta", dtype=dtype)


def _scan_flops(u, delta, A, B, *others, out_shape=None, **options):
    """FLOPs of a scan from the shapes of its arguments: delta is (B, K, L, D), B (..., N)."""
    return math.prod(delta) * (9 * B[-1] + 2)


# ---------------------------------------------------------------- latents


def pca_baseline(train_images, test_images, dims):
    """Images as the first principal components of training images say them: the linear autoencoder.

    Args:
        train_images: (M, H, W, 3) uint8 or floats in [0, 1].
        test_images: (N, H, W, 3) of the same size.
        dims: number of components, the size of the latent it is compared with; at most min(M - 1, 3 H W).

    Returns:
        (N, H, W, 3) float64 in [0, 1]. PCA sees every pixel of the test images, where a sparse-field encoder
        sees the observed ones.

    Raises ValueError for other shapes and for dims outside 1 ... min(M - 1, 3 H W).
    """
    train_images, test_images = _as_images(train_images), _as_images(test_images)
    if train_images.shape[1:] != test_images.shape[1:]:
        raise ValueError(
            f"train_images are {train_images.shape[1:]} and test_images {test_images.shape[1:]}; "
            "pass two of one size"
        )
    rows = train_images.reshape(len(train_images), -1).astype(np.float64)  # (M, 3HW)
    _check_counts(dims=dims)
    most = min(len(rows) - 1, rows.shape[1])
    if dims > most:
        raise ValueError(
            f"dims={dims} is more than {len(rows)} training images of {rows.shape[1]} values span; "
            f"pass at most {most}, or more images"
        )
    mean = rows.mean(axis=0)
    rows = rows - mean
    if len(rows) > rows.shape[1]:  # the covariance is the smaller matrix
        _, vectors = eigh(rows.T @ rows, subset_by_index=(rows.shape[1] - dims, rows.shape[1] - 1))
    else:
        vectors = np.linalg.svd(rows, full_matrices=False)[2][:dims].T  # (3HW, dims)
    test = test_images.reshape(len(test_images), -1) - mean
    made = mean + test @ vectors @ vectors.T
    return made.clip(0, 1).reshape(test_images.shape)


def latent_probe(train_latents, train_labels, test_latents, test_labels):
    """Accuracy on test data of a logistic regression from latents to labels: what a latent says of a class.

    latents: (N, C) arrays or tensors on the CPU; labels: (N,) integers. The latents are standardised by the
    training set's mean and standard deviation. Returns a number in [0, 1]. Raises ValueError on shapes that
    do not fit.
    """
    train_latents, test_latents = _as_latents(train_latents), _as_latents(test_latents)
    for name, latents, labels in (
        ("train", train_latents, train_labels),
        ("test", test_latents, test_labels),
    ):
        if np.shape(labels) != (len(latents),) or latents.shape[1] != train_latents.shape[1]:
            raise ValueError(
                f"{name}_latents have shape {latents.shape} and {name}_labels {np.shape(labels)}; "
                f"pass (N, {train_latents.shape[1]}) and (N,)"
            )
    return float(fit_probe(train_latents, train_labels).score(test_latents, test_labels))


def nearest_neighbours(queries, latents, k=5):
    """Indices (Q, k) of the latents (N, C) nearest to each of the queries (Q, C), the nearest first.

    By Euclidean distance: pass normalised latents, so that every channel counts alike. Raises ValueError on
    shapes that do not fit and for k outside 1 ... N.
    """
    queries, latents = _as_latents(queries), _as_latents(latents)
    _check_counts(k=k)
    if queries.shape[1] != latents.shape[1] or k > len(latents):
        raise ValueError(
            f"queries have shape {queries.shape}, latents {latents.shape} and k={k}; pass one width and k of "
            f"at most {len(latents)}"
        )
    return np.argsort(cdist(queries, latents), axis=1, kind="stable")[:, :k]


def _as_latents(latents):
    latents = np.asarray(latents, dtype=np.float64)
    if latents.ndim != 2 or latents.size == 0 or not np.isfinite(latents).all():
        raise ValueError(f"latents have shape {latents.shape}; pass a finite (N, C), such as encode returns")
    return latents


def interpolation_smoothness(fields):
    """How long and how even the way is that frames of an interpolation take through pixel space.

    Args:
        fields: (A, ...) frames at equally spaced positions, A >= 3, values in [0, 1].

    Returns:
        dict: path_length, the sum of the root mean square differences of neighbouring frames; direct, that of
        the first and the last frame, which no path is shorter than; ratio of the two, 1 for a straight line;
        second_difference, root mean square of x[i-1] - 2 x[i] + x[i+1] over all inner frames, 0 for even
        steps along a straight line. RGB blending has a ratio of 1 and a second difference of 0 by
        construction: the way is straight, but its frames are double exposures. ratio is NaN where the ends
        are equal.

    Raises ValueError for fewer than three frames and for values that are not finite.
    """
    frames = np.asarray(fields, dtype=np.float64)
    if frames.ndim < 2 or len(frames) < 3 or not np.isfinite(frames).all():
        raise ValueError(f"fields have shape {frames.shape}; pass at least 3 finite frames (A, H, W, 3)")
    frames = frames.reshape(len(frames), -1)
    length = float(np.sqrt((np.diff(frames, axis=0) ** 2).mean(axis=1)).sum())
    direct = float(np.sqrt(((frames[-1] - frames[0]) ** 2).mean()))
    return {
        "path_length": length,
        "direct": direct,
        "ratio": length / direct if direct > 0 else math.nan,
        "second_difference": float(np.sqrt((np.diff(frames, n=2, axis=0) ** 2).mean())),
    }


# ---------------------------------------------------------------- autoencoders


def first_phase(model):
    """The autoencoder without its flow: the model of phase 1 in one of phase 2, sharing its weights.

    As a velocity model, one step of it is the deterministic decoding: what `reconstruct` and `side_by_side`
    call its posterior mean. A model of phase 1 is returned as it is.
    """
    if model.config.phase == 1:
        return model
    twin = MambaDiffusionAutoencoder(replace(model.config, phase=1))
    _, unexpected = twin.load_state_dict(model.state_dict(), strict=False, assign=True)
    assert all(name.startswith("refiner.") for name in unexpected)
    # Buffers that are not saved are not handed over: they follow by device and dtype.
    return twin.to(model.latent_mean).eval()


def _batch_of(coords):
    """How many samples of so many points pass through a model at once."""
    return max(1, TOKENS_PER_FORWARD // coords.shape[1])


@torch.no_grad()
def encode_images(model, images, observed=1.0, seed=0):
    """Latents (N, C), on the CPU and not normalised, of images (N, H, W, 3), of all their pixels or a part.

    images: uint8, floats in [0, 1], or the dict of `observe_images`, whose observed pixels are taken;
    observed, seed: as there.
    """
    fields, device = _observed(images, observed, seed), model_device(model)
    points = fields["input_coords"], fields["input_values"]
    groups = torch.arange(len(points[0])).split(_batch_of(points[0]))
    with samplers.evaluation_mode(model):
        return torch.cat([model.encode(*(p[group].to(device) for p in points)).cpu() for group in groups])


@torch.no_grad()
def decode_latents(model, latents, size=32):
    """Deterministic decodings (N, size, size, 3) float32 in [0, 1] of latents (N, C), not normalised.

    No pixel is kept: all of them come from the latent. Raises ValueError for latents of another size.
    """
    _check_counts(size=size)
    device, grid = model_device(model), grid_coords(size, size)[None]
    fields = []
    with samplers.evaluation_mode(model):
        for part in latents.split(_batch_of(grid)):
            coords = grid.expand(len(part), -1, -1).to(device)
            fields.append(model.decode(coords, part.to(device)).float().cpu())
    return to_image(torch.cat(fields)).reshape(-1, size, size, 3).numpy()


def compare_autoencoders(model, images, train_images, *, observed=0.2, seed=0):
    """Decodings of a latent beside PCA of the same number of dimensions, fitted on training images.

    Every pixel comes from the latent here, observed ones too, as with PCA. PCA has no way to see a part of
    the pixels; for the row of `observed` the others are first filled in by biharmonic inpainting.

    Args:
        model: a `MambaDiffusionAutoencoder`, of either phase.
        images: (N, H, W, 3) uint8 or floats in [0, 1]; train_images: (M, H, W, 3), more of them than the
            model's latent has dimensions.
        observed: fraction of pixels of the sparse rows; seed: which.

    Returns:
        (rows, pictures): list of dicts method, kind, images, psnr, ssim, speckle with `*_se`, and
        versus_first with versus_first_se, the mean paired difference of PSNR (dB) to PCA of the same pixels;
        dict of method -> fields (N, H, W, 3) in [0, 1].

    Raises ValueError as `pca_baseline` and `observe_images`.
    """
    fields, dims = observe_images(images, observed, seed), model.config.latent_dim
    target = fields["images"].numpy()
    filled = _classical_fields(fields, target.shape[1])["biharmonic"]
    both = pca_baseline(train_images, np.concatenate([target, filled]), dims)
    share = f"{observed:.0%} of the pixels"
    pairs = {"all pixels": (both[: len(target)], images), share: (both[len(target) :], fields)}
    rows, pictures = [], {}
    for seen, (linear, given) in pairs.items():
        decoded = decode_latents(model, encode_images(model, given), target.shape[1])
        first = None
        for name, kind, made in (("PCA", "classical", linear), ("autoencoder", "mean", decoded)):
            scores = _score(made, target)
            first = scores["psnr"] if first is None else first
            row = _row(f"{name} of {dims}, {seen}", kind, scores)
            row["versus_first"], row["versus_first_se"] = _mean_and_error(scores["psnr"] - first)
            rows.append(row)
            pictures[row["method"]] = made
    return rows, pictures


def field_pictures(models, source="photos", *, scales, images, observed=0.2, observed_size=32, seed=0):
    """One-step posterior means of several models at several sizes: the pictures of `side_by_side` alone.

    Returns (pictures, mask): dict of (scale, name) -> fields (N, h, w, 3) in [0, 1], with the name "target"
    (None without ground truth), and the observed pixels (N, H, W). Arguments and errors are those of
    `side_by_side`.
    """
    _check_scales(scales, None)
    _check_counts(images=images, observed_size=observed_size)
    truth = _ground_truth(source, scales, observed_size, images)
    fields = observe_images(truth[observed_size], observed, seed)
    pictures = {(scale, "target"): truth[scale] for scale in scales}
    for name, model in models.items():
        for scale in scales:
            pictures[scale, name] = _model_mean(model, fields, scale, 1, seed, None)
    return pictures, fields["mask"].numpy()


def _cell_means(fields, size):
    """Fields (N, S, S, ...) -> (N, size, size, ...): the mean over each of size x size equal cells."""
    side = fields.shape[1]
    if side % size:
        raise ValueError(f"a field of {side} px is not {size} whole cells; pass a multiple of {size}")
    cells = fields.reshape(len(fields), size, side // size, size, side // size, *fields.shape[3:])
    return cells.mean(axis=(2, 4))


def scale_scores(pictures, mask, names):
    """How the fields of models at several sizes agree with the real images, and with each other.

    Args:
        pictures: dict of (scale, name) -> fields (N, h, w, 3) in [0, 1], with "target" among the names, such
            as `side_by_side` or `field_pictures` return; the smallest scale divides the others.
        mask: (N, H, W) bool, pixels that were observed at the smallest scale.
        names: of the models.

    Returns:
        list of dicts, one a model and scale: model, scale, psnr against the target with psnr_se (None without
        target); consistency with consistency_se, the PSNR (dB) between the field, averaged over the pixels of
        the smallest scale, and the field at that scale, over pixels that were not observed; versus_bicubic
        with versus_bicubic_se, the mean paired difference of PSNR to the model's own field of the smallest
        scale, upsampled bicubically. Consistency is no merit by itself: an upsampled field has it.

    Raises ValueError for scales that the smallest does not divide.
    """
    scales = sorted({scale for scale, name in pictures if name in names})
    rows = []
    for name in names:
        low = pictures[scales[0], name]
        for scale in scales:
            made, target = pictures[scale, name], pictures[scale, "target"]
            psnr = _score(made, target)["psnr"]
            row = {"model": name, "scale": scale, "consistency": None, "consistency_se": None}
            row |= {"versus_bicubic": None, "versus_bicubic_se": None}
            row["psnr"], row["psnr_se"] = _mean_and_error(psnr)
            if scale != scales[0]:
                agreement = _consistency(low, made, mask)
                row["consistency"], row["consistency_se"] = _mean_and_error(agreement)
                upsampled = np.stack([resize_field(field, scale, scale) for field in low])
                gain = psnr - _score(upsampled, target)["psnr"]
                row["versus_bicubic"], row["versus_bicubic_se"] = _mean_and_error(gain)
            rows.append(row)
    return rows


def _consistency(low, high, mask):
    """PSNR (N,) of fields of a large size, averaged over cells, to fields of a small one, outside `mask`."""
    error = np.square(_cell_means(high, low.shape[1]) - low).mean(-1)  # (N, H, W)
    with np.errstate(divide="ignore"):
        return -10 * np.log10([e[~m].mean() for e, m in zip(error, mask, strict=True)])


def consistency_difference(pictures, mask, name, other):
    """By how much one model's fields of several sizes agree better with each other than another's, paired.

    Arguments are those of `scale_scores`, and the names of two models. Returns a dict of scale -> (mean of
    the differences of consistency in dB, its standard error), without the smallest; None where undefined.
    """
    scales = sorted({scale for scale, model in pictures if model == name})
    found = {}
    for scale in scales[1:]:
        own, theirs = (_consistency(pictures[scales[0], m], pictures[scale, m], mask) for m in (name, other))
        found[scale] = _mean_and_error(own - theirs)
    return found


def format_scales(rows):
    """Rows of `scale_scores` as an aligned text table; "-" where undefined."""
    if not rows:
        raise ValueError("rows is empty; pass the result of scale_scores")
    keys = {"psnr": "PSNR (dB)", "versus_bicubic": "PSNR - own bicubic", "consistency": "consistency (dB)"}
    lines = [
        [row["model"], str(row["scale"])]
        + [_plus_minus(row[key], row[f"{key}_se"], 2, "versus" in key) for key in keys]
        for row in rows
    ]
    return align(["model", "scale", *keys.values()], lines, left=1)


def sampling_scores(
    model, source="photos", *, scales, images, observed=0.2, observed_size=32, steps=20, draws=4, seed=0
):
    """What the flow of phase 2 makes of the latent, beside the deterministic decoding of the same latent.

    Args:
        model: a `MambaDiffusionAutoencoder` of phase 2.
        source, scales, images, observed, observed_size, seed: as in `side_by_side`.
        steps: Heun steps of a sample; draws: K of the mean of K samples, at `observed_size` only.

    Returns:
        (rows, pictures): list of dicts scale, method, kind, images, psnr, ssim, speckle, sharpness with their
        standard errors `*_se`, versus_first with versus_first_se, the mean paired difference of PSNR (dB) to
        the decoding, which is the first of each scale; dict of (scale, method) -> fields, with "target".

    Raises ValueError for a model of phase 1, and as `side_by_side`.
    """
    if model.config.phase != 2:
        raise ValueError("this autoencoder is of phase 1 and draws no samples; pass one of phase 2")
    _check_scales(scales, None)
    _check_counts(images=images, observed_size=observed_size, steps=steps, draws=draws)
    truth = _ground_truth(source, scales, observed_size, images)
    fields = observe_images(truth[observed_size], observed, seed)
    rows, pictures = [], {}
    for scale in scales:
        target = pictures[scale, "target"] = truth[scale]
        made = {
            ("decoding", "mean"): (first_phase(model), {}),
            (ONE_STEP_MEAN, "mean"): (model, {}),
            (f"sample (heun, {steps} steps)", "sample"): (model, {"kind": "sample", "steps": steps}),
        }
        if scale == observed_size:
            made[f"mean of {draws} samples", "mean"] = (model, {"draws": draws, "steps": steps})
        first = None
        for (method, kind), (network, options) in made.items():
            field = reconstruct(network, fields, size=scale, seed=seed, **options)["fields"]
            scores = _score(field, target)
            first = scores["psnr"] if first is None else first
            row = {"scale": scale, **_row(method, kind, scores)}
            row["versus_first"], row["versus_first_se"] = _mean_and_error(scores["psnr"] - first)
            sharp = np.array([np.nan]) if target is None else metrics.sharpness(field, target)
            row["sharpness"], row["sharpness_se"] = _mean_and_error(sharp)
            rows.append(row)
            pictures[scale, method] = field
    return rows, pictures


# ---------------------------------------------------------------- latents: classes, distributions, ways


CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PHOTO_CLASSES = ("astronaut", "rocket", "flower", "china", "coffee", "chelsea")
"""Photographs of `labelled_images`: the first three are among those that source "photos" trains on."""


def cifar10_folder():
    """The folder that source "cifar10" is read from, None if it is not there and would be downloaded."""
    folder = data_folder() / "cifar-10-batches-bin"
    return folder if any(folder.glob("*.bin")) else None


def labelled_images(source, split, size=32, limit=256, seed=0):
    """Images uint8 (N, size, size, 3), their classes (N,) and the names of the classes.

    source: "cifar10", whose first `limit` images are taken, with their ten classes; or "photos": random
    windows of six photographs, whose class is the photograph. There, those of "train" lie in the left half of
    each photograph and those of "test" in the right half, so that none share a pixel, and the order of the
    colour channels is random, so that the mean colour does not give the photograph away. seed: of the windows
    of "photos". Raises ValueError for another source or split.
    """
    if source not in ("photos", "cifar10"):
        raise ValueError(f"source={source!r} has no classes; pass 'photos' or 'cifar10'")
    if source == "cifar10":
        pictures = image_sources.load_images("cifar10", split, size, limit)
        pattern = "data_batch*.bin" if split == "train" else "test_batch*.bin"
        records = (np.fromfile(f, np.uint8).reshape(-1, 3073) for f in sorted(cifar10_folder().glob(pattern)))
        return pictures, np.concatenate([part[:, 0] for part in records])[:limit].astype(int), CIFAR10_CLASSES
    if split not in image_sources.SPLITS:
        raise ValueError(f"split={split!r} is unknown; pass 'train' or 'test'")
    _check_counts(size=size, limit=limit)
    from sklearn.datasets import load_sample_image  # slow to import

    photographs = [data.astronaut(), data.rocket()]
    photographs += [load_sample_image("flower.jpg"), load_sample_image("china.jpg")]
    photographs += [data.coffee(), data.chelsea()]
    rng = np.random.default_rng((seed, split == "test"))
    labels = np.arange(limit) % len(PHOTO_CLASSES)
    pictures = np.empty((limit, size, size, 3), np.uint8)
    for picture, label in zip(pictures, labels, strict=True):
        height, width, _ = photographs[label].shape
        half = width // 2
        side = int(rng.integers(96, min(height, half) + 1))
        top, left = rng.integers(height - side + 1), rng.integers(half - side + 1)
        left += half * (split == "test")
        window = photographs[label][top : top + side, left : left + side]
        picture[:] = image_sources.area_resize(np.ascontiguousarray(window), size)[..., rng.permutation(3)]
    return pictures, labels, PHOTO_CLASSES


def fit_probe(latents, labels):
    """A linear probe: scikit-learn's pipeline of standardisation and logistic regression, fitted.

    latents (N, C) arrays or tensors on the CPU; labels (N,) integers. Raises ValueError on shapes that do not
    fit. Source: Alain and Bengio, "Understanding intermediate layers using linear classifier probes", 2016.
    """
    from sklearn.linear_model import LogisticRegression  # slow to import
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    latents = _as_latents(latents)
    if np.shape(labels) != (len(latents),):
        raise ValueError(f"labels have shape {np.shape(labels)}; pass ({len(latents)},), one a latent")
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(latents, labels)


@torch.no_grad()
def channel_strengths(model, points=64):
    """How much each channel of the latent shows in the picture: (C,) tensor on the CPU.

    The root mean square change of the decoding, values in [0, 1], at so many random points, when a channel
    moves by its standard deviation from the mean latent. Normalised channels times these are about as far
    apart as their pictures; without them faint detail counts as much as the mean colour. Raises ValueError
    before `fit_latent_statistics`.
    """
    channels, device = model.config.latent_dim, model_device(model)
    moved = model.denormalise(torch.cat([torch.zeros(1, channels), torch.eye(channels)])).to(device)
    coords = torch.rand(1, points, 2, generator=torch.Generator().manual_seed(0)).to(device)
    with samplers.evaluation_mode(model):
        parts = moved.split(_batch_of(coords))
        decoded = torch.cat([model.decode(coords.expand(len(z), -1, -1), z) for z in parts])  # (1 + C, P, 3)
    return (decoded[1:] - decoded[:1]).float().square().mean((1, 2)).sqrt().cpu() / 2


def principal_directions(model, latents, count):
    """The first `count` directions along which pictures of latents (N, C) vary the most.

    Principal components of normalised latents, channels counting as they show (`channel_strengths`).
    Returns ((count, C) float32 tensor, to be added to latents as they are, each as long as the standard
    deviation along it; (count,) array, the share of the variance). Raises ValueError for other shapes and a
    count outside 1 ... min(N, C).
    """
    _check_counts(count=count)
    if count > min(latents.shape):
        raise ValueError(
            f"count={count} of latents {tuple(latents.shape)}; pass at most {min(latents.shape)}"
        )
    strengths = channel_strengths(model).clamp_min(1e-12)  # (C,)
    weighed = _as_latents(model.normalise(latents.cpu()) * strengths)
    _, scales, axes = np.linalg.svd(weighed - weighed.mean(0), full_matrices=False)
    along = torch.from_numpy(axes[:count] * scales[:count, None] / np.sqrt(len(latents))).float()
    mean = model.denormalise(torch.zeros(1, latents.shape[1]))
    return model.denormalise(along / strengths) - mean, scales[:count] ** 2 / np.square(scales).sum()


def class_directions(probe):
    """Directions (classes, C) in which the score of each class rises the fastest, of length 1 in units of the
    standard deviations of the latents that `probe` (of `fit_probe`, at least 3 classes) was fitted on; they
    are to be added to latents as they are, not normalised."""
    scaler, regression = probe[0], probe[-1]
    weights = regression.coef_ / np.linalg.norm(regression.coef_, axis=1, keepdims=True)
    return torch.from_numpy(weights * scaler.scale_).float()  # (classes, C)


def frechet_distance(a, b):
    """Frechet (2-Wasserstein) distance, squared, of Gaussians with the moments of features (N, D) and (M, D).

        |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))

    0 for equal moments; it grows with the noise of covariances from few samples, so only numbers from equally
    many are to be compared. Raises ValueError for other shapes and fewer than two features each.
    Source: Heusel et al., "GANs Trained by a Two Time-Scale Update Rule ...", NeurIPS 2017, equation 6.
    """
    a, b = _as_latents(a), _as_latents(b)
    if a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"features have shapes {a.shape} and {b.shape}; pass (N, D) and (M, D), N, M >= 2")
    covariances = [np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b)]
    # The product of two positive semi-definite matrices has eigenvalues >= 0, up to rounding.
    root = np.sqrt(np.linalg.eigvals(covariances[0] @ covariances[1]).real.clip(0)).sum()
    apart = np.square(a.mean(0) - b.mean(0)).sum()
    distance = apart + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * root
    return max(0.0, float(distance))  # rounding may leave equal sets a little below


def image_distance(images, reference, dims=16):
    """`frechet_distance` of images (N, H, W, 3) and reference images (M, H, W, 3), both in [0, 1], in the
    space of the first `dims` principal components of the reference's pixels, as a part of the variance there:
    0 is the same distribution of low frequencies, 1 about that of nothing but the mean image. `dims` is at
    most min(M - 1, 3 H W). Raises ValueError for other shapes and `dims`.
    """
    from sklearn.decomposition import PCA  # slow to import

    images, reference = _as_images(images), _as_images(reference)
    _check_counts(dims=dims)
    most = min(len(reference) - 1, reference[0].size)
    if images.shape[1:] != reference.shape[1:] or dims > most:
        raise ValueError(
            f"images are {images.shape}, reference {reference.shape}, dims={dims}; pass two of one size and "
            f"at most {most} dims"
        )
    pca = PCA(dims, svd_solver="randomized", random_state=0).fit(reference.reshape(len(reference), -1))
    features = [pca.transform(x.reshape(len(x), -1)) for x in (images, reference)]
    return frechet_distance(*features) / float(pca.explained_variance_.sum())


def gradient_features(fields):
    """How strong edges are, and where: fields (N, H, W, 3) in [0, 1] -> (N, 96).

    Mean absolute differences of neighbouring pixels, along rows and along columns, in 4 x 4 cells, of the
    fields and of their means over 2 x 2 and 4 x 4 pixels. H = W, a multiple of 16; ValueError otherwise.
    """
    fields, features = _as_images(fields), []
    if fields.shape[1] != fields.shape[2] or fields.shape[1] % 16:
        raise ValueError(f"fields have shape {fields.shape}; pass squares whose side is a multiple of 16")
    for _ in range(3):
        for axis in (1, 2):
            # The last difference is that of a pixel and itself, so that cells stay of one size.
            edges = np.abs(np.diff(fields, axis=axis, append=fields.take([-1], axis=axis)))
            features.append(_cell_means(edges.mean(-1), 4).reshape(len(fields), -1))  # (N, 16)
        fields = _cell_means(fields, fields.shape[1] // 2)
    return np.concatenate(features, axis=1)


def contrast(frame, ends):
    """Mean absolute gradient of a frame (H, W, 3) over that of two ends (2, H, W, 3), on average: 1 is as
    much as theirs, less is a washed-out or doubly exposed picture. Values in [0, 1]; see `metrics.sharpness`.
    """
    with np.errstate(divide="ignore"):
        return float(2 / (1 / metrics.sharpness(np.stack([frame, frame]), ends)).sum())


WAYS = ("latent", "latent + noise", "RGB")
"""Ways from one image to another of `interpolation_paths`."""


@torch.no_grad()
def image_codes(model, images, steps=20):
    """Both codes of images (N, H, W, 3), uint8 or floats in [0, 1], of all their pixels, on the CPU.

    Returns latents (N, C), not normalised, and noises (N, H W, 3) of `samplers.encode_stochastic` by `steps`
    Heun steps, None for a model of phase 1.
    """
    fields, device = observe_images(images, 1.0), model_device(model)
    latents = encode_images(model, fields)
    if model.config.phase == 1:
        return latents, None
    coords, values = (fields[name].to(device) for name in ("input_coords", "input_values"))
    noises = samplers.encode_stochastic(
        model, coords, values, latents.to(device), steps=steps, max_batch=_batch_of(coords)
    )
    return latents, noises.cpu()


def interpolation_paths(model, images, *, alphas=(0.0, 0.25, 0.5, 0.75, 1.0), steps=20, codes=None):
    """Ways from one image to another: through latents, through latents and noise, and by blending pixels.

    Args:
        model: a `MambaDiffusionAutoencoder`; one of phase 1 has no way through noise.
        images: (2, H, W, 3) uint8 or floats in [0, 1].
        alphas: positions, 0 the first and 1 the second image.
        steps: Heun steps of every frame on the way between the noises.
        codes: the two `image_codes` of the images, if they are known; found with the same steps if None.

    Returns:
        dict of way (`WAYS`) -> frames (A, H, W, 3) float32 in [0, 1].

    Raises ValueError for other than two images, and as `samplers.interpolate_latents`.
    """
    images = torch.from_numpy(_as_images(images))
    if len(images) != 2:
        raise ValueError(f"images are {tuple(images.shape)}; pass two, (2, H, W, 3)")
    height, width = images.shape[1:3]
    device, coords = model_device(model), grid_coords(height, width)[None]
    latents, noises = image_codes(model, images, steps) if codes is None else codes
    ends = {"latent": None} if noises is None else {"latent": None, "latent + noise": noises}
    paths = {}
    for way, between in ends.items():
        pair = None if between is None else between.to(device).split(1)
        made = samplers.interpolate_latents(
            model, coords.to(device), latents.to(device).split(1), pair, alphas=alphas, steps=steps
        )
        paths[way] = to_image(made.float().cpu())
    paths["RGB"] = torch.stack([samplers.lerp(images[:1], images[1:], alpha) for alpha in alphas])
    return {way: frames.reshape(-1, height, width, 3).numpy() for way, frames in paths.items()}


def interpolation_scores(model, pairs):
    """Smoothness of ways between images (`interpolation_smoothness`) in three spaces, averaged over pairs.

    Args:
        model: the autoencoder, whose encoder is one of the spaces.
        pairs: list of the dicts of `interpolation_paths`, of three and more positions.

    Returns:
        list of dicts, one a way and space ("pixels", "latent" of the encoder, "gradients" of
        `gradient_features`): way, space, pairs; ratio of the way's length to the direct one, 1 for a straight
        way; bend, the second difference over the direct length; contrast of the frame halfway (`contrast`;
        it belongs to the way and is the same in every space). All with standard errors `*_se`.

    Raises ValueError for no pairs.
    """
    if not pairs:
        raise ValueError("pairs is empty; pass some results of interpolation_paths")
    spaces = {
        "pixels": lambda frames: frames,
        "latent": lambda frames: model.normalise(encode_images(model, frames)).numpy(),
        "gradients": gradient_features,
    }
    rows = []
    for way in pairs[0]:
        halfway = [contrast(pair[way][len(pair[way]) // 2], pair[way][[0, -1]]) for pair in pairs]
        for space, features in spaces.items():
            found = [interpolation_smoothness(features(pair[way])) for pair in pairs]
            row = {"way": way, "space": space, "pairs": len(pairs)}
            values = {
                "ratio": [f["ratio"] for f in found],
                "bend": [f["second_difference"] / f["direct"] for f in found],
                "contrast": halfway,
            }
            for key, value in values.items():
                row[key], row[f"{key}_se"] = _mean_and_error(np.array(value, dtype=float))
            rows.append(row)
    return rows


def format_interpolation(rows):
    """Rows of `interpolation_scores` as an aligned text table."""
    if not rows:
        raise ValueError("rows is empty; pass the result of interpolation_scores")
    keys = {"ratio": "length / direct", "bend": "second difference / direct", "contrast": "contrast halfway"}
    lines = [
        [row["space"], row["way"]] + [_plus_minus(row[key], row[f"{key}_se"], 3, False) for key in keys]
        for row in sorted(rows, key=lambda row: row["space"])
    ]
    return align(["space", "way", *keys.values()], lines, left=2)


# ---------------------------------------------------------------- seed 004's experiments

SEED_GAINS = {64: (2.0, 4.0), 96: (3.0, 5.0)}
"""What seed 004 expects of experiment 1: scale -> gain in dB over its baseline, from and to."""

SIMILAR = 0.5
"""dB below which two PSNR count as similar in experiment 1."""


def multiscale_verdicts(pictures, model, baseline):
    """Seed 004's experiment 1, the autoencoder without diffusion: criteria, what was measured, verdicts.

    pictures: dict of (scale, name) -> fields in [0, 1] with "target", of `side_by_side` or `field_pictures`;
    posterior means are compared with posterior means. model, baseline: names of the two. Returns a list of
    dicts experiment, criterion, measured (text) and met (bool). Scales without target are left out.
    """
    verdicts = []
    for scale in sorted({scale for scale, name in pictures if name == model}):
        target = pictures[scale, "target"]
        if target is None or (scale != 32 and scale not in SEED_GAINS):
            continue
        ours, theirs = (_score(pictures[scale, name], target) for name in (model, baseline))
        gain, error = _mean_and_error(ours["psnr"] - theirs["psnr"])
        low, high = SEED_GAINS.get(scale, (-SIMILAR, None))
        wanted = f"{low:+g} to {high:+g} dB" if high else f"similar, within {SIMILAR} dB"
        measured = f"{_plus_minus(gain, error, 2, True)} dB ({np.mean(ours['psnr']):.2f} dB)"
        verdicts.append(_verdict(1, f"PSNR at {scale}: {wanted} to {baseline}", measured, gain >= low))
        if scale != 32:
            rough = [np.nanmean(scores["speckle"]) for scores in (ours, theirs)]
            measured = f"speckle {rough[0]:.4f}, {baseline} {rough[1]:.4f}"
            verdicts.append(_verdict(1, f"less noisy at {scale}", measured, rough[0] < rough[1]))
    return verdicts


def sampling_verdicts(rows):
    """Seed 004's experiment 2, autoencoder and diffusion, of the rows of `sampling_scores`: as above.

    The seed compares a sample with the decoding, which is a mean: a sample that is right has about 3 dB less.
    Like is compared with like in the row of the mean of samples.
    """
    verdicts = []
    for scale in dict.fromkeys(row["scale"] for row in rows):
        decoding, *others = [row for row in rows if row["scale"] == scale]
        if decoding["psnr"] is None:
            continue
        for row in others:
            if row["method"] != ONE_STEP_MEAN:
                gain = row["versus_first"]
                measured = f"{_plus_minus(gain, row['versus_first_se'], 2, True)} dB ({row['psnr']:.2f} dB)"
                what = "sample" if row["kind"] == "sample" else row["method"]
                verdicts.append(_verdict(2, f"PSNR at {scale}: {what} above decoding", measured, gain > 0))
        sample = next(row for row in others if row["kind"] == "sample")
        for key, wanted, sign in (("sharpness", "sharper", 1), ("speckle", "still smooth", -1)):
            if sample[key] is not None:  # speckle needs flat regions
                measured = f"{key} of a sample {sample[key]:.3g}, of the decoding {decoding[key]:.3g}"
                met = sign * sample[key] > sign * decoding[key]
                verdicts.append(_verdict(2, f"{wanted} at {scale}", measured, met))
    return verdicts


def interpolation_verdicts(rows):
    """Seed 004's experiment 3, interpolation, of the rows of `interpolation_scores`: as above.

    In pixels RGB blending is the straight line, and nothing is smoother: that much is decided before anything
    is measured.
    """
    verdicts = []
    for space in dict.fromkeys(row["space"] for row in rows):
        latent, blending = (find_row(rows, space=space, way=way) for way in ("latent", "RGB"))
        measured = f"length / direct {latent['ratio']:.3f}, of RGB blending {blending['ratio']:.3f}"
        met = latent["ratio"] < blending["ratio"]
        verdicts.append(_verdict(3, f"latent way smoother than RGB in {space}", measured, met))
    measured = f"contrast halfway {latent['contrast']:.2f}, of RGB blending {blending['contrast']:.2f}"
    met = latent["contrast"] > blending["contrast"]
    return [*verdicts, _verdict(3, "no double exposure halfway", measured, met)]


def _verdict(experiment, criterion, measured, met):
    return {"experiment": experiment, "criterion": criterion, "measured": measured, "met": bool(met)}


def format_verdicts(verdicts):
    """Verdicts of seed 004's experiments as an aligned text table: success criterion, measured, verdict."""
    if not verdicts:
        raise ValueError("verdicts is empty; pass those of multiscale_verdicts and the others")
    lines = [
        [str(v["experiment"]), v["criterion"], v["measured"], "met" if v["met"] else "not met"]
        for v in verdicts
    ]
    return align(["experiment", "success criterion", "measured", "verdict"], lines)


# ---------------------------------------------------------------- generated spectrograms

CLASSIFIER_WIDTHS = (16, 32, 64, 64)
CLASSIFIER_FEATURES = 64


def fit_classifier(dataset, *, epochs=10, batch_size=64, learning_rate=3e-3, seed=0):
    """A small convolutional network that tells the classes of spectrograms apart, to judge generated ones.

    Four convolutions of stride 2 with batch normalisation, then two layers. While it learns, spectrograms are
    shifted in time by up to an eighth of their width and in level by up to 0.15 (4.5 dB), so that neither
    decides. AdamW with a cosine schedule. On the digits of "fsdd" at 64 x 64 it is right on all 300 test
    clips, after 20 seconds on one core.

    Args:
        dataset: `spectrograms.Spectrograms`, at least 2.
        epochs, batch_size, learning_rate: of the training; incomplete batches are left out.
        seed: of weights, order and shifts; torch's own generator is left alone.

    Returns a module from (B, C, H, W) to logits (B, classes), on the CPU in eval mode; its first part,
    `classifier[0]`, gives the features (B, 64). Raises ValueError for counts below 1 and fewer than 2 items.
    """
    _check_counts(epochs=epochs, batch_size=batch_size)
    grids, labels = dataset.spectrograms, dataset.labels
    count, channels, height, width = grids.shape
    batch_size = min(batch_size, count)
    if batch_size < 2:
        raise ValueError(f"{count} spectrograms in batches of {batch_size}; pass at least 2 in a batch")
    batches = count // batch_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = []
        for before, after in zip((channels, *CLASSIFIER_WIDTHS), CLASSIFIER_WIDTHS, strict=False):
            convolution = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(after), nn.ReLU()]
            height, width = (height + 1) // 2, (width + 1) // 2
        flat = CLASSIFIER_WIDTHS[-1] * height * width
        layers += [nn.Flatten(), nn.Dropout(0.3), nn.Linear(flat, CLASSIFIER_FEATURES), nn.ReLU()]
        classes = len(dataset.meta.class_names)
        classifier = nn.Sequential(nn.Sequential(*layers), nn.Linear(CLASSIFIER_FEATURES, classes))
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
        for _ in range(epochs):
            for indices in torch.randperm(count)[: batches * batch_size].split(batch_size):
                logits = classifier(_shifted(grids[indices]))  # (B, classes)
                loss = F.cross_entropy(logits, labels[indices])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return classifier.eval()


def _shifted(grids):
    """Grids (B, C, H, W), each shifted in time, with silence where it came from, and in level."""
    batch, width = grids.shape[0], grids.shape[-1]
    most = width // 8
    columns = torch.arange(width) - torch.randint(-most, most + 1, (batch, 1))  # (B, W), where they are from
    inside = ((columns >= 0) & (columns < width))[:, None, None]  # (B, 1, 1, W)
    moved = grids.gather(3, columns.clamp(0, width - 1)[:, None, None].expand_as(grids))
    level = 0.15 * (2 * torch.rand(batch, 1, 1, 1) - 1)
    return (torch.where(inside, moved, -1.0) + level).clamp(-1, 1)


@torch.no_grad()
def generated_scores(spectrograms, labels, classifier, train, test):
    """How good generated spectrograms are, and whether they are copies of training ones.

    Args:
        spectrograms: (N, C, H, W) in [-1, 1], on the CPU, at least 2; labels: (N,), what they should be.
        classifier: of `fit_classifier`, fitted on `train`.
        train, test: `spectrograms.Spectrograms` of the model's training and of none.

    Returns:
        dict: count; accuracy, the part that the classifier takes for its label, and accuracy_se;
        frechet, the `frechet_distance` of its features to those of test (only numbers of equal count are to
        be compared); nearest, the median over the spectrograms of their root-mean-square distance to the
        nearest one of train; copies, the part that is nearer to one of train than any one of test is.

    Raises ValueError for shapes that do not fit.
    """
    if spectrograms.shape[1:] != test.spectrograms.shape[1:] or labels.shape != spectrograms.shape[:1]:
        raise ValueError(
            f"spectrograms have shape {tuple(spectrograms.shape)} and labels {tuple(labels.shape)}; pass "
            f"(N, {', '.join(map(str, test.spectrograms.shape[1:]))}) and (N,)"
        )
    features, there = (classifier[0](grids) for grids in (spectrograms, test.spectrograms))  # (N, F), (M, F)
    right = classifier[1](features).argmax(1) == labels  # (N,)
    accuracy, error = _mean_and_error(right.double().numpy())
    nearest, unseen = (
        torch.cdist(grids.flatten(1), train.spectrograms.flatten(1)).amin(1) / grids[0].numel() ** 0.5
        for grids in (spectrograms, test.spectrograms)
    )  # (N,), (M,)
    return {
        "count": len(spectrograms),
        "accuracy": accuracy,
        "accuracy_se": error,
        "frechet": frechet_distance(features, there),
        "nearest": nearest.median().item(),
        "copies": (nearest < unseen.min()).double().mean().item(),
    }


def evaluate_generated(
    model,
    classifier,
    train,
    test,
    *,
    guidances=(0.0, 1.0, 1.5, 2.5, 4.0),
    method="heun",
    steps=25,
    seed=0,
    max_batch=100,
):
    """`generated_scores` by guidance scale, one spectrogram for each of test, with its label.

    Args:
        model: a `LocalMamba2D` with classes; it samples on its own device.
        classifier, train, test: as in `generated_scores`.
        guidances: scales of classifier-free guidance; at 0 the model does not look at the label.
        method, steps: of `local_mamba.sample_grids`; seed: of the noise, which is the same at every scale.
        max_batch: how many are sampled at once.

    Returns:
        list of dicts: source and guidance, then as `generated_scores`. Two rows say what there is to reach:
        "test clips" (at distance 0 of themselves), and "training clips", as many: their Frechet distance is
        that of two sets of real clips, and all of them are copies.

    Raises ValueError for no guidances and as `sample_grids` and `generated_scores`.
    """
    if len(guidances) == 0:
        raise ValueError("guidances is empty; pass scales such as (1.0, 2.5)")
    _check_counts(max_batch=max_batch)
    count = min(len(train), len(test))
    sets = [
        ("test clips", None, test.spectrograms, test.labels),
        ("training clips", None, train.spectrograms[:count], train.labels[:count]),
    ]
    for guidance in guidances:
        generator = torch.Generator().manual_seed(seed)
        made = [
            sample_grids(
                model,
                len(labels),
                *test.spectrograms.shape[2:],
                labels=labels,
                guidance=guidance,
                method=method,
                steps=steps,
                generator=generator,
            ).cpu()
            for labels in test.labels.split(max_batch)
        ]
        sets.append(("generated", guidance, torch.cat(made), test.labels))
    return [
        {
            "source": source,
            "guidance": guidance,
            **generated_scores(grids, labels, classifier, train, test),
        }
        for source, guidance, grids, labels in sets
    ]


def format_generated(rows):
    """Rows of `evaluate_generated` as an aligned text table."""
    if not rows:
        raise ValueError("rows is empty; pass the result of evaluate_generated")
    lines = [
        [
            row["source"],
            "-" if row["guidance"] is None else f"{row['guidance']:g}",
            str(row["count"]),
            _plus_minus(100 * row["accuracy"], 100 * row["accuracy_se"], 1, False),
            f"{row['frechet']:.2f}",
            f"{row['nearest']:.3f}",
            f"{100 * row['copies']:.1f}",
        ]
        for row in rows
    ]
    head = ["source", "guidance", "count", "accuracy (%)", "Frechet", "nearest training clip", "copies (%)"]
    return align(head, lines, left=1)


def mixer_costs(config, sizes=(64, 128, 256), *, batch_size=1, repeats=1, device="cpu"):
    """What a `LocalMamba2D` costs beside its twin with attention in place of the scans, the rest alike.

    Args:
        config: `LocalMamba2DConfig`; both of `MIXERS` are built from it.
        sizes: sides of square grids.
        batch_size: grids.
        repeats: the smallest of so many times counts; the first pass of all is not timed. 0: nothing is run,
            and seconds and memory are None.
        device: where it is run.

    Returns:
        list of dicts, one a size and mixer: size, mixer; parameters, flops_forward and of these flops_scan,
        as in `model_cost`; seconds of a forward and backward pass; memory, the bytes that it held at most
        beyond weights and gradients (None where no allocation was recorded; not what the native scan
        allocates for itself).

    Raises ValueError for no sizes, counts below 1 and negative repeats.
    """
    if len(sizes) == 0:
        raise ValueError("sizes is empty; pass sides such as (64, 128)")
    _check_counts(batch_size=batch_size, **{f"sizes[{i}]": size for i, size in enumerate(sizes)})
    if repeats != 0:
        _check_counts(repeats=repeats)
    device, rows = _check_device(device), []
    with _own_random(device):
        for size, mixer in itertools.product(sizes, MIXERS):
            with torch.device("meta" if repeats == 0 else device):
                model = LocalMamba2D(replace(config, mixer=mixer)).train()
            batch = {**grid_batch(config, size, batch_size), "t": torch.full((batch_size,), 0.5)}
            given = (batch.get(key) for key in ("spectrograms", "t", "labels", "captions"))
            cost = _cost(model, [None if x is None else x.to("meta") for x in given])
            row = {"size": size, "mixer": mixer}
            row |= {key: cost[key] for key in ("parameters", "flops_forward", "flops_scan")}
            rows.append(row | _step_cost(model, batch, repeats, device))
    return rows


def _own_random(device):
    """torch's own generators as they were, afterwards."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def grid_batch(config, size, batch_size):
    """A batch of square grids of noise that a `LocalMamba2D` of this config can be trained on, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"spectrograms": (config.channels, size, size), "captions": (config.caption_dim,)}
    batch = {"labels": torch.arange(batch_size) % max(1, config.num_classes)}
    batch |= {key: torch.randn(batch_size, *shape, generator=generator) for key, shape in shapes.items()}
    return {key: batch[key] for key in batch_keys(config)}


def _step_cost(model, batch, repeats, device):
    """Seconds and peak memory of a forward and backward pass of `grid_flow_loss`."""
    if repeats == 0:
        return {"seconds": None, "memory": None}
    batch = {key: value.to(device) for key, value in batch.items()}

    def call():
        grid_flow_loss(model, batch, t=batch["t"]).backward()

    seconds = best_seconds(call, device, repeats)  # the gradients' memory is taken after it
    return {"seconds": seconds, "memory": peak_bytes(call, device)}


def format_mixer_costs(rows):
    """Rows of `mixer_costs` as an aligned text table; below each pair, scans over attention."""
    if not rows:
        raise ValueError("rows is empty; pass the result of mixer_costs")
    units = {"parameters": 1e6, "flops_forward": 1e9, "seconds": 1e-3, "memory": 2**20}

    def cells(row, scales):
        values = {key: row[key] for key in units}
        return ["-" if value is None else f"{value / scales[key]:,.2f}" for key, value in values.items()]

    lines = []
    for size in dict.fromkeys(row["size"] for row in rows):
        pair = {row["mixer"]: row for row in rows if row["size"] == size}
        lines += [[f"{size} x {size}", mixer, *cells(row, units)] for mixer, row in pair.items()]
        lines.append([f"{size} x {size}", "ratio", *cells(pair["ssm"], pair["attention"])])
    head = ["size", "mixer", "parameters (M)", "GFLOP forward", "ms a step", "MiB a step"]
    return align(head, lines, left=2)


# ---------------------------------------------------------------- seed 000's validation checklist


def local_mamba_checklist(config, *, size=64, batch_size=2, device="cpu"):
    """Seed 000's checklist of a `LocalMamba2D`, beside the kernels, which `kernels.self_check` checks.

    A step of training gives every parameter a finite gradient that is not zero; a condition that is dropped
    is zero, in training and in the unconditional half of guidance; the cost beside the twin with attention
    (`mixer_costs`), which is measured, not judged.

    Args:
        config: `LocalMamba2DConfig`.
        size, batch_size: of the square grids; device: where it is run.

    Returns:
        list of dicts: item; ok, whether it holds; found, a text: what was measured, or why it does not hold.
    """
    device = _check_device(device)
    checks = {
        "forward and backward": _check_gradients,
        "classifier-free guidance": _check_dropping,
        "cost": _check_cost,
    }
    rows = []
    for item, check in checks.items():
        try:
            with _own_random(device):
                torch.manual_seed(0)
                found = check(config, size, batch_size, device)
            rows.append({"item": item, "ok": True, "found": found})
        except (ValueError, RuntimeError) as error:  # torch's, where it cannot run
            rows.append({"item": item, "ok": False, "found": f"{type(error).__name__}: {error}"})
    return rows


def _untrained(config, device):
    """A LocalMamba that starts at no zeros, at which some gradients vanish."""
    model = LocalMamba2D(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    return model.to(device)


def _check_gradients(config, size, batch_size, device):
    model = _untrained(config, device).train()
    batch = {key: value.to(device) for key, value in grid_batch(config, size, batch_size).items()}
    loss = grid_flow_loss(model, batch, drop=torch.zeros(batch_size, dtype=torch.bool, device=device))
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    bad = [name for name, g in gradients.items() if g is None or not (g.isfinite().all() and g.any())]
    if bad:
        raise ValueError(f"loss {loss.item():.3g}; gradients missing, zero or not finite: {', '.join(bad)}")
    return f"{batch_size} x {size} x {size}, loss {loss.item():.3f}, {len(gradients)} gradients"


def _check_dropping(config, size, batch_size, device):
    if batch_keys(config) == ("spectrograms",):
        return "the model takes no condition"
    model = _untrained(config, device)
    seen = []
    model.mapping.register_forward_pre_hook(
        lambda module, given: seen.append(given[0][:, config.mapping_width :].ne(0).any(1).tolist())
    )  # of each sample, whether anything but the time reaches the mapping network
    batch = {key: value.to(device) for key, value in grid_batch(config, size, batch_size).items()}
    grids = batch.pop("spectrograms")
    with torch.no_grad():
        for dropped in (False, True):
            drop = torch.full((batch_size,), dropped, device=device)
            grid_flow_loss(model, {"spectrograms": grids, **batch}, drop=drop)
        guided_velocity(model, **batch, guidance=2.0)(grids, torch.tensor(0.5))
    known, unknown = [True] * batch_size, [False] * batch_size
    if seen != [known, unknown, known + unknown]:
        raise ValueError(f"whose condition is not zero: kept {seen[0]}, dropped {seen[1]}, guided {seen[2]}")
    return "a dropped condition is zero, in training and in guidance"


def _check_cost(config, size, batch_size, device):
    scans, attention = mixer_costs(config, (size,), batch_size=batch_size, device=device)
    keys = {"FLOPs": "flops_forward", "memory": "memory", "time": "seconds", "parameters": "parameters"}
    ratios = [f"{name} {scans[key] / attention[key]:.2f}" for name, key in keys.items() if scans[key]]
    return f"{', '.join(ratios)} of attention's (seed 000: 0.85 to 0.90)"
