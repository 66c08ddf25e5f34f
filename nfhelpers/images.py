"""Image sources, pixel-centre grids and sparse fields.

Images are uint8 `(N, H, W, 3)` here, values are [0, 1] outside models and [-1, 1] inside them, coordinates
are `(x, y)` pixel centres in [0, 1] in row-major order.

Sources of `load_images`:

- `"photos"`: windows of photographs that the scikit-image and scikit-learn packages install; no download.
- `"cifar10"`: the official binary archive (Krizhevsky, 2009), downloaded once into a cache folder.
- a folder that holds CIFAR-10 `.bin` batches of any length.
- a folder of images, or of `.tar` shards of images, or an `.npz` file.

`StreamedImages` reads folders and shards item by item, where they do not fit in memory.
"""

import functools
import hashlib
import importlib.util
import io
import itertools
import math
import numbers
import operator
import os
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import filelock
import numpy as np
import pooch
import requests
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset
from tqdm.auto import tqdm

__all__ = [
    "SparseFields",
    "StreamedImages",
    "area_resize",
    "data_folder",
    "grid_coords",
    "load_images",
    "observe",
    "open_images",
    "to_image",
    "to_model",
]

SPLITS = ("train", "test")

# name -> (package, path inside it, side of the smallest window). Left out among the installed colour
# pictures: hubble_deep_field (point sources: a pixel says nothing of its neighbours), color and logo (drawn,
# not photographed), motorcycle_right (the same scene as motorcycle_left). The retina is smooth at its native
# 1411 pixels, so its windows start at 384.
_PHOTOS = {
    "astronaut": ("skimage", "data/astronaut.png", 128),
    "motorcycle": ("skimage", "data/motorcycle_left.png", 128),
    "rocket": ("skimage", "data/rocket.jpg", 128),
    "ihc": ("skimage", "data/ihc.png", 128),
    "retina": ("skimage", "data/retina.jpg", 384),
    "flower": ("sklearn", "datasets/images/flower.jpg", 128),
    "china": ("sklearn", "datasets/images/china.jpg", 128),
    "coffee": ("skimage", "data/coffee.png", 128),
    "chelsea": ("skimage", "data/chelsea.png", 128),
}
_DISTRIBUTION = {"skimage": "scikit-image", "sklearn": "scikit-learn"}
# One turn of the training photographs: the more detail one has, the more often it comes.
_TRAIN_CYCLE = (
    "astronaut motorcycle flower ihc motorcycle astronaut rocket "
    "motorcycle ihc flower astronaut motorcycle rocket retina"
).split()
_TEST_PHOTOS = ("china", "coffee", "chelsea")
_TEST_SIDES = (128, 160, 192, 224, 256)
_TEST_CONTRAST = 10.0  # grey levels: a test window of less (empty sky) would measure nothing
PHOTO_MAX_SIZE = 128  # side of the smallest window: larger ground truth would be upsampled
PHOTO_TRAIN_COUNT = 4096
PHOTO_TEST_COUNT = 64
_PHOTO_SEED = 20231201
# Six photographs have few colours; any order of the channels is a plausible one.
_CHANNEL_ORDERS = [list(order) for order in itertools.permutations(range(3))]

CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
CIFAR10_BYTES = 170_052_171
_CIFAR10_ARCHIVE = "cifar-10-binary.tar.gz"
_CIFAR10_FOLDER = "cifar-10-batches-bin"
_CIFAR10_RECORD = 1 + 3 * 32 * 32  # label, then red, green and blue planes
_CIFAR10_PATTERN = {"train": "data_batch*.bin", "test": "test_batch*.bin"}

_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
# Modes whose conversion to 8-bit RGB keeps the intensities; 16-bit, integer and float ones would be clipped.
_IMAGE_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
_TEST_FRACTION = 0.1
STREAM_BYTES = 2**31
"""Bytes of decoded images from which `open_images` reads a folder item by item."""


