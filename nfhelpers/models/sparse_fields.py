"""Velocity fields that reconstruct an image from sparse pixels.

Glossary
    b  batch
    q  query points, where the field is wanted
    i  observed (input) points, where the field is known
    l  tokens of the sequence, i then q
    d  model width (d_model)
    f  random Fourier frequencies
    k  directions of a scan; in `LocalImplicitField`, the nearest observed points a query attends to
"""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import nn

from nfhelpers.flow import check_unit_range, loss_weight, skip_weight
from nfhelpers.kernels.orders import POINT_ORDERS, inverse_order, point_order
from nfhelpers.models.base import FieldModel, ModelConfig, run_layers
from nfhelpers.models.layers import (
    FourierFeatures,
    PointEmbedding,
    TimeEmbedding,
    gather_tokens,
    mlp,
    squared_distances,
)
from nfhelpers.models.perceiver import CrossAttention, LightweightPerceiver
from nfhelpers.models.spline import thin_plate_spline
from nfhelpers.models.ssm import (
    BidirectionalMamba,
    LightweightMultiDirectionalBlock,
    MambaBlock,
    MultiDirectionalMambaBlock,
    start_as_identity,
)

POSTERIOR_STD = 0.15
"""What 20% of the pixels leave open of the others, in values of [-1, 1]: of `flow.loss_weight`."""
MOST_SEQUENCES = 2**16 - 1
"""That cuDNN's attention takes at once (pytorch/pytorch#181235)."""

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


def check_order(name: str, kind: str) -> None:
    """Raise ValueError unless `kind` is an order of points."""
    if kind not in POINT_ORDERS:
        raise ValueError(f"{name}={kind!r} is not an order of points; choose one of {POINT_ORDERS}")


def check_orders(kinds: tuple[str, ...]) -> None:
    """Raise ValueError unless there is at least one order, and each is one of points, and named once."""
    if not isinstance(kinds, tuple) or not kinds or len(set(kinds)) < len(kinds):
        raise ValueError(
            f"orders={kinds!r} is not a sequence of different orders; pass some of {POINT_ORDERS}"
        )
    for kind in kinds:
        check_order("orders", kind)


def residual_decoder(d: int, dropout: float) -> nn.Sequential:
    """Tokens (B, Q, D) -> what a velocity (B, Q, 3) adds to its linear part in x_t; zero to begin with."""
    decoder = nn.Sequential(nn.RMSNorm(d), mlp(d, 2 * d, d, dropout), nn.GELU(), nn.Linear(d, 3))
    nn.init.zeros_(decoder[-1].weight)
    nn.init.zeros_(decoder[-1].bias)
    return decoder


