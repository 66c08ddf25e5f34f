"""Attention from query points to observed points.

Glossary
    b  batch
    q  query points
    i  observed (input) points
    h  attention heads
    c  channels per head
    d  model width (d_model = h * c)
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from nfhelpers.models.layers import squared_distances


class CrossAttention(nn.Module):
    """Multi-head attention from queries to observed points, with a Gaussian prior on their distance.

    Each head adds ``-|p - q|^2 / (2 sigma_h^2)`` to its logits. With flat keys a head is then a
    Gaussian-kernel interpolation (Nadaraya-Watson) of the observations, which is what the field looks like at
    zeroth order; the keys correct it. The widths sigma_h are learned, starting log-spaced between `NEAREST`
    and `WIDEST`.
    """

    NEAREST, WIDEST = 0.015, 0.3  # in image sides: half a pixel to ten pixels of a 32 px field

    def __init__(self, d_model: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.query_norm = nn.RMSNorm(d_model)
        self.input_norm = nn.RMSNorm(d_model)
        self.to_query = nn.Linear(d_model, d_model, bias=False)
        self.to_key_value = nn.Linear(d_model, 2 * d_model, bias=False)
        self.to_out = nn.Linear(d_model, d_model, bias=False)
        widths = torch.linspace(math.log(self.NEAREST), math.log(self.WIDEST), num_heads)
        self.log_sigma = nn.Parameter(widths)  # (H,)

    def forward(
        self,
        queries: torch.Tensor,
        query_coords: torch.Tensor,
        inputs: torch.Tensor,
        input_coords: torch.Tensor,
    ) -> torch.Tensor:
        """Queries (B, Q, D) at (B, Q, 2), inputs (B, I, D) at (B, I, 2) -> update of queries (B, Q, D)."""
        q = self._heads(self.to_query(self.query_norm(queries)))  # (B, H, Q, C)
        k, v = self.to_key_value(self.input_norm(inputs)).chunk(2, dim=-1)
        k, v = self._heads(k), self._heads(v)  # (B, H, I, C)
        distance2 = squared_distances(query_coords, input_coords)  # (B, Q, I)
        precision = 0.5 * torch.exp(-2 * self.log_sigma.float())  # (H,)
        prior = -precision[:, None, None] * distance2[:, None]  # (B, H, Q, I)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=prior.to(q.dtype), dropout_p=dropout
        )  # (B, H, Q, C)
        return self.to_out(y.transpose(1, 2).flatten(2))  # (B, Q, D)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, L, C)
