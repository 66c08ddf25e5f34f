"""samplers.py against closed forms, diffusers and torchdiffeq; graphs.py against runs without graphs."""

import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from torch import nn
from torchdiffeq import odeint

from nfhelpers import graphs, models, samplers
from nfhelpers.samplers import SAMPLERS, euler, heun, midpoint, posterior_mean, rk4, sample, sde


def gaussian(x, t, mean=0.3, std=0.5):
    """The velocity of data N(mean, std^2)."""
    slope = (t * std**2 - (1 - t)) / ((1 - t) ** 2 + t**2 * std**2)
    return mean + slope * (x - t * mean)


class GaussianField(nn.Module):
    """The best velocity where the field given the observed values is N(their mean, std^2)."""

    def __init__(self, std=0.1):
        super().__init__()
        self.std, self.calls, self.frozen = std, [], nn.Dropout()

    def prepare(self, query_coords, input_coords, input_values):
        self.calls.append(("prepare", len(input_values), self.training))
        return input_values.mean(1, keepdim=True)  # (B, 1, 3)

    def forward(self, noisy_values, query_coords, t, input_coords, input_values, conditions=None):
        self.calls.append(("forward" if conditions is None else "prepared", len(noisy_values), self.training))
        mean = input_values.mean(1, keepdim=True) if conditions is None else conditions
        return gaussian(noisy_values, t[:, None, None], mean, self.std)


class ShortcutField(GaussianField):
    """The same, and the mean of that velocity over a step."""

    shortcut = True

    def shortcut_times(self, steps):
        return torch.linspace(0, 1, steps + 1, dtype=torch.float64) ** 2

    def forward(self, noisy_values, query_coords, t, *points, conditions=None, until=None):
        if until is None:
            return super().forward(noisy_values, query_coords, t, *points, conditions)
        self.calls.append(("forward" if conditions is None else "prepared", len(noisy_values), self.training))
        mean = points[1].mean(1, keepdim=True)
        t, end = t[:, None, None], until[:, None, None]
        ratio = (((1 - end) ** 2 + (self.std * end) ** 2) / ((1 - t) ** 2 + (self.std * t) ** 2)).sqrt()
        return (end * mean + ratio * (noisy_values - t * mean) - noisy_values) / (end - t)


def field_of(samples=3, queries=5, dtype=torch.float32):
    shapes = (queries, 2), (7, 2), (7, 3)
    drawn = [torch.rand(samples, *shape, generator=seeded(), dtype=dtype) for shape in shapes]
    return drawn[0], drawn[1], drawn[2] - 0.5


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def times_of(steps):
    return torch.linspace(0, 1, steps + 1, dtype=torch.float64)


def curved(x, t):
    """Neither linear nor autonomous: no two methods agree on it by accident."""
    return torch.sin(3 * x) * torch.cos(2 * t) - x * t + torch.roll(x, 1, -1) ** 2 / 4


def states_of(integrate, x0, times):
    states = [x0]
    integrate(curved, x0, times, callback=lambda step, t, x: states.append(x))
    return torch.stack(states)


