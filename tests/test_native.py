"""The native scan: against a float64 loop, bitwise at any number of threads, and how its library is built."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nfhelpers.kernels import native
from nfhelpers.kernels.reference import hold

STATUS = native.status()
compiled = pytest.mark.skipif(STATUS != "ok", reason=f"native: {STATUS}")
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "bias")
RECURRENCES = pytest.mark.parametrize("zoh", [False, True], ids=["mamba", "zoh"])
DECAYS = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


# -------------------------------------------------------------------------------------------------- the truth


def loop(u, delta, A, B, C, D, z, bias, order, reverse, softplus, zoh, tied):
    """(y, last) of the canonical operation, one step after another."""
    batch, directions, length, channels = delta.shape
    states = B.shape[-1]
    u = u.expand(delta.shape)
    dt = delta if bias is None else delta + bias[:, None]
    dt = F.softplus(dt) if softplus else dt
    A = A[..., None] * torch.arange(1, states + 1) if tied else A  # (K, d, N)

    def per_channel(weight):  # (b, K, l, d, N)
        if weight.dim() == 3:
            return weight[None, :, None].expand(*delta.shape, states)
        repeats = channels // weight.shape[2]
        return weight.transpose(2, 3).repeat_interleave(repeats, dim=3)

    visited = torch.arange(length) if order is None else order.long()
    visited = visited.expand(batch, directions, length)
    flipped = torch.tensor([bool(reverse >> k & 1) for k in range(directions)])
    visited = torch.where(flipped[:, None], visited.flip(-1), visited)  # (b, K, l)

    def steps(x):
        index = visited.reshape(*visited.shape, *[1] * (x.dim() - 3)).expand(x.shape)
        return x.gather(2, index).unbind(2)

    h = A.new_zeros(batch, directions, channels, states)
    outputs = []
    for u_t, dt_t, B_t, C_t in zip(*map(steps, (u, dt, per_channel(B), per_channel(C))), strict=True):
        decay = torch.exp(dt_t[..., None] * A)
        weight = hold(dt_t[..., None], A) if zoh else dt_t[..., None]
        h = decay * h + weight * B_t * u_t[..., None]
        outputs.append((C_t * h).sum(-1))
    y = torch.stack(outputs, 2)
    y = torch.zeros_like(y).scatter(2, visited[..., None].expand(y.shape), y)
    y = y if D is None else y + D[:, None] * u
    return (y if z is None else y * F.silu(z)), h


def problem(
    b=2, K=2, L=63, d=6, N=4, groups=1, shared=False, fixed="", without="", order=0, tied=False, seed=0
):  # fmt: skip
    """(arguments, order). `fixed` and `without` name arguments; order: 0 for none, else how many samples."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    varying = (b, K, groups, L, N)
    given = dict(
        u=draw(b, 1 if shared else K, L, d),
        delta=draw(b, K, L, d),
        A=-draw(K, d).exp() * 0.3 if tied else -draw(K, d, N).exp(),
        B=draw(K, d, N) if "B" in fixed else draw(*varying),
        C=draw(K, d, N) if "C" in fixed else draw(*varying),
        D=draw(K, d),
        z=draw(b, K, L, d),
        bias=draw(K, d),
    )
    given.update({name: None for name in without.split()})
    permutations = [torch.randperm(L, generator=generator) for _ in range(order * K)]
    return given, torch.stack(permutations).view(order, K, L) if order else None


def weights(given, dtype=torch.float32):
    """grad_y and grad_last."""
    generator = torch.Generator().manual_seed(99)
    last = (*given["delta"].shape[:2], given["delta"].shape[3], given["B"].shape[-1])
    return [
        torch.randn(shape, generator=generator).to(kind)
        for shape, kind in ((given["delta"].shape, dtype), (last, torch.float32))
    ]


