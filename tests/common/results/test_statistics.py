"""Intervals and p values, against scipy and by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, ttest_ind

from common.results.statistics import mcnemar_exact, welch_t_test, wilson_interval


@given(st.integers(1, 3000), st.floats(0, 1), st.sampled_from([0.5, 0.9, 0.95, 0.999]))
def test_intervals_are_those_of_scipy(n: int, share: float, confidence: float) -> None:
    successes = round(share * n)
    expected = binomtest(successes, n).proportion_ci(confidence, method="wilson")
    assert wilson_interval(successes, n, confidence) == pytest.approx(
        (expected.low, expected.high), abs=1e-12
    )


@given(st.integers(1, 500), st.floats(0, 1))
def test_an_interval_lies_in_the_unit_interval_around_its_proportion(n: int, share: float) -> None:
    successes = round(share * n)
    low, high = wilson_interval(successes, n)
    assert 0.0 <= low <= successes / n <= high <= 1.0
    mirrored = wilson_interval(n - successes, n)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_nothing_and_everything_leave_room_on_one_side() -> None:
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson_interval(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (3, 2), (-1, 2)])
def test_an_interval_of_nothing_is_refused(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match=f"got {successes} of {n}"):
        wilson_interval(successes, n)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0])
def test_a_confidence_in_percent_is_refused(confidence: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        wilson_interval(1, 2, confidence)


@given(st.integers(0, 400), st.integers(0, 400))
def test_p_values_are_those_of_scipy(only_a: int, only_b: int) -> None:
    n = only_a + only_b
    expected = binomtest(only_a, n).pvalue if n else 1.0
    assert mcnemar_exact(only_a, only_b) == pytest.approx(expected, rel=1e-9)
    assert mcnemar_exact(only_b, only_a) == mcnemar_exact(only_a, only_b)


def test_p_values_by_hand() -> None:
    assert mcnemar_exact(0, 0) == 1.0
    assert mcnemar_exact(5, 5) == 1.0
    assert mcnemar_exact(0, 6) == 2 / 64
    assert mcnemar_exact(1, 3) == 2 * 5 / 16


def test_p_values_of_a_large_test_set_neither_overflow_nor_vanish() -> None:
    assert mcnemar_exact(4000, 6000) == pytest.approx(binomtest(4000, 10_000).pvalue, rel=1e-9)
    assert 0.0 < mcnemar_exact(0, 1000) < 1e-300


def test_negative_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="got 1 and -1"):
        mcnemar_exact(1, -1)


def test_welch_compares_runs() -> None:
    assert welch_t_test([0.8], [0.7, 0.6]) is None
    close = welch_t_test([0.80, 0.82, 0.81], [0.805, 0.815, 0.812])
    apart = welch_t_test([0.80, 0.82, 0.81], [0.60, 0.62, 0.61])
    assert apart is not None
    assert close is not None
    assert apart < 0.001 < close
    # Unequal variances, by hand: t = 3 / sqrt(1/3 + 4/3), 2.94 degrees of freedom
    assert welch_t_test([9.0, 10.0, 11.0], [5.0, 7.0, 9.0]) == pytest.approx(0.1044, abs=2e-4)


def test_welch_without_spread_is_certain() -> None:
    assert welch_t_test([0.5, 0.5], [0.5, 0.5]) == 1.0
    assert welch_t_test([0.5, 0.5], [0.6, 0.6]) == 0.0


samples = st.lists(st.floats(0.0, 1.0).map(lambda x: round(x, 4)), min_size=2, max_size=6)


@pytest.mark.filterwarnings("ignore:Precision loss")
@given(samples, samples)
def test_welch_is_that_of_scipy(first: list[float], second: list[float]) -> None:
    if len(set(first)) == len(set(second)) == 1:
        return  # scipy has no answer there
    expected = ttest_ind(first, second, equal_var=False).pvalue
    assert welch_t_test(first, second) == pytest.approx(expected, rel=1e-5, abs=1e-9)
