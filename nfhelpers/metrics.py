"""Image quality and calibration: arrays or tensors `(N, H, W, 3)` in [0, 1], one number per image.

All computation is in float64. `mean_and_error` turns the numbers of many images into mean and standard error,
`paired_test` tells whether two methods differ on them.
"""

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from scipy.stats import ttest_1samp, wilcoxon
from skimage.metrics import structural_similarity

__all__ = [
    "calibration",
    "grid_pattern",
    "mean_and_error",
    "paired_test",
    "psnr",
    "sharpness",
    "speckle",
    "ssim",
]

SSIM_WINDOW = 11
"""Side in pixels of the window of `ssim`: the smallest image it can compare."""

_TOLERANCE = 1e-4  # how far outside [0, 1] rounding may take a value


def psnr(prediction, target) -> np.ndarray:
    """Peak signal-to-noise ratio in dB: float64 (N,).

    `-10 log10(mean squared error over pixels and channels)`, as the peak is 1. Identical images give inf.
    Raises ValueError unless both are finite floats `(N, H, W, 3)` in [0, 1] of one shape.
    """
    prediction, target = _pair(prediction, target)
    error = ((prediction - target) ** 2).mean(axis=(1, 2, 3))  # (N,)
    with np.errstate(divide="ignore"):
        return -10 * np.log10(error)


