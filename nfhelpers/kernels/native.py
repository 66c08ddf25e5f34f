"""The selective scan on a CPU in C++: compiled at first use, kept in the user's cache folder, run by ctypes.

CXX or the first of c++, g++ and clang++ compiles. A hash of source, flags, compiler and processor names the
library: machines may share a home folder. The operation is that of reference.py, as pointers and strides.
The state is float32; numbers below 1e-38 count as zero. Any number of threads gives the same bits.
"""

import contextlib
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
FLAGS = f"-std=c++17 -O3 -shared -fPIC -pthread -fvisibility=hidden -w -DNF_CHUNK={CHUNK}".split()
# The parts of -ffast-math that leave NaN, infinity and the order of sums alone.
FLAGS += ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
TUNING = "-march=native"  # left out where the compiler refuses it
SOURCE = Path(__file__).with_name("native.cpp")
_DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # Dtype of native.cpp


def status():
    """ "ok", or why the backend cannot be used in this process. Builds the library unless one is kept."""
    try:
        load()
    except RuntimeError as error:
        return str(error)
    return "ok"


@functools.cache
def load():
    """The library: the one that is kept, else one built and kept, else one built for this process."""
    if os.name != "posix":
        raise RuntimeError(f"needs Linux or macOS, not {platform.system()}")
    compiler = _compiler()
    name = f"scan-{_fingerprint(compiler)}.so"
    try:
        root = os.environ.get("XDG_CACHE_HOME", "")
        root = Path(root) if os.path.isabs(root) else Path("~/.cache").expanduser()
        folder = root / "nfhelpers" / "native"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_owner(folder)
        path = folder / name
        if path.exists():
            _check_owner(path)
            with contextlib.suppress(RuntimeError):  # cut short by a crash or a full disk: replaced below
                return _open(path)
        with tempfile.TemporaryDirectory(dir=folder, prefix="build-") as work:
            _compile(compiler, Path(work) / name)
            os.replace(Path(work) / name, path)  # whole or not at all, whoever else is building
        return _open(path)
    except OSError as error:
        message = f"the native scan is compiled for this process only: {error}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    with tempfile.TemporaryDirectory(prefix="nfhelpers-") as work:
        _compile(compiler, Path(work) / name)
        return _open(Path(work) / name)  # stays mapped when the file is gone


def _compiler():
    """The command that compiles, as a list of words."""
    asked = shlex.split(os.environ.get("CXX", ""))
    for command in [asked] if asked else [[name] for name in COMPILERS]:
        if shutil.which(command[0]):
            return command
    raise RuntimeError(f"no compiler found: none of {', '.join(asked[:1] or COMPILERS)} is a command")


def _fingerprint(compiler):
    """Hash of all that decides what the library contains."""
    try:  # model and instruction sets of the processor, on x86, ARM, RISC-V, POWER
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        told = ("model", "flags", "Features", "CPU", "isa", "cpu")
        processor = [line for line in lines if line.startswith(told) and not line.startswith("cpu MHz")]
    except OSError:  # not Linux
        processor = [platform.processor()]
    version = _run([*compiler, "--version"]).stdout
    parts = [SOURCE.read_text(encoding="utf-8"), *compiler, *FLAGS, TUNING, version, platform.machine()]
    return hashlib.sha256("\0".join([*parts, *processor]).encode()).hexdigest()[:20]


def _check_owner(path):
    """Loading what someone else can write is running what someone else wrote."""
    found = path.stat()
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise PermissionError(f"{path} is another user's or can be written by others; chown it, chmod go-w")


def _compile(compiler, path):
    for tuning in ([TUNING], []):
        result = _run([*compiler, *FLAGS, *tuning, str(SOURCE), "-o", str(path)])
        if result.returncode == 0:
            return
    lines = (result.stderr.strip() or f"exit code {result.returncode}").splitlines()
    raise RuntimeError("compile failed: " + "\n".join(lines[:5]))


def _run(command):
    options = dict(capture_output=True, text=True, errors="replace", timeout=300)
    try:
        return subprocess.run(command, **options)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"compile failed: {error}") from error


def _open(path):
    try:
        library = ctypes.CDLL(str(path))
        for function in (library.nf_forward, library.nf_backward, library.nf_pieces):
            function.argtypes, function.restype = [ctypes.POINTER(_Problem)], ctypes.c_int64
    except (OSError, AttributeError) as error:
        raise RuntimeError(f"load failed: {error}") from error
    return library


class _View(ctypes.Structure):
    """View of native.cpp: a tensor (b, k, l, d), d or l side by side, strides in elements."""

    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in "b k l d dtype".split())]


