"""Train checkpoints/diffae-photos-latent: a flow over the latents of an autoencoder, as notebook 06 does.

    python benchmarks/latent_flow.py checkpoints/diffae-photos --out FOLDER [--quick] [--device cuda]

It learns the normalised latents of 8,192 windows of photographs from 20% of their pixels, 3,000 steps of 256.
"""

import argparse
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from nfhelpers import images, models, run
from nfhelpers.checkpoint import save_model


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--quick", action="store_true", help="few windows and steps")
    options = parser.parse_args(arguments)
    device, (windows, steps, width) = run.default_device(options.device), (8192, 3000, 384)
    if options.quick:
        windows, steps, width = 64, 10, 32
    torch.manual_seed(0)
    model = models.load_model(options.model).to(device)
    data = images.SparseFields(images.load_images("photos", "train", 32, windows), seed=0)
    latents = models.fit_latent_statistics(model, data, progress=True)  # (N, C)
    latents = models.load_model(options.model).normalise(latents).to(device)  # with its own statistics
    config = models.LatentVelocityNetworkConfig(latent_dim=latents.shape[1], width=width, depth=4)
    flow = models.LatentVelocityNetwork(config).to(device)
    optimizer = torch.optim.AdamW(flow.parameters(), lr=1e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in (bar := tqdm(range(steps))):
        x1 = latents[torch.randint(len(latents), (256,), device=device)]  # (B, C)
        x0, t = torch.randn_like(x1), torch.rand(256, device=device)
        x_t = (1 - t[:, None]) * x0 + t[:, None] * x1
        loss = (flow.loss_weight(t)[:, None] * (flow(x_t, t) - (x1 - x0)).square()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    save_model(flow, options.out, f"# A flow over latents of {options.model}: loss {loss.item():.4f}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
