"""Shared by all tests: the repository's folder, one thread a process, no NF_* variables of the shell,
float32 products that are exact."""

from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def repository():
    """The root of this repository."""
    return Path(__file__).resolve().parents[1]


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
