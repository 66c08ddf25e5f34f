"""Train a flagship as it is shipped: images and masks are drawn on the GPU, a step is one CUDA graph.

    python benchmarks/flagship.py field-cifar10 --data cifar10:0.7 windows.npz:0.3 --out runs/field-cifar10
    python benchmarks/flagship.py field-photos --data windows.npz:0.9 photos:0.1 --out runs/field-photos

--data: sources of `images.load_images`, each with its share of a batch, such as an .npz of uint8 arrays
x_train and x_test (N, 128, 128, 3); field-photos wants fields of 128 px.
Phase 1 trains the velocity, part of each batch at t = 0, where it is the posterior mean. In phase 2 half of
each batch learns whole steps: a frozen copy walks from z(tau) to z(tau') in three steps of Heun's method, the
network learns to go there at once. The weights are averaged; phase 1 keeps those with the best posterior
mean on held-out images of the first source, phase 2 the last. Matrices are trained by Muon (Jordan et al.
2024), the rest by AdamW.
"""

import argparse
import copy
import functools
import json
import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from nfhelpers import evaluate, metrics, models, run
from nfhelpers.images import area_resize, grid_coords, load_images, open_images
from nfhelpers.models.field import SHORTCUT_POWER, FieldConditions, offsets
from nfhelpers.models.layers import solve_positive, squared_distances
from nfhelpers.models.spline import RIDGE, SHIFT

OBSERVED, SIDE, MASKS = 204, 32, 8192  # observed pixels of 32 x 32; masks that are drawn in advance
HALF = math.pi / 2
SEGMENTS = (4.0, 4.0, 4.0, 4.0, 2.0, 8.0, 1.0)  # how often a whole step is a 4th, a half ... of the way
RECIPES = {
    "field-cifar10": {
        "model": {},
        "batches": {32: 256},  # by side of the lattice that the queries enter
        "fields": {32: ((32,), (0.5, 0.625, 0.75, 1, 1))},  # sides in pixels; of the part of a larger image
        "colours": (0.25, 0.5),  # how often channels are permuted, and contrast is lowered
        "seconds": (480, 120),
        "mean": 0.6,  # share of the batch at t = 0
    },
    "field-photos": {
        "model": {"finer": 2, "widths": (32, 64, 64, 128, 192), "blocks": (2, 2, 2, 3, 4)},
        "batches": {32: 128, 64: 64, 128: 32},
        "fields": {
            32: ((32,), (0.5, 0.625, 0.75, 1, 1)),
            64: ((36, 40, 48, 48, 56, 64, 64, 64), (0.5, 0.75, 1, 1)),
            128: ((72, 80, 96, 96, 112, 128, 128, 128, 128), (1,)),
        },
        "colours": (0.3, 0.4),
        "seconds": (480, 120),
        "mean": 0.4,
    },
}


# ---------------------------------------------------------------------------------------- images and points


@functools.cache  # a CUDA graph cannot copy them from the CPU
def on_device(numbers, device):
    return torch.tensor(numbers, dtype=torch.float32, device=device)


def pick(options, count, device):
    """`count` draws of a few numbers (N,)."""
    return on_device(options, device)[torch.randint(len(options), (count,), device=device)]


def area_means(sides, slots, length, first, size, flip):
    """Matrices (B, slots, size) of means over `sides` (B,) equal parts of [first, first + length); then 0."""
    i = torch.arange(slots, device=sides.device, dtype=torch.float32)[None]
    i = torch.where(flip[:, None], sides[:, None] - 1 - i, i)  # (B, slots)
    step = (length / sides)[:, None]
    low = (first[:, None] + i * step)[..., None]  # (B, slots, 1)
    pixel = torch.arange(size, device=sides.device, dtype=torch.float32)
    share = (torch.minimum(low + step[..., None], pixel + 1) - torch.maximum(low, pixel)).clamp_min(0)
    return share / step[..., None] * ((i >= 0) & (i < sides[:, None]))[..., None]


