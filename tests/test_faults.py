"""What may befall a long run: signals, kills, full disks, damaged files, no memory, dead workers; and many
processes.

After each of them the run goes on to the curve of a run that nothing befell.
"""

import errno
import os
import random
import resource
import signal
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_train import (  # noqa: F401  fixtures
    TWO_PROCESSES,
    Killed,
    TinyField,
    assert_same_run,
    blank_figures,
    fields,
    gradients,
    recorded,
    reference,
    rows,
    settings,
    start_python,
    stopped,
    tiny,
    worker,
)

from nfhelpers import train
from nfhelpers.images import SparseFields, StreamedImages, load_images
from nfhelpers.train import fit


def wait_for_rows(process, folder, count):
    """Until the run's log has so many rows; fails if it has ended before."""
    log = folder / "log.csv"
    while not (log.exists() and len(log.read_text().splitlines()) > count):
        assert process.poll() is None, f"finished before row {count}"
        time.sleep(0.002)


def damage_files(folder, *names, damage=lambda content: content[: len(content) // 2]):
    for name in names:
        path = folder / name
        content = damage(path.read_bytes())
        path.unlink()  # not through the file: other names of it stay whole
        path.write_bytes(content)


# ------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize(("options", "target"), [((), 7), (("workers",), 18)])
def test_run_killed_at_any_step_resumes_to_the_same_curve(options, target, reference, tmp_path):  # noqa: F811
    process = worker(tmp_path, "slow", *options)
    wait_for_rows(process, tmp_path, target)
    process.kill()
    assert process.wait() == -signal.SIGKILL, f"finished before it could be killed at row {target}"
    TinyField.from_pretrained(tmp_path / "latest")
    result = fit(tiny(), fields(), settings(tmp_path))  # at once: its workers do not hold the folder
    assert result.steps == 24
    assert result.history["loss"] == pytest.approx(reference[1].history["loss"], abs=1e-6)
    assert_same_run(tmp_path, reference[0], 1e-6)


@pytest.mark.parametrize("call", [1, 10, 23, 38, 55])
def test_kill_at_any_moment_of_writing_loses_no_state(call, reference, tmp_path, monkeypatch):  # noqa: F811
    """Every rename, link and flush to disk is a moment to die at; about 60 are in the first 15 steps."""
    left = [call]

    def mortal(function):
        def wrapped(*arguments):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return function(*arguments)

        return wrapped

    with monkeypatch.context() as patch:
        for name in ("replace", "link", "fsync"):
            patch.setattr(os, name, mortal(getattr(os, name)))
        with pytest.raises(Killed):
            fit(tiny(), fields(), settings(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the state itself was whole at any moment
        assert fit(tiny(), fields(), settings(tmp_path)).steps == 24
    assert_same_run(tmp_path, reference[0])


def test_sigterm_saves_and_ends_with_143(reference, tmp_path, capfd):  # noqa: F811
    process = worker(tmp_path, "slow", "workers")
    wait_for_rows(process, tmp_path, 5)
    for _ in range(3):  # `timeout` sends it twice
        process.terminate()
        time.sleep(0.005)
    assert process.wait(timeout=60) == 143
    steps = len([row for row in rows(tmp_path) if row["loss"]])
    assert 5 <= steps < 24
    assert f"SIGTERM: stopped at step {steps}; the same call resumes" in capfd.readouterr().err
    state = load_file(tmp_path / "state.safetensors")
    assert int(state["optimizer.last.weight.step"]) == steps  # nothing is repeated
    average = TinyField.from_pretrained(tmp_path / "latest").last.weight
    assert torch.equal(average, state["ema.last.weight"])
    assert fit(tiny(), fields(), settings(tmp_path)).steps == 24
    assert_same_run(tmp_path, reference[0], 1e-6)


def test_sigterm_is_handled_while_training_only(tmp_path):
    handlers = []
    before = signal.getsignal(signal.SIGTERM)
    config = settings(tmp_path, epochs=1)
    fit(tiny(), fields(), config, callback=lambda *given: handlers.append(signal.getsignal(signal.SIGTERM)))
    assert handlers[0] not in (before, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGTERM) is before


def test_command_line_ends_with_143_after_sigterm(tmp_path, capfd):
    options = "train v1 --preset smoke --set train.epochs=500 --set data.train_images=16 --device cpu".split()
    options += ["--set", "train.visualise_every=500", "--output", str(tmp_path)]
    process = start_python("-m", "nfhelpers", *options)
    wait_for_rows(process, tmp_path, 3)
    process.terminate()
    assert process.wait(timeout=60) == 143
    assert "SIGTERM: stopped at step" in capfd.readouterr().err
    assert (tmp_path / "state.safetensors").exists() and (tmp_path / "latest").is_dir()


# ----------------------------------------------------------------------------------------- processes


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_two_processes_stop_after_the_same_step(number, reference, tmp_path):  # noqa: F811
    process = worker(tmp_path, "slow", launch=TWO_PROCESSES)
    wait_for_rows(process, tmp_path, 5)
    process.send_signal(number)
    assert process.wait(timeout=60) != 0
    steps = len([row for row in rows(tmp_path) if row["loss"]])
    assert int(load_file(tmp_path / "state.safetensors")["optimizer.last.weight.step"]) == steps < 24
    assert fit(tiny(), fields(), settings(tmp_path)).steps == 24  # one process goes on where two were
    assert_same_run(tmp_path, reference[0], 1e-5)


def test_command_line_on_two_processes_equals_one(tmp_path):
    """accelerate launch -m nfhelpers train ...: the same files and the same curves, validation included."""
    options = "-m nfhelpers train v1 --preset smoke --set train.epochs=2 --set data.train_images=24".split()
    options += "--set train.visualise_every=2 --set data.validation_images=3 --device cpu".split()
    for name, launch in (("one", []), ("two", TWO_PROCESSES)):
        process = start_python(*launch, *options, "--output", tmp_path / name)
        assert process.wait(timeout=120) == 0
    assert_same_run(tmp_path / "two", tmp_path / "one", 1e-6, 2e-5)
    files = [
        sorted(path.relative_to(tmp_path / name).as_posix() for path in (tmp_path / name).rglob("*"))
        for name in ("one", "two")
    ]
    assert len(files[0]) == len(files[1])
    assert [x for x in files[0] if "events" not in x] == [x for x in files[1] if "events" not in x]


def test_second_run_in_a_folder_is_refused_until_the_first_is_dead(reference, tmp_path):  # noqa: F811
    process = worker(tmp_path, "slow", "workers")
    wait_for_rows(process, tmp_path, 2)
    with pytest.raises(ValueError, match=rf"is in use by process {process.pid} on \S+; wait .*output_dir"):
        fit(tiny(), fields(), settings(tmp_path))
    process.kill()
    process.wait()
    assert fit(tiny(), fields(), settings(tmp_path)).steps == 24
    assert_same_run(tmp_path, reference[0], 1e-6)


def test_second_run_of_one_process_in_a_folder_is_refused(tmp_path):
    def again(epoch, history, field):
        with pytest.raises(ValueError, match="in use by another call of fit in this process"):
            fit(tiny(), fields(), settings(tmp_path))
        fit(tiny(), fields(), settings(tmp_path / "other", epochs=1))

    assert fit(tiny(), fields(), settings(tmp_path), callback=again).steps == 24
    assert fit(tiny(), fields(), settings(tmp_path)).steps == 24, "the folder is free afterwards"


def test_folder_that_cannot_be_locked_is_warned_of(tmp_path, monkeypatch):
    def fail(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(train.fcntl, "lockf", fail)
    with pytest.warns(UserWarning, match="cannot be locked .*No locks available"):
        assert fit(tiny(), fields(), settings(tmp_path, epochs=1)).steps == 4


class MortalFields(SparseFields):
    """A data loader worker that reads item 5 in epoch 2 is killed, as the system does when memory ends."""

    def __getitem__(self, index):
        if index == 5 and int(self._epoch) == 2 and torch.utils.data.get_worker_info():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def test_worker_that_dies_is_named_and_the_state_stays(reference, tmp_path):  # noqa: F811
    data = fields()
    data[0].__class__ = MortalFields
    with pytest.raises(ChildProcessError, match=r"step \d+: a data loader worker died.*num_workers than 1"):
        fit(tiny(), data, settings(tmp_path, num_workers=1))
    state = load_file(tmp_path / "state.safetensors")
    assert int(state["optimizer.last.weight.step"]) in (8, 9)  # of the second epoch or shortly after
    assert fit(tiny(), data, settings(tmp_path)).steps == 24  # num_workers=0, as the message says
    assert_same_run(tmp_path, reference[0])


def test_a_program_ends_after_an_error_in_a_worker(tmp_path, capfd):
    """Workers that an error keeps would be waited for: they ignore the signal to end."""
    assert worker(tmp_path, "broken", "workers").wait(timeout=60) == 1
    assert "KeyError: 'broken item'" in capfd.readouterr().err


# --------------------------------------------------------------------------------------------- files


def test_full_disk_leaves_the_old_state(stopped, reference):  # noqa: F811
    """No file may grow beyond half a state: the system refuses to write, as it does on a full disk."""
    files = {path.name for path in stopped.iterdir()}
    before = (stopped / "state.safetensors").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        with pytest.raises(OSError, match=r"step 6: .* the state takes \S+ KiB and .* free in .*make room"):
            fit(tiny(), fields(), settings(stopped))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (stopped / "state.safetensors").read_bytes() == before
    assert {path.name for path in stopped.iterdir()} == files  # nothing unfinished
    assert fit(tiny(), fields(), settings(stopped)).steps == 24
    assert_same_run(stopped, reference[0])


def test_failed_write_of_a_model_leaves_the_old_one(stopped, monkeypatch):  # noqa: F811
    before = (stopped / "latest" / "model.safetensors").read_bytes()

    def fail(self, folder):
        (Path(folder)).mkdir()
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(TinyField, "save_pretrained", fail)
    with pytest.raises(OSError, match=r"step 6: a file could not be written .*No space left"):
        fit(tiny(), fields(), settings(stopped))
    assert (stopped / "latest" / "model.safetensors").read_bytes() == before
    assert not list(stopped.glob(".*.tmp"))
    monkeypatch.undo()
    assert fit(tiny(), fields(), settings(stopped)).steps == 24


def flip_a_bit(content):
    """Of the last weight: the file is as long and as readable as before."""
    return content[:-2] + bytes([content[-2] ^ 1]) + content[-1:]


def change_the_step(content):
    return content.replace(b'\\"step\\": 4', b'\\"step\\": 3')


@pytest.mark.parametrize(
    "damage",
    [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"\0" * 64, flip_a_bit, change_the_step],
)
def test_damaged_state_falls_back_to_the_previous_one(damage, stopped, reference):  # noqa: F811
    whole = (stopped / "state.safetensors").read_bytes()
    damage_files(stopped, "state.safetensors", damage=damage)
    found = (stopped / "state.safetensors").read_bytes()
    assert found != whole
    with pytest.warns(UserWarning, match=r"state\.safetensors is damaged.*state\.previous.*, step 4"):
        assert fit(tiny(), fields(), settings(stopped)).steps == 24
    assert (stopped / "state.damaged.safetensors").read_bytes() == found
    assert_same_run(stopped, reference[0])


def test_damaged_state_without_a_previous_one_is_an_error_and_stays(stopped):  # noqa: F811
    (stopped / "state.previous.safetensors").unlink()
    damage_files(stopped, "state.safetensors")
    before, log = ((stopped / name).read_bytes() for name in ("state.safetensors", "log.csv"))
    with pytest.raises(ValueError, match=r"state\.safetensors is damaged.*there is no state\.previous"):
        fit(tiny(), fields(), settings(stopped))
    assert ((stopped / "state.safetensors").read_bytes(), (stopped / "log.csv").read_bytes()) == (before, log)


def test_both_states_damaged_is_an_error_that_names_both(stopped):  # noqa: F811
    damage_files(stopped, "state.safetensors", "state.previous.safetensors")
    with pytest.raises(ValueError, match=r"state\.safetensors is damaged.*state\.previous\S+ is damaged.*de"):
        fit(tiny(), fields(), settings(stopped))


def test_previous_state_is_the_one_before_the_last(tmp_path):
    def stop(epoch, history, field):
        raise KeyboardInterrupt

    fit(tiny(), fields(), settings(tmp_path, save_every_steps=None), callback=lambda *given: None)
    steps = [
        int(load_file(tmp_path / f"state{part}.safetensors")["optimizer.last.weight.step"])
        for part in ("", ".previous")
    ]
    assert steps == [24, 20]


def test_state_of_a_version_without_hash_is_resumed(stopped, reference):  # noqa: F811
    path = stopped / "state.safetensors"
    with safe_open(path, "pt") as file:
        details = file.metadata()["nfhelpers"]
    save_file(load_file(path), path, metadata={"nfhelpers": details})
    assert fit(tiny(), fields(), settings(stopped)).steps == 24
    assert_same_run(stopped, reference[0])


# -------------------------------------------------------------------------------------- streamed data


def test_streamed_data_are_resumed_in_the_same_order(tmp_path):
    """Images read from files by workers, interrupted in the middle of an epoch: the run in memory."""
    for index, image in enumerate(gradients(20, 0)):
        folder = tmp_path / "images"
        folder.mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / f"{index}.png")
    streamed = SparseFields(StreamedImages(folder, "train", 8), queries=0.5)
    whole = SparseFields(load_images(folder, "train", 8), queries=0.5)
    _, validation = fields()

    def leave(module, inputs):
        if len(module.seen) == 7:
            raise Killed

    config = settings(tmp_path / "streamed", epochs=3, num_workers=2)
    model = tiny()
    model.register_forward_pre_hook(leave)
    with pytest.raises(Killed):
        fit(model, (streamed, validation), config)
    assert fit(tiny(), (streamed, validation), config).steps == 12
    fit(tiny(), (whole, validation), settings(tmp_path / "whole", epochs=3))
    assert_same_run(tmp_path / "streamed", tmp_path / "whole")


# -------------------------------------------------------------------------------------------- memory


class Hungry(TinyField):
    """Has memory for two samples, from the third step on."""

    def forward(self, noisy_values, *field):
        if self.training and len(noisy_values) > 2 and len(self.seen) >= 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().forward(noisy_values, *field)


def hungry():
    torch.manual_seed(3)
    return Hungry()


def test_out_of_memory_waits_for_no_other_process(tmp_path, monkeypatch):
    together, stop = [], train._stop_together
    monkeypatch.setattr(train, "_stop_together", lambda run: together.append(run.progress.step) or stop(run))
    with pytest.raises(MemoryError, match="step 4"):
        fit(hungry(), fields(), settings(tmp_path, save_every_steps=None))
    assert together == [1, 2]  # not of step 3, which is read back when the error is there


def test_out_of_memory_names_need_and_remedies(tmp_path):
    config = settings(tmp_path)
    with pytest.raises(MemoryError) as caught:
        fit(hungry(), fields(), config)
    message = str(caught.value)
    assert message.startswith(
        "step 4: out of memory with 4 samples at once: CUDA out of memory. Tried to all"
    )
    for remedy in ("gradient_accumulation=2", "gradient_checkpointing=True", "batch_size", "bf16"):
        assert remedy in message
    assert int(load_file(tmp_path / "state.safetensors")["optimizer.last.weight.step"]) == 3


def test_first_remedy_and_halving_go_on_to_the_same_curve(reference, tmp_path, capsys):  # noqa: F811
    for folder in ("by hand", "halved"):
        with pytest.raises(MemoryError):
            fit(hungry(), fields(), settings(tmp_path / folder))
    fit(hungry(), fields(), settings(tmp_path / "by hand", gradient_accumulation=2))
    model = hungry()
    capsys.readouterr()
    assert fit(model, fields(), settings(tmp_path / "halved", halve_on_oom=True)).steps == 24
    assert "Going on with gradient_accumulation=2" in capsys.readouterr().err
    for folder in ("by hand", "halved"):
        assert_same_run(tmp_path / folder, reference[0], 1e-5)


def test_halving_lets_go_of_the_graphs(reference, recorded, tmp_path):  # noqa: F811
    config = settings(tmp_path, halve_on_oom=True, cuda_graphs=True)
    assert fit(hungry(), fields(), config).steps == 24
    assert all(len(graph.own[0]["query_values"]) == 4 for graph in recorded)  # of no smaller slice
    assert_same_run(tmp_path, reference[0], 1e-5)


def test_halving_ends_at_what_cannot_be_halved(tmp_path):
    class Starving(TinyField):
        def forward(self, *field):
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(MemoryError, match=r"out of memory with 1 samples at once") as caught:
        fit(Starving(), fields(), settings(tmp_path, halve_on_oom=True))
    assert "gradient_accumulation" not in str(caught.value), "a sample cannot be halved"


def test_memory_of_the_cpu_runs_out_as_that_of_a_gpu_does(tmp_path):
    class Greedy(TinyField):
        def forward(self, *field):
            return torch.empty(2**60, dtype=torch.uint8)

    with pytest.raises(MemoryError, match="out of memory with 4 samples at once.*gradient_accumulation=2"):
        fit(Greedy(), fields(), settings(tmp_path))


def test_other_runtime_errors_of_a_step_are_left_as_they_are(tmp_path):
    class Broken(TinyField):
        def forward(self, *field):
            raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="^something else$"):
        fit(Broken(), fields(), settings(tmp_path))


# --------------------------------------------------------------------------------------------- seeds


def test_nothing_depends_on_the_clock_or_on_global_generators(tmp_path, monkeypatch):
    for seed, folder in enumerate(("a", "b")):
        random.seed(seed)
        np.random.seed(seed)
        model = tiny(dropout=0.5)
        torch.manual_seed(seed)
        monkeypatch.setattr(time, "time", lambda seed=seed: 1e9 * (1 + seed))
        fit(model, fields(), settings(tmp_path / folder, epochs=2))
    assert_same_run(tmp_path / "a", tmp_path / "b")
