"""The scans of S6: argument checks, choice of backend, registration with PyTorch, self-check.

`selective_scan` takes the arguments and shapes of mamba_ssm's `selective_scan_fn`, so that either can replace
the other. `directional_scan` scans the same tokens in several orders at once. Both are views of one operation,
which chunked, native and triton_scan implement and which is registered here for autograd and torch.compile,
as `torch.ops.nfhelpers.scan_<backend>`:

    forward(u, delta, A, B, C, D, z, bias, order, reverse, softplus, tied, keep_states) -> y, last, states
    backward(grad_y, grad_last, states, u, delta, A, B, C, D, z, bias, order, reverse, softplus, tied)
        -> the gradients of u, delta, A, B, C, D, z, bias

b batch, k direction (K of them), l token (row), d channel, n state, g group of channels that share B and C

    u           (b, K, l, d), or (b, 1, l, d) when the directions share one input
    delta, z    (b, K, l, d)
    A           (K, d, N); tied (K, d), where state n decays at the rate (n + 1) A
    B, C        (b, K, G, l, N)
    D, bias     (K, d); they and A come contiguous in the state's dtype, the rest in any dtype and strides
    order       None, or (1 or b, K, l): row visited at step t
    reverse     bit k set: direction k walks its order from the last step to the first
    y           (b, K, l, d) in u's dtype, in the order of the rows
    last        (b, K, d, N) state after the last step
    states      what the backend keeps for its backward pass; (0,) when keep_states is False
"""

import functools
import importlib
import os
import warnings
from concurrent import futures

import torch

from . import reference
from .orders import check_permutation
from .reference import compute_dtype, state_rates

BACKENDS = ("reference", "chunked", "native", "triton", "mamba_ssm")
BROKEN_INSTALL = (ImportError, OSError, AttributeError, RuntimeError, TypeError)
"""What the import of a package raises that is missing or was built for another torch, driver or Python."""
_MODULES = {
    "chunked": "nfhelpers.kernels.chunked",
    "native": "nfhelpers.kernels.native",
    "triton": "nfhelpers.kernels.triton_scan",
    "mamba_ssm": "mamba_ssm.ops.selective_scan_interface",
}


def selective_scan(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False,
    *, backend=None, discretization="mamba", tied_decay=False,
):  # fmt: skip
    """Scan of a diagonal state space model whose step size, input and output weights vary along the sequence.

        delta = softplus(delta + delta_bias)                             as far as asked for
        h_l = exp(delta_l A) h_{l-1} + Bbar_l u_l                        h_{-1} = 0
        y_l = (sum over n of C_l h_l + D u_l) * silu(z_l)

    u, delta, z (B, D, L), any floating dtype and strides: a transposed (B, L, D) tensor is the fastest.
    A (D, N); with tied_decay (D,), where state n decays at the rate (n + 1) A: one exponential a channel and
    position, not N. B, C (B, N, L), or (B, G, N, L) in G groups of adjacent channels. D, delta_bias (D,).
    Bbar = delta B. `reference` and `chunked` also take fixed B, C (D, N), float64 and discretization="zoh",
    the zero-order hold Bbar = (exp(delta A) - 1) / A * B. backend: of BACKENDS; None: `choose_backend`.

    Returns y (B, D, L) in u's dtype, or (y, last state (B, D, N)). The state is float32 whatever the inputs
    and autocast. Gradients reach every argument; mamba_ssm's last state has none. Source: Gu and Dao, "Mamba:
    Linear-Time Sequence Modeling with Selective State Spaces", 2023.
    """
    if discretization not in ("mamba", "zoh"):
        raise ValueError(f"discretization={discretization!r} is unknown; choose 'mamba' or 'zoh'")
    B, C = (x.unsqueeze(1) if x.dim() == 3 else x for x in (B, C))  # (B, G, N, L) or (D, N)
    (batch, d, length), states = u.shape, reference.states_of(B)
    groups = max(x.shape[1] if x.dim() == 4 else 1 for x in (B, C))
    if d % groups:
        raise ValueError(f"{groups} groups of B and C do not divide {d} channels")
    _check(u.device, (batch, d, length), u=u, delta=delta, z=z)
    _check(u.device, (d,), D=D, delta_bias=delta_bias)
    _check(u.device, (d,) if tied_decay else (d, states), A=A)
    for name, x in ("B", B), ("C", C):
        _check(u.device, (d, states) if x.dim() == 2 else (batch, groups, states, length), **{name: x})
    tensors = (u, delta, A, B, C, D, z, delta_bias)
    teaching = discretization == "zoh" or 2 in (B.dim(), C.dim())
    name, layout = _choose(u.device.type, backend, compute_dtype(*tensors), teaching)

    options = dict(discretization=discretization, tied_decay=tied_decay)
    if name == "reference":
        y, last = reference.selective_scan_reference(*tensors, delta_softplus, True, **options)
    elif name == "mamba_ssm":
        A = state_rates(A.float(), states) if tied_decay else A
        y, last = _mamba_ssm_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, True)
    elif teaching:
        y, last = _module("chunked").by_parts(*tensors, delta_softplus, **options)
    else:
        u, delta, z = (None if x is None else x.transpose(1, 2).unsqueeze(1) for x in (u, delta, z))
        A, D, bias = (None if x is None else x.unsqueeze(0) for x in (A, D, delta_bias))
        B, C = (x.transpose(2, 3).unsqueeze(1) for x in (B, C))  # (B, 1, G, L, N)
        y, last = _scan(name, layout, (u, delta, A, B, C, D, z, bias), None, 0, delta_softplus, tied_decay)
        y, last = y.squeeze(1).transpose(1, 2), last.squeeze(1)
    return (y, last) if return_last_state else y


