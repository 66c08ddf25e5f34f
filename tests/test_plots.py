"""Figures: the axes, pictures and numbers they promise."""

import io

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from nfhelpers import plots
from nfhelpers.images import grid_coords
from nfhelpers.kernels.orders import grid_order, point_order
from nfhelpers.spectrograms import generated_meta

RNG = np.random.default_rng(0)
FIELDS = RNG.uniform(0.1, 0.8, size=(3, 12, 12, 3))
MASK = RNG.uniform(size=(3, 12, 12)) < 0.3


def pictures(figure):
    """The arrays of all pictures of a figure, in the order of its axes."""
    return [np.asarray(image.get_array()) for ax in figure.axes for image in ax.images]


def texts(figure):
    """Every title and axis label of a figure."""
    words = [ax.get_title() for ax in figure.axes] + [ax.get_ylabel() for ax in figure.axes]
    return [figure.get_suptitle(), *filter(None, words)]


def check(figure):
    """It is a Figure outside pyplot, can be written and is not one colour."""
    assert isinstance(figure, Figure)
    assert pyplot.get_fignums() == []
    file = io.BytesIO()
    figure.savefig(file, format="png")
    assert np.asarray(Image.open(file)).std() > 1
    return figure


def test_observed_pixels_stand_on_grey():
    sparse = plots.observed_pixels(FIELDS, MASK)
    np.testing.assert_array_equal(sparse[MASK], FIELDS[MASK])
    assert (sparse[~MASK] == plots.UNOBSERVED).all()
    figure = check(plots.sparse_field(torch.from_numpy(FIELDS), torch.from_numpy(MASK), title="a [demo]"))
    assert "a [demo]" in texts(figure)
    shown = pictures(figure)
    assert len(shown) == 6
    np.testing.assert_array_equal(shown[1], FIELDS[1])
    np.testing.assert_array_equal(shown[4], sparse[1])
    with pytest.raises(ValueError, match=r"\(3, 12, 12\)"):
        plots.sparse_field(FIELDS, MASK[:2])


def test_reconstruction_row_states_its_scores():
    target = np.full((2, 16, 16, 3), 0.5)
    figure = check(plots.reconstruction_row(FIELDS[:2], target + 0.1, target, name="mean"))
    shown = pictures(figure)[:8]
    assert [picture.shape[:2] for picture in shown] == 2 * [(12, 12), (16, 16), (16, 16), (16, 16)]
    np.testing.assert_allclose(shown[3], 0.1)  # the error map
    assert any(text.startswith("mean\n20.0 dB") for text in texts(figure))
    with pytest.raises(ValueError, match="one size"):
        plots.reconstruction_row(FIELDS, FIELDS, target)


def test_comparison_grid_has_a_column_a_method():
    methods = {"observed": FIELDS[:2], "linear": FIELDS[1:], "rbf": FIELDS[:2]}
    figure = check(plots.comparison_grid(methods, FIELDS[:2]))
    assert len(figure.axes) == 2 * 4
    np.testing.assert_array_equal(pictures(figure)[4 + 1], FIELDS[2])
    titles = [ax.get_title() for ax in figure.axes]
    assert titles[0] == "observed" and titles[1].startswith("linear\n") and titles[5].startswith("\n")
    assert "SSIM 1.00" in titles[2] and titles[3] == "target"


def test_multiscale_grid_marks_what_is_missing():
    fields = {
        16: {"linear": np.zeros((16, 16, 3)), "target": np.full((16, 16, 3), 0.1)},
        12: {"linear": FIELDS[0], "mean": FIELDS[1], "target": None},
    }
    figure = check(plots.multiscale_grid(fields))
    assert [ax.get_title() for ax in figure.axes[:2]][0] == "12x12"
    assert "20.0 dB" in figure.axes[1].get_title()
    words = [text.get_text() for ax in figure.axes for text in ax.texts]
    assert sorted(words) == ["no ground truth", "not computed"]


