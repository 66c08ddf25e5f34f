import hashlib
import http.server
import io
import socket
import tarfile
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from nfhelpers import images as module
from nfhelpers.images import (
    SparseFields,
    StreamedImages,
    area_resize,
    grid_coords,
    load_images,
    observe,
    open_images,
    to_image,
    to_model,
)


def random_images(count=4, height=8, width=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


# Photographs


@pytest.fixture(scope="module")
def photos():
    """Test windows of the photographs by size."""
    return {size: load_images("photos", "test", size) for size in (32, 64, 96, 128)}


def test_photos_have_the_asked_shape_and_order(photos):
    for size, images in photos.items():
        assert images.shape == (64, size, size, 3) and images.dtype == np.uint8
    np.testing.assert_array_equal(load_images("photos", "test", limit=5), photos[32][:5])
    train = load_images("photos", "train", limit=20)
    assert train.shape == (20, 32, 32, 3)
    np.testing.assert_array_equal(train, load_images("photos", "train", limit=50)[:20])


def test_photos_are_split_by_photograph():
    train = {window[0] for window in module._train_windows(500)}
    test = {window[0] for window in module._test_windows()}
    assert train.isdisjoint(test) and len(test) >= 2 and train | test == set(module._PHOTOS)
    # A limit of a few already mixes the photographs.
    assert len({window[0] for window in module._test_windows()[:3]}) == 3
    assert len({window[0] for window in module._train_windows(14)}) == len(train)


def test_photo_windows_lie_inside_and_are_never_enlarged():
    for name, top, left, side, symmetry, _ in module._train_windows(2000) + module._test_windows():
        height, width, _ = module._photo(name).shape
        assert side >= module.PHOTO_MAX_SIZE and 0 <= symmetry < 8
        assert 0 <= top <= height - side and 0 <= left <= width - side


def test_test_windows_of_one_side_do_not_overlap():
    windows = module._test_windows()
    assert len(windows) == 64
    for i, (name, top, left, side, symmetry, _) in enumerate(windows):
        assert symmetry == 0
        for other, y, x, other_side, *_ in windows[:i]:
            if (name, side) == (other, other_side):
                assert abs(y - top) >= side or abs(x - left) >= side


def test_training_windows_permute_the_channels_and_test_windows_do_not():
    train = {tuple(window[5]) for window in module._train_windows(200)}
    assert train == {(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)}
    assert {tuple(window[5]) for window in module._test_windows()} == {(0, 1, 2)}


def test_photos_have_contrast(photos):
    assert photos[32].std(axis=(1, 2)).max(axis=1).min() > 5


@pytest.mark.parametrize("fine", [64, 96, 128])
def test_a_coarse_photo_is_the_mean_of_the_fine_one(photos, fine):
    ratio = fine // 32
    blocks = photos[fine].reshape(64, 32, ratio, 32, ratio, 3).mean(axis=(2, 4))
    # Each was rounded to 8 bits: half a level for the coarse one, up to half for the mean of the fine ones.
    assert np.abs(blocks - photos[32]).max() <= 1


def test_training_turns_are_the_same_at_every_size():
    coarse, fine = load_images("photos", "train", 32, 64), load_images("photos", "train", 64, 64)
    assert np.abs(fine.reshape(64, 32, 2, 32, 2, 3).mean(axis=(2, 4)) - coarse).max() <= 1


def test_photos_are_the_photographs(photos):
    # An upright test window of side 128 at size 128 is a literal crop.
    windows = module._test_windows()
    index = next(i for i, window in enumerate(windows) if window[3] == 128)
    name, top, left, side, _, _ = windows[index]
    crop = module._photo(name)[top : top + side, left : left + side]
    np.testing.assert_array_equal(photos[128][index], crop)


def test_photos_refuse_enlarging_and_name_a_missing_file(monkeypatch):
    with pytest.raises(ValueError, match="size <= 128"):
        load_images("photos", "test", 129)
    monkeypatch.setitem(module._PHOTOS, "gone", ("skimage", "data/gone.png", 128))
    with pytest.raises(FileNotFoundError, match=r"gone\.png.*scikit-image"):
        module._photo("gone")


# Area averaging


@pytest.mark.parametrize(("side", "size"), [(8, 4), (8, 8), (6, 4), (5, 3), (7, 1), (32, 24)])
def test_area_resize_is_the_mean_of_the_covered_area(side, size):
    images = random_images(3, side, side)
    # Repeating each pixel `size` times makes every cell a whole number of pixels.
    repeated = images.astype(float).repeat(size, axis=1).repeat(size, axis=2)
    expected = repeated.reshape(3, size, side, size, side, 3).mean(axis=(2, 4))
    assert np.abs(area_resize(images, size) - expected).max() <= 0.5 + 1e-9


def test_area_resize_refuses_wrong_input():
    with pytest.raises(ValueError, match="size <= 8"):
        area_resize(random_images(), 9)
    with pytest.raises(ValueError, match="S, S, 3"):
        area_resize(random_images(width=6), 4)
    with pytest.raises(ValueError, match="float64"):
        area_resize(random_images() / 255, 4)


# Coordinates and values


def test_grid_is_row_major_pixel_centres():
    expected = [[0.25, 1 / 6], [0.75, 1 / 6], [0.25, 0.5], [0.75, 0.5], [0.25, 5 / 6], [0.75, 5 / 6]]
    coords = grid_coords(3, 2)
    assert coords.dtype == torch.float32
    np.testing.assert_allclose(coords, expected, rtol=1e-6)


@pytest.mark.parametrize("ratio", [2, 3, 4])
def test_grids_of_different_sizes_are_aligned(ratio):
    fine = grid_coords(8 * ratio, 8 * ratio).reshape(8, ratio, 8, ratio, 2).mean(dim=(1, 3))
    torch.testing.assert_close(fine.reshape(-1, 2), grid_coords(8, 8))


def test_model_values_and_back():
    levels = np.arange(256, dtype=np.uint8)
    values = to_model(levels)
    assert values.dtype == np.float32 and values[0] == -1 and values[255] == 1
    np.testing.assert_array_equal(np.rint(to_image(values) * 255).astype(np.uint8), levels)
    tensor = to_model(torch.from_numpy(levels))
    assert isinstance(tensor, torch.Tensor)
    np.testing.assert_array_equal(tensor, values)
    np.testing.assert_array_equal(to_model(np.array([0, 0.25, 1])), [-1, -0.5, 1])
    np.testing.assert_array_equal(to_image(np.array([-3.0, 0, 3])), [0, 0.5, 1])
    np.testing.assert_array_equal(to_image(torch.tensor([-3.0, 0, 3])), [0, 0.5, 1])
    assert to_image(torch.zeros(2, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_wrong_values_and_grids_are_refused():
    for values in (np.array([0.0, 255.0]), torch.tensor([-1.0, 1.0]), np.array([np.nan])):
        with pytest.raises(ValueError, match=r"floats in \[0, 1\]"):
            to_model(values)
    for function in (to_model, to_image):
        with pytest.raises(ValueError, match="int64"):
            function(np.array([0, 1]))
    with pytest.raises(ValueError, match="height=0"):
        grid_coords(0, 4)


# Sparse fields


def pixel_indices(coords, height, width):
    x, y = (coords.double() * torch.tensor([width, height]) - 0.5).round().long().unbind(-1)
    return (y * width + x).numpy()


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(2, 12),
    width=st.integers(2, 12),
    observed=st.floats(0.01, 0.9),
    share=st.floats(0.01, 1),
    seed=st.one_of(st.none(), st.integers(0, 10**12)),
)
def test_inputs_and_queries_are_disjoint_ordered_and_true(height, width, observed, share, seed):
    queries = (1 - observed) * share
    pixels = height * width
    if round(observed * pixels) >= pixels:
        return
    images = random_images(2, height, width)
    item = SparseFields(images, observed, queries, seed)[1]
    inputs = pixel_indices(item["input_coords"], height, width)
    targets = pixel_indices(item["query_coords"], height, width)
    assert len(inputs) == max(1, round(observed * pixels))
    assert len(targets) == min(max(1, round(queries * pixels)), pixels - len(inputs))
    assert (np.diff(inputs) > 0).all() and (np.diff(targets) > 0).all()  # row-major, no repeats
    assert not set(inputs) & set(targets)
    flat = to_model(images[1]).reshape(-1, 3)
    np.testing.assert_array_equal(item["input_values"], flat[inputs])
    np.testing.assert_array_equal(item["query_values"], flat[targets])
    assert all(tensor.dtype == torch.float32 for tensor in item.values())


def test_all_pixels_can_be_used():
    item = SparseFields(random_images(1, 3, 3), 0.5, 0.5, seed=0)[0]
    assert sum(len(item[name]) for name in ("input_coords", "query_coords")) in (8, 9)
    item = SparseFields(random_images(1, 10, 10), 0.2, 0.8, seed=0)[0]
    assert len(item["input_coords"]) == 20 and len(item["query_coords"]) == 80


def test_pixels_are_drawn_uniformly():
    dataset = SparseFields(random_images(400, 4, 4), 0.25, 0.25, seed=0)
    counts = np.zeros((2, 16))
    for item in (dataset[i] for i in range(400)):
        counts[0, pixel_indices(item["input_coords"], 4, 4)] += 1
        counts[1, pixel_indices(item["query_coords"], 4, 4)] += 1
    # Binomial(400, 1/4): mean 100, standard deviation 8.7.
    assert np.abs(counts - 100).max() < 40


def test_training_draws_follow_the_epoch_and_test_draws_do_not():
    images = random_images(2)

    def pixels(dataset, epoch):
        dataset.set_epoch(epoch)
        return [tuple(pixel_indices(dataset[i]["input_coords"], 8, 8)) for i in range(2)]

    training = SparseFields(images)
    first, second, again = pixels(training, 0), pixels(training, 1), pixels(training, 0)
    assert first == again == pixels(SparseFields(images), 0)
    assert first[0] != second[0] and first[0] != first[1]
    fixed = SparseFields(images, seed=0)
    assert pixels(fixed, 0) == pixels(fixed, 1) != pixels(SparseFields(images, seed=1), 0)
    assert pixels(fixed, 0) != first


def test_draws_do_not_depend_on_workers():
    dataset = SparseFields(random_images(6))
    loader = DataLoader(dataset, batch_size=3, num_workers=2, persistent_workers=True)
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        batches = list(loader)
        for name in dataset[0]:
            expected = torch.stack([dataset[i][name] for i in range(6)])
            torch.testing.assert_close(
                torch.cat([batch[name] for batch in batches]), expected, rtol=0, atol=0
            )


def test_observe_is_what_sparse_fields_observe():
    images = random_images(3)
    coords, values, mask = observe(images[2], 0.3, (7, 2))
    item = SparseFields(images, 0.3, 0.1, seed=7)[2]
    torch.testing.assert_close(coords, item["input_coords"], rtol=0, atol=0)
    torch.testing.assert_close(values, item["input_values"], rtol=0, atol=0)
    assert mask.shape == (8, 8) and mask.dtype == torch.bool and mask.sum() == round(0.3 * 64)
    np.testing.assert_array_equal(to_model(images[2])[mask], values)  # row-major on both sides
    np.testing.assert_allclose(observe(images[2] / 255, 0.3, (7, 2))[1], values, atol=1e-6)
    assert observe(images[2], 1.0)[2].all()


def test_sequence_protocol():
    dataset = SparseFields(random_images(3), seed=0)
    assert len(dataset) == 3 and len(list(dataset)) == 3
    torch.testing.assert_close(dataset[-1]["input_coords"], dataset[2]["input_coords"])
    with pytest.raises(IndexError):
        dataset[3]


def test_of_all_pixels_observed_some_are_the_queries():
    images = np.random.default_rng(0).integers(0, 256, (1, 4, 6, 3), dtype=np.uint8)
    whole = SparseFields(images, observed=1, queries=1, seed=0)[0]
    assert torch.equal(whole["input_coords"], grid_coords(4, 6))
    assert torch.equal(whole["query_coords"], whole["input_coords"])
    assert torch.equal(whole["query_values"], whole["input_values"])
    half = SparseFields(images, observed=1, queries=0.5, seed=0)[0]
    assert half["query_values"].shape == (12, 3) and half["input_values"].shape == (24, 3)
    assert len(half["query_coords"].unique(dim=0)) == 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(images=random_images() / 255), "float64"),
        (dict(images=random_images()[0]), "N, H, W, 3"),
        (dict(images=random_images()[:0]), "N >= 1"),
        (dict(observed=0), r"observed=0 is outside \(0, 1\]"),
        (dict(observed=1.5), r"observed=1.5 is outside \(0, 1\]; pass a fraction such as 0.2"),
        (dict(queries="0.2"), "queries='0.2'"),
        (dict(queries=float("nan")), "queries=nan"),
        (dict(observed=0.6, queries=0.5), "more than all pixels"),
        (dict(seed=-1), "seed=-1"),
        (dict(seed=0.5), "seed=0.5"),
        (dict(images=random_images(1, 1, 1)), "leaves no query"),
    ],
)
def test_wrong_sparse_fields_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SparseFields(**{"images": random_images(), **arguments})


