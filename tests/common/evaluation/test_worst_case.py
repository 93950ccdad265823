"""Worst cases on a linear classifier, whose robust accuracy is known exactly."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.attacks.autoattack import AutoAttack
from common.attacks.gama import GAMAPGD
from common.attacks.minimum_norm import CarliniWagner, DeepFool
from common.attacks.pgd import FGSM, MIM, PGD, FriendlyPGD
from common.data.subset import subset
from common.errors import ConfigurationError
from common.evaluation import Audit, Evaluation, SuiteEntry, evaluate

K = 4


@pytest.fixture
def model(linear) -> nn.Module:
    return linear().eval()


@pytest.fixture
def data(model) -> tuple[Tensor, Tensor]:
    """100 images away from the box's edges, sorted by class; a tenth of the labels are wrong."""
    generator = torch.Generator().manual_seed(1)
    x = 0.35 + 0.3 * torch.rand(100, 1, 8, 8, generator=generator)
    y = model(x).argmax(dim=1)
    y = torch.where(torch.rand(100, generator=generator) < 0.1, (y + 1) % K, y)
    order = y.argsort(stable=True)
    return x[order], y[order]


EPS = 0.02


def evaluated(model: nn.Module, data: Any, eps: float = EPS, **given: Any) -> Evaluation:
    """Under the suite's entries, or under one attack."""
    suite = given.pop("suite")
    suite = suite if isinstance(suite, dict) else {"it": SuiteEntry(suite)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return evaluate(model, data, suite, eps=eps, progress=False, batch_size=64, **given)


def limited(examples: int | None, **settings: Any) -> SuiteEntry:
    attack = PGD(EPS, EPS / 4, 20)
    return SuiteEntry(attack, ["ce_f", "cw_f"], examples=examples, **settings)


STRONG = limited(None)


# ----------------------------------------------------------------------------------- denominators


@pytest.mark.parametrize("sizes", [(60, 25), (25, 60), (None, 30), (1,)], ids=str)
def test_the_worst_case_is_exact_on_the_examples_that_met_every_attack(model, data, sizes) -> None:
    x, y = data
    suite = {f"pgd{i}": limited(size) for i, size in enumerate(sizes)}
    found = evaluated(model, data, suite=suite | {"fgsm": SuiteEntry(FGSM(EPS))})
    rows = subset(y, min(size or len(y) for size in sizes))
    truth = model.exact(x, y, EPS)[rows]
    assert found.robust_index.tolist() == rows.tolist()
    assert torch.equal(found.robust, truth)
    assert found.robust_acc == pytest.approx(truth.float().mean().item())
    assert found.result["sizes"].get("worst", len(y)) == len(rows)


def test_the_audit_alone_calls_nobody_robust_that_it_did_not_meet(model, data) -> None:
    x, y = data
    audit = Audit(20, None, 10, 2, square_queries=5, random_samples=5, decision_queries=20)
    found = evaluated(model, data, suite={}, audit=audit)
    rows = subset(y, 20)
    assert found.robust_index.tolist() == rows.tolist()
    assert torch.equal(found.robust, model.exact(x, y, EPS)[rows])
    alone = evaluated(model, data, suite={"pgd": STRONG}).robust
    beside = evaluated(model, data, suite={"pgd": STRONG}, audit=audit)
    assert torch.equal(beside.robust, alone), "it found no more than the suite"


def test_what_an_audit_finds_beyond_the_suite_enters(linear, data) -> None:
    """Cross-entropy of nearly equal probabilities climbs towards all other classes at once."""
    model = linear(0.01).eval()
    x, y = data
    audit = Audit(40, ["cw_f"], 10, 2, 5, random_samples=5, decision_queries=20)
    alone = evaluated(model, data, suite=FGSM(EPS))
    rows, truth = subset(y, 40), model.exact(x, y, EPS)
    assert (alone.robust[rows] & ~truth[rows]).any(), "the suite has to miss something"
    found = evaluated(model, data, suite=FGSM(EPS), audit=audit)
    assert found.robust_index.tolist() == rows.tolist()
    assert not (found.robust & ~alone.robust[rows]).any()
    assert found.robust.sum() < alone.robust[rows].sum()


def test_a_cumulative_figure_is_about_what_earlier_attacks_met(model, data) -> None:
    suite = {"first": limited(50), "rest": limited(None, survivors_only=True)}
    found = evaluated(model, data, suite=suite)
    assert found.result["sizes"]["rest"] == 50
    assert found.metrics["rest"] == found.robust_acc


def test_examples_of_sorted_data_are_of_all_classes_and_known_by_their_position(
    model, data
) -> None:
    x, y = data
    found = evaluated(model, data, suite={"pgd": STRONG}, examples=60)
    rows = subset(y, 60)
    truth = model.exact(x, y, EPS)
    assert found.robust_acc == pytest.approx(truth[rows].float().mean().item())
    assert sorted(set(y[rows].tolist())) == [0, 1, 2, 3]
    assert found.warnings == []
    part = evaluated(model, data, suite={"pgd": limited(20)}, examples=60)
    assert len(part.robust_index) == 20
    assert set(part.robust_index.tolist()) <= set(rows.tolist())
    assert torch.equal(part.robust, truth[part.robust_index])


def test_fewer_examples_than_classes_are_told_and_drawn(model, data, tmp_path) -> None:
    with pytest.warns(UserWarning, match="2 examples taken of 100 have none of 2 of the 4 classes"):
        found = evaluate(
            model, data, {"pgd": STRONG}, eps=0.1, examples=2, progress=False, output=tmp_path
        )
    assert "examples" in found.pictures
    assert "have none of 2 of the 4 classes" in str(found)
    assert "have none of 2 of the 4 classes" in found.result["remarks"][0]
    entry = evaluated(model, data, suite={"pgd": limited(1)})
    assert "have none of 3 of the 4 classes" in entry.result["remarks"][0]


# ------------------------------------------------------------------------------------ weak suites


WEAK = {
    "no steps": (PGD(EPS, steps=0), "all its steps together, 0, are less than its radius"),
    "tiny steps": (PGD(EPS, 1e-6, 20), "all its steps together, 2e-05"),
    "steps that do not get there": (PGD(EPS, EPS / 40, 20, start="zero"), "0.01, are less"),
    "a small radius": (PGD(EPS / 20, steps=20), "its radius 0.001 is less than 0.02"),
    "noise in place of steps": (
        FriendlyPGD(EPS, 0.0, 20, noise=EPS, start="zero"),
        "all its steps together, 0,",
    ),
}


@pytest.mark.parametrize("name", WEAK)
def test_a_weak_suite_has_no_worst_case(model, data, name: str) -> None:
    attack, reason = WEAK[name]
    found = evaluated(model, data, suite=attack)
    assert "worst" not in found.metrics
    assert reason in str(found)
    for ask in ("robust_acc", "robust", "robust_index"):
        with pytest.raises(ConfigurationError, match="there is no worst case: no attack used the"):
            getattr(found, ask)


def test_weak_attacks_do_not_weaken_a_strong_one(model, data) -> None:
    weak = {f"weak{i}": SuiteEntry(attack) for i, (attack, _) in enumerate(WEAK.values())}
    found = evaluated(model, data, suite=weak | {"strong": STRONG})
    assert torch.equal(found.robust, model.exact(*data, EPS))
    assert found.warnings == []


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"eps": 10 * EPS}, r"its radius 0\.02 is less than 0\.2"),
        ({"eps": EPS / 10}, r"no attack kept to the threat model \(there are"),
        ({"norm": "l2"}, "no attack kept to the threat model"),
    ],
)
def test_a_threat_that_no_attack_has_gives_no_worst_case(model, data, given, match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        evaluated(model, data, suite={"pgd": STRONG}, **given).robust_acc  # noqa: B018


@pytest.mark.parametrize(
    "entry",
    [
        SuiteEntry(PGD(EPS, steps=5)),
        SuiteEntry(PGD(EPS, steps=5, start="zero"), until_broken=True),
        SuiteEntry(GAMAPGD(EPS, steps=5)),
        SuiteEntry(DeepFool(EPS, "linf")),
        SuiteEntry(AutoAttack(EPS, version="custom", attacks=["apgd-ce"], steps=5)),
    ],
    ids=lambda entry: repr(entry.attack),
)
def test_without_a_gradient_an_attack_goes_on_by_other_means(linear, around, data, entry) -> None:
    """The same decisions, and a gradient that is exactly zero everywhere."""
    model = around(lambda m, x: (m.net(x) - m.net(x).detach()) * 0.0 + m.net(x).detach())
    data = [part[::4] for part in data]
    least = linear().exact(*data, EPS).float().mean()
    found = evaluated(model, data, suite={"it": entry})
    assert least <= found.robust_acc <= least + 0.04
    assert "gradients vanish" in " ".join(str(found).split())


@pytest.mark.parametrize(
    "attack",
    [
        PGD(EPS, EPS / 4, 5, start="zero"),
        MIM(EPS, steps=10),
        FriendlyPGD(EPS, EPS / 4, 10),
        GAMAPGD(EPS, steps=10),
        DeepFool(EPS, "linf"),
        DeepFool(EPS, "linf", clip=True),
        AutoAttack(EPS, version="custom", attacks=["apgd-ce", "fab-t"], steps=5),
        AutoAttack(EPS, version="custom", attacks=["square"], square_queries=50),
        PGD(0.15, steps=20, norm="l2"),
        FGSM(0.15, norm="l2"),
        CarliniWagner(0.15, steps=20, binary_search_steps=3),
        PGD(0.3, steps=20, norm="l1"),
        FGSM(0.3, norm="l1"),
    ],
    ids=repr,
)
def test_honest_attacks_have_a_worst_case(model, data, attack) -> None:
    found = evaluated(model, data, attack.eps, suite=attack, norm=attack.norm)
    assert 0.0 < found.robust_acc < found.clean_acc
    assert found.robust.float().mean().item() == pytest.approx(found.robust_acc)
    assert found.robust_index.tolist() == list(range(len(data[1])))
    if attack.norm != "l1":
        assert not (model.exact(*data, attack.eps, attack.norm) & ~found.robust).any()


def test_a_radius_beyond_the_box_is_used_as_far_as_the_box_goes(model, data) -> None:
    for norm, eps in (("linf", 1.0), ("l2", 50.0)):
        suite = {"pgd": SuiteEntry(PGD(eps, steps=10, norm=norm), ["cw_f"])}
        assert evaluated(model, data, eps, suite=suite, norm=norm).robust_acc == 0.0
    faithful = nn.Sequential(nn.Flatten(), nn.Linear(64, 4)).eval()
    faithful[1].weight.data.zero_()[0] = 1e-3
    faithful[1].bias.data = torch.tensor([9.0, 0.0, 0.0, 0.0])  # class 0 for any image
    data = torch.rand(20, 1, 8, 8), torch.zeros(20).long()
    assert evaluated(faithful, data, 50.0, suite=suite, norm="l2").robust_acc == 1.0


def test_what_breaks_everybody_early_is_evidence(model, data) -> None:
    suite = {
        "first": SuiteEntry(PGD(0.3, steps=20), ["cw_f"], until_broken=True),
        "nothing left": SuiteEntry(PGD(0.3, steps=20), survivors_only=True),
    }
    found = evaluated(model, data, 0.3, suite=suite)
    assert found.robust_acc == 0.0
    assert found.warnings == []


def test_nobody_right_without_an_attack_is_a_worst_case_of_0(model, data) -> None:
    wrong = (model(data[0]).argmax(dim=1) + 1) % K
    found = evaluated(model, (data[0], wrong), suite=PGD(EPS, steps=0))
    assert found.robust_acc == found.clean_acc == 0.0


def test_saturated_scores_are_no_evidence_for_the_cross_entropy(linear, data) -> None:
    model = linear(scale=1e4).eval()
    data = [part[::3] for part in data]
    exact = linear().exact(*data, EPS)
    pgd = PGD(EPS, EPS / 4, 20, start="zero")
    found = evaluated(model, data, suite=pgd)
    assert found.robust_acc <= exact.float().mean() + 0.02
    assert found.result["attacks"]["it/ce_f"]["unmoved"] > 0
    suite = {"it": SuiteEntry(pgd, ["ce_f", "cw_f"])}
    assert torch.equal(evaluated(model, data, suite=suite).robust, exact)
