import json
import math
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import torch
from huggingface_hub import hub_mixin
from safetensors.torch import load_file, save_file
from scipy.interpolate import RBFInterpolator
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from nfhelpers import run, train
from nfhelpers.flow import flow_matching_loss, interpolate, skip_weight, target_velocity
from nfhelpers.images import grid_coords
from nfhelpers.kernels.orders import point_order
from nfhelpers.kernels.reference import selective_scan_reference
from nfhelpers.models import (
    FIELD_MODELS,
    LocalImplicitField,
    LocalImplicitFieldConfig,
    MambaDiffusion,
    MambaDiffusionAutoencoder,
    MambaDiffusionAutoencoderConfig,
    MambaDiffusionConfig,
    MambaDiffusionV2,
    MambaDiffusionV2Config,
    MambaField,
    MambaFieldConfig,
    MinimalLatentMamba,
    MinimalLatentMambaConfig,
    MultiDirectionalMambaDiffusion,
    MultiDirectionalMambaDiffusionConfig,
    initialise_from_v1,
    load_model,
)
from nfhelpers.models import sparse_fields as fields_module
from nfhelpers.models import ssm as ssm_module
from nfhelpers.models.layers import FourierFeatures, PointEmbedding, TimeEmbedding, sinusoidal_embedding
from nfhelpers.models.perceiver import (
    CrossAttention,
    LightweightPerceiver,
    QuerySelfAttention,
    RotaryCoordinates,
    relative_attention,
    rotate,
)
from nfhelpers.models.sparse_fields import check_shapes
from nfhelpers.models.spline import thin_plate_spline
from nfhelpers.models.ssm import (
    BidirectionalMamba,
    LightweightMultiDirectionalBlock,
    MambaBlock,
    MultiDirectionalMambaBlock,
    MultiDirectionalSSM,
    SelectiveSSM,
)
from nfhelpers.samplers import posterior_mean, sample

ARGUMENTS = ("noisy_values", "query_coords", "t", "input_coords", "input_values")
SMALL = dict(d_model=16, num_layers=2, num_fourier_features=8, fourier_scale=2.0, num_heads=2)
TINY = {
    "v1": dict(SMALL, d_state=4),
    "multidir": dict(SMALL, d_state=4),
    "multidir shared": dict(SMALL, d_state=4, shared_weights=True, tied_decay=True),
    "v2": dict(SMALL, d_state=4),
    "field": dict(SMALL, d_state=4),
    "field plain": dict(SMALL, d_state=4, bidirectional=False, spline_source=False, residual_std=0.5),
    "local": dict(SMALL, neighbours=4),
    "minimal": dict(SMALL, d_state=4, latent_dim=8),
}
"""Settings of each model, by its type and, after a blank, a variant of it."""
LAYERS = {
    "v1": lambda model: [model.blocks],
    "multidir": lambda model: [model.blocks],
    "v2": lambda model: [
        model.bidirectional.forward_blocks,
        model.bidirectional.backward_blocks,
        model.perceiver.layers,
    ],
    "field": lambda model: [model.blocks, model.perceiver.layers],
    "local": lambda model: [model.layers],
    "minimal": lambda model: [model.blocks],
}
"""The stacks of layers of each model, whose first layer takes the residual stream."""
every_model = pytest.mark.parametrize("kind", sorted(TINY))


def type_of(kind):
    return kind.split()[0]


def tiny_config(kind, **settings):
    return FIELD_MODELS[type_of(kind)][1](**{**TINY[kind], **settings})


def tiny_model(kind, trained=True, **settings):
    """A small model in eval mode; `trained` moves what starts at zero away from it."""
    torch.manual_seed(0)
    model = FIELD_MODELS[type_of(kind)][0](tiny_config(kind, **settings)).eval()
    return away_from_zero(model) if trained else model


def away_from_zero(module):
    """Draw the parameters that are zero, such as the last layers of residual branches."""
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.any():
                parameter.normal_(std=0.5)
    return module


def field(batch=2, queries=9, inputs=7, seed=1):
    """The five arguments of a velocity field, at points of an 8 x 8 grid: many distances are equal."""
    generator = torch.Generator().manual_seed(seed)
    grid = grid_coords(8, 8)
    pixels = torch.stack([torch.randperm(64, generator=generator) for _ in range(batch)])
    return dict(
        noisy_values=torch.randn(batch, queries, 3, generator=generator),
        query_coords=grid[pixels[:, :queries]],
        t=torch.linspace(0.1, 0.9, batch),
        input_coords=grid[pixels[:, queries : queries + inputs]],
        input_values=torch.rand(batch, inputs, 3, generator=generator) * 2 - 1,
    )


def start_of(kind, arguments):
    """Where the flow of an untrained model ends."""
    if kind != "field":
        return torch.zeros_like(arguments["noisy_values"])
    points = (arguments[name] for name in ("query_coords", "input_coords", "input_values"))
    return thin_plate_spline(*points).clamp(-1, 1)


def linear_part(kind, arguments):
    """The velocity of an untrained model."""
    start, t = start_of(kind, arguments), arguments["t"][:, None, None]
    return start + skip_weight(t, 0.15 if kind == "field" else 0.5) * (arguments["noisy_values"] - t * start)


# Embeddings


def test_fourier_features_are_a_gaussian_kernel():
    torch.manual_seed(0)
    scale, count = 0.7, 20_000
    coords = torch.rand(1, 12, 2)
    features = FourierFeatures(count, scale)(coords)
    kernel = (features @ features.mT / count)[0]
    expected = torch.exp(-2 * math.pi**2 * scale**2 * torch.cdist(coords, coords)[0].square())
    # The mean of `count` cosines, each within [-1, 1]: a standard error below 0.0071.
    assert (kernel - expected).abs().max() < 0.03
    assert expected.min() < 0.1  # far points are in the comparison, too


def test_fourier_features_are_cosines_then_sines():
    layer = FourierFeatures(2, 1.0)
    layer.frequencies.copy_(torch.tensor([[1.0, 2.0], [0.0, 4.0]]))
    phase = [2 * math.pi * 0.2, 2 * math.pi * (2 * 0.2 + 4 * 0.3)]
    expected = torch.tensor([*map(math.cos, phase), *map(math.sin, phase)])
    torch.testing.assert_close(layer(torch.tensor([[[0.2, 0.3]]]))[0, 0], expected)


def test_fourier_frequencies_are_saved_and_not_trained():
    layer = FourierFeatures(5, 3.0)
    assert list(layer.state_dict()) == ["frequencies"] and not list(layer.parameters())
    other = FourierFeatures(5, 3.0)
    assert not torch.equal(layer.frequencies, other.frequencies)
    other.load_state_dict(layer.state_dict())
    coords = torch.rand(1, 4, 2)
    torch.testing.assert_close(other(coords), layer(coords), rtol=0, atol=0)


def test_fourier_features_keep_their_precision_under_autocast():
    # At scale 10 a phase is some hundred radians: rounded to bfloat16 it would be wrong by half a radian.
    torch.manual_seed(0)
    layer, coords = FourierFeatures(64, 10.0), torch.rand(1, 50, 2)
    phase = 2 * math.pi * coords.double() @ layer.frequencies.double()
    exact = torch.cat([phase.cos(), phase.sin()], -1)
    assert (layer(coords) - exact).abs().max() < 1e-4
    with torch.autocast("cpu", torch.bfloat16):
        assert (layer(coords) - exact).abs().max() < 1e-2


def test_point_embedding_is_one_linear_map_of_features_and_values():
    layer = PointEmbedding(6, 4)
    features, values = torch.randn(2, 5, 6), torch.randn(2, 5, 3)
    weight = torch.cat([layer.coord_proj.weight, layer.value_proj.weight], 1)
    bias = layer.coord_proj.bias + layer.value_proj.bias
    torch.testing.assert_close(
        layer(features, values), F.linear(torch.cat([features, values], -1), weight, bias)
    )


def test_sinusoidal_embedding_closed_form():
    embedding = sinusoidal_embedding(torch.tensor([0.0, 1.0]), 8)
    assert embedding.shape == (2, 8)
    phase = [1000 * 10_000 ** (-k / 4) for k in range(4)]  # 1000, 100, 10, 1
    torch.testing.assert_close(embedding[0], torch.tensor([1.0] * 4 + [0.0] * 4))
    expected = torch.tensor([*map(math.cos, phase), *map(math.sin, phase)])
    torch.testing.assert_close(embedding[1], expected, rtol=0, atol=2e-4)


