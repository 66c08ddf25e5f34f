"""Samplers: from noise (t = 0) to a field (t = 1) along the learned velocity, and the posterior mean.

A *sample* is one draw from the posterior of the field given the observed points. The *posterior mean* is the
average of all draws: it has half the squared error of a sample (about 3 dB more PSNR) and less texture.

    euler                order 1, one evaluation a step; on the straight path DDIM is the same
    heun, midpoint, sde  order 2, two; sde is heun that replaces a part of the noise in each step but the last
    rk4                  order 4, four
    shortcut             one; for networks that were trained on whole steps (Frans et al., ICLR 2025)

Sources: Karras et al. 2022 (heun, sde); Song et al., ICLR 2021 (sde); Preechakul et al. 2022 (latents); Ho
and Salimans 2022 (guidance).
"""

import math

import torch
from tqdm.auto import tqdm

from nfhelpers.flow import check_field, draw
from nfhelpers.graphs import recorded_velocity
from nfhelpers.models.base import evaluation_mode


def over_times(step):
    """A sampler (velocity, x, times, *, callback=None, progress=False, ...) -> x at times[-1], from one step.

    It integrates dx/dt = velocity(x (B, ...), t scalar tensor) -> (B, ...) from x at times[0]; times (S + 1,)
    rise towards data or fall towards noise. callback(step, t, x) follows each step = 1 ... S.
    """

    def integrate(velocity, x, times, *, callback=None, progress=False, **options):
        if len(times) < 2:
            raise ValueError(f"times has {len(times)} entries; pass two or more, such as linspace(0, 1, 51)")
        for index in tqdm(range(1, len(times)), desc="steps", leave=None, disable=not progress):
            x = step(velocity, x, times[index - 1], times[index], **options)
            if callback is not None:
                callback(index, float(times[index]), x)
        return x

    integrate.__name__, integrate.__doc__, integrate.step = step.__name__, step.__doc__, step
    return integrate


@over_times
def euler(velocity, x, t, t_next):
    """Euler's method."""
    return x + (t_next - t) * velocity(x, t)


@over_times
def heun(velocity, x, t, t_next):
    """Heun's method; a step to t = 1 is Euler's, as x shows no noise there that a network could see."""
    slope = velocity(x, t)
    if t_next == 1:
        return x + (t_next - t) * slope
    slope_next = velocity(x + (t_next - t) * slope, t_next)
    return x + (t_next - t) * (slope + slope_next) / 2


@over_times
def midpoint(velocity, x, t, t_next):
    """The midpoint method, which never evaluates the velocity at times[-1]."""
    half = (t_next - t) / 2
    return x + (t_next - t) * velocity(x + half * velocity(x, t), t + half)


@over_times
def rk4(velocity, x, t, t_next):
    """Kutta's 3/8 rule, the more accurate of the two classical fourth-order rules."""
    h = t_next - t
    k1 = velocity(x, t)
    k2 = velocity(x + h * k1 / 3, t + h / 3)
    k3 = velocity(x + h * (k2 - k1 / 3), t + h * 2 / 3)
    k4 = velocity(x + h * (k1 - k2 + k3), t_next)
    return x + h * (k1 + 3 * (k2 + k3) + k4) / 8


@over_times
def sde(velocity, x, t, t_next, *, temperature=1.0, generator=None):
    """Go back by adding noise z, which is exact, then forward by Heun's method; times rise within [0, 1].

        t_back = max(0, t - temperature (t_next - t))      r = t_back / t
        x_back = r x + sqrt((1 - t_back)^2 - r^2 (1 - t)^2) z

    Any temperature draws from the same distribution; a higher one forgets earlier errors, but makes longer
    steps. For short ones: dx = [v + g^2 / 2 score] dt + g dW, g^2 = 2 temperature (1 - t) / t.
    """
    if not (0 <= t < t_next <= 1 and temperature >= 0):
        raise ValueError(f"pass times that rise within [0, 1], and a temperature >= 0, not {temperature}")
    # In a last step from far back, Euler's method would return the mean of the data, not a sample.
    back = t if t_next == 1 else (t - temperature * (t_next - t)).clamp_min(0)
    if back < t:  # not at t = 0, where all is noise, nor at temperature 0
        r = back / t
        z = draw(torch.randn, x.shape, x, generator)
        x = r * x + ((1 - back) ** 2 - (r * (1 - t)) ** 2).sqrt() * z
    return heun.step(velocity, x, back, t_next)


@over_times
def shortcut(velocity, x, t, t_next):
    """Euler's method, by the mean velocity(x, t, until=t_next) over the step: the network is told its end."""
    return x + (t_next - t) * velocity(x, t, until=t_next)


