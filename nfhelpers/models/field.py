"""The flagship: points meet on a pyramid of lattices, where convolutions and scans mix them.

Letters beside those of `models`: n nodes a side of the lattice that the queries enter, H, W nodes of a level.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from nfhelpers.flow import loss_weight, path_variance, skip_weight
from nfhelpers.images import grid_coords
from nfhelpers.kernels.orders import point_order
from nfhelpers.models.base import Layers, ModelConfig
from nfhelpers.models.layers import RMSNorm, TimeEmbedding, mlp, zero
from nfhelpers.models.sparse_fields import SparseField, check_points
from nfhelpers.models.spline import thin_plate_spline
from nfhelpers.models.ssm import MultiDirectionalSSM

SHORTCUT_POWER = 1.4  # steps of `shortcut_times` grow towards the data


@dataclass(frozen=True, kw_only=True)
class MambaFieldConfig(ModelConfig):
    """Settings of `MambaField`. Tuples have one entry a level, finest first; a level halves the nodes."""

    nodes: int = 32  # a side of the lattice that the observed points enter
    finer: int = 0  # levels above that one, for queries that are closer than its nodes
    widths: tuple[int, ...] = (64, 128, 192)
    blocks: tuple[int, ...] = (2, 3, 5)  # on the way down and again on the way up; of the last level once
    scans: int = 2  # of the last level: of two of the orders each, both ways
    d_state: int = 8  # states a channel
    d_time: int = 128
    orders: tuple[str, ...] = ("row", "column", "diagonal", "antidiagonal")
    residual_std: float = 0.15  # of data around the spline, in values of [-1, 1]
    shortcut: bool = False  # whether it was trained on whole steps, too
    model_type: ClassVar[str] = "field"

    def __post_init__(self):
        super().__post_init__()
        coarser = len(self.widths) - 1 - self.finer
        levels = coarser >= 0 and len(self.blocks) == len(self.widths) and self.nodes % 2**coarser == 0
        if not levels or len(self.orders) % 2 or (self.scans and not self.blocks[-1]):
            raise ValueError(f"{self.blocks=}, {self.widths=}, {self.finer=} and {self.nodes=} do not fit")


class Hats(NamedTuple):
    """Bilinear weights of points (B, N, 2) on the nodes, four a point: cells of n x n, points at centres.

    A point beyond the outermost centres counts as on them; a pixel centre of an n x n grid has one weight.
    """

    index: torch.Tensor  # (B, 4, N), of nodes row by row
    weight: torch.Tensor  # (B, 4, N), sums to 1
    nodes: int

    @classmethod
    def of(cls, coords, nodes):
        place = (coords * nodes - 0.5).clamp(0, nodes - 1)  # (B, N, 2)
        low = place.floor().clamp_max(max(nodes - 2, 0))
        right, below = (place - low).unbind(-1)  # (B, N) each
        left, above = 1 - right, 1 - below
        weight = torch.stack([above * left, above * right, below * left, below * right], 1)
        x, y = low.long().unbind(-1)
        corners = [y * nodes + x, y * nodes + x + 1, (y + 1) * nodes + x, (y + 1) * nodes + x + 1]
        return cls(torch.stack(corners, 1).clamp_max(nodes**2 - 1), weight, nodes)

    def gather(self, features):
        """Features (B, N, C) of the points onto the nodes -> (B, n, n, C): means where points crowd.

        A node's sum of weights is its evidence: below 1 the sum counts as it is, above it is an average.
        """
        index, weight = self.index.flatten(1), self.weight.flatten(1)  # (B, 4N)
        evidence = weight.new_zeros(len(index), self.nodes**2).scatter_add(1, index, weight)
        parts = (self.weight[..., None] * features[:, None]).flatten(1, 2)  # (B, 4N, C)
        total = parts.new_zeros(len(index), self.nodes**2, parts.shape[-1])
        total = total.scatter_add(1, index[..., None].expand_as(parts), parts)
        return (total / evidence.clamp_min(1)[..., None]).unflatten(1, (self.nodes, self.nodes))

    def read(self, field):
        """The interpolation of node values (B, n, n, C) at the points -> (B, N, C)."""
        index = self.index.flatten(1)[..., None].expand(-1, -1, field.shape[-1])
        corners = field.flatten(1, 2).gather(1, index).unflatten(1, (4, -1))  # (B, 4, N, C)
        return (self.weight[..., None] * corners).sum(1)


class Modulated(nn.Module):
    """RMS norm, then scale and shift by the time (FiLM: Perez et al. 2018); zero to begin with."""

    def __init__(self, d, d_time):
        super().__init__()
        self.norm = RMSNorm(d)
        self.modulate = zero(nn.Linear(d_time, 2 * d))

    def forward(self, x, time):
        scale, shift = self.modulate(time)[:, None, None].chunk(2, dim=-1)  # (B, 1, 1, D) each
        return self.norm(x) * (1 + scale) + shift  # (B, H, W, D)


class ConvBlock(nn.Module):
    """Residual: twice norm, SiLU and 3 x 3 convolution; the time scales the first norm."""

    def __init__(self, d, d_time):
        super().__init__()
        self.norm, self.norm_out = Modulated(d, d_time), RMSNorm(d)
        self.conv = nn.Conv2d(d, d, 3, padding=1)
        self.conv_out = zero(nn.Conv2d(d, d, 3, padding=1))

    def forward(self, x, time):
        y = self.conv(F.silu(self.norm(x, time)).permute(0, 3, 1, 2))  # (B, D, H, W)
        y = self.norm_out(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return x + self.conv_out(F.silu(y)).permute(0, 2, 3, 1).to(x.dtype)  # (B, H, W, D)


class ScanBlock(nn.Module):
    """Residual: one S6 along two orders of the lattice, both ways; the time scales its norm."""

    def __init__(self, d, d_state, d_time):
        super().__init__()
        self.norm = Modulated(d, d_time)
        self.ssm = MultiDirectionalSSM(d, d_state, 1, 2, True, True, True, 0.0)  # shared weights, tied decays
        zero(self.ssm.out_proj)

    def forward(self, x, time, orders):
        tokens = self.norm(x, time).flatten(1, 2)  # (B, L, D)
        orders = torch.cat([orders, orders]).expand(len(tokens), -1, -1)  # (B, 4, L)
        return x + self.ssm(tokens, orders).unflatten(1, x.shape[1:3]).to(x.dtype)  # (B, H, W, D)


def offsets(coords, nodes):
    """Of points (B, N, 2) from the nearest of n x n centres, in [-1, 1]."""
    return 2 * ((coords * nodes) % 1) - 1


class Pyramid(nn.Module):
    """Lattices, each of half the nodes a side: convolutions on all of them, scans on the coarsest. config: of
    `MambaField`. up: whether there is a way up, too, which takes what the way down met."""

    def __init__(self, config, up=True):
        super().__init__()
        c, upper = config, range(len(config.widths) - 1)

        def blocks(level):
            return Layers(ConvBlock(c.widths[level], c.d_time) for _ in range(c.blocks[level]))

        def each(layer):
            return nn.ModuleList(layer(*c.widths[i : i + 2]) for i in upper)

        self.nodes = c.nodes
        self.input_embedding = mlp(3 + 2, c.widths[c.finer], c.widths[c.finer])
        self.down_blocks = nn.ModuleList(blocks(level) for level in upper)
        self.down = each(lambda d, below: nn.Linear(4 * d, below))
        self.blocks = blocks(-1)
        self.scans = Layers(ScanBlock(c.widths[-1], c.d_state, c.d_time) for _ in range(c.scans))
        if up:
            self.up = each(lambda d, below: nn.Linear(below, 4 * d))
            self.skip = each(lambda d, below: nn.Linear(d, d))
            self.up_blocks = nn.ModuleList(blocks(level) for level in upper)
        cells = c.nodes >> (len(upper) - c.finer)
        orders = [point_order(grid_coords(cells, cells)[None], kind) for kind in c.orders]
        self.register_buffer("orders", torch.cat(orders), persistent=False)  # (O, L)

    def gather(self, coords, values):
        """Observed points (B, I, 2) and (B, I, 3) on their lattice (B, n, n, D)."""
        features = self.input_embedding(torch.cat([values, offsets(coords, self.nodes)], dim=-1))
        return Hats.of(coords, self.nodes).gather(features)

    def descend(self, x, time, entry=0, inputs=None):
        """x (B, n, n, C) of level `entry` -> that of the coarsest, and what the way up takes from the others.
        time (B, T) modulates all blocks; inputs: {level: (B, H, W, D)}, what joins there."""
        skips, inputs = [], inputs or {}
        for level in range(entry, len(self.down)):
            x = self.down_blocks[level](x + inputs[level] if level in inputs else x, time)
            skips.append(x)
            x = self.down[level](x.unflatten(1, (-1, 2)).unflatten(3, (-1, 2)).transpose(2, 3).flatten(3))
        return self.mix(x + inputs[len(self.down)] if len(self.down) in inputs else x, time), skips

    def ascend(self, x, time, entry, skips):
        for level in reversed(range(entry, len(self.up))):
            x = self.up[level](x).unflatten(-1, (2, 2, -1)).transpose(2, 3).flatten(1, 2).flatten(2, 3)
            x = self.up_blocks[level](x + self.skip[level](skips.pop()), time)
        return x  # (B, n, n, C)

    def mix(self, x, time):
        """The coarsest lattice (B, H, W, D): convolutions, and scans of two orders each spread among them."""
        pairs, done = self.orders.unflatten(0, (-1, 2)), 0  # (O/2, 2, L)
        for i, block in enumerate(self.blocks):
            x = self.blocks.apply_layer(block, x, time)
            while done < (i + 1) * len(self.scans) // len(self.blocks):
                x = self.scans.apply_layer(self.scans[done], x, time, pairs[done % len(pairs)])
                done += 1
        return x


class FieldConditions(NamedTuple):
    """What `MambaField` computes from the points alone: the same at all times of a sampling run."""

    queries: Hats
    places: torch.Tensor  # (B, Q, 3), offsets of the queries from the nodes, and their footprint
    start: torch.Tensor  # (B, Q, 3), where the flow starts
    inputs: dict[int, torch.Tensor]  # what joins at a level of the pyramid: (B, H, W, D)
    added: torch.Tensor | float = 0.0  # (B, T), to the embedding of the time


class MambaField(Pyramid, SparseField):
    """Observed points and noisy queries meet on a lattice; convolutions and scans mix there; queries read it.

    The flow starts from the thin-plate spline m of the observed points. With s = `residual_std`, the standard
    deviation of the data around m, all that the network u sees or predicts is of unit scale:

        z = (x_t - t m) / sqrt(V)     V = (1 - t)^2 + (s t)^2     tan(tau) = s t / (1 - t)
        z(tau + delta) = z(tau) + delta u(sin(tau + delta) z, m, tau, delta)

    For delta = 0, u is the velocity dz / dtau, 0 at the start of training: one step from t = 0 is then m. For
    longer steps u is its mean, learned from it (`shortcut`). Time and memory are linear in queries. Sources:
    Karras et al. 2022; Albergo et al. 2024 (data-dependent source); Frans et al. 2025 (shortcuts).
    """

    launch_bound = True
    takes_footprint = True

    def __init__(self, config: MambaFieldConfig):
        super().__init__(config)
        self.config, self.shortcut = config, config.shortcut
        self.time, self.step = TimeEmbedding(config.d_time), TimeEmbedding(config.d_time)
        entries = config.widths[: config.finer + 1]
        self.query_embeddings = nn.ModuleList(mlp(6 + 3, d, d) for d in entries)

        def decoder(d):
            layers = nn.Linear(2 * d, 2 * d), nn.GELU(), zero(nn.Linear(2 * d, 3))
            return nn.Sequential(RMSNorm(2 * d), *layers)

        self.decoders = nn.ModuleList(decoder(d) for d in entries)
        zero(self.step.mlp[-1])

    def shortcut_times(self, steps):
        """Times (S + 1,) of the steps that `samplers.shortcut` takes."""
        tau = math.pi / 2 * torch.linspace(0, 1, steps + 1, dtype=torch.float64) ** SHORTCUT_POWER
        return tau.sin() / (tau.sin() + self.config.residual_std * tau.cos())

    def forward(
        self, noisy_values, query_coords, t, input_coords, input_values, conditions=None, *, footprint=None,
        until=None,
    ):  # fmt: skip
        """Velocity (B, Nq, 3) as of `SparseField`; of a step to the times `until` (B,), if given, the mean.

        footprint: side of the queried pixels in image sides, a number; None: 1 / nodes.
        """
        check_points(t, (query_coords, noisy_values), (input_coords, input_values))
        if conditions is None:
            conditions = self.prepare(query_coords, input_coords, input_values, footprint)
        m, s, time = conditions.start, self.config.residual_std, t[:, None, None]  # (B, Q, 3), -, (B, 1, 1)
        scale = path_variance(time, s).sqrt()  # (B, 1, 1), sqrt(V)
        rest = noisy_values - time * m  # (B, Q, 3)
        tau = torch.atan2(s * t, 1 - t)  # (B,)
        if until is None:
            u = self.predict(rest / scale, tau, torch.zeros_like(t), conditions)  # (B, Q, 3)
            return m + skip_weight(time, s) * rest + s / scale * u
        end, delta = until[:, None, None], torch.atan2(s * until, 1 - until) - tau
        u = self.predict(rest / scale, tau, delta, conditions)
        moved = path_variance(end, s).sqrt() * (rest / scale + delta[:, None, None] * u)
        return m + (moved - rest) / (end - time)

    def loss_weight(self, t):
        return loss_weight(t, self.config.residual_std)

    def prepare(self, query_coords, input_coords, input_values, footprint=None):
        start = thin_plate_spline(query_coords, input_coords, input_values).clamp(-1, 1)  # (B, Q, 3)
        inputs = self.gather(input_coords, input_values)  # (B, H, W, D)
        return FieldConditions(*self.places(query_coords, footprint), start, {self.config.finer: inputs})

    def places(self, query_coords, footprint=None):
        """The lattice that queries (B, Q, 2) enter, and what else is known of where they are (B, Q, 3)."""
        c, base = self.config, self.config.nodes
        footprint = 1 / base if footprint is None else footprint
        if not 0 < footprint <= 1:
            raise ValueError(f"footprint={footprint}: pass the side of a pixel in image sides, as 1 / 96")
        finer = math.ceil(-math.log2(base * footprint) - 1e-3)
        nodes = base << min(max(finer, 0), c.finer)  # the coarsest lattice that is as fine as the queries
        size = max(0.0, math.log2(nodes * footprint))  # finer pixels count as the finest nodes
        size = query_coords.new_full((*query_coords.shape[:2], 1), size)
        return Hats.of(query_coords, nodes), torch.cat([offsets(query_coords, nodes), size], dim=-1)

    def predict(self, z, tau, delta, c):
        """What the network makes of z (B, Q, 3) at tau (B,), for steps delta (B,) -> (B, Q, 3)."""
        entry = self.config.finer - (c.queries.nodes // self.config.nodes).bit_length() + 1
        seen = torch.sin(tau + delta)[:, None, None] * z  # (B, Q, 3)
        queries = self.query_embeddings[entry](torch.cat([seen, c.start, c.places], dim=-1))  # (B, Q, C)
        time = F.silu(self.time(2 / math.pi * tau) + self.step(2 / math.pi * delta) + c.added)  # (B, T)
        x, skips = self.descend(c.queries.gather(queries), time, entry, c.inputs)
        x = self.ascend(x, time, entry, skips)  # (B, n, n, C)
        return self.decoders[entry](torch.cat([c.queries.read(x), queries], dim=-1)).to(z.dtype)
