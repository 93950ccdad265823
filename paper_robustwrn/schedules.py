"""Learning-rate schedules of the official code."""

import math
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from common.errors import ConfigurationError


class ShiftedCosine(LRScheduler):
    r"""Cosine decay that lags by an epoch [C].

    In epoch e, from 0, of E the rate is :math:`\frac{1}{2} (1 + \cos(\pi (e - 1) / E))` times the
    optimiser's: epoch 1 has the largest, epochs 0 and 2 the same, and the last does not reach 0.
    The value follows from the epoch alone, so a resumed run goes on exactly.

    Args:
        optimizer: Whose rates are set.
        epochs: E, normally ``trainer.max_epochs``.
        last_epoch: The epoch before the first one; -1 to begin.

    Raises:
        ConfigurationError: If ``epochs`` is below 1.
    """

    def __init__(self, optimizer: Optimizer, epochs: int, last_epoch: int = -1) -> None:
        if epochs < 1:
            raise ConfigurationError(
                f"epochs must be at least 1, got {epochs}; give what trainer.max_epochs has"
            )
        self.epochs = epochs
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[Any]:
        """The rates of the current epoch."""
        factor = (1 + math.cos(math.pi * (self.last_epoch - 1) / self.epochs)) / 2
        return [base * factor for base in self.base_lrs]
