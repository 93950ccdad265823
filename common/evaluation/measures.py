"""Numbers of a network beside its accuracies: how smooth it is, and what it costs.

A measure gives numbers per image; their means over the split go to the results.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from common.attacks.losses import classify, label_loss
from common.attacks.pgd import PGD, input_gradient
from common.attacks.randomness import ExampleRandom
from common.attacks.settings import Budget, Settings
from common.evaluation.steps import Step
from common.objectives import Batch
from common.results.lines import Columns, Outcomes


class Measure(Settings, ABC):
    """Numbers per image."""

    budget: Budget | None = None
    """The most passes per image; ``None`` if unknown."""

    @abstractmethod
    def __call__(self, model: Any, batch: Batch, random: ExampleRandom) -> Columns:
        """By name, one number per image, ``(N,)``; the model is in evaluation mode."""


class AttackMeasure(Measure):
    """Numbers per image that depend on the image x' of an attack."""

    def __init__(self, attack: PGD) -> None:
        self.attack = attack
        self.budget = attack.budget.plus(Budget(3, 1))  # of x and x', and a gradient

    def attacked(self, model: Any, batch: Batch, random: ExampleRandom) -> Tensor:
        """x', ``(N, C, H, W)``, from cross-entropy with the labels."""
        return self.attack(label_loss(model, batch["y"]), batch["x"], random)


class LocalSmoothness(AttackMeasure):
    r"""How much the output changes under an attack on cross-entropy.

    - ``stability``: 1 where the predictions for x and x' are equal.
    - ``lipschitz``: :math:`\|f(x) - f(x')\|_1 / \|x - x' + 10^{-6}\|_\infty` with logits f (Yang et
      al. 2020, "A closer look at accuracy vs. robustness"); the constant is added to every
      coordinate of the difference.
    - ``fosc``: :math:`\epsilon \|g\|_1 - \langle x' - x, g \rangle` with g the gradient of the
      loss at x' (first-order stationary condition, Wang et al. 2019, Eq. (5)): 0 where x' is the
      best point of the ball as far as the gradient tells; for ``linf`` attacks only.
    """

    def __call__(self, model: Any, batch: Batch, random: ExampleRandom) -> Columns:
        """``stability``, ``lipschitz`` and, for linf attacks, ``fosc``."""
        x, x_adv = batch["x"], self.attacked(model, batch, random)
        with torch.no_grad():
            clean, attacked = model(x), model(x_adv)
        before = classify(clean)
        moved = (clean - attacked).abs().sum(dim=1)
        distance = (x - x_adv + 1e-6).flatten(1).abs().amax(dim=1)
        columns = {
            "stability": ((before == classify(attacked)) & (before >= 0)).float(),
            "lipschitz": moved / distance,
        }
        if self.attack.norm == "linf":
            g = input_gradient(label_loss(model, batch["y"]), x_adv).flatten(1)
            climbed = ((x_adv - x).flatten(1) * g).sum(dim=1)
            columns["fosc"] = self.attack.eps * g.abs().sum(dim=1) - climbed
        return columns


def measure_steps(measures: Mapping[str, Measure]) -> list[Step]:
    """Measures as steps over all examples."""
    return [
        Step(
            *(f"measure_{name}", f"measure_{name}", measure, measure.settings()),
            scope="all",
            kind="probe",
            budget=measure.budget,
        )
        for name, measure in measures.items()
    ]


def means(outcomes: Outcomes, measures: Mapping[str, Measure]) -> dict[str, float]:
    """The mean of every number that the measures gave, by name; no two may share a name."""
    found: dict[str, float] = {}
    for name in measures:
        for key, column in outcomes.columns[f"measure_{name}"].items():
            if key in found:
                raise ValueError(f"two measures give {key!r}; rename one of them")
            found[key] = float(f"{column.double().mean().item():.9g}")
    return found


def cost(model: nn.Module, image: Tensor) -> dict[str, float]:
    """``parameters`` of a network, and ``macs`` of one image ``(C, H, W)`` on its device.

    Multiply-accumulates are those of convolutions and matrix products, as papers count them. They
    are missing for a model whose operations cannot be recorded, and both for a function.
    """
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if not parameters:
        return {}
    found = {"parameters": float(parameters)}
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(image[None])
    except Exception:  # foreign code fails in any way
        return found
    return found | {"macs": counter.get_total_flops() / 2}