def test_uncertainty_map_needs_a_spread():
    figure = check(plots.uncertainty_map(FIELDS, FIELDS / 10, FIELDS + 0.1))
    np.testing.assert_allclose(pictures(figure)[2], 0.1)
    with pytest.raises(ValueError, match="draws >= 2"):
        plots.uncertainty_map(FIELDS, np.full_like(FIELDS, np.nan), FIELDS)


def test_path_figure():
    states = RNG.uniform(size=(4, 2, 8, 8, 3))
    figure = check(plots.path_figure(states, [0, 0.25, 0.5, 1]))
    assert [ax.get_title() for ax in figure.axes[:4]] == ["t = 0.00", "t = 0.25", "t = 0.50", "t = 1.00"]
    np.testing.assert_array_equal(pictures(figure)[5], states[1, 1])


def test_steps_curve_draws_samples_and_means():
    row = {"psnr": 20.0, "psnr_se": 0.1, "ssim": 0.5, "ssim_se": None}
    rows = [{**row, "kind": "sample", "method": "sample (euler)", "steps": steps} for steps in (1, 10, 50)]
    rows += [{**row, "psnr": 23.0, "kind": "mean", "method": "posterior mean (1 step)", "steps": 1}]
    figure = check(plots.steps_curve(rows))
    left = figure.axes[0]
    np.testing.assert_array_equal(left.lines[0].get_xdata(), [1, 10, 50])
    legend = [text.get_text() for text in left.get_legend().get_texts()]
    assert set(legend) == {"sample (euler)", "posterior mean (1 step)"}
    assert 23.0 in {line.get_ydata()[0] for line in left.lines}
    with pytest.raises(ValueError, match="sample"):
        plots.steps_curve(rows[3:])


@pytest.mark.parametrize("steps", [0, 1, 100])
def test_training_figure_at_any_stage(steps):
    history = {"step": list(range(steps)), "loss": list(np.linspace(1, 0.1, steps))}
    if steps == 100:
        history |= {"val_step": [50, 100], "val_loss": [0.5, 0.4], "val_psnr": [18.0, 20.0]}
    fields = {"sparse": FIELDS, "reconstruction": FIELDS, "target": FIELDS}
    figure = check(plots.training_figure(history, fields if steps == 100 else None, title="v1 [smoke]"))
    loss = figure.axes[0].lines[0].get_ydata()
    np.testing.assert_allclose(loss, history["loss"])
    if steps == 100:
        np.testing.assert_array_equal(figure.axes[1].lines[0].get_ydata(), [18.0, 20.0])
        assert len(pictures(figure)) == 9


def test_training_figure_of_grids_has_the_rows_it_is_given_and_no_psnr():
    history = {"step": [1, 2], "loss": [1.0, 0.5], "val_step": [2], "val_loss": [0.6], "val_psnr": [np.nan]}
    figure = check(plots.training_figure(history, {"sample": FIELDS, "data": FIELDS[::-1]}))
    assert figure.axes[0].get_ylabel() == "loss" and len(figure.axes) == 1 + 2 * len(FIELDS)
    assert [ax.get_ylabel() for ax in figure.axes[1 :: len(FIELDS)]] == ["sample", "data"]
    np.testing.assert_array_equal(pictures(figure)[3], FIELDS[2])


def test_curves_differ_in_colour_and_style():
    x = np.arange(1, 5)
    lines = {"a": (x, x), "b": (x, 2 * x), "_quiet": (x, 3 * x, {"color": "black", "linewidth": 3})}
    panels = {"left": {"lines": lines, "xlabel": "n", "yscale": "log"}, "right": {"lines": {"c": (x, x)}}}
    figure = plots.curves(panels, "Heading")
    left, right = figure.axes
    assert [line.get_linestyle() for line in left.lines[:2]] == ["-", "--"]
    assert left.lines[0].get_color() != left.lines[1].get_color()
    assert left.lines[2].get_color() == "black" and left.lines[2].get_linewidth() == 3
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["a", "b"]
    assert (left.get_yscale(), left.get_xlabel(), right.get_title()) == ("log", "n", "right")
    marked = plots.curves(panels, markers=True)
    assert [line.get_marker() for line in marked.axes[0].lines[:2]] == ["o", "s"]
    with pytest.raises(ValueError, match="panels is empty"):
        plots.curves({})


