"""Booleans of a split as hexadecimal text, and as integers that are combined bit by bit."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast

import numpy as np

if TYPE_CHECKING:  # tables are rendered without waiting for torch
    from torch import Tensor


def pack_outcomes(outcomes: "Iterable[bool] | Tensor") -> str:
    """Booleans as hexadecimal digits: the first is the highest bit, zeros fill the last byte."""
    return np.packbits(np.asarray(as_list(outcomes), dtype=bool)).tobytes().hex()


def packed_bits(text: str, n: int) -> int:
    """Packed booleans as an ``n``-bit integer whose highest bit is the first.

    Raises:
        ValueError: If the text is not ``n`` packed booleans.
    """
    padding = -n % 8
    if len(text) != (n + padding) // 4:
        raise ValueError(f"{len(text)} hexadecimal digits do not hold {n} outcomes")
    value = int(text or "0", 16)
    if value & ((1 << padding) - 1):
        raise ValueError(f"there are outcomes beyond the first {n}")
    return value >> padding


def listed(bits: int, n: int) -> list[bool]:
    """The booleans of an ``n``-bit integer, from the highest bit down."""
    return [bit == "1" for bit in f"{bits:0{n}b}"] if n else []


def as_list(values: "Iterable[Any] | Tensor") -> list[Any]:
    """A tensor's or an iterable's values."""
    found = values.tolist() if hasattr(values, "tolist") else list(values)
    return cast(list[Any], found)
