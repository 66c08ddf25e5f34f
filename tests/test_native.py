"""The native scan: exact arithmetic, the same bits at any number of threads, how its library is built."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from test_kernels import ALL, assert_all_equal, directional_problem, outputs_and_gradients, problem

from nfhelpers.kernels import directional_scan, native, selective_scan

STATUS = native.status()
compiled = pytest.mark.skipif(STATUS != "ok", reason=f"native: {STATUS}")
TIED = pytest.mark.parametrize("tied", [False, True], ids=["free", "tied"])


def run(scan, arguments, **options):
    return outputs_and_gradients(scan, arguments, backend="native", **options)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# --------------------------------------------------------------------------------------------------- the scan


@compiled
@TIED
def test_bitwise_equal_at_any_number_of_threads(tied, threads):
    """The first has fewer groups than threads: its channels are shared out, and their parts added up."""
    arguments, orders = directional_problem(2, 3, 70, 300, 5, tied=tied)
    wide = problem(1, 200, 300, 5, extras=ALL, tied=tied)

    def both():
        wide_options = dict(delta_softplus=True, return_last_state=True, tied_decay=tied)
        options = dict(orders=orders, reverse=(True, False, False), tied_decay=tied)
        return run(selective_scan, wide, **wide_options) + run(directional_scan, arguments, **options)

    threads(1)
    wanted = both()
    for count in (2, 3, 16, 1):
        threads(count)
        assert_all_equal(wanted, both())


@compiled
def test_decays_are_exponentials():
    """h_1 = 1, h_2 = exp(-x): to a relative 1e-7 and the rounding of x log2(e); 0 far below exp(-87)."""
    x = torch.cat([torch.linspace(0, 86, 4001), torch.tensor([0.0, 1e-8, 1e-3, 105.0, 1000.0, 1e10, 3e38])])
    one = torch.ones(1, 1, 2)
    u = torch.tensor([1.0, 0.0]).expand(1, len(x), 2)
    delta = torch.stack([torch.ones_like(x), x], 1)[None]
    options = dict(return_last_state=True, backend="native")
    y, last = selective_scan(u, delta, -torch.ones(len(x), 1), one, one, **options)
    y = y[0, :, 1]
    off = (y.double() / torch.exp(-x.double()) - 1).abs()[x < 87]
    assert (off <= 2e-7 + 1.5e-7 * x[x < 87]).all()
    assert (y[x > 104] == 0).all() and (y[x == 0] == 1).all()
    assert torch.equal(last[0, :, 0], y)


@compiled
def test_softplus_is_exact_in_both_tails():
    """One step, B = C = u = 1: y = softplus(delta), its gradient the logistic function."""
    delta = torch.linspace(-85, 85, 3401)
    one = torch.ones(1, 1, 1)
    given = delta[None, :, None].clone().requires_grad_()
    options = dict(delta_softplus=True, backend="native")
    y = selective_scan(one.expand(1, 3401, 1), given, torch.zeros(3401, 1), one, one, **options)
    (slope,) = torch.autograd.grad(y.sum(), given)
    x = delta.double().numpy()
    bound = 4e-7 + 1.5e-7 * np.abs(x)  # rounding x log2(e) alone makes exp(x) uncertain by 1e-7 |x|
    assert (np.abs(y.detach().flatten().double().numpy() / np.logaddexp(0, x) - 1) <= bound).all()
    assert (np.abs(slope.flatten().double().numpy() * (1 + np.exp(-x)) - 1) <= bound).all()


@compiled
@TIED
@pytest.mark.parametrize("q", [-1000.0, -1.0, -1e-8, 0.0])
def test_extreme_decays(q, tied):
    """delta A = q at every step."""
    arguments = problem(1, 20, 70, 6, extras="D", tied=tied)
    arguments |= dict(delta=torch.full((1, 20, 70), 0.5), A=torch.full_like(arguments["A"], 2 * q))
    doubles = {name: x.double() for name, x in arguments.items()}
    wanted = outputs_and_gradients(selective_scan, doubles, backend="reference", tied_decay=tied)
    for x, y in zip(wanted, run(selective_scan, arguments, tied_decay=tied), strict=True):
        assert (y.double() - x).abs().max() <= 1e-5 * x.abs().max()


@compiled
@TIED
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["u", "delta", "A", "B", "C", "D", "z", "delta_bias"])
def test_nan_and_infinity_propagate(name, value, tied):
    arguments = problem(1, 37, 70, 5, extras=ALL, tied=tied)
    spoilt = arguments[name]
    spoilt[(0, 7, 20) if name in ("u", "delta", "z") else (0, 2, 20) if name in ("B", "C") else 7] = value
    options = dict(delta_softplus=True, return_last_state=True, tied_decay=tied, backend="native")
    y, last = selective_scan(**arguments, **options)
    good = y.isfinite()[0].T  # (L, D)
    if name in ("B", "C"):
        assert not good[20].any() and good[:20].all()
    else:
        # A gate or a skip weight of infinity may meet its row only; the others reach the rows that follow.
        assert not good[20, 7] and good[:, :7].all() and good[:, 8:].all()
        assert good[:20, 7].all() or spoilt.dim() < 3
    if name in ("u", "delta") or (name == "B" and value != value):
        assert not last.isfinite().all()


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_in_the_gradient_propagates(dtype):
    arguments = problem(1, 37, 70, 5, extras=ALL)
    arguments |= {name: arguments[name].to(dtype) for name in ("u", "delta", "B", "C", "z")}
    given = {name: x.requires_grad_() for name, x in arguments.items()}
    y = selective_scan(**given, delta_softplus=True, backend="native")
    grad = torch.ones_like(y)
    grad[0, 7, 30] = float("nan")
    found = dict(zip(given, torch.autograd.grad(y, list(given.values()), grad), strict=True))
    for name in ("u", "delta", "z"):
        bad = found[name].isnan()[0].T  # (L, D)
        assert bad[30, 7] and not bad[31:].any() and bad.sum(1).max() == 1
    for name in ("A", "B", "C", "D", "delta_bias"):
        assert found[name].isnan().any() and not found[name].isnan().all()


@compiled
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_half_precision_is_rounded_only_when_written(dtype, rounding):
    """Also where directions share x, whose gradients are added: off by at most one rounding."""
    arguments, orders = directional_problem(2, 3, 37, 70)
    arguments |= {name: arguments[name].to(dtype) for name in ("x", "delta", "B", "C")}
    weight = torch.randn(2, 3, 70, 37, generator=torch.Generator().manual_seed(0)).to(dtype)

    def y_and_dx(given, backend):
        given["x"].requires_grad_()
        y = directional_scan(**given, orders=orders, backend=backend)
        return y, *torch.autograd.grad(y, given["x"], weight.to(y.dtype))

    wanted = y_and_dx({name: x.double() for name, x in arguments.items()}, "reference")
    for x, y in zip(wanted, y_and_dx(arguments, "native"), strict=True):
        assert y.dtype == dtype
        assert ((y.double() - x).abs() <= rounding * x.abs() + 2e-5 * x.abs().max()).all()


@compiled
def test_denormal_numbers_survive_elsewhere():
    """The scan flushes them to zero on its own threads, and puts the caller's mode back."""
    run(selective_scan, problem())
    assert torch.tensor([1e-40]).mul(1.0).item() > 0


