"""The official AutoAttack one attack at a time, and its Square with our additions."""

import logging
import math
import sys
import warnings
from dataclasses import dataclass
from functools import partial

import pyautoattack
import pytest
import torch
from torch import Tensor, nn

from common.attacks.autoattack import AutoAttack
from common.attacks.losses import cross_entropy, margin
from common.errors import ConfigurationError
from common.evaluation import SuiteEntry
from common.evaluation.models import Victim
from common.evaluation.runner import run_steps
from common.evaluation.suite import steps_of

STANDARD = ["apgd-ce", "apgd-t", "fab-t", "square"]
STEPS, QUERIES = 5, 20


class Task:
    """A smooth random network whose predictions differ in how hard they are to change."""

    def __init__(self, classes: int = 10, n: int = 16) -> None:
        torch.manual_seed(0)
        self.classes = classes
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(256, classes),
        ).eval()
        self.x = torch.rand(n, 1, 8, 8)
        self.y = self.net(self.x).argmax(1)
        self.y[:2] = (self.y[:2] + 1) % classes  # wrong before any attack


def eps_for(norm: str) -> float:
    return {"linf": 0.02, "l2": 0.12, "l1": 0.8}[norm]


def small(norm: str = "linf", **settings) -> AutoAttack:
    settings = {"square_queries": QUERIES, "steps": STEPS, **settings}
    return AutoAttack(eps_for(norm), norm, **settings)


@dataclass
class Outcome:
    """Verdicts attack by attack, each over the examples that all before it left correct."""

    x_adv: Tensor
    clean: Tensor
    correct: dict[str, Tensor]

    @property
    def robust(self) -> Tensor:
        return list(self.correct.values())[-1]


def run(attack: AutoAttack, task: Task, seed: int = 0, **steps) -> Outcome:
    """All attacks of the version, as the package goes through them."""
    x, y = task.x, task.y
    outcome = Outcome(x.clone(), task.net(x).argmax(1) == y, {})
    correct = outcome.clean.clone()
    for name in attack.planned(task.classes):
        for rows in correct.nonzero().squeeze(1).split(attack.batch_size or len(x)):
            if len(rows) > 0:
                x_new, holds = attack.step(name, task.net, x[rows], y[rows], seed, **steps)
                correct[rows] = holds
                outcome.x_adv[rows[~holds]] = x_new[~holds]
        outcome.correct[name] = correct.clone()
    return outcome


def official_run(task: Task, norm: str, version: str, seed: int) -> tuple[Tensor, Tensor]:
    """The package by itself, all attacks in one call."""
    ball = {"norm": {"linf": "Linf", "l2": "L2", "l1": "L1"}[norm], "eps": eps_for(norm)}
    attack = pyautoattack.AutoAttack(task.net, **ball, version=version, seed=seed, device="cpu")
    attack.square.n_queries = QUERIES
    attack.fab.n_iter = STEPS
    settings = vars(pyautoattack.autopgd_base.APGDAttack(None, n_iter=STEPS, **ball))
    for apgd in (attack.apgd, attack.apgd_targeted):
        for key in ("n_iter", "n_iter_orig", "n_iter_2", "n_iter_min", "size_decr"):
            setattr(apgd, key, settings[key])
    for targeted in (attack.apgd_targeted, attack.fab):
        targeted.n_target_classes = min(targeted.n_target_classes, task.classes - 1)
    x_adv, y_adv = attack.run_standard_evaluation(task.x, task.y, batch_size=len(task.x))
    return x_adv, y_adv == task.y


@pytest.mark.parametrize(
    ("norm", "version", "classes"),
    [
        ("linf", "standard", 10),
        ("linf", "standard", 4),
        ("l2", "standard", 10),
        ("l1", "standard", 10),
        ("linf", "plus", 5),
        ("linf", "rand", 5),
    ],
)
def test_verdicts_equal_the_package_run_by_itself(norm, version, classes):
    task = Task(classes)
    x_adv, correct = official_run(task, norm, version, seed=3)
    outcome = run(small(norm, version=version), task, seed=3)
    assert torch.equal(outcome.robust, correct)
    assert 0 < correct.sum() < outcome.clean.sum()  # otherwise nothing was tested
    torch.testing.assert_close(outcome.x_adv, x_adv, rtol=0, atol=1e-6)


