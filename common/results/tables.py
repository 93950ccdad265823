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

``python -m common.results.tables paper_x`` rewrites those of the README from the published results.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from common.errors import ConfigurationError, UserError, output_may_close
from common.files import read_sealed_json
from common.packages import package_folder
from common.results.bases import Measured, by_experiment
from common.results.cells import compact_of, sheet_of
from common.results.comparison import comparison_sheet
from common.results.front import write_front
from common.results.markdown import Sheet, escape, folded, is_current, write_readme
from common.results.reference import Reference, Row, read_reference
from common.results.selection import select
from common.results.store import load_results, read_costs

TERMINAL = 80
"""Columns of a terminal."""


# ------------------------------------------------------------------------------------------ tables


@dataclass
class Report:
    """The tables of one paper."""

    markdown: str
    compact: list[Table]
    """For a terminal: the first table with results, and others with rows that those before lack."""
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
    folder: Path | None = None,
) -> Report:
    """Set a paper's numbers beside ours, one table per group.

    Args:
        package: Import name of the paper.
        on: Only these experiments, as in :func:`common.results.selection.select`.
        seeds: Only these seeds; ``None`` takes all there are.
        groups: Only these tables, by id; ``None`` takes all.
        folder: Where our results are; ``None`` takes the published ones.

    Raises:
        ConfigurationError: If a file is damaged, or no experiment starts with ``on``.
    """
    reference = read_reference(package_folder(package) / "reference.yaml")
    folder = folder or package_folder(package) / "results"
    chosen = select(reference.rows, on)
    rows = [row for stem, row in reference.rows.items() if stem in chosen]
    if not rows:
        known = sorted({stem.partition("_")[0] for stem in reference.rows})
        raise ConfigurationError(
            f"no experiment of {package} is meant by {on!r}; they start with {', '.join(known)}"
        )
    results = by_experiment(
        result for result in load_results(folder) if seeds is None or result["seed"] in seeds
    )
    costs = read_costs(folder)
    sheets: list[Sheet] = []
    never: list[str] = []
    compact: list[Table] = []
    shown: set[str] = set()
    for group in reference.groups:
        members = [row for row in reference.members(group) if row in rows]
        if not members or (groups is not None and group.id not in groups):
            continue
        sheet = sheet_of(group, members, results, costs)
        run = {row.stem for row in members} & set(results)
        if not run:
            never.append(sheet.to_markdown())
            continue
        sheets.append(sheet)
        if not run <= shown:
            compact.append(compact_of(group, members, results))
            shown |= run
        baselines = {
            row.stem: reference.rows[stem]
            for row in members
            if (stem := row.baseline or group.baseline) is not None
        }
        if comparison := comparison_sheet(group, members, baselines, results):
            sheets.append(comparison)
    for path in sorted(folder.glob("analysis*.json")):
        sheets += _analysis(path)
    gaps = (_gap(row, results.get(row.stem, []), seeds, reference.checkpoints) for row in rows)
    missing = [gap for gap in gaps if gap]
    number = sum(row.stem in results for row in rows)
    parts = [
        _LEGEND + _sources(reference, rows),
        f"Rows run: {number} of {len(rows)} configured.",
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


# ----------------------------------------------------------------------------------------- READMEs


def render_readmes(package: str) -> Report:
    """Write the tables of the published results into the READMEs of a paper and of the project."""
    report, folder = render_table(package), package_folder(package)
    write_readme(folder / "README.md", report.markdown)
    write_front(folder.parent / "README.md")
    return report


def main(argv: Sequence[str] | None = None) -> int:
    """Render the READMEs of papers from their published results; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m common.results.tables",
        description="Render the READMEs of papers from their published results.",
    )
    parser.add_argument("packages", nargs="+", metavar="package", help="for instance paper_cifs")
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing; exit with 1 if a README is out of date",
    )
    arguments = parser.parse_args(argv)
    try:
        return max([_render(package, arguments.check) for package in arguments.packages])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _render(package: str, check: bool) -> int:
    if check:
        readme = package_folder(package) / "README.md"
        is_old = not is_current(readme, render_table(package).markdown)
        if is_old:
            print(f"{readme} is out of date: run make results")
        return int(is_old)
    report = render_readmes(package)
    print_tables(report.compact[:1] or [f"{package}: no row has been run"])
    print(f"{len(report.missing)} rows are not complete. All tables: {package}/README.md")
    return 0


def print_tables(parts: Iterable[Table | str]) -> None:
    """Print tables and lines of text in the width of a terminal."""
    console = Console(width=TERMINAL)
    for part in parts:
        console.print(Text(part) if isinstance(part, str) else part)


if __name__ == "__main__":
    with output_may_close():
        sys.exit(main())
