"""What a paper printed: the tables and rows of its ``reference.yaml``."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, TypeAdapter

from common.errors import ConfigurationError
from common.limits import read_yaml
from common.packages import package_folder
from common.results.labels import Checkpoint
from common.results.selection import select
from common.results.typed import problem_of

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
_KNOWN_KEYS = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Metric:
    """A column.

    Args:
        key: Of the metric.
        title: Heading.
        unit: ``percent`` of a figure in [0, 1]; ``plain`` as it is; others are powers of ten.
        mean_of: Other columns of the table with their weights, which sum to 1: ours is their
            weighted mean, computed for each seed, and ``key`` is a new name.
        source: Tag of the published numbers in this column, if it is not that of their rows.
    """

    __pydantic_config__ = _KNOWN_KEYS

    key: str
    title: str
    unit: Unit = "percent"
    mean_of: dict[str, Annotated[float, Field(ge=0)]] | None = None
    source: str | None = None

    @property
    def sources(self) -> list[str]:
        """The keys that ours is made of."""
        return [self.key] if self.mean_of is None else list(self.mean_of)

    def of(self, metrics: Mapping[str, float]) -> float | None:
        """Ours from the metrics of a checkpoint; ``None`` where a part of it is missing."""
        weights = self.mean_of or {self.key: 1.0}
        if not weights.keys() <= metrics.keys():
            return None
        return sum(weight * metrics[key] for key, weight in weights.items())


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
        ranked: Whether its rows are also ranked, by :mod:`common.results.ranking`.
    """

    __pydantic_config__ = _KNOWN_KEYS

    id: str
    title: str
    metrics: list[Metric]
    note: str = ""
    first: Annotated[list[str], Field(max_length=WIDEST)] | None = None
    baseline: str | None = None
    compare: list[str] | None = None
    ranked: bool = False

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
    ``origin`` names the lines of printed numbers that are not the paper's.
    """

    __pydantic_config__ = _KNOWN_KEYS

    stem: str
    groups: list[str]
    label: str
    source: str | None = None
    last: dict[str, Number] = field(default_factory=dict)
    selected: dict[str, Number] = field(default_factory=dict)
    baseline: str | None = None
    origin: str = "published"

    def printed(self, label: str, key: str) -> list[float]:
        """What was printed for a metric, one number per repeat."""
        value = (self.last if label == "last" else self.selected).get(key)
        if value is None:
            return []
        return value if isinstance(value, list) else [value]


@dataclass(frozen=True)
class Summary:
    """What the root README shows: columns of a group, and differences in one of them."""

    __pydantic_config__ = _KNOWN_KEYS

    group: str
    metrics: list[str]
    difference: str


@dataclass(frozen=True)
class Reference:
    """The parts of a ``reference.yaml`` that tables are made of.

    Args:
        groups: The tables.
        rows: The experiments, by stem.
        checkpoints: What a complete result has; ``[last]`` where nothing is selected.
        tags: Sources of numbers, by the tag that rows name.
        summary: What the root README shows.
        selections: Further words for ``ON=``, each with the selection that it stands for.
        title: Of the paper.
        arxiv: Its number there.
        venue: Where it appeared.
    """

    groups: list[Group]
    rows: dict[str, Row]
    checkpoints: Annotated[list[Checkpoint], Field(min_length=1)] = field(
        default_factory=lambda: ["last", "selected"]
    )
    tags: dict[str, str] = field(default_factory=dict)
    summary: Summary | None = None
    selections: dict[str, str] = field(default_factory=dict)
    title: str = ""
    arxiv: str = ""
    venue: str = ""

    def members(self, group: Group) -> list[Row]:
        """The rows of a table."""
        return [row for row in self.rows.values() if group.id in row.groups]


def read_reference(path: str | Path) -> Reference:
    """Read the groups and rows of a ``reference.yaml``.

    Raises:
        ConfigurationError: If it cannot be read, names what is not there, or a row has a number
            that none of its groups shows.
    """
    data, kind = read_yaml(path), TypeAdapter(Reference)
    rows = data.get("rows") if isinstance(data, dict) else None
    for stem, row in rows.items() if isinstance(rows, dict) else ():
        if isinstance(row, dict):
            row.setdefault("stem", stem)
    if not (problem := problem_of(kind, data)):
        reference = kind.validate_python(data)
        problem = next(_problems(reference), "")
    if problem:
        raise ConfigurationError(f"{path} cannot be read: {problem}")
    return reference


def meant_by(package: str, on: str) -> str:
    """A selection of rows without the words that the paper's ``reference.yaml`` defines.

    Such a word may end as a beginning does: ``fashion_small*`` means the same.

    Raises:
        ConfigurationError: If there is no such package, or its file cannot be read.
    """
    path = package_folder(package) / "reference.yaml"
    words = read_reference(path).selections if path.is_file() else {}
    return " ".join(words.get(word.rstrip("_*"), word) for word in on.split())


def _problems(reference: Reference) -> Iterator[str]:
    """What names something that is not there."""
    for word, selection in reference.selections.items():
        if len(word.split()) != 1 or select(reference.rows, word):
            yield f"selections defines {word!r}, which is no single word or already means rows"
        for part in selection.split() or [selection]:
            if not part or not select(reference.rows, part):
                yield f"selections lets {word!r} stand for {part!r}, which means no row"
    columns = {group.id: [metric.key for metric in group.metrics] for group in reference.groups}
    for group in reference.groups:
        plain = {metric.key for metric in group.metrics if metric.mean_of is None}
        place = f"the group {group.id}"
        yield from _unknown(f"baseline of {place}", [group.baseline], reference.rows)
        yield from _unknown(f"first of {place}", group.first or [], columns[group.id])
        for metric in group.metrics:
            if metric.mean_of is not None:
                yield from _unknown(f"mean_of {metric.key} in {place}", metric.mean_of, plain)
                if not math.isclose(sum(metric.mean_of.values()), 1.0):
                    yield f"the weights of {metric.key} in {place} must sum to 1"
    if (summary := reference.summary) is not None:
        yield from _unknown("group of summary", [summary.group], columns)
        keys = [*summary.metrics, summary.difference]
        yield from _unknown("summary", keys, columns[summary.group])
    for row in reference.rows.values():
        yield from _unknown(f"baseline of {row.stem}", [row.baseline], reference.rows)
        yield from _unknown(f"groups of {row.stem}", row.groups, columns)
        shown = [key for group in row.groups for key in columns[group]]
        yield from _unknown(f"numbers of {row.stem}", (*row.last, *row.selected), shown)


def _unknown(what: str, names: Iterable[str | None], known: Iterable[str]) -> Iterator[str]:
    """A sentence for each name that is not among the known ones."""
    for name in names:
        if name is not None and name not in known:
            yield f"{what}: there is no {name!r}; there are {', '.join(sorted(known)[:20])}"
