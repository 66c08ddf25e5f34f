"""python -m nfhelpers train | evaluate | doctor: exit codes, one-line errors, what they leave."""

import json
import subprocess
import sys

import pandas
import pytest
import safetensors.torch
import soundfile
import torch
from test_train import TWO_PROCESSES, assert_same_run, start_python

from nfhelpers import __main__ as cli
from nfhelpers import kernels, models, samplers, train

MODEL = {"d_model": 16, "num_layers": 1, "d_state": 2, "num_fourier_features": 4, "num_heads": 2}
TINY = [
    *(part for key, value in MODEL.items() for part in ("--set", f"model.{key}={value}")),
    *("--set", "data.size=8", "--set", "data.train_images=8", "--set", "data.validation_images=2"),
    *("--preset", "smoke", "--device", "cpu"),
]
GRIDS = [
    *("--set", "model.dims=[8, 16]", "--set", "data.size=16", "--set", "data.train_images=8"),
    *("--set", "train.epochs=1", "--preset", "smoke", "--device", "cpu"),
]


@pytest.fixture
def checkpoint(tmp_path):
    """A saved, untrained v1 field."""
    torch.manual_seed(0)
    folder = tmp_path / "checkpoints" / "tiny"
    models.MambaDiffusion(models.MambaDiffusionConfig(**MODEL)).save_pretrained(folder)
    return folder


@pytest.fixture
def given(monkeypatch):
    """What `train.fit` is called with, in place of training."""
    seen = {}

    def keep(model, data, config, about=None):
        seen.update(model=model, data=data, config=config, about=about)
        return train.TrainResult(model, {}, None, None, steps=0, interrupted=False)

    monkeypatch.setattr(train, "fit", keep)
    return seen


def error_of(capsys, *arguments):
    """The message of a call that must end with exit code 2 and one line on stderr."""
    try:
        code = cli.main([str(a) for a in arguments])
    except SystemExit as stop:  # argparse's own
        return stop.code == 2 and capsys.readouterr().err
    assert code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err


