"""Velocity fields that reconstruct an image from sparse pixels.

Glossary
    b  batch
    q  query points, where the field is wanted
    i  observed (input) points, where the field is known
    l  tokens of the sequence, i then q
    d  model width (d_model)
    f  random Fourier frequencies
    k  nearest observed points a query attends to
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from nfhelpers.flow import check_unit_range, skip_weight
from nfhelpers.kernels.orders import POINT_ORDERS, inverse_order, point_order
from nfhelpers.models.base import FieldModel, ModelConfig
from nfhelpers.models.layers import FourierFeatures, PointEmbedding, TimeEmbedding, mlp, squared_distances
from nfhelpers.models.perceiver import CrossAttention
from nfhelpers.models.ssm import MambaBlock

# ---------------------------------------------------------------------------------------------------- helpers


def check_shapes(
    noisy_values: torch.Tensor,
    query_coords: torch.Tensor,
    t: torch.Tensor,
    input_coords: torch.Tensor,
    input_values: torch.Tensor,
) -> None:
    """Raise ValueError unless the five arguments of a velocity field fit together.

    Shapes and dtypes; that t and the coordinates are in [0, 1] only where they are on the CPU, so that no
    value is read back from a GPU. The samplers check ranges on any device, once per call.
    """
    legal = (
        "pass noisy_values (B, Nq, 3), query_coords (B, Nq, 2), t (B,), input_coords (B, Ni, 2), "
        "input_values (B, Ni, 3)"
    )
    named = (
        ("noisy_values", noisy_values, 3, (3,)),
        ("query_coords", query_coords, 3, (2,)),
        ("t", t, 1, ()),
        ("input_coords", input_coords, 3, (2,)),
        ("input_values", input_values, 3, (3,)),
    )
    for name, tensor, rank, channels in named:
        shape = tuple(tensor.shape)
        if len(shape) != rank or shape[2:] != channels:
            raise ValueError(f"{name} has shape {shape}; {legal}")
        if not tensor.is_floating_point():
            raise ValueError(
                f"{name} has dtype {tensor.dtype}; pass a floating-point tensor such as torch.float32"
            )
        if 0 in shape:
            raise ValueError(
                f"{name} is empty, shape {shape}; pass at least one sample, query and observed point"
            )
        if shape[0] != noisy_values.shape[0]:
            raise ValueError(
                f"{name} has a batch of {shape[0]} and noisy_values of {noisy_values.shape[0]}; {legal}"
            )
    if query_coords.shape[1] != noisy_values.shape[1]:
        raise ValueError(
            f"query_coords has {query_coords.shape[1]} points and noisy_values {noisy_values.shape[1]}; "
            f"{legal}"
        )
    if input_coords.shape[1] != input_values.shape[1]:
        raise ValueError(
            f"input_coords has {input_coords.shape[1]} points and input_values {input_values.shape[1]}; "
            f"{legal}"
        )
    check_unit_range("t", t, "times from noise, 0, to data, 1,")
    for name, coords in (("query_coords", query_coords), ("input_coords", input_coords)):
        check_unit_range(name, coords, "pixel centres (x, y)")


def residual_decoder(d: int, dropout: float) -> nn.Sequential:
    """Tokens (B, Q, D) -> what a velocity (B, Q, 3) adds to its linear part in x_t; zero to begin with."""
    decoder = nn.Sequential(nn.RMSNorm(d), mlp(d, 2 * d, d, dropout), nn.GELU(), nn.Linear(d, 3))
    nn.init.zeros_(decoder[-1].weight)
    nn.init.zeros_(decoder[-1].bias)
    return decoder


def gather_tokens(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Pick tokens of (B, L, D) by index (B, M) -> (B, M, D)."""
    return x.gather(1, order[..., None].expand(-1, -1, x.shape[-1]))


# ----------------------------------------------------------------------------------------------------- config