def test_time_is_resolved_to_a_thousandth():
    start, later = sinusoidal_embedding(torch.tensor([0.0, 0.001]), 16)
    # 0.001 is one radian of the fastest sinusoid.
    assert (later - start).norm() > 2 * math.sin(0.5) - 1e-4
    assert TimeEmbedding(16)(torch.tensor([0.0, 0.001])).shape == (2, 16)


# The selective state space mixer


def small_ssm(d_model=6, d_state=3, expand=2, seed=0, tied_decay=False):
    torch.manual_seed(seed)
    return SelectiveSSM(d_model, d_state, expand, tied_decay)


def recorded_scan(monkeypatch):
    """The arguments of every `selective_scan` a mixer makes."""
    calls, scan = [], ssm_module.selective_scan

    def spy(u, delta, A, B, C, **options):
        calls.append(dict(u=u, delta=delta, A=A, B=B, C=C, **options))
        return scan(u, delta, A, B, C, **options)

    monkeypatch.setattr(ssm_module, "selective_scan", spy)
    return calls


def test_ssm_initialisation():
    layer = small_ssm(d_model=32, d_state=5)
    delta = F.softplus(layer.dt_bias)
    assert 1e-3 * (1 - 1e-3) <= delta.min() and delta.max() <= 1e-1 * (1 + 1e-3)
    assert delta.max() / delta.min() > 10  # spread over the two decades
    A = -torch.exp(layer.A_log)
    torch.testing.assert_close(A, -torch.arange(1.0, 6.0).expand(64, 5))
    assert torch.equal(layer.D, torch.ones(64)) and layer.dt_rank == 2


def test_weight_decay_leaves_the_recurrence_alone():
    """Decay would pull every A to -1, delta's bias to 0 and the skip D to 0."""
    model = tiny_model("v1")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, others = (
        {names[id(parameter)].rsplit(".", 1)[-1] for parameter in group["params"]}
        for group in train._parameter_groups(model, 0.1)
    )
    assert {"A_log", "D", "dt_bias"} <= others
    assert decayed == {"weight"}


def test_ssm_equals_a_float64_loop():
    layer = small_ssm()
    tokens = torch.randn(2, 11, 6, requires_grad=True)
    weights = {name: p.detach().double() for name, p in layer.named_parameters()}
    x, z = (tokens.double() @ weights["in_proj.weight"].T).chunk(2, -1)
    x = x * torch.sigmoid(x)
    projected = x @ weights["x_proj.weight"].T
    rank, n = layer.dt_rank, layer.d_state
    low, B, C = projected[..., :rank], projected[..., rank : rank + n], projected[..., rank + n :]
    delta = torch.log1p(torch.exp(low @ weights["dt_proj.weight"].T + weights["dt_bias"]))
    A = -torch.exp(weights["A_log"])
    y = torch.zeros_like(x)
    for b in range(2):
        state = torch.zeros(12, n, dtype=torch.float64)
        for step in range(11):
            decay = torch.exp(delta[b, step, :, None] * A)
            state = decay * state + (delta[b, step] * x[b, step])[:, None] * B[b, step]
            y[b, step] = state @ C[b, step] + weights["D"] * x[b, step]
    expected = (y * z * torch.sigmoid(z)) @ weights["out_proj.weight"].T
    found = layer(tokens)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    (wanted,) = torch.autograd.grad(expected.square().sum(), tokens)
    (grad,) = torch.autograd.grad(found.square().sum(), tokens)
    torch.testing.assert_close(grad, wanted, rtol=1e-3, atol=1e-5)


def test_ssm_is_causal_and_remembers():
    layer = small_ssm()
    tokens = torch.randn(1, 10, 6)
    changed = tokens.clone()
    changed[:, 4] += 1
    difference = (layer(tokens) - layer(changed)).abs().amax((0, 2))
    assert torch.equal(difference[:4], torch.zeros(4))
    assert (difference[4:] > 0).all()


@pytest.mark.parametrize("size", [1.0, 100.0])
def test_ssm_is_stable_whatever_the_input(monkeypatch, size):
    calls, layer = recorded_scan(monkeypatch), small_ssm()
    with torch.no_grad():
        layer.A_log.normal_(std=2)
    output = layer(size * torch.randn(2, 50, 6))
    (call,) = calls
    delta = F.softplus(call["delta"].double() + call["delta_bias"].double()[:, None])  # (B, E, L)
    exponent = delta[..., None] * call["A"].double()[:, None]  # (B, E, L, N)
    # The logarithm of the decay, so that neither end is lost to rounding.
    assert (exponent < 0).all() and exponent.isfinite().all()
    assert output.isfinite().all()
    assert layer(1e4 * torch.randn(2, 50, 6)).isfinite().all()


@pytest.mark.parametrize("how", ["autocast", "half model"])
def test_ssm_keeps_its_recurrence_in_float32(monkeypatch, how):
    calls, layer = recorded_scan(monkeypatch), small_ssm()
    tokens = torch.randn(1, 5, 6)
    if how == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            layer(tokens)
        assert {layer.A_log.dtype, layer.D.dtype, layer.dt_bias.dtype} == {torch.float32}
    else:
        layer.bfloat16()(tokens.bfloat16())
    (call,) = calls
    assert call["u"].dtype == torch.bfloat16
    assert {call[name].dtype for name in ("A", "D", "delta_bias")} == {torch.float32}


def test_mamba_block_is_residual():
    torch.manual_seed(0)
    block = MambaBlock(6, 3, 2, False, 2.0, 0.0)
    tokens = torch.randn(1, 5, 6)
    with torch.no_grad():
        block.mlp[-1].weight.zero_(), block.mlp[-1].bias.zero_()
    expected = tokens + block.mixer(tokens * tokens.square().mean(-1, keepdim=True).rsqrt())
    torch.testing.assert_close(block(tokens), expected, rtol=1e-5, atol=1e-5)


# Scans in several directions

ORDERS = ("row", "column", "diagonal", "antidiagonal")


def directional_ssm(**settings):
    torch.manual_seed(0)
    plain = dict(d_model=6, d_state=3, expand=2, num_orders=2, shared_weights=False)
    return MultiDirectionalSSM(
        **{**plain, **dict(bidirectional=False, tied_decay=False, dropout=0.0), **settings}
    )


def random_orders(batch, number, length, bidirectional=False):
    generator = torch.Generator().manual_seed(2)
    orders = torch.rand(batch, number, length, generator=generator).argsort(-1)
    return orders.repeat(1, 2, 1) if bidirectional else orders


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_directional_ssm_equals_scans_of_permuted_copies(shared, bidirectional, tied):
    layer = directional_ssm(shared_weights=shared, bidirectional=bidirectional, tied_decay=tied).double()
    with torch.no_grad():
        layer.A_log.add_(0.3 * torch.randn_like(layer.A_log))
        layer.D.normal_()
    tokens, length = torch.randn(2, 11, 6, dtype=torch.float64, requires_grad=True), 11
    orders = random_orders(2, 2, length, bidirectional)
    x, z = layer.in_proj(tokens).chunk(2, -1)
    x = F.silu(x)
    projected = layer.x_proj(x).unflatten(-1, (layer.sets, -1))  # (B, L, S, R+2N)
    parts = []
    for direction in range(orders.shape[1]):
        weights = 0 if shared else direction
        order = orders[:, direction]
        if direction >= 2:  # the second half walks backwards
            order = order.flip(-1)
        low, B, C = projected[:, :, weights].split([layer.dt_rank, 3, 3], -1)
        delta = low @ layer.dt_weight[weights].T

        def visited(values, order=order):  # (B, C, L), along the order
            return values.take_along_dim(order[..., None], 1).mT

        y = selective_scan_reference(
            visited(x),
            visited(delta),
            -layer.A_log[weights].exp(),
            visited(B),
            visited(C),
            layer.D[weights],
            None,
            layer.dt_bias[weights],
            True,
            tied_decay=tied,
        )
        parts.append(torch.zeros_like(x).scatter(1, order[..., None].expand_as(x), y.mT))
    if bidirectional:
        parts = [parts[0] + parts[2], parts[1] + parts[3]]
    fused = layer.fusion_norm(x + layer.fusion(torch.cat(parts, -1)))
    expected = layer.out_proj(fused * F.silu(z))
    found = layer(tokens, orders)
    # The parameters of the recurrence are float32.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    wanted = torch.autograd.grad(expected.square().sum(), [tokens, *layer.parameters()])
    grads = torch.autograd.grad(found.square().sum(), [tokens, *layer.parameters()])
    for grad, truth in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, truth, rtol=1e-4, atol=1e-5)


