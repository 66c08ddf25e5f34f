"""Training steps of every model: images a second, peak memory, the scan's share, against the seeds' scans.

    python benchmarks/train_step.py [--quick] [--preset full] [--models v1 field] [--device cuda] [--out FILE]

A step is that of `train.fit`: loss, backward, clipping, AdamW, average of the weights; models are those of
presets.toml (demo on a CPU, full on a GPU), float32 on a CPU and bfloat16 autocast on a GPU. A field has
204 observed pixels and 1,024 queries, a 32 x 32 grid, which are the 1,228 tokens of seed 002. The same model,
with the same weights, is run with other scans:

    the backend that the library picks here; with CUDA graphs, on a GPU where the preset has them; compiled,
                         on a GPU or with --compile, and with the graphs if there are any
    chunked, mamba_ssm   other backends, where they work
    loop                 one step after another under autograd (the seed's "old" version)
    einsum               the decay between every pair of positions (the seed's "fast" version): O(L^2)
    none                 the scan left out: u times delta in its place, what everything else costs

The scan's share of a step is 1 - none / step, with the graphs if there are any. einsum's matrices are
computed in blocks of samples and channels that fit BLOCK_BYTES, and, where there are several blocks, again in
the backward pass, or they would need a hundred gigabytes; it is run once, at batch 1, beside the library's
scan and the loop at batch 1. The larger the batch, the smaller a loop's part: its cost is mostly the steps,
everything else grows.

`growth` follows the time of a step over the side of the queried field, the batch and the layers, as exponents
of the last doubling. `waiting` runs `train.fit` itself on the preset's data, and says which part of the time
training waited for the data loader: on a GPU at most, as the device may compute meanwhile.

Ratios are what a CPU's table is for; on a GPU times are absolute. The shortest of several runs counts. JSON
goes to benchmarks/results when all was measured at full size, else only where --out says.
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
from types import SimpleNamespace

import scan
import torch
import torch.nn.functional as F
from diffusers.training_utils import EMAModel
from torch.utils.checkpoint import checkpoint

from nfhelpers import __main__ as command_line
from nfhelpers import evaluate, kernels, models, run, train
from nfhelpers.images import grid_coords
from nfhelpers.kernels.orders import inverse_order
from nfhelpers.kernels.reference import state_rates
from nfhelpers.models import local_mamba, ssm

MODELS = ("v1", "multidir", "v2", "field", "local", "diffae_phase1", "diffae_phase2", "localmamba")
GROWING = ("v1", "multidir", "v2", "field")  # models of `growth`
INPUTS, SIDE = 204, 32
QUICK_SIDE = 4
BLOCK_BYTES = {"cpu": 2**28, "cuda": 2**33}
EINSUM_LIMIT = {"cpu": 5e9, "cuda": 1e12}  # entries of the decay matrices of a step that are waited for
BUDGET = 3.0  # seconds of the repeated runs of one row
WAITING_STEPS = 60


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


def einsum_in_blocks(u, delta, A, B, C, D, bias):
    """`scan.scan_einsum` in blocks of samples and channels; several blocks are recomputed in the backward."""
    batch, channels, length = u.shape
    width = max(1, int(BLOCK_BYTES[u.device.type] / (16 * A.shape[1] * length**2)))  # four float32 matrices
    if width >= batch * channels:
        return scan.scan_einsum(u, delta, A, B, C, D, bias)
    parts = [x.split(width, 1) for x in (u, delta)], [x.split(width) for x in (A, D, bias)]
    outputs = []
    for u_part, delta_part, A_part, D_part, bias_part in zip(*parts[0], *parts[1], strict=True):
        samples = zip(*(x.split(1) for x in (u_part, delta_part, B, C)), strict=True)
        rows = [
            checkpoint(scan.scan_einsum, *row[:2], A_part, *row[2:], D_part, bias_part, use_reentrant=False)
            for row in samples
        ]
        outputs.append(torch.cat(rows))
    return torch.cat(outputs, 1)


DECAYS = []
"""Of each scan that was left out: how many entries the decay matrices of einsum have."""


def without_selective(u, delta, A, B, C, D, z, delta_bias, delta_softplus, tied_decay):
    DECAYS.append(u.numel() * u.shape[2] * B.shape[1])
    return u * delta * F.silu(z)


def without_directional(x, delta, A, B, *arguments, **options):
    DECAYS.append(delta.numel() * delta.shape[2] * B.shape[3])
    return (x if x.dim() == 4 else x[:, None]) * delta


PLAIN = {
    "loop": (plain_selective(scan.scan_loop), plain_directional(scan.scan_loop)),
    "einsum": (plain_selective(einsum_in_blocks), plain_directional(einsum_in_blocks)),
    "none": (without_selective, without_directional),
}


@contextlib.contextmanager
def scanning(name):
    """Inside, models scan by this backend of the library, or by this entry of PLAIN."""
    before = ssm.selective_scan, ssm.directional_scan, local_mamba.directional_scan
    backend = os.environ.get("NF_SCAN_BACKEND")
    if name in PLAIN:
        ssm.selective_scan, ssm.directional_scan = PLAIN[name]
        local_mamba.directional_scan = PLAIN[name][1]
    else:
        os.environ["NF_SCAN_BACKEND"] = name
    try:
        yield
    finally:
        ssm.selective_scan, ssm.directional_scan, local_mamba.directional_scan = before
        os.environ.pop("NF_SCAN_BACKEND", None)
        if backend is not None:
            os.environ["NF_SCAN_BACKEND"] = backend


# ------------------------------------------------------------------------------------------------ the models


def make_model(name, preset, **changes):
    """A model of presets.toml with random weights; changes: of its settings."""
    torch.manual_seed(0)
    if name == "local":
        settings = run.load_settings("v1", preset)["model"]
        keys = ("d_model", "num_heads", "num_fourier_features", "fourier_scale")
        return models.LocalImplicitField(
            models.LocalImplicitFieldConfig(**{key: settings[key] for key in keys}, **changes)
        )
    if name == "diffae_phase2":
        with tempfile.TemporaryDirectory() as folder:
            make_model("diffae_phase1", preset).save_pretrained(folder)
            return models.second_phase(folder)
    settings = run.load_settings(name, preset)["model"] | changes
    model = command_line.build_model(name, preset, settings, None)
    with torch.no_grad():  # layers that start at zero would hide a scan that is not the same
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    return model


def field_batch(batch, side, device):
    """Observed pixels of a 32 x 32 field and all pixels of one of this side, as models take them.

    A field of QUICK_SIDE has as few observed pixels as queries.
    """
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


def make_step(model, batch_size, side, device, bf16, compiled=False, graph=False):
    """A function that does one training step of the model, as `train.fit` does it."""
    model = model.to(device).train()
    network = torch.compile(model, dynamic=False) if compiled else model
    if isinstance(model, models.LocalMamba2D):
        task = train._GridTask(model)
        batch = evaluate.grid_batch(model.config, side, batch_size)
        batch = {key: value.to(device) for key, value in batch.items()}
    else:
        task = train._FieldTask()
        batch = field_batch(batch_size, side, device)
    generator = torch.Generator().manual_seed(0)
    data = batch[task.data]
    draws = {
        "t": torch.rand(batch_size, generator=generator).to(device),
        "noise": torch.randn(data.shape, generator=generator).to(device),
    }
    config = train.TrainConfig(
        "unused",
        epochs=1,
        learning_rate=1e-6,
        warmup_fraction=0.0,
        precision="bf16" if bf16 else "fp32",
        cuda_graphs=graph,
        cpu=device.type == "cpu",
    )
    accelerator = train._accelerator(config)
    optimizer = torch.optim.AdamW(train._parameter_groups(model, config.weight_decay), fused=True)
    objective, prepared = accelerator.prepare(train._Objective(network, task), optimizer)
    like_fit = SimpleNamespace(
        config=config,
        model=model,
        objective=objective,
        optimizer=optimizer,
        prepared=prepared,
        ema=EMAModel(train._trained(model).values(), decay=config.ema_decay, foreach=True),
        accelerator=accelerator,
        graphs=train._graphs(config, accelerator),
        progress=train._Progress(),
        steps_per_epoch=10**9,  # the learning rate stays what it is
        unread=None,
    )
    slices = [train._Slice([], batch, draws)]

    def step():
        train._update(like_fit, slices, train._accumulate(like_fit, slices))
        like_fit.unread.wait()

    return step


# ------------------------------------------------------------------------------------------------- measuring


def measure(step, device, budget, once=False):
    """Seconds and peak bytes of a step."""
    if once:
        start = time.perf_counter()
        memory = evaluate.peak_bytes(step, device)
        return {"seconds": time.perf_counter() - start, "memory": memory}
    seconds = evaluate.best_seconds(step, device, repeats=20, budget=budget)
    return {"seconds": seconds, "memory": evaluate.peak_bytes(step, device)}


def measure_steps(name, options):
    """Rows of one model: every scan at the preset's batch, and einsum beside the library's at batch 1."""
    device, preset = options.device, options.preset
    chosen = kernels.choose_backend(device)
    batch = options.batch or preset_batch(name, preset)
    side = options.side if name != "localmamba" else run.load_settings(name, preset)["data"]["size"]
    settings = run.load_settings("v1" if name == "local" else name, preset)["train"]
    graph = " graph" * (device.type == "cuda" and settings["cuda_graphs"])
    scans = [(chosen, batch), ("none" + graph, batch)]
    if name != "local":
        works = [other for other, status in kernels.backend_status().items() if status == "ok"]
        others = [other for other in ("chunked", "mamba_ssm") if other in works and other != chosen]
        scans += [(other, batch) for other in (*others, "loop")] + [(chosen, 1), ("loop", 1), ("einsum", 1)]
    else:
        scans = scans[:1]
    if options.compile:
        scans.insert(1, (f"{chosen} compiled{graph}", batch))
    if graph:
        scans.insert(1, (chosen + graph, batch))
    rows = []
    for scan_name, size in scans:
        row = {
            "model": name, "scan": scan_name, "batch": size, "side": side, "seconds": None, "memory": None,
            "note": "",
        }  # fmt: skip
        rows.append(row)
        backend, *how = scan_name.split()
        model = make_model(name, preset)
        step = make_step(model, size, side, device, options.bf16, "compiled" in how, "graph" in how)
        try:
            if backend == "einsum":
                DECAYS.clear()
                with scanning("none"):
                    step()
                if sum(DECAYS) > EINSUM_LIMIT[device.type]:
                    row["note"] = f"{sum(DECAYS):.1e} decays, left out"
                    continue
            with scanning(backend):
                row |= measure(step, device, options.budget, once=backend == "einsum")
            if "graph" in how:  # whose memory was taken when it was captured
                row["memory"] = None
        except RuntimeError as error:
            if not train._is_out_of_memory(error):
                raise
            row["note"] = "out of memory"
        finally:
            del model, step
            torch.cuda.empty_cache()  # libraries such as cuSOLVER take memory of their own
        milliseconds = cell(row["seconds"] and row["seconds"] * 1e3, "{:.1f} ms")
        print(f"{name}, {scan_name}, batch {size}: {milliseconds} {row['note']}", flush=True)
    add_ratios(rows)
    return [row for row in rows if row["scan"].split()[0] != "none"]


def add_ratios(rows):
    """images_per_second, share of the scan, speed against the first row of the same batch, and at_most: what
    that speed would be if the first row's scan took no time at all."""
    without = next((row for row in rows if row["scan"].split()[0] == "none"), None)
    for row in rows:
        seconds = row["seconds"]
        first = next(other for other in rows if other["batch"] == row["batch"])["seconds"]
        row["images_per_second"] = seconds and row["batch"] / seconds
        row["slower"] = seconds and first and seconds / first
        at_batch = without and without["seconds"] and seconds and row["batch"] == without["batch"]
        row["at_most"] = seconds / without["seconds"] if at_batch else None
        # Where the launches take longer than the kernels, the scan's share cannot be seen.
        alike = at_batch and row["scan"].split()[1:] == without["scan"].split()[1:]
        row["share"] = 1 - without["seconds"] / seconds if alike else None


