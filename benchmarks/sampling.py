"""A sampling run of every model by every sampler: queries a second, and the scan's share.

    python benchmarks/sampling.py [--quick] [--preset full] [--models v1] [--samplers heun] [--device cuda]
    python benchmarks/sampling.py --checkpoints checkpoints/field-photos [--sides 32 96] [--samplers heun]

Models are those of presets.toml with random weights (demo on a CPU, full on a GPU), float32, which a GPU
multiplies as TF32 (`run.allow_tf32`) unless NVIDIA_TF32_OVERRIDE=0 forbids it. A field has 204
observed pixels and 1,024 queries; localmamba samples grids of its preset's size, where a query is a pixel.
`mean` is the posterior mean in one evaluation, which is all that diffae_phase1 has. The scan's share is 1 -
(time with the scan left out) / time; `loop` is the time with the seed's scan, one step after another, over
the time here; both are measured in the first row of a model, none of them launched as a CUDA graph
(`samplers.launched_at_once`), as the runs of v1, v2 and localmamba are on a GPU. With
--checkpoints, trained models reconstruct test photos of these sides from a fifth of their pixels instead, as
the widgets do, and the scan's share is not measured. The shortest of several runs counts. JSON goes to
benchmarks/results when all was measured at full size, else only where --out says.
"""

import argparse
import math
import shlex
import sys
import time
from pathlib import Path
from unittest import mock

import scan
import torch
from train_step import (
    MODELS,
    QUICK_SIDE,
    SIDE,
    cell,
    field_batch,
    make_model,
    scanning,
)

from nfhelpers import evaluate, images, kernels, models, run, samplers
from nfhelpers.models import local_mamba

MEAN = "mean"
STEPS = 10
BUDGET = 3.0


def count_evaluations(sampler, steps):
    """Evaluations of the network in one run."""
    if sampler == MEAN:
        return 1
    return steps * samplers.EVALUATIONS[sampler] - (sampler in ("heun", "sde"))  # the last step is Euler's


def make_sampling(model, sampler, steps, batch, side, device):
    """A function that runs the sampler once, and how many queries and evaluations of the network it takes."""
    evaluations = count_evaluations(sampler, steps)
    if isinstance(model, models.LocalMamba2D):
        labels = torch.arange(batch, device=device) % model.config.num_classes

        def grids():
            generator = torch.Generator().manual_seed(0)
            local_mamba.sample_grids(
                model, batch, side, side, labels=labels, method=sampler, steps=steps, generator=generator
            )

        return grids, batch * side**2, evaluations
    tensors = field_batch(batch, side, device)
    arguments = [tensors[key] for key in ("query_coords", "input_coords", "input_values")]

    def field():
        generator = torch.Generator().manual_seed(0)
        if sampler == MEAN:
            samplers.posterior_mean(model, *arguments, generator=generator)
        else:
            samplers.sample(model, *arguments, method=sampler, steps=steps, generator=generator)

    return field, batch * side**2, evaluations


def measure(name, options):
    """One row a sampler of this model."""
    device = options.device
    model = make_model(name, options.preset).to(device).eval()
    side = options.side
    if name == "localmamba":
        side = run.load_settings(name, options.preset)["data"]["size"]
    wanted = [MEAN, *options.samplers]
    if name == "diffae_phase1":
        wanted = [MEAN]
    if name == "localmamba":
        wanted = wanted[1:]
    rows = []
    for sampler in wanted:
        call, queries, evaluations = make_sampling(model, sampler, options.steps, options.batch, side, device)
        seconds = evaluate.best_seconds(call, device, repeats=20, budget=options.budget)
        eager = []
        if name != "local" and not rows:  # it has no scan; an evaluation costs the same in all samplers
            for scan_name in (kernels.choose_backend(device), "none", "loop"):
                with scanning(scan_name), mock.patch.object(samplers, "RECORD_FROM", math.inf):
                    eager.append(evaluate.best_seconds(call, device, repeats=20, budget=options.budget))
        ours, without, loop = eager or (1, None, None)
        rows.append(
            {
                "model": name,
                "sampler": sampler,
                "evaluations": evaluations,
                "queries": queries,
                "seconds": seconds,
                "queries_per_second": queries / seconds,
                "share": without and 1 - without / ours,
                "loop": loop and loop / ours,
            }
        )
    return rows


