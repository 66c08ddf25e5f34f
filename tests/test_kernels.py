"""The scans: closed forms, the reference against hand-written loops, CPU backends against the reference."""

import functools
import itertools
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from nfhelpers import kernels
from nfhelpers.kernels import choose_backend, chunked, directional_scan, relative_error, selective_scan

STATUS = kernels.backend_status()
FAST = [
    pytest.param(name, marks=pytest.mark.skipif(STATUS[name] != "ok", reason=f"{name}: {STATUS[name]}"))
    for name in ("chunked", "native")
]
EACH = pytest.mark.parametrize("backend", FAST)
WITH_REFERENCE = pytest.mark.parametrize("backend", ["reference", *FAST])
TIED = pytest.mark.parametrize("tied", [False, True], ids=["free", "tied"])
ALL = "D z delta_bias initial_state"


def drawer(seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def problem(
    batch=2, channels=6, length=15, states=4, groups=None, fixed="", extras="", seed=0, dtype=torch.float32,
    tied=False,
):  # fmt: skip
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
    shapes |= dict(initial_state=(batch, channels, states))
    return arguments | {name: draw(*shapes[name]) for name in extras.split()}


def directional_problem(
    batch=2, directions=3, channels=5, length=37, states=4, shared="x", order_a_sample=False,
    extras="D delta_bias initial_state", tied=False, seed=0, dtype=torch.float32,
):  # fmt: skip
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
    arguments |= {name: each(name, channels) for name in extras.split() if name != "initial_state"}
    if "initial_state" in extras:
        arguments["initial_state"] = draw(batch, directions, channels, states)
    shape = (batch, directions, length) if order_a_sample else (directions, length)
    return arguments, draw(*shape).argsort(-1)


def outputs_and_gradients(scan, arguments, **options):
    """[outputs, gradient of every argument] for a loss that weighs every output."""
    given = {name: x.detach().requires_grad_() for name, x in arguments.items()}  # strides as they are
    outputs = scan(**given, **options)
    outputs = outputs if isinstance(outputs, tuple | list) else (outputs,)
    generator = torch.Generator().manual_seed(99)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float32).to(x) for x in outputs]
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


def assert_all_equal(one, two):
    assert all(torch.equal(x, y) for x, y in zip(one, two, strict=True))


# ------------------------------------------------------------------------------------------- the reference


def scan_by_hand(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, initial_state=None, zoh=False, tied=False
):
    """NumPy, one scalar at a time, from the formulas; softplus; B and C (B, G, N, L)."""
    batch, channels, length = u.shape
    states = B.shape[2]
    y = np.zeros_like(u)
    last = np.zeros((batch, channels, states)) if initial_state is None else initial_state.copy()
    for b, d in itertools.product(range(batch), range(channels)):
        group = d * B.shape[1] // channels
        for step, n in itertools.product(range(length), range(states)):
            rate = (n + 1) * A[d] if tied else A[d, n]
            size = np.log1p(np.exp(delta[b, d, step] + (0 if delta_bias is None else delta_bias[d])))
            decay = np.exp(size * rate)
            weight = (decay - 1) / rate if zoh else size
            last[b, d, n] = decay * last[b, d, n] + weight * B[b, group, n, step] * u[b, d, step]
            y[b, d, step] += C[b, group, n, step] * last[b, d, n]
    y = y if D is None else y + D[:, None] * u
    return (y if z is None else y * z / (1 + np.exp(-z))), last


