"""What stands in the cells of a table: published numbers beside ours."""

import statistics
from collections.abc import Mapping, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from common.results.columns import Columns
from common.results.comparison import audit_notes
from common.results.markdown import Sheet
from common.results.outcomes import metrics_of
from common.results.reference import UNITS, Group, Metric, Row
from common.results.schema import Result
from common.results.store import LABELS

COMPACT = 4
"""Columns of numbers that fit into a terminal."""

_Results = Mapping[str, list[Result]]  # by experiment
_Costs = Mapping[str, Mapping[str, float]]  # by experiment and metric
_Cells = dict[str, dict[str, dict[str, str]]]  # by experiment, metric and kind

_KINDS = {
    "published": "published",
    "last": "last",
    "difference": "last − published",
    "published selected": "published, selected",
    "selected": "selected",
    "network": "network",
}


def sheet_of(group: Group, rows: list[Row], results: _Results, costs: _Costs) -> Sheet:
    """One table: its rows, published and ours, with its notes.

    Args:
        group: The table.
        rows: Its rows.
        results: Of all experiments.
        costs: Of training, by experiment and metric.
    """
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
    first = group.shown
    rest = [metric for metric in group.metrics if metric not in first]
    sheet = Sheet(group.title, group.note, *_arranged(first, known, cells, titles, results))
    sheet.notes = notes
    if rest:
        more = Sheet("", "", *_arranged(rest, known, cells, titles, results))
        sheet.more = more if more.lines else None
    return sheet


def _arranged(
    metrics: Sequence[Metric],
    rows: list[Row],
    cells: _Cells,
    titles: Mapping[str, str],
    results: _Results,
) -> tuple[list[str], list[list[str]]]:
    """Header and lines of some columns: a line for each kind of number of a row."""
    lines = []
    for row in rows:
        name = f"{row.label} (`{row.stem}`)"
        seeds = ", ".join(str(result["seed"]) for result in results.get(row.stem, []))
        for kind, what in _KINDS.items():
            texts = [cells[row.stem][metric.key][kind] for metric in metrics]
            if any(texts):
                lines.append([name, what, *texts, seeds])
                name = ""
    return ["experiment", "", *(titles[metric.key] for metric in metrics), "seeds"], lines


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
        "published": _published(printed, row, metric),
        "last": spread_of(ours["last"], ends["last"]),
        "difference": difference,
        "published selected": _published(row.printed("selected", key), row, metric),
        "selected": spread_of(ours["selected"], ends["selected"]),
        "network": "" if cost is None or row.stem in results else _repeats([scale * cost]),
    }


def _published(values: list[float], row: Row, metric: Metric) -> str:
    """The numbers with the tag of their source."""
    source = metric.source or row.source
    return f"{_repeats(values)} [{source}]" if values and source else _repeats(values)


def _repeats(values: list[float]) -> str:
    return " / ".join(f"{value:.2f}" for value in values)


def spread_of(values: list[float], ends: Sequence[float] = ()) -> str:
    """Mean and sample standard deviation, or a single value and the ends of its interval."""
    if len(values) > 1 and len(set(values)) == 1 and not ends:
        return _repeats(values[:1])  # a count, the same for every seed
    if len(values) > 1:
        return f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f}"
    if values and ends:
        return f"{values[0]:.2f} [{ends[0]:.1f}, {ends[1]:.1f}]"
    return _repeats(values)


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


def compact_of(group: Group, rows: list[Row], results: _Results) -> Table:
    """Means over seeds of our last checkpoints, in the first columns of a table, for a terminal."""
    metrics = group.shown[:COMPACT]
    columns = Columns(group, [row.stem for row in rows], results)
    sizes = [
        f"{metric.title} on {basis.size:,} images"
        for metric in metrics
        if (basis := columns.basis[metric.key]) is not None and not basis.is_whole
    ]
    table = Table(title=Text(group.title), title_justify="left", box=box.SIMPLE, pad_edge=False)
    table.add_column("experiment", no_wrap=True)
    for title in (*(metric.title for metric in metrics), "seeds"):
        table.add_column(Text(title), justify="right")
    for row in rows:
        if row.stem not in results:
            continue
        cells = []
        for metric in metrics:
            found = [
                columns.value(row.stem, metric, result["checkpoints"]["last"])
                for result in results[row.stem]
                if "last" in result["checkpoints"]
            ]
            known = [UNITS[metric.unit] * value for value in found if value is not None]
            cells.append(_repeats([statistics.fmean(known)]) if known else "")
        table.add_row(Text(row.stem), *cells, str(len(results[row.stem])))
    table.caption = Text("; ".join(["means over seeds, accuracies in percent", *sizes]))
    table.caption_justify = "left"
    return table
