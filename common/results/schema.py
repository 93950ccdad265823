"""The format of result files.

A file is called ``<experiment>-seed<seed>.json`` and looks like this; lists are shortened::

    {
      "schema": 3,
      "paper": "paper_x",
      "experiment": "digits_net_plain",
      "seed": 0,
      "checkpoints": {
        "last": {
          "epoch": 29, "global_step": 240, "examples": 700,
          "threat": {"norm": "linf", "eps": 0.2},
          "clean": {"correct": 690, "per_class": [[69, 70], ...], "outcomes": "ffef..."},
          "attacks": {
            "pgd20/ce_f": {
              "kind": "attack", "norm": "linf", "eps": 0.2, "counts": true, "at": {},
              "correct": 500, "examples": 700, "survivors_only": false,
              "per_class": [[50, 70], ...], "outcomes": "7fe3...",
              "distances": {"linf": 0.2, "l2": 0.81}
            },
            "aa/apgd-ce": {..., "correct": 70, "examples": 100, "outcomes": "ffe3...",
              "subset": "0810..."},
            "eps_sweep/ce_f/eps=0.3": {..., "eps": 0.3, "counts": false, "at": {"eps": 0.3}},
            "uniform/level=0.2/draw=1": {"kind": "noise", ..., "at": {"level": 0.2, "draw": 1}}
          },
          "metrics": {"clean_acc": 0.9857, "pgd20": 0.7143, "worst": 0.69, ...},
          "intervals": {"clean_acc": [0.9739, 0.9922], "pgd20": [0.6797, 0.7465], ...},
          "sizes": {"aa": 100, "worst": 100, ...},
          "remarks": [],
          "audit": {"examples": 100, "checks": [
            {"id": "steps", "question": "...?", "value": 0.4, "threshold": 1.0,
             "verdict": "pass", "detail": ""}
          ]}
        },
        "selected": {...}
      },
      "provenance": {"last": {"config_digest": "79ab...", ...}, "selected": {...}},
      "digest": "5d41..."
    }

:class:`Result` and the classes it is made of say what each key means. Everything under
``checkpoints`` follows from a checkpoint and the configuration, so a repeated evaluation writes the
same text; times, places and versions are under ``provenance``. Reading checks a file: counts,
outcomes, metrics and intervals have to agree.
"""

from typing import Literal, NotRequired, TypedDict

SCHEMA = 3
"""Version of the files that are written and read."""


class CleanResult(TypedDict):
    """Outcomes on clean images.

    Keys:
        correct: Number of examples classified correctly.
        per_class: ``[correct, total]`` for each class.
        outcomes: One bit per example in the order of the split, packed by
            :func:`~common.results.outcomes.pack_outcomes`.
        nonfinite: Number of examples whose scores are NaN or infinite, which counts as wrong;
            absent if there are none.
    """

    correct: int
    per_class: list[list[int]]
    outcomes: str
    nonfinite: NotRequired[int]


class AttackResult(TypedDict):
    """Outcomes of one step of the suite, on ``examples`` examples of the split.

    Keys:
        kind: ``attack``, or ``noise``: random, not adversarial.
        norm: Of the ball it kept to; null where there is none.
        eps: Radius of the ball, for pixels in [0, 1]; null where there is none.
        counts: Whether it enters the worst case, because it kept to the threat model.
        at: The point of a sweep, such as ``{"eps": 0.1}`` or ``{"level": 0.2, "draw": 0}``.
        correct, per_class, outcomes, nonfinite: As in :class:`CleanResult`, of its examples alone.
        examples: Number of examples.
        subset: Which they are, one bit per example of the split; absent if they are all.
        weakness: Why withstanding it is no evidence for the threat model, as a sentence: its radius
            or steps are too small, or it did not move the images. Absent if it is evidence.
        survivors_only: It met only what all earlier attacks had left standing, and the outcome of
            any other example is its earlier one, so ``correct`` is cumulative.
        distances: Median ``linf`` and ``l2`` distance from the clean image over the examples that
            it broke; null if it broke none. Absent where distances were not recorded.
        unmoved: How many examples withstood the attack while its loss had no usable gradient, and
            were attacked again by other means. Absent for attacks that follow no gradient.
    """

    kind: Literal["attack", "noise"]
    norm: str | None
    eps: float | None
    counts: bool
    at: dict[str, float]
    correct: int
    examples: int
    survivors_only: bool
    per_class: list[list[int]]
    outcomes: str
    subset: NotRequired[str]
    weakness: NotRequired[str]
    distances: NotRequired[dict[str, float | None]]
    nonfinite: NotRequired[int]
    unmoved: NotRequired[int]


