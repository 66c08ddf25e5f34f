"""Observe, reconstruct, score: against velocities and posteriors that are known."""

import numpy as np
import pytest
import torch
from torch import nn

from nfhelpers import classical, evaluate, images, metrics


def smooth_images(count, size=16):
    """Smooth colour images (N, size, size, 3), floats in [0.1, 0.9]."""
    coords = images.grid_coords(size, size).numpy().reshape(size, size, 2)
    phase = np.arange(count * 3).reshape(count, 1, 1, 3)
    return (0.5 + 0.4 * np.sin(5 * coords[..., :1] + 3 * coords[..., 1:] + phase)).astype(np.float32)


def ramp(coords):
    return torch.stack([coords[..., 0], 1 - coords[..., 1], coords.mean(-1)], dim=-1)


class Posterior(nn.Module):
    """The exact velocity where the posterior of a pixel is N(field(coords), std^2), in units of [0, 1]."""

    def __init__(self, field, std=0.0):
        super().__init__()
        self.field, self.std, self.asked = field, 2 * std, []

    def forward(self, noisy_values, query_coords, t, input_coords, input_values):
        self.asked.append(query_coords.shape[:2])
        t, mean = t[:, None, None], 2 * self.field(query_coords) - 1
        slope = (t * self.std**2 - (1 - t)) / ((1 - t) ** 2 + t**2 * self.std**2).clamp_min(1e-6)
        return mean + slope * (noisy_values - t * mean)


def grey(coords):
    return torch.full((*coords.shape[:-1], 3), 0.5)


def test_images_are_observed_as_training_observes_them():
    pictures = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    observed = evaluate.observe(pictures, 0.2, seed=7)
    dataset = images.SparseFields(pictures, observed=0.2, queries=0.2, seed=7)
    for index in range(2):
        assert torch.equal(observed.input_coords[index], dataset[index]["input_coords"])
        torch.testing.assert_close(observed.input_values[index], dataset[index]["input_values"])
    np.testing.assert_allclose(observed.images, pictures / 255, atol=1e-7)


@pytest.mark.parametrize("kind", ["mean", "sample"])
def test_observed_pixels_are_kept_and_only_the_others_asked(kind):
    observed, model = evaluate.observe(smooth_images(3), 0.2), Posterior(grey)
    fields = evaluate.reconstruct(model, observed, kind=kind, steps=1)
    assert fields.dtype == np.float32 and observed.mask.sum(axis=(1, 2)).tolist() == [51] * 3
    np.testing.assert_array_equal(fields[observed.mask], observed.images[observed.mask])
    np.testing.assert_allclose(fields[~observed.mask], 0.5, atol=1e-5)
    assert set(model.asked) == {(3, 256 - 51)}
    whole = evaluate.observe(smooth_images(3), 1.0)  # as of an autoencoder: then all are asked for
    np.testing.assert_allclose(evaluate.reconstruct(model, whole, kind=kind, steps=1), 0.5, atol=1e-5)


@pytest.mark.parametrize("mixes", [False, True])
@pytest.mark.parametrize("size", [8, None, 40])
@pytest.mark.parametrize("kind", ["mean", "sample"])
def test_an_exact_velocity_reconstructs_any_size(kind, size, mixes):
    """Queries that mix are asked as far apart as observed pixels: of 40 x 40 in 3 x 3 parts."""
    truth = [ramp(images.grid_coords(side, side)).expand(2, -1, -1) for side in (16, size or 16)]
    truth = [fields.reshape(2, side, side, 3) for fields, side in zip(truth, (16, size or 16), strict=True)]
    observed, model = evaluate.observe(truth[0], 0.3), Posterior(ramp)
    model.mixes_queries = mixes
    made = evaluate.reconstruct(model, observed, size, kind=kind, steps=2)
    np.testing.assert_allclose(made, truth[1], atol=1e-5)
    if size == 40:
        assert set(model.asked) == ({(18, 14 * 14)} if mixes and kind == "mean" else {(2, 1600)})


