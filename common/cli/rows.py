"""The rows of a paper's tables: one run per config and seed, in the order they need each other.

``python -m common.cli.rows paper_cifs --on digits --seeds "0 1 2" -- --trainer.max_epochs 3``

A row whose run is finished, and whose config, referenced files, options and needed rows have not
changed since, is skipped. Other rows continue if one fails.
"""

import argparse
import difflib
import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from common.errors import ConfigurationError, UserError
from common.files import write_bytes_atomically, write_json_atomically
from common.limits import read_json, read_yaml
from common.results.reference import select

SAFE = re.compile(r"[A-Za-z0-9._/+-]+")
"""What names of experiments and paths of referenced files consist of."""


@dataclass(frozen=True)
class Row:
    """One run.

    Args:
        package: Of the paper.
        stem: Of the config.
        seed: Of the run.
        options: Further options of the command, in the order they were given.
    """

    package: str
    stem: str
    seed: int
    options: tuple[str, ...] = ()

    @property
    def config(self) -> Path:
        """Its file."""
        return Path(self.package, "configs", f"{self.stem}.yaml")

    @property
    def run(self) -> Path:
        """Its run directory."""
        return Path("runs", self.package, self.stem, f"seed{self.seed}")

    @property
    def result(self) -> Path:
        """What its test leaves."""
        return self.run / "results.json"

    @property
    def command(self) -> list[str]:
        """What makes it."""
        return [
            *(sys.executable, "-m", self.package, "reproduce", "--config", str(self.config)),
            *("--seed_everything", str(self.seed), "--trainer.enable_progress_bar", "false"),
            *self.options,
        ]

    @cached_property
    def settings(self) -> Any:
        """What the config says.

        Raises:
            ConfigurationError: If it cannot be read.
        """
        return read_yaml(self.config)

    @cached_property
    def parts(self) -> list[Path]:
        """The files that the config refers to.

        Raises:
            ConfigurationError: If one is missing, or has an unusual name.
        """
        texts = [text for _, text in _texts(self.settings, set())]
        names = dict.fromkeys(text for text in texts if text.endswith(".yaml"))
        for name in names:
            if not SAFE.fullmatch(name) or not (self.config.parent / name).is_file():
                raise ConfigurationError(
                    f"{self.config} refers to {name!r}, which is no file with a plain name; check "
                    "the path, which is relative to the config"
                )
        return [self.config.parent / name for name in names]

    @cached_property
    def needs(self) -> list["Row"]:
        """The rows whose weights this one starts or learns from: every ``experiment:`` it names."""
        named = {text for key, text in _texts(self.settings, set()) if key == "experiment"}
        named = {name for name in named if SAFE.fullmatch(name) and "/" not in name}
        found = [Row(self.package, stem, self.seed, self.options) for stem in sorted(named)]
        return [row for row in found if row.stem != self.stem and row.config.is_file()]

    def digest(self, above: frozenset[str] = frozenset()) -> str:
        """SHA-256 of all that decides whether a finished run is this row's.

        Raises:
            ConfigurationError: If rows need each other in a circle, or a file cannot be read.
        """
        if self.stem in above:
            raise ConfigurationError(
                f"the configs {', '.join(sorted(above))} need each other's weights in a circle; "
                "one of them has to start from scratch"
            )
        found = hashlib.sha256(json.dumps([self.seed, *self.options]).encode())
        for path in [self.config, *self.parts]:
            found.update(path.read_bytes())
        for row in self.needs:
            found.update(row.digest(above | {self.stem}).encode())
        return found.hexdigest()

    @property
    def is_finished(self) -> bool:
        """Whether there is a result, made with what the config says now."""
        try:
            stamp = read_json(self.run / "finished")
            return bool(stamp["row"] == self.digest()) and self.result.is_file()
        except (OSError, ValueError, KeyError, TypeError):
            return False


