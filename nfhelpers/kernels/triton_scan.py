"""Selective scan in Triton: serial in time, parallel over batch and channels, state in registers.

One program owns `BLOCK_D` channels of one sample and walks the sequence in chunks of `CHUNK` steps. The
forward kernel keeps the state at the start of every chunk; the backward kernel walks the chunks from last to
first, recomputes the states of one chunk in registers and differentiates it. What several programs contribute
to (gradients of B, C, A, D and delta_bias) is written as one partial per program and summed afterwards, so
there are no atomics and two backward runs agree bitwise. States and parameters are float32 whatever the
inputs are.

A state tile is (N, H, W): n, then channels as H rows of W side by side. States are stored with channels
contiguous, which makes Triton lay W along neighbouring lanes, N across the other lanes and H within a lane:
sums over n and over channels then cross few lanes.

Glossary
    b, d, l, n  batch, channel, time step, state
    g           group of channels that shares B and C
    a           decay exp(delta A) of one step
    p           p(x) = (exp(x) - 1) / x, the zero-order-hold weight of the input
"""

import functools

import torch
import triton
import triton.language as tl

CHUNK = 4  # steps whose states the backward pass holds in registers
BLOCK_D = 32  # channels per program
WIDTH = 8  # of which side by side in a warp; a thread holds BLOCK_D / WIDTH channels and N / 4 states of each

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


# ------------------------------------------------------------------------------------------ device functions


@triton.jit
def softplus(x):
    """max(x, 0) + log(1 + e), e = exp(-|x|) <= 1; 2 artanh(e / (2 + e)) is a precise log(1 + e)."""
    e = tl.exp2(-tl.abs(x) * LOG2E)
    s = e / (2.0 + e)
    q = s * s  # at most 1/9
    series = 1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q / 13)))))
    return tl.maximum(x, 0.0) + 2.0 * s * series


@triton.jit
def hold_weight(x, a):
    """p(x) = (a - 1) / x with a = exp(x); its Taylor series near 0, where the difference cancels."""
    series = 1.0 + x * (0.5 + x * (1.0 / 6 + x * (1.0 / 24 + x * (1.0 / 120 + x / 720))))
    small = tl.abs(x) < 0.1
    return tl.where(small, series, (a - 1.0) / tl.where(small, 1.0, x))


@triton.jit
def hold_slope(x, a, p):
    """p'(x) = (a - p) / x; its Taylor series near 0."""
    series = 0.5 + x * (1.0 / 3 + x * (1.0 / 8 + x * (1.0 / 30 + x * (1.0 / 144 + x / 840))))
    small = tl.abs(x) < 0.1
    return tl.where(small, series, (a - p) / tl.where(small, 1.0, x))


# --------------------------------------------------------------------------------------------------- kernels


