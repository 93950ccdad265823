"""Decision-based attacks on linear classifiers, whose minimal distances are known."""

import foolbox
import pytest
import torch
from torch import Tensor, nn

from common.attacks.decision import DecisionBased
from common.attacks.randomness import ExampleRandom

DUAL = {"linf": 1.0, "l2": 2.0, "l1": torch.inf}
CLASSES = 4


def problem(n: int = 24, side: int = 6) -> tuple[nn.Module, Tensor, Tensor]:
    """A linear classifier and images far enough from the ends of the box."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(side * side, CLASSES)).requires_grad_(False)
    nn.init.normal_(net[1].weight)
    net[1].bias.copy_(-net[1].weight @ torch.full((side * side,), 0.5))
    x = 0.4 + 0.2 * torch.rand(n, 1, side, side)
    return net, x, net(x).argmax(dim=1)


def exact(net: nn.Module, x: Tensor, y: Tensor, norm: str) -> Tensor:
    """Distance to the nearest decision boundary."""
    weight, scores, true = net[1].weight, net(x), y[:, None]
    size = (weight[true] - weight).norm(p=DUAL[norm], dim=2)
    return ((scores.gather(1, true) - scores) / size).scatter(1, true, torch.inf).amin(dim=1)


def length(delta: Tensor, norm: str) -> Tensor:
    return delta.flatten(1).norm(p={"linf": torch.inf, "l2": 2.0, "l1": 1.0}[norm], dim=1)


def run(attack: DecisionBased, net, x: Tensor, y: Tensor) -> Tensor:
    random = ExampleRandom(0, 0, torch.arange(len(x)))
    return attack(lambda x: net(x).argmax(dim=1), x, y, random)


@pytest.mark.parametrize(
    ("norm", "queries", "median"),
    [("linf", 400, 1.02), ("l2", 1000, 1.10), ("l1", 1000, 1.6)],
)
def test_distances_come_near_those_of_the_closed_form(norm, queries, median) -> None:
    net, x, y = problem()
    x_adv = run(DecisionBased(0.0, norm, queries), net, x, y)
    assert bool((net(x_adv).argmax(dim=1) != y).all())
    assert x_adv.min() >= 0.0
    assert x_adv.max() <= 1.0
    ratio = length(x_adv - x, norm) / exact(net, x, y, norm)
    assert ratio.min() > 0.999
    assert ratio.median() < median


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_no_farther_than_the_published_implementation_at_the_same_queries(norm) -> None:
    net, x, y = problem()
    torch.manual_seed(0)
    theirs = foolbox.attacks.HopSkipJumpAttack(
        steps=12, initial_gradient_eval_steps=30, constraint=norm, max_gradient_eval_steps=10**4
    )
    calls: list[int] = []
    handle = net.register_forward_hook(lambda *_: calls.append(1))
    model = foolbox.PyTorchModel(net.eval(), bounds=(0, 1))
    _, images, is_adversarial = theirs(model, x, y, epsilons=None)
    handle.remove()
    assert bool(is_adversarial.all())
    ours = run(DecisionBased(0.0, norm, min(len(calls), 2000)), net, x, y)
    least = exact(net, x, y, norm)
    ratio = length(ours - x, norm) / least
    assert ratio.median() <= (length(images - x, norm) / least).median() * 1.05


def test_an_example_within_the_ball_costs_no_more_queries() -> None:
    net, x, y = problem()
    sizes: list[int] = []

    def labels(images: Tensor) -> Tensor:
        sizes.append(len(images))
        return net(images)

    eps = float(exact(net, x, y, "linf").median()) * 1.3
    attack = DecisionBased(eps, queries=400)
    x_adv = run(attack, labels, x, y)
    assert len(sizes) <= 400
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < len(x)
    broken = length(x_adv - x, "linf") <= eps
    assert bool(broken[exact(net, x, y, "linf") < 0.9 * eps].all())


@pytest.mark.parametrize("norm", DUAL)
def test_a_constant_classifier_has_no_adversarial_images(norm) -> None:
    _, x, _ = problem(3)
    constant = lambda x: torch.eye(CLASSES)[:1].expand(len(x), -1)  # noqa: E731
    found = run(DecisionBased(1.0, norm, 200), constant, x, torch.zeros(3, dtype=torch.int64))
    assert torch.equal(found, x)
