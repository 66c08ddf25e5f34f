"""The selective scan in plain PyTorch with O(L) memory, for any device: chunk, keep one state, recompute.

The recurrence is the one of `reference.py`. Only the step h_t = a_t h_{t-1} + x_t is serial: one in-place
`addcmul_` per position on a time-major buffer. Exponentials, outputs and gradients are computed for a whole
chunk of T positions at once. The forward pass keeps the state at the start of every chunk; the backward pass
walks the chunks from the last to the first, recomputes the states of one, and runs the adjoint recurrence

    g_t = C_t dy_t + a_{t+1} g_{t+1}          g: gradient with respect to h

in place. Memory is therefore the inputs plus L/T states plus a few buffers of T states. Autograd sees one
node and never a slice: the backward of a slice under autograd fills a tensor as long as the whole sequence.

b batch, g group, n state, p channel inside its group, t position. Everything is time-major and channels-last,
(T, b, G, P) or with states (T, b, G, N, P), so that elementwise work runs over contiguous channels.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .reference import SERIES_BELOW, SERIES_TERMS, compute_dtype

CHUNK = 32  # positions per chunk
STEP_ELEMENTS = (
    32768  # states per step and CPU thread: larger batches go through in slices that stay in cache
)
TINY = 1e-30  # 1 / A is not formed below this


class _Plan(NamedTuple):
    """How one call is cut up: groups x channels, slices of the batch, slices of the sequence."""

    split: tuple
    states: int
    rows: list
    spans: list
    dtype: torch.dtype
    device: torch.device

    def buffer(self, positions, rows):
        shape = (positions, rows.stop - rows.start, self.split[0], self.states, self.split[1])
        return torch.empty(shape, dtype=self.dtype, device=self.device)  # (T, b, G, N, P)


def _plan(u, A, B, C, dtype, chunk):
    (batch, channels, length), states = u.shape, A.shape[1]
    groups = next((weight.shape[1] for weight in (B, C) if weight.dim() == 4), 1)
    step = batch
    if u.device.type == "cpu":
        step = max(1, STEP_ELEMENTS * torch.get_num_threads() // (channels * states))
    rows = [slice(start, min(start + step, batch)) for start in range(0, batch, step)]
    spans = [slice(start, min(start + chunk, length)) for start in range(0, length, chunk)]
    return _Plan((groups, channels // groups), states, rows, spans, dtype, u.device)


def _time_major(x, split):
    """View (B, D, L) as (L, B, G, P)."""
    return x.permute(2, 0, 1).unflatten(-1, split)


def _state_weight(weight, plan):
    """A, B or C broadcastable over (L, B, G, N, P): a copy of (D, N), a view of (B, N, L) or (B, G, N, L)."""
    if weight.dim() == 2:
        return weight.to(plan.dtype).unflatten(0, plan.split).transpose(1, 2).contiguous()  # (G, N, P)
    weight = weight.unsqueeze(1) if weight.dim() == 3 else weight
    return weight.permute(3, 0, 1, 2).unsqueeze(-1)  # (L, B, G, N, 1)


def _load(x, span, rows, dtype):
    """The chunk of a time-major tensor, contiguous; a weight fixed in time (G, N, P) is returned as it is."""
    return x if x.dim() == 3 else x[span, rows].contiguous().to(dtype)


def _step_size(delta, span, rows, bias, softplus, dtype):
    """delta as the recurrence uses it, and what softplus was applied to: both (T, b, G, P)."""
    raw = _load(delta, span, rows, dtype)
    if bias is not None:
        raw = raw + bias
    return (F.softplus(raw) if softplus else raw), raw


def _reciprocal(A):
    """1 / A with 0 where A is tiny, and the mask of those places, or None when there are none."""
    tiny = A.abs() < TINY
    inverse = torch.where(tiny, torch.zeros_like(A), 1 / torch.where(tiny, torch.ones_like(A), A))
    return inverse, (tiny.to(A.dtype) if bool(tiny.any()) else None)


def _states(a, h, step, u, A, B, reciprocal, hold=None):
    """Fill a[t] = exp(delta_t A) and h[t + 1] = a[t] h[t] + Bbar_t u_t, from h[0].

    With zero-order hold also hold[t] = (exp(delta_t A) - 1) / A: expm1 makes it exact for any A that has a
    reciprocal, and it is delta_t where A has none.
    """
    step, u, x = step.unsqueeze(-2), u.unsqueeze(-2), h[1:]
    torch.mul(step, A, out=a)
    if reciprocal is None:
        torch.mul(step * u, B, out=x)
    else:
        inverse, tiny = reciprocal
        torch.expm1(a, out=hold).mul_(inverse)
        if tiny is not None:
            hold.addcmul_(step, tiny)
        torch.mul(hold, B, out=x).mul_(u)
    a.exp_()
    for a_t, before, after in zip(a.unbind(0), h[:-1].unbind(0), x.unbind(0), strict=True):
        after.addcmul_(a_t, before)


def _hold_slope(a, hold, step, A, inverse, scratch):
    """d hold / dA = (step a - hold) / A; near q = step A = 0 the series step² sum_k q^k / (k! (k + 2))."""
    q, series, far = scratch
    limit = SERIES_BELOW[q.dtype]
    torch.mul(step, A, out=q).clamp_(-limit, limit)
    series.fill_(1 / (math.factorial(SERIES_TERMS) * (SERIES_TERMS + 2)))
    for k in reversed(range(SERIES_TERMS)):
        series.mul_(q).add_(1 / (math.factorial(k) * (k + 2)))
    series.mul_(step).mul_(step)
    # 0 where |q| <= limit and 1 elsewhere, by arithmetic: torch.where is slower on a CPU.
    torch.mul(step, A, out=far).abs_().sub_(limit).mul_(1 / TINY).clamp_(0, 1)
    quotient = torch.mul(a, step, out=q).sub_(hold).mul_(inverse)
    return series.lerp_(quotient, far)


def _sum_states(x, weight):
    """(T, b, G, P): sum over n of x[t, b, g, n, p] * weight[g, n, p] or weight[t, b, g, n, 1]."""
    if weight.dim() > 3:
        products = torch.bmm(weight.view(-1, 1, weight.shape[3]), x.view(-1, *x.shape[3:]))
        return products.view(*x.shape[:3], -1)
    terms = list(zip(x.unbind(-2), weight.unbind(-2), strict=True))
    out = terms[0][0] * terms[0][1]
    for x_n, weight_n in terms[1:]:
        out.addcmul_(x_n, weight_n)
    return out


def _sum_channels(x, weight):
    """(T, b, G, N, 1): sum over p of x[t, b, g, n, p] * weight[t, b, g, p]."""
    # Row vector times transposed matrix: the same product as matrix times column vector is slower.
    rows = torch.bmm(weight.reshape(-1, 1, x.shape[4]), x.view(-1, *x.shape[3:]).transpose(1, 2))
    return rows.view(*x.shape[:4], 1)


def _sum_positions(x, weight):
    """(G, N, P): sum over t and b of x[t, b, g, n, p] * weight[t, b, g, p]."""
    weight = weight.unsqueeze(-2)
    total = x[0] * weight[0]
    for x_t, weight_t in zip(x[1:].unbind(0), weight[1:].unbind(0), strict=True):
        total.addcmul_(x_t, weight_t)
    return total.sum(0)


def _weight_gradient(total, x, weight, span, rows):
    """Put one chunk's gradient of B or C into `total`: (G, N, P) if fixed, (L, B, G, N, 1) if varying."""
    if total.dim() == 3:
        total += _sum_positions(x, weight)
    else:
        total[span, rows] = _sum_channels(x, weight).to(total.dtype)