def test_wrong_observations_are_refused():
    with pytest.raises(ValueError, match="one image"):
        observe(random_images(), 0.2, 0)
    with pytest.raises(ValueError, match="observed=2"):
        observe(random_images()[0], 2, 0)
    with pytest.raises(ValueError, match="seed"):
        observe(random_images()[0], 0.2, "seven")
    with pytest.raises(ValueError, match="epoch=-1"):
        SparseFields(random_images()).set_epoch(-1)


# CIFAR-10


def records(images, labels=0):
    """Bytes of a CIFAR-10 batch, written as its documentation says."""
    planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    return np.concatenate([np.full((len(images), 1), labels, np.uint8), planes], axis=1).tobytes()


@pytest.fixture
def batches(tmp_path):
    folder = tmp_path / "my-batches"
    folder.mkdir()
    train = random_images(5, 32, 32)
    (folder / "data_batch_1.bin").write_bytes(records(train[:3]))
    (folder / "data_batch_2.bin").write_bytes(records(train[3:], 9))
    (folder / "test_batch.bin").write_bytes(records(random_images(2, 32, 32, seed=1)))
    return folder


def test_bin_batches_of_any_length(batches):
    train = random_images(5, 32, 32)
    np.testing.assert_array_equal(load_images(batches), train)
    np.testing.assert_array_equal(load_images(str(batches), "test"), random_images(2, 32, 32, seed=1))
    for limit in (2, 3, 4, 9):
        np.testing.assert_array_equal(load_images(batches, limit=limit), train[:limit])
    halves = train.reshape(5, 16, 2, 16, 2, 3).mean(axis=(2, 4))
    assert np.abs(load_images(batches, size=16) - halves).max() <= 0.5
    with pytest.raises(ValueError, match="size <= 32"):
        load_images(batches, size=64)


