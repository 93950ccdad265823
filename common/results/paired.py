"""Two checkpoints compared image by image, and whether they can be."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from common.results.bases import Basis, are_other_images, ball_text, bases, effort
from common.results.outcomes import Figure, figures, group_of, is_audit, metrics_of
from common.results.schema import CheckpointResult
from common.results.statistics import mcnemar_exact


@dataclass(frozen=True)
class Paired:
    """A metric of two checkpoints on the same images.

    Attributes:
        size: Number of images.
        first: Accuracy of the first checkpoint, in [0, 1].
        second: That of the second.
        only_first: Positions in the split of the images that only the first gets right.
        only_second: Those that only the second gets right.
    """

    size: int
    first: float
    second: float
    only_first: list[int]
    only_second: list[int]

    @property
    def difference(self) -> float:
        """The first minus the second, in points."""
        return 100.0 * (len(self.only_first) - len(self.only_second)) / self.size

    @property
    def p(self) -> float:
        """Exact McNemar test, two-sided."""
        return mcnemar_exact(len(self.only_first), len(self.only_second))


def paired(first: CheckpointResult, second: CheckpointResult) -> dict[str, Paired]:
    """Every metric that is about the same images in both, with one outcome per image."""
    return pairs_of(*(figures(one["clean"], one["attacks"]) for one in (first, second)))


def pairs_of(a: Mapping[str, Figure], b: Mapping[str, Figure]) -> dict[str, Paired]:
    """:func:`paired`, from the figures of both checkpoints."""
    pairs = {name: pair_of(a[name], b[name]) for name in a if name in b}
    return {name: pair for name, pair in pairs.items() if pair is not None}


def pair_of(x: Figure, y: Figure) -> Paired | None:
    """A metric of two checkpoints; ``None`` on other images, or without an outcome per image."""
    if x.bits is None or y.bits is None or not np.array_equal(x.mask, y.mask):
        return None
    only_first, only_second = (
        np.flatnonzero(right & ~other).tolist()
        for right, other in ((x.bits, y.bits), (y.bits, x.bits))
    )
    return Paired(x.size, x.value, y.value, only_first, only_second)


# --------------------------------------------------------------------------------- comparability


@dataclass(frozen=True)
class Named:
    """A checkpoint to compare.

    Attributes:
        name: What messages call it.
        entry: What was measured.
        data: Digest of the images and labels; ``None`` if unknown.
    """

    name: str
    entry: CheckpointResult
    data: str | None = None

    @cached_property
    def bases(self) -> dict[str, Basis]:
        """The images that every metric is about."""
        return bases(self.entry)


def obstacle(first: Named, second: Named, metrics: Sequence[str] = ()) -> str:
    """Why two checkpoints, or these metrics of them, cannot be compared; empty if they can.

    Threat model and images have to be the same, and the entries of the suite: norm, radius, attack,
    steps, restarts, where both files know them. Losses within an entry may differ, since adaptive
    ones belong to a network. With ``metrics``, only the entries of these have to be the same, and
    none for ``worst``.
    """
    a, b = first.entry, second.entry
    if a["threat"] != b["threat"]:
        return f"the threat models differ: {_threat(first)}, {_threat(second)}"
    is_same_basis = first.bases["clean_acc"] == second.bases["clean_acc"]
    if not is_same_basis or are_other_images(first.data, second.data):
        return f"the images differ: {_images(first)}, {_images(second)}"
    if differences := list(_entries_that_differ(first, second, metrics)):
        reasons = "; ".join(differences)
        return f"the suites differ: {reasons}; choose with --metric among {_shared(first, second)}"
    for name in metrics or [name for name in first.bases if name in second.bases]:
        if lacking := [one.name for one in (first, second) if name not in one.bases]:
            known = _shared(first, second)
            return f"there is no metric {name!r} in {' and '.join(lacking)}; both have {known}"
        if first.bases[name] != second.bases[name] and not is_audit(name):
            sizes = f"{first.bases[name].size:,} and {second.bases[name].size:,}"
            return f"the images differ: {name} is about {sizes}, and not the same ones"
    return ""


def _shared(first: Named, second: Named) -> str:
    """The metrics that can be compared, but for those of single losses, for messages."""
    names = paired(first.entry, second.entry)
    return ", ".join(name for name in names if "/" not in name and not is_audit(name))


def _entries_that_differ(first: Named, second: Named, metrics: Sequence[str]) -> Iterator[str]:
    a, b = (_suite(one.entry, metrics) for one in (first, second))
    for name in dict.fromkeys([*a, *b]):
        if name not in a or name not in b:
            yield f"only {(first if name in a else second).name} has {name}"
        for x, y in zip(a.get(name, ()), b.get(name, ()), strict=False):
            if x and y and x != y:
                yield f"{name} is {x} in {first.name}, {y} in {second.name}"


def _suite(entry: CheckpointResult, metrics: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Ball and recipe of every point of the suite, or of those that the metrics are about."""
    return {
        group_of(name, attack): effort(attack)
        for name, attack in entry["attacks"].items()
        if (metrics_of(name, attack) & set(metrics) if metrics else not is_audit(name))
    }


def _threat(one: Named) -> str:
    threat = one.entry["threat"]
    return f"{'none' if threat is None else ball_text(**threat)} in {one.name}"


def _images(one: Named) -> str:
    total, classes = one.entry["examples"], len(one.entry["clean"]["per_class"])
    digest = f", digest {one.data}" if one.data else ""
    return f"{total:,} of {classes} classes{digest} in {one.name}"
