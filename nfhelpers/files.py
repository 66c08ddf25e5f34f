"""Data on disk, pictures or sounds: where it lies, the files of a folder or an archive, and its splits."""

import hashlib
import os
import re
import warnings
import zipfile
from pathlib import Path

SPLITS = ("train", "validation", "test")
# Words for splits as Hugging Face datasets has them, by their first letters.
WORD = r"(train(?:ing)?|val(?:id(?:ation|ate)?)?|dev|test(?:ing|s)?|eval(?:uation)?)"
MEANING = {"tra": "train", "val": "validation", "dev": "validation", "tes": "test", "eva": "test"}
# One digit at a time: to repeat what repeats takes forever to find that it does not fit.
MORE = r"(?:set|split|data|im(?:age|g)s?|pictures?|photos?|wavs?|audio|recordings?|[xab]|\d)"
FOLDER = re.compile(rf"(?:^|(?<=/))(?:{MORE}[ ._-]*)*{WORD}(?:[ ._-]*{MORE})*/", re.IGNORECASE)
INSIDE = re.compile(rf"[ ._-]*(?<![a-z]){WORD}(?![a-z])[ ._-]*", re.IGNORECASE)
# Names with a dot, and what systems put beside a user's files: thumbnails, resource forks, deleted files.
SYSTEMS = r"(__MACOSX|@eaDir|#recycle|\$RECYCLE\.BIN|lost\+found)/|(Thumbs\.db|desktop\.ini)$"
HIDDEN = re.compile(rf"(^|/)(\.|{SYSTEMS})", re.IGNORECASE)


def data_folder() -> Path:
    """Where data sets are looked for and kept: $NF_DATA, else the user's cache folder."""
    import pooch

    return Path(os.path.expanduser(os.environ.get("NF_DATA") or pooch.os_cache("nfhelpers")))


def plain(value):
    """Numbers and arrays of NumPy, also in a list, as Python's: settings go into JSON."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return type(value)(map(plain, value)) if isinstance(value, list | tuple) else value


def config_of(folder) -> Path:
    """config.json of a saved model."""
    if not (path := Path(folder, "config.json")).is_file():
        inside = ", ".join(sorted(str(found.parent) for found in Path(folder).glob("*/config.json")))
        inside = inside or "no config.json; pass a folder with that and model.safetensors"
        raise ValueError(f"{folder} is no saved model; it holds {inside}")
    return path


def source_path(source, names, split):
    """A built-in name as it is; anything else as a path, which exists."""
    path = Path(os.path.expanduser(source))
    if split not in SPLITS or (source not in names and not path.exists()):
        expected = f"{', '.join(names)} or a path that exists, and {', '.join(SPLITS)}"
        raise ValueError(f"source={str(source)!r}, split={split!r}; pass {expected}")
    if source in names and path.exists():
        warnings.warn(f"{source!r} is the built-in source; pass './{source}' for the folder", stacklevel=4)
    return source if source in names else path


def split_of(path, spelling=FOLDER):
    """The split that a folder of a path "a/Val/1.png" is named after, such as "validation", or None."""
    found = spelling.search(path)
    return MEANING[found[1][:3].lower()] if found else None


def split_files(source, usable):
    """The files of a folder or zip archive for which usable(path) as {split: [(name, path), ...]}, in the
    order of their hashed names; {None: [...]} where no folder, nor each file, is named after a split.
    Hidden files are skipped, links followed, what is left out is said."""
    if not source.is_file():
        listed = _walk(source)
    elif zipfile.is_zipfile(source):
        archive = zipfile.ZipFile(source)
        listed = ((x, zipfile.Path(archive, x)) for x in archive.namelist() if not x.endswith("/"))
    else:
        raise ValueError(f"{source} is no folder and no zip archive; of single files pass the folder")
    files = [(name, path) for name, path in listed if not HIDDEN.search(name)]
    kept = [(name, path) for name, path in files if usable(path)]
    inside = {split_of(name, INSIDE) for name, _ in kept}
    spelling = FOLDER if None in inside or len(inside) < 2 or any(split_of(x) for x, _ in kept) else INSIDE
    found = {}
    for name, path in kept:
        found.setdefault(split_of(name, spelling), []).append((spelling.sub("", name), path))
    strays = found.pop(None, []) if len(found) > 1 else []
    left_out({str(path) for _, path in files + strays} - {str(path) for x in found.values() for _, path in x})
    return {s: sorted(v, key=lambda x: hashlib.sha256(os.fsencode(x[0])).digest()) for s, v in found.items()}


def _walk(root):
    """(name, path) of all files; what is linked twice or in a circle comes once, in a split if it can."""
    seen, closed = set(map(str, Path(root).resolve().parents)), []
    for base, folders, names in os.walk(root, onerror=closed.append, followlinks=True):
        real = os.path.realpath(base)
        shown = [f"{name}/" for name in folders if real not in seen and not HIDDEN.search(f"{name}/")]
        folders[:] = [name[:-1] for name in sorted(shown, key=lambda name: (split_of(name) is None, name))]
        for path in (os.path.join(base, name) for name in names if real not in seen):
            yield path[len(os.path.join(root, "")) :].replace(os.sep, "/"), Path(path)
        seen.add(real)
    left_out(f"{error.filename} ({error.strerror})" for error in closed)


def left_out(paths):
    """Warn of files that are not used."""
    if paths := sorted(map(str, paths)):
        more = f" and {len(paths) - 20} more" if len(paths) > 20 else ""
        warnings.warn(f"left out: {'; '.join(paths[:20])}{more}", stacklevel=2)


def read_usable(read, items, count=None):
    """read(item) of items up to `count` results; those that cannot be read are left out, unless all are."""
    found, errors = [], []
    for item in items:
        try:
            found.append(read(item))
        except (ValueError, OSError) as error:
            errors.append(error)
        if len(found) == count:
            break
    if errors and not found:
        raise errors[0]
    left_out(errors)
    return found


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
