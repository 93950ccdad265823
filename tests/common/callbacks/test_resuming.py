"""Stopped anywhere and gone on: the same run as one that nobody disturbed."""

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
from torch import Tensor, nn

from common.attacks.pgd import FGSM, PGD
from common.callbacks.adversarial_training import AdversarialTraining
from common.callbacks.averaging import LateAveraging, WarmUpAveraging
from common.callbacks.checkpointing import LastCheckpoint, SelectedCheckpoint
from common.callbacks.resuming import STATES
from common.callbacks.robust_evaluation import RobustEvaluation
from common.callbacks.weight_perturbation import AdversarialWeightPerturbation
from common.classifier import RobustClassifier
from common.cli.trainer import Trainer
from common.data.images import ImageDataModule
from common.data.sources import Digits
from common.errors import ConfigurationError
from common.evaluation import SuiteEntry
from common.objectives import TRADES

EPOCHS, BATCHES = 3, 6


def classifier() -> RobustClassifier:
    """With dropout and batch-norm, whose states both have to go on."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 10)
    )
    optimizer = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    scheduler = partial(torch.optim.lr_scheduler.StepLR, step_size=4, gamma=0.7)
    return RobustClassifier(net, TRADES(1.0), optimizer, scheduler, scheduler_interval="step")


class Accident(Callback):
    """Does something to the run in the middle of a batch."""

    def __init__(self, epoch: int, batch: int, what: Callable[[], None]) -> None:
        self.at, self.what = (epoch, batch), what

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        loop = trainer.fit_loop.epoch_loop
        if (trainer.current_epoch, loop.batch_idx) == self.at:
            self.what()


class StopAfter(Callback):
    """Asks the run to end after a batch."""

    def __init__(self, epoch: int, batch: int) -> None:
        self.at = (epoch, batch)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        trainer.should_stop |= (trainer.current_epoch, batch_idx) == self.at


class AccidentInValidation(Callback):
    """Does something to the run in the n-th validation, from 0."""

    def __init__(self, number: int, what: Callable[[], None]) -> None:
        self.left, self.what = number, what

    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        if self.left == 0:
            self.what()

    def on_validation_epoch_end(self, *_: Any, **__: Any) -> None:
        self.left -= 1


def fit(folder: Path, *extra: Callback, resume: bool = False, **settings: Any) -> RobustClassifier:
    options: dict[str, Any] = {"every": None, "accumulate": 1, "precision": "32-true"} | settings
    model = classifier()
    trainer = Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        precision=options["precision"],
        accumulate_grad_batches=options["accumulate"],
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        val_check_interval=options.get("interval", 1.0),
        callbacks=[
            AdversarialTraining(PGD(0.2, 0.1, 2)),
            AdversarialWeightPerturbation(gamma=0.01),
            RobustEvaluation(validation=SuiteEntry(FGSM(0.1))),
            *extra,
            LastCheckpoint(str(folder), options["every"]),
            SelectedCheckpoint(dirpath=str(folder)),
        ],
    )
    data = ImageDataModule(
        Digits(), 10, crop_padding=1, val_size=40, train_limit=10 * BATCHES, seed=0
    )
    path = folder / "last.ckpt" if resume else None
    trainer.fit(model, datamodule=data, ckpt_path=path)
    return model


def state(folder: Path, name: str = "last") -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / f"{name}.ckpt")
    return found


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """All tensors and numbers of nested containers, by path."""
    if isinstance(value, dict):
        pairs = [flat(part, f"{prefix}/{key}") for key, part in value.items()]
    elif isinstance(value, list | tuple):
        pairs = [flat(part, f"{prefix}/{i}") for i, part in enumerate(value)]
    else:
        return {prefix: value}
    return {key: part for pair in pairs for key, part in pair.items()}


def assert_same(one: Path, other: Path) -> None:
    """Weights, optimiser, schedule, averages, best score and random numbers, bit for bit."""
    for name in ("last", "selected"):
        whole, resumed = state(one, name), state(other, name)
        keys = ["state_dict", "optimizer_states", "lr_schedulers", STATES, "global_step", "epoch"]
        keys += [k for k in ("current_model_state", "averaging_state") if k in whole]
        for key in keys:
            first, second = flat(whole[key]), flat(resumed[key])
            assert first.keys() == second.keys()
            for path, value in first.items():
                same = torch.equal(value, second[path]) if isinstance(value, Tensor) else None
                assert same or value == second[path], f"{name}: {key}{path}"
    scores = [
        [v["best_model_score"] for v in state(f)["callbacks"].values() if "best_model_score" in v]
        for f in (one, other)
    ]
    assert scores[0] == scores[1]


class StopError(Exception):
    """An accident."""


def stop() -> None:
    raise StopError


CASES = {
    "plain": (list, {}),
    "accumulated": (list, {"accumulate": 2}),
    "float64": (list, {"precision": "64-true"}),
    "EMA": (lambda: [WarmUpAveraging(0.9)], {}),
    "EMA in float64": (lambda: [WarmUpAveraging(0.9)], {"precision": "64-true"}),
    "late EMA": (lambda: [LateAveraging(0.9, from_epoch=1)], {}),
    "Lightning's EMA": (lambda: [EMAWeightAveraging(decay=0.9)], {"accumulate": 2}),
}


@pytest.mark.parametrize(("extra", "settings"), CASES.values(), ids=CASES.keys())
def test_a_run_stopped_within_an_epoch_goes_on_as_if_undisturbed(
    tmp_path: Path, extra: Callable[[], list[Callback]], settings: dict[str, Any]
) -> None:
    """Data order, augmentation, attack noise, dropout, averages and the schedule go on."""
    one, other = tmp_path / "one", tmp_path / "other"
    fit(one, *extra(), every=1, **settings)
    for epoch, batch in ((0, 3), (1, 5), (2, 0)):
        with pytest.raises(StopError):
            fit(
                other,
                *extra(),
                Accident(epoch, batch, stop),
                every=1,
                resume=(other / "last.ckpt").exists(),
                **settings,
            )
    assert state(other)["epoch"] == 1, "epoch 2 had not begun"
    fit(other, *extra(), every=1, resume=True, **settings)
    assert_same(one, other)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("number", [0, 1, 3, 5])
def test_a_validation_that_was_interrupted_is_made_up(
    tmp_path: Path, number: int, accumulate: int
) -> None:
    """Within an epoch (even numbers) and at its end: the same checkpoint is selected."""
    one, other = tmp_path / "one", tmp_path / "other"
    settings: dict[str, Any] = {"every": 1, "interval": 2 / BATCHES, "accumulate": accumulate}
    fit(one, **settings)
    with pytest.raises(StopError):
        fit(other, AccidentInValidation(number, stop), **settings)
    fit(other, resume=(other / "last.ckpt").exists(), **settings)
    assert_same(one, other)
    logged = [state(f)["loops"]["fit_loop"]["epoch_loop.state_dict"] for f in (one, other)]
    assert logged[0] == logged[1], "the steps that loggers count"


@pytest.mark.parametrize("interval", [2 / BATCHES, 1.0])
def test_a_run_that_was_asked_to_stop_stops_again(tmp_path: Path, interval: float) -> None:
    """Killed in the validation that precedes its end, or after it."""
    one, other = tmp_path / "one", tmp_path / "other"
    settings: dict[str, Any] = {"every": 1, "interval": interval}
    fit(one, StopAfter(1, 2), **settings)
    assert state(one)["global_step"] == BATCHES + 3
    validations = 4 if interval < 1 else 1
    with pytest.raises(StopError):
        fit(other, StopAfter(1, 2), AccidentInValidation(validations, stop), **settings)
    fit(other, resume=True, **settings)
    assert_same(one, other)
    for _ in range(2):
        before = (other / "last.ckpt").read_bytes()
        fit(other, resume=True, **settings)
        assert (other / "last.ckpt").read_bytes() == before


def test_saving_within_an_epoch_changes_nothing(tmp_path: Path) -> None:
    fit(tmp_path / "rarely")
    fit(tmp_path / "often", every=2)
    assert_same(tmp_path / "rarely", tmp_path / "often")


def test_without_it_a_stopped_epoch_begins_again(tmp_path: Path) -> None:
    fit(tmp_path / "one")
    with pytest.raises(StopError):
        fit(tmp_path / "other", Accident(1, 3, stop))
    assert state(tmp_path / "other")["global_step"] == BATCHES
    fit(tmp_path / "other", resume=True)
    assert_same(tmp_path / "one", tmp_path / "other")


@pytest.mark.parametrize("steps", [0, -1])
def test_a_number_of_steps_below_one(steps: int) -> None:
    with pytest.raises(ConfigurationError, match=rf"every_n_train_steps must be .* got {steps}"):
        LastCheckpoint(every_n_train_steps=steps)
    with pytest.raises(ConfigurationError, match=rf"every_n_train_steps must be .* got {steps}"):
        SelectedCheckpoint(every_n_train_steps=steps)


# ---------------------------------------------------------------------------------------- signals


def send(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def test_sigterm_ends_the_batch_saves_and_goes_on_there(tmp_path: Path) -> None:
    """It arrives while the weights are perturbed, which is not what is saved."""
    one, other = tmp_path / "one", tmp_path / "other"
    fit(one)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SIGTERMException):
        fit(other, Accident(1, 2, send(signal.SIGTERM)))
    assert signal.getsignal(signal.SIGTERM) == before
    assert state(other)["global_step"] == BATCHES + 3
    fit(other, resume=True)
    assert_same(one, other)


def test_sigterm_between_accumulated_batches_leaves_the_last_whole_step(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    fit(one, accumulate=2)
    with pytest.raises(SIGTERMException):
        fit(other, Accident(1, 2, send(signal.SIGTERM)), accumulate=2)
    assert state(other)["global_step"] == BATCHES // 2, "from the end of the epoch before"
    fit(other, resume=True, accumulate=2)
    assert_same(one, other)


def test_a_second_sigterm_does_not_wait(tmp_path: Path) -> None:
    def twice() -> None:
        send(signal.SIGTERM)()
        send(signal.SIGTERM)()

    with pytest.raises(SIGTERMException):
        fit(tmp_path, Accident(0, 2, twice))
    assert not (tmp_path / "last.ckpt").exists()


def test_ctrl_c_ends_with_a_status_and_the_last_checkpoint(tmp_path: Path) -> None:
    def twice() -> None:
        send(signal.SIGINT)()
        send(signal.SIGINT)()

    # A shell starts its background jobs with SIGINT ignored, and Python leaves it at that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as caught:
            fit(tmp_path, Accident(1, 2, twice))
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
    tmp_path: Path, slurm: Path, monkeypatch: pytest.MonkeyPatch, array: bool, job: str
) -> None:
    if array:
        monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "4000")
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "7")
    one, other = tmp_path / "one", tmp_path / "other"
    fit(one)
    with pytest.raises(SIGTERMException):
        fit(other, Accident(1, 2, send(signal.SIGUSR1)))
    assert slurm.read_text() == f"scontrol requeue {job}\n"
    assert state(other)["global_step"] == BATCHES + 3
    assert not list(other.glob("hpc*")), "Lightning would save in the middle of the batch"
    fit(other, resume=True)
    assert_same(one, other)


# ----------------------------------------------------------------------------------- moved folder


def test_a_moved_run_remembers_its_best_score(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    fit(one)
    with pytest.raises(StopError):
        fit(other, Accident(2, 1, stop))
    moved = other.rename(tmp_path / "moved")
    fit(moved, resume=True)
    assert_same(one, moved)
    assert str(tmp_path) not in repr(state(moved)["callbacks"])


def test_another_number_of_processes_is_told(tmp_path: Path) -> None:
    with pytest.raises(StopError):
        fit(tmp_path, Accident(1, 3, stop))
    checkpoint = state(tmp_path)
    checkpoint[STATES] *= 2
    torch.save(checkpoint, tmp_path / "last.ckpt")
    with pytest.warns(UserWarning, match="with 1 processes and was made with 2"):
        fit(tmp_path, resume=True)
