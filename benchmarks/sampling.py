"""A sampling run of every model by every sampler: seconds, milliseconds an evaluation, pixels a second.

    python benchmarks/sampling.py [--quick] [--preset full] [--models v1] [--samplers heun] [--device cuda]
    python benchmarks/sampling.py --checkpoints checkpoints/field-photos [--sides 32 96] [--samplers heun]

Models are those of presets.toml with random weights (demo on a CPU, full on a GPU). A field has 204 observed
pixels and 1,024 queries; localmamba samples grids of its preset's size. `mean` is the posterior mean in one
evaluation. `loop` is the time with a plain loop for the scan over the time here. With --checkpoints, trained
models reconstruct test photographs of these sides from a fifth of their pixels, as the widgets do.
"""

import argparse
import shlex
import sys
from pathlib import Path

import common
import scan
import torch
from train_step import MODELS, QUICK_SIDE, SIDE, field_batch, make_model, scanning

from nfhelpers import evaluate, images, models, run, samplers


def evaluations_of(sampler, steps):
    """Evaluations of the network in one run."""
    if sampler == "mean":
        return 1
    return steps * samplers.EVALUATIONS[sampler] - (sampler in ("heun", "sde"))  # the last step is Euler's


def sampling_run(model, sampler, steps, batch, side, device):
    """A function that runs the sampler once."""

    def grids():
        labels = torch.arange(batch, device=device) % model.config.num_classes
        options = {"labels": labels, "method": sampler, "steps": steps}
        samplers.sample_grids(model, batch, side, side, generator=torch.Generator().manual_seed(0), **options)

    def field():
        generator = torch.Generator().manual_seed(0)
        if sampler == "mean":
            samplers.posterior_mean(model, *points, generator=generator)
        else:
            samplers.sample(model, *points, method=sampler, steps=steps, generator=generator)

    if isinstance(model, models.LocalMamba2D):
        return grids
    tensors = field_batch(batch, side, device)
    points = [tensors[key] for key in ("query_coords", "input_coords", "input_values")]
    return field


def measure(name, options):
    """One row a sampler of this model."""
    device = options.device
    model = make_model(name, options.preset).to(device).eval()
    side, wanted = options.side, ["mean", *options.samplers]
    if name == "localmamba":
        side, wanted = run.load_settings(name, options.preset)["data"]["size"], options.samplers
    if name == "diffae_phase1":
        wanted = ["mean"]
    rows = []
    for sampler in wanted:
        call = sampling_run(model, sampler, options.steps, options.batch, side, device)
        row = {"model": name, "sampler": sampler, "evaluations": evaluations_of(sampler, options.steps)}
        row["seconds"] = common.best_seconds(call, device, budget=options.budget)
        row["ms/evaluation"] = 1e3 * row["seconds"] / row["evaluations"]
        row["pixels/s"] = options.batch * side**2 / row["seconds"]
        if not rows:
            with scanning("loop"):
                row["loop"] = common.best_seconds(call, device, 1) / row["seconds"]
        rows.append(row)
    return rows


def measure_checkpoint(folder, options):
    """One row a side and sampler of this trained model."""
    model, rows = models.load_model(folder).to(options.device), []
    for side in options.sides:
        observed = evaluate.observe(images.load_images("photos", "test", side, limit=options.batch))
        for sampler in ["mean", *options.samplers]:
            how = {"kind": "sample", "sampler": sampler, "steps": options.steps} if sampler != "mean" else {}

            def call(observed=observed, how=how):
                evaluate.reconstruct(model, observed, **how)

            seconds = common.best_seconds(call, options.device, budget=options.budget)
            row = {"model": f"{Path(folder).name} {side} px", "sampler": sampler}
            row |= {"evaluations": evaluations_of(sampler, options.steps), "seconds": seconds}
            rows.append(row | {"pixels/s": int((~observed.mask).sum()) / seconds})
    return rows


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", type=torch.device, default=run.default_device())
    parser.add_argument("--preset", choices=run.PRESETS, help="default: full on a GPU, else demo")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--checkpoints", nargs="+", default=[], help="folders of trained models")
    parser.add_argument(
        "--sides", nargs="+", type=int, default=[32, 96], help="of photographs, with --checkpoints"
    )
    every = [name for name in samplers.SAMPLERS if name != "shortcut"]  # which not all models take
    parser.add_argument("--samplers", nargs="+", choices=samplers.SAMPLERS, default=every)
    parser.add_argument("--steps", type=int, default=10, help="of the sampler (default: %(default)s)")
    parser.add_argument("--batch", type=int, help="fields at once (default: 1 on a CPU, 16 on a GPU)")
    parser.add_argument("--quick", action="store_true", help="preset smoke and small fields, in seconds")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    options = parser.parse_args(arguments)
    cuda = options.device.type == "cuda"
    options.preset = options.preset or ("smoke" if options.quick else "full" if cuda else "demo")
    options.side = QUICK_SIDE if options.quick else SIDE
    options.batch = options.batch or (16 if cuda else 1)
    options.budget = 0.02 if options.quick else 3.0
    print(
        f"{scan.device_name(options.device)}, {torch.get_num_threads()} threads, preset {options.preset}",
        flush=True,
    )
    rows = []
    for name in options.checkpoints or options.models:
        rows += measure_checkpoint(name, options) if options.checkpoints else measure(name, options)
        if options.out:
            command = shlex.join(["python", "benchmarks/sampling.py", *arguments])
            common.write_results(rows, options.out, command, preset=options.preset, steps=options.steps)
    common.show(rows, ["model", "sampler"])


if __name__ == "__main__":
    main()
