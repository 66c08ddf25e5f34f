"""Embeddings and small parts that every model uses."""

import math

import torch
from torch import nn


class FourierFeatures(nn.Module):
    """Random Fourier features of coordinates (Tancik et al. 2020).

    Frequencies are drawn from N(0, scale^2), in cycles per image side. The product of two feature vectors is
    about ``exp(-2 pi^2 scale^2 |p - q|^2)``: `scale` sets how far apart two points still look alike.
    """

    def __init__(self, num_features, scale):
        super().__init__()
        self.register_buffer("frequencies", scale * torch.randn(2, num_features))  # (2, F)

    def forward(self, coords):
        """Coordinates (B, L, 2) in [0, 1] -> features (B, L, 2F), cosines then sines."""
        x, y = (2 * math.pi * coords.float()).split(1, dim=-1)  # (B, L, 1) each
        along_x, along_y = self.frequencies.float()  # (F,) each
        # No matrix product: autocast and TF32 would round phases of a hundred radians by half a radian.
        phase = x * along_x + y * along_y  # (B, L, F)
        return torch.cat([phase.cos(), phase.sin()], dim=-1)  # (B, L, 2F)


class PointEmbedding(nn.Module):
    """Tokens of points: a projection of the Fourier features of where they are, plus one of their values.

    Each part starts at the scale of its own fan-in: three values would drown among hundreds of features.
    """

    def __init__(self, num_features, d_model):
        super().__init__()
        self.coord_proj = nn.Linear(num_features, d_model)
        self.value_proj = nn.Linear(3, d_model)

    def forward(self, features, values):
        return self.place(features) + self.value_proj(values)  # (B, L, D)

    def place(self, features):
        return self.coord_proj(features.to(self.coord_proj.weight.dtype))  # (B, L, D)


def sinusoidal_embedding(t, dim):
    """Sinusoids (B, dim) of ``1000 t``, t (B,) (Vaswani et al. 2017); periods from 2 pi to 20,000 pi."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=t.device) / half)  # (dim/2,)
    phase = 1000 * t.float()[:, None] * frequencies  # (B, dim/2)
    return torch.cat([phase.cos(), phase.sin()], dim=-1)  # (B, dim)


class TimeEmbedding(nn.Module):
    """Flow time -> conditioning vector: sinusoids, then a two-layer MLP."""

    def __init__(self, dim):
        super().__init__()
        self.dim = dim
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t):
        return self.mlp(sinusoidal_embedding(t, self.dim).to(self.mlp[0].weight.dtype))  # (B, D)


def gather_tokens(x, order):
    """Pick tokens of (B, L, D) by index (B, M) -> (B, M, D)."""
    return x.gather(1, order[..., None].expand(-1, -1, x.shape[-1]))


def squared_distances(p, q):
    """Of all pairs of points (B, P, 2) and (B, Q, 2) -> (B, P, Q), unrounded by a matrix product."""
    x, y = (p[:, :, None, i] - q[:, None, :, i] for i in (0, 1))  # a sum over two entries is slow
    return x * x + y * y  # (B, P, Q)


def solve_positive(A, b):
    """A^-1 b for symmetric positive definite A (B, N, N), b (B, N, C), without a wait for the device."""
    factor, _ = torch.linalg.cholesky_ex(A)
    b = torch.linalg.solve_triangular(factor, b, upper=False)
    return torch.linalg.solve_triangular(factor.mT, b, upper=True)


class RMSNorm(nn.RMSNorm):
    """In the type of its weights, whatever the input: torch has no fast kernel of two types."""

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


def mlp(dim, hidden, out, dropout=0.0):
    return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, out))


def zero(layer):
    """A layer that returns zero to begin with."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def decoder(d, dropout):
    """Tokens (B, Q, D) -> what a velocity (B, Q, 3) adds to its linear part in x_t; zero to begin with."""
    return nn.Sequential(RMSNorm(d), mlp(d, 2 * d, d, dropout), nn.GELU(), zero(nn.Linear(d, 3)))