def run(given, order=None, reverse=0, softplus=True, zoh=False, tied=False, grads=None):
    """{"y", "last" and every argument that is there: result or gradient} of the native scan."""
    options = (order, reverse, softplus, zoh, tied)
    y, last, states = native.forward(*given.values(), *options, True)
    grad_y, grad_last = grads or weights(given, given["u"].dtype)
    gradients = native.backward(grad_y, grad_last, states, *given.values(), *options)
    for name, gradient in zip(NAMES, gradients, strict=True):
        if given[name] is None:
            assert gradient.shape == (0,)
        else:
            like = torch.empty_like(given[name])
            assert (gradient.shape, gradient.dtype, gradient.stride()) == (
                like.shape,
                like.dtype,
                like.stride(),
            )
    found = dict(y=y, last=last) | dict(zip(NAMES, gradients, strict=True))
    return {name: x for name, x in found.items() if x.numel()}


def truth(given, order=None, reverse=0, softplus=True, zoh=False, tied=False, grads=None):
    """The same from the loop in float64."""
    doubles = {name: None if x is None else x.detach().double().requires_grad_() for name, x in given.items()}
    y, last = loop(*doubles.values(), order, reverse, softplus, zoh, tied)
    grad_y, grad_last = grads or weights(given, given["u"].dtype)
    leaves = {name: x for name, x in doubles.items() if x is not None}
    loss = (y * grad_y).sum() + (0 if grad_last is None else (last * grad_last).sum())
    return dict(y=y, last=last) | dict(zip(leaves, torch.autograd.grad(loss, leaves.values()), strict=True))


def relative(found, wanted):
    """Norm of the difference over the norm of the truth, at least 1e-10: less may be rounding in float64."""
    return ((found.double() - wanted).norm() / wanted.norm().clamp_min(1e-10)).item()


def assert_right(given, order=None, tolerance=1e-5, **options):
    wanted, found = truth(given, order, **options), run(given, order, **options)
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        assert relative(found[name], x) <= tolerance, name


