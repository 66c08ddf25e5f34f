"""Sounds as spectrograms of a fixed size, by the short-time Fourier transform (STFT).

Magnitudes in decibels are mapped to [-1, 1]: 1 is the loudest entry of a clip, -1 is `DYNAMIC_RANGE` below.
"""

import hashlib
import io
import re
import struct
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from nfhelpers.files import data_folder, left_out, read_usable, source_path, split_files, take_split

DYNAMIC_RANGE = 60.0  # decibels
SECONDS = 0.5  # what a spectrogram shows, unless it is too small for that: `frames_of`
CHIRP_CLASSES = ("rising", "falling", "constant", "two-tone")
FSDD_URL = "https://github.com/Jakobovski/free-spoken-digit-dataset/archive/refs/tags/v1.0.10.zip"
FSDD_NAMES = "fsdd-recordings.zip free-spoken-digit-dataset-1.0.10.zip v1.0.10.zip fsdd recordings".split()
FSDD_DIGEST = "3cabfced829de9673d1e373d66c2a9a0b053adee0fdc094b3dc545d056ed3ac9"  # of names and checksums
DIGIT = re.compile(r"(\d)_(.+)_(\d+)\.\w+")  # digit, speaker, take
SOUNDS = set(".wav .wave .flac .ogg .opus".split())


@dataclass(frozen=True)
class SpectrogramMeta:
    """What leads from N spectrograms back to sound, and where they come from."""

    sample_rate: int  # Hz
    n_fft: int  # samples of a frame, a Hann window
    hop: int  # samples from frame to frame
    reference: torch.Tensor  # (N,), the magnitude that is 1
    class_names: tuple[str, ...]
    names: tuple[str, ...] = ()  # N files
    dynamic_range: float = DYNAMIC_RANGE  # dB


@dataclass(frozen=True)
class Spectrograms:
    """Spectrograms (N, 1, H, W) float32 in [-1, 1] and labels (N,) int64; also a dataset of their dicts."""

    spectrograms: torch.Tensor
    labels: torch.Tensor
    meta: SpectrogramMeta

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index) -> dict[str, torch.Tensor]:
        return {"spectrograms": self.spectrograms[index], "labels": self.labels[index]}


def load_spectrograms(source, split="train", size=64, limit=None, held_out=False) -> Spectrograms:
    """The first `limit` clips of a source as labelled spectrograms of a size: (H, W), or a number for both.

    - "chirps": synthetic tones in noise of four classes at 8 kHz, 2,048 to train on and 256 of other splits.
    - "fsdd": spoken digits, from `data_folder()`, downloaded if they are not there; or a folder or archive of
      {digit}_{speaker}_{take}.wav. Takes 0 to 4 are test, as the Free Spoken Digit Dataset's authors say.
    - a folder of sounds of one sample rate, whose classes are its folders. held_out: `files.take_split`.
    """
    path = source_path(source, ("chirps", "fsdd"), split)
    if path == "chirps":
        return _chirps(split, limit, size)
    if path == "fsdd":
        path = _digits()
    found, classes = _files(path)
    items = take_split(found, split, path, held_out)[:limit]
    rows = read_usable(lambda item: (*read_clip(item[0], size), item[1], str(item[0])), items)
    clips, rates, labels, names = zip(*rows, strict=True)
    if len(examples := dict(zip(rates, names, strict=True))) > 1:
        raise ValueError(f"sample rates (Hz) differ, as in {examples}; resample all files to one")
    return _spectrograms(clips, rates[0], size, labels, classes, names)


