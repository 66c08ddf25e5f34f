"""Image quality and calibration of arrays or tensors (N, H, W, 3) in [0, 1]: one float64 number an image."""

import numpy as np

from nfhelpers.images import to_unit


def psnr(prediction, target) -> np.ndarray:
    """Peak signal-to-noise ratio in dB, (N,): -10 log10 of the mean squared error; inf for equal images."""
    prediction, target = _pair(prediction, target)
    with np.errstate(divide="ignore"):
        return -10 * np.log10(np.square(prediction - target).mean(axis=(1, 2, 3)))


def ssim(prediction, target) -> np.ndarray:
    """Structural similarity, (N,), 1 for equal images; sides of at least 11 px. As in Wang et al., 2004:
    Gaussian window of 11 x 11 pixels and sigma 1.5, K1 = 0.01, K2 = 0.03."""
    from skimage.metrics import structural_similarity

    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    pairs = zip(*_pair(prediction, target), strict=True)
    return np.array([structural_similarity(*p, data_range=1.0, channel_axis=-1, **options) for p in pairs])


def speckle(prediction, target) -> np.ndarray:
    """High-frequency error in the flat regions of the target, as the sigma of white noise: (N,).
    sqrt(9/8 mean of h^2), where h is the error less its mean over 3 x 3: E[h^2] = 8/9 s^2 of white noise. A
    pixel is flat if each channel of the target varies by at most 0.1 over 3 x 3; NaN where none is."""
    prediction, target = _pair(prediction, target)
    windows = np.lib.stride_tricks.sliding_window_view
    residual = prediction - target
    high = residual[:, 1:-1, 1:-1] - windows(residual, (3, 3), axis=(1, 2)).mean(axis=(-2, -1))
    varies = np.ptp(windows(target, (3, 3), axis=(1, 2)), axis=(-2, -1))  # (N, H-2, W-2, 3)
    is_flat = (varies <= 0.1).all(axis=-1)  # (N, H-2, W-2)
    energy = (np.square(high).mean(axis=-1) * is_flat).sum(axis=(1, 2))
    count = is_flat.sum(axis=(1, 2))
    return np.sqrt(9 / 8 * np.divide(energy, count, out=np.full(len(count), np.nan), where=count > 0))


def crps(draws, target) -> np.ndarray:
    """Continuous ranked probability score of posterior samples (K, N, H, W, 3), K >= 2: (N,), 0 is perfect.
    Per pixel, mean |x_k - y| less half the mean |x_i - x_j| over pairs of draws: the fair estimator, whose
    expectation does not depend on K (Ferro, "Fair scores for ensemble forecasts", 2014)."""
    draws, target = _pair(draws, target, dims=5)
    count = len(draws)
    error = np.abs(draws - target).mean(axis=0)  # (N, H, W, 3)
    ranks = 2 * np.arange(count) - count + 1  # of sorted draws: they sum over the pairs
    spread = np.tensordot(ranks, np.sort(draws, axis=0), 1) / (count * (count - 1))
    return (error - spread).mean(axis=(1, 2, 3))


def spread_skill(draws, target, mask=None) -> float:
    """Spread of posterior samples (K, N, H, W, 3), K >= 2, over the error of their mean: 1 is calibrated.
    The root of mean unbiased variance times (K + 1)/K over mean squared error (Fortin et al., 2014); below 1
    is overconfident. mask (N, H, W): pixels to leave out, such as the observed ones."""
    draws, target = _pair(draws, target, dims=5)
    variance = draws.var(axis=0, ddof=1) * (1 + 1 / len(draws))  # (N, H, W, 3)
    error = np.square(draws.mean(axis=0) - target)
    kept = slice(None) if mask is None else ~np.asarray(mask, dtype=bool)
    return float(np.sqrt(variance[kept].mean() / error[kept].mean()))


def _pair(made, target, dims=4):
    """Both in float64. NumPy would broadcast other shapes."""
    made, target = to_unit(made, np.float64), to_unit(target, np.float64)
    if made.ndim != dims or made.shape[-4:] != target.shape or (dims == 5 and len(made) < 2):
        raise ValueError(f"{made.shape}, {target.shape}: pass (N, H, W, 3), K >= 2 draws (K, N, H, W, 3)")
    return made, target
