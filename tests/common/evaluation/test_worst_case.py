"""Worst cases on a linear classifier, whose robust accuracy is known exactly."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.attacks.autoattack import AutoAttack
from common.attacks.gama import GAMAPGD
from common.attacks.losses import hinge_margin
from common.attacks.minimum_norm import CarliniWagner, DeepFool
from common.attacks.pgd import FGSM, MIM, PGD, FriendlyPGD
from common.data.subset import subset
from common.errors import ConfigurationError
from common.evaluation import Audit, Evaluation, SuiteEntry, Transfer, evaluate

K = 4


class Rounded(nn.Module):
    """The same decisions, and a gradient that is exactly zero everywhere."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        z = self.net(x)
        return (z - z.detach()) * 0.0 + z.detach()


@pytest.fixture
def model(linear) -> nn.Module:
    return linear().eval()


@pytest.fixture
def data(model) -> tuple[Tensor, Tensor]:
    """200 images away from the box's edges, sorted by class; a tenth of the labels are wrong."""
    generator = torch.Generator().manual_seed(1)
    x = 0.35 + 0.3 * torch.rand(200, 1, 8, 8, generator=generator)
    y = model(x).argmax(dim=1)
    y = torch.where(torch.rand(200, generator=generator) < 0.1, (y + 1) % K, y)
    order = y.argsort(stable=True)
    return x[order], y[order]


EPS = 0.02


def evaluated(model: nn.Module, data: Any, eps: float = EPS, **given: Any) -> Evaluation:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = {"eps": eps, "progress": False, "batch_size": 64} | given
        suite = settings.pop("suite")
        return evaluate(model, data, suite, **settings)


STRONG = SuiteEntry(PGD(EPS, EPS / 4, 20), ["ce_f", "cw_f"])


def limited(examples: int | None) -> SuiteEntry:
    return SuiteEntry(PGD(EPS, EPS / 4, 20), ["ce_f", "cw_f"], examples=examples)


# ----------------------------------------------------------------------------------- denominators


@pytest.mark.parametrize(
    "sizes", [(60,), (60, 25), (25, 60), (None, 30), (1,), (None, 1), (None,)], ids=str
)
def test_the_worst_case_is_exact_on_the_examples_that_met_every_attack(model, data, sizes) -> None:
    x, y = data
    suite = {f"pgd{i}": limited(size) for i, size in enumerate(sizes)}
    suite["fgsm"] = SuiteEntry(FGSM(EPS))
    found = evaluated(model, data, suite=suite)
    rows = subset(y, min(size or len(y) for size in sizes))
    truth = model.exact(x, y, EPS)[rows]
    assert found.robust_index.tolist() == rows.tolist()
    assert torch.equal(found.robust, truth)
    assert found.robust_acc == pytest.approx(truth.float().mean().item())
    assert found.result["sizes"].get("worst", len(y)) == len(rows)


def test_the_audit_alone_calls_nobody_robust_that_it_did_not_meet(model, data) -> None:
    x, y = data
    audit = Audit(40, None, 10, 2, square_queries=10, random_samples=5, decision_queries=50)
    found = evaluated(model, data, suite={}, audit=audit)
    rows = subset(y, 40)
    assert found.robust_index.tolist() == rows.tolist()
    assert torch.equal(found.robust, model.exact(x, y, EPS)[rows])
    beside = evaluated(model, data, suite={"pgd": STRONG}, audit=audit)
    assert torch.equal(beside.robust, model.exact(x, y, EPS)), "it found no more than the suite"


def test_what_an_audit_finds_beyond_the_suite_enters(linear, data) -> None:
    """Cross-entropy of nearly equal probabilities climbs towards all other classes at once."""
    model = linear(0.01).eval()
    x, y = data
    audit = Audit(80, ["cw_f"], 10, 2, 10, random_samples=5, decision_queries=50)
    alone = evaluated(model, data, suite={"fgsm": SuiteEntry(FGSM(EPS))})
    rows, truth = subset(y, 80), model.exact(x, y, EPS)
    assert (alone.robust[rows] & ~truth[rows]).any(), "the suite has to miss something"
    found = evaluated(model, data, suite={"fgsm": SuiteEntry(FGSM(EPS))}, audit=audit)
    assert found.robust_index.tolist() == rows.tolist()
    assert not (found.robust & ~alone.robust[rows]).any()
    assert found.robust.sum() < alone.robust[rows].sum()