def load_images(
    source: str | os.PathLike, split: str = "train", size: int = 32, limit: int | None = None
) -> np.ndarray:
    """Load square images as uint8 `(N, size, size, 3)`, shrunk by area averaging, never enlarged.

    Args:
        source: one of

            - `"photos"`: windows of installed photographs, with sides of 128 pixels and more, so that `size`
              up to 128 is real ground truth. Split by photograph (train: astronaut, motorcycle, flower,
              rocket, ihc, retina; test: china, coffee, chelsea). Image i shows the same field at any `size`.
              Train windows are an endless deterministic sequence with flips, quarter turns and permuted
              colour channels (`limit=None` takes 4,096). The 64 test windows are as photographed; those of
              equal side do not overlap, those of different sides do, so they are not 64 independent samples.
            - `"cifar10"`: $NF_DATA/cifar-10-batches-bin where that exists, else the official binary archive
              (Krizhevsky, 2009), downloaded into $NF_DATA or the user's cache folder, resumed when
              interrupted, MD5-checked. `size` is at most 32.
            - a folder with `.bin` batches in CIFAR-10's format, of any length: `data_batch*.bin`,
              `test_batch*.bin`.
            - a folder of images (png, jpg, jpeg, webp, bmp; subfolders too). Subfolders `train` and `test`
              are the splits where either is present; otherwise the tenth of the files whose names have the
              smallest hashes is test. Order: by that hash. Each image is cropped to its central square.
            - a folder of `.tar` shards, as WebDataset has them: not compressed; members that end like images,
              others (`.cls`, `.json`) are passed over. Split, order and crop as in a folder of images, with
              `shard.tar/member` as the name. The index of a shard is kept in $NF_DATA or the user's cache.
            - an `.npz` file: arrays `train` and `test`, or `images`, or the only 4-D array, uint8
              `(N, H, W, 3)`; or `bytes` (uint8, encoded image files back to back) with `offsets` (N + 1
              integers). Without `train` and `test` arrays, a tenth is test and the order is a fixed
              permutation, because files are often sorted by class. Nothing pickled is read.
        split: "train" or "test".
        size: side in pixels.
        limit: take the first `limit` images (all of them if there are fewer).

    Raises ValueError for an unknown source, split, size or limit, a size above the ground truth, a folder
    without images, an unreadable or damaged file; ModuleNotFoundError or FileNotFoundError for a photograph
    that is not installed; ConnectionError when CIFAR-10 cannot be downloaded.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is unknown; pass one of {', '.join(map(repr, SPLITS))}")
    size = _positive_int("size", size, 32)
    limit = None if limit is None else _positive_int("limit", limit, 64)
    if not isinstance(source, str | os.PathLike):
        raise ValueError(f"source is {type(source).__name__}; {_legal_sources()}")
    if source == "photos":
        return _load_photos(split, size, limit)
    if source == "cifar10":
        _check_size("cifar10", size, 32)
        return _load_bin(_cifar10_folder(), split, size, limit)
    path = Path(source).expanduser()
    if path.is_file() and path.suffix == ".npz":
        return _load_npz(path, split, size, limit)
    if path.is_dir():
        if any(path.glob("*.bin")):
            _check_size(str(path), size, 32)
            return _load_bin(path, split, size, limit)
        return StreamedImages(path, split, size, limit)[:]
    raise ValueError(f"source={str(source)!r} is unknown; {_legal_sources()}")


def open_images(
    source: str | os.PathLike, split: str = "train", size: int = 32, limit: int | None = None
) -> "np.ndarray | StreamedImages":
    """The images of `load_images`, read item by item where they are shards or above STREAM_BYTES decoded.

    Arguments and errors are those of `load_images`; errors of single images come when these are read.
    """
    path = Path(source).expanduser() if isinstance(source, str | os.PathLike) else None
    named = source in ("photos", "cifar10") or path is None
    if named or not path.is_dir() or any(path.glob("*.bin")):
        return load_images(source, split, size, limit)
    streamed = StreamedImages(path, split, size, limit)
    fits = math.prod(streamed.shape) < STREAM_BYTES and not streamed.sharded
    return streamed[:] if fits else streamed


class StreamedImages(Sequence):
    """The images of a folder, or of the `.tar` shards in a folder, read when they are asked for.

    A sequence of uint8 `(size, size, 3)` with the `shape` `(N, size, size, 3)`; a slice is an array. It holds
    file names and offsets only, so `SparseFields` of it can be read by any number of data loader workers, in
    any order: the shuffled epochs of `train.fit` and its exact resume are those of images in memory. The
    images, their order and split are those of `load_images`. `sharded` says whether they lie in shards.

    Arguments and errors are those of `load_images` for such a folder, but that an image which is damaged or
    smaller than `size` is an error (ValueError) when it is read.
    """

    def __init__(
        self, folder: str | os.PathLike, split: str = "train", size: int = 32, limit: int | None = None
    ):
        if split not in SPLITS:
            raise ValueError(f"split={split!r} is unknown; pass one of {', '.join(map(repr, SPLITS))}")
        self.size = _positive_int("size", size, 32)
        limit = None if limit is None else _positive_int("limit", limit, 64)
        folder = Path(folder).expanduser()
        divided = any((folder / name).is_dir() for name in SPLITS)
        base = folder / split if divided else folder
        shards = sorted(base.rglob("*.tar"))
        self.sharded = bool(shards)
        found = [file for file in base.rglob("*") if file.suffix.lower() in _IMAGE_SUFFIXES]
        loose = [file for file in found if file.is_file()]
        if shards and loose:
            raise ValueError(
                f"{base} holds .tar shards ({shards[0].name} ...) and loose images ({loose[0].name} ...); "
                "keep one of the two there"
            )
        if shards:
            self._files, names, places = shards, *_index_shards(shards, base)
        else:
            self._files = loose
            names = [file.relative_to(base).as_posix() for file in self._files]
            places = np.array([(number, 0, -1) for number in range(len(names))])  # whole files
        if not names:
            raise ValueError(
                f"{base} holds no image; put files ending in {', '.join(_IMAGE_SUFFIXES)} there, or .tar "
                "shards of such files"
            )
        order = sorted(range(len(names)), key=lambda i: hashlib.sha256(names[i].encode()).digest())
        order = (order if divided else _split(order, split, folder))[:limit]
        self._places = places[order]  # (N, 3) file, first byte, length
        self.shape = (len(order), self.size, self.size, 3)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int | slice) -> np.ndarray:
        if isinstance(index, slice):
            return np.stack([self[i] for i in range(*index.indices(len(self)))])
        number, start, length = self._places[operator.index(index)].tolist()
        file = self._files[number]
        with open(file, "rb") as opened:
            opened.seek(start)
            data = opened.read(length)
        name = f"{file}, the member at byte {start}," if self.sharded else file
        return _shrunk(name, data, self.size)


def _index_shards(shards, base):
    """The images in .tar files: their names, and (N, 3) shard, first byte, length."""
    names, places = [], []
    for number, shard in enumerate(shards):
        members, spans = _index_shard(shard)
        names += [f"{shard.relative_to(base).as_posix()}/{member}" for member in members]
        places.append(np.column_stack([np.full(len(members), number), spans]))
    return names, np.concatenate(places)


def _index_shard(shard):
    """The images in one .tar file: their names, and (N, 2) first byte, length; from a cache the next time."""
    stat = shard.stat()
    key = hashlib.sha256(f"{shard.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()
    cached = data_folder() / "shards" / f"{key}.npz"
    if cached.exists():
        with np.load(cached, allow_pickle=False) as arrays:
            return arrays["names"].tolist(), arrays["spans"]
    try:
        with tarfile.open(shard, "r:") as tar:
            members = [
                member
                for member in tqdm(tar, desc=f"index of {shard.name}", unit="file", disable=None)
                if member.isfile() and member.name.lower().endswith(_IMAGE_SUFFIXES)
            ]
        with shard.open("rb") as file:
            file.seek(tar.offset)  # where tarfile found no further header, which a damaged one is to it, too
            if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                raise tarfile.ReadError(f"no end mark at byte {tar.offset}, after {len(members)} images")
    except tarfile.TarError as error:
        raise ValueError(
            f"{shard} cannot be read as a .tar file ({error}): truncated, damaged or compressed; pass a "
            "whole, plain one"
        ) from error
    names = [member.name for member in members]
    spans = np.array([(member.offset_data, member.size) for member in members], np.int64).reshape(-1, 2)
    cached.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=cached.parent, suffix=".npz", delete=False) as scratch:
        np.savez(scratch, names=np.array(names, np.str_), spans=spans)
    os.replace(scratch.name, cached)  # several processes may write the same
    return names, spans


def load_image(source, size: int = 32, crop: float = 0.5) -> np.ndarray:
    """One image as a square of its full height or width, shrunk by area averaging: uint8 (size, size, 3).

    source: path of an image file, the bytes of one, or a uint8 array (H, W, 3). size: side in pixels. crop:
    where the square lies on the longer side, from 0 (left or top) over 0.5 (centre) to 1.

    Raises ValueError for what is no image, a size above its shorter side and a crop outside [0, 1].
    """
    size = _positive_int("size", size, 32)
    if not 0 <= crop <= 1:
        raise ValueError(f"crop={crop!r} is outside [0, 1]; pass a position such as 0.5, the centre")
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[-1] != 3:
            raise ValueError(f"source is {source.dtype} {source.shape}; pass uint8 (H, W, 3)")
        name, image = "the image", source
    elif isinstance(source, bytes):
        name, image = "the image", _decode("the image", source)
    else:
        name, image = str(source), _decode(source, Path(source).expanduser())
    _check_size(name, size, min(image.shape[:2]))
    return area_resize(_square(image, crop), size)


def area_resize(images: np.ndarray, size: int) -> np.ndarray:
    """Shrink square images: each output pixel is the mean of exactly the area that it covers.

    `images` is uint8 `(..., S, S, 3)` with S >= `size`; returns uint8 `(..., size, size, 3)`. Where `size`
    does not divide S, a pixel on a border counts by the fraction covered.
    Raises ValueError for another dtype or shape, or a `size` above S.
    """
    images = np.asarray(images)
    if (
        images.dtype != np.uint8
        or images.ndim < 3
        or images.shape[-1] != 3
        or images.shape[-2] != images.shape[-3]
    ):
        raise ValueError(f"images are {images.dtype} {images.shape}; pass uint8 (..., S, S, 3)")
    side = images.shape[-2]
    size = _positive_int("size", size, 32)
    _check_size("the image", size, side)
    if size == side:
        return images
    return _area_mean(_summed_area(images), size)


def grid_coords(height: int, width: int) -> torch.Tensor:
    """Pixel centres `(x, y) = ((i + 0.5)/width, (j + 0.5)/height)`, row-major: float32 `(height*width, 2)`.

    Grids of different sizes sample the same field: the mean of the four centres of a 64 x 64 grid inside a
    cell of the 32 x 32 grid is that cell's centre. Raises ValueError unless both sides are positive integers.
    """
    height = _positive_int("height", height, 32)
    width = _positive_int("width", width, 32)
    x = (torch.arange(width, dtype=torch.float32) + 0.5) / width
    y = (torch.arange(height, dtype=torch.float32) + 0.5) / height
    rows, columns = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([columns, rows], dim=-1).reshape(-1, 2)  # (H*W, 2)


def to_model(image):
    """Map uint8 or floats in [0, 1], any shape, to floats in [-1, 1]; tensors stay tensors, arrays arrays.

    uint8 becomes float32, floats keep their dtype. Raises ValueError for other dtypes and for values that are
    outside [0, 1] or not finite.
    """
    is_tensor = isinstance(image, torch.Tensor)
    if not is_tensor:
        image = np.asarray(image)
    if image.dtype in (torch.uint8, np.uint8):
        return (image.float() if is_tensor else image.astype(np.float32)) / 127.5 - 1
    _check_float("image", image)
    smallest, largest = (float(image.min()), float(image.max())) if 0 not in image.shape else (0.0, 1.0)
    if not (smallest >= -1e-4 and largest <= 1 + 1e-4):
        raise ValueError(f"image has values in [{smallest:g}, {largest:g}]; pass uint8, or floats in [0, 1]")
    return image * 2 - 1


def to_unit(images):
    """uint8, or floats that are checked to be in [0, 1], any shape, as a float32 array in [0, 1]."""
    images = images.numpy() if isinstance(images, torch.Tensor) else np.asarray(images)
    if images.dtype == np.uint8:
        return images.astype(np.float32) / 255
    if images.dtype.kind != "f" or not (images.min() >= 0 and images.max() <= 1):  # NaN fails, too
        raise ValueError(f"images are {images.dtype} and not all in [0, 1]; pass uint8, or floats in [0, 1]")
    return images.astype(np.float32)


def to_image(values):
    """Map floats in [-1, 1], any shape, to [0, 1], clipping what a model put outside.

    Tensors stay tensors, arrays arrays, and the dtype is kept. Raises ValueError for a dtype that is not
    floating point.
    """
    if isinstance(values, torch.Tensor):
        _check_float("values", values)
        return ((values + 1) / 2).clamp(0, 1)
    values = np.asarray(values)
    _check_float("values", values)
    return np.clip((values + 1) / 2, 0, 1)


def observe(
    image: np.ndarray | torch.Tensor, observed: float = 0.2, seed: int | Sequence[int] = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Observe a fraction of one image's pixels, drawn uniformly without replacement.

    Args:
        image: `(H, W, 3)`, uint8 or floats in [0, 1].
        observed: fraction of the pixels in (0, 1]; `max(1, round(observed*H*W))` are drawn.
        seed: integer >= 0 or several. `SparseFields(images, seed=s)[i]` has the inputs of seed `(s, i)`.

    Returns tensors `(input_coords (Ni, 2), input_values (Ni, 3), mask (H, W))`: pixel centres and values in
    [-1, 1], both float32 in row-major order, and a bool mask of the observed pixels.
    Raises ValueError for a wrong shape, fraction or seed.
    """
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[-1] != 3 or image.size == 0:
        raise ValueError(f"image has shape {image.shape}; pass one image (H, W, 3)")
    height, width, _ = image.shape
    observed = _fraction("observed", observed)
    count = max(1, round(observed * height * width))
    chosen, _ = _draw_pixels(height * width, count, 0, _seed_sequence(seed))
    values = torch.from_numpy(to_model(image.reshape(-1, 3)[chosen]).astype(np.float32))  # (Ni, 3)
    mask = torch.zeros(height * width, dtype=torch.bool)
    mask[chosen] = True
    return grid_coords(height, width)[chosen], values, mask.reshape(height, width)


