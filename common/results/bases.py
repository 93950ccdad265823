"""Which examples a metric is about: metrics of different examples are not compared."""

from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, TypeVar

from common.results.outcomes import Figure, figures, metrics_of, worst_over
from common.results.schema import AttackResult, CheckpointResult, Result

T = TypeVar("T", bound=Hashable)
WORST = "worst"
"""The accuracy over all attacks that count."""
Key = tuple[str, int]
"""Experiment and seed."""


class Basis(NamedTuple):
    """The examples that a metric is about.

    Args:
        classes: How many examples of each class the split has.
        size: How many examples it is about.
        places: Which ones, as text.
    """

    classes: tuple[int, ...]
    size: int
    places: bytes

    @property
    def is_whole(self) -> bool:
        """Whether they are the whole split."""
        return self.size == sum(self.classes)


def bases(checkpoint: CheckpointResult) -> dict[str, Basis]:
    """The basis of every metric; of a measure that is no accuracy it is the whole split."""
    return _bases(checkpoint, figures(checkpoint["clean"], checkpoint["attacks"]))


def _bases(checkpoint: CheckpointResult, known: Mapping[str, Figure]) -> dict[str, Basis]:
    classes = tuple(total for _, total in checkpoint["clean"]["per_class"])
    found = {n: Basis(classes, f.size, f.mask.tobytes()) for n, f in known.items()}
    return dict.fromkeys(checkpoint["metrics"], found["clean_acc"]) | found


@dataclass(frozen=True)
class Measured:
    """A checkpoint of a result file, and where it is from."""

    stem: str
    seed: int
    label: str
    entry: CheckpointResult
    data: str | None = None
    """Digest of the images and labels; ``None`` if unknown."""

    @cached_property
    def figures(self) -> dict[str, Figure]:
        """What is behind every accuracy."""
        return figures(self.entry["clean"], self.entry["attacks"])

    @cached_property
    def bases(self) -> dict[str, Basis]:
        """The examples that every metric is about."""
        return _bases(self.entry, self.figures)

    @cached_property
    def attacks(self) -> frozenset[str]:
        """The attacks that the worst case is over."""
        return frozenset(worst_over(self.entry["clean"], self.entry["attacks"]))

    @cached_property
    def _steps(self) -> dict[str, tuple[set[str], tuple[str, str]]]:
        """The metrics that every step counts in, and its ball and recipe."""
        return {
            name: (
                metrics_of(name, attack) | ({WORST} if name in self.attacks else set()),
                effort(attack),
            )
            for name, attack in self.entry["attacks"].items()
        }

    def efforts(self, metrics: Collection[str]) -> dict[str, tuple[str, str]]:
        """Ball and recipe of every step that the metrics are about."""
        return {name: its for name, (of, its) in self._steps.items() if not of.isdisjoint(metrics)}

    @property
    def threat(self) -> str:
        """The ball of the threat model, in words."""
        return ball_text(**(self.entry["threat"] or {"norm": None, "eps": None}))


Results = Mapping[str, list[Measured]]
"""By experiment, in the order of seeds and labels."""


def by_experiment(results: Iterable[Result]) -> Results:
    """All checkpoints of results."""
    found: dict[str, list[Measured]] = {}
    for result in results:
        stem, seed = result["experiment"], result["seed"]
        for label, entry in result["checkpoints"].items():
            data = result["provenance"][label].get("data_digest")
            found.setdefault(stem, []).append(Measured(stem, seed, label, entry, data))
    return found


def ball_text(norm: str | None, eps: float | None) -> str:
    """A ball in words."""
    return "no ball" if norm is None or eps is None else f"{norm} eps {eps:.5g}"


def effort(attack: AttackResult) -> tuple[str, str]:
    """Ball and recipe; the recipe is empty where it is unknown."""
    return ball_text(attack["norm"], attack["eps"]), attack.get("recipe", "")


def are_other_images(first: str | None, second: str | None) -> bool:
    """Whether two digests of images and labels are known and differ."""
    return None not in (first, second) and first != second


def usual(found: Iterable[T]) -> T | None:
    """The most frequent value, the first of several; ``None`` without any."""
    return next((value for value, _ in Counter(found).most_common(1)), None)


def comparable(
    checkpoints: Mapping[Key, CheckpointResult],
) -> tuple[dict[Key, dict[str, float]], list[str]]:
    """Metrics of checkpoints of one data set, of each metric only those about the same examples.

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
