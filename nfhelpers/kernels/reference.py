"""The scans as they are written: one step after another, in any floating dtype. The truth of the tests.

b batch, k direction, d channel, l position, n state, g group of channels that share B and C.

    h_l = exp(delta_l A) h_{l-1} + Bbar_l u_l          h: (B, D, N), h_{-1} = 0
    y_l = sum_n C_l h_l + D u_l,  then  y_l * silu(z_l) if z is given

`discretization="mamba"` takes Bbar = delta B (Gu and Dao, "Mamba", 2023, and the kernel they released);
`"zoh"` is the zero-order hold Bbar = (exp(delta A) - 1) / A * B (seed 002).
"""

import math

import torch
import torch.nn.functional as F

SERIES_TERMS = 6
# |delta A| below which a Taylor series replaces a quotient whose numerator cancels.
SERIES_BELOW = {torch.float32: 0.1, torch.float64: 0.01}


def compute_dtype(*tensors):
    """float64 when any tensor is float64, float32 otherwise: half precision is never the state's dtype."""
    doubles = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if doubles else torch.float32


def states_of(B):
    """N of B (D, N), (B, N, L) or (B, G, N, L)."""
    return B.shape[1] if B.dim() == 2 else B.shape[-2]


def state_rates(A, states):
    """Decay rates (..., D, N) that the tied rates A (..., D) stand for: state n decays at (n + 1) A."""
    return A.unsqueeze(-1) * torch.arange(1, states + 1, dtype=A.dtype, device=A.device)


def hold(delta, A):
    """Zero-order hold weight (exp(delta A) - 1) / A, differentiable and right down to A = 0.

    Equals delta * f(q), q = delta A, f(q) = expm1(q) / q = 1 + q/2 + q²/6 + ...
    """
    q = delta * A
    near_zero = q.abs() < SERIES_BELOW[q.dtype]
    # Both branches of torch.where are differentiated, so the unused one must stay finite.
    away = torch.where(near_zero, torch.ones_like(q), q)
    near = torch.where(near_zero, q, torch.zeros_like(q))
    series = torch.zeros_like(q)
    for power in reversed(range(SERIES_TERMS + 1)):
        series = series * near + 1 / math.factorial(power + 1)
    return delta * torch.where(near_zero, series, torch.expm1(away) / away)


def _steps(weight, length, channels, dtype):
    """B or C as `length` tensors that broadcast to (B, D, N)."""
    weight = weight.to(dtype)
    if weight.dim() == 2:
        return [weight] * length  # (D, N)
    if weight.dim() == 3:
        weight = weight.unsqueeze(1)  # (B, 1, N, L)
    repeats = channels // weight.shape[1]
    return [step.repeat_interleave(repeats, dim=1) for step in weight.unbind(-1)]  # (B, D, N) each


def selective_scan_reference(
    u,
    delta,
    A,
    B,
    C,
    D=None,
    z=None,
    delta_bias=None,
    delta_softplus=False,
    return_last_state=False,
    *,
    discretization="mamba",
    tied_decay=False,
):
    """Step-by-step selective scan. Arguments and result as `kernels.selective_scan`, which checks them.

    Autograd differentiates it, any number of times. Memory grows as B·D·L·N when gradients are wanted.
    """
    length, channels = u.shape[-1], u.shape[1]
    dtype = compute_dtype(u, delta, A, B, C, D, z, delta_bias)
    with torch.autocast(u.device.type, enabled=False):
        A = A.to(dtype)
        if tied_decay:
            A = state_rates(A, states_of(B))  # (D, N)
        inputs = u.to(dtype)  # (B, D, L)
        delta = delta.to(dtype)
        if delta_bias is not None:
            delta = delta + delta_bias.to(dtype)[:, None]
        if delta_softplus:
            delta = F.softplus(delta)

        state = inputs.new_zeros(u.shape[0], channels, A.shape[1])  # (B, D, N)
        outputs = []
        # unbind and stack, never x[..., l]: the backward of a slice fills a tensor of the size of the whole.
        for u_l, delta_l, B_l, C_l in zip(
            inputs.unbind(-1),
            delta.unbind(-1),
            _steps(B, length, channels, dtype),
            _steps(C, length, channels, dtype),
            strict=True,
        ):
            delta_l = delta_l.unsqueeze(-1)  # (B, D, 1)
            weight = hold(delta_l, A) if discretization == "zoh" else delta_l
            state = torch.exp(delta_l * A) * state + weight * B_l * u_l.unsqueeze(-1)  # (B, D, N)
            outputs.append((state * C_l).sum(-1))  # (B, D)
        out = torch.stack(outputs, dim=-1)  # (B, D, L)

        if D is not None:
            out = out + D.to(dtype)[:, None] * inputs
        if z is not None:
            out = out * F.silu(z.to(dtype))
        out = out.to(u.dtype)
    return (out, state) if return_last_state else out


def directional_scan_reference(
    x,
    delta,
    A,
    B,
    C,
    D=None,
    *,
    orders,
    delta_bias=None,
    delta_softplus=True,
    reverse=None,
    tied_decay=False,
):
    """One selective scan a direction, of gathered rows. Arguments and result as `kernels.directional_scan`.

    K L steps that autograd differentiates: memory grows as B·K·D·L·N when gradients are wanted.
    """
    batch, directions, length, channels = delta.shape
    x = x.unsqueeze(1) if x.dim() == 3 else x
    x = x.expand(batch, directions, length, channels)
    per_direction = 1 if tied_decay else 2  # dimensions of A that one direction has
    A = A.expand(directions, *A.shape[-per_direction:])
    D, delta_bias = (None if w is None else w.expand(directions, channels) for w in (D, delta_bias))
    outputs = []
    for k in range(directions):
        walk = orders[..., k, :].expand(batch, length).long()  # row visited at each step
        if reverse is not None and reverse[k]:
            walk = walk.flip(-1)

        def visit(rows, k=k, walk=walk):
            index = walk.unsqueeze(-1).expand(-1, -1, rows.shape[-1])
            return rows[:, k].gather(1, index).transpose(1, 2)  # (B, ..., L)

        y = selective_scan_reference(
            visit(x),
            visit(delta),
            A[k],
            visit(B),
            visit(C),
            None if D is None else D[k],
            None,
            None if delta_bias is None else delta_bias[k],
            delta_softplus,
            tied_decay=tied_decay,
        ).transpose(1, 2)  # (B, L, D), row t the result of step t
        outputs.append(torch.zeros_like(y).scatter(1, walk.unsqueeze(-1).expand_as(y), y))
    return torch.stack(outputs, 1)  # (B, K, L, D)
