"""Outcomes: packing, the entry of a checkpoint, figures and the examples behind them."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.results.bases import bases, comparable, last_of
from common.results.lines import Line, Outcomes, Threat
from common.results.outcomes import (
    checkpoint_entry,
    figures,
    logged,
    outcome_bits,
    positions,
    worst_over,
)
from common.results.packing import pack_outcomes, unpack_outcomes
from common.results.statistics import wilson_interval

Y = [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
CLEAN = [1, 1, 1, 1, 1, 1, 1, 1, 0, 1]
PGD_F = [1, 1, 0, 1, 1, 0, 1, 1, 0, 1]
PGD_P = [0, 1, 1, 1, 1, 0, 1, 1, 0, 1]
UNION = [a & b for a, b in zip(PGD_F, PGD_P, strict=True)]
APGD = [1, 0, 0, 1]  # of the first four
SQUARE = [0, 0, 0, 1]


def outcomes(**other: list[int]) -> Outcomes:
    """Ten examples of three classes; attacks shorter than that are on the first ones."""
    attacks = {"pgd20/ce_f": PGD_F, "pgd20/ce_p1": PGD_P, "aa/apgd-ce": APGD, "aa/square": SQUARE}
    attacks |= other
    n = len(Y)
    return Outcomes(
        y=torch.tensor(Y),
        correct={
            name: torch.tensor(bits + [1] * (n - len(bits)), dtype=torch.bool)
            for name, bits in {"clean": CLEAN, **attacks}.items()
        },
        attacked={name: torch.arange(n) < len(bits) for name, bits in attacks.items()},
        lines={
            name: Line(entry="aa", norm="linf", eps=0.1, survivors_only=True)
            for name in ("aa/apgd-ce", "aa/square")
        },
        threat=Threat("linf", "1/10"),
    )


def entry(**other: list[int]) -> Any:
    return checkpoint_entry(outcomes(**other), epoch=29, global_step=240)


def parts(**met: list[int]) -> Any:
    """A suite of attacks that break nothing, each given these examples only."""
    n = len(Y)
    steps = {name.replace("_", "/"): places for name, places in met.items()}
    return checkpoint_entry(
        Outcomes(
            y=torch.tensor(Y),
            correct={name: torch.tensor(CLEAN, dtype=torch.bool) for name in ("clean", *steps)},
            attacked={
                name: torch.zeros(n, dtype=torch.bool).index_fill(0, torch.tensor(places), True)
                for name, places in steps.items()
            },
        ),
        measures={"macs": 3.0},
    )


LINES = {
    "pgd/ce_f": Line("pgd"),
    "eps/ce_f/eps=0.1": Line("eps", at={"eps": 0.1}),
    "eps/ce_p1/eps=0.1": Line("eps", at={"eps": 0.1}),
    "eps/ce_f/eps=0.2": Line("eps", counts=False, at={"eps": 0.2}),
    "noise/level=0.2/draw=0": Line("noise", "noise", at={"level": 0.2, "draw": 0}),
    "noise/level=0.2/draw=1": Line("noise", "noise", at={"level": 0.2, "draw": 1}),
    "noise/level=0.4": Line("noise", "noise", at={"level": 0.4}),
}


def swept(**lines: Line) -> Any:
    """A suite with sweeps; each step is right on as many examples as it has a number."""
    n = len(Y)
    right = dict(zip(LINES, (8, 6, 5, 1, 9, 6, 3), strict=True))
    order = torch.arange(n)
    return checkpoint_entry(
        Outcomes(
            y=torch.tensor(Y),
            correct={
                "clean": order < n,
                **{name: (order + 3 * i) % n < k for i, (name, k) in enumerate(right.items())},
            },
            attacked=dict.fromkeys(right, order < n),
            lines={**LINES, **lines},
        )
    )


# ----------------------------------------------------------------------------------------- packing


@given(st.lists(st.booleans(), max_size=70))
def test_packing_can_be_undone(bits: list[bool]) -> None:
    packed = pack_outcomes(bits)
    assert len(packed) == 2 * -(-len(bits) // 8)
    assert unpack_outcomes(packed, len(bits)).tolist() == bits


def test_the_first_outcome_is_the_highest_bit() -> None:
    assert pack_outcomes([1, 0, 1, 1, 0, 0, 0, 0, 1]) == "b080"
    for text, n in (("80", 9), ("8000", 8), ("01", 7), ("zz", 8)):
        with pytest.raises(ValueError, match=r"hold|beyond|'zz'"):
            unpack_outcomes(text, n)


# ----------------------------------------------------------------------------------------- entries


def test_counts_and_the_order_of_the_suite() -> None:
    result = entry()
    assert result["threat"] == {"norm": "linf", "eps": 0.1}
    assert list(result["attacks"]) == ["pgd20/ce_f", "pgd20/ce_p1", "aa/apgd-ce", "aa/square"]
    assert result["clean"]["per_class"] == [[4, 4], [3, 3], [2, 3]]
    first = result["attacks"]["pgd20/ce_f"]
    assert list(first.items())[4:] == [
        *(("at", {}), ("correct", 7), ("examples", 10), ("survivors_only", False)),
        *(("per_class", [[4, 4], [3, 3], [0, 3]]), ("outcomes", pack_outcomes(PGD_F))),
    ]
    assert [first[key] for key in ("kind", "norm", "eps", "counts")] == ["attack", None, None, True]
    square = result["attacks"]["aa/square"]
    assert (square["examples"], square["survivors_only"], square["eps"]) == (4, True, 0.1)
    assert square["per_class"] == [[1, 2], [0, 1], [0, 1]]
    assert square["subset"] == pack_outcomes([1] * 4 + [0] * 6)
    assert result["sizes"] == dict.fromkeys(
        ("aa/apgd-ce", "aa/square", "aa", "aa_clean", "worst", "worst_clean"), 4
    )


def test_names_that_do_not_fit_are_refused() -> None:
    found = outcomes()
    found.lines["aa/square"] = Line(entry="square")
    with pytest.raises(ValueError, match="aa/square belongs to the suite entry 'square'"):
        checkpoint_entry(found)
    with pytest.raises(ValueError, match="worst is a measure and an accuracy"):
        checkpoint_entry(outcomes(), measures={"worst": 1.0})


def test_distances_are_medians_over_what_the_step_broke() -> None:
    nan = float("nan")
    found = outcomes()
    columns = {
        "correct": torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 0, 0], dtype=torch.bool),
        # the ninth is wrong without an attack, the last was not run
        "linf": torch.tensor([0.1, 0.3, 0.05, 0.2, 9, 9, 9, 9, 9, nan]),
        "predicted": torch.tensor([-1, 0, 0, 0, 0, 0, 0, 0, 0, -1]),
        "unmoved": torch.tensor([1, 0, 0, 0, 0, 0, 0, 0, 0, 1]),
    }
    found.columns["pgd20/ce_f"] = columns
    found.columns["pgd20/ce_p1"] = {"correct": torch.zeros(10), "l2": torch.full((10,), nan)}
    # four examples only
    found.columns["aa/square"] = columns | {"linf": torch.tensor([1, 2, 3, nan] + [9.0] * 6)}
    attacks = checkpoint_entry(found)["attacks"]
    assert attacks["pgd20/ce_f"]["distances"] == {"linf": 0.15}
    assert attacks["pgd20/ce_p1"]["distances"] == {"l2": None}
    assert attacks["aa/square"]["distances"] == {"linf": 2.0}
    assert "distances" not in attacks["aa/apgd-ce"]
    assert (attacks["pgd20/ce_f"]["nonfinite"], attacks["aa/square"]["nonfinite"]) == (2, 1)
    assert attacks["pgd20/ce_f"]["unmoved"] == 2


# -------------------------------------------------------------------------------------- accuracies


def test_metrics_by_hand() -> None:
    worst = [a & b & c for a, b, c in zip(UNION[:4], APGD, SQUARE, strict=True)]
    assert entry()["metrics"] == {
        "clean_acc": 0.9,
        "pgd20/ce_f": 0.7,
        "pgd20/ce_p1": 0.7,
        "aa/apgd-ce": 0.5,
        "aa/square": 0.25,
        "pgd20": 0.7,
        "pgd20_union": 0.6,  # below every single loss
        "aa": 0.25,
        "aa_clean": 1.0,
        "worst": sum(worst) / 4,
        "worst_clean": 1.0,
    }
    assert (sum(UNION), sum(worst)) == (6, 1)


def test_a_worst_case_is_over_the_examples_of_every_attack() -> None:
    nested = parts(a_f=[1, 3, 5, 7, 8, 9], b_f=[3, 8])
    assert nested["metrics"]["worst"] == nested["metrics"]["worst_clean"] == 0.5
    assert nested["sizes"]["worst"] == 2
    assert positions(nested, "worst") == [3, 8]
    assert outcome_bits(nested, "worst") == [True, False]
    apart = parts(a_f=[0, 1, 2], b_f=[3, 4])
    assert "worst" not in apart["metrics"]
    assert len(apart["remarks"]) == 1


def test_losses_on_other_examples_have_no_common_accuracy() -> None:
    found = parts(a_f=[0, 1], a_g=[2, 8])
    assert not {"a", "a_union", "a_clean"} & set(found["metrics"])
    assert found["attacks"]["a/g"]["per_class"] == [[0, 0], [0, 0], [1, 2]]
    metrics = entry(**{"pgd20/ce_p2": [1, 1, 1, 1, 1]})["metrics"]
    assert not {"pgd20", "pgd20_union", "pgd20_clean"} & set(metrics)
    assert metrics["pgd20/ce_p2"] == 1.0
    result = entry()  # a fresh and a cumulative accuracy
    result["attacks"]["pgd20/ce_p1"]["survivors_only"] = True
    assert not {"pgd20", "pgd20_union"} & set(figures(result["clean"], result["attacks"]))


def test_metrics_of_a_part_are_logged_under_another_name() -> None:
    assert set(logged(parts(a_f=[0, 1]))) == {
        *("clean_acc", "macs", "a/f_on_2", "a_on_2", "a_union_on_2"),
        *("a_clean_on_2", "worst_on_2", "worst_clean_on_2"),
    }


def test_examples_are_robust_only_under_an_attack_that_could_break_them() -> None:
    weakness = "all its steps together, 0, are less than its radius 0.1"
    weak = {name: replace(line, weakness=weakness) for name, line in LINES.items()}
    found = swept(**weak)
    assert "worst" not in found["metrics"]
    assert f"pgd/ce_f: {weakness}" in found["remarks"][0]
    strong = swept(**weak | {"pgd/ce_f": Line("pgd")})
    assert strong["metrics"]["worst"] == swept()["metrics"]["worst"]
    assert strong["remarks"] == []
    broken = outcomes(**{"pgd20/ce_f": [0] * 10})
    broken.lines = {name: Line(name.partition("/")[0], weakness="w") for name in broken.attacked}
    assert checkpoint_entry(broken)["metrics"]["worst"] == 0.0, "a break is always evidence"


def test_only_attacks_that_count_enter_the_worst_case() -> None:
    # what pgd and both losses at 0.1 leave; neither noise nor the larger radius counts
    assert swept()["metrics"]["worst"] == 0.1
    without = swept(**{name: Line(name.partition("/")[0], counts=False) for name in LINES})
    assert "worst" not in without["metrics"]
    assert "no attack kept to the threat model" in without["remarks"][0]


def test_attacks_of_an_audit_enter_where_they_break_more() -> None:
    few = [1, 1, 1, 1]
    assert entry(**{"audit_pgd/ce": few})["metrics"]["worst"] == 0.25
    assert entry(**{"audit_pgd/ce": few})["sizes"]["worst"] == 4
    assert entry(**{"audit_pgd/ce": [1, 1, 1, 0]})["metrics"]["worst"] == 0.0


def test_attacks_of_an_audit_always_enter_on_the_images_of_the_suite() -> None:
    """Otherwise the worst cases of two seeds would be over different attacks."""
    for audit in ([1] * 10, [0] * 10, [1] * 4):
        suite = dict.fromkeys(("pgd20/ce_f", "aa/apgd-ce", "aa/square"), [1] * 10)
        found = entry(**suite, **{"audit_pgd/ce": audit})
        names = worst_over(found["clean"], found["attacks"])
        assert ("audit_pgd/ce" in names) is (len(audit) == 10)


def test_the_points_of_a_sweep_are_groups() -> None:
    found = swept()
    metrics = found["metrics"]
    assert not {"eps", "noise"} & set(metrics)
    assert (metrics["eps/eps=0.1"], metrics["eps/eps=0.1_union"]) == (0.5, 0.2)
    assert metrics["eps/eps=0.2"] == metrics["eps/ce_f/eps=0.2"] == 0.1
    assert metrics["noise/level=0.2"] == 0.75, "a mean over draws"
    assert not [name for name in metrics if "noise" in name and "union" in name]
    assert set(metrics) - set(found["intervals"]) == {"noise/level=0.2"}
    assert found["intervals"]["eps/eps=0.1"] == pytest.approx(wilson_interval(5, 10), abs=1e-6)
    assert outcome_bits(found, "noise/level=0.2") is None


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("clean_acc", CLEAN),
        ("pgd20/ce_f", PGD_F),
        ("pgd20_union", UNION),
        ("aa/square", SQUARE),
        ("aa_clean", CLEAN[:4]),
        ("worst", [0, 0, 0, 1]),
        ("fgsm", PGD_P),
        ("pgd20", None),
        ("absent", None),
    ],
)
def test_the_examples_behind_a_metric(metric: str, expected: list[int] | None) -> None:
    found = entry(**{"fgsm/ce_f": PGD_P})
    bits = outcome_bits(found, metric)
    assert bits == expected
    assert bits is None or sum(bits) / len(bits) == found["metrics"][metric]


# ------------------------------------------------------------------------------------------- bases


def test_metrics_about_other_examples_are_left_out() -> None:
    of = bases(parts(a_f=[1, 3]))
    assert of["a"] == of["worst"] != of["clean_acc"] == of["macs"]
    assert (of["a"].size, of["a"].is_whole, of["clean_acc"].is_whole) == (2, False, True)
    checkpoints = {("a", 0): parts(a_f=[1, 3]), ("b", 0): parts(a_f=[1, 3])}
    checkpoints["c", 1] = parts(a_f=[1, 4])
    metrics, left_out = comparable(checkpoints)
    assert "a" in metrics["a", 0]
    assert "a" not in metrics["c", 1]
    assert metrics["c", 1]["clean_acc"] == 0.9
    assert "a of c seed 1 (2 examples): measured on other examples than elsewhere" in left_out
    results: list[Any] = [
        {"experiment": "digits_a", "seed": 0, "checkpoints": {"last": 1}},
        {"experiment": "digits_b", "seed": 1, "checkpoints": {"selected": 2}},
        {"experiment": "mnist_a", "seed": 0, "checkpoints": {"last": 3}},
    ]
    assert last_of(results, "digits_") == {("a", 0): 1}
