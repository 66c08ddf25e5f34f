"""Diffusion autoencoder: spectra and their code, encode and decode, the two phases, latents."""

import math

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from test_models import field, tiny_model

from nfhelpers.flow import flow_matching_loss, skip_weight
from nfhelpers.images import SparseFields, grid_coords
from nfhelpers.models import (
    LatentVelocityNetwork,
    LatentVelocityNetworkConfig,
    MambaDiffusionAutoencoderConfig,
    first_phase,
    fit_latent_statistics,
    fit_linear_code,
    load_model,
    second_phase,
)
from nfhelpers.models.diffae import (
    SPECTRUM_NOISE,
    SPECTRUM_TAIL,
    cosines,
    fit_spectrum,
    point_areas,
    spectrum_power,
)

phases = pytest.mark.parametrize("phase", [1, 2])


def tiny(phase=1, trained=True, **settings):
    return tiny_model("diffae", trained, phase=phase, **settings)


def encoded(model, arguments):
    return model.encode(arguments["input_coords"], arguments["input_values"])


def fields(count=4):
    images = np.random.default_rng(count).integers(0, 256, (count, 8, 8, 3)).astype(np.uint8)
    return SparseFields(images, queries=0.5, seed=0)


def test_points_count_for_the_area_around_them():
    grid = grid_coords(8, 8)[None]
    torch.testing.assert_close(point_areas(grid), torch.full((1, 64), 1 / 64), rtol=0.12, atol=0)
    crowded = point_areas(torch.cat([grid[:, :63], grid[:, :1].expand(-1, 9, -1)], dim=1))  # one, ten times
    assert crowded.sum().item() == pytest.approx(1) and crowded[0, 63:].sum() + crowded[0, 0] < 2 / 64
    # The integral of x^2 over the image, from random points, by their areas and by the plain mean.
    coords = torch.rand(200, 100, 2, generator=torch.Generator().manual_seed(0))
    square = coords[..., 0].square()
    weighted, plain = (point_areas(coords) * square).sum(1), square.mean(1)
    assert (weighted - 1 / 3).square().mean() < 0.25 * (plain - 1 / 3).square().mean()


