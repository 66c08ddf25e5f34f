"""Selective state-space mixers and the block around them.

Glossary
    b  batch
    l  tokens, in the order they are scanned
    d  model width (d_model)
    e  inner width (expand * d_model)
    n  state size per channel (d_state)
    r  rank of the step-size projection (dt_rank)
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from nfhelpers.kernels import selective_scan
from nfhelpers.models.layers import mlp


class SelectiveSSM(nn.Module):
    """Input-dependent state-space layer, S6 (Gu & Dao 2023, section 3; seed 002), without the convolution.

    The tokens of a sparse field are not evenly spaced, so a fixed stencil over the sequence means nothing.
    The parametrisation is stable by construction: ``A = -exp(A_log)`` and ``delta = softplus(.) > 0`` keep
    every decay ``exp(delta A)`` in (0, 1), so the state needs no clamping. A starts as the S4D-real spectrum
    -1 .. -N, delta log-uniform in [0.001, 0.1]. With `tied_decay` it keeps that shape, ``-(n + 1) a`` with
    one a per channel: the scan then takes one exponential a step and channel in place of N.
    """

    def __init__(self, d_model: int, d_state: int, expand: int, tied_decay: bool):
        super().__init__()
        d_inner = expand * d_model
        self.dt_rank = math.ceil(d_model / 16)
        self.d_state = d_state
        self.tied_decay = tied_decay
        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=False)
        self.x_proj = nn.Linear(d_inner, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, d_inner, bias=False)
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)

        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        delta = torch.exp(torch.empty(d_inner).uniform_(math.log(1e-3), math.log(1e-1)))  # (E,)
        self.dt_bias = nn.Parameter(delta + torch.log(-torch.expm1(-delta)))  # inverse of softplus, (E,)
        spectrum = torch.arange(1, d_state + 1, dtype=torch.float32)  # (N,)
        log_rates = torch.zeros(d_inner) if tied_decay else spectrum.log().repeat(d_inner, 1)
        self.A_log = nn.Parameter(log_rates)  # (E, N), tied (E,)
        self.A_log._no_weight_decay = True  # a log decay rate, not a matrix
        self.D = nn.Parameter(torch.ones(d_inner))  # (E,)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Mix tokens (B, L, D) along the sequence, first to last -> (B, L, D)."""
        x, z = self.in_proj(tokens).chunk(2, dim=-1)  # (B, L, E) each
        x = F.silu(x)
        delta, B, C = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        y = selective_scan(
            x.transpose(1, 2),  # (B, E, L)
            self.dt_proj(delta).transpose(1, 2),  # (B, E, L)
            -torch.exp(self.A_log.float()),  # (E, N), tied (E,)
            B.transpose(1, 2),  # (B, N, L)
            C.transpose(1, 2),  # (B, N, L)
            D=self.D.float(),
            z=z.transpose(1, 2),
            delta_bias=self.dt_bias.float(),
            delta_softplus=True,
            tied_decay=self.tied_decay,
        )  # (B, E, L)
        return self.out_proj(y.transpose(1, 2))  # (B, L, D)


class MambaBlock(nn.Module):
    """Pre-norm residual block: a sequence mixer, then a token-wise MLP (seed 001's MambaBlock)."""

    def __init__(
        self, d_model: int, d_state: int, expand: int, tied_decay: bool, mlp_ratio: float, dropout: float
    ):
        super().__init__()
        self.mixer_norm = nn.RMSNorm(d_model)
        self.mixer = SelectiveSSM(d_model, d_state, expand, tied_decay)
        self.mlp_norm = nn.RMSNorm(d_model)
        self.mlp = mlp(d_model, int(mlp_ratio * d_model), d_model, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, L, D) -> (B, L, D)."""
        tokens = tokens + self.dropout(self.mixer(self.mixer_norm(tokens)))
        return tokens + self.dropout(self.mlp(self.mlp_norm(tokens)))
