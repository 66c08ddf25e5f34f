"""The windowed scan: written-out orders, loops, the inverse, gradients and layouts."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nfhelpers.kernels.local_scan import local_reverse, local_scan
from nfhelpers.kernels.orders import grid_order

DEVICES = pytest.mark.parametrize("device", ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
FLAGS = pytest.mark.parametrize(("flip", "column_first"), list(itertools.product([False, True], repeat=2)))


def draw(*shape, dtype=torch.float32, seed=0):
    """Normal random numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def by_loops(height, width, window, flip, column_first):
    """Positions r W + q in the order of the scan: windows, then rows, then columns, each a loop."""
    tops, lefts = range(0, height, window), range(0, width, window)
    windows = [(t, s) for s in lefts for t in tops] if column_first else [(t, s) for t in tops for s in lefts]
    order = []
    for top, left in windows:
        rows = range(top, min(top + window, height))
        columns = range(left, min(left + window, width))
        if column_first:
            order += [r * width + q for q in columns for r in rows]
        else:
            order += [r * width + q for r in rows for q in columns]
    return order[::-1] if flip else order


@settings(deadline=None, max_examples=40)
@given(
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    window=st.integers(1, 14),
    flip=st.booleans(),
    column_first=st.booleans(),
    channels_last=st.booleans(),
)
def test_scan_is_the_bijection_of_the_loops_and_reverse_undoes_it(
    height, width, window, flip, column_first, channels_last
):
    memory = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.arange(2 * 3 * height * width).view(2, 3, height, width).contiguous(memory_format=memory)
    y = local_scan(x, window, flip, column_first)
    order = by_loops(height, width, window, flip, column_first)
    assert sorted(order) == list(range(height * width))
    assert torch.equal(y, x.flatten(2)[:, :, order])
    assert torch.equal(local_reverse(y, height, width, window, flip, column_first), x)
    if not column_first:
        assert grid_order(height, width, f"w{window}" + "_flip" * flip).tolist() == order


@FLAGS
def test_each_derivative_is_the_other_function(flip, column_first):
    x, weight = draw(2, 3, 5, 7).requires_grad_(), draw(2, 3, 35, seed=1).requires_grad_()
    (grad,) = torch.autograd.grad((local_scan(x, 3, flip, column_first) * weight.detach()).sum(), x)
    assert torch.equal(grad, local_reverse(weight, 5, 7, 3, flip, column_first))
    pixels = local_reverse(weight, 5, 7, 3, flip, column_first)
    (grad,) = torch.autograd.grad((pixels * x.detach()).sum(), weight)
    assert torch.equal(grad, local_scan(x, 3, flip, column_first))


LAYOUTS = {
    "channels-first": lambda x: x,
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "part of a larger": lambda x: torch.nn.functional.pad(x, (1, 2, 3, 1, 1, 0))[:, 1:, 3:-1, 1:-2],
    "batch last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "expanded": lambda x: x[:1, :1].expand(x.shape),
}


@DEVICES
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 5, 4, 6), (2, 1, 5, 7), (1, 3, 1, 1), (3, 2, 1, 8)])
def test_every_layout_gives_the_same(layout, shape, device):
    x = LAYOUTS[layout](draw(*shape).to(device))
    wanted = x.flatten(2)[:, :, by_loops(*shape[2:], 3, True, True)]
    y = local_scan(x, 3, True, True)
    assert torch.equal(y, wanted)
    steps = LAYOUTS[layout](wanted.unsqueeze(3)).squeeze(3)  # (B, C, L) in this layout
    assert torch.equal(local_reverse(steps, *shape[2:], 3, True, True), x)
    if layout == "channels-last" and min(shape) > 1:
        assert y.transpose(1, 2).is_contiguous()
        assert local_reverse(y, *shape[2:], 3).is_contiguous(memory_format=torch.channels_last)


def test_what_is_no_grid_is_refused():
    for tokens, height, width, window in ((12, 3, 5, 2), (12, 3, 4, 0)):
        with pytest.raises(ValueError):
            local_reverse(torch.ones(2, 3, tokens), height, width, window)


def test_compiles_without_a_graph_break_and_for_changing_sizes():
    def smooth(x):
        y = local_scan(2 * x, 3, flip=True).cumsum(-1)
        return local_reverse(y, *x.shape[2:], 3, flip=True).sin()

    torch._dynamo.reset()
    compiled = torch.compile(smooth, fullgraph=True, backend="aot_eager")
    for shape in ((2, 3, 5, 7), (1, 4, 6, 5)):
        x = draw(*shape).requires_grad_()
        eager, traced = smooth(x), compiled(x)
        assert torch.equal(eager, traced)
        grads = [torch.autograd.grad(y.sum(), x)[0] for y in (eager, traced)]
        assert torch.equal(*grads)
    torch._dynamo.reset()