class SparseFields(Dataset):
    """Sparse observations of images, and other pixels of them to predict (seed 002: 20% in, other 20% out).

    Item i is a dict of float32 tensors: `input_coords (Ni, 2)`, `input_values (Ni, 3)`, `query_coords
    (Nq, 2)`, `query_values (Nq, 3)`. Coordinates are pixel centres in [0, 1], values are in [-1, 1]. Both
    sets are in row-major order and share no pixel, unless `observed` is 1: then the queries are some of the
    observed pixels, or all, as an autoencoder of whole images has it. Counts are the same for every item:
    `max(1, round(fraction*H*W))`.

    The pixels are a function of `(seed, i)`, or with `seed=None`, for training, of `(epoch, i)`: `set_epoch`
    draws afresh. They depend neither on the worker nor on the process that asks, and `set_epoch` reaches
    persistent workers.

    Args:
        images: uint8 `(N, H, W, 3)`, array or tensor, or `StreamedImages`.
        observed, queries: fractions in (0, 1], together at most 1 or `observed` 1.
        seed: integer >= 0 for fixed draws, None for draws by epoch.

    Raises ValueError for wrong images, fractions or seed.
    """

    def __init__(
        self,
        images: np.ndarray | torch.Tensor | StreamedImages,
        observed: float = 0.2,
        queries: float = 0.2,
        seed: int | None = None,
    ):
        if not isinstance(images, StreamedImages):
            images = np.asarray(images)
            if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or images.size == 0:
                raise ValueError(
                    f"images are {images.dtype} {images.shape}; pass uint8 (N, H, W, 3) with N >= 1"
                )
        observed, queries = _fraction("observed", observed), _fraction("queries", queries)
        if observed != 1 and observed + queries > 1 + 1e-9:
            raise ValueError(
                f"observed={observed:g} and queries={queries:g} are more than all pixels; "
                "pass fractions whose sum is at most 1, such as 0.2 and 0.2, or observed=1"
            )
        if seed is not None:
            seed = _non_negative_int("seed", seed)
        pixels = images.shape[1] * images.shape[2]
        self.num_inputs = max(1, round(observed * pixels))
        # Both halves of an odd number of pixels may round up: the inputs keep theirs.
        left = pixels if observed == 1 else pixels - self.num_inputs
        self.num_queries = min(max(1, round(queries * pixels)), left)
        if self.num_queries < 1:
            raise ValueError(
                f"observed={observed:g} leaves no query among {pixels} pixels; pass a fraction such as 0.2"
            )
        self.images = images
        self.seed = seed
        self.coords = grid_coords(images.shape[1], images.shape[2])
        # Shared memory: persistent DataLoader workers hold a copy of the dataset made before set_epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __copy__(self) -> "SparseFields":
        """The same images, at an epoch of its own."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__, _epoch=self._epoch.clone().share_memory_())
        return other

    def set_epoch(self, epoch: int) -> None:
        """Choose the draws of this epoch (no effect on a dataset with a seed); call it before iterating."""
        self._epoch.fill_(_non_negative_int("epoch", epoch))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        index = operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is outside the {len(self)} images")
        index %= len(self)
        if self.seed is None:
            sequence = np.random.SeedSequence((int(self._epoch), index), spawn_key=(1,))
        else:
            sequence = _seed_sequence((self.seed, index))
        pixels = self.images[index].reshape(-1, 3)  # (H*W, 3)
        inputs, queries = _draw_pixels(len(pixels), self.num_inputs, self.num_queries, sequence)
        return {
            "input_coords": self.coords[inputs],
            "input_values": torch.from_numpy(to_model(pixels[inputs])),
            "query_coords": self.coords[queries],
            "query_values": torch.from_numpy(to_model(pixels[queries])),
        }


def _draw_pixels(pixels, num_inputs, num_queries, sequence):
    """Two sets of pixel indices, each ascending; the first does not depend on the second's size.

    They are disjoint, unless the first has all pixels.
    """
    order = np.random.Generator(np.random.Philox(sequence)).permutation(pixels)
    rest = order if num_inputs == pixels else order[num_inputs:]
    return np.sort(order[:num_inputs]), np.sort(rest[:num_queries])


def _seed_sequence(seed):
    if isinstance(seed, Sequence) and not isinstance(seed, str) and len(seed) > 0:
        return np.random.SeedSequence([_non_negative_int("seed", part) for part in seed])
    return np.random.SeedSequence(_non_negative_int("seed", seed))


def _load_photos(split, size, limit):
    _check_size("photos", size, PHOTO_MAX_SIZE)
    windows = _train_windows(limit or PHOTO_TRAIN_COUNT) if split == "train" else _test_windows()[:limit]
    images = np.empty((len(windows), size, size, 3), np.uint8)
    for image, (name, top, left, side, symmetry, channels) in zip(images, windows, strict=True):
        table = _photo_table(name)[top : top + side + 1, left : left + side + 1]
        window = _area_mean(table, size)[..., channels]
        window = window.swapaxes(0, 1) if symmetry & 4 else window
        image[:] = np.rot90(window, symmetry & 3)
    return images


def _train_windows(count):
    """`count` windows (name, top, left, side, symmetry, channels); a larger count only appends."""
    draws = np.random.default_rng(_PHOTO_SEED).random((count, 5))
    windows = []
    for index, (zoom, down, right, turn, hue) in enumerate(draws):
        name = _TRAIN_CYCLE[index % len(_TRAIN_CYCLE)]
        height, width, _ = _photo(name).shape
        smallest, largest = _PHOTOS[name][2], min(height, width)
        # Log-uniform: each octave of scale is as frequent. A multiple of 32: its 32-pixel version is sharp.
        side = int(smallest * (largest / smallest) ** zoom) // 32 * 32
        top, left = int(down * (height - side + 1)), int(right * (width - side + 1))
        windows.append((name, top, left, side, int(turn * 8), _CHANNEL_ORDERS[int(hue * 6)]))
    return windows


def _test_windows():
    """Windows as `_train_windows` has them, but as photographed; each test photograph in turn."""
    rng = np.random.default_rng(_PHOTO_SEED)
    queues = []
    for name in _TEST_PHOTOS:
        height, width, _ = _photo(name).shape
        tiles = [
            (name, int(top), int(left), side, 0, [0, 1, 2])
            for side in _TEST_SIDES
            for top in _spread(height, side)
            for left in _spread(width, side)
            if _photo(name)[top : top + side, left : left + side].std(axis=(0, 1)).max() > _TEST_CONTRAST
        ]
        queues.append([tiles[i] for i in rng.permutation(len(tiles))])
    turns = range(max(map(len, queues)))
    return [queue[turn] for turn in turns for queue in queues if turn < len(queue)][:PHOTO_TEST_COUNT]


def _spread(length, side):
    """Starts of as many intervals of `side` as fit side by side into `length`, evenly spread over it."""
    count = length // side
    if count < 2:
        return [(length - side) // 2] * count
    return np.arange(count) * (length - side) // (count - 1)


@functools.cache
def _photo_table(name):
    return _summed_area(_photo(name))


@functools.cache
def _photo(name):
    package, path, _ = _PHOTOS[name]
    project = _DISTRIBUTION[package]
    spec = importlib.util.find_spec(package)  # located, not imported: scikit-learn takes long to import
    if spec is None:
        raise ModuleNotFoundError(f"source 'photos' needs {project}: pip install {project}")
    file = Path(spec.submodule_search_locations[0]) / path
    if not file.is_file():
        raise FileNotFoundError(
            f"source 'photos' needs {file}, which this {project} does not contain; "
            f"install the {project} pinned in constraints.txt"
        )
    image = _decode(file, file)
    image.flags.writeable = False
    return image


def _load_bin(folder, split, size, limit):
    files = sorted(folder.glob(_CIFAR10_PATTERN[split]))
    if not files:
        raise ValueError(
            f"{folder} holds no {_CIFAR10_PATTERN[split]}; split={split!r} needs at least one such file"
        )
    batches, wanted = [], limit
    for file in files:
        length = file.stat().st_size
        if length == 0 or length % _CIFAR10_RECORD:
            raise ValueError(
                f"{file} has {length} bytes, which is not a positive multiple of {_CIFAR10_RECORD} "
                "(label + 32*32*3): truncated, or not a CIFAR-10 binary batch; replace it"
            )
        records = length // _CIFAR10_RECORD if wanted is None else min(wanted, length // _CIFAR10_RECORD)
        batch = np.fromfile(file, np.uint8, records * _CIFAR10_RECORD).reshape(records, _CIFAR10_RECORD)
        batches.append(batch[:, 1:].reshape(records, 3, 32, 32).transpose(0, 2, 3, 1))  # (N, 32, 32, 3)
        wanted = None if wanted is None else wanted - records
    return _resize_all(np.concatenate(batches), size)


def _resize_all(images, size):
    # In pieces: area_resize works in float64, eight times the bytes of uint8.
    pieces = [area_resize(images[start : start + 1024], size) for start in range(0, len(images), 1024)]
    return np.ascontiguousarray(np.concatenate(pieces))


def data_folder():
    """Where data sets are looked for and kept: $NF_DATA, else the user's cache folder."""
    return Path(os.environ.get("NF_DATA") or pooch.os_cache("nfhelpers")).expanduser()