def test_token_rows_and_steps_show_what_they_are_given():
    ids = np.array([[0, -1, 2, 1], [-1, 2, 2, 0]])
    shown = plots.token_rows(ids, shaded=(1, 2)).axes[0].images[0].get_array()
    assert shown.mask.tolist() == (ids < 0).tolist()
    delta = np.array([[1e-3, 1e-1], [1e-2, 1e-1], [1e-1, 1e-1]])  # (L, D)
    kinds = {"noise": np.array([True, False, True]), "data": np.array([False, True, False])}
    figure = plots.step_figure(delta, kinds, order=[1, 0])
    np.testing.assert_allclose(figure.axes[0].images[0].get_array(), [[-1, -1, -1], [-3, -2, -1]])
    noise, data = figure.axes[1].lines[1:]
    np.testing.assert_allclose(noise.get_ydata(), delta[[0, 2]].mean(axis=1))
    assert data.get_xdata().tolist() == [1]


def test_cost_curve_fits_the_exponent():
    lengths = np.array([100, 200, 400, 800])
    rows = [{"method": "linear", "length": int(n), "seconds": 2e-6 * n, "memory": 100.0 * n} for n in lengths]
    rows += [{"method": "square", "length": int(n), "seconds": 1e-8 * n**2, "memory": None} for n in lengths]
    figure = check(plots.cost_curve(rows, length=1000))
    legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert legend[0] == "linear: $L^{1.00}$, 2 at 1000" and legend[1] == "square: $L^{2.00}$, 10 at 1000"
    assert len(figure.axes[1].get_legend().get_texts()) == 1
    assert plots.power_law(lengths, 3.0 * lengths**1.5)[0] == pytest.approx(1.5)


def test_impulse_response_is_exact_under_zero_order_hold():
    a, delta = -2.0, 0.3
    figure = check(plots.impulse_response(a, delta, length=10))
    lines = {line.get_label(): line.get_ydata() for line in figure.axes[0].lines}
    k = np.arange(10)
    # A unit pulse of width delta: the state decays from (1 - exp(a delta)) / -a.
    np.testing.assert_allclose(lines["zero-order hold"], np.exp(a * delta * k) * (1 - np.exp(a * delta)) / -a)
    np.testing.assert_allclose(lines["forward Euler"], (1 + a * delta) ** k * delta)
    np.testing.assert_allclose(lines["continuous"][::8], lines["zero-order hold"])
    integrator = plots.impulse_response(0.0, delta, length=5)
    hold = {line.get_label(): line.get_ydata() for line in integrator.axes[0].lines}["zero-order hold"]
    np.testing.assert_allclose(hold, delta)
    with pytest.raises(ValueError, match="delta=0"):
        plots.impulse_response(-1, 0)


def test_fourier_figures():
    distance = np.linspace(0, 4, 20)
    figure = check(plots.fourier_kernel(distance, {"256": np.exp(-distance), "theory": np.exp(-distance)}))
    assert [line.get_linestyle() for line in figure.axes[0].lines[:2]] == ["-", "--"]
    figure = check(plots.similarity_maps({"a": np.eye(4), "b": -np.eye(4)}))
    np.testing.assert_array_equal(pictures(figure)[1], -np.eye(4))


def test_cost_bars():
    cost = {"parameters": 2_000_000, "flops_forward": 3e9, "training_bytes": 2**30}
    figure = check(plots.cost_bars({"v1": cost, "other": {**cost, "parameters": 4_000_000}}))
    assert [bar.get_width() for bar in figure.axes[0].patches] == [2.0, 4.0]
    assert figure.axes[2].patches[0].get_width() == 1.0


@pytest.mark.parametrize("bad", [np.zeros((8, 8)), np.zeros((0, 8, 8, 3)), np.zeros((2, 8, 8, 4))])
def test_wrong_fields_are_refused(bad):
    with pytest.raises(ValueError, match=r"pass \(N, H, W, 3\)"):
        plots.sparse_field(bad, MASK)


