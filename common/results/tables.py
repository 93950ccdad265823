"""The printed numbers of a paper beside ours: Markdown for its README, rich for a terminal.

A paper's ``reference.yaml`` lists its tables (``groups``) and experiments (``rows``, by stem)::

    title: ...
    groups:
      - {id: E1, title: Main comparison, metrics: [{key: clean_acc, title: Natural}, ...]}
    rows:
      cifar10_resnet18_plain:
        {groups: [E1], label: plain, source: R0, last: {clean_acc: 84.56}, selected: {}}

Numbers are percentages, lists of repeats, or null for "not found". A column may be the weighted
mean of others, ``{key: w, title: W, mean_of: {clean_acc: 0.5, pgd20: 0.5}}``. A group with a
``baseline`` (the stem of a row) gets a second table, in which its other rows are compared with that
one example by example, on the metrics of a list ``compare`` or else on those of the group that
allow it; a row may have a ``baseline`` of its own. Beside ``groups`` and ``rows``, ``checkpoints:
[last]`` says that a paper selects none.

``python -m common.results.tables paper_x`` prints the tables and rewrites the README's.
"""

import argparse
import importlib.util
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from common.errors import ConfigurationError, UserError
from common.files import read_sealed_json
from common.results.columns import Columns
from common.results.comparison import audit_notes, comparison_sheet
from common.results.outcomes import metrics_of
from common.results.readme import BEGIN, END, is_current, write_readme
from common.results.reference import UNITS, Group, Metric, Reference, Row, read_reference, select
from common.results.schema import Result
from common.results.sheets import Sheet, escape
from common.results.store import LABELS, load_results, read_costs

__all__ = [
    "BEGIN",
    "END",
    "Reference",
    "Report",
    "is_current",
    "main",
    "package_folder",
    "read_reference",
    "render_table",
    "write_readme",
]


def package_folder(package: str) -> Path:
    """The folder of a paper's package.

    Raises:
        ConfigurationError: If there is no such package.
    """
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ConfigurationError(
            f"there is no package {package!r}; name one of the paper_* folders, and run from the "
            "folder that holds them"
        )
    return Path(next(iter(spec.submodule_search_locations)))


# ------------------------------------------------------------------------------------------ tables


@dataclass
class Report:
    """The tables of one paper.

    Args:
        markdown: All of them as Markdown.
        tables: The same for a terminal.
        missing: Rows without a result, or with what is missing of it.
    """

    markdown: str
    tables: list[Table]
    missing: list[str]


_Results = Mapping[str, list[Result]]  # by experiment
_Costs = Mapping[str, Mapping[str, float]]  # by experiment and metric
_Cells = dict[str, dict[str, dict[str, str]]]  # by experiment, metric and kind
_Lines = list[tuple[Row, list[str]]]

_KINDS = {
    "paper": "paper",
    "last": "last",
    "difference": "last − paper",
    "paper selected": "paper, selected",
    "selected": "selected",
    "network": "network",
}

