"""``python -m benchmarks.gpu [--minutes 25]``: all that is measured on a GPU, in one command.

Writes ``benchmarks/results/gpu-<card>.json`` and ``.md``, the first after every measurement. The
same command continues where it was cut off, and tries again what failed; to start over, delete the
file. ``--device cpu --smoke`` runs everything once, very small, and writes into ``runs/gpu``.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.arguments import minutes
from benchmarks.gpu.journal import FAILED, Journal
from benchmarks.gpu.parts import ROOT, SHARES, Setting, run
from benchmarks.gpu.supervise import GRACE, supervise
from common.cli.workers import ending_with_this
from common.errors import ConfigurationError, UserError

MACHINE = (
    "import json, sys; from benchmarks.gpu.machine import described; "
    "print(json.dumps(described(sys.argv[1])))"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all parts; returns the exit status, 1 if a measurement failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", allow_abbrev=False)
    parser.add_argument("--minutes", type=minutes, default=25.0, help="after which it ends")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--smoke", action="store_true", help="everything once, very small")
    parser.add_argument("--output", type=Path, help="folder of the results")
    parser.add_argument("--runs", type=Path, default=Path("runs/gpu"), help="folder of runs")
    parser.add_argument("--part", choices=SHARES, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--call", help=argparse.SUPPRESS)
    parser.add_argument("--parent", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--journal", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.part is not None:
        setting = Setting(given.device, given.smoke, given.until, given.runs.absolute())
        threading.Thread(target=_end_with, args=(given.parent,), daemon=True).start()
        with ending_with_this():
            run(given.part, setting, Journal(given.journal), given.call)
        return 0
    try:
        return _supervised(given)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _supervised(given: argparse.Namespace) -> int:
    from benchmarks.gpu.table import write  # torch, which not every part needs
    from benchmarks.report import RESULTS

    begun, call = time.time(), datetime.now(UTC).isoformat(timespec="seconds")
    environment = _environment(given)
    machine = _machine(given.device, environment)
    folder = given.output or (given.runs if given.smoke else RESULTS)
    name = re.sub(r"[^a-z0-9]+", "-", machine["processor"].lower()).strip("-")
    journal = Journal((folder / f"gpu-{name}{'-smoke' if given.smoke else ''}.json").absolute())
    _check_versions(journal, machine)
    journal.describe(machine)
    print(
        f"{machine['processor']}, {given.minutes:g} minutes; figures go to {journal.path}",
        flush=True,
    )
    given.runs.mkdir(parents=True, exist_ok=True)
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, _end)
    total, share = 60.0 * given.minutes - GRACE - 5.0, 0.0
    for part, its in SHARES.items():
        share += its
        until = begun + total * share
        print(f"--- {part}, until {until - begun:.0f} s of {total:.0f} s", flush=True)
        words = [
            *(sys.executable, "-m", "benchmarks.gpu", "--part", part, "--call", call),
            *("--parent", str(os.getpid())),
            *("--until", str(until), "--journal", str(journal.path)),
            *("--device", given.device, "--runs", str(given.runs.absolute())),
            *(["--smoke"] if given.smoke else []),
        ]
        try:
            supervise(words, journal, part, call, until, environment)
        finally:
            text = write(journal)
    print(text)
    rows = [row for rows in journal.whole()["parts"].values() for row in rows.values()]
    failed = sum(row["state"] == FAILED for row in rows)
    print(f"{time.time() - begun:.0f} s; {len(rows)} measurements, {failed} failed: {journal.path}")
    return int(failed > 0)


def _check_versions(journal: Journal, machine: dict[str, Any]) -> None:
    """Refuse to put figures of other versions into one file."""
    before = journal.whole()["machine"] or machine
    for name, value in {**machine["versions"], "python": machine["python"]}.items():
        if (its := {**before["versions"], "python": before["python"]}.get(name)) != value:
            raise ConfigurationError(
                f"{journal.path} was measured with {name} {its}, and here is {value}; move it "
                "away, or choose another folder with --output FOLDER"
            )


def _end(signum: int, _: Any) -> NoReturn:
    print("stopped; the same command continues", file=sys.stderr, flush=True)
    raise SystemExit(128 + signum)


def _end_with(parent: int) -> None:
    """End the group of this process once the process that started it is gone."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os.killpg(0, signal.SIGTERM)
    time.sleep(GRACE)
    os.killpg(0, signal.SIGKILL)


def _environment(given: argparse.Namespace) -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    more = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    if given.smoke:  # compiling for a CPU takes minutes
        more["TORCH_COMPILE_DISABLE"] = "1"
    return os.environ | more


def _machine(device: str, environment: dict[str, str]) -> dict[str, Any]:
    """What is measured on, asked in another process: this one leaves the device alone."""
    done = subprocess.run(
        [sys.executable, "-c", MACHINE, device], env=environment, capture_output=True, text=True
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ConfigurationError(
            f"the device {device} cannot be used ({last}); --device cpu --smoke tries the command "
            "without one"
        )
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


if __name__ == "__main__":
    sys.exit(main())
