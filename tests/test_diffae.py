"""Diffusion autoencoder: models, phases, latent statistics, inversion, interpolation, latent flow."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.decomposition import PCA
from torch.nn import functional as F

from nfhelpers import __main__ as cli
from nfhelpers import evaluate, metrics, run, samplers, train
from nfhelpers.flow import interpolate, skip_weight
from nfhelpers.images import SparseFields, grid_coords
from nfhelpers.models import (
    LatentVelocityNetwork,
    LatentVelocityNetworkConfig,
    MambaDiffusion,
    MambaDiffusionAutoencoder,
    MambaDiffusionAutoencoderConfig,
    MambaDiffusionConfig,
    MinimalLatentMamba,
    MinimalLatentMambaConfig,
    MultiDirectionalMambaDiffusion,
    encode_dataset,
    fit_latent_statistics,
    fit_linear_code,
    load_model,
    second_phase,
)
from nfhelpers.models.diffae import (
    SPECTRUM_NOISE,
    SPECTRUM_TAIL,
    cosines,
    filled_share,
    fit_spectrum,
    point_areas,
    spectrum_power,
)

SMALL = dict(
    latent_dim=6, d_model=16, num_cosines=4, spectrum_width=8, num_encoder_layers=1, num_decoder_layers=1,
    d_state=4, num_fourier_features=8, fourier_scale=2.0, dropout=0.0,
)  # fmt: skip
phases = pytest.mark.parametrize("phase", [1, 2])


def tiny(phase=1, trained=True, **settings):
    """A small autoencoder in eval mode; `trained` moves what starts at zero away from it."""
    torch.manual_seed(0)
    model = MambaDiffusionAutoencoder(
        MambaDiffusionAutoencoderConfig(phase=phase, **{**SMALL, **settings})
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if trained and not parameter.any():
                parameter.normal_(std=0.3)
    return model


def field(batch=2, queries=9, inputs=7):
    generator = torch.Generator().manual_seed(1)
    grid = grid_coords(8, 8)
    pixels = torch.stack([torch.randperm(64, generator=generator) for _ in range(batch)])
    return dict(
        noisy_values=torch.randn(batch, queries, 3, generator=generator),
        query_coords=grid[pixels[:, :queries]],
        t=torch.linspace(0.1, 0.9, batch),
        input_coords=grid[pixels[:, queries : queries + inputs]],
        input_values=torch.rand(batch, inputs, 3, generator=generator) * 2 - 1,
    )


def points(arguments):
    return arguments["input_coords"], arguments["input_values"]


def gradients(count, seed):
    """Images (count, 8, 8, 3) of linear colour gradients."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(np.linspace(-1, 1, 8), np.linspace(-1, 1, 8)), -1)
    images = 127 + 60 * grid @ rng.uniform(-1, 1, (count, 1, 2, 3)) + rng.uniform(-40, 40, (count, 1, 1, 3))
    return images.clip(0, 255).astype(np.uint8)


def fields():
    return SparseFields(gradients(16, 0), queries=0.5), SparseFields(gradients(4, 1), queries=0.5, seed=0)


