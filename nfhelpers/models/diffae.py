"""A diffusion autoencoder of sparse fields: a field as one latent vector, and back at any coordinates.

Glossary
    b  batch
    q  query points, where the field is wanted
    i  observed (input) points, where the field is known
    l  tokens of the sequence
    d  model width (d_model)
    f  random Fourier frequencies
    k  directions of a scan
    m  cosines along x, and along y (num_cosines)
    c  channels of the latent vector (latent_dim)

Sources: seed 004; Preechakul et al., "Diffusion Autoencoders: Toward a Meaningful and Decodable
Representation", CVPR 2022.
"""

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from nfhelpers.flow import check_unit_range, loss_weight, skip_weight
from nfhelpers.images import grid_coords, to_model
from nfhelpers.kernels.orders import inverse_order, point_order
from nfhelpers.models.base import FieldModel, ModelConfig, evaluation_mode, run_layers
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

SAME_LINE = 1e-5
"""Coordinates that differ by no more are of one column, or row, of a grid."""

SPECTRUM_DECAY = 1.3
"""Images have the power (1 + f^2)^-1.3 at f half-cycles a side (measured on CIFAR-10), as nature's do about
(Field 1987)."""

SPECTRUM_NOISE = 1e-3
"""Power of noise at each point, beside that of the mean colour."""

SPECTRUM_TAIL = 0.1
"""Power of what 24 cosines a side cannot say of images, at each point, beside that of the mean colour: the
sum of `spectrum_power` beyond them is 0.06 up to 32 cosines, 0.17 up to 64."""

SPECTRUM_VARIANCE = 0.2
"""Power of the mean colour, of values in [-1, 1] (measured on CIFAR-10)."""

OPPONENT = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [1.0, -2.0, 1.0]])
OPPONENT /= OPPONENT.norm(dim=1, keepdim=True)
"""Rows: lightness and two differences of colour, orthonormal; close to the principal axes of colours."""

OPPONENT_POWER = (1.0, 0.06, 0.015)
"""Power of these three beside each other (measured on CIFAR-10)."""

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


def cosines(coords: torch.Tensor, count: int) -> torch.Tensor:
    """Cosines of points (B, L, 2) -> (B, L, count^2): the basis of the discrete cosine transform.

    The products of sqrt(2) cos(pi f x) and sqrt(2) cos(pi g y), f and g below `count`, g the slower (1 in
    place of sqrt(2) cos 0). Over the pixel centres of a grid they are orthonormal.
    """
    frequencies = math.pi * torch.arange(count, device=coords.device, dtype=coords.dtype)  # (M,)
    waves = (coords[..., None] * frequencies).cos()  # (B, L, 2, M)
    waves = waves * torch.where(frequencies == 0, 1, 2**0.5)
    along_x, along_y = waves.unbind(dim=-2)  # (B, L, M) each
    return (along_y[..., :, None] * along_x[..., None, :]).flatten(-2)  # (B, L, M^2)


def spectrum_power(count: int) -> torch.Tensor:
    """Power of each of the `cosines` in images, beside that of the mean -> (count^2,)."""
    f = torch.arange(count, dtype=torch.float32)
    return (1 + f[:, None] ** 2 + f**2).pow(-SPECTRUM_DECAY).flatten()  # (M^2,)


def filled_share(coords: torch.Tensor) -> torch.Tensor:
    """How much of the grid of their columns and rows the points (B, I, 2) fill -> (B,), in (0, 1].

    1 for all pixels of an image, about a fifth for a fifth of them, 1/I for points that share no coordinate.
    """
    steps = coords.sort(dim=1).values.diff(dim=1)  # (B, I-1, 2)
    lines = 1 + (steps > SAME_LINE).sum(1)  # (B, 2), columns and rows
    return (coords.shape[1] / lines.prod(-1).to(coords)).clamp(max=1)  # (B,)


