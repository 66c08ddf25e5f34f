import dataclasses
import io
import math
import zipfile

import numpy as np
import pytest
import torch
from scipy.io import wavfile
from torch.utils.data import DataLoader

from nfhelpers import spectrograms as module
from nfhelpers.spectrograms import (
    generated_meta,
    griffin_lim,
    load_clip,
    load_spectrograms,
    magnitude_of,
    read_wav,
    spectral_convergence,
    to_audio,
    to_magnitude,
    to_values,
    write_wav,
)

RATE = 8000


def tone(frequency, samples=4000, rate=RATE, loudness=0.5):
    return loudness * np.sin(2 * np.pi * frequency * np.arange(samples) / rate)


def wav_bytes(samples, rate=RATE):
    file = io.BytesIO()
    write_wav(file, samples, rate)
    return file.getvalue()


def digits(takes=(0, 4, 5, 9), speakers=("ada", "bob"), values=(0, 3, 7)):
    """Names of recordings, in no order, and a frequency that tells each from the others."""
    names = [f"{digit}_{speaker}_{take}.wav" for digit in values for speaker in speakers for take in takes]
    return {name: 300 + 40 * index for index, name in enumerate(names)}


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "digits.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("data/README.md", "not a sound")
        file.writestr("data/other.wav", b"not one of them")
        for name, frequency in digits().items():
            file.writestr(f"data/recordings/{name}", wav_bytes(tone(frequency)))
    return path


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "recordings"
    path.mkdir()
    for name, frequency in digits().items():
        write_wav(path / name, tone(frequency), RATE)
    return path


# Wav files


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float32])
def test_wav_files_of_any_sample_format_are_read(tmp_path, dtype):
    samples = tone(440, 200)
    if dtype == np.uint8:
        stored = np.rint(samples * 128 + 128).astype(dtype)
    elif dtype == np.float32:
        stored = samples.astype(dtype)
    else:
        stored = np.rint(samples * np.iinfo(dtype).max).astype(dtype)
    wavfile.write(tmp_path / "x.wav", 16_000, stored)
    read, rate = read_wav(tmp_path / "x.wav")
    assert rate == 16_000 and read.dtype == np.float32 and read.shape == (200,)
    np.testing.assert_allclose(read, samples, atol=0.5 / 128 if dtype == np.uint8 else 1e-4)


def test_wav_files_are_written_and_read_back(tmp_path):
    samples = torch.tensor([0.0, 0.25, -1.0, 1.0, 2.0])
    write_wav(tmp_path / "x.wav", samples, RATE)
    read, rate = read_wav(tmp_path / "x.wav")
    assert rate == RATE
    np.testing.assert_allclose(read, [0, 0.25, -1, 1, 1], atol=1 / 32768)  # what is outside is clipped
    write_wav(tmp_path / "x.wav", samples, RATE, normalise=True)
    np.testing.assert_allclose(read_wav(tmp_path / "x.wav")[0], samples * 0.45, atol=1 / 32768)


def test_channels_are_mixed_down(tmp_path):
    wavfile.write(tmp_path / "x.wav", RATE, np.array([[16384, 0], [0, -8192]], np.int16))
    np.testing.assert_allclose(read_wav(tmp_path / "x.wav")[0], [0.25, -0.125])


@pytest.mark.parametrize("kept", [0, 10, 30, 60, 1043])
def test_a_truncated_wav_file_is_refused(tmp_path, kept):
    (tmp_path / "x.wav").write_bytes(wav_bytes(tone(440, 500))[:kept])
    with pytest.raises(ValueError, match=r"x\.wav cannot be read as a wav file"):
        read_wav(tmp_path / "x.wav")


def test_useless_wav_files_are_refused(tmp_path):
    wavfile.write(tmp_path / "x.wav", RATE, np.array([0, np.nan], np.float32))
    with pytest.raises(ValueError, match=r"x\.wav holds NaN or infinite samples"):
        read_wav(tmp_path / "x.wav")
    wavfile.write(tmp_path / "x.wav", RATE, np.zeros(0, np.int16))
    with pytest.raises(ValueError, match=r"x\.wav"):
        read_wav(tmp_path / "x.wav")
    for samples in (np.zeros((2, 3)), [np.inf], []):
        with pytest.raises(ValueError, match=r"pass \(S,\), not empty, all finite"):
            write_wav(tmp_path / "x.wav", samples, RATE)


