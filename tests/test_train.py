"""train.py: schedule, averages, exact resume, processes, accumulation, and the files of a run.

Run as a script, this file trains once: the worker of the tests that need another process.
"""

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas
import pytest
import torch
from huggingface_hub import PyTorchModelHubMixin
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from nfhelpers import evaluate, metrics, models, plots
from nfhelpers.flow import skip_weight
from nfhelpers.images import SparseFields
from nfhelpers.models import LocalMamba2D, LocalMamba2DConfig
from nfhelpers.spectrograms import load_spectrograms
from nfhelpers.train import TrainConfig, cosine_schedule, fit, parameter_groups


class TinyField(nn.Module, PyTorchModelHubMixin):
    """The mean of the observed values and an MLP: the least that learns."""

    gradient_checkpointing = False

    def __init__(self, width: int = 16, dropout: float = 0.0):
        super().__init__()
        self.first = nn.Linear(3 + 2 + 1 + 3, width)
        self.drop = nn.Dropout(dropout)
        self.second = nn.Linear(width, width)
        self.last = nn.Linear(width, 3)
        self.seen = []  # of each training pass: (gradient_checkpointing, query_coords, last layer's weight)

    def forward(self, noisy_values, query_coords, t, input_coords, input_values):
        if self.training:
            self.seen.append((self.gradient_checkpointing, query_coords, self.last.weight.detach().clone()))
        queries = query_coords.shape[1]
        mean = input_values.mean(1, keepdim=True).expand(-1, queries, -1)
        x = torch.cat([noisy_values, query_coords, t[:, None, None].expand(-1, queries, 1), mean], dim=-1)
        x = self.drop(torch.tanh(self.first(x)))
        return self.last(torch.tanh(self.second(x))) + skip_weight(t)[:, None, None] * noisy_values


def tiny(**options):
    torch.manual_seed(3)
    return TinyField(**options)