def directional_scan(
    x, delta, A, B, C, D=None,
    *, orders, delta_bias=None, delta_softplus=True, reverse=None, backend=None, tied_decay=False,
):  # fmt: skip
    """K selective scans of the same tokens at once, each in an order of its own -> (B, K, L, D), in x's dtype.

    At step t direction k visits token r = orders[k, t], with everything that token carries:

        h_t = exp(delta[k, r] A[k]) h_{t-1} + delta[k, r] B[k, r] x[r]         delta after bias and softplus
        y[k, r] = sum over n of C[k, r] h_t + D[k] x[r]                        in the tokens' own order

    The permutation is an index inside the scan: no copy is made (mamba_ssm, which has no orders, is given
    copies), and a reversed direction costs no flip. x (B, L, D) shared by the directions or (B, K, L, D);
    delta (B, K, L, D); A (K, D, N) or (D, N), with tied_decay (K, D) or (D,); B, C (B, K, L, N); D, delta_bias
    (K, D) or (D,). orders (K, L), or (B, K, L) for an order a sample: integer permutations of 0 ... L-1,
    checked on a CPU only. reverse: K bools, the directions that walk their order backwards.
    """
    batch, directions, length, channels = delta.shape
    channel, states = (directions, channels), B.shape[-1]
    x = x.unsqueeze(1) if x.dim() == 3 else x
    A = A.expand(directions, *A.shape[-1 if tied_decay else -2 :])
    D, delta_bias = (None if w is None else w.expand(channel) for w in (D, delta_bias))
    orders = orders.unsqueeze(0) if orders.dim() == 2 else orders
    reverse = tuple(reverse or (False,) * directions)
    _check(x.device, (batch, directions if x.shape[1] > 1 else 1, length, channels), x=x)
    _check(x.device, (batch, directions, length, channels), delta=delta)
    _check(x.device, (batch, directions, length, states), B=B, C=C)
    _check(x.device, channel if tied_decay else (*channel, states), A=A)
    _check(x.device, channel, D=D, delta_bias=delta_bias)
    _check(x.device, (batch if orders.shape[0] > 1 else 1, directions, length), orders=orders)
    if len(reverse) != directions:
        raise ValueError(f"reverse has {len(reverse)} entries; pass one for each of {directions} directions")
    dtype = compute_dtype(x, delta, A, B, C, D, delta_bias)
    name, layout = _choose(x.device.type, backend, dtype, False)
    if name in ("reference", "mamba_ssm"):
        scan = functools.partial(reference.selective_scan_reference, tied_decay=tied_decay)
        if name == "mamba_ssm":
            scan, A = _mamba_ssm_scan, state_rates(A.float(), states) if tied_decay else A
        check_permutation(orders)
        options = (orders, delta_bias, delta_softplus, reverse)
        return reference.directions_as_groups(scan, x, delta, A, B, C, D, *options)
    mask = sum(1 << k for k, backwards in enumerate(reverse) if backwards)
    tensors = (x, delta, A, B.unsqueeze(2), C.unsqueeze(2), D, None, delta_bias)
    return _scan(name, layout, tensors, orders, mask, delta_softplus, tied_decay)[0]


