"""LocalMamba: its cost beside the twin with attention, and how good a checkpoint's spectrograms are.

    python benchmarks/localmamba.py cost [--preset full] [--sizes 64 128 256] [--repeats 0] [--device cuda]
    python benchmarks/localmamba.py generated checkpoints/localmamba-fsdd [--data fsdd] [--guidance 1 2.5]

`cost` prints parameters, FLOPs, and time and peak memory of a training step of both mixers, and their ratio.
With --repeats 0 nothing is run (FLOPs only, any size on any machine). `generated` trains a small classifier
on the training clips, which takes seconds, and prints accuracy, Frechet distance of its features and copies
by guidance scale, beside real clips.
"""

import argparse
import copy
import math
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import common
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from train_step import grid_batch

from nfhelpers import models, run, samplers, spectrograms
from nfhelpers.flow import grid_flow_loss


def scan_flops(u, delta, A, B, *others, out_shape=None, **options):
    """FLOPs of a scan from the shapes of its arguments, the usual count of the recurrence (VMamba, 2024)."""
    return math.prod(delta) * (9 * B[-1] + 2)


def flops_of(model, batch):
    """FLOPs of a forward pass, from shapes alone: nothing is computed."""
    twin = copy.deepcopy(model).to("meta").train()
    batch = {key: value.to("meta") for key, value in batch.items()}
    scan = torch.ops.nfhelpers.scan_chunked  # the one that tensors without data take
    with FlopCounterMode(display=False, custom_mapping={scan: scan_flops}) as counter:
        twin(batch["spectrograms"], torch.empty(len(batch["labels"]), device="meta"), batch["labels"])
    return counter.get_total_flops()


def cost(options):
    settings = run.load_settings("localmamba", options.preset)["model"]
    device, rows = torch.device(options.device), []
    for size in options.sizes:
        pair = {}
        for mixer in ("ssm", "attention"):
            with torch.device("meta" if options.repeats == 0 else device):
                model = models.LocalMamba2D(replace(models.LocalMamba2DConfig(**settings), mixer=mixer))
            batch = grid_batch(model.config, options.batch_size, size)
            count = sum(p.numel() for p in model.parameters())
            row = {"parameters (M)": count / 1e6, "GFLOP": flops_of(model, batch) / 1e9}
            if options.repeats:
                batch = {key: value.to(device) for key, value in batch.items()}

                def step(model=model, batch=batch):
                    grid_flow_loss(model, batch).backward()

                row["ms"] = 1e3 * common.best_seconds(step, device, options.repeats)
                row["MiB"] = (common.peak_bytes(step, device) or math.nan) / 2**20
            pair[mixer] = row
            rows.append({"size": size, "mixer": mixer, **row})
        ratio = {key: pair["ssm"][key] / pair["attention"][key] for key in pair["ssm"]}
        rows.append({"size": size, "mixer": "ratio", **ratio})
    common.show(rows, ["size", "mixer"])
    return rows


def fit_classifier(dataset, *, epochs=10, batch_size=64, learning_rate=3e-3, seed=0):
    """A small convolutional network that tells the classes of spectrograms apart; [0] gives its features.

    While it learns, spectrograms are shifted in time by up to an eighth of their width and in level by up to
    0.15 (4.5 dB), so that neither decides.
    """
    grids, labels = dataset.spectrograms, dataset.labels
    count, channels, height, width = grids.shape
    batch_size = min(batch_size, count)
    torch.manual_seed(seed)
    layers, widths = [], (16, 32, 64, 64)
    for before, after in zip((channels, *widths), widths, strict=False):
        convolution = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(after), nn.ReLU()]
        height, width = (height + 1) // 2, (width + 1) // 2
    layers += [nn.Flatten(), nn.Dropout(0.3), nn.Linear(widths[-1] * height * width, 64), nn.ReLU()]
    classifier = nn.Sequential(nn.Sequential(*layers), nn.Linear(64, len(dataset.meta.class_names)))
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=learning_rate)
    batches = count // batch_size
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    for _ in range(epochs):
        for indices in torch.randperm(count)[: batches * batch_size].split(batch_size):
            loss = F.cross_entropy(classifier(shifted(grids[indices])), labels[indices])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return classifier.eval()


