"""Widgets: moving a control redraws the picture with the library's numbers, and no error is hidden."""

import base64
import io
import re
import signal
from dataclasses import replace
from datetime import UTC, datetime

import ipywidgets
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from nfhelpers import evaluate, images, metrics, spectrograms, train, widgets
from nfhelpers.models import (
    LocalImplicitField,
    LocalImplicitFieldConfig,
    LocalMamba2D,
    LocalMamba2DConfig,
    MambaDiffusion,
    MambaDiffusionConfig,
)
from nfhelpers.models.local_mamba import sample_grids


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LocalImplicitField(LocalImplicitFieldConfig(d_model=16, num_heads=2, neighbours=4, num_layers=1))


@pytest.fixture(scope="module")
def pictures():
    return np.random.default_rng(0).uniform(size=(3, 12, 12, 3)).astype(np.float32)


def control(box, description):
    """The control of a panel with this description."""
    return next(child for child in box.children if getattr(child, "description", None) == description)


def parts(box):
    """The HTML line and the picture of a panel."""
    return box.children[-3], box.children[-2]


def line(height):
    figure = Figure(figsize=(2, 2))
    figure.subplots().plot([0, height])
    return figure, f"height {height}"


def test_panel_redraws_on_change():
    box = widgets.panel(line, {"height": ipywidgets.IntSlider(1, 1, 5, description="height")})
    text, image = parts(box)
    before = image.value
    assert Image.open(io.BytesIO(before)).format == "PNG"
    assert "height 1" in text.value
    control(box, "height").value = 3
    assert image.value != before
    assert "height 3" in text.value


def test_panel_shows_and_raises_errors_then_recovers():
    def draw(height):
        if height == 2:
            raise ValueError("height=2 is <bad>; pass 3")
        return line(height)

    box = widgets.panel(draw, {"height": ipywidgets.IntSlider(1, 1, 5, description="height")})
    text, image = parts(box)
    with pytest.raises(ValueError, match="height=2"):
        control(box, "height").value = 2
    assert "ValueError: height=2 is &lt;bad&gt;; pass 3" in text.value and "nf-error" in text.value
    assert image.layout.display == "none", "a picture of other settings must not stay"
    control(box, "height").value = 3
    assert image.layout.display is None and "nf-error" not in text.value


def test_panel_keeps_a_bounded_number_of_drawings_and_updates_on_release():
    drawn = []

    def draw(height):
        drawn.append(height)
        return line(height)

    slider = ipywidgets.IntSlider(1, 1, 5, description="height", continuous_update=True)
    box = widgets.panel(draw, {"height": slider}, cache=2)
    assert not slider.continuous_update
    first = parts(box)[1].value
    for height in (2, 1, 3, 2):  # 1 is kept; 3 takes the place of 2
        slider.value = height
    assert drawn == [1, 2, 3, 2]
    slider.value = 1
    assert drawn == [1, 2, 3, 2, 1] and parts(box)[1].value == first
    fresh = widgets.panel(draw, {"height": ipywidgets.IntSlider(1, 1, 5, description="height")}, cache=0)
    for height in (2, 1):
        control(fresh, "height").value = height
    assert drawn[5:] == [1, 2, 1]


def test_panel_says_that_it_computes():
    said = []

    def draw(height):
        said.append(parts(box)[0].value if height > 1 else None)
        return line(height)

    box = widgets.panel(draw, {"height": ipywidgets.IntSlider(1, 1, 5, description="height")})
    control(box, "height").value = 2
    assert "nf-busy" in said[1] and "nf-busy" not in parts(box)[0].value


def test_panel_with_a_button_waits_for_it():
    box = widgets.panel(
        lambda height: (*line(height), f"<b>{height}</b>"),
        {"height": ipywidgets.IntSlider(1, 1, 5, description="height")},
        button="draw",
    )
    text, image = parts(box)
    before, below = image.value, box.children[-1]
    assert below.value == "<b>1</b>"
    control(box, "height").value = 4
    assert image.value == before and "press draw" in text.value
    control(box, "draw").click()
    assert image.value != before and "height 4" in text.value and below.value == "<b>4</b>"


