"""Orders in which a scan visits points of the plane or pixels of a grid, and their inverses.

An order is a permutation `order` of the L token positions: token `order[k]` is visited at step k. So
`x.gather(1, order[..., None].expand_as(x))` sorts tokens (B, L, D), and gathering with `inverse_order(order)`
puts them back.
"""

import re

import torch

from nfhelpers.flow import check_unit_range

POINT_ORDERS = ("row", "column", "diagonal", "antidiagonal", "serpentine", "hilbert")
_HILBERT_BITS = 16


def point_order(coords, kind):
    """Scan order of a batch of point sets.

    Points on a line that the scan follows (a row, a diagonal ...) are told apart from those on the next line
    with a tolerance of four rounding errors of float32, so that a diagonal of a regular grid is one line
    although its sums x + y differ in their last bits. Lines that are closer run into one: grids of up to
    700 x 700 pixels are safe whatever their aspect. Points that coincide keep the order they came in.
    Serpentine counts the rows that hold a point and walks every second one backwards.

    Args:
        coords: (B, L, 2) floating, (x, y) in [0, 1]. Compared in float32 whatever the dtype, so that a
            float64 copy is scanned like its original. Half precision does not hold every pixel centre (of
            sides that are powers of two, float16 does up to 1024 pixels and bfloat16 up to 128): the points
            it names are scanned as they are.
        kind: "row", "column", "diagonal" (x + y, then x), "antidiagonal" (x - y, then x), "serpentine",
            "hilbert".

    Returns:
        (B, L) int64, one permutation of 0 ... L-1 a sample.

    Raises:
        ValueError: not a tensor, a shape other than (B, L, 2), a dtype that is not floating, an unknown kind;
            coordinates on the CPU that are not in [0, 1] (on a GPU they are not read back: Hilbert order
            takes points outside as on the border).

    Source: the four directions of seed 001; Hilbert, "Ueber die stetige Abbildung einer Linie auf ein
    Flaechenstueck", 1891.
    """
    if kind not in POINT_ORDERS:
        raise ValueError(f"kind={kind!r} is not an order of points; choose one of {POINT_ORDERS}")
    if not isinstance(coords, torch.Tensor):
        raise ValueError(f"coords is a {type(coords).__name__}; pass a tensor (B, L, 2) such as (8, 204, 2)")
    if coords.dim() != 3 or coords.shape[-1] != 2 or 0 in coords.shape:
        raise ValueError(
            f"coords has shape {tuple(coords.shape)}; pass (B, L, 2) such as (8, 204, 2), not empty"
        )
    if not coords.is_floating_point():
        raise ValueError(f"coords is {coords.dtype}; pass (x, y) in [0, 1] as float32")
    check_unit_range("coords", coords, "(x, y)")
    coords = coords.detach().float()
    x, y = coords.unbind(-1)  # (B, L) each
    if kind == "row":
        return _sort_by(_lines(y), x)
    if kind == "column":
        return _sort_by(_lines(x), y)
    if kind == "diagonal":
        return _sort_by(_lines(x + y), x)
    if kind == "antidiagonal":
        return _sort_by(_lines(x - y), x)
    if kind == "serpentine":
        row = _lines(y)
        return _sort_by(row, torch.where(row % 2 == 0, x, -x))
    return torch.argsort(_hilbert_index(x, y), dim=-1, stable=True)


