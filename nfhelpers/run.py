"""A notebook's first call: preset, seed, device, precision and paths, resolved and printed in one place.

torch is imported where it is used: the command line checks its arguments without it.
"""

import contextlib
import difflib
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

from nfhelpers.files import plain

PRESETS = ("smoke", "demo", "gpu", "full")
SECTIONS = {  # notebook -> its section of presets.toml
    "01_ssm_basics": "ssm_basics", "02_flow_matching_v1": "v1", "03_multidirectional_scan": "multidir",
    "04_bidirectional_v2": "v2", "05_diffae_phase1": "diffae_phase1", "06_diffae_phase2": "diffae_phase2",
    "07_local_mamba": "localmamba",
}  # fmt: skip
STAND_INS = {  # source that neither lies in NF_DATA nor can be downloaded -> settings
    "cifar10": {("data", "source"): "photos"},
    "fsdd": {("data", "source"): "chirps", ("model", "num_classes"): 4, ("model", "data_std"): 0.65},
}


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
    runs: Path  # under "smoke" a new folder each time, so that every test trains

    @property
    def shipped(self):
        """Whether the notebook trains for show, then goes on with the weights in checkpoints/."""
        return self.preset in ("demo", "gpu")


def start(notebook, preset=None, overrides=None):
    """Resolve preset and settings of a notebook (its file name without .ipynb), seed, print what is used.

    overrides: {dotted key: value}, such as {"train.epochs": 2}, or that as text, as papermill passes it.
    """
    import numpy as np
    import torch

    from nfhelpers import kernels

    preset, device, section = resolve_preset(preset), default_device(), SECTIONS.get(notebook, notebook)
    settings = load_settings(section, preset, overrides)
    seed, runs = settings["seed"], repository_root() / "runs" / notebook / preset
    for seed_library in (random.seed, np.random.seed, torch.manual_seed):
        seed_library(seed)
    if preset == "smoke":
        runs.mkdir(parents=True, exist_ok=True)
        runs = Path(tempfile.mkdtemp(dir=runs))
    precision, backend = default_precision(device), kernels.choose_backend(device)
    about = f", about {m:g} min" if (m := _presets()["minutes"].get(preset, {}).get(section)) else ""
    print(f"preset    {preset}{about}\ndevice    {describe_device(device)}, {precision}\nbackend   {backend}")
    print(f"versions  {', '.join(map(' '.join, versions().items()))}\nseed      {seed}")
    source = settings.get("data", {}).get("source")
    if preset == "gpu" and source in STAND_INS and not _can_be_had(source):
        for (group, name), value in STAND_INS[source].items():
            settings[group][name] = value
        print(f"data      {settings['data']['source']}: {source} is not in NF_DATA and cannot be downloaded")
    elif source:
        print(f"data      {source}")
    return Run(notebook, preset, settings, seed, device, precision, backend, runs)


def resolve_preset(preset=None):
    """The argument, else NF_PRESET, else "auto": "gpu" on a GPU of 8 GB or more, else "demo"."""
    name = preset or os.environ.get("NF_PRESET") or "auto"
    if name not in (*PRESETS, "auto"):
        raise ValueError(f"preset={name!r} is unknown; pass one of {', '.join(PRESETS)} or auto")
    if name != "auto":
        return name
    import torch

    memory = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
    return "gpu" if memory >= 8e9 else "demo"


def _can_be_had(source):
    from nfhelpers import images, spectrograms

    load = spectrograms.load_spectrograms if source == "fsdd" else images.load_images
    try:
        return len(load(source, "test", 32, limit=1)) > 0
    except OSError:  # of the network, or of the folder
        return False


def _presets():
    return tomllib.loads(files("nfhelpers").joinpath("presets.toml").read_text(encoding="utf-8"))


def sections():
    """The sections of presets.toml: of notebooks, and of models that can be trained."""
    return [name for name in _presets() if name not in ("defaults", "minutes")]


def load_settings(section, preset, overrides=None):
    """A section and preset of presets.toml as nested dicts, with overrides {dotted key: value}."""
    if section not in sections():
        raise ValueError(f"{section!r} has no settings; pass one of {', '.join(sections())}")
    own, defaults = (_presets()[name] for name in (section, "defaults"))
    if "model" not in own:  # nothing is trained
        defaults = {"seed": defaults["seed"], preset: {}}
    settings = {}
    for table in (defaults, defaults[preset], own, own[preset]):
        for name, value in table.items():
            if name not in PRESETS:
                settings[name] = settings.get(name, {}) | value if isinstance(value, dict) else value
    with contextlib.suppress(ValueError):
        overrides = json.loads(overrides) if isinstance(overrides, str) else overrides
    if overrides and not isinstance(overrides, dict):
        raise ValueError(f'overrides={overrides!r}: pass a dict, or as JSON {{"train.epochs": 2}}')
    for key, value in (overrides or {}).items():
        group, _, name = str(key).rpartition(".")
        table = settings.get(group) if group else settings
        if not isinstance(table, dict) or isinstance(table.get(name, {}), dict):
            known = [f"{group}.{name}" for group, x in settings.items() if isinstance(x, dict) for name in x]
            near = difflib.get_close_matches(str(key), known, 4, 0.4) or known
            raise ValueError(f"{key!r} is no setting of {section}; did you mean {', '.join(near)}?")
        kind, value = type(table[name]), plain(value)
        value = kind(value) if (type(value), kind) in ((int, float), (tuple, list)) else value
        if type(value) is not kind:
            raise ValueError(f"{key}={value!r} does not fit; pass a {kind.__name__} such as {table[name]!r}")
        table[name] = value
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

    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


def describe_device(device):
    """One line on a device: its name and memory, or the CPU's threads."""
    import torch

    if torch.device(device).type != "cuda":
        return f"{device} ({(n := torch.get_num_threads())} thread{'s' * (n > 1)})"
    gpu = torch.cuda.get_device_properties(device)
    return f"{device} ({gpu.name}, {gpu.total_memory / 2**30:.0f} GiB)"


def versions():
    """Versions that decide results, of what is installed."""
    found = {"python": platform.python_version()} | {p.name: p.version for p in distributions()}
    return {x: found[x] for x in ("python", "nfhelpers", "torch", "triton", "mamba_ssm") if x in found}


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
    """Folder of a training: <name>-<digest of settings>, so that other settings get another."""
    text = json.dumps(run.settings, sort_keys=True)
    return run.runs / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def title(run, text):
    """`text` with the preset, for the title of a figure."""
    return f"{text} [{run.preset}]"


def save_figure(run, figure, name):
    """Write a figure as <notebook>_<name>.png into build/figures; returns it, for a cell to show."""
    folder = run.runs if run.preset == "smoke" else repository_root() / "build" / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{run.notebook}_{name}.png", dpi="figure", bbox_inches="tight")
    return figure
