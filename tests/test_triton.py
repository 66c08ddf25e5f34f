"""The Triton kernels against the float64 reference.

Runs on a CUDA device, or on any machine in Triton's interpreter, in a process of its own:
``TRITON_INTERPRET=1 pytest tests/test_triton.py``. The interpreter is slow, so sizes there are small.
"""

import functools
import os

import pytest
import torch
from test_kernels import (
    ALL,
    assert_all_equal,
    assert_pieces,
    directional_problem,
    drawer,
    outputs_and_gradients,
    problem,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("needs a CUDA device or TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")

from nfhelpers.kernels import directional_scan, relative_error, selective_scan, triton_scan  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"

# arguments of `problem`; options of the scan
CASES = {
    "plain": (dict(length=13), {}),
    "all": (dict(batch=1, length=17, states=16, extras=ALL), dict(delta_softplus=True)),
    "tied": (dict(batch=1, length=17, states=16, extras=ALL, tied=True), dict(delta_softplus=True)),
    "tied, odd": (dict(channels=5, length=9, states=5, tied=True), dict(delta_softplus=True)),
    "groups": (dict(length=9, groups=2, extras=ALL), dict(delta_softplus=True)),
    "odd state, odd width": (dict(channels=5, length=9, states=3, extras=ALL), dict(delta_softplus=True)),
    "one step, one state": (dict(channels=5, length=1, states=1, extras="D"), dict(delta_softplus=True)),
    "one channel": (dict(batch=1, channels=1, length=37, states=5, extras="z"), {}),
    "end of a chunk": (dict(batch=1, length=16, extras="z"), {}),
    "several blocks a group": (dict(batch=1, channels=80, length=9, groups=2, extras="D"), {}),
    "many states": (dict(batch=1, channels=3, length=9, states=64), {}),
    "more states": (dict(batch=1, channels=3, length=5, states=100), {}),
    "long": (dict(batch=1, length=(1228, 40)[INTERPRETED], extras="delta_bias"), dict(delta_softplus=True)),
}


def to_device(arguments):
    return {name: x.to(DEVICE) for name, x in arguments.items()}


def assert_matches_reference(scan, arguments, tolerance=1e-5, **options):
    doubles = {name: x.double() for name, x in arguments.items()}
    wanted = outputs_and_gradients(scan, doubles, backend="reference", **options)
    options = {name: x.to(DEVICE) if name == "orders" else x for name, x in options.items()}
    found = outputs_and_gradients(scan, to_device(arguments), backend="triton", **options)
    for i, (x, y) in enumerate(zip(wanted, found, strict=True)):
        assert x.shape == y.shape
        assert relative_error(y, x) < tolerance, (i, list(arguments))


@pytest.mark.parametrize("name", CASES)
def test_matches_reference(name):
    arguments, options = CASES[name]
    options = options | dict(return_last_state=True, tied_decay=arguments.get("tied", False))
    assert_matches_reference(selective_scan, problem(**arguments), **options)


@pytest.mark.parametrize(
    ("shared", "order_a_sample", "tied"),
    [("", False, False), ("", True, True), ("x A D delta_bias", True, False)],
)
def test_directions_match_reference(shared, order_a_sample, tied):
    size = dict(batch=2, channels=5, length=7, states=4, shared=shared, tied=tied)
    arguments, orders = directional_problem(**size, order_a_sample=order_a_sample)
    options = dict(orders=orders, reverse=[False, True, True], tied_decay=tied)
    assert_matches_reference(directional_scan, arguments, **options)


def test_directions_of_several_blocks_and_offsets_of_64_bits(monkeypatch):
    arguments, orders = directional_problem(batch=1, directions=2, channels=40, length=6)
    assert_matches_reference(directional_scan, arguments, orders=orders, reverse=[True, False])
    monkeypatch.setattr(triton_scan, "WIDE_FROM", 0)
    assert_matches_reference(directional_scan, arguments, orders=orders, reverse=[True, False])


@pytest.mark.parametrize("kind", ["free", "tied", "tied, in orders"])
def test_segments_of_time_are_one_scan(monkeypatch, kind):
    """A GPU that is not full scans segments of 8 steps, the last one shorter; the same bits every time."""
    monkeypatch.setattr(triton_scan, "SHORTEST", 8)
    length = 25 if INTERPRETED else 1229
    if kind == "tied, in orders":
        arguments, orders = directional_problem(1, 2, 3, length, 4, tied=True)
        options = dict(orders=orders, reverse=[False, True], tied_decay=True)
        assert_matches_reference(directional_scan, arguments, **options)
    else:
        options = dict(delta_softplus=True, return_last_state=True, tied_decay=kind == "tied")
        arguments = problem(1, 6, length, extras=ALL, tied=kind == "tied")
        assert_matches_reference(selective_scan, arguments, **options)
        options, arguments = options | dict(backend="triton"), to_device(arguments)
        assert_all_equal(*(outputs_and_gradients(selective_scan, arguments, **options) for _ in range(2)))


@pytest.mark.parametrize("shortest, length, states", [(8, 25, 2), (99, 1, 3), (99, 2, 1)])
def test_pieces_and_packed_sequences(monkeypatch, shortest, length, states):
    monkeypatch.setattr(triton_scan, "SHORTEST", shortest)
    assert_pieces("triton", to_device(problem(1, 6, length, states, groups=2, extras=ALL)))


def test_dtypes_may_differ_and_the_default_does_not_matter():
    """Half-precision u and delta beside float32 B and C; the incoming gradient is of half precision too."""
    arguments = problem(length=13, states=16)
    dtypes = {name: torch.float16 if name in ("u", "delta") else torch.float32 for name in arguments}
    doubles = {name: x.to(dtypes[name]).double() for name, x in arguments.items()}
    wanted = outputs_and_gradients(selective_scan, doubles, backend="reference")
    given = {name: x.to(DEVICE, dtypes[name]) for name, x in arguments.items()}
    torch.set_default_dtype(torch.float64)
    try:
        found = outputs_and_gradients(selective_scan, given, backend="triton")
    finally:
        torch.set_default_dtype(torch.float32)
    for x, y, name in zip(wanted, found, ["y", *arguments], strict=True):
        assert y.dtype == dtypes.get(name, torch.float16)
        assert relative_error(y, x) < 2e-3, name


def test_strided_and_length_contiguous_inputs():
    """Halves of a wider tensor, channels last; and the (B, D, L) memory of mamba_ssm, copied."""
    draw = drawer(0, torch.float32)
    wide = draw(2, 11, 12)
    arguments = problem(length=11) | dict(u=wide[..., :6].transpose(1, 2), z=wide[..., 6:].transpose(1, 2))
    assert_matches_reference(selective_scan, arguments)
    arguments |= dict(u=draw(2, 6, 11), z=draw(1, 6, 11).expand(2, 6, 11))
    assert_matches_reference(selective_scan, arguments)


def test_backward_is_bitwise_repeatable():
    arguments = to_device(problem(1, channels=40, length=11, extras=ALL))
    options = dict(delta_softplus=True, return_last_state=True, backend="triton")
    assert_all_equal(*(outputs_and_gradients(selective_scan, arguments, **options) for _ in range(2)))


@pytest.mark.parametrize("directional", [False, True], ids=["selective", "directional"])
def test_registered_operation_keeps_its_promises(directional):
    """Fake kernels give the shapes and strides of the real ones, for any memory order of the inputs."""
    if directional:
        arguments, orders = directional_problem(batch=1, directions=2, length=9)
        scan = functools.partial(directional_scan, orders=orders.to(DEVICE), backend="triton")
    else:
        arguments = problem(batch=2, length=9, extras="D z")
        scan = functools.partial(selective_scan, backend="triton")
    compiled = torch.compile(scan, fullgraph=True, backend="aot_eager")
    arguments = to_device(arguments)
    wanted, found = (outputs_and_gradients(f, arguments) for f in (scan, compiled))
    assert_all_equal(wanted, found)


HALVES = [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16]  # interpreted: no bfloat16


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    "channels, states, tied", [(6, 16, False), (6, 1, True), (6, 40, False), (80, 16, True)], ids=str
)
def test_half_precision_inputs_keep_a_float32_state(dtype, channels, states, tied):
    arguments = problem(1, channels, 13, states, groups=2, extras=ALL, tied=tied)  # 40 of 80: whole tiles
    halves = ("u", "delta", "B", "C", "z")
    given = {name: x.to(DEVICE, dtype if name in halves else torch.float32) for name, x in arguments.items()}
    doubles = {name: x.double().cpu() for name, x in given.items()}
    options = dict(delta_softplus=True, tied_decay=tied)
    wanted = outputs_and_gradients(selective_scan, doubles, backend="reference", **options)
    found = outputs_and_gradients(selective_scan, given, backend="triton", **options)
    for x, y, name in zip(wanted, found, ["y", *arguments], strict=True):
        assert y.dtype == (dtype if name in ("y", *halves) else torch.float32)
        assert relative_error(y, x) < 2e-2, name


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
def test_a_compiled_scan_is_the_same():
    arguments = to_device(problem(channels=48, length=21, extras=ALL, seed=5))
    scan = functools.partial(selective_scan, delta_softplus=True, backend="triton")
    eager = outputs_and_gradients(scan, arguments)
    compiled = outputs_and_gradients(torch.compile(scan, dynamic=False), arguments)
    assert all(relative_error(x, y) < 1e-5 for x, y in zip(compiled, eager, strict=True))
