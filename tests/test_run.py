"""Presets, overrides, seeds and paths of a notebook's first call."""

import json
import random

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from nfhelpers import images, models, run, train

NOTEBOOK = "02_flow_matching_v1"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A repository elsewhere, entered at its notebooks/ as a kernel is."""
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "nfhelpers").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    return tmp_path


def keys(table):
    return {k: keys(v) if isinstance(v, dict) else type(v) for k, v in table.items()}


def test_every_preset_of_a_section_has_the_same_keys():
    assert set(run.sections()) >= set(run.SECTIONS.values())
    for section in run.sections():
        found = [keys(run.load_settings(section, preset)) for preset in run.PRESETS]
        assert all(one == found[0] for one in found) and found[0]["seed"] is int


@pytest.mark.parametrize("preset", run.PRESETS)
@pytest.mark.parametrize("section", [name for name in run.sections() if name != "ssm_basics"])
def test_settings_of_trained_models_are_legal(section, preset):
    settings = run.load_settings(section, preset)
    train.TrainConfig("unused", **settings["train"])
    if section != "diffae_phase2":
        _, config = (models.FIELD_MODELS | models.OTHER_MODELS)[section.removesuffix("_phase1")]
        config(**settings["model"])


def test_full_is_the_settings_of_the_design_documents():
    v1, multidir, v2 = (run.load_settings(name, "full") for name in ("v1", "multidir", "v2"))
    assert {"d_model": 512, "num_layers": 6, "d_state": 16, "expand": 2}.items() <= v1["model"].items()
    assert {"epochs": 100, "batch_size": 64, "learning_rate": 1e-4}.items() <= v1["train"].items()
    assert (multidir["train"]["epochs"], v2["train"]["epochs"], v2["model"]["d_model"]) == (200, 1000, 256)


@pytest.mark.parametrize(("memory", "preset"), [(0, "demo"), (6e9, "demo"), (8e9, "gpu"), (80e9, "gpu")])
def test_preset_is_argument_then_environment_then_hardware(memory, preset, monkeypatch):
    class Properties:
        total_memory = memory

    monkeypatch.setattr(torch.cuda, "is_available", lambda: memory > 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    assert run.resolve_preset() == run.resolve_preset("auto") == preset
    monkeypatch.setenv("NF_PRESET", "full")
    assert (run.resolve_preset(), run.resolve_preset("smoke")) == ("full", "smoke")
    monkeypatch.setenv("NF_PRESET", "huge")
    with pytest.raises(ValueError):
        run.resolve_preset()


def test_overrides_replace_single_settings():
    plain = run.load_settings("v1", "smoke")
    changed = run.load_settings("v1", "smoke", {"train.epochs": 7, "train.learning_rate": 1, "seed": 5})
    assert (changed["train"]["epochs"], changed["train"]["learning_rate"], changed["seed"]) == (7, 1.0, 5)
    assert keys(changed) == keys(plain)
    changed["train"] |= {name: plain["train"][name] for name in ("epochs", "learning_rate")}
    assert changed | {"seed": plain["seed"]} == plain
    assert run.load_settings("ssm_basics", "smoke", {"lengths": (4, 8)})["lengths"] == [4, 8]


def test_overrides_are_a_dict_its_json_or_numbers_of_numpy():
    wanted = run.load_settings("localmamba", "smoke", {"train.epochs": 3, "model.dims": [8, 16], "seed": 4})
    text = '{"train.epochs": 3, "model.dims": [8, 16], "seed": 4}'
    numpy = {"train.epochs": np.int64(3), "model.dims": [np.int8(8), np.uint8(16)], "seed": np.array(4)}
    for same in (text, numpy, numpy | {"model.dims": np.array([8, 16])}):
        assert run.load_settings("localmamba", "smoke", same) == wanted
    assert json.dumps(wanted) == json.dumps(run.load_settings("localmamba", "smoke", numpy))
    for wrong in ("train.epochs=3", "{'train.epochs': 3}", "[3]", ["train.epochs=3"], 3, b"{}"):
        with pytest.raises(ValueError, match='{"train.epochs": 2}'):
            run.load_settings("v1", "smoke", wrong)


@pytest.mark.parametrize(
    "pair",
    'train.epoch 1;epochs 1;train 1; 1;train.epochs 1.5;train.epochs true;train.epochs "3";'
    "train.learning_rate true;train.compile 1;data.source 3".split(";"),
)
def test_overrides_that_do_not_fit_are_refused(pair):
    key, value = pair.split(" ")
    with pytest.raises(ValueError):
        run.load_settings("v1", "smoke", {key: json.loads(value)})
    with pytest.raises(ValueError):
        run.load_settings("v9", "smoke")


def test_start_resolves_prints_and_seeds(project, capsys):
    def started(seed):
        found = run.start(NOTEBOOK, "smoke", {"seed": seed})
        return found, (random.random(), np.random.rand(), torch.rand(1).item())

    (first, draws), (second, again), (_, other) = started(1), started(1), started(2)
    assert draws == again and all(a != b for a, b in zip(draws, other, strict=True))
    lines = capsys.readouterr().out.splitlines()[:5]
    assert [line.split()[0] for line in lines] == ["preset", "device", "backend", "versions", "seed"]
    assert lines[2].split()[1] == first.backend and torch.__version__.split("+")[0] in lines[3]
    assert first.runs.parent == project / "runs" / NOTEBOOK / "smoke"
    assert first.runs != second.runs, "a test has to train"
    demo = [run.start(NOTEBOOK, "demo") for _ in range(2)]
    assert demo[0].runs == demo[1].runs == project / "runs" / NOTEBOOK / "demo", "a long run is found again"
    with pytest.raises(ValueError):
        run.start("02")


def test_a_source_that_cannot_be_had_has_a_stand_in(project, monkeypatch, capsys):
    monkeypatch.setenv("NF_DATA", str(project / "data"))
    monkeypatch.setattr("pooch.retrieve", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    photos, chirps = run.start(NOTEBOOK, "gpu").settings, run.start("07_local_mamba", "gpu").settings
    assert photos["data"]["source"] == "photos" and chirps["data"]["source"] == "chirps"
    assert chirps["model"]["num_classes"] == 4 and "cifar10 is not in NF_DATA" in capsys.readouterr().out


def test_the_root_is_this_repository_and_no_other_project(project, monkeypatch, repository, tmp_path_factory):
    inner = project / "notebooks" / "mine"
    inner.mkdir()
    (inner / "pyproject.toml").touch()
    monkeypatch.chdir(inner)
    assert run.repository_root() == project
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert (run.repository_root() / "nfhelpers" / "run.py").is_file()


@pytest.mark.parametrize("preset", ["demo", "smoke"])
def test_figures_go_where_the_checkout_stays_clean(project, preset):
    started, figure = run.start(NOTEBOOK, preset), Figure(figsize=(1, 1))
    assert run.save_figure(started, figure, "loss") is figure and preset in run.title(started, "Loss")
    folder = project / "build" / "figures" if preset == "demo" else started.runs
    assert (folder / f"{NOTEBOOK}_loss.png").read_bytes().startswith(b"\x89PNG")


def test_other_settings_train_in_another_folder(project):
    changes = ({}, {}, {"train.epochs": 1})
    names = [run.training_folder(run.start(NOTEBOOK, "demo", change), "train").name for change in changes]
    assert names[0] == names[1] != names[2] and names[0].startswith("train-")


def test_field_datasets_are_of_train_and_validation(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(40):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(tmp_path / f"{number}.png")
    data = run.load_settings("v1", "smoke")["data"]
    data |= {"source": str(tmp_path), "size": 16, "train_images": 50, "validation_images": 3}
    train_data, validation_data = run.field_datasets(data, seed=7)
    splits = ("train", "validation", "test")
    splits = [images.open_images(tmp_path, split, 16, held_out=True)[:] for split in splits]
    np.testing.assert_array_equal(validation_data.images[:3], splits[1][:3])
    np.testing.assert_array_equal(train_data.images[:50], splits[0])
    assert sum(len({image.tobytes() for image in split}) for split in splits) == 40  # no two share one
    wanted = images.SparseFields(splits[1], data["observed"], data["queries"], seed=7)[2]
    assert all(torch.equal(validation_data[2][name], value) for name, value in wanted.items())
    before = train_data[0]["input_coords"]
    train_data.set_epoch(1)  # other pixels in each epoch, of training only
    assert not torch.equal(train_data[0]["input_coords"], before)
