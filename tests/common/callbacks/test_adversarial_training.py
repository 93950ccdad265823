from functools import partial

import pytest
import torch
from lightning.pytorch import Callback

from common.attacks.engine.network import AttackEngine
from common.attacks.pgd import FGSM, PGD, FriendlyPGD
from common.attacks.randomness import ExampleRandom
from common.callbacks.adversarial_training import AdversarialTraining
from common.callbacks.weight_perturbation import AdversarialWeightPerturbation
from common.classifier import RobustClassifier
from common.cli.trainer import Trainer
from common.data.images import ImageDataModule
from common.data.sources import Digits
from common.errors import ConfigurationError
from common.networks.resnet import DigitsResNet
from common.objectives import ALP, AT, MART, TRADES, Natural


class Spy(AT):
    """Adversarial training that remembers its batches."""

    def __init__(self) -> None:
        self.seen = []

    def outer(self, model, batch):
        self.seen.append({key: value.clone() for key, value in batch.items()})
        self.modes = [m.training for m in model.net.modules()]
        return super().outer(model, batch)


def trainer(*callbacks, **settings) -> Trainer:
    settings = {"max_steps": 2, "accelerator": "cpu", "precision": "32-true"} | settings
    return Trainer(
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        limit_val_batches=0,
        callbacks=list(callbacks),
        **settings,
    )


def classifier(objective, lr: float = 0.05, double: bool = False) -> RobustClassifier:
    torch.manual_seed(0)
    net = DigitsResNet().double() if double else DigitsResNet()
    return RobustClassifier(net, objective, partial(torch.optim.SGD, lr=lr, momentum=0.9))


def data(**settings) -> ImageDataModule:
    return ImageDataModule(Digits(), **({"batch_size": 40} | settings))


def test_training_step_sees_adversarial_examples_beside_the_clean_ones() -> None:
    objective = Spy()
    module = classifier(objective)
    trainer(AdversarialTraining(PGD(0.1, 0.05, 2))).fit(module, datamodule=data())
    assert len(objective.seen) == 2
    for batch in objective.seen:
        delta = batch["x_adv"] - batch["x"]
        assert 0.05 < delta.abs().max() <= 0.1 + 1e-6
        assert batch["x_adv"].min() >= 0
        assert batch["x_adv"].max() <= 1
        assert not batch["x_adv"].requires_grad
    assert all(objective.modes), "the step itself runs in train mode"
    assert all(p.requires_grad for p in module.parameters())


def test_the_attack_is_the_same_as_one_by_hand() -> None:
    objective = Spy()
    module = classifier(objective)
    attack = PGD(0.1, 0.05, 3)
    trainer(AdversarialTraining(attack), max_steps=1).fit(module, datamodule=data())
    batch = objective.seen[0]
    untouched = classifier(AT()).eval()
    by_hand = attack(
        untouched.objective.inner(untouched, batch),
        batch["x"],
        ExampleRandom(0, 0, batch["index"]),
    )
    torch.testing.assert_close(by_hand, batch["x_adv"], rtol=0, atol=0)