class ThreatResult(TypedDict):
    """The adversary of the worst case: perturbations of at most ``eps`` in ``norm``."""

    norm: str
    eps: float


class AuditCheck(TypedDict):
    """One question that an audit of the evaluation asks, and its answer.

    Keys:
        id: Short name.
        question: What was asked; ``pass`` is the answer that lets the figures stand.
        value: What was measured; null where it is not a number.
        threshold: What the value was held against; null where there is none.
        verdict: ``pass``, ``fail`` or ``not applicable``.
        detail: More for the reader; may be empty.
    """

    id: str
    question: str
    value: float | None
    threshold: float | None
    verdict: Literal["pass", "fail", "not applicable"]
    detail: str


class AuditResult(TypedDict):
    """Checks of the evaluation itself, made on ``examples`` examples."""

    examples: int
    checks: list[AuditCheck]


class CheckpointResult(TypedDict):
    """One checkpoint on ``examples`` examples.

    Keys:
        epoch: From 0.
        global_step: Optimiser steps behind the checkpoint.
        examples: Size of the split.
        threat: The adversary of the worst case; null where there is none.
        clean: Outcomes without an attack.
        attacks: The steps of the suite, in their order, by key: ``entry``, ``entry/loss``,
            ``entry/loss/eps=0.1``, ``entry/level=0.2/draw=1``.
        metrics: Accuracies in [0, 1], see :func:`~common.results.outcomes.figures`, and other
            measures in their own units: ``parameters``, ``macs``, ``lipschitz``.
        intervals: ``[low, high]`` of every metric that is a share of examples.
        sizes: How many examples an accuracy is about, where those are not all.
        remarks: What a reader of the figures should know, in sentences.
        audit: Checks of the evaluation; absent where it was not audited.
        not_run: Steps of the suite that were left out because they need a gradient and the model
            has none; absent if there are none.
    """

    epoch: int
    global_step: int
    examples: int
    threat: ThreatResult | None
    clean: CleanResult
    attacks: dict[str, AttackResult]
    metrics: dict[str, float]
    intervals: dict[str, list[float]]
    sizes: dict[str, int]
    remarks: list[str]
    audit: NotRequired[AuditResult]
    not_run: NotRequired[list[str]]


class Provenance(TypedDict):
    """Where the figures of a checkpoint come from; other keys may be added for the reader.

    Keys:
        config_digest: Of the settings behind the checkpoint; entries of other settings are not
            kept beside it.
        protocol: Digest of what was measured, and on which data; entries of other protocols are
            not kept beside it.
        weights: Which weights the checkpoint holds: ``raw``, or by what they are averaged.
        checkpoint_digest: Of the weights.
        date: When it was measured, ISO 8601.
    """

    config_digest: str
    protocol: NotRequired[str]
    weights: NotRequired[str | None]
    checkpoint_digest: NotRequired[str]
    date: NotRequired[str]


class Result(TypedDict):
    """A result file.

    Keys:
        schema: Version of the format, :data:`SCHEMA`.
        paper: Package of the experiment.
        experiment: Its name, the stem of its configuration.
        seed: Of the run.
        checkpoints: What was measured, by checkpoint: ``last``, ``selected`` or a file's stem.
        provenance: Where it comes from; the same keys.
        digest: SHA-256 of the values of all other keys, whatever their order; older files have
            none. Take it out after editing a file by hand.
    """

    schema: int
    paper: str
    experiment: str
    seed: int
    checkpoints: dict[str, CheckpointResult]
    provenance: dict[str, Provenance]
    digest: NotRequired[str]
