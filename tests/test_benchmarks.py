"""The scan benchmark: every row computes the same scan, the floor is the arithmetic it claims to be."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

from nfhelpers import models


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
