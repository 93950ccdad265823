"""Accidents from outside: folders that go, memory that ends, workers that die."""

import multiprocessing
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

from common.classifier import RobustClassifier
from common.cli.messages import one_line

slow = pytest.mark.slow
ORIGINAL = {name: getattr(RobustClassifier, name) for name in ("training_step", "test_step")}


def before(monkeypatch, method: str, accident, call_number: int = 1) -> None:
    """Have something happen before a method of the classifier runs."""
    calls = []

    def wrapped(self, *args, **kwargs):
        calls.append(method)
        if len(calls) == call_number:
            accident()
        return ORIGINAL[method](self, *args, **kwargs)

    monkeypatch.setattr(RobustClassifier, method, wrapped)


RUN = Path("runs/paper_tiny/tiny/seed0")


def removed() -> None:
    shutil.rmtree(RUN.rename("gone"), ignore_errors=True)  # a logger may be writing there


def moved() -> None:
    RUN.rename("elsewhere")


def emptied() -> None:
    for path in RUN.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(
    ("command", "method", "call_number", "accident", "logger"),
    [
        ("fit", "training_step", 2, removed, "true"),
        ("reproduce", "test_step", 1, removed, "false"),
        pytest.param("fit", "training_step", 2, moved, "false", marks=slow),
        pytest.param("reproduce", "training_step", 3, removed, "false", marks=slow),
        pytest.param("reproduce", "training_step", 3, emptied, "false", marks=slow),
        pytest.param("reproduce", "test_step", 1, moved, "true", marks=slow),
        pytest.param("reproduce", "test_step", 2, removed, "true", marks=slow),
        pytest.param("reproduce", "test_step", 2, emptied, "false", marks=slow),
    ],
)
def test_a_run_directory_that_goes_away_is_noticed(
    tiny, monkeypatch, command, method, call_number, accident, logger
) -> None:
    before(monkeypatch, method, accident, call_number)
    given = ("--trainer.logger", logger)
    line = tiny.refused(command, *given)
    if accident is not emptied:
        assert f"{RUN} was deleted or moved while this run wrote to it" in line
    assert "run the same command again" in line.lower()
    if accident is removed:
        before(monkeypatch, method, lambda: None)
        tiny(command, *given)


def test_what_ends_before_its_result_is_no_success(tiny, monkeypatch) -> None:
    assert "last.ckpt is not there" in tiny.refused("fit", "--trainer.max_time", "00:00:00:00")
    for status, step in ((0, 3), (3, 1)):  # the second run resumes the first
        before(monkeypatch, "training_step", lambda status=status: sys.exit(status), step)
        line = tiny.refused("reproduce")
        assert f"ended the process (exit status {status}) before the run was finished" in line
        assert tiny.checkpoint()["global_step"] == 2


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "Lower data."),
        (RuntimeError("could not create a primitive"), "out of memory (could not create"),
        (RuntimeError("unable to mmap 160 bytes from file </t>: Cannot allocate memory (12)"),
         "Lower data.batch_size"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(h)`"),
         "Lower data.batch_size"),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), "Lower data.batch_size"),
        (RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nTrace\n"
                      "RuntimeError: std::bad_alloc"), "out of memory (RuntimeError: std::bad_al"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory"),
        (OSError(12, "Cannot allocate memory"), "Lower data.batch_size"),
        (MemoryError("no room"), "out of memory (no room)"),
        (OSError(28, "No space left on device", "events.out"), "Make room and run the same"),
        (RuntimeError("DataLoader worker (pid 77) is killed by signal: Killed. "),
         "Lower data.num_workers"),
        (RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"), "Lower data.num_wor"),
        (RuntimeError("DataLoader worker (pid 5) is killed by signal: Bus error. It is possible "
                      "that dataloader's workers are out of shared memory."), "no shared memory"),
        (PermissionError(13, "Permission denied", "logs/x"), "logs/x: Permission denied"),
        (ModuleNotFoundError("No module named 'psutil'"), "No module named 'psutil'; install"),
    ],
)  # fmt: skip
def test_what_runs_out_or_is_missing_is_one_line(error, expected) -> None:
    assert expected in one_line(error)


def raising(error: Exception) -> None:
    raise error


def test_errors_of_a_step_are_one_line_if_a_user_can_mend_them(tiny, monkeypatch) -> None:
    before(monkeypatch, "training_step", lambda: raising(PermissionError(13, "no", "logs/x")))
    assert "logs/x: no" in tiny.refused("fit")
    before(monkeypatch, "training_step", lambda: raising(RuntimeError("shapes do not fit")))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        tiny("fit")


def test_a_killed_worker_is_one_line(tiny, monkeypatch) -> None:
    def kill() -> None:
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)

    before(monkeypatch, "training_step", kill, 2)
    given = ("--data.num_workers", "1", "--data.batch_size", "4")
    line = tiny.refused("fit", *given)
    assert "a process that fetches batches was lost" in line
