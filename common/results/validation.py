"""Whether a result file says what it has to, and nothing that contradicts itself."""

import math
from collections.abc import Mapping
from typing import Any, cast

from common.files import content_digest
from common.results.outcomes import (
    examples_in,
    figures,
    intervals,
    mask_of,
    missing_worst,
    packed_bits,
    sizes,
)
from common.results.schema import SCHEMA, AttackResult, Result

NUMBER = (int, float)
NULLABLE_NUMBER = (int, float, type(None))
MOST_EXAMPLES = 10**6


def problem_of(data: Any) -> str:
    """The first reason why ``data`` is no ``Result`` (:mod:`common.results.schema`), or empty."""
    try:
        _check_result(data)
        _check_digest(data)
    except KeyError as error:
        return f"{error.args[0]} is missing"
    except (TypeError, ValueError, AttributeError) as error:
        return str(error)
    return ""


def _check_result(data: Any) -> None:
    if not isinstance(data, dict):
        raise TypeError(f"expected an object, got {type(data).__name__}")
    _check_type(data, "schema", int, "its ")
    if data["schema"] != SCHEMA:
        raise ValueError(f"its schema is {data['schema']}")
    for key, kind in (("paper", str), ("experiment", str), ("seed", int)):
        _check_type(data, key, kind, "")
    if not data["checkpoints"]:
        raise ValueError("checkpoints is empty")
    if set(data["provenance"]) != set(data["checkpoints"]):
        raise ValueError(
            f"provenance is about {sorted(data['provenance'])}, checkpoints about "
            f"{sorted(data['checkpoints'])}"
        )
    for label, checkpoint in data["checkpoints"].items():
        _check_type(data["provenance"][label], "config_digest", str, f"provenance.{label}.")
        _check_type(data["checkpoints"], label, dict, "checkpoints.")
        place = f"checkpoints.{label}."
        _check_outcomes(checkpoint, place)
        _check_figures(checkpoint, place)
        if "audit" in checkpoint:
            _check_audit(checkpoint["audit"], f"{place}audit.")


def _check_digest(data: dict[str, Any]) -> None:
    """Hold what the file says against what was written; one edited by hand has no digest."""
    if unknown := sorted(set(data) - set(Result.__annotations__)):
        raise ValueError(f"{unknown[0]} is no key of a result")
    found = content_digest({key: value for key, value in data.items() if key != "digest"})
    if data.get("digest", found) != found:
        raise ValueError(
            f"its digest is {str(data['digest'])[:12]}..., its content has {found[:12]}...: it was "
            "damaged, or edited without taking the digest out"
        )


def _check_outcomes(checkpoint: Mapping[str, Any], place: str) -> None:
    for key in ("epoch", "global_step", "examples"):
        _check_type(checkpoint, key, int, place)
    total = checkpoint["examples"]
    if not 1 <= total <= MOST_EXAMPLES:
        raise ValueError(f"{place}examples is {total}, expected 1 to {MOST_EXAMPLES:,}")
    _check_type(checkpoint, "threat", (dict, type(None)), place)
    if checkpoint["threat"] is not None:
        _check_type(checkpoint["threat"], "norm", str, f"{place}threat.")
        _check_type(checkpoint["threat"], "eps", NUMBER, f"{place}threat.")
    _check_counts(checkpoint["clean"], total, f"{place}clean.")
    for name in checkpoint["attacks"]:
        _check_type(checkpoint["attacks"], name, dict, f"{place}attacks.")
        _check_attack(checkpoint["attacks"][name], total, f"{place}attacks.{name}.")


