"""Verdicts either way, W-Robust, and the whole analysis on small runs."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from common.analysis.report import Found
from common.attacks import pgd
from common.errors import ConfigurationError
from common.results.lines import Line
from common.results.outcomes import checkpoint_entry
from common.results.reference import Metric
from paper_awnet import measures
from paper_awnet.analysis import (
    ANALYSIS,
    claims,
    plane,
    roles_of,
    w_robust,
    without_audit,
    without_tensors,
)
from paper_awnet.figures import trade_off
from paper_awnet.measures import Filters, compare_weights, curves_of
from paper_awnet.method import Router
from paper_awnet.module import AWNetClassifier
from paper_awnet.networks import AWNet, DigitsStudent
from paper_awnet.objectives import HybridCE

PGD = "pgd20/ce_f"


def test_weighted_robust_accuracy() -> None:
    """Invariant 14, and the tables' form of it."""
    assert w_robust({"clean_acc": 0.7, PGD: 0.7}, PGD) == pytest.approx(0.7)
    found = {"clean_acc": 0.9, PGD: 0.4}
    assert w_robust(found, PGD, 1.0) == 0.9
    assert w_robust(found, PGD, 0.0) == 0.4
    assert w_robust({**found, PGD: 0.5}, PGD) > w_robust(found, PGD)
    assert w_robust({**found, "clean_acc": 0.95}, PGD) > w_robust(found, PGD)
    column = Metric("w", "W", mean_of={"clean_acc": 0.5, PGD: 0.5})
    assert column.of(found) == pytest.approx(w_robust(found, PGD))
    with pytest.raises(ConfigurationError, match=r"lies in \[0, 1\], got 1.5"):
        w_robust(found, PGD, 1.5)


def varied(entry, seed: int):
    """The numbers of an entry, another little power in every seed: differences and ratios vary."""
    if isinstance(entry, dict):
        return {key: varied(value, seed) for key, value in entry.items()}
    return entry ** (1 + 1e-4 * seed)


def verdicts(good: bool, seeds=(0, 1)) -> dict[str, str]:
    accuracies = {"static_mtard": 0.2, "mixbn_mtard": 0.3, "dynamic_mtard": 0.21}
    accuracies |= {"awnet_mtard": 0.3 if good else 0.22}
    metrics = {
        (name, seed): varied({"clean_acc": 0.98, PGD: value, "worst": value / 2}, seed)
        for name, value in accuracies.items()
        for seed in seeds
    }
    if not good:
        for seed in seeds:
            metrics["awnet_mtard", seed]["worst"] = varied(0.05, seed)
    examined = {
        "routing": {"clean": {"type_acc": 0.99}, "pgd": {"type_acc": 0.97 if good else 0.6}},
        "forced": {
            "clean": {"soft": 0.98, "clean": 0.98, "adv": 0.94 if good else 0.97},
            "pgd": {"soft": 0.3, "clean": 0.05 if good else 0.3, "adv": 0.3},
        },
        "omega_shift": 0.02 if good else 0.3,
        "omega_std": 0.01,
    }
    compared = dict.fromkeys(("further", "smaller_l1", "larger_kurtosis"), 8 if good else 3)
    reach = {"teacher_clean": 0.1, "teacher_robust": 0.3 if good else 0.05}
    found = Found("digits", "digits_", [0, 1], Path(), Path(), metrics=metrics)
    found.kept |= {
        "suite": metrics,
        "compared": {seed: varied(compared, seed) for seed in seeds},
        "examined": {seed: varied(examined, seed) for seed in seeds},
        "reach": {name: {s: varied(value, s) for s in seeds} for name, value in reach.items()},
    }
    return {one.id: one.verdict for one in claims(found)}


def test_verdicts_turn_out_either_way() -> None:
    good, bad = verdicts(True), verdicts(False)
    assert good.pop("C6b") == "contradicted", "half a point is not two"
    assert good.pop("C6c") == bad.pop("C6c") == "not run", "there is no detector's result"
    assert bad.pop("C6a") == good.pop("C6a") == "supported"
    bad.pop("C6b")
    assert set(good.values()) == {"supported"}
    assert set(bad.values()) == {"contradicted"}
    assert set(verdicts(True, seeds=(0,)).values()) == {"not run"}, "a seed is missing"


def test_an_audit_does_not_move_the_worst_case_to_its_own_images(pgd_outcomes) -> None:
    """It broke one image of ten that the suite left; the suite's worst case is on all 50."""
    outcomes = pgd_outcomes(30)
    among = torch.arange(50) < 10
    outcomes.attacked["audit_square"] = among
    outcomes.correct["audit_square"] = among & (torch.arange(50) > 0)
    outcomes.lines["audit_square"] = Line("audit_square", norm="linf", eps=0.3)
    entry = checkpoint_entry(outcomes)
    assert (entry["metrics"]["worst"], entry["sizes"]["worst"]) == (0.9, 10)
    suite = without_audit(entry)
    assert (suite["metrics"]["worst"], suite["sizes"]) == (0.6, {})


def test_weights_are_compared_with_the_next_seeds() -> None:
    w = torch.linspace(-1, 1, 72).reshape(4, 2, 3, 3)
    standard = {s: {"a": Filters(w * (1 + 0.01 * s), w * (1 + 0.01 * s))} for s in (0, 1)}
    robust = {s: {"a": Filters(w / 2, w / 2)} for s in (0, 1)}
    compared = compare_weights(standard, robust, [0, 1])
    assert set(compared) == {0, 1}
    for entry in compared.values():
        assert (entry["layers"], entry["further"], entry["smaller_l1"]) == (1, 1, 1)
        same = entry["seeds"]["a"]["wasserstein"]
        assert same == pytest.approx(0.01 * w.abs().mean().item(), rel=1e-3)
    alone = compare_weights(standard, robust, [0])[0]
    assert "further" not in alone, "there is no second seed to compare with"
    assert set(compare_weights(standard, {0: robust[0]}, [0, 1])) == {0}


