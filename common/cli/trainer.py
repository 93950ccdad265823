"""Lightning's trainer, which can also reproduce a row of a table."""

import logging
import os
import signal
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException

import common.strategy  # noqa: F401  (registers the device-invariant ddp)
from common.callbacks.checkpointing import SealedCheckpointIO
from common.callbacks.costs import CostRecorder
from common.callbacks.finite import FiniteGuard
from common.callbacks.resuming import Resuming, RunTrainer, SignalConnector, StoppedBySignal
from common.checkpoints import load_checkpoint
from common.cli.preconditions import check_version
from common.errors import ConfigurationError, RunDirectoryError, UserError
from common.results.identity import check_evaluated, check_resumed, settings_in
from common.results.labels import LABELS

logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
    lambda record: "Tip:" not in record.getMessage()  # advertisements
)
HALF = ("16-true", "bf16-true", "transformer-engine", "transformer-engine-float16")


class EpochLoop(_TrainingEpochLoop):
    """Does what was due when a checkpoint was written within an epoch.

    Lightning would continue with the next batch, without the validation that the run was killed in,
    and though the run was asked to stop.
    """

    stops_again = False
    """Whether the run was asked to stop when the checkpoint was written."""
    has_made_up = False
    """Whether the next batch is the first one after the checkpoint, though not the first step."""

    def advance(self, data_fetcher: _DataFetcher) -> None:
        """Train on a batch, unless the validation of the last one is due."""
        if self.restarting and self.restarted_on_train_batch_end:
            self.trainer.should_stop |= self.stops_again
            if self.trainer.should_stop or self._should_check_val_fx(data_fetcher):
                self.val_loop.restarting = False
                if not self._should_accumulate():
                    self._batches_that_stepped -= 1  # reset() has counted the end of this batch
                self.has_made_up = True
                return
        super().advance(data_fetcher)
        self.has_made_up = False

    def _broadcast_sigterm_tensor(self) -> None:
        """Nothing: Resuming does so at the end of a batch, where every rank can still save."""


class Trainer(RunTrainer):
    """Checks checkpoints before it uses them, can be stopped anywhere, and can reproduce a row."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The run directory, kept open while it is written, so that no new one is taken for it:
        # writers make missing folders.
        self._folder: int | None = None
        if self.precision in HALF:
            raise ConfigurationError(
                f"trainer.precision is {self.precision}: weights and images in half precision are "
                "not supported, because attacks and robust accuracy need more; use bf16-mixed or "
                "32-true"
            )
        self.callbacks[:0] = [Resuming(), FiniteGuard(), CostRecorder()]
        self._signal_connector = self._connector = SignalConnector(self)
        loop = self.fit_loop.epoch_loop
        self.fit_loop.epoch_loop = EpochLoop(self, loop.min_steps, loop.max_steps)
        if type(self.strategy.checkpoint_io) is TorchCheckpointIO:
            self.strategy.checkpoint_io = SealedCheckpointIO()

    def reproduce(self, model: LightningModule, datamodule: LightningDataModule) -> None:
        """Train, or resume a killed run; then test its two checkpoints."""
        self.run.is_reproducing = True
        folder = Path(self.default_root_dir) / "checkpoints"
        last = folder / "last.ckpt"
        self.fit(model, datamodule=datamodule, ckpt_path=str(last) if last.exists() else None)
        for name in LABELS:
            if self.strategy.broadcast((folder / f"{name}.ckpt").exists()):
                self.test(model, datamodule=datamodule, ckpt_path=str(folder / f"{name}.ckpt"))

    def predict(
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        datamodule: LightningDataModule | None = None,
        return_predictions: bool | None = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
        attack: str | None = None,
    ) -> Any:
        """As Lightning's, and with ``attack`` under this entry of the suite too."""
        self.run.attack = attack
        return super().predict(
            model, dataloaders, datamodule, return_predictions, ckpt_path, weights_only
        )

    def save_checkpoint(
        self,
        filepath: str | Path,
        weights_only: bool | None = None,
        storage_options: Any | None = None,
    ) -> None:
        """Write a checkpoint; an error of one rank is raised on all."""
        checkpoint = self._checkpoint_connector.dump_checkpoint(weights_only)
        problem = None
        try:
            self._check_folder()
            self.strategy.save_checkpoint(checkpoint, filepath, storage_options=storage_options)
        except UserError as error:
            problem = str(error)
        problem = self.strategy.broadcast(problem)
        if problem is not None:
            raise RunDirectoryError(problem)

    def _run(
        self,
        model: LightningModule,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
    ) -> Any:
        """Check and agree on the checkpoint; turn signals and deleted folders into their errors."""
        is_fitting = self.state.fn == TrainerFn.FITTING
        path = self._agreed(ckpt_path)
        # Lightning sets its own ckpt_path only after the callbacks' setup, which needs to know.
        if is_fitting:
            self.run.resumed_from = path
        elif path is not None:
            self._forget_averages()
        if self.is_global_zero and Path(self.default_root_dir).is_dir():
            self._folder = os.open(self.default_root_dir, os.O_RDONLY)
        try:
            found = super()._run(model, ckpt_path=path, weights_only=True)
            self._check_folder()
            if is_fitting and self._connector.is_asked:  # after the last batch
                raise StoppedBySignal(self._connector.number)
            return found
        except (UserError, StoppedBySignal):
            raise
        except Exception:  # loggers wrap errors of the system in others
            self._check_folder()
            raise
        except KeyboardInterrupt:  # before there are handlers; Lightning's status would be 1
            raise StoppedBySignal(signal.SIGINT) from None
        except SIGTERMException:
            if not is_fitting:
                raise
            self._connector.requeue()
            raise StoppedBySignal(self._connector.number) from None
        except SystemExit as stop:
            raise UserError(
                f"something in the experiment ended the process (exit status {stop.code}) before "
                "the run was finished; the last checkpoint is kept. Find what calls sys.exit"
            ) from stop
        finally:
            if self._folder is not None:
                os.close(self._folder)
                self._folder = None

    def _agreed(self, ckpt_path: str | Path | None) -> str | None:
        """The checkpoint of the first rank, which checks it, and its run directory on all ranks.

        Ranks that torchrun or SLURM start look at the run directory at different times.
        """
        path = None if ckpt_path is None else str(ckpt_path)
        if self.world_size > 1:  # from here on all ranks end with the first one
            self.strategy.setup_environment()
        if path is not None and self.is_global_zero:
            checkpoint = load_checkpoint(path)
            check_version(path, checkpoint)
            if self.run.settings is not None:
                is_fitting = self.state.fn == TrainerFn.FITTING
                check = check_resumed if is_fitting else check_evaluated
                check(settings_in(checkpoint, path), self.run.settings, path)
        if self.world_size > 1:
            given = (str(self.default_root_dir), path)
            self._default_root_dir, path = self.strategy.broadcast(given)
        return path

    def _check_folder(self) -> None:
        path = Path(self.default_root_dir)
        if self._folder is None or (
            path.exists() and os.path.samestat(os.fstat(self._folder), path.stat())
        ):
            return
        raise RunDirectoryError(
            f"{path} was deleted or moved while this run wrote to it (epoch {self.current_epoch}, "
            f"step {self.global_step}): its configuration, checkpoints and logs so far are not "
            "there. If it was moved, move it back and resume from its last checkpoint; if it was "
            "deleted, run the same command again"
        )

    def _forget_averages(self) -> None:
        """Have the file's weights evaluated: after ``fit`` averaging would swap in the raw ones."""
        for callback in self.callbacks:
            if isinstance(callback, WeightAveraging):
                callback._average_model = None
