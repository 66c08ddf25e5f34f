"""Shared by all tests: the repository's folder, a small autoencoder, one thread a process, no NF_*
variables of the shell, float32 products that are exact."""

from pathlib import Path

import pytest
import torch

from nfhelpers import images, run
from nfhelpers.models import (
    MambaDiffusionAutoencoder,
    MambaDiffusionAutoencoderConfig,
    fit_latent_statistics,
    second_phase,
)


@pytest.fixture(scope="session")
def repository():
    """The root of this repository."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def autoencoder():
    """A small `MambaDiffusionAutoencoder` of phase 2 whose decoder has moved away from zero."""
    torch.manual_seed(0)
    config = MambaDiffusionAutoencoderConfig(**run.load_settings("diffae_phase1", "smoke")["model"])
    first = MambaDiffusionAutoencoder(config)
    fit_latent_statistics(first, images.SparseFields(images.load_images("photos", "train", 16, limit=8)))
    model = second_phase(first).eval()
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return model


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    """NF_* of the caller's shell must not decide what a test sees."""
    for name in ("NF_PRESET", "NF_SCAN_BACKEND"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def exact_products():
    """`run.allow_tf32` of one test must not round what the next compares."""
    yield
    torch.backends.cuda.matmul.allow_tf32 = False


def pytest_configure():
    # Small tensors: threads only get in each other's way, the more so with several test processes.
    torch.set_num_threads(1)
