"""samplers.py against closed forms, diffusers and torchdiffeq; and what sample and mean promise."""

import math
import subprocess
import sys

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from torch import nn
from torchdiffeq import odeint

from nfhelpers import samplers
from nfhelpers.flow import to_diffusers_sigma, to_diffusers_velocity
from nfhelpers.models import (
    LocalMamba2D,
    LocalMamba2DConfig,
    MambaDiffusion,
    MambaDiffusionConfig,
    MambaDiffusionV2,
    MambaDiffusionV2Config,
)
from nfhelpers.models.local_mamba import sample_grids
from nfhelpers.samplers import (
    SAMPLERS,
    ddim,
    decode_stochastic,
    euler,
    heun,
    midpoint,
    posterior_mean,
    rk4,
    sample,
    sde,
)

EVALUATIONS = {"euler": 1, "heun": 2, "midpoint": 2, "rk4": 4, "ddim": 1, "sde": 2}  # a step
ORDERS = [(euler, 1), (ddim, 1), (heun, 2), (midpoint, 2), (rk4, 4)]


class GaussianField(nn.Module):
    """The optimal velocity when the data given the observed points are N(mean, std^2) at every query point.

    mean is the average of the observed values, so that the field conditions on its input:
    E[v | x_t] = mean + (t std^2 - (1-t)) / ((1-t)^2 + t^2 std^2) * (x_t - t mean).
    """

    def __init__(self, std=0.1):
        super().__init__()
        self.std = std
        self.evaluations = 0
        self.largest_batch = 0
        self.modes = set()
        self.frozen = nn.Dropout()

    def forward(self, noisy_values, query_coords, t, input_coords, input_values):
        self.evaluations += 1
        self.largest_batch = max(self.largest_batch, len(noisy_values))
        self.modes.add(self.training)
        assert t.shape == noisy_values.shape[:1]
        t = t[:, None, None]
        mean = input_values.mean(1, keepdim=True)  # (B, 1, 3)
        slope = (t * self.std**2 - (1 - t)) / ((1 - t) ** 2 + t**2 * self.std**2)
        return mean + slope * (noisy_values - t * mean)