def fit_spectrum(coords: torch.Tensor, values: torch.Tensor, count: int) -> torch.Tensor:
    """Amplitudes of the `cosines` of a field known at points (B, I, 2), values (B, I, 3) -> (B, count^2, 3).

    Ridge regression, which is the posterior mean of a Gaussian field with the spectrum of images:

        a = argmin |values - cosines a|^2 / noise + sum of a_j^2 / power_j

    Of all pixels of a grid it is close to the discrete cosine transform, of few points to a smooth field near
    them. What higher frequencies put on the values acts as noise where points are missing, and cancels over a
    whole grid, as errors of sampling without replacement do (Cochran 1977, section 2.6):
    noise = SPECTRUM_NOISE + (1 - `filled_share`) SPECTRUM_TAIL. Without the second term the fit follows it
    and is worst where there are as many points as cosines. The system, solved in float64, has the smaller of
    I and count^2 unknowns. Source: Wahba, "Spline Models for Observational Data", 1990.
    """
    coords, values = coords.double(), values.double()
    root = spectrum_power(count).to(coords).sqrt()  # (M^2,)
    weighted = cosines(coords, count) * root  # (B, I, M^2)
    primal = weighted.shape[1] > weighted.shape[2]
    gram = weighted.mT @ weighted if primal else weighted @ weighted.mT  # (B, S, S), S = min(I, M^2)
    noise = SPECTRUM_NOISE + SPECTRUM_TAIL * (1 - filled_share(coords))  # (B,)
    gram.diagonal(dim1=1, dim2=2).add_(noise[:, None])
    factor = torch.linalg.cholesky(gram)
    if primal:
        amplitudes = torch.cholesky_solve(weighted.mT @ values, factor)  # (B, M^2, 3)
    else:
        amplitudes = weighted.mT @ torch.cholesky_solve(values, factor)  # (B, M^2, 3)
    return root[:, None] * amplitudes


# ----------------------------------------------------------------------------------------------------- layers


class LinearCode(nn.Module):
    """A linear code of spectra, and its inverse on what the code keeps; not trained.

        code = components (spectrum - mean) / scale          spectrum = mean + (scale code) components

    The components are orthonormal. To begin with they are single cosines of single opponent colours, those
    with the most power in images, which are close to the principal components (Ahmed et al. 1974);
    `fit_linear_code` puts the principal components of a training set in their place. Codes are of about unit
    variance.
    """

    def __init__(self, count: int, channels: int):
        super().__init__()
        power = spectrum_power(count)[:, None] * torch.tensor(OPPONENT_POWER)  # (M^2, 3)
        first = power.flatten().argsort(descending=True, stable=True)[:channels]  # (C,)
        components = torch.zeros(channels, count**2, 3)
        components[torch.arange(len(first)), first // 3] = OPPONENT[first % 3]
        self.register_buffer("components", components.flatten(1))  # (C, 3 M^2)
        self.register_buffer("mean", torch.zeros(3 * count**2))  # (3 M^2,)
        scale = torch.ones(channels)
        scale[: len(first)] = (SPECTRUM_VARIANCE * power.flatten()[first]).sqrt()
        self.register_buffer("scale", scale)  # (C,)

    def encode(self, spectrum: torch.Tensor) -> torch.Tensor:
        """Spectrum (B, M^2, 3) -> code (B, C)."""
        return (spectrum.flatten(1) - self.mean) @ self.components.T / self.scale

    def decode(self, code: torch.Tensor) -> torch.Tensor:
        """Code (B, C) -> spectrum (B, M^2, 3)."""
        return (self.mean + (self.scale * code) @ self.components).unflatten(1, (-1, 3))


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
    """What networks add to the linear code of observed points; zero to begin with (seed 004).

    An MLP sees the spectrum of the field. Scans in several directions see the values and what the linear code
    misses of them; the seed's mean over the points is one of products with functions of the place
    (`GatedEmbedding`), in which points count for the area around them (`point_areas`).
    """

    def __init__(self, config: "MambaDiffusionAutoencoderConfig"):
        super().__init__()
        d, features, amplitudes = config.d_model, 2 * config.num_fourier_features, 3 * config.num_cosines**2
        self.orders, self.bidirectional = config.orders, config.bidirectional
        self.register_buffer(
            "spectrum_scale",
            spectrum_power(config.num_cosines).mul(SPECTRUM_VARIANCE).sqrt(),
            persistent=False,
        )
        self.spectrum_mlp = mlp(amplitudes, config.spectrum_width, config.latent_dim, config.dropout)
        self.fourier = FourierFeatures(config.num_fourier_features, config.fourier_scale)
        self.embedding = PointEmbedding(features, d, num_values=6)
        self.product = GatedEmbedding(features, 6, d)
        self.blocks = directional_blocks(
            config, bidirectional=config.bidirectional, num_layers=config.num_encoder_layers
        )
        self.token_norm = nn.RMSNorm(d)
        self.pooled = GatedEmbedding(features, d, config.latent_dim)
        self.pooled_norm = nn.RMSNorm(config.latent_dim)
        self.latent_proj = nn.Linear(config.latent_dim, config.latent_dim)
        for layer in (self.spectrum_mlp[-1], self.latent_proj):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        coords: torch.Tensor,
        values: torch.Tensor,
        spectrum: torch.Tensor,
        linear: torch.Tensor,
        recompute: bool = False,
    ) -> torch.Tensor:
        """What is added to the code of points (B, I, 2), sorted by rows -> (B, C).

        values (B, I, 3), spectrum (B, M^2, 3), linear (B, I, 3), the decoding of the linear code at the
        points; `recompute`: as in `run_layers`.
        """
        dtype = self.latent_proj.weight.dtype
        amplitudes = (spectrum / self.spectrum_scale[:, None]).flatten(1)  # (B, 3 M^2)
        added = self.spectrum_mlp(amplitudes.to(dtype))  # (B, C)
        seen = torch.cat([values, values - linear], dim=-1)  # (B, I, 6)
        features = self.fourier(coords).to(dtype)  # (B, I, 2F)
        tokens = (self.embedding(features, seen) + self.product(features, seen)).to(dtype)  # (B, I, D)
        orders = joint_orders(coords, self.orders, self.bidirectional)  # (B, K, I)
        tokens = run_layers(self.blocks, tokens, orders, recompute=recompute)  # (B, I, D)
        products = self.pooled(features, self.token_norm(tokens)).to(dtype)  # (B, I, C)
        pooled = (point_areas(coords).to(dtype)[..., None] * products).sum(1)  # (B, C)
        return added + self.latent_proj(self.pooled_norm(pooled))  # (B, C)


