import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.attacks.geometry import parse_radius, project_l1
from common.attacks.pgd import MIM, PGD, FriendlyPGD, input_gradient
from common.attacks.randomness import ExampleRandom
from common.errors import ConfigurationError

ORDER = {"linf": math.inf, "l2": 2, "l1": 1}


def distance(x_adv: Tensor, x: Tensor, norm: str) -> Tensor:
    return torch.linalg.vector_norm((x_adv - x).flatten(1), ORDER[norm], dim=1)


every_norm = pytest.mark.parametrize("norm", ["linf", "l2", "l1"])


def bare_loop(task, x_adv: Tensor, eps: float, step: float, steps: int) -> tuple[Tensor, Tensor]:
    """The loop of the papers' codes: the last point, and where gradients were taken."""
    seen = []
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        seen.append(x_adv.detach())
        (gradient,) = torch.autograd.grad(task.loss(x_adv).sum(), x_adv)
        x_adv = x_adv.detach() + step * gradient.sign()
        x_adv = torch.minimum(torch.maximum(x_adv, task.x - eps), task.x + eps).clamp(0, 1)
    return x_adv, torch.stack(seen)


def best_gain(w: Tensor, x: Tensor, eps: float, norm: str) -> float:
    """The largest <w, d> with x + d in the box and d in the ball; w and x are flat."""
    room = torch.where(w > 0, 1 - x, x)
    if norm == "linf":
        return (w.abs() * room.clamp(max=eps)).sum().item()
    if norm == "l1":  # a fractional knapsack: fill the largest weights first
        left, gain = eps, 0.0
        for size, space in sorted(zip(w.abs().tolist(), room.tolist(), strict=True), reverse=True):
            step = min(left, space)
            left, gain = left - step, gain + size * step
        return gain
    low, high = 0.0, 1e6  # KKT: |d_i| = min(lambda |w_i|, room_i), lambda from the radius
    for _ in range(200):
        middle = (low + high) / 2
        inside = (middle * w.abs()).minimum(room).norm() <= eps
        low, high = (middle, high) if inside else (low, middle)
    return (w.abs() * (low * w.abs()).minimum(room)).sum().item()


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.3), ("l2", 2.5), ("l1", 6.0)])
def test_reaches_the_optimum_of_a_linear_loss_inside_the_box(norm, eps):
    torch.manual_seed(1)
    w = torch.randn(3, 5, 5, dtype=torch.float64)
    x = torch.rand(4, 3, 5, 5, dtype=torch.float64)
    attack = PGD(eps, eps / 200, 300, "zero", norm)
    x_adv = attack(lambda z: (z * w).flatten(1).sum(1), x)
    for i in range(4):
        best = best_gain(w.flatten(), x[i].flatten(), eps, norm)
        gain = ((x_adv[i] - x[i]) * w).sum().item()
        assert gain <= best * (1 + 1e-9)
        assert gain == pytest.approx(best, rel=6e-3)


@pytest.mark.parametrize("project_start", [True, False])
def test_equals_the_bare_loop_from_a_gaussian_start(task, project_start):
    """Bit for bit; the official TRADES loop projects only after the first step."""
    eps, step = 8 / 255, 2 / 255
    begin = task.x + 0.1 * task.random().normal(task.x.shape[1:])
    assert begin.min() < 0
    if project_start:
        begin = begin.clamp(task.x - eps, task.x + eps).clamp(0, 1)
    expected, seen = bare_loop(task, begin, eps, step, 5)
    asked = []

    def loss(x: Tensor) -> Tensor:
        asked.append(x.detach())
        return task.loss(x)

    attack = PGD("8/255", "2/255", 5, "gaussian", start_scale=0.1, project_start=project_start)
    assert torch.equal(attack(loss, task.x, task.random()), expected)
    assert torch.equal(torch.stack(asked), seen)  # one pass per step, and no last one


