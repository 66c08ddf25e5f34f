"""Evaluation against closed forms and stub models: baselines, reconstruction, paired tables, costs."""

import copy
import json
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from nfhelpers import evaluate, flow, images, metrics
from nfhelpers.kernels.orders import inverse_order, point_order
from nfhelpers.models import (
    FIELD_MODELS,
    LocalImplicitField,
    LocalImplicitFieldConfig,
    LocalMamba2D,
    LocalMamba2DConfig,
    MambaDiffusion,
    MambaDiffusionConfig,
    ssm,
)
from nfhelpers.spectrograms import Spectrograms, load_spectrograms


def ramp(coords):
    """A linear colour field at coordinates (..., 2), inside [0, 1]."""
    x, y = coords[..., 0], coords[..., 1]
    return np.stack([0.1 + 0.5 * x + 0.3 * y, 0.8 - 0.6 * x, 0.2 + 0.7 * y], axis=-1)


def scattered(height, width, count, seed=0):
    """Pixel centres of a grid: its corners, so that the hull is the whole grid, and `count` others."""
    grid = images.grid_coords(height, width).numpy()
    corners = [0, width - 1, (height - 1) * width, height * width - 1]
    others = np.setdiff1d(np.arange(height * width), corners)
    chosen = np.random.default_rng(seed).choice(others, count, replace=False)
    return grid[np.sort(np.concatenate([corners, chosen]))]


def smooth_images(count, size=16):
    """Smooth colour images (N, size, size, 3), floats in [0.1, 0.9]."""
    coords = images.grid_coords(size, size).numpy().reshape(size, size, 2)
    phase = np.arange(count * 3).reshape(count, 1, 1, 3)
    return (0.5 + 0.4 * np.sin(5 * coords[..., :1] + 3 * coords[..., 1:] + phase)).astype(np.float32)


class Exact(nn.Module):
    """The exact velocity of a known field, v = (f(coords) - x_t) / (1 - t): trajectories end in the field.

    With `bias`, the field it believes in is off by a constant. It records the query counts it is asked for.
    """

    def __init__(self, field, bias=0.0):
        super().__init__()
        self.field, self.bias, self.asked = field, bias, []

    def forward(self, noisy_values, query_coords, t, input_coords, input_values):
        self.asked.append(query_coords.shape[1])
        data = torch.as_tensor(2 * self.field(query_coords.numpy()) - 1, dtype=torch.float32) + 2 * self.bias
        return (data - noisy_values) / (1 - t[:, None, None]).clamp_min(1e-3)


class GaussianPosterior(nn.Module):
    """Exact velocity where the posterior of every pixel is N(mean, std^2), in model units."""

    def __init__(self, mean=0.0, std=0.2):
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, noisy_values, query_coords, t, input_coords, input_values):
        t = t[:, None, None]
        variance = (1 - t) ** 2 + t**2 * self.std**2
        slope = (t * self.std**2 - (1 - t)) / variance
        return self.mean + slope * (noisy_values - t * self.mean)


# ---------------------------------------------------------------- classical baselines


def test_baselines_reproduce_a_linear_ramp():
    coords = scattered(32, 32, 200)
    for height, width in ((32, 32), (48, 40)):
        truth = ramp(images.grid_coords(height, width).numpy().reshape(height, width, 2))
        fields = evaluate.classical_baselines(coords, ramp(coords), height, width, observed_size=(32, 32))
        assert list(fields) == list(evaluate.CLASSICAL)
        assert all(field.shape == (height, width, 3) for field in fields.values())
        np.testing.assert_allclose(
            fields["rbf"], truth, atol=1e-5
        )  # its polynomial part extends beyond the hull
        inside = (slice(1, -1), slice(1, -1))  # a finer grid reaches half a pixel beyond the observed hull
        np.testing.assert_allclose(fields["linear"][inside], truth[inside], atol=1e-5)
        np.testing.assert_allclose(fields["cubic"][inside], truth[inside], atol=1e-5)


def test_baselines_outside_the_hull_take_the_nearest_pixel():
    coords = np.array([[0.375, 0.375], [0.625, 0.375], [0.375, 0.625]])
    values = np.eye(3)
    fields = evaluate.classical_baselines(coords, values, 4, 4)
    for name in ("linear", "cubic"):
        np.testing.assert_allclose(fields[name][0, 0], values[0])
        np.testing.assert_allclose(fields[name][0, 3], values[1])
        np.testing.assert_allclose(fields[name][3, 0], values[2])


def test_baselines_interpolate_the_observed_pixels():
    rng = np.random.default_rng(0)
    coords = scattered(16, 16, 60)
    values = rng.uniform(size=(len(coords), 3))
    column, row = (coords * 16 - 0.5).round().astype(int).T
    for name, field in evaluate.classical_baselines(coords, values, 16, 16).items():
        np.testing.assert_allclose(field[row, column], values, atol=1e-6, err_msg=name)


def test_biharmonic_of_a_complete_grid_is_the_grid_and_needs_its_size():
    coords = images.grid_coords(8, 8).numpy()
    values = np.random.default_rng(1).uniform(size=(64, 3))
    field = evaluate.classical_baselines(coords, values, 8, 8)["biharmonic"]
    np.testing.assert_allclose(field.reshape(-1, 3), values)
    with pytest.raises(ValueError, match="observed_size"):
        evaluate.classical_baselines(coords, values, 16, 16)


def test_baselines_that_are_asked_for_are_those_of_all():
    coords = scattered(16, 16, 60)
    every = evaluate.classical_baselines(coords, ramp(coords), 16, 16)
    for name in evaluate.CLASSICAL:
        (alone,) = evaluate.classical_baselines(coords, ramp(coords), 16, 16, methods=(name,)).items()
        assert alone[0] == name
        np.testing.assert_array_equal(alone[1], every[name])
    with pytest.raises(ValueError, match=r"methods \['spline'\] are unknown.*'biharmonic'"):
        evaluate.classical_baselines(coords, ramp(coords), 16, 16, methods=("rbf", "spline"))


@pytest.mark.parametrize(
    ("coords", "values", "message"),
    [
        (np.zeros((4, 3)), np.zeros((4, 3)), r"\(Ni, 2\)"),
        (np.zeros((4, 2)), np.zeros((5, 3)), r"\(4, 3\)"),
        (np.zeros((2, 2)), np.zeros((2, 3)), "at least 3"),
        (np.full((4, 2), 1.5), np.zeros((4, 3)), r"input_coords has entries outside \[0, 1\]"),
        (np.full((4, 2), 0.5), np.full((4, 3), -1.0), r"input_values has entries outside \[0, 1\]"),
        (np.array([[0.125, 0.5], [0.375, 0.5], [0.625, 0.5]]), np.zeros((3, 3)), "one line"),
    ],
)
def test_baselines_refuse(coords, values, message):
    with pytest.raises(ValueError, match=message):
        evaluate.classical_baselines(coords, values, 8, 8)


def test_resize_keeps_pixel_centres_aligned():
    grid = ramp(images.grid_coords(16, 16).numpy().reshape(16, 16, 2))
    truth = ramp(images.grid_coords(64, 64).numpy().reshape(64, 64, 2))
    for order in (1, 3):
        resized = evaluate.resize_field(grid, 64, 64, order)
        np.testing.assert_allclose(resized[16:-16, 16:-16], truth[16:-16, 16:-16], atol=2e-3)
    with pytest.raises(ValueError, match="order=2"):
        evaluate.resize_field(grid, 8, 8, 2)


# ---------------------------------------------------------------- the best linear estimate


def gaussian_images(count, size, seed):
    """Stationary Gaussian colour fields (N, H, W, 3) in [0, 1], and the covariance of their flat pixels."""
    points = images.grid_coords(size, size).numpy().astype(np.float64)
    distance = np.linalg.norm(points[:, None] - points[None], axis=-1)
    colours = np.array([[1.0, 0.8, 0.6], [0.8, 1.0, 0.7], [0.6, 0.7, 1.0]])
    covariance = 0.1**2 * np.kron(np.exp(-distance / 0.4), colours)  # (3HW, 3HW)
    noise = np.random.default_rng(seed).standard_normal((count, len(covariance)))
    fields = np.array([0.4, 0.5, 0.6]) + (noise @ np.linalg.cholesky(covariance).T).reshape(count, -1, 3)
    return fields.reshape(count, size, size, 3).clip(0, 1).astype(np.float32), covariance


def test_wiener_has_the_least_error_there_is():
    """Of a Gaussian field: the trace of C_uu - C_uo C_oo^-1 C_ou, with the covariance it was drawn from."""
    train, covariance = gaussian_images(2000, 12, seed=0)
    truth = gaussian_images(64, 12, seed=1)[0]
    fields = evaluate.observe_images(truth, 0.3, seed=2)
    made = evaluate.wiener(fields, train)
    best = []
    for mask in fields["mask"].numpy():
        o, u = (np.repeat(part.ravel(), 3) for part in (mask, ~mask))
        among, across = covariance[np.ix_(o, o)], covariance[np.ix_(u, o)]
        left = covariance[np.ix_(u, u)] - across @ np.linalg.solve(among, across.T)
        best.append(np.trace(left) / u.sum())
    hidden = ~fields["mask"].numpy()
    error = np.square(made - truth)[hidden].mean()
    assert error == pytest.approx(np.mean(best), rel=0.04)
    # The best of the others, and what a grey field leaves, for scale.
    others = evaluate._classical_fields(fields, 12)
    least = min(np.square(field - truth)[hidden].mean() for field in others.values())
    assert error < 0.9 * least < 0.5 * 0.1**2


def test_wiener_keeps_what_was_observed_and_resamples():
    train, truth = gaussian_images(50, 12, seed=0)[0], gaussian_images(3, 12, seed=1)[0]
    fields = evaluate.observe_images(truth, 0.2, seed=2)
    made, larger = (evaluate.wiener(fields, train, size) for size in (12, 24))
    mask = fields["mask"].numpy()
    np.testing.assert_array_equal(made[mask], truth[mask])
    np.testing.assert_array_equal(larger[1], evaluate.resize_field(made[1], 24, 24))
    everything = evaluate.observe_images(truth, 1.0)
    np.testing.assert_array_equal(evaluate.wiener(everything, train), truth)
    # Of images of one colour there is nothing to learn but the colour.
    plain = evaluate.wiener(fields, np.full((2, 12, 12, 3), 0.25, np.float32))
    np.testing.assert_allclose(plain[~mask], 0.25)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fields": {}}, "a dict without"),
        ({"train_images": np.zeros((2, 8, 8, 3))}, r"8x8, the observed grid is 16x16; pass .*'train', 16"),
        ({"train_images": np.zeros((0, 16, 16, 3))}, r"train_images has shape|pass \(N, H, W, 3\)"),
        ({"size": 0}, "size=0"),
    ],
)
def test_wiener_refuses(change, message):
    given = {"fields": evaluate.observe_images(smooth_images(1)), "train_images": smooth_images(2)}
    with pytest.raises(ValueError, match=message):
        evaluate.wiener(**{**given, **change})