def _is_read(x):
    """Whether values are checked: reading them back from a GPU would stall it, and a trace has none."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _sort_by(major, minor):
    """Order by `major`, then `minor`, then position: stable sorts by the least significant key first."""
    order = torch.argsort(minor, dim=-1, stable=True)
    return order.gather(-1, torch.argsort(major.gather(-1, order), dim=-1, stable=True))


def _lines(key):
    """Number the distinct values of each row of key (B, L) in rising order; a gap of rounding size is no gap.

    Rounding to a fixed raster would tear apart equal values that happen to lie at a raster boundary.
    """
    ordered, order = key.sort(dim=-1)
    gap = torch.diff(ordered, dim=-1, prepend=ordered[:, :1]) > 4 * torch.finfo(key.dtype).eps
    return torch.empty_like(order).scatter_(-1, order, gap.cumsum(-1))


def _hilbert_index(x, y):
    """Position along the Hilbert curve of 2^16 x 2^16 cells: two bits a level, coarsest quadrant first.

    Rounding (not flooring) to cells keeps pixel centres of grids below 2^16 off the cell boundaries.
    """
    side = 2**_HILBERT_BITS
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
    """Scan order of the pixels of a grid, whose positions count row by row.

    Args:
        height, width: at least 1.
        kind: "h" row by row, "v" column by column, "w<N>" windows of N x N pixels, row by row inside a window
            and from window to window, windows at the far edges cut short; each with "_flip", which walks
            backwards.

    Returns:
        (height * width,) int64 permutation.

    Raises:
        ValueError: a size that is not a whole number of at least 1, or an unknown kind.

    Source: LocalMamba, Huang et al., 2024 (seed 000).
    """
    for size in (height, width):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(
                f"height={height!r}, width={width!r}; both must be whole and at least 1, such as 32, 32"
            )
    match = re.fullmatch(r"(h|v|w([1-9]\d*))(_flip)?", kind) if isinstance(kind, str) else None
    if match is None:
        raise ValueError(
            f"kind={kind!r} is not an order of a grid; pass 'h', 'v' or 'w<N>' such as 'w7', or 'h_flip'"
        )
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


def inverse_order(order):
    """The permutation that undoes `order`: inverse[order[k]] = k.

    Args:
        order: (..., L) int64, a permutation of 0 ... L-1 along the last dimension.

    Raises:
        ValueError: not an int64 tensor, no dimension, or, on the CPU, not a permutation.
    """
    if not isinstance(order, torch.Tensor):
        raise ValueError(f"order is a {type(order).__name__}; pass an int64 tensor (..., L)")
    if order.dtype != torch.int64 or order.dim() == 0:
        raise ValueError(f"order is {order.dtype} of shape {tuple(order.shape)}; pass int64 (..., L)")
    length = order.shape[-1]
    if _is_read(order) and not bool(((order >= 0) & (order < length)).all()):
        raise ValueError(
            f"order has entries outside 0 ... {length - 1}; pass a permutation such as point_order returns"
        )
    steps = torch.arange(length, device=order.device)
    inverse = torch.full_like(order, -1).scatter_(-1, order, steps.expand_as(order))
    if _is_read(inverse) and bool((inverse < 0).any()):
        raise ValueError("order names a position twice; pass a permutation such as point_order returns")
    return inverse


def neighbour_steps(coords, orders, neighbours=4, among=None):
    """How far back in each order a scan has met the points that lie nearest in the plane.

    Time and memory are O(B L^2). Of points that are equally near, those that come first in `coords` count.

    Args:
        coords: (B, L, 2) floating, (x, y).
        orders: (B, K, L) int64, permutations as `point_order` returns them, stacked.
        neighbours: M, how many nearest points of every point; it is not one of its own.
        among: (B, L) bool, the points that may be neighbours; None for all.

    Returns:
        (B, K, L, M) int64, nearest first: n for a neighbour that the scan meets n steps before the point, -n
        for one that it meets n steps after it, of which a causal scan knows nothing there.

    Raises:
        ValueError: shapes or dtypes that do not fit, fewer than M points that may be a point's neighbours.
    """
    shape = tuple(getattr(coords, "shape", ()))
    if len(shape) != 3 or shape[2] != 2 or 0 in shape:
        raise ValueError(f"coords has shape {shape}; pass a tensor (B, L, 2) such as (8, 204, 2), not empty")
    batch, length, _ = coords.shape
    shape = tuple(getattr(orders, "shape", ()))
    if len(shape) != 3 or shape[0] != batch or shape[2] != length:
        raise ValueError(f"orders has shape {shape}; the points ask for (B, K, L) = ({batch}, K, {length})")
    among = torch.ones_like(coords[..., 0], dtype=torch.bool) if among is None else among
    if among.shape != (batch, length) or among.dtype != torch.bool:
        raise ValueError(
            f"among is {among.dtype} of shape {tuple(among.shape)}; pass bool ({batch}, {length})"
        )
    available = int((among.sum(-1, keepdim=True) - among.long()).min())
    if isinstance(neighbours, bool) or not isinstance(neighbours, int) or not 1 <= neighbours <= available:
        raise ValueError(
            f"neighbours={neighbours!r} of every point were asked for, and one of them has {available}; pass "
            "a whole number from 1 to that, such as 4 of 5 points or more"
        )
    apart = (coords[:, :, None].float() - coords[:, None].float()).norm(dim=-1)  # (B, L, L)
    itself = torch.eye(length, dtype=torch.bool, device=coords.device)
    apart = apart.masked_fill(itself | ~among[:, None], torch.inf)
    level = _lines(apart.flatten(0, 1)).view_as(apart)  # pixels equally far in exact arithmetic share one
    nearest = level.argsort(dim=-1, stable=True)[..., :neighbours]  # (B, L, M)
    position = inverse_order(orders)  # (B, K, L), the step at which a point is visited
    directions = orders.shape[1]
    there = position.gather(2, nearest.flatten(1)[:, None].expand(-1, directions, -1))  # (B, K, L*M)
    return position[..., None] - there.unflatten(2, (length, neighbours))  # (B, K, L, M)
