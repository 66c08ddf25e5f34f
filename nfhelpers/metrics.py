"""Image quality and calibration of arrays or tensors (N, H, W, 3) in [0, 1]: one float64 number an image."""

import numpy as np
import torch


def psnr(prediction, target) -> np.ndarray:
    """Peak signal-to-noise ratio in dB, (N,): -10 log10 of the mean squared error; inf for equal images."""
    prediction, target = _pair(prediction, target)
    with np.errstate(divide="ignore"):
        return -10 * np.log10(np.square(prediction - target).mean(axis=(1, 2, 3)))


def ssim(prediction, target) -> np.ndarray:
    """Structural similarity, (N,), 1 for equal images; sides of at least 11 px.

    As in Wang et al., 2004: Gaussian window of 11 x 11 pixels and sigma 1.5, K1 = 0.01, K2 = 0.03, averaged
    over the channels and the pixels whose window lies inside the image.
    """
    from skimage.metrics import structural_similarity

    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    pairs = zip(*_pair(prediction, target), strict=True)
    return np.array([structural_similarity(*p, data_range=1.0, channel_axis=-1, **options) for p in pairs])


def speckle(prediction, target, flat: float = 0.1) -> np.ndarray:
    """High-frequency error in the flat regions of the target, as the sigma of white noise: (N,).

    With r = prediction - target and h = r - mean of r over 3 x 3: sqrt(9/8 mean of h^2), as white noise of
    standard deviation s has E[h^2] = 8/9 s^2. A pixel is flat if each channel of the target varies by at most
    `flat` over its 3 x 3 neighbourhood. An image without flat pixels scores NaN.
    """
    prediction, target = _pair(prediction, target)
    windows = np.lib.stride_tricks.sliding_window_view
    residual = prediction - target
    high = residual[:, 1:-1, 1:-1] - windows(residual, (3, 3), axis=(1, 2)).mean(axis=(-2, -1))
    varies = np.ptp(windows(target, (3, 3), axis=(1, 2)), axis=(-2, -1))  # (N, H-2, W-2, 3)
    is_flat = (varies <= flat).all(axis=-1)  # (N, H-2, W-2)
    energy = (np.square(high).mean(axis=-1) * is_flat).sum(axis=(1, 2))
    count = is_flat.sum(axis=(1, 2))
    return np.sqrt(9 / 8 * np.divide(energy, count, out=np.full(len(count), np.nan), where=count > 0))


def crps(draws, target) -> np.ndarray:
    """Continuous ranked probability score of posterior samples (K, N, H, W, 3), K >= 2: (N,), 0 is perfect.

    Per pixel, mean |x_k - y| less half the mean |x_i - x_j| over pairs of draws, in their unit. It is the
    fair estimator: its expectation does not depend on K, and is smallest for the true posterior.
    Source: Ferro, "Fair scores for ensemble forecasts", 2014.
    """
    draws, target = _draws(draws, target)
    count = len(draws)
    error = np.abs(draws - target).mean(axis=0)  # (N, H, W, 3)
    ranks = 2 * np.arange(count) - count + 1  # of sorted draws: they sum over the pairs
    spread = np.tensordot(ranks, np.sort(draws, axis=0), 1) / (count * (count - 1))
    return (error - spread).mean(axis=(1, 2, 3))


def spread_skill(draws, target, mask=None) -> float:
    """Spread of posterior samples (K, N, H, W, 3), K >= 2, over the error of their mean: 1 is calibrated.

    The root of mean unbiased variance times (K + 1)/K over mean squared error; below 1 is overconfident.
    mask (N, H, W): pixels to leave out, such as the observed ones. Source: Fortin et al., 2014.
    """
    draws, target = _draws(draws, target)
    count = len(draws)
    variance = draws.var(axis=0, ddof=1) * (count + 1) / count  # (N, H, W, 3)
    error = np.square(draws.mean(axis=0) - target)
    kept = slice(None) if mask is None else ~np.asarray(mask, dtype=bool)
    return float(np.sqrt(variance[kept].mean() / error[kept].mean()))


def _pair(prediction, target):
    prediction, target = _unit("prediction", prediction), _unit("target", target)
    if prediction.shape != target.shape or target.ndim != 4:  # NumPy would broadcast
        raise ValueError(f"prediction is {prediction.shape}, target {target.shape}; pass one (N, H, W, 3)")
    return prediction, target


def _draws(draws, target):
    draws, target = _unit("draws", draws), _unit("target", target)
    if draws.shape[1:] != target.shape or len(draws) < 2:
        raise ValueError(f"draws are {draws.shape}, target {target.shape}; pass (K, N, H, W, 3), K >= 2")
    return draws, target


def _unit(name, images):
    """float64 array of floats in [0, 1]; bytes, or a model's [-1, 1], would give wrong scores silently."""
    images = images.detach().cpu().double().numpy() if isinstance(images, torch.Tensor) else images
    images = np.asarray(images, dtype=np.float64)
    if images.size and not (images.min() >= -1e-4 and images.max() <= 1 + 1e-4):
        raise ValueError(f"{name} has values in [{images.min():g}, {images.max():g}]; pass [0, 1]")
    return images
