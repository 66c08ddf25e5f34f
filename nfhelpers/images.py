"""Sources of images, uint8 (N, H, W, 3), grids of pixel centres (x, y) in [0, 1], and sparse fields."""

import contextlib
import functools
import importlib.util
import io
import itertools
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from nfhelpers.files import data_folder, left_out, read_usable, source_path, split_files, split_of, take_split

PHOTOS = """skimage/data/astronaut.png skimage/data/motorcycle_left.png skimage/data/rocket.jpg
    skimage/data/ihc.png skimage/data/retina.jpg skimage/data/coffee.png skimage/data/chelsea.png
    sklearn/datasets/images/flower.jpg sklearn/datasets/images/china.jpg
    matplotlib/mpl-data/sample_data/grace_hopper.jpg""".split()  # installed with the libraries
UPRIGHT = {"validation": ("grace_hopper",), "test": ("china", "coffee", "chelsea")}
# One turn of training: the more detail a photograph has, the more often it comes.
TRAIN_CYCLE = """astronaut motorcycle_left flower ihc motorcycle_left astronaut rocket motorcycle_left ihc
    flower astronaut motorcycle_left rocket retina""".split()
SEED = 20231201
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_HASH = "md5:c32a1d4ab5d03f1284b67883e8d87530"
RECORD = 1 + 3 * 32 * 32  # of CIFAR-10: label, then red, green and blue planes


def load_images(source, split="train", size=32, limit=None) -> np.ndarray:
    """The first `limit` images of a source, square, shrunk by area averaging: uint8 (N, size, size, 3).

    - "photos": windows of installed photographs, up to 128 px; of "train" as many as the limit says.
    - "cifar10": from `data_folder()`, downloaded if it is not there; or a folder with such `.bin` batches.
    - a folder of images of any format, of which the central squares are taken, in the order of the hashes of
      their names; or an `.npz` of uint8 arrays (N, H, W, 3), such as x_train and x_test, or a single one.
    """
    return open_images(source, split, size, limit)[:]


def open_images(source, split="train", size=32, limit=None, held_out=False) -> "np.ndarray | FolderImages":
    """As `load_images`, but a folder is read item by item; `held_out`: see `files.take_split`."""
    path = source_path(source, ("photos", "cifar10"), split)
    if path == "photos":
        return _photos(split, size, limit)
    if path == "cifar10" or any(path.glob("[!.]*_batch*.bin")):
        planes = take_split(_records(path), split, path, held_out)[:limit, 1:].reshape(-1, 3, 32, 32)
        return area_resize(planes.transpose(0, 2, 3, 1), size)
    if path.is_file():
        return area_resize(take_split(_arrays(path), split, path, held_out)[:limit], size)
    files = take_split(split_files(path, _is_image), split, path, held_out)[:limit]
    return FolderImages([file for _, file in files], size)


def _arrays(file):
    """Pictures of an .npz by split, or {None: all} of the only array of pictures."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            found = {key: x for key in arrays if (x := arrays[key]).dtype == np.uint8 and x.shape[3:] == (3,)}
        parts = {split_of(f"{key}/"): x for key, x in found.items()}
        if set(parts) == {None} and len(found) == 1:  # such a file is often sorted by class
            return {None: np.random.default_rng(SEED).permutation(*found.values())}
        left_out(key for key in found if not split_of(f"{key}/"))
        if not parts.keys() - {None}:
            raise ValueError("pass x_train and x_test, or one array, of uint8 (N, H, W, 3)")
    except Exception as error:  # NumPy raises many kinds, of a picture or an archive of them, too
        raise ValueError(f"{file} is no .npz of pictures: {error}; of images pass the folder") from error
    return {split: x for split, x in parts.items() if split}


def _is_image(path):
    """Whether the name, or of a file without suffix the content, is of a format that Pillow reads."""
    if path.suffix:
        return Image.registered_extensions().get(path.suffix.lower()) in Image.OPEN
    with contextlib.suppress(Exception), Image.open(path):  # Pillow raises many kinds
        return True
    return False


class FolderImages:
    """Image files, read when asked for, as uint8 (size, size, 3). What cannot be used is said: an array of a
    slice lacks it, the next image stands in for an item."""

    def __init__(self, files, size):
        self.files, self.shape = files, (len(files), size, size, 3)

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        if isinstance(index, slice):
            files = tqdm(self.files[index], "read images", delay=3, leave=False)
            return np.stack(read_usable(self._read, files))
        start = range(len(self))[index]
        return read_usable(self._read, (self.files[start:] + self.files[:start])[:100], 1)[0]

    def _read(self, file):
        return area_resize(_decode(file), self.shape[1], name=file)


def _records(folder):
    """CIFAR-10's bytes (N, RECORD) of a folder of batches, of each split."""
    import pooch
    from filelock import FileLock

    root = data_folder()
    if folder == "cifar10" and not (folder := root / "cifar-10-batches-bin").exists():
        try:
            with FileLock(root / "cifar-10.lock"):  # one process downloads, the others wait
                if not folder.exists():  # it is whole once it has its name
                    unpack = pooch.Untar(extract_dir="cifar-10-unpacked")
                    pooch.retrieve(CIFAR10_URL, CIFAR10_HASH, path=root, processor=unpack, progressbar=True)
                    (root / "cifar-10-unpacked" / folder.name).rename(folder)
        except OSError as error:
            raise OSError(f"{CIFAR10_URL} is not in {root}: {error}; set NF_DATA to where it is") from error
    found = {}
    for file in sorted(folder.glob("[!.]*_batch*.bin")):
        part = found.setdefault("test" if file.name.startswith("test") else "train", [])
        records = np.fromfile(file, np.uint8)
        if len(records) % RECORD:
            raise ValueError(f"{file} is cut: {len(records)} bytes are no multiple of {RECORD}; get it again")
        part.append(records.reshape(-1, RECORD))
    return {split: np.concatenate(records) for split, records in found.items()}


