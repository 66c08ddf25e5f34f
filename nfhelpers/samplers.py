"""Samplers: from noise (t = 0) to a field (t = 1) along the learned velocity, and the posterior mean.

A *sample* is one draw from the posterior of the field given the observed points; the *posterior mean* is the
average of all draws, which has half the squared error of a sample (about 3 dB more PSNR) and less texture.

Every sampler is a function (velocity, x, times, *, callback, progress) of a velocity field alone; `sample`
and `posterior_mean` put a model and its observed points behind one. SAMPLERS names them:

    name      order  evaluations a step
    euler     1      1
    ddim      1      1    Euler's method in the terms of data and noise; the same numbers
    heun      2      2    one in a step to t = 1
    midpoint  2      2
    sde       2      2    heun that replaces a part of the noise in each step but that one
    rk4       4      4

Of diffusion autoencoders: `encode_stochastic` runs the flow backwards, from a field to its noise,
`decode_stochastic` forwards again; `interpolate_latents` goes from one field to another.

Sources: seed 002 (Heun with 50 steps); seed 003 (SDE and DDIM sampling, temperature); Karras et al.,
"Elucidating the Design Space of Diffusion-Based Generative Models", NeurIPS 2022 (Heun against Euler); Lipman
et al. 2023; and the papers named below.
"""

import functools
import math
import threading
from contextlib import contextmanager

import torch
from tqdm.auto import tqdm

from nfhelpers.flow import check_field, velocity_to_data, velocity_to_noise


def _check_times(times):
    if not isinstance(times, torch.Tensor):
        raise ValueError(f"times is a {type(times).__name__}; pass a tensor such as torch.linspace(0, 1, 51)")
    if times.ndim != 1 or len(times) < 2:
        raise ValueError(
            f"times has shape {tuple(times.shape)}; pass at least two times, such as linspace(0, 1, 51)"
        )


def _integrate(advance, x, times, callback, progress):
    """The state at times[-1]: x = advance(x, t, t_next) for each pair of neighbouring times in turn."""
    _check_times(times)
    for step in tqdm(range(1, len(times)), desc="steps", disable=not progress):
        t, t_next = times[step - 1], times[step]
        x = advance(x, t, t_next)
        if callback is not None:
            callback(step, float(t_next), x)
    return x


def euler(velocity, x, times, *, callback=None, progress=False):
    """Integrate dx/dt = velocity(x, t) by Euler's method: first order, one evaluation a step.

    velocity: function of x (B, ...) and a scalar tensor t, returning (B, ...); x: the state at times[0];
    times: 1-D tensor, at least two entries, rising (towards data) or falling (towards noise).
    callback(step, t, x), if given, is called after each step, step = 1 ... len(times) - 1, with the time
    reached as a float; progress: show a bar. Returns the state at times[-1]. Raises ValueError on times that
    are not a tensor or of a wrong shape. Agrees with diffusers' FlowMatchEulerDiscreteScheduler and
    torchdiffeq's "euler".
    """

    def advance(x, t, t_next):
        return x + (t_next - t) * velocity(x, t)

    return _integrate(advance, x, times, callback, progress)


def heun(velocity, x, times, *, callback=None, progress=False):
    """Integrate dx/dt = velocity(x, t) by Heun's method: second order, two evaluations a step.

    Arguments, callback, result and errors are those of `euler`. A step that ends in data, at t = 1, is one of
    Euler's method, with one evaluation: no noise is to be seen there, so the velocity data - noise of a
    network is mostly a guess. Agrees with diffusers' FlowMatchHeunDiscreteScheduler, and up to that step with
    torchdiffeq's "heun2". Source: Karras et al. 2022, algorithm 1.
    """

    def advance(x, t, t_next):
        return _heun_step(velocity, x, t, t_next)

    return _integrate(advance, x, times, callback, progress)


def _heun_step(velocity, x, t, t_next):
    slope = velocity(x, t)
    if t_next == 1:
        return x + (t_next - t) * slope
    slope_next = velocity(x + (t_next - t) * slope, t_next)
    return x + (t_next - t) * (slope + slope_next) / 2