class Images:
    """Images (N, S, S, 3) uint8 on the device, drawn as fields: a part, flipped, turned, as area means.

    turns: how often they are transposed, and flipped upside down and left to right.
    """

    def __init__(self, images, device, turns=(0.5, 0.5, 0.5)):
        self.turns = torch.tensor(turns, device=device)[:, None]
        self.images = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).to(device)

    def draw(self, count, slots, sides, parts):
        """Truth (B, 3, slots, slots) and the 32 x 32 that is observed, in [-1, 1]; sides (B,) in pixels."""
        device, size = self.images.device, self.images.shape[-1]
        x = self.images[torch.randint(len(self.images), (count,), device=device)].float() / 127.5 - 1
        turned, *flips = torch.rand(3, count, device=device) < self.turns
        x = torch.where(turned[:, None, None, None], x.mT, x)
        sides, length = pick(sides, count, device), size * pick(parts, count, device)
        first = [(torch.rand(count, device=device) * (size - length + 1)).floor() for _ in range(2)]

        def means(k, n):
            rows, columns = (
                area_means(k, n, length, at, size, flip) for at, flip in zip(first, flips, strict=True)
            )
            return rows[:, None] @ x @ columns[:, None].mT

        truth = means(sides, slots)
        seen = truth if slots == SIDE else means(torch.full_like(sides, SIDE), SIDE)
        return truth, seen, sides


def recolour(truth, seen, permuted, faded):
    """Permute the channels of some fields, and lower the contrast of some."""
    count, device = len(truth), truth.device
    some = torch.rand(3, count, device=device)
    order = torch.rand(count, 3, device=device).argsort(1)
    order = torch.where(some[:1].T < permuted, order, torch.arange(3, device=device))[:, :, None, None]
    gain = torch.where(some[1] < faded, 0.5 + 0.5 * some[2], 1)[:, None, None, None]
    shift = (1 - gain) * (2 * torch.rand_like(gain) - 1)
    return [gain * x.gather(1, order.expand_as(x)) + shift for x in (truth, seen)]


class Masks:
    """Masks (M, I) of observed pixels, drawn in advance."""

    def __init__(self, device, count=MASKS, seed=0):
        order = torch.rand(count, SIDE**2, generator=torch.Generator().manual_seed(seed)).argsort(1)
        self.grid = grid_coords(SIDE, SIDE).to(device)
        self.masks = order[:, :OBSERVED].sort(1).values.to(device)


