"""The parts of ``make gpu``: the measurements of one, each on its own, one after the other."""

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from benchmarks.failures import BEGUN, NO_TIME, reason
from benchmarks.gpu.journal import (
    DONE,
    FAILED,
    RUNNING,
    SKIPPED,
    START,
    UNFINISHED,
    Journal,
    Row,
)

ROOT = Path(__file__).parents[2]

SHARES = {
    "tests": 0.08,
    "papers": 0.16,
    "steps": 0.40,
    "autoattack": 0.16,
    "waits": 0.04,
    "epochs": 0.16,
}
"""The parts in their order, and which share of the time each may take. A part that needs less
leaves the rest to those after it. Each is a module here with a function ``measurements``."""

BROKEN = 3
"""Exit status of a process whose device has stopped working."""


@dataclass(frozen=True)
class Setting:
    """What is measured: on which device, small or not, until when, and where runs are kept."""

    device: str
    is_smoke: bool
    until: float
    runs: Path

    @property
    def seconds_left(self) -> float:
        """Until the time of the part is over."""
        return self.until - time.time()


Measurements = Mapping[str, Callable[[], Row]]


def run(
    part: str,
    setting: Setting,
    journal: Journal,
    call: str,
    todo: Callable[[Setting], Measurements] | None = None,
) -> None:
    """Make the measurements of a part that are missing, and write each down as it comes.

    One that fails stops no other. Those that failed in an earlier call, or did not fit in, are
    tried again. A device that has stopped working ends the process, see :data:`BROKEN`.
    """
    try:
        listed = (todo or import_module(f"benchmarks.gpu.{part}").measurements)(setting)
    except Exception as error:  # of a package that is not there, for instance
        journal.put(part, START, {"state": FAILED, "call": call, "summary": reason(error)})
        print(f"[{part}] failed: {reason(error)}", flush=True)
        return
    journal.expect(part, listed)
    for number, (key, measure) in enumerate(listed.items(), 1):
        before = journal.rows(part)[key]
        title = f"[{part} {number} of {len(listed)}] {key}"
        if before["state"] == DONE or before.get("call") == call:
            print(f"{title}: {before['state']} before", flush=True)
            continue
        if setting.seconds_left < 3.0:
            print(f"{title}: {NO_TIME}", flush=True)
            if before["state"] != UNFINISHED:
                journal.put(part, key, {"state": SKIPPED, "call": call, "summary": NO_TIME})
            continue
        print(f"{title}, {setting.seconds_left:.0f} s left", flush=True)
        journal.put(part, key, before | {"state": RUNNING, "call": call, "summary": BEGUN})
        begun = time.time()
        try:
            found = {"state": DONE, "call": call, **measure()}
            journal.put(part, key, found | {"seconds": round(time.time() - begun, 1)})
        except Exception as error:
            found = {"state": FAILED, "call": call, "summary": reason(error)}
            journal.put(part, key, found)
        print(f"  {found['state']}: {found['summary']}", flush=True)
        _check_device(part, key, journal, call)


def _check_device(part: str, key: str, journal: Journal, call: str) -> None:
    """Errors of kernels come late, and no call on the device works after one."""
    torch = sys.modules.get("torch")  # not every part needs it
    if torch is None or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        row = {"state": FAILED, "call": call, "summary": f"the device failed: {reason(error)}"}
        journal.put(part, key, row)
        raise SystemExit(BROKEN) from None
