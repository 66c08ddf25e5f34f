"""The selective scan on a CPU in C++: compiled at first use, kept in the user's cache folder, run by ctypes.

`native.cpp` says how the scan is computed. Here are the two functions of the canonical operation, which hand
it pointers and strides, and the build. The compiler is CXX, else the first of c++, g++ and clang++; it needs
no headers but those of the C++ library. The library's name is a hash of source, flags, compiler and
processor: a change of any of them builds anew, and machines that share a home folder do not share a library.

b batch, k direction (K of them; k' is K, or 1 for an input that all directions share), l row, d channel,
n state, g group of channels that share B and C.

The state is float32; float32, bfloat16 and float16 are read and written. Numbers below 1e-38 count as zero.
Results are bitwise the same in every run and at any number of threads (`torch.get_num_threads()` are used).
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch

CHUNK = 64  # steps between two states that are kept for the backward pass
COMPILERS = ("c++", "g++", "clang++")
FLAGS = (
    *(
        "-std=c++17",
        "-O3",
        "-shared",
        "-fPIC",
        "-pthread",
        "-fvisibility=hidden",
        "-w",
        f"-DNF_CHUNK={CHUNK}",
    ),
    # The parts of -ffast-math that leave NaN, infinity and the order of sums alone.
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
)
TUNING = ("-march=native",)  # left out where the compiler refuses it
COMPILE_SECONDS = 300
_SOURCE = Path(__file__).with_name("native.cpp")
_DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # Dtype of native.cpp


# -------------------------------------------------------------------------------------------------- the build


def status():
    """ "ok", or why the backend cannot be used in this process. Builds the library unless one is kept."""
    return _load()[1] or "ok"


@functools.cache
def _load():
    """(library, None) or (None, reason)."""
    if os.name != "posix":
        return None, f"needs Linux or macOS, not {platform.system()}"
    try:
        return _library(), None
    except RuntimeError as error:
        return None, str(error)


def _library():
    """The library: the one that is kept, else one built and kept, else one built for this process."""
    compiler = _compiler()
    name = f"scan-{_fingerprint(compiler)}.so"
    try:
        folder = _cache_folder()
        path = folder / name
        if path.exists():
            _check_owner(path)
            try:
                return _open(path)
            except RuntimeError:
                pass  # cut short by a crash or a full disk: replaced below
        with tempfile.TemporaryDirectory(dir=folder, prefix="build-") as work:
            _compile(compiler, Path(work) / name)
            os.replace(Path(work) / name, path)  # whole or not at all, whoever else is building
        return _open(path)
    except OSError as error:
        warnings.warn(
            f"the native scan is compiled for this process only: {error}", RuntimeWarning, stacklevel=2
        )
    with tempfile.TemporaryDirectory(prefix="nfhelpers-") as work:
        _compile(compiler, Path(work) / name)
        return _open(Path(work) / name)  # stays mapped when the file is gone


def _compiler():
    """The command that compiles, as a list of words."""
    asked = shlex.split(os.environ.get("CXX", ""))
    if asked:
        if shutil.which(asked[0]) is None:
            raise RuntimeError(f"no compiler found: CXX={os.environ['CXX']!r} is not a command")
        return asked
    found = next((name for name in COMPILERS if shutil.which(name)), None)
    if found is None:
        raise RuntimeError(
            f"no compiler found: none of {', '.join(COMPILERS)} is installed, and CXX is not set"
        )
    return [found]


def _fingerprint(compiler):
    """Hash of all that decides what the library contains."""
    version = _run([*compiler, "--version"]).stdout
    parts = [_SOURCE.read_text(encoding="utf-8"), *compiler, *FLAGS, *TUNING, version, _processor()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _processor():
    """Model and instruction sets of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:  # not Linux
        return f"{platform.machine()} {platform.processor()}"
    told = ("model", "flags", "Features", "CPU", "isa", "cpu")  # x86, ARM, RISC-V, POWER
    kept = [line for line in lines if line.startswith(told) and not line.startswith("cpu MHz")]
    return "\n".join([platform.machine(), *kept])


