"""The scan in plain PyTorch with O(L) memory, for any device: chunk, keep one state, recompute.

The recurrence is the one of `reference.py`. Only the step h_t = a_t h_{t-1} + x_t is serial: one in-place
`addcmul_` per step on a time-major buffer. Exponentials, outputs and gradients are computed for a whole chunk
of T steps at once. The forward pass keeps the state at the start of every chunk; the backward pass walks the
chunks from the last to the first, recomputes the states of one, and runs the adjoint recurrence

    g_t = C_t dy_t + a_{t+1} g_{t+1}          g: gradient with respect to h

in place. Memory is therefore the inputs plus L/T states plus a few buffers of T states. Rows are gathered one
chunk at a time, so that a direction of scan costs no permuted copy of its inputs. Nothing here is seen by
autograd (`kernels/__init__.py` registers both passes): the backward of a slice under autograd fills a tensor
as long as the whole sequence.

b batch, k direction, g group, n state, p channel inside its group, l row, t step. Chunks are time-major and
channels-last, (T, b, k, G, P) or with states (T, b, k, G, N, P), so that elementwise work runs over
contiguous channels.
"""

import itertools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .reference import SERIES_BELOW, SERIES_TERMS, state_rates

CHUNK = 32  # steps per chunk
STEP_ELEMENTS = (
    32768  # states per step and CPU thread: what is larger goes through in slices that stay in cache
)
TINY = 1e-30  # 1 / A is not formed below this
LOG2E = math.log2(math.e)


