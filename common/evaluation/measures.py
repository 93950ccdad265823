"""What is worth knowing about a network beside its accuracies: how smooth it is, what it costs.

A measure is a number per image, averaged over the split; the means go to the results beside the
accuracies. Papers add their own by deriving from :class:`Measure`.
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
from common.attacks.settings import Settings
from common.evaluation.steps import Step
from common.objectives import Batch
from common.results.lines import Columns, Outcomes


class Measure(Settings, ABC):
    """Numbers per image."""

    @abstractmethod
    def __call__(self, model: Any, batch: Batch, random: ExampleRandom) -> Columns:
        """By name, one number per image, ``(N,)``; gradients are available.

        Args:
            model: In evaluation mode.
            batch: ``x``, ``y``, ``index``.
            random: Random numbers of these images.
        """


class AttackMeasure(Measure):
    """Numbers per image that depend on an adversarial image x'.

    Args:
        attack: Makes x'.
    """

    def __init__(self, attack: PGD) -> None:
        self.attack = attack

    def attacked(self, model: Any, batch: Batch, random: ExampleRandom) -> Tensor:
        """x', ``(N, C, H, W)``, from cross-entropy with the labels."""
        return self.attack(label_loss(model, batch["y"]), batch["x"], random)


class LocalSmoothness(AttackMeasure):
    r"""How far and how fast the output moves under an attack on cross-entropy.

    - ``stability``: 1 where the prediction for x' is that for x, whether right or wrong.
    - ``lipschitz``: :math:`\|f(x) - f(x')\|_1 / \|x - x' + 10^{-6}\|_\infty` with logits f (Yang et
      al. 2020, "A closer look at accuracy vs. robustness"); the constant is added to every
      coordinate of the difference.
    - ``fosc``: :math:`\epsilon \|g\|_1 - \langle x' - x, g \rangle` with g the gradient of the
      loss at x' (first-order stationary condition, Wang et al. 2019, Eq. (5)): 0 where x' is the
      best point of the ball as far as the gradient tells, never negative inside the ball. For
      ``linf`` attacks only.
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
    """Measures as steps of an evaluation, over all examples."""
    return [
        Step(f"measure_{name}", f"measure_{name}", measure, measure.settings(), "all", kind="probe")
        for name, measure in measures.items()
    ]


def means(outcomes: Outcomes, measures: Mapping[str, Measure]) -> dict[str, float]:
    """The mean of every number that the measures gave, by its own name.

    Raises:
        ValueError: If two measures give the same name.
    """
    found: dict[str, float] = {}
    for name in measures:
        for key, column in outcomes.columns[f"measure_{name}"].items():
            if key in found:
                raise ValueError(f"two measures give {key!r}; rename one of them")
            found[key] = float(f"{column.double().mean().item():.9g}")
    return found


def cost(model: nn.Module, image: Tensor) -> dict[str, float]:
    """What a network costs: ``parameters``, and ``macs`` of one image.

    Multiply-accumulates are those of convolutions and matrix products, as papers count them. They
    are left out for a model whose operations cannot be recorded, and both for a plain function.

    Args:
        model: Images to logits.
        image: One of them, ``(C, H, W)``, on the model's device.
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
