"""LocalMamba: a hierarchical denoiser of grids, such as spectrograms.

    x (B, C, H, W) -> TokenMerge 2x2 -> stage 1 -> PatchMerging -> ... -> stage S -> RMSNorm, conv
      -> TokenSplit with the skip of stage S-1 -> its blocks -> ... -> patch unprojection -> velocity

A stage is a stack of `ConditionedVSSBlock`: its tokens are scanned in several directions at once (`SS2D`).
Time, class and caption reach every block through a mapping network and `AdaRMSNorm`.
"""

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes

from nfhelpers.flow import check_unit_range, skip_weight
from nfhelpers.images import grid_coords
from nfhelpers.kernels.orders import grid_order
from nfhelpers.models.base import FieldModel, ModelConfig
from nfhelpers.models.layers import RMSNorm, mlp, sinusoidal_embedding, zero
from nfhelpers.models.perceiver import RotaryCoordinates, relative_attention
from nfhelpers.models.ssm import DirectionalScans, stack


@functools.cache  # without a limit: CUDA graphs read them where they are
def _places(height, width, stages, directions, device):
    # What is kept must not depend on where it is asked for first: in inference mode, under a trace ...
    with _disable_current_modes(), torch.inference_mode(False), torch.device("cpu"):
        sizes = [(height >> stage, width >> stage) for stage in range(stages)]
        if directions is None:
            return tuple(grid_coords(*size)[None].to(device) for size in sizes)
        kinds = [kind.removesuffix("_flip") for kind in directions]
        return tuple(torch.stack([grid_order(*size, kind) for kind in kinds]).to(device) for size in sizes)


def stage_places(height, width, stages, directions, device):
    """What mixers take beside their grid, a stage: orders (K, L), or for attention centres (1, L, 2)."""
    return _places(height, width, stages, directions, device)


stage_places._dynamo_marked_constant = True  # torch.compiler.assume_constant_result, without its imports


def gather_patches(grid):
    """Patches of 2 x 2 tokens as one: (B, H, W, D) with even H, W -> (B, H/2, W/2, 4D)."""
    patches = grid.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # (B, H/2, 2, W/2, 2, D)
    return patches.transpose(2, 3).flatten(3)  # (B, H/2, W/2, 4D)


def spread_patches(grid):
    """The inverse of `gather_patches`: (B, H, W, 4D) -> (B, 2H, 2W, D)."""
    patches = grid.unflatten(3, (2, 2, -1)).transpose(2, 3)  # (B, H, 2, W, 2, D)
    return patches.flatten(3, 4).flatten(1, 2)  # (B, 2H, 2W, D)


class MappingNetwork(nn.Module):
    """What is known of a sample, concatenated, to one conditioning vector (Crowson et al. 2024)."""

    def __init__(self, parts, width, depth, dropout):
        super().__init__()
        self.in_proj = nn.Linear(parts * width, width)
        self.norms = nn.ModuleList(RMSNorm(width) for _ in range(depth))
        self.layers = nn.ModuleList(mlp(width, 2 * width, width, dropout) for _ in range(depth))
        self.out_norm = RMSNorm(width)

    def forward(self, features):
        condition = self.in_proj(features).to(self.out_norm.weight.dtype)  # (B, M)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            condition = condition + layer(norm(condition))  # (B, M)
        return self.out_norm(condition)


class AdaRMSNorm(nn.Module):
    """RMSNorm whose scale and shift are linear in the condition (Hourglass, Crowson et al. 2024)."""

    EPS = 1e-6

    def __init__(self, dim, mapping_width):
        super().__init__()
        self.head = zero(nn.Linear(mapping_width, 2 * dim))

    def forward(self, grid, condition):
        scale, shift = self.head(condition)[:, None, None].chunk(2, dim=-1)  # (B, 1, 1, D) each
        return F.rms_norm(grid, grid.shape[-1:], eps=self.EPS) * (1 + scale) + shift  # (B, H, W, D)


class DropPath(nn.Dropout1d):
    """Leave a residual branch out of some samples while training (stochastic depth, Huang et al. 2016)."""

    def forward(self, branch):
        samples = branch.flatten(1)[None]  # as channels, which are dropped whole
        return super().forward(samples).view_as(branch)