def _photos(split, size, limit):
    windows = _train_windows(limit or 4096) if split == "train" else _upright_windows(UPRIGHT[split])[:limit]
    images = []
    for name, top, left, side, symmetry, channels in windows:
        sums = _photo(name)[1][top : top + side + 1, left : left + side + 1]
        window = _area_mean(sums, size, name)[..., channels]
        images.append(np.rot90(window.swapaxes(0, 1) if symmetry & 4 else window, symmetry & 3))
    return np.stack(images)


def _train_windows(count):
    """`count` windows (name, top, left, side, symmetry, channels); a larger count only appends."""
    channels, draws = list(itertools.permutations(range(3))), np.random.default_rng(SEED).random((count, 5))
    for name, (zoom, down, right, turn, hue) in zip(itertools.cycle(TRAIN_CYCLE), draws, strict=False):
        height, width, _ = _photo(name)[0].shape
        smallest, largest = 384 if name == "retina" else 128, min(height, width)  # the retina is smooth
        # Log-uniform: each octave of scale is as frequent. A multiple of 32: its 32-pixel version is sharp.
        side = int(smallest * (largest / smallest) ** zoom) // 32 * 32
        top, left = int(down * (height - side + 1)), int(right * (width - side + 1))
        yield name, top, left, side, int(turn * 8), channels[int(hue * 6)]