def settings(folder, **changes):
    options = dict(
        epochs=2, batch_size=4, learning_rate=3e-3, ema_decay=0.5, evaluate_every=1, visualise_every=9,
        save_every=9, field_images=2, cpu=True, progress=False,
    )  # fmt: skip
    return train.TrainConfig(output_dir=folder, **{**options, **changes})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Models of both phases that know four images by heart, with what training said of them."""
    four = SparseFields(gradients(4, 1), queries=0.5, seed=0)
    data = SparseFields(gradients(4, 1).repeat(4, 0), queries=0.5), four
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    first = MambaDiffusionAutoencoder(MambaDiffusionAutoencoderConfig(**SMALL))
    one = train.fit(first, data, settings(folder / "1", epochs=20, evaluate_every=4, learning_rate=1e-2))
    fit_latent_statistics(first, four)
    second = second_phase(first)
    two = train.fit(second, data, settings(folder / "2", epochs=2))
    return first, second, one, two


# --------------------------------------------------------------------------------------------- the model


@phases
def test_shapes_of_encode_decode_and_forward(phase):
    model, arguments = tiny(phase), field()
    latent = model.encode(*points(arguments))
    assert latent.shape == (2, 6)
    assert model.decode(arguments["query_coords"], latent, torch.zeros(2)).shape == (2, 9, 3)
    velocity = model.decode(arguments["query_coords"], latent, arguments["t"], arguments["noisy_values"])
    assert velocity.shape == (2, 9, 3)
    assert torch.equal(model(**arguments), velocity)


@pytest.mark.parametrize("size", [1, 64, 1024])
def test_latent_size_is_an_option(size):
    model = tiny(latent_dim=size)
    latent = model.encode(*points(field()))
    assert latent.shape == (2, size) and model.decode(grid_coords(4, 4).expand(2, -1, -1), latent).shape == (
        2,
        16,
        3,
    )


@phases
def test_observed_points_are_a_set_and_queries_keep_their_places(phase):
    model, arguments = tiny(phase), field(queries=20, inputs=30)
    velocity, latent = model(**arguments), model.encode(*points(arguments))
    shuffle, shift = torch.randperm(30), torch.randperm(20)
    moved = {
        name: x if name == "t" else x[:, shuffle if name.startswith("input") else shift]
        for name, x in arguments.items()
    }
    assert torch.equal(model.encode(*points(moved)), latent)
    torch.testing.assert_close(model(**moved), velocity[:, shift], rtol=1e-5, atol=1e-5)


def test_samples_of_a_batch_are_independent():
    model, arguments = tiny(2), field(batch=3)
    velocity = model(**arguments)
    for index in range(3):
        alone = model(**{name: x[index : index + 1] for name, x in arguments.items()})
        torch.testing.assert_close(alone, velocity[index : index + 1], rtol=1e-5, atol=1e-5)


def test_the_latent_depends_on_every_observed_value_and_coordinate():
    model, arguments = tiny(), field()
    coords, values = (x.clone().requires_grad_() for x in points(arguments))
    model.encode(coords, values).square().sum().backward()
    assert (values.grad != 0).all() and (coords.grad != 0).all()


def test_points_count_for_the_area_around_them():
    grid = grid_coords(8, 8)[None]
    torch.testing.assert_close(point_areas(grid), torch.full((1, 64), 1 / 64), rtol=0.12, atol=0)
    crowded = torch.cat([grid[:, :63], grid[:, :1].expand(-1, 9, -1)], dim=1)  # the first point ten times
    areas = point_areas(crowded)
    torch.testing.assert_close(areas.sum(1), torch.ones(1))
    assert areas[0, 63:].sum() + areas[0, 0] < 2 / 64  # not ten times as much
    # The integral of x^2 over the image, from random points, by their areas and by the plain mean.
    coords = torch.rand(200, 100, 2, generator=torch.Generator().manual_seed(0))
    square = coords[..., 0].square()
    weighted, plain = (point_areas(coords) * square).sum(1), square.mean(1)
    assert (weighted - 1 / 3).square().mean() < 0.25 * (plain - 1 / 3).square().mean()


def test_a_gated_mean_is_a_linear_functional_of_the_field():
    """Without it the mean of embedded points knows mean colour and mean position, not what is where."""
    layer = tiny().encoder.product
    with torch.no_grad():
        layer.value_proj.bias.zero_()
    features, (a, b) = torch.randn(1, 5, 16), torch.randn(2, 1, 5, 6)
    both = layer(features, 2 * a - 3 * b).mean(1)
    torch.testing.assert_close(both, 2 * layer(features, a).mean(1) - 3 * layer(features, b).mean(1))
    swapped = layer(features, a[:, [1, 0, 2, 3, 4]]).mean(1)
    assert not torch.allclose(swapped, layer(features, a).mean(1), atol=1e-3)


def test_cosines_are_orthonormal_over_the_pixels_of_a_grid():
    basis = cosines(grid_coords(6, 5)[None].double(), 5)[0]  # (30, 25)
    torch.testing.assert_close(basis.T @ basis / 30, torch.eye(25).double(), rtol=0, atol=1e-6)
    x, y = grid_coords(6, 5).double().T
    expected = 2 * torch.cos(math.pi * 3 * y) * torch.cos(math.pi * x)
    torch.testing.assert_close(basis[:, 3 * 5 + 1], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("inputs", [9, 40])  # fewer and more than the 16 amplitudes
def test_a_spectrum_is_the_posterior_mean_of_a_gaussian_field(inputs):
    generator = torch.Generator().manual_seed(0)
    coords = torch.rand(2, inputs, 2, generator=generator)
    values = torch.randn(2, inputs, 3, generator=generator)
    found = fit_spectrum(coords, values, 4)
    basis, power = cosines(coords.double(), 4), spectrum_power(4).double()
    noise = SPECTRUM_NOISE + SPECTRUM_TAIL * (1 - 1 / inputs)  # random points share no coordinate
    covariance = (basis * power) @ basis.mT + noise * torch.eye(inputs)
    expected = (basis * power).mT @ torch.linalg.solve(covariance, values.double())
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_the_spectrum_of_all_pixels_is_the_cosine_transform():
    amplitudes = torch.randn(1, 16, 3, dtype=torch.float64) * spectrum_power(4).sqrt()[:, None]
    grid = grid_coords(16, 16)[None].double()
    found = fit_spectrum(grid, cosines(grid, 4) @ amplitudes, 4)
    torch.testing.assert_close(found, amplitudes, rtol=1e-2, atol=1e-4)


def test_how_much_of_their_grid_points_fill():
    grid = grid_coords(6, 5)
    chosen = torch.tensor([0, 6, 12, 18, 24, 25])  # in every row and column
    coords = torch.stack([grid[:6], grid[chosen], torch.rand(6, 2)])  # a row and a point; a fifth; no grid
    expected = torch.tensor([6 / (5 * 2), 6 / 30, 1 / 6])
    torch.testing.assert_close(filled_share(coords), expected)
    torch.testing.assert_close(filled_share(grid[torch.randperm(30)][None]), torch.ones(1))


def test_more_pixels_make_a_better_fit():
    """Also where there are as many of them as cosines, which hold half of the field's frequencies here."""
    generator = torch.Generator().manual_seed(0)
    grid = grid_coords(16, 16).double()
    amplitudes = torch.randn(8, 256, 3, generator=generator) * spectrum_power(16).sqrt()[:, None]
    fields = cosines(grid, 16) @ amplitudes.double()  # (8, 256, 3)
    low = cosines(grid, 8)  # (256, 64)
    errors = []
    for count in (16, 32, 48, 64, 80, 128, 192, 256):  # 64 cosines
        chosen = torch.stack([torch.randperm(256, generator=generator)[:count] for _ in fields])
        values = fields.gather(1, chosen[..., None].expand(-1, -1, 3))
        errors.append((low @ fit_spectrum(grid[chosen], values, 8) - fields).square().mean())
    assert (torch.stack(errors).diff() < 0).all(), errors


