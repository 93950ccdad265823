"""The rows of a paper's tables: one run per config and seed, in the order they need each other.

``python -m common.cli.rows paper_cifs --on digits --seeds "0 1 2" -- --trainer.max_epochs 3``

A row whose run is finished, and whose config, referenced files, options and needed rows have not
changed since, is skipped. Other rows continue if one fails. The results of finished rows are copied
to ``runs/<package>/results``.
"""

import argparse
import difflib
import hashlib
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from common.cli.workers import ended_by, ending_with_this, start
from common.errors import ConfigurationError, UserError, output_may_close
from common.files import file_digest, write_bytes_atomically, write_json_atomically
from common.limits import read_json, read_yaml
from common.packages import CONFIGS, package_folder, papers, say_shadowed
from common.results.reference import meant_by
from common.results.selection import parse_seeds, select

SAFE = re.compile(r"[A-Za-z0-9._/+-]+")
"""Names of experiments and paths of referenced files."""


BASE = CONFIGS / "base.yaml"
"""What every experiment begins with."""


SMALL = {
    "OMP_NUM_THREADS": "1",  # one row per core
    # glibc keeps freed memory for the next pass. A tenth of the time goes into new pages otherwise.
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
    "MALLOC_TRIM_THRESHOLD_": str(2**28),
}
"""The environment of rows whose configs ask for a CPU: their networks are small."""


def results_folder(package: str) -> Path:
    """Where reproductions leave results, the analysis and figures of a paper."""
    return Path("runs", package, "results")


@dataclass(frozen=True)
class Row:
    """One run: a config of a paper's package, a seed, and further options of the command.

    Its properties raise a ConfigurationError if a file cannot be read or has an unusual name.
    """

    package: str
    stem: str
    seed: int
    options: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.stem} seed {self.seed}"

    @property
    def config(self) -> Path:
        """Its file."""
        return package_folder(self.package) / "configs" / f"{self.stem}.yaml"

    @property
    def run(self) -> Path:
        """Its run directory, in which its result is ``results.json``."""
        return Path("runs", self.package, self.stem, f"seed{self.seed}")

    @property
    def result(self) -> Path:
        """Where a copy of its result is collected, beside those of the other rows."""
        return results_folder(self.package) / f"{self.stem}-seed{self.seed}.json"

    @property
    def log(self) -> Path:
        """What its process prints."""
        return self.run / "log.txt"

    @property
    def words(self) -> list[str]:
        """The words after ``python -m`` and the package that make it."""
        return [
            *("reproduce", "--config", str(self.config), "--seed_everything", str(self.seed)),
            *("--trainer.enable_progress_bar", "false", *self.options),
        ]

    @cached_property
    def _texts(self) -> list[tuple[str, str]]:
        return list(_texts_in(read_yaml(self.config), set()))

    @cached_property
    def parts(self) -> list[Path]:
        """The files that the config refers to."""
        names = dict.fromkeys(text for _, text in self._texts if text.endswith(".yaml"))
        for name in names:
            if not SAFE.fullmatch(name) or not (self.config.parent / name).is_file():
                raise ConfigurationError(
                    f"{self.config} refers to {name!r}, which is no file with a plain name; check "
                    "the path, which is relative to the config"
                )
        return [self.config.parent / name for name in names]

    @property
    def is_on_cpu(self) -> bool:
        """Whether its config, or a file that this refers to, asks for a CPU."""
        texts = [
            *self._texts,
            *(t for part in self.parts for t in _texts_in(read_yaml(part), set())),
        ]
        return ("accelerator", "cpu") in texts

    @cached_property
    def needs(self) -> list["Row"]:
        """The rows whose weights this one starts or learns from: every ``experiment:`` it names."""
        named = {text for key, text in self._texts if key == "experiment"} - {self.stem}
        named = {name for name in named if SAFE.fullmatch(name) and "/" not in name}
        found = [Row(self.package, stem, self.seed, self.options) for stem in sorted(named)]
        return [row for row in found if row.config.is_file()]

    @cached_property
    def seconds(self) -> float:
        """How long its published run took, as far as that is known; else 0."""
        published = package_folder(self.package) / "results" / self.result.name
        try:
            origins = list(read_json(published)["provenance"].values())
            made = [cost for origin in origins if (cost := origin.get("training"))]
            training = max((m["seconds_per_epoch"] * m["epochs"] for m in made), default=0.0)
            return float(training + sum(origin["wall_time_s"] for origin in origins))
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return 0.0  # only the order of rows depends on it

    @property
    def overlays(self) -> list[Path]:
        """The files that options name, by path or as experiments and overlays are named."""
        found = []
        for value in (word.partition("=")[2] or word for word in self.options):
            named = (folder / f"{value}.yaml" for folder in (self.config.parent, CONFIGS))
            with suppress(OSError, ValueError):  # where it can be no path
                found += [path for path in (Path(value), *named) if path.is_file()][:1]
        return found

    @property
    def digest(self) -> str:
        """SHA-256 of all that decides whether a finished run is this row's."""
        found = hashlib.sha256(json.dumps([self.seed, *self.options]).encode())
        for path in [BASE, self.config, *self.parts, *self.overlays]:
            found.update(path.read_bytes())
        for row in self.needs:
            found.update(row.digest.encode())
        return found.hexdigest()

    @property
    def problem(self) -> str:
        """Why its run directory holds no finished result of this row; empty if it holds one."""
        if not self.run.is_dir():
            return "has not been run"
        try:
            record = read_json(self.run / "finished")
            made = record["row"], list(record["options"]), record["result"]
            result = file_digest(self.run / "results.json")
        except (OSError, ValueError, KeyError, TypeError):
            return "is not finished"
        if made[1] != list(self.options):
            return f"was made with ARGS={shlex.join(map(str, made[1]))!r}"
        if made[0] != self.digest:
            return "was made before its config, or something that this names, changed"
        return "" if made[2] == result else "has another results.json than it was made with"

    def finish(self, digest: str) -> None:
        """Record that its run directory holds its result; ``digest`` is from before it ran."""
        record = {
            "row": digest,
            "options": list(self.options),
            "result": file_digest(self.run / "results.json"),
        }
        write_json_atomically(self.run / "finished", record)


