"""The one training loop: flow matching of sparse fields or of grids, on Hugging Face Accelerate.

All randomness is a function of (seed, epoch) or (seed, step), drawn for the whole batch and then sliced by
process and by accumulation step. So a resumed run continues the same loss curve without any saved generator
state, and the number of processes or accumulation steps changes the result by float error only (dropout
excepted).

What a run writes into `output_dir`:

    state.safetensors   everything needed to resume: weights, their average, optimizer, step, settings, and a
                        SHA-256 of these; state.previous.safetensors: the one before, to go back to
    latest/             the model with the averaged weights, for `from_pretrained`
    best/               the same, of the lowest validation loss
    epoch_*/            the same, every `save_every` epochs
    log.csv             one row a step; validation rows hold val_loss and val_psnr
    fields/epoch_*.png  loss curve and full fields as they are reconstructed
    tb/                 the log again, for TensorBoard
    run.lock            says which process runs here; free as soon as that has ended, however it ended

Sources: seed 002 (Adam, 1e-4, cosine); Loshchilov & Hutter, "SGDR", ICLR 2017 (cosine schedule); Karras et
al., "Analyzing and Improving the Training Dynamics of Diffusion Models", CVPR 2024 (averaged weights).
"""

import copy
import csv
import errno
import fcntl
import hashlib
import io
import json
import math
import os
import shutil
import signal
import socket
import sys
import threading
import time
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from nfhelpers import evaluate
from nfhelpers.flow import check_field, flow_matching_loss, interpolate, target_velocity
from nfhelpers.metrics import psnr
from nfhelpers.models.diffae import check_latent
from nfhelpers.models.local_mamba import LocalMamba2D, batch_keys, grid_flow_loss
from nfhelpers.samplers import recording

PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}  # ours -> Accelerate's
QUERY_COUNTS = 4
"""How many counts of query points `vary_queries` draws from: each is a compilation and a graph of its own."""
ITEM_KEYS = ("input_coords", "input_values", "query_coords", "query_values")
MAPPING_LEARNING_RATE = 1 / 3
"""Learning rate of parameters marked `_mapping`, as a part of the others' (Crowson et al. 2024)."""
LOG_COLUMNS = ("step", "epoch", "loss", "learning_rate", "gradient_norm", "queries", "val_loss", "val_psnr")

# Streams of random numbers: the first word after the seed, so that no two of them coincide.
_SHUFFLE, _STEP, _DROPOUT, _VALIDATION, _FIELDS = range(5)

_STOPS = (signal.SIGINT, signal.SIGTERM)
TERMINATED = 128 + signal.SIGTERM
"""Exit code of a process that SIGTERM stopped, as shells have it."""

# Settings that a resumed run may change: they move files, memory or time, not the curve (beyond float error).
_FREE_SETTINGS = {
    "output_dir",
    "num_workers",
    "progress",
    "cpu",
    "compile",
    "cuda_graphs",
    "gradient_checkpointing",
    "gradient_accumulation",
    "halve_on_oom",
    "visualise_every",
    "save_every",
    "save_every_steps",
    "save_interval",
    "title",
}


@dataclass(frozen=True)
class TrainConfig:
    """Settings of `fit`.

    output_dir: folder of the run; a run that was stopped there is resumed. epochs; batch_size: samples an
    optimizer step, over all processes and accumulation steps together. learning_rate: peak, reached after
    warmup_fraction (in [0, 1)) of all steps, then a cosine down to 0. weight_decay: AdamW's, on matrices only
    (not on biases, norms or parameters marked `_no_weight_decay`). clip_norm: largest global gradient norm,
    math.inf for none; ema_decay: of the averaged weights, in [0, 1). gradient_accumulation: slices of a batch
    that pass through the model one after the other; halve_on_oom: double them when memory runs out, instead
    of stopping (one process only). precision: "fp32", "bf16" or "fp16" (GPU only); gradient_checkpointing,
    compile: memory against time. cuda_graphs: on a single GPU, launch the thousand kernels of loss and
    gradient as one, from the second step of a shape on; they keep memory of their own, and gradients for each
    shape (without effect elsewhere, and with gradient_checkpointing, which reads the random state).
    vary_queries: of sparse fields, each step keeps a random subset of the query points, one of QUERY_COUNTS
    counts between min_query_fraction (in (0, 1]) and all of them, because a scan sees other sequences when it
    is later asked for a full field. evaluate_every, visualise_every, save_every: in epochs (the last epoch is
    always evaluated and drawn); save_every_steps: also save the resumable state after this many steps, None
    for once an epoch; save_interval: seconds, at the end of an epoch it is saved if it is at least that old
    (the last epoch's always): what was done since is what a kill or an error loses. field_images: validation
    images of the full-field PSNR and picture. num_workers: of each of the two data loaders. cpu: train on the
    CPU even where a GPU is present; progress: progress bar and, in a notebook, live figure; title: of the
    run, above that figure.

    Raises ValueError on illegal values, TypeError on unknown names.
    """

    output_dir: str
    epochs: int = 100
    batch_size: int = 64
    learning_rate: float = 1e-4
    warmup_fraction: float = 0.05
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    ema_decay: float = 0.999
    gradient_accumulation: int = 1
    halve_on_oom: bool = False
    precision: str = "fp32"
    gradient_checkpointing: bool = False
    compile: bool = False
    cuda_graphs: bool = False
    vary_queries: bool = True
    min_query_fraction: float = 0.25
    evaluate_every: int = 2
    visualise_every: int = 5
    save_every: int = 10
    save_every_steps: int | None = None
    save_interval: float = 0.0
    field_images: int = 8
    num_workers: int = 0
    seed: int = 0
    cpu: bool = False
    progress: bool = True
    title: str = "training"

    def __post_init__(self):
        object.__setattr__(self, "output_dir", str(self.output_dir))
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision={self.precision!r} is unknown; pass one of {sorted(PRECISIONS)}")
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if field.type is bool and not isinstance(value, bool):
                raise ValueError(f"{name}={value!r} is not a bool; pass {field.default}")
            if field.type is int or (name == "save_every_steps" and value is not None):
                least = 0 if name in ("num_workers", "seed") else 1
                if isinstance(value, bool) or not isinstance(value, int) or value < least:
                    legal = 100 if field.default is None else field.default
                    raise ValueError(f"{name}={value!r} is not an integer >= {least}; pass {legal}")
            if name in _RANGES:
                legal, inside = _RANGES[name]
                if isinstance(value, bool) or not isinstance(value, int | float) or not inside(value):
                    raise ValueError(f"{name}={value!r} is outside {legal}; pass {field.default}")


_RANGES = {
    "learning_rate": ("(0, inf)", lambda x: 0 < x < math.inf),
    "warmup_fraction": ("[0, 1)", lambda x: 0 <= x < 1),
    "weight_decay": ("[0, inf)", lambda x: 0 <= x < math.inf),
    "clip_norm": ("(0, inf]", lambda x: x > 0),
    "ema_decay": ("[0, 1)", lambda x: 0 <= x < 1),
    "min_query_fraction": ("(0, 1]", lambda x: 0 < x <= 1),
    "save_interval": ("[0, inf)", lambda x: 0 <= x < math.inf),
}


@dataclass(frozen=True)
class TrainResult:
    """What `fit` returns.

    history: dict of lists. One entry a step: step (1 is the first), loss, learning_rate, gradient_norm; one
    entry an evaluation: val_step, val_loss, val_psnr (dB, of the one-step posterior mean on the full field
    with the observed pixels kept, see `evaluate.reconstruct`, unless all are observed; NaN for grids, and
    where the validation dataset has no `images`).
    best, latest: model folders, None where this run has not written them. steps: optimizer steps done, those
    of the runs that this one resumed included. interrupted: stopped by KeyboardInterrupt.
    """

    history: dict
    best: Path | None
    latest: Path | None
    steps: int
    interrupted: bool


