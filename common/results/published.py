"""Results beside the published ones of the same rows and seeds."""

from collections.abc import Iterable, Sequence

import numpy as np

from common.files import content_digest
from common.results.bases import bases
from common.results.outcomes import figures
from common.results.schema import CheckpointResult, Result

SAME = "same to the last digit"
_CONTENT = ("examples", "threat", "clean", "attacks", "metrics")

Digests = dict[str, str]
"""Of the outcomes and figures of results, by the names of their files."""


def digests(results: Iterable[Result]) -> Digests:
    """Digests that are equal where nothing but the provenance differs."""
    return {
        f"{result['experiment']}-seed{result['seed']}.json": content_digest(result["checkpoints"])
        for result in results
    }


def shortened(names: Sequence[str], most: int = 3) -> str:
    """The first of several names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def difference(ours: Result, published: Result) -> str:
    """What differs in the outcomes and figures of two results, in words; ``SAME`` if nothing does.

    Accuracies are ours minus the published ones, in points.
    """
    parts = []
    for label in dict.fromkeys([*ours["checkpoints"], *published["checkpoints"]]):
        a, b = ours["checkpoints"].get(label), published["checkpoints"].get(label)
        if a is None or b is None:
            parts.append(f"{label}: {'not here' if a is None else 'not published'}")
        elif text := _difference(a, b):
            parts.append(f"{label}: {text}")
    return "; ".join(parts) or SAME


def _difference(ours: CheckpointResult, published: CheckpointResult) -> str:
    if all(ours.get(key) == published.get(key) for key in _CONTENT):
        return ""
    if ours["examples"] != published["examples"]:
        return f"{ours['examples']} test images, published {published['examples']}"
    parts = []
    ours_of, theirs_of = bases(ours), bases(published)
    for key, title in (("worst", "worst case"), ("clean_acc", "clean accuracy")):
        if key in ours_of and ours_of[key] == theirs_of.get(key):
            points = 100.0 * (ours["metrics"][key] - published["metrics"][key])
            parts.append(f"{title} {points:+.2f} points")
        elif key in ours_of or key in theirs_of:
            parts.append(f"{title} not comparable")
    if ours["attacks"].keys() != published["attacks"].keys():
        parts.append("other attacks")
    count = _changed_images(ours, published)
    parts.append(f"other verdicts on {count} of {ours['examples']} images")
    if count == 0:
        names = ours["metrics"].keys() | published["metrics"].keys()
        a, b = (one["metrics"] for one in (ours, published))
        others = sorted(name for name in names if a.get(name) != b.get(name))
        parts.append(f"other figures: {shortened(others)}")
    return ", ".join(parts)


def _changed_images(ours: CheckpointResult, published: CheckpointResult) -> int:
    """On how many images some step that both have, clean or an attack, has another outcome."""
    first, second = (figures(one["clean"], one["attacks"]) for one in (ours, published))
    changed = np.zeros(ours["examples"], dtype=bool)
    for name in first.keys() & second.keys():
        a, b = first[name], second[name]
        if a.bits is not None and b.bits is not None:
            changed |= a.mask & b.mask & (a.bits != b.bits)
    return int(changed.sum())
