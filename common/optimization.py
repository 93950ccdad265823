"""The injected optimiser and scheduler of a classifier, checked before training."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from lightning import LightningModule, Trainer
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from common.errors import ConfigurationError, UserError, is_out_of_memory

_TRIED = 10_000  # epochs

Rates = list[list[float]]
"""Learning rate of every parameter group, by step of the schedule."""


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with another learning rate or weight decay than the rest.

    Args:
        parameters: Patterns of names as in ``state_dict``, ``net.stem.*`` for instance
            (``*`` matches dots too).
        lr_mult: Their learning rate is this times that of the rest, all along the schedule.
        weight_decay: Theirs; ``None`` takes that of the rest.
        may_be_empty: Whether it is fine when no trainable parameter matches.
    """

    parameters: list[str]
    lr_mult: float = 1.0
    weight_decay: float | None = None
    may_be_empty: bool = False

    def __post_init__(self) -> None:
        if self.lr_mult < 0.0:
            raise ConfigurationError(
                f"lr_mult must not be negative, got {self.lr_mult}; 1 is the common learning rate"
            )
        if self.weight_decay is not None and self.weight_decay < 0.0:
            raise ConfigurationError(
                f"weight_decay must not be negative, got {self.weight_decay}; 0 is none"
            )


def grouped_optimizer(
    make: Callable[[Iterable[object]], Optimizer],
    module: nn.Module,
    groups: Sequence[ParameterGroup] = (),
) -> Optimizer:
    """An optimiser over all trainable parameters, with the settings of their groups.

    Args:
        make: Called with the parameters, or with the groups where there are any, the rest first.
        module: Whose parameters.
        groups: A parameter may match one at most, and a group must match one unless it may be
            empty; otherwise a ConfigurationError is raised.
    """
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not groups:
        return make(iter(trainable.values()))
    every = [ParameterGroup([], may_be_empty=True), *groups]
    members: list[list[nn.Parameter]] = [[] for _ in every]
    for name, parameter in trainable.items():
        matched = (any(fnmatchcase(name, one) for one in group.parameters) for group in every)
        where = [i for i, is_member in enumerate(matched) if is_member]
        if len(where) > 1:
            raise ConfigurationError(
                f"parameter {name} belongs to several groups, {every[where[0]].parameters} and "
                f"{every[where[1]].parameters}; make the patterns exclude each other"
            )
        members[where[0] if where else 0].append(parameter)
    kept: list[tuple[ParameterGroup, dict[str, object]]] = []
    for group, its in zip(every, members, strict=True):
        if not its and not group.may_be_empty:
            raise ConfigurationError(
                f"no trainable parameter matches {group.parameters}; the names are like "
                f"{', '.join(list(trainable)[:3])}; correct the pattern or drop the group from "
                "model.groups"
            )
        decay = {} if group.weight_decay is None else {"weight_decay": group.weight_decay}
        if its:
            kept.append((group, {"params": its, **decay}))
    optimizer = make([settings for _, settings in kept])
    for (group, _), made in zip(kept, optimizer.param_groups, strict=True):
        made["lr"] *= group.lr_mult
    return optimizer


def optimizer_of(module: Any) -> Optimizer:
    """The optimiser of a classifier; a ConfigurationError if it refuses its arguments."""
    try:
        return grouped_optimizer(module.optimizer, module, module.groups)
    except Exception as error:
        if isinstance(error, UserError) or is_out_of_memory(error):
            raise
        what = _words(error) if module.optimizer else "it is null; name a class of torch.optim"
        raise ConfigurationError(f"model.optimizer: {what}") from error


