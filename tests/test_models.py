"""Velocity fields of sparse pixels and their parts: embeddings, selective scans, attention, the spline."""

import itertools
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.interpolate import RBFInterpolator
from torch import nn
from torch.nn import functional as F

from nfhelpers import evaluate
from nfhelpers.flow import flow_matching_loss, skip_weight
from nfhelpers.images import grid_coords
from nfhelpers.kernels.orders import inverse_order
from nfhelpers.kernels.reference import selective_scan_reference
from nfhelpers.models import FIELD_MODELS, initialise_from_v1, load_model
from nfhelpers.models.base import Layers, evaluation_mode
from nfhelpers.models.field import Hats
from nfhelpers.models.layers import FourierFeatures, RMSNorm
from nfhelpers.models.perceiver import (
    CrossAttention,
    LightweightPerceiver,
    QuerySelfAttention,
    RotaryCoordinates,
    relative_attention,
)
from nfhelpers.models.spline import thin_plate_spline
from nfhelpers.models.ssm import BidirectionalMamba, MultiDirectionalSSM, SelectiveSSM
from nfhelpers.samplers import posterior_mean, sample

SMALL = dict(d_model=16, num_layers=2, num_fourier_features=8, fourier_scale=2.0, num_heads=2)
LATTICE = dict(nodes=8, scans=2, d_state=4, d_time=16)
AUTOENCODER = dict(LATTICE, widths=(8, 12), blocks=(1, 2), latent_dim=6, d_node=3)
TINY = {
    "v1": dict(SMALL, d_state=4),
    "multidir": dict(SMALL, d_state=4),
    "multidir shared": dict(SMALL, d_state=4, shared_weights=True),
    "v2": dict(SMALL, d_state=4),
    "field": dict(LATTICE, widths=(8, 12), blocks=(1, 2)),
    "field finer": dict(LATTICE, widths=(6, 8, 12), blocks=(1, 1, 2), finer=1),
    "diffae": AUTOENCODER,
    "diffae second": dict(AUTOENCODER, phase=2),
}
"""Settings of each model, by its type and, after a blank, a variant of it."""
every_model = pytest.mark.parametrize("kind", sorted(TINY))
TOKENS = [kind for kind in sorted(TINY) if kind.split()[0] in ("v1", "multidir", "v2")]
every_network = pytest.mark.parametrize("kind", [kind for kind in sorted(TINY) if "diffae" not in kind])


def tiny_config(kind, **settings):
    return FIELD_MODELS[kind.split()[0]][1](**{**TINY[kind], **settings})


def tiny_model(kind, trained=True, **settings):
    """A small model in eval mode; `trained` moves what starts at zero away from it."""
    torch.manual_seed(0)
    model = FIELD_MODELS[kind.split()[0]][0](tiny_config(kind, **settings)).eval()
    return away_from_zero(model) if trained else model


def away_from_zero(module, std=0.5):
    """Draw the parameters that are zero, such as the last layers of residual branches."""
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.any():
                parameter.normal_(std=std)
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


def points_of(arguments):
    return [arguments[name] for name in ("query_coords", "input_coords", "input_values")]


def start_of(kind, arguments):
    """Where the flow of an untrained model ends."""
    if "field" not in kind:
        return torch.zeros_like(arguments["noisy_values"])
    return thin_plate_spline(*points_of(arguments)).clamp(-1, 1)


def linear_part(kind, arguments):
    """The velocity of an untrained model."""
    start, t = start_of(kind, arguments), arguments["t"][:, None, None]
    return start + skip_weight(t, 0.15 if "field" in kind else 0.5) * (arguments["noisy_values"] - t * start)