def _texts(value: Any, seen: set[int]) -> Iterator[tuple[str, str]]:
    """Every text in settings, with the key it stands under; in a list, none."""
    if id(value) in seen or not isinstance(value, Mapping | list):
        return
    seen.add(id(value))
    for key, part in value.items() if isinstance(value, Mapping) else (("", one) for one in value):
        if isinstance(part, str):
            yield key, part
        yield from _texts(part, seen)


def rows_of(package: str, on: str, seeds: Sequence[int], options: Sequence[str] = ()) -> list[Row]:
    """The rows of a selection and before them those they need, each once.

    Raises:
        ConfigurationError: If there is no such paper or config, or a name is unusual.
    """
    folder = Path(package, "configs")
    stems = [path.stem for path in sorted(folder.glob("*.yaml"))]
    if not stems:
        papers = sorted(path.parent.name for path in Path().glob("paper_*/configs"))
        raise ConfigurationError(
            f"there is no paper {package.removeprefix('paper_')!r} here; there are "
            f"{', '.join(name.removeprefix('paper_') for name in papers)}"
        )
    chosen = select(stems, on)
    if not chosen:
        near = difflib.get_close_matches(on, stems, n=3, cutoff=0.3) or stems[:3]
        raise ConfigurationError(
            f"no config in {folder} is meant by ON={on!r}, which takes exact names, patterns with "
            f"* and beginnings; the nearest of {len(stems)} are {', '.join(near)}"
        )
    if unusual := [stem for stem in chosen if not SAFE.fullmatch(stem)]:
        raise ConfigurationError(
            f"{folder / unusual[0]!s}.yaml has an unusual name; use letters, digits and ._+-"
        )
    ordered: dict[Row, None] = {}

    def add(row: Row) -> None:
        row.digest()  # finds circles
        for needed in row.needs:
            add(needed)
        ordered[row] = None

    for seed in seeds:
        for stem in chosen:
            add(Row(package, stem, seed, tuple(options)))
    return list(ordered)


class Runner:
    """Makes rows, several at a time.

    Args:
        rows: Each after those it needs.
        jobs: How many at a time.
    """

    def __init__(self, rows: Sequence[Row], jobs: int) -> None:
        self.rows = rows
        self.jobs = jobs
        self.failed: dict[Row, str] = {}
        self._running: set[subprocess.Popen[bytes]] = set()
        self._is_stopped = threading.Event()

    def __call__(self) -> bool:
        """Make what is not finished; whether all rows are finished then."""
        waiting = [row for row in self.rows if not row.is_finished]
        if done := len(self.rows) - len(waiting):
            print(f"{done} of {len(self.rows)} rows are finished", flush=True)
        under_way: dict[Future[str], Row] = {}
        with ThreadPoolExecutor(self.jobs) as pool:
            try:
                while waiting or under_way:
                    busy = {*waiting, *under_way.values()}
                    for row in [row for row in waiting if busy.isdisjoint(row.needs)]:
                        waiting.remove(row)
                        under_way[pool.submit(self._make, row)] = row
                    for ended in wait(under_way, return_when=FIRST_COMPLETED).done:
                        row = under_way.pop(ended)
                        if problem := ended.result():
                            self.failed[row] = problem
                            print(f"FAILED {row.stem} seed {row.seed}: {problem}", flush=True)
            except BaseException:
                self.stop()
                raise
        return not self.failed

    def stop(self) -> None:
        """End the rows that run; each saves what it has, as after any SIGTERM."""
        self._is_stopped.set()
        for process in list(self._running):
            process.terminate()

    def _make(self, row: Row) -> str:
        """Make one row; what went wrong, if anything."""
        lost = [needed.stem for needed in row.needs if needed in self.failed]
        if lost or self._is_stopped.is_set():
            return f"it needs {', '.join(lost)}" if lost else "stopped"
        (row.run / "finished").unlink(missing_ok=True)
        row.run.mkdir(parents=True, exist_ok=True)
        digest, begun = row.digest(), time.perf_counter()
        print(f"begin  {row.stem} seed {row.seed}", flush=True)
        with (row.run / "log.txt").open("wb") as log:
            process = subprocess.Popen(row.command, stdout=log, stderr=subprocess.STDOUT)
            self._running.add(process)
            if self._is_stopped.is_set():
                process.terminate()
            status = process.wait()
            self._running.discard(process)
        if status != 0 or not row.result.is_file():
            lines = (row.run / "log.txt").read_text(errors="replace").split("\n")
            last = next((line for line in reversed(lines) if line.strip()), f"status {status}")
            return f"{last.strip()} (whole log in {row.run / 'log.txt'})"
        write_json_atomically(row.run / "finished", {"row": digest, "options": list(row.options)})
        seconds = time.perf_counter() - begun
        print(f"end    {row.stem} seed {row.seed}  ({seconds:.0f} s)", flush=True)
        return ""


