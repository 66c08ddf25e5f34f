"""Benchmarks: every row computes the same, the floor is the arithmetic it claims to be, the scripts run."""

import importlib
import json
import math
import os
import subprocess
import sys

import pytest
import torch


@pytest.fixture
def load(repository, monkeypatch):
    """A function that imports a script of benchmarks/ by name, which may import others."""
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    return importlib.import_module


COMMANDS = """\
scan.py --quick --device cpu --shapes v1 --backends loop chunked
train_step.py --quick --device cpu --models v1
sampling.py --quick --device cpu --steps 2 --samplers heun --models v1 localmamba
localmamba.py cost --preset smoke --sizes 16 --repeats 0 --device cpu"""


@pytest.mark.parametrize("command", COMMANDS.splitlines(), ids=lambda command: command.split(".")[0])
def test_it_runs_and_writes_its_rows(repository, tmp_path, command):
    out, environment = tmp_path / "out.json", os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *f"benchmarks/{command}".split(), "--out", out]
    subprocess.run(command, cwd=repository, env=environment, check=True, timeout=200, capture_output=True)
    rows = json.loads(out.read_text())["rows"]
    numbers = [value for row in rows for value in row.values() if isinstance(value, float)]
    assert rows and all(map(math.isfinite, numbers))


def test_plain_versions_agree_with_the_float64_reference(load):
    bench = load("scan")
    rows = [row for row in bench.ROWS if row.backend in bench.PLAIN or row.backend == "chunked"]
    errors = bench.errors_of(rows, torch.float32, torch.device("cpu"))
    assert len(errors) >= 5 and max(errors.values()) < 1e-5


def test_exchanged_scans_give_the_same_gradients(load):
    bench, found = load("train_step"), {}
    for scan in ("chunked", "loop", "einsum", "none"):
        model = bench.make_model("v1", "smoke")
        with bench.scanning(scan):
            bench.make_step(model, 2, 4, torch.device("cpu"), False)()
        found[scan] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    truth = found.pop("chunked")
    assert truth.norm() > 1e-3 and len(found.pop("none")) <= len(truth)
    for gradient in found.values():
        assert (gradient - truth).norm() < 1e-4 * truth.norm()


def test_every_command_of_the_whole_is_understood(repository, tmp_path):
    environment = os.environ | {"DRY": "1", "PRESET": "smoke", "OUT": str(tmp_path), "PYTHON": sys.executable}
    script = ["bash", repository / "benchmarks" / "reproduce.sh"]
    done = subprocess.run(script, env=environment, check=True, capture_output=True, text=True)
    assert "nfhelpers train" in done.stdout and not list(tmp_path.iterdir())