@TIED
@pytest.mark.parametrize(
    ("backend", "discretization"), [("reference", "mamba"), ("reference", "zoh"), ("chunked", "mamba")]
)
@pytest.mark.parametrize("extras", ["", ALL])
def test_agrees_with_a_loop_over_scalars(backend, discretization, extras, tied):
    arguments = problem(2, 4, 5, 3, groups=2, extras=extras, dtype=torch.float64, tied=tied)
    options = dict(delta_softplus=True, return_last_state=True, tied_decay=tied)
    found = selective_scan(**arguments, **options, backend=backend, discretization=discretization)
    by_hand = {name: x.numpy() for name, x in arguments.items()}
    for x, y in zip(found, scan_by_hand(**by_hand, zoh=discretization == "zoh", tied=tied), strict=True):
        np.testing.assert_allclose(x.numpy(), y, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("a", [0.0, 1e-40, 1e-8, -0.0399, -0.0401, -0.399, 0.401, -5.0])
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
    A = torch.tensor([[a]], dtype=dtype, requires_grad=True)
    y = selective_scan(one, one * step, A, one[0], one[0], discretization="zoh")
    assert y.item() == pytest.approx(value, rel=tolerance)
    assert torch.autograd.grad(y, A)[0].item() == pytest.approx(slope, rel=tolerance)


def test_fixed_weights_are_those_of_every_step():
    """A weight (D, N) is one of D groups that does not vary."""
    arguments = problem(2, 6, 9, 4, fixed="B C", extras=ALL)
    varying = arguments | {name: arguments[name][..., None].expand(2, 6, 4, 9) for name in "BC"}
    wanted, found = (selective_scan(**given, delta_softplus=True) for given in (varying, arguments))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["chunked", "native", "triton", "mamba_ssm"])
def test_fast_backends_refuse_what_only_teaching_uses(backend):
    for change in (dict(discretization="zoh"), dict(B=torch.ones(6, 4))):
        with pytest.raises(ValueError, match="reference"):
            selective_scan(**(problem() | change), backend=backend)


# ------------------------------------------------------------------------------- backends against reference


SIZES = [
    dict(length=1),
    dict(length=37, channels=1, states=5, batch=1),
    dict(length=15, channels=7, states=1, batch=1),
    dict(length=300, channels=6, states=4, groups=2),
    dict(length=33, channels=6, states=4, groups=1),
    dict(length=64, channels=37, states=16),
    dict(length=40, channels=4, states=2, groups=4),
    dict(length=1228, channels=5, states=16, batch=1),
]


def size_name(size):
    return "-".join(f"{k}{v}" for k, v in size.items())


@EACH
@TIED
@pytest.mark.parametrize("size", SIZES, ids=size_name)
def test_matches_reference(backend, size, tied):
    arguments = problem(**size, extras=ALL, tied=tied)
    assert_selective(backend, arguments, delta_softplus=True, tied_decay=tied)


@EACH
@pytest.mark.parametrize("extras", ["", "D", "z", "delta_bias", "D z"])
@pytest.mark.parametrize("softplus", [False, True])
def test_matches_reference_with_each_option(backend, extras, softplus):
    arguments = problem(length=37, extras=extras)
    if "delta_bias" in arguments and not softplus:
        arguments["delta_bias"] = arguments["delta_bias"].abs() * 0.1
    assert_selective(backend, arguments, delta_softplus=softplus)


DIRECTIONS = [
    dict(length=1, directions=1),
    dict(length=15, directions=1, channels=7, states=1),
    dict(length=63, directions=3, channels=5, states=16, shared=""),
    dict(length=64, directions=4, channels=37, shared="x A D delta_bias", order_a_sample=True),
    dict(length=37, directions=1, shared="", order_a_sample=True, extras=""),
    dict(length=300, directions=4, batch=3),
    dict(length=1228, directions=2, batch=1, channels=3, states=16),
]


@EACH
@TIED
@pytest.mark.parametrize("backwards", [False, True], ids=["forward", "mixed"])
@pytest.mark.parametrize("size", DIRECTIONS, ids=size_name)
def test_directions_match_reference(backend, size, backwards, tied):
    arguments, orders = directional_problem(**size, tied=tied)
    reverse = [k % 2 == 0 for k in range(size["directions"])] if backwards else None
    assert_directional(backend, arguments, orders=orders, reverse=reverse, tied_decay=tied)


