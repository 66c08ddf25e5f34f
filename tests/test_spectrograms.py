"""Sounds: wav files, spectrograms, sources and their splits."""

import hashlib
import io
import math
import shutil
import struct
import zipfile
import zlib

import numpy as np
import pytest
import soundfile
import torch

from nfhelpers import spectrograms as module
from nfhelpers.spectrograms import load_spectrograms, read_clip, read_wav, stft

RATE, SPLITS = 8000, ("train", "validation", "test")


def tone(frequency, samples=4000, loudness=0.5):
    return loudness * np.sin(2 * np.pi * frequency * np.arange(samples) / RATE)


def write(path, samples=None, rate=RATE):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, tone(400, 300) if samples is None else samples, rate)


def chunk(name, content, size=None):
    return name + struct.pack("<I", len(content) if size is None else size) + content


def seeded():
    return torch.Generator().manual_seed(0)


INFO, ODD = chunk(b"LIST", b"INFO" + chunk(b"ICMT", b"data")), chunk(b"LIST", b"INFOx")
SIZES = (0, 2**32 - 1, 2**31 - 1, 2**31, 2_000_000_000, 0x7FFFF000)  # what streams write for "unknown"


@pytest.mark.parametrize(
    ("size", "more"), [*((s, b"") for s in SIZES), (500, INFO), (500, ODD), (0, ODD + b"\0")]
)
def test_headers_of_streams_and_recorders_are_read_to_the_end(size, more):
    soundfile.write(file := io.BytesIO(), tone(440, 250), RATE, format="WAV", subtype="PCM_16")
    data = file.getvalue()
    made = chunk(b"RIFF", data[8:36] + more + chunk(b"data", data[44:], size), size)
    np.testing.assert_array_equal(read_wav(io.BytesIO(made))[0], read_wav(io.BytesIO(data))[0])


@pytest.mark.parametrize("kept", [0, 10, 30, 44, 60, 1043])
def test_a_file_that_is_cut_is_refused_by_its_name(tmp_path, kept):
    write(tmp_path / "x.wav", tone(440, 500))
    (tmp_path / "x.wav").write_bytes((tmp_path / "x.wav").read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"x\.wav"):
        read_wav(tmp_path / "x.wav")


@pytest.mark.parametrize(
    "kind",
    "WAV PCM_16 1e-4;WAV FLOAT 0;WAV PCM_U8 .008;WAVEX PCM_32 0;RF64 PCM_16 1e-4;WAV ULAW .02".split(";"),
)
def test_formats_are_read_at_any_rate(tmp_path, kind):
    (form, subtype, error), file, samples = kind.split(), tmp_path / "x.wav", tone(440, 250)
    soundfile.write(file, np.stack([1.5 * samples, samples / 2], 1), 44_100, subtype, format=form)
    for source in (file, str(file), io.BytesIO(file.read_bytes())):
        read, rate = read_wav(source)  # channels are averaged
        np.testing.assert_allclose(read, samples, atol=float(error) + 1e-6)
        assert rate == 44_100 and read.dtype == np.float32