def test_separate_weights_cost_an_ssm_for_each_direction_and_shared_weights_one():
    separate, shared = (
        block(16, 4, 2, 4, False, False, 2.0, 0.0).mixer
        for block in (MultiDirectionalMambaBlock, LightweightMultiDirectionalBlock)
    )
    for name in ("x_proj.weight", "dt_weight", "dt_bias", "A_log", "D"):
        assert separate.get_parameter(name).numel() == 4 * shared.get_parameter(name).numel(), name
    assert separate.in_proj.weight.shape == shared.in_proj.weight.shape  # x is shared by the directions
    assert isinstance(shared.fusion, torch.nn.Linear) and separate.fusion[0].out_features == 64


@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_token_reaches_those_after_it_in_some_order(bidirectional):
    layer = directional_ssm(bidirectional=bidirectional)
    orders = random_orders(1, 2, 10, bidirectional)
    tokens = torch.randn(1, 10, 6)
    changed = tokens.clone()
    changed[:, 4] += 1
    reached = (layer(tokens, orders) - layer(changed, orders)).abs().amax((0, 2)) > 0
    later = torch.zeros(10, dtype=torch.bool)
    for order in orders[0, :2]:
        later[order[order.tolist().index(4) :]] = True
    assert torch.equal(reached, torch.ones_like(later) if bidirectional else later)
    assert not later.all()


@pytest.mark.parametrize("block", [MultiDirectionalMambaBlock, LightweightMultiDirectionalBlock])
def test_multi_directional_blocks_are_residual(block):
    torch.manual_seed(0)
    layer = block(6, 3, 2, 2, False, False, 2.0, 0.0)
    tokens, orders = torch.randn(1, 5, 6), random_orders(1, 2, 5)
    with torch.no_grad():
        layer.mlp[-1].weight.zero_(), layer.mlp[-1].bias.zero_()
    mixed = layer.mixer(tokens * tokens.square().mean(-1, keepdim=True).rsqrt(), orders)
    torch.testing.assert_close(layer(tokens, orders), tokens + mixed, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["multidir", "field"])
def test_orders_are_joint_and_computed_once(monkeypatch, kind):
    seen, order = [], point_order
    monkeypatch.setattr(
        fields_module,
        "point_order",
        lambda coords, kind: seen.append((coords.shape[1], kind)) or order(coords, kind),
    )
    given = []
    model = tiny_model(kind, num_layers=3)
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, arguments: given.append(arguments[1]))
    model(**field())
    # Each set of points is sorted once; the scans take both together: 7 observed and 9 queries.
    assert seen == [(7, "row"), (9, "row"), *((16, kind) for kind in ORDERS)]
    assert len(given) == 3 and all(orders is given[0] for orders in given)
    assert given[0].shape == (2, 8 if kind == "field" else 4, 16)


def test_bidirectional_mamba_sees_both_ways():
    torch.manual_seed(0)
    layer = away_from_zero(BidirectionalMamba(6, 4, 3, 2, False, 2.0, 0.0))
    tokens = torch.randn(1, 10, 6)
    changed = tokens.clone()
    changed[:, 4] += 1

    def reached():
        return ((layer(tokens) - layer(changed)).abs().amax((0, 2)) > 0).tolist()

    assert reached() == [True] * 10
    weight = layer.combine.weight.detach().clone()
    with torch.no_grad():
        layer.combine.weight[:, 6:] = 0
    assert reached() == [False] * 4 + [True] * 6  # forward blocks alone
    with torch.no_grad():
        layer.combine.weight.copy_(weight)[:, :6] = 0
    assert reached() == [True] * 5 + [False] * 5  # backward blocks alone


def test_backward_blocks_are_forward_blocks_of_the_flipped_sequence():
    torch.manual_seed(0)
    layer = away_from_zero(BidirectionalMamba(6, 2, 3, 2, False, 2.0, 0.0))
    layer.backward_blocks.load_state_dict(layer.forward_blocks.state_dict())
    tokens = torch.randn(2, 7, 6)
    expected = torch.cat(
        [layer.forward_blocks[0](tokens), layer.forward_blocks[0](tokens.flip(1)).flip(1)], -1
    )
    torch.testing.assert_close(layer(tokens), layer.combine(expected))


# Cross-attention


def test_cross_attention_without_queries_is_gaussian_kernel_interpolation():
    torch.manual_seed(0)
    heads, d = 3, 12
    layer = CrossAttention(d, heads, 0.0)
    with torch.no_grad():
        layer.to_query.weight.zero_()
        layer.to_query.bias.zero_()
        layer.rotary.frequencies.zero_()
        layer.log_sigma.copy_(torch.tensor([0.05, 0.1, 0.4]).log())
    queries, inputs = torch.randn(2, 4, d), torch.randn(2, 6, d)
    query_coords, input_coords = torch.rand(2, 4, 2), torch.rand(2, 6, 2)
    normed = inputs.double() * (inputs.double().square().mean(-1, keepdim=True) + 1e-7).rsqrt()
    values = normed @ layer.to_key_value.weight[d:].double().T + layer.to_key_value.bias[d:]  # (B, I, D)
    distance = torch.cdist(query_coords.double(), input_coords.double())
    parts = []
    for head, sigma in enumerate((0.05, 0.1, 0.4)):
        weight = torch.exp(-(distance**2) / (2 * sigma**2))
        weight = weight / weight.sum(-1, keepdim=True)  # (B, Q, I)
        parts.append(weight @ values[..., head * 4 : head * 4 + 4])
    expected = torch.cat(parts, -1) @ layer.to_out.weight.double().T
    output = layer(queries, query_coords, inputs, input_coords)
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-5)


def test_cross_attention_of_many_queries_is_that_of_each_part(monkeypatch):
    torch.manual_seed(0)
    layer = CrossAttention(12, 3, 0.0)
    points = torch.randn(2, 11, 12), torch.rand(2, 11, 2), torch.randn(2, 6, 12), torch.rand(2, 6, 2)
    whole = layer(*points)
    sizes, attend = [], F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, *a, **k: sizes.append(q.shape[2]) or attend(q, *a, **k)
    )
    monkeypatch.setattr(CrossAttention, "LOGITS_AT_ONCE", 4 * 3 * 6 + 1)
    torch.testing.assert_close(layer(*points), whole, rtol=1e-6, atol=1e-6)
    assert sizes == [4, 4, 3]


@pytest.mark.parametrize("channels", [4, 6])
def test_attention_sees_where_points_lie_from_one_another(channels):
    """Turned by their points, keys and values depend on q - p alone, as the formula says."""
    torch.manual_seed(0)
    rotary = RotaryCoordinates(2, channels)
    q, k, v = torch.randn(1, 2, 3, channels), torch.randn(1, 2, 5, channels), torch.randn(1, 2, 5, channels)
    p_q, p_k = torch.rand(1, 3, 2), torch.rand(1, 5, 2)
    y = relative_attention(q, k, v, rotary(p_q), rotary(p_k))
    moved = relative_attention(q, k, v, rotary(p_q + 0.37), rotary(p_k + 0.37))
    torch.testing.assert_close(moved, y, rtol=0, atol=1e-4)
    assert (relative_attention(q, k, v, rotary(p_q + 0.37), rotary(p_k)) - y).abs().max() > 0.05

    def turned(x, p, sign, pairs):  # complex numbers in place of pairs of channels
        a, b = x[..., -2 * pairs :].double().chunk(2, -1)
        angle = 2 * math.pi * torch.einsum("bld,dhc->bhlc", p, rotary.frequencies).double()[..., :pairs]
        z = torch.complex(a, b) * torch.polar(torch.ones_like(angle), sign * angle)
        return torch.cat([x[..., : -2 * pairs].double(), z.real, z.imag], -1)

    full, half = channels // 2, channels // 4
    logits = turned(q, p_q, 1, full) @ turned(k, p_k, 1, full).mT / math.sqrt(channels)
    expected = turned(logits.softmax(-1) @ turned(v, p_k, 1, half), p_q, -1, half)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-5)


