"""Write tests/golden/: outputs of every shipped checkpoint and of every scan, small, float32, on a CPU.

To run again only where numbers change on purpose. tests/test_golden.py holds the code to these files.
"""

import math
from pathlib import Path

import torch
from safetensors.torch import save_file

from nfhelpers import samplers
from nfhelpers.flow import flow_matching_loss
from nfhelpers.images import grid_coords
from nfhelpers.kernels import directional_scan, selective_scan
from nfhelpers.kernels.orders import point_order
from nfhelpers.models import load_model

try:
    from nfhelpers.flow import grid_flow_loss
    from nfhelpers.samplers import sample_grids
except ImportError:
    from nfhelpers.models.local_mamba import grid_flow_loss, sample_grids

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
CHECKPOINTS = sorted(path.parent.name for path in ROOT.glob("checkpoints/*/config.json"))
BACKENDS = ("reference", "chunked", "native")
SIDE, OBSERVED = 16, 40


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def observed_field():
    """Two fields of smooth colours: query_coords, query_values of SIDE x SIDE; OBSERVED input points."""
    coords = grid_coords(SIDE, SIDE).float()  # (Q, 2)
    x, y = coords.unbind(-1)
    channels = [torch.sin(5 * x + phase) * torch.cos(3 * y - 2 * phase) for phase in range(3)]
    values = 0.8 * torch.stack(channels, -1)  # (Q, 3)
    values = torch.stack([values, values.flip(0) * x[:, None]])  # (2, Q, 3)
    picks = torch.stack([torch.randperm(SIDE**2, generator=seeded(i))[:OBSERVED] for i in range(2)])
    inputs = coords[picks], torch.stack([values[i, picks[i]] for i in range(2)])
    return coords.expand(2, -1, -1), values, *inputs


def field_outputs(model):
    """Posterior mean, draws of two samplers, loss and the norm of each parameter's gradient, by name."""
    query_coords, query_values, *inputs = observed_field()
    field = query_coords, *inputs
    options = dict(steps=2, generator=seeded())
    outputs = {m: samplers.sample(model, *field, method=m, **options) for m in ("heun", "sde")}
    outputs["mean"], _ = samplers.posterior_mean(model, *field, generator=seeded())
    names = "query_coords", "query_values", "input_coords", "input_values"
    batch = dict(zip(names, (query_coords, query_values, *inputs), strict=True))
    noise = torch.randn(query_values.shape, generator=seeded(1))
    loss = flow_matching_loss(model, batch, t=torch.tensor([0.0, 0.6]), noise=noise)
    return outputs | {"loss": loss.detach(), "gradient_norms": gradient_norms(model, loss)}


def gradient_norms(model, loss):
    """(P,), by the order of the parameters' names."""
    loss.backward()
    gradients = [parameter.grad for _, parameter in sorted(model.named_parameters())]
    return torch.stack([torch.zeros(()) if g is None else g.norm() for g in gradients])


def autoencoder_outputs(model):
    """Latent, decoding and, in phase 2, the noise of a field and the field of that noise."""
    query_coords, query_values, *inputs = observed_field()
    with torch.no_grad():
        latent = model.encode(*inputs)
        outputs = {"latent": latent, "decoded": model.decode(query_coords, latent)}
    if model.config.phase == 2:
        noise = samplers.encode_stochastic(model, query_coords, query_values, latent, steps=2)
        field = samplers.decode_stochastic(model, query_coords, latent, noise, steps=2)
        outputs |= {"noise": noise, "redecoded": field, "normalised": model.normalise(latent)}
    return outputs


