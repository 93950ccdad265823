"""Result files: what one experiment measured with one seed, and where those figures come from.

Everything under ``checkpoints`` follows from a checkpoint and the configuration, so a repeated
evaluation writes the same text; times, places and versions are under ``provenance``.

``python -m common.tables paper_x`` sets them beside the paper's printed numbers.
"""

import json
import os
import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict, cast

from common.errors import ConfigurationError, RunDirectoryError

if TYPE_CHECKING:  # tables are rendered without waiting for torch
    from torch import Tensor

    from common.evaluation import Outcomes

SCHEMA = 1
LABELS = ("last", "selected")
"""The checkpoints tables show, in this order."""


class CleanResult(TypedDict):
    """Outcomes on clean images.

    Keys:
        correct: Number of examples classified correctly.
        per_class: ``[correct, total]`` for each class.
        outcomes: One bit per example in the order of the split, see :func:`pack_outcomes`.
    """

    correct: int
    per_class: list[list[int]]
    outcomes: str


class AttackResult(TypedDict):
    """Outcomes under one attack with one loss, on the first ``examples`` examples of the split.

    With ``survivors_only`` the attack met only what all earlier attacks had left standing, and the
    outcome of any other example is its earlier one, so ``correct`` is cumulative.
    """

    correct: int
    examples: int
    survivors_only: bool
    per_class: list[list[int]]
    outcomes: str


class CheckpointResult(TypedDict):
    """One checkpoint on ``examples`` examples; ``attacks`` are in the order of the suite."""

    epoch: int
    global_step: int
    examples: int
    clean: CleanResult
    attacks: dict[str, AttackResult]
    metrics: dict[str, float]


class Provenance(TypedDict):
    """Where the figures of a checkpoint come from; other keys may be added for the reader."""

    config_digest: str
    checkpoint_digest: NotRequired[str]
    date: NotRequired[str]


class Result(TypedDict):
    """A result file; ``checkpoints`` and ``provenance`` have the same keys."""

    schema: int
    paper: str
    experiment: str
    seed: int
    checkpoints: dict[str, CheckpointResult]
    provenance: dict[str, Provenance]


def result_path(folder: str | Path, experiment: str, seed: int) -> Path:
    """Where the result of an experiment with a seed is kept."""
    return Path(folder) / f"{experiment}-seed{seed}.json"


# ------------------------------------------------------------------------- outcomes and metrics


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
    value = _bits(text, n)
    return [bool(value >> (n - 1 - position) & 1) for position in range(n)]


def summarise(clean: CleanResult, attacks: Mapping[str, AttackResult]) -> dict[str, float]:
    """Accuracies in [0, 1]; a group is what stands before ``/`` in the names of its attacks.

    - ``clean_acc``, and every attack under its own name;
    - a group: its lowest accuracy over losses. All of them must be about the same examples, and
      either none or all ``survivors_only``; in the latter case the figure is cumulative;
    - ``<group>_union``: examples that withstand every loss of the group; not for
      ``survivors_only``, where it would say the same;
    - ``<group>_clean``: clean accuracy on the group's examples, where those are not all;
    - ``worst``: examples that are right clean and under every attack that was tried on them.
    """
    total = _examples(clean["per_class"])
    clean_bits = worst = _bits(clean["outcomes"], total)
    metrics = {"clean_acc": clean["correct"] / total}
    groups: dict[str, list[AttackResult]] = {}
    for name, attack in attacks.items():
        metrics[name] = attack["correct"] / attack["examples"]
        groups.setdefault(name.partition("/")[0], []).append(attack)
        untried = total - attack["examples"]
        worst &= _bits(attack["outcomes"], attack["examples"]) << untried | ((1 << untried) - 1)
    for name, members in groups.items():
        size = members[0]["examples"]
        if any(member["examples"] != size for member in members):
            continue
        cumulative = {member["survivors_only"] for member in members}
        if len(cumulative) == 1:
            metrics[name] = min(member["correct"] for member in members) / size
        if cumulative == {False}:
            union = (1 << size) - 1
            for member in members:
                union &= _bits(member["outcomes"], size)
            metrics[f"{name}_union"] = union.bit_count() / size
        if size < total:
            metrics[f"{name}_clean"] = (clean_bits >> (total - size)).bit_count() / size
    metrics["worst"] = worst.bit_count() / total
    return metrics


