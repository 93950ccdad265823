"""Booleans of a split as hexadecimal text."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Bits = NDArray[np.bool_]


def pack_outcomes(outcomes: ArrayLike) -> str:
    """Booleans as hexadecimal digits: the first is the highest bit, zeros fill the last byte."""
    return np.packbits(np.asarray(outcomes, dtype=bool)).tobytes().hex()


def unpack_outcomes(text: str, n: int) -> Bits:
    """The ``n`` booleans of a text.

    Raises:
        ValueError: If the text is not ``n`` packed booleans.
    """
    if len(text) != 2 * -(-n // 8):
        raise ValueError(f"{len(text)} hexadecimal digits do not hold {n} outcomes")
    try:
        packed: NDArray[Any] = np.frombuffer(bytes.fromhex(text), dtype=np.uint8)
    except ValueError as error:
        raise ValueError(f"{text[:20]!r} has other characters than hexadecimal digits") from error
    bits = np.unpackbits(packed).astype(bool)
    if bits[n:].any():
        raise ValueError(f"there are outcomes beyond the first {n}")
    return bits[:n]
