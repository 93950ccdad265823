"""Learning-rate schedules of the official code."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from common.errors import ConfigurationError


class ShiftedCosine(LambdaLR):
    r"""Cosine decay, one epoch late [C].

    In epoch e, from 0, of E the rate is :math:`\frac{1}{2} (1 + \cos(\pi (e - 1) / E))` times the
    optimiser's.

    Args:
        optimizer: Whose rates are set.
        epochs: E, normally ``trainer.max_epochs``.

    Raises:
        ConfigurationError: If ``epochs`` is below 1.
    """

    def __init__(self, optimizer: Optimizer, epochs: int) -> None:
        if epochs < 1:
            raise ConfigurationError(
                f"epochs must be at least 1, got {epochs}; give what trainer.max_epochs has"
            )
        super().__init__(optimizer, lambda e: (1 + math.cos(math.pi * (e - 1) / epochs)) / 2)
