"""Which cells of a table may stand in one column: those about the same examples and attacks."""

from collections.abc import Iterator, Mapping, Sequence

from common.results.bases import Basis, bases, counted_attacks, shared_basis, usual
from common.results.reference import Group, Metric
from common.results.schema import CheckpointResult, Result
from common.results.store import LABELS

Results = Mapping[str, Sequence[Result]]
"""By experiment."""


class Columns:
    """The columns of one table, and what does not fit into them.

    A column is about the examples that most last checkpoints of its rows were measured on. In the
    worst case, the checkpoints of one experiment met the same attacks too; experiments differ in
    them, since adaptive attacks depend on the network.

    Args:
        group: The table.
        stems: Of its rows.
        results: Of all experiments.

    Attributes:
        basis: Of each column, by key; ``None`` if nothing was measured.
        left_out: What does not fit, in words, with the rows and their seeds.
    """

    def __init__(self, group: Group, stems: Sequence[str], results: Results) -> None:
        self.group = group
        self._found = list(_checkpoints(stems, results))
        self._of = {id(checkpoint): bases(checkpoint) for *_, checkpoint in self._found}
        self._attacks = {stem: self._usual_attacks(stem) for stem in stems}
        self.basis = {metric.key: self._usual_basis(metric) for metric in group.metrics}
        self.left_out: dict[str, dict[str, list[int]]] = {}
        for stem, label, seed, checkpoint in self._found:
            for metric in group.metrics:
                if how := self._misfit(stem, metric, checkpoint):
                    where = self.left_out.setdefault(f"{metric.title}, {label}, {how}", {})
                    where.setdefault(stem, []).append(seed)

    def value(self, stem: str, metric: Metric, checkpoint: CheckpointResult) -> float | None:
        """A metric of a checkpoint; ``None`` if it is missing or does not fit."""
        if self._misfit(stem, metric, checkpoint):
            return None
        return metric.of(checkpoint["metrics"])

    def notes(self) -> list[str]:
        """Footnotes: what was left out, and over which attacks worst cases are."""
        parts = [
            f"{what}: {', '.join(_named(stem, seeds) for stem, seeds in rows.items())}"
            for what, rows in self.left_out.items()
        ]
        notes = []
        if parts:
            notes.append(
                "Left out, because measured otherwise than the rest of the column: "
                f"{'; '.join(parts)}"
            )
        return notes + self._attack_notes()

    def _attack_notes(self) -> list[str]:
        """Which attacks the worst cases of the rows are over, where they differ."""
        if not any("worst" in metric.sources for metric in self.group.metrics):
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

    def _misfit(self, stem: str, metric: Metric, checkpoint: CheckpointResult) -> str:
        """Why a metric of a checkpoint does not fit, in words; empty if it does or is missing."""
        basis = self._basis_of(metric, checkpoint)
        if metric.of(checkpoint["metrics"]) is None:
            return ""
        if basis is None:
            return "parts of it on different examples"
        usual_one = self.basis[metric.key]
        if usual_one is not None and basis != usual_one:
            same = basis.size == usual_one.size
            return f"on {'other ' if same else ''}{basis.size:,} examples"
        if "worst" in metric.sources and counted_attacks(checkpoint) != self._attacks[stem]:
            return "other attacks than for the rest of the row"
        return ""

    def _basis_of(self, metric: Metric, checkpoint: CheckpointResult) -> Basis | None:
        return shared_basis(self._of[id(checkpoint)], metric.sources)

    def _usual_basis(self, metric: Metric) -> Basis | None:
        for wanted in LABELS:
            found = (
                self._basis_of(metric, checkpoint)
                for _, label, _, checkpoint in self._found
                if label == wanted and metric.of(checkpoint["metrics"]) is not None
            )
            if basis := usual(one for one in found if one is not None):
                return basis
        return None

    def _usual_attacks(self, stem: str) -> frozenset[str]:
        for wanted in LABELS:
            found = (
                counted_attacks(checkpoint)
                for owner, label, _, checkpoint in self._found
                if owner == stem and label == wanted and "worst" in checkpoint["metrics"]
            )
            if attacks := usual(found):
                return attacks
        return frozenset()


def _checkpoints(
    stems: Sequence[str], results: Results
) -> Iterator[tuple[str, str, int, CheckpointResult]]:
    for stem in stems:
        for result in results.get(stem, []):
            for label in LABELS:
                if label in result["checkpoints"]:
                    yield stem, label, result["seed"], result["checkpoints"][label]


def _named(stem: str, seeds: Sequence[int]) -> str:
    return f"`{stem}` (seed {', '.join(map(str, seeds))})"