class LatentDecoder(nn.Module):
    """What networks add to the linear decoding of a latent at any points; zero to begin with (seed 004).

    An MLP adds to the spectrum. Then scans over the points add to the values: their tokens are functions of
    the place and of the value decoded there, scaled and shifted by the latent.
    """

    def __init__(self, config: "MambaDiffusionAutoencoderConfig"):
        super().__init__()
        d, features, amplitudes = config.d_model, 2 * config.num_fourier_features, 3 * config.num_cosines**2
        self.orders, self.bidirectional = config.orders, config.bidirectional
        self.num_cosines = config.num_cosines
        self.register_buffer(
            "spectrum_scale",
            spectrum_power(config.num_cosines).mul(SPECTRUM_VARIANCE).sqrt(),
            persistent=False,
        )
        self.spectrum_mlp = mlp(config.latent_dim, config.spectrum_width, amplitudes, config.dropout)
        self.fourier = FourierFeatures(config.num_fourier_features, config.fourier_scale)
        self.embedding = PointEmbedding(features, d)
        self.film = FiLM(config.latent_dim, d)
        self.blocks = directional_blocks(
            config, bidirectional=config.bidirectional, num_layers=config.num_decoder_layers
        )
        self.head = residual_decoder(d, config.dropout)
        nn.init.zeros_(self.spectrum_mlp[-1].weight)
        nn.init.zeros_(self.spectrum_mlp[-1].bias)

    def forward(
        self, coords: torch.Tensor, latent: torch.Tensor, spectrum: torch.Tensor, recompute: bool = False
    ) -> torch.Tensor:
        """Points (B, Q, 2), latent (B, C) and its linear decoding (B, M^2, 3) -> values (B, Q, 3).

        `recompute`: as in `run_layers`.
        """
        order = point_order(coords, "row")  # (B, Q)
        coords = gather_tokens(coords, order)
        dtype = self.film.proj.weight.dtype
        added = self.spectrum_mlp(latent).unflatten(-1, (-1, 3))  # (B, M^2, 3)
        spectrum = spectrum + self.spectrum_scale[:, None] * added.to(dtype)  # (B, M^2, 3)
        smooth = cosines(coords, self.num_cosines).to(dtype) @ spectrum  # (B, Q, 3)
        features = self.fourier(coords).to(dtype)  # (B, Q, 2F)
        tokens = self.film(self.embedding(features, smooth), latent).to(dtype)  # (B, Q, D)
        orders = joint_orders(coords, self.orders, self.bidirectional)  # (B, K, Q)
        tokens = run_layers(self.blocks, tokens, orders, recompute=recompute)  # (B, Q, D)
        values = smooth.to(dtype) + self.head(tokens).to(dtype)  # (B, Q, 3)
        return gather_tokens(values, inverse_order(order))  # (B, Q, 3)