@dataclass(frozen=True)
class MambaDiffusionConfig(ModelConfig):
    """Settings of `MambaDiffusion`; the defaults are seed 002's.

    `order` is the scan order within the observed points and within the queries
    (`kernels.orders.point_order`); `tied_decay` ties the N decays of a channel (`SelectiveSSM`).
    """

    d_model: int = 512
    num_layers: int = 6
    d_state: int = 16
    expand: int = 2
    num_fourier_features: int = 256
    fourier_scale: float = 10.0
    num_heads: int = 8
    mlp_ratio: float = 2.0
    dropout: float = 0.0
    order: str = "row"
    tied_decay: bool = False
    model_type: ClassVar[str] = "v1"

    def __post_init__(self):
        self.check_flag("tied_decay")
        if self.order not in POINT_ORDERS:
            raise ValueError(f"order={self.order!r} is not an order of points; choose one of {POINT_ORDERS}")
        self.check_positive("d_model", "num_layers", "d_state", "expand", "num_fourier_features", "num_heads")
        self.check_positive("fourier_scale", "mlp_ratio")
        self.check_heads()
        self.check_dropout()


@dataclass(frozen=True)
class LocalImplicitFieldConfig(ModelConfig):
    """Settings of `LocalImplicitField`: `neighbours` is how many observed pixels a query attends to."""

    d_model: int = 256
    neighbours: int = 16
    num_layers: int = 2
    num_fourier_features: int = 64
    fourier_scale: float = 4.0
    num_heads: int = 8
    mlp_ratio: float = 2.0
    dropout: float = 0.0
    model_type: ClassVar[str] = "local"

    def __post_init__(self):
        self.check_positive("d_model", "neighbours", "num_layers", "num_fourier_features", "num_heads")
        self.check_positive("fourier_scale", "mlp_ratio")
        self.check_heads()
        self.check_dropout()


# ----------------------------------------------------------------------------------------------------- models


class MambaDiffusion(FieldModel):
    """v1: one selective scan over observed points, then queries, and one cross-attention (seed 002).

    Both point sets are scanned in `config.order`, whatever order they come in, so the result does not depend
    on how a caller lists the points. The decoder predicts what is left of the velocity after its linear part
    in `noisy_values` (`flow.skip_weight`): at t = 0 the noise cancels exactly, and one step from any noise is
    an estimate of the posterior mean.
    """

    def __init__(self, config: MambaDiffusionConfig):
        super().__init__()
        self.config = config
        d = config.d_model
        self.fourier = FourierFeatures(config.num_fourier_features, config.fourier_scale)
        self.input_embedding = PointEmbedding(2 * config.num_fourier_features, d)
        self.query_embedding = PointEmbedding(2 * config.num_fourier_features, d)
        self.time = TimeEmbedding(d)
        self.blocks = nn.ModuleList(
            MambaBlock(d, config.d_state, config.expand, config.tied_decay, config.mlp_ratio, config.dropout)
            for _ in range(config.num_layers)
        )
        self.cross_attention = CrossAttention(d, config.num_heads, config.dropout)
        self.decoder = residual_decoder(d, config.dropout)

    def forward(
        self,
        noisy_values: torch.Tensor,
        query_coords: torch.Tensor,
        t: torch.Tensor,
        input_coords: torch.Tensor,
        input_values: torch.Tensor,
    ) -> torch.Tensor:
        """Velocity of the field at the query points.

        noisy_values (B, Nq, 3) is x_t, values in about [-1, 1]; query_coords (B, Nq, 2) and input_coords
        (B, Ni, 2) are (x, y) in [0, 1]; t (B,) in [0, 1], 0 is noise; input_values (B, Ni, 3) in [-1, 1].
        Returns (B, Nq, 3). Raises ValueError when the shapes or dtypes do not fit and, on the CPU, when t or
        coordinates are outside [0, 1].
        """
        check_shapes(noisy_values, query_coords, t, input_coords, input_values)
        input_order = point_order(input_coords, self.config.order)  # (B, I)
        query_order = point_order(query_coords, self.config.order)  # (B, Q)
        input_coords, input_values = (gather_tokens(x, input_order) for x in (input_coords, input_values))
        query_coords, sorted_values = (gather_tokens(x, query_order) for x in (query_coords, noisy_values))

        time = self.time(t)[:, None]  # (B, 1, D)
        inputs = self.input_embedding(self.fourier(input_coords), input_values)  # (B, I, D)
        queries = self.query_embedding(self.fourier(query_coords), sorted_values)  # (B, Q, D)
        tokens = torch.cat([inputs, queries], dim=1) + time  # (B, L, D)
        tokens = tokens.to(self.decoder[-1].weight.dtype)  # the residual stream stays float32 under autocast
        tokens = self.run_layers(self.blocks, tokens)  # (B, L, D)
        inputs, queries = tokens.split([input_coords.shape[1], query_coords.shape[1]], dim=1)
        queries = queries + self.cross_attention(queries, query_coords, inputs, input_coords)  # (B, Q, D)
        residual = gather_tokens(self.decoder(queries), inverse_order(query_order))  # (B, Q, 3)
        return residual + skip_weight(t)[:, None, None] * noisy_values  # (B, Q, 3)