def midpoint(velocity, x, times, *, callback=None, progress=False):
    """Integrate dx/dt = velocity(x, t) by the midpoint method: second order, two evaluations a step.

    Arguments, callback, result and errors are those of `euler`. The velocity is never evaluated at
    times[-1]. Agrees with torchdiffeq's "midpoint".
    """

    def advance(x, t, t_next):
        half = (t_next - t) / 2
        return x + (t_next - t) * velocity(x + half * velocity(x, t), t + half)

    return _integrate(advance, x, times, callback, progress)


def rk4(velocity, x, times, *, callback=None, progress=False):
    """Integrate dx/dt = velocity(x, t) by Kutta's 3/8 rule: fourth order, four evaluations a step.

    Arguments, callback, result and errors are those of `euler`. Of the two classical fourth-order rules this
    is the one with the smaller error constants, and torchdiffeq's "rk4". Source: Kutta, "Beitrag zur
    naeherungsweisen Integration totaler Differentialgleichungen", 1901.
    """

    def advance(x, t, t_next):
        h = t_next - t
        k1 = velocity(x, t)
        k2 = velocity(x + h * k1 / 3, t + h / 3)
        k3 = velocity(x + h * (k2 - k1 / 3), t + h * 2 / 3)
        k4 = velocity(x + h * (k1 - k2 + k3), t_next)
        return x + h * (k1 + 3 * (k2 + k3) + k4) / 8

    return _integrate(advance, x, times, callback, progress)


def ddim(velocity, x, times, *, callback=None, progress=False):
    """Integrate by DDIM: estimate data and noise from the velocity, mix them anew at the next time.

    On the straight path, x_t = (1 - t) noise + t data, this is Euler's method: with data = x + (1 - t) v and
    noise = x - t v, the next state (1 - t') noise + t' data is x + (t' - t) v. The two differ by rounding
    only. On other paths, such as the variance-preserving one of the paper, they are different methods.

    Arguments, callback, result and errors are those of `euler`; times in [0, 1]. Source: Song et al.,
    "Denoising Diffusion Implicit Models", ICLR 2021, equation 12 with sigma = 0.
    """

    def advance(x, t, t_next):
        v = velocity(x, t)
        return (1 - t_next) * velocity_to_noise(v, x, t) + t_next * velocity_to_data(v, x, t)

    return _integrate(advance, x, times, callback, progress)


def sde(velocity, x, times, *, temperature=1.0, generator=None, callback=None, progress=False):
    """Sample by the stochastic differential equation of the path: second order, two evaluations a step.

    Each step goes back before it goes forward: from t to t_back = max(0, t - temperature (t' - t)) by adding
    noise, which is exact, and from there to t' by a step of Heun's method. With r = t_back / t,

        x_back = r x + sqrt((1 - t_back)^2 - r^2 (1 - t)^2) z

    For short steps this is dx = [v + g^2 / 2 score] dt + g dW with g^2 = 2 temperature (1 - t) / t, which has
    at every t the distribution of the ODE dx/dt = v; at temperature 1 it is the reverse-time equation of the
    diffusion along the path. The temperature therefore says how much noise is replaced on the way, which
    forgets the errors of earlier steps but makes every step longer; it does not sharpen or flatten the
    distribution that is drawn from. Temperature 0 is `heun`. A step that ends in data, at t = 1, replaces no
    noise and is one of Euler's method, as in `heun`.

    velocity, x, times, callback, progress and result: as in `euler`; times rise within [0, 1]. temperature:
    in [0, inf); generator: source of z, on any device. Raises ValueError as `euler`, on times that do not
    rise within [0, 1] and on an illegal temperature. Sources: Karras et al. 2022, algorithm 2, for the
    straight path; Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations",
    ICLR 2021; seed 003.
    """
    _check_times(times)
    check_temperature(temperature)
    if not bool((times.diff() > 0).all() and times[0] >= 0 and times[-1] <= 1):
        raise ValueError(
            f"times run from {times[0].item():.4g} to {times[-1].item():.4g}; pass times that rise within "
            "[0, 1], such as linspace(0, 1, 51)"
        )

    def advance(x, t, t_next):
        # In a last step from far back, Euler's method would return the mean of the data, not a sample.
        back = t if t_next == 1 else (t - temperature * (t_next - t)).clamp_min(0)
        if back < t:  # not at t = 0, where all is noise, nor at temperature 0
            ratio = back / t
            noise = _standard_normal(x.shape, x, generator)
            x = ratio * x + ((1 - back) ** 2 - (ratio * (1 - t)) ** 2).sqrt() * noise
        return _heun_step(velocity, x, back, t_next)

    return _integrate(advance, x, times, callback, progress)