@pytest.fixture
def threads():
    """Set the number of threads; the old one is restored."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# --------------------------------------------------------------------------------------------- the arithmetic


SIZES = [
    dict(L=1),
    dict(L=15, d=40, N=1, b=1, K=1),
    dict(L=63, d=33, N=16, K=1),
    dict(L=64, d=7, N=3),
    dict(L=65, N=5, groups=2),
    dict(L=300, d=34, N=16, groups=2, b=1),
    dict(fixed="B"),
    dict(fixed="C", groups=3),
    dict(fixed="B C"),
    dict(order=1, L=130),
    dict(order=2, shared=True, L=70, d=35),
    dict(order=2, fixed="B", groups=2),
    dict(shared=True, K=3),
    dict(shared=True, K=1),
    dict(without="D z bias"),
]


@compiled
@RECURRENCES
@DECAYS
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "-".join(f"{k}{v}" for k, v in size.items()))
def test_agrees_with_a_loop_in_float64(size, zoh, tied):
    """Direction 1 is walked backwards where there is one."""
    given, order = problem(tied=tied, **size)
    assert_right(given, order, reverse=2, zoh=zoh, tied=tied)


@compiled
@RECURRENCES
@DECAYS
def test_agrees_over_a_long_sequence(zoh, tied):
    given, _ = problem(b=1, K=1, L=1228, d=20, N=4, tied=tied)
    assert_right(given, zoh=zoh, tied=tied)


@compiled
@RECURRENCES
@pytest.mark.parametrize("without", ["D", "z", "bias", "D z", "D bias", "z bias"])
def test_each_option_and_no_softplus(without, zoh):
    given, _ = problem(L=37, without=without)
    given["delta"] = given["delta"].abs() * 0.3 + 2.5  # positive after the bias
    assert_right(given, softplus=False, zoh=zoh)


@compiled
def test_int32_orders_are_those_of_int64():
    given, order = problem(order=2, L=70)
    found, wanted = run(given, order.int()), run(given, order)
    assert all(torch.equal(found[name], x) for name, x in wanted.items())


@compiled
@RECURRENCES
def test_gradients_without_one_of_the_last_state(zoh):
    given, _ = problem(L=40)
    assert_right(given, zoh=zoh, grads=(weights(given)[0], None))


@compiled
@pytest.mark.parametrize("reverse", [0, 1])
@pytest.mark.parametrize("length", [40, 150])
def test_strides(length, reverse):
    """Channels-first, every second channel, and expanded tensors give what contiguous ones give."""
    given, _ = problem(b=2, K=1, L=length, d=37, N=5)
    wanted = truth(given, reverse=reverse)

    def channels_first(x):
        return x.transpose(2, 3).contiguous().transpose(2, 3)

    strided = dict(given)
    for name in ("u", "delta", "z"):
        strided[name] = channels_first(given[name])
    for name in ("B", "C"):
        strided[name] = given[name].transpose(3, 4).contiguous().transpose(3, 4)
    strided["A"] = given["A"].transpose(1, 2).contiguous().transpose(1, 2)
    sparse = dict(given)
    for name in ("u", "delta", "z", "B", "C", "A", "D", "bias"):
        sparse[name] = given[name].repeat_interleave(2, dim=-1)[..., ::2]
    grads = weights(given)
    for case in (strided, sparse):
        found = run(case, reverse=reverse, grads=[channels_first(grads[0]), grads[1].mT.contiguous().mT])
        for name, x in wanted.items():
            assert relative(found[name], x) <= 1e-5, name

    expanded = dict(
        given, u=given["u"][:1].expand_as(given["u"]), delta=given["delta"][..., :1].expand_as(given["u"])
    )
    assert_right(expanded, reverse=reverse, grads=(torch.tensor(0.5).expand_as(given["u"]), grads[1]))


@compiled
@pytest.mark.parametrize("dtype, rounding", [(torch.bfloat16, 2**-8), (torch.float16, 2**-10)])
@pytest.mark.parametrize("shared", [False, True])
def test_half_precision_is_rounded_only_when_written(dtype, rounding, shared):
    """Float32 results are as exact as ever; half precision results are off by at most one rounding."""
    given, order = problem(L=70, d=37, shared=shared, order=1)
    for name in ("u", "delta", "B", "C", "z"):
        given[name] = given[name].to(dtype)
    wanted, found = truth(given, order), run(given, order)
    for name, x in wanted.items():
        half = found[name].dtype == dtype
        assert half == (name in ("y", "u", "delta", "B", "C", "z"))
        assert relative(found[name], x) <= (rounding if half else 1e-5), name
        if half:
            off = (found[name].double() - x).abs()
            assert (off <= rounding * x.abs() + 2e-5 * x.abs().max()).all(), name


@compiled
def test_dtypes_may_differ():
    given, _ = problem(L=70, d=20)
    given |= dict(delta=given["delta"].bfloat16(), B=given["B"].half())
    wanted, found = truth(given), run(given)
    for name, x in wanted.items():
        assert relative(found[name], x) <= (5e-3 if name in ("delta", "B") else 1e-5), name


@compiled
@pytest.mark.parametrize(
    "size", [dict(b=1, K=1, d=200), dict(b=2, K=3, d=70, shared=True, order=1, fixed="C")]
)
@pytest.mark.parametrize("tied", [False, True])
def test_bitwise_equal_at_any_number_of_threads_and_in_every_run(size, tied, threads):
    """The first size has fewer groups than threads: its channels are shared out, and their parts added up."""
    given, order = problem(L=300, N=5, tied=tied, **size)
    threads(1)
    wanted = run(given, order, reverse=1, tied=tied)
    for count in (2, 3, 16, 1):
        threads(count)
        found = run(given, order, reverse=1, tied=tied)
        assert all(torch.equal(found[name], x) for name, x in wanted.items())


@compiled
def test_decays_are_exponentials():
    """h_1 = 1, h_2 = exp(-x): to a relative 1e-7 and the rounding of x log2(e); 0 far below exp(-87)."""
    x = torch.cat([torch.linspace(0, 86, 4001), torch.tensor([0.0, 1e-8, 1e-3, 105.0, 1000.0, 1e10, 3e38])])
    one = torch.ones(1, 1, 2, len(x))
    given = dict(
        u=one * torch.tensor([1.0, 0.0])[:, None], delta=torch.stack([one[0, 0, 0], x])[None, None],
        A=-torch.ones(1, len(x), 1), B=torch.ones(1, 1, 1, 2, 1), C=torch.ones(1, 1, 1, 2, 1),
        D=None, z=None, bias=None,
    )  # fmt: skip
    y, last, _ = native.forward(*given.values(), None, 0, False, False, False, False)
    wanted = torch.exp(-x.double())
    off = (y[0, 0, 1].double() / wanted - 1).abs()[x < 87]
    assert (off <= 2e-7 + 1.5e-7 * x[x < 87]).all()
    assert (y[0, 0, 1][x > 104] == 0).all() and (y[0, 0, 1][x == 0] == 1).all()
    assert torch.equal(last[0, 0, :, 0], y[0, 0, 1])


@compiled
@RECURRENCES
@DECAYS
@pytest.mark.parametrize("q", [-1000.0, -1.0, -1e-8, -1e-35, 0.0])
def test_extreme_decays(q, zoh, tied):
    """delta A = q at every step. The hold weight must come from expm1, and from delta where A is 0."""
    given, _ = problem(b=1, K=1, L=70, d=20, N=6, without="z bias", tied=tied)
    given["delta"] = torch.full_like(given["delta"], 0.5)
    given["A"] = torch.full_like(given["A"], 2 * q)
    assert_right(given, softplus=False, zoh=zoh, tied=tied)


@compiled
def test_softplus_is_exact_in_both_tails():
    """One step, B = C = u = 1: y = softplus(delta), its gradient the logistic function."""
    delta = torch.linspace(-85, 85, 3401)
    ones = torch.ones(1, 1, 1, 1, 1)
    given = dict(
        u=torch.ones(1, 1, 1, 3401), delta=delta[None, None, None], A=torch.zeros(1, 3401, 1), B=ones, C=ones,
        D=None, z=None, bias=None,
    )  # fmt: skip
    found = run(given, grads=(torch.ones(1, 1, 1, 3401), None))
    x = delta.double().numpy()
    # Rounding x log2(e) alone makes exp(x) uncertain by 1e-7 |x|.
    bound = 4e-7 + 1.5e-7 * np.abs(x)
    assert (np.abs(found["y"].flatten().double().numpy() / np.logaddexp(0, x) - 1) <= bound).all()
    assert (np.abs(found["delta"].flatten().double().numpy() * (1 + np.exp(-x)) - 1) <= bound).all()


@compiled
@RECURRENCES
@DECAYS
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", NAMES)
def test_nan_and_infinity_propagate(name, value, zoh, tied):
    given, _ = problem(b=1, K=1, L=70, d=37, N=5, tied=tied)
    given[name] = given[name].clone()
    spoilt = given[name]
    where = (0, 0, 0, 20, 2) if spoilt.dim() == 5 else (0, 0, 20, 7) if spoilt.dim() == 4 else (0, 7)
    spoilt[where] = value
    y, last, _ = native.forward(*given.values(), None, 0, True, zoh, tied, False)
    good = y.isfinite()[0, 0]  # (l, d)
    if spoilt.dim() == 5:
        assert not good[20].any() and good[:20].all()
    else:
        # A gate or a skip weight of infinity may meet its row only; the others reach the rows that follow.
        assert not good[20, 7] and good[:, :7].all() and good[:, 8:].all()
        assert good[:20, 7].all() or spoilt.dim() < 4
    if name in ("u", "delta") or (name == "B" and value != value):
        assert not last.isfinite().all()


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_in_the_gradient_propagates(dtype):
    given, _ = problem(b=1, K=1, L=70, d=37, N=5)
    for name in ("u", "delta", "B", "C", "z"):
        given[name] = given[name].to(dtype)
    grad_y, grad_last = weights(given, dtype)
    grad_y[0, 0, 30, 7] = float("nan")
    found = run(given, grads=(grad_y, grad_last))
    for name in ("u", "delta", "z"):
        bad = found[name].isnan()[0, 0]
        assert bad[30, 7] and not bad[31:].any() and bad.sum(1).max() == 1
    for name in ("A", "B", "C", "D", "bias"):
        assert found[name].isnan().any() and not found[name].isnan().all()


@compiled
def test_denormal_numbers_survive_elsewhere():
    """The scan flushes them to zero on its own threads, and puts the caller's mode back."""
    run(problem()[0])
    assert torch.tensor([1e-40]).mul(1.0).item() > 0


