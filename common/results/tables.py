"""The printed numbers of a paper beside ours: Markdown for its README, rich for a terminal.

A paper's ``reference.yaml`` lists its tables (``groups``) and experiments (``rows``, by stem)::

    title: ...
    groups:
      - {id: E1, title: Main comparison, metrics: [{key: clean_acc, title: Natural}, ...]}
    rows:
      cifar10_resnet18_plain:
        {groups: [E1], label: plain, source: R0, last: {clean_acc: 84.56}, selected: {}}

Numbers are percentages, lists of repeats, or null for "not found". A group with a ``baseline``
gets a second table, in which its other rows are compared with that one example by example.
:mod:`common.results.reference` describes all keys.

``python -m common.results.tables paper_x`` prints the tables and rewrites the README's.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from common.errors import ConfigurationError, UserError
from common.files import read_sealed_json
from common.packages import package_folder
from common.results.bases import Measured, by_experiment
from common.results.cells import compact_of, sheet_of
from common.results.comparison import comparison_sheet
from common.results.front import write_front
from common.results.markdown import Sheet, escape, folded, is_current, write_readme
from common.results.reference import Reference, Row, read_reference, select
from common.results.store import load_results, read_costs

TERMINAL = 80
"""Columns of a terminal."""


# ------------------------------------------------------------------------------------------ tables


@dataclass
class Report:
    """The tables of one paper."""

    markdown: str
    compact: Table | None
    """The first table with results, for a terminal."""
    missing: list[str]
    """Rows without a result, or with what is missing of it."""


_LEGEND = (
    "Percent. *published* is what was printed, with its source; *last* and *selected* are our last "
    "checkpoint and the one chosen by validation: mean ± sample standard deviation where there are "
    "several seeds, and where there is one, the 95 % interval that the finite number of test "
    "examples leaves (Wilson; another run of training may well fall outside it). An empty cell is "
    "a number that was not published or that we have not measured; a row without seeds has not "
    "been run, and its line *network*, if there is one, says what our network costs."
)


def render_table(
    package: str,
    on: str = "",
    seeds: Sequence[int] | None = None,
    groups: Sequence[str] | None = None,
) -> Report:
    """Set a paper's numbers beside ours, one table per group.

    Args:
        package: Import name of the paper.
        on: Only these experiments, as in :func:`common.results.reference.select`.
        seeds: Only these seeds; ``None`` takes all there are.
        groups: Only these tables, by id; ``None`` takes all.

    Raises:
        ConfigurationError: If a file is damaged, or no experiment starts with ``on``.
    """
    folder = package_folder(package)
    reference = read_reference(folder / "reference.yaml")
    chosen = select(reference.rows, on)
    rows = [row for stem, row in reference.rows.items() if stem in chosen]
    if not rows:
        known = sorted({stem.partition("_")[0] for stem in reference.rows})
        raise ConfigurationError(
            f"no experiment of {package} is meant by {on!r}; they start with {', '.join(known)}"
        )
    results = by_experiment(
        result
        for result in load_results(folder / "results")
        if seeds is None or result["seed"] in seeds
    )
    costs = read_costs(folder / "results")
    sheets, never, compact = [], [], None
    for group in reference.groups:
        members = [row for row in reference.members(group) if row in rows]
        if not members or (groups is not None and group.id not in groups):
            continue
        sheet = sheet_of(group, members, results, costs)
        if not any(row.stem in results for row in members):
            never.append(sheet.to_markdown())
            continue
        sheets.append(sheet)
        compact = compact or compact_of(group, members, results)
        baselines = {
            row.stem: reference.rows[stem]
            for row in members
            if (stem := row.baseline or group.baseline) is not None
        }
        if comparison := comparison_sheet(group, members, baselines, results):
            sheets.append(comparison)
    for path in sorted((folder / "results").glob("analysis*.json")):
        sheets += _analysis(path)
    gaps = (_gap(row, results.get(row.stem, []), seeds, reference.checkpoints) for row in rows)
    missing = [gap for gap in gaps if gap]
    run = sum(row.stem in results for row in rows)
    parts = [
        _LEGEND + _sources(reference, rows),
        f"Rows run: {run} of {len(rows)} configured.",
        *(sheet.to_markdown() for sheet in sheets),
    ]
    if never:
        parts.append(folded(f"Tables whose rows have not been run: {len(never)}", *never))
    if missing:
        summary = f"Rows without our result: {len(missing)} of {len(rows)}"
        parts.append(folded(summary, escape(", ".join(missing))))
    if strangers := sorted(set(results) - set(reference.rows)):
        names = escape(", ".join(strangers))
        parts.append(f"Results without a row in reference.yaml: {names}")
    return Report("\n\n".join(parts), compact, missing)


def _sources(reference: Reference, rows: Sequence[Row]) -> str:
    """What the tags of published numbers mean, as a sentence."""
    used = dict.fromkeys(
        source
        for row in rows
        for group in reference.groups
        for metric in group.metrics
        if group.id in row.groups
        and (row.printed("last", metric.key) or row.printed("selected", metric.key))
        and (source := metric.source or row.source)
    )
    sources = "; ".join(f"[{tag}] {reference.tags.get(tag, tag)}" for tag in used)
    return f" Sources of published numbers: {escape(sources)}." if used else ""


def _gap(
    row: Row, found: Sequence[Measured], seeds: Sequence[int] | None, checkpoints: Sequence[str]
) -> str:
    """The row with what is missing of it; empty when nothing is."""
    if not found:
        return f"`{row.stem}`"
    known: dict[int, list[str]] = {}
    for measured in found:
        known.setdefault(measured.seed, []).append(measured.label)
    lacking = [f"seed {seed}" for seed in sorted(set(seeds or ()) - set(known))] + [
        f"{label} of seed {seed}"
        for seed, labels in known.items()
        for label in checkpoints
        if label not in labels
    ]
    return f"`{row.stem}` ({', '.join(lacking)})" if lacking else ""


def _analysis(path: Path) -> list[Sheet]:
    """The tables that the paper's analysis left in ``analysis[_<what>].json``, verdicts first."""
    what = path.stem.removeprefix("analysis").replace("_", " ")
    suffix = f"{what and ','}{what}"
    try:
        report = read_sealed_json(path)
        report["claims"]  # a file of an older format has none, or others
        return [
            Sheet(f"{t['title']}{suffix}", t["note"], t["header"], t["lines"])
            for t in report["tables"]
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"{path} cannot be read ({type(error).__name__}: {error}); delete it and run the "
            "analysis again"
        ) from error


