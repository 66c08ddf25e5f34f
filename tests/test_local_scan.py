"""The windowed scan: written-out orders, loops, the inverse, gradients, every dtype and layout.

The Triton kernel runs on a CUDA device, or on any machine in Triton's interpreter, in a process of its own,
where it serves every test of this file: ``TRITON_INTERPRET=1 pytest tests/test_local_scan.py``.
"""

import importlib.util
import os
import subprocess
import sys
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nfhelpers.kernels import directional_scan, selective_scan
from nfhelpers.kernels import local_scan as module
from nfhelpers.kernels.local_scan import local_reverse, local_scan
from nfhelpers.kernels.orders import grid_order

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TRITON = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or not (INTERPRETED or torch.cuda.is_available()),
    reason="needs Triton, and a CUDA device or TRITON_INTERPRET=1",
)
NOT_INTERPRETED = pytest.mark.skipif(INTERPRETED, reason="here Triton is asked for by name")
DEVICE = "cpu" if INTERPRETED else "cuda"  # of the tests of the kernel
DEVICES = pytest.mark.parametrize("device", ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
FLAGS = pytest.mark.parametrize(
    ("flip", "column_first"), [(False, False), (True, False), (False, True), (True, True)]
)


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


# ---------------------------------------------------------------------------------------------------- orders


# 5 x 7 in windows of 3: two whole windows and a column of three, then the same cut to two rows.
KNOWN = {
    False: [
        *(0, 1, 2, 7, 8, 9, 14, 15, 16),
        *(3, 4, 5, 10, 11, 12, 17, 18, 19),
        *(6, 13, 20),
        *(21, 22, 23, 28, 29, 30),
        *(24, 25, 26, 31, 32, 33),
        *(27, 34),
    ],
    True: [
        *(0, 7, 14, 1, 8, 15, 2, 9, 16),
        *(21, 28, 22, 29, 23, 30),
        *(3, 10, 17, 4, 11, 18, 5, 12, 19),
        *(24, 31, 25, 32, 26, 33),
        *(6, 13, 20),
        *(27, 34),
    ],
}


@FLAGS
def test_written_out_order_of_a_ragged_grid(flip, column_first):
    x = torch.arange(35).view(1, 1, 5, 7)
    wanted = KNOWN[column_first][::-1] if flip else KNOWN[column_first]
    assert local_scan(x, 3, flip, column_first)[0, 0].tolist() == wanted


def test_written_out_order_of_a_whole_grid():
    x = torch.arange(16).view(1, 1, 4, 4)
    assert local_scan(x, 2)[0, 0].tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    wanted = [0, 4, 1, 5, 8, 12, 9, 13, 2, 6, 3, 7, 10, 14, 11, 15]
    assert local_scan(x, 2, column_first=True)[0, 0].tolist() == wanted


@settings(deadline=None, max_examples=60)
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


@pytest.mark.parametrize(("height", "width"), [(8, 8), (5, 7), (1, 9), (9, 1), (14, 21)])
@pytest.mark.parametrize("window", [1, 2, 7, 30])
def test_agrees_with_grid_order(height, width, window):
    x = draw(2, 3, height, width)
    for flip in (False, True):
        order = grid_order(height, width, f"w{window}" + "_flip" * flip)
        assert torch.equal(local_scan(x, window, flip), x.flatten(2)[:, :, order])
        by_columns = local_scan(x, window, flip, column_first=True)
        assert torch.equal(by_columns, local_scan(x.transpose(2, 3), window, flip))


@pytest.mark.parametrize("window", [1, 9, 10**30])
def test_windows_of_one_pixel_and_of_the_whole_grid_give_the_plain_scans(window):
    x = draw(2, 3, 5, 9)
    for flip in (False, True):
        for column_first, kind in ((False, "h"), (True, "v")):
            order = grid_order(5, 9, kind + "_flip" * flip)
            y = local_scan(x, window, flip, column_first)
            assert torch.equal(y, x.flatten(2)[:, :, order])
            assert torch.equal(local_reverse(y, 5, 9, window, flip, column_first), x)


@pytest.mark.parametrize("kind", ["h", "v", "w2", "w7_flip"])
def test_directional_scan_needs_no_scanned_copy(kind):
    """SS2D with its copies (scan, run the recurrence, scan back) is one call with the order of the grid."""
    height, width, states = 5, 9, 4
    x, delta, B, C = (draw(2, n, height, width, seed=i) for i, n in enumerate((3, 3, states, states)))
    A = -draw(3, states).exp()
    name, _, flip = kind.partition("_")
    options = (int(name[1:]) if name[0] == "w" else 9, bool(flip), name == "v")
    u, step, *weights = (local_scan(image, *options) for image in (x, delta, B, C))
    y = selective_scan(u, step, A, *weights, delta_softplus=True, backend="chunked")
    copied = local_reverse(y, height, width, *options)
    tokens = [image.flatten(2).transpose(1, 2)[:, None] for image in (x, delta, B, C)]  # (b, 1, L, ...)
    orders = grid_order(height, width, kind)[None]
    fused = directional_scan(*tokens[:2], A[None], *tokens[2:], orders=orders, backend="chunked")
    torch.testing.assert_close(fused[:, 0].transpose(1, 2).unflatten(2, (height, width)), copied)


# ------------------------------------------------------------------------------------------------- gradients


@FLAGS
def test_gradients_are_right(flip, column_first):
    x, y = (draw(*shape, dtype=torch.float64).requires_grad_() for shape in ((1, 1, 2, 3), (1, 1, 6)))
    assert torch.autograd.gradcheck(lambda x: local_scan(x, 2, flip, column_first) ** 2, x)
    assert torch.autograd.gradcheck(lambda y: local_reverse(y, 2, 3, 2, flip, column_first) ** 2, y)


def test_second_derivatives_are_right():
    x, y = (draw(*shape, dtype=torch.float64).requires_grad_() for shape in ((1, 1, 2, 3), (1, 1, 6)))
    assert torch.autograd.gradgradcheck(lambda x: local_scan(x, 2, True, True) ** 2, x)
    assert torch.autograd.gradgradcheck(lambda y: local_reverse(y, 2, 3, 2, True, True) ** 2, y)


@FLAGS
def test_each_derivative_is_the_other_function(flip, column_first):
    x, weight = draw(2, 3, 5, 7).requires_grad_(), draw(2, 3, 35, seed=1).requires_grad_()
    (grad,) = torch.autograd.grad((local_scan(x, 3, flip, column_first) * weight.detach()).sum(), x)
    assert torch.equal(grad, local_reverse(weight, 5, 7, 3, flip, column_first))
    pixels = local_reverse(weight, 5, 7, 3, flip, column_first)
    (grad,) = torch.autograd.grad((pixels * x.detach()).sum(), weight)
    assert torch.equal(grad, local_scan(x, 3, flip, column_first))


def test_an_order_made_in_inference_mode_serves_training():
    x = draw(1, 2, 11, 13)  # a grid of no other test
    with torch.inference_mode():
        inferred = local_scan(x, 4)
    y = local_scan(x.requires_grad_(), 4)
    assert torch.equal(y, inferred)
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_a_default_device_changes_nothing():
    x = draw(1, 2, 11, 14)  # a grid of no other test
    with torch.device("meta"):
        y = local_scan(x, 4)
    assert torch.equal(local_reverse(y, 11, 14, 4), x)


# ---------------------------------------------------------------------------------------- dtypes and strides


@DEVICES
@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.bool),
        *(torch.complex64, torch.complex128),
    ],
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=str)
def test_every_dtype_keeps_its_bits(dtype, memory, device):
    generator = torch.Generator().manual_seed(0)
    size = dtype.itemsize
    # Random bytes: denormal numbers, infinities and NaN of every kind among them.
    x = torch.randint(0, 2 if dtype == torch.bool else 256, (2 * 3 * 5 * 7 * size,), generator=generator)
    x = x.to(device, torch.uint8).view(dtype).view(2, 3, 5, 7).contiguous(memory_format=memory)
    order = by_loops(5, 7, 3, False, False)
    y = local_scan(x, 3)
    back = local_reverse(y, 5, 7, 3)
    assert y.dtype == back.dtype == dtype

    def raw(t):  # (..., bytes of an element)
        return t.contiguous().view(-1, 1).view(torch.uint8).view(*t.shape, size)

    assert torch.equal(raw(y), raw(x).flatten(2, 3)[:, :, order])
    assert torch.equal(raw(back), raw(x))


