"""Pictures drawn from nothing by a flow over latents, judged by the features of a classifier trained here.

    python benchmarks/frechet.py checkpoints/diffae-cifar10-128 --flow checkpoints/diffae-cifar10-128-latent \
        --data cifar.npz

--data: an .npz of x_train (N, 32, 32, 3) uint8 and y_train (N,), the classes; --train and twice --images
pictures are disjoint parts of it. The Fréchet distance is of Gaussians fitted to the last features of a CNN
(Heusel et al. 2017, there of Inception); "spread" is its standard deviation over resampled pictures.
"""

import argparse
import shlex
import sys
from pathlib import Path

import common
import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_model, save_model
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from nfhelpers import images, models, run, samplers


def labelled(source):
    """Pictures uint8 (N, 32, 32, 3) and classes (N,), shuffled."""
    if source == "cifar10":
        pictures = images.load_images("cifar10")  # downloaded if need be
        files = sorted((images.data_folder() / "cifar-10-batches-bin").glob("data_batch*.bin"))
        labels = np.concatenate([np.fromfile(file, np.uint8)[:: 1 + 3 * 32 * 32] for file in files])
    else:
        with np.load(source) as arrays:
            pictures, labels = arrays["x_train"], arrays["y_train"]
    order = np.random.default_rng(0).permutation(len(pictures))
    return pictures[order], labels[order]


def classifier(width=32, classes=10):
    """Six convolutions and a linear layer, whose inputs are the features (N, 4 width)."""

    def block(below, above, stride):
        conv = nn.Conv2d(below, above, 3, stride, padding=1, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(above), nn.ReLU())

    sizes = (3, width, 1), (width, width, 1), (width, 2 * width, 2), (2 * width, 2 * width, 1)
    sizes += (2 * width, 4 * width, 2), (4 * width, 4 * width, 1)
    pool = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*(block(*size) for size in sizes), *pool, nn.Linear(4 * width, classes))


