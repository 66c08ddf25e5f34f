"""Metrics against closed forms."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from nfhelpers.metrics import crps, psnr, speckle, spread_skill, ssim


def images(seed=0, count=3, side=16):
    return np.random.default_rng(seed).random((count, side, side, 3))


def test_psnr_of_constant_offsets_and_of_equal_images():
    target, offsets = np.full((4, 8, 8, 3), 0.5), np.array([0.1, 0.01, 0.5, 0])
    values = psnr(target + offsets[:, None, None, None], target)
    np.testing.assert_allclose(values, [20, 40, 20 * np.log10(2), np.inf])


def test_ssim_is_the_formula_of_the_paper_at_one_window():
    # An 11 x 11 image has one whole window, so SSIM is one evaluation of Wang et al. (2004), equation 13.
    x, y = images(1, 1, 11), images(2, 1, 11)
    profile = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window = np.outer(profile, profile)[..., None] / profile.sum() ** 2
    mx, my, xx, yy, xy = ((window * z[0]).sum(axis=(0, 1)) for z in (x, y, x * x, y * y, x * y))
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mx * my + c1) / (mx**2 + my**2 + c1)
    expected = luminance * (2 * (xy - mx * my) + c2) / (xx + yy - mx**2 - my**2 + c2)
    np.testing.assert_allclose(ssim(x, y), [expected.mean()], rtol=1e-10)


def discs(side=64):
    """Two flat regions on a gentle slope, a sharp edge between them: (1, side, side, 3)."""
    y, x = (np.indices((side, side)) + 0.5) / side
    field = np.where((x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.08, 0.7, 0.3) + 0.1 * (x - 0.5)
    return np.repeat(field[None, :, :, None], 3, axis=-1)


def test_speckle_of_white_noise_is_its_sigma_whatever_the_edges():
    noise = np.random.default_rng(0).normal(size=(1, 64, 64, 3))
    for target in (np.full_like(noise, 0.5), discs()):
        for sigma in (0.005, 0.02, 0.06):
            np.testing.assert_allclose(speckle(target + sigma * noise, target), sigma, rtol=0.05)
    assert speckle(gaussian_filter(discs(), (0, 2, 2, 0)), discs()) < 0.006


def test_speckle_in_closed_form():
    i, j = np.indices((10, 10))
    board = np.where((i + j) % 2, 0.09, -0.09)[None, :, :, None]
    grey = np.full((1, 10, 10, 3), 0.5)
    # On +-e the 3 x 3 mean is +-e/9 (5 of one sign, 4 of the other), so |h| = 8/9 e everywhere.
    np.testing.assert_allclose(speckle(grey + board, grey), [np.sqrt(9 / 8) * 8 / 9 * 0.09])
    assert np.isnan(speckle(grey + 5 * board, grey + 5 * board)).all()  # no flat pixels


def test_crps_is_its_definition():
    draws, target = images(count=8, side=4).reshape(4, 2, 4, 4, 3), images(1, 2, 4)
    pairs = [np.abs(draws[i] - draws[j]) for i in range(4) for j in range(4) if i != j]
    expected = np.abs(draws - target).mean(axis=0) - np.mean(pairs, axis=0) / 2
    np.testing.assert_allclose(crps(torch.from_numpy(draws), target), expected.mean(axis=(1, 2, 3)))


def test_spread_skill_is_one_for_draws_of_the_truth():
    rng = np.random.default_rng(0)
    for count in (2, 5, 20):
        draws, truth = (0.5 + 0.05 * rng.normal(size=(n, 2, 60, 60, 3)) for n in (count, 1))
        truth = truth[0]
        assert spread_skill(draws, truth) == pytest.approx(1, rel=0.03)
        half = spread_skill(0.5 + (draws - 0.5) / 2, truth)  # with half the spread the mean errs less, too
        assert half == pytest.approx(np.sqrt((1 + 1 / count) / (4 + 1 / count)), rel=0.03)


def test_what_would_score_wrong_silently_is_refused():
    good = images()
    for prediction in (255 * good, 2 * good - 1, good[:1], good[0], np.where(good > 0.9, np.nan, good)):
        for metric in (psnr, ssim, speckle):
            with pytest.raises(ValueError):
                metric(prediction, good)
    for draws in (good, good[None]):
        with pytest.raises(ValueError):
            crps(draws, good)
