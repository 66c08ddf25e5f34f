"""The scan in Triton: parallel over batch, directions and channels, state in registers.

A program is one warp: it walks one direction of one sample for a tile of channels. The gather is the address
of each load, so all directions go in one launch. Where such programs leave a GPU idle, time is cut into
segments: each is scanned from zero (its decay is exp(A sum delta)), is then told what it really starts from,
and is scanned again; the backward pass likewise, from the last to the first.

The forward kernel saves the state every STEPS steps; the backward kernel walks groups of GROUP steps from the
last to the first, recomputes the states of one group and differentiates it. Gradients that several programs
add to are one partial a program, summed afterwards: no atomics, so two runs agree bitwise. States and
parameters are float32. What makes it fast:

- A state tile is (N, D), its addresses kept from being vectorised along channels: a thread holds all N states
  of one channel (of N > 16, a part), so that sums over states, softplus and gate stay within it.
- What a step needs is loaded well before, explicitly: the compiler moves no load past a store or a barrier.
  It is loaded, and what is elementwise is done, for four steps at once: Triton's time for a kernel grows with
  (memory operations) x (operations)^2, and is nearly twice as long step by step.
- Registers decide how many warps hide each other's latency: the backward pass computes decays twice rather
  than holding them, and keeps the states of four steps, not eight.
- The matrix unit adds the gradients of B and C over channels, several steps at once, from the registers in
  which the products are; a reduction across threads would take most of the time.
Letters are those of `reference`; t is a step of the walk, a its decay exp(delta A).
"""

# ruff: noqa: RUF005 (Triton has no unpacking)
import functools

import torch
import triton
import triton.language as tl

from .triton_parts import QUAD, carry, pack, sums

STEPS = 8  # steps between saved states
GROUP = 4  # steps of a tile, and whose states the backward pass holds: STEPS or half of it
TILE = 512  # states of a program: 16 in each of 32 threads
SHORTEST = 16  # steps of a segment, a multiple of STEPS
WARPS = 16, 8  # on a multiprocessor, forward and backward: as many as registers allow
WIDE_FROM = 2**31  # offsets that need 64 bits
# No kernel is compiled anew for these (but see SEGMENTED); nor for rows_ptr: loads by fours would spill.
NUMBERS = "L span segments begins group_dim reverse blocks_per_group order_b order_k".split()
STRIDES = [f"{name}_{i}" for name in ("u", "dt", "z", "dy", "du", "ddt", "dz") for i in "bkl"]

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def reciprocal(x):
    """1 / x for x > 0: two instructions, where a division takes five."""
    r = tl.rsqrt(x)
    return r * r


@triton.jit
def softplus(x):
    """(softplus(x), sigmoid(x)) from e = exp(-|x|); log(1 + e) = 2 artanh(e / (2 + e)) keeps its digits."""
    e = tl.exp2(-tl.abs(x) * LOG2E)
    s = e * reciprocal(2.0 + e)
    q = s * s  # at most 1/9
    series = 2.0 + q * (2 / 3 + q * (2 / 5 + q * (2 / 7 + q * (2 / 9 + q * (2 / 11 + q * (2 / 13))))))
    r = reciprocal(1.0 + e)
    return tl.maximum(x, 0.0) + s * series, tl.where(x >= 0, r, e * r)


@triton.jit
def powers(e, N: tl.constexpr):
    """(N, D): e, e², ..., e^N for e (D,), by products; N a power of two."""
    p = e[:, None]  # (D, 1): e^1
    top = e
    for _ in tl.static_range(N.bit_length() - 1):
        p = tl.reshape(tl.permute(tl.join(p, p * top[:, None]), (0, 2, 1)), (e.shape[0], 2 * p.shape[1]))
        top = top * top
    return tl.permute(p, (1, 0))


@triton.jit
def decay(delta, A2, factor, TIED: tl.constexpr, N: tl.constexpr):
    """a = exp(delta A) (N, D), times a factor. A2 is A log2(e): (N, D), tied (D,) of the first state."""
    if TIED:
        return powers(tl.exp2(delta * A2) * factor, N)
    else:
        return tl.exp2(delta[None, :] * A2) * factor


@triton.jit
def load_factor(carried_ptr, row, live):
    """What the decay of a step is multiplied by."""
    if carried_ptr is None:
        return 1.0
    else:
        return tl.load(carried_ptr + row, mask=live, other=1.0)


@triton.jit
def step_size(raw, bias, SOFTPLUS: tl.constexpr):
    """delta (..., D) as the recurrence uses it, and its derivative with respect to what was loaded."""
    delta = raw.to(tl.float32)
    if bias is not None:
        delta += bias
    if SOFTPLUS:
        return softplus(delta)
    else:
        return delta, tl.full(delta.shape, 1.0, tl.float32)


@triton.jit
def advance(h, delta, u, B, A2, factor, TIED: tl.constexpr, N: tl.constexpr):
    """The state (N, D) after one more step."""
    a = decay(delta, A2, factor, TIED, N)
    x = (delta * u)[None, :] * B
    return a * h + x


