"""LocalMamba's windowed scan of a grid and its exact inverse, for any height, width and window.

A windowed scan visits windows of `window` x `window` pixels one after the other and the pixels of a window
row by row. Windows at the right and lower edge are cut short: every pixel is one token and nothing is padded.
With K = window, pixel (r, q) of an (H, W) grid lies in window (i, j) = (r // K, q // K), which has
h = min(K, H - i K) rows and w = min(K, W - j K) columns, and its step is

    l = i K W + j h K + (r - i K) w + (q - j K)          bands above, windows to the left, rows above, columns

which integer divisions undo. The Triton kernel computes this in registers; the PyTorch twin gathers with an
order that is kept for each grid. Both only move tokens, so a result holds the very bits of its input.

In a model of ours no scanned copy is needed: `nfhelpers.directional_scan` with the orders
`kernels.orders.grid_order(H, W, kind)` ("h", "v", "w2", "w7" and their flips) gathers inside its kernel and
covers the directions of LocalMamba's SS2D. The two functions here have the interface of its peers, for code
that scans, runs a sequence model and scans back, and to compare with.

b batch, c channel, r row, q column, l step of the scan; L = H W.
"""

import functools
import os
import warnings

import torch

from . import BROKEN_INSTALL
from .orders import grid_order, inverse_order

TILE = 4096  # tokens x channels that a program moves
TILE_CHANNELS = 64  # of them channels, where channels are side by side in memory
TILE_STEPS = 256  # of them steps, where steps are
_ORDERS_KEPT = 32  # grids whose order the twin remembers, 8 L bytes each
_INT32_MAX = 2**31 - 1
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


# ------------------------------------------------------------------------------------------ public functions


def local_scan(x, window, flip=False, column_first=False):
    """Pixels of a grid as a sequence, window by window.

    local_scan(x, N) is x.flatten(2)[:, :, grid_order(H, W, "w<N>")]. With column_first, windows follow one
    another down the columns of windows and pixels down the columns of a window:
    local_scan(x, N, column_first=True) is local_scan(x.transpose(2, 3), N). A window of 1, or one that covers
    the grid, gives the plain scan by rows or columns.

    Memory: x is read once and the result written once. The result is channels-last in memory when x is
    (channels closer together than pixels), else channels-first. Writes are of whole runs of memory in both,
    and so are reads of channels-last; reads of channels-first are runs of `window` pixels, whose neighbours
    the same program or the next one takes from the cache. The twin also reads an index of L int64, and copies
    an x whose pixels are not evenly spaced before it gathers.

    Args:
        x: (B, C, H, W), not empty, any dtype and strides.
        window: side of a window in pixels, at least 1.
        flip: walk backwards, from the last step to the first.
        column_first: by columns, of windows and inside them.

    Returns:
        (B, C, H * W) in x's dtype. Differentiable any number of times: the gradient goes through
        `local_reverse`. CUDA tensors take the Triton kernel (so do CPU tensors under TRITON_INTERPRET=1),
        others the PyTorch twin; so does a CUDA tensor where Triton cannot be imported, and a warning says it.

    Raises:
        ValueError: not a tensor, a shape other than (B, C, H, W), an empty x, a window that is not a whole
            number of at least 1, a flag that is not a bool.

    Source: Huang et al., "LocalMamba: Visual State Space Model with Windowed Selective Scan", 2024; seed 000.
    """
    _check_tensor("x", x, "(B, C, H, W)", (8, 96, 56, 56))
    _check_options(window, flip, column_first)
    # Larger windows than the grid all give one order, and 64 bits always hold the sides of a grid.
    return torch.ops.nfhelpers.local_scan(x, min(window, max(x.shape[2:])), flip, column_first)


def local_reverse(y, height, width, window, flip=False, column_first=False):
    """The inverse of `local_scan` with the same options: a sequence laid back on its grid.

    Args:
        y: (B, C, L) with L = height * width, not empty, any dtype and strides.
        height, width: of the grid, at least 1.
        window, flip, column_first: as in `local_scan`.

    Returns:
        (B, C, height, width) in y's dtype: local_reverse(local_scan(x, ...), H, W, ...) holds the bits of x.
        Layout, memory traffic and derivative are as in `local_scan`, with the roles exchanged.

    Raises:
        ValueError: as `local_scan`, and when L is not height * width.
    """
    _check_tensor("y", y, "(B, C, L)", (8, 96, 3136))
    for name, size in (("height", height), ("width", width)):
        _check_whole(name, size, 56)
    _check_options(window, flip, column_first)
    if y.shape[2] != height * width:
        raise ValueError(
            f"y has shape {tuple(y.shape)}, L={y.shape[2]}; a grid of height={height}, width={width} wants "
            f"L={height * width}"
        )
    window = min(window, max(height, width))
    return torch.ops.nfhelpers.local_reverse(y, height, width, window, flip, column_first)


