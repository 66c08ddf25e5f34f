import copy
import json
import math
import re

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch.nn import functional as F

from nfhelpers import run, samplers, train
from nfhelpers.flow import skip_weight, target_velocity, to_diffusers_velocity
from nfhelpers.kernels.orders import grid_order, inverse_order
from nfhelpers.models import FIELD_MODELS, LocalMamba2D, LocalMamba2DConfig, load_model
from nfhelpers.models import local_mamba as module
from nfhelpers.models.local_mamba import (
    SS2D,
    AdaRMSNorm,
    BiAttn,
    DropPath,
    GridAttention,
    MappingNetwork,
    TokenSplit,
    gather_patches,
    grid_flow_loss,
    grid_orders,
    guided_velocity,
    mapping_parameters,
    sample_grids,
    spread_patches,
    walks_backwards,
)

TINY = dict(dims=(8, 16), depths=(1, 2), d_state=3, mlp_ratio=2.0, mapping_width=12, dropout=0.0, head_dim=4)
SMOKE = dict(dims=(16, 32), depths=(1, 1), d_state=4, mlp_ratio=2.0, mapping_width=32, dropout=0.0)
DIRECTIONS = ("h", "h_flip", "v", "v_flip", "w7", "w2_flip")


def tiny_model(trained=True, seed=0, **settings):
    """A small model in eval mode; `trained` moves what starts at zero away from it."""
    torch.manual_seed(seed)
    model = LocalMamba2D(LocalMamba2DConfig(**{**TINY, **settings})).eval()
    if trained:
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.2)
    return model


def arguments(batch=2, channels=1, height=12, width=8, classes=0, captions=0, seed=1):
    generator = torch.Generator().manual_seed(seed)
    given = dict(
        x=torch.randn(batch, channels, height, width, generator=generator),
        t=torch.linspace(0.1, 0.9, batch),
    )
    if classes:
        given["labels"] = torch.randint(classes, (batch,), generator=generator)
    if captions:
        given["captions"] = torch.randn(batch, captions, generator=generator)
    return given


# The scan


def loop_scan(layer, grid, directions):
    """SS2D in float64: a loop over directions, one over samples, one over the steps of each scan."""
    weights = {name: p.detach().double() for name, p in layer.named_parameters()}
    grid = grid.detach().double()
    batch, height, width, _ = grid.shape
    e, n, r = layer.D.shape[1], layer.d_state, layer.dt_rank
    projected = grid @ weights["in_proj.weight"].T
    x, z = projected[..., :e], projected[..., e:]
    padded = F.pad(x, (0, 0, 1, 1, 1, 1))
    x = sum(
        padded[:, i : i + height, j : j + width] * weights["conv.weight"][:, 0, i, j]
        for i in range(3)
        for j in range(3)
    )
    x = x + weights["conv.bias"]
    x = (x * torch.sigmoid(x)).reshape(batch, height * width, e)
    projected = (x @ weights["x_proj.weight"].T).reshape(batch, height * width, len(directions), r + 2 * n)
    outputs = torch.zeros(batch, len(directions), height * width, e, dtype=torch.float64)
    for k, kind in enumerate(directions):
        order = grid_order(height, width, kind).tolist()  # with the flip
        rates = -torch.exp(weights["A_log"][k])
        for b in range(batch):
            state = torch.zeros(e, n, dtype=torch.float64)
            for token in order:
                low, B, C = projected[b, token, k].split([r, n, n])
                delta = torch.log1p(torch.exp(weights["dt_weight"][k] @ low + weights["dt_bias"][k]))
                state = torch.exp(delta[:, None] * rates) * state
                state = state + (delta * x[b, token])[:, None] * B
                outputs[b, k, token] = state @ C + weights["D"][k] * x[b, token]

    def norm(values, name):
        mean = values.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps
        return values / mean.sqrt() * weights[name]

    def linear(values, name):
        values = values @ weights[f"fusion.{name}.weight"].T
        return values + weights.get(f"fusion.{name}.bias", 0)

    seen = norm(outputs, "fusion.norm.weight")
    whole = F.gelu(linear(seen.mean(2, keepdim=True), "whole_proj"))
    place = linear(F.gelu(linear(seen, "place_proj")), "place_score") + linear(whole, "whole_score")
    channel = torch.sigmoid(linear(whole, "channel_score"))
    fused = norm((outputs * channel * torch.sigmoid(place)).sum(1), "norm.weight")
    gate = z.reshape(batch, height * width, e)
    result = (fused * gate * torch.sigmoid(gate)) @ weights["out_proj.weight"].T
    return result.reshape(batch, height, width, -1)


