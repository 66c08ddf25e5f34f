"""Scan orders: definitions, permutations, inverses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nfhelpers.kernels.orders import GRID_ORDERS, POINT_ORDERS, grid_order, inverse_order, point_order

KINDS = pytest.mark.parametrize("kind", POINT_ORDERS)


def grid(height, width):
    """Pixel centres (1, height * width, 2), (x, y), row by row."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([(x + 0.5) / width, (y + 0.5) / height], -1).view(1, -1, 2)


def stacked(coords, *kinds):
    return torch.stack([point_order(coords, kind) for kind in kinds], dim=1)


@settings(deadline=None, max_examples=20)
@given(length=st.integers(1, 60), seed=st.integers(0, 2**16))
def test_orders_are_permutations_of_each_sample_and_inverses_undo_them(length, seed):
    coords = torch.rand(3, length, 2, generator=torch.Generator().manual_seed(seed))
    coords = (coords * 8).round() / 8 if seed % 2 else coords  # points that coincide
    for kind in POINT_ORDERS:
        order = point_order(coords, kind)
        assert torch.equal(order.sort(-1).values, torch.arange(length).expand(3, -1))
        assert torch.equal(inverse_order(order), order.argsort(-1))
        assert torch.equal(order[1:2], point_order(coords[1:2], kind))
        x = torch.rand(3, length, 5)
        visited = x.gather(1, order[..., None].expand_as(x))
        assert torch.equal(visited.gather(1, inverse_order(order)[..., None].expand_as(x)), x)


def test_known_orders_of_small_grids():
    """x + y rising, then x; x - y rising, then x; Hilbert's figures of first and second order."""
    assert point_order(grid(3, 4), "row")[0].tolist() == list(range(12))
    assert point_order(grid(3, 4), "column")[0].tolist() == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
    assert point_order(grid(3, 4), "serpentine")[0].tolist() == [0, 1, 2, 3, 7, 6, 5, 4, 8, 9, 10, 11]
    assert point_order(grid(3, 3), "diagonal")[0].tolist() == [0, 3, 1, 6, 4, 2, 7, 5, 8]
    assert point_order(grid(3, 3), "antidiagonal")[0].tolist() == [6, 3, 7, 0, 4, 8, 1, 5, 2]
    assert point_order(grid(2, 2), "hilbert")[0].tolist() == [0, 2, 3, 1]
    figure = [0, 1, 5, 4, 8, 12, 13, 9, 10, 14, 15, 11, 7, 6, 2, 3]
    assert point_order(grid(4, 4), "hilbert")[0].tolist() == figure