def _cache_folder():
    """The folder of kept libraries, made if needed. OSError when it is not the user's own."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    root = root if os.path.isabs(root) else os.path.expanduser("~/.cache")
    if not os.path.isabs(root):
        raise FileNotFoundError("the user has no home folder; set XDG_CACHE_HOME")
    folder = Path(root) / "nfhelpers" / "native"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_owner(folder)
    return folder


def _check_owner(path):
    """Loading what someone else can write is running what someone else wrote."""
    found = path.stat()
    if found.st_uid != os.getuid():
        raise PermissionError(f"{path} belongs to user {found.st_uid}, not to {os.getuid()}")
    if found.st_mode & 0o022:
        raise PermissionError(f"{path} can be written by others; run chmod go-w on it")


def _compile(compiler, path):
    files = (str(_SOURCE), "-o", str(path))
    result = _run([*compiler, *FLAGS, *TUNING, *files])
    if result.returncode:
        result = _run([*compiler, *FLAGS, *files])
    if result.returncode:
        lines = (result.stderr.strip() or f"exit code {result.returncode}").splitlines()
        raise RuntimeError("compile failed: " + "\n".join(lines[:5]))


def _run(command):
    try:
        return subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=COMPILE_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"compile failed: {error}") from error


def _open(path):
    try:
        library = ctypes.CDLL(str(path))
        for function in (library.nf_forward, library.nf_backward):
            function.argtypes, function.restype = [ctypes.POINTER(_Problem)], ctypes.c_int
    except (OSError, AttributeError) as error:
        raise RuntimeError(f"load failed: {error}") from error
    return library


# -------------------------------------------------------------------------------------------------- the calls


class _View(ctypes.Structure):
    """View of native.cpp: a tensor (b, k, l, d), strides in elements."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("b", "k", "l", "d", "dtype")),
    ]


class _Problem(ctypes.Structure):
    """Problem of native.cpp."""

    _numbers = (
        "batch directions length channels states groups threads reverse "
        "shared softplus zoh tied fixed_B fixed_C order_b"
    )
    _views = "u delta z y grad_y du ddelta dz"
    _pointers = "A B C D bias grad_last order last kept dA dB dC dD dbias"
    _fields_ = [
        *((name, ctypes.c_int64) for name in _numbers.split()),
        *((name, _View) for name in _views.split()),
        *((name, ctypes.c_void_p) for name in _pointers.split()),
    ]