def test_an_untrained_autoencoder_is_a_projection():
    """It keeps the amplitudes with the most power: decoding and encoding again changes nothing."""
    model, grid = tiny(trained=False, latent_dim=20), grid_coords(16, 16)[None]
    latent = torch.randn(1, 20)
    torch.testing.assert_close(model.encode(grid, model.decode(grid, latent)), latent, rtol=2e-2, atol=2e-3)
    grey = torch.full((1, 256, 3), 0.4)
    torch.testing.assert_close(model.decode(grid, model.encode(grid, grey)), grey, rtol=1e-3, atol=1e-3)


def test_with_the_linear_code_of_a_training_set_it_is_pca():
    images = np.random.default_rng(0).integers(0, 256, (300, 4, 4, 3)).astype(np.uint8)
    held_out = np.random.default_rng(1).integers(0, 256, (5, 4, 4, 3)).astype(np.uint8)
    model = tiny(trained=False)  # 4 cosines a side say all of 4 x 4 pixels
    fit_linear_code(model, images, batch_size=128)
    grid = grid_coords(4, 4).expand(5, -1, -1)
    values = torch.from_numpy(held_out.reshape(5, 16, 3)).float() / 127.5 - 1
    latent = model.encode(grid, values)
    made = model.decode(grid, latent) / 2 + 0.5
    pca = PCA(6).fit(images.reshape(300, -1) / 255)
    expected = pca.inverse_transform(pca.transform(held_out.reshape(5, -1) / 255)).reshape(5, 16, 3)
    torch.testing.assert_close(made.double(), torch.from_numpy(expected), rtol=0, atol=0.02)
    train_latents = encode_dataset(model, SparseFields(images, observed=1, queries=1, seed=0))
    torch.testing.assert_close(train_latents.mean(0), torch.zeros(6), rtol=0, atol=0.01)
    torch.testing.assert_close(train_latents.std(0), torch.ones(6), rtol=0.05, atol=0)
    assert torch.equal(second_phase(model).decode(grid, latent), model.decode(grid, latent))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((300, 4, 4, 3)), "images are float64"),
        (np.zeros((300, 3, 5, 3), np.uint8), "3 x 5 have fewer pixels a side than num_cosines=4"),
        (np.zeros((6, 4, 4, 3), np.uint8), "6 images and 48 amplitudes do not span latent_dim=6"),
    ],
)
def test_a_linear_code_needs_enough_images(images, message):
    with pytest.raises(ValueError, match=message):
        fit_linear_code(tiny(), images)


def test_an_untrained_decoder_is_linear_and_so_is_an_untrained_flow():
    model, arguments = tiny(2, trained=False), field()
    coords = arguments["query_coords"]
    zero = model.decode(coords, torch.zeros(2, 6))
    a, b = torch.randn(2, 2, 6)
    at_a, at_b = model.decode(coords, a) - zero, model.decode(coords, b) - zero
    torch.testing.assert_close(model.decode(coords, 2 * a - b) - zero, 2 * at_a - at_b, rtol=1e-4, atol=1e-6)
    start = model.decode(coords, model.encode(*points(arguments)))
    t, x = arguments["t"][:, None, None], arguments["noisy_values"]
    torch.testing.assert_close(model(**arguments), start + skip_weight(t, 0.15) * (x - t * start))


@phases
def test_one_step_from_noise_is_the_deterministic_decoding(phase):
    model, arguments = tiny(phase, trained=phase == 1), {**field(), "t": torch.zeros(2)}
    decoded = model.decode(arguments["query_coords"], model.encode(*points(arguments)))
    torch.testing.assert_close(arguments["noisy_values"] + model(**arguments), decoded, rtol=0, atol=1e-6)
    mean, _ = samplers.posterior_mean(model, arguments["query_coords"], *points(arguments))
    torch.testing.assert_close(mean, decoded.clamp(-1, 1), rtol=0, atol=1e-6)


def test_gradient_checkpointing_changes_nothing():
    arguments, found = field(), []
    for flag in (False, True):
        model = tiny(2).train()
        model.gradient_checkpointing = flag
        model(**arguments).square().sum().backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.allclose(a, b) for a, b in zip(*found, strict=True))


