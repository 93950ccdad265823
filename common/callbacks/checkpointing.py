"""Two files per run: ``last.ckpt`` to resume from, ``selected.ckpt`` by a validation metric."""

import io
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning import Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from common.callbacks.averaging import averaging_of
from common.checkpoints import read_content
from common.errors import ConfigurationError, DivergedError, check_choice
from common.files import check_writable, write_sealed
from common.versions import SAVES_SWA

Direction = Literal["min", "max"]


class SealedCheckpointIO(TorchCheckpointIO):
    """Replaces checkpoints at once, writes their digest, and reads no damaged ones."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write the file, see :func:`common.files.write_sealed`."""
        content = io.BytesIO()
        torch.save(checkpoint, content)
        write_sealed(path, content)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read the file on the CPU, see :func:`common.checkpoints.read_content`."""
        return cast(dict[str, Any], read_content(path))


class SafeCheckpoint(ModelCheckpoint):
    """Saves finite weights only, and keeps no folder in its state: a run may be moved."""

    def __init__(
        self, filename: str, dirpath: str | None, every_n_train_steps: int | None, **settings: Any
    ) -> None:
        if every_n_train_steps is not None and every_n_train_steps < 1:
            raise ConfigurationError(
                f"checkpoint.every_n_train_steps must be at least 1, got {every_n_train_steps}; "
                "null saves at the end of every epoch only"
            )
        self.every_n_steps = every_n_train_steps
        settings |= {"auto_insert_metric_name": False, "enable_version_counter": False}
        super().__init__(dirpath, filename, **settings)

    def setup(self, trainer: Trainer, module: Any, stage: str) -> None:
        """Check before training that the file can be written, and read again."""
        super().setup(trainer, module, stage)
        if stage == "fit" and not SAVES_SWA and _is_averaged_at_the_end(trainer):
            raise ConfigurationError(
                f"torch {torch.__version__} saves StochasticWeightAveraging with functions, which "
                "are not read again; install torch 2.13 or newer, or use "
                "lightning.pytorch.callbacks.WeightAveraging"
            )
        if stage == "fit" and trainer.is_global_zero and self.dirpath is not None:
            check_writable(Path(self.dirpath) / f"{self.filename}.ckpt")

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        for name, value in trainer.lightning_module.state_dict().items():
            if value.is_floating_point() and not torch.isfinite(value).all():
                raise DivergedError(
                    f"{name} is not finite after epoch {trainer.current_epoch}, step "
                    f"{trainer.global_step}; it is not saved, and the checkpoint before it is "
                    "kept. Lower model.optimizer.lr or set trainer.gradient_clip_val"
                )
        trainer.save_checkpoint(filepath, self.save_weights_only)
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath

    def state_dict(self) -> dict[str, Any]:
        """The best score; it is that of the file in the present folder."""
        return {"best_model_score": self.best_model_score}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it."""
        score = state_dict["best_model_score"]
        if score is not None and self.dirpath is not None:
            path = self.format_checkpoint_name({})
            self.best_model_path = self.kth_best_model_path = path
            self.best_model_score = self.kth_value = score
            self.best_k_models = {path: score}


class LastCheckpoint(SafeCheckpoint):
    """Saves ``last.ckpt`` after every epoch, and when the run is asked to stop.

    Stochastic weight averaging puts its average into the model when training ends. With it,
    ``last.ckpt`` is not saved within an epoch, and at the end with the average.

    Args:
        dirpath: Folder; ``checkpoints`` in the run directory when not given.
        every_n_train_steps: Also save after every n-th optimiser step, for long epochs: a killed
            run loses at most n steps. At least 1.
    """

    def __init__(self, dirpath: str | None = None, every_n_train_steps: int | None = None) -> None:
        super().__init__("last", dirpath, every_n_train_steps, save_on_train_epoch_end=True)

    def on_train_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        """Save within an epoch, between two optimiser steps, but not at its end."""
        loop = trainer.fit_loop.epoch_loop
        is_due = (
            self.every_n_steps is not None
            and trainer.global_step % self.every_n_steps == 0
            and trainer.global_step != self._last_global_step_saved
        )
        # Accumulated gradients are not part of a checkpoint.
        is_within = loop._should_accumulate() or loop._num_ready_batches_reached()
        is_skipped = is_within or self._should_skip_saving_checkpoint(trainer)
        is_asked = (is_due or trainer.received_sigterm) and not is_skipped
        if is_asked and not _is_averaged_at_the_end(trainer):
            self._save_checkpoint(trainer, self.format_checkpoint_name({}))

    def on_train_epoch_end(self, trainer: Trainer, module: Any) -> None:
        """Save, unless the weights of the last epoch are about to be averaged."""
        is_last = trainer.should_stop or trainer.current_epoch + 1 == trainer.max_epochs
        if not (is_last and _is_averaged_at_the_end(trainer)):
            super().on_train_epoch_end(trainer, module)

    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        """Save the average that the end of training put into the model."""
        if _is_averaged_at_the_end(trainer):
            self._save_checkpoint(trainer, self.format_checkpoint_name({}))


def _is_averaged_at_the_end(trainer: Trainer) -> bool:
    return isinstance(averaging_of(trainer), StochasticWeightAveraging)


class SelectedCheckpoint(SafeCheckpoint):
    """Keeps the epoch with the best validation metric as ``selected.ckpt``, the last among equals.

    Args:
        monitor: Logged metric; ``val/robust_acc`` needs ``evaluation.validation``, and so does
            ``val/mean_acc``, the mean of that and ``val/clean_acc``.
        mode: Whether larger or smaller is better.
        dirpath: Folder; ``checkpoints`` in the run directory when not given.
        from_epoch: The first epoch, from 0, that may be selected; a shorter run selects none.
        every_n_train_steps: For :class:`LastCheckpoint`, which the command line makes with it.
    """

    def __init__(
        self,
        monitor: str = "val/robust_acc",
        mode: Direction = "max",
        dirpath: str | None = None,
        from_epoch: int = 0,
        every_n_train_steps: int | None = None,
    ) -> None:
        check_choice("checkpoint.mode", mode, Direction)
        if from_epoch < 0:
            raise ConfigurationError(
                f"checkpoint.from_epoch counts epochs from 0, got {from_epoch}; 0 lets every "
                "epoch be selected"
            )
        self.from_epoch = from_epoch
        more = {"monitor": monitor, "mode": mode, "save_on_train_epoch_end": False}
        super().__init__("selected", dirpath, every_n_train_steps, **more)

    def setup(self, trainer: Trainer, module: Any, stage: str) -> None:
        """Refuse robust accuracy where validation does not attack; say which weights are kept."""
        super().setup(trainer, module, stage)
        if stage != "fit":
            return
        attacks = [getattr(c, "validation", None) for c in trainer.callbacks]  # type: ignore[attr-defined]
        if self.monitor in ("val/robust_acc", "val/mean_acc") and not any(attacks):
            raise ConfigurationError(
                f"checkpoint.monitor is {self.monitor} and evaluation.validation is null, so it is "
                "not measured; name an attack there, or set checkpoint.monitor to val/clean_acc"
            )
        if _is_averaged_at_the_end(trainer):
            rank_zero_warn(
                "selected.ckpt holds the raw weights of its epoch: StochasticWeightAveraging "
                "averages when training ends, and last.ckpt then holds the average. To select "
                "among averaged weights use lightning.pytorch.callbacks.WeightAveraging"
            )
        elif (callback := averaging_of(trainer)) is not None:
            name = type(callback).__name__
            rank_zero_info(f"selected.ckpt and last.ckpt hold weights averaged by {name}")

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