def test_magnitudes_equal_the_definition():
    """A windowed sum over each frame, written out, in float64."""
    n_fft, hop, samples = 14, 5, torch.randn(2, 33, dtype=torch.float64, generator=seeded())
    found = stft(samples, n_fft, hop).abs()
    assert found.shape == (2, 8, 33 // 5 + 1)
    padded = torch.nn.functional.pad(samples, (n_fft // 2, n_fft // 2))
    time = torch.arange(n_fft, dtype=torch.float64)
    window = 0.5 - 0.5 * torch.cos(2 * math.pi * time / n_fft)
    waves = torch.exp(-2j * math.pi * time[:, None] * torch.arange(8) / n_fft)  # (n_fft, 8)
    for frame in range(found.shape[2]):
        part = padded[:, frame * hop : frame * hop + n_fft] * window
        torch.testing.assert_close(found[:, :, frame], (part.to(waves) @ waves).abs())


def test_the_scale_is_clipped_outside_the_range():
    known = module.to_values(torch.tensor([[[0.0, 1e-6, 1e-3, 10**-1.5, 1.0, 10.0]]]), torch.ones(1), 60.0)
    torch.testing.assert_close(known, torch.tensor([[[-1.0, -1.0, -1.0, 0.0, 1.0, 1.0]]]))


def test_chirps_stay_what_they_were_and_splits_differ():
    data = load_spectrograms("chirps", "train", 32, limit=12, held_out=True)
    assert data.spectrograms.shape == (12, 1, 32, 32) and data.spectrograms.dtype == torch.float32
    assert data.labels.tolist() == [0, 1, 2, 3] * 3 and len(data.meta.class_names) == 4
    assert data.spectrograms.double().sum().item() == pytest.approx(-4923.4397, rel=1e-4)
    seen = {load_spectrograms("chirps", split, 8, limit=1).spectrograms.sum().item() for split in SPLITS}
    assert len(seen) == 3 and len(load_spectrograms("chirps", "test", 8)) == 256


def digits(takes=(0, 4, 5, 9, 10), speakers=("ada", "bob"), values=(0, 3, 7)):
    names = [f"{digit}_{speaker}_{take}.wav" for take in takes for speaker in speakers for digit in values]
    return {name: 300 + 40 * index for index, name in enumerate(names)}  # a frequency of its own for each


@pytest.mark.parametrize("kind", ["archive", "folder"])
def test_digits_are_split_by_take(tmp_path, monkeypatch, kind):
    for name, frequency in digits().items():
        write(tmp_path / "recordings" / name, tone(frequency))
    if kind == "archive":
        with zipfile.ZipFile(tmp_path / "v1.0.10.zip", "w", zipfile.ZIP_DEFLATED) as file:
            for name in sorted(digits()):
                file.write(tmp_path / "recordings" / name, f"data/recordings/{name}")
                file.writestr(f"__MACOSX/data/recordings/._{name}", b"\x00\x05\x16\x07")
        shutil.rmtree(tmp_path / "recordings")
    monkeypatch.setenv("NF_DATA", str(tmp_path))
    parts = [load_spectrograms("fsdd", split, (32, 48), held_out=True) for split in SPLITS]
    for part, which in zip(parts, (slice(12, 28), slice(28, 30), slice(12)), strict=True):
        names = [*digits()][which]
        assert [name.rsplit("/", 1)[1] for name in part.meta.names] == names
        assert part.labels.tolist() == [int(name[0]) for name in names]
        assert part.meta.class_names == tuple("0123456789") and part.meta.sample_rate == RATE
        bins = part.spectrograms[:, 0, :, 24].argmax(1)  # each tone lies in its bin
        wanted = torch.tensor([digits()[name] / (RATE / part.meta.n_fft) for name in names])
        assert (bins - wanted).abs().max() <= 0.6
    assert load_spectrograms("fsdd", size=8).meta.names == parts[0].meta.names + parts[1].meta.names


def write_text(path):
    path.write_text("<html>")
    return path


def test_digits_are_downloaded_once_if_they_are_the_ones(tmp_path, monkeypatch):
    def download(url, known_hash, fname, path, progressbar):
        with zipfile.ZipFile(path / fname, "w") as file:
            for take in range(6):
                write(tmp_path / "0.wav", tone(300 + take))
                file.write(tmp_path / "0.wav", f"v/recordings/0_ada_{take}.wav")
        return path / fname

    monkeypatch.setenv("NF_DATA", str(tmp_path / "data"))
    monkeypatch.setattr("pooch.retrieve", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(OSError, match="NF_DATA"):
        load_spectrograms("fsdd")
    monkeypatch.setattr("pooch.retrieve", lambda url, known, name, path, **_: write_text(path / name))
    with pytest.raises(OSError, match="NF_DATA"):
        load_spectrograms("fsdd")  # a page in its place
    monkeypatch.setattr("pooch.retrieve", download)
    with pytest.raises(OSError, match="NF_DATA"):
        load_spectrograms("fsdd")
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["fsdd.lock"]
    recordings = []
    for take in range(6):
        write(tmp_path / "0.wav", tone(300 + take))
        recordings.append((f"0_ada_{take}.wav", zlib.crc32((tmp_path / "0.wav").read_bytes())))
    monkeypatch.setattr(module, "FSDD_DIGEST", hashlib.sha256(repr(recordings).encode()).hexdigest())
    assert len(load_spectrograms("fsdd", "test", 8)) == 5
    monkeypatch.delattr("pooch.retrieve")
    assert len(load_spectrograms("fsdd", "train", 8)) == 1  # found where it was put


@pytest.mark.parametrize(
    "stray", ["my voice.wav", "3_ada_9 (1).wav", "x/0.wav", ".3_ada_7.wav", "._1_01_5.wav", "11_ada_7.wav"]
)
def test_a_stray_file_changes_neither_classes_nor_splits(tmp_path, recwarn, stray):
    for name in digits((4, 5, 6), ("01", "josé_2")):
        write(tmp_path / name)
    before = [load_spectrograms(tmp_path, split, 8).meta for split in SPLITS]
    write(tmp_path / stray)
    for number in range(60 * (stray == "my voice.wav")):  # more than there are digits
        write(tmp_path / f"my voice.wav {number}.wav")
    after = [load_spectrograms(tmp_path, split, 8).meta for split in SPLITS]
    assert [meta.names for meta in before] == [meta.names for meta in after]
    assert after[0].class_names == tuple("0123456789")
    said = {stray in str(warning.message) for warning in recwarn}
    assert said == (set() if stray.startswith(".") else {True})


def test_folders_are_classes_whatever_lies_beside_them(tmp_path):
    for kind, frequency in (("low", 400), ("high", 3000)):
        for index in range(10):
            write(tmp_path / kind / f"take {index}.wav", tone(frequency))
    write(tmp_path / "low" / ".ipynb_checkpoints" / "0.wav")
    (tmp_path / "low" / "old").mkdir()
    (tmp_path / "low" / "take 3.wav").rename(tmp_path / "low" / "old" / "take.WAV")
    write(tmp_path / "stray.wav")
    with pytest.warns(UserWarning, match=r"stray\.wav"):
        parts = [load_spectrograms(tmp_path, split, 32, held_out=True) for split in SPLITS]
    assert [len(part) for part in parts] == [16, 2, 2]
    assert len({name for part in parts for name in part.meta.names}) == 20
    for part in parts:
        assert part.meta.class_names == ("high", "low")
        assert ((part.spectrograms[:, 0, :, 16].argmax(1) > 16) == (part.labels == 0)).all()


def test_folders_of_splits_are_kept_and_labels_mean_the_same_in_each(tmp_path):
    for split, kind in (("Train", "a"), ("Train", "b"), ("valid", "b"), ("testing", "b"), ("testing", "c")):
        write(tmp_path / split / kind / "0.wav")
    train, validation, test = (load_spectrograms(tmp_path, split, 16, held_out=True) for split in SPLITS)
    assert train.meta.class_names == validation.meta.class_names == test.meta.class_names == ("a", "b", "c")
    assert sorted(train.labels.tolist()) == [0, 1] and validation.labels.tolist() == [1]
    write(tmp_path / "Train" / "a" / "1.wav", rate=16_000)
    with pytest.raises(ValueError, match="sample rate"):
        load_spectrograms(tmp_path, "train", 16)
    for name in ("train/5_ada_3.wav", "test/7_bob_9.wav"):  # digits that somebody has split
        write(tmp_path / "spoken" / name)
    assert load_spectrograms(tmp_path / "spoken", "train", 16).labels.tolist() == [5]
    assert load_spectrograms(tmp_path / "spoken", "test", 16).labels.tolist() == [7]


def test_clips_are_cut_to_what_is_loud_or_lie_amid_silence(tmp_path):
    late = np.concatenate([0.001 * tone(1000, 9000), tone(1000, 3000), np.zeros(4000)])
    for name, samples in (("short", tone(1000, 500)), ("long", late), ("silent", np.zeros(100))):
        write(tmp_path / f"{name}.wav", samples)
    clip, rate = read_clip(tmp_path / "short.wav", 64)
    length = 63 * module.frames_of(64, rate)[1]
    before = (length - 500) // 2
    assert clip.shape == (length,) and not clip[:before].any() and not clip[before + 500 :].any()
    np.testing.assert_array_equal(clip[before : before + 500], read_wav(tmp_path / "short.wav")[0])
    clip, _ = read_clip(io.BytesIO((tmp_path / "long.wav").read_bytes()), 64)
    assert np.square(clip).sum() == pytest.approx(np.square(late).sum(), rel=1e-4)
    for name in ("short", "long"):
        (tmp_path / f"{name}.wav").unlink()
    silent = load_spectrograms(tmp_path, "test", 64)
    assert (silent.spectrograms == -1).all() and silent.meta.reference.tolist() == [1]


def test_an_archive_has_splits_and_classes_too_and_what_is_damaged_is_said(tmp_path):
    write(tmp_path / "x.wav")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        for name in ("Train/a/0", "Train/b/1", "Test/b/2", "Test/b/3"):
            file.write(tmp_path / "x.wav", f"mine/{name}.wav")
        file.writestr("mine/Test/b/4.wav", (tmp_path / "x.wav").read_bytes()[:100])
    assert load_spectrograms(tmp_path / "x.zip", "train", 8).labels.tolist() in ([0, 1], [1, 0])
    with pytest.warns(UserWarning, match=r"4\.wav"):
        assert load_spectrograms(tmp_path / "x.zip", "test", 8).labels.tolist() == [1, 1]


def test_what_holds_no_sound_is_refused(tmp_path):
    write(tmp_path / "one.wav")
    (tmp_path / "silence").mkdir()
    (tmp_path / "silence" / "empty.wav").touch()
    for source, named in (("birds", "birds"), ("one.wav", "one.wav"), ("silence", "empty.wav")):
        with pytest.raises(ValueError, match=named):
            load_spectrograms(tmp_path / source, "test", 8)