@phases
def test_a_saved_model_is_the_same_and_loading_is_strict(phase, tmp_path):
    model, arguments = tiny(phase), field()
    fit_latent_statistics(model, fields()[1])
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.config == model.config and not loaded.training
    assert torch.equal(loaded(**arguments), model(**arguments))
    assert torch.equal(loaded.latent_mean, model.latent_mean) and loaded.latent_mean.isfinite().all()
    frozen = {name for name, p in loaded.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in loaded.named_parameters() if phase == 2 and not n.startswith("refiner")}
    weights = load_file(tmp_path / "model.safetensors")
    del weights["latent_mean"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="latent_mean"):
        load_model(tmp_path)


def test_default_model_has_the_settings_of_its_seed():
    config = MambaDiffusionAutoencoderConfig()
    assert (config.latent_dim, config.d_model, config.num_encoder_layers, config.num_decoder_layers) == (
        (512,) * 2 + (6,) * 2
    )
    assert (config.d_state, config.dropout, config.num_fourier_features) == (16, 0.1, 256)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"phase": 3}, "phase=3"),
        ({"phase": True}, "phase=True"),
        ({"latent_dim": 0}, "latent_dim=0"),
        ({"latent_dim": 2.5}, "latent_dim=2.5"),
        ({"d_model": 15}, "d_model=15 is odd"),
        ({"num_decoder_layers": 0}, "num_decoder_layers=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"orders": ("row", "spiral")}, "spiral"),
        ({"shared_weights": 1}, "shared_weights=1"),
        ({"residual_std": 0.0}, "residual_std=0.0"),
    ],
)
def test_illegal_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        MambaDiffusionAutoencoderConfig(**changes)


def test_what_does_not_fit_is_refused():
    model, arguments = tiny(2), field()
    coords, latent = arguments["query_coords"], torch.randn(2, 6)
    with pytest.raises(ValueError, match=r"latent has shape \(2, 5\); pass \(B, 6\).*latent_dim=6"):
        model.decode(coords, latent[:, :5])
    with pytest.raises(ValueError, match="latent has a batch of 1 and coords of 2"):
        model.decode(coords, latent[:1])
    with pytest.raises(ValueError, match="latent is a list"):
        model.decode(coords, [0.0] * 6)
    with pytest.raises(ValueError, match=r"t is None; with noisy_values pass a tensor \(2,\)"):
        model.decode(coords, latent, None, arguments["noisy_values"])
    with pytest.raises(ValueError, match=r"noisy_values have shape \(2, 8, 3\)"):
        model.decode(coords, latent, arguments["t"], arguments["noisy_values"][:, :8])
    with pytest.raises(ValueError, match="coords spans"):
        model.decode(coords * 32, latent)
    with pytest.raises(ValueError, match=r"values have shape \(2, 6, 3\)"):
        model.encode(arguments["input_coords"], arguments["input_values"][:, :6])
    with pytest.raises(ValueError, match="t spans"):
        model(**{**arguments, "t": arguments["t"] + 1})


# ---------------------------------------------------------------------------------------------- phases


def batch_of(dataset):
    return {key: torch.stack([item[key] for item in dataset]) for key in train.ITEM_KEYS}


def objective(model, batch):
    torch.manual_seed(5)
    t, noise = torch.rand(len(batch["query_values"])), torch.randn(batch["query_values"].shape)
    return train._Objective(model)(batch, t, noise)


def test_loss_of_phase_1_is_the_mean_squared_error_of_the_decoding():
    model, batch = tiny(), batch_of(fields()[1])
    decoded = model.decode(batch["query_coords"], model.encode(batch["input_coords"], batch["input_values"]))
    torch.testing.assert_close(objective(model, batch), F.mse_loss(decoded, batch["query_values"]))


def test_loss_of_phase_2_is_the_squared_error_of_the_network():
    model, batch = tiny(2), batch_of(fields()[1])
    loss = objective(model, batch)
    torch.manual_seed(5)
    t, noise = torch.rand(4), torch.randn(batch["query_values"].shape)
    batch |= {"t": t, "noisy_values": interpolate(noise, batch["query_values"], t)}
    calls = []
    model.refiner.register_forward_hook(lambda module, inputs, output: calls.append((inputs, output)))
    model(**{name: batch[name] for name in ("noisy_values", "query_coords", "t", *train.ITEM_KEYS[:2])})
    (inputs, output), time = calls[0], t[:, None, None]
    decoded, variance = inputs[0][..., 3:], (1 - time) ** 2 + (0.15 * time) ** 2
    rest = batch["query_values"] - decoded  # d: the network is to say ((1 - t) d - t s^2 noise) / (s sqrt(V))
    wanted = ((1 - time) * rest - time * 0.15**2 * noise) / (0.15 * variance.sqrt())
    torch.testing.assert_close(loss, F.mse_loss(output, wanted), rtol=1e-3, atol=1e-5)


@phases
def test_gradient_reaches_exactly_the_parameters_of_the_phase(phase):
    model = tiny(phase).train()
    objective(model, batch_of(fields()[1])).backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    part = ("encoder.", "decoder.") if phase == 1 else ("refiner.",)
    assert reached == {name for name, _ in model.named_parameters() if name.startswith(part)}


