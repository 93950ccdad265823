"""The table of the zoo, and how often the audit was right."""

from collections.abc import Sequence

from benchmarks.audit.networks import EPS
from benchmarks.audit.zoo import ZOO
from benchmarks.report import Row, measured_on, table
from common.results.statistics import wilson_interval


def rendered(known: Sequence[Row]) -> str:
    """Rates with intervals, then one row per network, as Markdown."""
    order = {case.name: place for place, case in enumerate(ZOO)}
    rows = sorted(known, key=lambda row: order.get(row["name"], len(order)))
    examples = "/".join(dict.fromkeys(str(row["examples"]) for row in rows))
    minutes = sum(row["seconds"] for row in rows) / 60.0
    head = ["network", "half", "clean %", "claimed %", "true %", "flagged", "checks that failed"]
    rates = ["", "design", "held out", "all"]
    lines = [
        f"{len(rows)} of {len(ZOO)} networks, {examples} test images each, linf eps {EPS:g}; "
        f"{minutes:.0f} minutes of processor time. {measured_on(rows)}",
        "",
        *table(rates, [_rates(rows, True), _rates(rows, False)], range(len(rates))),
    ]
    for is_masked, title in ((True, "Masked"), (False, "Honest")):
        cells = [_cells(row) for row in rows if row["is_masked"] is is_masked]
        lines += ["", *table([f"{title} {head[0]}", *head[1:]], cells, range(len(head)))]
    return "\n".join(lines)


def _cells(row: Row) -> list[str]:
    accuracies = [f"{100.0 * row[key]:.0f}" for key in ("clean", "claimed", "true")]
    flagged = "yes" if row["failed"] else "no"
    return [row["name"], row["half"], *accuracies, flagged, ", ".join(row["failed"])]


def _rates(rows: Sequence[Row], is_masked: bool) -> list[str]:
    """Share of the networks that were flagged, with Wilson's interval, by half."""
    cells = ["masked networks flagged" if is_masked else "honest networks flagged"]
    for half in ("design", "held out", None):
        part = [
            row for row in rows if row["is_masked"] is is_masked and half in (None, row["half"])
        ]
        flagged = sum(bool(row["failed"]) for row in part)
        if not part:
            cells.append("")
            continue
        low, high = wilson_interval(flagged, len(part))
        cells.append(f"{flagged} of {len(part)} ({100.0 * low:.0f} to {100.0 * high:.0f} %)")
    return cells
