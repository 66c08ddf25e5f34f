"""Diffusion autoencoders beside PCA of as many dimensions: reconstruction of test images from one vector.

    python benchmarks/diffae.py checkpoints/diffae-cifar10 checkpoints/diffae-cifar10-128 [--data cifar10]
        [--train cifar10] [--images 517] [--out benchmarks/results/pca-cifar10.json]

PCA is fitted on the training images of --train (a source of `images.load_images`, by default --data) and sees
all pixels; so does the autoencoder, in the first two rows of each table. The other two are of the observed
pixels alone, for PCA filled in by biharmonic inpainting. Every pixel comes from the vector.
"""

import argparse
import shlex
import sys
from pathlib import Path

from nfhelpers import evaluate, images, models, run


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--train", help="source of the images that PCA is fitted on (default: --data)")
    parser.add_argument("--size", type=int, default=32, metavar="SIDE")
    parser.add_argument("--images", type=int, default=517)
    parser.add_argument("--observed", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default=run.default_device().type)
    parser.add_argument("--out", type=Path, help="also write the rows as JSON")
    options = parser.parse_args(arguments)
    train = images.load_images(options.train or options.data, "train", options.size)
    test = images.load_images(options.data, "test", options.size, limit=options.images)
    rows = []
    for path in options.checkpoints:
        model = models.load_model(path).to(options.device)
        compared, _ = evaluate.compare_autoencoders(
            model, test, train, observed=options.observed, seed=options.seed
        )
        print(f"{path.name}: {len(test)} test images of {options.data}, PCA of {len(train):,} images")
        print(evaluate.format_table(compared) + "\n", flush=True)
        rows += [{"model": path.name, **row} for row in compared]
    if options.out:
        command = shlex.join(["python", "benchmarks/diffae.py", *arguments])
        print(f"wrote {evaluate.write_results(rows, options.out, command=command)}")


if __name__ == "__main__":
    main()
