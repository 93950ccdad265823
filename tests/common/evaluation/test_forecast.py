"""What an evaluation says it still needs, beside what it then needs."""

import pytest
import torch
from torch import Tensor, nn

from common.attacks.autoattack import AutoAttack
from common.attacks.decision import DecisionBased
from common.attacks.gama import GAMAPGD
from common.attacks.noise import GaussianNoise
from common.attacks.pgd import PGD
from common.attacks.settings import Budget
from common.evaluation import Audit, SuiteEntry
from common.evaluation.forecast import Forecast, Rates
from common.evaluation.models import Victim
from common.evaluation.progress import ConsoleProgress, Progress, left
from common.evaluation.runner import run_steps
from common.evaluation.steps import Step
from common.evaluation.suite import steps_of
from common.results.lines import Cost, Outcomes, Threat

SMALL, LARGE = 1e-4, 0.05  # no image falls; most do


def official(name: str, eps: float) -> AutoAttack:
    return AutoAttack(eps, version="custom", attacks=[name], steps=5, square_queries=40)


ATTACKS = {
    "pgd": lambda eps: SuiteEntry(PGD(eps, steps=7, restarts=3), ["ce_f", "cw_f"]),
    "until": lambda eps: SuiteEntry(PGD(eps, steps=9, restarts=2), until_broken=True),
    "eot": lambda eps: SuiteEntry(PGD(eps, steps=5), eot=3),
    "gama": lambda eps: SuiteEntry(GAMAPGD(eps, steps=6)),
    "apgd": lambda eps: SuiteEntry(official("apgd-ce", eps)),
    "adaptive": lambda eps: SuiteEntry(official("apgd-ce", eps), ["cw_f"]),
    "targeted": lambda eps: SuiteEntry(official("apgd-t", eps)),
    "malt": lambda eps: SuiteEntry(official("apgd-malt", eps)),
    "fab": lambda eps: SuiteEntry(official("fab", eps)),
    "fab-t": lambda eps: SuiteEntry(official("fab-t", eps)),
    "square": lambda eps: SuiteEntry(official("square", eps)),
    "l1": lambda eps: SuiteEntry(
        AutoAttack(eps, "l1", "custom", ["apgd-ce", "apgd-malt"], steps=4)
    ),
    "plus": lambda eps: SuiteEntry(AutoAttack(eps, version="plus", steps=3, square_queries=40)),
    "rays": lambda eps: SuiteEntry(DecisionBased(eps, queries=100)),
    "noise": lambda eps: SuiteEntry(GaussianNoise([0.1])),
}


@pytest.fixture
def victim() -> nn.Module:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 10))
    return Victim(net, 10).eval()


def images(victim: nn.Module, count: int = 40) -> dict[str, Tensor]:
    x = torch.rand(count, 3, 8, 8)
    return {"x": x, "y": victim(x).argmax(1), "index": torch.arange(count)}


def ran(victim, steps: list[Step], **settings) -> Outcomes:
    examples = images(victim)
    return run_steps(victim, examples, steps, seed=0, threat=Threat("linf", LARGE), **settings)


@pytest.mark.parametrize("name", ATTACKS)
def test_the_budget_of_a_step_is_what_it_needs_where_no_image_falls(victim, name) -> None:
    """And is not exceeded where some do.

    Beside it a chunk makes a few passes of single images, and the package checks a few more: 2 %.
    An image that falls is neither differentiated again nor asked for.
    """
    for eps in (SMALL, LARGE):
        steps = steps_of({name: ATTACKS[name](eps)}, victim, 10, 0)
        outcomes = ran(victim, steps)
        for step in steps:
            cost, right = outcomes.costs[step.key], int(outcomes.attacked[step.key].sum())
            for kind in ("forward", "backward"):
                least = 0.98 if eps == SMALL else 0.0
                expected = getattr(step.budget, kind) * right
                assert least * expected <= getattr(cost, kind) <= 1.02 * expected, (step.key, kind)


class Clocked(nn.Module):
    """Moves a clock by a millisecond for each image forwards and by three for each backwards."""

    now = 0.0

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        Clocked.now += 1e-3 * len(x)
        if x.requires_grad:
            x = x.view_as(x)
            x.register_hook(self.back)
        return self.net(x)

    def back(self, gradient: Tensor) -> None:
        Clocked.now += 3e-3 * len(gradient)


class Listener(Progress):
    def __init__(self) -> None:
        self.told = []

    def foresee(self, passes: int, seconds: float) -> None:
        self.told.append((passes, seconds, Clocked.now))


