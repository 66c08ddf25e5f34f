"""mamba_ssm's selective scan from its source archive, for the benchmark: its own kernels and nothing else.

    python benchmarks/build_mamba_ssm.py --sdist mamba_ssm-2.3.2.post1.tar.gz --out FOLDER
    PYTHONPATH=FOLDER python -c "from mamba_ssm.ops.selective_scan_interface import selective_scan_fn"

FOLDER then holds `selective_scan_cuda.so` and the Python files of the package that the scan needs. Needs
torch with CUDA headers, nvcc of the same CUDA (12.8 or newer), ninja, einops and triton, and no network.

What is compiled are the archive's own sources with its own flags, for bfloat16 and float32 inputs and real
decays. The kernels of float16 and of complex decays, which take most of the build, are replaced by an error.
The archive compiles one file a dtype; here every launch size is a file of its own, so that all cores build.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

PACKAGE_FILES = ("ops/__init__.py", "ops/selective_scan_interface.py", "ops/triton", "utils")
DTYPES = {"bf16": "at::BFloat16", "fp32": "float"}
LEFT_OUT = (
    ("at::Half", "float"),
    *((dtype, "c10::complex<float>") for dtype in ("at::Half", *DTYPES.values())),
)
PARAMETERS = {"fwd": "SSMParamsBase", "bwd": "SSMParamsBwd"}
NVCC_FLAGS = (
    "-O3 -std=c++17 -U__CUDA_NO_HALF_OPERATORS__ -U__CUDA_NO_HALF_CONVERSIONS__"
    " -U__CUDA_NO_BFLOAT16_OPERATORS__ -U__CUDA_NO_BFLOAT16_CONVERSIONS__"
    " -U__CUDA_NO_BFLOAT162_OPERATORS__ -U__CUDA_NO_BFLOAT162_CONVERSIONS__"
    " --expt-relaxed-constexpr --expt-extended-lambda --use_fast_math --compress-mode=size"
).split()  # as in the archive's setup.py, without line numbers and reports, compressed


def unpack(archive, folder):
    """The archive's single top folder, extracted into `folder`."""
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    (root,) = Path(folder).iterdir()
    return root


def write_sources(kernels, folder):
    """Write the .cu and .cpp files that instantiate what is built; returns all sources."""
    sources = [kernels / "selective_scan.cpp"]
    missing = ["#include <c10/cuda/CUDAStream.h>", "#include <torch/types.h>", '#include "selective_scan.h"']
    for way, parameters in PARAMETERS.items():
        arguments = f"({parameters} &params, cudaStream_t stream)"
        header = f"selective_scan_{way}_kernel.cuh"
        # The first branch of the choice by sequence length is CUDA's, the second ROCm's.
        choice = (kernels / header).read_text().rsplit("#ifndef USE_ROCM", 1)[1].split("#else")[0]
        sizes = re.findall(rf"selective_scan_{way}_launch<(\d+), (\d+), input_t, weight_t>", choice)
        if not sizes:
            raise SystemExit(f"no launch sizes found in {header}: this archive is not laid out as 2.3.2 is")
        for short, dtype in DTYPES.items():
            launches = [
                f"template void selective_scan_{way}_launch<{', '.join(size)}, {dtype}, float>{arguments};"
                for size in sizes
            ]
            choose = f"template void selective_scan_{way}_cuda<{dtype}, float>{arguments};"
            files = {"choose": [*(f"extern {launch}" for launch in launches), choose]}
            files |= {"x".join(size): [launch] for size, launch in zip(sizes, launches, strict=True)}
            for name, lines in files.items():
                sources.append(folder / f"{way}_{short}_{name}.cu")
                sources[-1].write_text("\n".join([f'#include "{header}"', *lines, ""]))
        missing.append(
            f"template <typename input_t, typename weight_t> void selective_scan_{way}_cuda{arguments};"
        )
        for pair in LEFT_OUT:
            message = f"left out of this build of mamba_ssm: {' with '.join(pair)}"
            missing.append(
                f"template <> void selective_scan_{way}_cuda<{', '.join(pair)}>{arguments} "
                f'{{ TORCH_CHECK(false, "{message}"); }}'
            )
    sources.append(folder / "missing.cpp")
    sources[-1].write_text("\n".join([*missing, ""]))
    return sources


def compile_extension(root, folder, arch, jobs):
    """Build selective_scan_cuda.so in `folder`; returns its path."""
    import torch
    from torch.utils import cpp_extension

    if arch is None:
        if not torch.cuda.is_available():
            raise SystemExit("no CUDA device to build for; name one, such as --arch 9.0 for Hopper")
        arch = "{}.{}".format(*torch.cuda.get_device_capability())
    os.environ["TORCH_CUDA_ARCH_LIST"] = arch
    os.environ["MAX_JOBS"] = str(jobs)
    kernels = root / "csrc" / "selective_scan"
    cpp_extension.load(
        "selective_scan_cuda",
        [str(source) for source in write_sources(kernels, folder)],
        extra_cflags=["-O3", "-std=c++17"],
        extra_cuda_cflags=NVCC_FLAGS,
        extra_include_paths=[str(kernels)],
        build_directory=str(folder),
        verbose=True,
    )
    return folder / "selective_scan_cuda.so"


def install_package(root, out):
    """The Python files of the scan; mamba_ssm's own __init__ would import models and their dependencies."""
    target = out / "mamba_ssm"
    shutil.rmtree(target, ignore_errors=True)
    for name in PACKAGE_FILES:
        source = root / "mamba_ssm" / name
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, target / name)
    version = re.search(r"^__version__.*$", (root / "mamba_ssm/__init__.py").read_text(), re.MULTILINE)
    (target / "__init__.py").write_text(version[0] + "\n")


def import_error(out):
    """None when the scan can be imported from `out`, else the last line of what Python says."""
    environment = os.environ | dict(PYTHONPATH=os.pathsep.join([str(out), os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-c", "import torch, mamba_ssm.ops.selective_scan_interface"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    return None if run.returncode == 0 else run.stderr.strip().splitlines()[-1]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sdist", type=Path, required=True, help="mamba_ssm-<version>.tar.gz, as on PyPI")
    parser.add_argument("--out", type=Path, required=True, help="folder to put on PYTHONPATH")
    parser.add_argument("--prebuilt", type=Path, help="a selective_scan_cuda.so to try before building")
    parser.add_argument("--arch", help="compute capability such as 9.0 (default: of this machine's GPU)")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="compilers at a time (default: cores)"
    )
    options = parser.parse_args()

    start = time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    module = options.out / "selective_scan_cuda.so"
    with tempfile.TemporaryDirectory() as scratch:
        build = Path(scratch, "build")
        build.mkdir()
        root = unpack(options.sdist, Path(scratch, "source"))
        install_package(root, options.out)
        if options.prebuilt is not None:
            shutil.copyfile(options.prebuilt, module)
            error = import_error(options.out)
            if error is None:
                print(f"uses {options.prebuilt}")
                return
            print(f"{options.prebuilt} cannot be used, so it is built here: {error}")
        shutil.copyfile(compile_extension(root, build, options.arch, options.jobs), module)
    error = import_error(options.out)
    if error is not None:
        raise SystemExit(f"built, but cannot be imported: {error}")
    print(f"built {module}: {module.stat().st_size / 2**20:.1f} MiB, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
