"""What goes with the kernels of triton_scan.py: weights packed, segments joined, partial sums added."""

# ruff: noqa: E741, RUF005 (Triton has no unpacking)
import torch
import triton
import triton.language as tl

PACK_TILE = 1024  # weights of a program of `pack_kernel`
CARRY_TILE = 8, 32  # segments and states that a program of `carry_kernel`, one warp, reads at once
SUM_TILE = 8, 256  # rows and columns that a program of `sum_kernel`, one warp, adds at once
QUAD = tl.constexpr(4)  # B and C alternate by so many states


@triton.jit
def pack_kernel(xs, strides, rows_ptr, G, L, num_state, BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr):
    """B and C (b, k, g, l, n) as rows of which one load takes a step's weights: four of B, four of C, ..."""
    l = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    l = l[:, None].to(tl.int64)  # (L, 1)
    n = tl.arange(0, BLOCK_N)[None, :].to(tl.int64)  # (1, N)
    kg = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    row = (b * tl.num_programs(1) + kg) * L + l
    mask = (l < L) & (n < num_state)
    for i in tl.static_range(len(xs)):
        x_ptr = xs[i] + b * strides[i][0] + kg // G * strides[i][1] + kg % G * strides[i][2]
        x = tl.load(x_ptr + l * strides[i][3] + n * strides[i][4], mask=mask, other=0.0)
        at = row * (len(xs) * BLOCK_N) + (n // QUAD * len(xs) + i) * QUAD + n % QUAD
        tl.store(rows_ptr + at, x.to(tl.float32), mask=l < L)


def pack(B, C, block_n):
    """B and C (b, K, G, l, N), padded to block_n states, as rows (b, K, G, l, 2 block_n)."""
    batch, directions, groups, length, states = B.shape
    rows = torch.empty(*B.shape[:4], 2 * block_n, dtype=torch.float32, device=B.device)
    block_l = max(1, PACK_TILE // block_n)
    pack_kernel[triton.cdiv(length, block_l), directions * groups, batch](
        (B, C), (B.stride(), C.stride()), rows, groups, length, states, BLOCK_L=block_l, BLOCK_N=block_n
    )
    return rows


@triton.jit(do_not_specialize=["segments", "size"])
def carry_kernel(
    ends_ptr, decays_ptr, first_ptr, segments, size,
    BACKWARDS: tl.constexpr, AHEAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """h_{s+1} = decays_s h_s + ends_s, segment after segment; h_s takes the place of ends_s."""
    j = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b = tl.program_id(1).to(tl.int64)
    if first_ptr is not None:
        h = tl.load(first_ptr + b * size + j, mask=j < size, other=0.0)
    else:
        h = tl.zeros((BLOCK,), dtype=tl.float32)
    step = size.to(tl.int64)
    at = b * segments * step + j
    if BACKWARDS:
        at += (segments - 1) * step
        step = -step
    for start in range(0, segments, AHEAD):
        ends = ()
        decays = ()
        for i in tl.static_range(AHEAD):
            mask = (j < size) & (start + i < segments)
            ends = ends + (tl.load(ends_ptr + at + i * step, mask=mask, other=0.0),)
            decays = decays + (tl.load(decays_ptr + at + i * step, mask=mask, other=0.0),)
        for i in tl.static_range(AHEAD):
            tl.store(ends_ptr + at + i * step, h, mask=(j < size) & (start + i < segments))
            h = decays[i] * h + ends[i]
        at += AHEAD * step


def carry(ends, decays, first, backwards):
    """In place, ends (b, segments, K, N, d) become what each segment starts from, the whole from `first`."""
    size, (ahead, block) = ends[0, 0].numel(), CARRY_TILE
    carry_kernel[triton.cdiv(size, block), len(ends)](
        ends, decays, first, ends.shape[1], size, backwards, ahead, block, num_warps=1
    )


@triton.jit
def sum_rows(x_ptr, out_ptr, rows, columns, block, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """One block of columns of out = x.sum(0), in float32, ROWS rows loaded before they are added."""
    j = block.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    j_mask = j < columns
    at = x_ptr + j
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for start in range(0, rows, ROWS):
        xs = ()
        for i in tl.static_range(ROWS):
            xs = xs + (tl.load(at, mask=j_mask & (start + i < rows), other=0.0),)
            at += columns
        for i in tl.static_range(ROWS):
            total += xs[i].to(tl.float32)
    tl.store(out_ptr + j, total, mask=j_mask)


@triton.jit
def sum_kernel(xs, outs, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out = x.sum(0) of each of these matrices (rows, columns), in one launch over all blocks of columns."""
    block = tl.program_id(0)
    for i in tl.static_range(len(xs)):
        blocks = tl.cdiv(columns[i], COLUMNS)
        if (block >= 0) & (block < blocks):
            sum_rows(xs[i], outs[i], rows[i], columns[i], block, ROWS, COLUMNS)
        block -= blocks


def sums(partials, like):
    """The sum of each partial over its first dimension, in the dtype of its `like`; None for None."""
    found = [
        None if x is None else torch.empty(x.shape[1:], dtype=y.dtype, device=x.device)
        for x, y in zip(partials, like, strict=True)
    ]
    xs, outs = (tuple(x for x in xs if x is not None) for xs in (partials, found))
    columns = tuple(y.numel() for y in outs)
    blocks = sum(triton.cdiv(size, SUM_TILE[1]) for size in columns)
    sum_kernel[(blocks,)](xs, outs, tuple(len(x) for x in xs), columns, *SUM_TILE, num_warps=1)
    return found
