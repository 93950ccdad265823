"""Taking out what is broken: the others climb as they would have."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from common.attacks.losses import cross_entropy
from common.attacks.pgd import MIM, PGD, check_points, climb_until_broken
from common.attacks.randomness import ExampleRandom


class Task:
    """A random network in float64, images, and the labels it gives them."""

    def __init__(self, n: int = 40) -> None:
        torch.manual_seed(1)
        self.net = nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(216, 10)
        ).double()
        self.net.requires_grad_(False)
        self.x = torch.rand(n, 3, 8, 8).double()
        self.y = self.net(self.x).argmax(dim=1)
        self.images = 0

    def of(self, rows: Tensor):
        def loss(x: Tensor) -> Tensor:
            self.images += len(x)
            return cross_entropy(self.net(x), self.y[rows])

        return loss, lambda x: self.net(x).argmax(dim=1) != self.y[rows]

    def wrong(self, x: Tensor) -> Tensor:
        return self.net(x).argmax(dim=1) != self.y

    def random(self) -> ExampleRandom:
        return ExampleRandom(0, 1, torch.arange(len(self.x)))

    def plain(self, attack: PGD) -> Tensor:
        everything = torch.arange(len(self.x))
        loss, wrong = self.of(everything)
        return attack(loss, self.x, self.random(), is_adversarial=wrong)


ATTACKS = {
    "pgd": PGD(0.02, 0.004, 12),
    "restarts": PGD(0.014, 0.004, 6, restarts=3),
    "momentum": MIM(0.02, steps=8, start="uniform"),
    "l2": PGD(0.3, 0.05, 10, norm="l2"),
    "one_step": PGD(0.02, 0.02, 1),
    "start_alone": PGD(0.2, 0.02, 0),
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
def test_breaks_what_the_attack_breaks_and_leaves_the_rest_where_it_leaves_them(attack) -> None:
    task = Task()
    plain, found = task.plain(attack), climb_until_broken(attack, task.of, task.x, task.random())
    broken, was_broken = task.wrong(found), task.wrong(plain)
    assert 0 < was_broken.sum() < len(task.y), "the task tells nothing apart"
    assert (broken | ~was_broken).all()
    torch.testing.assert_close(found[~broken], plain[~broken], rtol=0, atol=1e-12)
    size = (found - task.x).flatten(1)
    norm = torch.linalg.vector_norm(size, torch.inf if attack.norm == "linf" else 2, dim=1)
    assert norm.max() <= attack.eps + 1e-9
    assert found.min() >= 0
    assert found.max() <= 1
    assert not found.requires_grad


def test_spends_fewer_steps_and_none_on_what_fell_at_once() -> None:
    task, attack = Task(), PGD(0.5, 0.1, 50)
    climb_until_broken(attack, task.of, task.x, task.random())
    assert task.images < 0.2 * 50 * len(task.x)


def test_an_example_that_comes_back_stays_broken() -> None:
    """The loss climbs past a narrow band of wrong predictions, into right ones."""
    x = torch.full((2, 1), 0.5)
    y = torch.zeros(2)

    def of(rows: Tensor):
        def wrong(z: Tensor) -> Tensor:
            return ((z[:, 0] > 0.52) & (z[:, 0] < 0.58)) & (rows == 0)

        return lambda z: z[:, 0] + y[rows], wrong

    attack = PGD(0.3, 0.05, 6, "zero")
    found = climb_until_broken(attack, of, x, ExampleRandom(0, 0, torch.arange(2)))
    assert found[0].item() == pytest.approx(0.55)
    assert found[1].item() == pytest.approx(0.8)


def test_restarts_meet_only_what_stands() -> None:
    task = Task()
    attack = PGD(0.014, 0.004, 6, restarts=3)
    sizes: list[int] = []

    def of(rows: Tensor):
        sizes.append(len(rows))
        return task.of(rows)

    found = climb_until_broken(attack, of, task.x, task.random())
    assert sizes.count(len(task.x)) == 2, "the first ascent, and what its ends are worth"
    assert sizes[-1] < len(task.x)
    assert (task.wrong(found)).sum() >= len(task.x) - sizes[-1]


def test_everything_may_fall_and_nothing_may_be_there() -> None:
    task = Task(5)
    found = climb_until_broken(PGD(1.0, 0.5, 9, restarts=3), task.of, task.x, task.random())
    assert task.wrong(found).all()
    nobody = torch.arange(0)
    none = climb_until_broken(
        PGD(0.1), lambda rows: task.of(nobody), task.x[:0], ExampleRandom(0, 0, nobody)
    )
    assert none.shape == (0, 3, 8, 8)


@pytest.mark.parametrize("steps", [0, 1, 2, 10, 100, 1000])
def test_check_points_lie_before_the_last_step_and_thin_out(steps: int) -> None:
    points = sorted(check_points(steps))
    assert all(1 <= point < steps for point in points)
    assert all(b <= 1.5 * a + 1 for a, b in itertools.pairwise(points))
    assert len(points) <= 18
