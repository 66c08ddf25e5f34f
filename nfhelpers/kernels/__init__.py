"""The selective scan of S6: argument checks, choice of backend, self-check.

`selective_scan` takes the arguments and shapes of mamba_ssm's `selective_scan_fn`, so that either can replace
the other, and runs on the backend that suits the device. `backend_status` says why a backend cannot be used.
"""

import functools
import importlib
import os

import torch

from .chunked import selective_scan_chunked
from .reference import selective_scan_reference

BACKENDS = ("reference", "chunked", "native", "triton", "mamba_ssm")
DISCRETIZATIONS = ("mamba", "zoh")
_CUDA_ONLY = ("triton", "mamba_ssm")
_BROKEN_INSTALL = (ImportError, OSError, AttributeError, RuntimeError, TypeError)
"""What the import of a package raises that is missing or was built for another torch, driver or Python."""


def selective_scan(
    u,
    delta,
    A,
    B,
    C,
    D=None,
    z=None,
    delta_bias=None,
    delta_softplus=False,
    return_last_state=False,
    *,
    backend=None,
    discretization="mamba",
):
    """Scan of a diagonal state space model whose step size, input and output weights vary along the sequence.

        delta = softplus(delta + delta_bias)                             as far as asked for
        h_l = exp(delta_l A) h_{l-1} + Bbar_l u_l                        h_{-1} = 0
        y_l = (sum over n of C_l h_l + D u_l) * silu(z_l)

    Bbar = delta B for `discretization="mamba"`; (exp(delta A) - 1) / A * B for `"zoh"`, which tends to delta
    B as A tends to 0.

    Args:
        u: (B, D, L) input, any floating dtype. Any strides: a transposed (B, L, D) tensor is the fastest.
        delta: (B, D, L) step sizes, positive after bias and softplus for a meaningful model.
        A: (D, N) real; negative for a stable recurrence.
        B, C: (D, N) fixed, (B, N, L) varying, or (B, G, N, L) varying in G groups of D / G adjacent channels.
        D: (D,) skip weight. z: (B, D, L) gate. delta_bias: (D,).
        return_last_state: also return h after the last position.
        backend: one of BACKENDS; None takes NF_SCAN_BACKEND, else the best for u's device (`choose_backend`).

    Returns:
        y (B, D, L) in u's dtype; with return_last_state, (y, last state (B, D, N)). The state is float32
        whatever the dtypes and autocast (float64 in reference and chunked when an argument is). Gradients
        reach every argument.

    Raises:
        ValueError: wrong shape or dtype, empty batch or sequence, tensors on different devices, unknown
            discretization or backend, or a backend that cannot be used here.

    Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023; the
    zero-order hold is seed 002's.
    """
    _check(u, delta, A, B, C, D, z, delta_bias, discretization)
    name = choose_backend(u.device, backend)
    if name == "mamba_ssm" and discretization != "mamba":
        raise ValueError(
            f"backend 'mamba_ssm' has no discretization={discretization!r}; use backend='chunked'"
        )
    scan = _scan_function(name)
    arguments = (u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)
    if name == "mamba_ssm":
        return scan(*arguments)
    return scan(*arguments, discretization=discretization)