def test_rotary_frequencies_are_log_uniform_in_their_range():
    torch.manual_seed(0)
    length = RotaryCoordinates(50, 400).frequencies.norm(dim=0).log2()
    assert length.min() > -2 and length.max() < 4  # a quarter to 16 cycles an image side
    assert length.mean().item() == pytest.approx(1, abs=0.07)  # of 10,000: standard error 0.017


def test_cross_attention_prefers_the_same_place_to_begin_with():
    """Whatever the tokens say: the biases of queries and keys are equal, so theirs is the kernel of q - p."""
    layer = CrossAttention(64, 2, 0.0)
    assert torch.equal(layer.to_query.bias, layer.to_key_value.bias[:64])
    assert layer.to_query.bias.std().item() == pytest.approx(1, abs=0.3)


def test_cross_attention_widths_start_log_spaced():
    sigma = CrossAttention(12, 4, 0.0).log_sigma.exp()
    assert sigma[0].item() == pytest.approx(0.015) and sigma[-1].item() == pytest.approx(0.3)
    torch.testing.assert_close(sigma[1:] / sigma[:-1], torch.full((3,), 20 ** (1 / 3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_attention_at_coinciding_and_at_far_points_is_finite(dtype):
    torch.manual_seed(0)
    layer = CrossAttention(12, 3, 0.0)
    here, corner = torch.zeros(1, 5, 2), torch.ones(1, 6, 2)
    for input_coords in (here[:, :1].expand(1, 6, 2), corner):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            output = layer(torch.randn(1, 5, 12), here, torch.randn(1, 6, 12), input_coords)
        assert output.shape == (1, 5, 12) and output.dtype == dtype and output.isfinite().all()
        layer.zero_grad()
        output.float().sum().backward()
        assert all(p.grad.isfinite().all() for p in layer.parameters())


# Self-attention of queries and the perceiver


def self_attention(layer, queries, coords, mask):
    """Written out in float64; mask (B, Q, Q) says who sees whom."""
    x = queries.double()
    x = x * (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).rsqrt()
    q, k, v = (
        part.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2)
        for part in F.linear(x, *(p.double() for p in layer.to_query_key_value.parameters())).chunk(3, -1)
    )
    cos, sin = (part.double() for part in layer.rotary(coords))
    half = cos[..., : v.shape[-1] // 4], sin[..., : v.shape[-1] // 4]
    q, k, v = rotate(q, cos, sin), rotate(k, cos, sin), rotate(v, *half)
    logits = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~mask[:, None], -math.inf)
    y = rotate(logits.softmax(-1) @ v, half[0], -half[1])
    return y.transpose(1, 2).flatten(2) @ layer.to_out.weight.double().T


@pytest.mark.parametrize("length", [1, 8, 9, 10, 23, 25])
def test_self_attention_is_full_at_first_and_windowed_beyond(monkeypatch, length):
    monkeypatch.setattr(QuerySelfAttention, "FULL", 8)
    monkeypatch.setattr(QuerySelfAttention, "WINDOW", 5)
    torch.manual_seed(0)
    layer = QuerySelfAttention(12, 3, "column", 0.0)
    queries, coords = torch.randn(2, length, 12), torch.rand(2, length, 2)
    windows = 1 if length <= 8 else -(-length // 5)
    window = torch.arange(length) % windows  # by rank: every so many of the scan
    assert max(window.bincount()) <= 8 and max(window.bincount()) - min(window.bincount()) <= 1
    rank = point_order(coords, "column").argsort(-1)
    mask = window[rank][:, :, None] == window[rank][:, None]
    expected = self_attention(layer, queries, coords, mask)
    torch.testing.assert_close(layer(queries, coords).double(), expected, rtol=1e-4, atol=1e-5)


def test_perceiver_alternates_the_orders_of_its_windows():
    layers = LightweightPerceiver(12, 3, 3, 2.0, 0.0).layers
    assert [layer.self_attention.order for layer in layers] == ["hilbert", "row", "hilbert"]


def test_perceiver_gathers_then_exchanges_then_refines():
    torch.manual_seed(0)
    perceiver = LightweightPerceiver(12, 3, 1, 2.0, 0.0)
    (layer,) = perceiver.layers
    queries, coords = torch.randn(2, 5, 12), torch.rand(2, 5, 2)
    inputs, input_coords = torch.randn(2, 4, 12), torch.rand(2, 4, 2)
    expected = queries + layer.cross_attention(queries, coords, inputs, input_coords)
    expected = expected + layer.self_attention(expected, coords)
    expected = expected + layer.mlp(layer.mlp_norm(expected))
    torch.testing.assert_close(perceiver(queries, coords, inputs, input_coords), expected)


@pytest.mark.parametrize("kind", ["v2", "field"])
def test_windows_do_not_depend_on_the_order_of_queries(monkeypatch, kind):
    monkeypatch.setattr(QuerySelfAttention, "FULL", 8)
    monkeypatch.setattr(QuerySelfAttention, "WINDOW", 5)
    model, arguments = tiny_model(kind), field(queries=33, inputs=20)
    velocity = model(**arguments)
    shuffled = torch.stack([torch.randperm(33) for _ in range(2)])[..., None]
    for name in ("noisy_values", "query_coords"):
        arguments[name] = arguments[name].take_along_dim(shuffled, 1)
    torch.testing.assert_close(model(**arguments), velocity.take_along_dim(shuffled, 1), rtol=1e-5, atol=1e-5)


class LargestTensor(TorchDispatchMode):
    """Entries of the largest tensor any operation returns."""

    entries = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor):
                self.entries = max(self.entries, x.untyped_storage().nbytes() // x.element_size())
        return result


@pytest.mark.parametrize("kind", ["v1", "multidir", "v2", "field"])
def test_a_field_of_256_pixels_takes_memory_in_proportion(kind):
    config = dict(d_model=8, num_heads=1, num_layers=2, num_fourier_features=4, d_state=2, expand=1)
    model = tiny_model(kind, **config)
    largest = {}
    for side in (128, 256):
        arguments = field(batch=1, queries=1, inputs=8)
        arguments["query_coords"] = grid_coords(side, side)[None]
        arguments["noisy_values"] = torch.zeros(1, side**2, 3)
        with torch.no_grad(), LargestTensor() as watch:
            assert model(**arguments).isfinite().all()
        largest[side] = watch.entries
    # The largest is (B, K, L, E), all directions of a scan at once: no pair of queries has an entry.
    assert largest[256] <= 100 * 256**2 and largest[256] <= 4.1 * largest[128]


# The spline


@pytest.mark.parametrize("points", [3, 4, 12, 204])
def test_spline_is_scipys(points):
    generator = torch.Generator().manual_seed(points)
    coords = grid_coords(32, 32)[torch.randperm(1024, generator=generator)[:points]]
    values = torch.rand(points, 3, generator=generator) * 2 - 1
    query = torch.cat([grid_coords(32, 32), torch.rand(50, 2, generator=generator)])
    expected = RBFInterpolator(coords.double(), values.double(), kernel="thin_plate_spline")(query.double())
    found = thin_plate_spline(query[None], coords[None], values[None])[0]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), torch.as_tensor(expected), rtol=0, atol=1e-4)


def test_spline_of_a_batch_is_that_of_each(monkeypatch):
    monkeypatch.setattr("nfhelpers.models.spline.BASIS_AT_ONCE", 4 * 7)
    arguments = field(batch=3, queries=9, inputs=12)
    query, coords, values = (arguments[name] for name in ("query_coords", "input_coords", "input_values"))
    together = thin_plate_spline(query, coords, values)
    for i in range(3):
        for j in range(9):
            alone = thin_plate_spline(query[i : i + 1, j : j + 1], coords[i : i + 1], values[i : i + 1])
            torch.testing.assert_close(alone[0, 0], together[i, j])


def test_spline_reproduces_a_plane_and_its_values():
    arguments = field(queries=30, inputs=20)
    coords, query = arguments["input_coords"], arguments["query_coords"]
    slopes = torch.tensor([[0.5, -1.0, 2.0], [1.5, 0.0, -0.3]])
    torch.testing.assert_close(
        thin_plate_spline(query, coords, coords @ slopes), query @ slopes, rtol=0, atol=1e-5
    )
    found = thin_plate_spline(coords, coords, arguments["input_values"])
    torch.testing.assert_close(found, arguments["input_values"], rtol=0, atol=1e-5)


DEGENERATE = {
    "one point": [[0.3, 0.4]],
    "two points": [[0.3, 0.4], [0.5, 0.8]],
    "far corners": [[0.0, 0.0], [1.0, 1.0]],
    "coincident": [[0.3, 0.4]] * 5,
    "coincident pairs": [[0.1, 0.2], [0.1, 0.2], [0.9, 0.3], [0.9, 0.3], [0.4, 0.8]],
    "almost coincident": [[0.3, 0.4], [0.3 + 1e-7, 0.4], [0.3, 0.4 + 1e-7], [0.8, 0.8]],
    "a row": [[(i + 0.5) / 16, 0.3] for i in range(16)],
    "a slanted line": [[(i + 0.5) / 16, 0.1 + 0.7 * (i + 0.5) / 16] for i in range(16)],
}


@pytest.mark.parametrize("name", DEGENERATE)
def test_spline_survives_degenerate_points(name):
    coords = torch.tensor([DEGENERATE[name]])
    query, x = grid_coords(16, 16)[None], coords[..., :1]
    smooth = torch.cat([x, torch.ones_like(x), 1 - x], -1)
    found = thin_plate_spline(query, coords, smooth)
    # Values that vary no faster than x stay near their range; a constant stays constant.
    assert found.isfinite().all() and found.abs().max() < 2
    torch.testing.assert_close(found[..., 1], torch.ones(1, 256), rtol=0, atol=1e-4)
    generator = torch.Generator().manual_seed(0)
    rough = torch.rand((*coords.shape[:2], 3), generator=generator)
    assert thin_plate_spline(query, coords, rough).isfinite().all()


def test_spline_averages_coinciding_points_and_is_level_across_a_line():
    query = torch.tensor([[[0.3, 0.4], [0.9, 0.9]]])
    mean = thin_plate_spline(query, torch.tensor([[[0.3, 0.4]] * 2]), torch.tensor([[[0.0], [1.0]]]))
    torch.testing.assert_close(mean, torch.full((1, 2, 1), 0.5), rtol=0, atol=1e-5)
    row = torch.tensor([DEGENERATE["a row"]])
    across = torch.tensor([[[0.4, 0.1], [0.4, 0.3], [0.4, 0.9]]])
    found = thin_plate_spline(across, row, row[..., :1])  # the plane x, whatever y
    torch.testing.assert_close(found, torch.full((1, 3, 1), 0.4), rtol=0, atol=1e-4)


def test_spline_is_solved_in_float64_whatever_the_dtype():
    arguments = field(queries=20, inputs=30)
    points = [arguments[name] for name in ("query_coords", "input_coords", "input_values")]
    exact = thin_plate_spline(*(x.double() for x in points))
    assert exact.dtype == torch.float64
    torch.testing.assert_close(thin_plate_spline(*points).double(), exact, rtol=0, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(thin_plate_spline(*points).double(), exact, rtol=0, atol=1e-6)
    rough = thin_plate_spline(*(x.bfloat16() for x in points))  # these coordinates are exact in bfloat16
    assert rough.dtype == torch.bfloat16 and (rough - exact).abs().max() < 0.05


def test_gradients_of_the_spline_are_its_weights():
    arguments = field(batch=1, queries=5, inputs=12)
    query, coords = arguments["query_coords"], arguments["input_coords"]
    values = arguments["input_values"].double().requires_grad_()
    torch.autograd.gradcheck(lambda v: thin_plate_spline(query, coords, v), values)
    (weights,) = torch.autograd.grad(thin_plate_spline(query, coords, values)[0, 0, 0], values)
    # Weights on the observed values reproduce constants.
    torch.testing.assert_close(weights[0, :, 0].sum().item(), 1.0, rtol=0, atol=1e-6)


# Every model


@every_model
def test_a_new_model_is_the_linear_prediction(kind):
    arguments = field()
    velocity = tiny_model(kind, trained=False)(**arguments)
    assert torch.equal(velocity, linear_part(kind, arguments))


@every_model
def test_at_time_zero_the_noise_cancels_but_for_the_network(kind):
    arguments = {**field(), "t": torch.zeros(2)}
    estimate = arguments["noisy_values"] + tiny_model(kind, trained=False)(**arguments)
    torch.testing.assert_close(estimate, start_of(kind, arguments), rtol=0, atol=1e-6)


@every_model
@pytest.mark.parametrize("seed", range(3))
def test_observed_points_are_a_set_and_queries_keep_their_places(kind, seed):
    model, arguments = tiny_model(kind), field(queries=20, inputs=30, seed=seed)
    velocity = model(**arguments)
    shuffled = torch.stack([torch.randperm(30) for _ in range(2)])[..., None]
    for name in ("input_coords", "input_values"):
        arguments[name] = arguments[name].take_along_dim(shuffled, 1)
    torch.testing.assert_close(model(**arguments), velocity, rtol=1e-5, atol=1e-5)
    shuffled = torch.stack([torch.randperm(20) for _ in range(2)])[..., None]
    for name in ("noisy_values", "query_coords"):
        arguments[name] = arguments[name].take_along_dim(shuffled, 1)
    torch.testing.assert_close(model(**arguments), velocity.take_along_dim(shuffled, 1), rtol=1e-5, atol=1e-5)


@every_model
def test_samples_of_a_batch_are_independent(kind):
    model, arguments = tiny_model(kind), field(batch=3)
    velocity = model(**arguments)
    for index in range(3):
        alone = model(**{name: x[index : index + 1] for name, x in arguments.items()})
        torch.testing.assert_close(alone, velocity[index : index + 1], rtol=1e-5, atol=1e-5)


@every_model
@pytest.mark.parametrize("queries", [9, 33])  # in one window, and in several
def test_prepared_conditions_serve_every_evaluation(monkeypatch, kind, queries):
    monkeypatch.setattr(QuerySelfAttention, "FULL", 8 if queries > 9 else 4096)
    monkeypatch.setattr(QuerySelfAttention, "WINDOW", 5)
    model, arguments = tiny_model(kind), field(queries=queries, inputs=20)
    points = [arguments[name] for name in ("query_coords", "input_coords", "input_values")]
    conditions = model.prepare(*points)
    for t in (0.1, 0.6):
        arguments |= {"t": torch.full((2,), t), "noisy_values": torch.randn(2, queries, 3)}
        assert torch.equal(model(**arguments, conditions=conditions), model(**arguments))
    other = model.prepare(points[0], points[1], -points[2])
    assert (model(**arguments, conditions=other) - model(**arguments)).abs().max() > 1e-3  # they are used


@every_model
def test_with_conditions_nothing_of_the_points_is_computed(monkeypatch, kind):
    model, arguments = tiny_model(kind), field()
    points = [arguments[name] for name in ("query_coords", "input_coords", "input_values")]
    conditions = model.prepare(*points)

    def again(*given):
        raise AssertionError("computed again")

    for name in ("point_order", "inverse_order", "thin_plate_spline"):
        monkeypatch.setattr(fields_module, name, again)
    model.fourier.register_forward_pre_hook(again)
    for layer in getattr(getattr(model, "perceiver", None), "layers", ()):
        for attention in (layer.cross_attention, layer.self_attention):
            attention.rotary.register_forward_pre_hook(again)
    assert model(**arguments, conditions=conditions).isfinite().all()
    with pytest.raises(AssertionError, match="computed again"):
        model(**arguments)


@every_model
@pytest.mark.parametrize("name", ARGUMENTS)
def test_every_argument_matters(kind, name):
    # Beyond the linear part: the network itself reads every argument.
    def residual(arguments):
        return model(**arguments) - linear_part(kind, arguments)

    model, arguments = tiny_model(kind), field()
    changed = {**arguments, name: (arguments[name] * 0.9).contiguous()}
    assert (residual(changed) - residual(arguments)).abs().max() > 1e-5


@every_model
def test_gradient_reaches_every_parameter(kind):
    model = tiny_model(kind).train()
    model(**field()).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@every_model
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gradient_checkpointing_changes_no_gradient(kind, dropout):
    grads = {}
    for recompute in (False, True):
        model = tiny_model(kind, dropout=dropout).train()
        model.gradient_checkpointing = recompute
        calls, layers = [], [layer for stack in LAYERS[type_of(kind)](model) for layer in stack]
        for layer in layers:
            layer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(3)
        model(**field()).square().sum().backward()
        assert len(calls) == len(layers) * (2 if recompute else 1)
        grads[recompute] = [p.grad for p in model.parameters()]
    for plain, recomputed in zip(grads[False], grads[True], strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-6, atol=1e-7)


@every_model
def test_dropout_acts_in_training_only(kind):
    model, arguments = tiny_model(kind, dropout=0.5), field()
    assert torch.equal(model(**arguments), model(**arguments))
    model.train()
    assert not torch.allclose(model(**arguments), model(**arguments))


@every_model
def test_inference_mode_equals_training_mode_without_dropout(kind):
    # PyTorch's encoder layer takes another path in eval mode without gradients.
    model, arguments = tiny_model(kind), field()
    expected = model.train()(**arguments)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**arguments), expected, rtol=1e-4, atol=1e-5)


