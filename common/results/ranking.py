"""Rows of a table ranked by their worst case, where a paired test can tell them apart."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean

from common.results.bases import WORST, Measured, Results
from common.results.columns import Columns
from common.results.markdown import Sheet
from common.results.paired import pair_of
from common.results.reference import Group, Row
from common.results.statistics import LEVEL, Difference, holm, paired_t_test, wilson_interval

RANKED = (
    "Rows are ranked by the worst case over all attacks of their suite, the mean over seeds. A row "
    "opens a new place if, with every seed and in the same direction, the exact McNemar test tells "
    "it from the first row of the place before (5 %, the largest p value of the seeds, Holm's "
    "correction over all pairs). *Over images* and *over seeds* are 95 % intervals: how far other "
    "test images (Wilson) or other training runs (t) could move the mean."
)
"""What a ranking shows."""


@dataclass(frozen=True)
class Placed:
    """A row of a ranking.

    Attributes:
        row: The experiment.
        place: 1 for the first group; rows of one group are not told apart from its first row.
        found: Its last checkpoints, by seed.
        size: Number of images that the worst case is about.
    """

    row: Row
    place: int
    found: Mapping[int, Measured]
    size: int

    def values(self, metric: str = WORST) -> list[float]:
        """A metric by seed, where it was measured."""
        known = [one.entry["metrics"] for one in self.found.values()]
        return [metrics[metric] for metrics in known if metric in metrics]

    @property
    def worst(self) -> float:
        """Mean worst case over seeds, in [0, 1]."""
        return fmean(self.values())

    @property
    def over_images(self) -> tuple[float, float]:
        """95 % Wilson interval of the mean: how far other test images could move it."""
        return wilson_interval(round(self.worst * self.size), self.size)

    @property
    def seeds(self) -> int:
        """Number of seeds."""
        return len(self.found)

    @property
    def over_seeds(self) -> Difference | None:
        """The mean with its 95 % t interval: how far other training runs could move it."""
        return paired_t_test(self.values())


def ranking(group: Group, rows: Sequence[Row], results: Results) -> tuple[list[Placed], list[str]]:
    """Rows by mean worst case of their last checkpoints, and what was left out, in sentences.

    Two rows are told apart if the exact McNemar test rejects at 5 % in every seed they share, with
    the largest p value of the seeds corrected for the number of pairs (Holm).

    Args:
        group: The table; one of its columns is ``worst``.
        rows: Its rows.
        results: Ours.
    """
    (metric,) = (metric for metric in group.metrics if metric.key == WORST)
    columns = Columns(group, [row.stem for row in rows], results)
    last = {
        row.stem: {m.seed: m for m in results.get(row.stem, []) if m.label == "last"}
        for row in rows
    }
    known: dict[str, dict[int, Measured]] = {}
    left_out = []
    for stem, by_seed in last.items():
        for seed, one in by_seed.items():
            if columns.value(metric, one) is None:
                left_out.append(f"{stem} seed {seed}: no worst case, or one measured otherwise")
            else:
                known.setdefault(stem, {})[seed] = one
    ordered = sorted(
        (row for row in rows if row.stem in known),
        key=lambda row: -fmean(m.entry["metrics"][WORST] for m in known[row.stem].values()),
    )
    basis = columns.basis[WORST]
    places = _places([row.stem for row in ordered], known)
    return [
        Placed(row, places[row.stem], known[row.stem], basis.size if basis else 0)
        for row in ordered
    ], left_out


def ranking_sheet(group: Group, rows: Sequence[Row], results: Results) -> Sheet:
    """The ranking of the rows of a table; the arguments are those of :func:`ranking`."""
    placed, left_out = ranking(group, rows, results)
    notes = [f"Left out: {text}." for text in left_out]
    if sizes := sorted({one.size for one in placed}):
        notes.insert(0, f"Worst case on {', '.join(f'{size:,}' for size in sizes)} images.")
    header = [
        "row",
        "place",
        "worst case",
        "over images",
        "over seeds",
        "Clean",
        "MACs",
        "number of seeds",
    ]
    return Sheet(f"Ranking: {group.title}", "", header, [_line(one) for one in placed], notes)


def _line(one: Placed) -> list[str]:
    seeds = one.over_seeds
    macs = one.values("macs")
    return [
        f"{one.row.label} (`{one.row.stem}`)",
        str(one.place),
        f"{100 * one.worst:.2f}",
        _interval(*one.over_images),
        _interval(seeds.low, seeds.high) if seeds is not None and seeds.is_tested else "",
        f"{100 * fmean(one.values('clean_acc')):.2f}",
        f"{fmean(macs):,.0f}" if macs else "",
        str(one.seeds),
    ]


def _interval(low: float, high: float) -> str:
    """In percent; a t interval is cut where no accuracy can be."""
    return f"{100 * max(low, 0.0):.2f} to {100 * min(high, 1.0):.2f}"


def _places(stems: Sequence[str], known: Mapping[str, Mapping[int, Measured]]) -> dict[str, int]:
    """The place of each row: a new one if it is told apart from the first row of the last one."""
    pairs = list(combinations(stems, 2))
    p_values = holm([_largest_p(known[a], known[b]) for a, b in pairs])
    apart = {pair for pair, p in zip(pairs, p_values, strict=True) if p < LEVEL}
    places: dict[str, int] = {}
    leader = ""
    for stem in stems:
        if not leader or (leader, stem) in apart:
            leader, place = stem, len(places) + 1
        places[stem] = place
    return places


def _largest_p(first: Mapping[int, Measured], second: Mapping[int, Measured]) -> float:
    """The largest p value over the shared seeds; 1 without any, or if they disagree."""
    shared = [seed for seed in first if seed in second]
    found = [pair_of(first[s].figures[WORST], second[s].figures[WORST]) for s in shared]
    known = [pair for pair in found if pair is not None]
    signs = {math.copysign(1.0, pair.difference) for pair in known}
    if len(known) < len(found) or len(signs) != 1:
        return 1.0
    return max(pair.p for pair in known)