LAYOUTS = {
    "channels-first": lambda x: x,
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "tokens": lambda x: x.flatten(2).transpose(1, 2).contiguous().transpose(1, 2).unflatten(2, x.shape[2:]),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "part of a larger": lambda x: torch.nn.functional.pad(x, (1, 2, 3, 1, 1, 0))[:, 1:, 3:-1, 1:-2],
    "every second": lambda x: x.repeat_interleave(2, 1).repeat_interleave(2, 3)[:, ::2, :, ::2],
    "batch last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
}


@DEVICES
@FLAGS
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 5, 4, 6), (2, 1, 5, 7), (1, 3, 1, 1), (3, 2, 1, 8)])
def test_every_layout_gives_the_same(layout, shape, flip, column_first, device):
    x = draw(*shape).to(device)
    order = by_loops(*shape[2:], 3, flip, column_first)
    wanted = x.flatten(2)[:, :, order]
    y = local_scan(LAYOUTS[layout](x), 3, flip, column_first)
    assert torch.equal(y, wanted)
    steps = LAYOUTS[layout](wanted.unsqueeze(3)).squeeze(3)  # (B, C, L) in this layout
    assert torch.equal(local_reverse(steps, *shape[2:], 3, flip, column_first), x)


def test_expanded_tensors_are_scanned():
    x = draw(1, 1, 5, 7).expand(2, 3, 5, 7)
    y = local_scan(x, 3)
    assert torch.equal(y, x.flatten(2)[:, :, by_loops(5, 7, 3, False, False)])
    constant = torch.ones(1).expand(2, 3, 35)  # the gradient of a sum
    assert torch.equal(local_reverse(constant, 5, 7, 3), torch.ones(2, 3, 5, 7))


