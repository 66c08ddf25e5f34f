"""Speed, memory and growth of the selective scan: the speed table of seed 002, measured.

    python benchmarks/scan.py [--lengths 128 256 ...] [--backends loop einsum chunked ...] [--out FILE]

Every backend computes the same selective scan (delta, B, C vary along the sequence); this is checked first.
`loop` is one step after another under autograd (the seed's "old" version), `einsum` the seed's "fast" version
with the decay between every pair of positions: B·D·N·L² numbers. Two shapes: `small`, where einsum fits, over
all lengths, and `v1`, a layer of MambaDiffusion, at its own length.

Times are the best of several runs. Memory is the peak of the bytes that tensors beyond the arguments hold
during forward and backward: on a CPU from the record the profiler keeps of allocations, on a GPU from
the CUDA allocator. A growth exponent is the slope of log(value) against log(L) over the four longest lengths.
Ratios are loop's value divided by the row's.
"""

import argparse
import json
import platform
import time
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from nfhelpers import kernels

SHAPES = {"small": dict(batch=1, channels=64, states=16), "v1": dict(batch=8, channels=256, states=16)}
V1_LENGTH = 1228  # 204 observed pixels and the 1024 queries of a 32 x 32 field
ROWS = ("loop", "einsum", *(name for name in kernels.BACKENDS if name != "reference"))


def scan_einsum(u, delta, A, B, C):
    """The scan as one product with the matrix of decays exp(A (S_t - S_s)), s <= t, S = cumsum(delta)."""
    total = delta.cumsum(-1)
    gap = total.unsqueeze(-1) - total.unsqueeze(-2)  # (B, D, L, L)
    future = torch.ones_like(gap[0, 0], dtype=torch.bool).triu(1)
    # Both fills are needed: exp(A gap) of the future would overflow, and its decay must be 0.
    decay = torch.exp(A[:, :, None, None] * gap.masked_fill(future, 0).unsqueeze(2))
    decay = decay.masked_fill(future, 0)  # (B, D, N, L, L)
    x = (delta * u).unsqueeze(2) * B.unsqueeze(1)  # (B, D, N, L)
    return torch.einsum("bdnts,bdns,bnt->bdt", decay, x, C)


def scan_of(name):
    if name == "einsum":
        return scan_einsum
    backend = "reference" if name == "loop" else name
    return lambda *arguments: kernels.selective_scan(*arguments, backend=backend)


def draw(batch, channels, length, states, device):
    """u, delta, A, B, C as a model passes them: transposed views of channels-last tensors."""
    generator = torch.Generator().manual_seed(0)

    def tokens(size):
        return torch.randn(batch, length, size, generator=generator).to(device).transpose(1, 2)

    u, delta, B, C = tokens(channels), tokens(channels), tokens(states), tokens(states)
    A = -torch.arange(1.0, states + 1, device=device).repeat(channels, 1)
    return [x.detach().requires_grad_() for x in (u, torch.nn.functional.softplus(delta - 3), A, B, C)]