EVALUATIONS = {"euler": 1, "heun": 2, "midpoint": 2, "rk4": 4, "ddim": 1, "sde": 2}
"""Evaluations of the network that a step of each sampler takes; "heun" and "sde" save one in the last."""

SAMPLERS = {"euler": euler, "heun": heun, "midpoint": midpoint, "rk4": rk4, "ddim": ddim, "sde": sde}


@contextmanager
def evaluation_mode(model):
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


def check_temperature(value):
    """Raise ValueError unless `value` is a number in [0, inf)."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value < math.inf:
        raise ValueError(f"temperature={value!r} is not in [0, inf); pass 1.0 for a posterior sample")


def check_method(method):
    """Raise ValueError unless `method` is a key of SAMPLERS."""
    if method not in SAMPLERS:
        raise ValueError(f"method={method!r} is unknown; pass one of {sorted(SAMPLERS)}")


def _as_parameters(model, *tensors):
    """The tensors in the dtype of the model's parameters; as they are for a model that has none."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    return tensors if dtype is None else tuple(tensor.to(dtype) for tensor in tensors)


def _standard_normal(shape, like, generator):
    """Noise of the dtype and device of `like`, drawn on the generator's: a CPU generator repeats anywhere."""
    device = like.device if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=device, dtype=like.dtype).to(like.device)


def _initial_noise(query_coords, input_values, generator):
    """Standard normal (B, Nq, 3), for the whole batch at once: splitting it later changes nothing."""
    return _standard_normal((*query_coords.shape[:2], input_values.shape[-1]), input_values, generator)


RECORD_FROM = 10  # evaluations of a run: to record one takes as long as four or five replays save
EAGER_CALLS = 3  # evaluations before the one that is recorded, in which kernels are compiled and chosen

_one_recording = threading.Lock()


@functools.cache
def _recording_stream(device):
    return torch.cuda.Stream(device)  # torch's own is of the device that recorded first


@contextmanager
def recording(graph, model, device, remedy, pool=None):
    """What this thread launches on `device` inside is recorded in the CUDA graph and not run.

    Other threads may launch and allocate meanwhile. To begin with it waits for the device and hands unused
    memory back; one recording goes on at a time. pool: memory shared with other graphs. Raises RuntimeError
    with the `remedy` where the model does what cannot be recorded.
    """
    stream, mode = _recording_stream(device), "thread_local"
    try:
        with _one_recording, torch.cuda.graph(graph, pool, stream, capture_error_mode=mode):
            yield
    except RuntimeError as error:
        if any(isinstance(one, torch.OutOfMemoryError) for one in (error, error.__context__)):
            raise
        raise RuntimeError(
            f"{type(model).__name__} does something that a CUDA graph cannot hold, such as reading a tensor "
            f"back or solving a linear system; {remedy}, in a new process ({error.__context__ or error})"
        ) from error


def _record(model, velocity, x, t):
    """(graph, x, t, velocity): a CUDA graph of one evaluation, and the tensors that it reads and writes."""
    graph, own_x, own_t = torch.cuda.CUDAGraph(), x.clone(), t.clone()
    with recording(graph, model, x.device, "set launch_bound = False in its class"):
        own_velocity = velocity(own_x, own_t)
    return graph, own_x, own_t, own_velocity


def _is_recordable(model):
    """Whether a graph does all that a call of the model does: it runs none of its Python again."""
    modules, tensors = list(model.modules()), [*model.parameters(), *model.buffers()]
    hooked = torch.nn.modules.module._has_any_global_hook() or any(
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) for module in modules
    )
    own_class = vars(type(model)).get("launch_bound", False)  # a subclass may do what cannot be recorded
    compiled = any(module._compiled_call_impl is not None for module in modules)
    return own_class and not hooked and not compiled and len({tensor.device for tensor in tensors}) == 1


