import torch
from torch import Tensor

from common.attacks.gama import GAMAPGD
from common.attacks.randomness import ExampleRandom

ATTACKS = {
    "gama": GAMAPGD("8/255", steps=12, decay_at=(6, 9), relaxed_steps=4),
    "gama-unprojected": GAMAPGD("8/255", steps=12, decay_at=(6, 9), relaxed_steps=4, project=False),
}


def run(attack: GAMAPGD, task) -> Tensor:
    return attack(task.net, task.x, task.y, task.random())


def rewrite(task, i: int, eps: float, steps: int, lin: int, drops: list[int]) -> list[Tensor]:
    """One example, with noise as the state; the last point before and after its projection."""
    x, y = task.x[i : i + 1], int(task.y[i])
    u = ExampleRandom(0, 0, task.index[i : i + 1]).uniform(x.shape[1:])
    noise = eps * torch.sign(u - 0.5 + 1e-12).to(x)
    p = task.net(x + noise).softmax(1).detach()
    eta, weight = 2 * eps, 50.0
    for step in range(steps):
        if step in drops:
            eta /= 10
        image = (x + noise).requires_grad_()
        q = task.net(image).softmax(1)
        rival = max(q[0, j] for j in range(5) if j != y)
        cost = rival - q[0, y]
        if step <= lin:
            cost = cost + weight * ((p - q) ** 2).sum()
            weight -= 50.0 / lin
        (gradient,) = torch.autograd.grad(cost, image)
        point = (image.detach() + eta * gradient.sign()).clamp(0, 1)
        noise = (point - x).clamp(-eps, eps)
    return [point[0], (x + noise)[0]]


def test_equals_a_loop_over_examples(task64):
    task, eps = task64, 8 / 255
    projected, unprojected = (run(attack, task) for attack in ATTACKS.values())
    assert (unprojected - task.x).abs().max() > eps + 0.9 * 2 * eps / 100  # by the last step
    for i in range(6):
        before, after = rewrite(task, i, eps, steps=12, lin=4, drops=[6, 9])
        torch.testing.assert_close(projected[i], after, rtol=0, atol=1e-12)
        torch.testing.assert_close(unprojected[i], before, rtol=0, atol=1e-12)


def test_a_stateful_generator_or_the_global_one_will_do(task):
    attack = ATTACKS["gama"]
    first = attack(task.net, task.x, task.y, torch.Generator().manual_seed(3))
    torch.manual_seed(3)
    assert torch.equal(attack(task.net, task.x, task.y), first)
    assert not torch.equal(attack(task.net, task.x, task.y), first)
