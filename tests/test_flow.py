"""flow.py: the path and its conversions against closed forms, the losses, the checks."""

import math
from contextlib import nullcontext

import pytest
import torch

from nfhelpers import flow
from nfhelpers.models import LocalMamba2D, LocalMamba2DConfig


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("t", [0.0, 0.3, torch.tensor(1.0), torch.tensor([0.0, 0.25, 0.5, 1.0])])
def test_the_path_is_straight(t):
    noise, data = draw(4, 5, 3), draw(4, 5, 3, seed=1)
    x_t, velocity = flow.interpolate(noise, data, t), flow.target_velocity(noise, data)
    t = torch.as_tensor(t).reshape(-1, 1, 1)
    torch.testing.assert_close(x_t + (1 - t) * velocity, data)
    torch.testing.assert_close(x_t - t * velocity, noise)


def test_weights_are_the_regression_coefficient_and_the_precision_of_the_velocity():
    """Of zero-mean Gaussian data: v = skip_weight x_t + rest, and loss_weight Var(rest) = 1."""
    t, std = torch.linspace(0, 1, 5, dtype=torch.float64), 0.5
    noise, data = draw(200_000), std * draw(200_000, seed=1)
    x_t, velocity = (1 - t[:, None]) * noise + t[:, None] * data, data - noise
    slope = (x_t * velocity).sum(1) / (x_t**2).sum(1)
    torch.testing.assert_close(flow.skip_weight(t, std), slope, atol=0.01, rtol=0)
    rest = (velocity - slope[:, None] * x_t).var(1)
    torch.testing.assert_close(flow.loss_weight(t, std) * rest, torch.ones_like(t), atol=0.01, rtol=0)
    assert flow.skip_weight(t, std)[0] == -1 and flow.skip_weight(t, std)[-1] == 1


def batch_of(samples=4, inputs=6, queries=5):
    return {
        "input_coords": draw(samples, inputs, 2).sigmoid(),
        "input_values": draw(samples, inputs, 3, seed=1).tanh(),
        "query_coords": draw(samples, queries, 2, seed=2).sigmoid(),
        "query_values": draw(samples, queries, 3, seed=3).tanh(),
    }


def test_loss_of_known_predictions():
    batch, noise, t = batch_of(), draw(4, 5, 3, seed=4), torch.rand(4, dtype=torch.float64)

    def off_by(error):  # the exact velocity, plus error (B,)
        data = batch["query_values"]
        return lambda x, _, t, *inputs: (data - x) / (1 - t)[:, None, None] + error[:, None, None]

    options = dict(t=t, noise=noise)
    assert flow.flow_matching_loss(off_by(torch.zeros(4)), batch, **options).item() < 1e-20
    error = torch.tensor([0.0, 1.0, 2.0, 3.0])
    assert flow.flow_matching_loss(off_by(error), batch, **options).item() == pytest.approx(14 / 4)
    weighted = flow.flow_matching_loss(off_by(error), batch, weight=lambda t: 10 * t, **options)
    assert weighted.item() == pytest.approx((10 * t * error**2).mean().item())


def test_loss_draws_uniform_time_and_normal_noise_from_the_generator():
    seen = []

    def record(x_t, query_coords, t, input_coords, input_values):
        seen.append((x_t, t))
        return torch.zeros_like(x_t)

    batch = batch_of(samples=4000)
    batch["query_values"] = torch.zeros_like(batch["query_values"])
    for _ in range(2):
        flow.flow_matching_loss(record, batch, generator=torch.Generator().manual_seed(5))
    (x_first, t_first), (x_second, t_second) = seen
    assert torch.equal(x_first, x_second) and torch.equal(t_first, t_second)
    assert abs(t_first.mean() - 0.5) < 0.02 and abs(t_first.var() - 1 / 12) < 0.005
    noise = x_first / (1 - t_first)[:, None, None]
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02


@pytest.mark.parametrize("name", ["input_coords", "query_coords", "input_values"])
@pytest.mark.parametrize("bad", [-0.1, 16.5, math.nan, math.inf])
def test_fields_of_another_range_or_not_finite_are_refused(name, bad):
    batch, coords = batch_of(), name != "input_values"
    batch[name][0, 0, 0] = bad
    with pytest.raises(ValueError) if coords else nullcontext():
        flow.flow_matching_loss(lambda x, *field: x, batch)
    del batch["query_values"]
    with pytest.raises(ValueError) if coords or bad != -0.1 else nullcontext():
        flow.check_field(**batch)


def test_loss_of_grids_is_that_of_the_velocity_and_drops_conditions_while_training():
    torch.manual_seed(0)
    sizes = dict(channels=1, dims=(8,), depths=(1,), d_state=2, mapping_width=12, num_classes=3)
    model, dropped = LocalMamba2D(LocalMamba2DConfig(**sizes, cfg_dropout=0.3, dropout=0.0)).double(), []
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    batch = dict(spectrograms=draw(200, 1, 4, 4), labels=torch.arange(200) % 3)
    t, noise = torch.rand(200, dtype=torch.float64), draw(200, 1, 4, 4, seed=1)
    x_t = (1 - t[:, None, None, None]) * noise + t[:, None, None, None] * batch["spectrograms"]
    wanted = (model(x_t, t, batch["labels"], None, None) - (batch["spectrograms"] - noise)).square().mean()
    torch.testing.assert_close(flow.grid_flow_loss(model.eval(), batch, t=t, noise=noise), wanted)
    model.train().register_forward_pre_hook(lambda _, given: dropped.append(given[4]))
    generators = (torch.Generator().manual_seed(0) for _ in range(2))
    assert torch.equal(*(flow.grid_flow_loss(model, batch, generator=generator) for generator in generators))
    assert dropped[0].double().mean().item() == pytest.approx(0.3, abs=0.1)  # standard error 0.032
