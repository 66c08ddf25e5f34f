"""python -m nfhelpers doctor | train | evaluate | compare: exit codes, one-line errors, what they leave."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_train import TWO_PROCESSES, start_python

from nfhelpers import __main__ as cli
from nfhelpers import evaluate, kernels, models, run, spectrograms, train

TINY_MODEL = ["d_model=16", "num_layers=1", "d_state=2", "num_fourier_features=4", "num_heads=2"]
TINY = [
    *(part for setting in TINY_MODEL for part in ("--set", f"model.{setting}")),
    *("--set", "data.size=8", "--set", "data.train_images=8", "--set", "data.validation_images=2"),
    *("--preset", "smoke", "--device", "cpu"),
]


@pytest.fixture
def checkpoint(tmp_path):
    """A saved, untrained v1 field."""
    settings = {key: int(value) for key, value in (setting.split("=") for setting in TINY_MODEL)}
    model_class, config_class = models.FIELD_MODELS["v1"]
    folder = tmp_path / "checkpoints" / "tiny"
    model_class(config_class(**settings)).save_pretrained(folder)
    return folder


def error_of(capsys, *arguments):
    """The message of a call that must end with exit code 2 and one line on stderr."""
    assert cli.main([str(a) for a in arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err


# ---------------------------------------------------------------- doctor


def test_doctor_prints_its_table_before_it_refuses_a_backend(capsys, monkeypatch):
    monkeypatch.setenv("NF_SCAN_BACKEND", "mamba_ssm")
    assert cli.main(["doctor"]) == 2
    captured = capsys.readouterr()
    assert "chunked    ok" in captured.out and "NF_SCAN_BACKEND='mamba_ssm'" in captured.err


def test_doctor_checks_every_backend(capsys):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    for name, number in run.versions().items():
        assert f"{name:<10} {number or 'not installed'}" in out
    assert "cpu (1 thread)" in out
    lines = {line[2:].split()[0]: line for line in out.split("selective scan")[1].splitlines()[1:]}
    assert list(lines) == list(kernels.BACKENDS)
    for name, status in kernels.backend_status().items():
        if status == "ok":
            errors = [float(word) for word in lines[name].split() if "e-" in word]
            assert len(errors) == 2 and max(errors) < 1e-5
        else:
            assert f"off: {status}" in lines[name]
    chosen = kernels.choose_backend(run.default_device())
    assert [name for name, line in lines.items() if line.startswith("*")] == [chosen]


@pytest.mark.parametrize("error", [1e-2, float("nan")])
def test_doctor_fails_when_a_backend_is_wrong(capsys, monkeypatch, error):
    right = kernels.self_check

    def wrong_chunked(backend, device):
        return {"forward": 1e-7, "backward": error} if backend == "chunked" else right(backend, device)

    monkeypatch.setattr(kernels, "self_check", wrong_chunked)
    assert cli.main(["doctor"]) == 1
    captured = capsys.readouterr()
    (line,) = [line for line in captured.out.splitlines() if "WRONG" in line]
    assert "chunked" in line
    assert "do not use chunked" in captured.err


def test_doctor_goes_through_the_checklist_of_localmamba(capsys, monkeypatch):
    assert cli.main(["doctor", "--model", "localmamba"]) == 0
    out = capsys.readouterr().out
    assert "selective scan" in out and "localmamba, preset smoke, on cpu" in out
    lines = [line.split() for line in out.split("localmamba, preset smoke")[1].splitlines()[1:]]
    assert [line[0] for line in lines] == ["ok"] * 4
    assert lines[0] == ["ok", "scan", "kernel", kernels.choose_backend("cpu")]
    assert "2 x 64 x 64" in out and "of attention's" in out

    def fail(model, batch, **options):
        raise ValueError("shapes differ")

    monkeypatch.setattr(evaluate, "grid_flow_loss", fail)
    assert cli.main(["doctor", "--model", "localmamba"]) == 1
    out = capsys.readouterr().out
    assert out.count("FAILED") == 3 and "forward and backward      ValueError: shapes differ" in out


# ---------------------------------------------------------------- train


def test_train_writes_a_model_and_resumes(tmp_path, capsys):
    output = tmp_path / "run"
    arguments = ["train", "v1", *TINY, "--output", str(output), "--seed", "3"]
    assert cli.main(arguments) == 0
    first = capsys.readouterr().out
    # 8 images in batches of 8, 2 epochs
    assert "trained at step 2," in first and "8 images, 2 to validate" in first
    assert models.load_model(output / "latest").config.d_model == 16
    log = (output / "log.csv").read_bytes()
    assert cli.main(arguments) == 0  # nothing is left to do
    assert "trained at step 2" in capsys.readouterr().out
    assert (output / "log.csv").read_bytes() == log
    # the seed is part of what a run is: another one must not silently go on with it
    assert cli.main([*arguments, "--seed", "4"]) == 2


@pytest.mark.parametrize(
    ("ranks", "printed"),
    [
        ({}, True),
        ({"RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"RANK": "1", "LOCAL_RANK": "1"}, False),
        ({"RANK": "8", "LOCAL_RANK": "0"}, False),  # the first of the second machine
        ({"LOCAL_RANK": "1"}, False),
    ],
)
def test_one_process_of_a_launch_prints(tmp_path, capsys, monkeypatch, ranks, printed):
    def trained(model, data, config):
        return train.TrainResult({"val_loss": []}, None, None, steps=1, interrupted=False)

    monkeypatch.setattr(train, "fit", trained)
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["train", "v1", *TINY, "--output", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert (out.count("model     v1"), out.count("trained at step 1")) == ((1, 1) if printed else (0, 0))
    assert bool(out) == printed


def test_interrupted_training_exits_130(tmp_path, capsys, monkeypatch):
    def interrupted(model, data, config):
        return train.TrainResult({"val_loss": []}, None, tmp_path / "latest", steps=1, interrupted=True)

    monkeypatch.setattr(train, "fit", interrupted)
    assert cli.main(["train", "v1", *TINY, "--output", str(tmp_path)]) == 130
    assert "interrupted at step 1" in capsys.readouterr().out


def test_loss_that_is_not_finite_exits_1(tmp_path, capsys, monkeypatch):
    def diverge(model, data, config):
        raise FloatingPointError("loss is nan at step 4, layer blocks.0")

    monkeypatch.setattr(train, "fit", diverge)
    assert cli.main(["train", "v1", *TINY, "--output", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "error: loss is nan at step 4, layer blocks.0\n"


def test_train_passes_settings_on(tmp_path, monkeypatch):
    given = {}

    def keep(model, data, config):
        given.update(model=model, data=data, config=config)
        return train.TrainResult({"val_loss": []}, None, None, steps=0, interrupted=False)

    monkeypatch.setattr(train, "fit", keep)
    changes = ["--set", "train.epochs=7", "--set", "train.learning_rate=1", "--data", "photos"]
    precision = ["--precision", "bf16", "--output", str(tmp_path / "out")]
    assert cli.main(["train", "v1", *TINY, *changes, *precision]) == 0
    config = given["config"]
    assert (config.epochs, config.learning_rate, config.precision, config.cpu) == (7, 1.0, "bf16", True)
    assert config.output_dir == str(tmp_path / "out")
    assert given["model"].config.d_model == 16
    train_data, validation_data = given["data"]
    assert (len(train_data), len(validation_data)) == (8, 2)
    assert train_data.images.shape[1:] == (8, 8, 3)
    assert (train_data.seed, validation_data.seed) == (None, config.seed)


GRIDS = [
    *("--set", "model.dims=[8, 16]", "--set", "data.size=16", "--set", "data.train_images=8"),
    *("--set", "train.epochs=1", "--preset", "smoke", "--device", "cpu"),
]


def test_localmamba_is_trained_on_spectrograms(tmp_path, capsys):
    output = tmp_path / "run"
    assert cli.main(["train", "localmamba", *GRIDS, "--output", str(output)]) == 0
    out = capsys.readouterr().out
    assert "data      chirps, 8 spectrograms, 8 to validate" in out
    assert "trained at step 1, validation loss 0." in out and "PSNR" not in out
    assert models.load_model(output / "best").config.num_classes == 4


def test_localmamba_takes_its_classes_from_the_data(tmp_path, monkeypatch):
    samples = torch.linspace(-0.5, 0.5, 2000)
    for name in ("left", "right"):
        for take in range(8):
            path = tmp_path / "sounds" / name / f"{take}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            spectrograms.write_wav(path, samples.roll(take), 8000)
    seen = []
    monkeypatch.setattr(train, "fit", lambda model, data, config: seen.append((model, data)) or sys.exit())
    arguments = ["train", "localmamba", *GRIDS, "--data", str(tmp_path / "sounds")]
    for more, classes in (([], 2), (["--set", "model.num_classes=5"], 5)):
        with pytest.raises(SystemExit):
            cli.main([*arguments, *more])
        model, (train_data, _) = seen.pop()
        assert model.config.num_classes == classes
        assert train_data.meta.class_names == ("left", "right")
        assert train_data[0]["spectrograms"].shape == (1, 16, 16)


def test_v2_starts_from_the_parts_it_shares_with_v1(checkpoint, tmp_path, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(train, "fit", lambda model, data, config: seen.append(model) or sys.exit())
    arguments = ["train", "v2", *TINY, "--set", "model.num_layers=2", "--output", str(tmp_path / "run")]
    with pytest.raises(SystemExit):
        cli.main([*arguments, "--init", str(checkpoint)])
    v1 = models.load_model(checkpoint)
    assert torch.equal(seen[0].fourier.frequencies, v1.fourier.frequencies)
    assert torch.equal(seen[0].input_embedding.value_proj.weight, v1.input_embedding.value_proj.weight)
    seen[0].save_pretrained(tmp_path / "v2")
    assert "is a MambaDiffusionV2; pass a v1" in error_of(capsys, *arguments, "--init", tmp_path / "v2")
    assert "leave it out for v1" in error_of(capsys, "train", "v1", *TINY, "--init", checkpoint)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--preset", "tiny"], "legal presets are smoke, demo, full and auto"),
        (["--set", "train.epoch=3"], "legal keys are seed, model.d_model"),
        (["--set", "train.epochs"], "write --set train.epochs=3"),
        (["--set", "train.epochs=three"], "pass a int such as 2"),
        (["--set", "train.epochs=0"], "epochs=0"),
        (["--set", "model.num_heads=5"], "num_heads=5"),
        (["--data", "no/such/folder"], "'no/such/folder' is unknown"),
        (["--seed", "-1"], "seed=-1"),
    ],
)
def test_train_errors_are_one_line(tmp_path, capsys, arguments, words):
    message = error_of(capsys, "train", "v1", *TINY, "--output", tmp_path, *arguments)
    assert words in message
    assert not list(tmp_path.iterdir()), "an error left files behind"


def test_cuda_without_a_gpu_is_an_error(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in error_of(capsys, "train", "v1", *TINY, "--device", "cuda")


def test_overrides_are_parsed_as_toml():
    pairs = ["a.b=3", "c=1e-3", "d=true", "e=[1, 2]", "f=photos", "g='x y'", "h=../data=1"]
    parsed = cli.parse_overrides(pairs)
    assert parsed == {
        "a.b": 3,
        "c": 1e-3,
        "d": True,
        "e": [1, 2],
        "f": "photos",
        "g": "x y",
        "h": "../data=1",
    }


# ---------------------------------------------------------------- evaluate


def test_evaluate_prints_and_writes_the_same_numbers(checkpoint, tmp_path, capsys):
    out, figures = tmp_path / "results" / "multiscale.json", tmp_path / "figures"
    arguments = ["evaluate", checkpoint, "--scales", 32, 48, "--steps", 2, "--images", 2, "--device", "cpu"]
    assert cli.main([str(a) for a in [*arguments, "--out", out, "--figures", figures]]) == 0
    table = capsys.readouterr().out
    document = json.loads(out.read_text())
    rows = document["rows"]
    assert {row["scale"] for row in rows} == {32, 48}
    assert {"mean", "sample", "classical"} == {row["kind"] for row in rows}
    lines = table.splitlines()[2:]
    for row, line in zip(rows, lines, strict=False):
        assert line.startswith(str(row["scale"])) and row["method"] in line and f"{row['psnr']:.2f}" in line
    assert document["command"].startswith("python -m nfhelpers evaluate ")
    assert document["config"]["images"] == 2
    assert (figures / "tiny_multiscale.png").read_bytes().startswith(b"\x89PNG")


def test_models_are_evaluated_in_tf32_but_trained_and_checked_without(
    checkpoint, tmp_path, capsys, monkeypatch
):
    assert cli.main(["doctor"]) == 0
    assert cli.main(["train", "v1", *TINY, "--output", str(tmp_path)]) == 0
    assert not torch.backends.cuda.matmul.allow_tf32
    for forbidden in ("", "0"):
        monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", forbidden)
        assert cli.main(["evaluate", str(checkpoint), "--scales", "16", "--images", "1", "--steps", "1"]) == 0
        assert torch.backends.cuda.matmul.allow_tf32 == (forbidden != "0")


def test_evaluate_puts_several_checkpoints_into_one_table(checkpoint, tmp_path, capsys):
    other = tmp_path / "checkpoints" / "other"
    models.load_model(checkpoint).save_pretrained(other)
    options = ["--scales", "32", "--sample-scales", "--images", "2", "--device", "cpu"]
    out, figures = tmp_path / "table.json", tmp_path / "figures"
    assert (
        cli.main(
            ["evaluate", str(checkpoint), str(other), *options, "--out", str(out), "--figures", str(figures)]
        )
        == 0
    )
    record = json.loads(out.read_text())
    assert record["config"]["checkpoint"] == [str(checkpoint), str(other)]
    tiny, same, *classical = record["rows"]
    assert (tiny["model"], same["model"]) == ("tiny", "other") and {row["model"] for row in classical} == {
        "-"
    }
    assert tiny["psnr"] == same["psnr"] and same["versus_first"] == 0 and same["parameters"] > 0
    assert (figures / "tiny_other_multiscale.png").is_file()
    assert "PSNR - first" in capsys.readouterr().out


def test_evaluate_errors_are_one_line(checkpoint, tmp_path, capsys):
    assert "holds no config.json" in error_of(capsys, "evaluate", tmp_path)
    assert "'no-source'" in error_of(capsys, "evaluate", checkpoint, "--data", "no-source", "--device", "cpu")
    assert "observed=1.5" in error_of(capsys, "evaluate", checkpoint, "--observed", "1.5", "--device", "cpu")
    grids = models.LocalMamba2D(models.LocalMamba2DConfig(dims=(8,), depths=(1,), mapping_width=8))
    grids.save_pretrained(tmp_path / "grids")
    error = error_of(capsys, "evaluate", checkpoint, tmp_path / "grids", "--device", "cpu")
    assert "grids is a LocalMamba2D, not a model of sparse fields" in error
    (checkpoint / "model.safetensors").write_bytes(b"truncated")
    error_of(capsys, "evaluate", checkpoint, "--device", "cpu")


def test_evaluate_compares_samplers(checkpoint, capsys):
    arguments = ["evaluate", checkpoint, "--scales", 16, "--steps", 1, "--images", 2, "--device", "cpu"]
    arguments += ["--samplers", "heun", "sde", "ddim", "--temperature", 0.5]
    assert cli.main([str(a) for a in arguments]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "sample (" in line]
    samplers = ("heun, 1 steps", "sde, 1 steps, temperature 0.5", "ddim, 1 steps")
    assert len(lines) == 3
    assert all(f"sample ({sampler})" in line for sampler, line in zip(samplers, lines, strict=True))
    error = error_of(capsys, "evaluate", checkpoint, "--temperature", "0.5", "--device", "cpu")
    assert "temperature=0.5 is that of 'sde'" in error


# ---------------------------------------------------------------- compare


def test_compare_writes_its_three_files(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = tmp_path / "other" / "tiny"
    model_class, config_class = models.FIELD_MODELS["v1"]
    torch.manual_seed(1)
    model_class(config_class(d_model=32, num_layers=1, d_state=2, num_heads=2)).save_pretrained(other)
    arguments = ["compare", checkpoint, other, "--num-samples", 3, "--steps", 2, 1, "--device", "cpu"]
    assert cli.main([str(a) for a in arguments]) == 0
    printed = capsys.readouterr().out
    output = tmp_path / "runs" / "compare" / "checkpoints-tiny_vs_other-tiny"
    found = {path.name: path for path in output.iterdir()}
    assert set(found) == {"comparison_results.txt", "v1_vs_v2_comparison.png", "improvement_chart.png"}
    text = found["comparison_results.txt"].read_text()
    assert text.startswith("python -m nfhelpers compare ") and text.split("\n", 1)[1] in printed
    for word in (
        "posterior mean (1 step)",
        "sample (heun, 2 and 1 steps)",
        "PSNR (dB)",
        "SSIM",
        "speckle",
        "seconds",
        "paired t",
        "Wilcoxon",
        "±",
    ):
        assert word in text
    parameters = sum(p.numel() for p in models.load_model(other).parameters())
    assert f"other-tiny: {other}, {parameters:,} parameters" in text
    for name in ("v1_vs_v2_comparison.png", "improvement_chart.png"):
        assert found[name].read_bytes().startswith(b"\x89PNG")
    arguments += ["--output", tmp_path / "here"]
    assert cli.main([str(a) for a in arguments]) == 0
    assert len(list((tmp_path / "here").iterdir())) == 3


def test_compare_errors_are_one_line(checkpoint, tmp_path, capsys):
    nowhere = tmp_path / "nowhere"
    assert "holds no config.json" in error_of(
        capsys, "compare", checkpoint, nowhere, "--output", tmp_path / "o"
    )
    both = ["compare", checkpoint, checkpoint, "--device", "cpu", "--output", tmp_path / "o"]
    assert "images=1 cannot" in error_of(capsys, *both, "--num-samples", 1)
    assert "3 numbers" in error_of(capsys, *both, "--steps", 1, 2, 3)
    assert "'no-source'" in error_of(capsys, *both, "--data", "no-source")
    assert not (tmp_path / "o").exists(), "an error left files behind"


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (("checkpoints/v1-photos", "checkpoints/v2-photos"), ("v1-photos", "v2-photos")),
        (("runs/v1/full/best", "runs/v2/full/best"), ("v1-full-best", "v2-full-best")),
        (("a/best", "a/best/"), ("best-A", "best-B")),
        (("a/b", "b"), ("a-b", "{}-b")),
    ],
)
def test_names_of_checkpoints_differ(paths, names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = tuple(name.format(tmp_path.name) for name in names)
    assert cli.checkpoint_names(*map(Path, paths)) == names


# ---------------------------------------------------------------- several processes


@pytest.fixture
def two_checkpoints(checkpoint, tmp_path):
    """Two fields whose output has moved away from zero."""
    torch.manual_seed(2)
    paths = [tmp_path / "checkpoints" / name for name in ("a", "b")]
    for path in paths:
        model = models.load_model(checkpoint)
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.1)
        model.save_pretrained(path)
    return paths


def printed_by_one_and_by_two(tmp_path, capfd, arguments, output):
    """What one process and what two print; they write to tmp_path/one and tmp_path/two."""
    arguments = [*map(str, arguments), "--device", "cpu", output]
    assert cli.main([*arguments, str(tmp_path / "one")]) == 0
    printed = [capfd.readouterr().out.replace(str(tmp_path / "one"), "")]
    process = start_python(*TWO_PROCESSES, "-m", "nfhelpers", *arguments, tmp_path / "two")
    assert process.wait(timeout=120) == 0
    return [*printed, capfd.readouterr().out.replace(str(tmp_path / "two"), "")]


def without_seconds(text):
    return [line for line in text.splitlines() if not line.startswith("seconds ")]


def test_evaluate_on_two_processes_equals_one(two_checkpoints, tmp_path, capfd):
    """accelerate launch -m nfhelpers evaluate ...: an odd number of images, means, samples and classical."""
    arguments = ["evaluate", *two_checkpoints, "--scales", 16, 32, "--sample-scales", 16, "--images", 5]
    arguments += ["--samplers", "heun", "sde", "--steps", 3]
    printed = printed_by_one_and_by_two(tmp_path, capfd, arguments, "--out")
    assert printed[0] == printed[1]
    one, other = (json.loads((tmp_path / name).read_text()) for name in ("one", "two"))
    assert other["config"] == {**one["config"], "processes": 2}
    for ours, theirs in zip(one["rows"], other["rows"], strict=True):
        assert 0 < theirs.pop("seconds") and 0 < ours.pop("seconds") and ours["images"] == 5
        if ours["kind"] == "classical":
            assert theirs == pytest.approx(ours, abs=1e-12)  # other alignment, other last digit
        for key, value in ours.items():
            assert theirs[key] == (pytest.approx(value, abs=1e-6) if isinstance(value, float) else value)


def test_compare_on_two_processes_equals_one(two_checkpoints, tmp_path, capfd):
    """One image at a time either way: the same figures to the last digit."""
    arguments = ["compare", *two_checkpoints, "--num-samples", 5, "--steps", 3]
    one, two = printed_by_one_and_by_two(tmp_path, capfd, arguments, "--output")
    assert without_seconds(one) == without_seconds(two.replace(", 2 processes", ""))
    assert len(two.splitlines()) == len(without_seconds(two)) + 2 and ", 2 processes" in two
    files = [{path.name: path for path in (tmp_path / name).iterdir()} for name in ("one", "two")]
    assert set(files[0]) == set(files[1]) and len(files[0]) == 3
    pictures = [found["v1_vs_v2_comparison.png"].read_bytes() for found in files]
    assert pictures[0] == pictures[1]


# ---------------------------------------------------------------- the process


def test_module_runs(repository):
    done = subprocess.run(
        [sys.executable, "-m", "nfhelpers", "evaluate", "no/such/checkpoint"],
        capture_output=True,
        text=True,
        cwd=repository,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for option in ("--preset", "--data", "--output", "--set", "--device", "--precision", "--seed"):
        assert option in text
