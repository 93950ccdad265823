"""Gradient norm, example grids and hyper-parameters in TensorBoard."""

import re
from typing import Any

from lightning import Trainer
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from common.callbacks.finite import gradient_norms
from common.evaluation import predict
from common.objectives import Batch
from common.optimization import is_logged

FINAL_METRICS = re.compile(r"test/((clean_acc|worst)(_on_\d+)?)")


class Monitoring(Callback):
    """Writes to TensorBoard beside the losses.

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

    def on_before_optimizer_step(self, trainer: Trainer, module: Any, *_: Any) -> None:
        """Log the l2 norm of the gradient that the optimiser is about to use."""
        if is_logged(trainer):
            names, norms = gradient_norms(module)
            if names:  # none, where weight averaging passes over the data once more
                module.log("train/grad_norm", norms.norm())

    def on_validation_batch_end(
        self, trainer: Trainer, module: Any, _: Any, batch: Batch, batch_idx: int, *__: Any
    ) -> None:
        """Draw the first examples of the first batch."""
        logger = tensorboard_of(trainer)
        is_due = batch_idx == 0 and (trainer.current_epoch + 1) % self.every_n_epochs == 0
        if logger is None or not is_due or trainer.sanity_checking:
            return
        writer, step = logger.experiment, trainer.global_step
        if self.images and "x_adv" in batch:
            writer.add_figure("val/examples", self._grid(trainer, module, batch), step)
        module.log_histograms(
            lambda name, values: writer.add_histogram(f"val/{name}", values.float().cpu(), step),
            batch,
        )

    def _grid(self, trainer: Trainer, module: Any, batch: Batch) -> Any:
        from common.evaluation.drawing import adversarial_grid  # matplotlib only where it is needed

        x, x_adv, y = (batch[key][: self.images] for key in ("x", "x_adv", "y"))
        names = getattr(getattr(trainer, "datamodule", None), "class_names", ())
        predicted = (predict(module, x), predict(module, x_adv))
        return adversarial_grid(x, x_adv, y, *predicted, class_names=names)

    def on_test_end(self, trainer: Trainer, *_: Any) -> None:
        """Log the hyper-parameters together with the final metrics."""
        if (logger := tensorboard_of(trainer)) is None:
            return
        measured = {
            f"hp/{found[1]}": float(value)
            for key, value in trainer.callback_metrics.items()
            if (found := FINAL_METRICS.fullmatch(key))
        }
        logger.log_hyperparams(self.hyperparameters, measured)


def tensorboard_of(trainer: Trainer) -> TensorBoardLogger | None:
    """The first TensorBoard among a run's loggers, on the first rank."""
    found = (one for one in trainer.loggers if isinstance(one, TensorBoardLogger))
    return next(found, None) if trainer.is_global_zero else None
