"""The scans of S6: argument checks, choice of backend, registration with PyTorch, self-check.

`selective_scan` takes the arguments and shapes of mamba_ssm's `selective_scan_fn`, so that either can replace
the other, and runs on the backend that suits the device. `directional_scan` scans the same tokens in several
orders at once. `backend_status` says why a backend cannot be used.

Both are views of one operation, which the modules chunked, native and triton_scan implement as `forward` and
`backward` (tensors in, tensors out) and which is registered here as `torch.ops.nfhelpers.scan_<backend>`, so
that autograd and torch.compile know it:

    forward(u, delta, A, B, C, D, z, bias, order, reverse, softplus, zoh, tied, keep_states)
        -> y, last, states
    backward(grad_y, grad_last, states, u, delta, A, B, C, D, z, bias, order, reverse, softplus, zoh, tied)
        -> the gradients of u, delta, A, B, C, D, z, bias

b batch, k direction (K of them), l token (row), d channel, n state, g group of channels that share B and C

    u           (b, K, l, d), or (b, 1, l, d) when the directions share one input
    delta, z    (b, K, l, d)
    A           (K, d, N); tied (K, d), where state n decays at the rate (n + 1) A
    B, C        varying (b, K, G, l, N), or fixed (K, d, N)
    D, bias     (K, d)
    order       None, or (1 or b, K, l): row visited at step t
    reverse     bit k set: direction k walks its order from the last step to the first
    y           (b, K, l, d) in u's dtype, in the order of the rows
    last        (b, K, d, N) state after the last step
    states      what the backend keeps for its backward pass; (0,) when keep_states is False

A, D, bias and fixed B, C come contiguous in the state's dtype, the rest in any floating dtype and strides.
A gradient has its argument's shape and dtype and the layout `torch.empty_like` gives it; (0,) for None.
"""

import functools
import importlib
import os
import warnings
from concurrent import futures
from typing import NamedTuple

import torch

from .reference import (
    compute_dtype,
    directional_scan_reference,
    selective_scan_reference,
    state_rates,
    states_of,
)

BACKENDS = ("reference", "chunked", "native", "triton", "mamba_ssm")
DISCRETIZATIONS = ("mamba", "zoh")
_MODULES = {"chunked": ".chunked", "native": ".native", "triton": ".triton_scan"}
"""Where each backend of the registered operation lives; imported on first use."""
_CUDA_ONLY = ("triton", "mamba_ssm")
_FLOAT64 = ("reference", "chunked")
BROKEN_INSTALL = (ImportError, OSError, AttributeError, RuntimeError, TypeError)
"""What the import of a package raises that is missing or was built for another torch, driver or Python."""
_MOST_DIRECTIONS = 62  # bits of the mask `reverse`