def split_tokens(tokens: torch.Tensor, num_inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (B, L, D) -> inputs (B, I, D), queries (B, Q, D)."""
    return tokens.split([num_inputs, tokens.shape[1] - num_inputs], dim=1)


def joint_orders(coords: torch.Tensor, kinds: tuple[str, ...], bidirectional: bool) -> torch.Tensor:
    """Directions in which points (B, L, 2) are scanned -> (B, K, L).

    They are the orders (`point_order`), and with `bidirectional` the same again, for `MultiDirectionalSSM` to
    walk backwards.
    """
    orders = [point_order(coords, kind) for kind in kinds]
    return torch.stack(orders * 2 if bidirectional else orders, dim=1)  # (B, K, L)


def directional_blocks(
    config: ModelConfig, bidirectional: bool, num_layers: int | None = None
) -> nn.ModuleList:
    """The blocks of a model that scans in `config.orders`: so many, by default `config.num_layers`."""
    block = LightweightMultiDirectionalBlock if config.shared_weights else MultiDirectionalMambaBlock
    return start_as_identity(
        nn.ModuleList(
            block(
                config.d_model,
                config.d_state,
                config.expand,
                len(config.orders),
                bidirectional,
                config.tied_decay,
                config.mlp_ratio,
                config.dropout,
            )
            for _ in range(config.num_layers if num_layers is None else num_layers)
        )
    )


# ----------------------------------------------------------------------------------------------------- config


def check_common(config: ModelConfig) -> None:
    """The checks of what all configs of Mamba models share."""
    config.check_flag("tied_decay")
    config.check_positive("d_model", "num_layers", "d_state", "expand", "num_fourier_features", "num_heads")
    config.check_positive("fourier_scale", "mlp_ratio")
    config.check_heads()
    config.check_dropout()


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
    tied_decay: bool = True
    model_type: ClassVar[str] = "v1"

    def __post_init__(self):
        check_order("order", self.order)
        check_common(self)


@dataclass(frozen=True)
class MultiDirectionalMambaDiffusionConfig(ModelConfig):
    """Settings of `MultiDirectionalMambaDiffusion`; the defaults are seed 001's.

    `shared_weights` takes `LightweightMultiDirectionalBlock`; `orders` are the directions of the scan
    (`kernels.orders.point_order`), a list or tuple; the others are as in `MambaDiffusionConfig`.
    """

    d_model: int = 512
    num_layers: int = 6
    d_state: int = 16
    expand: int = 2
    num_fourier_features: int = 256
    fourier_scale: float = 10.0
    num_heads: int = 8
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    orders: tuple[str, ...] = ("row", "column", "diagonal", "antidiagonal")
    shared_weights: bool = False
    tied_decay: bool = True
    model_type: ClassVar[str] = "multidir"

    def __post_init__(self):
        self.lists_to_tuples("orders")
        check_orders(self.orders)
        self.check_flag("shared_weights")
        check_common(self)


@dataclass(frozen=True)
class MambaDiffusionV2Config(ModelConfig):
    """Settings of `MambaDiffusionV2`; the defaults are seed 003's.

    `num_layers` counts both stacks, half of it each; `perceiver_iterations` are those of
    `LightweightPerceiver`, with `num_heads` heads; the others are as in `MambaDiffusionConfig`.
    """

    d_model: int = 256
    num_layers: int = 8
    perceiver_iterations: int = 2
    d_state: int = 16
    expand: int = 2
    num_fourier_features: int = 256
    fourier_scale: float = 10.0
    num_heads: int = 8
    mlp_ratio: float = 2.0
    dropout: float = 0.0
    order: str = "row"
    tied_decay: bool = True
    model_type: ClassVar[str] = "v2"

    def __post_init__(self):
        check_order("order", self.order)
        check_common(self)
        self.check_positive("perceiver_iterations")
        if self.num_layers % 2:
            raise ValueError(
                f"num_layers={self.num_layers} is odd; half of them read forwards and half backwards: pass 8"
            )


@dataclass(frozen=True)
class MambaFieldConfig(ModelConfig):
    """Settings of `MambaField`.

    `spline_source` starts the flow from the thin-plate spline, else from zero; `residual_std` is the standard
    deviation of the data around that start, on the scale of values in [-1, 1]: 0.15 is what a spline of 20%
    of the pixels leaves, 0.5 about what zero does. `bidirectional` walks every order both ways. The others
    are as in `MultiDirectionalMambaDiffusionConfig` and `MambaDiffusionV2Config`.
    """

    d_model: int = 256
    num_layers: int = 6
    perceiver_iterations: int = 2
    d_state: int = 16
    expand: int = 2
    num_fourier_features: int = 128
    fourier_scale: float = 4.0
    num_heads: int = 8
    mlp_ratio: float = 2.0
    dropout: float = 0.0
    orders: tuple[str, ...] = ("row", "column", "diagonal", "antidiagonal")
    bidirectional: bool = True
    shared_weights: bool = False
    tied_decay: bool = True
    spline_source: bool = True
    residual_std: float = 0.15
    model_type: ClassVar[str] = "field"

    def __post_init__(self):
        self.lists_to_tuples("orders")
        check_orders(self.orders)
        for name in ("bidirectional", "shared_weights", "spline_source"):
            self.check_flag(name)
        check_common(self)
        self.check_positive("perceiver_iterations", "residual_std")


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


class Conditions(NamedTuple):
    """What a `TokenField` computes of the points alone: the same at all times of a sampling run."""

    input_coords: torch.Tensor  # (B, I, 2), sorted
    query_coords: torch.Tensor  # (B, Q, 2), sorted
    inputs: torch.Tensor  # (B, I, D), their tokens
    queries: torch.Tensor  # (B, Q, D), their tokens without values
    places: tuple  # what `mix` takes beside tokens and coordinates
    order: torch.Tensor  # (B, Q), in which the queries are sorted
    back: torch.Tensor  # (B, Q), its inverse
    start: torch.Tensor | None = None  # (B, Q, 3), of `MambaField`, not sorted


class TokenField(FieldModel):
    """Base of the velocity fields that see observed points and queries as the tokens of one sequence.

    Both point sets are sorted in `order`, whatever order they come in, so the result does not depend on how a
    caller lists the points. Subclasses mix the tokens (`mix`) and end with `self.decoder`. It predicts what
    is left of the velocity after its linear part in `noisy_values` (`flow.skip_weight`): at t = 0 the noise
    cancels exactly, and one step from any noise is an estimate of the posterior mean.
    """

    def __init__(self, config: ModelConfig, order: str, query_values: int = 3):
        super().__init__()
        self.config = config
        self.order = order
        d = config.d_model
        self.fourier = FourierFeatures(config.num_fourier_features, config.fourier_scale)
        self.input_embedding = PointEmbedding(2 * config.num_fourier_features, d)
        self.query_embedding = PointEmbedding(2 * config.num_fourier_features, d, query_values)
        self.time = TimeEmbedding(d)

    def forward(
        self,
        noisy_values: torch.Tensor,
        query_coords: torch.Tensor,
        t: torch.Tensor,
        input_coords: torch.Tensor,
        input_values: torch.Tensor,
        conditions: Conditions | None = None,
    ) -> torch.Tensor:
        """Velocity of the field at the query points.

        noisy_values (B, Nq, 3) is x_t, values in about [-1, 1]; query_coords (B, Nq, 2) and input_coords
        (B, Ni, 2) are (x, y) in [0, 1]; t (B,) in [0, 1], 0 is noise; input_values (B, Ni, 3) in [-1, 1].
        conditions: what `prepare` made of these points, if it is at hand. Returns (B, Nq, 3). Raises
        ValueError when the shapes or dtypes do not fit and, on the CPU, when t or coordinates are outside
        [0, 1].
        """
        check_shapes(noisy_values, query_coords, t, input_coords, input_values)
        if conditions is None:
            conditions = self.prepare(query_coords, input_coords, input_values)
        residual = self.predict(noisy_values, t, conditions)  # (B, Q, 3)
        return residual + skip_weight(t)[:, None, None] * noisy_values  # (B, Q, 3)

    def loss_weight(self, t: torch.Tensor) -> torch.Tensor:
        """Weight of the loss at t (B,) -> (B,)."""
        return loss_weight(t, POSTERIOR_STD)

    def prepare(
        self, query_coords: torch.Tensor, input_coords: torch.Tensor, input_values: torch.Tensor
    ) -> Conditions:
        """What `forward` computes of these arguments alone, for calls with the same; unchecked."""
        input_order = point_order(input_coords, self.order)  # (B, I)
        query_order = point_order(query_coords, self.order)  # (B, Q)
        input_coords, input_values = (gather_tokens(x, input_order) for x in (input_coords, input_values))
        query_coords = gather_tokens(query_coords, query_order)
        return Conditions(
            input_coords,
            query_coords,
            self.input_embedding(self.fourier(input_coords), input_values),
            self.query_embedding.place(self.fourier(query_coords)),
            self.places(input_coords, query_coords),
            query_order,
            inverse_order(query_order),
        )

    def predict(self, query_values: torch.Tensor, t: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        """What the network makes of the query's values (B, Q, query_values) -> (B, Q, 3)."""
        c = conditions
        queries = c.queries + self.query_embedding.value_proj(gather_tokens(query_values, c.order))
        tokens = torch.cat([c.inputs, queries], dim=1) + self.time(t)[:, None]  # (B, L, D)
        tokens = tokens.to(self.decoder[-1].weight.dtype)  # the residual stream stays float32 under autocast
        queries = self.mix(tokens, c.input_coords, c.query_coords, *c.places)  # (B, Q, D)
        return gather_tokens(self.decoder(queries), c.back)  # (B, Q, 3)

    def places(self, input_coords: torch.Tensor, query_coords: torch.Tensor) -> tuple:
        """What `mix` takes beside tokens and coordinates, and depends on these alone; here nothing."""
        return ()

    def mix(
        self, tokens: torch.Tensor, input_coords: torch.Tensor, query_coords: torch.Tensor, *places
    ) -> torch.Tensor:
        """Tokens (B, L, D) of inputs at (B, I, 2), then of queries at (B, Q, 2) -> queries (B, Q, D)."""
        raise NotImplementedError


class MambaDiffusion(TokenField):
    """v1: one selective scan over observed points, then queries, and one cross-attention (seed 002).

    Both point sets are scanned in `config.order`.
    """

    launch_bound = True

    def __init__(self, config: MambaDiffusionConfig):
        super().__init__(config, config.order)
        d = config.d_model
        self.blocks = start_as_identity(
            nn.ModuleList(
                MambaBlock(
                    d, config.d_state, config.expand, config.tied_decay, config.mlp_ratio, config.dropout
                )
                for _ in range(config.num_layers)
            )
        )
        self.cross_attention = CrossAttention(d, config.num_heads, config.dropout)
        self.decoder = residual_decoder(d, config.dropout)

    def mix(
        self, tokens: torch.Tensor, input_coords: torch.Tensor, query_coords: torch.Tensor
    ) -> torch.Tensor:
        tokens = run_layers(self.blocks, tokens, recompute=self.recompute)  # (B, L, D)
        inputs, queries = split_tokens(tokens, input_coords.shape[1])
        return queries + self.cross_attention(queries, query_coords, inputs, input_coords)  # (B, Q, D)


class MultiDirectionalMambaDiffusion(TokenField):
    """v1 with scans in several directions of the plane, over observed points and queries jointly (seed 001).

    A query follows, in every direction, the observed points that lie before it, where v1 has all of them far
    back in its sequence. The orders are computed once and serve all blocks.
    """

    def __init__(self, config: MultiDirectionalMambaDiffusionConfig):
        super().__init__(config, "row")
        self.blocks = directional_blocks(config, bidirectional=False)
        self.cross_attention = CrossAttention(config.d_model, config.num_heads, config.dropout)
        self.decoder = residual_decoder(config.d_model, config.dropout)

    def places(self, input_coords: torch.Tensor, query_coords: torch.Tensor) -> tuple:
        coords = torch.cat([input_coords, query_coords], dim=1)  # (B, L, 2)
        return (joint_orders(coords, self.config.orders, bidirectional=False),)  # (B, K, L)

    def scan(self, tokens: torch.Tensor, orders: torch.Tensor) -> torch.Tensor:
        """Tokens (B, L, D) of all points through the blocks, along orders (B, K, L) -> (B, L, D)."""
        return run_layers(self.blocks, tokens, orders, recompute=self.recompute)  # (B, L, D)

    def mix(
        self,
        tokens: torch.Tensor,
        input_coords: torch.Tensor,
        query_coords: torch.Tensor,
        orders: torch.Tensor,
    ) -> torch.Tensor:
        tokens = self.scan(tokens, orders)  # (B, L, D)
        inputs, queries = split_tokens(tokens, input_coords.shape[1])
        return queries + self.cross_attention(queries, query_coords, inputs, input_coords)  # (B, Q, D)


class MambaDiffusionV2(TokenField):
    """V2: a scan both ways over observed points, then queries, and a perceiver (seed 003).

    Both point sets are scanned in `config.order`. Queries exchange what they know (`QuerySelfAttention`), all
    with all up to 4,096 of them, beyond that in windows.
    """

    launch_bound = True

    def __init__(self, config: MambaDiffusionV2Config):
        super().__init__(config, config.order)
        d = config.d_model
        self.bidirectional = BidirectionalMamba(
            d,
            config.num_layers,
            config.d_state,
            config.expand,
            config.tied_decay,
            config.mlp_ratio,
            config.dropout,
        )
        self.perceiver = LightweightPerceiver(
            d, config.num_heads, config.perceiver_iterations, config.mlp_ratio, config.dropout
        )
        self.decoder = residual_decoder(d, config.dropout)

    def places(self, input_coords: torch.Tensor, query_coords: torch.Tensor) -> tuple:
        return (self.perceiver.places(query_coords, input_coords),)

    def mix(
        self,
        tokens: torch.Tensor,
        input_coords: torch.Tensor,
        query_coords: torch.Tensor,
        places: list[tuple],
    ) -> torch.Tensor:
        tokens = self.bidirectional(tokens, self.recompute)  # (B, L, D)
        inputs, queries = split_tokens(tokens, input_coords.shape[1])
        return self.perceiver(queries, query_coords, inputs, input_coords, self.recompute, places)


class MambaField(TokenField):
    """The flagship: scans of the plane in several orders, both ways, a perceiver, and a flow that starts from
    the thin-plate spline of the observed pixels.

    The source of the flow depends on the data (Albergo et al., "Stochastic Interpolants with Data-Dependent
    Couplings", ICML 2024), and yet path, loss and samplers are those of `nfhelpers.flow`. With m the spline
    at the queries, clamped to [-1, 1], the path from m + noise to the data is that from the noise, moved:

        z_t = (1 - t) (m + noise) + t data = x_t + (1 - t) m        dz/dt = dx/dt - m

    So the model takes x_t and returns the velocity of x. Let the data be m + d, d of mean zero and standard
    deviation s (`config.residual_std`). Then r = x_t - t m = (1 - t) noise + t d, of variance
    V = (1 - t)^2 + t^2 s^2, and the velocity is m + d - noise, whose best linear prediction is

        E[m + d - noise | x_t] = m + Cov(d - noise, r) / V * r = m + skip_weight(t, s) (x_t - t m)

    exact if d is Gaussian and white. What remains, ((1 - t) d - t s^2 noise) / V, has the standard deviation
    s / sqrt(V) at all t; the network predicts it from r / sqrt(V) and m, all three of unit scale (the
    preconditioning of Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models",
    NeurIPS 2022):

        velocity = m + skip_weight(t, s) (x_t - t m) + s / sqrt(V) network(r / sqrt(V), m, ...)

    The network starts at zero. At t = 0 the velocity is then m - x_0, so that one step, the posterior mean,
    is the spline itself; a solver of many steps draws from N(m, s^2), because x_t - t m grows as sqrt(V).

    Training weighs the squared error of the velocity by V / s^2 (`flow.loss_weight`, as for the other models
    with `POSTERIOR_STD` as s), which at the default `residual_std` is the squared error of the network
    itself. Unweighted, t = 0, where the posterior mean is read off, would count s^2 as much as t = 1, and the
    network would drift below the spline there.
    """

    def __init__(self, config: MambaFieldConfig):
        super().__init__(config, "row", query_values=6)
        self.blocks = directional_blocks(config, config.bidirectional)
        self.perceiver = LightweightPerceiver(
            config.d_model, config.num_heads, config.perceiver_iterations, config.mlp_ratio, config.dropout
        )
        self.decoder = residual_decoder(config.d_model, config.dropout)

    def forward(
        self,
        noisy_values: torch.Tensor,
        query_coords: torch.Tensor,
        t: torch.Tensor,
        input_coords: torch.Tensor,
        input_values: torch.Tensor,
        conditions: Conditions | None = None,
    ) -> torch.Tensor:
        """Velocity of the field at the query points; arguments and errors as in `TokenField.forward`."""
        check_shapes(noisy_values, query_coords, t, input_coords, input_values)
        if conditions is None:
            conditions = self.prepare(query_coords, input_coords, input_values)
        start = conditions.start  # (B, Q, 3)
        time, std = t[:, None, None], self.config.residual_std  # (B, 1, 1)
        scale = ((1 - time) ** 2 + (std * time) ** 2).sqrt()  # (B, 1, 1), sqrt(V)
        rest = noisy_values - time * start  # (B, Q, 3), r
        seen = torch.cat([rest / scale, start], dim=-1)  # (B, Q, 6)
        residual = self.predict(seen, t, conditions)  # (B, Q, 3)
        return start + skip_weight(time, std) * rest + std / scale * residual  # (B, Q, 3)

    def prepare(
        self, query_coords: torch.Tensor, input_coords: torch.Tensor, input_values: torch.Tensor
    ) -> Conditions:
        """As `TokenField.prepare`, and where the flow starts."""
        if self.config.spline_source:
            start = thin_plate_spline(query_coords, input_coords, input_values).clamp(-1, 1)  # (B, Q, 3)
        else:
            start = input_values.new_zeros(*query_coords.shape[:2], 3)
        return super().prepare(query_coords, input_coords, input_values)._replace(start=start)

    def places(self, input_coords: torch.Tensor, query_coords: torch.Tensor) -> tuple:
        coords = torch.cat([input_coords, query_coords], dim=1)  # (B, L, 2)
        orders = joint_orders(coords, self.config.orders, self.config.bidirectional)  # (B, K, L)
        return orders, self.perceiver.places(query_coords, input_coords)

    def mix(
        self,
        tokens: torch.Tensor,
        input_coords: torch.Tensor,
        query_coords: torch.Tensor,
        orders: torch.Tensor,
        places: list[tuple],
    ) -> torch.Tensor:
        tokens = run_layers(self.blocks, tokens, orders, recompute=self.recompute)  # (B, L, D)
        inputs, queries = split_tokens(tokens, input_coords.shape[1])
        return self.perceiver(queries, query_coords, inputs, input_coords, self.recompute, places)


def initialise_from_v1(model: FieldModel, v1: MambaDiffusion) -> list[str]:
    """Start a model from the components it shares with a trained v1 (seed 003, "Transfer from V1").

    Copies every weight and buffer that both have under one name and in one shape, such as the Fourier
    frequencies, the embeddings of points and of time: all but the decoder's last layer, which stays at zero,
    so that the model still starts as its linear prediction. Returns the names copied, in the model's order.
    Raises ValueError when nothing fits, naming the widths.
    """
    source = v1.state_dict()
    last = f"decoder.{len(v1.decoder) - 1}."
    copied = []
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name in source and source[name].shape == tensor.shape and not name.startswith(last):
                tensor.copy_(source[name])
                copied.append(name)
    if not copied:
        raise ValueError(
            f"nothing of the v1 model (d_model={v1.config.d_model}, num_fourier_features="
            f"{v1.config.num_fourier_features}) fits this {type(model).__name__} (d_model="
            f"{model.config.d_model}); pass a v1 model of d_model={model.config.d_model}"
        )
    return copied


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

    def loss_weight(self, t: torch.Tensor) -> torch.Tensor:
        """Weight of the loss at t (B,) -> (B,), the same as that of the models it is compared with."""
        return loss_weight(t, POSTERIOR_STD)

    def forward(
        self,
        noisy_values: torch.Tensor,
        query_coords: torch.Tensor,
        t: torch.Tensor,
        input_coords: torch.Tensor,
        input_values: torch.Tensor,
        conditions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Velocity of the field at the query points; arguments and errors as in `TokenField.forward`."""
        check_shapes(noisy_values, query_coords, t, input_coords, input_values)
        if conditions is None:
            conditions = self.prepare(query_coords, input_coords, input_values)
        query = self.query_proj(noisy_values) + self.time(t)[:, None]  # (B, Q, D)
        tokens = torch.cat([query[:, :, None], conditions], dim=2).flatten(0, 1)  # (B*Q, 1+K, D)
        tokens = tokens.to(self.decoder[-1].weight.dtype)  # the residual stream stays float32 under autocast
        parts = [
            run_layers(self.layers, part, recompute=self.recompute)[:, 0]
            for part in tokens.chunk(math.ceil(len(tokens) / MOST_SEQUENCES))
        ]
        residual = self.decoder(torch.cat(parts)).unflatten(0, query_coords.shape[:2])  # (B, Q, 3)
        return residual + skip_weight(t)[:, None, None] * noisy_values  # (B, Q, 3)

    def prepare(
        self, query_coords: torch.Tensor, input_coords: torch.Tensor, input_values: torch.Tensor
    ) -> torch.Tensor:
        """What `forward` computes of these alone: tokens of each query's neighbours (B, Q, K, D)."""
        num_queries = query_coords.shape[1]
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
        return neighbours.unflatten(1, (num_queries, k))  # (B, Q, K, D)
