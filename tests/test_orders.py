"""Scan orders: permutations, known small grids, neighbours, ties, inverses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nfhelpers.kernels.orders import POINT_ORDERS, grid_order, inverse_order, neighbour_steps, point_order

KINDS = pytest.mark.parametrize("kind", POINT_ORDERS)


def grid(height, width):
    """(1, H W, 2) pixel centres (x, y), row by row."""
    y, x = torch.meshgrid(
        (torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij"
    )
    return torch.stack([x, y], -1).view(1, -1, 2)


def is_permutation(order, length):
    return order.dtype == torch.int64 and torch.equal(
        order.sort(-1).values, torch.arange(length).expand_as(order)
    )


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(POINT_ORDERS),
    batch=st.integers(1, 3),
    length=st.integers(1, 40),
    levels=st.sampled_from([1, 3, 1000]),
    seed=st.integers(0, 2**16),
)
def test_point_order_is_a_bijection_that_its_inverse_undoes(kind, batch, length, levels, seed):
    generator = torch.Generator().manual_seed(seed)
    coords = torch.randint(0, levels + 1, (batch, length, 2), generator=generator) / levels
    order = point_order(coords, kind)
    assert order.shape == (batch, length) and is_permutation(order, length)
    sorted_coords = coords.gather(1, order[..., None].expand(-1, -1, 2))
    restored = sorted_coords.gather(1, inverse_order(order)[..., None].expand(-1, -1, 2))
    assert torch.equal(restored, coords)


@settings(deadline=None, max_examples=60)
@given(
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    kind=st.sampled_from(["h", "v", "w1", "w2", "w5", "w20"]),
    flip=st.booleans(),
)
def test_grid_order_is_a_bijection(height, width, kind, flip):
    order = grid_order(height, width, kind + "_flip" * flip)
    assert order.shape == (height * width,) and is_permutation(order, height * width)
    if flip:
        assert torch.equal(order, grid_order(height, width, kind).flip(0))


# Positions 0 ... 11 of a 3 x 4 grid, row by row.
KNOWN = {
    "row": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11],
    "column": [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11],
    "serpentine": [0, 1, 2, 3, 7, 6, 5, 4, 8, 9, 10, 11],
}


@pytest.mark.parametrize("kind", KNOWN)
def test_known_order_of_a_small_grid(kind):
    assert point_order(grid(3, 4), kind)[0].tolist() == KNOWN[kind]


def test_known_diagonals_of_a_square():
    """3 x 3: x + y rising, then x rising; x - y rising, then x rising."""
    assert point_order(grid(3, 3), "diagonal")[0].tolist() == [0, 3, 1, 6, 4, 2, 7, 5, 8]
    assert point_order(grid(3, 3), "antidiagonal")[0].tolist() == [6, 3, 7, 0, 4, 8, 1, 5, 2]


def test_known_hilbert_curve():
    assert point_order(grid(2, 2), "hilbert")[0].tolist() == [0, 2, 3, 1]
    # Hilbert's own figure of second order, y downwards.
    assert point_order(grid(4, 4), "hilbert")[0].tolist() == [
        *(0, 1, 5, 4),
        *(8, 12, 13, 9),
        *(10, 14, 15, 11),
        *(7, 6, 2, 3),
    ]


@pytest.mark.parametrize("size", [2, 8, 32, 64])
def test_hilbert_neighbours_are_adjacent_pixels(size):
    order = point_order(grid(size, size), "hilbert")[0]
    row, column = order // size, order % size
    assert torch.equal(row.diff().abs() + column.diff().abs(), torch.ones(size * size - 1, dtype=torch.int64))


@pytest.mark.parametrize("size", [7, 30, 32, 33, 96])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_diagonals_of_a_grid_survive_rounding(size, dtype):
    """i + j must never fall along the order although x + y rounds differently on one diagonal."""
    pixels = torch.arange(size * size)
    row, column = pixels // size, pixels % size
    coords = torch.stack([(column + 0.5).to(dtype) / size, (row + 0.5).to(dtype) / size], -1)[None]
    for kind, line in (("diagonal", column + row), ("antidiagonal", column - row)):
        order = point_order(coords, kind)[0]
        exact = torch.argsort(line * 2 * size + column, stable=True)
        assert torch.equal(order, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("height", "width"), [(1, 9), (9, 1), (3, 4), (32, 48), (31, 64), (96, 128), (97, 96), (511, 512)]
)
def test_lines_of_grids_that_are_not_square(height, width, dtype):
    """x + y and x - y of pixel centres compared as whole numbers: few pixels share a diagonal, or none do."""
    pixels = torch.arange(height * width)
    row, column = pixels // width, pixels % width
    coords = grid(height, width).to(dtype)
    x, y = (2 * column + 1) * height, (2 * row + 1) * width  # times 2 H W
    for kind, line in (("row", y), ("column", x), ("diagonal", x + y), ("antidiagonal", x - y)):
        other = row if kind == "column" else column
        exact = torch.argsort(line * 2 * (height + width) + other, stable=True)
        assert torch.equal(point_order(coords, kind)[0], exact), kind


@KINDS
def test_the_dtype_of_the_same_points_changes_no_order(kind):
    """A float64 copy has the rounding errors of float32; half precision holds these grids exactly."""
    coords = grid(96, 96)
    assert torch.equal(point_order(coords.double(), kind), point_order(coords, kind))
    for dtype, size in ((torch.float16, 128), (torch.bfloat16, 64)):
        coords = grid(size, size)
        assert torch.equal(point_order(coords.to(dtype), kind), point_order(coords, kind))


@pytest.mark.parametrize("size", [7, 96])
def test_jitter_of_rounding_size_changes_no_line(size):
    """Pixel centres computed in another way differ in the last bit: rows, columns and the curve stay."""
    coords = grid(size, size)
    generator = torch.Generator().manual_seed(0)
    steps = torch.randint(-1, 2, coords.shape, generator=generator)
    moved = coords * (1 + steps * torch.finfo(torch.float32).eps / 2)
    assert not torch.equal(moved, coords)
    for kind in POINT_ORDERS:
        assert torch.equal(point_order(moved, kind), point_order(coords, kind)), kind


@KINDS
def test_coinciding_points_keep_their_order(kind):
    coords = torch.tensor([[0.75, 0.25], [0.25, 0.75], [0.25, 0.25]]).repeat_interleave(4, 0)[None]
    order = point_order(coords, kind)[0].view(3, 4)
    assert torch.equal(order % 4, torch.arange(4).expand(3, 4))
    assert torch.equal(order // 4, (order // 4)[:, :1].expand(3, 4))


@KINDS
def test_samples_of_a_batch_are_sorted_on_their_own(kind):
    coords = torch.rand(5, 50, 2, generator=torch.Generator().manual_seed(1))
    each = torch.cat([point_order(sample[None], kind) for sample in coords])
    assert torch.equal(point_order(coords, kind), each)


def test_serpentine_turns_at_every_occupied_row():
    """Rows without a point do not count: the walk still alternates."""
    coords = torch.tensor([[0.1, 0.1], [0.9, 0.1], [0.1, 0.5], [0.9, 0.5], [0.1, 0.95], [0.9, 0.95]])[None]
    assert point_order(coords, "serpentine")[0].tolist() == [0, 1, 3, 2, 4, 5]


def test_row_and_column_orders_sort_exactly():
    """No key y * 1000 + x: rows closer than 1/1000 stay apart."""
    coords = torch.tensor([[0.1, 0.50004], [0.9, 0.50002], [0.5, 0.5]])[None]
    assert point_order(coords, "row")[0].tolist() == [2, 1, 0]
    assert point_order(coords.flip(-1), "column")[0].tolist() == [2, 1, 0]


def test_known_grid_orders():
    assert grid_order(2, 3, "h").tolist() == [0, 1, 2, 3, 4, 5]
    assert grid_order(2, 3, "v").tolist() == [0, 3, 1, 4, 2, 5]
    assert grid_order(2, 3, "v_flip").tolist() == [5, 2, 4, 1, 3, 0]
    # 3 x 5 in windows of 2 x 2: two whole windows, a column of two, then the row below.
    assert grid_order(3, 5, "w2").tolist() == [0, 1, 5, 6, 2, 3, 7, 8, 4, 9, 10, 11, 12, 13, 14]
    # 5 x 7 in windows of 3 x 3: both far edges and the corner are cut.
    assert grid_order(5, 7, "w3").tolist() == [
        *(0, 1, 2, 7, 8, 9, 14, 15, 16),
        *(3, 4, 5, 10, 11, 12, 17, 18, 19),
        *(6, 13, 20),
        *(21, 22, 23, 28, 29, 30),
        *(24, 25, 26, 31, 32, 33),
        *(27, 34),
    ]
    for kind in ("w5", "w7", "w" + "9" * 30):
        assert torch.equal(grid_order(3, 5, kind), grid_order(3, 5, "h"))
    assert torch.equal(grid_order(3, 5, "w1"), grid_order(3, 5, "h"))


def test_inverse_order_is_batched():
    order = torch.tensor([[2, 0, 1], [0, 2, 1]])
    assert inverse_order(order).tolist() == [[1, 2, 0], [0, 2, 1]]
    assert inverse_order(torch.tensor([2, 0, 1])).tolist() == [1, 2, 0]
    order = torch.rand(2, 3, 7, generator=torch.Generator().manual_seed(0)).argsort(-1)
    assert torch.equal(inverse_order(order), order.argsort(-1))
    order = order[:1].expand(4, 3, 7)
    assert torch.equal(inverse_order(order), order.argsort(-1))


@pytest.mark.parametrize("kind", ["diagonal", "serpentine", "hilbert"])
def test_orders_compile_without_a_graph_break_and_for_changing_sizes(kind):
    def both(coords, x):
        order = point_order(coords, kind)
        pixels = grid_order(*x.shape[-2:], "w2_flip")
        return order, inverse_order(order), x.flatten(1)[:, pixels]

    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for batch, length in ((2, 20), (3, 31)):
        coords = torch.rand(batch, length, 2, generator=torch.Generator().manual_seed(length))
        x = torch.rand(batch, 5, length)
        for traced, eager in zip(compiled(coords, x), both(coords, x), strict=True):
            assert torch.equal(traced, eager)


@pytest.mark.parametrize(
    ("coords", "kind", "message"),
    [
        (torch.rand(1, 4, 2), "spiral", r"kind='spiral' .* choose one of \('row', 'column'"),
        (torch.rand(4, 2), "row", r"coords has shape \(4, 2\); pass \(B, L, 2\)"),
        (torch.rand(1, 4, 3), "row", "coords has shape"),
        (torch.rand(1, 0, 2), "row", "not empty"),
        (torch.ones(1, 4, 2, dtype=torch.long), "row", "coords is torch.int64"),
        ([[[0.5, 0.5]]], "row", "coords is a list; pass a tensor"),
        (torch.full((1, 4, 2), 1.25), "hilbert", r"coords spans \[1.25, 1.25\]; pass \(x, y\) in \[0, 1\]"),
        (torch.full((1, 4, 2), -0.5), "row", r"coords spans \[-0.5, -0.5\]"),
        (torch.full((1, 4, 2), float("nan")), "column", "coords spans"),
        (torch.full((1, 4, 2), float("inf")), "column", "coords spans"),
    ],
)
def test_wrong_points_are_named(coords, kind, message):
    with pytest.raises(ValueError, match=message):
        point_order(coords, kind)


@pytest.mark.parametrize("kind", ["w", "w0", "d", "h_flipped", "w2.5", "hv", "", None, 1])
def test_wrong_grid_orders_are_named(kind):
    with pytest.raises(ValueError, match="is not an order of a grid"):
        grid_order(4, 4, kind)


def test_wrong_sizes_and_inverses_are_named():
    for size in (4.5, True, None):
        with pytest.raises(ValueError, match=f"height={size}, width=4; both must be whole"):
            grid_order(size, 4, "h")
    with pytest.raises(ValueError, match="height=0"):
        grid_order(0, 4, "h")
    with pytest.raises(ValueError, match="order is torch.float32"):
        inverse_order(torch.rand(3))
    with pytest.raises(ValueError, match="order is a list"):
        inverse_order([1, 0])
    for entries in ([0, 1, 3], [-1, 0, 1]):
        with pytest.raises(ValueError, match=r"order has entries outside 0 \.\.\. 2"):
            inverse_order(torch.tensor(entries))
    with pytest.raises(ValueError, match="order names a position twice"):
        inverse_order(torch.tensor([[0, 1, 2], [0, 1, 1]]))


# ---------------------------------------------------------------- neighbours along an order


def stacked(coords, *kinds):
    return torch.stack([point_order(coords, kind) for kind in kinds], dim=1)


def test_neighbours_in_one_row_are_next_to_each_other():
    coords = grid(1, 5)
    (steps,) = neighbour_steps(coords, stacked(coords, "row"), neighbours=2)[0]
    # Inside, the left one first (equally near, and earlier in coords), one step before; the right one after.
    assert steps.tolist() == [[-1, -2], [1, -1], [1, -1], [1, -1], [1, 2]]
    backwards = stacked(coords, "row").flip(-1)
    assert torch.equal(neighbour_steps(coords, backwards, neighbours=2)[0, 0], -steps)


@pytest.mark.parametrize(("height", "width"), [(7, 7), (9, 12)])
def test_neighbours_on_a_grid_are_a_pixel_or_a_line_away(height, width):
    coords = grid(height, width)
    orders = stacked(coords, "row", "column")
    # Square pixels: the four nearest of an inner one are those that touch it.
    squares = coords * torch.tensor([width, height]) / max(height, width)
    steps = neighbour_steps(squares, orders, neighbours=4)[0].view(2, height, width, 4)[:, 1:-1, 1:-1]
    across = torch.tensor([[width, 1, -1, -width], [1, height, -height, -1]])  # above, left, right, below
    assert torch.equal(steps, across[:, None, None].expand_as(steps))


def test_no_order_of_the_four_meets_the_right_neighbour_first():
    coords = grid(6, 6)
    place = inverse_order(stacked(coords, "row", "column", "diagonal", "antidiagonal"))[0].view(4, 6, 6)
    assert (place[:, :, :-1] < place[:, :, 1:]).all()


@settings(deadline=None, max_examples=30)
@given(length=st.integers(3, 30), seed=st.integers(0, 2**16))
def test_neighbour_steps_are_differences_of_positions(length, seed):
    generator = torch.Generator().manual_seed(seed)
    coords = torch.rand(2, length, 2, generator=generator)
    among = torch.rand(2, length, generator=generator) < 0.5
    among[:, :3] = True
    orders = stacked(coords, *POINT_ORDERS)
    steps = neighbour_steps(coords, orders, neighbours=2, among=among)
    place = inverse_order(orders)
    for b in range(2):
        apart = torch.cdist(coords[b].double(), coords[b].double())
        for i in range(length):
            others = [j for j in range(length) if j != i and among[b, j]]
            nearest = sorted(others, key=lambda j: apart[i, j])[:2]
            assert torch.equal(steps[b, :, i], place[b, :, i, None] - place[b][:, nearest])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"coords": torch.rand(9, 2)}, r"coords has shape \(9, 2\); pass a tensor \(B, L, 2\)"),
        ({"coords": None}, "coords has shape"),
        ({"orders": torch.arange(9)[None]}, r"orders has shape \(1, 9\); the points ask for \(B, K, L\)"),
        ({"neighbours": 9}, "neighbours=9 of every point were asked for, and one of them has 8"),
        ({"neighbours": 0}, "neighbours=0"),
        ({"neighbours": True}, "neighbours=True"),
        ({"among": torch.arange(9)[None] < 4}, "one of them has 3"),
        ({"among": torch.ones(1, 9)}, r"among is torch.float32 of shape \(1, 9\); pass bool \(1, 9\)"),
        ({"orders": torch.zeros(1, 1, 9, dtype=torch.long)}, "names a position twice"),
    ],
)
def test_wrong_neighbours_are_named(change, message):
    coords = grid(3, 3)
    with pytest.raises(ValueError, match=message):
        neighbour_steps(**{"coords": coords, "orders": stacked(coords, "row"), **change})