def best_time(run, device, budget=1.0, least=3, most=20):
    """Shortest of `least` to `most` runs after a warm-up, in seconds, as `budget` seconds allow."""
    run()
    times = []
    while len(times) < least or (sum(times) < budget and len(times) < most):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(run, device):
    """Most bytes that tensors made by `run` hold at one time."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return int(max(np.cumsum([event.nbytes() for event in events])))


def measure(name, shape, length, device, memory_limit):
    """One row: times in seconds and peak bytes, or the reason why it was skipped."""
    sizes = SHAPES[shape]
    row = dict(backend=name, shape=shape, length=length, **sizes)
    decay = 4 * length**2 * sizes["batch"] * sizes["channels"] * sizes["states"]
    if name == "einsum" and 4 * decay > memory_limit * 2**30:  # autograd keeps two of them and makes two more
        return row | dict(skipped=f"a decay matrix takes {decay / 2**30:.3g} GiB")
    arguments = draw(length=length, device=device, **sizes)
    grad = torch.randn(sizes["batch"], length, sizes["channels"], device=device).transpose(1, 2)
    scan = scan_of(name)

    def forward():
        with torch.no_grad():
            scan(*arguments)

    def forward_backward():
        torch.autograd.grad(scan(*arguments), arguments, grad)

    return row | dict(
        forward=best_time(forward, device),
        forward_backward=best_time(forward_backward, device),
        peak_bytes=peak_bytes(forward_backward, device),
    )


def agreement(names, device, length=64):
    """Worst relative error of output and gradients against the float64 loop; a wrong backend is an error."""
    arguments = draw(length=length, device=device, **SHAPES["small"])

    def results(scan, inputs):
        output = scan(*inputs)
        return [output, *torch.autograd.grad(output.sum(), inputs)]

    wanted = results(scan_of("loop"), [x.detach().double().requires_grad_() for x in arguments])
    errors = {}
    for name in names:
        found = results(scan_of(name), arguments)
        errors[name] = max(kernels.relative_error(y, x) for x, y in zip(wanted, found, strict=True))
    wrong = {name: error for name, error in errors.items() if error > 1e-4}
    if wrong:
        raise RuntimeError(f"relative errors above 1e-4, not the same scan: {wrong}")
    return errors


def growth(rows, name, key):
    """Exponent over the four longest lengths of one shape; None where fewer than three were measured."""
    points = [(row["length"], row[key]) for row in rows if row["backend"] == name and key in row]
    points = sorted(points)[-4:]
    if len(points) < 3:
        return None
    return float(np.polyfit(*np.log(np.array(points)).T, 1)[0])


def print_table(rows, growths):
    heads = ("forward", "fwd+bwd", "peak", "time ratio", "memory ratio")
    print(f"{'shape':6}{'L':>7} {'backend':10}" + "".join(f"{head:>14}" for head in heads))
    loops = {(row["shape"], row["length"]): row for row in rows if row["backend"] == "loop"}
    for row in rows:
        line = f"{row['shape']:6}{row['length']:7d} {row['backend']:10}"
        if "skipped" in row:
            print(f"{line}  skipped: {row['skipped']}")
            continue
        line += f"{row['forward'] * 1e3:11.1f} ms{row['forward_backward'] * 1e3:11.1f} ms"
        line += f"{row['peak_bytes'] / 2**20:10.1f} MiB"
        loop = loops.get((row["shape"], row["length"]))
        if loop is not None:
            line += "".join(f"{loop[key] / row[key]:14.2f}" for key in ("forward_backward", "peak_bytes"))
        print(line)
    print("\ngrowth with L (exponent)" + "".join(f"{head:>14}" for head in heads[:3]))
    for name, values in growths.items():
        cells = ("-" if value is None else f"{value:.2f}" for value in values.values())
        print(f"{name:24}" + "".join(f"{cell:>14}" for cell in cells))


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256, 512, 1024, 2048, 4096])
    parser.add_argument("--backends", nargs="+", choices=ROWS, help="default: every one that can be used")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--memory-limit", type=float, default=3.0, help="GiB that einsum may take (default 3)"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "scan.json")
    options = parser.parse_args()

    device = torch.device(options.device)
    status = kernels.backend_status() | dict(loop="ok", einsum="ok")
    names = options.backends or [name for name in ROWS if status[name] == "ok"]
    environment = dict(torch=torch.__version__, device=device_name(device), threads=torch.get_num_threads())
    print(", ".join(f"{key} {value}" for key, value in environment.items()))
    for name in ROWS:
        if status[name] != "ok":
            print(f"without {name}: {status[name]}")
    errors = agreement(names, device)

    cases = [("small", length) for length in sorted(options.lengths)] + [("v1", V1_LENGTH)]
    rows = [measure(name, *case, device, options.memory_limit) for case in cases for name in names]
    small = [row for row in rows if row["shape"] == "small"]
    keys = ("forward", "forward_backward", "peak_bytes")
    growths = {name: {key: growth(small, name, key) for key in keys} for name in names}
    print_table(rows, growths)

    options.out.parent.mkdir(parents=True, exist_ok=True)
    result = dict(environment=environment, errors=errors, growth=growths, rows=rows)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