@dataclass
class _Progress:
    """Where a run is: optimizer steps done, epochs finished (evaluation included), lowest validation loss."""

    step: int = 0
    epoch: int = 0
    best: float = math.inf


def cosine_schedule(step, total_steps, warmup_steps):
    """Factor on the learning rate of the optimizer step with this number (0 is the first), in [0, 1].

    Linear from 1/warmup_steps to 1 over the first warmup_steps, then half a cosine, which reaches 0 at
    total_steps (one step past the last) and stays there. Source: Loshchilov & Hutter 2017, without restarts.
    """
    if step >= total_steps:
        return 0.0
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (total_steps - warmup_steps)))


def fit(model, data, config, *, callback=None):
    """Train a model by flow matching; resume if `config.output_dir` holds the state of an earlier run.

    model: nn.Module with the signature of the field models and `save_pretrained` (see nfhelpers.models), or a
    `LocalMamba2D`; parameters that do not require gradients stay as they are, those marked `_mapping` learn
    at MAPPING_LEARNING_RATE. A field model may say at which times (`loss_times`) the loss is taken and how it
    is weighed (`loss_weight`); data: (train dataset, validation dataset), map-style, with the dict items of
    `images.SparseFields`, or for a `LocalMamba2D` those of `spectrograms.Spectrograms` (and captions, where
    it takes them), each a function of its index alone, or of epoch and index where the dataset has
    `set_epoch` (fit takes a shallow copy of each); a validation dataset with `images` (N, H, W, 3) is also
    reconstructed in full. config: TrainConfig. callback(epoch, history, fields), if given, is called on the
    main process after each epoch (1 is the first), when workers already load the next; fields is None unless
    the epoch was evaluated or drawn, else a dict of sparse, reconstruction (one-step posterior mean, as
    TrainResult has it) and target, each (k, H, W, 3) in [0, 1] (None without images).

    On return the model is on the training device, in eval mode, and holds the averaged (EMA) weights. An
    interrupt (Ctrl-C, a stopped cell) is not raised: the state and `latest` are written and the result says
    interrupted. SIGTERM, which schedulers send, does the same and then ends the process: SystemExit(143).
    Incomplete last batches of an epoch are left out. Runs unchanged under `accelerate launch` on many
    processes, which then stop together, after the same step. Returns TrainResult.

    A state file that is damaged is named in a warning, kept as state.damaged.safetensors, and the run goes on
    from state.previous.safetensors.

    Raises ValueError on data (checked batch by batch), model or settings that do not fit, on a folder in
    which another process trains, on state files that are all damaged or belong to other settings or other
    data (told apart by count, shapes and the hash of the first and last items); FloatingPointError on a loss
    or gradient that is not finite, naming step and layer; MemoryError when memory runs out in a step; OSError
    when files cannot be written, such as on a full disk; ChildProcessError when a data loader worker dies. In
    all these cases the saved state stays as it was.
    """
    if not isinstance(config, TrainConfig):
        raise ValueError(
            f"config is a {type(config).__name__}; pass a TrainConfig such as TrainConfig('runs/a')"
        )
    if not _is_pair_of_datasets(data):
        raise ValueError(
            f"data is a {_kinds(data)}; pass a pair (train dataset, validation dataset) with len() and "
            "[index], such as two images.SparseFields"
        )
    train_data, validation_data = data
    accelerator = _accelerator(config)
    _check_setup(model, train_data, validation_data, config, accelerator)
    task = _GridTask(model) if isinstance(model, LocalMamba2D) else _FieldTask()
    identity = {
        "config": {k: v for k, v in asdict(config).items() if k not in _FREE_SETTINGS}
        | ({"query_counts": QUERY_COUNTS} if config.vary_queries else {}),
        "model": _model_settings(model),
        "data": {
            **_check_dataset(task, train_data, "train"),
            **_check_dataset(task, validation_data, "validation"),
        },
    }
    with _locked(Path(config.output_dir), accelerator):
        return _fit(model, task, train_data, validation_data, config, accelerator, identity, callback)


