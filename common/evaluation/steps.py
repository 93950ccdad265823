"""A step of an evaluation: one attack, what it is run on, and how its outcome is judged."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from common.attacks.losses import classify, cross_entropy
from common.attacks.randomness import ExampleRandom
from common.attacks.settings import Budget
from common.errors import check_choice
from common.objectives import Batch
from common.results.lines import Columns, Threat

Scope = Literal["all", "clean", "standing"]
Kind = Literal["attack", "noise", "corruption", "probe"]


@dataclass(frozen=True)
class Step:
    """One line of a result.

    Args:
        key: ``entry``, ``entry/loss`` or ``entry/loss/eps=0.1``.
        entry: The suite entry it belongs to.
        run: (model, batch, random numbers of these examples) -> columns, all ``(N, ...)``. An
            attack gives those of :func:`judged`.
        settings: Plain values that decide the outcome, for the journal.
        scope: Which examples it is run on: ``all``; those that are ``clean``, correct without an
            attack; or those still ``standing`` after all steps within the threat model so far.
        cumulative: Run only on what earlier steps of the same entry left standing, and count what
            those broke as broken.
        examples: Only this number of the split, see :func:`common.data.subset.subset`.
        batch_size: Where its random numbers depend on it; ``None`` for that of the evaluation.
        threat: The ball of the attack; ``None`` where there is none.
        kind: ``attack``; ``noise`` or ``corruption``, which are not adversarial; or ``probe`` (a
            measurement).
        at: The point of a sweep, such as ``{"eps": 0.1}``.
        reach: How far its steps can move an image, in the norm of ``threat``.
        needs_gradient: Whether it is useless on a model without a gradient.
        networks: Other networks whose function decides the outcome, for the journal.
        budget: The most passes of the model per image, its judgement included; ``None`` if unknown.
        recipe: The attack and its effort in words, for results.
    """

    key: str
    entry: str
    run: Callable[[Any, Batch, ExampleRandom], Columns]
    settings: Mapping[str, Any]
    scope: Scope = "clean"
    cumulative: bool = False
    examples: int | None = None
    batch_size: int | None = None
    threat: Threat | None = None
    kind: Kind = "attack"
    at: Mapping[str, float] = field(default_factory=dict)
    reach: float = math.inf
    needs_gradient: bool = False
    networks: tuple[nn.Module, ...] = ()
    budget: Budget | None = None
    recipe: str = ""

    def __post_init__(self) -> None:
        check_choice("scope", self.scope, Scope)
        check_choice("kind", self.kind, Kind)


JUDGED = Budget(forward=1)
"""Passes of :func:`judged`."""


@torch.no_grad()
def predict(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Predicted classes ``(N,)``; -1 where the scores are not finite."""
    return classify(model(x))


def is_wrong(model: Callable[[Tensor], Tensor], y: Tensor, x: Tensor) -> Tensor:
    """Which examples are misclassified, bool ``(N,)``."""
    return predict(model, x) != y


def judged(
    model: Callable[[Tensor], Tensor],
    batch: Batch,
    x_adv: Tensor,
    threat: Threat | None = None,
    correct: Tensor | None = None,
    idle: Tensor | None = None,
) -> Columns:
    """Judge perturbed images, in float32.

    An image with scores that are not finite has the prediction -1 and counts as misclassified. A
    misclassified image outside the box or the ball of ``threat`` counts as withstood.

    Args:
        model: Images to logits, in evaluation mode.
        batch: The clean images and labels.
        x_adv: The perturbed images ``(N, C, H, W)``.
        threat: The ball; ``None`` asks for the box alone.
        correct: The verdict ``(N,)`` of an attack that gives one (the official AutoAttack).
        idle: Which examples an attack found no direction for, ``(N,)``.

    Returns:
        ``correct`` bool, ``predicted`` int64, ``loss`` (cross-entropy), the distances ``linf``,
        ``l2`` and ``l1``, all ``(N,)``, and ``x_adv``; with a ball also ``moved`` bool, whether the
        image is at least half the radius from x, or half as far as the box allows.
    """
    with torch.no_grad():
        logits = model(x_adv)
    predicted = classify(logits)
    found = distances(x_adv, batch["x"])
    if correct is None:
        correct = (predicted == batch["y"]) | ~in_ball(x_adv, batch["x"], threat)
    columns = {
        "correct": correct,
        "predicted": predicted,
        "loss": cross_entropy(logits, batch["y"]),
        **found,
        "x_adv": x_adv,
    }
    if threat is not None:
        farthest = (batch["x"] < 0.5).to(batch["x"])
        room = distances(farthest, batch["x"])[threat.norm]
        moved = found[threat.norm] >= 0.5 * room.clamp(max=threat.radius)
        columns["moved"] = moved if idle is None else moved & ~idle
    return columns


def distances(x_adv: Tensor, x: Tensor) -> Columns:
    """From x ``(N, ...)``, or one image, to each image of x_adv: ``linf``, ``l2``, ``l1``."""
    delta = (x_adv - x).flatten(1).abs()
    return {"linf": delta.amax(1), "l2": delta.square().sum(1).sqrt(), "l1": delta.sum(1)}


def in_ball(x_adv: Tensor, x: Tensor, threat: Threat | None) -> Tensor:
    """Which images lie in the box and in the ball around x up to rounding, bool ``(N,)``."""
    is_allowed = ((x_adv >= 0.0) & (x_adv <= 1.0)).flatten(1).all(dim=1)
    if threat is not None:
        radius = threat.radius * (1 + 1e-5) + 1e-6
        is_allowed &= distances(x_adv, x)[threat.norm] <= radius
    return is_allowed
