"""Examples found wrong leave the batch; the others climb as they would have."""

import pytest
import torch
from torch import Tensor

from common.attacks.pgd import MIM, PGD, climb_until_broken
from common.attacks.randomness import ExampleRandom

ATTACKS = {
    "pgd": PGD(0.02, 0.004, 12),
    "restarts": PGD(0.014, 0.004, 6, restarts=3),
    "momentum": MIM(0.02, steps=8, start="uniform"),
    "l2": PGD(0.15, 0.03, 10, norm="l2"),
    "one_step": PGD(0.02, 0.02, 1),
    "start_alone": PGD(0.2, 0.02, 0),
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_breaks_what_the_attack_breaks_and_leaves_the_rest_where_it_leaves_them(
    attack, large_task
) -> None:
    task = large_task
    plain = attack(task.loss, task.x, task.random(), is_adversarial=task.wrong)
    found = climb_until_broken(attack, task.of, task.x, task.random())
    broken, was_broken = task.wrong(found), task.wrong(plain)
    assert 0 < was_broken.sum() < len(task.y), "the task tells nothing apart"
    assert (broken | ~was_broken).all()
    torch.testing.assert_close(found[~broken], plain[~broken], rtol=0, atol=1e-12)
    order = {"linf": torch.inf, "l2": 2}[attack.norm]
    assert (
        torch.linalg.vector_norm((found - task.x).flatten(1), order, 1).max() <= attack.eps + 1e-9
    )
    assert 0 <= found.min() <= found.max() <= 1
    assert not found.requires_grad


def test_an_example_that_comes_back_stays_broken() -> None:
    """The loss climbs past a narrow band of wrong predictions, into right ones."""

    def of(rows: Tensor):
        def wrong(z: Tensor) -> Tensor:
            return ((z[:, 0] > 0.52) & (z[:, 0] < 0.58)) & (rows == 0)

        return lambda z: z[:, 0], wrong

    x, random = torch.full((2, 1), 0.5), ExampleRandom(0, 0, torch.arange(2))
    found = climb_until_broken(PGD(0.3, 0.05, 6, "zero"), of, x, random)
    assert found.flatten().tolist() == pytest.approx([0.55, 0.8])


def test_steps_and_restarts_are_spent_on_what_stands(large_task) -> None:
    task, sizes, images = large_task, [], []

    def of(rows: Tensor):
        sizes.append(len(rows))
        loss, wrong = task.of(rows)
        return lambda x: (images.append(len(x)), loss(x))[1], wrong

    found = climb_until_broken(PGD(0.014, 0.004, 6, restarts=3), of, task.x, task.random())
    assert sizes.count(len(task.x)) == 2, "the first ascent, and what its ends are worth"
    assert sizes[-1] < len(task.x)
    assert task.wrong(found).sum() >= len(task.x) - sizes[-1]
    images.clear()
    found = climb_until_broken(PGD(0.5, 0.1, 50, restarts=2), of, task.x, task.random())
    assert task.wrong(found).all()
    assert sum(images) < 0.2 * 50 * len(task.x)
    nobody = torch.arange(0)
    random = ExampleRandom(0, 0, nobody)
    assert climb_until_broken(PGD(0.1), task.of, task.x[:0], random).shape == (0, 3, 8, 8)
