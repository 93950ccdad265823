"""Outcomes of every example, and the figures that follow from them.

:func:`checkpoint_entry` computes what a result file says about one checkpoint, figures included.
They are stored, and not computed again when results are merged or read.
"""

from collections.abc import Mapping, Sequence
from functools import reduce
from operator import and_
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from common.results.packing import Bits, pack_outcomes, unpack_outcomes
from common.results.schema import AttackResult, CheckpointResult, CleanResult, examples_in
from common.results.statistics import wilson_interval

if TYPE_CHECKING:  # tables are rendered without waiting for torch
    from torch import Tensor

    from common.results.lines import Line, Outcomes

DIGITS = 6
"""Intervals and distances are rounded, so that they are the same text on every machine."""

MOST_CLASSES = 100
"""Of a confusion matrix in a result file."""

# ----------------------------------------------------------------------------------------- figures


class Figure(NamedTuple):
    """What is behind a metric.

    Args:
        value: The metric.
        mask: Which examples of the split it is about.
        correct: How many of them are right; ``None`` for a mean of several draws.
        bits: Which examples of the split are among them and right; ``None`` where there is no
            outcome per example: the lowest of several accuracies, a mean.
    """

    value: float
    mask: Bits
    correct: int | None
    bits: Bits | None

    @property
    def size(self) -> int:
        """How many examples it is about."""
        return int(self.mask.sum())


def group_of(name: str, attack: AttackResult) -> str:
    """The group of a step: its entry, and its point in a sweep apart from the draw."""
    point = [f"{axis}={value:.6g}" for axis, value in attack["at"].items() if axis != "draw"]
    return "/".join([name.partition("/")[0], *point])


def _groups_of(name: str, attack: AttackResult) -> list[str]:
    """All groups of a step; a corruption is also in one of its severities, and in one of all."""
    group = group_of(name, attack)
    if attack["kind"] != "corruption":
        return [group]
    entry, _, rest = name.partition("/")
    return [group, f"{entry}/{rest.partition('/')[0]}", entry]


def metrics_of(name: str, attack: AttackResult) -> set[str]:
    """The metrics that a step has a part in, ``worst`` aside."""
    ends = ("", "_union", "_clean")
    return {name, *(group + end for group in _groups_of(name, attack) for end in ends)}


def is_audit(name: str) -> bool:
    """Whether a step belongs to an audit, which no suite entry may be called after."""
    return name.startswith("audit")


ENSEMBLE = ("apgd-ce", "apgd-t", "fab-t", "square")
"""The attacks of AutoAttack's standard version."""


def cut_from_autoattack(attacks: Mapping[str, AttackResult]) -> str:
    """What the entry ``aa`` has less than AutoAttack's standard version, in words.

    Empty if it has everything, or there is no such entry.
    """
    parts = {name.partition("/")[2]: one for name, one in attacks.items() if name.startswith("aa/")}
    lacking = [name for name in ENSEMBLE if name not in parts] if parts else []
    recipes = (one.get("recipe", "").split(", ") for one in parts.values())
    fewer = ("steps ", "square_queries ")
    changed = dict.fromkeys(word for words in recipes for word in words if word.startswith(fewer))
    return ", ".join([*(f"without {name}" for name in lacking), *changed])


def counts_as_attack(attack: AttackResult) -> bool:
    """Whether a step enters ``worst``."""
    return attack["kind"] == "attack" and attack["counts"]


def figures(clean: CleanResult, attacks: Mapping[str, AttackResult]) -> dict[str, Figure]:
    """What is behind every accuracy, by name; README.md lists the names.

    Steps of one entry and one point of a sweep are a group; the draws of a noise are one point.
    Corruptions have means over those of a severity, the severities of one, and all of an entry. A
    group has figures if its steps are about the same examples, and a lowest accuracy if none or
    all of them are cumulative (``survivors_only``). The union is left out where it would say the
    same. ``worst`` is absent for the reasons of :func:`missing_worst`.
    """
    found = _steps(clean, attacks)
    every = found["clean_acc"]
    groups: dict[str, list[str]] = {}
    for name, attack in attacks.items():
        for group in _groups_of(name, attack):
            groups.setdefault(group, []).append(name)
    counted = _worst_over(found, attacks)
    for group, names in groups.items():
        steps = [found[name] for name in names]
        kinds = {attacks[name]["kind"] for name in names}
        if len(kinds) > 1 or any((step.mask != steps[0].mask).any() for step in steps):
            continue
        cumulative = {attacks[name]["survivors_only"] for name in names}
        if len(cumulative) == 1:
            found[group] = _combined(steps, kinds != {"attack"})
        if cumulative == {False} and kinds == {"attack"}:
            found[f"{group}_union"] = _together(steps)
        if not steps[0].mask.all():
            found[f"{group}_clean"] = _together([every, steps[0]._replace(bits=steps[0].mask)])
    if counted:
        worst = found["worst"] = _together([every, *(found[name] for name in counted)])
        if not worst.mask.all():
            found["worst_clean"] = _together([every, worst._replace(bits=worst.mask)])
    return found


