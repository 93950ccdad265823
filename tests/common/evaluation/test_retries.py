"""Squashed scores: no squashing may look more robust than the steps that are known to break it."""

import pytest
import torch
from torch import Tensor, nn

from common.attacks.autoattack import AutoAttack
from common.attacks.engine.network import AttackEngine
from common.attacks.losses import cross_entropy
from common.attacks.pgd import FGSM, PGD
from common.evaluation import Evaluation, SuiteEntry, evaluate
from common.evaluation.confirm import seen_through
from common.networks.parts import Part
from common.objectives import OnLogits, answer

EPS = 0.01
pytestmark = pytest.mark.filterwarnings("ignore")


class Softsign(torch.autograd.Function):
    """Without a gradient."""

    @staticmethod
    def forward(ctx, z):
        return z / (1 + z.abs())

    @staticmethod
    def backward(ctx, g):
        return torch.zeros_like(g)


@pytest.fixture
def squashed(around):
    """``squashed(function, scale)``: the linear network with its scores squashed."""
    return lambda function=lambda z: z, scale=1.0: around(lambda m, x: function(m.net(x) * scale))


@torch.no_grad()
def bound(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share that none of the steps withstands that are optimal for the linear scores.

    Squashed scores can be tied, so it may be more than the linear network's share.
    """
    right, weight = model(x).argmax(dim=1) == y, model.net.weight
    for j in range(4):
        step = (weight[j] - weight[y]).sign().view_as(x)
        right &= model((x + 0.9999 * EPS * step).clamp(0, 1)).argmax(dim=1) == y
    return float(right.float().mean())


SQUASHINGS = {
    "steep sigmoid": (torch.sigmoid, 100.0),
    "atan": (lambda z: z.atan(), 1e4),
    "no gradient": (Softsign.apply, 1e3),
    "clamp": (lambda z: z.clamp(-0.3, 0.3), 1.0),
    "log-sigmoid": (nn.LogSigmoid(), 60.0),
    "in place": (lambda z: z.mul_(1.0).sigmoid_(), 50.0),
    "detached": (lambda z: z.sigmoid().detach() + 0 * z, 1.0),
    "hard labels": (lambda z: nn.functional.one_hot(z.argmax(1), 4) + 1e-4 * z.tanh(), 1e3),
    "odd": (lambda z: torch.where(z > 0, 1 - torch.exp(-z), torch.exp(z) - 1), 40.0),
    "large": (lambda z: z, 1e5),
    "small": (lambda z: z * 1e-3, 1.0),
    "log-softmax": (lambda z: z.log_softmax(dim=1), 1e3),
}


def evaluated(model: nn.Module, data, suite, eps: float = EPS, **settings) -> Evaluation:
    return evaluate(model, data, suite, eps=eps, progress=False, **settings)


@pytest.mark.parametrize(
    ("suite", "slack"), [("both", 0.04), pytest.param("quick", 0.01, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", SQUASHINGS)
def test_no_squashing_looks_more_robust_than_it_is(squashed, data, name, suite, slack) -> None:
    apgd = AutoAttack(EPS, version="custom", attacks=["apgd-t"], steps=10)
    both = {"pgd": SuiteEntry(PGD(EPS, steps=15), ["cw_f"]), "apgd-t": SuiteEntry(apgd)}
    model = squashed(*SQUASHINGS[name])
    found = evaluated(model, data, both if suite == "both" else suite)
    least = bound(model, *data)
    assert 0.1 < least < 0.9
    assert found.robust_acc <= least + slack
    if suite == "both":
        assert found.metrics["apgd-t"] <= least + slack
        assert found.metrics["pgd/cw_f"] <= least + 0.08  # one ascent has one target


def test_vanishing_gradients_reach_the_result(squashed, data) -> None:
    model = squashed(torch.tanh, 1e4)
    found = evaluated(model, data, {"fgsm": SuiteEntry(FGSM(EPS))})
    columns = found.outcomes.columns["fgsm/ce_f"]
    assert found.result["attacks"]["fgsm/ce_f"]["unmoved"] == int(columns["unmoved"].sum()) > 0
    assert any("gradients vanish" in text for text in found.warnings)
    with torch.no_grad():
        scores = model(data[0])[columns["unmoved"]]
    assert bool((scores.abs() == 1.0).all())  # each of them saturated


def test_linear_scores_raise_no_warning_and_take_one_more_gradient(squashed, data) -> None:
    model, passes = squashed(), []
    model.net.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    found = evaluated(model, data, {"pgd": SuiteEntry(PGD(EPS, steps=10))})
    assert found.warnings == []
    assert found.result["attacks"]["pgd/ce_f"]["unmoved"] == 0
    assert sum(passes) <= 10 + 1 + 3  # the check at the start takes some too


@pytest.mark.parametrize("engine", [None, AttackEngine()], ids=["plain", "engine"])
@pytest.mark.parametrize(("loss", "times"), [("ce_inside", 1), ("ce_f", 2)])
def test_an_attack_is_made_again_where_its_loss_becomes_another(
    squashed, data, loss, times, engine, past_forward
) -> None:
    """A loss on the scores before squashing meets the same gradients again, one on f does not."""

    model, passes = squashed(torch.sigmoid, 100.0), []
    model.adaptive_losses = lambda: {"ce_inside": past_forward(), "ce_f": OnLogits(cross_entropy)}
    model.net.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    suite = {"pgd": SuiteEntry(PGD(EPS / 20, steps=20), [loss])}
    found = evaluated(model, data, suite, EPS / 20, engine=engine)
    assert bool(found.outcomes.columns[f"pgd/{loss}"]["distorted"].any())
    assert 20 * times <= sum(passes) < 20 * (times + 1)


def test_an_auxiliary_head_is_not_what_the_scores_come_from(around, data) -> None:
    def with_head(model: nn.Module, x: Tensor) -> Tensor:
        weight = model.net.weight
        model.head = x.flatten(1) @ (weight + 0.1 * weight.abs().mean() * weight.sign()).T
        scores: Tensor = model.net(x)
        return scores

    model = around(with_head)
    with torch.no_grad():
        rows = (model(data[0]).argmax(dim=1) == model.head.argmax(dim=1)).nonzero().flatten()
    part = data[0][rows], data[1][rows]
    found = evaluated(model, part, {"pgd": SuiteEntry(PGD(EPS, steps=3))})
    assert found.robust_acc > 0.1
    assert int(found.outcomes.columns["pgd/ce_f"]["distorted"].sum()) == 0


def test_no_attack_with_success_is_suspicious(squashed, data) -> None:
    found = evaluated(squashed(), data, {"pgd": SuiteEntry(PGD(1e-6, steps=3))}, 1e-6)
    assert found.robust_acc == found.clean_acc
    assert any("suspicious in itself" in text for text in found.warnings)
    assert "suspicious in itself" in " ".join(str(found).split())


def test_forward_is_put_back(squashed, data) -> None:
    model, x = squashed(torch.sigmoid, 100.0), data[0][:5]
    before = model(x)
    with seen_through(model, 0, is_bridged=True):
        assert torch.equal(model(x), before)
        scores = model(x.clone().requires_grad_())
        spread = scores.amax(dim=1) - scores.amin(dim=1)
        assert torch.allclose(spread, torch.full_like(spread, 10.0), rtol=1e-2)
        assert torch.equal(scores.argmax(dim=1), before.argmax(dim=1))
    assert "forward" not in vars(model)
    assert torch.equal(model(x), before)


class Probed(Part):
    """Linear scores, which are answered and then squashed."""

    def __init__(self, inside: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inside, 4)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.linear(x.flatten(1))
        if self.told is not None:
            self.told.logits.append((1.0, scores))
        return torch.sigmoid(100 * scores)


def test_parts_answer_for_the_images_alone(data) -> None:
    x, y = data[0][:5].clone().requires_grad_(), data[1][:5]
    net = Probed(x[0].numel())
    with seen_through(net, 0, is_bridged=True):
        found = answer(net, [net], x, y)
    assert [len(logits) for _, logits in found.further] == [5]
