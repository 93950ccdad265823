"""Outcomes of every example, and the figures that follow from them.

What a result file says about one checkpoint is made here, as plain JSON values, and so is
everything that can be worked out from it again: metrics, their intervals, and the examples behind
a metric.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from itertools import compress
from operator import and_
from statistics import fmean, median
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from common.schema import AttackResult, AuditResult, CheckpointResult, CleanResult
from common.statistics import wilson_interval

if TYPE_CHECKING:  # tables are rendered without waiting for torch
    from torch import Tensor

    from common.evaluation.steps import Line, Outcomes

CONFIDENCE = 0.95
"""Of the intervals."""

DIGITS = 6
"""Intervals and distances are rounded, so that they are the same text on every machine."""


# ----------------------------------------------------------------------------------------- packing


def pack_outcomes(outcomes: "Iterable[bool] | Tensor") -> str:
    """Booleans as hexadecimal digits: the first is the highest bit, zeros fill the last byte."""
    bits = "".join("1" if outcome else "0" for outcome in _as_list(outcomes))
    padded = bits + "0" * (-len(bits) % 8)
    return f"{int(padded, 2):0{len(padded) // 4}x}" if padded else ""


def unpack_outcomes(text: str, n: int) -> list[bool]:
    """The ``n`` booleans that :func:`pack_outcomes` packed.

    Raises:
        ValueError: If the text is not ``n`` packed booleans.
    """
    return _listed(packed_bits(text, n), n)


def packed_bits(text: str, n: int) -> int:
    """Packed booleans as an ``n``-bit integer whose highest bit is the first.

    Raises:
        ValueError: If the text is not ``n`` packed booleans.
    """
    padding = -n % 8
    if len(text) != (n + padding) // 4:
        raise ValueError(f"{len(text)} hexadecimal digits do not hold {n} outcomes")
    value = int(text or "0", 16)
    if value & ((1 << padding) - 1):
        raise ValueError(f"there are outcomes beyond the first {n}")
    return value >> padding


def _listed(bits: int, n: int) -> list[bool]:
    return [bool(bits >> (n - 1 - position) & 1) for position in range(n)]


# ----------------------------------------------------------------------------------------- figures


class Figure(NamedTuple):
    """What is behind a metric.

    Args:
        value: The metric.
        size: How many examples it is about, the first ones of the split.
        correct: How many of them are right; ``None`` for a mean of several draws.
        bits: Which of them are right, as in :func:`packed_bits`; ``None`` where examples have no
            outcome of their own: the lowest of several accuracies, a mean.
    """

    value: float
    size: int
    correct: int | None
    bits: int | None


def group_of(name: str, attack: AttackResult) -> str:
    """The group of a step: its entry, and its point in a sweep apart from the draw."""
    point = [f"{axis}={value:.6g}" for axis, value in attack["at"].items() if axis != "draw"]
    return "/".join([name.partition("/")[0], *point])


def metrics_of(name: str, attack: AttackResult) -> set[str]:
    """The metrics that a step has a part in, ``worst`` aside."""
    group = group_of(name, attack)
    return {name, group, f"{group}_union", f"{group}_clean"}


def counts_as_attack(attack: AttackResult) -> bool:
    """Whether a step enters ``worst``."""
    return attack["kind"] == "attack" and attack["counts"]


def figures(clean: CleanResult, attacks: Mapping[str, AttackResult]) -> dict[str, Figure]:
    """What is behind every metric of :func:`summarise`."""
    total = examples_in(clean["per_class"])
    clean_bits = worst = packed_bits(clean["outcomes"], total)
    found = {"clean_acc": _share(clean_bits, total)}
    groups: dict[str, list[AttackResult]] = {}
    for name, attack in attacks.items():
        bits = packed_bits(attack["outcomes"], attack["examples"])
        found[name] = _share(bits, attack["examples"])
        groups.setdefault(group_of(name, attack), []).append(attack)
        if counts_as_attack(attack):
            untried = total - attack["examples"]
            worst &= bits << untried | ((1 << untried) - 1)
    for name, members in groups.items():
        size = members[0]["examples"]
        kinds = {member["kind"] for member in members}
        if len(kinds) > 1 or any(member["examples"] != size for member in members):
            continue
        outcomes = [packed_bits(member["outcomes"], size) for member in members]
        cumulative = {member["survivors_only"] for member in members}
        if len(cumulative) == 1:
            found[name] = _combined(outcomes, size, kinds == {"noise"})
        if cumulative == {False} and kinds == {"attack"}:
            found[f"{name}_union"] = _share(reduce(and_, outcomes), size)
        if size < total:
            found[f"{name}_clean"] = _share(clean_bits >> (total - size), size)
    if any(map(counts_as_attack, attacks.values())):
        found["worst"] = _share(worst, total)
    return found


def _share(bits: int, size: int) -> Figure:
    correct = bits.bit_count()
    return Figure(correct / size, size, correct, bits)


def _combined(outcomes: list[int], size: int, is_noise: bool) -> Figure:
    """The figure of a group: the mean over draws of noise, the lowest over losses of an attack."""
    if len(outcomes) == 1:
        return _share(outcomes[0], size)
    counts = [bits.bit_count() for bits in outcomes]
    if is_noise:
        return Figure(fmean(counts) / size, size, None, None)
    return Figure(min(counts) / size, size, min(counts), None)


def summarise(clean: CleanResult, attacks: Mapping[str, AttackResult]) -> dict[str, float]:
    """Accuracies in [0, 1].

    Steps with the same entry, which is what stands before the first ``/`` of their names, and at
    the same point of a sweep make a group. Its name is the entry, or ``entry/axis=value`` in a
    sweep; the draws of a noise are one point.

    - ``clean_acc``, and every step under its own name;
    - a group of attacks: its lowest accuracy over losses. All of them must be about the same
      examples, and either none or all ``survivors_only``; in the latter case the figure is
      cumulative;
    - a group of noise: its mean accuracy over draws, under the same conditions;
    - ``<group>_union``: examples that withstand every loss of the group; not for
      ``survivors_only``, where it would say the same, and not for noise;
    - ``<group>_clean``: clean accuracy on the group's examples, where those are not all;
    - ``worst``: examples that are right clean and under every attack with ``counts`` that was
      tried on them; absent where no attack counts.
    """
    return {name: figure.value for name, figure in figures(clean, attacks).items()}


def intervals(clean: CleanResult, attacks: Mapping[str, AttackResult]) -> dict[str, list[float]]:
    """``[low, high]`` of every metric that is a share of examples; a mean over draws is none.

    They are 95 % score intervals and stand for the choice of test examples alone; for the lowest of
    several accuracies they are those of the lowest, as if it had been the only one.
    """
    return {
        name: [round(end, DIGITS) for end in wilson_interval(figure.correct, figure.size)]
        for name, figure in figures(clean, attacks).items()
        if figure.correct is not None
    }


def outcome_bits(checkpoint: CheckpointResult, metric: str) -> list[bool] | None:
    """Which examples a metric counts as right, in the order of the split.

    There is an answer for ``clean_acc``, a step, a group with one member, ``<group>_union``,
    ``<group>_clean`` and ``worst``. There is none, and ``None`` is returned, for the lowest of
    several losses (an example has one outcome per loss; the union is what to ask for), for a mean
    over draws, and for a metric that was not measured or does not come from outcomes.
    """
    figure = figures(checkpoint["clean"], checkpoint["attacks"]).get(metric)
    if figure is None or figure.bits is None:
        return None
    return _listed(figure.bits, figure.size)


# ----------------------------------------------------------------------------------------- entries


def checkpoint_entry(
    outcomes: "Outcomes",
    epoch: int = 0,
    global_step: int = 0,
    audit: Mapping[str, Any] | None = None,
    measures: Mapping[str, float] | None = None,
) -> CheckpointResult:
    """What a result file says about one checkpoint.

    Args:
        outcomes: Of the whole split, in the order of its examples.
        epoch: Of the checkpoint, from 0.
        global_step: Optimiser steps behind the checkpoint.
        audit: What an audit found, see :class:`AuditResult`.
        measures: Other figures to put among the metrics, in any unit.

    Raises:
        ValueError: If a measure has the name of a metric, if a step was about other examples than
            the first ones of the split, or if its name does not begin with its entry.
    """
    y = _as_list(outcomes.y)
    is_right = _as_list(outcomes.correct["clean"])
    clean: CleanResult = {
        "correct": sum(is_right),
        "per_class": _per_class(is_right, y),
        "outcomes": pack_outcomes(is_right),
    }
    if nonfinite := _nonfinite(outcomes.columns.get("clean", {}), len(y)):
        clean["nonfinite"] = nonfinite
    attacks = {name: _attack_entry(outcomes, name, is_right, y) for name in outcomes.attacked}
    threat = outcomes.threat
    metrics = summarise(clean, attacks)
    if taken := set(metrics) & set(measures or ()):
        raise ValueError(f"{min(taken)} is a measure and an accuracy; rename one of them")
    entry: CheckpointResult = {
        "epoch": epoch,
        "global_step": global_step,
        "examples": len(y),
        "threat": None if threat is None else {"norm": threat.norm, "eps": threat.radius},
        "clean": clean,
        "attacks": attacks,
        "metrics": metrics | dict(measures or {}),
        "intervals": intervals(clean, attacks),
    }
    if audit is not None:
        entry["audit"] = cast(AuditResult, dict(audit))
    return entry


def _attack_entry(
    outcomes: "Outcomes", name: str, is_right: Sequence[bool], y: Sequence[int]
) -> AttackResult:
    line = _line(outcomes, name)
    within = _as_list(outcomes.attacked[name])
    size = sum(within)
    if not all(within[:size]):
        raise ValueError(f"{name} attacked {size} examples that are not the first of the split")
    correct = _as_list(outcomes.correct[name])[:size]
    entry: AttackResult = {
        "kind": line.kind,
        "norm": line.norm,
        "eps": line.eps,
        "counts": line.counts,
        "at": dict(line.at),
        "correct": sum(correct),
        "examples": size,
        "survivors_only": line.survivors_only,
        "per_class": _per_class(correct, y),
        "outcomes": pack_outcomes(correct),
    }
    columns = outcomes.columns.get(name, {})
    if nonfinite := _nonfinite(columns, size):
        entry["nonfinite"] = nonfinite
    if norms := [norm for norm in ("linf", "l2") if norm in columns]:
        withstood = _as_list(columns.get("correct", outcomes.correct[name]))
        broken = [a and not b for a, b in zip(is_right[:size], withstood, strict=False)]
        entry["distances"] = {
            norm: _median(compress(_as_list(columns[norm]), broken)) for norm in norms
        }
    return entry


def _nonfinite(columns: "Mapping[str, Tensor]", size: int) -> int:
    """For how many of the first examples the scores were NaN or infinite."""
    predicted = _as_list(columns["predicted"]) if "predicted" in columns else []
    return sum(label < 0 for label in predicted[:size])


def _line(outcomes: "Outcomes", name: str) -> "Line":
    from common.evaluation.steps import Line

    entry = name.partition("/")[0]
    line = outcomes.lines.get(name) or Line(entry=entry)
    if line.entry != entry:
        raise ValueError(
            f"{name} belongs to the suite entry {line.entry!r}; its name must begin with that"
        )
    return line


def _median(distances: Iterable[float]) -> float | None:
    """Of the distances there are; an example that a step was not run on has none."""
    known = [distance for distance in distances if math.isfinite(distance)]
    return float(f"{median(known):.{DIGITS}g}") if known else None


def _as_list(values: "Iterable[Any] | Tensor") -> list[Any]:
    listed = values.tolist() if hasattr(values, "tolist") else list(values)
    return cast(list[Any], listed)


def _per_class(correct: Sequence[bool], y: Sequence[int]) -> list[list[int]]:
    """``[correct, total]`` of each class among the first examples."""
    counts = [[0, 0] for _ in range(max(y) + 1)]
    for outcome, label in zip(correct, y, strict=False):
        counts[label][0] += outcome
        counts[label][1] += 1
    return counts


def examples_in(per_class: list[list[int]]) -> int:
    """How many examples the classes have together."""
    return sum(total for _, total in per_class)
