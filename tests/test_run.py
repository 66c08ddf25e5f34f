"""Presets, overrides, seeds and paths of a notebook's first call."""

import io
import random
import tarfile
import tomllib
from dataclasses import FrozenInstanceError
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from nfhelpers import images, kernels, models, run, train

NOTEBOOK = "02_flow_matching_v1"


@pytest.fixture
def presets():
    return tomllib.loads(files("nfhelpers").joinpath("presets.toml").read_text())


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A repository elsewhere, entered at its notebooks/ as a kernel is."""
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "nfhelpers").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    return tmp_path


def keys(table, prefix=""):
    return {
        k
        for n, v in table.items()
        for k in (keys(v, f"{prefix}{n}.") if isinstance(v, dict) else [prefix + n])
    }


# ---------------------------------------------------------------- presets.toml


def test_every_section_has_every_preset_with_the_same_keys(presets):
    assert set(presets) == set(run.sections()) >= set(run.SECTIONS.values())
    trained = {*models.FIELD_MODELS, "diffae_phase1", "diffae_phase2", "localmamba"}
    assert set(presets) - set(run.SECTIONS.values()) <= trained  # models without a notebook
    for section in presets.values():
        assert set(section) == set(run.PRESETS)
        assert keys(section["smoke"]) == keys(section["demo"]) == keys(section["full"])
        assert all(isinstance(table["seed"], int) for table in section.values())


@pytest.mark.parametrize("preset", run.PRESETS)
def test_v1_settings_are_legal(presets, preset):
    settings = presets["v1"][preset]
    model_class, config_class = models.FIELD_MODELS["v1"]
    with torch.device("meta"):
        model_class(config_class(**settings["model"]))
    train.TrainConfig(output_dir="unused", **settings["train"])
    data = settings["data"]
    assert data["source"] in ("photos", "cifar10")
    images.SparseFields(
        np.zeros((1, data["size"], data["size"], 3), np.uint8), data["observed"], data["queries"]
    )


def test_full_is_the_seeds_settings(presets):
    full = presets["v1"]["full"]
    wanted = {"d_model": 512, "num_layers": 6, "d_state": 16, "expand": 2, "num_fourier_features": 256}
    assert wanted.items() <= full["model"].items()
    wanted = {
        "epochs": 100,
        "batch_size": 64,
        "learning_rate": 1e-4,
        "evaluate_every": 2,
        "visualise_every": 5,
    }
    assert wanted.items() <= full["train"].items()
    assert full["data"]["source"] == "cifar10"


# ---------------------------------------------------------------- preset and overrides


def test_preset_is_argument_then_environment_then_hardware(monkeypatch):
    assert run.resolve_preset("smoke") == "smoke"
    monkeypatch.setenv("NF_PRESET", "full")
    assert run.resolve_preset() == "full"
    assert run.resolve_preset("smoke") == "smoke"
    monkeypatch.setenv("NF_PRESET", "auto")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run.resolve_preset() == "demo"


@pytest.mark.parametrize(("memory", "preset"), [(6e9, "demo"), (8e9, "full"), (80e9, "full")])
def test_auto_asks_the_gpu(monkeypatch, memory, preset):
    class Properties:
        total_memory = memory

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    assert run.resolve_preset("auto") == preset


def test_unknown_preset_and_notebook_are_refused(monkeypatch):
    with pytest.raises(
        ValueError, match="preset='tiny' is unknown; legal presets are smoke, demo, full and auto"
    ):
        run.start(NOTEBOOK, preset="tiny")
    monkeypatch.setenv("NF_PRESET", "huge")
    with pytest.raises(ValueError, match="'huge'"):
        run.start(NOTEBOOK)
    with pytest.raises(ValueError, match="notebook='02' has no presets; legal names are 01_ssm_basics"):
        run.start("02")
    with pytest.raises(ValueError, match="section='v9' is not in presets.toml; legal sections are"):
        run.load_settings("v9", "smoke")
    with pytest.raises(ValueError, match="preset='auto' is unknown"):
        run.load_settings("v1", "auto")


def test_overrides_replace_single_settings(presets):
    changed = run.load_settings("v1", "smoke", {"train.epochs": 7, "train.learning_rate": 1, "seed": 5})
    wanted = presets["v1"]["smoke"]
    assert changed["train"].pop("epochs") == 7
    rate = changed["train"].pop("learning_rate")
    assert (rate, type(rate)) == (1.0, float)
    assert changed.pop("seed") == 5
    del wanted["train"]["epochs"], wanted["train"]["learning_rate"], wanted["seed"]
    assert changed == wanted
    assert run.load_settings("ssm_basics", "smoke", {"lengths": (4, 8)})["lengths"] == [4, 8]


@pytest.mark.parametrize("key", ["train.epoch", "epochs", "train", "model.d_model.x", ""])
def test_unknown_override_lists_the_legal_keys(key):
    with pytest.raises(ValueError, match=r"unknown setting .*; legal keys are seed, model\.d_model, "):
        run.load_settings("v1", "smoke", {key: 1})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.epochs", 1.5),
        ("train.epochs", True),
        ("train.epochs", "3"),
        ("train.epochs", None),
        ("train.learning_rate", True),
        ("train.compile", 1),
        ("data.source", 3),
    ],
)
def test_override_of_another_type_is_refused(key, value):
    with pytest.raises(ValueError, match=rf"{key}=.* is of type {type(value).__name__}; pass a "):
        run.load_settings("v1", "smoke", {key: value})


# ---------------------------------------------------------------- start


def test_start_prints_what_it_uses(project, capsys):
    started = run.start(NOTEBOOK, "smoke", {"seed": 11})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["preset", "device", "backend", "versions", "seed"]
    assert lines[0].split()[1] == "smoke" == started.preset
    assert started.device.type in lines[1]
    assert lines[2].split()[1] == started.backend == kernels.choose_backend(started.device)
    for name, status in kernels.backend_status().items():
        assert status == "ok" or f"{name}: {status}" in lines[2]
    assert f"torch {torch.__version__}" in lines[3]
    assert lines[4].split()[1] == "11"
    assert started.precision in ("fp32", "bf16")
    assert (started.figures, started.runs.parent) == (
        project / "figures",
        project / "runs" / NOTEBOOK / "smoke",
    )
    assert not started.figures.exists() and not list(started.runs.iterdir())
    with pytest.raises(FrozenInstanceError):
        started.seed = 1


def test_start_seeds_every_generator(project):
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    run.start(NOTEBOOK, "smoke", {"seed": 1})
    first = draw()
    run.start(NOTEBOOK, "smoke", {"seed": 1})
    again = draw()
    run.start(NOTEBOOK, "smoke", {"seed": 2})
    other = draw()
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_only_smoke_forgets_earlier_runs(project):
    """A test has to train; a long run that was stopped has to be found again."""
    assert run.start(NOTEBOOK, "smoke").runs != run.start(NOTEBOOK, "smoke").runs
    for preset in ("demo", "full"):
        runs = [run.start(NOTEBOOK, preset).runs for _ in range(2)]
        assert runs == [project / "runs" / NOTEBOOK / preset] * 2
        assert not runs[0].exists()


def test_the_root_is_this_repository_and_no_other_project(project, monkeypatch, repository):
    assert run.repository_root() == project
    inner = project / "notebooks" / "mine"
    inner.mkdir()
    (inner / "pyproject.toml").touch()
    monkeypatch.chdir(inner)
    assert run.repository_root() == project
    (project / "nfhelpers").rmdir()
    assert run.repository_root() == repository


def test_root_from_elsewhere_is_the_one_the_library_was_installed_from(tmp_path, monkeypatch, repository):
    monkeypatch.chdir(tmp_path)
    assert run.repository_root() == repository
    monkeypatch.setattr(run, "__file__", str(tmp_path / "site-packages" / "nfhelpers" / "run.py"))
    assert run.repository_root() == tmp_path


# ---------------------------------------------------------------- figures and checkpoints


@pytest.mark.parametrize("preset", ["demo", "smoke"])
def test_figures_go_where_ci_overwrites_nothing(project, preset):
    started = run.start(NOTEBOOK, preset)
    figure = Figure(figsize=(1, 1))
    assert run.save_figure(started, figure, "loss") is figure
    folder = project / "figures" if preset == "demo" else started.runs
    assert (folder / f"{NOTEBOOK}_loss.png").read_bytes().startswith(b"\x89PNG")


def test_title_names_the_preset(project):
    assert run.title(run.start(NOTEBOOK, "smoke"), "Loss") == "Loss [smoke]"


def test_checkpoint_or_train(tmp_path, capsys):
    model_class, config_class = models.FIELD_MODELS["v1"]
    config = config_class(d_model=16, num_layers=1, d_state=2, num_fourier_features=4, num_heads=2)
    folder = tmp_path / "models" / "tiny"

    def fit():
        model = model_class(config)
        model.save_pretrained(folder)
        return model

    trained = run.checkpoint_or_train(folder, fit)
    loaded = run.checkpoint_or_train(folder, lambda: pytest.fail("trained although a checkpoint is there"))
    assert capsys.readouterr().out.splitlines() == [
        "no models/tiny: the model is one trained here instead",
        "loaded tiny from models/",
    ]
    assert loaded.config == config
    for name, tensor in trained.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=0, atol=0)

    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        run.checkpoint_or_train(folder, fit)


def test_devices_are_described():
    assert run.describe_device("cpu") == "cpu (1 thread)"
    assert run.default_precision("cpu") == "fp32"
    assert Path(run.files("nfhelpers") / "presets.toml").is_file()


def test_field_datasets_are_of_the_settings(presets):
    data = {**presets["v1"]["smoke"]["data"], "size": 16, "train_images": 5, "validation_images": 3}
    train_data, validation_data = run.field_datasets(data, seed=7)
    assert (len(train_data), len(validation_data)) == (5, 3)
    pictures = images.load_images("photos", "test", 16, limit=3)
    wanted = images.SparseFields(pictures, data["observed"], data["queries"], seed=7)[2]
    found = validation_data[2]
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    before = train_data[0]["input_coords"]
    train_data.set_epoch(1)  # other pixels in each epoch, of training only
    assert not torch.equal(train_data[0]["input_coords"], before)


def test_field_datasets_of_shards_are_read_item_by_item(tmp_path, presets):
    with tarfile.open(tmp_path / "0.tar", "w") as shard:
        for number in range(20):
            png = io.BytesIO()
            Image.new("RGB", (16, 16), (10 * number, 0, 0)).save(png, format="png")
            member = tarfile.TarInfo(f"{number}.png")
            member.size = png.tell()
            png.seek(0)
            shard.addfile(member, png)
    data = {**presets["v1"]["smoke"]["data"], "source": str(tmp_path), "size": 16, "train_images": 50}
    train_data, validation_data = run.field_datasets(data, seed=0)
    assert all(isinstance(d.images, images.StreamedImages) for d in (train_data, validation_data))
    assert len(train_data) + len(validation_data) == 20
    wanted = images.SparseFields(images.load_images(tmp_path, "train", 16), data["observed"], data["queries"])
    assert all(torch.equal(train_data[1][name], value) for name, value in wanted[1].items())


def test_other_settings_train_in_another_folder(tmp_path):
    start = dict(notebook="02_flow_matching_v1", preset="smoke")
    first, same, other = (
        run.start(**start, overrides=overrides) for overrides in ({}, {}, {"train.epochs": 1})
    )
    folders = [run.training_folder(one, "train") for one in (first, same, other)]
    assert folders[0].name == folders[1].name != folders[2].name
    assert folders[0].parent == first.runs and folders[0].name.startswith("train-")
