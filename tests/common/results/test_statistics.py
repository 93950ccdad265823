"""Intervals and p values, by hand and by their definitions."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.results.statistics import holm, mcnemar_exact, paired_t_test, wilson_interval


@settings(deadline=None, max_examples=30)  # the first example imports scipy
@given(st.integers(1, 3000), st.floats(0, 1))
def test_the_ends_of_an_interval_solve_the_score_equation(n: int, share: float) -> None:
    successes = round(share * n)
    p = successes / n
    low, high = wilson_interval(successes, n)
    assert -1e-12 <= low <= p <= high <= 1.0 + 1e-12
    for end in (low, high):
        if 1e-9 < end < 1 - 1e-9:
            assert abs(p - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / n), 1e-5)


def test_nothing_and_everything_leave_room_on_one_side() -> None:
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson_interval(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    for successes, n in ((0, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match=f"got {successes} of {n}"):
            wilson_interval(successes, n)


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"),
    [(0, 0, 1.0), (5, 5, 1.0), (0, 6, 2 / 64), (1, 3, 2 * 5 / 16), (3, 1, 2 * 5 / 16)],
)
def test_mcnemar_by_hand(only_a: int, only_b: int, p: float) -> None:
    assert mcnemar_exact(only_a, only_b) == pytest.approx(p)


def test_p_values_of_a_large_test_set_do_not_vanish() -> None:
    assert 0.0 < mcnemar_exact(0, 1000) < 1e-299


def test_a_paired_interval_by_hand() -> None:
    assert paired_t_test([]) is None
    one = paired_t_test([0.8 - 0.7])
    assert (one.low, one.high, one.p, one.text()) == (-math.inf, math.inf, 1.0, "+0.1")
    same = paired_t_test([0.75 - 0.5, 0.5 - 0.25])
    assert (same.is_tested, same.low, same.high, same.p) == (False, -math.inf, math.inf, 1.0)
    assert same.text(2) == "+0.25"
    # differences 1, 2, 3: 2 ± 4.3027 / sqrt(3), t = 2 sqrt(3) with 2 degrees of freedom
    found = paired_t_test([2.0 - 1.0, 4.0 - 2.0, 6.0 - 3.0])
    assert (found.low, found.high) == pytest.approx((2 - 2.48414, 2 + 2.48414), abs=1e-4)
    assert found.p == pytest.approx(0.0742, abs=1e-4)


def test_holm_corrects_for_the_number_of_tests() -> None:
    assert holm([0.01, 0.04, 0.03, 0.2]) == pytest.approx([0.04, 0.09, 0.09, 0.2])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