def _check(device, shape, **tensors):
    """Kernels take pointers: a tensor of another shape, device or kind would be read as if it were right."""
    for name, x in tensors.items():
        if x is None:
            continue
        real = x.is_floating_point() or name == "orders"
        if not real or tuple(x.shape) != shape or x.device != device:
            found = f"{x.dtype} of shape {tuple(x.shape)} on {x.device}"
            raise ValueError(f"{name} is {found}; pass real numbers of shape {shape} on {device}")


# ----------------------------------------------------------------------------------- the registered operation

_INPUTS = "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? bias"
_OPTIONS = "Tensor? order, int reverse, bool softplus, bool tied"
# `layout` says what `states` looks like and does nothing: torch.compile keeps graphs on disk, with the shapes
# of their time, and one must not be taken for that of a version that keeps its states differently.
_FORWARD = f"({_INPUTS}, {_OPTIONS}, bool keep_states, str layout='') -> (Tensor, Tensor, Tensor)"
_GRADIENTS = ", ".join(["Tensor"] * 8)
_BACKWARD = f"(Tensor grad_y, Tensor? grad_last, Tensor states, {_INPUTS}, {_OPTIONS}) -> ({_GRADIENTS})"

_ahead = futures.ThreadPoolExecutor(3, "compile ahead")  # two forward kernels and the backward one
_called_ahead, _pending = set(), set()


