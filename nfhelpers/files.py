"""Data on disk, pictures or sounds: where it lies, the files of a folder, and its splits."""

import hashlib
import os
import re
import warnings
from pathlib import Path

SPLITS = ("train", "validation", "test")
SPELLING = re.compile(r"(train|val|test)(ing|id|idation)?[ _-]?(set|data|images|\d+)?", re.IGNORECASE)


def data_folder() -> Path:
    """Where data sets are looked for and kept: $NF_DATA, else the user's cache folder."""
    import pooch

    return Path(os.environ.get("NF_DATA") or pooch.os_cache("nfhelpers")).expanduser()


def source_path(source, names, split):
    """A built-in name as it is; anything else as a path, which exists."""
    path = Path(source).expanduser()
    if split not in SPLITS or (source not in names and not path.exists()):
        expected = f"{', '.join(names)} or a path that exists, and {', '.join(SPLITS)}"
        raise ValueError(f"source={str(source)!r}, split={split!r}; pass {expected}")
    if source in names and path.exists():
        warnings.warn(f"{source!r} is the built-in source; pass './{source}' for the folder", stacklevel=4)
    return source if source in names else path


def split_of(name):
    """The split that a folder or an array is named after, such as "validation" of "Val", or None."""
    found = SPELLING.fullmatch(name)
    return found and next(split for split in SPLITS if split.startswith(found[1].lower()))


def split_files(folder, suffixes):
    """Files with these suffixes as {split: [(name, path), ...]}, in the order of their hashed names;
    {None: [...]} where no folder is named after a split. Hidden files are skipped, links followed."""
    found, others = {}, []
    for base, folders, names in os.walk(folder, followlinks=True):
        circle = os.path.realpath(base) in map(os.path.realpath, Path(base).parents)
        folders[:] = [name for name in folders if not (circle or name.startswith("."))]
        for path in (Path(base, name) for name in names if not (circle or name.startswith("."))):
            *above, name = path.relative_to(folder).parts
            split = next(filter(None, map(split_of, above)), None)
            name = "/".join([*(part for part in above if not split_of(part)), name])
            kept = found.setdefault(split, []) if path.suffix.lower() in suffixes else others
            kept.append((name, path))
    left_out(path for _, path in others + (found.pop(None, []) if len(found) > 1 else []))
    return {s: sorted(v, key=lambda x: hashlib.sha256(os.fsencode(x[0])).digest()) for s, v in found.items()}


def left_out(paths):
    """Warn of files that are not used."""
    if paths := sorted(map(str, paths)):
        warnings.warn(f"{len(paths)} files are left out, such as {paths[0]}", stacklevel=2)


def take_split(found, split, name, held_out=False):
    """The items of a split of {split: items}, or of {None: all}, whose first tenth is then test.
    Where no validation is found it is the last tenth of train, which train lacks if `held_out`."""
    if None in found:
        tests = max(1, round(len(found[None]) / 10))
        found = {"test": found[None][:tests], "train": found[None][tests:]}
    if "train" in found and "validation" not in found:
        items = found["train"]
        first = len(items) - max(1, round(len(items) / 10))
        found = found | {"train": items[:first] if held_out else items, "validation": items[first:]}
    if len(found.get(split, ())) == 0:
        counts = ", ".join(f"{len(items)} of {known}" for known, items in found.items())
        raise ValueError(f"{name} holds {counts or 'nothing that can be used'}; {split!r} needs one at least")
    return found[split]