def _forward(u, delta, A, B, C, D, z, delta_bias, softplus, zoh, plan, keep_states):
    """(out, last_state (B, D, N), states at the start of every chunk (L/T, B, G, N, P) or None)."""
    split, dtype = plan.split, plan.dtype
    out = torch.empty_like(u)
    last = torch.empty(u.shape[0], split[0], plan.states, split[1], dtype=dtype, device=u.device)
    starts = last.new_empty(len(plan.spans), *last.shape) if keep_states else None

    A, B, C = (_state_weight(weight, plan) for weight in (A, B, C))
    D, bias = (None if weight is None else weight.to(dtype).view(split) for weight in (D, delta_bias))
    reciprocal = _reciprocal(A) if zoh else None
    u, delta, y_all = (_time_major(x, split) for x in (u, delta, out))
    z = None if z is None else _time_major(z, split)

    for rows in plan.rows:
        longest = plan.spans[0].stop
        h_buffer, a_buffer, *hold_buffer = (
            plan.buffer(longest + extra, rows) for extra in (1, 0, *[0] * zoh)
        )
        h_buffer[0].zero_()
        for index, span in enumerate(plan.spans):
            count = span.stop - span.start
            h, (a, *hold) = h_buffer[: count + 1], (buffer[:count] for buffer in (a_buffer, *hold_buffer))
            if keep_states:
                starts[index, rows] = h[0]
            step, _ = _step_size(delta, span, rows, bias, softplus, dtype)
            u_t, B_t, C_t = (_load(x, span, rows, dtype) for x in (u, B, C))
            _states(a, h, step, u_t, A, B_t, reciprocal, *hold[:1])
            y = _sum_states(h[1:], C_t)
            if D is not None:
                y.addcmul_(D, u_t)
            if z is not None:
                y.mul_(F.silu(_load(z, span, rows, dtype)))
            y_all[span, rows] = y.to(y_all.dtype)
            h_buffer[0].copy_(h[count])
        last[rows] = h_buffer[0]
    return out, last.transpose(2, 3).flatten(1, 2), starts


