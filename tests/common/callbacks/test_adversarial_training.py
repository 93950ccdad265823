"""Attacked batches and perturbed weights in training, and what an accumulated step is."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from common.attacks.engine.network import AttackEngine
from common.attacks.pgd import FGSM, PGD, FriendlyPGD
from common.attacks.randomness import ExampleRandom
from common.callbacks.adversarial_training import AdversarialTraining
from common.callbacks.weight_perturbation import AdversarialWeightPerturbation
from common.classifier import RobustClassifier
from common.data.images import ImageDataModule
from common.data.sources import Digits
from common.errors import ConfigurationError
from common.networks.resnet import ResNet
from common.objectives import ALP, AT, MART, TRADES, Natural


class Spy(AT):
    """Adversarial training that remembers its batches, modes and batch-norm layers."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def inner(self, model, batch):
        self.attacked = type(model.net.stem.bn)
        return super().inner(model, batch)

    def outer(self, model, batch):
        self.seen.append({key: value.clone() for key, value in batch.items()})
        self.modes = [m.training for m in model.net.modules()]
        self.trained = type(model.net.stem.bn)
        return super().outer(model, batch)


def classifier(objective, double: bool = False) -> RobustClassifier:
    torch.manual_seed(0)
    net = ResNet((1, 1), (4, 8), (1, 2), in_channels=1)
    sgd = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
    return RobustClassifier(net.double() if double else net, objective, sgd)


@pytest.fixture
def fit(quiet_trainer) -> Callable[..., RobustClassifier]:
    """``fit(module or objective, *callbacks, batch_size=40, limit=None, **settings)``."""

    def call(module, *callbacks, batch_size=40, limit=None, **settings) -> RobustClassifier:
        module = module if isinstance(module, RobustClassifier) else classifier(module)
        options: dict[str, Any] = {"max_steps": 2, "limit_val_batches": 0} | settings
        data = ImageDataModule(Digits(), batch_size=batch_size, train_limit=limit)
        quiet_trainer(*callbacks, **options).fit(module, datamodule=data)
        return module

    return call


def test_the_step_sees_what_the_attack_makes_beside_the_clean_images(fit) -> None:
    objective, attack = Spy(), PGD(0.1, 0.05, 2)
    module = fit(objective, AdversarialTraining(attack))
    assert len(objective.seen) == 2
    for batch in objective.seen:
        delta = batch["x_adv"] - batch["x"]
        assert 0.05 < delta.abs().max() <= 0.1 + 1e-6
        assert 0 <= batch["x_adv"].min() <= batch["x_adv"].max() <= 1
        assert not batch["x_adv"].requires_grad
    assert all(objective.modes), "the step itself runs in train mode"
    assert all(p.requires_grad for p in module.parameters())
    batch, untouched = objective.seen[0], classifier(AT()).eval()
    random = ExampleRandom(0, 0, batch["index"])
    by_hand = attack(untouched.objective.inner(untouched, batch), batch["x"], random)
    torch.testing.assert_close(by_hand, batch["x_adv"], rtol=0, atol=0)


def test_friendly_pgd_gets_what_it_needs(fit) -> None:
    objective = Spy()
    fit(objective, AdversarialTraining(FriendlyPGD(0.3, 0.1, steps=4, tau=0)))
    assert len(objective.seen) == 2


@pytest.mark.parametrize(
    ("objective", "arguments", "expected"),
    [
        (AT(), (None,), r"AT .*adversary\.attack is null"),
        (Natural(), (FGSM(0.1),), "FGSM .*Natural never reads"),
        (AT(), (PGD(0.1), "train", AttackEngine()), r"adversary\.engine .*mode is train"),
        (AT(), (PGD(0.1), "train_frozen", AttackEngine()), r"adversary\.engine .*mode is train_fr"),
    ],
)
def test_attack_objective_and_engine_have_to_belong_together(
    fit, objective, arguments, expected
) -> None:
    with pytest.raises(ConfigurationError, match=expected):
        fit(objective, AdversarialTraining(*arguments))


# ---- accumulated steps -----------------------------------------------------------------------


@pytest.fixture
def weights_after(fit) -> Callable[..., dict[str, torch.Tensor]]:
    """Weights after steps on 40 examples, each in ``accumulate`` parts, by batch-norm at rest."""

    def call(objective, accumulate: int, limit: int | None = None) -> dict[str, torch.Tensor]:
        module = classifier(objective, double=True)
        module.net.eval()
        module.net.train = lambda mode=True: module.net
        more = {} if limit is None else {"max_steps": -1, "max_epochs": 2}
        adversary = AdversarialTraining(PGD(0.1, 0.05, 2))
        fit(module, adversary, batch_size=40 // accumulate, limit=limit,
            accumulate_grad_batches=accumulate, precision="64-true", **more)  # fmt: skip
        return module.net.state_dict()

    return call


def assert_close(one, other, **tolerances) -> None:
    assert list(one) == list(other)
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, msg=name, **tolerances)