# ------------------------------------------------------------------------------------------ public functions


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
    tied_decay=False,
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
        A: (D, N) real; negative for a stable recurrence. With tied_decay (D,).
        B, C: (D, N) fixed, (B, N, L) varying, or (B, G, N, L) varying in G groups of D / G adjacent channels.
        D: (D,) skip weight. z: (B, D, L) gate. delta_bias: (D,).
        return_last_state: also return h after the last position.
        backend: one of BACKENDS; None takes NF_SCAN_BACKEND, else the best for u's device (`choose_backend`).
        tied_decay: state n, counted from 0, decays at the rate (n + 1) A (the shape of S4D-real): one
            exponential a channel and position instead of N.

    Returns:
        y (B, D, L) in u's dtype; with return_last_state, (y, last state (B, D, N)). The state is float32
        whatever the dtypes and autocast (float64 in reference and chunked when an argument is). Gradients
        reach every argument; second derivatives are the reference backend's alone, and mamba_ssm's last
        state has no gradient.

    Raises:
        ValueError: wrong shape or dtype, empty batch or sequence, tensors on different devices, unknown
            discretization or backend, or a backend that cannot be used here.

    Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023; the
    zero-order hold is seed 002's; S4D-real is of Gu et al., "On the Parameterization and Initialization of
    Diagonal State Space Models", 2022.
    """
    if discretization not in DISCRETIZATIONS:
        raise ValueError(f"discretization={discretization!r} is unknown; choose one of {DISCRETIZATIONS}")
    given = dict(u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias)
    _check_flags(delta_softplus=delta_softplus, return_last_state=return_last_state, tied_decay=tied_decay)
    _check_tensors(given, optional=("D", "z", "delta_bias"))
    _check_selective(given, tied_decay)
    name = choose_backend(u.device, backend, compute_dtype(*given.values()))
    options = (delta_softplus, return_last_state)
    if name == "reference":
        return selective_scan_reference(
            *given.values(), *options, discretization=discretization, tied_decay=tied_decay
        )
    if name == "mamba_ssm":
        if discretization != "mamba":
            raise ValueError(
                f"backend 'mamba_ssm' has no discretization={discretization!r}; use backend='chunked'"
            )
        if tied_decay:
            A = state_rates(A, states_of(B))
        return _mamba_ssm_scan(u, delta, A, B, C, D, z, delta_bias, *options)

    def rows(x):  # (B, D, L) as (B, 1, L, D)
        return None if x is None else x.transpose(1, 2).unsqueeze(1)

    def weight(x):
        if x.dim() == 2:
            return x.unsqueeze(0)  # (1, D, N)
        return (x.unsqueeze(1) if x.dim() == 3 else x).transpose(2, 3).unsqueeze(1)  # (B, 1, G, L, N)

    A, D, delta_bias = (None if x is None else x.unsqueeze(0) for x in (A, D, delta_bias))
    y, last = _scan(
        name,
        (rows(u), rows(delta), A, weight(B), weight(C), D, rows(z), delta_bias),
        (None, 0, delta_softplus, discretization == "zoh", tied_decay),
    )
    y = y.squeeze(1).transpose(1, 2)
    return (y, last.squeeze(1)) if return_last_state else y


def directional_scan(
    x,
    delta,
    A,
    B,
    C,
    D=None,
    *,
    orders,
    delta_bias=None,
    delta_softplus=True,
    reverse=None,
    backend=None,
    tied_decay=False,
):
    """K selective scans of the same tokens at once, each in an order of its own.

    At step t direction k visits token r = orders[k, t], with everything that token carries:

        h_t = exp(delta[k, r] A[k]) h_{t-1} + delta[k, r] B[k, r] x[r]         delta after bias and softplus
        y[k, r] = sum over n of C[k, r] h_t + D[k] x[r]

    The projections that make delta, B and C are token-wise, so they are computed once, in the tokens' own
    order. The permutation is an index inside the scan: no permuted copy is made, and a reversed direction
    costs no flip.

    Args:
        x: (B, L, D) shared by the directions, or (B, K, L, D); any floating dtype and strides.
        delta: (B, K, L, D) step sizes before bias and softplus.
        A: (K, D, N), or (D, N) for all directions; with tied_decay (K, D) or (D,).
        B, C: (B, K, L, N).
        D, delta_bias: (K, D), or (D,) for all directions.
        orders: (K, L), or (B, K, L) for an order a sample: integer permutations of 0 ... L-1
            (`orders.point_order`, `orders.grid_order`).
        reverse: K bools: which directions walk their order backwards. None: no one does.
        backend, tied_decay: as in `selective_scan`. mamba_ssm has no orders: it is given permuted copies,
            with the directions as groups of channels.

    Returns:
        y (B, K, L, D) in x's dtype, every direction in the tokens' own order. Gradients reach every argument
        but the orders.

    Raises:
        ValueError: wrong shape or dtype, an empty tensor, tensors on different devices, an order on the CPU
            that is not a permutation (it is not read back from a GPU nor while torch.compile traces), a
            backend that is unknown or cannot be used here.

    Source: seed 001, four directions over a set of points; Liu et al., "VMamba: Visual State Space Model",
    2024, whose cross-scan makes the copies.
    """
    given = dict(x=x, delta=delta, A=A, B=B, C=C, D=D, delta_bias=delta_bias)
    _check_flags(delta_softplus=delta_softplus, tied_decay=tied_decay)
    _check_tensors(given, optional=("D", "delta_bias"))
    _check_directional(given, tied_decay)
    directions, channels = delta.shape[1], delta.shape[3]
    _check_orders(orders, delta)
    _check_reverse(reverse, directions)
    name = choose_backend(x.device, backend, compute_dtype(*given.values()))
    options = dict(delta_softplus=delta_softplus, tied_decay=tied_decay)
    if name == "reference":
        return directional_scan_reference(
            *(x, delta, A, B, C, D), orders=orders, delta_bias=delta_bias, reverse=reverse, **options
        )
    x = x.unsqueeze(1) if x.dim() == 3 else x
    A = A.expand(directions, *A.shape[-1 if tied_decay else -2 :])
    D, delta_bias = (None if w is None else w.expand(directions, channels) for w in (D, delta_bias))
    if orders.dim() == 2:
        orders = orders.unsqueeze(0)  # (1, K, L)
    if name == "mamba_ssm":
        A = state_rates(A, B.shape[-1]) if tied_decay else A
        return _mamba_ssm_directions(x, delta, A, B, C, D, orders, delta_bias, delta_softplus, reverse)
    mask = sum(1 << k for k, flag in enumerate(reverse or ()) if flag)
    y, _ = _scan(
        name,
        (x, delta, A, B.unsqueeze(2), C.unsqueeze(2), D, None, delta_bias),
        (orders, mask, delta_softplus, False, tied_decay),
    )
    return y


# ----------------------------------------------------------------------------------------------------- checks


def _check_flags(**flags):
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name}={value!r} is a {type(value).__name__}; pass True or False")


def _check_tensors(given, optional):
    first, device = next((name, getattr(x, "device", None)) for name, x in given.items())
    for name, x in given.items():
        if x is None and name in optional:
            continue
        if not isinstance(x, torch.Tensor):
            raise ValueError(f"{name} is a {type(x).__name__}; pass a floating-point tensor")
        if x.is_complex():
            raise ValueError(f"{name} is {x.dtype}; only real A, B, C are supported, pass float32")
        if not x.is_floating_point():
            raise ValueError(f"{name} is {x.dtype}; pass a floating dtype such as float32")
        if x.device != device:
            raise ValueError(f"{name} is on {x.device} and {first} on {device}; move them to one device")


def _check_shapes(given, legal):
    """`legal` maps a name to the shapes it may have."""
    for name, shapes in legal.items():
        if given[name] is not None and tuple(given[name].shape) not in shapes:
            wanted = " or ".join(map(str, shapes))
            raise ValueError(f"{name} has shape {tuple(given[name].shape)}; it must be {wanted}")


def _check_selective(given, tied_decay):
    u, A, B = (given[name] for name in ("u", "A", "B"))
    if u.dim() != 3:
        raise ValueError(f"u has shape {tuple(u.shape)}; pass (B, D, L) such as (8, 256, 1228)")
    batch, channels, length = u.shape
    if 0 in u.shape:
        raise ValueError(f"u has shape {tuple(u.shape)}, which is empty; B, D and L must be at least 1")
    if tied_decay:
        if tuple(A.shape) != (channels,):
            raise ValueError(f"A has shape {tuple(A.shape)}; with tied_decay it must be {(channels,)}")
        states = states_of(B) if B.dim() > 1 else 0
    else:
        if A.dim() != 2 or A.shape[0] != channels or A.shape[1] == 0:
            raise ValueError(
                f"A has shape {tuple(A.shape)}; pass (D, N) with D={channels}, such as ({channels}, 16)"
            )
        states = A.shape[1]
    row, channel = [(batch, channels, length)], [(channels,)]
    _check_shapes(given, dict(delta=row, z=row, D=channel, delta_bias=channel))
    groups = set()
    for name in ("B", "C"):
        shape = tuple(given[name].shape)
        group = shape[1] if len(shape) == 4 else None
        legal = [(channels, states), (batch, states, length)]
        if group:
            legal.append((batch, group, states, length))
        if shape not in legal or states == 0:
            raise ValueError(
                f"{name} has shape {shape}; it must be (D, N), (B, N, L) or (B, G, N, L) "
                f"with B={batch}, D={channels}, N={states or 16}, L={length}, such as "
                f"{(batch, states or 16, length)}"
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


def _check_directional(given, tied_decay):
    delta, B = given["delta"], given["B"]
    if delta.dim() != 4:
        raise ValueError(f"delta has shape {tuple(delta.shape)}; pass (B, K, L, D) such as (8, 4, 1228, 256)")
    batch, directions, length, channels = delta.shape
    if 0 in delta.shape:
        raise ValueError(
            f"delta has shape {tuple(delta.shape)}, which is empty; B, K, L, D must be at least 1"
        )
    if directions > _MOST_DIRECTIONS:
        raise ValueError(f"delta has K={directions} directions; pass at most {_MOST_DIRECTIONS} in one call")
    if B.dim() != 4 or B.shape[-1] == 0:
        raise ValueError(
            f"B has shape {tuple(B.shape)}; pass (B, K, L, N) such as {(batch, directions, length, 16)}"
        )
    states = B.shape[-1]
    varying = [(batch, directions, length, states)]
    channel = [(directions, channels), (channels,)]
    rates = channel if tied_decay else [(directions, channels, states), (channels, states)]
    rows = [(batch, length, channels), (batch, directions, length, channels)]
    _check_shapes(given, dict(x=rows, A=rates, B=varying, C=varying, D=channel, delta_bias=channel))


def _check_orders(orders, delta):
    batch, directions, length, _ = delta.shape
    if not isinstance(orders, torch.Tensor):
        raise ValueError(f"orders is a {type(orders).__name__}; pass an int64 tensor {(directions, length)}")
    if orders.is_floating_point() or orders.is_complex() or orders.dtype == torch.bool:
        raise ValueError(f"orders is {orders.dtype}; pass an integer dtype such as int64")
    _check_shapes(dict(orders=orders), dict(orders=[(directions, length), (batch, directions, length)]))
    if orders.device != delta.device:
        raise ValueError(f"orders is on {orders.device} and delta on {delta.device}; move them to one device")
    if orders.device.type != "cpu" or torch.compiler.is_compiling():
        return  # reading values back from a GPU would stall it, and a trace has none
    orders = orders.long()
    low, high = (bound.item() for bound in orders.aminmax())
    if low < 0 or high >= length:
        raise ValueError(
            f"orders holds {low if low < 0 else high}; it must be permutations of 0 ... {length - 1}"
        )
    visited = torch.zeros(orders.shape, dtype=torch.bool).scatter_(-1, orders, True)
    if not visited.all():
        missing = visited.logical_not().nonzero()[0].tolist()
        raise ValueError(
            f"orders{missing[:-1]} never visits token {missing[-1]}; it must be a permutation of "
            f"0 ... {length - 1}"
        )


def _check_reverse(reverse, directions):
    if reverse is None:
        return
    bools = isinstance(reverse, (list, tuple)) and all(isinstance(flag, bool) for flag in reverse)
    if not bools or len(reverse) != directions:
        raise ValueError(f"reverse is {reverse}; pass K={directions} bools, such as {(True,) * directions}")


# ----------------------------------------------------------------------------------- the registered operation


_INPUTS = "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? bias"
_OPTIONS = "Tensor? order, int reverse, bool softplus, bool zoh, bool tied"
_FORWARD = f"({_INPUTS}, {_OPTIONS}, bool keep_states, str layout='') -> (Tensor, Tensor, Tensor)"
_BACKWARD = (
    f"(Tensor grad_y, Tensor? grad_last, Tensor states, {_INPUTS}, {_OPTIONS}) -> ("
    + ", ".join(["Tensor"] * 8)
    + ")"
)


def _module(name):
    return importlib.import_module(_MODULES[name], __name__)


@torch.compiler.assume_constant_result
def _layout(name):
    """What `states` looks like, as a string that is an argument of the operation and does nothing in it.

    torch.compile keeps graphs on disk, with the shapes they were compiled for; without this a graph would be
    taken for that of another version of the backend, which keeps its states differently.
    """
    return str(tuple(_module(name).states_shape(2, 3, 1_000_003, 5, 7)))


class _Like(NamedTuple):
    """A tensor but for its values."""

    shape: tuple
    stride: tuple
    dtype: torch.dtype
    device: torch.device


_ahead = futures.ThreadPoolExecutor(3, "compile ahead")  # two forward kernels and the backward one
_called_ahead = set()  # (function, arguments), tensors as `_Like`
_pending = set()  # futures nobody waited for


def _compile_ahead(function, *arguments):
    """While a call of `function` is traced, call it on another thread with zeros in place of its tensors.

    Triton compiles a kernel when it is first launched, for 5 to 15 seconds and mostly without the GIL;
    torch.compile is busy longer than that before it launches anything. Nothing where a call like this was
    made before, or a size is not known yet. Whatever traces on a GPU in use starts this, `torch.export` too.
    """
    tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
    sizes = [size for x in tensors for size in (*x.shape, *x.stride())]
    if any(isinstance(x, torch.SymInt | torch.SymBool) for x in (*sizes, *arguments)):
        return
    like = tuple(
        _Like(tuple(x.shape), x.stride(), x.dtype, x.device) if isinstance(x, torch.Tensor) else x
        for x in arguments
    )
    if (function, like) in _called_ahead:
        return

    def zeros(x):
        if not isinstance(x, _Like):
            return x
        extent = 1 + sum((size - 1) * step for size, step in zip(x.shape, x.stride, strict=True))
        return torch.zeros(max(extent, 0), dtype=x.dtype, device=x.device).as_strided(x.shape, x.stride)

    _called_ahead.add((function, like))
    _pending.add(_ahead.submit(lambda: function(*map(zeros, like))))


def _await_compiled():
    """Wait for what `_compile_ahead` began; an error there comes again from the call itself.

    Without this the call would compile the same kernel once more, or others launch while it is captured.
    """
    if _pending:
        pending = set(_pending)
        futures.wait(pending)
        _pending.difference_update(pending)


def _register(name):
    """Tell PyTorch of one backend: what it computes, the shapes it returns, its derivative."""

    def run(u, delta, A, B, C, D, z, bias, order, reverse, softplus, zoh, tied, keep_states, layout=""):
        arguments = (u, delta, A, B, C, D, z, bias, order, reverse, softplus, zoh, tied, keep_states)
        if name == "triton":
            _await_compiled()
        with torch.autocast(u.device.type, enabled=False):
            return _module(name).forward(*arguments)

    def run_backward(grad_y, *arguments):
        if name == "triton":
            _await_compiled()
        with torch.autocast(grad_y.device.type, enabled=False):
            return _module(name).backward(grad_y, *arguments)

    op = torch.library.custom_op(f"nfhelpers::scan_{name}", run, mutates_args=(), schema=_FORWARD)
    backward_op = torch.library.custom_op(
        f"nfhelpers::scan_{name}_backward", run_backward, mutates_args=(), schema=_BACKWARD
    )

    @op.register_fake
    def _(u, delta, A, B, C, D, z, bias, order, reverse, softplus, zoh, tied, keep_states, layout=""):
        batch, directions, length, channels = delta.shape
        states = B.shape[-1]
        y = torch.empty_like(u) if u.shape[1] == directions else u.new_empty(delta.shape)
        kept = _module(name).states_shape(batch, directions, length, channels, states)
        if name == "triton" and u.is_cuda and torch.cuda.is_initialized():
            given = (u, delta, A, B, C, D, z, bias, order, reverse, softplus, zoh, tied)
            for keep in dict.fromkeys((keep_states, False)):  # what is trained is evaluated, too
                _compile_ahead(_module(name).forward, *given, keep)
        return (
            y,
            A.new_empty(batch, directions, channels, states),
            A.new_empty(kept if keep_states else (0,)),
        )

    @backward_op.register_fake
    def _(grad_y, grad_last, states, u, delta, A, B, C, D, z, bias, *options):
        arguments = (u, delta, A, B, C, D, z, bias)
        if name == "triton" and u.is_cuda and torch.cuda.is_initialized():
            _compile_ahead(_module(name).backward, grad_y, grad_last, states, *arguments, *options)
        return tuple(A.new_empty(0) if x is None else torch.empty_like(x) for x in arguments)

    def setup(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        y, _, states = output
        ctx.mark_non_differentiable(states)
        arguments, ctx.options = inputs[:9], inputs[9:13]
        ctx.save_for_backward(states, *arguments)
        ctx.y_shape = y.shape

    def differentiate(ctx, grad_y, grad_last, _):
        states, *arguments = ctx.saved_tensors
        u = arguments[0]
        if grad_y is None:
            grad_y = u.new_zeros(()).expand(ctx.y_shape)
        grads = backward_op(grad_y, grad_last, states, *arguments, *ctx.options)
        grads = (None if x is None else grad for x, grad in zip(arguments[:8], grads, strict=True))
        return *grads, *[None] * 7  # order, reverse, softplus, zoh, tied, keep_states, layout

    def refuse(ctx, *grads):
        raise RuntimeError(f"the {name} scan has no second derivative; use backend='reference'")

    op.register_autograd(differentiate, setup_context=setup)
    backward_op.register_autograd(refuse)
    return op


_OPERATIONS = {name: _register(name) for name in _MODULES}


def _scan(name, tensors, options):
    """(y, last) of the operation described above, without its dtypes: parameters are cast here."""
    u, delta, A, B, C, D, z, bias = tensors
    dtype = compute_dtype(*tensors)
    A, D, bias = (None if x is None else x.to(dtype).contiguous() for x in (A, D, bias))
    B, C = (x.to(dtype).contiguous() if x.dim() == 3 else x for x in (B, C))
    tensors = (u, delta, A, B, C, D, z, bias)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    y, last, _ = _OPERATIONS[name](*tensors, *options, keep, _layout(name))
    return y, last


# -------------------------------------------------------------------------------------------------- mamba_ssm


def _mamba_ssm_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state):
    """mamba_ssm's kernel wants float32 parameters, and one dtype for all that varies along the sequence."""
    scan, _ = _mamba_ssm()
    B, C = (x.float() if x.dim() == 2 else x.to(u.dtype) for x in (B, C))
    D, delta_bias = (None if x is None else x.float() for x in (D, delta_bias))
    z = None if z is None else z.to(u.dtype)
    result = scan(u, delta.to(u.dtype), A.float(), B, C, D, z, delta_bias, delta_softplus, return_last_state)
    if not return_last_state:
        return result.to(u.dtype)
    y, last = result
    return y.to(u.dtype), last.detach()  # its backward leaves the last state's gradient out


