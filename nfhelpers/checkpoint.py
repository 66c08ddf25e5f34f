"""Files of a run, whole at any moment: a temporary file, fsync, rename. safetensors and JSON, no pickle.

A kill or a full disk leaves the old file or the new one, never half of one.
"""

import json
import os
import shutil
from collections import defaultdict
from contextlib import contextmanager

import filelock
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


@contextmanager
def one_run(folder):
    """One run at a time in this folder, which is made; the system frees the lock of a process that dies."""
    folder.mkdir(parents=True, exist_ok=True)
    try:  # each of several processes holds a lock of its own
        with filelock.FileLock(folder / f"run{os.environ.get('RANK', 0)}.lock", timeout=0):
            yield folder
    except filelock.Timeout:
        raise ValueError(f"another run trains in {folder}; pass another folder") from None


def _sync(path):
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # which Windows asks for
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path, write):
    """Let write(temporary path) make a file, then give it this name at once."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        _sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":
        _sync(path.parent)


def save_model(model, folder, card):
    """`save_pretrained` with a card of our own; a whole model stays in `folder` whenever one was there."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        model.save_pretrained(temporary)
        (temporary / "README.md").write_text(card, encoding="utf-8", errors="backslashreplace")
        for file in temporary.iterdir():
            _sync(file)
        if not folder.exists():
            os.replace(temporary, folder)
        else:  # file by file: a run has one config, so no two models mix
            for file in sorted(temporary.iterdir()):
                os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save_state(path, model, ema, optimizer, history, details):
    """What a run resumes from: weights, their average, optimizer, dict of lists, and details as JSON."""
    state = optimizer.state_dict()["state"]
    parts = {"model": model.state_dict(), "ema": ema.state_dict()}
    parts["optimizer"] = {f"{number}.{key}": x for number in state for key, x in state[number].items()}
    parts["history"] = {name: torch.from_numpy(np.array(column)) for name, column in history.items()}
    tensors = {f"{part}.{name}": x.cpu().contiguous() for part in parts for name, x in parts[part].items()}
    metadata = {"nfhelpers": json.dumps(details)}
    replace_file(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def load_state(path, model, ema, optimizer, history, identity):
    """Restore what `save_state` wrote, if its details agree with `identity`; returns them, or {}."""
    if not path.exists():
        return {}
    parts, state = defaultdict(dict), defaultdict(dict)
    try:
        with safe_open(path, "pt") as file:
            details = json.loads(file.metadata()["nfhelpers"])
            for name in file.keys():
                part, _, rest = name.partition(".")
                parts[part][rest] = file.get_tensor(name)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}); restore it, or delete it to start again") from error
    there = {key: details.get(key) for key in identity}
    here = json.loads(json.dumps(identity))
    if changed := "; ".join(f"{k}={there[k]!r} there, {here[k]!r} here" for k in here if there[k] != here[k]):
        raise ValueError(f"{path} is of another run ({changed}); pass the same, or another folder")
    model.load_state_dict(parts["model"])
    ema.load_state_dict(parts["ema"])
    for name, tensor in parts["optimizer"].items():
        number, _, key = name.partition(".")
        state[int(number)][key] = tensor
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    history |= {name: tensor.tolist() for name, tensor in parts["history"].items()}
    return details
