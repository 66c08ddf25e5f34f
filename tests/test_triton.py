"""The Triton kernels against the float64 reference.

Runs on a CUDA device, or on any machine in Triton's interpreter, in a process of its own:
``TRITON_INTERPRET=1 pytest tests/test_triton.py``. The interpreter is slow, so sizes there are small.
"""

import functools
import os

import pytest
import torch
from test_kernels import (
    VARIABLE,
    directional_problem,
    drawer,
    mamba_ssm_problem,
    outputs_and_gradients,
    problem,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("needs a CUDA device or TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")

from nfhelpers.kernels import directional_scan, relative_error, selective_scan, triton_scan  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"

ALL = "D z delta_bias"
# arguments of `problem`; options of the scan
CASES = {
    "plain": (dict(length=13), {}),
    "all": (dict(length=17, states=16, extras=ALL), dict(delta_softplus=True)),
    "tied": (dict(length=17, states=16, extras=ALL, tied=True), dict(delta_softplus=True)),
    "zero-order hold": (dict(length=13, extras="D"), dict(discretization="zoh")),
    "tied zero-order hold": (dict(length=9, tied=True), dict(discretization="zoh", delta_softplus=True)),
    "groups": (dict(length=17, groups=2, extras=ALL), dict(delta_softplus=True)),
    "odd state, odd width": (dict(channels=5, length=9, states=3, extras=ALL), dict(delta_softplus=True)),
    "one step, one state": (dict(channels=5, length=1, states=1, extras="D"), dict(delta_softplus=True)),
    "fixed B and C": (dict(length=9, fixed="B C", extras="D z"), dict(delta_softplus=True)),
    "fixed B": (dict(length=9, fixed="B"), dict(discretization="zoh")),
    "fixed C, groups": (dict(length=9, groups=3, fixed="C"), {}),
    "end of a chunk": (dict(length=16, extras="z"), {}),
    "several blocks a group": (
        dict(batch=1, channels=80, length=9, groups=2, extras="D"),
        dict(delta_softplus=True),
    ),
    "several blocks": (dict(batch=1, channels=40, length=9, extras=ALL), dict(delta_softplus=True)),
    "many states": (dict(batch=1, channels=3, length=9, states=64), {}),
    "more states": (dict(batch=1, channels=3, length=5, states=100), {}),
    "15": (dict(batch=1, length=15, states=16), {}),
    "63": (dict(batch=1, length=63, states=1), {}),
    "300": (dict(batch=1, length=300, extras="delta_bias"), dict(delta_softplus=True)),
    "a field": (dict(batch=1, channels=3, length=1228, states=1), dict(delta_softplus=True)),
}


def to_device(arguments, dtype=torch.float32):
    return {name: x.to(DEVICE, dtype) for name, x in arguments.items()}


def assert_matches_reference(scan, arguments, tolerance=1e-5, **options):
    wanted = outputs_and_gradients(
        scan, {name: x.double() for name, x in arguments.items()}, backend="reference", **options
    )
    options = {name: x.to(DEVICE) if name == "orders" else x for name, x in options.items()}
    found = outputs_and_gradients(scan, to_device(arguments), backend="triton", **options)
    for i, (x, y) in enumerate(zip(wanted, found, strict=True)):
        assert x.shape == y.shape
        assert relative_error(y.cpu(), x) < tolerance, (i, list(arguments))


@pytest.mark.parametrize("name", CASES)
def test_matches_reference(name):
    arguments, options = CASES[name]
    assert_matches_reference(
        selective_scan,
        problem(**arguments),
        return_last_state=True,
        tied_decay=arguments.get("tied", False),
        **options,
    )


@pytest.mark.parametrize("tied", [False, True], ids=["free", "tied"])
@pytest.mark.parametrize("shared", ["", "x A D delta_bias"], ids=["separate", "shared"])
@pytest.mark.parametrize("order_a_sample", [False, True], ids=["one order", "an order a sample"])
def test_directions_match_reference(shared, order_a_sample, tied):
    arguments, orders = directional_problem(
        batch=2, channels=5, length=11, states=4, shared=shared, order_a_sample=order_a_sample, tied=tied
    )
    options = dict(orders=orders, reverse=[False, True, True], tied_decay=tied)
    assert_matches_reference(directional_scan, arguments, **options)


def test_directions_of_several_blocks():
    arguments, orders = directional_problem(batch=1, directions=2, channels=40, length=9)
    assert_matches_reference(directional_scan, arguments, orders=orders, reverse=[True, False])


def test_offsets_of_64_bits(monkeypatch):
    monkeypatch.setattr(triton_scan, "_is_wide", lambda *sizes: True)
    arguments, orders = directional_problem(length=11)
    assert_matches_reference(directional_scan, arguments, orders=orders, reverse=[False, True, True])


@pytest.mark.parametrize("default", [torch.float64, torch.float16], ids=str)
def test_default_dtype_of_torch_does_not_matter(default):
    torch.set_default_dtype(default)
    try:
        assert_matches_reference(selective_scan, problem(length=9, extras=ALL), return_last_state=True)
    finally:
        torch.set_default_dtype(torch.float32)


def test_dtypes_may_differ():
    """Half-precision u and delta beside float32 B and C; the incoming gradient is of half precision too."""
    arguments = problem(length=13, states=16)
    dtypes = {name: torch.float16 if name in ("u", "delta") else torch.float32 for name in arguments}
    arguments = {name: x.to(dtypes[name]).float() for name, x in arguments.items()}
    doubles = {name: x.double() for name, x in arguments.items()}
    wanted = outputs_and_gradients(selective_scan, doubles, backend="reference")
    given = {name: x.to(DEVICE, dtypes[name]) for name, x in arguments.items()}
    found = outputs_and_gradients(selective_scan, given, backend="triton")
    for x, y, name in zip(wanted, found, ["y", *arguments], strict=True):
        assert y.dtype == dtypes.get(name, torch.float16)
        assert relative_error(y.cpu().double(), x) < 2e-3, name


@pytest.mark.parametrize(("variable_B", "variable_C", "groups"), VARIABLE)
def test_mamba_ssm_grid(variable_B, variable_C, groups):
    arguments = mamba_ssm_problem(17, variable_B, variable_C, groups, True, True, True)
    assert_matches_reference(selective_scan, arguments, delta_softplus=True, return_last_state=True)


def test_strided_and_length_contiguous_inputs():
    """Halves of a wider tensor, channels last; and the (B, D, L) memory of mamba_ssm, copied."""
    draw = drawer(0, torch.float32)
    wide = draw(2, 11, 12)
    arguments = problem(length=11) | dict(u=wide[..., :6].transpose(1, 2), z=wide[..., 6:].transpose(1, 2))
    assert_matches_reference(selective_scan, arguments)
    arguments |= dict(u=draw(2, 6, 11), z=draw(1, 6, 11).expand(2, 6, 11))
    assert_matches_reference(selective_scan, arguments)


def test_state_alone_has_a_gradient():
    def last_state(**arguments):
        y, last = selective_scan(**arguments, return_last_state=True)
        return last + 0 * y.sum()  # C reaches the output only

    assert_matches_reference(last_state, problem(length=9, seed=3))


def test_sums_of_partials():
    """Of several shapes and dtypes in one launch; more rows and columns than a program takes, and fewer."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((37, 3, 201), (5, 7), (1, 513), (64, 256))
    partials = [torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes]
    like = [
        torch.empty(0, dtype=dtype) for dtype in (torch.float32, torch.float16, torch.float32, torch.float64)
    ]
    sums = triton_scan._sums((partials[0], None, *partials[1:]), (like[0], None, *like[1:]))
    assert sums[1].shape == (0,)
    for x, y, given in zip(partials, (sums[0], *sums[2:]), like, strict=True):
        assert y.dtype == given.dtype and y.shape == x.shape[1:]
        assert relative_error(y, x.double().sum(0)) < (1e-3 if y.dtype == torch.float16 else 1e-6)


def test_backward_is_bitwise_repeatable():
    arguments = to_device(problem(channels=40, length=19, extras=ALL))
    options = dict(delta_softplus=True, return_last_state=True, backend="triton")
    one, two = (outputs_and_gradients(selective_scan, arguments, **options) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(one, two, strict=True))


@pytest.mark.parametrize("directional", [False, True], ids=["selective", "directional"])
def test_registered_operation_keeps_its_promises(directional):
    """Fake kernels give the shapes and strides of the real ones, for any memory order of the inputs."""
    if directional:
        arguments, orders = directional_problem(batch=1, directions=2, length=9)
        scan = lambda *given: directional_scan(*given, orders=orders.to(DEVICE), backend="triton")  # noqa: E731
        given = to_device(arguments)
        given = [given[name] for name in ("x", "delta", "A", "B", "C", "D")]
    else:
        scan = lambda *given: selective_scan(*given, backend="triton")  # noqa: E731
        given = to_device(problem(batch=2, length=9, extras="D z"))
        given = [given[name] for name in ("u", "delta", "A", "B", "C", "D", "z")]
    given = [x.requires_grad_() for x in given]
    compiled = torch.compile(scan, fullgraph=True, backend="aot_eager")
    weights = torch.randn_like(scan(*given))
    wanted = [scan(*given), *torch.autograd.grad((scan(*given) * weights).sum(), given)]
    found = [compiled(*given), *torch.autograd.grad((compiled(*given) * weights).sum(), given)]
    for x, y in zip(wanted, found, strict=True):
        assert torch.equal(x, y)


HALVES = (
    [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16]
)  # the interpreter has no bfloat16


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    "channels, states, tied",
    [(6, 16, False), (6, 16, True), (6, 1, False), (6, 5, True), (6, 40, False), (80, 16, True)],
    ids=str,
)
def test_half_precision_inputs_keep_a_float32_state(dtype, channels, states, tied):
    arguments = problem(1, channels, 21, states, groups=2, extras=ALL, tied=tied)  # 40 of 80: whole tiles
    halves = ("u", "delta", "B", "C", "z")
    arguments = {name: x.to(dtype).float() if name in halves else x for name, x in arguments.items()}
    options = dict(delta_softplus=True, tied_decay=tied)
    doubles = {name: x.double() for name, x in arguments.items()}
    wanted = outputs_and_gradients(selective_scan, doubles, backend="reference", **options)
    given = {name: x.to(DEVICE, dtype if name in halves else torch.float32) for name, x in arguments.items()}
    found = outputs_and_gradients(selective_scan, given, backend="triton", **options)
    for x, y, name in zip(wanted, found, ["y", *arguments], strict=True):
        assert y.dtype == (dtype if name in ("y", *halves) else torch.float32)
        assert relative_error(y.cpu().double(), x) < 2e-2, name


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
def test_kernels_compile_while_torch_compile_traces(monkeypatch):
    arguments = to_device(problem(channels=48, length=21, extras=ALL, seed=5))
    calls = []
    for name in ("forward", "backward"):
        function = getattr(triton_scan, name)

        def record(*given, name=name, function=function):
            calls.append((name, bool(given[0].any())))  # zeros ahead
            return function(*given)

        monkeypatch.setattr(triton_scan, name, record)
    scan = functools.partial(selective_scan, delta_softplus=True, backend="triton")
    eager = outputs_and_gradients(scan, arguments)
    calls.clear()
    compiled = outputs_and_gradients(torch.compile(scan, dynamic=False), arguments)
    for name in ("forward", "backward"):
        real = [values for called, values in calls if called == name]
        assert not real[0] and real[-1]
    assert all(relative_error(x, y) < 1e-5 for x, y in zip(compiled, eager, strict=True))
