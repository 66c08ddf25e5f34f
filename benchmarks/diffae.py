"""Diffusion autoencoders beside PCA of as many dimensions: reconstruction of test images from one vector.

    python benchmarks/diffae.py checkpoints/diffae-cifar10 [--data cifar10] [--train cifar10] [--images 517]

PCA is fitted on the training images of --train (default: --data) and sees all pixels; so does the autoencoder
in the first comparison. The second one is of 20% of the pixels, for PCA filled in by biharmonic inpainting.
Every pixel comes from the vector. The difference is paired, image by image.
"""

import argparse
import shlex
import sys
from pathlib import Path

import common
import numpy as np
import pandas as pd
import torch
from sklearn.decomposition import PCA

from nfhelpers import evaluate, images, models, run


def through_model(model, observed):
    """Fields (N, H, W, 3) in [0, 1] that come from the vectors alone."""
    device, side = next(model.parameters()).device, observed.images.shape[1]
    query, fields = images.grid_coords(side, side)[None].to(device), []
    with torch.no_grad():
        for coords, values in zip(observed.input_coords, observed.input_values, strict=True):
            latent = model.encode(coords[None].to(device), values[None].to(device))
            fields.append(images.to_image(model.decode(query, latent, footprint=1 / side)[0].cpu()))
    return torch.stack(fields).reshape(observed.images.shape).numpy()


def compare(model, test, train, fraction, seed):
    """Scores of PCA and autoencoder, one row an image."""
    pca = PCA(model.config.latent_dim, random_state=0).fit(train.reshape(len(train), -1) / np.float32(255))

    def through_pca(fields):
        flat = pca.inverse_transform(pca.transform(fields.reshape(len(fields), -1)))
        return flat.reshape(fields.shape).clip(0, 1)

    whole, part = evaluate.observe(test, 1.0), evaluate.observe(test, fraction, seed)
    fields = {
        ("PCA", "all pixels"): through_pca(whole.images),
        ("autoencoder", "all pixels"): through_model(model, whole),
        ("PCA", f"{fraction:.0%}"): through_pca(evaluate.reconstruct("biharmonic", part)),
        ("autoencoder", f"{fraction:.0%}"): through_model(model, part),
    }
    return pd.concat(
        evaluate.score(made, whole.images, method=name, given=given) for (name, given), made in fields.items()
    )


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--train", help="source of the images that PCA is fitted on (default: --data)")
    parser.add_argument("--size", type=int, default=32, metavar="SIDE")
    parser.add_argument("--images", type=int, default=517)
    parser.add_argument("--observed", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default=run.default_device())
    parser.add_argument("--out", type=Path, help="write means and standard errors as JSON")
    options = parser.parse_args(arguments)
    train = images.load_images(options.train or options.data, "train", options.size)
    test = images.load_images(options.data, "test", options.size, limit=options.images)
    tables = []
    for path in options.checkpoints:
        model = models.load_model(path).to(options.device).eval()
        table = compare(model, test, train, options.observed, options.seed).assign(model=path.name)
        wide = table.pivot(index=["given", "image"], columns="method", values="psnr")
        wide["difference"] = wide["autoencoder"] - wide["PCA"]
        print(f"{path.name}: {len(test)} test images of {options.data}, PCA of {len(train):,}; PSNR in dB")
        common.show(wide.groupby("given").agg(["mean", "sem"]))
        means = table.groupby(["model", "method", "given"])[["psnr", "ssim", "speckle"]].agg(["mean", "sem"])
        means.columns = [" ".join(pair) for pair in means.columns]
        tables.append(means.reset_index())
    if options.out:
        command = shlex.join(["python", "benchmarks/diffae.py", *arguments])
        common.write_results(pd.concat(tables), options.out, command)


if __name__ == "__main__":
    main()