@pytest.mark.parametrize(
    ("integrate", "theirs"), [(euler, "euler"), (midpoint, "midpoint"), (heun, "heun2"), (rk4, "rk4")]
)
@pytest.mark.parametrize("rising", [True, False])
def test_the_same_states_as_torchdiffeq(integrate, theirs, rising):
    x0 = torch.randn(3, 5, generator=seeded(), dtype=torch.float64)
    end = 0.95 if theirs == "heun2" else 1  # our last step to t = 1 is Euler's
    times = torch.tensor([0, 0.05, 0.2, 0.35, 0.7, end], dtype=torch.float64)
    times = times if rising else times.flip(0)
    expected = odeint(lambda t, x: curved(x, t), x0, times, method=theirs)
    torch.testing.assert_close(states_of(integrate, x0, times), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("integrate", [euler, heun])
def test_the_same_states_as_diffusers(integrate, shift):
    """Their clock is sigma = 1 - t, and their velocity has the other sign."""
    kind = FlowMatchHeunDiscreteScheduler if integrate is heun else FlowMatchEulerDiscreteScheduler
    scheduler = kind(shift=shift)
    scheduler.set_timesteps(8)
    theirs = [torch.randn(3, 5, generator=seeded())]
    for timestep in scheduler.timesteps:
        output = -curved(theirs[-1], 1 - timestep / scheduler.config.num_train_timesteps)
        theirs.append(scheduler.step(output, timestep, theirs[-1], return_dict=False)[0])
    times = 1 - scheduler.sigmas
    if integrate is heun:  # all times but the ends stand there twice, and states between two steps
        times, theirs = torch.cat([times[:1], times[1:-1:2], times[-1:]]), theirs[::2] + theirs[-1:]
    ours = states_of(integrate, theirs[0], times)
    torch.testing.assert_close(ours, torch.stack(theirs), rtol=1e-5, atol=2e-6)


def test_sde_by_hand():
    """One step from t = 0.4 to 0.8 at temperature 0.5: back to 0.2 with noise, then forward by Heun."""
    x0 = torch.randn(3, 5, generator=seeded(), dtype=torch.float64)
    drawn = sde(curved, x0, torch.tensor([0.4, 0.8]).double(), temperature=0.5, generator=seeded(1))
    noise = torch.randn(3, 5, generator=seeded(1), dtype=torch.float64)
    # 0.4 data + 0.6 noise, halved, is 0.2 data + 0.3 noise; 0.8^2 - 0.3^2 = 0.55 of variance is missing.
    back = x0 / 2 + math.sqrt(0.55) * noise
    torch.testing.assert_close(drawn, heun(curved, back, torch.tensor([0.2, 0.8]).double()))
    for times in ([0.0, 0.5, 0.5], [1.0, 0.0], [0.0, 1.5]):  # not rising within [0, 1]
        with pytest.raises(ValueError):
            sde(curved, x0, torch.tensor(times))


@pytest.mark.parametrize("temperature", [0.25, 1.0, 4.0])
def test_sde_draws_from_the_data_and_follows_the_path(temperature):
    x0, seen = torch.randn(100_000, generator=seeded(), dtype=torch.float64), {}
    options = dict(temperature=temperature, generator=seeded(1))
    x = sde(gaussian, x0, times_of(100), callback=lambda n, t, x: seen.update({n: (t, x)}), **options)
    for step in (25, 50, 75, 100):
        t, state = seen[step]
        assert state.mean().item() == pytest.approx(0.3 * t, abs=0.015)
        assert state.var().item() == pytest.approx((1 - t) ** 2 + t**2 * 0.25, rel=0.03)
    # The ODE's end is affine in its start; the more noise is replaced, the less of the start is left.
    assert torch.corrcoef(torch.stack([x0, x]))[0, 1] < {0.25: 0.9, 1.0: 0.6, 4.0: 0.1}[temperature]
    few = sde(gaussian, x0, times_of(2), generator=seeded(1))
    assert few.std().item() > 0.2  # of 0.5: a last step from t = 0 would return the mean


def field_model(method):
    return ShortcutField() if method == "shortcut" else GaussianField()


def test_shortcuts_are_exact_in_any_number_of_steps_and_what_such_a_model_is_sampled_with():
    field, noise = field_of(), torch.randn(3, 5, 3, generator=seeded())
    exact = (field[2].mean(1, keepdim=True) + 0.1 * noise).clamp(-1, 1)
    for steps in (1, 3, None):
        drawn = sample(ShortcutField(), *field, steps=steps, generator=seeded())
        torch.testing.assert_close(drawn, exact, rtol=0, atol=1e-5)
    with pytest.raises(ValueError):
        sample(GaussianField(), *field, method="shortcut")
    for footprint, calls in ((1 / 8, 4), (1 / 16, 50)):  # finer pixels than were observed take Heun's steps
        seen = []
        sample(
            tiny("MambaField"),
            *field,
            footprint=footprint,
            callback=lambda *given, seen=seen: seen.append(given),
        )
        assert len(seen) == calls


@pytest.mark.parametrize("method", SAMPLERS)
def test_samples_of_a_gaussian_posterior_have_its_mean_and_std(method):
    model, field, seen = field_model(method), field_of(queries=4000), []
    options = dict(method=method, steps=100, callback=lambda *given: seen.append(given[:2]))
    model.train().frozen.eval()
    x = sample(model, *field, **options, generator=seeded())
    torch.testing.assert_close(x.mean(1), field[2].mean(1), atol=0.008, rtol=0)
    torch.testing.assert_close(x.std(1), torch.full((3, 3), 0.1), atol=0.008, rtol=0)
    times = [(n / 100) ** (2 if method == "shortcut" else 1) for n in range(1, 101)]
    assert seen == [(n, pytest.approx(t)) for n, t in enumerate(times, start=1)]
    evaluations = 100 * samplers.EVALUATIONS[method] - (method in ("heun", "sde"))
    assert model.calls == [("prepare", 3, False)] + [("prepared", 3, False)] * evaluations
    assert model.training and not model.frozen.training and not x.requires_grad


@pytest.mark.parametrize("method", SAMPLERS)
def test_max_batch_changes_memory_not_the_result(method):
    """Noise is drawn before the batch is split, that of every step of sde too."""
    model, field, options = field_model(method), field_of(), {"method": method, "steps": np.int64(3)}
    expected = sample(model, *field, **options, generator=seeded())
    model.calls.clear()
    drawn = sample(model, *field, **options, generator=seeded(), max_batch=np.int32(2))
    torch.testing.assert_close(drawn, expected, rtol=0, atol=0)
    assert {size for _, size, _ in model.calls} == {2, 1}


@pytest.mark.parametrize("draws", [1, 5])
def test_posterior_mean_of_one_step_is_exact_whatever_the_noise(draws):
    field = field_of(dtype=torch.float64)
    mean, std = posterior_mean(GaussianField(), *field, draws=draws, generator=seeded())
    expected = field[2].mean(1, keepdim=True).expand(3, 5, 3)
    torch.testing.assert_close(mean, expected, atol=1e-12, rtol=0)
    assert std.isnan().all() if draws == 1 else std.max() < 1e-12


def test_posterior_mean_of_samples_is_their_mean_and_std():
    model, field = GaussianField(), field_of(dtype=torch.float64)
    options = dict(draws=6, steps=30, generator=seeded(), max_batch=2)
    mean, std = posterior_mean(model, *field, **options)
    generator = seeded()
    draws = torch.stack([sample(model, *field, steps=30, generator=generator) for _ in range(6)])
    torch.testing.assert_close((mean, std), (draws.mean(0), draws.std(0)))


def test_options_of_a_sample():
    """temperature scales the initial noise, but not that of sde, where 0 is Heun; the result is clamped."""
    model, field = GaussianField(), field_of(queries=4000)
    warm = sample(model, *field, steps=100, generator=seeded(), temperature=0.5)
    torch.testing.assert_close(warm.std(1), torch.full((3, 3), 0.05), atol=0.005, rtol=0)
    cold = sample(model, *field, method="sde", steps=10, generator=seeded(), temperature=0.0)
    torch.testing.assert_close(cold, sample(model, *field, steps=10, generator=seeded()))
    wide = sample(GaussianField(std=2.0), *field, steps=20, generator=seeded())
    assert wide.min() == -1 and wide.max() == 1
    for wrong in (dict(method="rk9"), dict(steps=0), dict(method="sde", temperature=-1)):
        with pytest.raises(ValueError):
            sample(model, *field, **wrong)
    for wrong in (dict(draws=0), dict(steps=0), dict(generator=[seeded(), seeded()]), dict(generator=7)):
        with pytest.raises(ValueError):
            posterior_mean(model, *field, **wrong)
    for values in (field[2] * 127.5 + 127.5, (field[2] * 127.5 + 127.5).byte(), field[2] * 100):
        with pytest.raises(ValueError):
            sample(model, *field[:2], values)


def tiny(kind):
    """A model whose weights are all noise: some start at zero, where a sample does not depend on them."""
    torch.manual_seed(0)
    sizes = dict(d_model=16, num_layers=2, d_state=4, num_fourier_features=8, num_heads=2)
    if kind == "LocalMamba2D":
        sizes = dict(channels=1, dims=(16, 32), depths=(1, 1), d_state=2, num_classes=3)
    if kind == "MambaField":
        sizes = dict(nodes=8, widths=(4, 4), blocks=(1, 1), d_time=4, d_state=2, shortcut=True)
    model = getattr(models, kind)(getattr(models, kind + "Config")(**sizes)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def test_a_field_of_numpys_float64_is_cast_to_the_parameters():
    model, field = tiny("MambaDiffusion"), field_of()
    drawn = sample(model, *(x.double() for x in field), steps=2, generator=seeded())
    torch.testing.assert_close(drawn, sample(model, *field, steps=2, generator=seeded()))


def test_inversion_of_a_gaussian_flow_is_the_closed_form():
    """Untrained, phase 2 draws from N(m, s^2): x = m + s noise, so that the noise is (x - m) / s."""
    torch.manual_seed(0)
    sizes = dict(nodes=8, widths=(8, 12), blocks=(1, 1), d_time=16, latent_dim=6)
    first = models.MambaDiffusionAutoencoder(models.MambaDiffusionAutoencoderConfig(**sizes))
    model = models.second_phase(first).eval()
    coords, latent = field_of(2, 9)[0], torch.randn(2, 6)
    decoded = model.decode(coords, latent).detach()
    values = decoded + 0.15 * torch.randn(2, 9, 3)
    noise = samplers.encode_stochastic(model, coords, values, latent, steps=50)
    torch.testing.assert_close(noise, (values - decoded) / 0.15, atol=2e-2, rtol=2e-2)
    for max_batch in (None, 1):
        back = samplers.decode_stochastic(model, coords, latent, noise, steps=50, max_batch=max_batch)
        torch.testing.assert_close(back, values, atol=5e-3, rtol=0)
    for wrong, options in ((first, {}), (model, {"method": "sde"})):
        with pytest.raises(ValueError):
            samplers.decode_stochastic(wrong, coords, latent, noise, **options)


def test_guidance_is_linear_in_the_two_velocities():
    model, labels, t = tiny("LocalMamba2D"), torch.tensor([0, 2]), torch.tensor(0.4)
    x = torch.randn(2, 1, 4, 6, generator=seeded())
    conditional = model(x, t.expand(2), labels)
    unconditional = model(x, t.expand(2), labels, drop=torch.ones(2, dtype=torch.bool))
    assert not torch.allclose(conditional, unconditional)
    for guidance in (0.0, 1.0, 2.5, -0.5):
        expected = unconditional + guidance * (conditional - unconditional)
        found = samplers.guided_velocity(model, labels, guidance=guidance)(x, t)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    velocity = samplers.guided_velocity(model, labels, guidance=2.0)
    expected = heun(velocity, x, times_of(3).float()).clamp(-1, 1)  # x is what the seed draws
    drawn = samplers.sample_grids(model, 2, 4, 6, labels=labels, guidance=2.0, steps=3, generator=seeded())
    torch.testing.assert_close(drawn, expected)


def test_only_models_and_runs_that_a_graph_repeats_are_recorded():
    def is_recorded(model, evaluations=graphs.RECORD_FROM):
        return graphs.recorded_velocity(model, curved, evaluations) is not curved

    Counts = type("Counts", (models.MambaDiffusion,), {})  # may do what cannot be recorded
    model, x0 = tiny("MambaDiffusion"), torch.randn(3, 5, generator=seeded())
    assert is_recorded(model) and not is_recorded(model, graphs.RECORD_FROM - 1)
    assert not is_recorded(Counts(model.config)) and not is_recorded(GaussianField())
    on_the_cpu = graphs.recorded_velocity(model, curved, 40)
    assert torch.equal(heun(on_the_cpu, x0, times_of(5)), heun(curved, x0, times_of(5)))
    model.decoder.register_forward_hook(lambda *given: None)
    assert not is_recorded(model)


CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def evaluated_again(function, tensors, pool):
    """Stands in for `graphs.record` on a CPU."""
    own = {name: x.clone() for name, x in tensors.items()}
    results = function(**own)

    def flat(results):
        return [results] if torch.is_tensor(results) else [results[0], *results[1]]

    def replay():
        for old, new in zip(flat(results), flat(function(**own)), strict=True):
            if new is not None:
                old.copy_(new)

    return replay, own, results


DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])


