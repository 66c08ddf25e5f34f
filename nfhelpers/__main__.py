"""The command line: python -m nfhelpers train | evaluate | doctor.

Arguments are checked before torch is imported. Exit codes: 0 all is well; 1 a loss that is not finite, or
something that `doctor` missed; 2 an error of the user's; 130 interrupted, 143 terminated.
"""

import argparse
import os
import shlex
import sys
import tomllib
from pathlib import Path

from nfhelpers import run

SAMPLERS = ("euler", "heun", "midpoint", "rk4", "ddim", "sde")
BASELINES = ("linear", "cubic", "thin plate", "biharmonic", "wiener")
SOURCES = ("photos", "cifar10", "chirps", "fsdd")
TOLERANCE = 1e-4  # largest relative error, against float64, that is rounding in float32


def main(arguments=None):
    """Parse the command line and run it; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(arguments)
    options.command = shlex.join(["python", "-m", "nfhelpers", *arguments])
    try:
        return options.function(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def parser():
    made = argparse.ArgumentParser(prog="python -m nfhelpers", description="Neural fields from state spaces.")
    commands = made.add_subparsers(required=True, metavar="train | evaluate | doctor")

    train = commands.add_parser("train", help="train a model, or go on with a run that was stopped")
    train.set_defaults(function=train_model)
    names = [name for name in run.sections() if name != "ssm_basics"]
    train.add_argument("model", choices=names, metavar="NAME", help=", ".join(names))
    train.add_argument("--preset", choices=(*run.PRESETS, "auto"), help="default: NF_PRESET, else auto")
    train.add_argument("--output", type=Path, help="folder of the run (default: runs/NAME/PRESET)")
    train.add_argument("--init", type=Path, metavar="FOLDER", help="start from a model's weights, or a v1's")
    train.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="train.epochs=3, ...")
    train.add_argument("--precision", choices=("fp32", "bf16", "fp16"), help="default: bf16 on a GPU")
    train.add_argument("--data", help="instead of the preset's: " + ", ".join(SOURCES) + ", a folder, an .npz")
    train.add_argument("--seed", type=int)

    evaluate = commands.add_parser("evaluate", help="scores of models beside classical interpolation")
    evaluate.set_defaults(function=evaluate_models)
    evaluate.add_argument("checkpoints", type=Path, nargs="+", metavar="FOLDER", help="saved models")
    evaluate.add_argument("--data", default="photos", help="source of test images (photos)")
    evaluate.add_argument("--images", type=int, default=16, help="how many (16)")
    evaluate.add_argument("--observed", type=float, default=0.2, help="fraction of the pixels (0.2)")
    evaluate.add_argument("--sizes", type=int, nargs="+", default=[32, 64], help="the first is observed (32 64)")
    evaluate.add_argument("--samplers", choices=SAMPLERS, nargs="*", default=[], help="also draw samples")
    evaluate.add_argument("--steps", type=int, default=50, help="of a sampler (50)")
    evaluate.add_argument("--baselines", choices=BASELINES, nargs="*", default=["linear", "biharmonic", "wiener"])
    evaluate.add_argument("--seed", type=int, default=0, help="of pixels and noise (0)")
    evaluate.add_argument("--out", type=Path, metavar="FOLDER", help="write scores.csv and fields.png there")

    doctor = commands.add_parser("doctor", help="versions, devices, scan backends; checks of a saved model")
    doctor.set_defaults(function=diagnose)
    doctor.add_argument("--model", type=Path, metavar="FOLDER", help="also check this saved model")
    for command in (train, evaluate, doctor):
        command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return made


def pick_device(name):
    device = run.default_device()
    if name == "cuda" and device.type != "cuda":
        raise ValueError("--device cuda: torch finds no GPU here; pass --device cpu, or see `doctor`")
    return device if name in ("auto", device.type) else type(device)(name)


def check_source(source):
    if source is not None and source not in SOURCES and not Path(source).expanduser().exists():
        raise ValueError(f"--data {source}: no such path; pass one or a name: {', '.join(SOURCES)}")


def check_saved(folder):
    if folder is not None and not (folder / "config.json").is_file():
        inside = ", ".join(str(path.parent) for path in folder.glob("*/config.json"))
        raise ValueError(f"{folder} holds no config.json" + f"; it holds models: {inside}" * bool(inside))


# ---------------------------------------------------------------- train


def train_model(options):
    """Train or go on; 130 if interrupted."""
    overrides = dict(map(parse_override, options.set))
    chosen = {"data.source": options.data, "seed": options.seed}
    overrides |= {key: value for key, value in chosen.items() if value is not None}
    check_source(options.data)
    check_saved(options.init)
    run.load_settings(options.model, "smoke", overrides)  # presets have the same keys: before torch
    preset = run.resolve_preset(options.preset)
    output = options.output or Path("runs") / options.model / preset

    from nfhelpers import checkpoint, kernels, models, train

    with checkpoint.one_run(output):  # the folder can be written to, and is free
        settings, device = run.load_settings(options.model, preset, overrides), pick_device(options.device)
    seed, data, precision = settings["seed"], settings["data"], options.precision
    precision = precision or run.default_precision(device)
    config = train.TrainConfig(
        output, seed=seed, precision=precision, cpu=device.type == "cpu", title=options.model, **settings["train"]
    )
    datasets = load_datasets(options.model, data, seed)
    if options.model == "localmamba" and options.data and "model.num_classes" not in overrides:
        settings["model"]["num_classes"] = len(datasets[0].meta.class_names)
    run.seed_everything(seed)
    model = build_model(options.model, preset, settings["model"], options.init)
    if options.model == "diffae_phase1":
        models.fit_linear_code(model, datasets[0].images[:20_000])
    main = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"
    about = {
        "command": options.command,
        "data": f"{data['source']}, {len(datasets[0]):,} items to train on, {len(datasets[1]):,} to validate",
    }
    if main:
        print(f"model     {options.model}, {sum(p.numel() for p in model.parameters()):,} parameters, {preset}")
        print(f"data      {about['data']}")
        print(f"device    {run.describe_device(device)}, {precision}, scan: {kernels.choose_backend(device)}")
    result = train.fit(model, datasets, config, about=about)
    if main and options.model == "diffae_phase1":
        keep_latent_statistics(result, datasets[0], device)
    if main:
        scores = ", ".join(f"{key} {result.history[key][-1]:.4f}" for key in ("val_loss", "val_psnr") if result.history[key])
        print(f"{'interrupted' if result.interrupted else 'trained'} at step {result.steps}: {scores}")
        print(f"best {result.best}, latest {result.latest}")
    return 130 if result.interrupted else 0


def parse_override(pair):
    """ "train.epochs=3" -> ("train.epochs", 3): values in TOML's syntax, anything else is text."""
    key, equals, text = pair.partition("=")
    if not equals:
        raise ValueError(f"--set {pair!r} has no '='; write --set train.epochs=3")
    try:
        return key.strip(), tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), text