def _check_tensor(name, x, dims, example):
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"{name} is a {type(x).__name__}; pass a tensor {dims} such as {example}")
    if x.dim() != len(example) or 0 in x.shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; pass {dims} such as {example}, not empty")


def _check_whole(name, value, example):
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r}; it must be whole and at least 1, such as {example}")


def _check_options(window, flip, column_first):
    _check_whole("window", window, 7)
    for name, flag in (("flip", flip), ("column_first", column_first)):
        if not isinstance(flag, bool):
            raise ValueError(f"{name}={flag!r}; pass True or False")


# -------------------------------------------------------------------------------------------- registered ops


@torch.library.custom_op("nfhelpers::local_scan", mutates_args=())
def _local_scan(x: torch.Tensor, window: int, flip: bool, column_first: bool) -> torch.Tensor:
    return _rearrange(x, _empty_steps(x), x.shape[2:], False, window, flip, column_first)


@torch.library.custom_op("nfhelpers::local_reverse", mutates_args=())
def _local_reverse(
    y: torch.Tensor, height: int, width: int, window: int, flip: bool, column_first: bool
) -> torch.Tensor:
    return _rearrange(y, _empty_grid(y, height, width), (height, width), True, window, flip, column_first)


@_local_scan.register_fake
def _(x, window, flip, column_first):
    return _empty_steps(x)


@_local_reverse.register_fake
def _(y, height, width, window, flip, column_first):
    return _empty_grid(y, height, width)


def _scan_context(ctx, inputs, output):
    x, *ctx.options = inputs
    ctx.size = x.shape[2:]


def _scan_backward(ctx, grad):
    return torch.ops.nfhelpers.local_reverse(grad, *ctx.size, *ctx.options), None, None, None


def _reverse_context(ctx, inputs, output):
    _, _, _, *ctx.options = inputs


def _reverse_backward(ctx, grad):
    return torch.ops.nfhelpers.local_scan(grad, *ctx.options), None, None, None, None, None


_local_scan.register_autograd(_scan_backward, setup_context=_scan_context)
_local_reverse.register_autograd(_reverse_backward, setup_context=_reverse_context)


def _is_channels_last(x):
    """Whether channels, dimension 1, are closer together in memory than what follows them."""
    strides = [stride for size, stride in zip(x.shape[2:], x.stride()[2:], strict=True) if size > 1]
    return bool(strides) and x.shape[1] > 1 and x.stride(1) < min(strides)


def _empty_steps(x):
    """(B, C, L) for the pixels of x (B, C, H, W), in x's memory layout."""
    batch, channels, height, width = x.shape
    if _is_channels_last(x):
        return x.new_empty(batch, height * width, channels).transpose(1, 2)
    return x.new_empty(batch, channels, height * width)


def _empty_grid(y, height, width):
    """(B, C, H, W) for the steps of y (B, C, L), in y's memory layout."""
    batch, channels = y.shape[:2]
    if _is_channels_last(y):
        return y.new_empty(batch, height, width, channels).permute(0, 3, 1, 2)
    return y.new_empty(batch, channels, height, width)


def _as_steps(target):
    """A new tensor of pixels or steps as (B, C, L), tokens in the order of its memory; a view."""
    return target.view(*target.shape[:2], -1)


def _rearrange(source, target, size, reverse, *options):
    """Fill and return `target`: steps (B, C, L) from pixels (B, C, H, W), or with `reverse` the other way."""
    if source.is_complex():
        _rearrange(source.real, target.real, size, reverse, *options)
        _rearrange(source.imag, target.imag, size, reverse, *options)
        return target
    # Only bits move: one integer dtype for each size of an element serves every dtype.
    bits = _INTEGERS[source.element_size()]
    move = _move_by_triton if _takes_triton(source) else _move_by_index
    move(source.view(bits), target.view(bits), size, reverse, *options)
    return target


