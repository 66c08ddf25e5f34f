"""A notebook's first call: preset, seed, device, precision and paths, resolved and printed in one place.

torch is imported where it is used: the command line checks its arguments without it.
"""

import functools
import hashlib
import json
import os
import platform
import random
import tempfile
import tomllib
from dataclasses import dataclass
from importlib.metadata import distributions
from importlib.resources import files
from pathlib import Path

PRESETS = ("smoke", "demo", "full")
SECTIONS = {  # notebook -> its section of presets.toml
    "01_ssm_basics": "ssm_basics",
    "02_flow_matching_v1": "v1",
    "03_multidirectional_scan": "multidir",
    "04_bidirectional_v2": "v2",
    "05_diffae_phase1": "diffae_phase1",
    "06_diffae_phase2": "diffae_phase2",
    "07_local_mamba": "localmamba",
}
FULL_PRESET_MEMORY = 8e9  # bytes of GPU memory from which `auto` picks "full"


@dataclass(frozen=True)
class Run:
    """What a notebook runs with; the folders are made when something is first written to them."""

    notebook: str
    preset: str
    settings: dict  # the notebook's section of presets.toml, overrides applied
    seed: int
    device: object  # torch.device
    precision: str  # "bf16" or "fp32"
    backend: str  # of the selective scan
    figures: Path
    runs: Path  # under "smoke" a new folder each time, so that every test trains


def start(notebook, preset=None, overrides=None):
    """Resolve preset and settings of a notebook (its file name without .ipynb), seed, print what is used.

    preset: see `resolve_preset`; overrides: {dotted key: value}, such as {"train.epochs": 2}.
    """
    from nfhelpers import kernels

    preset, device, root = resolve_preset(preset), default_device(), repository_root()
    settings = load_settings(SECTIONS.get(notebook, notebook), preset, overrides)
    seed, runs = settings["seed"], root / "runs" / notebook / preset
    seed_everything(seed)
    if preset == "smoke":
        runs.mkdir(parents=True, exist_ok=True)
        runs = Path(tempfile.mkdtemp(dir=runs))
    precision, backend = default_precision(device), kernels.choose_backend(device)
    print(f"preset    {preset}\ndevice    {describe_device(device)}, {precision}\nbackend   {backend}")
    print(f"versions  {', '.join(map(' '.join, versions().items()))}\nseed      {seed}")
    figures = root / "build" / "figures"
    return Run(notebook, preset, settings, seed, device, precision, backend, figures, runs)


def resolve_preset(preset=None):
    """The argument, else NF_PRESET, else "auto": "full" on a GPU of 8 GB or more, else "demo"."""
    name = preset or os.environ.get("NF_PRESET") or "auto"
    if name != "auto":
        if name not in PRESETS:
            raise ValueError(f"preset={name!r} is unknown; pass one of {', '.join(PRESETS)} or auto")
        return name
    import torch

    memory = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
    return "full" if memory >= FULL_PRESET_MEMORY else "demo"


def _presets():
    return tomllib.loads(files("nfhelpers").joinpath("presets.toml").read_text(encoding="utf-8"))


def sections():
    """The sections of presets.toml: of notebooks, and of models that can be trained."""
    return [name for name in _presets() if name != "defaults"]