def _digits():
    """The folder or archive of spoken digits in `data_folder()`, downloaded if none is there."""
    import pooch
    from filelock import FileLock

    root = data_folder()
    if path := next((root / name for name in FSDD_NAMES if (root / name).exists()), None):
        return path
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / "fsdd.lock"):  # one process downloads, the others wait
            if not (path := root / FSDD_NAMES[1]).exists():  # it is whole once it has its name
                found = Path(pooch.retrieve(FSDD_URL, None, "fsdd.part", root, progressbar=True))
                with zipfile.ZipFile(found) as archive:  # whoever packs it anew packs other bytes
                    wavs = [x for x in archive.infolist() if x.filename.endswith(".wav")]
                sums = sorted((Path(x.filename).name, x.CRC) for x in wavs)
                if hashlib.sha256(repr(sums).encode()).hexdigest() != FSDD_DIGEST:
                    raise zipfile.BadZipFile("what was downloaded has other recordings")
                found.rename(path)
        return path
    except (OSError, zipfile.BadZipFile) as error:
        (root / "fsdd.part").unlink(missing_ok=True)
        raise OSError(f"{FSDD_URL} is not in {root}: {error}; set NF_DATA to where it is") from error


def frames_of(size, sample_rate) -> tuple[int, int, int]:
    """(n_fft, hop, samples in all) of H x W: frames of 2 (H - 1) samples lie `SECONDS` / W apart, but at most
    half a frame. At 8 kHz 64 x 64 shows 0.49 s, 32 x 32 0.12 s."""
    height, width = np.broadcast_to(size, 2).tolist()
    hop = max(1, min(round(SECONDS * sample_rate / width), height - 1))
    return 2 * (height - 1), hop, (width - 1) * hop


def stft(samples, n_fft, hop) -> torch.Tensor:
    """Complex STFT with a Hann window, silence beyond the ends: (N, S) -> (N, n_fft/2 + 1, S // hop + 1)."""
    window = torch.hann_window(n_fft, dtype=samples.dtype, device=samples.device)
    return torch.stft(samples, n_fft, hop, window=window, pad_mode="constant", return_complex=True)


def to_values(magnitude, reference, dynamic_range) -> torch.Tensor:
    """Magnitudes (N, H, W) to [-1, 1]: 1 is reference (N,), -1 is dynamic_range dB below it; clipped."""
    level = 20 * torch.log10(magnitude / reference[:, None, None])  # (N, H, W), dB, -inf for silence
    return (1 + 2 * level / dynamic_range).clamp(-1, 1)


def read_wav(file) -> tuple[np.ndarray, int]:
    """Samples (S,) float32 in [-1, 1], channels averaged, and the rate of a wav file, a path or opened."""
    import soundfile

    file = Path(file).expanduser() if isinstance(file, str) else file
    try:
        data = file.read() if hasattr(file, "read") else file.read_bytes()
        chunks, at = b"", 12  # of a copy with true sizes, which streams do not know
        while data[:4] == b"RIFF" and at + 8 <= len(data):
            name, size = struct.unpack_from("<4sI", data, at)
            at, there = at + 8, len(data) - at - 8
            if name == b"data" and there < size < 1e9:  # streams write more, or 0
                raise ValueError(f"it is cut, with {there} of {size} bytes of sound")
            size = min(size, there) if size or name != b"data" else there
            chunks += name + struct.pack("<I", size) + data[at : at + size] + bytes(size % 2)
            at += size + (size % 2 and data[at + size : at + size + 1] == b"\0")  # may lack the pad byte
        data = b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks if chunks else data
        samples, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
        if not (len(samples) and np.isfinite(samples).all()):
            raise ValueError("it holds no samples, or some that are not finite")
    except (RuntimeError, ValueError, zipfile.BadZipFile) as error:
        cause = getattr(error, "error_string", error)  # without its name for our copy
        raise ValueError(f"{file} cannot be read as a wav file: {cause}") from error
    return samples.mean(axis=1), rate