class Splines(Masks):
    """Of each mask the matrix, too, from values to the spline's coefficients."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.matrices = torch.cat([self.solve(part) for part in self.masks.split(512)])  # (M, I + 3, I)

    def solve(self, masks):
        p = self.grid.double()[masks]  # (m, I, 2); the system is `thin_plate_spline`'s
        eye = torch.eye(OBSERVED, dtype=p.dtype, device=p.device).expand(len(p), -1, -1)
        affine = F.pad(p - 0.5, (1, 0), value=1.0)
        inverse = solve_positive(self.radial(p, p) + SHIFT * affine @ affine.mT + RIDGE * eye, eye)
        solved = inverse @ affine
        c = solve_positive(affine.mT @ solved, solved.mT)  # (m, 3, I)
        return torch.cat([inverse - solved @ c, c], 1).float()

    @staticmethod
    def radial(p, q):
        squared = squared_distances(p, q)
        return 0.5 * squared * squared.clamp_min(1e-30).log()

    def start(self, mask, values, query):
        """The splines of masks (B,) through values (B, I, 3), at query (B, Q, 2) -> (B, Q, 3)."""
        weights = self.matrices[mask] @ values
        radial = self.radial(query, self.grid[self.masks[mask]])
        plane = F.pad(query - 0.5, (1, 0), value=1.0) @ weights[:, OBSERVED:]
        return (radial @ weights[:, :OBSERVED] + plane).clamp(-1, 1)


class Grids:
    """Whole grids of k x k pixels as a lattice of n >= k nodes a side takes them: `Hats` without an index."""

    def __init__(self, sides, nodes, valid):
        self.nodes, self.valid, self.hats = nodes, valid, None  # valid: (B, n * n), pixels that are asked for
        if nodes > SIDE:  # else pixels are nodes
            i = torch.arange(nodes, device=sides.device, dtype=torch.float32)
            place = ((i + 0.5) / sides[:, None] * nodes - 0.5).clamp(0, nodes - 1)  # (B, n)
            near = (1 - (place[..., None] - i).abs()).clamp_min(0)  # (B, n pixels, n nodes)
            self.hats = near * (i < sides[:, None])[..., None]

    def gather(self, features):
        x = (features * self.valid[..., None]).unflatten(1, (self.nodes, self.nodes))
        return x if self.hats is None else self.along(self.hats.mT, x)

    def read(self, x):
        return (x if self.hats is None else self.along(self.hats, x)).flatten(1, 2)

    @staticmethod
    def along(matrix, x):
        """matrix (B, m, n) along both sides of x (B, n, n, C) -> (B, m, m, C)."""
        matrix = matrix.to(x.dtype)
        return matrix[:, None] @ (matrix @ x.flatten(2)).unflatten(2, (x.shape[2], -1))


# ------------------------------------------------------------------------------------------------- training


class Muon:
    """Momentum, orthogonalised by Newton-Schulz (Jordan et al. 2024); updates have the RMS of AdamW's."""

    def __init__(self, parameters, weight_decay):
        self.groups, self.decay = {}, weight_decay
        for p in parameters:
            self.groups.setdefault((p.shape[0], p[0].numel()), []).append(p)
        self.momenta = {
            shape: torch.zeros(len(group), *shape, device=group[0].device)
            for shape, group in self.groups.items()
        }

    @torch.no_grad()
    def step(self, learning_rate):
        for shape, group in self.groups.items():
            gradient = torch.stack([p.grad.reshape(shape) for p in group]).float()
            momentum = self.momenta[shape].lerp_(gradient, 0.05)
            x = gradient.lerp(momentum, 0.95).bfloat16()
            x = x.mT if shape[0] > shape[1] else x
            x = x / (x.float().norm(dim=(1, 2), keepdim=True) + 1e-7).bfloat16()
            for _ in range(5):
                s = x @ x.mT
                x = 3.4445 * x + (-4.7750 * s + 2.0315 * s @ s) @ x
            x = (x.mT if shape[0] > shape[1] else x).float() * (0.4 * max(shape) ** 0.5 * learning_rate)
            torch._foreach_mul_(group, 1 - self.decay * learning_rate)
            torch._foreach_sub_(group, [u.reshape(p.shape) for p, u in zip(group, x, strict=True)])


def is_matrix(name, parameter):
    apart = ("dt_", "A_log", ".D", "embedding", "decoders", "time", "step", "modulate", "latent", "condition")
    return parameter.dim() > 1 and not any(word in name for word in apart)


@torch.no_grad()
def copy_into(parameters, weights):
    for own, x in zip(parameters, weights, strict=True):
        own.copy_(x)


