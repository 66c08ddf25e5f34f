"""Sounds as log-magnitude spectrograms of a fixed size, and back.

A spectrogram is the magnitude of a short-time Fourier transform (STFT) in decibels, mapped to [-1, 1]: 1 is
the loudest entry of its clip, -1 is `DYNAMIC_RANGE` below it and all that is fainter. Height is frequency,
lowest first, from 0 to half the sample rate; width is time. `griffin_lim` finds the phase that is lost.
"""

import io
import re
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from nfhelpers.files import data_folder, left_out, source_path, split_files, take_split

DYNAMIC_RANGE = 60.0  # decibels from the loudest entry of a clip, 1, down to -1
SECONDS = 0.5  # what a spectrogram shows, unless it is too small for that: `frames_of`

CHIRP_CLASSES = ("rising", "falling", "constant", "two-tone")
FSDD_URL = "https://github.com/Jakobovski/free-spoken-digit-dataset/archive/refs/tags/v1.0.10.zip"
FSDD_NAMES = "fsdd-recordings.zip free-spoken-digit-dataset-1.0.10.zip v1.0.10.zip fsdd recordings".split()
DIGIT = re.compile(r"(\d)_(.+)_(\d+)\.wav")  # digit, speaker, take


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


def load_spectrograms(source, split="train", size=64, limit=None) -> Spectrograms:
    """The first `limit` clips of a source as labelled spectrograms of a size: (H, W), or a number for both.

    - "chirps": synthetic tones in noise of four classes at 8 kHz, 2,048 to train on and 256 of other splits.
    - "fsdd": the Free Spoken Digit Dataset (Jackson et al.), in `data_folder()`; or a folder or zip archive
      of files {digit}_{speaker}_{take}.wav. Takes 0 to 4 are test, as its authors say.
    - a folder of wav files of one sample rate, whose classes are its folders.

    Splits are found by the names of folders, or held out: see `files.take_split`. A long clip is cut to the
    part with the most energy, a short one lies in the middle of silence.
    """
    path = source_path(source, ("chirps", "fsdd"), split)
    if path == "chirps":
        clips, labels = _chirps(split, limit, size)
        return _spectrograms(clips, 8000, size, labels, CHIRP_CLASSES)
    if path == "fsdd":
        path = next((data_folder() / name for name in FSDD_NAMES if (data_folder() / name).exists()), None)
        if path is None:
            raise FileNotFoundError(f"put {FSDD_URL} into {data_folder()}, or set NF_DATA to where it is")
    found, classes = _files(path)
    files, labels = zip(*take_split(found, split, path)[:limit], strict=True)
    clips, rates = zip(*(_clip(file, size) for file in files), strict=True)
    if len(set(rates)) > 1:
        one, other = (files[rates.index(rate)] for rate in list(dict.fromkeys(rates))[:2])
        raise ValueError(f"{one} and {other} differ in their sample rate; resample all files to one")
    return _spectrograms(clips, rates[0], size, labels, classes, tuple(map(str, files)))


def load_clip(file, size=64) -> tuple[Spectrograms, torch.Tensor]:
    """One wav file, as `read_wav` takes it, as a spectrogram, and the samples (1, S) that it shows."""
    clip, rate = _clip(file, size)
    name = Path(str(file)).name
    return _spectrograms([clip], rate, size, [0], (name,), (name,)), torch.from_numpy(clip)[None]


def generated_meta(size, sample_rate, class_names) -> SpectrogramMeta:
    """The meta of generated spectrograms; their reference is that of a full-scale sine."""
    n_fft, hop = frames_of(size, sample_rate)
    return SpectrogramMeta(sample_rate, n_fft, hop, torch.tensor([n_fft / 4]), tuple(class_names))


def frames_of(size, sample_rate) -> tuple[int, int]:
    """(n_fft, hop) of H x W: frames of 2 (H - 1) samples lie `SECONDS` / W apart, but at most half a frame.

    So every size shows the same time, but small ones less: at 8 kHz 64 x 64 shows 0.49 s, 32 x 32 0.12 s.
    """
    height, width = np.broadcast_to(size, 2).tolist()
    return 2 * (height - 1), max(1, min(round(SECONDS * sample_rate / width), height - 1))


def magnitude_of(samples, n_fft, hop) -> torch.Tensor:
    """Magnitudes of the STFT with a Hann window: (N, S) -> (N, n_fft/2 + 1, S // hop + 1).

    Frame j is centred on sample j * hop, with silence beyond the ends; a full-scale sine has n_fft / 4.
    """
    return _stft(samples, n_fft, hop).abs()


def to_values(magnitude, reference, dynamic_range) -> torch.Tensor:
    """Magnitudes (N, H, W) to [-1, 1]: 1 is reference (N,), -1 is dynamic_range dB below it; clipped."""
    level = 20 * torch.log10(magnitude / reference[:, None, None])  # (N, H, W), dB, -inf for silence
    return (1 + 2 * level / dynamic_range).clamp(-1, 1)