def test_a_source_without_training_images_has_no_wiener(monkeypatch):
    real = images.load_images

    def load(source, split="train", *rest, **options):
        if split == "train":
            raise ValueError("no training images")
        return real(source, split, *rest, **options)

    monkeypatch.setattr(images, "load_images", load)
    options = {"scales": (16,), "sample_scales": (), "images": 2, "observed_size": 16}
    rows = evaluate.multiscale(GaussianPosterior(), **options)
    assert [row["method"] for row in rows] == [evaluate.ONE_STEP_MEAN, *evaluate.CLASSICAL]


# ---------------------------------------------------------------- reconstruct


def test_observed_pixels_are_kept_and_only_the_others_asked():
    pictures = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    model = Exact(lambda coords: np.full((*coords.shape[:-1], 3), 0.25))
    for kind in ("mean", "sample"):
        result = evaluate.reconstruct(model, pictures, 0.2, kind=kind, steps=1, method="euler")
        mask = result["mask"]
        assert mask.sum(axis=(1, 2)).tolist() == [51, 51, 51]
        np.testing.assert_array_equal(result["fields"][mask], (pictures[mask] / np.float32(255)))
        np.testing.assert_allclose(result["fields"][~mask], 0.25, atol=1e-5)
    assert set(model.asked) == {256 - 51}


def test_the_same_pixels_as_sparse_fields():
    pictures = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    drawn = evaluate.observe_images(pictures, 0.2, seed=7)
    dataset = images.SparseFields(pictures, observed=0.2, queries=0.2, seed=7)
    for index in range(2):
        torch.testing.assert_close(drawn["input_coords"][index], dataset[index]["input_coords"])
        torch.testing.assert_close(drawn["input_values"][index], dataset[index]["input_values"])


def test_exact_velocity_reconstructs_any_size():
    size = 16
    pictures = ramp(images.grid_coords(size, size).numpy().reshape(1, size, size, 2)).astype(np.float32)
    for kind in ("mean", "sample"):
        for scale in (8, 16, 40):
            result = evaluate.reconstruct(
                Exact(ramp), pictures, 0.3, scale, kind=kind, steps=1, method="euler"
            )
            truth = ramp(images.grid_coords(scale, scale).numpy().reshape(1, scale, scale, 2))
            np.testing.assert_allclose(result["fields"], truth, atol=1e-5)


def test_known_error_gives_the_known_psnr():
    size, bias = 32, 0.1
    pictures = np.full((2, size, size, 3), 0.5, dtype=np.float32)
    model = Exact(lambda coords: np.full((*coords.shape[:-1], 3), 0.5), bias)
    result = evaluate.reconstruct(model, pictures, 0.25, steps=1)
    # An error of 0.1 on three pixels of four: 10 log10(1 / (0.75 * 0.01)).
    np.testing.assert_allclose(metrics.psnr(result["fields"], pictures), 21.249, atol=1e-3)
    finer = evaluate.reconstruct(model, pictures, 0.25, 64, steps=1)
    np.testing.assert_allclose(metrics.psnr(finer["fields"], np.full((2, 64, 64, 3), 0.5)), 20.0, atol=1e-3)


def test_a_sample_has_twice_the_squared_error_of_the_mean():
    """Truth drawn from the posterior itself: mean error std^2, sample error 2 std^2, spread equals skill."""
    std = 0.2
    rng = np.random.default_rng(0)
    pictures = (0.5 + 0.5 * std * rng.standard_normal((4, 32, 32, 3))).clip(0, 1).astype(np.float32)
    model = GaussianPosterior(std=std)
    fields = evaluate.observe_images(pictures, 0.2, seed=1)
    hidden = ~fields["mask"].numpy()

    def squared_error(**options):
        result = evaluate.reconstruct(model, fields, **options)
        return np.square(result["fields"] - pictures)[hidden].mean()

    mean = squared_error(steps=1)
    sample = squared_error(kind="sample", steps=50)
    assert mean == pytest.approx((std / 2) ** 2, rel=0.05)
    assert sample / mean == pytest.approx(2, rel=0.05)
    result, calibration = evaluate.calibrate(model, fields, draws=16, steps=20)
    assert np.sqrt(np.square(result["std"][hidden]).mean()) == pytest.approx(std / 2, rel=0.05)
    assert (result["std"][~hidden] == 0).all()
    assert calibration["ratio"] == pytest.approx(1, rel=0.1)


def test_one_draw_has_no_spread():
    pictures = smooth_images(1)
    result = evaluate.reconstruct(GaussianPosterior(), pictures, 0.5)
    assert np.isnan(result["std"][~result["mask"]]).all()
    assert evaluate.reconstruct(GaussianPosterior(), pictures, 0.5, kind="sample", steps=1)["std"] is None
    with pytest.raises(ValueError, match="at least 2"):
        evaluate.calibrate(GaussianPosterior(), pictures, draws=1)


def test_everything_observed_needs_no_model():
    pictures = smooth_images(2)
    model = Exact(ramp)
    result = evaluate.reconstruct(model, pictures, 1.0)
    np.testing.assert_array_equal(result["fields"], pictures)
    assert model.asked == []


def test_groups_of_images_change_nothing(monkeypatch):
    pictures = smooth_images(5)
    torch.manual_seed(0)
    model = LocalImplicitField(LocalImplicitFieldConfig(d_model=16, num_heads=2, neighbours=4, num_layers=1))
    together = evaluate.reconstruct(model, pictures, 0.2, kind="sample", steps=2)["fields"]
    monkeypatch.setattr(evaluate, "TOKENS_PER_FORWARD", 2 * 256)
    apart = evaluate.reconstruct(model, pictures, 0.2, kind="sample", steps=2)["fields"]
    np.testing.assert_allclose(together, apart, atol=1e-5)


@pytest.mark.parametrize("kind", ["mean", "sample"])
@pytest.mark.parametrize(("size", "at_once"), [(None, False), (24, False), (24, True)])
def test_shares_are_parts_of_the_whole(kind, size, at_once, monkeypatch):
    """Five images between two processes: the same noise in every draw and step as in one process."""
    pictures = smooth_images(5)
    torch.manual_seed(0)
    model = LocalImplicitField(LocalImplicitFieldConfig(d_model=16, num_heads=2, neighbours=4, num_layers=1))
    options = {"mean": {"draws": 3, "steps": 2}, "sample": {"method": "sde", "steps": 5}}[kind]
    options |= {"kind": kind, "size": size}  # nine evaluations of each image either way
    whole = evaluate.reconstruct(model, pictures, **options)
    seen = []
    model.register_forward_pre_hook(lambda _, arguments: seen.append(len(arguments[0])))
    if not at_once:
        monkeypatch.setattr(evaluate, "TOKENS_PER_FORWARD", 1)
    for index, count in enumerate((3, 2)):
        seen.clear()
        share = evaluate.reconstruct(model, pictures, share=(index, 2), **options)
        assert seen == ([count] * 9 if at_once else [1] * 9 * count), "each image is that of one process"
        for name, part in share.items():
            if part is not None:
                np.testing.assert_allclose(part, whole[name][index::2], atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "median"}, "kind='median'"),
        ({"kind": "sample", "draws": 3}, "draws=1"),
        ({"kind": "sample", "method": "rk9"}, "rk9"),
        ({"steps": 0}, "steps=0"),
        ({"draws": 0}, "draws=0"),
        ({"observed": 1.5}, r"observed=1.5"),
        ({"size": 0}, "size=0"),
        ({"size": 16.0}, "size=16.0"),
        ({"method": "rk9"}, "rk9"),  # also where it is not used
        ({"kind": "sample", "temperature": -1}, "temperature=-1"),
        ({"device": "tpu9"}, "device='tpu9' cannot be used"),
        ({"images": {}}, r"a dict without \['images', 'input_coords', 'input_values', 'mask'\]"),
        ({"share": (1, 2)}, r"share=\(1, 2\) of 1 images; pass \(i, n\) with 0 <= i < n <= 1"),
    ],
)
def test_reconstruct_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        evaluate.reconstruct(GaussianPosterior(), **{"images": smooth_images(1), **change})


def test_noise_is_drawn_on_the_cpu_whatever_the_device():
    """The same seed gives the same noise on every device: that of a CPU generator."""
    seen = []

    class Recorder(GaussianPosterior):
        def forward(self, noisy_values, *rest):
            seen.append(noisy_values.clone())
            return super().forward(noisy_values, *rest)

    drawn = []

    def generator(device="cpu"):
        drawn.append(torch.device(device).type)
        return real(device)

    real, torch.Generator = torch.Generator, generator
    try:
        evaluate.reconstruct(Recorder(), smooth_images(1), seed=5, device="cpu")
    finally:
        torch.Generator = real
    expected = torch.randn(seen[0].shape, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(seen[0], expected, rtol=0, atol=0)
    assert set(drawn) == {"cpu"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scales": ()}, "scales is empty"),
        ({"scales": (16, 8)}, "scale=8 is smaller than the 11 px window"),
        ({"scales": (16.5,)}, "scale=16.5"),
        ({"sample_scales": (32, 48)}, r"sample_scales has \[48\]"),
        ({"method": "rk9"}, "method='rk9'"),
        ({"method": ("heun", "rk9")}, "method='rk9'"),
        ({"temperature": 0.5}, "temperature=0.5 is that of 'sde'"),
        ({"method": "sde", "temperature": -1.0}, r"temperature=-1.0 is not in \[0, inf\)"),
        ({"steps": 0}, "steps=0"),
        ({"images": 1.5}, "images=1.5"),
        ({"device": "tpu9"}, "device='tpu9'"),
    ],
)
def test_multiscale_refuses_before_it_computes(change, message):
    def model(*_):
        pytest.fail("computed")

    with pytest.raises(ValueError, match=message):
        evaluate.multiscale(model, **{"scales": (32,), **change})


@pytest.mark.parametrize(
    ("field", "height", "message"),
    [
        (np.zeros((8, 8, 3), np.uint8), 16, "dtype uint8"),
        (np.full((8, 8, 3), 1.5), 16, r"field spans \[1.5, 1.5\]"),
        (np.full((8, 8, 3), -1.0), 8, r"field spans \[-1, -1\]"),
        (np.full((8, 8, 3), np.nan), 16, "field spans"),
        (np.zeros((0, 8, 3)), 16, "not empty"),
        (np.zeros((8, 8, 3)), 0, "height=0"),
        (np.zeros((8, 8, 3)), 16.0, "height=16.0"),
    ],
)
def test_resize_refuses(field, height, message):
    with pytest.raises(ValueError, match=message):
        evaluate.resize_field(field, height, 16)