@pytest.mark.parametrize(
    "objective", [TRADES(2.0), MART(2.0), ALP(0.5)], ids=lambda o: type(o).__name__
)
def test_an_accumulated_step_equals_a_large_one(weights_after, objective) -> None:
    large, accumulated = (weights_after(objective, accumulate) for accumulate in (1, 4))
    assert_close(large, accumulated, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("limit", [61, 33])
def test_the_last_accumulated_step_of_an_epoch_is_a_mean_too(weights_after, limit) -> None:
    """With fewer batches than the others, and a last batch that is not full."""
    large = weights_after(AT(), 1, limit)
    for accumulate in (2, 4):
        assert_close(large, weights_after(AT(), accumulate, limit), rtol=1e-10, atol=1e-12)


def test_the_logged_loss_of_a_short_step_is_the_mean_of_its_batch(fit) -> None:
    class Remembering(Natural):
        def outer(self, model, batch) -> torch.Tensor:
            self.last = super().outer(model, batch)
            return self.last

    losses = []

    class Logged(Callback):
        def on_train_batch_end(self, trainer, module, *_) -> None:
            logged = trainer.callback_metrics["train/loss"].item()
            losses.append((logged, module.objective.last.item()))

    one_epoch = {"max_steps": -1, "max_epochs": 1, "accumulate_grad_batches": 3}
    fit(Remembering(), Logged(), batch_size=20, limit=71, **one_epoch)
    assert len(losses) == 4
    for found, expected in losses:
        assert found == pytest.approx(expected, rel=1e-6)


# ---- weight perturbation ---------------------------------------------------------------------


def test_weights_are_perturbed_for_the_gradient_and_put_back_for_the_step(fit) -> None:
    awp = AdversarialWeightPerturbation(gamma=0.05, start_epoch=1)
    before: dict[str, torch.Tensor] = {}
    epochs: list[tuple[int, set[str]]] = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
            if not awp._originals or not before:
                before.update({n: p.detach().clone() for n, p in module.named_parameters()})
            moved = {n for n, p in module.named_parameters() if not torch.equal(p, before[n])}
            epochs.append((trainer.current_epoch, moved))

        def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
            for name, parameter in module.named_parameters():
                assert torch.equal(parameter, before[name]), name

        def on_train_batch_end(self, trainer, module, *_) -> None:
            before.update({n: p.detach().clone() for n, p in module.named_parameters()})

    module = fit(AT(), AdversarialTraining(FGSM(0.1)), awp, Watch(), limit=80, max_steps=4)
    weights = {name for name, p in module.named_parameters() if p.ndim > 1}
    assert epochs == [(0, set())] * 2 + [(1, weights)] * 2
    counts = [b for n, b in module.named_buffers() if "num_batches" in n]
    assert all(int(c) == 4 for c in counts), "perturbing must not move batch-norm a second time"


class Opposite(AT):
    def weight_loss(self, model, batch):
        return -self.outer(model, batch)


def test_perturbation_climbs_what_the_objective_says_and_is_undone_exactly(quiet_trainer) -> None:
    x = torch.rand(20, 1, 8, 8, dtype=torch.float64)
    batch = {"x": x, "x_adv": (x + 0.1).clamp(0, 1), "y": torch.arange(20) % 10}
    moved = []
    for objective in (AT(), Opposite(), TRADES()):
        module = classifier(objective, double=True).double().train()
        before = {name: value.clone() for name, value in module.state_dict().items()}
        losses = [objective.weight_loss(module, batch).item()]
        module.load_state_dict(before)
        awp = AdversarialWeightPerturbation(gamma=0.02)
        awp.on_train_batch_start(quiet_trainer(), module, batch, 0)
        for name, weight in module.named_parameters():
            size = 0.02 * before[name].norm() * (weight.ndim > 1)
            torch.testing.assert_close((weight - before[name]).norm(), size)
        moved.append(module.net.head.linear.weight.detach() - before["net.head.linear.weight"])
        awp.on_after_backward(quiet_trainer(), module)
        assert all(torch.equal(v, before[n]) for n, v in module.state_dict().items())
        awp.on_train_batch_start(quiet_trainer(), module, batch, 0)
        losses.append(objective.weight_loss(module, batch).item())
        assert losses[1] > losses[0] + 0.001
    torch.testing.assert_close(moved[0], -moved[1])


@pytest.mark.parametrize("gamma", [-0.1, 1.0])
def test_gamma_out_of_range(gamma) -> None:
    with pytest.raises(ConfigurationError, match=rf"\[0, 1\), got {gamma}"):
        AdversarialWeightPerturbation(gamma=gamma)


# ---- the attack-side network -----------------------------------------------------------------


def test_folding_trains_the_same_network(fit) -> None:
    """In double precision rounding has no time to grow; weight perturbation is on as well."""
    objective, found = TRADES(2.0), []
    for engine in (None, AttackEngine()):
        callbacks = (
            AdversarialTraining(PGD(0.1, 0.03, 3), engine=engine),
            AdversarialWeightPerturbation(0.005),
        )
        module = classifier(objective, double=True)
        fit(module, *callbacks, batch_size=10, max_steps=3, precision="64-true")
        found.append(module.state_dict())
    assert_close(*found, rtol=1e-6, atol=1e-9)
    assert not torch.equal(classifier(objective).net.stem.conv.weight.double(),
                           found[0]["net.stem.conv.weight"])  # fmt: skip


@pytest.mark.parametrize(
    ("precision", "engine"),
    [("32-true", AttackEngine(precision="bf16")), ("bf16-mixed", AttackEngine())],
)
def test_only_the_attack_sees_the_attack_side_network(fit, engine, precision: str) -> None:
    objective = Spy()
    names = list(classifier(objective).state_dict())
    module = fit(objective, AdversarialTraining(PGD(0.1, 0.05, 2), engine=engine),
                 precision=precision)  # fmt: skip
    assert issubclass(objective.attacked, nn.Identity)
    assert objective.trained is nn.BatchNorm2d
    assert list(module.state_dict()) == names
    assert engine._plans.of[module].pairs
