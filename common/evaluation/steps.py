"""A step of an evaluation: one attack, what it is run on, and how its outcome is judged."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from common.attacks.geometry import Norm, parse_radius
from common.attacks.losses import classify, cross_entropy
from common.attacks.randomness import ExampleRandom
from common.errors import check_choice
from common.objectives import Batch

Columns = dict[str, Tensor]
"""What a step found out, one entry per example along the first axis."""

Scope = Literal["all", "clean", "standing"]
Kind = Literal["attack", "noise", "probe"]
Counted = Literal["attack", "noise"]


@dataclass(frozen=True)
class Threat:
    """What an adversary may do: perturb by at most ``eps`` in ``norm``, pixels in [0, 1].

    Args:
        norm: ``linf``, ``l2`` or ``l1``.
        eps: A number or a fraction such as ``8/255``.
    """

    norm: Norm
    eps: float | str

    def __post_init__(self) -> None:
        object.__setattr__(self, "eps", parse_radius(self.eps, self.norm))

    @property
    def radius(self) -> float:
        """``eps`` as a number."""
        return float(self.eps)

    def diameter(self, x: Tensor) -> float:
        """Of the box of images like ``x``, ``(N, C, H, W)``, in this norm."""
        return float(x[0].numel() ** {"linf": 0.0, "l2": 0.5, "l1": 1.0}[self.norm])

    def per_pixel(self, x: Tensor) -> float:
        """The change of each pixel where all change alike and together reach the radius."""
        return self.radius / self.diameter(x)

    def covers(self, other: "Threat | None") -> bool:
        """Whether every perturbation of the other adversary is allowed to this one."""
        return (
            other is not None
            and other.norm == self.norm
            and other.radius <= self.radius * (1 + 1e-6)
        )


@dataclass(frozen=True)
class Step:
    """One line of a result.

    Args:
        key: Its name, ``entry``, ``entry/loss`` or ``entry/loss/eps=0.1``.
        entry: The suite entry it belongs to.
        run: (model, batch, random numbers of these examples) -> columns, all ``(N, ...)``. An
            attack gives those of :func:`judged`.
        settings: Plain values that decide the outcome, for the journal.
        scope: Which examples it is run on: ``all``; those right without an attack; or those that
            have withstood every step of the threat model so far.
        cumulative: Run only on what earlier steps of the same entry left standing, and count what
            those broke as broken.
        examples: Only this number of the split, see :func:`common.data.subset.subset`.
        batch_size: Where its random numbers depend on it; ``None`` for that of the evaluation.
        threat: What the attack kept to; ``None`` where it is not an attack within a ball.
        kind: ``attack``, ``noise`` (random, not adversarial) or ``probe`` (measures, breaks
            nothing).
        at: The point of a sweep, such as ``{"eps": 0.1}``.
        reach: How far its steps can move an image, in the norm of ``threat``.
        needs_gradient: Whether it is of no use on a model without a gradient.
        networks: Other networks whose function decides the outcome, for the journal.
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

    def __post_init__(self) -> None:
        check_choice("scope", self.scope, Scope)
        check_choice("kind", self.kind, Kind)


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

    Scores that are not finite are no prediction (-1), so such an image counts as misclassified. A
    misclassified image outside the box or the ball is no adversarial example and counts as
    withstood, for every attack.

    Args:
        model: Images to logits, in evaluation mode.
        batch: The clean images and labels.
        x_adv: The perturbed images ``(N, C, H, W)``.
        threat: The ball they have to be in; ``None`` asks for the box alone.
        correct: The verdict ``(N,)``, where the attack gives one itself (the official
            AutoAttack); everything else is classified here.
        idle: Which examples an attack found no direction for, ``(N,)``; a random start moves
            those too.

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


@dataclass(frozen=True)
class Line:
    """What a result file says about the nature of a step.

    Args:
        entry: The suite entry.
        kind: ``attack`` or ``noise``.
        norm: Of the ball; ``None`` where there is none.
        eps: Its radius.
        survivors_only: Whether it met only what had withstood everything before.
        counts: Whether its outcomes enter the worst case: it kept to the threat model.
        at: The point of a sweep, such as ``{"eps": 0.1}``, ``{"level": 0.2, "draw": 0}``.
        weakness: Why withstanding it is no evidence for the threat model: it did not use the whole
            radius, or did not move. Empty if it is evidence.
    """

    entry: str
    kind: Counted = "attack"
    norm: str | None = None
    eps: float | None = None
    survivors_only: bool = False
    counts: bool = True
    at: Mapping[str, float] = field(default_factory=dict)
    weakness: str = ""

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, Counted)


@dataclass
class Outcomes:
    """Outcomes of a whole split in the order of its examples.

    Args:
        y: Labels ``(N,)``.
        correct: Per step (and ``clean``), whether each example is still right, ``(N,)`` bool.
        attacked: Per step, which examples the figure is about, ``(N,)`` bool.
        lines: Per step, its nature.
        columns: Per step (and ``clean``), what else is known of each example, ``(N, ...)``: see
            :func:`judged`; NaN distances where it was not run.
        threat: The adversary of the worst case.
        seconds: Per step, computing time over all devices.
        remarks: What a reader of the figures should know, in sentences.
        pictured: Which examples ``x_adv`` in the columns is about.
        depends_on_history: Whether the model's scores for the same images and random numbers
            changed while it was attacked.
    """

    y: Tensor
    correct: dict[str, Tensor]
    attacked: dict[str, Tensor]
    lines: dict[str, Line] = field(default_factory=dict)
    columns: dict[str, Columns] = field(default_factory=dict)
    threat: Threat | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    pictured: Tensor = field(default_factory=lambda: torch.arange(0))
    depends_on_history: bool = False

    def nonfinite(self) -> str:
        """For how many images the scores were not finite, as a sentence; empty if for none."""
        everywhere = torch.ones_like(self.y, dtype=torch.bool)
        counts = {
            key: int((self.columns[key]["predicted"][within] < 0).sum())
            for key, within in {"clean": everywhere, **self.attacked}.items()
        }
        if not any(counts.values()):
            return ""
        found = ", ".join(f"{count} ({key})" for key, count in counts.items() if count)
        return f"scores are NaN or infinite, which counts as misclassified, for images: {found}"
