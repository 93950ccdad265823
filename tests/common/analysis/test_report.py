"""Differences over seeds, and claims with several variants on their way to a table."""

import math
from statistics import stdev

import pytest

from common.analysis.report import (
    VERDICTS,
    Claim,
    Judgement,
    describe,
    paired_difference,
    verdict_table,
)


def test_a_difference_is_paired_and_its_error_that_of_the_mean() -> None:
    found = paired_difference({0: 0.5, 1: 0.7, 2: 0.9, 7: 0.0}, {0: 0.4, 1: 0.5, 2: 0.6}, 100.0)
    assert found is not None
    assert found.mean == pytest.approx(20.0)
    assert found.error == pytest.approx(stdev([10.0, 20.0, 30.0]) / math.sqrt(3))
    assert found.seeds == 3
    assert found.text() == "+20.0 ± 5.8"
    assert found.text(0) == "+20 ± 6"
    assert (found.is_up, found.is_down) == (True, False)
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


def test_two_errors_make_a_difference() -> None:
    up = paired_difference({0: 1.0, 1: 3.0}, {0: 0.0, 1: 0.0})  # mean 2, error 1
    assert up is not None
    assert (up.is_up, up.is_down) == (False, False)
    down = paired_difference({0: -1.0, 1: -2.0}, {0: 0.0, 1: 0.0})  # mean -1.5, error 0.5
    assert down is not None
    assert (down.is_up, down.is_down) == (False, True)


def test_one_seed_has_no_error_and_says_nothing() -> None:
    alone = paired_difference({3: 0.9}, {3: 0.1})
    assert alone is not None
    assert alone.error == math.inf
    assert (alone.is_up, alone.is_down) == (False, False)
    assert alone.text() == "+0.8"


def test_claims_become_a_line_for_each_variant() -> None:
    claims = [
        Claim("C1", "more", {"a": Judgement("supported", "1"), "b": Judgement("undecided", "2")}),
        Claim("C2", "less", {"a": Judgement("contradicted", "3")}),
    ]
    table = verdict_table(claims, "A note.")
    assert table["lines"] == [
        ["C1", "more", "a", "supported", "1"],
        ["", "", "b", "not supported: undecided", "2"],
        ["C2", "less", "a", "not supported: contradicted", "3"],
    ]
    assert all(len(line) == len(table["header"]) for line in table["lines"])
    assert len(set(VERDICTS.values())) == 4
    report = {"expectations": [], "missing": [], "path": "p", "figures": [], "tables": [table]}
    text = describe(report)
    assert "Verdicts\n    C1 | more | a | supported | 1" in text
    assert text.endswith("wrote p")