def check(outcome: Outcome, task: Task) -> None:
    """What must hold of any outcome in linf."""
    before = outcome.clean
    for verdict in outcome.correct.values():
        assert verdict.dtype == torch.bool
        assert not (verdict & ~before).any()  # nothing recovers
        before = verdict
    assert (outcome.x_adv - task.x).abs().max() <= eps_for("linf") + 1e-6
    assert 0 <= outcome.x_adv.min() <= outcome.x_adv.max() <= 1
    fell = outcome.clean & ~outcome.robust
    assert (task.net(outcome.x_adv[fell]).argmax(1) != task.y[fell]).all()
    assert torch.equal(outcome.x_adv[~fell], task.x[~fell])


@pytest.mark.parametrize(("classes", "left_out"), [(4, []), (3, ["apgd-t"]), (2, ["apgd-t"])])
def test_few_classes_leave_out_what_cannot_run(classes, left_out, caplog):
    task = Task(classes)
    names = [name for name in STANDARD if name not in left_out]
    assert small().planned(classes) == names
    steps = steps_of({"aa": SuiteEntry(small())}, Victim(task.net, classes), classes, seed=0)
    assert [step.key for step in steps] == [f"aa/{name}" for name in names]
    warned = f"leaves out apgd-t: its loss needs more than {classes} classes"
    assert (warned in caplog.text) == bool(left_out)


def test_in_a_suite_each_attack_gets_what_those_before_left(monkeypatch):
    task, met, plain = Task(), {}, AutoAttack.step

    def recorded(self, name, predict, x, *rest, **settings):
        met.setdefault(name, len(x))
        return plain(self, name, predict, x, *rest, **settings)

    monkeypatch.setattr(AutoAttack, "step", recorded)
    model = Victim(task.net, 10)
    examples = {"x": task.x, "y": task.y, "index": torch.arange(len(task.x))}
    steps = steps_of({"aa": SuiteEntry(small())}, model, 10, seed=3)
    correct = run_steps(model, examples, steps, seed=0).correct.values()
    left = [int(verdict.sum()) for verdict in correct]
    assert list(met) == STANDARD
    assert list(met.values()) == left[:-1]
    assert left[-1] < left[1] < left[0] == 14


@pytest.mark.parametrize("name", STANDARD)
def test_a_batch_may_be_empty_or_one_example(name):
    task = Task()
    for n in (0, 1):
        x_adv, correct = small(steps=2).step(name, task.net, task.x[5 : 5 + n], task.y[5 : 5 + n])
        assert x_adv.shape == (n, 1, 8, 8)
        assert (correct.shape, correct.dtype) == ((n,), torch.bool)
    task, attack = Task(2), small(version="custom", attacks=["apgd-dlr", "apgd-t"])
    with pytest.raises(ConfigurationError, match="cannot run with 2 classes"):
        attack.step("apgd-t", task.net, task.x, task.y)


def test_suspicious_networks_are_reported_and_nothing_is_left_behind():
    task, logger = Task(n=12), logging.getLogger("auto-attack")

    def optimised(x: Tensor) -> Tensor:
        with torch.enable_grad():
            inner = x.detach().requires_grad_()
            torch.autograd.grad(task.net(inner).sum(), inner)
        return task.net(x)

    def state() -> list:
        return [sys.gettrace(), logger.level, logger.propagate, *logger.handlers, *logger.filters]

    suspicious = {
        "probability distribution": lambda x: task.net(x).softmax(1),
        "randomized": lambda x: task.net(x) + 0.1 * torch.rand(len(x), 10),
        "dynamic": optimised,
        "": task.net,
    }
    usual = sys.gettrace()
    sys.settrace(lambda frame, event, argument: None)
    before = state()
    try:
        for finding, predict in suspicious.items():
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                small(steps=1).step("apgd-ce", predict, task.x, task.y)
            assert finding in " ".join(str(warning.message) for warning in caught)
            assert bool(caught) is bool(finding)
        assert state() == before
    finally:
        sys.settrace(usual)


# Steered by another loss


