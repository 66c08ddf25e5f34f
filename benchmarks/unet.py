"""A U-Net as large as the flagship, trained likewise, that regresses the posterior mean.

    python benchmarks/unet.py --data cifar10:0.7 windows.npz:0.3 --seconds 684 --out runs/unet-cifar10.json \
        --beside checkpoints/field-cifar10

Fields, masks, spline, Muon, averaged weights and the choice by held-out images are those of flagship.py; all
fields are at t = 0. It scores test images of the first source, 20% observed, beside another model's means.
The shipped field-cifar10 had 684 seconds of velocities, 60% of them at t = 0, and 310 of whole steps.
"""

import argparse
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import common
import flagship
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from nfhelpers import evaluate, models, run
from nfhelpers.images import grid_coords, load_images
from nfhelpers.models.layers import zero
from nfhelpers.models.spline import thin_plate_spline

SIDE = flagship.SIDE


def convolution(width, out):
    """Norm, SiLU and a 3 x 3 convolution."""
    return nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, out, 3, padding=1)


class Block(nn.Module):
    """Two 3 x 3 convolutions, added to their input; at first they return zero."""

    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(*convolution(width, width), *convolution(width, width))
        zero(self.layers[-1])

    def forward(self, x):
        return x + self.layers(x)


class Attention(nn.Module):
    """Attention of all places to all, four heads, added to its input; at first it returns zero."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.qkv = nn.GroupNorm(8, width), nn.Conv2d(width, 3 * width, 1)
        self.out = zero(nn.Conv2d(width, width, 1))

    def forward(self, x):  # (B, C, H, W)
        heads = self.qkv(self.norm(x)).flatten(2).mT.unflatten(2, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        found = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2).mT  # (B, C, H * W)
        return x + self.out(found.unflatten(2, x.shape[2:]))


class UNet(nn.Module):
    """A velocity field at t = 0, from observed pixels, their mask and the spline, on the grid of 32 x 32."""

    def __init__(self, widths=(96, 160, 288), blocks=2, residual_std=0.15):
        super().__init__()
        self.config = SimpleNamespace(residual_std=residual_std)
        pairs = list(zip(widths[:-1], widths[1:], strict=True))
        self.embedding = nn.Conv2d(7, widths[0], 3, padding=1)
        self.down = nn.ModuleList(nn.Sequential(*(Block(w) for _ in range(blocks))) for w in widths[:-1])
        self.shrink = nn.ModuleList(nn.Conv2d(a, b, 2, stride=2) for a, b in pairs)
        self.middle = nn.Sequential(*(layer(widths[-1]) for layer in 2 * [Block, Attention]))
        self.grow = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, stride=2) for a, b in pairs)
        self.up = nn.ModuleList(nn.Sequential(*(Block(w) for _ in range(blocks))) for w in widths[:-1])
        self.decoders = nn.Sequential(*convolution(widths[0], 3))
        zero(self.decoders[-1])

    def residual(self, index, values, start):
        """Of observed pixels (B, I) with values (B, I, 3), over the spline (B, 1024, 3): (B, 1024, 3)."""
        marked = F.pad(values, (0, 1), value=1.0)
        grid = start.new_zeros(*start.shape[:2], 4).scatter(1, index[..., None].expand_as(marked), marked)
        x = self.embedding(torch.cat([grid, start], -1).mT.unflatten(2, (SIDE, SIDE)))
        skips = []
        for blocks, shrink in zip(self.down, self.shrink, strict=True):
            skips.append(blocks(x))
            x = shrink(skips[-1])
        x = self.middle(x)
        for blocks, grow in reversed(list(zip(self.up, self.grow, strict=True))):
            x = blocks(grow(x) + skips.pop())
        return self.decoders(x).flatten(2).mT

    def forward(self, noisy_values, query_coords, t, input_coords, input_values):
        places = ((c * SIDE).long().unbind(-1) for c in (query_coords, input_coords))
        query, index = (y * SIDE + x for x, y in places)
        pixels = grid_coords(SIDE, SIDE, noisy_values.device).expand(len(index), -1, -1)
        start = thin_plate_spline(pixels, input_coords, input_values).clamp(-1, 1)
        mean = start + self.config.residual_std * self.residual(index, input_values, start)
        return mean.gather(1, query[..., None].expand_as(noisy_values)) - noisy_values


class UNetTrainer(flagship.FieldTrainer):
    def predict(self, model, condition, z, tau, delta):
        return model.residual(*condition[:3])


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    flagship.add_options(parser, rates=(1e-3,))
    parser.add_argument("--seconds", type=float, default=684, help="of steps (684)")
    parser.add_argument("--beside", type=Path, help="folder of a model that is scored likewise")
    parser.add_argument("--images", type=int, default=517, help="test images (517)")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    device, recipe = run.default_device(), flagship.RECIPES["field-cifar10"] | {"mean": 1.0}
    sources, validation = flagship.training_data(options, recipe, held_out=64)
    model = UNet(**options.set).to(device, memory_format=torch.channels_last)
    trainer = UNetTrainer(model, sources, recipe, options, device)
    score = flagship.held_out(model, validation, [SIDE])
    found, weights = trainer.run(
        trainer.recorded(trainer.velocity_loss), options.seconds, options.rate[0], score
    )
    trainer.restart(weights)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    kept = {name: x.contiguous() for name, x in model.state_dict().items()}
    save_file(kept, options.out.with_suffix(".safetensors"))
    test = load_images(options.data[0].rsplit(":", 1)[0], "test", SIDE, limit=options.images)
    methods = {"U-Net": model.eval()}
    if options.beside:
        methods[options.beside.name] = models.load_model(options.beside).to(device).eval()
    table, _ = evaluate.compare(methods, test)
    by_image = table.pivot(index="image", columns="model", values="psnr")
    gain = by_image.rsub(by_image["U-Net"], axis=0)
    rows = table.groupby("model")[["psnr", "ssim"]].agg(["mean", "sem"])
    rows["U-Net minus it", "mean"], rows["U-Net minus it", "sem"] = gain.mean(), gain.sem()
    about = {"parameters": sum(p.numel() for p in model.parameters()), "held out": found}
    about |= {"seconds": options.seconds, "data": options.data, "beside": str(options.beside)}
    common.write_results(
        table, options.out, shlex.join(["python", "benchmarks/unet.py", *arguments]), **about
    )
    print(f"U-Net: {about['parameters'] / 1e6:.2f} M parameters, {found:.3f} dB on held-out images")
    common.show(rows)


if __name__ == "__main__":
    main()
