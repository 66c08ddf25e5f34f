"""A diffusion autoencoder of sparse fields: a field as one latent vector, and back at any coordinates.

Phase 1 trains both by the squared error; phase 2 teaches the decoder to draw what the latent leaves open.
Source: Preechakul et al., "Diffusion Autoencoders: Toward a Meaningful and Decodable Representation", 2022.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from nfhelpers.flow import check_unit_range, loss_weight, path_variance, skip_weight
from nfhelpers.images import area_resize, to_model
from nfhelpers.models.base import FieldModel, Layers, ModelConfig, evaluation_mode
from nfhelpers.models.field import FieldConditions, Hats, MambaField, MambaFieldConfig, Modulated, Pyramid
from nfhelpers.models.layers import RMSNorm, TimeEmbedding, mlp, zero
from nfhelpers.models.sparse_fields import SparseField, check_points

SMALLEST_STD = 1e-6  # that a latent channel is divided by: one that never changes normalises to 0


@dataclass(frozen=True, kw_only=True)
class MambaDiffusionAutoencoderConfig(MambaFieldConfig):
    """Settings of `MambaDiffusionAutoencoder`: those of its decoder, a `MambaField`, and of the latent."""

    phase: int = 1  # the decoder makes means; 2: samples, too, and the encoder is frozen
    latent_dim: int = 512
    d_node: int = 16  # channels of a node between the coarsest lattice and the latent
    model_type: ClassVar[str] = "diffae"

    def __post_init__(self):
        super().__post_init__()
        if self.phase not in (1, 2):
            raise ValueError(f"phase={self.phase}: pass 1 (autoencoder) or 2 (with flow matching)")


class LinearCode(nn.Module):
    """Whitened principal components of pictures (n, n, 3); zeros until `fit_linear_code` has found them."""

    def __init__(self, nodes, channels):
        super().__init__()
        self.nodes = nodes
        self.register_buffer("components", torch.zeros(channels, 3 * nodes**2))  # orthonormal
        self.register_buffer("mean", torch.zeros(3 * nodes**2))
        self.register_buffer("scale", torch.ones(channels))  # standard deviations

    def encode(self, pictures):
        with torch.autocast(pictures.device.type, enabled=False):
            return (pictures.flatten(1) - self.mean) @ self.components.mT / self.scale  # (B, C)

    def decode(self, code):
        with torch.autocast(code.device.type, enabled=False):
            pictures = self.mean + (self.scale * code) @ self.components
        return pictures.unflatten(1, (self.nodes, self.nodes, 3))  # (B, n, n, 3)


class FieldEncoder(Pyramid):
    """A linear code of observed points, and what a pyramid's way down adds to it: nothing to begin with."""

    def __init__(self, config: MambaDiffusionAutoencoderConfig):
        c, base = config, config.finer
        own = dict(finer=0, widths=c.widths[base:], blocks=c.blocks[base:], d_time=1)
        super().__init__(replace(c, **own), up=False)
        self.linear_code = LinearCode(c.nodes, c.latent_dim)
        self.picture_embedding = nn.Linear(2 * 3, c.widths[base])
        self.to_nodes = nn.Sequential(RMSNorm(c.widths[-1]), nn.Linear(c.widths[-1], c.d_node))
        self.to_latent = zero(nn.Linear(self.orders.shape[1] * c.d_node, c.latent_dim))

    def picture(self, coords, values):
        """A picture (B, n, n, 3) of observed values: each lattice gathers what coarser ones leave, twice."""
        picture = values.mean(1)[:, None, None].expand(-1, *(self.nodes >> len(self.down),) * 2, -1)
        for level in reversed(range(len(self.down) + 1)):
            hats = Hats.of(coords, self.nodes >> level)
            picture = F.interpolate(picture.permute(0, 3, 1, 2), (hats.nodes,) * 2, mode="bilinear")
            picture = picture.permute(0, 2, 3, 1)
            for _ in range(2):
                picture = picture + hats.gather(values - hats.read(picture))
        return picture

    def forward(self, inputs, picture):
        """Latent (B, C) of `gather`'s inputs (B, n, n, D) and the `picture` (B, n, n, 3)."""
        code = self.linear_code.encode(picture)  # (B, C)
        seen = torch.cat([picture, picture - self.linear_code.decode(code)], dim=-1)
        x = inputs + self.picture_embedding(seen)  # (B, n, n, D)
        x, _ = self.descend(x, x.new_ones(len(x), 1))  # there is no time
        return code + self.to_latent(self.to_nodes(x).flatten(1)).to(code)


