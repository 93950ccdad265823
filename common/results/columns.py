"""Which cells of a table may stand in one column: those about the same examples and attacks."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

from common.results.bases import WORST, Basis, Measured, Results, are_other_images, usual
from common.results.labels import LABELS
from common.results.reference import Group, Metric

T = TypeVar("T", bound=Hashable)


class Columns:
    """The columns of one table, and what does not fit into them.

    A column is about the examples that most last checkpoints of its rows were measured on, and its
    attacks have the ball that most have. In the worst case, all checkpoints of one experiment had
    the same attacks; those of different experiments may differ, since adaptive attacks depend on
    the network.

    Attributes:
        basis: Of each column, by key; ``None`` if nothing was measured.
        left_out: What does not fit, in words, with the rows and their seeds.
    """

    def __init__(self, group: Group, stems: Sequence[str], results: Results) -> None:
        self.group = group
        of = {stem: [m for m in results.get(stem, []) if m.label in LABELS] for stem in stems}
        every = [measured for found in of.values() for measured in found]
        self._attacks = {
            stem: _usual(found, lambda m: m.attacks if WORST in m.entry["metrics"] else None)
            for stem, found in of.items()
        }
        self.basis = {
            metric.key: _usual(every, lambda m, metric=metric: _basis(metric, m))  # type: ignore[misc]
            for metric in group.metrics
        }
        self._data = _usual(every, lambda m: m.data)
        sources = {source for metric in group.metrics for source in metric.sources}
        label = next((label for label in LABELS if any(m.label == label for m in every)), None)
        self._suites = [(m, m.efforts(sources)) for m in every if m.label == label]
        self._threat = _usual(every, lambda m: m.threat if WORST in m.bases else None)
        known: dict[str, list[tuple[str, str]]] = {}
        for _, suite in self._suites:
            for name, effort in suite.items():
                known.setdefault(name, []).append(effort)
        self._balls = {name: usual(ball for ball, _ in found) for name, found in known.items()}
        self._recipes = {name: usual(r for _, r in found if r) for name, found in known.items()}
        self.left_out: dict[str, dict[str, list[int]]] = {}
        for m in every:
            for metric in group.metrics:
                if how := self._misfit(metric, m):
                    where = self.left_out.setdefault(f"{metric.title}, {m.label}, {how}", {})
                    where.setdefault(m.stem, []).append(m.seed)

    def value(self, metric: Metric, measured: Measured) -> float | None:
        """A metric of a checkpoint; ``None`` if it is missing or does not fit."""
        if self._misfit(metric, measured):
            return None
        return metric.of(measured.entry["metrics"])

    def parts(self, metrics: Iterable[Metric]) -> list[str]:
        """On how many images the columns are that are not about all."""
        return [
            f"{metric.title} on {basis.size:,} images"
            for metric in metrics
            if (basis := self.basis[metric.key]) is not None and not basis.is_whole
        ]

    def notes(self) -> list[str]:
        """Footnotes: what was left out, and over which attacks worst cases are."""
        parts = [
            f"{what}: {', '.join(_named(stem, seeds) for stem, seeds in rows.items())}"
            for what, rows in self.left_out.items()
        ]
        what = "Left out, because measured otherwise than the rest of the column: "
        left_out = [what + "; ".join(parts)] if parts else []
        return [*left_out, *self._recipe_notes(), *self._attack_notes()]

    def _recipe_notes(self) -> list[str]:
        """Which rows had an attack with another effort than most rows."""
        others: dict[tuple[str, str], dict[str, list[int]]] = {}
        for m, suite in self._suites:
            for name, (_, recipe) in suite.items():
                if recipe and recipe != self._recipes[name]:
                    others.setdefault((name, recipe), {}).setdefault(m.stem, []).append(m.seed)
        parts = [
            f"{name} is {recipe} in {', '.join(_named(*one) for one in rows.items())}, and "
            f"{self._recipes[name]} elsewhere"
            for (name, recipe), rows in others.items()
        ]
        return [f"Attacks of unlike effort: {'; '.join(parts)}."] if parts else []

    def _attack_notes(self) -> list[str]:
        """Which attacks the worst cases of the rows are over, where they differ."""
        if not any(WORST in metric.sources for metric in self.group.metrics):
            return []
        entries = {
            stem: {name.partition("/")[0] for name in attacks}
            for stem, attacks in self._attacks.items()
            if attacks
        }
        common = set.intersection(*entries.values()) if entries else set()
        more: dict[str, list[str]] = {}
        for stem, names in entries.items():
            if names > common:
                more.setdefault(", ".join(sorted(names - common)), []).append(f"`{stem}`")
        if not more:
            return []
        parts = "; ".join(f"{names} ({', '.join(stems)})" for names, stems in more.items())
        return [f"Worst cases are over {', '.join(sorted(common))}, and beside them {parts}."]

    def _misfit(self, metric: Metric, measured: Measured) -> str:
        """Why a metric of a checkpoint does not fit, in words; empty if it does or is missing."""
        if metric.of(measured.entry["metrics"]) is None:
            return ""
        basis, usual_one = _basis(metric, measured), self.basis[metric.key]
        if basis is None:
            return "parts of it on different examples"
        if usual_one is not None and basis != usual_one:
            other = "other " if basis.size == usual_one.size else ""
            return f"on {other}{basis.size:,} examples"
        if are_other_images(measured.data, self._data):
            return "on other images"
        suite = measured.efforts(metric.sources)
        if others := [n for n, (ball, _) in suite.items() if ball != self._balls.get(n, ball)]:
            return f"with another ball of {', '.join(others)}"
        if WORST in metric.sources and measured.threat != self._threat:
            return f"for {measured.threat}"
        if WORST in metric.sources and measured.attacks != self._attacks[measured.stem]:
            return "other attacks than for the rest of the row"
        return ""


def _basis(metric: Metric, measured: Measured) -> Basis | None:
    """The basis that all parts of a metric share; ``None`` without one."""
    found = {measured.bases.get(key) for key in metric.sources}
    return found.pop() if len(found) == 1 else None


def _usual(found: Sequence[Measured], what: Callable[[Measured], T | None]) -> T | None:
    """The most frequent value of last checkpoints, or of selected ones where those have none."""
    for label in LABELS:
        values = (what(measured) for measured in found if measured.label == label)
        if (most := usual(value for value in values if value)) is not None:
            return most
    return None


def _named(stem: str, seeds: Sequence[int]) -> str:
    return f"`{stem}` (seed {', '.join(map(str, seeds))})"
