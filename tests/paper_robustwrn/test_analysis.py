"""Figures from whatever has finished, and verdicts that can turn out either way."""

from pathlib import Path

import pytest

from common.analysis.report import Found
from common.errors import ConfigurationError
from common.results.store import load_results
from paper_robustwrn.analysis import ANALYSIS, claims
from paper_robustwrn.figures import networks_of, shape_of, stage_curves

PGD = "pgd20/ce_f"


@pytest.fixture
def write(file_result, pgd_outcomes):
    def write(folder, stem: str, accuracy: float, parameters: float, seed: int = 0, **more) -> None:
        outcomes = pgd_outcomes(round(100 * accuracy), 100, eps=0.1)
        measures = {"parameters": parameters, "macs": 2 * parameters, **more}
        file_result(folder, "paper_robustwrn", stem, seed, outcomes, measures=measures)

    return write


def test_names_tell_the_shape() -> None:
    assert shape_of("cifar10_grid_w10-10-8") == ("w", (10, 10, 8))
    assert shape_of("d3-1-1_sat") == ("d", (3, 1, 1))
    assert shape_of("cifar10_wrn34r_sat") is None


def test_sweep_figures_come_from_whatever_has_finished(tmp_path, write) -> None:
    for stem, accuracy, size in (
        ("cifar10_grid_d5-5-5", 0.52, 46e6),
        ("cifar10_grid_w10-10-8", 0.53, 34e6),
        ("cifar10_grid_w10-10-4", 0.49, 17e6),
        ("cifar10_grid_w8-10-10", 0.50, 45e6),
        ("cifar10_grid_w10-10-10", 0.52, 46e6),
    ):
        write(tmp_path, stem, accuracy, size)
    report = ANALYSIS.analyse(tmp_path, tmp_path, "cifar10_grid", [0])
    names = {path.rpartition("/")[2] for path in report["figures"]}
    prefix = "cifar10_grid_"
    drawn = ("parameters", "macs", "stage_widths", "differences")
    assert names == {f"{prefix}{name}.png" for name in drawn}
    assert report["claims"] == []
    with pytest.raises(ConfigurationError, match="nothing to analyse"):
        ANALYSIS.analyse(tmp_path, tmp_path, "svhn", [0])


def test_a_stage_curve_needs_networks_that_differ_in_one_stage(tmp_path, write) -> None:
    write(tmp_path, "cifar10_grid_w10-10-8", 0.5, 1e6)
    write(tmp_path, "cifar10_grid_w8-8-10", 0.5, 2e6)
    assert stage_curves(networks_of(load_results(tmp_path), "cifar10_"), "w") is None
    write(tmp_path, "cifar10_grid_w10-10-4", 0.4, 3e6)
    figure = stage_curves(networks_of(load_results(tmp_path), "cifar10_"), "w")
    line, *_ = figure.axes[0].lines
    assert list(line.get_xdata()) == [4, 8]
    assert list(line.get_ydata()) == pytest.approx([40, 50])


def varied(number: float, seed: int) -> float:
    """Another little power in every seed: differences and ratios vary."""
    return number ** (1 + 1e-4 * seed)


def verdicts(early: float, late: float, natural: float, share: float) -> dict[str, str]:
    found = Found("digits", "digits_", [0, 1], Path(), Path())
    for seed in (0, 1):
        for name, value in (("d3-1-1_sat", early), ("d1-1-3_sat", late)):
            value = varied(value, seed)
            smooth = {"lipschitz": 40 + value, "stability": value, "parameters": 1.0}
            found.metrics[name, seed] = {PGD: value, "clean_acc": varied(0.98, seed), **smooth}
        for name in ("d3-1-1_natural", "d1-1-3_natural"):
            found.metrics[name, seed] = {PGD: varied(natural, seed)}
    found.kept["lipschitz"] = {
        ("d3-1-1_sat", seed): {"largest": share, "bound": 1.0} for seed in (0, 1)
    }
    return {claim.id: claim.verdict for claim in claims(found)}


def test_verdicts_turn_out_either_way() -> None:
    good = verdicts(0.77, 0.76, 0.02, 0.5)
    assert [name for name, verdict in good.items() if verdict == "supported"] == list("abcdfg")
    bad = verdicts(0.70, 0.76, 0.5, 1.5)
    assert [name for name, verdict in bad.items() if verdict == "supported"] == ["b", "e"]
    assert set(good.values()) == set(bad.values()) == {"supported", "contradicted"}


def test_a_missing_seed_leaves_the_verdict_open(tmp_path, write) -> None:
    write(tmp_path, "digits_d3-1-1_sat", 0.7, 48e3, lipschitz=40.0, stability=0.8)
    report = ANALYSIS.analyse(tmp_path / "no_runs", tmp_path, "digits", [0, 1])
    assert {line[2] for line in report["tables"][0]["lines"]} == {"not run"}
    assert any("checkpoint" in what for what in report["missing"])


def test_directions_are_judged_on_real_images(tmp_path, write) -> None:
    for seed in (0, 1):
        for name, held in (("d4-1-1", 0.8), ("d2-2-2", 0.7), ("d1-1-4", 0.6 + 0.01 * seed)):
            smooth = {"lipschitz": varied(20 / held, seed), "stability": varied(held, seed)}
            write(tmp_path, f"fashion_small_{name}_sat", held, 9e4, seed, **smooth)
    report = ANALYSIS.analyse(tmp_path, tmp_path, "fashion_small", [0, 1])
    judged = {one["id"]: one["judgements"][""] for one in report["claims"]}
    assert {id: one["verdict"] for id, one in judged.items()} == {
        "e": "supported",
        "f": "supported",
        "g": "supported",
        "h": "not decided",
    }
    assert judged["g"]["per_seed"] == {"0": pytest.approx(20), "1": pytest.approx(19)}
    assert "every seed" in judged["h"]["reason"], "ten points in both, which no test decides"
