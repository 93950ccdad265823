"""Stops a run at any moment and resumes it with the same numbers."""

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import FrameType
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch import Callback
from lightning.pytorch.cli import LRSchedulerCallable
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from common.callbacks.averaging import weights_in_checkpoints
from common.errors import ConfigurationError
from common.optimization import simulate
from common.parsing import build
from common.results.identity import SETTINGS, Settings, scheduler_of

# Keys of a checkpoint: every rank's random state; whether the run was asked to end before its
# limits; which weights it holds (``raw``, or by what they are averaged).
STATES, STOPPED, WEIGHTS = "random_states", "stopped", "weights"


@dataclass
class Run:
    """How a run began; the defaults hold under Lightning's trainer.

    Args:
        settings: What the run is made with (:mod:`common.results.identity`).
        resumed_from: The checkpoint it continues.
        is_reproducing: Whether its results go into a table; checks are stricter then.
        attack: The entry of the suite under which predictions are made too.
    """

    settings: Mapping[str, Any] | None = None
    resumed_from: str | None = None
    is_reproducing: bool = False
    attack: str | None = None


class RunTrainer(Trainer):
    """A trainer that says which run it is."""

    callbacks: list[Callback]  # connectors of Lightning set these two
    fast_dev_run: bool | int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.run = Run()


def run_of(trainer: Trainer) -> Run:
    """The run of a trainer."""
    return trainer.run if isinstance(trainer, RunTrainer) else Run()


