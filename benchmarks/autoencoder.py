"""Train a diffusion autoencoder as it is shipped, with the parts of `flagship.py`.

    python benchmarks/autoencoder.py cifar10 --data cifar10:0.7 windows.npz:0.3 --out runs/diffae-cifar10
    python benchmarks/autoencoder.py cifar10 --data cifar10:1 --out runs/128 --set '{"latent_dim":128}'
    python benchmarks/autoencoder.py photos --data windows.npz:0.9 photos:0.1 --out runs/diffae-photos

The linear code is PCA of all sources, mirrored images too. Phase 1 trains the whole model by the squared
error of decodings; a part of each batch shows few pixels. Phase 2 freezes the encoder and trains the decoder
as a flow, then in whole steps. Last comes a flow over latents, in OUT-latent. Weights are averaged; kept are
those that decode held-out images best, of a flow those with the least loss there. The first line is PCA's.
"""

import argparse
import copy
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from flagship import (
    SIDE,
    FieldTrainer,
    Grids,
    Images,
    Masks,
    Trainer,
    add_options,
    copy_into,
    save,
    training_data,
)

from nfhelpers import metrics, models, run
from nfhelpers.images import area_resize, grid_coords, to_image, to_model

RECIPES = {
    "cifar10": {
        "model": {"widths": (48, 96, 128), "blocks": (2, 3, 3)},
        "batches": {32: 256},  # by side of the lattice that the queries enter
        "fields": {32: ((32,), (0.5, 0.625, 0.75, 1, 1))},
        "turns": (0.1, 0.1, 0.5),
        "colours": (0.1, 0.3),
        "partly": (0.125, 0.3),  # share of a batch of which few pixels are seen, and its weight
        "seconds": (400, 0, 0, 0),
        "mean": 0.4,  # share of the batch at t = 0 in phase 2
    },
    "photos": {
        "model": {"widths": (32, 48, 48, 96, 128), "blocks": (1, 1, 2, 3, 3), "finer": 2},
        "batches": {32: 128, 64: 64, 128: 32},
        "fields": {
            32: ((32,), (0.5, 0.625, 0.75, 1, 1)),
            64: ((36, 40, 48, 48, 56, 64, 64, 64), (0.5, 0.75, 1, 1)),
            128: ((72, 80, 96, 96, 112, 128, 128, 128, 128), (1,)),
        },
        "turns": (0.5, 0.5, 0.5),
        "colours": (0.1, 0.3),
        "partly": (0.125, 0.3),
        "std": 0.14,  # of fields of all sizes around the linear code; of cifar10: what that leaves
        "seconds": (370, 520, 260, 0),
        "mean": 0.25,
    },
}


class AutoencoderTrainer(FieldTrainer):
    """Of both phases; conditions of `predict` are (latent, queries, start, places, valid, sides)."""

    masks = Masks

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.decoding_error, self.encode = self.compiled(self.decoding_error), self.compiled(self.latents)

    def latents(self, model, seen, index, values):
        """Latents (B, C) of all pixels (B, 3, 32, 32), but of the last fields of those of the masks alone."""
        few = len(index)
        whole = seen[: len(seen) - few].permute(0, 2, 3, 1)  # (b, 32, 32, 3), pixels are nodes
        inputs = model.encoder.input_embedding(F.pad(whole, (0, 2)))
        found = [model.encoder(inputs, whole)]
        if few:
            found.append(model.encode(self.splines.grid[index], values))
        return torch.cat(found)

    def seen(self, nodes, count):
        truth, seen, *places = self.fields(nodes, count)
        few = round(count * self.recipe["partly"][0])
        _, index, values = self.observe(seen[count - few :])
        return truth.flatten(2).mT, (seen, index, values), places

    def decoding_error(self, truth, seen, places):
        """Phase 1: squared error of the decoding, in units of the deviation."""
        sides, query, valid, place = places
        with self.autocast():
            latent = self.latents(self.model, *seen)
            conditions = self.model.conditions(query, latent)
            start = conditions.start
            zeros = torch.zeros_like(start), start.new_zeros(len(start)), start.new_zeros(len(start))
            u = self.model.decoder.predict(*zeros, on_grids(conditions, sides, valid, place))
        squares = (u.float() - (truth - start) / self.std).square().mean(-1) * valid
        weight = torch.ones_like(squares[:, 0])
        weight[len(weight) - len(seen[1]) :] = self.recipe["partly"][1]
        return (squares * weight[:, None]).sum() / valid.sum()

    def decoding_loss(self, nodes, count):
        return self.decoding_error(*self.seen(nodes, count))

    def batch(self, nodes, count):
        truth, seen, (sides, query, valid, places) = self.seen(nodes, count)
        with torch.no_grad(), self.autocast():
            latent = self.encode(self.model, *seen).clone()
            start = self.model.conditions(query, latent).start
        return (latent, query, start, places, valid, sides), (truth - start) / self.std

    @torch.no_grad()
    def held_out_loss(self, weights, judge, images, draws=8):
        """Of the velocity on other images."""
        other = copy.copy(self)
        other.model, other.sources, other.encode = with_weights(judge, weights), [(images, 1.0)], self.latents
        losses = []
        for nodes, count in draws * list(self.recipe["batches"].items()):
            condition, data = other.batch(nodes, 2 * math.ceil(count * self.options.scale / 2))
            z, tau, target, _ = self.draw(data, self.recipe["mean"])
            weight = torch.ones_like(tau)
            losses.append(FieldTrainer.error(other, condition, z, tau, 0 * tau, target, weight).item())
        return float(np.mean(losses))

    def predict(self, model, condition, z, tau, delta):
        latent, query, _, places, valid, sides = condition
        conditions = model.conditions(query, latent)
        return model.decoder.predict(z, tau, delta, on_grids(conditions, sides, valid, places))


