"""Velocity fields that reconstruct an image from sparse pixels."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from nfhelpers.flow import check_unit_range, loss_weight, skip_weight
from nfhelpers.kernels.orders import inverse_order, point_order
from nfhelpers.models.base import FieldModel, ModelConfig
from nfhelpers.models.layers import FourierFeatures, PointEmbedding, TimeEmbedding, decoder, gather_tokens
from nfhelpers.models.perceiver import CrossAttention, LightweightPerceiver
from nfhelpers.models.ssm import BidirectionalMamba, MambaBlock, MultiDirectionalSSM, ResidualBlock, stack

POSTERIOR_STD = 0.15  # of a pixel, in values of [-1, 1], given 20% of the others: for `flow.loss_weight`


def check_points(t, *fields):
    """Raise ValueError for t or coordinates outside [0, 1] on the CPU, and for values of other points."""
    if t is not None:
        check_unit_range("t", t, "times")
    for coords, values in fields:
        check_unit_range("coordinates", coords, "pixel centres (x, y)")
        if values is not None and coords.shape[:2] != values.shape[:2]:  # sorting would drop some silently
            raise ValueError(f"coordinates {tuple(coords.shape)} and values {tuple(values.shape)} differ")


def split_tokens(tokens, num_inputs):
    """Tokens (B, L, D) -> inputs (B, I, D), queries (B, Q, D)."""
    return tokens.split([num_inputs, tokens.shape[1] - num_inputs], dim=1)


@dataclass(frozen=True, kw_only=True)
class FieldConfig(ModelConfig):
    """Settings that all models of sparse fields have."""

    d_model: int = 512  # width of the tokens
    num_fourier_features: int = 256
    fourier_scale: float = 10.0  # of their random frequencies, in cycles per image side
    mlp_ratio: float = 2.0  # times d_model: inner width of a block's MLP
    dropout: float = 0.0
    d_state: int = 16  # states a channel
    expand: int = 2  # times d_model: width inside a scan
    tied_decay: bool = True  # see `SelectiveSSM`


@dataclass(frozen=True, kw_only=True)
class MambaDiffusionConfig(FieldConfig):
    """Settings of `MambaDiffusion`, v1; `order` sorts the observed points, and the queries after them."""

    num_layers: int = 6
    num_heads: int = 8
    order: str = "row"
    model_type: ClassVar[str] = "v1"


@dataclass(frozen=True, kw_only=True)
class MultiDirectionalMambaDiffusionConfig(FieldConfig):
    """Settings of `MultiDirectionalMambaDiffusion`."""

    orders: tuple[str, ...] = ("row", "column", "diagonal", "antidiagonal")
    bands: int = 32  # lines to a side that the orders follow: rows of the fields that it is trained on
    shared_weights: bool = False  # one S6 and a linear fusion, in place of one S6 an order and an MLP
    num_layers: int = 6
    num_heads: int = 8
    mlp_ratio: float = 4.0
    model_type: ClassVar[str] = "multidir"


@dataclass(frozen=True, kw_only=True)
class MambaDiffusionV2Config(MambaDiffusionConfig):
    """Settings of `MambaDiffusionV2`; `num_layers` counts both stacks, half of it each."""

    d_model: int = 256
    num_layers: int = 8
    perceiver_iterations: int = 2
    model_type: ClassVar[str] = "v2"

    def __post_init__(self):
        super().__post_init__()
        if self.num_layers % 2:
            raise ValueError(f"num_layers={self.num_layers} is odd: half reads forwards, half backwards")


class Conditions(NamedTuple):
    """What a `TokenField` computes from the points alone: the same at all times of a sampling run."""

    input_coords: torch.Tensor  # (B, I, 2), sorted
    query_coords: torch.Tensor  # (B, Q, 2), sorted
    inputs: torch.Tensor  # (B, I, D), their tokens
    queries: torch.Tensor  # (B, Q, D), their tokens without values
    order: torch.Tensor  # (B, Q), in which the queries are sorted
    back: torch.Tensor  # (B, Q), its inverse
    scans: torch.Tensor | None = None  # (B, O, L), orders of the scans
    places: list | None = None  # of `LightweightPerceiver`


class SparseField(FieldModel):
    """Base of the velocity fields over sparse pixels. Subclasses `prepare` points, then give `velocity`."""

    def forward(self, noisy_values, query_coords, t, input_coords, input_values, conditions=None):
        """Velocity (B, Nq, 3) of the field at the query points.

        noisy_values (B, Nq, 3): x_t, in about [-1, 1]; query_coords (B, Nq, 2), input_coords (B, Ni, 2): (x,
        y) in [0, 1]; t (B,): 0 is noise; input_values (B, Ni, 3) in [-1, 1]. conditions: of `prepare`.
        """
        check_points(t, (query_coords, noisy_values), (input_coords, input_values))
        if conditions is None:
            conditions = self.prepare(query_coords, input_coords, input_values)
        return self.velocity(noisy_values, t, conditions)  # (B, Q, 3)

    def loss_weight(self, t):
        return loss_weight(t, POSTERIOR_STD)


class TokenField(SparseField):
    """Base of the velocity fields that see observed points and queries as the tokens of one sequence.

    Both point sets are sorted: the result does not depend on how they are listed. Subclasses define `blocks`,
    `cross_attention` and `decoder`, or their own `mix`. They predict what is left of the velocity after its
    linear part in x_t (`flow.skip_weight`): at t = 0 the noise cancels, and one step is the posterior mean.
    """

    mixes_queries = True  # an answer depends on how dense the other queries are: see `evaluate.reconstruct`

    def __init__(self, config: FieldConfig, order="row"):
        super().__init__()
        self.config = config
        self.order = order
        d = config.d_model
        self.fourier = FourierFeatures(config.num_fourier_features, config.fourier_scale)
        self.input_embedding = PointEmbedding(2 * config.num_fourier_features, d)
        self.query_embedding = PointEmbedding(2 * config.num_fourier_features, d)
        self.time = TimeEmbedding(d)

    def prepare(self, query_coords, input_coords, input_values):
        input_order = point_order(input_coords, self.order)  # (B, I)
        query_order = point_order(query_coords, self.order)  # (B, Q)
        input_coords, input_values = (gather_tokens(x, input_order) for x in (input_coords, input_values))
        query_coords = gather_tokens(query_coords, query_order)
        inputs = self.input_embedding(self.fourier(input_coords), input_values)  # (B, I, D)
        queries = self.query_embedding.place(self.fourier(query_coords))  # (B, Q, D)
        back = inverse_order(query_order)  # (B, Q)
        return Conditions(input_coords, query_coords, inputs, queries, query_order, back)

    def velocity(self, noisy_values, t, c):
        queries = c.queries + self.query_embedding.value_proj(gather_tokens(noisy_values, c.order))
        tokens = torch.cat([c.inputs, queries], dim=1) + self.time(t)[:, None]  # (B, L, D)
        tokens = tokens.to(self.decoder[-1].weight.dtype)  # the residual stream stays float32 under autocast
        network = gather_tokens(self.decoder(self.mix(tokens, c)), c.back)  # (B, Q, 3)
        return network + skip_weight(t)[:, None, None] * noisy_values

    def mix(self, tokens, c):
        """Tokens (B, L, D) of the inputs, then of the queries -> queries (B, Q, D)."""
        tokens = self.blocks(tokens) if c.scans is None else self.blocks(tokens, c.scans)  # (B, L, D)
        inputs, queries = split_tokens(tokens, c.inputs.shape[1])
        return queries + self.cross_attention(queries, c.query_coords, inputs, c.input_coords)  # (B, Q, D)


class MambaDiffusion(TokenField):
    """v1: a selective scan over the observed points, then the queries, and one cross-attention."""

    launch_bound = True

    def __init__(self, config: MambaDiffusionConfig):
        super().__init__(config, config.order)
        c = config
        block = (c.d_model, c.d_state, c.expand, c.tied_decay, c.mlp_ratio, c.dropout)
        self.blocks = stack(MambaBlock(*block) for _ in range(c.num_layers))
        self.cross_attention = CrossAttention(c.d_model, c.num_heads, c.dropout)
        self.decoder = decoder(c.d_model, c.dropout)


class MultiDirectionalMambaDiffusion(TokenField):
    """v1 with scans in several directions of the plane, over observed points and queries jointly.

    In every direction a query follows the observed points that lie before it, where v1 has all of them far
    back in its sequence. The walk is along bands, the rows of the training fields: along exact lines observed
    points would stand apart from queries that are a quarter of a pixel off. All blocks share the orders.
    """

    def __init__(self, config: MultiDirectionalMambaDiffusionConfig):
        super().__init__(config)
        c = config
        scan = (c.d_model, c.d_state, c.expand, len(c.orders), c.shared_weights, False, c.tied_decay)
        mixers = (MultiDirectionalSSM(*scan, c.dropout) for _ in range(c.num_layers))
        self.blocks = stack(ResidualBlock(mixer, c.d_model, c.mlp_ratio, c.dropout) for mixer in mixers)
        self.cross_attention = CrossAttention(c.d_model, c.num_heads, c.dropout)
        self.decoder = decoder(c.d_model, c.dropout)

    def prepare(self, *points):
        c = super().prepare(*points)
        coords = torch.cat([c.input_coords, c.query_coords], dim=1)  # (B, L, 2)
        scans = [point_order(coords, kind, self.config.bands) for kind in self.config.orders]
        return c._replace(scans=torch.stack(scans, dim=1))


class MambaDiffusionV2(TokenField):
    """V2: a scan both ways over the observed points, then the queries, and a perceiver."""

    launch_bound = True

    def __init__(self, config: MambaDiffusionV2Config):
        super().__init__(config, config.order)
        c = config
        self.bidirectional = BidirectionalMamba(
            c.d_model, c.num_layers, c.d_state, c.expand, c.tied_decay, c.mlp_ratio, c.dropout
        )
        self.perceiver = LightweightPerceiver(
            c.d_model, c.num_heads, c.perceiver_iterations, c.mlp_ratio, c.dropout
        )
        self.decoder = decoder(c.d_model, c.dropout)

    def prepare(self, *points):
        c = super().prepare(*points)
        return c._replace(places=self.perceiver.places(c.query_coords, c.input_coords))

    def mix(self, tokens, c):
        tokens = self.bidirectional(tokens)  # (B, L, D)
        inputs, queries = split_tokens(tokens, c.inputs.shape[1])
        return self.perceiver(queries, c.query_coords, inputs, c.input_coords, c.places)  # (B, Q, D)


def initialise_from_v1(model: FieldModel, v1: MambaDiffusion) -> list[str]:
    """Start a model from the weights it shares with a trained v1 by name and shape; returns their names.

    The decoder's last layer stays at zero, so that the model still starts as its linear prediction.
    """
    source, own = v1.state_dict(), model.state_dict()
    last = f"decoder.{len(v1.decoder) - 1}."
    names = [name for name, x in own.items() if name in source and source[name].shape == x.shape]
    copied = [name for name in names if not name.startswith(last)]
    if "input_embedding.value_proj.weight" not in copied:
        raise ValueError(f"nothing of v1, d_model={v1.config.d_model}, fits {model.config}")
    for name in copied:
        own[name].copy_(source[name])
    return copied
