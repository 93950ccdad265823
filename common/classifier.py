"""The classifier every paper trains: a network, an objective and an optimiser."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchmetrics.classification import MulticlassAccuracy

from common.attacks.losses import as_class, classify, cross_entropy, hinge_margin
from common.errors import ConfigurationError, check_choice
from common.modes import try_out
from common.networks.parts import declared_losses
from common.objectives import Batch, InnerLoss, Objective, OnLogits, weighted
from common.optimization import ParameterGroup, is_logged, optimizer_of, scheduler_of, tell_metrics
from common.weights import check_weights_fit

Interval = Literal["epoch", "step"]


class RobustClassifier(LightningModule):
    """Network x objective x optimiser; the adversary is a callback and the data a data module.

    Args:
        net: Images in [0, 1], ``(N, C, H, W)``, to logits ``(N, K)``.
        objective: What the adversary maximises and the optimiser minimises.
        optimizer: Called with the parameters.
        scheduler: Called with the optimiser; none keeps the learning rate.
        scheduler_interval: Step the scheduler after every epoch or every optimiser step.
        groups: Parameters with another learning rate or weight decay than the rest.
        channels_last: Keep convolution weights in the layout ``NHWC``; often faster, with other
            rounding. Off by default, and not for networks with fewer than 16 channels: in this
            layout on a CPU torch 2.15 writes beyond its memory in the weight gradient of strided
            1x1 convolutions with fewer than 8 channels (8 too on large maps), and ends with
            ``double free`` or goes on. Which ones are hit depends on the processor.
    """

    def __init__(
        self,
        net: nn.Module,
        objective: Objective,
        optimizer: OptimizerCallable = torch.optim.SGD,
        scheduler: LRSchedulerCallable | None = None,
        scheduler_interval: Interval = "epoch",
        groups: list[ParameterGroup] | None = None,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        check_choice("scheduler_interval", scheduler_interval, Interval)
        self.net = net
        if channels_last:
            net.to(memory_format=torch.channels_last)
        self.objective = objective
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.scheduler_interval = scheduler_interval
        self.groups = groups or []
        self.accuracy: MulticlassAccuracy | None = None
        self.watched: dict[str, Tensor] = {}  # by name, until the next training loss

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, K)`` of images ``(N, C, H, W)`` in [0, 1]."""
        logits: Tensor = self.net(x)
        return logits

    def adaptive_losses(self) -> dict[str, InnerLoss]:
        """The losses that an evaluation maximises, by their names in a suite.

        Those of the logits, and those of every part that has more to attack (probes, routers,
        maps). Names starting with ``ce_`` climb cross-entropy, with ``cw_`` the margin.
        """
        usual = {"ce_f": OnLogits(cross_entropy), "cw_f": OnLogits(hinge_margin)}
        return declared_losses(self.net, usual)

    def setup(self, stage: str) -> None:
        """Find a misfit before training: of the objective, and by passing two blank images."""
        if stage == "fit":
            self.objective.check_network(self.net)
        data = getattr(self.trainer, "datamodule", None)
        shape, classes = getattr(data, "shape", None), getattr(data, "num_classes", None)
        if shape is None or classes is None:
            return
        remedy = (
            "choose a network for this size, resize the data, or drop model.net.in_channels (it is "
            "filled in from the data)"
        )
        logits = try_out(self, shape, remedy, count=2)
        if logits.ndim != 2 or logits.shape[1] != classes:
            raise ConfigurationError(
                f"the network returns {tuple(logits.shape[1:])} scores per image, the data have "
                f"{classes} classes; drop model.net.num_classes (it is filled in from the data) "
                "or choose other data"
            )
        if self.accuracy is None:
            self.accuracy = MulticlassAccuracy(num_classes=classes, average="micro")

    def on_train_epoch_start(self) -> None:
        """Tell the objective which epoch begins."""
        self.objective.set_epoch(self.current_epoch)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The objective's outer loss, weighted as :func:`weighted` says."""
        loss = weighted(self.objective.outer(self, batch), batch)
        self.objective.advance(is_step_over=not self.trainer.fit_loop._should_accumulate())
        if is_logged(self.trainer):
            for name, value in self.objective.report.items():
                self.log(f"train/{name}", value, batch_size=len(batch["y"]), sync_dist=True)
        self.log("train/loss", loss, batch_size=len(batch["y"]), sync_dist=True)
        return weighted(loss, batch, "window")

    def watch(self, name: str, value: Tensor) -> None:
        """Have a tensor checked with the next training loss; one that is not finite ends the run.

        Nothing waits for the device: callbacks, routers and masks may watch in every step.
        """
        self.watched[name] = value.detach()

    def log_histograms(self, add: Callable[[str, Tensor], None], batch: Batch) -> None:
        """Show values of the first validation batch in TensorBoard; nothing by default.

        ``add`` takes a name, shown as ``val/<name>``, and values of any shape.
        """

    def on_train_epoch_end(self) -> None:
        """Step the schedulers that wait for a metric."""
        tell_metrics(self)

    def validation_step(self, batch: Batch, batch_idx: int, stage: str = "val") -> None:
        """Accuracy on clean images."""
        logits = self(batch["x"])
        classes = logits.shape[1]
        if self.accuracy is None:  # used without a data module that knows its classes
            self.accuracy = MulticlassAccuracy(classes, average="micro").to(self.device)
        self.accuracy.update(as_class(classify(logits), batch["y"], classes), batch["y"])
        self.log(f"{stage}/clean_acc", self.accuracy, on_step=False, on_epoch=True, prog_bar=True)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Accuracy on clean images."""
        self.validation_step(batch, batch_idx, "test")

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Index, label, predicted class and class probabilities ``(N, K)`` of every image."""
        logits = self(batch["x"])
        known = {key: batch[key] for key in ("index", "y")}
        return {**known, "predicted": classify(logits), "probabilities": logits.softmax(dim=1)}

    def configure_optimizers(self) -> Any:
        """The injected optimiser over all trainable parameters, and its scheduler."""
        optimizer = optimizer_of(self)
        if self.scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": scheduler_of(self, optimizer)}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """As Lightning's, except for schedulers that have their metric from the epoch's end."""
        if not isinstance(scheduler, ReduceLROnPlateau):
            super().lr_scheduler_step(scheduler, metric)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the weights of another network before any of them is loaded."""
        check_weights_fit(self.state_dict(), checkpoint["state_dict"], "the checkpoint")