def preset_batch(name, preset):
    """The batch size of a model's preset."""
    return run.load_settings("v1" if name == "local" else name, preset)["train"]["batch_size"]


def measure_growth(name, options):
    """Seconds and memory of a step over side, batch and layers, one changed at a time."""
    layers = run.load_settings(name, options.preset)["model"]["num_layers"]
    base = {"side": options.side, "batch": options.growth_batches[0], "layers": layers}
    plans = [
        *({**base, "of": "side", "side": side} for side in options.growth_sides),
        *({**base, "of": "batch", "batch": batch} for batch in options.growth_batches),
        *({**base, "of": "layers", "layers": factor * layers} for factor in (1, 2, 4)),
    ]
    rows = []
    for plan in plans:
        model = make_model(name, options.preset, num_layers=plan["layers"])
        step = make_step(model, plan["batch"], plan["side"], options.device, options.bf16)
        row = {"model": name, **plan, "seconds": None, "memory": None}
        rows.append(row)
        try:
            row |= measure(step, options.device, options.budget)
        except torch.OutOfMemoryError:
            pass
        del model, step
        torch.cuda.empty_cache()
    return rows


def exponent(rows, key):
    """Slope of log(value) against log(what was changed) over the last two rows; None where one is missing."""
    what = {"side": lambda row: row["side"] ** 2 + INPUTS}.get(rows[0]["of"], lambda row: row[row["of"]])
    (x0, y0), (x1, y1) = ((what(row), row[key]) for row in rows[-2:])
    return math.log(y1 / y0) / math.log(x1 / x0) if y0 and y1 else None