class BiAttn(nn.Module):
    """Fuse the directions of a scan: y = sum over k of y_k * channel_k * place_k, both weights in (0, 1).

    They depend on what a direction found. Source: Huang et al., "LocalMamba", 2024, section 3.3.
    """

    def __init__(self, dim):
        super().__init__()
        hidden = max(dim // 8, 4)
        self.norm = RMSNorm(dim)
        self.whole_proj = nn.Linear(dim, hidden)
        self.place_proj = nn.Linear(dim, hidden)
        self.channel_score = nn.Linear(hidden, dim)
        self.place_score = nn.Linear(hidden, 1)
        self.whole_score = nn.Linear(hidden, 1, bias=False)

    def forward(self, y):
        seen = self.norm(y.to(self.norm.weight.dtype))  # (B, K, L, E)
        whole = F.gelu(self.whole_proj(seen.mean(2, keepdim=True)))  # (B, K, 1, hidden)
        place = self.place_score(F.gelu(self.place_proj(seen))) + self.whole_score(whole)  # (B, K, L, 1)
        return (y * self.channel_score(whole).sigmoid() * place.sigmoid()).sum(1)  # (B, L, E)


class SS2D(DirectionalScans):
    """The tokens of a grid scanned in several directions at once, each by its own S6, and fused.

        u, z = W_in grid          y_k = S6 of x in direction k
        x = silu(conv u)          result = W_out (norm(BiAttn(y_1 .. y_K)) * silu(z))

    Sources: Liu et al., "VMamba: Visual State Space Model", 2024; Huang et al. 2024.
    """

    def __init__(self, dim, d_state, ssm_ratio, directions):
        super().__init__()
        e = int(ssm_ratio * dim)
        reverse = tuple(kind.endswith("_flip") for kind in directions)
        self.in_proj = nn.Linear(dim, 2 * e, bias=False)
        self.conv = nn.Conv2d(e, e, 3, padding=1, groups=e)
        self.make_scans(dim, e, d_state, reverse, sets=len(directions), tied_decay=False)
        self.fusion = BiAttn(e)
        self.norm = RMSNorm(e)
        self.out_proj = nn.Linear(e, dim, bias=False)

    def forward(self, grid, orders):
        x, z = self.in_proj(grid).chunk(2, dim=-1)  # (B, H, W, E) each
        x = F.silu(self.conv(x.permute(0, 3, 1, 2)))  # (B, E, H, W)
        y = self.scan(x.flatten(2).transpose(1, 2), orders)  # (B, K, L, E)
        fused = self.norm(self.fusion(y).to(self.norm.weight.dtype))  # (B, L, E), float32 under autocast
        return self.out_proj(fused.view_as(z) * F.silu(z))  # (B, H, W, D)


class GridAttention(nn.Module):
    """Attention among all tokens of a grid: the mixer of the twin without scans."""

    def __init__(self, dim, head_dim):
        super().__init__()
        self.num_heads = dim // head_dim
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.rotary = RotaryCoordinates(self.num_heads, head_dim)
        self.out_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, grid, coords):
        qkv = self.to_qkv(grid).flatten(1, 2).unflatten(-1, (3, self.num_heads, -1))  # (B, L, 3, heads, C)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, L, C) each
        at = self.rotary(coords)
        y = relative_attention(q, k, v, at, at)  # (B, heads, L, C)
        return self.out_proj(y.transpose(1, 2).flatten(2).view_as(grid))  # (B, H, W, D)


class ConditionedVSSBlock(nn.Module):
    """The VSS block (Liu et al. 2024): a mixer of the grid, then a token-wise MLP, each after AdaRMSNorm."""

    def __init__(self, mixer, dim, mapping_width, mlp_ratio, dropout, drop_path):
        super().__init__()
        self.mixer_norm = AdaRMSNorm(dim, mapping_width)
        self.mixer = mixer
        self.mlp_norm = AdaRMSNorm(dim, mapping_width)
        self.mlp = mlp(dim, int(mlp_ratio * dim), dim, dropout)
        self.dropout = nn.Dropout(dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, grid, condition, where):
        mixed = self.mixer(self.mixer_norm(grid, condition), where)  # (B, H, W, D)
        grid = grid + self.drop_path(self.dropout(mixed))
        return grid + self.drop_path(self.dropout(self.mlp(self.mlp_norm(grid, condition))))