# Transforms, and back


def test_magnitudes_equal_the_definition():
    """A windowed sum over each frame, written out, in float64."""
    n_fft, hop = 14, 5
    samples = torch.randn(2, 33, dtype=torch.float64)
    found = magnitude_of(samples, n_fft, hop)
    assert found.shape == (2, 8, 33 // 5 + 1)
    padded = torch.nn.functional.pad(samples, (n_fft // 2, n_fft // 2))
    time = torch.arange(n_fft, dtype=torch.float64)
    window = 0.5 - 0.5 * torch.cos(2 * math.pi * time / n_fft)
    for frame in range(found.shape[2]):
        part = padded[:, frame * hop : frame * hop + n_fft] * window
        for k in range(8):
            phase = 2 * math.pi * k * time / n_fft
            expected = torch.hypot((part * phase.cos()).sum(1), (part * phase.sin()).sum(1))
            torch.testing.assert_close(found[:, k, frame], expected)


def test_a_full_scale_sine_has_a_quarter_of_the_frame():
    n_fft, hop = 64, 32
    samples = torch.from_numpy(tone(10 * RATE / n_fft, 1024, loudness=1.0))[None]
    found = magnitude_of(samples, n_fft, hop)[0]
    assert found[:, 16].argmax() == 10
    assert found[10, 16].item() == pytest.approx(n_fft / 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_scale_is_undone_exactly_within_the_range(dtype):
    samples = torch.randn(3, 620, dtype=dtype, generator=torch.Generator().manual_seed(0))
    magnitude = magnitude_of(samples * torch.tensor([1e-3, 1, 30], dtype=dtype)[:, None], 62, 31)
    reference = magnitude.flatten(1).amax(1)
    values = to_values(magnitude, reference, 60.0)
    assert values.min() >= -1 and values.max() == 1
    inside = values > -1
    assert inside.float().mean() > 0.9
    back = to_magnitude(values, reference, 60.0)
    rtol = 2e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(back[inside], magnitude[inside], rtol=rtol, atol=0)
    torch.testing.assert_close(to_values(back, reference, 60.0), values, rtol=0, atol=10 * rtol)


def test_what_is_outside_the_range_is_clipped():
    magnitude = torch.tensor([[[0.0, 1e-6, 1e-3, 1.0, 10.0]]])
    values = to_values(magnitude, torch.ones(1), 60.0)
    torch.testing.assert_close(values, torch.tensor([[[-1.0, -1.0, -1.0, 1.0, 1.0]]]))
    back = to_magnitude(torch.tensor([[[-3.0, -1.0, 0.0, 1.0, 3.0]]]), torch.ones(1), 60.0)
    torch.testing.assert_close(back, torch.tensor([[[1e-3, 1e-3, 10**-1.5, 1.0, 1.0]]]))


def test_spectrograms_lead_back_to_the_magnitudes_of_their_clips(folder):
    data = load_spectrograms(folder, "test", 64)
    meta = data.meta
    back = to_magnitude(data.spectrograms[:, 0], meta.reference, meta.dynamic_range)
    for index, name in enumerate(meta.names):
        samples, rate = read_wav(name)
        assert rate == meta.sample_rate
        start, length = int(meta.start[index]), 63 * meta.hop
        clip = torch.from_numpy(samples[start : start + length])[None]
        magnitude = magnitude_of(clip, meta.n_fft, meta.hop)[0]
        inside = data.spectrograms[index, 0] > -1
        torch.testing.assert_close(back[index][inside], magnitude[inside], rtol=2e-5, atol=0)
        assert (magnitude[~inside] <= meta.reference[index] / 1000 * (1 + 1e-4)).all()


@pytest.mark.parametrize("hop", [31, 16])
def test_griffin_lim_finds_a_sine(hop):
    n_fft, frames = 62, 40
    samples = torch.from_numpy(tone(500, (frames - 1) * hop).astype(np.float32))[None]
    magnitude = magnitude_of(samples, n_fft, hop)
    assert spectral_convergence(magnitude, samples, hop).item() < 1e-6

    def sound(iterations):
        generator = torch.Generator().manual_seed(0)
        return griffin_lim(magnitude, n_fft, hop, iterations=iterations, generator=generator)

    # Measured with four seeds: from 0.31 after 1 iteration, up to 0.051 after 64, up to 0.024 after 256.
    assert spectral_convergence(magnitude, sound(1), hop).item() > 0.2
    assert spectral_convergence(magnitude, sound(64), hop).item() < 0.06
    found = sound(256)
    assert found.shape == samples.shape
    assert spectral_convergence(magnitude, found, hop).item() < 0.03
    spectrum = np.abs(np.fft.rfft(found[0].numpy()))
    assert abs(spectrum.argmax() * RATE / found.shape[1] - 500) < RATE / found.shape[1] + 1


def test_griffin_lim_improves_with_iterations_and_is_reproducible():
    data = load_spectrograms("chirps", "test", 32, limit=4)
    meta = data.meta
    magnitude = to_magnitude(data.spectrograms[:, 0], meta.reference, meta.dynamic_range)

    def error(iterations, momentum=0.99):
        generator = torch.Generator().manual_seed(0)
        sound = griffin_lim(
            magnitude, meta.n_fft, meta.hop, iterations=iterations, momentum=momentum, generator=generator
        )
        return spectral_convergence(magnitude, sound, meta.hop).mean().item()

    assert error(64) < error(8) < error(1)
    assert error(64) < error(64, momentum=0.0)  # the fast one earns its name
    assert error(8) == error(8)


def test_audio_is_as_long_and_as_loud_as_its_clips():
    data = load_spectrograms("chirps", "test", 32, limit=6)
    meta = data.meta
    generator = torch.Generator().manual_seed(0)
    sound = to_audio(data.spectrograms, meta, reference=meta.reference, generator=generator)
    assert sound.shape == (6, 31 * meta.hop) and sound.isfinite().all()
    loudest = magnitude_of(sound, meta.n_fft, meta.hop).flatten(1).amax(1)
    torch.testing.assert_close(loudest, meta.reference, rtol=0.2, atol=0)
    median = to_audio(data.spectrograms, meta, generator=generator)
    loudest = magnitude_of(median, meta.n_fft, meta.hop).flatten(1).amax(1)
    torch.testing.assert_close(loudest, meta.reference.median().expand(6), rtol=0.2, atol=0)
    with pytest.raises(ValueError, match=r"their meta asks for \(N, 1, 32, W\)"):
        to_audio(data.spectrograms[:, :, 1:], meta)


# Sources


def test_chirps_are_the_same_at_every_call_and_labelled():
    data = load_spectrograms("chirps", "train", 32, limit=12)
    assert data.spectrograms.shape == (12, 1, 32, 32) and data.spectrograms.dtype == torch.float32
    assert data.spectrograms.min() >= -1 and data.spectrograms.max() == 1
    assert data.labels.tolist() == [0, 1, 2, 3] * 3 and data.labels.dtype == torch.int64
    again = load_spectrograms("chirps", "train", 32, limit=20)
    assert torch.equal(again.spectrograms[:12], data.spectrograms)
    assert data.meta.class_names == module.CHIRP_CLASSES
    test = load_spectrograms("chirps", "test", 32, limit=12)
    assert not torch.equal(test.spectrograms, data.spectrograms)
    assert len(load_spectrograms("chirps", "test", 8).labels) == module.CHIRP_COUNTS["test"]


@pytest.mark.parametrize("size", [32, 64, (64, 32)])
def test_chirps_look_like_their_class(size):
    """The loudest bin of a frame, early and late in the tone, weighted to where it is loud."""
    data = load_spectrograms("chirps", "test", size, limit=64)
    images = data.spectrograms[:, 0]
    width = images.shape[2]
    pitch = images.argmax(1).float()  # (N, W)
    slope = pitch[:, 2 * width // 3] - pitch[:, width // 3]
    rising, falling, constant = (slope[data.labels == kind] for kind in range(3))
    assert (rising > 0).all() and (falling < 0).all() and (constant.abs() <= 1).all()
    # In the middle a two-tone has two peaks more than 10 dB above what lies between them.
    middle = images[:, :, width // 2]
    for image, label in zip(middle, data.labels, strict=True):
        loud = (image > 1 - 2 * 15 / 60).nonzero()[:, 0]
        assert ((loud.diff() > 2).any() == (label == 3)).item()


def test_a_clip_is_shown_whole_at_every_size():
    small, large = (load_spectrograms("chirps", "test", size, limit=16) for size in (32, 64))
    for index in (small.labels != 3).nonzero()[:, 0]:  # of two tones now one is louder, now the other
        here = small.spectrograms[index, 0].argmax(0).float()[8:24] / 31
        there = large.spectrograms[index, 0].argmax(0).float().view(32, 2).mean(1)[8:24] / 63
        assert (here - there).abs().median() < 0.04


@pytest.mark.parametrize("kind", ["archive", "folder"])
def test_digits_are_split_by_take(kind, request):
    path = request.getfixturevalue(kind)
    train, test = (load_spectrograms(path, split, 64) for split in ("train", "test"))
    assert len(train.labels) == len(test.labels) == 12
    takes = {int(name.rsplit("_", 1)[1][:-4]) for name in test.meta.names}
    assert takes == {0, 4} and test.labels[:6].tolist() == [0, 3, 7, 0, 3, 7]
    assert [name.rsplit("_", 2)[0][-1] for name in test.meta.names] == [str(x) for x in test.labels.tolist()]
    assert train.meta.class_names == tuple("0123456789") and train.meta.sample_rate == RATE
    few = load_spectrograms(path, "train", 64, limit=3)
    assert torch.equal(few.spectrograms, train.spectrograms[:3])


def test_an_archive_and_its_folder_are_the_same(archive, folder):
    one, other = (load_spectrograms(path, "test", (32, 48)) for path in (archive, folder))
    assert one.spectrograms.shape == (12, 1, 32, 48)
    assert torch.equal(one.spectrograms, other.spectrograms) and torch.equal(one.labels, other.labels)
    # Each tone lies in its bin.
    bins = one.spectrograms[:, 0, :, 24].argmax(1)
    wanted = [digits()[name.rsplit("/", 1)[1]] / (RATE / one.meta.n_fft) for name in one.meta.names]
    assert (bins - torch.tensor(wanted)).abs().max() <= 0.6


@pytest.mark.parametrize("name", ["fsdd-recordings.zip", "v1.0.10.zip"])
def test_fsdd_is_found_in_the_data_folder(archive, monkeypatch, name):
    monkeypatch.setenv("NF_DATA", str(archive.parent))
    with pytest.raises(FileNotFoundError, match=r"archive/refs/tags/v1\.0\.10\.zip.*set NF_DATA.*'chirps'"):
        load_spectrograms("fsdd")
    archive.rename(archive.with_name(name))
    assert len(load_spectrograms("fsdd", "test").labels) == 12


def test_fsdd_is_found_as_a_folder(folder, monkeypatch):
    monkeypatch.setenv("NF_DATA", str(folder.parent))
    assert len(load_spectrograms("fsdd", "test", 32, limit=5).labels) == 5


def test_a_folder_of_wav_files_is_split_and_labelled_by_folder(tmp_path):
    for kind, frequency in (("low", 400), ("high", 3000)):
        (tmp_path / kind).mkdir()
        for index in range(10):
            write_wav(tmp_path / kind / f"take {index}.wav", tone(frequency), RATE)
    train, test = (load_spectrograms(tmp_path, split, 32) for split in ("train", "test"))
    assert len(train.labels) == 18 and len(test.labels) == 2
    assert set(train.meta.names).isdisjoint(test.meta.names)
    assert train.meta.class_names == test.meta.class_names == ("high", "low")
    loudest = train.spectrograms[:, 0, :, 16].argmax(1)
    assert ((loudest > 16) == (train.labels == 0)).all()
    assert load_spectrograms(tmp_path, "train", 32, limit=4).meta.names == train.meta.names[:4]


def test_a_divided_folder_keeps_its_splits(tmp_path):
    for split, kind, frequency in (("train", "a", 400), ("train", "b", 900), ("test", "b", 900)):
        (tmp_path / split / kind).mkdir(parents=True)
        write_wav(tmp_path / split / kind / "0.wav", tone(frequency), RATE)
    train, test = (load_spectrograms(tmp_path, split, 32) for split in ("train", "test"))
    assert sorted(train.labels.tolist()) == [0, 1] and test.labels.tolist() == [1]
    assert test.meta.class_names == ("a", "b")


def test_short_clips_lie_in_the_middle_and_long_ones_are_cut_to_what_is_loud(tmp_path):
    folder = tmp_path / "train"
    folder.mkdir()
    write_wav(folder / "short.wav", tone(1000, 500), RATE)
    late = np.concatenate([0.001 * tone(1000, 9000), tone(1000, 3000), np.zeros(4000)])
    write_wav(folder / "long.wav", late, RATE)
    data = load_spectrograms(tmp_path, "train", 64)
    found = {name.rsplit("/", 1)[1]: index for index, name in enumerate(data.meta.names)}
    length = 63 * data.meta.hop
    short, long = found["short.wav"], found["long.wav"]
    assert data.meta.start[short] == -((length - 500) // 2)
    loud = data.spectrograms[short, 0].amax(0) > 0
    assert loud[32] and not loud[:26].any() and not loud[-26:].any()
    start = int(data.meta.start[long])
    assert start <= 9000 and start + length >= 12_000 and start + length <= len(late)


def test_silence_is_the_lowest_value(tmp_path):
    (tmp_path / "train").mkdir()
    write_wav(tmp_path / "train" / "x.wav", np.zeros(100), RATE)
    data = load_spectrograms(tmp_path, "train", 32)
    assert (data.spectrograms == -1).all() and data.meta.reference.tolist() == [1]


def test_spectrograms_are_a_dataset():
    data = load_spectrograms("chirps", "test", 8, limit=5)
    assert len(data) == 5
    batches = list(DataLoader(data, batch_size=2))
    assert [len(batch["labels"]) for batch in batches] == [2, 2, 1]
    assert torch.equal(torch.cat([batch["spectrograms"] for batch in batches]), data.spectrograms)
    assert torch.equal(torch.cat([batch["labels"] for batch in batches]), data.labels)
    with pytest.raises(IndexError):
        data[5]


def test_meta_is_frozen():
    meta = load_spectrograms("chirps", "test", 8, limit=1).meta
    with pytest.raises(dataclasses.FrozenInstanceError):
        meta.hop = 3


# What is refused


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(source="birds"), "source='birds' is unknown; pass 'chirps', 'fsdd', or an existing path"),
        (dict(source=3), "source is int"),
        (dict(split="valid"), "split='valid' is unknown; pass one of 'train', 'test'"),
        (dict(size=7), "size=7 is not a whole number of at least 8"),
        (dict(size=(64, 32, 1)), r"size=\(64, 32, 1\) is not"),
        (dict(size=64.0), "size=64.0 is not"),
        (dict(size=True), "size=True is not"),
        (dict(limit=0), "limit=0 is not a positive integer"),
    ],
)
def test_load_spectrograms_refuses(wrong, message):
    with pytest.raises(ValueError, match=message):
        load_spectrograms(**{**dict(source="chirps", split="train", size=32, limit=2), **wrong})


def test_folders_and_archives_are_checked(tmp_path, archive):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no wav file"):
        load_spectrograms(tmp_path / "empty")
    (tmp_path / "broken.zip").write_bytes(archive.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"broken\.zip cannot be read as a zip archive"):
        load_spectrograms(tmp_path / "broken.zip")
    damaged = bytearray(archive.read_bytes())
    damaged[2000:2100] = bytes(100)  # inside a recording
    (tmp_path / "damaged.zip").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"damaged\.zip cannot be read as a zip archive"):
        for split in ("train", "test"):
            load_spectrograms(tmp_path / "damaged.zip", split)
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as file:
        file.writestr("a.txt", "x")
    with pytest.raises(ValueError, match=r"other\.zip holds no file named \{digit\}_\{speaker\}_\{index\}"):
        load_spectrograms(tmp_path / "other.zip")


def test_sample_rates_that_differ_are_refused(tmp_path):
    (tmp_path / "train").mkdir()
    for name, rate in (("a", 8000), ("b", 16_000)):
        write_wav(tmp_path / "train" / f"{name}.wav", tone(400), rate)
    with pytest.raises(ValueError, match=r"has a sample rate of \d+ Hz and .* resample them to one"):
        load_spectrograms(tmp_path, "train")


def test_a_split_without_clips_is_refused(tmp_path):
    write_wav(tmp_path / "3_ada_9.wav", tone(400), RATE)
    with pytest.raises(ValueError, match="holds no clip of split='test'"):
        load_spectrograms(tmp_path, "test")
    (tmp_path / "3_ada_9.wav").rename(tmp_path / "one.wav")
    with pytest.raises(ValueError, match="holds one wav file; a train and a test split need at least 2"):
        load_spectrograms(tmp_path, "train")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: magnitude_of(torch.zeros(2, 8), 8, 5), "n_fft=8, hop=5; pass an even n_fft"),
        (lambda: magnitude_of(torch.zeros(2, 8), 7, 2), "n_fft=7"),
        (lambda: magnitude_of(torch.zeros(8), 8, 4), r"pass floating \(N, S\), not empty"),
        (lambda: griffin_lim(torch.ones(1, 4, 9), 8, 4), r"pass \(N, n_fft/2 \+ 1, W\) = \(N, 5, W\)"),
        (lambda: griffin_lim(torch.ones(1, 5, 9), 8, 4, iterations=0), "iterations=0 is not"),
        (lambda: griffin_lim(torch.ones(1, 5, 9), 8, 4, momentum=1.0), r"momentum=1.0 is outside \[0, 1\)"),
        (lambda: to_values(torch.ones(1, 5, 9), torch.zeros(1), 60.0), r"pass \(N,\) positive magnitudes"),
        (lambda: to_magnitude(torch.ones(1, 5, 9), torch.ones(1), 0.0), "dynamic_range=0.0 is not positive"),
        (lambda: spectral_convergence(torch.ones(1, 5, 9), torch.ones(1, 30), 4), r"samples \(N, \(W - 1\)"),
    ],
)
def test_transforms_refuse(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Without a dataset


@pytest.mark.parametrize("length", [100, 5000])
def test_a_clip_is_what_the_dataset_makes_of_it(tmp_path, length):
    for name in ("one.wav", "two.wav"):
        write_wav(tmp_path / name, np.random.default_rng(len(name)).uniform(-0.5, 0.5, length), RATE)
    train = load_spectrograms(tmp_path, "train", 16)
    file = tmp_path / train.meta.names[0].rsplit("/", 1)[-1]
    made, clip = load_clip(file, 16)
    assert torch.equal(made.spectrograms, train.spectrograms)
    assert torch.equal(made.meta.reference, train.meta.reference)
    assert torch.equal(made.meta.start, train.meta.start)
    assert clip.shape == (1, 15 * made.meta.hop) and made.meta.class_names == (file.name,)
    start, samples = made.meta.start.item(), torch.from_numpy(read_wav(file)[0])
    if length > clip.shape[1]:
        assert torch.equal(clip[0], samples[start : start + clip.shape[1]])
    else:
        assert torch.equal(clip[0, -start : length - start], samples)
    assert torch.equal(load_clip(io.BytesIO(file.read_bytes()), 16)[1], clip)
    with pytest.raises(ValueError, match="size=4"):
        load_clip(file, 4)


def test_generated_spectrograms_sound_without_their_data():
    """The meta is that of the clips, but for their loudness: of a full-scale sine."""
    real = load_spectrograms("chirps", "test", (32, 24), limit=3)
    meta = generated_meta((32, 24), RATE, real.meta.class_names)
    same = ("sample_rate", "n_fft", "hop", "dynamic_range", "class_names")
    assert all(getattr(meta, name) == getattr(real.meta, name) for name in same)
    sine = torch.from_numpy(tone(1000, 23 * meta.hop, loudness=1.0)).float()[None]
    loudest = magnitude_of(sine, meta.n_fft, meta.hop).max()
    assert meta.reference.item() == pytest.approx(loudest.item(), rel=0.15)  # between two bins
    generator = torch.Generator().manual_seed(0)
    assert to_audio(real.spectrograms, meta, generator=generator).shape == (3, 23 * meta.hop)
    with pytest.raises(ValueError, match="size="):
        generated_meta(4, RATE, ())