def tensor(pictures, device):
    """(N, H, W, 3), uint8 or in [0, 1] -> (N, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(images.to_model(pictures)).permute(0, 3, 1, 2).to(device)


def train(network, pictures, labels, epochs, device):
    """Cross-entropy with flips and shifts, one cycle of the learning rate."""
    labels, per_epoch = torch.from_numpy(labels).long().to(device), len(pictures) // 128
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, epochs * per_epoch)
    for epoch in range(epochs):
        order = torch.randperm(len(pictures)).tolist()
        for step in tqdm(range(per_epoch), desc=f"classifier, epoch {epoch + 1} of {epochs}"):
            picks = order[128 * step : 128 * (step + 1)]
            x = F.pad(tensor(pictures[picks], device), (4, 4, 4, 4), mode="reflect")
            x = x.flip(3) if torch.rand(()) < 0.5 else x
            top, left = torch.randint(9, (2,)).tolist()
            loss = F.cross_entropy(network(x[..., top : top + 32, left : left + 32]), labels[picks])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    network.eval()


@torch.no_grad()
def features(network, pictures, device):
    return (
        torch.cat([network[:-1](tensor(part, device)) for part in np.array_split(pictures, 64)]).cpu().numpy()
    )


class Painter:
    """Pictures (N, 32, 32, 3) in [0, 1] of latents (N, C), not normalised."""

    def __init__(self, model, device, batch=100):
        self.model, self.device, self.batch = model, device, batch
        self.query = images.grid_coords(32, 32)[None].to(device)

    @torch.no_grad()
    def each(self, function, latents, what):
        parts = tqdm(latents.split(self.batch), desc=what)
        made = [images.to_image(function(part.to(self.device)).float()).cpu() for part in parts]
        return torch.cat(made).reshape(-1, 32, 32, 3).numpy()

    def decoded(self, latents):
        return self.each(lambda z: self.model.decode(self.query.expand(len(z), -1, -1), z), latents, "decode")

    def linear(self, latents):
        return self.each(lambda z: self.model.encoder.linear_code.decode(z).clamp(-1, 1), latents, "linear")

    def sampled(self, latents, steps, generator):
        """With details, drawn in so many whole steps."""

        def draw(z):
            noise = torch.randn(len(z), 1024, 3, generator=generator).to(z)
            query, times = self.query.expand(len(z), -1, -1), self.model.shortcut_times(steps).to(z)

            def velocity(x, t, until):
                now, until = (moment.expand(len(z)) for moment in (t, until))
                return self.model.decode(query, z, now, x, until=until)

            return samplers.shortcut(velocity, noise, times)

        return self.each(draw, latents, "sample")

    @torch.no_grad()
    def latents(self, pictures):
        values = torch.from_numpy(images.to_model(pictures)).flatten(1, 2)
        coords = self.query.expand(self.batch, -1, -1)
        parts = tqdm(values.split(self.batch), desc="encode")
        return torch.cat([self.model.encode(coords[: len(v)], v.to(self.device)).cpu() for v in parts])


def judge(options, pictures, labels, device):
    """A classifier, trained or read, and the pictures that it was not shown."""
    shown, rest = pictures[: options.train], pictures[options.train :]
    if len(rest) < 2 * options.images:
        raise ValueError(
            f"{len(rest)} pictures are left beside --train {options.train}; --images wants two sets"
        )
    network = classifier().to(device).eval()
    if options.classifier and options.classifier.exists():
        load_model(network, options.classifier)
    else:
        train(network.train(), shown, labels[: options.train], options.epochs, device)
        if options.classifier:
            save_model(network, options.classifier)
    with torch.no_grad():
        seen = torch.from_numpy(features(network, rest, device)).to(device)
        found = network[-1](seen).argmax(1).cpu().numpy()
    accuracy = (found == labels[options.train :]).mean()
    print(f"the classifier gets {accuracy:.1%} of {len(rest):,} pictures right that it was not shown")
    return network, rest, accuracy


def crowds(options, others, device):
    """{kind: pictures (N, 32, 32, 3) in [0, 1]}, as many as the `others`, real ones."""
    generator, count = torch.Generator().manual_seed(0), len(others)
    painter = Painter(models.load_model(options.autoencoder).to(device), device)
    model, flow = painter.model, models.load_model(options.flow).to(device)
    known = painter.latents(others)
    drawn = model.denormalise(samplers.sample_latents(flow, count, steps=50, generator=generator)).cpu()
    white = torch.randn(count, known.shape[1], generator=generator)
    gaussian = known.mean(0) + white @ torch.linalg.cholesky(torch.cov(known.mT)).mT
    return {
        "real, others": others / 255,
        "real, decoded": painter.decoded(known),
        "real, sampled": painter.sampled(known, options.steps, generator),
        "Gaussian of PCA": painter.linear(white),
        "Gaussian latents, decoded": painter.decoded(gaussian),
        "Gaussian latents, sampled": painter.sampled(gaussian, options.steps, generator),
        "flow over latents, decoded": painter.decoded(drawn),
        "flow over latents, sampled": painter.sampled(drawn, options.steps, generator),
    }


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("autoencoder", type=Path)
    parser.add_argument("--flow", type=Path, required=True)
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--train", type=int, default=40_000, help="pictures that the classifier learns")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--classifier", type=Path, metavar="FILE", help="its weights: kept there, then used")
    parser.add_argument("--images", type=int, default=2000, help="pictures of each kind")
    parser.add_argument("--steps", type=int, default=4, help="of a sample, whole steps")
    parser.add_argument("--device", default=run.default_device())
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    options = parser.parse_args(arguments)
    device, count = torch.device(options.device), options.images
    torch.manual_seed(0)
    pictures, labels = labelled(options.data)
    network, rest, accuracy = judge(options, pictures, labels, device)
    real, others = rest[:count] / 255, rest[count : 2 * count]
    rng, rows, target = np.random.default_rng(0), [], features(network, real, device)
    for name, made in crowds(options, others, device).items():
        seen = features(network, made.astype(np.float32), device)
        again = [common.frechet_distance(seen[rng.integers(count, size=count)], target) for _ in range(10)]
        rows.append(
            {"pictures": name, "distance": common.frechet_distance(seen, target), "spread": np.std(again)}
        )
    table = pd.DataFrame(rows).assign(accuracy=accuracy, count=count)
    common.show(table.set_index("pictures")[["distance", "spread"]])
    if options.out:
        common.write_results(table, options.out, shlex.join(["python", "benchmarks/frechet.py", *arguments]))


if __name__ == "__main__":
    main()