def test_dropout_is_off_in_what_phase_2_has_frozen():
    model, arguments = tiny(2, dropout=0.5), field()
    expected = model.encode(*points(arguments))
    model.train()
    assert model.refiner.training
    assert not any(m.training for part in (model.encoder, model.decoder) for m in part.modules())
    assert torch.equal(model.encode(*points(arguments)), expected)
    first = tiny(1, dropout=0.5).train()
    assert not torch.equal(first.encode(*points(arguments)), first.encode(*points(arguments)))


def test_training_phase_1_learns(trained):
    _, _, one, two = trained
    losses, psnr = one.history["val_loss"], one.history["val_psnr"]
    assert losses[-1] < 0.5 * losses[0] and psnr[-1] > psnr[0] + 2
    assert two.history["val_loss"][-1] < two.history["val_loss"][0] + 0.02


def test_phase_2_keeps_encoder_and_deterministic_decoding_bit_by_bit(trained):
    first, second, _, _ = trained
    coords = grid_coords(8, 8).expand(4, -1, -1)
    batch = batch_of(fields()[1])
    latents = [m.encode(batch["input_coords"], batch["input_values"]) for m in (first, second)]
    assert torch.equal(*latents)
    assert torch.equal(*(m.decode(coords, latents[0]) for m in (first, second)))
    before = {name: x for name, x in first.state_dict().items()}
    after = second.state_dict()
    assert all(torch.equal(after[name], x) for name, x in before.items())
    assert any(p.any() for p in second.refiner.head[-1].parameters())  # but the refiner has learned