def _check(u, delta, A, B, C, D, z, delta_bias, discretization):
    if discretization not in DISCRETIZATIONS:
        raise ValueError(f"discretization={discretization!r} is unknown; choose one of {DISCRETIZATIONS}")
    given = dict(u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias)
    optional = ("D", "z", "delta_bias")
    for name, x in given.items():
        if x is None and name in optional:
            continue
        if not isinstance(x, torch.Tensor):
            raise ValueError(f"{name} is a {type(x).__name__}; pass a floating-point tensor")
        if x.is_complex():
            raise ValueError(f"{name} is {x.dtype}; only real A, B, C are supported, pass float32")
        if not x.is_floating_point():
            raise ValueError(f"{name} is {x.dtype}; pass a floating dtype such as float32")
        if x.device != u.device:
            raise ValueError(f"{name} is on {x.device} and u on {u.device}; move them to one device")

    if u.dim() != 3:
        raise ValueError(f"u has shape {tuple(u.shape)}; pass (B, D, L) such as (8, 256, 1228)")
    batch, channels, length = u.shape
    if 0 in u.shape:
        raise ValueError(f"u has shape {tuple(u.shape)}, which is empty; B, D and L must be at least 1")
    if A.dim() != 2 or A.shape[0] != channels or A.shape[1] == 0:
        raise ValueError(
            f"A has shape {tuple(A.shape)}; pass (D, N) with D={channels}, such as ({channels}, 16)"
        )
    states = A.shape[1]
    shapes = dict(delta=u.shape, z=u.shape, D=(channels,), delta_bias=(channels,))
    for name, shape in shapes.items():
        if given[name] is not None and tuple(given[name].shape) != tuple(shape):
            raise ValueError(f"{name} has shape {tuple(given[name].shape)}; it must be {tuple(shape)}")
    groups = set()
    for name in ("B", "C"):
        shape = tuple(given[name].shape)
        group = shape[1] if len(shape) == 4 else None
        legal = [(channels, states), (batch, states, length)]
        if group:
            legal.append((batch, group, states, length))
        if shape not in legal:
            raise ValueError(
                f"{name} has shape {shape}; it must be (D, N), (B, N, L) or (B, G, N, L) "
                f"with B={batch}, D={channels}, N={states}, L={length}, such as {legal[1]}"
            )
        if group and channels % group:
            raise ValueError(
                f"{name} has G={group} groups, which do not divide D={channels} channels; G=1 always does"
            )
        if len(shape) > 2:
            groups.add(group or 1)
    if len(groups) > 1:
        raise ValueError(
            f"B and C have {sorted(groups)} groups; varying B and C need the same number of groups"
        )


def _triton_module():
    return importlib.import_module(".triton_scan", __name__)


@functools.cache
def _mamba_ssm():
    """(selective_scan_fn, None) or (None, why it cannot be imported)."""
    try:
        module = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
        return module.selective_scan_fn, None
    except _BROKEN_INSTALL as error:
        return None, f"import failed: {type(error).__name__}: {error}"


def _mamba_ssm_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state):
    """mamba_ssm's kernel wants float32 parameters, and one dtype for all that varies along the sequence."""
    scan, _ = _mamba_ssm()
    B, C = (x.float() if x.dim() == 2 else x.to(u.dtype) for x in (B, C))
    D, delta_bias = (None if x is None else x.float() for x in (D, delta_bias))
    z = None if z is None else z.to(u.dtype)
    result = scan(u, delta.to(u.dtype), A.float(), B, C, D, z, delta_bias, delta_softplus, return_last_state)
    return (result[0].to(u.dtype), result[1]) if return_last_state else result.to(u.dtype)


def _scan_function(name):
    if name == "triton":
        return _triton_module().selective_scan_triton
    return {
        "reference": selective_scan_reference,
        "chunked": selective_scan_chunked,
        "mamba_ssm": _mamba_ssm_scan,
    }[name]


def _interpreted():
    return os.environ.get("TRITON_INTERPRET") == "1"


def _triton_status():
    try:
        importlib.import_module("triton")
        _triton_module()
    except _BROKEN_INSTALL as error:
        if isinstance(error, ImportError) and error.name == f"{__name__}.triton_scan":
            return "not built yet"
        return f"import failed: {type(error).__name__}: {error}"
    if not torch.cuda.is_available() and not _interpreted():
        return "no CUDA device (TRITON_INTERPRET=1 runs it on the CPU, slowly, for tests)"
    return "ok"


def _mamba_ssm_status():
    _, reason = _mamba_ssm()
    if reason is None and not torch.cuda.is_available():
        reason = "no CUDA device"
    return reason or "ok"


