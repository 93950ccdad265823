"""Intervals of accuracies and tests between rows; scipy is imported where it is needed."""

from collections.abc import Sequence


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


def paired_interval(first: Sequence[float], second: Sequence[float]) -> tuple[float, float] | None:
    """95 % t interval of the mean of ``first - second``, paired by run.

    Args:
        first: A number per run.
        second: The same for the other method, in the same order of runs.

    Returns:
        Both ends; ``None`` with fewer than two runs. Where the differences agree, they are both
        ends.
    """
    differences = [a - b for a, b in zip(first, second, strict=True)]
    if len(differences) < 2:
        return None
    if max(differences) - min(differences) < 1e-12:
        return differences[0], differences[0]
    from scipy.stats import ttest_rel

    low, high = ttest_rel(first, second).confidence_interval(0.95)
    return float(low), float(high)
