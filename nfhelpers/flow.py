"""Flow matching on the straight path from Gaussian noise to data.

Glossary: b batch, q query points, c channels, t time. Time runs from t = 0 (noise) to t = 1 (data):

    x_t = (1 - t) * noise + t * data          velocity v = dx_t/dt = data - noise

A network that is trained by mean squared error on v predicts its conditional expectation
E[data - noise | x_t], and every conversion below is linear in v, so that each returns the matching
conditional expectation (of the data, of the noise, of the score).

Sources: Lipman et al., "Flow Matching for Generative Modeling", ICLR 2023; Liu et al., "Flow Straight and
Fast", ICLR 2023; seed 002.
"""

import torch


def _time_like(t, x):
    """Scalar or (B,) time, shaped to broadcast against x (B, ...)."""
    if not isinstance(t, torch.Tensor):
        t = torch.tensor(t, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    if t.ndim == 0:
        check_unit_range("t", t, "a time such as 0.5")
        return t
    if t.ndim != 1 or t.shape[0] != x.shape[0]:
        raise ValueError(
            f"t has shape {tuple(t.shape)} for a batch of {x.shape[0]}; pass a scalar or ({x.shape[0]},)"
        )
    check_unit_range("t", t, "times such as 0.5")
    return t.reshape(-1, *[1] * (x.ndim - 1))


def check_unit_range(name, tensor, legal):
    """Raise ValueError unless every entry of a tensor on the CPU is in [0, 1]; `legal` says what to pass.

    A tensor on another device passes unread: reading it back would stall the device on every call. So does a
    tensor that is being traced.
    """
    if tensor.device.type != "cpu" or torch.compiler.is_compiling():
        return
    # Written so that NaN, which compares false, is rejected too.
    if not bool(((tensor >= 0) & (tensor <= 1)).all()):
        raise ValueError(
            f"{name} spans [{tensor.min().item():.4g}, {tensor.max().item():.4g}]; pass {legal} in [0, 1]"
        )


def _check_pair(first_name, first, second_name, second):
    """Raise ValueError unless both are floating point tensors, not empty and of one shape."""
    for name, tensor in ((first_name, first), (second_name, second)):
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(
                f"{name} is a {type(tensor).__name__}; pass a torch tensor such as torch.rand(8, 204, 3)"
            )
        if not tensor.is_floating_point():
            raise ValueError(
                f"{name} has dtype {tensor.dtype}; pass a floating point dtype such as torch.float32"
            )
        if tensor.numel() == 0:
            raise ValueError(f"{name} of shape {tuple(tensor.shape)} is empty; pass at least one value")
    if first.shape != second.shape:
        raise ValueError(
            f"{first_name} {tuple(first.shape)} and {second_name} {tuple(second.shape)} differ in shape; "
            "pass two tensors of one shape, such as (8, 204, 3)"
        )


def interpolate(noise, data, t):
    """The state x_t = (1 - t) * noise + t * data of the straight path.

    noise, data: (B, ...) of one shape; t: scalar or (B,), in [0, 1]. Returns (B, ...).
    Raises ValueError on what is not a floating point
    tensor, is empty or differs in shape, and on a t on the CPU outside [0, 1].
    Source: Lipman et al. 2023, section 4.1 (sigma_min = 0).
    """
    _check_pair("noise", noise, "data", data)
    t = _time_like(t, data)
    return (1 - t) * noise + t * data


def target_velocity(noise, data):
    """The velocity data - noise of the straight path, constant in time.

    noise, data: (B, ...) of one shape. Returns (B, ...). Raises ValueError on what is not a floating point
    tensor, is empty or differs in shape.
    """
    _check_pair("noise", noise, "data", data)
    return data - noise


def velocity_to_data(velocity, x_t, t):
    """The data end of the path through x_t: x_t + (1 - t) * velocity.

    velocity, x_t: (B, ...) of one shape; t: scalar or (B,), in [0, 1]. Returns (B, ...).
    Raises ValueError as `interpolate` does.
    """
    _check_pair("velocity", velocity, "x_t", x_t)
    return x_t + (1 - _time_like(t, x_t)) * velocity


def velocity_to_noise(velocity, x_t, t):
    """The noise end of the path through x_t: x_t - t * velocity.

    velocity, x_t: (B, ...) of one shape; t: scalar or (B,), in [0, 1]. Returns (B, ...).
    Raises ValueError as `interpolate` does.
    """
    _check_pair("velocity", velocity, "x_t", x_t)
    return x_t - _time_like(t, x_t) * velocity


def velocity_to_score(velocity, x_t, t):
    """The score grad log p_t(x_t) = -E[noise | x_t] / (1 - t) of the Gaussian path.

    velocity, x_t: (B, ...) of one shape; t: scalar or (B,), in [0, 1). At t = 1 the path has no noise left
    and the score of a general data distribution does not exist. Raises ValueError as `interpolate` does and
    on t = 1. Source: Lipman et al. 2023, appendix.
    """
    noise = velocity_to_noise(velocity, x_t, t)
    t = _time_like(t, x_t)
    if bool((t >= 1).any()):
        raise ValueError("the score is undefined at t=1, where no noise is left; pass t < 1, such as 0.999")
    return -noise / (1 - t)


def skip_weight(t, data_std=0.5):
    """Coefficient of x_t in the best linear prediction of the velocity, for zero-mean data of this std.

    Cov(v, x_t) / Var(x_t) = (t s^2 - (1 - t)) / ((1 - t)^2 + t^2 s^2): -1 at t = 0, where it cancels the
    noise exactly in the one-step estimate x_0 + v, and +1 at t = 1. t: tensor in [0, 1], any
    shape; data_std: > 0. Returns a tensor shaped as t. Raises ValueError on data_std <= 0.
    """
    if not data_std > 0:
        raise ValueError(
            f"data_std={data_std} is not positive; pass the standard deviation of the data, such as 0.5"
        )
    variance = data_std**2
    return (t * variance - (1 - t)) / ((1 - t) ** 2 + t**2 * variance)


def loss_weight(t, std):
    """((1 - t)^2 + t^2 s^2) / s^2: what the squared error of a velocity counts for, by its time.

    s is the standard deviation of the data around their posterior mean. An error e of the velocity at time t
    is one of (1 - t) e in the data that it implies. So up to t = 1 / (1 + s), where s of noise is left in
    x_t, it is about the errors of the data that are weighed, in units of s^2, and beyond, those of the
    velocity. Weighed alike, times near 1 would be most of the loss: there most of the velocity is noise that
    x_t no longer shows. t: tensor in [0, 1], any shape; std: > 0. Returns a tensor shaped as t. Source: the
    weighting of Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", NeurIPS
    2022, for the spread of a posterior. Raises ValueError on std <= 0.
    """
    if not std > 0:
        raise ValueError(f"std={std} is not positive; pass the posterior's standard deviation, such as 0.15")
    return ((1 - t) ** 2 + (std * t) ** 2) / std**2


# Diffusers' flow-matching schedulers follow x = (1 - sigma) * data + sigma * noise and step with dx/dsigma:
# their clock runs backwards and their velocity has the other sign.


def to_diffusers_sigma(t):
    """Noise level sigma = 1 - t of diffusers' flow-matching schedulers (its own inverse). t in [0, 1]."""
    return 1 - t


def to_diffusers_velocity(velocity):
    """Our velocity data - noise as the model output noise - data that diffusers' schedulers step with."""
    return -velocity


def from_diffusers_velocity(model_output):
    """The output noise - data of a diffusers flow-matching model as our velocity data - noise."""
    return -model_output


def check_field(query_coords, input_coords, input_values):
    """Check a sparse field and its query points at a public boundary.

    query_coords (B, Nq, 2) and input_coords (B, Ni, 2): (x, y) in [0, 1]; input_values (B, Ni, 3): finite, in
    [-1, 1] by convention (not enforced: noise may have been added). All floating point, on one device.
    Raises ValueError on a wrong shape or dtype, an empty batch or point set, batches or devices that differ,
    coordinates outside [0, 1], and values that are not finite.
    """
    named = (
        ("query_coords", query_coords, "(B, Nq, 2)", 2),
        ("input_coords", input_coords, "(B, Ni, 2)", 2),
        ("input_values", input_values, "(B, Ni, 3)", 3),
    )
    for name, tensor, shape, channels in named:
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{name} is a {type(tensor).__name__}; pass a torch tensor of shape {shape}")
        if tensor.ndim != 3 or tensor.shape[-1] != channels:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; pass shape {shape}")
        if not tensor.is_floating_point():
            raise ValueError(
                f"{name} has dtype {tensor.dtype}; pass a floating point dtype such as torch.float32"
            )
        if tensor.numel() == 0:
            raise ValueError(
                f"{name} of shape {tuple(tensor.shape)} is empty; pass at least one sample and one point"
            )
        if tensor.device != query_coords.device:
            raise ValueError(
                f"{name} is on {tensor.device} and query_coords on {query_coords.device}; pass one device"
            )
        if tensor.shape[0] != query_coords.shape[0]:
            raise ValueError(
                f"{name} has a batch of {tensor.shape[0]} and query_coords of {query_coords.shape[0]}; "
                "pass one batch size"
            )
    if input_coords.shape[1] != input_values.shape[1]:
        raise ValueError(
            f"input_coords has {input_coords.shape[1]} points and input_values {input_values.shape[1]}; "
            "pass one value for each input point"
        )
    for name, coords in (("query_coords", query_coords), ("input_coords", input_coords)):
        # Written so that NaN, which compares false, is rejected too.
        if not bool(((coords >= 0) & (coords <= 1)).all()):
            raise ValueError(
                f"{name} spans [{coords.min().item():.4g}, {coords.max().item():.4g}]; "
                "pass pixel centres (x, y) in [0, 1], such as nfhelpers.images.grid_coords(32, 32)"
            )
    if not bool(torch.isfinite(input_values).all()):
        count = int((~torch.isfinite(input_values)).sum())
        raise ValueError(f"input_values holds {count} NaN or infinite values; pass finite values in [-1, 1]")


def flow_matching_loss(model, batch, *, t=None, noise=None, generator=None, weight=None):
    """Mean squared error between the predicted and the target velocity.

    model: a field model (see nfhelpers.models); batch: dict with input_coords (B, Ni, 2), input_values (B,
    Ni, 3), query_coords (B, Nq, 2) and query_values (B, Nq, 3) in [-1, 1]. t (B,) in [0, 1] is drawn
    uniformly, one value a sample, and noise (B, Nq, 3) from a standard normal, unless they are given; both
    draws use `generator` on its own device, or torch's default one. weight: function of t (B,) that weighs
    the samples, (B,); None: all alike. Returns a scalar. Raises ValueError on
    a missing key, on shapes that do not match, the model's output among them, and on coordinates or t
    outside [0, 1] where they are on the CPU. Source: Lipman et al. 2023, equation 23; seed 002.
    """
    missing = {"input_coords", "input_values", "query_coords", "query_values"} - set(batch)
    if missing:
        raise ValueError(
            f"the batch lacks {sorted(missing)}; pass a dict as nfhelpers.images.SparseFields gives"
        )
    for name in ("input_coords", "query_coords"):
        check_unit_range(name, batch[name], "pixel centres (x, y)")
    data = batch["query_values"]
    device = data.device if generator is None else generator.device
    if t is None:
        t = torch.rand(data.shape[0], generator=generator, device=device, dtype=data.dtype).to(data.device)
    if noise is None:
        noise = torch.randn(data.shape, generator=generator, device=device, dtype=data.dtype).to(data.device)
    x_t = interpolate(noise, data, t)  # (B, Nq, 3)
    velocity = model(
        x_t, batch["query_coords"], t, batch["input_coords"], batch["input_values"]
    )  # (B, Nq, 3)
    _check_pair("the model's velocity", velocity, "query_values", data)
    target = target_velocity(noise, data)  # (B, Nq, 3)
    if weight is None:
        return torch.nn.functional.mse_loss(velocity, target)
    return (weight(t)[:, None, None] * (velocity - target).square()).mean()
