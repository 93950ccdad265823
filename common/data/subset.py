"""Stratified subsets of a data set, the same for every model and seed."""

import torch
from torch import Tensor

from common.attacks.randomness import ExampleRandom, Stream


def subset(y: Tensor, n: int | None) -> Tensor:
    """Positions of ``n`` examples with the classes in the proportions of all.

    Within each class examples are ordered by a hash of their position. Then all are sorted by
    (rank in class + 1/2) / size of the class, and the first ``n`` (``None`` for all) are taken: a
    smaller subset is part of every larger one. Returns ascending positions, int64, on the CPU.
    """
    y = y.detach().cpu().long()
    if n is None or n >= len(y):
        return torch.arange(len(y))
    numbers = ExampleRandom(0, 0, torch.arange(len(y)), Stream.SUBSET).integers(2**53, ())
    shuffled = numbers.argsort(stable=True)
    grouped = shuffled[y[shuffled].argsort(stable=True)]
    sizes = y.bincount()
    rank = torch.arange(len(y)) - (sizes.cumsum(0) - sizes)[y[grouped]]
    key = torch.empty(len(y), dtype=torch.float64)
    key[grouped] = (rank + 0.5) / sizes[y[grouped]].double()
    return shuffled[key[shuffled].argsort(stable=True)][:n].sort().values


def lacking_classes(y: Tensor, chosen: Tensor) -> str:
    """Which classes of ``y`` have no example at the chosen positions, in words; empty if none."""
    if len(chosen) == len(y):
        return ""
    y = y.detach().cpu()
    there = set(y.tolist())
    lost = sorted(there - set(y[chosen].tolist()))
    if not lost:
        return ""
    names = ", ".join(map(str, lost[:10])) + (", ..." if len(lost) > 10 else "")
    return (
        f"the {len(chosen):,} examples taken of {len(y):,} have none of {len(lost)} of the "
        f"{len(there)} classes ({names}); figures about them say nothing of those classes"
    )