def _texts_in(value: Any, seen: set[int]) -> Iterator[tuple[str, str]]:
    """Every text in settings, with the key it stands under; in a list, none."""
    if id(value) in seen or not isinstance(value, Mapping | list):
        return
    seen.add(id(value))
    for key, part in value.items() if isinstance(value, Mapping) else (("", one) for one in value):
        if isinstance(part, str):
            yield key, part
        yield from _texts_in(part, seen)


def rows_of(package: str, on: str, seeds: Sequence[int], options: Sequence[str] = ()) -> list[Row]:
    """The rows of a selection and before them those they need, each once.

    Raises:
        ConfigurationError: If there is no such paper or config, a name is unusual, or rows need
            each other in a circle.
    """
    folder = package_folder(package) / "configs"
    stems = [path.stem for path in sorted(folder.glob("*.yaml"))]
    if not stems:
        raise ConfigurationError(f"{folder} has no configs; there are {', '.join(papers())}")
    on = meant_by(package, on)
    for word in on.split():
        if not select(stems, word):
            near = difflib.get_close_matches(word, stems, n=3, cutoff=0.3) or stems[:3]
            raise ConfigurationError(
                f"no config in {folder} is meant by ON={word!r}, which takes exact names, patterns "
                f"with * and beginnings; the nearest of {len(stems)} are {', '.join(near)}"
            )
    chosen = select(stems, on)
    if unusual := [stem for stem in chosen if not SAFE.fullmatch(stem)]:
        raise ConfigurationError(
            f"{folder / unusual[0]!s}.yaml has an unusual name; use letters, digits and ._+-"
        )
    open_ = [Row(package, stem, seed, tuple(options)) for seed in seeds for stem in chosen]
    graph: dict[Row, list[Row]] = {}
    for row in open_:  # grows while it is read
        if row not in graph:
            graph[row] = row.needs
            open_ += row.needs
    try:
        ordered = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        raise ConfigurationError(
            f"the configs {', '.join(sorted({row.stem for row in error.args[1]}))} need each "
            "other's weights in a circle; one of them has to start from scratch"
        ) from error
    for row in ordered:
        _ = row.parts  # finds files that are missing
    return ordered


def collect(package: str, options: Sequence[str] = ()) -> None:
    """Make its folder of results hold the results of all finished rows with these options.

    Those of other options, or made before a config changed, are removed from it.
    """
    wanted: dict[Path, Path] = {}
    for made in sorted(Path("runs", package).glob("*/seed*/results.json")):
        seed = made.parts[-2].removeprefix("seed")
        if not seed.isdecimal():
            continue
        row = Row(package, made.parts[-3], int(seed), tuple(options))
        try:
            if not row.problem:
                wanted[row.result] = made
        except (UserError, OSError):
            continue  # its config is not there any more, or damaged
    for path in set(results_folder(package).glob("*-seed*.json")) - set(wanted):
        path.unlink(missing_ok=True)
    for path, made in wanted.items():
        content = made.read_bytes()
        if not path.is_file() or path.read_bytes() != content:
            write_bytes_atomically(path, content)