def _backward(grad_out, grad_last, starts, u, delta, A, B, C, D, z, delta_bias, softplus, zoh, plan):
    """Gradients of u, delta, A, B, C, D, z and delta_bias, each in its argument's shape."""
    split, dtype = plan.split, plan.dtype
    du, ddelta, dz = (None if x is None else torch.empty_like(x) for x in (u, delta, z))
    dB, dC = (torch.empty_like(x) if x.dim() > 2 else None for x in (B, C))

    A, B, C = (_state_weight(x, plan) for x in (A, B, C))
    D, bias = (None if x is None else x.to(dtype).view(split) for x in (D, delta_bias))
    reciprocal = _reciprocal(A) if zoh else None
    u, delta, dy_all, du_all, ddelta_all = (_time_major(x, split) for x in (u, delta, grad_out, du, ddelta))
    z, dz_all = (None if x is None else _time_major(x, split) for x in (z, dz))
    dB_all, dC_all = (
        torch.zeros_like(weight) if grad is None else _state_weight(grad, plan)
        for weight, grad in ((B, dB), (C, dC))
    )
    dA, dD, dbias = torch.zeros_like(A), A.new_zeros(split), A.new_zeros(split)
    grad_last = grad_last.to(dtype).unflatten(1, split).transpose(2, 3)  # (B, G, N, P)

    for rows in plan.rows:
        longest = plan.spans[0].stop
        buffers = [plan.buffer(longest + extra, rows) for extra in (1, 0, 0, *[0] * (4 * zoh))]
        carry = grad_last[rows].contiguous()
        for index, span in reversed(list(enumerate(plan.spans))):
            count = span.stop - span.start
            h, (a, g, *hold) = buffers[0][: count + 1], (buffer[:count] for buffer in buffers[1:])
            step, raw = _step_size(delta, span, rows, bias, softplus, dtype)
            u_t, B_t, C_t, dy = (_load(x, span, rows, dtype) for x in (u, B, C, dy_all))
            h[0] = starts[index, rows]
            _states(a, h, step, u_t, A, B_t, reciprocal, *hold[:1])

            if z is not None:
                z_t = _load(z, span, rows, dtype)
                y = _sum_states(h[1:], C_t)
                if D is not None:
                    y.addcmul_(D, u_t)
                gate = torch.sigmoid(z_t)
                dz_all[span, rows] = (dy * y * gate * (1 + z_t * (1 - gate))).to(dz_all.dtype)
                dy = dy * gate * z_t

            _weight_gradient(dC_all, h[1:], dy, span, rows)
            torch.mul(dy.unsqueeze(-2), C_t, out=g)
            g[-1].add_(carry)
            a_steps, g_steps = a.unbind(0), g.unbind(0)
            for t in range(count - 2, -1, -1):
                g_steps[t].addcmul_(a_steps[t + 1], g_steps[t + 1])
            torch.mul(a_steps[0], g_steps[0], out=carry)

            if zoh:
                hold, *scratch = hold
                slope = _hold_slope(a, hold, step.unsqueeze(-2), A, reciprocal[0], scratch)
                hold.mul_(g)  # gradient of B u
                _weight_gradient(dB_all, hold, u_t, span, rows)
                du_t = _sum_states(hold, B_t)
                dhold = torch.mul(g, B_t, out=hold).mul_(u_t.unsqueeze(-2))
                dA.add_(slope.mul_(dhold).sum((0, 1)))
                dstep = dhold.mul_(a).sum(-2)  # d hold / d delta = a
            else:
                dx = _sum_states(g, B_t)
                _weight_gradient(dB_all, g, step * u_t, span, rows)
                du_t, dstep = dx * step, dx * u_t
            # dh_t / d(delta_t A) = a_t h_{t-1}, in both discretisations
            w = h[:-1].mul_(g).mul_(a)
            dA.add_(_sum_positions(w, step))
            dstep.add_(_sum_states(w, A))

            if D is not None:
                dD.add_((dy * u_t).sum((0, 1)))
                du_t.addcmul_(dy, D)
            if softplus:
                dstep.mul_(torch.sigmoid(raw))
            if bias is not None:
                dbias.add_(dstep.sum((0, 1)))
            du_all[span, rows] = du_t.to(du_all.dtype)
            ddelta_all[span, rows] = dstep.to(ddelta_all.dtype)

    dA, fixed_dB, fixed_dC = (
        x.transpose(1, 2).flatten(0, 1) if x.dim() == 3 else None for x in (dA, dB_all, dC_all)
    )
    dB, dC = (fixed_dB if dB is None else dB), (fixed_dC if dC is None else dC)
    return du, ddelta, dA, dB, dC, dD.flatten(), dz, dbias.flatten()


