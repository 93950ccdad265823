"""Results beside the published ones of the same rows and seeds."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from common.errors import listed
from common.files import content_digest
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


def difference(ours: Result, published: Result) -> str:
    """What differs in the outcomes and figures of two results, in words; ``SAME`` if nothing does.

    Accuracies are ours minus the published ones, in points, with the number of images whose outcome
    is another.
    """
    parts = []
    for label in dict.fromkeys([*ours["checkpoints"], *published["checkpoints"]]):
        a, b = ours["checkpoints"].get(label), published["checkpoints"].get(label)
        if a is None or b is None:
            parts.append(f"{label}: {'not here' if a is None else 'not published'}")
        elif text := _difference(a, b):
            parts.append(f"{label}: {text}")
    return "; ".join(parts) or SAME


def _content(result: CheckpointResult, key: str) -> Any:
    """A part of a result without what its attacks cost."""
    part = result.get(key)
    if key != "attacks" or not isinstance(part, dict):
        return part
    return {n: {k: v for k, v in a.items() if k != "passes"} for n, a in part.items()}


def _difference(ours: CheckpointResult, published: CheckpointResult) -> str:
    if all(_content(ours, key) == _content(published, key) for key in _CONTENT):
        return ""
    if ours["examples"] != published["examples"]:
        return f"{ours['examples']} test images, published {published['examples']}"
    first, second = (figures(one["clean"], one["attacks"]) for one in (ours, published))
    parts = [] if ours["attacks"].keys() == published["attacks"].keys() else ["other attacks"]
    changed = 0
    for name, title in (("worst", "worst case"), ("clean_acc", "clean accuracy")):
        a, b = first.get(name), second.get(name)
        if a is None or b is None or not np.array_equal(a.mask, b.mask):
            parts += [f"{title} not comparable"] * (a is not b)
            continue
        others = int(np.sum(a.bits != b.bits))
        changed += others
        parts.append(
            f"{title} {100 * (a.value - b.value):+.2f} points, {others} of {a.size} images"
        )
    if changed == 0:
        names = ours["metrics"].keys() | published["metrics"].keys()
        pairs = {name: [one["metrics"].get(name) for one in (ours, published)] for name in names}
        others_ = sorted(name for name, (a, b) in pairs.items() if a != b)
        others_ = others_ or [key for key in _CONTENT if ours.get(key) != published.get(key)]
        parts.append(f"other figures: {listed(others_)}")
    return ", ".join(parts)
