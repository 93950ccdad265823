"""Outcomes of every example, and the figures that follow from them.

:func:`checkpoint_entry` computes what a result file says about one checkpoint, figures included.
They are stored, and not computed again when results are merged or read.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from itertools import compress
from operator import and_
from statistics import fmean, median
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from common.results.packing import as_list, listed, pack_outcomes, packed_bits
from common.results.schema import (
    AttackResult,
    AuditResult,
    CheckpointResult,
    CleanResult,
    examples_in,
)
from common.results.statistics import wilson_interval

if TYPE_CHECKING:  # tables are rendered without waiting for torch
    from torch import Tensor

    from common.results.lines import Line, Outcomes

DIGITS = 6
"""Intervals and distances are rounded, so that they are the same text on every machine."""


def mask_of(attack: AttackResult, total: int) -> int:
    """Which of ``total`` examples a step's outcomes are about, as in :func:`packed_bits`."""
    return packed_bits(attack["subset"], total) if "subset" in attack else (1 << total) - 1


def _outcomes_of(attack: AttackResult, total: int, mask: int) -> int:
    """Outcomes at the places of the mask, zeros elsewhere, as in :func:`packed_bits`."""
    bits = packed_bits(attack["outcomes"], attack["examples"])
    if attack["examples"] == total:
        return bits
    found = iter(listed(bits, attack["examples"]))
    return int("".join("01"[next(found)] if is_in else "0" for is_in in listed(mask, total)), 2)


# ----------------------------------------------------------------------------------------- figures


class Figure(NamedTuple):
    """What is behind a metric.

    Args:
        value: The metric.
        mask: Which examples of the split it is about, as in :func:`packed_bits`.
        correct: How many of them are right; ``None`` for a mean of several draws.
        bits: Which of them are right, at their places in the split; ``None`` where examples have no
            outcome of their own: the lowest of several accuracies, a mean.
    """

    value: float
    mask: int
    correct: int | None
    bits: int | None

    @property
    def size(self) -> int:
        """How many examples it is about."""
        return self.mask.bit_count()


def group_of(name: str, attack: AttackResult) -> str:
    """The group of a step: its entry, and its point in a sweep apart from the draw."""
    point = [f"{axis}={value:.6g}" for axis, value in attack["at"].items() if axis != "draw"]
    return "/".join([name.partition("/")[0], *point])


def metrics_of(name: str, attack: AttackResult) -> set[str]:
    """The metrics that a step has a part in, ``worst`` aside."""
    group = group_of(name, attack)
    return {name, group, f"{group}_union", f"{group}_clean"}


def is_audit(name: str) -> bool:
    """Whether a step belongs to an audit, which no suite entry may be called after."""
    return name.startswith("audit")


def counts_as_attack(attack: AttackResult) -> bool:
    """Whether a step enters ``worst``."""
    return attack["kind"] == "attack" and attack["counts"]


def figures(clean: CleanResult, attacks: Mapping[str, AttackResult]) -> dict[str, Figure]:
    """What is behind every accuracy, by name.

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
    - ``worst``: of the examples that met every attack with ``counts``, those that are right clean
      and under all of them (see :func:`worst_over`); ``worst_clean`` as above. Absent for the
      reasons of :func:`missing_worst`.
    """
    steps = _steps(clean, attacks)
    found = dict(steps)
    clean_bits, every = cast(int, steps["clean_acc"].bits), steps["clean_acc"].mask
    groups: dict[str, list[str]] = {}
    for name, attack in attacks.items():
        groups.setdefault(group_of(name, attack), []).append(name)
    for group, names in groups.items():
        mask = steps[names[0]].mask
        kinds = {attacks[name]["kind"] for name in names}
        if len(kinds) > 1 or any(steps[name].mask != mask for name in names):
            continue
        outcomes = [cast(int, steps[name].bits) for name in names]
        cumulative = {attacks[name]["survivors_only"] for name in names}
        if len(cumulative) == 1:
            found[group] = _combined(outcomes, mask, kinds == {"noise"})
        if cumulative == {False} and kinds == {"attack"}:
            found[f"{group}_union"] = _share(reduce(and_, outcomes), mask)
        if mask != every:
            found[f"{group}_clean"] = _share(clean_bits & mask, mask)
    if counted := _worst_over(steps, attacks):
        found["worst"] = _together(steps, counted)
        if (mask := found["worst"].mask) != every:
            found["worst_clean"] = _share(clean_bits & mask, mask)
    return found


def worst_over(clean: CleanResult, attacks: Mapping[str, AttackResult]) -> list[str]:
    """The steps that ``worst`` is over, by name; empty where there is no worst case.

    Attacks of an audit are made on a part of the examples. They enter if one of them breaks an
    example that the suite did not, or if the suite alone has no worst case.
    """
    return _worst_over(_steps(clean, attacks), attacks)