@pytest.mark.parametrize(("height", "width"), [(5, 9), (8, 3)])
def test_ss2d_equals_a_float64_loop(height, width):
    torch.manual_seed(0)
    layer = SS2D(6, 3, 2.0, DIRECTIONS)
    with torch.no_grad():
        layer.A_log.add_(0.3 * torch.randn_like(layer.A_log))
        layer.D.normal_()
    grid = torch.randn(2, height, width, 6)
    orders = grid_orders(height, width, DIRECTIONS, torch.device("cpu"))
    torch.testing.assert_close(
        layer(grid, orders).double(), loop_scan(layer, grid, DIRECTIONS), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["v", "h_flip", "v_flip", "w7", "w7_flip", "w2"])
@pytest.mark.parametrize(("height", "width"), [(4, 6), (7, 7), (9, 16), (1, 5)])
def test_orders_are_inverse_exact(kind, height, width):
    order = grid_order(height, width, kind)
    tokens = torch.randn(height * width)
    assert torch.equal(tokens[order][inverse_order(order)], tokens)
    # What the model is given: the order without the flip, and that it is walked backwards.
    (given,), (backwards,) = (
        grid_orders(height, width, (kind,), torch.device("cpu")),
        walks_backwards((kind,)),
    )
    assert torch.equal(given.flip(0) if backwards else given, order)


def test_a_direction_equals_its_scan_alone():
    """Of K directions each has parameters and numbers of its own: those of K layers with one direction."""
    torch.manual_seed(0)
    layer = SS2D(6, 3, 2.0, DIRECTIONS)
    grid, found = torch.randn(2, 5, 6, 6), []
    layer.fusion.register_forward_pre_hook(lambda _, given: found.append(given[0]))
    layer(grid, grid_orders(5, 6, DIRECTIONS, torch.device("cpu")))
    for k, kind in enumerate(DIRECTIONS):
        alone = SS2D(6, 3, 2.0, (kind,))
        state = layer.state_dict()
        for name in ("dt_weight", "dt_bias", "A_log", "D"):
            state[name] = state[name][k : k + 1]
        state["x_proj.weight"] = state["x_proj.weight"].unflatten(0, (len(DIRECTIONS), -1))[k]
        alone.load_state_dict(state)
        alone.fusion.register_forward_pre_hook(lambda _, given: found.append(given[0]))
        alone(grid, grid_orders(5, 6, (kind,), torch.device("cpu")))
        torch.testing.assert_close(found[0][:, k], found.pop()[:, 0], rtol=1e-5, atol=1e-6)


def test_directions_are_scanned_at_once_without_copies(monkeypatch):
    """One call a block, all with x as it is, and a flip that shares its order."""
    calls, scan = [], module.directional_scan

    def spy(x, *rest, **options):
        calls.append((x, options))
        return scan(x, *rest, **options)

    monkeypatch.setattr(module, "directional_scan", spy)
    model = tiny_model(scan_directions=("h", "h_flip", "w2"))
    model(**arguments())
    assert len(calls) == sum(model.config.depths) + model.config.depths[0]  # down and up
    for x, options in calls:
        assert x.ndim == 3 and options["reverse"] == (False, True, False)
        assert torch.equal(options["orders"][0], options["orders"][1])
    # The orders of a stage are one tensor for all its blocks, down and up, and at the next call.
    first, up = calls[0][1]["orders"], calls[-1][1]["orders"]
    assert (
        first.data_ptr()
        == up.data_ptr()
        == grid_orders(6, 4, ("h", "h_flip", "w2"), torch.device("cpu")).data_ptr()
    )


def test_orders_first_asked_for_while_sampling_serve_training():
    """They are kept: neither inference mode nor a default device may stick to them."""
    module._orders.cache_clear()
    model, given = tiny_model(), arguments()
    with torch.inference_mode(), torch.device("meta"):
        orders = grid_orders(6, 4, model.config.scan_directions, torch.device("cpu"))
    assert orders.device.type == "cpu" and not orders.is_inference()
    with torch.inference_mode():
        expected = model(**given)
    velocity = model(**given)
    torch.testing.assert_close(velocity, expected.clone())
    velocity.square().mean().backward()


def test_biattn_weighs_directions_by_what_they_found():
    torch.manual_seed(0)
    layer, y = BiAttn(8), torch.randn(2, 3, 5, 8)
    fused = layer(y)
    assert fused.shape == (2, 5, 8)
    torch.testing.assert_close(layer(y[:, [2, 0, 1]]), fused)
    assert layer(torch.zeros_like(y)).abs().max() == 0
    with torch.no_grad():
        for name in ("channel_score", "place_score", "whole_score"):
            getattr(layer, name).weight.zero_()
        layer.channel_score.bias.zero_(), layer.place_score.bias.zero_()
    torch.testing.assert_close(layer(y), y.sum(1) / 4)  # sigmoid(0) twice


# Patches, norms and conditions


def test_patches_are_2_x_2_and_undone():
    grid = torch.arange(2 * 4 * 6 * 3.0).view(2, 4, 6, 3)
    patches = gather_patches(grid)
    assert patches.shape == (2, 2, 3, 12)
    torch.testing.assert_close(patches[1, 1, 2].view(2, 2, 3), grid[1, 2:4, 4:6])
    assert torch.equal(spread_patches(patches), grid)


def test_ada_rms_norm_starts_plain_and_scales_and_shifts():
    torch.manual_seed(0)
    layer, grid, condition = AdaRMSNorm(4, 6), torch.randn(2, 3, 5, 4), torch.randn(2, 6)
    plain = F.rms_norm(grid, (4,), eps=AdaRMSNorm.EPS)
    torch.testing.assert_close(layer(grid, condition), plain)
    torch.nn.init.normal_(layer.head.weight)
    scale, shift = (condition @ layer.head.weight.T).chunk(2, -1)
    expected = plain * (1 + scale[:, None, None]) + shift[:, None, None]
    torch.testing.assert_close(layer(grid, condition), expected)


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    layer, ones = DropPath(0.25), torch.ones(4000, 2, 3, 1)
    dropped = layer(ones)
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert torch.equal(dropped.amax((1, 2, 3)), dropped.amin((1, 2, 3)))
    assert dropped.mean().item() == pytest.approx(1, abs=0.05)  # standard error 0.009
    assert torch.equal(layer.eval()(ones), ones)


def test_drop_path_rises_along_the_way():
    model = tiny_model(drop_path=0.3)
    rates = [block.drop_path.rate for stack in (*model.down, *model.up) for block in stack]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])


def test_mapping_network_depends_on_every_part():
    torch.manual_seed(0)
    network = MappingNetwork(3, 4, 2, 0.0)
    features = torch.randn(1, 12)
    condition = network(features)
    assert condition.shape == (1, 4) and len(network.layers) == 2
    for part in range(3):
        changed = features.clone()
        changed[:, 4 * part] += 1
        assert not torch.allclose(network(changed), condition)


@pytest.mark.parametrize(("classes", "captions", "parts"), [(0, 0, 1), (3, 0, 2), (0, 5, 2), (3, 5, 3)])
def test_dropping_zeroes_the_condition_exactly(classes, captions, parts):
    model, seen = tiny_model(num_classes=classes, caption_dim=captions), []
    model.mapping.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    given = arguments(classes=classes, captions=captions)
    model(**given, drop=torch.tensor([True, False]))
    width = model.config.mapping_width
    (features,) = seen
    assert features.shape == (2, parts * width)
    assert torch.equal(features[0, width:], torch.zeros((parts - 1) * width))
    assert (features[1, width:] != 0).all()
    assert (features[0, :width] != 0).any()  # time is never dropped


def test_a_dropped_velocity_depends_on_neither_label_nor_caption():
    model = tiny_model(num_classes=3, caption_dim=5)
    given = arguments(classes=3, captions=5)
    other = given | dict(labels=(given["labels"] + 1) % 3, captions=torch.full((2, 5), math.nan))
    drop = torch.ones(2, dtype=torch.bool)
    assert torch.equal(model(**given, drop=drop), model(**other, drop=drop))
    assert not torch.allclose(model(**given), model(**given | dict(labels=other["labels"])))
    assert not torch.allclose(model(**given), model(**given | dict(captions=given["captions"] + 1)))


# The model


@pytest.mark.parametrize("mixer", ["ssm", "attention"])
@pytest.mark.parametrize("skip", ["concat", "lerp"])
@pytest.mark.parametrize(("channels", "height", "width"), [(1, 63, 50), (3, 8, 8), (2, 1, 3)])
def test_any_size_and_number_of_channels(mixer, skip, channels, height, width):
    model = tiny_model(mixer=mixer, skip=skip, channels=channels)
    given = arguments(channels=channels, height=height, width=width)
    velocity = model(**given)
    assert velocity.shape == given["x"].shape and velocity.isfinite().all()


@pytest.mark.parametrize("mixer", ["ssm", "attention"])
def test_an_untrained_model_is_its_linear_prediction(mixer):
    model, given = tiny_model(trained=False, mixer=mixer, data_std=0.7), arguments()
    weight = skip_weight(given["t"], 0.7)[:, None, None, None]
    assert torch.equal(model(**given), weight * given["x"])
    at_noise = model(given["x"], torch.zeros(2))
    torch.testing.assert_close(at_noise, -given["x"], rtol=0, atol=0)  # one step from noise is the mean, 0


@pytest.mark.parametrize("mixer", ["ssm", "attention"])
def test_forward_and_backward_in_smoke_sizes(mixer):
    """Seed 000, validation checklist 2: B = 2, 64 x 64. Every parameter gets a gradient."""
    model = tiny_model(**{**SMOKE, "head_dim": 16}, mixer=mixer, num_classes=10, caption_dim=6).train()
    given = arguments(height=64, width=64, classes=10, captions=6)
    model(**given).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_every_pixel_reaches_every_other():
    """Through the bottleneck the whole grid is seen, in all stages and at any place."""
    model = tiny_model(scan_directions=("h", "h_flip"))
    given = arguments(batch=1, height=9, width=7)
    changed = given | dict(x=given["x"].clone())
    changed["x"][0, 0, 4, 3] += 1
    assert ((model(**given) - model(**changed)) != 0).all()


def test_the_padding_does_not_reach_the_velocity_of_a_grid_that_needs_none():
    """A padded grid is one whose missing pixels are zero: cropping is all that sets them apart."""
    model, given = tiny_model(), arguments(height=7, width=6)
    padded = F.pad(given["x"], (0, 2, 0, 1))
    torch.testing.assert_close(model(**given), model(padded, given["t"])[:, :, :7, :6])


def test_skips_are_those_of_the_matching_stage():
    model = tiny_model(dims=(4, 8, 12), depths=(1, 1, 1), head_dim=4)
    made, used = [], []
    for stack in list(model.down)[:-1]:
        stack[-1].register_forward_hook(lambda *given: made.append(given[-1]))
    for split in model.splits:
        split.register_forward_pre_hook(lambda _, given: used.append(given[1]))
    model(**arguments(height=16, width=8))
    assert [tuple(skip.shape) for skip in used] == [(2, 4, 2, 8), (2, 8, 4, 4)]
    assert used[0] is made[1] and used[1] is made[0]


def test_token_split_concatenates_or_mixes():
    torch.manual_seed(0)
    grid, cached = torch.randn(2, 3, 2, 8), torch.randn(2, 6, 4, 4)
    concat, lerp = TokenSplit(8, 4, "concat"), TokenSplit(8, 4, "lerp")
    up = spread_patches(grid @ concat.proj.weight.T)
    expected = torch.cat([up, cached], -1) @ concat.fuse.weight.T + concat.fuse.bias
    torch.testing.assert_close(concat(grid, cached), expected)
    up = spread_patches(grid @ lerp.proj.weight.T)
    torch.testing.assert_close(lerp(grid, cached), (up + cached) / 2)
    with torch.no_grad():
        lerp.weight.fill_(0)
    assert torch.equal(lerp(grid, cached), cached)
    assert not hasattr(lerp, "fuse") and not hasattr(concat, "weight")


def test_the_twin_has_the_same_topology():
    """Everything but the mixers is one and the same, name by name and shape by shape."""
    ssm, twin = tiny_model(), tiny_model(mixer="attention")
    shapes = [
        {name: tuple(p.shape) for name, p in model.named_parameters() if ".mixer." not in name}
        for model in (ssm, twin)
    ]
    assert shapes[0] == shapes[1]
    mixers = [[m for m in model.modules() if isinstance(m, SS2D | GridAttention)] for model in (ssm, twin)]
    assert len(mixers[0]) == len(mixers[1]) == 4
    assert {type(m) for m in mixers[0]} == {SS2D} and {type(m) for m in mixers[1]} == {GridAttention}


def test_grid_attention_knows_where_tokens_lie():
    torch.manual_seed(0)
    layer, grid = GridAttention(8, 4), torch.randn(1, 3, 4, 8)
    coords = module.token_coords(3, 4, torch.device("cpu"))
    shuffle = torch.randperm(12)
    mixed = layer(grid, coords).view(1, 12, 8)
    shuffled = grid.view(1, 12, 8)[:, shuffle].view_as(grid)
    assert not torch.allclose(layer(shuffled, coords).view(1, 12, 8), mixed[:, shuffle])
    torch.testing.assert_close(layer(shuffled, coords[:, shuffle]).view(1, 12, 8), mixed[:, shuffle])


def saved_bytes(model, given):
    """Bytes of what the forward pass keeps for the backward pass, weights left out."""
    kept, weights = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**given)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("mixer", ["ssm", "attention"])
def test_checkpointing_gives_identical_gradients_and_keeps_less(mixer):
    model = tiny_model(mixer=mixer, dropout=0.1, drop_path=0.2, num_classes=3).train()
    given = arguments(classes=3, height=16, width=16)
    gradients, kept = [], []
    for recompute in (False, True):
        model.gradient_checkpointing = recompute
        torch.manual_seed(3)
        loss = model(**given).square().mean()
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
        kept.append(saved_bytes(model, given))
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)
    assert kept[1] < kept[0] / 3


@pytest.mark.parametrize("mixer", ["ssm", "attention"])
def test_compiles_as_one_graph(mixer):
    """Traced only: no break in the graph. Compiling it takes minutes."""
    model = tiny_model(mixer=mixer, dims=(8, 8), depths=(1, 1), num_classes=3).train()
    given = arguments(classes=3, height=7, width=5)
    traced = torch.compile(model, fullgraph=True, backend="eager")
    velocity = traced(**given, drop=torch.tensor([True, False]))
    torch.testing.assert_close(velocity, model(**given, drop=torch.tensor([True, False])))
    torch._dynamo.reset()


def test_bfloat16_autocast_keeps_the_residual_stream():
    model, given = tiny_model(num_classes=3), arguments(classes=3)
    streams = []
    for stack in model.down:
        stack[0].register_forward_pre_hook(lambda _, taken: streams.append(taken[0].dtype))
    exact = model(**given)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(**given)
    assert set(streams) == {torch.float32} and rough.dtype == torch.float32
    assert (rough - exact).abs().max() < 0.05 * exact.abs().max()


def test_calls_leave_nothing_behind():
    model = tiny_model(num_classes=3)
    before = {name: set(vars(part)) for name, part in model.named_modules()}
    first = model(**arguments(classes=3))
    model(**arguments(classes=3, height=20, width=4, seed=5))
    assert torch.equal(model(**arguments(classes=3)), first)
    assert {name: set(vars(part)) for name, part in model.named_modules()} == before


# Parameters


@pytest.mark.parametrize("mixer", ["ssm", "attention"])
@pytest.mark.parametrize("skip", ["concat", "lerp"])
def test_weight_decay_reaches_every_projection_and_nothing_else(mixer, skip):
    model = tiny_model(mixer=mixer, skip=skip, num_classes=3, caption_dim=5)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, others = set(), set()
    for group in train._parameter_groups(model, 0.1):
        named = {names[id(parameter)] for parameter in group["params"]}
        (decayed if group["weight_decay"] else others).update(named)
    projections = set()
    for name, part in model.named_modules():
        if isinstance(part, torch.nn.Linear | torch.nn.Conv2d | torch.nn.Embedding):
            projections.add(f"{name}.weight")
        if isinstance(part, SS2D):
            projections.add(f"{name}.dt_weight")
    assert decayed == projections
    assert decayed | others == set(names.values()) and not decayed & others
    last = {name.rsplit(".", 1)[-1] for name in others}
    assert last == {"weight", "bias"} | ({"A_log", "D", "dt_bias"} if mixer == "ssm" else set())


def test_mapping_parameters_are_tagged():
    model = tiny_model(num_classes=3)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tagged = {names[id(parameter)] for parameter in mapping_parameters(model)}
    assert tagged == {name for name in names.values() if name.startswith("mapping.") or "norm.head." in name}
    assert "down.0.0.mixer_norm.head.weight" in tagged and "mapping.in_proj.weight" in tagged


def test_default_model_has_the_baselines_size():
    with torch.device("meta"):
        model = LocalMamba2D(LocalMamba2DConfig(channels=3, num_classes=102))
    assert 70e6 < sum(p.numel() for p in model.parameters()) < 80e6
    assert model.config.dims == (96, 192, 384, 768) and model.config.scan_directions == ("h", "v", "w7")


def test_presets_are_legal():
    sizes = {}
    for preset in run.PRESETS:
        settings = run.load_settings("localmamba", preset)
        train.TrainConfig(output_dir="unused", **settings["train"])
        with torch.device("meta"):
            model = LocalMamba2D(LocalMamba2DConfig(**settings["model"]))
        sizes[preset] = sum(p.numel() for p in model.parameters())
        assert settings["data"]["source"] in ("chirps", "fsdd")
    assert sizes["smoke"] < sizes["demo"] < sizes["full"]


@pytest.mark.parametrize("skip", ["concat", "lerp"])
def test_saved_and_opened_strictly(tmp_path, skip):
    model = tiny_model(num_classes=3, caption_dim=5, skip=skip, scan_directions=("h", "w2_flip"))
    model.save_pretrained(tmp_path)
    opened, given = load_model(tmp_path), arguments(classes=3, captions=5)
    assert isinstance(opened, LocalMamba2D) and opened.config == model.config and not opened.training
    assert torch.equal(opened(**given), model(**given))
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["model_type"] == "localmamba" not in FIELD_MODELS
    (tmp_path / "config.json").write_text(json.dumps({**settings, "scan_direction": ["h"]}))
    with pytest.raises(ValueError, match=r"unknown LocalMamba2DConfig keys \['scan_direction'\]"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**settings, "mapping_depth": 3}))
    with pytest.raises(ValueError, match="is damaged or of another model"):
        load_model(tmp_path)


# Training and sampling


def test_the_loss_drops_conditions_while_training():
    model, dropped = tiny_model(num_classes=3, cfg_dropout=0.3).train(), []
    model.mapping.register_forward_pre_hook(lambda _, given: dropped.append(given[0][:, 12:].eq(0).all(1)))
    batch = dict(spectrograms=torch.randn(400, 1, 4, 4), labels=torch.randint(3, (400,)))
    generator = torch.Generator().manual_seed(0)
    loss = grid_flow_loss(model, batch, generator=generator)
    assert loss.ndim == 0 and loss.isfinite()
    assert dropped.pop().float().mean().item() == pytest.approx(0.3, abs=0.08)  # standard error 0.023
    again = grid_flow_loss(model, batch, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loss, again)
    dropped.clear()
    grid_flow_loss(model.eval(), batch)
    assert not dropped.pop().any()
    grid_flow_loss(model, batch, drop=torch.ones(400, dtype=torch.bool))
    assert dropped.pop().all()


def test_the_loss_is_that_of_the_velocity():
    model = tiny_model()
    batch, t = dict(spectrograms=arguments()["x"]), torch.tensor([0.25, 0.75])
    noise = torch.randn_like(batch["spectrograms"])
    x_t = (1 - t[:, None, None, None]) * noise + t[:, None, None, None] * batch["spectrograms"]
    expected = (model(x_t, t) - target_velocity(noise, batch["spectrograms"])).square().mean()
    torch.testing.assert_close(grid_flow_loss(model, batch, t=t, noise=noise), expected)
    with pytest.raises(ValueError, match=r"the batch lacks \['labels'\]"):
        grid_flow_loss(tiny_model(num_classes=3), batch)


def test_a_few_steps_lower_the_loss():
    model = tiny_model(trained=False, num_classes=2).train()
    generator = torch.Generator().manual_seed(0)
    pattern = torch.sign(torch.randn(2, 1, 8, 8, generator=generator))
    batch = dict(spectrograms=pattern.repeat(8, 1, 1, 1), labels=torch.arange(2).repeat(8))
    fixed = dict(
        t=torch.linspace(0, 1, 16),
        noise=torch.randn(16, 1, 8, 8, generator=generator),
        drop=torch.zeros(16, dtype=torch.bool),
    )
    optimizer = torch.optim.AdamW(train._parameter_groups(model, 0.01), lr=1e-2)
    before = grid_flow_loss(model, batch, **fixed).item()
    for _ in range(30):
        optimizer.zero_grad()
        grid_flow_loss(model, batch, generator=generator).backward()
        optimizer.step()
    assert grid_flow_loss(model, batch, **fixed).item() < 0.5 * before


def test_guidance_is_linear_in_the_two_velocities():
    model, given = tiny_model(num_classes=3), arguments(classes=3)
    x, labels, t = given["x"], given["labels"], torch.tensor(0.4)
    conditional = model(x, t.expand(2), labels)
    unconditional = model(x, t.expand(2), labels, drop=torch.ones(2, dtype=torch.bool))
    assert not torch.allclose(conditional, unconditional)
    for guidance in (0.0, 1.0, 2.5, -0.5):
        expected = unconditional + guidance * (conditional - unconditional)
        found = guided_velocity(model, labels, guidance=guidance)(x, t)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"guidance=nan is not a finite number"):
        guided_velocity(model, labels, guidance=math.nan)
    with pytest.raises(ValueError, match=r"guidance=2.0 with a model without classes and captions"):
        guided_velocity(tiny_model(), guidance=2.0)


@pytest.mark.parametrize("method", samplers.SAMPLERS)
def test_grids_are_sampled_the_same_from_the_same_noise(method):
    model = tiny_model(num_classes=3).train()
    options = dict(labels=torch.tensor([0, 2]), guidance=2.0, method=method, steps=2)
    drawn, again = (
        sample_grids(model, 2, 5, 6, **options, generator=torch.Generator().manual_seed(4)) for _ in range(2)
    )
    assert drawn.shape == (2, 1, 5, 6) and torch.equal(drawn, again) and model.training
    assert drawn.abs().max() <= 1 and not drawn.requires_grad


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(count=0), "count=0 is not a positive whole number"),
        (dict(height=2.5), "height=2.5 is not a positive whole number"),
        (dict(steps=0), "steps=0 is not a positive whole number"),
        (dict(method="rk9"), "method='rk9' is unknown; choose one of"),
    ],
)
def test_sampling_refuses(wrong, message):
    with pytest.raises(ValueError, match=message):
        sample_grids(tiny_model(), **{**dict(count=1, height=4, width=4), **wrong})


def test_diffusers_scheduler_takes_the_model():
    """Seed 000: FlowMatchEulerDiscreteScheduler draws what our Euler sampler draws."""
    model, steps = tiny_model(num_classes=3), 4
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=torch.linspace(1, 0, steps + 1)[:-1].numpy())
    velocity = guided_velocity(model, torch.tensor([0, 2]), guidance=2.5)
    noise = arguments()["x"]
    theirs = noise
    with torch.no_grad():
        for sigma, timestep in zip(scheduler.sigmas, scheduler.timesteps, strict=False):
            output = to_diffusers_velocity(velocity(theirs, 1 - sigma))
            theirs = scheduler.step(output, timestep, theirs).prev_sample
        ours = samplers.euler(velocity, noise, torch.linspace(0, 1, steps + 1))
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


