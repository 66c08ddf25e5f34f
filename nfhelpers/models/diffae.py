"""A diffusion autoencoder of sparse fields: a field as one latent vector, and back at any coordinates.

Glossary
    b  batch
    q  query points, where the field is wanted
    i  observed (input) points, where the field is known
    l  tokens of the sequence
    d  model width (d_model)
    f  random Fourier frequencies
    k  directions of a scan
    c  channels of the latent vector (latent_dim)

Sources: seed 004; Preechakul et al., "Diffusion Autoencoders: Toward a Meaningful and Decodable
Representation", CVPR 2022.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from nfhelpers.flow import check_unit_range, loss_weight, skip_weight
from nfhelpers.kernels.orders import inverse_order, point_order
from nfhelpers.models.base import FieldModel, ModelConfig, run_layers
from nfhelpers.models.layers import (
    FourierFeatures,
    PointEmbedding,
    TimeEmbedding,
    gather_tokens,
    mlp,
    squared_distances,
)
from nfhelpers.models.sparse_fields import (
    MultiDirectionalMambaDiffusion,
    check_common,
    check_orders,
    check_shapes,
    directional_blocks,
    joint_orders,
    residual_decoder,
)

SMALLEST_STD = 1e-6
"""Least standard deviation that a latent channel is divided by: one that never changes normalises to 0."""

AREA_CELLS = 24
"""Side of the grid by which `point_areas` measures."""

# ---------------------------------------------------------------------------------------------------- helpers


def check_latent(latent: torch.Tensor, latent_dim: int, batch: int | None = None) -> None:
    """Raise ValueError unless `latent` is (B, latent_dim), floating point, and of this batch where given."""
    if not isinstance(latent, torch.Tensor) or not latent.is_floating_point():
        kind = latent.dtype if isinstance(latent, torch.Tensor) else type(latent).__name__
        raise ValueError(
            f"latent is a {kind}; pass a floating-point tensor (B, {latent_dim}), as encode() returns"
        )
    if latent.ndim != 2 or latent.shape[1] != latent_dim or len(latent) == 0:
        raise ValueError(
            f"latent has shape {tuple(latent.shape)}; pass (B, {latent_dim}): this model has "
            f"latent_dim={latent_dim}"
        )
    if batch is not None and len(latent) != batch:
        raise ValueError(f"latent has a batch of {len(latent)} and coords of {batch}; pass one of each")


def check_points(name: str, coords: torch.Tensor) -> None:
    """Raise ValueError unless `coords` is (B, L, 2), floating point and, on the CPU, in [0, 1]."""
    if coords.ndim != 3 or coords.shape[-1] != 2 or 0 in coords.shape or not coords.is_floating_point():
        raise ValueError(
            f"{name} has shape {tuple(coords.shape)} and dtype {coords.dtype}; pass (B, L, 2), torch.float32"
        )
    check_unit_range(name, coords, "pixel centres (x, y)")


def point_areas(coords: torch.Tensor) -> torch.Tensor:
    """The share of the image that each of the points (B, I, 2) stands for -> (B, I), which sums to 1.

    Every cell of a grid of `AREA_CELLS` a side goes to the points near it, the nearest most. A mean over
    randomly placed points, weighted by this, is the integral over the image with less of the error of where
    the points happen to lie; and it is the same integral for few points as for many.
    """
    centres = (torch.arange(AREA_CELLS, device=coords.device, dtype=coords.dtype) + 0.5) / AREA_CELLS
    grid = torch.cartesian_prod(centres, centres).expand(len(coords), -1, -1)  # (B, G, 2)
    sharpness = min(4 * coords.shape[1], 2 * AREA_CELLS**2)  # near 1 / area of a point, or of a cell
    share = (-sharpness * squared_distances(grid, coords)).softmax(dim=-1)  # (B, G, I)
    return share.mean(1)  # (B, I)


# ----------------------------------------------------------------------------------------------------- layers


class GatedEmbedding(nn.Module):
    """gate(features) * projection(values): products of where a point is and what is there.

    Their mean over the points is a linear functional of the field, as a coefficient of PCA or of a Fourier
    series is; the mean of a sum of two embeddings has no such part.
    """

    def __init__(self, num_features: int, num_values: int, dim: int):
        super().__init__()
        self.gate = nn.Linear(num_features, dim)
        self.value_proj = nn.Linear(num_values, dim)

    def forward(self, features: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Features (B, L, num_features) and values (B, L, num_values) -> (B, L, dim)."""
        return self.gate(features) * self.value_proj(values)  # (B, L, dim)


