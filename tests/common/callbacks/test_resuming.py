"""Stopped anywhere and resumed: the same run as an undisturbed one."""

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import nn

from common.attacks.pgd import FGSM, PGD
from common.callbacks.adversarial_training import AdversarialTraining
from common.callbacks.averaging import LateAveraging, WarmUpAveraging
from common.callbacks.checkpointing import LastCheckpoint, SelectedCheckpoint
from common.callbacks.costs import training_cost
from common.callbacks.resuming import STATES
from common.callbacks.robust_evaluation import RobustEvaluation
from common.callbacks.weight_perturbation import AdversarialWeightPerturbation
from common.classifier import RobustClassifier
from common.data.images import ImageDataModule
from common.data.sources import Digits
from common.errors import ConfigurationError
from common.evaluation import SuiteEntry
from common.objectives import TRADES

EPOCHS, BATCHES = 3, 6


def classifier() -> RobustClassifier:
    """With dropout and batch-norm, whose states both have to be restored."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 10)
    )
    optimizer = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    scheduler = partial(torch.optim.lr_scheduler.StepLR, step_size=4, gamma=0.7)
    return RobustClassifier(net, TRADES(1.0), optimizer, scheduler, scheduler_interval="step")


class Accident(Callback):
    """Does something to the run in the middle of a batch, or in the n-th validation, from 0."""

    def __init__(self, what: Callable[[], None], *at: int) -> None:
        self.at, self.what, self.validations = at, what, 0

    def on_before_backward(self, trainer: Any, *_: Any) -> None:
        if (trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_idx) == self.at:
            self.what()

    def on_validation_batch_end(self, *_: Any) -> None:
        if (self.validations,) == self.at:
            self.what()

    def on_validation_epoch_end(self, *_: Any) -> None:
        self.validations += 1


class StopAfter(Callback):
    """Asks the run to end after a batch."""

    def __init__(self, *at: int) -> None:
        self.at = at

    def on_train_batch_end(self, trainer: Any, _: Any, __: Any, ___: Any, batch_idx: int) -> None:
        trainer.should_stop |= (trainer.current_epoch, batch_idx) == self.at


@pytest.fixture(scope="module")
def fit(quiet_trainer) -> Callable[..., None]:
    """``fit(folder, *callbacks, resume=False, every=None, **settings)``."""

    def call(folder: Path, *extra: Callback, resume: bool = False, every: Any = None,
             **settings: Any) -> None:  # fmt: skip
        callbacks = [
            AdversarialTraining(PGD(0.2, 0.1, 2)),
            AdversarialWeightPerturbation(gamma=0.01),
            RobustEvaluation(validation=SuiteEntry(FGSM(0.1))),
            *extra,
            LastCheckpoint(str(folder), every),
            SelectedCheckpoint(dirpath=str(folder)),
        ]
        trainer = quiet_trainer(*callbacks, max_epochs=EPOCHS, default_root_dir=folder, **settings)
        data = ImageDataModule(
            Digits(), 10, crop_padding=1, val_size=40, train_limit=10 * BATCHES, seed=0
        )
        path = folder / "last.ckpt" if resume and (folder / "last.ckpt").exists() else None
        trainer.fit(classifier(), datamodule=data, ckpt_path=path)

    return call


@pytest.fixture(scope="module")
def undisturbed(fit, tmp_path_factory) -> Callable[..., Path]:
    """The folder of an undisturbed run with these settings, made once."""
    made: dict[str, Path] = {}

    def call(*extra: Callback, **settings: Any) -> Path:
        key = repr(([type(c).__name__ for c in extra], settings))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("undisturbed")
            fit(made[key], *extra, **settings)
        return made[key]

    return call


def state(folder: Path, name: str = "last") -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / f"{name}.ckpt")
    return found


def assert_same(one: Path, other: Path) -> None:
    """Weights, optimiser, schedule, averages, best score and random numbers, bit for bit."""
    keys = ["state_dict", "optimizer_states", "lr_schedulers", STATES, "global_step", "epoch"]
    for name in ("last", "selected"):
        whole, resumed = state(one, name), state(other, name)
        for key in (*keys, *({"current_model_state", "averaging_state"} & whole.keys())):
            torch.testing.assert_close(resumed[key], whole[key], rtol=0, atol=0)
    scores = [
        [v["best_model_score"] for v in state(f)["callbacks"].values() if "best_model_score" in v]
        for f in (one, other)
    ]
    assert scores[0] == scores[1]


class StopError(Exception):
    """An accident."""


def stop() -> None:
    raise StopError


CASES: dict[str, tuple[Callable[[], list[Callback]], dict[str, Any]]] = {
    "EMA in float64": (lambda: [WarmUpAveraging(0.9)], {"precision": "64-true"}),
    "late EMA": (lambda: [LateAveraging(0.9, from_epoch=1)], {}),
    "Lightning's EMA": (lambda: [EMAWeightAveraging(decay=0.9)], {"accumulate_grad_batches": 2}),
}


@pytest.mark.parametrize(("extra", "settings"), CASES.values(), ids=CASES.keys())
def test_a_run_stopped_within_an_epoch_is_resumed_as_if_undisturbed(
    tmp_path: Path, fit, undisturbed, extra, settings
) -> None:
    """Data order, augmentation, attack noise, dropout, averages and the schedule."""
    settings |= {"every": 1}
    for at in ((0, 3), (1, 5), (2, 0)):
        with pytest.raises(StopError):
            fit(tmp_path, *extra(), Accident(stop, *at), resume=True, **settings)
    assert state(tmp_path)["epoch"] == 1, "epoch 2 had not begun"
    fit(tmp_path, *extra(), resume=True, **settings)
    assert_same(undisturbed(*extra(), **settings), tmp_path)
    measured = [
        training_cost(state(f))["epochs"] for f in (undisturbed(*extra(), **settings), tmp_path)
    ]
    assert measured == [3, 1], "epochs 0 and 1 were interrupted"


@pytest.mark.parametrize(("number", "accumulate"), [(0, 1), (1, 2), (2, 2)])
def test_an_interrupted_validation_is_repeated(
    tmp_path: Path, fit, undisturbed, number: int, accumulate: int
) -> None:
    """Within an epoch (even numbers) and at its end: the same checkpoint is selected."""
    settings: dict[str, Any] = {"every": 1, "val_check_interval": 2 / BATCHES}
    settings["accumulate_grad_batches"] = accumulate
    with pytest.raises(StopError):
        fit(tmp_path, Accident(stop, number), **settings)
    fit(tmp_path, resume=True, **settings)
    whole = undisturbed(**settings)
    assert_same(whole, tmp_path)
    logged = [state(f)["loops"]["fit_loop"]["epoch_loop.state_dict"] for f in (whole, tmp_path)]
    assert logged[0] == logged[1], "the steps that loggers count"


@pytest.mark.parametrize(("interval", "validations"), [(2 / BATCHES, 4), (1.0, 1)])
def test_a_run_that_was_asked_to_stop_stops_again(
    tmp_path: Path, fit, interval: float, validations: int
) -> None:
    """Killed in the validation that precedes its end, or after it."""
    one, other = tmp_path / "one", tmp_path / "other"
    settings: dict[str, Any] = {"every": 1, "val_check_interval": interval}
    fit(one, StopAfter(1, 2), **settings)
    assert state(one)["global_step"] == BATCHES + 3
    with pytest.raises(StopError):
        fit(other, StopAfter(1, 2), Accident(stop, validations), **settings)
    fit(other, resume=True, **settings)
    assert_same(one, other)
    before = (other / "last.ckpt").read_bytes()
    fit(other, resume=True, **settings)
    assert (other / "last.ckpt").read_bytes() == before


def test_without_saves_within_an_epoch_a_stopped_epoch_begins_again(
    tmp_path: Path, fit, undisturbed
) -> None:
    """And saving changes nothing; in a folder that is moved, the best score is kept."""
    assert_same(undisturbed(), undisturbed(every=2))
    with pytest.raises(StopError):
        fit(tmp_path / "other", Accident(stop, 2, 3))
    assert state(tmp_path / "other")["global_step"] == 2 * BATCHES
    moved = (tmp_path / "other").rename(tmp_path / "moved")
    fit(moved, resume=True)
    assert_same(undisturbed(), moved)
    assert str(tmp_path) not in repr(state(moved)["callbacks"])


@pytest.mark.parametrize("steps", [0, -1])
def test_a_number_of_steps_below_one(steps: int) -> None:
    for kind in (LastCheckpoint, SelectedCheckpoint):
        with pytest.raises(
            ConfigurationError, match=rf"every_n_train_steps must be .* got {steps}"
        ):
            kind(every_n_train_steps=steps)


# ---------------------------------------------------------------------------------------- signals


def send(number: int, times: int = 1) -> Callable[[], None]:
    def call() -> None:
        for _ in range(times):
            os.kill(os.getpid(), number)

    return call


@pytest.mark.parametrize(("accumulate", "steps"), [(1, BATCHES + 3), (2, BATCHES // 2)])
def test_sigterm_ends_the_batch_and_saves_whole_steps(
    tmp_path: Path, fit, undisturbed, accumulate: int, steps: int
) -> None:
    """It arrives while the weights are perturbed, which is not what is saved."""
    before, settings = signal.getsignal(signal.SIGTERM), {"accumulate_grad_batches": accumulate}
    with pytest.raises(SIGTERMException):
        fit(tmp_path, Accident(send(signal.SIGTERM), 1, 2), **settings)
    assert signal.getsignal(signal.SIGTERM) == before
    assert state(tmp_path)["global_step"] == steps
    fit(tmp_path, resume=True, **settings)
    assert_same(undisturbed(**settings), tmp_path)


def test_a_second_signal_ends_at_once_with_a_status(tmp_path: Path, fit) -> None:
    with pytest.raises(SIGTERMException):
        fit(tmp_path, Accident(send(signal.SIGTERM, 2), 0, 2))
    assert not (tmp_path / "last.ckpt").exists()
    # A shell starts its background jobs with SIGINT ignored, and Python keeps that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as caught:
            fit(tmp_path, Accident(send(signal.SIGINT, 2), 1, 2))
    finally:
        signal.signal(signal.SIGINT, before)
    assert caught.value.code == 128 + signal.SIGINT
    assert state(tmp_path)["global_step"] == BATCHES


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job of one task, and a scontrol that writes down what it is asked."""
    for name, value in {
        "NTASKS": 1, "NTASKS_PER_NODE": 1, "NNODES": 1, "JOB_NAME": "row", "JOB_ID": 4711,
        "PROCID": 0, "LOCALID": 0, "NODEID": 0, "NODELIST": "localhost",
    }.items():  # fmt: skip
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    for name in ("srun", "scontrol"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f'#!/bin/sh\necho {name} "$@" >> {tmp_path}/asked\n')
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return tmp_path / "asked"


@pytest.mark.parametrize(("array", "job"), [(False, "4711"), (True, "4000_7")])
def test_slurms_warning_saves_between_batches_and_queues_the_job_again(
    tmp_path: Path, fit, undisturbed, slurm: Path, monkeypatch, array: bool, job: str
) -> None:
    whole, run = undisturbed(), tmp_path / "run"
    if array:
        monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "4000")
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "7")
    with pytest.raises(SIGTERMException):
        fit(run, Accident(send(signal.SIGUSR1), 1, 2))
    assert slurm.read_text() == f"scontrol requeue {job}\n"
    assert state(run)["global_step"] == BATCHES + 3
    assert not list(run.glob("hpc*")), "Lightning would save in the middle of the batch"
    if not array:
        fit(run, resume=True)
        assert_same(whole, run)


def test_another_number_of_processes_is_told(tmp_path: Path, fit) -> None:
    with pytest.raises(StopError):
        fit(tmp_path, Accident(stop, 1, 3))
    checkpoint = state(tmp_path)
    checkpoint[STATES] *= 2
    torch.save(checkpoint, tmp_path / "last.ckpt")
    with pytest.warns(UserWarning, match="with 1 processes and was made with 2"):
        fit(tmp_path, resume=True)