@every_model
@pytest.mark.parametrize("scale", [2.0, 10.0])
def test_bfloat16_autocast_is_close_to_float32(kind, scale):
    model, arguments = tiny_model(kind, fourier_scale=scale), field()
    exact = model(**arguments)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(**arguments)
    assert rough.dtype == torch.float32 and rough.isfinite().all()
    assert (rough - exact).norm() < 0.03 * (exact - linear_part(kind, arguments)).norm()
    with torch.autocast("cpu", torch.bfloat16):
        model.train()(**arguments).square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in model.parameters())


@every_model
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-4), (torch.bfloat16, 0.1), (torch.float16, 0.02)]
)
def test_a_model_of_another_dtype_gives_that_dtype(kind, dtype, tolerance):
    model, arguments = tiny_model(kind), field()
    exact = model(**arguments)
    rough = model.to(dtype)(**{name: x.to(dtype) for name, x in arguments.items()})
    assert rough.dtype == dtype
    assert (rough.double() - exact).norm() < tolerance * exact.norm()


@every_model
def test_the_residual_stream_stays_float32_under_autocast(kind):
    model, dtypes, lost = tiny_model(kind), [], []

    def look(_, arguments):
        tokens = arguments[0]
        dtypes.append(tokens.dtype)
        lost.append((tokens - tokens.bfloat16()).abs().max().item())

    stacks = LAYERS[type_of(kind)](model)
    for stack in stacks:
        for layer in stack:
            layer.register_forward_pre_hook(look)
    model.decoder.register_forward_pre_hook(look)
    with torch.autocast("cpu", torch.bfloat16):
        model.train()(**field())
    assert set(dtypes) == {torch.float32}
    assert lost[-1] > 0 and sum(x == 0 for x in lost) <= len(
        stacks
    )  # not merely bfloat16 numbers in float32 tensors


