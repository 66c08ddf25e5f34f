"""Shared by all tests: the repository's folder, one thread a process, no NF_* variables of the shell."""

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


def pytest_configure():
    # Small tensors: threads only get in each other's way, the more so with several test processes.
    torch.set_num_threads(1)
