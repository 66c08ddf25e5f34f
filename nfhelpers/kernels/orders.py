"""Orders in which a scan visits points of the plane or pixels of a grid, and their inverses.

An order is a permutation of the L token positions: the scan visits token `order[k]` at step k. So
`x.gather(1, order[..., None].expand_as(x))` sorts tokens (B, L, D); `inverse_order(order)` puts them back.
"""

import re

import torch

POINT_ORDERS = ("row", "column", "diagonal", "antidiagonal", "serpentine", "hilbert")
GRID_ORDERS = ("h", "v", "w7")  # LocalMamba's; there is "w<N>" for any N, and each with "_flip"
_HILBERT_BITS = 16


def point_order(coords, kind, bands=None):
    """Scan order (B, L) int64 of sets of points: coords (B, L, 2), (x, y) in [0, 1]; kind: of POINT_ORDERS.

    "diagonal" sorts by x + y, then x; "antidiagonal" by x - y, then x; "serpentine" walks every second row
    that holds a point backwards; "hilbert" follows Hilbert's curve (1891). Points that coincide keep their
    order. Lines are told apart in float32, safely up to 700 x 700 pixels; bands: in their place stripes of
    width 1 / bands, so that points of two grids are walked together. A GPU's coordinates go unchecked.
    """
    if kind not in POINT_ORDERS:
        raise ValueError(f"kind={kind!r} is not an order of points; choose one of {POINT_ORDERS}")
    if _is_read(coords) and not bool(((coords >= 0) & (coords <= 1)).all()):  # NaN compares false
        raise ValueError(f"coords spans {coords.min():.4g} ... {coords.max():.4g}; pass (x, y) in [0, 1]")
    x, y = coords.detach().float().unbind(-1)  # (B, L) each
    if kind == "hilbert":
        return torch.argsort(_hilbert_index(x, y), dim=-1, stable=True)
    key, then = {"column": (x, y), "diagonal": (x + y, x), "antidiagonal": (x - y, x)}.get(kind, (y, x))
    line = _lines(key) if bands is None else (key * bands + 0.5 * ("diagonal" in kind)).floor()
    return _sort_by(line, torch.where(line % 2 == 0, x, -x) if kind == "serpentine" else then)


def _is_read(x):
    """Whether values are checked: reading them back from a GPU would stall it, and a trace has none."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _sort_by(major, minor):
    """Order by `major`, then `minor`, then position: stable sorts by the least significant key first."""
    order = torch.argsort(minor, dim=-1, stable=True)
    return order.gather(-1, torch.argsort(major.gather(-1, order), dim=-1, stable=True))


def _lines(key):
    """Number the distinct values of each row of key (B, L) in rising order; rounding makes no gap."""
    ordered, order = key.sort(dim=-1)
    gap = torch.diff(ordered, dim=-1, prepend=ordered[:, :1]) > 4 * torch.finfo(key.dtype).eps
    return torch.empty_like(order).scatter_(-1, order, gap.cumsum(-1))


def _hilbert_index(x, y):
    """Position along the Hilbert curve of 2^16 x 2^16 cells: two bits a level, coarsest quadrant first."""
    side = 2**_HILBERT_BITS
    # Rounding, not flooring, keeps pixel centres off the boundaries of cells.
    x, y = ((side * value).round().clamp(0, side - 1).int() for value in (x, y))
    index = torch.zeros_like(x, dtype=torch.int64)
    for bit in reversed(range(_HILBERT_BITS)):
        right, upper = (x >> bit) & 1, (y >> bit) & 1
        index = (index << 2) | ((3 * right) ^ upper)
        # Turn the quadrant so that the curve inside it has the orientation of the whole.
        mirror = right * (1 - upper) * (side - 1)
        x, y = x ^ mirror, y ^ mirror
        swap = (x ^ y) * (1 - upper)
        x, y = x ^ swap, y ^ swap
    return index


def grid_order(height, width, kind):
    """Scan order (height * width,) int64 of the pixels of a grid, whose positions count row by row.

    kind: "h" row by row, "v" column by column, "w<N>" windows of N x N pixels, row by row inside a window and
    from window to window; each with "_flip", which walks backwards. Source: Huang et al., "LocalMamba", 2024.
    """
    match = re.fullmatch(r"(h|v|w([1-9]\d*))(_flip)?", kind)
    if match is None:
        raise ValueError(f"kind={kind!r} is no order of a grid; pass 'h', 'v' or 'w7', or one with '_flip'")
    pixels = torch.arange(height * width)
    if match[1] == "h":
        order = pixels
    elif match[1] == "v":
        order = pixels.view(height, width).T.flatten()
    else:
        size = min(int(match[2]), max(height, width))
        row, column = pixels // width, pixels % width
        window = row // size * -(-width // size) + column // size
        order = torch.argsort(window, stable=True)
    return order.flip(0) if match[3] else order


def check_permutation(order):
    """Raise ValueError unless order (..., L), if any, visits each of L tokens once. A GPU's is not read."""
    if order is None or not _is_read(order):
        return
    length = order.shape[-1]
    low, high = (bound.item() for bound in order.aminmax())
    inside = 0 <= low and high < length
    if not inside or not torch.zeros(order.shape, dtype=torch.bool).scatter_(-1, order.long(), True).all():
        raise ValueError(f"an order holds {low} ... {high}; pass permutations of 0 ... {length - 1}")


def inverse_order(order):
    """The permutation (..., L) that undoes `order` (..., L): inverse[order[k]] = k."""
    check_permutation(order)
    steps = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order, memory_format=torch.contiguous_format).scatter_(-1, order, steps)
