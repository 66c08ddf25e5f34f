"""Images a second of `train.fit`, preset full, with one and with two GPUs.

    python benchmarks/two_gpus.py [--model v1] [--processes 1 2] [--quick] [--out FILE]

Several processes are started by `accelerate launch`, as docs/training.md says. `batch_size` is that of all
GPUs together: every number of GPUs is measured with the preset's batch, and with that many times as much.
--quick is preset smoke on a CPU.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

EPOCHS = 6  # the first compiles, the last one validates: between them it is timed


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="v1")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", type=int, metavar="FACTOR", help="of the batch; what is launched")
    options = parser.parse_args(arguments)
    if options.worker:
        return work(options)
    import common

    rows = []
    for processes in options.processes:
        for factor in sorted({1, processes}):
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable]
                if processes > 1:
                    command += ["-m", "accelerate.commands.launch", "--num_processes", str(processes)]
                    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_machines", "1"]
                    command += ["--cpu"] if options.quick else ["--multi_gpu"]
                command += [
                    __file__,
                    "--model",
                    options.model,
                    "--worker",
                    str(factor),
                    "--out",
                    f"{folder}/row",
                ]
                subprocess.run(command + ["--quick"] * options.quick, check=True)
                rows.append({"processes": processes, **json.loads(Path(folder, "row").read_text())})
    for row in rows:
        row["times one"] = row["images a second"] / rows[0]["images a second"]
    common.show(rows)
    if options.out:
        common.write_results(rows, options.out, "python benchmarks/two_gpus.py", model=options.model)
    return 0


def work(options):
    """Train for a few epochs; the main process writes what it measured to the file."""
    import torch

    from nfhelpers import models, run, train

    preset, cpu = "smoke" if options.quick else "full", not torch.cuda.is_available() or options.quick
    settings = run.load_settings(options.model, preset)
    batch = settings["train"]["batch_size"] * options.worker
    data = settings["data"] | {"source": "photos", "train_images": (2 if options.quick else 30) * batch}
    datasets = run.field_datasets(data | {"validation_images": 8}, 0)
    model_class, config = models.FIELD_MODELS[options.model]
    torch.manual_seed(0)
    chosen = {"epochs": EPOCHS, "batch_size": batch, "evaluate_every": EPOCHS, "save_interval": 1e9}
    precision, ends = "fp32" if cpu else "bf16", []
    chosen |= {
        "output_dir": f"{options.out}-run",
        "progress": False,
    }  # of all processes: a run has one folder
    train_config = train.TrainConfig(
        **settings["train"] | chosen, precision=precision, cpu=cpu, seed=settings["seed"]
    )
    model = model_class(config(**settings["model"]))
    result = train.fit(model, datasets, train_config, lambda *_: ends.append(time.perf_counter()))
    if ends:  # of the main process
        seconds = (ends[EPOCHS - 2] - ends[0]) / (EPOCHS - 2) / (result.steps // EPOCHS)
        memory = 0 if cpu else torch.cuda.max_memory_reserved() / 2**30
        row = {"batch": batch, "ms a step": 1e3 * seconds, "images a second": batch / seconds, "GiB": memory}
        options.out.write_text(json.dumps(row))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