# ------------------------------------------------------------------------------------------------- the build


EXPORTED = 'extern "C" __attribute__((visibility("default"))) long nf_{}(const void*) {{ return 1; }}\n'
STUB = "".join(map(EXPORTED.format, ("forward", "backward", "pieces")))


@pytest.fixture
def build(tmp_path, monkeypatch):
    """An empty cache folder, a source that compiles fast, and a list of the compilations that are run."""
    source = tmp_path / "stub.cpp"
    source.write_text(STUB)
    monkeypatch.setattr(native, "SOURCE", source)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    commands, real = [], subprocess.run

    def counted(command, **options):
        if "-o" in command:
            commands.append(command)
        return real(command, **options)

    monkeypatch.setattr(native.subprocess, "run", counted)
    native.load.cache_clear()
    yield commands
    native.load.cache_clear()


def again():
    native.load.cache_clear()
    return native.status()


def kept(tmp_path):
    return list((tmp_path / "cache" / "nfhelpers" / "native").iterdir())


def script(path, text):
    """An executable that stands for a compiler."""
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return str(path)


@compiled
def test_library_is_built_once_kept_and_built_anew_after_a_change(build, tmp_path, monkeypatch):
    assert native.status() == "ok" and len(build) == 1
    (library,) = kept(tmp_path)
    assert library.suffix == ".so" and library.parent.stat().st_mode & 0o777 == 0o700
    assert again() == "ok" and len(build) == 1
    (tmp_path / "stub.cpp").write_text(STUB + "// changed\n")
    assert again() == "ok" and len(build) == 2
    monkeypatch.setattr(native, "FLAGS", [*native.FLAGS, "-DCHANGED"])
    assert again() == "ok" and len(build) == 3 and len(kept(tmp_path)) == 3
    cut = tmp_path / "another" / "nfhelpers" / "native"
    cut.mkdir(parents=True, mode=0o700)
    for path in kept(tmp_path):  # cut short by a crash
        (cut / path.name).write_bytes(b"\x7fELF, but no more")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    assert again() == "ok" and len(build) == 4


