"""A notebook's first call: preset, seed, device, precision and paths, resolved and printed in one place.

Presets: "smoke" (CI, seconds), "demo" (CPU, minutes), "full" (GPU, the seeds' settings). Their numbers
are in presets.toml, one section a notebook; `SECTIONS` says which.
"""

import hashlib
import json
import os
import platform
import random
import tempfile
import tomllib
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch

from nfhelpers import __version__, images, kernels, models

PRESETS = ("smoke", "demo", "full")
SECTIONS = {
    "01_ssm_basics": "ssm_basics",
    "02_flow_matching_v1": "v1",
    "03_multidirectional_scan": "multidir",
    "04_bidirectional_v2": "v2",
    "05_diffae_phase1": "diffae_phase1",
    "06_diffae_phase2": "diffae_phase2",
    "07_local_mamba": "localmamba",
}
"""Notebook (its file name without .ipynb) -> its section of presets.toml."""

FULL_PRESET_MEMORY = 8e9
"""Bytes of GPU memory from which `auto` picks "full"."""


@dataclass(frozen=True)
class Run:
    """What a notebook runs with.

    `settings` is the notebook's section of presets.toml for the preset, as nested dicts, overrides applied.
    `figures` and `runs` are folders (pathlib), made when something is first written to them. Under "smoke"
    `runs` is a new folder each time, so that no finished run is found there and every test trains; under
    "demo" and "full" it is the same each time, and a stopped run is resumed.
    """

    notebook: str
    preset: str
    settings: dict
    seed: int
    device: torch.device
    precision: str  # "bf16" or "fp32"
    backend: str  # of the selective scan
    figures: Path
    runs: Path


def start(notebook, preset=None, overrides=None):
    """Resolve the preset and settings of a notebook, seed every generator, print what is used; returns `Run`.

    Args:
        notebook: file name without ".ipynb", a key of `SECTIONS`.
        preset: "smoke", "demo", "full" or "auto"; None takes the environment variable NF_PRESET, else "auto".
        overrides: {dotted key: value} replacing single settings, such as {"train.epochs": 2}.

    Raises ValueError for an unknown notebook, preset or key, or a value of another type than the setting's.
    """
    if notebook not in SECTIONS:
        raise ValueError(f"notebook={notebook!r} has no presets; legal names are {', '.join(SECTIONS)}")
    preset = resolve_preset(preset)
    settings = load_settings(SECTIONS[notebook], preset, overrides)
    device = default_device()
    root = repository_root()
    runs = root / "runs" / notebook / preset
    if preset == "smoke":
        runs.mkdir(parents=True, exist_ok=True)
        runs = Path(tempfile.mkdtemp(dir=runs))
    run = Run(
        notebook=notebook,
        preset=preset,
        settings=settings,
        seed=settings["seed"],
        device=device,
        precision=default_precision(device),
        backend=kernels.choose_backend(device),
        figures=root / "figures",
        runs=runs,
    )
    seed_everything(run.seed)
    off = "; ".join(
        f"{name}: {status}" for name, status in kernels.backend_status().items() if status != "ok"
    )
    print(f"preset    {run.preset}")
    print(f"device    {describe_device(run.device)}, {run.precision}")
    print(f"backend   {run.backend}" + (f" (off: {off})" if off else ""))
    print(f"versions  {', '.join(f'{name} {number}' for name, number in versions().items() if number)}")
    print(f"seed      {run.seed}")
    return run


def resolve_preset(preset=None):
    """The preset to run: the argument, else NF_PRESET, else "auto".

    "auto" is "full" on a GPU of 8 GB or more, else "demo".

    Raises ValueError for an unknown name.
    """
    name = preset or os.environ.get("NF_PRESET") or "auto"
    if name not in (*PRESETS, "auto"):
        raise ValueError(f"preset={name!r} is unknown; legal presets are {', '.join(PRESETS)} and auto")
    if name != "auto":
        return name
    if torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory >= FULL_PRESET_MEMORY:
        return "full"
    return "demo"


def _presets():
    return tomllib.loads(files("nfhelpers").joinpath("presets.toml").read_text(encoding="utf-8"))


def sections():
    """The sections of presets.toml: one a notebook (`SECTIONS`), and one a model that can be trained."""
    return tuple(_presets())


def load_settings(section, preset, overrides=None):
    """The settings of one section and preset of presets.toml as nested dicts.

    `overrides` is {dotted key: value}. Raises ValueError for an unknown section, preset or key, or a value of
    another type than the setting's (an int is a legal float).
    """
    presets = _presets()
    if section not in presets:
        raise ValueError(
            f"section={section!r} is not in presets.toml; legal sections are {', '.join(presets)}"
        )
    if preset not in PRESETS:
        raise ValueError(f"preset={preset!r} is unknown; legal presets are {', '.join(PRESETS)}")
    settings = presets[section][preset]
    for key, value in (overrides or {}).items():
        legal = _dotted(settings)
        if key not in legal:
            raise ValueError(f"unknown setting {key!r}; legal keys are {', '.join(legal)}")
        *path, last = key.split(".")
        table = settings
        for part in path:
            table = table[part]
        table[last] = _of_same_type(key, value, table[last])
    return settings