def to_magnitude(values, reference, dynamic_range) -> torch.Tensor:
    """Values (N, H, W) in [-1, 1] to magnitudes: the inverse of `to_values` within the range."""
    level = (values.clamp(-1, 1) - 1) / 2 * dynamic_range  # (N, H, W), dB
    return reference[:, None, None] * 10 ** (level / 20)


def griffin_lim(magnitude, n_fft, hop, *, iterations=64, momentum=0.99, generator=None) -> torch.Tensor:
    """A sound whose STFT has about these magnitudes: (N, n_fft/2 + 1, W) -> (N, (W - 1) hop).

    It goes back and forth between the magnitudes that are wanted and the STFT of a sound, from random phases.
    momentum 0 is the original algorithm (Griffin and Lim, 1984), others are of Perraudin et al., "A Fast
    Griffin-Lim Algorithm", 2013.
    """
    device = magnitude.device if generator is None else generator.device
    phase = torch.rand(magnitude.shape, generator=generator, device=device, dtype=magnitude.dtype)
    guess = torch.polar(magnitude, 2 * torch.pi * phase.to(magnitude.device))  # (N, H, W) complex
    previous = torch.zeros_like(guess)
    for _ in range(iterations):
        possible = _stft(_istft(guess, n_fft, hop), n_fft, hop)  # (N, H, W), of a sound
        ahead = possible + momentum * (possible - previous)
        previous = possible
        guess = torch.polar(magnitude, ahead.angle())
    return _istft(guess, n_fft, hop)


def to_audio(spectrograms, meta, *, reference=None, iterations=64, generator=None) -> torch.Tensor:
    """Sound of spectrograms (N, 1, H, W) by Griffin-Lim: (N, (W - 1) hop), at `meta.sample_rate`.

    reference: (N,) magnitudes that are 1; None: as loud as the median clip of meta.
    """
    values = spectrograms[:, 0]  # (N, H, W)
    reference = meta.reference.median().expand(len(values)) if reference is None else reference
    magnitude = to_magnitude(values, reference.to(values), meta.dynamic_range)
    return griffin_lim(magnitude, meta.n_fft, meta.hop, iterations=iterations, generator=generator)


def spectral_convergence(magnitude, samples, hop) -> torch.Tensor:
    """How far a sound (N, S) is from magnitudes (N, H, W): | magnitude - |STFT| | / | magnitude |, (N,)."""
    found = magnitude_of(samples, 2 * (magnitude.shape[1] - 1), hop)
    return (magnitude - found).flatten(1).norm(dim=1) / magnitude.flatten(1).norm(dim=1)


def _stft(samples, n_fft, hop):
    window = torch.hann_window(n_fft, dtype=samples.dtype, device=samples.device)
    return torch.stft(samples, n_fft, hop, window=window, pad_mode="constant", return_complex=True)


def _istft(frames, n_fft, hop):
    window = torch.hann_window(n_fft, dtype=frames.real.dtype, device=frames.device)
    return torch.istft(frames, n_fft, hop, window=window, length=(frames.shape[2] - 1) * hop)