_LEGEND = (
    "Percent. *paper* is what was printed; *last* and *selected* are our last checkpoint and the "
    "one chosen by validation: mean ± sample standard deviation where there are several seeds, and "
    "where there is one, the 95 % interval that the finite number of test examples leaves (Wilson; "
    "another run of training may well fall outside it). An empty cell is a number that was not "
    "published or that we have not measured; a row without seeds has not been run, and its line "
    "*network*, if there is one, says what our network costs."
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
    results: dict[str, list[Result]] = {}
    for result in load_results(folder / "results"):
        if seeds is None or result["seed"] in seeds:
            results.setdefault(result["experiment"], []).append(result)
    costs = read_costs(folder / "results")
    sheets = []
    for group in reference.groups:
        members = [row for row in rows if group.id in row.groups]
        if members and (groups is None or group.id in groups):
            sheets.append(_sheet(group, members, results, costs))
            baselines = {
                row.stem: reference.rows[stem]
                for row in members
                if (stem := row.baseline or group.baseline) is not None
            }
            if comparison := comparison_sheet(group, members, baselines, results):
                sheets.append(comparison)
    for path in sorted((folder / "results").glob("analysis*.json")):
        sheets += _analysis(path)
    gaps = (_gap(row, results, seeds, reference.checkpoints) for row in rows)
    missing = [gap for gap in gaps if gap]
    parts = [_LEGEND, *(sheet.to_markdown() for sheet in sheets)]
    if missing:
        parts.append(
            f"<details><summary>Rows without our result: {len(missing)} of {len(rows)}</summary>"
            f"\n\n{escape(', '.join(missing))}\n\n</details>"
        )
    if strangers := sorted(set(results) - set(reference.rows)):
        names = escape(", ".join(strangers))
        parts.append(f"Results without a row in reference.yaml: {names}")
    return Report("\n\n".join(parts), [sheet.to_rich() for sheet in sheets], missing)


def _sheet(group: Group, rows: list[Row], results: _Results, costs: _Costs) -> Sheet:
    columns = Columns(group, [row.stem for row in rows], results)
    cells: _Cells = {
        row.stem: {
            metric.key: _cell(
                row, metric, columns, results, costs.get(row.stem, {}).get(metric.key)
            )
            for metric in group.metrics
        }
        for row in rows
    }
    misfits = {stem for left_out in columns.left_out.values() for stem in left_out}
    known = [
        row
        for row in rows
        if row.stem in misfits or any(any(cell.values()) for cell in cells[row.stem].values())
    ]
    titles, notes = _titles(group, known, results, columns)
    notes += columns.notes()
    notes += audit_notes(known, results)
    if unknown := [f"`{row.stem}`" for row in rows if row not in known]:
        notes.insert(0, f"Neither published nor measured yet: {', '.join(unknown)}")
    if not known:
        return Sheet(group.title, group.note, notes=notes)
    arrange = _wide if group.layout == "wide" else _stacked
    header, lines = arrange(group, known, cells, titles)
    for row, line in lines:
        line.append(", ".join(str(result["seed"]) for result in results.get(row.stem, [])))
    return Sheet(group.title, group.note, [*header, "seeds"], [line for _, line in lines], notes)


def _cell(
    row: Row, metric: Metric, columns: Columns, results: _Results, cost: float | None
) -> dict[str, str]:
    """What there is to say about one metric of one experiment, by kind.

    A cost belongs to the network: it stands beside our results, or by itself where there are none.
    """
    key, scale = metric.key, UNITS[metric.unit]
    ours: dict[str, list[float]] = {label: [] for label in LABELS}
    ends: dict[str, list[float]] = {label: [] for label in LABELS}
    for result in results.get(row.stem, []):
        for label in LABELS:
            checkpoint = result["checkpoints"].get(label)
            value = None if checkpoint is None else columns.value(row.stem, metric, checkpoint)
            if checkpoint is not None and value is not None:
                ours[label].append(scale * value)
                ends[label] = [scale * end for end in checkpoint["intervals"].get(key, [])]
    if cost is not None and not any(ours.values()):
        for label in LABELS:
            has_result = any(label in result["checkpoints"] for result in results.get(row.stem, []))
            ours[label] = [scale * cost] if has_result else []
    printed = row.printed("last", key)
    difference = ""
    if printed and ours["last"]:
        difference = f"{statistics.fmean(ours['last']) - statistics.fmean(printed):+.2f}"
    return {
        "paper": _repeats(printed),
        "last": _spread(ours["last"], ends["last"]),
        "difference": difference,
        "paper selected": _repeats(row.printed("selected", key)),
        "selected": _spread(ours["selected"], ends["selected"]),
        "network": "" if cost is None or row.stem in results else _repeats([scale * cost]),
    }


def _repeats(values: list[float]) -> str:
    return " / ".join(f"{value:.2f}" for value in values)


def _spread(values: list[float], ends: list[float]) -> str:
    """Mean and sample standard deviation, or a single value and the ends of its interval."""
    if len(values) > 1 and len(set(values)) == 1 and not ends:
        return _repeats(values[:1])  # a count, the same for every seed
    if len(values) > 1:
        return f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f}"
    if values and ends:
        return f"{values[0]:.2f} [{ends[0]:.1f}, {ends[1]:.1f}]"
    return _repeats(values)