@WITH_REFERENCE
def test_a_direction_is_a_scan_of_the_permuted_sequence(backend):
    """Explicit gather, plain scan, scatter; in int32 as in int64, reversed as the flipped order."""
    arguments, orders = directional_problem(directions=2, length=40)
    y = directional_scan(**arguments, orders=orders.int(), reverse=(False, True), backend=backend)
    for k in range(2):
        walk = orders[k].flip(0) if k else orders[k]
        rows = (arguments["x"], *(arguments[name][:, k] for name in ("delta", "B", "C")))
        x, delta, B, C = (row[:, walk].transpose(1, 2) for row in rows)
        A, D, bias = (arguments[name][k] for name in ("A", "D", "delta_bias"))
        options = dict(initial_state=arguments["initial_state"][:, k], backend=backend)
        plain = selective_scan(x, delta, A, B, C, D, delta_bias=bias, delta_softplus=True, **options)
        torch.testing.assert_close(y[:, k, walk], plain.transpose(1, 2), rtol=1e-5, atol=1e-6)


def in_pieces(counts, joined, initial_state=None, **arguments):
    """A scan in pieces of so many steps, each from the last state of the one before or from zero."""
    cut = {n: x.split(counts, -1) if torch.is_tensor(x) and x.dim() > 2 else [x] * len(counts)
           for n, x in arguments.items()}  # fmt: skip
    outputs, start = [], initial_state
    for part in zip(*cut.values(), strict=True):
        y, last = selective_scan(**dict(zip(cut, part, strict=True)), initial_state=start)
        outputs, start = [*outputs, y], last if joined else None
    return torch.cat(outputs, -1), last


def unpacked(counts, **arguments):
    """Sequences of so many steps, a list for each sample, scanned one by one."""
    found = []
    for b, pieces in enumerate(counts):
        sample = {n: x[b : b + 1] if torch.is_tensor(x) and x.dim() > 2 else x for n, x in arguments.items()}
        found.append(in_pieces(pieces, False, **sample))
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


def assert_pieces(backend, arguments, packed=True, **options):
    """Pieces joined, and packed sequences, against float64: outputs, last states, all gradients."""
    doubles = {name: x.double().cpu() for name, x in arguments.items()}
    options |= dict(delta_softplus=True, return_last_state=True)
    batch, _, length = arguments["u"].shape
    third = length // 3
    cuts = [[n for n in (min(b, 1), third, length - third - min(b, 1)) if n] for b in range(batch)]
    seq_idx = [torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)) for counts in cuts]
    scan = functools.partial(selective_scan, seq_idx=torch.stack(seq_idx).to(arguments["u"].device))
    pairs = [(functools.partial(unpacked, cuts), scan)] if packed else []
    pairs += [(selective_scan, functools.partial(in_pieces, counts, True)) for counts in cuts]
    for truth, scan in pairs:
        wanted = outputs_and_gradients(truth, doubles, backend="reference", **options)
        found = outputs_and_gradients(scan, arguments, backend=backend, **options)
        assert all(relative_error(y, x) < 1e-5 for x, y in zip(wanted, found, strict=True))


@WITH_REFERENCE
@TIED
@pytest.mark.parametrize("length, states", [(1, 3), (2, 1), (37, 5), (130, 4)])
def test_pieces_and_packed_sequences(backend, length, states, tied):
    arguments = problem(3, 6, length, states, groups=2, extras=ALL, tied=tied)
    assert_pieces(backend, arguments, packed=backend != "native", tied_decay=tied)