def test_truncated_and_missing_batches_are_named(batches):
    file = batches / "data_batch_2.bin"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"data_batch_2\.bin has 6145 bytes.*3073"):
        load_images(batches)
    file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"data_batch_2\.bin has 0 bytes"):
        load_images(batches)
    (batches / "test_batch.bin").unlink()
    with pytest.raises(ValueError, match=r"no test_batch\*\.bin"):
        load_images(batches, "test")


def test_cifar10_uses_the_batches_in_nf_data(batches, monkeypatch):
    batches.rename(batches.parent / "cifar-10-batches-bin")
    monkeypatch.setenv("NF_DATA", str(batches.parent))
    monkeypatch.setattr(module, "CIFAR10_URL", "http://unused.invalid/")
    np.testing.assert_array_equal(load_images("cifar10"), random_images(5, 32, 32))
    with pytest.raises(ValueError, match="size <= 32"):
        load_images("cifar10", size=33)


class Server(http.server.ThreadingHTTPServer):
    """Serves `content`, closes the connection after `stop_after` bytes, notes every Range asked for."""

    def __init__(self, content):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.stop_after, self.honours_range, self.ranges = content, None, True, []
        self.url = f"http://127.0.0.1:{self.server_port}/cifar-10-binary.tar.gz"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        asked = self.headers.get("Range")
        self.server.ranges.append(asked)
        content, start = self.server.content, 0
        if asked and self.server.honours_range:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start : self.server.stop_after])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def archive():
    """A small archive laid out as the official one."""
    files = {
        "data_batch_1.bin": random_images(20, 32, 32),
        "test_batch.bin": random_images(3, 32, 32, seed=1),
    }
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, images in files.items():
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            content = records(images)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def server(archive, tmp_path, monkeypatch):
    server = Server(archive)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setattr(module, "CIFAR10_URL", server.url)
    monkeypatch.setattr(module, "CIFAR10_MD5", hashlib.md5(archive).hexdigest())
    monkeypatch.setattr(module, "CIFAR10_BYTES", len(archive))
    monkeypatch.setenv("NF_DATA", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def part(server, tmp_path):
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache" / "cifar-10-binary.tar.gz.part"


def test_cifar10_is_downloaded_once(server, tmp_path):
    np.testing.assert_array_equal(load_images("cifar10"), random_images(20, 32, 32))
    np.testing.assert_array_equal(load_images("cifar10", "test"), random_images(3, 32, 32, seed=1))
    assert server.ranges == [None]
    left = {path.name for path in (tmp_path / "cache").iterdir()}
    assert left - {"cifar-10-binary.tar.gz.lock"} == {"cifar-10-batches-bin", "cifar-10-binary.tar.gz"}


def test_an_archive_put_there_by_hand_is_used(server, archive, part):
    part.with_suffix("").write_bytes(archive)
    assert len(load_images("cifar10")) == 20 and server.ranges == []


def test_interrupted_download_is_kept_and_resumed(server, part):
    server.stop_after = len(server.content) - 1
    with pytest.raises(ConnectionError, match=r"65536 bytes are kept in .*\.part; the next call resumes"):
        load_images("cifar10")
    assert part.read_bytes() == server.content[:65536]  # whole blocks
    server.stop_after = None
    assert len(load_images("cifar10")) == 20
    assert server.ranges == [None, "bytes=65536-"] and not part.exists()


def test_partial_download_restarts_on_a_server_without_ranges(server, part):
    part.write_bytes(server.content[:10_000])
    server.honours_range = False
    assert len(load_images("cifar10")) == 20 and server.ranges == ["bytes=10000-"]


def test_complete_and_overlong_partial_downloads(server, part):
    part.write_bytes(server.content)
    assert len(load_images("cifar10")) == 20
    (part.parent / "cifar-10-binary.tar.gz").unlink()
    for file in (part.parent / "cifar-10-batches-bin").iterdir():
        file.unlink()
    part.write_bytes(server.content + b"more")
    with pytest.raises(ConnectionError, match="did not fit"):
        load_images("cifar10")
    assert not part.exists() and len(load_images("cifar10")) == 20


def test_tampered_download_is_refused_and_removed(server, part):
    genuine = server.content
    server.content = genuine[:5000] + bytes([genuine[5000] ^ 1]) + genuine[5001:]
    with pytest.raises(ValueError, match="did not deliver the file with MD5"):
        load_images("cifar10")
    assert not [path for path in part.parent.iterdir() if path.suffix != ".lock"]
    server.content = genuine
    assert len(load_images("cifar10")) == 20


def test_truncated_archive_put_there_by_hand_is_named_and_kept(server, archive, part):
    file = part.with_suffix("")
    file.write_bytes(archive[:-100])
    with pytest.raises(ValueError, match=rf"tar\.gz \({len(archive) - 100} bytes\) has MD5 .*delete it"):
        load_images("cifar10")
    assert file.exists() and server.ranges == []


def test_archive_that_escapes_its_folder_is_refused(server, part, monkeypatch):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.addfile(tarfile.TarInfo("../escaped"), io.BytesIO())
    server.content = buffer.getvalue()
    monkeypatch.setattr(module, "CIFAR10_MD5", hashlib.md5(server.content).hexdigest())
    with pytest.raises(tarfile.OutsideDestinationError):
        load_images("cifar10")
    assert not (part.parent / "cifar-10-batches-bin").exists()


def test_without_network_the_error_says_what_to_do(tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/cifar-10-binary.tar.gz"
    monkeypatch.setattr(module, "CIFAR10_URL", url)
    monkeypatch.setenv("NF_DATA", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(ConnectionError) as caught:
        load_images("cifar10")
    text = str(caught.value)
    for part in (url, module.CIFAR10_MD5, str(tmp_path / "cifar-10-binary.tar.gz"), "photos", "170052171"):
        assert part in text


# Folders and .npz files


def save(folder, name, image):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def test_folder_is_split_by_name(tmp_path):
    images = random_images(20, 12, 12)
    for i, image in enumerate(images):
        save(tmp_path, f"class{i % 3}/{i:02d}.png", image)
    train, test = load_images(tmp_path, "train", 12), load_images(tmp_path, "test", 12)
    assert len(train) == 18 and len(test) == 2
    both = {image.tobytes() for image in (*train, *test)}
    assert both == {image.tobytes() for image in images}
    np.testing.assert_array_equal(load_images(tmp_path, "train", 12, limit=4), train[:4])


def test_folder_with_train_and_test(tmp_path):
    images = random_images(3, 12, 12)
    for name, image in zip(("train/a.png", "train/b.BMP", "test/a.png"), images, strict=True):
        save(tmp_path, name, image)
    assert len(load_images(tmp_path, "train", 12)) == 2
    np.testing.assert_array_equal(load_images(tmp_path, "test", 12), images[2:])
    (tmp_path / "test" / "a.png").unlink()
    with pytest.raises(ValueError, match=r"test holds no image.*\.png"):
        load_images(tmp_path, "test", 12)


def test_folder_images_are_cropped_to_their_central_square(tmp_path):
    image = random_images(1, 12, 16)[0]
    save(tmp_path, "test/wide.png", image)
    np.testing.assert_array_equal(load_images(tmp_path, "test", 12)[0], image[:, 2:14])
    np.testing.assert_array_equal(load_images(tmp_path, "test", 6)[0], area_resize(image[:, 2:14], 6))


def test_grey_pictures_become_rgb_and_exif_turns_them(tmp_path):
    grey = random_images(1, 8, 8)[0, ..., 0]
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    (tmp_path / "test").mkdir()
    Image.fromarray(grey).save(tmp_path / "test" / "grey.png", exif=exif)
    np.testing.assert_array_equal(
        load_images(tmp_path, "test", 8)[0], np.repeat(grey[::-1, ::-1, None], 3, axis=-1)
    )


def test_bad_images_in_folders_are_named(tmp_path):
    save(tmp_path, "small/test/tiny.png", random_images(1, 8, 8)[0])
    with pytest.raises(ValueError, match=r"tiny\.png.*size <= 8"):
        load_images(tmp_path / "small", "test", 32)
    save(tmp_path, "deep/test/deep.png", np.zeros((8, 8), np.uint16))
    with pytest.raises(ValueError, match=r"deep\.png has mode I;16"):
        load_images(tmp_path / "deep", "test", 8)
    save(tmp_path, "cut/test/cut.png", random_images(1, 64, 64)[0])
    cut = tmp_path / "cut/test/cut.png"
    cut.write_bytes(cut.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"cut\.png cannot be read as an image"):
        load_images(tmp_path / "cut", "test", 8)
    cut.write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"cut\.png cannot be read as an image"):
        load_images(tmp_path / "cut", "test", 8)
    save(tmp_path, "one/only.png", random_images(1, 8, 8)[0])
    with pytest.raises(ValueError, match="at least 2"):
        load_images(tmp_path / "one", "train", 8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no image"):
        load_images(tmp_path / "empty")


def test_npz_with_train_and_test(tmp_path):
    train, test = random_images(5, 12, 16), random_images(2, 12, 16, seed=1)
    np.savez(tmp_path / "a.npz", train=train, test=test)
    np.testing.assert_array_equal(load_images(tmp_path / "a.npz", "train", 12), train[:, :, 2:14])
    np.testing.assert_array_equal(load_images(tmp_path / "a.npz", "test", 12, limit=1), test[:1, :, 2:14])
    with pytest.raises(ValueError, match="size <= 12"):
        load_images(tmp_path / "a.npz", "test", 13)


@pytest.mark.parametrize("key", ["images", "x"])
def test_npz_with_one_array_is_split(tmp_path, key):
    images = random_images(30, 8, 8)
    np.savez(tmp_path / "a.npz", **{key: images, "labels": np.arange(30)})
    train, test = (load_images(tmp_path / "a.npz", split, 8) for split in ("train", "test"))
    assert len(train) == 27 and len(test) == 3
    assert {image.tobytes() for image in (*train, *test)} == {image.tobytes() for image in images}
    np.testing.assert_array_equal(load_images(tmp_path / "a.npz", "train", 8, limit=4), train[:4])


def encoded(images):
    blobs = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "png")
        blobs.append(np.frombuffer(buffer.getvalue(), np.uint8))
    return np.concatenate(blobs), np.cumsum([0, *map(len, blobs)])


def test_npz_of_encoded_images(tmp_path):
    images = random_images(10, 8, 8)
    content, offsets = encoded(images)
    np.savez(tmp_path / "a.npz", bytes=content, offsets=offsets, labels=np.arange(10))
    train, test = (load_images(tmp_path / "a.npz", split, 8) for split in ("train", "test"))
    assert len(train) == 9 and len(test) == 1
    assert {image.tobytes() for image in (*train, *test)} == {image.tobytes() for image in images}
    damaged = content.copy()
    damaged[:] = 0
    np.savez(tmp_path / "b.npz", bytes=damaged, offsets=offsets)
    with pytest.raises(ValueError, match=r"b\.npz image \d cannot be read"):
        load_images(tmp_path / "b.npz", "train", 8)
    np.savez(tmp_path / "c.npz", bytes=content, offsets=offsets[:-1])
    with pytest.raises(ValueError, match="must increase from 0 to"):
        load_images(tmp_path / "c.npz", "train", 8)
    np.savez(tmp_path / "d.npz", bytes=content, offsets=offsets / 1.0)
    with pytest.raises(ValueError, match="'offsets' is float64"):
        load_images(tmp_path / "d.npz", "train", 8)


def test_bad_npz_files_are_named(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, a=np.zeros(3), b=np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"a float64 \(3,\), b float64 \(2, 2\).*'images'"):
        load_images(path)
    np.savez(path, images=random_images(4) / 255)
    with pytest.raises(ValueError, match="store uint8"):
        load_images(path)
    np.savez(path, images=np.array([{"pickled": 1}], dtype=object))
    with pytest.raises(ValueError, match="without pickle"):
        load_images(path)
    np.savez(path, images=random_images(4))
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"a\.npz cannot be read"):
        load_images(path)
    with open(path, "wb") as file:
        np.save(file, random_images(4))  # one array, no archive
    with pytest.raises(ValueError, match=r"a\.npz cannot be read"):
        load_images(path)


# Arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            dict(source="imagenet"),
            "source='imagenet' is unknown; pass 'photos', 'cifar10', or an existing path",
        ),
        (dict(source="missing.npz"), "missing.npz"),
        (dict(source=3), "source is int; pass 'photos'"),
        (
            dict(source="photos", split="validation"),
            "split='validation' is unknown; pass one of 'train', 'test'",
        ),
        (dict(source="photos", size=0), "size=0"),
        (dict(source="photos", size=32.0), "size=32.0"),
        (dict(source="photos", limit=0), "limit=0"),
        (dict(source="photos", limit=True), "limit=True"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_images(**arguments)


# Data that do not fit in memory


def write_shards(folder, pictures, shards=2):
    """Pictures as {key}.png with {key}.cls, dealt out to .tar files; returns the pictures by member name."""
    folder.mkdir()
    members = {}
    for number in range(shards):
        with tarfile.open(folder / f"part-{number}.tar", "w") as tar:
            for key, picture in enumerate(pictures[number::shards]):
                buffer = io.BytesIO()
                Image.fromarray(picture).save(buffer, "png")
                for suffix, content in ((".cls", b"3"), (".png", buffer.getvalue())):
                    info = tarfile.TarInfo(f"{key:04d}{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
                members[f"part-{number}.tar/{key:04d}.png"] = picture
    return members


@pytest.fixture
def shards(tmp_path, monkeypatch):
    """(folder of shards, pictures by name), with the cache of indices in a folder of its own."""
    monkeypatch.setenv("NF_DATA", str(tmp_path / "cache"))
    return tmp_path / "shards", write_shards(tmp_path / "shards", random_images(23, 9, 8))


def test_shards_are_ordered_and_split_as_a_folder_of_images(shards):
    folder, members = shards
    names = sorted(members, key=lambda name: hashlib.sha256(name.encode()).digest())
    test, train = (StreamedImages(folder, split, 8) for split in ("test", "train"))
    assert (len(test), train.shape, train.sharded) == (2, (21, 8, 8, 3), True)
    for streamed, wanted in ((test, names[:2]), (train, names[2:])):
        for image, name in zip(streamed, wanted, strict=True):
            np.testing.assert_array_equal(image, members[name][:8])
        np.testing.assert_array_equal(streamed[-1], streamed[len(streamed) - 1])
    np.testing.assert_array_equal(load_images(folder, "train", 4, limit=5), area_resize(train[:5], 4))
    with pytest.raises(IndexError):
        train[21]


def test_index_of_a_shard_is_built_once_for_its_content(shards, monkeypatch):
    folder, _ = shards
    first = StreamedImages(folder, "train", 8)[:]
    opened = []
    original = tarfile.open
    monkeypatch.setattr(tarfile, "open", lambda *given: opened.append(given) or original(*given))
    np.testing.assert_array_equal(StreamedImages(folder, "train", 8)[:], first)
    assert not opened
    (folder / "part-0.tar").unlink()
    write_shards(folder / "new", random_images(30, 8, 8, seed=1), 1)
    (folder / "new" / "part-0.tar").rename(folder / "part-0.tar")  # another content under the same name
    again = StreamedImages(folder, "train", 8)
    assert [mode for _, mode in opened] == ["w", "r:"] and len(again) == 37


def test_streamed_folder_is_that_in_memory(tmp_path):
    for index, image in enumerate(random_images(20, 12, 8)):
        save(tmp_path, f"class-{index % 2}/{index}.png", image)
    streamed = StreamedImages(tmp_path, "train", 4, limit=7)
    assert streamed.shape == (7, 4, 4, 3) and not streamed.sharded
    np.testing.assert_array_equal(streamed[:], load_images(tmp_path, "train", 4)[:7])


def test_streamed_fields_are_those_in_memory_whatever_workers_read_them(shards):
    folder, _ = shards
    streamed, whole = (SparseFields(f(folder, "train", 8)) for f in (StreamedImages, load_images))
    for dataset in (streamed, whole):
        dataset.set_epoch(3)
    batches = zip(DataLoader(streamed, 4, num_workers=2), DataLoader(whole, 4, num_workers=0), strict=True)
    for ours, theirs in batches:
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_images_are_streamed_where_they_are_shards_or_many(shards, tmp_path, monkeypatch):
    assert isinstance(open_images(shards[0], "train", 8), StreamedImages)
    for index, image in enumerate(random_images(20, 8, 8)):
        save(tmp_path, f"few/{index}.png", image)
    assert isinstance(open_images(tmp_path / "few", "train", 8), np.ndarray)
    monkeypatch.setattr(module, "STREAM_BYTES", 18 * 8 * 8 * 3)
    assert isinstance(open_images(tmp_path / "few", "train", 8), StreamedImages)
    assert isinstance(open_images(tmp_path / "few", "train", 8, limit=17), np.ndarray)
    np.testing.assert_array_equal(open_images("photos", "test", 8, 3), load_images("photos", "test", 8, 3))
    with pytest.raises(ValueError, match="is unknown; pass 'photos'"):
        open_images(tmp_path / "none")


@pytest.mark.parametrize("damage", ["header cut", "header flipped", "end cut"])
def test_a_shard_never_loses_images_silently(shards, damage):
    """To tarfile a damaged header is the end; what lies behind it must not be left out unsaid."""
    folder, _ = shards
    shard = folder / "part-0.tar"
    content = bytearray(shard.read_bytes())
    with tarfile.open(shard) as tar:
        start, end = tar.getmembers()[6].offset, tar.offset
    if damage == "header flipped":
        content[start + 5] ^= 1
    shard.write_bytes(content[: {"header cut": start + 300, "end cut": end}.get(damage)])
    for _ in range(2):  # nor is a wrong index kept
        with pytest.raises(ValueError, match=r"part-0\.tar cannot be read.*no end mark at byte \d+"):
            StreamedImages(folder, "train", 8)


def test_shards_beside_loose_images_are_refused(shards):
    folder, _ = shards
    save(folder, "class/0.png", random_images(1, 8, 8)[0])
    for read in (StreamedImages, load_images, open_images):
        with pytest.raises(ValueError, match=r"\.tar shards \(part-0\.tar .*loose images \(0\.png"):
            read(folder, "train", 8)


def test_damaged_shards_and_members_are_named(shards, tmp_path):
    folder, _ = shards
    shard = folder / "part-1.tar"
    content = shard.read_bytes()
    shard.write_bytes(content[:700])
    with pytest.raises(ValueError, match=r"part-1\.tar cannot be read as a \.tar file.*plain one"):
        StreamedImages(folder, "train", 8)
    shard.write_bytes(content.replace(b"\x89PNG", b"\x89PNX", 1))
    streamed = [*StreamedImages(folder, "test", 8)._places, *StreamedImages(folder, "train", 8)._places]
    assert len(streamed) == 23
    with pytest.raises(ValueError, match=r"part-1\.tar, the member at byte \d+, cannot be read as an image"):
        load_images(folder, "train", 8), load_images(folder, "test", 8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no image; .*or \.tar shards"):
        StreamedImages(tmp_path / "empty")


# One image


def test_load_image_takes_a_file_its_bytes_or_an_array(tmp_path):
    wide = random_images(1, 12, 20)[0]
    path = tmp_path / "wide.png"
    Image.fromarray(wide).save(path)
    for crop, left in ((0.0, 0), (0.5, 4), (1.0, 8)):
        wanted = module.area_resize(wide[:, left : left + 12], 6)
        for source in (path, str(path), path.read_bytes(), wide):
            np.testing.assert_array_equal(module.load_image(source, 6, crop), wanted)
    tall = wide.transpose(1, 0, 2)
    np.testing.assert_array_equal(module.load_image(tall, 12, 1.0), tall[8:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((b"no image",), "the image cannot be read as an image"),
        (("/no/such/file.png",), "/no/such/file.png cannot be read as an image"),
        ((np.zeros((8, 8, 3)),), "source is float64"),
        ((np.zeros((8, 9, 3), np.uint8), 9), "size=9 is above the 8 pixels"),
        ((np.zeros((8, 9, 3), np.uint8), 0), "size=0"),
        ((np.zeros((8, 9, 3), np.uint8), 8, 1.5), "crop=1.5 is outside"),
    ],
)
def test_load_image_refuses_what_it_cannot_use(arguments, message):
    with pytest.raises(ValueError, match=message):
        module.load_image(*arguments)
