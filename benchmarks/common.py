"""What several benchmarks share: the shortest of several runs, peak memory, results as JSON."""

import json
import math
import platform
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.profiler import ProfilerActivity, profile


def best_seconds(call, device, repeats=20, budget=math.inf):
    """Seconds that `call()` takes at best, after one call that compiles; stops after `budget` seconds.

    On a machine that does other things the smallest time is what the code needs.
    """
    taken = []
    while len(taken) <= repeats and sum(taken[1:]) < budget:
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
    return min(taken[1:])


def peak_bytes(call, device):
    """Most bytes that `call()` held beyond those held before; None if nothing was recorded.

    On a GPU the CUDA allocator counts, on the CPU the profiler: what is taken without PyTorch's allocators,
    as by the native scan, is not seen.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return int(np.cumsum(changes).max()) if changes else None


def frechet_distance(a, b):
    """Squared Frechet distance of two sets of features, (N, D) and (M, D) (Heusel et al. 2017)."""
    cov_a, cov_b = (np.cov(x, rowvar=False) for x in (a, b))
    root = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).real.clip(0)).sum()  # trace of the matrix root
    return np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * root


def show(rows, index=None):
    """Print rows (list of dicts, or a DataFrame) as a table."""
    table = pd.DataFrame(rows)
    if index:
        table = table.set_index(index)
    with pd.option_context("display.width", 200, "display.max_columns", None, "display.max_rows", None):
        print(table.to_string(float_format=lambda x: f"{x:.4g}", na_rep="-"), flush=True)


def write_results(rows, path, command, **config):
    """Rows as JSON with what is needed to repeat them: command, settings, versions, device."""
    versions = {"python": platform.python_version()}
    for name in ("nfhelpers", "torch", "triton", "mamba-ssm", "numpy", "scipy", "scikit-image"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else f"CPU ({platform.machine()})"
    rows = json.loads(pd.DataFrame(rows).to_json(orient="records"))  # NaN becomes null
    document = {"command": command, "config": config, "versions": versions, "device": device, "rows": rows}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"wrote {path}")