def grid_outputs(model, labels, size=(20, 24)):  # 20 rows are padded to 24
    """Grids of two classes, and the loss of one batch."""
    options = dict(labels=labels, steps=2, generator=seeded())
    outputs = {f"guidance_{s}": sample_grids(model, 2, *size, guidance=s, **options) for s in (1.0, 2.5)}
    data, noise = (torch.randn(2, 1, *size, generator=seeded(i)).tanh() for i in (4, 5))
    options = dict(t=torch.tensor([0.1, 0.7]), noise=noise, drop=torch.tensor([False, True]))
    loss = grid_flow_loss(model, {"spectrograms": data, "labels": labels}, **options)
    return outputs | {"loss": loss.detach(), "gradient_norms": gradient_norms(model, loss)}


def checkpoint_outputs(name):
    """What a shipped model makes of the fixed inputs: a dict of tensors."""
    model = load_model(ROOT / "checkpoints" / name)
    if model.config.model_type == "latent_flow":
        return {"latents": samplers.sample_latents(model, 2, steps=3, generator=seeded())}
    if model.config.model_type == "localmamba":
        return grid_outputs(model, torch.tensor([3, 7]))
    extra = autoencoder_outputs(model) if hasattr(model, "encode") else {}
    return field_outputs(model) | extra


def draw_scan(tied, directions=1, batch=2, channels=6, length=37, states=4):
    """Tensors of a directional scan, channels last; of a selective scan with one direction."""
    g = seeded(2)
    rows = batch, directions, length
    shapes = {"x": (batch, length, channels), "delta": (*rows, channels)}
    shapes |= {"B": (*rows, states), "C": (*rows, states)}
    shapes |= {"D": (directions, channels), "delta_bias": (directions, channels)}
    drawn = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    rates = torch.rand(directions, channels, *[states] * (not tied), generator=g)
    return drawn | {"A": -rates - 0.1, "z": torch.randn(batch, length, channels, generator=g)}


def scan_outputs(backend):
    """y, last state and all gradients of selective and directional scans, of free and of tied decays."""
    outputs = {}
    for tied in (False, True):
        options = dict(backend=backend, tied_decay=tied)
        drawn = draw_scan(tied)
        own = {name: drawn[name][0] for name in ("A", "D", "delta_bias")}
        own |= {name: drawn[name][:, 0].mT for name in ("delta", "B", "C")}
        own |= {"u": drawn["x"].mT, "z": drawn["z"].mT}
        own = {name: x.detach().requires_grad_() for name, x in own.items()}
        y, last = selective_scan(**own, delta_softplus=True, return_last_state=True, **options)
        found = {"selective": {"y": y, "last": last} | gradients(y, own, last)}

        own = {name: x.requires_grad_() for name, x in draw_scan(tied, 3).items() if name != "z"}
        coords = torch.rand(2, 37, 2, generator=seeded(3))
        orders = torch.stack([point_order(coords, kind) for kind in ("row", "column", "diagonal")], 1)
        y = directional_scan(**own, orders=orders, reverse=(False, True, False), **options)
        found["directional"] = {"y": y} | gradients(y, own)
        for scan, results in found.items():
            outputs |= {f"{scan}.{'tied' if tied else 'free'}.{k}": x.detach() for k, x in results.items()}
    return outputs


def gradients(y, arguments, last=None):
    """Gradients of a weighted sum of all results."""
    weights = torch.arange(y.numel()).mul(math.sqrt(2)).sin().view_as(y)
    total = (weights * y).sum() + (0 if last is None else last.square().sum())
    found = torch.autograd.grad(total, list(arguments.values()))
    return {f"grad_{name}": x for name, x in zip(arguments, found, strict=True)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    GOLDEN.mkdir(exist_ok=True)
    everything = {name: checkpoint_outputs(name) for name in CHECKPOINTS}
    everything |= {f"scan-{backend}": scan_outputs(backend) for backend in BACKENDS}
    for name, outputs in everything.items():
        save_file({key: x.contiguous() for key, x in outputs.items()}, GOLDEN / f"{name}.safetensors")
    print(sum(path.stat().st_size for path in GOLDEN.iterdir()), "bytes")
