"""LocalMamba's windowed scan of a grid and its exact inverse, for any height, width and window.

The scan visits windows of K x K pixels one after the other and the pixels of a window row by row; windows at
the right and lower edge are cut short. Pixel (r, q) lies in window (i, j) = (r // K, q // K) of h x w pixels;
its step, which the Triton kernel computes and undoes (a CPU keeps an order for each grid), is

    l = i K W + j h K + (r - i K) w + (q - j K)          bands above, windows to the left, rows above, columns

Models need no scanned copy: `nfhelpers.directional_scan` gathers inside its kernel.
"""

import functools
import os

import torch

from . import BROKEN_INSTALL
from .orders import grid_order, inverse_order

TILE = 4096  # tokens x channels that a program moves
TILE_CHANNELS, TILE_STEPS = 64, 256  # the most of what is side by side in memory
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def local_scan(x, window, flip=False, column_first=False):
    """Pixels (B, C, H, W) window by window, (B, C, H W): x.flatten(2)[:, :, grid_order(H, W, f"w{window}")].

    With column_first windows, and pixels in a window, follow one another down the columns; flip walks
    backwards. Channels-last in memory if x is. Source: Huang et al., "LocalMamba", 2024.
    """
    return torch.ops.nfhelpers.local_scan(x.flatten(2), *x.shape[2:], window, False, flip, column_first)


def local_reverse(y, height, width, window, flip=False, column_first=False):
    """The inverse of `local_scan` with the same options: (B, C, H W) laid back on its grid (B, C, H, W)."""
    pixels = torch.ops.nfhelpers.local_scan(y, height, width, window, True, flip, column_first)
    return pixels.unflatten(2, (height, width))


@torch.library.custom_op("nfhelpers::local_scan", mutates_args=())
def _local_scan(
    x: torch.Tensor, height: int, width: int, window: int, reverse: bool, flip: bool, column_first: bool
) -> torch.Tensor:
    """Tokens (B, C, L) of a grid into the order of the scan, or with `reverse` out of it."""
    if x.shape[2] != height * width or window < 1:
        raise ValueError(f"{x.shape[2]} tokens in windows of {window} are no grid of {height} x {width}")
    result = _empty(x)
    on_gpu = x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    move = _move_by_triton if on_gpu and _kernel() is not None else _move_by_index
    bits = _INTEGERS[x.element_size()]  # only bits move: one integer dtype serves every dtype of its size
    move(x.view(bits), result.view(bits), height, width, window, reverse, flip, column_first)
    return result


@_local_scan.register_fake
def _empty(x, *options):
    """A new (B, C, L), channels-last in memory where x is."""
    if x.shape[1] > 1 and x.stride(1) < x.stride(2):
        return x.new_empty(x.shape[0], x.shape[2], x.shape[1]).transpose(1, 2)
    return x.new_empty(x.shape)


def _differentiate(ctx, grad):
    height, width, window, reverse, *others = ctx.options
    return torch.ops.nfhelpers.local_scan(grad, height, width, window, not reverse, *others), *[None] * 6


_local_scan.register_autograd(
    _differentiate, setup_context=lambda ctx, inputs, output: setattr(ctx, "options", inputs[1:])
)


@functools.lru_cache(maxsize=32)
def _source_of(height, width, window, reverse, flip, column_first, device):
    """(L,) int64 on `device`: the pixel that goes to each step, or the step that goes to each pixel."""
    with device:
        if column_first:
            order = grid_order(width, height, f"w{window}")  # positions q H + r of the transposed grid
            order = order % height * width + order // height
        else:
            order = grid_order(height, width, f"w{window}")
        order = order.flip(0) if flip else order
        return inverse_order(order) if reverse else order


def _move_by_index(source, target, *options):
    index = _source_of(*options, source.device)
    if target.is_contiguous():
        torch.gather(source, 2, index.expand_as(source), out=target)
    else:
        torch.index_select(source.transpose(1, 2), 1, index, out=target.transpose(1, 2))