def measure_waiting(name, options):
    """Which part of the time `train.fit` waits for its data loader, on the preset's data."""
    settings = run.load_settings(name, options.preset)
    data, batch = settings["data"], settings["train"]["batch_size"]
    data["train_images"] = min(data["train_images"], batch * options.waiting_steps)
    data["validation_images"] = min(data["validation_images"], batch)
    if options.data and name != "localmamba":
        data["source"] = options.data
    datasets = command_line.load_datasets(name, data, 0)
    waited, total = [], []
    loading = train._from_workers

    def timed(*arguments):
        batches = loading(*arguments)
        while True:
            start = time.perf_counter()
            item = next(batches, None)
            waited.append(time.perf_counter() - start)
            if item is None:
                return
            yield item

    epoch = train._train_epoch

    def timed_epoch(*arguments):
        start = time.perf_counter()
        result = epoch(*arguments)
        total.append((time.perf_counter() - start, sum(waited)))
        waited.clear()
        return result

    changes = {"epochs": 2, "evaluate_every": 2, "visualise_every": 3, "save_every": 3}
    with tempfile.TemporaryDirectory() as folder:
        config = train.TrainConfig(
            folder,
            **settings["train"] | changes,
            precision="bf16" if options.bf16 else "fp32",
            cpu=options.device.type == "cpu",
            progress=False,
        )
        train._from_workers, train._train_epoch = timed, timed_epoch
        try:
            train.fit(make_model(name, options.preset), datasets, config)
        finally:
            train._from_workers, train._train_epoch = loading, epoch
    seconds, waiting = total[-1]  # the first epoch compiles kernels
    steps = len(datasets[0]) // batch
    return {
        "model": name, "source": data["source"], "workers": config.num_workers, "steps": steps,
        "seconds": seconds / steps, "waiting": waiting / seconds,
    }  # fmt: skip


