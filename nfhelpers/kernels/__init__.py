"""The scans of S6: argument checks, choice of backend, self-check.

`selective_scan` takes the arguments of mamba_ssm's `selective_scan_fn`; `directional_scan` scans the same
tokens in several orders at once. Both are views of one operation, which reference.py describes.
"""

import functools
import os
import warnings

import torch
from torch.autograd import forward_ad

from . import reference
from .operation import OPERATIONS, is_transformed, module
from .reference import relative_error

BACKENDS = ("reference", "chunked", "native", "triton", "mamba_ssm")


def selective_scan(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False,
    *, initial_state=None, seq_idx=None, backend=None, discretization="mamba", tied_decay=False,
):  # fmt: skip
    """Scan of a diagonal state space model whose step size, input and output weights vary along the sequence.

        delta = softplus(delta + delta_bias)                             as far as asked for
        h_l = exp(delta_l A) h_{l-1} + Bbar_l u_l                        h_{-1}: initial_state, else 0
        y_l = (sum over n of C_l h_l + D u_l) * silu(z_l)

    u, delta, z (B, D, L), any floating dtype and strides: a transposed (B, L, D) tensor is the fastest.
    A (D, N); with tied_decay (D,), where state n decays at the rate (n + 1) A: one exponential, not N.
    B, C (B, N, L), or (B, G, N, L) in G groups of adjacent channels. D, delta_bias (D,). Bbar = delta B.
    initial_state (B, D, N): the last state of what came before. seq_idx (B, L): sequences packed into one,
    where it changes the state starts at zero; not in `native`. float64: `reference` and `chunked`. Fixed B, C
    (D, N) and the zero-order hold, discretization="zoh", Bbar = (exp(delta A) - 1) / A * B: `reference`.
    backend: of BACKENDS; None: `choose_backend`; forward mode always runs `reference`. Returns y (B, D, L) in
    u's dtype, or (y, last state (B, D, N)), float32 as all states. Source: Gu and Dao, "Mamba", 2023.
    """
    if discretization not in ("mamba", "zoh"):
        raise ValueError(f"discretization={discretization!r} is unknown; choose 'mamba' or 'zoh'")
    # Factor (B, L) of the decay: 0 where another sequence begins.
    carried = None if seq_idx is None else torch.diff(seq_idx, prepend=seq_idx[:, :1]).eq(0).float()
    if discretization == "zoh" or 2 in (B.dim(), C.dim()):
        _choose(u.device.type, backend, [_TEACHING])
        options = dict(discretization=discretization, tied_decay=tied_decay)
        options |= dict(initial_state=initial_state, carried=carried, return_last_state=return_last_state)
        given = (u, delta, A, B, C, D, z, delta_bias, delta_softplus)
        return reference.selective_scan_reference(*given, **options)
    u, delta, z = (None if x is None else x.transpose(1, 2).unsqueeze(1) for x in (u, delta, z))
    A, D, bias = (None if x is None else x.unsqueeze(0) for x in (A, D, delta_bias))
    initial = None if initial_state is None else initial_state.unsqueeze(1)
    B, C = ((x if x.dim() == 4 else x.unsqueeze(1)).transpose(2, 3).unsqueeze(1) for x in (B, C))
    tensors = (u, delta, A, B, C, D, z, bias, initial)
    y, last = _scan(backend, tensors, None, carried, (False,), delta_softplus, tied_decay)
    y = y.squeeze(1).transpose(1, 2)
    return (y, last.squeeze(1)) if return_last_state else y