def on_grids(conditions, sides, valid, places):
    """The conditions with queries that are whole grids."""
    grids = Grids(sides, math.isqrt(conditions.start.shape[1]), valid)
    return conditions._replace(queries=grids, places=places)


class LatentTrainer(Trainer):
    """Of a flow over normalised latents (N, C)."""

    def __init__(self, model, latents, options, device):
        super().__init__(model, {"batches": {1: 1024}}, options, device)
        self.latents, self.error = latents, self.compiled(self.error)

    def error(self, data, noise, t):
        x = (1 - t[:, None]) * noise + t[:, None] * data
        return (self.model.loss_weight(t) * (self.model(x, t) - (data - noise)).square().mean(-1)).mean()

    def flow_loss(self, _, count):
        data = self.latents[torch.randint(len(self.latents), (count,), device=self.device)]
        return self.error(data, torch.randn_like(data), torch.rand(count, device=self.device))


def with_weights(model, weights):
    copy_into((p for p in model.parameters() if p.requires_grad), weights)
    return model


def rebuilt(model, **settings):
    """The same weights with other settings."""
    other = models.MambaDiffusionAutoencoder(dataclasses.replace(model.config, **settings))
    other.load_state_dict(model.state_dict())
    return other.to(model.latent_mean.device)


@torch.no_grad()
def encoded(model, pictures, index=None):
    """Latents (N, C) of pictures (N, 32, 32, 3) uint8, of all pixels or of those of index (N, I)."""
    device = model.latent_mean.device
    values = torch.from_numpy(to_model(pictures)).flatten(1, 2).to(device)
    coords = grid_coords(SIDE, SIDE).to(device).expand(len(values), -1, -1)
    if index is not None:
        coords, values = (x.gather(1, index[..., None].expand(-1, -1, x.shape[2])) for x in (coords, values))
    return torch.cat([model.encode(*part) for part in zip(coords.split(500), values.split(500), strict=True)])


def with_mirrored(sources):
    """All pictures of the sources (N, 32, 32, 3), and again mirrored."""
    pictures = np.concatenate([area_resize(images, SIDE) for images, _ in sources])
    return np.concatenate([pictures, pictures[:, :, ::-1]])