def _can_record(x):
    modes = torch.utils._python_dispatch._get_current_dispatch_mode()
    return x.is_cuda and not (torch.is_grad_enabled() or modes or torch.cuda.is_current_stream_capturing())


def launched_at_once(model, velocity, evaluations):
    """`velocity`, a function of (x, t) that evaluates the model, for one run of so many evaluations.

    On a GPU, for a model that is `launch_bound`, the kernels of an evaluation are recorded as a CUDA graph
    after `EAGER_CALLS` of them; further calls with tensors of the same kind launch that, with the same
    result. It keeps the memory of an evaluation until it is dropped. It is `velocity` as it is elsewhere, in
    short runs, where gradients are recorded, and where a graph would leave something out: for a model with
    forward hooks, of a subclass that does not say `launch_bound = True` itself, or on several devices.
    Raises RuntimeError where an evaluation cannot be recorded.
    """
    if evaluations < RECORD_FROM or not _is_recordable(model):
        return velocity
    calls, recorded = 0, None

    def launched(x, t):
        nonlocal calls, recorded
        calls += 1
        if calls <= EAGER_CALLS or not _can_record(x):
            return velocity(x, t)
        if recorded is None:
            recorded = _record(model, velocity, x, t)
        graph, own_x, own_t, own_velocity = recorded
        for own, given in ((own_x, x), (own_t, t)):
            if (own.shape, own.dtype, own.device) != (given.shape, given.dtype, given.device):
                return velocity(x, t)
        own_x.copy_(x)
        own_t.copy_(t)
        graph.replay()
        return own_velocity.clone()

    return launched


def _conditional_velocity(model, query_coords, input_coords, input_values, max_batch, evaluations):
    """The model as a function of (x, t), evaluated on at most max_batch samples at a time.

    What a model can `prepare` of the points is computed once for all evaluations, and their kernels may be
    `launched_at_once`. Not where the batch is split: the memory, a few MB a sample, would grow with the whole
    batch.
    """
    batch = len(query_coords)
    size = batch if max_batch is None else max_batch
    prepared = {}
    if size >= batch and hasattr(model, "prepare"):
        prepared["conditions"] = model.prepare(query_coords, input_coords, input_values)

    def velocity(x, t):
        parts = []
        for start in range(0, batch, size):
            part = slice(start, start + size)
            time = t.expand(len(x[part]))  # (b,)
            points = query_coords[part], time, input_coords[part], input_values[part]
            parts.append(model(x[part], *points, **prepared))
            if parts[-1].shape != x[part].shape:
                raise ValueError(
                    f"the model's velocity has shape {tuple(parts[-1].shape)}; "
                    f"wanted {tuple(x[part].shape)}, that of noisy_values"
                )
        return torch.cat(parts).to(x.dtype)

    return launched_at_once(model, velocity, evaluations) if size >= batch else velocity


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
    progress=False,
):
    """Draw one posterior sample of the field at the query points.

    model: a field model (nn.Module); query_coords (B, Nq, 2) and input_coords (B, Ni, 2) in [0, 1];
    input_values (B, Ni, 3) in [-1, 1]. method: a key of SAMPLERS; steps: number of equal steps ("euler" and
    "ddim" evaluate the model once a step, "rk4" four times, the others twice, see `EVALUATIONS`); generator:
    source of all noise, on any device; temperature: of "sde", how much noise each step replaces, in [0, inf)
    (see `sde`; its initial noise is not scaled); of the other methods, a factor on the initial noise, 0 for
    none, 1 for a posterior sample; callback(step, t, x): called after each step with step = 1 ... steps, the
    time reached and the state of the whole batch, not clamped; max_batch: most samples that pass through the
    model at once (query points are never split: they share one sequence), the result does not depend on it
    beyond float error, as all noise is drawn for the whole batch; progress: show a bar. Returns (B, Nq, 3),
    clamped to [-1, 1]. The field may be of any floating dtype, such as NumPy's float64: it is cast to the
    dtype of the model's parameters, which is also that of the result. The model's training mode is restored,
    gradients are not recorded. Raises ValueError on an illegal field (see flow.check_field), method, steps,
    temperature or max_batch.
    """
    check_field(query_coords, input_coords, input_values)
    check_method(method)
    _check_count("steps", steps)
    if max_batch is not None:
        _check_count("max_batch", max_batch)
    check_temperature(temperature)
    query_coords, input_coords, input_values = _as_parameters(model, query_coords, input_coords, input_values)
    x = _initial_noise(query_coords, input_values, generator)
    options = {"callback": callback, "progress": progress}
    if method == "sde":
        options |= {"temperature": temperature, "generator": generator}
    else:
        x = temperature * x
    with evaluation_mode(model):
        evaluations = steps * EVALUATIONS[method]
        velocity = _conditional_velocity(
            model, query_coords, input_coords, input_values, max_batch, evaluations
        )
        x = SAMPLERS[method](velocity, x, _times(steps, x), **options)
    return x.clamp(-1, 1)