def _seconds_left(rows: Sequence[Row]) -> dict[Row, float]:
    """How long each row and the longest chain of rows that need it take; needed ones come first."""
    after = dict.fromkeys(rows, 0.0)
    left = {}
    for row in reversed(rows):
        left[row] = row.seconds + after[row]
        for needed in row.needs:
            after[needed] = max(after[needed], left[row])
    return left


@dataclass(frozen=True)
class _Begun:
    """A row that is being made: its process, its digest from before, and when it began."""

    process: BaseProcess
    digest: str
    at: float


class Runner:
    """Makes rows, ``jobs`` at a time, each after those it needs, the longest first."""

    def __init__(self, rows: Sequence[Row], jobs: int) -> None:
        self.rows = rows
        self.jobs = jobs
        self.failed: dict[Row, str] = {}
        self._left = _seconds_left(rows)
        self._running: dict[Row, _Begun] = {}

    def __call__(self) -> bool:
        """Make what is not finished; whether all rows are finished then."""
        finished = {row for row in self.rows if not row.problem}
        if finished:
            print(f"{len(finished)} of {len(self.rows)} rows are finished", flush=True)
        waiting = TopologicalSorter({row: row.needs for row in self.rows})
        waiting.prepare()
        ready: list[Row] = []
        while waiting.is_active():
            ready += waiting.get_ready()
            ready.sort(key=self._left.__getitem__, reverse=True)
            if ready and len(self._running) < self.jobs:
                row = ready.pop(0)
                if row in finished or not self._begin(row):
                    waiting.done(row)
                continue
            wait([begun.process.sentinel for begun in self._running.values()])
            ended = [row for row, begun in self._running.items() if not begun.process.is_alive()]
            for row in ended:
                self._end(row)
                waiting.done(row)
        return not self.failed

    def _begin(self, row: Row) -> bool:
        """Start to make a row, unless one that it needs has failed."""
        if lost := [needed.stem for needed in row.needs if needed in self.failed]:
            self._fail(row, f"it needs {', '.join(lost)}")
            return False
        try:
            (row.run / "finished").unlink(missing_ok=True)
            row.run.mkdir(parents=True, exist_ok=True)
            digest = row.digest
        except (UserError, OSError) as error:  # a config or the disk went away meanwhile
            self._fail(row, str(error))
            return False
        print(f"begin  {row}", flush=True)
        begun = time.perf_counter()
        self._running[row] = _Begun(start(row.package, row.words, row.log), digest, begun)
        return True

    def _end(self, row: Row) -> None:
        """Record what became of a row whose process has ended."""
        begun = self._running.pop(row)
        status = begun.process.exitcode
        if status == 0 and (row.run / "results.json").is_file():
            try:
                row.finish(begun.digest)
            except (UserError, OSError) as error:  # a full disk, which other rows may not meet
                self._fail(row, str(error))
            else:
                print(f"end    {row}  ({time.perf_counter() - begun.at:.0f} s)", flush=True)
            return
        text = row.log.read_text(errors="replace") if row.log.is_file() else ""
        lines = (line.strip() for line in reversed(text.split("\n")))
        last = ended_by(status) or next(filter(None, lines), f"status {status}")
        self._fail(row, f"{last} (whole log in {row.log})")

    def _fail(self, row: Row, problem: str) -> None:
        self.failed[row] = problem
        print(f"FAILED {row}: {problem}", flush=True)


def parser_of(program: str, description: str | None) -> argparse.ArgumentParser:
    """A parser of commands about the rows of a paper."""
    parser = argparse.ArgumentParser(prog=f"python -m {program}", description=description)
    parser.add_argument("package", help="for instance paper_cifs")
    parser.add_argument("--on", default="digits", help="exact stems, patterns or beginnings")
    parser.add_argument("--seeds", default="0 1 2", metavar='"0 1 2"')
    return parser


