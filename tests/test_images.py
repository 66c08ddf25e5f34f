"""Sources of images, their splits, and the pixels that are drawn from them."""

import hashlib
import tarfile

import numpy as np
import pooch
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nfhelpers import images as module
from nfhelpers.images import SparseFields, area_resize, grid_coords, load_image, load_images, open_images

SPLITS = ("train", "validation", "test")
equal = np.testing.assert_array_equal


def random_images(count=4, height=8, width=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def test_photos_stay_what_reported_numbers_were_measured_on():
    some = ("train", 32, 64), ("test",), ("test", 100, 8), ("validation", 16)
    digests = [hashlib.sha256(load_images("photos", *options).tobytes()).hexdigest()[:8] for options in some]
    assert digests == ["0fcc6b27", "15d18e13", "b76ad722", "32a3aa83"]
    for split in SPLITS:  # a limit takes the first
        equal(load_images("photos", split, 16, 30)[:20], load_images("photos", split, 16, 20))
    with pytest.raises(ValueError):
        load_images("photos", "test", 129)


@pytest.mark.parametrize(("side", "size"), [(8, 4), (8, 8), (6, 4), (5, 3), (7, 1), (32, 24)])
def test_area_resize_is_the_mean_of_the_covered_area(side, size):
    images = random_images(3, side, side)
    # Repeating each pixel `size` times makes every cell a whole number of pixels.
    repeated = images.astype(float).repeat(size, axis=1).repeat(size, axis=2)
    expected = repeated.reshape(3, size, side, size, side, 3).mean(axis=(2, 4))
    assert np.abs(area_resize(images, size) - expected).max() <= 0.5 + 1e-9


def test_grids_are_row_major_pixel_centres_that_align():
    expected = [[0.25, 1 / 6], [0.75, 1 / 6], [0.25, 0.5], [0.75, 0.5], [0.25, 5 / 6], [0.75, 5 / 6]]
    np.testing.assert_allclose(grid_coords(3, 2), expected, rtol=1e-6)
    fine = grid_coords(12, 12).reshape(4, 3, 4, 3, 2).mean(dim=(1, 3)).reshape(-1, 2)
    torch.testing.assert_close(fine, grid_coords(4, 4))


def test_values_of_models_and_back():
    levels = np.arange(256, dtype=np.uint8)
    assert module.to_model(levels).dtype == np.float32
    equal(np.rint(module.to_image(module.to_model(levels)) * 255), levels)
    equal(module.to_model([0, 0.25, 1]), [-1, -0.5, 1])
    equal(module.to_image(torch.tensor([-3.0, 0, 3])), [0, 0.5, 1])
    for wrong in ([0.5, np.nan], [-0.5, 0.5], levels.astype(np.float32)):
        with pytest.raises(ValueError):
            module.to_model(wrong)


def indices(coords, height, width):
    x, y = (coords * torch.tensor([width, height]) - 0.5).round().long().unbind(-1)
    return (y * width + x).numpy()


@settings(max_examples=30, deadline=None)
@given(
    st.integers(2, 12), st.integers(2, 12), st.floats(0.01, 0.8), st.floats(0.01, 1), st.integers(0, 10**12)
)
def test_inputs_and_queries_are_disjoint_ordered_and_true(height, width, observed, share, seed):
    images, queries, pixels = random_images(2, height, width), (1 - observed) * share, height * width
    item = SparseFields(images, observed, queries, seed)[1]
    inputs, targets = (indices(item[f"{name}_coords"], height, width) for name in ("input", "query"))
    assert len(inputs) == max(1, round(observed * pixels))
    assert len(targets) == min(max(1, round(queries * pixels)), pixels - len(inputs))
    assert (np.diff(inputs) > 0).all() and (np.diff(targets) > 0).all()  # row-major, no repeats
    assert not set(inputs) & set(targets)
    flat = module.to_model(images[1]).reshape(-1, 3)
    equal(item["input_values"], flat[inputs])
    equal(item["query_values"], flat[targets])


def test_draws_follow_the_epoch_or_the_seed():
    images = random_images(2)

    def pixels(dataset, epoch):
        dataset.set_epoch(epoch)
        return [tuple(indices(item["input_coords"], 8, 8)) for item in dataset]

    first, second = pixels(SparseFields(images), 0), pixels(SparseFields(images), 1)
    assert first == pixels(SparseFields(images), 0)
    assert first[0] != second[0] and first[0] != first[1]
    fixed = SparseFields(images, seed=0)
    assert pixels(fixed, 0) == pixels(fixed, 1) != pixels(SparseFields(images, seed=1), 0)


def test_of_all_pixels_observed_some_are_the_queries():
    images = random_images(1, 4, 6)
    half = SparseFields(images, observed=1, queries=0.5, seed=0)[0]
    assert len(half["query_coords"].unique(dim=0)) == 12 and len(half["input_values"]) == 24
    for fractions in ((0.6, 0.5), (0, 0.2), (1.5, 0.2), (0.2, float("nan")), (1, 2)):
        with pytest.raises(ValueError):
            SparseFields(images, *fractions)


def records(images, labels):
    """Bytes of a CIFAR-10 batch, written as its documentation says."""
    planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    return np.column_stack([np.asarray(labels, np.uint8), planes]).tobytes()


@pytest.fixture
def batches(tmp_path):
    folder, train = tmp_path / "cifar-10-batches-bin", random_images(20, 32, 32)
    folder.mkdir()
    (folder / "data_batch_1.bin").write_bytes(records(train[:12], [3] * 12))
    (folder / "data_batch_2.bin").write_bytes(records(train[12:], range(8)))
    (folder / "test_batch.bin").write_bytes(records(random_images(2, 32, 32, seed=1), [5, 9]))
    return folder


def test_cifar10_is_read_from_its_batches(batches, monkeypatch):
    monkeypatch.setenv("NF_DATA", str(batches.parent))
    train = random_images(20, 32, 32)
    for source in ("cifar10", batches, str(batches)):
        equal(load_images(source), train)
        equal(open_images(source, held_out=True), train[:18])
        equal(load_images(source, "validation"), train[18:])
        equal(load_images(source, "test"), random_images(2, 32, 32, seed=1))
    (batches / "._data_batch_1.bin").write_bytes(b"\x00\x05\x16\x07")  # of a Mac
    equal(load_images(batches), train)
    file = batches / "data_batch_2.bin"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=file.name):
        load_images("cifar10")


