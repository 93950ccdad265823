"""Random numbers that belong to an example, not to a process.

Each number is a hash of (seed, stream, step, example index, position in the image). Unlike those of
a stateful generator, they do not depend on the batch size, the devices or where a run was resumed.
"""

import copy
import math
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum, unique

import numpy as np
import torch
from torch import Tensor


@unique
class Stream(IntEnum):
    """What random numbers are for. Changing a value changes results."""

    ATTACK = 0  # of adversarial training
    AUGMENTATION = 1  # crops and flips
    EVALUATION = 2  # attacks, noise and measures of an evaluation
    SPLIT = 3  # of a data set into training and validation
    LABELLED = 4  # order of the labelled images beside pseudo-labelled ones
    PSEUDO_LABELLED = 5  # which pseudo-labelled images an epoch takes
    PLACES = 6  # of both within a batch
    VIEWS = 7  # further augmentations of the same image
    SUBSET = 8  # of a split
    CONDITION = 9  # what a conditional network is told in training


_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (the operator ``>>`` copies the sign bit)."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's finaliser (Steele, Lea & Flood 2014): each input bit reaches all output bits."""
    z = (z ^ _shift(z, 30)) * _MIX_1
    z = (z ^ _shift(z, 27)) * _MIX_2
    return z ^ _shift(z, 31)


class ExampleRandom:
    """Independent random numbers for each example of a batch; successive calls give fresh ones.

    Args:
        seed: The run's seed.
        step: What distinguishes draws for one example: an epoch, or an attack's restart.
        index: The examples' positions in their data set, ``(N,)`` int64. Sets the device.
        stream: What the numbers are for.
    """

    def __init__(self, seed: int, step: int, index: Tensor, stream: Stream = Stream.ATTACK) -> None:
        key = torch.zeros_like(index, dtype=torch.int64)
        for part in (seed, stream, step):
            key = _mix(key + _GOLDEN + part)
        self._key = _mix(key + _GOLDEN + index)
        self._drawn = 0

    def of(self, rows: Tensor) -> "ExampleRandom":
        """The further numbers of some of the examples, independent of what is drawn here."""
        part = copy.copy(self)
        part._key = self._key[rows]
        return part

    def _bits(self, shape: Sequence[int]) -> Tensor:
        """Uniform 53-bit integers, ``(N, *shape)``."""
        size = math.prod(shape)
        counter = torch.arange(
            self._drawn + 1, self._drawn + 1 + size, dtype=torch.int64, device=self._key.device
        )
        self._drawn += size
        z = _mix(_mix(self._key[:, None] + counter * _GOLDEN))
        return _shift(z, 11).reshape(-1, *shape)

    def uniform(self, shape: Sequence[int], low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniform float32 in ``[low, high)``, ``(N, *shape)``."""
        unit = _shift(self._bits(shape), 29).to(torch.float32) * 2.0**-24  # 24 bits are exact
        return low + (high - low) * unit

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Standard normal float32, ``(N, *shape)`` (Box & Muller 1958)."""
        radius = torch.sqrt(-2.0 * torch.log1p(-self.uniform(shape)))
        return radius * torch.cos(2.0 * math.pi * self.uniform(shape))

    def integers(self, high: int, shape: Sequence[int]) -> Tensor:
        """Uniform int64 in ``[0, high)``, ``(N, *shape)`` (modulo bias below ``high / 2**53``)."""
        return self._bits(shape) % high


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch (on the CPU and ``device``), numpy and Python; restore their states afterwards."""
    others = random.getstate(), np.random.get_state()  # noqa: NPY002 (foreign models use it)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            # The states of devices that are not in use are not restored.
            used = torch.default_generator if device.type == "cpu" else torch
            used.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            yield
    finally:
        random.setstate(others[0])
        np.random.set_state(others[1])  # noqa: NPY002


def run_seed() -> int:
    """The seed given to ``seed_everything``, 0 if it was not called."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))