def trained(objective, accumulate: int, limit: int | None, batch: int = 40) -> dict:
    """Weights after some steps on batches of ``batch`` examples, each given in so many parts."""
    module = classifier(objective, double=True)
    module.net.eval()  # batch-norm, whose statistics are those of a forward pass, is put to rest
    module.net.train = lambda mode=True: module.net
    fit = trainer(
        AdversarialTraining(PGD(0.1, 0.05, 2)),
        **({"max_steps": 2} if limit is None else {"max_steps": -1, "max_epochs": 2}),
        accumulate_grad_batches=accumulate,
        precision="64-true",
    )
    fit.fit(module, datamodule=data(batch_size=batch // accumulate, train_limit=limit))
    return module.net.state_dict()


@pytest.mark.parametrize(
    "objective", [AT(), TRADES(2.0), MART(2.0), ALP(0.5)], ids=lambda o: type(o).__name__
)
def test_an_accumulated_step_equals_a_large_one(objective) -> None:
    large, accumulated = (trained(objective, accumulate, None) for accumulate in (1, 4))
    for name in large:
        torch.testing.assert_close(accumulated[name], large[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("accumulate", [2, 4])
@pytest.mark.parametrize("limit", [70, 61, 33])
def test_the_last_accumulated_step_of_an_epoch_is_a_mean_too(accumulate, limit) -> None:
    """With fewer batches than the others, and a last batch that is not full."""
    large, accumulated = (trained(AT(), parts, limit) for parts in (1, accumulate))
    for name in large:
        torch.testing.assert_close(accumulated[name], large[name], rtol=1e-10, atol=1e-12)


def test_the_logged_loss_of_a_short_step_is_the_mean_of_its_batch() -> None:
    class Remembering(Natural):
        def outer(self, model, batch) -> torch.Tensor:
            self.last = super().outer(model, batch)
            return self.last

    class Logged(Callback):
        def __init__(self) -> None:
            self.found = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            logged = trainer.callback_metrics["train/loss"].item()
            self.found.append((logged, pl_module.objective.last.item()))

    logged = Logged()
    fit = trainer(logged, max_steps=-1, max_epochs=1, accumulate_grad_batches=3)
    fit.fit(classifier(Remembering()), datamodule=data(batch_size=20, train_limit=71))
    assert len(logged.found) == 4
    for found, expected in logged.found:
        assert found == pytest.approx(expected, rel=1e-6)


def test_friendly_pgd_gets_what_it_needs() -> None:
    objective = Spy()
    attack = FriendlyPGD(0.3, 0.1, steps=4, tau=0)
    trainer(AdversarialTraining(attack)).fit(classifier(objective), datamodule=data())
    assert len(objective.seen) == 2


def test_attack_and_objective_have_to_belong_together() -> None:
    with pytest.raises(ConfigurationError, match=r"AT .*adversary\.attack is null"):
        trainer(AdversarialTraining(None)).fit(classifier(AT()), datamodule=data())
    with pytest.raises(ConfigurationError, match="Natural never reads"):
        trainer(AdversarialTraining(FGSM(0.1))).fit(classifier(Natural()), datamodule=data())


def test_weights_are_perturbed_for_the_gradient_and_put_back_for_the_step() -> None:
    module = classifier(AT())
    awp = AdversarialWeightPerturbation(gamma=0.05)
    before, during = {}, {}

    class Watch(AdversarialTraining):
        def setup(self, trainer, pl_module, stage) -> None:
            before.update({n: p.detach().clone() for n, p in pl_module.named_parameters()})

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            during.update({n: p.detach().clone() for n, p in pl_module.named_parameters()})

        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
            for name, parameter in pl_module.named_parameters():
                assert torch.equal(parameter, before[name]), name

    attack = AdversarialTraining(FGSM(0.1))
    trainer(attack, awp, Watch(), max_steps=1).fit(module, datamodule=data())
    moved = {name for name in before if not torch.equal(before[name], during[name])}
    assert moved == {name for name, p in module.named_parameters() if p.ndim > 1}
    counts = [b for n, b in module.named_buffers() if "num_batches" in n]
    assert all(int(c) == 1 for c in counts), "perturbing must not move batch-norm a second time"


def test_weight_perturbation_climbs() -> None:
    """The outer loss at the perturbed weights exceeds that at the weights."""
    module = classifier(AT()).train()
    batch = {"x": torch.rand(20, 1, 8, 8), "y": torch.arange(20) % 10}
    batch["x_adv"] = batch["x"]
    stub = trainer()
    with torch.no_grad():
        before = module.objective.outer(module, batch)
    awp = AdversarialWeightPerturbation(gamma=0.02)
    awp.on_train_batch_start(stub, module, batch, 0)
    with torch.no_grad():
        during = module.objective.outer(module, batch)
    awp.on_after_backward(stub, module)
    assert during > before + 0.01


@pytest.mark.parametrize("gamma", [-0.1, 1.0])
def test_gamma_out_of_range(gamma) -> None:
    with pytest.raises(ConfigurationError, match=r"\[0, 1\)"):
        AdversarialWeightPerturbation(gamma=gamma)


def test_weights_are_perturbed_from_the_start_epoch_on() -> None:
    module, seen = classifier(AT()), []

    class Watch(AdversarialTraining):
        def setup(self, trainer, pl_module, stage) -> None:
            pass

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            seen.append((trainer.current_epoch, bool(awp._originals)))

    awp = AdversarialWeightPerturbation(gamma=0.01, start_epoch=2)
    attack = AdversarialTraining(FGSM(0.1))
    training = trainer(attack, awp, Watch(), max_steps=-1, max_epochs=4)
    training.fit(module, datamodule=data(train_limit=80))
    assert {epoch for epoch, _ in seen} == {0, 1, 2, 3}
    assert all(is_perturbed == (epoch >= 2) for epoch, is_perturbed in seen)


def test_perturbing_and_restoring_is_exact_and_of_the_size_of_each_weight() -> None:
    module = classifier(TRADES()).double().train()
    batch = {"x": torch.rand(20, 1, 8, 8, dtype=torch.float64), "y": torch.arange(20) % 10}
    batch["x_adv"] = (batch["x"] + 0.1).clamp(0, 1)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    awp = AdversarialWeightPerturbation(gamma=0.3)
    awp.on_train_batch_start(trainer(), module, batch, 0)
    for name, weight in module.named_parameters():
        moved = (weight - before[name]).norm()
        torch.testing.assert_close(moved, 0.3 * before[name].norm() * (weight.ndim > 1))
    awp.on_after_backward(trainer(), module)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_an_objective_may_say_what_its_weights_climb() -> None:
    class Other(AT):
        def weight_loss(self, model, batch):
            return -self.outer(model, batch)

    batch = {"x": torch.rand(20, 1, 8, 8), "y": torch.arange(20) % 10}
    batch["x_adv"] = batch["x"]
    moved = []
    for objective in (AT(), Other()):
        module = classifier(objective).train()
        before = module.net.head.linear.weight.detach().clone()
        awp = AdversarialWeightPerturbation(gamma=0.02)
        awp.on_train_batch_start(trainer(), module, batch, 0)
        moved.append(module.net.head.linear.weight.detach() - before)
        awp.on_after_backward(trainer(), module)
    torch.testing.assert_close(moved[0], -moved[1], rtol=1e-3, atol=1e-7)


# ---- the attack-side network -----------------------------------------------------------------


def trained_with(engine, objective, **settings):
    objective = objective()
    module = classifier(objective, double=True)
    adversary = AdversarialTraining(PGD(0.1, 0.03, 3), engine=engine)
    callbacks = [adversary, AdversarialWeightPerturbation(0.005)]
    fitted = trainer(*callbacks, max_steps=3, precision="64-true", **settings)
    fitted.fit(module, datamodule=data(batch_size=10))
    return module


@pytest.mark.parametrize("objective", [AT, TRADES, MART, ALP])
def test_folding_trains_the_same_network(objective) -> None:
    """In double precision rounding has no time to grow; weight perturbation is on as well."""
    plain, fast = trained_with(None, objective), trained_with(AttackEngine(), objective)
    assert list(plain.state_dict()) == list(fast.state_dict())
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(fast.state_dict()[name], value, rtol=1e-6, atol=1e-9, msg=name)
    start = classifier(objective(), double=True).state_dict()
    assert not torch.equal(start["net.stem.conv.weight"], plain.net.stem.conv.weight)


class Watching(AT):
    """Notes what it is attacked through and what it trains."""

    def inner(self, model, batch):
        self.attacked = type(model.net.stem.bn)
        return super().inner(model, batch)

    def outer(self, model, batch):
        self.trained = type(model.net.stem.bn)
        return super().outer(model, batch)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("engine", [AttackEngine(), AttackEngine(precision="bf16")])
def test_only_the_attack_sees_the_attack_side_network(engine, precision: str) -> None:
    objective = Watching()
    module = classifier(objective)
    adversary = AdversarialTraining(PGD(0.1, 0.05, 2), engine=engine)
    names = list(module.state_dict())
    trainer(adversary, precision=precision).fit(module, datamodule=data())
    assert issubclass(objective.attacked, torch.nn.Identity)
    assert objective.trained is torch.nn.BatchNorm2d
    assert list(module.state_dict()) == names
    assert engine._plans.of[module].pairs


@pytest.mark.parametrize("mode", ["train", "train_frozen"])
def test_an_engine_needs_eval_mode(mode: str) -> None:
    adversary = AdversarialTraining(PGD(0.1), mode, AttackEngine())
    with pytest.raises(ConfigurationError, match=r"adversary\.engine .*mode is train"):
        trainer(adversary).fit(classifier(AT()), datamodule=data())