@compiled
def test_nothing_is_kept_unless_wanted():
    given, _ = problem(b=2, K=3, L=130, d=5, N=4)
    options = (None, 0, True, False, False)
    *without, states = native.forward(*given.values(), *options, False)
    assert states.shape == (0,)
    *wanted, states = native.forward(*given.values(), *options, True)
    assert states.shape == native.states_shape(2, 3, 130, 5, 4) == (2, 3, 3, 4, 5)
    assert not states[:, :, 0].any()
    assert all(torch.equal(x, y) for x, y in zip(without, wanted, strict=True))


@compiled
@pytest.mark.parametrize(
    "change, message",
    [
        (dict(u=torch.float64), r"u is float64 .* use backend='chunked'"),
        (dict(A=torch.float64), r"A is float64 .* use backend='chunked'"),
        (dict(delta=torch.int64), r"delta is torch.int64"),
    ],
)
def test_refuses_what_it_cannot_read(change, message):
    given, _ = problem()
    given |= {name: given[name].to(dtype) for name, dtype in change.items()}
    with pytest.raises(ValueError, match=message):
        native.forward(*given.values(), None, 0, True, False, False, False)


@compiled
@pytest.mark.parametrize("row", [-1, 63])
def test_refuses_rows_that_do_not_exist(row):
    given, order = problem(order=1)
    order[0, 1, 5] = row
    with pytest.raises(ValueError, match=r"order names a row that is not in 0 \.\.\. 62"):
        native.forward(*given.values(), order, 0, True, False, False, False)