def _mamba_ssm_directions(x, delta, A, B, C, D, orders, delta_bias, delta_softplus, reverse):
    """Directions as groups of channels of one call, on permuted copies, as peers do it."""
    batch, directions, length, channels = delta.shape
    walks = orders.long().unbind(1)  # K of (1 or B, L)
    if reverse is not None:
        walks = [walk.flip(-1) if flag else walk for walk, flag in zip(walks, reverse, strict=True)]
    walks = torch.stack(tuple(walks), 1).expand(batch, -1, -1).unsqueeze(-1)  # (B, K, L, 1)

    def visit(rows):  # (B, K, L, F) -> (B, K, F, L), step by step
        rows = rows.expand(-1, directions, -1, -1)
        return rows.gather(2, walks.expand(-1, -1, -1, rows.shape[-1])).transpose(2, 3)

    y = _mamba_ssm_scan(
        visit(x).flatten(1, 2),  # (B, K D, L)
        visit(delta).flatten(1, 2),
        A.flatten(0, 1),  # (K D, N)
        visit(B),  # (B, K, N, L)
        visit(C),
        None if D is None else D.flatten(),
        None,
        None if delta_bias is None else delta_bias.flatten(),
        delta_softplus,
        False,
    )
    y = y.unflatten(1, (directions, channels)).transpose(2, 3)  # (B, K, L, D), row t the result of step t
    return torch.zeros_like(y).scatter(2, walks.expand_as(y), y)


