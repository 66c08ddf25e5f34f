import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from scipy.stats import ttest_rel, wilcoxon

from nfhelpers.metrics import (
    calibration,
    grid_pattern,
    mean_and_error,
    paired_test,
    psnr,
    sharpness,
    speckle,
    ssim,
)


def images(seed=0, count=3, side=16):
    return np.random.default_rng(seed).random((count, side, side, 3))


def test_psnr_of_constant_offsets():
    target = np.full((3, 8, 8, 3), 0.5)
    offsets = np.array([0.1, 0.01, 0.5])
    np.testing.assert_allclose(
        psnr(target + offsets[:, None, None, None], target), [20, 40, 20 * np.log10(2)]
    )


def test_psnr_is_per_image_and_infinite_for_identical_images():
    target = images()
    prediction = target.copy()
    prediction[1] = np.clip(target[1] + 0.1, 0, 1)
    values = psnr(prediction, target)
    assert values.shape == (3,) and values.dtype == np.float64
    assert np.isposinf(values[[0, 2]]).all() and np.isfinite(values[1])


def test_ssim_of_identical_images_is_one():
    np.testing.assert_allclose(ssim(images(), images()), 1)


def test_ssim_of_flat_images_is_the_luminance_term():
    # Without variance only (2ab + C1) / (a^2 + b^2 + C1) remains, C1 = 0.01^2.
    a, b = 0.3, 0.6
    expected = (2 * a * b + 1e-4) / (a**2 + b**2 + 1e-4)
    np.testing.assert_allclose(ssim(np.full((1, 12, 12, 3), a), np.full((1, 12, 12, 3), b)), [expected])


def test_ssim_is_the_formula_of_the_paper_at_one_window():
    # An 11 x 11 image has one whole window, so SSIM is one evaluation of Wang et al. (2004), equation 13.
    x, y = images(1, 1, 11), images(2, 1, 11)
    profile = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window = np.outer(profile, profile)[..., None] / profile.sum() ** 2

    def mean(image):
        return (window * image[0]).sum(axis=(0, 1))

    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    expected = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    np.testing.assert_allclose(ssim(x, y), [expected.mean()], rtol=1e-10)


def test_speckle_of_white_noise_is_its_sigma():
    target = np.full((2, 64, 64, 3), 0.5)
    noise = np.random.default_rng(0).normal(size=target.shape) * np.array([0.02, 0.05])[:, None, None, None]
    np.testing.assert_allclose(speckle(target + noise, target), [0.02, 0.05], rtol=0.03)


def test_speckle_is_zero_for_perfect_and_for_linearly_varying_offsets():
    target = np.full((1, 20, 20, 3), 0.4)
    ramp = np.linspace(0, 0.3, 20)[None, :, None, None] + np.linspace(-0.2, 0.1, 20)[None, None, :, None]
    assert speckle(target, target) == 0
    np.testing.assert_allclose(speckle(target + ramp, target), 0, atol=1e-12)


def test_speckle_of_a_checkerboard():
    # On +-e the 3 x 3 mean is +-e/9 (5 of one sign, 4 of the other), so |h| = 8/9 e everywhere.
    i, j = np.indices((10, 10))
    board = np.where((i + j) % 2, 0.09, -0.09)[None, :, :, None]
    target = np.full((1, 10, 10, 3), 0.5)
    np.testing.assert_allclose(speckle(target + board, target), [np.sqrt(9 / 8) * 8 / 9 * 0.09])


def test_speckle_counts_flat_regions_only():
    target = np.full((1, 20, 20, 3), 0.2)
    target[:, :, 10:] = np.random.default_rng(0).random((1, 20, 10, 3))  # texture
    prediction = target.copy()
    prediction[:, :, 12:] = 0.5  # wrong only where the target is textured
    assert speckle(prediction, target) == 0
    prediction[:, 5, 5] += 0.1
    assert speckle(prediction, target) > 0


