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


def test_ssim_of_flat_images_is_the_luminance_term():
    a, b = 0.3, 0.6  # without variance only (2ab + C1) / (a^2 + b^2 + C1) remains, C1 = 0.01^2
    expected = (2 * a * b + 1e-4) / (a**2 + b**2 + 1e-4)
    np.testing.assert_allclose(ssim(np.full((1, 12, 12, 3), a), np.full((1, 12, 12, 3), b)), [expected])
    np.testing.assert_allclose(ssim(images(), images()), 1)


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
    for width in (0.5, 1, 2, 4):
        assert speckle(gaussian_filter(discs(), (0, width, width, 0)), discs()) < 0.006
    assert speckle(np.where(discs() > 0.5, discs() + 0.15, discs()), discs()) < 1e-6  # an edge is no speckle


def test_speckle_in_closed_form():
    i, j = np.indices((10, 10))
    board = np.where((i + j) % 2, 0.09, -0.09)[None, :, :, None]
    grey = np.full((1, 10, 10, 3), 0.5)
    # On +-e the 3 x 3 mean is +-e/9 (5 of one sign, 4 of the other), so |h| = 8/9 e everywhere.
    np.testing.assert_allclose(speckle(grey + board, grey), [np.sqrt(9 / 8) * 8 / 9 * 0.09])
    np.testing.assert_allclose(speckle(grey + (i - 2 * j)[None, :, :, None] / 50, grey), 0, atol=1e-12)
    target = grey.copy()
    target[:, :, 5:] = images(side=10)[:1, :, 5:]  # texture
    wrong = np.where(np.arange(10)[:, None] > 6, 0.2, target)  # where it is textured
    assert speckle(wrong, target) == 0
    assert np.isnan(speckle(grey + 5 * board, grey + 5 * board)).all()  # no flat pixels


def test_crps_of_gaussian_draws_is_the_closed_form_for_any_number_of_them():
    # CRPS of N(0, s^2) at y = s z: s (z (2 Phi(z) - 1) + 2 phi(z) - 1/sqrt(pi)) (Gneiting and Raftery, 2007).
    rng, sigma = np.random.default_rng(0), 0.05
    for count in (2, 3, 10):
        draws = 0.5 + sigma * rng.normal(size=(count, 2, 100, 100, 3))
        for z, expected in ((0, 0.2337), (1, 0.6024), (2, 1.4528)):
            score = crps(draws, np.full(draws.shape[1:], 0.5 + sigma * z))
            np.testing.assert_allclose(score, sigma * expected, rtol=0.03)
    drawn, narrow = (0.5 + s * rng.normal(size=(8, 1, 100, 100, 3)) for s in (0.05, 0.02))
    truth = 0.5 + 0.05 * rng.normal(size=drawn.shape[1:])
    assert crps(drawn, truth) < crps(narrow, truth) and crps(drawn, truth) < crps(drawn + 0.03, truth)


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
        mask = np.zeros((2, 60, 60), bool)
        mask[:, :30] = True
        assert spread_skill(np.where(mask[..., None], 0.9, draws), truth, mask) == pytest.approx(1, rel=0.04)


def test_what_would_score_wrong_silently_is_refused():
    good = images()
    for prediction in (255 * good, 2 * good - 1, good[:1], good[0], np.where(good > 0.9, np.nan, good)):
        for metric in (psnr, ssim, speckle):
            with pytest.raises(ValueError):
                metric(prediction, good)
    for draws in (good, good[None]):
        with pytest.raises(ValueError):
            crps(draws, good)
    assert (psnr(torch.from_numpy(good), torch.zeros(3, 16, 16, 3)) == psnr(good, 0 * good)).all()