def held_out(model, images, sizes, masks):
    """score(weights): mean PSNR of the decodings of all pixels; prints that of 20%, too, at each size."""
    judge, small = copy.deepcopy(model), area_resize(images, SIDE)
    index = masks.masks[torch.arange(len(images), device=masks.masks.device) % len(masks.masks)]

    @torch.no_grad()
    def psnr(latents, side):
        query = grid_coords(side, side)[None].to(latents)
        made = [
            judge.decode(query.expand(len(z), -1, -1), z, footprint=1 / side)
            for z in latents.split(max(1, 100 * 32**2 // side**2))
        ]
        made = to_image(torch.cat(made).float()).reshape(-1, side, side, 3).cpu().numpy()
        return metrics.psnr(made, area_resize(images, side) / 255).mean()

    def score(weights):
        with_weights(judge, weights)
        found = np.array([[psnr(encoded(judge, small, i), k) for k in sizes] for i in (None, index)])
        print(f"      of all pixels {found[0].round(3)}, of 20% {found[1].round(3)} dB", flush=True)
        return float(found[0].mean())

    return score


def train_latents(model, sources, options, device, seconds):
    """A flow over the latents of the first source, mirrored too, whose statistics the model gets."""
    latents = encoded(model, with_mirrored(sources[:1]))
    model.latent_mean.copy_(latents.double().mean(0))
    model.latent_std.copy_(latents.double().std(0, correction=0))
    if not seconds:
        return None
    config = models.LatentVelocityNetworkConfig(latent_dim=latents.shape[1], **json.loads(options.flow))
    network = models.LatentVelocityNetwork(config).to(device)
    order = torch.randperm(len(latents), generator=torch.Generator().manual_seed(0)).to(device)
    held, kept = model.normalise(latents)[order].tensor_split([len(order) // 20])
    trainer, judge = LatentTrainer(network, kept, options, device), copy.deepcopy(network)
    generator = torch.Generator().manual_seed(0)
    noise, t = torch.randn(held.shape, generator=generator), torch.rand(len(held), generator=generator)

    @torch.no_grad()
    def score(weights):
        trainer.model, own = with_weights(judge, weights), trainer.model
        found, trainer.model = LatentTrainer.error(trainer, held, noise.to(device), t.to(device)), own
        return -found.item()

    _, weights = trainer.run(trainer.recorded(trainer.flow_loss), seconds, options.rate[0], score)
    return with_weights(network, weights)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", choices=RECIPES)
    add_options(parser, rates=(1e-3, 6e-4, 4e-4))
    parser.add_argument("--seconds", type=float, nargs=4, help="decoding, flow, whole steps, latents")
    parser.add_argument("--init", type=Path, help="a trained model of phase 1: leave out phase 1")
    parser.add_argument("--flow", default="{}", metavar="JSON", help="settings of the flow over latents")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    device, recipe = run.default_device(), RECIPES[options.recipe]
    sources, validation = training_data(options, recipe, held_out=128)
    seconds = options.seconds or recipe["seconds"]

    def trained(model, seconds, rate, loss):
        trainer = AutoencoderTrainer(model, sources, recipe, options, device)
        psnr = held_out(model, validation, sorted({SIDE, max(recipe["batches"])}), trainer.splines)
        others, judge = Images(validation, device, recipe["turns"]), copy.deepcopy(model)

        def score(weights):
            found = psnr(weights)
            return found if loss == "decoding_loss" else -trainer.held_out_loss(weights, judge, others)

        print(f"{loss}; before: {score([p.detach() for p in trainer.parameters]):.3f}", flush=True)
        found, weights = trainer.run(trainer.recorded(getattr(trainer, loss)), seconds, rate, score)
        print(f"{loss}: {found:.3f} on held-out images", flush=True)
        save(with_weights(model, trainer.average if loss == "step_loss" else weights), options.out)
        return model

    if options.init:
        model = models.load_model(options.init).to(device)
    else:
        config = models.MambaDiffusionAutoencoderConfig(**recipe["model"] | options.set)
        model = models.MambaDiffusionAutoencoder(config)
        models.fit_linear_code(model, with_mirrored(sources))
        pictures = torch.from_numpy(to_model(area_resize(sources[0][0][:2000], SIDE)))
        code = model.encoder.linear_code
        left = (code.decode(code.encode(pictures)) - pictures).square().mean().sqrt().item()
        model = rebuilt(model, residual_std=recipe.get("std") or round(left, 3)).to(device)
        model = model.to(memory_format=torch.channels_last)
        model = trained(model, seconds[0], options.rate[0], "decoding_loss")
    if seconds[1]:
        model = models.second_phase(model).to(memory_format=torch.channels_last)
        model = trained(model, seconds[1], options.rate[1], "velocity_loss")
        if seconds[2]:
            model = trained(model, seconds[2], options.rate[2], "step_loss")
            model = rebuilt(model, shortcut=True)
    flow = train_latents(model, sources, options, device, seconds[3])
    save(model, options.out)
    if flow is not None:
        save(flow, options.out.with_name(options.out.name + "-latent"))


if __name__ == "__main__":
    main()
