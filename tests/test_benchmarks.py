"""Benchmarks: every row computes the same, the floor is the arithmetic it claims to be, the scripts run."""

import importlib.util
import json
import os
import shlex
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nfhelpers import __main__ as command_line
from nfhelpers import models
from nfhelpers.images import SparseFields
from nfhelpers.run import load_settings


@pytest.fixture(scope="module")
def bench(repository):
    spec = importlib.util.spec_from_file_location("benchmarks_scan", repository / "benchmarks" / "scan.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_plain_versions_agree_with_the_float64_reference(bench):
    rows = [row for row in bench.ROWS if row.backend in bench.PLAIN or row.backend == "chunked"]
    errors = bench.errors_of(rows, torch.float32, torch.device("cpu"))
    assert set(errors) == {"loop", "einsum", "blelloch", "pscan", "chunked", "chunked tied"}
    assert max(errors.values()) < 1e-5


def test_a_wrong_backend_is_found_out(bench, monkeypatch):
    monkeypatch.setitem(bench.PLAIN, "loop", lambda *arguments: 1.01 * bench.scan_loop(*arguments))
    errors = bench.errors_of([bench.Row("loop")], torch.float32, torch.device("cpu"))
    assert errors["loop"] > 5e-3


def test_floor_of_the_target_size(bench):
    limits = dict(copy_bytes_per_second=3e12, exponentials_per_second=132 * 16 * 1.98e9)
    case = bench.Case("v1", "v1", 64, 1024, 1228)
    token = 64 * 1228 * 2  # bytes of one bfloat16 a token
    bytes_forward, exponentials = bench.floors(case, False, torch.bfloat16, limits)["forward"]
    assert bytes_forward == pytest.approx((3 * 1024 + 2 * 16) * token / 3e12)
    assert exponentials == pytest.approx(64 * 1228 * 1024 * 18 / (132 * 16 * 1.98e9))
    tied = bench.floors(case, True, torch.bfloat16, limits)["forward_backward"]
    assert tied[1] == pytest.approx(2 * exponentials / 6)
    assert tied[0] == pytest.approx((8 * 1024 + 6 * 16) * token / 3e12)


def test_growth_is_the_slope(bench):
    rows = [dict(row="x", shape="length", length=n, peak_bytes=3 * n**1.5) for n in (512, 1024, 2048, 4096)]
    assert bench.growth(rows, "x", "peak_bytes") == pytest.approx(1.5)
    assert bench.growth(rows[:3], "x", "peak_bytes") is None


def test_gpu_script_says_what_it_lacks(repository, tmp_path):
    environment = os.environ | dict(PYTHON=sys.executable, OUT=str(tmp_path), CUDA_VISIBLE_DEVICES="")
    run = subprocess.run(
        ["bash", repository / "benchmarks" / "gpu.sh"], env=environment, capture_output=True, text=True
    )
    assert (run.returncode, run.stderr) == (2, "benchmarks/gpu.sh cannot run: no CUDA device\n")
    assert not list(tmp_path.iterdir())


def test_the_command_runs_from_end_to_end(repository, tmp_path):
    """Small sizes, two rows: a table, targets, JSON and figure."""
    command = [sys.executable, "benchmarks/scan.py", "--quick", "--device", "cpu", "--shapes", "v1", "length"]
    command += [
        "--backends",
        "loop",
        "chunked",
        "--out",
        tmp_path / "scan.json",
        "--figure",
        tmp_path / "scan.png",
    ]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True, timeout=120)
    assert "v1" in done.stdout and "chunked tied" in done.stdout and "targets" in done.stdout
    rows = json.loads((tmp_path / "scan.json").read_text())["rows"]
    assert {row["row"] for row in rows} == {"loop", "chunked", "chunked tied"}
    assert all(0 < row["forward"] for row in rows)
    assert (tmp_path / "scan.png").read_bytes().startswith(b"\x89PNG")