def test_native_has_no_packed_sequences():
    arguments, seq_idx = problem(), torch.zeros(2, 15)
    y = selective_scan(**arguments, seq_idx=seq_idx)
    assert torch.equal(y, selective_scan(**arguments, backend="chunked"))
    with pytest.raises(ValueError, match="seq_idx"):
        selective_scan(**arguments, seq_idx=seq_idx, backend="native")


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_result_does_not_depend_on_the_chunk(chunk, monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK", chunk)
    assert_selective("chunked", problem(length=63, extras="D z"))
    arguments, orders = directional_problem(length=63)
    assert_directional("chunked", arguments, orders=orders, reverse=(True, False, True))


@pytest.mark.parametrize("samples", [1, 2])
def test_slices_of_the_batch_and_of_the_directions_add_up(monkeypatch, samples):
    """Slices whose gradients of A, B, C and D are summed: 5 samples one by one; 5 directions two by two."""
    monkeypatch.setattr(chunked, "STEP_ELEMENTS", samples * 6 * 4)
    assert_selective("chunked", problem(5, 6, 40, 4, extras=ALL), delta_softplus=True)
    arguments, orders = directional_problem(1, 5, 6, 40, 4)
    assert_directional("chunked", arguments, orders=orders, reverse=(True, False, True, False, True))


@EACH
def test_memory_layout_of_the_inputs_does_not_matter(backend):
    """Slices of a projection, length side by side, expanded; y keeps the layout of u."""
    wide = drawer(0, torch.float32)(2, 40, 20)
    u, delta, B, z = (x.transpose(1, 2) for x in wide.split([6, 6, 4, 4], -1))  # each (B, ., L)
    arguments = problem(length=40) | dict(u=u, delta=delta, B=B, z=torch.cat([z, z], 1)[:, :6])
    dense = {name: x.contiguous() for name, x in arguments.items()}
    assert not u.is_contiguous()
    y = selective_scan(**arguments, delta_softplus=True, backend=backend)
    torch.testing.assert_close(selective_scan(**dense, delta_softplus=True, backend=backend), y)
    assert y.transpose(1, 2).is_contiguous()
    assert_selective(backend, arguments, delta_softplus=True)
    assert_selective(backend, dense, delta_softplus=True)
    arguments, orders = directional_problem()
    arguments["B"] = arguments["B"][:, :1].expand(-1, 3, -1, -1)
    arguments["delta"] = arguments["delta"][:1].expand(2, -1, -1, -1)
    assert_directional(backend, arguments, orders=orders.expand(2, -1, -1))


@TIED
def test_gradcheck(tied, monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK", 2)
    arguments = problem(2, 4, 5, 3, groups=2, extras=ALL, dtype=torch.float64, seed=3, tied=tied)
    options = dict(delta_softplus=True, return_last_state=True, tied_decay=tied, backend="chunked")
    check = functools.partial(torch.autograd.gradcheck, fast_mode=True)
    given = [x.requires_grad_() for x in arguments.values()]
    assert check(lambda *xs: selective_scan(**dict(zip(arguments, xs, strict=True)), **options), given)
    kind = dict(shared="x A D delta_bias", tied=tied, dtype=torch.float64)
    arguments, orders = directional_problem(2, 3, 2, 5, 2, **kind)
    options = dict(orders=orders, reverse=(False, True, False), tied_decay=tied, backend="chunked")
    given = [x.requires_grad_() for x in arguments.values()]
    assert check(lambda *xs: directional_scan(**dict(zip(arguments, xs, strict=True)), **options), given)


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
    with pytest.raises(RuntimeError):
        torch.autograd.grad(slope(backend).sum(), delta)


@WITH_REFERENCE
@pytest.mark.parametrize("directional", [False, True], ids=["selective", "directional"])
def test_forward_mode_and_torch_func(backend, directional):
    """In float64 <w, J v> by the tangent is <J' w, v> by gradients; torch.func agrees in float32."""
    scan, arguments = functools.partial(selective_scan, delta_softplus=True), problem(length=37, extras=ALL)
    if directional:
        arguments, orders = directional_problem()
        scan = functools.partial(directional_scan, orders=orders, reverse=(True, False, True))

    def f(*xs, backend=backend):
        return scan(**dict(zip(arguments, xs, strict=True)), backend=backend)

    xs, draw = tuple(arguments.values()), drawer(7, torch.float32)
    vs = tuple(draw(*x.shape) for x in xs)
    doubles, truth = [x.double().requires_grad_() for x in xs], functools.partial(f, backend="reference")
    tangent = torch.func.jvp(truth, tuple(doubles), tuple(v.double() for v in vs))[1]
    weight = draw(*tangent.shape)
    wanted = torch.autograd.grad(truth(*doubles), doubles, weight.double())
    slope = sum((x * v).sum() for x, v in zip(wanted, vs, strict=True)).item()
    assert (tangent * weight).sum().item() == pytest.approx(slope, rel=1e-9)
    assert relative_error(torch.func.jvp(f, xs, vs)[1], tangent) < 1e-5
    pullback = torch.func.vjp(f, *xs)[1]
    loss = lambda *xs: (f(*xs) * weight).sum()  # noqa: E731
    for found in (pullback(weight), torch.func.grad(loss, argnums=tuple(range(len(xs))))(*xs)):
        assert all(relative_error(x, y) < 1e-5 for x, y in zip(found, wanted, strict=True))
    if backend != "reference":  # a pass that is over has kept no tangents
        with pytest.raises(RuntimeError, match="reference"):
            torch.func.jvp(pullback, (weight,), (weight,))


@pytest.mark.skipif(STATUS["mamba_ssm"] != "ok", reason=STATUS["mamba_ssm"])
@TIED
def test_mamba_ssm_itself(tied):
    """Its own kernel behind both scans: no gradient of the last state, permuted copies for the directions."""
    options = dict(delta_softplus=True, tied_decay=tied)
    arguments = {name: x.cuda() for name, x in problem(extras="D z delta_bias", tied=tied).items()}
    assert_matches_reference(selective_scan, "mamba_ssm", arguments, **options)
    arguments, orders = directional_problem(extras="D delta_bias", tied=tied)
    arguments = {name: x.cuda() for name, x in arguments.items()}
    walks = dict(orders=orders.cuda(), reverse=(True, False, True), tied_decay=tied)
    assert_directional("mamba_ssm", arguments, **walks)
    assert max(kernels.self_check("mamba_ssm", "cuda").values()) < 1e-4


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
    """Inputs, and a state every CHUNK steps: nothing of size L x states. Nothing without gradients."""
    batch, channels, states = 2, 16, 8
    for length in (256, 1024):
        arguments = problem(batch, channels, length, states)
        inputs = sum(x.numel() * 4 for x in arguments.values())
        chunk = {"chunked": 32, "native": 64}[backend]
        kept = length // chunk * batch * channels * states * 4
        assert saved_bytes(functools.partial(selective_scan, backend=backend), arguments) == inputs + kept
    with torch.no_grad():
        assert selective_scan(**arguments, backend=backend).grad_fn is None


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
    arguments = problem(4, 16, 300, 16, extras=ALL)
    options = dict(return_last_state=True, delta_softplus=True, backend=backend)
    assert_all_equal(*(outputs_and_gradients(selective_scan, arguments, **options) for _ in range(2)))
    arguments, orders = directional_problem(2, 4, 16, 300, 16)
    options = dict(orders=orders, reverse=(False, True, False, True), backend=backend)
    assert_all_equal(*(outputs_and_gradients(directional_scan, arguments, **options) for _ in range(2)))


# --------------------------------------------------------------------------------------------- dtypes


@WITH_REFERENCE
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_half_precision_inputs_keep_a_float32_state(backend, dtype, tolerance):
    halves = {name: x.to(dtype) for name, x in problem(length=300, extras=ALL).items()}
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
def test_autocast_leaves_the_scan_in_float32(backend):
    arguments = problem(length=63, extras="D z")
    options = dict(backend=backend, return_last_state=True)
    wanted = outputs_and_gradients(selective_scan, arguments, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_all_equal(wanted, outputs_and_gradients(selective_scan, arguments, **options))


def test_float64_runs_where_the_state_may_be_float64():
    arguments = problem(dtype=torch.float64)
    assert selective_scan(**arguments).dtype == torch.float64
    directions, orders = directional_problem()
    directions["A"] = directions["A"].double()  # one is enough
    assert directional_scan(**directions, orders=orders).dtype == torch.float32
    with pytest.raises(ValueError, match="float64"):
        directional_scan(**directions, orders=orders, backend="native")


# -------------------------------------------------------------------------------- registration, torch.compile


@EACH
def test_registered_operations_keep_their_promises(backend):
    """Schema, shapes and strides of the fake kernels, registration of the derivative, dynamic shapes."""
    draw = drawer(0, torch.float32)
    rows = draw(2, 1, 7, 4), draw(2, 4, 2, 7).permute(0, 2, 3, 1)  # shared u
    weights = draw(2, 2, 2, 7, 3), draw(2, 2, 2, 3, 7).mT
    tensors = [*rows, -draw(2, 4, 3).exp(), *weights, draw(2, 4), draw(2, 2, 7, 4), None, draw(2, 2, 4, 3)]
    options = [draw(2, 2, 7).argsort(-1), None, 2, True, False]
    operation, backward = (getattr(torch.ops.nfhelpers, f"scan_{backend}{way}") for way in ("", "_backward"))
    y, last, states = operation(*tensors, *options, True)
    assert not operation(*tensors, *options, False)[2].numel() and states.numel()
    checks = ("test_schema", "test_faketensor")
    for grad_last in (None, last):
        given = (y, grad_last, states, *tensors, *options)
        torch.library.opcheck(backward.default, given, test_utils=checks)
    given = [None if x is None else x.requires_grad_() for x in tensors]
    torch.library.opcheck(operation.default, (*given, *options, True))
    (du,) = torch.autograd.grad(operation(*given, *options, True)[1].sum(), given[0])  # of the state alone
    assert du.isfinite().all() and du.any()


def test_a_compiled_graph_names_the_layout_of_the_states(monkeypatch):
    """A graph on disk holds the shapes of its time: one of other chunks must not be taken for this one's."""
    graphs, arguments = [], problem(length=70)
    arguments["u"].requires_grad_()
    for chunk in (32, 16):
        torch._dynamo.reset()
        monkeypatch.setattr(chunked, "CHUNK", chunk)
        record = lambda graph, inputs: graphs.append(str(graph.code)) or graph  # noqa: E731
        scan = functools.partial(selective_scan, backend="chunked")
        torch.compile(scan, fullgraph=True, backend=record)(**arguments)
    assert graphs[0] != graphs[1]
    torch._dynamo.reset()


@EACH
def test_torch_compile_does_not_look_into_a_kernel(backend):  # where it takes no scan into a graph
    graphs, arguments = [], problem(length=9)
    scan = functools.partial(selective_scan, **arguments, backend=backend)
    slope = torch.func.grad(lambda u: scan(u=u).square().sum())
    found = torch.compile(slope, backend=lambda graph, _: graphs.append(graph) or graph)(arguments["u"])
    assert len(graphs) <= 1 and torch.equal(found, slope(arguments["u"]))


@pytest.mark.parametrize("directional", [False, True], ids=["selective", "directional"])
def test_compiles_without_a_graph_break(directional):
    """Forward and backward, with eager's numbers; an order that is none is refused in compiled code, too."""
    torch._dynamo.reset()
    scan = directional_scan if directional else selective_scan

    def block(orders=None, **arguments):
        arguments = {name: x.sin() for name, x in arguments.items()}
        return scan(**arguments, **({"orders": orders, "reverse": (False, True)} if directional else {})) + 1

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for length in (11, 40):  # the second length compiles with dynamic shapes
        arguments, options = problem(length=length, extras="D z"), {}
        if directional:
            arguments, options["orders"] = directional_problem(directions=2, length=length)
        found, wanted = (outputs_and_gradients(f, arguments, **options) for f in (compiled, block))
        for x, y in zip(wanted, found, strict=True):
            torch.testing.assert_close(y, x, rtol=1e-6, atol=1e-6)
        with torch.no_grad():
            torch.testing.assert_close(compiled(**arguments, **options), wanted[0], rtol=1e-6, atol=1e-6)
    if directional:
        with pytest.raises(ValueError):
            compiled(**arguments, orders=options["orders"] + 1)
    torch._dynamo.reset()


# ------------------------------------------------------------------------------- dispatch and boundary checks


@WITH_REFERENCE
@pytest.mark.parametrize(
    "change",
    [
        dict(u=torch.randn(2, 7, 15)),
        dict(delta=torch.randn(2, 6, 14)),
        dict(A=torch.randn(5, 4)),
        dict(tied_decay=True),
        dict(B=torch.randn(2, 4, 14)),
        dict(B=torch.randn(2, 4, 4, 15), C=torch.randn(2, 4, 4, 15)),  # 4 groups of 6 channels
        dict(C=torch.randn(2, 2, 4, 15)),
        dict(D=torch.randn(5)),
        dict(z=torch.randn(2, 15, 6)),
        dict(D=torch.randn(6, device="meta")),
        dict(u=torch.ones(2, 6, 15, dtype=torch.long)),
        dict(A=torch.randn(6, 4, dtype=torch.complex64)),
        dict(discretization="euler"),
        dict.fromkeys("BC", torch.ones(2, 4, 0)) | dict.fromkeys(("u", "delta"), torch.ones(2, 6, 0)),
    ],
    ids=lambda change: "-".join(change),
)
def test_what_a_kernel_would_misread_is_refused(backend, change):
    with pytest.raises(ValueError):
        selective_scan(**(problem() | change), backend=backend)


@WITH_REFERENCE
@pytest.mark.parametrize(
    "change",
    [
        dict(orders=torch.arange(37).expand(3, 37) + 1),
        dict(orders=torch.arange(37).expand(3, 37) - 1),
        dict(orders=torch.stack([torch.arange(37), torch.arange(37), torch.arange(37) // 2 * 2])),
        dict(orders=torch.arange(36).expand(3, 36)),
        dict(orders=torch.arange(37).expand(5, 3, 37)),
        dict(reverse=[True]),
        dict(x=torch.randn(2, 2, 37, 5)),
        dict(B=torch.randn(2, 3, 37, 5)),
    ],
)
def test_orders_and_directions_that_do_not_fit_are_refused(backend, change):
    arguments, orders = directional_problem()
    with pytest.raises(ValueError):
        directional_scan(**(arguments | dict(orders=orders) | change), backend=backend)


def test_backend_choice(monkeypatch):
    assert choose_backend("cpu") == ("native" if STATUS["native"] == "ok" else "chunked")
    assert choose_backend("cpu", dtype=torch.float64) == "chunked"
    assert choose_backend(torch.device("mps")) == choose_backend("meta") == "chunked"
    assert choose_backend("cpu", "reference") == "reference"
    monkeypatch.setenv("NF_SCAN_BACKEND", "reference")
    assert choose_backend("cpu") == "reference"
    assert choose_backend("cpu", "chunked") == "chunked"
    for backend, device in (("warp", "cpu"), ("native", "mps"), ("native", "cuda:0")):
        with pytest.raises(ValueError, match=backend):
            choose_backend(device, backend)
    monkeypatch.setenv("NF_SCAN_BACKEND", "warp")
    with pytest.raises(ValueError, match="NF_SCAN_BACKEND"):
        choose_backend("cpu")


def test_triton_is_the_choice_on_cuda(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_backend("cuda") == choose_backend("cuda:1") == "triton"
    assert choose_backend("cuda", dtype=torch.float64) == "chunked"
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="triton"):
        choose_backend("cpu", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose_backend("cpu", "triton") == "triton"


@pytest.mark.parametrize("factor", [1e-3, float("nan")])
def test_self_check_sees_a_wrong_backend(monkeypatch, factor):
    right, right_backward = chunked.forward, chunked.backward

    def forward(u, *others):
        y, last, states = right(u, *others)
        return y + factor * u, last, states

    def backward(*arguments):
        du, *gradients = right_backward(*arguments)
        return du * (1 + factor), *gradients

    monkeypatch.setattr(chunked, "forward", forward)
    monkeypatch.setattr(chunked, "backward", backward)
    errors = kernels.self_check("chunked")
    assert errors["forward"] > 1e-4 and errors["backward"] > 1e-4
