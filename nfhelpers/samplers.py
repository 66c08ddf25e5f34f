"""Samplers: from noise (t = 0) to a field (t = 1) along the learned velocity, and the posterior mean.

A *sample* is one draw from the posterior of the field given the observed points; the *posterior mean* is the
average of all draws, which has half the squared error of a sample (about 3 dB more PSNR) and less texture.

Sources: seed 002 (Heun with 50 steps); Karras et al., "Elucidating the Design Space of Diffusion-Based
Generative Models", NeurIPS 2022 (Heun against Euler); Lipman et al. 2023.
"""

import math
from contextlib import contextmanager

import torch

from nfhelpers.flow import check_field


def _check_times(times):
    if not isinstance(times, torch.Tensor):
        raise ValueError(f"times is a {type(times).__name__}; pass a tensor such as torch.linspace(0, 1, 51)")
    if times.ndim != 1 or len(times) < 2:
        raise ValueError(
            f"times has shape {tuple(times.shape)}; pass at least two times, such as linspace(0, 1, 51)"
        )


def euler(velocity, x, times, *, callback=None):
    """Integrate dx/dt = velocity(x, t) by Euler's method: first order, one evaluation a step.

    velocity: function of x (B, ...) and a scalar tensor t, returning (B, ...); x: the state at times[0];
    times: 1-D tensor, at least two entries, rising (towards data) or falling (towards noise).
    callback(step, t, x), if given, is called after each step, step = 1 ... len(times) - 1, with the time
    reached as a float. Returns the state at times[-1]. Raises ValueError on times that are
    not a tensor or of a wrong shape.
    """
    _check_times(times)
    for step in range(1, len(times)):
        t, t_next = times[step - 1], times[step]
        x = x + (t_next - t) * velocity(x, t)
        if callback is not None:
            callback(step, float(t_next), x)
    return x


def heun(velocity, x, times, *, callback=None):
    """Integrate dx/dt = velocity(x, t) by Heun's method: second order, two evaluations a step.

    Arguments, callback, result and errors are those of `euler`. Source: Karras et al. 2022, algorithm 1.
    """
    _check_times(times)
    for step in range(1, len(times)):
        t, t_next = times[step - 1], times[step]
        slope = velocity(x, t)
        slope_next = velocity(x + (t_next - t) * slope, t_next)
        x = x + (t_next - t) * (slope + slope_next) / 2
        if callback is not None:
            callback(step, float(t_next), x)
    return x


SAMPLERS = {"euler": euler, "heun": heun}


@contextmanager
def _evaluation_mode(model):
    """model.eval() inside, each submodule's own mode back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _check_count(name, value):
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r} is not a positive integer; pass a count such as 1")


def _check_temperature(value):
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value < math.inf:
        raise ValueError(f"temperature={value!r} is not in [0, inf); pass 1.0 for a posterior sample")


def _as_parameters(model, *tensors):
    """The tensors in the dtype of the model's parameters; as they are for a model that has none."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    return tensors if dtype is None else tuple(tensor.to(dtype) for tensor in tensors)


def _initial_noise(query_coords, input_values, generator):
    """Standard normal (B, Nq, 3), drawn on the generator's device: a CPU generator repeats on any device."""
    device = input_values.device if generator is None else generator.device
    shape = (*query_coords.shape[:2], input_values.shape[-1])
    noise = torch.randn(shape, generator=generator, device=device, dtype=input_values.dtype)
    return noise.to(input_values.device)


def _conditional_velocity(model, query_coords, input_coords, input_values, max_batch):
    """The model as a function of (x, t), evaluated on at most max_batch samples at a time."""
    batch = len(query_coords)
    size = batch if max_batch is None else max_batch

    def velocity(x, t):
        parts = []
        for start in range(0, batch, size):
            part = slice(start, start + size)
            time = t.expand(len(x[part]))  # (b,)
            parts.append(model(x[part], query_coords[part], time, input_coords[part], input_values[part]))
            if parts[-1].shape != x[part].shape:
                raise ValueError(
                    f"the model's velocity has shape {tuple(parts[-1].shape)}; "
                    f"wanted {tuple(x[part].shape)}, that of noisy_values"
                )
        return torch.cat(parts).to(x.dtype)

    return velocity


