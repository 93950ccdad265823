from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback
from torch import Tensor

from common.attacks.losses import cross_entropy
from common.attacks.pgd import PGD
from common.callbacks.averaging import LateAveraging, WarmUpAveraging
from common.callbacks.robust_evaluation import RobustEvaluation
from common.callbacks.warm_start import WarmStart
from common.classifier import RobustClassifier
from common.cli.trainer import Trainer
from common.data.images import ImageDataModule
from common.data.sources import Digits
from common.errors import ConfigurationError
from common.evaluation.suite import SuiteEntry
from common.networks.resnet import DigitsResNet
from common.objectives import Natural
from common.parsing import load_named


def state_of(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


class Diary(Callback):
    """The online weights at the start and after every step; what validation sees."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []
        self.validated: list[dict[str, Tensor]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.steps.append(state_of(pl_module))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.steps.append(state_of(pl_module))

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.validated.append(state_of(pl_module))


def trainer(*callbacks: Any, folder: Path, epochs: int = 3) -> Trainer:
    return Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
        default_root_dir=folder,
    )


def classifier() -> RobustClassifier:
    torch.manual_seed(0)
    return RobustClassifier(DigitsResNet(), Natural(), partial(torch.optim.SGD, lr=0.1))


def data() -> ImageDataModule:
    return ImageDataModule(
        Digits(), batch_size=20, train_limit=80, val_size=20, val_limit=20, seed=0
    )


def expected_average(steps: list[dict[str, Tensor]], decay: float) -> dict[str, Tensor]:
    """Each weight as the sum over all steps of how much of that step is left."""
    factors = [min(decay, (1 + t) / (10 + t)) for t in range(1, len(steps))]
    average = {}
    for name, first in steps[0].items():
        if not first.is_floating_point():
            continue
        total = torch.zeros_like(first, dtype=torch.float64)
        for t, state in enumerate(steps):
            share = 1.0 if t == 0 else 1.0 - factors[t - 1]
            for later in factors[t:]:
                share *= later
            total += share * state[name].double()
        average[name] = total.float()
    return average


@pytest.mark.parametrize("decay", [0.995, 0.4])
def test_the_average_is_that_of_the_closed_form(tmp_path: Path, decay: float) -> None:
    diary, averaging, model = Diary(), WarmUpAveraging(decay), classifier()
    trainer(diary, averaging, folder=tmp_path).fit(model, data())
    assert len(diary.steps) == 1 + 3 * 4
    assert averaging.tau(1) == pytest.approx(2 / 11)
    assert averaging.tau(10**6) == decay
    parameters = {name for name, _ in model.named_parameters()}
    for name, value in expected_average(diary.steps, decay).items():
        online = diary.steps[-1][name]
        if name in parameters:
            torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-4, atol=1e-6)
            assert not torch.equal(model.state_dict()[name], online)
        else:
            assert torch.equal(model.state_dict()[name], online), name


def test_validation_and_checkpoints_use_the_average_and_training_does_not(tmp_path: Path) -> None:
    diary, model = Diary(), classifier()
    with_average = trainer(diary, WarmUpAveraging(), folder=tmp_path, epochs=2)
    with_average.fit(model, data())
    plain = Diary()
    trainer(plain, folder=tmp_path, epochs=2).fit(classifier(), data())
    for one, other in zip(diary.steps, plain.steps, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert len(diary.validated) == 2
    for epoch, seen in enumerate(diary.validated):
        steps = diary.steps[: 1 + 4 * (epoch + 1)]
        average = expected_average(steps, 0.995)
        name = "net.head.linear.weight"
        torch.testing.assert_close(seen[name], average[name], rtol=1e-4, atol=1e-6)
        buffers = {name for name, _ in model.named_buffers()}
        assert buffers
        assert all(torch.equal(seen[name], steps[-1][name]) for name in buffers)


def test_robust_validation_attacks_the_average(tmp_path: Path) -> None:
    validation = SuiteEntry(PGD(0.2, 0.1, 2, "zero"), losses=["ce_f"])
    diary, model = Diary(), classifier()
    callbacks = [diary, WarmUpAveraging(), RobustEvaluation(validation=validation)]
    both = trainer(*callbacks, folder=tmp_path)
    both.fit(model, data())  # ends with the average in the model
    logged = both.callback_metrics["val/robust_acc"].item()
    assert diary.steps[-1]["net.head.linear.weight"].ne(model.net.head.linear.weight).any()
    module = data()
    module.setup("fit")
    assert module.val_set is not None
    batch = module.val_set.__getitems__(list(range(20)))
    x, y = batch["x"] / 255, batch["y"]
    model.eval()
    x_adv = validation.attack(lambda images: cross_entropy(model(images), y), x)
    assert logged == pytest.approx((model(x_adv).argmax(1) == y).float().mean().item())


def test_interrupted_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    whole = classifier()
    trainer(WarmUpAveraging(), folder=tmp_path).fit(whole, data())
    first = trainer(WarmUpAveraging(), folder=tmp_path, epochs=1)
    checkpoint = tmp_path / "one.ckpt"

    class Save(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.save_checkpoint(checkpoint)

    first.callbacks.append(Save())
    first.fit(classifier(), data())
    saved = torch.load(checkpoint)
    name = "net.head.linear.weight"
    assert not torch.equal(saved["state_dict"][name], saved["current_model_state"][name])
    resumed = classifier()
    trainer(WarmUpAveraging(), folder=tmp_path).fit(resumed, data(), ckpt_path=checkpoint)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_the_average_begins_with_the_weights_that_training_begins_with(tmp_path: Path) -> None:
    other = classifier()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.01)
    path = tmp_path / "start.ckpt"
    torch.save({"state_dict": other.state_dict()}, path)
    diary, model = Diary(), classifier()
    callbacks = [diary, WarmUpAveraging(), WarmStart(path=str(path))]
    trainer(*callbacks, folder=tmp_path, epochs=1).fit(model, data())
    name = "net.head.linear.weight"
    assert torch.equal(diary.steps[0][name], other.state_dict()[name])
    average = expected_average(diary.steps, 0.995)
    torch.testing.assert_close(model.state_dict()[name], average[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_out_of_range(decay: float) -> None:
    with pytest.raises(ConfigurationError, match=rf"decay must lie in \[0, 1\), got {decay}"):
        WarmUpAveraging(decay)


def test_the_overlay_makes_one() -> None:
    path = Path(__file__).parents[3] / "common/configs/ema_warmup.yaml"
    (entry,) = yaml.safe_load(path.read_text())["trainer"]["callbacks+"]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callback", type=Callback)
    callback = parser.instantiate(parser.parse_object({"callback": entry})).callback
    assert isinstance(callback, load_named(entry["class_path"]))
    assert callback.decay == 0.995


# ---------------------------------------------------------------------------- an average from later


def late_average(steps: list[dict[str, Tensor]], decay: float, first: int) -> dict[str, Tensor]:
    """What is left of each state from the ``first`` on, by the recursion in float64."""
    average = {name: value.double() for name, value in steps[first].items()}
    for state in steps[first + 1 :]:
        for name, value in state.items():
            new = decay * average[name] + (1 - decay) * value.double()
            average[name] = new if value.is_floating_point() else value
    return average


@pytest.mark.parametrize("from_epoch", [0, 1, 2])
def test_a_late_average_begins_with_the_weights_before_its_epoch(
    tmp_path: Path, from_epoch: int
) -> None:
    diary, model = Diary(), classifier()
    trainer(diary, LateAveraging(0.8, from_epoch), folder=tmp_path).fit(model, data())
    expected = late_average(diary.steps, 0.8, 4 * from_epoch)
    for name, value in model.state_dict().items():  # batch-norm statistics among them
        torch.testing.assert_close(
            value.double(), expected[name].double(), rtol=1e-4, atol=1e-6, msg=name
        )
    assert not torch.equal(
        model.state_dict()["net.head.linear.weight"], diary.steps[-1]["net.head.linear.weight"]
    )


def test_before_its_epoch_a_late_average_is_the_model(tmp_path: Path) -> None:
    diary, model = Diary(), classifier()
    trainer(diary, LateAveraging(0.8, 2), folder=tmp_path).fit(model, data())
    for epoch in (0, 1):
        online = diary.steps[4 * (epoch + 1)]
        assert all(torch.equal(v, online[k]) for k, v in diary.validated[epoch].items())
    assert not torch.equal(
        diary.validated[2]["net.head.linear.weight"], diary.steps[-1]["net.head.linear.weight"]
    )


def test_a_late_average_never_begun_is_the_model(tmp_path: Path) -> None:
    diary, model = Diary(), classifier()
    trainer(diary, LateAveraging(0.8, 9), folder=tmp_path).fit(model, data())
    assert all(torch.equal(v, diary.steps[-1][k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_late_average_resumes_exactly(tmp_path: Path, epochs: int) -> None:
    whole = classifier()
    trainer(LateAveraging(0.8, 1), folder=tmp_path).fit(whole, data())
    checkpoint = tmp_path / "one.ckpt"

    class Save(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.save_checkpoint(checkpoint)

    trainer(LateAveraging(0.8, 1), Save(), folder=tmp_path, epochs=epochs).fit(classifier(), data())
    resumed = classifier()
    trainer(LateAveraging(0.8, 1), folder=tmp_path).fit(resumed, data(), ckpt_path=checkpoint)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_late_averages_out_of_range() -> None:
    with pytest.raises(ConfigurationError, match=r"decay must lie in \[0, 1\), got 1.5"):
        LateAveraging(1.5)
    with pytest.raises(ConfigurationError, match="counts epochs from 0, got -1"):
        LateAveraging(from_epoch=-1)