def test_a_pressed_stop_button_ends_the_run_after_the_epoch(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(widgets, "display", shown.append)
    pictures = np.random.default_rng(0).integers(0, 256, (4, 12, 12, 3), dtype=np.uint8)
    datasets = images.SparseFields(pictures), images.SparseFields(pictures[:1], seed=0)
    model = LocalImplicitField(LocalImplicitFieldConfig(d_model=16, num_heads=2, neighbours=4, num_layers=1))
    config = train.TrainConfig(tmp_path, epochs=4, batch_size=2, cpu=True, progress=False)
    with widgets.training_monitor(config.epochs) as callback:
        button, text = shown[0].children

        def press_in_epoch_2(epoch, history, fields):
            if epoch == 2:
                button.click()
            callback(epoch, history, fields)

        result = train.fit(model, datasets, config, callback=press_in_epoch_2)
    assert (result.interrupted, result.steps) == (True, 4) and result.latest.is_dir()
    assert button.disabled and button.description == "stopped"
    assert "epoch 2 of 4, loss" in text.value and " dB, about" in text.value
    with widgets.training_monitor(config.epochs) as callback:
        result = train.fit(model, datasets, config, callback=callback)
    assert (result.interrupted, result.steps) == (False, 8), "the next run goes on"
    button, text = shown[1].children
    assert button.disabled and button.description == "trained" and "epoch 4 of 4" in text.value
    with widgets.training_monitor(config.epochs) as callback:
        train.fit(model, datasets, config, callback=callback)
    button, text = shown[2].children
    assert button.disabled and button.description == "trained"
    assert "epoch 4 of 4: finished before, nothing left to do" in text.value


def test_an_interrupt_in_the_first_epoch_is_not_taken_for_a_finished_run(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(widgets, "display", shown.append)
    handler = signal.getsignal(signal.SIGINT)
    pictures = np.zeros((4, 12, 12, 3), np.uint8)
    datasets = images.SparseFields(pictures), images.SparseFields(pictures, seed=0)
    model = LocalImplicitField(LocalImplicitFieldConfig(d_model=16, num_heads=2, neighbours=4, num_layers=1))
    model.register_forward_pre_hook(lambda *arguments: signal.raise_signal(signal.SIGINT))
    config = train.TrainConfig(tmp_path, epochs=4, batch_size=2, cpu=True, progress=False)
    with widgets.training_monitor(config.epochs) as callback:
        result = train.fit(model, datasets, config, callback=callback)
    button, text = shown[0].children
    assert (result.interrupted, result.steps) == (True, 0)
    assert button.disabled and button.description == "stopped" and "nothing left" not in text.value
    assert signal.getsignal(signal.SIGINT) is handler


def test_first_drawing_raises_in_the_cell():
    with pytest.raises(ZeroDivisionError):
        widgets.panel(lambda height: 1 / 0, {"height": ipywidgets.IntSlider()})


def test_reconstruction_panel_agrees_with_the_library(model, pictures):
    box = widgets.reconstruction_panel(model, pictures, steps=2)
    text, image = parts(box)
    seen = {image.value}
    control(box, "image").value = 1
    seen.add(image.value)
    control(box, "observed fraction").value = 0.4
    seen.add(image.value)
    control(box, "sampler").value = "heun"
    seen.add(image.value)
    control(box, "seed").value = 3
    seen.add(image.value)
    assert len(seen) == 5
    fields = evaluate.observe_images(pictures[1:2], 0.4, 3)
    result = evaluate.reconstruct(model, fields, kind="sample", method="heun", steps=2, seed=3)
    psnr = metrics.psnr(result["fields"], pictures[1:2])[0]
    assert f"sample (heun, 2): PSNR {psnr:.2f} dB" in text.value
    assert not control(box, "image").continuous_update
    with pytest.raises(ValueError, match="image=3"):
        widgets.reconstruction_figure(model, pictures, image=3)


def encoded(picture):
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "png")
    return file.getvalue()


def test_own_image_figure_agrees_with_the_library(model):
    picture = np.random.default_rng(0).integers(0, 256, (20, 40, 3), dtype=np.uint8)
    figure, text, made = widgets.own_image_figure(
        {"a": model, "b": model}, encoded(picture), "b", 16, 0.3, "euler", 2, crop=1.0, seed=3
    )
    target = images.area_resize(picture[:, 20:], 16)[None]  # the square on the right
    fields = evaluate.observe_images(target, 0.3, 3)
    wanted = evaluate.reconstruct(model, fields, kind="sample", method="euler", steps=2, seed=3)["fields"]
    np.testing.assert_allclose(made, wanted[0], atol=1e-6)
    smooth = evaluate.classical_baselines(
        fields["input_coords"][0], images.to_image(fields["input_values"][0]), 16, 16
    )["biharmonic"]
    assert f"b, sample (euler, 2): PSNR {metrics.psnr(wanted, target / 255)[0]:.2f} dB" in text
    assert f"biharmonic: PSNR {metrics.psnr(smooth[None], target / 255)[0]:.2f} dB" in text
    heads = [ax.get_title().splitlines()[0] for ax in figure.axes]
    assert heads == ["observed", "b", "biharmonic", "target"]
    for change, message in (
        ({"model": "c"}, "model='c' is unknown; pass one of a"),
        ({"size": 32}, "size=32"),
    ):
        with pytest.raises(ValueError, match=message):
            widgets.own_image_figure({"a": model}, picture, **change)


def test_own_image_panel_takes_an_upload_before_a_path(model, tmp_path, caplog):
    grey, red = np.full((16, 16, 3), 128, np.uint8), np.full((16, 16, 3), (255, 0, 0), np.uint8)
    (tmp_path / "red.png").write_bytes(encoded(red))
    box = widgets.own_image_panel({"a": model}, grey, sizes=(16,))

    def downloaded():
        found = re.search(
            r'download="reconstruction.png" href="data:image/png;base64,([^"]+)"', box.children[-1].value
        )
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(found[1]))))

    known = evaluate.observe_images(grey[None], 0.2, 0)["mask"][0].numpy()
    assert (downloaded()[known] == grey[known]).all()
    control(box, "path").value = str(tmp_path / "red.png")
    control(box, "reconstruct").click()
    assert (downloaded()[known] == red[known]).all()
    green = np.full((16, 16, 3), (0, 255, 0), np.uint8)
    upload = {"name": "g.png", "type": "image/png", "size": 1, "content": memoryview(encoded(green))}
    control(box, "your image").value = ({**upload, "last_modified": datetime.now(UTC)},)
    control(box, "reconstruct").click()
    assert (downloaded()[known] == green[known]).all()
    control(box, "your image").value = ()
    control(box, "path").value = str(tmp_path / "missing.png")
    control(box, "reconstruct").click()  # ipywidgets logs what is raised in a click
    assert "missing.png cannot be read as an image" in caplog.text
    assert "nf-error" in parts(box)[0].value and box.children[-1].layout.display == "none"