class Trainer:
    """A model and its optimizers; `update` is one step on all batches of the recipe.

    From here on this thread works on a CUDA stream of its own: a graph is not recorded on the default one.
    """

    def __init__(self, model, recipe, options, device):
        self.model, self.recipe, self.options, self.device = model, recipe, options, device
        if device.type == "cuda" and torch.cuda.current_stream() == torch.cuda.default_stream():
            torch.cuda.synchronize()
            torch.cuda.set_stream(torch.cuda.Stream())
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.parameters = list(named.values())
        self.muon = Muon([p for name, p in named.items() if is_matrix(name, p)], options.weight_decay)
        rest = [p for name, p in named.items() if not is_matrix(name, p)]
        plain = [p for p in rest if p.dim() < 2 or getattr(p, "_no_weight_decay", False)]
        decayed = [p for p in rest if not any(p is q for q in plain)]
        groups = [
            {"params": decayed, "weight_decay": options.weight_decay},
            {"params": plain, "weight_decay": 0},
        ]
        self.rate = torch.tensor(0.0, device=device)
        cuda = {"fused": True, "capturable": True} if device.type == "cuda" else {}
        self.adam = torch.optim.AdamW(groups, self.rate, betas=(0.9, 0.99), **cuda)
        self.average = [p.detach().clone() for p in self.parameters]
        self.loss = torch.zeros((), device=device)

    def autocast(self):
        return torch.autocast("cuda", torch.bfloat16, self.device.type == "cuda", cache_enabled=False)

    def compiled(self, function):
        return torch.compile(function, fullgraph=True, dynamic=False, disable=self.device.type != "cuda")

    def update(self, loss_function):
        for p in self.parameters:
            p.grad = None
        for nodes, count in self.recipe["batches"].items():
            loss = loss_function(nodes, 2 * math.ceil(count * self.options.scale / 2)) / len(
                self.recipe["batches"]
            )
            loss.backward()
            self.loss.lerp_(loss.detach() * len(self.recipe["batches"]), 0.02)
        torch.nn.utils.clip_grad_norm_(self.parameters, 2.0, foreach=True)
        self.adam.step()
        self.muon.step(self.rate)
        with torch.no_grad():
            for average, p in zip(self.average, self.parameters, strict=True):
                average.lerp_(p, 1 - self.options.ema)

    def recorded(self, loss_function):
        """`update` with this loss as one CUDA graph; as it is on a CPU. The weights stay what they are."""

        def step():
            self.update(loss_function)

        if self.device.type != "cuda":
            return step
        before = [x.clone() for x in self.parameters]
        step()
        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            step()
        self.restart(before)
        return graph.replay

    @torch.no_grad()
    def restart(self, weights):
        """Go on from these weights, with optimizers that have seen nothing."""
        copy_into(self.parameters, weights)
        copy_into(self.average, weights)
        for momentum in self.muon.momenta.values():
            momentum.zero_()
        for state in self.adam.state.values():
            for x in state.values():
                x.zero_()

    def run(self, step, seconds, peak, score):
        """Train for so many seconds, cosine learning rate; returns (best score, its averaged weights)."""
        best, done, start, paused, due = (-math.inf, None), 0, time.time(), 0.0, self.options.every
        while (now := time.time() - start - paused) < seconds or done == 0:
            warm = min(1, now / (0.03 * seconds))
            self.rate.fill_(peak * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * now / seconds))))
            for _ in range(10 if self.device.type == "cuda" else 1):
                step()
                done += 1
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            if now >= due or time.time() - start - paused >= seconds:
                began, due = time.time(), now + self.options.every
                found = score(self.average)
                print(
                    f"{now:5.0f} s, step {done}: loss {self.loss.item():.4f}, score {found:.3f}", flush=True
                )
                if not math.isfinite(self.loss.item()):
                    raise FloatingPointError(f"the loss is not finite after {done} steps")
                if found > best[0]:
                    best = found, [x.clone() for x in self.average]
                paused += time.time() - began
        return best


