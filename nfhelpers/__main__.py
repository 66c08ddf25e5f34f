"""The command line: python -m nfhelpers train | evaluate | doctor.

Arguments are checked before torch is imported. Exit codes: 0 all is well; 1 a loss that is not finite, or
something that `doctor` missed; 2 an error of the user's; 130 interrupted, 143 terminated.
"""

import argparse
import os
import shlex
import sys
import tempfile
import tomllib
from functools import partial
from pathlib import Path

from nfhelpers import files, run

SAMPLERS = ("euler", "heun", "midpoint", "rk4", "sde", "shortcut")
SOURCES = ("photos", "cifar10", "chirps", "fsdd")


def main(arguments=None):
    """Parse the command line and run it; returns the exit code."""
    options = parser().parse_args(arguments)
    if hasattr(sys.stdout, "reconfigure"):  # a locale or a file's name may have letters that it has not
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return options.function(options)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError) else 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def parser():
    made = argparse.ArgumentParser(prog="python -m nfhelpers", description="Neural fields from state spaces.")
    commands = made.add_subparsers(required=True, metavar="train | evaluate | doctor")
    train = commands.add_parser("train", help="train a model, or go on with a run that was stopped")
    train.set_defaults(function=train_model)
    train.add_argument("model", choices=[name for name in run.sections() if name != "ssm_basics"])
    train.add_argument("--preset", choices=(*run.PRESETS, "auto"), help="default: NF_PRESET, else auto")
    train.add_argument("--data", help=f"{', '.join(SOURCES)}, a folder or an .npz, in place of the preset's")
    train.add_argument("--output", type=Path, help="folder of the run (default: runs/MODEL/PRESET)")
    train.add_argument("--init", type=Path, metavar="FOLDER", help="start from a model's weights, or a v1's")
    train.add_argument("--set", type=setting, action="append", default=[], metavar="train.epochs=3")
    train.add_argument("--precision", choices=("fp32", "bf16"), help="default: bf16 on a GPU")
    evaluate = commands.add_parser("evaluate", help="scores of models, and of classical interpolation")
    evaluate.set_defaults(function=evaluate_models)
    evaluate.add_argument("checkpoints", type=Path, nargs="+", metavar="FOLDER", help="saved models")
    evaluate.add_argument("--data", default="photos", help="source of test images (photos)")
    evaluate.add_argument("--images", type=int, default=16, help="how many (16)")
    evaluate.add_argument("--observed", type=float, default=0.2, help="fraction of the pixels (0.2)")
    evaluate.add_argument("--sizes", type=int, nargs="+", default=[32], help="the first is observed (32)")
    evaluate.add_argument("--samplers", choices=SAMPLERS, nargs="*", default=[], help="also draw samples")
    evaluate.add_argument("--steps", type=int, help="of a sampler (50, of shortcut 4)")
    evaluate.add_argument("--seed", type=int, default=0, help="of pixels and noise (0)")
    evaluate.add_argument("--out", type=Path, metavar="FOLDER", help="write scores.csv and fields.png there")
    doctor = commands.add_parser("doctor", help="versions, devices, scan backends; checks of a saved model")
    doctor.set_defaults(function=diagnose)
    doctor.add_argument("--model", type=Path, metavar="FOLDER", help="also check this saved model")
    for command in (train, evaluate, doctor):
        command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return made


def check_paths(*models, source=None, output=None):
    """Find out without torch that a folder holds no model, data are nowhere, or nothing can be written."""
    for folder in filter(None, models):
        files.config_of(folder)
    if source not in (None, *SOURCES) and not os.path.exists(os.path.expanduser(source)):
        raise ValueError(f"--data {source}: no such path; pass one, or a name of {', '.join(SOURCES)}")
    if output is not None:
        if "\\udc" in ascii(output.absolute()):
            raise ValueError(f"--output {output}: TensorBoard needs a path in UTF-8")
        output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output).close()