@pytest.mark.parametrize("value", [0, 1.5, "4", True, None])
@pytest.mark.parametrize("name", ["n_inputs", "n_queries", "batch_size"])
def test_cost_refuses(name, value):
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        evaluate.model_cost(GaussianPosterior(), **{name: value})


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        (np.zeros((16, 16, 3)), r"\(N, H, W, 3\)"),
        (np.zeros((0, 16, 16, 3)), "N >= 1"),
        (np.full((1, 4, 4, 3), 255.0), r"outside \[0, 1\]"),
        (np.full((1, 4, 4, 3), np.nan), r"outside \[0, 1\]"),
        (np.zeros((1, 4, 4, 3), dtype=np.int64), "int64"),
    ],
)
def test_observe_refuses(pictures, message):
    with pytest.raises(ValueError, match=message):
        evaluate.observe_images(pictures)


# ---------------------------------------------------------------- tables


@pytest.fixture(scope="module")
def rows_and_pictures():
    pictures = {}
    rows = evaluate.multiscale(
        GaussianPosterior(),
        "photos",
        scales=(16, 32),
        sample_scales=(16,),
        steps=3,
        images=3,
        observed_size=16,
        callback=lambda scale, method, fields, target: pictures.update({(scale, method): (fields, target)}),
    )
    return rows, pictures


def test_multiscale_rows_are_complete(rows_and_pictures):
    rows, pictures = rows_and_pictures
    found = {(row["scale"], row["method"]): row["kind"] for row in rows}
    common = {
        "posterior mean (1 step)": "mean",
        **dict.fromkeys((*evaluate.CLASSICAL, "wiener"), "classical"),
    }
    wanted = {
        **{(16, name): kind for name, kind in common.items()},
        (16, "sample (heun, 3 steps)"): "sample",
        **{(32, name): kind for name, kind in common.items()},
        (32, "bilinear of 16 px mean"): "mean",
        (32, "bicubic of 16 px mean"): "mean",
    }
    assert found == wanted
    assert set(pictures) == set(wanted)
    assert all(row["images"] == 3 and row["note"] == "" for row in rows)


def test_multiscale_is_paired_with_the_real_images(rows_and_pictures):
    rows, pictures = rows_and_pictures
    for row in rows:
        fields, target = pictures[row["scale"], row["method"]]
        truth = images.load_images("photos", "test", row["scale"], limit=3) / 255
        np.testing.assert_allclose(target, truth, atol=1e-6)
        psnr = metrics.psnr(fields, truth)
        assert row["psnr"] == pytest.approx(psnr.mean(), abs=1e-4)
        assert row["psnr_se"] == pytest.approx(psnr.std(ddof=1) / np.sqrt(3), abs=1e-4)
        difference = psnr - metrics.psnr(pictures[row["scale"], "biharmonic"][0], truth)
        assert row["versus_biharmonic"] == pytest.approx(difference.mean(), abs=1e-4)
        assert row["versus_biharmonic_se"] == pytest.approx(difference.std(ddof=1) / np.sqrt(3), abs=1e-4)
    kept = evaluate.observe_images(images.load_images("photos", "test", 16, limit=3), 0.2, 0)
    mask = kept["mask"].numpy()
    for (scale, method), (fields, _) in pictures.items():
        if scale == 16:
            np.testing.assert_allclose(fields[mask], kept["images"].numpy()[mask], atol=1e-6, err_msg=method)


def test_multiscale_compares_samplers_on_the_same_noise():
    """The temperature is that of sde alone: heun and ddim draw at 1."""
    pictures, model = {}, GaussianPosterior(std=0.5)
    rows = evaluate.multiscale(
        model,
        scales=(16,),
        method=("heun", "sde", "ddim", "euler"),
        temperature=0.5,
        steps=4,
        images=1,
        observed_size=16,
        callback=lambda scale, method, fields, target: pictures.update({method: fields}),
    )
    names = [row["method"] for row in rows if row["kind"] == "sample"]
    assert names == [
        "sample (heun, 4 steps)",
        "sample (sde, 4 steps, temperature 0.5)",
        "sample (ddim, 4 steps)",
        "sample (euler, 4 steps)",
    ]
    heun, sde, ddim, euler = (pictures[name] for name in names)
    np.testing.assert_allclose(ddim, euler, atol=1e-6)
    photo = images.load_images("photos", "test", 16, limit=1)
    options = {"kind": "sample", "steps": 4}
    np.testing.assert_array_equal(heun, evaluate.reconstruct(model, photo, **options)["fields"])
    options |= {"method": "sde", "temperature": 0.5}
    np.testing.assert_array_equal(sde, evaluate.reconstruct(model, photo, **options)["fields"])


def test_temperature_of_a_sample_reaches_the_sampler():
    drawn = {
        temperature: evaluate.reconstruct(
            GaussianPosterior(), smooth_images(1), 0.5, kind="sample", steps=4, temperature=temperature
        )
        for temperature in (0.0, 1.0)
    }
    hidden = ~drawn[0.0]["mask"]
    np.testing.assert_allclose(drawn[0.0]["fields"][hidden], 0.5, atol=1e-6)  # no noise: the mean
    assert drawn[1.0]["fields"][hidden].std() > 0.05
    curve = evaluate.steps_curve(GaussianPosterior(), smooth_images(2), steps=(4,), draws=0, temperature=0.0)
    assert curve[0]["psnr"] == pytest.approx(curve[1]["psnr"], abs=1e-4)


# ---------------------------------------------------------------- comparison of two models


@pytest.fixture(scope="module")
def comparison():
    """Two biased posteriors on the photographs, and what `compare` hands to its callback."""
    kept = {}

    def keep(kind, fields_a, fields_b, target, mask):
        kept[kind] = {"a": fields_a, "b": fields_b, "target": target, "mask": mask}

    a, b = GaussianPosterior(mean=0.2, std=0.3), GaussianPosterior(mean=0.0, std=0.05)
    rows = evaluate.compare(a, b, images=5, observed_size=16, steps=(3, 2), seed=3, callback=keep)
    return rows, kept, (a, b)


def test_compare_keeps_means_and_samples_apart(comparison):
    rows, kept, _ = comparison
    assert [(row["kind"], row["metric"]) for row in rows] == [
        (kind, metric) for kind in ("mean", "sample") for metric in evaluate.COMPARED
    ]
    assert {row["method"] for row in rows if row["kind"] == "mean"} == {evaluate.ONE_STEP_MEAN}
    assert {row["method"] for row in rows if row["kind"] == "sample"} == {"sample (heun, 3 and 2 steps)"}
    assert set(kept) == {"mean", "sample"}
    assert np.abs(kept["mean"]["a"] - kept["sample"]["a"]).max() > 0.05


def test_compare_is_paired_image_by_image(comparison):
    rows, kept, (a, _) = comparison
    truth = images.load_images("photos", "test", 16, limit=5) / 255
    for kind, made in kept.items():
        np.testing.assert_allclose(made["target"], truth, atol=1e-6)
        for which in "ab":
            np.testing.assert_allclose(made[which][made["mask"]], truth[made["mask"]], atol=1e-6)
        for name, metric in (("psnr", metrics.psnr), ("ssim", metrics.ssim), ("speckle", metrics.speckle)):
            row = evaluate.find_row(rows, kind=kind, metric=name)
            one, other = metric(made["a"], truth), metric(made["b"], truth)
            improvement = (one - other) if name == "speckle" else (other - one)
            assert row["a"] == pytest.approx(one.mean(), abs=1e-4)
            assert row["b_se"] == pytest.approx(other.std(ddof=1) / np.sqrt(5), abs=1e-4)
            assert row["differences"] == pytest.approx(improvement, abs=1e-4)
            assert row["improvement"] == pytest.approx(improvement.mean(), abs=1e-4)
            assert row["improvement_se"] == pytest.approx(improvement.std(ddof=1) / np.sqrt(5), abs=1e-4)
            assert row["percent"] == pytest.approx(100 * improvement.mean() / one.mean(), rel=1e-3)
            p = metrics.paired_test(np.array(row["differences"]))
            assert (row["p_t"], row["p_wilcoxon"]) == p and row["images"] == 5
    seconds = evaluate.find_row(rows, kind="sample", metric="seconds")
    assert 0 < seconds["a"] < 1 and len(seconds["differences"]) == 5
    # Image 2 is that of `reconstruct` with its own seed, so no two images share their noise.
    fields = evaluate.observe_images(images.load_images("photos", "test", 16, limit=5), 0.2, 3)
    one = {name: part[2:3] for name, part in fields.items()}
    alone = evaluate.reconstruct(a, one, kind="sample", steps=3, seed=3 + 2)
    np.testing.assert_allclose(kept["sample"]["a"][2], alone["fields"][0], atol=1e-6)
    json.dumps(rows, allow_nan=False)  # as write_results needs it


def test_a_model_does_not_differ_from_itself():
    model = GaussianPosterior()
    rows = evaluate.compare(model, model, images=2, observed_size=16, steps=1)
    for row in rows:
        if row["metric"] != "seconds":
            assert row["improvement"] == 0 and row["p_t"] is None and row["p_wilcoxon"] is None
    assert " - " in evaluate.format_comparison(rows)


def test_undefined_scores_are_left_out_in_pairs():
    row = evaluate._paired("speckle", np.array([0.2, np.nan, 0.4]), np.array([0.1, 0.1, np.nan]))
    assert (row["a"], row["b"], row["improvement"], row["images"]) == (0.2, 0.1, pytest.approx(0.1), 1)
    assert row["percent"] == pytest.approx(50) and row["p_t"] is None and row["a_se"] is None
    nothing = evaluate._paired("psnr", np.array([np.inf]), np.array([20.0]))
    assert nothing["a"] is nothing["percent"] is None and nothing["images"] == 0


def test_comparison_as_text(comparison):
    rows = comparison[0]
    text = evaluate.format_comparison(rows, ("v1", "v2"))
    mean, sample = text.split("\n\n")
    assert mean.splitlines()[0] == evaluate.ONE_STEP_MEAN and sample.startswith(
        "sample (heun, 3 and 2 steps)"
    )
    assert mean.splitlines()[1].split() == "v1 v2 improvement relative paired t Wilcoxon images".split()
    row = rows[0]
    line = mean.splitlines()[3]
    assert line.startswith("PSNR (dB)") and f"{row['a']:.2f} ± {row['a_se']:.2f}" in line
    assert f"{row['improvement']:+.2f} ± {row['improvement_se']:.2f}" in line and "p = " in line
    with pytest.raises(ValueError, match="empty"):
        evaluate.format_comparison([])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": 1}, "images=1 cannot be compared in pairs"),
        ({"images": 2.5}, "images=2.5"),
        ({"steps": 0}, "steps=0"),
        ({"steps": 2.5}, "steps=2.5"),
        ({"steps": (2, 0)}, "steps=0"),
        ({"steps": (1, 2, 3)}, r"steps=\(1, 2, 3\) are 3 numbers"),
        ({"observed_size": 8}, "observed_size=8 is below SSIM's window"),
        ({"device": "tpu9"}, "device='tpu9'"),
        ({"source": "no-source"}, "no-source"),
    ],
)
def test_compare_refuses_before_it_computes(change, message):
    def model(*_):
        pytest.fail("computed")

    with pytest.raises(ValueError, match=message):
        evaluate.compare(model, model, **{"images": 2, "device": "cpu", **change})


