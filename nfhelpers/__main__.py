"""The command line: python -m nfhelpers doctor | train | evaluate | compare.

    python -m nfhelpers doctor
    python -m nfhelpers doctor --model localmamba
    python -m nfhelpers train v1 --preset demo --data photos
    accelerate launch --multi_gpu -m nfhelpers train v1 --preset full
    python -m nfhelpers train localmamba --data fsdd
    python -m nfhelpers train diffae_phase1 && python -m nfhelpers train diffae_phase2
    python -m nfhelpers evaluate checkpoints/v1-photos --scales 32 64 96 128 --steps 50
    python -m nfhelpers evaluate checkpoints/v1-photos --samplers heun sde ddim --temperature 0.5
    python -m nfhelpers compare checkpoints/v1-photos checkpoints/v2-photos --num-samples 50
    accelerate launch --multi_gpu -m nfhelpers evaluate checkpoints/v1-photos --images 256

Exit codes: 0 all is well; 1 `doctor` found a scan backend that loads but computes wrongly, or an item of the
model's checklist that fails, or training met a loss that is not finite; 2 an error of the user's; 130
interrupted.
"""

import argparse
import os
import shlex
import sys
import tomllib
from pathlib import Path

import torch
from accelerate import PartialState

from nfhelpers import evaluate, kernels, models, plots, run, samplers, spectrograms, train

DEVICE_HELP = (
    "default: cuda where there is one; NVIDIA_TF32_OVERRIDE=0 keeps it from rounding products to TF32"
)
SELF_CHECK_TOLERANCE = 1e-4
"""Largest relative error, against the float64 reference, that `doctor` takes for rounding in float32."""


