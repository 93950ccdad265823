"""The paired t-test, verdicts from it, and their table."""

import math

import pytest
from scipy.stats import ttest_1samp, ttest_rel

from common.analysis.claims import (
    Claim,
    Judgement,
    by_seed,
    judge,
    paired_difference,
    t_test,
    verdict_table,
)


def test_a_difference_is_the_paired_t_test() -> None:
    first, second = [0.5, 0.7, 0.9], [0.4, 0.5, 0.6]
    found = paired_difference(
        {**dict(enumerate(first)), 7: 0.0}, dict(enumerate(second)), scale=100.0
    )
    assert found is not None
    expected = ttest_rel(first, second)
    low, high = expected.confidence_interval(0.95)
    assert (found.mean, found.seeds) == (pytest.approx(20.0), 3)
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx((100 * low, 100 * high))
    assert found.text() == f"+20.0 [{100 * low:+.1f}, {100 * high:+.1f}]"
    assert (found.is_up, found.is_down) == (expected.pvalue < 0.05, False)
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


def test_a_threshold_moves_the_null_hypothesis() -> None:
    values = {0: 2.0, 1: 2.4, 2: 2.3}
    found = t_test(values, 3.0)
    assert found is not None
    assert found.p == pytest.approx(ttest_1samp(list(values.values()), 3.0).pvalue)
    assert (found.is_up, found.is_down) == (False, True)


def test_numbers_that_do_not_vary_decide_nothing() -> None:
    """One example of 100 that one network gets right in all three seeds is no evidence."""
    same = dict.fromkeys(range(3), 0.01)
    found = t_test(same)
    assert found is not None
    assert (found.p, found.is_up, found.is_down) == (1.0, False, False)
    verdict = judge("a", "more", same, [0, 1, 2], above=0.0).judgements[""]
    assert (verdict.verdict, verdict.reason[:18]) == ("not decided", "0.01 of every seed")


@pytest.mark.parametrize(
    ("values", "above", "below"),
    [
        ((2.0, 2.1, 2.2), "supported", "contradicted"),
        ((-2.0, -2.1, -2.2), "contradicted", "supported"),
        ((-2.0, 0.1, 2.2), "not decided", "not decided"),
        ((2.0, 2.1), "not run", "not run"),
        ((), "not run", "not run"),
    ],
)
def test_verdicts_turn_out_every_way(values, above, below) -> None:
    found = dict(enumerate(values))
    claim = judge("a", "more", found, [0, 1, 2], above=0.0, beside={"other": {0: 7.25}})
    assert claim.verdict == above
    assert judge("a", "less", found, [0, 1, 2], below=0.0).verdict == below
    (judgement,) = claim.judgements.values()
    assert judgement.per_seed == found
    assert "other 7.25" in judgement.reason


def test_a_claim_about_every_seed_needs_no_test_but_one_threshold() -> None:
    for values, verdict in (({0: 0.0, 1: 0.0}, "supported"), ({0: 0.0, 1: 0.1}, "contradicted")):
        assert judge("a", "none", values, [0, 1], below=0.0, every=True).verdict == verdict
    for limits in ({}, {"above": 0.0, "below": 1.0}):
        with pytest.raises(ValueError, match="one of above and below"):
            judge("a", "more", {0: 1.0}, [0], **limits)
    alone = judge("a", "more", {3: 0.8}, [3], above=0.0)
    assert alone.verdict == "not decided", "one seed decides nothing"


def test_numbers_that_lack_or_are_not_finite_do_not_count() -> None:
    found = {("a", 0): {"x": {"y": 1}}, ("a", 1): {"x": {"y": math.nan}}, ("a", 2): {"x": None}}
    assert by_seed(found, "a", "x", "y") == {0: 1.0}


def test_claims_become_a_line_for_each_variant() -> None:
    claims = [
        Claim("C1", "more", {"a": Judgement("supported", "1"), "b": Judgement("not run", "2")}),
        Claim("C2", "less", {"a": Judgement("contradicted", "3")}),
    ]
    table = verdict_table(claims, "A note.")
    assert table["lines"] == [
        ["C1", "more", "a", "supported", "1"],
        ["", "", "b", "not run", "2"],
        ["C2", "less", "a", "contradicted", "3"],
    ]
    plain = verdict_table([judge("a", "more", {}, [0], above=0.0)])
    assert len(plain["header"]) == len(plain["lines"][0]) == 4, "no column without variants"
    with pytest.raises(ValueError, match="holds"):
        Judgement("holds", "")  # type: ignore[arg-type]
