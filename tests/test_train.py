"""train.py: schedule, averaging, exact resume, processes, accumulation, guards and files of the loop.

Run as a script, this file trains once: the worker of the tests that need another process.
"""

import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import PyTorchModelHubMixin
from matplotlib.figure import Figure
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import get_worker_info

from nfhelpers import evaluate, metrics, plots, samplers, train
from nfhelpers.__main__ import main, trainable
from nfhelpers.flow import skip_weight
from nfhelpers.images import SparseFields, grid_coords, to_image, to_model
from nfhelpers.models import LocalMamba2D, LocalMamba2DConfig
from nfhelpers.models.local_mamba import mapping_parameters
from nfhelpers.spectrograms import load_spectrograms
from nfhelpers.train import TrainConfig, cosine_schedule, fit


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
        time = t[:, None, None].expand(-1, queries, 1)
        mean = input_values.mean(1, keepdim=True).expand(-1, queries, -1)
        x = torch.cat([noisy_values, query_coords, time, mean], dim=-1)
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
    """4 steps an epoch (two items of 18 are left out), 6 epochs."""
    options = dict(
        epochs=6, batch_size=4, learning_rate=1e-2, warmup_fraction=0.1, ema_decay=0.9, evaluate_every=2,
        visualise_every=6, save_every=3, save_every_steps=3, field_images=3, cpu=True, progress=False,
    )  # fmt: skip
    return TrainConfig(output_dir=folder, **{**options, **changes})


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


def chirps():
    return load_spectrograms("chirps", "train", 8, 18), load_spectrograms("chirps", "test", 8, 5)


class SlowFields(SparseFields):
    def __getitem__(self, index):
        time.sleep(0.01)
        return super().__getitem__(index)


class BrokenFields(SparseFields):
    def __getitem__(self, index):
        if index == 5 and get_worker_info() is not None:
            raise KeyError("broken item")
        return super().__getitem__(index)


def rows(folder):
    with open(Path(folder) / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def assert_same_run(folder, other, tolerance=0.0, weights=None):
    """The same rows in log.csv and the same state, up to float error.

    weights: tolerance of the state, if another: Adam magnifies the float error of small gradients.
    """
    weights = tolerance if weights is None else weights
    ours, theirs = rows(folder), rows(other)
    assert len(ours) == len(theirs)
    for row, expected in zip(ours, theirs, strict=True):
        for name, cell in expected.items():
            if cell:
                expected_value = pytest.approx(float(cell), rel=tolerance, abs=tolerance, nan_ok=True)
                assert float(row[name]) == expected_value, (name, row)
            else:
                assert not row[name]
    ours, theirs = (load_file(Path(f) / "state.safetensors") for f in (folder, other))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=weights, rtol=weights)


@pytest.fixture(autouse=True)
def blank_figures(monkeypatch):
    """Drawing is slow and tested elsewhere; the reference run, made before this, draws in earnest."""
    monkeypatch.setattr(plots, "training_figure", lambda history, fields, title: Figure((1, 1)))


@pytest.fixture(scope="module")
def grid_reference(tmp_path_factory):
    """One uninterrupted run on grids: (folder, result)."""
    folder = tmp_path_factory.mktemp("grids")
    return folder, fit(tiny_grids(), chirps(), settings(folder))


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """One uninterrupted run: (folder, result, model)."""
    folder = tmp_path_factory.mktemp("reference")
    model = tiny()
    return folder, fit(model, fields(), settings(folder)), model


# --------------------------------------------------------------------------------------- closed forms


def test_schedule_is_a_ramp_and_half_a_cosine():
    factors = [cosine_schedule(step, 110, 10) for step in range(110)]
    assert factors[:10] == pytest.approx([0.1 * k for k in range(1, 11)])
    assert factors[10] == 1
    assert factors[60] == pytest.approx(0.5)
    assert factors[35] == pytest.approx(0.5 + math.sqrt(0.5) / 2)
    assert 0 < factors[109] < 1e-3
    assert cosine_schedule(0, 1, 0) == 1


def test_schedule_is_zero_from_the_last_step_on():
    assert [cosine_schedule(step, 10, 10) for step in (8, 9, 10, 11)] == [0.9, 1, 0, 0]
    assert [cosine_schedule(step, 10, 2) for step in (10, 11, 18)] == [0, 0, 0]


def test_learning_rate_of_each_step_follows_the_schedule(reference):
    _, result, _ = reference
    expected = [1e-2 * cosine_schedule(step, 24, 2) for step in range(24)]
    assert result.history["learning_rate"] == pytest.approx(expected)


def test_average_follows_its_recursion_and_is_what_is_saved(reference):
    """EMA: a <- d a + (1 - d) w after each step, d = min(0.9, (1 + k) / (10 + k)) at step k, 0 at k = 0."""
    folder, _, model = reference
    weights = [weight for _, _, weight in model.seen]  # before steps 1 ... 24
    state = load_file(folder / "state.safetensors")
    weights = [*weights[1:], state["model.last.weight"]]  # after steps 1 ... 24
    average = weights[0]
    for k, weight in enumerate(weights):
        decay = min(0.9, (1 + k) / (10 + k)) if k else 0.0
        average = decay * average + (1 - decay) * weight
    torch.testing.assert_close(model.last.weight.detach(), average)
    torch.testing.assert_close(state["ema.last.weight"], average)
    torch.testing.assert_close(TinyField.from_pretrained(folder / "latest").last.weight.detach(), average)
    assert not torch.allclose(state["model.last.weight"], average, atol=1e-4)


def test_weight_decay_touches_matrices_only():
    model = tiny()
    model.second.weight._no_weight_decay = True
    decayed, others = train._parameter_groups(model, 0.1)
    assert [id(p) for p in decayed["params"]] == [id(model.first.weight), id(model.last.weight)]
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert len(others["params"]) == 4


# ---------------------------------------------------------------------------------- one run, its files