def test_models_side_by_side_are_paired_with_the_first():
    options = {"scales": (16, 32), "sample_scales": (16,), "steps": 2, "images": 3, "observed_size": 16}
    models = {"a": GaussianPosterior(0.1), "b": GaussianPosterior(-0.2)}
    rows, pictures = evaluate.side_by_side(models, "photos", **options)
    classical = ["-"] * 5  # linear, cubic, rbf, biharmonic, wiener
    assert [row["model"] for row in rows] == ["a", "a", "b", "b", *classical, "a", "b", *classical]
    assert [row["kind"] for row in rows[:5]] == ["mean", "sample", "mean", "sample", "classical"]
    assert {row["parameters"] for row in rows} == {0, None}
    assert set(pictures) == {(s, n) for s in (16, 32) for n in ("a", "b", "biharmonic", "target")}
    alone = {name: evaluate.multiscale(model, "photos", **options) for name, model in models.items()}
    for row in rows:
        same = {key: row[key] for key in ("scale", "method")}
        wanted = evaluate.find_row(alone["b" if row["model"] == "b" else "a"], **same)
        assert all(row[key] == wanted[key] for key in ("psnr", "ssim", "speckle", "versus_biharmonic"))
    for scale in (16, 32):
        a, b = (metrics.psnr(pictures[scale, name], pictures[scale, "target"]) for name in models)
        row = evaluate.find_row(rows, model="b", kind="mean", scale=scale)
        assert row["versus_first"] == pytest.approx((b - a).mean())
        assert row["versus_first_se"] == pytest.approx((b - a).std(ddof=1) / 3**0.5)
        assert row["versus_first_p"] == pytest.approx(metrics.paired_test(b - a)[0])
        same = evaluate.find_row(rows, model="a", kind="mean", scale=scale)
        assert same["versus_first"] == 0 and same["versus_first_p"] is None
    text = evaluate.format_table(rows).splitlines()
    assert text[0].split()[:4] == ["scale", "model", "method", "kind"] and text[0].endswith("PSNR - first")
    assert text[6].endswith("-")  # the first classical method
    for bad in ({}, {"target": models["a"]}):
        with pytest.raises(ValueError, match="pass at least one"):
            evaluate.side_by_side(bad)


def test_more_processes_than_images_are_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    options = {"images": 3, "observed_size": 16, "sharded": True}
    with pytest.raises(ValueError, match="images=3 are fewer than the 4 processes; pass images=4"):
        evaluate.multiscale(None, scales=(16,), **options)
    with pytest.raises(ValueError, match="images=3 are fewer than the 4 processes; pass images=4"):
        evaluate.compare(None, None, **options)


def test_no_ground_truth_is_said(tmp_path):
    np.savez(tmp_path / "small.npz", test=(smooth_images(2) * 255).astype(np.uint8))
    rows = evaluate.multiscale(
        GaussianPosterior(), str(tmp_path / "small.npz"), scales=(16, 24), steps=1, images=2, observed_size=16
    )
    for row in rows:
        if row["scale"] == 24:
            assert row["note"] == "no ground truth"
            assert row["psnr"] is row["ssim"] is row["versus_biharmonic"] is None
        else:
            assert row["note"] == "" and row["psnr"] > 0
    assert "no ground truth" in evaluate.format_table(rows)
    with pytest.raises(ValueError, match="size=24"):
        evaluate.multiscale(GaussianPosterior(), str(tmp_path / "small.npz"), scales=(16,), observed_size=24)


def test_steps_curve_falls_from_the_mean_to_a_sample():
    std = 0.3
    rng = np.random.default_rng(3)
    pictures = (0.5 + 0.5 * std * rng.standard_normal((4, 32, 32, 3))).clip(0, 1).astype(np.float32)
    rows = evaluate.steps_curve(GaussianPosterior(std=std), pictures, steps=(1, 300), draws=16)
    by_name = {(row["method"], row["steps"]): row for row in rows}
    mean = by_name["posterior mean (1 step)", 1]["psnr"]
    assert [row["kind"] for row in rows] == ["sample", "sample", "mean", "mean"]
    # One Euler step from noise is the one-step mean.
    assert by_name["sample (euler)", 1]["psnr"] == pytest.approx(mean, abs=0.01)
    # A sample has twice the squared error of the mean, and a mean of 16 samples 1 + 1/16 of it.
    assert mean - by_name["sample (euler)", 300]["psnr"] == pytest.approx(10 * np.log10(2), abs=0.1)
    assert mean - by_name["mean of 16 samples", 300]["psnr"] == pytest.approx(10 * np.log10(17 / 16), abs=0.1)


def test_samplers_are_compared_at_equal_cost():
    std = 0.3
    rng = np.random.default_rng(3)
    pictures = (0.5 + 0.5 * std * rng.standard_normal((4, 32, 32, 3))).clip(0, 1).astype(np.float32)
    calls = []

    class Counting(GaussianPosterior):
        def forward(self, noisy_values, *rest):
            calls.append(len(noisy_values))
            return super().forward(noisy_values, *rest)

    rows = evaluate.compare_samplers(Counting(std=std), pictures, evaluations=(8, 32), draws=8)
    samples = [row for row in rows if row["kind"] == "sample"]
    assert [row["method"] for row in samples[::2]] == [
        *("euler", "heun", "midpoint", "rk4", "ddim", "sde, temperature 0.5", "sde, temperature 1")
    ]
    # As many evaluations as the rows say, of the means too.
    assert sum(calls) == 4 * sum(row["evaluations"] for row in rows)
    at = {(row["method"], row["budget"]): row for row in rows}
    mean = at[evaluate.ONE_STEP_MEAN, 1]
    assert mean["kind"] == "mean" and at["euler", 8]["psnr"] == pytest.approx(at["ddim", 8]["psnr"], abs=1e-3)
    # A sample has twice the squared error of the mean; the fourth order is there first.
    assert mean["psnr"] - at["rk4", 32]["psnr"] == pytest.approx(10 * np.log10(2), abs=0.1)
    assert mean["psnr"] - at["euler", 8]["psnr"] < mean["psnr"] - at["heun", 32]["psnr"]
    averaged = at["mean of 8 samples", 32]
    assert averaged["kind"] == "mean" and (averaged["draws"], averaged["steps"]) == (8, 16)
    assert mean["psnr"] - averaged["psnr"] == pytest.approx(10 * np.log10(9 / 8), abs=0.1)
    # Mean absolute differences of pixels of which a fifth is observed: the mean has none among the others.
    assert at["rk4", 32]["sharpness"] == pytest.approx(1, abs=0.05) and mean["sharpness"] < 0.6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"evaluations": (4, 6)}, "multiples of 4"),
        ({"evaluations": ()}, "multiples of 4"),
        ({"evaluations": (0,)}, "=0 is not a whole number"),
        ({"methods": ("euler", "rk9")}, "rk9"),
        ({"temperatures": (-1.0,)}, "temperature=-1"),
    ],
)
def test_compare_samplers_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        evaluate.compare_samplers(GaussianPosterior(), smooth_images(1), **change)


def test_means_are_compared_in_pairs():
    pictures = np.full((3, 32, 32, 3), 0.5, dtype=np.float32)
    half = {bias: Exact(lambda coords: np.full((*coords.shape[:-1], 3), 0.5), bias) for bias in (0.1, 0.2)}
    rows = evaluate.compare_means({"a": half[0.1], "b": half[0.2]}, pictures, observed=0.25)
    assert [(row["model"], row["kind"], row["parameters"]) for row in rows] == [
        ("a", "mean", 0),
        ("b", "mean", 0),
    ]
    assert rows[0]["psnr"] == pytest.approx(21.249, abs=1e-3) and rows[0]["versus_first"] == 0
    assert rows[1]["versus_first"] == pytest.approx(-20 * np.log10(2), abs=1e-3)
    with pytest.raises(ValueError, match="models is empty"):
        evaluate.compare_means({}, pictures)


def test_table_is_aligned(rows_and_pictures):
    text = evaluate.format_table(rows_and_pictures[0])
    lines = text.splitlines()
    assert lines[0].split()[:3] == ["scale", "method", "kind"]
    assert len(lines) == 2 + len(rows_and_pictures[0])
    assert len({len(line) for line in lines}) == 1
    assert "±" in lines[2]
    with pytest.raises(ValueError, match="empty"):
        evaluate.format_table([])


def test_align_and_find_row():
    text = evaluate.align(["name", "n"], [["a", "10"], ["long name", "7"]], left=1)
    assert text.split("\n") == ["name        n", "---------  --", "a          10", "long name   7"]
    with pytest.raises(ValueError, match="3 columns, the head has 2"):
        evaluate.align(["name", "n"], [["a", "b", "c"]])
    rows = [{"scale": 32, "kind": "mean"}, {"scale": 64, "kind": "mean"}]
    assert evaluate.find_row(rows, kind="mean", scale=64) is rows[1]
    assert evaluate.find_row(rows, scale=96) is None
    assert evaluate.find_row(rows, missing=1) is None


def test_reading_says_what_a_number_belongs_to(rows_and_pictures):
    mean = {"scale": 32, "method": evaluate.ONE_STEP_MEAN, "kind": "mean", "psnr": 24.314, "psnr_se": 0.9}
    sample = {"scale": 32, "method": "sample (heun, 50 steps)", "kind": "sample", "psnr": 22, "psnr_se": None}
    upsampled = {"scale": 64, "method": "bilinear of 32 px mean", "kind": "mean", "psnr": 20, "psnr_se": None}
    rows = [upsampled, sample, mean]
    assert evaluate.reading(rows, 32, "psnr") == "24.31 ± 0.90 (mean), 22.00 (sample)"
    assert evaluate.reading([mean], 32, "psnr", 1) == "24.3 ± 0.9 (mean)"
    assert evaluate.reading(rows, 64, "psnr") == "-"
    # The names are those that multiscale writes.
    rows, _ = rows_and_pictures
    assert "(mean), " in evaluate.reading(rows, rows[0]["scale"], "psnr")


def test_results_file(tmp_path, rows_and_pictures):
    path = evaluate.write_results(
        rows_and_pictures[0], tmp_path / "new" / "r.json", command="python -m x", config={"steps": 3}
    )
    document = json.loads(path.read_text())
    assert document["command"] == "python -m x" and document["config"] == {"steps": 3}
    assert document["rows"] == rows_and_pictures[0]
    assert document["versions"]["torch"] == torch.__version__
    assert str(tmp_path) not in path.read_text()
    with pytest.raises(ValueError, match="JSON compliant"):
        evaluate.write_results([{"psnr": float("nan")}], path, command="x")
    assert json.loads(path.read_text()) == document, "a refused write must leave the file alone"


# ---------------------------------------------------------------- influence