def _cifar10_folder():
    root = data_folder()
    folder = root / _CIFAR10_FOLDER
    if any(folder.glob("*.bin")):
        return folder
    root.mkdir(parents=True, exist_ok=True)
    archive = root / _CIFAR10_ARCHIVE
    # One process of a multi-GPU launch downloads, the others wait for it.
    with filelock.FileLock(f"{archive}.lock"):
        if not any(folder.glob("*.bin")):
            _fetch_cifar10(archive)
            _extract(archive, folder)
    return folder


def _fetch_cifar10(archive):
    """Make `archive` exist with the right MD5.

    An interrupted download stays as `<archive>.part` and is resumed. A complete one with a wrong hash is
    removed. An archive that the user put there is never removed.
    """
    if archive.exists():
        found = pooch.file_hash(str(archive), alg="md5")
        if found != CIFAR10_MD5:
            raise ValueError(
                f"{archive} ({archive.stat().st_size} bytes) has MD5 {found}, expected {CIFAR10_MD5} "
                f"({CIFAR10_BYTES} bytes): truncated or altered; delete it, then call again to download it"
            )
        return
    part = archive.with_name(archive.name + ".part")

    def downloader(url, output_file, _pooch):
        _resume_download(url, part)
        os.replace(part, output_file)  # pooch checks the hash of output_file, then renames or removes it

    try:
        pooch.retrieve(
            CIFAR10_URL, f"md5:{CIFAR10_MD5}", fname=archive.name, path=archive.parent, downloader=downloader
        )
    except (requests.RequestException, OSError) as error:
        have = part.stat().st_size if part.exists() else 0
        kept = f"{have} bytes are kept in {part}; the next call resumes from there. " if have else ""
        raise ConnectionError(
            f"CIFAR-10 could not be downloaded from {CIFAR10_URL} ({error}). {kept}"
            f"By hand: put that file ({CIFAR10_BYTES} bytes, MD5 {CIFAR10_MD5}) at {archive}, or its .bin "
            f"files into {archive.parent / _CIFAR10_FOLDER}. load_images('photos') needs no download."
        ) from error
    except ValueError as error:
        raise ValueError(
            f"{CIFAR10_URL} did not deliver the file with MD5 {CIFAR10_MD5}; the download was removed, "
            f"call again to repeat it ({error})"
        ) from error


