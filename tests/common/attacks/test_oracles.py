"""Against foolbox, which many papers attack with; it is for tests alone."""

import copy

import foolbox
import pytest
import torch
from foolbox.attacks.gradient_descent_base import normalize_lp_norms
from torch import Tensor, nn

from common.attacks.losses import cross_entropy
from common.attacks.minimum_norm import CarliniWagner, DeepFool
from common.attacks.pgd import FGSM, MIM, PGD
from common.attacks.randomness import ExampleRandom

EPS = 8 / 255
CLOSE = {"rtol": 0, "atol": 1e-6}


class Task:
    """A CNN after a few steps of training, with images of four kinds it mostly knows."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        self.y = torch.arange(4).repeat(5)
        kinds = torch.rand(4, 3, 8, 8, generator=generator)
        noise = torch.rand(20, 3, 8, 8, generator=generator)
        self.x = 0.1 + 0.8 * (0.6 * kinds[self.y] + 0.4 * noise)
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Tanh(),
            nn.Conv2d(8, 8, 3, stride=2, padding=1),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(128, 4),
        )
        optimizer = torch.optim.Adam(self.net.parameters(), 0.02)
        for _ in range(60):
            optimizer.zero_grad()
            cross_entropy(self.net(self.x), self.y).mean().backward()
            optimizer.step()
        self.net.eval().requires_grad_(False)
        self.y[3] = 0  # one that is wrong from the start
        self.foolbox = foolbox.PyTorchModel(self.net, bounds=(0, 1))

    def loss(self, x: Tensor) -> Tensor:
        return cross_entropy(self.net(x), self.y)

    def wrong(self, x: Tensor) -> Tensor:
        return self.net(x).argmax(1) != self.y


@pytest.fixture(scope="module")
def task() -> Task:
    task = Task()
    assert task.wrong(task.x).nonzero().flatten().tolist() == [3]
    return task


def from_x(name: str, step_size: float, steps: int, **settings: float):
    kind = getattr(foolbox.attacks, name)
    return kind(abs_stepsize=step_size, steps=steps, random_start=False, **settings)


def mim():
    """With the normalisation of the paper, which foolbox leaves out."""
    attack = from_x("LinfMomentumIterativeFastGradientMethod", EPS / 8, 8, momentum=0.9)
    attack.normalize = lambda gradients, **_: normalize_lp_norms(gradients, p=1)
    return attack


FROM_X = {
    "fgsm": (FGSM(EPS), foolbox.attacks.LinfFastGradientAttack),
    "pgd": (PGD(EPS, EPS / 4, 10, "zero"), lambda: from_x("LinfPGD", EPS / 4, 10)),
    "pgd-l2": (PGD(0.5, 0.125, 10, "zero", "l2"), lambda: from_x("L2PGD", 0.125, 10)),
    "mim": (MIM(EPS, EPS / 8, 8, decay=0.9), mim),
}


@pytest.mark.parametrize(("attack", "by_foolbox"), FROM_X.values(), ids=FROM_X)
def test_ascents_from_x(task, attack, by_foolbox):
    ours = attack(task.loss, task.x)
    _, theirs, success = by_foolbox()(task.foolbox, task.x, task.y, epsilons=attack.eps)
    torch.testing.assert_close(theirs, ours, **CLOSE)
    assert torch.equal(success, task.wrong(ours))


def test_pgd_linf_from_the_global_generator(task):
    """The same seed gives foolbox the same start: both draw one uniform number a value."""
    torch.manual_seed(7)
    ours = PGD(EPS, EPS / 4, 10)(task.loss, task.x)
    torch.manual_seed(7)
    attack = foolbox.attacks.LinfPGD(abs_stepsize=EPS / 4, steps=10)
    theirs = attack(task.foolbox, task.x, task.y, epsilons=EPS)[0]
    torch.testing.assert_close(theirs, ours, **CLOSE)
    assert not torch.allclose(PGD(EPS, EPS / 4, 10, "zero")(task.loss, task.x), ours, **CLOSE)


@pytest.mark.parametrize(("norm", "name", "eps"), [("linf", "LinfPGD", EPS), ("l2", "L2PGD", 0.5)])
def test_pgd_from_our_random_start(task, norm, name, eps, monkeypatch):
    """In float64: steps along small gradients amplify rounding, which depends on the processor."""
    net, x = copy.deepcopy(task.net).double(), task.x.double()

    def random() -> ExampleRandom:
        return ExampleRandom(0, 0, torch.arange(len(x)))

    def loss(x: Tensor) -> Tensor:
        return cross_entropy(net(x), task.y)

    start = PGD(eps, 0.0, 0, norm=norm)(loss, x, random())
    ours = PGD(eps, eps / 4, 10, norm=norm)(loss, x, random())
    attack = getattr(foolbox.attacks, name)(abs_stepsize=eps / 4, steps=10)
    monkeypatch.setattr(attack, "get_random_start", lambda x0, _: type(x0)(start), raising=True)
    model = foolbox.PyTorchModel(net, bounds=(0, 1))
    theirs = attack(model, x, task.y, epsilons=eps)[0]
    torch.testing.assert_close(theirs, ours, **CLOSE)


@pytest.mark.parametrize(
    ("norm", "eps", "settings"),
    [
        ("linf", 0.05, {}),
        ("linf", 0.05, {"overshoot": 0.1, "candidates": 3}),
        ("l2", 0.5, {"overshoot": 0.1, "candidates": 3}),
        ("l2", 0.5, {"overshoot": 0.0, "candidates": 2}),
    ],
)
@pytest.mark.parametrize("clip", [False, True])
def test_deepfool(task, norm, eps, settings, clip):
    name = {"linf": "LinfDeepFoolAttack", "l2": "L2DeepFoolAttack"}[norm]
    attack = getattr(foolbox.attacks, name)(loss="logits", **settings)
    radius = eps if clip else None
    _, theirs, success = attack(task.foolbox, task.x, task.y, epsilons=radius)
    ours = DeepFool(radius, norm, clip=clip, **settings)(task.net, task.x, task.y)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    if settings.get("overshoot") != 0.0 or not clip:
        assert torch.equal(task.wrong(ours), success)
    assert success.any()
    assert bool(success.all()) is not clip


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"confidence": 0.5},
        {"binary_search_steps": 11, "steps": 6},
    ],
    ids=str,
)
def test_carlini_wagner(task, settings):
    """One example at a time: foolbox ends a batch by its total loss."""
    usual = {"steps": 20, "binary_search_steps": 5, "initial_const": 0.01}
    settings = usual | {"abort_early": True, "confidence": 0.0} | settings
    rows = [0, 1, 2, 3]
    ours = CarliniWagner(step_size=0.05, **settings)(task.net, task.x[rows], task.y[rows])
    attack = foolbox.attacks.L2CarliniWagnerAttack(stepsize=0.05, **settings)
    for i in rows[:3]:
        x, y = task.x[i : i + 1], task.y[i : i + 1]
        theirs, _, success = attack(task.foolbox, x, y, epsilons=None)
        assert success.item() == (task.net(ours[i : i + 1]).argmax(1) != y).item()
        torch.testing.assert_close(ours[i : i + 1], theirs, rtol=0, atol=1e-4)
    assert torch.equal(ours[3], task.x[3])


def test_carlini_wagner_in_a_batch(task):
    """Without early abortion foolbox's examples are on their own in a batch, too."""
    attack = foolbox.attacks.L2CarliniWagnerAttack(
        4, steps=30, stepsize=0.05, initial_const=0.1, abort_early=False
    )
    theirs, _, success = attack(task.foolbox, task.x, task.y, epsilons=None)
    ours = CarliniWagner(None, 0.0, 30, 0.05, 4, 0.1, abort_early=False)(task.net, task.x, task.y)
    assert torch.equal(success, task.wrong(ours))
    assert success.all()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