def checkpoint_entry(
    outcomes: "Outcomes",
    survivors_only: Mapping[str, bool],
    epoch: int = 0,
    global_step: int = 0,
) -> CheckpointResult:
    """What a result file says about one checkpoint.

    Args:
        outcomes: Of the whole split, in the order of its examples.
        survivors_only: For each group of attacks, whether it attacked survivors only.
        epoch: Of the checkpoint, from 0.
        global_step: Optimiser steps behind the checkpoint.
    """
    y = _as_list(outcomes.y)
    attacks: dict[str, AttackResult] = {}
    for name, mask in outcomes.attacked.items():
        size = sum(_as_list(mask))
        if not all(_as_list(mask)[:size]):
            raise ValueError(f"{name} attacked {size} examples that are not the first of the split")
        correct = _as_list(outcomes.correct[name])[:size]
        attacks[name] = {
            "correct": sum(correct),
            "examples": size,
            "survivors_only": survivors_only[name.partition("/")[0]],
            "per_class": _per_class(correct, y),
            "outcomes": pack_outcomes(correct),
        }
    correct = _as_list(outcomes.correct["clean"])
    clean: CleanResult = {
        "correct": sum(correct),
        "per_class": _per_class(correct, y),
        "outcomes": pack_outcomes(correct),
    }
    return {
        "epoch": epoch,
        "global_step": global_step,
        "examples": len(y),
        "clean": clean,
        "attacks": attacks,
        "metrics": summarise(clean, attacks),
    }


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


def _examples(per_class: list[list[int]]) -> int:
    return sum(total for _, total in per_class)


def _bits(text: str, n: int) -> int:
    """Packed booleans as an ``n``-bit integer whose highest bit is the first."""
    padding = -n % 8
    if len(text) != (n + padding) // 4:
        raise ValueError(f"{len(text)} hexadecimal digits do not hold {n} outcomes")
    value = int(text or "0", 16)
    if value & ((1 << padding) - 1):
        raise ValueError(f"there are outcomes beyond the first {n}")
    return value >> padding


# --------------------------------------------------------------------------------------- writing


def write_json_atomically(path: str | Path, data: Mapping[str, Any]) -> None:
    """Write a JSON file that is at every moment either the old one or the new one.

    Raises:
        RunDirectoryError: If the file cannot be written.
        TypeError, ValueError: If ``data`` is not JSON (NaN is not); nothing is touched then.
    """
    write_text_atomically(path, _to_json(data) + "\n")


def write_text_atomically(path: str | Path, text: str) -> None:
    """Write a file that is at every moment either the old one or the new one.

    Raises:
        RunDirectoryError: If it cannot be written.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # In the same folder, since a rename is atomic only within one file system.
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-", suffix=".tmp")
        temporary = Path(name)
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp lets nobody else read
        temporary.replace(path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def check_writable(path: str | Path) -> None:
    """Make sure that a file can be written later, without touching it.

    Raises:
        RunDirectoryError: If it cannot.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        if path.is_dir():
            raise IsADirectoryError(0, "it is a folder")
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> RunDirectoryError:
    return RunDirectoryError(
        f"cannot write {path}: {error.strerror or error}; make {path.parent} a writable folder "
        "with free space, or choose another file"
    )


def _to_json(data: Any, indent: str = "") -> str:
    """JSON with a line per key and every list on one line, in the order of the keys."""
    if not isinstance(data, Mapping) or not data:
        return json.dumps(data, ensure_ascii=False, allow_nan=False)
    inner = indent + "  "
    lines = (
        f"{inner}{json.dumps(str(key), ensure_ascii=False)}: {_to_json(value, inner)}"
        for key, value in data.items()
    )
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"


def merge_result(
    path: str | Path,
    *,
    paper: str,
    experiment: str,
    seed: int,
    label: str,
    entry: CheckpointResult,
    provenance: Mapping[str, Any],
) -> Result:
    """Put one checkpoint into a result file, and return what the file then holds.

    Other checkpoints stay if they have the same ``config_digest``; those of other settings go. A
    file that cannot be read is set aside with a warning, since by now the compute has been spent.

    Args:
        path: The result file.
        paper: Package of the experiment.
        experiment: Its name.
        seed: Of the run.
        label: Of the checkpoint: ``last``, ``selected`` or another file's stem.
        entry: What was measured.
        provenance: Where it comes from; ``config_digest`` must be there.

    Raises:
        ConfigurationError: If the entry contradicts itself, or the file is another experiment's.
        RunDirectoryError: If the file cannot be written.
    """
    path = Path(path)
    checkpoints = {label: entry}
    origins = {label: cast(Provenance, dict(provenance))}
    for other, (checkpoint, origin) in _kept(path, paper, experiment, seed).items():
        if other != label and origin["config_digest"] == origins[label]["config_digest"]:
            checkpoints[other], origins[other] = checkpoint, origin
    order = sorted(checkpoints, key=_label_order)
    merged: Result = {
        "schema": SCHEMA,
        "paper": paper,
        "experiment": experiment,
        "seed": seed,
        "checkpoints": {name: checkpoints[name] for name in order},
        "provenance": {name: origins[name] for name in order},
    }
    if problem := _problem(merged):
        raise ConfigurationError(f"the result for {path} contradicts itself: {problem}")
    write_json_atomically(path, merged)
    return merged