class Memory(nn.Module):
    """out[t] = sum over i <= t of decay^(t - i) M in[i], written out."""

    def __init__(self, width, decay=0.5):
        super().__init__()
        torch.manual_seed(0)
        self.mix, self.decay = torch.randn(width, width), decay

    def forward(self, tokens):
        steps = torch.arange(tokens.shape[1])
        age = steps[:, None] - steps
        weight = torch.where(age >= 0, self.decay ** age.clamp_min(0).float(), 0.0)  # (L, L)
        return torch.einsum("ti,bic,dc->btd", weight, tokens, self.mix)


@pytest.mark.parametrize("at_once", [7, 1000])  # channels in groups of one, or all together
def test_influence_of_a_decaying_memory(at_once, monkeypatch):
    monkeypatch.setattr(evaluate, "TOKENS_PER_FORWARD", at_once)
    memory = Memory(3)
    influence = evaluate.token_influence(memory, torch.randn(7, 3), 4)
    wanted = memory.mix.norm() * torch.tensor([1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 0, 0])
    torch.testing.assert_close(influence, wanted)
    assert (influence[5:] == 0).all()


def test_a_causal_scan_is_blind_to_what_comes_after():
    torch.manual_seed(0)
    points = images.grid_coords(5, 6)[None]
    tokens, query = torch.randn(30, 8), 14
    one = evaluate.token_influence(ssm.SelectiveSSM(8, 4, 2), tokens, query)
    assert (one[query + 1 :] == 0).all() and (one[: query + 1] > 0).all()
    kinds = ("row", "column", "diagonal", "antidiagonal")
    orders = torch.stack([point_order(points, kind) for kind in kinds], dim=1)
    place = inverse_order(orders)[0]  # (K, L)
    met = (place <= place[:, query : query + 1]).any(0)
    layer = ssm.MultiDirectionalSSM(8, 4, 2, 4, False, False, True, 0.0)
    four = evaluate.token_influence(layer, tokens, query, orders)
    assert torch.equal(four > 0, met) and not met.all() and not met[query + 1]
    layer = ssm.MultiDirectionalSSM(8, 4, 2, 4, True, True, True, 0.0)
    ways = evaluate.token_influence(layer, tokens, query, torch.cat([orders, orders], dim=1))
    assert (ways > 0).all()


class Kernel(nn.Module):
    """The exact velocity at t = 0 of the field sum over i of exp(-|q - i|^2) value_i."""

    def forward(self, noisy_values, query_coords, t, input_coords, input_values):
        assert (t == 0).all()
        apart = (query_coords[:, :, None] - input_coords[:, None]).square().sum(-1)  # (B, Q, I)
        return torch.exp(-apart) @ input_values - noisy_values


@pytest.mark.parametrize("at_once", [100, 10**6])
def test_influence_of_observed_pixels_on_a_field_that_is_a_kernel(at_once, monkeypatch):
    monkeypatch.setattr(evaluate, "TOKENS_PER_FORWARD", at_once)
    image = smooth_images(1, 8)[0]
    influence = evaluate.pixel_influence(Kernel(), image, (2, 5), observed=0.3, draws=5)
    coords = images.grid_coords(8, 8).reshape(8, 8, 2)
    wanted = 3**0.5 * torch.exp(-(coords - coords[2, 5]).square().sum(-1)).numpy()
    seen = ~np.isnan(influence)
    np.testing.assert_allclose(influence[seen], wanted[seen], rtol=1e-5)
    assert not seen[2, 5] and 19 < seen.sum() < 63
    more = evaluate.pixel_influence(Kernel(), (255 * image).astype(np.uint8), (2, 5), observed=0.3, draws=60)
    assert np.isnan(more).sum() == 1  # the pixel itself


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": np.zeros((8, 8))}, "images has shape"),
        ({"pixel": (8, 0)}, "pixel's row=8 does not exist; pass a whole number from 0 to 7"),
        ({"pixel": (0, -1)}, "pixel's column=-1"),
        ({"pixel": (0.5, 1)}, "pixel's row=0.5"),
        ({"pixel": (1,)}, r"pixel=\(1,\) is not a pair; pass \(row, column\)"),
        ({"observed": 1.0}, "observed=1.0 of 64 pixels is all of them; pass 0.2"),
        ({"observed": 0.0}, "observed"),
        ({"draws": 0}, "draws=0"),
        ({"device": "tpu9"}, "device='tpu9'"),
    ],
)
def test_pixel_influence_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        evaluate.pixel_influence(Kernel(), **{"image": smooth_images(1, 8)[0], "pixel": (2, 5), **change})


@pytest.mark.parametrize(
    ("tokens", "token", "message"),
    [
        (torch.zeros(1, 7, 3), 0, r"tokens has shape \(1, 7, 3\); pass floating tokens \(L, D\)"),
        (torch.zeros(7, 3, dtype=torch.long), 0, "pass floating tokens"),
        (torch.zeros(7, 3), 7, "token=7 does not exist; pass a whole number from 0 to 6"),
        (torch.zeros(7, 3), True, "token=True"),
    ],
)
def test_token_influence_refuses(tokens, token, message):
    with pytest.raises(ValueError, match=message):
        evaluate.token_influence(Memory(3), tokens, token)


# ---------------------------------------------------------------- cost


class OneLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, noisy_values, query_coords, t, input_coords, input_values):
        return self.layer(noisy_values)


def test_cost_of_a_linear_by_hand():
    cost = evaluate.model_cost(OneLinear(), n_inputs=5, n_queries=7, batch_size=2)
    assert cost["parameters"] == 3 * 3 + 3
    assert cost["flops_forward"] == 2 * (2 * 7) * 3 * 3
    assert cost["flops_scan"] == 0
    assert cost["activation_bytes"] == 4 * 2 * 7 * 3  # its input
    assert cost["training_bytes"] == 4 * 2 * 7 * 3 + 5 * 4 * 12


def test_cost_of_v1_matches_a_real_forward_pass(monkeypatch):
    config = MambaDiffusionConfig(
        d_model=32, num_layers=2, d_state=4, num_fourier_features=8, num_heads=4, dropout=0.0
    )
    model = MambaDiffusion(config).eval()
    cost = evaluate.model_cost(model, n_inputs=9, n_queries=11, batch_size=3)
    assert cost["parameters"] == sum(p.numel() for p in model.parameters())
    assert not model.training
    # Of two layers: 9 B L D N + 2 B L D with L = 20 tokens and D = expand * d_model = 64 channels.
    assert cost["flops_scan"] == 2 * 3 * 20 * 64 * (9 * 4 + 2)
    batch = [torch.rand(3, *shape) for shape in ((11, 3), (11, 2), (), (9, 2), (9, 3))]
    monkeypatch.setattr(ssm, "selective_scan", lambda u, *args, **options: u)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        model(*batch)
    assert cost["flops_forward"] - cost["flops_scan"] == counter.get_total_flops()


def test_cost_grows_as_it_should():
    model = MambaDiffusion(
        MambaDiffusionConfig(d_model=32, num_layers=2, num_fourier_features=8, num_heads=4)
    )
    small, large = (evaluate.model_cost(model, 50, 50, batch) for batch in (2, 8))
    for key in ("flops_forward", "activation_bytes"):
        assert large[key] == pytest.approx(4 * small[key], rel=0.01)
    longer = evaluate.model_cost(model, 50, 150, 2)
    assert longer["flops_scan"] == 2 * small["flops_scan"]
    with pytest.raises(ValueError, match="n_queries=0"):
        evaluate.model_cost(model, 50, 0, 2)


@pytest.mark.parametrize("name", ["v1", "v2", "field"])
def test_equal_size_meets_the_number(name):
    model_class, config_class = FIELD_MODELS[name]
    config = config_class(d_model=32, num_layers=2, num_fourier_features=8, num_heads=4)
    small = sum(p.numel() for p in model_class(config).parameters())
    wanted = 2 * small
    grown = evaluate.equal_size(model_class, config, wanted)
    count = sum(p.numel() for p in model_class(grown).parameters())
    columns = 2 * 32 + 1  # of one more hidden unit in one network
    assert abs(count - wanted) <= 6 * columns
    assert replace(grown, mlp_ratio=config.mlp_ratio) == config  # nothing else has changed
    again = evaluate.equal_size(model_class, config, small)
    assert int(again.mlp_ratio * 32) == int(config.mlp_ratio * 32)
    with pytest.raises(ValueError, match="parameters=100 cannot be met"):
        evaluate.equal_size(model_class, config, 100)


def test_tables_of_means_and_of_samplers():
    row = {"model": "v1", "parameters": 1234, "psnr": 20.456, "psnr_se": 0.5, "ssim": 0.7}
    other = {**row, "model": "v2", "versus_first": 1.5, "versus_first_se": None}
    text = evaluate.format_means([{**row, "versus_first": 0.0, "versus_first_se": 0.0}, other]).splitlines()
    assert text[0].split("  ")[-1].strip() == "PSNR - v1"
    assert text[2].split() == ["v1", "1,234", "20.46", "±", "0.50", "0.700", "+0.00", "±", "0.00"]
    assert text[3].split()[-1] == "+1.50"
    sample = {"method": "heun", "kind": "sample", "evaluations": 4, "psnr": 20.0, "ssim": 0.5}
    sample |= {"speckle": None, "sharpness": 1.0}
    line = evaluate.format_samplers([sample]).splitlines()[2]
    assert line.split() == ["heun", "4", "20.000", "0.500", "-", "1.000"]
    for rows in ([], [sample, {**sample, "kind": "mean"}]):
        with pytest.raises(ValueError, match="none or of two kinds"):
            evaluate.format_samplers(rows)
    with pytest.raises(ValueError, match="rows is empty"):
        evaluate.format_means([])


def test_best_seconds_warms_up_and_keeps_to_its_budget():
    waits, made = iter([0.05, 0.004, 0.002, 0.004, 0.05]), []

    def call():
        made.append(next(waits))
        time.sleep(made[-1])

    assert 0.002 <= evaluate.best_seconds(call, torch.device("cpu"), repeats=3) < 0.004
    assert made == [0.05, 0.004, 0.002, 0.004], "one call to warm up, three that count"
    evaluate.best_seconds(lambda: made.append(time.sleep(0.01)), torch.device("cpu"), repeats=9, budget=0.015)
    assert len(made) == 4 + 3, "the budget is spent after two calls that count"


def test_peak_bytes_are_those_of_what_is_alive():
    def call():
        block = torch.empty(1 << 16).add_(1)  # 256 KiB
        del block
        return torch.empty(1 << 16).sum()

    assert evaluate.peak_bytes(call, torch.device("cpu")) == pytest.approx(4 << 16, rel=0.01)


def test_query_cost_counts_bytes_of_a_known_model():
    class Doubles(nn.Module):
        def forward(self, noisy_values, query_coords, t, input_coords, input_values):
            return noisy_values.repeat(1, 8, 1)[:, : noisy_values.shape[1]].clone()

    rows = evaluate.query_cost(Doubles(), (16, 32), n_inputs=4)
    assert [row["length"] for row in rows] == [256, 1024] and all(row["seconds"] > 0 for row in rows)
    small, large = (row["memory"] for row in rows)
    assert small >= 9 * 256 * 3 * 4 and large - small == pytest.approx(9 * 768 * 3 * 4, rel=0.05)
    with pytest.raises(ValueError, match="sizes is empty"):
        evaluate.query_cost(Doubles(), ())
    with pytest.raises(ValueError, match="=0 is not a whole number"):
        evaluate.query_cost(Doubles(), (16, 0))