@pytest.mark.parametrize("size", [2, 8, 32, 64])
def test_hilbert_neighbours_are_adjacent_pixels(size):
    order = point_order(grid(size, size), "hilbert")[0]
    row, column = order // size, order % size
    assert torch.equal(row.diff().abs() + column.diff().abs(), torch.ones(size * size - 1, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("height", "width"), [(1, 9), (9, 1), (3, 4), (7, 7), (33, 33), (31, 64), (96, 128), (97, 96), (511, 512)]
)
def test_lines_of_grids_survive_rounding(height, width, dtype):
    """x + y and x - y of pixel centres compared as whole numbers: few pixels share a diagonal, or none do."""
    pixels = torch.arange(height * width)
    row, column = pixels // width, pixels % width
    coords = grid(height, width).to(dtype)
    x, y = (2 * column + 1) * height, (2 * row + 1) * width  # times 2 H W
    for kind, line in (("row", y), ("column", x), ("diagonal", x + y), ("antidiagonal", x - y)):
        other = row if kind == "column" else column
        exact = torch.argsort(line * 2 * (height + width) + other, stable=True)
        assert torch.equal(point_order(coords, kind)[0], exact), kind
        assert height != width or torch.equal(point_order(coords, kind, height)[0], exact), kind


def test_bands_walk_points_of_two_grids_together():
    both = torch.cat([grid(4, 4), grid(4, 4) + 0.05], dim=1)
    for kind in POINT_ORDERS[:5]:
        position = inverse_order(point_order(both, kind, bands=4))[0]
        assert torch.equal((position[:16] - position[16:]).abs(), torch.ones(16, dtype=torch.int64)), kind


@KINDS
def test_dtype_and_jitter_of_rounding_size_change_no_order(kind):
    """Half precision holds these grids exactly; centres computed in another way differ in the last bit."""
    for dtype, size in ((torch.float64, 96), (torch.float16, 128), (torch.bfloat16, 64)):
        coords = grid(size, size)
        assert torch.equal(point_order(coords.to(dtype), kind), point_order(coords, kind))
    steps = torch.randint(-1, 2, coords.shape, generator=torch.Generator().manual_seed(0))
    moved = coords * (1 + steps * torch.finfo(torch.float32).eps / 2)
    if "diagonal" not in kind:  # whose second key, x, is compared exactly
        assert torch.equal(point_order(moved, kind), point_order(coords, kind))


@KINDS
def test_coinciding_points_keep_their_order(kind):
    coords = torch.tensor([[0.75, 0.25], [0.25, 0.75], [0.25, 0.25]]).repeat_interleave(4, 0)[None]
    order = point_order(coords, kind)[0].view(3, 4)
    assert torch.equal(order % 4, torch.arange(4).expand(3, 4))
    assert torch.equal(order // 4, (order // 4)[:, :1].expand(3, 4))


def test_lines_of_scattered_points():
    """Serpentine turns at every occupied row; rows closer than 1/1000 stay apart."""
    coords = torch.tensor([[0.1, 0.1], [0.9, 0.1], [0.1, 0.5], [0.9, 0.5], [0.1, 0.95], [0.9, 0.95]])[None]
    assert point_order(coords, "serpentine")[0].tolist() == [0, 1, 3, 2, 4, 5]
    coords = torch.tensor([[0.1, 0.50004], [0.9, 0.50002], [0.5, 0.5]])[None]
    assert point_order(coords, "row")[0].tolist() == [2, 1, 0]
    assert point_order(coords.flip(-1), "column")[0].tolist() == [2, 1, 0]


def test_known_grid_orders():
    """Windows of 2 x 2 in 3 x 5: two whole ones, a column of two, the row below."""
    assert grid_order(2, 3, "h").tolist() == [0, 1, 2, 3, 4, 5]
    assert grid_order(2, 3, "v").tolist() == [0, 3, 1, 4, 2, 5]
    assert grid_order(3, 5, "w2").tolist() == [0, 1, 5, 6, 2, 3, 7, 8, 4, 9, 10, 11, 12, 13, 14]
    for kind in ("w1", "w5", "w7", "w" + "9" * 30):
        assert torch.equal(grid_order(3, 5, kind), grid_order(3, 5, "h"))
    for kind in GRID_ORDERS:
        assert torch.equal(grid_order(8, 5, kind + "_flip"), grid_order(8, 5, kind).flip(0))


def test_what_would_be_silently_wrong_is_refused():
    for kind in ("spiral", "w7"):
        with pytest.raises(ValueError, match=kind):
            point_order(torch.rand(1, 4, 2), kind)
    for value in (1.25, -0.5, float("nan"), float("inf")):
        with pytest.raises(ValueError):
            point_order(torch.full((1, 4, 2), value), "hilbert")
    for kind in ("w", "w0", "d", "h_flipped", "w2.5", "hv", ""):
        with pytest.raises(ValueError):
            grid_order(4, 4, kind)
    for entries in ([0, 1, 3], [-1, 0, 1], [[0, 1, 2], [0, 1, 1]]):
        with pytest.raises(ValueError):
            inverse_order(torch.tensor(entries))


@pytest.mark.parametrize("kind", ["diagonal", "hilbert"])
def test_orders_compile_without_a_graph_break_and_for_changing_sizes(kind):
    def both(coords, x):
        order = point_order(coords, kind)
        return order, inverse_order(order), x.flatten(1)[:, grid_order(*x.shape[-2:], "w2_flip")]

    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for batch, length in ((2, 20), (3, 31)):
        coords = torch.rand(batch, length, 2, generator=torch.Generator().manual_seed(length))
        x = torch.rand(batch, 5, length)
        for traced, eager in zip(compiled(coords, x), both(coords, x), strict=True):
            assert torch.equal(traced, eager)