@every_model
def test_one_query_and_one_observed_point(kind):
    velocity = tiny_model(kind)(**field(queries=1, inputs=1))
    assert velocity.shape == (2, 1, 3) and velocity.isfinite().all()


WRONG_SHAPES = {
    "noisy_values": [(2, 9, 4), (2, 8, 3), (3, 9, 3), (9, 3)],
    "query_coords": [(2, 9, 3), (2, 8, 2), (3, 9, 2)],
    "t": [(2, 1), (3,), (), (1,)],
    "input_coords": [(2, 7, 3), (2, 6, 2), (3, 7, 2)],
    "input_values": [(2, 7, 1), (2, 6, 3), (3, 7, 3)],
}


@every_model
@pytest.mark.parametrize(
    ("name", "shape"), [(name, shape) for name, shapes in WRONG_SHAPES.items() for shape in shapes]
)
def test_wrong_shapes_are_named(kind, name, shape):
    arguments = {**field(), name: torch.zeros(shape)}
    with pytest.raises(ValueError, match=rf"{name}.*\(B, Nq, 3\)"):
        tiny_model(kind)(**arguments)


@every_model
@pytest.mark.parametrize("name", ["query_coords", "input_coords", "input_values"])
def test_wrong_ranks_are_named(kind, name):
    arguments = field()
    with pytest.raises(ValueError, match=name):
        tiny_model(kind)(**{**arguments, name: arguments[name][0, 0]})


@every_model
@pytest.mark.parametrize("name", ARGUMENTS)
def test_wrong_dtypes_are_named(kind, name):
    arguments = field()
    with pytest.raises(ValueError, match=rf"{name} has dtype torch.int64"):
        tiny_model(kind)(**{**arguments, name: arguments[name].long()})


@every_model
@pytest.mark.parametrize(
    ("sizes", "name"),
    [(dict(batch=0), "noisy_values"), (dict(queries=0), "noisy_values"), (dict(inputs=0), "input_coords")],
)
def test_empty_fields_are_refused(kind, sizes, name):
    shape = dict(batch=2, queries=3, inputs=4) | sizes
    batch, queries, inputs = shape["batch"], shape["queries"], shape["inputs"]
    with pytest.raises(ValueError, match=rf"{name} is empty"):
        tiny_model(kind)(
            torch.zeros(batch, queries, 3),
            torch.zeros(batch, queries, 2),
            torch.zeros(batch),
            torch.zeros(batch, inputs, 2),
            torch.zeros(batch, inputs, 3),
        )


# What is special to each model


def test_mamba_scans_in_the_order_of_the_config():
    arguments = field(queries=20, inputs=30)
    row, column = (tiny_model("v1", order=order) for order in ("row", "column"))
    difference = (row(**arguments) - column(**arguments)).abs().max()
    assert difference > 1e-4
    # Mirrored at the diagonal, rows are columns: with mirrored frequencies the two models agree.
    mirrored = {name: x.flip(-1) if "coords" in name else x for name, x in arguments.items()}
    column.fourier.frequencies.copy_(row.fourier.frequencies.flip(0))
    column.cross_attention.rotary.frequencies.copy_(row.cross_attention.rotary.frequencies.flip(0))
    torch.testing.assert_close(column(**mirrored), row(**arguments), rtol=1e-4, atol=1e-5)


def test_local_field_sees_its_nearest_observed_points_only():
    model, arguments = tiny_model("local", neighbours=4), field(queries=10, inputs=20)
    velocity = model(**arguments)
    distance = torch.cdist(arguments["query_coords"], arguments["input_coords"])  # (B, Q, I)
    fourth = distance.sort(-1).values[..., 3]
    for point in range(20):
        values = arguments["input_values"].clone()
        values[:, point] += 1
        change = (model(**{**arguments, "input_values": values}) - velocity).abs().amax(-1)  # (B, Q)
        # Points as far as the fourth may tie with it; nearer ones matter, farther ones do not at all.
        assert (change[distance[..., point] > fourth + 1e-6] == 0).all()
        assert (change[distance[..., point] < fourth - 1e-6] > 1e-6).all()


def test_local_field_does_not_depend_on_other_queries():
    model, arguments = tiny_model("local"), field()
    velocity = model(**arguments)
    first = {**arguments, **{name: arguments[name][:, :1] for name in ("noisy_values", "query_coords")}}
    torch.testing.assert_close(model(**first), velocity[:, :1], rtol=1e-5, atol=1e-5)


def test_local_field_is_invariant_to_translation():
    model = tiny_model("local")
    arguments = {name: x / 2 if "coords" in name else x for name, x in field().items()}  # stays in [0, 1]
    moved = {name: x + 0.125 if "coords" in name else x for name, x in arguments.items()}
    torch.testing.assert_close(model(**moved), model(**arguments), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "least", "most"),
    [
        ("v1", 15e6, 21e6),
        ("multidir", 4 * 19e6, 5 * 20e6),  # seed 001: about four times v1
        ("v2", 6.5e6, 8.5e6),  # seed 003: about 7M
    ],
)
def test_default_models_have_the_size_of_their_seeds(kind, least, most):
    model_class, config_class = FIELD_MODELS[kind]
    with torch.device("meta"):
        model = model_class(config_class())
    assert least < sum(p.numel() for p in model.parameters()) < most
    assert {p.device.type for p in model.parameters()} == {"meta"}


V1_PHOTOS = [[-1.3156, -0.7353, 1.6809], [0.2009, 1.8330, 2.7000]]
"""What it computed when it was trained."""