# ------------------------------------------------------------------------------------ command line


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables of papers and write them into their READMEs; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m common.results.tables",
        description="Print the tables of papers and write them into their READMEs.",
    )
    parser.add_argument("packages", nargs="+", metavar="package", help="for instance paper_cifs")
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing; exit with 1 if a README is out of date, or if an experiment asked "
        "for with --on has no result",
    )
    parser.add_argument("--on", default="", metavar="PREFIX", help="only these experiments")
    parser.add_argument("--seeds", metavar='"0 1 2"', help="only these seeds")
    arguments = parser.parse_args(argv)
    try:
        seeds = _seeds(arguments.seeds)
        return max(
            _report(package, arguments.on, seeds, arguments.check) for package in arguments.packages
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _seeds(text: str | None) -> list[int] | None:
    try:
        return None if text is None else [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise ConfigurationError(f'--seeds is {text!r}, expected numbers as in "0 1 2"') from None


def _report(package: str, on: str, seeds: list[int] | None, check: bool) -> int:
    shown = render_table(package, on, seeds)
    folder = package_folder(package)
    console = Console(width=TERMINAL)
    console.print(shown.compact or Text(f"{package}: no row has been run"))
    console.print(
        Text(
            f"{len(shown.missing)} rows are not complete. All tables: {package}/README.md; "
            f"outcomes of every image: {package}/results"
        )
    )
    readme = folder / "README.md"
    is_whole = not on and seeds is None  # a README holds everything, whatever is printed now
    markdown = (shown if is_whole else render_table(package)).markdown
    if not check:
        write_readme(readme, markdown)
        write_front(folder.parent / "README.md")
        return 0
    if is_out_of_date := not is_current(readme, markdown):
        print(f"{readme} is out of date: run make results")
    return int(is_out_of_date or bool(on and shown.missing))


if __name__ == "__main__":
    sys.exit(main())