def assert_equal_with_gradients(found, expected, inputs):
    """Within the rounding of the recurrence's parameters to float32."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    grads, wanted = (torch.autograd.grad(x.square().sum(), inputs) for x in (found, expected))
    torch.testing.assert_close(grads, wanted, rtol=1e-4, atol=1e-5)


def test_rms_norm_computes_in_the_type_of_its_weights():
    norm, x = RMSNorm(6, eps=1e-6).double(), torch.randn(5, 6, dtype=torch.float64)
    nn.init.normal_(norm.weight)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected, atol=1e-12, rtol=0)
    assert norm.float()(x.bfloat16()).dtype == torch.bfloat16


def test_fourier_features_are_a_gaussian_kernel_also_under_autocast():
    torch.manual_seed(0)
    scale, count, coords = 0.7, 20_000, torch.rand(1, 12, 2)
    features = FourierFeatures(count, scale)(coords)
    kernel = (features @ features.mT / count)[0]
    expected = torch.exp(-2 * math.pi**2 * scale**2 * torch.cdist(coords, coords)[0].square())
    # The mean of `count` cosines, each within [-1, 1]: a standard error below 0.0071.
    assert (kernel - expected).abs().max() < 0.03 and expected.min() < 0.1
    # At scale 10 a phase is some hundred radians: rounded to bfloat16 it would be wrong by half a radian.
    layer = FourierFeatures(64, 10.0)
    phase = 2 * math.pi * coords.double() @ layer.frequencies.double()
    with torch.autocast("cpu", torch.bfloat16):
        assert (layer(coords) - torch.cat([phase.cos(), phase.sin()], -1)).abs().max() < 1e-2


@pytest.mark.parametrize("tied", [False, True])
def test_ssm_is_the_selective_scan_of_its_projections(tied):
    torch.manual_seed(0)
    layer = SelectiveSSM(6, 3, 2, tied).double()
    with torch.no_grad():
        layer.A_log.add_(0.3 * torch.randn_like(layer.A_log))
        layer.D.normal_()
    tokens = torch.randn(2, 11, 6, dtype=torch.float64, requires_grad=True)
    x, z = layer.in_proj(tokens).chunk(2, -1)
    x = F.silu(x)
    low, B, C = layer.x_proj(x).split([layer.dt_rank, 3, 3], -1)
    u, delta, B, C = (values.mT for values in (x, layer.dt_proj(low), B, C))
    rates = -layer.A_log.exp()
    y = selective_scan_reference(u, delta, rates, B, C, layer.D, None, layer.dt_bias, True, tied_decay=tied)
    expected, found = layer.out_proj(y.mT * F.silu(z)), layer(tokens)
    assert_equal_with_gradients(found, expected, [tokens, *layer.parameters()])


@pytest.mark.parametrize(
    ("shared", "bidirectional", "tied"), [(False, True, False), (True, True, True), (False, False, True)]
)
def test_directional_ssm_equals_scans_of_permuted_copies(shared, bidirectional, tied):
    torch.manual_seed(0)
    layer = MultiDirectionalSSM(6, 3, 2, 2, shared, bidirectional, tied, 0.0).double()
    with torch.no_grad():
        layer.A_log.add_(0.3 * torch.randn_like(layer.A_log))
        layer.D.normal_()
    tokens = torch.randn(2, 11, 6, dtype=torch.float64, requires_grad=True)
    orders = torch.rand(2, 2, 11).argsort(-1).repeat(1, layer.ways, 1)
    x, z = layer.in_proj(tokens).chunk(2, -1)
    x = F.silu(x)
    projected = layer.x_proj(x).unflatten(-1, (layer.sets, -1))  # (B, L, S, R+2N)
    parts = []
    for direction in range(orders.shape[1]):
        s = 0 if shared else direction
        order = orders[:, direction]
        order = order.flip(-1) if direction >= 2 else order  # the second half walks backwards
        low, B, C = projected[:, :, s].split([layer.dt_rank, 3, 3], -1)
        carried = (x, low @ layer.dt_weight[s].T, B, C)  # then (B, C, L), along the order
        u, delta, B, C = (values.take_along_dim(order[..., None], 1).mT for values in carried)
        rates, bias = -layer.A_log[s].exp(), layer.dt_bias[s]
        y = selective_scan_reference(u, delta, rates, B, C, layer.D[s], None, bias, True, tied_decay=tied)
        parts.append(torch.zeros_like(x).scatter(1, order[..., None].expand_as(x), y.mT))
    if bidirectional:
        parts = [parts[0] + parts[2], parts[1] + parts[3]]
    fused = layer.fusion_norm(x + layer.fusion(torch.cat(parts, -1)))
    expected, found = layer.out_proj(fused * F.silu(z)), layer(tokens, orders)
    assert_equal_with_gradients(found, expected, [tokens, *layer.parameters()])


def test_four_directions_walk_points_of_two_grids_together():
    inputs = grid_coords(4, 4)[None]
    queries = inputs + torch.tensor([0.08, 0.04])
    walks = tiny_model("multidir", bands=4).prepare(queries, inputs, torch.zeros(1, 16, 3)).scans[0]
    inputs, queries = inverse_order(walks).split(16, dim=1)
    assert torch.equal((inputs - queries).abs(), torch.ones(4, 16, dtype=torch.int64))


@pytest.mark.parametrize("kind", ["v1", "multidir", "v2", "field"])
def test_a_larger_mean_is_asked_at_the_observed_density_where_queries_mix(kind):
    model, asked = tiny_model(kind), []
    prepare = model.prepare
    model.prepare = lambda query, *rest, **more: asked.append(query.shape) or prepare(query, *rest, **more)
    evaluate.reconstruct(model, evaluate.observe(torch.full((1, 8, 8, 3), 0.5).numpy()), 16)
    assert asked == [(1, 256, 2) if kind == "field" else (4, 64, 2)]


def test_bidirectional_mamba_reads_both_ways_with_one_stack_each():
    torch.manual_seed(0)
    layer, tokens = away_from_zero(BidirectionalMamba(6, 2, 3, 2, False, 2.0, 0.0)), torch.randn(2, 7, 6)
    (ahead,), (back,) = layer.forward_blocks, layer.backward_blocks
    expected = layer.combine(torch.cat([ahead(tokens), back(tokens.flip(1)).flip(1)], -1))
    torch.testing.assert_close(layer(tokens), expected)
    mixed = tokens + ahead.mixer(ahead.mixer_norm(tokens))
    torch.testing.assert_close(ahead(tokens), mixed + ahead.mlp(ahead.mlp_norm(mixed)))


def test_cross_attention_without_queries_is_gaussian_kernel_interpolation(monkeypatch):
    torch.manual_seed(0)
    layer, widths = CrossAttention(12, 3, 0.0), torch.tensor([0.05, 0.1, 0.4])
    with torch.no_grad():
        layer.to_query.weight.zero_()
        layer.to_query.bias.zero_()
        layer.rotary.frequencies.zero_()
        layer.log_sigma.copy_(widths.log())
    queries, inputs = torch.randn(2, 11, 12), torch.randn(2, 6, 12)
    query_coords, input_coords = torch.rand(2, 11, 2), torch.rand(2, 6, 2)
    normed = inputs * (inputs.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).rsqrt()
    values = layer.to_key_value(normed)[..., 12:].unflatten(-1, (3, 4)).transpose(1, 2)  # (B, H, I, C)
    distance = torch.cdist(query_coords, input_coords)[:, None]  # (B, 1, Q, I)
    weight = torch.exp(-(distance**2) / (2 * widths[:, None, None] ** 2))
    expected = layer.to_out((weight / weight.sum(-1, keepdim=True) @ values).transpose(1, 2).flatten(2))
    points = queries, query_coords, inputs, input_coords
    torch.testing.assert_close(layer(*points), expected, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(CrossAttention, "LOGITS_AT_ONCE", 4 * 3 * 6 + 1)  # four queries at a time
    torch.testing.assert_close(layer(*points), expected, rtol=1e-4, atol=1e-5)
    sizes = {1: torch.export.Dim("queries", min=2, max=99)}  # one program for any number of queries
    program = torch.export.export(layer, points, dynamic_shapes=(sizes, sizes, None, None)).module()
    points = queries[:, :9], query_coords[:, :9], inputs, input_coords
    torch.testing.assert_close(program(*points), expected[:, :9], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("channels", [6, 8])
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


def test_self_attention_is_relative_attention_of_its_heads():
    torch.manual_seed(0)
    layer, queries, coords = QuerySelfAttention(12, 3, 0.0), torch.randn(2, 23, 12), torch.rand(2, 23, 2)
    parts = layer.to_query_key_value(F.rms_norm(queries, (12,))).chunk(3, -1)
    q, k, v = (part.unflatten(-1, (3, 4)).transpose(1, 2) for part in parts)
    y = relative_attention(q, k, v, layer.rotary(coords), layer.rotary(coords))
    torch.testing.assert_close(layer(queries, coords), layer.to_out(y.transpose(1, 2).flatten(2)))


def test_perceiver_gathers_then_exchanges_then_refines():
    torch.manual_seed(0)
    perceiver = LightweightPerceiver(12, 3, 3, 2.0, 0.0)
    queries, coords = torch.randn(2, 5, 12), torch.rand(2, 5, 2)
    inputs, input_coords = torch.randn(2, 4, 12), torch.rand(2, 4, 2)
    expected = queries
    for layer in perceiver.layers:
        expected = expected + layer.cross_attention(expected, coords, inputs, input_coords)
        expected = expected + layer.self_attention(expected, coords)
        expected = expected + layer.mlp(layer.mlp_norm(expected))
    torch.testing.assert_close(perceiver(queries, coords, inputs, input_coords), expected)


@pytest.mark.parametrize("points", [3, 4, 12, 204, 400])
def test_spline_is_scipys(points):
    generator = torch.Generator().manual_seed(points)
    coords = grid_coords(32, 32)[torch.randperm(1024, generator=generator)[:points]]
    values = torch.rand(points, 3, generator=generator) * 2 - 1
    query = torch.cat([grid_coords(32, 32), torch.rand(50, 2, generator=generator)])
    expected = RBFInterpolator(coords.double(), values.double(), kernel="thin_plate_spline")(query.double())
    found = thin_plate_spline(query[None], coords[None], values[None])[0]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), torch.as_tensor(expected), rtol=0, atol=1e-4)


LINE = torch.linspace(0.03, 0.97, 16)
DEGENERATE = {
    "one point": [[0.3, 0.4]],
    "two points": [[0.3, 0.4], [0.5, 0.8]],
    "far corners": [[0.0, 0.0], [1.0, 1.0]],
    "coincident": [[0.3, 0.4]] * 100,
    "coincident pairs": [[0.1, 0.2], [0.1, 0.2], [0.9, 0.3], [0.9, 0.3], [0.4, 0.8]],
    "almost coincident": [[0.3, 0.4], [0.3 + 1e-7, 0.4], [0.3, 0.4 + 1e-7], [0.8, 0.8]],
    "a row": torch.stack([LINE, torch.full_like(LINE, 0.3)], -1).tolist(),
    "a slanted line": torch.stack([LINE, 0.1 + 0.7 * LINE], -1).tolist(),
}


@pytest.mark.parametrize("name", DEGENERATE)
def test_spline_survives_degenerate_points(name):
    coords, query = torch.tensor([DEGENERATE[name]]), grid_coords(16, 16)[None]
    x = coords[..., :1]
    found = thin_plate_spline(query, coords, torch.cat([x, torch.ones_like(x), 1 - x], -1))
    # Values that vary no faster than x stay near their range; a constant stays constant.
    assert found.isfinite().all() and found.abs().max() < 2
    torch.testing.assert_close(found[..., 1], torch.ones(1, 256), rtol=0, atol=1e-4)


@pytest.mark.parametrize("count", [2, 100])
def test_spline_averages_coinciding_points_and_is_level_across_a_line(count):
    query = torch.tensor([[[0.3, 0.4], [0.9, 0.9], [0.0, 1.0]]])
    values = torch.rand(1, count, 3, generator=torch.Generator().manual_seed(0))
    found = thin_plate_spline(query, torch.tensor([[[0.3, 0.4]]]).expand(1, count, 2), values)
    torch.testing.assert_close(found, values.mean(1, keepdim=True).expand(1, 3, 3), rtol=0, atol=1e-5)
    for name, across in (("a row", (0.0, 1.0)), ("a slanted line", (-0.7, 1.0))):
        line = torch.tensor([DEGENERATE[name]]).repeat_interleave(2, 1)  # every point twice
        middle = torch.tensor([0.5, 0.3 if name == "a row" else 0.45])
        query = (middle + torch.tensor([[-0.2], [0.0], [0.3]]) * torch.tensor(across))[None]
        noise = torch.tensor([1.0, -1.0]).repeat(16)[None, :, None]
        found = thin_plate_spline(query, line, line[..., :1] + noise)
        torch.testing.assert_close(found, torch.full((1, 3, 1), 0.5), rtol=0, atol=1e-4)


def test_spline_is_solved_in_float64_whatever_the_dtype():
    points = points_of(field(queries=20, inputs=30))
    exact = thin_plate_spline(*(x.double() for x in points))
    torch.testing.assert_close(thin_plate_spline(*points).double(), exact, rtol=0, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(thin_plate_spline(*points).double(), exact, rtol=0, atol=1e-6)
    rough = thin_plate_spline(*(x.bfloat16() for x in points))  # these coordinates are exact in bfloat16
    assert rough.dtype == torch.bfloat16 and (rough - exact).abs().max() < 0.05


def test_gradients_of_the_spline_are_its_weights():
    query, coords, values = points_of(field(batch=1, queries=5, inputs=12))
    values = values.double().requires_grad_()
    torch.autograd.gradcheck(lambda v: thin_plate_spline(query, coords, v), values)
    (weights,) = torch.autograd.grad(thin_plate_spline(query, coords, values)[0, 0, 0], values)
    assert weights[0, :, 0].sum().item() == pytest.approx(1, abs=1e-6)  # they reproduce constants


@every_network
def test_a_new_model_is_the_linear_prediction(kind):
    arguments, model = field(), tiny_model(kind, trained=False)
    assert torch.equal(model(**arguments), linear_part(kind, arguments))
    arguments["t"] = torch.zeros(2)  # where the noise cancels
    estimate = arguments["noisy_values"] + model(**arguments)
    torch.testing.assert_close(estimate, start_of(kind, arguments), rtol=0, atol=1e-6)


@every_model
def test_observed_points_are_a_set_and_queries_keep_their_places(kind):
    model, arguments = tiny_model(kind), field(queries=20, inputs=30)
    velocity = model(**arguments)
    shuffle, places = torch.randperm(30), torch.randperm(20)
    for name in ("input_coords", "input_values"):
        arguments[name] = arguments[name][:, shuffle]
    for name in ("noisy_values", "query_coords"):
        arguments[name] = arguments[name][:, places]
    torch.testing.assert_close(model(**arguments), velocity[:, places], rtol=1e-5, atol=1e-5)


@every_model
def test_samples_of_a_batch_are_independent_and_one_point_is_enough(kind):
    model, arguments = tiny_model(kind), field(batch=3)
    alone = model(**{name: x[1:2] for name, x in arguments.items()})
    torch.testing.assert_close(alone, model(**arguments)[1:2], rtol=1e-5, atol=1e-5)
    assert model(**field(queries=1, inputs=1)).isfinite().all()


@every_model
def test_prepared_conditions_serve_every_evaluation(kind):
    model, arguments = tiny_model(kind), field(inputs=20)
    points = points_of(arguments)
    conditions = model.prepare(*points)
    for t in (0.1, 0.6):
        arguments |= {"t": torch.full((2,), t), "noisy_values": torch.randn(2, 9, 3)}
        assert torch.equal(model(**arguments, conditions=conditions), model(**arguments))
    other = model.prepare(points[0], points[1], -points[2])
    assert (model(**arguments, conditions=other) - model(**arguments)).abs().max() > 1e-3  # they are used


@every_network
def test_every_argument_matters_and_every_parameter_gets_a_gradient(kind):
    model, arguments = tiny_model(kind).train(), field()

    def residual(arguments):  # beyond the linear part: the network itself reads every argument
        return model(**arguments) - linear_part(kind, arguments)

    for name in arguments:
        changed = {**arguments, name: (arguments[name] * 0.9).contiguous()}
        assert (residual(changed) - residual(arguments)).abs().max() > 1e-5, name
    for footprint in (1 / 8, 1 / 16) if kind == "field finer" else (None,):  # each enters at its own level
        more = {} if footprint is None else {"footprint": footprint}
        model(**arguments, **more).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@every_model
def test_gradient_checkpointing_recomputes_layers_and_changes_no_gradient(kind):
    grads = {}
    for recompute in (False, True):
        model, calls = tiny_model(kind, **({"dropout": 0.2} if kind in TOKENS else {})).train(), []
        model.gradient_checkpointing = recompute
        assert model.gradient_checkpointing == recompute
        stacks = [part for part in model.modules() if isinstance(part, Layers)]
        stacks = [part for part in stacks if next(part.parameters()).requires_grad]  # phase 2 freezes some
        layers = [layer for stack in stacks for layer in stack]
        for layer in layers:
            layer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(3)
        finest = {"footprint": 1 / 16} if kind == "field finer" else {}  # where all layers have a part
        model(**field(), **finest).square().sum().backward()
        assert len(calls) == len(layers) * (2 if recompute else 1) > 0
        grads[recompute] = [p.grad for p in model.parameters() if p.grad is not None]
    torch.testing.assert_close(grads[True], grads[False], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", TOKENS)
def test_dropout_acts_in_training_only(kind):
    model, arguments = tiny_model(kind, dropout=0.5).train(), field()
    assert not torch.allclose(model(**arguments), model(**arguments))
    with torch.no_grad(), evaluation_mode(model):
        assert torch.equal(model(**arguments), model(**arguments))
    assert all(part.training for part in model.modules())
    # PyTorch's encoder layer takes another path in eval mode without gradients.
    model, expected = tiny_model(kind), tiny_model(kind).train()(**arguments)
    with torch.no_grad():
        torch.testing.assert_close(model(**arguments), expected, rtol=1e-4, atol=1e-5)


@every_network
def test_autocast_keeps_a_float32_stream_and_finite_gradients(kind):
    tokens = "field" not in kind  # whose stream is that of its convolutions
    model, dtypes, lost = tiny_model(kind, **({"fourier_scale": 10.0} if tokens else {})), [], []
    arguments = field()

    def look(_, given):
        dtypes.append(given[0].dtype)
        lost.append((given[0] - given[0].bfloat16()).abs().max().item())

    exact = model(**arguments)
    for layers in (part for part in model.modules() if tokens and isinstance(part, Layers)):
        layers.register_forward_pre_hook(look)
    if tokens:
        model.decoder.register_forward_pre_hook(look)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model.train()(**arguments)
    assert (rough - exact).norm() < 0.03 * (exact - linear_part(kind, arguments)).norm()
    rough.square().sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(grad.isfinite().all() and grad.dtype == torch.float32 for grad in grads)
    assert {*dtypes, rough.dtype} == {torch.float32}
    assert not tokens or lost[-1] > 0  # not bfloat16 numbers in float32


@every_model
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-4), (torch.bfloat16, 0.1)])
def test_a_model_of_another_dtype_gives_that_dtype(kind, dtype, tolerance):
    model, arguments = tiny_model(kind), field()
    exact = model(**arguments)
    rough = model.to(dtype)(**{name: x.to(dtype) for name, x in arguments.items()})
    assert rough.dtype == dtype and (rough.double() - exact).norm() < tolerance * exact.norm()


@every_model
def test_what_would_be_silently_wrong_is_refused(kind):
    model, arguments = tiny_model(kind), field()
    for name in ("t", "query_coords", "input_coords"):
        for value in (-0.25, 1.5, math.nan):
            wrong = arguments[name].clone()
            wrong.view(-1)[-1] = value
            with pytest.raises(ValueError):
                model(**{**arguments, name: wrong})
    for name in ("input_values", "noisy_values"):  # a gather would take a part of them
        with pytest.raises(ValueError):
            model(**{**arguments, name: torch.cat([arguments[name]] * 2, 1)})
    for settings in ({"orders": ("row", "spiral")}, {"order": "spiral"}, {"tied_decay": 1}, {"dropout": "0"}):
        if hasattr(model.config, next(iter(settings))):
            with pytest.raises(ValueError):
                tiny_model(kind, **settings)(**arguments)


@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_points_are_scanned_in_the_order_of_the_config(kind):
    arguments = field(queries=20, inputs=30)
    row, column = (tiny_model(kind, order=order) for order in ("row", "column"))
    assert (row(**arguments) - column(**arguments)).abs().max() > 1e-4
    # Mirrored at the diagonal, rows are columns: with mirrored frequencies the two models agree.
    mirrored = {name: x.flip(-1) if "coords" in name else x for name, x in arguments.items()}
    for name, buffer in column.named_buffers():
        buffer.copy_(row.get_buffer(name).flip(0))
    torch.testing.assert_close(column(**mirrored), row(**arguments), rtol=1e-4, atol=1e-5)


def test_an_untrained_field_is_the_spline_and_samples_a_gaussian_around_it():
    model, points = tiny_model("field", trained=False), points_of(field(queries=9, inputs=40))
    points[2] = 0.8 * torch.sin(4 * points[1] @ torch.randn(2, 2, 3))
    start = thin_plate_spline(*points)
    mean, std = posterior_mean(model, *points, draws=2)
    torch.testing.assert_close(mean, start.clamp(-1, 1), rtol=0, atol=1e-5)
    assert std.max() < 1e-5
    noise = torch.randn(start.shape, generator=torch.Generator().manual_seed(7))
    drawn = sample(model, *points, steps=80, generator=torch.Generator().manual_seed(7))
    # dr/dt = skip_weight r is solved by r proportional to sqrt(V), which falls from 1 to residual_std.
    torch.testing.assert_close(drawn, (start + 0.15 * noise).clamp(-1, 1), rtol=0, atol=4e-3)


@pytest.mark.parametrize("t", [0.0, 0.5, 0.95, 1.0])
def test_the_loss_of_a_field_is_that_of_its_network_on_inputs_of_unit_scale(t):
    """Of an untrained model and data around the spline it is 1 at every t; unweighted it is s^2 / V."""
    model, arguments = tiny_model("field", trained=False), field(batch=400, queries=20, inputs=20)
    batch, seen = {name: x for name, x in arguments.items() if name not in ("noisy_values", "t")}, []
    model.query_embeddings[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    start = start_of("field", arguments)
    batch["query_values"] = start + 0.15 * torch.randn_like(start)
    options = dict(t=torch.full((400,), t), noise=torch.randn_like(start))
    weighted = flow_matching_loss(model, batch, **options, weight=model.loss_weight).item()
    assert weighted == pytest.approx(1, abs=0.05)  # of 24,000 values: standard error 0.01
    signal = math.sin(math.atan2(0.15 * t, 1 - t))  # none at t = 0
    assert seen[0][..., :3].std().item() == pytest.approx(signal, abs=0.03)
    variance = (1 - t) ** 2 + (0.15 * t) ** 2
    assert flow_matching_loss(model, batch, **options).item() == pytest.approx(weighted * 0.15**2 / variance)


@pytest.mark.parametrize("kind", ["multidir", "v2"])
def test_shared_components_are_copied_from_v1(kind):
    v1, model = tiny_model("v1"), tiny_model(kind, trained=False)
    for x in v1.state_dict().values():
        x.normal_()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    copied = initialise_from_v1(model, v1)
    assert {"fourier.frequencies", "input_embedding.value_proj.weight", "time.mlp.0.weight"} <= set(copied)
    for name, x in model.state_dict().items():
        assert torch.equal(x, v1.state_dict()[name] if name in copied else before[name]), name
    arguments = field()
    assert torch.equal(model(**arguments), linear_part(kind, arguments))  # the output layer stays zero
    for other in (tiny_model("v2"), tiny_model("field", d_time=32)):
        with pytest.raises(ValueError):
            initialise_from_v1(other, tiny_model("v1", d_model=32, num_fourier_features=5))


@every_model
def test_configs_are_strict(kind):
    config = tiny_config(kind)
    for wrong in ({"d_model": 16, "widht": 3}, {"model_type": "other"}, {"d_model": "16"}):
        with pytest.raises(ValueError):
            type(config).from_dict(wrong)
    assert type(config).from_dict({"model_type": kind.split()[0], **TINY[kind]}) == config
    with pytest.raises(ValueError):
        tiny_config("v2", num_layers=7)  # half reads forwards, half backwards


@every_model
def test_a_saved_model_loads_bitwise(kind, tmp_path):
    model, arguments = tiny_model(kind), field()
    model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings == json.loads(json.dumps({"model_type": kind.split()[0], **vars(model.config)}))
    for loaded in (load_model(tmp_path), type(model).from_pretrained(tmp_path)):
        assert type(loaded) is type(model) and loaded.config == model.config and not loaded.training
        assert torch.equal(loaded(**arguments), model(**arguments))


def test_missing_extra_damaged_and_pickled_weights_are_errors(tmp_path):
    model, path = tiny_model("v1"), tmp_path / "model.safetensors"
    model.save_pretrained(tmp_path)
    weights, whole = load_file(path), path.read_bytes()
    for wrong in (
        {name: x for name, x in weights.items() if name != "decoder.3.bias"},
        {**weights, "surplus": torch.zeros(1)},
        {**weights, "decoder.3.bias": torch.zeros(4)},
    ):
        save_file(wrong, path)
        with pytest.raises(ValueError):
            load_model(tmp_path)
    path.write_bytes(whole[:-100])
    with pytest.raises(ValueError):
        load_model(tmp_path)
    path.unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError):
        load_model(tmp_path)


def test_wrong_folders_and_configs_are_errors(tmp_path):
    tiny_model("v1").save_pretrained(tmp_path / "best")
    path = tmp_path / "best" / "config.json"
    settings = json.loads(path.read_text())
    with pytest.raises(ValueError, match="best"):  # a run's folder: its models are named
        load_model(tmp_path)
    with pytest.raises(ValueError):
        FIELD_MODELS["v2"][0].from_pretrained(tmp_path / "best")
    for wrong in ({**settings, "depth": 3}, {**settings, "model_type": "v9"}, TINY["v1"], []):
        path.write_text(json.dumps(wrong))
        with pytest.raises(ValueError):
            load_model(tmp_path / "best")
    path.write_text("{")
    with pytest.raises(ValueError, match="config.json"):
        load_model(tmp_path / "best")


def test_hats_read_linear_fields_exactly_and_gather_means():
    coords = 0.0625 + 0.875 * torch.rand(2, 40, 2)  # between the outermost centres of 8 x 8
    hats, grid = Hats.of(coords, 8), grid_coords(8, 8)
    plane = (grid @ torch.tensor([[2.0, -1], [0.5, 3]]) + 1).reshape(1, 8, 8, 2).expand(2, -1, -1, -1)
    torch.testing.assert_close(hats.read(plane), coords @ torch.tensor([[2.0, -1], [0.5, 3]]) + 1)
    x, field = torch.randn(2, 40, 3), torch.randn(2, 8, 8, 3)
    evidence = Hats.of(coords, 8).gather(torch.ones(2, 40, 1)).squeeze(-1)  # 1 where points crowd
    assert 0 <= evidence.min() and evidence.max() == pytest.approx(1)
    dense = torch.zeros(2, 64, 40).scatter_add(1, hats.index, hats.weight)
    mean = (dense @ x) / dense.sum(-1, keepdim=True).clamp_min(1)
    torch.testing.assert_close(hats.gather(x), mean.unflatten(1, (8, 8)))
    torch.testing.assert_close(hats.read(field), dense.mT @ field.flatten(1, 2))
    own = Hats.of(grid[None], 8).gather(grid[None])  # pixel centres are nodes
    torch.testing.assert_close(own.flatten(1, 2), grid[None])


def test_a_short_step_has_the_velocity_and_an_untrained_one_keeps_z():
    arguments = {name: x.double() for name, x in field().items()}
    model, until = tiny_model("field", shortcut=True).double(), arguments["t"] + 1e-8
    velocity = model(**arguments)
    torch.testing.assert_close(model(**arguments, until=until), velocity, rtol=1e-4, atol=1e-4)
    model, t = tiny_model("field", trained=False), field()["t"][:, None, None]
    arguments, start, end = field(), start_of("field", field()), torch.tensor([0.4, 1.0])
    x = arguments["noisy_values"]
    moved = x + (end[:, None, None] - t) * model(**arguments, until=end)
    std = [((1 - time) ** 2 + (0.15 * time) ** 2).sqrt() for time in (t, end[:, None, None])]
    expected = end[:, None, None] * start + std[1] / std[0] * (x - t * start)
    torch.testing.assert_close(moved, expected, rtol=1e-5, atol=1e-5)
    tau = torch.atan2(0.15 * model.shortcut_times(4), 1 - model.shortcut_times(4)) / (math.pi / 2)
    torch.testing.assert_close(tau, (torch.arange(5, dtype=torch.float64) / 4) ** 1.4)


def test_finer_queries_enter_finer_lattices_and_see_their_own_footprint():
    model, arguments = tiny_model("field finer"), field()
    assert model.prepare(*points_of(arguments)).queries.nodes == 8
    sides = {1 / 4: 8, 1 / 8: 8, 1 / 12: 16, 1 / 16: 16, 1 / 32: 16}
    for side, nodes in sides.items():
        assert model.prepare(*points_of(arguments), footprint=side).queries.nodes == nodes
    for wrong in (0, 96, -1 / 96):  # in pixels, say
        with pytest.raises(ValueError):
            model(**arguments, footprint=wrong)
    answers = [model(**arguments, footprint=side) for side in list(sides)[:-1]]
    finest = model(**arguments, footprint=1 / 32)  # finer than the finest nodes: as they are
    torch.testing.assert_close(finest, model(**arguments, footprint=1 / 16))
    assert min((a - b).abs().max() for a, b in itertools.combinations(answers, 2)) > 1e-4
