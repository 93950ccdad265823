"""NaN and infinity: found, located, and reported by every process alike."""

import re
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from common.attacks.losses import cross_entropy
from common.attacks.pgd import PGD
from common.callbacks.adversarial_training import AdversarialTraining
from common.callbacks.checkpointing import LastCheckpoint
from common.callbacks.finite import first_fault, gradient_norms, is_finite
from common.callbacks.weight_perturbation import AdversarialWeightPerturbation
from common.classifier import RobustClassifier
from common.cli.trainer import Trainer
from common.data.images import ImageDataModule
from common.data.sources import Digits
from common.errors import ConfigurationError
from common.objectives import AT, Batch, Natural
from common.strategy import DeviceInvariantDDP


class Mask(nn.Module):
    """Passes features on until a weight, or a call, makes it explode."""

    def __init__(self, explodes_at: int | None = None) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))
        self.explodes_at, self.calls = explodes_at, 0

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
            if self.explodes_at is not None and self.calls >= self.explodes_at:
                return x * self.scale * torch.inf
        return x * self.scale


def network(mask: nn.Module) -> nn.Module:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), mask, nn.Linear(8, 10))
    net.add_module("router", nn.Identity())
    return net


# ------------------------------------------------------------------------------------- first_fault


def test_the_first_fault_in_the_order_of_computing() -> None:
    net, x = network(Mask()), torch.rand(4, 1, 8, 8)

    def fault(scale: float = 1.0) -> str:
        return first_fault(net, lambda: scale * net(x).sum(), {"x": x})

    assert fault() == ""
    assert fault(torch.inf) == "only the loss, every layer's output is finite"
    net[3] = Mask(explodes_at=1)
    assert fault() == "output of 3 (Mask)"
    with torch.no_grad():
        x[1, 0, 2, 3] = torch.nan
    assert fault() == "the batch's x"
    net.register_buffer("average", torch.tensor([1.0, torch.inf]))
    assert fault() == "buffer average"
    with torch.no_grad():
        net[1].bias[0] = torch.inf
    assert fault() == "parameter 1.bias"


def test_a_gradient_that_is_not_finite_under_a_loss_that_is() -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    net = nn.Sequential(first, second)
    nn.init.zeros_(second.weight)
    nn.init.zeros_(second.bias)
    x = torch.ones(2, 3)
    assert first_fault(net, lambda: net(x).sqrt().sum(), {}) == "gradient of 1.bias"


def test_what_is_not_a_tensor_is_finite_and_has_no_gradient() -> None:
    assert is_finite({"a": [torch.ones(2), None], "b": ("text", torch.arange(3))})
    assert not is_finite({"a": [torch.ones(2), torch.tensor(torch.nan)]})
    assert gradient_norms(nn.Linear(2, 2))[0] == []


# ---------------------------------------------------------------------------------------- training


class Telling(Trainer):
    """Writes down what each process was told."""

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super()._run(*args, **kwargs)
        except Exception as error:
            folder = Path(self.default_root_dir)
            (folder / f"rank{self.global_rank}").write_text(f"{type(error).__name__}: {error}")
            until = time.monotonic() + 30  # the first to end would have the other one ended
            while len(list(folder.glob("rank?"))) < self.world_size and time.monotonic() < until:
                time.sleep(0.01)
            raise


@pytest.fixture
def failing(quiet_trainer, tmp_path) -> Callable[..., str]:
    """``failing(net, objective, *callbacks, saving=..., **settings)``: what every process says."""

    def call(net: nn.Module, objective: Any, *callbacks: Callback, saving: Any = LastCheckpoint,
             **settings: Any) -> str:  # fmt: skip
        torch.manual_seed(0)
        module = RobustClassifier(net, objective, partial(torch.optim.SGD, lr=0.1))
        data = ImageDataModule(Digits(), batch_size=10, val_size=40, train_limit=60)
        if settings.get("devices", 1) > 1:
            settings["strategy"] = DeviceInvariantDDP(timedelta(seconds=60), start_method="fork")
        callbacks = callbacks or (AdversarialTraining(),)
        settings |= {"max_epochs": 3, "limit_val_batches": 0, "default_root_dir": tmp_path}
        trainer = quiet_trainer(*callbacks, saving(str(tmp_path)), kind=Telling, **settings)
        with pytest.raises(Exception, match=r"."):
            trainer.fit(module, datamodule=data)
        told = {path.read_text() for path in tmp_path.glob("rank?")}
        assert len(list(tmp_path.glob("rank?"))) == settings.get("devices", 1)
        (message,) = told
        return message

    return call


