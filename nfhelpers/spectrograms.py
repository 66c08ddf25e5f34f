"""Audio sources, log-magnitude spectrograms of a fixed size, and back to sound.

A spectrogram is the magnitude of a short-time Fourier transform (STFT) in decibels below the loudest entry
of its clip, cut off at `DYNAMIC_RANGE` and mapped to [-1, 1]: 1 is the loudest entry, -1 is `DYNAMIC_RANGE`
below it, and all that is fainter. Height is frequency, lowest first, from 0 to half the sample rate; width is
time. `Spectrograms.meta` holds what leads back: `to_magnitude` undoes the scale, exactly within the range,
and `to_audio` finds a sound with those magnitudes (Griffin and Lim, 1984), because the phase is lost.

Glossary
    n  clips
    s  samples of a clip
    h  frequency bins, height of the spectrogram
    w  frames, width of the spectrogram

Sources of `load_spectrograms`:

- `"chirps"`: synthetic, labelled, made here.
- `"fsdd"`: the Free Spoken Digit Dataset (Jackson et al.), from a local archive or folder.
- a folder of wav files, or a zip archive of the Free Spoken Digit Dataset.
"""

import hashlib
import io
import numbers
import os
import re
import struct
import warnings
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.io import wavfile

from nfhelpers.images import data_folder

__all__ = [
    "SpectrogramMeta",
    "Spectrograms",
    "generated_meta",
    "griffin_lim",
    "load_clip",
    "load_spectrograms",
    "magnitude_of",
    "read_wav",
    "spectral_convergence",
    "to_audio",
    "to_magnitude",
    "to_values",
    "write_wav",
]

SPLITS = ("train", "test")
DYNAMIC_RANGE = 60.0
"""Decibels from the loudest entry of a clip, 1, down to -1."""
SECONDS = 0.5
"""What a spectrogram shows, unless it is too small for that: `frames_of`."""
SMALLEST = 8

CHIRP_CLASSES = ("rising", "falling", "constant", "two-tone")
CHIRP_RATE = 8000
CHIRP_COUNTS = {"train": 2048, "test": 256}
_CHIRP_SEED = 20240403
_CHIRP_BAND = (300.0, 3400.0)  # Hz

FSDD_URL = "https://github.com/Jakobovski/free-spoken-digit-dataset/archive/refs/tags/v1.0.10.zip"
_FSDD_NAMES = (
    "fsdd-recordings.zip",
    "free-spoken-digit-dataset-1.0.10.zip",
    "v1.0.10.zip",
    "free-spoken-digit-dataset-1.0.10",
    "free-spoken-digit-dataset",
    "fsdd",
    "recordings",
)
_FSDD_FILE = re.compile(r"(\d)_([A-Za-z]+)_(\d+)\.wav")
_FSDD_TEST_TAKES = 5
_TEST_FRACTION = 0.1
_DAMAGED = (OSError, ValueError, EOFError, struct.error, wavfile.WavFileWarning)


@dataclass(frozen=True)
class SpectrogramMeta:
    """What leads from spectrograms back to sound, and where they come from.

    `sample_rate` in Hz; `n_fft` samples a frame (a Hann window), `hop` samples from frame to frame;
    `dynamic_range` in dB; `reference` (N,) float32, the magnitude that is 1; `start` (N,) int64, the sample
    of the clip at which its window begins, negative where silence is put before it; `class_names`, and
    `names` (N), the files.
    """

    sample_rate: int
    n_fft: int
    hop: int
    dynamic_range: float
    reference: torch.Tensor
    start: torch.Tensor
    class_names: tuple[str, ...]
    names: tuple[str, ...]


@dataclass(frozen=True)
class Spectrograms:
    """`spectrograms` (N, 1, H, W) float32 in [-1, 1], `labels` (N,) int64, `meta`.

    Also a dataset for a `DataLoader`: item i is a dict of spectrograms (1, H, W) and labels (), whose batches
    `nfhelpers.models.local_mamba.grid_flow_loss` takes.
    """

    spectrograms: torch.Tensor
    labels: torch.Tensor
    meta: SpectrogramMeta

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"spectrograms": self.spectrograms[index], "labels": self.labels[index]}


