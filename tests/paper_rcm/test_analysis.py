"""Names of networks, verdicts either way, figures from what there is."""

import pytest
import torch

from common.errors import ConfigurationError
from common.evaluation.steps import Line, Outcomes, Threat
from common.outcomes import checkpoint_entry
from common.results import merge_result, result_path
from paper_rcm import analysis
from paper_rcm.analysis import analyse, evaluate_expectations, map_side, network_of, t_test

AR = "pgd20/ce_f"


@pytest.fixture(autouse=True)
def _small_simulation(monkeypatch) -> None:
    monkeypatch.setattr(analysis, "SIDES", (4, 16))
    monkeypatch.setattr(analysis, "STRIDES", (1, 4))


def test_names_tell_strides_pooling_and_factor() -> None:
    assert network_of("222_m2_avg") == ("222", "avg", 2.0)
    assert network_of("resnet18_1122_at") == ("1122", "avg", 1.0)
    assert network_of("resnet18_1222_m2bilinear_at") == ("1222", "avg", 2.0)
    assert network_of("112_max") == ("112", "max", 1.0)
    sides = {name: map_side(name, 8) for name in ("222_avg", "122_avg", "112_avg", "222_m2_avg")}
    assert sides == {"222_avg": 1, "122_avg": 2, "112_avg": 4, "222_m2_avg": 2}
    assert map_side("resnet18_1122_at", 32) == 8


def verdicts(m2: float, moved: float) -> dict[str, bool | None]:
    metrics = {}
    accuracies = {"222_avg": 0.8, "122_avg": 0.81, "112_avg": 0.812, "222_m2_avg": m2}
    for seed in (0, 1):
        for name, value in accuracies.items():
            metrics[name, seed] = {AR: value, "clean_acc": 0.98, "pooled_change_noise": 1.0}
        metrics["112_avg", seed]["pooled_change_noise"] = moved
    simulated = {"side": {"avg": {4: 1.0, 16: 0.3}, "max": {4: 1.0, 16: 1.2}}}
    found = evaluate_expectations(metrics, simulated, [0, 1])
    return {e.id: e.holds for e in found}


def test_verdicts_turn_out_either_way() -> None:
    good = verdicts(0.84, 0.5)
    assert [name for name, holds in good.items() if holds] == ["R1", "R2", "R3", "R4", "R5", "E6"]
    assert good["R6"] is False
    assert good["R7"] is None
    bad = verdicts(0.79, 1.5)
    assert (bad["R4"], bad["R6"], bad["E6"]) == (False, True, False)


def test_the_t_test_is_welchs() -> None:
    assert t_test({0: 0.8}, {0: 0.7}) is None
    close = t_test({0: 0.80, 1: 0.82, 2: 0.81}, {0: 0.805, 1: 0.815, 2: 0.812})
    apart = t_test({0: 0.80, 1: 0.82, 2: 0.81}, {0: 0.60, 1: 0.62, 2: 0.61})
    assert apart < 0.001 < close


def test_the_whole_analysis(tmp_path) -> None:
    right = torch.ones(50, dtype=torch.bool)
    for name, held in (("222_avg", 40), ("122_avg", 41), ("112_max", 39)):
        for seed in (0, 1):
            outcomes = Outcomes(
                torch.zeros(50, dtype=torch.int64),
                {"clean": right, AR: torch.arange(50) < held},
                {AR: right},
                {AR: Line("pgd20", norm="linf", eps=0.1)},
                threat=Threat("linf", 0.1),
            )
            change = {"pooled_change": 1.0, "pooled_change_noise": 0.5, "consistency": 0.9}
            merge_result(
                result_path(tmp_path, f"digits_{name}", seed),
                paper="paper_rcm",
                experiment=f"digits_{name}",
                seed=seed,
                label="last",
                entry=checkpoint_entry(outcomes, measures=change),
                provenance={"config_digest": "x"},
            )
    report = analyse(tmp_path, tmp_path, "digits", [0, 1])
    verdict = {e["id"]: e["holds"] for e in report["expectations"]}
    assert verdict["R1"] is True
    assert verdict["R3"] is True
    assert verdict["R4"] is None
    names = {path.rpartition("/")[2] for path in report["figures"]}
    assert names == {f"digits_{n}.png" for n in ("simulation", "accuracies", "movement")}
    with pytest.raises(ConfigurationError, match="nothing to analyse"):
        analyse(tmp_path, tmp_path, "cifar10", [0])