# --------------------------------------------------------------------------------------------------- results


def cell(value, form="{:.3g}"):
    return "-" if value is None else form.format(value)


def report(steps, growth, waiting, targets):
    """The tables as text."""
    head = ["model", "scan", "batch", "images/s", "ms a step", "x time", "peak MiB", "scan's share", ""]
    lines = [
        [
            row["model"],
            row["scan"],
            str(row["batch"]),
            cell(row["images_per_second"], "{:.1f}"),
            cell(row["seconds"] and row["seconds"] * 1e3, "{:.1f}"),
            cell(row["slower"], "{:.2f}"),
            cell(row["memory"] and row["memory"] / 2**20, "{:.0f}"),
            cell(row["share"], "{:.0%}"),
            row["note"],
        ]
        for row in steps
    ]
    parts = [evaluate.align(head, lines, 2)]
    if growth:
        lines = []
        for name in dict.fromkeys(row["model"] for row in growth):
            for of in ("side", "batch", "layers"):
                rows = [row for row in growth if (row["model"], row["of"]) == (name, of)]
                values = " ".join(
                    f"{row[of]}: {cell(row['seconds'] and row['seconds'] * 1e3, '{:.0f}')}" for row in rows
                )
                slopes = [cell(exponent(rows, key), "{:.2f}") for key in ("seconds", "memory")]
                lines.append([name, of, values, *slopes])
        head = ["model", "over", "ms a step", "time grows", "memory grows"]
        parts.append(evaluate.align(head, lines, 3))
    if waiting:
        head = ["model", "data", "workers", "steps", "ms a step", "waiting for data"]
        lines = [
            [
                row["model"],
                row["source"],
                str(row["workers"]),
                str(row["steps"]),
                f"{row['seconds'] * 1e3:.1f}",
                f"{row['waiting']:.1%}",
            ]
            for row in waiting
        ]
        parts.append(evaluate.align(head, lines, 2))
    lines = [[what, wanted, cell(value), verdict(value, wanted)] for what, wanted, value in targets]
    parts.append(evaluate.align(["target", "wanted", "measured", ""], lines, 1))
    return "\n\n".join(parts)