def _upright_windows(names):
    """Up to 64 windows, as photographed, of each photograph in turn; those of one side do not overlap."""
    rng, queues = np.random.default_rng(SEED), []
    for name in names:
        photo, tiles = _photo(name)[0], []
        for side in (128, 160, 192, 224, 256):
            spares = [(n // side, n - side) for n in photo.shape[:2]]  # windows that fit, pixels beside one
            rows, columns = ([i * s // (n - 1) for i in range(n)] if n > 1 else [s // 2] for n, s in spares)
            for top, left in itertools.product(rows, columns):
                if photo[top : top + side, left : left + side].std(axis=(0, 1)).max() > 10:  # no empty sky
                    tiles.append((name, top, left, side, 0, (0, 1, 2)))
        queues.append([tiles[i] for i in rng.permutation(len(tiles))])
    return [window for turn in itertools.zip_longest(*queues) for window in turn if window][:64]


@functools.cache
def _photo(name):
    package, path = next(path for path in PHOTOS if Path(path).stem == name).split("/", 1)
    image = _decode(Path(importlib.util.find_spec(package).origin).parent / path)  # found, not imported
    return image, _summed(image)


def load_image(source, size=32, crop=0.5) -> np.ndarray:
    """One image, a path, the bytes of a file or an array, as `area_resize` has it: (size, size, 3)."""
    if isinstance(source, np.ndarray) and (source.dtype != np.uint8 or source.shape[2:] != (3,)):
        raise ValueError(f"the image is {source.dtype} {source.shape}; pass uint8 (H, W, 3)")
    return area_resize(source if isinstance(source, np.ndarray) else _decode(source), size, crop)


def _decode(source):
    """An image file, or the bytes of one, as uint8 (H, W, 3), upright, on white where it is transparent."""
    file = source if isinstance(source, bytes) else Path(source).expanduser()
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode[0] in "IF":
                image = Image.fromarray(_to_bytes(np.asarray(image)))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return np.array(image.convert("RGB"))
    except Exception as error:  # Pillow raises many kinds of a damaged file
        name = f"a file of {len(file)} bytes" if isinstance(file, bytes) else file
        raise ValueError(f"{name} cannot be read as an image: {error}") from error


def _to_bytes(levels):
    """Grey levels of 16 bits, whatever holds them, or floats in [0, 1], as uint8."""
    low, top, full = levels.min(), levels.max(), 1 if levels.dtype.kind == "f" else 2**16 - 1
    if not 0 <= low <= top <= full or (levels.dtype == np.int32 and 0 < top < 256):
        raise ValueError(f"its levels in [{low}, {top}] are of no known scale; convert it to 8 or 16 bits")
    return np.rint(levels * (255 / full)).astype(np.uint8)


def area_resize(images, size, crop=0.5, name="the image") -> np.ndarray:
    """uint8 (..., H, W, 3) shrunk to (..., size, size, 3): each pixel is the mean of the area that it covers.
    crop: where the square that is taken lies on the longer side, from 0 (left or top) to 1."""
    height, width = images.shape[-3:-1]
    side = min(height, width)
    top, left = int(crop * (height - side)), int(crop * (width - side))
    images = images[..., top : top + side, left : left + side, :]
    if size == side:
        return np.ascontiguousarray(images)
    if images.ndim > 3:  # float64 of all of them would be eight times their memory
        return np.stack([area_resize(image, size) for image in images])
    return _area_mean(_summed(images), size, name)


def _summed(image):
    """Sums over all rows above and columns left, float64 (H+1, W+1, 3): a cell's is of four (Crow, 1984)."""
    return np.pad(image, ((1, 0), (1, 0), (0, 0))).cumsum(0, dtype=np.float64).cumsum(1)


def _area_mean(sums, size, name):
    side = len(sums) - 1
    if size > side:
        raise ValueError(f"size={size} is above the {side} px of {name}, and enlarged it is no ground truth")
    edges = np.arange(size + 1) * (side / size)
    low = np.minimum(edges.astype(int), side - 1)
    share = (edges - low)[:, None]  # inside a pixel the sums are bilinear, so that interpolating is exact
    rows = sums[low] * (1 - share[..., None]) + sums[low + 1] * share[..., None]
    corners = rows[:, low] * (1 - share) + rows[:, low + 1] * share  # (size+1, size+1, 3)
    return np.rint(np.diff(np.diff(corners, axis=0), axis=1) * (size / side) ** 2).astype(np.uint8)


def grid_coords(height, width, device=None) -> torch.Tensor:
    """Pixel centres (x, y) = ((i + 0.5)/width, (j + 0.5)/height), row-major: float32 (height*width, 2)."""
    y, x = (torch.arange(0.5, side, dtype=torch.float32, device=device) / side for side in (height, width))
    return torch.cartesian_prod(y, x).flip(1)


def to_unit(images, dtype=np.float32) -> np.ndarray:
    """uint8, or floats that are checked to be in [0, 1], as floats in [0, 1]."""
    images = np.asarray(images)
    if images.dtype == np.uint8:
        return images.astype(dtype) / 255
    if not (images.min() >= -1e-4 and images.max() <= 1 + 1e-4):  # NaN is outside, too
        raise ValueError(f"images have values in [{images.min():g}, {images.max():g}]; pass uint8, or [0, 1]")
    return images.astype(dtype)


def to_model(images) -> np.ndarray:
    """uint8, or floats in [0, 1], as float32 in [-1, 1]."""
    return to_unit(images) * 2 - 1


def to_image(values):
    """Values in [-1, 1], tensor or array, as [0, 1]; what a model put outside is clipped."""
    return ((values + 1) / 2).clip(0, 1)


def observe(image, fraction=0.2, seed=0):
    """Observe a fraction of the pixels of an image (H, W, 3), drawn without replacement by one or more seeds.
    Returns (input_coords (Ni, 2), input_values (Ni, 3) in [-1, 1], mask (H, W))."""
    mask = torch.zeros(image.shape[:2], dtype=torch.bool)
    chosen, _ = _draw_pixels(mask.numel(), max(1, round(fraction * mask.numel())), 0, seed)
    mask.view(-1)[chosen] = True
    return grid_coords(*mask.shape)[chosen], torch.from_numpy(to_model(image))[mask], mask


class SparseFields(Dataset):
    """Observed pixels of images, uint8 (N, H, W, 3) or of `open_images`, and others to predict, row-major:
    dicts of float32 input_coords (Ni, 2), input_values (Ni, 3), query_coords (Nq, 2), query_values (Nq, 3),
    functions of (seed, i) or (epoch, i). If `observed` is 1, the queries are some of the observed pixels."""

    def __init__(self, images, observed=0.2, queries=0.2, seed=None):
        if not (0 < observed <= 1 and 0 < queries <= (1 if observed == 1 else 1 - observed + 1e-9)):
            raise ValueError(f"observed={observed}, queries={queries}; pass fractions whose sum is at most 1")
        self.images, self.seed, self.epoch = images, seed, 0
        self.coords = grid_coords(*images.shape[1:3])
        self.num_inputs, self.num_queries = (max(1, round(x * len(self.coords))) for x in (observed, queries))

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch  # persistent workers do not hear of it

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
    return np.sort(order[:num_inputs]), np.sort(rest[:num_queries])  # of an odd number the queries lose one