@pytest.mark.parametrize("history", [{}, {"step": [1]}, {"loss": [1.0]}])
def test_training_figure_needs_a_history(history):
    with pytest.raises(ValueError, match="history has the keys .* with step and loss"):
        plots.training_figure(history)


def comparison_row(kind, metric, **change):
    row = {"kind": kind, "metric": metric, "a": 2.0, "a_se": 0.1, "b": 3.0, "b_se": 0.2, "improvement": 1.0}
    return {**row, "improvement_se": 0.1, "p_wilcoxon": 0.03, "differences": [0.9, 1.1, 1.0], **change}


def test_improvement_chart_shows_scores_and_every_image():
    names = ("psnr", "ssim", "speckle", "seconds")
    rows = [comparison_row(kind, metric) for kind in ("mean", "sample") for metric in names]
    figure = check(plots.improvement_chart(rows, ("v1", "v2"), title="photos"))
    assert len(figure.axes) == 8
    assert figure.axes[2].get_title() == "speckle, less is better"
    assert [bar.get_height() for bar in figure.axes[0].patches] == [2.0, 2.0, 3.0, 3.0]
    ticks = [label.get_text() for label in figure.axes[4].get_xticklabels()]
    assert ticks == ["posterior\nmean\np = 0.03", "posterior\nsample\np = 0.03"]
    np.testing.assert_array_equal(figure.axes[4].lines[0].get_ydata(), [0.9, 1.1, 1.0])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["v1", "v2"]
    with pytest.raises(ValueError, match="rows is empty"):
        plots.improvement_chart([])


def test_improvement_chart_of_undefined_scores():
    empty = dict.fromkeys(("a", "a_se", "b", "b_se", "improvement", "improvement_se", "p_wilcoxon"))
    one = comparison_row("mean", "psnr", a_se=None, b_se=None, improvement_se=None, p_wilcoxon=None)
    rows = [{**one, "differences": [1.0]}, comparison_row("sample", "psnr", **empty, differences=[])]
    figure = check(plots.improvement_chart(rows))
    ticks = [label.get_text() for label in figure.axes[1].get_xticklabels()]
    assert ticks == ["posterior\nmean", "posterior\nsample"]


def test_scan_paths_visit_the_points_in_their_order():
    points = torch.stack([grid_coords(3, 4), torch.rand(12, 2)])
    figure = check(plots.scan_paths(points, ("row", "column"), "paths [demo]", ["grid", "random"]))
    assert [ax.get_title() for ax in figure.axes] == ["row", "column", "", ""]
    assert {"paths [demo]", "grid", "random"} <= set(texts(figure))
    for ax, (which, kind) in zip(
        figure.axes, [(0, "row"), (0, "column"), (1, "row"), (1, "column")], strict=True
    ):
        lines = np.array(ax.collections[0].get_segments())  # (L-1, 2, 2)
        visited = points[which][point_order(points, kind)[which]].numpy()
        np.testing.assert_allclose(lines[:, 0], visited[:-1], atol=1e-6)
        np.testing.assert_allclose(lines[:, 1], visited[1:], atol=1e-6)
        assert ax.get_ylim()[0] > ax.get_ylim()[1]  # y downwards, as in a picture
    with pytest.raises(ValueError, match="kinds is empty"):
        plots.scan_paths(points, ())
    with pytest.raises(ValueError, match="kind='spiral'"):
        plots.scan_paths(points, ("spiral",))


def test_neighbour_ranks_state_medians_and_shares():
    curves = {"row": torch.tensor([[1, 1], [32, 32]]), "best of two": [1, 1, 1, np.inf], "far": [np.inf] * 3}
    figure = check(plots.neighbour_ranks({"grid": curves, "points": {"row": [1, 2, 3]}}))
    legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert legend == ["row: 16.5", "best of two: 1", "far: never"]
    row, best, far = figure.axes[0].lines
    np.testing.assert_array_equal(row.get_xdata(), [1, 1, 32, 32])
    np.testing.assert_array_equal(row.get_ydata(), [0.25, 0.5, 0.75, 1])
    assert best.get_ydata()[-1] == 0.75 and best.get_color() == "black" and len(far.get_xdata()) == 0
    for bad in ({}, {"grid": {"row": [0, 1]}}, {"grid": {"row": []}}):
        with pytest.raises(ValueError, match="empty|below 1"):
            plots.neighbour_ranks(bad)


