"""Checks of words on a command line; argparse names the option."""

import math
from argparse import ArgumentTypeError

import torch


def positive(word: str) -> int:
    """A whole number of at least 1."""
    try:
        value = int(word)
    except ValueError:
        value = 0
    if value < 1:
        raise ArgumentTypeError(f"expected a whole number of at least 1, got {word!r}")
    return value


def minutes(word: str) -> float:
    """More than half a minute, and no more than a week."""
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not 0.5 < value <= 7 * 24 * 60:
        raise ArgumentTypeError(f"expected more than 0.5 minutes and at most a week, got {word!r}")
    return value


def usable(word: str) -> str:
    """A device that there is."""
    try:
        torch.empty(0, device=word)
    except Exception as error:  # torch has a class for each kind of device
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise ArgumentTypeError(f"the device {word!r} cannot be used: {first[:200]}") from None
    return word
