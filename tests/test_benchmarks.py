"""Benchmarks: every row computes the same, the floor is the arithmetic it claims to be, the scripts run."""

import importlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nfhelpers import __main__ as command_line
from nfhelpers import images, models, samplers
from nfhelpers.images import grid_coords
from nfhelpers.models.field import Hats
from nfhelpers.models.spline import thin_plate_spline


@pytest.fixture
def bench(repository, monkeypatch):
    """A function that imports a script of benchmarks/ by name, which may import others."""
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    return importlib.import_module


def test_plain_versions_agree_with_float64_and_a_wrong_one_is_found_out(bench, monkeypatch):
    scan = bench("scan")
    rows = [row for row in scan.ROWS if row.backend in scan.PLAIN or row.backend == "chunked"]
    errors = scan.errors_of(rows, torch.float32, torch.device("cpu"))
    assert set(errors) == {"loop", "einsum", "blelloch", "pscan", "chunked", "chunked tied"}
    assert max(errors.values()) < 1e-5
    monkeypatch.setitem(scan.PLAIN, "loop", lambda *arguments: 1.01 * scan.scan_loop(*arguments))
    assert scan.errors_of([scan.Row("loop")], torch.float32, torch.device("cpu"))["loop"] > 5e-3


def test_floor_of_the_target_size(bench):
    scan, token = bench("scan"), 64 * 1228 * 2  # bytes of one bfloat16 a token
    limits = dict(copy_bytes_per_second=3e12, exponentials_per_second=132 * 16 * 1.98e9)
    case = scan.Case("v1", "v1", 64, 1024, 1228)
    bytes_forward, exponentials = scan.floors(case, False, torch.bfloat16, limits)["forward"]
    assert bytes_forward == pytest.approx((3 * 1024 + 2 * 16) * token / 3e12)
    assert exponentials == pytest.approx(64 * 1228 * 1024 * 18 / (132 * 16 * 1.98e9))


def test_the_scan_benchmark_runs_from_end_to_end(bench, tmp_path, monkeypatch):
    options = "--quick --device cpu --shapes v1 length --backends loop chunked --out".split()
    monkeypatch.setattr(sys, "argv", ["scan.py", *options, str(tmp_path / "scan.json")])
    assert bench("scan").main() == 0
    rows = json.loads((tmp_path / "scan.json").read_text())["rows"]
    assert {row["row"] for row in rows} == {"loop", "chunked", "chunked tied"}
    assert all(0 < row["forward"] for row in rows)


@pytest.mark.parametrize(("name", "changes"), [("v1", {}), ("field", {"nodes": 8})], ids=["v1", "field"])
def test_exchanged_scans_give_the_same_gradients(bench, name, changes):
    """chunked, loop and einsum on the same model; `none` does not."""
    steps, found = bench("train_step"), {}
    batch = steps.field_batch(2, 4)
    for scan in ("chunked", "loop", "einsum", "none"):
        model = steps.make_model(name, "smoke", **changes)
        with steps.scanning(scan):
            queries = batch["query_values"], batch["query_coords"], torch.tensor([0.2, 0.7])
            model(*queries, batch["input_coords"], batch["input_values"]).square().sum().backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        found[scan] = torch.cat([grad.flatten() for grad in grads])
    truth, different = found.pop("chunked"), found.pop("none")
    assert (different - truth).norm() > 2e-3 * truth.norm()
    for grads in found.values():
        assert (grads - truth).norm() < 1e-5 * truth.norm()


def test_training_steps_and_sampling_are_timed(bench, tmp_path):
    steps, sampling = bench("train_step"), bench("sampling")
    steps.main(f"--quick --device cpu --models v1 --out {tmp_path / 'steps.json'}".split())
    rows = json.loads((tmp_path / "steps.json").read_text())["rows"]
    assert {row["scan"] for row in rows} >= {"none", "chunked", "loop", "einsum"}
    assert all(row["seconds"] > 0 for row in rows)
    out = tmp_path / "sampling.json"
    options = f"--quick --device cpu --steps 2 --samplers heun --models v1 localmamba --out {out}"
    sampling.main(options.split())
    rows = {(row["model"], row["sampler"]): row for row in json.loads(out.read_text())["rows"]}
    assert set(rows) == {("v1", "mean"), ("v1", "heun"), ("localmamba", "heun")}
    assert rows["v1", "heun"]["evaluations"] == 3 and rows["v1", "mean"]["loop"] > 0


def test_cost_of_localmamba_is_counted(bench, tmp_path):
    out = tmp_path / "cost.json"
    bench("localmamba").main(f"cost --preset smoke --sizes 16 --repeats 0 --device cpu --out {out}".split())
    ssm, attention, ratio = json.loads(out.read_text())["rows"]
    assert ratio["GFLOP"] == pytest.approx(ssm["GFLOP"] / attention["GFLOP"])


def test_an_autoencoder_is_trained_in_all_phases(bench, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 12, 64, 64, 3)).astype(np.uint8)
    np.savez(tmp_path / "data.npz", **dict(zip(("x_train", "x_validation", "x_test"), images, strict=True)))
    sizes = '{"latent_dim": 4, "widths": [8, 8], "blocks": [1, 1], "d_time": 16}'
    options = f"cifar10 --data {tmp_path}/data.npz:1 --out {tmp_path}/model --masks 4 --scale 0.016".split()
    options += ["--set", sizes, "--flow", '{"width": 16, "depth": 1}', "--seconds", *["0.01"] * 4]
    bench("autoencoder").main(options)
    model, flow = (models.load_model(tmp_path / name) for name in ("model", "model-latent"))
    assert model.shortcut and all(x.isfinite().all() for x in model.state_dict().values())
    drawn = model.denormalise(samplers.sample_latents(flow, 2, steps=2))
    assert model.decode(grid_coords(32, 32).expand(2, -1, -1), drawn).isfinite().all()
    painted = bench("frechet").Painter(model, torch.device("cpu")).sampled(drawn, 2, torch.Generator())
    assert painted.shape == (2, 32, 32, 3) and np.isfinite(painted).all()


