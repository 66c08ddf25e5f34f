"""Evaluation is one idea: observe a part of the pixels, reconstruct the field, score it, one row an image.

    score(reconstruct(model, seen), seen.images, model="v1").groupby("model").psnr.agg(["mean", "sem"])

Observed pixels are returned unchanged at their own size: a model is asked for the others. A posterior sample
has about twice the squared error of the posterior mean, so every row says its `kind`.
"""

import time
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

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
    """Observe a fraction of the pixels of images (N, H, W, 3), drawn as `images.SparseFields` draws them."""
    images = to_unit(images)
    drawn = [observe_pixels(image, fraction, (seed, i)) for i, image in enumerate(images)]
    coords, values, masks = (torch.stack(parts) for parts in zip(*drawn, strict=True))
    return Observed(images, masks.numpy(), coords, values)


def reconstruct(
    method, observed: Observed, size=None, *, kind="mean", draws=1, steps=None, sampler=None,
    temperature=1.0, seed=0, progress=False,
) -> np.ndarray:  # fmt: skip
    """Whole fields of observed pixels: (N, h, w, 3) float32 in [0, 1].

    method: a model of sparse fields or an autoencoder; one of `classical.METHODS`; or a `classical.Wiener`.
    size: side of the square fields; None: that of the images, where observed pixels are kept, unless all are.
        Above it means of v1, four directions and V2 are asked for every k-th row and column at a time.
    kind: "mean", the posterior mean over `draws`, by one step each or `steps` of Heun's method; or "sample",
        as `samplers.sample` draws it: for several draws (draws, N, h, w, 3).
    """
    if kind not in ("mean", "sample"):
        raise ValueError(f"kind={kind!r} is unknown; pass 'mean' or 'sample'")
    own = observed.mask.shape[1:]
    shape = own if size is None else (size, size)
    if isinstance(method, classical.Wiener):
        return method.fill(observed, size)
    if isinstance(method, str):
        return classical.fill(method, observed, size)

    device, count = next(method.parameters(), torch.empty(0)).device, len(observed.mask)
    batch = [grid_coords(*shape, device).expand(count, -1, -1)]  # (N, h*w, 2)
    batch += [part.to(device) for part in (observed.input_coords, observed.input_values)]
    if kept := shape == own and not observed.mask.all():
        asked = torch.tensor(~observed.mask, device=device).flatten(1)  # (N, h*w)
        batch[0] = batch[0][asked].view(count, -1, 2)  # (N, Nq, 2)
    mixed = size and kind == "mean" and getattr(method, "mixes_queries", False)
    k = -(-max(shape) // min(own)) if mixed else 1
    if k > 1:  # queries as far apart as in training: every k-th row and column
        rows, columns = (torch.arange(-(-n // k) * k).clamp(max=n - 1).view(-1, k).T for n in shape)
        lattices = (rows[:, None, :, None] * shape[1] + columns[:, None]).flatten()
        batch[0] = batch[0][:, lattices].view(count * k * k, -1, 2)
        batch[1:] = [part.repeat_interleave(k * k, 0) for part in batch[1:]]
    options = dict(generator=torch.Generator().manual_seed(seed), progress=progress)
    if getattr(method, "takes_footprint", False):
        options["footprint"] = (shape[0] * shape[1]) ** -0.5
    options["max_batch"] = max(1, TOKENS_PER_FORWARD // (batch[0].shape[1] + batch[1].shape[1]))

    def complete(values):  # (N, Nq, 3) -> (N, h, w, 3)
        fields = to_image(values).float()
        if kept:
            fields, values = torch.tensor(observed.images, device=device).flatten(1, 2), fields
            fields[asked] = values.flatten(0, 1)
        if k > 1:
            parts = fields.view(count, k, k, rows.shape[1], columns.shape[1], 3).permute(0, 3, 1, 4, 2, 5)
            fields = parts.flatten(1, 2).flatten(2, 3)[:, : shape[0], : shape[1]]
        return fields.reshape(count, *shape, 3).cpu().numpy()

    if kind == "mean":
        options |= {"draws": draws, "steps": 1 if steps is None else steps}
        return complete(samplers.posterior_mean(method, *batch, **options)[0])
    options |= {"method": sampler, "steps": steps, "temperature": temperature}
    fields = np.stack([complete(samplers.sample(method, *batch, **options)) for _ in range(draws)])
    return fields if draws > 1 else fields[0]


def score(prediction, target, **labels):
    """A DataFrame with one row an image (N, H, W, 3): labels, such as model="v1", image, psnr, ssim, speckle.
    The scores are NaN without a target (None)."""
    from pandas import DataFrame

    names, known = ("psnr", "ssim", "speckle"), target is not None
    scores = {name: getattr(metrics, name)(prediction, target) if known else np.nan for name in names}
    return DataFrame({**labels, "image": np.arange(len(prediction)), **scores})


def compare(
    methods, images, sizes=None, *, truth=None, observed=0.2, kinds=("mean",), steps=None, seed=0,
    progress=False,
):  # fmt: skip
    """Reconstruct the same observed pixels of images (N, S, S, 3), with the same noise, by a dict of methods.

    sizes: sides, S alone if None. truth: dict of size -> (N, size, size, 3) for scores at other sizes. kinds:
    of the models, "mean", "sample" or a sampler's name, with so many steps; other methods are "classical".
    Returns (`score` with columns model, kind, size, seconds of one image; {(model, kind, size): fields}).
    """
    from pandas import concat

    seen = observe(images, observed, seed)
    own = seen.images.shape[1]
    truth = {size: to_unit(target) for size, target in (truth or {}).items()} | {own: seen.images}
    jobs, tables, fields = [], [], {}
    for size in sizes or (own,):
        for name, method in methods.items():
            neural = isinstance(method, torch.nn.Module)
            jobs += [(name, kind, size) for kind in (kinds if neural else ("classical",))]
    for name, kind, size in (bar := tqdm(jobs, disable=not progress)):
        bar.set_description(f"{name}, {kind}, {size} px")
        ways = dict(kind="sample", sampler=None if kind == "sample" else kind, steps=steps, progress=progress)
        options = {} if kind in ("mean", "classical") else ways
        start = time.perf_counter()
        made = fields[name, kind, size] = reconstruct(methods[name], seen, size, seed=seed, **options)
        seconds = (time.perf_counter() - start) / len(made)
        table = score(made, truth.get(size), model=name, kind=kind, size=size)
        tables.append(table.assign(seconds=seconds))
    return concat(tables, ignore_index=True), fields