def test_cifar10_is_downloaded_once(batches, tmp_path, monkeypatch):
    monkeypatch.setenv("NF_DATA", str(tmp_path / "cache"))
    asked = []

    def retrieve(url, known_hash, *, path, processor, **options):
        asked.append(known_hash)
        with tarfile.open(path / "small.tar.gz", "w:gz") as tar:
            tar.add(batches, batches.name)
        processor(str(path / "small.tar.gz"), "download", None)

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    for _ in range(2):
        equal(load_images("cifar10", "test"), random_images(2, 32, 32, seed=1))
    assert asked == ["md5:c32a1d4ab5d03f1284b67883e8d87530"]


def test_arrays_are_named_after_splits_or_divided(tmp_path):
    images, path = random_images(40), tmp_path / "x.npz"
    for train, test in (("x_train", "x_test"), ("train_images", "test_images")):
        np.savez(path, **{train: images[:30], "y_train": np.arange(30), test: images[30:]})
        equal(load_images(path, "train", 8), images[:30])
        equal(open_images(path, "train", 8, held_out=True), images[:27])
        equal(load_images(path, "validation", 8), images[27:30])
        equal(load_images(path, "test", 8, 4), images[30:34])
    np.savez(path, images=images, labels=np.arange(40))
    parts = [open_images(path, split, 8, held_out=True) for split in SPLITS]
    assert [len(part) for part in parts] == [32, 4, 4]
    assert {image.tobytes() for part in parts for image in part} == {image.tobytes() for image in images}
    for arrays in ({"images": images / 255}, {"a": images, "b": images}, {"x_train": images[..., 0]}):
        np.savez(path, **arrays)
        with pytest.raises(ValueError, match=path.name):
            load_images(path, "train", 8)
    for content in (b"", b"P6 1 1 255 abc", path.read_bytes()[:300]):  # a picture, a cut file
        path.write_bytes(content)
        with pytest.raises(ValueError, match=path.name):
            load_images(path, "train", 8)


def write(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, **options)


def colours(source, split, held_out=False):
    """The red levels of a folder of images of one colour."""
    return open_images(source, split, 8, held_out=held_out)[:][:, 0, 0, 0].tolist()


