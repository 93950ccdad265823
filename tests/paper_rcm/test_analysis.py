"""Names of networks, verdicts either way, figures from what there is."""

from pathlib import Path

import pytest

from common.analysis.report import Found
from common.errors import ConfigurationError
from paper_rcm import analysis
from paper_rcm.analysis import ANALYSIS, claims
from paper_rcm.figures import (
    AR,
    BUDGET,
    accuracy_figure,
    budget_figure,
    cost_figure,
    map_name,
    map_side,
    network_of,
)


def test_names_tell_strides_pooling_and_factor() -> None:
    assert network_of("222_m2_avg") == ("222", "avg", 2.0)
    assert network_of("resnet18_1122_martreleased") == ("1122", "avg", 1.0)
    assert network_of("resnet18_1222_m2bilinear_at") == ("1222", "avg", 2.0)
    assert network_of("112_max") == ("112", "max", 1.0)
    assert network_of("vittiny_m1.5_at") == ("", "avg", 1.5)
    sides = {name: map_side(name, 8) for name in ("222_avg", "122_avg", "112_avg", "222_m2_avg")}
    assert sides == {"222_avg": 1, "122_avg": 2, "112_avg": 4, "222_m2_avg": 2}
    assert map_side("resnet18_1122_at", 32) == 8


def varied(entry, seed: int):
    """The numbers of an entry, another little power in every seed: differences and ratios vary."""
    if isinstance(entry, dict):
        return {key: varied(value, seed) for key, value in entry.items()}
    return entry ** (1 + 1e-4 * seed)


def verdicts(m2: float, moved: float, apart: float = 0.1, left: float = 0.0) -> dict[str, str]:
    found = Found("digits", "digits_", [0, 1], Path(), Path())
    accuracies = {"222_avg": 0.8, "122_avg": 0.81, "112_avg": 0.812, "222_m2_avg": m2}
    separated = {}
    for seed in (0, 1):
        for name, value in accuracies.items():
            change = moved if name == "112_avg" else 1.0
            numbers = {AR: value, "clean_acc": 0.98, "pooled_change_noise": change}
            numbers[f"{BUDGET}1"] = left if name == "112_avg" else 0.0
            found.metrics[name, seed] = varied(numbers, seed)
        separated["222_avg", seed] = varied({"silhouette PGD-20": 0.2}, seed)
        separated["122_avg", seed] = varied({"silhouette PGD-20": 0.2 + apart}, seed)
    simulated = {"side": {"avg": {4: 1.0, 16: 0.3}, "max": {4: 1.0, 16: 1.2}}}
    found.measured["simulation"], found.kept["separated"] = simulated, separated
    return {claim.id: claim.verdict for claim in claims(found)}


def test_verdicts_turn_out_either_way() -> None:
    good = verdicts(0.84, 0.5)
    held = [name for name, verdict in good.items() if verdict == "supported"]
    assert held == ["R1", "R2", "R3", "R4", "R5", "E6", "E8", "E14"]
    assert (good["R6"], good["R7"]) == ("contradicted", "not run")
    bad = verdicts(0.79, 1.5, apart=-0.1, left=0.01)
    assert (bad["R4"], bad["R6"], bad["E6"]) == ("contradicted", "supported", "contradicted")
    assert (bad["E8"], bad["E14"]) == ("contradicted", "contradicted")


def test_a_budget_is_drawn_from_sweeps_and_nothing_else() -> None:
    swept = {f"{BUDGET}0.1": 0.5, f"{BUDGET}1": 0.0, f"{BUDGET}1_clean": 0.9, AR: 0.7}
    figure = budget_figure({("222_avg", 0): swept, ("122_avg", 0): {AR: 0.8}})
    (line,) = figure.axes[0].get_lines()
    assert list(line.get_xdata()) == [0.1, 1.0]
    assert list(line.get_ydata()) == [50.0, 0.0]
    assert budget_figure({("122_avg", 0): {AR: 0.8}}) is None