def test_localmamba_benchmark_prints_both_tables(repository, tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("lm", repository / "benchmarks" / "localmamba.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    out = tmp_path / "cost.json"
    module.main(f"cost --preset smoke --sizes 16 --repeats 0 --device cpu --out {out}".split())
    assert "GFLOP forward" in capsys.readouterr().out
    document = json.loads(out.read_text())
    assert [row["mixer"] for row in document["rows"]] == ["ssm", "attention"]
    assert document["command"].startswith("python benchmarks/localmamba.py cost --preset smoke")

    torch.manual_seed(0)
    config = models.LocalMamba2DConfig(dims=(8, 16), depths=(1, 1), mapping_width=8, num_classes=4)
    models.LocalMamba2D(config).save_pretrained(tmp_path / "model")
    options = "--data chirps --size 8 --guidance 1 --method euler --steps 1 --device cpu".split()
    module.main(["generated", str(tmp_path / "model"), *options])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["source", "guidance", "count", "accuracy"] and len(lines) == 5


# Training steps, sampling, the whole


@pytest.fixture
def load_benchmark(repository, monkeypatch):
    """A function that imports a script of benchmarks/ by name, which may import others."""
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    return importlib.import_module


@pytest.mark.parametrize("name", ["v1", "field", "localmamba"])
def test_exchanged_scans_give_the_same_loss_and_gradients(load_benchmark, name):
    """native or chunked, loop and einsum, in one block and in many, on the same model; `none` does not."""
    bench = load_benchmark("train_step")
    device = torch.device("cpu")
    found = {}
    for scan, block in (
        ("chunked", 2**28),
        ("loop", 2**28),
        ("einsum", 2**28),
        ("einsum", 2**16),
        ("none", 0),
    ):
        model = bench.make_model(name, "smoke")
        with pytest.MonkeyPatch.context() as patch, bench.scanning(scan):
            patch.setitem(bench.BLOCK_BYTES, "cpu", block)
            bench.make_step(model, 2, 4, device, False)()
        grads = torch.cat(
            [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()]
        )
        found[scan, block] = grads
    truth = found.pop(("chunked", 2**28))
    assert truth.abs().max() > 1e-3
    different = found.pop(("none", 0))
    assert (different - truth).norm() > 0.01 * truth.norm()
    for grads in found.values():
        assert (grads - truth).norm() < 1e-4 * truth.norm()


def test_scans_are_put_back(load_benchmark, monkeypatch):
    bench = load_benchmark("train_step")
    before = bench.ssm.selective_scan
    monkeypatch.setenv("NF_SCAN_BACKEND", "chunked")
    with bench.scanning("reference"):
        assert os.environ["NF_SCAN_BACKEND"] == "reference"
    with pytest.raises(KeyError), bench.scanning("loop"):
        assert bench.ssm.selective_scan is not before
        raise KeyError
    assert bench.ssm.selective_scan is before and os.environ["NF_SCAN_BACKEND"] == "chunked"


def test_decays_of_einsum_are_counted(load_benchmark):
    bench = load_benchmark("train_step")
    model = bench.make_model("v1", "smoke")  # 2 layers of 64 channels and 4 states
    bench.DECAYS.clear()
    with bench.scanning("none"):
        bench.make_step(model, 3, 4, torch.device("cpu"), False)()
    assert bench.DECAYS == [3 * 64 * 4 * (16 + 16) ** 2] * 2


def test_training_step_benchmark_prints_its_tables(load_benchmark, tmp_path, capsys):
    bench = load_benchmark("train_step")
    out = tmp_path / "steps.json"
    bench.main(f"--quick --device cpu --models v1 local --out {out}".split())
    text = capsys.readouterr().out
    for part in ("scan's share", "time grows", "waiting for data", "v1: step with loop / step, batch 1"):
        assert part in text
    rows = json.loads(out.read_text())["rows"]
    steps = [row for row in rows if row["table"] == "steps"]
    assert {row["scan"] for row in steps if row["model"] == "v1"} >= {"chunked", "loop", "einsum"}
    assert all(row["seconds"] > 0 and row["memory"] > 0 for row in steps)
    (waiting,) = (row for row in rows if row["table"] == "waiting")
    assert waiting["steps"] == 2 and 0 < waiting["waiting"] < 1


def test_time_that_training_waits_is_found(load_benchmark, monkeypatch):
    """By a clock on which an item takes 10 ms, in batches of 8, and a step 120 ms, and all else nothing."""
    bench = load_benchmark("train_step")
    clock = [0.0]
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    class Slow(SparseFields):
        def __getitem__(self, index):
            clock[0] += 0.01
            return super().__getitem__(index)

    def slow_datasets(name, data, seed):
        pictures = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3), dtype=np.uint8)
        return Slow(pictures), SparseFields(pictures[:2], seed=0)

    update = bench.train._update

    def slow_update(*arguments):
        clock[0] += 0.12
        return update(*arguments)

    monkeypatch.setattr(bench.command_line, "load_datasets", slow_datasets)
    monkeypatch.setattr(bench.train, "_update", slow_update)
    row = bench.measure_waiting("v1", bench.parse("--quick --device cpu".split()))
    assert row["seconds"] == pytest.approx(0.2) and row["waiting"] == pytest.approx(0.4)


def test_sampling_benchmark_prints_its_table(load_benchmark, tmp_path, capsys):
    bench = load_benchmark("sampling")
    out = tmp_path / "sampling.json"
    options = (
        "--quick --device cpu --steps 2 --samplers heun --models v1 diffae_phase1 diffae_phase2 localmamba"
    )
    bench.main([*options.split(), "--out", str(out)])
    assert "queries/s" in capsys.readouterr().out
    rows = {(row["model"], row["sampler"]): row for row in json.loads(out.read_text())["rows"]}
    assert set(rows) == {
        ("v1", "mean"), ("v1", "heun"), ("diffae_phase1", "mean"), ("diffae_phase2", "mean"),
        ("diffae_phase2", "heun"), ("localmamba", "heun"),
    }  # fmt: skip
    assert rows["v1", "heun"]["evaluations"] == 3 and rows["v1", "heun"]["queries"] == 16
    assert rows["v1", "mean"]["loop"] > 0 and rows["localmamba", "heun"]["loop"] > 0  # of the first row alone
    assert rows["v1", "heun"]["loop"] is None and rows["v1", "heun"]["share"] is None


