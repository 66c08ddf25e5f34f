"""Image sources, pixel-centre grids and sparse fields.

Images are uint8 (N, H, W, 3), values [0, 1] outside models and [-1, 1] inside, coordinates (x, y) in [0, 1].
"""

import functools
import importlib.util
import io
import itertools
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from nfhelpers.files import data_folder, source_path, split_files, split_of, take_split

PHOTOS = """skimage/data/astronaut.png skimage/data/motorcycle_left.png skimage/data/rocket.jpg
    skimage/data/ihc.png skimage/data/retina.jpg skimage/data/coffee.png skimage/data/chelsea.png
    sklearn/datasets/images/flower.jpg sklearn/datasets/images/china.jpg
    matplotlib/mpl-data/sample_data/grace_hopper.jpg""".split()  # installed with the libraries
UPRIGHT = {"validation": ("grace_hopper",), "test": ("china", "coffee", "chelsea")}
# One turn of training: the more detail a photograph has, the more often it comes.
TRAIN_CYCLE = """astronaut motorcycle_left flower ihc motorcycle_left astronaut rocket motorcycle_left ihc
    flower astronaut motorcycle_left rocket retina""".split()
CHANNEL_ORDERS = [list(order) for order in itertools.permutations(range(3))]  # few photographs, more colours
SEED = 20231201

CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_HASH = "md5:c32a1d4ab5d03f1284b67883e8d87530"
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
RECORD = 1 + 3 * 32 * 32  # of CIFAR-10: label, then red, green and blue planes


def load_images(source, split="train", size=32, limit=None) -> np.ndarray:
    """The first `limit` images of a source, square, shrunk by area averaging: uint8 (N, size, size, 3).

    - "photos": windows of installed photographs, up to 128 px. Of "train" any `limit` are made, else 4,096,
      turned, mirrored and with permuted channels. The other splits are of other photographs.
    - "cifar10": from `data_folder()`, downloaded if it is not there; or a folder with such `.bin` batches.
    - a folder of images of any format, in the order of the hashes of their names; or an `.npz` of uint8
      arrays (N, H, W, 3), x_train and x_test, or a single one. Central squares are taken.

    split: "train", "validation" or "test". They share no image: see `files.take_split`.
    """
    images = open_images(source, split, size, limit)
    return images if isinstance(images, np.ndarray) else images[:]


def open_images(source, split="train", size=32, limit=None) -> "np.ndarray | FolderImages":
    """As `load_images`, but a folder is read item by item."""
    path = source_path(source, ("photos", "cifar10"), split)
    if path == "photos":
        return _photos(split, size, limit)
    if path == "cifar10" or any(path.glob("*.bin")):
        planes = _records(path, split)[:limit, 1:].reshape(-1, 3, 32, 32)
        return area_resize(planes.transpose(0, 2, 3, 1), size)
    if path.is_file():
        return area_resize(_array(path, split)[:limit], size)
    from PIL import Image

    Image.init()
    suffixes = {suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN}
    files = take_split(split_files(path, suffixes), split, path)[:limit]
    return FolderImages([file for _, file in files], size)


class FolderImages(Sequence):
    """Image files, read when they are asked for: uint8 (size, size, 3) each, a slice as an array."""

    def __init__(self, files, size):
        self.files, self.shape = files, (len(files), size, size, 3)

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return np.stack([self[i] for i in range(*index.indices(len(self)))])
        return load_image(self.files[index], self.shape[1])


def load_labels(source="cifar10", split="train", limit=None) -> np.ndarray:
    """Classes (N,) int64 of the images of CIFAR-10, numbers of `CIFAR10_CLASSES`."""
    return _records(source_path(source, ("cifar10",), split), split)[:limit, 0].astype(np.int64)


def _array(path, split):
    with np.load(path, allow_pickle=False) as arrays:
        found = {key.lower().removeprefix("x_"): arrays[key] for key in arrays}
    found = {key: x for key, x in found.items() if x.dtype == np.uint8 and x.ndim == 4 and x.shape[3] == 3}
    named = {split_of(key): images for key, images in found.items() if split_of(key)}
    if not named and len(found) == 1:  # such a file is often sorted by class
        named = {None: np.random.default_rng(SEED).permutation(*found.values())}
    return take_split(named, split, path)


def _records(folder, split):
    folder = _cifar10_folder() if folder == "cifar10" else folder
    kind, pattern = ("test", "test_batch*.bin") if split == "test" else ("train", "data_batch*.bin")
    files = sorted(folder.glob(pattern))
    if cut := [file for file in files if file.stat().st_size % RECORD]:
        raise ValueError(f"{cut[0]} is not a whole number of records of {RECORD} bytes; replace it")
    records = [np.fromfile(file, np.uint8).reshape(-1, RECORD) for file in files]
    return take_split({kind: np.concatenate(records)} if records else {}, split, folder)