def fill(folder, levels, name="{}.png"):
    for level in levels:
        write(folder / name.format(level), np.full((10, 12, 3), level, np.uint8))


def test_a_folder_is_divided_by_the_hashes_of_its_names(tmp_path):
    fill(tmp_path / "a", range(25))
    fill(tmp_path / "b", range(25, 40))
    names = [f"{'a' if i < 25 else 'b'}/{i}.png" for i in range(40)]
    names.sort(key=lambda name: hashlib.sha256(name.encode()).digest())
    order = [int(name[2:-4]) for name in names]
    fill(tmp_path / ".ipynb_checkpoints", range(40), "{}-checkpoint.png")
    fill(tmp_path / "@eaDir" / "deep", range(40))
    fill(tmp_path / "a" / "__MACOSX", range(40), "._{}.png")
    for name in ("._1.png", "Thumbs.db", "desktop.ini", ".DS_Store"):
        (tmp_path / "a" / name).write_bytes(b"\x00\x05\x16\x07")
    assert colours(tmp_path, "test") == order[:4] and colours(tmp_path, "validation") == order[36:]
    assert colours(tmp_path, "train") == order[4:] and colours(tmp_path, "train", True) == order[4:36]


@pytest.mark.parametrize(
    "names",
    "train valid test;Training VAL Testing;a/train2017 a/val2017 a/TEST_set;trainA validA testA"
    ";TrainSet dev eval;1_train_images 2_validation 3_tests;cats_train cats-val cats.test".split(";"),
)
def test_folders_are_named_after_splits(tmp_path, names):
    for start, name in zip((0, 50, 100), names.split(), strict=True):
        fill(tmp_path / name / "deep", range(start, start + 10))
    for start, split in zip((0, 50, 100), SPLITS, strict=True):
        assert sorted(colours(tmp_path, split, held_out=True)) == list(range(start, start + 10))


def test_files_are_named_after_splits_if_all_are(tmp_path):
    fill(tmp_path, range(10), "train_{}.png")
    fill(tmp_path, range(50, 60), "test_{}.png")
    assert sorted(colours(tmp_path, "test")) == [*range(50, 60)]
    fill(tmp_path, [99], "trained {}.png")  # is none of these names
    assert len(colours(tmp_path, "test")) == 2


def test_what_no_folder_has_is_held_out_of_training_or_missed(tmp_path):
    fill(tmp_path / "train", range(20))
    fill(tmp_path / "test", range(20, 25))
    train, validation = colours(tmp_path, "train", held_out=True), colours(tmp_path, "validation")
    assert len(validation) == 2 and train + validation == colours(tmp_path, "train")
    assert sorted(train + validation) == list(range(20))
    fill(tmp_path, [99])
    with pytest.warns(UserWarning, match=r"99\.png"):
        assert sorted(colours(tmp_path, "test")) == list(range(20, 25))


def test_linked_folders_are_followed_and_names_may_be_of_any_encoding(tmp_path):
    fill(tmp_path / "real", range(4))
    (tmp_path / "set" / "deep").mkdir(parents=True)
    for name in ("one", "deep/two"):
        (tmp_path / "set" / name).symlink_to(tmp_path / "real")
    (tmp_path / "set" / "deep" / "circle").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "up").symlink_to("..")
    fill(tmp_path / "set", [9], "1" * 60 + "caf\udce9-{}.png")
    found = colours(tmp_path / "set", "train") + colours(tmp_path / "set", "test")
    assert sorted(found) == [0, 1, 2, 3, 9]  # what is linked twice would be in train and in test
    for split in ("train", "test"):
        fill(tmp_path / "pool" / "all" / split[:2], range(len(split)))
        (tmp_path / "pool" / split).symlink_to(tmp_path / "pool" / "all" / split[:2])
    assert sorted(colours(tmp_path / "pool", "test")) == [0, 1, 2, 3]


def test_every_format_of_one_image_counts(tmp_path):
    suffixes = "png jpg jpeg JPG jfif bmp gif tif tiff webp tga ppm jp2 avif".split()
    for index, suffix in enumerate(suffixes):
        fill(tmp_path, [10 * index], "{}." + suffix)
    (tmp_path / "0.png").rename(tmp_path / "without suffix")
    (tmp_path / "README").touch()
    with pytest.warns(UserWarning, match="README"):
        found = colours(tmp_path, "train") + colours(tmp_path, "test")
    np.testing.assert_allclose(sorted(found), 10 * np.arange(len(suffixes)), atol=2)