def _resume_download(url, part):
    """Download `url` to the file `part`, continuing what it already holds when the server allows that."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"}  # the archive itself: a Range counts its bytes
    if have:
        headers["Range"] = f"bytes={have}-"
    with requests.get(url, headers=headers, stream=True, timeout=(10, 60)) as response:
        content_range = response.headers.get("Content-Range", "")
        if response.status_code == 416 and content_range == f"bytes */{have}":
            return  # nothing is missing
        if response.status_code == 416:
            part.unlink()  # longer than the file itself
            raise requests.RequestException(
                f"{part} did not fit the file on the server and was removed; call again"
            )
        response.raise_for_status()
        if not (response.status_code == 206 and content_range.startswith(f"bytes {have}-")):
            have = 0
        length = response.headers.get("Content-Length")
        total = None if length is None else have + int(length)
        with (
            open(part, "ab" if have else "wb") as file,
            tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=url.rsplit("/", 1)[-1]) as bar,
        ):
            for block in response.iter_content(1 << 16):
                file.write(block)
                bar.update(len(block))
    if total is not None and part.stat().st_size != total:
        raise requests.ConnectionError(f"connection closed at {part.stat().st_size} of {total} bytes")


def _extract(archive, folder):
    # Into a sibling first: a folder that exists is a whole one.
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        with tarfile.open(archive) as tar:
            tar.extractall(scratch, filter="data")
        extracted = Path(scratch) / _CIFAR10_FOLDER
        if not any(extracted.glob("*.bin")):
            raise ValueError(f"{archive} contains no {_CIFAR10_FOLDER}/*.bin")
        if folder.exists():
            folder.rmdir()  # empty, or _cifar10_folder would have used it
        os.replace(extracted, folder)


def _split(order, split, name):
    """The part of `order` (positions) that is the split: its first tenth, at least one, is test."""
    if len(order) < 2:
        raise ValueError(f"{name} holds one image; a train and a test split need at least 2")
    tests = max(1, round(_TEST_FRACTION * len(order)))
    return order[:tests] if split == "test" else order[tests:]


def _load_npz(path, split, size, limit):
    try:
        archive = np.load(path, allow_pickle=False)
        if isinstance(archive, np.ndarray):
            raise ValueError("it is a single .npy array; write it with numpy.savez")
        with archive:
            arrays = {key: archive[key] for key in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} cannot be read as .npz without pickle: {error}") from error
    four = [key for key, array in arrays.items() if array.ndim == 4]
    if split in arrays:
        images = arrays[split]
        order = range(len(images))
    elif "images" in arrays or len(four) == 1:
        images = arrays["images" if "images" in arrays else four[0]]
        order = _split(_permutation(len(images)), split, path)
    elif {"bytes", "offsets"} <= arrays.keys():
        return _load_encoded(path, arrays["bytes"], arrays["offsets"], split, size, limit)
    else:
        found = ", ".join(f"{key} {array.dtype} {array.shape}" for key, array in arrays.items())
        raise ValueError(
            f"{path} holds {found or 'nothing'}; split={split!r} needs an array of that name, 'images' or "
            "one 4-D array, uint8 (N, H, W, 3), or 'bytes' with 'offsets'"
        )
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or images.size == 0:
        raise ValueError(f"{path} holds images {images.dtype} {images.shape}; store uint8 (N, H, W, 3)")
    _check_size(str(path), size, min(images.shape[1:3]))
    return _resize_all(_square(images[order[:limit]]), size)


def _load_encoded(path, encoded, offsets, split, size, limit):
    """Images stored as encoded files back to back: file i is `encoded[offsets[i]:offsets[i + 1]]`."""
    if encoded.dtype != np.uint8 or encoded.ndim != 1:
        raise ValueError(f"{path}: 'bytes' is {encoded.dtype} {encoded.shape}; store uint8 (length,)")
    if offsets.dtype.kind not in "iu" or offsets.ndim != 1 or len(offsets) < 2:
        raise ValueError(
            f"{path}: 'offsets' is {offsets.dtype} {offsets.shape}; store integers (N + 1,), N >= 1"
        )
    if offsets[0] != 0 or offsets[-1] != len(encoded) or (offsets[1:] <= offsets[:-1]).any():
        raise ValueError(f"{path}: 'offsets' must increase from 0 to {len(encoded)}, the length of 'bytes'")
    order = _split(_permutation(len(offsets) - 1), split, path)[:limit]
    blobs = ((f"{path} image {i}", encoded[offsets[i] : offsets[i + 1]].tobytes()) for i in order)
    return _squares(blobs, size)


def _permutation(count):
    return np.random.default_rng(_PHOTO_SEED).permutation(count)


def _squares(named, size):
    """Decode pairs (name, file or bytes), crop to the central square and shrink: uint8 (N, size, size, 3)."""
    return np.stack([_shrunk(name, data, size) for name, data in named])


def _shrunk(name, data, size):
    """One of `_squares`."""
    image = _decode(name, data)
    _check_size(str(name), size, min(image.shape[:2]))
    return area_resize(_square(image), size)


def _square(images, crop=0.5):
    """The square of images (..., H, W, 3) at this position on the longer side, 0.5 the central one."""
    height, width = images.shape[-3:-1]
    side = min(height, width)
    top, left = int(crop * (height - side)), int(crop * (width - side))
    return images[..., top : top + side, left : left + side, :]


def _decode(name, data):
    """Decode an image file, or the bytes of one, to uint8 (H, W, 3), upright as its EXIF says."""
    try:
        with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as image:
            mode = image.mode
            if mode in _IMAGE_MODES:
                return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    # Pillow reports damaged files by any of these, depending on the format.
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} cannot be read as an image: {error}") from error
    raise ValueError(f"{name} has mode {mode}; convert it to 8 bits a channel, such as RGB")


def _summed_area(images):
    """Sums of images (..., S, S, 3) over all rows above and columns left: float64 (..., S+1, S+1, 3).

    The sum over any rectangle is a difference of four entries (Crow, 1984). Exact: integers below 2**53.
    """
    table = np.zeros((*images.shape[:-3], images.shape[-3] + 1, images.shape[-2] + 1, 3))
    table[..., 1:, 1:, :] = images
    return table.cumsum(axis=-3, out=table).cumsum(axis=-2, out=table)


def _area_mean(table, size):
    """Means over size x size equal cells of a square summed-area table (..., S+1, S+1, 3), as uint8."""
    side = table.shape[-2] - 1
    if side % size == 0:
        corners = table[..., :: side // size, :: side // size, :]  # (..., size+1, size+1, 3)
    else:
        # Inside a pixel the table is bilinear, so interpolating it is exact.
        edges = np.arange(size + 1) * (side / size)
        low = np.minimum(edges.astype(int), side - 1)
        part = (edges - low)[:, None]
        rows = table[..., low, :, :] * (1 - part[..., None]) + table[..., low + 1, :, :] * part[..., None]
        corners = rows[..., low, :] * (1 - part) + rows[..., low + 1, :] * part
    sums = np.diff(np.diff(corners, axis=-3), axis=-2)  # (..., size, size, 3)
    return np.rint(sums * (size / side) ** 2).astype(np.uint8)


def _legal_sources():
    return (
        "pass 'photos', 'cifar10', or an existing path: a folder of images, of .tar shards or of CIFAR-10 "
        ".bin batches, or an .npz file"
    )


def _check_size(name, size, largest):
    if size > largest:
        raise ValueError(
            f"size={size} is above the {largest} pixels that {name} has, and enlarged images are no ground "
            f"truth; pass size <= {largest}"
        )


def _check_float(name, x):
    floating = x.is_floating_point() if isinstance(x, torch.Tensor) else x.dtype.kind == "f"
    if not floating:
        raise ValueError(f"{name} has dtype {x.dtype}; pass floating point such as float32")


def _fraction(name, value):
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < value <= 1:
        raise ValueError(f"{name}={value!r} is outside (0, 1]; pass a fraction such as 0.2")
    return float(value)


def _positive_int(name, value, example):
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"{name}={value!r} is not a positive integer; pass one such as {example}")
    return int(value)


def _non_negative_int(name, value):
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 0:
        raise ValueError(f"{name}={value!r} is not an integer >= 0; pass one such as 0")
    return int(value)
