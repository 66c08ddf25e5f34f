"""The scan in plain PyTorch with O(L) memory, for any device: chunk, keep one state, recompute.

Only h_t = a_t h_{t-1} + x_t is serial: one in-place `addcmul_` per step. Exponentials, outputs and gradients
are computed for a chunk of T steps at once, rows gathered for it alone. The forward pass keeps the state at
the start of each chunk. The backward pass walks the chunks from the last to the first, recomputes the states
of one and runs g_t = C_t dy_t + a_{t+1} g_{t+1}, where g is the gradient with respect to h.

b batch, k direction, g group, n state, p channel inside its group, l row, t step. Chunks are time-major and
channels-last: (T, b, k, G, P), or with states (T, b, k, G, N, P).
"""

import itertools
import math

import torch
import torch.nn.functional as F

CHUNK = 32  # steps per chunk
STEP_ELEMENTS = 32768  # states per step and CPU thread that stay in cache: more are cut into parts
LOG2E = math.log2(math.e)


def states_shape(batch, directions, length, channels, states):
    """Shape of what `forward` keeps for `backward`: the state at the start of every chunk."""
    return (-(-length // CHUNK), batch, directions, channels * states)


class _Scan:
    """The arguments of one call, ready to be cut up: (b, K, l, ...) what varies, (K, ...) what does not."""

    def __init__(self, u, delta, A, B, C, D, z, bias, order, carried, reverse, softplus):
        batch, directions, length, channels = delta.shape
        self.groups, self.states, self.dtype, self.softplus = B.shape[2], B.shape[4], A.dtype, softplus
        self.u = self.split(u).expand(-1, directions, -1, -1, -1)  # (b, K, l, G, P)
        self.delta, self.z = self.split(delta), self.split(z)
        self.B, self.C = _rows(B), _rows(C)  # (b, K, l, G, N, 1)
        self.D, self.bias = self.split(D), self.split(bias)  # (K, G, P)
        A = self.split(A) if A.dim() == 2 else A.unflatten(1, (self.groups, -1)).transpose(2, 3)
        self.A = A.contiguous()  # (K, G, P) or (K, G, N, P)
        self.carried = carried
        self.visits = _visits(order, reverse, directions, length, u.device)
        self.spans = _cut(length, CHUNK)  # of the steps
        room = batch * directions
        if u.device.type == "cpu":
            room = STEP_ELEMENTS * torch.get_num_threads() // (channels * self.states)
        samples, directions = _cut(batch, max(1, room)), _cut(directions, max(1, room // batch))
        self.parts = list(itertools.product(samples, directions))

    def split(self, x):
        """(..., d) as (..., G, P)."""
        return None if x is None else x.unflatten(-1, (self.groups, -1))

    def split_state(self, x):
        """(b, K, d, N) as (b, K, G, N, P)."""
        return None if x is None else self.split(x.mT).transpose(2, 3).contiguous()

    def buffer(self, part):
        """Room for the states of a part, (T + 1, b, k, G, N, P)."""
        sizes = (piece.stop - piece.start for piece in part)
        return self.A.new_empty(self.spans[0].stop + 1, *sizes, *self.B.shape[3:5], self.u.shape[4])

    def replay(self, where, part, h, a):
        """A chunk's decays into a, its states from h[0] on into h[1:]; h and a: a buffer and its steps."""
        A = self.A[part[1]]
        raw, u, B = (_load(x, where, self.dtype) for x in (self.delta, self.u, self.B))
        raw = raw if self.bias is None else raw + self.bias[part[1]]
        step = F.softplus(raw) if self.softplus else raw
        count = len(u)
        torch.mul((step * u).unsqueeze(-2), B, out=h[0][1 : count + 1])
        # exp2: exp is several times slower on a CPU, more so where the result underflows.
        if A.dim() == 3:
            _fill_powers(torch.exp2(step * (A * LOG2E)), a[0][:count])
        else:
            torch.mul(step.unsqueeze(-2), A * LOG2E, out=a[0][:count]).exp2_()
        if self.carried is not None:
            a[0][:count].mul_(self.carried[where[0], where[2]].T[..., None, None, None, None])
        for t in range(count):
            h[1][t + 1].addcmul_(a[1][t], h[1][t])
        return u, B, _load(self.C, where, self.dtype), step, raw


def _cut(length, size):
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _rows(weight):
    """B or C (b, K, G, l, N) as a view (b, K, l, G, N, 1)."""
    return weight.transpose(2, 3).unsqueeze(-1)


def _visits(order, reverse, directions, length, device):
    """(l, b', K): the row that a direction visits at a step; None where all walk the rows as they lie."""
    if order is None and not reverse:
        return None
    order = torch.arange(length, device=device).expand(1, directions, -1) if order is None else order
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
    # index_select copies whole rows, several times faster on a CPU than x[where]. It wants one dimension of
    # rows: with their greatest common divisor as its stride, any three strides lie on one.
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
    """`_store` into x (b, l, ...), whose rows directions share: they are added one after another."""
    b, _, rows = where
    if isinstance(b, slice):
        x[b, rows] += chunk.sum(2).movedim(0, 1)
        return
    for k in range(chunk.shape[2]):  # within a direction no row occurs twice
        x[b[:, 0], rows[:, :, k]] += chunk[:, :, k]


def _fill_powers(first, out):
    """out[..., n, :] = first^(n + 1): products of powers that are there already."""
    out[..., 0, :] = first
    done, states = 1, out.shape[-2]
    while done < states:
        more = min(done, states - done)
        torch.mul(out[..., :more, :], out[..., done - 1 : done, :], out=out[..., done : done + more, :])
        done += more


def _sum_states(x, weight):
    """(T, b, k, G, P): sum over n of x[t, b, k, g, n, p] times weight[t, b, k, g, n, 1]."""
    return torch.bmm(weight.view(-1, 1, weight.shape[4]), x.view(-1, *x.shape[4:])).view(*x.shape[:4], -1)


def _sum_by_channel(x, weight):
    """(T, b, k, G, P): sum over n of x[t, b, k, g, n, p] times weight[k, g, n, p]."""
    (x_0, weight_0), *terms = zip(x.unbind(-2), weight.unbind(-2), strict=True)
    out = x_0 * weight_0
    for x_n, weight_n in terms:
        out.addcmul_(x_n, weight_n)
    return out


def _sum_channels(x, weight):
    """(T, b, k, G, N, 1): sum over p of x[t, b, k, g, n, p] weight[t, b, k, g, p]."""
    # Row vector times transposed matrix: the same product as matrix times column vector is slower.
    rows = torch.bmm(weight.reshape(-1, 1, x.shape[5]), x.view(-1, *x.shape[4:]).transpose(1, 2))
    return rows.view(*x.shape[:5], 1)


def _sum_steps(x, weight):
    """(k, G, N, P): sum over t and b of x[t, b, k, g, n, p] weight[t, b, k, g, p]."""
    (x_0, weight_0), *terms = zip(x.unbind(), weight.unsqueeze(-2).unbind(), strict=True)
    total = x_0 * weight_0
    for x_t, weight_t in terms:
        total.addcmul_(x_t, weight_t)
    return total.sum(0)


def forward(u, delta, A, B, C, D, z, bias, initial, order, carried, reverse, softplus, tied, keep_states):
    """(y, last, states) of the scan that reference.py describes."""
    y = torch.empty_like(u) if u.shape[1] == delta.shape[1] else u.new_empty(delta.shape)
    scan = _Scan(u, delta, A, B, C, D, z, bias, order, carried, reverse, softplus)
    y_rows = scan.split(y)
    last = A.new_empty(*delta.shape[:2], scan.groups, scan.states, y_rows.shape[-1])
    states = A.new_empty(states_shape(*delta.shape, scan.states) if keep_states else (0,))
    starts = states.view(-1, *last.shape) if keep_states else None
    initial = scan.split_state(initial)

    for part in scan.parts:
        h, a = scan.buffer(part), scan.buffer(part)
        h_steps, a_steps = h.unbind(0), a.unbind(0)
        D_k = None if D is None else scan.D[part[1]]
        carry = torch.zeros_like(h[0]) if initial is None else initial[part].clone()
        for index, span in enumerate(scan.spans):
            where = _where(scan, part, span)
            h[0] = carry
            if keep_states:
                starts[index, *part] = carry
            u_t, _, C_t, _, _ = scan.replay(where, part, (h, h_steps), (a, a_steps))
            y_t = _sum_states(h[1 : len(u_t) + 1], C_t)
            if D is not None:
                y_t.addcmul_(u_t, D_k)
            if z is not None:
                y_t.mul_(F.silu(_load(scan.z, where, scan.dtype)))
            _store(y_rows, where, y_t)
            carry.copy_(h[len(u_t)])
        last[part] = carry
    return y, last.transpose(3, 4).flatten(2, 3), states


def backward(
    grad_y, grad_last, states, u, delta, A, B, C, D, z, bias, initial, order, carried, reverse, softplus, tied
):
    """Gradients of u, delta, A, B, C, D, z, bias and initial in their shapes; None where one is None."""
    scan = _Scan(u, delta, A, B, C, D, z, bias, order, carried, reverse, softplus)
    du, ddelta, dB, dC, dz = (None if x is None else torch.empty_like(x) for x in (u, delta, B, C, z))
    shared = u.shape[1] < delta.shape[1]
    du_rows = scan.split(u.new_zeros(du[:, 0].shape, dtype=A.dtype) if shared else du)
    dy_rows, ddelta_rows = scan.split(grad_y), scan.split(ddelta)
    dz_rows, dB_rows, dC_rows = scan.split(dz), _rows(dB), _rows(dC)
    dA = torch.zeros_like(scan.A)
    dD, dbias = (None if x is None else torch.zeros_like(x) for x in (scan.D, scan.bias))
    starts = states.view(-1, *delta.shape[:2], scan.groups, scan.states, scan.u.shape[4])
    grad_last = scan.split_state(grad_last)
    dinitial = None if initial is None else torch.empty_like(scan.split_state(initial))
    ramp = torch.arange(1, scan.states + 1, dtype=A.dtype, device=u.device).unsqueeze(-1)  # (N, 1)

    for part in scan.parts:
        h, a, g = (scan.buffer(part) for _ in range(3))
        h_steps, a_steps, g_steps = (buffer.unbind(0) for buffer in (h, a, g))
        A_k, D_k = scan.A[part[1]], None if D is None else scan.D[part[1]]
        carry = torch.zeros_like(h[0]) if grad_last is None else grad_last[part].clone()
        for index, span in reversed(list(enumerate(scan.spans))):
            where = _where(scan, part, span)
            h[0] = starts[index, *part]
            u_t, B_t, C_t, step, raw = scan.replay(where, part, (h, h_steps), (a, a_steps))
            dy = _load(dy_rows, where, scan.dtype)
            count = len(u_t)

            if z is not None:
                z_t = _load(scan.z, where, scan.dtype)
                y_t = _sum_states(h[1 : count + 1], C_t)
                if D is not None:
                    y_t.addcmul_(u_t, D_k)
                gate = torch.sigmoid(z_t)
                _store(dz_rows, where, dy * y_t * gate * (1 + z_t * (1 - gate)))
                dy = dy * gate * z_t

            _store(dC_rows, where, _sum_channels(h[1 : count + 1], dy))
            torch.mul(dy.unsqueeze(-2), C_t, out=g[:count])
            g[count - 1].add_(carry)
            for t in range(count - 2, -1, -1):
                g_steps[t].addcmul_(a_steps[t + 1], g_steps[t + 1])
            torch.mul(a[0], g[0], out=carry)

            dx = _sum_states(g[:count], B_t)
            _store(dB_rows, where, _sum_channels(g[:count], step * u_t))
            du_t, dstep = dx * step, dx * u_t
            w = h[:count].mul_(g[:count]).mul_(a[:count])  # dh_t / d(delta_t A) = a_t h_{t-1}
            if tied:
                w = _sum_states(w, ramp.expand(*w.shape[:4], -1, -1).contiguous())
                dstep.addcmul_(w, A_k)
                dA[part[1]] += w.mul_(step).sum((0, 1))
            else:
                dstep.add_(_sum_by_channel(w, A_k))
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
        if initial is not None:
            dinitial[part] = carry

    if shared:
        du[:, 0] = du_rows.flatten(-2)
    dA = dA.flatten(1) if tied else dA.transpose(2, 3).flatten(1, 2)
    dD, dbias = (None if total is None else total.flatten(1) for total in (dD, dbias))
    dinitial = None if initial is None else dinitial.transpose(3, 4).flatten(2, 3)
    return du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial
