"""LocalMamba: scans of grids, their fusion, conditions, the U-shaped network and its twin with attention."""

import copy
import math

import pytest
import torch
from test_models import away_from_zero
from torch.nn import functional as F

from nfhelpers.flow import skip_weight
from nfhelpers.kernels.orders import grid_order
from nfhelpers.kernels.reference import selective_scan_reference
from nfhelpers.models import LocalMamba2D, LocalMamba2DConfig
from nfhelpers.models.local_mamba import (
    SS2D,
    AdaRMSNorm,
    BiAttn,
    DropPath,
    GridAttention,
    TokenSplit,
    gather_patches,
    spread_patches,
    stage_places,
)

TINY = dict(dims=(8, 16), depths=(1, 2), d_state=3, mlp_ratio=2.0, mapping_width=12, dropout=0.0, head_dim=4)
DIRECTIONS = ("h", "h_flip", "v", "v_flip", "w7", "w2_flip")
CPU = torch.device("cpu")
mixers = pytest.mark.parametrize("mixer", ["ssm", "attention"])


def tiny_model(trained=True, **settings):
    """A small model in eval mode; `trained` moves what starts at zero away from it."""
    torch.manual_seed(0)
    model = LocalMamba2D(LocalMamba2DConfig(**{**TINY, **settings})).eval()
    return away_from_zero(model, 0.2) if trained else model


def arguments(batch=2, channels=1, height=12, width=8, classes=0, captions=0):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, channels, height, width, generator=generator)
    given = dict(x=x, t=torch.linspace(0.1, 0.9, batch))
    if classes:
        given["labels"] = torch.randint(classes, (batch,), generator=generator)
    if captions:
        given["captions"] = torch.randn(batch, captions, generator=generator)
    return given


@pytest.mark.parametrize(("height", "width"), [(5, 9), (8, 3)])
def test_ss2d_equals_scans_of_permuted_copies(height, width):
    torch.manual_seed(0)
    layer = SS2D(6, 3, 2.0, DIRECTIONS).double()
    with torch.no_grad():
        layer.A_log.add_(0.3 * torch.randn_like(layer.A_log))
        layer.D.normal_()
    grid = torch.randn(2, height, width, 6, dtype=torch.float64)
    x, z = layer.in_proj(grid).chunk(2, -1)
    x = F.silu(layer.conv(x.permute(0, 3, 1, 2))).flatten(2).mT  # (B, L, E)
    projected = layer.x_proj(x).unflatten(-1, (len(DIRECTIONS), -1))  # (B, L, K, R+2N)
    outputs = torch.zeros(2, len(DIRECTIONS), *x.shape[1:], dtype=x.dtype)
    for k, kind in enumerate(DIRECTIONS):
        walk, rates = grid_order(height, width, kind), -layer.A_log[k].exp()  # with the flip
        low, B, C = projected[:, walk, k].split([layer.dt_rank, layer.d_state, layer.d_state], -1)
        u, delta, B, C = (values.mT for values in (x[:, walk], low @ layer.dt_weight[k].T, B, C))
        y = selective_scan_reference(u, delta, rates, B, C, layer.D[k], None, layer.dt_bias[k], True)
        outputs[:, k, walk] = y.mT
    (orders,) = stage_places(height, width, 1, DIRECTIONS, CPU)
    expected = layer.out_proj(layer.norm(layer.fusion(outputs)) * F.silu(z).flatten(1, 2)).view_as(grid)
    torch.testing.assert_close(layer(grid, orders), expected, rtol=1e-5, atol=1e-6)


def test_places_of_a_grid_are_kept_and_do_not_depend_on_where_they_were_asked_for_first():
    """Neither inference mode nor a default device nor a trace may stick to them."""
    directions = ("h", "h_flip", "w3")
    with torch.inference_mode(), torch.device("meta"):
        first, second = stage_places(10, 14, 2, directions, CPU)
    assert first.device == CPU and not first.is_inference()
    assert torch.equal(first, torch.stack([grid_order(10, 14, kind) for kind in ("h", "h", "w3")]))
    assert torch.equal(second, torch.stack([grid_order(5, 7, kind) for kind in ("h", "h", "w3")]))
    assert stage_places(10, 14, 2, directions, CPU)[0].data_ptr() == first.data_ptr()
    for mixer in ("ssm", "attention"):
        model, given = tiny_model(mixer=mixer), (torch.randn(1, 1, 20, 28), torch.tensor([0.5]))
        torch.export.export(model, given)
        assert type(model(*given)) is torch.Tensor


def test_biattn_weighs_directions_by_what_they_found():
    torch.manual_seed(0)
    layer, y = BiAttn(8), torch.randn(2, 3, 5, 8)
    seen = layer.norm(y)
    whole = F.gelu(layer.whole_proj(seen.mean(2)))  # (B, K, hidden)
    place = layer.place_score(F.gelu(layer.place_proj(seen))) + layer.whole_score(whole)[:, :, None]
    weights = layer.channel_score(whole).sigmoid()[:, :, None] * place.sigmoid()
    torch.testing.assert_close(layer(y), (y * weights).sum(1))
    torch.testing.assert_close(layer(y[:, [2, 0, 1]]), layer(y))


def test_patches_are_2_x_2_and_undone():
    grid = torch.arange(2 * 4 * 6 * 3.0).view(2, 4, 6, 3)
    patches = gather_patches(grid)
    torch.testing.assert_close(patches[1, 1, 2].view(2, 2, 3), grid[1, 2:4, 4:6])
    assert torch.equal(spread_patches(patches), grid)


def test_token_split_concatenates():
    torch.manual_seed(0)
    below, cached = torch.randn(1, 2, 3, 6), torch.randn(1, 4, 6, 4)
    split = TokenSplit(6, 4)
    both = torch.cat([spread_patches(split.proj(below)), cached], -1)
    torch.testing.assert_close(split(below, cached), split.fuse(both))


def test_ada_rms_norm_starts_plain_and_scales_and_shifts():
    torch.manual_seed(0)
    layer, grid, condition = AdaRMSNorm(4, 6), torch.randn(2, 3, 5, 4), torch.randn(2, 6)
    plain = F.rms_norm(grid, (4,), eps=1e-6)
    torch.testing.assert_close(layer(grid, condition), plain)
    torch.nn.init.normal_(layer.head.weight)
    scale, shift = (condition @ layer.head.weight.T)[:, None, None].chunk(2, -1)
    torch.testing.assert_close(layer(grid, condition), plain * (1 + scale) + shift)


def test_drop_path_drops_whole_samples_keeps_the_mean_and_rises_along_the_way():
    torch.manual_seed(0)
    layer, ones = DropPath(0.25), torch.ones(4000, 2, 3, 1)
    dropped = layer(ones)
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert torch.equal(dropped.amax((1, 2, 3)), dropped.amin((1, 2, 3)))
    assert dropped.mean().item() == pytest.approx(1, abs=0.05)  # standard error 0.009
    assert torch.equal(layer.eval()(ones), ones)
    model = tiny_model(drop_path=0.3)
    rates = [block.drop_path.p for stack in (*model.down, *model.up) for block in stack]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])


def test_a_dropped_velocity_depends_on_neither_label_nor_caption():
    model = tiny_model(num_classes=3, caption_dim=5)
    given = arguments(classes=3, captions=5)
    other = given | dict(labels=(given["labels"] + 1) % 3, captions=torch.full((2, 5), math.nan))
    drop = torch.ones(2, dtype=torch.bool)
    assert torch.equal(model(**given, drop=drop), model(**other, drop=drop))
    assert not torch.allclose(model(**given), model(**given | dict(labels=other["labels"])))
    assert not torch.allclose(model(**given), model(**given | dict(captions=given["captions"] + 1)))


@mixers
@pytest.mark.parametrize(("channels", "height", "width"), [(1, 31, 18), (2, 1, 3)])
def test_any_size_and_number_of_channels(mixer, channels, height, width):
    model = tiny_model(mixer=mixer, channels=channels)
    velocity = model(**arguments(channels=channels, height=height, width=width))
    assert velocity.shape == (2, channels, height, width) and velocity.isfinite().all()


@mixers
def test_an_untrained_model_is_its_linear_prediction(mixer):
    model, given = tiny_model(trained=False, mixer=mixer, data_std=0.7), arguments()
    weight = skip_weight(given["t"], 0.7)[:, None, None, None]
    assert torch.equal(model(**given), weight * given["x"])


@mixers
def test_every_parameter_gets_a_gradient_also_when_layers_are_recomputed(mixer):
    given, grads = arguments(classes=3, captions=5), []
    for recompute in (False, True):
        model = tiny_model(mixer=mixer, num_classes=3, caption_dim=5, dropout=0.1, drop_path=0.2).train()
        model.gradient_checkpointing = recompute
        torch.manual_seed(4)
        model(**given).square().mean().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert all(grad is not None and grad.any() for grad in grads[0].values())
    assert all(torch.equal(grads[1][name], grad) for name, grad in grads[0].items())


def test_every_pixel_reaches_every_other_and_samples_are_independent():
    model, given = tiny_model(scan_directions=("h", "h_flip")), arguments(height=9, width=7)
    changed = given | dict(x=given["x"].clone())
    changed["x"][0, 0, 4, 3] += 1
    difference = model(**given) - model(**changed)
    assert (difference[0] != 0).all() and not difference[1].any()


def test_the_twin_has_the_same_topology_and_knows_where_tokens_lie():
    names = [{n for n, _ in tiny_model(mixer=m).named_parameters()} for m in ("ssm", "attention")]
    ssm, attention = ({name for name in all_ if ".mixer." not in name} for all_ in names)
    assert ssm == attention
    torch.manual_seed(0)
    layer, grid = GridAttention(8, 4), torch.randn(1, 3, 4, 8)
    (coords,) = stage_places(3, 4, 1, None, CPU)
    torch.testing.assert_close(coords[0, 5], torch.tensor([1.5 / 4, 1.5 / 3]))
    shuffle = torch.randperm(12)
    moved = layer(grid.flatten(1, 2)[:, shuffle].view_as(grid), coords[:, shuffle]).flatten(1, 2)
    expected = layer(grid, coords).flatten(1, 2)
    torch.testing.assert_close(moved, expected[:, shuffle], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(layer(grid, coords[:, shuffle]).flatten(1, 2), expected, atol=1e-3)


@mixers
def test_compiles_as_one_graph(mixer):
    """Traced only: no break in the graph. Compiling it takes minutes."""
    model = tiny_model(mixer=mixer, dims=(8, 8), depths=(1, 1), num_classes=3).train()
    given = arguments(classes=3, height=7, width=5) | dict(drop=torch.tensor([True, False]))
    velocity = torch.compile(model, fullgraph=True, backend="eager")(**given)
    torch.testing.assert_close(velocity, model(**given))
    torch.compiler.reset()


def test_autocast_keeps_a_float32_stream():
    model, given, streams = tiny_model(num_classes=3), arguments(classes=3), []
    for stack in model.down:
        stack.register_forward_pre_hook(lambda _, taken: streams.append(taken[0].dtype))
    exact = model(**given)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(**given)
    assert {*streams, rough.dtype} == {torch.float32}
    assert (rough - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize(
    "settings",
    [
        dict(scan_directions=("h", "x")),
        dict(scan_directions=("w0",)),
        dict(dims=(8, 16), depths=(1, 2, 3)),
        dict(mixer="mamba"),
        dict(skip="add"),
        dict(mixer="attention", dims=(8, 18), head_dim=4),
    ],
)
def test_settings_that_would_be_silently_wrong_are_refused(settings):
    with pytest.raises(ValueError):
        tiny_model(**settings)(**arguments())


def test_arguments_that_would_be_silently_wrong_are_refused_and_nothing_is_read_from_another_device():
    model, given = tiny_model(num_classes=3), arguments(classes=3)
    for wrong in (dict(t=torch.tensor([0.0, 1.5])), dict(labels=None), dict(captions=torch.zeros(2, 5))):
        with pytest.raises(ValueError):
            model(**given | wrong)
    with pytest.raises(IndexError):
        model(**given | dict(labels=torch.tensor([0, 3])))
    twin = copy.deepcopy(tiny_model(mixer="attention", num_classes=3)).to("meta")
    given = {name: value.to("meta") for name, value in given.items()}
    assert twin(**given).shape == given["x"].shape