@compiled
def test_flag_that_the_compiler_refuses_is_left_out(build, tmp_path, monkeypatch):
    picky = 'case "$*" in *-march=native*) echo "unknown -march" >&2; exit 1;; esac; exec c++ "$@"\n'
    monkeypatch.setenv("CXX", script(tmp_path / "picky", picky))
    assert native.status() == "ok"
    assert ["-march=native" in command for command in build] == [True, False]


@pytest.mark.parametrize("fault", ["compiler fails", "no compiler", "library does not load"])
def test_what_cannot_be_built_has_a_named_cause(build, tmp_path, monkeypatch, fault):
    programs = {
        "compiler fails": "echo 'stub.cpp: the cause' >&2; exit 1\n",
        "library does not load": 'while [ $# -gt 1 ]; do [ "$1" = -o ] && echo nothing > "$2"; shift; done\n',
    }
    if fault == "no compiler":
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        monkeypatch.setenv("CXX", script(tmp_path / "compiler", programs[fault]))
    assert {"compiler fails": "the cause", "no compiler": "c++"}.get(fault, "load") in native.status()
    with pytest.raises(RuntimeError):
        native.load()


@compiled
@pytest.mark.parametrize("fault", ["no folder", "writable by others", "another owner"])
def test_cache_that_is_not_the_users_own_is_not_used(build, tmp_path, monkeypatch, fault):
    """A planted library would be loaded."""
    folder = tmp_path / "cache" / "nfhelpers" / "native"
    if fault == "no folder":
        (tmp_path / "cache").write_text("a file")
    else:
        assert native.status() == "ok"
        (library,) = kept(tmp_path)
        library.unlink()
        library.write_text("planted")
        if fault == "another owner":
            user = os.getuid()
            monkeypatch.setattr(os, "getuid", lambda: user + 1)
        else:
            folder.chmod(0o777)
    with pytest.warns(RuntimeWarning):
        assert again() == "ok"
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
        'exec c++ "$@"\n'
    )
    program = (
        "import pathlib; from nfhelpers.kernels import native; "
        f"native.SOURCE = pathlib.Path({str(tmp_path / 'stub.cpp')!r}); print(native.status())"
    )
    environment = os.environ | dict(CXX=script(tmp_path / "waiting", wait))
    command = [sys.executable, "-c", program]
    options = dict(env=environment, stdout=subprocess.PIPE, text=True)
    processes = [subprocess.Popen(command, **options) for _ in range(2)]
    assert [process.communicate(timeout=120)[0].strip() for process in processes] == ["ok", "ok"]
    assert len(list(started.iterdir())) == 2
    assert [path.suffix for path in kept(tmp_path)] == [".so"]