def test_influence_map_is_relative_to_the_largest_outside_the_pixel():
    values = np.array([[100.0, 2, 1], [0, 1e-9, np.nan]])
    figure = check(plots.influence_map({"a": values, "b": 3 * values, "zero": 0 * values}, (0, 0)))
    shown = [image.get_array() for ax in figure.axes for image in ax.images]
    hidden = [[True, False, False], [True, False, True]]  # itself, a zero, NaN
    for picture in shown[:2]:
        np.testing.assert_array_equal(np.ma.getmaskarray(picture), hidden)
        np.testing.assert_allclose(picture.compressed(), [1, 0.5, 1e-3])
    assert np.ma.getmaskarray(shown[2]).all()
    assert figure.axes[0].lines[0].get_xydata().tolist() == [[0, 0]]
    for maps, query in (({}, (0, 0)), ({"a": values}, (2, 0)), ({"a": values[0]}, (0, 0))):
        with pytest.raises(ValueError, match=r"maps is empty|pass \(H, W\) that holds"):
            plots.influence_map(maps, query)


def test_scan_view_marks_what_comes_before_and_after():
    points = grid_coords(5, 5)
    influence = np.linspace(0, 1, 25)
    figure = check(plots.scan_view(points, ("row", "column"), 12, influence, "view [demo]"))
    row, column, bars, around = figure.axes[:4]
    assert [ax.get_title() for ax in (row, column)] == ["row", "column"]
    tops = [bar.get_y() + bar.get_height() for bar in bars.patches]
    assert tops == [5, 1, 1, 5, 1, 5, 5, 1]  # above, left, right, below
    filled = [bar.get_facecolor()[3] > 0 for bar in bars.patches]
    assert filled == [True, True, False, False] * 2
    near = row.collections[1].get_offsets()
    np.testing.assert_allclose(near, points[[7, 11, 13, 17]], atol=1e-6)
    shade = around.collections[0].get_array()
    assert np.ma.getmaskarray(shade).nonzero()[0].tolist() == [0, 12]  # no influence, and the point itself
    np.testing.assert_allclose(shade.max(), 1)
    for kinds, query, values in (((), 0, influence), (("row",), 25, influence), (("row",), 0, influence[1:])):
        with pytest.raises(ValueError, match="kinds is empty|do not fit"):
            plots.scan_view(points, kinds, query, values)


# ---------------------------------------------------------------- comparisons of models and samplers


def test_window_maps_tell_neighbours_apart():
    windows = np.arange(64).reshape(8, 8) // 8
    figure = check(plots.window_maps({"rows": windows, "columns": torch.from_numpy(windows.T)}))
    rows, columns = pictures(figure)
    assert (np.diff(rows, axis=0) != 0).all() and (np.diff(rows, axis=1) == 0).all()
    np.testing.assert_array_equal(rows.T, columns)
    with pytest.raises(ValueError, match=r"shape \(64,\); pass \(H, W\)"):
        plots.window_maps({"flat": windows.ravel()})
    with pytest.raises(ValueError, match="maps is empty"):
        plots.window_maps({})


def test_parts_chart_shows_paired_differences():
    rows = [
        {"model": "all", "psnr": 22.0, "psnr_se": 0.5, "versus_first": 0.0, "versus_first_se": 0.0},
        {"model": "one way", "psnr": 21.0, "psnr_se": None, "versus_first": -1.0, "versus_first_se": 0.1},
        {"model": "perfect", "psnr": None, "psnr_se": None, "versus_first": None, "versus_first_se": None},
    ]
    left, right = check(plots.parts_chart(rows, title="parts [demo]")).axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["all", "one way", "perfect"]
    np.testing.assert_array_equal(right.lines[0].get_xdata(), [0, -1, np.nan])
    assert left.yaxis_inverted() and right.get_xlabel() == "paired difference to all (dB)"
    with pytest.raises(ValueError, match="rows is empty"):
        plots.parts_chart([])