def gradients(count, seed):
    """Images (count, 8, 8, 3) of linear colour gradients."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(np.linspace(-1, 1, 8), np.linspace(-1, 1, 8)), -1)
    images = 127 + 60 * grid @ rng.uniform(-1, 1, (count, 1, 2, 3)) + rng.uniform(-40, 40, (count, 1, 1, 3))
    return images.clip(0, 255).astype(np.uint8)


def fields():
    return SparseFields(gradients(18, 0), queries=0.5), SparseFields(gradients(5, 1), queries=0.5, seed=0)


def settings(folder, **changes):
    """4 steps an epoch (two items of 18 are left out), 4 epochs."""
    options = dict(epochs=4, batch_size=4, learning_rate=1e-2, warmup_fraction=0.1, ema_decay=0.9)
    return TrainConfig(folder, **(options | dict(cpu=True, progress=False) | changes))


def tiny_grids(**options):
    """A LocalMamba whose parameters all have a gradient: none is zero."""
    torch.manual_seed(3)
    options = dict(num_classes=4, cfg_dropout=0.3, dropout=0.0, mlp_ratio=2.0, d_state=2) | options
    model = LocalMamba2D(LocalMamba2DConfig(dims=(8, 16), depths=(1, 1), mapping_width=8, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    return model


def small(kind):
    """A model of the library; of the autoencoder the second phase."""
    torch.manual_seed(3)
    sizes = dict(nodes=8, widths=(4, 4), blocks=(1, 1), d_time=4, d_state=2)
    if kind == "MambaDiffusion":
        sizes = dict(d_model=16, num_layers=2, d_state=2, num_fourier_features=8, num_heads=2)
    model = getattr(models, kind)(getattr(models, kind + "Config")(**sizes))
    model = models.second_phase(model) if kind == "MambaDiffusionAutoencoder" else model
    with torch.no_grad():  # layers that start at zero keep those before them from learning
        for parameter in (x for x in model.parameters() if not x.any()):
            parameter.normal_(std=0.1)
    return model


def chirps():
    return load_spectrograms("chirps", "train", 8, 18), load_spectrograms("chirps", "validation", 8, 5)


class SlowFields(SparseFields):
    def __getitem__(self, index):
        time.sleep(0.01)
        return super().__getitem__(index)


class DirtyFields(SparseFields):
    """From the second epoch on item 7 holds a NaN in what is to be predicted."""

    def __getitem__(self, index):
        item = super().__getitem__(index)
        item["query_values"][:, 1] *= math.nan if index == 7 and self.epoch > 0 else 1
        return item


class BrokenFields(SparseFields):
    def __getitem__(self, index):
        raise KeyError("broken item")


def steps_saved(folder):
    """Steps of the run that the state in this folder holds; 0 without one."""
    path = Path(folder) / "state.safetensors"
    if not path.exists():
        return 0
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["nfhelpers"])["progress"]["step"]


def assert_same_run(folder, other, tolerance=0.0, weights=None):
    """The same log.csv and state, up to float error; weights: of the state, where Adam magnifies it."""
    ours, theirs = (pandas.read_csv(Path(f) / "log.csv") for f in (folder, other))
    pandas.testing.assert_frame_equal(ours, theirs, rtol=tolerance, atol=tolerance)
    ours, theirs = (load_file(Path(f) / "state.safetensors") for f in (folder, other))
    assert ours.keys() == theirs.keys()
    weights = tolerance if weights is None else weights
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=weights, rtol=weights, equal_nan=True)


def no_figure(*arguments):
    """In place of `plots.training_figure`: drawing is slow and tested elsewhere."""
    return SimpleNamespace(savefig=lambda path: path.touch())


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """The runs of tests draw nothing; `reference`, which is of the module, does."""
    monkeypatch.setattr(plots, "training_figure", no_figure)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """One uninterrupted run: (folder, result, model)."""
    folder, model = tmp_path_factory.mktemp("reference"), tiny()
    return folder, fit(model, fields(), settings(folder), about={"data": "gradients"}), model


@pytest.fixture(scope="module")
def grid_reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grids")
    return folder, fit(tiny_grids(), chirps(), settings(folder))


# ---------------------------------------------------------------------------------- schedule and averages


def test_schedule_is_a_ramp_and_half_a_cosine(reference):
    factors = [cosine_schedule(step, 110, 10) for step in range(112)]
    assert factors[:10] == pytest.approx([0.1 * k for k in range(1, 11)])
    assert (factors[10], factors[110], factors[111]) == (1, 0, 0)
    assert factors[35] == pytest.approx(0.5 + math.sqrt(0.5) / 2) and factors[60] == pytest.approx(0.5)
    expected = [1e-2 * cosine_schedule(step, 16, 2) for step in range(16)]
    assert reference[1].history["learning_rate"] == pytest.approx(expected)


def test_average_follows_its_recursion_and_is_what_is_saved(reference):
    """EMA: a <- d a + (1 - d) w after step k = 0, 1, ..., d = min(0.9, (1 + k) / (10 + k))."""
    folder, result, model = reference
    state = load_file(folder / "state.safetensors")
    average, *weights = [weight for _, _, weight in model.seen]  # before each step
    for k, weight in enumerate([*weights, state["model.last.weight"]]):
        decay = min(0.9, (1 + k) / (10 + k))
        average = decay * average + (1 - decay) * weight
    torch.testing.assert_close(model.last.weight.detach(), average)
    torch.testing.assert_close(state["ema.last.weight"], average)
    torch.testing.assert_close(TinyField.from_pretrained(result.latest).last.weight.detach(), average)
    assert not torch.allclose(state["model.last.weight"], average, atol=1e-4)


def test_matrices_decay_and_the_mapping_network_learns_at_a_third():
    model = tiny_grids()
    found = {
        id(p): (group["weight_decay"], group["lr_scale"])
        for group in parameter_groups(model, 0.1)
        for p in group["params"]
    }
    for name, parameter in model.named_parameters():
        plain = parameter.ndim < 2 or name.endswith(("A_log", "dt_bias", "mixer.D"))
        mapping = name.startswith("mapping.") or "norm.head." in name
        assert found[id(parameter)] == (0 if plain else 0.1, 1 / 3 if mapping else 1), name


# ---------------------------------------------------------------------------------- one run, its files


def test_history_log_and_folders_agree(reference):
    folder, result, model = reference
    history = result.history
    assert (result.steps, result.interrupted) == (16, False) and result.model is model and not model.training
    assert history["step"] == list(range(1, 17)) and history["val_step"] == [8, 16]
    assert history["epoch"] == [1 + k // 4 for k in range(16)]
    log = pandas.read_csv(folder / "log.csv", float_precision="round_trip")
    assert log.loss.tolist() == history["loss"] and log.step.tolist() == history["step"]
    assert log.val_psnr.dropna().tolist() == history["val_psnr"]
    assert min(history["val_loss"]) == history["val_loss"][-1]
    for path in (result.best, result.latest):
        torch.testing.assert_close(TinyField.from_pretrained(path).last.weight, model.last.weight)
    cards = {(path / "README.md").read_text() for path in (folder, result.latest)}
    assert len(cards) == 1 and "gradients" in cards.pop()
    assert (folder / "training.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_written_is_a_pickle(reference):
    folder = reference[0]
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != "tb"]
    assert len(list((folder / "tb").iterdir())) == 1
    assert {path.suffix for path in files} == {".safetensors", ".json", ".csv", ".png", ".md", ".lock"}


def test_fields_and_psnr_are_those_of_evaluate(tmp_path):
    data, model, seen = fields(), tiny(), []
    config = settings(tmp_path, epochs=2)
    fit(model, data, config, callback=lambda *arguments: seen.append(arguments))
    assert [(epoch, made is None) for epoch, _, made in seen] == [(1, True), (2, False)]
    made = seen[1][2]
    observed = evaluate.observe(data[1].images, 0.2, seed=0)
    expected = evaluate.reconstruct(model, observed, seed=config.seed)
    np.testing.assert_allclose(made["reconstruction"], expected, atol=1e-6)
    np.testing.assert_array_equal(made["sparse"][observed.mask], made["target"][observed.mask])
    assert seen[1][1]["val_psnr"] == pytest.approx([metrics.psnr(expected, observed.images).mean()], abs=1e-4)


def test_queries_vary_by_step_in_canonical_order(reference, tmp_path):
    counts = [coords.shape[1] for _, coords, _ in reference[2].seen]
    assert counts[:2] == [32, 32] and set(counts) == {8, 16, 24, 32}  # from a quarter to all
    for _, coords, _ in reference[2].seen:
        order = (coords[..., 1] * 8).floor() * 8 + (coords[..., 0] * 8).floor()
        assert (order.diff(dim=1) > 0).all()
    model = tiny()
    fit(model, fields(), settings(tmp_path, epochs=1, vary_queries=False))
    assert {coords.shape[1] for _, coords, _ in model.seen} == {32}


def test_frozen_parameters_stay(tmp_path):
    def frozen():
        model = tiny()
        model.first.requires_grad_(False)
        return model

    before = {name: x.clone() for name, x in frozen().state_dict().items()}
    model = fit(frozen(), fields(), settings(tmp_path, epochs=2)).model
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == name.startswith("first."), name
    again = fit(frozen(), fields(), settings(tmp_path, epochs=2)).model  # resumed
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in again.state_dict().items())


def test_a_model_may_say_at_which_times_the_loss_is_taken(tmp_path):
    model, times = tiny(), []
    model.loss_times, model.loss_weight = torch.zeros_like, lambda t: 0 * t
    model.register_forward_pre_hook(lambda module, inputs: times.append(inputs[2]))
    history = fit(model, fields(), settings(tmp_path, epochs=2)).history
    assert all(not t.any() for t in times) and not any(history["loss"] + history["val_loss"])


def test_data_without_images_or_validation(tmp_path):
    train_data, validation = fields()
    items = [validation[i] for i in range(len(validation))]
    history = fit(tiny(), (train_data, items), settings(tmp_path / "a", epochs=1)).history
    assert math.isnan(history["val_psnr"][0]) and math.isfinite(history["val_loss"][0])
    result = fit(tiny(), train_data, settings(tmp_path / "b", epochs=1))
    assert (result.steps, result.best, result.history["val_loss"]) == (4, None, [])


# ------------------------------------------------------------------------- slices, processes, precision


def test_accumulation_equals_a_whole_batch(reference, tmp_path):
    model = tiny()
    fit(model, fields(), settings(tmp_path, gradient_accumulation=4))
    assert len(model.seen) == 4 * 16
    assert_same_run(tmp_path, reference[0], 1e-5)


def test_two_processes_equal_one(reference, grid_reference, tmp_path):
    assert worker(tmp_path, "fields", "grids", launch=TWO_PROCESSES).wait(timeout=120) == 0
    assert {path.name for path in tmp_path.glob("*of*")} == {"0of2", "1of2"}
    assert_same_run(tmp_path / "fields", reference[0], 1e-5)
    assert_same_run(tmp_path / "grids", grid_reference[0], 1e-5, 1e-3)


def test_bf16_and_gradient_checkpointing(reference, tmp_path):
    model = tiny()
    changes = dict(epochs=1, precision="bf16", gradient_checkpointing=True)
    loss = fit(model, fields(), settings(tmp_path, **changes)).history["loss"][0]
    assert {flag for flag, _, _ in model.seen} == {True}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    expected = reference[1].history["loss"][0]
    assert loss == pytest.approx(expected, rel=0.02) and loss != expected
    # Accelerate remembers its first precision; the next run must not.
    assert fit(tiny(), fields(), settings(tmp_path / "next", epochs=1)).history["loss"][0] == expected


def test_compile_is_used_for_training_and_not_for_saving(tmp_path, monkeypatch):
    compiled = []

    def compile(module, dynamic):
        compiled.append(wrapper := nn.Sequential(module))
        wrapper.forward = module.forward
        return wrapper

    monkeypatch.setattr(torch, "compile", compile)
    fit(tiny(), fields(), settings(tmp_path, epochs=1, compile=True))
    assert len(compiled) == 1
    assert set(load_file(tmp_path / "latest" / "model.safetensors")) == set(tiny().state_dict())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", [None, "MambaDiffusion", "MambaField", "MambaDiffusionAutoencoder"])
def test_cuda_graphs_give_the_same_run(kind, precision, tmp_path):
    data, make = (fields, lambda: small(kind)) if kind else (chirps, tiny_grids)
    losses = []
    for graphs in (False, True):
        options = dict(cpu=False, cuda_graphs=graphs, precision=precision, compile=kind == "MambaDiffusion")
        losses.append(fit(make(), data(), settings(tmp_path / str(graphs), **options)).history["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=2e-3 if precision == "fp32" else 5e-3)


def test_workers_give_the_same_run(reference, tmp_path):
    fit(tiny(), fields(), settings(tmp_path, num_workers=2))
    assert_same_run(tmp_path, reference[0])


# ------------------------------------------------------------------------------------ stop and resume


def start_python(*arguments):
    """Another Python with this library, one thread and no GPU."""
    path = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(Path(__file__).parents[1])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen([sys.executable, *map(str, arguments)], env=environment)


# `accelerate launch --cpu` starts several processes through MPI only; --multi_gpu is torchrun.
TWO_PROCESSES = (
    "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no "
    "--main_process_port 0 --dynamo_backend no"
).split()


def worker(folder, *options, launch=()):
    """This file as a script, training the reference's run into `folder`."""
    return start_python(*launch, __file__, folder, *options)


