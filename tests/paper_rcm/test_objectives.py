"""DAJAT: views, growing attack, the loss against a slow rewrite, and training with all of it."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.attacks.randomness import ExampleRandom
from common.callbacks.adversarial_training import AdversarialTraining
from common.callbacks.averaging import LateAveraging
from common.callbacks.weight_perturbation import AdversarialWeightPerturbation
from common.classifier import RobustClassifier
from common.data.images import ImageDataModule
from common.data.sources import Digits
from common.errors import ConfigurationError
from common.networks.resnet import DigitsResNet
from common.objectives import TRADES
from paper_rcm.networks import SplitBatchNorm2d, branch, split_batch_norm
from paper_rcm.objectives import DAJAT, AutoAugmentViews, GrowingPGD, jensen_shannon

BRANCHES = ("base", "auto", "auto")


def norms_of(net: nn.Module) -> list[SplitBatchNorm2d]:
    return [module for module in net.modules() if isinstance(module, SplitBatchNorm2d)]


def small() -> nn.Module:
    net = DigitsResNet()
    split_batch_norm(net)
    for norm in norms_of(net):  # so that the branches differ
        norm.auto.weight.data.uniform_(0.5, 1.5)
        norm.auto.running_mean.uniform_(-0.2, 0.2)
    return net


# --------------------------------------------------------------------------------------- the views


def test_views_depend_on_seed_epoch_and_image_alone() -> None:
    x = torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8)
    index = torch.arange(12)
    views = AutoAugmentViews()
    state = torch.random.get_rng_state()
    first = views(x, ExampleRandom(0, 0, index))
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(7)
    rest = views(x[5:9], ExampleRandom(0, 0, index[5:9]))
    assert len(first) == len(rest) == 2
    for whole, part in zip(first, rest, strict=True):
        assert whole.dtype == torch.uint8
        assert whole.shape == x.shape
        assert torch.equal(whole[5:9], part)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(views(x, ExampleRandom(0, 1, index))[0], first[0])
    changed = (first[0] != x).flatten(1).any(1)
    assert int(changed.sum()) > 4
    with pytest.raises(ConfigurationError, match=r"data\.views\.count"):
        AutoAugmentViews(0)


# -------------------------------------------------------------------------------------- the attack


def test_the_ball_grows_linearly_to_the_last_epoch() -> None:
    attack = GrowingPGD("8/255", epochs=200)
    for epoch, part in ((0, 1 / 200), (99, 0.5), (199, 1.0), (250, 1.0)):
        attack.set_epoch(epoch)
        assert attack.eps == pytest.approx(part * 8 / 255)
        assert attack.step_size == pytest.approx(attack.eps / 2)
    assert (attack.steps, attack.start, attack.project_start) == (5, "gaussian", False)
    attack.set_epoch(99)
    x = torch.rand(4, 3, 8, 8)
    x_adv = attack(lambda z: z.flatten(1).sum(1), x)
    torch.testing.assert_close(x_adv, (x + 4 / 255).clamp(max=1.0))
    with pytest.raises(ConfigurationError, match=r"trainer\.max_epochs"):
        GrowingPGD("8/255", epochs=0)


# ----------------------------------------------------------------------------------- the objective


@pytest.fixture
def net() -> nn.Module:
    return small().double().eval()


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Three views of five images."""
    x = torch.rand(15, 1, 8, 8, dtype=torch.float64)
    return {
        "x": x,
        "x_adv": (x + 0.2 * torch.rand_like(x)).clamp(0, 1),
        "y": torch.arange(5).repeat(3),
        "index": torch.arange(15),
        "view": torch.arange(3).repeat_interleave(5),
    }


def predictions(net: nn.Module, x: Tensor) -> list[list[float]]:
    """Of all images, each view in its branch."""
    found: list[list[float]] = []
    for name, part in zip(BRANCHES, x.chunk(3), strict=True):
        with branch(net, name), torch.no_grad():  # type: ignore[arg-type]
            found += net(part).softmax(1).tolist()
    return found


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_against_a_slow_rewrite(net, batch, smoothing: float) -> None:
    p, q = predictions(net, batch["x"]), predictions(net, batch["x_adv"])
    total = 0.0
    for i, y in enumerate(batch["y"].tolist()):
        mean = [sum(p[j][k] for j in range(i % 5, 15, 5)) / 3 for k in range(10)]
        target = [smoothing / 10 + (1 - smoothing) * (k == y) for k in range(10)]
        entropy = -sum(t * math.log(a) for t, a in zip(target, p[i], strict=True))
        total += (entropy + 11 * kl(p[i], q[i]) + 2 * kl(p[i], mean)) / 15
    loss = DAJAT(label_smoothing=smoothing).outer(net, batch)
    assert loss.item() == pytest.approx(total, rel=1e-10)