def test_state_of_phase_2_averages_and_optimises_the_refiner_alone_and_resumes(trained, tmp_path):
    first, _, _, _ = trained

    def stop(epoch, history, field):
        if epoch == 1:
            raise KeyboardInterrupt

    def model():
        torch.manual_seed(1)
        return second_phase(first)

    config = settings(tmp_path / "a")
    assert train.fit(model(), fields(), config, callback=stop).interrupted
    state = load_file(tmp_path / "a" / "state.safetensors")
    for kind in ("ema.", "optimizer."):
        names = {name for name in state if name.startswith(kind)}
        assert names and all(name.startswith(kind + "refiner.") for name in names)
    resumed, whole = model(), model()
    result = train.fit(resumed, fields(), config)
    expected = train.fit(whole, fields(), settings(tmp_path / "b"))
    assert result.steps == 8 and result.history["loss"] == expected.history["loss"]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_phase_2_needs_a_phase_1(tmp_path):
    with pytest.raises(ValueError, match=r"phase 2 needs the model of phase 1.*train diffae_phase1"):
        second_phase(tmp_path / "missing")
    with pytest.raises(ValueError, match="this model is of phase 2; pass one of phase 1"):
        second_phase(tiny(2))
    MambaDiffusion(MambaDiffusionConfig(d_model=16, num_layers=1, num_heads=2)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'v1'"):
        second_phase(tmp_path)
    with pytest.raises(ValueError, match="phase 2 needs"):
        second_phase(None)


# --------------------------------------------------------------------------------------- latent statistics


def test_latent_statistics_are_numpys_and_travel_with_the_checkpoint(tmp_path):
    model, dataset = tiny(), fields()[1]
    latents = fit_latent_statistics(model, dataset, batch_size=3)
    batch = batch_of(dataset)
    torch.testing.assert_close(latents, model.encode(batch["input_coords"], batch["input_values"]))
    assert torch.equal(latents, encode_dataset(model, dataset, batch_size=3))
    np.testing.assert_allclose(model.latent_mean, latents.numpy().astype(float).mean(0), rtol=1e-6)
    np.testing.assert_allclose(model.latent_std, latents.numpy().astype(float).std(0), rtol=1e-6)
    normal = model.normalise(latents)
    torch.testing.assert_close(normal.mean(0), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(normal.std(0, correction=0), torch.ones(6))
    torch.testing.assert_close(model.denormalise(normal), latents)
    model.save_pretrained(tmp_path)
    assert torch.equal(second_phase(tmp_path).normalise(latents), normal)


def test_latents_without_statistics_or_of_another_size_are_refused():
    model = tiny()
    for function in (model.normalise, model.denormalise):
        with pytest.raises(ValueError, match="fit_latent_statistics"):
            function(torch.zeros(2, 6))
    fit_latent_statistics(model, fields()[1])
    with pytest.raises(ValueError, match=r"latent has shape \(2, 7\)"):
        model.normalise(torch.zeros(2, 7))
    with pytest.raises(ValueError, match="at least 2"):
        fit_latent_statistics(model, SparseFields(gradients(1, 0)))


def test_encoding_a_dataset_leaves_the_mode():
    model = tiny(2).train()
    encode_dataset(model, fields()[1])
    assert model.training and model.refiner.training and not model.encoder.training


# ------------------------------------------------------------------------------- minimal latent Mamba


def test_minimal_latent_mamba_is_multidirectional_with_a_bottleneck():
    torch.manual_seed(0)
    config = MinimalLatentMambaConfig(
        latent_dim=8, d_model=16, num_layers=1, d_state=4, num_fourier_features=8, num_heads=2
    )
    model, arguments = MinimalLatentMamba(config).eval(), field()
    torch.nn.init.normal_(model.decoder[-1].weight)
    widths = []
    model.to_latent.register_forward_hook(lambda module, inputs, output: widths.append(output.shape))
    velocity = model(**arguments)
    assert velocity.shape == (2, 9, 3) and widths == [(2, 16, 8)]
    model.to_latent, model.from_latent = torch.nn.Identity(), torch.nn.Identity()
    torch.testing.assert_close(
        model(**arguments), MultiDirectionalMambaDiffusion.forward(model, **arguments), rtol=0, atol=0
    )
    assert MinimalLatentMambaConfig().latent_dim == 256
    with pytest.raises(ValueError, match="latent_dim=16 is no bottleneck of d_model=16.* such as 8"):
        replace(config, latent_dim=16)


# ------------------------------------------------------------------------------------------ latent flow


def latent_network(**settings):
    torch.manual_seed(0)
    return LatentVelocityNetwork(
        LatentVelocityNetworkConfig(**{**dict(latent_dim=2, width=32, depth=2), **settings})
    )


def test_an_untrained_latent_network_draws_a_standard_normal():
    network = latent_network().eval()
    x, t = torch.randn(5, 2), torch.rand(5)
    torch.testing.assert_close(network(x, t), skip_weight(t, 1.0)[:, None] * x)
    drawn = samplers.sample_latents(network, 4000, generator=torch.Generator().manual_seed(0), steps=20)
    assert drawn.shape == (4000, 2)
    assert drawn.mean(0).abs().max() < 0.06 and (drawn.std(0) - 1).abs().max() < 0.05
    again = samplers.sample_latents(network, 4000, generator=torch.Generator().manual_seed(0), steps=20)
    assert torch.equal(drawn, again)


def test_a_latent_flow_learns_a_distribution_that_is_not_normal():
    """Two clumps at (1, 1) and (-1, -1): correlated, and nothing between them."""
    generator = torch.Generator().manual_seed(0)
    side = 2.0 * torch.randint(2, (2000, 1), generator=generator) - 1
    latents = side + 0.2 * torch.randn(2000, 2, generator=generator)
    network, seen = latent_network(), []
    losses = train.fit_latent_flow(
        network, latents, steps=300, batch_size=128, learning_rate=5e-3, ema_decay=0.9, progress=False,
        callback=lambda step, loss: seen.append(step),
    )  # fmt: skip
    assert len(losses) == 300 and seen == list(range(1, 301)) and not network.training
    drawn = samplers.sample_latents(network, 1000, generator=generator, steps=20)
    assert np.corrcoef(drawn.numpy().T)[0, 1] > 0.85
    assert ((drawn.abs() - 1).abs() < 0.6).all(1).float().mean() > 0.85
    assert 0.35 < (drawn[:, 0] > 0).float().mean() < 0.65


def test_a_latent_flow_repeats_and_loads(tmp_path):
    latents = torch.randn(50, 2)
    first, second = latent_network(), latent_network()
    options = dict(steps=5, batch_size=8, progress=False)
    assert train.fit_latent_flow(first, latents, **options) == train.fit_latent_flow(
        second, latents, **options
    )
    first.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    x, t = torch.randn(3, 2), torch.rand(3)
    assert torch.equal(loaded(x, t), second(x, t))


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (torch.randn(50, 2) * 5, "latents are not normalised"),
        (torch.randn(50, 2) * 0.1, "latents are not normalised"),
        (torch.randn(50, 2) + 1.2, "latents are not normalised"),
        (torch.full((50, 2), torch.nan), "latents are not normalised"),
        (torch.randn(50, 3), r"latent has shape \(50, 3\); pass \(B, 2\)"),
    ],
)
def test_latents_that_are_not_normalised_are_refused(latents, message):
    with pytest.raises(ValueError, match=message):
        train.fit_latent_flow(latent_network(), latents, steps=1, progress=False)


def test_latent_network_checks():
    network = latent_network()
    with pytest.raises(ValueError, match=r"t has shape \(3,\)"):
        network(torch.randn(2, 2), torch.rand(3))
    with pytest.raises(ValueError, match="t spans"):
        network(torch.randn(2, 2), torch.tensor([0.5, 1.5]))
    with pytest.raises(ValueError, match="count=0"):
        samplers.sample_latents(network, 0)
    with pytest.raises(ValueError, match="width=7"):
        LatentVelocityNetworkConfig(width=7)
    with pytest.raises(ValueError, match="steps=0"):
        train.fit_latent_flow(network, torch.randn(50, 2), steps=0)


# ------------------------------------------------------------------------------ inversion, interpolation