def load_datasets(name, data, seed):
    """(train, validation): sparse fields, or spectrograms for localmamba."""
    if name != "localmamba":
        return run.field_datasets(data, seed)
    from nfhelpers.spectrograms import load_spectrograms

    splits = ("train", "validation")
    return tuple(load_spectrograms(data["source"], s, data["size"], data[f"{s}_images"]) for s in splits)


def build_model(name, preset, settings, init=None):
    """The model to train: from scratch, from the weights in `init`, or from what it shares with a v1 there.

    Phase 2 of the autoencoder is built on that of phase 1, in `init` or runs/diffae_phase1/PRESET/best.
    """
    from nfhelpers import models

    if name == "diffae_phase2":
        first = models.load_model(init or Path("runs") / "diffae_phase1" / preset / "best")
        return models.second_phase(first, **settings) if first.config.phase == 1 else first
    model_class, config_class = models.ALL[name.removesuffix("_phase1")]
    model = model_class(config_class(**settings))
    if init is None:
        return model
    source = models.load_model(init)
    if type(source) is model_class:
        model.load_state_dict(source.state_dict())
        copied = list(source.state_dict())
    elif isinstance(source, models.MambaDiffusion):
        copied = models.initialise_from_v1(model, source)
    else:
        raise ValueError(f"--init {init} is a {type(source).__name__}; pass a {model_class.__name__} or a v1")
    parts = ", ".join(dict.fromkeys(name.split(".")[0] for name in copied))
    print(f"init      {len(copied)} of {len(model.state_dict())} tensors of {init}: {parts}")
    return model


