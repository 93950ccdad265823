"""What a result file holds: its types, which pydantic checks, and its JSON Schema.

A file is called ``<experiment>-seed<seed>.json``. It says the same whenever the same checkpoint is
evaluated again; times, places and versions are under ``provenance``. Figures (``metrics``,
``intervals``, ``sizes``) are computed once, when the outcomes are filed, and stored.

``python -m common.results.schema`` writes ``result.schema.json``.
"""

from pathlib import Path
from typing import Annotated, Any, Final, Literal, NotRequired

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, with_config
from typing_extensions import TypedDict

from common.files import write_json_atomically
from common.results.packing import unpack_outcomes

SCHEMA: Final = 3
"""Version of the files that are written and read."""

SCHEMA_FILE = Path(__file__).with_name("result.schema.json")

_described = with_config(
    ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
)
_Count = Annotated[int, Field(ge=0)]
_Size = Annotated[int, Field(ge=1, le=10**6)]


@_described
class CleanResult(TypedDict):
    """Outcomes on clean images."""

    correct: _Count
    """Number of examples classified correctly."""
    per_class: list[Annotated[list[_Count], Field(min_length=2, max_length=2)]]
    """``[correct, total]`` of each class."""
    outcomes: str
    """One bit per example in the order of the split, in hexadecimal digits (packing.py)."""
    nonfinite: NotRequired[_Count]
    """For how many examples the scores were NaN or infinite, which counts as wrong."""


@_described
class PassesResult(TypedDict):
    """Images that passed through the network, summed over all passes."""

    forward: _Count
    backward: _Count
    """Images whose gradient was computed."""
    queries: _Count
    """Images in forward passes that recorded no gradient."""


@_described
class AttackResult(TypedDict):
    """Outcomes of one step of the suite."""

    kind: Literal["attack", "noise", "corruption"]
    """Noise and common corruptions are not adversarial."""
    norm: str | None
    """Of the ball it kept to; null where there is none."""
    eps: float | None
    """Radius of the ball, for pixels in [0, 1]; null where there is none."""
    counts: bool
    """Whether it enters the worst case, because it kept to the threat model."""
    at: dict[str, float]
    """The point of a sweep, such as ``{"eps": 0.1}`` or ``{"level": 0.2, "draw": 0}``."""
    correct: _Count
    """Number of its examples classified correctly."""
    examples: _Size
    """Number of examples it was run on."""
    survivors_only: bool
    """It ran only on examples that all earlier attacks left correct; ``correct`` is cumulative."""
    per_class: list[Annotated[list[_Count], Field(min_length=2, max_length=2)]]
    """``[correct, total]`` of each class, of its examples."""
    outcomes: str
    """One bit for each of its examples."""
    subset: NotRequired[str]
    """Which examples of the split they are, one bit each; absent if they are all."""
    weakness: NotRequired[str]
    """Why withstanding it is no evidence for the threat model; absent if it is."""
    recipe: NotRequired[str]
    """The attack and its effort: ``PGD, restarts 5, step_size 0.01, steps 20``."""
    distances: NotRequired[dict[str, float | None]]
    """Median ``linf`` and ``l2`` distance over the examples it broke; null if it broke none."""
    nonfinite: NotRequired[_Count]
    """As of the clean images."""
    unmoved: NotRequired[_Count]
    """How many examples withstood it without a usable gradient, and were attacked again."""
    passes: NotRequired[PassesResult]
    """What it cost, in images."""


@_described
class ThreatResult(TypedDict):
    """The adversary of the worst case: perturbations of at most ``eps`` in ``norm``."""

    norm: str
    eps: float


@_described
class AuditCheck(TypedDict):
    """One check of the evaluation."""

    id: str
    """Short name."""
    question: str
    """What was asked; ``pass`` is the answer that supports the figures."""
    value: float | None
    """What was measured; null where it is not a number."""
    threshold: float | None
    """What the value was compared with; null where there is none."""
    verdict: Literal["pass", "fail", "not applicable"]
    detail: str
    """More for the reader; may be empty."""


@_described
class AuditResult(TypedDict):
    """Checks of the evaluation itself."""

    examples: int
    """On how many examples they were made."""
    checks: list[AuditCheck]