def test_the_shipped_v1_model_computes_what_it_always_did(repository):
    arguments = field(queries=3, inputs=24, seed=5)
    arguments["t"] = torch.tensor([0.0, 0.6])
    with torch.no_grad():
        velocity = load_model(repository / "checkpoints" / "v1-photos")(**arguments)
    torch.testing.assert_close(velocity[:, 0], torch.tensor(V1_PHOTOS), rtol=0, atol=2e-4)


# The flow from the spline


def test_an_untrained_field_is_the_interpolator():
    """Its posterior mean is the spline, from any noise: the model never starts below it."""
    generator = torch.Generator().manual_seed(0)
    query = grid_coords(32, 32)
    pixels = torch.randperm(1024, generator=generator)[:204]
    # Smooth, within [-1, 1], so that clamping changes nothing.
    values = 0.8 * torch.sin(4 * query[pixels][None] @ torch.randn(2, 2, 3, generator=generator))
    arguments = (query.expand(2, -1, -1), query[pixels].expand(2, -1, -1), values)
    expected = torch.stack(
        [
            torch.as_tensor(
                RBFInterpolator(query[pixels].double(), v.double(), kernel="thin_plate_spline")(
                    query.double()
                )
            )
            for v in values
        ]
    )
    model = tiny_model("field", trained=False)
    mean, std = posterior_mean(model, *arguments, draws=2, generator=generator)
    torch.testing.assert_close(mean.double(), expected.clamp(-1, 1), rtol=0, atol=1e-4)
    assert std.max() < 1e-5


def test_an_untrained_field_samples_a_gaussian_around_the_interpolator():
    model, arguments = tiny_model("field", trained=False), field(queries=9, inputs=40)
    points = [arguments[name] for name in ("query_coords", "input_coords", "input_values")]
    start = torch.full_like(arguments["noisy_values"], 0.4)
    points[2] = torch.full_like(points[2], 0.4)
    noise = torch.randn(start.shape, generator=torch.Generator().manual_seed(7))
    drawn = sample(model, *points, steps=200, generator=torch.Generator().manual_seed(7))
    # dr/dt = skip_weight r is solved by r proportional to sqrt(V), which falls from 1 to residual_std.
    torch.testing.assert_close(drawn, (start + 0.15 * noise).clamp(-1, 1), rtol=0, atol=2e-3)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.7, 0.95, 1.0])
def test_what_a_field_has_to_learn_is_of_unit_scale_and_uncorrelated(t):
    model, arguments = tiny_model("field", trained=False), field(batch=400, queries=20, inputs=20)
    arguments["t"] = torch.full((400,), t)
    seen = []
    model.query_embedding.value_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    start = start_of("field", arguments)
    noise, spread = torch.randn_like(start), 0.15 * torch.randn_like(start)
    arguments["noisy_values"] = interpolate(noise, start + spread, torch.tensor(t))
    scale = math.hypot(1 - t, 0.15 * t)
    left = (target_velocity(noise, start + spread) - model(**arguments)) * scale / 0.15
    assert left.std().item() == pytest.approx(1, abs=0.03)  # of 24,000 values: standard error 0.005
    rest = seen[0][..., :3]
    assert rest.std().item() == pytest.approx(1, abs=0.03)
    # What the network has to learn of white Gaussian data is nothing.
    order = point_order(arguments["query_coords"], "row")[..., None]
    assert abs((left.take_along_dim(order, 1) * rest).mean().item()) < 0.03


@pytest.mark.parametrize("t", [0.0, 0.5, 1.0])
def test_the_loss_of_a_field_is_that_of_its_network(t):
    """Of an untrained model and data around the spline it is 1 at every t; unweighted it is s^2 / V."""
    model, arguments = tiny_model("field", trained=False), field(batch=400, queries=20, inputs=20)
    batch = {name: x for name, x in arguments.items() if name not in ("noisy_values", "t")}
    start = start_of("field", arguments)
    batch["query_values"] = start + 0.15 * torch.randn_like(start)
    options = dict(t=torch.full((400,), t), noise=torch.randn_like(start))
    weighted = flow_matching_loss(model, batch, **options, weight=model.loss_weight).item()
    assert weighted == pytest.approx(1, abs=0.05)
    variance = (1 - t) ** 2 + (0.15 * t) ** 2
    assert flow_matching_loss(model, batch, **options).item() == pytest.approx(weighted * 0.15**2 / variance)
    assert train._Objective(model)(batch, **options).item() == pytest.approx(weighted)


@pytest.mark.parametrize(("kind", "std"), [("field", 0.15), ("field plain", 0.5)])
def test_the_network_corrects_the_interpolator_in_units_of_what_is_left(kind, std):
    model, arguments = tiny_model(kind, trained=False), field()
    with torch.no_grad():
        model.decoder[-1].bias.fill_(1)
    difference = model(**arguments) - linear_part(kind, arguments)
    expected = [std / math.hypot(1 - t, std * t) for t in arguments["t"].tolist()]
    torch.testing.assert_close(difference, torch.tensor(expected)[:, None, None].expand_as(difference))


# From v1


@pytest.mark.parametrize("kind", ["multidir", "v2", "field"])
def test_shared_components_are_copied_from_v1(kind):
    v1, model = tiny_model("v1"), tiny_model(kind, trained=False)
    with torch.no_grad():
        v1.fourier.frequencies.normal_()
        for parameter in v1.parameters():
            parameter.normal_()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    copied = initialise_from_v1(model, v1)
    assert {"fourier.frequencies", "input_embedding.value_proj.weight", "time.mlp.0.weight"} <= set(copied)
    assert ("query_embedding.value_proj.weight" in copied) == (kind != "field")  # it takes the spline, too
    for name, x in model.state_dict().items():
        assert torch.equal(x, v1.state_dict()[name] if name in copied else before[name]), name
    arguments = field()
    assert torch.equal(model(**arguments), linear_part(kind, arguments))  # the output layer stays zero


def test_a_v1_of_another_width_is_refused():
    with pytest.raises(
        ValueError, match=r"nothing of the v1 model \(d_model=32.*pass a v1 model of d_model=16"
    ):
        initialise_from_v1(tiny_model("v2"), tiny_model("v1", d_model=32, num_fourier_features=5))


# Presets


@pytest.mark.parametrize("preset", run.PRESETS)
@pytest.mark.parametrize("kind", ["multidir", "v2", "field"])
def test_presets_are_legal_and_of_the_size_of_v1s(kind, preset):
    counts = {}
    for name in ("v1", kind):
        settings = run.load_settings(name, preset)
        model_class, config_class = FIELD_MODELS[name]
        with torch.device("meta"):
            model = model_class(config_class(**settings["model"]))
        counts[name] = sum(p.numel() for p in model.parameters())
        train.TrainConfig(output_dir="unused", **settings["train"])
    assert {"source", "size", "observed", "queries", "train_images", "validation_images"} == settings[
        "data"
    ].keys()
    if preset == "demo":
        assert 0.8 < counts[kind] / counts["v1"] < 1.25


# Configs


@every_model
def test_configs_are_frozen_and_strict(kind):
    config = tiny_config(kind)
    with pytest.raises(FrozenInstanceError):
        config.d_model = 32
    with pytest.raises(ValueError, match=r"unknown .* keys \['widht'\]; legal keys are .*d_model"):
        type(config).from_dict({"d_model": 16, "widht": 3})
    with pytest.raises(ValueError, match="model_type='other'"):
        type(config).from_dict({"model_type": "other"})
    assert type(config).from_dict({"model_type": type_of(kind), **TINY[kind]}) == config


SIZES = "d_model num_layers num_fourier_features num_heads fourier_scale mlp_ratio"
POSITIVE = {
    "v1": f"{SIZES} d_state expand",
    "multidir": f"{SIZES} d_state expand",
    "v2": f"{SIZES} d_state expand perceiver_iterations",
    "field": f"{SIZES} d_state expand perceiver_iterations residual_std",
    "local": f"{SIZES} neighbours",
}


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in POSITIVE for name in POSITIVE[kind].split()]
)
@pytest.mark.parametrize("value", [0, -1, "8", None, True, math.nan])
def test_sizes_must_be_positive_numbers(kind, name, value):
    with pytest.raises(ValueError, match=f"{name}="):
        tiny_config(kind, **{name: value})


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (kind, name)
        for kind in POSITIVE
        for name in POSITIVE[kind].split()
        if name not in ("fourier_scale", "mlp_ratio", "residual_std")
    ],
)
def test_counts_must_be_whole(kind, name):
    with pytest.raises(ValueError, match=f"{name}=2.5"):
        tiny_config(kind, **{name: 2.5})


