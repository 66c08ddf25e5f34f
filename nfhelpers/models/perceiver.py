"""Attention from query points to observed points, and among query points."""

import math
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from nfhelpers.models.base import Layers
from nfhelpers.models.layers import RMSNorm, mlp, squared_distances


class RotaryCoordinates(nn.Module):
    """Rotary embedding of points of the plane: attention sees where points lie from one another.

    Pairs of channels at p are turned by the angle 2 pi f . p, so that products of a query at p and a key at q
    depend on q - p. The frequencies f, in cycles per image side, have random directions and log-uniform
    lengths. Sources: Su et al., "RoFormer", 2021; of values, too: Miyato et al., "GTA", ICLR 2024.
    """

    LOWEST, HIGHEST = 0.25, 16.0

    def __init__(self, num_heads, channels):
        super().__init__()
        pairs = channels // 2
        length = torch.empty(num_heads, pairs).uniform_(math.log(self.LOWEST), math.log(self.HIGHEST)).exp()
        angle = torch.empty(num_heads, pairs).uniform_(0, 2 * math.pi)
        frequencies = torch.stack([length * angle.cos(), length * angle.sin()])
        self.register_buffer("frequencies", frequencies)  # (2, H, C/2)

    def forward(self, coords):
        """Points (B, L, 2) -> cosines and sines of the angles, (B, H, L, C/2) each."""
        x, y = (2 * math.pi * coords.float())[:, None].split(1, dim=-1)  # (B, 1, L, 1) each
        along_x, along_y = self.frequencies.float()[:, :, None]  # (H, 1, C/2) each
        angle = x * along_x + y * along_y  # (B, H, L, C/2), unrounded by a matrix product
        return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turn the last pairs of channels of x (B, H, L, C), as many as there are cosines (B, H, L, P)."""
    still, a, b = x.split([x.shape[-1] - 2 * cos.shape[-1], cos.shape[-1], cos.shape[-1]], dim=-1)
    return torch.cat([still, (a * cos - b * sin).to(x.dtype), (a * sin + b * cos).to(x.dtype)], dim=-1)


def relative_attention(q, k, v, at_query, at_key, attend=F.scaled_dot_product_attention):
    """Attention of q (B, H, Q, C) to k, v (B, H, I, C) at places of `RotaryCoordinates` -> (B, H, Q, C).

    Half of the values' channels are turned, the others are the same wherever they come from.
    """
    channels, pairs = v.shape[-1], v.shape[-1] // 4
    q, k = rotate(q, *at_query), rotate(k, *at_key)
    v = rotate(v, *(x[..., :pairs] for x in at_key))
    if extra := -channels % 8:  # GPU kernels need a multiple of 8 channels; without one all logits are stored
        q = q * (1 + extra / channels) ** 0.5  # `attend` divides by the root of the padded width
        q, k, v = (F.pad(x, (0, extra)) for x in (q, k, v))
    y = attend(q, k, v)[..., :channels]  # (B, H, Q, C)
    cos, sin = (x[..., :pairs] for x in at_query)
    return rotate(y, cos, -sin)  # (B, H, Q, C)


class CrossAttention(nn.Module):
    """Multi-head attention from queries to observed points that sees where they lie from one another.

    Each head adds ``-|p - q|^2 / (2 sigma_h^2)`` to its logits: with flat keys it is a Gaussian-kernel
    interpolation (Nadaraya-Watson) of the observations, which the keys correct. The widths are learned.
    """

    NEAREST, WIDEST = 0.015, 0.3  # in image sides: half a pixel to ten pixels of a 32 px field
    LOGITS_AT_ONCE = 2**22  # of a sample: what is added to all, (H, Q, I), is far beyond a cache at 96 px

    def __init__(self, d_model, num_heads, dropout):
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.query_norm = RMSNorm(d_model)
        self.input_norm = RMSNorm(d_model)
        self.to_query = nn.Linear(d_model, d_model)
        self.to_key_value = nn.Linear(d_model, 2 * d_model)
        self.to_out = nn.Linear(d_model, d_model, bias=False)
        # The part of the logits that depends on q - p alone: with equal biases it is largest at q = p.
        nn.init.normal_(self.to_query.bias)
        with torch.no_grad():
            self.to_key_value.bias[:d_model] = self.to_query.bias
        self.rotary = RotaryCoordinates(num_heads, d_model // num_heads)
        widths = torch.linspace(math.log(self.NEAREST), math.log(self.WIDEST), num_heads)
        self.log_sigma = nn.Parameter(widths)  # (H,)

    def places(self, query_coords, input_coords):
        return self.rotary(query_coords), self.rotary(input_coords)

    def forward(self, queries, query_coords, inputs, input_coords, places=None):
        """Queries (B, Q, D) at (B, Q, 2), inputs (B, I, D) at (B, I, 2) -> update of queries (B, Q, D)."""
        q = self._heads(self.to_query(self.query_norm(queries)))  # (B, H, Q, C)
        both = self.to_key_value(self.input_norm(inputs)).chunk(2, dim=-1)
        k, v = (self._heads(x) for x in both)  # (B, H, I, C)
        precision = 0.5 * torch.exp(-2 * self.log_sigma.float())  # (H,)
        at_once = max(1, self.LOGITS_AT_ONCE // (k.shape[1] * k.shape[2]))

        def attend(q, k, v):
            parts = []
            slices = [(q, query_coords)]
            if not torch.compiler.is_exporting():  # how many there are would bound the queries of a program
                slices = zip(q.split(at_once, dim=2), query_coords.split(at_once, dim=1), strict=True)
            for part, coords in slices:
                distance2 = squared_distances(coords, input_coords)  # (B, q, I)
                prior = (-precision[:, None, None] * distance2[:, None]).to(q.dtype)  # (B, H, q, I)
                dropout = self.dropout if self.training else 0.0
                parts.append(F.scaled_dot_product_attention(part, k, v, attn_mask=prior, dropout_p=dropout))
            return torch.cat(parts, dim=2)  # (B, H, Q, C)

        at = self.places(query_coords, input_coords) if places is None else places
        y = relative_attention(q, k, v, *at, attend)  # (B, H, Q, C)
        return self.to_out(y.transpose(1, 2).flatten(2))  # (B, Q, D)

    def _heads(self, x):
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, L, C)


class QuerySelfAttention(nn.Module):
    """Multi-head attention among all queries."""

    def __init__(self, d_model, num_heads, dropout):
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.norm = RMSNorm(d_model)
        self.to_query_key_value = nn.Linear(d_model, 3 * d_model)
        self.to_out = nn.Linear(d_model, d_model, bias=False)
        self.rotary = RotaryCoordinates(num_heads, d_model // num_heads)

    def forward(self, queries, coords, places=None):
        """Queries (B, Q, D) at coords (B, Q, 2) -> update of queries (B, Q, D)."""
        at = self.rotary(coords) if places is None else places
        heads = self.to_query_key_value(self.norm(queries)).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # (B, H, Q, C) each
        attend = partial(F.scaled_dot_product_attention, dropout_p=self.dropout if self.training else 0.0)
        y = relative_attention(q, k, v, at, at, attend)  # (B, H, Q, C)
        return self.to_out(y.transpose(1, 2).flatten(2))  # (B, Q, D)


class PerceiverLayer(nn.Module):
    """One iteration: gather from the observed points, exchange among queries, refine each by an MLP."""

    def __init__(self, d_model, num_heads, mlp_ratio, dropout):
        super().__init__()
        self.cross_attention = CrossAttention(d_model, num_heads, dropout)
        self.self_attention = QuerySelfAttention(d_model, num_heads, dropout)
        self.mlp_norm = RMSNorm(d_model)
        self.mlp = mlp(d_model, int(mlp_ratio * d_model), d_model, dropout)

    def places(self, query_coords, input_coords):
        across = self.cross_attention.places(query_coords, input_coords)
        return across, self.self_attention.rotary(query_coords)

    def forward(self, queries, query_coords, inputs, input_coords, places):
        """Queries (B, Q, D) at (B, Q, 2), inputs (B, I, D) at (B, I, 2) -> queries (B, Q, D)."""
        across, among = places
        queries = queries + self.cross_attention(queries, query_coords, inputs, input_coords, across)
        queries = queries + self.self_attention(queries, query_coords, among)
        return queries + self.mlp(self.mlp_norm(queries))  # (B, Q, D)


class LightweightPerceiver(nn.Module):
    """Refine queries in a few iterations, each with its own weights.

    Source: Jaegle et al., "Perceiver: General Perception with Iterative Attention", 2021.
    """

    def __init__(self, d_model, num_heads, iterations, mlp_ratio, dropout):
        super().__init__()
        layer = (d_model, num_heads, mlp_ratio, dropout)
        self.layers = Layers(PerceiverLayer(*layer) for _ in range(iterations))

    def places(self, query_coords, input_coords):
        return [layer.places(query_coords, input_coords) for layer in self.layers]

    def forward(self, queries, query_coords, inputs, input_coords, places=None):
        """Queries (B, Q, D) at (B, Q, 2), inputs (B, I, D) at (B, I, 2) -> queries (B, Q, D)."""
        places = self.places(query_coords, input_coords) if places is None else places
        for layer, place in zip(self.layers, places, strict=True):
            queries = self.layers.apply_layer(layer, queries, query_coords, inputs, input_coords, place)
        return queries
