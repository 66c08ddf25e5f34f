"""LocalMamba's windowed scan of a grid and its exact inverse, for any height, width and window.

The scan visits windows of K x K pixels one after the other and the pixels of a window row by row; windows at
the right and lower edge are cut short. Pixel (r, q) lies in window (i, j) = (r // K, q // K) of h x w pixels;
its step, which the Triton kernel computes and undoes (a CPU keeps an order for each grid), is

    l = i K W + j h K + (r - i K) w + (q - j K)          bands above, windows to the left, rows above, columns
"""

import functools
import os

import torch

from . import installed
from .operation import is_transformed
from .orders import grid_order, inverse_order

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def local_scan(x, window, flip=False, column_first=False):
    """Pixels (B, C, H, W) window by window, (B, C, H W): x.flatten(2)[:, :, grid_order(H, W, f"w{window}")].

    With column_first windows, and pixels in a window, follow one another down the columns; flip walks
    backwards. Channels-last in memory if x is. Source: Huang et al., "LocalMamba", 2024.
    """
    return _run(x.flatten(2), *x.shape[2:], window, False, flip, column_first)


def local_reverse(y, height, width, window, flip=False, column_first=False):
    """The inverse of `local_scan` with the same options: (B, C, H W) laid back on its grid (B, C, H, W)."""
    return _run(y, height, width, window, True, flip, column_first).unflatten(2, (height, width))


def _run(x, *options):
    if is_transformed():  # an operation has no tangent and, for torch.func, no gradient
        return x.index_select(2, _source_of.__wrapped__(*options, x.device))
    return torch.ops.nfhelpers.local_scan(x, *options)


@torch.library.custom_op("nfhelpers::local_scan", mutates_args=())
def _move(
    x: torch.Tensor, height: int, width: int, window: int, reverse: bool, flip: bool, column_first: bool
) -> torch.Tensor:
    """Tokens (B, C, L) of a grid into the order of the scan, or with `reverse` out of it."""
    if x.shape[2] != height * width or window < 1:
        raise ValueError(f"{x.shape[2]} tokens in windows of {window} are no grid of {height} x {width}")
    result = _empty(x)
    move = _move_by_index
    if (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1") and installed("triton") == "ok":
        from .triton_local import move
    bits = _INTEGERS[x.element_size()]  # only bits move: one integer dtype serves every dtype of its size
    move(x.view(bits), result.view(bits), height, width, window, reverse, flip, column_first)
    return result


@_move.register_fake
def _empty(x, *options):
    """A new (B, C, L), channels-last in memory where x is."""
    if x.shape[1] > 1 and x.stride(1) < x.stride(2):
        return x.new_empty(x.shape[0], x.shape[2], x.shape[1]).transpose(1, 2)
    return x.new_empty(x.shape)


def _undo(ctx, grad):
    height, width, window, reverse, *others = ctx.options
    return _run(grad, height, width, window, not reverse, *others), *[None] * 6


_move.register_autograd(_undo, setup_context=lambda ctx, inputs, output: setattr(ctx, "options", inputs[1:]))


@functools.lru_cache(maxsize=32)
def _source_of(height, width, window, reverse, flip, column_first, device):
    """(L,) int64 on `device`: the pixel that goes to each step, or the step that goes to each pixel."""
    with device:
        pixels = torch.arange(height * width).view(height, width)
        pixels = pixels.T if column_first else pixels
        order = pixels.flatten()[grid_order(*pixels.shape, f"w{window}" + "_flip" * flip)]
        return inverse_order(order) if reverse else order


def _move_by_index(source, target, *options):
    index = _source_of(*options, source.device)
    if target.is_contiguous():
        torch.gather(source, 2, index.expand_as(source), out=target)
    else:
        torch.index_select(source.transpose(1, 2), 1, index, out=target.transpose(1, 2))