def test_arguments_are_checked_without_torch(tmp_path):
    """Help and errors come at once: torch alone takes seconds to import."""
    (tmp_path / "file").touch()
    (tmp_path / "run" / "best").mkdir(parents=True)
    (tmp_path / "run" / "best" / "config.json").touch()
    calls = [
        (["--help"], 0),
        (["train", "--help"], 0),
        (["train", "v9"], 2),
        (["train", "v1", "--device", "gpu"], 2),
        (["train", "v1", "--set", "train.epoch=3"], 2),
        (["train", "v1", "--set", "train.epochs"], 2),
        (["train", "v1", "--set", "train.epochs=three"], 2),
        (["train", "v1", "--data", "no/such/folder"], 2),
        (["train", "v2", "--preset", "smoke", "--init", "nowhere"], 2),
        (["train", "v2", "--preset", "smoke", "--output", str(tmp_path / "file" / "run")], 2),
        (["evaluate", str(tmp_path / "run")], 2),
        (["evaluate", str(tmp_path / "run" / "best"), "--out", str(tmp_path / "file")], 2),
        (["evaluate", str(tmp_path / "run" / "best"), "--samplers", "sdee"], 2),
        (["doctor", "--model", "nowhere"], 2),
    ]
    code = f"""
import contextlib, io, sys
from nfhelpers.__main__ import main
for arguments, code in {calls!r}:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            found = main(arguments)
        except SystemExit as stop:
            found = stop.code
    assert found == code, (arguments, found)
    assert bool(errors.getvalue()) == bool(code) and "Traceback" not in errors.getvalue()
    assert "torch" not in sys.modules, arguments
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_names_and_overrides():
    assert set(cli.SAMPLERS) == set(samplers.SAMPLERS)
    pairs = ["a.b=3", "c=1e-3", "e=[1, 2]", "f=photos", "h=../data=1"]
    parsed = [("a.b", 3), ("c", 1e-3), ("e", [1, 2]), ("f", "photos"), ("h", "../data=1")]
    assert list(map(cli.setting, pairs)) == parsed


def test_train_writes_a_model_with_a_card_goes_on_and_says_when_it_is_done(tmp_path, capsys):
    arguments = ["train", "v1", *TINY, "--output", str(tmp_path)]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "0 of 2 steps done, 1 an epoch" in out  # 8 images in batches of 8: said, as it is few
    assert models.load_model(tmp_path / "latest").config.d_model == 16
    card = (tmp_path / "best" / "README.md").read_text()
    assert "photos, 8 items" in card and "python -m nfhelpers" in card
    log = (tmp_path / "log.csv").read_bytes()
    assert cli.main([*arguments, "--device", "auto", "--precision", "fp32"]) == 0
    assert "nothing to do" in capsys.readouterr().out and (tmp_path / "log.csv").read_bytes() == log
    assert cli.main([*arguments, "--set", "train.epochs=3"]) == 0
    assert len(pandas.read_csv(tmp_path / "log.csv")) == 3
    capsys.readouterr()
    assert "learning_rate" in error_of(capsys, *arguments, "--set", "train.learning_rate=0.1")


def test_train_passes_settings_on(tmp_path, given):
    changes = ["--set", "train.epochs=7", "--set", "train.learning_rate=1", "--precision", "bf16"]
    assert cli.main(["train", "v1", *TINY, *changes, "--output", str(tmp_path)]) == 0
    config, (train_data, validation_data) = given["config"], given["data"]
    assert (config.epochs, config.learning_rate, config.precision, config.cpu) == (7, 1.0, "bf16", True)
    assert given["model"].config.d_model == 16
    assert (len(train_data), len(validation_data)) == (8, 2)
    assert train_data.images.shape[1:] == (8, 8, 3)
    assert (train_data.seed, validation_data.seed) == (None, config.seed)


@pytest.mark.parametrize(
    ("outcome", "code"), [(FloatingPointError("step 4"), 1), (KeyboardInterrupt(), 130), (True, 130)]
)
def test_exit_codes(outcome, code, tmp_path, monkeypatch):
    def fit(model, data, config, about):
        if isinstance(outcome, BaseException):
            raise outcome
        return train.TrainResult(model, {}, None, None, steps=1, interrupted=True)

    monkeypatch.setattr(train, "fit", fit)
    assert cli.main(["train", "v1", *TINY, "--output", str(tmp_path)]) == code


def test_two_processes_of_the_command_equal_one(tmp_path):
    """accelerate launch -m nfhelpers train ...: the same curve and files."""
    arguments = ["train", "v1", *TINY, "--output"]
    assert cli.main([*arguments, str(tmp_path / "one")]) == 0
    process = start_python(*TWO_PROCESSES, "-m", "nfhelpers", *arguments, tmp_path / "two")
    assert process.wait(timeout=120) == 0
    assert_same_run(tmp_path / "two", tmp_path / "one", 1e-5, 1e-4)


def test_localmamba_takes_its_classes_from_the_data(tmp_path, given, capsys):
    samples = torch.linspace(-0.5, 0.5, 2000)
    for name in ("left", "right"):
        (tmp_path / "sounds" / name).mkdir(parents=True)
        for take in range(12):
            soundfile.write(tmp_path / "sounds" / name / f"{take}.wav", samples.roll(take), 8000)
    arguments = ["train", "localmamba", *GRIDS, "--output", str(tmp_path / "run")]
    sounds = ["--data", str(tmp_path / "sounds")]
    for more, classes in (([], 4), (sounds, 2), ([*sounds, "--set", "model.num_classes=5"], 5)):
        assert cli.main([*arguments, *more]) == 0
        assert given["model"].config.num_classes == classes
        assert given["data"][0][0]["spectrograms"].shape == (1, 16, 16)
    first = given["model"]
    first.save_pretrained(tmp_path / "first")  # of 5 classes, on which a model of 2 is built
    capsys.readouterr()
    assert cli.main([*arguments, *sounds, "--init", str(tmp_path / "first")]) == 0
    there, here = first.state_dict(), given["model"].state_dict()
    assert [name for name in here if not torch.equal(here[name], there[name])] == ["class_embedding.weight"]
    assert "left, right" in capsys.readouterr().out


def test_init_copies_weights_or_what_is_shared_with_v1(checkpoint, tmp_path, capsys, given):
    v1, arguments = models.load_model(checkpoint), [*TINY, "--output", str(tmp_path / "run")]
    assert cli.main(["train", "v1", *arguments, "--init", str(checkpoint)]) == 0
    assert all(torch.equal(x, v1.state_dict()[name]) for name, x in given["model"].state_dict().items())
    for wrapper in ("module.", "_orig_mod.", "module._orig_mod."):  # of DataParallel, torch.compile
        wrapped = {name.replace("blocks.", "blocks._orig_mod."): x for name, x in v1.state_dict().items()}
        wrapped = {wrapper + name: x for name, x in wrapped.items()}
        safetensors.torch.save_file(wrapped, checkpoint / "model.safetensors")
        assert cli.main(["train", "v1", *arguments, "--init", str(checkpoint)]) == 0
        assert all(torch.equal(x, v1.state_dict()[name]) for name, x in given["model"].state_dict().items())
    v2 = ["train", "v2", *arguments, "--set", "model.num_layers=2", "--init"]
    capsys.readouterr()
    assert cli.main([*v2, str(checkpoint)]) == 0
    assert torch.equal(given["model"].fourier.frequencies, v1.fourier.frequencies)
    assert "fourier" in capsys.readouterr().out
    given["model"].save_pretrained(tmp_path / "v2")
    assert "MambaDiffusionV2" in error_of(capsys, "train", "multidir", *arguments, "--init", tmp_path / "v2")
    assert error_of(capsys, "train", "v1", *arguments, "--set", "model.d_model=32", "--init", checkpoint)


def test_autoencoder_is_trained_in_two_phases(tmp_path, capsys):
    options = "--preset smoke --device cpu --set data.size=8 --set data.train_images=24".split()
    first = ["--set", "model.latent_dim=4", "--set", "model.nodes=8"]
    first += ["--set", "train.epochs=1", "--output", str(tmp_path / "first")]
    assert cli.main(["train", "diffae_phase1", *options, *first]) == 0
    trained = models.load_model(tmp_path / "first" / "best")
    assert not torch.equal(trained.latent_std, torch.ones(4)), "the statistics of the latents"
    second = ["--set", "train.epochs=1", "--output", str(tmp_path / "second"), "--init"]
    assert cli.main(["train", "diffae_phase2", *options, *second, str(tmp_path / "first" / "best")]) == 0
    model = models.load_model(tmp_path / "second" / "latest")
    assert model.config.phase == 2 and torch.equal(model.latent_std, trained.latent_std)


def test_evaluate_compares_models_with_classical_methods(checkpoint, tmp_path, capsys):
    other, out = tmp_path / "checkpoints" / "other", tmp_path / "results"
    model = models.load_model(checkpoint)
    with torch.no_grad():
        model.decoder[-1].bias += 0.5
    model.save_pretrained(other)
    options = ["--sizes", 16, 24, "--images", 3, "--samplers", "heun", "sde", "--steps", 2, "--device", "cpu"]
    assert cli.main([str(a) for a in ["evaluate", checkpoint, other, *options, "--out", out]]) == 0
    table = pandas.read_csv(out / "scores.csv")
    means = table[table.kind == "mean"]
    assert set(means.model) == {str(checkpoint), str(other)} and set(table["size"]) == {16, 24}
    assert {"linear", "biharmonic", "wiener"} == set(table[table.kind == "classical"].model)
    assert set(table.kind) == {"mean", "classical", "heun", "sde"}
    assert len(table) == 3 * 2 * (2 + 3 + 2 * 2)  # images, sizes, (means + classical + samples)
    large = means[means["size"] == 24]
    first, second = (large[large.model == str(path)] for path in (checkpoint, other))
    assert (first.difference == 0).all()
    assert second.difference.to_numpy() == pytest.approx(second.psnr.to_numpy() - first.psnr.to_numpy())
    assert f"{second.difference.mean():.4f}" in capsys.readouterr().out
    assert (out / "fields.png").read_bytes().startswith(b"\x89PNG")


def test_evaluate_errors_are_one_line(checkpoint, tmp_path, capsys):
    assert error_of(capsys, "evaluate", checkpoint, "--observed", "1.5", "--device", "cpu")
    grids = models.LocalMamba2D(models.LocalMamba2DConfig(dims=(8,), depths=(1,), mapping_width=8))
    grids.save_pretrained(tmp_path / "grids")
    assert "grids" in error_of(capsys, "evaluate", checkpoint, tmp_path / "grids", "--device", "cpu")
    (checkpoint / "model.safetensors").write_bytes(b"truncated")
    assert "model.safetensors" in error_of(capsys, "evaluate", checkpoint, "--device", "cpu")
    (checkpoint / "config.json").write_text("{")
    assert "config.json" in error_of(capsys, "evaluate", checkpoint, "--device", "cpu")


def test_doctor_checks_every_backend(capsys, monkeypatch):
    assert cli.main(["doctor", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    for name in kernels.BACKENDS:
        (line,) = [line for line in out.splitlines() if line[7:].startswith(f"{name} ")]
        assert line.startswith("ok") == (kernels.status_of(name, "cpu") == "ok")
    right = kernels.self_check

    def wrong(backend, device):
        return {"forward": 1e-7, "backward": float("nan")} if backend == "chunked" else right(backend, device)

    monkeypatch.setattr(kernels, "self_check", wrong)
    assert cli.main(["doctor", "--device", "cpu"]) == 1
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("missed chunked")]


def test_doctor_marks_what_a_model_misses(checkpoint, tmp_path, capsys):
    assert cli.main(["doctor", "--model", str(checkpoint), "--device", "cpu"]) == 0
    model = models.load_model(checkpoint)
    with torch.no_grad():
        model.decoder[-1].bias[0] = torch.nan
    model.save_pretrained(tmp_path / "broken")
    assert cli.main(["doctor", "--model", str(tmp_path / "broken"), "--device", "cpu"]) == 1
    missed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("missed")]
    assert len(missed) == 1 and "decoder" in missed[0]
    config = json.loads((checkpoint / "config.json").read_text()) | {"model_type": "v9"}
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert "config.json" in error_of(capsys, "doctor", "--model", checkpoint)