def sampler_rows():
    """Rows as `evaluate.compare_samplers` has them."""
    scores = {"psnr": 20.0, "speckle": 0.03, "sharpness": 0.9}
    rows = [
        {"method": name, "kind": "sample", "evaluations": count, **scores, "psnr": 22.0 - count / 8}
        for name in ("euler", "heun", "sde, temperature 0.5")
        for count in (8, 4)
    ]
    mean = {"kind": "mean", **scores, "psnr": 23.0, "sharpness": 0.4}
    return [*rows, {"method": "posterior mean (1 step)", "evaluations": 1, **mean}]


def test_sampler_curves_show_samples_only():
    figure = check(plots.sampler_curves(sampler_rows()))
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["euler", "heun", "sde, temperature 0.5"]
    assert [ax.get_title() for ax in figure.axes] == [label for _, label in plots._SAMPLE_SCORES]
    assert max(line.get_ydata().max() for line in figure.axes[0].lines) < 23  # the mean is not among them
    styles = {(line.get_marker(), line.get_linestyle()) for line in figure.axes[0].lines}
    assert len(styles) == 3, "curves differ by more than their colour"
    with pytest.raises(ValueError, match="no row of kind 'sample'"):
        plots.sampler_curves(sampler_rows()[-1:])


def test_perception_distortion_keeps_kinds_apart():
    figure = check(plots.perception_distortion(sampler_rows()))
    left = figure.axes[0]
    assert left.get_xlabel() == "PSNR (dB)" and left.get_ylabel().startswith("sharpness")
    legend = [text.get_text() for text in left.get_legend().get_texts()]
    assert legend == ["posterior sample", "posterior mean"]
    (x, y), few_first = left.collections[-1].get_offsets()[0], left.collections[0].get_offsets()[:, 0]
    assert (x, y) == (23.0, 0.4)
    np.testing.assert_array_equal(few_first, [21.5, 21.0])  # 4 evaluations, then 8
    assert [text.get_text() for text in left.texts] == ["posterior mean (1 step)"]
    with pytest.raises(ValueError, match="rows is empty"):
        plots.perception_distortion([])


def test_resolution_row_shows_a_detail_and_what_is_missing():
    made = RNG.uniform(size=(16, 16, 3))
    figure = check(plots.resolution_row(FIELDS[0], {"mean": made, "target": made}))
    shown = pictures(figure)
    assert [picture.shape for picture in shown[:3]] == [(12, 12, 3), (16, 16, 3), (16, 16, 3)]
    np.testing.assert_array_equal(shown[4], made[4:12, 4:12])
    assert [ax.get_title() for ax in figure.axes[1:3]] == ["mean\ninf dB, SSIM 1.00", "target\n16x16"]
    missing = check(plots.resolution_row(FIELDS[0], {"mean": made, "target": None}))
    assert [ax.get_title() for ax in missing.axes[:2]] == ["observed\n12x12", "mean\n16x16"]
    assert len(missing.axes) == 4
    with pytest.raises(ValueError, match="fields is empty"):
        plots.resolution_row(FIELDS[0], {"target": None})


def test_strips_take_pictures_of_any_size():
    rows = {"a": [FIELDS[0], None, FIELDS[1][:6, :6]], "b": FIELDS}
    figure = check(plots.strips(rows, ["x", "y", "z"], title="t [demo]"))
    shown = pictures(figure)
    assert len(figure.axes) == 6 and len(shown) == 5
    np.testing.assert_array_equal(shown[1], FIELDS[1][:6, :6])
    assert [ax.get_title() for ax in figure.axes] == ["x", "", "z", "", "", ""]
    assert [figure.axes[i].get_ylabel() for i in (0, 3, 4)] == ["a", "b", ""]
    for wrong in ({}, {"a": FIELDS, "b": FIELDS[:2]}):
        with pytest.raises(ValueError, match="pass one length"):
            plots.strips(wrong)
    with pytest.raises(ValueError, match="pass one length"):
        plots.strips({"a": FIELDS}, ["x"])


