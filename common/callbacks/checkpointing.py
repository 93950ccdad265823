"""Two files per run: ``last.ckpt`` to go on from, ``selected.ckpt`` by a validation metric."""

from typing import Literal

from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor


class LastCheckpoint(ModelCheckpoint):
    """Saves ``last.ckpt`` after every epoch, so that a killed run loses at most one."""

    def __init__(self, dirpath: str | None = None) -> None:
        super().__init__(
            dirpath=dirpath,
            filename="last",
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )


class SelectedCheckpoint(ModelCheckpoint):
    """Keeps the epoch with the best validation metric as ``selected.ckpt``.

    Among equal epochs the later one is kept.

    Args:
        monitor: Logged metric; ``val/robust_acc`` needs ``evaluation.validation``.
        mode: Whether larger or smaller is better.
        dirpath: Folder; ``checkpoints`` in the run directory when not given.
    """

    def __init__(
        self,
        monitor: str = "val/robust_acc",
        mode: Literal["min", "max"] = "max",
        dirpath: str | None = None,
    ) -> None:
        super().__init__(
            dirpath=dirpath,
            filename="selected",
            monitor=monitor,
            mode=mode,
            auto_insert_metric_name=False,
            enable_version_counter=False,
            save_on_train_epoch_end=False,
        )

    def check_monitor_top_k(self, trainer: Trainer, current: Tensor | None = None) -> bool:
        """Whether this epoch is at least as good as the one kept."""
        if current is None or self.best_model_score is None:
            return super().check_monitor_top_k(trainer, current)
        best = self.best_model_score.to(current.device)
        at_least = current >= best if self.mode == "max" else current <= best
        return bool(trainer.strategy.reduce_boolean_decision(bool(at_least)))