class FieldTrainer(Trainer):
    """Of a flagship: fields are drawn from sources of images, each with its share of a batch."""

    masks = Splines

    def __init__(self, model, sources, recipe, options, device):
        super().__init__(model, recipe, options, device)
        turns = recipe.get("turns", (0.5, 0.5, 0.5))
        self.sources = [(Images(images, device, turns), share) for images, share in sources]
        self.splines, self.std = self.masks(device, options.masks), model.config.residual_std
        self.teacher = copy.deepcopy(model).requires_grad_(False)
        self.error, self.taught = self.compiled(self.error), self.compiled(self.taught)

    def fields(self, nodes, count):
        """Truth (B, 3, n, n), what is observed of it (B, 3, 32, 32), sides in pixels (B,); and the queries
        (B, Q, 2), whether they are pixels, and what the model is told of where they are (B, Q, 3)."""
        parts = [round(count * share) for _, share in self.sources[:-1]]
        sides, areas = self.recipe["fields"][nodes]
        drawn = []
        for (images, _), part in zip(self.sources, [*parts, count - sum(parts)], strict=True):
            drawn.append(images.draw(part, nodes, sides, areas if images.images.shape[-1] > SIDE else (1,)))
        truth, seen, sides = map(torch.cat, zip(*drawn, strict=True))
        truth, seen = recolour(truth, seen, *self.recipe["colours"])
        i = torch.arange(nodes, device=self.device)
        valid = ((i[:, None] < sides[:, None, None]) & (i < sides[:, None, None])).flatten(1)
        centres = ((i + 0.5) / sides[:, None]).clamp_max(1)  # (B, n)
        query = torch.stack(
            [centres[:, None].expand(-1, nodes, -1), centres[:, :, None].expand(-1, -1, nodes)], -1
        ).flatten(1, 2)
        footprint = (nodes / sides).log2()[:, None, None].expand(-1, nodes**2, 1)
        places = torch.cat([offsets(query, nodes), footprint], dim=-1)
        some, kept = torch.rand(2, count, 1, device=self.device)  # a few fields keep a part of their queries
        valid = valid & (torch.rand(valid.shape, device=self.device) < torch.where(some < 0.08, kept, 1))
        return truth, seen, sides, query, valid, places

    def observe(self, seen):
        """Masks drawn anew (B,), the index (B, I) of their pixels, and the values there (B, I, 3)."""
        mask = torch.randint(len(self.splines.masks), (len(seen),), device=self.device)
        index = self.splines.masks[mask]
        return mask, index, seen.flatten(2).mT.gather(1, index[..., None].expand(-1, -1, 3))

    def batch(self, nodes, count):
        """Conditions of `predict`, data over the spline in units of its deviation, pixels that count."""
        truth, seen, sides, query, valid, places = self.fields(nodes, count)
        mask, index, values = self.observe(seen)
        if nodes == SIDE:
            valid = valid.scatter(1, index, torch.zeros_like(index, dtype=torch.bool))
        start = self.splines.start(mask, values, query)
        return (index, values, start, places, valid, sides), (truth.flatten(2).mT - start) / self.std

    def predict(self, model, condition, z, tau, delta):
        index, values, start, places, valid, sides = condition
        features = model.input_embedding(F.pad(values, (0, 2)))  # observed pixels are nodes: no offset
        inputs = features.new_zeros(len(values), SIDE**2, features.shape[-1])
        inputs = inputs.scatter(1, index[..., None].expand_as(features), features).unflatten(1, (SIDE, SIDE))
        grids = Grids(sides, math.isqrt(start.shape[1]), valid)
        conditions = FieldConditions(grids, places, start, {model.config.finer: inputs})
        return model.predict(z, tau, delta, conditions)

    def error(self, condition, z, tau, delta, target, weight):
        with self.autocast():
            u = self.predict(self.model, condition, z, tau, delta)
        squares = (u.float() - target).square().mean(-1) * condition[4] * weight[:, None]
        return squares.sum() / condition[4].sum()

    def taught(self, condition, z, tau):
        with self.autocast():
            return self.predict(self.teacher, condition, z, tau, torch.zeros_like(tau)).float()

    def velocity_loss(self, nodes, count):
        """Phase 1: z on the circle from noise to data, the velocity there; some at tau = 0."""
        condition, data = self.batch(nodes, count)
        z, tau, target, _ = self.draw(data, self.recipe["mean"])
        return self.error(condition, z, tau, torch.zeros_like(tau), target, torch.ones_like(tau))

    def draw(self, data, mean):
        noise = torch.randn_like(data)
        first, tau = torch.rand(2, len(data), device=self.device)
        tau = torch.where(first < mean, 0, HALF * tau)
        sin, cos = tau.sin()[:, None, None], tau.cos()[:, None, None]
        return sin * data + cos * noise, tau, cos * data - sin * noise, noise

    def step_loss(self, nodes, count):
        """Phase 2: half of the batch as in phase 1, half whole steps of the frozen teacher."""
        condition, data = self.batch(nodes, count)
        z, tau, target, noise = self.draw(data, 0.4)
        half = [x[1::2].contiguous() for x in condition]
        segments = pick(SEGMENTS, count // 2, self.device)
        i = (torch.rand(count // 2, device=self.device) * segments).floor()
        begin, end = (HALF * (k / segments) ** SHORTCUT_POWER for k in (i, i + 1))
        z0 = begin.sin()[:, None, None] * data[1::2] + begin.cos()[:, None, None] * noise[1::2]
        walked, h = z0, (end - begin) / 3
        with torch.no_grad():
            for k in range(3):
                here, there = begin + k * h, (begin + (k + 1) * h).clamp_max(HALF)
                slope = self.taught(half, walked, here).clone()
                later = self.taught(half, walked + h[:, None, None] * slope, there)
                walked = walked + h[:, None, None] * (slope + later) / 2
        mean = (walked - z0) / (end - begin)[:, None, None]

        def joined(x, y):
            return torch.stack([x[::2], y], 1).flatten(0, 1)

        delta = joined(torch.zeros_like(tau), end - begin)
        weight = joined(torch.ones_like(tau), torch.full_like(begin, 1.5))
        return self.error(condition, joined(z, z0), joined(tau, begin), delta, joined(target, mean), weight)


def held_out(model, images, sizes):
    """score(weights): mean PSNR of the posterior mean on these images, over the sizes."""
    seen = evaluate.observe(area_resize(images, SIDE), 0.2, 777)
    truth = {size: area_resize(images, size) / 255 for size in sizes}
    judge = copy.deepcopy(model)

    def score(weights):
        copy_into(judge.parameters(), weights)
        found = [evaluate.reconstruct(judge, seen, None if k == SIDE else k) for k in sizes]
        pairs = zip(found, truth.values(), strict=True)
        return float(np.mean([metrics.psnr(x, y).mean() for x, y in pairs]))

    return score


def training_pictures(name, size):
    """Of a source, without those that are held out: of 64 px if it has them, so that parts can be cut."""
    small = name == "cifar10"
    if name.endswith(".npz"):
        with np.load(name) as arrays:
            small = arrays["x_train"].shape[1] == SIDE
    return open_images(name, "train", SIDE if small else max(64, size), held_out=True)[:]


def training_data(options, recipe, held_out):
    """(Pictures, share) of each source in --data, and so many held-out ones of the first, 500 of 32 px."""
    size, named = max(recipe["batches"]), [text.rsplit(":", 1) for text in options.data]
    sources = [(training_pictures(name, size), float(share)) for name, share in named]
    limit = 500 if size == SIDE else held_out
    return sources, load_images(named[0][0], "validation", size, limit=limit)


def save(model, folder):
    """A copy in float16; the model stays what and where it is."""
    copy.deepcopy(model).to(memory_format=torch.contiguous_format).cpu().half().save_pretrained(folder)
    print(f"written: {folder}", flush=True)


def add_options(parser, rates=(1e-3, 5e-4)):
    parser.add_argument("--data", nargs="+", required=True, metavar="SOURCE:SHARE")
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument(
        "--rate", type=float, nargs=len(rates), default=rates, help="peak learning rates of the phases"
    )
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--ema", type=float, default=0.9995)
    parser.add_argument("--every", type=float, default=20, help="seconds between two validations")
    parser.add_argument("--masks", type=int, default=MASKS)
    parser.add_argument("--scale", type=float, default=1, help="factor on the batches")
    parser.add_argument("--set", type=json.loads, default={}, metavar="JSON", help="settings of the model")


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", choices=RECIPES)
    add_options(parser)
    parser.add_argument(
        "--seconds", type=float, nargs=2, help="of the phases (the recipe's); 0 leaves one out"
    )
    parser.add_argument("--init", type=Path, help="go on from a trained one, whose settings stay")
    options = parser.parse_args(arguments)
    if options.init and options.set:
        parser.error("--set is for a new model; that of --init keeps its settings")
    torch.manual_seed(0)
    device, recipe = run.default_device(), RECIPES[options.recipe]
    if options.init:
        model = models.load_model(options.init).float()
        finer = recipe["model"].get("finer", 0)
        if not isinstance(model, models.MambaField) or model.config.finer < finer:
            parser.error(f"{options.init} is not a MambaField with {finer} or more finer levels")
    else:
        model = models.MambaField(models.MambaFieldConfig(**recipe["model"] | options.set))
    sources, validation = training_data(options, recipe, held_out=64)
    model = model.to(device, memory_format=torch.channels_last)
    trainer = FieldTrainer(model, sources, recipe, options, device)
    score = held_out(model, validation, sorted({SIDE, max(recipe["batches"])}))
    seconds = options.seconds or recipe["seconds"]
    if seconds[0]:
        step = trainer.recorded(trainer.velocity_loss)
        _, weights = trainer.run(step, seconds[0], options.rate[0], score)
        trainer.restart(weights)
        model.config = replace(model.config, shortcut=False)
    if seconds[1]:
        copy_into(trainer.teacher.parameters(), trainer.parameters)
        trainer.run(trainer.recorded(trainer.step_loss), seconds[1], options.rate[1], score)
        trainer.restart(trainer.average)
        model.config = replace(model.config, shortcut=True)
    print(f"{score(trainer.average):.3f} dB on held-out images")
    save(model, options.out)


if __name__ == "__main__":
    main()
