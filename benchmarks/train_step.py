"""Training steps of every model: milliseconds, images a second, peak memory, beside other scans.

    python benchmarks/train_step.py [--quick] [--preset full] [--models v1 field] [--device cuda] [--out FILE]

`train.fit` itself runs, on points that lie ready in memory, and its epochs are timed; the first one, which
compiles kernels, does not count. Models are those of presets.toml (demo on a CPU, full on a GPU), float32 on
a CPU and bfloat16 on a GPU. A field has 204 observed pixels and the 1,024 queries of a 32 x 32 grid. The same
model runs with other scans:

    the backend that the library picks; with CUDA graphs and compiled on a GPU, where the model takes them
    chunked, mamba_ssm   other backends, where they work
    loop                 one step after another under autograd
    einsum               the decay between every pair of positions, O(L^2); once, at batch 1
    none                 the scan left out: what everything else costs

Ratios are what a CPU's table is for; on a GPU times are absolute.
"""

import argparse
import contextlib
import math
import os
import shlex
import sys
import tempfile
import time
from pathlib import Path

import common
import scan
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from nfhelpers import kernels, models, run, train
from nfhelpers.images import grid_coords
from nfhelpers.kernels.orders import inverse_order
from nfhelpers.kernels.reference import state_rates
from nfhelpers.models import ssm

MODELS = ("v1", "multidir", "v2", "field", "diffae_phase1", "diffae_phase2", "localmamba")
INPUTS, SIDE, QUICK_SIDE = 204, 32, 4
EINSUM_LIMIT = {"cpu": 5e9, "cuda": 1e12}  # entries of the decay matrices of a step that are waited for


# ------------------------------------------------------------------------------------------------ the scans


def plain_selective(scan_fn):
    """A plain scan of scan.py in place of `selective_scan`, as the models call it."""

    def selective(u, delta, A, B, C, D, z, delta_bias, delta_softplus, tied_decay):
        A = state_rates(A, B.shape[1]) if tied_decay else A
        return scan_fn(u, delta, A, B, C, D, delta_bias) * F.silu(z)

    return selective


def plain_directional(scan_fn):
    """A plain scan in place of `directional_scan`: one direction after another, on permuted copies."""

    def directional(x, delta, A, B, C, D, *, orders, delta_bias, reverse, tied_decay=False):
        batch, directions, length, channels = delta.shape
        A = state_rates(A, B.shape[-1]) if tied_decay else A
        orders = orders.expand(batch, directions, length)
        outputs = []
        for k in range(directions):
            order = orders[:, k].flip(1) if reverse[k] else orders[:, k]  # (B, L)

            def walked(tokens, order=order):
                return tokens.gather(1, order[..., None].expand_as(tokens)).transpose(1, 2)

            y = scan_fn(
                walked(x), walked(delta[:, k]), A[k], walked(B[:, k]), walked(C[:, k]), D[k], delta_bias[k]
            )
            back = inverse_order(order)[..., None].expand(batch, length, channels)
            outputs.append(y.transpose(1, 2).gather(1, back))
        return torch.stack(outputs, 1)  # (B, K, L, D)

    return directional


DECAYS = []  # of each scan that was left out: how many entries the decay matrices of einsum have


def without_selective(u, delta, A, B, C, D, z, delta_bias, delta_softplus, tied_decay):
    DECAYS.append(u.numel() * u.shape[2] * B.shape[1])
    return u * delta * F.silu(z)


def without_directional(x, delta, A, B, *arguments, **options):
    DECAYS.append(delta.numel() * delta.shape[2] * B.shape[3])
    return (x if x.dim() == 4 else x[:, None]) * delta


PLAIN = {
    "loop": (plain_selective(scan.scan_loop), plain_directional(scan.scan_loop)),
    "einsum": (plain_selective(scan.scan_einsum), plain_directional(scan.scan_einsum)),
    "none": (without_selective, without_directional),
}


@contextlib.contextmanager
def scanning(name):
    """Inside, models scan by this backend of the library, or by this entry of PLAIN."""
    before = ssm.selective_scan, ssm.directional_scan
    backend = os.environ.get("NF_SCAN_BACKEND")
    if name in PLAIN:
        ssm.selective_scan, ssm.directional_scan = PLAIN[name]
    else:
        os.environ["NF_SCAN_BACKEND"] = name
    try:
        yield
    finally:
        ssm.selective_scan, ssm.directional_scan = before
        os.environ.pop("NF_SCAN_BACKEND", None)
        if backend is not None:
            os.environ["NF_SCAN_BACKEND"] = backend


# --------------------------------------------------------------------------------------- models and batches


def make_model(name, preset, **changes):
    """A model of presets.toml with random weights."""
    torch.manual_seed(0)
    if name == "diffae_phase2":
        return models.second_phase(make_model("diffae_phase1", preset))
    kind, config = models.FIELD_MODELS.get(
        name.removesuffix("_phase1"), (models.LocalMamba2D, models.LocalMamba2DConfig)
    )
    model = kind(config(**run.load_settings(name, preset)["model"] | changes))
    with torch.no_grad():  # layers that start at zero would hide a scan that is not the same
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    return model


def field_batch(batch, side, device="cpu"):
    """Observed pixels of a 32 x 32 field and all pixels of one of this side, as models take them."""
    generator = torch.Generator().manual_seed(0)
    grid = grid_coords(SIDE, SIDE)
    count = INPUTS if side > QUICK_SIDE else side**2
    observed = torch.stack([torch.randperm(len(grid), generator=generator)[:count] for _ in range(batch)])
    inputs = grid[observed.sort(dim=1).values]  # (B, Ni, 2)
    queries = grid_coords(side, side).expand(batch, -1, -1)  # (B, side^2, 2)
    tensors = {
        "input_coords": inputs,
        "input_values": torch.rand(*inputs.shape[:2], 3, generator=generator) * 2 - 1,
        "query_coords": queries,
        "query_values": torch.rand(*queries.shape[:2], 3, generator=generator) * 2 - 1,
    }
    return {key: tensor.to(device) for key, tensor in tensors.items()}