# ------------------------------------------------------------------------------------------------- the build


STUB = """
#define NF_EXPORT extern "C" __attribute__((visibility("default")))
NF_EXPORT int nf_forward(const void*) { return 0; }
NF_EXPORT int nf_backward(const void*) { return 0; }
"""


@pytest.fixture
def build(tmp_path, monkeypatch):
    """An empty cache folder, a source that compiles fast, and a list of the compilations that are run."""
    source = tmp_path / "stub.cpp"
    source.write_text(STUB)
    monkeypatch.setattr(native, "_SOURCE", source)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    commands, real = [], subprocess.run

    def counted(command, **options):
        if "-o" in command:
            commands.append(command)
        return real(command, **options)

    monkeypatch.setattr(native.subprocess, "run", counted)
    native._load.cache_clear()
    yield commands
    native._load.cache_clear()


def again():
    native._load.cache_clear()
    return native.status()


def script(path, text):
    """An executable that stands for a compiler."""
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return str(path)


@compiled
def test_library_is_built_once_and_kept(build, tmp_path):
    assert native.status() == "ok" and len(build) == 1
    folder = tmp_path / "cache" / "nfhelpers" / "native"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert [path.suffix for path in folder.iterdir()] == [".so"]
    assert again() == "ok" and len(build) == 1


@compiled
@pytest.mark.parametrize("change", ["source", "flags", "compiler", "processor"])
def test_every_change_builds_anew(build, tmp_path, monkeypatch, change):
    assert native.status() == "ok"
    if change == "source":
        (tmp_path / "stub.cpp").write_text(STUB + "// changed\n")
    elif change == "flags":
        monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-DCHANGED"))
    elif change == "processor":
        monkeypatch.setattr(native, "_processor", lambda: "another")
    else:
        monkeypatch.setenv("CXX", f"{native._compiler()[0]} -DCHANGED")
    assert again() == "ok" and len(build) == 2
    assert len(list((tmp_path / "cache" / "nfhelpers" / "native").iterdir())) == 2


@compiled
def test_a_library_cut_short_is_built_again(build, tmp_path):
    """Another process left half a library behind; none of it is mapped here."""
    folder = tmp_path / "cache" / "nfhelpers" / "native"
    folder.mkdir(parents=True, mode=0o700)
    name = f"scan-{native._fingerprint(native._compiler())}.so"
    (folder / name).write_bytes(b"\x7fELF, but no more")
    assert native.status() == "ok" and len(build) == 1
    assert (folder / name).stat().st_size > 1000


@compiled
def test_flag_that_the_compiler_refuses_is_left_out(build, tmp_path, monkeypatch):
    compiler = native._compiler()[0]
    picky = f'case "$*" in *-march=native*) echo "unknown -march" >&2; exit 1;; esac; exec {compiler} "$@"\n'
    monkeypatch.setenv("CXX", script(tmp_path / "picky", picky))
    assert native.status() == "ok"
    assert ["-march=native" in command for command in build] == [True, False]