@pytest.fixture
def put_result(file_result, pgd_outcomes):
    def put_result(folder, name: str, seed: int, held: int) -> None:
        file_result(folder, "paper_awnet", f"digits_{name}", seed, pgd_outcomes(held, 500))

    return put_result


@pytest.fixture
def load(stub_data):
    """A network instead of a run, and random images."""

    def load_run(run):
        torch.manual_seed(int(run.name[-1]) + 10 * ("robust" in str(run)))
        net = DigitsStudent(widths=(4, 6, 8))
        if "awnet" in str(run):
            net = AWNet(net, lambda c, s: Router(c, s, (4, 6, 8), type_hidden=5, init="normal"))
        data = stub_data([{"x": torch.rand(12, 1, 8, 8), "y": torch.randint(10, (12,))}])
        return AWNetClassifier(net, HybridCE(), torch.optim.SGD).eval(), data

    return load_run


def test_the_whole_analysis(tmp_path, monkeypatch, put_result, load, touch_checkpoints) -> None:
    monkeypatch.setattr(measures, "PGD", lambda eps, step, steps: pgd.PGD(eps, step, 1))
    runs, results = tmp_path / "runs", tmp_path / "results"
    for name, held in (("static_mtard", (100, 100)), ("awnet_mtard", (200, 201))):
        for seed, count in enumerate(held):
            put_result(results, name, seed, count)
    names = ("teacher_clean", "teacher_robust", "awnet_mtard")
    touch_checkpoints(runs, [f"digits_{name}" for name in names], (0, 1))
    run = runs / "digits_awnet_mtard/seed0"
    with SummaryWriter(str(run)) as writer:
        for step, value in enumerate((0.5, 0.25)):
            writer.add_scalar("train/w_nat", value, step)
            writer.add_scalar("val/clean_acc", value, step)
    assert curves_of(run) == {"w_nat": [(0, 0.5), (1, 0.25)]}
    report = ANALYSIS.analyse(runs, results, "digits", [0, 1], load=load)
    assert report["missing"] == []
    verdict = {line[0]: line[2] for line in report["tables"][0]["lines"]}
    assert verdict["C2"] == "supported"
    assert verdict["C6a"] == "not run"
    assert verdict["C1a"] != "not run"
    saved = json.loads((results / "analysis.json").read_text())
    assert set(saved["router"]) == {"0", "1"}
    forced = saved["router"]["0"]["forced"]
    assert set(forced) == {"clean", "pgd", "pgd_clean", "pgd_adv"}
    assert set(forced["pgd"]) == {"soft", "clean", "adv"}
    assert len(saved["weights"]["0"]["between"]) == 9
    names = "router signals weights distances gradients trade_off differences training"
    assert {p.rpartition("/digits_")[2] for p in report["figures"]} == {
        f"{name}.png" for name in names.split()
    }


def test_results_alone_are_enough_for_some_verdicts(tmp_path, put_result) -> None:
    with pytest.raises(ConfigurationError, match=r"nothing to analyse.*make reproduce-awnet"):
        ANALYSIS.analyse(tmp_path, tmp_path, "digits", [0])
    for seed in (0, 1):
        put_result(tmp_path, "static_mtard", seed, 100)
        put_result(tmp_path, "awnet_mtard", seed, 100 + seed)
    report = ANALYSIS.analyse(tmp_path / "runs", tmp_path, "digits", [0, 1])
    verdict = {line[0]: line[2] for line in report["tables"][0]["lines"]}
    assert verdict["C2"] == "contradicted"
    assert verdict["F4a"] == "not run"
    assert len(report["missing"]) == 6
    assert {p.rpartition("/")[2] for p in report["figures"]} == {
        "digits_differences.png",
        "digits_trade_off.png",
    }


def test_a_weighted_mean_is_about_the_examples_of_the_attack() -> None:
    metrics = {"clean_acc": 0.1, "pgd/f": 1.0, "worst": 0.5, "worst_clean": 0.9}
    assert w_robust(metrics, "worst") == pytest.approx(0.7)
    assert w_robust(metrics, "pgd/f") == pytest.approx(0.55)
    roles = roles_of("digits")
    found = Found("digits", "digits_", [0], Path(), Path())
    found.metrics = {("awnet", 0): metrics | {roles.pgd: 0.4}}
    points = plane(found, roles)
    assert points == {"awnet": [{"pgd": (0.1, 0.4), "worst": (0.9, 0.5)}]}, "of the same images"
    figure = trade_off(points)
    assert figure is not None
    drawn = [line.get_xydata().tolist() for line in figure.axes[0].lines[:2]]
    assert drawn == [[[10.0, 40.0]], [[90.0, 50.0]]]
    real = roles_of("cifar10_resnet18")
    assert (real.base, real.robust, real.pgd) == ("cifar10_resnet18", "trades", "pgd_trades/ce_f")
    assert ANALYSIS.scope("cifar10_resnet18") == ("cifar10_resnet18", "cifar10_resnet18_")
    for small in ("digits", "fashion_small"):
        for on in (small, f"{small}_", f"{small}_awnet_mtard"):
            assert ANALYSIS.scope(on) == (small, f"{small}_")
    entry = {"a": {"p": torch.ones(2), "auroc": 0.5}, "b": 1}
    assert without_tensors(entry) == {"a": {"auroc": 0.5}, "b": 1}, "tensors are for pictures"