def _wide(
    group: Group, rows: list[Row], cells: _Cells, titles: Mapping[str, str]
) -> tuple[list[str], _Lines]:
    columns = [
        (metric.key, kind)
        for metric in group.metrics
        for kind in _KINDS
        if any(cells[row.stem][metric.key][kind] for row in rows)
    ]
    header = ["experiment", *(f"{titles[key]} {_KINDS[kind]}" for key, kind in columns)]
    lines: _Lines = [
        (row, [_name(row), *(cells[row.stem][key][kind] for key, kind in columns)]) for row in rows
    ]
    return header, lines


def _stacked(
    group: Group, rows: list[Row], cells: _Cells, titles: Mapping[str, str]
) -> tuple[list[str], _Lines]:
    header = ["experiment", "", *(titles[metric.key] for metric in group.metrics)]
    lines: _Lines = []
    for row in rows:
        for kind, name in _KINDS.items():
            texts = [cells[row.stem][metric.key][kind] for metric in group.metrics]
            if any(texts):
                is_first = not lines or lines[-1][0] is not row
                lines.append((row, [_name(row) if is_first else "", name, *texts]))
    return header, lines


def _name(row: Row) -> str:
    return f"{row.label} (`{row.stem}`)"


def _titles(
    group: Group, rows: list[Row], results: _Results, columns: Columns
) -> tuple[dict[str, str], list[str]]:
    """Column titles with footnote marks, and the footnotes."""
    checkpoints = [
        result["checkpoints"][label]
        for row in rows
        for result in results.get(row.stem, [])
        for label in LABELS
        if label in result["checkpoints"]
    ]
    titles: dict[str, str] = {}
    is_cumulative = False
    parts: dict[int, list[str]] = {}
    for metric in group.metrics:
        behind = [
            attack
            for checkpoint in checkpoints
            for name, attack in checkpoint["attacks"].items()
            if not metrics_of(name, attack).isdisjoint(metric.sources)
        ]
        titles[metric.key] = metric.title
        if any(attack["survivors_only"] for attack in behind):
            titles[metric.key] += "†"
            is_cumulative = True
        basis = columns.basis[metric.key]
        if basis is not None and not basis.is_whole:
            titles[metric.key] += "‡"
            parts.setdefault(basis.size, []).append(metric.title)
    notes = []
    if is_cumulative:
        notes.append(
            "† Ours is cumulative: the attack met what every earlier attack of the suite had left, "
            "and what those broke counts as broken."
        )
    if parts:
        which = "; ".join(f"{', '.join(of)} on {size:,}" for size, of in sorted(parts.items()))
        notes.append(f"‡ Ours on a part of the examples of the test split: {which}.")
    return titles, notes


def _gap(
    row: Row, results: _Results, seeds: Sequence[int] | None, checkpoints: Sequence[str]
) -> str:
    """The row with what is missing of it; empty when nothing is."""
    found = results.get(row.stem, [])
    if not found:
        return f"`{row.stem}`"
    absent = sorted(set(seeds or ()) - {result["seed"] for result in found})
    lacking = [f"seed {seed}" for seed in absent] + [
        f"{label} of seed {result['seed']}"
        for result in found
        for label in checkpoints
        if label not in result["checkpoints"]
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
    console = Console()
    if not console.is_terminal:
        console = Console(width=220)
    for table in shown.tables:
        console.print(table)
    if shown.missing:
        console.print(Text(f"Rows without our result: {', '.join(shown.missing)}"))
    readme = package_folder(package) / "README.md"
    markdown = render_table(package).markdown  # a README holds everything, whatever is printed now
    if not check:
        write_readme(readme, markdown)
        _show_in_front(package, readme.parent.parent / "README.md")
        return 0
    if is_out_of_date := not is_current(readme, markdown):
        console.print(Text(f"{readme} is out of date: run make results"))
    return int(is_out_of_date or bool(on and shown.missing))


def _show_in_front(package: str, readme: Path) -> None:
    """Put a paper's table on the digits into the front page, where that has a place for it."""
    begin, end = f"<!-- {package} -->", f"<!-- /{package} -->"
    if readme.is_file() and begin in readme.read_text(encoding="utf-8"):
        markdown = render_table(package, on="digits", groups=["digits"]).markdown
        write_readme(readme, markdown, begin, end)


if __name__ == "__main__":
    sys.exit(main())
