"""flow.py: the path, its conversions, the adapter to diffusers, the loss, the boundary check."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from nfhelpers import flow
from nfhelpers.samplers import euler


def _draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("t", [0.0, 0.3, torch.tensor(1.0), torch.tensor([0.0, 0.25, 0.5, 1.0])])
def test_conversions_invert_the_path(t):
    noise, data = _draw(4, 5, 3), _draw(4, 5, 3, seed=1)
    x_t, velocity = flow.interpolate(noise, data, t), flow.target_velocity(noise, data)
    torch.testing.assert_close(flow.velocity_to_data(velocity, x_t, t), data)
    torch.testing.assert_close(flow.velocity_to_noise(velocity, x_t, t), noise)


def test_path_ends_and_slope():
    noise, data = _draw(2, 5, 3), _draw(2, 5, 3, seed=1)
    assert torch.equal(flow.interpolate(noise, data, 0.0), noise)
    assert torch.equal(flow.interpolate(noise, data, 1.0), data)
    slope = (flow.interpolate(noise, data, 0.75) - flow.interpolate(noise, data, 0.25)) / 0.5
    torch.testing.assert_close(slope, flow.target_velocity(noise, data))


def test_score_is_the_gradient_of_the_log_density():
    """Data N(m, s^2): p_t is N(t m, (1-t)^2 + t^2 s^2), its score by autograd, velocity in closed form."""
    mean, std, t = 0.4, 0.7, torch.tensor([0.0, 0.3, 0.9], dtype=torch.float64)
    x = _draw(3, 6).requires_grad_()
    t_column = t[:, None]
    variance = (1 - t_column) ** 2 + t_column**2 * std**2
    log_density = -((x - t_column * mean) ** 2) / (2 * variance)
    (score,) = torch.autograd.grad(log_density.sum(), x)
    x = x.detach()
    velocity = mean + (t_column * std**2 - (1 - t_column)) / variance * (x - t_column * mean)
    torch.testing.assert_close(flow.velocity_to_score(velocity, x, t), score)


def test_score_at_the_data_end_is_refused():
    x = _draw(2, 3)
    with pytest.raises(ValueError, match="undefined at t=1"):
        flow.velocity_to_score(x, x, torch.tensor([0.5, 1.0]))


def test_loss_weight_makes_all_times_of_a_gaussian_posterior_alike():
    """What x_t leaves open of the velocity of N(m, s^2) is s^2 / ((1-t)^2 + t^2 s^2): weighed, 1."""
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    open_ = 0.3**2 / ((1 - t) ** 2 + (0.3 * t) ** 2)
    torch.testing.assert_close(flow.loss_weight(t, 0.3) * open_, torch.ones_like(t))
    with pytest.raises(ValueError, match="std=0"):
        flow.loss_weight(t, 0)


def test_skip_weight_is_the_regression_coefficient():
    t = torch.linspace(0, 1, 5, dtype=torch.float64)
    noise, data = _draw(200_000), 0.5 * _draw(200_000, seed=1)
    x_t = (1 - t[:, None]) * noise + t[:, None] * data
    fitted = (x_t * (data - noise)).sum(1) / (x_t**2).sum(1)
    torch.testing.assert_close(flow.skip_weight(t, 0.5), fitted, atol=0.01, rtol=0)
    assert flow.skip_weight(t, 0.5)[0] == -1 and flow.skip_weight(t, 0.5)[-1] == 1
    with pytest.raises(ValueError, match="data_std"):
        flow.skip_weight(t, 0.0)


def test_diffusers_scheduler_takes_the_same_steps():
    """Their Euler scheduler, fed with our velocity through the adapter, against our Euler sampler."""

    def velocity(x, t):
        return torch.sin(3 * x) * (1 - t) + 0.5 * t

    noise, times = _draw(2, 5, 3).float(), torch.linspace(0, 1, 8)
    ours = euler(velocity, noise, times)

    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(sigmas=flow.to_diffusers_sigma(times[:-1]).tolist())
    theirs = noise
    for timestep in scheduler.timesteps:
        t = 1 - timestep / scheduler.config.num_train_timesteps
        output = flow.to_diffusers_velocity(velocity(theirs, t))
        theirs = scheduler.step(output, timestep, theirs).prev_sample
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_diffusers_path_is_ours_at_the_adapted_level():
    noise, data, t = _draw(2, 5, 3).float(), _draw(2, 5, 3, seed=1).float(), 0.3
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(sigmas=[flow.to_diffusers_sigma(t)])
    theirs = scheduler.scale_noise(data, scheduler.timesteps[:1], noise)
    torch.testing.assert_close(theirs, flow.interpolate(noise, data, t))
    torch.testing.assert_close(flow.from_diffusers_velocity(noise - data), flow.target_velocity(noise, data))


def _batch(samples=4, inputs=6, queries=5):
    return {
        "input_coords": _draw(samples, inputs, 2).sigmoid(),
        "input_values": _draw(samples, inputs, 3, seed=1).tanh(),
        "query_coords": _draw(samples, queries, 2, seed=2).sigmoid(),
        "query_values": _draw(samples, queries, 3, seed=3).tanh(),
    }


def test_loss_of_known_predictions():
    batch, noise, t = _batch(), _draw(4, 5, 3, seed=4), torch.rand(4, dtype=torch.float64)

    def oracle(x_t, query_coords, t, input_coords, input_values):
        return (batch["query_values"] - x_t) / (1 - t)[:, None, None]

    def off_by_two(x_t, query_coords, t, *field):
        return oracle(x_t, query_coords, t, *field) + 2

    assert flow.flow_matching_loss(oracle, batch, t=t, noise=noise).item() < 1e-20
    assert flow.flow_matching_loss(off_by_two, batch, t=t, noise=noise).item() == pytest.approx(4)


def test_loss_draws_uniform_time_and_normal_noise_from_the_generator():
    seen = []

    def record(x_t, query_coords, t, input_coords, input_values):
        seen.append((x_t, t))
        return torch.zeros_like(x_t)

    batch = _batch(samples=4000)
    batch["query_values"] = torch.zeros_like(batch["query_values"])
    for _ in range(2):
        flow.flow_matching_loss(record, batch, generator=torch.Generator().manual_seed(5))
    (x_first, t_first), (x_second, t_second) = seen
    assert torch.equal(x_first, x_second) and torch.equal(t_first, t_second)
    assert abs(t_first.mean() - 0.5) < 0.02 and abs(t_first.var() - 1 / 12) < 0.005
    noise = x_first / (1 - t_first)[:, None, None]
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02


def test_loss_refuses_what_would_broadcast():
    batch = _batch()
    with pytest.raises(ValueError, match="model's velocity"):
        flow.flow_matching_loss(lambda x, *field: x[..., :1], batch)
    with pytest.raises(ValueError, match="query_values"):
        flow.flow_matching_loss(lambda x, *field: x, {k: v for k, v in batch.items() if k != "query_values"})
    with pytest.raises(ValueError, match="differ in shape"):
        flow.flow_matching_loss(lambda x, *field: x, batch, noise=torch.zeros(4, 1, 3))
    with pytest.raises(ValueError, match="batch of 4"):
        flow.flow_matching_loss(lambda x, *field: x, batch, t=torch.zeros(3))


@pytest.mark.parametrize("function", [flow.interpolate, flow.velocity_to_data, flow.velocity_to_noise])
def test_conversions_refuse_shapes_that_differ(function):
    with pytest.raises(ValueError, match="differ in shape"):
        function(torch.zeros(2, 5, 3), torch.zeros(2, 1, 3), 0.5)
    with pytest.raises(ValueError, match="t has shape"):
        function(torch.zeros(2, 5, 3), torch.zeros(2, 5, 3), torch.zeros(5))


def _first_point_nan(x):
    return x.index_fill(1, torch.tensor([0]), torch.nan)


ILLEGAL_FIELDS = {
    "two dimensions": ("query_coords", lambda x: x[0], "shape"),
    "three coordinates": ("query_coords", lambda x: torch.cat([x, x[..., :1]], -1), "shape"),
    "one channel": ("input_values", lambda x: x[..., :1], "shape"),
    "integers": ("input_values", lambda x: x.long(), "dtype"),
    "numpy": ("input_coords", lambda x: x.numpy(), "ndarray"),
    "empty batch": ("query_coords", lambda x: x[:0], "empty"),
    "no query": ("query_coords", lambda x: x[:, :0], "empty"),
    "other batch": ("input_values", lambda x: x[:2], "batch"),
    "other count": ("input_values", lambda x: x[:, :2], "points"),
    "pixel coordinates": ("query_coords", lambda x: x * 32, r"\[0, 1\]"),
    "negative": ("input_coords", lambda x: x - 1, r"\[0, 1\]"),
    "nan coordinate": (
        "input_coords",
        lambda x: x.index_fill(1, torch.tensor([0]), torch.nan),
        "input_coords",
    ),
    "nan value": ("input_values", _first_point_nan, "12 NaN"),
    "infinite value": ("input_values", lambda x: x / 0, "NaN or infinite"),
    "other device": ("input_values", lambda x: x.to("meta"), "device"),
}


@pytest.mark.parametrize("case", ILLEGAL_FIELDS)
def test_check_field_names_what_is_wrong(case):
    name, change, message = ILLEGAL_FIELDS[case]
    field = {k: v for k, v in _batch().items() if k != "query_values"}
    flow.check_field(**field)
    field[name] = change(field[name])
    with pytest.raises(ValueError, match=message):
        flow.check_field(**field)


@pytest.mark.parametrize("function", [flow.interpolate, flow.velocity_to_data, flow.velocity_to_noise])
@pytest.mark.parametrize("t", [-0.1, 1.5, float("nan"), torch.tensor([0.5, 2.0])])
def test_times_outside_the_path_are_refused(function, t):
    with pytest.raises(ValueError, match=r"t spans .* in \[0, 1\]"):
        function(torch.rand(2, 3), torch.rand(2, 3), t)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.ones(2, 3, dtype=torch.int64), "dtype torch.int64; pass a floating point dtype"),
        (torch.ones(0, 3), "is empty"),
        (np.ones((2, 3)), "is a ndarray; pass a torch tensor"),
    ],
)
def test_what_is_no_field_is_refused(bad, message):
    good = torch.rand(2, 3)
    for first, second in ((bad, good), (good, bad)):
        with pytest.raises(ValueError, match=message):
            flow.target_velocity(first, second)
        for function in (
            flow.interpolate,
            flow.velocity_to_data,
            flow.velocity_to_noise,
            flow.velocity_to_score,
        ):
            with pytest.raises(ValueError, match=message):
                function(first, second, 0.5)


@pytest.mark.parametrize("name", ["input_coords", "query_coords"])
def test_loss_refuses_coordinates_and_times_outside_the_unit_interval(name):
    def model(noisy_values, *_):
        return torch.zeros_like(noisy_values)

    with pytest.raises(ValueError, match=rf"{name} spans .* in \[0, 1\]"):
        flow.flow_matching_loss(model, {**_batch(), name: _batch()[name] + 1})
    with pytest.raises(ValueError, match="t spans"):
        flow.flow_matching_loss(model, _batch(), t=torch.full((4,), 1.5))
