"""Random corruptions of images, without an adversary."""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from common.attacks.geometry import (
    as_pixels,
    check_count,
    check_number,
    normal,
    parse_radius,
    uniform,
)
from common.attacks.randomness import ExampleRandom
from common.attacks.settings import Settings
from common.errors import ConfigurationError


class Noise(Settings, ABC):
    """Noise of one kind at several strengths.

    Args:
        levels: Strengths, numbers or fractions such as ``8/255``; the subclass says what they
            measure.
        draws: Number of independent draws per example.
        seed: Of the draws; ``None`` takes the run's.

    Raises:
        ConfigurationError: If a level is out of range or listed twice, or there is none.
    """

    largest = 1.0
    """The largest level."""

    def __init__(self, levels: list[float | str], draws: int = 1, seed: int | None = None) -> None:
        self.levels = [self._level(level) for level in levels]
        self.draws = check_count("draws", draws, 1)
        self.seed = None if seed is None else check_count("seed", seed, 0)
        if not self.levels or len(set(self.levels)) < len(self.levels):
            raise ConfigurationError(
                f"levels must list at least one strength and none twice, got {levels}"
            )

    def apply(self, x: Tensor, level: float | str, random: ExampleRandom) -> Tensor:
        """Images ``(N, C, ...)`` with fresh noise of any level, clamped to [0, 1].

        Raises:
            ValueError: If x is not floating point, or ``random`` was made for other examples.
        """
        return self._noisy(as_pixels(x), self._level(level), random).clamp(0.0, 1.0)

    @abstractmethod
    def _noisy(self, x: Tensor, level: float, random: ExampleRandom) -> Tensor: ...

    def _level(self, value: float | str) -> float:
        level = parse_radius(value, "l2", "a level")
        name = f"a level of {type(self).__name__} (pixels are in [0, 1])"
        return check_number(name, level, self.largest, is_positive=True)


class UniformNoise(Noise):
    """Independent uniform noise in [-level, level) on every value; levels in (0, 1].

    A random point of the linf ball, which an attack of that radius has to beat.
    """

    def _noisy(self, x: Tensor, level: float, random: ExampleRandom) -> Tensor:
        return x + (2.0 * uniform(random, x, x.shape[1:]) - 1.0) * level


class GaussianNoise(Noise):
    """Independent normal noise of standard deviation level, before clipping; any level above 0."""

    largest = math.inf

    def _noisy(self, x: Tensor, level: float, random: ExampleRandom) -> Tensor:
        return x + normal(random, x) * level


class SaltAndPepperNoise(Noise):
    """Each pixel turns black or white, all channels together, with probability level in (0, 1].

    Both colours are equally likely; the other pixels stay as they are.
    """

    def _noisy(self, x: Tensor, level: float, random: ExampleRandom) -> Tensor:
        u = uniform(random, x, (1, *x.shape[2:]))
        return torch.where(u < level, (u >= level / 2.0).to(x), x)