def discs(side=64):
    """Two flat regions on a gentle slope, a sharp edge between them: (1, side, side, 3)."""
    y, x = (np.indices((side, side)) + 0.5) / side
    inside = (x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.08
    return np.repeat((np.where(inside, 0.7, 0.3) + 0.1 * (x - 0.5))[None, :, :, None], 3, axis=-1)


def test_speckle_grows_with_synthetic_speckle_and_only_with_it():
    """Noise of sigma s on an image with edges scores s; a blur, however wide, next to nothing."""
    target = discs()
    noise = np.random.default_rng(0).normal(size=target.shape)
    amplitudes = np.array([0, 0.005, 0.01, 0.02, 0.03, 0.045, 0.06])
    scores = np.array([speckle(target + a * noise, target)[0] for a in amplitudes])
    assert (np.diff(scores) > 0).all()
    np.testing.assert_allclose(scores, amplitudes, rtol=0.05)
    for width in (0.5, 1, 2, 4):
        blurred = gaussian_filter(target, (0, width, width, 0))
        assert speckle(blurred, target) < 0.1 * scores[-1]
    smooth = gaussian_filter(target + 0.06 * noise, (0, 2, 2, 0))
    assert speckle(smooth, target) < 0.2 * scores[-1], "smoothing takes speckle away"


def test_speckle_is_insensitive_to_edges():
    """The same noise scores the same with and without edges, and an edge in a wrong place is not speckle."""
    noise = 0.05 * np.random.default_rng(1).normal(size=(1, 64, 64, 3))
    flat, edges = np.full((1, 64, 64, 3), 0.5), discs()
    np.testing.assert_allclose(speckle(edges + noise, edges), speckle(flat + noise, flat), rtol=0.03)
    sharpened = np.where(edges > 0.5, edges + 0.15, edges)  # wrong in one region, steeper at the edge
    assert speckle(sharpened, edges) < 1e-6


def test_speckle_without_flat_pixels_is_undefined():
    i, j = np.indices((8, 8))
    board = np.repeat(((i + j) % 2)[None, :, :, None], 3, axis=-1).astype(float)
    assert np.isnan(speckle(board, board)).all()


def test_calibration_of_matching_gaussians():
    rng = np.random.default_rng(0)
    std = rng.uniform(0.02, 0.08, (4, 32, 32, 3))
    target = np.full(std.shape, 0.5)
    mean = np.clip(target + std * rng.normal(size=std.shape), 0, 1)
    result = calibration(mean, std, target)
    assert result["ratio"] == pytest.approx(1, abs=0.03)
    assert result["rmse"] == pytest.approx(np.sqrt(((mean - target) ** 2).mean()))
    assert result["spread"] == pytest.approx(np.sqrt((std**2).mean()))
    assert result["within_1_std"] == pytest.approx(0.683, abs=0.015)
    assert result["within_2_std"] == pytest.approx(0.954, abs=0.01)


def test_calibration_of_few_exact_draws_has_the_documented_ratio():
    rng = np.random.default_rng(1)
    draws = 0.5 + 0.05 * rng.normal(size=(4, 2, 64, 64, 3))
    target = 0.5 + 0.05 * rng.normal(size=(2, 64, 64, 3))
    ratio = calibration(draws.mean(axis=0), draws.std(axis=0, ddof=1), target)["ratio"]
    assert ratio == pytest.approx(np.sqrt(4 / 5), abs=0.02)


def test_calibration_at_zero_error():
    target = images()
    assert calibration(target, np.full(target.shape, 0.1), target)["ratio"] == np.inf
    zero = calibration(target, np.zeros(target.shape), target)
    assert np.isnan(zero["ratio"]) and zero["within_1_std"] == 1


def test_mean_and_error():
    mean, error = mean_and_error(np.array([1.0, 2.0, 3.0, 4.0]))
    assert mean == 2.5 and error == pytest.approx(np.sqrt(5 / 3) / 2)
    assert mean_and_error([1.0, float("nan"), 3.0]) == (2.0, 1.0)
    assert mean_and_error([2.0])[0] == 2 and np.isnan(mean_and_error([2.0])[1])
    assert np.isnan(mean_and_error([float("nan")])).all()
    assert mean_and_error([1.0, float("inf")])[0] == np.inf
    with pytest.raises(ValueError, match=r"\(2, 2\)"):
        mean_and_error(np.ones((2, 2)))


def test_paired_test_is_scipys_on_the_pairs():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=20), rng.normal(0.5, size=20)
    expected = ttest_rel(b, a).pvalue, wilcoxon(b, a).pvalue
    assert paired_test(b - a) == pytest.approx(expected)
    assert paired_test([*(b - a), np.nan, np.inf]) == pytest.approx(expected)
    # By hand: 1, 2, 3 have mean 2 and error 1/sqrt(3), so t = 2 sqrt(3) with 2 degrees of freedom; of 8 ways
    # to choose signs, 2 are all alike.
    t = 2 * 3**0.5
    assert paired_test([1.0, 2.0, 3.0]) == pytest.approx((1 - t / (2 + t**2) ** 0.5, 0.25))


@pytest.mark.parametrize("differences", [[], [1.0], [0.0] * 5, [0.1] * 5, [np.nan, 1.0]])
def test_paired_test_is_undefined_without_variation(differences):
    assert np.isnan(paired_test(np.array(differences, dtype=float))).all()


