"""Evaluation is one idea: observe a part of the pixels, reconstruct the field, score it, one row an image.

    observed = observe(images, fraction=0.2)
    table = score(reconstruct(model, observed), observed.images, model="v1")
    table.groupby("model").psnr.agg(["mean", "sem"])

Observed pixels are returned unchanged at the size at which they were observed: a method knows them, and a
model is asked for the others, as in training. A posterior mean and a posterior sample are never mixed: a
sample has about twice the squared error of the mean by construction, so every row says its `kind`.
"""

import time
from dataclasses import dataclass

import numpy as np
import torch
from tqdm.auto import tqdm

from nfhelpers import classical, metrics, samplers
from nfhelpers.images import grid_coords, to_image, to_unit
from nfhelpers.images import observe as observe_pixels

TOKENS_PER_FORWARD = 32_768  # images are grouped so that a forward pass sees about so many points


@dataclass(frozen=True)
class Observed:
    """N images of which the same number Ni of pixels is observed: pictures as arrays, points as tensors."""

    images: np.ndarray  # (N, H, W, 3) float32 in [0, 1]
    mask: np.ndarray  # (N, H, W) bool, True where observed
    input_coords: torch.Tensor  # (N, Ni, 2) pixel centres (x, y) in [0, 1]
    input_values: torch.Tensor  # (N, Ni, 3) in [-1, 1]


def observe(images, fraction=0.2, seed=0) -> Observed:
    """Observe a fraction of the pixels of images (N, H, W, 3), uint8 or floats in [0, 1].

    Image i is drawn with (seed, i), as `images.observe` and `images.SparseFields` draw it.
    """
    images = to_unit(images)
    drawn = [observe_pixels(image, fraction, (seed, i)) for i, image in enumerate(images)]
    coords, values, masks = (torch.stack(parts) for parts in zip(*drawn, strict=True))
    return Observed(images, masks.numpy(), coords, values)


