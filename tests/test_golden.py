"""Shipped checkpoints and scans give the numbers in tests/golden/ (written by benchmarks/golden.py)."""

import golden
import pytest
from safetensors.torch import load_file

from nfhelpers.kernels import backend_status


def _check(name, outputs, tolerance=1e-5):
    """Equal within `tolerance` of the largest entry."""
    wanted = load_file(golden.GOLDEN / f"{name}.safetensors")
    assert outputs.keys() == wanted.keys()
    for key, x in wanted.items():
        assert outputs[key].shape == x.shape, key
        error, scale = (outputs[key] - x).abs().max().item(), x.abs().max().item()
        assert error <= tolerance * scale, f"{key}: {error:.3g} of {scale:.3g}"


@pytest.mark.parametrize("name", golden.CHECKPOINTS)
def test_a_shipped_checkpoint_gives_its_golden_outputs(name):
    _check(name, golden.checkpoint_outputs(name))


@pytest.mark.parametrize("backend", golden.BACKENDS)
def test_a_scan_gives_its_golden_outputs_and_gradients(backend):
    if (status := backend_status()[backend]) != "ok":
        pytest.skip(status)
    _check(f"scan-{backend}", golden.scan_outputs(backend))
