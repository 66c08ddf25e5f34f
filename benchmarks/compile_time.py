"""How long Triton compiles the scan, and into what. No GPU is needed: the code is for an H100 or H200.

    python benchmarks/compile_time.py

One row a kernel that is compiled anew while a model of four directions and 320 channels trains in bfloat16 on
three numbers of tokens, evaluates many images and draws one at two sizes, and its influence on a pixel is
differentiated: seconds, registers, stack for what they do not hold, instructions of the longest loop.
"""

import collections
import contextlib
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from nfhelpers.kernels import triton_parts, triton_scan

SESSION = [  # images, tokens, with gradient, dtype
    (48, 1024, True, torch.bfloat16), (48, 717, True, torch.bfloat16), (48, 461, True, torch.bfloat16),
    (256, 1024, False, torch.bfloat16), (1, 1024, False, torch.bfloat16), (1, 16384, False, torch.bfloat16),
    (1, 1025, True, torch.bfloat16), (48, 1024, True, torch.float32),
]  # fmt: skip
DIRECTIONS, CHANNELS, STATES = 4, 320, 16


class OfflineDriver:
    """Stands in for the driver of a GPU; nothing is launched."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


class Compiled:
    """A kernel whose launch compiles it, where that was not done before."""

    def __init__(self, kernel, rows):
        self.kernel, self.rows = kernel, rows

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            start = time.perf_counter()
            compiled = self.kernel.warmup(*args, grid=grid, **kwargs)
            seconds = round(time.perf_counter() - start, 2)
            if all(compiled is not row["compiled"] for row in self.rows):
                self.rows.append({"kernel": self.kernel.fn.__name__, "s": seconds, "compiled": compiled})

        return launch


def disassembled(cubin):
    """{registers, bytes on the stack, instructions of the longest loop} of a compiled kernel."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    tool = shutil.which("cuobjdump") or str(tools / "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = [
            subprocess.run([tool, o, file.name], capture_output=True, text=True)
            for o in ("-res-usage", "-sass")
        ]
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", run[0].stdout + run[0].stderr).groups()
    jumps = re.findall(r"/\*([0-9a-f]{4,5})\*/[^;]*\bBRA\b[^;]*0x([0-9a-f]+) ?;", run[1].stdout)
    loops = [(int(at, 16) - int(to, 16)) // 16 for at, to in jumps]
    return {"registers": int(registers), "stack, B": int(stack), "loop": max([0, *loops])}


def scan(images, tokens, gradient, dtype):
    """One call of the kernels, backward too where there is a gradient."""
    shape = images, DIRECTIONS, tokens
    u, delta = (
        torch.empty(images, 1, tokens, CHANNELS, dtype=dtype),
        torch.empty(*shape, CHANNELS, dtype=dtype),
    )
    B, C = (torch.empty(images, DIRECTIONS, 1, tokens, STATES, dtype=dtype) for _ in "BC")
    A, D, bias = (torch.empty(DIRECTIONS, CHANNELS) for _ in range(3))  # tied decays
    order = torch.arange(tokens).expand(1, DIRECTIONS, tokens)
    given = (u, delta, A, B, C, D, None, bias, None, order, None, 0, True, True)
    y, _, states = triton_scan.forward(*given, gradient)
    if gradient:
        triton_scan.backward(y, None, states, *given)


def main():
    rows = []
    driver.set_active(OfflineDriver())
    for module in (triton_scan, triton_parts):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            setattr(module, name, Compiled(getattr(module, name), rows))
    torch.cuda.device_of = lambda x: contextlib.nullcontext()
    multiprocessors = 132 // 2  # a CPU counts as two
    triton_scan.WARPS = tuple(multiprocessors * warps for warps in triton_scan.WARPS)
    with tempfile.TemporaryDirectory() as folder:
        triton.knobs.cache.dir = folder
        for call in SESSION:
            scan(*call)
    for row in rows:
        row |= disassembled(row.pop("compiled").asm["cubin"])
    table = pd.DataFrame(rows)
    print(table.to_string(index=False))
    count = collections.Counter(table.kernel)
    print(f"{table.s.sum():.1f} s:", ", ".join(f"{n} x {name}" for name, n in count.items()))


if __name__ == "__main__":
    main()