def test_loss_falls_when_overfitting_one_image(tmp_path):
    fixed = SparseFields(gradients(1, 0).repeat(64, 0), queries=0.5, seed=0)
    config = settings(tmp_path, epochs=10, learning_rate=2e-2, save_every_steps=None)
    history = fit(tiny(width=64), (fixed, fixed), config).history
    assert np.mean(history["loss"][-20:]) < 0.6 * np.mean(history["loss"][:8])
    assert history["val_loss"][-1] < 0.75 * history["val_loss"][0]
    assert history["val_psnr"][-1] > history["val_psnr"][0] + 1


def test_history_log_and_folders_agree(reference):
    folder, result, model = reference
    history = result.history
    assert (result.steps, result.interrupted) == (24, False)
    assert (result.best, result.latest) == (folder / "best", folder / "latest")
    assert history["step"] == list(range(1, 25)) and history["val_step"] == [8, 16, 24]
    steps = [row for row in rows(folder) if row["loss"]]
    assert [float(row["loss"]) for row in steps] == history["loss"]
    assert [int(row["epoch"]) for row in steps] == [1 + k // 4 for k in range(24)]
    evaluations = [row for row in rows(folder) if row["val_loss"]]
    assert [float(row["val_psnr"]) for row in evaluations] == history["val_psnr"]
    assert all((folder / f"epoch_{n:04d}" / "model.safetensors").is_file() for n in (3, 6))
    assert (folder / "fields" / "epoch_0006.png").read_bytes().startswith(b"\x89PNG")
    assert not model.training and model.gradient_checkpointing is False
    assert "forward" not in vars(model)  # Accelerate's wrapper is gone, or never was here


def test_nothing_written_is_a_pickle(reference):
    folder, _, _ = reference
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    board = {name for name in names if name.startswith("tb/events.out.tfevents")}
    kinds = {Path(name).suffix for name in names - board}
    assert len(board) == 1 and kinds == {".safetensors", ".json", ".csv", ".png", ".md", ".lock"}
    for name in names - board:  # neither raw pickles (protocol 2 and later) nor torch.save archives
        content = (folder / name).read_bytes()
        # safetensors: the length of its header, whose first byte may be any, then the header, JSON
        header = name.endswith(".safetensors") and content[8:9] == b"{"
        assert header or not content.startswith((b"\x80", b"PK")), name


def test_validation_is_repeatable_and_best_is_the_lowest(reference, tmp_path):
    """Each evaluation uses the same times and noise, so that a model that does not change scores the same."""
    model = tiny()
    frozen = fit(model, fields(), settings(tmp_path, learning_rate=1e-30))
    assert len(set(frozen.history["val_loss"])) == 1 and len(set(frozen.history["val_psnr"])) == 1
    _, result, _ = reference
    assert min(result.history["val_loss"]) == result.history["val_loss"][-1] < frozen.history["val_loss"][0]


def test_fields_are_the_posterior_mean_of_the_first_validation_images(reference, tmp_path):
    _, validation = fields()
    seen = []
    fit(tiny(), fields(), settings(tmp_path, epochs=2), callback=lambda *arguments: seen.append(arguments))
    assert [(epoch, field is None) for epoch, _, field in seen] == [(1, True), (2, False)]
    field = seen[1][2]
    assert {name: array.shape for name, array in field.items()} == dict.fromkeys(field, (3, 8, 8, 3))
    np.testing.assert_allclose(field["target"], validation.images[:3] / 255, atol=1e-6)
    observed = (field["sparse"] != 0.75).all(-1)
    assert observed.reshape(3, -1).sum(1).tolist() == [validation.num_inputs] * 3
    np.testing.assert_array_equal(field["sparse"][observed], field["target"][observed])
    np.testing.assert_array_equal(field["reconstruction"][observed], field["target"][observed])
    error = ((field["reconstruction"] - field["target"]) ** 2).mean((1, 2, 3))
    assert seen[1][1]["val_psnr"][-1] == pytest.approx(np.mean(-10 * np.log10(error)), abs=1e-4)


def test_val_psnr_is_that_of_evaluate(tmp_path):
    """The same fields and noise, though training derives the observed pixels from the dataset's items."""
    data, config = fields(), settings(tmp_path, epochs=1, field_images=5)
    model = tiny()
    result = fit(model, data, config)
    fields_there = evaluate.observe_images(data[1].images, 0.2, seed=0)
    there = evaluate.reconstruct(model, fields_there, seed=train._seed(config.seed, train._FIELDS))
    expected = metrics.psnr(there["fields"], there["images"]).mean()
    assert result.history["val_psnr"] == [pytest.approx(expected, abs=1e-4)]


def test_val_psnr_with_all_pixels_observed_keeps_none(tmp_path):
    """An autoencoder of whole images: a field of kept pixels would be the target, at infinite PSNR."""
    data = SparseFields(gradients(16, 0), 1.0, 0.5), SparseFields(gradients(5, 1), 1.0, 0.5, seed=0)
    config, model, shown = settings(tmp_path, epochs=1), tiny(), []
    history = fit(model, data, config, callback=lambda *arguments: shown.append(arguments[2])).history
    pixels = grid_coords(8, 8).expand(3, -1, -1)
    target = torch.from_numpy(data[1].images[:3]).reshape(3, 64, 3)
    generator = torch.Generator().manual_seed(train._seed(config.seed, train._FIELDS))
    mean, _ = samplers.posterior_mean(model, pixels, pixels, to_model(target), generator=generator)
    expected = metrics.psnr(to_image(mean).reshape(3, 8, 8, 3).numpy(), shown[0]["target"]).mean()
    assert history["val_psnr"] == [pytest.approx(expected, abs=1e-4)] and expected < 30
    np.testing.assert_array_equal(shown[0]["sparse"], shown[0]["target"])


def test_global_random_state_is_left_alone(tmp_path):
    model = tiny(dropout=0.5)
    before = torch.get_rng_state()
    fit(model, fields(), settings(tmp_path, epochs=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_queries_vary_by_step_in_canonical_order(reference, tmp_path):
    _, result, model = reference
    counts = [coords.shape[1] for _, coords, _ in model.seen]
    assert [int(row["queries"]) for row in rows(reference[0]) if row["queries"]] == counts
    assert set(counts) == {8, 16, 24, 32}  # from a quarter to all
    for _, coords, _ in model.seen:
        order = (coords[..., 1] * 8).floor() * 8 + (coords[..., 0] * 8).floor()
        assert (order.diff(dim=1) > 0).all()
    model = tiny()
    fit(model, fields(), settings(tmp_path, epochs=1, vary_queries=False))
    assert {coords.shape[1] for _, coords, _ in model.seen} == {32}


def test_frozen_parameters_stay_and_are_neither_optimised_nor_averaged(tmp_path):
    model = tiny()
    model.first.requires_grad_(False)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    config = settings(tmp_path, epochs=2)
    fit(model, fields(), config)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == name.startswith("first."), name
    names = set(load_file(tmp_path / "state.safetensors"))
    parts = {name for name in before if not name.startswith("first.")}
    assert {name.removeprefix("ema.") for name in names if name.startswith("ema.")} == parts
    assert not any(name.startswith("optimizer.first.") for name in names)
    again = tiny()
    again.first.requires_grad_(False)
    assert fit(again, fields(), config).steps == 8  # resumed
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in again.state_dict().items())


class AtTimeZero(TinyField):
    """Trained at t = 0 only, weighed by 2."""

    def loss_times(self, t):
        return torch.zeros_like(t)

    def loss_weight(self, t):
        return 2 * torch.ones_like(t)


def test_a_model_may_say_at_which_times_the_loss_is_taken(tmp_path):
    torch.manual_seed(3)
    model, times = AtTimeZero(), []
    model.register_forward_pre_hook(lambda module, inputs: times.append(inputs[2]))
    batch = {key: torch.stack([item[key] for item in fields()[1]]) for key in train.ITEM_KEYS}
    t, noise = torch.rand(5), torch.randn(batch["query_values"].shape)
    loss = train._Objective(model)(batch, t, noise)
    velocity = model(noise, batch["query_coords"], torch.zeros(5), *(batch[k] for k in train.ITEM_KEYS[:2]))
    expected = 2 * (velocity - (batch["query_values"] - noise)).square().mean()
    torch.testing.assert_close(loss, expected)
    fit(model, fields(), settings(tmp_path, epochs=2))  # validation and reconstruction too
    assert all(not t.any() for t in times)


# ------------------------------------------------------------------------- slices, processes, precision


def test_accumulation_equals_a_whole_batch(reference, tmp_path):
    model = tiny()
    fit(model, fields(), settings(tmp_path, gradient_accumulation=4))
    assert len(model.seen) == 4 * 24
    assert_same_run(tmp_path, reference[0], 1e-5)


@pytest.mark.parametrize(("name", "options"), [("reference", []), ("grid_reference", ["grids"])])
def test_two_processes_equal_one(name, options, request, tmp_path):
    process = worker(tmp_path, *options, launch=TWO_PROCESSES)
    assert process.wait(timeout=120) == 0
    assert {path.name for path in tmp_path.glob("process*")} == {"process0of2", "process1of2"}
    assert_same_run(tmp_path, request.getfixturevalue(name)[0], 1e-6, 1e-3 if "grids" in options else None)


def test_bf16_and_gradient_checkpointing_leave_the_model_as_it_was(reference, tmp_path):
    model = tiny()
    result = fit(model, fields(), settings(tmp_path, epochs=2, precision="bf16", gradient_checkpointing=True))
    assert {flag for flag, _, _ in model.seen} == {True} and model.gradient_checkpointing is False
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    expected = reference[1].history["loss"][:4]  # before the two schedules part
    assert result.history["loss"][:1] == pytest.approx(expected[:1], rel=0.02)
    assert result.history["loss"][:1] != expected[:1]
    # Accelerate remembers its first precision; the next run must not.
    fit(tiny(), fields(), settings(tmp_path / "next", epochs=1))


def test_compile_is_used_for_training_and_not_for_saving(tmp_path, monkeypatch):
    compiled = []

    class Compiled(nn.Module):
        def __init__(self, module, dynamic):
            super().__init__()
            self._orig_mod = module
            assert dynamic is False

        def forward(self, *arguments):
            compiled.append(self.training)
            return self._orig_mod(*arguments)

    monkeypatch.setattr(torch, "compile", Compiled)
    fit(tiny(), fields(), settings(tmp_path, epochs=1, compile=True))
    assert len(compiled) == 4
    assert set(load_file(tmp_path / "latest" / "model.safetensors")) == set(tiny().state_dict())


SOLVING = ("field", "diffae_phase1")  # linear systems, for which torch waits for the device


class Recorded:
    """Stands in for a CUDA graph: does again what it was captured doing, on its own tensors."""

    def __init__(self, run, batch, draws, parts):
        self.own = tuple({name: x.clone() for name, x in given.items()} for given in (batch, draws))
        self.call = lambda: train._add_gradient(run, *self.own, parts)
        self.loss = torch.zeros(())
        self.parameters = list(run.model.parameters())
        self.gradients = [torch.zeros_like(p) for p in self.parameters]

    def replay(self):
        so_far = [p.grad for p in self.parameters]
        for p in self.parameters:
            p.grad = None
        self.loss.copy_(self.call())
        for p, own, before in zip(self.parameters, self.gradients, so_far, strict=True):
            own.copy_(p.grad)
            p.grad = before


@pytest.fixture
def recorded(monkeypatch):
    """CUDA graphs by `Recorded`, on a CPU; the list of those that were captured."""
    captured = []

    def capture(*arguments):
        captured.append(Recorded(*arguments))
        return captured[-1], captured[-1].own, captured[-1].loss, captured[-1].gradients

    monkeypatch.setattr(
        train, "_graphs", lambda config, _: train._Graphs({}, None) if config.cuda_graphs else None
    )
    monkeypatch.setattr(train, "_capture", capture)
    return captured


@pytest.mark.parametrize("changes", [{}, {"gradient_accumulation": 2}, {"vary_queries": False}])
def test_steps_by_graph_are_the_steps(changes, recorded, tmp_path):
    """Every shape once as it is, then by its graph, with what this step has drawn."""
    for graphs in (False, True):
        config = settings(tmp_path / str(graphs), cuda_graphs=graphs, **changes)
        fit(tiny(dropout=0.3), fields(), config)
    assert len(recorded) == (1 if "vary_queries" in changes else train.QUERY_COUNTS)
    assert_same_run(tmp_path / "True", tmp_path / "False", 1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize(
    ("name", "parts"), [*((name, 1) for name in trainable() if name != "diffae_phase2"), ("v1", 2)]
)
def test_cuda_graphs_give_the_same_run(name, parts, tmp_path, monkeypatch):
    captures, capture = [], train._capture
    monkeypatch.setattr(train, "_capture", lambda *arguments: captures.append(1) or capture(*arguments))
    losses = {}
    for graphs in ("false", "true"):
        folder = tmp_path / graphs
        options = ["--preset", "smoke", "--output", str(folder), "--set", "train.epochs=4"]
        options += ["--set", f"train.gradient_accumulation={parts}"]
        command = ["train", name, *options, "--set", f"train.cuda_graphs={graphs}"]
        if name in SOLVING and graphs == "true":
            with pytest.raises(RuntimeError, match="a CUDA graph cannot hold.*pass cuda_graphs=False"):
                main(command)
            return
        assert main(command) == 0
        assert bool(captures) == (graphs == "true")
        losses[graphs] = [float(row["loss"]) for row in rows(folder) if row["loss"]]
    assert losses["true"] == pytest.approx(losses["false"], rel=2e-3)


def test_cuda_graphs_are_without_effect_on_a_cpu(reference, tmp_path):
    fit(tiny(), fields(), settings(tmp_path, cuda_graphs=True))
    assert_same_run(tmp_path, reference[0])


def test_workers_give_the_same_run(reference, tmp_path):
    fit(tiny(), fields(), settings(tmp_path, epochs=6, num_workers=1, save_every_steps=None))
    assert_same_run(tmp_path, reference[0])


def test_one_dataset_may_serve_training_and_validation(tmp_path):
    """Validation is of epoch 0 whatever the workers have begun to load."""
    for workers in (0, 1):
        data = SparseFields(gradients(18, 0), queries=0.5)
        config = settings(tmp_path / str(workers), epochs=3, evaluate_every=1, num_workers=workers)
        fit(tiny(), (data, data), config, callback=lambda *given, data=data: data.set_epoch(7))
        assert data._epoch == 7  # fit has copies of its own
    assert_same_run(tmp_path / "1", tmp_path / "0")


class Forgetful:
    """Fields whose epoch is an attribute, which only the copy it is set on learns of; says who loads what."""

    def __init__(self, log):
        self.images, self.epoch, self.log = gradients(18, 0), None, log

    def __len__(self):
        return len(self.images)

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __getitem__(self, index):
        with open(self.log, "a") as file:
            file.write(f"{os.getpid()} {self.epoch}\n")
        return SparseFields(self.images, queries=0.5, seed=self.epoch)[index]


def test_workers_stay_and_learn_of_epochs(tmp_path):
    loaded = {}
    for workers in (0, 2):
        log = tmp_path / f"log{workers}"
        config = settings(tmp_path / str(workers), epochs=3, num_workers=workers)
        fit(tiny(), (Forgetful(log), fields()[1]), config)
        lines = log.read_text().splitlines()[2:]  # after the first and last item, which are checked
        loaded[workers] = [line.split() for line in lines]
        assert Counter(epoch for _, epoch in loaded[workers]) == {"0": 16, "1": 16, "2": 16}
    assert {pid for pid, _ in loaded[0]} == {str(os.getpid())}
    pids = {epoch: {pid for pid, e in loaded[2] if e == epoch} for epoch in "012"}
    assert pids["0"] == pids["1"] == pids["2"] and len(pids["0"]) == 2 and str(os.getpid()) not in pids["0"]
    assert_same_run(tmp_path / "2", tmp_path / "0")


def test_a_gradient_is_begun_before_the_step_before_is_read_back(tmp_path, monkeypatch):
    order = []

    def noted(name, function):
        def call(run, *arguments):
            if name != "_read_back" or run.unread is not None:
                order.append((name, run.progress.step))
            return function(run, *arguments)

        return call

    for name in ("_gradient", "_update", "_read_back"):
        monkeypatch.setattr(train, name, noted(name, getattr(train, name)))
    fit(tiny(), fields(), settings(tmp_path, epochs=1, save_every_steps=None))
    begun = [(("_gradient", step), ("_read_back", step), ("_update", step)) for step in range(4)]
    expected = [entry for triple in begun for entry in triple] + [("_read_back", 4)]
    expected.remove(("_read_back", 0))
    assert order == expected


def test_the_next_epoch_is_loaded_while_one_is_evaluated(tmp_path, monkeypatch):
    order = []
    begin, finish = train._epoch_batches, train._finish_epoch
    monkeypatch.setattr(train, "_epoch_batches", lambda *given: order.append(given[1]) or begin(*given))
    monkeypatch.setattr(train, "_finish_epoch", lambda *given: order.append("end") or finish(*given))
    fit(tiny(), fields(), settings(tmp_path, epochs=3))
    assert order == [0, 1, "end", 2, "end", "end"]


def test_save_interval_is_kept_but_for_the_last_epoch(tmp_path, monkeypatch):
    """By a clock on which an epoch takes ten seconds."""
    clock, saved, save = [0], [], train._save_state
    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(train, "_save_state", lambda run: saved.append(run.progress.epoch) or save(run))

    def tick(*given):
        clock[0] += 10

    for interval in (0, 15):
        config = settings(tmp_path / str(interval), save_every_steps=None, save_interval=interval)
        fit(tiny(), fields(), config, callback=tick)
    assert saved == [1, 2, 3, 4, 5, 6, 3, 5, 6]
    assert_same_run(tmp_path / "15", tmp_path / "0")


def test_a_state_has_the_buffers_of_its_step(tmp_path, monkeypatch):
    class Counting(TinyField):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, *arguments):
            self.calls += self.training
            return super().forward(*arguments)

    saved, save = [], train._save_state

    def noted(run):
        saved.append((run.progress.step, int(run.model.calls)))
        save(run)

    monkeypatch.setattr(train, "_save_state", noted)
    fit(Counting(), fields(), settings(tmp_path, epochs=2))
    assert saved == [(3, 3), (4, 4), (6, 6), (8, 8)]


# ------------------------------------------------------------------------------------ stop and resume


def start_python(*arguments):
    """Another Python with this library, one thread and no GPU."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
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


@pytest.mark.parametrize("when", ["before", "between", "inside"])
def test_an_interrupt_leaves_the_models_own_weights(when):
    """Before the swap with the averaged ones, when one of two is swapped, after it."""

    class Weights(list):
        def __iter__(self):
            for i, x in enumerate(super().__iter__()):
                if when == "between" and i == 1:
                    signal.raise_signal(signal.SIGINT)
                yield x

    def trained(model):
        if when == "before":
            signal.raise_signal(signal.SIGINT)
        return dict(model.named_parameters())

    model = nn.Linear(2, 2)
    averages = Weights([torch.zeros(2, 2), torch.zeros(2)])
    before = [x.detach().clone() for x in model.parameters()]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "_trained", trained)
        with train._averaged(SimpleNamespace(shadow_params=averages), model):
            assert not any(x.any() for x in model.parameters())
            signal.raise_signal(signal.SIGINT)
    when = None  # what follows reads the averages, too
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), before, strict=True))
    assert not any(x.any() for x in averages)


def test_interrupts_are_resumed_to_the_same_run(reference, tmp_path):
    """Stopped in the callback of epoch 1, within epoch 2, and while epoch 4 is evaluated."""

    def stop(epoch, history, field):
        raise KeyboardInterrupt

    first = fit(tiny(), fields(), settings(tmp_path), callback=stop)
    assert (first.interrupted, first.steps, first.best) == (True, 4, None)
    TinyField.from_pretrained(first.latest)

    data = fields()
    data[0].__class__ = StopsOnce
    data[0].left = 2 + 9  # the first and last items, then within the third batch, drawn after step 6
    second = fit(tiny(), data, settings(tmp_path))
    assert (second.interrupted, second.steps) == (True, 6)

    data = fields()
    data[1].__class__ = StopsOnce
    data[1].left = 2 + 5 + 4  # the first and last items, one evaluation, then within the next
    third = fit(tiny(), data, settings(tmp_path))
    assert (third.interrupted, third.steps) == (True, 16) and third.history["val_step"] == [8]

    final = fit(tiny(), fields(), settings(tmp_path))
    assert not final.interrupted and final.history == reference[1].history
    assert_same_run(tmp_path, reference[0])


class StopsOnce(SparseFields):
    """Raises KeyboardInterrupt in place of the item after `left` more."""

    def __getitem__(self, index):
        self.left -= 1
        if self.left == -1:
            raise KeyboardInterrupt
        return super().__getitem__(index)


def test_a_finished_run_is_returned_as_it_is(reference, tmp_path):
    folder, result, model = reference
    log = (folder / "log.csv").read_bytes()
    again = fit(TinyField(), fields(), settings(folder))
    assert again == result
    assert (folder / "log.csv").read_bytes() == log


class Killed(BaseException):
    """Stands for SIGKILL: nothing in `fit` handles it."""


@pytest.mark.parametrize("written", [False, True])
def test_kill_around_the_last_state_leaves_latest_and_picture_whole(
    reference, tmp_path, monkeypatch, written
):
    save_state = train._save_state

    def kill(run):
        if run.progress.epoch < 6:
            return save_state(run)
        if written:
            save_state(run)
        raise Killed

    monkeypatch.setattr(train, "_save_state", kill)
    with pytest.raises(Killed):
        fit(tiny(), fields(), settings(tmp_path))
    monkeypatch.undo()
    assert (tmp_path / "fields" / "epoch_0006.png").is_file()
    expected = load_file(reference[0] / "latest" / "model.safetensors")
    for _ in range(2):  # as the kill left it, then as the next call does
        latest = load_file(tmp_path / "latest" / "model.safetensors")
        assert all(torch.equal(latest[name], tensor) for name, tensor in expected.items())
        result = fit(tiny(), fields(), settings(tmp_path))
        assert (result.steps, result.latest) == (24, tmp_path / "latest")
    assert_same_run(tmp_path, reference[0])


def test_latest_of_a_finished_run_is_written_again(tmp_path):
    first = fit(tiny(), fields(), settings(tmp_path, epochs=2))
    expected = load_file(first.latest / "model.safetensors")
    shutil.rmtree(first.latest)
    assert fit(tiny(width=16), fields(), settings(tmp_path, epochs=2)) == first
    latest = load_file(first.latest / "model.safetensors")
    assert all(torch.equal(latest[name], tensor) for name, tensor in expected.items())


def test_best_of_another_run_is_not_returned(tmp_path):
    fit(tiny(), fields(), settings(tmp_path, epochs=2))
    (tmp_path / "state.safetensors").unlink()  # whoever wants to start again deletes this one

    def stop(epoch, history, field):
        raise KeyboardInterrupt

    result = fit(tiny(), fields(), settings(tmp_path, epochs=4), callback=stop)
    assert (tmp_path / "best").is_dir() and (result.steps, result.best) == (4, None)
    assert fit(tiny(), fields(), settings(tmp_path, epochs=4)).best == tmp_path / "best"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_waits_for_the_end_of_the_block(number):
    done = []
    handler = signal.signal(number, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            with train._deferred_interrupt():
                with train._deferred_interrupt():
                    os.kill(os.getpid(), number)
                    done.append("inner")
                done.append("outer")
        assert done == ["inner", "outer"]
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, handler)


@pytest.fixture
def stopped(tmp_path):
    """A folder with a run that stopped after its first epoch."""

    def stop(epoch, history, field):
        raise KeyboardInterrupt

    fit(tiny(), fields(), settings(tmp_path), callback=stop)
    return tmp_path


def test_state_of_other_settings_is_refused_by_name(stopped):
    with pytest.raises(
        ValueError, match=r"config: epochs=6 there, 7 here; learning_rate=0.01 there, 0.02 here"
    ):
        fit(tiny(), fields(), settings(stopped, epochs=7, learning_rate=0.02))
    with pytest.raises(ValueError, match="data: train=18 there, 17 here"):
        fit(tiny(), (SparseFields(gradients(17, 0)), fields()[1]), settings(stopped))
    with pytest.raises(ValueError, match="does not fit this model"):
        fit(tiny(width=8), fields(), settings(stopped))
    result = fit(
        tiny(), fields(), settings(stopped, save_every=1, gradient_checkpointing=True, num_workers=1)
    )
    assert result.steps == 24


@pytest.mark.parametrize(
    ("part", "other"),
    [
        ("train", SparseFields(gradients(18, 5), queries=0.5)),
        ("train", SparseFields(gradients(18, 0), observed=0.3, queries=0.5)),
        ("validation", SparseFields(gradients(5, 5), queries=0.5, seed=0)),
        ("validation", SparseFields(gradients(5, 1), queries=0.5, seed=7)),
    ],
)
def test_state_of_other_data_of_the_same_length_is_refused(stopped, part, other):
    data = (other, fields()[1]) if part == "train" else (fields()[0], other)
    before = (stopped / "state.safetensors").read_bytes()
    with pytest.raises(ValueError, match=rf"\(data: {part}_sha256=.* there, .* here"):
        fit(tiny(), data, settings(stopped))
    assert (stopped / "state.safetensors").read_bytes() == before


def test_the_same_data_resumes_whatever_epoch_it_was_left_at(stopped):
    data = fields()
    data[0].set_epoch(5)
    assert fit(tiny(), data, settings(stopped)).steps == 24


# -------------------------------------------------------------------------------------------- guards


class Dirty(SparseFields):
    """Item 7 holds a NaN from the second epoch on."""

    def __getitem__(self, index):
        item = super().__getitem__(index)
        if index == 7 and int(self._epoch) > 0:
            item["input_values"][2, 1] = math.nan
        return item


def test_nan_in_a_batch_stops_with_step_layer_and_item(tmp_path):
    data = fields()
    data[0].__class__ = Dirty
    model = tiny()
    with pytest.raises(FloatingPointError) as caught:
        fit(model, data, settings(tmp_path, save_every_steps=1))
    message = str(caught.value)
    state = load_file(tmp_path / "state.safetensors")
    steps = int(state["optimizer.last.weight.step"])
    assert 4 <= steps < 8 and message.startswith(f"step {steps + 1}: the loss is nan")
    assert "'first' (Linear)" in message and "input_values of dataset items [7]" in message
    assert all(torch.isfinite(tensor).all() for tensor in state.values())
    for name, parameter in model.named_parameters():  # the failed step is not taken, here neither
        assert torch.equal(parameter, state[f"model.{name}"]), name


class Gated(TinyField):
    """The square root has an infinite slope at 0, where the zero-initialised gate is."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(2, 3)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def root(self, query_coords):
        return self.gate(query_coords).abs().sqrt()


def test_infinite_gradient_of_a_finite_loss_names_the_layer(tmp_path):
    class Root(Gated):
        def forward(self, noisy_values, query_coords, *field):
            return super().forward(noisy_values, query_coords, *field) + self.root(query_coords)

    with pytest.raises(
        FloatingPointError, match=r"step 1: the gradient norm is nan .*'gate' \(Linear\).*finite"
    ):
        fit(Root(), fields(), settings(tmp_path))
    assert not (tmp_path / "state.safetensors").exists()


def test_infinite_gradient_of_one_step_names_the_layer_of_that_step(tmp_path):
    """And not of the next, whose gradient is there already."""

    class Root(Gated):
        def forward(self, noisy_values, query_coords, t, input_coords, input_values):
            velocity = super().forward(noisy_values, query_coords, t, input_coords, input_values)
            black = bool((input_values == -1).all((1, 2)).any())
            return velocity + self.root(query_coords) if black else velocity

    data = fields()
    first = torch.randperm(18, generator=train._generator(0, train._SHUFFLE, 0))[0]
    data[0].images[first] = 0
    with pytest.raises(FloatingPointError, match=r"step 1: the gradient norm is nan .*'gate' \(Linear\)"):
        fit(Root(), data, settings(tmp_path))


def test_an_error_leaves_the_rows_before_it_and_is_not_hidden_by_a_full_disk(tmp_path, monkeypatch):
    def stop(epoch, history, field):
        raise KeyError("callback")

    config = settings(tmp_path, save_every_steps=None, save_interval=1e6)
    with pytest.raises(KeyError, match="callback"):
        fit(tiny(), fields(), config, callback=stop)
    assert [int(row["step"]) for row in rows(tmp_path)] == [1, 2, 3, 4]

    def full(epoch, history, field):
        monkeypatch.setattr(train._Log, "write", lambda log: Path("/dev/full").write_text("a row"))
        stop(epoch, history, field)

    with pytest.raises(KeyError, match="callback"):
        fit(tiny(), fields(), config, callback=full)


def test_nan_in_the_validation_data_is_named_as_such(tmp_path):
    data = fields()
    data[1].__class__ = DirtyValidation
    with pytest.raises(FloatingPointError, match=r"epoch 2: the validation loss is nan"):
        fit(tiny(), data, settings(tmp_path))


class DirtyValidation(SparseFields):
    def __getitem__(self, index):
        item = super().__getitem__(index)
        item["query_values"][0] *= math.nan if index == 4 else 1
        return item


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "fp8"}, "bf16.*fp16.*fp32"),
        ({"epochs": 0}, "epochs=0"),
        ({"batch_size": 2.0}, "batch_size=2.0"),
        ({"seed": -1}, "seed=-1"),
        ({"save_every_steps": 0}, "save_every_steps=0"),
        ({"save_interval": -1}, r"save_interval=-1 is outside \[0, inf\)"),
        ({"learning_rate": 0.0}, r"learning_rate=0.0 is outside \(0, inf\)"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"warmup_fraction": 1}, "warmup_fraction"),
        ({"clip_norm": 0}, "clip_norm"),
        ({"min_query_fraction": 1.5}, "min_query_fraction"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"compile": 1}, "compile=1"),
    ],
)
def test_illegal_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig("runs/never", **changes)