def test_cost_leaves_the_model_and_the_scan_alone():
    model = MambaDiffusion(
        MambaDiffusionConfig(d_model=32, num_layers=1, num_fourier_features=8, num_heads=4)
    )
    fields = {
        "input_coords": torch.rand(1, 4, 2),
        "input_values": torch.rand(1, 4, 3),
        "query_coords": torch.rand(1, 5, 2),
        "query_values": torch.rand(1, 5, 3),
    }
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    evaluate.model_cost(model, 4, 5, 1)
    for name, tensor in model.state_dict().items():  # shared tensors too
        torch.testing.assert_close(tensor, before[name])
    assert torch.isfinite(flow.flow_matching_loss(model, fields))


# ---------------------------------------------------------------- autoencoders


class MeanColour(nn.Module):
    """An autoencoder known in closed form: the latent is the mean colour, the decoding that colour."""

    def __init__(self, std=(1.0, 1.0, 1.0)):
        super().__init__()
        self.config = SimpleNamespace(phase=1, latent_dim=3)
        self.std = torch.tensor(std)

    def encode(self, coords, values):
        return values.mean(1)

    def decode(self, coords, latent):
        return latent[:, None].expand(-1, coords.shape[1], -1)

    def normalise(self, latent):
        return latent / self.std

    def denormalise(self, latent):
        return latent * self.std


def colours(count, seed=0, size=16):
    """Images of one colour each, (count, size, size, 3) floats."""
    values = np.random.default_rng(seed).uniform(0.2, 0.8, (count, 1, 1, 3)).astype(np.float32)
    return np.broadcast_to(values, (count, size, size, 3))


@pytest.mark.parametrize("at_once", [1, 600, 10**6])
def test_latents_of_images_and_back(at_once, monkeypatch):
    monkeypatch.setattr(evaluate, "TOKENS_PER_FORWARD", at_once)
    model, pictures = MeanColour(), colours(5)
    for observed in (0.2, 1.0):
        latents = evaluate.encode_images(model, pictures, observed)
        assert latents.shape == (5, 3)
        np.testing.assert_allclose(evaluate.decode_latents(model, latents, 16), pictures, atol=1e-6)
    larger = evaluate.decode_latents(model, latents, 24)
    np.testing.assert_allclose(larger[:, 7, 20], pictures[:, 0, 0], atol=1e-6)
    fields = evaluate.observe_images(smooth_images(3), 0.3, seed=4)
    torch.testing.assert_close(evaluate.encode_images(model, fields), fields["input_values"].mean(1))
    with pytest.raises(ValueError, match="size=0"):
        evaluate.decode_latents(model, latents, 0)


def test_first_phase_is_the_decoding_and_shares_its_weights(autoencoder):
    first = evaluate.first_phase(autoencoder)
    assert first.config.phase == 1 and evaluate.first_phase(first) is first
    latents = evaluate.encode_images(autoencoder, smooth_images(2), 0.2, seed=3)
    decoded = evaluate.decode_latents(autoencoder, latents, 24)
    assert np.array_equal(decoded, evaluate.decode_latents(first, latents, 24))
    one_step = evaluate.reconstruct(first, smooth_images(2), 0.2, size=24, seed=3)["fields"]
    np.testing.assert_allclose(one_step, decoded, atol=1e-5)
    pointers = {p.data_ptr() for p in autoencoder.state_dict().values()}
    assert all(p.data_ptr() in pointers for p in first.state_dict().values())


def test_compare_autoencoders_is_paired_with_pca_of_the_same_pixels():
    # Of images of one colour, three principal components are the mean colour: what the model encodes.
    pattern = np.where(np.indices((16, 16)).sum(0) % 2, 0.1, -0.1)[..., None].astype(np.float32)
    pictures = colours(4, seed=1) + pattern
    rows, made = evaluate.compare_autoencoders(MeanColour(), pictures, colours(20), observed=0.25, seed=2)
    names = [f"{n} of 3, {s}" for s in ("all pixels", "25% of the pixels") for n in ("PCA", "autoencoder")]
    assert [row["method"] for row in rows] == names == list(made)
    assert [row["kind"] for row in rows] == ["classical", "mean"] * 2
    assert rows[0]["psnr"] == pytest.approx(20, abs=1e-4)
    assert rows[1]["versus_first"] == pytest.approx(0, abs=1e-4)
    seen = evaluate.observe_images(pictures, 0.25, 2)["input_values"].mean(1).numpy()
    np.testing.assert_allclose(made[names[3]][:, 0, 0], (seen + 1) / 2, atol=1e-6)
    assert rows[3]["versus_first"] == pytest.approx(rows[3]["psnr"] - rows[2]["psnr"])
    with pytest.raises(ValueError, match="dims=3"):
        evaluate.compare_autoencoders(MeanColour(), pictures, colours(3))


def test_field_pictures_are_those_of_side_by_side():
    torch.manual_seed(0)
    model = LocalImplicitField(LocalImplicitFieldConfig(d_model=16, num_heads=2, neighbours=4, num_layers=1))
    options = {"scales": (16, 32), "images": 2, "observed_size": 16, "seed": 5}
    pictures, mask = evaluate.field_pictures({"a": model}, "photos", **options)
    _, wanted = evaluate.side_by_side({"a": model}, "photos", sample_scales=(), **options)
    for key, field in pictures.items():
        np.testing.assert_array_equal(field, wanted[key])
    assert set(pictures) == {(s, n) for s in (16, 32) for n in ("a", "target")}
    truth = images.load_images("photos", "test", 16, limit=2)
    np.testing.assert_array_equal(mask, evaluate.observe_images(truth, 0.2, 5)["mask"])


def shifted(shift, inside=0.0):
    """Fields of two sizes and their mask; the large one is the small one's pixels twice, plus a shift."""
    low = smooth_images(3) * 0.5 + 0.1
    mask = np.zeros((3, 16, 16), bool)
    mask[:, 2, 3] = True
    low[mask] += inside
    return {(16, "m"): low, (32, "m"): low.repeat(2, 1).repeat(2, 2) + np.float32(shift)}, mask


def test_consistency_of_scales_in_closed_form():
    pictures, mask = shifted(0.1)
    pictures[32, "m"][:, 4:6, 6:8] += 0.05  # where a pixel was observed, no matter
    pictures |= {(16, "target"): pictures[16, "m"] + np.float32(0.01), (32, "target"): None}
    small, large = evaluate.scale_scores(pictures, mask, ["m"])
    assert small["psnr"] == pytest.approx(40, abs=1e-3) and small["consistency"] is None
    assert large["consistency"] == pytest.approx(20, abs=1e-4) and large["psnr"] is None
    pictures[32, "target"] = np.stack([evaluate.resize_field(f, 32, 32) for f in pictures[16, "m"]]) + 0.1
    large = evaluate.scale_scores(pictures, mask, ["m"])[1]
    assert large["versus_bicubic"] == pytest.approx(large["psnr"] - 20, abs=1e-2)
    assert "20.00 ± 0.00" in evaluate.format_scales([small, large])

    better, _ = shifted(0.01)
    both = {(s, "n"): field for (s, _), field in better.items()} | pictures
    (gain, error) = evaluate.consistency_difference(both, mask, "n", "m")[32]
    assert gain == pytest.approx(20, abs=1e-2) and error < 1e-2
    with pytest.raises(ValueError, match="24 px is not 16 whole cells"):
        wrong = {(side, "m"): np.zeros((1, side, side, 3)) for side in (16, 24)}
        evaluate.scale_scores(wrong | {(16, "target"): None, (24, "target"): None}, mask[:1], ["m"])


def test_sampling_scores_stand_beside_the_decoding(autoencoder):
    options = {"scales": [16, 32], "images": 2, "observed_size": 16, "seed": 1}
    rows, pictures = evaluate.sampling_scores(autoencoder, "photos", steps=2, draws=3, **options)
    assert [row["scale"] for row in rows] == [16] * 4 + [32] * 3
    assert [row["kind"] for row in rows] == ["mean", "mean", "sample", "mean", "mean", "mean", "sample"]
    truth = evaluate.observe_images(images.load_images("photos", "test", 16, limit=2), 0.2, 1)
    decoded = evaluate.decode_latents(autoencoder, evaluate.encode_images(autoencoder, truth), 32)
    np.testing.assert_allclose(pictures[32, "decoding"], decoded, atol=1e-5)
    assert rows[0]["versus_first"] == 0
    assert rows[2]["versus_first"] == pytest.approx(rows[2]["psnr"] - rows[0]["psnr"])
    sharp = metrics.sharpness(pictures[32, "sample (heun, 2 steps)"], pictures[32, "target"])
    assert rows[-1]["sharpness"] == pytest.approx(sharp.mean()) and "sharpness" in evaluate.format_table(rows)
    with pytest.raises(ValueError, match="of phase 1 and draws no samples"):
        evaluate.sampling_scores(evaluate.first_phase(autoencoder), **options)


# ---------------------------------------------------------------- latents: classes, distributions, ways


def test_labelled_photographs_of_train_and_test_share_no_pixel(monkeypatch):
    halves = np.zeros((200, 400, 3), np.uint8)
    halves[:, 200:] = 255
    monkeypatch.setattr(evaluate.data, "coffee", lambda: halves)
    for split, value in (("train", 0), ("test", 255)):
        pictures, labels, names = evaluate.labelled_images("photos", split, 8, 12)
        assert pictures.shape == (12, 8, 8, 3) and pictures.dtype == np.uint8
        assert list(labels) == [*range(6), *range(6)] and names[4] == "coffee"
        assert (pictures[labels == 4] == value).all()
        again = evaluate.labelled_images("photos", split, 8, 6)[0]
        np.testing.assert_array_equal(again, pictures[:6])
    with pytest.raises(ValueError, match="source='moon' has no classes"):
        evaluate.labelled_images("moon", "train")
    with pytest.raises(ValueError, match="split='dev'"):
        evaluate.labelled_images("photos", "dev")


def test_labels_of_cifar10_are_those_of_its_records(tmp_path, monkeypatch):
    monkeypatch.setenv("NF_DATA", str(tmp_path))
    assert evaluate.cifar10_folder() is None
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, labels in (("data_batch_1", [3, 5]), ("data_batch_2", [9]), ("test_batch", [0])):
        records = rng.integers(0, 256, (len(labels), 3073), dtype=np.uint8)
        records[:, 0] = labels
        records.tofile(folder / f"{name}.bin")
    assert evaluate.cifar10_folder() == folder
    pictures, labels, names = evaluate.labelled_images("cifar10", "train", limit=10)
    assert list(labels) == [3, 5, 9] and names[3] == "cat" and len(pictures) == 3
    np.testing.assert_array_equal(pictures, images.load_images("cifar10", "train"))
    assert list(evaluate.labelled_images("cifar10", "train", limit=2)[1]) == [3, 5]