SAMPLERS = {x.__name__: x for x in (euler, heun, midpoint, rk4, sde, shortcut)}
EVALUATIONS = {"euler": 1, "heun": 2, "midpoint": 2, "rk4": 4, "sde": 2, "shortcut": 1}  # a step


def _sampler(method, legal=SAMPLERS):
    if method not in legal:
        raise ValueError(f"method={method!r} is unknown here; pass one of {sorted(legal)}")
    return SAMPLERS[method]


def _field_sampler(model, method, steps, footprint):
    """Name and steps of a sampler, if None the ones that the model is made for."""
    able = getattr(model, "shortcut", False)
    coarse = able and (footprint is None or footprint * model.config.nodes > 0.99)
    method = method or ("shortcut" if coarse else "heun")
    _sampler(method, SAMPLERS if able else SAMPLERS.keys() - {"shortcut"})
    return method, (4 if method == "shortcut" else 50) if steps is None else steps


def _times(steps, x):
    if steps < 1:
        raise ValueError(f"steps={steps}; pass 1 or more")
    return torch.linspace(0, 1, steps + 1, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)


def _as_parameters(model, *tensors):
    dtype = next((p.dtype for p in model.parameters()), tensors[0].dtype)
    return [x.to(dtype) for x in tensors]


def _parts(batch, max_batch):
    size = max_batch or batch
    return [slice(start, start + size) for start in range(0, batch, size)]


def _in_parts(evaluate, parts):
    """velocity(x, t, ...) of evaluate(part, x[part], t=(b,), ...) for each part of the batch in turn."""

    def velocity(x, t, **until):
        times = {"t": t, **until}
        made = [evaluate(p, x[p], **{k: v.expand(len(x[p])) for k, v in times.items()}) for p in parts]
        return torch.cat(made).to(x.dtype)

    return velocity


def _field_velocity(model, query_coords, input_coords, input_values, max_batch, evaluations, footprint):
    """The model as velocity(x, t, ...); if the batch is not split, prepared once, and maybe a CUDA graph."""
    parts, options = _parts(len(query_coords), max_batch), {}
    if footprint is not None:
        options["footprint"] = footprint
    if len(parts) == 1 and hasattr(model, "prepare"):
        options = {"conditions": model.prepare(query_coords, input_coords, input_values, **options)}

    def evaluate(p, x, t, **until):
        return model(x, query_coords[p], t, input_coords[p], input_values[p], **options, **until)

    velocity = _in_parts(evaluate, parts)
    return recorded_velocity(model, velocity, evaluations) if len(parts) == 1 else velocity


@torch.no_grad()
def sample(
    model, query_coords, input_coords, input_values,
    *, method=None, steps=None, generator=None, temperature=1.0, footprint=None, max_batch=None,
    callback=None, progress=False,
):  # fmt: skip
    """Draw one posterior sample of the field at the query points -> (B, Nq, 3) in [-1, 1].

    query_coords (B, Nq, 2) and input_coords (B, Ni, 2) are in [0, 1], input_values (B, Ni, 3) in [-1, 1].
    method: of SAMPLERS, in equal steps; None: "shortcut" in 4, where a model can and pixels are no finer than
    the observed ones, else "heun" in 50.
    generator: of all noise, on any device. temperature: of "sde", how much noise a step replaces; else a
    factor on the initial noise, 1 for a posterior sample. footprint: side of the queried pixels, as 1 / 96,
    for models of several sizes. max_batch: most samples in the model at once; the result is the same.
    """
    check_field(query_coords, input_coords, input_values)
    method, steps = _field_sampler(model, method, steps, footprint)
    integrate, options = SAMPLERS[method], dict(callback=callback, progress=progress)
    field = _as_parameters(model, query_coords, input_coords, input_values)
    x = draw(torch.randn, (*query_coords.shape[:2], input_values.shape[-1]), field[2], generator)
    if method == "sde":
        options |= dict(temperature=temperature, generator=generator)
    else:
        x = temperature * x
    with evaluation_mode(model):
        velocity = _field_velocity(model, *field, max_batch, steps * EVALUATIONS[method], footprint)
        times = model.shortcut_times(steps).to(x) if method == "shortcut" else _times(steps, x)
        return integrate(velocity, x, times, **options).clamp(-1, 1)