def stop(epoch, history, made):
    raise KeyboardInterrupt


def test_an_interrupted_run_goes_on_to_the_same_curve(reference, tmp_path):
    first = fit(tiny(), fields(), settings(tmp_path), callback=stop)
    assert (first.interrupted, first.steps, first.best) == (True, 4, None)
    final = fit(tiny(), fields(), settings(tmp_path))
    assert not final.interrupted and final.history == reference[1].history
    assert_same_run(tmp_path, reference[0])


def test_a_finished_run_stays_and_can_be_trained_longer(reference, tmp_path, capsys):
    folder, result, model = reference
    before = {path: path.read_bytes() for path in folder.glob("*.*")}
    again = fit(tiny(), fields(), settings(folder))
    assert again.history == result.history and torch.equal(again.model.last.weight, model.last.weight)
    assert {path: path.read_bytes() for path in folder.glob("*.*")} == before
    assert "nothing to do" in capsys.readouterr().out
    fit(tiny(), fields(), settings(tmp_path, epochs=2))
    longer = fit(tiny(), fields(), settings(tmp_path, epochs=3))
    assert longer.steps == 12 and longer.history["val_step"] == [8, 12]
    rates = [1e-2 * cosine_schedule(k, 8 if k < 8 else 12, 1) for k in range(12)]
    assert longer.history["learning_rate"] == pytest.approx(rates)


