"""Write tests/golden/: outputs of every shipped checkpoint and of every scan, small, float32, on a CPU.

To run again only where numbers change on purpose. tests/test_golden.py holds the code to these files.
"""

import math
from pathlib import Path

import torch
from safetensors.torch import save_file

from nfhelpers import samplers
from nfhelpers.flow import flow_matching_loss, grid_flow_loss
from nfhelpers.images import grid_coords
from nfhelpers.kernels import directional_scan, selective_scan
from nfhelpers.kernels.orders import point_order
from nfhelpers.models import load_model

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
CHECKPOINTS = sorted(path.parent.name for path in ROOT.glob("checkpoints/*/config.json"))
BACKENDS = ("reference", "chunked", "native")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def smooth_batch(side=16, observed=40):
    """A batch of two fields of smooth colours."""
    coords = grid_coords(side, side).float()  # (Q, 2)
    x, y = coords.unbind(-1)
    channels = [torch.sin(5 * x + phase) * torch.cos(3 * y - 2 * phase) for phase in range(3)]
    values = 0.8 * torch.stack(channels, -1)  # (Q, 3)
    values = torch.stack([values, values.flip(0) * x[:, None]])  # (2, Q, 3)
    picks = torch.stack([torch.randperm(side**2, generator=seeded(i))[:observed] for i in range(2)])
    batch = dict(query_coords=coords.expand(2, -1, -1), query_values=values, input_coords=coords[picks])
    return batch | {"input_values": torch.stack([values[i, picks[i]] for i in range(2)])}


def field_outputs(model):
    """Draws of two samplers and the mean; latent, decoding and, of phase 2, a field's noise and back."""
    batch = smooth_batch()
    query, truth, *inputs = batch.values()
    options = dict(steps=2, generator=seeded())
    outputs = {m: samplers.sample(model, query, *inputs, method=m, **options) for m in ("heun", "sde")}
    outputs["mean"], _ = samplers.posterior_mean(model, query, *inputs, generator=seeded())
    if hasattr(model, "encode"):
        outputs["latent"] = latent = model.encode(*inputs).detach()
        outputs["decoded"] = model.decode(query, latent).detach()
        if model.config.phase == 2:
            noise = samplers.encode_stochastic(model, query, truth, latent, steps=2)
            field = samplers.decode_stochastic(model, query, latent, noise, steps=2)
            outputs |= {"noise": noise, "redecoded": field, "normalised": model.normalise(latent)}
    noise = torch.randn(truth.shape, generator=seeded(1))
    return outputs | loss_outputs(model, flow_matching_loss, batch, t=torch.tensor([0.0, 0.6]), noise=noise)


def grid_outputs(model, labels, size=(20, 24)):  # 20 rows are padded to 24
    """Grids of two classes, without and with guidance."""
    options = dict(labels=labels, steps=2, generator=seeded())
    outputs = {
        f"guidance_{s}": samplers.sample_grids(model, 2, *size, guidance=s, **options) for s in (1.0, 2.5)
    }
    data, noise = (torch.randn(2, 1, *size, generator=seeded(i)).tanh() for i in (4, 5))
    batch, drop = {"spectrograms": data, "labels": labels}, torch.tensor([False, True])
    t = torch.tensor([0.1, 0.7])
    return outputs | loss_outputs(model, grid_flow_loss, batch, t=t, noise=noise, drop=drop)


def loss_outputs(model, loss_function, batch, **draws):
    """A loss and its gradient's norms (P,), by the order of the parameters' names."""
    loss = loss_function(model, batch, **draws)
    loss.backward()
    gradients = [parameter.grad for _, parameter in sorted(model.named_parameters())]
    norms = torch.stack([torch.zeros(()) if g is None else g.norm() for g in gradients])
    return {"loss": loss.detach(), "gradient_norms": norms}


def checkpoint_outputs(name):
    """What a shipped model makes of fixed inputs: a dict of tensors."""
    model = load_model(ROOT / "checkpoints" / name)
    if model.config.model_type == "latent_flow":
        return {"latents": samplers.sample_latents(model, 2, steps=3, generator=seeded())}
    if model.config.model_type == "localmamba":
        return grid_outputs(model, torch.tensor([3, 7]))
    return field_outputs(model)


def draw_scan(tied, directions=1, batch=2, channels=6, length=37, states=4):
    """Tensors of a directional scan, channels last; of a selective scan with one direction."""
    g, rows = seeded(2), (batch, directions, length)
    shapes = {"x": (batch, length, channels), "delta": (*rows, channels)}
    shapes |= {"B": (*rows, states), "C": (*rows, states)}
    shapes |= {"D": (directions, channels), "delta_bias": (directions, channels)}
    drawn = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    rates = torch.rand(directions, channels, *[states] * (not tied), generator=g)
    return drawn | {"A": -rates - 0.1, "z": torch.randn(batch, length, channels, generator=g)}


def scan_outputs(backend):
    """Results and all gradients of selective and directional scans, of free and of tied decays."""
    outputs = {}
    for tied, name in ((False, "free"), (True, "tied")):
        options, drawn = dict(backend=backend, tied_decay=tied), draw_scan(tied)
        own = {name: drawn[name][0] for name in ("A", "D", "delta_bias")}
        own |= {name: drawn[name][:, 0].mT for name in ("delta", "B", "C")}
        own |= {"u": drawn["x"].mT, "z": drawn["z"].mT}
        own = {name: x.detach().requires_grad_() for name, x in own.items()}
        y, last = selective_scan(**own, delta_softplus=True, return_last_state=True, **options)
        outputs |= {f"selective.{name}.{k}": x for k, x in with_gradients(own, y, last).items()}

        own = {name: x.requires_grad_() for name, x in draw_scan(tied, 3).items() if name != "z"}
        coords = torch.rand(2, 37, 2, generator=seeded(3))
        orders = torch.stack([point_order(coords, kind) for kind in ("row", "column", "diagonal")], 1)
        y = directional_scan(**own, orders=orders, reverse=(False, True, False), **options)
        outputs |= {f"directional.{name}.{k}": x for k, x in with_gradients(own, y).items()}
    return outputs


def with_gradients(arguments, y, last=None):
    """The results, and the gradients of a weighted sum of them."""
    weights = torch.arange(y.numel()).mul(math.sqrt(2)).sin().view_as(y)
    total = (weights * y).sum() + (0 if last is None else last.square().sum())
    found = torch.autograd.grad(total, list(arguments.values()))
    results = {"y": y.detach()} | ({} if last is None else {"last": last.detach()})
    return results | {f"grad_{name}": x for name, x in zip(arguments, found, strict=True)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    everything = {name: checkpoint_outputs(name) for name in CHECKPOINTS}
    everything |= {f"scan-{backend}": scan_outputs(backend) for backend in BACKENDS}
    for name, outputs in everything.items():
        save_file({key: x.contiguous() for key, x in outputs.items()}, GOLDEN / f"{name}.safetensors")