def _dotted(table, prefix=""):
    """The dotted keys of a nested dict, leaves only."""
    keys = []
    for name, value in table.items():
        keys += _dotted(value, f"{prefix}{name}.") if isinstance(value, dict) else [f"{prefix}{name}"]
    return keys


def _of_same_type(key, value, current):
    """`value` if it may replace `current`; a float where a float is wanted."""
    if isinstance(current, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(current, list) and isinstance(value, tuple):
        value = list(value)
    if type(value) is not type(current):
        raise ValueError(
            f"{key}={value!r} is of type {type(value).__name__}; "
            f"pass a {type(current).__name__} such as {current!r}"
        )
    return value


def repository_root():
    """This repository's folder: the one the working directory is in, else the one this library was installed
    from (as papermill finds it from anywhere), else the working directory.

    It is the nearest folder upwards with a pyproject.toml and the folders notebooks/ and nfhelpers/ beside
    it: any other project may have a pyproject.toml.
    """
    here = Path.cwd()
    for folder in (here, *here.parents, Path(__file__).resolve().parents[1]):
        beside = (folder / "notebooks").is_dir() and (folder / "nfhelpers").is_dir()
        if beside and (folder / "pyproject.toml").is_file():
            return folder
    return here


def default_device():
    """The first CUDA device if there is one, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def default_precision(device):
    """ "bf16" on a CUDA device that computes in bfloat16, else "fp32"."""
    return "bf16" if torch.device(device).type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


def allow_tf32():
    """Let this process's GPU multiply float32 matrices on its matrix units, inputs rounded to 11 bits (TF32).

    Sampling is float32; benchmarks/README.md has its time and PSNR with and without. The commands evaluate
    and compare do this, the notebooks do not: they check results to more digits. NVIDIA_TF32_OVERRIDE=0 in
    the environment forbids it.
    """
    torch.backends.cuda.matmul.allow_tf32 = os.environ.get("NVIDIA_TF32_OVERRIDE") != "0"


def gpu_name(device=None):
    """Name of a GPU (the current one if None), and how it multiplies float32 matrices, if as TF32."""
    return torch.cuda.get_device_name(device) + ", float32 as TF32" * torch.backends.cuda.matmul.allow_tf32


def describe_device(device):
    """One line on a device: its name and memory, or the CPU's threads."""
    device = torch.device(device)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{device} ({gpu_name(device)}, {properties.total_memory / 2**30:.0f} GiB)"
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"cpu ({threads} thread{'' if threads == 1 else 's'})"
    return str(device)


def versions():
    """Versions that decide results, by name; None for what is not installed."""
    found = {"nfhelpers": __version__, "python": platform.python_version(), "torch": torch.__version__}
    if torch.version.cuda:
        found["CUDA"] = torch.version.cuda
    for name, package in (("triton", "triton"), ("mamba_ssm", "mamba-ssm")):
        try:
            found[name] = version(package)
        except PackageNotFoundError:
            found[name] = None
    return found


def seed_everything(seed):
    """Seed random, NumPy's global generator and torch on every device."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def field_datasets(data, seed):
    """Training and validation dataset (`images.SparseFields`) of the table `data` of a section's settings.

    data: source, size, observed, queries, train_images and validation_images of presets.toml. Training sees
    other pixels in each epoch, validation (images of the test split) always those of `seed`. Shards and large
    folders are read item by item (`images.open_images`).
    """
    splits = (("train", data["train_images"], None), ("test", data["validation_images"], seed))
    return tuple(
        images.SparseFields(
            images.open_images(data["source"], split, data["size"], limit),
            data["observed"],
            data["queries"],
            seed=split_seed,
        )
        for split, limit, split_seed in splits
    )


def training_folder(run, name):
    """Folder of a training of a notebook: <name>-<digest of settings>, so that other settings get another."""
    text = json.dumps(run.settings, sort_keys=True)
    return run.runs / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def title(run, text):
    """`text` with the preset, for the title of a figure."""
    return f"{text} [{run.preset}]"


def save_figure(run, figure, name):
    """Write a matplotlib figure as <notebook>_<name>.png and return it, for the last line of a cell to show.

    It goes to figures/, which is committed; under "smoke" to the run's own folder: CI overwrites nothing.
    """
    folder = run.runs if run.preset == "smoke" else run.figures
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{run.notebook}_{name}.png", dpi=120, bbox_inches="tight")
    return figure


def checkpoint_or_train(folder, train):
    """The model saved in `folder` if there is one, else what `train()` returns; both print which it was.

    `train` may train or hand over what was trained before.

    Raises ValueError (of `models.load_model`) when the folder is there but holds no readable model.
    """
    folder = Path(folder)
    if folder.exists():
        print(f"loaded {folder.name} from {folder.parent.name}/")
        return models.load_model(folder)
    print(f"no {folder.parent.name}/{folder.name}: the model is one trained here instead")
    return train()
