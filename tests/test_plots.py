"""Figures show the numbers that they are given."""

import io

import numpy as np
import torch
from PIL import Image

from nfhelpers import plots


def pixels(figure):
    """The figure as it is drawn, (H, W, 3) in [0, 1]."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return np.asarray(Image.open(file))[..., :3] / 255


def test_observed_pixels_stand_on_grey():
    images, mask = torch.rand(2, 5, 4, 3), torch.rand(2, 5, 4) < 0.5
    shown = plots.observed_pixels(images, mask)
    np.testing.assert_allclose(shown[mask], images[mask])
    assert (shown[~mask] == plots.GREY).all()
    assert (plots.observed_pixels(np.full((2, 2, 3), 255, np.uint8), np.ones((2, 2))) == 1).all()


def test_a_grid_shows_every_pixel_as_a_square_of_its_colour():
    draw = np.random.default_rng(0)
    small, large = draw.integers(0, 256, (8, 8, 3), dtype=np.uint8), draw.uniform(size=(16, 16, 3))
    rows = {"one": [small, None], "a long label that is broken": [large, small]}
    figure = plots.image_grid(rows, titles=["8", "16"], captions={"one": ["24.1 dB"]}, title="T", tile=1.0)
    drawn, axes = pixels(figure), np.reshape(figure.axes, (2, 2))
    assert not axes[0, 1].images and axes[0, 0].get_xlabel() == "24.1 dB"
    for ax, image in ((axes[0, 0], small / 255), (axes[1, 0], large), (axes[1, 1], small / 255)):
        box, step = ax.get_window_extent(), 96 // len(image)
        assert round(box.width) == round(box.height) == 96
        top, left = round(len(drawn) - box.y1) + step // 2, round(box.x0) + step // 2
        np.testing.assert_allclose(drawn[top : top + 96 : step, left : left + 96 : step], image, atol=1 / 255)


def test_curves_draw_lines_with_their_errors():
    x, y = np.arange(4), np.arange(4) ** 2.0
    lines = {"plain": (x, y), "bars": (torch.tensor(x), torch.tensor(y), {"yerr": np.full(4, 0.5)})}
    figure = plots.curves({"left": {"lines": lines, "xlabel": "step"}, "right": {"lines": {"_a": (x, y)}}})
    left, right = figure.axes
    np.testing.assert_array_equal(left.lines[0].get_xydata(), np.stack([x, y], 1))
    ends = [segment[:, 1] for segment in left.collections[0].get_segments()]
    np.testing.assert_allclose(ends, np.stack([y - 0.5, y + 0.5], 1))
    assert left.get_xlabel() == "step" and right.get_legend() is None


def test_a_training_has_a_panel_of_psnr_only_where_there_is_one():
    history = {"step": [1, 2, 3], "loss": [3.0, 2.0, 1.0], "val_step": [2], "val_loss": [2.5]}
    for psnr, count in (([], 1), ([np.nan], 1), ([20.0], 2)):
        assert len(plots.training_figure(history | {"val_psnr": psnr}).axes) == count
    fields = {"target": torch.rand(3, 6, 6, 3), "reconstruction": torch.rand(3, 6, 6, 3)}
    (picture,) = plots.training_figure(history, fields).axes[-1].images
    assert picture.get_array().shape == (2 * 8, 3 * 8, 3)


def test_maps_share_a_scale_and_leave_zeros_out_of_a_logarithm():
    maps = {"a": np.array([[0.0, 1.0], [10.0, 0.1]]), "b": np.array([[5.0, np.nan], [2.0, 100.0]])}
    shared = [ax.images[0] for ax in plots.maps(maps, log=True, mark=(1, 0)).axes[:2]]
    assert [image.get_clim() for image in shared] == [(0.1, 100.0)] * 2
    assert shared[0].get_array().mask.tolist() == [[True, False], [False, False]]
    panels = plots.maps(maps | {"a picture": np.full((2, 2, 3), -1)}).axes[:2]  # it has no part in the scale
    assert [ax.images[0].get_clim() for ax in panels] == [(0, 100)] * 2