def main(arguments=None):
    """Parse the command line and run it; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = build_parser().parse_args(arguments)
    command = shlex.join(["python", "-m", "nfhelpers", *arguments])
    try:
        return options.function(options, command)
    except (ValueError, OSError, MemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def build_parser():
    """The parser of all subcommands."""
    parser = argparse.ArgumentParser(
        prog="python -m nfhelpers", description="State space models for continuous neural fields."
    )
    commands = parser.add_subparsers(required=True, metavar="doctor | train | evaluate | compare")

    doctor_parser = commands.add_parser(
        "doctor",
        help="versions, devices and scan backends, each checked against the reference",
        description="Print versions, devices and scan backends; check each backend's outputs and gradients "
        "against the float64 reference. With --model, go through that model's checklist too. Ends with 1 if "
        "a backend that loads computes wrongly, or an item fails.",
    )
    doctor_parser.add_argument("--model", choices=("localmamba",), help="also check this model")
    doctor_parser.add_argument(
        "--preset", choices=run.PRESETS, default="smoke", help="its settings (default: %(default)s)"
    )
    doctor_parser.set_defaults(function=doctor)

    train_parser = commands.add_parser(
        "train",
        help="train a model, or go on with a run that was stopped",
        description="Train a model on sparse pixels, or localmamba on spectrograms, by flow matching. A run "
        "that was stopped is resumed from its output folder; Ctrl-C leaves a usable checkpoint. "
        "On many GPUs: accelerate launch -m nfhelpers train ...",
    )
    train_parser.add_argument("model", choices=trainable(), help="which model")
    train_parser.add_argument(
        "--preset", help="smoke, demo, full or auto, by the hardware (default: NF_PRESET, else auto)"
    )
    train_parser.add_argument(
        "--data",
        help="photos, cifar10, a folder of images or an .npz file; of localmamba: chirps, fsdd or a folder "
        "of wav files (default: the preset's)",
    )
    train_parser.add_argument("--output", type=Path, help="folder of the run (default: runs/MODEL/PRESET)")
    train_parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="replace a setting of presets.toml: train.epochs=3, model.d_model=256; may be repeated",
    )
    train_parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    train_parser.add_argument(
        "--precision", choices=sorted(train.PRECISIONS), help="default: bf16 on a GPU, else fp32"
    )
    train_parser.add_argument("--seed", type=int, help="default: the preset's")
    train_parser.add_argument(
        "--init",
        type=Path,
        metavar="FOLDER",
        help="of diffae_phase2: the model of phase 1 (default: runs/diffae_phase1/PRESET/best); of multidir, "
        "v2 and field: a trained v1, whose shared components they start from",
    )
    train_parser.set_defaults(function=train_model)

    evaluate_parser = commands.add_parser(
        "evaluate",
        help="PSNR, SSIM and speckle of a checkpoint at several sizes, beside classical interpolation",
        description="Reconstruct test images at several sizes from the same observed pixels and print "
        "a table: the model's posterior mean and sample, classical interpolators, the best linear estimate "
        "(wiener, from training images of the same source), upsampled 32 px result. On many GPUs, which "
        "share the images: accelerate launch --multi_gpu -m nfhelpers evaluate ...",
    )
    evaluate_parser.add_argument(
        "checkpoint",
        type=Path,
        nargs="+",
        help="folder of a saved model, such as checkpoints/v1-photos; several share one table, in which they "
        "are compared with the first",
    )
    evaluate_parser.add_argument(
        "--scales", type=int, nargs="+", default=[32, 64, 96, 128], metavar="SIDE", help="sides in pixels"
    )
    evaluate_parser.add_argument(
        "--sample-scales",
        type=int,
        nargs="*",
        metavar="SIDE",
        help="sides at which posterior samples, many steps each, are drawn too (default: all; none if empty)",
    )
    evaluate_parser.add_argument(
        "--steps", type=int, default=50, help="sampler steps of a sample (default: %(default)s)"
    )
    evaluate_parser.add_argument(
        "--samplers",
        choices=sorted(samplers.SAMPLERS),
        nargs="+",
        default=["heun"],
        metavar="SAMPLER",
        help=f"one or more of {', '.join(samplers.SAMPLERS)}, a row each (default: heun)",
    )
    evaluate_parser.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        help="of sde: how much noise its steps replace, 0 for none (default: %(default)s)",
    )
    evaluate_parser.add_argument(
        "--data", default="photos", help="source of test images (default: %(default)s)"
    )
    evaluate_parser.add_argument("--images", type=int, default=16, help="how many (default: %(default)s)")
    evaluate_parser.add_argument(
        "--observed", type=float, default=0.2, help="fraction of pixels observed (default: %(default)s)"
    )
    evaluate_parser.add_argument(
        "--out", type=Path, help="also write the table, with command and versions, as JSON"
    )
    evaluate_parser.add_argument(
        "--figures", type=Path, metavar="DIR", help="also draw the first image at all sizes"
    )
    evaluate_parser.add_argument("--device", choices=("cpu", "cuda"), help=DEVICE_HELP)
    evaluate_parser.add_argument(
        "--seed", type=int, default=0, help="of pixels and noise (default: %(default)s)"
    )
    evaluate_parser.set_defaults(function=evaluate_checkpoint)

    compare_parser = commands.add_parser(
        "compare",
        help="two checkpoints on the same pixels of the same images, with paired tests and charts",
        description="Reconstruct the same test images with two checkpoints; print and write "
        "comparison_results.txt (PSNR, SSIM, speckle and seconds with standard errors, improvement, paired "
        "t-test and Wilcoxon's test), v1_vs_v2_comparison.png and improvement_chart.png. On many GPUs, which "
        "share the images: accelerate launch --multi_gpu -m nfhelpers compare ...",
    )
    for name, example in (("a", "checkpoints/v1-photos"), ("b", "checkpoints/v2-photos")):
        compare_parser.add_argument(
            f"checkpoint_{name}", type=Path, help=f"folder of a saved model, such as {example}"
        )
    compare_parser.add_argument(
        "--num-samples", type=int, default=50, help="how many test images (default: %(default)s)"
    )
    compare_parser.add_argument(
        "--steps",
        type=int,
        nargs="+",
        default=[50],
        metavar="STEPS",
        help="Heun steps of a sample; two numbers for A and B (default: 50)",
    )
    compare_parser.add_argument(
        "--data", default="photos", help="source of test images (default: %(default)s)"
    )
    compare_parser.add_argument(
        "--observed", type=float, default=0.2, help="fraction of pixels observed (default: %(default)s)"
    )
    compare_parser.add_argument(
        "--output", type=Path, help="folder of the results (default: runs/compare/A_vs_B)"
    )
    compare_parser.add_argument("--device", choices=("cpu", "cuda"), help=DEVICE_HELP)
    compare_parser.add_argument(
        "--seed", type=int, default=0, help="of pixels and noise (default: %(default)s)"
    )
    compare_parser.set_defaults(function=compare_checkpoints)
    return parser


def trainable():
    """Names of the models that have a section of settings in presets.toml."""
    sections = run.sections()
    return [*(name for name in models.FIELD_MODELS | models.OTHER_MODELS if name in sections), *PHASES]


# ---------------------------------------------------------------- doctor


def doctor(options, command):
    """Print versions, devices, the state of every scan backend and a model's checklist; 1 if one is wrong."""
    print("versions")
    for name, number in run.versions().items():
        print(f"  {name:<10} {number or 'not installed'}")
    print("devices")
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    devices += ["mps"] if torch.backends.mps.is_available() else []
    for device in devices:
        print(f"  {run.describe_device(device)}")
    default = run.default_device()
    print(
        f"selective scan (* used on {default.type}; float32's relative error against the float64 reference)"
    )
    try:
        chosen, refused = kernels.choose_backend(default), None
    except ValueError as error:  # NF_SCAN_BACKEND names one that cannot run here; the table says why
        chosen, refused = None, error
    wrong = []
    for name, status in kernels.backend_status().items():
        mark = "*" if name == chosen else " "
        if status != "ok":
            print(f"{mark} {name:<10} off: {status}")
            continue
        error = kernels.self_check(name, "cpu" if name == "native" else default)
        line = f"{mark} {name:<10} ok   forward {error['forward']:.1e}   backward {error['backward']:.1e}"
        if not all(value < SELF_CHECK_TOLERANCE for value in error.values()):  # NaN is wrong too
            wrong.append(name)
            line += f"   WRONG: above {SELF_CHECK_TOLERANCE:.0e}"
        print(line)
    if wrong:
        print(f"do not use {', '.join(wrong)}: choose another backend with NF_SCAN_BACKEND", file=sys.stderr)
    if refused:
        raise refused
    failed = []
    if options.model:
        settings = run.load_settings(options.model, options.preset)["model"]
        print(f"{options.model}, preset {options.preset}, on {default.type}")
        kernel = {"item": "scan kernel", "ok": chosen not in wrong, "found": chosen}
        rows = evaluate.local_mamba_checklist(models.LocalMamba2DConfig(**settings), device=default)
        for row in (kernel, *rows):
            print(f"  {'ok' if row['ok'] else 'FAILED':<6} {row['item']:<24}  {row['found']}")
        failed = [row["item"] for row in rows if not row["ok"]]
    return 1 if wrong or failed else 0


