import json
import math
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import torch
from huggingface_hub import hub_mixin
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from nfhelpers import train
from nfhelpers.flow import skip_weight
from nfhelpers.images import grid_coords
from nfhelpers.models import (
    FIELD_MODELS,
    LocalImplicitField,
    LocalImplicitFieldConfig,
    MambaDiffusion,
    MambaDiffusionConfig,
    load_model,
)
from nfhelpers.models import ssm as ssm_module
from nfhelpers.models.layers import FourierFeatures, PointEmbedding, TimeEmbedding, sinusoidal_embedding
from nfhelpers.models.perceiver import CrossAttention
from nfhelpers.models.sparse_fields import check_shapes
from nfhelpers.models.ssm import MambaBlock, SelectiveSSM

ARGUMENTS = ("noisy_values", "query_coords", "t", "input_coords", "input_values")
TINY = {
    "v1": dict(d_model=16, num_layers=2, d_state=4, num_fourier_features=8, fourier_scale=2.0, num_heads=2),
    "local": dict(
        d_model=16, neighbours=4, num_layers=2, num_fourier_features=8, fourier_scale=2.0, num_heads=2
    ),
}
both_models = pytest.mark.parametrize("kind", sorted(TINY))


def tiny_config(kind, **settings):
    return FIELD_MODELS[kind][1](**{**TINY[kind], **settings})


def tiny_model(kind, trained=True, **settings):
    """A small model in eval mode; `trained` moves its decoder away from zero."""
    torch.manual_seed(0)
    model = FIELD_MODELS[kind][0](tiny_config(kind, **settings)).eval()
    if trained:
        with torch.no_grad():
            model.decoder[-1].weight.normal_(std=0.5)
            model.decoder[-1].bias.normal_(std=0.5)
    return model


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
    tokens = torch.randn(2, 11, 6)
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
    torch.testing.assert_close(layer(tokens).double(), expected, rtol=1e-4, atol=1e-5)


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


# Cross-attention


def test_cross_attention_without_queries_is_gaussian_kernel_interpolation():
    torch.manual_seed(0)
    heads, d = 3, 12
    layer = CrossAttention(d, heads, 0.0)
    with torch.no_grad():
        layer.to_query.weight.zero_()
        layer.log_sigma.copy_(torch.tensor([0.05, 0.1, 0.4]).log())
    queries, inputs = torch.randn(2, 4, d), torch.randn(2, 6, d)
    query_coords, input_coords = torch.rand(2, 4, 2), torch.rand(2, 6, 2)
    normed = inputs.double() * (inputs.double().square().mean(-1, keepdim=True) + 1e-7).rsqrt()
    values = normed @ layer.to_key_value.weight[d:].double().T  # (B, I, D)
    distance = torch.cdist(query_coords.double(), input_coords.double())
    parts = []
    for head, sigma in enumerate((0.05, 0.1, 0.4)):
        weight = torch.exp(-(distance**2) / (2 * sigma**2))
        weight = weight / weight.sum(-1, keepdim=True)  # (B, Q, I)
        parts.append(weight @ values[..., head * 4 : head * 4 + 4])
    expected = torch.cat(parts, -1) @ layer.to_out.weight.double().T
    output = layer(queries, query_coords, inputs, input_coords)
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-5)


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


# Both models


@both_models
def test_a_new_model_is_the_linear_prediction(kind):
    arguments = field()
    velocity = tiny_model(kind, trained=False)(**arguments)
    expected = skip_weight(arguments["t"])[:, None, None] * arguments["noisy_values"]
    assert torch.equal(velocity, expected)


@both_models
def test_at_time_zero_the_noise_cancels_but_for_the_network(kind):
    arguments = {**field(), "t": torch.zeros(2)}
    estimate = arguments["noisy_values"] + tiny_model(kind, trained=False)(**arguments)
    assert torch.equal(estimate, torch.zeros_like(estimate))


@both_models
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


@both_models
def test_samples_of_a_batch_are_independent(kind):
    model, arguments = tiny_model(kind), field(batch=3)
    velocity = model(**arguments)
    for index in range(3):
        alone = model(**{name: x[index : index + 1] for name, x in arguments.items()})
        torch.testing.assert_close(alone, velocity[index : index + 1], rtol=1e-5, atol=1e-5)


