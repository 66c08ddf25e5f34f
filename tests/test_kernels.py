"""The scans: closed forms, the reference against hand-written NumPy, CPU backends against the reference."""

import functools
import itertools
import sys
import threading
import warnings
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from scipy.linalg import expm
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.profiler import ProfilerActivity, profile

import nfhelpers
from nfhelpers import kernels
from nfhelpers.kernels import choose_backend, directional_scan, relative_error, selective_scan
from nfhelpers.kernels import chunked as chunked_module
from nfhelpers.kernels.reference import hold, selective_scan_reference

BOTH = pytest.mark.parametrize("backend", ["reference", "chunked"])
STATUS = kernels.backend_status()
FAST = [
    pytest.param(name, marks=pytest.mark.skipif(STATUS[name] != "ok", reason=f"{name}: {STATUS[name]}"))
    for name in ("chunked", "native")
]
EACH = pytest.mark.parametrize("backend", FAST)
WITH_REFERENCE = pytest.mark.parametrize("backend", ["reference", *FAST])
DISCRETIZATIONS = pytest.mark.parametrize("discretization", ["mamba", "zoh"])


def drawer(seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def problem(
    batch=2,
    channels=6,
    length=15,
    states=4,
    groups=None,
    fixed="",
    extras="",
    seed=0,
    dtype=torch.float32,
    tied=False,
):
    """Arguments of a scan with realistic step sizes; `fixed` and `extras` name arguments, space separated."""
    draw = drawer(seed, dtype)
    varying = (batch, states, length) if groups is None else (batch, groups, states, length)
    arguments = dict(
        u=draw(batch, channels, length),
        delta=draw(batch, channels, length).abs() * 0.5,
        A=-(draw(channels) if tied else draw(channels, states)).exp(),
        B=draw(channels, states) if "B" in fixed.split() else draw(*varying),
        C=draw(channels, states) if "C" in fixed.split() else draw(*varying),
    )
    shapes = dict(D=(channels,), z=(batch, channels, length), delta_bias=(channels,))
    return arguments | {name: draw(*shapes[name]) for name in extras.split()}


def directional_problem(
    batch=2,
    directions=3,
    channels=5,
    length=37,
    states=4,
    shared="x",
    order_a_sample=False,
    extras="D delta_bias",
    tied=False,
    seed=0,
    dtype=torch.float32,
):
    """Arguments and orders of a directional scan; `shared` names what is one for all directions."""
    draw = drawer(seed, dtype)
    shared = shared.split()

    def each(name, *shape):
        return draw(*shape) if name in shared else draw(directions, *shape)

    varying = (batch, directions, length, states)
    arguments = dict(
        x=draw(batch, length, channels) if "x" in shared else draw(batch, directions, length, channels),
        delta=draw(batch, directions, length, channels),
        A=-(each("A", channels) if tied else each("A", channels, states)).exp(),
        B=draw(*varying),
        C=draw(*varying),
    )
    arguments |= {name: each(name, channels) for name in extras.split()}
    shape = (batch, directions, length) if order_a_sample else (directions, length)
    return arguments, draw(*shape).argsort(-1)


def outputs_and_gradients(scan, arguments, **options):
    """[outputs, gradient of every argument] for a loss that weighs every output."""
    given = {name: x.detach().requires_grad_() for name, x in arguments.items()}  # strides as they are
    outputs = scan(**given, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(99)
    weights = [torch.randn(x.shape, generator=generator).to(x) for x in outputs]
    loss = sum((x * weight).sum() for x, weight in zip(outputs, weights, strict=True))
    return [*outputs, *torch.autograd.grad(loss, list(given.values()))]


def assert_matches_reference(scan, backend, arguments, tolerance=1e-5, **options):
    """Outputs and every gradient: the largest error, and its norm, relative to the truth's in float64."""
    doubles = {name: x.double() for name, x in arguments.items()}
    wanted = outputs_and_gradients(scan, doubles, backend="reference", **options)
    found = outputs_and_gradients(scan, arguments, backend=backend, **options)
    names = ["y", "last"][: len(wanted) - len(arguments)]
    for name, x, y in zip((*names, *arguments), wanted, found, strict=True):
        assert y.shape == x.shape, name
        assert relative_error(y, x) <= tolerance, name
        assert (y.double() - x).norm() <= tolerance * x.norm(), name


assert_selective = functools.partial(assert_matches_reference, selective_scan, return_last_state=True)
assert_directional = functools.partial(assert_matches_reference, directional_scan)


# ------------------------------------------------------------------------------------------- the reference


def scan_by_hand(u, delta, A, B, C, D=None, z=None, delta_bias=None, softplus=False, zoh=False, tied=False):
    """NumPy, one scalar at a time, from the formulas; B and C (B, G, N, L)."""
    batch, channels, length = u.shape
    states = B.shape[2]
    y, last = np.zeros_like(u), np.zeros((batch, channels, states))
    for b, d in itertools.product(range(batch), range(channels)):
        group = d * B.shape[1] // channels
        for step, n in itertools.product(range(length), range(states)):
            rate = (n + 1) * A[d] if tied else A[d, n]
            size = delta[b, d, step] + (0 if delta_bias is None else delta_bias[d])
            size = np.log1p(np.exp(size)) if softplus else size
            decay = np.exp(size * rate)
            weight = (decay - 1) / rate if zoh else size
            last[b, d, n] = decay * last[b, d, n] + weight * B[b, group, n, step] * u[b, d, step]
            y[b, d, step] += C[b, group, n, step] * last[b, d, n]
    y = y if D is None else y + D[:, None] * u
    return (y if z is None else y * z / (1 + np.exp(-z))), last


@BOTH
@DISCRETIZATIONS
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("extras", ["", "D z delta_bias"])
def test_agrees_with_a_loop_over_scalars(backend, discretization, extras, tied):
    arguments = problem(2, 4, 5, 3, groups=2, extras=extras, dtype=torch.float64, tied=tied)
    y, last = selective_scan(
        **arguments,
        delta_softplus=True,
        return_last_state=True,
        backend=backend,
        discretization=discretization,
        tied_decay=tied,
    )
    by_hand = {name: x.numpy() for name, x in arguments.items()}
    y_hand, last_hand = scan_by_hand(**by_hand, softplus=True, zoh=discretization == "zoh", tied=tied)
    np.testing.assert_allclose(y.numpy(), y_hand, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(last.numpy(), last_hand, rtol=1e-12, atol=1e-13)


@BOTH
@pytest.mark.parametrize("order_a_sample", [False, True])
def test_directions_agree_with_a_loop_over_tokens(backend, order_a_sample):
    """Every token of every direction one scalar at a time, walking the order."""
    arguments, orders = directional_problem(2, 3, 2, 6, 2, order_a_sample=order_a_sample, dtype=torch.float64)
    found = directional_scan(**arguments, orders=orders, reverse=[False, True, False], backend=backend)
    x, delta, A, B, C, D, bias = (tensor.numpy() for tensor in arguments.values())
    wanted = np.full(delta.shape, np.nan)
    for b, k, d in itertools.product(range(2), range(3), range(2)):
        walk = (orders[b, k] if order_a_sample else orders[k]).tolist()
        state = np.zeros(2)
        for token in reversed(walk) if k == 1 else walk:
            size = np.log1p(np.exp(delta[b, k, token, d] + bias[k, d]))
            state = np.exp(size * A[k, d]) * state + size * B[b, k, token] * x[b, token, d]
            wanted[b, k, token, d] = C[b, k, token] @ state + D[k, d] * x[b, token, d]
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-12, atol=1e-13)


@BOTH
@pytest.mark.parametrize("length", [1, 100])
def test_constant_scan_is_a_geometric_series(backend, length):
    """Everything constant: h_l = x (1 - r^(l+1)) / (1 - r); zero-order hold reaches -B/A exactly (u = 1)."""
    a, b, c, step = -0.8, 1.5, 2.0, 0.1
    one = torch.ones(1, 1, length, dtype=torch.float64)
    weights = [torch.full((1, 1), value, dtype=torch.float64) for value in (a, b, c)]
    r = np.exp(step * a)
    powers = r ** np.arange(1, length + 1)
    held = selective_scan(one, one * step, *weights, backend=backend, discretization="zoh")[0, 0]
    np.testing.assert_allclose(held, c * b / -a * (1 - powers), rtol=1e-12)
    euler = selective_scan(one, one * step, *weights, backend=backend)[0, 0]
    np.testing.assert_allclose(euler, c * step * b * (1 - powers) / (1 - r), rtol=1e-12)


@BOTH
def test_zero_order_hold_is_the_exact_solution_of_the_ode(backend):
    """h' = A h + B u with u constant on each step is a matrix exponential."""
    arguments = problem(1, 1, 7, 2, dtype=torch.float64)
    _, last = selective_scan(**arguments, return_last_state=True, backend=backend, discretization="zoh")
    u, delta, A, B = (arguments[name].numpy() for name in ("u", "delta", "A", "B"))
    state = np.zeros(2)
    for step in range(7):
        # Augmented system [h, 1]: its exponential carries the constant input along.
        system = np.zeros((3, 3))
        system[:2, :2] = np.diag(A[0])
        system[:2, 2] = B[0, :, step] * u[0, 0, step]
        state = (expm(system * delta[0, 0, step]) @ np.append(state, 1))[:2]
    np.testing.assert_allclose(last[0, 0], state, rtol=1e-12)


# ------------------------------------------------------------------------------- backends against reference


SIZES = [
    dict(length=1),
    dict(length=15, channels=7, states=1, batch=1),
    dict(length=63, channels=5, states=16),
    dict(length=300, channels=6, states=4, groups=2),
    dict(length=33, channels=6, states=4, groups=1),
    dict(length=64, channels=37, states=3),
    dict(length=63, channels=6, states=4, fixed="B C"),
    dict(length=40, channels=6, states=4, fixed="B", groups=2),
    dict(length=40, channels=3, states=4, fixed="C"),
    dict(length=40, channels=4, states=2, groups=4),
]


def size_name(size):
    return "-".join(f"{k}{v}" for k, v in size.items())


@EACH
@DISCRETIZATIONS
@pytest.mark.parametrize("tied", [False, True], ids=["free", "tied"])
@pytest.mark.parametrize("size", SIZES, ids=size_name)
def test_matches_reference(backend, size, tied, discretization):
    assert_selective(
        backend,
        problem(**size, extras="D z delta_bias", tied=tied),
        delta_softplus=True,
        discretization=discretization,
        tied_decay=tied,
    )


@EACH
@pytest.mark.parametrize("tied", [False, True], ids=["free", "tied"])
def test_matches_reference_at_the_length_of_a_field(backend, tied):
    """L = 1228, where errors have room to grow."""
    arguments = problem(1, 5, 1228, 16, extras="D z delta_bias", tied=tied)
    assert_selective(backend, arguments, delta_softplus=True, tied_decay=tied)


@EACH
@DISCRETIZATIONS
@pytest.mark.parametrize("extras", ["", "D", "z", "delta_bias", "D z"])
@pytest.mark.parametrize("softplus", [False, True])
def test_matches_reference_with_each_option(backend, extras, softplus, discretization):
    arguments = problem(length=37, extras=extras)
    if "delta_bias" in arguments and not softplus:
        arguments["delta_bias"] = arguments["delta_bias"].abs() * 0.1
    assert_selective(backend, arguments, delta_softplus=softplus, discretization=discretization)


DIRECTIONS = [
    dict(length=1, directions=1),
    dict(length=1, directions=4, shared=""),
    dict(length=15, directions=1, channels=7, states=1),
    dict(length=63, directions=3, channels=5, states=16, shared=""),
    dict(length=63, directions=4, shared="x A", extras="D"),
    dict(length=64, directions=4, channels=37, shared="x A D delta_bias", order_a_sample=True),
    dict(length=37, directions=3, shared="A D", order_a_sample=True),
    dict(length=37, directions=1, shared="", order_a_sample=True, extras=""),
    dict(length=300, directions=4, batch=3),
]


@EACH
@pytest.mark.parametrize("tied", [False, True], ids=["free", "tied"])
@pytest.mark.parametrize("backwards", [False, True], ids=["forward", "mixed"])
@pytest.mark.parametrize("size", DIRECTIONS, ids=size_name)
def test_directions_match_reference(backend, size, backwards, tied):
    arguments, orders = directional_problem(**size, tied=tied)
    reverse = [k % 2 == 0 for k in range(len(orders[0] if orders.dim() == 3 else orders))]
    options = dict(orders=orders, reverse=reverse if backwards else None, tied_decay=tied)
    assert_directional(backend, arguments, **options)


@EACH
def test_directions_match_reference_at_the_length_of_a_field(backend):
    arguments, orders = directional_problem(1, 2, 3, 1228, 16)
    assert_directional(backend, arguments, orders=orders, reverse=(False, True))


@EACH
def test_directions_without_softplus(backend):
    arguments, orders = directional_problem(extras="D")
    arguments["delta"] = arguments["delta"].abs() * 0.5
    assert_directional(backend, arguments, orders=orders, delta_softplus=False)


@EACH
def test_a_direction_is_a_scan_of_the_permuted_sequence(backend):
    """The order of the tokens is the plain scan, reversed it is the flipped scan, in int32 as in int64."""
    arguments, _ = directional_problem(directions=2, length=40)
    natural = torch.arange(40, dtype=torch.int32).expand(2, 40)
    y = directional_scan(**arguments, orders=natural, reverse=(False, True), backend=backend)
    for k, flip in enumerate((False, True)):
        direction = {name: x if name == "x" else x[:, k] for name, x in arguments.items()}
        for name in ("A", "D", "delta_bias"):
            direction[name] = arguments[name][k]
        rows = [direction[name].flip(1) if flip else direction[name] for name in ("x", "delta", "B", "C")]
        x, delta, B, C = (row.transpose(1, 2) for row in rows)
        bias = direction["delta_bias"]
        options = dict(delta_bias=bias, delta_softplus=True, backend=backend)
        plain = selective_scan(x, delta, direction["A"], B, C, direction["D"], **options).transpose(1, 2)
        torch.testing.assert_close(y[:, k], plain.flip(1) if flip else plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_result_does_not_depend_on_the_chunk(chunk, monkeypatch):
    monkeypatch.setattr(chunked_module, "CHUNK", chunk)
    assert_selective("chunked", problem(length=63, extras="D z"))
    arguments, orders = directional_problem(length=63)
    assert_directional("chunked", arguments, orders=orders, reverse=(True, False, True))


@pytest.mark.parametrize("samples", [1, 2])
def test_slices_of_the_batch_and_of_the_directions_add_up(monkeypatch, samples):
    """Slices whose gradients of A, B, C and D are summed: 5 samples one by one; 5 directions two by two."""
    monkeypatch.setattr(chunked_module, "STEP_ELEMENTS", 24 * samples)
    arguments = problem(batch=5, length=40, fixed="B", extras="D delta_bias")
    assert_selective("chunked", arguments, delta_softplus=True)
    arguments, orders = directional_problem(1, 5, 6, 40, 4)
    assert_directional("chunked", arguments, orders=orders, reverse=[False, True, True, False, False])


@EACH
def test_gradient_of_the_output_alone_and_of_the_state_alone(backend):
    for pick in (0, 1):
        gradients = []
        for name, dtype in (("reference", torch.float64), (backend, torch.float32)):
            given = [x.to(dtype).requires_grad_() for x in problem(length=40).values()]
            output = selective_scan(*given, return_last_state=True, backend=name)[pick]
            gradients.append(torch.autograd.grad(output.square().sum(), given, allow_unused=True))
        # y does not reach the last state through C: autograd says None, the custom backward zero.
        for wanted, found in zip(*gradients, strict=True):
            assert relative_error(found, wanted) <= 1e-5 if wanted is not None else not found.any()


@EACH
def test_strided_and_expanded_inputs(backend):
    scan = functools.partial(selective_scan, backend=backend)
    arguments = problem(length=300, extras="D z", dtype=torch.float32)
    wanted = scan(**arguments)
    strided = dict(arguments)
    strided["u"] = arguments["u"].transpose(1, 2).contiguous().transpose(1, 2)
    strided["delta"] = arguments["delta"].repeat_interleave(2, dim=2)[..., ::2]
    strided["B"] = arguments["B"].transpose(0, 2).contiguous().transpose(0, 2)
    strided["A"] = arguments["A"].T.contiguous().T
    strided["D"] = arguments["D"].repeat_interleave(3)[::3]
    strided["z"] = torch.cat([arguments["z"], arguments["z"]], 1)[:, :6]
    assert not any(strided[name].is_contiguous() for name in ("u", "delta", "B", "A", "D", "z"))
    assert torch.equal(scan(**strided), wanted)

    expanded = dict(arguments, u=arguments["u"][:, :1].expand(-1, 6, -1))
    expanded["B"] = arguments["B"][:1].expand(2, -1, -1)
    assert_selective(backend, expanded)
    assert_selective(backend, strided)


@EACH
def test_strided_and_expanded_directions(backend):
    """As a model passes them: slices of one projection (B, L, K F), seen as (B, K, L, F)."""
    scan = functools.partial(directional_scan, backend=backend)
    arguments, orders = directional_problem(length=63)
    x, delta, B, C = (arguments[name] for name in ("x", "delta", "B", "C"))
    projected = torch.cat([delta, B, C], -1).transpose(1, 2).contiguous().transpose(1, 2)  # (B, K, L, F)
    strided = dict(arguments, x=torch.cat([x, x], -1)[..., :5])
    strided |= dict(zip(("delta", "B", "C"), projected.split([5, 4, 4], -1), strict=True))
    assert not any(strided[name].is_contiguous() for name in ("x", "delta", "B", "C"))
    wanted = scan(**arguments, orders=orders)
    assert torch.equal(scan(**strided, orders=orders), wanted)
    assert torch.equal(scan(**arguments, orders=orders.T.contiguous().T), wanted)
    assert_directional(backend, strided, orders=orders.expand(2, -1, -1))
    expanded = dict(arguments, B=B[:, :1].expand(-1, 3, -1, -1), delta=delta[:1].expand(2, -1, -1, -1))
    assert_directional(backend, expanded, orders=orders)


@EACH
def test_output_keeps_the_memory_layout_of_u(backend):
    """(B, L, D) tensors passed transposed come back transposed: the next linear layer needs no copy."""
    arguments = problem(length=40)
    arguments["u"] = arguments["u"].transpose(1, 2).contiguous().transpose(1, 2)
    assert selective_scan(**arguments, backend=backend).transpose(1, 2).is_contiguous()


@DISCRETIZATIONS
@pytest.mark.parametrize("tied", [False, True], ids=["free", "tied"])
@pytest.mark.parametrize("fixed", ["", "B C"])
def test_gradcheck(discretization, fixed, tied, monkeypatch):
    monkeypatch.setattr(chunked_module, "CHUNK", 2)
    arguments = problem(
        2, 4, 5, 3, groups=2, fixed=fixed, extras="D z delta_bias", dtype=torch.float64, seed=3, tied=tied
    )
    names, given = list(arguments), [x.requires_grad_() for x in arguments.values()]

    def scan(*tensors):
        return selective_scan(
            **dict(zip(names, tensors, strict=True)),
            delta_softplus=True,
            return_last_state=True,
            discretization=discretization,
            tied_decay=tied,
            backend="chunked",
        )

    assert torch.autograd.gradcheck(scan, given)


@pytest.mark.parametrize("shared", ["", "x A D delta_bias"], ids=["separate", "shared"])
def test_gradcheck_of_directions(shared, monkeypatch):
    monkeypatch.setattr(chunked_module, "CHUNK", 2)
    arguments, orders = directional_problem(2, 3, 2, 5, 2, shared=shared, dtype=torch.float64)
    names, given = list(arguments), [x.requires_grad_() for x in arguments.values()]

    def scan(*tensors):
        named = dict(zip(names, tensors, strict=True))
        return directional_scan(**named, orders=orders, reverse=(False, True, False), backend="chunked")

    assert torch.autograd.gradcheck(scan, given)


@EACH
def test_second_derivative_is_refused_and_given_by_reference(backend):
    u, delta, *others = problem(1, 1, 3, 1).values()
    delta.requires_grad_()

    def slope(name):
        y = selective_scan(u, delta, *others, backend=name)
        return torch.autograd.grad(y.sum(), delta, create_graph=True)[0]

    assert torch.autograd.grad(slope("reference").sum(), delta)[0].abs().sum() > 0
    # The slope is there, for a loss whose second derivative does not pass through the scan.
    torch.testing.assert_close(slope(backend), slope("reference"), rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match="no second derivative; use backend='reference'"):
        torch.autograd.grad(slope(backend).sum(), delta)


# -------------------------------------------------------------------------------------- mamba_ssm's own tests


def scan_of_mamba_ssm(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
    """mamba_ssm's semantics, written on its own: discretise all positions at once, then recur; (y, last)."""
    channels = u.shape[1]
    if delta_bias is not None:
        delta = delta + delta_bias[None, :, None]
    if delta_softplus:
        delta = torch.log1p(delta.exp())
    B, C = (
        x if x.dim() == 2 else x[:, None] if x.dim() == 3 else x.repeat_interleave(channels // x.shape[1], 1)
        for x in (B, C)
    )  # (D, N), (B, 1, N, L) or (B, D, N, L)
    B, C = (x[None, :, :, None] if x.dim() == 2 else x for x in (B, C))
    decays = torch.exp(torch.einsum("bdl,dn->bdnl", delta, A)).unbind(-1)
    inputs = ((delta * u)[:, :, None] * B).unbind(-1)  # (B, D, N) each
    h, states = torch.zeros_like(inputs[0]), []
    for decay, x in zip(decays, inputs, strict=True):
        h = decay * h + x
        states.append(h)
    y = (torch.stack(states, -1) * C).sum(2)
    y = y if D is None else y + u * D[None, :, None]
    return (y if z is None else y * (z * torch.sigmoid(z))), h


def mamba_ssm_problem(length, variable_B, variable_C, groups, has_D, has_z, has_bias):
    """The tensors of its test: batch 2, 4 channels, 8 states."""
    generator = torch.Generator().manual_seed(0)
    batch, channels, states = 2, 4, 8
    rand, randn = (functools.partial(draw, generator=generator) for draw in (torch.rand, torch.randn))
    varying = (batch, states, length) if groups == 1 else (batch, groups, states, length)
    A = -0.5 * rand(channels, states)
    B = randn(*varying) if variable_B else randn(channels, states)
    C = randn(*varying) if variable_C else randn(channels, states)
    D = randn(channels) if has_D else None
    z = randn(batch, channels, length) if has_z else None
    bias = 0.5 * rand(channels) if has_bias else None
    u, delta = randn(batch, channels, length), 0.5 * rand(batch, channels, length)
    named = dict(u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=bias)
    return {name: x for name, x in named.items() if x is not None}


def assert_as_mamba_ssm(backend, arguments, softplus, return_last_state):
    doubles = {name: x.double() for name, x in arguments.items()}

    def plain(**given):
        outputs = scan_of_mamba_ssm(**given, delta_softplus=softplus)
        return outputs if return_last_state else outputs[0]

    wanted = outputs_and_gradients(plain, doubles)
    options = dict(delta_softplus=softplus, return_last_state=return_last_state, backend=backend)
    found = outputs_and_gradients(selective_scan, arguments, **options)
    assert max(relative_error(y, x) for x, y in zip(wanted, found, strict=True)) <= 1e-5


VARIABLE = [(False, False, 1), (False, True, 1), (True, False, 1), (True, True, 1), (True, True, 2)]


@WITH_REFERENCE
@pytest.mark.parametrize(("variable_B", "variable_C", "groups"), VARIABLE)
def test_mamba_ssm_grid(backend, variable_B, variable_C, groups):
    """Every combination of has_D, has_z, has_delta_bias, delta_softplus and return_last_state."""
    for has_D, has_z, has_bias, softplus, last in itertools.product([True, False], repeat=5):
        arguments = mamba_ssm_problem(8, variable_B, variable_C, groups, has_D, has_z, has_bias)
        assert_as_mamba_ssm(backend, arguments, softplus, last)


@EACH
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("length", [64, 512, 4096])
def test_mamba_ssm_grid_of_lengths(backend, length, groups):
    assert_as_mamba_ssm(backend, mamba_ssm_problem(length, True, True, groups, True, True, True), True, True)


# --------------------------------------------------------------------------------- zero-order hold near A = 0


@WITH_REFERENCE
@pytest.mark.parametrize("a", [0.0, 1e-40, -1e-8, 1e-8, -1e-3, -0.7, -5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hold_weight_and_slope_near_zero(backend, a, dtype):
    """One step from h = 0 with u = B = C = 1 returns (exp(step a) - 1) / a; truth in 120-digit arithmetic."""
    if backend == "native" and dtype == torch.float64:
        pytest.skip("native computes in float32 only")
    tolerance = 5e-6 if dtype == torch.float32 else 1e-12
    step = 0.25
    with localcontext(prec=120):
        exact = Decimal(torch.tensor(a, dtype=dtype).item())
        if exact == 0:
            value, slope = step, step**2 / 2
        else:
            q = exact * Decimal(step)
            value = float((q.exp() - 1) / exact)
            slope = float((q * q.exp() - q.exp() + 1) / exact**2)
    one = torch.ones(1, 1, 1, dtype=dtype)
    A = torch.tensor([[a]], dtype=dtype, requires_grad=True)
    y = selective_scan(one, one * step, A, one[0], one[0], discretization="zoh", backend=backend)
    assert y.item() == pytest.approx(value, rel=tolerance)
    assert torch.autograd.grad(y, A)[0].item() == pytest.approx(slope, rel=tolerance)


def test_hold_series_meets_the_quotient():
    """No jump where the Taylor series hands over: value and slope stay smooth through the threshold."""
    for dtype, threshold in ((torch.float32, 0.1), (torch.float64, 0.01)):
        q = (threshold * torch.linspace(-1.5, 1.5, 3001, dtype=torch.float64)).to(dtype).requires_grad_()
        value = hold(torch.ones_like(q), q)
        (slope,) = torch.autograd.grad(value.sum(), q)
        x = q.detach().double()
        series = sum(x**k / float(np.prod(np.arange(1, k + 2, dtype=float))) for k in range(15))
        eps = torch.finfo(dtype).eps
        assert relative_error(value, series) < 10 * eps
        slope_series = sum(
            k * x ** (k - 1) / float(np.prod(np.arange(1, k + 2, dtype=float))) for k in range(1, 15)
        )
        assert relative_error(slope, slope_series) < 10 * eps / threshold


# ------------------------------------------------------------------------------------ memory, repeatability


def saved_bytes(scan, arguments):
    """Bytes that autograd keeps for the backward pass, each storage once."""
    storages = {}

    def pack(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    given = {name: x.requires_grad_() for name, x in arguments.items()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = scan(**given)
    assert out.requires_grad
    return sum(storages.values())


def peak_bytes(run):
    """Most bytes that tensors made by `run` hold at one time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return int(max(np.cumsum([event.nbytes() for event in events])))


@EACH
def test_one_state_is_kept_per_chunk(backend):
    """Inputs, and a state every CHUNK steps: nothing of size L x states."""
    batch, channels, states = 2, 16, 8
    chunk = kernels._module(backend).CHUNK
    assert chunk >= 32
    for length in (256, 1024):
        arguments = problem(batch, channels, length, states)
        inputs = sum(x.numel() * 4 for x in arguments.values())
        chunk_states = length // chunk * batch * channels * states * 4
        scan = functools.partial(selective_scan, backend=backend)
        assert saved_bytes(scan, arguments) == inputs + chunk_states
    scan = functools.partial(selective_scan, backend="reference")
    assert saved_bytes(scan, problem(batch, channels, 256, states)) > 256 * batch * channels * states * 4


@EACH
def test_nothing_is_kept_without_gradients(backend):
    scan = functools.partial(selective_scan, backend=backend)
    arguments = problem(length=40, extras="z")
    y, last = scan(**arguments, return_last_state=True)
    assert not y.requires_grad and y.grad_fn is None and not last.requires_grad
    arguments["u"].requires_grad_()
    with torch.no_grad():
        assert scan(**arguments).grad_fn is None


@EACH
def test_directions_make_no_permuted_copies(backend):
    """Beyond its result, a scan of K directions holds less than one direction of one input."""
    arguments, orders = directional_problem(1, 4, 32, 4096, 1)
    result = 4 * arguments["delta"].numel()
    with torch.no_grad():
        peak = peak_bytes(lambda: directional_scan(**arguments, orders=orders, backend=backend))
    assert result < peak < result + result / 4


@EACH
def test_two_runs_agree_bitwise(backend):
    arguments = problem(4, 16, 300, 16, extras="D z delta_bias")
    options = dict(return_last_state=True, delta_softplus=True, backend=backend)
    first, second = (outputs_and_gradients(selective_scan, arguments, **options) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    arguments, orders = directional_problem(2, 4, 16, 300, 16)
    options = dict(orders=orders, reverse=(False, True, False, True), backend=backend)
    first, second = (outputs_and_gradients(directional_scan, arguments, **options) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


# --------------------------------------------------------------------------------------------- dtypes


HALVES = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])


@WITH_REFERENCE
@HALVES
def test_half_precision_inputs_keep_a_float32_state(backend, dtype, tolerance):
    halves = {name: x.to(dtype) for name, x in problem(length=300, extras="D z delta_bias").items()}
    doubles = {name: x.double() for name, x in halves.items()}
    options = dict(delta_softplus=True, return_last_state=True)
    wanted = outputs_and_gradients(selective_scan, doubles, backend="reference", **options)
    found = outputs_and_gradients(selective_scan, halves, backend=backend, **options)
    assert found[0].dtype == dtype and found[1].dtype == torch.float32
    assert relative_error(found[1], wanted[1]) < 1e-5  # the state has seen no rounding to half precision
    for x, y in zip(wanted, found, strict=True):
        assert relative_error(y, x) <= tolerance
    assert all(x.dtype == dtype for x in found[2:])


@WITH_REFERENCE
@HALVES
def test_half_precision_directions(backend, dtype, tolerance):
    """Inputs in half precision, parameters in float32, as a model under autocast passes them."""
    arguments, orders = directional_problem(length=300, directions=4)
    for name in ("x", "delta", "B", "C"):
        arguments[name] = arguments[name].to(dtype)
    doubles = {name: x.double() for name, x in arguments.items()}
    wanted = outputs_and_gradients(directional_scan, doubles, orders=orders, backend="reference")
    found = outputs_and_gradients(directional_scan, arguments, orders=orders, backend=backend)
    assert found[0].dtype == dtype
    assert [x.dtype for x in found[1:]] == [x.dtype for x in arguments.values()]
    for x, y in zip(wanted, found, strict=True):
        assert relative_error(y, x) <= tolerance


@WITH_REFERENCE
def test_autocast_leaves_the_scan_in_float32(backend):
    arguments = problem(length=63, extras="D z")
    options = dict(backend=backend, return_last_state=True)
    wanted = outputs_and_gradients(selective_scan, arguments, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = outputs_and_gradients(selective_scan, arguments, **options)
    assert all(torch.equal(x, y) for x, y in zip(wanted, found, strict=True))


# -------------------------------------------------------------------------------- registration, torch.compile


def operation_arguments(directional):
    """Arguments of the registered operation: a selective scan with all there is, or a directional one."""
    draw = drawer(0, torch.float32)
    if directional:  # shared u, fixed order a sample, two directions
        order = torch.rand(2, 2, 7).argsort(-1)
        tensors = [
            draw(2, 1, 7, 4),
            draw(2, 2, 7, 4),
            -draw(2, 4).exp(),
            *(draw(2, 2, 1, 7, 3) for _ in "BC"),
        ]
        return [*tensors, draw(2, 4), None, None], [order, 2, True, False, True]
    tensors = [draw(2, 7, 4).unsqueeze(1), draw(2, 4, 7).transpose(1, 2).unsqueeze(1), -draw(1, 4, 3).exp()]
    tensors += [draw(2, 1, 2, 7, 3), draw(1, 4, 3), draw(1, 4), draw(2, 1, 7, 4), draw(1, 4)]
    return tensors, [None, 0, True, False, False]


@EACH
@pytest.mark.parametrize("directional", [False, True], ids=["selective", "directional"])
def test_registered_operations_keep_their_promises(backend, directional):
    """Schema, shapes and strides of the fake kernels, registration of the derivative, dynamic shapes."""
    tensors, options = operation_arguments(directional)
    operation = getattr(torch.ops.nfhelpers, f"scan_{backend}").default
    y, last, states = operation(*tensors, *options, True)
    assert not operation(*tensors, *options, False)[2].numel() and states.numel()
    backward = getattr(torch.ops.nfhelpers, f"scan_{backend}_backward").default
    torch.library.opcheck(backward, (y, None, states, *tensors, *options))
    torch.library.opcheck(backward, (y, last, states, *tensors, *options))
    given = [None if x is None else x.requires_grad_() for x in tensors]
    torch.library.opcheck(operation, (*given, *options, True))


def test_a_compiled_graph_names_the_layout_of_the_states(monkeypatch):
    """A graph on disk holds the shapes of its time: one of other chunks must not be taken for this one's."""
    graphs = []

    def record(graph, inputs):
        graphs.append(str(graph.code))
        return graph

    arguments = problem(length=70)
    arguments["u"].requires_grad_()
    for chunk in (32, 16):
        torch._dynamo.reset()
        monkeypatch.setattr(chunked_module, "CHUNK", chunk)
        scan = functools.partial(selective_scan, backend="chunked")
        torch.compile(scan, fullgraph=True, backend=record)(**arguments)
    assert "(31251, 2, 3, 35)" in graphs[0] and "(62501, 2, 3, 35)" in graphs[1]
    torch._dynamo.reset()


class Block(nn.Module):
    """Linear projections, a scan, a linear projection."""

    def __init__(self, backend, directions, width=6, states=3):
        super().__init__()
        self.backend, self.directions, self.sizes = backend, directions, (width, states, states)
        self.project_in = nn.Linear(width, width)
        self.weights = nn.Linear(width, max(1, directions) * sum(self.sizes))
        self.project_out = nn.Linear(width, width)
        self.A_log, self.D = nn.Parameter(torch.zeros(width, states)), nn.Parameter(torch.ones(width))

    def forward(self, tokens, orders):
        x, A = self.project_in(tokens), -torch.exp(self.A_log)
        if not self.directions:
            delta, B, C = (w.transpose(1, 2) for w in self.weights(x).split(self.sizes, -1))
            y, last = selective_scan(
                *(x.transpose(1, 2), delta, A, B, C, self.D, x.transpose(1, 2)),
                delta_softplus=True,
                return_last_state=True,
                backend=self.backend,
            )
            return self.project_out(y.transpose(1, 2)) + last.mean()
        weights = self.weights(x).unflatten(-1, (self.directions, -1)).transpose(1, 2)
        delta, B, C = weights.split(self.sizes, -1)
        options = dict(orders=orders, reverse=(False, True), backend=self.backend)
        return self.project_out(directional_scan(x, delta, A, B, C, self.D, **options).sum(1))


@pytest.mark.parametrize("backend", [None, "chunked"], ids=["default", "chunked"])
@pytest.mark.parametrize("directions", [0, 2], ids=["selective", "directional"])
def test_compiles_without_a_graph_break(backend, directions):
    """Forward and backward, with eager's numbers; the default is native where that works."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    block = Block(backend, directions)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for length in (11, 40):  # the second length compiles with dynamic shapes
        orders = torch.rand(2, length).argsort(-1)
        tokens = torch.randn(2, length, 6)
        found, wanted = (
            outputs_and_gradients(lambda tokens, f=f, o=orders: f(tokens, o), dict(tokens=tokens))
            for f in (compiled, block)
        )
        for x, y in zip(wanted, found, strict=True):
            torch.testing.assert_close(y, x, rtol=1e-6, atol=1e-6)
        with torch.no_grad():
            torch.testing.assert_close(compiled(tokens, orders), block(tokens, orders), rtol=1e-6, atol=1e-6)
    torch._dynamo.reset()


# ------------------------------------------------------------------------------- dispatch and boundary checks


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(u=torch.randn(2, 6)), r"u has shape \(2, 6\); pass \(B, D, L\)"),
        (dict(u=torch.randn(0, 6, 15)), "empty"),
        (dict(u=torch.randn(2, 6, 0)), "empty"),
        (dict(u=torch.ones(2, 6, 15, dtype=torch.long)), "int64; pass a floating dtype"),
        (dict(u=[1.0]), "u is a list"),
        (dict(delta=torch.randn(2, 6, 14)), r"delta has shape \(2, 6, 14\); it must be \(2, 6, 15\)"),
        (dict(A=torch.randn(5, 4)), r"A has shape \(5, 4\); pass \(D, N\) with D=6"),
        (dict(A=torch.randn(6, 0)), r"A has shape"),
        (dict(A=torch.randn(6, 4, dtype=torch.complex64)), "only real A"),
        (dict(A=torch.randn(6)), r"A has shape \(6,\); pass \(D, N\)"),
        (dict(tied_decay=True), r"A has shape \(6, 4\); with tied_decay it must be \(6,\)"),
        (dict(tied_decay=True, A=torch.randn(6), B=torch.randn(4)), r"B has shape \(4,\); it must be"),
        (dict(tied_decay=True, A=torch.randn(6), C=torch.randn(2, 5, 15)), r"C has shape \(2, 5, 15\)"),
        (dict(B=torch.randn(2, 4, 14)), r"B has shape \(2, 4, 14\); it must be .* such as \(2, 4, 15\)"),
        (dict(B=torch.randn(2, 4, 4, 15)), "G=4 groups, which do not divide D=6"),
        (dict(C=torch.randn(2, 0, 4, 15)), "C has shape"),
        (dict(B=torch.randn(2, 2, 4, 15)), "same number of groups"),
        (dict(C=None), "C is a NoneType"),
        (dict(D=torch.randn(5)), r"D has shape \(5,\); it must be \(6,\)"),
        (dict(z=torch.randn(2, 15, 6)), "z has shape"),
        (dict(delta_bias=torch.randn(2)), "delta_bias has shape"),
        (dict(D=torch.randn(6, device="meta")), "D is on meta and u on cpu"),
        (
            dict(discretization="euler"),
            r"discretization='euler' is unknown; choose one of \('mamba', 'zoh'\)",
        ),
        (dict(backend="fast"), r"backend='fast' is unknown; choose one of \('reference', 'chunked'"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        selective_scan(**(problem() | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(x=torch.randn(2, 36, 5)),
            r"x has shape \(2, 36, 5\); it must be \(2, 37, 5\) or \(2, 3, 37, 5\)",
        ),
        (dict(x=torch.ones(2, 37, 5, dtype=torch.int32)), "x is torch.int32; pass a floating dtype"),
        (dict(delta=torch.randn(2, 37, 5)), r"delta has shape \(2, 37, 5\); pass \(B, K, L, D\)"),
        (dict(delta=torch.randn(2, 0, 37, 5)), "empty; B, K, L, D must be at least 1"),
        (dict(delta=torch.randn(2, 63, 37, 5)), "K=63 directions; pass at most 62"),
        (dict(A=torch.randn(5)), r"A has shape \(5,\); it must be \(3, 5, 4\) or \(5, 4\)"),
        (dict(tied_decay=True), r"A has shape \(3, 5, 4\); it must be \(3, 5\) or \(5,\)"),
        (
            dict(B=torch.randn(2, 37, 4)),
            r"B has shape \(2, 37, 4\); pass \(B, K, L, N\) such as \(2, 3, 37, 16\)",
        ),
        (dict(B=torch.randn(2, 3, 37, 0)), "B has shape"),
        (dict(C=torch.randn(2, 3, 37, 5)), r"C has shape \(2, 3, 37, 5\); it must be \(2, 3, 37, 4\)"),
        (dict(D=torch.randn(4)), r"D has shape \(4,\); it must be \(3, 5\) or \(5,\)"),
        (dict(delta_bias=torch.randn(5, 3)), "delta_bias has shape"),
        (dict(orders=[[0]]), "orders is a list; pass an int64 tensor"),
        (dict(orders=torch.rand(3, 37)), "orders is torch.float32; pass an integer dtype"),
        (dict(orders=torch.ones(3, 37, dtype=torch.bool)), "orders is torch.bool"),
        (dict(orders=torch.arange(37)), r"orders has shape \(37,\); it must be \(3, 37\) or \(2, 3, 37\)"),
        (dict(orders=torch.zeros(3, 37, dtype=torch.long, device="meta")), "orders is on meta"),
        (dict(orders=torch.arange(37).expand(3, 37) + 1), "orders holds 37; .* permutations of 0 ... 36"),
        (dict(orders=torch.arange(37).expand(3, 37) - 1), "orders holds -1"),
        (
            dict(orders=torch.stack([torch.arange(37), torch.arange(37), torch.arange(37) // 2 * 2])),
            r"orders\[2\] never visits token 1;",
        ),
        (dict(reverse=[True]), r"reverse is \[True\]; pass K=3 bools"),
        (dict(reverse=True), "reverse is True; pass K=3 bools"),
        (dict(reverse=[0, 1, 0]), "pass K=3 bools, such as"),
        (dict(backend="fast"), "backend='fast' is unknown"),
    ],
)
def test_wrong_arguments_of_directions_are_named(change, message):
    arguments, orders = directional_problem()
    with pytest.raises(ValueError, match=message):
        directional_scan(**(arguments | dict(orders=orders) | change))


def test_backend_choice(monkeypatch):
    monkeypatch.setattr(kernels, "_native_status", lambda: "ok")
    assert choose_backend("cpu") == "native"
    assert choose_backend("cpu", dtype=torch.float64) == "chunked"
    assert choose_backend(torch.device("mps")) == "chunked"
    assert choose_backend("cpu", "reference") == "reference"
    monkeypatch.setenv("NF_SCAN_BACKEND", "reference")
    assert choose_backend("cpu") == "reference"
    assert choose_backend("cpu", "chunked") == "chunked"
    monkeypatch.setenv("NF_SCAN_BACKEND", "warp")
    with pytest.raises(ValueError, match="NF_SCAN_BACKEND='warp' is unknown"):
        choose_backend("cpu")


def test_native_that_does_not_work_is_said_once(monkeypatch):
    monkeypatch.setattr(kernels, "_native_status", lambda: "no compiler found: none of c++, g++")
    kernels._say_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="native scan cannot be used: no compiler found: none of c"):
        assert choose_backend("cpu") == "chunked"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_backend("cpu") == "chunked"
        assert choose_backend("mps") == choose_backend("cpu", "chunked") == "chunked"
    with pytest.raises(ValueError, match=r"'native' cannot be used: no compiler .* \['reference', 'chunked'"):
        choose_backend("cpu", "native")
    kernels._say_once.cache_clear()


def test_native_module_that_does_not_load_has_a_named_cause(monkeypatch):
    """Whatever its import raises; and a compiler's message becomes one line, as a table needs."""
    real = kernels.importlib.import_module

    def broken(name, *package):
        if name == ".native":
            raise OSError("scan.so: file too short")
        return real(name, *package)

    kernels._native_status.cache_clear()
    monkeypatch.setattr(kernels.importlib, "import_module", broken)
    assert kernels.backend_status()["native"] == "import failed: OSError: scan.so: file too short"
    monkeypatch.undo()
    kernels._native_status.cache_clear()
    monkeypatch.setattr(kernels._module("native"), "status", lambda: "compile failed:\n  line 1\n  line 2")
    assert kernels.backend_status()["native"] == "compile failed: line 1 line 2"
    kernels._native_status.cache_clear()


def test_float64_is_refused_where_the_state_is_float32(monkeypatch):
    monkeypatch.setattr(kernels, "_native_status", lambda: "ok")
    arguments = problem(dtype=torch.float64)
    assert selective_scan(**arguments).dtype == torch.float64
    with pytest.raises(ValueError, match="backend='native' computes in float32 only; use backend='chunked'"):
        selective_scan(**arguments, backend="native")
    directions, orders = directional_problem()
    directions["A"] = directions["A"].double()  # one is enough
    with pytest.raises(ValueError, match="backend='native' computes in float32 only; use backend='chunked'"):
        directional_scan(**directions, orders=orders, backend="native")
    assert directional_scan(**directions, orders=orders).dtype == torch.float32


def test_native_needs_tensors_on_the_cpu(monkeypatch):
    monkeypatch.setattr(kernels, "_native_status", lambda: "ok")
    with pytest.raises(ValueError, match="needs tensors on the CPU, not on mps"):
        choose_backend("mps", "native")
    with pytest.raises(ValueError, match="needs tensors on the CPU, not on cuda"):
        choose_backend("cuda:0", "native")


def test_triton_is_taken_on_cuda_only_where_it_works(monkeypatch):
    monkeypatch.setattr(kernels, "_triton_status", lambda: "ok")
    assert choose_backend("cuda") == "triton"
    assert choose_backend("cuda:1") == "triton"
    assert choose_backend("cuda", dtype=torch.float64) == "chunked"
    monkeypatch.setattr(kernels, "_triton_status", lambda: "import failed: libtriton.so")
    kernels._say_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="the triton scan cannot be used: import failed: libtriton.so"):
        assert choose_backend("cuda") == "chunked"
    with pytest.raises(ValueError, match="import failed: libtriton.so"):
        choose_backend("cuda", "triton")


def test_triton_needs_a_cuda_tensor_unless_interpreted(monkeypatch):
    monkeypatch.setattr(kernels, "_triton_status", lambda: "ok")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="needs tensors on a CUDA device, not on cpu"):
        choose_backend("cpu", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose_backend("cpu", "triton") == "triton"


@pytest.mark.parametrize("error", [AttributeError, RuntimeError, OSError, TypeError, ImportError])
def test_status_names_the_cause_of_a_broken_triton(monkeypatch, error):
    real = kernels.importlib.import_module

    def broken(name, *package):
        if name == "triton":
            raise error("driver is too old")
        return real(name, *package)

    monkeypatch.setattr(kernels.importlib, "import_module", broken)
    assert kernels.backend_status()["triton"] == f"import failed: {error.__name__}: driver is too old"
    kernels._say_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="the triton scan cannot be used.*driver is too old"):
        assert choose_backend("cuda") == "chunked"
    with pytest.raises(ValueError, match="driver is too old"):
        choose_backend("cuda", "triton")


def test_status_names_the_cause_of_a_broken_mamba_ssm(monkeypatch):
    """A package compiled for another torch fails with an undefined symbol: the message is passed on."""

    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "mamba_ssm":
                raise ImportError("selective_scan_cuda.so: undefined symbol: _ZN3c104cuda")

    kernels._mamba_ssm.cache_clear()
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    for name in [name for name in sys.modules if name.split(".")[0] == "mamba_ssm"]:
        monkeypatch.delitem(sys.modules, name)
    try:
        status = kernels.backend_status()
        assert list(status) == list(kernels.BACKENDS)
        assert "undefined symbol: _ZN3c104cuda" in status["mamba_ssm"]
        with pytest.raises(ValueError, match="undefined symbol"):
            choose_backend("cuda", "mamba_ssm")
    finally:
        kernels._mamba_ssm.cache_clear()


@pytest.fixture
def stand_in(monkeypatch):
    """Takes mamba_ssm's place and accepts only what its CUDA kernel accepts; the shapes of u it was given."""
    calls = []

    def selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state):
        calls.append(tuple(u.shape))
        assert all(x.dtype == u.dtype for x in (delta, B, z) if x is not None)
        assert C.dtype == (torch.float32 if C.dim() == 2 else u.dtype)
        assert all(x.dtype == torch.float32 for x in (A, D, delta_bias) if x is not None)
        assert A.dim() == 2
        y, last = selective_scan_reference(u, delta, A, B, C, D, z, delta_bias, delta_softplus, True)
        return (y, last.detach()) if return_last_state else y  # its backward takes no gradient of the state

    monkeypatch.setattr(kernels, "_mamba_ssm", lambda: (selective_scan_fn, None))
    monkeypatch.setattr(kernels, "choose_backend", lambda device, backend, dtype=None: backend or "mamba_ssm")
    return calls


def test_mamba_ssm_gets_its_own_dtypes_and_no_zero_order_hold(stand_in):
    arguments = problem(fixed="C", extras="D z delta_bias", dtype=torch.bfloat16)
    arguments["delta"] = arguments["delta"].float()
    y, last = selective_scan(**arguments, delta_softplus=True, return_last_state=True)
    assert y.dtype == torch.bfloat16 and last.shape == (2, 6, 4)
    assert stand_in == [(2, 6, 15)]
    with pytest.raises(ValueError, match="'mamba_ssm' has no discretization='zoh'"):
        selective_scan(**arguments, discretization="zoh")


@pytest.mark.parametrize("fixed", ["", "B C"])
def test_mamba_ssm_gets_the_rates_of_tied_decays(stand_in, fixed):
    arguments = problem(tied=True, fixed=fixed)
    found = outputs_and_gradients(selective_scan, arguments, tied_decay=True)
    wanted = outputs_and_gradients(selective_scan, arguments, tied_decay=True, backend="reference")
    for x, y in zip(wanted, found, strict=True):
        torch.testing.assert_close(y, x)


@pytest.mark.parametrize("tied", [False, True], ids=["free", "tied"])
@pytest.mark.parametrize("size", DIRECTIONS, ids=size_name)
def test_directions_through_mamba_ssm(stand_in, size, tied):
    """One call, with the directions as groups of channels, gives the directions of the reference."""
    arguments, orders = directional_problem(**size, tied=tied)
    batch, directions, length, channels = arguments["delta"].shape
    options = dict(orders=orders, reverse=[k % 2 == 0 for k in range(directions)], tied_decay=tied)
    found = outputs_and_gradients(directional_scan, arguments, **options)
    assert stand_in == [(batch, directions * channels, length)]
    wanted = outputs_and_gradients(directional_scan, arguments, **options, backend="reference")
    for x, y in zip(wanted, found, strict=True):
        torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-5)


def test_self_check_of_mamba_ssm_asks_for_what_it_has(stand_in):
    errors = kernels.self_check("mamba_ssm")
    assert len(stand_in) == 3 and max(errors.values()) < 1e-5


@EACH
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
def test_default_dtype_of_torch_does_not_matter(backend, default):
    torch.set_default_dtype(default)
    try:
        assert_matches_reference(
            selective_scan, backend, problem(extras="D z delta_bias"), return_last_state=True
        )
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("flag", ["delta_softplus", "return_last_state", "tied_decay"])
def test_flags_are_booleans(flag):
    with pytest.raises(ValueError, match=f"{flag}='yes' is a str; pass True or False"):
        selective_scan(**problem(), **{flag: "yes"})


def test_both_scans_are_public():
    assert nfhelpers.directional_scan is directional_scan and nfhelpers.selective_scan is selective_scan


@WITH_REFERENCE
def test_self_check_passes(backend):
    errors = kernels.self_check(backend)
    assert set(errors) == {"forward", "backward"}
    assert 0 < errors["forward"] < 1e-5 and 0 < errors["backward"] < 1e-5


def test_self_check_sees_a_wrong_backend(monkeypatch):
    """Forward and backward of an operation that adds a little to y; then to one direction's result only."""
    right, right_backward = chunked_module.forward, chunked_module.backward

    def scaled(factor, directional):
        def forward(u, delta, *others):
            y, last, states = right(u, delta, *others)
            return (y + factor * u if not directional or delta.shape[1] > 1 else y), last, states

        def backward(grad_y, grad_last, states, u, delta, *others):
            du, *grads = right_backward(grad_y, grad_last, states, u, delta, *others)
            return (du * (1 + factor) if not directional or delta.shape[1] > 1 else du), *grads

        monkeypatch.setattr(chunked_module, "forward", forward)
        monkeypatch.setattr(chunked_module, "backward", backward)

    for directional in (False, True):
        scaled(1e-3, directional)
        errors = kernels.self_check("chunked")
        assert errors["forward"] > 1e-4 and errors["backward"] > 1e-4
    scaled(float("nan"), False)
    assert kernels.self_check("chunked")["forward"] == float("inf")


def test_relative_error_of_nan_is_infinite():
    assert relative_error(torch.tensor([1.0, float("nan")]), torch.ones(2)) == float("inf")
    assert relative_error(torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0])) == 0.25


def test_what_is_traced_is_called_ahead_with_zeros_of_the_same_layout(monkeypatch):
    monkeypatch.setattr(kernels, "_called_ahead", set())
    seen, go = [], threading.Event()

    def launch(x, y, empty, nothing, number):
        go.wait()
        seen.append((x, y, empty, nothing, number))

    with FakeTensorMode():
        x = torch.empty(2, 5, 8, dtype=torch.bfloat16).transpose(1, 2)
        given = x, torch.empty(3, 1, 4).expand(3, 7, 4), torch.empty(0, 3), None, 2
        kernels._compile_ahead(launch, *given)
        kernels._compile_ahead(launch, *given)  # nothing: they are alike
    assert not seen
    go.set()
    kernels._await_compiled()
    for real, fake in zip(seen[0][:3], given[:3], strict=True):
        assert type(real) is torch.Tensor and not real.any()
        assert real.shape == fake.shape and real.stride() == fake.stride() and real.dtype == fake.dtype
    assert len(seen) == 1 and seen[0][3:] == (None, 2)

    shapes = ShapeEnv()
    with FakeTensorMode(shape_env=shapes):
        unknown = torch.empty(shapes.create_unbacked_symint(), 3)
        kernels._compile_ahead(launch, unknown, *given[1:])
    kernels._await_compiled()
    assert len(seen) == 1

    def fail(x):
        raise RuntimeError("out of memory")

    with FakeTensorMode():
        kernels._compile_ahead(fail, torch.empty(2))
    kernels._await_compiled()  # the call itself will say so
    assert not kernels._pending
