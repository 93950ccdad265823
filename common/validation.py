"""Whether a result file says what it has to, and nothing that contradicts itself."""

import math
from collections.abc import Mapping
from typing import Any

from common.files import content_digest
from common.outcomes import examples_in, intervals, packed_bits, summarise
from common.schema import SCHEMA, Result

NUMBER = (int, float)
NULLABLE_NUMBER = (int, float, type(None))


def problem_of(data: Any) -> str:
    """What keeps ``data`` from being a :class:`~common.schema.Result`; empty if nothing does.

    An older schema is brought up to :data:`SCHEMA` in place.
    """
    try:
        found = _digest_of(data)
        _check_result(data)
        _check_digest(data, found)
    except KeyError as error:
        return f"{error.args[0]} is missing"
    except (TypeError, ValueError, AttributeError) as error:
        return str(error)
    return ""


def _check_result(data: Any) -> None:
    if not isinstance(data, dict):
        raise TypeError(f"expected an object, got {type(data).__name__}")
    _check_type(data, "schema", int, "its ")
    if data["schema"] not in (1, SCHEMA):
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
    is_old = data["schema"] == 1
    for label, checkpoint in data["checkpoints"].items():
        _check_type(data["provenance"][label], "config_digest", str, f"provenance.{label}.")
        _check_type(data["checkpoints"], label, dict, "checkpoints.")
        place = f"checkpoints.{label}."
        if is_old:
            checkpoint = data["checkpoints"][label] = _migrated(checkpoint)
        _check_outcomes(checkpoint, place)
        if is_old:
            checkpoint["intervals"] = intervals(checkpoint["clean"], checkpoint["attacks"])
        _check_figures(checkpoint, place)
        if "audit" in checkpoint:
            _check_audit(checkpoint["audit"], f"{place}audit.")
    if is_old:
        data["schema"] = SCHEMA


def _digest_of(data: Any) -> str:
    """Digest of what the file says, before anything is migrated; empty if it carries none."""
    if not isinstance(data, dict) or "digest" not in data:
        return ""
    return content_digest({key: value for key, value in data.items() if key != "digest"})


def _check_digest(data: dict[str, Any], found: str) -> None:
    """Hold what the file says against what was written; files from before digests have none."""
    if unknown := sorted(set(data) - set(Result.__annotations__)):
        raise ValueError(f"{unknown[0]} is no key of a result")
    if data.get("digest", "") != found:
        raise ValueError(
            f"its digest is {str(data['digest'])[:12]}..., its content has {found[:12]}...: it was "
            "damaged, or edited without taking the digest out"
        )


def _migrated(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint of schema 1 without its intervals, with the keys in the order of new ones."""
    plain = {"kind": "attack", "norm": None, "eps": None, "counts": True}
    front = {key: checkpoint[key] for key in ("epoch", "global_step", "examples")}
    attacks = {
        name: {**plain, "at": {}, **attack} for name, attack in checkpoint["attacks"].items()
    }
    metrics = dict(checkpoint["metrics"])
    if not attacks:
        metrics.pop("worst", None)  # it was the clean accuracy then
    return {**front, "threat": None, **checkpoint, "attacks": attacks, "metrics": metrics}


def _check_outcomes(checkpoint: Mapping[str, Any], place: str) -> None:
    for key in ("epoch", "global_step", "examples"):
        _check_type(checkpoint, key, int, place)
    total = checkpoint["examples"]
    if total < 1:
        raise ValueError(f"{place}examples is {total}, expected at least 1")
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
    _check_counts(attack, attack["examples"], place)


def _check_figures(checkpoint: Mapping[str, Any], place: str) -> None:
    """Hold metrics and intervals against the outcomes, which have been checked already."""
    metrics, stored = checkpoint["metrics"], checkpoint["intervals"]
    for key in metrics:
        _check_type(metrics, key, NUMBER, f"{place}metrics.")
    for key in stored:
        _check_type(stored, key, list, f"{place}intervals.")
    known = summarise(checkpoint["clean"], checkpoint["attacks"])
    for key, value in known.items():
        if abs(metrics.get(key, -1.0) - value) > 1e-9:
            raise ValueError(
                f"{place}metrics.{key} is {metrics.get(key)}, the outcomes give {value}"
            )
    if "worst" in metrics and "worst" not in known:
        raise ValueError(f"{place}metrics.worst is {metrics['worst']}, but no attack counts")
    for key, ends in intervals(checkpoint["clean"], checkpoint["attacks"]).items():
        found = stored.get(key)
        if found is None or len(found) != 2 or max(map(_difference, found, ends)) > 2e-6:
            raise ValueError(f"{place}intervals.{key} is {found}, the outcomes give {ends}")


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
