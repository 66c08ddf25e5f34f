"""samplers.py against closed forms: a linear ODE, a Gaussian posterior; and what sample and mean promise."""

import math

import pytest
import torch
from torch import nn

from nfhelpers.models import MambaDiffusion, MambaDiffusionConfig
from nfhelpers.samplers import SAMPLERS, euler, heun, posterior_mean, sample


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


@pytest.mark.parametrize(("integrate", "order"), [(euler, 1), (heun, 2)])
def test_order_of_convergence_on_a_linear_ode(integrate, order):
    """dx/dt = -2 x + 3 t, solved by x = (x0 + 3/4) exp(-2 t) + 3/2 t - 3/4: error ~ steps^-order."""
    x0 = torch.tensor([1.0, -0.5], dtype=torch.float64)
    exact = (x0 + 0.75) * math.exp(-2) + 0.75
    errors = []
    for steps in (40, 80, 160):
        times = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        errors.append((integrate(lambda x, t: -2 * x + 3 * t, x0, times) - exact).abs().max().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)
    assert math.log2(errors[1] / errors[2]) == pytest.approx(order, abs=0.1)
    assert errors[2] < 0.02**order


@pytest.mark.parametrize("integrate", [euler, heun])
def test_falling_times_run_back_to_the_start(integrate):
    """Both methods undo a constant velocity; Heun is exact for one that is linear in t."""
    x0 = torch.randn(2, 3, generator=_seeded(), dtype=torch.float64)
    times = torch.linspace(0, 1, 5, dtype=torch.float64)
    there = integrate(lambda x, t: torch.full_like(x, 0.7), x0, times)
    torch.testing.assert_close(there, x0 + 0.7)
    torch.testing.assert_close(integrate(lambda x, t: torch.full_like(x, 0.7), there, times.flip(0)), x0)
    torch.testing.assert_close(heun(lambda x, t: t.expand_as(x), x0, times), x0 + 0.5)


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
    assert model.evaluations == (200 if method == "euler" else 400)


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


def test_callback_sees_every_step_in_order():
    seen, field = [], _field(queries=5)

    def callback(step, t, x):
        seen.append((step, t, x))

    x = sample(
        GaussianField(),
        *field,
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


def test_max_batch_changes_memory_not_the_result():
    field = _field(queries=5)
    whole, split = GaussianField(), GaussianField()
    expected = sample(whole, *field, steps=3, generator=_seeded())
    torch.testing.assert_close(sample(split, *field, steps=3, generator=_seeded(), max_batch=2), expected)
    assert (whole.largest_batch, split.largest_batch) == (3, 2)
    mean, _ = posterior_mean(split, *field, generator=_seeded(), max_batch=1)
    torch.testing.assert_close(mean, posterior_mean(whole, *field, generator=_seeded())[0])


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
        ({"method": "rk4"}, "euler.*heun"),
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


@pytest.mark.parametrize("integrate", [euler, heun])
def test_times_are_a_tensor(integrate):
    with pytest.raises(ValueError, match="times is a list; pass a tensor"):
        integrate(lambda x, t: x, torch.ones(2), [0.0, 1.0])