@both_models
@pytest.mark.parametrize("name", ARGUMENTS)
def test_every_argument_matters(kind, name):
    # Beyond the linear part: the network itself reads every argument.
    def residual(arguments):
        linear = skip_weight(arguments["t"])[:, None, None] * arguments["noisy_values"]
        return model(**arguments) - linear

    model, arguments = tiny_model(kind), field()
    changed = {**arguments, name: (arguments[name] * 0.9).contiguous()}
    assert (residual(changed) - residual(arguments)).abs().max() > 1e-5


@both_models
def test_gradient_reaches_every_parameter(kind):
    model = tiny_model(kind).train()
    model(**field()).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@both_models
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gradient_checkpointing_changes_no_gradient(kind, dropout):
    grads = {}
    for recompute in (False, True):
        model = tiny_model(kind, dropout=dropout).train()
        model.gradient_checkpointing = recompute
        calls = []
        blocks = model.blocks if kind == "v1" else model.layers
        blocks[0].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(3)
        model(**field()).square().sum().backward()
        assert len(calls) == (2 if recompute else 1)
        grads[recompute] = [p.grad for p in model.parameters()]
    for plain, recomputed in zip(grads[False], grads[True], strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-6, atol=1e-7)


@both_models
def test_dropout_acts_in_training_only(kind):
    model, arguments = tiny_model(kind, dropout=0.5), field()
    assert torch.equal(model(**arguments), model(**arguments))
    model.train()
    assert not torch.allclose(model(**arguments), model(**arguments))


@both_models
def test_inference_mode_equals_training_mode_without_dropout(kind):
    # PyTorch's encoder layer takes another path in eval mode without gradients.
    model, arguments = tiny_model(kind), field()
    expected = model.train()(**arguments)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**arguments), expected, rtol=1e-4, atol=1e-5)


@both_models
@pytest.mark.parametrize("scale", [2.0, 10.0])
def test_bfloat16_autocast_is_close_to_float32(kind, scale):
    model, arguments = tiny_model(kind, fourier_scale=scale), field()
    exact = model(**arguments)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(**arguments)
    assert rough.dtype == torch.float32 and rough.isfinite().all()
    linear = skip_weight(arguments["t"])[:, None, None] * arguments["noisy_values"]
    assert (rough - exact).norm() < 0.03 * (exact - linear).norm()
    with torch.autocast("cpu", torch.bfloat16):
        model.train()(**arguments).square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in model.parameters())


@both_models
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-4), (torch.bfloat16, 0.1), (torch.float16, 0.02)]
)
def test_a_model_of_another_dtype_gives_that_dtype(kind, dtype, tolerance):
    model, arguments = tiny_model(kind), field()
    exact = model(**arguments)
    rough = model.to(dtype)(**{name: x.to(dtype) for name, x in arguments.items()})
    assert rough.dtype == dtype
    assert (rough.double() - exact).norm() < tolerance * exact.norm()


@both_models
def test_the_residual_stream_stays_float32_under_autocast(kind):
    model, dtypes, lost = tiny_model(kind), [], []

    def look(_, arguments):
        (tokens,) = arguments
        dtypes.append(tokens.dtype)
        lost.append((tokens - tokens.bfloat16()).abs().max().item())

    for block in model.blocks if kind == "v1" else model.layers:
        block.register_forward_pre_hook(look)
    model.decoder.register_forward_pre_hook(look)
    with torch.autocast("cpu", torch.bfloat16):
        model.train()(**field())
    assert dtypes == [torch.float32] * 3
    assert min(lost[1:]) > 0  # not merely bfloat16 numbers in float32 tensors


@both_models
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


@both_models
@pytest.mark.parametrize(
    ("name", "shape"), [(name, shape) for name, shapes in WRONG_SHAPES.items() for shape in shapes]
)
def test_wrong_shapes_are_named(kind, name, shape):
    arguments = {**field(), name: torch.zeros(shape)}
    with pytest.raises(ValueError, match=rf"{name}.*\(B, Nq, 3\)"):
        tiny_model(kind)(**arguments)