class _ChunkedScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, z, delta_bias, delta_softplus, zoh, plan):
        with torch.autocast(u.device.type, enabled=False):
            out, last, starts = _forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, zoh, plan, True)
        ctx.save_for_backward(starts, u, delta, A, B, C, D, z, delta_bias)
        ctx.options = delta_softplus, zoh, plan
        return out, last

    @staticmethod
    def backward(ctx, grad_out, grad_last):
        # once_differentiable would let a second derivative through as zero when grad_out is a constant.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph=True: the chunked scan has no second derivative; use backend='reference'"
            )
        starts, *arguments = ctx.saved_tensors
        with torch.autocast(grad_out.device.type, enabled=False):
            grads = _backward(grad_out, grad_last, starts, *arguments, *ctx.options)
        grads = [
            None if argument is None else grad.to(argument.dtype)
            for grad, argument in zip(grads, arguments, strict=True)
        ]
        return *grads, None, None, None


def selective_scan_chunked(
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
    chunk=CHUNK,
):
    """Selective scan in chunks. Arguments and result as `kernels.selective_scan`, which checks them.

    chunk: positions per chunk. L / chunk states are kept for the backward pass, which needs work buffers of a
    few times chunk states. A second derivative raises RuntimeError: use backend "reference" for it.
    """
    plan = _plan(u, A, B, C, compute_dtype(u, delta, A, B, C, D, z, delta_bias), chunk)
    arguments = (u, delta, A, B, C, D, z, delta_bias)
    options = (delta_softplus, discretization == "zoh", plan)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in arguments):
        out, last = _ChunkedScan.apply(*arguments, *options)
    else:
        with torch.autocast(u.device.type, enabled=False):
            out, last, _ = _forward(*arguments, *options, keep_states=False)
    return (out, last) if return_last_state else out