def test_state_of_another_run_is_refused(tmp_path):
    fit(tiny(), fields(), settings(tmp_path), callback=stop)
    before = (tmp_path / "state.safetensors").read_bytes()
    other = SparseFields(gradients(18, 5), queries=0.5), fields()[1]
    for data, changes in ((fields(), {"learning_rate": 0.02}), (other, {}), (fields(), {"seed": 1})):
        with pytest.raises(ValueError):
            fit(tiny(), data, settings(tmp_path, **changes))
    with pytest.raises(RuntimeError):
        fit(tiny(width=8), fields(), settings(tmp_path))
    assert (tmp_path / "state.safetensors").read_bytes() == before
    assert fit(tiny(), fields(), settings(tmp_path, gradient_checkpointing=True, num_workers=1)).steps == 16


@pytest.mark.parametrize("changes", [{"gradient_accumulation": 3}, {"batch_size": 32}, {"precision": "fp8x"}])
def test_settings_that_do_not_fit_are_refused(changes, tmp_path):
    with pytest.raises(ValueError):
        fit(tiny(), fields(), settings(tmp_path / "run", **changes))
    with pytest.raises(TypeError):
        TrainConfig(tmp_path, learning_rat=1e-4)


# ------------------------------------------------------------------------------------ what is not finite


