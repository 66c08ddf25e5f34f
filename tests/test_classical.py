"""Classical fields against closed forms."""

import numpy as np
import pytest
import torch

from nfhelpers import classical, evaluate, images


def ramp(coords):
    """A linear colour field at coordinates (..., 2), inside [0, 1]."""
    x, y = np.asarray(coords[..., 0]), np.asarray(coords[..., 1])
    return np.stack([0.1 + 0.5 * x + 0.3 * y, 0.8 - 0.6 * x, 0.2 + 0.7 * y], axis=-1)


def seen(fields, count, seed=0):
    """Fields (N, S, S, 3) observed at their corners, so that the hull is all of them, and `count` others."""
    size = fields.shape[1]
    corners = [0, size - 1, (size - 1) * size, size * size - 1]
    others = np.setdiff1d(np.arange(size**2), corners)
    others = np.random.default_rng(seed).choice(others, count, replace=False)
    mask = np.isin(np.arange(size**2), [*corners, *others]).reshape(size, size)
    return observed_at(fields, mask)


def observed_at(fields, mask):
    coords = images.grid_coords(*mask.shape)[mask.ravel()].expand(len(fields), -1, -1)
    values = torch.from_numpy(2 * fields[:, mask] - 1)
    return evaluate.Observed(fields.astype(np.float32), np.stack([mask] * len(fields)), coords, values)


@pytest.mark.parametrize("method", classical.METHODS)
def test_a_linear_ramp_is_reproduced_at_any_size(method):
    truth = {size: ramp(images.grid_coords(size, size).reshape(1, size, size, 2)) for size in (32, 48)}
    for size in (None, 48):
        field, wanted = classical.fill(method, seen(truth[32], 300), size), truth[size or 32]
        assert field.shape == wanted.shape and field.dtype == np.float32
        inside = (slice(None), slice(4, -4), slice(4, -4))  # a finer grid reaches beyond the observed hull
        tolerance = 0.02 if method == "biharmonic" else 1e-5  # it is flat at the border
        np.testing.assert_allclose(field[inside], wanted[inside], atol=tolerance)


@pytest.mark.parametrize("method", classical.METHODS)
def test_unobserved_pixels_are_not_seen(method):
    fields = np.random.default_rng(0).uniform(size=(2, 16, 16, 3))
    given = seen(fields, 60)
    made = classical.fill(method, given)
    np.testing.assert_allclose(made[given.mask], fields[given.mask], atol=1e-7)
    hidden = np.where(given.mask[..., None], fields, 0.5)
    np.testing.assert_array_equal(classical.fill(method, seen(hidden, 60)), made)
    whole = classical.fill(method, observed_at(fields, np.ones((16, 16), dtype=bool)))
    np.testing.assert_allclose(whole, fields, atol=1e-7)


def test_outside_the_hull_the_nearest_pixel_is_taken():
    mask = np.zeros((4, 4), dtype=bool)
    mask[[1, 1, 2], [1, 2, 1]] = True
    fields = np.zeros((1, 4, 4, 3))
    fields[0, mask] = np.eye(3)
    for method in ("linear", "cubic"):
        field = classical.fill(method, observed_at(fields, mask))[0]
        np.testing.assert_allclose([field[0, 0], field[0, 3], field[3, 0]], np.eye(3), atol=1e-6)
    with pytest.raises(ValueError):
        classical.fill("spline", observed_at(fields, mask))


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
    method = classical.Wiener(train)
    made, others = method.fill(observed), evaluate.reconstruct("linear", observed)
    np.testing.assert_allclose(method.fill(observed, 20), classical.resize(made, 20, 20), atol=1e-6)
    error, worse = (np.square(field - truth)[~observed.mask].mean() for field in (made, others))
    assert error == pytest.approx(np.mean(best), rel=0.05) and error < 0.9 * worse