class LocalImplicitField(FieldModel):
    """The baseline without a state space: every query attends to its nearest observed pixels only.

    A local implicit field in the manner of LIIF (Chen et al. 2021), with attention for its fixed neighbour
    ensemble. Time and memory of the search are O(Nq * Ni). Queries do not see one another.
    """

    def __init__(self, config: LocalImplicitFieldConfig):
        super().__init__()
        self.config = config
        d = config.d_model
        self.fourier = FourierFeatures(config.num_fourier_features, config.fourier_scale)
        self.neighbour_embedding = PointEmbedding(2 * config.num_fourier_features, d)
        self.query_proj = nn.Linear(3, d)
        self.time = TimeEmbedding(d)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                d,
                config.num_heads,
                int(config.mlp_ratio * d),
                config.dropout,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(config.num_layers)
        )
        self.decoder = residual_decoder(d, config.dropout)

    def forward(
        self,
        noisy_values: torch.Tensor,
        query_coords: torch.Tensor,
        t: torch.Tensor,
        input_coords: torch.Tensor,
        input_values: torch.Tensor,
    ) -> torch.Tensor:
        """Velocity of the field at the query points; arguments and errors as in `MambaDiffusion.forward`."""
        check_shapes(noisy_values, query_coords, t, input_coords, input_values)
        batch, num_queries = query_coords.shape[:2]
        k = min(self.config.neighbours, input_coords.shape[1])
        # On a grid many points are equally near: which are the k nearest is well defined only in a canonical
        # order, and by distances without the rounding of a matrix product.
        order = point_order(input_coords, "row")  # (B, I)
        input_coords, input_values = (gather_tokens(x, order) for x in (input_coords, input_values))
        distance = squared_distances(query_coords, input_coords)  # (B, Q, I)
        nearest = distance.topk(k, largest=False).indices.flatten(1)  # (B, Q*K)
        coords = gather_tokens(input_coords, nearest).unflatten(1, (num_queries, k))  # (B, Q, K, 2)
        values = gather_tokens(input_values, nearest).unflatten(1, (num_queries, k))  # (B, Q, K, 3)
        offsets = coords - query_coords[:, :, None]  # (B, Q, K, 2)

        features = self.fourier(offsets.flatten(1, 2))  # (B, Q*K, 2F)
        neighbours = self.neighbour_embedding(features, values.flatten(1, 2))  # (B, Q*K, D)
        neighbours = neighbours.unflatten(1, (num_queries, k))  # (B, Q, K, D)
        query = self.query_proj(noisy_values) + self.time(t)[:, None]  # (B, Q, D)
        tokens = torch.cat([query[:, :, None], neighbours], dim=2).flatten(0, 1)  # (B*Q, 1+K, D)
        tokens = tokens.to(self.decoder[-1].weight.dtype)  # the residual stream stays float32 under autocast
        tokens = self.run_layers(self.layers, tokens)  # (B*Q, 1+K, D)
        residual = self.decoder(tokens[:, 0]).unflatten(0, (batch, num_queries))  # (B, Q, 3)
        return residual + skip_weight(t)[:, None, None] * noisy_values  # (B, Q, 3)