def _compile_ahead(name, function, *arguments):
    """While a call of Triton on a GPU is traced, make it on another thread with zeros in place of tensors.

    Triton compiles a kernel when it is first launched, for 5 to 15 seconds and mostly without the GIL;
    torch.compile is busy longer than that before it launches anything. Nothing where a size is not known yet.
    """
    if name != "triton" or not arguments[0].is_cuda or not torch.cuda.is_initialized():
        return
    call = [
        x if not isinstance(x, torch.Tensor) else (*x.shape, *x.stride(), x.dtype, x.device)
        for x in arguments
    ]
    numbers = [n for x in call for n in (x if isinstance(x, tuple) else (x,))]
    if (
        any(isinstance(n, torch.SymInt | torch.SymBool) for n in numbers)
        or (function, *call) in _called_ahead
    ):
        return

    def zeros(x):
        if not isinstance(x, tuple):
            return x
        *sizes, dtype, device = x
        shape, strides = sizes[: len(sizes) // 2], sizes[len(sizes) // 2 :]
        extent = 1 + sum((size - 1) * step for size, step in zip(shape, strides, strict=True))
        return torch.zeros(max(extent, 0), dtype=dtype, device=device).as_strided(shape, strides)

    _called_ahead.add((function, *call))
    _pending.add(_ahead.submit(lambda: getattr(_module(name), function)(*map(zeros, call))))


def _call(name, function, *arguments):
    if name == "triton" and _pending:  # an error there comes again from the call itself
        pending = set(_pending)
        futures.wait(pending)
        _pending.difference_update(pending)
    with torch.autocast(arguments[0].device.type, enabled=False):
        return getattr(_module(name), function)(*arguments)


def _empty_y(u, delta):
    return torch.empty_like(u) if u.shape[1] == delta.shape[1] else u.new_empty(delta.shape)


def _fit(wanted, x):
    """x in the dtype and memory order of `wanted`, which is empty."""
    return x if x.stride() == wanted.stride() and x.dtype == wanted.dtype else wanted.copy_(x)


def _register(name):
    """Tell PyTorch of one backend: what it computes, the shapes it returns, its derivative."""

    def run(u, delta, A, B, C, D, z, bias, order, *options):  # reverse, softplus, tied, keep_states, layout
        if order is not None:
            check_permutation(order)
        y, last, states = _call(name, "forward", u, delta, A, B, C, D, z, bias, order, *options[:4])
        return _fit(_empty_y(u, delta), y), last.contiguous(), states

    def run_backward(grad_y, grad_last, states, *given):
        pairs = zip(given, _call(name, "backward", grad_y, grad_last, states, *given), strict=False)
        return tuple(states.new_empty(0) if x is None else _fit(torch.empty_like(x), y) for x, y in pairs)

    op, backward_op = (
        torch.library.custom_op(f"nfhelpers::scan_{name}{suffix}", function, mutates_args=(), schema=schema)
        for suffix, function, schema in (("", run, _FORWARD), ("_backward", run_backward, _BACKWARD))
    )

    @op.register_fake
    def _(u, delta, A, B, C, D, z, bias, order, reverse, softplus, tied, keep_states, layout=""):
        for keep in (keep_states, False):  # what is trained is evaluated, too
            given = (u, delta, A, B, C, D, z, bias, order, reverse, softplus, tied)
            _compile_ahead(name, "forward", *given, keep)
        (batch, directions, _, channels), states = delta.shape, B.shape[-1]
        kept = _module(name).states_shape(*delta.shape, states) if keep_states else (0,)
        return _empty_y(u, delta), A.new_empty(batch, directions, channels, states), A.new_empty(kept)

    @backward_op.register_fake
    def _(grad_y, grad_last, states, *given):
        _compile_ahead(name, "backward", grad_y, grad_last, states, *given)
        return tuple(states.new_empty(0) if x is None else torch.empty_like(x) for x in given[:8])

    def setup(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        y, _, states = output
        ctx.mark_non_differentiable(states)
        ctx.save_for_backward(states, *inputs[:9])
        ctx.options, ctx.shape = inputs[9:12], y.shape

    def differentiate(ctx, grad_y, grad_last, _):
        states, *given = ctx.saved_tensors
        grad_y = given[0].new_zeros(()).expand(ctx.shape) if grad_y is None else grad_y
        grads = backward_op(grad_y, grad_last, states, *given, *ctx.options)
        grads = (None if x is None else grad for x, grad in zip(given, grads, strict=False))
        return *grads, *[None] * 6  # order, reverse, softplus, tied, keep_states, layout

    def refuse(ctx, *grads):
        raise RuntimeError(f"the {name} scan has no second derivative; use backend='reference'")

    op.register_autograd(differentiate, setup_context=setup)
    backward_op.register_autograd(refuse)
    return op


_OPERATIONS = {name: _register(name) for name in ("chunked", "native", "triton")}


def _scan(name, layout, tensors, *options):
    """(y, last) of the operation described above; parameters in the dtype of the state."""
    dtype = compute_dtype(*tensors)
    u, delta, A, B, C, D, z, bias = tensors
    A, D, bias = (None if x is None else x.to(dtype).contiguous() for x in (A, D, bias))
    tensors = (u, delta, A, B, C, D, z, bias)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    return _OPERATIONS[name](*tensors, *options, keep, layout)[:2]


# --------------------------------------------------------------------------------------------------- backends


def _module(name):
    return importlib.import_module(_MODULES[name])


def _mamba_ssm_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state=False):
    """Its kernel wants float32 parameters, and one dtype for all that varies along the sequence."""
    A, D, delta_bias = (None if x is None else x.float() for x in (A, D, delta_bias))
    delta, B, C, z = (None if x is None else x.to(u.dtype) for x in (delta, B, C, z))
    scan = _module("mamba_ssm").selective_scan_fn
    y, last = scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, True)
    return (y.to(u.dtype), last.detach()) if return_last_state else y.to(u.dtype)  # last has no gradient


@functools.cache
def _installed(name):
    """ "ok", or why the backend cannot be imported or compiled, in one line."""
    try:
        return " ".join(_module(name).status().split()) if name == "native" else _module(name) and "ok"
    except BROKEN_INSTALL as error:
        return f"import failed: {type(error).__name__}: {error}"


@functools.cache
def _say_once(message):
    warnings.warn(message, RuntimeWarning, stacklevel=5)  # at the line that calls the scan