def test_inversion_of_a_gaussian_flow_is_the_closed_form():
    """Untrained, phase 2 draws from N(m, s^2): x = m + s noise, so that the noise is (x - m) / s."""
    model = tiny(2, trained=False)
    coords, latent = field()["query_coords"], torch.randn(2, 6)
    decoded = model.decode(coords, latent)
    values = decoded + 0.2 * torch.randn(2, 9, 3)
    noise = samplers.encode_stochastic(model, coords, values, latent, steps=50)
    torch.testing.assert_close(noise, (values - decoded) / 0.15, atol=2e-2, rtol=2e-2)
    back = samplers.decode_stochastic(model, coords, latent, noise, steps=50)
    torch.testing.assert_close(back, values, atol=5e-3, rtol=0)


def test_inversion_of_a_trained_model_returns_the_field(trained):
    _, model, _, _ = trained
    batch = batch_of(fields()[1])
    latent = model.encode(batch["input_coords"], batch["input_values"])
    coords, values, times = batch["query_coords"], batch["query_values"], []
    noise = samplers.encode_stochastic(
        model, coords, values, latent, steps=50, callback=lambda step, t, x: times.append(t)
    )
    assert times[0] == pytest.approx(0.98) and times[-1] == 0 and len(times) == 50
    back = samplers.decode_stochastic(model, coords, latent, noise, steps=50)
    psnr = metrics.psnr(*((x.numpy()[:, :, None] + 1) / 2 for x in (back, values)))
    assert psnr.min() > 35, psnr
    halves = samplers.decode_stochastic(model, coords, latent, noise, steps=50, max_batch=3)
    torch.testing.assert_close(halves, back, atol=1e-5, rtol=1e-5)


def test_inversion_checks():
    model, coords, latent, noise = tiny(2), field()["query_coords"], torch.randn(2, 6), torch.randn(2, 9, 3)
    with pytest.raises(ValueError, match="only an autoencoder of phase 2"):
        samplers.encode_stochastic(tiny(1), coords, noise, latent)
    with pytest.raises(ValueError, match="'sde' draws noise of its own"):
        samplers.decode_stochastic(model, coords, latent, noise, method="sde")
    with pytest.raises(ValueError, match="steps=0"):
        samplers.decode_stochastic(model, coords, latent, noise, steps=0)
    with pytest.raises(ValueError, match=r"latent has shape \(2, 5\)"):
        samplers.encode_stochastic(model, coords, noise, latent[:, :5])


def test_slerp_keeps_norms_and_angles():
    torch.manual_seed(0)
    a, b = torch.randn(2, 3, 50, 3, dtype=torch.float64)
    for alpha in (0.0, 0.25, 0.5, 1.0):
        c = samplers.slerp(a, b, alpha)
        norms = [x.flatten(1).norm(dim=1) for x in (a, b, c)]
        torch.testing.assert_close(norms[2], (1 - alpha) * norms[0] + alpha * norms[1])
        unit = [x.flatten(1) / n[:, None] for x, n in zip((a, b, c), norms, strict=True)]
        angle = (unit[0] * unit[1]).sum(1).acos()
        torch.testing.assert_close((unit[0] * unit[2]).sum(1).clamp(-1, 1).acos(), alpha * angle)
    torch.testing.assert_close(samplers.slerp(a, b, 0.0), a)
    torch.testing.assert_close(samplers.slerp(a, b, 1.0), b)
    torch.testing.assert_close(samplers.slerp(a, 3 * a, 0.5), 2 * a)  # parallel: the straight line
    each = samplers.slerp(a, b, torch.tensor([0.0, 0.5, 1.0]))
    torch.testing.assert_close(each[0], a[0])
    torch.testing.assert_close(each[2], b[2])


def test_slerp_of_noise_stays_noise_and_lerp_does_not():
    a, b = torch.randn(2, 1, 5000, 3, generator=torch.Generator().manual_seed(0))
    assert samplers.slerp(a, b, 0.5).std() == pytest.approx(1, abs=0.02)
    assert samplers.lerp(a, b, 0.5).std() == pytest.approx(math.sqrt(0.5), abs=0.02)
    with pytest.raises(ValueError, match="the ends have shapes"):
        samplers.slerp(a, b[:, :7], 0.5)
    with pytest.raises(ValueError, match=r"alpha has shape \(2,\)"):
        samplers.lerp(a, b, torch.rand(2))


def test_interpolation_runs_from_one_field_to_the_other():
    model, coords = tiny(2), field()["query_coords"]
    latents, noises = torch.randn(2, 2, 6), torch.randn(2, 2, 9, 3)
    seen = []
    frames = samplers.interpolate_latents(
        model, coords, latents, alphas=(0.0, 0.5, 1.0), callback=lambda *x: seen.append(x[:2])
    )
    assert frames.shape == (3, 2, 9, 3) and seen == [(0, 0.0), (1, 0.5), (2, 1.0)]
    for frame, latent in zip(frames, (latents[0], (latents[0] + latents[1]) / 2, latents[1]), strict=True):
        torch.testing.assert_close(frame, model.decode(coords, latent), rtol=1e-5, atol=1e-5)
    frames = samplers.interpolate_latents(model, coords, latents, noises, alphas=(0.0, 1.0), steps=4)
    for frame, latent, noise in zip(frames, latents, noises, strict=True):
        expected = samplers.decode_stochastic(model, coords, latent, noise, steps=4)
        torch.testing.assert_close(frame, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="alphas is empty"):
        samplers.interpolate_latents(model, coords, latents, alphas=())
    with pytest.raises(ValueError, match="pass two latents"):
        samplers.interpolate_latents(model, coords, latents[:1])