def shifted(grids):
    """Grids (B, C, H, W), each shifted in time, with silence where it came from, and in level."""
    batch, width = grids.shape[0], grids.shape[-1]
    most = width // 8
    columns = torch.arange(width) - torch.randint(-most, most + 1, (batch, 1))  # (B, W), where they are from
    inside = ((columns >= 0) & (columns < width))[:, None, None]  # (B, 1, 1, W)
    moved = grids.gather(3, columns.clamp(0, width - 1)[:, None, None].expand_as(grids))
    level = 0.15 * (2 * torch.rand(batch, 1, 1, 1) - 1)
    return (torch.where(inside, moved, -1.0) + level).clamp(-1, 1)


@torch.no_grad()
def scores(grids, labels, classifier, train, test):
    """Accuracy in %, Frechet distance to the test clips, distance to the nearest clip, copies in %."""
    features, there = (classifier[0](x) for x in (grids, test.spectrograms))
    right = 100.0 * (classifier[1](features).argmax(1) == labels).double().numpy()
    nearest, unseen = (
        torch.cdist(x.flatten(1), train.spectrograms.flatten(1)).amin(1) / x[0].numel() ** 0.5
        for x in (grids, test.spectrograms)
    )
    return {
        "count": len(grids),
        "accuracy": right.mean(),
        "standard error": right.std(ddof=1) / len(right) ** 0.5,
        "Frechet": common.frechet_distance(features.numpy(), there.numpy()),
        "nearest": nearest.median().item(),
        "copies": 100 * (nearest < unseen.min()).double().mean().item(),
    }


def generated(options):
    train, test = (spectrograms.load_spectrograms(options.data, s, options.size) for s in ("train", "test"))
    classifier = fit_classifier(train, seed=options.seed)
    model = models.load_model(options.checkpoint).to(options.device)
    count = min(len(train), len(test))
    sets = {
        ("test clips", None): (test.spectrograms, test.labels),
        ("training clips", None): (train.spectrograms[:count], train.labels[:count]),
    }
    for guidance in options.guidance:
        generator, made = torch.Generator().manual_seed(options.seed), []
        for labels in test.labels.split(100):
            how = {
                "guidance": guidance,
                "method": options.method,
                "steps": options.steps,
                "generator": generator,
            }
            labels = labels.to(options.device)
            made.append(
                samplers.sample_grids(model, len(labels), *test.spectrograms.shape[2:], labels=labels, **how)
            )
        sets["generated", guidance] = torch.cat(made).cpu(), test.labels
    rows = [
        {"source": source, "guidance": guidance, **scores(*grids_and_labels, classifier, train, test)}
        for (source, guidance), grids_and_labels in sets.items()
    ]
    common.show(rows, ["source", "guidance"])
    return rows


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    first = commands.add_parser("cost")
    first.add_argument("--preset", choices=run.PRESETS, default="full")
    first.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 256], metavar="SIDE")
    first.add_argument("--batch-size", type=int, default=1)
    first.add_argument("--repeats", type=int, default=1)
    first.set_defaults(function=cost)
    second = commands.add_parser("generated")
    second.add_argument("checkpoint", type=Path)
    second.add_argument("--data", default="fsdd")
    second.add_argument("--size", type=int, default=64, metavar="SIDE")
    second.add_argument("--guidance", type=float, nargs="+", default=[0.0, 1.0, 1.5, 2.5, 4.0])
    second.add_argument("--method", default="heun")
    second.add_argument("--steps", type=int, default=25)
    second.add_argument("--seed", type=int, default=0)
    second.set_defaults(function=generated)
    for command in (first, second):
        command.add_argument("--device", default=run.default_device())
        command.add_argument("--out", type=Path, help="write the rows as JSON")
    options = parser.parse_args(arguments)
    rows = options.function(options)
    if options.out:
        command = shlex.join(["python", "benchmarks/localmamba.py", *arguments])
        common.write_results(rows, options.out, command)


if __name__ == "__main__":
    main()
