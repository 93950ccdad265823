"""The LightningModule of RobustWRN: drop path that grows, and one more loss to attack."""

from collections.abc import Callable

from torch import Tensor

from common.attacks.losses import margin
from common.classifier import RobustClassifier
from common.objectives import Batch, InnerLoss, Model, differentiable
from paper_robustwrn.networks import CellNetwork


class RobustWRNClassifier(RobustClassifier):
    """A classifier whose network may use drop path, with a probability that grows linearly [C]."""

    def on_train_epoch_start(self) -> None:
        """Set the probability of this epoch."""
        super().on_train_epoch_start()
        for module in self.net.modules():
            if isinstance(module, CellNetwork):
                module.set_progress(self.current_epoch / (self.trainer.max_epochs or 1))

    def adaptive_losses(self) -> dict[str, InnerLoss]:
        """Cross-entropy and margin, and ``cw_official``: see :func:`coupled_margin`."""
        return {**super().adaptive_losses(), "cw_official": coupled_margin}


def coupled_margin(model: Model, batch: Batch) -> Callable[[Tensor], Tensor]:
    r"""The margin loss as the official code has it [C]: x' -> ``(N,)``, whose sum is that loss.

    It is :math:`-\max(\sum_i m_i, 0)` with :math:`m_i = z_{i,y} - \max_{j \ne y} z_{i,j}`: as soon
    as the batch sum is not positive, the attack stops for every image. So it overestimates
    robustness and depends on the batch. The valid attack is ``cw_f``.
    """
    y = differentiable(batch["y"])

    def loss(x: Tensor) -> Tensor:
        behind = margin(model(x), y)  # negative where the image is still right
        return behind * (behind.detach().sum() < 0).to(behind.dtype)

    return loss