@torch.no_grad()
def posterior_mean(
    model,
    query_coords,
    input_coords,
    input_values,
    *,
    draws=1,
    steps=1,
    generator=None,
    callback=None,
    max_batch=None,
    progress=False,
):
    """Mean and per-point standard deviation of the field at the query points, given the observed points.

    steps=1 is one evaluation at t = 0: the optimal velocity there is E[data | observed] - noise, so that
    noise plus velocity is the posterior mean itself, whatever the noise. Averaging more draws then only
    removes what noise an imperfect model leaves, and std measures that remainder, not the posterior. steps
    > 1 averages `draws` posterior samples (Heun, see `sample`); their std estimates the posterior's
    standard deviation.

    model and the field: as in `sample`; draws: number of noise draws, one after the other, so that memory
    does not grow with it; generator, max_batch: as in `sample`; callback(draw, mean, std): called after each
    draw = 1 ... draws with the mean and std so far; progress: show a bar of the draws. Returns mean, std,
    each (B, Nq, 3) in the dtype of the model's parameters; mean in [-1, 1] (each draw is clamped), std
    unbiased over draws and NaN for draws=1, where it is undefined. Raises ValueError as `sample` does and on
    draws that is not a positive integer.
    """
    check_field(query_coords, input_coords, input_values)
    _check_count("draws", draws)
    _check_count("steps", steps)
    if max_batch is not None:
        _check_count("max_batch", max_batch)
    query_coords, input_coords, input_values = _as_parameters(model, query_coords, input_coords, input_values)
    integrate = euler if steps == 1 else heun
    mean = squares = torch.zeros((), dtype=input_values.dtype, device=input_values.device)
    with evaluation_mode(model):
        evaluations = draws * (1 if steps == 1 else 2 * steps)
        velocity = _conditional_velocity(
            model, query_coords, input_coords, input_values, max_batch, evaluations
        )
        for count in tqdm(range(1, draws + 1), desc="draws", disable=not progress):
            x = _initial_noise(query_coords, input_values, generator)
            x = integrate(velocity, x, _times(steps, x)).clamp(-1, 1)
            # Welford's update: one pass, and no loss of precision when the spread is small.
            difference = x - mean
            mean = mean + difference / count
            squares = squares + difference * (x - mean)
            std = (squares / (count - 1)).sqrt() if count > 1 else torch.full_like(mean, math.nan)
            if callback is not None:
                callback(count, mean, std)
    return mean, std


# ------------------------------------------------------------------ latents: inversion and interpolation


def _latent_velocity(model, query_coords, latent, max_batch):
    """The decoder of an autoencoder as a function of (x, t), on at most max_batch samples at a time."""
    batch = len(query_coords)
    size = batch if max_batch is None else max_batch
    parts = [slice(start, start + size) for start in range(0, batch, size)]
    starts = [model.decode(query_coords[p], latent[p]) for p in parts]  # the same at all times

    def velocity(x, t):
        return torch.cat(
            [
                model.decode(query_coords[p], latent[p], t.expand(len(x[p])), x[p], start)
                for p, start in zip(parts, starts, strict=True)
            ]
        ).to(x.dtype)

    return velocity


def _check_second_phase(model):
    if getattr(model.config, "phase", None) != 2:
        raise ValueError(
            f"this {type(model).__name__} has no noise to speak of: only an autoencoder of phase 2 has; pass "
            "one, such as models.second_phase(model) trained further"
        )