def _fit(model, task, train_data, validation_data, config, accelerator, identity, callback):
    """`fit`, in a folder that is this process's own."""
    folder = Path(config.output_dir)
    saved = _load_state(folder, identity, accelerator)
    steps_per_epoch = len(train_data) // config.batch_size

    model.to(accelerator.device)
    groups = _parameter_groups(model, config.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)
    if saved is not None:
        _restore_model(model, optimizer, saved[0])
    # Batches come in a few shapes, and code for one is faster than code for any.
    network = torch.compile(model, dynamic=False) if config.compile else model
    # Accelerate wraps (autocast, DDP) what it prepares. It gets the objective, so that the model itself keeps
    # its own forward.
    objective, prepared = accelerator.prepare(_Objective(network, task), optimizer)
    ema = EMAModel(_trained(model).values(), decay=config.ema_decay, foreach=True)
    if saved is not None:
        _restore_average(model, ema, accelerator.scaler, *saved)
    progress = _Progress() if saved is None else _Progress(**saved[1]["progress"])
    del saved

    log = _Log(folder, progress, write=accelerator.is_main_process)
    run = _Run(
        task=task,
        model=model,
        train_data=train_data,
        validation_data=validation_data,
        config=config,
        accelerator=accelerator,
        slice_size=config.batch_size // (accelerator.num_processes * config.gradient_accumulation),
        steps_per_epoch=steps_per_epoch,
        folder=folder,
        identity=identity,
        objective=objective,
        optimizer=optimizer,
        prepared=prepared,
        ema=ema,
        progress=progress,
        log=log,
        signals=[],
        graphs=_graphs(config, accelerator),
        train_loader=_loader(train_data, config, accelerator),
        validation_loader=_loader(validation_data, config, accelerator),
        saved=time.monotonic(),
    )
    show = config.progress and accelerator.is_main_process
    live = _LiveFigure(show)
    bar = tqdm(total=config.epochs * steps_per_epoch, initial=progress.step, disable=not show, desc="train")
    cuda = [accelerator.device] if accelerator.device.type == "cuda" else []
    stopped = None
    with (
        _stop_signals(run),
        torch.random.fork_rng(devices=cuda),
        _checkpointing(model, config.gradient_checkpointing),
        log,
        bar,
    ):
        batches = None
        try:
            while progress.epoch < config.epochs:
                batches = batches or _epoch_batches(run, progress.epoch)
                if not _train_epoch(run, batches, bar):
                    batches = None
                    continue  # with smaller slices
                more = progress.epoch + 1 < config.epochs  # workers go on while the model is evaluated
                batches = _epoch_batches(run, progress.epoch + 1) if more else None
                field = _finish_epoch(run, live)
                if callback is not None and accelerator.is_main_process:
                    callback(progress.epoch, log.history, field)
        except KeyboardInterrupt as stop:
            stopped = type(stop)
            _save(run)
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker (pid"):
                raise
            raise ChildProcessError(
                f"step {progress.step + 1}: a data loader worker died ({error}), most likely for want of "
                "memory, or of shared memory in a container; the saved state is untouched. Pass a smaller "
                f"num_workers than {config.num_workers}, 0 for none, or give the container more (docker run "
                "--shm-size), then run again to resume"
            ) from error
        finally:
            optimizer.zero_grad()  # gradients may lie in the memory of graphs
            with _deferred_interrupt():
                _send_workers_home(run)
    ema.copy_to(_trained(model).values())
    model.eval()
    best, latest = folder / "best", folder / "latest"
    if stopped is _Terminated:
        if accelerator.is_main_process:
            print(
                f"SIGTERM: stopped at step {progress.step}; the same call resumes from {folder}",
                file=sys.stderr,
            )
        raise SystemExit(TERMINATED)
    if stopped is None:
        if accelerator.is_main_process and not latest.is_dir():  # the run was finished, the folder deleted
            save_model(model, latest)
        accelerator.wait_for_everyone()  # on return, the files are there for every process
    return TrainResult(
        log.history,
        # A `best` that this run's state does not know of was left by another one.
        best=best if progress.best < math.inf and best.is_dir() else None,
        latest=latest if latest.is_dir() else None,
        steps=progress.step,
        interrupted=stopped is not None,
    )


def fit_latent_flow(
    model,
    latents,
    *,
    steps=2000,
    batch_size=256,
    learning_rate=1e-3,
    ema_decay=0.999,
    seed=0,
    callback=None,
    progress=True,
):
    """Train a `LatentVelocityNetwork` by flow matching on latents: small enough for a plain loop.

    model: trained in place, on its own device; on return in eval mode, with averaged (EMA) weights. latents
    (N, C): z-normalised, as `MambaDiffusionAutoencoder.normalise` returns them. steps: of AdamW, with a
    cosine schedule from learning_rate (warm-up over 5%) to 0; batch_size: latents a step, drawn with
    replacement; seed: of these draws, of times and noise; callback(step, loss), if given, is called after
    each step, 1 is the first; progress: show a bar. Returns the losses, one a step. Raises ValueError for
    latents of another size, not finite or not normalised, and for counts below 1. Source: seed 004.
    """
    check_latent(latents, model.config.latent_dim)
    for name, value in (("steps", steps), ("batch_size", batch_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} is not an integer >= 1; pass 256")
    level = latents.square().mean().sqrt().item()
    offset = latents.mean(0).square().mean().sqrt().item()
    if not (0.5 < level < 2 and offset < 0.5):  # NaN is refused too
        raise ValueError(
            f"latents are not normalised: root mean square {level:.3g}, of their mean {offset:.3g}, wanted "
            "about 1 and 0; pass model.normalise(latents) of the autoencoder's"
        )
    device = next(model.parameters()).device
    latents = latents.to(device)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    ema = EMAModel(model.parameters(), decay=ema_decay, foreach=True)
    losses = []
    model.train()
    for step in tqdm(range(steps), desc="latent flow", disable=not progress):
        data = latents[torch.randint(len(latents), (batch_size,), generator=generator).to(device)]  # (B, C)
        t = torch.rand(batch_size, generator=generator).to(device)  # (B,)
        noise = torch.randn(data.shape, generator=generator).to(device)  # (B, C)
        error = model(interpolate(noise, data, t), t) - target_velocity(noise, data)  # (B, C)
        loss = (model.loss_weight(t)[:, None] * error.square()).mean()
        optimizer.zero_grad()
        loss.backward()
        clip_grads_with_norm_(model.parameters(), 1.0, get_total_norm([p.grad for p in model.parameters()]))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * cosine_schedule(step, steps, round(0.05 * steps))
        optimizer.step()
        ema.step(model.parameters())
        losses.append(loss.item())
        if callback is not None:
            callback(step + 1, losses[-1])
    ema.copy_to(model.parameters())
    model.eval()
    return losses


# -------------------------------------------------------------------------------- steps and epochs


@dataclass
class _Run:
    """What the parts of one call of `fit` share."""

    task: "_FieldTask | _GridTask"
    model: nn.Module
    train_data: object
    validation_data: object
    config: TrainConfig
    accelerator: Accelerator
    slice_size: int  # samples that pass through the model at once, on each process
    steps_per_epoch: int
    folder: Path
    identity: dict  # what a resumed run must have in common with this one
    objective: nn.Module
    optimizer: torch.optim.Optimizer
    prepared: object  # the optimizer as Accelerate wraps it: with the loss scaler of fp16
    ema: EMAModel
    progress: _Progress
    log: "_Log"
    signals: list  # that asked several processes to stop
    graphs: "_Graphs | None"
    train_loader: DataLoader  # for `_load`
    validation_loader: DataLoader
    saved: float  # when the state was last saved, in seconds of a clock that only runs
    unread: "_Unread | None" = None


@dataclass(frozen=True)
class _Unread:
    """A step that was handed to the device, and whose outcome was not read back yet."""

    slices: list
    outcome: torch.Tensor  # (2,): loss and gradient norm, on the CPU once they have `arrived`
    arrived: torch.cuda.Event | None
    rate: float
    may_skip: bool  # the norm may be infinite

    def wait(self):
        """Loss and gradient norm."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.outcome.tolist()


def _train_epoch(run, batches, bar):
    """The steps of these batches; False if they ran out of memory and slices were halved.

    The gradient of a step is handed to the device before the outcome of the step before is read back, so that
    the device does not wait for Python.
    """

    def due():
        every = run.config.save_every_steps
        return every is not None and run.progress.step % every == 0

    def finish_step():
        loss = _read_back(run)
        if loss is None:
            return
        bar.update()
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        if due():
            _save(run)
        _stop_together(run)

    run.model.train()
    try:
        for slices in batches:
            if due():  # before anything else is computed: a forward pass may change buffers
                finish_step()
            loss = _gradient(run, slices)
            finish_step()
            _update(run, slices, loss)
        finish_step()
        return True
    except MemoryError as error:
        if _read_back(run) is not None:  # the step before was done
            bar.update()
        if not run.config.halve_on_oom or run.slice_size % 2:
            raise
        parts, run.slice_size = 2 * run.config.gradient_accumulation, run.slice_size // 2
        run.config = replace(run.config, gradient_accumulation=parts)
        tqdm.write(f"{error}. Going on with gradient_accumulation={parts}", file=sys.stderr)
    run.graphs = None  # they hold memory of their own
    if run.config.compile:
        torch.compiler.reset()  # smaller slices are other shapes, of which it keeps only so many
    torch.cuda.empty_cache()  # now that the error, which holds the tensors of the step, is gone
    return False


def _gradient(run, slices):
    """Leave the gradient of a step's loss on the parameters; returns the loss."""
    try:
        return _accumulate(run, slices)
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        raise MemoryError(_out_of_memory(run, error)) from error


def _update(run, slices, loss):
    """One optimizer step, handed to the device, with what `_read_back` needs.

    Nothing is read back from it, but for the scale of fp16.
    """
    config, progress, total_steps = run.config, run.progress, run.config.epochs * run.steps_per_epoch
    run.accelerator.unscale_gradients(run.prepared)
    parameters = [p for p in run.model.parameters() if p.grad is not None]
    norm = get_total_norm([p.grad for p in parameters])
    finite = torch.isfinite(loss) & torch.isfinite(norm)
    # The loss scaler of fp16 finds its scale by overflowing now and then; it skips such a step.
    scaler = run.accelerator.scaler
    may_skip = scaler is not None and scaler.get_scale() > 1
    if scaler is None:
        run.optimizer.found_inf = (~finite).float()  # and without it the optimizer does, on the device
    rate = config.learning_rate * cosine_schedule(
        progress.step, total_steps, round(config.warmup_fraction * total_steps)
    )
    with _deferred_interrupt():
        clip_grads_with_norm_(parameters, config.clip_norm, norm.where(finite, 0.0))
        for group in run.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        run.prepared.step()
        _update_average(run)  # after a step that was skipped, with the same weights again
        progress.step += 1
        run.unread = _Unread(slices, *_to_host(torch.stack([loss, norm])), rate, may_skip)


def _update_average(run):
    """What `EMAModel.step` does, in one pass over the weights in place of two."""
    run.ema.optimization_step += 1
    decay = run.ema.get_decay(run.ema.optimization_step)
    get_ema_multi_avg_fn(decay)(run.ema.shadow_params, list(_trained(run.model).values()), None)


def _read_back(run):
    """Wait for the step that was handed to the device last, and log it; returns its loss, None if it was read
    before."""
    if run.unread is None:
        return None
    progress, item = run.progress, run.unread
    with _deferred_interrupt(), _writing(run):
        run.log.write()  # what was logged before, while the device is busy
        run.unread = None
        loss, norm = item.wait()
        if not math.isfinite(loss) or not (math.isfinite(norm) or item.may_skip):
            progress.step -= 1
            _raise_non_finite(run, item.slices, loss, norm)
        run.log.add(
            step=progress.step,
            epoch=progress.epoch + 1,
            loss=loss,
            learning_rate=item.rate,
            gradient_norm=norm,
            **run.task.details(item.slices[0].batch),
        )
    return loss


def _is_out_of_memory(error):
    """Of a GPU, or of the CPU, for which PyTorch has no exception of its own."""
    chain = error, error.__context__  # where a graph is captured, its end fails, too
    return any(isinstance(e, torch.OutOfMemoryError) for e in chain) or "DefaultCPUAllocator" in str(error)


def _out_of_memory(run, error):
    """What a step needed, what there is, and what helps."""
    if isinstance(error.__context__, torch.OutOfMemoryError):  # of a capture, whose end failed after it
        error = error.__context__
    found = str(error).split(". If reserved")[0]  # torch's own advice follows
    if run.accelerator.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(run.accelerator.device)
        free, total = torch.cuda.mem_get_info(run.accelerator.device)
        found += f" (held at most: {_size(peak)}; free now: {_size(free)} of {_size(total)})"
    remedies = ["a smaller batch_size or precision='bf16' (another curve, so another output_dir)"]
    if not run.config.gradient_checkpointing and hasattr(run.model, "gradient_checkpointing"):
        remedies.insert(0, "gradient_checkpointing=True (less memory a layer, a third more time)")
    if run.graphs is not None:
        remedies.insert(0, "cuda_graphs=False (they keep memory of their own)")
    if run.slice_size % 2 == 0:
        parts = 2 * run.config.gradient_accumulation
        remedies.insert(0, f"gradient_accumulation={parts} (half as many samples at once)")
    return (
        f"step {run.progress.step + 1}: out of memory with {run.slice_size} samples at once: {found}; the "
        f"saved state is untouched. Pass {', or '.join(remedies)}, then run again to resume"
    )


def _size(count):
    power, unit = next((p, u) for p, u in ((30, "GiB"), (20, "MiB"), (10, "KiB")) if count >= 2**p or p == 10)
    return f"{count / 2**power:.1f} {unit}"


def _finish_epoch(run, live):
    """Evaluate, draw and save what is due after this epoch; returns the full fields if they were made."""
    config, progress, main = run.config, run.progress, run.accelerator.is_main_process
    epoch = progress.epoch + 1
    evaluate, visualise = (
        epoch % every == 0 or epoch == config.epochs
        for every in (config.evaluate_every, config.visualise_every)
    )
    field = None
    if evaluate or visualise:
        with _averaged(run.ema, run.model):
            val_loss = _validate(run) if evaluate else None
            if evaluate and not math.isfinite(val_loss):
                raise FloatingPointError(
                    f"epoch {epoch}: the validation loss is {val_loss}; "
                    "look for NaN in the validation data, or lower learning_rate"
                )
            field = _reconstruct(run)
    names = [f"epoch_{epoch:04d}"] if epoch % config.save_every == 0 else []
    with _deferred_interrupt():
        with _writing(run):
            progress.epoch = epoch
            if evaluate:
                val_psnr = math.nan
                if field is not None:
                    val_psnr = float(psnr(field["reconstruction"], field["target"]).mean())
                run.log.add(step=progress.step, epoch=epoch, val_loss=val_loss, val_psnr=val_psnr)
                if val_loss < progress.best:
                    progress.best = val_loss
                    names.append("best")
            if main and names:
                with _averaged(run.ema, run.model):
                    for name in names:
                        save_model(run.model, run.folder / name)
            if main and (evaluate or visualise):
                picture = run.folder / "fields" / f"epoch_{epoch:04d}.png" if visualise else None
                heading = f"{config.title}: epoch {epoch}"
                if field is not None:
                    heading += ", reconstruction: one-step posterior mean"
                live.draw(run.log.history, field, heading, picture)
        if epoch == config.epochs or time.monotonic() - run.saved >= config.save_interval:
            _save(run)
    return field


def _save(run):
    """`latest` and the resumable state, on the main process.

    The state comes last of all files: what a kill leaves out, the steps repeated on resume write again. In
    the other order a kill after the last step would leave `latest` behind for ever.
    """
    if not run.accelerator.is_main_process:
        return
    _read_back(run)
    with _deferred_interrupt(), _writing(run):
        run.log.flush()
        with _averaged(run.ema, run.model):
            save_model(run.model, run.folder / "latest")
        _save_state(run)
        run.saved = time.monotonic()


@contextmanager
def _checkpointing(model, enabled):
    """Gradient checkpointing as asked inside, as it was afterwards. Only for models that offer the switch."""
    if not hasattr(model, "gradient_checkpointing"):
        yield
        return
    before, model.gradient_checkpointing = model.gradient_checkpointing, enabled
    try:
        yield
    finally:
        model.gradient_checkpointing = before


# ---------------------------------------------------------------------------------------------- set-up


def _accelerator(config):
    # Accelerate keeps the device and precision of a process's first Accelerator; a notebook trains often.
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    accelerator = Accelerator(mixed_precision=PRECISIONS[config.precision], cpu=config.cpu)
    if config.precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("precision='fp16' needs a GPU and this run is on the CPU; pass 'fp32' or 'bf16'")
    sharded = (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM)
    if accelerator.distributed_type in sharded:
        raise ValueError(
            f"accelerate is configured for {accelerator.distributed_type.value}, but each process needs the "
            "whole model here; launch with --multi_gpu"
        )
    return accelerator


def _check_setup(model, train_data, validation_data, config, accelerator):
    """Check what `fit` was given before anything is written."""
    if not isinstance(model, nn.Module) or not hasattr(model, "save_pretrained"):
        raise ValueError(f"model is a {type(model).__name__}; pass a field model of nfhelpers.models")
    if config.gradient_checkpointing and not hasattr(model, "gradient_checkpointing"):
        raise ValueError(
            f"{type(model).__name__} cannot checkpoint gradients; pass gradient_checkpointing=False"
        )
    parts = accelerator.num_processes * config.gradient_accumulation
    if config.batch_size % parts:
        raise ValueError(
            f"batch_size={config.batch_size} does not divide among {accelerator.num_processes} processes and "
            f"{config.gradient_accumulation} accumulation steps; pass a multiple of {parts}"
        )
    if len(train_data) < config.batch_size:
        raise ValueError(
            f"the train dataset has {len(train_data)} items, fewer than batch_size={config.batch_size}; "
            f"pass batch_size={max(1, len(train_data))} or less"
        )
    if len(validation_data) == 0:
        raise ValueError("the validation dataset is empty; pass at least one item")
    if config.halve_on_oom and accelerator.num_processes > 1:
        raise ValueError(
            f"halve_on_oom=True needs a single process, here are {accelerator.num_processes}, of which one "
            f"may run out of memory alone; pass gradient_accumulation={2 * config.gradient_accumulation}"
        )


def _is_pair_of_datasets(data):
    return (
        isinstance(data, tuple | list)
        and len(data) == 2
        and all(hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__") for dataset in data)
    )


def _kinds(data):
    """The type of what was passed as data, and what it holds."""
    name = type(data).__name__
    return f"{name} of {[type(part).__name__ for part in data]}" if isinstance(data, tuple | list) else name


def _check_dataset(task, dataset, name):
    """Check the first and the last item; returns what a resumed run must find again: count, shapes, hash."""
    if hasattr(dataset, "set_epoch"):
        dataset.set_epoch(0)
    digest = hashlib.sha256()
    for index in (0, len(dataset) - 1):
        item = dataset[index]
        if not isinstance(item, dict) or not set(task.keys) <= set(item):
            raise ValueError(
                f"items of the {name} dataset lack some of {list(task.keys)}; pass {task.dataset}"
            )
        tensors = {key: torch.as_tensor(item[key]).cpu() for key in task.keys}
        batch = {key: tensor[None] for key, tensor in tensors.items()}
        _check_batch(task, batch, f"item {index} of the {name} dataset", finite=True)
        for tensor in tensors.values():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    shapes = {key: list(tensor.shape) for key, tensor in tensors.items()}
    return {name: len(dataset), f"{name}_shapes": shapes, f"{name}_sha256": digest.hexdigest()}


def _check_batch(task, batch, where, *, finite=False):
    """Shapes, dtypes and ranges of a batch, on the CPU, where looking at them waits for no device.

    While training, values that are not finite pass: `_read_back` stops at these and names step and layer.
    """
    try:
        task.check(batch, finite)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _model_settings(model):
    settings = getattr(model, "config", None)
    settings = asdict(settings) if is_dataclass(settings) else {}
    return {"class": type(model).__name__, **settings}


def _trained(model):
    """The parameters that are trained, by name: a model may have frozen others."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _parameter_groups(model, weight_decay):
    """AdamW's groups; `lr_scale` is the factor on the learning rate of each."""
    groups = {}
    for parameter in _trained(model).values():
        plain = parameter.ndim < 2 or getattr(parameter, "_no_weight_decay", False)
        decay = 0.0 if plain else weight_decay
        scale = MAPPING_LEARNING_RATE if getattr(parameter, "_mapping", False) else 1.0
        group = {"params": [], "weight_decay": decay, "lr_scale": scale}
        groups.setdefault((scale, plain), group)["params"].append(parameter)
    return [groups[key] for key in sorted(groups, key=lambda key: (-key[0], key[1]))]


# --------------------------------------------------------------- what is trained: sparse fields or grids


class _FieldTask:
    """Velocity fields over sparse pixels, the items of `images.SparseFields`."""

    keys = ITEM_KEYS
    data = "query_values"  # the key of what the flow leads to
    dataset = "images.SparseFields"

    def check(self, batch, finite):
        values = batch["input_values"] if finite else batch["input_values"].nan_to_num()
        check_field(batch["query_coords"], batch["input_coords"], values)
        shape = (*batch["query_coords"].shape[:2], batch["input_values"].shape[-1])
        if batch["query_values"].shape != shape:
            raise ValueError(
                f"query_values has shape {tuple(batch['query_values'].shape)}; pass {shape}, "
                "one value a query point"
            )

    def thin(self, batches, config, generator):
        """Keep the same random subset of the query points in all batches, in their order."""
        if not config.vary_queries:
            return
        queries = batches[0]["query_values"].shape[1]
        fewest = max(1, round(config.min_query_fraction * queries))
        counts = torch.linspace(fewest, queries, QUERY_COUNTS).round().int()
        count = int(counts[torch.randint(QUERY_COUNTS, (), generator=generator)])
        keep = torch.randperm(queries, generator=generator)[:count].sort().values
        keep = _to_device({"keep": keep}, batches[0]["query_values"].device)["keep"]
        for batch in batches:
            for key in ("query_coords", "query_values"):
                batch[key] = batch[key][:, keep]

    def draw(self, config, generator):
        """Draws of a step beside times and noise, each (batch_size, ...): none."""
        return {}

    def details(self, batch):
        """Columns of the log that only this task has."""
        return {"queries": batch["query_values"].shape[1]}

    def loss(self, network, batch, t, noise, weight=None):
        # A model may be trained at other times than those that were drawn.
        t = network.loss_times(t) if hasattr(network, "loss_times") else t
        return flow_matching_loss(network, batch, t=t, noise=noise, weight=weight)


class _GridTask:
    """`LocalMamba2D` on grids and their conditions, the items of `spectrograms.Spectrograms`."""

    data = "spectrograms"
    dataset = "spectrograms.Spectrograms"

    def __init__(self, model):
        self.model = model
        self.keys = batch_keys(model.config)

    def check(self, batch, finite):
        grids, labels, captions = (
            batch[key] if key in self.keys else None for key in ("spectrograms", "labels", "captions")
        )
        self.model.check_arguments(grids, torch.zeros(len(grids)), labels, captions)
        for key in self.keys:
            if finite and not bool(torch.isfinite(batch[key]).all()):
                raise ValueError(f"{key} holds NaN or infinite values; pass finite ones")

    def thin(self, batches, config, generator):
        """Grids are trained whole."""

    def draw(self, config, generator):
        """Whose condition is dropped, for classifier-free guidance."""
        return {"drop": torch.rand(config.batch_size, generator=generator) < self.model.config.cfg_dropout}

    def details(self, batch):
        return {}

    def loss(self, network, batch, t, noise, drop=None):
        return grid_flow_loss(network, batch, t=t, noise=noise, drop=drop)


class _Objective(nn.Module):
    """The loss as a module, because autocast and DDP wrap modules."""

    def __init__(self, network, task=None):
        super().__init__()
        self.network = network
        self.task = task or _FieldTask()

    def forward(self, batch, t, noise, **draws):
        if hasattr(self.network, "loss_weight"):  # of models that have a scale of their own
            draws["weight"] = self.network.loss_weight
        return self.task.loss(self.network, batch, t, noise, **draws)


# ------------------------------------------------------------------------- one batch, whoever draws it


def _seed(*words):
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1)


def _generator(*words):
    return torch.Generator().manual_seed(_seed(*words))


def _epoch_batches(run, epoch):
    """The slices of each step that is left of this epoch, on this process; workers begin at once."""
    config, accelerator, first = run.config, run.accelerator, epoch * run.steps_per_epoch
    order = torch.randperm(len(run.train_data), generator=_generator(config.seed, _SHUFFLE, epoch))
    order = order[: run.steps_per_epoch * config.batch_size]
    order = order.reshape(run.steps_per_epoch, *_layout(run))[:, :, accelerator.process_index]
    order = order[run.progress.step - first :]  # (steps, parts, slice_size)
    batches = _load(run.train_loader, epoch, order.flatten(0, 1).tolist())
    steps = enumerate(order.tolist(), start=run.progress.step)
    return (_step_slices(run, batches, step, indices) for step, indices in steps)


def _layout(run):
    """How a batch is divided: (gradient accumulation, processes, slice_size)."""
    return run.config.gradient_accumulation, run.accelerator.num_processes, run.slice_size


class _Epochs(Dataset):
    """A dataset whose items are asked for by (epoch, index): so its copies in workers learn of the epoch.

    It has a copy of its own: another may be at another epoch meanwhile.
    """

    def __init__(self, dataset):
        self.dataset = copy.copy(dataset)

    def __getitem__(self, key):
        epoch, index = key
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
        return self.dataset[index]


def _loader(dataset, config, accelerator):
    """A DataLoader whose workers stay, for `_load`."""
    return DataLoader(
        _Epochs(dataset),
        batch_sampler=[],
        num_workers=config.num_workers,
        persistent_workers=config.num_workers > 0,
        pin_memory=accelerator.device.type == "cuda",
        generator=torch.Generator(),  # so that the loader takes nothing from the global one
        worker_init_fn=_leave_signals_to_parent,
    )


def _load(loader, epoch, batches):
    """The batches of these indices, one after the other; workers begin at once."""
    loader.batch_sampler[:] = [[(epoch, index) for index in indices] for indices in batches]
    return _from_workers(iter(loader), loader.num_workers)


def _from_workers(batches, num_workers):
    try:
        yield from batches
    except (ConnectionError, EOFError):
        # What a worker has loaded is lost with it. torch raises its death wherever its signal arrives: here.
        if num_workers:
            time.sleep(5)
        raise


def _send_workers_home(run):
    """End the workers. Left to themselves they may outlive an error, whose traceback refers to them, until
    Python ends and waits for them, for ever: they ignore the signal that it sends."""
    for loader in (run.train_loader, run.validation_loader):
        if loader._iterator is not None:  # there is no public way
            loader._iterator._shutdown_workers()


def _leave_signals_to_parent(worker):
    """Ctrl-C and a scheduler's SIGTERM reach every process of a group: workers are still needed to the end of
    the step, and a worker that dies is an error."""
    for number in _STOPS:
        signal.signal(number, signal.SIG_IGN)


def _to_device(tensors, device):
    """Tensors by name, on their way to the device: a copy from pinned memory waits for nothing."""
    if device.type == "cuda":
        tensors = {key: value.pin_memory() for key, value in tensors.items()}
    return {key: value.to(device, non_blocking=True) for key, value in tensors.items()}


def _to_host(x):
    """A copy of x on its way to the CPU, and when it has arrived; x itself and None where it is no GPU's.

    Without an event, reading would wait for all that was handed to the device after it.
    """
    if x.device.type != "cuda":
        return x, None
    host = torch.empty_like(x, device="cpu", pin_memory=True).copy_(x, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return host, arrived


@dataclass(frozen=True)
class _Slice:
    """What passes through the model at once: dataset indices, batch, and draws: t (b,), noise, as the data
    are, (b, ...), and those of the task."""

    indices: list
    batch: dict
    draws: dict


def _step_slices(run, loader, step, step_indices):
    """The slices of an optimizer step (0 is the first) on this process, with what is drawn for this step.

    `loader`: the batches of this epoch that are left.
    """
    batches = []
    for indices in step_indices:
        batch = next(loader)
        _check_batch(run.task, batch, f"step {step + 1}, items {indices} of the train dataset")
        batches.append(_to_device(batch, run.accelerator.device))
    config, device = run.config, run.accelerator.device
    generator = _generator(config.seed, _STEP, step)
    run.task.thin(batches, config, generator)
    data, size = batches[0][run.task.data], config.batch_size
    draws = {
        "t": torch.rand(size, generator=generator, dtype=data.dtype),
        "noise": torch.randn(size, *data.shape[1:], generator=generator, dtype=data.dtype),
        **run.task.draw(config, generator),
    }
    process = run.accelerator.process_index
    mine = {
        name: x.reshape(*_layout(run), *x.shape[1:])[:, process]  # (parts, b, ...)
        for name, x in draws.items()
    }
    mine = _to_device(mine, device)
    return [
        _Slice(indices, batch, {name: x[part] for name, x in mine.items()})
        for part, (indices, batch) in enumerate(zip(step_indices, batches, strict=True))
    ]


def _seed_dropout(run, part):
    words = (run.config.seed, _DROPOUT, run.progress.step, part, run.accelerator.process_index)
    torch.manual_seed(_seed(*words))


def _accumulate(run, slices):
    """Leave the gradient of the whole batch's loss on the parameters; returns that loss, detached."""
    run.optimizer.zero_grad()
    total = 0
    for part, item in enumerate(slices):
        _seed_dropout(run, part)
        last = part == len(slices) - 1
        with nullcontext() if last else run.accelerator.no_sync(run.objective):
            add_gradient = _add_gradient if run.graphs is None else _add_gradient_by_graph
            total = total + add_gradient(run, item.batch, item.draws, len(slices))
    return run.accelerator.reduce(total, "mean")


def _add_gradient(run, batch, draws, parts):
    """Add the gradient of a slice's part of the batch's loss to the parameters'; returns it, detached."""
    loss = run.objective(batch, **draws) / parts
    run.accelerator.backward(loss)
    return loss.detach().float()


@dataclass
class _Graphs:
    """Captured CUDA graphs of `_add_gradient`, by the shapes of its tensors.

    captured: (graph, the batch and draws that it reads, the loss and the gradients of the parameters that it
    writes); None after the first call, which runs as it would without graphs, and compiles what it has to.
    pool: the memory that all graphs share, as no two of them run at once.
    """

    captured: dict
    pool: tuple


def _graphs(config, accelerator):
    """An empty `_Graphs` where they are wanted and possible."""
    single_gpu = accelerator.device.type == "cuda" and accelerator.num_processes == 1
    wanted = config.cuda_graphs and single_gpu and not config.gradient_checkpointing
    return _Graphs({}, torch.cuda.graph_pool_handle()) if wanted else None


def _add_gradient_by_graph(run, batch, draws, parts):
    """`_add_gradient`, launched as a whole."""
    captured = run.graphs.captured
    key = parts, *(x.shape for x in (*batch.values(), *draws.values()))
    if key not in captured:
        captured[key] = None
        return _add_gradient(run, batch, draws, parts)
    if captured[key] is None:
        captured[key] = _capture(run, batch, draws, parts)
    graph, (own_batch, own_draws), loss, gradients = captured[key]
    for own, given in ((own_batch, batch), (own_draws, draws)):
        for name, x in given.items():
            own[name].copy_(x)
    graph.replay()
    for parameter, gradient in zip(_trained(run.model).values(), gradients, strict=True):
        if gradient is None:
            continue
        if parts == 1:  # nothing to add to, and the next replay comes after the step
            parameter.grad = gradient
        elif parameter.grad is None:
            parameter.grad = gradient.clone()
        else:
            parameter.grad += gradient
    return loss.clone()


def _capture(run, batch, draws, parts):
    """Record `_add_gradient` on copies of these tensors, running nothing: what `_Graphs.captured` holds."""
    own = tuple({name: x.clone() for name, x in given.items()} for given in (batch, draws))
    parameters = list(_trained(run.model).values())
    so_far = [parameter.grad for parameter in parameters]
    run.optimizer.zero_grad()  # so that the graph writes gradients, and does not add to these
    graph, device, pool = torch.cuda.CUDAGraph(), run.accelerator.device, run.graphs.pool
    with _deferred_interrupt(), recording(graph, run.model, device, "pass cuda_graphs=False", pool):
        loss = _add_gradient(run, *own, parts)
    gradients = [parameter.grad for parameter in parameters]
    for parameter, gradient in zip(parameters, so_far, strict=True):
        parameter.grad = gradient
    return graph, own, loss, gradients


def _raise_non_finite(run, slices, loss, norm):
    """Run the failing step forward once more, watching every layer, and say where it broke."""
    model = run.model
    executed, broken = [], []

    def watch(module, inputs, output):
        executed.append(module)
        tensors = output if isinstance(output, tuple | list) else [output]
        if any(isinstance(x, torch.Tensor) and not bool(torch.isfinite(x).all()) for x in tensors):
            broken.append(module)

    hooks = [module.register_forward_hook(watch) for module in model.modules()]
    try:
        with torch.no_grad(), run.accelerator.autocast():
            for part, item in enumerate(slices):
                _seed_dropout(run, part)
                run.task.loss(model, item.batch, **item.draws)
    finally:
        for hook in hooks:
            hook.remove()

    layers = {module: name or "the model itself" for name, module in model.named_modules()}
    if math.isfinite(loss):
        what = f"the gradient norm is {norm} (loss {loss:.4g})"
        run.graphs = None
        _accumulate(run, slices)  # on the parameters there may be the gradient of the next step
        # Gradients run from the output back: what broke first is the last layer that was executed.
        bad = {
            module
            for module in model.modules()
            for p in module.parameters(recurse=False)
            if p.grad is not None and not bool(torch.isfinite(p.grad).all())
        }
        culprits = [module for module in reversed(executed) if module in bad] or list(bad)
        kind = "gradient"
    else:
        what, culprits, kind = f"the loss is {loss}", broken, "output"
    where = f"no layer of process {run.accelerator.process_index} has a non-finite {kind}"
    if culprits:
        name = f"{layers[culprits[0]]!r} ({type(culprits[0]).__name__})"
        where = f"the first layer with a non-finite {kind} is {name}"
    dirty = [
        f"{key} of dataset items {[i for i, bad in zip(item.indices, rows, strict=True) if bad]}"
        for item in slices
        for key, value in item.batch.items()
        if any(rows := (~torch.isfinite(value)).reshape(len(value), -1).any(1).tolist())
    ]
    cause = f"the batch holds NaN or infinite {', '.join(dirty)}" if dirty else "the batch is finite"
    raise FloatingPointError(
        f"step {run.progress.step + 1}: {what}; {where}; {cause}. The saved state is untouched"
        + ("; clean the data" if dirty else "; try a lower learning_rate, clip_norm=1.0 or precision='fp32'")
    )


# ------------------------------------------------------------------------------------------ evaluation


@contextmanager
def _averaged(ema, model):
    """The model with the averaged weights inside, its own again afterwards, whatever happens."""

    def swap():  # without a copy: `EMAModel.store` makes one on the CPU
        for own, average in zip(_trained(model).values(), ema.shadow_params, strict=True):
            own.data, average.data = average.data, own.data

    inside = False
    try:
        with _deferred_interrupt():
            swap()
            inside = True
        yield
    finally:
        if inside:
            with _deferred_interrupt():
                swap()


@torch.no_grad()
def _validate(run):
    """Flow-matching loss over the validation set, with the same times and noise for each item every time.

    No condition is dropped: the model is in eval mode.
    """
    model, dataset, config, accelerator = run.model, run.validation_data, run.config, run.accelerator
    mine = list(range(accelerator.process_index, len(dataset), accelerator.num_processes))
    batches = [mine[i : i + run.slice_size] for i in range(0, len(mine), run.slice_size)]
    # Times evenly spread over the items: less variance than drawing them.
    order = torch.randperm(len(dataset), generator=_generator(config.seed, _VALIDATION))
    times = (order + 0.5) / len(dataset)
    total = torch.zeros((), device=accelerator.device)
    model.eval()
    for indices, batch in zip(batches, _load(run.validation_loader, 0, batches), strict=True):
        _check_batch(run.task, batch, f"items {indices} of the validation dataset")
        shape = batch[run.task.data].shape[1:]
        noise = [torch.randn(shape, generator=_generator(config.seed, _VALIDATION, i)) for i in indices]
        noise, t = torch.stack(noise).to(accelerator.device), times[indices].to(accelerator.device)
        with accelerator.autocast():
            loss = run.task.loss(model, _to_device(batch, accelerator.device), t, noise)
        total += loss.float() * len(indices)  # read back at the end: the next batch need not wait
    return accelerator.reduce(total, "sum").item() / len(dataset)


def _reconstruct(run):
    """One-step posterior mean of the first images in full: sparse, reconstruction, target in [0, 1].

    By `evaluate.reconstruct`: the model is asked for the unobserved pixels only, as in training, and the
    observed ones are kept. Where all are observed, as for an autoencoder of whole images, it is asked for all
    of them and none is kept: the score would be that of the target.
    """
    dataset, config, accelerator = run.validation_data, run.config, run.accelerator
    if getattr(dataset, "images", None) is None:
        return None
    count = min(config.field_images, len(dataset))
    images = torch.as_tensor(dataset.images[:count]).float() / 255  # (k, H, W, 3)
    _, height, width, _ = images.shape
    items = [dataset[index] for index in range(count)]
    input_coords, input_values = (
        torch.stack([item[key] for item in items]) for key in ("input_coords", "input_values")
    )
    pixels = (input_coords * torch.tensor([width, height])).long().clamp(min=0)  # (k, Ni, 2), column and row
    flat = pixels[..., 1] * width + pixels[..., 0]
    mask = torch.zeros(count, height * width, dtype=torch.bool).scatter_(1, flat, True)
    mask = mask.reshape(count, height, width)
    observed = {
        "images": images,
        "mask": mask & ~mask.all(),  # the pixels that are kept
        "input_coords": input_coords,
        "input_values": input_values,
    }
    with accelerator.autocast():
        result = evaluate.reconstruct(
            run.model, observed, seed=_seed(config.seed, _FIELDS), device=accelerator.device
        )
    return {
        "sparse": np.where(mask[..., None], result["images"], np.float32(0.75)),  # unobserved: grey
        "reconstruction": result["fields"],
        "target": result["images"],
    }


class _LiveFigure:
    """The training figure, as a file and, in a notebook, in place of its predecessor."""

    SHOWN = 4

    def __init__(self, live):
        self.live = (
            live and "IPython" in sys.modules and hasattr(sys.modules["IPython"].get_ipython(), "kernel")
        )
        self.handle = None

    def draw(self, history, field, title, path):
        if path is None and not self.live:
            return
        from nfhelpers.plots import training_figure  # matplotlib, only where something is drawn

        shown = None if field is None else {name: images[: self.SHOWN] for name, images in field.items()}
        png = io.BytesIO()
        training_figure(history, shown, title=title).savefig(png, format="png")
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png.getvalue())
        if self.live:
            from IPython.display import Image, display

            image = Image(png.getvalue())
            if self.handle is None:
                self.handle = display(image, display_id=True)
            else:
                self.handle.update(image)


# -------------------------------------------------------------------------------------- files of a run


class _Terminated(KeyboardInterrupt):
    """SIGTERM: an interrupt after which the process is to end."""


_held = set()  # folders in which this process trains


@contextmanager
def _locked(folder, accelerator):
    """One run at a time in this folder: on the main process, a lock that the system frees with the process.

    A POSIX record lock, which forked data loader workers do not inherit. It does not keep out other threads
    of the process that has it: `_held` does.
    """
    if not accelerator.is_main_process:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    if folder.resolve() in _held:
        raise ValueError(
            f"{folder} is in use by another call of fit in this process; wait for its end, or pass another "
            "output_dir"
        )
    with (folder / "run.lock").open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                raise ValueError(
                    f"{folder} is in use by {file.read() or 'another process'}; wait for its end, stop it, "
                    "or pass another output_dir"
                ) from error
            warnings.warn(
                f"{folder} cannot be locked ({error}); see to it that no other process trains there",
                stacklevel=4,
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        _held.add(folder.resolve())
        try:
            yield
        finally:
            _held.discard(folder.resolve())


@contextmanager
def _stop_signals(run):
    """Inside, SIGTERM raises as Ctrl-C does; in one of several processes both are only noted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(number, frame):
        signal.signal(number, signal.SIG_IGN)  # `timeout` and some schedulers send it twice
        raise _Terminated

    def note(number, frame):
        run.signals.append(number)

    alone = run.accelerator.num_processes == 1
    handlers = {signal.SIGTERM: terminate} if alone else dict.fromkeys(_STOPS, note)
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop_together(run):
    """Raise what one of several processes was asked for in all: none may leave the others waiting."""
    if run.accelerator.num_processes == 1:
        return
    asked = [float(number in run.signals) for number in _STOPS]
    asked = run.accelerator.reduce(torch.tensor(asked, device=run.accelerator.device), "sum").tolist()
    for count, exception in zip(asked, (KeyboardInterrupt, _Terminated), strict=True):
        if count:
            raise exception


@contextmanager
def _deferred_interrupt():
    """Hold Ctrl-C and SIGTERM back until the block is done, so that no step, file or swap of weights stays
    half done."""
    handlers = {number: signal.getsignal(number) for number in _STOPS}
    handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
    if threading.current_thread() is not threading.main_thread():
        handlers = {}
    received = []
    for number in handlers:
        signal.signal(number, lambda *arguments: received.append(arguments))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if received:
        handlers[received[0][0]](*received[0])


@contextmanager
def _writing(run):
    """Say of files that cannot be written inside what they need, and leave no unfinished one."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        for path in run.folder.glob(".*.tmp"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        needed = sum(tensor.nbytes for tensor in _state_tensors(run).values())
        free = shutil.disk_usage(run.folder).free
        raise OSError(
            f"step {run.progress.step}: a file could not be written ({error}); the state takes "
            f"{_size(needed)} and {_size(free)} are free in {run.folder}. What was saved before is "
            "untouched: make room, then run again to resume from there"
        ) from error


def _named_tensors(model):
    """Parameters and persistent buffers by name, each once even if it has several names."""
    once = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        once.setdefault(id(tensor), (name, tensor))
    return dict(once.values())


def _state_tensors(run):
    """What a run is resumed from, by name: model, average, moments of the optimizer."""
    tensors = {f"model.{name}": tensor for name, tensor in _named_tensors(run.model).items()}
    for (name, parameter), average in zip(_trained(run.model).items(), run.ema.shadow_params, strict=True):
        tensors[f"ema.{name}"] = average
        for key, value in run.optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = value
    return tensors


def _save_state(run):
    scaler, path = run.accelerator.scaler, run.folder / "state.safetensors"
    details = json.dumps(
        {
            **run.identity,
            "progress": asdict(run.progress),
            "ema_steps": run.ema.optimization_step,
            "scaler": None if scaler is None else scaler.state_dict(),
        }
    )
    temporary = path.with_name(f".{path.name}.tmp")
    # On the CPU these are views of living tensors, which safetensors reads before anything can change them.
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _state_tensors(run).items()}
    save_file(tensors, temporary, metadata={"nfhelpers": details, "sha256": _digest(tensors, details)})
    _sync(temporary)
    if path.exists():
        _keep(path, path.with_name("state.previous.safetensors"))
    os.replace(temporary, path)
    _sync(path.parent)


def _digest(tensors, details):
    """SHA-256 of tensors, their names, dtypes and shapes, and of the text `details`."""
    digest = hashlib.sha256(details.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _keep(path, name):
    """Give the file a second name, at once and without a moment in which it has none."""
    temporary = name.with_name(f".{name.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:  # some file systems have no hard links
        shutil.copyfile(path, temporary)
    os.replace(temporary, name)
    temporary.unlink(missing_ok=True)  # still there if both were names of the same file


def _sync(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_state(path):
    """(tensors, details) of a state file; raises ValueError if it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        details = json.loads(metadata["nfhelpers"])
        _Progress(**details["progress"])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error})") from error
    # Versions before 0.2 wrote none.
    if metadata.get("sha256") not in (None, _digest(tensors, metadata["nfhelpers"])):
        raise ValueError(f"{path} is damaged (it does not have the SHA-256 that was written into it)")
    return tensors, details


def _read_last_state(folder, warn):
    """(tensors, details, file) of the last state that is whole; (.., None, ..) if there never was one."""
    path, previous = folder / "state.safetensors", folder / "state.previous.safetensors"
    if not path.exists():
        return {}, None, path
    try:
        return *_read_state(path), path
    except ValueError as error:
        if not previous.exists():
            raise ValueError(
                f"{error} and there is no {previous.name}; restore it from a copy, or delete it to start "
                "again"
            ) from error
        damage = str(error)
    try:
        tensors, details = _read_state(previous)
    except ValueError as error:
        raise ValueError(
            f"{damage}, and {error}; restore one from a copy, or delete both to start again"
        ) from error
    if warn:
        warnings.warn(
            f"{damage}; it is kept as state.damaged.safetensors, and the run goes on from {previous.name}, "
            f"step {details['progress']['step']}",
            stacklevel=5,
        )
    return tensors, details, previous


def _load_state(folder, identity, accelerator):
    """(tensors, details) of an earlier run of the same settings, or None if there is none."""
    tensors, details, path = _read_last_state(folder, accelerator.is_main_process)
    step = -1 if details is None else details["progress"]["step"]
    if accelerator.num_processes > 1:
        steps = accelerator.gather(torch.tensor([step], device=accelerator.device)).tolist()
        if len(set(steps)) > 1:
            raise ValueError(
                f"the processes see different states of {folder} (steps {steps}); "
                "pass an output_dir that all nodes share"
            )
    if details is None:
        return None
    identity = json.loads(json.dumps(identity))
    before = {part: details.get(part, {}) for part in identity}
    for part, current in identity.items():
        changed = [
            f"{key}={before[part].get(key)!r} there, {current.get(key)!r} here"
            for key in sorted(set(before[part]) | set(current))
            if before[part].get(key) != current.get(key)
        ]
        if changed:
            raise ValueError(
                f"{path} is of a run with other settings ({part}: {'; '.join(changed)}), on which its loss "
                "curve depends (on epochs by the schedule); pass the same to resume, or another output_dir"
            )
    state = folder / "state.safetensors"
    if path != state and accelerator.is_main_process:
        _keep(state, folder / "state.damaged.safetensors")
        _keep(path, state)
    return tensors, details


def _restore_model(model, optimizer, tensors):
    """Weights and optimizer moments."""
    current = _named_tensors(model)
    shapes = {f"model.{name}": tensor.shape for name, tensor in current.items()}
    stored = {name: tensor.shape for name, tensor in tensors.items() if name.startswith("model.")}
    if shapes != stored:
        unlike = sorted(n for n in shapes.keys() | stored.keys() if shapes.get(n) != stored.get(n))
        raise ValueError(
            f"the saved state does not fit this model in {unlike[:5]}; pass the model it was saved from"
        )
    with torch.no_grad():
        for name, tensor in current.items():
            tensor.copy_(tensors[f"model.{name}"])
    for name, parameter in model.named_parameters():
        prefix = f"optimizer.{name}."
        moments = {
            key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)
        }
        if moments:
            optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in moments.items()}


def _restore_average(model, ema, scaler, tensors, details):
    for name, average in zip(_trained(model), ema.shadow_params, strict=True):
        average.copy_(tensors[f"ema.{name}"])
    ema.optimization_step = details["ema_steps"]
    if scaler is not None and details["scaler"]:
        scaler.load_state_dict(details["scaler"])


def save_model(model, folder):
    """save_pretrained, such that a kill at any moment leaves a whole model in `folder` if one was there."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    for file in temporary.iterdir():
        _sync(file)
    if not folder.exists():
        os.replace(temporary, folder)
        return
    # One run writes one config, so that replacing file by file never mixes two models.
    for file in sorted(temporary.iterdir()):
        os.replace(file, folder / file.name)
    temporary.rmdir()


class _Log:
    """History in memory; on the main process also log.csv and TensorBoard, from the resumed step on.

    The files are a row or two behind: rows are written by `write`, when there is time for it.
    """

    def __init__(self, folder, progress, write):
        self.history = {
            name: []
            for name in ("step", "loss", "learning_rate", "gradient_norm", "val_step", "val_loss", "val_psnr")
        }
        path = folder / "log.csv"
        # Rows beyond the state were written by steps that are about to be repeated.
        rows = [
            row
            for row in (_read_log(path) if progress.step else [])
            if row["step"] <= progress.step and ("val_loss" not in row or row["epoch"] <= progress.epoch)
        ]
        for row in rows:
            self._remember(row)
        self.file = self.board = None
        self.unwritten = []
        if write:
            from torch.utils.tensorboard import (
                SummaryWriter,
            )  # slow to import, and only the main process writes

            folder.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(".log.csv.tmp")
            with temporary.open("w", newline="") as file:
                writer = csv.DictWriter(file, LOG_COLUMNS, lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
            os.replace(temporary, path)
            self.file = path.open("a", newline="", buffering=1)
            self.writer = csv.DictWriter(self.file, LOG_COLUMNS, lineterminator="\n")
            self.board = SummaryWriter(folder / "tb", purge_step=progress.step + 1)

    def _remember(self, row):
        if "val_loss" in row:
            row = {"val_step": row["step"], "val_loss": row["val_loss"], "val_psnr": row["val_psnr"]}
        for name in self.history.keys() & row.keys():
            self.history[name].append(row[name])

    def add(self, **row):
        self._remember(row)
        if self.file is not None:
            self.unwritten.append(row)

    def write(self):
        rows, self.unwritten = self.unwritten, []  # on a full disk, each is tried once
        for row in rows:
            self.writer.writerow(row)
            for name in row.keys() - {"step", "epoch"}:
                self.board.add_scalar(name, row[name], row["step"])

    def flush(self):
        self.write()
        os.fsync(self.file.fileno())
        self.board.flush()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if self.file is None:
            return
        failures = []
        for end in (self.write, self.file.close, self.board.close):
            try:
                end()
            except OSError as failure:  # a full disk; an error that is under way says more
                failures.append(failure)
        if failures and error is None:
            raise failures[0]


def _read_log(path):
    """Rows of log.csv as dicts without the empty cells; a last row that was cut off by a kill is left out."""
    if not path.exists():
        return []
    rows = []
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if None not in row.values() and all(row[name] for name in ("step", "epoch")):
                kinds = {"step": int, "epoch": int, "queries": int}
                rows.append({name: kinds.get(name, float)(cell) for name, cell in row.items() if cell})
    return rows
