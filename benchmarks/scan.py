"""Speed, memory and growth of the selective scan: the speed table of v1's document, measured.

    python benchmarks/scan.py [--quick] [--device cuda] [--shapes v1 length] [--backends chunked native]

Every row computes the same layer: softplus(delta + bias), decays exp(delta A), B and C that vary along the
sequence, skip D. That is checked first, output and every gradient, against the float64 reference.

Rows other than the backends of `nfhelpers.selective_scan`:
    loop          one step after another under autograd (v1's document: "old")
    einsum        the decay between every pair of positions (v1's document: "fast"): B·D·N·L² numbers
    blelloch      associative scan, log2(L) levels of pairs, under autograd
    pscan         the same with in-place sweeps and a backward of its own, as packages write it
    ... tied      decays A[d, n] = (n + 1) A[d]: one exponential a step and channel instead of N
    ... (B,D,L)   our kernel on tensors that are contiguous along the sequence
Our backends and the plain versions get transposed views of channels-last tensors, as models pass them;
mamba_ssm gets contiguous (B, D, L), its best layout.

Shapes, one size for a CPU and one for a GPU (SIZES):
    v1            a layer of MambaDiffusion on 204 observed pixels and 1024 queries
    multi         the same sequence walked in 1 and in 4 orders, one input shared by all
    local         a LocalMamba layer: 64 x 64 patches in the orders h, v, w7
    length        a small layer at growing lengths
Backends without fused directions gather a copy of the input for every order and gather the results back;
their delta, B and C are given in the order of the scan.

Times are, on a CPU, the shortest of several runs taken in turn with the other rows; on a GPU, the median
by CUDA events, after fills of FLUSH_BYTES: they evict every cache, and keep the GPU busy until all of a run
is launched (as many fills as that takes, from FILLS[0] to FILLS[1]), so that kernels are timed and not the
host. Memory is the
peak of what tensors beyond the arguments hold during forward and backward: on a CPU from the record the
profiler keeps of torch's allocations (native also adds up dB and dC in buffers of its own, which are not in
it), on a GPU from the CUDA allocator. A growth exponent is the slope of log(value) against log(L) over the
lengths in GROWTH_RANGE.

The floor on a GPU is the larger of two times: bytes that must move (each argument read once, each result
written once; the backward reads the arguments again) over the measured bandwidth of a copy; and exponentials
(one a state, plus two for the softplus, in the forward and again in the backward) over SMs x 16 a clock x the
highest clock. A share is floor / measured time.

Ctrl-C prints what was measured up to then. JSON and figure go to the repository's benchmarks/results and
figures when everything was measured at full size; otherwise only where --out and --figure say.
"""

import argparse
import functools
import json
import math
import platform
import re
import shlex
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import common
import numpy as np
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

import nfhelpers
from nfhelpers import kernels
from nfhelpers.kernels.orders import grid_order, inverse_order, point_order

ROOT = Path(__file__).resolve().parents[1]
SHAPES = ("v1", "multi", "local", "length")
STATES = 16
V1_LENGTH = 1228  # 204 observed pixels and the 1024 queries of a 32 x 32 field
GRID = 64  # patches along each side of a LocalMamba layer
POINT_ORDERS = ("row", "column", "diagonal", "antidiagonal")
GRID_ORDERS = ("h", "v", "w7")
SIZES = {  # batch, channels
    "cpu": dict(v1=(8, 256), multi=(2, 256), local=(2, 192), length=(1, 64)),
    "cuda": dict(v1=(64, 1024), multi=(64, 1024), local=(16, 192), length=(1, 256)),
}
LENGTHS = [2**power for power in range(8, 17)]
QUICK = dict(batch=1, channels=16, length=100, grid=10, lengths=[32, 64, 128])
GROWTH_RANGE = (1024, 65536)

SPECIAL_RATE = 16  # exponentials a clock and SM, compute capability 5 to 9
FLUSH_BYTES = 2**29
FILLS = 16, 64
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}
MEMORY_LIMIT = 8 * 2**30  # on a CPU; on a GPU what is free
TIME_LIMIT = {"cpu": 2.0, "cuda": 0.5}  # seconds a run, where an earlier size lets it be foreseen
BUDGET = {"cpu": 1.0, "cuda": 0.15}  # seconds for the runs of one number
QUICK_BUDGET = 0.05


# ------------------------------------------------------------------------------------------ what is compared


def _terms(u, delta, A, B, C, bias):
    """float32 u, step (B, L, D), B, C (B, L, N): what the plain versions below start from."""
    u, delta, B, C = (x.float().transpose(1, 2) for x in (u, delta, B, C))
    return u, F.softplus(delta + bias), B, C


def scan_loop(u, delta, A, B, C, D, bias):
    """One position after another. Slices by unbind: the backward of x[:, t] would fill a whole tensor."""
    inputs, step, B, C = _terms(u, delta, A, B, C, bias)
    h = inputs.new_zeros(u.shape[0], *A.shape)  # (B, D, N)
    outputs = []
    for u_t, step_t, B_t, C_t in zip(*(x.unbind(1) for x in (inputs, step, B, C)), strict=True):
        h = torch.exp(step_t[..., None] * A) * h + (step_t * u_t)[..., None] * B_t[:, None]
        outputs.append((h * C_t[:, None]).sum(-1))  # (B, D)
    return (torch.stack(outputs, 1) + D * inputs).transpose(1, 2).to(u.dtype)