@DEVICES
@pytest.mark.parametrize("kind", ["MambaDiffusion", "MambaDiffusionV2", "MambaField", "LocalMamba2D"])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_recorded_run_is_the_same_run(kind, bf16, device, monkeypatch):
    recorded, record = [], graphs.record
    if device == "cpu":
        record = evaluated_again
        monkeypatch.setattr(graphs, "can_record", lambda x: True)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(graphs, "record", lambda *given: recorded.append(given) or record(*given))
    model, field = tiny(kind).to(device), [x.to(device) for x in field_of(2, 40)]

    def run():
        generator = torch.Generator(device).manual_seed(0)
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            if kind == "LocalMamba2D":
                options = dict(labels=torch.tensor([0, 2]), guidance=2.0, steps=6, generator=seeded())
                return [samplers.sample_grids(model, 2, 8, 8, **options)]
            runs = [("rk4", 6), ("sde", 6)] if kind != "MambaField" else [("heun", 6), ("shortcut", 12)]
            draws = [sample(model, *field, method=m, steps=n, generator=generator) for m, n in runs]
            return draws + list(posterior_mean(model, *field, draws=12, generator=generator))

    launched = run()
    assert len(recorded) == (1 if kind == "LocalMamba2D" else 3)
    monkeypatch.setattr(graphs, "RECORD_FROM", math.inf)
    atol = 1e-6 * (kind == "MambaField" and device == "cuda" and not bf16)  # its sums are by atomics
    assert all(torch.allclose(x, y, rtol=0, atol=atol) for x, y in zip(launched, run(), strict=True))


class SquaredError(nn.Module):
    """The loss of a batch; `unused` has no gradient."""

    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Linear(8, 1))
        self.unused = nn.Linear(2, 2)

    def forward(self, batch):
        return (self.network(batch["x"]) - batch["y"]).square().mean()


@DEVICES
def test_recorded_gradients_are_the_same(device, monkeypatch):
    if device == "cpu":
        monkeypatch.setattr(graphs, "record", evaluated_again)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    objective = SquaredError().to(device)
    parameters = list(objective.network.parameters())
    recorded, held = graphs.recorded_gradient(objective), []
    for step in range(9):
        x, y = (torch.randn(3 + step % 2, n, generator=seeded(step)).to(device) for n in (5, 1))
        objective.zero_grad()
        held.append(objective({"x": x, "y": y}))  # keeps its graph: a GPU's ties parameters to its stream
        held[-1].backward()
        expected = [held[-1].detach(), *(p.grad.clone() for p in parameters)]
        found = [recorded(x=x, y=y), *(p.grad.clone() for p in parameters)]
        torch.testing.assert_close(found, expected)
        assert objective.unused.weight.grad is None
