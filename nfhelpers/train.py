"""The one training loop: flow matching of sparse fields or of grids, on Hugging Face Accelerate.

Every draw is a function of seed, step and place in the batch: a resumed run follows the same curve, with any
number of processes and accumulation steps (up to float error; dropout excepted).
Sources: Loshchilov & Hutter 2017 (cosine schedule), Karras et al. 2024 (averaged weights).
"""

import copy
import math
import os
import signal
import sys
import threading
import time
from collections import defaultdict
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from nfhelpers import checkpoint, evaluate, graphs
from nfhelpers.files import plain
from nfhelpers.flow import check_field, flow_matching_loss, grid_flow_loss
from nfhelpers.metrics import psnr
from nfhelpers.models import LocalMamba2D

QUERY_COUNTS = 4  # that vary_queries draws from: each is a compilation and a graph of its own
READ_EVERY = 10  # steps between looks at what a GPU has computed: the CPU waits for it then
_STOPS = (signal.SIGINT, signal.SIGTERM)
_SHUFFLE, _STEP, _ITEM, _DROPOUT, _VALIDATION = range(5)  # streams of random numbers
_COLUMNS = "step epoch loss learning_rate gradient_norm".split()
_SCORES = "val_step val_loss val_psnr".split()
# A resumed run must agree in these; epochs, files and speed may change.
_IDENTITY = "batch_size learning_rate weight_decay clip_norm ema_decay precision vary_queries seed".split()


@dataclass(frozen=True)
class TrainConfig:
    """Settings of `fit`; unknown names are errors."""

    output_dir: str | Path  # of the run: one that was stopped there goes on
    epochs: int = 100  # may be raised when they are done: the run goes on
    batch_size: int = 64  # of an optimizer step, over all processes and accumulation steps
    learning_rate: float = 1e-4  # the peak, after warm-up and before a cosine down to 0
    warmup_fraction: float = 0.05  # of all steps
    weight_decay: float = 0.0  # of matrices, except those marked `_no_weight_decay`
    clip_norm: float = 1.0  # largest global norm of the gradient
    ema_decay: float = 0.999  # of the averaged weights
    gradient_accumulation: int = 1  # slices of a batch that pass through the model one after the other
    precision: str = "fp32"  # or "bf16"
    gradient_checkpointing: bool = False  # less memory a layer, a third more time
    compile: bool = False
    cuda_graphs: bool = False  # on one GPU, of whole batches, without checkpointing: one launch a step
    vary_queries: bool = True  # of fields: steps, but the first two, keep a quarter of the queries or more
    evaluate_every: int = 2  # epochs; the last one is always evaluated
    save_interval: float = 30.0  # what a kill loses at most; the state is also saved at the end
    num_workers: int = 0  # processes that load data
    seed: int = 0
    cpu: bool = False  # train on the CPU even where a GPU is
    progress: bool = True  # progress bar and, in a notebook, a live figure
    title: str = "training"  # of the figure

    def __post_init__(self):
        for name, value in vars(self).items():
            object.__setattr__(self, name, plain(value))


@dataclass(frozen=True)
class TrainResult:
    """What `fit` returns."""

    model: nn.Module  # with averaged weights, in eval mode
    history: dict  # of lists: an entry a step, in those named val_ an entry an evaluation
    best: Path | None
    latest: Path
    steps: int
    interrupted: bool  # by Ctrl-C or the callback


def cosine_schedule(step, total_steps, warmup_steps):
    """Factor on the learning rate of a step (0 is the first): a linear ramp, then half a cosine down to 0."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return 0.5 * (1 + math.cos(math.pi * done))


def parameter_groups(model, weight_decay):
    """AdamW's groups: matrices decay; what is marked `_mapping` learns at a third (Crowson et al. 2024)."""
    groups = defaultdict(list)
    for p in filter(lambda p: p.requires_grad, model.parameters()):
        plain = p.ndim < 2 or getattr(p, "_no_weight_decay", False)
        groups[0.0 if plain else weight_decay, 1 / 3 if getattr(p, "_mapping", False) else 1.0].append(p)
    return [{"params": ps, "weight_decay": decay, "lr_scale": s} for (decay, s), ps in groups.items()]


