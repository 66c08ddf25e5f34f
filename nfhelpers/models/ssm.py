"""Selective state-space mixers and the block around them."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from nfhelpers.kernels import directional_scan, selective_scan
from nfhelpers.models.base import Layers
from nfhelpers.models.layers import RMSNorm, mlp, zero


def initial_step_bias(*shape):
    """Bias of the softplus that makes step sizes log-uniform in [0.001, 0.1] (Gu & Dao 2023)."""
    delta = torch.exp(torch.empty(*shape).uniform_(math.log(1e-3), math.log(1e-1)))
    return delta + torch.log(-torch.expm1(-delta))  # inverse of softplus


def initial_log_rates(*shape, d_state, tied_decay):
    """Logarithms of the S4D-real decay rates 1 .. N, (*shape, N); tied, of a = 1, (*shape)."""
    if tied_decay:
        return torch.zeros(*shape)
    return torch.arange(1, d_state + 1, dtype=torch.float32).log().repeat(*shape, 1)


class SelectiveSSM(nn.Module):
    """Input-dependent state-space layer, S6 (Gu & Dao 2023, section 3), without the convolution.

    ``A = -exp(A_log)`` and ``delta = softplus(.) > 0`` keep every decay ``exp(delta A)`` in (0, 1). A starts
    as -1 .. -N; with `tied_decay` it stays ``-(n + 1) a``: one exponential a step and channel in place of N.
    """

    def __init__(self, d_model, d_state, expand, tied_decay=False):
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
        self.dt_bias = nn.Parameter(initial_step_bias(d_inner))  # (E,)
        rates = initial_log_rates(d_inner, d_state=d_state, tied_decay=tied_decay)
        self.A_log = nn.Parameter(rates)  # (E, N), tied (E,)
        self.A_log._no_weight_decay = True  # a log decay rate, not a matrix
        self.D = nn.Parameter(torch.ones(d_inner))  # (E,)

    def forward(self, tokens):
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


class DirectionalScans(nn.Module):
    """The tokens of a plane scanned in several directions, each by an S6 of its own or all by one."""

    def make_scans(self, d_model, width, d_state, reverse, sets, tied_decay):
        """Parameters of `sets` S6 over tokens of this width. reverse: (K,) bool, which go backwards."""
        self.reverse = reverse
        self.sets = sets
        self.dt_rank = math.ceil(d_model / 16)
        self.d_state = d_state
        self.tied_decay = tied_decay
        self.x_proj = nn.Linear(width, sets * (self.dt_rank + 2 * d_state), bias=False)
        bound = self.dt_rank**-0.5
        self.dt_weight = nn.Parameter(torch.empty(sets, width, self.dt_rank).uniform_(-bound, bound))
        self.dt_bias = nn.Parameter(initial_step_bias(sets, width))  # (S, E)
        rates = initial_log_rates(sets, width, d_state=d_state, tied_decay=tied_decay)
        self.A_log = nn.Parameter(rates)  # (S, E, N), tied (S, E)
        self.D = nn.Parameter(torch.ones(sets, width))  # (S, E)
        for parameter in (self.dt_bias, self.A_log, self.D):
            parameter._no_weight_decay = True  # a bias, a log rate and a skip weight, not matrices

    def scan(self, x, orders):
        """Scan x (B, L, E) along orders (B, K, L) or (K, L) -> (B, K, L, E), in the tokens' own order."""
        k = len(self.reverse)
        parts = self.x_proj(x).unflatten(-1, (self.sets, -1))  # (B, L, S, R+2N)
        low, B, C = parts.split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        delta = torch.einsum("blsr,ser->bsle", low, self.dt_weight)  # (B, S, L, E)
        B, C = B.transpose(1, 2), C.transpose(1, 2)  # (B, S, L, N) each
        A = -torch.exp(self.A_log.float())  # (S, E, N), tied (S, E)
        return directional_scan(
            x,
            delta.expand(-1, k, -1, -1),  # (B, K, L, E)
            A.expand(k, *A.shape[1:]),
            B.expand(-1, k, -1, -1),  # (B, K, L, N)
            C.expand(-1, k, -1, -1),
            self.D.float().expand(k, -1),
            orders=orders,
            delta_bias=self.dt_bias.float().expand(k, -1),
            reverse=self.reverse,
            tied_decay=self.tied_decay,
        )