def _kept(
    path: Path, paper: str, experiment: str, seed: int
) -> dict[str, tuple[CheckpointResult, Provenance]]:
    """The checkpoints a file holds already, with their provenance."""
    if not path.exists():
        return {}
    try:
        old = read_result(path)
    except ConfigurationError as error:
        aside = path.with_name(f"{path.name}.unreadable")
        path.replace(aside)
        warnings.warn(f"{error} (kept as {aside.name})", stacklevel=3)
        return {}
    if (old["paper"], old["experiment"], old["seed"]) != (paper, experiment, seed):
        raise ConfigurationError(
            f"{path} holds {old['paper']} {old['experiment']} with seed {old['seed']}, the new "
            f"result is {paper} {experiment} with seed {seed}; choose another file with "
            "--evaluation.results"
        )
    return {
        name: (old["checkpoints"][name], old["provenance"][name]) for name in old["checkpoints"]
    }


def _label_order(label: str) -> tuple[int, str]:
    """The same order whichever checkpoint was measured first."""
    return (LABELS.index(label) if label in LABELS else len(LABELS), label)


# --------------------------------------------------------------------------------------- reading


def read_result(path: str | Path) -> Result:
    """Read a result file and check it.

    Raises:
        ConfigurationError: If the file is missing, is no result of this schema, or contradicts
            itself (counts, outcomes and metrics are compared); the message says where.
    """
    path = Path(path)
    remedy = "delete it and run the experiment's test again, which needs no training"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path} cannot be read as JSON ({error}); {remedy}") from error
    if problem := _problem(data):
        raise ConfigurationError(f"{path} is no result of schema {SCHEMA}: {problem}; {remedy}")
    return cast(Result, data)


def load_results(folder: str | Path) -> list[Result]:
    """All results of a folder, by experiment and seed; a folder that is not there has none.

    Raises:
        ConfigurationError: If a file is damaged, or named after another experiment or seed.
    """
    results = []
    for path in Path(folder).glob("*-seed*.json"):
        result = read_result(path)
        expected = result_path(folder, result["experiment"], result["seed"]).name
        if path.name != expected:
            raise ConfigurationError(
                f"{path} holds {result['experiment']} with seed {result['seed']}, which belongs "
                f"in {expected}; rename or delete it"
            )
        results.append(result)
    return sorted(results, key=lambda result: (result["experiment"], result["seed"]))


def _problem(data: Any) -> str:
    """What keeps ``data`` from being a :class:`Result`; empty if nothing does."""
    try:
        _check_result(data)
    except KeyError as error:
        return f"{error.args[0]} is missing"
    except (TypeError, ValueError, AttributeError) as error:
        return str(error)
    return ""


def _check_result(data: Any) -> None:
    if not isinstance(data, Mapping):
        raise TypeError(f"expected an object, got {type(data).__name__}")
    if data["schema"] != SCHEMA:
        raise ValueError(f"its schema is {data['schema']!r}")
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
        _check_checkpoint(checkpoint, f"checkpoints.{label}.")


def _check_checkpoint(checkpoint: Mapping[str, Any], place: str) -> None:
    for key in ("epoch", "global_step", "examples"):
        _check_type(checkpoint, key, int, place)
    total = checkpoint["examples"]
    if total < 1:
        raise ValueError(f"{place}examples is {total}, expected at least 1")
    _check_counts(checkpoint["clean"], total, f"{place}clean.")
    for name, attack in checkpoint["attacks"].items():
        where = f"{place}attacks.{name}."
        _check_type(attack, "examples", int, where)
        _check_type(attack, "survivors_only", bool, where)
        if not 1 <= attack["examples"] <= total:
            raise ValueError(f"{where}examples is {attack['examples']}, expected 1 to {total}")
        _check_counts(attack, attack["examples"], where)
    for key in checkpoint["metrics"]:
        _check_type(checkpoint["metrics"], key, (int, float), f"{place}metrics.")
    for key, value in summarise(checkpoint["clean"], checkpoint["attacks"]).items():
        if abs(checkpoint["metrics"].get(key, -1.0) - value) > 1e-9:
            stored = checkpoint["metrics"].get(key)
            raise ValueError(f"{place}metrics.{key} is {stored}, the outcomes give {value}")


def _check_counts(entry: Mapping[str, Any], total: int, place: str) -> None:
    _check_type(entry, "correct", int, place)
    _check_type(entry, "outcomes", str, place)
    if _examples(entry["per_class"]) != total:
        raise ValueError(f"{place}per_class has {_examples(entry['per_class'])}, not {total}")
    try:
        counted = _bits(entry["outcomes"], total).bit_count()
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
    if not isinstance(data[key], kind) or (isinstance(data[key], bool) and kind is not bool):
        raise TypeError(f"{place}{key} is {data[key]!r}")
