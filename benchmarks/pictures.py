"""README's pictures: unseen images from a fifth of their 32 x 32 pixels, and a sample growing out of noise.

    python benchmarks/pictures.py [--out figures]

CIFAR-10's test images at 32 x 32 where they are at hand, else photographs; test photographs at 128 x 128.
At 32 x 32 a sample takes four shortcut steps, at 128 x 128 twenty of Heun's.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from nfhelpers import evaluate, images, models, plots, run, samplers

CHECKPOINTS = Path(__file__).resolve().parents[1] / "checkpoints"


def cifar10_or_photos(count, picks):
    """Test images and the flagship that was trained on others of their kind."""
    if (images.data_folder() / "cifar-10-batches-bin").is_dir():
        return images.load_images("cifar10", "test", 32)[picks], "field-cifar10"
    return images.load_images("photos", "test", 32, count), "field-photos"


def rows_of(name, truth, side, seed, **how):
    """Dict of rows of pictures (N, side, side, 3): what is observed, two methods, two samples, the truth."""
    model = models.load_model(CHECKPOINTS / name).to(run.default_device())
    seen = evaluate.observe(images.area_resize(truth, 32), 0.2, seed)
    size = None if side == 32 else side
    samples = {
        f"sample {i}": evaluate.reconstruct(model, seen, size, kind="sample", seed=i, **how) for i in (1, 2)
    }
    return {
        "observed": plots.observed_pixels(seen.images, seen.mask),
        "biharmonic": evaluate.reconstruct("biharmonic", seen, size),
        "mean (ours)": evaluate.reconstruct(model, seen, size),
        **samples,
        "truth": truth / 255,
    }


def growing(name, truth, seed, steps=24, zoom=5):
    """Frames of a sampling run: noise on the left of each pair, observed pixels fixed."""
    model = models.load_model(CHECKPOINTS / name).to(run.default_device())
    seen, frames = evaluate.observe(truth, 0.2, seed), []
    query = images.grid_coords(32, 32).expand(len(truth), -1, -1)
    points = query, seen.input_coords, seen.input_values
    known = seen.mask[..., None]

    def keep(step, t, x):
        fields = images.to_image(x).reshape(len(truth), 32, 32, 3).float().numpy()
        fields = np.where(known, seen.images, fields)
        row = np.concatenate(list(fields), axis=1).clip(0, 1)
        frames.append(np.kron((255 * row).astype(np.uint8), np.ones((zoom, zoom, 1), np.uint8)))

    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(*query.shape[:2], 3, generator=torch.Generator().manual_seed(seed))
    keep(0, 0.0, noise)
    samplers.sample(model, *points, method="heun", steps=steps, generator=generator, callback=keep)
    return frames


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("figures"))
    parser.add_argument("--picks", type=int, nargs="+", default=[3, 6, 1, 7])
    parser.add_argument("--photographs", type=int, nargs="+", default=[0, 1, 2, 5])
    options = parser.parse_args()
    small, name = cifar10_or_photos(len(options.picks), options.picks)
    large = images.load_images("photos", "test", 128)[options.photographs]
    left = rows_of(name, small, 32, 3)
    right = rows_of("field-photos", large, 128, 3, sampler="heun", steps=20)
    rows = {label: [*left[label], *right[label]] for label in left}
    titles = ["32 px"] * len(small) + ["128 px"] * len(large)
    options.out.mkdir(parents=True, exist_ok=True)
    plots.image_grid(rows, titles, tile=1.0).savefig(options.out / "hero.png", dpi=110, bbox_inches="tight")
    frames = [Image.fromarray(frame) for frame in growing(name, small, 3)]
    durations = [600] + [90] * (len(frames) - 2) + [2000]
    frames[0].save(
        options.out / "growing.gif", save_all=True, append_images=frames[1:], duration=durations, loop=0
    )


if __name__ == "__main__":
    main()
