"""The LightningModule of WM: one more loss to attack, and maps for TensorBoard."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from common.attacks.losses import cross_entropy
from common.classifier import RobustClassifier
from common.objectives import Batch, InnerLoss, differentiable
from paper_wm.method import bypassed, weight_maps


class WeightMapClassifier(RobustClassifier):
    """A classifier whose network may have weight maps in it."""

    def adaptive_losses(self) -> dict[str, InnerLoss]:
        """Beside the usual ones ``ce_bypass``, cross-entropy with gradients past the maps.

        The layer draws no random numbers and its gradients are exact, so the usual losses are the
        white-box attack already [M]; this one asks whether the gradients are of any use.
        """
        losses = super().adaptive_losses()
        if weight_maps(self):
            losses["ce_bypass"] = past_the_maps
        return losses

    def log_histograms(self, add: Callable[[str, Tensor], None], batch: Batch) -> None:
        """Hand the values of the maps to TensorBoard."""
        for name, weight_map in weight_maps(self).items():
            add(f"maps/{name}", weight_map.map.detach())


def past_the_maps(model: Any, batch: Batch) -> Callable[[Tensor], Tensor]:
    """X' -> cross-entropy, ``(N,)``, whose gradient passes the maps as if they were not there."""
    y = differentiable(batch["y"])

    def loss(x: Tensor) -> Tensor:
        with bypassed(model):
            return cross_entropy(model(x), y)

    return loss