def _flat(table, prefix=""):
    """{dotted key: value} of a nested dict, presets left out."""
    flat = {}
    for name, value in table.items():
        if name not in PRESETS:
            flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def load_settings(section, preset, overrides=None):
    """A section and preset of presets.toml as nested dicts, with overrides {dotted key: value}."""
    presets = _presets()
    if section not in sections():
        raise ValueError(f"{section!r} has no settings; pass one of {', '.join(sections())}")
    own, defaults = (_flat(presets[name]) | _flat(presets[name][preset]) for name in (section, "defaults"))
    trains = any(key.startswith("data.") for key in own)
    flat = {key: value for key, value in defaults.items() if trains or "." not in key} | own
    for key, value in (overrides or {}).items():
        kind = type(flat.get(key))
        value = kind(value) if (type(value), kind) in ((int, float), (tuple, list)) else value
        if key not in flat or type(value) is not kind:
            legal = (
                f"pass a {kind.__name__} such as {flat[key]!r}" if key in flat else f"keys: {', '.join(flat)}"
            )
            raise ValueError(f"{key}={value!r} does not fit; {legal}")
        flat[key] = value
    settings = {}
    for key, value in flat.items():
        *path, last = key.split(".")
        functools.reduce(lambda table, part: table.setdefault(part, {}), path, settings)[last] = value
    return settings


def repository_root():
    """The checkout around the working directory, else that of this library, else the working directory."""
    for folder in (Path.cwd(), *Path.cwd().parents, Path(__file__).resolve().parents[1]):
        if all((folder / name).exists() for name in ("pyproject.toml", "notebooks", "nfhelpers")):
            return folder
    return Path.cwd()


def default_device(name="auto"):
    """The first GPU if there is one, else the CPU; or "cpu", or "cuda", which has to be there."""
    import torch

    found = torch.cuda.is_available()
    if name == "cuda" and not found:
        raise ValueError("device cuda: torch finds no GPU here; pass cpu, or see python -m nfhelpers doctor")
    return torch.device("cuda", 0) if found and name != "cpu" else torch.device("cpu")


def default_precision(device):
    """bf16 on a GPU that computes in it, else fp32."""
    import torch

    cuda = torch.device(device).type == "cuda"
    return "bf16" if cuda and torch.cuda.is_bf16_supported() else "fp32"


def describe_device(device):
    """One line on a device: its name and memory, or the CPU's threads."""
    import torch

    if torch.device(device).type != "cuda":
        return f"{device} ({torch.get_num_threads()} threads)"
    gpu = torch.cuda.get_device_properties(device)
    return f"{device} ({gpu.name}, {gpu.total_memory / 2**30:.0f} GiB)"


def versions():
    """Versions that decide results, of what is installed."""
    found = {package.name: package.version for package in distributions()}
    names = [name for name in ("nfhelpers", "torch", "triton", "mamba_ssm") if name in found]
    return {"python": platform.python_version()} | {name: found[name] for name in names}


def seed_everything(seed):
    """Seed random, NumPy's global generator and torch on every device."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def field_datasets(data, seed):
    """(train, validation) `images.SparseFields` of the table `data` of settings; none is of the test split.

    Training sees other pixels in each epoch, validation always those of `seed`.
    """
    from nfhelpers.images import SparseFields, open_images

    source, size, options = data["source"], data["size"], (data["observed"], data["queries"])
    train = open_images(source, "train", size, data["train_images"], held_out=True)
    validation = open_images(source, "validation", size, data["validation_images"])
    return SparseFields(train, *options), SparseFields(validation, *options, seed=seed)


def training_folder(run, name):
    """Folder of a training of a notebook: <name>-<digest of settings>, so that other settings get another."""
    text = json.dumps(run.settings, sort_keys=True)
    return run.runs / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def title(run, text):
    """`text` with the preset, for the title of a figure."""
    return f"{text} [{run.preset}]"


def save_figure(run, figure, name):
    """Write a figure as <notebook>_<name>.png into build/figures; returns it, for a cell to show."""
    folder = run.runs if run.preset == "smoke" else run.figures
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{run.notebook}_{name}.png", dpi=120, bbox_inches="tight")
    return figure


def checkpoint_or_train(folder, train):
    """The model saved in `folder` if there is one, else what `train()` returns; both print which it was."""
    from nfhelpers import models

    found, name = Path(folder).exists(), f"{Path(folder).parent.name}/{Path(folder).name}"
    print(f"loaded {name}" if found else f"no {name}: the model is one trained here instead")
    return models.load_model(folder) if found else train()