@triton.jit
def left(a, b):
    return a


@triton.jit
def stack_steps(xs):
    """(..., T) of T = 2 or 4 tensors (...)."""
    if len(xs) == 2:
        return tl.join(xs[0], xs[1])
    else:
        x = tl.join(tl.join(xs[0], xs[2]), tl.join(xs[1], xs[3]))
        return tl.reshape(x, xs[0].shape + (4,))


@triton.jit
def sum_channels(xs, PRECISION: tl.constexpr):
    """Sums over d of T tiles x_t (N, D): out[r, (h T + t) S + s] = sum_d x_t[(h R + r) S + s, d].

    S = 32 / D lanes share a channel, R = min(16, N / S) rows, h counts the R S states of one pass;
    (R, N T / R), in bfloat16 with columns of zeros up to 8.
    Of operand B (k, column) of mma.m16n8 a lane holds some k of one column, in packs of W neighbours, every
    fourth pack (PTX ISA): as k = (r / W, d % 4, r % W), column = (h, t, s, d / 4) the tiles are this operand
    where they lie. Ones and zeros on its left add over d % 4. NaN spreads over its column.
    """
    x = stack_steps(xs)
    D: tl.constexpr = x.shape[1]
    T: tl.constexpr = x.shape[2]
    S: tl.constexpr = 32 // D
    R: tl.constexpr = min(16, x.shape[0] // S)
    H: tl.constexpr = x.shape[0] // (R * S)
    W: tl.constexpr = 2 if PRECISION == "bf16" else 1  # numbers of a register
    if PRECISION == "bf16":
        x = x.to(tl.bfloat16)
    x = tl.permute(tl.reshape(x, (H, R // W, W, S, D // 4, 4, T)), (1, 5, 2, 0, 6, 3, 4))
    # A reduction of single elements computes nothing. Without it Triton, seeing a join, lays the operand out
    # as for numbers half as wide, and they move.
    x = tl.reduce(tl.reshape(x, (4 * R, 8 * H * T, 1)), 2, left)
    k = tl.arange(0, 4 * R)[None, :]
    own = (k // (4 * W) * W + k % W == tl.arange(0, R)[:, None]).to(x.dtype)  # (R, 4 R)
    if PRECISION == "tf32x3":  # tf32 has 10 bits after the first: these, then the next 11
        high = (x.to(tl.int32, bitcast=True) & -(1 << 13)).to(tl.float32, bitcast=True)
        sums = tl.dot(own, high, tl.dot(own, x - high, input_precision="tf32"), input_precision="tf32")
    else:
        sums = tl.dot(own, x, input_precision="tf32")  # (R, (h, t, s, d / 4))
    if PRECISION == "bf16":
        column = tl.arange(0, max(8, H * T * S))[None, :]
        added = tl.arange(0, 8 * H * T)[:, None] // (D // 4) == column
        return tl.dot(sums.to(tl.bfloat16), added.to(tl.bfloat16))
    else:
        return tl.sum(tl.reshape(sums, (R, H * T * S, D // 4)), axis=2)


@triton.jit
def pick(t, xs):
    """xs[t] of these scalars, elementwise; the last beyond them."""
    found = xs[len(xs) - 1] + tl.zeros_like(t)
    for i in tl.static_range(len(xs) - 1):
        found = tl.where(t == i, xs[i], found)
    return found


@triton.jit
def row_at(order_ptr, t, L, backwards, WIDE: tl.constexpr):
    """Row visited at step t; steps past the end visit the last row, and what they do there is dropped."""
    t = tl.minimum(t, L - 1)
    t = tl.where(backwards, L - 1 - t, t)
    if order_ptr is not None:
        t = tl.load(order_ptr + t)
    return t.to(tl.int64) if WIDE else t.to(tl.int32)


@triton.jit
def rows_at(order_ptr, t, count: tl.constexpr, L, backwards, WIDE: tl.constexpr):
    """Rows visited at `count` steps from t on."""
    rows = ()
    for i in tl.static_range(count):
        rows = rows + (row_at(order_ptr, t + i, L, backwards, WIDE),)
    return rows


@triton.jit
def tile_at(rows, stride, columns):
    """Offsets (T, D) of these columns of T rows."""
    return pick(tl.arange(0, len(rows)), rows)[:, None] * stride + columns[None, :]


@triton.jit
def load_rows(ptr, rows, stride, columns, mask):
    """A tile (T, D), in a tuple: these columns of T rows; no tile of a tensor that is None."""
    if ptr is None:
        return ()
    else:
        return (tl.load(ptr + tile_at(rows, stride, columns), mask=mask, other=0.0),)


@triton.jit
def store_rows(ptr, rows, stride, columns, xs, mask):
    """The vectors xs (D,) of four steps, as one tile (T, D)."""
    tl.store(ptr + tile_at(rows, stride, columns), tl.permute(stack_steps(xs), (1, 0)), mask=mask)


@triton.jit
def split_steps(x):
    """The vectors (D,) of a tile (T, D) of four steps."""
    x = tl.permute(tl.reshape(tl.permute(x, (1, 0)), (x.shape[1], 2, 2)), (0, 2, 1))
    first, second = tl.split(x)
    a, b = tl.split(first)
    c, d = tl.split(second)
    return a, b, c, d


@triton.jit
def split_weights(rows, BLOCK_N: tl.constexpr):
    """B and C of one step, (N, 1), from what was loaded of its row."""
    pairs = tl.permute(tl.reshape(rows, (BLOCK_N // QUAD, 2, QUAD)), (0, 2, 1))  # B and C in turn, 4 by 4
    B, C = tl.split(pairs)
    return tl.reshape(B, (BLOCK_N, 1)), tl.reshape(C, (BLOCK_N, 1))


@triton.jit
def load_weight(ptr, second: tl.constexpr, BLOCK_N: tl.constexpr):
    """B, or C if `second`, of a row, (N, 1). They alternate by fours: reading B brings C into the cache."""
    n = tl.arange(0, BLOCK_N)
    n = tl.max_contiguous(tl.multiple_of(n // QUAD * (2 * QUAD) + n % QUAD, QUAD), QUAD)
    if second:
        ptr += QUAD
    return tl.load(ptr + n)[:, None]


@triton.jit
def place(
    L, span, segments, blocks_per_group, group_dim, dim, num_state,
    SEGMENTED: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What a program owns: sample b, direction k, both in one, with the segment too, its steps, group g of so
    many, channels, states.
    """
    block, blocks = tl.program_id(0), tl.num_programs(0)
    k = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    bk = b * tl.num_programs(1) + k
    part, first, stop = bk, 0, L
    if SEGMENTED:
        blocks = blocks // segments
        segment, block = block // blocks, block % blocks
        part = (b * segments + segment) * tl.num_programs(1) + k
        first = segment * span
        stop = tl.minimum(first + span, L)
    g = block // blocks_per_group
    groups = blocks // blocks_per_group
    within = block % blocks_per_group * BLOCK_D + tl.arange(0, BLOCK_D)
    d_mask = within < group_dim
    d = g * group_dim + within
    n = tl.arange(0, BLOCK_N)
    mask = d_mask[None, :] & (n < num_state)[:, None]
    # In 64 bits, so that a thread's states are at constant offsets of one address.
    nd = n.to(tl.int64)[:, None] * dim + d.to(tl.int64)[None, :]
    return b, k, bk, part, first, stop, g, groups, d, d_mask, nd, mask


@triton.jit(do_not_specialize=["rows_ptr", "keep", *NUMBERS, *STRIDES[:9]])
def forward_kernel(
    u_ptr, delta_ptr, A_ptr, rows_ptr, D_ptr, z_ptr, bias_ptr, order_ptr, carried_ptr,
    y_ptr, states_ptr, first_ptr, last_ptr, decays_ptr,
    u_b, u_k, u_l, dt_b, dt_k, dt_l, z_b, z_k, z_l, order_b, order_k,
    L, span, segments, begins, keep, group_dim, reverse, blocks_per_group,
    dim: tl.constexpr, num_state: tl.constexpr, SEGMENTED: tl.constexpr, ENDS: tl.constexpr,
    ADJOINT: tl.constexpr, SOFTPLUS: tl.constexpr, TIED: tl.constexpr, WIDE: tl.constexpr,
    STEPS: tl.constexpr, ROW: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # ENDS: only the state that a segment makes of zero, and its decay. ADJOINT: the same of the adjoint
    # recurrence g_{t-1} = a_t (g_t + C_t dy_t), walked the other way, with dy, gated, in place of u.
    b, k, bk, part, first, stop, g, groups, d, d_mask, nd, mask = place(
        L, span, segments, blocks_per_group, group_dim, dim, num_state, SEGMENTED, BLOCK_D, BLOCK_N
    )
    row_n = tl.arange(0, ROW)
    backwards = ((reverse >> k) & 1) == (0 if ADJOINT else 1)
    if ADJOINT:
        first, stop = L - stop, L - first
    chunks = tl.cdiv(L, STEPS)

    if TIED:
        A2 = tl.load(A_ptr + k * dim + d, mask=d_mask, other=0.0) * LOG2E
    else:
        A2 = tl.load(A_ptr + k * num_state * dim + nd, mask=mask, other=0.0) * LOG2E
    if D_ptr is not None:
        D = tl.load(D_ptr + k * dim + d, mask=d_mask, other=0.0)
    bias = None if bias_ptr is None else tl.load(bias_ptr + k * dim + d, mask=d_mask, other=0.0)
    u_ptr += b * u_b + k * u_k
    delta_ptr += b * dt_b + k * dt_k
    if not ENDS:
        y_ptr += bk * L * dim
    if carried_ptr is not None:
        carried_ptr += b * L
    rows_ptr += (bk * groups + g) * L * ROW
    if z_ptr is not None:
        z_ptr += b * z_b + k * z_k
    if order_ptr is not None:
        order_ptr += b * order_b + k * order_k

    # What a step needs is loaded one chunk ahead; the rows it will be loaded from, two.
    rows = rows_at(order_ptr, first, STEPS, L, backwards, WIDE)
    later = rows_at(order_ptr, first + STEPS, STEPS, L, backwards, WIDE)
    us, deltas, zs, weights = (), (), (), ()
    owned = d_mask[None, :]
    for i in tl.static_range(0, STEPS, 4):
        us = us + load_rows(u_ptr, rows[i : i + 4], u_l, d, owned)
        deltas = deltas + load_rows(delta_ptr, rows[i : i + 4], dt_l, d, owned)
        zs = zs + load_rows(z_ptr, rows[i : i + 4], z_l, d, owned)
        weights = weights + load_rows(rows_ptr, rows[i : i + 4], ROW, row_n, row_n[None, :] < ROW)

    if ENDS:
        h = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
        total = tl.zeros((BLOCK_D,), dtype=tl.float32)
        kept = 1.0
    else:
        h = tl.load(first_ptr + part * num_state * dim + nd, mask=mask & (begins != 0), other=0.0)
    for chunk in range(tl.cdiv(stop - first, STEPS)):
        if not ENDS:
            if keep != 0:
                saved = bk * chunks + first // STEPS + chunk
                tl.store(states_ptr + saved * num_state * dim + nd, h, mask=mask)
        later2, us2, deltas2, zs2, weights2 = (), (), (), (), ()
        for i in tl.static_range(STEPS):
            t = first + chunk * STEPS + i
            if i % 4 == 0:  # a tile of four steps
                live = (t + tl.arange(0, 4) < stop)[:, None]
                x = us[i // 4].to(tl.float32)
                u4 = split_steps(tl.where(live, x, 0.0) if ADJOINT else x)
                x, _ = step_size(deltas[i // 4], bias, SOFTPLUS)
                delta4 = split_steps(tl.where(live, x, 0.0))
                if z_ptr is not None:
                    x = zs[i // 4].to(tl.float32)
                    gate4 = split_steps(x * tl.sigmoid(x))
                weight4 = split_steps(weights[i // 4])
                y4 = ()
            u, delta = u4[i % 4], delta4[i % 4]
            B_t, C_t = split_weights(weight4[i % 4], BLOCK_N)
            later2 = later2 + (row_at(order_ptr, t + 2 * STEPS, L, backwards, WIDE),)
            if i % 4 == 3:
                later4 = later[i - 3 : i + 1]
                us2 = us2 + load_rows(u_ptr, later4, u_l, d, owned)
                deltas2 = deltas2 + load_rows(delta_ptr, later4, dt_l, d, owned)
                zs2 = zs2 + load_rows(z_ptr, later4, z_l, d, owned)
                weights2 = weights2 + load_rows(rows_ptr, later4, ROW, row_n, row_n[None, :] < ROW)

            factor = load_factor(carried_ptr, rows[i], t < stop)
            if ENDS:
                total += delta
                kept *= factor
            if ADJOINT:
                if z_ptr is not None:
                    u = u * gate4[i % 4]
                h = (h + u[None, :] * C_t) * decay(delta, A2, factor, TIED, BLOCK_N)
            else:
                h = advance(h, delta, u, B_t, A2, factor, TIED, BLOCK_N)
            if not ENDS:
                y = tl.sum(h * C_t, axis=0)
                if D_ptr is not None:
                    y += D * u
                y4 = y4 + (y * gate4[i % 4] if z_ptr is not None else y,)
                if i % 4 == 3:
                    store_rows(y_ptr, rows[i - 3 : i + 1], dim, d, y4, owned & live)
        rows, later, us, deltas, zs, weights = later, later2, us2, deltas2, zs2, weights2
    if ENDS:
        tl.store(last_ptr + part * num_state * dim + nd, h, mask=mask)
        tl.store(decays_ptr + part * num_state * dim + nd, decay(total, A2, kept, TIED, BLOCK_N), mask=mask)
    else:
        tl.store(last_ptr + bk * num_state * dim + nd, h, mask=mask & (stop == L))


@triton.jit(do_not_specialize=NUMBERS + STRIDES)
def backward_kernel(
    u_ptr, delta_ptr, A_ptr, rows_ptr, D_ptr, z_ptr, bias_ptr, order_ptr, carried_ptr,
    states_ptr, dy_ptr, dlast_ptr,
    du_ptr, ddelta_ptr, dA_ptr, dB_ptr, dC_ptr, dD_ptr, dz_ptr, dbias_ptr, dfirst_ptr, one,
    u_b, u_k, u_l, dt_b, dt_k, dt_l, z_b, z_k, z_l, order_b, order_k,
    dy_b, dy_k, dy_l, du_b, du_k, du_l, ddt_b, ddt_k, ddt_l, dz_b, dz_k, dz_l,
    L, span, segments, begins, group_dim, reverse, blocks_per_group,
    dim: tl.constexpr, num_state: tl.constexpr, SEGMENTED: tl.constexpr, SOFTPLUS: tl.constexpr,
    TIED: tl.constexpr, PRECISION: tl.constexpr, PARTS: tl.constexpr, WIDE: tl.constexpr,
    STEPS: tl.constexpr, GROUP: tl.constexpr, ROW: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    b, k, bk, part, first, stop, g, groups, d, d_mask, nd, mask = place(
        L, span, segments, blocks_per_group, group_dim, dim, num_state, SEGMENTED, BLOCK_D, BLOCK_N
    )
    backwards = ((reverse >> k) & 1) == 1
    chunks = tl.cdiv(L, STEPS)
    tl.static_assert(GROUP == 4 and GROUP % PARTS == 0)
    rank = (tl.arange(0, BLOCK_N) + 1).to(tl.float32)[:, None]  # (N, 1)

    if TIED:
        A2 = tl.load(A_ptr + k * dim + d, mask=d_mask, other=0.0) * LOG2E
        dA = tl.zeros((BLOCK_D,), dtype=tl.float32)
    else:
        A2 = tl.load(A_ptr + k * num_state * dim + nd, mask=mask, other=0.0) * LOG2E
        dA = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    if D_ptr is not None:
        D = tl.load(D_ptr + k * dim + d, mask=d_mask, other=0.0)
        dD = tl.zeros((BLOCK_D,), dtype=tl.float32)
    bias = None if bias_ptr is None else tl.load(bias_ptr + k * dim + d, mask=d_mask, other=0.0)
    dbias = tl.zeros((BLOCK_D,), dtype=tl.float32)
    u_ptr += b * u_b + k * u_k
    delta_ptr += b * dt_b + k * dt_k
    dy_ptr += b * dy_b + k * dy_k
    du_ptr += b * du_b + k * du_k
    ddelta_ptr += b * ddt_b + k * ddt_k
    rows_ptr += (bk * groups + g) * L * ROW
    if carried_ptr is not None:
        carried_ptr += b * L
    if z_ptr is not None:
        z_ptr += b * z_b + k * z_k
        dz_ptr += b * dz_b + k * dz_k
    if order_ptr is not None:
        order_ptr += b * order_b + k * order_k
    # Partial gradients of B and C: (blocks_per_group, B, K, G, L, N).
    part_at = (tl.program_id(0) % blocks_per_group * tl.num_programs(2) + b) * tl.num_programs(1) + k
    part_at = (part_at * groups + g) * L * num_state
    dB_ptr += part_at
    dC_ptr += part_at
    # Row r and column (h PARTS + t) S + s of `sum_channels` are of state (h R + r) S + s and step t.
    S: tl.constexpr = 32 // BLOCK_D
    R: tl.constexpr = min(16, BLOCK_N // S)
    columns: tl.constexpr = BLOCK_N * PARTS // R
    column = tl.arange(0, max(8, columns) if PRECISION == "bf16" else columns)[None, :]
    part_n = (column // (PARTS * S) * R + tl.arange(0, R)[:, None]) * S + column % S
    part_t = column // S % PARTS
    part_mask = (part_n < num_state) & (column < columns)

    dh = tl.load(dlast_ptr + part * num_state * dim + nd, mask=mask & (begins != 0), other=0.0)

    groups_of_steps = tl.cdiv(stop, GROUP)
    last_t = (groups_of_steps - 1) * GROUP
    rows = rows_at(order_ptr, last_t, GROUP, L, backwards, WIDE)
    step = tl.arange(0, GROUP)[:, None]  # (T, 1)
    owned = d_mask[None, :]
    us = load_rows(u_ptr, rows, u_l, d, owned)
    deltas = load_rows(delta_ptr, rows, dt_l, d, owned)
    zs = load_rows(z_ptr, rows, z_l, d, owned)
    dys = load_rows(dy_ptr, rows, dy_l, d, owned & (last_t + step < L))
    rows2 = rows_at(order_ptr, tl.maximum(last_t - GROUP, 0), GROUP, L, backwards, WIDE)
    us2 = load_rows(u_ptr, rows2, u_l, d, owned)
    deltas2 = load_rows(delta_ptr, rows2, dt_l, d, owned)
    saved = (groups_of_steps - 1) * GROUP // STEPS
    h = tl.load(states_ptr + (bk * chunks + saved) * num_state * dim + nd, mask=mask, other=0.0)
    for walked in range(groups_of_steps - first // GROUP):
        start = (groups_of_steps - 1 - walked) * GROUP
        rows3 = rows_at(order_ptr, tl.maximum(start - 2 * GROUP, 0), GROUP, L, backwards, WIDE)

        # The states once more: from the saved one up to the group, over the next group's steps ...
        if start % STEPS > 0:
            B0 = ()
            for i in tl.static_range(GROUP):
                B0 = B0 + (load_weight(rows_ptr + rows2[i] * ROW, False, BLOCK_N),)
            x, _ = step_size(deltas2[0], bias, SOFTPLUS)
            delta4 = split_steps(x)
            u4 = split_steps(us2[0].to(tl.float32))
            for i in tl.static_range(GROUP):
                factor = load_factor(carried_ptr, rows2[i], True)
                h = advance(h, delta4[i], u4[i], B0[i], A2, factor, TIED, BLOCK_N)

        # ... then within it. B and C are read well before their use: nothing else hides the latency.
        Bs = ()
        for i in tl.static_range(GROUP):
            Bs = Bs + (load_weight(rows_ptr + rows[i] * ROW, False, BLOCK_N),)
        if z_ptr is not None:
            C = load_weight(rows_ptr + rows[0] * ROW, True, BLOCK_N)
        live = start + step < L
        u4 = split_steps(us[0].to(tl.float32))
        x, slope = step_size(deltas[0], bias, SOFTPLUS)
        delta4 = split_steps(tl.where(live, x, 0.0))
        slope4 = split_steps(tl.where(live, slope, 0.0))
        x = dys[0].to(tl.float32)
        if z_ptr is not None:
            z = zs[0].to(tl.float32)
            gate = tl.sigmoid(z)
            dz4 = split_steps(x * gate * (1.0 + z * (1.0 - gate)))
            x = x * z * gate
        dy4 = split_steps(x)
        before, dzs, addends = (), (), ()
        for i in tl.static_range(GROUP):
            u, delta, dy = u4[i], delta4[i], dy4[i]
            if i == GROUP - 1:
                B2 = load_weight(rows_ptr + rows[i] * ROW, False, BLOCK_N)
                C2 = load_weight(rows_ptr + rows[i] * ROW, True, BLOCK_N)
            before = before + (h,)
            factor = load_factor(carried_ptr, rows[i], start + i < L)
            h = advance(h, delta, u, Bs[i], A2, factor, TIED, BLOCK_N)
            if z_ptr is not None:
                y = tl.sum(h * C, axis=0)
                if i < GROUP - 1:
                    C = load_weight(rows_ptr + rows[i + 1] * ROW, True, BLOCK_N)
                if D_ptr is not None:
                    y += D * u
                dzs = dzs + (dz4[i] * y,)
            addends = addends + (h * dy[None, :],)
            if len(addends) == PARTS:
                at = pick(part_t, rows[i + 1 - PARTS : i + 1]) * num_state + part_n
                valid = part_mask & (start + i + 1 - PARTS + part_t < L)
                tl.store(dC_ptr + at, sum_channels(addends, PRECISION), mask=valid)
                addends = ()
        if z_ptr is not None:
            store_rows(dz_ptr, rows, dz_l, d, dzs, owned & live)
        # The loads of the next group now: the compiler cannot move a load past a store.
        us3 = load_rows(u_ptr, rows3, u_l, d, owned)
        deltas3 = load_rows(delta_ptr, rows3, dt_l, d, owned)
        dys2 = load_rows(dy_ptr, rows2, dy_l, d, owned)
        zs2 = load_rows(z_ptr, rows2, z_l, d, owned)

        # And backwards through them.
        dus, ddeltas, addends = (), (), ()
        for i in tl.static_range(GROUP - 1, -1, -1):
            u, delta, dy = u4[i], delta4[i], dy4[i]
            B, C = B2, C2
            if i > 0:
                B2 = load_weight(rows_ptr + rows[i - 1] * ROW, False, BLOCK_N)
                C2 = load_weight(rows_ptr + rows[i - 1] * ROW, True, BLOCK_N)
            if i == 1:
                saved2 = tl.maximum(start - GROUP, 0) // STEPS
                h2 = tl.load(states_ptr + (bk * chunks + saved2) * num_state * dim + nd, mask=mask, other=0.0)
            dh += dy[None, :] * C
            # `one` keeps the compiler from holding every decay of the group until here: computing it again is
            # cheaper than memory.
            a = decay(delta * one, A2, load_factor(carried_ptr, rows[i], start + i < L), TIED, BLOCK_N)
            dx = tl.sum(dh * B, axis=0)
            du = delta * dx
            ddelta = u * dx
            addends = (dh * (delta * u)[None, :],) + addends
            if len(addends) == PARTS:
                at = pick(part_t, rows[i : i + PARTS]) * num_state + part_n
                valid = part_mask & (start + i + part_t < L)
                tl.store(dB_ptr + at, sum_channels(addends, PRECISION), mask=valid)
                addends = ()
            dh = dh * a
            da = dh * before[i]  # gradient with respect to delta A
            if TIED:
                ranked = tl.sum(da * rank, axis=0)
                ddelta += ranked * A2 * LN2
                dA += delta * ranked
            else:
                ddelta += tl.sum(da * A2, axis=0) * LN2
                dA += delta[None, :] * da
            if D_ptr is not None:
                du += dy * D
                dD += dy * u
            ddelta *= slope4[i]
            if bias_ptr is not None:
                dbias += ddelta
            dus = (du,) + dus
            ddeltas = (ddelta,) + ddeltas
        store_rows(du_ptr, rows, du_l, d, dus, owned & live)
        store_rows(ddelta_ptr, rows, ddt_l, d, ddeltas, owned & live)
        h, dys, zs = h2, dys2, zs2
        rows, us, deltas = rows2, us2, deltas2
        rows2, us2, deltas2 = rows3, us3, deltas3

    if dfirst_ptr is not None:
        tl.store(dfirst_ptr + bk * num_state * dim + nd, dh, mask=mask & (first == 0))
    if TIED:
        tl.store(dA_ptr + part * dim + d, dA, mask=d_mask)
    else:
        tl.store(dA_ptr + part * num_state * dim + nd, dA, mask=mask)
    if D_ptr is not None:
        tl.store(dD_ptr + part * dim + d, dD, mask=d_mask)
    if bias_ptr is not None:
        tl.store(dbias_ptr + part * dim + d, dbias, mask=d_mask)


def states_shape(batch, directions, length, channels, states):
    """Shape of what `forward` saves for `backward`: the state before every STEPS-th step."""
    return (batch, directions, triton.cdiv(length, STEPS), states, channels)


def _channels_last(x):
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _strides(**tensors):
    """{"u_b": ..., "u_k": ..., "u_l": ...} for each of these tensors (b, k, l, d) or None."""
    return {f"{n}_{'bkl'[i]}": 0 if x is None else x.stride(i) for n, x in tensors.items() for i in range(3)}


def _is_wide(length, *widths):
    """Whether offsets within a sample and direction need 64 bits; 32 halve the address arithmetic."""
    steps = [x if isinstance(x, int) else x.stride(2) for x in widths if x is not None]
    return length * max(steps) >= WIDE_FROM


def _carries(arguments, grid, first, adjoint=False):
    """What each segment starts from, (b, segments, K, N, d); the whole from `first` or zero."""
    count, states, channels = (arguments[name] for name in ("segments", "num_state", "dim"))
    if count == 1:
        return first
    both = 2, grid[2], count, grid[1], states, channels
    ends, decays = arguments["u_ptr"].new_empty(both, dtype=torch.float32)
    forward_kernel[grid](
        **arguments | dict(D_ptr=None, z_ptr=arguments["z_ptr"] if adjoint else None),
        y_ptr=None, states_ptr=None, first_ptr=None, last_ptr=ends, decays_ptr=decays,
        begins=0, keep=0, ENDS=True, ADJOINT=adjoint,
    )  # fmt: skip
    carry(ends, decays, first, adjoint)
    return ends


def _arguments(warps, u, delta, A, B, C, D, z, bias, _, order, carried, reverse, softplus, tied):
    """What both kernels take, by name, and the grid: one program a channel block, direction and sample, and a
    segment, of which there are as many as the GPU has room for, so many warps on each multiprocessor.
    """
    batch, directions, length, channels = delta.shape
    groups, states = B.shape[2], B.shape[4]
    u, delta, z = (_channels_last(x) for x in (u, delta, z))
    u, order = u.expand(delta.shape), None if order is None else order.contiguous()
    block_n = triton.next_power_of_2(states)
    block_d = 32 if min(TILE // block_n, triton.next_power_of_2(channels // groups)) >= 32 else 16
    block_n = max(block_n, 128 // block_d)  # four states of a thread, the fewest that the matrix unit adds
    blocks = triton.cdiv(channels // groups, block_d)
    room = torch.cuda.get_device_properties(u.device).multi_processor_count if u.is_cuda else 2
    count = min(room * warps // (groups * blocks * directions * batch), length // SHORTEST)
    span = STEPS * triton.cdiv(length, STEPS * count) if count > 2 else max(1, length)  # it is scanned twice
    count = max(1, triton.cdiv(length, span))
    arguments = dict(
        u_ptr=u, delta_ptr=delta, A_ptr=A if tied else A.transpose(1, 2).contiguous(),
        rows_ptr=pack(B, C, block_n), D_ptr=D, z_ptr=z, bias_ptr=bias, order_ptr=order, carried_ptr=carried,
        **_strides(u=u, dt=delta, z=z),
        order_b=0 if order is None or order.shape[0] == 1 else order.stride(0),
        order_k=0 if order is None else order.stride(1),
        # One segment as a constant: the tied scan without orders gains 5% by it, others lose 1 to 2%.
        SEGMENTED=count > 1 or order is not None or not tied,
        L=length, span=span, segments=count, reverse=reverse, dim=channels,
        group_dim=channels // groups, num_state=states, blocks_per_group=blocks, SOFTPLUS=softplus, TIED=tied,
        WIDE=_is_wide(length, 2 * block_n, channels, u, delta, z),
        STEPS=STEPS, ROW=2 * block_n, BLOCK_D=block_d, BLOCK_N=block_n, num_warps=1,
        maxnreg=128 if block_n <= 16 else 255,  # 128: four warps a scheduler
    )  # fmt: skip
    return arguments, (count * groups * blocks, directions, batch)


def forward(u, delta, A, B, C, D, z, bias, initial, order, carried, reverse, softplus, tied, keep_states):
    """(y, last, states) of the operation that reference.py describes."""
    given = (u, delta, A, B, C, D, z, bias, initial, order, carried, reverse, softplus, tied)
    batch, directions, length, channels = delta.shape
    new = functools.partial(torch.empty, dtype=torch.float32, device=u.device)
    y = new(delta.shape, dtype=u.dtype)
    last = new(batch, directions, B.shape[4], channels)
    saved = new(states_shape(*delta.shape, B.shape[4]) if keep_states else (0,))
    with torch.cuda.device_of(u):  # Triton launches on the current device
        arguments, grid = _arguments(WARPS[0], *given)
        first = _carries(arguments, grid, None if initial is None else initial.transpose(2, 3).contiguous())
        forward_kernel[grid](
            **arguments, begins=int(first is not None), keep=int(keep_states), y_ptr=y,
            first_ptr=last if first is None else first,  # any pointer, where nothing is read
            states_ptr=saved, last_ptr=last, decays_ptr=None, ENDS=False, ADJOINT=False,
        )  # fmt: skip
    return y, last.transpose(2, 3).contiguous(), saved


def backward(
    grad_y, grad_last, states, u, delta, A, B, C, D, z, bias, initial, order, carried, reverse, softplus, tied
):
    """Gradients of u, delta, A, B, C, D, z, bias and initial; None for an argument that is None."""
    given = (u, delta, A, B, C, D, z, bias, initial, order, carried, reverse, softplus, tied)
    batch, directions, length, channels = delta.shape
    groups, num_state = B.shape[2], B.shape[4]
    grad_y = _channels_last(grad_y)
    grad_last = None if grad_last is None else grad_last.transpose(2, 3).contiguous()
    new = functools.partial(torch.empty, dtype=torch.float32, device=u.device)
    du, ddelta = (new(delta.shape, dtype=x.dtype) for x in (u, delta))
    dz = None if z is None else new(z.shape, dtype=z.dtype)
    # bfloat16 B and C: partial sums and products in bfloat16; float16 ones: products cut to tf32's 11 bits.
    partial = torch.bfloat16 if B.dtype == C.dtype == torch.bfloat16 else torch.float32
    precision = "tf32x3" if torch.float32 in (B.dtype, C.dtype) else "tf32"
    precision = "bf16" if partial is torch.bfloat16 else precision
    dinitial = None if initial is None else new(batch, directions, num_state, channels)
    with torch.cuda.device_of(u):
        arguments, grid = _arguments(WARPS[1], *given)
        arguments["WIDE"] |= _is_wide(length, grad_y)
        dys = dict(zip(("u_b", "u_k", "u_l"), grad_y.stride(), strict=False))
        grad_last = _carries(arguments | dict(u_ptr=grad_y, **dys), grid, grad_last, adjoint=True)
        per_channel = (batch * arguments["segments"], directions, channels)
        dA = new(per_channel if tied else (*per_channel[:2], num_state, channels))
        per_row = (arguments["blocks_per_group"], batch, directions, groups, length, num_state)
        dB, dC = (new(per_row, dtype=partial) for _ in "BC")
        dD, dbias = (None if x is None else new(per_channel) for x in (D, bias))
        backward_kernel[grid](
            **arguments | dict(maxnreg=255), begins=int(grad_last is not None), states_ptr=states,
            dy_ptr=grad_y, dlast_ptr=states if grad_last is None else grad_last,
            du_ptr=du, ddelta_ptr=ddelta, dA_ptr=dA, dB_ptr=dB, dC_ptr=dC, dD_ptr=dD, dz_ptr=dz,
            dbias_ptr=dbias, dfirst_ptr=dinitial, one=1.0, **_strides(dy=grad_y, du=du, ddt=ddelta, dz=dz),
            PRECISION=precision, GROUP=GROUP,
            PARTS=4 if precision == "bf16" else 2,  # steps whose sums over channels are taken at once
        )  # fmt: skip
        dA, dD, dbias, dB, dC = sums((dA, dD, dbias, dB, dC), (A, D, bias, B, C))  # the slowest first
    du = du.sum(1, keepdim=True) if u.shape[1] < directions else du
    dinitial = None if initial is None else dinitial.transpose(2, 3)
    return du, ddelta, dA if tied else dA.transpose(1, 2), dB, dC, dD, dz, dbias, dinitial