class VelocityRefiner(nn.Module):
    """What phase 2 adds to the velocity of the deterministic decoding; zero to begin with.

    Tokens are scaled and shifted by the latent and the time, then scanned in several directions.
    """

    def __init__(self, config: "MambaDiffusionAutoencoderConfig"):
        super().__init__()
        d, features = config.d_model, 2 * config.num_fourier_features
        self.orders, self.bidirectional = config.orders, config.bidirectional
        self.fourier = FourierFeatures(config.num_fourier_features, config.fourier_scale)
        self.embedding = PointEmbedding(features, d, num_values=6)
        self.time = TimeEmbedding(d)
        self.latent_proj = nn.Linear(config.latent_dim, d)
        self.film = FiLM(d, d)
        self.blocks = directional_blocks(
            config, bidirectional=config.bidirectional, num_layers=config.num_decoder_layers
        )
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
        orders = joint_orders(coords, self.orders, self.bidirectional)  # (B, K, Q)
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

    But `fourier_scale`, 10 there: what the networks add to the latent is a mean over the image, and of
    functions that turn ten times across it this has next to nothing but the mean colour.

    `phase` is 1, encoder and deterministic decoder, or 2, these two frozen and a velocity network on top
    (`second_phase` makes the one from the other). `latent_dim` is the length of the latent vector, 64 to 1024
    being sensible. `residual_std` is the standard deviation of the data around the deterministic decoding, on
    the scale of values in [-1, 1]. `num_cosines` a side are the spectrum of which the latent is a code,
    `spectrum_width` the width of the MLPs between the two. `num_decoder_layers` are those of the decoder and
    again of the velocity network. The others are as in `MultiDirectionalMambaDiffusionConfig`.
    """

    phase: int = 1
    latent_dim: int = 512
    d_model: int = 512
    num_encoder_layers: int = 6
    num_decoder_layers: int = 6
    d_state: int = 16
    expand: int = 2
    num_cosines: int = 24
    spectrum_width: int = 1024
    num_fourier_features: int = 256
    fourier_scale: float = 3.0
    mlp_ratio: float = 2.0
    dropout: float = 0.1
    orders: tuple[str, ...] = ("row", "column", "diagonal", "antidiagonal")
    bidirectional: bool = True
    shared_weights: bool = True
    tied_decay: bool = True
    residual_std: float = 0.15
    model_type: ClassVar[str] = "diffae"

    def __post_init__(self):
        self.lists_to_tuples("orders")
        check_orders(self.orders)
        if isinstance(self.phase, bool) or self.phase not in (1, 2):
            raise ValueError(
                f"phase={self.phase!r} is unknown; pass 1 (autoencoder) or 2 (with flow matching)"
            )
        for name in ("bidirectional", "shared_weights", "tied_decay"):
            self.check_flag(name)
        self.check_positive("latent_dim", "d_model", "num_encoder_layers", "num_decoder_layers", "d_state")
        self.check_positive("expand", "num_cosines", "spectrum_width")
        self.check_positive("num_fourier_features", "fourier_scale", "mlp_ratio", "residual_std")
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
        self.linear_code = LinearCode(config.num_cosines, config.latent_dim)
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
        order = point_order(coords, "row")  # (B, I): sums are then the same however the points are listed
        coords, values = gather_tokens(coords, order), gather_tokens(values, order)
        dtype = self.latent_mean.dtype
        spectrum = fit_spectrum(coords, values, self.config.num_cosines).to(dtype)  # (B, M^2, 3)
        code = self.linear_code.encode(spectrum)  # (B, C)
        linear = cosines(coords, self.config.num_cosines).to(dtype) @ self.linear_code.decode(code)
        return code + self.encoder(coords, values, spectrum, linear, self.recompute).to(dtype)  # (B, C)

    def decode(
        self,
        coords: torch.Tensor,
        latent: torch.Tensor,
        t: torch.Tensor | None = None,
        noisy_values: torch.Tensor | None = None,
        start: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Values at query points, or with `noisy_values` their velocity.

        coords (B, Nq, 2) are (x, y) in [0, 1]; latent (B, C) is as `encode` returns it, not normalised.
        Without noisy_values the deterministic decoding, (B, Nq, 3) in about [-1, 1]; t is ignored. With
        noisy_values (B, Nq, 3), the state x_t of the flow at t (B,) in [0, 1], its velocity (B, Nq, 3);
        start (B, Nq, 3): the deterministic decoding of this latent at these points, if it is at hand. Raises
        ValueError for a latent of another size, when shapes or dtypes do not fit, for a missing t and, on
        the CPU, for t or coordinates outside [0, 1].
        """
        check_points("coords", coords)
        check_latent(latent, self.config.latent_dim, len(coords))
        if start is None:
            spectrum = self.linear_code.decode(latent)  # (B, M^2, 3)
            start = self.decoder(coords, latent, spectrum, self.recompute)  # (B, Q, 3), m
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
        conditions: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Velocity of the field at the query points, given the latent of the observed ones.

        noisy_values (B, Nq, 3) is x_t, values in about [-1, 1]; query_coords (B, Nq, 2) and input_coords
        (B, Ni, 2) are (x, y) in [0, 1]; t (B,) in [0, 1], 0 is noise; input_values (B, Ni, 3) in [-1, 1].
        conditions: what `prepare` made of these points, if it is at hand. Returns (B, Nq, 3). In phase 1 one
        step from t = 0 is the deterministic decoding. Raises ValueError when the shapes or dtypes do not fit
        and, on the CPU, when t or coordinates are outside [0, 1].
        """
        check_shapes(noisy_values, query_coords, t, input_coords, input_values)
        if conditions is None:
            conditions = self.prepare(query_coords, input_coords, input_values)
        latent, start = conditions
        return self.decode(query_coords, latent, t, noisy_values, start)  # (B, Q, 3)

    def prepare(
        self, query_coords: torch.Tensor, input_coords: torch.Tensor, input_values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What `forward` computes of these arguments alone: latent (B, C) and its decoding (B, Q, 3)."""
        latent = self.encode(input_coords, input_values)  # (B, C)
        return latent, self.decode(query_coords, latent)

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

    def scan(self, tokens: torch.Tensor, orders: torch.Tensor) -> torch.Tensor:
        scanned = super().scan(tokens, orders)  # (B, L, D)
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