def scheduler_of(module: Any, optimizer: Optimizer) -> dict[str, Any]:
    """The scheduler of a classifier, as Lightning wants it described.

    One that is stepped by the epoch is first tried over the whole run, with a second optimiser.

    Raises:
        ConfigurationError: If it refuses its arguments, fails in a later epoch, or waits for a
            metric that does not go with it.
    """
    epochs = 1 if module._trainer is None else module.trainer.max_epochs or 1
    try:
        scheduler = module.scheduler(optimizer)
    except Exception as error:
        raise ConfigurationError(
            f"model.scheduler fails at the start: {_words(error)}; give it arguments for this run "
            f"of {epochs} epochs"
        ) from error
    described = {"scheduler": scheduler, "interval": module.scheduler_interval}
    if isinstance(scheduler, ReduceLROnPlateau):
        return described | {"monitor": _monitor_of(scheduler, module), "strict": False}
    is_by_epoch = module.scheduler_interval == "epoch"
    simulate(module, module.scheduler, min(epochs - 1, _TRIED) if is_by_epoch else 1)
    return described


def simulate(module: Any, make: Any, steps: int) -> tuple[Rates, dict[str, Any] | None]:
    """Learning rates at steps 0 to ``steps`` of a schedule, and its state there.

    Args:
        module: The classifier whose optimiser is scheduled; it is not changed.
        make: Optimiser -> scheduler; ``None`` for constant rates.
        steps: How often the schedule is stepped; a ConfigurationError if it fails.
    """
    optimizer = optimizer_of(module)
    scheduler = None if make is None else make(optimizer)
    rates: Rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the optimiser takes no step
        for step in range(steps + 1):
            rates.append([float(group["lr"]) for group in optimizer.param_groups])
            if scheduler is None or step == steps:
                continue
            try:
                scheduler.step()
            except Exception as error:
                raise ConfigurationError(
                    f"model.scheduler fails after {module.scheduler_interval} {step}: "
                    f"{_words(error)}; give it arguments for the whole run"
                ) from error
    return rates, None if scheduler is None else scheduler.state_dict()


def _monitor_of(scheduler: ReduceLROnPlateau, module: Any) -> str:
    """The metric that it waits for: its own, or else the checkpoint's."""
    trainer = module.trainer
    chosen = {c.monitor: c.mode for c in trainer.checkpoint_callbacks if c.monitor}
    monitor = getattr(scheduler, "monitor", None) or next(iter(chosen), "val/clean_acc")
    mode = chosen.get(monitor, "max" if monitor.endswith("_acc") else scheduler.mode)
    problem = ""
    if module.scheduler_interval != "epoch":
        problem = "which is known after an epoch; set model.scheduler_interval: epoch"
    elif scheduler.mode != mode:
        problem = (
            f"to become better, that is {'larger' if mode == 'max' else 'smaller'}, and its mode "
            f"is {scheduler.mode}; set model.scheduler.mode: {mode}"
        )
    elif monitor.startswith("val/") and not trainer.enable_validation:
        problem = (
            "and trainer.limit_val_batches is 0, so nothing is validated; raise it or choose "
            "another scheduler"
        )
    if problem:
        raise ConfigurationError(f"model.scheduler waits for {monitor} {problem}")
    return str(monitor)


def tell_metrics(module: LightningModule) -> None:
    """Step the schedulers that wait for a metric, at the end of an epoch that measured it.

    Lightning would do so after the epoch's checkpoint has been written, and a resumed run would
    have another learning rate.
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
        known = dict(trainer.callback_metrics)
        for callback in trainer.checkpoint_callbacks:  # what they compute from those
            known |= callback._monitor_candidates(trainer)  # type: ignore[attr-defined]
        if monitor not in known:
            raise ConfigurationError(
                f"model.scheduler waits for {monitor}, which nothing logs; there are "
                f"{', '.join(sorted(known))}"
            )
        config.scheduler.step(known[monitor])


def _words(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def is_logged(trainer: Trainer) -> bool:
    """Whether Lightning logs the optimiser step that comes next."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by a connector
    return every > 0 and (trainer.global_step + 1) % every == 0


def refuse_half_precision(trainer: Trainer, what: str) -> None:
    """Refuse fp16 for the gradients ``what``, which have no loss scaling and would underflow."""
    if trainer.precision in ("16-mixed", "16-true", "transformer-engine-float16"):
        raise ConfigurationError(
            f"trainer.precision is {trainer.precision}: fp16 underflows most of {what}, which "
            "would be zero; use bf16-mixed or 32-true"
        )
