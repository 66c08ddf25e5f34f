"""Selective scan: closed forms, the reference against hand-written NumPy, chunked against the reference."""

import functools
import itertools
import sys
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from scipy.linalg import expm

from nfhelpers import kernels
from nfhelpers.kernels import choose_backend, relative_error, selective_scan
from nfhelpers.kernels.chunked import selective_scan_chunked
from nfhelpers.kernels.reference import hold, selective_scan_reference

BOTH = pytest.mark.parametrize("backend", ["reference", "chunked"])
DISCRETIZATIONS = pytest.mark.parametrize("discretization", ["mamba", "zoh"])


def problem(
    batch=2, channels=6, length=15, states=4, groups=None, fixed="", extras="", seed=0, dtype=torch.float32
):
    """Arguments of a scan with realistic step sizes; `fixed` and `extras` name arguments, space separated."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    varying = (batch, states, length) if groups is None else (batch, groups, states, length)
    arguments = dict(
        u=draw(batch, channels, length),
        delta=draw(batch, channels, length).abs() * 0.5,
        A=-draw(channels, states).exp(),
        B=draw(channels, states) if "B" in fixed.split() else draw(*varying),
        C=draw(channels, states) if "C" in fixed.split() else draw(*varying),
    )
    shapes = dict(D=(channels,), z=(batch, channels, length), delta_bias=(channels,))
    return arguments | {name: draw(*shapes[name]) for name in extras.split()}


def outputs_and_gradients(scan, arguments, **options):
    """[y, last state, gradient of every argument] for a loss that weighs both outputs."""
    given = {name: x.detach().clone().requires_grad_() for name, x in arguments.items()}
    y, last = scan(**given, return_last_state=True, **options)
    generator = torch.Generator().manual_seed(99)
    weights = [torch.randn(x.shape, generator=generator).to(x) for x in (y, last)]
    loss = (y * weights[0]).sum() + (last * weights[1]).sum()
    return [y, last, *torch.autograd.grad(loss, list(given.values()))]


def assert_matches_reference(arguments, tolerance=1e-5, scan=selective_scan_chunked, **options):
    doubles = {name: x.double() for name, x in arguments.items()}
    wanted = outputs_and_gradients(selective_scan_reference, doubles, **options)
    found = outputs_and_gradients(scan, arguments, **options)
    for name, x, y in zip(("y", "last", *arguments), wanted, found, strict=True):
        assert y.shape == x.shape, name
        assert relative_error(y, x) <= tolerance, name


# ------------------------------------------------------------------------------------------- the reference


def scan_by_hand(u, delta, A, B, C, D=None, z=None, delta_bias=None, softplus=False, zoh=False):
    """NumPy, one scalar at a time, from the formulas; B and C (B, G, N, L)."""
    batch, channels, length = u.shape
    y, last = np.zeros_like(u), np.zeros((batch, *A.shape))
    for b, d in itertools.product(range(batch), range(channels)):
        group = d * B.shape[1] // channels
        for step, n in itertools.product(range(length), range(A.shape[1])):
            size = delta[b, d, step] + (0 if delta_bias is None else delta_bias[d])
            size = np.log1p(np.exp(size)) if softplus else size
            decay = np.exp(size * A[d, n])
            weight = (decay - 1) / A[d, n] if zoh else size
            last[b, d, n] = decay * last[b, d, n] + weight * B[b, group, n, step] * u[b, d, step]
            y[b, d, step] += C[b, group, n, step] * last[b, d, n]
    y = y if D is None else y + D[:, None] * u
    return (y if z is None else y * z / (1 + np.exp(-z))), last


@BOTH
@DISCRETIZATIONS
@pytest.mark.parametrize("extras", ["", "D z delta_bias"])
def test_agrees_with_a_loop_over_scalars(backend, discretization, extras):
    arguments = problem(2, 4, 5, 3, groups=2, extras=extras, dtype=torch.float64)
    y, last = selective_scan(
        **arguments,
        delta_softplus=True,
        return_last_state=True,
        backend=backend,
        discretization=discretization,
    )
    by_hand = {name: x.numpy() for name, x in arguments.items()}
    y_hand, last_hand = scan_by_hand(**by_hand, softplus=True, zoh=discretization == "zoh")
    np.testing.assert_allclose(y.numpy(), y_hand, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(last.numpy(), last_hand, rtol=1e-12, atol=1e-13)


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


# --------------------------------------------------------------------------------- chunked against reference


SIZES = [
    dict(length=1),
    dict(length=15, channels=7, states=1, batch=1),
    dict(length=63, channels=5, states=16),
    dict(length=300, channels=6, states=4, groups=2),
    dict(length=33, channels=6, states=4, groups=1),
    dict(length=63, channels=6, states=4, fixed="B C"),
    dict(length=40, channels=6, states=4, fixed="B", groups=2),
    dict(length=40, channels=3, states=4, fixed="C"),
    dict(length=40, channels=4, states=2, groups=4),
]


@DISCRETIZATIONS
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "-".join(f"{k}{v}" for k, v in size.items()))
def test_chunked_matches_reference(size, discretization):
    assert_matches_reference(
        problem(**size, extras="D z delta_bias"), delta_softplus=True, discretization=discretization
    )


@DISCRETIZATIONS
@pytest.mark.parametrize("extras", ["", "D", "z", "delta_bias", "D z"])
@pytest.mark.parametrize("softplus", [False, True])
def test_chunked_matches_reference_with_each_option(extras, softplus, discretization):
    arguments = problem(length=37, extras=extras)
    if "delta_bias" in arguments and not softplus:
        arguments["delta_bias"] = arguments["delta_bias"].abs() * 0.1
    assert_matches_reference(arguments, delta_softplus=softplus, discretization=discretization)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_result_does_not_depend_on_the_chunk(chunk):
    scan = functools.partial(selective_scan_chunked, chunk=chunk)
    assert_matches_reference(problem(length=63, extras="D z"), scan=scan)


def test_slices_of_the_batch_add_up(monkeypatch):
    """A step budget of one sample: five slices, whose gradients of A, B, C and D are summed."""
    monkeypatch.setattr("nfhelpers.kernels.chunked.STEP_ELEMENTS", 1)
    assert_matches_reference(
        problem(batch=5, length=40, fixed="B", extras="D delta_bias"), delta_softplus=True
    )


def test_gradient_of_the_output_alone_and_of_the_state_alone():
    for pick in (0, 1):
        gradients = []
        for scan, dtype in (
            (selective_scan_reference, torch.float64),
            (selective_scan_chunked, torch.float32),
        ):
            given = [x.to(dtype).requires_grad_() for x in problem(length=40).values()]
            output = scan(*given, return_last_state=True)[pick]
            gradients.append(torch.autograd.grad(output.square().sum(), given, allow_unused=True))
        # y does not reach the last state through C: autograd says None, the custom backward zero.
        for wanted, found in zip(*gradients, strict=True):
            assert relative_error(found, wanted) <= 1e-5 if wanted is not None else not found.any()


@pytest.mark.parametrize("length", [300])
def test_strided_and_expanded_inputs(length):
    arguments = problem(length=length, extras="D z", dtype=torch.float32)
    wanted = selective_scan_chunked(**arguments)
    strided = dict(arguments)
    strided["u"] = arguments["u"].transpose(1, 2).contiguous().transpose(1, 2)
    strided["delta"] = arguments["delta"].repeat_interleave(2, dim=2)[..., ::2]
    strided["B"] = arguments["B"].transpose(0, 2).contiguous().transpose(0, 2)
    strided["A"] = arguments["A"].T.contiguous().T
    strided["D"] = arguments["D"].repeat_interleave(3)[::3]
    assert not any(strided[name].is_contiguous() for name in ("u", "delta", "B", "A", "D"))
    assert torch.equal(selective_scan_chunked(**strided), wanted)

    expanded = dict(arguments, u=arguments["u"][:, :1].expand(-1, 6, -1))
    assert_matches_reference(expanded)
    assert_matches_reference(strided)


def test_output_keeps_the_memory_layout_of_u():
    """(B, L, D) tensors passed transposed come back transposed: the next linear layer needs no copy."""
    arguments = problem(length=40)
    arguments["u"] = arguments["u"].transpose(1, 2).contiguous().transpose(1, 2)
    assert selective_scan_chunked(**arguments).transpose(1, 2).is_contiguous()


@DISCRETIZATIONS
@pytest.mark.parametrize("fixed", ["", "B C"])
def test_gradcheck(discretization, fixed):
    arguments = problem(
        2, 4, 5, 3, groups=2, fixed=fixed, extras="D z delta_bias", dtype=torch.float64, seed=3
    )
    names, given = list(arguments), [x.requires_grad_() for x in arguments.values()]

    def scan(*tensors):
        return selective_scan_chunked(
            **dict(zip(names, tensors, strict=True)),
            delta_softplus=True,
            return_last_state=True,
            discretization=discretization,
            chunk=2,
        )

    assert torch.autograd.gradcheck(scan, given)


def test_second_derivative_is_refused_by_chunked_and_given_by_reference():
    u, delta, *others = problem(1, 1, 3, 1, dtype=torch.float64).values()
    delta.requires_grad_()
    (slope,) = torch.autograd.grad(
        selective_scan_reference(u, delta, *others).sum(), delta, create_graph=True
    )
    assert torch.autograd.grad(slope.sum(), delta)[0].abs().sum() > 0
    with pytest.raises(RuntimeError, match="no second derivative; use backend='reference'"):
        torch.autograd.grad(selective_scan_chunked(u, delta, *others).sum(), delta, create_graph=True)


# --------------------------------------------------------------------------------- zero-order hold near A = 0


@pytest.mark.parametrize("a", [0.0, 1e-40, -1e-8, 1e-8, -1e-3, -0.7, -5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hold_weight_and_slope_near_zero(a, dtype):
    """One step from h = 0 with u = B = C = 1 returns (exp(step a) - 1) / a; truth in 120-digit arithmetic."""
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
    for scan in (selective_scan_reference, selective_scan_chunked):
        A = torch.tensor([[a]], dtype=dtype, requires_grad=True)
        y = scan(one, one * step, A, one[0], one[0], discretization="zoh")
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


def test_chunked_keeps_one_state_per_chunk():
    """Inputs, and L / 32 states: nothing of size L x states."""
    batch, channels, states = 2, 16, 8
    for length in (256, 1024):
        arguments = problem(batch, channels, length, states)
        inputs = sum(x.numel() * 4 for x in arguments.values())
        chunk_states = length // 32 * batch * channels * states * 4
        assert saved_bytes(selective_scan_chunked, arguments) == inputs + chunk_states
    reference = saved_bytes(selective_scan_reference, problem(batch, channels, 256, states))
    assert reference > 256 * batch * channels * states * 4


def test_nothing_is_kept_without_gradients():
    arguments = problem(length=40, extras="z")
    y, last = selective_scan_chunked(**arguments, return_last_state=True)
    assert not y.requires_grad and y.grad_fn is None and not last.requires_grad
    arguments["u"].requires_grad_()
    with torch.no_grad():
        assert selective_scan_chunked(**arguments).grad_fn is None


def test_two_runs_agree_bitwise():
    arguments = problem(4, 16, 300, 16, extras="D z delta_bias")
    first, second = (
        outputs_and_gradients(selective_scan_chunked, arguments, delta_softplus=True) for _ in range(2)
    )
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


# --------------------------------------------------------------------------------------------- dtypes


@BOTH
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_half_precision_inputs_keep_a_float32_state(backend, dtype, tolerance):
    halves = {name: x.to(dtype) for name, x in problem(length=300, extras="D z delta_bias").items()}
    doubles = {name: x.double() for name, x in halves.items()}
    wanted = outputs_and_gradients(selective_scan_reference, doubles, delta_softplus=True)
    found = outputs_and_gradients(selective_scan, halves, delta_softplus=True, backend=backend)
    assert found[0].dtype == dtype and found[1].dtype == torch.float32
    assert relative_error(found[1], wanted[1]) < 1e-5  # the state has seen no rounding to half precision
    for x, y in zip(wanted, found, strict=True):
        assert relative_error(y, x) <= tolerance
    assert all(x.dtype == dtype for x in found[2:])


@BOTH
def test_autocast_leaves_the_scan_in_float32(backend):
    arguments = problem(length=63, extras="D z")
    wanted = outputs_and_gradients(selective_scan, arguments, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = outputs_and_gradients(selective_scan, arguments, backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(wanted, found, strict=True))


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
        (dict(backend="native"), r"cannot be used: not built yet; usable here: \['reference', 'chunked'"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        selective_scan(**(problem() | change))


def test_backend_choice(monkeypatch):
    assert choose_backend("cpu") == "chunked"
    assert choose_backend(torch.device("mps")) == "chunked"
    assert choose_backend("cpu", "reference") == "reference"
    monkeypatch.setenv("NF_SCAN_BACKEND", "reference")
    assert choose_backend("cpu") == "reference"
    assert choose_backend("cpu", "chunked") == "chunked"
    monkeypatch.setenv("NF_SCAN_BACKEND", "warp")
    with pytest.raises(ValueError, match="NF_SCAN_BACKEND='warp' is unknown"):
        choose_backend("cpu")


def test_triton_is_taken_on_cuda_only_where_it_works(monkeypatch):
    monkeypatch.setattr(kernels, "_triton_status", lambda: "ok")
    assert choose_backend("cuda") == "triton"
    monkeypatch.setattr(kernels, "_triton_status", lambda: "import failed: libtriton.so")
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


def test_mamba_ssm_gets_its_own_dtypes_and_no_zero_order_hold(monkeypatch):
    """A stand-in for its function that accepts only what the CUDA kernel accepts."""

    def selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state):
        assert all(x.dtype == u.dtype for x in (delta, B, z))
        assert all(x.dtype == torch.float32 for x in (A, C, D, delta_bias))
        return selective_scan_reference(
            u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state
        )

    monkeypatch.setattr(kernels, "_mamba_ssm", lambda: (selective_scan_fn, None))
    monkeypatch.setattr(kernels, "choose_backend", lambda device, backend: "mamba_ssm")
    arguments = problem(fixed="C", extras="D z delta_bias", dtype=torch.bfloat16)
    arguments["delta"] = arguments["delta"].float()
    y, last = selective_scan(**arguments, delta_softplus=True, return_last_state=True)
    assert y.dtype == torch.bfloat16 and last.shape == (2, 6, 4)
    with pytest.raises(ValueError, match="'mamba_ssm' has no discretization='zoh'"):
        selective_scan(**arguments, discretization="zoh")


@BOTH
def test_self_check_passes(backend):
    errors = kernels.self_check(backend)
    assert set(errors) == {"forward", "backward"}
    assert 0 < errors["forward"] < 1e-5 and 0 < errors["backward"] < 1e-5


def test_self_check_sees_a_wrong_backend(monkeypatch):
    def scaled(factor):
        def scan(u, *arguments, **options):
            y, last = selective_scan_chunked(u, *arguments, **options)
            return y + factor * u, last

        return scan

    monkeypatch.setattr(kernels, "selective_scan_chunked", scaled(1e-3))
    errors = kernels.self_check("chunked")
    assert errors["forward"] > 1e-4 and errors["backward"] > 1e-4
    monkeypatch.setattr(kernels, "selective_scan_chunked", scaled(float("nan")))
    assert kernels.self_check("chunked")["forward"] == float("inf")


def test_relative_error_of_nan_is_infinite():
    assert relative_error(torch.tensor([1.0, float("nan")]), torch.ones(2)) == float("inf")
    assert relative_error(torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0])) == 0.25
