import math

import pytest
import torch
from torch import Tensor

from common.attacks.minimum_norm import CarliniWagner, DeepFool, MinimumNorm

CW = CarliniWagner(steps=20, step_size=0.1, binary_search_steps=4, initial_const=0.1)
ATTACKS = {
    "deepfool": DeepFool(),
    "deepfool-l2": DeepFool(norm="l2", candidates=3),
    "deepfool-clip": DeepFool("8/255", clip=True),
    "cw": CW,
    "cw-confident": CW.but(confidence=0.5),
}
every_attack = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
ORDER = {"linf": math.inf, "l2": 2}


def distance(x_adv: Tensor, x: Tensor, norm: str) -> Tensor:
    return torch.linalg.vector_norm((x_adv - x).flatten(1), ORDER[norm], dim=1)


@pytest.fixture
def task(task):
    """One channel in the corners of the box, where tanh saturates; the last label is wrong."""
    task.x[0, 1:] = torch.rand(2, 8, 8)
    task.y[0] = task.net(task.x[:1]).argmax()
    task.y[5] = (task.y[5] + 1) % 5
    return task


def run(attack: MinimumNorm, task) -> Tensor:
    """On a task, or on the linear classifier."""
    return attack(getattr(task, "net", task), task.x, task.y)


class Linear:
    """A linear classifier and eight images far from the box, with their distances to a boundary."""

    def __init__(self, norm: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self.w = torch.randn(5, 12, generator=generator, dtype=torch.float64)
        self.w *= torch.tensor([[0.5], [1.0], [1.5], [2.0], [3.0]])  # the runner-up is not nearest
        x = 0.3 + 0.4 * torch.rand(200, 3, 2, 2, generator=generator, dtype=torch.float64)
        self.b = -self.w @ x.flatten(1).mean(0)
        logits = self(x)
        y = logits.argmax(1, keepdim=True)
        gaps = logits.gather(1, y) - logits
        distances = gaps / (self.w[y] - self.w).norm(p={"linf": 1, "l2": 2}[norm], dim=2)
        nearest = distances.scatter(1, y, math.inf).amin(1)
        self.distance, far = nearest.topk(8)
        self.x, self.y = x[far], y[far, 0]

    def __call__(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.w.T + self.b


@every_attack
def test_finds_images_of_another_class_and_returns_a_wrong_one_as_it_is(attack, task):
    x_adv = run(attack, task)
    if not getattr(attack, "clip", False):
        assert task.wrong(x_adv).all()
    assert (x_adv != task.x).flatten(1).any(1).tolist() == [True] * 5 + [False]


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("candidates", [5, 10])
@pytest.mark.parametrize("overshoot", [0.0, 0.5])
def test_deepfool_reaches_the_boundary_of_a_linear_classifier(norm, candidates, overshoot):
    """One step is exact; 1e-4 is added to the distance on purpose."""
    task = Linear(norm)
    x_adv = run(DeepFool(norm=norm, overshoot=overshoot, candidates=candidates), task)
    expected = (1 + overshoot) * (task.distance + 1e-4)
    torch.testing.assert_close(distance(x_adv, task.x, norm), expected, rtol=1e-5, atol=0)
    assert (task(x_adv).argmax(1) != task.y).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_clipping_brings_far_images_into_the_ball_and_spares_near_ones(norm):
    task = Linear(norm)
    free = run(DeepFool(norm=norm), task)
    reached = distance(free, task.x, norm)
    eps = reached.median().item()
    clipped = run(DeepFool(eps, norm, clip=True), task)
    near = reached <= eps
    assert 0 < near.sum() < 8
    torch.testing.assert_close(clipped[near], free[near])
    expected = torch.full_like(reached[~near], eps)
    torch.testing.assert_close(distance(clipped, task.x, norm)[~near], expected)
    # The radius alone says nothing to the search.
    assert torch.equal(run(DeepFool(eps, norm), task), free)


@every_attack
def test_where_nothing_is_found_x_comes_back(attack, task):
    """A class that always wins by far: no image is adversarial."""

    def predict(x: Tensor) -> Tensor:
        return task.net(x) + 1e6 * torch.eye(5)[0]

    x_adv = attack(predict, task.x, torch.zeros(6, dtype=torch.long))
    assert torch.equal(x_adv, task.x)


def test_deepfool_that_runs_out_of_steps_returns_x(task):
    few, many = DeepFool(steps=1, overshoot=0.0), DeepFool(overshoot=0.0)
    x_adv, complete = run(few, task), run(many, task)
    unfinished = (x_adv == task.x).flatten(1).all(1)
    assert unfinished[:5].any()
    assert task.wrong(x_adv)[~unfinished].all()
    torch.testing.assert_close(x_adv[~unfinished], complete[~unfinished])


def test_early_abortion_saves_passes_and_changes_little():
    task, calls, reached = Linear("l2"), [0, 0], []
    for i, aborts in enumerate((False, True)):

        def predict(x: Tensor, i: int = i) -> Tensor:
            calls[i] += 1
            return task(x)

        attack = CarliniWagner(steps=40, step_size=0.04, abort_early=aborts)
        reached.append(distance(attack(predict, task.x, task.y), task.x, "l2"))
    assert calls[1] < calls[0] == 1 + 9 * 40
    torch.testing.assert_close(*reached, rtol=0.05, atol=0)


def test_deepfool_ends_when_all_are_done(task):
    calls = []
    task.net.register_forward_hook(lambda *_: calls.append(1))
    run(DeepFool(), task)
    assert len(calls) < 20
    calls.clear()
    DeepFool()(task.net, task.x[5:], task.y[5:])
    assert len(calls) == 2


@every_attack
def test_slopes_that_are_not_finite_do_no_harm(attack, task):
    """A square root at zero: its slope is infinite at the first pixel."""

    def predict(x: Tensor) -> Tensor:
        return task.net(x) + (x[:, :1, 0, 0] - x[:, :1, 0, 0].detach()).sqrt()

    x_adv = attack(predict, task.x, task.y)
    assert torch.isfinite(x_adv).all()