@torch.no_grad()
def posterior_mean(
    model, query_coords, input_coords, input_values,
    *, draws=1, steps=1, generator=None, footprint=None, max_batch=None, progress=False,
):  # fmt: skip
    """Mean and standard deviation over draws of the field at the query points -> two (B, Nq, 3).

    steps=1 is one evaluation at t = 0: the best velocity there is E[data | observed] - noise, so that noise
    plus velocity is the posterior mean; more draws remove noise that an imperfect model leaves. steps > 1
    averages samples by Heun, and std is the posterior's.
    """
    check_field(query_coords, input_coords, input_values)
    if draws < 1:
        raise ValueError(f"draws={draws}; pass 1 or more")
    field = _as_parameters(model, query_coords, input_coords, input_values)
    integrate, evaluations = (euler, draws) if steps == 1 else (heun, 2 * steps * draws)
    made = []
    with evaluation_mode(model):
        velocity = _field_velocity(model, *field, max_batch, evaluations, footprint)
        for _ in tqdm(range(draws), desc="draws", disable=not progress):
            x = draw(torch.randn, (*query_coords.shape[:2], input_values.shape[-1]), field[2], generator)
            made.append(integrate(velocity, x, _times(steps, x)).clamp(-1, 1))
    made = torch.stack(made)  # (draws, B, Nq, 3)
    return made.mean(0), made.std(0) if draws > 1 else torch.full_like(made[0], math.nan)


def encode_stochastic(model, query_coords, query_values, latent, **options):
    """The noise from which `decode_stochastic` arrives at these values: what the latent leaves open."""
    return decode_stochastic(model, query_coords, latent, query_values, backwards=True, **options)


@torch.no_grad()
def decode_stochastic(
    model, query_coords, latent, noise,
    *, method="heun", steps=50, footprint=None, max_batch=None, backwards=False, **options,
):  # fmt: skip
    """The field (B, Nq, 3), not clamped, of a latent (B, C) and a noise (B, Nq, 3).

    model: a `MambaDiffusionAutoencoder` of phase 2. method: not "sde" or "shortcut"; footprint, max_batch
    and options, callback and progress, as in `sample`. backwards: from a field to its noise.
    """
    integrate = _sampler(method, SAMPLERS.keys() - {"sde", "shortcut"})  # which draw noise, or go one way
    if model.config.phase != 2:
        raise ValueError("an autoencoder of phase 1 has no noise; pass models.second_phase(model), trained")
    query_coords, latent, x = _as_parameters(model, query_coords, latent, noise)
    times, parts = _times(steps, x), _parts(len(x), max_batch)

    def evaluate(p, x, t):
        return model.decode(query_coords[p], latent[p], t, x, footprint=footprint)

    with evaluation_mode(model):
        return integrate(_in_parts(evaluate, parts), x, times.flip(0) if backwards else times, **options)


@torch.no_grad()
def sample_latents(model, count, *, steps=50, generator=None):
    """Draw latents (count, C) from a `LatentVelocityNetwork`, z-normalised (`denormalise`), by Heun."""
    x = draw(torch.randn, (count, model.config.latent_dim), next(model.parameters()), generator)
    with evaluation_mode(model):
        return heun(lambda x, t: model(x, t.expand(len(x))), x, _times(steps, x))


def guided_velocity(model, labels=None, captions=None, guidance=1.0):
    """velocity(x, t) of a `LocalMamba2D`: v_uncond + guidance (v_cond - v_uncond), both as one batch.

    labels (B,), captions (B, E). guidance 1 and 0 take one evaluation.
    """

    def velocity(x, t):
        batch = len(x)
        times = t.to(x.device, x.dtype).expand(batch)
        if guidance in (0, 1):
            return model(x, times, labels, captions, torch.full((batch,), guidance == 0, device=x.device))
        doubled = [None if part is None else torch.cat([part, part]) for part in (labels, captions)]
        drop = torch.arange(2 * batch, device=x.device) >= batch  # (2B,)
        both = model(torch.cat([x, x]), torch.cat([times, times]), *doubled, drop)  # (2B, C, H, W)
        conditional, unconditional = both.chunk(2)
        return unconditional + guidance * (conditional - unconditional)

    return velocity


@torch.no_grad()
def sample_grids(
    model, count, height, width,
    *, labels=None, captions=None, guidance=1.0, method="heun", steps=25, generator=None,
):  # fmt: skip
    """Draw grids (count, C, height, width) in [-1, 1]; see `guided_velocity` and `sample` for the options."""
    integrate = _sampler(method)
    x = draw(torch.randn, (count, model.config.channels, height, width), next(model.parameters()), generator)
    labels, captions = (None if part is None else part.to(x.device) for part in (labels, captions))
    options = {"generator": generator} if method == "sde" else {}
    velocity = guided_velocity(model, labels, captions, guidance)
    velocity = recorded_velocity(model, velocity, steps * EVALUATIONS[method])
    with evaluation_mode(model):
        return integrate(velocity, x, _times(steps, x), **options).clamp(-1, 1)