def read_wav(file) -> tuple[np.ndarray, int]:
    """Samples (S,) float32 in [-1, 1], channels averaged, and the rate of a wav file, a path or opened."""
    import soundfile

    file = Path(file) if isinstance(file, str) else file
    try:
        data = file.read() if hasattr(file, "read") else file.read_bytes()
        samples, rate = soundfile.read(io.BytesIO(_whole(data)), dtype="float32", always_2d=True)
        if not (len(samples) and np.isfinite(samples).all()):
            raise ValueError("it holds no samples, or some that are not finite")
    except (soundfile.LibsndfileError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{file} cannot be read as a wav file: {error}") from error
    return samples.mean(axis=1), rate


def _whole(data):
    """A RIFF file with true sizes in its header, which streams do not know; an error for one that is cut."""
    chunks, at = [], 12
    while data[:4] == b"RIFF" and at + 8 <= len(data):
        name, size = struct.unpack_from("<4sI", data, at)
        at, there = at + 8, len(data) - at - 8
        if name == b"data" and there < size < 1e9:  # streams write more, or 0
            raise ValueError(f"it is cut, with {there} of {size} bytes of sound")
        size = min(size, there) if size or name != b"data" else there
        chunks += [name, struct.pack("<I", size), data[at : at + size], bytes(size % 2)]
        at += size + (size % 2 and data[at + size : at + size + 1] == b"\0")  # the pad byte may be missing
    header = struct.pack("<4sI4s", b"RIFF", 4 + sum(map(len, chunks)), b"WAVE")
    return header + b"".join(chunks) if chunks else data


def write_wav(file, samples, sample_rate: int, normalise: bool = False) -> None:
    """Write samples (S,) in [-1, 1], clipped, as a 16-bit wav file; `normalise` scales their peak to 0.9."""
    import soundfile

    samples = np.asarray(samples, dtype=np.float64)
    samples = samples * (0.9 / max(np.abs(samples).max(), 1e-12)) if normalise else samples
    levels = np.rint(samples * 32768).clip(-32768, 32767).astype(np.int16)
    soundfile.write(file, levels, sample_rate, format="WAV", subtype="PCM_16")


def _chirps(split, limit, size):
    """Clips and labels, the same at every size but for the sampling of time; clip i has class i % 4."""
    low, high, rate = 300.0, 3400.0, 8000  # Hz
    samples = (np.broadcast_to(size, 2)[1] - 1) * frames_of(size, rate)[1]
    time = (np.arange(samples) + 0.5) / samples
    count = 2048 if split == "train" else 256
    clips, labels = [], [index % 4 for index in range(min(limit or count, count))]
    for index, label in enumerate(labels):
        rng = np.random.default_rng((20240403, {"train": 0, "test": 1, "validation": 2}[split], index))
        first = rng.uniform(low, 0.45 * high)
        last = rng.uniform(first + 0.3 * (high - low), high)
        centre, spread, power = rng.uniform(0.4, 0.6), rng.uniform(0.25, 0.4), rng.uniform(2, 4)
        loudness, noise = 10 ** (rng.uniform(-20, -3) / 20), 10 ** (rng.uniform(-50, -25) / 20)
        phases = rng.uniform(0, 2 * np.pi, 2)
        one = first if rng.random() < 0.5 else last
        ends = [[(first, last)], [(last, first)], [(one, one)], [(first, first), (last, last)]][label]
        tone = np.zeros(samples)
        for (start, end), phase in zip(ends, phases, strict=False):
            turns = (start * time + (end - start) * time**2 / 2) * samples / rate
            tone += np.sin(2 * np.pi * turns + phase) / len(ends)
        envelope = np.exp(-(np.abs((time - centre) / spread) ** power))
        clips.append(loudness * (envelope * tone + noise * rng.standard_normal(samples)))
    return clips, labels


def _files(path):
    """{split: [(file, label), ...]} of the wav files of a folder or zip archive, and names of the classes."""
    if path.is_dir():
        found = split_files(path, {".wav"})
    elif zipfile.is_zipfile(path):
        archive = zipfile.ZipFile(path)
        names = [name for name in archive.namelist() if name.lower().endswith(".wav")]
        found = {None: [(name, zipfile.Path(archive, name)) for name in names]}
    else:
        raise ValueError(f"{path} is neither a folder nor a zip archive of wav files")
    matches = [(DIGIT.fullmatch(file.name), name, file) for name, file in found.get(None, ())]
    digits = sorted((int(m[3]), m[2], int(m[1]), name, file) for m, name, file in matches if m)
    if 2 * len(digits) > len(matches):
        left_out(path, [name for match, name, _ in matches if not match])
        parts = {"test": range(5), "train": range(5, 1 + digits[-1][0])}
        found = {split: [(d[4], d[2]) for d in digits if d[0] in takes] for split, takes in parts.items()}
        return found, tuple("0123456789")
    files = [
        (split, Path(name).parent.as_posix(), name, file) for split in found for name, file in found[split]
    ]
    classes = sorted({kind for _, kind, *_ in files})
    if len(classes) > 1 and "." in classes:  # of files beside the folders of the classes
        left_out(path, [name for _, kind, name, _ in files if kind == "."])
        classes.remove(".")
    labelled = {split: [] for split in found}
    for split, kind, _, file in files:
        if kind in classes:
            labelled[split].append((file, classes.index(kind)))
    return labelled, tuple(classes)


def _clip(file, size):
    """What a spectrogram shows of a wav file, and its sample rate."""
    samples, rate = read_wav(file)
    length = (np.broadcast_to(size, 2)[1] - 1) * frames_of(size, rate)[1]
    spare = length - len(samples)
    if spare >= 0:
        return np.pad(samples, (spare // 2, spare - spare // 2)), rate
    energy = np.concatenate([[0.0], np.cumsum(samples.astype(np.float64) ** 2)])
    start = int(np.argmax(energy[length:] - energy[:-length]))
    return samples[start : start + length], rate


def _spectrograms(clips, rate, size, labels, classes, names=()):
    n_fft, hop = frames_of(size, rate)
    clips = torch.from_numpy(np.stack(clips).astype(np.float32))  # (N, S)
    magnitude = torch.cat([magnitude_of(some, n_fft, hop) for some in clips.split(1024)])  # (N, H, W)
    reference = magnitude.flatten(1).amax(1)  # (N,)
    reference = torch.where(reference > 0, reference, 1.0)  # of silence
    values = to_values(magnitude, reference, DYNAMIC_RANGE)
    meta = SpectrogramMeta(rate, n_fft, hop, reference, classes, names)
    return Spectrograms(values[:, None], torch.tensor(labels), meta)