class MambaDiffusionAutoencoder(SparseField):
    """Semantic autoencoder of sparse fields, whose decoder is the flagship, `MambaField`.

    `decode` reads the picture of the linear code anywhere: there the flow starts, and the decoder takes its
    pixels for observed. The latent joins beside the time, and at the coarsest lattice. Phase 1 trains at
    t = 0, where one step is the mean of all fields with this latent; phase 2 freezes the encoder and trains
    at all times.
    """

    launch_bound = True
    takes_footprint = True

    def __init__(self, config: MambaDiffusionAutoencoderConfig):
        super().__init__()
        c = self.config = config
        self.encoder, self.decoder = FieldEncoder(c), MambaField(c)
        self.encoder.requires_grad_(c.phase == 1)
        self.from_latent = nn.Linear(c.latent_dim, self.decoder.orders.shape[1] * c.d_node)
        self.from_nodes = nn.Linear(c.d_node, c.widths[-1])
        self.condition = zero(nn.Linear(c.latent_dim, c.d_time))
        self.register_buffer("latent_mean", torch.full((c.latent_dim,), torch.nan))  # (C,), until they are
        self.register_buffer("latent_std", torch.full((c.latent_dim,), torch.nan))  # fitted
        self.shortcut, self.shortcut_times = c.shortcut and c.phase == 2, self.decoder.shortcut_times

    def encode(self, coords, values):
        """Latent (B, C), not normalised, of values (B, Ni, 3) observed at coords (B, Ni, 2)."""
        check_points(None, (coords, values))
        return self.encoder(self.encoder.gather(coords, values), self.encoder.picture(coords, values))

    def decode(self, coords, latent, t=None, noisy_values=None, *, footprint=None, until=None):
        """The mean (B, Nq, 3), at coords (B, Nq, 2), of all fields with this latent (B, C), not normalised.

        With noisy_values (B, Nq, 3), x_t at t (B,), the velocity instead. footprint, until: of `MambaField`.
        """
        conditions = self.conditions(coords, latent, footprint)
        if noisy_values is None:  # one step from nothing
            t, noisy_values = coords.new_zeros(len(coords)), torch.zeros_like(conditions.start)
        return self(noisy_values, coords, t, None, None, conditions, until=until)

    def conditions(self, coords, latent, footprint=None):
        """`FieldConditions` of the decoder at these queries."""
        check_points(None, (coords, None))
        c, side = self.config, math.isqrt(self.decoder.orders.shape[1])
        picture = self.encoder.linear_code.decode(latent)  # (B, n, n, 3)
        places = 2 * coords[:, :, None] - 1  # as grid_sample counts them
        options = dict(mode="bicubic", padding_mode="border", align_corners=False)
        start = F.grid_sample(picture.permute(0, 3, 1, 2), places, **options).squeeze(3).mT  # (B, Q, 3)
        pixels = self.decoder.input_embedding(F.pad(picture, (0, 2)))  # (B, n, n, D), at the nodes
        nodes = self.from_nodes(self.from_latent(latent).unflatten(1, (side, side, -1)))  # (B, H, W, D)
        inputs = {c.finer: pixels, len(c.widths) - 1: nodes}
        return FieldConditions(*self.decoder.places(coords, footprint), start, inputs, self.condition(latent))

    def prepare(self, query_coords, input_coords, input_values, footprint=None):
        return self.conditions(query_coords, self.encode(input_coords, input_values), footprint)

    def forward(
        self, noisy_values, query_coords, t, input_coords, input_values, conditions=None, *, footprint=None,
        until=None,
    ):  # fmt: skip
        """Velocity (B, Nq, 3) as of `MambaField`; in phase 1, which draws nothing, straight to the mean."""
        check_points(t, (query_coords, noisy_values))
        if conditions is None:
            conditions = self.prepare(query_coords, input_coords, input_values, footprint)
        if self.config.phase == 2:
            return self.decoder(noisy_values, query_coords, t, query_coords, None, conditions, until=until)
        nothing = torch.zeros_like(noisy_values), query_coords, torch.zeros_like(t), query_coords, None
        return (self.decoder(*nothing, conditions) - noisy_values) / (1 - t)[:, None, None].clamp_min(1e-6)

    def loss_times(self, t):  # (B,), drawn from [0, 1]
        return torch.zeros_like(t) if self.config.phase == 1 else t

    def loss_weight(self, t):
        return loss_weight(t, self.config.residual_std)

    def normalise(self, latent):
        """Latent (B, C) of `encode` -> of mean 0 and standard deviation 1 over the training set, (B, C)."""
        return (latent - self.latent_mean.to(latent)) / self.latent_std.to(latent).clamp_min(SMALLEST_STD)

    def denormalise(self, latent):
        return latent * self.latent_std.to(latent) + self.latent_mean.to(latent)