def train_model(options):
    """Train or go on; 130 if interrupted."""
    name, overrides = options.model, dict(options.set)
    overrides |= {"data.source": options.data} if options.data else {}
    run.load_settings(name, "smoke", overrides)  # before torch; all presets have the same keys
    check_paths(options.init, source=options.data)
    preset = run.resolve_preset(options.preset)
    output = options.output or Path("runs", name, preset)
    check_paths(output=output)
    import torch

    from nfhelpers import checkpoint, kernels, models, spectrograms, train

    settings, device = run.load_settings(name, preset, overrides), run.default_device(options.device)
    seed, precision = settings["seed"], options.precision or run.default_precision(device)
    fixed = {"seed": seed, "precision": precision, "cpu": device.type == "cpu", "title": name}
    config = train.TrainConfig(output, **fixed, **settings["train"])
    data = settings["data"]
    if name == "localmamba":
        load = partial(spectrograms.load_spectrograms, data["source"], size=data["size"], held_out=True)
        datasets = tuple(load(split, limit=data[f"{split}_images"]) for split in ("train", "validation"))
        classes = datasets[0].meta.class_names
    else:
        datasets, classes = run.field_datasets(data, seed), ()
    chosen = [key.removeprefix("model.") for key in overrides if key.startswith("model.")]
    if classes and "data.source" in overrides and "num_classes" not in chosen:
        settings["model"]["num_classes"] = len(classes)
        chosen.append("num_classes")
    torch.manual_seed(seed)
    model = build_model(name, preset, settings["model"], options.init, chosen)
    if name == "diffae_phase1" and options.init is None:  # else the code is that of the networks
        models.fit_linear_code(model, datasets[0].images[:20_000])
    about = {
        "command": shlex.join(["python", "-m", "nfhelpers", *sys.argv[1:]]),
        "model": f"{name}, {preset}, {sum(p.numel() for p in model.parameters()):,} parameters",
        "data": f"{data['source']}, {len(datasets[0]):,} items, {len(datasets[1]):,} to validate",
        "device": f"{run.describe_device(device)}, {precision}, scan: {kernels.choose_backend(device)}",
    }
    about |= {"classes": f"{len(classes)}: {', '.join(classes)}"} if classes else {}
    main_process = os.environ.get("RANK", "0") == "0"
    if main_process:
        print("\n".join(f"{key:<8} {line}" for key, line in about.items() if key != "command"))
    result = train.fit(model, datasets, config, about=about)
    if main_process and name == "diffae_phase1":  # phase 2 needs the statistics of the latents
        for folder in {result.best, result.latest} - {None}:
            trained = models.load_model(folder).to(device)
            models.fit_latent_statistics(trained, datasets[0], progress=True)
            checkpoint.save_model(trained, folder, (folder / "README.md").read_text(encoding="utf-8"))
    return 130 if result.interrupted else 0


def setting(pair):
    """ "train.epochs=3" -> ("train.epochs", 3): values in TOML's syntax, anything else is text."""
    key, text = pair.split("=", 1)
    try:
        return key, tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return key, text


def build_model(name, preset, settings, init=None, chosen=()):
    """The model to train: new; or with the weights in `init` and its sizes, but for the `chosen` settings; or
    with what it shares with a v1 there."""
    from nfhelpers import models

    if name == "diffae_phase2":  # built on phase 1
        first = models.load_model(init or Path("runs/diffae_phase1", preset, "best"))
        return models.second_phase(first, **settings) if first.config.phase == 1 else first
    model_class, config = (models.FIELD_MODELS | models.OTHER_MODELS)[name.removesuffix("_phase1")]
    if init is None:
        return model_class(config(**settings))
    source = models.load_model(init)
    if same := type(source) is model_class:
        settings = vars(source.config) | {key: settings[key] for key in chosen}
        settings |= {"phase": 1} if name == "diffae_phase1" else {}
    settings |= {"shortcut": False} if "shortcut" in settings else {}  # `fit` trains no whole steps
    model = model_class(config(**settings))
    if same:
        copied, own = source.state_dict(), {}
        if vars(model.config).get("num_classes") != vars(source.config).get("num_classes"):
            copied.pop("class_embedding.weight", None)  # of other classes it is new
            own = {key: x for key, x in model.state_dict().items() if key.startswith("class_embedding.")}
        try:
            model.load_state_dict(copied | own)
        except RuntimeError as error:
            raise ValueError(f"--init {init} does not fit: {str(error).splitlines()[1].strip()}") from error
    elif isinstance(source, models.MambaDiffusion):
        copied = models.initialise_from_v1(model, source)
    else:
        raise ValueError(f"--init {init} is a {type(source).__name__}; pass a {model_class.__name__} or a v1")
    parts = ", ".join(dict.fromkeys(key.split(".")[0] for key in copied))
    print(f"from {init}: {len(copied)} of {len(model.state_dict())} tensors: {parts}")
    return model


