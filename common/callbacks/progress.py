"""The progress bar, which does not make every training step wait for the device."""

import time
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

PERIOD = 1.0
"""Seconds between two looks at the loss."""


class ProgressBar(RichProgressBar):
    """Shows the training loss, read once a second.

    A value logged for the bar would be read after each step, with or without a bar, and reading it
    waits for the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self._due = 0.0
        self._loss: dict[str, float] = {}

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """What stands behind the bar."""
        if trainer.training and time.monotonic() >= self._due:
            if "train/loss" in trainer.callback_metrics:
                self._loss = {"train/loss": float(trainer.callback_metrics["train/loss"])}
            self._due = time.monotonic() + PERIOD
        return {**super().get_metrics(trainer, pl_module), **self._loss}