def test_failing_compiler_is_quoted(build, tmp_path, monkeypatch):
    failing = 'for line in 1 2 3 4 5 6; do echo "error $line" >&2; done; exit 1\n'
    monkeypatch.setenv("CXX", script(tmp_path / "failing", failing))
    assert native.status() == "compile failed: error 1\nerror 2\nerror 3\nerror 4\nerror 5"
    with pytest.raises(RuntimeError, match="the native scan cannot be used: compile failed: error 1"):
        native.forward(*problem()[0].values(), None, 0, True, False, False, False)


def test_missing_compilers_are_named(build, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    assert native.status() == "no compiler found: CXX='no-such-compiler -O2' is not a command"
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert again().startswith("no compiler found: none of c++, g++, clang++ is installed")
    assert build == []


def test_library_that_does_not_load_is_named(build, tmp_path, monkeypatch):
    lazy = 'while [ $# -gt 1 ]; do [ "$1" = -o ] && echo nothing > "$2"; shift; done; exit 0\n'
    monkeypatch.setenv("CXX", script(tmp_path / "lazy", lazy))
    assert native.status().startswith("load failed: ")


@compiled
@pytest.mark.parametrize("fault", ["no folder", "writable by others", "another owner"])
def test_cache_that_is_not_the_users_own_is_not_used(build, tmp_path, monkeypatch, fault):
    """A planted library would be loaded: here one that does nothing but exist."""
    folder = tmp_path / "cache" / "nfhelpers" / "native"
    if fault == "no folder":
        (tmp_path / "cache").write_text("a file")
        message = "cache"
    else:
        folder.mkdir(parents=True, mode=0o700)
        (folder / f"scan-{native._fingerprint(native._compiler())}.so").write_text("planted")
        message = "can be written by others"
        if fault == "another owner":
            user = os.getuid()
            monkeypatch.setattr(os, "getuid", lambda: user + 1)
            message = f"belongs to user {user}, not to {user + 1}"
        else:
            folder.chmod(0o777)
    with pytest.warns(RuntimeWarning, match=message):
        assert native.status() == "ok"
    assert len(build) == 1
    if folder.exists():
        assert [path.read_text() for path in folder.iterdir()] == ["planted"]


@compiled
def test_two_processes_may_build_at_once(build, tmp_path):
    """Each compiler waits for the other: both build, both load, one library is left."""
    started = tmp_path / "started"
    started.mkdir()
    wait = (
        f'case "$*" in *-o*) touch {started}/$$; '
        f"while [ $(ls {started} | wc -l) -lt 2 ]; do sleep 0.05; done;; esac; "
        f'exec {native._compiler()[0]} "$@"\n'
    )
    program = (
        "import pathlib; from nfhelpers.kernels import native; "
        f"native._SOURCE = pathlib.Path({str(tmp_path / 'stub.cpp')!r}); print(native.status())"
    )
    environment = os.environ | dict(CXX=script(tmp_path / "waiting", wait))
    processes = [
        subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0].strip() for process in processes]
    assert outputs == ["ok", "ok"]
    assert len(list(started.iterdir())) == 2
    left = list((tmp_path / "cache" / "nfhelpers" / "native").iterdir())
    assert [path.suffix for path in left] == [".so"]


@compiled
def test_killed_build_leaves_nothing_that_is_loaded(build, tmp_path, monkeypatch):
    """A process killed while it compiles: the next one builds."""
    compiler = native._compiler()[0]
    slow = f'case "$*" in *-o*) touch {tmp_path}/compiling; exec sleep 60;; esac; exec {compiler} "$@"\n'
    program = (
        "import pathlib; from nfhelpers.kernels import native; "
        f"native._SOURCE = pathlib.Path({str(tmp_path / 'stub.cpp')!r}); native.status()"
    )
    path = script(tmp_path / "compiler", slow)
    environment = os.environ | dict(CXX=path)
    process = subprocess.Popen([sys.executable, "-c", program], env=environment, start_new_session=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "compiling").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, 9)
    process.wait()
    monkeypatch.setenv("CXX", script(tmp_path / "compiler", f'exec {compiler} "$@"\n'))
    assert native.status() == "ok" and len(build) == 1