def test_probe_and_the_directions_of_its_classes():
    rng = np.random.default_rng(0)
    centres = 4 * np.eye(3, 5)
    labels = np.arange(150) % 3
    latents = (centres[labels] + rng.normal(size=(150, 5))) * [1, 10, 0.1, 1, 1]
    probe = evaluate.fit_probe(latents, labels)
    assert probe.score(latents, labels) > 0.9
    directions = evaluate.class_directions(probe).numpy()
    np.testing.assert_allclose(np.linalg.norm(directions / latents.std(0), axis=1), 1, rtol=1e-5)
    score = probe.decision_function
    for label in range(3):  # no other direction of this length raises the score as much
        rise = (score(latents[:1] + directions[label]) - score(latents[:1]))[0, label]
        others = rng.normal(size=(200, 5))
        others *= latents.std(0) / np.linalg.norm(others, axis=1, keepdims=True)
        assert rise > (score(latents[:1] + others) - score(latents[:1]))[:, label].max()
    with pytest.raises(ValueError, match="labels have shape"):
        evaluate.fit_probe(latents, labels[:-1])


def test_strengths_and_principal_directions_of_a_known_decoder():
    model = MeanColour(std=(0.5, 0.1, 0.1))
    strengths = evaluate.channel_strengths(model)
    np.testing.assert_allclose(strengths, np.array([0.5, 0.1, 0.1]) / 2 / 3**0.5, rtol=1e-5)
    latents = torch.zeros(40, 3)
    latents[:, 0] = torch.linspace(-0.3, 0.3, 40)
    latents[:, 1] = torch.linspace(-0.3, 0.3, 40).square()
    directions, shares = evaluate.principal_directions(model, latents, 2)
    np.testing.assert_allclose(directions[0].abs(), [latents[:, 0].std(correction=0), 0, 0], atol=1e-5)
    np.testing.assert_allclose(directions[1].abs(), [0, latents[:, 1].std(correction=0), 0], atol=1e-5)
    assert shares.sum() == pytest.approx(1) and shares[0] > shares[1] > 0
    with pytest.raises(ValueError, match="count=4"):
        evaluate.principal_directions(model, latents, 4)


def test_frechet_distance_of_known_gaussians():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(500, 4)) @ rng.normal(size=(4, 4))
    assert evaluate.frechet_distance(a, a[::-1]) == pytest.approx(0, abs=1e-6)
    assert evaluate.frechet_distance(a, a + np.array([1, 0, 2, 0])) == pytest.approx(5)
    spread = np.trace(np.cov(a, rowvar=False))
    assert evaluate.frechet_distance(a, 3 * (a - a.mean(0)) + a.mean(0)) == pytest.approx(4 * spread)
    with pytest.raises(ValueError, match=r"features have shapes \(500, 4\) and \(500, 3\)"):
        evaluate.frechet_distance(a, a[:, :3])


def test_image_distance_is_a_part_of_the_variance():
    pictures = smooth_images(40)
    assert evaluate.image_distance(pictures, pictures, 8) == pytest.approx(0, abs=1e-6)
    mean = np.broadcast_to(pictures.mean(0), pictures.shape)
    assert evaluate.image_distance(mean, pictures, 8) == pytest.approx(1, rel=1e-3)
    with pytest.raises(ValueError, match="at most 39 dims"):
        evaluate.image_distance(pictures, pictures, 40)


def test_gradients_of_a_ramp():
    ramp_x = np.broadcast_to(np.arange(32, dtype=np.float32)[:, None] / 64, (1, 32, 32, 3))
    features = evaluate.gradient_features(ramp_x).reshape(3, 2, 4, 4)  # scale, axis, cells
    assert (features[:, 0] == 0).all()  # along columns nothing changes
    for scale in range(3):
        step, width = 2**scale / 64, 8 / 2**scale
        np.testing.assert_allclose(features[scale, 1, :, :3], step, rtol=1e-5)
        np.testing.assert_allclose(features[scale, 1, :, 3], step * (width - 1) / width, rtol=1e-5)
    with pytest.raises(ValueError, match="a multiple of 16"):
        evaluate.gradient_features(np.zeros((1, 24, 24, 3)))


def test_contrast_of_a_fainter_picture():
    one, two = smooth_images(2, 32)
    ends = np.stack([one, two])
    assert evaluate.contrast(one, np.stack([one, one])) == pytest.approx(1)
    assert evaluate.contrast(0.5 * one, np.stack([one, one])) == pytest.approx(0.5)
    weak, strong = (np.abs(np.diff(x, axis=0)).mean() + np.abs(np.diff(x, axis=1)).mean() for x in ends)
    assert evaluate.contrast(one, ends) == pytest.approx(2 * weak / (weak + strong), rel=1e-5)


def test_ways_through_a_linear_decoder_are_blends():
    pictures = colours(2, size=16)
    paths = evaluate.interpolation_paths(MeanColour(), pictures, alphas=(0.0, 0.5, 1.0))
    assert list(paths) == ["latent", "RGB"] and paths["RGB"].shape == (3, 16, 16, 3)
    np.testing.assert_allclose(paths["latent"], paths["RGB"], atol=1e-6)
    np.testing.assert_allclose(paths["RGB"][1], pictures.mean(0), atol=1e-6)
    with pytest.raises(ValueError, match="pass two"):
        evaluate.interpolation_paths(MeanColour(), colours(3))


def test_ways_through_noise_end_in_the_pictures(autoencoder):
    pictures = images.load_images("photos", "test", 16, limit=2)
    codes = evaluate.image_codes(autoencoder, pictures, steps=20)
    assert codes[0].shape == (2, autoencoder.config.latent_dim) and codes[1].shape == (2, 256, 3)
    assert evaluate.image_codes(evaluate.first_phase(autoencoder), pictures)[1] is None
    paths = evaluate.interpolation_paths(autoencoder, pictures, alphas=(0.0, 1.0), steps=20, codes=codes)
    assert list(paths) == list(evaluate.WAYS)
    assert (metrics.psnr(paths["latent + noise"], pictures / 255.0) > 35).all()
    decoded = evaluate.decode_latents(autoencoder, codes[0], 16)
    np.testing.assert_allclose(paths["latent"], decoded, atol=1e-5)
    assert (metrics.psnr(decoded, pictures / 255.0) < 30).all()


def test_interpolation_scores_know_a_detour():
    one, two = smooth_images(2, 32)
    straight = np.stack([one, (one + two) / 2, two])
    checks = np.where(np.indices((32, 32)).sum(0) % 2, 0.05, -0.05)[..., None].astype(np.float32)
    detour = np.stack([one, (one + two) / 2 + checks, two])
    rows = evaluate.interpolation_scores(MeanColour(), [{"latent": detour, "RGB": straight}] * 2)
    assert [row["way"] for row in rows] == ["latent"] * 3 + ["RGB"] * 3
    assert [row["space"] for row in rows] == ["pixels", "latent", "gradients"] * 2
    direct = np.sqrt(np.square(two - one).mean())
    found = evaluate.find_row(rows, way="latent", space="pixels")
    assert found["bend"] == pytest.approx(0.1 / direct, rel=1e-5)
    assert found["ratio"] > 1 and found["pairs"] == 2
    blend = evaluate.find_row(rows, way="RGB", space="pixels")
    assert blend["ratio"] == pytest.approx(1) and blend["bend"] == pytest.approx(0, abs=1e-6)
    assert evaluate.find_row(rows, way="RGB", space="latent")["ratio"] == pytest.approx(1, abs=1e-4)
    assert blend["contrast"] == pytest.approx(evaluate.contrast(straight[1], straight[[0, 2]]))
    assert "second difference" in evaluate.format_interpolation(rows)

    verdicts = evaluate.interpolation_verdicts(rows)
    met = {v["criterion"]: v["met"] for v in verdicts}
    assert met["latent way smoother than RGB in pixels"] is False
    assert met["no double exposure halfway"]  # checks are contrast
    with pytest.raises(ValueError, match="pairs is empty"):
        evaluate.interpolation_scores(MeanColour(), [])


def test_multiscale_verdicts_compare_means_with_means():
    pictures = {}
    for scale in (32, 64, 96):
        target = pictures[scale, "target"] = 0.5 * smooth_images(2, scale)
        pictures[scale, "ae"] = target + np.float32(0.1)
        pictures[scale, "v1"] = target + np.float32({32: 0.1, 64: 0.2, 96: 0.11}[scale])
    verdicts = evaluate.multiscale_verdicts(pictures, "ae", "v1")
    psnr = {v["criterion"]: v for v in verdicts if v["criterion"].startswith("PSNR")}
    # 0, 6.02 and 0.83 dB; wanted are -0.5, 2 and 3
    assert [v["met"] for v in psnr.values()] == [True, True, False]
    assert "+6.02 ± 0.00 dB (20.00 dB)" in psnr["PSNR at 64: +2 to +4 dB to v1"]["measured"]
    assert len(verdicts) == 5 and all(v["experiment"] == 1 for v in verdicts)
    pictures[96, "target"] = None
    assert len(evaluate.multiscale_verdicts(pictures, "ae", "v1")) == 3
    table = evaluate.format_verdicts(verdicts)
    assert "success criterion" in table and "not met" in table.splitlines()[-2]
    with pytest.raises(ValueError, match="verdicts is empty"):
        evaluate.format_verdicts([])


def test_sampling_verdicts_say_what_a_sample_is():
    keys = ("method", "kind", "versus_first", "sharpness", "speckle")
    table = (
        ("decoding", "mean", 0.0, 0.7, 0.01),
        ("sample (heun, 2 steps)", "sample", -2.5, 1.0, 0.02),
        ("mean of 4 samples", "mean", 0.2, 0.8, None),
    )
    common = {"scale": 32, "versus_first_se": 0.1, "psnr": 20.0}
    rows = [{**common, **dict(zip(keys, line, strict=True))} for line in table]
    verdicts = evaluate.sampling_verdicts(rows)
    met = {v["criterion"]: v["met"] for v in verdicts}
    assert met == {
        "PSNR at 32: sample above decoding": False,
        "PSNR at 32: mean of 4 samples above decoding": True,
        "sharper at 32": True,
        "still smooth at 32": False,
    }
    assert "-2.50 ± 0.10 dB (20.00 dB)" in verdicts[0]["measured"]


# ---------------------------------------------------------------- generated spectrograms

GRIDS = LocalMamba2DConfig(dims=(8, 16), depths=(1, 1), d_state=2, mapping_width=8, num_classes=4, head_dim=4)


@pytest.fixture(scope="module")
def chirps():
    """(train, test, classifier) of chirps, 16 x 16."""
    train, test = (load_spectrograms("chirps", split, 16, 256) for split in ("train", "test"))
    return train, test, evaluate.fit_classifier(train, epochs=12)