def test_results_keep_the_memory_layout():
    x = draw(2, 6, 5, 7)
    assert local_scan(x, 3).is_contiguous()
    assert local_reverse(x.flatten(2), 5, 7, 3).is_contiguous()
    y = local_scan(x.contiguous(memory_format=torch.channels_last), 3)
    assert y.transpose(1, 2).is_contiguous()
    assert local_reverse(y, 5, 7, 3).is_contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[1.0]], 2), r"x is a list; pass a tensor \(B, C, H, W\) such as \(8, 96, 56, 56\)"),
        ((torch.ones(2, 3, 4), 2), r"x has shape \(2, 3, 4\); pass \(B, C, H, W\)"),
        ((torch.ones(0, 3, 4, 4), 2), "x has shape .* not empty"),
        ((torch.ones(2, 3, 4, 4), 0), "window=0; it must be whole and at least 1, such as 7"),
        ((torch.ones(2, 3, 4, 4), -2), "window=-2"),
        ((torch.ones(2, 3, 4, 4), True), "window=True"),
        ((torch.ones(2, 3, 4, 4), 2.0), "window=2.0"),
        ((torch.ones(2, 3, 4, 4), None), "window=None"),
        ((torch.ones(2, 3, 4, 4), 2, 1), "flip=1; pass True or False"),
        ((torch.ones(2, 3, 4, 4), 2, False, "v"), "column_first='v'; pass True or False"),
    ],
)
def test_wrong_arguments_of_local_scan_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        local_scan(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, 3, 4, 2), r"y is a NoneType; pass a tensor \(B, C, L\) such as \(8, 96, 3136\)"),
        ((torch.ones(2, 3, 3, 4), 3, 4, 2), r"y has shape \(2, 3, 3, 4\); pass \(B, C, L\)"),
        ((torch.ones(2, 0, 12), 3, 4, 2), "not empty"),
        ((torch.ones(2, 3, 12), 3, 5, 2), "L=12; a grid of height=3, width=5 wants L=15"),
        ((torch.ones(2, 3, 12), 0, 4, 2), "height=0; it must be whole"),
        ((torch.ones(2, 3, 12), 3, 4.0, 2), "width=4.0"),
        ((torch.ones(2, 3, 12), True, 12, 2), "height=True"),
        ((torch.ones(2, 3, 12), 3, 4, 0), "window=0"),
        ((torch.ones(2, 3, 12), 3, 4, 2, None), "flip=None"),
    ],
)
def test_wrong_arguments_of_local_reverse_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        local_reverse(*arguments)


# ------------------------------------------------------------------------------- registration and compilation


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=str)
def test_ops_are_registered_as_torch_wants_them(memory):
    x = draw(2, 3, 4, 5).contiguous(memory_format=memory).requires_grad_()
    torch.library.opcheck(torch.ops.nfhelpers.local_scan.default, (x, 2, True, True))
    y = local_scan(x.detach(), 2).requires_grad_()
    torch.library.opcheck(torch.ops.nfhelpers.local_reverse.default, (y, 4, 5, 2, True, True))


