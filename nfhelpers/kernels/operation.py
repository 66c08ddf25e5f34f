"""The operation behind both scans as PyTorch knows it: `torch.ops.nfhelpers.scan_<backend>`.

Reverse mode runs the backend's own backward pass, under torch.func too. Forward mode runs the reference,
whose steps are PyTorch's. The derivative of a backend's gradient is refused.
"""

import importlib
import sys

import torch
from torch.autograd import forward_ad

from .orders import check_permutation

# torch.library.custom_op would import torch._dynamo, for seconds, when an operation is first called.
_library = torch.library.Library("nfhelpers", "FRAGMENT")
_MODULES = {name: f"{__package__}.{name}" for name in ("reference", "chunked", "native")}
_MODULES |= {"triton": f"{__package__}.triton_scan", "mamba_ssm": "mamba_ssm.ops.selective_scan_interface"}


def module(name):
    """The module of a backend, imported at its first use."""
    return importlib.import_module(_MODULES[name])


_ARGS = "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? bias, Tensor? h0"
_OPTIONS = "Tensor? order, Tensor? carried, int reverse, bool softplus, bool tied"
# `layout` tells torch.compile, which keeps graphs on disk, how this version lays `states` out.
_FORWARD = f"({_ARGS}, {_OPTIONS}, bool keep_states, str layout='') -> (Tensor, Tensor, Tensor)"
_BACKWARD = f"(Tensor dy, Tensor? dlast, Tensor states, {_ARGS}, {_OPTIONS}) -> ({'Tensor, ' * 8}Tensor)"


def _untraced(function):
    """`function`, into which torch.compile, where it is in use, does not look."""
    chosen = {None: function}

    def call(*arguments):
        disable = getattr(sys.modules.get("torch._dynamo"), "disable", None)
        chosen[disable] = chosen.get(disable) or disable(function)
        return chosen[disable](*arguments)

    return call


def _fit(x, like):
    """x in the dtype and memory order of `torch.empty_like(like)`."""
    wanted = like if x.stride() == like.stride() else torch.empty_like(like)
    return x if (x.stride(), x.dtype) == (wanted.stride(), like.dtype) else torch.empty_like(like).copy_(x)


def is_transformed():
    """Whether dual numbers or torch.func are at work, to which an operation is not differentiable."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def _refuse(*_):
    raise RuntimeError("the scan's gradient has no derivative; pass backend='reference' to the scan")


def _function(operation, setup, backward):
    """The operation for torch.func, which does not take the derivative that is registered for it."""
    methods = dict(forward=operation, setup_context=setup, backward=backward)
    members = dict(generate_vmap_rule=True) | {name: staticmethod(x) for name, x in methods.items()}
    return type("Scan", (torch.autograd.Function,), members).apply


def _register(name):
    """Tell PyTorch of one backend: what it computes, the shapes it returns, its derivative."""

    def run(*arguments):  # of the schema
        check_permutation(arguments[9])
        with torch.autocast(arguments[0].device.type, enabled=False):
            y, last, states = module(name).forward(*arguments[:15])
        return _fit(y, arguments[0]) if y.shape == arguments[0].shape else y, last.contiguous(), states

    def run_backward(grad_y, grad_last, states, *given):
        with torch.autocast(states.device.type, enabled=False):
            pairs = zip(given, module(name).backward(grad_y, grad_last, states, *given), strict=False)
        return tuple(states.new_empty(0) if x is None else _fit(y, x) for x, y in pairs)

    parts = {f"scan_{name}": (_FORWARD, run), f"scan_{name}_backward": (_BACKWARD, run_backward)}
    for own, (schema, function) in parts.items():
        _library.define(own + schema, tags=torch.Tag.pt2_compliant_tag)
        _library.impl(own, _untraced(function), "CompositeExplicitAutograd")
    op, backward_op = (getattr(torch.ops.nfhelpers, own).default for own in parts)

    @torch.library.register_fake(op)
    def _(*arguments):
        (u, delta, A, B, *_), keep_states = arguments, arguments[14]
        kept = module(name).states_shape(*delta.shape, B.shape[4]) if keep_states else (0,)
        y = torch.empty_like(u) if u.shape == delta.shape else u.new_empty(delta.shape)
        return y, A.new_empty(*delta.shape[:2], delta.shape[3], B.shape[4]), A.new_empty(kept)

    @torch.library.register_fake(backward_op)
    def _(grad_y, grad_last, states, *given):
        return tuple(states.new_empty(0) if x is None else torch.empty_like(x) for x in given[:9])

    def setup(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        y, _, states = output
        ctx.mark_non_differentiable(states)
        ctx.save_for_backward(states, *inputs[:11])
        ctx.options, ctx.shape = inputs[11:14], y.shape

    def differentiate(ctx, grad_y, grad_last, _):
        if forward_ad._current_level >= 0:
            _refuse()
        states, *given = ctx.saved_tensors
        grad_y = given[0].new_zeros(()).expand(ctx.shape) if grad_y is None else grad_y
        grads = (twice if is_transformed() else backward_op)(grad_y, grad_last, states, *given, *ctx.options)
        grads = (None if x is None else grad for x, grad in zip(given, grads, strict=False))
        return *grads, *[None] * 7  # order ... layout

    torch.library.register_autograd(op, differentiate, setup_context=setup)
    torch.library.register_autograd(backward_op, _refuse)
    twice = _function(backward_op, lambda ctx, inputs, output: None, _refuse)
    return op, _function(op, setup, differentiate)


OPERATIONS = {name: _register(name) for name in ("chunked", "native", "triton")}
