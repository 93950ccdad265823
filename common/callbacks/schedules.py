"""Learning-rate schedules of runs that are resumed with another length or another schedule."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.cli import LRSchedulerCallable

from common.errors import ConfigurationError
from common.optimization import simulate
from common.parsing import build
from common.results.identity import Settings, scheduler_of


def continue_schedule(
    module: Any, made: Settings, given: Settings, checkpoint: dict[str, Any]
) -> None:
    """Replace the ``lr_schedulers`` of a checkpoint by that of a module.

    Args:
        module: The classifier with the schedule that is given now.
        made: Settings the checkpoint was made with.
        given: Settings of the module.
        checkpoint: What is changed.

    Raises:
        ConfigurationError: If the learning rates of the steps done so far differ.
    """
    node = scheduler_of(made)
    if node == scheduler_of(given):
        return
    progress = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    steps = progress if module.scheduler_interval == "epoch" else checkpoint["global_step"]
    for state in checkpoint["lr_schedulers"]:
        steps = state["last_epoch"]
    make = None
    if node is not None:
        make = build({"scheduler": LRSchedulerCallable}, {"scheduler": node}).scheduler
    past, _ = simulate(module, make, steps)
    present, state = simulate(module, module.scheduler, steps)
    for step, (before, now) in enumerate(zip(past, present, strict=True)):
        if not torch.allclose(torch.tensor(before), torch.tensor(now), rtol=1e-6, atol=0.0):
            raise ConfigurationError(
                "model.scheduler is another one than in the checkpoint, and the learning rates of "
                f"the {steps} steps done so far differ: at step {step} {before[0]:.6g} in the "
                f"checkpoint, {now[0]:.6g} given. Give the schedule of the run, one with the same "
                "past, or begin a new run: fit without --ckpt_path"
            )
    checkpoint["lr_schedulers"] = [] if state is None else [state]


def check_horizon(trainer: Trainer, module: Any, made: Settings | None) -> None:
    """Refuse a schedule that does not last for the whole run, before training.

    Args:
        trainer: About to train.
        module: The classifier.
        made: Settings of the checkpoint that training continues; ``None`` for a new run.

    Raises:
        ConfigurationError: If the schedule ends before the run, or if a longer run makes learning
            rates rise again at the point where it ended before.
    """
    for config in trainer.lr_scheduler_configs:
        limits = {"max_epochs": trainer.max_epochs, "max_steps": trainer.max_steps}
        total = _steps(trainer, config.interval, limits)
        end = getattr(config.scheduler, "total_steps", total)
        if total is not None and end is not None and end < total:
            raise ConfigurationError(
                f"model.scheduler ends after {end} steps and the run has {total}; set its "
                "total_steps to that, or shorten the run"
            )
        before = _steps(trainer, config.interval, (made or {}).get("trainer") or {})
        if total is None or before is None or before >= total or config.reduce_on_plateau:
            continue
        rates, _ = simulate(module, module.scheduler, total - 1)
        if _rises_again(rates) and not _rises_again(rates[:before]):
            raise ConfigurationError(
                f"with {trainer.max_epochs} epochs model.scheduler raises the learning rate again "
                f"after {before} steps, where the checkpoint's run ended; it was made for that "
                "length. Begin a new run with a longer schedule: fit without --ckpt_path"
            )


def _steps(trainer: Trainer, interval: str, limits: Mapping[str, Any]) -> int | None:
    """Steps of a schedule within these limits of a run; ``None`` where there is no limit."""
    per_epoch = 1
    if interval != "epoch":
        per_epoch = -(-int(trainer.num_training_batches) // trainer.accumulate_grad_batches)
    epochs, steps = (limits.get(name) for name in ("max_epochs", "max_steps"))
    known = [] if epochs in (None, -1) else [epochs * per_epoch]
    if interval != "epoch" and steps not in (None, -1):
        known.append(steps)
    return min(known, default=None)


def _rises_again(rates: Sequence[Sequence[float]]) -> bool:
    """Whether the rate of any group rises after it has fallen."""
    for group in zip(*rates, strict=True):
        has_fallen = False
        for before, now in pairwise(group):
            if has_fallen and now > before * (1 + 1e-6):
                return True
            has_fallen = has_fallen or now < before * (1 - 1e-6)
    return False