def grid_batch(config, batch, side):
    """Square grids of noise, as a `LocalMamba2D` is trained on."""
    generator = torch.Generator().manual_seed(0)
    grids = torch.randn(batch, config.channels, side, side, generator=generator)
    return {"spectrograms": grids, "labels": torch.arange(batch) % max(1, config.num_classes)}


class Ready(Dataset):
    """Items of a batch, again and again."""

    def __init__(self, batch, steps):
        self.batch, self.size, self.steps = batch, len(next(iter(batch.values()))), steps

    def __len__(self):
        return self.size * self.steps

    def __getitem__(self, index):
        return {name: tensor[index % self.size] for name, tensor in self.batch.items()}


# ------------------------------------------------------------------------------------------------- measuring


def measure(name, how, batch_size, options):
    """Seconds and peak bytes of a step of `train.fit`."""
    backend, *extra = how.split()
    device, preset = options.device, options.preset
    model = make_model(name, preset)
    settings = run.load_settings(name, preset)
    if name == "localmamba":
        batch = grid_batch(model.config, batch_size, settings["data"]["size"])
    else:
        batch = field_batch(batch_size, QUICK_SIDE if options.quick else SIDE)
    steps = 1 if backend == "einsum" or options.quick else options.steps
    ends = []
    with tempfile.TemporaryDirectory() as folder, scanning(backend):
        config = train.TrainConfig(
            folder,
            epochs=3,
            batch_size=batch_size,
            learning_rate=1e-6,
            vary_queries=False,
            precision="bf16" if device.type == "cuda" else "fp32",
            compile="compiled" in extra,
            cuda_graphs="graph" in extra,
            save_interval=math.inf,
            cpu=device.type == "cpu",
            progress=False,
        )
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with contextlib.redirect_stdout(sys.stderr):
            train.fit(model, Ready(batch, steps), config, lambda *state: ends.append(time.perf_counter()))
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    seconds = min(b - a for a, b in zip(ends, ends[1:], strict=False)) / steps
    return {"seconds": seconds, "peak_bytes": peak}


def too_many_decays(name, options):
    """Whether einsum's matrices of one step at batch 1 have too many entries to wait for."""
    DECAYS.clear()
    model = make_model(name, options.preset).to(options.device)
    batch = field_batch(1, QUICK_SIDE if options.quick else SIDE, options.device)
    with scanning("none"), torch.no_grad():
        t = torch.full((1,), 0.5, device=options.device)
        model(batch["query_values"], batch["query_coords"], t, batch["input_coords"], batch["input_values"])
    return sum(DECAYS) > EINSUM_LIMIT[options.device.type]


def rows_of(name, options):
    """Rows of one model: every scan at the preset's batch, loop and einsum at batch 1, too."""
    chosen, cuda = kernels.choose_backend(options.device), options.device.type == "cuda"
    settings = run.load_settings(name, options.preset)["train"]
    size = options.batch or settings["batch_size"]
    works = [other for other, status in kernels.backend_status().items() if status == "ok"]
    graph = " graph" if cuda and settings["cuda_graphs"] else ""
    plans = [(chosen, size), ("none", size)]
    plans += [(f"{chosen} graph", size), (f"{chosen} compiled graph", size)] if graph else []
    plans += [(other, size) for other in ("chunked", "mamba_ssm") if other in works and other != chosen]
    plans += [("loop", size), (chosen, 1), ("loop", 1)]
    if name != "localmamba" and not too_many_decays(name, options):
        plans += [("einsum", 1)]
    rows = []
    for how, batch_size in plans:
        if options.scans and how not in options.scans:
            continue
        row = {"model": name, "scan": how, "batch": batch_size}
        try:
            row |= measure(name, how, batch_size, options)
            row |= {"ms": 1e3 * row["seconds"], "images/s": batch_size / row["seconds"]}
        except torch.OutOfMemoryError:
            row["note"] = "out of memory"
        first = next((r for r in rows if r["batch"] == batch_size), row)
        if row.get("seconds") and first.get("seconds"):
            row["x time"] = row["seconds"] / first["seconds"]
        rows.append(row)
        print(f"{name}, {how}, batch {batch_size}: {row.get('ms', math.nan):.1f} ms", flush=True)
    return rows


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", type=torch.device, default=run.default_device())
    parser.add_argument("--preset", choices=run.PRESETS, help="default: full on a GPU, else demo")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--scans", nargs="+", help="only these rows, such as native loop")
    parser.add_argument("--batch", type=int, help="default: the preset's")
    parser.add_argument(
        "--steps", type=int, default=10, help="of an epoch that is timed (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="preset smoke and small fields, in seconds")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    options = parser.parse_args(arguments)
    cuda = options.device.type == "cuda"
    options.preset = options.preset or ("smoke" if options.quick else "full" if cuda else "demo")
    print(
        f"{scan.device_name(options.device)}, {torch.get_num_threads()} threads, preset {options.preset}",
        flush=True,
    )
    rows = []
    for name in options.models:
        rows += rows_of(name, options)
        if options.out:  # after each model: a run that is cut off keeps what it has
            command = shlex.join(["python", "benchmarks/train_step.py", *arguments])
            common.write_results(rows, options.out, command, preset=options.preset)
    common.show(rows, ["model", "scan", "batch"])


if __name__ == "__main__":
    main()
