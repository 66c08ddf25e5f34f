"""Diffusion autoencoder: pictures on the lattice, their code, encode and decode, the two phases, latents."""

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
    fit_latent_statistics,
    fit_linear_code,
    load_model,
    second_phase,
)
from nfhelpers.samplers import posterior_mean, sample

phases = pytest.mark.parametrize("phase", [1, 2])


def tiny(phase=1, trained=True, **settings):
    return tiny_model("diffae", trained, phase=phase, **settings)


def encoded(model, arguments):
    return model.encode(arguments["input_coords"], arguments["input_values"])


def pictures(count=300, seed=0):
    """Noise (N, 8, 8, 3) on smooth waves of random colours."""
    rng = np.random.default_rng(seed)
    x = grid_coords(8, 8).numpy() @ rng.normal(size=(count, 1, 2, 3)) * 4 + rng.normal(size=(count, 1, 1, 3))
    waves = 128 + 90 * np.sin(x.reshape(count, 8, 8, 3)) + 8 * rng.normal(size=(count, 8, 8, 3))
    return waves.clip(0, 255).astype(np.uint8)


def with_code(phase=1, trained=False, **settings):
    """A model with the linear code of `pictures`."""
    model = tiny(1, trained, **settings)
    fit_linear_code(model, pictures())
    return model if phase == 1 else second_phase(model).eval()


def whole(images):
    """Points and values of all pixels."""
    values = torch.from_numpy(images.reshape(len(images), -1, 3)).float() / 127.5 - 1
    return grid_coords(*images.shape[1:3]).expand(len(images), -1, -1), values


def test_observed_pixels_stay_in_the_picture_and_others_come_from_around():
    encoder = tiny().encoder
    coords, values = whole(pictures(3))
    assert torch.equal(encoder.picture(coords, values).flatten(1, 2), values)
    some = torch.randperm(64, generator=torch.Generator().manual_seed(0))[:20]
    found = encoder.picture(coords[:, some], values[:, some]).flatten(1, 2)
    torch.testing.assert_close(found[:, some], values[:, some])
    guess = values[:, some].mean(1, keepdim=True)
    assert (found - values).square().mean() < 0.5 * (guess - values).square().mean()
    torch.testing.assert_close(encoder.picture(coords[:, some], 0 * values[:, some] + 0.3).mean().item(), 0.3)
    # Pixels finer than the nodes are averaged: each node has the hat-weighted mean of those around it.
    fine = grid_coords(16, 16)[None]
    ramp = torch.cat([fine, fine[..., :1]], dim=-1)
    inner = encoder.picture(fine, ramp)[:, 1:-1, 1:-1]
    expected = grid_coords(8, 8).unflatten(0, (8, 8))[None, 1:-1, 1:-1]
    torch.testing.assert_close(inner[..., :2], expected, rtol=0, atol=0.01)  # nodes are 0.125 apart


def test_untrained_it_is_pca_of_all_pixels():
    model, held_out = with_code(), pictures(5, seed=1)
    coords, values = whole(held_out)
    made = model.decode(coords, model.encode(coords, values)) / 2 + 0.5
    pca = PCA(6, random_state=0).fit(pictures().reshape(300, -1) / 255)
    expected = pca.inverse_transform(pca.transform(held_out.reshape(5, -1) / 255)).reshape(5, 64, 3)
    torch.testing.assert_close(made.double(), torch.from_numpy(expected), rtol=0, atol=1e-4)
    latents = fit_latent_statistics(model, SparseFields(pictures(), observed=1, queries=1, seed=0))
    torch.testing.assert_close(latents.mean(0), torch.zeros(6), rtol=0, atol=1e-3)  # codes are whitened
    torch.testing.assert_close(latents.std(0), torch.ones(6), rtol=0.01, atol=0)
    with pytest.raises(ValueError):  # fewer images than components
        fit_linear_code(model, pictures(5))


def test_untrained_it_is_a_projection_and_the_same_field_at_every_size():
    model, latent = with_code(), torch.randn(2, 6)
    grid = grid_coords(8, 8).expand(2, -1, -1)
    decoded = model.decode(grid, latent)
    torch.testing.assert_close(model.encode(grid, decoded), latent, rtol=1e-3, atol=1e-4)
    odd = grid_coords(24, 24).expand(2, -1, -1)  # of three pixels the middle one is at a node's place
    large = model.decode(odd, latent, footprint=1 / 24).unflatten(1, (24, 24))[:, 1::3, 1::3]
    torch.testing.assert_close(large.flatten(1, 2), decoded, rtol=0, atol=1e-4)