def publish(rows: Iterable[Row]) -> None:
    """Copy the results of finished rows beside the paper."""
    for row in rows:
        if row.is_finished:
            to = Path(row.package, "results", f"{row.stem}-seed{row.seed}.json")
            write_bytes_atomically(to, row.result.read_bytes())


def _cores() -> int:
    """Cores of this process; OMP_NUM_THREADS does not count."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m common.cli.rows", description=__doc__)
    parser.add_argument("package", help="for instance paper_cifs")
    parser.add_argument("--on", default="digits", help="exact stems, patterns or beginnings")
    parser.add_argument("--seeds", default="0 1 2", metavar='"0 1 2"')
    parser.add_argument(
        "--jobs", help="rows at a time; by default one per core on the digits, else one"
    )
    parser.add_argument("--plan", action="store_true", help="print what would run")
    parser.add_argument(
        "--commands", action="store_true", help="print a command per row that stands for itself"
    )
    parser.epilog = "What follows -- are options of every row."
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Make, plan or list rows; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    at = words.index("--") if "--" in words else len(words)
    given, options = _parser().parse_args(words[:at]), words[at + 1 :]
    try:
        seeds = [int(word) for word in given.seeds.replace(",", " ").split()]
        jobs = int(given.jobs) if given.jobs else _cores() if "digits" in given.on else 1
    except ValueError:
        print(
            f"error: --seeds {given.seeds!r} and --jobs {given.jobs!r} are numbers", file=sys.stderr
        )
        return 2
    try:
        rows = rows_of(given.package, given.on, seeds, options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if given.commands or given.plan:
        print(*_listed(rows, given.on, given.commands), sep="\n")
        return 0
    if "digits" in given.on:  # one row per core
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    is_complete = _run(Runner(rows, max(jobs, 1)))
    publish(rows)
    if not is_complete:
        print("some rows failed, see FAILED above; the same command tries them again", flush=True)
    return int(not is_complete)


def _listed(rows: Sequence[Row], on: str, is_alone: bool) -> list[str]:
    """What would run; or a command for each chosen row that also makes what the row needs."""
    if is_alone:
        chosen = select({row.stem for row in rows}, on)
        return [_alone(row) for row in rows if row.stem in chosen]
    states = ("finished" if row.is_finished else shlex.join(row.command) for row in rows)
    return [f"{r.stem} seed {r.seed}: {state}" for r, state in zip(rows, states, strict=True)]


def _run(runner: Runner) -> bool:
    """Run rows, which end with this process."""

    def stop(signum: int, _: Any) -> NoReturn:
        runner.stop()
        raise SystemExit(128 + signum)

    for signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(signum, stop)
    return runner()


def _alone(row: Row) -> str:
    """A command that makes the row, and before it those it needs, from any folder."""
    words = [
        *(sys.executable, "-m", "common.cli.rows", row.package),
        *("--on", row.stem, "--seeds", str(row.seed), "--jobs", "1"),
        *(["--", *row.options] if row.options else []),
    ]
    return f"cd {shlex.quote(str(Path.cwd()))} && {shlex.join(words)}"


if __name__ == "__main__":
    sys.exit(main())
