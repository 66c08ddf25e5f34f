"""LocalMamba: its cost beside the twin with attention, and how good a checkpoint's spectrograms are.

    python benchmarks/localmamba.py cost [--preset full] [--sizes 64 128 256] [--repeats 0] [--device cuda]
    python benchmarks/localmamba.py generated checkpoints/localmamba-fsdd [--data fsdd] [--guidance 1 2.5]

`cost` prints parameters, FLOPs, and time and peak memory of a training step of both mixers, and their ratio:
seed 000 expects scans to be 10 to 15% lighter. With --repeats 0 nothing is run (FLOPs only, any size on any
machine). `generated` trains the classifier of `evaluate.fit_classifier` on the training clips, which takes
seconds, and prints accuracy, Frechet distance and copies by guidance scale, beside real clips.
"""

import argparse
import shlex
import sys
from pathlib import Path

from nfhelpers import evaluate, models, run, spectrograms


def cost(options):
    settings = run.load_settings("localmamba", options.preset)["model"]
    rows = evaluate.mixer_costs(
        models.LocalMamba2DConfig(**settings),
        options.sizes,
        batch_size=options.batch_size,
        repeats=options.repeats,
        device=options.device,
    )
    print(evaluate.format_mixer_costs(rows))
    return rows


def generated(options):
    train, test = (
        spectrograms.load_spectrograms(options.data, split, options.size) for split in ("train", "test")
    )
    classifier = evaluate.fit_classifier(train, seed=options.seed)
    rows = evaluate.evaluate_generated(
        models.load_model(options.checkpoint).to(options.device),
        classifier,
        train,
        test,
        guidances=options.guidance,
        method=options.method,
        steps=options.steps,
        seed=options.seed,
    )
    print(evaluate.format_generated(rows))
    return rows


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(required=True)
    cost_parser = commands.add_parser("cost")
    cost_parser.add_argument("--preset", choices=run.PRESETS, default="full")
    cost_parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 256], metavar="SIDE")
    cost_parser.add_argument("--batch-size", type=int, default=1)
    cost_parser.add_argument("--repeats", type=int, default=1)
    cost_parser.set_defaults(function=cost)
    made_parser = commands.add_parser("generated")
    made_parser.add_argument("checkpoint", type=Path)
    made_parser.add_argument("--data", default="fsdd")
    made_parser.add_argument("--size", type=int, default=64, metavar="SIDE")
    made_parser.add_argument("--guidance", type=float, nargs="+", default=[0.0, 1.0, 1.5, 2.5, 4.0])
    made_parser.add_argument("--method", default="heun")
    made_parser.add_argument("--steps", type=int, default=25)
    made_parser.add_argument("--seed", type=int, default=0)
    made_parser.set_defaults(function=generated)
    for command in (cost_parser, made_parser):
        command.add_argument("--device", default=run.default_device().type)
        command.add_argument("--out", type=Path, help="also write the rows as JSON")
    options = parser.parse_args(arguments)
    rows = options.function(options)
    if options.out:
        command = shlex.join(["python", "benchmarks/localmamba.py", *arguments])
        print(f"wrote {evaluate.write_results(rows, options.out, command=command)}")


if __name__ == "__main__":
    main()