@both_models
@pytest.mark.parametrize("name", ["query_coords", "input_coords", "input_values"])
def test_wrong_ranks_are_named(kind, name):
    arguments = field()
    with pytest.raises(ValueError, match=name):
        tiny_model(kind)(**{**arguments, name: arguments[name][0, 0]})


@both_models
@pytest.mark.parametrize("name", ARGUMENTS)
def test_wrong_dtypes_are_named(kind, name):
    arguments = field()
    with pytest.raises(ValueError, match=rf"{name} has dtype torch.int64"):
        tiny_model(kind)(**{**arguments, name: arguments[name].long()})


@both_models
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


def test_default_mamba_diffusion_has_the_size_of_its_seed():
    with torch.device("meta"):
        model = MambaDiffusion(MambaDiffusionConfig())
    count = sum(p.numel() for p in model.parameters())
    assert 15e6 < count < 21e6
    assert {p.device.type for p in model.parameters()} == {"meta"}


# Configs


@both_models
def test_configs_are_frozen_and_strict(kind):
    config = tiny_config(kind)
    with pytest.raises(FrozenInstanceError):
        config.d_model = 32
    with pytest.raises(ValueError, match=r"unknown .* keys \['widht'\]; legal keys are .*d_model"):
        type(config).from_dict({"d_model": 16, "widht": 3})
    with pytest.raises(ValueError, match="model_type='other'"):
        type(config).from_dict({"model_type": "other"})
    assert type(config).from_dict({"model_type": kind, **TINY[kind]}) == config


POSITIVE = {
    "v1": "d_model num_layers d_state expand num_fourier_features num_heads fourier_scale mlp_ratio",
    "local": "d_model neighbours num_layers num_fourier_features num_heads fourier_scale mlp_ratio",
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
        if name not in ("fourier_scale", "mlp_ratio")
    ],
)
def test_counts_must_be_whole(kind, name):
    with pytest.raises(ValueError, match=f"{name}=2.5"):
        tiny_config(kind, **{name: 2.5})


@both_models
def test_widths_must_divide_and_dropout_be_a_fraction(kind):
    with pytest.raises(ValueError, match="divisible by num_heads=3"):
        tiny_config(kind, num_heads=3)
    with pytest.raises(ValueError, match="d_model=15 must be even"):
        tiny_config(kind, d_model=15, num_heads=1)
    for dropout in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"dropout=.* is outside \[0, 1\)"):
            tiny_config(kind, dropout=dropout)


def test_an_unknown_scan_order_is_refused():
    with pytest.raises(ValueError, match=r"'spiral'.*row"):
        tiny_config("v1", order="spiral")


# Saving and loading


@both_models
def test_a_saved_model_loads_bitwise(kind, tmp_path):
    model, arguments = tiny_model(kind), field()
    model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings == {"model_type": kind, **vars(model.config)}
    for loaded in (load_model(tmp_path), type(model).from_pretrained(tmp_path)):
        assert type(loaded) is type(model) and loaded.config == model.config and not loaded.training
        assert loaded.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(x, loaded.state_dict()[name]) for name, x in model.state_dict().items())
        assert torch.equal(loaded(**arguments), model(**arguments))


@both_models
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


@both_models
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


@both_models
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
    with pytest.raises(ValueError, match=r"model_type='v9'; legal types are \['local', 'v1'\]"):
        load_model(tmp_path)
    path.write_text(json.dumps(TINY["v1"]))
    with pytest.raises(ValueError, match="model_type=None"):
        load_model(tmp_path)


def test_field_models_are_listed_by_their_type():
    assert FIELD_MODELS == {
        "v1": (MambaDiffusion, MambaDiffusionConfig),
        "local": (LocalImplicitField, LocalImplicitFieldConfig),
    }


@pytest.mark.parametrize("name", ["t", "query_coords", "input_coords"])
@pytest.mark.parametrize("value", [-0.25, 1.5, float("nan")])
@pytest.mark.parametrize("kind", FIELD_MODELS)
def test_times_and_coordinates_outside_the_unit_interval_are_refused(kind, name, value):
    arguments = field()
    arguments[name] = arguments[name].clone()
    arguments[name].view(-1)[-1] = value
    with pytest.raises(ValueError, match=rf"{name} spans .* in \[0, 1\]"):
        tiny_model(kind)(**arguments)


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
