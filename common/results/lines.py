"""What an evaluation found: the outcomes of a split, and the nature of each step behind them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from common.attacks.geometry import Norm, parse_radius
from common.errors import check_choice

Columns = dict[str, Tensor]
"""What a step found, one entry per example along the first axis."""

Counted = Literal["attack", "noise", "corruption"]


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


class Cost(NamedTuple):
    """What a step cost; images, summed over all passes.

    Args:
        seconds: Computing time.
        forward: Images in forward passes.
        backward: Images whose gradient was computed.
        queries: Images in forward passes that recorded no gradient.
    """

    seconds: float = 0.0
    forward: int = 0
    backward: int = 0
    queries: int = 0

    def plus(self, other: "Cost") -> "Cost":
        """Both together."""
        return Cost(
            self.seconds + other.seconds,
            self.forward + other.forward,
            self.backward + other.backward,
            self.queries + other.queries,
        )


@dataclass(frozen=True)
class Line:
    """What a result file says about the nature of a step.

    Args:
        entry: The suite entry.
        kind: ``attack``, ``noise`` or ``corruption``.
        norm: Of the ball; ``None`` where there is none.
        eps: Its radius.
        survivors_only: Whether it ran only on the examples that all earlier attacks left correct.
        counts: Whether its outcomes enter the worst case: it kept to the threat model.
        at: The point of a sweep, such as ``{"eps": 0.1}``, ``{"level": 0.2, "draw": 0}``.
        weakness: Why withstanding it is no evidence for the threat model: it did not use the whole
            radius, or did not move. Empty if it is evidence.
        recipe: The attack and its effort in words, such as ``PGD, restarts 5, steps 20``.
    """

    entry: str
    kind: Counted = "attack"
    norm: str | None = None
    eps: float | None = None
    survivors_only: bool = False
    counts: bool = True
    at: Mapping[str, float] = field(default_factory=dict)
    weakness: str = ""
    recipe: str = ""

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, Counted)


@dataclass
class Outcomes:
    """Outcomes of a whole split of N examples, in their order.

    Args:
        y: Labels.
        correct: Per step (and ``clean``), whether each example is still right.
        attacked: Per step, which examples it is about.
        lines: Per step, its nature.
        columns: Per step (and ``clean``), what else is known of each example: see
            :func:`common.evaluation.steps.judged`; NaN distances where it was not run.
        threat: The adversary of the worst case.
        costs: Per step (and ``clean``), over all devices.
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
    costs: dict[str, Cost] = field(default_factory=dict)
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

    def fell_to(self) -> tuple[Tensor, Tensor]:
        """Which examples fell within the threat model, and what they were predicted as at first."""
        predicted = self.columns["clean"]["predicted"].clone()
        fell = torch.zeros_like(self.correct["clean"])
        for key, line in self.lines.items():
            if line.counts and line.kind == "attack":
                broken = self.correct["clean"] & self.attacked[key] & ~self.correct[key]
                first = broken & ~fell
                predicted = torch.where(first, self.columns[key]["predicted"], predicted)
                fell |= broken
        return fell, predicted

    def confusion(self, classes: int, rows: Tensor) -> Tensor:
        """How often label i was predicted as class j when it first fell, ``(K, K)``."""
        y, predicted = self.y[rows], self.fell_to()[1][rows]
        is_class = (predicted >= 0) & (predicted < classes)  # scores that are not finite give -1
        cells = y[is_class] * classes + predicted[is_class]
        return torch.bincount(cells, minlength=classes**2).view(classes, classes)