def test_loss_that_is_not_finite_stops_with_its_step(tmp_path):
    data = DirtyFields(gradients(18, 0), queries=0.5), fields()[1]
    with pytest.raises(FloatingPointError) as caught:
        fit(tiny(), data, settings(tmp_path, save_interval=0.0))
    assert f"step {steps_saved(tmp_path) + 1}:" in str(caught.value) and 4 <= steps_saved(tmp_path) < 8
    assert all(torch.isfinite(x).all() for x in load_file(tmp_path / "state.safetensors").values())


def test_infinite_gradient_of_a_finite_loss_stops(tmp_path):
    class Root(TinyField):
        def forward(self, noisy_values, *field):
            root = (0 * self.last.bias).abs().sqrt()  # its slope at 0 is infinite
            return super().forward(noisy_values, *field) + root

    with pytest.raises(FloatingPointError, match="step 1:"):
        fit(Root(), fields(), settings(tmp_path))
    assert not (tmp_path / "state.safetensors").exists()


def test_observed_values_that_are_not_finite_are_refused(tmp_path):
    train_data, validation = fields()
    items = [train_data[i] for i in range(8)]
    items[5]["input_values"][0] = math.nan
    with pytest.raises(ValueError):
        fit(tiny(), (items, validation), settings(tmp_path))


# --------------------------------------------------------------------------------------------- grids


def test_grids_are_trained_resumed_and_accumulated(grid_reference, tmp_path):
    folder, result = grid_reference
    assert np.isnan(result.history["val_psnr"]).all()
    assert result.history["val_loss"][-1] < result.history["val_loss"][0]
    assert LocalMamba2D.from_pretrained(result.best).config == tiny_grids().config
    assert fit(tiny_grids(), chirps(), settings(tmp_path / "a"), callback=stop).steps == 4
    fit(tiny_grids(), chirps(), settings(tmp_path / "a"))
    assert_same_run(tmp_path / "a", folder)
    fit(tiny_grids(), chirps(), settings(tmp_path / "b", gradient_accumulation=4))
    assert_same_run(tmp_path / "b", folder, 1e-5, 1e-3)


def test_conditions_are_dropped_in_training_and_not_in_validation(tmp_path):
    model, dropped, whole = tiny_grids(), [], []

    def watch(module, given):
        (dropped if module.training else whole).append(given[4])

    model.register_forward_pre_hook(watch)
    fit(model, chirps(), settings(tmp_path, epochs=25, batch_size=18, evaluate_every=25))
    assert torch.cat(dropped).float().mean().item() == pytest.approx(0.3, abs=0.07)  # standard error 0.022
    assert len({tuple(drop.tolist()) for drop in dropped}) > 20  # another draw each step
    assert whole and all(drop is None for drop in whole)


if __name__ == "__main__":
    torch.set_num_threads(1)
    plots.training_figure = no_figure
    folder, options = Path(sys.argv[1]), sys.argv[2:]
    (folder / "{RANK}of{WORLD_SIZE}".format_map({"RANK": 0, "WORLD_SIZE": 1, **os.environ})).touch()
    data, workers = fields(), 2 if "workers" in options else 0
    data[0].__class__ = {"slow": SlowFields, "broken": BrokenFields}.get(options[0], SparseFields)
    config = replace(settings(folder / "fields" if "fields" in options else folder), num_workers=workers)
    fit(tiny(), data, replace(config, save_interval=0.0) if "slow" in options else config)
    if "grids" in options:
        fit(tiny_grids(), chirps(), settings(folder / "grids"))