@pytest.mark.parametrize(("name", "loss"), [("apgd-ce", cross_entropy), ("square", margin)])
def test_steering_changes_the_path_and_not_the_judgement(name, loss):
    """The official loss gives the official attack; one that pulls away weakens it."""
    task = Task()
    attack = small(version="custom", attacks=[name], apgd_restarts=2, square_queries=100)

    def steered(x: Tensor, y: Tensor, sign: int = 1) -> tuple[Tensor, Tensor]:
        logits = task.net(x)
        return logits, sign * loss(logits, y)

    plain, same = run(attack, task), run(attack, task, steered=steered)
    away = run(attack, task, steered=partial(steered, sign=-10))
    assert torch.equal(same.robust, plain.robust)
    torch.testing.assert_close(same.x_adv, plain.x_adv, rtol=0, atol=1e-6)
    check(away, task)
    assert plain.robust.sum() < away.robust.sum()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("is_steered", [False, True])
def test_square_skips_what_it_has_seen_and_finds_the_same(norm, is_steered):
    task = Task(n=30)
    x, y = task.x[2:], task.y[2:]
    attack = small(norm, square_queries=300 if norm == "linf" else 40)
    found, evaluated = {}, {}

    def predict(z: Tensor) -> Tensor:
        evaluated[skips] += len(z)
        return task.net(z)

    def steered(z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = predict(z)
        return logits, cross_entropy(logits, labels)

    for skips in (False, True):
        evaluated[skips] = 0
        found[skips] = attack.step(
            "square", predict, x, y, 5, steered if is_steered else None, skips_repeats=skips
        )
    assert torch.equal(found[True][1], found[False][1])
    torch.testing.assert_close(found[True][0], found[False][0], rtol=0, atol=1e-6)
    assert 2 < found[True][1].sum() < 28  # otherwise nothing was tested
    if norm == "linf":  # in the others no square leaves an image as it is
        assert evaluated[True] < 0.95 * evaluated[False]
    else:
        assert evaluated[True] <= evaluated[False]


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize(
    "shape",
    [(1, 12, 12), (2, 18, 18), (1, 20, 7), (3, 4, 4), (1, 6, 60), (1, 1, 9)],
    ids=str,
)
def test_square_takes_images_of_any_shape(norm, shape) -> None:
    torch.manual_seed(0)
    x = 0.3 + 0.4 * torch.rand(10, *shape)
    weight = torch.randn(math.prod(shape), 3) / math.prod(shape) ** 0.5

    def predict(x: Tensor) -> Tensor:
        return (x - 0.5).flatten(1) @ weight

    y = predict(x).argmax(1)
    eps = {"linf": 0.05, "l2": 0.3, "l1": 2.0}[norm]
    attack = AutoAttack(eps, norm, "custom", ["square"], square_queries=60)
    x_adv, correct = attack.step("square", predict, x, y)
    order = {"linf": math.inf, "l2": 2, "l1": 1}[norm]
    assert torch.linalg.vector_norm((x_adv - x).flatten(1), order, 1).max() <= eps * (1 + 1e-5)
    assert 0.0 <= x_adv.min() <= x_adv.max() <= 1.0
    assert torch.equal(predict(x_adv).argmax(1) == y, correct)
    assert not correct.all()


def test_square_on_any_shape_is_about_as_strong_as_the_package(monkeypatch) -> None:
    task = Task(n=60)
    y = task.net(task.x).argmax(1)
    attack = AutoAttack(0.7, "l2", "custom", ["square"], square_queries=200)
    official = attack.step("square", task.net, task.x, y)[1].sum()
    monkeypatch.setattr("common.attacks.square._is_tiled", lambda *_: False)
    ours = attack.step("square", task.net, task.x, y)[1].sum()
    assert 0 < official < 60
    assert abs(int(ours) - int(official)) <= 6


def test_steering_helps_where_the_logits_hide_their_gradient():
    """Rounded logits have no gradient; the loss of the unrounded ones has."""
    task = Task()
    smooth = task.net
    task.net = lambda x: (50 * smooth(x)).round()
    task.y = task.net(task.x).argmax(1)
    attack = small(version="custom", attacks=["apgd-ce"])
    seeing = run(attack, task, steered=lambda x, y: (task.net(x), cross_entropy(smooth(x), y)))
    assert seeing.robust.sum() < run(attack, task).robust.sum()