def backend_status():
    """{backend: "ok", or the reason why it cannot be used in this process}, in the order of BACKENDS."""
    return {
        "reference": "ok",
        "chunked": "ok",
        "native": "not built yet",
        "triton": _triton_status(),
        "mamba_ssm": _mamba_ssm_status(),
    }


def choose_backend(device, backend=None):
    """Name of the backend that runs on `device`.

    That is `backend`, else the environment variable NF_SCAN_BACKEND, else triton on a CUDA device where it
    works, else chunked.

    Raises:
        ValueError: an unknown backend, or one that is asked for and cannot be used on this device.
    """
    device = torch.device(device)
    source = "backend" if backend is not None else "NF_SCAN_BACKEND"
    backend = backend if backend is not None else os.environ.get("NF_SCAN_BACKEND") or None
    if backend is None:
        return "triton" if device.type == "cuda" and _triton_status() == "ok" else "chunked"
    if backend not in BACKENDS:
        raise ValueError(f"{source}={backend!r} is unknown; choose one of {BACKENDS}")
    status = backend_status()[backend]
    if status == "ok" and backend in _CUDA_ONLY and device.type != "cuda":
        if backend != "triton" or not _interpreted():
            status = f"needs tensors on a CUDA device, not on {device}"
    if status != "ok":
        usable = [name for name, state in backend_status().items() if state == "ok"]
        raise ValueError(f"{source}={backend!r} cannot be used: {status}; usable here: {usable}")
    return backend


def self_check(backend, device="cpu"):
    """Largest relative error of `backend` in float32 against the float64 reference, on small problems.

    Returns dict(forward=..., backward=...): over outputs and last states, and over the gradients of every
    argument; relative to the largest entry of the tensor compared. About 1e-6 where all is well.

    Raises:
        ValueError: the backend is unknown or cannot be used on `device`.
    """
    choose_backend(device, backend)
    worst = dict(forward=0.0, backward=0.0)
    for discretization in DISCRETIZATIONS if backend != "mamba_ssm" else ("mamba",):
        for groups in (1, 2):
            arguments, weights = _small_problem(groups)
            truth = _evaluate("reference", arguments, weights, torch.float64, "cpu", discretization)
            found = _evaluate(backend, arguments, weights, torch.float32, device, discretization)
            for part, wanted, got in zip(("forward", "backward"), truth, found, strict=True):
                errors = [relative_error(y, x) for x, y in zip(wanted, got, strict=True)]
                worst[part] = max(worst[part], *errors)
    return worst


def _small_problem(groups, batch=2, channels=6, length=37, states=4):
    """Every argument of a scan, and weights that make a scalar of its two outputs."""
    generator = torch.Generator().manual_seed(groups)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    arguments = dict(
        u=draw(batch, channels, length),
        delta=draw(batch, channels, length),
        A=-draw(channels, states).exp(),
        B=draw(batch, groups, states, length),
        C=draw(batch, groups, states, length),
        D=draw(channels),
        z=draw(batch, channels, length),
        delta_bias=draw(channels),
    )
    return arguments, (draw(batch, channels, length), draw(batch, channels, states))


def _evaluate(backend, arguments, weights, dtype, device, discretization):
    """Outputs, and gradients of their weighted sum with respect to every argument."""
    given = {name: x.to(device, dtype).requires_grad_() for name, x in arguments.items()}
    options = dict(
        delta_softplus=True, return_last_state=True, backend=backend, discretization=discretization
    )
    outputs = selective_scan(**given, **options)
    loss = sum((y * weight.to(y)).sum() for y, weight in zip(outputs, weights, strict=True))
    return outputs, torch.autograd.grad(loss, list(given.values()))


def relative_error(found, wanted):
    """Largest absolute difference over the largest magnitude in `wanted`; infinite when anything is NaN."""
    found, wanted = found.detach().double().cpu(), wanted.detach().double().cpu()
    error = (found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-300)
    return float("inf") if not torch.isfinite(error) else error.item()