def test_hyperparameter_panel_states_the_cost():
    config = MambaDiffusionConfig(d_model=64, num_layers=2, num_fourier_features=16)
    box = widgets.hyperparameter_panel(MambaDiffusion, config, batch_size=4)
    text, image = parts(box)
    before = image.value
    control(box, "d_model").value = 128
    assert image.value != before
    wanted = evaluate.model_cost(
        MambaDiffusion(MambaDiffusionConfig(d_model=128, num_layers=2, num_fourier_features=16)), 204, 204, 4
    )
    assert f"{wanted['parameters'] / 1e6:.2f} M parameters" in text.value
    assert f"{wanted['flops_forward'] / 1e9:.1f} GFLOP" in text.value


def test_ssm_panels():
    box = widgets.impulse_panel()
    before = parts(box)[1].value
    control(box, "step Δ").value = 0.5
    assert parts(box)[1].value != before
    rows = [{"method": "scan", "length": n, "seconds": n * 1e-6, "memory": n * 8} for n in (64, 128, 256)]
    box = widgets.cost_panel(rows)
    before = parts(box)[1].value
    control(box, "length L").value = 1000
    assert parts(box)[1].value != before


def test_scan_panel_shows_the_chosen_orders():
    box = widgets.scan_panel("Scan [smoke]")
    text, image = parts(box)
    # 12 x 12 pixels in row order: half of the neighbours are 1 step away, the other half 12 or so.
    assert "144 points: median steps to the 4 nearest 11.5 in a single order, 11.5 in the best" in text.value
    assert "this point: 2 of them come before it" in text.value
    seen = {image.value}
    for name, value in (("orders", ("row", "column")), ("points", "random points"), ("points a side", 8)):
        control(box, name).value = value
        seen.add(image.value)
    for name in ("point at x", "point at y", "seed"):
        control(box, name).value += control(box, name).step
        seen.add(image.value)
    assert len(seen) == 7 and text.value.startswith("<code>64 points")
    with pytest.raises(ValueError, match="orders=\\(\\) is empty; choose at least one"):
        control(box, "orders").value = ()
    assert "nf-error" in text.value