def test_a_cumulative_figure_is_about_what_earlier_attacks_met(model, data) -> None:
    suite = {
        "first": limited(50),
        "rest": SuiteEntry(PGD(EPS, EPS / 4, 20), ["cw_f"], survivors_only=True),
    }
    found = evaluated(model, data, suite=suite)
    assert found.result["sizes"]["rest"] == 50
    assert found.metrics["rest"] == found.robust_acc


def test_positions_are_those_in_the_data(model, data) -> None:
    x, y = data
    found = evaluated(model, data, suite={"pgd": limited(20)}, examples=80)
    assert set(found.robust_index.tolist()) <= set(subset(y, 80).tolist())
    assert torch.equal(found.robust, model.exact(x, y, EPS)[found.robust_index])


# ---------------------------------------------------------------------------------------- subsets


def test_examples_of_sorted_data_are_of_all_classes(model, data) -> None:
    x, y = data
    found = evaluated(model, data, suite={"pgd": STRONG}, examples=60)
    rows = subset(y, 60)
    assert found.robust_acc == pytest.approx(model.exact(x, y, EPS)[rows].float().mean().item())
    assert sorted(set(y[rows].tolist())) == [0, 1, 2, 3]
    assert found.warnings == []


def test_fewer_examples_than_classes_are_told(model, data) -> None:
    with pytest.warns(UserWarning, match="2 examples taken of 200 have none of 2 of the 4 classes"):
        found = evaluate(model, data, {"pgd": STRONG}, eps=EPS, examples=2, progress=False)
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
    found = evaluated(model, data, suite={"weak": SuiteEntry(attack)})
    assert "worst" not in found.metrics
    assert reason in str(found)
    for ask in ("robust_acc", "robust", "robust_index"):
        with pytest.raises(ConfigurationError, match="there is no worst case: no attack used the"):
            getattr(found, ask)
    both = evaluated(model, data, suite={"weak": SuiteEntry(attack), "strong": STRONG})
    assert torch.equal(both.robust, model.exact(*data, EPS))
    assert both.warnings == []


def test_a_threat_beyond_every_attack_has_no_worst_case(model, data) -> None:
    found = evaluated(model, data, suite={"pgd": STRONG}, eps=10 * EPS)
    with pytest.raises(ConfigurationError, match=r"its radius 0\.02 is less than 0\.2"):
        found.robust_acc  # noqa: B018
    smaller = evaluated(model, data, suite={"pgd": STRONG}, eps=EPS / 10)
    with pytest.raises(ConfigurationError, match=r"no attack kept to the threat model \(there are"):
        smaller.robust_acc  # noqa: B018
    other = evaluated(model, data, suite={"pgd": STRONG}, norm="l2")
    with pytest.raises(ConfigurationError, match="no attack kept to the threat model"):
        other.robust_acc  # noqa: B018


@pytest.mark.parametrize(
    "attack",
    [
        PGD(EPS, EPS / 4, 20),
        PGD(EPS, EPS / 4, 20, start="zero"),
        FGSM(EPS),
        GAMAPGD(EPS, steps=10),
        DeepFool(EPS, "linf"),
        AutoAttack(EPS, version="custom", attacks=["apgd-ce"], steps=5),
    ],
    ids=lambda attack: f"{type(attack).__name__} {getattr(attack, 'start', '')}",
)
def test_without_a_gradient_an_attack_goes_on_by_other_means(linear, data, attack) -> None:
    model = Rounded(linear()).eval()
    data = [part[::4] for part in data]
    least = linear().exact(*data, EPS).float().mean()
    for until_broken in (False, True) if type(attack) is PGD else (False,):
        entry = SuiteEntry(attack, until_broken=until_broken)
        found = evaluated(model, data, suite={"it": entry})
        assert least <= found.robust_acc <= least + 0.04
        assert "gradients vanish" in " ".join(str(found).split())


