"""What stands in the cells of a table: published numbers beside ours."""

import statistics
from collections.abc import Mapping, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from common.results.bases import Results
from common.results.columns import Columns
from common.results.labels import LABELS
from common.results.markdown import Sheet
from common.results.outcomes import metrics_of
from common.results.reference import UNITS, Group, Metric, Row

COMPACT = 4
"""Columns of numbers that fit into a terminal."""

_Costs = Mapping[str, Mapping[str, float]]  # by experiment and metric
_Cells = dict[str, dict[str, dict[str, str]]]  # by experiment, metric and kind of number
_KINDS = (
    *("published", "last", "last − published", "published, selected", "selected"),
    "network",
)


def sheet_of(group: Group, rows: list[Row], results: Results, costs: _Costs) -> Sheet:
    """One table: its rows, published and ours, with its notes."""
    columns = Columns(group, [row.stem for row in rows], results)
    cells: _Cells = {
        row.stem: {
            metric.key: _cell(row, metric, columns, results, costs.get(row.stem, {}))
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
    if unknown := [f"`{row.stem}`" for row in rows if row not in known]:
        notes.insert(0, f"Neither published nor measured yet: {', '.join(unknown)}")
    if not known:
        return Sheet(group.title, group.note, notes=notes)
    rest = [metric for metric in group.metrics if metric not in group.shown]
    first, more = (
        _arranged(metrics, known, cells, titles, results) for metrics in (group.shown, rest)
    )
    folded = Sheet("", "", *more) if rest and more[1] else None
    return Sheet(group.title, group.note, *first, notes=notes, more=folded)


def seeds_of(row: Row, results: Results) -> list[int]:
    """The seeds of a row that have a result."""
    return list(dict.fromkeys(measured.seed for measured in results.get(row.stem, [])))


def _arranged(
    metrics: Sequence[Metric],
    rows: list[Row],
    cells: _Cells,
    titles: Mapping[str, str],
    results: Results,
) -> tuple[list[str], list[list[str]]]:
    """Header and lines of some columns: a line for each kind of number of a row."""
    lines = []
    for row in rows:
        name = f"{row.label} (`{row.stem}`)"
        seeds = ", ".join(map(str, seeds_of(row, results)))
        for kind in _KINDS:
            texts = [cells[row.stem][metric.key][kind] for metric in metrics]
            if any(texts):
                lines.append([name, kind.replace("published", row.origin), *texts, seeds])
                name = ""
    return ["experiment", "", *(titles[metric.key] for metric in metrics), "seeds"], lines


def _cell(
    row: Row, metric: Metric, columns: Columns, results: Results, costs: Mapping[str, float]
) -> dict[str, str]:
    """What there is to say about one metric of one experiment, by kind.

    A cost belongs to the network: it stands beside our results, or by itself where there are none.
    """
    scale, source = UNITS[metric.unit], metric.source or row.source
    cost = [scale * costs[metric.key]] if metric.key in costs else []
    cell = dict.fromkeys(_KINDS, "")
    means: dict[str, list[float]] = {}
    for label, kind in zip(LABELS, ("published", "published, selected"), strict=True):
        found = [one for one in results.get(row.stem, []) if one.label == label]
        pairs = [(columns.value(metric, one), one.entry["intervals"]) for one in found]
        known = [(scale * value, ends) for value, ends in pairs if value is not None]
        ends = [scale * end for end in known[-1][1].get(metric.key, [])] if known else []
        means[label] = [value for value, _ in known]
        cell[label] = spread_of(means[label], ends)
        if printed := row.printed(label, metric.key):
            cell[kind] = _repeats(printed) + (f" [{source}]" if source else "")
            if label == "last" and known:
                gap = statistics.fmean(means[label]) - statistics.fmean(printed)
                cell["last − published"] = f"{gap:+.2f}"
    if cost and not any(means.values()):
        for label in {one.label for one in results.get(row.stem, [])} & set(LABELS):
            cell[label] = _repeats(cost)
    cell["network"] = "" if row.stem in results else _repeats(cost)
    return cell


def _repeats(values: list[float]) -> str:
    return " / ".join(map(_number, values))


def _number(value: float) -> str:
    """Two decimals, none of a large count."""
    return f"{value:,.0f}" if value >= 1000.0 and value.is_integer() else f"{value:.2f}"


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
    group: Group, rows: list[Row], results: Results, columns: Columns
) -> tuple[dict[str, str], list[str]]:
    """Column titles with footnote marks, and the footnotes."""
    cumulative = set()
    for row in rows:
        for measured in results.get(row.stem, []):
            for name, attack in measured.entry["attacks"].items():
                if measured.label in LABELS and attack["survivors_only"]:
                    cumulative |= metrics_of(name, attack)
    titles: dict[str, str] = {}
    parts: dict[int, list[str]] = {}
    for metric in group.metrics:
        titles[metric.key] = metric.title + ("" if cumulative.isdisjoint(metric.sources) else "†")
        basis = columns.basis[metric.key]
        if basis is not None and not basis.is_whole:
            titles[metric.key] += "‡"
            parts.setdefault(basis.size, []).append(metric.title)
    notes = []
    if any("†" in title for title in titles.values()):
        notes.append(
            "† Ours is cumulative: the attack ran on the examples that all earlier attacks of the "
            "suite left correct; the other examples count as broken."
        )
    if parts:
        which = "; ".join(f"{', '.join(of)} on {size:,}" for size, of in sorted(parts.items()))
        notes.append(f"‡ Ours on a part of the examples of the test split: {which}.")
    return titles, notes


def compact_of(group: Group, rows: list[Row], results: Results) -> Table:
    """Means over seeds of our last checkpoints, in the first columns of a table, for a terminal."""
    metrics = group.shown[:COMPACT]
    columns = Columns(group, [row.stem for row in rows], results)
    table = Table(title=Text(group.title), title_justify="left", box=box.SIMPLE, pad_edge=False)
    table.add_column("experiment", no_wrap=True)
    for title in (*(metric.title for metric in metrics), "seeds"):
        table.add_column(Text(title), justify="right")
    for row in rows:
        if row.stem not in results:
            continue
        last = [measured for measured in results[row.stem] if measured.label == "last"]
        cells = []
        for metric in metrics:
            found = [columns.value(metric, measured) for measured in last]
            known = [UNITS[metric.unit] * value for value in found if value is not None]
            cells.append(_repeats([statistics.fmean(known)]) if known else "")
        table.add_row(Text(row.stem), *cells, str(len(seeds_of(row, results))))
    notes = ["means over seeds, accuracies in percent", *columns.parts(metrics)]
    table.caption = Text("; ".join(notes))
    table.caption_justify = "left"
    return table