def scan_einsum(u, delta, A, B, C, D, bias):
    """One product with the matrix of decays exp(A (S_t - S_s)), s <= t, S = cumsum(step)."""
    inputs, step, B, C = _terms(u, delta, A, B, C, bias)
    total = step.transpose(1, 2).cumsum(-1)  # (B, D, L)
    gap = total.unsqueeze(-1) - total.unsqueeze(-2)  # (B, D, L, L)
    future = torch.ones_like(gap[0, 0], dtype=torch.bool).triu(1)
    # Both fills are needed: exp(A gap) of the future would overflow, and its decay must be 0.
    decay = torch.exp(A[:, :, None, None] * gap.masked_fill(future, 0).unsqueeze(2))
    decay = decay.masked_fill(future, 0)  # (B, D, N, L, L)
    y = torch.einsum("bdnts,bsd,bsn,btn->btd", decay, step * inputs, B, C)
    return (y + D * inputs).transpose(1, 2).to(u.dtype)


def _associative(a, x):
    """States h_t = a_t h_{t-1} + x_t along dim 1, by the scan of pairs of neighbours."""
    length = a.shape[1]
    if length == 1:
        return x
    pairs = 2 * (length // 2)
    odd_a = a[:, 1::2]
    odd = _associative(a[:, 0:pairs:2] * odd_a, odd_a * x[:, 0:pairs:2] + x[:, 1::2])  # h_1, h_3 ...
    even = torch.cat([x[:, :1], x[:, 2::2] + a[:, 2::2] * odd[:, : (length - 1) // 2]], 1)
    if length % 2:
        odd = F.pad(odd, (0, 0, 0, 0, 0, 1))
    return torch.stack([even, odd], 2).flatten(1, 2)[:, :length]


def _sweep(a, x):
    """Blelloch's sweeps up and down the tree, in place: x becomes the states, a the products."""
    step = 1
    while step < a.shape[1]:
        _join(a, x, slice(2 * step - 1, None, 2 * step), slice(step - 1, None, 2 * step))
        step *= 2
    while step > 1:
        step //= 2
        _join(a, x, slice(3 * step - 1, None, 2 * step), slice(2 * step - 1, None, 2 * step))


def _join(a, x, right, left):
    a_right, x_right = a[:, right], x[:, right]
    count = a_right.shape[1]
    x_right.addcmul_(a_right, x[:, left][:, :count])
    a_right.mul_(a[:, left][:, :count])


class _Sweeps(torch.autograd.Function):
    """`_associative` with a backward of its own: the same sweeps over the reversed sequence."""

    @staticmethod
    def forward(ctx, a, x):
        h = x.clone()
        _sweep(a.clone(), h)
        ctx.save_for_backward(a, h)
        return h

    @staticmethod
    def backward(ctx, grad):
        a, h = ctx.saved_tensors
        g = grad.flip(1)
        _sweep(torch.cat([torch.ones_like(a[:, :1]), a[:, 1:].flip(1)], 1), g)
        g = g.flip(1)
        da = torch.zeros_like(a)
        torch.mul(g[:, 1:], h[:, :-1], out=da[:, 1:])
        return da, g


def scan_by(states, u, delta, A, B, C, D, bias):
    """The scan through `states`, a function that makes all (B, L, D, N) states from decays and inputs."""
    inputs, step, B, C = _terms(u, delta, A, B, C, bias)
    a = torch.exp(step.unsqueeze(-1) * A)
    h = states(a, (step * inputs).unsqueeze(-1) * B.unsqueeze(2))
    y = (h @ C.unsqueeze(-1)).squeeze(-1)  # (B, L, D)
    return (y + D * inputs).transpose(1, 2).to(u.dtype)


PLAIN = dict(
    loop=scan_loop,
    einsum=scan_einsum,
    blelloch=functools.partial(scan_by, _associative),
    pscan=functools.partial(scan_by, _Sweeps.apply),
)
FUSED = ("chunked", "native", "triton")  # walk all directions in one call, without copies


class Row(NamedTuple):
    """One line of the tables."""

    backend: str
    tied: bool = False
    contiguous: bool = False

    @property
    def name(self):
        layout = " (B,D,L)" if self.contiguous and self.backend != "mamba_ssm" else ""
        return self.backend + " tied" * self.tied + layout


ROWS = (
    *(Row(name) for name in (*PLAIN, "reference")),
    *(Row(name, tied) for name in FUSED for tied in (False, True)),
    Row("triton", contiguous=True),
    Row("mamba_ssm", contiguous=True),
)
BACKENDS = tuple(dict.fromkeys(row.backend for row in ROWS))


class Case(NamedTuple):
    """A size at which rows are measured. orders: (K, L) or (B, K, L), or None where nothing is permuted."""

    name: str
    shape: str
    batch: int
    channels: int
    length: int
    orders: torch.Tensor | None = None

    @property
    def directions(self):
        return 1 if self.orders is None else self.orders.shape[-2]

    @property
    def elements(self):
        """States computed: B·K·L·D·N."""
        return self.batch * self.directions * self.length * self.channels * STATES

    def includes(self, row, device):
        """Whether the row belongs to this case: some rows would only repeat another one, slower."""
        if row.backend == "reference" or (row.backend in PLAIN and device.type == "cuda"):
            return self.orders is None
        return not row.contiguous or row.backend == "mamba_ssm" or self.shape == "v1"


def make_cases(shapes, lengths, device, quick):
    """The cases of `shapes`, what the targets need first."""
    cases = []
    for shape in SHAPES:
        if shape not in shapes:
            continue
        batch, channels = SIZES[device.type][shape]
        length, grid = V1_LENGTH, GRID
        if quick:
            batch, channels, length, grid = (QUICK[key] for key in ("batch", "channels", "length", "grid"))
        if shape == "v1":
            cases.append(Case("v1", shape, batch, channels, length))
        elif shape == "multi":
            coords = torch.rand(batch, length, 2, generator=torch.Generator().manual_seed(1))
            orders = torch.stack([point_order(coords, kind) for kind in POINT_ORDERS], 1).to(device)
            for count in (1, len(POINT_ORDERS)):
                cases.append(Case(f"multi K={count}", shape, batch, channels, length, orders[:, :count]))
        elif shape == "local":
            orders = torch.stack([grid_order(grid, grid, kind) for kind in GRID_ORDERS]).to(device)
            cases.append(Case("local", shape, batch, channels, grid * grid, orders))
        else:
            cases += [Case("length", shape, batch, channels, length) for length in sorted(lengths)]
    return cases


def draw(case, dtype, device):
    """Arguments and the gradient of the output, channels-last, float32 parameters and the rest in dtype.

    x (B, L, D); delta, grad (B, K, L, D); A (K, D, N); B, C (B, K, L, N); D, bias (K, D).
    """
    generator = torch.Generator(device).manual_seed(0)
    batch, directions, length, channels = case.batch, case.directions, case.length, case.channels

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=device)

    tokens = dict(
        x=normal(batch, length, channels),
        delta=normal(batch, directions, length, channels),
        B=normal(batch, directions, length, STATES),
        C=normal(batch, directions, length, STATES),
        grad=normal(batch, directions, length, channels),
    )
    rates = torch.arange(1.0, STATES + 1, device=device)
    return {name: x.to(dtype) for name, x in tokens.items()} | dict(
        A=-rates.repeat(directions, channels, 1),
        D=normal(directions, channels),
        bias=torch.full((directions, channels), -3.0, device=device),
    )


def _gather(x, order):
    """x (B, K, L, n) with row order[b, k, t] at position t; order (K, L) or (B, K, L)."""
    return x.gather(2, order.expand(x.shape[:3]).unsqueeze(-1).expand_as(x))


def arrange(row, case, drawn):
    """[u, delta, A, B, C, D, bias] and grad of `drawn` as the row takes them."""
    drawn = dict(drawn)
    A, D, bias = (drawn.pop(name) for name in ("A", "D", "bias"))
    if case.orders is None:
        drawn = {name: x if name == "x" else x[:, 0] for name, x in drawn.items()}  # (B, L, D or N)
        A, D, bias = A[0], D[0], bias[0]
    if case.orders is not None and row.backend not in FUSED:  # all but x in the order of the scan
        drawn = {name: x if name in ("x", "grad") else _gather(x, case.orders) for name, x in drawn.items()}
    if case.orders is None or row.backend not in FUSED:
        drawn = {name: x.transpose(-1, -2) for name, x in drawn.items()}  # (..., D or N, L)
        if row.contiguous:
            drawn = {name: x.contiguous() for name, x in drawn.items()}
    u, delta, B, C = (drawn[name] for name in ("x", "delta", "B", "C"))
    return [u, delta, A, B, C, D, bias], drawn["grad"]


def make_scan(row, case):
    """The function of u, delta, A, B, C, D, bias, arranged by `arrange`, that the row measures."""
    tied = dict(tied_decay=True) if row.tied else {}

    def one(u, delta, A, B, C, D, bias):
        if row.backend in PLAIN:
            return PLAIN[row.backend](u, delta, A, B, C, D, bias)
        return nfhelpers.selective_scan(
            u, delta, A, B, C, D, delta_bias=bias, delta_softplus=True, backend=row.backend, **tied
        )

    if case.orders is None:
        return one
    if row.backend in FUSED:

        def fused(x, delta, A, B, C, D, bias):
            options = dict(orders=case.orders, delta_bias=bias, backend=row.backend, **tied)
            return nfhelpers.directional_scan(x, delta, A, B, C, D, **options)  # (B, K, L, D)

        return fused

    orders = case.orders.expand(case.batch, -1, -1)  # (B, K, L)
    inverses = inverse_order(orders.contiguous())

    def copies(x, delta, A, B, C, D, bias):
        """x (B, D, L); delta (B, K, D, L); B, C (B, K, N, L) -> (B, K, D, L)."""
        walks = [order.unsqueeze(1).expand_as(x) for order in orders.unbind(1)]
        u = torch.stack([x.gather(2, walk) for walk in walks], 1)  # (B, K, D, L)
        if row.backend == "mamba_ssm":  # one launch, every direction a group of channels
            flat = (z.flatten(1, 2) for z in (u, delta)), (z.flatten(0, 1) for z in (A, D, bias))
            (u, delta), (A, D, bias) = flat
            y = one(u, delta, A, B, C, D, bias).unflatten(1, (case.directions, -1))
        else:
            parts = (*(z.unbind(1) for z in (u, delta)), A, *(z.unbind(1) for z in (B, C)), D, bias)
            y = torch.stack([one(*part) for part in zip(*parts, strict=True)], 1)
        return y.gather(3, inverses.unsqueeze(2).expand_as(y))

    return copies


# ------------------------------------------------------------------------------------------------ correctness


def errors_of(rows, dtype, device):
    """{row name: largest relative error (norms) of output and gradients against float64, or what was raised}.

    Plain and directional scans, small. Where it is above TOLERANCE the row is not the same scan.
    """
    coords = torch.rand(2, 75, 2, generator=torch.Generator().manual_seed(2))
    orders = torch.stack([point_order(coords, kind) for kind in POINT_ORDERS[:3]], 1).to(device)
    found = {row.name: 0.0 for row in rows}
    for case in (Case("plain", "v1", 2, 24, 75), Case("directions", "v1", 2, 24, 75, orders)):
        drawn = draw(case, dtype, device)
        exact = {name: x.double().requires_grad_(name != "grad") for name, x in drawn.items()}
        truth = Row("reference")
        arguments, grad = arrange(truth, case, exact)
        y = make_scan(truth, case)(*arguments)
        leaves = [name for name in exact if name != "grad"]
        grads = torch.autograd.grad(y, [exact[name] for name in leaves], grad)
        wanted = dict(zip(leaves, grads, strict=True), grad=_standard(y, truth, case).detach())
        rates = torch.arange(1.0, STATES + 1, device=device)
        for row in rows:
            if isinstance(found[row.name], str):
                continue
            inputs, wanted_row = drawn, wanted
            if row.tied:  # A[k, d, n] = (n + 1) A[k, d, 0]
                inputs = drawn | dict(A=drawn["A"][..., 0])
                wanted_row = wanted | dict(A=(wanted["A"] * rates).sum(-1))
            try:
                arguments, grad = arrange(row, case, inputs)
                arguments = [x.detach().requires_grad_() for x in arguments]
                y = make_scan(row, case)(*arguments)
                results = [*torch.autograd.grad(y, arguments, grad), _standard(y, row, case)]
            except Exception as error:  # reported in the row's place; the others go on
                found[row.name] = f"{type(error).__name__}: {error}".splitlines()[0]
                continue
            truths = arrange(row, case, wanted_row | dict(grad=wanted["grad"]))
            truths = [*truths[0], wanted["grad"]]
            worst = [_relative(result, truth) for result, truth in zip(results, truths, strict=True)]
            found[row.name] = max(found[row.name], *worst)
    return found


def _standard(y, row, case):
    """An output as (B, K, L, D)."""
    if case.orders is None:
        return y.transpose(1, 2).unsqueeze(1)
    return y if row.backend in FUSED else y.transpose(2, 3)


def _relative(found, wanted):
    """Norm of the difference over norm of the truth; infinite when anything is not finite."""
    error = ((found.detach().double() - wanted).norm() / wanted.norm()).item()
    return error if math.isfinite(error) else math.inf


# -------------------------------------------------------------------------------------------------- measuring


def stopwatch(device):
    """A function that runs another and returns the seconds it took on `device`."""
    if device.type != "cuda":

        def by_clock(run):
            start = time.perf_counter()
            run()
            return time.perf_counter() - start

        return by_clock
    filler = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def by_events(run):
        fills = FILLS[0]
        while True:
            for _ in range(fills):
                filler.zero_()
            start.record()
            run()
            waited = start.query()  # the GPU came to the run before all of it was launched
            end.record()
            end.synchronize()
            if not waited or fills >= FILLS[1]:
                return start.elapsed_time(end) / 1e3
            fills *= 2

    return by_events


def best_times(runs, device, budget):
    """{name: seconds} of `runs` {name: function}, taken in turn: shortest on a CPU, median on a GPU."""
    clock = stopwatch(device)
    least, most = (3, 50) if device.type == "cuda" else (2, 10)
    times = {name: [] for name in runs}

    def goes_on(values):
        return len(values) < most and sum(values) < (2 * budget if len(values) < least else budget)

    if device.type == "cuda":  # the first run compiles
        for run in runs.values():
            run()
    waiting = list(runs)
    while waiting:
        for name in waiting:
            times[name].append(clock(runs[name]))
        waiting = [name for name in waiting if goes_on(times[name])]
    pick = np.median if device.type == "cuda" else min
    return {name: float(pick(values)) for name, values in times.items()}


def why_skip(row, case, rows, device):
    """Reason not to measure this row here, by formula or by what earlier sizes took, or None."""
    limit = MEMORY_LIMIT
    if device.type == "cuda":
        limit = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        limit -= torch.cuda.memory_allocated(device)
    before = [old for old in rows if old["row"] == row.name and "peak_bytes" in old]
    if row.backend == "einsum":  # autograd keeps two matrices of decays and makes two more
        memory = 4 * 4 * case.elements * case.length
    else:
        memory = max((old["peak_bytes"] / old["elements"] for old in before), default=0) * case.elements
    if memory > limit:
        return f"would take {memory / 2**30:.3g} GiB"
    if device.type == "cpu" and row.backend in FUSED:
        return None
    # Steps cost the same at the small sizes of `length`, elements at all others.
    alike = [old for old in before if (old["shape"] == "length") == (case.shape == "length")]
    if alike:
        ratio = case.elements / alike[-1]["elements"]
        if row.backend == "einsum":
            ratio *= case.length / alike[-1]["length"]
        seconds = alike[-1]["forward_backward"] * ratio
        if seconds > TIME_LIMIT[device.type]:
            return f"would take {seconds:.2g} s a run"
    return None


class Job(NamedTuple):
    forward: Callable
    forward_backward: Callable


def make_job(row, case, drawn):
    inputs = drawn | dict(A=drawn["A"][..., 0]) if row.tied else drawn
    arguments, grad = arrange(row, case, inputs)
    arguments = [x.detach().requires_grad_() for x in arguments]
    scan = make_scan(row, case)

    def forward():
        with torch.no_grad():
            scan(*arguments)

    def forward_backward():
        torch.autograd.grad(scan(*arguments), arguments, grad)

    return Job(forward, forward_backward)


def measure(case, rows, refused, before, dtype, device, budget):
    """One record a row: seconds and peak bytes, or the reason why it was skipped.

    refused: {row name: reason}. before: records of earlier cases, from which time and memory are foreseen.
    """
    drawn = draw(case, dtype, device)
    sizes = dict(batch=case.batch, channels=case.channels, states=STATES, directions=case.directions)
    records, jobs = {}, {}
    for row in rows:
        record = dict(row=row.name, case=case.name, shape=case.shape, length=case.length, **sizes)
        record |= dict(elements=case.elements, tied=row.tied)
        reason = refused.get(row.name) or why_skip(row, case, before, device)
        records[row.name] = record | (dict(skipped=reason) if reason else {})
        if reason is None:
            jobs[row.name] = make_job(row, case, drawn)
    for key in ("peak_bytes", "forward", "forward_backward"):
        if key == "peak_bytes":
            values = {name: _tried(job.forward_backward, device) for name, job in jobs.items()}
            for name in [name for name, value in values.items() if isinstance(value, str)]:
                records[name]["skipped"] = values.pop(name)
                del jobs[name]
        else:
            values = best_times({name: getattr(job, key) for name, job in jobs.items()}, device, budget)
        for name, value in values.items():
            records[name][key] = value
    return list(records.values())


def _tried(run, device):
    """Peak bytes of a run, or why it does not run here: what fails here would fail in every later run."""
    try:
        if device.type == "cuda":  # compile, so that the peak is the scan's own
            run()
        return common.peak_bytes(run, device)
    except Exception as error:  # reported in the row's place; the others go on
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
    torch.cuda.empty_cache()  # what an out-of-memory error left behind
    return reason


# -------------------------------------------------------------------------------------------------- the floor


def gpu_limits(device):
    """Bytes a second of a large copy (read plus written) and exponentials a second of this GPU."""
    source = torch.empty(2**30, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    seconds = best_times(dict(copy=lambda: target.copy_(source)), device, BUDGET["cuda"])["copy"]
    properties = torch.cuda.get_device_properties(device)
    clock = properties.clock_rate * 1e3
    return dict(
        copy_bytes_per_second=2 * source.numel() / seconds,
        multiprocessors=properties.multi_processor_count,
        max_clock_hz=clock,
        exponentials_per_second=properties.multi_processor_count * SPECIAL_RATE * clock,
    )


def floors(case, tied, dtype, limits):
    """{"forward": (seconds for the bytes, seconds for the exponentials), "forward_backward": ...}."""
    tokens = case.batch * case.length * dtype.itemsize
    shared, each = tokens * case.channels, tokens * case.channels * case.directions
    weights = 2 * tokens * case.directions * STATES  # B and C
    forward = shared + 2 * each + weights  # u, delta -> y
    backward = 2 * shared + 3 * each + 2 * weights  # u, delta, dy -> du, ddelta
    exponentials = case.elements / STATES * ((1 if tied else STATES) + 2)
    return {
        key: (size / limits["copy_bytes_per_second"], count / limits["exponentials_per_second"])
        for key, size, count in (
            ("forward", forward, exponentials),
            ("forward_backward", forward + backward, 2 * exponentials),
        )
    }


# ---------------------------------------------------------------------------------------------------- results


def growth(records, name, key):
    """Exponent of time or memory of one row over GROWTH_RANGE; None where fewer than three were measured."""
    points = [
        (record["length"], record[key])
        for record in records
        if record["row"] == name
        and record["shape"] == "length"
        and key in record
        and GROWTH_RANGE[0] <= record["length"] <= GROWTH_RANGE[1]
    ]
    return float(np.polyfit(*np.log(np.array(points)).T, 1)[0]) if len(points) >= 3 else None


def make_targets(records, growths, device, quick):
    """Targets: (what, limit, measured value or None). quick measures none of them."""

    def value(case, name, key="forward_backward"):
        found = [record.get(key) for record in records if record["case"] == case and record["row"] == name]
        return found[0] if found and not quick else None

    def ratio(slow, fast):
        return None if slow is None or fast is None else slow / fast

    ours = "triton" if device.type == "cuda" else "native"
    targets = []
    if device.type == "cuda":
        forward, both, tied = value("v1", ours, "forward"), value("v1", ours), value("v1", f"{ours} tied")
        peak = value("v1", ours, "peak_bytes")
        lengths = {
            name: [r.get("forward_backward") for r in records if r["shape"] == "length" and r["row"] == name]
            for name in (ours, "mamba_ssm")
        }
        pairs = [pair for pair in zip(*lengths.values(), strict=False) if all(pair) and not quick]
        targets += [
            ("v1: triton forward, ms", "<= 0.6", forward and forward * 1e3),
            ("v1: triton forward+backward, ms", "<= 2.2", both and both * 1e3),
            ("v1: triton tied forward+backward, ms", "<= 1.7", tied and tied * 1e3),
            ("v1: triton peak, MiB", "<= 600", peak and peak / 2**20),
            ("v1: mamba_ssm / triton, forward+backward", ">= 2", ratio(value("v1", "mamba_ssm"), both)),
            ("local: mamba_ssm / triton", ">= 1", ratio(value("local", "mamba_ssm"), value("local", ours))),
            ("every length: triton / mamba_ssm", "<= 1.5", max((a / b for a, b in pairs), default=None)),
        ]
    else:
        chunked = value("v1", "chunked")
        targets += [
            ("v1: loop / chunked, forward+backward", ">= 4", ratio(value("v1", "loop"), chunked)),
            ("v1: blelloch / chunked, forward+backward", ">= 10", ratio(value("v1", "blelloch"), chunked)),
            ("v1: pscan / chunked, forward+backward", ">= 10", ratio(value("v1", "pscan"), chunked)),
            ("v1: chunked / native, forward+backward", ">= 5", ratio(chunked, value("v1", "native"))),
        ]
    four, one = (value(f"multi K={count}", ours) for count in (4, 1))
    targets.append((f"{ours}: four directions / one", "<= 4.2", ratio(four, one)))
    for name in dict.fromkeys(("chunked", ours)):
        for key, what in (("forward_backward", "time"), ("peak_bytes", "memory")):
            exponent = None if quick else growths.get(name, {}).get(key)
            targets.append((f"{name}: growth exponent of {what}", "<= 1.1", exponent))
    return targets


def verdict(limit, value):
    if value is None:
        return "not measured"
    sign, number = limit.split()
    return "met" if (value <= float(number)) == (sign == "<=") or value == float(number) else "missed"


def _cells(values, width=9):
    return "".join(f"{value:>{width}}" for value in values)


def _number(value):
    """Three significant digits, never in scientific notation."""
    return "-" if value is None else f"{value:.{max(0, 2 - math.floor(math.log10(max(value, 1e-3))))}f}"


def report(records, growths, targets, errors, dtype, device, limits):
    """The lines of the final table."""
    lines = []
    baseline = "mamba_ssm" if any(r["row"] == "mamba_ssm" and "forward" in r for r in records) else "loop"
    names = dict.fromkeys(record["row"] for record in records)
    cases = dict.fromkeys(record["case"] for record in records if record["shape"] != "length")
    for case in cases:
        of_case = [record for record in records if record["case"] == case]
        first = of_case[0]
        head = f"{case}: B={first['batch']} D={first['channels']} L={first['length']} N={STATES}"
        head += f" K={first['directions']} {str(dtype).removeprefix('torch.')}"
        lines += ["", head]
        if limits:
            floor = {
                tied: {key: first["floor"][tied][key] for key in ("forward", "forward_backward")}
                for tied in ("full", "tied")
            }
            parts = [
                f"{label} {part * 1e3:.3f}"
                for way in ("forward", "forward_backward")
                for label, part in (
                    (f"{way.replace('_', '+')}: bytes", floor["full"][way][0]),
                    ("exponentials", floor["full"][way][1]),
                    ("(tied)", floor["tied"][way][1]),
                )
            ]
            lines.append("  floor, ms: " + " ".join(parts))
        heads = ["forward", *["share"] * bool(limits), "fwd+bwd", *["share"] * bool(limits)]
        lines.append(f"  {'':16}{_cells([*heads, 'peak MiB', 'speed'])}  (speed: {baseline} = 1)")
        base = next((r.get("forward_backward") for r in of_case if r["row"] == baseline), None)
        for record in of_case:
            if "skipped" in record:
                lines.append(f"  {record['row']:16}  {record['skipped'][:80]}")
                continue
            cells = []
            for key in ("forward", "forward_backward"):
                cells.append(_number(record[key] * 1e3))
                if limits:
                    floor = max(record["floor"]["tied" if record["tied"] else "full"][key])
                    cells.append(f"{floor / record[key]:.0%}")
            cells.append(_number(record["peak_bytes"] / 2**20))
            cells.append(_number(base and base / record["forward_backward"]))
            lines.append(f"  {record['row']:16}{_cells(cells)}")
    of_length = [record for record in records if record["shape"] == "length"]
    lengths = sorted({record["length"] for record in of_length})
    blocks = (("forward_backward", "forward+backward, ms", 1e-3), ("peak_bytes", "peak, MiB", 2**20))
    for key, title, unit in blocks if of_length else ():
        first = of_length[0]
        lines += ["", f"{title}, at B={first['batch']} D={first['channels']} N={STATES} and L ="]
        lines.append(f"  {'':16}{_cells(lengths, 8)}{'growth':>8}")
        for name in names:
            values = {record["length"]: record.get(key) for record in of_length if record["row"] == name}
            if any(values.values()):
                cells = [_number(values[n] and values[n] / unit) for n in lengths]
                exponent = growths[name][key]
                cells.append("-" if exponent is None else f"{exponent:.2f}")
                lines.append(f"  {name:16}{_cells(cells, 8)}")
    shown = [f"{name} {error:.0e}" for name, error in errors.items() if not isinstance(error, str)]
    lines += ["", "relative error against float64, output and gradients: " + ", ".join(shown)]
    lines += ["", "targets" + " " * 43 + _cells(["wanted", "measured"], 12)]
    for what, limit, value in targets:
        lines.append(f"  {what:48}{_cells([limit, _number(value)], 12)}   {verdict(limit, value)}")
    return lines


LINES = {  # colour (Okabe and Ito's palette) and marker; reference is left out: it is loop, slower
    "loop": ("#000000", "X"),
    "einsum": ("#E69F00", "^"),
    "blelloch": ("#56B4E9", "v"),
    "pscan": ("#808080", "<"),
    "chunked": ("#0072B2", "o"),
    "native": ("#D55E00", "s"),
    "triton": ("#009E73", "D"),
    "mamba_ssm": ("#CC79A7", "P"),
}


def draw_figure(records, path, subtitle):
    """Time and memory of forward and backward against length, log-log, one line a row."""
    from matplotlib.figure import Figure

    records = [
        r for r in records if r["shape"] == "length" and "peak_bytes" in r and r["row"].split()[0] in LINES
    ]
    names = list(dict.fromkeys(record["row"] for record in records))
    lengths = np.array(sorted({record["length"] for record in records}))
    figure = Figure(figsize=(11, 5.2), dpi=110, layout="constrained")
    panels = (("forward_backward", 1e-3, "forward + backward, ms"), ("peak_bytes", 2**20, "peak memory, MiB"))
    for axis, (key, unit, label) in zip(figure.subplots(1, 2), panels, strict=True):
        for name in names:
            backend, *variant = name.split()
            points = [(r["length"], r[key] / unit) for r in records if r["row"] == name]
            axis.plot(
                *zip(*points, strict=True),
                label=name,
                color=LINES[backend][0],
                marker=LINES[backend][1],
                markerfacecolor="white" if variant else None,
                linestyle="--" if variant else "-",
                markersize=5,
                linewidth=1.5,
            )
        # Slopes to compare with, below the curves: over the last factor of 8 in length.
        ends = np.array([lengths[-1] / 8, lengths[-1]])
        low = min(record[key] / unit for record in records) / 2
        for power, style in ((1, ":"), (2, "-.")):
            axis.plot(ends, low * np.array([1, 8**power]), color="#808080", linestyle=style, linewidth=1.2)
            axis.annotate(
                f"slope {power}",
                (ends[1], low * 8**power),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color="#505050",
            )
        axis.set(xscale="log", yscale="log", xlabel="length L", ylabel=label)
        axis.set_xlim(right=lengths[-1] * 2.4)
        axis.set_xticks(lengths, [f"{n:,}" for n in lengths], rotation=45, fontsize=9)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=9)
    figure.suptitle(f"Selective scan against length: {subtitle}", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def results_path(benchmark, device):
    """Where the results of a whole run lie: named by the GPU, or "cpu"."""
    name = "cpu"
    if device.type == "cuda":
        name = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    return ROOT / "benchmarks" / "results" / f"{benchmark}-{name}.json"


def package_version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return getattr(sys.modules.get(name), "__version__", None)


def run_once(rows, case, dtype, device, table):
    """A warm-up, then one forward and backward of every row under torch's profiler, or marked for ncu."""
    drawn = draw(case, dtype, device)
    for row in rows:
        job = make_job(row, case, drawn)
        job.forward_backward()
        torch.cuda.synchronize(device)
        if not table:
            torch.cuda.profiler.start()
            job.forward_backward()
            torch.cuda.synchronize(device)
            torch.cuda.profiler.stop()
            continue
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
            job.forward_backward()
            torch.cuda.synchronize(device)
        kernels_run = [e for e in record.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
        kernels_run.sort(key=lambda event: -event.self_device_time_total)
        total = sum(event.self_device_time_total for event in kernels_run) / 1e3
        print(f"\n{row.name}: {total:.3f} ms in the kernels of one forward and backward; ms, calls, kernel")
        for event in kernels_run[:12]:
            print(f"{event.self_device_time_total / 1e3:9.3f}{event.count:5d}  {event.key[:80]}")


def why_missing(name, device):
    """None when the backend runs on `device`, else the reason."""
    if name in PLAIN:
        return None
    try:
        kernels.choose_backend(device, name)
    except ValueError as error:
        return str(error).split("; usable here")[0].splitlines()[0]
    return None


def parse(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    dtypes = [str(dtype).removeprefix("torch.") for dtype in TOLERANCE]
    parser.add_argument("--dtype", choices=dtypes, help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="default: all")
    parser.add_argument("--lengths", type=int, nargs="+", help=f"default: {' '.join(map(str, LENGTHS))}")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, help="default: every one that can be used")
    parser.add_argument("--quick", action="store_true", help="small sizes, in seconds")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/scan-<cpu or GPU's name>.json")
    parser.add_argument("--figure", type=Path, help="default: figures/scan_<cpu or gpu>.png")
    parser.add_argument(
        "--profile",
        choices=("table", "ncu"),
        help="only one forward and backward at v1 on a GPU: its kernels as a table, or marked for ncu",
    )
    options = parser.parse_args(arguments)
    options.device = torch.device(options.device)
    if options.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device; --device cpu runs without one")
    if options.profile and options.device.type != "cuda":
        parser.error("--profile needs --device cuda")
    cuda = options.device.type == "cuda"
    options.dtype = getattr(torch, options.dtype or ("bfloat16" if cuda else "float32"))
    options.complete = not (options.quick or options.shapes or options.lengths or options.backends)
    options.shapes = options.shapes or SHAPES
    options.lengths = options.lengths or (QUICK["lengths"] if options.quick else LENGTHS)
    return options


def main():
    options = parse()
    device, dtype = options.device, options.dtype
    missing = {name: why_missing(name, device) for name in BACKENDS}
    missing = {name: reason for name, reason in missing.items() if reason is not None}
    wanted = options.backends or [name for name in BACKENDS if name not in missing]
    rows = [row for row in ROWS if row.backend in wanted]
    cases = make_cases(options.shapes, options.lengths, device, options.quick)
    if options.profile:
        run_once(rows, cases[0], dtype, device, options.profile == "table")
        return 0

    packages = ("nfhelpers", "torch", "triton", "mamba_ssm", "numpy")
    versions = dict(python=platform.python_version(), **{name: package_version(name) for name in packages})
    versions["nfhelpers"] = nfhelpers.__version__
    environment = dict(device=device_name(device), dtype=str(dtype).removeprefix("torch."))
    environment["threads"] = torch.get_num_threads()
    limits = gpu_limits(device) if device.type == "cuda" else None
    print(", ".join(f"{key} {value}" for key, value in (environment | versions).items() if value), flush=True)
    if limits:
        print(", ".join(f"{key.replace('_', ' ')} {value:.4g}" for key, value in limits.items()))
    for name, reason in missing.items():
        print(f"without {name}: {reason}")

    errors = errors_of(rows, dtype, device)
    wrong = {name: error for name, error in errors.items() if isinstance(error, str)}
    for name, error in errors.items():
        if name not in wrong and error > TOLERANCE[dtype]:
            wrong[name] = f"not the same scan: relative error {error:.1e}"
    budget = QUICK_BUDGET if options.quick else BUDGET[device.type]
    records = []
    try:
        for case in cases:
            start = time.perf_counter()
            taking_part = [row for row in rows if case.includes(row, device)]
            fresh = measure(case, taking_part, wrong, records, dtype, device, budget)
            for record in fresh:
                if limits:
                    kinds = dict(full=False, tied=True)
                    record["floor"] = {
                        kind: floors(case, tied, dtype, limits) for kind, tied in kinds.items()
                    }
            records += fresh
            print(f"{case.name} L={case.length}: {time.perf_counter() - start:.0f} s", flush=True)
    except (KeyboardInterrupt, RuntimeError) as error:  # a broken CUDA context ends every later run
        wrong["all"] = f"{type(error).__name__}: {error}"
        print(f"stopped by {wrong['all']}\nwhat was measured up to here:")

    growths = {
        row.name: {
            key: growth(records, row.name, key) for key in ("forward", "forward_backward", "peak_bytes")
        }
        for row in rows
    }
    targets = make_targets(records, growths, device, options.quick)
    print("\n".join(report(records, growths, targets, errors, dtype, device, limits)))
    result = dict(
        command=shlex.join(["python", "benchmarks/scan.py", *sys.argv[1:]]),
        versions=versions,
        environment=environment,
        limits=limits,
        without=missing,
        errors=errors,
        targets=[
            dict(what=what, wanted=limit, measured=value, verdict=verdict(limit, value))
            for what, limit, value in targets
        ],
        growth=growths,
        rows=records,
    )
    out, figure = options.out, options.figure
    if options.complete and "all" not in wrong:
        out = out or results_path("scan", options.device)
        figure = figure or ROOT / "figures" / f"scan_{'gpu' if limits else 'cpu'}.png"
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written: {out}")
    if figure and any(r["shape"] == "length" and "peak_bytes" in r for r in records):
        draw_figure(records, figure, f"{environment['device']}, {environment['dtype']}")
        print(f"written: {figure}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