def _cifar10_folder():
    import pooch
    from filelock import FileLock

    root = data_folder()
    folder = root / "cifar-10-batches-bin"
    if not folder.exists():
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / "cifar-10.lock"):  # one process of a launch downloads, the others wait
            if not folder.exists():
                unpack = pooch.Untar(extract_dir="cifar-10-unpacked")
                pooch.retrieve(CIFAR10_URL, CIFAR10_HASH, path=root, processor=unpack, progressbar=True)
                os.replace(root / "cifar-10-unpacked" / folder.name, folder)  # so it is whole where it exists
    return folder


def _photos(split, size, limit):
    windows = _train_windows(limit or 4096) if split == "train" else _upright_windows(UPRIGHT[split])[:limit]
    images = np.empty((len(windows), size, size, 3), np.uint8)
    for image, (name, top, left, side, symmetry, channels) in zip(images, windows, strict=True):
        table = _photo(name)[1][top : top + side + 1, left : left + side + 1]
        window = _area_mean(table, size, "a photograph's window")[..., channels]
        image[:] = np.rot90(window.swapaxes(0, 1) if symmetry & 4 else window, symmetry & 3)
    return images


def _train_windows(count):
    """`count` windows (name, top, left, side, symmetry, channels); a larger count only appends."""
    windows = []
    draws = np.random.default_rng(SEED).random((count, 5))
    for name, (zoom, down, right, turn, hue) in zip(itertools.cycle(TRAIN_CYCLE), draws, strict=False):
        height, width, _ = _photo(name)[0].shape
        smallest, largest = 384 if name == "retina" else 128, min(height, width)  # the retina is smooth
        # Log-uniform: each octave of scale is as frequent. A multiple of 32: its 32-pixel version is sharp.
        side = int(smallest * (largest / smallest) ** zoom) // 32 * 32
        top, left = int(down * (height - side + 1)), int(right * (width - side + 1))
        windows.append((name, top, left, side, int(turn * 8), CHANNEL_ORDERS[int(hue * 6)]))
    return windows


def _upright_windows(names):
    """Up to 64 windows, as photographed, of each photograph in turn; those of one side do not overlap."""

    def starts(length, side):  # of as many intervals as fit side by side, evenly spread
        count, spare = length // side, length - side
        return np.arange(count) * spare // (count - 1) if count > 1 else [spare // 2] * count

    rng, queues = np.random.default_rng(SEED), []
    for name in names:
        photo, tiles = _photo(name)[0], []
        for side in (128, 160, 192, 224, 256):
            for top, left in itertools.product(*(starts(length, side) for length in photo.shape[:2])):
                if photo[top : top + side, left : left + side].std(axis=(0, 1)).max() > 10:  # no empty sky
                    tiles.append((name, top, left, side, 0, [0, 1, 2]))
        queues.append([tiles[i] for i in rng.permutation(len(tiles))])
    return [window for turn in itertools.zip_longest(*queues) for window in turn if window][:64]


@functools.cache
def _photo(name):
    """A photograph and its summed-area table."""
    package, _, path = next(path for path in PHOTOS if Path(path).stem == name).partition("/")
    folder = importlib.util.find_spec(package).submodule_search_locations[0]  # located, not imported
    image = _decode(Path(folder, path))
    return image, _summed_area(image)


def load_image(source, size=32, crop=0.5) -> np.ndarray:
    """One image, a path, the bytes of a file or an array, as `area_resize` has it: (size, size, 3)."""
    name = source if isinstance(source, str | os.PathLike) else "the image"
    return area_resize(source if isinstance(source, np.ndarray) else _decode(source), size, crop, name)


def _decode(source):
    """An image file, or the bytes of one, as uint8 (H, W, 3), upright, on white where it is transparent."""
    from PIL import Image, ImageOps

    file = io.BytesIO(source) if isinstance(source, bytes) else Path(source).expanduser()
    try:
        with Image.open(file) as image:
            if image.mode[0] in "IF":
                raise ValueError(f"{image.mode} has more than 8 bits a channel, which would be clipped")
            image = ImageOps.exif_transpose(image)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return np.array(image.convert("RGB"))
    # Pillow raises any of these of a damaged file.
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} cannot be read as an image: {error}") from error


def area_resize(images, size, crop=0.5, name="the image") -> np.ndarray:
    """uint8 (..., H, W, 3) cut to a square and shrunk: each pixel is the mean of the area that it covers.

    crop: where the square lies on the longer side, from 0 (left or top) to 1. Returns (..., size, size, 3).
    """
    height, width = images.shape[-3:-1]
    side = min(height, width)
    top, left = int(crop * (height - side)), int(crop * (width - side))
    images = images[..., top : top + side, left : left + side, :]
    if size == side:
        return np.ascontiguousarray(images)
    if images.ndim > 3:  # float64 of all of them would be eight times their memory
        return np.stack([area_resize(image, size) for image in images])
    return _area_mean(_summed_area(images), size, name)


def _summed_area(image):
    """Sums over all rows above and columns left, float64 (H+1, W+1, 3): a cell's is of four (Crow, 1984)."""
    return np.pad(image, ((1, 0), (1, 0), (0, 0))).astype(np.float64).cumsum(axis=0).cumsum(axis=1)