class _Problem(ctypes.Structure):
    """Problem of native.cpp."""

    _numbers = "batch directions length channels states groups threads reverse shared softplus tied"
    _numbers += " order_b pieces"
    _views = tuple("u delta z y grad_y du ddelta dz".split())
    _pointers = "A B C D bias initial grad_last order last kept dA dB dC dD dbias dinitial"
    _fields_ = [
        *((name, ctypes.c_int64) for name in _numbers.split()),
        *((name, _View) for name in _views),
        *((name, ctypes.c_void_p) for name in _pointers.split()),
    ]

    def give(self, **tensors):
        """Point to tensors and keep them alive: views with rows or channels side by side, or contiguous."""
        self.held = [*getattr(self, "held", ()), tensors]
        for name, x in tensors.items():
            if x is not None and name in self._views:
                strides = [0 if i == 1 and x.shape[1] == 1 else step for i, step in enumerate(x.stride())]
                setattr(self, name, _View(x.data_ptr(), *strides, _DTYPES[x.dtype]))
            elif x is not None:
                setattr(self, name, x.data_ptr())


def states_shape(batch, directions, length, channels, states):
    """Shape of the float32 tensor that `forward` keeps for `backward`: the state before every CHUNK steps."""
    return batch, directions, -(-length // CHUNK), states, channels


def _problem(u, delta, A, B, C, D, z, bias, initial, order, carried, reverse, softplus, tied):
    """The arguments as native.cpp takes them."""
    problem = _Problem(*delta.shape, B.shape[4], B.shape[2], torch.get_num_threads(), reverse)
    problem.shared, problem.softplus, problem.tied = u.shape[1] < delta.shape[1], softplus, tied
    if order is not None and order.shape[0] > 1:
        problem.order_b = order[0].numel()
    problem.give(u=_rows(u), delta=_rows(delta), z=_rows(z), A=A, B=_float(B), C=_float(C), D=D, bias=bias)
    problem.give(initial=initial)
    problem.give(order=None if order is None else order.to(torch.int64).contiguous())  # (b', K, l)
    return problem


def _rows(x):
    """x (b, k, l, d), or None, in a dtype that the library reads, with rows or channels side by side."""
    x = x if x is None or x.dtype in _DTYPES else x.float()
    return x if x is None or 1 in x.stride()[2:] else x.contiguous()


def _float(x):
    return None if x is None else x.float().contiguous()


def _like(x, exact=False):
    """A tensor (b, k, l, d) like x for the library to write, in x's dtype and memory order where it can."""
    new = torch.empty_like(x, dtype=x.dtype if x.dtype in _DTYPES and not exact else torch.float32)
    return new if 1 in new.stride()[2:] else torch.empty_like(new, memory_format=torch.contiguous_format)


def _call(name, problem):
    if getattr(load(), name)(problem):
        raise MemoryError("the native scan has no memory for its work buffers")


def forward(u, delta, A, B, C, D, z, bias, initial, order, carried, reverse, softplus, tied, keep_states):
    """(y, last, states) of the scan that reference.py describes, without `carried`."""
    problem = _problem(u, delta, A, B, C, D, z, bias, initial, order, carried, reverse, softplus, tied)
    y = _like(u.new_empty(()).expand(delta.shape) if problem.shared else u)
    last = A.new_empty(*delta.shape[:2], delta.shape[3], problem.states)
    kept = A.new_empty(states_shape(*delta.shape, problem.states) if keep_states else (0,))
    problem.give(y=y, last=last, kept=kept if keep_states else None)
    _call("nf_forward", problem)
    return y.to(u.dtype), last, kept


def backward(
    grad_y, grad_last, states, u, delta, A, B, C, D, z, bias, initial, order, carried, reverse, softplus, tied
):
    """Gradients of u, delta, A, B, C, D, z, bias and initial in their shapes; None where one is None."""
    problem = _problem(u, delta, A, B, C, D, z, bias, initial, order, carried, reverse, softplus, tied)
    dinitial = None if initial is None else torch.empty_like(initial)
    problem.give(grad_y=_rows(grad_y), grad_last=_float(grad_last), kept=states)
    problem.pieces = load().nf_pieces(problem)
    # Directions that share u add to du one after another: without rounding in between.
    rows = dict(du=_like(u, exact=problem.shared and u.dtype != torch.float32), ddelta=_like(delta))
    rows["dz"] = None if z is None else _like(z)
    # Terms of a sum over samples, or over pieces of the channels.
    sums = dict(dA=A, dD=D, dbias=bias, dB=B, dC=C)
    for name, x in sums.items():
        count = problem.pieces if name in ("dB", "dC") else problem.batch
        sums[name] = None if x is None else A.new_empty(count, *x.shape)
    problem.give(**rows, **sums, dinitial=dinitial)
    _call("nf_backward", problem)
    # One term after another: the same bits at any number of threads.
    found = rows | {name: None if x is None else functools.reduce(torch.add, x) for name, x in sums.items()}
    found["dinitial"] = dinitial
    return tuple(found[f"d{name}"] for name in "u delta A B C D z bias initial".split())