def directional_scan(
    x, delta, A, B, C, D=None,
    *, orders, delta_bias=None, delta_softplus=True, reverse=None, initial_state=None, backend=None,
    tied_decay=False,
):  # fmt: skip
    """K selective scans of the same tokens at once, each in an order of its own -> (B, K, L, D), x's dtype.

    At step t direction k visits token r = orders[k, t], with everything that token carries:

        h_t = exp(delta[k, r] A[k]) h_{t-1} + delta[k, r] B[k, r] x[r]         delta after bias and softplus
        y[k, r] = sum over n of C[k, r] h_t + D[k] x[r]                        in the tokens' own order

    The permutation is an index inside the scan: no copy, no flip. x (B, L, D) shared by the directions or
    (B, K, L, D); delta (B, K, L, D); A (K, D, N) or (D, N), with tied_decay (K, D) or (D,); B and C
    (B, K, L, N); D, delta_bias (K, D) or (D,). orders (K, L) or (B, K, L): integer permutations of 0 ... L-1,
    checked on a CPU only. reverse: K bools, the directions that walk their order backwards. initial_state
    (B, K, D, N): h_{-1}.
    """
    directions, channels = delta.shape[1], delta.shape[3]
    reverse = tuple(reverse or (False,) * directions)
    if len(reverse) != directions:
        raise ValueError(f"reverse has {len(reverse)} entries; pass one for each of {directions} directions")
    x = x.unsqueeze(1) if x.dim() == 3 else x
    A = A.expand(directions, *A.shape[-1 if tied_decay else -2 :])
    D, bias = (None if w is None else w.expand(directions, channels) for w in (D, delta_bias))
    orders = orders.unsqueeze(0) if orders.dim() == 2 else orders
    tensors = (x, delta, A, B.unsqueeze(2), C.unsqueeze(2), D, None, bias, initial_state)
    return _scan(backend, tensors, orders, None, reverse, delta_softplus, tied_decay)[0]


def _scan(backend, tensors, order, carried, reverse, softplus, tied):
    """(y, last) of the operation, by the backend that is asked for or the best; `reverse`: K bools."""
    u, delta, A, B, C, D, z, bias, initial = tensors
    size = dict(zip("bKldGN", (*delta.shape, B.shape[2], B.shape[4]), strict=True))
    size["k"] = 1 if u.shape[1] == 1 else size["K"]
    size["a"] = 1 if order is None or len(order) == 1 else size["b"]
    for (name, dims), x in zip(_DIMS.items(), (*tensors, order, carried), strict=True):
        if x is None:
            continue
        # Kernels take pointers: another shape, device or kind of number would be read as if it were right.
        shape = tuple([size[dim] for dim in ("Kd" if tied and name == "A" else dims)])
        if x.shape != shape or x.device != u.device or not (x.is_floating_point() or name == "order"):
            found = f"{x.dtype} {tuple(x.shape)} on {x.device}"
            raise ValueError(f"{name} is {found}; pass real numbers {shape} on {u.device}")
    if size["d"] % size["G"] or not size["l"]:
        raise ValueError("no steps or unequal groups: {l} steps, {d} channels, {G} groups".format(**size))
    dtype = reference.compute_dtype(*tensors)
    uses = ["seq_idx"] * (carried is not None) + ["initial_state"] * (initial is not None)
    uses += ["float64"] * (dtype == torch.float64)
    name, layout, transformed = _choose(u.device.type, backend, uses)
    if name in ("reference", "mamba_ssm"):
        scan = functools.partial(reference.selective_scan_reference, tied_decay=tied, carried=carried)
        scan = scan if initial is None else functools.partial(scan, initial_state=initial.flatten(1, 2))
        if name == "mamba_ssm":
            scan, A = _mamba_ssm_scan, reference.state_rates(A.float(), size["N"]) if tied else A
        return reference.as_groups(scan, u, delta, A, B, C, D, z, bias, order, reverse, softplus)
    A, D, bias, initial = (None if x is None else x.to(dtype).contiguous() for x in (A, D, bias, initial))
    mask = sum(1 << k for k, backwards in enumerate(reverse) if backwards)
    tensors = (u, delta, A, B, C, D, z, bias, initial, order, carried)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    return OPERATIONS[name][int(transformed)](*tensors, mask, softplus, tied, keep, layout)[:2]


_DIMS = "bkld bKld KdN bKGlN bKGlN Kd bKld Kd bKdN aKl bl".split()
_DIMS = dict(zip("u delta A B C D z bias initial order carried".split(), _DIMS, strict=True))


def _mamba_ssm_scan(u, delta, A, B, C, D, z, delta_bias, *options):
    """Its kernel wants float32 parameters, and one dtype for all that varies along the sequence."""
    A, D, delta_bias = (None if x is None else x.float() for x in (A, D, delta_bias))
    delta, B, C, z = (None if x is None else x.to(u.dtype) for x in (delta, B, C, z))
    y, last = module("mamba_ssm").selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, *options)
    return y.to(u.dtype), last.detach()  # its backward leaves the last state's gradient out