def test_a_flagship_is_trained_phase_by_phase_and_a_unet_beside_it(bench, tmp_path):
    options, sizes = "--data photos:1 --masks 4 --scale 0.016".split(), '{"widths": [8, 8], "blocks": [1, 1]}'
    first, again, out = map(tmp_path.joinpath, ("first", "again", "out.json"))
    flagship = ["field-cifar10", *options, "--out", str(first), "--seconds", "0.01"]
    bench("flagship").main([*flagship, "0.01", "--set", sizes])
    going_on = [*flagship, "0", "--init", str(first), "--out", str(again)]
    bench("flagship").main(going_on)
    assert models.load_model(first).shortcut and not models.load_model(again).shortcut  # of phase 2
    for wrong in ([*going_on, "--set", sizes], ["field-photos", "--data", "no.npz", *going_on[3:]]):
        pytest.raises(SystemExit, bench("flagship").main, wrong)  # before data are read
    options += ["--seconds", "0.01", "--images", "2", "--out", str(out), "--beside", str(first)]
    bench("unet").main([*options, "--set", '{"widths": [8, 16], "blocks": 1}'])
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 4 and all(20 < row["psnr"] < 30 for row in rows)


def test_every_command_of_the_whole_is_understood(repository, bench, tmp_path):
    environment = dict(PYTHON=sys.executable, DEVICE="cpu", DRY="1", OUT=str(tmp_path), PRESET="full")
    command = ["bash", repository / "benchmarks" / "reproduce.sh"]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
    lines = [shlex.split(line)[1:] for line in done.stdout.splitlines()]
    trained = []
    for program, *arguments in lines:
        if program == "-m":
            options = command_line.parser().parse_args(arguments[1:])
            trained += [options.model] if arguments[1] == "train" else []
        else:
            assert (repository / program).is_file()
    assert trained == ["localmamba"] and len(lines) > 18
    shipped = {path.name.removesuffix("-latent") for path in (repository / "checkpoints").iterdir()}
    named = {Path(word).name for _, *words in lines for word in words}
    assert shipped <= named | {"v1-cifar10", "multidir-cifar10", "v2-cifar10"}
    assert {"v1", "multidir", "v2"} <= {words[0] for file, *words in lines if "footing" in file}
    unknown = subprocess.run([*command, "train-v9"], env=os.environ | environment, capture_output=True)
    assert unknown.returncode == 2


def test_fields_of_the_flagships_recipe_are_area_means_and_start_from_the_spline(bench):
    """Drawn fields, splines and grids against the library's."""
    flagship = bench("flagship")
    image = torch.randint(256, (1, 64, 64, 3), dtype=torch.uint8).numpy()
    torch.manual_seed(0)
    truth, seen, sides = flagship.Images(image, "cpu").draw(1, 64, (48,), (1,))
    turned = [np.rot90(image[0], k) for k in range(4)]
    exact = [
        images.area_resize(np.ascontiguousarray(x[None]), 48)[0] for y in turned for x in (y, y[:, ::-1])
    ]
    drawn = (truth[0, :, :48, :48].permute(1, 2, 0) + 1) * 127.5
    assert min(np.abs(drawn.numpy() - x).max() for x in exact) < 0.6 and sides.tolist() == [48]  # as rounded
    assert truth[0, :, 48:].abs().max() == 0 and seen.shape == (1, 3, 32, 32)

    splines = flagship.Splines(torch.device("cpu"), count=2)
    mask, values, query = torch.tensor([1]), torch.rand(1, 204, 3) * 2 - 1, torch.rand(1, 50, 2)
    wanted = thin_plate_spline(query, splines.grid[splines.masks[mask]], values).clamp(-1, 1)
    torch.testing.assert_close(splines.start(mask, values, query), wanted, rtol=0, atol=2e-3)

    grids = flagship.Grids(torch.tensor([48.0]), 64, torch.ones(1, 4096, dtype=torch.bool))
    nodes = torch.randn(1, 64, 64, 3)
    read = grids.read(nodes).unflatten(1, (64, 64))[:, :48, :48].flatten(1, 2)
    torch.testing.assert_close(
        read, Hats.of(images.grid_coords(48, 48)[None], 64).read(nodes), rtol=0, atol=1e-5
    )


def test_equal_footing_fills_the_seconds_and_reads_the_test_images_once(bench, tmp_path, monkeypatch):
    footing = bench("footing")
    turns = footing.Turns(np.arange(6 * 4 * 3, dtype=np.uint8).reshape(6, 2, 2, 3), observed=1, queries=1)
    turns.length, seen = 4, []
    for epoch in range(3):
        turns.set_epoch(epoch)
        seen += [turns[i]["input_values"][0, 0].item() for i in range(4)]
    assert seen[:6] == seen[6:] and len(set(seen)) == 6  # 12 items: all images, twice
    monkeypatch.setattr(footing, "PART", 2)
    arguments = f"v1 --preset smoke --data photos --seconds 0.4 --images 2 --out {tmp_path}".split()
    footing.main(arguments)
    about = json.loads((tmp_path / "v1.json").read_text())["config"]
    assert about["steps done"] == 2 * max(1, round(400 / about["ms a step"] / 2))
    monkeypatch.setattr(footing, "trained", None)
    footing.main(arguments)  # shows what was written
