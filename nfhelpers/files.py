"""Data on disk, pictures or sounds: where it lies, the files of a folder, and its splits."""

import hashlib
import os
import warnings
from pathlib import Path

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val"),
    "test": ("test", "testing"),
}
"""Splits, and the names of their folders and arrays in lower case."""


def data_folder() -> Path:
    """Where data sets are looked for and kept: $NF_DATA, else the user's cache folder."""
    import pooch

    return Path(os.environ.get("NF_DATA") or pooch.os_cache("nfhelpers")).expanduser()


def source_path(source, names, split):
    """A built-in name as it is; anything else as a path, which exists."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is unknown; pass one of {', '.join(SPLITS)}")
    if source in names and os.path.exists(source):
        warnings.warn(f"{source!r} is the built-in source; pass './{source}' for the folder", stacklevel=4)
    if source not in names and not Path(source).expanduser().exists():
        raise ValueError(f"source={str(source)!r} is unknown; pass {', '.join(names)} or a path that exists")
    return source if source in names else Path(source).expanduser()


def split_of(name):
    """The split that is spelled so, or None."""
    return next((split for split, names in SPLITS.items() if name.lower() in names), None)


def split_files(folder, suffixes):
    """Files with these suffixes as {split: [(name, path), ...]}, in the order of the hashes of their names.

    {None: [...]} where no folder is named after a split. Hidden files and folders are skipped, linked folders
    are followed.
    """
    found, others = {}, []
    for base, folders, names in os.walk(folder, followlinks=True):
        circle = os.path.realpath(base) in map(os.path.realpath, Path(base).parents)
        folders[:] = [name for name in folders if not (circle or name.startswith("."))]
        for path in (Path(base, name) for name in names if not (circle or name.startswith("."))):
            name = path.relative_to(folder).as_posix()
            top, _, rest = name.partition("/")
            if path.suffix.lower() not in suffixes:
                others.append(name)
            else:
                split = split_of(top) if rest else None
                found.setdefault(split, []).append((rest if split else name, path))
    left_out(folder, others + [name for name, _ in (found.pop(None, []) if len(found) > 1 else [])])
    return {s: sorted(v, key=lambda x: hashlib.sha256(os.fsencode(x[0])).digest()) for s, v in found.items()}


def left_out(folder, names):
    """Warn of files that are not used."""
    if names:
        warnings.warn(f"{folder}: {len(names)} files are left out, such as {min(names)}", stacklevel=5)


def take_split(found, split, name):
    """The items of a split of {split: items}, or of {None: all}, whose first tenth is then test.

    Where no validation is found it is the last tenth of train, which loses it.
    """
    if None in found:
        tests = max(1, round(len(found[None]) / 10))
        found = {"test": found[None][:tests], "train": found[None][tests:]}
    if "train" in found and "validation" not in found:
        held = max(1, round(len(found["train"]) / 10))
        found = found | {"train": found["train"][:-held], "validation": found["train"][-held:]}
    if len(found.get(split, ())) == 0:
        counts = ", ".join(f"{len(items)} of {known}" for known, items in found.items())
        raise ValueError(f"{name} holds {counts or 'nothing that can be used'}; {split!r} needs one at least")
    return found[split]