def _takes_triton(x):
    return (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1") and _kernel() is not None


# ---------------------------------------------------------------------------------------------- PyTorch twin


@functools.lru_cache(maxsize=_ORDERS_KEPT)
def _source_of(height, width, reverse, window, flip, column_first, device):
    """(L,) int64 on `device`: the pixel that goes to each step, or the step that goes to each pixel."""
    with device:
        if column_first:
            order = grid_order(width, height, f"w{window}")  # positions q H + r of the transposed grid
            order = order % height * width + order // height
        else:
            order = grid_order(height, width, f"w{window}")
        order = order.flip(0) if flip else order
        return inverse_order(order) if reverse else order


def _move_by_index(source, target, size, reverse, window, flip, column_first):
    index = _source_of(*size, reverse, window, flip, column_first, source.device)
    source, flat = source.flatten(2), _as_steps(target)  # (B, C, L) both
    if _is_channels_last(flat):
        torch.index_select(source.transpose(1, 2), 1, index, out=flat.transpose(1, 2))
    else:
        torch.gather(source, 2, index.expand_as(source), out=flat)


# ---------------------------------------------------------------------------------------------------- Triton


@functools.cache
def _kernel():
    """The Triton kernel, or None with a warning where Triton cannot be imported."""
    global tl  # where Triton looks for the names that a kernel uses
    try:
        import triton
        import triton.language as tl
    except BROKEN_INSTALL as error:
        warnings.warn(f"local_scan runs in PyTorch: Triton cannot be imported ({error})", stacklevel=2)
        return None

    @triton.jit(do_not_specialize=["height", "width", "tall", "wide", "band"])
    def move(
        source_ptr, target_ptr, length, channels, height, width, tall, wide, band,
        source_b, source_c, source_r, source_q, target_b, target_c, target_l,
        REVERSE: tl.constexpr, FLIP: tl.constexpr, COLUMN_FIRST: tl.constexpr, CHANNELS_LAST: tl.constexpr,
        LONG: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr,
    ):  # fmt: skip
        # One program fills BLOCK_L tokens of the target, in the order of its memory, times BLOCK_C channels.
        # (height, width) is the grid as it is walked, transposed if COLUMN_FIRST; tall x wide a whole window.
        blocks_l = tl.cdiv(length, BLOCK_L)
        blocks_c = tl.cdiv(channels, BLOCK_C)
        program = tl.program_id(0)
        block = program % blocks_l
        if LONG:
            block = block.to(tl.int64)
        token = block * BLOCK_L + tl.arange(0, BLOCK_L)
        c = program // blocks_l % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
        b = (program // blocks_l // blocks_c).to(tl.int64)

        at = tl.minimum(token, length - 1)  # a position that exists, so that no window is empty
        if REVERSE:  # from pixel to step
            if COLUMN_FIRST:
                q, r = at // height, at % height
            else:
                r, q = at // width, at % width
            i, j = r // tall, q // wide
            h = tl.minimum(height - i * tall, tall)
            w = tl.minimum(width - j * wide, wide)
            step = i * band + j * wide * h + (r - i * tall) * w + (q - j * wide)
            if FLIP:
                step = length - 1 - step
            source_at = step.to(tl.int64) * source_r
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
            source_at = r.to(tl.int64) * source_r + q.to(tl.int64) * source_q

        target_at = token.to(tl.int64) * target_l
        source_ch = b * source_b + c.to(tl.int64) * source_c
        target_ch = b * target_b + c.to(tl.int64) * target_c
        if CHANNELS_LAST:  # the last dimension of a tile is the one side by side in memory
            mask = (token < length)[:, None] & (c < channels)[None, :]
            source_at = source_at[:, None] + source_ch[None, :]
            target_at = target_at[:, None] + target_ch[None, :]
        else:
            mask = (token < length)[None, :] & (c < channels)[:, None]
            source_at = source_at[None, :] + source_ch[:, None]
            target_at = target_at[None, :] + target_ch[:, None]
        tl.store(target_ptr + target_at, tl.load(source_ptr + source_at, mask=mask), mask=mask)

    return move


def _power_of_2(n):
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def _move_by_triton(source, target, size, reverse, window, flip, column_first):
    (batch, channels), (height, width) = source.shape[:2], size
    length = height * width
    if column_first:
        height, width = width, height
        source = source if reverse else source.transpose(2, 3)
    source_strides = (*source.stride(), 0) if reverse else source.stride()
    tall, wide = min(window, height), min(window, width)
    channels_last = _is_channels_last(target)
    if channels_last:
        block_c = min(TILE_CHANNELS, _power_of_2(channels))
        block_l = min(TILE // block_c, _power_of_2(length))
    else:
        block_l = min(TILE_STEPS, _power_of_2(length))
        block_c = min(TILE // block_l, _power_of_2(channels))
    programs = batch * -(-channels // block_c) * -(-length // block_l)
    with torch.cuda.device_of(source):  # Triton launches on the current device
        _kernel()[(programs,)](
            source, target, length, channels, height, width, tall, wide, tall * width,
            *source_strides, *_as_steps(target).stride(),
            REVERSE=reverse, FLIP=flip, COLUMN_FIRST=column_first, CHANNELS_LAST=channels_last,
            LONG=length > _INT32_MAX - block_l, BLOCK_C=block_c, BLOCK_L=block_l,
        )  # fmt: skip