# --------------------------------------------------------------------------------------------------- backends


@functools.cache
def _mamba_ssm():
    """(selective_scan_fn, None) or (None, why it cannot be imported)."""
    try:
        module = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
        return module.selective_scan_fn, None
    except BROKEN_INSTALL as error:
        return None, f"import failed: {type(error).__name__}: {error}"


@functools.cache
def _native_status():
    try:
        return " ".join(_module("native").status().split())  # a compiler's message has many lines
    except BROKEN_INSTALL as error:
        return f"import failed: {type(error).__name__}: {error}"


@functools.cache
def _say_once(message):
    warnings.warn(message, RuntimeWarning, stacklevel=6)  # at the line that calls the scan


def _interpreted():
    return os.environ.get("TRITON_INTERPRET") == "1"


def _triton_status():
    try:
        importlib.import_module("triton")
        _module("triton")
    except BROKEN_INSTALL as error:
        return f"import failed: {type(error).__name__}: {error}"
    if not _has_cuda() and not _interpreted():
        return "no CUDA device (TRITON_INTERPRET=1 runs it on the CPU, slowly, for tests)"
    return "ok"


def _has_cuda():
    return torch.cuda.is_initialized() or torch.cuda.is_available()  # the first takes no time


def _mamba_ssm_status():
    _, reason = _mamba_ssm()
    if reason is None and not _has_cuda():
        reason = "no CUDA device"
    return reason or "ok"