# What is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(scan_directions=("h", "x")), "scan_directions has 'x'; legal are 'h', 'v' and 'w<N>'"),
        (dict(scan_directions=("w0",)), "scan_directions has 'w0'"),
        (dict(scan_directions=()), r"scan_directions=\(\) is not a sequence of directions"),
        (dict(scan_directions=("h", "h")), "names one twice"),
        (dict(dims=(8, 16, 32)), r"dims=\(8, 16, 32\) has 3 stages and depths=\(1, 2\) has 2"),
        (dict(dims=(8, 0)), r"dims=\(8, 0\) is not a sequence of positive whole numbers"),
        (dict(depths=(1, True)), r"depths=\(1, True\) is not a sequence"),
        (dict(ssm_ratio=0.01), "ssm_ratio=0.01 leaves nothing of a width of 8"),
        (dict(mixer="mamba"), r"mixer='mamba' is unknown; choose one of \('ssm', 'attention'\)"),
        (dict(skip="add"), r"skip='add' is unknown; choose one of \('concat', 'lerp'\)"),
        (dict(mixer="attention", head_dim=6), r"must be divisible by head_dim=6"),
        (dict(mapping_width=7), "mapping_width=7 must be even"),
        (dict(cfg_dropout=1.0), r"cfg_dropout=1.0 is outside \[0, 1\)"),
        (dict(drop_path=-0.1), r"drop_path=-0.1 is outside \[0, 1\)"),
        (dict(dropout=1.0), r"dropout=1.0 is outside \[0, 1\)"),
        (dict(num_classes=-1), "num_classes=-1 is not a whole number of at least 0"),
        (dict(caption_dim=2.5), "caption_dim=2.5 is not a whole number of at least 0"),
        (dict(data_std=0.0), "data_std=0.0 is not a positive float"),
    ],
)
def test_configs_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        LocalMamba2DConfig(**{**TINY, **settings})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(x=torch.zeros(2, 3, 8, 8)), r"x has shape \(2, 3, 8, 8\); this model has 1 channels"),
        (dict(x=torch.zeros(2, 8, 8)), r"x has shape \(2, 8, 8\)"),
        (dict(x=torch.zeros(2, 1, 0, 8)), "not empty"),
        (dict(x=torch.zeros(2, 1, 8, 8, dtype=torch.int64)), "x has dtype torch.int64"),
        (dict(t=torch.zeros(3)), r"t has shape \(3,\); x asks for \(2,\)"),
        (dict(t=torch.tensor([0.0, 1.5])), r"t spans \[0, 1.5\]"),
        (dict(labels=None), r"this model has num_classes=3 and got no labels; pass labels \(B,\) int64"),
        (dict(labels=torch.tensor([0, 3])), r"labels has class 3; this model has 3 classes, pass 0 ... 2"),
        (dict(labels=torch.tensor([-1, 0])), "labels has class -1"),
        (dict(labels=torch.zeros(2)), "labels is torch.float32 of shape"),
        (dict(captions=None), r"this model has caption_dim=5 and got no captions; pass captions \(B, 5\)"),
        (dict(captions=torch.zeros(2, 4)), r"captions has shape \(2, 4\); x asks for \(2, 5\)"),
        (dict(drop=torch.zeros(2)), r"drop is torch.float32 .* pass torch.bool \(2,\)"),
    ],
)
def test_arguments_are_checked(wrong, message):
    given = arguments(classes=3, captions=5) | wrong
    with pytest.raises(ValueError, match=message):
        tiny_model(num_classes=3, caption_dim=5)(**given)


def test_a_condition_that_is_not_taken_is_refused():
    for name, value in (("labels", torch.zeros(2, dtype=torch.int64)), ("captions", torch.zeros(2, 3))):
        with pytest.raises(ValueError, match=re.escape(f"takes no {name}")):
            tiny_model()(**arguments(), **{name: value})


def test_values_are_not_read_back_from_another_device():
    """On the meta device reading a value back is an error: shapes alone must do."""
    model = copy.deepcopy(tiny_model(mixer="attention", num_classes=3)).to("meta")
    given = {name: value.to("meta") for name, value in arguments(classes=3).items()}
    assert model(**given).shape == given["x"].shape