def _status(name, kind=None):
    """ "ok", or why the backend cannot be used here, with tensors on a device of this kind."""
    where = {"native": "cpu", "triton": "cuda", "mamba_ssm": "cuda"}.get(name)
    status = "ok" if where is None else _installed(name)
    if status != "ok" or where is None or (name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"):
        return status
    if where == "cuda" and not (torch.cuda.is_initialized() or torch.cuda.is_available()):
        return "no CUDA device"
    return "ok" if kind in (None, where) else f"needs tensors on {where}, not on {kind}"


def backend_status():
    """{backend: "ok", or the reason why it cannot be used in this process}, in the order of BACKENDS."""
    return {name: _status(name) for name in BACKENDS}


def choose_backend(device, backend=None, dtype=torch.float32):
    """Name of the backend that runs on `device` with states of `dtype`, float32 or float64.

    `backend`, else the environment's NF_SCAN_BACKEND, else triton on CUDA and native on a CPU where they work
    (if not, a warning says why, once), else chunked. ValueError for one that is unknown or cannot be used so.
    """
    return _choose(torch.device(device).type, backend, dtype, False)[0]


def _choose(kind, backend, dtype, teaching):
    """(backend, layout of its states); `teaching`: zero-order hold, or fixed B or C."""
    source = "backend" if backend else "NF_SCAN_BACKEND"
    name = backend or (os.environ.get("NF_SCAN_BACKEND") if kind != "meta" else None)
    double = dtype == torch.float64
    if name and name not in BACKENDS:
        raise ValueError(f"{source}={name!r} is unknown; choose one of {BACKENDS}")
    if name and (teaching or double) and name not in ("reference", "chunked"):
        lacks = "zero-order hold and no fixed B, C" if teaching else "float64"
        raise ValueError(f"{source}={name!r} has no {lacks}; use backend='reference' or backend='chunked'")
    best = "chunked" if teaching or double else {"cuda": "triton", "cpu": "native"}.get(kind, "chunked")
    status = _status(name or best, kind)
    if name and status != "ok":
        raise ValueError(f"{source}={name!r} cannot be used: {status}")
    if status != "ok":
        _say_once(f"the {best} scan cannot be used: {status}; the slower chunked one runs instead")
        best = "chunked"
    name = name or best
    return name, str(_module(name).states_shape(2, 3, 1_000_003, 5, 7)) if name in _OPERATIONS else ""


_choose._dynamo_marked_constant = (
    True  # what torch.compiler.assume_constant_result sets, and it imports _dynamo
)


def self_check(backend, device="cpu"):
    """Largest relative errors of `backend` in float32 against the float64 reference: dict(forward, backward).

    On two small problems, over outputs and gradients of every argument. About 1e-6 where all is well.
    """
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    b, k, l, d, n = 2, 3, 37, 6, 4  # noqa: E741
    plain = dict(u=draw(b, d, l), delta=draw(b, d, l), A=-draw(d).exp(), B=draw(b, 2, n, l))
    plain |= dict(C=draw(b, 2, n, l), D=draw(d), z=draw(b, d, l), delta_bias=draw(d))
    several = dict(x=draw(b, l, d), delta=draw(b, k, l, d), A=-draw(k, d, n).exp(), B=draw(b, k, l, n))
    several |= dict(C=draw(b, k, l, n), D=draw(k, d), delta_bias=draw(k, d))
    orders = draw(k, l).argsort(-1)

    def run(directions, backend, dtype, device):
        given = several if directions else plain
        given = {name: x.to(device, dtype).requires_grad_() for name, x in given.items()}
        if directions:
            y = directional_scan(
                **given, orders=orders.to(device), reverse=(False, True, False), backend=backend
            )
        else:
            y = selective_scan(**given, delta_softplus=True, tied_decay=True, backend=backend)
        weight = torch.linspace(-1, 1, y.numel()).view(y.shape).to(y)
        return y, *torch.autograd.grad((y * weight).sum(), list(given.values()))

    errors = []
    for directions in (False, True):
        truth = run(directions, "reference", torch.float64, "cpu")
        found = run(directions, backend, torch.float32, device)
        errors.append([relative_error(x, y) for x, y in zip(found, truth, strict=True)])
    return dict(forward=max(x[0] for x in errors), backward=max(max(x[1:]) for x in errors))


def relative_error(found, wanted):
    """Largest absolute difference over the largest magnitude in `wanted`; infinite when anything is NaN."""
    found, wanted = found.detach().double().cpu(), wanted.detach().double().cpu()
    error = (found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-300)
    return float("inf") if not torch.isfinite(error) else error.item()
