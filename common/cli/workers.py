"""Runs modules like ``python -m``, in processes that need not import torch and Lightning again.

Each process is forked from one server that has imported them and done nothing else, so it begins as
a new interpreter would: nothing is seeded, no device is in use. Where it ends, however it ends, the
others are not concerned.
"""

import multiprocessing
import os
import runpy
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.forkserver import _forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

# Fork is safe here because the server only imports. No parallel region and no backward pass has
# run in it, so OpenMP and autograd have no threads that a child would wait for, and OpenBLAS stops
# its own around a fork. Other systems than Linux have libraries (Accelerate) that forbid fork;
# processes are new interpreters there.
if sys.platform == "linux":
    _CONTEXT = multiprocessing.get_context("forkserver")
    _CONTEXT.set_forkserver_preload(["common.cli.apart", "common.cli.preloaded"])
else:
    _CONTEXT = multiprocessing.get_context("spawn")


def start(module: str, words: Sequence[str], log: Path | None = None) -> BaseProcess:
    """Start ``python -m module *words``; its output goes to ``log``, or to that of this process.

    With a log it has a process group of its own, so that Ctrl-C reaches this process alone.
    """
    process = _CONTEXT.Process(target=_run, args=(module, list(words), log))
    process.start()
    return process


@contextmanager
def ending_with_this() -> Iterator[None]:
    """Within the block, a signal to end this process ends those that it has started, and waits.

    A row saves what it has, as after any SIGTERM; at a second signal it ends at once. What follows
    within a second is the same one: make passes on what its process group has received too.
    """
    heard: list[float] = []

    def end(signum: int, _: Any) -> None:
        heard.append(time.monotonic())
        if len(heard) == 1 or heard[-1] - heard[0] > 1.0:
            raise SystemExit(128 + signum)

    for signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        if signal.getsignal(signum) != signal.SIG_IGN:  # as under nohup
            signal.signal(signum, end)
    try:
        yield
    except BaseException:
        try:
            _terminate()
            for process in multiprocessing.active_children():
                process.join()
        finally:
            _terminate()
        raise
    finally:
        # Waits for the server, whose times are among those of children only then.
        _forkserver._stop()  # type: ignore[attr-defined]


def ended_by(status: int | None) -> str:
    """What ended a process that did not end itself; empty if it did."""
    if status is None or status >= 0:
        return ""
    known = {number.value: number.name for number in signal.Signals}
    name = known.get(-status, f"signal {-status}")
    cause = ", as the system does when memory is full" if name == "SIGKILL" else ""
    return f"the process was ended by {name}{cause}"


def _terminate() -> None:
    for process in multiprocessing.active_children():
        process.terminate()


def _run(module: str, words: list[str], log: Path | None) -> None:
    """In the child: what ``python -m`` does."""
    if log is not None:
        os.setpgid(0, 0)
        with log.open("wb") as file:
            os.dup2(file.fileno(), sys.stdout.fileno())
            os.dup2(file.fileno(), sys.stderr.fileno())
    if (torch := sys.modules.get("torch")) and torch.cuda._is_in_bad_fork():
        raise SystemExit("a library used CUDA as it was imported, so that no row can use it")
    sys.argv[1:] = words
    runpy.run_module(module, run_name="__main__", alter_sys=True)