def test_compiles_without_a_graph_break_and_for_changing_sizes():
    def smooth(x):
        y = local_scan(2 * x, 3, flip=True).cumsum(-1)
        return local_reverse(y, *x.shape[2:], 3, flip=True).sin()

    torch._dynamo.reset()
    compiled = torch.compile(smooth, fullgraph=True, backend="aot_eager")
    for shape in ((2, 3, 5, 7), (1, 4, 6, 5)):
        for memory in (torch.contiguous_format, torch.channels_last):
            x = draw(*shape).contiguous(memory_format=memory).requires_grad_()
            eager, traced = smooth(x), compiled(x)
            assert torch.equal(eager, traced)
            weight = draw(*shape, seed=1)
            grads = [torch.autograd.grad((y * weight).sum(), x)[0] for y in (eager, traced)]
            assert torch.equal(*grads)


# ---------------------------------------------------------------------------------------------------- Triton


@NOT_INTERPRETED
def test_without_triton_the_module_imports_and_runs():
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from nfhelpers.kernels.local_scan import local_scan\n"
        "print(local_scan(torch.arange(6).view(1, 1, 2, 3), 2).tolist())"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout.strip() == "[[[0, 1, 3, 4, 2, 5]]]", run.stderr


@NOT_INTERPRETED
def test_a_missing_triton_is_said_once(monkeypatch, recwarn):
    monkeypatch.setitem(sys.modules, "triton", None)
    module._kernel.cache_clear()
    on_cuda = types.SimpleNamespace(is_cuda=True)
    assert not module._takes_triton(on_cuda) and not module._takes_triton(on_cuda)
    assert [str(w.message).partition(" (")[0] for w in recwarn] == [
        "local_scan runs in PyTorch: Triton cannot be imported"
    ]
    module._kernel.cache_clear()


def moved(move, x, window, flip, column_first, channels_last):
    """(steps, pixels again) by one implementation, in integers of 2 bytes."""
    batch, channels, *size = x.shape
    memory = torch.channels_last if channels_last else torch.contiguous_format
    x = x.contiguous(memory_format=memory)
    steps = module._empty_steps(x).fill_(-1)
    move(x, steps, size, False, window, flip, column_first)
    pixels = module._empty_grid(steps, *size).fill_(-1)
    move(steps, pixels, size, True, window, flip, column_first)
    return steps, pixels


@TRITON
@FLAGS
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("channels", "height", "width", "window"),
    [(3, 5, 7, 3), (1, 1, 1, 1), (17, 18, 15, 4), (67, 9, 10, 2), (20, 1, 300, 7), (2, 300, 1, 7)],
)
def test_triton_matches_its_twin(channels, height, width, window, flip, column_first, channels_last):
    x = torch.arange(2 * channels * height * width).view(2, channels, height, width).to(torch.int16)
    options = (min(window, max(height, width)), flip, column_first, channels_last)
    for ours, twin in zip(
        moved(module._move_by_triton, x.to(DEVICE), *options),
        moved(module._move_by_index, x, *options),
        strict=True,
    ):
        assert ours.stride() == twin.stride() and torch.equal(ours.cpu(), twin)


@TRITON
@FLAGS
def test_triton_counts_long_scans_in_64_bits(flip, column_first, monkeypatch):
    monkeypatch.setattr(module, "_INT32_MAX", 0)
    x = torch.arange(2 * 3 * 18 * 15).view(2, 3, 18, 15)
    y = local_scan(x.to(DEVICE), 4, flip, column_first)
    assert torch.equal(y.cpu(), x.flatten(2)[:, :, by_loops(18, 15, 4, flip, column_first)])
    assert torch.equal(local_reverse(y, 18, 15, 4, flip, column_first).cpu(), x)


@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device")
def test_triton_reaches_beyond_2_to_the_31_elements():
    x = torch.randint(0, 256, (1, 2200, 1000, 1000), dtype=torch.uint8, device="cuda")
    y = local_scan(x, 7)
    assert torch.equal(y[:, -1:].cpu(), local_scan(x[:, -1:].cpu(), 7))
    assert torch.equal(local_reverse(y, 1000, 1000, 7), x)
