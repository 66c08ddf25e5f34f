"""A flagship's means at several sizes beside classical methods, and the worth of its samples by few steps.

    python benchmarks/fields.py checkpoints/field-photos --data photos --sizes 32 64 96 128 --images 16
    python benchmarks/fields.py checkpoints/field-cifar10 --data cifar10 --images 517 --samples 200

A fifth of 32 x 32 pixels (area means) is observed. `own + bicubic` is the model's own mean at 32 x 32,
enlarged. Differences are paired, image by image. CRPS (fair, on [0, 1]) and spread / skill (1: calibrated)
are over the pixels that were not observed: above 32 px over all.
"""

import argparse
import itertools
import shlex
import sys
from pathlib import Path

import common
import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from nfhelpers import classical, evaluate, images, metrics, models, run

SAMPLERS = (("shortcut", 1), ("shortcut", 2), ("shortcut", 4), ("shortcut", 8), ("euler", 4), ("heun", 20))


def means(model, truth, seen, wiener):
    """One row a size: PSNR, SSIM of the model, paired differences to the others."""
    first = min(truth)
    own = evaluate.reconstruct(model, seen)
    rows = []
    for size, target in truth.items():
        fields = {"model": own if size == first else evaluate.reconstruct(model, seen, size)}
        fields["biharmonic"] = evaluate.reconstruct("biharmonic", seen, size)
        fields["Wiener"] = wiener.fill(seen, size)
        if size != first:
            fields["own + bicubic"] = classical.resize(own, size, size)
        scores = {name: evaluate.score(x, images.to_unit(target)) for name, x in fields.items()}
        row = {"size": size, "images": len(target)}
        for name, table in scores.items():
            row |= {f"{name} PSNR": table.psnr.mean(), f"{name} SSIM": table.ssim.mean()}
            if name != "model":
                gain = scores["model"].psnr - table.psnr
                row |= {f"minus {name}": gain.mean(), f"minus {name}, error": gain.sem()}
        rows.append(row)
    return rows


def samples(model, truth, seen, draws):
    """One row a size and a sampler: CRPS and spread / skill of its draws, over the pixels not observed."""
    rows, first = [], min(truth)
    runs = [*itertools.product(truth.items(), SAMPLERS)]
    for (size, target), (sampler, steps) in tqdm(runs, desc="samplers"):
        if sampler == "shortcut" and not getattr(model, "shortcut", False):
            continue
        options = {"kind": "sample", "sampler": sampler, "steps": steps, "draws": draws}
        shape = None if size == first else size
        drawn = evaluate.reconstruct(model, seen, shape, **options)  # (K, N, H, W, 3)
        known = seen.mask if size == first else np.zeros(target.shape[:3], dtype=bool)
        target = images.to_unit(target)
        row = {"size": size, "sampler": sampler, "steps": steps, "images": len(target), "draws": draws}
        row["CRPS"] = metrics.crps(drawn, target).mean() / (~known).mean()
        row["spread / skill"] = metrics.spread_skill(drawn, target, known)
        of_one = evaluate.score(drawn[0], target)[["psnr", "ssim", "speckle"]].mean()
        rows.append(row | of_one.to_dict())
    return rows


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", default="photos", help="a source of test images")
    parser.add_argument("--train", help="source of the Wiener estimate's covariance (default: --data)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[32])
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--samples", type=int, default=0, help="images of which samples are drawn")
    parser.add_argument("--draws", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    options = parser.parse_args(arguments)
    model = models.load_model(options.checkpoint).to(run.default_device())
    truth = {k: images.load_images(options.data, "test", k, options.images) for k in options.sizes}
    first = min(truth)
    wiener = classical.Wiener(images.load_images(options.train or options.data, "train", first, 4096))
    torch.manual_seed(options.seed)
    seen = evaluate.observe(truth[first], 0.2, options.seed)
    tables = {"means": means(model, truth, seen, wiener)}
    common.show(pd.DataFrame(tables["means"]).set_index("size").T)
    if options.samples:
        part = evaluate.observe(truth[first][: options.samples], 0.2, options.seed)
        few = {size: target[: options.samples] for size, target in truth.items()}
        tables["samples"] = samples(model, few, part, options.draws)
        common.show(tables["samples"], ["size", "sampler", "steps"])
    if options.out:
        rows = [{"table": name, **row} for name, table in tables.items() for row in table]
        command = shlex.join(["python", "benchmarks/fields.py", *arguments])
        common.write_results(rows, options.out, command, data=options.data, images=options.images)


if __name__ == "__main__":
    main()