def keep_latent_statistics(result, dataset, device):
    """Write mean and deviation of the training set's latents into what phase 1 has saved."""
    from nfhelpers import checkpoint, models

    for folder in {result.best, result.latest} - {None}:
        model = models.load_model(folder).to(device)
        models.fit_latent_statistics(model, dataset)
        checkpoint.save_model(model, folder, (folder / "README.md").read_text(encoding="utf-8"))


# ---------------------------------------------------------------- evaluate


def evaluate_models(options):
    """Print means, standard errors and paired differences to the first model; write scores and pictures."""
    for folder in options.checkpoints:
        check_saved(folder)
    check_source(options.data)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "scores.csv").touch()

    import pandas
    import torch

    from nfhelpers import classical, evaluate, images, models, plots

    device = pick_device(options.device)
    torch.backends.cuda.matmul.allow_tf32 = os.environ.get("NVIDIA_TF32_OVERRIDE") != "0"
    networks = {}
    for folder in options.checkpoints:
        model = models.load_model(folder)
        if not isinstance(model, tuple(known for known, _ in models.FIELD_MODELS.values())):
            raise ValueError(f"{folder} is a {type(model).__name__}, not a model of sparse fields")
        networks[str(folder)] = model.to(device)
    size, *larger = options.sizes
    shown = images.load_images(options.data, "test", size, options.images)
    baselines = {name: name for name in options.baselines}
    if "wiener" in baselines:
        baselines["wiener"] = classical.Wiener(images.load_images(options.data, "train", size, 4096))
    truth = {}
    for other in larger:
        try:
            truth[other] = images.load_images(options.data, "test", other, options.images)
        except ValueError as error:  # the source is no larger: fields without scores
            print(f"no scores at {other} px: {error}", file=sys.stderr)
    same = {"truth": truth, "observed": options.observed, "seed": options.seed, "progress": True}
    table, fields = evaluate.compare(networks | baselines, shown, options.sizes, **same)
    for sampler in options.samplers:
        ways = {"kinds": ("sample",), "sampler": sampler, "steps": options.steps}
        rows, drawn = evaluate.compare(networks, shown, options.sizes, **same, **ways)
        table = pandas.concat([table, rows.assign(kind=f"{sampler}, {options.steps} steps")])
        fields |= {(name, sampler, size): made for (name, _, size), made in drawn.items()}
    print(f"{len(shown)} images of {options.data}, {options.observed:.0%} of {size} x {size} pixels observed")
    print(summary(table, next(iter(networks))))
    if options.out:
        table.to_csv(options.out / "scores.csv", index=False)
        rows = {}
        for (name, kind, side), made in fields.items():
            rows.setdefault(f"{Path(name).name}, {kind}", []).append(made[0])
        rows["target"] = [shown[0], *(truth[side][0] if side in truth else None for side in larger)]
        figure = plots.image_grid(rows, titles=[f"{side} px" for side in options.sizes], title=options.data)
        figure.savefig(options.out / "fields.png")
        print(f"wrote {options.out}/scores.csv and fields.png")
    return 0