def saved(folder: Path) -> int:
    """Steps behind the checkpoint that was kept, whose weights are numbers."""
    checkpoint = torch.load(folder / "last.ckpt")
    assert all(torch.isfinite(value).all() for value in checkpoint["state_dict"].values())
    return checkpoint["global_step"]


def test_an_exploding_mask_is_named_with_its_step(tmp_path: Path, failing) -> None:
    message = failing(network(Mask(explodes_at=9)), Natural())
    assert "DivergedError: the training loss became nan at epoch 1, step 8 (batch 2)" in message
    assert "the first that is not finite: output of net.3 (Mask)" in message
    assert saved(tmp_path) == 6


class BadGradient(Natural):
    """A finite loss whose gradient is infinite from a step on."""

    def __init__(self, step: int) -> None:
        self.step, self.calls = step, 0

    def outer(self, model: Any, batch: Batch) -> Tensor:
        self.calls += 1
        loss = super().outer(model, batch)
        zero = (model.net[4].bias - model.net[4].bias.detach()).square().sum()
        return loss + zero.sqrt() if self.calls > self.step else loss


@pytest.mark.parametrize("step", [7, 11])
def test_a_gradient_that_is_not_finite_is_named_with_its_step(tmp_path, failing, step) -> None:
    """Within an epoch, and in its last step, before anything is saved."""
    message = failing(network(Mask()), BadGradient(step))
    assert f"the gradient was not finite at epoch 1, step {step}: 1 of 5 parameters" in message
    assert "nearest to the loss net.4.bias" in message
    assert saved(tmp_path) == 6


class LostObjective(AT):
    """An inner loss whose gradient is NaN for the examples of one class."""

    def inner(self, model: Any, batch: Batch) -> Any:
        def loss(x: Tensor) -> Tensor:
            found = cross_entropy(model(x), batch["y"])
            rows = (batch["y"] == 3).nonzero().flatten()
            bad = (x - x.detach())[rows].flatten(1).sum(1).square().sqrt()
            return found.index_add(0, rows, bad)

        return loss


def test_an_attack_that_is_given_no_direction_ends_the_run(failing) -> None:
    attack = AdversarialTraining(PGD(0.1, 0.05, steps=2))
    message = failing(network(Mask()), LostObjective(), attack)
    assert re.search(r"no finite gradient for \d of 10 examples at epoch 0", message)


def test_a_watched_number_ends_the_run_by_its_name(failing) -> None:
    class Router(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            module.watch("router", torch.tensor([1.0, torch.inf if index == 4 else 0.0]))

    message = failing(network(Mask()), Natural(), Router())
    assert "router was not finite at epoch 0, step 4 (batch 4)" in message


@pytest.mark.parametrize("precision", ["16-mixed", "16-true"])
def test_gradients_without_loss_scaling_are_refused_in_fp16(precision: Any) -> None:
    fake = SimpleNamespace(precision=precision)
    module = RobustClassifier(network(Mask()), AT())
    for callback in (AdversarialWeightPerturbation(gamma=0.01), AdversarialTraining(PGD(0.1))):
        with pytest.raises(ConfigurationError, match=rf"precision is {precision}: fp16 underflows"):
            callback.setup(fake, module, "fit")


# ------------------------------------------------------------------------------- several processes


class OneRank(Mask):
    """Explodes on one rank only."""

    def forward(self, x: Tensor) -> Tensor:
        is_here = torch.distributed.is_initialized() and torch.distributed.get_rank() == 1
        self.calls += self.training
        return x * self.scale * (torch.inf if is_here and self.calls >= 5 else 1.0)


class CannotSave(LastCheckpoint):
    """A disk that is full when the second epoch is saved."""

    def _save_checkpoint(self, trainer: Any, filepath: str) -> None:
        path = filepath if trainer.current_epoch == 0 else "/proc/nowhere/last.ckpt"
        super()._save_checkpoint(trainer, path)


def test_what_happens_on_one_rank_stops_all_with_the_same_words(tmp_path: Path, failing) -> None:
    message = failing(network(nn.Sequential(nn.BatchNorm1d(8), OneRank())), Natural(), devices=2)
    assert message.startswith("DivergedError: on rank 1 of 2: the training loss became nan")
    assert "output of net.3.1 (OneRank)" in message
    assert "step 4" in message
    for path in tmp_path.glob("rank?"):
        path.unlink()
    message = failing(network(Mask()), Natural(), devices=2, saving=CannotSave)
    assert message.startswith("RunDirectoryError: cannot write /proc/nowhere/last.ckpt")
    assert saved(tmp_path) == 6