def ssim(prediction, target) -> np.ndarray:
    """Structural similarity (Wang et al., 2004): float64 (N,), 1 for identical images.

    As in the paper: Gaussian window of 11 x 11 pixels and sigma 1.5, K1 = 0.01, K2 = 0.03, population
    covariance, data range 1. It is computed for each channel and averaged over the channels and over the
    pixels whose window lies inside the image.
    Raises ValueError unless both are finite floats `(N, H, W, 3)` in [0, 1] of one shape with sides >= 11.
    """
    prediction, target = _pair(prediction, target, smallest=SSIM_WINDOW)
    values = [
        structural_similarity(
            *images,
            data_range=1.0,
            channel_axis=-1,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for images in zip(prediction, target, strict=True)
    ]
    return np.array(values)


def speckle(prediction, target, flat: float = 0.1) -> np.ndarray:
    """High-frequency error in the flat regions of the target, as the sigma of white noise: float64 (N,).

    With the residual `r = prediction - target` and its high-pass `h = r - mean of r over 3 x 3`,

        speckle = sqrt(9/8 * mean of h**2 over flat pixels and channels).

    A pixel is flat if over its 3 x 3 neighbourhood every channel of the target varies by at most `flat`
    (maximum minus minimum); the outermost pixels are left out. White noise of standard deviation s has
    E[h**2] = 8/9 s**2, so the unit is that of the images and white noise of sigma s scores s. A perfect
    prediction scores 0, and an offset that varies linearly in space adds nothing. A blur adds no speckle and
    is charged only for the faint texture it removes in flat regions and for what it moves there across an
    edge: 0.006 to 0.013 on the 32 px photographs for a Gaussian blur of 0.5 to 2 px, however wide, where
    noise of sigma 0.05 scores 0.048. An image without flat pixels scores NaN.

    Raises ValueError unless both are finite floats `(N, H, W, 3)` in [0, 1] of one shape with sides >= 3, and
    `flat` is in (0, 1].
    """
    prediction, target = _pair(prediction, target, smallest=3)
    if not 0 < flat <= 1:
        raise ValueError(f"flat={flat!r} is outside (0, 1]; pass a range of intensities such as 0.1")
    residual = prediction - target
    around = sliding_window_view(residual, (3, 3), axis=(1, 2)).mean(axis=(-2, -1))  # (N, H-2, W-2, 3)
    high = residual[:, 1:-1, 1:-1] - around
    windows = sliding_window_view(target, (3, 3), axis=(1, 2))  # (N, H-2, W-2, 3, 3, 3)
    varies = windows.max(axis=(-2, -1)) - windows.min(axis=(-2, -1))
    is_flat = (varies <= flat).all(axis=-1)  # (N, H-2, W-2)
    energy = ((high**2).mean(axis=-1) * is_flat).sum(axis=(1, 2))
    count = is_flat.sum(axis=(1, 2))
    return np.sqrt(9 / 8 * np.divide(energy, count, out=np.full(len(count), np.nan), where=count > 0))


def sharpness(prediction, target) -> np.ndarray:
    """Mean absolute gradient of the prediction over that of the target: float64 (N,).

    Differences of neighbouring pixels, along rows and along columns. 1 is as sharp as the target, below 1
    blurred; noise counts as sharp. A constant target gives inf, or NaN if the prediction is constant too.
    Raises ValueError unless both are finite floats `(N, H, W, 3)` in [0, 1] of one shape with sides >= 2.
    """
    gradients = [
        np.abs(np.diff(field, axis=1)).mean(axis=(1, 2, 3))
        + np.abs(np.diff(field, axis=2)).mean(axis=(1, 2, 3))
        for field in _pair(prediction, target, smallest=2)
    ]
    with np.errstate(divide="ignore", invalid="ignore"):
        return gradients[0] / gradients[1]


def grid_pattern(prediction, target, period: int) -> np.ndarray:
    """How much of the error repeats with a period, as the seams of a coarser grid do: float64 (N,).

    With the error `e = prediction - target` and `p` its mean over all cells of `period` x `period` pixels,
    less the mean of `e`: the root of `mean p**2 / mean e**2`. 1 if the error is nothing but such a pattern, 0
    for a constant error; white noise scores about `sqrt(period**2 / (H W))`. A perfect prediction gives NaN.

    Raises ValueError unless both are finite floats `(N, H, W, 3)` in [0, 1] of one shape and `period` is at
    least 2 and divides H and W.
    """
    prediction, target = _pair(prediction, target)
    count, height, width, _ = target.shape
    if period < 2 or height % period or width % period:
        raise ValueError(
            f"period={period} does not divide {height} x {width}; pass 2 for a 64 px field of a 32 px grid"
        )
    error = prediction - target
    cells = error.reshape(count, height // period, period, width // period, period, 3)
    repeating = cells.mean(axis=(1, 3)) - error.mean(axis=(1, 2))[:, None, None]  # (N, period, period, 3)
    with np.errstate(invalid="ignore"):
        return np.sqrt(np.square(repeating).mean(axis=(1, 2, 3)) / np.square(error).mean(axis=(1, 2, 3)))


def calibration(mean, std, target) -> dict[str, float]:
    """Does the spread of posterior samples match the error of their mean? Pooled over all images.

    Args:
        mean, target: `(N, H, W, 3)` in [0, 1].
        std: `(N, H, W, 3)`, per-pixel standard deviation in that unit (half of that in a model's [-1, 1]).

    Returns a dict of floats:
        rmse: root mean squared error of the mean (the skill);
        spread: root mean squared std;
        ratio: spread / rmse, inf if only rmse is 0, NaN if both are. 1 is calibrated, below 1 overconfident.
            For the mean of K exact samples and their unbiased std, sqrt(K/(K+1)) is to be expected (Fortin et
            al., 2014);
        within_1_std, within_2_std: fraction of values whose error is at most 1 or 2 std. Calibrated Gaussians
            have 0.683 and 0.954.

    Raises ValueError unless all have one shape `(N, H, W, 3)`, mean and target are finite floats in [0, 1],
    and std is finite and >= 0.
    """
    mean, target = _pair(mean, target, name="mean")
    std = _images("std", std)
    if std.shape != mean.shape:
        raise ValueError(f"std is {std.shape}, mean is {mean.shape}; pass one shape (N, H, W, 3)")
    if not np.isfinite(std).all():
        raise ValueError("std is not finite everywhere; a standard deviation needs at least 2 draws")
    if (std < 0).any():
        raise ValueError(f"std has the negative value {std.min():g}; pass standard deviations >= 0")
    error = np.abs(mean - target)
    rmse, spread = np.sqrt((error**2).mean()), np.sqrt((std**2).mean())
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = spread / rmse
    return {
        "rmse": float(rmse),
        "spread": float(spread),
        "ratio": float(ratio),
        "within_1_std": float((error <= std).mean()),
        "within_2_std": float((error <= 2 * std).mean()),
    }


def mean_and_error(values) -> tuple[float, float]:
    """Mean and standard error (sample standard deviation / sqrt(n)) of numbers `(n,)`.

    NaN, which a metric gives where it is undefined, is left out. The error of a single number is NaN, and so
    are both of none. An infinite number makes the mean infinite and the error NaN.
    Raises ValueError unless `values` are floats of one dimension.
    """
    values = _numbers("values", values)
    if values.ndim != 1:
        raise ValueError(f"values are {values.shape}; pass one number an image, (n,)")
    values = values[~np.isnan(values)]
    if len(values) == 0:
        return float("nan"), float("nan")
    mean = float(values.mean())
    if len(values) == 1 or not np.isfinite(mean):
        return mean, float("nan")
    return mean, float(values.std(ddof=1) / np.sqrt(len(values)))


def paired_test(differences) -> tuple[float, float]:
    """Do two methods differ, given the differences `(n,)` of their scores on the same images?

    Returns the two-sided p-values of the paired t-test, which assumes differences that are about normal, and
    of Wilcoxon's signed-rank test (1945), which assumes only that they are symmetric and leaves out zeros.
    Differences that are not finite are left out. Both p-values are NaN where nothing can be tested: fewer
    than two differences, or all of them equal, as those of a method and itself.
    Raises ValueError unless `differences` are floats of one dimension.
    """
    differences = _numbers("differences", differences)
    if differences.ndim != 1:
        raise ValueError(f"differences are {differences.shape}; pass one number an image, (n,)")
    differences = differences[np.isfinite(differences)]
    if len(differences) < 2 or np.ptp(differences) == 0:
        return float("nan"), float("nan")
    return float(ttest_1samp(differences, 0).pvalue), float(wilcoxon(differences).pvalue)


def _pair(prediction, target, smallest=1, name="prediction"):
    prediction, target = _unit_images(name, prediction), _unit_images("target", target)
    if prediction.shape != target.shape:
        raise ValueError(
            f"{name} is {prediction.shape}, target is {target.shape}; pass one shape (N, H, W, 3)"
        )
    if min(target.shape[1:3]) < smallest:
        raise ValueError(f"images are {target.shape[1]} x {target.shape[2]}; pass sides >= {smallest}")
    return prediction, target


def _unit_images(name, images):
    images = _images(name, images)
    if not np.isfinite(images).all():
        raise ValueError(f"{name} has {(~np.isfinite(images)).sum()} values that are not finite")
    smallest, largest = images.min(), images.max()
    if smallest < -_TOLERANCE or largest > 1 + _TOLERANCE:
        raise ValueError(
            f"{name} has values in [{smallest:g}, {largest:g}]; pass [0, 1], such as to_image(values)"
        )
    return images


def _images(name, images):
    array = _numbers(name, images)
    if array.ndim != 4 or array.shape[-1] != 3 or array.size == 0:
        hint = f", such as {name}[None]" if array.ndim == 3 else ""
        raise ValueError(f"{name} is {array.shape}; pass images (N, H, W, 3) with N >= 1{hint}")
    return array


def _numbers(name, values):
    """float64 array of a float array or tensor (bfloat16 too, which numpy lacks)."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        floating = values.is_floating_point()
    else:
        values = np.asarray(values)
        floating = values.dtype.kind == "f"
    if not floating:
        raise ValueError(f"{name} has dtype {values.dtype}; pass floats (uint8 images: divide by 255)")
    return values.double().numpy() if isinstance(values, torch.Tensor) else values.astype(np.float64)
