"""Runs every part in a process of its own, which may crash, hang or be ended without the others."""

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress

from benchmarks.failures import NO_TIME
from benchmarks.gpu.journal import FAILED, RUNNING, SKIPPED, START, Journal

GRACE = 10.0
"""Seconds between asking a process to end and ending it."""


def supervise(
    command: Sequence[str],
    journal: Journal,
    part: str,
    call: str,
    until: float,
    environment: dict[str, str] | None = None,
) -> None:
    """Run a part until its time is over, again after a crash, without what crashed."""
    while True:
        before = _measured(journal, part, call)
        status = _finished(command, until, environment)
        for key, row in journal.rows(part).items():
            if row["state"] != RUNNING:
                continue
            changed = {"state": SKIPPED, "summary": NO_TIME}
            if status is not None:
                changed = {"state": FAILED, "summary": f"the process ended with status {status}"}
            print(f"  {changed['state']}: {changed['summary']} ({key})", flush=True)
            journal.put(part, key, row | changed)
        if status is None and not journal.rows(part):  # it had no time to say what there is
            row = {"state": SKIPPED, "call": call, "summary": NO_TIME}
            journal.put(part, START, row)
            print(f"  {SKIPPED}: {NO_TIME}", flush=True)
        if status in (None, 0):
            return
        if _measured(journal, part, call) == before:
            summary = f"the process ended with status {status}, see what it printed"
            journal.put(part, START, {"state": FAILED, "call": call, "summary": summary})
            return


def _measured(journal: Journal, part: str, call: str) -> int:
    return sum(row.get("call") == call for row in journal.rows(part).values())


def _finished(
    command: Sequence[str], until: float, environment: dict[str, str] | None
) -> int | None:
    """The exit status of a command; ``None`` if it was ended because the time was over."""
    if time.time() >= until:
        return None
    # In a group of its own, so that what it starts can be ended with it.
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, env=environment, process_group=0
    )  # fmt: skip
    try:
        return child.wait(timeout=until - time.time())
    except subprocess.TimeoutExpired:
        return None
    finally:
        if child.poll() is None:
            child.terminate()
            with suppress(subprocess.TimeoutExpired):
                child.wait(timeout=GRACE)
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