def test_tiny_gradients_do_not_underflow(task):
    """The squares of a saturated network's gradients vanish in float32; its direction must not."""
    for attack in (PGD(0.5, 0.2, 2, "zero", "l2"), MIM(0.1), MIM(0.5, norm="l2")):
        usual = attack(lambda z: (z * task.x.flip(0)).flatten(1).sum(1), task.x)
        faint = attack(lambda z: (z * task.x.flip(0) * 1e-30).flatten(1).sum(1), task.x)
        torch.testing.assert_close(faint, usual)
        assert distance(faint, task.x, attack.norm).min() > 0.05


@every_norm
def test_without_a_gradient_or_a_radius_nothing_moves(norm, task):
    for attack in (PGD(0.2, 0.1, 3, "zero", norm), MIM(0.2, norm=norm)):
        flat = attack(lambda z: 0.0 * z.flatten(1).sum(1), task.x)
        assert torch.equal(flat, task.x)
        assert attack.unmoved.all()
        assert not attack.lost.any()
    for start in ("zero", "uniform", "gaussian"):
        x_adv = PGD(0, 0.1, 3, start, norm)(task.loss, task.x, torch.Generator())
        torch.testing.assert_close(x_adv, task.x, rtol=0, atol=1e-7)


@every_norm
def test_entries_of_the_gradient_that_are_not_finite_leave_their_pixel(norm):
    x = torch.full((2, 1, 2, 2), 0.5)
    slope = torch.ones(1, 2, 2)
    slope[0, 0, 0], slope[0, 0, 1] = math.nan, -math.inf
    attack = PGD(0.2, 0.1, 3, "zero", norm, l1_density=1.0)
    x_adv = attack(lambda z: (z * slope).flatten(1).sum(1), x)
    assert (x_adv[:, 0, 0] == 0.5).all()
    assert (x_adv[:, 0, 1] > 0.5).all()


def test_restarts_keep_a_success_over_a_higher_loss(task):
    """A run counts as robust only if every restart failed."""

    def is_adversarial(x: Tensor) -> Tensor:
        return x[:, 0, 0, 0] < 0.5  # unrelated to the loss, which prefers large pixels

    def total(x: Tensor) -> Tensor:
        return x.flatten(1).sum(1)

    x, seed = torch.full((64, 1, 2, 2), 0.5), torch.Generator().manual_seed
    x_adv = PGD(0.5, 0.0, 1, restarts=4)(total, x, seed(0), is_adversarial=is_adversarial)
    generator = seed(0)
    tries = [PGD(0.5, 0.0, 0)(task.loss, x, generator) for _ in range(4)]
    successes = torch.stack([is_adversarial(x) for x in tries])
    ever = successes.any(0)
    assert torch.equal(is_adversarial(x_adv), ever)
    among = torch.stack([total(x) for x in tries]).masked_fill(~successes & ever, -math.inf)
    torch.testing.assert_close(total(x_adv), among.amax(0))


@every_norm
def test_uniform_start_fills_the_ball_evenly(norm):
    """In a d-dimensional ball the share inside radius r is (r / eps)^d."""
    d = 4
    x = torch.full((4000, 1, 2, 2), 0.5, dtype=torch.float64)
    attack = PGD(0.4, 0.1, 0, norm=norm)
    generators = (torch.Generator().manual_seed(0), ExampleRandom(0, 0, torch.arange(4000)))
    for generator in generators:
        delta = attack(lambda z: z.flatten(1).sum(1), x, generator) - x
        radius = torch.linalg.vector_norm(delta.flatten(1), ORDER[norm], dim=1) / 0.4
        for share in (0.1, 0.5, 0.9):
            inside = (radius <= share ** (1 / d)).double().mean().item()
            assert inside == pytest.approx(share, abs=0.03)  # five standard deviations
        assert delta.mean().abs() < 0.01
        assert ((delta > 0).double().mean(0) - 0.5).abs().max() < 0.04