class FiLM(nn.Module):
    """Scale and shift tokens by a linear function of a condition (Perez et al. 2018)."""

    def __init__(self, num_conditions: int, d_model: int):
        super().__init__()
        self.proj = nn.Linear(num_conditions, 2 * d_model)

    def forward(self, tokens: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """Tokens (B, L, D) and conditions (B, num_conditions) -> (B, L, D)."""
        scale, shift = self.proj(condition)[:, None].chunk(2, dim=-1)  # (B, 1, D) each
        return tokens * (1 + scale) + shift  # (B, L, D)


class FieldEncoder(nn.Module):
    """Observed points -> latent: scans in several directions, then the mean over the points (seed 004).

    The mean is of products with functions of the place (`GatedEmbedding`), before the scans and after them,
    and points count for the area around them (`point_areas`).
    """

    def __init__(self, config: "MambaDiffusionAutoencoderConfig"):
        super().__init__()
        d, features = config.d_model, 2 * config.num_fourier_features
        self.orders = config.orders
        self.fourier = FourierFeatures(config.num_fourier_features, config.fourier_scale)
        self.embedding = PointEmbedding(features, d)
        self.product = GatedEmbedding(features, 3, d)
        self.blocks = directional_blocks(config, bidirectional=False, num_layers=config.num_encoder_layers)
        self.token_norm = nn.RMSNorm(d)
        self.pooled = GatedEmbedding(features, d, config.latent_dim)
        self.pooled_norm = nn.RMSNorm(config.latent_dim)
        self.latent_proj = nn.Linear(config.latent_dim, config.latent_dim)

    def forward(self, coords: torch.Tensor, values: torch.Tensor, recompute: bool = False) -> torch.Tensor:
        """Points (B, I, 2) and values (B, I, 3) -> latent (B, C); `recompute`: as in `run_layers`."""
        order = point_order(coords, "row")  # (B, I): sums are then the same however the points are listed
        coords, values = gather_tokens(coords, order), gather_tokens(values, order)
        dtype = self.latent_proj.weight.dtype
        features = self.fourier(coords).to(dtype)  # (B, I, 2F)
        tokens = (self.embedding(features, values) + self.product(features, values)).to(dtype)  # (B, I, D)
        orders = joint_orders(coords, self.orders, bidirectional=False)  # (B, K, I)
        tokens = run_layers(self.blocks, tokens, orders, recompute=recompute)  # (B, I, D)
        products = self.pooled(features, self.token_norm(tokens)).to(dtype)  # (B, I, C)
        pooled = (point_areas(coords).to(dtype)[..., None] * products).sum(1)  # (B, C)
        return self.latent_proj(self.pooled_norm(pooled)).to(dtype)  # (B, C)


class LatentDecoder(nn.Module):
    """Latent -> values at any points: the sum of a bilinear map and of what scans over the points make.

    The bilinear map, ``sum_k a_k(latent) basis_k(p)`` for each channel, is the form of a linear decoder such
    as PCA's. The tokens that are scanned are functions of the place, scaled and shifted by the latent.
    """

    def __init__(self, config: "MambaDiffusionAutoencoderConfig"):
        super().__init__()
        d, features = config.d_model, 2 * config.num_fourier_features
        self.orders = config.orders
        self.fourier = FourierFeatures(config.num_fourier_features, config.fourier_scale)
        self.basis = mlp(features, d, d)
        self.coefficients = nn.Linear(config.latent_dim, 3 * d)
        self.coord_proj = nn.Linear(features, d)
        self.film = FiLM(config.latent_dim, d)
        self.blocks = directional_blocks(config, bidirectional=False, num_layers=config.num_decoder_layers)
        self.head = residual_decoder(d, config.dropout)

    def forward(self, coords: torch.Tensor, latent: torch.Tensor, recompute: bool = False) -> torch.Tensor:
        """Points (B, Q, 2) and latent (B, C) -> values (B, Q, 3); `recompute`: as in `run_layers`."""
        order = point_order(coords, "row")  # (B, Q)
        coords = gather_tokens(coords, order)
        dtype = self.coord_proj.weight.dtype
        features = self.fourier(coords).to(dtype)  # (B, Q, 2F)
        basis = self.basis(features)  # (B, Q, D)
        coefficients = self.coefficients(latent).unflatten(-1, (-1, 3))  # (B, D, 3)
        bilinear = basis @ coefficients / basis.shape[-1] ** 0.5  # (B, Q, 3)
        tokens = self.film(self.coord_proj(features), latent).to(dtype)  # (B, Q, D)
        orders = joint_orders(coords, self.orders, bidirectional=False)  # (B, K, Q)
        tokens = run_layers(self.blocks, tokens, orders, recompute=recompute)  # (B, Q, D)
        values = bilinear.to(dtype) + self.head(tokens)  # (B, Q, 3)
        return gather_tokens(values.to(dtype), inverse_order(order))  # (B, Q, 3)


class VelocityRefiner(nn.Module):
    """What phase 2 adds to the velocity of the deterministic decoding; zero to begin with.

    Tokens are scaled and shifted by the latent and the time, then scanned in several directions.
    """

    def __init__(self, config: "MambaDiffusionAutoencoderConfig"):
        super().__init__()
        d, features = config.d_model, 2 * config.num_fourier_features
        self.orders = config.orders
        self.fourier = FourierFeatures(config.num_fourier_features, config.fourier_scale)
        self.embedding = PointEmbedding(features, d, num_values=6)
        self.time = TimeEmbedding(d)
        self.latent_proj = nn.Linear(config.latent_dim, d)
        self.film = FiLM(d, d)
        self.blocks = directional_blocks(config, bidirectional=False, num_layers=config.num_decoder_layers)
        self.head = residual_decoder(d, config.dropout)

    def forward(
        self,
        seen: torch.Tensor,
        coords: torch.Tensor,
        t: torch.Tensor,
        latent: torch.Tensor,
        recompute: bool = False,
    ) -> torch.Tensor:
        """Noisy rest and decoding (B, Q, 6) at (B, Q, 2), t (B,), latent (B, C) -> (B, Q, 3)."""
        order = point_order(coords, "row")  # (B, Q)
        coords, seen = gather_tokens(coords, order), gather_tokens(seen, order)
        dtype = self.latent_proj.weight.dtype
        tokens = self.embedding(self.fourier(coords).to(dtype), seen)  # (B, Q, D)
        condition = self.latent_proj(latent) + self.time(t)  # (B, D)
        tokens = self.film(tokens, F.silu(condition)).to(dtype)  # (B, Q, D)
        orders = joint_orders(coords, self.orders, bidirectional=False)  # (B, K, Q)
        tokens = run_layers(self.blocks, tokens, orders, recompute=recompute)  # (B, Q, D)
        return gather_tokens(self.head(tokens), inverse_order(order))  # (B, Q, 3)


class LatentBlock(nn.Module):
    """Residual MLP on vectors, scaled and shifted by the time; zero to begin with."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.film = FiLM(width, width)
        self.mlp = mlp(width, 2 * width, width)
        nn.init.zeros_(self.mlp[-1].weight)
        nn.init.zeros_(self.mlp[-1].bias)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """x (B, 1, W) and time (B, W) -> (B, 1, W)."""
        return x + self.mlp(self.film(self.norm(x), time))  # (B, 1, W)


# ----------------------------------------------------------------------------------------------------- config


@dataclass(frozen=True)
class MambaDiffusionAutoencoderConfig(ModelConfig):
    """Settings of `MambaDiffusionAutoencoder`; the defaults are seed 004's.

    But `fourier_scale`, 10 there: the latent is made of means over the image, and of functions that turn ten
    times across it these have next to nothing but the mean colour (measured: 15.8 dB, where 2 gives 18.5).

    `phase` is 1, encoder and deterministic decoder, or 2, these two frozen and a velocity network on top
    (`second_phase` makes the one from the other). `latent_dim` is the length of the latent vector, 64 to 1024
    being sensible. `residual_std` is the standard deviation of the data around the deterministic decoding, on
    the scale of values in [-1, 1]. `num_decoder_layers` are those of the decoder and again of the velocity
    network. The others are as in `MultiDirectionalMambaDiffusionConfig`.
    """

    phase: int = 1
    latent_dim: int = 512
    d_model: int = 512
    num_encoder_layers: int = 6
    num_decoder_layers: int = 6
    d_state: int = 16
    expand: int = 2
    num_fourier_features: int = 256
    fourier_scale: float = 3.0
    mlp_ratio: float = 2.0
    dropout: float = 0.1
    orders: tuple[str, ...] = ("row", "column", "diagonal", "antidiagonal")
    shared_weights: bool = True
    tied_decay: bool = True
    residual_std: float = 0.2
    model_type: ClassVar[str] = "diffae"

    def __post_init__(self):
        self.lists_to_tuples("orders")
        check_orders(self.orders)
        if isinstance(self.phase, bool) or self.phase not in (1, 2):
            raise ValueError(
                f"phase={self.phase!r} is unknown; pass 1 (autoencoder) or 2 (with flow matching)"
            )
        for name in ("shared_weights", "tied_decay"):
            self.check_flag(name)
        self.check_positive("latent_dim", "d_model", "num_encoder_layers", "num_decoder_layers", "d_state")
        self.check_positive("expand", "num_fourier_features", "fourier_scale", "mlp_ratio", "residual_std")
        self.check_dropout()
        if self.d_model % 2:
            raise ValueError(f"d_model={self.d_model} is odd; pass an even width such as 512")


@dataclass(frozen=True)
class MinimalLatentMambaConfig(ModelConfig):
    """Settings of `MinimalLatentMamba`; the defaults are seed 004's.

    `latent_dim` is the width of the bottleneck of each token, below `d_model`; the others are as in
    `MultiDirectionalMambaDiffusionConfig`.
    """

    latent_dim: int = 256
    d_model: int = 512
    num_layers: int = 6
    d_state: int = 16
    expand: int = 2
    num_fourier_features: int = 256
    fourier_scale: float = 10.0
    num_heads: int = 8
    mlp_ratio: float = 2.0
    dropout: float = 0.0
    orders: tuple[str, ...] = ("row", "column", "diagonal", "antidiagonal")
    shared_weights: bool = False
    tied_decay: bool = True
    model_type: ClassVar[str] = "minimal"

    def __post_init__(self):
        self.lists_to_tuples("orders")
        check_orders(self.orders)
        self.check_flag("shared_weights")
        check_common(self)
        self.check_positive("latent_dim")
        if self.latent_dim >= self.d_model:
            raise ValueError(
                f"latent_dim={self.latent_dim} is no bottleneck of d_model={self.d_model}; "
                f"pass less, such as {max(1, self.d_model // 2)}"
            )


@dataclass(frozen=True)
class LatentVelocityNetworkConfig(ModelConfig):
    """Settings of `LatentVelocityNetwork`: length of the latent, width and number of residual blocks."""

    latent_dim: int = 512
    width: int = 1024
    depth: int = 6
    model_type: ClassVar[str] = "latent_flow"

    def __post_init__(self):
        self.check_positive("latent_dim", "width", "depth")
        if self.width % 2:
            raise ValueError(f"width={self.width} is odd; pass an even width such as 1024")


# ------------------------------------------------------------------------------------------------------ model


class MambaDiffusionAutoencoder(FieldModel):
    """Semantic autoencoder of sparse fields with a flow on top (seed 004).

    `encode` makes one latent vector of the observed points; `decode` makes of it the values at any query
    points, in one of two ways:

    - without noisy values, the deterministic decoding m: what phase 1 trains, by the mean squared error;
    - with noisy values x_t, the velocity of a flow from noise to the field given the latent: what phase 2
      trains, encoder and decoder being frozen, so that m stays what it was, bit by bit.

    The velocity is preconditioned around m as that of `MambaField` is around its spline. With s =
    `config.residual_std` and V = (1 - t)^2 + t^2 s^2,

        velocity = m + skip_weight(t, s) r + s / sqrt(V) network(r / sqrt(V), m, t, latent),    r = x_t - t m

    In phase 1 there is no network. At t = 0 the velocity is then m - x_0, and the target of flow matching
    data - x_0: the loss at t = 0 is the mean squared error of m, and it is there, in phase 1, that training
    takes it (`loss_times`).

    Buffers `latent_mean`, `latent_std` (C,) are those of the latents of a training set
    (`fit_latent_statistics`), NaN until then. They travel with the checkpoint.
    """

    def __init__(self, config: MambaDiffusionAutoencoderConfig):
        super().__init__()
        self.config = config
        self.encoder = FieldEncoder(config)
        self.decoder = LatentDecoder(config)
        self.refiner = VelocityRefiner(config) if config.phase == 2 else None
        self.register_buffer("latent_mean", torch.full((config.latent_dim,), torch.nan))  # (C,)
        self.register_buffer("latent_std", torch.full((config.latent_dim,), torch.nan))  # (C,)
        if config.phase == 2:
            self.encoder.requires_grad_(False)
            self.decoder.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> "MambaDiffusionAutoencoder":
        """As nn.Module's; what phase 2 has frozen stays in eval mode, without dropout."""
        super().train(mode)
        if self.config.phase == 2:
            self.encoder.eval()
            self.decoder.eval()
        return self

    def encode(self, coords: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Latent (B, C) of observed points.

        coords (B, Ni, 2) are (x, y) in [0, 1], values (B, Ni, 3) in [-1, 1]. The latent is not normalised
        (`normalise`). Raises ValueError when shapes or dtypes do not fit and, on the CPU, for coordinates
        outside [0, 1].
        """
        check_points("coords", coords)
        if values.shape != (*coords.shape[:2], 3) or not values.is_floating_point():
            raise ValueError(
                f"values have shape {tuple(values.shape)} and dtype {values.dtype} for coords of "
                f"{tuple(coords.shape)}; pass ({coords.shape[0]}, {coords.shape[1]}, 3), torch.float32"
            )
        return self.encoder(coords, values, self.recompute)  # (B, C)

    def decode(
        self,
        coords: torch.Tensor,
        latent: torch.Tensor,
        t: torch.Tensor | None = None,
        noisy_values: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Values at query points, or with `noisy_values` their velocity.

        coords (B, Nq, 2) are (x, y) in [0, 1]; latent (B, C) is as `encode` returns it, not normalised.
        Without noisy_values the deterministic decoding, (B, Nq, 3) in about [-1, 1]; t is ignored. With
        noisy_values (B, Nq, 3), the state x_t of the flow at t (B,) in [0, 1], its velocity (B, Nq, 3).
        Raises ValueError for a latent of another size, when shapes or dtypes do not fit, for a missing t
        and, on the CPU, for t or coordinates outside [0, 1].
        """
        check_points("coords", coords)
        check_latent(latent, self.config.latent_dim, len(coords))
        start = self.decoder(coords, latent, self.recompute)  # (B, Q, 3), m
        if noisy_values is None:
            return start
        if noisy_values.shape != start.shape or not noisy_values.is_floating_point():
            raise ValueError(
                f"noisy_values have shape {tuple(noisy_values.shape)} and dtype {noisy_values.dtype}; "
                f"pass {tuple(start.shape)}, torch.float32"
            )
        if not isinstance(t, torch.Tensor) or t.shape != latent.shape[:1]:
            came = tuple(t.shape) if isinstance(t, torch.Tensor) else repr(t)
            raise ValueError(f"t is {came}; with noisy_values pass a tensor ({len(latent)},) in [0, 1]")
        check_unit_range("t", t, "times from noise, 0, to data, 1,")
        time, std = t[:, None, None], self.config.residual_std  # (B, 1, 1)
        rest = noisy_values - time * start  # (B, Q, 3)
        velocity = start + skip_weight(time, std) * rest  # (B, Q, 3)
        if self.refiner is None:
            return velocity
        scale = ((1 - time) ** 2 + (std * time) ** 2).sqrt()  # (B, 1, 1), sqrt(V)
        seen = torch.cat([rest / scale, start], dim=-1)  # (B, Q, 6)
        return velocity + std / scale * self.refiner(seen, coords, t, latent, self.recompute)  # (B, Q, 3)

    def forward(
        self,
        noisy_values: torch.Tensor,
        query_coords: torch.Tensor,
        t: torch.Tensor,
        input_coords: torch.Tensor,
        input_values: torch.Tensor,
    ) -> torch.Tensor:
        """Velocity of the field at the query points, given the latent of the observed ones.

        noisy_values (B, Nq, 3) is x_t, values in about [-1, 1]; query_coords (B, Nq, 2) and input_coords
        (B, Ni, 2) are (x, y) in [0, 1]; t (B,) in [0, 1], 0 is noise; input_values (B, Ni, 3) in [-1, 1].
        Returns (B, Nq, 3). In phase 1 one step from t = 0 is the deterministic decoding. Raises ValueError
        when the shapes or dtypes do not fit and, on the CPU, when t or coordinates are outside [0, 1].
        """
        check_shapes(noisy_values, query_coords, t, input_coords, input_values)
        latent = self.encode(input_coords, input_values)  # (B, C)
        return self.decode(query_coords, latent, t, noisy_values)  # (B, Q, 3)

    def loss_times(self, t: torch.Tensor) -> torch.Tensor:
        """Times at which training takes the loss, for t (B,) drawn from [0, 1]: in phase 1 always 0."""
        return torch.zeros_like(t) if self.config.phase == 1 else t

    def loss_weight(self, t: torch.Tensor) -> torch.Tensor:
        """Weight of the loss at t (B,) -> (B,): in phase 2 V / s^2, as that of `MambaField`."""
        return torch.ones_like(t) if self.config.phase == 1 else loss_weight(t, self.config.residual_std)

    def normalise(self, latent: torch.Tensor) -> torch.Tensor:
        """Latent (B, C) of `encode` -> of mean 0 and standard deviation 1 over the training set, (B, C).

        On any device. Raises ValueError for a latent of another size, and before `fit_latent_statistics`.
        """
        mean, std = self._statistics(latent)
        return (latent - mean) / std

    def denormalise(self, latent: torch.Tensor) -> torch.Tensor:
        """The inverse of `normalise`: what `decode` takes."""
        mean, std = self._statistics(latent)
        return latent * std + mean

    def _statistics(self, latent):
        """Mean and standard deviation (C,), where the latent is."""
        check_latent(latent, self.config.latent_dim)
        if not bool(torch.isfinite(self.latent_std).all()):
            raise ValueError(
                "this model has no mean and standard deviation of latents yet; call "
                "fit_latent_statistics(model, dataset) with its training set first"
            )
        return self.latent_mean.to(latent.device), self.latent_std.clamp_min(SMALLEST_STD).to(latent.device)


class MinimalLatentMamba(MultiDirectionalMambaDiffusion):
    """`MultiDirectionalMambaDiffusion` with a bottleneck in every token after the scans (seed 004).

    The seed's quick test: does compression alone change anything?
    """

    def __init__(self, config: MinimalLatentMambaConfig):
        super().__init__(config)
        self.to_latent = nn.Linear(config.d_model, config.latent_dim)
        self.from_latent = nn.Linear(config.latent_dim, config.d_model)

    def scan(self, tokens: torch.Tensor, coords: torch.Tensor) -> torch.Tensor:
        scanned = super().scan(tokens, coords)  # (B, L, D)
        return self.from_latent(self.to_latent(scanned)).to(tokens.dtype)  # (B, L, D), through (B, L, C)


class LatentVelocityNetwork(FieldModel):
    """Velocity of latents, z-normalised, from noise to data: unconditional sampling (seed 004).

    A residual MLP, preconditioned as `MambaField` is, around the Gaussian of mean 0 and standard deviation 1:
    untrained, it is the exact velocity between two of these.
    """

    def __init__(self, config: LatentVelocityNetworkConfig):
        super().__init__()
        self.config = config
        self.in_proj = nn.Linear(config.latent_dim, config.width)
        self.time = TimeEmbedding(config.width)
        self.blocks = nn.ModuleList(LatentBlock(config.width) for _ in range(config.depth))
        self.out = nn.Sequential(nn.RMSNorm(config.width), nn.Linear(config.width, config.latent_dim))
        nn.init.zeros_(self.out[-1].weight)
        nn.init.zeros_(self.out[-1].bias)

    def forward(self, noisy_latent: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Velocity (B, C) at noisy latents (B, C), t (B,) in [0, 1], 0 is noise.

        Latents are those of `MambaDiffusionAutoencoder.normalise`. Raises ValueError for a latent of another
        size or a t of another shape and, on the CPU, for a t outside [0, 1].
        """
        check_latent(noisy_latent, self.config.latent_dim)
        if t.shape != noisy_latent.shape[:1]:
            raise ValueError(f"t has shape {tuple(t.shape)}; pass ({len(noisy_latent)},), one a latent")
        check_unit_range("t", t, "times from noise, 0, to data, 1,")
        time = t[:, None]  # (B, 1)
        scale = ((1 - time) ** 2 + time**2).sqrt()  # (B, 1)
        x = self.in_proj(noisy_latent / scale)[:, None]  # (B, 1, W)
        x = run_layers(self.blocks, x, F.silu(self.time(t)), recompute=self.recompute)  # (B, 1, W)
        return skip_weight(time, 1.0) * noisy_latent + self.out(x[:, 0]) / scale  # (B, C)

    def loss_weight(self, t: torch.Tensor) -> torch.Tensor:
        """Weight of the loss at t (B,) -> (B,): what makes the error of the velocity that of the network."""
        return loss_weight(t, 1.0)


# --------------------------------------------------------------------------------- from phase to phase


def second_phase(
    first: MambaDiffusionAutoencoder | str | Path, *, residual_std: float = 0.2
) -> MambaDiffusionAutoencoder:
    """A model of phase 2 on a trained one of phase 1: its weights and latent statistics, frozen.

    first: the model, or the folder of `save_pretrained` it lies in; residual_std: as in the config. Returns a
    model on the same device. Raises ValueError when the folder holds no model, or not one of phase 1.
    """
    if not isinstance(first, MambaDiffusionAutoencoder):
        if not isinstance(first, str | os.PathLike) or not (Path(first) / "config.json").is_file():
            raise ValueError(
                f"phase 2 needs the model of phase 1, and {str(first)!r} is no folder that holds one; train "
                "it first (python -m nfhelpers train diffae_phase1) and pass its folder, such as "
                "'runs/diffae_phase1/demo/best'"
            )
        first = MambaDiffusionAutoencoder.from_pretrained(Path(first))
    if first.config.phase != 1:
        raise ValueError(f"this model is of phase {first.config.phase}; pass one of phase 1")
    model = MambaDiffusionAutoencoder(replace(first.config, phase=2, residual_std=residual_std))
    missing, _ = model.load_state_dict(first.state_dict(), strict=False)
    assert all(name.startswith("refiner.") for name in missing)
    return model.to(first.latent_mean.device)


@torch.no_grad()
def encode_dataset(
    model: MambaDiffusionAutoencoder, dataset: Dataset, *, batch_size: int = 64, progress: bool = False
) -> torch.Tensor:
    """Latents (N, C), on the CPU, of the observed points of every item of a dataset, in its order.

    dataset: items as of `images.SparseFields`; progress: show a bar. The latents are not normalised.
    """
    device, training = model.latent_mean.device, model.training
    model.eval()
    latents = []
    try:
        for batch in tqdm(DataLoader(dataset, batch_size), desc="encode", disable=not progress):
            latent = model.encode(batch["input_coords"].to(device), batch["input_values"].to(device))
            latents.append(latent.cpu())
    finally:
        model.train(training)
    return torch.cat(latents)  # (N, C)


def fit_latent_statistics(
    model: MambaDiffusionAutoencoder, dataset: Dataset, *, batch_size: int = 64, progress: bool = False
) -> torch.Tensor:
    """Set the model's latent mean and standard deviation to those over a dataset, its training set.

    Arguments and result are those of `encode_dataset`. Raises ValueError for fewer than two items.
    """
    if len(dataset) < 2:
        raise ValueError(f"the dataset has {len(dataset)} items; pass at least 2, the training set")
    latents = encode_dataset(model, dataset, batch_size=batch_size, progress=progress)  # (N, C)
    wide = latents.double()
    model.latent_mean.copy_(wide.mean(0))
    model.latent_std.copy_(wide.std(0, correction=0))
    return latents