HONEST = {
    "fgsm": FGSM(EPS),
    "pgd": PGD(EPS, steps=5),
    "pgd from x": PGD(EPS, EPS / 4, 5, start="zero"),
    "mim": MIM(EPS, steps=10),
    "friendly": FriendlyPGD(EPS, EPS / 4, 10),
    "gama": GAMAPGD(EPS, steps=10),
    "deepfool": DeepFool(EPS, "linf"),
    "clipped deepfool": DeepFool(EPS, "linf", clip=True),
    "autoattack": AutoAttack(EPS, version="custom", attacks=["apgd-ce", "fab-t"], steps=5),
    "square": AutoAttack(EPS, version="custom", attacks=["square"], square_queries=50),
}


@pytest.mark.parametrize("name", HONEST)
def test_honest_attacks_have_a_worst_case(linear, model, data, name: str) -> None:
    attack = HONEST[name]
    if name == "transfer":
        attack = Transfer(attack, linear(scale=2.0).eval())
    found = evaluated(model, data, suite={"it": SuiteEntry(attack)})
    assert found.robust_acc >= model.exact(*data, EPS).float().mean()
    assert found.robust.float().mean().item() == pytest.approx(found.robust_acc)
    assert len(found.robust_index) == len(data[1])


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_other_norms_have_one_too(model, data, norm) -> None:
    eps = {"l2": 0.15, "l1": 0.3}[norm]
    for attack in (PGD(eps, steps=20, norm=norm), FGSM(eps, norm=norm)):
        found = evaluated(model, data, suite={"it": SuiteEntry(attack)}, eps=eps, norm=norm)
        assert 0.0 < found.robust_acc < found.clean_acc
    if norm == "l2":
        attack = CarliniWagner(eps, steps=40, binary_search_steps=3)
        found = evaluated(model, data, suite={"it": SuiteEntry(attack)}, eps=eps, norm=norm)
        assert 0.0 < found.robust_acc < found.clean_acc


def test_a_radius_beyond_the_box_is_used_as_far_as_the_box_goes(model, data) -> None:
    for norm, eps in (("linf", 1.0), ("l2", 50.0)):
        suite = {"pgd": SuiteEntry(PGD(eps, steps=10, norm=norm), ["cw_f"])}
        assert evaluated(model, data, suite=suite, eps=eps, norm=norm).robust_acc == 0.0
    faithful = nn.Sequential(nn.Flatten(), nn.Linear(64, 4)).eval()
    faithful[1].weight.data.zero_()[0] = 1e-3
    faithful[1].bias.data = torch.tensor([9.0, 0.0, 0.0, 0.0])  # class 0 for any image
    x = torch.rand(20, 1, 8, 8)
    suite = {"pgd": SuiteEntry(PGD(50.0, steps=10, norm="l2"), ["cw_f"])}
    found = evaluated(faithful, (x, torch.zeros(20).long()), suite=suite, eps=50.0, norm="l2")
    assert found.robust_acc == 1.0


def test_what_breaks_everybody_early_is_evidence(model, data) -> None:
    suite = {
        "first": SuiteEntry(PGD(0.3, steps=20), ["cw_f"], until_broken=True),
        "nothing left": SuiteEntry(PGD(0.3, steps=20), survivors_only=True),
    }
    found = evaluated(model, data, suite=suite, eps=0.3)
    assert found.robust_acc == 0.0
    assert found.warnings == []


def test_nobody_right_without_an_attack_is_a_worst_case_of_0(model, data) -> None:
    x, _ = data
    wrong = (model(x).argmax(dim=1) + 1) % K
    found = evaluated(model, (x, wrong), suite={"none": SuiteEntry(PGD(EPS, steps=0))})
    assert found.robust_acc == found.clean_acc == 0.0


def test_saturated_scores_are_no_evidence_for_the_cross_entropy(linear, data) -> None:
    model = linear(scale=1e4).eval()
    assert hinge_margin(model(data[0]), data[1]).isfinite().all()
    found = evaluated(model, data, suite={"ce": SuiteEntry(PGD(EPS, EPS / 4, 20, start="zero"))})
    assert found.robust_acc <= linear().exact(*data, EPS).float().mean() + 0.02
    assert found.result["attacks"]["ce/ce_f"]["unmoved"] > 0
    suite = {"it": SuiteEntry(PGD(EPS, EPS / 4, 20, start="zero"), ["ce_f", "cw_f"])}
    assert torch.equal(evaluated(model, data, suite=suite).robust, linear().exact(*data, EPS))