@given(
    shape=st.tuples(*[st.integers(1, n) for n in (3, 3, 5, 5)]),
    eps=st.floats(0, 1),
    step=st.floats(0, 1),
    steps=st.integers(0, 3),
    norm=st.sampled_from(["linf", "l2", "l1"]),
    start=st.sampled_from(["zero", "uniform", "gaussian"]),
    kind=st.sampled_from([PGD, FriendlyPGD]),
    seed=st.integers(0, 10**6),
)
@settings(deadline=None, max_examples=40)
def test_ball_and_box_hold_whatever_the_settings(shape, eps, step, steps, norm, start, kind, seed):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.rand(shape, generator=generator) * 3 - 1).clamp(0, 1)  # a third in each corner
    w = torch.randn(shape, generator=generator)
    x_adv = kind(eps, step, steps, start, norm, start_scale=0.5)(
        lambda z: (z * w).flatten(1).sum(1),
        x,
        generator,
        is_adversarial=lambda z: z.flatten(1).mean(1) > 0.5,
    )
    assert (x_adv.shape, x_adv.dtype) == (x.shape, torch.float32)
    assert 0 <= x_adv.min() <= x_adv.max() <= 1
    assert (distance(x_adv, x, norm) <= eps * (1 + 1e-5) + 1e-6).all()


# Friendly adversarial training


@pytest.mark.parametrize("tau", [0, 1, 2, 9])
def test_friendly_equals_a_loop_over_examples(tau, task64):
    """One example at a time, leaving the loop as the official code does."""
    task = task64
    task.y[4] = (task.y[4] + 1) % 5  # wrong from the start
    eps, step, steps = 0.2, 0.01, 8
    start = PGD(eps, step, 0)(task.loss, task.x, task.random())
    attack = FriendlyPGD(eps, step, steps, tau=tau)
    x_adv = attack(task.loss, task.x, task.random(), is_adversarial=task.wrong)
    for i in range(6):
        x, expected, control = task.x[i : i + 1], start[i : i + 1], tau
        loss, is_wrong = task.of(torch.tensor([i]))
        for _ in range(steps):
            control -= int(is_wrong(expected))
            if control < 0:
                break
            expected = expected + step * input_gradient(loss, expected).sign()
            expected = expected.clamp(x - eps, x + eps).clamp(0, 1)
        torch.testing.assert_close(x_adv[i], expected[0], rtol=0, atol=1e-12)
    full = PGD(eps, step, steps)(task.loss, task.x, task.random())
    stopped = (x_adv != full).flatten(1).any(1)
    assert stopped.any() == (tau < 9)  # otherwise nothing was tested
    if tau == 0:
        assert torch.equal(x_adv[4], start[4])


def test_friendly_follows_its_schedule_of_epochs(task):
    def run(attack: FriendlyPGD) -> Tensor:
        return attack(task.loss, task.x, is_adversarial=task.wrong)

    attack = FriendlyPGD(0.2, 0.01, 8, "zero", tau={0: 0, 50: 1, 90: 2})
    by_tau = [run(attack.but(tau=tau)) for tau in (0, 1, 2)]
    assert not torch.equal(by_tau[0], by_tau[1])
    assert torch.equal(run(attack), by_tau[0])  # before any epoch has begun
    for epoch, tau in ((0, 0), (49, 0), (50, 1), (89, 1), (90, 2), (10**6, 2), (3, 0)):
        attack.set_epoch(epoch)
        assert torch.equal(run(attack), by_tau[tau])


@pytest.mark.parametrize("form", ["added", "scaled"])
def test_friendly_noise_has_its_scale_and_spares_stopped_examples(form):
    x, stopped = torch.full((64, 1, 8, 8), 0.5), torch.arange(64) < 20
    size = {"added": 0.02, "scaled": 0.2}[form]
    attack = FriendlyPGD(0.4, 0.1, 1, "zero", noise=size, noise_form=form)
    generator = torch.Generator().manual_seed(0)
    x_adv = attack(lambda z: z.flatten(1).sum(1), x, generator, is_adversarial=lambda _: stopped)
    assert torch.equal(x_adv[stopped], x[stopped])
    noise = x_adv[~stopped] - 0.6
    if form == "added":  # normal
        assert noise.std().item() == pytest.approx(0.02, rel=0.05)
        assert noise.mean().item() == pytest.approx(0.0, abs=0.002)
    else:  # uniform in [0, size * step_size)
        assert -1e-6 <= noise.min() <= noise.max() <= 0.02 + 1e-6
        assert noise.mean().item() == pytest.approx(0.01, rel=0.05)