class TokenMerge(nn.Module):
    """Patches of 2 x 2 pixels as tokens (Hourglass)."""

    def __init__(self, channels, dim):
        super().__init__()
        self.proj = nn.Linear(4 * channels, dim)

    def forward(self, pixels):
        return self.proj(gather_patches(pixels))


class PatchMerging2D(nn.Module):
    """The step down to the next stage: 2 x 2 tokens as one (Liu et al. 2024)."""

    def __init__(self, dim, dim_below):
        super().__init__()
        self.norm = RMSNorm(4 * dim)
        self.proj = nn.Linear(4 * dim, dim_below, bias=False)

    def forward(self, grid):
        return self.proj(self.norm(gather_patches(grid)))


class TokenSplit(nn.Module):
    """The step up: a token as 2 x 2, concatenated with the stage's skip and projected."""

    def __init__(self, dim_below, dim):
        super().__init__()
        self.proj = nn.Linear(dim_below, 4 * dim, bias=False)
        self.fuse = nn.Linear(2 * dim, dim)

    def forward(self, grid, cached):
        """Grid (B, H, W, D below), skip (B, 2H, 2W, D) -> (B, 2H, 2W, D)."""
        return self.fuse(torch.cat([spread_patches(self.proj(grid)), cached], dim=-1))


@dataclass(frozen=True, kw_only=True)
class LocalMamba2DConfig(ModelConfig):
    """Settings of `LocalMamba2D`."""

    channels: int = 1  # of the grid
    dims: tuple[int, ...] = (96, 192, 384, 768)  # width of each stage, from the finest down
    depths: tuple[int, ...] = (2, 2, 7, 2)  # blocks of each stage, on the way down and again up
    d_state: int = 16
    ssm_ratio: float = 2.0  # times a stage's width: width inside its scans
    mlp_ratio: float = 4.0
    scan_directions: tuple[str, ...] = ("h", "v", "w7")  # "h", "v", "w<N>", each with "_flip" or without
    mixer: str = "ssm"  # or "attention", with heads of head_dim channels
    head_dim: int = 32
    skip: str = "concat"  # of the way down, at the step up: see `TokenSplit`
    mapping_width: int = 256
    mapping_depth: int = 2
    num_classes: int = 0  # 0: no such condition
    caption_dim: int = 0
    cfg_dropout: float = 0.1  # share of training samples whose condition is dropped
    dropout: float = 0.1
    drop_path: float = 0.0  # of the last block, rising linearly from 0 at the first
    data_std: float = 0.5  # root mean square of the data, in values of [-1, 1]
    model_type: ClassVar[str] = "localmamba"

    def __post_init__(self):
        super().__post_init__()
        if len(self.dims) != len(self.depths):
            raise ValueError(f"dims={self.dims} and depths={self.depths} differ in their number of stages")
        if self.mixer not in ("ssm", "attention") or self.skip != "concat":
            raise ValueError(f"mixer={self.mixer!r} or skip={self.skip!r} is unknown")
        if self.mixer == "attention" and any(dim % self.head_dim for dim in self.dims):
            raise ValueError(f"dims={self.dims} are not multiples of head_dim={self.head_dim}")


