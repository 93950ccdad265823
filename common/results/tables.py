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
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from common.errors import ConfigurationError, UserError, output_may_close
from common.files import read_sealed_json
from common.packages import package_folder
from common.results.bases import Measured, Results, by_experiment
from common.results.cells import compact_of, sheet_of
from common.results.comparison import audit_notes, comparison_sheet
from common.results.front import write_front
from common.results.markdown import Sheet, escape, folded, is_current, write_readme
from common.results.ranking import RANKED, ranking_sheet
from common.results.reference import Reference, Row, read_reference
from common.results.selection import select
from common.results.store import load_results, read_costs

TERMINAL = 80
"""Columns of a terminal."""


# ------------------------------------------------------------------------------------------ tables


@dataclass
class Report:
    """The tables of one paper.

    Attributes:
        reference: What the paper printed.
        rows: Those asked for.
        results: Ours, by experiment.
        boards: Rankings of the tables that ask for one.
        sheets: Tables with results, each followed by its paired comparison.
        analysis: Verdicts and other tables of the paper's analysis.
        never: Tables whose rows have not been run.
        compact: For a terminal: the first table with results, and others with rows that those
            before lack.
        missing: Rows without a result, or with what is missing of it.
    """

    reference: Reference
    rows: list[Row]
    results: Results
    boards: list[Sheet] = field(default_factory=list)
    sheets: list[Sheet] = field(default_factory=list)
    analysis: list[Sheet] = field(default_factory=list)
    never: list[Sheet] = field(default_factory=list)
    compact: list[Table] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def legend(self) -> str:
        """What the columns mean, and where published numbers are from."""
        return _LEGEND + _sources(self.reference, self.rows)

    @property
    def strangers(self) -> list[str]:
        """Experiments with a result and without a row."""
        return sorted(set(self.results) - set(self.reference.rows))

    @property
    def markdown(self) -> str:
        """All of it, for a README."""
        number = sum(row.stem in self.results for row in self.rows)
        parts = [
            escape(self.legend),
            f"Rows run: {number} of {len(self.rows)} configured.",
            *([escape(RANKED)] if self.boards else []),
            *(sheet.to_markdown() for sheet in [*self.boards, *self.sheets, *self.analysis]),
        ]
        if self.never:
            title = f"Tables whose rows have not been run: {len(self.never)}"
            parts.append(folded(title, *(sheet.to_markdown() for sheet in self.never)))
        if self.missing:
            title = f"Rows without our result: {len(self.missing)} of {len(self.rows)}"
            parts.append(folded(title, escape(", ".join(self.missing))))
        if self.strangers:
            names = escape(", ".join(self.strangers))
            parts.append(f"Results without a row in reference.yaml: {names}")
        return "\n\n".join(parts)


_LEGEND = (
    "Percent. *published* is what was printed, with its source; *last* and *selected* are our last "
    "checkpoint and the one chosen by validation: mean ± sample standard deviation where there are "
    "several seeds, and where there is one, the 95 % interval that the finite number of test "
    "examples leaves (Wilson; another run of training may well fall outside it). An empty cell is "
    "a number that was not published or that we have not measured; a row without seeds has not "
    "been run, and its line *network*, if there is one, says what our network costs."
)


def render_table(
    package: str | Path,
    on: str = "",
    seeds: Sequence[int] | None = None,
    groups: Sequence[str] | None = None,
    folder: Path | None = None,
) -> Report:
    """Set a paper's numbers beside ours, one table per group.

    Args:
        package: Import name of the paper, or the folder of its ``reference.yaml``.
        on: Only these experiments, as in :func:`common.results.selection.select`.
        seeds: Only these seeds; ``None`` takes all there are.
        groups: Only these tables, by id; ``None`` takes all.
        folder: Where our results are; ``None`` takes the published ones.

    Raises:
        ConfigurationError: If a file is damaged, or no experiment starts with ``on``.
    """
    home = package if isinstance(package, Path) else package_folder(package)
    reference, folder = read_reference(home / "reference.yaml"), folder or home / "results"
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
    report = Report(reference, rows, results)
    shown: set[str] = set()
    told: set[str] = set()  # rows whose audits stand under a table
    for group in reference.groups:
        members = [row for row in reference.members(group) if row in rows]
        if not members or (groups is not None and group.id not in groups):
            continue
        sheet = sheet_of(group, members, results, costs)
        run = {row.stem for row in members} & set(results)
        if not run:
            report.never.append(sheet)
            continue
        sheet.notes += audit_notes([row for row in members if row.stem not in told], results)
        told |= run
        report.sheets.append(sheet)
        if group.ranked:
            report.boards.append(ranking_sheet(group, members, results))
        if not run <= shown:
            report.compact.append(compact_of(group, members, results))
            shown |= run
        baselines = {
            row.stem: reference.rows[stem]
            for row in members
            if (stem := row.baseline or group.baseline) is not None
        }
        if comparison := comparison_sheet(group, members, baselines, results):
            report.sheets.append(comparison)
    for path in sorted(folder.glob("analysis*.json")):
        report.analysis += _analysis(path)
    gaps = (_gap(row, results.get(row.stem, []), seeds, reference.checkpoints) for row in rows)
    report.missing = [gap for gap in gaps if gap]
    return report


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
    return f" Sources of published numbers: {sources}." if used else ""


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
    write_front(folder.parents[package.count(".")] / "README.md")
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
    readme = package_folder(package) / "README.md"
    print(f"{len(report.missing)} rows are not complete. All tables: {readme}")
    return 0


def print_tables(parts: Iterable[Table | str]) -> None:
    """Print tables and lines of text in the width of a terminal."""
    console = Console(width=TERMINAL)
    for part in parts:
        console.print(Text(part) if isinstance(part, str) else part)


if __name__ == "__main__":
    with output_may_close():
        sys.exit(main())