def verdict(value, wanted):
    return "not measured" if value is None else "met" if value >= float(wanted.split()[1]) else "missed"


def make_targets(steps, quick):
    """The issue's ratios of v1: (what, limit, measured or None); quick measures none of them."""
    rows = [row for row in steps if row["model"] == "v1" and not quick]
    targets = []
    for name, where, wanted, single in (
        ("loop", "preset's batch", ">= 5", False),
        ("loop", "batch 1", ">= 5", True),
        ("einsum", "batch 1", ">= 2", True),
    ):
        row = next((row for row in rows if row["scan"] == name and (row["batch"] == 1) == single), {})
        what = f"v1: step with {name} / step, {where}"
        if row.get("at_most"):
            what += f" ({row['at_most']:.1f} without any scan)"
        targets.append((what, wanted, row.get("slower")))
    return targets


def parse(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default=run.default_device().type)
    parser.add_argument("--preset", choices=run.PRESETS, help="default: full on a GPU, else demo")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--tables", nargs="+", choices=("steps", "growth", "waiting"))
    parser.add_argument("--batch", type=int, help="default: the preset's")
    parser.add_argument("--data", help="source of the images of `waiting` (default: the preset's)")
    parser.add_argument("--compile", action="store_true", help="also compile the models (always on a GPU)")
    parser.add_argument("--quick", action="store_true", help="preset smoke and small fields, in seconds")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/train-step-<device>.json")
    options = parser.parse_args(arguments)
    options.device = torch.device(options.device)
    cuda = options.device.type == "cuda"
    complete = not (options.quick or options.tables or options.preset or options.batch)
    if options.out is None and complete and set(options.models) == set(MODELS):
        options.out = scan.results_path("train-step", options.device)
    options.tables = options.tables or ("steps", "growth", "waiting")
    options.compile = options.compile or cuda
    options.bf16 = run.default_precision(options.device) == "bf16"
    options.preset = options.preset or ("smoke" if options.quick else "full" if cuda else "demo")
    options.side = QUICK_SIDE if options.quick else SIDE
    options.growth_sides = (16, 32, 64, 96, 128) if cuda else (16, 32, 64)
    options.growth_batches = (16, 32, 64, 128) if cuda else (2, 4, 8)
    options.waiting_steps, options.budget = WAITING_STEPS, BUDGET
    if options.quick:
        options.growth_sides, options.growth_batches = (3, QUICK_SIDE), (1, 2)
        options.waiting_steps, options.budget = 2, 0.02
    return options


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    threads = torch.get_num_threads()
    print(f"{scan.device_name(options.device)}, {threads} threads, preset {options.preset}", flush=True)
    command = shlex.join(["python", "benchmarks/train_step.py", *arguments])
    config = {"preset": options.preset, "threads": threads, "bf16": options.bf16, "inputs": INPUTS}
    steps, growth, waiting = [], [], []
    for name in options.models:
        start = time.perf_counter()
        if "steps" in options.tables:
            steps += measure_steps(name, options)
        if "growth" in options.tables and name in GROWING:
            growth += measure_growth(name, options)
        if "waiting" in options.tables and name != "local":
            waiting.append(measure_waiting(name, options))
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
        if options.out:  # after each model: a run that is cut off keeps what it has
            rows = [
                {"table": table, **row}
                for table, part in (("steps", steps), ("growth", growth), ("waiting", waiting))
                for row in part
            ]
            evaluate.write_results(rows, options.out, command=command, config=config)
    print()
    print(report(steps, growth, waiting, make_targets(steps, options.quick)))
    if options.out:
        print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