def test_means_and_samples_of_a_known_posterior():
    """Truth drawn from the posterior: squared error std^2 of the mean, twice that of a sample, calibrated."""
    std, rng = 0.1, np.random.default_rng(0)
    truth = (0.5 + std * rng.standard_normal((4, 32, 32, 3))).clip(0, 1).astype(np.float32)
    observed, model = evaluate.observe(truth, 0.2, seed=1), Posterior(grey, std)

    def error(fields):
        return np.square(fields - truth)[~observed.mask].mean()

    samples = evaluate.reconstruct(model, observed, kind="sample", steps=20, draws=8)
    assert samples.shape == (8, 4, 32, 32, 3)
    assert error(evaluate.reconstruct(model, observed)) == pytest.approx(std**2, rel=0.05)
    assert error(samples[0]) == pytest.approx(2 * std**2, rel=0.05)
    mean = evaluate.reconstruct(model, observed, steps=20, draws=8)
    np.testing.assert_allclose(mean, samples.mean(axis=0), atol=1e-5)  # of the same noise
    assert metrics.spread_skill(samples, truth, observed.mask) == pytest.approx(1, rel=0.05)


def test_a_seed_fixes_the_noise_whatever_the_groups(monkeypatch):
    observed, model = evaluate.observe(smooth_images(5), 0.2), Posterior(grey, 0.1)
    options = {"kind": "sample", "steps": 3, "sampler": "sde", "temperature": 0.5, "seed": 4}
    made = evaluate.reconstruct(model, observed, **options)
    assert not np.allclose(made, evaluate.reconstruct(model, observed, **options | {"temperature": 0.0}))
    assert not np.allclose(made, evaluate.reconstruct(model, observed, **options | {"seed": 5}))
    monkeypatch.setattr(evaluate, "TOKENS_PER_FORWARD", 600)
    np.testing.assert_allclose(evaluate.reconstruct(model, observed, **options), made, atol=1e-6)
    assert model.asked[-1] == (1, 205)


def test_classical_methods_keep_what_was_observed():
    observed = evaluate.observe(smooth_images(2), 0.3)
    for method in (*classical.METHODS, classical.Wiener(smooth_images(8))):
        made = evaluate.reconstruct(method, observed)
        np.testing.assert_array_equal(made[observed.mask], observed.images[observed.mask])
        assert evaluate.reconstruct(method, observed, 24).shape == (2, 24, 24, 3)
        assert (metrics.psnr(made, observed.images) > 20).all()
    for wrong in ({"method": "spline"}, {"kind": "median"}, {"kind": "sample", "sampler": "leapfrog"}):
        with pytest.raises(ValueError):
            evaluate.reconstruct(**{"method": Posterior(grey), "observed": observed} | wrong)


def test_a_table_has_one_row_an_image():
    truth = np.full((3, 16, 16, 3), 0.5)
    offsets = np.array([0.1, 0.01, 0.001])[:, None, None, None]
    table = evaluate.score(truth + offsets, truth, model="v1", size=16)
    assert list(table) == ["model", "size", "image", "psnr", "ssim", "speckle"]
    np.testing.assert_allclose(table.psnr, [20, 40, 60])
    assert table.image.tolist() == [0, 1, 2] and set(table.model) == {"v1"}
    assert evaluate.score(truth, None).psnr.isna().all()


def test_methods_are_compared_on_the_same_pixels():
    pictures, fine = smooth_images(3), smooth_images(3, 32)
    methods = {"exact": Posterior(grey, 0.1), "linear": "linear", "wiener": classical.Wiener(pictures)}
    options = {"truth": {32: fine}, "observed": 0.25, "kinds": ("mean", "sample"), "steps": 2, "seed": 3}
    table, fields = evaluate.compare(methods, pictures, (16, 32, 24), **options)
    assert len(table) == 3 * 3 * (2 + 1 + 1) and (table.seconds > 0).all()
    kinds = table.groupby("model").kind.agg(set)
    assert kinds["exact"] == {"mean", "sample"} and kinds["linear"] == kinds["wiener"] == {"classical"}
    assert table.psnr[table["size"] == 24].isna().all() and table.psnr[table["size"] < 24].notna().all()
    observed = evaluate.observe(pictures, 0.25, 3)
    for (model, kind, size), made in fields.items():
        steps = {"kind": kind, "steps": 2} if kind == "sample" else {}
        again = evaluate.reconstruct(methods[model], observed, size, seed=3, **steps)
        np.testing.assert_array_equal(made, again)
