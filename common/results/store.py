"""Result files: what one experiment measured with one seed, and where those figures come from.

:mod:`common.results.schema` describes what is in them.
"""

import re
import warnings
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any, cast

import numpy as np
from filelock import FileLock

from common.errors import ConfigurationError
from common.files import check_writable, content_digest, read_sealed_json, write_json_atomically
from common.limits import read_json
from common.results.labels import LABELS
from common.results.markdown import one_line
from common.results.outcomes import derived, missing_worst
from common.results.schema import RESULT, SCHEMA, CheckpointResult, Provenance, Result
from common.results.typed import problem_of

TOLERANCE = 2e-6
"""Of figures in a file that was edited by hand."""


def result_path(folder: str | Path, experiment: str, seed: int) -> Path:
    """Where the result of an experiment with a seed is kept."""
    return Path(folder) / f"{experiment}-seed{seed}.json"


# --------------------------------------------------------------------------------------- writing


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

    Other checkpoints stay if they have the same ``config_digest`` and ``protocol``; those of other
    settings are removed with a warning. A damaged result is set aside with a warning, since by now
    the compute has been spent.

    Args:
        path: The result file.
        paper: Package of the experiment.
        experiment: Its name.
        seed: Of the run.
        label: ``last``, ``selected`` or another stem of a checkpoint.
        entry: What was measured.
        provenance: Where it comes from; ``config_digest`` must be there.

    Raises:
        ConfigurationError: If the entry is none, or the file is no result, or another experiment's.
        RunDirectoryError: If the file cannot be written.
    """
    path = Path(path)
    check_mergeable(path, paper, experiment, seed, "another file with --evaluation.results")
    check_writable(path)
    # Tests of two checkpoints of a run may end together.
    with FileLock(path.with_name(f".{path.name}.lock")):
        merged: dict[str, Any] = {
            **{"schema": SCHEMA, "paper": paper, "experiment": experiment, "seed": seed},
            **_with_others(path, label, entry, cast(Provenance, dict(provenance))),
        }
        if problem := problem_of(RESULT, merged):
            raise ConfigurationError(f"the result for {path} cannot be written: {problem}")
        merged["digest"] = content_digest(merged)
        write_json_atomically(path, merged)
    return cast(Result, merged)


def _with_others(
    path: Path, label: str, entry: CheckpointResult, origin: Provenance
) -> dict[str, Any]:
    """The checkpoints of a result: this one, and those in the file that may stay."""
    found = {label: (entry, origin)}
    for other, kept in _kept(path).items():
        if other == label:
            continue
        if all(kept[1].get(key) == origin.get(key) for key in ("config_digest", "protocol")):
            found[other] = kept
        else:
            warnings.warn(
                f"{path} held the checkpoint {other} of other settings (config or protocol of the "
                f"test), which cannot be compared with {label}: it was removed; test it again",
                stacklevel=3,
            )
    order = sorted(found, key=_label_order)
    return {
        "checkpoints": {name: found[name][0] for name in order},
        "provenance": {name: found[name][1] for name in order},
    }


def _kept(path: Path) -> dict[str, tuple[CheckpointResult, Provenance]]:
    """The checkpoints a file holds already and their provenance; a damaged file is set aside."""
    if not path.exists():
        return {}
    try:
        old = read_result(path)
        return {
            name: (old["checkpoints"][name], old["provenance"][name]) for name in old["provenance"]
        }
    except ConfigurationError as error:
        names = (f"{path.name}.unreadable{number}" for number in count(1))
        aside = next(file for name in names if not (file := path.with_name(name)).exists())
        path.rename(aside)
        warnings.warn(f"{error} (kept as {aside.name})", stacklevel=4)
        return {}


def check_mergeable(path: Path, paper: str, experiment: str, seed: int, remedy: str) -> None:
    """Make sure that a result can go into a file, before it is measured.

    A damaged result is no obstacle: :func:`merge_result` sets it aside. ``remedy`` says what to
    choose instead.

    Raises:
        ConfigurationError: If the file is no result, or about another experiment or seed.
    """
    if not path.exists():
        return
    try:
        old = read_result(path)
    except ConfigurationError as error:
        if _was_result(path):
            return
        raise ConfigurationError(
            f"{path} is there and no result, so nothing is written to it; choose {remedy}, or move "
            "it away"
        ) from error
    if (old["paper"], old["experiment"], old["seed"]) != (paper, experiment, seed):
        raise ConfigurationError(
            f"{path} holds {old['paper']} {old['experiment']} with seed {old['seed']}, the new "
            f"result is {paper} {experiment} with seed {seed}; choose {remedy}"
        )


_BEGINNING = re.compile(rb'\{\n  "schema": \d+,\n  "paper": "\w+",\n  "experiment": "|$')


def _was_result(path: Path) -> bool:
    """Whether a file that cannot be read begins as a result does, or is empty."""
    try:
        with path.open("rb") as file:
            return _BEGINNING.match(file.read(80)) is not None
    except OSError:
        return False


def _label_order(label: str) -> tuple[int, str]:
    """The same order whichever checkpoint was measured first."""
    return (LABELS.index(label) if label in LABELS else len(LABELS), label)


# --------------------------------------------------------------------------------------- reading


def read_result(path: str | Path) -> Result:
    """Read a result file and check it.

    Raises:
        ConfigurationError: If the file is missing, is of another schema, is no result, or is not
            what was written: its digest differs, or, in a file without a digest, its figures are
            not those of its outcomes.
    """
    remedy = (
        "if a run wrote it, delete it and run the experiment's test again, which needs no training "
        "(with make, delete the file finished in its run directory; make reproduce and publish "
        "write it again)"
    )
    try:
        data = read_json(path)
    except FileNotFoundError as error:
        raise ConfigurationError(
            f"there is no file {path}; results are called EXPERIMENT-seedK.json, or results.json "
            "in a run directory"
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path} cannot be read as JSON ({error}); {remedy}") from error
    schema = data.get("schema") if isinstance(data, dict) else None
    if isinstance(schema, int) and schema != SCHEMA:
        remedy = "update the code, or keep this file elsewhere" if schema > SCHEMA else remedy
        raise ConfigurationError(f"{path} has schema {schema}, expected {SCHEMA}; {remedy}")
    if problem := problem_of(RESULT, data) or _edit_in(data):
        said = one_line(problem)
        raise ConfigurationError(f"{path} is no result of schema {SCHEMA}: {said}; {remedy}")
    return cast(Result, data)


def _edit_in(result: Result) -> str:
    """What does not agree with the digest, or without one with the outcomes; empty if all does."""
    if "digest" in result:
        content = {key: value for key, value in result.items() if key != "digest"}
        if (found := content_digest(content)) == result["digest"]:
            return ""
        return (
            f"its digest is {result['digest'][:12]}..., its content has {found[:12]}...: it was "
            "damaged, or edited without taking the digest out"
        )
    for label, checkpoint in result["checkpoints"].items():
        known = derived(checkpoint["clean"], checkpoint["attacks"])
        for key, values in known.items():
            stored = cast(Mapping[str, Any], checkpoint)[key]
            for name, value in values.items():
                found = stored.get(name)
                if found is None or not np.allclose(found, value, rtol=0.0, atol=TOLERANCE):
                    return f"checkpoints.{label}.{key}.{name} is {found}, the outcomes give {value}"
        if "confusion" in checkpoint and "worst" in known["metrics"]:
            size = known["sizes"].get("worst", checkpoint["examples"])
            right = round(known["metrics"]["worst"] * size)
            table = np.array(checkpoint["confusion"])
            if table.trace() < right or table.sum() > size:
                return (
                    f"checkpoints.{label}.confusion has {table.trace()} of {table.sum()} right, "
                    f"the outcomes give {right} of {size}"
                )
        if "worst" in checkpoint["metrics"] and "worst" not in known["metrics"]:
            reason = missing_worst(checkpoint["attacks"])
            return f"checkpoints.{label}.metrics.worst is there, but {reason or 'no attack counts'}"
    return ""


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


COSTS = "costs.json"
"""Costs of training, beside the results of a paper (:mod:`common.analysis.profiling`)."""


def read_costs(results: str | Path) -> dict[str, dict[str, float]]:
    """The costs of a paper's experiments, by stem and metric; empty where none were measured.

    Raises:
        ConfigurationError: If the file is damaged.
    """
    path = Path(results) / COSTS
    if not path.is_file():
        return {}
    try:
        return {
            stem: {key: float(value) for key, value in entry["metrics"].items()}
            for stem, entry in read_sealed_json(path)["experiments"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(
            f"{path} cannot be read ({type(error).__name__}: {error}); delete it and measure the "
            "costs again"
        ) from error