def test_unknown_setting_is_refused_and_defaults_are_legal():
    with pytest.raises(TypeError, match="learning_rat"):
        TrainConfig("runs/never", learning_rat=1e-4)
    config = TrainConfig(Path("runs") / "never")
    assert replace(config, **asdict(config)) == config and json.dumps(asdict(config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "fp16"}, "fp16.*GPU"),
        ({"gradient_accumulation": 3}, "multiple of 3"),
        ({"batch_size": 32}, "18 items.*batch_size=18"),
    ],
)
def test_settings_that_do_not_fit_the_run_write_nothing(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        fit(tiny(), fields(), settings(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_models_and_data_that_do_not_fit_are_refused(tmp_path):
    train_data, validation_data = fields()
    config = settings(tmp_path / "run")
    with pytest.raises(ValueError, match="validation dataset is empty"):
        fit(tiny(), (train_data, []), config)
    with pytest.raises(ValueError, match="items of the train dataset lack"):
        fit(tiny(), ([torch.zeros(3)] * 8, validation_data), config)
    pixels = [{**train_data[i], "query_coords": train_data[i]["query_coords"] * 32} for i in range(8)]
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        fit(tiny(), (pixels, validation_data), config)
    short = [{**train_data[i], "query_values": train_data[i]["query_values"][:3]} for i in range(8)]
    with pytest.raises(ValueError, match="one value a query point"):
        fit(tiny(), (short, validation_data), config)
    with pytest.raises(ValueError, match="model is a Linear"):
        fit(nn.Linear(1, 1), fields(), config)
    with pytest.raises(ValueError, match="cannot checkpoint"):
        fit(NoCheckpointing(), fields(), replace(config, gradient_checkpointing=True))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("data", "came"),
    [
        (fields()[0], "data is a SparseFields;"),
        (fields() * 2, "data is a tuple of"),
        ((fields()[0], None), r"data is a tuple of \['SparseFields', 'NoneType'\]"),
        (dict(zip("ab", fields(), strict=True)), "data is a dict;"),
        (None, "data is a NoneType;"),
    ],
)
def test_data_must_be_a_pair_of_datasets(data, came, tmp_path):
    with pytest.raises(ValueError, match=came + ".*pass a pair"):
        fit(tiny(), data, settings(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_config_must_be_a_train_config():
    with pytest.raises(ValueError, match="config is a dict; pass a TrainConfig"):
        fit(tiny(), fields(), {"output_dir": "never"})


class WrongItem(SparseFields):
    """Item 2 is wrong, neither the first nor the last."""

    key, change = "", staticmethod(lambda tensor: tensor)

    def __getitem__(self, index):
        item = super().__getitem__(index)
        return {**item, self.key: self.change(item[self.key])} if index == 2 else item


@pytest.mark.parametrize("key", ["query_coords", "input_coords"])
@pytest.mark.parametrize(("factor", "message"), [(32, r"spans \[.*in \[0, 1\]"), (math.nan, r"spans \[nan")])
def test_wrong_coordinates_of_any_item_are_named(tmp_path, key, factor, message):
    for part, where in enumerate(
        (r"step \d, items \[.*\b2\b.*\] of the train", r"items \[.*\b2\b.*validation")
    ):
        data = fields()
        data[part].__class__ = WrongItem
        data[part].key, data[part].change = key, lambda tensor: tensor * factor
        config = settings(tmp_path / str(part), epochs=2, evaluate_every=1)
        with pytest.raises(ValueError, match=f"{where}.*{key} {message}"):
            fit(tiny(), data, config)


class NoCheckpointing(nn.Module):
    def save_pretrained(self, folder):
        raise AssertionError("not reached")


def test_datasets_without_images_train_without_fields(tmp_path):
    train_data, validation_data = fields()
    items = [validation_data[i] for i in range(len(validation_data))]
    seen = []
    config = settings(tmp_path, epochs=1)
    result = fit(tiny(), (train_data, items), config, callback=lambda *arguments: seen.append(arguments))
    assert math.isnan(result.history["val_psnr"][0]) and math.isfinite(result.history["val_loss"][0])
    assert seen[0][2] is None


def test_live_figure_replaces_itself_in_a_notebook(tmp_path, monkeypatch):
    ipython = pytest.importorskip("IPython")
    shown, updates = [], []

    class Handle:
        def update(self, image):
            updates.append(image)

    def display(image, display_id):
        shown.append(image)
        return Handle()

    monkeypatch.setattr(ipython, "get_ipython", lambda: type("Shell", (), {"kernel": None})())
    monkeypatch.setattr("IPython.display.display", display)
    fit(tiny(), fields(), settings(tmp_path, epochs=4, progress=True))
    assert (len(shown), len(updates)) == (1, 1)
    assert all(image.data.startswith(b"\x89PNG") for image in shown + updates)


# --------------------------------------------------------------------------------------------- grids


def test_grids_are_trained_without_fields_or_queries(grid_reference, tmp_path):
    folder, result = grid_reference
    history = result.history
    assert result.steps == 24 and history["val_step"] == [8, 16, 24]
    assert np.isnan(history["val_psnr"]).all() and not any(row["queries"] for row in rows(folder))
    assert history["val_loss"][-1] < history["val_loss"][0]
    assert LocalMamba2D.from_pretrained(result.best).config == tiny_grids().config
    seen = []
    fit(tiny_grids(), chirps(), settings(tmp_path, epochs=1), callback=lambda *given: seen.append(given))
    assert [(epoch, field) for epoch, _, field in seen] == [(1, None)]


def test_grids_loss_falls_when_overfitting_one(tmp_path):
    one, _ = chirps()
    data = [one[0]] * 64
    result = fit(tiny_grids(), (data, data), settings(tmp_path, epochs=6, save_every_steps=None))
    assert np.mean(result.history["loss"][-16:]) < 0.6 * np.mean(result.history["loss"][:4])


def test_grids_are_resumed_and_accumulated_to_the_same_run(grid_reference, tmp_path):
    def stop(epoch, history, field):
        raise KeyboardInterrupt

    assert fit(tiny_grids(), chirps(), settings(tmp_path / "a"), callback=stop).steps == 4
    fit(tiny_grids(), chirps(), settings(tmp_path / "a"))
    assert_same_run(tmp_path / "a", grid_reference[0])
    fit(tiny_grids(), chirps(), settings(tmp_path / "b", gradient_accumulation=4))
    assert_same_run(tmp_path / "b", grid_reference[0], 1e-5, 1e-3)


def test_conditions_are_dropped_in_training_and_not_in_validation(tmp_path):
    model, dropped, whole = tiny_grids(), [], []

    def watch(module, given):
        (dropped if module.training else whole).append(given[4])

    model.register_forward_pre_hook(watch)
    fit(model, chirps(), settings(tmp_path, epochs=25, batch_size=18, evaluate_every=25))
    assert torch.cat(dropped).float().mean().item() == pytest.approx(0.3, abs=0.07)  # standard error 0.022
    assert len({tuple(drop.tolist()) for drop in dropped}) > 20  # another draw each step
    assert whole and all(drop is None for drop in whole)


def test_mapping_parameters_learn_at_a_third_of_the_rate(tmp_path):
    """Adam's first step is the learning rate itself, whatever the gradient."""
    model = tiny_grids()
    mapping = {id(parameter) for parameter in mapping_parameters(model)}
    before = {name: (id(p) in mapping, p.detach().clone()) for name, p in model.named_parameters()}
    config = settings(tmp_path, epochs=1, batch_size=18, warmup_fraction=0.0, clip_norm=math.inf)
    assert fit(model, chirps(), config).steps == 1
    moved = {True: 0.0, False: 0.0}
    for name, parameter in model.named_parameters():
        tagged, start = before[name]
        moved[tagged] = max(moved[tagged], (parameter - start).abs().max().item())
    assert moved[False] == pytest.approx(1e-2, rel=1e-3)
    assert moved[True] == pytest.approx(1e-2 / 3, rel=1e-3)
    groups = train._parameter_groups(model, 0.1)
    assert [(group["weight_decay"], group["lr_scale"]) for group in groups] == [
        (0.1, 1), (0.0, 1), (0.1, 1 / 3), (0.0, 1 / 3)
    ]  # fmt: skip


def test_captions_are_trained_on(tmp_path):
    generator = torch.Generator().manual_seed(0)
    items = [
        {"spectrograms": item["spectrograms"], "captions": torch.randn(5, generator=generator)}
        for item in (chirps()[0][i] for i in range(8))
    ]
    model = tiny_grids(num_classes=0, caption_dim=5)
    before = model.caption_proj.weight.detach().clone()
    assert fit(model, (items, items), settings(tmp_path, epochs=1)).steps == 2
    assert not torch.equal(model.caption_proj.weight, before)
    broken = [{**item, "captions": item["captions"] * math.nan} for item in items]
    with pytest.raises(ValueError, match="item 0 of the train dataset: captions holds NaN"):
        fit(model, (broken, items), settings(tmp_path / "other"))


def test_nan_in_a_grid_is_named(tmp_path):
    data = chirps()
    data[0].spectrograms[7, 0, 3, 3] = math.nan
    with pytest.raises(FloatingPointError, match=r"the loss is nan.*spectrograms of dataset items \[7\]"):
        fit(tiny_grids(), data, settings(tmp_path))
    data = chirps()
    data[1].spectrograms[-1] = math.nan
    with pytest.raises(ValueError, match="item 4 of the validation dataset: spectrograms holds NaN"):
        fit(tiny_grids(), data, settings(tmp_path))


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (fields(), {}, r"items of the train dataset lack some of \['spectrograms', 'labels'\]; pass spectro"),
        (chirps(), {"num_classes": 0, "caption_dim": 3}, r"lack some of \['spectrograms', 'captions'\]"),
        (chirps(), {"channels": 2}, r"item 0 of the train dataset: x has shape \(1, 1, 8, 8\).*2 channels"),
        (chirps(), {"num_classes": 2}, "item 17 of the train|items .* of the train.*labels has class [23]"),
    ],
)
def test_grids_that_do_not_fit_are_refused(data, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        fit(tiny_grids(**options), data, settings(tmp_path / "run", epochs=1))
    assert not (tmp_path / "run" / "state.safetensors").exists()


def test_grid_state_of_other_data_is_refused(grid_reference, tmp_path):
    shutil.copytree(grid_reference[0], tmp_path / "run")
    data = chirps()
    data[0].labels[0] += 1
    with pytest.raises(ValueError, match=r"\(data: train_sha256=.* there, .* here"):
        fit(tiny_grids(), data, settings(tmp_path / "run"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    (
        Path(sys.argv[1])
        / "process{RANK}of{WORLD_SIZE}".format_map({"RANK": 0, "WORLD_SIZE": 1, **os.environ})
    ).touch()
    model, data = (tiny_grids(), chirps()) if "grids" in sys.argv[2:] else (tiny(), fields())
    for name, kind in (("slow", SlowFields), ("broken", BrokenFields)):
        if name in sys.argv[2:]:
            data[0].__class__ = kind
    fit(model, data, settings(sys.argv[1], num_workers=2 if "workers" in sys.argv[2:] else 0))
