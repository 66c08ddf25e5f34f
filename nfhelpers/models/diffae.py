"""A diffusion autoencoder of sparse fields: a field as one latent vector, and back at any coordinates.

Phase 1 trains `encode` and the deterministic `decode`; phase 2 freezes them and trains a flow on top. Source:
Preechakul et al., "Diffusion Autoencoders: Toward a Meaningful and Decodable Representation", CVPR 2022.
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
from nfhelpers.images import grid_coords, to_model
from nfhelpers.kernels.orders import inverse_order, point_order
from nfhelpers.models.base import FieldModel, Layers, ModelConfig, evaluation_mode
from nfhelpers.models.layers import (
    FourierFeatures,
    PointEmbedding,
    TimeEmbedding,
    gather_tokens,
    mlp,
    solve_positive,
    squared_distances,
    zero,
)
from nfhelpers.models.sparse_fields import (
    MultiDirectionalConfig,
    SparseField,
    check_points,
    directional_blocks,
    joint_orders,
    residual_decoder,
)

SMALLEST_STD = 1e-6  # that a latent channel is divided by: one that never changes normalises to 0
AREA_CELLS = 24  # side of the grid by which `point_areas` measures
SAME_LINE = 1e-5  # coordinates that differ by no more are of one column, or row, of a grid

# Power of images in the terms of `cosines`, measured on CIFAR-10. Others than VARIANCE: beside the mean's.
SPECTRUM_DECAY = 1.3  # (1 + f^2)^-1.3 at f half-cycles a side (as in nature: Field 1987)
SPECTRUM_NOISE = 1e-3  # noise at each point
SPECTRUM_TAIL = 0.1  # what 24 cosines a side leave out at each point: 0.06 up to 32 cosines, 0.17 up to 64
SPECTRUM_VARIANCE = 0.2  # the mean colour, of values in [-1, 1]
OPPONENT_POWER = (1.0, 0.06, 0.015)  # lightness and two differences of colour, the rows of OPPONENT
OPPONENT = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [1.0, -2.0, 1.0]])
OPPONENT /= OPPONENT.norm(dim=1, keepdim=True)


def point_areas(coords):
    """The share of the image that each of the points (B, I, 2) stands for -> (B, I), which sums to 1."""
    centres = (torch.arange(AREA_CELLS, device=coords.device, dtype=coords.dtype) + 0.5) / AREA_CELLS
    grid = torch.cartesian_prod(centres, centres).expand(len(coords), -1, -1)  # (B, G, 2)
    sharpness = min(4 * coords.shape[1], 2 * AREA_CELLS**2)  # near 1 / area of a point, or of a cell
    share = (-sharpness * squared_distances(grid, coords)).softmax(dim=-1)  # (B, G, I)
    return share.mean(1)  # (B, I)


def cosines(coords, count):
    """Products of sqrt(2) cos(pi f x), sqrt(2) cos(pi g y) at points (B, L, 2) -> (B, L, count^2), g slower.

    f and g are below `count`, with 1 in place of sqrt(2) cos 0: orthonormal over the pixel centres of a grid.
    """
    frequencies = math.pi * torch.arange(count, device=coords.device, dtype=coords.dtype)  # (M,)
    waves = (coords[..., None] * frequencies).cos() * torch.where(frequencies == 0, 1, 2**0.5)  # (B, L, 2, M)
    along_x, along_y = waves.unbind(dim=-2)  # (B, L, M) each
    return (along_y[..., :, None] * along_x[..., None, :]).flatten(-2)  # (B, L, M^2)


def spectrum_power(count, device=None):
    """Power of each of the `cosines` in images, beside that of the mean -> (count^2,)."""
    f = torch.arange(count, dtype=torch.float32, device=device)
    return (1 + f[:, None] ** 2 + f**2).pow(-SPECTRUM_DECAY).flatten()  # (M^2,)


def spectrum_scale(count, like):
    """Standard deviation of amplitudes in images -> (count^2, 1), of the device and dtype of `like`."""
    return (SPECTRUM_VARIANCE * spectrum_power(count, like.device)).sqrt()[:, None].to(like)


def fit_spectrum(coords, values, count):
    """Amplitudes a of the `cosines` C of a field at points (B, I, 2), values v (B, I, 3) -> (B, count^2, 3).

    The posterior mean of a Gaussian field: argmin |v - C a|^2 / noise + sum of a_j^2 / power_j (Wahba 1990).
    Where points are missing, frequencies beyond the last cosine act as noise; over a whole grid they cancel.
    """
    coords, values = coords.double(), values.double()
    root = spectrum_power(count, coords.device).double().sqrt()  # (M^2,)
    weighted = cosines(coords, count) * root  # (B, I, M^2)
    primal = weighted.shape[1] > weighted.shape[2]  # the system has the smaller of I and M^2 unknowns
    gram = weighted.mT @ weighted if primal else weighted @ weighted.mT  # (B, S, S), S = min(I, M^2)
    lines = 1 + (coords.sort(dim=1).values.diff(dim=1) > SAME_LINE).sum(1)  # (B, 2), columns and rows
    missing = 1 - coords.shape[1] / lines.prod(-1).to(coords)  # (B,), share of the grid of these lines
    noise = SPECTRUM_NOISE + SPECTRUM_TAIL * missing.clamp(min=0)  # (B,)
    gram.diagonal(dim1=1, dim2=2).add_(noise[:, None])
    if primal:
        return root[:, None] * solve_positive(gram, weighted.mT @ values)  # (B, M^2, 3)
    return root[:, None] * (weighted.mT @ solve_positive(gram, values))  # (B, M^2, 3)


class LinearCode(nn.Module):
    """A linear code of spectra, and its inverse on what the code keeps; not trained.

    The orthonormal components start as the cosines of opponent colours that have the most power in images
    (Ahmed et al. 1974); `fit_linear_code` puts principal components in their place.
    """

    def __init__(self, count, channels):
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

    def encode(self, spectrum):
        return (spectrum.flatten(1) - self.mean) @ self.components.T / self.scale

    def decode(self, code):
        return (self.mean + (self.scale * code) @ self.components).unflatten(1, (-1, 3))


class GatedEmbedding(nn.Module):
    """gate(features) * projection(values): its mean over the points is a linear functional of the field."""

    def __init__(self, num_features, num_values, dim):
        super().__init__()
        self.gate = nn.Linear(num_features, dim)
        self.value_proj = nn.Linear(num_values, dim)

    def forward(self, features, values):
        return self.gate(features) * self.value_proj(values)  # (B, L, dim)


class FiLM(nn.Module):
    """Scale and shift tokens by a linear function of a condition (Perez et al. 2018)."""

    def __init__(self, num_conditions, d_model):
        super().__init__()
        self.proj = nn.Linear(num_conditions, 2 * d_model)

    def forward(self, tokens, condition):
        scale, shift = self.proj(condition)[:, None].chunk(2, dim=-1)  # (B, 1, D) each
        return tokens * (1 + scale) + shift  # (B, L, D)


@dataclass(frozen=True, kw_only=True)
class MambaDiffusionAutoencoderConfig(MultiDirectionalConfig):
    """Settings of `MambaDiffusionAutoencoder`."""

    phase: int = 1  # encoder and decoder; 2: these two frozen, and a velocity network
    latent_dim: int = 512
    num_encoder_layers: int = 6
    num_decoder_layers: int = 6  # of the velocity network, too
    num_cosines: int = 24  # a side, of the spectrum
    spectrum_width: int = 1024  # of the MLPs between latent and spectrum
    fourier_scale: float = 3.0  # low: a mean over the image, as the encoder takes it, has no fast waves
    dropout: float = 0.1
    bidirectional: bool = True
    shared_weights: bool = True
    residual_std: float = 0.15  # of the data around the decoding
    model_type: ClassVar[str] = "diffae"

    def __post_init__(self):
        super().__post_init__()
        if self.phase not in (1, 2):
            raise ValueError(f"phase={self.phase}: pass 1 (autoencoder) or 2 (with flow matching)")


class FieldEncoder(nn.Module):
    """What networks add to the linear code of observed points; zero to begin with.

    An MLP sees the spectrum; scans see the values and what the linear code misses of them.
    """

    def __init__(self, config: MambaDiffusionAutoencoderConfig):
        super().__init__()
        c = self.config = config
        features, amplitudes = 2 * c.num_fourier_features, 3 * c.num_cosines**2
        self.spectrum_mlp = mlp(amplitudes, c.spectrum_width, c.latent_dim, c.dropout)
        self.fourier = FourierFeatures(c.num_fourier_features, c.fourier_scale)
        self.embedding = PointEmbedding(features, c.d_model, num_values=6)
        self.product = GatedEmbedding(features, 6, c.d_model)
        self.blocks = directional_blocks(c, c.num_encoder_layers, c.bidirectional)
        self.token_norm = nn.RMSNorm(c.d_model)
        self.pooled = GatedEmbedding(features, c.d_model, c.latent_dim)
        self.pooled_norm = nn.RMSNorm(c.latent_dim)
        self.latent_proj = zero(nn.Linear(c.latent_dim, c.latent_dim))
        zero(self.spectrum_mlp[-1])

    def forward(self, coords, values, spectrum, linear):
        dtype = self.latent_proj.weight.dtype
        scale = spectrum_scale(self.config.num_cosines, spectrum)  # (M^2, 1)
        added = self.spectrum_mlp((spectrum / scale).flatten(1).to(dtype))  # (B, C)
        seen = torch.cat([values, values - linear], dim=-1)  # (B, I, 6)
        features = self.fourier(coords).to(dtype)  # (B, I, 2F)
        tokens = (self.embedding(features, seen) + self.product(features, seen)).to(dtype)  # (B, I, D)
        orders = joint_orders(coords, self.config.orders, self.config.bidirectional)  # (B, K, I)
        tokens = self.blocks(tokens, orders)  # (B, I, D)
        products = self.pooled(features, self.token_norm(tokens)).to(dtype)  # (B, I, C)
        pooled = (point_areas(coords).to(dtype)[..., None] * products).sum(1)  # (B, C)
        return added + self.latent_proj(self.pooled_norm(pooled))  # (B, C)


class LatentDecoder(nn.Module):
    """The linear decoding of a latent at any points, and what networks add to it; zero to begin with.

    An MLP adds to the spectrum, scans over the points to the values.
    """

    def __init__(self, config: MambaDiffusionAutoencoderConfig):
        super().__init__()
        c = self.config = config
        features, amplitudes = 2 * c.num_fourier_features, 3 * c.num_cosines**2
        self.spectrum_mlp = mlp(c.latent_dim, c.spectrum_width, amplitudes, c.dropout)
        self.fourier = FourierFeatures(c.num_fourier_features, c.fourier_scale)
        self.embedding = PointEmbedding(features, c.d_model)
        self.film = FiLM(c.latent_dim, c.d_model)
        self.blocks = directional_blocks(c, c.num_decoder_layers, c.bidirectional)
        self.head = residual_decoder(c.d_model, c.dropout)
        zero(self.spectrum_mlp[-1])

    def forward(self, coords, latent, spectrum):
        order = point_order(coords, "row")  # (B, Q)
        coords = gather_tokens(coords, order)
        dtype = self.film.proj.weight.dtype
        added = self.spectrum_mlp(latent).unflatten(-1, (-1, 3))  # (B, M^2, 3)
        spectrum = spectrum + spectrum_scale(self.config.num_cosines, spectrum) * added.to(dtype)
        smooth = cosines(coords, self.config.num_cosines).to(dtype) @ spectrum  # (B, Q, 3)
        tokens = self.film(self.embedding(self.fourier(coords), smooth), latent).to(dtype)  # (B, Q, D)
        orders = joint_orders(coords, self.config.orders, self.config.bidirectional)  # (B, K, Q)
        tokens = self.blocks(tokens, orders)  # (B, Q, D)
        values = smooth.to(dtype) + self.head(tokens).to(dtype)  # (B, Q, 3)
        return gather_tokens(values, inverse_order(order))  # (B, Q, 3)


class VelocityRefiner(nn.Module):
    """What phase 2 adds to the velocity of the deterministic decoding; zero to begin with."""

    def __init__(self, config: MambaDiffusionAutoencoderConfig):
        super().__init__()
        c = self.config = config
        self.fourier = FourierFeatures(c.num_fourier_features, c.fourier_scale)
        self.embedding = PointEmbedding(2 * c.num_fourier_features, c.d_model, num_values=6)
        self.time = TimeEmbedding(c.d_model)
        self.latent_proj = nn.Linear(c.latent_dim, c.d_model)
        self.film = FiLM(c.d_model, c.d_model)
        self.blocks = directional_blocks(c, c.num_decoder_layers, c.bidirectional)
        self.head = residual_decoder(c.d_model, c.dropout)

    def forward(self, seen, coords, t, latent):
        order = point_order(coords, "row")  # (B, Q)
        coords, seen = gather_tokens(coords, order), gather_tokens(seen, order)
        dtype = self.latent_proj.weight.dtype
        tokens = self.embedding(self.fourier(coords), seen)  # (B, Q, D)
        condition = self.latent_proj(latent) + self.time(t)  # (B, D)
        tokens = self.film(tokens, F.silu(condition)).to(dtype)  # (B, Q, D)
        orders = joint_orders(coords, self.config.orders, self.config.bidirectional)  # (B, K, Q)
        tokens = self.blocks(tokens, orders)  # (B, Q, D)
        return gather_tokens(self.head(tokens), inverse_order(order))  # (B, Q, 3)


class MambaDiffusionAutoencoder(SparseField):
    """Semantic autoencoder of sparse fields, with a flow on top.

    `encode` makes one latent of the observed points. `decode` makes of it, anywhere, the decoding m, which
    phase 1 trains, or the velocity of a flow given the latent, which phase 2 trains while m stays. As in
    `MambaField`, with m for the spline; phase 1 has no network there, so its velocity at t = 0 is m - x_0,
    and the loss at t = 0, where phase 1 takes it, is the squared error of m.
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

    def train(self, mode=True):
        """As nn.Module's; what phase 2 has frozen stays in eval mode, without dropout."""
        super().train(mode)
        if self.config.phase == 2:
            self.encoder.eval()
            self.decoder.eval()
        return self

    def encode(self, coords, values):
        """Latent (B, C), not normalised, of values (B, Ni, 3) observed at coords (B, Ni, 2)."""
        check_points(None, (coords, values))
        order = point_order(coords, "row")  # (B, I): sums are then the same however the points are listed
        coords, values = gather_tokens(coords, order), gather_tokens(values, order)
        dtype = self.latent_mean.dtype
        spectrum = fit_spectrum(coords, values, self.config.num_cosines).to(dtype)  # (B, M^2, 3)
        code = self.linear_code.encode(spectrum)  # (B, C)
        linear = cosines(coords, self.config.num_cosines).to(dtype) @ self.linear_code.decode(code)
        return code + self.encoder(coords, values, spectrum, linear).to(dtype)  # (B, C)

    def decode(self, coords, latent, t=None, noisy_values=None, start=None):
        """Deterministic decoding (B, Nq, 3) of a latent (B, C), not normalised, at coords (B, Nq, 2).

        With noisy_values (B, Nq, 3), x_t at t (B,), the velocity instead; start: the decoding, if at hand.
        """
        check_points(t, (coords, noisy_values))
        if start is None:
            start = self.decoder(coords, latent, self.linear_code.decode(latent))  # (B, Q, 3), m
        if noisy_values is None:
            return start
        s, time = self.config.residual_std, t[:, None, None]  # number, (B, 1, 1)
        rest = noisy_values - time * start  # (B, Q, 3), r
        velocity = start + skip_weight(time, s) * rest  # (B, Q, 3)
        if self.refiner is None:
            return velocity
        scale = path_variance(time, s).sqrt()  # (B, 1, 1), sqrt(V)
        seen = torch.cat([rest / scale, start], dim=-1)  # (B, Q, 6)
        return velocity + s / scale * self.refiner(seen, coords, t, latent)  # (B, Q, 3)

    def prepare(self, query_coords, input_coords, input_values):
        """What `forward` computes from these alone: query points, latent (B, C), its decoding (B, Q, 3)."""
        latent = self.encode(input_coords, input_values)  # (B, C)
        return query_coords, latent, self.decode(query_coords, latent)

    def velocity(self, noisy_values, t, conditions):
        query_coords, latent, start = conditions
        return self.decode(query_coords, latent, t, noisy_values, start)

    def loss_times(self, t):
        """Times of the loss, for t (B,) drawn from [0, 1]: in phase 1 always 0."""
        return torch.zeros_like(t) if self.config.phase == 1 else t

    def loss_weight(self, t):
        return torch.ones_like(t) if self.config.phase == 1 else loss_weight(t, self.config.residual_std)

    def normalise(self, latent):
        """Latent (B, C) of `encode` -> of mean 0 and standard deviation 1 over the training set, (B, C)."""
        mean, std = self._statistics(latent.device)
        return (latent - mean) / std

    def denormalise(self, latent):
        mean, std = self._statistics(latent.device)
        return latent * std + mean

    def _statistics(self, device):
        if not bool(torch.isfinite(self.latent_std).all()):
            raise ValueError("call fit_latent_statistics(model, dataset) with the training set first")
        return self.latent_mean.to(device), self.latent_std.clamp_min(SMALLEST_STD).to(device)  # (C,) each


