"""LocalMamba: a hierarchical denoiser of grids, such as spectrograms (seed 000).

    x (B, C, H, W) -> TokenMerge 2x2 -> stage 1 -> PatchMerging -> ... -> stage S -> RMSNorm, conv
      -> TokenSplit with the skip of stage S-1 -> its blocks -> ... -> patch unprojection -> velocity

A stage is a stack of `ConditionedVSSBlock`: the tokens of its grid are scanned in several directions at once
(`SS2D`), each scan an S6 of its own. What the network knows of time, class and caption reaches every block
through a mapping network and `AdaRMSNorm`.

Glossary
    b  batch
    c  channels of the grid; in attention, channels per head
    h, w  height (frequency bins) and width (frames); of a stage, rows and columns of its tokens
    l  tokens of a stage, row by row: h * w
    d  width of a stage (dims)
    e  inner width of its scans (ssm_ratio * d)
    n  state size per channel (d_state)
    r  rank of the step-size projection
    k  directions of the scan
    m  width of the conditioning vector (mapping_width)
    s  stages
"""

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from nfhelpers.flow import check_unit_range, skip_weight
from nfhelpers.images import grid_coords
from nfhelpers.kernels import directional_scan
from nfhelpers.kernels.orders import grid_order
from nfhelpers.models.base import FieldModel, ModelConfig, run_layers
from nfhelpers.models.layers import mlp, sinusoidal_embedding
from nfhelpers.models.perceiver import RotaryCoordinates, relative_attention
from nfhelpers.models.ssm import initial_log_rates, initial_step_bias, start_as_identity

MIXERS = ("ssm", "attention")
SKIPS = ("concat", "lerp")
_FLIP = "_flip"

# ---------------------------------------------------------------------------------------------------- helpers


@functools.cache  # without a limit: CUDA graphs read them where they are
def _orders(height: int, width: int, directions: tuple[str, ...], device: torch.device) -> torch.Tensor:
    # What is kept must not depend on where it is asked for first.
    with torch.inference_mode(False), torch.device("cpu"):
        orders = [grid_order(height, width, kind.removesuffix(_FLIP)) for kind in directions]
        return torch.stack(orders).to(device)


def grid_orders(height: int, width: int, directions: tuple[str, ...], device: torch.device) -> torch.Tensor:
    """Orders in which the tokens of a grid are scanned -> (K, L) int64, computed once a size and device.

    A direction "x_flip" has the order of "x": `walks_backwards` says that it is walked from its end.
    """
    return _orders(height, width, directions, device)


def walks_backwards(directions: tuple[str, ...]) -> tuple[bool, ...]:
    """Which of the directions are walked backwards, one for each."""
    return tuple(kind.endswith(_FLIP) for kind in directions)


@functools.cache
def _coords(height: int, width: int, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False), torch.device("cpu"):
        return grid_coords(height, width)[None].to(device)


def token_coords(height: int, width: int, device: torch.device) -> torch.Tensor:
    """Centres of the tokens of a grid, (x, y) in [0, 1] -> (1, L, 2), computed once a size and device."""
    return _coords(height, width, device)


@torch.compiler.assume_constant_result  # of a graph, as its size is; torch 2.11 takes one such call a graph
def stage_places(
    height: int, width: int, stages: int, directions: tuple[str, ...] | None, device: torch.device
) -> tuple[torch.Tensor, ...]:
    """What the mixers take beside their grid, of each stage, each with half the side of the one before.

    Orders (K, L) of these directions or, for None, which is attention, centres of tokens (1, L, 2).
    """
    sizes = [(height >> stage, width >> stage) for stage in range(stages)]
    if directions is None:
        return tuple(token_coords(*size, device) for size in sizes)
    return tuple(grid_orders(*size, directions, device) for size in sizes)


def gather_patches(grid: torch.Tensor) -> torch.Tensor:
    """Patches of 2 x 2 tokens as one: (B, H, W, D) with even H, W -> (B, H/2, W/2, 4D)."""
    patches = grid.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # (B, H/2, 2, W/2, 2, D)
    return patches.transpose(2, 3).flatten(3)  # (B, H/2, W/2, 4D)