def test_costs_are_drawn_by_how_the_map_got_larger() -> None:
    def cost(side: float, time: float) -> dict[str, float]:
        return {"map_side": side, "macs": 1e6 * side, "peak_memory": 2e6 * side, "step_time": time}

    costs = {
        "222_avg": cost(1, 1.0), "122_avg": cost(2, 1.2), "222_m2_avg": cost(2, 1.8),
        "112_avg": cost(4, 1.5), "112_max": cost(4, 9.0), "121_avg": cost(4, 7.0),
    }  # fmt: skip
    strides, enlarged = cost_figure(costs).axes[2].get_lines()
    assert list(strides.get_ydata()) == [1.0, 1.2, 1.5]
    assert list(enlarged.get_ydata()) == [1.0, 1.8]
    assert cost_figure({"222_avg": cost(1, 1.0)}) is None


def test_the_whole_analysis(tmp_path, monkeypatch, file_result, pgd_outcomes) -> None:
    monkeypatch.setattr(analysis, "SIDES", (4, 16))
    monkeypatch.setattr(analysis, "STRIDES", (1, 4))
    monkeypatch.setattr(analysis, "measure_digits", lambda stems, results: None)
    held = {"222_avg": (400, 401), "122_avg": (410, 412), "112_max": (390, 391)}
    for name, counts in held.items():
        for seed, count in enumerate(counts):
            outcomes = pgd_outcomes(count, 500, eps=0.1)
            change = {"pooled_change": 1.0, "pooled_change_noise": 0.5, "consistency": 0.9}
            file_result(tmp_path, "paper_rcm", f"digits_{name}", seed, outcomes, measures=change)
    report = ANALYSIS.analyse(tmp_path, tmp_path, "digits", [0, 1])
    verdict = {line[0]: line[2] for line in report["tables"][0]["lines"]}
    assert [verdict[name] for name in ("R1", "R3", "R4")] == ["supported", "supported", "not run"]
    names = {path.rpartition("/")[2] for path in report["figures"]}
    drawn = ("differences", "simulation", "accuracies", "movement")
    assert names == {f"digits_{name}.png" for name in drawn}
    assert any("digits_222_avg" in what for what in report["missing"]), "no checkpoints: it says so"
    with pytest.raises(ConfigurationError, match="nothing to analyse"):
        ANALYSIS.analyse(tmp_path, tmp_path, "cifar10", [0])


@pytest.mark.parametrize(
    ("prefix", "method", "side"),
    [
        ("digits_", "122_avg", "2x2"),
        ("fashion_small_", "122_avg", "7x7"),
        ("fashion_small_", "222_m2_avg", "7x7"),
        ("cifar10_", "resnet18_1122_at", "8x8"),
        ("tiny_", "resnet18_1222_at", "8x8"),
    ],
)
def test_figures_name_the_side_of_the_last_map(prefix: str, method: str, side: str) -> None:
    found = Found(prefix.rstrip("_"), prefix, [0], Path(), Path())
    found.kept["embeddings"] = {}
    found.metrics = {(method, 0): {"clean_acc": 0.9, AR: 0.5, "consistency": 0.6}}
    figure = analysis.figures(found)["accuracies"]
    assert figure is not None
    (tick,) = figure.axes[0].get_xticklabels()
    assert tick.get_text().endswith(side)


def test_claims_of_fashion_are_about_networks_there() -> None:
    found = Found("fashion_small", "fashion_small_", [0, 1], Path(), Path())
    found.kept["separated"] = {}
    found.measured["simulation"] = {"side": {"avg": {4: 1.0, 8: 0.5}, "max": {4: 1.0, 8: 1.0}}}
    accuracies = {"222_avg": (0.73, 0.74), "122_avg": (0.71, 0.7), "222_m2_avg": (0.75, 0.77)}
    found.metrics = {
        (name, seed): {AR: value, "clean_acc": 0.9}
        for name, values in accuracies.items()
        for seed, value in enumerate(values)
    }
    judged = {claim.id: claim for claim in claims(found)}
    assert list(judged) == ["R3", "R4", "R6", "E8"]
    assert "7x7" in judged["R6"].claim
    assert judged["E8"].verdict == "not run"


def test_networks_with_equal_maps_are_drawn_in_the_order_of_their_names() -> None:
    names = ["122_avg", "212_avg", "221_avg", "222_m2_avg", "241_m2_avg"]
    metrics = {(name, 0): {AR: 0.5, "clean_acc": 0.9} for name in reversed(names)}
    figure = accuracy_figure(metrics, 8, lambda name: name)
    ticks = [tick.get_text() for tick in figure.axes[0].get_xticklabels()]
    assert ticks == [f"{name}\n{map_name(name, 8)}" for name in names]