def measure_checkpoint(folder, options):
    """One row a side and sampler of this trained model."""
    model = models.load_model(folder).to(options.device)
    rows = []
    for side in options.sides:
        fields = evaluate.observe_images(images.load_images("photos", "test", side, limit=options.batch))
        queries = int((~fields["mask"]).sum())
        for sampler in [MEAN, *options.samplers]:
            how = {"kind": "sample", "method": sampler, "steps": options.steps} if sampler != MEAN else {}
            seconds = evaluate.best_seconds(
                lambda fields=fields, how=how: evaluate.reconstruct(model, fields, **how),
                options.device,
                budget=options.budget,
            )
            rows.append(
                {
                    "model": f"{Path(folder).name} {side} px",
                    "sampler": sampler,
                    "evaluations": count_evaluations(sampler, options.steps),
                    "queries": queries,
                    "seconds": seconds,
                    "queries_per_second": queries / seconds,
                    "share": None,
                    "loop": None,
                }
            )
    return rows


def report(rows):
    head = ["model", "sampler", "evaluations", "seconds", "ms/eval.", "queries/s", "scan's share", "loop"]
    lines = [
        [
            row["model"],
            row["sampler"],
            str(row["evaluations"]),
            f"{row['seconds']:.3f}",
            f"{1e3 * row['seconds'] / row['evaluations']:.1f}",
            f"{row['queries_per_second']:,.0f}",
            cell(row["share"], "{:.0%}"),
            cell(row["loop"], "{:.1f} x"),
        ]
        for row in rows
    ]
    return evaluate.align(head, lines, 2)


def parse(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default=run.default_device().type)
    parser.add_argument("--preset", choices=run.PRESETS, help="default: full on a GPU, else demo")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--checkpoints", nargs="+", default=[], help="folders of trained models to measure")
    parser.add_argument(
        "--sides", nargs="+", type=int, default=[32, 96], help="of photos, with --checkpoints"
    )
    parser.add_argument("--samplers", nargs="+", choices=samplers.SAMPLERS, default=list(samplers.SAMPLERS))
    parser.add_argument("--steps", type=int, default=STEPS, help="of the sampler (default: %(default)s)")
    parser.add_argument("--batch", type=int, help="fields at once (default: 1 on a CPU, 16 on a GPU)")
    parser.add_argument("--quick", action="store_true", help="preset smoke and small fields, in seconds")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/sampling-<device>.json")
    options = parser.parse_args(arguments)
    options.device = torch.device(options.device)
    cuda = options.device.type == "cuda"
    whole = set(options.models) == set(MODELS) and set(options.samplers) == set(samplers.SAMPLERS)
    whole = whole and not (options.quick or options.preset or options.batch or options.checkpoints)
    if options.out is None and whole:
        options.out = scan.results_path("sampling", options.device)
    options.preset = options.preset or ("smoke" if options.quick else "full" if cuda else "demo")
    options.side = QUICK_SIDE if options.quick else SIDE
    options.batch = options.batch or (16 if cuda else 1)
    options.budget = 0.02 if options.quick else BUDGET
    return options


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    run.allow_tf32()
    threads = torch.get_num_threads()
    print(f"{scan.device_name(options.device)}, {threads} threads, preset {options.preset}", flush=True)
    command = shlex.join(["python", "benchmarks/sampling.py", *arguments])
    config = {"preset": options.preset, "threads": threads, "steps": options.steps, "batch": options.batch}
    rows = []
    for name in options.checkpoints or options.models:
        start = time.perf_counter()
        rows += measure_checkpoint(name, options) if options.checkpoints else measure(name, options)
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
        if options.out:  # after each model: a run that is cut off keeps what it has
            evaluate.write_results(rows, options.out, command=command, config=config)
    print()
    print(report(rows))
    if options.out:
        print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