_STATUS = {
    "reference": lambda: "ok",
    "chunked": lambda: "ok",
    "native": lambda: _native_status(),
    "triton": lambda: _triton_status(),
    "mamba_ssm": lambda: _mamba_ssm_status(),
}


def backend_status():
    """{backend: "ok", or the reason why it cannot be used in this process}, in the order of BACKENDS."""
    return {name: status() for name, status in _STATUS.items()}


def choose_backend(device, backend=None, dtype=torch.float32):
    """Name of the backend that runs on `device` with states of `dtype`, float32 or float64.

    That is `backend`, else the environment variable NF_SCAN_BACKEND, else triton on a CUDA device and native
    on the CPU where they work, else chunked; chunked for float64. Where the first choice does not work, a
    warning says so once. Tensors without data, on "meta", take chunked.

    Raises:
        ValueError: an unknown backend, or one that is asked for and cannot be used on this device or in this
            dtype.
    """
    return _choose(str(device), backend, dtype == torch.float64)


@torch.compiler.assume_constant_result
def _choose(device, backend, double):
    """`choose_backend` of constants: torch.compile calls it while it traces, and keeps the answer."""
    kind = device.partition(":")[0]
    if kind == "meta" and backend is None:
        return "chunked"  # nothing is computed, only shapes
    source = "backend" if backend is not None else "NF_SCAN_BACKEND"
    backend = backend if backend is not None else os.environ.get("NF_SCAN_BACKEND") or None
    if backend is None:
        return _best(kind, double)
    if backend not in BACKENDS:
        raise ValueError(f"{source}={backend!r} is unknown; choose one of {BACKENDS}")
    status = _status(backend, kind)
    if status != "ok":
        usable = [name for name, state in backend_status().items() if state == "ok"]
        raise ValueError(f"{source}={backend!r} cannot be used: {status}; usable here: {usable}")
    if double and backend not in _FLOAT64:
        raise ValueError(f"{source}={backend!r} computes in float32 only; use backend='chunked' for float64")
    return backend