def summary(table, first):
    """Mean ± standard error by size, kind and model, and PSNR's paired difference to the first model."""
    best = table[(table.model == first)].set_index(["size", "kind", "image"]).psnr
    kinds = table.kind.where(table.kind != "classical", "mean")
    keys = list(zip(table["size"], kinds, table.image, strict=True))
    table = table.assign(difference=table.psnr.to_numpy() - best.loc[keys].to_numpy())
    columns = {"psnr": 2, "difference": 2, "ssim": 3, "speckle": 4, "seconds": 3}
    groups = table.groupby(["size", "kind", "model"], sort=False)[list(columns)].agg(["mean", "sem"])
    for name, digits in columns.items():
        groups[name, "text"] = [f"{m:.{digits}f} ± {s:.{digits}f}" for m, s in groups[name].to_numpy()]
    return groups.xs("text", axis=1, level=1)[list(columns)].to_string()


# ---------------------------------------------------------------- doctor


def diagnose(options):
    """Print versions, devices, scan backends against float64, and checks of a model; 1 if one is missed."""
    check_saved(options.model)
    import torch

    from nfhelpers import kernels

    device, wrong = pick_device(options.device), []
    for name, number in run.versions().items():
        print(f"{name:<10} {number or 'not installed'}")
    for name in ("cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))):
        print(f"device     {run.describe_device(name)}")
    print(f"selective scan (* used on {device.type}; relative error against float64, forward and backward)")
    chosen = kernels.choose_backend(device)
    for name, status in kernels.backend_status().items():
        if status == "ok":
            errors = kernels.self_check(name, "cpu" if name == "native" else device).values()
            right = all(error < TOLERANCE for error in errors)  # NaN is wrong, too
            status = f"{'ok' if right else 'WRONG'}  {'  '.join(f'{error:.1e}' for error in errors)}"
            wrong += [] if right else [name]
        print(f"{'*' if name == chosen else ' '} {name:<10} {status}")
    if options.model:
        for item, met, found in check_model(options.model, device):
            print(f"{'ok' if met else 'missed':<7}{item:<28}{found}")
            wrong += [] if met else [item]
    return 1 if wrong else 0


def check_model(folder, device):
    """(item, whether it is met, what was found) of a saved model: card, output, gradients, guidance."""
    import torch

    from nfhelpers import flow, images, models

    torch.manual_seed(0)
    model = models.load_model(folder).to(device)
    yield "loads", True, f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters"
    yield "has a card", (folder / "README.md").is_file(), "README.md"
    if isinstance(model, models.LocalMamba2D):
        batch = {"spectrograms": torch.randn(2, model.config.channels, 32, 32).clamp(-1, 1)}
        batch |= {"labels": torch.arange(2)} if model.config.num_classes else {}
        batch |= {"captions": torch.randn(2, model.config.caption_dim)} if model.config.caption_dim else {}
        loss = flow.grid_flow_loss
    elif isinstance(model, models.LatentVelocityNetwork):
        ...
    else:
        data = images.SparseFields(images.load_images("photos", "test", 32, 2), seed=0)
        batch = torch.utils.data.default_collate([data[0], data[1]])
        loss = flow.flow_matching_loss
    loss = loss(model, {name: x.to(device) for name, x in batch.items()})
    loss.backward()
    yield "finite loss", bool(loss.isfinite()), f"{float(loss):.4f}"
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    bad = [name for name, g in gradients.items() if g is None or not (g.isfinite().all() and g.any())]
    yield "gradients finite, not zero", not bad, ", ".join(bad) or f"{len(gradients)} parameters"


if __name__ == "__main__":
    code = main()
    if "torch.distributed" in sys.modules and sys.modules["torch.distributed"].is_initialized():
        sys.modules["torch.distributed"].destroy_process_group()  # its threads would abort a process that just ends
    sys.exit(code)