@phases
def test_one_step_from_noise_is_the_decoding_and_of_phase_1_every_way_leads_there(phase):
    model, arguments = tiny(phase), {**field(), "t": torch.zeros(2)}
    decoded = model.decode(arguments["query_coords"], encoded(model, arguments))
    torch.testing.assert_close(arguments["noisy_values"] + model(**arguments), decoded, rtol=0, atol=1e-5)
    model = with_code(phase)
    points = [arguments[name] for name in ("query_coords", "input_coords", "input_values")]
    mean = model.decode(points[0], encoded(model, arguments)).detach().clamp(-1, 1)
    torch.testing.assert_close(posterior_mean(model, *points)[0], mean, rtol=0, atol=1e-5)
    drawn = sample(model, *points, method="heun", steps=4)
    assert ((drawn - mean).abs().max() < 1e-5) == (phase == 1)


def test_phase_1_is_trained_at_time_zero_where_the_loss_is_the_squared_error():
    model, arguments = tiny(1), field()
    batch = {name: x for name, x in arguments.items() if name not in ("noisy_values", "t")}
    batch["query_values"] = torch.randn(2, 9, 3)
    squared = (model.decode(batch["query_coords"], encoded(model, batch)) - batch["query_values"]).square()
    loss = flow_matching_loss(model, batch, t=model.loss_times(arguments["t"]))
    torch.testing.assert_close(loss, squared.mean())
    assert torch.equal(tiny(2).loss_times(arguments["t"]), arguments["t"])


@phases
def test_gradient_reaches_exactly_the_parameters_of_the_phase(phase):
    model = with_code(phase, trained=True).train()
    model(**field(inputs=30)).square().sum().backward()
    for name, parameter in model.named_parameters():
        wanted = phase == 1 or not name.startswith("encoder.")
        assert parameter.requires_grad == wanted and (parameter.grad is not None) == wanted, name
        assert not wanted or parameter.grad.any(), name


def test_a_short_training_beats_pca():
    """Waves have phases: a nonlinear code of 6 numbers says them better than 6 components."""
    model = with_code().train()
    coords, values = whole(pictures(64))
    optimizer, errors = torch.optim.Adam(model.parameters(), lr=4e-3), []
    for _ in range(40):
        errors.append((model.decode(coords, model.encode(coords, values)) - values).square().mean())
        optimizer.zero_grad()
        errors[-1].backward()
        optimizer.step()
    assert errors[-1] < 0.8 * errors[0]


def test_phase_2_keeps_latents_decoding_and_statistics_and_then_moves_the_decoder_alone(tmp_path):
    first, arguments = tiny(1), field()
    latents = fit_latent_statistics(first, SparseFields(pictures(4), queries=0.5, seed=0))
    np.testing.assert_allclose(first.latent_std, latents.numpy().std(0), rtol=1e-5)
    torch.testing.assert_close(first.denormalise(first.normalise(latents)), latents)
    latent, coords = encoded(first, arguments), arguments["query_coords"]
    decoded = first.decode(coords, latent)
    first.save_pretrained(tmp_path)
    for origin in (first, load_model(tmp_path)):
        second = second_phase(origin, shortcut=True).train()
        assert (second.config.phase, second.shortcut, origin.shortcut) == (2, True, False)
        assert torch.equal(encoded(second, arguments), latent)
        torch.testing.assert_close(second.decode(coords, latent), decoded, rtol=0, atol=1e-6)
        optimizer = torch.optim.SGD((p for p in second.parameters() if p.requires_grad), lr=0.1)
        second(**arguments).square().mean().backward()
        optimizer.step()
        assert torch.equal(encoded(second, arguments), latent)
        assert torch.equal(second.normalise(latents), first.normalise(latents))
        assert torch.equal(first.decode(coords, latent), decoded)
        assert (second.decode(coords, latent) - decoded).abs().max() > 1e-3
    pytest.raises(ValueError, second_phase, second)


def test_what_would_be_silently_wrong_is_refused():
    model, arguments = tiny(2), field()
    assert not torch.isfinite(model.normalise(torch.zeros(2, 6))).any()  # there are no statistics yet
    pytest.raises(ValueError, MambaDiffusionAutoencoderConfig, phase=3)
    doubled = torch.cat([arguments["input_values"]] * 2, 1)
    pytest.raises(ValueError, model.encode, arguments["input_coords"], doubled)
    pytest.raises(ValueError, model.decode, arguments["query_coords"] - 1, torch.zeros(2, 6))


def test_an_untrained_latent_network_is_the_velocity_between_gaussians(tmp_path):
    torch.manual_seed(0)
    network = LatentVelocityNetwork(LatentVelocityNetworkConfig(latent_dim=2, width=32, depth=2)).eval()
    x, t = torch.randn(5, 2), torch.rand(5)
    torch.testing.assert_close(network(x, t), skip_weight(t, 1.0)[:, None] * x)
    torch.nn.init.normal_(network.out[-1].weight)
    network.save_pretrained(tmp_path)
    assert torch.equal(load_model(tmp_path)(x, t), network(x, t))
    # Its loss is the error of the network: of unit data it has the same scale at all times.
    torch.testing.assert_close(network.loss_weight(t), (1 - t) ** 2 + t**2)