def test_latent_map_frames_pictures_by_class():
    points = np.array([[0.0, 1.0], [2.0, -1.0], [1.0, 0.0]])
    figure = check(plots.latent_map(points, FIELDS, [0, 1, 1], ["cat", "dog"]))
    ax = figure.axes[0]
    boxes = ax.artists
    assert [tuple(box.xy) for box in boxes] == [tuple(p) for p in points]
    frames = [to_hex(box.patch.get_facecolor()).upper() for box in boxes]
    assert frames == [plots.COLOURS[i] for i in (0, 1, 1)]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["cat", "dog"]
    assert ax.get_xlim()[0] < 0 and ax.get_xlim()[1] > 2
    assert check(plots.latent_map(points, FIELDS)).axes[0].get_legend() is None
    with pytest.raises(ValueError, match=r"points are \(2, 2\) for 3 images"):
        plots.latent_map(points[:2], FIELDS)


def test_estimate_scatter_states_the_error():
    true = np.linspace(-1, 1, 20)
    figure = check(plots.estimate_scatter({"off": (true, true + 0.25), "exact": (true, true)}))
    assert [ax.get_title() for ax in figure.axes] == ["off: error 0.25", "exact: error 0"]
    np.testing.assert_array_equal(figure.axes[0].lines[0].get_ydata(), true + 0.25)
    with pytest.raises(ValueError, match="pairs is empty"):
        plots.estimate_scatter({})


def test_scale_curves_leave_out_what_is_undefined():
    nothing = {"consistency": None, "consistency_se": None, "versus_bicubic": None, "versus_bicubic_se": None}
    numbers = {"consistency": 30.0, "consistency_se": 1.0, "versus_bicubic": -0.2, "versus_bicubic_se": 0.1}
    rows = [
        {"model": name, "scale": scale, "psnr": psnr, "psnr_se": None, **rest}
        for scale, psnr, rest in ((32, 24.0, nothing), (64, 22.0, numbers))
        for name in ("v1", "ae")
    ]
    figure = check(plots.scale_curves(rows))
    np.testing.assert_array_equal(figure.axes[0].lines[0].get_ydata(), [24, 22])
    np.testing.assert_array_equal(figure.axes[2].lines[0].get_xdata(), [64])
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["v1", "ae"]
    with pytest.raises(ValueError, match="rows is empty"):
        plots.scale_curves([])


def test_inversion_curve_marks_the_goal():
    psnr = np.array([[20.0, 22.0], [40.0, 50.0]])
    ax = check(plots.inversion_curve([5, 50], torch.from_numpy(psnr), 35)).axes[0]
    np.testing.assert_array_equal(ax.lines[2].get_ydata(), [21, 45])
    assert ax.lines[3].get_ydata()[0] == 35
    with pytest.raises(ValueError, match="pass"):
        plots.inversion_curve([5], psnr)


def test_loss_curves_run_over_steps_and_seconds():
    figure = check(plots.loss_curves({"latents": (np.full(50, 0.5), 10.0), "pixels": ([1.0, 0.5], 4.0)}))
    steps, seconds = figure.axes
    np.testing.assert_array_equal(steps.lines[0].get_xdata(), np.arange(20, 51))
    assert seconds.lines[0].get_xdata()[-1] == 10 and seconds.lines[1].get_xdata()[-1] == 4
    np.testing.assert_allclose(steps.lines[0].get_ydata(), 0.5)
    np.testing.assert_allclose(steps.lines[1].get_ydata(), 0.75)  # fewer steps than the window
    with pytest.raises(ValueError, match="curves is empty"):
        plots.loss_curves({})


