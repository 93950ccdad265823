"""Adversarial weight perturbation (Wu, Xia & Wang 2020, arXiv 2004.05884)."""

from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch import Callback
from torch import Tensor

from common.errors import ConfigurationError
from common.modes import batch_statistics_kept
from common.objectives import Batch, weighted
from common.optimization import refuse_half_precision


class AdversarialWeightPerturbation(Callback):
    r"""Takes the outer gradient at weights moved to where the loss is larger.

    Per layer, with the adversarial images held fixed (section 3, equations 9 and 10, one step),

    .. math:: v = \gamma \, \frac{\lVert w \rVert}{\lVert g \rVert} \, g, \qquad
              g = \nabla_w \, \text{outer}(w),

    the gradient of the step is taken at :math:`w + v`, and the weights are put back before the
    optimiser moves them. It comes after :class:`AdversarialTraining` in the callback list. As in
    the official code only weights of more than one dimension move, not biases nor batch-norm.

    Args:
        gamma: Radius relative to each layer's norm; 0 switches the perturbation off.
        start_epoch: First epoch (from 0) that perturbs.
    """

    def __init__(self, gamma: float = 0.0, start_epoch: int = 0) -> None:
        if not 0.0 <= gamma < 1.0:
            raise ConfigurationError(
                f"gamma is relative to the norm of a layer and must lie in [0, 1), got {gamma}; "
                "the paper uses 0.005 to 0.01"
            )
        self.gamma = gamma
        self.start_epoch = start_epoch
        self._originals: list[tuple[Tensor, Tensor]] = []

    def setup(self, trainer: Trainer, module: Any, stage: str) -> None:
        """Refuse fp16, with a ConfigurationError: the weights' gradients would vanish."""
        if stage == "fit" and self.gamma > 0.0:
            refuse_half_precision(trainer, "the gradients that the weights climb")

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Batch, *_: Any) -> None:
        """Move the weights uphill."""
        if self.gamma == 0.0 or trainer.current_epoch < self.start_epoch:
            return
        weights = [p for p in module.parameters() if p.requires_grad and p.ndim > 1]
        with (
            batch_statistics_kept(module),
            torch.enable_grad(),
            trainer.precision_plugin.train_step_context(),
        ):
            loss = module.objective.weight_loss(module, batch)
            gradients = torch.autograd.grad(weighted(loss, batch), weights, allow_unused=True)
        for weight, gradient in zip(weights, gradients, strict=True):
            if gradient is None:
                continue
            # autograd.grad is local to a rank.
            gradient = trainer.strategy.reduce(gradient, reduce_op="mean")
            step = self.gamma * weight.detach().norm() / (gradient.norm() + 1e-20)
            self._originals.append((weight, weight.detach().clone()))
            weight.data.add_(step * gradient)

    def on_after_backward(self, trainer: Trainer, *_: Any) -> None:
        """Put the weights back; their gradients are those of the perturbed ones."""
        for weight, original in self._originals:
            weight.data.copy_(original)
        self._originals.clear()

    def on_exception(self, trainer: Trainer, *_: Any) -> None:
        """Put the weights back."""
        self.on_after_backward(trainer)