@torch.no_grad()
def decode_stochastic(
    model,
    query_coords,
    latent,
    noise,
    *,
    method="heun",
    steps=50,
    callback=None,
    max_batch=None,
    progress=False,
):
    """The field of a latent and a noise: the ODE of a diffusion autoencoder from t = 0 to 1.

    model: a `MambaDiffusionAutoencoder` of phase 2; query_coords (B, Nq, 2) in [0, 1]; latent (B, C) as
    `encode` returns it; noise (B, Nq, 3), standard normal or of `encode_stochastic`. method: a key of
    SAMPLERS but "sde", which draws noise of its own; steps, callback, max_batch, progress: as in `sample`.
    Returns (B, Nq, 3) in about [-1, 1], not clamped. Raises ValueError on a model of phase 1, an illegal
    method, steps or max_batch, and on shapes that do not fit.
    """
    return _integrate_latent(
        model, query_coords, latent, noise, method, steps, callback, max_batch, progress, forwards=True
    )


@torch.no_grad()
def encode_stochastic(
    model,
    query_coords,
    query_values,
    latent,
    *,
    method="heun",
    steps=50,
    callback=None,
    max_batch=None,
    progress=False,
):
    """The noise from which the flow given the latent arrives at these values: the ODE from t = 1 to 0.

    What the latent does not say of a field is in this noise: `decode_stochastic` of both, with the same steps
    or more, returns the field up to the error of the solver. query_values (B, Nq, 3) in [-1, 1]; the other
    arguments and errors are those of `decode_stochastic`. callback(step, t, x) sees falling times. Returns
    (B, Nq, 3). Source: Preechakul et al., "Diffusion Autoencoders", CVPR 2022, equation 8; seed 004.
    """
    return _integrate_latent(
        model,
        query_coords,
        latent,
        query_values,
        method,
        steps,
        callback,
        max_batch,
        progress,
        forwards=False,
    )


def _integrate_latent(
    model, query_coords, latent, x, method, steps, callback, max_batch, progress, *, forwards
):
    _check_second_phase(model)
    check_method(method)
    if method == "sde":
        raise ValueError("method='sde' draws noise of its own; pass 'heun'")
    _check_count("steps", steps)
    if max_batch is not None:
        _check_count("max_batch", max_batch)
    query_coords, latent, x = _as_parameters(model, query_coords, latent, x)
    times = _times(steps, x) if forwards else _times(steps, x).flip(0)
    with evaluation_mode(model):
        velocity = _latent_velocity(model, query_coords, latent, max_batch)
        return SAMPLERS[method](velocity, x, times, callback=callback, progress=progress)


@torch.no_grad()
def sample_latents(model, count, *, steps=50, generator=None, callback=None, progress=False):
    """Draw latents unconditionally with a trained `LatentVelocityNetwork`, by Heun's method.

    count: how many; the other arguments are as in `sample`. Returns (count, C), z-normalised: the
    autoencoder's `denormalise` makes of them what its `decode` takes. Raises ValueError on a count or steps
    that is not a positive integer.
    """
    _check_count("count", count)
    _check_count("steps", steps)
    like = next(model.parameters())
    x = _standard_normal((count, model.config.latent_dim), like, generator)

    def velocity(x, t):
        return model(x, t.expand(len(x)))

    with evaluation_mode(model):
        return heun(velocity, x, _times(steps, x), callback=callback, progress=progress)


def _as_weight(alpha, x):
    """A number or (B,) tensor, shaped to broadcast against x (B, ...)."""
    alpha = torch.as_tensor(alpha, dtype=x.dtype, device=x.device)
    if alpha.ndim and alpha.shape != x.shape[:1]:
        raise ValueError(
            f"alpha has shape {tuple(alpha.shape)} for a batch of {len(x)}; pass a number, such as 0.5, or "
            "one a sample"
        )
    return alpha.reshape(-1, *[1] * (x.ndim - 1))


def _check_ends(a, b):
    if a.shape != b.shape or a.ndim < 2:
        raise ValueError(
            f"the ends have shapes {tuple(a.shape)} and {tuple(b.shape)}; pass two of one shape (B, ...)"
        )