def states_shape(batch, directions, length, channels, states):
    """Shape of what `forward` keeps for `backward`: the state at the start of every chunk."""
    return (-(-length // CHUNK), batch, directions, channels * states)


class _Scan(NamedTuple):
    """The arguments of one call, ready to be cut up: (b, K, l, ...) what varies, (K, ...) what is fixed."""

    u: torch.Tensor  # (b, K, l, G, P)
    delta: torch.Tensor  # (b, K, l, G, P)
    B: torch.Tensor  # (b, K, l, G, N, 1), or (K, G, N, P) when fixed
    C: torch.Tensor
    A: torch.Tensor  # (K, G, N, P), or (K, G, P) when tied
    D: torch.Tensor | None  # (K, G, P)
    z: torch.Tensor | None  # (b, K, l, G, P)
    bias: torch.Tensor | None  # (K, G, P)
    visits: torch.Tensor | None  # (l, b', K): row visited at each step; None: row t at step t
    states: int
    parts: list  # pairs of slices, of samples and of directions, whose states stay in cache
    spans: list  # slices of the steps

    def buffer(self, part, steps):
        """Room for the states of a part, (steps, b, k, G, N, P)."""
        samples, directions = (piece.stop - piece.start for piece in part)
        groups, inner = self.u.shape[-2:]
        return self.A.new_empty(steps, samples, directions, groups, self.states, inner)


def _prepare(u, delta, A, B, C, D, z, bias, order, reverse):
    batch, directions, length, channels = delta.shape
    groups = next((weight.shape[2] for weight in (B, C) if weight.dim() == 5), 1)
    split, states = (groups, channels // groups), B.shape[-1]
    samples_at_once, directions_at_once = batch, directions
    if u.device.type == "cpu":
        room = STEP_ELEMENTS * torch.get_num_threads() // (channels * states)
        samples_at_once = max(1, min(batch, room))
        directions_at_once = max(1, min(directions, room // batch))
    return _Scan(
        _split(u, split).expand(-1, directions, -1, -1, -1),
        _split(delta, split),
        _by_state(B, split),
        _by_state(C, split),
        _split(A, split) if A.dim() == 2 else _by_state(A, split),
        *(_split(x, split) for x in (D, z, bias)),
        _visits(order, reverse, directions, length, u.device),
        states,
        list(itertools.product(_cut(batch, samples_at_once), _cut(directions, directions_at_once))),
        _cut(length, CHUNK),
    )


def _cut(length, size):
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _split(x, split):
    """(..., d) as (..., G, P)."""
    return None if x is None else x.unflatten(-1, split)


def _by_state(weight, split):
    """A, B or C: a copy (K, G, N, P) of (K, d, N); a view (b, K, l, G, N, 1) of (b, K, G, l, N)."""
    if weight.dim() == 3:
        return weight.unflatten(1, split).transpose(2, 3).contiguous()
    return weight.transpose(2, 3).unsqueeze(-1)


def _from_states(total):
    """(K, G, N, P) as (K, d, N)."""
    return total.transpose(2, 3).flatten(1, 2).contiguous()


def _visits(order, reverse, directions, length, device):
    if order is None:
        if not reverse:
            return None
        order = torch.arange(length, device=device).expand(1, directions, length)
    walks = [order[:, k].flip(-1) if reverse >> k & 1 else order[:, k] for k in range(directions)]
    return torch.stack(walks, -1).transpose(0, 1).long().contiguous()  # (l, b', K)


def _where(scan, part, span):
    """Where in a tensor (b, K, l, ...) a chunk's rows are: slices, or indices that give (T, b, k, ...)."""
    samples, directions = part
    if scan.visits is None:
        return samples, directions, span
    rows = scan.visits[span, samples if scan.visits.shape[1] > 1 else slice(None), directions]
    b, k = (torch.arange(piece.start, piece.stop, device=rows.device) for piece in part)
    return b[:, None], k, rows


def _load(x, where, dtype):
    """The rows a chunk visits, (T, b, k, ...) contiguous."""
    if isinstance(where[0], slice):
        return x[where].movedim(2, 0).contiguous().to(dtype)
    # As x[where], but index_select copies whole rows and is several times faster on a CPU. It wants one
    # dimension of rows: with their greatest common divisor as its stride, any three strides lie on one.
    unit = math.gcd(*x.stride()[:3]) or 1
    strides = [stride // unit for stride in x.stride()[:3]]
    count = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, strides, strict=False))
    rows = x.as_strided((count, *x.shape[3:]), (unit, *x.stride()[3:]))
    index = sum(at * stride for at, stride in zip(where, strides, strict=True))  # (T, b, k)
    return rows.index_select(0, index.flatten()).unflatten(0, index.shape).to(dtype)


def _store(x, where, chunk):
    """The inverse of `_load`: put a chunk into the rows of x it belongs to."""
    x[where] = (chunk.movedim(0, 2) if isinstance(where[0], slice) else chunk).to(x.dtype)


def _add_directions(x, where, chunk):
    """As `_store`, but into x (b, l, ...): directions share its rows and are added one after another."""
    b, _, rows = where
    if isinstance(b, slice):
        x[b, rows] += chunk.sum(2).movedim(0, 1)
        return
    for k in range(chunk.shape[2]):  # within a direction no row occurs twice
        x[b[:, 0], rows[:, :, k]] += chunk[:, :, k]


def _weight(weight, where, part, dtype):
    """B or C of one chunk: (T, b, k, G, N, 1), or (k, G, N, P) when fixed."""
    return weight[part[1]] if weight.dim() == 4 else _load(weight, where, dtype)


def _step_size(delta, bias, softplus):
    """delta (T, b, k, G, P) as the recurrence uses it, and what softplus is applied to."""
    raw = delta if bias is None else delta + bias
    return (F.softplus(raw) if softplus else raw), raw


def _reciprocal(A):
    """1 / A with 0 where A is tiny, and the mask of those places, or None when there are none."""
    tiny = A.abs() < TINY
    inverse = torch.where(tiny, torch.zeros_like(A), 1 / torch.where(tiny, torch.ones_like(A), A))
    return inverse, (tiny.to(A.dtype) if bool(tiny.any()) else None)


def _fill_powers(first, out):
    """out[..., n, :] = first^(n + 1): products of powers that are there already."""
    out[..., 0, :] = first
    done, states = 1, out.shape[-2]
    while done < states:
        more = min(done, states - done)
        torch.mul(out[..., :more, :], out[..., done - 1 : done, :], out=out[..., done : done + more, :])
        done += more


def _decays_and_inputs(a, x, step, u, A, B, reciprocal, hold=None):
    """Fill a[t] = exp(delta_t A) and x[t] = Bbar_t u_t.

    With zero-order hold also hold[t] = (exp(delta_t A) - 1) / A: expm1 makes it exact for any A that has a
    reciprocal, and it is delta_t where A has none.
    """
    if reciprocal is None:
        torch.mul((step * u).unsqueeze(-2), B, out=x)
        # exp2, not exp, which is several times slower on a CPU, more so where the result underflows.
        if A.dim() == 3:
            _fill_powers(torch.exp2(step * (A * LOG2E)), a)
        else:
            torch.mul(step.unsqueeze(-2), A * LOG2E, out=a).exp2_()
    else:
        inverse, tiny = reciprocal
        step, u = step.unsqueeze(-2), u.unsqueeze(-2)
        torch.mul(step, A, out=hold).expm1_()
        torch.add(hold, 1, out=a)
        hold.mul_(inverse)
        if tiny is not None:
            hold.addcmul_(step, tiny)
        torch.mul(hold, B, out=x).mul_(u)


def _run(a, h, count):
    """h[t + 1] += a[t] h[t] for t < count: the recurrence, on lists of the steps of two buffers."""
    for t in range(count):
        h[t + 1].addcmul_(a[t], h[t])


def _run_back(a, g, count):
    """g[t] += a[t + 1] g[t + 1] for t < count - 1, from the last to the first: the adjoint recurrence."""
    for t in range(count - 2, -1, -1):
        g[t].addcmul_(a[t + 1], g[t + 1])


def _hold_slope(a, hold, step, A, inverse, scratch):
    """d hold / dA = (step a - hold) / A; near q = step A = 0 the series step² sum_k q^k / (k! (k + 2))."""
    q, series, far = scratch
    limit = SERIES_BELOW[q.dtype]
    torch.mul(step, A, out=q).clamp_(-limit, limit)
    series.fill_(1 / (math.factorial(SERIES_TERMS) * (SERIES_TERMS + 2)))
    for k in reversed(range(SERIES_TERMS)):
        torch.addcmul(q.new_tensor(1 / (math.factorial(k) * (k + 2))), series, q, out=series)
    series.mul_(step).mul_(step)
    # 0 where |q| <= limit and 1 elsewhere, by arithmetic: torch.where is slower on a CPU.
    torch.mul(step, A, out=far).abs_().sub_(limit).mul_(1 / TINY).clamp_(0, 1)
    quotient = torch.mul(a, step, out=q).sub_(hold).mul_(inverse)
    return series.lerp_(quotient, far)


def _sum_states(x, weight):
    """(T, b, k, G, P): sum over n of x[t, b, k, g, n, p] times weight[t, b, k, g, n, 1] or [k, g, n, p]."""
    if weight.dim() > 4:
        products = torch.bmm(weight.view(-1, 1, weight.shape[4]), x.view(-1, *x.shape[4:]))
        return products.view(*x.shape[:4], -1)
    terms = list(zip(x.unbind(-2), weight.unbind(-2), strict=True))
    out = terms[0][0] * terms[0][1]
    for x_n, weight_n in terms[1:]:
        out.addcmul_(x_n, weight_n)
    return out


def _sum_channels(x, weight):
    """(T, b, k, G, N, 1): sum over p of x[t, b, k, g, n, p] weight[t, b, k, g, p]."""
    # Row vector times transposed matrix: the same product as matrix times column vector is slower.
    rows = torch.bmm(weight.reshape(-1, 1, x.shape[5]), x.view(-1, *x.shape[4:]).transpose(1, 2))
    return rows.view(*x.shape[:5], 1)


def _sum_steps(x, weight):
    """(k, G, N, P): sum over t and b of x[t, b, k, g, n, p] weight[t, b, k, g, p]."""
    weight = weight.unsqueeze(-2)
    total = x[0] * weight[0]
    for x_t, weight_t in zip(x[1:].unbind(0), weight[1:].unbind(0), strict=True):
        total.addcmul_(x_t, weight_t)
    return total.sum(0)


def forward(u, delta, A, B, C, D, z, bias, order, reverse, softplus, zoh, tied, keep_states):
    """(y, last, states) of the scan as `kernels/__init__.py` describes it and has checked its arguments."""
    batch, directions, length, channels = delta.shape
    dtype = A.dtype
    if zoh and tied:  # zero-order hold takes an expm1 a state anyway
        A = state_rates(A, B.shape[-1])
    y = torch.empty_like(u) if u.shape[1] == directions else u.new_empty(delta.shape)
    scan = _prepare(u, delta, A, B, C, D, z, bias, order, reverse)
    split = scan.u.shape[-2:]
    y_rows = _split(y, split)
    last = A.new_empty(batch, directions, split[0], scan.states, split[1])
    kept = states_shape(batch, directions, length, channels, scan.states) if keep_states else (0,)
    states = A.new_empty(kept)
    starts = states.view(-1, *last.shape) if keep_states else None

    for part in scan.parts:
        longest = scan.spans[0].stop
        buffers = [scan.buffer(part, steps) for steps in (longest + 1, longest, *[longest] * zoh)]
        A_k, D_k, bias_k = (None if x is None else x[part[1]] for x in (scan.A, scan.D, scan.bias))
        h_steps, a_steps = (buffer.unbind(0) for buffer in buffers[:2])
        reciprocal = _reciprocal(A_k) if zoh else None
        carry = torch.zeros_like(buffers[0][0])
        for index, span in enumerate(scan.spans):
            count = span.stop - span.start
            h, a, *hold = (buffer[: count + (i == 0)] for i, buffer in enumerate(buffers))
            where = _where(scan, part, span)
            step, _ = _step_size(_load(scan.delta, where, dtype), bias_k, softplus)
            u_t = _load(scan.u, where, dtype)
            B_t, C_t = (_weight(weight, where, part, dtype) for weight in (scan.B, scan.C))
            h[0] = carry
            if keep_states:
                starts[index, *part] = carry
            _decays_and_inputs(a, h[1:], step, u_t, A_k, B_t, reciprocal, *hold)
            _run(a_steps, h_steps, count)
            y_t = _sum_states(h[1:], C_t)
            if D is not None:
                y_t.addcmul_(u_t, D_k)
            if z is not None:
                y_t.mul_(F.silu(_load(scan.z, where, dtype)))
            _store(y_rows, where, y_t)
            carry.copy_(h[count])
        last[part] = carry
    return y, last.transpose(3, 4).flatten(2, 3).contiguous(), states


def backward(grad_y, grad_last, states, u, delta, A, B, C, D, z, bias, order, reverse, softplus, zoh, tied):
    """Gradients of u, delta, A, B, C, D, z and bias in their arguments' shapes; (0,) where one is None."""
    directions, dtype = delta.shape[1], A.dtype
    widened = zoh and tied  # as in `forward`
    if widened:
        A = state_rates(A, B.shape[-1])
    scan = _prepare(u, delta, A, B, C, D, z, bias, order, reverse)
    split = scan.u.shape[-2:]
    du, ddelta, dB, dC, dz = (
        A.new_empty(0) if x is None else torch.empty_like(x) for x in (u, delta, B, C, z)
    )
    shared = u.shape[1] < directions
    du_rows = _split(u.new_zeros(du[:, 0].shape, dtype=dtype) if shared else du, split)
    dy_rows, ddelta_rows = _split(grad_y, split), _split(ddelta, split)
    dz_rows = None if z is None else _split(dz, split)
    dB_rows, dC_rows = (
        torch.zeros_like(weight) if weight.dim() == 4 else _by_state(gradient, split)
        for weight, gradient in ((scan.B, dB), (scan.C, dC))
    )
    dA, dD, dbias = torch.zeros_like(scan.A), *(A.new_zeros(directions, *split) for _ in range(2))
    starts = states.view(-1, *delta.shape[:2], split[0], scan.states, split[1])
    if grad_last is not None:
        grad_last = _split(grad_last.transpose(2, 3), split).transpose(2, 3)  # (b, K, G, N, P)
    ramp = torch.arange(1, scan.states + 1, dtype=dtype, device=u.device).unsqueeze(-1)  # (N, 1)

    for part in scan.parts:
        longest = scan.spans[0].stop
        buffers = [
            scan.buffer(part, steps) for steps in (longest + 1, longest, longest, *[longest] * (4 * zoh))
        ]
        A_k, D_k, bias_k = (None if x is None else x[part[1]] for x in (scan.A, scan.D, scan.bias))
        h_steps, a_steps, g_steps = (buffer.unbind(0) for buffer in buffers[:3])
        reciprocal = _reciprocal(A_k) if zoh else None
        carry = torch.zeros_like(buffers[0][0])
        if grad_last is not None:
            carry.copy_(grad_last[part])
        for index, span in reversed(list(enumerate(scan.spans))):
            count = span.stop - span.start
            h, a, g, *hold = (buffer[: count + (i == 0)] for i, buffer in enumerate(buffers))
            where = _where(scan, part, span)
            step, raw = _step_size(_load(scan.delta, where, dtype), bias_k, softplus)
            u_t, dy = (_load(x, where, dtype) for x in (scan.u, dy_rows))
            B_t, C_t = (_weight(weight, where, part, dtype) for weight in (scan.B, scan.C))
            h[0] = starts[index, *part]
            _decays_and_inputs(a, h[1:], step, u_t, A_k, B_t, reciprocal, *hold[:1])
            _run(a_steps, h_steps, count)

            if z is not None:
                z_t = _load(scan.z, where, dtype)
                y_t = _sum_states(h[1:], C_t)
                if D is not None:
                    y_t.addcmul_(u_t, D_k)
                gate = torch.sigmoid(z_t)
                _store(dz_rows, where, dy * y_t * gate * (1 + z_t * (1 - gate)))
                dy = dy * gate * z_t

            _weight_gradient(dC_rows, where, part, h[1:], dy)
            torch.mul(dy.unsqueeze(-2), C_t, out=g)
            g[-1].add_(carry)
            _run_back(a_steps, g_steps, count)
            torch.mul(a_steps[0], g_steps[0], out=carry)

            if zoh:
                hold, *scratch = hold
                slope = _hold_slope(a, hold, step.unsqueeze(-2), A_k, reciprocal[0], scratch)
                hold.mul_(g)  # gradient of B u
                _weight_gradient(dB_rows, where, part, hold, u_t)
                du_t = _sum_states(hold, B_t)
                dhold = torch.mul(g, B_t, out=hold).mul_(u_t.unsqueeze(-2))
                dA[part[1]] += slope.mul_(dhold).sum((0, 1))
                dstep = dhold.mul_(a).sum(-2)  # d hold / d delta = a
            else:
                dx = _sum_states(g, B_t)
                _weight_gradient(dB_rows, where, part, g, step * u_t)
                du_t, dstep = dx * step, dx * u_t
            # dh_t / d(delta_t A) = a_t h_{t-1}, in both discretisations
            w = h[:-1].mul_(g).mul_(a)
            if A_k.dim() == 3:
                w = _sum_states(w, ramp.expand(*w.shape[:4], -1, -1).contiguous())
                dstep.addcmul_(w, A_k)
                dA[part[1]] += w.mul_(step).sum((0, 1))
            else:
                dstep.add_(_sum_states(w, A_k))
                dA[part[1]] += _sum_steps(w, step)

            if D is not None:
                dD[part[1]] += (dy * u_t).sum((0, 1))
                du_t.addcmul_(dy, D_k)
            if softplus:
                dstep.mul_(torch.sigmoid(raw))
            if bias is not None:
                dbias[part[1]] += dstep.sum((0, 1))
            (_add_directions if shared else _store)(du_rows, where, du_t)
            _store(ddelta_rows, where, dstep)

    if shared:
        du[:, 0] = du_rows.flatten(-2)
    dA = dA.flatten(1) if dA.dim() == 3 else _from_states(dA)
    if widened:
        dA = dA @ ramp[:, 0]
    dB, dC = (
        _from_states(rows) if rows.dim() == 4 else gradient
        for rows, gradient in ((dB_rows, dB), (dC_rows, dC))
    )
    dD, dbias = (
        total.new_empty(0) if weight is None else total.flatten(1)
        for weight, total in ((D, dD), (bias, dbias))
    )
    return du, ddelta, dA, dB, dC, dD, dz, dbias


def _weight_gradient(total, where, part, x, weight):
    """Put one chunk's gradient of B or C into `total`: add to (K, G, N, P) if fixed, else store its rows."""
    if total.dim() == 4:
        total[part[1]] += _sum_steps(x, weight)
    else:
        _store(total, where, _sum_channels(x, weight))