def test_smoothness_bars_group_ways_by_space():
    values = {"bend": 0.1, "bend_se": None, "contrast": 0.8, "contrast_se": 0.1, "ratio_se": 0.1}
    rows = [
        {"way": way, "space": space, "ratio": ratio, **values}
        for way, ratio in (("latent", 1.5), ("RGB", 1.0))
        for space in ("pixels", "gradients")
    ]
    figure = check(plots.smoothness_bars(rows))
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert heights == [1.5, 1.5, 1.0, 1.0]
    assert len(figure.axes[2].patches) == 2
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["latent", "RGB"]
    with pytest.raises(ValueError, match="rows is empty"):
        plots.smoothness_bars([])


def test_grid_paths_visit_the_pixels_in_order():
    figure = check(plots.grid_paths(4, 6, ("w2", "v_flip"), "Scans [smoke]"))
    assert texts(figure) == ["Scans [smoke]", "w2", "v_flip"]
    for ax, kind in zip(figure.axes, ("w2", "v_flip"), strict=True):
        visited = grid_coords(4, 6)[grid_order(4, 6, kind)]
        np.testing.assert_allclose(np.stack(ax.lines[0].get_data(), axis=1), visited)
    with pytest.raises(ValueError, match="kinds is empty"):
        plots.grid_paths(4, 6, ())


def test_spectrogram_grid_shows_levels_upwards():
    values = RNG.uniform(-1, 1, size=(3, 1, 8, 10))
    figure = check(plots.spectrogram_grid(torch.from_numpy(values), ["a", "b", "c"], columns=2, title="T"))
    assert texts(figure)[:4] == ["T", "a", "b", "c"]
    np.testing.assert_array_equal(pictures(figure)[2], values[2, 0])
    assert figure.axes[0].images[0].origin == "lower"
    meta = generated_meta((8, 10), 8000, ("a",))
    figure = check(plots.spectrogram_grid(values, meta=meta))
    np.testing.assert_allclose(pictures(figure)[0], 30 * (values[0, 0] - 1))  # dB, of a range of 60
    assert figure.axes[0].images[0].get_extent() == pytest.approx([0, 9 * meta.hop / 8000, 0, 4])
    for bad, message in (({"spectrograms": values[0]}, "have shape"), ({"labels": ["a"]}, "1 labels for 3")):
        with pytest.raises(ValueError, match=message):
            plots.spectrogram_grid(**{"spectrograms": values, **bad})


def test_mixer_bars_stand_by_size_and_leave_out_what_was_not_measured():
    cost = {"flops_forward": 2e9, "seconds": None, "memory": None}
    rows = [
        {"size": size, "mixer": mixer, "parameters": parameters, **cost}
        for size in (32, 64)
        for mixer, parameters in (("ssm", 3e6), ("attention", 1e6))
    ]
    figure = check(plots.mixer_bars(rows))
    assert [ax.get_title() for ax in figure.axes] == ["parameters (million)", "forward (GFLOP)"]
    assert [bar.get_height() for bar in figure.axes[0].patches] == [3, 3, 1, 1]
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["32 x 32", "64 x 64"]
    measured = [{**row, "seconds": 0.5, "memory": 2**21} for row in rows]
    assert [bar.get_height() for bar in plots.mixer_bars(measured).axes[3].patches] == [2] * 4
    with pytest.raises(ValueError, match="rows is empty"):
        plots.mixer_bars([])


def test_guidance_curves_stand_beside_real_clips():
    row = {"accuracy": 1.0, "accuracy_se": 0.0, "frechet": 2.0, "guidance": None, "source": "training clips"}
    drawn = [
        {"source": "generated", "guidance": g, "accuracy": a, "accuracy_se": 0.1, "frechet": 10 - g}
        for g, a in ((2.5, 0.9), (0.0, 0.1))
    ]
    figure = check(plots.guidance_curves([row, *drawn]))
    accuracy, frechet = figure.axes
    np.testing.assert_allclose(np.stack(accuracy.lines[0].get_data()).astype(float), [[0, 2.5], [10, 90]])
    assert list(frechet.lines[0].get_ydata()) == [10, 7.5]
    assert frechet.lines[-1].get_ydata()[0] == 2
    with pytest.raises(ValueError, match="no generated one"):
        plots.guidance_curves([row])