def test_paired_test_refuses_anything_but_one_number_a_pair():
    with pytest.raises(ValueError, match=r"differences are \(2, 2\); pass one number an image"):
        paired_test(np.ones((2, 2)))
    with pytest.raises(ValueError, match="differences has dtype int64"):
        paired_test([1, 2, 3])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("metric", [psnr, ssim, speckle])
def test_tensors_and_arrays_give_the_same(metric, dtype):
    prediction = (0.5 + torch.from_numpy(images(1)) * 0.02).to(dtype).requires_grad_()
    target = (0.5 + torch.from_numpy(images(2)) * 0.02).to(dtype)
    values = metric(prediction, target)
    assert isinstance(values, np.ndarray) and np.isfinite(values).all()
    np.testing.assert_array_equal(
        values, metric(prediction.detach().double().numpy(), target.double().numpy())
    )


def test_sharpness_is_the_ratio_of_gradients():
    target = images()
    blurred = 0.5 + 0.3 * (target - 0.5)
    np.testing.assert_allclose(sharpness(blurred, target), [0.3] * 3)
    np.testing.assert_allclose(sharpness(target, target), [1] * 3)
    flat = np.full((1, 4, 4, 3), 0.5)
    assert sharpness(target[:1, :4, :4], flat) == [np.inf] and np.isnan(sharpness(flat, flat)).all()
    # Not the same along rows and columns: stripes of height 1 have differences of 1 down and 0 across.
    stripes = np.broadcast_to((np.arange(4) % 2.0)[None, :, None, None], (1, 4, 4, 3))
    np.testing.assert_allclose(sharpness(stripes, 0.5 * stripes), [2])


def test_grid_pattern_of_known_errors():
    target = np.full((1, 8, 8, 3), 0.5)
    board = 0.2 * (np.indices((8, 8)).sum(0)[None, :, :, None] % 2) * np.ones(3)
    constant = np.full_like(target, 0.1)
    np.testing.assert_allclose(grid_pattern(target + board - 0.1, target, 2), [1])
    np.testing.assert_allclose(grid_pattern(target + constant, target, 2), [0], atol=1e-7)
    # An offset of 0.1 and a pattern of 0.1 have equal shares of the squared error.
    np.testing.assert_allclose(grid_pattern(target + board, target, 2), [0.5**0.5])
    assert np.isnan(grid_pattern(target, target, 2)).all()
    noise = np.random.default_rng(1).uniform(-0.1, 0.1, (50, 32, 32, 3))
    noisy = grid_pattern(0.5 + noise, np.full_like(noise, 0.5), 4)
    assert noisy.mean() == pytest.approx((16 / 1024) ** 0.5, rel=0.05)
    for period in (1, 3):
        with pytest.raises(ValueError, match=f"period={period} does not divide 8 x 8"):
            grid_pattern(target, target, period)


@pytest.mark.parametrize(
    "metric",
    [psnr, ssim, speckle, sharpness, lambda a, b: grid_pattern(a, b, 2)],
    ids=["psnr", "ssim", "speckle", "sharpness", "grid_pattern"],
)
def test_wrong_images_are_refused(metric):
    good = images()
    with pytest.raises(ValueError, match="uint8.*divide by 255"):
        metric((good * 255).astype(np.uint8), good)
    with pytest.raises(ValueError, match=r"one shape"):
        metric(good[:2], good)
    with pytest.raises(ValueError, match=r"prediction\[None\]"):
        metric(good[0], good)
    with pytest.raises(ValueError, match="N >= 1"):
        metric(good[:0], good[:0])
    with pytest.raises(ValueError, match=r"N, H, W, 3"):
        metric(good.transpose(0, 3, 1, 2), good)
    with pytest.raises(ValueError, match=r"target has values in \[-"):
        metric(good, good * 2 - 1)
    bad = good.copy()
    bad[0, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="prediction has 1 values that are not finite"):
        metric(bad, good)


def test_too_small_images_and_wrong_options_are_refused():
    with pytest.raises(ValueError, match="sides >= 11"):
        ssim(images(side=10), images(side=10))
    with pytest.raises(ValueError, match="sides >= 3"):
        speckle(images(side=2), images(side=2))
    with pytest.raises(ValueError, match="flat=0"):
        speckle(images(), images(), flat=0)
    with pytest.raises(ValueError, match="at least 2 draws"):
        calibration(images(), np.full((3, 16, 16, 3), np.nan), images())
    with pytest.raises(ValueError, match="negative"):
        calibration(images(), -images(), images())
    with pytest.raises(ValueError, match="one shape"):
        calibration(images(), images(count=2), images())


def test_values_a_rounding_error_outside_are_accepted():
    target = np.ones((1, 4, 4, 3))
    assert psnr(target + 1e-6, target) == pytest.approx(120)