# ---------------------------------------------------------------- train


PHASES = ("diffae_phase1", "diffae_phase2")
"""Sections of presets.toml that train the diffusion autoencoder, one after the other."""


LINEAR_CODE_IMAGES = 20_000
"""Most training images that the linear code of diffae_phase1 is fitted on."""


def build_model(name, preset, settings, init):
    """The model to train, of these settings. Phase 2 of the autoencoder is built on the model of phase 1;
    multidir, v2 and field start from the components they share with a v1 in the folder `init`, if given.

    Raises ValueError for an `init` without use, and where phase 2 finds no phase 1.
    """
    if name == "diffae_phase2":
        first = init or Path("runs") / "diffae_phase1" / preset / "best"
        return models.second_phase(first, **settings)
    known = models.FIELD_MODELS | models.OTHER_MODELS
    model_class, config_class = known["diffae" if name == "diffae_phase1" else name]
    model = model_class(config_class(**settings))
    if init is None:
        return model
    if name not in ("multidir", "v2", "field"):
        raise ValueError(
            f"--init {init} is of diffae_phase2, multidir, v2 and field only; leave it out for {name}"
        )
    first = models.load_model(init)
    if not isinstance(first, models.MambaDiffusion):
        raise ValueError(
            f"--init {init} is a {type(first).__name__}; pass a v1 such as checkpoints/v1-photos"
        )
    models.initialise_from_v1(model, first)
    return model


def load_datasets(name, data, seed):
    """The datasets (train, validation) of these settings: sparse fields, or spectrograms for localmamba."""
    if name == "localmamba":
        parts = (("train", data["train_images"]), ("test", data["validation_images"]))
        return [
            spectrograms.load_spectrograms(data["source"], split, data["size"], limit)
            for split, limit in parts
        ]
    return run.field_datasets(data, seed)


def keep_latent_statistics(result, dataset, device):
    """Write mean and standard deviation of the latents of the training set into what phase 1 saved."""
    for folder in {result.best, result.latest} - {None}:
        model = models.load_model(folder).to(device)
        models.fit_latent_statistics(model, dataset)
        train.save_model(model, folder)