@functools.cache
def installed(name):
    """ "ok", or why the backend cannot be compiled or imported (missing, built for another torch)."""
    try:
        return " ".join(module(name).status().split()) if name == "native" else module(name) and "ok"
    except (ImportError, OSError, AttributeError, RuntimeError, TypeError) as error:
        return f"import failed: {type(error).__name__}: {error}"


def status_of(name, kind=None):
    """ "ok", or why the backend cannot be used here, with tensors on a device of this kind."""
    where = {"native": "cpu", "triton": "cuda", "mamba_ssm": "cuda"}.get(name)
    status = installed(name)
    if status != "ok" or where is None or (name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"):
        return status
    if where == "cuda" and not (torch.cuda.is_initialized() or torch.cuda.is_available()):
        return "no CUDA device"
    return "ok" if kind in (None, where) else f"needs tensors on {where}, not on {kind}"


def backend_status():
    """{backend: "ok", or the reason why it cannot be used in this process}, in the order of BACKENDS."""
    return {name: status_of(name) for name in BACKENDS}


def choose_backend(device, backend=None, dtype=torch.float32):
    """`backend`, else $NF_SCAN_BACKEND, else triton on CUDA, native on a CPU if they work, else chunked."""
    return _choose(torch.device(device).type, backend, ["float64"] * (dtype == torch.float64))[0]


_TEACHING = "zero-order hold and no fixed B, C"
_HAVE = {_TEACHING: ("reference",), "float64": ("chunked", "reference")}
_HAVE |= dict(seq_idx=("chunked", "reference", "triton"), initial_state=BACKENDS[:-1])


def _choose(kind, backend, uses=()):
    """(backend, layout of its states, whether torch.func is at work); `uses`: of _HAVE."""
    source = "backend" if backend else "NF_SCAN_BACKEND"
    name = backend or (os.environ.get("NF_SCAN_BACKEND") if kind != "meta" else None)
    if name and name not in BACKENDS:
        raise ValueError(f"{source}={name!r} is unknown; choose one of {BACKENDS}")
    best = {"cuda": "triton", "cpu": "native"}.get(kind, "chunked")
    for use in uses:
        if name and name not in _HAVE[use]:
            raise ValueError(f"{source}={name!r} has no {use}; use one of {_HAVE[use]}")
        best = best if best in _HAVE[use] else _HAVE[use][0]
    status = status_of(name or best, kind)
    if name and status != "ok":
        raise ValueError(f"{source}={name!r} cannot be used: {status}")
    if status != "ok":
        warnings.warn(f"no {best} scan: {status}; the slower chunked one runs", RuntimeWarning, stacklevel=4)
    name = name or (best if status == "ok" else "chunked")
    if forward_ad._current_level >= 0:  # a kernel has no tangent; PyTorch's own operations have
        name = "reference"
    layout = str(module(name).states_shape(2, 3, 1_000_003, 5, 7)) if name in OPERATIONS else ""
    return name, layout, is_transformed()


_choose._dynamo_marked_constant = True  # torch.compiler.assume_constant_result imports torch._dynamo


def self_check(backend, device="cpu"):
    """Largest relative errors in float32 against the float64 reference: dict(forward, backward)."""
    size = dict(b=2, k=1, K=3, l=37, d=6, G=2, N=4, a=1)
    generator = torch.Generator().manual_seed(0)
    *tensors, order, _ = (torch.randn([size[i] for i in d], generator=generator) for d in _DIMS.values())
    order = order.argsort(-1)

    def run(backend, dtype, device):
        ys, gradients = [], []
        for tied in (False, True):
            given = [x.to(device, dtype, copy=True) for x in tensors]
            given[2] = -given[2].exp()[..., 0] if tied else -given[2].exp()
            given = [x.requires_grad_() for x in given]
            ys.append(_scan(backend, given, order.to(device), None, (False, True, False), True, tied)[0])
            weight = torch.linspace(-1, 1, ys[-1].numel()).view_as(ys[-1]).to(ys[-1])
            gradients += torch.autograd.grad((ys[-1] * weight).sum(), given)
        return ys, gradients

    found, wanted = run(backend, torch.float32, device), run("reference", torch.float64, "cpu")
    worst = [max(map(relative_error, *pair)) for pair in zip(found, wanted, strict=True)]
    return dict(zip(("forward", "backward"), worst, strict=True))