def test_smoothness_of_straight_and_bent_ways():
    ends = np.random.default_rng(0).uniform(size=(2, 4, 4, 3))
    straight = np.stack([(1 - a) * ends[0] + a * ends[1] for a in np.linspace(0, 1, 6)])
    result = evaluate.interpolation_smoothness(straight)
    assert result["path_length"] == pytest.approx(result["direct"])
    assert result["ratio"] == pytest.approx(1) and result["second_difference"] == pytest.approx(0, abs=1e-12)
    bent = np.array([0.0, 1.0, 0.0])[:, None]  # there and back: length 2, second difference -2
    result = evaluate.interpolation_smoothness(bent)
    assert (result["path_length"], result["direct"], result["second_difference"]) == (2, 0, 2)
    assert math.isnan(result["ratio"])
    with pytest.raises(ValueError, match="at least 3"):
        evaluate.interpolation_smoothness(straight[:2])


# --------------------------------------------------------------------------------------------- baselines


@pytest.mark.parametrize("count", [20, 300])  # fewer and more images than values
def test_pca_is_scikit_learns(count):
    rng = np.random.default_rng(0)
    images = rng.uniform(0.2, 0.8, (count + 7, 5, 5, 3))
    train_images, test_images = images[:count], images[count:]
    made = evaluate.pca_baseline(train_images, test_images, 10)
    pca = PCA(10).fit(train_images.reshape(count, -1))
    expected = pca.inverse_transform(pca.transform(test_images.reshape(7, -1))).clip(0, 1)
    np.testing.assert_allclose(made, expected.reshape(made.shape), atol=1e-5)
    with pytest.raises(ValueError, match=f"dims={count} is more"):
        evaluate.pca_baseline(train_images[:20], test_images, count)
    with pytest.raises(ValueError, match="one size"):
        evaluate.pca_baseline(train_images, test_images[:, :4], 2)


def test_probe_and_neighbours():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 200)
    latents = torch.from_numpy(rng.normal(size=(200, 3)) + 6 * labels[:, None] * [1, 0, 0])
    parts = latents[:100], labels[:100], latents[100:], labels[100:]
    assert evaluate.latent_probe(*parts) > 0.97
    assert evaluate.latent_probe(latents[:100, 1:], *parts[1:2], latents[100:, 1:], parts[3]) < 0.7
    line = np.array([[0.0], [1.0], [3.0], [10.0]])
    assert evaluate.nearest_neighbours([[2.6]], line, k=3).tolist() == [[2, 1, 0]]
    with pytest.raises(ValueError, match="k=5"):
        evaluate.nearest_neighbours([[2.6]], line)
    with pytest.raises(ValueError, match="test_latents have shape"):
        evaluate.latent_probe(*parts[:3], labels)


# ------------------------------------------------------------------------------------------ command line


@pytest.mark.parametrize("preset", run.PRESETS)
def test_presets_are_legal(preset):
    one, two = (run.load_settings(f"diffae_phase{phase}", preset) for phase in (1, 2))
    with torch.device("meta"):
        first = MambaDiffusionAutoencoder(MambaDiffusionAutoencoderConfig(**one["model"]))
        second_phase(first, **two["model"])
    for settings in (one, two):
        train.TrainConfig(output_dir="unused", **settings["train"])
    if preset == "full":
        assert first.config == MambaDiffusionAutoencoderConfig()
        assert all(s["train"]["epochs"] == 100 and s["train"]["learning_rate"] == 1e-4 for s in (one, two))


def test_both_phases_train_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = ["--set", "data.size=8", "--set", "data.train_images=8", "--set", "data.validation_images=2"]
    common = ["--preset", "smoke", "--device", "cpu", *data]
    assert cli.main(["train", "diffae_phase2", *common]) == 2
    assert "train diffae_phase1" in capsys.readouterr().err
    model = ["--set", "model.d_model=16", "--set", "model.latent_dim=6"]
    assert cli.main(["train", "diffae_phase1", *common, *model]) == 0
    first = load_model("runs/diffae_phase1/smoke/best")
    assert first.config.latent_dim == 6 and first.latent_std.isfinite().all()
    assert first.linear_code.mean.any()
    assert cli.main(["train", "diffae_phase2", *common, "--set", "model.residual_std=0.3"]) == 0
    second = load_model("runs/diffae_phase2/smoke/latest")
    assert (second.config.phase, second.config.residual_std) == (2, 0.3)
    assert torch.equal(second.latent_std, first.latent_std)
    init = ["--init", "runs/diffae_phase1/smoke/latest", "--output", "elsewhere"]
    assert cli.main(["train", "diffae_phase2", *common, *init]) == 0
    capsys.readouterr()
    assert cli.main(["train", "v1", *common, "--init", "x"]) == 2
    assert "--init x is of diffae_phase2" in capsys.readouterr().err
