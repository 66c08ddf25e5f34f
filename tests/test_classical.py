"""Classical fields against closed forms."""

import numpy as np
import pytest
import torch

from nfhelpers import classical, evaluate, images


def ramp(coords):
    """A linear colour field at coordinates (..., 2), inside [0, 1]."""
    x, y = np.asarray(coords[..., 0]), np.asarray(coords[..., 1])
    return np.stack([0.1 + 0.5 * x + 0.3 * y, 0.8 - 0.6 * x, 0.2 + 0.7 * y], axis=-1)


def grid(height, width):
    return images.grid_coords(height, width).reshape(1, height, width, 2)


def scattered(size, count, seed=0):
    """Pixel centres (1, Ni, 2) of a grid: its corners, so that the hull is all of it, and `count` others."""
    corners = [0, size - 1, (size - 1) * size, size * size - 1]
    others = np.setdiff1d(np.arange(size**2), corners)
    others = np.random.default_rng(seed).choice(others, count, replace=False)
    return images.grid_coords(size, size)[np.concatenate([corners, others])][None]


@pytest.mark.parametrize("method", classical.METHODS)
def test_a_linear_ramp_is_reproduced_at_any_size(method):
    coords = scattered(32, 300)
    values = torch.from_numpy(2 * ramp(coords) - 1)
    for height, width in ((32, 32), (48, 40)):
        field = classical.fill(method, coords, values, height, width, observed_size=(32, 32))
        assert field.shape == (1, height, width, 3) and field.dtype == np.float32
        inside = (slice(None), slice(4, -4), slice(4, -4))  # a finer grid reaches beyond the observed hull
        tolerance = 0.02 if method == "biharmonic" else 1e-5  # it is flat at the border
        np.testing.assert_allclose(field[inside], ramp(grid(height, width))[inside], atol=tolerance)


@pytest.mark.parametrize("method", classical.METHODS)
def test_observed_pixels_are_interpolated(method):
    coords, rng = scattered(16, 60), np.random.default_rng(0)
    values = rng.uniform(size=(2, 64, 3))
    fields = classical.fill(method, coords.expand(2, -1, -1), torch.from_numpy(2 * values - 1), 16, 16)
    column, row = (coords[0] * 16 - 0.5).round().long().T
    np.testing.assert_allclose(fields[:, row, column], values, atol=1e-5)


def test_outside_the_hull_the_nearest_pixel_is_taken():
    coords = torch.tensor([[[0.375, 0.375], [0.625, 0.375], [0.375, 0.625]]])
    for method in ("linear", "cubic"):
        field = classical.fill(method, coords, 2 * torch.eye(3)[None] - 1, 4, 4)[0]
        np.testing.assert_allclose([field[0, 0], field[0, 3], field[3, 0]], np.eye(3), atol=1e-6)


def test_unknown_methods_and_points_off_the_grid_are_refused():
    coords, values = scattered(16, 20), torch.zeros(1, 24, 3)
    for method, size in (("spline", 16), ("biharmonic", 24)):
        with pytest.raises(ValueError):
            classical.fill(method, coords, values, size, size)


def gaussian_images(count, size, seed):
    """Stationary Gaussian colour fields (N, H, W, 3) in [0, 1], and the covariance of their flat pixels."""
    points = images.grid_coords(size, size).double().numpy()
    distance = np.linalg.norm(points[:, None] - points[None], axis=-1)
    colours = np.array([[1.0, 0.8, 0.6], [0.8, 1.0, 0.7], [0.6, 0.7, 1.0]])
    covariance = 0.1**2 * np.kron(np.exp(-distance / 0.4), colours)  # (3HW, 3HW)
    noise = np.random.default_rng(seed).standard_normal((count, len(covariance)))
    fields = np.array([0.4, 0.5, 0.6]) + (noise @ np.linalg.cholesky(covariance).T).reshape(count, -1, 3)
    return fields.reshape(count, size, size, 3).clip(0, 1).astype(np.float32), covariance


def test_wiener_has_the_least_error_there_is():
    """Of a Gaussian field: the trace of C_uu - C_uo C_oo^-1 C_ou, with the covariance it was drawn from."""
    train, covariance = gaussian_images(1000, 10, seed=0)
    truth = gaussian_images(48, 10, seed=1)[0]
    observed = evaluate.observe(truth, 0.3, seed=2)
    best = []
    for mask in observed.mask:
        o, u = (np.repeat(part.ravel(), 3) for part in (mask, ~mask))
        among, across = covariance[np.ix_(o, o)], covariance[np.ix_(u, o)]
        best.append(np.trace(covariance[np.ix_(u, u)] - across @ np.linalg.solve(among, across.T)) / u.sum())
    made, others = classical.Wiener(train).fill(observed), evaluate.reconstruct("linear", observed)
    error, worse = (np.square(field - truth)[~observed.mask].mean() for field in (made, others))
    assert error == pytest.approx(np.mean(best), rel=0.05) and error < 0.9 * worse


def test_wiener_keeps_what_was_observed_and_resamples():
    train, truth = gaussian_images(50, 12, seed=0)[0], gaussian_images(3, 12, seed=1)[0]
    observed, method = evaluate.observe(truth, 0.2, seed=2), classical.Wiener(train)
    made = method.fill(observed)
    np.testing.assert_array_equal(made[observed.mask], truth[observed.mask])
    np.testing.assert_allclose(method.fill(observed, 24), classical.resize(made, 24, 24), atol=1e-6)