class LatentBlock(nn.Module):
    """Residual MLP on vectors, scaled and shifted by the time; zero to begin with."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.film = FiLM(width, width)
        self.mlp = mlp(width, 2 * width, width)
        zero(self.mlp[-1])

    def forward(self, x, time):
        return x + self.mlp(self.film(self.norm(x), time))  # (B, 1, W)


@dataclass(frozen=True, kw_only=True)
class LatentVelocityNetworkConfig(ModelConfig):
    """Settings of `LatentVelocityNetwork`."""

    latent_dim: int = 512
    width: int = 1024
    depth: int = 6
    model_type: ClassVar[str] = "latent_flow"


class LatentVelocityNetwork(FieldModel):
    """Velocity of latents, z-normalised, from noise to data: unconditional sampling.

    A residual MLP, preconditioned as `MambaField`: untrained, it is the exact velocity between two Gaussians.
    """

    def __init__(self, config: LatentVelocityNetworkConfig):
        super().__init__()
        self.config = config
        self.in_proj = nn.Linear(config.latent_dim, config.width)
        self.time = TimeEmbedding(config.width)
        self.blocks = Layers(LatentBlock(config.width) for _ in range(config.depth))
        self.out = nn.Sequential(nn.RMSNorm(config.width), zero(nn.Linear(config.width, config.latent_dim)))

    def forward(self, noisy_latent, t):
        """Velocity (B, C) at noisy latents (B, C) of `normalise`, t (B,) in [0, 1], 0 is noise."""
        check_unit_range("t", t, "times")
        time = t[:, None]  # (B, 1)
        scale = path_variance(time, 1.0).sqrt()  # (B, 1)
        x = self.in_proj(noisy_latent / scale)[:, None]  # (B, 1, W)
        x = self.blocks(x, F.silu(self.time(t)))  # (B, 1, W)
        return skip_weight(time, 1.0) * noisy_latent + self.out(x[:, 0]) / scale  # (B, C)

    def loss_weight(self, t):
        return loss_weight(t, 1.0)


@torch.no_grad()
def fit_linear_code(model: MambaDiffusionAutoencoder, images: np.ndarray, *, batch_size: int = 256) -> None:
    """Set the model's linear code to the principal components of images (N, H, W, 3) uint8, its training set.

    The untrained autoencoder, given all pixels, then is PCA, up to what `num_cosines` a side cannot say.
    """
    code, count, channels = model.linear_code, model.config.num_cosines, model.config.latent_dim
    if min(len(images), len(code.mean)) <= channels or min(images.shape[1:3]) < count:
        sizes = f"latent_dim={channels}, num_cosines={count}"
        raise ValueError(f"images {images.shape} are too few, or too small, for {sizes}")
    basis = cosines(grid_coords(*images.shape[1:3])[None].to(code.mean.device), count)[0]  # (P, M^2)
    spectra = []
    for start in range(0, len(images), batch_size):
        values = torch.from_numpy(to_model(images[start : start + batch_size])).to(basis)  # (b, H, W, 3)
        spectra.append(basis.T @ values.flatten(1, 2) / len(basis))  # (b, M^2, 3): they are orthonormal
    spectra = torch.cat(spectra).flatten(1).double()  # (N, 3 M^2)
    mean = spectra.mean(0)
    covariance = spectra.T @ spectra / len(spectra) - torch.outer(mean, mean)  # (3 M^2, 3 M^2)
    powers, axes = torch.linalg.eigh(covariance)  # ascending
    code.mean.copy_(mean)
    code.components.copy_(axes[:, -channels:].flip(1).T)
    code.scale.copy_(powers[-channels:].flip(0).clamp_min(SMALLEST_STD**2).sqrt())


@torch.no_grad()
def fit_latent_statistics(
    model: MambaDiffusionAutoencoder, dataset: Dataset, *, batch_size: int = 64, progress: bool = False
) -> torch.Tensor:
    """Set the model's latent mean and standard deviation to those over its training set, a `SparseFields`.

    Returns the latents (N, C), not normalised, on the CPU.
    """
    device, latents = model.latent_mean.device, []
    with evaluation_mode(model):
        for batch in tqdm(DataLoader(dataset, batch_size), desc="encode", disable=not progress):
            points = batch["input_coords"].to(device), batch["input_values"].to(device)
            latents.append(model.encode(*points).cpu())
    latents = torch.cat(latents)  # (N, C)
    model.latent_mean.copy_(latents.double().mean(0))
    model.latent_std.copy_(latents.double().std(0, correction=0))
    return latents


def first_phase(model: MambaDiffusionAutoencoder) -> MambaDiffusionAutoencoder:
    """The autoencoder without its flow, sharing its modules: one step of it is the deterministic decoding."""
    if model.config.phase == 1:
        return model
    twin = MambaDiffusionAutoencoder(replace(model.config, phase=1))
    for name in ("linear_code", "encoder", "decoder", "latent_mean", "latent_std"):
        setattr(twin, name, getattr(model, name))
    return twin.eval()


def second_phase(first: MambaDiffusionAutoencoder, *, residual_std=0.15) -> MambaDiffusionAutoencoder:
    """A model of phase 2 on a trained one of phase 1: its weights and statistics, frozen."""
    if first.config.phase != 1:
        raise ValueError(f"this model is of phase {first.config.phase}; pass one of phase 1")
    model = MambaDiffusionAutoencoder(replace(first.config, phase=2, residual_std=residual_std))
    model.load_state_dict(first.state_dict(), strict=False)  # all but the refiner
    return model.to(first.latent_mean)