def train_model(options, command):
    """Train or resume; 130 if interrupted."""
    preset = run.resolve_preset(options.preset)
    overrides = parse_overrides(options.set)
    for key, value in (("data.source", options.data), ("seed", options.seed)):
        if value is not None:
            overrides[key] = value
    settings = run.load_settings(options.model, preset, overrides)
    device = pick_device(options.device)
    precision = options.precision or run.default_precision(device)
    output = options.output or Path("runs") / options.model / preset
    seed, data = settings["seed"], settings["data"]
    config = train.TrainConfig(
        output_dir=output, seed=seed, precision=precision, cpu=device.type == "cpu", **settings["train"]
    )

    datasets = load_datasets(options.model, data, seed)
    if options.model == "localmamba" and options.data and "model.num_classes" not in overrides:
        # Another source than the preset's has classes of its own.
        settings["model"]["num_classes"] = len(datasets[0].meta.class_names)
    run.seed_everything(seed)
    model = build_model(options.model, preset, settings["model"], options.init)
    if options.model == "diffae_phase1":
        models.fit_linear_code(model, datasets[0].images[:LINEAR_CODE_IMAGES])
    main_process = is_main_process()
    if main_process:
        parameters = sum(p.numel() for p in model.parameters())
        train_data, validation_data = datasets
        print(f"model     {options.model}, {parameters:,} parameters, preset {preset}")
        kind = "spectrograms" if options.model == "localmamba" else "images"
        print(f"data      {data['source']}, {len(train_data):,} {kind}, {len(validation_data):,} to validate")
        print(f"device    {run.describe_device(device)}, {precision}, scan: {kernels.choose_backend(device)}")
        print(f"output    {output}", flush=True)

    result = train.fit(model, datasets, config)
    if main_process:
        if options.model == "diffae_phase1":
            keep_latent_statistics(result, datasets[0], device)
        losses, score = result.history["val_loss"], ""
        if losses:
            score = f", validation loss {losses[-1]:.4f}"
            if options.model != "localmamba":
                score += f", PSNR {result.history['val_psnr'][-1]:.2f} dB"
        print(f"{'interrupted' if result.interrupted else 'trained'} at step {result.steps}{score}")
        print(f"best {result.best}, latest {result.latest}")
    return 130 if result.interrupted else 0


def is_main_process():
    """Whether this is the only process, or the first of those that `accelerate launch` started."""
    return os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"


