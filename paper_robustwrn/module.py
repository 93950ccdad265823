"""The LightningModule of RobustWRN: drop path that grows, and one more loss to attack."""

from collections.abc import Callable

from torch import Tensor

from common.attacks.losses import margin
from common.classifier import RobustClassifier
from common.objectives import Batch, InnerLoss, Model, differentiable


class RobustWRNClassifier(RobustClassifier):
    """A classifier whose network may use drop path with a growing probability.

    The probability grows linearly over the epochs, as in DARTS [C], towards the network's own
    ``drop_path``; networks without that attribute are left alone.
    """

    def on_train_epoch_start(self) -> None:
        """Set the probability of this epoch."""
        super().on_train_epoch_start()
        set_progress = getattr(self.net, "set_progress", None)
        if set_progress is not None:
            set_progress(self.current_epoch / (self.trainer.max_epochs or 1))

    def adaptive_losses(self) -> dict[str, InnerLoss]:
        """Cross-entropy and margin, and ``cw_official``: see :func:`coupled_margin`."""
        return {**super().adaptive_losses(), "cw_official": coupled_margin}


def coupled_margin(model: Model, batch: Batch) -> Callable[[Tensor], Tensor]:
    r"""The margin loss as the official code has it [C], :math:`-\max(\sum_i m_i, 0)`.

    :math:`m_i = z_{i,y} - \max_{j \ne y} z_{i,j}` is summed over the batch inside the rectifier:
    as soon as the sum is not positive, the gradient is zero for every image and the attack stops.
    So it overestimates robustness and depends on which images share a batch. It is here to
    reproduce that number; the valid attack is ``cw_f``.

    Returns:
        x' -> ``(N,)``, whose sum has the value and gradient of the official loss.
    """
    y = differentiable(batch["y"])

    def loss(x: Tensor) -> Tensor:
        behind = margin(model(x), y)  # negative where the image is still right
        return behind * (behind.detach().sum() < 0).to(behind.dtype)

    return loss