def load_spectrograms(
    source: str | os.PathLike,
    split: str = "train",
    size: int | tuple[int, int] = 64,
    limit: int | None = None,
) -> Spectrograms:
    """Load clips of sound as labelled log-magnitude spectrograms of one size.

    A spectrogram of H x W shows W frames of 2 (H - 1) samples. They lie `SECONDS` / W apart, so that every
    size shows the same `SECONDS`, but at most half a frame: small ones show less (at 8 kHz, 64 x 64 shows
    0.49 s, 32 x 32 0.12 s). A clip that is longer than the window is cut to the part with the most energy;
    one that is shorter lies in the middle, with silence around it. Chirps fill the window at any size.

    Args:
        source: one of

            - `"chirps"`: tones in noise of four classes (rising, falling, constant, two-tone), at 8 kHz, all
              of different pitch, loudness and noise; 2,048 train, 256 test, the same at every call.
            - `"fsdd"`: the Free Spoken Digit Dataset, v1.0.10: 3,000 spoken digits of six speakers at 8 kHz.
              An archive or a folder of it is looked for in $NF_DATA, else in the user's cache folder; it is
              not downloaded. Takes 0 to 4 of every digit and speaker are test, as its authors say. The first
              60 are one take of each digit by each speaker.
            - a path: a zip archive or a folder of files `{digit}_{speaker}_{index}.wav`, read as "fsdd" is;
              or a folder of other wav files of one sample rate, mixed down to one channel. Subfolders `train`
              and `test` are the splits where either is present; otherwise the tenth of the files whose names
              have the smallest hashes is test. Order: by that hash. Labels number the folders that hold the
              files, by name.
        split: "train" or "test".
        size: (H, W), or one number for both, at least 8.
        limit: take the first `limit` clips (all of them if there are fewer).

    Raises ValueError for an unknown source, split, size or limit, a folder or archive without wav files, a
    damaged file, files of different sample rates; FileNotFoundError where "fsdd" is not found, saying how to
    get it.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is unknown; pass one of {', '.join(map(repr, SPLITS))}")
    height, width = _size(size)
    if limit is not None and (
        isinstance(limit, bool) or not isinstance(limit, numbers.Integral) or limit < 1
    ):
        raise ValueError(f"limit={limit!r} is not a positive integer; pass one such as 64, or None")
    if not isinstance(source, str | os.PathLike):
        raise ValueError(f"source is {type(source).__name__}; {_LEGAL_SOURCES}")
    if source == "chirps":
        n_fft, hop = frames_of(height, width, CHIRP_RATE)
        count = min(limit or CHIRP_COUNTS[split], CHIRP_COUNTS[split])
        clips, labels = _chirps(split, count, (width - 1) * hop)
        names = tuple(f"{CHIRP_CLASSES[label]}_{i}" for i, label in enumerate(labels))
        start = torch.zeros(count, dtype=torch.int64)
        return _spectrograms(clips, CHIRP_RATE, n_fft, hop, start, labels, CHIRP_CLASSES, names)
    path = _fsdd_path() if source == "fsdd" else Path(source).expanduser()
    if path.is_file() and path.suffix.lower() == ".zip":
        entries, class_names = _zip_entries(path, split, limit)
    elif path.is_dir():
        entries, class_names = _folder_entries(path, split, limit)
    else:
        raise ValueError(f"source={str(source)!r} is unknown; {_LEGAL_SOURCES}")
    return _load_entries(entries, class_names, height, width)


_LEGAL_SOURCES = (
    "pass 'chirps', 'fsdd', or an existing path: a folder of wav files, or a zip archive of the Free Spoken "
    "Digit Dataset"
)


def load_clip(file, size: int | tuple[int, int] = 64) -> tuple[Spectrograms, torch.Tensor]:
    """One wav file as a spectrogram of this size, cut as those of `load_spectrograms`, and what it shows.

    file: a path or a binary file object, as `read_wav` takes it; size: (H, W), or one number for both.
    Returns (Spectrograms of one item, its samples (1, (W - 1) hop)). Raises ValueError as `read_wav`, and for
    a size below 8.
    """
    height, width = _size(size)
    samples, rate = read_wav(file)
    n_fft, hop = frames_of(height, width, rate)
    clip, start = _window(samples, (width - 1) * hop)
    clip = torch.from_numpy(clip)[None]  # (1, S)
    name = Path(_name(file)).name
    return _spectrograms(
        clip, rate, n_fft, hop, torch.tensor([start]), torch.zeros(1, dtype=torch.int64), (name,), (name,)
    ), clip


def generated_meta(
    size: int | tuple[int, int], sample_rate: int, class_names: tuple[str, ...]
) -> SpectrogramMeta:
    """The meta of spectrograms that have no clips, as generated ones, where no real ones are at hand.

    size, sample_rate (Hz) and class_names: of the clips that the model was trained on. Its reference is that
    of a full-scale sine. Raises ValueError for a size below 8.
    """
    n_fft, hop = frames_of(*_size(size), sample_rate)
    reference, start = torch.tensor([n_fft / 4]), torch.zeros(0, dtype=torch.int64)
    return SpectrogramMeta(sample_rate, n_fft, hop, DYNAMIC_RANGE, reference, start, tuple(class_names), ())


def frames_of(height: int, width: int, sample_rate: int) -> tuple[int, int]:
    """(n_fft, hop) of a spectrogram of height x width: 2 (H - 1) samples a frame, `SECONDS` / W apart.

    The hop is at most half a frame, or parts of the sound would be seen by no frame at full weight.
    """
    n_fft = 2 * (height - 1)
    return n_fft, max(1, min(round(SECONDS * sample_rate / width), n_fft // 2))


# ------------------------------------------------------------------------------------- transforms, and back


def magnitude_of(samples: torch.Tensor, n_fft: int, hop: int) -> torch.Tensor:
    """Magnitudes of the STFT, with a Hann window: (N, S) floating -> (N, n_fft/2 + 1, S // hop + 1).

    Frame j is centred on sample j * hop; beyond the ends there is silence. A full-scale sine has the
    magnitude n_fft / 4. Raises ValueError unless samples are floating (N, S), not empty, and n_fft, hop
    positive and even (n_fft), with hop at most half of n_fft.
    """
    _check_frames(n_fft, hop)
    _check_samples(samples)
    return _stft(samples, n_fft, hop).abs()


def to_values(magnitude: torch.Tensor, reference: torch.Tensor, dynamic_range: float) -> torch.Tensor:
    """Magnitudes (N, H, W) to values in [-1, 1]; `to_magnitude` is the inverse within the range.

    1 is `reference` (N,) and more, -1 is `dynamic_range` dB below it and less. Raises ValueError on a
    reference or range that is not positive.
    """
    _check_scale(reference, dynamic_range)
    level = 20 * torch.log10(magnitude / reference[:, None, None])  # (N, H, W), dB, -inf for silence
    return (1 + 2 * level / dynamic_range).clamp(-1, 1)


def to_magnitude(values: torch.Tensor, reference: torch.Tensor, dynamic_range: float) -> torch.Tensor:
    """Values (N, H, W) in [-1, 1] to magnitudes; values outside, as a model may give them, are clipped.

    Raises ValueError on a reference (N,) or range that is not positive.
    """
    _check_scale(reference, dynamic_range)
    level = (values.clamp(-1, 1) - 1) / 2 * dynamic_range  # (N, H, W), dB
    return reference[:, None, None] * 10 ** (level / 20)


def griffin_lim(
    magnitude: torch.Tensor,
    n_fft: int,
    hop: int,
    *,
    iterations: int = 64,
    momentum: float = 0.99,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """A sound whose STFT has about these magnitudes: (N, n_fft/2 + 1, W) floating -> (N, (W - 1) hop).

    It alternates between the magnitudes that are wanted and the STFT of what sound has them, from random
    phases drawn from `generator` (on its own device; None: torch's default one). momentum in [0, 1): 0 is the
    original algorithm; the fast one extrapolates. iterations: at least 1. Raises ValueError on a shape or
    setting that is not legal. Sources: Griffin and Lim, "Signal Estimation from Modified Short-Time Fourier
    Transform", 1984; Perraudin et al., "A Fast Griffin-Lim Algorithm", 2013.
    """
    _check_frames(n_fft, hop)
    if magnitude.ndim != 3 or magnitude.shape[1] != n_fft // 2 + 1 or magnitude.shape[2] < 2:
        raise ValueError(
            f"magnitude has shape {tuple(magnitude.shape)}; pass (N, n_fft/2 + 1, W) = (N, {n_fft // 2 + 1}, "
            "W) with W >= 2"
        )
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"iterations={iterations!r} is not a positive integer; pass 64")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum={momentum!r} is outside [0, 1); pass 0.99, or 0.0")
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


def spectral_convergence(magnitude: torch.Tensor, samples: torch.Tensor, hop: int) -> torch.Tensor:
    """How far a sound is from the magnitudes asked for: | magnitude - |STFT| | / | magnitude |, (N,).

    magnitude (N, H, W); samples (N, (W - 1) hop). 0 is a perfect match. Norms are over the entries of a clip.
    Raises ValueError where the two do not fit.
    """
    found = magnitude_of(samples, 2 * (magnitude.shape[1] - 1), hop)
    if found.shape != magnitude.shape:
        raise ValueError(
            f"samples have an STFT of {tuple(found.shape)} and magnitude is {tuple(magnitude.shape)}; pass "
            "samples (N, (W - 1) * hop)"
        )
    return (magnitude - found).flatten(1).norm(dim=1) / magnitude.flatten(1).norm(dim=1)


def to_audio(
    spectrograms: torch.Tensor,
    meta: SpectrogramMeta,
    *,
    reference: torch.Tensor | None = None,
    iterations: int = 64,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Sound of spectrograms (N, 1, H, W), by Griffin-Lim: (N, (W - 1) hop) float, at `meta.sample_rate`.

    reference: (N,) magnitudes that are 1; None takes the median of `meta.reference` for all, which is as loud
    as the median clip: generated spectrograms have no loudness of their own. Raises ValueError on a shape
    other than meta asks for.
    """
    height = meta.n_fft // 2 + 1
    if spectrograms.ndim != 4 or spectrograms.shape[1:3] != (1, height):
        raise ValueError(
            f"spectrograms have shape {tuple(spectrograms.shape)}; their meta asks for (N, 1, {height}, W)"
        )
    values = spectrograms[:, 0]  # (N, H, W)
    if reference is None:
        reference = meta.reference.median().expand(len(values))
    magnitude = to_magnitude(values, reference.to(values), meta.dynamic_range)
    return griffin_lim(magnitude, meta.n_fft, meta.hop, iterations=iterations, generator=generator)


def _stft(samples, n_fft, hop):
    window = torch.hann_window(n_fft, dtype=samples.dtype, device=samples.device)
    return torch.stft(
        samples, n_fft, hop, window=window, center=True, pad_mode="constant", return_complex=True
    )


def _istft(frames, n_fft, hop):
    window = torch.hann_window(n_fft, dtype=frames.real.dtype, device=frames.device)
    return torch.istft(frames, n_fft, hop, window=window, center=True, length=(frames.shape[2] - 1) * hop)


# ------------------------------------------------------------------------------------------------- wav files


def read_wav(file) -> tuple[np.ndarray, int]:
    """Samples (S,) float32 in [-1, 1] and the sample rate of a wav file: a path or a binary file object.

    8-, 16-, 24- and 32-bit integers and floats are read; channels are averaged. Raises ValueError on what is
    no wav file, or is empty or not finite.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", wavfile.WavFileWarning)  # of chunks that hold no sound
            warnings.filterwarnings("error", "Reached EOF", wavfile.WavFileWarning)
            rate, data = wavfile.read(file)
    except _DAMAGED as error:
        raise ValueError(f"{_name(file)} cannot be read as a wav file: {error}") from error
    if data.size == 0:
        raise ValueError(f"{_name(file)} holds no samples")
    if data.dtype == np.uint8:
        data = (data.astype(np.float32) - 128) / 128
    elif data.dtype.kind == "i":
        data = (data / -float(np.iinfo(data.dtype).min)).astype(np.float32)
    samples = data.astype(np.float32)
    if samples.ndim == 2:
        samples = samples.mean(1)
    if not np.isfinite(samples).all():
        raise ValueError(f"{_name(file)} holds NaN or infinite samples")
    return samples, int(rate)


def write_wav(file, samples, sample_rate: int, normalise: bool = False) -> None:
    """Write samples (S,) in [-1, 1], tensor or array, as a 16-bit wav file: to a path or binary file object.

    What is outside is clipped; with `normalise` the samples are scaled to a peak of 0.9 instead. Raises
    ValueError on another shape or samples that are not finite.
    """
    samples = np.asarray(samples, dtype=np.float64)
    if samples.ndim != 1 or samples.size == 0 or not np.isfinite(samples).all():
        raise ValueError(f"samples have shape {samples.shape}; pass (S,), not empty, all finite")
    if normalise:
        samples = samples * (0.9 / max(np.abs(samples).max(), 1e-12))
    scaled = np.rint(samples * 32768).clip(-32768, 32767)
    wavfile.write(file, sample_rate, scaled.astype(np.int16))


def _name(file):
    return str(file) if isinstance(file, str | os.PathLike) else getattr(file, "name", "the file")


# --------------------------------------------------------------------------------------------------- sources


def _chirps(split, count, samples):
    """Tones in noise: clips (N, S) float32 and labels, the same at every size but for the sampling of time.

    Clip i has class i % 4. A tone has its frequency, at the beginning and the end, from `_CHIRP_BAND`, swells
    and dies away; the noise is 25 to 50 dB below it.
    """
    time = (np.arange(samples) + 0.5) / samples
    clips, labels = [], []
    for index in range(count):
        rng = np.random.default_rng((_CHIRP_SEED, SPLITS.index(split), index))
        kind = index % len(CHIRP_CLASSES)
        low, high = _CHIRP_BAND
        first = rng.uniform(low, 0.45 * high)
        last = rng.uniform(first + 0.3 * (high - low), high)
        centre, spread, power = rng.uniform(0.4, 0.6), rng.uniform(0.25, 0.4), rng.uniform(2, 4)
        envelope = np.exp(-(np.abs((time - centre) / spread) ** power))
        loudness, noise = 10 ** (rng.uniform(-20, -3) / 20), 10 ** (rng.uniform(-50, -25) / 20)
        phases = rng.uniform(0, 2 * np.pi, 2)
        ends = {
            "rising": [(first, last)],
            "falling": [(last, first)],
            "constant": [(first, first)] if rng.random() < 0.5 else [(last, last)],
            "two-tone": [(first, first), (last, last)],
        }[CHIRP_CLASSES[kind]]
        tone = np.zeros(samples)
        for (start, end), phase in zip(ends, phases, strict=False):
            turns = (start * time + (end - start) * time**2 / 2) * samples / CHIRP_RATE
            tone += np.sin(2 * np.pi * turns + phase) / len(ends)
        clips.append(loudness * (envelope * tone + noise * rng.standard_normal(samples)))
        labels.append(kind)
    return torch.from_numpy(np.stack(clips).astype(np.float32)), torch.tensor(labels)


def _fsdd_path():
    root = data_folder()
    for name in _FSDD_NAMES:
        path = root / name
        if path.is_file() or (path.is_dir() and any(path.rglob("*.wav"))):
            return path
    raise FileNotFoundError(
        f"the Free Spoken Digit Dataset is not in {root}. Get it by hand: download {FSDD_URL} and put it "
        "there (or its folder recordings/), or set NF_DATA to the folder that holds it, or pass the path of "
        "the archive or folder as source. load_spectrograms('chirps') needs no download."
    )


def _zip_entries(path, split, limit):
    try:
        with zipfile.ZipFile(path) as archive:
            found = [name for name in archive.namelist() if _FSDD_FILE.fullmatch(name.rsplit("/", 1)[-1])]
            if not found:
                raise ValueError(f"{path} holds no file named {{digit}}_{{speaker}}_{{index}}.wav")
            entries, classes = _digits(found, split, limit, path)
            return [(f"{path}/{name}", archive.read(name), label) for name, label in entries], classes
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError) as error:
        raise ValueError(f"{path} cannot be read as a zip archive: {error}; download it again") from error


def _folder_entries(folder, split, limit):
    divided = any((folder / name).is_dir() for name in SPLITS)
    base = folder / split if divided else folder
    files = [file for file in base.rglob("*") if file.suffix.lower() == ".wav" and file.is_file()]
    if not files:
        raise ValueError(f"{base} holds no wav file; put files ending in .wav there")
    by_name = {file.relative_to(base).as_posix(): file for file in files}
    if not divided and all(_FSDD_FILE.fullmatch(file.name) for file in files):
        entries, classes = _digits(by_name, split, limit, folder)
        return [(str(by_name[name]), None, label) for name, label in entries], classes
    parents = [folder / part for part in SPLITS] if divided else [folder]
    classes = sorted(
        {
            file.parent.relative_to(parent).as_posix()
            for parent in parents
            for file in parent.rglob("*")
            if file.suffix.lower() == ".wav" and file.is_file()
        }
    )  # of both splits, so that a label means the same in each
    order = sorted(by_name, key=lambda name: hashlib.sha256(name.encode()).digest())
    if not divided:
        if len(order) < 2:
            raise ValueError(f"{folder} holds one wav file; a train and a test split need at least 2")
        tests = max(1, round(_TEST_FRACTION * len(order)))
        order = order[:tests] if split == "test" else order[tests:]
    labels = {name: classes.index(by_name[name].parent.relative_to(base).as_posix()) for name in order}
    return [(str(by_name[name]), None, labels[name]) for name in order[:limit]], tuple(classes)


def _digits(names, split, limit, path):
    """(name, digit) of the files of a split, take by take, and in it speaker by speaker."""
    keyed = []
    for name in names:
        digit, speaker, take = _FSDD_FILE.fullmatch(name.rsplit("/", 1)[-1]).groups()
        if (int(take) < _FSDD_TEST_TAKES) == (split == "test"):
            keyed.append((int(take), speaker, int(digit), name))
    if not keyed:
        raise ValueError(
            f"{path} holds no clip of split={split!r}: takes 0 to {_FSDD_TEST_TAKES - 1} are test, others "
            "train"
        )
    return [(name, digit) for _, _, digit, name in sorted(keyed)[:limit]], tuple(map(str, range(10)))


def _load_entries(entries, class_names, height, width):
    """Spectrograms of (name, bytes or None for the file of that name, label)."""
    clips, starts, first = [], [], None
    for name, data, _ in entries:
        if data is None:
            file = name
        else:
            file = io.BytesIO(data)
            file.name = name
        samples, rate = read_wav(file)
        first = first or (name, rate)
        if rate != first[1]:
            raise ValueError(
                f"{name} has a sample rate of {rate} Hz and {first[0]} of {first[1]} Hz; resample them to one"
            )
        n_fft, hop = frames_of(height, width, rate)
        clip, start = _window(samples, (width - 1) * hop)
        clips.append(clip)
        starts.append(start)
    names, labels = tuple(name for name, _, _ in entries), torch.tensor([label for *_, label in entries])
    clips = torch.from_numpy(np.stack(clips))  # (N, S)
    return _spectrograms(clips, first[1], n_fft, hop, torch.tensor(starts), labels, class_names, names)


def _window(samples, length):
    """The `length` samples with the most energy, or all of them with silence around: clip and its start."""
    spare = length - len(samples)
    if spare >= 0:
        before = spare // 2
        return np.pad(samples, (before, spare - before)), -before
    energy = np.concatenate([[0.0], np.cumsum(samples.astype(np.float64) ** 2)])
    start = int(np.argmax(energy[length:] - energy[:-length]))
    return samples[start : start + length], start


def _spectrograms(clips, rate, n_fft, hop, start, labels, class_names, names):
    magnitude = torch.cat([magnitude_of(part, n_fft, hop) for part in clips.split(1024)])  # (N, H, W)
    reference = magnitude.flatten(1).amax(1)  # (N,)
    reference = torch.where(reference > 0, reference, torch.ones_like(reference))  # of silence
    values = to_values(magnitude, reference, DYNAMIC_RANGE)
    meta = SpectrogramMeta(rate, n_fft, hop, DYNAMIC_RANGE, reference, start, class_names, names)
    return Spectrograms(values[:, None], labels, meta)


# ---------------------------------------------------------------------------------------------------- checks


def _size(size):
    sides = (size, size) if isinstance(size, numbers.Integral) else size
    whole = isinstance(sides, tuple | list) and all(
        isinstance(side, numbers.Integral) and not isinstance(side, bool) and side >= SMALLEST
        for side in sides
    )
    if not whole or len(sides) != 2:
        raise ValueError(
            f"size={size!r} is not a whole number of at least {SMALLEST}, nor two of them (H, W); pass 64"
        )
    return int(sides[0]), int(sides[1])


def _check_frames(n_fft, hop):
    if n_fft < 2 or n_fft % 2 or not 1 <= hop <= n_fft // 2:
        raise ValueError(
            f"n_fft={n_fft}, hop={hop}; pass an even n_fft and a hop of 1 to half of it, such as 126, 62"
        )


def _check_samples(samples):
    if samples.ndim != 2 or 0 in samples.shape or not samples.is_floating_point():
        raise ValueError(
            f"samples are {samples.dtype} of shape {tuple(samples.shape)}; pass floating (N, S), not empty"
        )


def _check_scale(reference, dynamic_range):
    if not dynamic_range > 0:
        raise ValueError(f"dynamic_range={dynamic_range} is not positive; pass 60.0 dB")
    if reference.ndim != 1 or not bool((reference > 0).all()):
        raise ValueError(
            f"reference has shape {tuple(reference.shape)}; pass (N,) positive magnitudes, one a clip"
        )