def _area_mean(table, size, name):
    """Means over size x size equal cells of a square table (S+1, S+1, 3), as uint8."""
    side = len(table) - 1
    if size > side:
        raise ValueError(f"size={size} is above the {side} px of {name}, and enlarged it is no ground truth")
    if side % size == 0:
        corners = table[:: side // size, :: side // size]  # (size+1, size+1, 3)
    else:  # inside a pixel the table is bilinear, so that interpolating it is exact
        edges = np.arange(size + 1) * (side / size)
        low = np.minimum(edges.astype(int), side - 1)
        share = (edges - low)[:, None]
        rows = table[low] * (1 - share[..., None]) + table[low + 1] * share[..., None]
        corners = rows[:, low] * (1 - share) + rows[:, low + 1] * share
    return np.rint(np.diff(np.diff(corners, axis=0), axis=1) * (size / side) ** 2).astype(np.uint8)


def grid_coords(height, width) -> torch.Tensor:
    """Pixel centres (x, y) = ((i + 0.5)/width, (j + 0.5)/height), row-major: float32 (height*width, 2)."""
    y, x = ((torch.arange(side, dtype=torch.float32) + 0.5) / side for side in (height, width))
    return torch.cartesian_prod(y, x).flip(1)


def to_unit(images) -> np.ndarray:
    """uint8, or floats that are checked to be in [0, 1], as float32 in [0, 1]."""
    images = np.asarray(images)
    if images.dtype == np.uint8:
        return images.astype(np.float32) / 255
    if not (images.min() >= -1e-4 and images.max() <= 1 + 1e-4):  # NaN is outside, too
        raise ValueError(f"images have values in [{images.min():g}, {images.max():g}]; pass uint8, or [0, 1]")
    return images.astype(np.float32)


def to_model(images) -> np.ndarray:
    """uint8, or floats in [0, 1], as float32 in [-1, 1]."""
    images = np.asarray(images)
    return images.astype(np.float32) / 127.5 - 1 if images.dtype == np.uint8 else to_unit(images) * 2 - 1


def to_image(values):
    """Values in [-1, 1], tensor or array, as [0, 1]; what a model put outside is clipped."""
    return ((values + 1) / 2).clip(0, 1)


def observe(image, fraction=0.2, seed=0):
    """Observe a fraction of the pixels of one image (H, W, 3), drawn without replacement.

    seed: an integer or several. Returns (input_coords (Ni, 2), input_values (Ni, 3) in [-1, 1], mask (H, W)).
    """
    height, width, _ = image.shape
    chosen, _ = _draw_pixels(height * width, max(1, round(fraction * height * width)), 0, seed)
    mask = torch.zeros(height * width, dtype=torch.bool)
    mask[chosen] = True
    values = torch.from_numpy(to_model(image.reshape(-1, 3)[chosen]))  # (Ni, 3)
    return grid_coords(height, width)[chosen], values, mask.reshape(height, width)


class SparseFields(Dataset):
    """Observed pixels of images, uint8 (N, H, W, 3) or of `open_images`, and other pixels to predict.

    Items are dicts of float32 tensors: input_coords (Ni, 2), input_values (Ni, 3), query_coords (Nq, 2) and
    query_values (Nq, 3), row-major and disjoint; if `observed` is 1, the queries are some of the observed
    pixels. They are functions of (seed, i) or, without a seed, of (epoch, i).
    """

    def __init__(self, images, observed=0.2, queries=0.2, seed=None):
        if not (0 < observed <= 1 and 0 < queries <= (1 if observed == 1 else 1 - observed + 1e-9)):
            raise ValueError(f"observed={observed}, queries={queries}; pass fractions whose sum is at most 1")
        pixels = images.shape[1] * images.shape[2]
        self.images, self.seed, self.coords = images, seed, grid_coords(*images.shape[1:3])
        self.num_inputs = max(1, round(observed * pixels))
        # Both halves of an odd number of pixels may round up: the inputs keep theirs.
        left = pixels if observed == 1 else pixels - self.num_inputs
        self.num_queries = min(max(1, round(queries * pixels)), left)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the draws of a dataset without a seed; persistent workers do not hear of it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        pixels = self.images[index].reshape(-1, 3)  # (H*W, 3)
        seed, key = ((self.epoch, index), (1,)) if self.seed is None else ((self.seed, index), ())
        drawn = _draw_pixels(len(pixels), self.num_inputs, self.num_queries, seed, key)
        item = {}
        for name, chosen in zip(("input", "query"), drawn, strict=True):
            item[f"{name}_coords"] = self.coords[chosen]
            item[f"{name}_values"] = torch.from_numpy(to_model(pixels[chosen]))
        return item


def _draw_pixels(pixels, num_inputs, num_queries, seed, key=()):
    """Two ascending sets of pixels, disjoint unless the first has all; it does not depend on the second."""
    sequence = np.random.SeedSequence(seed, spawn_key=key)
    order = np.random.Generator(np.random.Philox(sequence)).permutation(pixels)
    rest = order if num_inputs == pixels else order[num_inputs:]
    return np.sort(order[:num_inputs]), np.sort(rest[:num_queries])