def worst_over(clean: CleanResult, attacks: Mapping[str, AttackResult]) -> list[str]:
    """The steps that ``worst`` is over, by name; empty where there is no worst case.

    Attacks of an audit are usually made on a part of the examples. They enter if one of them breaks
    an example that the suite did not, if the worst case is then about as many examples, or if the
    suite alone has no worst case.
    """
    return _worst_over(_steps(clean, attacks), attacks)


def _steps(clean: CleanResult, attacks: Mapping[str, AttackResult]) -> dict[str, Figure]:
    """The figures of ``clean_acc`` and of every step."""
    total = examples_in(clean["per_class"])
    every = np.ones(total, dtype=bool)
    found = {"clean_acc": _share(unpack_outcomes(clean["outcomes"], total), every)}
    for name, attack in attacks.items():
        mask = unpack_outcomes(attack["subset"], total) if "subset" in attack else every
        bits = np.zeros(total, dtype=bool)
        bits[mask] = unpack_outcomes(attack["outcomes"], attack["examples"])
        found[name] = _share(bits, mask)
    return found


def _worst_over(steps: Mapping[str, Figure], attacks: Mapping[str, AttackResult]) -> list[str]:
    def of(names: Sequence[str]) -> Figure:
        return _together([steps["clean_acc"], *(steps[name] for name in names)])

    def is_evidence(names: Sequence[str]) -> bool:
        is_strong = any(not attacks[name].get("weakness") for name in names)
        found = of(names)
        return bool(names) and found.size > 0 and (is_strong or found.correct == 0)

    counted = [name for name, attack in attacks.items() if counts_as_attack(attack)]
    suite = [name for name in counted if not is_audit(name)]
    if is_evidence(suite):
        alone, whole = of(suite), of(counted)
        fallen = cast(Bits, alone.bits) & whole.mask & ~cast(Bits, whole.bits)
        if whole.size < alone.size and not fallen.any():
            return suite
    return counted if is_evidence(counted) else []


def _share(bits: Bits, mask: Bits) -> Figure:
    correct, size = int(bits.sum()), int(mask.sum())
    return Figure(correct / size if size else float("nan"), mask, correct, bits)


def _together(steps: Sequence[Figure]) -> Figure:
    """Of the examples that all of these are about, those that are right in all of them."""
    mask = reduce(and_, (step.mask for step in steps))
    return _share(reduce(and_, (cast(Bits, step.bits) for step in steps), mask), mask)


def _combined(steps: Sequence[Figure], is_mean: bool) -> Figure:
    """The figure of a group: the mean for noise and corruptions, the lowest over losses else."""
    if len(steps) == 1:
        return steps[0]
    counts = [cast(int, step.correct) for step in steps]
    if is_mean:
        return Figure(fmean(counts) / steps[0].size, steps[0].mask, None, None)
    return min(steps, key=lambda step: step.value)._replace(bits=None)


def missing_worst(attacks: Mapping[str, AttackResult]) -> str:
    """Why these steps give no ``worst``, as a sentence; empty if no attack was to give one."""
    counted = {name: attack for name, attack in attacks.items() if counts_as_attack(attack)}
    if all(attack["kind"] == "corruption" for attack in attacks.values()):
        return ""
    if not counted:
        what = ", ".join(sorted({name.partition("/")[0] for name in attacks}))
        return (
            f"there is no worst case: no attack kept to the threat model (there are {what}); give "
            "the threat the norm and radius of the attacks, or the attacks those of the threat"
        )
    weak = [f"{name}: {a['weakness']}" for name, a in counted.items() if a.get("weakness")]
    if not weak:
        return "there is no worst case: no example was attacked by every attack"
    more = f"; and {len(weak) - 3} more" if len(weak) > 3 else ""
    return (
        "there is no worst case: no attack used the whole radius of the threat and moved the "
        f"images ({'; '.join(weak[:3])}{more}); add one that does"
    )


def derived(clean: CleanResult, attacks: Mapping[str, AttackResult]) -> dict[str, dict[str, Any]]:
    """``metrics``, ``intervals`` and ``sizes`` of a checkpoint, as they are filed.

    Intervals are 95 % score intervals and stand for the choice of test examples alone. A mean over
    draws has none; for the lowest of several accuracies they are those of the lowest, as if it had
    been the only one. Sizes are there for figures that are not about all examples.
    """
    found = figures(clean, attacks)
    return {
        "metrics": {name: figure.value for name, figure in found.items()},
        "intervals": {
            name: [round(end, DIGITS) for end in wilson_interval(figure.correct, figure.size)]
            for name, figure in found.items()
            if figure.correct is not None
        },
        "sizes": {name: figure.size for name, figure in found.items() if not figure.mask.all()},
    }


def outcome_bits(checkpoint: CheckpointResult, metric: str) -> list[bool] | None:
    """Which of its examples a metric counts as right, in the order of the split.

    ``None`` for the lowest of several losses (an example has one outcome per loss; ask for the
    union), for a mean over draws, and for a metric that was not measured or has no outcomes.
    """
    figure = figures(checkpoint["clean"], checkpoint["attacks"]).get(metric)
    if figure is None or figure.bits is None:
        return None
    return cast(list[bool], figure.bits[figure.mask].tolist())


