"""What TensorBoard shows beside the losses: gradient norm, example grids, hyper-parameters."""

import re
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from common.callbacks.finite import gradient_norms
from common.classifier import classifier_of
from common.evaluation import predict
from common.objectives import Batch
from common.optimization import is_logged

FINAL_METRICS = re.compile(r"test/((clean_acc|worst)(_on_\d+)?)")


class Monitoring(Callback):
    """Writes to TensorBoard what a researcher looks at while and after a run trains.

    Per logged step the norm of the gradient; per validation a grid of clean and adversarial
    images with their difference and the predicted labels; on test the hyper-parameters with the
    final metrics.

    Args:
        images: Examples per grid; 0 draws none.
        every_n_epochs: Draw grids and histograms after every n-th epoch.
        hyperparameters: Settings of the run; the command line fills them in.
    """

    def __init__(
        self,
        images: int = 8,
        every_n_epochs: int = 1,
        hyperparameters: dict[str, Any] | None = None,
    ) -> None:
        self.images = images
        self.every_n_epochs = every_n_epochs
        self.hyperparameters = hyperparameters or {}

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Log the l2 norm of the gradient the optimiser is about to use."""
        if is_logged(trainer):
            names, norms = gradient_norms(pl_module)
            if names:  # none, where weight averaging passes over the data once more
                pl_module.log("train/grad_norm", norms.norm())

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw the first examples of the first batch."""
        logger = tensorboard_of(trainer)
        if (
            batch_idx != 0
            or not trainer.is_global_zero
            or trainer.sanity_checking
            or logger is None
            or (trainer.current_epoch + 1) % self.every_n_epochs
        ):
            return
        writer, step = logger.experiment, trainer.global_step
        if self.images and "x_adv" in batch:
            writer.add_figure("val/examples", self._grid(trainer, pl_module, batch), step)
        classifier_of(pl_module).log_histograms(
            lambda name, values: writer.add_histogram(f"val/{name}", values.float().cpu(), step),
            batch,
        )

    def _grid(self, trainer: Trainer, module: LightningModule, batch: Batch) -> Any:
        # matplotlib is imported only where something is drawn
        from common.evaluation.drawing import adversarial_grid

        part = {key: value[: self.images] for key, value in batch.items()}
        data = getattr(trainer, "datamodule", None)
        return adversarial_grid(
            part["x"],
            part["x_adv"],
            part["y"],
            predict(module, part["x"]),
            predict(module, part["x_adv"]),
            class_names=getattr(data, "class_names", ()),
        )

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """File the hyper-parameters together with what they led to."""
        logger = tensorboard_of(trainer)
        if logger is None or not trainer.is_global_zero:
            return
        measured = {
            f"hp/{found[1]}": float(value)
            for key, value in trainer.callback_metrics.items()
            if (found := FINAL_METRICS.fullmatch(key))
        }
        logger.log_hyperparams(self.hyperparameters, measured)


def tensorboard_of(trainer: Trainer) -> TensorBoardLogger | None:
    """The first TensorBoard among a run's loggers."""
    return next((found for found in trainer.loggers if isinstance(found, TensorBoardLogger)), None)