def test_classifier_tells_unseen_chirps_apart_and_repeats_itself(chirps):
    train, test, classifier = chirps
    right = classifier(test.spectrograms).argmax(1) == test.labels
    assert right.double().mean() > 0.9 and not classifier.training
    assert classifier[0](test.spectrograms[:2]).shape == (2, 64)
    before = torch.get_rng_state()
    first, second = (evaluate.fit_classifier(train, epochs=1, seed=3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first(test.spectrograms[:4]), second(test.spectrograms[:4]))
    with pytest.raises(ValueError, match="pass at least 2"):
        evaluate.fit_classifier(train, batch_size=1)


def test_training_spectrograms_are_shifted_in_time_and_level():
    torch.manual_seed(0)
    grids = torch.full((200, 1, 2, 16), 0.5)
    grids[..., 8] = 0.75  # a click
    moved = evaluate._shifted(grids)
    level = moved[:, 0, 0].median(1).values - 0.5
    assert 0.1 < level.max() <= 0.15 and -0.15 <= level.min() < -0.1
    place = moved[:, 0, 0].argmax(1)
    assert set(place.tolist()) == {6, 7, 8, 9, 10}  # by up to an eighth of 16
    assert torch.equal(moved[:, :, 0], moved[:, :, 1])
    assert (moved[place == 10, 0, 0, :2] < -0.8).all() and (moved[place == 10, 0, 0, 2:] > 0.3).all()


def test_generated_scores_of_real_clips_copies_and_noise(chirps):
    train, test, classifier = chirps
    scores = {
        "test": evaluate.generated_scores(test.spectrograms, test.labels, classifier, train, test),
        "copies": evaluate.generated_scores(train.spectrograms, train.labels, classifier, train, test),
        "wrong": evaluate.generated_scores(test.spectrograms, (test.labels + 1) % 4, classifier, train, test),
        "noise": evaluate.generated_scores(
            torch.randn(test.spectrograms.shape).clamp(-1, 1), test.labels, classifier, train, test
        ),
    }
    assert scores["test"]["frechet"] == pytest.approx(0, abs=1e-3) and scores["test"]["copies"] == 0
    assert scores["copies"]["copies"] == 1 and scores["copies"]["nearest"] < 1e-3 < scores["test"]["nearest"]
    assert 0 < scores["copies"]["frechet"] < 0.1 * scores["noise"]["frechet"]
    assert scores["test"]["accuracy"] > 0.9 and scores["wrong"]["accuracy"] < 0.1
    assert scores["noise"]["nearest"] > scores["test"]["nearest"] and scores["noise"]["copies"] == 0
    mixed = torch.cat([train.spectrograms[:3], test.spectrograms[:9]])
    mixed = evaluate.generated_scores(mixed, torch.zeros(12, dtype=torch.int64), classifier, train, test)
    assert mixed["copies"] == pytest.approx(3 / 12) and mixed["count"] == 12
    with pytest.raises(ValueError, match=r"pass \(N, 1, 16, 16\)"):
        evaluate.generated_scores(test.spectrograms[..., :8], test.labels, classifier, train, test)


def test_nearest_is_the_root_mean_square_distance(chirps):
    train, test, classifier = chirps
    shifted = train.spectrograms[:5] + 0.05
    scores = evaluate.generated_scores(shifted, train.labels[:5], classifier, train, test)
    assert scores["nearest"] == pytest.approx(0.05, rel=1e-3)


def test_generated_spectrograms_are_scored_by_guidance(chirps, monkeypatch):
    train, test, classifier = chirps
    calls = []

    def oracle(model, count, height, width, *, labels, guidance, generator, **options):
        """At guidance 1 the test clips in their order, else silence."""
        calls.append((count, guidance, options, torch.rand((), generator=generator).item()))
        start = sum(c[0] for c in calls[:-1] if c[1] == guidance)
        assert torch.equal(labels, test.labels[start : start + count])
        grids = test.spectrograms[start : start + count]
        return grids if guidance == 1 else torch.full_like(grids, -1.0)

    monkeypatch.setattr(evaluate, "sample_grids", oracle)
    rows = evaluate.evaluate_generated(
        None, classifier, train, test, guidances=(1.0, 2.5), steps=3, max_batch=100
    )
    assert [(row["source"], row["guidance"]) for row in rows] == [
        ("test clips", None), ("training clips", None), ("generated", 1.0), ("generated", 2.5)
    ]  # fmt: skip
    assert [count for count, *_ in calls] == [100, 100, 56] * 2
    assert calls[0][3] == calls[3][3] and calls[0][2] == {"method": "heun", "steps": 3}  # the same noise
    test_row, training, made, silence = rows
    assert {**made, "source": 0, "guidance": 0} == {**test_row, "source": 0, "guidance": 0}
    assert training["copies"] == 1 and silence["accuracy"] == pytest.approx(0.25)
    assert silence["frechet"] > 10 * training["frechet"]
    lines = evaluate.format_generated(rows).splitlines()
    assert len(lines) == 6 and lines[2].split()[:3] == ["test", "clips", "-"] and " 25.0 ± " in lines[5]
    with pytest.raises(ValueError, match="guidances is empty"):
        evaluate.evaluate_generated(None, classifier, train, test, guidances=())


def test_generated_spectrograms_of_a_model(chirps):
    train, test, classifier = chirps
    torch.manual_seed(0)
    model = LocalMamba2D(GRIDS).eval()
    few = Spectrograms(test.spectrograms[:6], test.labels[:6], test.meta)
    rows = evaluate.evaluate_generated(
        model, classifier, train, few, guidances=(0.0, 2.0), steps=1, method="euler"
    )
    assert [row["count"] for row in rows] == [6, 6, 6, 6] and np.isfinite(rows[-1]["frechet"])


# ---------------------------------------------------------------- scans against attention


def test_mixer_costs_count_flops_that_grow_with_tokens_and_their_square():
    rows = evaluate.mixer_costs(GRIDS, (16, 32, 64), batch_size=2, repeats=0)
    assert [(row["size"], row["mixer"]) for row in rows] == [
        (size, mixer) for size in (16, 32, 64) for mixer in ("ssm", "attention")
    ]
    assert all(row["seconds"] is None and row["memory"] is None for row in rows)
    scans, attention = ([row for row in rows if row["mixer"] == mixer] for mixer in ("ssm", "attention"))
    # Everything in the scans' model but the conditioning is linear in the tokens.
    assert scans[2]["flops_forward"] == pytest.approx(4 * scans[1]["flops_forward"], rel=0.01)
    # In the twin, beside that, two products of L x L x D in each of 2 blocks of the fine stage and 1 of the
    # coarse one, of 2 grids.
    products = [8 * (2 * tokens**2 * 8 + (tokens // 4) ** 2 * 16) for tokens in (64, 256, 1024)]
    linear = [row["flops_forward"] - product for row, product in zip(attention, products, strict=True)]
    assert linear[2] == pytest.approx(4 * linear[1], rel=0.01)
    # 3 directions, state 2, inner widths 16 and 32, 9 N + 2 each (`model_cost`).
    assert scans[0]["flops_scan"] == 2 * 3 * (2 * 64 * 16 + 16 * 32) * (9 * 2 + 2)
    assert attention[0]["flops_scan"] == 0
    parameters = sum(p.numel() for p in LocalMamba2D(GRIDS).parameters())
    assert {row["parameters"] for row in scans} == {parameters}


def test_mixer_costs_are_measured_and_printed():
    captions = replace(GRIDS, num_classes=0, caption_dim=3, channels=2)
    before = torch.get_rng_state()
    rows = evaluate.mixer_costs(captions, (16,), repeats=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(row["seconds"] > 0 and row["memory"] > 16 * 16 * 2 * 4 for row in rows)
    table = evaluate.format_mixer_costs(rows).splitlines()
    ratio = rows[0]["flops_forward"] / rows[1]["flops_forward"]
    assert table[-1].split()[:4] == ["16", "x", "16", "ratio"] and f"{ratio:.2f}" in table[-1]
    for wrong, message in (({"sizes": ()}, "sizes is empty"), ({"repeats": -1}, "repeats=-1")):
        with pytest.raises(ValueError, match=message):
            evaluate.mixer_costs(GRIDS, **wrong)


# ---------------------------------------------------------------- seed 000's validation checklist


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (GRIDS, "a dropped condition is zero"),
        (replace(GRIDS, caption_dim=3, channels=2, mixer="attention"), "a dropped condition is zero"),
        (replace(GRIDS, num_classes=0), "takes no condition"),
    ],
)
def test_checklist_of_a_sound_model_holds(config, found):
    before = torch.get_rng_state()
    rows = evaluate.local_mamba_checklist(config, size=16)
    assert [(row["item"], row["ok"]) for row in rows] == [
        ("forward and backward", True), ("classifier-free guidance", True), ("cost", True)
    ], rows  # fmt: skip
    assert torch.equal(torch.get_rng_state(), before)
    parameters = len(list(LocalMamba2D(config).parameters()))
    assert rows[0]["found"].startswith("2 x 16 x 16, loss ") and f"{parameters} gradients" in rows[0]["found"]
    assert found in rows[1]["found"] and "of attention's" in rows[2]["found"]


def test_checklist_names_what_does_not_hold(monkeypatch):
    whole = LocalMamba2D._condition

    def ignores_drop(self, t, labels, captions, drop):
        return whole(self, t, labels, captions, None)

    monkeypatch.setattr(LocalMamba2D, "_condition", ignores_drop)
    step, guidance, cost = evaluate.local_mamba_checklist(GRIDS, size=16)
    assert step["ok"] and cost["ok"] and not guidance["ok"]
    assert "dropped [True, True]" in guidance["found"]

    def ignores_labels(self, t, labels, captions, drop):
        return whole(self, t, labels, captions, torch.ones(len(t), dtype=torch.bool, device=t.device))

    monkeypatch.setattr(LocalMamba2D, "_condition", ignores_labels)
    step, guidance, _ = evaluate.local_mamba_checklist(GRIDS, size=16)
    assert not step["ok"] and "zero or not finite: class_embedding.weight" in step["found"]
    assert "kept [False, False]" in guidance["found"]

    def fails(self, *arguments):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(LocalMamba2D, "forward", fails)
    rows = evaluate.local_mamba_checklist(GRIDS, size=16)
    assert [row["ok"] for row in rows] == [False] * 3
    assert all(row["found"] == "RuntimeError: no kernel image" for row in rows)


def test_the_first_phase_stays_where_the_model_is(autoencoder):
    """Buffers that are not saved, too: on a GPU a decoding would mix devices otherwise."""
    twin = evaluate.first_phase(copy.deepcopy(autoencoder).double())
    assert {tensor.dtype for tensor in (*twin.parameters(), *twin.buffers())} == {torch.float64}
    meta = evaluate.first_phase(copy.deepcopy(autoencoder).to("meta"))
    assert all(tensor.is_meta for tensor in (*meta.parameters(), *meta.buffers()))