def evaluate_models(options):
    """Print means, standard errors and paired differences to the first model; write scores and pictures."""
    check_paths(*options.checkpoints, source=options.data, output=options.out)
    if not 0 < options.observed <= 1:
        raise ValueError(f"--observed {options.observed} is no fraction; pass one such as 0.2")
    import torch

    from nfhelpers import classical, evaluate, images, models, plots

    device, sizes = run.default_device(options.device), options.sizes
    torch.backends.cuda.matmul.allow_tf32 = True
    networks = {str(folder): models.load_model(folder).to(device) for folder in options.checkpoints}
    fields = tuple(model for model, _ in models.FIELD_MODELS.values())
    if others := [name for name, model in networks.items() if not isinstance(model, fields)]:
        raise ValueError(f"no models of sparse fields: {', '.join(others)}")
    if "shortcut" in options.samplers and not all(getattr(x, "shortcut", False) for x in networks.values()):
        raise ValueError("--samplers shortcut: not all of these models were trained on whole steps")
    truth = {size: images.load_images(options.data, "test", size, options.images) for size in sizes}
    if len({len(pictures) for pictures in truth.values()}) > 1:
        raise ValueError(f"{options.data} holds images that are too small for --sizes {max(sizes)}")
    wiener = classical.Wiener(images.load_images(options.data, "train", sizes[0], 4096))
    methods = networks | {"linear": "linear", "biharmonic": "biharmonic", "wiener": wiener}
    ways = {"kinds": ("mean", *options.samplers), "steps": options.steps, "seed": options.seed}
    ways |= {"truth": truth, "observed": options.observed, "progress": True}
    table, made = evaluate.compare(methods, truth[sizes[0]], sizes, **ways)
    same_image = [table["size"], table.kind.replace("classical", "mean"), table.image]
    table["difference"] = table.psnr - table.groupby(same_image).psnr.transform("first")  # the first model's
    columns = ["psnr", "difference", "ssim", "speckle", "seconds"]
    groups = table.groupby(["size", "model", "kind"], sort=False)[columns].agg(["mean", "sem"])
    print(f"{len(truth[sizes[0]])} images, {options.observed:.0%} of {sizes[0]} px observed")
    print(groups.round(4).to_string())
    if options.out:
        table.to_csv(options.out / "scores.csv", index=False, errors="backslashreplace")
        rows = {"target": [truth[size][0] for size in sizes]}
        for (name, kind, _), x in made.items():
            rows.setdefault(f"{name}, {kind}", []).append(x[0])
        plots.image_grid(rows, [f"{size} px" for size in sizes]).savefig(options.out / "fields.png")
    return 0


def diagnose(options):
    """Print versions, devices, scan backends against float64, and checks of a model; 1 if one is missed."""
    check_paths(options.model)
    import torch

    from nfhelpers import kernels, models

    device, rows = run.default_device(options.device), []
    print("\n".join(f"{name:<10} {number}" for name, number in run.versions().items()))
    for name in ("cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))):
        print(f"device     {run.describe_device(name)}")
    print(f"selective scan on {device.type}: {kernels.choose_backend(device)}; errors against float64:")
    for name in kernels.BACKENDS:
        place = torch.device("cpu") if name == "native" else device
        if (status := kernels.status_of(name, place.type)) == "ok":
            errors = kernels.self_check(name, place).values()  # NaN < 1e-4 is False: missed
            rows.append((name, all(x < 1e-4 for x in errors), "  ".join(f"{x:.1e}" for x in errors)))
        else:
            print(f"off    {name:<26} {status}")
    if options.model:
        model = models.load_model(options.model)
        bad = [name for name, x in model.state_dict().items() if not x.isfinite().all()]
        size = f"{sum(p.numel() for p in model.parameters()):,} finite parameters"
        rows += [(type(model).__name__, not bad, f"not finite: {', '.join(bad)}" if bad else size)]
    for item, met, found in rows:
        print(f"{'ok' if met else 'missed':<6} {item:<26} {found}")
    return 0 if all(met for _, met, _ in rows) else 1


if __name__ == "__main__":
    code = main()
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        distributed.destroy_process_group()  # its threads would abort a process that just ends
    sys.exit(code)
