"""Intervals of accuracies and tests between rows; scipy is imported where it is needed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

LEVEL = 0.05
"""Level of two-sided tests and of their intervals."""


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The score interval of a proportion (Wilson, JASA 22:209, 1927).

    It says how far another sample of test examples could move an accuracy, and nothing about
    another training run.

    Args:
        successes: How many of the examples.
        n: Number of examples.
        confidence: Probability that the interval holds the true proportion, in (0, 1).

    Returns:
        Both ends, in [0, 1].

    Raises:
        ValueError: If there are no examples, more successes than examples, or no such confidence.
    """
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"expected 0 <= successes <= n and n >= 1, got {successes} of {n}")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    from scipy.stats import binomtest

    low, high = binomtest(successes, n).proportion_ci(confidence, method="wilson")
    return float(low), float(high)


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """Two-sided p value of the exact McNemar test (McNemar, Psychometrika 12:153, 1947).

    Were two classifiers equally good, each example that only one of them gets right would be as
    likely to be the one's as the other's; examples on which they agree say nothing.

    Args:
        only_a: Examples that only the first gets right.
        only_b: Examples that only the second gets right.

    Returns:
        The p value; 1 where no example tells them apart.

    Raises:
        ValueError: If a count is negative.
    """
    if min(only_a, only_b) < 0:
        raise ValueError(f"counts must not be negative, got {only_a} and {only_b}")
    from scipy.stats import binomtest

    n = only_a + only_b
    return float(binomtest(only_a, n).pvalue) if n else 1.0


def welch_t_test(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Two-sided p value of Welch's t-test of two samples (Welch, Biometrika 34:28, 1947).

    Here a sample is a number per training run, so that the p value is about runs and not about
    test examples.

    Args:
        first: A number per run.
        second: The same for the other method.

    Returns:
        The p value; ``None`` with fewer than two runs of either. Where neither varies at all, 1
        if they agree and 0 if they do not.
    """
    if min(len(first), len(second)) < 2:
        return None
    if len(set(first)) == len(set(second)) == 1:
        return 1.0 if first[0] == second[0] else 0.0
    from scipy.stats import ttest_ind

    return float(ttest_ind(first, second, equal_var=False).pvalue)


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences over seeds, with the paired t-test against a threshold.

    Attributes:
        mean: In the unit of the numbers.
        low: Lower end of the 95 % t interval of the mean; minus infinity with one seed.
        high: Upper end.
        p: p value of the two-sided paired t-test; 1 with one seed.
        seeds: Number of pairs.
        threshold: Value of the mean under the null hypothesis.
    """

    mean: float
    low: float
    high: float
    p: float
    seeds: int
    threshold: float = 0.0

    @property
    def is_up(self) -> bool:
        """Whether the mean is significantly above the threshold."""
        return self.p < LEVEL and self.mean > self.threshold

    @property
    def is_down(self) -> bool:
        """Whether the mean is significantly below the threshold."""
        return self.p < LEVEL and self.mean < self.threshold

    def text(self, digits: int = 1) -> str:
        """Mean and interval; the mean alone with one seed."""
        middle = f"{self.mean:+.{digits}f}"
        if not math.isfinite(self.low):
            return middle
        return f"{middle} [{self.low:+.{digits}f}, {self.high:+.{digits}f}]"


def paired_t_test(numbers: Sequence[float], threshold: float = 0.0) -> Difference | None:
    """Two-sided t-test of the differences of pairs of runs; ``None`` without any.

    Differences that do not vary have the p value 1 at the threshold and 0 elsewhere.

    Args:
        numbers: One difference per pair.
        threshold: The mean under the null hypothesis.
    """
    if not numbers:
        return None
    n, middle = len(numbers), fmean(numbers)
    if n == 1:
        return Difference(middle, -math.inf, math.inf, 1.0, n, threshold)
    if max(numbers) - min(numbers) <= 1e-9 * max(map(abs, numbers)):
        p = 1.0 if math.isclose(middle, threshold, abs_tol=1e-12) else 0.0
        return Difference(middle, middle, middle, p, n, threshold)
    from scipy.stats import ttest_rel  # slow to import

    found = ttest_rel(numbers, [threshold] * n)
    low, high = found.confidence_interval(1.0 - LEVEL)
    interval = (threshold + float(low), threshold + float(high))
    return Difference(middle, *interval, float(found.pvalue), n, threshold)
