"""LocalMamba's windowed scan of a grid and its exact inverse. Models need neither: `directional_scan` takes
the order of the grid and gathers inside its kernel."""

import torch

from .orders import grid_order, inverse_order


def local_scan(x, window, flip=False, column_first=False):
    """Pixels (B, C, H, W) window by window, (B, C, H W): x.flatten(2)[:, :, grid_order(H, W, f"w{window}")].

    With column_first windows, and pixels in a window, follow one another down the columns; flip walks
    backwards. Channels-last in memory if x is. Source: Huang et al., "LocalMamba", 2024.
    """
    return _take(x.flatten(2), _order(*x.shape[2:], window, flip, column_first, x.device))


def local_reverse(y, height, width, window, flip=False, column_first=False):
    """The inverse of `local_scan` with the same options: (B, C, H W) laid back on its grid (B, C, H, W)."""
    if y.shape[2] != height * width:
        raise ValueError(f"{y.shape[2]} tokens are no grid of {height} x {width}")
    order = _order(height, width, window, flip, column_first, y.device)
    return _take(y, inverse_order(order)).unflatten(2, (height, width))


def _order(height, width, window, flip, column_first, device):
    """(L,) int64: the pixel that is visited at each step."""
    pixels = torch.arange(height * width, device=device).view(height, width)
    pixels = pixels.T if column_first else pixels
    return pixels.flatten()[grid_order(*pixels.shape, f"w{window}" + "_flip" * flip).to(device)]


def _take(x, index):
    """Tokens (B, C, L) by index, as they lie in memory."""
    channels_last = x.shape[1] > 1 and x.stride(1) < x.stride(2)
    return x.mT.index_select(1, index).mT if channels_last else x.index_select(2, index)
