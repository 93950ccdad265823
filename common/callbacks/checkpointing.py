"""Two files per run: ``last.ckpt`` to go on from, ``selected.ckpt`` by a validation metric."""

from pathlib import Path
from typing import Literal

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from common.errors import ConfigurationError, DivergedError

ATTACKED = ("val/robust_acc", "val/mean_acc")
"""Metrics that exist where validation attacks."""


class SafeCheckpoint(ModelCheckpoint):
    """Replaces a checkpoint only by a whole one, and only by weights that are numbers."""

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        for name, value in trainer.lightning_module.state_dict().items():
            if value.is_floating_point() and not torch.isfinite(value).all():
                raise DivergedError(
                    f"{name} is not finite after epoch {trainer.current_epoch}, step "
                    f"{trainer.global_step}; it is not saved, and the checkpoint before it is "
                    "kept. Lower model.optimizer.lr or set trainer.gradient_clip_val"
                )
        partial = f"{filepath}.tmp"
        trainer.save_checkpoint(partial, self.save_weights_only)
        if trainer.is_global_zero:
            Path(partial).replace(filepath)
        trainer.strategy.barrier()
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath


class LastCheckpoint(SafeCheckpoint):
    """Saves ``last.ckpt`` after every epoch, so that a killed run loses at most one."""

    def __init__(self, dirpath: str | None = None) -> None:
        super().__init__(
            dirpath=dirpath,
            filename="last",
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )


class SelectedCheckpoint(SafeCheckpoint):
    """Keeps the epoch with the best validation metric as ``selected.ckpt``.

    Among equal epochs the later one is kept.

    Args:
        monitor: Logged metric; ``val/robust_acc`` needs ``evaluation.validation``, and so does
            ``val/mean_acc``, the mean of that and ``val/clean_acc``.
        mode: Whether larger or smaller is better.
        dirpath: Folder; ``checkpoints`` in the run directory when not given.
        from_epoch: The first epoch, from 0, that may be selected. A run that ends before it
            selects none and has its last checkpoint alone.

    Raises:
        ConfigurationError: If ``from_epoch`` is negative.
    """

    def __init__(
        self,
        monitor: str = "val/robust_acc",
        mode: Literal["min", "max"] = "max",
        dirpath: str | None = None,
        from_epoch: int = 0,
    ) -> None:
        if from_epoch < 0:
            raise ConfigurationError(
                f"checkpoint.from_epoch counts epochs from 0, got {from_epoch}; 0 lets every "
                "epoch be selected"
            )
        self.from_epoch = from_epoch
        super().__init__(
            dirpath=dirpath,
            filename="selected",
            monitor=monitor,
            mode=mode,
            auto_insert_metric_name=False,
            enable_version_counter=False,
            save_on_train_epoch_end=False,
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find a metric that nobody logs before the first epoch.

        Raises:
            ConfigurationError: If robust accuracy is monitored and validation does not attack.
        """
        super().setup(trainer, pl_module, stage)
        attacks = [getattr(c, "validation", None) for c in trainer.callbacks]  # type: ignore[attr-defined]
        if stage == "fit" and self.monitor in ATTACKED and not any(attacks):
            raise ConfigurationError(
                f"checkpoint.monitor is {self.monitor} and evaluation.validation is null, so "
                "nobody measures it; name an attack there, or set checkpoint.monitor to "
                "val/clean_acc"
            )

    def _monitor_candidates(self, trainer: Trainer) -> dict[str, Tensor]:
        candidates = super()._monitor_candidates(trainer)
        if candidates.keys() >= {"val/clean_acc", "val/robust_acc"}:
            both = candidates["val/clean_acc"], candidates["val/robust_acc"]
            candidates["val/mean_acc"] = (both[0] + both[1]) / 2
        return candidates

    def _should_skip_saving_checkpoint(self, trainer: Trainer) -> bool:
        too_early = trainer.current_epoch < self.from_epoch
        return too_early or super()._should_skip_saving_checkpoint(trainer)

    def check_monitor_top_k(self, trainer: Trainer, current: Tensor | None = None) -> bool:
        """Whether this epoch is at least as good as the one kept."""
        if current is None or self.best_model_score is None:
            return super().check_monitor_top_k(trainer, current)
        best = self.best_model_score.to(current.device)
        at_least = current >= best if self.mode == "max" else current <= best
        return bool(trainer.strategy.reduce_boolean_decision(bool(at_least)))
