"""Averages in closed form, and who sees them; ``test_resuming`` interrupts runs that have them."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from common.attacks.losses import cross_entropy
from common.attacks.pgd import PGD
from common.callbacks.averaging import LateAveraging, WarmUpAveraging
from common.callbacks.robust_evaluation import RobustEvaluation
from common.callbacks.warm_start import WarmStart
from common.classifier import RobustClassifier
from common.data.images import ImageDataModule
from common.data.sources import Digits
from common.errors import ConfigurationError
from common.evaluation.suite import SuiteEntry
from common.objectives import Natural

HEAD = "net.5.weight"


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


class Diary(Callback):
    """The online weights at the start and after every step; what validation sees."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []
        self.validated: list[dict[str, Tensor]] = []

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.steps.append(state_of(module))

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.steps.append(state_of(module))

    def on_validation_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.validated.append(state_of(module))


def classifier() -> RobustClassifier:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 10)
    )
    return RobustClassifier(net, Natural(), partial(torch.optim.SGD, lr=0.1))


def data() -> ImageDataModule:
    return ImageDataModule(
        Digits(), batch_size=20, train_limit=80, val_size=20, val_limit=20, seed=0
    )


@pytest.fixture
def fit(quiet_trainer) -> Callable[..., tuple[Diary, RobustClassifier, Any]]:
    """``fit(*callbacks, epochs=3)``: three epochs of four steps."""

    def call(*callbacks: Callback, epochs: int = 3) -> tuple[Diary, RobustClassifier, Any]:
        diary, model = Diary(), classifier()
        trainer = quiet_trainer(diary, *callbacks, max_epochs=epochs)
        trainer.fit(model, data())
        assert len(diary.steps) == 1 + 4 * epochs
        return diary, model, trainer

    return call


def average_of(steps: list[dict[str, Tensor]], tau: Callable[[int], float]) -> dict[str, Tensor]:
    """By the recursion in float64; whole numbers are copied."""
    average = {name: value.double() for name, value in steps[0].items()}
    for step, state in enumerate(steps[1:], start=1):
        for name, value in state.items():
            new = tau(step) * average[name] + (1 - tau(step)) * value.double()
            average[name] = new if value.is_floating_point() else value
    return average


def assert_averaged(
    found: dict[str, Tensor],
    steps: list[dict[str, Tensor]],
    tau: Callable[[int], float],
    *online: str,
) -> None:
    """All but what is kept ``online`` is an average."""
    expected = average_of(steps, tau) | {name: steps[-1][name] for name in online}
    for name, value in found.items():
        goal = expected[name].double()
        torch.testing.assert_close(value.double(), goal, rtol=1e-4, atol=1e-6, msg=name)
    assert not torch.equal(found[HEAD], steps[-1][HEAD])


def test_a_growing_decay_averages_parameters_for_validation_and_checkpoints(fit) -> None:
    decay = 0.4
    averaging = WarmUpAveraging(decay)
    diary, model, _ = fit(averaging)
    plain, *_ = fit()
    for one, other in zip(diary.steps, plain.steps, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one), "training is as without"
    tau = lambda step: min(decay, (1 + step) / (10 + step))  # noqa: E731
    assert averaging.tau(1) == pytest.approx(tau(1))
    assert averaging.tau(10**6) == decay
    for epoch, seen in enumerate([*diary.validated, state_of(model)]):
        buffers = [name for name, _ in model.named_buffers()]
        assert_averaged(seen, diary.steps[: 1 + 4 * min(epoch + 1, 3)], tau, *buffers)


def test_robust_validation_attacks_the_average(fit) -> None:
    validation = SuiteEntry(PGD(0.2, 0.1, 2, "zero"), losses=["ce_f"])
    diary, model, trainer = fit(WarmUpAveraging(), RobustEvaluation(validation=validation))
    assert diary.steps[-1][HEAD].ne(model.net[5].weight).any()
    module = data()
    module.setup("fit")
    assert module.val_set is not None
    batch = module.val_set.__getitems__(list(range(20)))
    x, y = batch["x"] / 255, batch["y"]
    model.eval()
    x_adv = validation.attack(lambda images: cross_entropy(model(images), y), x)
    logged = trainer.callback_metrics["val/robust_acc"].item()
    assert logged == pytest.approx((model(x_adv).argmax(1) == y).float().mean().item())


def test_the_average_begins_with_the_weights_of_a_warm_start(tmp_path: Path, fit) -> None:
    other = {n: v + 0.01 if v.is_floating_point() else v for n, v in state_of(classifier()).items()}
    path = tmp_path / "start.ckpt"
    torch.save({"state_dict": other}, path)
    diary, model, _ = fit(WarmUpAveraging(), WarmStart(path=str(path)), epochs=1)
    assert torch.equal(diary.steps[0][HEAD], other[HEAD])
    expected = average_of(diary.steps, WarmUpAveraging().tau)[HEAD]
    torch.testing.assert_close(state_of(model)[HEAD].double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("from_epoch", [0, 1, 9])
def test_a_late_average_is_the_model_until_its_epoch(fit, from_epoch: int) -> None:
    diary, model, _ = fit(LateAveraging(0.8, from_epoch))
    for epoch, seen in enumerate([*diary.validated, state_of(model)]):
        steps = diary.steps[: 1 + 4 * min(epoch + 1, 3)]
        if min(epoch, 2) < from_epoch:
            assert all(torch.equal(value, steps[-1][name]) for name, value in seen.items())
        else:
            assert_averaged(seen, steps[4 * from_epoch :], lambda _: 0.8)


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
@pytest.mark.parametrize("kind", [WarmUpAveraging, LateAveraging])
def test_settings_out_of_range(kind, decay: float) -> None:
    with pytest.raises(ConfigurationError, match=rf"decay must lie in \[0, 1\), got {decay}"):
        kind(decay)
    with pytest.raises(ConfigurationError, match="counts epochs from 0, got -1"):
        LateAveraging(from_epoch=-1)