SUITE = ("pgd", "apgd", "square", "rays")


def test_passes_and_time_left_after_the_first_chunk_are_those_that_follow(
    victim, monkeypatch
) -> None:
    monkeypatch.setattr("common.evaluation.runner.time.perf_counter", lambda: Clocked.now)
    model, listener = Victim(Clocked(victim.net), 10).eval(), Listener()
    steps = steps_of({name: ATTACKS[name](SMALL) for name in SUITE}, model, 10, 0)
    outcomes = ran(model, steps, batch_size=10, progress=listener)
    passes, seconds, now = listener.told[0]
    costs = [sum(outcomes.costs[step.key][1:3]) for step in steps]
    assert passes == pytest.approx(sum(costs) - costs[0] / 4, rel=0.02)
    assert seconds == pytest.approx(listener.told[-1][2] - now, rel=0.02)
    assert listener.told[-1][:2] == (0, 0.0)


def test_what_is_left_shrinks_with_the_survivors(victim) -> None:
    listener = Listener()
    names = ("until", "targeted", "rays")
    suite = {name: ATTACKS[name](LARGE) for name in names}
    for entry in suite.values():
        entry.survivors_only = True
    outcomes = ran(victim, steps_of(suite, victim, 10, 0), progress=listener)
    passes = [told[0] for told in listener.told]
    assert passes == sorted(passes, reverse=True)
    rest = steps_of(suite, victim, 10, 0)[1:]  # the first has one chunk
    needed = sum(sum(outcomes.costs[step.key][1:3]) for step in rest)
    assert passes[0] > needed > passes[-1] == 0


def test_every_step_of_a_suite_with_an_audit_has_a_budget(victim) -> None:
    """Upper bounds; measurements in both precisions and large balls need less."""
    sizes = {"square_queries": 20, "random_samples": 10, "decision_queries": 30}
    audit = Audit(20, None, 3, 2, **sizes, transfer=victim.net)
    threat = Threat("linf", LARGE)
    steps = audit.steps(victim, threat, 10)
    outcomes = ran(victim, steps)
    for step in steps:
        count = int((outcomes.columns["clean"]["correct"]).sum()) if step.budget else 0
        assert count, step.key
        for measured, most in zip(outcomes.costs[step.key][1:3], step.budget, strict=True):
            assert measured <= 1.02 * most * 20 + 5, step.key


def test_processes_share_the_time_and_the_one_with_most_chunks_decides() -> None:
    def needs(processes: int) -> tuple[int, float] | None:
        forecast = Forecast(processes, batch_size=10)
        step = Step("a", "a", lambda *_: {}, {}, budget=Budget(10, 5))
        forecast.begin(Budget(2), [10, 10, 10, 10, 10], [(step, 50)])
        assert forecast.left() is None
        forecast.ran(10, Cost(0.02, 20, 0, 20))
        forecast.rates.add(Cost(0.4, 100, 100, 0))
        return forecast.left()

    passes, seconds = needs(1)
    assert passes == 40 * 2 + 50 * 15
    assert seconds == pytest.approx(0.001 * (80 + 500) + 0.003 * 250)
    passes, seconds = needs(2)
    assert passes == 30 * 2 + 50 * 15
    assert seconds == pytest.approx(0.001 * 40 + 3 / 5 * (0.001 * 500 + 0.003 * 250))


def test_seconds_of_passes_are_fitted_and_never_negative() -> None:
    rates = Rates()
    for forward, backward, seconds in ((100, 0, 5.0), (1000, 1000, 2.0), (2000, 1900, 4.0)):
        rates.add(Cost(seconds, forward, backward))  # the first chunk waited for something else
    assert rates.seconds(Budget(1, 0)) >= 0.0
    assert rates.seconds(Budget(1000, 1000)) == pytest.approx(2.0, rel=0.3)


def test_without_a_terminal_the_first_estimate_is_a_line_and_each_step_repeats_it(capsys) -> None:
    shown = ConsoleProgress(2)
    shown.begin(Step("a", "a", lambda *_: {}, {}), 10, 10)
    shown.advance(5, 9)
    shown.foresee(1_234_567, 14 * 60 + 5)
    shown.foresee(1_000_000, 3 * 3600 + 20 * 60)
    shown.end()
    first, line = capsys.readouterr().err.splitlines()
    assert first == left(1_234_567, 845)
    assert "1,200,000 " in first
    assert "14 min" in first
    assert "1,000,000 " in line
    assert "3 h 20 min" in line