def states_shape(batch, directions, length, channels, states):
    """Shape of the float32 tensor that `forward` keeps for `backward`: the state before every CHUNK steps."""
    return batch, directions, -(-length // CHUNK), states, channels


def forward(u, delta, A, B, C, D, z, bias, order, reverse, softplus, zoh, tied, keep_states):
    """The scan: y (b, K, l, d) in u's dtype, last state (b, K, d, N), kept states (`states_shape`, or (0,)).

    Args:
        u: (b, k', l, d). delta: (b, K, l, d). Any strides.
        A: (K, d, N), or (K, d) with tied decays, where state n decays at the rate (n + 1) A.
        B, C: (b, K, G, l, N) varying, or (K, d, N) fixed.
        D: (K, d) or None. z: (b, K, l, d) or None. bias: (K, d) or None.
        order: None or integer (b', K, l), b' 1 or b: permutations; row order[t] is visited at step t.
        reverse: bit mask; direction k walks from the last step to the first if bit k is set.
        softplus, zoh, tied: bool, what the recurrence does. keep_states: bool, for `backward`.

    Every tensor but order is float32, bfloat16 or float16, on the CPU.

    Raises:
        ValueError: another dtype or device, or a row in order that does not exist.
        RuntimeError: the library cannot be built; `status` says why.
        MemoryError: no memory for the work buffers.

    Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023.
    """
    problem = _problem(u, delta, A, B, C, D, z, bias, order, reverse, softplus, zoh, tied)
    batch, directions, _, channels = delta.shape
    y = torch.empty_like(u) if u.shape[1] == directions else u.new_empty(delta.shape)
    last = torch.empty(batch, directions, channels, problem.states, dtype=torch.float32, device="cpu")
    kept = last.new_empty(states_shape(*delta.shape, problem.states) if keep_states else 0)
    written = _strided(y)
    problem.y, problem.last = _view(written), _pointer(last)
    problem.kept = _pointer(kept) if keep_states else None
    _call("nf_forward", problem)
    return _filled(y, written), last, kept


def backward(grad_y, grad_last, states, u, delta, A, B, C, D, z, bias, order, reverse, softplus, zoh, tied):
    """Gradients (du, ddelta, dA, dB, dC, dD, dz, dbias) of `forward`; an empty tensor for None.

    grad_y (b, K, l, d), any strides; grad_last (b, K, d, N) or None; states: what `forward` kept; the others
    as there. A gradient has shape, dtype and layout (`torch.empty_like`) of its argument.

    Raises: what `forward` raises.
    """
    problem = _problem(u, delta, A, B, C, D, z, bias, order, reverse, softplus, zoh, tied)
    grad_y, grad_last, states = (
        _readable("grad_y", grad_y),
        _dense("grad_last", grad_last),
        _dense("states", states),
    )
    problem.grad_y, problem.grad_last, problem.kept = _view(grad_y), _pointer(grad_last), _pointer(states)

    arguments = dict(u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, bias=bias)
    results, written = {}, {}
    for name, argument in arguments.items():
        if argument is None:
            results[name] = written[name] = A.new_empty(0)
            continue
        results[name] = torch.empty_like(argument)
        if name in ("u", "delta", "z"):
            # Directions that share u add to du one after another: without rounding in between.
            written[name] = _strided(results[name], exact=name == "u" and problem.shared)
            setattr(problem, f"d{name}", _view(written[name]))
        else:
            written[name] = _dense(name, results[name])
            setattr(problem, f"d{name}", _pointer(written[name]))
    _call("nf_backward", problem)
    return tuple(_filled(results[name], written[name]) for name in arguments)


def _problem(u, delta, A, B, C, D, z, bias, order, reverse, softplus, zoh, tied):
    """The arguments as native.cpp takes them."""
    views = dict(u=u, delta=delta, z=z)
    views = {name: _readable(name, x) for name, x in views.items() if x is not None}
    weights = dict(A=A, B=B, C=C, D=D, bias=bias)
    weights = {name: _dense(name, x) for name, x in weights.items()}
    if order is not None:
        order = order.to(torch.int64).contiguous()  # (b', K, l)

    batch, directions, length, channels = delta.shape
    problem = _Problem(
        batch=batch,
        directions=directions,
        length=length,
        channels=channels,
        states=B.shape[-1],
        groups=next((x.shape[2] for x in (B, C) if x.dim() == 5), 1),
        threads=torch.get_num_threads(),
        reverse=reverse,
        shared=u.shape[1] < directions,
        softplus=softplus,
        zoh=zoh,
        tied=tied,
        fixed_B=B.dim() == 3,
        fixed_C=C.dim() == 3,
        order_b=0 if order is None or order.shape[0] == 1 else directions * length,
        order=_pointer(order),
        **{name: _view(x) for name, x in views.items()},
        **{name: _pointer(x) for name, x in weights.items()},
    )
    problem.held = views, weights, order  # their memory is pointed to
    return problem


def _check(name, x):
    if x.dtype == torch.float64:
        raise ValueError(f"{name} is float64 and the native scan's state is float32; use backend='chunked'")
    if not x.is_floating_point() or x.device.type != "cpu":
        raise ValueError(f"{name} is {x.dtype} on {x.device}; the native scan takes float32 on the cpu")


def _readable(name, x):
    """x, any strides, in a dtype that the library reads."""
    _check(name, x)
    return x if x.dtype in _DTYPES else x.float()


def _dense(name, x):
    """x, or None, as contiguous float32."""
    if x is None:
        return None
    _check(name, x)
    return x.float().contiguous()


def _strided(result, exact=False):
    """Where the library writes `result`: there, or in float32 where it cannot or where rounding must wait."""
    direct = result.dtype in _DTYPES and (result.dtype == torch.float32 or not exact)
    return result if direct else torch.empty_like(result, dtype=torch.float32)


def _filled(result, written):
    return result if written is result else result.copy_(written)


def _pointer(x):
    return None if x is None else x.data_ptr()


def _view(x):
    batch, direction, row, channel = x.stride()
    shared = x.shape[1] == 1
    return _View(x.data_ptr(), batch, 0 if shared else direction, row, channel, _DTYPES[x.dtype])


def _call(name, problem):
    library, reason = _load()
    if library is None:
        raise RuntimeError(f"the native scan cannot be used: {reason}")
    outcome = getattr(library, name)(problem)
    if outcome == 1:
        raise MemoryError("the native scan has no memory for its work buffers")
    if outcome == 2:
        raise ValueError(f"order names a row that is not in 0 ... {problem.length - 1}")
