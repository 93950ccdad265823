"""Intervals of accuracies and tests between rows; scipy is imported where it is needed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

LEVEL = 0.05
"""Level of two-sided tests and of their intervals."""


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """The 95 % score interval of a proportion, in [0, 1] (Wilson, JASA 22:209, 1927).

    It says how far another sample of test examples could move an accuracy, and nothing about
    another training run.

    Raises:
        ValueError: If there are no examples, or more successes than examples.
    """
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"expected 0 <= successes <= n and n >= 1, got {successes} of {n}")
    from scipy.stats import binomtest

    low, high = binomtest(successes, n).proportion_ci(1.0 - LEVEL, method="wilson")
    return float(low), float(high)


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """Two-sided p value of the exact McNemar test (McNemar, Psychometrika 12:153, 1947).

    Args:
        only_a: Examples that only the first classifier gets right.
        only_b: Examples that only the second gets right.

    Returns:
        The p value; 1 where the classifiers agree on every example.
    """
    if only_a == only_b == 0:
        return 1.0
    from scipy.stats import binomtest

    return float(binomtest(only_a, only_a + only_b).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p values of a family of tests (Holm, Scand. J. Stat. 6:65, 1979)."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences over seeds, with the paired t-test against a threshold.

    Attributes:
        mean: In the unit of the numbers.
        low: Lower end of the 95 % t interval of the mean; minus infinity where nothing is tested.
        high: Upper end.
        p: p value of the two-sided paired t-test; 1 where nothing is tested.
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
    def is_tested(self) -> bool:
        """Whether there are several seeds, whose differences vary."""
        return math.isfinite(self.low)

    @property
    def is_up(self) -> bool:
        """Whether the mean is significantly above the threshold."""
        return self.p < LEVEL and self.mean > self.threshold

    @property
    def is_down(self) -> bool:
        """Whether the mean is significantly below the threshold."""
        return self.p < LEVEL and self.mean < self.threshold

    def text(self, digits: int = 1) -> str:
        """Mean and interval; the mean alone where nothing is tested."""
        middle, low, high = (f"{n:+.{digits}f}" for n in (self.mean, self.low, self.high))
        return f"{middle} [{low}, {high}]" if self.is_tested else middle


def paired_t_test(numbers: Sequence[float], threshold: float = 0.0) -> Difference | None:
    """Two-sided t-test of the differences of pairs of runs; ``None`` without any.

    One difference, or several that do not vary, decide nothing: an accuracy counts examples, so
    that the same example can make equal differences in all seeds.

    Args:
        numbers: One difference per pair.
        threshold: The mean under the null hypothesis.
    """
    if not numbers:
        return None
    n, middle = len(numbers), fmean(numbers)
    if max(numbers) - min(numbers) <= 1e-9 * max(map(abs, numbers)):
        return Difference(middle, -math.inf, math.inf, 1.0, n, threshold)
    from scipy.stats import ttest_1samp

    found = ttest_1samp(numbers, threshold)
    low, high = found.confidence_interval(1.0 - LEVEL)
    return Difference(middle, float(low), float(high), float(found.pvalue), n, threshold)