def read_clip(file, size) -> tuple[np.ndarray, int]:
    """What a spectrogram shows of a wav file, its loudest part or all amid silence (S,), and its rate."""
    samples, rate = read_wav(file)
    length = frames_of(size, rate)[2]
    spare = max(0, length - len(samples))
    samples = np.pad(samples, (spare // 2, spare - spare // 2))
    energy = np.pad(np.cumsum(samples.astype(np.float64) ** 2), (1, 0))
    start = int(np.argmax(energy[length:] - energy[:-length]))
    return samples[start : start + length], rate


def write_wav(file, samples, sample_rate: int) -> None:
    """Write samples (S,) in [-1, 1], clipped, as a 16-bit wav file."""
    import soundfile

    soundfile.write(file, np.asarray(samples), sample_rate, format="WAV", subtype="PCM_16")


def _chirps(split, limit, size):
    """The same at every size but for the sampling of time; clip i has class i % 4."""
    from scipy.signal import chirp

    rate, clips = 8000, []
    samples = frames_of(size, rate)[2]
    time, seconds = (np.arange(samples) + 0.5) / rate, samples / rate
    for index in range(min(limit or 2048, 2048 if split == "train" else 256)):
        rng = np.random.default_rng((20240403, ("train", "test", "validation").index(split), index))
        first = rng.uniform(300, 1530)  # Hz
        last = rng.uniform(first + 930, 3400)
        centre, spread, power = rng.uniform((0.4, 0.25, 2), (0.6, 0.4, 4))
        loudness, noise = 10 ** (rng.uniform((-20, -50), (-3, -25)) / 20)
        phases = rng.uniform(-90, 270, 2)  # degrees
        one = first if rng.random() < 0.5 else last
        ends = [[(first, last)], [(last, first)], [(one, one)], [(first, first), (last, last)]][index % 4]
        tones = [chirp(time, f, seconds, g, phi=p) for (f, g), p in zip(ends, phases, strict=False)]
        envelope = np.exp(-(np.abs((time / seconds - centre) / spread) ** power))
        clips.append(loudness * (envelope * np.mean(tones, axis=0) + noise * rng.standard_normal(samples)))
    return _spectrograms(clips, rate, size, np.arange(len(clips)) % 4, CHIRP_CLASSES)


def _files(path):
    """{split: [(file, label), ...]} of the sounds of a folder or zip archive, and names of the classes."""
    found = split_files(path, lambda file: file.suffix.lower() in SOUNDS)
    rows = [(split, tuple(name.split("/")[:-1]), file) for split in found for name, file in found[split]]
    spoken = [(DIGIT.fullmatch(file.name), split, file) for split, _, file in rows]
    spoken = sorted((x for x in spoken if x[0]), key=lambda x: (int(x[0][3]), x[0][2], x[0][1], str(x[2])))
    if 2 * len(spoken) > len(rows) or (len(spoken) >= 10 and not any(above for _, above, _ in rows)):
        used = [(split or ("test" if int(m[3]) < 5 else "train"), m[1], file) for m, split, file in spoken]
        classes = list("0123456789")
    else:  # files lie in folders of classes, most of them so many folders deep
        depths = Counter(len(above) for _, above, _ in rows)
        several = len({above[0] for _, above, _ in rows if above}) > 1
        depth = max(depths, key=lambda d: (several and d > 0, depths[d], d > 0, -d), default=0)
        inside = [row for row in rows if len(row[1]) >= depth and bool(row[1]) == bool(depth)]
        used = [(split, "/".join(above[:depth]) or ".", file) for split, above, file in inside]
        classes = sorted({kind for _, kind, _ in used})
    left_out({str(file) for *_, file in rows} - {str(file) for *_, file in used})
    labelled = {}
    for split, kind, file in used:
        labelled.setdefault(split, []).append((file, classes.index(kind)))
    return labelled, tuple(classes)


def _spectrograms(clips, rate, size, labels, classes, names=()):
    n_fft, hop, _ = frames_of(size, rate)
    magnitude = stft(torch.from_numpy(np.stack(clips).astype(np.float32)), n_fft, hop).abs()  # (N, H, W)
    reference = magnitude.flatten(1).amax(1)  # (N,)
    reference = torch.where(reference > 0, reference, 1.0)  # of silence
    values = to_values(magnitude, reference, DYNAMIC_RANGE)
    meta = SpectrogramMeta(rate, n_fft, hop, reference, classes, names)
    return Spectrograms(values[:, None], torch.tensor(labels), meta)