@torch.no_grad()
def fit_linear_code(model: MambaDiffusionAutoencoder, images: np.ndarray, *, batch_size: int = 256) -> None:
    """Set the model's linear code to the principal components of the spectra of images, its training set.

    images: (N, H, W, 3) uint8, all of whose pixels are used. The untrained autoencoder given all pixels then
    is PCA, up to what `num_cosines` cannot say. Raises ValueError for other images, and for fewer than
    latent_dim + 1 of them or of amplitudes, and for
    a side of fewer pixels than `num_cosines`, over which the cosines are not orthogonal.
    """
    images = np.asarray(images)
    code, count, channels = model.linear_code, model.config.num_cosines, model.config.latent_dim
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images are {images.dtype} {images.shape}; pass uint8 (N, H, W, 3)")
    if min(len(images), len(code.mean)) <= channels:
        raise ValueError(
            f"{len(images)} images and {len(code.mean)} amplitudes do not span latent_dim={channels} "
            "components; pass more images, or a smaller latent_dim or larger num_cosines"
        )
    if min(images.shape[1:3]) < count:
        raise ValueError(
            f"images of {images.shape[1]} x {images.shape[2]} have fewer pixels a side than "
            f"num_cosines={count}; pass num_cosines={min(images.shape[1:3])} or larger images"
        )
    device = code.mean.device
    basis = cosines(grid_coords(*images.shape[1:3])[None].to(device), count)[0]  # (P, M^2)
    total = torch.zeros(len(code.mean), dtype=torch.float64, device=device)  # (3 M^2,)
    products = torch.zeros(len(total), len(total), dtype=torch.float64, device=device)
    for start in range(0, len(images), batch_size):
        values = torch.from_numpy(to_model(images[start : start + batch_size])).to(device)  # (b, H, W, 3)
        spectra = basis.T @ values.flatten(1, 2) / len(basis)  # (b, M^2, 3): the cosines are orthonormal
        spectra = spectra.flatten(1).double()  # (b, 3 M^2)
        total += spectra.sum(0)
        products += spectra.T @ spectra
    mean = total / len(images)
    powers, axes = torch.linalg.eigh(products / len(images) - torch.outer(mean, mean))  # ascending
    code.mean.copy_(mean)
    code.components.copy_(axes[:, -channels:].flip(1).T)
    code.scale.copy_(powers[-channels:].flip(0).clamp_min(SMALLEST_STD**2).sqrt())


def second_phase(
    first: MambaDiffusionAutoencoder | str | Path, *, residual_std: float = 0.15
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
    return model.to(first.latent_mean)


@torch.no_grad()
def encode_dataset(
    model: MambaDiffusionAutoencoder, dataset: Dataset, *, batch_size: int = 64, progress: bool = False
) -> torch.Tensor:
    """Latents (N, C), on the CPU, of the observed points of every item of a dataset, in its order.

    dataset: items as of `images.SparseFields`; progress: show a bar. The latents are not normalised.
    """
    device, latents = model.latent_mean.device, []
    with evaluation_mode(model):
        for batch in tqdm(DataLoader(dataset, batch_size), desc="encode", disable=not progress):
            latent = model.encode(batch["input_coords"].to(device), batch["input_values"].to(device))
            latents.append(latent.cpu())
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
