"""What a finite test set leaves open: intervals of proportions, and paired comparisons."""

import math
from statistics import NormalDist


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