class LocalMamba2D(FieldModel):
    """Velocity field over grids, conditioned on time, class and caption.

    Grids of any size are padded with zeros to multiples of 2^S, and the result is cropped. The network
    predicts what is left of the velocity after its linear part in x (`flow.skip_weight`), and starts at zero.
    A condition that is dropped is exactly zero. Sources: Huang et al. 2024; Crowson et al. 2024.
    """

    launch_bound = True

    def __init__(self, config: LocalMamba2DConfig):
        super().__init__()
        self.config = config
        dims, stages, width = config.dims, len(config.dims), config.mapping_width
        self.token_merge = TokenMerge(config.channels, dims[0])
        if config.num_classes:
            self.class_embedding = nn.Embedding(config.num_classes, width)
        if config.caption_dim:
            self.caption_proj = nn.Linear(config.caption_dim, width, bias=False)
        parts = 1 + (config.num_classes > 0) + (config.caption_dim > 0)
        self.mapping = MappingNetwork(parts, width, config.mapping_depth, config.dropout)

        way = [*range(stages), *reversed(range(stages - 1))]  # the stage of each stack, down and up again
        total = sum(config.depths[stage] for stage in way)
        rates = (config.drop_path * index / max(total - 1, 1) for index in range(total))
        stacks = [stack(self._block(s, next(rates)) for _ in range(config.depths[s])) for s in way]
        self.down = nn.ModuleList(stacks[:stages])
        self.up = nn.ModuleList(stacks[stages:])
        self.mergings = nn.ModuleList(PatchMerging2D(dims[s], dims[s + 1]) for s in range(stages - 1))
        self.bottleneck_norm = RMSNorm(dims[-1])
        self.bottleneck_conv = nn.Conv2d(dims[-1], dims[-1], 3, padding=1)
        self.splits = nn.ModuleList(TokenSplit(dims[s + 1], dims[s]) for s in reversed(range(stages - 1)))
        self.out_norm = RMSNorm(dims[0])
        self.out_proj = zero(nn.Linear(dims[0], 4 * config.channels))
        for module in self.modules():
            if isinstance(module, MappingNetwork | AdaRMSNorm):
                for parameter in module.parameters():
                    parameter._mapping = True  # it learns at a third of the rate (Crowson et al. 2024)

    def _block(self, stage, drop_path):
        c, dim = self.config, self.config.dims[stage]
        scans = (c.d_state, c.ssm_ratio, c.scan_directions)
        mixer = GridAttention(dim, c.head_dim) if c.mixer == "attention" else SS2D(dim, *scans)
        return ConditionedVSSBlock(mixer, dim, c.mapping_width, c.mlp_ratio, c.dropout, drop_path)

    def forward(self, x, t, labels=None, captions=None, drop=None):
        """Velocity (B, C, H, W) of the flow at x (B, C, H, W), which is x_t, in about [-1, 1].

        labels (B,) int64, captions (B, caption_dim); drop (B,) bool: samples whose condition is ignored.
        """
        check_unit_range("t", t, "times")
        sizes = (("labels", labels, self.config.num_classes), ("captions", captions, self.config.caption_dim))
        if wrong := [name for name, given, size in sizes if (given is not None) != (size > 0)]:
            raise ValueError(f"this model and the call disagree on {wrong}: {self.config}")
        height, width = x.shape[2:]
        multiple, dtype = 2 ** len(self.down), self.out_proj.weight.dtype  # float32 stays so under autocast
        condition = self.condition(t, labels, captions, drop)  # (B, M)
        grid = x.permute(0, 2, 3, 1).to(dtype)  # (B, H, W, C)
        grid = F.pad(grid, (0, 0, 0, -width % multiple, 0, -height % multiple))  # (B, H', W', C)
        grid = self.token_merge(grid).to(dtype)  # (B, H'/2, W'/2, D)
        directions = None if self.config.mixer == "attention" else self.config.scan_directions
        places = stage_places(*grid.shape[1:3], len(self.down), directions, grid.device)
        cached = []
        for stage, blocks in enumerate(self.down):
            if stage > 0:
                cached.append(grid)
                grid = self.mergings[stage - 1](grid).to(dtype)  # half the sides
            grid = blocks(grid, condition, places[stage])
        grid = self.bottleneck_norm(grid).permute(0, 3, 1, 2)
        grid = self.bottleneck_conv(grid).permute(0, 2, 3, 1).to(dtype)
        for stage, split, blocks in zip(reversed(range(len(cached))), self.splits, self.up, strict=True):
            grid = split(grid, cached[stage]).to(dtype)  # twice the sides
            grid = blocks(grid, condition, places[stage])
        residual = spread_patches(self.out_proj(self.out_norm(grid)))  # (B, H', W', C)
        residual = residual[:, :height, :width].permute(0, 3, 1, 2)  # (B, C, H, W)
        return residual + skip_weight(t, self.config.data_std)[:, None, None, None] * x

    def condition(self, t, labels, captions, drop):
        """Conditioning vector (B, M) of time, class and caption."""
        dtype = self.out_proj.weight.dtype
        time = sinusoidal_embedding(t, self.config.mapping_width).to(dtype)  # (B, M)
        known = []
        if self.config.num_classes:
            known.append(self.class_embedding(labels))  # (B, M)
        if self.config.caption_dim:
            known.append(self.caption_proj(captions.to(dtype)))  # (B, M)
        if drop is not None:
            known = [part.masked_fill(drop[:, None], 0) for part in known]
        return self.mapping(torch.cat([time, *known], dim=-1))