@functools.cache
def _kernel():
    """The Triton kernel, or None where Triton cannot be imported."""
    global tl  # where Triton looks for the names that a kernel uses
    try:
        import triton
        import triton.language as tl
    except BROKEN_INSTALL:
        return None

    @triton.jit(do_not_specialize=["height", "width", "tall", "wide", "band"])
    def move(
        source_ptr, target_ptr, length, channels, height, width, tall, wide, band,
        source_b, source_c, source_l, target_b, target_c, target_l,
        REVERSE: tl.constexpr, FLIP: tl.constexpr, COLUMN_FIRST: tl.constexpr, CHANNELS_LAST: tl.constexpr,
        BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr,
    ):  # fmt: skip
        # One program fills BLOCK_L tokens of the target, in the order of its memory, times BLOCK_C channels.
        # (height, width) is the grid as it is walked, transposed if COLUMN_FIRST; tall x wide a whole window.
        blocks_l = tl.cdiv(length, BLOCK_L)
        blocks_c = tl.cdiv(channels, BLOCK_C)
        program = tl.program_id(0)
        token = program % blocks_l * BLOCK_L + tl.arange(0, BLOCK_L)
        c = program // blocks_l % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
        b = (program // blocks_l // blocks_c).to(tl.int64)

        at = tl.minimum(token, length - 1)  # a position that exists, so that no window is empty
        if REVERSE:  # from pixel to step
            r = at % height if COLUMN_FIRST else at // width
            q = at // height if COLUMN_FIRST else at % width
            i, j = r // tall, q // wide
            h = tl.minimum(height - i * tall, tall)
            w = tl.minimum(width - j * wide, wide)
            at = i * band + j * wide * h + (r - i * tall) * w + (q - j * wide)
            if FLIP:
                at = length - 1 - at
        else:  # from step to pixel
            if FLIP:
                at = length - 1 - at
            i = at // band
            at -= i * band
            h = tl.minimum(height - i * tall, tall)
            j = at // (h * wide)
            at -= j * (h * wide)
            w = tl.minimum(width - j * wide, wide)
            r, q = i * tall + at // w, j * wide + at % w
            at = q * height + r if COLUMN_FIRST else r * width + q

        if CHANNELS_LAST:  # the last dimension of a tile is the one side by side in memory
            at, token, c = at[:, None], token[:, None], c[None, :]
        else:
            at, token, c = at[None, :], token[None, :], c[:, None]
        mask = (token < length) & (c < channels)
        source_at = b * source_b + at.to(tl.int64) * source_l + c.to(tl.int64) * source_c
        target_at = b * target_b + token.to(tl.int64) * target_l + c.to(tl.int64) * target_c
        tl.store(target_ptr + target_at, tl.load(source_ptr + source_at, mask=mask), mask=mask)

    return move


def _move_by_triton(source, target, height, width, window, reverse, flip, column_first):
    import triton

    batch, channels, length = source.shape
    if column_first:
        height, width = width, height
    tall, wide = min(window, height), min(window, width)
    channels_last = not target.is_contiguous()
    block_c, block_l = triton.next_power_of_2(channels), triton.next_power_of_2(length)
    if channels_last:
        block_c = min(TILE_CHANNELS, block_c)
        block_l = min(TILE // block_c, block_l)
    else:
        block_l = min(TILE_STEPS, block_l)
        block_c = min(TILE // block_l, block_c)
    programs = batch * triton.cdiv(channels, block_c) * triton.cdiv(length, block_l)
    with torch.cuda.device_of(source):  # Triton launches on the current device
        _kernel()[(programs,)](
            source, target, length, channels, height, width, tall, wide, tall * width,
            *source.stride(), *target.stride(), REVERSE=reverse, FLIP=flip, COLUMN_FIRST=column_first,
            CHANNELS_LAST=channels_last, BLOCK_C=block_c, BLOCK_L=block_l,
        )  # fmt: skip
