"""Adversarial training of networks with an auxiliary head; [C] as in ``method.py``."""

from typing import Any

from torch import Tensor

from common.attacks.losses import cross_entropy
from common.errors import ConfigurationError
from common.modes import network_of
from common.objectives import Batch, Objective, adversarial_images, check_weight


class SATAuxiliary(Objective):
    """Adversarial training of a network with an auxiliary head [C].

    Args:
        weight: Of the auxiliary head's cross-entropy.

    Raises:
        ConfigurationError: If ``weight`` is negative or not finite.
    """

    def __init__(self, weight: float = 0.4) -> None:
        self.weight = check_weight("weight", weight)

    def outer(self, model: Any, batch: Batch) -> Tensor:
        """CE(f(x_adv), y) + weight CE(f_aux(x_adv), y), batch mean.

        Raises:
            ConfigurationError: If the network has no auxiliary head, or nothing attacked the batch.
        """
        net, x_adv = network_of(model), adversarial_images(batch)
        if not hasattr(net, "forward_with_auxiliary"):
            raise ConfigurationError(
                f"SATAuxiliary trains networks of cells, not {type(net).__name__}; use "
                "common.objectives.AT"
            )
        logits, auxiliary = net.forward_with_auxiliary(x_adv)
        y = batch["y"]
        return cross_entropy(logits, y).mean() + self.weight * cross_entropy(auxiliary, y).mean()