def test_sampling_benchmark_of_a_trained_model(load_benchmark, repository, tmp_path):
    bench, out = load_benchmark("sampling"), tmp_path / "sampling.json"
    command = ["--checkpoints", str(repository / "checkpoints" / "field-photos"), "--sides", "8", "12"]
    bench.main(
        [*command, "--quick", "--steps", "2", "--samplers", "heun", "--device", "cpu", "--out", str(out)]
    )
    rows = json.loads(out.read_text())["rows"]
    assert [(row["model"], row["sampler"], row["evaluations"]) for row in rows] == [
        (f"field-photos {side} px", *run) for side in (8, 12) for run in (("mean", 1), ("heun", 3))
    ]
    assert [row["queries"] for row in rows[::2]] == [64 - 13, 144 - 29]


def evaluations_of(bench, model, sampler):
    calls = []
    model.register_forward_hook(lambda *given: calls.append(1))
    call, _, claimed = bench.make_sampling(model, sampler, 3, 1, 4, torch.device("cpu"))
    call()
    return len(calls), claimed


def test_sampling_benchmark_counts_evaluations(load_benchmark):
    bench = load_benchmark("sampling")
    for sampler in ("mean", *bench.samplers.SAMPLERS):
        made, claimed = evaluations_of(bench, bench.make_model("v1", "smoke"), sampler)
        assert made == claimed, sampler


def reproduce(repository, *stages, **environment):
    command = ["bash", repository / "benchmarks" / "reproduce.sh", *stages]
    environment = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "DEVICE": "cpu"} | environment
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("preset", ["smoke", "full"])
def test_every_command_of_the_whole_is_understood(repository, load_benchmark, preset, tmp_path):
    done = reproduce(
        repository, PRESET=preset, DRY="1", OUT=str(tmp_path), COMPILE="all", SET="train.epochs=3 seed=1"
    )
    assert done.returncode == 0, done.stderr
    programs = {"benchmarks/scan.py": "scan", "benchmarks/train_step.py": "train_step"}
    programs |= {f"benchmarks/{name}.py": name for name in ("sampling", "diffae", "localmamba")}
    models_trained = []
    for line in done.stdout.splitlines():
        _, program, *arguments = shlex.split(line)
        if program == "-m":
            options = command_line.build_parser().parse_args(arguments[1:])
            if arguments[1] == "train":
                models_trained.append(options.model)
                overrides = command_line.parse_overrides(options.set)
                settings = load_settings(options.model, options.preset, overrides)
                assert settings["train"]["compile"] and settings["train"]["epochs"] == 3
        elif hasattr(load_benchmark(programs[program]), "parse"):
            load_benchmark(programs[program]).parse(arguments)
        else:
            assert (repository / program).is_file()
    assert models_trained == [*command_line.trainable()[:4], *command_line.PHASES, "localmamba"]
    assert len(done.stdout.splitlines()) == (16 if preset == "smoke" else 18)
    assert not list(tmp_path.iterdir())


def test_the_whole_goes_on_in_slices(repository, tmp_path):
    """v1 trained in slices, longer and longer ones; what is done is passed over."""
    options = dict(PRESET="smoke", OUT=str(tmp_path))
    every = "train.evaluate_every=60 train.save_every=60 train.visualise_every=60"
    options["SET"] = f"train.epochs=60 data.train_images=16 {every}"
    calls = []
    while len(calls) < 20 and (not calls or calls[-1].returncode == 75):
        calls.append(reproduce(repository, "train-v1", SLICE=str(1 + 5 * len(calls)), **options))
    assert calls[0].returncode == 75 and "call again" in calls[0].stdout
    assert calls[-1].returncode == 0, calls[-1].stderr
    losses = [row for row in (tmp_path / "v1" / "log.csv").read_text().splitlines()[1:] if row.split(",")[2]]
    assert [int(row.split(",")[0]) for row in losses] == list(range(1, 121))  # no step twice, none left out
    assert "trained at step 120" in (tmp_path / "tables" / "train-v1.txt").read_text()
    again = reproduce(repository, "train-v1", PRESET="smoke", OUT=str(tmp_path))
    assert (again.returncode, again.stdout) == (0, "train-v1: done before\n")


def test_a_stage_that_fails_or_is_unknown_is_named(repository, tmp_path):
    failed = reproduce(repository, "means-photos", PRESET="smoke", OUT=str(tmp_path))
    assert failed.returncode == 1 and "means-photos failed" in failed.stderr
    assert not (tmp_path / "done" / "means-photos").exists()
    unknown = reproduce(repository, "train-v9", OUT=str(tmp_path))
    assert unknown.returncode == 2 and "no stage train-v9; stages are: train-v1" in unknown.stderr
