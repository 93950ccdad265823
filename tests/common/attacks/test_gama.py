import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor, nn

from common.attacks.gama import GAMAPGD
from common.attacks.randomness import ExampleRandom
from common.errors import ConfigurationError

ATTACKS = {
    "gama": GAMAPGD("8/255", steps=12, decay_at=(6, 9), relaxed_steps=4),
    "gama-unprojected": GAMAPGD("8/255", steps=12, decay_at=(6, 9), relaxed_steps=4, project=False),
}
every_attack = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())


class Task:
    """A small network with batch-norm, images and the labels it gives them."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Dropout(0.0),
            nn.Flatten(),
            nn.Linear(256, 5),
        ).to(dtype)
        self.net.eval()
        with torch.no_grad():
            self.net[-1].weight *= 5
        self.x = torch.rand(6, 3, 8, 8, dtype=dtype)
        self.x[0] = (self.x[0] > 0.5).to(dtype)  # pixels in the corners of the box
        with torch.no_grad():
            self.y = self.net(self.x).argmax(dim=1)
        self.index = torch.arange(6)

    def run(self, attack: GAMAPGD, seed: int = 0) -> Tensor:
        return attack(self.net, self.x, self.y, ExampleRandom(seed, 0, self.index))


@pytest.fixture
def task() -> Task:
    return Task()


def rewrite(task: Task, i: int, eps: float, steps: int, lin: int, drops: list[int]) -> list[Tensor]:
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


def test_equals_a_loop_over_examples():
    task, eps = Task(torch.float64), 8 / 255
    projected, unprojected = (task.run(attack) for attack in ATTACKS.values())
    for i in range(6):
        before, after = rewrite(task, i, eps, steps=12, lin=4, drops=[6, 9])
        torch.testing.assert_close(projected[i], after, rtol=0, atol=1e-12)
        torch.testing.assert_close(unprojected[i], before, rtol=0, atol=1e-12)


def test_weight_falls_linearly_to_zero():
    attack = GAMAPGD("8/255")
    weights = [attack.weight_at(step) for step in (0, 1, 24, 25, 26, 99)]
    assert weights == pytest.approx([50, 48, 2, 0, 0, 0])
    assert GAMAPGD("8/255", relaxed_steps=0).weight_at(0) == 0.0


def test_first_step_goes_by_the_margin_alone(task):
    """At the start Q is P, and the square of their difference is flat."""
    one = GAMAPGD("8/255", steps=1)
    assert torch.equal(task.run(one), task.run(one.but(weight=0.0)))
    two = GAMAPGD("8/255", steps=2, step_size="4/255")
    assert not torch.equal(task.run(two), task.run(two.but(weight=0.0)))


def test_starts_in_a_corner_of_the_cube_and_moves_by_the_step(task):
    seen = []
    task.net.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    eps = 8 / 255
    task.run(GAMAPGD(eps, step_size=0.01, steps=3, decay_at=(1, 2)))
    corner = seen[0] - task.x
    torch.testing.assert_close(corner.abs(), torch.full_like(corner, eps), rtol=0, atol=1e-6)
    assert (corner > 0).float().mean().item() == pytest.approx(0.5, abs=0.07)
    assert torch.equal(seen[0], seen[1])
    inside = (task.x > 0.1) & (task.x < 0.9)
    assert (seen[2] - seen[1])[inside].abs().max().item() == pytest.approx(0.01, abs=1e-6)
    assert (seen[3] - seen[2])[inside].abs().max().item() == pytest.approx(0.001, abs=1e-6)


@every_attack
def test_stays_in_the_box_and_the_ball_if_it_projects(attack, task):
    x_adv = task.run(attack)
    assert x_adv.shape == task.x.shape
    assert x_adv.dtype == torch.float32
    assert not x_adv.requires_grad
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    farthest = (x_adv - task.x).abs().max().item()
    last = attack.step_size / 100
    if attack.project:
        assert farthest <= attack.eps + 1e-6
    else:
        assert attack.eps + 0.9 * last < farthest <= attack.eps + last + 1e-6
    with torch.no_grad():
        assert (task.net(x_adv).argmax(1) != task.y).any()


@every_attack
def test_leaves_everything_else_alone(attack, task):
    for parameter in task.net.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    task.net[3].train()
    modes = [module.training for module in task.net.modules()]
    x, rng = task.x.clone(), torch.get_rng_state()
    task.net[3].forward = lambda x: x  # dropout draws from the global generator
    task.run(attack)
    assert torch.equal(rng, torch.get_rng_state())
    assert torch.equal(x, task.x)
    assert modes == [module.training for module in task.net.modules()]
    assert all((p.grad == 7.0).all() and p.requires_grad for p in task.net.parameters())


@every_attack
def test_is_the_same_in_any_gradient_mode(attack, task):
    expected = task.run(attack)
    assert torch.equal(task.run(attack), expected)
    assert not torch.equal(task.run(attack, seed=1), expected)
    with torch.no_grad():
        assert torch.equal(task.run(attack), expected)
    with torch.inference_mode():
        task.x, task.y = task.x.clone(), task.y.clone()
        result = task.run(attack)
    assert torch.equal(result, expected)
    assert not result.is_inference()


@every_attack
def test_an_example_does_not_depend_on_its_batch(attack):
    task = Task(torch.float64)
    together = task.run(attack)
    rows = torch.tensor([4, 1, 3])
    random = ExampleRandom(0, 0, task.index[rows])
    alone = attack(task.net, task.x[rows], task.y[rows], random)
    torch.testing.assert_close(alone, together[rows])


def test_a_stateful_generator_or_the_global_one_will_do(task):
    attack = ATTACKS["gama"]
    first = attack(task.net, task.x, task.y, torch.Generator().manual_seed(3))
    assert torch.equal(attack(task.net, task.x, task.y, torch.Generator().manual_seed(3)), first)
    torch.manual_seed(3)
    assert torch.equal(attack(task.net, task.x, task.y), first)


def test_defaults_are_those_of_the_paper():
    attack = GAMAPGD("8/255")
    assert attack.step_size == pytest.approx(16 / 255)
    assert repr(attack) == (
        "GAMAPGD(eps=8/255, step_size=16/255, steps=100, decay_at=(60, 85), weight=50, "
        "relaxed_steps=25, project=True)"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eps": 8}, "did you mean '8/255'"),
        ({"eps": 0.1, "step_size": 2}, r"step_size .* '2/255'"),
        ({"eps": 0.1, "steps": 0}, "steps must be a whole number of at least 1"),
        ({"eps": 0.1, "decay_at": (-1,)}, "decay_at"),
        ({"eps": 0.1, "weight": -1.0}, "weight must be finite"),
        ({"eps": 0.1, "relaxed_steps": -1}, "relaxed_steps must be"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        GAMAPGD(**settings)


def test_inputs_that_cannot_be_attacked_are_refused(task):
    with pytest.raises(ValueError, match="no gradient"):
        GAMAPGD(0.1)(lambda x: task.net(x).detach(), task.x, task.y)
    with pytest.raises(ValueError, match="floating-point pixels"):
        GAMAPGD(0.1)(task.net, (task.x * 255).to(torch.uint8), task.y)


def test_is_set_from_the_command_line():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(GAMAPGD, "attack")
    name = "--attack=common.attacks.gama.GAMAPGD"
    config = parser.parse_args([name, "--attack.eps=8/255", "--attack.decay_at=[3, 5]"])
    assert parser.instantiate(config).attack.decay_at == (3, 5)