def spread_patches(grid: torch.Tensor) -> torch.Tensor:
    """The inverse of `gather_patches`: (B, H, W, 4D) -> (B, 2H, 2W, D)."""
    patches = grid.unflatten(3, (2, 2, -1)).transpose(2, 3)  # (B, H, 2, W, 2, D)
    return patches.flatten(3, 4).flatten(1, 2)  # (B, 2H, 2W, D)


def tag_mapping(module: nn.Module) -> nn.Module:
    """Mark a module's parameters as of the mapping network: `mapping_parameters` finds them again."""
    for parameter in module.parameters():
        parameter._mapping = True
    return module


def mapping_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of the mapping network and of the heads that it drives (`AdaRMSNorm`).

    They move everything at once: Hourglass (Crowson et al. 2024) trains them with a third of the learning
    rate of the others. Weight decay is a matter apart: matrices among them have it, biases and norms do not.
    """
    return [parameter for parameter in model.parameters() if getattr(parameter, "_mapping", False)]


def check_direction(kind: str) -> None:
    """Raise ValueError unless `kind` is a direction in which a grid can be scanned."""
    try:
        grid_order(1, 1, kind)
    except ValueError:
        raise ValueError(
            f"scan_directions has {kind!r}; legal are 'h', 'v' and 'w<N>' such as 'w7', each also with "
            f"'{_FLIP}', such as 'h{_FLIP}'"
        ) from None


# ----------------------------------------------------------------------------------------------------- layers


class MappingNetwork(nn.Module):
    """What is known of a sample, concatenated, to one conditioning vector (seed 000; Crowson et al. 2024)."""

    def __init__(self, parts: int, width: int, depth: int, dropout: float):
        super().__init__()
        self.in_proj = nn.Linear(parts * width, width)
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(depth))
        self.layers = nn.ModuleList(mlp(width, 2 * width, width, dropout) for _ in range(depth))
        self.out_norm = nn.RMSNorm(width)
        tag_mapping(self)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Features (B, parts * M) -> condition (B, M)."""
        condition = self.in_proj(features).to(self.out_norm.weight.dtype)  # (B, M)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            condition = condition + layer(norm(condition))  # (B, M)
        return self.out_norm(condition)


