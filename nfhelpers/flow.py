"""Flow matching on the straight path from Gaussian noise (t = 0) to data (t = 1).

    x_t = (1 - t) noise + t data          velocity v = dx_t/dt = data - noise

A network trained by mean squared error on v predicts E[v | x_t]. noise, data, x_t, velocity: (B, ...); t: a
number, a scalar tensor or (B,). Sources: Lipman et al. 2023; Karras et al. 2022; Ho and Salimans 2022.
"""

import torch
from torch.nn.functional import mse_loss


def _column(t, x):
    return t.reshape(-1, *[1] * (x.ndim - 1)) if isinstance(t, torch.Tensor) and t.ndim else t


def interpolate(noise, data, t):
    return (1 - _column(t, data)) * noise + _column(t, data) * data


def target_velocity(noise, data):
    return data - noise


def path_variance(t, std):
    """Variance of x_t at time t, for zero-mean data of this std."""
    return (1 - t) ** 2 + (std * t) ** 2


def skip_weight(t, data_std=0.5):
    """Cov(v, x_t) / Var(x_t) of zero-mean data: v's best linear prediction is this times x_t. -1 at t = 0."""
    return (t * data_std**2 - (1 - t)) / path_variance(t, data_std)


def loss_weight(t, std):
    """1 / Var(v | x_t), for data of this std around its posterior mean: all times then count alike."""
    return path_variance(t, std) / std**2


def check_unit_range(name, x, what="values"):
    """Raise ValueError unless x is within [0, 1]; on the CPU alone, as reading a GPU's tensor stalls it."""
    if x.is_cpu and not torch.compiler.is_compiling() and not bool(((x >= 0) & (x <= 1)).all()):
        raise ValueError(f"{name} spans [{x.min():.4g}, {x.max():.4g}]; pass {what} in [0, 1]")


def check_field(query_coords, input_coords, input_values):
    """Raise ValueError unless coordinates (B, N, 2) are in [0, 1], values (B, N, 3) about in [-1, 1]."""
    check_unit_range("query_coords", query_coords, "pixel centres (x, y)")
    check_unit_range("input_coords", input_coords, "pixel centres (x, y)")
    if not bool((input_values.abs() <= 1.5).all()):  # NaN, or a range such as 0 to 255
        spanned = f"[{input_values.min():.4g}, {input_values.max():.4g}]"
        raise ValueError(f"input_values spans {spanned}; pass finite values in [-1, 1]")


def draw(kind, shape, like, generator=None):
    """torch.rand or torch.randn, drawn where the generator is: a CPU generator repeats on any device."""
    if not isinstance(generator, torch.Generator | None):
        raise ValueError(f"generator is a {type(generator).__name__}; pass one torch.Generator")
    device = like.device if generator is None else generator.device
    return kind(shape, generator=generator, device=device, dtype=like.dtype).to(like.device)


def flow_matching_loss(model, batch, *, t=None, noise=None, generator=None, weight=None):
    """Mean squared error of a field model's velocity, with each sample's weight(t (B,)) -> (B,), if given.

    batch: query_coords (B, Nq, 2), query_values (B, Nq, 3), input_coords (B, Ni, 2), input_values (B, Ni, 3).
    """
    data, query_coords, input_coords = (batch[k] for k in ("query_values", "query_coords", "input_coords"))
    check_unit_range("query_coords", query_coords, "pixel centres (x, y)")
    check_unit_range("input_coords", input_coords, "pixel centres (x, y)")
    t = draw(torch.rand, data.shape[:1], data, generator) if t is None else t
    noise = draw(torch.randn, data.shape, data, generator) if noise is None else noise
    velocity = model(interpolate(noise, data, t), query_coords, t, input_coords, batch["input_values"])
    error = mse_loss(velocity, target_velocity(noise, data), reduction="none")  # (B, Nq, 3)
    return error.mean() if weight is None else (_column(weight(t), error) * error).mean()


def grid_flow_loss(model, batch, *, t=None, noise=None, drop=None, generator=None):
    """The same of grids: spectrograms (B, C, H, W), labels (B,) or captions (B, E), drop (B,) bool."""
    data, config = batch["spectrograms"], model.config
    t = draw(torch.rand, data.shape[:1], data, generator) if t is None else t
    noise = draw(torch.randn, data.shape, data, generator) if noise is None else noise
    if drop is None and model.training:
        drop = draw(torch.rand, data.shape[:1], data, generator) < config.cfg_dropout
    labels = batch["labels"] if config.num_classes else None
    captions = batch["captions"] if config.caption_dim else None
    return mse_loss(model(interpolate(noise, data, t), t, labels, captions, drop), data - noise)