def split_options(argv: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Words of a command (by default this one), and what follows ``--``: options of every row."""
    words = list(sys.argv[1:] if argv is None else argv)
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at + 1 :]


def _cores() -> int:
    has_affinity = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1


def _jobs(text: str | None, is_small: bool) -> int:
    """How many rows are made at a time: as told, else one per core if they ask for a CPU."""
    if not text:
        return _cores() if is_small else 1
    if not text.isdecimal() or len(text) > 6 or int(text) < 1:
        raise ConfigurationError(f"JOBS is {text[:80]!r}, expected how many rows to make at a time")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Make, plan or list rows; returns the exit status."""
    words, options = split_options(argv)
    parser = parser_of("common.cli.rows", __doc__)
    parser.epilog = "What follows -- are options of every row."
    parser.add_argument("--jobs", help="rows at a time; by default 1, but one per core on a CPU")
    parser.add_argument("--plan", action="store_true", help="print what would run")
    parser.add_argument("--commands", action="store_true", help="print a command for each row")
    parser.add_argument("--report", action="store_true", help="then analyse them and print tables")
    given = parser.parse_args(words)
    try:
        package_folder(given.package)  # is there
        say_shadowed("common", given.package)
        rows = rows_of(given.package, given.on, parse_seeds(given.seeds), options)
        is_small = all(row.is_on_cpu for row in rows)
        jobs = _jobs(given.jobs, is_small)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if given.commands:
        chosen = select({row.stem for row in rows}, meant_by(given.package, given.on))
        print(*(_alone(row) for row in rows if row.stem in chosen), sep="\n")
        return 0
    if given.plan:
        unmade = _print_plan(rows, jobs)
        if not all(row.stem.startswith("digits_") for row in unmade):  # these are a minute each
            _print_estimates(unmade)
        return 0
    threads = {"OMP_NUM_THREADS": str(max(1, _cores() // jobs))}  # else rows wait for each other
    for name, value in (SMALL if is_small else threads if jobs > 1 else {}).items():
        os.environ.setdefault(name, value)
    runner = Runner(rows, jobs)
    with ending_with_this():
        is_complete = runner()
        try:
            collect(given.package, options)
        except (UserError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        if given.report:
            selection = ["--on", given.on, "--seeds", given.seeds]
            is_complete &= _report(given.package, selection, options)
    if runner.failed:
        print("some rows failed, see FAILED above; the same command tries them again", flush=True)
    return int(not is_complete)


def _report(package: str, selection: Sequence[str], options: Sequence[str]) -> bool:
    """Analyse the results and print the tables; whether all went well."""
    tables = ["common.cli.reproduction", package, *selection, "--", *options]
    has_analysis = (package_folder(package) / "analysis.py").is_file()
    statuses = []
    for module, *words in [[f"{package}.analysis", *selection]] * has_analysis + [tables]:
        process = start(module, words)
        process.join()
        statuses.append(process.exitcode)
    return not any(statuses)


def _print_plan(rows: Sequence[Row], jobs: int) -> list[Row]:
    """One line per row, each after those it needs; returns those that would run."""
    width = max(len(str(row)) for row in rows)
    unmade = []
    for row in rows:
        problem = row.problem  # reads the result
        if problem:
            unmade.append(row)
            after = ", ".join(needed.stem for needed in row.needs)
            problem += f", after {after}" if after else ""
        print(f"{row!s:{width}}  {problem or 'is finished'}")
    print(f"\n{len(unmade)} of {len(rows)} rows would be made, {jobs} at a time", end="")
    words = [sys.executable, "-m", unmade[0].package, *unmade[0].words] if unmade else []
    print(f", the first by\n  {shlex.join(words)}" if unmade else "", flush=True)
    return unmade


def _print_estimates(rows: Sequence[Row]) -> None:
    """How long rows would take; a plan does not fail where that is unknown."""
    try:
        from common.cli.estimate import print_estimates  # torch and Lightning take seconds

        print_estimates(rows)
    except BrokenPipeError:
        raise
    except Exception as error:  # a paper's module can raise anything when it is imported
        print(f"their times are unknown: {error}")


def _alone(row: Row) -> str:
    """A command that makes the row, and before it those it needs, from any folder."""
    words = [
        *(sys.executable, "-m", "common.cli.rows", row.package),
        *("--on", row.stem, "--seeds", str(row.seed), "--jobs", "1"),
        *(["--", *row.options] if row.options else []),
    ]
    return f"cd {shlex.quote(str(Path.cwd()))} && {shlex.join(words)}"


if __name__ == "__main__":
    with output_may_close():
        sys.exit(main())
