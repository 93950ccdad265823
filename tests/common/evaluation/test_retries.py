"""Squashed scores: no squashing may look more robust than the steps that are known to break it."""

import pytest
import torch
from torch import Tensor, nn

from common.attacks.autoattack import AutoAttack
from common.attacks.pgd import FGSM, PGD
from common.evaluation import Evaluation, SuiteEntry, evaluate
from common.evaluation.confirm import seen_through

CLASSES, SIZE = 4, 36
pytestmark = pytest.mark.filterwarnings("ignore")


class Softsign(torch.autograd.Function):
    """Without a gradient."""

    @staticmethod
    def forward(ctx, z):
        return z / (1 + z.abs())

    @staticmethod
    def backward(ctx, g):
        return torch.zeros_like(g)


class Squashed(nn.Module):
    def __init__(self, function=lambda z: z, scale: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(SIZE, CLASSES)
        with torch.no_grad():
            self.linear.weight.normal_()
            self.linear.bias.copy_(-self.linear.weight @ torch.full((SIZE,), 0.5))
        self.function, self.scale = function, scale
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.linear(x.flatten(1)) * self.scale)


@torch.no_grad()
def data(n: int = 30) -> tuple[Tensor, Tensor, float]:
    """Images, labels of the linear scores and a radius at which about a fifth withstand."""
    torch.manual_seed(1)
    x = 0.35 + 0.3 * torch.rand(n, 1, 6, 6)
    net = Squashed()
    scores, weight = net(x), net.linear.weight
    y = scores.argmax(dim=1)
    gaps = scores.gather(1, y[:, None]) - scores
    sizes = (weight[y][:, None] - weight[None]).abs().sum(dim=2)
    distances = (gaps / sizes).scatter(1, y[:, None], torch.inf).amin(dim=1)
    return x, y, float(distances.quantile(0.8))


@torch.no_grad()
def bound(model: Squashed, x: Tensor, y: Tensor, eps: float) -> float:
    """Share that none of the steps withstands that are optimal for the linear scores."""
    right = model(x).argmax(dim=1) == y
    weight = model.linear.weight
    for j in range(CLASSES):
        step = (weight[j] - weight[y]).sign().view_as(x)
        right &= model((x + 0.9999 * eps * step).clamp(0, 1)).argmax(dim=1) == y
    return float(right.float().mean())


SQUASHINGS = {
    "steep sigmoid": (torch.sigmoid, 100.0),
    "atan": (lambda z: z.atan(), 1e4),
    "no gradient": (Softsign.apply, 1e3),
    "clamp": (lambda z: z.clamp(-0.3, 0.3), 1.0),
    "log-sigmoid": (nn.LogSigmoid(), 60.0),
    "in place": (lambda z: z.mul_(1.0).sigmoid_(), 50.0),
    "detached": (lambda z: z.sigmoid().detach() + 0 * z, 1.0),
    "hard labels": (lambda z: nn.functional.one_hot(z.argmax(1), CLASSES) + 1e-4 * z.tanh(), 1e3),
    "odd": (lambda z: torch.where(z > 0, 1 - torch.exp(-z), torch.exp(z) - 1), 40.0),
    "large": (lambda z: z, 1e5),
    "small": (lambda z: z * 1e-3, 1.0),
    "log-softmax": (lambda z: z.log_softmax(dim=1), 1e3),
}


def evaluated(model: nn.Module, x: Tensor, y: Tensor, eps: float, suite) -> Evaluation:
    return evaluate(model, (x, y), suite, eps=eps, progress=False)


@pytest.mark.parametrize(
    ("suite", "slack"),
    [("both", 0.04), pytest.param("quick", 0.01, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("name", SQUASHINGS)
def test_no_squashing_looks_more_robust_than_it_is(name: str, suite: str, slack: float) -> None:
    model, problem = Squashed(*SQUASHINGS[name]), data(60 if suite == "quick" else 30)
    eps = problem[2]
    apgd = AutoAttack(eps, version="custom", attacks=["apgd-t"], steps=10)
    both = {"pgd": SuiteEntry(PGD(eps, steps=15), ["cw_f"]), "apgd-t": SuiteEntry(apgd)}
    found = evaluated(model, *problem, both if suite == "both" else suite)
    least = bound(model, *problem)
    assert found.robust_acc <= least + slack
    if suite == "both":
        assert found.metrics["apgd-t"] <= least + slack
        assert found.metrics["pgd/cw_f"] <= least + 0.07  # one ascent has one target


def test_vanishing_gradients_reach_the_result() -> None:
    x, y, eps = data()
    model = Squashed(torch.tanh, 1e4)
    found = evaluated(model, x, y, eps, {"fgsm": SuiteEntry(FGSM(eps))})
    columns = found.outcomes.columns["fgsm/ce_f"]
    assert found.result["attacks"]["fgsm/ce_f"]["unmoved"] == int(columns["unmoved"].sum()) > 0
    assert any("gradients vanish" in text for text in found.warnings)
    with torch.no_grad():
        scores = model(x)[columns["unmoved"]]
    assert bool((scores.abs() == 1.0).all())  # each of them saturated


def test_linear_scores_raise_no_warning_and_take_two_more_gradients() -> None:
    x, y, eps = data()
    model, passes = Squashed(), []
    model.linear.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    found = evaluated(model, x, y, eps, {"pgd": SuiteEntry(PGD(eps, steps=10))})
    assert found.warnings == []
    assert found.result["attacks"]["pgd/ce_f"]["unmoved"] == 0
    assert sum(passes) <= 10 + 2 + 3  # the check at the start takes some too


def test_no_attack_with_success_is_suspicious() -> None:
    x, y, _ = data()
    found = evaluated(Squashed(), x, y, 1e-4, {"pgd": SuiteEntry(PGD(1e-4, steps=3))})
    assert found.robust_acc == found.clean_acc
    assert any("suspicious in itself" in text for text in found.warnings)
    assert "suspicious in itself" in " ".join(str(found).split())


def test_forward_is_put_back() -> None:
    model, (x, _, _) = Squashed(torch.sigmoid, 100.0), data(5)
    before = model(x)
    with seen_through(model, 0, is_bridged=True):
        assert torch.equal(model(x), before)
        scores = model(x.clone().requires_grad_())
        spread = scores.amax(dim=1) - scores.amin(dim=1)
        assert torch.allclose(spread, torch.full_like(spread, 10.0), rtol=1e-2)
        assert torch.equal(scores.argmax(dim=1), before.argmax(dim=1))
    assert "forward" not in vars(model)
    assert torch.equal(model(x), before)