class Resuming(Callback):
    """Keeps the random states of every rank in checkpoints, and stops all ranks together.

    Data order, augmentation and attacks draw numbers by example and epoch and need no state.
    Dropout and the like draw from torch's generators, whose states are saved and restored.

    :class:`SignalConnector` notes a request to stop. Here the ranks agree on it after the same
    batch; :class:`~common.callbacks.checkpointing.LastCheckpoint` saves then, and Lightning ends
    the run.

    Checkpoints also get the settings of the run, and whether early stopping or another callback
    has ended it: it then stays ended when it is resumed.
    """

    def __init__(self) -> None:
        self._states: list[dict[str, Tensor]] | None = None
        self._made: Mapping[str, Any] | None = None

    def setup(self, trainer: Trainer, module: Any, stage: str) -> None:
        """Convert to float64 before a checkpoint is restored, which Lightning does afterwards.

        The weights, and averages of them that callbacks copy, would be rounded to float32.
        """
        if trainer.precision == "64-true":
            module.double()

    def on_train_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        """Stop after this batch if any rank was asked to, but not after the last of an epoch.

        Lightning would stop in the validation after it, and the epoch would be lost.
        """
        if not trainer.fit_loop.epoch_loop._num_ready_batches_reached():
            self.on_train_epoch_end(trainer)

    def on_train_epoch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        """Stop after the epoch if any rank was asked to; the ranks exchange one number."""
        connector = trainer._signal_connector
        if isinstance(connector, SignalConnector):
            is_asked = trainer.strategy.reduce_boolean_decision(connector.is_asked, all=False)
            connector.received_sigterm = bool(is_asked)

    def on_save_checkpoint(self, trainer: Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        """Add the random states, by rank."""
        mine = {"cpu": torch.get_rng_state()}
        if module.device.type == "cuda":
            mine["cuda"] = torch.cuda.get_rng_state(module.device)
        states = [mine]
        if trainer.world_size > 1:
            states = [{} for _ in range(trainer.world_size)]
            torch.distributed.all_gather_object(states, mine)
        checkpoint[STATES] = states
        checkpoint[STOPPED] = bool(trainer.should_stop)
        checkpoint[WEIGHTS] = weights_in_checkpoints(trainer)
        if (settings := run_of(trainer).settings) is not None:
            checkpoint[SETTINGS] = settings

    def on_load_checkpoint(self, trainer: Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        """Keep them for training; evaluation draws its own numbers."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self._states = checkpoint.get(STATES)
        self._made, given = checkpoint.get(SETTINGS), run_of(trainer).settings
        if self._made is not None and given is not None:
            continue_schedule(module, self._made, given, checkpoint)
        if checkpoint.get(STOPPED):
            self._stop_again(trainer, checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"])

    def _stop_again(self, trainer: Trainer, epochs: Mapping[str, int]) -> None:
        """End a run that had ended already, at once or after the validation that was due."""
        if epochs["processed"] < epochs["started"]:
            trainer.fit_loop.epoch_loop.stops_again = True
            return
        trainer.should_stop = True
        rank_zero_info(
            f"the run was ended by a callback (early stopping, a time limit) after epoch "
            f"{epochs['processed'] - 1}: it is finished, and not trained further"
        )

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        """Check the schedule; then set this rank's state, after everything else that draws."""
        check_horizon(trainer, module, self._made)
        states, self._states = self._states, None
        if states is None:
            return
        if len(states) != trainer.world_size:
            rank_zero_warn(
                f"the run is resumed with {trainer.world_size} processes and was made with "
                f"{len(states)}: dropout and the like draw other numbers"
            )
            return
        mine = states[trainer.global_rank]
        torch.set_rng_state(mine["cpu"])
        if "cuda" in mine and module.device.type == "cuda":
            torch.cuda.set_rng_state(mine["cuda"], module.device)


class StoppedBySignal(SIGTERMException):
    """A run ended by a signal; the exit status is 128 + its number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


class SignalConnector(_SignalConnector):
    """Signals end a run between two batches.

    SIGTERM, Ctrl-C (SIGINT), a closed terminal (SIGHUP) and SIGQUIT alike; those that were ignored
    when the command began, as under ``nohup``, stay so.

    Lightning's own handlers communicate, and on SLURM save a checkpoint, in the line that the
    signal interrupts, where weights may be perturbed. Here the handlers take a note. Outside
    training, where everything is on disk already, and at a second signal the process ends at once.
    """

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        self.is_asked = False
        self.is_requeued = False
        self.number = int(signal.SIGTERM)

    def register_signal_handlers(self) -> None:
        """Register the signals of a new run."""
        self.is_asked = self.is_requeued = False
        super().register_signal_handlers()
        for name in ("SIGINT", "SIGHUP", "SIGQUIT"):
            number = getattr(signal, name, None)  # not all of them everywhere
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                self._register_signal(number, self._sigterm_notifier_fn)

    def _sigterm_notifier_fn(self, signum: int, _: FrameType | None) -> None:
        is_over = self.is_asked or self.trainer.state.fn != TrainerFn.FITTING
        launcher = self.trainer.strategy.launcher
        # A terminal signals the processes that this one started itself.
        if launcher is not None and (is_over or signum == signal.SIGTERM) and not self.is_asked:
            launcher.kill(signal.SIGTERM)
        if is_over:
            raise StoppedBySignal(signum)
        self.number = signum
        self.is_asked = True
        # print could be interrupted by itself.
        os.write(
            2, b"stopping after this batch, or the validation after it; once more stops at once\n"
        )

    def _slurm_sigusr_handler_fn(self, signum: int, _: FrameType | None) -> None:
        self.is_requeued = True
        if self.trainer.state.fn != TrainerFn.FITTING:
            self.requeue()
            raise SIGTERMException
        self.is_asked = True

    def requeue(self) -> None:
        """Have SLURM queue the job again, if that is what the signal was for."""
        if not self.is_requeued or not self.trainer.is_global_zero:
            return
        job = os.environ["SLURM_JOB_ID"]
        if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
            job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
        done = subprocess.run(["scontrol", "requeue", job], check=False)
        print(f"SLURM was asked to queue job {job} again (status {done.returncode})", flush=True)


# ------------------------------------------------------------------------------------- schedules


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
