"""What may befall a long run: signals, kills, full disks, damaged files, a second run; and many processes.

After each of them the run goes on to the curve of a run that nothing befell.
"""

import os
import resource
import signal
import time

import pytest
import torch
from safetensors.torch import load_file
from test_train import (  # noqa: F401  fixtures
    TWO_PROCESSES,
    TinyField,
    assert_same_run,
    fields,
    reference,
    settings,
    start_python,
    steps_saved,
    stop,
    tiny,
    undrawn,
    worker,
)

from nfhelpers.train import fit


class Killed(BaseException):
    """Stands for SIGKILL: nothing in `fit` handles it."""


def wait_for_steps(process, folder, count):
    """Until so many steps are saved; fails if the process has ended before."""
    while steps_saved(folder) < count:
        assert process.poll() is None, f"ended before step {count}"
        time.sleep(0.005)


def weight_steps(folder):
    """Optimizer steps of the saved moments."""
    state = load_file(folder / "state.safetensors").items()
    return {int(x) for name, x in state if name.startswith("optimizer.") and name.endswith(".step")}


@pytest.mark.parametrize(("options", "target"), [((), 3), (("workers",), 10)])
def test_killed_run_holds_its_folder_until_then_and_goes_on(options, target, reference, tmp_path):  # noqa: F811
    process = worker(tmp_path, "slow", *options)
    wait_for_steps(process, tmp_path, target)
    with pytest.raises(ValueError):
        fit(tiny(), fields(), settings(tmp_path))
    process.kill()
    assert process.wait() == -signal.SIGKILL
    TinyField.from_pretrained(tmp_path / "latest")
    result = fit(tiny(), fields(), settings(tmp_path))  # at once: its workers do not hold the folder
    assert result.steps == 16 and result.history == reference[1].history
    assert_same_run(tmp_path, reference[0])


@pytest.mark.parametrize("call", [1, 10, 23, 38, 55, 90])
def test_kill_at_any_moment_of_writing_loses_no_state(call, reference, tmp_path, monkeypatch):  # noqa: F811
    """Every rename and every flush to disk is a moment to die at; each step saves."""
    left = [call]

    def mortal(function):
        def wrapped(*arguments):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return function(*arguments)

        return wrapped

    with monkeypatch.context() as patch:
        for name in ("replace", "fsync"):
            patch.setattr(os, name, mortal(getattr(os, name)))
        with pytest.raises(Killed):
            fit(tiny(), fields(), settings(tmp_path, save_interval=0.0))
    if (tmp_path / "latest").exists():
        TinyField.from_pretrained(tmp_path / "latest")
    assert fit(tiny(), fields(), settings(tmp_path)).steps == 16
    assert_same_run(tmp_path, reference[0])


def test_sigterm_saves_and_ends_with_143(reference, tmp_path):  # noqa: F811
    process = worker(tmp_path, "slow", "workers")
    wait_for_steps(process, tmp_path, 2)
    for _ in range(3):  # `timeout` sends it twice
        process.terminate()
        time.sleep(0.005)
    assert process.wait(timeout=60) == 143
    steps = steps_saved(tmp_path)
    assert 2 <= steps < 16 and weight_steps(tmp_path) == {steps}
    average = TinyField.from_pretrained(tmp_path / "latest").last.weight
    assert torch.equal(average, load_file(tmp_path / "state.safetensors")["ema.last.weight"])
    assert fit(tiny(), fields(), settings(tmp_path)).steps == 16
    assert_same_run(tmp_path, reference[0])


def test_ctrl_c_stops_after_the_step(reference, tmp_path):  # noqa: F811
    """Wherever it comes: in a forward pass; while the run is evaluated; a third one at once."""
    handler = signal.getsignal(signal.SIGINT)

    def interrupt_at(count, training, times=1):
        model, calls = tiny(), []

        def interrupt(module, inputs):
            calls.extend([1] * (module.training == training))
            if len(calls) == count:
                for _ in range(times):
                    signal.raise_signal(signal.SIGINT)

        model.register_forward_pre_hook(interrupt)
        return model

    first = fit(interrupt_at(3, True), fields(), settings(tmp_path))
    assert (first.interrupted, first.steps) == (True, 3)
    second = fit(interrupt_at(1, False), fields(), settings(tmp_path))
    assert (second.interrupted, second.steps, second.history["val_step"]) == (True, 8, [8])
    with pytest.raises(KeyboardInterrupt):
        fit(interrupt_at(2, True, times=3), fields(), settings(tmp_path))
    assert steps_saved(tmp_path) == 8 and signal.getsignal(signal.SIGINT) is handler
    assert fit(tiny(), fields(), settings(tmp_path)).steps == 16
    assert_same_run(tmp_path, reference[0])


def test_two_processes_stop_after_the_same_step(reference, tmp_path):  # noqa: F811
    process = worker(tmp_path, "slow", launch=TWO_PROCESSES)
    wait_for_steps(process, tmp_path, 2)
    process.terminate()
    assert process.wait(timeout=60) != 0
    assert weight_steps(tmp_path) == {steps_saved(tmp_path)} and steps_saved(tmp_path) < 16
    assert fit(tiny(), fields(), settings(tmp_path)).steps == 16  # one process goes on where two were
    assert_same_run(tmp_path, reference[0], 1e-5)


def test_second_run_of_one_process_in_a_folder_is_refused(tmp_path):
    def again(epoch, history, made):
        with pytest.raises(ValueError):
            fit(tiny(), fields(), settings(tmp_path))
        assert fit(tiny(), fields(), settings(tmp_path / "other", epochs=1)).steps == 4

    assert fit(tiny(), fields(), settings(tmp_path, epochs=1), callback=again).steps == 4
    assert fit(tiny(), fields(), settings(tmp_path, epochs=2)).steps == 8, "the folder is free afterwards"


def test_a_program_ends_after_an_error_in_a_worker(tmp_path):
    """Workers that an error keeps would be waited for: they ignore the signal to end."""
    assert worker(tmp_path, "broken", "workers").wait(timeout=60) == 1


@pytest.fixture
def stopped(tmp_path):
    """A folder with a run that stopped after its first epoch."""
    fit(tiny(), fields(), settings(tmp_path), callback=stop)
    return tmp_path


def test_full_disk_leaves_the_old_state(stopped, reference):  # noqa: F811
    """No file may grow beyond half a state: the system refuses to write, as it does on a full disk."""
    files = {path.name for path in stopped.iterdir()}
    before = (stopped / "state.safetensors").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        with pytest.raises(Exception):  # noqa: B017  safetensors has an exception of its own
            fit(tiny(), fields(), settings(stopped))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (stopped / "state.safetensors").read_bytes() == before
    assert {path.name for path in stopped.iterdir()} - files <= {"best", "training.png"}  # nothing unfinished
    assert fit(tiny(), fields(), settings(stopped)).steps == 16
    assert_same_run(stopped, reference[0])


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"\0" * 64])
def test_damaged_state_is_named_and_stays(damage, stopped):
    path = stopped / "state.safetensors"
    content = damage(path.read_bytes())
    path.write_bytes(content)
    with pytest.raises(ValueError, match="state.safetensors"):
        fit(tiny(), fields(), settings(stopped))
    assert path.read_bytes() == content