def join_processes(device):
    """(device of this process, number of processes), once all that `accelerate launch` started are here."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device, 1
    state = PartialState(cpu=device.type == "cpu")
    return state.device, state.num_processes


def parse_overrides(pairs):
    """["train.epochs=3"] -> {"train.epochs": 3}: values in TOML's syntax, anything else is text.

    Raises ValueError for a pair without "=".
    """
    overrides = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise ValueError(f"--set {pair!r} has no '='; write --set train.epochs=3")
        try:
            overrides[key.strip()] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            overrides[key.strip()] = text
    return overrides


def pick_device(name):
    """The named device, or the default; raises ValueError for cuda without a GPU."""
    if name is None:
        return run.default_device()
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here; pass --device cpu, or see `doctor`")
    return torch.device(name)


# ---------------------------------------------------------------- evaluate


def load_field_model(path):
    """A saved model of sparse fields; raises ValueError for one that makes something else."""
    model = models.load_model(path)
    if not isinstance(model, tuple(known for known, _ in models.FIELD_MODELS.values())):
        hint = "; benchmarks/localmamba.py scores its spectrograms" * isinstance(model, models.LocalMamba2D)
        raise ValueError(
            f"{path} is a {type(model).__name__}, not a model of sparse fields such as checkpoints/v1-photos"
            + hint
        )
    return model


def evaluate_checkpoint(options, command):
    """Print the table of `evaluate.multiscale`, or `side_by_side`; write JSON and figures where asked for."""
    run.allow_tf32()
    device, processes = join_processes(pick_device(options.device))
    names = checkpoint_names(*options.checkpoint)
    loaded = {
        name: load_field_model(path).to(device) for name, path in zip(names, options.checkpoint, strict=True)
    }
    settings = {
        "scales": tuple(options.scales),
        "sample_scales": options.sample_scales,
        "steps": options.steps,
        "method": options.samplers,
        "temperature": options.temperature,
        "images": options.images,
        "observed": options.observed,
        "seed": options.seed,
        "device": device,
        "progress": sys.stderr.isatty() and is_main_process(),
        "sharded": True,
    }
    pictures = {}  # scale -> method or model -> the first image's field
    if len(loaded) == 1:

        def keep_first(scale, method, fields, target):
            pictures.setdefault(scale, {})[method] = fields[0]
            if target is not None:
                pictures[scale]["target"] = target[0]

        keep = keep_first if options.figures else None
        rows = evaluate.multiscale(*loaded.values(), options.data, callback=keep, **settings)
    else:
        rows, fields = evaluate.side_by_side(loaded, options.data, **settings)
        for (scale, name), made in fields.items():
            if made is not None:
                pictures.setdefault(scale, {})[name] = made[0]
    if not is_main_process():
        return 0
    print(evaluate.format_table(rows))
    if options.out:
        config = {
            name: value for name, value in vars(options).items() if name not in ("function", "out", "figures")
        }
        config["checkpoint"] = [str(path) for path in options.checkpoint]
        if processes > 1:
            config["processes"] = processes
        print(f"wrote {evaluate.write_results(rows, options.out, command=command, config=config)}")
    if options.figures:
        options.figures.mkdir(parents=True, exist_ok=True)
        path = options.figures / f"{'_'.join(names)}_multiscale.png"
        heading = f"{options.data}, {options.observed:.0%} of pixels observed"
        plots.multiscale_grid(pictures, title=heading).savefig(path, bbox_inches="tight")
        print(f"wrote {path}")
    return 0


# ---------------------------------------------------------------- compare


PICTURES = 4
"""Images shown in v1_vs_v2_comparison.png."""


def compare_checkpoints(options, command):
    """Print the tables of `evaluate.compare`; write them, example pictures and the chart to a folder."""
    run.allow_tf32()
    device, processes = join_processes(pick_device(options.device))
    paths = (options.checkpoint_a, options.checkpoint_b)
    loaded = [load_field_model(path).to(device) for path in paths]
    names = checkpoint_names(*paths)
    pictures = {}  # column -> (k, H, W, 3)

    def keep_first(kind, fields_a, fields_b, target, mask):
        first = slice(PICTURES)
        pictures.setdefault("observed", plots.observed_pixels(target[first], mask[first]))
        for name, fields in zip(names, (fields_a, fields_b), strict=True):
            pictures[f"{name}\nposterior {kind}"] = fields[first]
        pictures["target"] = target[first]

    rows = evaluate.compare(
        *loaded,
        options.data,
        images=options.num_samples,
        observed=options.observed,
        steps=options.steps if len(options.steps) > 1 else options.steps[0],
        seed=options.seed,
        device=device,
        progress=sys.stderr.isatty() and is_main_process(),
        callback=keep_first,
        sharded=True,
    )
    if not is_main_process():
        return 0
    output = options.output or Path("runs") / "compare" / "_vs_".join(names)
    output.mkdir(parents=True, exist_ok=True)
    about = [
        f"{name}: {path}, {sum(p.numel() for p in model.parameters()):,} parameters"
        for name, path, model in zip(names, paths, loaded, strict=True)
    ]
    heading = f"{options.data}, {options.observed:.0%} of pixels observed"
    text = "\n".join(
        [
            *about,
            f"{heading}, {run.describe_device(device)}{f', {processes} processes' * (processes > 1)}",
            f"mean ± standard error; improvement of {names[1]} over {names[0]}, positive where it is better;",
            "two-sided p-values of paired tests over the images; seconds are those of one image",
            "",
            evaluate.format_comparison(rows, names),
        ]
    )
    print(text)
    results = output / "comparison_results.txt"
    results.write_text(f"{command}\n{text}\n", encoding="utf-8")
    target = pictures.pop("target")
    for file, figure in (
        ("v1_vs_v2_comparison.png", plots.comparison_grid(pictures, target, title=heading)),
        ("improvement_chart.png", plots.improvement_chart(rows, names, title=heading)),
    ):
        figure.savefig(output / file, bbox_inches="tight")
    print(f"wrote comparison_results.txt, v1_vs_v2_comparison.png and improvement_chart.png to {output}")
    return 0


def checkpoint_names(*paths):
    """Short and different names of checkpoints: v1/best and v2/best are "v1-best" and "v2-best"."""
    parts = [path.resolve().parts for path in paths]
    if len(set(parts)) < len(parts):
        return tuple(f"{part[-1]}-{chr(ord('A') + i)}" for i, part in enumerate(parts))
    depth = 1
    while len({part[-depth:] for part in parts}) < len(parts):
        depth += 1
    return tuple("-".join(part[-depth:]) for part in parts)


if __name__ == "__main__":
    code = main()
    if code == 0 and torch.distributed.is_initialized():  # its threads would abort a process that just ends
        torch.distributed.destroy_process_group()
    sys.exit(code)