class MultiDirectionalSSM(DirectionalScans):
    """Points of the plane scanned in several orders at once, and fused.

        u, z = W_in tokens        y_k = S6 of x in direction k
        x = silu(u)               result = W_out (norm(x + fusion(y_1 .. y_O)) * silu(z))

    With `shared_weights` one S6 serves all directions and the fusion is linear; otherwise each direction has
    its own, and the fusion is an MLP. With `bidirectional` both ways of an order are added before the fusion.
    """

    def __init__(
        self, d_model, d_state, expand, num_orders, shared_weights, bidirectional, tied_decay, dropout
    ):
        super().__init__()
        e = expand * d_model
        self.ways = 2 if bidirectional else 1
        reverse = (False,) * num_orders + (True,) * num_orders * (self.ways - 1)
        self.in_proj = nn.Linear(d_model, 2 * e, bias=False)
        sets = 1 if shared_weights else len(reverse)
        self.make_scans(d_model, e, d_state, reverse, sets, tied_decay)
        joined = num_orders * e
        self.fusion = nn.Linear(joined, e) if shared_weights else mlp(joined, 2 * e, e, dropout)
        self.fusion_norm = RMSNorm(e)
        self.out_proj = nn.Linear(e, d_model, bias=False)

    def forward(self, tokens, orders):
        """Mix tokens (B, L, D) along orders (B, K, L) -> (B, L, D), in the tokens' own order."""
        x, z = self.in_proj(tokens).chunk(2, dim=-1)  # (B, L, E) each
        x = F.silu(x)
        y = self.scan(x, orders).unflatten(1, (self.ways, -1)).sum(1)  # (B, O, L, E)
        fused = x + self.fusion(y.transpose(1, 2).flatten(2))  # (B, L, E)
        fused = self.fusion_norm(fused.to(self.fusion_norm.weight.dtype))  # in float32 under autocast
        return self.out_proj(fused * F.silu(z))  # (B, L, D)


class ResidualBlock(nn.Module):
    """Pre-norm residual block: a sequence mixer, which may take orders of scans, then a token-wise MLP."""

    def __init__(self, mixer, d_model, mlp_ratio, dropout):
        super().__init__()
        self.mixer_norm = RMSNorm(d_model)
        self.mixer = mixer
        self.mlp_norm = RMSNorm(d_model)
        self.mlp = mlp(d_model, int(mlp_ratio * d_model), d_model, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens, *orders):
        tokens = tokens + self.dropout(self.mixer(self.mixer_norm(tokens), *orders))
        return tokens + self.dropout(self.mlp(self.mlp_norm(tokens)))


def stack(blocks):
    """Residual blocks one after the other, that pass their tokens on unchanged to begin with."""
    blocks = Layers(blocks)
    for block in blocks:
        zero(block.mixer.out_proj)
        zero(block.mlp[-1])
    return blocks


class MambaBlock(ResidualBlock):
    """One scan along the sequence: `forward(tokens)`."""

    def __init__(self, d_model, d_state, expand, tied_decay, mlp_ratio, dropout):
        super().__init__(SelectiveSSM(d_model, d_state, expand, tied_decay), d_model, mlp_ratio, dropout)


class BidirectionalMamba(nn.Module):
    """A stack of blocks that reads the sequence forwards and one that reads it backwards.

    Both start from the same tokens; their results are concatenated and projected.
    """

    def __init__(self, d_model, num_layers, d_state, expand, tied_decay, mlp_ratio, dropout):
        super().__init__()
        block = (d_model, d_state, expand, tied_decay, mlp_ratio, dropout)
        self.forward_blocks = stack(MambaBlock(*block) for _ in range(num_layers // 2))
        self.backward_blocks = stack(MambaBlock(*block) for _ in range(num_layers // 2))
        self.combine = nn.Linear(2 * d_model, d_model)

    def forward(self, tokens):
        ahead = self.forward_blocks(tokens)  # (B, L, D)
        back = self.backward_blocks(tokens.flip(1)).flip(1)  # (B, L, D)
        return self.combine(torch.cat([ahead, back], dim=-1)).to(tokens.dtype)  # (B, L, D)
