"""Models of fields on an equal footing: v1, four directions, V2 and the flagship, each for the same seconds.

    python benchmarks/footing.py v1 --data cifar10 --seconds 600
    python benchmarks/footing.py v1 --data cifar10 --epochs 20 --preset full --out runs/documents
    python benchmarks/footing.py runs/footing/*.json

It times steps of `train.fit`, takes as many as fill the seconds, and scores the weights of the lowest
validation loss on the test images, once. SIGTERM leaves a state, from which the same command goes on.
All have the same images, mirrored ones too, masks, batch, loss, optimizer, schedule and learning rate (1e-3).
All but the flagship (6.8 million) have 2.1 to 2.2 million parameters: a slower layer pays in steps.
With --epochs and another preset that preset decides; `full` has the design documents' sizes and rates.
"""

import argparse
import json
import shlex
import sys
import tempfile
import time
from pathlib import Path

import common
import fields
import numpy as np
import pandas as pd
import torch
from safetensors import safe_open

from nfhelpers import evaluate, images, models, run, train
from nfhelpers.__main__ import setting

PART = 100  # steps, which `fit` takes for an epoch: the seconds are met to half of them
MODELS = {  # section of presets.toml, and what differs from its preset gpu
    "v1": ("v1", {}),
    "multidir": ("multidir", {}),
    "lightweight": ("multidir", {"model.shared_weights": True, "model.d_model": 128}),
    "v2": ("v2", {}),
    "field": ("field", {}),
}
EQUAL = {"data.train_images": 50_000, "data.validation_images": 500, "data.queries": 0.8}
EQUAL |= {"train.batch_size": 128, "train.ema_decay": 0.999, "train.compile": True, "train.num_workers": 8}


class Turns(images.SparseFields):
    """An endless walk through all images, in parts of a fixed length, with new masks in each part."""

    length: int  # of a part

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return super().__getitem__((self.epoch * self.length + index) % len(self.images))


def pace(model, data, settings):
    """Seconds of a step of `fit`, from the last of three parts; the model's weights stay what they are."""
    ends, weights = [], {name: x.clone() for name, x in model.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        config = train.TrainConfig(folder, **settings | {"epochs": 3})
        train.fit(model, data, config, lambda *state: ends.append(time.perf_counter()))
    model.load_state_dict(weights)
    return (ends[2] - ends[1]) / PART


def trained(name, options):
    """Train, or go on; returns (the model of the lowest validation loss, about the training)."""
    (section, size), folder = MODELS[name], options.out / name
    chosen = {"data.source": options.data, "train.cuda_graphs": True, "train.save_interval": 120.0}
    chosen |= EQUAL | size if options.preset == "gpu" else {}
    settings = run.load_settings(section, options.preset, chosen | dict(options.set))
    device, data, seed = run.default_device(), settings["data"], settings["seed"]
    own = {"seed": seed, "precision": run.default_precision(device), "cpu": device.type == "cpu"}
    own |= settings["train"] | {"progress": False}
    torch.manual_seed(seed)
    model_class, config = models.FIELD_MODELS[section]
    model = model_class(config(**settings["model"]))
    part, validation = run.field_datasets(data, seed)
    epochs, timed = options.epochs, folder / "pace.json"
    if not epochs:
        both = np.concatenate([part.images, part.images[:, :, ::-1]])
        part = Turns(np.random.default_rng(seed).permutation(both), data["observed"], data["queries"])
        part.length = PART * own["batch_size"]
        if not timed.exists():
            folder.mkdir(parents=True, exist_ok=True)
            timed.write_text(json.dumps(pace(model, part, own)))
        epochs = max(1, round(options.seconds / json.loads(timed.read_text()) / PART))
    config = train.TrainConfig(folder, **own | {"epochs": epochs, "evaluate_every": max(1, epochs // 20)})
    result = train.fit(model, (part, validation), config)
    if result.interrupted:
        raise KeyboardInterrupt
    with safe_open(folder / "state.safetensors", "pt") as state:
        seconds = json.loads(state.metadata()["nfhelpers"])["progress"]["seconds"]  # with checks and saving
    about = {"parameters": sum(p.numel() for p in model.parameters()), "steps done": result.steps}
    about |= {"images seen": result.steps * config.batch_size, "seconds in all": seconds}
    about |= {"ms a step": 1e3 * json.loads(timed.read_text())} if timed.exists() else {}
    return models.load_model(result.best).to(device), about


def scored(model, truth):
    """(A row an image, about the samples and the time of a mean), with the masks of fields.py."""
    torch.backends.cuda.matmul.allow_tf32 = True
    seen, device = evaluate.observe(truth, 0.2, 0), next(model.parameters()).device
    seconds = common.best_seconds(lambda: evaluate.reconstruct(model, seen), device, repeats=1)
    table = evaluate.score(evaluate.reconstruct(model, seen), seen.images)
    table["biharmonic"] = evaluate.score(evaluate.reconstruct("biharmonic", seen), seen.images).psnr
    few = truth[: -(-len(truth) // 4)]
    drawn = fields.samples(model, {few.shape[1]: few}, evaluate.observe(few, 0.2, 0), draws=6)
    return table, {"ms an image": 1e3 * seconds / len(truth), "samples": drawn}


def rows_of(files):
    """One row a result: means, standard errors, paired differences to the first one and to biharmonic."""
    rows, found = [], [json.loads(Path(file).read_text()) for file in files]
    tables = [pd.DataFrame(x["rows"]) for x in found]
    for about, table in zip((x["config"] for x in found), tables, strict=True):
        row = {"model": about.pop("model"), "PSNR": table.psnr.mean(), "PSNR, error": table.psnr.sem()}
        row |= {"SSIM": table.ssim.mean(), "speckle": table.speckle.mean()}
        for name, other in (("the first", tables[0].psnr), ("biharmonic", table.biharmonic)):
            row |= {f"- {name}": (table.psnr - other).mean(), f"- {name}, error": (table.psnr - other).sem()}
        drawn = about.pop("samples")[-1]  # by the most evaluations
        row |= {"CRPS": drawn["CRPS"], "spread / skill": drawn["spread / skill"]}
        rows.append(row | about)
    return rows


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", nargs="+", help=f"a model to train ({', '.join(MODELS)}), or results to show")
    parser.add_argument("--data", default="cifar10", help="a source of images (cifar10)")
    parser.add_argument("--preset", choices=run.PRESETS, default="gpu", help="of the model's size (gpu)")
    parser.add_argument("--seconds", type=float, default=600, help="of training steps (600)")
    parser.add_argument("--epochs", type=int, help="of the images, in place of seconds")
    parser.add_argument("--out", type=Path, default=Path("runs/footing"), help="folder of all results")
    parser.add_argument("--images", type=int, default=517, help="that are scored, four times those sampled")
    parser.add_argument("--set", type=setting, action="append", default=[], metavar="train.num_workers=4")
    options = parser.parse_args(arguments)
    model, files = options.what[0], options.what
    if model in MODELS:
        files = [written := options.out / f"{model}.json"]
        if not written.exists():  # else the test images were read
            network, about = trained(model, options)
            rows, more = scored(network, images.load_images(options.data, "test", 32, options.images))
            command = shlex.join(["python", *sys.argv])
            common.write_results(rows, written, command, model=model, **about, **more)
    common.show(pd.DataFrame(rows_of(files)).set_index("model").T)


if __name__ == "__main__":
    main()