def _best(kind, double):
    first = {"cuda": "triton", "cpu": "native"}.get(kind)
    if double or first is None:
        return "chunked"
    status = _STATUS[first]()
    if status == "ok":
        return first
    _say_once(f"the {first} scan cannot be used: {status}; the slower chunked one runs instead")
    return "chunked"


def _status(backend, kind):
    status = _STATUS[backend]()
    if status != "ok":
        return status
    if backend == "native" and kind != "cpu":
        return f"needs tensors on the CPU, not on {kind}"
    if backend in _CUDA_ONLY and kind != "cuda" and not (backend == "triton" and _interpreted()):
        return f"needs tensors on a CUDA device, not on {kind}"
    return "ok"


# ------------------------------------------------------------------------------------------------- self-check


def self_check(backend, device="cpu"):
    """Largest relative error of `backend` in float32 against the float64 reference, on small problems.

    Returns dict(forward=..., backward=...): over outputs and last states, and over the gradients of every
    argument; relative to the largest entry of the tensor compared. About 1e-6 where all is well.

    Raises:
        ValueError: the backend is unknown or cannot be used on `device`.
    """
    backend = choose_backend(device, backend)
    worst = dict(forward=0.0, backward=0.0)
    for scan, arguments, options in _small_problems(own=backend != "mamba_ssm"):
        truth = _evaluate(scan, arguments, options, "reference", torch.float64, "cpu")
        found = _evaluate(scan, arguments, options, backend, torch.float32, device)
        for part, wanted, got in zip(("forward", "backward"), truth, found, strict=True):
            errors = [relative_error(y, x) for x, y in zip(wanted, got, strict=True)]
            worst[part] = max(worst[part], *errors)
    return worst