def _steps(clean: CleanResult, attacks: Mapping[str, AttackResult]) -> dict[str, Figure]:
    """The figures of ``clean_acc`` and of every step."""
    total = examples_in(clean["per_class"])
    found = {"clean_acc": _share(packed_bits(clean["outcomes"], total), (1 << total) - 1)}
    for name, attack in attacks.items():
        mask = mask_of(attack, total)
        found[name] = _share(_outcomes_of(attack, total, mask), mask)
    return found


def _together(steps: Mapping[str, Figure], names: Sequence[str]) -> Figure:
    """Of the examples that met all of these steps, those that are right clean and under all."""
    chosen = [steps["clean_acc"], *(steps[name] for name in names)]
    mask = reduce(and_, (step.mask for step in chosen))
    return _share(reduce(and_, (cast(int, step.bits) for step in chosen), mask), mask)


def _worst_over(steps: Mapping[str, Figure], attacks: Mapping[str, AttackResult]) -> list[str]:
    def is_evidence(names: Sequence[str]) -> bool:
        strong = any(not attacks[name].get("weakness") for name in names)
        found = _together(steps, names)
        return bool(names) and found.mask != 0 and (strong or found.correct == 0)

    counted = [name for name, attack in attacks.items() if counts_as_attack(attack)]
    suite = [name for name in counted if not is_audit(name)]
    if is_evidence(suite):
        alone, with_audit = _together(steps, suite), _together(steps, counted)
        if not cast(int, alone.bits) & with_audit.mask & ~cast(int, with_audit.bits):
            return suite
    return counted if is_evidence(counted) else []


def _share(bits: int, mask: int) -> Figure:
    correct = bits.bit_count()
    size = mask.bit_count()
    return Figure(correct / size if size else math.nan, mask, correct, bits)


def _combined(outcomes: list[int], mask: int, is_noise: bool) -> Figure:
    """The figure of a group: the mean over draws of noise, the lowest over losses of an attack."""
    if len(outcomes) == 1:
        return _share(outcomes[0], mask)
    counts = [bits.bit_count() for bits in outcomes]
    if is_noise:
        return Figure(fmean(counts) / mask.bit_count(), mask, None, None)
    return Figure(min(counts) / mask.bit_count(), mask, min(counts), None)


def missing_worst(attacks: Mapping[str, AttackResult]) -> str:
    """Why these steps give no ``worst``, as a sentence; empty if nothing was attacked."""
    counted = {name: attack for name, attack in attacks.items() if counts_as_attack(attack)}
    if not attacks:
        return ""
    if not counted:
        what = ", ".join(sorted({name.partition("/")[0] for name in attacks}))
        return (
            f"there is no worst case: no attack kept to the threat model (there are {what}); give "
            "the threat the norm and radius of the attacks, or the attacks those of the threat"
        )
    if all(not attack.get("weakness") for attack in counted.values()):
        return "there is no worst case: no example met every attack"
    reasons = [
        f"{name}: {attack['weakness']}"
        for name, attack in counted.items()
        if attack.get("weakness")
    ]
    more = f"; and {len(reasons) - 3} more" if len(reasons) > 3 else ""
    return (
        "there is no worst case: no attack used the whole radius of the threat and moved the "
        f"images ({'; '.join(reasons[:3])}{more}); add one that does"
    )


def sizes(found: Mapping[str, Figure]) -> dict[str, int]:
    """How many examples a figure is about, where those are not all."""
    total = found["clean_acc"].size
    return {name: figure.size for name, figure in found.items() if figure.size < total}


def intervals(found: Mapping[str, Figure]) -> dict[str, list[float]]:
    """``[low, high]`` of every figure that is a share of examples; a mean over draws is none.

    They are 95 % score intervals and stand for the choice of test examples alone; for the lowest of
    several accuracies they are those of the lowest, as if it had been the only one.
    """
    return {
        name: [round(end, DIGITS) for end in wilson_interval(figure.correct, figure.size)]
        for name, figure in found.items()
        if figure.correct is not None
    }


def outcome_bits(checkpoint: CheckpointResult, metric: str) -> list[bool] | None:
    """Which of its examples a metric counts as right, in the order of the split.

    There is an answer for ``clean_acc``, a step, a group with one member, ``<group>_union``,
    ``<group>_clean`` and ``worst``. There is none, and ``None`` is returned, for the lowest of
    several losses (an example has one outcome per loss; the union is what to ask for), for a mean
    over draws, and for a metric that was not measured or does not come from outcomes.
    """
    figure = figures(checkpoint["clean"], checkpoint["attacks"]).get(metric)
    if figure is None or figure.bits is None:
        return None
    total = checkpoint["examples"]
    return list(compress(listed(figure.bits, total), listed(figure.mask, total)))