def test_equal_views_leave_trades(net, batch) -> None:
    """One view three times in one branch: the views do not diverge."""
    for norm in norms_of(net):
        norm.auto.load_state_dict(norm.base.state_dict())
    first = {key: value[:5] for key, value in batch.items()}
    thrice = {key: value.repeat(3, *[1] * (value.ndim - 1)) for key, value in first.items()}
    thrice["view"] = batch["view"]
    trades = TRADES(beta=11.0).outer(net, first)
    torch.testing.assert_close(DAJAT().outer(net, thrice), trades)
    torch.testing.assert_close(DAJAT().weight_loss(net, batch), trades)  # the base view alone


def test_jensen_shannon_survives_certain_and_opposite_predictions() -> None:
    logits = [torch.tensor([[200.0, -200.0]]), torch.tensor([[-200.0, 200.0]])]
    divergence = jensen_shannon([z.requires_grad_() for z in logits])
    assert divergence.item() == pytest.approx(math.log(2))
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(divergence.sum(), logits))


def test_inner_is_the_divergence_of_each_view_in_its_branch(net, batch) -> None:
    loss = DAJAT().inner(net, batch)(batch["x_adv"])
    both = zip(predictions(net, batch["x"]), predictions(net, batch["x_adv"]), strict=True)
    assert loss.tolist() == pytest.approx([kl(p, q) for p, q in both], rel=1e-9)
    plain = {key: value[:5] for key, value in batch.items() if key != "view"}
    torch.testing.assert_close(DAJAT().inner(net, plain)(plain["x_adv"]), loss[:5])


def test_what_is_missing_is_named(net, batch) -> None:
    without = {key: value for key, value in batch.items() if key != "view"}
    for method in (DAJAT().outer, DAJAT().weight_loss):
        with pytest.raises(ConfigurationError, match="AutoAugmentViews"):
            method(net, without)
    del batch["x_adv"]
    with pytest.raises(ConfigurationError, match=r"adversary\.attack"):
        DAJAT().outer(net, batch)


@pytest.mark.parametrize(
    ("name", "value"), [("beta", -1.0), ("js_weight", math.inf), ("label_smoothing", 1.0)]
)
def test_settings_out_of_range(name: str, value: float) -> None:
    with pytest.raises(ConfigurationError, match=name):
        DAJAT(**{name: value})


# ------------------------------------------------------------------------------------ all together


class Recording(DAJAT):
    def __init__(self) -> None:
        super().__init__()
        self.batches: list[dict[str, Tensor]] = []

    def outer(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        self.batches.append(dict(batch))
        return super().outer(model, batch)


def test_it_trains(quiet_trainer: Any) -> None:
    objective = Recording()
    model = RobustClassifier(small(), objective, partial(torch.optim.SGD, lr=0.01))
    data = ImageDataModule(
        Digits(), batch_size=20, train_limit=40, val_size=20, crop_padding=1, seed=0,
        views=AutoAugmentViews(),
    )  # fmt: skip
    quiet_trainer(
        LateAveraging(0.9, from_epoch=1),
        AdversarialTraining(GrowingPGD(0.2, epochs=2)),
        AdversarialWeightPerturbation(0.005, start_epoch=1),
        max_epochs=2,
    ).fit(model, data)
    assert len(objective.batches) == 4
    for i, batch in enumerate(objective.batches):
        assert batch["x"].shape == batch["x_adv"].shape == (60, 1, 8, 8)
        size = (batch["x"] - batch["x_adv"]).abs().amax().item()
        assert size == pytest.approx(0.1 if i < 2 else 0.2, abs=1e-6)
    # 4 steps, a clean and an adversarial pass in the base branch, two of each in the other;
    # weight perturbation moved neither.
    norm = norms_of(model)[0]
    assert (norm.base.num_batches_tracked, norm.auto.num_batches_tracked) == (8, 16)