def _small_problems(own, batch=2, channels=6, length=37, states=4):
    """(scan, arguments, options), with every argument there is; `own`: also what mamba_ssm does not do."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    for groups, tied, discretization in (1, False, "mamba"), (2, True, "mamba"), (2, False, "zoh"):
        if discretization == "mamba" or own:
            arguments = dict(
                u=draw(batch, channels, length),
                delta=draw(batch, channels, length),
                A=-draw(*(channels, states)[: 1 if tied else 2]).exp(),
                B=draw(batch, groups, states, length),
                C=draw(batch, groups, states, length),
                D=draw(channels),
                z=draw(batch, channels, length),
                delta_bias=draw(channels),
            )
            options = dict(discretization=discretization, tied_decay=tied)
            yield selective_scan, arguments, options | dict(delta_softplus=True, return_last_state=own)

    directions = 3
    arguments = dict(
        x=draw(batch, length, channels),
        delta=draw(batch, directions, length, channels),
        A=-draw(directions, channels, states).exp(),
        B=draw(batch, directions, length, states),
        C=draw(batch, directions, length, states),
        D=draw(directions, channels),
        delta_bias=draw(directions, channels),
    )
    orders = torch.rand(directions, length, generator=generator).argsort(-1)
    yield directional_scan, arguments, dict(orders=orders, reverse=(False, True, False))


def _evaluate(scan, arguments, options, backend, dtype, device):
    """Outputs, and gradients of a weighted sum of them with respect to every argument."""
    given = {name: x.to(device, dtype).requires_grad_() for name, x in arguments.items()}
    options = {name: x.to(device) if name == "orders" else x for name, x in options.items()}
    outputs = scan(**given, **options, backend=backend)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(y.shape, generator=generator).to(y) for y in outputs]
    loss = sum((y * weight).sum() for y, weight in zip(outputs, weights, strict=True))
    return outputs, torch.autograd.grad(loss, list(given.values()))


def relative_error(found, wanted):
    """Largest absolute difference over the largest magnitude in `wanted`; infinite when anything is NaN."""
    found, wanted = found.detach().double().cpu(), wanted.detach().double().cpu()
    error = (found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-300)
    return float("inf") if not torch.isfinite(error) else error.item()