def positions(checkpoint: CheckpointResult, metric: str) -> list[int]:
    """The examples that an accuracy is about, by their place in the split.

    Raises:
        KeyError: If there is no such accuracy.
    """
    figure = figures(checkpoint["clean"], checkpoint["attacks"])[metric]
    total = checkpoint["examples"]
    return list(compress(range(total), listed(figure.mask, total)))


def logged(checkpoint: CheckpointResult) -> dict[str, float]:
    """Metrics by names that tell figures about a part of the split apart: ``worst_on_200``."""
    parts = {name: f"{name}_on_{size}" for name, size in checkpoint["sizes"].items()}
    return {parts.get(name, name): value for name, value in checkpoint["metrics"].items()}


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
        ValueError: If a measure has the name of a metric, or a step has a name that does not begin
            with its entry.
    """
    y = as_list(outcomes.y)
    is_right = as_list(outcomes.correct["clean"])
    clean: CleanResult = {
        "correct": sum(is_right),
        "per_class": _per_class(is_right, y, max(y) + 1),
        "outcomes": pack_outcomes(is_right),
    }
    if nonfinite := _nonfinite(outcomes.columns.get("clean", {}), [True] * len(y)):
        clean["nonfinite"] = nonfinite
    attacks = {name: _attack_entry(outcomes, name, is_right, y) for name in outcomes.attacked}
    threat = outcomes.threat
    found = figures(clean, attacks)
    metrics = {name: figure.value for name, figure in found.items()}
    if taken := set(metrics) & set(measures or ()):
        raise ValueError(f"{min(taken)} is a measure and an accuracy; rename one of them")
    reason = "" if "worst" in found else missing_worst(attacks)
    entry: CheckpointResult = {
        "epoch": epoch,
        "global_step": global_step,
        "examples": len(y),
        "threat": None if threat is None else {"norm": threat.norm, "eps": threat.radius},
        "clean": clean,
        "attacks": attacks,
        "metrics": metrics | dict(measures or {}),
        "intervals": intervals(found),
        "sizes": sizes(found),
        "remarks": [*outcomes.remarks, *filter(None, [reason])],
    }
    if audit is not None:
        entry["audit"] = cast(AuditResult, dict(audit))
    return entry


def _attack_entry(
    outcomes: "Outcomes", name: str, is_right: Sequence[bool], y: Sequence[int]
) -> AttackResult:
    line = _line(outcomes, name)
    within = as_list(outcomes.attacked[name])
    correct = list(compress(as_list(outcomes.correct[name]), within))
    entry: AttackResult = {
        "kind": line.kind,
        "norm": line.norm,
        "eps": line.eps,
        "counts": line.counts,
        "at": dict(line.at),
        "correct": sum(correct),
        "examples": sum(within),
        "survivors_only": line.survivors_only,
        "per_class": _per_class(correct, list(compress(y, within)), max(y) + 1),
        "outcomes": pack_outcomes(correct),
    }
    if not all(within):
        entry["subset"] = pack_outcomes(within)
    if line.weakness:
        entry["weakness"] = line.weakness
    columns = outcomes.columns.get(name, {})
    if nonfinite := _nonfinite(columns, within):
        entry["nonfinite"] = nonfinite
    if "unmoved" in columns:
        entry["unmoved"] = sum(as_list(columns["unmoved"]))
    if norms := [norm for norm in ("linf", "l2") if norm in columns]:
        withstood = as_list(columns.get("correct", outcomes.correct[name]))
        broken = [a and b and not c for a, b, c in zip(is_right, within, withstood, strict=True)]
        entry["distances"] = {
            norm: _median(compress(as_list(columns[norm]), broken)) for norm in norms
        }
    return entry


def _nonfinite(columns: "Mapping[str, Tensor]", within: Sequence[bool]) -> int:
    """For how many of these examples the scores were NaN or infinite."""
    predicted = as_list(columns["predicted"]) if "predicted" in columns else []
    return sum(label < 0 for label in compress(predicted, within))


def _line(outcomes: "Outcomes", name: str) -> "Line":
    from common.results.lines import Line

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


def _per_class(correct: Sequence[bool], y: Sequence[int], classes: int) -> list[list[int]]:
    """``[correct, total]`` of each class."""
    counts = [[0, 0] for _ in range(classes)]
    for outcome, label in zip(correct, y, strict=True):
        counts[label][0] += outcome
        counts[label][1] += 1
    return counts