# Settings


@pytest.mark.parametrize(
    ("value", "expected"),
    [("8/255", 8 / 255), (" 8 / 255 ", 8 / 255), ("0.031", 0.031), (0.5, 0.5), (1, 1.0), ("0", 0)],
)
def test_radii_are_read_as_the_field_writes_them(value, expected):
    assert parse_radius(value) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("value", [-0.1, "x/255", "1/0", math.nan, math.inf, "nan", "", None])
def test_radii_that_mean_nothing_are_refused(value):
    with pytest.raises(ConfigurationError, match=r"at least 0 or a fraction"):
        parse_radius(value)


def test_losses_an_attack_cannot_climb_are_refused(task):
    with pytest.raises(ValueError, match="needs is_adversarial"):
        FriendlyPGD(0.1)(task.loss, task.x)
    attack = PGD(0.1, 0.05, 1)
    with pytest.raises(ValueError, match=r"\(6,\)"):
        attack(lambda z: task.loss(z).mean(), task.x)
    with pytest.raises(ValueError, match="made for 4 examples and the batch has 6"):
        attack(task.loss, task.x, ExampleRandom(0, 0, torch.arange(4)))


def test_momentum_equals_a_rewrite_and_decay_zero_is_pgd(task):
    eps, steps, decay = 0.1, 5, 0.9
    x_adv, g = task.x, torch.zeros_like(task.x)
    for _ in range(steps):
        gradient = input_gradient(task.loss, x_adv)
        g = decay * g + gradient / gradient.abs().sum(dim=(1, 2, 3), keepdim=True)
        x_adv = x_adv + eps / steps * g.sign()
        x_adv = x_adv.clamp(task.x - eps, task.x + eps).clamp(0, 1)
    torch.testing.assert_close(MIM(eps, steps=steps, decay=decay)(task.loss, task.x), x_adv)
    plain = PGD(eps, 0.03, 4, "zero")(task.loss, task.x)
    assert torch.equal(MIM(eps, 0.03, 4, decay=0.0)(task.loss, task.x), plain)
    assert not torch.equal(MIM(eps, 0.03, 4, decay=1.0)(task.loss, task.x), plain)


def test_restarts_keep_the_highest_loss(task):
    random = task.random()
    single = torch.stack(
        [task.loss(PGD(0.1, 0.05, 1)(task.loss, task.x, random)) for _ in range(5)]
    )
    for restarts in (2, 5):
        x_adv = PGD(0.1, 0.05, 1, restarts=restarts)(task.loss, task.x, task.random())
        torch.testing.assert_close(task.loss(x_adv), single[:restarts].amax(0))
    assert (single.amax(0) > single[0]).any()


@given(
    size=st.integers(1, 40),
    eps=st.floats(0.01, 3),
    scale=st.floats(0.1, 5),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=60)
def test_l1_projection_is_the_nearest_point(size, eps, scale, seed):
    """Against bisection on the threshold of soft thresholding."""
    generator = torch.Generator().manual_seed(seed)
    delta = scale * torch.randn(1, size, generator=generator, dtype=torch.float64)
    low, high = 0.0, delta.abs().max().item()
    for _ in range(100):
        middle = (low + high) / 2
        total = (delta.abs() - middle).clamp(min=0).sum().item()
        low, high = (middle, high) if total > eps else (low, middle)
    threshold = high if delta.abs().sum() > eps else 0.0
    expected = delta.sign() * (delta.abs() - threshold).clamp(min=0)
    torch.testing.assert_close(project_l1(delta, eps), expected, rtol=1e-9, atol=1e-9)