def test_scan_figure_is_repeatable_and_leaves_the_generator_alone():
    state = torch.get_rng_state()
    one, two = (widgets.scan_figure(("row", "hilbert"), "random pixels", seed=3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert one[1] == two[1]
    assert [ax.get_title() for ax in one[0].axes[:2]] == ["row", "hilbert"]
    with pytest.raises(ValueError, match="layout='ring' is unknown"):
        widgets.scan_figure(layout="ring")
    with pytest.raises(ValueError, match="size=2 is below 3"):
        widgets.scan_figure(size=2)
    with pytest.raises(ValueError, match="kind='spiral'"):
        widgets.scan_figure(orders=("spiral",))


def test_resolution_panel_computes_each_size_once(model, monkeypatch):
    asked = []
    real = evaluate.reconstruct

    def counting(*arguments, **options):
        asked.append(options["size"])
        return real(*arguments, **options)

    monkeypatch.setattr(evaluate, "reconstruct", counting)
    box = widgets.resolution_panel(model, "photos", count=2, sizes=(24, 16, 144), observed_size=16)
    text, image = parts(box)
    first = image.value
    assert asked == [16] and "16x16: 256 queries" in text.value
    control(box, "resolution (px)").value = 24
    assert sorted(asked) == [16, 24] and image.value != first and "PSNR" in text.value
    control(box, "resolution (px)").value = 16
    assert sorted(asked) == [16, 24] and image.value == first
    control(box, "resolution (px)").value = 144  # finer than the photographs' windows
    assert "no ground truth" in text.value
    control(box, "image").value = 1
    assert len(asked) == 5
    assert not control(box, "resolution (px)").continuous_update


def test_resolution_figure_agrees_with_the_library(model):
    cache = {}
    figure, text = widgets.resolution_figure(model, "photos", 1, 32, observed_size=16, seed=3, cache=cache)
    fields = evaluate.observe_images(images.load_images("photos", "test", 16, limit=2)[1:], 0.2, 3)
    made = evaluate.reconstruct(model, fields, size=32, seed=3)["fields"]
    np.testing.assert_allclose(cache[1, 32][0], made[0], atol=1e-6)
    target = images.load_images("photos", "test", 32, limit=2)[1:] / 255
    assert f"PSNR {metrics.psnr(made, target)[0]:.2f} dB" in text
    assert isinstance(figure, Figure)
    for change, message in (
        ({"image": -1}, "image=-1"),
        ({"image": 999}, "image=999"),
        ({"size": 8}, "size=8"),
    ):
        with pytest.raises(ValueError, match=message):
            widgets.resolution_figure(model, "photos", **{"image": 0, "size": 16, **change})


def test_traversal_panel_moves_the_latent(autoencoder):
    latents = evaluate.encode_images(autoencoder, images.load_images("photos", "test", 16, limit=4))
    directions, _ = evaluate.principal_directions(autoencoder, latents, 2)
    box = widgets.traversal_panel(autoencoder, latents, directions, 16, "Along [smoke]")
    text, image = parts(box)
    assert "RMS difference 0.000" in text.value
    seen = {image.value}
    for name, value in (("direction 1", 2.0), ("direction 2", -1.5), ("image", 3)):
        control(box, name).value = value
        seen.add(image.value)
    assert len(seen) == 4
    moved = latents[3] + 2 * directions[0] - 1.5 * directions[1]
    before, after = evaluate.decode_latents(autoencoder, torch.stack([latents[3], moved]), 16)
    difference = np.sqrt(np.square(after - before).mean())
    assert difference > 0.01 and f"RMS difference {difference:.3f}" in text.value
    with pytest.raises(ValueError, match="image=4"):
        widgets.traversal_figure(autoencoder, latents, directions, 4, (0, 0))
    with pytest.raises(ValueError, match="not one for each of 2 directions"):
        widgets.traversal_figure(autoencoder, latents, directions, 0, (1.0,))


def test_interpolation_panel_agrees_with_the_library_and_keeps_codes(autoencoder, monkeypatch):
    asked = []
    real = evaluate.image_codes

    def counting(model, ends, steps):
        asked.append(len(ends))
        return real(model, ends, steps)

    monkeypatch.setattr(evaluate, "image_codes", counting)
    ends = images.load_images("photos", "test", 16, limit=3)
    box = widgets.interpolation_panel(autoencoder, ends, steps=2)
    text, image = parts(box)
    seen = {image.value}
    for name, value in (("alpha", 0.75), ("second image", 2), ("first image", 1)):
        control(box, name).value = value
        seen.add(image.value)
    assert len(seen) == 4 and asked == [1, 1, 1], "codes are found once an image"
    paths = evaluate.interpolation_paths(autoencoder, ends[1:], alphas=(0.75,), steps=2)
    wanted = [f"{way} {evaluate.contrast(frames[0], ends[1:] / 255):.2f}" for way, frames in paths.items()]
    assert ", ".join(wanted) in text.value and len(wanted) == 3


def test_interpolation_figure_of_phase_one_has_no_way_through_noise(autoencoder):
    first, ends = evaluate.first_phase(autoencoder), images.load_images("photos", "test", 16, limit=2)
    figure, text = widgets.interpolation_figure(first, ends, alpha=0.0)
    assert [ax.get_ylabel() for ax in figure.axes[::3]] == ["latent", "RGB"]
    middle = np.asarray(figure.axes[4].images[0].get_array())
    np.testing.assert_allclose(middle, ends[0] / 255, atol=1e-6)  # RGB blending begins in the first image
    for name, value in (("first", 2), ("second", -1), ("alpha", 1.5)):
        with pytest.raises(ValueError, match=f"{name}={value}"):
            widgets.interpolation_figure(first, ends, **{name: value})


def heard(markup):
    """Samples and rate of every player of some HTML."""
    data = re.findall(r'src="data:audio/wav;base64,([^"]+)"', markup)
    return [spectrograms.read_wav(io.BytesIO(base64.b64decode(sound))) for sound in data]


def test_audio_players_hold_the_sounds():
    sound = np.sin(np.arange(400) / 5) / 3
    markup = widgets.audio_players({"<one>": sound, "two": torch.zeros(100)}, 8000)
    (first, rate), (second, _) = heard(markup)
    assert rate == 8000 and "&lt;one&gt;" in markup and "<one>" not in markup
    np.testing.assert_allclose(first, sound * 0.9 / np.abs(sound).max(), atol=1e-4)
    np.testing.assert_array_equal(second, np.zeros(100))


@pytest.fixture(scope="module")
def grid_config():
    return LocalMamba2DConfig(
        dims=(8, 16), depths=(1, 1), d_state=2, mapping_width=8, num_classes=3, head_dim=8, dropout=0.0
    )


def test_generated_panel_draws_and_sounds_as_the_library(grid_config):
    torch.manual_seed(0)
    model = LocalMamba2D(grid_config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    meta = spectrograms.generated_meta(16, 8000, ("zero", "one", "two"))
    box = widgets.generated_panel(model, meta, steps=2, size=16, title="Digits [smoke]")
    text, image = parts(box)
    assert "zero: guidance 2.5, 2 Heun steps" in text.value
    before, button = image.value, control(box, "generate")
    control(box, "class").value, control(box, "guidance").value, control(box, "seed").value = 2, 4.0, 1
    assert image.value == before and "press generate" in text.value
    button.click()
    assert image.value != before and "two: guidance 4, 2 Heun steps" in text.value
    generator = torch.Generator().manual_seed(1)
    options = {"labels": torch.tensor([2]), "guidance": 4.0, "steps": 2, "generator": generator}
    grid = sample_grids(model, 1, 16, 16, **options)
    sound = spectrograms.to_audio(grid, meta, generator=generator)[0]
    ((samples, rate),) = heard(box.children[-1].value)
    assert rate == 8000
    np.testing.assert_allclose(samples, sound * 0.9 / sound.abs().max(), atol=1e-3)
    with pytest.raises(ValueError, match="label=3 does not exist; pass an index from 0 to 2"):
        widgets.generated_figure(model, meta, 3, size=16)


def test_directions_panel_costs_what_the_library_says(grid_config):
    box = widgets.directions_panel(grid_config, sizes=(8, 16), repeats=0)
    text, image = parts(box)
    assert "h, v, w7, of attention&#x27;s at 8 x 8" in text.value
    before = image.value
    control(box, "directions").value = ("h", "w2_flip")
    control(box, "side of the grid").value = 16
    config = replace(grid_config, scan_directions=("h", "w2_flip"))
    scans, attention = evaluate.mixer_costs(config, (16,), repeats=0)
    ratio = scans["flops_forward"] / attention["flops_forward"]
    assert image.value != before
    assert "h, w2_flip, of attention&#x27;s at 16 x 16: parameters" in text.value
    assert f"FLOPs {ratio:.2f}" in text.value and "time" not in text.value
    with pytest.raises(ValueError, match="not a sequence of directions"):
        control(box, "directions").value = ()
    assert "nf-error" in text.value


def test_own_sound_panel_goes_there_and_back(tmp_path):
    rate, tone = 8000, np.sin(2 * np.pi * 1000 * np.arange(4000) / 8000)
    spectrograms.write_wav(tmp_path / "tone.wav", tone, rate)
    content = (tmp_path / "tone.wav").read_bytes()
    box = widgets.own_sound_panel(content, title="Own [smoke]")
    text, image = parts(box)
    before = image.value
    control(box, "path").value, control(box, "side (frames, bins)").value = str(tmp_path / "tone.wav"), 32
    control(box, "to spectrogram and back").click()
    assert image.value != before and "0.12 s at 8000 Hz, 62 samples a frame" in text.value
    (original, _), (back, _) = heard(box.children[-1].value)
    assert len(original) == len(back) == 31 * 31
    peaks = [np.abs(np.fft.rfft(sound)).argmax() * rate / len(sound) for sound in (original, back)]
    np.testing.assert_allclose(peaks, 1000, atol=rate / len(back))
    control(box, "path").value = str(tmp_path / "none.wav")
    with pytest.raises(ValueError, match="cannot be read as a wav file"):
        widgets.own_sound_figure(str(tmp_path / "none.wav"))


def test_own_sound_figure_is_the_same_from_path_and_bytes(tmp_path):
    spectrograms.write_wav(tmp_path / "noise.wav", np.random.default_rng(0).uniform(-0.5, 0.5, 5000), 8000)
    made = [
        widgets.own_sound_figure(source, 16, 4)
        for source in (str(tmp_path / "noise.wav"), (tmp_path / "noise.wav").read_bytes())
    ]
    assert made[0][1:] == made[1][1:] and "spectral convergence" in made[0][1]