@every_model
def test_widths_must_divide_and_dropout_be_a_fraction(kind):
    with pytest.raises(ValueError, match="divisible by num_heads=3"):
        tiny_config(kind, num_heads=3)
    with pytest.raises(ValueError, match="d_model=15 must be even"):
        tiny_config(kind, d_model=15, num_heads=1)
    for dropout in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"dropout=.* is outside \[0, 1\)"):
            tiny_config(kind, dropout=dropout)


@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_an_unknown_scan_order_is_refused(kind):
    with pytest.raises(ValueError, match=r"'spiral'.*row"):
        tiny_config(kind, order="spiral")


@pytest.mark.parametrize("kind", ["multidir", "field"])
def test_orders_are_different_orders_of_points(kind):
    with pytest.raises(ValueError, match=r"orders='spiral'.*row"):
        tiny_config(kind, orders=("row", "spiral"))
    for orders in ((), ("row", "row"), "row"):
        with pytest.raises(ValueError, match=r"orders=.*sequence of different orders; pass some of .*row"):
            tiny_config(kind, orders=orders)
    assert tiny_config(kind, orders=["row", "hilbert"]) == tiny_config(kind, orders=("row", "hilbert"))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *((kind, "tied_decay") for kind in ("v1", "multidir", "v2", "field")),
        *((kind, "shared_weights") for kind in ("multidir", "field")),
        *(("field", name) for name in ("bidirectional", "spline_source")),
    ],
)
def test_flags_must_be_bools(kind, name):
    with pytest.raises(ValueError, match=f"{name}=1 is a int; pass True or False"):
        tiny_config(kind, **{name: 1})


def test_v2_halves_its_layers():
    with pytest.raises(ValueError, match="num_layers=7 is odd.*pass 8"):
        tiny_config("v2", num_layers=7)
    model = tiny_model("v2", num_layers=6)
    assert [len(stack) for stack in LAYERS["v2"](model)] == [3, 3, 2]


# Saving and loading


@every_model
def test_a_saved_model_loads_bitwise(kind, tmp_path):
    model, arguments = tiny_model(kind), field()
    model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings == json.loads(json.dumps({"model_type": type_of(kind), **vars(model.config)}))
    for loaded in (load_model(tmp_path), type(model).from_pretrained(tmp_path)):
        assert type(loaded) is type(model) and loaded.config == model.config and not loaded.training
        assert loaded.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(x, loaded.state_dict()[name]) for name, x in model.state_dict().items())
        assert torch.equal(loaded(**arguments), model(**arguments))


@every_model
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_load_as_float32(kind, dtype, tmp_path):
    model = tiny_model(kind)
    rounded = {name: x.to(dtype) for name, x in model.state_dict().items()}
    model.save_pretrained(tmp_path)
    save_file(rounded, tmp_path / "model.safetensors")
    loaded = load_model(tmp_path).state_dict()
    assert {x.dtype for x in loaded.values()} == {torch.float32}
    assert all(torch.equal(loaded[name], x.float()) for name, x in rounded.items())
    assert load_model(tmp_path)(**field()).dtype == torch.float32


@every_model
def test_missing_extra_and_damaged_weights_are_errors(kind, tmp_path):
    tiny_model(kind).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)

    save_file({name: x for name, x in weights.items() if name != "decoder.3.bias"}, path)
    with pytest.raises(ValueError, match=r"model\.safetensors.*Missing key.*decoder\.3\.bias"):
        load_model(tmp_path)
    save_file({**weights, "surplus": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"model\.safetensors.*Unexpected key.*surplus"):
        load_model(tmp_path)
    save_file({**weights, "decoder.3.bias": torch.zeros(4)}, path)
    with pytest.raises(ValueError, match=r"model\.safetensors.*decoder\.3\.bias"):
        load_model(tmp_path)
    save_file(weights, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors.*damaged"):
        load_model(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=r"no model\.safetensors"):
        load_model(tmp_path)


@every_model
def test_pickled_weights_are_never_read(kind, tmp_path):
    model = tiny_model(kind)
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"no model\.safetensors"):
        load_model(tmp_path)


def test_wrong_configs_on_disk_are_errors(tmp_path):
    with pytest.raises(ValueError, match=r"absent.*holds no config\.json"):
        load_model(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match=r"no config\.json"):
        MambaDiffusion.from_pretrained(tmp_path)
    tiny_model("v1").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type='v1', not 'local'"):
        LocalImplicitField.from_pretrained(tmp_path)
    path = tmp_path / "config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "depth": 3}))
    with pytest.raises(ValueError, match=r"unknown MambaDiffusionConfig keys \['depth'\]"):
        load_model(tmp_path)
    path.write_text(json.dumps({**settings, "d_model": 0}))
    with pytest.raises(ValueError, match="d_model=0"):
        load_model(tmp_path)
    path.write_text(json.dumps({**settings, "model_type": "v9"}))
    with pytest.raises(
        ValueError, match=r"model_type='v9'; legal types are \['diffae', .*'localmamba', .*'v1', 'v2'\]"
    ):
        load_model(tmp_path)
    path.write_text(json.dumps(TINY["v1"]))
    with pytest.raises(ValueError, match="model_type=None"):
        load_model(tmp_path)


def test_field_models_are_listed_by_their_type():
    assert FIELD_MODELS == {
        "v1": (MambaDiffusion, MambaDiffusionConfig),
        "multidir": (MultiDirectionalMambaDiffusion, MultiDirectionalMambaDiffusionConfig),
        "v2": (MambaDiffusionV2, MambaDiffusionV2Config),
        "field": (MambaField, MambaFieldConfig),
        "local": (LocalImplicitField, LocalImplicitFieldConfig),
        "diffae": (MambaDiffusionAutoencoder, MambaDiffusionAutoencoderConfig),
        "minimal": (MinimalLatentMamba, MinimalLatentMambaConfig),
    }


@pytest.mark.parametrize("name", ["t", "query_coords", "input_coords"])
@pytest.mark.parametrize("value", [-0.25, 1.5, float("nan")])
@pytest.mark.parametrize("kind", sorted({type_of(kind) for kind in TINY}))
def test_times_and_coordinates_outside_the_unit_interval_are_refused(kind, name, value):
    arguments = field()
    arguments[name] = arguments[name].clone()
    arguments[name].view(-1)[-1] = value
    with pytest.raises(ValueError, match=rf"{name} spans .* in \[0, 1\]"):
        tiny_model(kind)(**arguments)


def test_neighbourhoods_beyond_what_attention_takes_at_once(monkeypatch):
    model, arguments = tiny_model("local"), field()
    whole = model(**arguments)
    monkeypatch.setattr(fields_module, "MOST_SEQUENCES", 5)
    calls = []
    model.layers[0].register_forward_hook(lambda layer, inputs, output: calls.append(len(output)))
    torch.testing.assert_close(model(**arguments), whole, rtol=1e-6, atol=1e-6)
    assert 1 < len(calls) and max(calls) <= 5 and sum(calls) == whole.shape[0] * whole.shape[1]


def test_ranges_are_not_read_back_from_another_device():
    """On the meta device reading a value back is an error: shapes alone must do."""
    check_shapes(**{name: x.to("meta") for name, x in field().items()})


def test_a_run_folder_names_the_models_inside(tmp_path):
    for name in ("best", "latest"):
        tiny_model("v1").save_pretrained(tmp_path / name)
    with pytest.raises(ValueError, match=r"is not itself a saved model, but holds .*best.*latest"):
        load_model(tmp_path)
    assert load_model(tmp_path / "best").config == tiny_model("v1").config


@pytest.mark.parametrize(
    "path", ["checkpoints/missing", "runs/v1/best", "./x", "../x", "/no/such", Path("x/y")]
)
def test_a_path_that_is_no_folder_is_not_asked_from_the_hub(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub_mixin, "hf_hub_download", lambda **_: pytest.fail("asked the hub"))
    with pytest.raises(ValueError, match="is not a folder; pass one written by save_pretrained"):
        MambaDiffusion.from_pretrained(path)
