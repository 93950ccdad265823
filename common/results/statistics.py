"""What finite test sets and few seeds leave open: intervals and comparisons."""

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, variance


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
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    middle = successes + z * z / 2
    half = z * math.sqrt(successes * (n - successes) / n + z * z / 4)
    low = (middle - half) / (n + z * z) if successes > 0 else 0.0
    high = (middle + half) / (n + z * z) if successes < n else 1.0
    return low, high


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
    n = only_a + only_b
    ways = tail = 1  # of getting 0 of n; whole numbers, so that no tail is rounded away
    for i in range(min(only_a, only_b)):
        ways = ways * (n - i) // (i + 1)
        tail += ways
    return min(1.0, 2 * tail / (1 << n))


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
    spread = [variance(sample) / len(sample) for sample in (first, second)]
    if not any(spread):
        return 1.0 if fmean(first) == fmean(second) else 0.0
    from scipy.stats import t  # takes a second, which tables without comparisons need not wait

    freedom = sum(spread) ** 2 / sum(
        part**2 / (len(sample) - 1) for part, sample in zip(spread, (first, second), strict=True)
    )
    return float(2.0 * t.sf(abs(fmean(first) - fmean(second)) / math.sqrt(sum(spread)), freedom))
