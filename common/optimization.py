"""What moves the weights: the injected optimiser and scheduler, tried out before anything is."""

import warnings
from typing import Any

from lightning import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from common.errors import ConfigurationError, UserError, is_out_of_memory
from common.parameter_groups import grouped_optimizer

_TRIED = 10_000  # epochs


def optimizer_of(module: Any) -> Optimizer:
    """The optimiser of a classifier over its trainable parameters.

    Raises:
        ConfigurationError: If it refuses its arguments.
    """
    try:
        return grouped_optimizer(module.optimizer, module, module.groups)
    except Exception as error:
        if isinstance(error, UserError) or is_out_of_memory(error):
            raise
        raise ConfigurationError(f"model.optimizer: {_words(error)}") from error


def scheduler_of(module: Any, optimizer: Optimizer) -> dict[str, Any]:
    """The scheduler of a classifier, as Lightning wants it described.

    One that is stepped by the epoch is stepped through the run first, on an optimiser of its own.

    Raises:
        ConfigurationError: If it refuses its arguments, fails in a later epoch, or waits for a
            metric that does not go with it.
    """
    epochs = 1 if module._trainer is None else module.trainer.max_epochs or 1
    steps, epoch = min(epochs - 1, _TRIED) if module.scheduler_interval == "epoch" else 1, 0
    try:
        trial = module.scheduler(optimizer_of(module))
        if not isinstance(trial, ReduceLROnPlateau):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that the optimiser takes no step
                for _ in range(steps):
                    epoch += 1
                    trial.step()
    except Exception as error:
        raise ConfigurationError(
            f"model.scheduler fails {f'after epoch {epoch - 1}' if epoch else 'at the start'}: "
            f"{_words(error)}; give it arguments for this run of {epochs} epochs"
        ) from error
    scheduler = module.scheduler(optimizer)
    described = {"scheduler": scheduler, "interval": module.scheduler_interval}
    if isinstance(scheduler, ReduceLROnPlateau):
        described |= {"monitor": _monitor_of(scheduler, module), "strict": False}
    return described


def _monitor_of(scheduler: ReduceLROnPlateau, module: Any) -> str:
    """The metric that it waits for: its own, or else the checkpoint's."""
    trainer = module.trainer
    chosen = {c.monitor: c.mode for c in trainer.checkpoint_callbacks if c.monitor}
    monitor = getattr(scheduler, "monitor", None) or next(iter(chosen), "val/clean_acc")
    mode = chosen.get(monitor, "max" if monitor.endswith("_acc") else scheduler.mode)
    if module.scheduler_interval != "epoch":
        raise ConfigurationError(
            f"model.scheduler waits for {monitor}, which is known after an epoch; set "
            "model.scheduler_interval: epoch"
        )
    if scheduler.mode != mode:
        raise ConfigurationError(
            f"model.scheduler waits for {monitor} to become better, that is "
            f"{'larger' if mode == 'max' else 'smaller'}, and its mode is {scheduler.mode}; set "
            f"model.scheduler.mode: {mode}"
        )
    if monitor.startswith("val/") and not trainer.enable_validation:
        raise ConfigurationError(
            f"model.scheduler waits for {monitor} and trainer.limit_val_batches is 0, so nothing "
            "is validated; raise it or choose another scheduler"
        )
    return str(monitor)


def tell_metrics(module: LightningModule) -> None:
    """Step the schedulers that wait for a metric, at the end of an epoch that measured it.

    Lightning would do so after the epoch's checkpoint has been written, and a run that goes on from
    there would have another learning rate.

    Raises:
        ConfigurationError: If nobody measured it.
    """
    trainer = module.trainer
    every = trainer.check_val_every_n_epoch
    is_validated = every is None or (trainer.current_epoch + 1) % every == 0
    for config in trainer.lr_scheduler_configs:
        monitor = str(config.monitor)
        if not isinstance(config.scheduler, ReduceLROnPlateau) or (
            monitor.startswith("val/") and not is_validated
        ):
            continue
        known = _metrics(trainer)
        if monitor not in known:
            raise ConfigurationError(
                f"model.scheduler waits for {monitor}, which nothing logs; there are "
                f"{', '.join(sorted(known))}"
            )
        config.scheduler.step(known[monitor])


def _metrics(trainer: Trainer) -> dict[str, Tensor]:
    """What is logged, and what checkpoints compute of it."""
    known = dict(trainer.callback_metrics)
    for callback in trainer.checkpoint_callbacks:
        known |= callback._monitor_candidates(trainer)  # type: ignore[attr-defined]
    return known


def _words(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