def positions(checkpoint: CheckpointResult, metric: str) -> list[int]:
    """The examples that an accuracy is about, by their place in the split.

    Raises:
        KeyError: If there is no such accuracy.
    """
    figure = figures(checkpoint["clean"], checkpoint["attacks"])[metric]
    return np.flatnonzero(figure.mask).tolist()


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
    """What a result file says about one checkpoint; ``measures`` are put among the metrics.

    Raises:
        ValueError: If a measure has the name of a metric, or a step has a name that does not begin
            with its entry.
    """
    y, every = _array(outcomes.y), np.ones(len(outcomes.y), dtype=bool)
    clean = cast(
        CleanResult,
        _counts(outcomes, "clean", y, every) | _nonfinite(outcomes, "clean", every),
    )
    attacks = {name: _attack_entry(outcomes, name, y) for name in outcomes.attacked}
    found = derived(clean, attacks)
    if taken := set(found["metrics"]) & set(measures or ()):
        raise ValueError(f"{min(taken)} is a measure and an accuracy; rename one of them")
    reason = "" if "worst" in found["metrics"] else missing_worst(attacks)
    threat = outcomes.threat
    entry: dict[str, Any] = {
        "epoch": epoch,
        "global_step": global_step,
        "examples": len(y),
        "threat": None if threat is None else {"norm": threat.norm, "eps": threat.radius},
        "clean": clean,
        "attacks": attacks,
        **found,
        "remarks": [*outcomes.remarks, *filter(None, [reason])],
    }
    classes = len(clean["per_class"])
    is_known = "predicted" in outcomes.columns.get("clean", {})
    if "worst" in found["metrics"] and is_known and classes <= MOST_CLASSES:
        rows = outcomes.y.new_tensor(positions(cast(CheckpointResult, entry), "worst"))
        entry["confusion"] = outcomes.confusion(classes, rows).tolist()
    entry["metrics"].update(measures or {})
    if audit is not None:
        entry["audit"] = dict(audit)
    return cast(CheckpointResult, entry)


def _array(values: "Tensor") -> NDArray[Any]:
    return values.numpy(force=True)


def _counts(outcomes: "Outcomes", name: str, y: NDArray[Any], within: Bits) -> dict[str, Any]:
    """The outcomes of a step on its examples, and how many are right."""
    correct = _array(outcomes.correct[name])
    pairs = [np.bincount(y[part], minlength=y.max() + 1) for part in (within & correct, within)]
    return {
        "correct": int(correct[within].sum()),
        "per_class": np.stack(pairs, axis=1).tolist(),
        "outcomes": pack_outcomes(correct[within]),
    }


def _nonfinite(outcomes: "Outcomes", name: str, within: Bits) -> dict[str, int]:
    """For how many of these examples the scores were NaN or infinite, if for any."""
    predicted = outcomes.columns.get(name, {}).get("predicted")
    count = 0 if predicted is None else int((_array(predicted)[within] < 0).sum())
    return {"nonfinite": count} if count else {}


def _attack_entry(outcomes: "Outcomes", name: str, y: NDArray[Any]) -> AttackResult:
    line, within = _line(outcomes, name), _array(outcomes.attacked[name])
    entry = {
        "kind": line.kind,
        "norm": line.norm,
        "eps": line.eps,
        "counts": line.counts,
        "at": dict(line.at),
        "correct": 0,  # its place in the file
        "examples": int(within.sum()),
        "survivors_only": line.survivors_only,
        **_counts(outcomes, name, y, within),
    }
    if not within.all():
        entry["subset"] = pack_outcomes(within)
    if line.weakness:
        entry["weakness"] = line.weakness
    if line.recipe:
        entry["recipe"] = line.recipe
    entry |= _nonfinite(outcomes, name, within)
    columns = outcomes.columns.get(name, {})
    if "unmoved" in columns:
        entry["unmoved"] = int(_array(columns["unmoved"]).sum())
    if norms := [norm for norm in ("linf", "l2") if norm in columns]:
        withstood = _array(columns.get("correct", outcomes.correct[name])).astype(bool)
        broken = _array(outcomes.correct["clean"]) & within & ~withstood
        entry["distances"] = {norm: _median(_array(columns[norm])[broken]) for norm in norms}
    if name in outcomes.costs:
        cost = outcomes.costs[name]
        entry["passes"] = {key: getattr(cost, key) for key in ("forward", "backward", "queries")}
    return cast(AttackResult, entry)


def _line(outcomes: "Outcomes", name: str) -> "Line":
    from common.results.lines import Line

    entry = name.partition("/")[0]
    line = outcomes.lines.get(name) or Line(entry=entry)
    if line.entry != entry:
        raise ValueError(
            f"{name} belongs to the suite entry {line.entry!r}; its name must begin with that"
        )
    return line


def _median(distances: NDArray[Any]) -> float | None:
    """Of the distances there are; an example that a step was not run on has none."""
    known = distances[np.isfinite(distances)].astype(float)
    return float(f"{np.median(known):.{DIGITS}g}") if known.size else None