def test_cosines_are_orthonormal_over_the_pixels_of_a_grid():
    basis = cosines(grid_coords(6, 5)[None].double(), 5)[0]  # (30, 25)
    torch.testing.assert_close(basis.T @ basis / 30, torch.eye(25).double(), rtol=0, atol=1e-6)
    x, y = grid_coords(6, 5).double().T
    expected = 2 * torch.cos(math.pi * 3 * y) * torch.cos(math.pi * x)
    torch.testing.assert_close(basis[:, 3 * 5 + 1], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("inputs", [9, 40])  # fewer and more than the 16 amplitudes
def test_a_spectrum_is_the_posterior_mean_of_a_gaussian_field(inputs):
    torch.manual_seed(0)
    coords, values = torch.rand(2, inputs, 2), torch.randn(2, inputs, 3)
    basis, power = cosines(coords.double(), 4), spectrum_power(4).double()
    noise = SPECTRUM_NOISE + SPECTRUM_TAIL * (1 - 1 / inputs)  # random points share no coordinate
    covariance = (basis * power) @ basis.mT + noise * torch.eye(inputs)
    expected = (basis * power).mT @ torch.linalg.solve(covariance, values.double())
    torch.testing.assert_close(fit_spectrum(coords, values, 4), expected, rtol=1e-6, atol=1e-8)


def test_the_spectrum_of_all_pixels_is_the_cosine_transform():
    amplitudes = torch.randn(1, 16, 3, dtype=torch.float64) * spectrum_power(4).sqrt()[:, None]
    grid = grid_coords(16, 16)[None].double()
    found = fit_spectrum(grid, cosines(grid, 4) @ amplitudes, 4)
    torch.testing.assert_close(found, amplitudes, rtol=1e-2, atol=1e-4)


def test_more_pixels_make_a_better_fit():
    """Also where there are as many of them as cosines, which hold half of the field's frequencies here."""
    generator = torch.Generator().manual_seed(0)
    grid = grid_coords(16, 16).double()
    amplitudes = torch.randn(8, 256, 3, generator=generator) * spectrum_power(16).sqrt()[:, None]
    truth, errors = cosines(grid, 16) @ amplitudes.double(), []  # (8, 256, 3)
    for count in (16, 32, 48, 64, 80, 128, 192, 256):  # 64 cosines
        chosen = torch.stack([torch.randperm(256, generator=generator)[:count] for _ in truth])
        values = truth.gather(1, chosen[..., None].expand(-1, -1, 3))
        errors.append((cosines(grid, 8) @ fit_spectrum(grid[chosen], values, 8) - truth).square().mean())
    assert (torch.stack(errors).diff() < 0).all(), errors


def test_an_untrained_autoencoder_is_a_projection():
    """It keeps the amplitudes with the most power: decoding and encoding again changes nothing."""
    model, grid = tiny(trained=False, latent_dim=20), grid_coords(16, 16)[None]
    latent = torch.randn(1, 20)
    torch.testing.assert_close(model.encode(grid, model.decode(grid, latent)), latent, rtol=2e-2, atol=2e-3)
    grey = torch.full((1, 256, 3), 0.4)
    torch.testing.assert_close(model.decode(grid, model.encode(grid, grey)), grey, rtol=1e-3, atol=1e-3)


def test_with_the_linear_code_of_a_training_set_it_is_pca():
    rng = np.random.default_rng(0)
    images, held_out = (rng.integers(0, 256, (n, 4, 4, 3)).astype(np.uint8) for n in (300, 5))
    model = tiny(trained=False)  # 4 cosines a side say all of 4 x 4 pixels
    fit_linear_code(model, images, batch_size=128)
    grid = grid_coords(4, 4).expand(5, -1, -1)
    latent = model.encode(grid, torch.from_numpy(held_out.reshape(5, 16, 3)).float() / 127.5 - 1)
    made = model.decode(grid, latent) / 2 + 0.5
    pca = PCA(6).fit(images.reshape(300, -1) / 255)
    expected = pca.inverse_transform(pca.transform(held_out.reshape(5, -1) / 255)).reshape(5, 16, 3)
    torch.testing.assert_close(made.double(), torch.from_numpy(expected), rtol=0, atol=0.02)
    latents = fit_latent_statistics(model, SparseFields(images, observed=1, queries=1, seed=0))
    torch.testing.assert_close(latents.mean(0), torch.zeros(6), rtol=0, atol=0.01)  # codes are whitened
    torch.testing.assert_close(latents.std(0), torch.ones(6), rtol=0.05, atol=0)
    for wrong in (images[:6], images[:, :3]):  # fewer than the components, or pixels than the cosines
        with pytest.raises(ValueError):
            fit_linear_code(model, wrong)


@phases
def test_one_step_from_noise_is_the_deterministic_decoding(phase):
    model, arguments = tiny(phase, trained=phase == 1), {**field(), "t": torch.zeros(2)}
    decoded = model.decode(arguments["query_coords"], encoded(model, arguments))
    torch.testing.assert_close(arguments["noisy_values"] + model(**arguments), decoded, rtol=0, atol=1e-6)


def test_an_untrained_decoder_is_affine_and_so_is_an_untrained_flow():
    model, arguments = tiny(2, trained=False), field()
    coords, (a, b) = arguments["query_coords"], torch.randn(2, 2, 6)
    at_a, at_b, both = (model.decode(coords, latent) for latent in (a, b, 2 * a - b))
    torch.testing.assert_close(both, 2 * at_a - at_b, rtol=1e-4, atol=1e-5)
    start = model.decode(coords, encoded(model, arguments))
    t, x = arguments["t"][:, None, None], arguments["noisy_values"]
    torch.testing.assert_close(model(**arguments), start + skip_weight(t, 0.15) * (x - t * start))


def test_the_loss_of_phase_1_is_that_of_the_decoding_and_of_phase_2_that_of_the_network():
    model, arguments = tiny(1), field()
    batch = {name: x for name, x in arguments.items() if name not in ("noisy_values", "t")}
    batch["query_values"] = torch.randn(2, 9, 3)
    decoded = model.decode(batch["query_coords"], encoded(model, batch))
    t = model.loss_times(arguments["t"])
    loss = flow_matching_loss(model, batch, t=t, weight=model.loss_weight)
    torch.testing.assert_close(loss, (decoded - batch["query_values"]).square().mean())
    model, arguments = tiny(2, trained=False), field(batch=300)
    batch = {name: x for name, x in arguments.items() if name not in ("noisy_values", "t")}
    start = model.decode(batch["query_coords"], encoded(model, batch))
    batch["query_values"] = start + 0.15 * torch.randn_like(start)
    for t in (0.0, 0.5, 1.0):  # what the network has to learn is of unit scale at all times
        times = model.loss_times(torch.full((300,), t))
        loss = flow_matching_loss(model, batch, t=times, weight=model.loss_weight)
        assert loss.item() == pytest.approx(1, abs=0.06)  # of 8,100 values: standard error 0.016


@phases
@pytest.mark.parametrize("recompute", [False, True])
def test_gradient_reaches_exactly_the_parameters_of_the_phase(phase, recompute):
    model = tiny(phase, dropout=0.2).train()
    model.gradient_checkpointing = recompute
    model(**field()).square().sum().backward()
    for name, parameter in model.named_parameters():
        wanted = phase == 1 or name.startswith("refiner.")
        assert parameter.requires_grad == wanted and (parameter.grad is not None) == wanted, name
        assert not wanted or parameter.grad.any(), name
    assert model.encoder.training == model.decoder.training == (phase == 1)  # frozen: without dropout


def test_phase_2_keeps_encoder_decoding_and_statistics_bit_by_bit(tmp_path):
    first, arguments = tiny(1), field()
    latents = fit_latent_statistics(first, fields())
    np.testing.assert_allclose(first.latent_mean, latents.numpy().mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(first.latent_std, latents.numpy().std(0), rtol=1e-5)
    torch.testing.assert_close(first.denormalise(first.normalise(latents)), latents)
    latent, coords = encoded(first, arguments), arguments["query_coords"]
    first.save_pretrained(tmp_path)
    for origin in (first, load_model(tmp_path)):
        second = second_phase(origin, residual_std=0.3).train()
        optimizer = torch.optim.SGD((p for p in second.parameters() if p.requires_grad), lr=0.1)
        second(**arguments).square().mean().backward()
        optimizer.step()
        assert (second.config.phase, second.config.residual_std) == (2, 0.3)
        assert torch.equal(encoded(second, arguments), latent)
        assert torch.equal(second.decode(coords, latent), first.decode(coords, latent))
        assert torch.equal(second.normalise(latents), first.normalise(latents))
    again, arguments["t"] = first_phase(second), torch.zeros(2)
    assert again.config.phase == 1 and again.encoder is second.encoder and first_phase(first) is first
    torch.testing.assert_close(again(**arguments), first(**arguments))
    with pytest.raises(ValueError):
        second_phase(second)


@phases
def test_a_saved_model_loads_bitwise_with_its_statistics(phase, tmp_path):
    model, arguments = tiny(phase).train(), field()
    with pytest.raises(ValueError):  # no statistics yet
        model.normalise(torch.zeros(2, 6))
    fit_latent_statistics(model, fields())
    assert model.training  # it is put back into the mode it was in
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.config == model.config and torch.equal(loaded(**arguments), model.eval()(**arguments))
    assert torch.equal(loaded.latent_std, model.latent_std)
    trained = {name for name, p in loaded.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in loaded.named_parameters() if phase == 1 or n.startswith("refiner")}


def test_what_would_be_silently_wrong_is_refused():
    model, arguments = tiny(2), field()
    with pytest.raises(ValueError):
        MambaDiffusionAutoencoderConfig(phase=3)
    with pytest.raises(ValueError):
        model.encode(arguments["input_coords"], torch.cat([arguments["input_values"]] * 2, 1))
    with pytest.raises(ValueError):
        model.decode(arguments["query_coords"] - 1, torch.zeros(2, 6))


def test_an_untrained_latent_network_is_the_velocity_between_gaussians(tmp_path):
    torch.manual_seed(0)
    network = LatentVelocityNetwork(LatentVelocityNetworkConfig(latent_dim=2, width=32, depth=2)).eval()
    x, t = torch.randn(5, 2), torch.rand(5)
    torch.testing.assert_close(network(x, t), skip_weight(t, 1.0)[:, None] * x)
    torch.nn.init.normal_(network.out[-1].weight)
    network.save_pretrained(tmp_path)
    assert torch.equal(load_model(tmp_path)(x, t), network(x, t))
    # Its loss is the error of the network: of unit data it has the same scale at all times.
    scale = ((1 - t) ** 2 + t**2).sqrt()
    torch.testing.assert_close(network.loss_weight(t), scale**2)