class LatentBlock(nn.Module):
    """Residual MLP on vectors (B, 1, 1, W), scaled and shifted by the time; zero to begin with."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.mlp = Modulated(width, width), mlp(width, 2 * width, width)
        zero(self.mlp[-1])

    def forward(self, x, time):
        return x + self.mlp(self.norm(x, time))


@dataclass(frozen=True, kw_only=True)
class LatentVelocityNetworkConfig(ModelConfig):
    """Settings of `LatentVelocityNetwork`."""

    latent_dim: int = 512
    width: int = 1024
    depth: int = 6
    model_type: ClassVar[str] = "latent_flow"


class LatentVelocityNetwork(FieldModel):
    """Velocity of latents, z-normalised: a residual MLP, preconditioned as `MambaField`. Untrained, it is the
    exact velocity between two Gaussians."""

    def __init__(self, config: LatentVelocityNetworkConfig):
        super().__init__()
        self.config = config
        self.in_proj = nn.Linear(config.latent_dim, config.width)
        self.time = TimeEmbedding(config.width)
        self.blocks = Layers(LatentBlock(config.width) for _ in range(config.depth))
        self.out = nn.Sequential(RMSNorm(config.width), zero(nn.Linear(config.width, config.latent_dim)))

    def forward(self, noisy_latent, t):
        """Velocity (B, C) at noisy latents (B, C) of `normalise`, t (B,) in [0, 1], 0 is noise."""
        check_unit_range("t", t, "times")
        time = t[:, None]  # (B, 1)
        scale = path_variance(time, 1.0).sqrt()  # (B, 1)
        x = self.in_proj(noisy_latent / scale)[:, None, None]  # (B, 1, 1, W)
        x = self.blocks(x, F.silu(self.time(t))).flatten(1)  # (B, W)
        return skip_weight(time, 1.0) * noisy_latent + self.out(x) / scale  # (B, C)

    def loss_weight(self, t):
        return loss_weight(t, 1.0)


def fit_linear_code(model: MambaDiffusionAutoencoder, images: np.ndarray) -> None:
    """Set the model's linear code to the principal components of images (N, H, W, 3) uint8, its training set,
    shrunk to the nodes: given all pixels, the untrained autoencoder then is PCA."""
    from sklearn.decomposition import PCA

    code = model.encoder.linear_code
    flat = to_model(area_resize(images, code.nodes)).reshape(len(images), -1)
    pca = PCA(len(code.components), random_state=0).fit(flat)  # raises where there are too few images
    code.components.copy_(torch.from_numpy(pca.components_))
    code.mean.copy_(torch.from_numpy(pca.mean_))
    code.scale.copy_(torch.from_numpy(pca.explained_variance_).sqrt().clamp_min(SMALLEST_STD))


@torch.no_grad()
def fit_latent_statistics(
    model: MambaDiffusionAutoencoder, dataset: Dataset, *, batch_size: int = 64, progress: bool = False
) -> torch.Tensor:
    """Set the model's latent mean and standard deviation to those over its training set, a `SparseFields`;
    returns the latents (N, C), not normalised, on the CPU."""
    device, latents = model.latent_mean.device, []
    with evaluation_mode(model):
        for batch in tqdm(DataLoader(dataset, batch_size), desc="encode", disable=not progress):
            points = batch["input_coords"].to(device), batch["input_values"].to(device)
            latents.append(model.encode(*points).cpu())
    latents = torch.cat(latents)  # (N, C)
    model.latent_mean.copy_(latents.double().mean(0))
    model.latent_std.copy_(latents.double().std(0, correction=0))
    return latents


def second_phase(first: MambaDiffusionAutoencoder, *, shortcut=False) -> MambaDiffusionAutoencoder:
    """A copy of a trained model of phase 1 whose encoder is frozen, to be trained at all times."""
    if first.config.phase != 1:
        raise ValueError(f"this model is of phase {first.config.phase}; pass one of phase 1")
    model = MambaDiffusionAutoencoder(replace(first.config, phase=2, shortcut=shortcut))
    model.load_state_dict(first.state_dict())
    return model.to(first.latent_mean)