def lerp(a, b, alpha):
    """(1 - alpha) a + alpha b, along the straight line: of latents, or of pixels (RGB blending).

    a, b: (B, ...) of one shape; alpha: a number or (B,). Returns (B, ...). Raises ValueError on other shapes.
    """
    _check_ends(a, b)
    alpha = _as_weight(alpha, a)
    return (1 - alpha) * a + alpha * b


def slerp(a, b, alpha):
    """Along the great circle through each pair of samples: norms go evenly from one to the other's.

    A straight line between two independent noises passes through points of norm sqrt(1/2) of theirs, which a
    flow has never seen; this one does not. With w the angle between the samples of all their entries,

        slerp = (sin((1 - alpha) w) a/|a| + sin(alpha w) b/|b|) / sin(w) * ((1 - alpha) |a| + alpha |b|)

    a, b: (B, ...) of one shape, not zero; alpha: a number or (B,). Where the samples are parallel it is
    `lerp`; opposite ones have no unique great circle. Returns (B, ...). Raises ValueError on other shapes.
    Source: Shoemake, "Animating Rotation with Quaternion Curves", 1985.
    """
    _check_ends(a, b)
    alpha = _as_weight(alpha, a)
    norm_a, norm_b = (
        x.flatten(1).norm(dim=1).clamp_min(torch.finfo(x.dtype).tiny).reshape(-1, *[1] * (x.ndim - 1))
        for x in (a, b)
    )
    unit_a, unit_b = a / norm_a, b / norm_b
    # Half-angle form: as exact for small angles as for large ones, where acos of the product is not.
    chord, sum_ = ((unit_b + sign * unit_a).flatten(1).norm(dim=1) for sign in (-1, 1))
    angle = (2 * torch.atan2(chord, sum_)).reshape(-1, *[1] * (a.ndim - 1))
    straight = angle.sin() < 1e-6
    sine = torch.where(straight, 1, angle.sin())
    weight_a = torch.where(straight, 1 - alpha, ((1 - alpha) * angle).sin() / sine)
    weight_b = torch.where(straight, alpha, (alpha * angle).sin() / sine)
    return (weight_a * unit_a + weight_b * unit_b) * ((1 - alpha) * norm_a + alpha * norm_b)


@torch.no_grad()
def interpolate_latents(
    model,
    query_coords,
    latents,
    noises=None,
    *,
    alphas=(0.0, 0.2, 0.4, 0.6, 0.8, 1.0),
    method="heun",
    steps=50,
    callback=None,
    max_batch=None,
    progress=False,
):
    """Fields on the way from one latent to another.

    model: a `MambaDiffusionAutoencoder`; query_coords (B, Nq, 2) in [0, 1]; latents: two (B, C), as `encode`
    returns them, between which it goes straight (`lerp`). noises: None for the deterministic decoding, or two
    (B, Nq, 3), such as those of `encode_stochastic`, between which it goes along a great circle (`slerp`);
    then the model is of phase 2. alphas: numbers, 0 the first and 1 the second. method, steps, max_batch: of
    `decode_stochastic`; callback(index, alpha, fields): called after each, index 0 is the first; progress:
    show a bar. Returns (A, B, Nq, 3) in about [-1, 1]. Raises ValueError on shapes that do not fit, and as
    `decode_stochastic`. Source: seed 004, experiment 3; Preechakul et al. 2022, section 5.2.
    """
    if len(latents) != 2 or (noises is not None and len(noises) != 2):
        raise ValueError("pass two latents, and two noises or None: the ends of the way")
    if len(alphas) == 0:
        raise ValueError("alphas is empty; pass numbers such as (0.0, 0.5, 1.0)")
    fields = []
    with evaluation_mode(model):
        for index, alpha in enumerate(tqdm(alphas, desc="interpolate", disable=not progress)):
            latent = lerp(*latents, alpha)
            if noises is None:
                fields.append(model.decode(query_coords, latent))
            else:
                fields.append(
                    decode_stochastic(
                        model,
                        query_coords,
                        latent,
                        slerp(*noises, alpha),
                        method=method,
                        steps=steps,
                        max_batch=max_batch,
                    )
                )
            if callback is not None:
                callback(index, float(alpha), fields[-1])
    return torch.stack(fields)