def test_pixels_are_upright_and_what_is_transparent_stays_hidden(tmp_path):
    image = random_images(1, 8, 12)[0]
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    write(tmp_path / "turned.png", image, exif=exif)
    equal(load_image(tmp_path / "turned.png", 8), np.rot90(image[:, 2:10], -1))
    write(tmp_path / "grey.png", image[..., 0])
    equal(load_image(tmp_path / "grey.png", 8), image[:, 2:10, :1].repeat(3, axis=2))
    alpha = np.where(np.arange(12) < 6, 255, 0)[None, :, None].repeat(8, axis=0).astype(np.uint8)
    write(tmp_path / "hole.png", np.concatenate([image, alpha], axis=2))
    equal(load_image(tmp_path / "hole.png", 8, crop=0), np.where(alpha, image, 255)[:, :8])
    Image.fromarray(np.concatenate([image, alpha], axis=2)).quantize(256).save(tmp_path / "palette.png")
    assert (load_image(tmp_path / "palette.png", 8, crop=1)[:, 2:] == 255).all()


@pytest.mark.parametrize(
    "kind", "png uint16 257; tif uint16 257; tif int32 257; tif float32 0.003922".split("; ")
)
def test_grey_levels_of_more_bits_keep_their_scale(tmp_path, kind):
    (suffix, dtype, scale), levels = kind.split(), random_images(1)[0, :, :, 0]
    top = 1 if dtype == "float32" else 65535
    write(tmp_path / f"x.{suffix}", (levels * float(scale)).astype(dtype).clip(max=top))
    equal(load_image(tmp_path / f"x.{suffix}", 8)[..., 0], levels)
    write(tmp_path / "y.tif", levels.astype("float32" if dtype == "float32" else "int32"))
    with pytest.raises(ValueError, match=r"y\.tif"):  # 0 to 255, or dark
        load_image(tmp_path / "y.tif", 8)


def test_load_image_takes_a_file_its_bytes_or_an_array(tmp_path):
    image = random_images(1, 12, 20)[0]
    write(tmp_path / "x.png", image)
    data = (tmp_path / "x.png").read_bytes()
    for crop, left in ((0, 0), (0.5, 4), (1, 8)):
        for source in (tmp_path / "x.png", str(tmp_path / "x.png"), data, image):
            equal(load_image(source, 6, crop), area_resize(image[:, left : left + 12], 6))
    for wrong in (data[:200], image / 255, image[..., 0]):
        with pytest.raises(ValueError):
            load_image(wrong, 6)


def test_a_folder_is_read_item_by_item_and_damaged_files_are_said(tmp_path):
    fill(tmp_path, range(30))
    images, whole = open_images(tmp_path, "train", 8), load_images(tmp_path, "train", 8)
    assert len(images) == 27 and images.shape == whole.shape and images[3:5].shape == (2, 8, 8, 3)
    equal(images[-1], whole[-1])
    assert torch.equal(SparseFields(images)[2]["query_values"], SparseFields(whole)[2]["query_values"])
    for damaged, content in ((5, images.files[5].read_bytes()[:45]), (26, b"")):
        images.files[damaged].write_bytes(content)
        with pytest.warns(UserWarning, match=images.files[damaged].name):
            equal(images[damaged], whole[(damaged + 1) % 27])
    with pytest.warns(UserWarning, match=images.files[26].name):
        equal(load_images(tmp_path, "train", 8), np.delete(whole, [5, 26], axis=0))
    with pytest.raises(ValueError, match=images.files[6].name):
        open_images(tmp_path, "train", 11)[6]  # larger than all are
    write(tmp_path / "small.png", random_images(1, 6, 6)[0])
    with pytest.warns(UserWarning, match=r"small\.png"):
        assert sum(len(load_images(tmp_path, split, 8)) for split in ("train", "test")) == 28


def test_unknown_sources_splits_and_empty_folders_are_refused(tmp_path, monkeypatch):
    for wrong in (("phots", "train"), ("photos", "tran"), (tmp_path, "train")):
        with pytest.raises(ValueError):
            load_images(*wrong)
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "photos", range(20))
    with pytest.warns(UserWarning, match="./photos"):
        assert load_images("photos", "test", 8, 5).max() > 20
    assert max(colours("./photos", "train")) < 20