def _field(samples=3, queries=4000, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    query_coords = torch.rand(samples, queries, 2, generator=generator, dtype=dtype)
    input_coords = torch.rand(samples, 7, 2, generator=generator, dtype=dtype)
    input_values = torch.rand(samples, 7, 3, generator=generator, dtype=dtype) - 0.5
    return query_coords, input_coords, input_values


def _seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def _times(steps):
    return torch.linspace(0, 1, steps + 1, dtype=torch.float64)


def _linear(x, t):
    """Solved by x(t) = (x(0) + 3/4) exp(-2 t) + 3/2 t - 3/4."""
    return -2 * x + 3 * t


def _gaussian(x, t, mean=0.3, std=0.5):
    """The velocity of data N(mean, std^2), solved by x(t) = t mean + sqrt((1-t)^2 + t^2 std^2) x(0)."""
    slope = (t * std**2 - (1 - t)) / ((1 - t) ** 2 + t**2 * std**2)
    return mean + slope * (x - t * mean)


def _logistic(x, t):
    """Solved by x(t) = 1 / (1 + (1 / x(0) - 1) exp(-t))."""
    return x * (1 - x)


@pytest.mark.parametrize(("integrate", "order"), ORDERS)
def test_order_of_convergence(integrate, order):
    """Error ~ steps^-order, on a linear field that depends on time and on one that is not linear."""
    x0 = torch.tensor([1.0, -0.5], dtype=torch.float64)
    _check_order(integrate, order, _linear, x0, (x0 + 0.75) * math.exp(-2) + 0.75)
    x0 = torch.tensor([0.1, 0.4], dtype=torch.float64)
    _check_order(integrate, order, _logistic, x0, 1 / (1 + (1 / x0 - 1) * math.exp(-1)))


def _check_order(integrate, order, velocity, x0, exact):
    errors = [(integrate(velocity, x0, _times(n)) - exact).abs().max().item() for n in (40, 80, 160)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)
    assert math.log2(errors[1] / errors[2]) == pytest.approx(order, abs=0.1)
    assert errors[2] < 0.02**order


@pytest.mark.parametrize(("integrate", "order"), ORDERS)
def test_the_field_of_a_gaussian_is_solved_at_least_at_that_order(integrate, order):
    """Which by luck the midpoint method solves at order 3, and rk4 at 4 only beyond 80 steps."""
    x0 = torch.tensor([1.0, -0.5], dtype=torch.float64)
    errors = [(integrate(_gaussian, x0, _times(n)) - (0.3 + 0.5 * x0)).abs().max().item() for n in (80, 160)]
    assert math.log2(errors[0] / errors[1]) > order - 0.2
    assert errors[1] < 0.03**order


def _curved(x, t):
    """Neither linear nor autonomous: no two methods agree on it by accident."""
    return torch.sin(3 * x) * torch.cos(2 * t) - x * t + torch.roll(x, 1, -1) ** 2 / 4


@pytest.mark.parametrize(
    ("integrate", "theirs"), [(euler, "euler"), (midpoint, "midpoint"), (heun, "heun2"), (rk4, "rk4")]
)
@pytest.mark.parametrize("rising", [True, False])
def test_the_same_states_as_torchdiffeq(integrate, theirs, rising):
    x0 = torch.randn(3, 5, generator=_seeded(), dtype=torch.float64)
    end = 0.95 if theirs == "heun2" else 1  # where the step to data is another one
    times = torch.tensor([0, 0.05, 0.2, 0.35, 0.7, end], dtype=torch.float64)  # not equal steps
    times = times if rising else times.flip(0)
    states = [x0]
    integrate(_curved, x0, times, callback=lambda step, t, x: states.append(x))
    expected = odeint(lambda t, x: _curved(x, t), x0, times, method=theirs)
    torch.testing.assert_close(torch.stack(states), expected, rtol=1e-13, atol=1e-13)


def _diffusers(scheduler, x, **options):
    """States of a diffusers flow-matching scheduler on _curved, and its times on our clock, t = 1 - sigma."""
    states = [x]
    for timestep in scheduler.timesteps:
        t = to_diffusers_sigma(timestep / scheduler.config.num_train_timesteps)
        output = to_diffusers_velocity(_curved(states[-1], t))
        states.append(scheduler.step(output, timestep, states[-1], return_dict=False, **options)[0])
    return states, to_diffusers_sigma(scheduler.sigmas)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("integrate", [euler, ddim])
def test_the_same_states_as_diffusers_euler(integrate, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(8)
    x0 = torch.randn(3, 5, generator=_seeded())
    expected, times = _diffusers(scheduler, x0)
    states = [x0]
    integrate(_curved, x0, times, callback=lambda step, t, x: states.append(x))
    torch.testing.assert_close(torch.stack(states), torch.stack(expected), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_same_states_as_diffusers_heun(shift):
    """It returns the predictor between two steps."""
    scheduler = FlowMatchHeunDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(8)
    x0 = torch.randn(3, 5, generator=_seeded())
    expected, sigmas = _diffusers(scheduler, x0)
    times = torch.cat([sigmas[:1], sigmas[1:-1:2], sigmas[-1:]])  # all but the ends stand there twice
    assert len(times) == 9 and times[-1] == 1
    states = [x0]
    heun(_curved, x0, times, callback=lambda step, t, x: states.append(x))
    torch.testing.assert_close(torch.stack(states), torch.stack(expected[::2] + expected[-1:]))


def test_ddim_is_euler_and_sde_at_temperature_zero_is_heun():
    x0 = torch.randn(3, 5, generator=_seeded(), dtype=torch.float64)
    expected = euler(_curved, x0, _times(7))
    torch.testing.assert_close(ddim(_curved, x0, _times(7)), expected, rtol=1e-13, atol=1e-13)
    assert torch.equal(sde(_curved, x0, _times(7), temperature=0.0), heun(_curved, x0, _times(7)))


def test_sde_by_hand():
    """One step from t = 0.4 to 0.8 at temperature 0.5: back to 0.2 with noise, then forward by Heun."""
    x0 = torch.randn(3, 5, generator=_seeded(), dtype=torch.float64)
    drawn = sde(_curved, x0, torch.tensor([0.4, 0.8]).double(), temperature=0.5, generator=_seeded(1))
    noise = torch.randn(3, 5, generator=_seeded(1), dtype=torch.float64)
    # 0.4 data + 0.6 noise, halved, is 0.2 data + 0.3 noise; 0.8^2 - 0.3^2 = 0.55 of variance is missing.
    back = x0 / 2 + math.sqrt(0.55) * noise
    torch.testing.assert_close(drawn, heun(_curved, back, torch.tensor([0.2, 0.8]).double()))


@pytest.mark.parametrize("temperature", [0.25, 1.0, 4.0])
def test_variance_of_sde_on_a_gaussian(temperature):
    """Affine steps keep a Gaussian Gaussian: its variance follows a recursion, which tends to the data's."""
    mean, std = 0.3, 0.5

    def slope(t):
        return (t * std**2 - (1 - t)) / ((1 - t) ** 2 + t**2 * std**2)

    def final_variance(steps):
        variance, times = 1.0, [n / steps for n in range(steps + 1)]
        for t, t_next in zip(times, times[1:], strict=False):
            back = t if t_next == 1 else max(0.0, t - temperature * (t_next - t))
            ratio = back / t if t else 1.0
            variance = ratio**2 * variance + (1 - back) ** 2 - ratio**2 * (1 - t) ** 2
            h = t_next - back
            last = slope(back) if t_next == 1 else slope(t_next) * (1 + h * slope(back))
            variance *= (1 + h / 2 * (slope(back) + last)) ** 2
        return variance

    error = [abs(final_variance(steps) - std**2) for steps in (200, 400, 800)]
    assert [math.log2(error[i] / error[i + 1]) for i in (0, 1)] == pytest.approx([2, 2], abs=0.2)
    assert error[-1] < 1e-3 * std**2

    x0 = torch.randn(200_000, generator=_seeded(), dtype=torch.float64)
    x = sde(_gaussian, x0, _times(20), temperature=temperature, generator=_seeded(1))
    assert x.mean().item() == pytest.approx(mean, abs=0.01)
    assert x.var().item() == pytest.approx(final_variance(20), rel=0.015)  # 5 standard errors
    # The ODE's end is affine in its start; the more noise is replaced, the less of the start is left.
    assert torch.corrcoef(torch.stack([x0, x]))[0, 1] < {0.25: 0.9, 1.0: 0.6, 4.0: 0.1}[temperature]


def test_few_steps_of_sde_are_samples_too():
    """Not the mean of the data, which a last step from t = 0 would return."""
    x0 = torch.randn(10_000, generator=_seeded(), dtype=torch.float64)
    x = sde(_gaussian, x0, _times(2), temperature=1.0, generator=_seeded(1))
    assert x.std().item() > 0.2  # of 0.5


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_marginals_of_sde_are_those_of_the_path_at_every_time(temperature):
    x0 = torch.randn(100_000, generator=_seeded(), dtype=torch.float64)
    seen = {}
    sde(
        _gaussian,
        x0,
        _times(100),
        temperature=temperature,
        generator=_seeded(1),
        callback=lambda step, t, x: seen.update({step: (t, x.mean().item(), x.var().item())}),
    )
    for step in (25, 50, 75, 100):
        t, mean, variance = seen[step]
        assert mean == pytest.approx(0.3 * t, abs=0.015)
        assert variance == pytest.approx((1 - t) ** 2 + t**2 * 0.25, rel=0.03)


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([0.0, 0.5, 0.5, 1.0], "times that rise"),
        ([1.0, 0.0], "run from 1 to 0; pass times that rise"),
        ([0.0, 1.5], r"within \[0, 1\]"),
        ([math.nan, 1.0], "rise"),
    ],
)
def test_sde_refuses_times_that_do_not_rise(times, message):
    with pytest.raises(ValueError, match=message):
        sde(_gaussian, torch.zeros(2), torch.tensor(times))
    with pytest.raises(ValueError, match="temperature=-1"):
        sde(_gaussian, torch.zeros(2), _times(2), temperature=-1)


@pytest.mark.parametrize(("integrate", "order"), ORDERS)
def test_falling_times_run_back_to_the_start(integrate, order):
    """Every ODE method undoes a constant velocity; from order 2 on, one linear in t is integrated exactly."""
    x0 = torch.randn(2, 3, generator=_seeded(), dtype=torch.float64)
    times = torch.linspace(0, 1, 5, dtype=torch.float64)
    there = integrate(lambda x, t: torch.full_like(x, 0.7), x0, times)
    torch.testing.assert_close(there, x0 + 0.7)
    torch.testing.assert_close(integrate(lambda x, t: torch.full_like(x, 0.7), there, times.flip(0)), x0)
    if order > 1:
        back = integrate(lambda x, t: t.expand_as(x), x0 + 0.5, times.flip(0))
        torch.testing.assert_close(back, x0)


@pytest.mark.parametrize("method", SAMPLERS)
def test_samples_of_a_gaussian_posterior_have_its_mean_and_std(method):
    model, (query_coords, input_coords, input_values) = GaussianField(std=0.1), _field()
    x = sample(
        model,
        query_coords,
        input_coords,
        input_values,
        method=method,
        steps=200,
        generator=_seeded(),
        temperature=1.0,
    )
    assert x.shape == (3, 4000, 3)
    expected = input_values.mean(1)
    torch.testing.assert_close(x.mean(1), expected, atol=0.008, rtol=0)
    torch.testing.assert_close(x.std(1), torch.full((3, 3), 0.1), atol=0.008, rtol=0)
    assert model.evaluations == 200 * EVALUATIONS[method] - (method in ("heun", "sde"))


def test_one_step_posterior_mean_is_exact_whatever_the_noise():
    model, field = GaussianField(), _field(queries=50, dtype=torch.float64)
    expected = field[2].mean(1, keepdim=True).expand(3, 50, 3)
    mean, std = posterior_mean(model, *field, generator=_seeded())
    torch.testing.assert_close(mean, expected, atol=1e-12, rtol=0)
    assert std.shape == mean.shape and std.isnan().all()
    mean, std = posterior_mean(model, *field, draws=5, generator=_seeded())
    torch.testing.assert_close(mean, expected, atol=1e-12, rtol=0)
    assert std.max() < 1e-12
    assert model.evaluations == 6


def test_posterior_mean_of_samples_is_their_mean_and_std():
    model, field = GaussianField(std=0.1), _field(queries=20, dtype=torch.float64)
    mean, std = posterior_mean(model, *field, draws=6, steps=30, generator=_seeded())
    generator = _seeded()
    draws = torch.stack([sample(model, *field, steps=30, generator=generator) for _ in range(6)])
    torch.testing.assert_close(mean, draws.mean(0))
    torch.testing.assert_close(std, draws.std(0))
    assert std.mean() == pytest.approx(0.095, abs=0.01)  # 0.1 times c4(6) = 0.9515


def test_a_sample_has_twice_the_squared_error_of_the_mean():
    """That is 3 dB: truth and sample are independent draws from the posterior."""
    model, (query_coords, input_coords, input_values) = GaussianField(std=0.1), _field()
    noise = torch.randn(3, 4000, 3, generator=_seeded(7))
    truth = input_values.mean(1, keepdim=True) + 0.1 * noise
    drawn = sample(model, query_coords, input_coords, input_values, steps=100, generator=_seeded())
    mean, _ = posterior_mean(model, query_coords, input_coords, input_values, generator=_seeded())
    ratio = ((drawn - truth) ** 2).mean() / ((mean - truth) ** 2).mean()
    assert ratio.item() == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("method", SAMPLERS)
def test_callback_sees_every_step_in_order(method):
    seen, field = [], _field(queries=5)
    x = sample(
        GaussianField(),
        *field,
        method=method,
        steps=4,
        max_batch=2,
        generator=_seeded(),
        callback=lambda *args: seen.append(args),
    )
    assert [step for step, _, _ in seen] == [1, 2, 3, 4]
    assert [t for _, t, _ in seen] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert all(state.shape == (3, 5, 3) for _, _, state in seen)
    assert torch.equal(seen[-1][2].clamp(-1, 1), x)


def test_generator_and_temperature_decide_the_sample():
    model, field = GaussianField(), _field(queries=5)
    first, again, other = (sample(model, *field, steps=3, generator=_seeded(s)) for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    cold = [sample(model, *field, steps=3, generator=_seeded(s), temperature=0.0) for s in (1, 2)]
    assert torch.equal(*cold)
    warm = sample(model, *field, method="euler", steps=1, generator=_seeded(1), temperature=0.5)
    torch.testing.assert_close(warm, field[2].mean(1, keepdim=True).expand_as(warm))


def test_temperature_of_sde_is_not_a_factor_on_the_initial_noise():
    """It says how much noise is replaced: any temperature draws from the posterior, and 0 is Heun's draw."""
    model, field = GaussianField(std=0.1), _field()
    cold, warm = (
        sample(model, *field, method="sde", steps=100, generator=_seeded(), temperature=temperature)
        for temperature in (0.0, 1.0)
    )
    torch.testing.assert_close(cold, sample(model, *field, method="heun", steps=100, generator=_seeded()))
    assert not torch.allclose(cold, warm, atol=0.01)
    for drawn in (cold, warm):
        torch.testing.assert_close(drawn.std(1), torch.full((3, 3), 0.1), atol=0.01, rtol=0)


@pytest.mark.parametrize("method", SAMPLERS)
def test_max_batch_changes_memory_not_the_result(method):
    """Noise is drawn before the batch is split, that of every step of sde too."""
    field = _field(queries=5)
    whole, split = GaussianField(), GaussianField()
    options = {"method": method, "steps": 3}
    expected = sample(whole, *field, **options, generator=_seeded())
    drawn = sample(split, *field, **options, generator=_seeded(), max_batch=2)
    torch.testing.assert_close(drawn, expected, rtol=0, atol=0)
    assert (whole.largest_batch, split.largest_batch) == (3, 2)


def test_max_batch_of_the_posterior_mean():
    field = _field(queries=5)
    whole, split = GaussianField(), GaussianField()
    expected = posterior_mean(whole, *field, draws=3, steps=2, generator=_seeded())
    mean_and_std = posterior_mean(split, *field, draws=3, steps=2, generator=_seeded(), max_batch=1)
    torch.testing.assert_close(mean_and_std, expected, rtol=0, atol=0)
    assert (whole.largest_batch, split.largest_batch) == (3, 1)


class PreparedField(GaussianField):
    """A field that computes its mean of the observed values once, where it is asked to."""

    def __init__(self):
        super().__init__()
        self.prepared = []

    def prepare(self, query_coords, input_coords, input_values):
        self.prepared.append(len(input_values))
        self.modes.add(self.training)
        return input_values.mean(1, keepdim=True)

    def forward(self, noisy_values, query_coords, t, input_coords, input_values, conditions=None):
        if conditions is None:
            conditions = self.prepare(query_coords, input_coords, input_values)
        return super().forward(noisy_values, query_coords, t, input_coords, conditions)


@pytest.mark.parametrize("method", SAMPLERS)
def test_what_depends_on_the_points_is_prepared_once_a_run(method):
    field, model = _field(queries=5), PreparedField()
    drawn = sample(model, *field, method=method, steps=4, generator=_seeded(), max_batch=3)
    assert model.prepared == [3] and model.evaluations > 1 and model.modes == {False}
    plain = sample(GaussianField(), *field, method=method, steps=4, generator=_seeded())
    assert torch.equal(drawn, plain)
    model.prepared.clear()
    mean, _ = posterior_mean(model, *field, draws=5, steps=2, generator=_seeded())
    assert model.prepared == [3]
    plain, _ = posterior_mean(GaussianField(), *field, draws=5, steps=2, generator=_seeded())
    assert torch.equal(mean, plain)


def test_of_a_split_batch_nothing_is_kept():
    """Memory would grow with the batch that is split to bound it."""
    field, model = _field(queries=5), PreparedField()
    drawn = sample(model, *field, steps=1, generator=_seeded(), max_batch=2)
    assert model.prepared == [2, 1]
    assert torch.equal(drawn, sample(GaussianField(), *field, steps=1, generator=_seeded()))


def test_the_deterministic_decoding_of_a_latent_is_computed_once_a_run(autoencoder):
    model, decodings = autoencoder, []
    coords, latent = _field(queries=5)[0], torch.randn(3, model.config.latent_dim, generator=_seeded())
    noise = torch.randn(3, 5, 3, generator=_seeded())
    hook = model.decoder.register_forward_hook(lambda *given: decodings.append(given))
    drawn = decode_stochastic(model, coords, latent, noise, method="euler", steps=3)
    assert len(decodings) == 1
    decodings.clear()
    split = decode_stochastic(model, coords, latent, noise, method="euler", steps=3, max_batch=2)
    assert len(decodings) == 2
    hook.remove()
    with torch.no_grad():
        expected = euler(lambda x, t: model.decode(coords, latent, t.expand(3), x), noise, _times(3).float())
    torch.testing.assert_close(drawn, expected)
    torch.testing.assert_close(split, drawn)


def test_callback_of_the_posterior_mean_sees_it_settle():
    model, field, seen = GaussianField(), _field(queries=5, dtype=torch.float64), []
    mean, std = posterior_mean(
        model, *field, draws=4, steps=3, generator=_seeded(), callback=lambda *args: seen.append(args)
    )
    assert [draw for draw, _, _ in seen] == [1, 2, 3, 4]
    assert seen[0][2].isnan().all()
    torch.testing.assert_close(seen[-1][1:], (mean, std), rtol=0, atol=0)
    generator = _seeded()
    draws = torch.stack([sample(model, *field, steps=3, generator=generator) for _ in range(2)])
    torch.testing.assert_close(seen[1][1:], (draws.mean(0), draws.std(0)))


def test_progress_bars_are_shown_on_demand(capsys):
    field = _field(queries=5)
    sample(GaussianField(), *field, steps=3)
    posterior_mean(GaussianField(), *field, draws=2)
    assert capsys.readouterr().err == ""
    sample(GaussianField(), *field, steps=3, progress=True)
    assert "steps: 100%" in (shown := capsys.readouterr().err) and "3/3" in shown
    posterior_mean(GaussianField(), *field, draws=2, progress=True)
    assert "draws: 100%" in (shown := capsys.readouterr().err) and "2/2" in shown


def test_result_is_clamped_to_the_range_of_values():
    field = _field(queries=500)
    x = sample(GaussianField(std=2.0), *field, steps=20, generator=_seeded())
    assert x.min() == -1 and x.max() == 1


def test_modes_are_restored_and_no_gradient_is_recorded():
    model, field = GaussianField(), _field(queries=5)
    model.train()
    model.frozen.eval()
    field[2].requires_grad_()
    x = sample(model, *field, steps=2)
    mean, _ = posterior_mean(model, *field)
    assert not x.requires_grad and not mean.requires_grad
    assert model.modes == {False} and model.training and not model.frozen.training
    with pytest.raises(RuntimeError, match="stop"):
        sample(model, *field, steps=2, callback=_stop)
    assert model.training


def _stop(step, t, x):
    raise RuntimeError("stop")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "rk9"}, "ddim.*euler.*heun.*midpoint.*rk4.*sde"),
        ({"steps": 0}, "steps=0"),
        ({"steps": 2.5}, "steps=2.5"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"max_batch": 0}, "max_batch=0"),
    ],
)
def test_sample_refuses_illegal_options(options, message):
    with pytest.raises(ValueError, match=message):
        sample(GaussianField(), *_field(queries=5), **options)