@triton.jit
def channel_tile(g, block, group_dim, BLOCK_D: tl.constexpr, WIDTH: tl.constexpr):
    """Channels of one program, (H, W), and which of them exist."""
    h = tl.arange(0, BLOCK_D // WIDTH)
    w = tl.arange(0, WIDTH)
    within = block * BLOCK_D + h[:, None] * WIDTH + w[None, :]
    return g * group_dim + within, within < group_dim


@triton.jit
def sum_channels(x):
    """(N, H, W) -> (N,): first within a thread, then across threads."""
    return tl.sum(tl.sum(x, axis=1), axis=1)


@triton.jit
def load_step(ptr, base, stride_l, t, mask):
    return tl.load(ptr + base + t * stride_l, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["dim", "group_dim"])
def forward_kernel(
    u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, out_ptr, states_ptr, last_ptr,
    u_b, u_d, u_l, dt_b, dt_d, dt_l, z_b, z_d, z_l, o_b, o_d, o_l,
    B_b, B_g, B_n, B_l, C_b, C_g, C_n, C_l,
    L, dim, group_dim, num_state, num_chunks, blocks_per_group,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    HOLD: tl.constexpr, B_CONST: tl.constexpr, C_CONST: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1) // blocks_per_group
    block = tl.program_id(1) % blocks_per_group
    d, d_mask = channel_tile(g, block, group_dim, BLOCK_D, WIDTH)  # (H, W)
    n = tl.arange(0, BLOCK_N)
    n_mask = n < num_state
    dn_mask = n_mask[:, None, None] & d_mask[None]
    dn = n[:, None, None] * dim + d[None]  # (N, H, W), channels contiguous in memory

    A2 = tl.load(A_ptr + dn, mask=dn_mask, other=0.0) * LOG2E  # so that exp(delta A) = exp2(delta A2)
    if B_CONST:
        B = tl.load(B_ptr + dn, mask=dn_mask, other=0.0)
    if C_CONST:
        C = tl.load(C_ptr + dn, mask=dn_mask, other=0.0)
    if HAS_D:
        D = tl.load(D_ptr + d, mask=d_mask, other=0.0)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + d, mask=d_mask, other=0.0)
    u_base = b * u_b + d * u_d
    dt_base = b * dt_b + d * dt_d
    z_base = b * z_b + d * z_d
    o_base = b * o_b + d * o_d
    B_base = b * B_b + g * B_g + n * B_n
    C_base = b * C_b + g * C_g + n * C_n

    h = tl.zeros((BLOCK_N, BLOCK_D // WIDTH, WIDTH), dtype=tl.float32)
    for chunk in range(num_chunks):
        state_at = (b * num_chunks + chunk) * dim * num_state + dn
        tl.store(states_ptr + state_at, h, mask=dn_mask)
        for i in tl.static_range(CHUNK):
            t = chunk * CHUNK + i
            live = t < L
            u = load_step(u_ptr, u_base, u_l, t, d_mask & live)
            delta = load_step(delta_ptr, dt_base, dt_l, t, d_mask & live)
            if HAS_BIAS:
                delta += bias
            if SOFTPLUS:
                delta = softplus(delta)
            delta = tl.where(live, delta, 0.0)
            if not B_CONST:
                B = load_step(B_ptr, B_base, B_l, t, n_mask & live)[:, None, None]
            if not C_CONST:
                C = load_step(C_ptr, C_base, C_l, t, n_mask & live)[:, None, None]
            x2 = delta[None] * A2
            a = tl.exp2(x2)
            if HOLD:
                h = a * h + (delta * u)[None] * hold_weight(x2 * LN2, a) * B
            else:
                h = a * h + (delta * u)[None] * B
            y = tl.sum(h * C, axis=0)
            if HAS_D:
                y += D * u
            if HAS_Z:
                z = load_step(z_ptr, z_base, z_l, t, d_mask & live)
                y = y * z * tl.sigmoid(z)
            tl.store(out_ptr + o_base + t * o_l, y, mask=d_mask & live)
    tl.store(last_ptr + b * dim * num_state + dn, h, mask=dn_mask)


@triton.jit(do_not_specialize=["dim", "group_dim"])
def backward_kernel(
    u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, states_ptr, dout_ptr, dlast_ptr,
    du_ptr, ddelta_ptr, dz_ptr, dA_ptr, dB_ptr, dC_ptr, dD_ptr, dbias_ptr,
    u_b, u_d, u_l, dt_b, dt_d, dt_l, z_b, z_d, z_l, o_b, o_d, o_l, du_b, du_d, du_l,
    B_b, B_g, B_n, B_l, C_b, C_g, C_n, C_l,
    L, batch, dim, group_dim, num_state, num_chunks, num_groups, blocks_per_group,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    HOLD: tl.constexpr, B_CONST: tl.constexpr, C_CONST: tl.constexpr, HAS_DLAST: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1) // blocks_per_group
    block = tl.program_id(1) % blocks_per_group
    d, d_mask = channel_tile(g, block, group_dim, BLOCK_D, WIDTH)  # (H, W)
    n = tl.arange(0, BLOCK_N)
    n_mask = n < num_state
    dn_mask = n_mask[:, None, None] & d_mask[None]
    dn = n[:, None, None] * dim + d[None]  # (N, H, W), channels contiguous in memory
    bdn = b * dim * num_state + dn

    A2 = tl.load(A_ptr + dn, mask=dn_mask, other=0.0) * LOG2E  # so that exp(delta A) = exp2(delta A2)
    dA = tl.zeros((BLOCK_N, BLOCK_D // WIDTH, WIDTH), dtype=tl.float32)
    if B_CONST:
        B = tl.load(B_ptr + dn, mask=dn_mask, other=0.0)
        dB_sum = tl.zeros((BLOCK_N, BLOCK_D // WIDTH, WIDTH), dtype=tl.float32)
    if C_CONST:
        C = tl.load(C_ptr + dn, mask=dn_mask, other=0.0)
        dC_sum = tl.zeros((BLOCK_N, BLOCK_D // WIDTH, WIDTH), dtype=tl.float32)
    if HAS_D:
        D = tl.load(D_ptr + d, mask=d_mask, other=0.0)
        dD = tl.zeros((BLOCK_D // WIDTH, WIDTH), dtype=tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + d, mask=d_mask, other=0.0)
        dbias = tl.zeros((BLOCK_D // WIDTH, WIDTH), dtype=tl.float32)
    u_base = b * u_b + d * u_d
    dt_base = b * dt_b + d * dt_d
    z_base = b * z_b + d * z_d
    o_base = b * o_b + d * o_d
    du_base = b * du_b + d * du_d
    B_base = b * B_b + g * B_g + n * B_n
    C_base = b * C_b + g * C_g + n * C_n
    # partial gradients of B and C: (blocks_per_group, B, G, L, N)
    partial = ((block * batch + b) * num_groups + g) * L * num_state + n

    if HAS_DLAST:
        dh = tl.load(dlast_ptr + bdn, mask=dn_mask, other=0.0).to(tl.float32)
    else:
        dh = tl.zeros((BLOCK_N, BLOCK_D // WIDTH, WIDTH), dtype=tl.float32)

    for reverse in range(num_chunks):
        chunk = num_chunks - 1 - reverse
        state_at = (b * num_chunks + chunk) * dim * num_state + dn
        h = tl.load(states_ptr + state_at, mask=dn_mask, other=0.0)
        states = (h,)
        for i in tl.static_range(CHUNK):
            t = chunk * CHUNK + i
            live = t < L
            u = load_step(u_ptr, u_base, u_l, t, d_mask & live)
            delta = load_step(delta_ptr, dt_base, dt_l, t, d_mask & live)
            if HAS_BIAS:
                delta += bias
            if SOFTPLUS:
                delta = softplus(delta)
            delta = tl.where(live, delta, 0.0)
            if not B_CONST:
                B = load_step(B_ptr, B_base, B_l, t, n_mask & live)[:, None, None]
            x2 = delta[None] * A2
            a = tl.exp2(x2)
            if HOLD:
                h = a * h + (delta * u)[None] * hold_weight(x2 * LN2, a) * B
            else:
                h = a * h + (delta * u)[None] * B
            states = states + (h,)  # noqa: RUF005 (Triton has no unpacking)

        for i in tl.static_range(CHUNK - 1, -1, -1):
            t = chunk * CHUNK + i
            live = t < L
            h = states[i + 1]
            u = load_step(u_ptr, u_base, u_l, t, d_mask & live)
            raw = load_step(delta_ptr, dt_base, dt_l, t, d_mask & live)
            if HAS_BIAS:
                raw += bias
            if SOFTPLUS:
                delta = softplus(raw)
            else:
                delta = raw
            delta = tl.where(live, delta, 0.0)
            if not B_CONST:
                B = load_step(B_ptr, B_base, B_l, t, n_mask & live)[:, None, None]
            if not C_CONST:
                C = load_step(C_ptr, C_base, C_l, t, n_mask & live)[:, None, None]
            dy = load_step(dout_ptr, o_base, o_l, t, d_mask & live)
            if HAS_Z:
                z = load_step(z_ptr, z_base, z_l, t, d_mask & live)
                gate = tl.sigmoid(z)
                y = tl.sum(h * C, axis=0)
                if HAS_D:
                    y += D * u
                dz = dy * y * gate * (1.0 + z * (1.0 - gate))
                tl.store(dz_ptr + du_base + t * du_l, dz, mask=d_mask & live)
                dy = dy * z * gate
            if C_CONST:
                dC_sum += dy[None] * h
            else:
                dC_t = sum_channels(dy[None] * h)
                tl.store(dC_ptr + partial + t * num_state, dC_t, mask=n_mask & live)
            dh += dy[None] * C
            x2 = delta[None] * A2
            a = tl.exp2(x2)
            da = dh * states[i] * a  # gradient with respect to delta A
            du = tl.zeros((BLOCK_D // WIDTH, WIDTH), dtype=tl.float32)
            if HAS_D:
                du = dy * D
                dD += dy * u
            if HOLD:
                p = hold_weight(x2 * LN2, a)
                dhB = dh * B
                du += delta * tl.sum(dhB * p, axis=0)
                ddelta = tl.sum(da * A2 * LN2 + u[None] * dhB * a, axis=0)
                dA += delta[None] * (da + (delta * u)[None] * dhB * hold_slope(x2 * LN2, a, p))
                db = dh * p * (delta * u)[None]
            else:
                dhB = tl.sum(dh * B, axis=0)
                du += delta * dhB
                ddelta = tl.sum(da * A2, axis=0) * LN2 + u * dhB
                dA += delta[None] * da
                db = dh * (delta * u)[None]
            if B_CONST:
                dB_sum += db
            else:
                dB_t = sum_channels(db)
                tl.store(dB_ptr + partial + t * num_state, dB_t, mask=n_mask & live)
            if SOFTPLUS:
                ddelta = ddelta * tl.sigmoid(raw)
            ddelta = tl.where(live, ddelta, 0.0)
            if HAS_BIAS:
                dbias += ddelta
            tl.store(du_ptr + du_base + t * du_l, du, mask=d_mask & live)
            tl.store(ddelta_ptr + du_base + t * du_l, ddelta, mask=d_mask & live)
            dh = dh * a

    tl.store(dA_ptr + bdn, dA, mask=dn_mask)
    if B_CONST:
        tl.store(dB_ptr + bdn, dB_sum, mask=dn_mask)
    if C_CONST:
        tl.store(dC_ptr + bdn, dC_sum, mask=dn_mask)
    if HAS_D:
        tl.store(dD_ptr + b * dim + d, dD, mask=d_mask)
    if HAS_BIAS:
        tl.store(dbias_ptr + b * dim + d, dbias, mask=d_mask)


# -------------------------------------------------------------------------------------------------- autograd


def _launch_arguments(u, delta, A, B, C, D, z, delta_bias, delta_softplus, discretization):
    """Shapes, strides and compile-time flags that both kernels take."""
    batch, dim, length = u.shape
    num_state = A.shape[0]
    num_groups = max(t.shape[1] if t.dim() == 4 else 1 for t in (B, C))
    group_dim = dim // num_groups
    block_d = min(BLOCK_D, triton.next_power_of_2(group_dim))
    blocks_per_group = triton.cdiv(group_dim, block_d)
    sizes = dict(
        L=length,
        dim=dim,
        group_dim=group_dim,
        num_state=num_state,
        num_chunks=triton.cdiv(length, CHUNK),
        blocks_per_group=blocks_per_group,
    )
    flags = dict(
        HAS_D=D is not None,
        HAS_Z=z is not None,
        HAS_BIAS=delta_bias is not None,
        SOFTPLUS=delta_softplus,
        HOLD=discretization == "zoh",
        B_CONST=B.dim() == 2,
        C_CONST=C.dim() == 2,
        CHUNK=CHUNK,
        BLOCK_D=block_d,
        BLOCK_N=triton.next_power_of_2(num_state),
        WIDTH=min(WIDTH, block_d),
    )
    strides = [*u.stride(), *delta.stride(), *((0, 0, 0) if z is None else z.stride())]
    BC_strides = [s for t in (B, C) for s in ((0, 0, 0, 0) if t.dim() == 2 else t.stride())]
    grid = (batch, num_groups * blocks_per_group)
    return grid, strides, BC_strides, sizes, flags


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, z, delta_bias, delta_softplus, discretization):
        arguments = (u, delta, A, B, C, D, z, delta_bias)
        grid, strides, BC_strides, sizes, flags = _launch_arguments(
            *arguments, delta_softplus, discretization
        )
        batch, dim, num_state = u.shape[0], sizes["dim"], sizes["num_state"]
        out = torch.empty_like(u)
        states = torch.empty(batch, sizes["num_chunks"], num_state, dim, device=u.device)
        last = torch.empty(batch, num_state, dim, device=u.device)  # (B, N, D)
        forward_kernel[grid](
            u, delta, A, B, C, D, z, delta_bias, out, states, last,
            *strides, *out.stride(), *BC_strides, **sizes, **flags, num_warps=1,
        )  # fmt: skip
        ctx.save_for_backward(*arguments, states)
        ctx.delta_softplus, ctx.discretization = delta_softplus, discretization
        ctx.set_materialize_grads(False)
        return out, last

    @staticmethod
    def backward(ctx, dout, dlast):
        # once_differentiable would let a second derivative through as zero when dout is a constant.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph=True: the Triton scan has no second derivative; use backend='reference'"
            )
        *arguments, states = ctx.saved_tensors
        u, delta, A, B, C, D, z, delta_bias = arguments
        grid, strides, BC_strides, sizes, flags = _launch_arguments(
            *arguments, ctx.delta_softplus, ctx.discretization
        )
        batch, dim, length = u.shape
        num_state, blocks = sizes["num_state"], sizes["blocks_per_group"]
        num_groups = grid[1] // blocks
        dout = torch.zeros_like(u) if dout is None else dout
        dlast = None if dlast is None else dlast.contiguous()
        new = functools.partial(torch.empty, device=u.device)
        du, ddelta = torch.empty_like(u), torch.empty_like(u, dtype=delta.dtype)
        dz = None if z is None else torch.empty_like(u, dtype=z.dtype)
        dA = new(batch, num_state, dim)
        dB, dC = (
            new(batch, num_state, dim) if t.dim() == 2 else new(blocks, batch, num_groups, length, num_state)
            for t in (B, C)
        )
        dD = None if D is None else new(batch, dim)
        dbias = None if delta_bias is None else new(batch, dim)
        backward_kernel[grid](
            u, delta, A, B, C, D, z, delta_bias, states, dout, dlast, du, ddelta, dz, dA, dB, dC, dD, dbias,
            *strides, *dout.stride(), *du.stride(), *BC_strides, batch=batch, num_groups=num_groups,
            **sizes, **flags, HAS_DLAST=dlast is not None, num_warps=1,
        )  # fmt: skip
        dB, dC = (
            partial.sum(0) if t.dim() == 2 else partial.sum(0).transpose(2, 3).to(t.dtype)
            for partial, t in ((dB, B), (dC, C))
        )
        dD = None if D is None else dD.sum(0)
        dbias = None if delta_bias is None else dbias.sum(0)
        return du, ddelta, dA.sum(0), dB, dC, dD, dz, dbias, None, None


def selective_scan_triton(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False,
    discretization="mamba",
):  # fmt: skip
    """`nfhelpers.selective_scan` on a GPU: arguments, shapes and result of `selective_scan_reference`."""
    batch = u.shape[0]
    A = A.float().t().contiguous()  # (N, D): channels side by side in memory
    D, delta_bias = (None if t is None else t.float().contiguous() for t in (D, delta_bias))
    B, C = (t.float().t().contiguous() if t.dim() == 2 else t[:, None] if t.dim() == 3 else t for t in (B, C))
    groups = max(t.shape[1] if t.dim() == 4 else 1 for t in (B, C))
    B, C = (t if t.dim() == 2 else t.expand(batch, groups, -1, -1) for t in (B, C))
    out, last = _SelectiveScan.apply(u, delta, A, B, C, D, z, delta_bias, delta_softplus, discretization)
    return (out, last.transpose(1, 2)) if return_last_state else out