def _times(steps, x):
    return torch.linspace(0, 1, steps + 1, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)


@torch.no_grad()
def sample(
    model,
    query_coords,
    input_coords,
    input_values,
    *,
    method="heun",
    steps=50,
    generator=None,
    temperature=1.0,
    callback=None,
    max_batch=None,
):
    """Draw one posterior sample of the field at the query points.

    model: a field model (nn.Module); query_coords (B, Nq, 2) and input_coords (B, Ni, 2) in [0, 1];
    input_values (B, Ni, 3) in [-1, 1]. method: a key of SAMPLERS; steps: number of equal steps ("heun"
    evaluates the model twice a step); generator: source of the initial noise, on any device; temperature:
    factor on the initial noise, 0 for none, 1 for a posterior sample; callback(step, t, x): called after
    each step with step = 1 ... steps, the time reached and the state of the whole batch, not clamped;
    max_batch: most samples that pass through the model at once (query points are never split: they share
    one sequence), the result does not depend on it beyond float error. Returns (B, Nq, 3), clamped to [-1,
    1]. The field may be of any floating dtype, such as NumPy's float64: it is cast to the dtype of the
    model's parameters, which is also that of the result. The model's training mode is restored, gradients
    are not recorded. Raises ValueError on an illegal field (see flow.check_field), method, steps,
    temperature or max_batch.
    """
    check_field(query_coords, input_coords, input_values)
    if method not in SAMPLERS:
        raise ValueError(f"method={method!r} is unknown; pass one of {sorted(SAMPLERS)}")
    _check_count("steps", steps)
    if max_batch is not None:
        _check_count("max_batch", max_batch)
    _check_temperature(temperature)
    query_coords, input_coords, input_values = _as_parameters(model, query_coords, input_coords, input_values)
    x = temperature * _initial_noise(query_coords, input_values, generator)
    velocity = _conditional_velocity(model, query_coords, input_coords, input_values, max_batch)
    with _evaluation_mode(model):
        x = SAMPLERS[method](velocity, x, _times(steps, x), callback=callback)
    return x.clamp(-1, 1)


@torch.no_grad()
def posterior_mean(
    model, query_coords, input_coords, input_values, *, draws=1, steps=1, generator=None, max_batch=None
):
    """Mean and per-point standard deviation of the field at the query points, given the observed points.

    steps=1 is one evaluation at t = 0: the optimal velocity there is E[data | observed] - noise, so that
    noise plus velocity is the posterior mean itself, whatever the noise. Averaging more draws then only
    removes what noise an imperfect model leaves, and std measures that remainder, not the posterior. steps
    > 1 averages `draws` posterior samples (Heun, see `sample`); their std estimates the posterior's
    standard deviation.

    model and the field: as in `sample`; draws: number of noise draws; generator, max_batch: as in `sample`.
    Returns mean, std, each (B, Nq, 3) in the dtype of the model's parameters; mean in [-1, 1] (each draw is
    clamped), std unbiased over draws and NaN for draws=1, where it is undefined. Raises ValueError as
    `sample` does and on draws that is not a positive integer.
    """
    check_field(query_coords, input_coords, input_values)
    _check_count("draws", draws)
    _check_count("steps", steps)
    if max_batch is not None:
        _check_count("max_batch", max_batch)
    query_coords, input_coords, input_values = _as_parameters(model, query_coords, input_coords, input_values)
    velocity = _conditional_velocity(model, query_coords, input_coords, input_values, max_batch)
    integrate = euler if steps == 1 else heun
    mean = squares = torch.zeros((), dtype=input_values.dtype, device=input_values.device)
    with _evaluation_mode(model):
        for count in range(1, draws + 1):
            x = _initial_noise(query_coords, input_values, generator)
            x = integrate(velocity, x, _times(steps, x)).clamp(-1, 1)
            # Welford's update: one pass, and no loss of precision when the spread is small.
            difference = x - mean
            mean = mean + difference / count
            squares = squares + difference * (x - mean)
    std = (squares / (draws - 1)).sqrt() if draws > 1 else torch.full_like(mean, math.nan)
    return mean, std
