"""What a paper printed: the tables and rows of its ``reference.yaml``."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from common.errors import ConfigurationError, check_choice
from common.limits import read_yaml

Unit = Literal["percent", "plain", "thousands", "millions", "giga"]
UNITS: dict[Unit, float] = {
    "percent": 100.0,
    "plain": 1.0,
    "thousands": 1e-3,
    "millions": 1e-6,
    "giga": 1e-9,
}
"""What a measured figure is multiplied by in a table."""

WIDEST = 8
"""Most columns of numbers that a table shows at once."""

Number = float | list[float] | None


@dataclass(frozen=True)
class Metric:
    """A column.

    Args:
        key: Of the metric.
        title: Heading.
        unit: ``percent`` of a figure in [0, 1]; ``plain`` as it is; ``thousands``; ``millions``;
            ``giga``.
        mean_of: Other columns of the same table with their weights, which sum to 1: ours is then
            their weighted mean, computed for each seed, and ``key`` is a new name.
        source: Tag of the published numbers in this column, if it is not that of their rows.
    """

    key: str
    title: str
    unit: Unit = "percent"
    mean_of: dict[str, float] | None = None
    source: str | None = None

    def __post_init__(self) -> None:
        check_choice("unit", self.unit, Unit)
        if self.mean_of is not None:
            weights = list(self.mean_of.values())
            if not weights or min(weights) < 0 or not math.isclose(sum(weights), 1.0):
                raise TypeError(
                    f"mean_of of {self.key!r} needs weights of at least 0 that sum to 1, got "
                    f"{self.mean_of}"
                )

    @property
    def sources(self) -> list[str]:
        """The keys that ours is made of."""
        return [self.key] if self.mean_of is None else list(self.mean_of)

    def of(self, metrics: Mapping[str, float]) -> float | None:
        """Ours from the metrics of a checkpoint; ``None`` where a part of it is missing."""
        if not all(key in metrics for key in self.sources):
            return None
        if self.mean_of is None:
            return metrics[self.key]
        return sum(weight * metrics[key] for key, weight in self.mean_of.items())


@dataclass(frozen=True)
class Group:
    """A table.

    Args:
        id: What rows name in ``groups``.
        title: Heading.
        metrics: Columns, in order.
        note: Text under the heading.
        first: Keys of the columns of the first table, at most eight; the others follow in a
            second, folded table. By default the first eight.
        baseline: Stem of the row that the others are compared with, example by example.
        compare: Keys of the metrics to compare; by default the group's own ones that are ``worst``
            or about a single loss.
    """

    id: str
    title: str
    metrics: list[Metric]
    note: str = ""
    first: list[str] | None = None
    baseline: str | None = None
    compare: list[str] | None = None

    def __post_init__(self) -> None:
        known = {metric.key for metric in self.metrics}
        if self.first is not None and (len(self.first) > WIDEST or set(self.first) - known):
            raise TypeError(
                f"first of {self.id!r} names at most {WIDEST} of its columns, got {self.first}"
            )
        if isinstance(self.compare, str):
            raise TypeError(f"compare must be a list of metrics, got {self.compare!r}")

    @property
    def shown(self) -> list[Metric]:
        """The columns of the first table."""
        if self.first is None:
            return self.metrics[:WIDEST]
        by_key = {metric.key: metric for metric in self.metrics}
        return [by_key[key] for key in self.first]


@dataclass(frozen=True)
class Row:
    """An experiment: the tables it is in, and the printed numbers of its two checkpoints.

    A ``baseline``, the stem of another, is what it is compared with instead of its tables' own.
    """

    stem: str
    groups: list[str]
    label: str
    source: str | None = None
    last: dict[str, Number] = field(default_factory=dict)
    selected: dict[str, Number] = field(default_factory=dict)
    baseline: str | None = None

    def printed(self, label: str, key: str) -> list[float]:
        """What was printed for a metric, one number per repeat."""
        value = (self.last if label == "last" else self.selected).get(key)
        if value is None:
            return []
        return list(value) if isinstance(value, list) else [value]


@dataclass(frozen=True)
class Reference:
    """The parts of a ``reference.yaml`` that tables are made of."""

    groups: list[Group]
    rows: dict[str, Row]
    checkpoints: tuple[str, ...] = ("last", "selected")
    """What a complete result has; ``[last]`` where nothing is selected."""
    tags: dict[str, str] = field(default_factory=dict)
    """Sources of numbers, by the tag that rows name."""
    summary: dict[str, str | list[str]] = field(default_factory=dict)
    """What the root README shows: ``group``, ``metrics``, and the metric of ``difference``."""


def select(stems: Iterable[str], on: str) -> list[str]:
    """The stems that a selection means, sorted.

    Args:
        stems: All there are.
        on: Words separated by spaces. A word that is a stem means that stem alone; one with ``*``
            or ``?`` is a pattern; any other is the beginning of stems.
    """
    known = sorted(stems)

    def matches(stem: str, word: str) -> bool:
        if word in known:
            return stem == word
        return fnmatchcase(stem, word if "*" in word or "?" in word else f"{word}*")

    return [stem for stem in known if any(matches(stem, word) for word in on.split() or [""])]


def read_reference(path: str | Path) -> Reference:
    """Read the groups and rows of a ``reference.yaml``.

    Raises:
        ConfigurationError: If it cannot be read, a row names an unknown group, or a row has a
            number that none of its groups shows.
    """
    path = Path(path)
    data = read_yaml(path)
    try:
        groups = [
            Group(**{**group, "metrics": [Metric(**metric) for metric in group["metrics"]]})
            for group in data["groups"]
        ]
        rows = {stem: Row(stem=stem, **row) for stem, row in data["rows"].items()}
        checkpoints = tuple(data.get("checkpoints", Reference.checkpoints))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ConfigurationError(
            f"{path} cannot be read ({type(error).__name__}: {' '.join(str(error).split())}); it "
            "needs groups (a list of id, title, metrics, note, first, baseline, compare) "
            "and rows (by stem: groups, label, source, last, selected, baseline)"
        ) from error
    if not checkpoints or set(checkpoints) - set(Reference.checkpoints):
        raise ConfigurationError(
            f"{path}: checkpoints are {list(checkpoints)}; name last, selected or both"
        )
    owners = [(f"the group {group.id}", group.baseline) for group in groups]
    owners += [(row.stem, row.baseline) for row in rows.values()]
    for owner, baseline in owners:
        if baseline is not None and baseline not in rows:
            raise ConfigurationError(
                f"{path}: {owner} has the baseline {baseline!r}, which is no row; name the stem of "
                "one"
            )
    for group in groups:
        plain = {metric.key for metric in group.metrics if metric.mean_of is None}
        for metric in group.metrics:
            if metric.mean_of is not None and (lost := set(metric.mean_of) - plain):
                raise ConfigurationError(
                    f"{path}: {metric.key} in the group {group.id} is a mean of {min(lost)!r}, "
                    f"which is no column of it; the others are {', '.join(sorted(plain))}"
                )
    columns = {group.id: {metric.key for metric in group.metrics} for group in groups}
    for row in rows.values():
        if unknown := [group for group in row.groups if group not in columns]:
            raise ConfigurationError(
                f"{path}: {row.stem} is in the unknown group {unknown[0]!r}; there are "
                f"{', '.join(columns)}"
            )
        shown = set().union(*(columns[group] for group in row.groups))
        if hidden := [key for key in (*row.last, *row.selected) if key not in shown]:
            raise ConfigurationError(
                f"{path}: {row.stem} has a number for {hidden[0]!r}, which none of its groups "
                f"{row.groups} shows; add the metric to one of them"
            )
    return Reference(groups, rows, checkpoints, data.get("tags") or {}, data.get("summary") or {})