@_described
class CheckpointResult(TypedDict):
    """What was measured of one checkpoint."""

    epoch: int
    """From 0."""
    global_step: int
    """Optimiser steps behind the checkpoint."""
    examples: _Size
    """Size of the split."""
    threat: ThreatResult | None
    """The adversary of the worst case; null where there is none."""
    clean: CleanResult
    attacks: dict[str, AttackResult]
    """Steps of the suite in their order: ``entry``, ``entry/loss``, ``entry/level=0.2/draw=1``."""
    metrics: dict[str, float]
    """Accuracies in [0, 1], and measures in their own units: ``parameters``, ``lipschitz``."""
    intervals: dict[str, Annotated[list[float], Field(min_length=2, max_length=2)]]
    """95 % Wilson interval of every metric that is a share of examples."""
    sizes: dict[str, int]
    """How many examples an accuracy is about, where those are not all."""
    confusion: NotRequired[list[list[_Count]]]
    """Of the worst case: how often label i was predicted as class j when it first fell. Absent
    without a worst case, and for more than 100 classes."""
    remarks: list[str]
    """What a reader of the figures should know, in sentences."""
    audit: NotRequired[AuditResult]
    """Absent where the evaluation was not audited."""
    not_run: NotRequired[list[str]]
    """Steps left out because they need a gradient and the model has none."""


@_described
class TrainingCost(TypedDict):
    """What the training behind a checkpoint took, of its first process."""

    seconds_per_epoch: Annotated[float, Field(ge=0)]
    """Median over the measured epochs, without validation."""
    epochs: _Size
    """How many were measured."""
    peak_memory: _Count
    """Bytes: on a GPU of tensors; on a CPU beyond the resident peak of the process before."""
    device: str
    """Its kind and name."""
    threads: _Size
    processes: _Size
    versions: dict[str, str]
    """Of torch and Lightning."""


@with_config(ConfigDict(strict=True, extra="allow", use_attribute_docstrings=True))
class Provenance(TypedDict):
    """Where the figures of a checkpoint come from; other keys are for the reader."""

    config_digest: str
    """Of the settings; entries of other settings are not kept beside it."""
    protocol: NotRequired[str]
    """Digest of what was measured, and on which data; others are not kept beside it."""
    weights: NotRequired[str | None]
    """``raw``, or by what they are averaged."""
    checkpoint_digest: NotRequired[str]
    """Of the weights."""
    data_digest: NotRequired[str]
    """Of the images and labels."""
    date: NotRequired[str]
    """When it was measured, ISO 8601."""
    training: NotRequired[TrainingCost]
    """Absent if no whole epoch of training was measured."""


def _with_counts(checkpoint: CheckpointResult) -> CheckpointResult:
    """Compare counts, classes and bits of all steps with each other."""
    total = checkpoint["examples"]
    _check_counts(checkpoint["clean"], total, "clean")
    classes = len(checkpoint["clean"]["per_class"])
    table = checkpoint.get("confusion", [[0] * classes] * classes)
    if {len(table), *map(len, table)} != {classes}:
        raise ValueError(f"confusion is not of {classes} x {classes} numbers")
    for name, attack in checkpoint["attacks"].items():
        chosen = total
        if "subset" in attack:
            chosen = int(unpack_outcomes(attack["subset"], total).sum())
        if chosen != attack["examples"]:
            raise ValueError(
                f"attacks.{name}.examples is {attack['examples']}, its subset has {chosen}"
            )
        _check_counts(attack, chosen, f"attacks.{name}")
    return checkpoint


def _check_counts(step: CleanResult | AttackResult, total: int, place: str) -> None:
    if (counted := examples_in(step["per_class"])) != total:
        raise ValueError(f"{place}.per_class has {counted} examples, not {total}")
    found = {
        "outcomes": unpack_outcomes(step["outcomes"], total).sum(),
        "per_class": sum(correct for correct, _ in step["per_class"]),
    }
    for what, value in found.items():
        if value != step["correct"]:
            raise ValueError(f"{place}.correct is {step['correct']}, {what} gives {value}")


def examples_in(per_class: list[list[int]]) -> int:
    """How many examples the classes have together."""
    return sum(total for _, total in per_class)


def _with_origins(result: "Result") -> "Result":
    """Compare the keys of checkpoints and provenance."""
    if (origins := sorted(result["provenance"])) != (known := sorted(result["checkpoints"])):
        raise ValueError(f"provenance is about {origins}, checkpoints about {known}")
    return result


@_described
class Result(TypedDict):
    """A result file: what was measured with one experiment and seed."""

    schema: Literal[3]
    """Version of the format."""
    paper: str
    """Package of the experiment."""
    experiment: str
    """The stem of its configuration."""
    seed: int
    checkpoints: Annotated[
        dict[str, Annotated[CheckpointResult, AfterValidator(_with_counts)]], Field(min_length=1)
    ]
    """By name: ``last``, ``selected`` or a file's stem."""
    provenance: dict[str, Provenance]
    """Where each checkpoint's figures come from; the same keys."""
    digest: NotRequired[str]
    """SHA-256 of all other keys; absent after an edit by hand, and figures are then compared."""


RESULT: TypeAdapter[Result] = TypeAdapter(Annotated[Result, AfterValidator(_with_origins)])


def json_schema() -> dict[str, Any]:
    """The JSON Schema of result files."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **RESULT.json_schema()}


if __name__ == "__main__":
    write_json_atomically(SCHEMA_FILE, json_schema())
