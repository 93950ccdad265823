"""Anti-perturbation ability, measured: consistency of the prediction, movement of the feature.

With f the arg-max prediction, x' an adversarial image of x, the paper's accuracies are natural
accuracy NA = mean 1[f(x) = y], consistency accuracy CA = mean 1[f(x') = f(x)], and robustness
AR = mean 1[f(x) = y and f(x') = f(x)] [note]. With one x' in all three,
NA + CA - 1 <= AR <= min(NA, CA).
"""

from typing import Any

import torch
from torch import Tensor

from common.attacks.losses import classify, cross_entropy
from common.attacks.pgd import PGD
from common.attacks.randomness import ExampleRandom
from common.evaluation.measures import Measure
from common.evaluation.steps import Columns
from common.modes import network_of
from common.objectives import Batch


class Consistency(Measure):
    """``consistency`` (CA), where the attack moves away from the network's own clean prediction.

    So images that are misclassified are attacked too [choice]; on the others it is robustness.

    Args:
        attack: Makes x', from the cross-entropy with f(x).
    """

    def __init__(self, attack: PGD) -> None:
        self.attack = attack

    def __call__(self, model: Any, batch: Batch, random: ExampleRandom) -> Columns:
        """``consistency``, 0 or 1 for each image."""
        x = batch["x"]
        with torch.no_grad():
            own = classify(model(x))
        x_adv = self.attack(
            lambda images: cross_entropy(model(images), own.clamp_min(0)),
            x,
            random,
            is_adversarial=lambda images: classify(model(images)) != own,
        )
        with torch.no_grad():
            same = (classify(model(x_adv)) == own) & (own >= 0)
        return {"consistency": same.float()}


class PooledChange(Measure):
    """How far the pooled feature moves, in l2 and relative to its own length.

    ``pooled_change`` and ``pooled_change_relative`` under an attack, ``pooled_change_noise`` and
    ``pooled_change_noise_relative`` under uniform noise of the same radius (how it
    is compared: [choice]). The absolute movement is the primary number: dividing can hide the
    effect.

    Args:
        attack: Makes x', from cross-entropy, in the linf ball.
    """

    def __init__(self, attack: PGD) -> None:
        self.attack = attack

    def __call__(self, model: Any, batch: Batch, random: ExampleRandom) -> Columns:
        """The four numbers of each image."""
        x, y = batch["x"], batch["y"]
        net = network_of(model)
        noise = random.uniform(x.shape[1:], -self.attack.eps, self.attack.eps).to(x)
        x_adv = self.attack(lambda images: cross_entropy(model(images), y), x, random)
        with torch.no_grad():
            clean: Tensor = net.pooled(x)
            size = clean.norm(dim=1).clamp_min(1e-12)
            attacked = (net.pooled(x_adv) - clean).norm(dim=1)
            shaken = (net.pooled((x + noise).clamp(0.0, 1.0)) - clean).norm(dim=1)
        return {
            "pooled_change": attacked,
            "pooled_change_relative": attacked / size,
            "pooled_change_noise": shaken,
            "pooled_change_noise_relative": shaken / size,
        }