def reconstruct(
    method, observed: Observed, size=None, *, kind="mean", draws=1, steps=None, sampler="heun",
    temperature=1.0, seed=0, progress=False, callback=None,
) -> np.ndarray:  # fmt: skip
    """Whole fields of observed pixels: (N, h, w, 3) float32 in [0, 1].

    method: a model of sparse fields or an autoencoder, on its own device; one of `classical.METHODS`; or a
        `classical.Wiener`. The last two take nothing but `size`.
    size: side of the square fields; the images' own size if None. There observed pixels are kept, unless all
        pixels are observed: a model, such as an autoencoder of whole images, is then asked for all of them.
    kind: "mean", the posterior mean over `draws`, by one step each (or as many steps of Heun's method);
        "sample", posterior samples: (N, h, w, 3) for one draw, (draws, N, h, w, 3) for several.
    steps: 1 of a mean and 50 of a sample if None; sampler and temperature: of samples, see `samplers.sample`.
    seed: of the noise, drawn on the CPU; callback: of the sampler, its x is (N, asked pixels, 3).
    """
    if kind not in ("mean", "sample"):
        raise ValueError(f"kind={kind!r} is unknown; pass 'mean' or 'sample'")
    shape = observed.mask.shape[1:] if size is None else (size, size)
    own_size = shape == observed.mask.shape[1:]
    if isinstance(method, classical.Wiener):
        return method.fill(observed, size)
    if isinstance(method, str):
        points = observed.input_coords, observed.input_values
        fields = classical.fill(method, *points, *shape, observed_size=observed.mask.shape[1:])
        return np.where(observed.mask[..., None], observed.images, fields) if own_size else fields

    asked = torch.ones(len(observed.mask), shape[0] * shape[1], dtype=torch.bool)  # (N, h*w)
    if own_size and not observed.mask.all():
        asked = torch.from_numpy(~observed.mask.reshape(len(asked), -1))
    query = grid_coords(*shape).expand(*asked.shape, 2)[asked].reshape(len(asked), -1, 2)  # (N, Nq, 2)
    device = next(method.parameters(), query).device
    batch = [part.to(device) for part in (query, observed.input_coords, observed.input_values)]
    options = {
        "steps": steps or (1 if kind == "mean" else 50),
        "generator": torch.Generator().manual_seed(seed),
        "max_batch": max(1, TOKENS_PER_FORWARD // (query.shape[1] + observed.input_coords.shape[1])),
        "progress": progress,
        "callback": callback,
    }
    if kind == "mean":
        values = samplers.posterior_mean(method, *batch, draws=draws, **options)[0]
        return _complete(values, asked, observed, shape)
    options |= {"method": sampler, "temperature": temperature}
    samples = (samplers.sample(method, *batch, **options) for _ in range(draws))
    fields = np.stack([_complete(values, asked, observed, shape) for values in samples])
    return fields if draws > 1 else fields[0]


def _complete(values, asked, observed, shape):
    """The fields (N, h, w, 3) in [0, 1] of values (N, Nq, 3) at the pixels that were asked for."""
    fields = torch.empty(*asked.shape, 3)
    fields[asked] = to_image(values).float().cpu().flatten(0, 1)
    if not asked.all():
        fields[~asked] = torch.from_numpy(observed.images.reshape(*asked.shape, 3))[~asked]
    return fields.reshape(-1, *shape, 3).numpy()


def score(prediction, target, **labels):
    """A DataFrame with one row an image: the labels, image, psnr (dB), ssim and speckle.

    prediction, target: (N, H, W, 3) in [0, 1]; without a target (None) the scores are NaN. labels: columns of
    one value, such as model="v1".
    """
    from pandas import DataFrame

    names, known = ("psnr", "ssim", "speckle"), target is not None
    scores = {name: getattr(metrics, name)(prediction, target) if known else np.nan for name in names}
    return DataFrame({**labels, "image": np.arange(len(prediction)), **scores})


def compare(
    methods, images, sizes=None, *, truth=None, observed=0.2, kinds=("mean",), steps=None, sampler="heun",
    seed=0, progress=False,
):  # fmt: skip
    """Reconstruct the same observed pixels, with the same noise, by several methods at several sizes.

    methods: dict of name -> method of `reconstruct`. images: (N, S, S, 3); the fraction `observed` of their
    pixels is observed. sizes: sides, S alone if None. truth: dict of size -> (N, size, size, 3) for scores at
    other sizes, NaN where it has none. kinds: of the models; other methods have the kind "classical". steps,
    sampler: of the kind "sample"; a mean takes one step. progress: show a bar that says what runs.

    Returns (DataFrame, fields): columns model, kind, size, image, psnr, ssim, speckle and seconds (of one
    image), and dict of (model, kind, size) -> (N, size, size, 3).
    """
    from pandas import concat

    seen = observe(images, observed, seed)
    own = seen.images.shape[1]
    truth = {size: to_unit(target) for size, target in (truth or {}).items()} | {own: seen.images}
    jobs = {}  # (model, kind, size) -> evaluations of a pixel, roughly
    for size in sizes or (own,):
        for name, method in methods.items():
            for kind in kinds if isinstance(method, torch.nn.Module) else ("classical",):
                jobs[name, kind, size] = size**2 * ((steps or 50) if kind == "sample" else 1)
    tables, fields = [], {}
    style = "{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    with tqdm(total=sum(jobs.values()), bar_format=style, disable=not progress) as bar:
        for (name, kind, size), work in jobs.items():
            bar.set_description(f"{name}, {kind}, {size} px")
            options = {}
            if kind == "sample":
                update = lambda *state, size=size: bar.update(size**2)  # noqa: E731
                options = {"kind": kind, "steps": steps, "sampler": sampler, "callback": update}
            start, before = time.perf_counter(), bar.n
            made = fields[name, kind, size] = reconstruct(methods[name], seen, size, seed=seed, **options)
            seconds = (time.perf_counter() - start) / len(made)
            bar.update(before + work - bar.n)
            table = score(made, truth.get(size), model=name, kind=kind, size=size)
            tables.append(table.assign(seconds=seconds))
    return concat(tables, ignore_index=True), fields