def test_illegal_fields_models_and_counts_are_refused():
    query_coords, input_coords, input_values = _field(queries=5)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        sample(GaussianField(), query_coords * 32, input_coords, input_values)
    with pytest.raises(ValueError, match="empty"):
        posterior_mean(GaussianField(), query_coords[:, :0], input_coords, input_values)
    with pytest.raises(ValueError, match="draws=0"):
        posterior_mean(GaussianField(), query_coords, input_coords, input_values, draws=0)
    with pytest.raises(ValueError, match="at least two times"):
        euler(lambda x, t: x, torch.zeros(1), torch.zeros(1))

    class OneChannel(GaussianField):
        def forward(self, *args):
            return super().forward(*args)[..., :1]

    with pytest.raises(ValueError, match="velocity has shape"):
        sample(OneChannel(), query_coords, input_coords, input_values)


class LinearField(GaussianField):
    """A field whose layer refuses every dtype but that of its parameters."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, noisy_values, query_coords, t, input_coords, input_values):
        self.layer(torch.cat([noisy_values, input_values], dim=1))
        return super().forward(noisy_values, query_coords, t, input_coords, input_values)


@pytest.mark.parametrize("parameters", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("given", [torch.float16, torch.float32, torch.float64])
def test_the_field_is_cast_to_the_dtype_of_the_parameters(parameters, given):
    model, field = LinearField().to(parameters), [x.to(given) for x in _field(queries=5)]
    drawn = sample(model, *field, steps=2, generator=_seeded())
    mean, std = posterior_mean(model, *field, draws=2, generator=_seeded())
    assert drawn.dtype == mean.dtype == std.dtype == parameters
    expected = sample(model, *(x.to(parameters) for x in field), steps=2, generator=_seeded())
    torch.testing.assert_close(drawn, expected, rtol=0, atol=0)


def test_v1_takes_numpys_float64():
    config = MambaDiffusionConfig(d_model=16, num_layers=1, d_state=2, num_fourier_features=4, num_heads=2)
    torch.manual_seed(0)
    model, field = MambaDiffusion(config), _field(queries=5)
    drawn = sample(model, *(x.double() for x in field), steps=2, generator=_seeded())
    torch.testing.assert_close(drawn, sample(model, *field, steps=2, generator=_seeded()))


@pytest.mark.parametrize("temperature", ["a", None, True, -1.0, math.inf, math.nan])
def test_temperature_is_a_number_from_zero(temperature):
    with pytest.raises(ValueError, match=r"temperature=.* is not in \[0, inf\)"):
        sample(GaussianField(), *_field(queries=2), temperature=temperature)


@pytest.mark.parametrize("integrate", SAMPLERS.values())
def test_times_are_a_tensor(integrate):
    with pytest.raises(ValueError, match="times is a list; pass a tensor"):
        integrate(lambda x, t: x, torch.ones(2), [0.0, 1.0])


def _tiny(kind):
    torch.manual_seed(0)
    sizes = dict(d_model=16, num_layers=2, d_state=4, num_fourier_features=8, num_heads=2)
    if kind is LocalMamba2D:
        model = kind(LocalMamba2DConfig(channels=1, dims=(16, 32), depths=(1, 1), d_state=2, num_classes=3))
    else:
        model = kind((MambaDiffusionConfig if kind is MambaDiffusion else MambaDiffusionV2Config)(**sizes))
    for parameter in model.parameters():  # some start at zero, at which a sample does not depend on them
        nn.init.normal_(parameter, std=0.1)
    return model


class Replayed:
    """Stands in for a CUDA graph: evaluates again, on its own tensors."""

    def __init__(self, model, velocity, x, t):
        self.own = x.clone(), t.clone()
        self.velocity, self.evaluate, self.replays = torch.zeros_like(x), velocity, 0
        self.made.append(self)

    def replay(self):
        self.replays += 1
        self.velocity.copy_(self.evaluate(*self.own))


@pytest.fixture
def replayed(monkeypatch):
    """CUDA graphs by `Replayed`, on a CPU; the list of those that were recorded."""
    monkeypatch.setattr(Replayed, "made", [], raising=False)
    monkeypatch.setattr(samplers, "_can_record", lambda x: True)

    def record(*arguments):
        graph = Replayed(*arguments)
        return graph, *graph.own, graph.velocity

    monkeypatch.setattr(samplers, "_record", record)
    return Replayed.made


def test_evaluations_are_launched_at_once_after_the_first(replayed):
    x0, model = torch.randn(3, 5, generator=_seeded(), dtype=torch.float64), _tiny(MambaDiffusion)
    seen = []
    for velocity in (_curved, samplers.launched_at_once(model, _curved, 40)):
        for method in ("rk4", "heun"):  # which hold several velocities at once
            seen.append(SAMPLERS[method](velocity, x0, _times(10)))
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3])
    assert len(replayed) == 1 and replayed[0].replays == 40 + 19 - samplers.EAGER_CALLS
    other = torch.randn(2, 5, dtype=torch.float64)  # of another shape, dtype or time: as it is
    assert torch.equal(velocity(other, torch.tensor(0.5)), _curved(other, torch.tensor(0.5)))
    assert velocity(x0.float(), torch.tensor(0.5)).dtype == torch.float32
    assert replayed[0].replays == 40 + 19 - samplers.EAGER_CALLS


def test_runs_that_are_launched_at_once(replayed):
    model, field = _tiny(MambaDiffusion), _field(samples=2, queries=20)
    plain = sample(GaussianField(), *field, steps=6, generator=_seeded())
    assert not replayed and plain.isfinite().all()  # not a model that is launch-bound
    for options, replays in (
        (dict(steps=6), [8]),
        (dict(steps=6, max_batch=1), []),
        (dict(steps=5, method="sde"), [6]),
        (dict(steps=9, method="euler"), []),
    ):
        replayed.clear()
        sample(model, *field, generator=_seeded(), **options)
        assert [graph.replays for graph in replayed] == replays
    replayed.clear()
    mean, std = posterior_mean(model, *field, draws=12, generator=_seeded())
    assert [graph.replays for graph in replayed] == [9]  # one graph for all draws
    wanted = posterior_mean(model, *field, draws=12, generator=_seeded(), max_batch=1)
    torch.testing.assert_close((mean, std), wanted)


def test_only_models_that_a_graph_repeats_are_launched_at_once():
    def is_launched(model, evaluations=samplers.RECORD_FROM):
        return samplers.launched_at_once(model, _linear, evaluations) is not _linear

    class Counts(MambaDiffusion):
        pass

    assert is_launched(_tiny(MambaDiffusion)) and not is_launched(_tiny(MambaDiffusion), 9)
    assert not is_launched(Counts(_tiny(MambaDiffusion).config)) and not is_launched(GaussianField())
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        model = _tiny(MambaDiffusion)
        handle = getattr(model.decoder, register)(lambda *given: None)
        assert not is_launched(model)
        handle.remove()
        assert is_launched(model)
        model.decoder.forward = model.decoder.forward  # such as accelerate's, which moves weights
        assert not is_launched(model)
    model = _tiny(MambaDiffusion)
    model.decoder.to("meta")
    assert not is_launched(model)
    assert not samplers._can_record(torch.zeros(1))


CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@CUDA
@pytest.mark.parametrize("kind", [MambaDiffusion, MambaDiffusionV2, LocalMamba2D])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_run_launched_at_once_is_the_same_run(kind, bf16, monkeypatch):
    replayed = []

    class Graph(torch.cuda.CUDAGraph):
        def replay(self):
            replayed.append(self)
            super().replay()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)

    def run(device):
        model = _tiny(kind).to(device)
        with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
            if kind is LocalMamba2D:
                options = dict(labels=torch.tensor([0, 2]), guidance=2.0, steps=6, generator=_seeded())
                return [sample_grids(model, 2, 8, 8, **options)]
            field = [x.to(device) for x in _field(samples=2, queries=40)]
            generator = torch.Generator(device).manual_seed(0)
            means = posterior_mean(model, *field, draws=12, generator=generator)
            return [
                sample(model, *field, steps=6, generator=_seeded()),
                sample(model, *field, method="sde", steps=6, generator=generator),
                *means,
            ]

    devices = [f"cuda:{index}" for index in range(min(2, torch.cuda.device_count()))]
    launched = [run(device) for device in devices]
    assert len(set(replayed)) == len(devices) * (1 if kind is LocalMamba2D else 3)
    count = len(replayed)
    monkeypatch.setattr(samplers, "RECORD_FROM", math.inf)
    for device, found in zip(devices, launched, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(found, run(device), strict=True))
    assert len(replayed) == count


@CUDA
def test_what_cannot_be_recorded_is_named():
    # In a process of its own: torch does not promise to go on after a failed recording.
    source = "\n".join(
        [
            "import sys; sys.path.insert(0, 'tests')",
            "from test_samplers import *",
            "from test_samplers import _tiny, _field",
            "class Reads(MambaDiffusion):",
            "    launch_bound = True",
            "    def forward(self, x, *given, **options):",
            "        x.sum().item()",
            "        return super().forward(x, *given, **options)",
            "model = Reads(_tiny(MambaDiffusion).config).cuda()",
            "sample(model, *(x.cuda() for x in _field(samples=1, queries=5)), steps=9)",
        ]
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert done.returncode and "Reads does something that a CUDA graph cannot hold" in done.stderr
    assert "set launch_bound = False" in done.stderr
