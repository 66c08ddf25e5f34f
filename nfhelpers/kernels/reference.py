"""The scans as they are written: one step after another, in any floating dtype. The truth of the tests.

    h_l = exp(delta_l A) h_{l-1} + Bbar_l u_l          h: (B, D, N), h_{-1} = 0 or given
    y_l = sum_n C_l h_l + D u_l,  then  y_l * silu(z_l) if z is given

`discretization="mamba"` takes Bbar = delta B (Gu and Dao, "Mamba", 2023, and the kernel they released);
`"zoh"` is the zero-order hold Bbar = (exp(delta A) - 1) / A * B, the exact solution for a constant input.

The backends implement the operation behind both public scans, which `as_groups` states by such a scan:

    forward(u, delta, A, B, C, D, z, bias, initial, order, carried, reverse, softplus, tied, keep_states)
        -> y, last, states
    backward(grad_y, grad_last, states, u, ..., tied)
        -> the gradients of u, delta, A, B, C, D, z, bias, initial, None for None

b batch, k direction, l token (row), d channel, n state, g group of channels that share B and C
    u           (b, K, l, d), or (b, 1, l, d) when the directions share one input
    delta, z    (b, K, l, d)
    A           (K, d, N); tied (K, d), where state n decays at the rate (n + 1) A
    B, C        (b, K, G, l, N)
    D, bias     (K, d)
    initial     (b, K, d, N), state before the first step
                These and A come contiguous in the state's dtype, the rest in any dtype and strides.
    order       None, or (1 or b, K, l): row visited at step t
    carried     None, or, where there is no order and nothing is reversed, (b, l): factor of the decays
    reverse     bit k set: direction k walks its order from the last step to the first
    y, last     (b, K, l, d) in the order of the rows, (b, K, d, N) state after the last step
    states      what the backend keeps for its backward pass; (0,) when keep_states is False
"""

import math

import torch
import torch.nn.functional as F

from .orders import check_permutation

SERIES_BELOW = {torch.float32: 0.1, torch.float64: 0.01}  # |delta A| that a series takes: digits cancel


def relative_error(found, wanted):
    """Largest absolute difference over the largest magnitude in `wanted`; infinite if anything is NaN."""
    found, wanted = found.detach().double().cpu(), wanted.detach().double().cpu()
    error = (found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-300)
    return float("inf") if not torch.isfinite(error) else error.item()


def compute_dtype(*tensors):
    """float64 when any tensor is float64, float32 otherwise: half precision is never the state's dtype."""
    doubles = any(x is not None and x.dtype == torch.float64 for x in tensors)
    return torch.float64 if doubles else torch.float32


def state_rates(A, states):
    """The rates (..., D, N) of tied decays A (..., D): state n decays at (n + 1) A."""
    return A.unsqueeze(-1) * torch.arange(1, states + 1, dtype=A.dtype, device=A.device)


def hold(delta, A):
    """Zero-order hold (exp(q) - 1) / A = delta (1 + q/2 + q²/6 + ...), q = delta A; smooth at A = 0."""
    q = delta * A
    near_zero = q.abs() < SERIES_BELOW[q.dtype]
    # Both branches of torch.where are differentiated, so the unused one must stay finite.
    away, near = torch.where(near_zero, 1, q), torch.where(near_zero, q, 0)
    series = 0
    for power in reversed(range(7)):
        series = series * near + 1 / math.factorial(power + 1)
    return delta * torch.where(near_zero, series, torch.expm1(away) / away)


def _step_by_step(weight, channels):
    """B or C as (L, B, D, N), or what broadcasts to it."""
    if weight.dim() == 2:
        return weight  # (D, N)
    weight = (weight.unsqueeze(1) if weight.dim() == 3 else weight).permute(3, 0, 1, 2)  # (L, B, G, N)
    return weight if weight.shape[2] == 1 else weight.repeat_interleave(channels // weight.shape[2], dim=2)


def selective_scan_reference(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False,
    *, initial_state=None, carried=None, discretization="mamba", tied_decay=False,
):  # fmt: skip
    """`kernels.selective_scan` step by step, decays times carried (B, L); autograd keeps O(B D L N)."""
    dtype = compute_dtype(u, delta, A, B, C, D, z, delta_bias)
    with torch.autocast(u.device.type, enabled=False):
        x, step = (rows.to(dtype).permute(2, 0, 1) for rows in (u, delta))  # (L, B, D)
        step = step if delta_bias is None else step + delta_bias.to(dtype)
        step = (F.softplus(step) if delta_softplus else step).unsqueeze(-1)  # (L, B, D, 1)
        B, C = (_step_by_step(weight.to(dtype), x.shape[2]) for weight in (B, C))
        A = state_rates(A.to(dtype), B.shape[-1]) if tied_decay else A.to(dtype)  # (D, N)
        weight = hold(step, A) if discretization == "zoh" else step
        state = x.new_zeros(*x.shape[1:], A.shape[1]) if initial_state is None else initial_state.to(dtype)
        decays = torch.exp(step * A)  # (L, B, D, N)
        decays = decays if carried is None else decays * carried.T[..., None, None]
        states = []
        # unbind and stack, never h[l]: the backward of a slice fills a tensor of the size of the whole.
        steps = zip(decays.unbind(), (weight * B * x.unsqueeze(-1)).unbind(), strict=True)
        for decay, added in steps:
            state = decay * state + added  # (B, D, N)
            states.append(state)
        y = (torch.stack(states) * C).sum(-1)  # (L, B, D)
        y = (y if D is None else y + D.to(dtype) * x).permute(1, 2, 0)
        y = (y if z is None else y * F.silu(z.to(dtype))).to(u.dtype)
    return (y, state) if return_last_state else y


def as_groups(scan, u, delta, A, B, C, D, z, bias, order, reverse, softplus):
    """(y, last) by one `scan` of permuted copies, directions as groups of channels. reverse: K bools."""
    batch, directions, length, channels = delta.shape
    check_permutation(order)
    if order is not None:
        walks = [walk.flip(-1) if back else walk for walk, back in zip(order.unbind(1), reverse, strict=True)]
        walks = torch.stack(walks, 1).long().expand(batch, -1, -1)  # (b, K, l): row visited at each step

    def visit(rows):  # (b, K, G, l, F) -> (b, K G, F, l), step by step
        rows = rows.expand(-1, directions, -1, -1, -1)
        rows = rows if order is None else rows.gather(3, walks[:, :, None, :, None].expand(rows.shape))
        return rows.transpose(3, 4).flatten(1, 2)

    u, delta, z = (None if x is None else visit(x.unsqueeze(2)).flatten(1, 2) for x in (u, delta, z))
    D, bias = (None if x is None else x.flatten() for x in (D, bias))
    y, last = scan(u, delta, A.flatten(0, 1), visit(B), visit(C), D, z, bias, softplus, True)
    y = y.unflatten(1, (directions, channels)).transpose(2, 3)  # (b, K, l, d), row t the result of step t
    y = y if order is None else torch.zeros_like(y).scatter(2, walks[..., None].expand_as(y), y)
    return y, last.unflatten(1, (directions, channels))
