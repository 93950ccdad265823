"""Claims of papers and their verdicts, from one number per seed.

A claim about one number is made by :func:`judge`: a paired t-test of the seeds' numbers against a
threshold. A claim about several variants of a method has a :class:`Judgement` for each.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Literal

from common.errors import check_choice
from common.results.statistics import Difference, paired_t_test

BySeed = dict[int, float]
Metrics = Mapping[tuple[str, int], Mapping[str, float]]
"""(method, seed) -> metrics of its result, accuracies in [0, 1]."""


# ----------------------------------------------------------------------------- numbers by seed


def by_seed(found: Mapping[tuple[str, int], Mapping[str, Any]], name: str, *keys: str) -> BySeed:
    """The finite numbers under ``keys`` in the entries of ``name``, by seed."""
    values: BySeed = {}
    for (owner, seed), entry in found.items():
        value: Any = entry if owner == name else None
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None and math.isfinite(value):
            values[seed] = float(value)
    return values


def combined(first: BySeed, second: BySeed, how: Callable[[float, float], float]) -> BySeed:
    """``how`` of two numbers, for the seeds that have both."""
    return {seed: how(first[seed], second[seed]) for seed in first if seed in second}


def minus(first: BySeed, second: BySeed, scale: float = 1.0) -> BySeed:
    """``first`` minus ``second``, times ``scale``, for the seeds that have both."""
    return combined(first, second, lambda a, b: scale * (a - b))


def mean(values: BySeed) -> float | None:
    """Mean over seeds; ``None`` if there is none."""
    return fmean(values.values()) if values else None


# ----------------------------------------------------------------------------------- the test


def t_test(values: BySeed, threshold: float = 0.0) -> Difference | None:
    """Two-sided t-test of per-seed values against a threshold; ``None`` without any value."""
    return paired_t_test(list(values.values()), threshold)


def paired_difference(first: BySeed, second: BySeed, scale: float = 1.0) -> Difference | None:
    """``first`` minus ``second`` over the seeds that have both; ``None`` if there is none."""
    return t_test(minus(first, second, scale))


# ----------------------------------------------------------------------------------- verdicts


Verdict = Literal["supported", "contradicted", "not decided", "not run"]


@dataclass(frozen=True)
class Judgement:
    """What the results say about a claim, for one variant of a method.

    Attributes:
        verdict: One of four.
        reason: The numbers behind it, in a sentence.
        per_seed: The number of each seed, where there is one.
    """

    verdict: Verdict
    reason: str
    per_seed: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice("verdict", self.verdict, Verdict)


@dataclass(frozen=True)
class Claim:
    """A claim of a paper and its judgement for every variant, by the variant's name."""

    id: str
    claim: str
    judgements: Mapping[str, Judgement]

    @property
    def verdict(self) -> Verdict:
        """The verdict of a claim without variants."""
        (judgement,) = self.judgements.values()
        return judgement.verdict


def judge(
    id: str,
    claim: str,
    values: BySeed,
    seeds: Sequence[int],
    *,
    above: float | None = None,
    below: float | None = None,
    every: bool = False,
    beside: Mapping[str, BySeed] | None = None,
) -> Claim:
    """A claim that the mean of ``values`` lies above or below a threshold.

    Supported if the t-test over seeds says so, contradicted if it says the opposite, not decided
    if it is not significant, and not run if a seed lacks its number.

    Args:
        id: A letter or tag.
        claim: In words.
        values: The number of each seed.
        seeds: All that a verdict needs.
        above: The threshold, if the claim is that the number is above it.
        below: The threshold, if the claim is that the number is below it.
        every: The claim is about every single seed, the threshold included, and needs no test.
        beside: Other quantities whose means belong in the reason.
    """
    threshold = above if above is not None else below
    if threshold is None or None not in (above, below):
        raise ValueError(f"claim {id} needs one of above and below, got {above} and {below}")
    sign, word = (1.0, "above") if above is not None else (-1.0, "below")
    test = t_test(values, threshold)
    others = {name: mean(numbers) for name, numbers in (beside or {}).items()}
    extra = "".join(f"; {name} {v:.4g}" for name, v in others.items() if v is not None)

    def decided(verdict: Verdict, reason: str) -> Claim:
        return Claim(id, claim, {"": Judgement(verdict, reason + extra, values)})

    lacking = [str(seed) for seed in seeds if seed not in values]
    if test is None or lacking:
        which = f"no number of seed {', '.join(lacking)}" if lacking else "no seed asked for"
        measured = "" if test is None else f"; mean of the others {test.mean:.4g}"
        return decided("not run", which + measured)
    if every:
        limit = "not below" if above is not None else "not above"
        held = sum(sign * (value - threshold) >= 0 for value in values.values())
        return decided(
            "supported" if held == len(values) else "contradicted",
            f"mean {test.mean:.4g}, {limit} {threshold:.4g} in {held} of {len(values)} seeds",
        )
    if not test.is_tested:
        which = "one seed" if test.seeds == 1 else "every seed"
        return decided("not decided", f"{test.mean:.4g} of {which}, which no test decides")
    up, down = (test.is_up, test.is_down)[:: int(sign)]
    interval = f"[{test.low:.4g}, {test.high:.4g}]"
    return decided(
        "supported" if up else "contradicted" if down else "not decided",
        f"mean {test.mean:.4g} {interval}, {word} {threshold:.4g}: p = {test.p:.2g}",
    )


NOTE = (
    "Two-sided paired t-test over seeds at the 5 % level, with 95 % intervals in brackets; claims "
    "are not corrected for their number."
)


def verdict_table(claims: Sequence[Claim], note: str = "") -> dict[str, Any]:
    """Claims as an entry of ``tables`` in ``analysis.json``, a line for each variant."""
    lines = [
        [
            *((claim.id, claim.claim) if i == 0 else ("", "")),
            *(variant, judgement.verdict, judgement.reason),
        ]
        for claim in claims
        for i, (variant, judgement) in enumerate(claim.judgements.items())
    ]
    header = ["", "claim", "variant", "verdict", "reason"]
    if not any(line[2] for line in lines):
        header, *lines = ([*line[:2], *line[3:]] for line in (header, *lines))
    return {"title": "Verdicts", "note": note or NOTE, "header": header, "lines": lines}
