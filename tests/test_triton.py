"""The Triton kernel against the float64 reference.

Runs on a CUDA device, or on any machine in Triton's interpreter, in a process of its own:
``TRITON_INTERPRET=1 pytest tests/test_triton.py``.
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("needs a CUDA device or TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")

from nfhelpers.kernels.reference import selective_scan_reference  # noqa: E402
from nfhelpers.kernels.triton_scan import selective_scan_triton  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"

# batch, dim, length, state, groups; what is given; what is constant
CASES = {
    "plain": dict(shape=(2, 6, 13, 4, 1)),
    "zero-order hold": dict(shape=(2, 6, 13, 4, 1), discretization="zoh", last=True),
    "groups": dict(shape=(2, 6, 17, 4, 2), extras="D z delta_bias", delta_softplus=True, last=True),
    "odd state, odd width": dict(
        shape=(1, 5, 9, 3, 1), extras="D z delta_bias", discretization="zoh", last=True
    ),
    "one step, one state": dict(shape=(2, 5, 1, 1, 1), extras="D delta_bias", delta_softplus=True),
    "constant B and C": dict(shape=(2, 5, 9, 4, 1), extras="D z", constant="B C", delta_softplus=True),
    "constant B, zero-order hold": dict(shape=(2, 5, 9, 4, 1), constant="B", discretization="zoh"),
    "chunk boundary": dict(shape=(1, 3, 16, 4, 1), extras="z", last=True),
    "several blocks": dict(shape=(1, 40, 9, 4, 1), extras="D z delta_bias", delta_softplus=True),
}


def draw(shape, extras="", constant=""):
    """Random arguments in float32; u is a transposed view, as the models pass it."""
    batch, dim, length, state, groups = shape
    generator = torch.Generator().manual_seed(0)
    rand = lambda *s: torch.randn(*s, generator=generator)  # noqa: E731
    A = -2 * torch.rand(dim, state, generator=generator)
    A[0, 0] = 0  # the limit the zero-order hold divides by
    arguments = {
        "u": rand(batch, length, dim).transpose(1, 2),
        "delta": rand(batch, dim, length).abs(),
        "A": A,
    }
    for name in ("B", "C"):
        arguments[name] = rand(dim, state) if name in constant.split() else rand(batch, groups, state, length)
    shapes = {"D": (dim,), "z": (batch, dim, length), "delta_bias": (dim,)}
    return arguments | {name: rand(*shapes[name]) for name in extras.split()}


def outputs_and_gradients(scan, arguments, dtype, device, last, **options):
    """Output, last state, and the gradient of every argument under fixed cotangents."""
    leaves = {k: v.to(device, dtype).detach().requires_grad_() for k, v in arguments.items()}
    out, state = scan(**leaves, return_last_state=True, **options)
    generator = torch.Generator().manual_seed(1)
    loss = (out * torch.randn(out.shape, generator=generator).to(out)).sum()
    if last:
        loss = loss + (state * torch.randn(state.shape, generator=generator).to(state)).sum()
    loss.backward()
    return {"out": out, "state": state} | {f"d{k}": v.grad for k, v in leaves.items()}


def relative_error(x, y):
    return ((x.double().cpu() - y).norm() / y.norm().clamp(min=1e-9)).item()


@pytest.mark.parametrize("name", CASES)
def test_matches_float64_reference(name):
    case = dict(CASES[name])
    last = case.pop("last", False)
    arguments = draw(case.pop("shape"), case.pop("extras", ""), case.pop("constant", ""))
    truth = outputs_and_gradients(selective_scan_reference, arguments, torch.float64, "cpu", last, **case)
    result = outputs_and_gradients(selective_scan_triton, arguments, torch.float32, DEVICE, last, **case)
    for key, value in truth.items():
        assert relative_error(result[key].detach(), value.detach()) < 1e-5, key


def test_backward_is_bitwise_repeatable():
    arguments = draw((2, 40, 19, 4, 1), "D z delta_bias")
    runs = [
        outputs_and_gradients(
            selective_scan_triton, arguments, torch.float32, DEVICE, True, delta_softplus=True
        )
        for _ in range(2)
    ]
    assert all(torch.equal(runs[0][key], runs[1][key]) for key in runs[0])


@pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter has no bfloat16")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_keep_a_float32_state(dtype):
    arguments = draw((2, 64, 300, 16, 1), "z")
    arguments = {k: v if k == "A" else v.to(dtype).float() for k, v in arguments.items()}

    def run(scan, low, device):
        leaves = {k: v.to(device, torch.float32 if k == "A" else low) for k, v in arguments.items()}
        return scan(**leaves)

    truth = run(selective_scan_reference, torch.float64, "cpu")
    assert relative_error(run(selective_scan_triton, dtype, DEVICE), truth) < 2e-2