class AdaRMSNorm(nn.Module):
    """RMSNorm whose scale and shift are linear in the condition; a plain RMSNorm to begin with.

    Source: seed 000; Crowson et al., "Scalable High-Resolution Pixel-Space Image Synthesis with Hourglass
    Diffusion Transformers", 2024.
    """

    EPS = 1e-6

    def __init__(self, dim: int, mapping_width: int):
        super().__init__()
        self.head = nn.Linear(mapping_width, 2 * dim)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        tag_mapping(self)

    def forward(self, grid: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """Grid (B, H, W, D), condition (B, M) -> (B, H, W, D)."""
        scale, shift = self.head(condition)[:, None, None].chunk(2, dim=-1)  # (B, 1, 1, D) each
        return F.rms_norm(grid, grid.shape[-1:], eps=self.EPS) * (1 + scale) + shift  # (B, H, W, D)


class DropPath(nn.Module):
    """Leave a residual branch out of some samples while training (stochastic depth, Huang et al. 2016)."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, branch: torch.Tensor) -> torch.Tensor:
        """(B, ...) -> (B, ...), the expected value kept."""
        if not self.training or self.rate == 0:
            return branch
        kept = torch.rand(branch.shape[0], device=branch.device) >= self.rate  # (B,)
        weight = kept.to(branch.dtype) / (1 - self.rate)  # (B,)
        return branch * weight.view(-1, *[1] * (branch.ndim - 1))


class BiAttn(nn.Module):
    """Fuse the directions of a scan: each is weighed by channel, from its mean, and by place.

        y = sum over k of y_k * channel_k * place_k                 both weights in (0, 1)

    The weights depend on what a direction found; the maps that make them serve all directions. Source: Huang
    et al., "LocalMamba: Visual State Space Model with Windowed Selective Scan", 2024, section 3.3.
    """

    REDUCTION = 8

    def __init__(self, dim: int):
        super().__init__()
        hidden = max(dim // self.REDUCTION, 4)
        self.norm = nn.RMSNorm(dim)
        self.whole_proj = nn.Linear(dim, hidden)
        self.place_proj = nn.Linear(dim, hidden)
        self.channel_score = nn.Linear(hidden, dim)
        self.place_score = nn.Linear(hidden, 1)
        self.whole_score = nn.Linear(hidden, 1, bias=False)

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        """Directions (B, K, L, E) -> (B, L, E)."""
        seen = self.norm(y.to(self.norm.weight.dtype))  # (B, K, L, E)
        whole = F.gelu(self.whole_proj(seen.mean(2, keepdim=True)))  # (B, K, 1, hidden)
        place = self.place_score(F.gelu(self.place_proj(seen))) + self.whole_score(whole)  # (B, K, L, 1)
        return (y * self.channel_score(whole).sigmoid() * place.sigmoid()).sum(1)  # (B, L, E)


class SS2D(nn.Module):
    """The tokens of a grid scanned in several directions at once, and fused (seed 000).

        u, z = W_in grid          y_k = S6 of x in direction k
        x = silu(conv u)          result = W_out (norm(BiAttn(y_1 .. y_K)) * silu(z))

    Each direction has its own S6 (`SelectiveSSM`). Its delta, B and C are token-wise, so they are computed in
    the tokens' own order and `directional_scan` follows the orders: the numbers are those of K separate scans
    of permuted copies, of which there are none. Sources: Liu et al., "VMamba: Visual State Space Model",
    2024; Huang et al. 2024 for the windows.
    """

    def __init__(self, dim: int, d_state: int, ssm_ratio: float, directions: tuple[str, ...]):
        super().__init__()
        e, k = int(ssm_ratio * dim), len(directions)
        self.reverse = walks_backwards(directions)
        self.dt_rank = math.ceil(dim / 16)
        self.d_state = d_state
        self.in_proj = nn.Linear(dim, 2 * e, bias=False)
        self.conv = nn.Conv2d(e, e, 3, padding=1, groups=e)
        self.x_proj = nn.Linear(e, k * (self.dt_rank + 2 * d_state), bias=False)
        bound = self.dt_rank**-0.5
        self.dt_weight = nn.Parameter(torch.empty(k, e, self.dt_rank).uniform_(-bound, bound))
        self.dt_bias = nn.Parameter(initial_step_bias(k, e))  # (K, E)
        self.A_log = nn.Parameter(
            initial_log_rates(k, e, d_state=d_state, tied_decay=False).contiguous()
        )  # (K, E, N)
        self.D = nn.Parameter(torch.ones(k, e))  # (K, E)
        for parameter in (self.dt_bias, self.A_log, self.D):
            parameter._no_weight_decay = True  # a bias, a log rate and a skip weight, not matrices
        self.fusion = BiAttn(e)
        self.norm = nn.RMSNorm(e)
        self.out_proj = nn.Linear(e, dim, bias=False)

    def forward(self, grid: torch.Tensor, orders: torch.Tensor) -> torch.Tensor:
        """Mix the tokens of (B, H, W, D) along orders (K, L) -> (B, H, W, D)."""
        x, z = self.in_proj(grid).chunk(2, dim=-1)  # (B, H, W, E) each
        x = F.silu(self.conv(x.permute(0, 3, 1, 2)))  # (B, E, H, W)
        x = x.flatten(2).transpose(1, 2)  # (B, L, E)
        low, B, C = (
            self.x_proj(x)
            .unflatten(-1, (len(self.reverse), -1))  # (B, L, K, R+2N)
            .split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        )
        y = directional_scan(
            x,
            torch.einsum("blkr,ker->bkle", low, self.dt_weight),  # (B, K, L, E)
            -torch.exp(self.A_log.float()),  # (K, E, N)
            B.transpose(1, 2),  # (B, K, L, N)
            C.transpose(1, 2),
            self.D.float(),
            orders=orders,
            delta_bias=self.dt_bias.float(),
            reverse=self.reverse,
        )  # (B, K, L, E)
        fused = self.norm(self.fusion(y).to(self.norm.weight.dtype))  # (B, L, E), float32 under autocast
        return self.out_proj(fused.view_as(z) * F.silu(z))  # (B, H, W, D)


class GridAttention(nn.Module):
    """Attention among all tokens of a grid, the mixer of the twin: quadratic in their number.

    Queries, keys and values are turned by where their tokens lie (`RotaryCoordinates`), as a scan knows where
    it is.
    """

    def __init__(self, dim: int, head_dim: int):
        super().__init__()
        self.num_heads = dim // head_dim
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.rotary = RotaryCoordinates(self.num_heads, head_dim)
        self.out_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, grid: torch.Tensor, coords: torch.Tensor) -> torch.Tensor:
        """Mix the tokens of (B, H, W, D) at coords (1, L, 2) -> (B, H, W, D)."""
        qkv = self.to_qkv(grid).flatten(1, 2).unflatten(-1, (3, self.num_heads, -1))  # (B, L, 3, heads, C)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, L, C) each
        at = self.rotary(coords)
        y = relative_attention(q, k, v, at, at)  # (B, heads, L, C)
        return self.out_proj(y.transpose(1, 2).flatten(2).view_as(grid))  # (B, H, W, D)


class ConditionedVSSBlock(nn.Module):
    """A residual block of seed 000: a mixer of the grid, then a token-wise MLP, each after an AdaRMSNorm.

    Source: the VSS block of Liu et al. 2024, with the norm of Crowson et al. 2024.
    """

    def __init__(
        self,
        mixer: nn.Module,
        dim: int,
        mapping_width: int,
        mlp_ratio: float,
        dropout: float,
        drop_path: float,
    ):
        super().__init__()
        self.mixer_norm = AdaRMSNorm(dim, mapping_width)
        self.mixer = mixer
        self.mlp_norm = AdaRMSNorm(dim, mapping_width)
        self.mlp = mlp(dim, int(mlp_ratio * dim), dim, dropout)
        self.dropout = nn.Dropout(dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, grid: torch.Tensor, condition: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        """Grid (B, H, W, D), condition (B, M) -> (B, H, W, D); `where`: orders or coordinates."""
        mixed = self.mixer(self.mixer_norm(grid, condition), where)  # (B, H, W, D)
        grid = grid + self.drop_path(self.dropout(mixed))
        return grid + self.drop_path(self.dropout(self.mlp(self.mlp_norm(grid, condition))))


class TokenMerge(nn.Module):
    """Patches of 2 x 2 pixels as tokens (seed 000; Hourglass)."""

    def __init__(self, channels: int, dim: int):
        super().__init__()
        self.proj = nn.Linear(4 * channels, dim)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) with even H, W -> (B, H/2, W/2, D)."""
        return self.proj(gather_patches(pixels))


class PatchMerging2D(nn.Module):
    """The step down to the next stage: 2 x 2 tokens as one (seed 000; Liu et al. 2024)."""

    def __init__(self, dim: int, dim_below: int):
        super().__init__()
        self.norm = nn.RMSNorm(4 * dim)
        self.proj = nn.Linear(4 * dim, dim_below, bias=False)

    def forward(self, grid: torch.Tensor) -> torch.Tensor:
        """(B, H, W, D) with even H, W -> (B, H/2, W/2, D below)."""
        return self.proj(self.norm(gather_patches(grid)))


class TokenSplit(nn.Module):
    """The step up: a token as 2 x 2, joined with what the stage there made on the way down (seed 000).

    skip "concat": both are concatenated and projected. skip "lerp": they are mixed, with one weight that is
    learned (Hourglass).
    """

    def __init__(self, dim_below: int, dim: int, skip: str):
        super().__init__()
        self.proj = nn.Linear(dim_below, 4 * dim, bias=False)
        self.skip = skip
        if skip == "concat":
            self.fuse = nn.Linear(2 * dim, dim)
        else:
            self.weight = nn.Parameter(torch.full((1,), 0.5))  # of what comes from below

    def forward(self, grid: torch.Tensor, cached: torch.Tensor) -> torch.Tensor:
        """Grid (B, H, W, D below), skip (B, 2H, 2W, D) -> (B, 2H, 2W, D)."""
        grid = spread_patches(self.proj(grid))  # (B, 2H, 2W, D)
        if self.skip == "concat":
            return self.fuse(torch.cat([grid, cached], dim=-1))
        return cached + self.weight * (grid - cached)


# ----------------------------------------------------------------------------------------------------- config


@dataclass(frozen=True)
class LocalMamba2DConfig(ModelConfig):
    """Settings of `LocalMamba2D`; the defaults are those of seed 000's baseline.

    `channels` are those of the grid. `dims` and `depths` have an entry for each stage, from the finest down;
    the way up has as many blocks as the way down. `ssm_ratio` and `mlp_ratio` times a stage's width are the
    widths inside its scans and MLPs. `scan_directions`: "h", "v", "w<N>", each with "_flip" or without.
    `mixer` "attention" replaces the scans, with heads of `head_dim` channels (which then divides every entry
    of `dims`, and is not used otherwise). `skip`: "concat" or "lerp" (`TokenSplit`). `num_classes` and
    `caption_dim` 0 mean no such condition; `cfg_dropout` is the share of training samples whose condition
    `grid_flow_loss` drops. `drop_path` is the rate of the last block; it rises linearly from 0 at the first.
    `data_std` is the root mean square of the data, on the scale of values in [-1, 1].
    """

    channels: int = 1
    dims: tuple[int, ...] = (96, 192, 384, 768)
    depths: tuple[int, ...] = (2, 2, 7, 2)
    d_state: int = 16
    ssm_ratio: float = 2.0
    mlp_ratio: float = 4.0
    scan_directions: tuple[str, ...] = ("h", "v", "w7")
    mixer: str = "ssm"
    head_dim: int = 32
    skip: str = "concat"
    mapping_width: int = 256
    mapping_depth: int = 2
    num_classes: int = 0
    caption_dim: int = 0
    cfg_dropout: float = 0.1
    dropout: float = 0.1
    drop_path: float = 0.0
    data_std: float = 0.5
    model_type: ClassVar[str] = "localmamba"

    def __post_init__(self):
        self.lists_to_tuples("dims", "depths", "scan_directions")
        self.check_positive("channels", "d_state", "ssm_ratio", "mlp_ratio", "head_dim", "data_std")
        self.check_positive("mapping_width", "mapping_depth")
        self.check_stages()
        self.check_directions()
        self.check_dropout()
        for name in ("cfg_dropout", "drop_path"):
            rate = getattr(self, name)
            if isinstance(rate, bool) or not isinstance(rate, float | int) or not 0 <= rate < 1:
                raise ValueError(f"{name}={rate!r} is outside [0, 1); try 0.1")
        for name in ("num_classes", "caption_dim"):
            count = getattr(self, name)
            if isinstance(count, bool) or not isinstance(count, int) or count < 0:
                raise ValueError(f"{name}={count!r} is not a whole number of at least 0; 0 means none")
        for name, legal in (("mixer", MIXERS), ("skip", SKIPS)):
            if getattr(self, name) not in legal:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose one of {legal}")
        if self.mapping_width % 2:
            raise ValueError(f"mapping_width={self.mapping_width} must be even; try 256")
        if self.mixer == "attention" and any(dim % self.head_dim for dim in self.dims):
            raise ValueError(
                f"dims={self.dims} must be divisible by head_dim={self.head_dim}; try head_dim=32 and dims "
                "that are multiples of it"
            )

    def check_stages(self) -> None:
        """`dims` and `depths`: positive whole numbers, one of each for a stage."""
        for name in ("dims", "depths"):
            values = getattr(self, name)
            whole = isinstance(values, tuple) and all(
                isinstance(value, int) and not isinstance(value, bool) and value > 0 for value in values
            )
            if not whole or not values:
                raise ValueError(
                    f"{name}={values!r} is not a sequence of positive whole numbers, one a stage; pass "
                    "dims=(96, 192, 384, 768), depths=(2, 2, 7, 2)"
                )
        if len(self.dims) != len(self.depths):
            raise ValueError(
                f"dims={self.dims} has {len(self.dims)} stages and depths={self.depths} has "
                f"{len(self.depths)}; pass as many of one as of the other"
            )
        for name in ("ssm_ratio", "mlp_ratio"):
            if int(getattr(self, name) * min(self.dims)) < 1:
                raise ValueError(
                    f"{name}={getattr(self, name)} leaves nothing of a width of {min(self.dims)}; try 2.0"
                )

    def check_directions(self) -> None:
        """`scan_directions`: at least one, legal, each named once."""
        kinds = self.scan_directions
        if not isinstance(kinds, tuple) or not kinds:
            raise ValueError(
                f"scan_directions={kinds!r} is not a sequence of directions; pass ('h', 'v', 'w7')"
            )
        for kind in kinds:
            check_direction(kind)
        if len(set(kinds)) < len(kinds):
            raise ValueError(f"scan_directions={kinds} names one twice; pass ('h', 'v', 'w7')")


# ------------------------------------------------------------------------------------------------------ model


class LocalMamba2D(FieldModel):
    """Velocity field over grids, conditioned on time, class and caption (seed 000).

    Grids of any height and width are padded with zeros to multiples of 2^S, at the bottom and on the right,
    and the result is cropped. The network predicts what is left of the velocity after its linear part in x
    (`flow.skip_weight`), and starts at zero.

    A condition that is dropped is exactly zero in place of its embedding, so an unconditional velocity does
    not depend on label and caption.

    Sources: Huang et al., "LocalMamba: Visual State Space Model with Windowed Selective Scan", 2024; Liu et
    al., "VMamba: Visual State Space Model", 2024; Crowson et al., "Scalable High-Resolution Pixel-Space Image
    Synthesis with Hourglass Diffusion Transformers", 2024.
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
        stacks = [self._stack(stage, [next(rates) for _ in range(config.depths[stage])]) for stage in way]
        self.down = nn.ModuleList(stacks[:stages])
        self.up = nn.ModuleList(stacks[stages:])
        self.mergings = nn.ModuleList(PatchMerging2D(dims[s], dims[s + 1]) for s in range(stages - 1))
        self.bottleneck_norm = nn.RMSNorm(dims[-1])
        self.bottleneck_conv = nn.Conv2d(dims[-1], dims[-1], 3, padding=1)
        self.splits = nn.ModuleList(
            TokenSplit(dims[s + 1], dims[s], config.skip) for s in reversed(range(stages - 1))
        )
        self.out_norm = nn.RMSNorm(dims[0])
        self.out_proj = nn.Linear(dims[0], 4 * config.channels)
        nn.init.zeros_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def _stack(self, stage: int, rates: list[float]) -> nn.ModuleList:
        config = self.config
        dim = config.dims[stage]

        def mixer():
            if config.mixer == "attention":
                return GridAttention(dim, config.head_dim)
            return SS2D(dim, config.d_state, config.ssm_ratio, config.scan_directions)

        return start_as_identity(
            nn.ModuleList(
                ConditionedVSSBlock(
                    mixer(), dim, config.mapping_width, config.mlp_ratio, config.dropout, rate
                )
                for rate in rates
            )
        )

    def forward(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        labels: torch.Tensor | None = None,
        captions: torch.Tensor | None = None,
        drop: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Velocity of the flow at x.

        Args:
            x: (B, C, H, W), x_t, values in about [-1, 1]; any H and W of at least 1.
            t: (B,) in [0, 1]; 0 is noise, 1 is data.
            labels: (B,) int64 in 0 ... num_classes - 1; needed if the model has classes.
            captions: (B, caption_dim) floating, embedding vectors; needed if the model takes captions.
            drop: (B,) bool, samples whose labels and captions are not looked at; None: no one.

        Returns:
            (B, C, H, W).

        Raises:
            ValueError: shapes or dtypes that do not fit, a condition that is missing or that the model does
                not take and, on the CPU, t outside [0, 1] or a label outside the classes.
        """
        self.check_arguments(x, t, labels, captions, drop)
        height, width = x.shape[2:]
        multiple = 2 ** len(self.config.dims)
        pixels = x.permute(0, 2, 3, 1).to(self.out_proj.weight.dtype)  # (B, H, W, C)
        pixels = F.pad(pixels, (0, 0, 0, -width % multiple, 0, -height % multiple))  # (B, H', W', C)
        condition = self._condition(t, labels, captions, drop)  # (B, M)
        residual = self._network(pixels, condition)[:, :height, :width]  # (B, H, W, C)
        linear = skip_weight(t, self.config.data_std)[:, None, None, None] * x  # (B, C, H, W)
        return residual.permute(0, 3, 1, 2) + linear

    def _network(self, pixels: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """Pixels (B, H, W, C), condition (B, M) -> (B, H, W, C); H, W multiples of 2^S."""
        dtype = self.out_proj.weight.dtype  # of the residual stream, float32 under autocast
        grid = self.token_merge(pixels).to(dtype)  # (B, H/2, W/2, D)
        directions = None if self.config.mixer == "attention" else self.config.scan_directions
        places = stage_places(*grid.shape[1:3], len(self.down), directions, grid.device)
        cached = []
        for stage, blocks in enumerate(self.down):
            if stage > 0:
                cached.append(grid)
                grid = self.mergings[stage - 1](grid).to(dtype)  # (B, H/2, W/2, D below)
            grid = run_layers(blocks, grid, condition, places[stage], recompute=self.recompute)
        grid = self.bottleneck_norm(grid)
        grid = self.bottleneck_conv(grid.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).to(dtype)
        for stage, split, blocks in zip(reversed(range(len(cached))), self.splits, self.up, strict=True):
            grid = split(grid, cached[stage]).to(dtype)  # (B, 2H, 2W, D)
            grid = run_layers(blocks, grid, condition, places[stage], recompute=self.recompute)
        return spread_patches(self.out_proj(self.out_norm(grid)))  # (B, H, W, C)

    def _condition(
        self,
        t: torch.Tensor,
        labels: torch.Tensor | None,
        captions: torch.Tensor | None,
        drop: torch.Tensor | None,
    ) -> torch.Tensor:
        """Conditioning vector (B, M)."""
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

    def check_arguments(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        labels: torch.Tensor | None = None,
        captions: torch.Tensor | None = None,
        drop: torch.Tensor | None = None,
    ) -> None:
        """Raise ValueError unless `forward` takes these arguments."""
        channels, classes, width = self.config.channels, self.config.num_classes, self.config.caption_dim
        if x.ndim != 4 or x.shape[1] != channels or 0 in x.shape:
            raise ValueError(
                f"x has shape {tuple(x.shape)}; this model has {channels} channels, pass "
                f"(B, {channels}, H, W) such as (8, {channels}, 64, 64), not empty"
            )
        batch = x.shape[0]
        for name, tensor, shape in (("t", t, (batch,)), ("captions", captions, (batch, width))):
            if name == "captions" and (tensor is None or not width):
                continue
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}; x asks for {shape}")
        for name, tensor in (("x", x), ("t", t), ("captions", captions)):
            if tensor is not None and not tensor.is_floating_point():
                raise ValueError(
                    f"{name} has dtype {tensor.dtype}; pass floating point such as torch.float32"
                )
        for name, tensor, size, option in (
            ("labels", labels, classes, "num_classes"),
            ("captions", captions, width, "caption_dim"),
        ):
            if size and tensor is None:
                example = f"(B,) int64 in 0 ... {classes - 1}" if name == "labels" else f"(B, {width})"
                raise ValueError(
                    f"this model has {option}={size} and got no {name}; pass {name} {example}, with "
                    "drop=True where the velocity shall not depend on them"
                )
            if tensor is not None and not size:
                raise ValueError(f"this model has {option}=0 and takes no {name}; leave them out")
        for name, tensor, dtype in (("labels", labels, torch.int64), ("drop", drop, torch.bool)):
            if tensor is not None and (tensor.dtype != dtype or tuple(tensor.shape) != (batch,)):
                raise ValueError(
                    f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}; pass {dtype} ({batch},)"
                )
        check_unit_range("t", t, "times from noise, 0, to data, 1,")
        if labels is not None and labels.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = (bound.item() for bound in labels.aminmax())
            if low < 0 or high >= classes:
                raise ValueError(
                    f"labels has class {low if low < 0 else high}; this model has {classes} classes, pass 0 "
                    f"... {classes - 1}"
                )


def batch_keys(config: LocalMamba2DConfig) -> tuple[str, ...]:
    """What a batch must hold for a model of this config: spectrograms and the conditions it takes."""
    taken = (("labels", config.num_classes), ("captions", config.caption_dim))
    return "spectrograms", *(name for name, size in taken if size)
