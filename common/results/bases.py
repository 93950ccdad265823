"""What makes two figures comparable: they are about the same examples.

Accuracies of different examples say nothing about each other, so tables, comparisons and analyses
show a metric only where it was measured on its usual basis, and name what they leave out.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from typing import NamedTuple, TypeVar

from common.results.outcomes import figures, worst_over
from common.results.schema import CheckpointResult, Result

T = TypeVar("T", bound=Hashable)
Key = tuple[str, int]
"""Experiment and seed."""


class Basis(NamedTuple):
    """The examples that a figure is about.

    Args:
        classes: How many examples of each class the split has.
        mask: Which examples they are, as in :func:`common.results.outcomes.packed_bits`.
    """

    classes: tuple[int, ...]
    mask: int

    @property
    def size(self) -> int:
        """How many they are."""
        return self.mask.bit_count()

    @property
    def is_whole(self) -> bool:
        """Whether they are the whole split."""
        return self.size == sum(self.classes)


def bases(checkpoint: CheckpointResult) -> dict[str, Basis]:
    """The basis of every metric; of a measure that is no accuracy it is the whole split."""
    classes = tuple(total for _, total in checkpoint["clean"]["per_class"])
    found = dict.fromkeys(checkpoint["metrics"], Basis(classes, (1 << sum(classes)) - 1))
    masks = figures(checkpoint["clean"], checkpoint["attacks"])
    return found | {name: Basis(classes, figure.mask) for name, figure in masks.items()}


def counted_attacks(checkpoint: CheckpointResult) -> frozenset[str]:
    """The attacks that the worst case is over."""
    return frozenset(worst_over(checkpoint["clean"], checkpoint["attacks"]))


def usual(found: Iterable[T]) -> T | None:
    """The most frequent value, the first of several; ``None`` without any."""
    return next((value for value, _ in Counter(found).most_common(1)), None)


def comparable(
    checkpoints: Mapping[Key, CheckpointResult],
) -> tuple[dict[Key, dict[str, float]], list[str]]:
    """Metrics of checkpoints, of each metric only those about the same examples.

    Args:
        checkpoints: Of one data set, by experiment and seed.

    Returns:
        Metrics by the same keys, and what was left out, in sentences.
    """
    of = {key: bases(checkpoint) for key, checkpoint in checkpoints.items()}
    names = dict.fromkeys(name for found in of.values() for name in found)
    basis = {name: usual(found[name] for found in of.values() if name in found) for name in names}
    metrics: dict[Key, dict[str, float]] = {}
    left_out: dict[str, list[str]] = {}
    for key, checkpoint in checkpoints.items():
        metrics[key] = {}
        for name, value in checkpoint["metrics"].items():
            if of[key][name] == basis[name]:
                metrics[key][name] = value
            else:
                where = f"{key[0]} seed {key[1]} ({of[key][name].size} examples)"
                left_out.setdefault(name, []).append(where)
    return metrics, [
        f"{name} of {', '.join(rows)}: measured on other examples than elsewhere"
        for name, rows in left_out.items()
    ]


def last_of(results: Iterable[Result], prefix: str) -> dict[Key, CheckpointResult]:
    """Last checkpoints by what stands after the prefix of the experiment, and seed."""
    return {
        (result["experiment"].removeprefix(prefix), result["seed"]): result["checkpoints"]["last"]
        for result in results
        if result["experiment"].startswith(prefix) and "last" in result["checkpoints"]
    }


def shared_basis(of: Mapping[str, Basis], names: Iterable[str]) -> Basis | None:
    """The basis that metrics share; ``None`` where they are about different examples."""
    found = {of.get(name) for name in names}
    return found.pop() if len(found) == 1 else None