def _check_attack(attack: Mapping[str, Any], total: int, place: str) -> None:
    _check_type(attack, "examples", int, place)
    if not 1 <= attack["examples"] <= total:
        raise ValueError(f"{place}examples is {attack['examples']}, expected 1 to {total}")
    _check_choice(attack, "kind", ("attack", "noise"), place)
    _check_type(attack, "norm", (str, type(None)), place)
    _check_type(attack, "eps", NULLABLE_NUMBER, place)
    for key in ("survivors_only", "counts"):
        _check_type(attack, key, bool, place)
    for key, kind in (("at", NUMBER), ("distances", NULLABLE_NUMBER)):
        if key == "at" or key in attack:
            _check_type(attack, key, dict, place)
            for name in attack[key]:
                _check_type(attack[key], name, kind, f"{place}{key}.")
    for key in ("subset", "weakness"):
        if key in attack:
            _check_type(attack, key, str, place)
    if (chosen := mask_of(cast(AttackResult, attack), total).bit_count()) != attack["examples"]:
        raise ValueError(f"{place}examples is {attack['examples']}, subset has {chosen}")
    if "unmoved" in attack:
        _check_type(attack, "unmoved", int, place)
    _check_counts(attack, attack["examples"], place)


def _check_figures(checkpoint: Mapping[str, Any], place: str) -> None:
    """Hold metrics, intervals and sizes against the outcomes, which have been checked already."""
    metrics, stored = checkpoint["metrics"], checkpoint["intervals"]
    for key in metrics:
        _check_type(metrics, key, NUMBER, f"{place}metrics.")
    for key in stored:
        _check_type(stored, key, list, f"{place}intervals.")
    known = figures(checkpoint["clean"], checkpoint["attacks"])
    for key, figure in known.items():
        if abs(metrics.get(key, -1.0) - figure.value) > 1e-9:
            raise ValueError(
                f"{place}metrics.{key} is {metrics.get(key)}, the outcomes give {figure.value}"
            )
    if "worst" in metrics and "worst" not in known:
        reason = missing_worst(checkpoint["clean"], checkpoint["attacks"]) or "no attack counts"
        raise ValueError(f"{place}metrics.worst is {metrics['worst']}, but {reason}")
    for key, ends in intervals(known).items():
        found = stored.get(key)
        if found is None or len(found) != 2 or max(map(_difference, found, ends)) > 2e-6:
            raise ValueError(f"{place}intervals.{key} is {found}, the outcomes give {ends}")
    if checkpoint["sizes"] != (expected := sizes(known)):
        raise ValueError(f"{place}sizes is {checkpoint['sizes']}, the outcomes give {expected}")
    _check_type(checkpoint, "remarks", list, place)


def _difference(one: float, other: float) -> float:
    return abs(one - other)


def _check_audit(audit: Mapping[str, Any], place: str) -> None:
    _check_type(audit, "examples", int, place)
    _check_type(audit, "checks", list, place)
    for number, check in enumerate(audit["checks"]):
        where = f"{place}checks.{number}."
        for key in ("id", "question", "detail"):
            _check_type(check, key, str, where)
        for key in ("value", "threshold"):
            _check_type(check, key, NULLABLE_NUMBER, where)
        _check_choice(check, "verdict", ("pass", "fail", "not applicable"), where)


def _check_counts(entry: Mapping[str, Any], total: int, place: str) -> None:
    _check_type(entry, "correct", int, place)
    _check_type(entry, "outcomes", str, place)
    if "nonfinite" in entry:
        _check_type(entry, "nonfinite", int, place)
    if examples_in(entry["per_class"]) != total:
        raise ValueError(f"{place}per_class has {examples_in(entry['per_class'])}, not {total}")
    try:
        counted = packed_bits(entry["outcomes"], total).bit_count()
    except ValueError as error:
        raise ValueError(f"{place}outcomes: {error}") from error
    in_classes = sum(correct for correct, _ in entry["per_class"])
    for what, value in (("outcomes", counted), ("per_class", in_classes)):
        if value != entry["correct"]:
            raise ValueError(f"{place}correct is {entry['correct']}, {what} gives {value}")


def _check_type(
    data: Mapping[str, Any], key: str, kind: type | tuple[type, ...], place: str
) -> None:
    if key not in data:
        raise KeyError(f"{place}{key}")
    value = data[key]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"{place}{key} is {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{place}{key} is {value}")


def _check_choice(data: Mapping[str, Any], key: str, choices: tuple[str, ...], place: str) -> None:
    _check_type(data, key, str, place)
    if data[key] not in choices:
        raise ValueError(f"{place}{key} is {data[key]!r}, expected {' or '.join(choices)}")