def fit(model, data, config, callback=None, about=None):
    """Train a model by flow matching; go on where `config.output_dir` holds the state of an earlier run.

    data: (train, validation), or a dataset without validation: `images.SparseFields`, or `Spectrograms` for a
    `LocalMamba2D`. callback(epoch, history, fields): after each epoch; its KeyboardInterrupt stops the run.
    about: dict of lines for the card. Ctrl-C and SIGTERM stop after the step and save; SIGTERM then exits
    with 143. A loss that is not finite raises FloatingPointError with its step.
    """
    with _noted_signals() as signals, checkpoint.one_run(Path(config.output_dir)) as folder:
        run = _Run(model, data, config, folder, signals, about or {})
        run.go(callback)
    step, best = run.progress["step"], folder / "best" if run.progress["best"] < math.inf else None
    if signals and run.main:
        print(f"stopped at step {step}; the same call goes on", file=sys.stderr)
    if signal.SIGTERM in signals:
        raise SystemExit(128 + signal.SIGTERM)
    return TrainResult(model, run.history, best, folder / "latest", step, bool(signals))


class _Run:
    """One call of `fit`."""

    def __init__(self, model, data, config, folder, signals, about):
        self.model, self.config, self.folder, self.signals, self.about = model, config, folder, signals, about
        if config.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision={config.precision!r}: pass fp32 or bf16")
        # Accelerate keeps the device and precision of a process's first Accelerator; a notebook trains often.
        AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
        precision = config.precision.replace("fp32", "no")
        self.accelerator = accelerator = Accelerator(mixed_precision=precision, cpu=config.cpu)
        self.main, self.device = accelerator.is_main_process, accelerator.device
        self.cuda, self.saved, self.shown = self.device.type == "cuda", time.monotonic(), None
        train_data, self.validation_data = data if isinstance(data, tuple) else (data, None)
        self.steps = _Steps(train_data, config, accelerator, model)
        self.ema = copy.deepcopy(model.to(self.device)).requires_grad_(False).eval()
        self.parameters, self.averages = list(model.parameters()), list(self.ema.parameters())
        groups = parameter_groups(model, config.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)
        self.history = {name: [] for name in (*_COLUMNS, *_SCORES)}
        first = [round(float(x.double().sum()), 3) for x in self.steps.data[0].values()]
        self.identity = {"model": repr(getattr(model, "config", None)), "data": [len(train_data), *first]}
        self.identity |= {name: getattr(config, name) for name in _IDENTITY}
        self.state = folder / "state.safetensors", model, self.ema, self.optimizer, self.history
        self.progress = {"step": 0, "best": math.inf, "seconds": 0.0}
        self.progress |= checkpoint.load_state(*self.state, self.identity).get("progress", {})

        model.gradient_checkpointing = config.gradient_checkpointing
        network = torch.compile(model, dynamic=False) if config.compile else model
        # Accelerate wraps what it prepares (autocast, DDP): the objective, so that the model stays itself.
        self.objective = accelerator.prepare(_Objective(network))
        parts = accelerator.num_processes * config.gradient_accumulation
        if config.cuda_graphs and self.cuda and parts == 1 and not config.gradient_checkpointing:
            self.add_gradient = graphs.recorded_gradient(self.objective)
        self.total, self.unread = config.epochs * self.steps.per_epoch, []  # steps; those not read back yet

    def go(self, callback):
        """Train until the epochs are done or a stop is asked for; leave the averaged weights in the model."""
        config, per_epoch, start, total = self.config, self.steps.per_epoch, self.progress["step"], self.total
        if self.main:
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            self.board = SummaryWriter(self.folder / "tb", purge_step=start + 1)
            nothing = "; nothing to do, raise epochs to train longer" * (start >= total)
            where = os.path.relpath(self.folder)
            print(f"{where}: {start} of {total} steps done, {per_epoch} an epoch{nothing}")
        self.bar = tqdm(desc="train", total=total, initial=start, disable=not (self.main and config.progress))
        self.model.train()
        keys = ([(step, i) for i in part] for step in range(start, total) for part in self.steps.places)
        # With a generator of its own the loader takes nothing from the global one.
        options = {"generator": torch.Generator(), "pin_memory": self.cuda, "num_workers": config.num_workers}
        batches = iter(DataLoader(self.steps, batch_sampler=keys, worker_init_fn=_start_worker, **options))
        timed = None  # (step, seconds), where kernels are compiled
        try:
            for done in range(start + 1, total + 1):
                self.step(batches)
                if self.cuda and done % READ_EVERY and done % per_epoch:
                    continue
                self.read_back()
                timed = timed or (done, time.monotonic())
                if (seconds := time.monotonic() - timed[1]) > 20:  # once
                    hours = seconds / (done - timed[0]) * (total - done) / 3600
                    memory = torch.cuda.max_memory_reserved() / 2**30 if self.cuda else 0.0
                    if self.main and hours > 0.2:
                        print(f"about {hours:.1f} hours to go, {memory:.1f} GiB of GPU memory")
                    timed = math.inf, math.inf
                if done % per_epoch == 0 and self.main:
                    self.finish_epoch(done // per_epoch, callback)
                if self.signals:
                    self.accelerator.set_trigger()
                if self.accelerator.check_trigger():  # by any process: all of them ask after the same step
                    self.signals.extend([] if self.signals else [signal.SIGINT])
                    break
                if time.monotonic() - self.saved >= config.save_interval:
                    self.save()
            if start < total or not (self.folder / "latest").exists():
                self.save()
        finally:
            self.optimizer.zero_grad()  # gradients may lie in the graphs' memory
            vars(self).pop("add_gradient", None)  # which is free now, not when Python collects this object
            self.bar.close()
            if config.num_workers:  # there is no public way, and an error's traceback would keep them
                batches._shutdown_workers()
        self.model.load_state_dict(self.ema.state_dict())
        self.model.eval()

    def step(self, batches):
        """One optimizer step, handed to the device."""
        config, accelerator, step = self.config, self.accelerator, self.progress["step"]
        parts, total = config.gradient_accumulation, 0
        self.optimizer.zero_grad()
        for part in range(parts):
            batch = {name: x.to(self.device, non_blocking=True) for name, x in next(batches).items()}
            place = step, part, accelerator.process_index
            torch.manual_seed(_generator(config.seed, _DROPOUT, *place).initial_seed())
            with nullcontext() if part == parts - 1 else accelerator.no_sync(self.objective):
                total = total + self.add_gradient(**batch)
        loss = accelerator.reduce(total, "mean")
        norm = accelerator.clip_grad_norm_(self.parameters, config.clip_norm)
        warmup = round(config.warmup_fraction * self.total)
        rate = config.learning_rate * cosine_schedule(step, self.total, warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        self.optimizer.step()
        average = get_ema_multi_avg_fn(min(config.ema_decay, (1 + step) / (10 + step)))
        average(self.averages, self.parameters, None)
        self.progress["step"] += 1
        self.unread.append((step + 1, rate, torch.stack([loss, norm])))

    def add_gradient(self, **batch):
        """Add the gradient of a slice's part of the batch's loss to the parameters'; returns that part."""
        loss = self.objective(batch) / self.config.gradient_accumulation
        self.accelerator.backward(loss)
        return loss.detach().float()

    def read_back(self):
        """Log the steps since the last call. A GPU is waited for here, and nowhere else."""
        unread, self.unread = self.unread, []
        for step, rate, outcome in unread:
            loss, norm = outcome.tolist()
            if not math.isfinite(loss + norm):
                raise FloatingPointError(f"step {step}: loss {loss}, gradient norm {norm}; the state stays")
            self.log(_COLUMNS, step, -(-step // self.steps.per_epoch), loss, rate, norm)
            self.bar.update()
            self.bar.set_postfix(loss=f"{loss:.4f}", refresh=False)

    def log(self, columns, step, *values):
        for name, value in zip(columns, (step, *values), strict=True):
            self.history[name].append(value)
            if self.main:
                self.board.add_scalar(name, value, step)

    def finish_epoch(self, epoch, callback):
        """Evaluate and draw where that is due, and call back."""
        due, fields = epoch % self.config.evaluate_every == 0 or epoch == self.config.epochs, None
        if due and self.validation_data is not None:
            loss, fields = self.validate()
            score = psnr(fields["reconstruction"], fields["target"]).mean() if fields else math.nan
            self.log(_SCORES, self.progress["step"], loss, float(score))
            if loss < self.progress["best"]:
                self.progress["best"] = loss
                checkpoint.save_model(self.ema, self.folder / "best", self.card())
            self.draw(fields, f"{self.config.title}: epoch {epoch}")
        try:
            if callback is not None:
                callback(epoch, self.history, fields)
        except KeyboardInterrupt:
            self.signals.append(signal.SIGINT)

    def draw(self, fields, title):
        """training.png, shown in a notebook in place of its predecessor."""
        from nfhelpers.plots import training_figure  # matplotlib

        path = self.folder / "training.png"
        training_figure(self.history, fields, title).savefig(path)
        ipython = sys.modules.get("IPython")
        if self.config.progress and ipython and hasattr(ipython.get_ipython(), "kernel"):
            from IPython.display import Image, display

            self.shown = self.shown or display(display_id=True)
            self.shown.update(Image(str(path)))

    @torch.no_grad()
    def validate(self):
        """(loss over the validation set, with the same times and noise every time; whole fields or None)."""
        from nfhelpers.plots import observed_pixels  # matplotlib

        data, seed, size, total = self.validation_data, self.config.seed, self.config.batch_size, 0.0
        generator, objective, fields = _generator(seed, _VALIDATION), _Objective(self.ema), None
        times = (torch.randperm(len(data), generator=generator) + 0.5) / len(data)  # less variance than draws
        with self.accelerator.autocast():
            for batch, t in zip(DataLoader(data, size), times.split(size), strict=True):
                batch |= {"t": t, "noise": torch.randn(batch[self.steps.key].shape, generator=generator)}
                loss = objective({name: x.to(self.device) for name, x in batch.items()})
                total += float(loss) * len(t) / len(data)
            if hasattr(data, "images"):  # one-step posterior means of the first ones, (k, H, W, 3) in [0, 1]
                images = np.asarray(data.images[:8])
                observed = evaluate.observe(images, data.num_inputs / images[0, ..., 0].size, data.seed or 0)
                made = evaluate.reconstruct(self.ema, observed, seed=seed)
                sparse = observed_pixels(observed.images, observed.mask)
                fields = {"sparse": sparse, "reconstruction": made, "target": observed.images}
        return total, fields

    def save(self):
        """`latest`, the log and, last of all, the state: after a kill between them, steps are repeated."""
        self.read_back()
        folder, card, now = self.folder, self.card(), time.monotonic()
        self.progress["seconds"] += now - self.saved
        self.saved = now
        if not self.main:
            return
        at = {name: self.history["val_step" if name.startswith("val_") else "step"] for name in self.history}
        log = pandas.DataFrame({name: pandas.Series(x, at[name]) for name, x in self.history.items()})
        checkpoint.replace_file(folder / "log.csv", lambda path: log.to_csv(path, index=False))
        checkpoint.replace_file(folder / "README.md", lambda path: path.write_text(card, encoding="utf-8"))
        checkpoint.save_model(self.ema, folder / "latest", card)
        checkpoint.save_state(*self.state, self.identity | {"progress": self.progress})

    def card(self):
        """The README of a run and of its models, in UTF-8: what was trained, on what, how long, how well."""
        seconds = self.progress["seconds"] + time.monotonic() - self.saved
        device = torch.cuda.get_device_name(self.device) if self.cuda else "CPU"
        lines = self.about | {"training": f"{self.progress['step']} steps, {seconds:.0f} s on {device}"}
        lines |= {name: f"{x[-1]:.4f}" for name in ("loss", *_SCORES) if (x := self.history[name])}
        text = "\n".join(f"- {name}: {line}" for name, line in (lines | {"settings": self.config}).items())
        return f"# {type(self.model).__name__}\n\n{text}\n".encode(errors="backslashreplace").decode()


class _Steps(Dataset):
    """The items of all steps with their draws, by (step, place in its batch)."""

    def __init__(self, data, config, accelerator, model):
        self.data, self.config = copy.copy(data), config  # a copy, as its epoch is set here
        self.per_epoch = len(data) // config.batch_size
        self.dropped = model.config.cfg_dropout if isinstance(model, LocalMamba2D) else None
        self.key = "query_values" if self.dropped is None else "spectrograms"
        parts, size = (config.gradient_accumulation, accelerator.num_processes), config.batch_size
        if size % math.prod(parts) or size > len(data):
            raise ValueError(f"batch_size={size}: pass a multiple of {math.prod(parts)}, at most {len(data)}")
        places = torch.arange(size).reshape(*parts, -1)[:, accelerator.process_index]
        self.places = places.tolist()  # of each slice of this process
        self.start_epoch(0)

    def start_epoch(self, epoch):
        generator = _generator(self.config.seed, _SHUFFLE, epoch)
        self.epoch, self.order = epoch, torch.randperm(len(self.data), generator=generator).tolist()
        if hasattr(self.data, "set_epoch"):
            self.data.set_epoch(epoch)

    def __getitem__(self, key):
        seed, (step, place) = self.config.seed, key
        epoch, batch = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            self.start_epoch(epoch)
        item = dict(self.data[self.order[batch * self.config.batch_size + place]])
        generator = _generator(seed, _ITEM, step, place)
        item["t"] = torch.rand((), generator=generator)
        if self.dropped is not None:  # the condition of grids, for guidance
            item["drop"] = torch.rand((), generator=generator) < self.dropped
        else:
            check_field(*(item[name][None] for name in ("query_coords", "input_coords", "input_values")))
        if self.dropped is None and self.config.vary_queries:
            queries = len(item["query_values"])
            draw = _generator(seed, _STEP, step)  # a batch; at first all: graphs share that one's memory
            share = QUERY_COUNTS if step < 2 else int(torch.randint(1, QUERY_COUNTS + 1, (), generator=draw))
            count = math.ceil(queries * share / QUERY_COUNTS)
            keep = torch.randperm(queries, generator=generator)[:count].sort().values
            item |= {name: item[name][keep] for name in ("query_coords", "query_values")}
        return item | {"noise": torch.randn(item[self.key].shape, generator=generator)}


def _start_worker(worker):
    """Ctrl-C and SIGTERM reach every process of a group, but loaders are needed to the end of the step."""
    for number in _STOPS:
        signal.signal(number, signal.SIG_IGN)


class _Objective(nn.Module):
    """The loss of a batch with its draws, as a module: autocast and DDP wrap modules."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, batch):
        model, draws = self.network, {"t": batch["t"], "noise": batch["noise"]}
        if "spectrograms" in batch:
            return grid_flow_loss(model, batch, **draws, drop=batch.get("drop"))
        if hasattr(model, "loss_times"):  # a model may be trained at other times than those that were drawn
            draws["t"] = model.loss_times(draws["t"])
        return flow_matching_loss(model, batch, **draws, weight=getattr(model, "loss_weight", None))


def _generator(*words):
    seed = np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1
    return torch.Generator().manual_seed(int(seed))


@contextmanager
def _noted_signals():
    """Inside, Ctrl-C and SIGTERM are noted in the list and obeyed after the step; a third Ctrl-C at once."""
    signals = []

    def note(number, frame):
        signals.append(number)
        if signals.count(signal.SIGINT) > 2:  # launchers repeat the first one
            raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, note) for number in _STOPS} if main else {}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
