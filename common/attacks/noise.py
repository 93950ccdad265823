"""Random corruption without an adversary: what a robust classifier should stand all the more."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from common.attacks.geometry import as_pixels, check_count, normal, parse_radius, uniform
from common.attacks.randomness import ExampleRandom
from common.attacks.settings import Settings
from common.errors import ConfigurationError


class Noise(Settings, ABC):
    """Noise of one kind at several strengths.

    Args:
        levels: Strengths, numbers or fractions such as ``8/255``; what they measure is said by the
            kind of noise.
        draws: How many independent ones each example gets.
        seed: Of the draws; ``None`` takes the run's.

    Raises:
        ConfigurationError: If a level is out of range or there is none, or one comes twice.
    """

    largest: float | None
    """The largest level that has a meaning, ``None`` where there is no end."""

    def __init__(self, levels: list[float | str], draws: int = 1, seed: int | None = None) -> None:
        self.levels = [self._level(level) for level in levels]
        self.draws = check_count("draws", draws, 1)
        self.seed = None if seed is None else check_count("seed", seed, 0)
        if not self.levels or len(set(self.levels)) < len(self.levels):
            raise ConfigurationError(
                f"levels must list at least one strength and none twice, got {levels}"
            )

    def apply(self, x: Tensor, level: float | str, random: ExampleRandom) -> Tensor:
        """Images with fresh noise, brought back into [0, 1].

        Args:
            x: Images in [0, 1], ``(N, C, ...)``.
            level: The strength, one of ``levels`` or another.
            random: Made from the examples' indices, so that an example's noise does not depend on
                its batch; the next call draws anew.

        Returns:
            Noisy images, detached; float32, or float64 if x is.

        Raises:
            ValueError: If x is not floating point, or ``random`` was made for other examples.
        """
        return self._noisy(as_pixels(x), self._level(level), random).clamp(0.0, 1.0)

    @abstractmethod
    def _noisy(self, x: Tensor, level: float, random: ExampleRandom) -> Tensor: ...

    def _level(self, value: float | str) -> float:
        level = parse_radius(value, "l2", "a level")
        if level == 0.0 or (self.largest is not None and level > self.largest):
            end = "" if self.largest is None else f" and at most {self.largest:g}"
            raise ConfigurationError(
                f"a level of {type(self).__name__} must be above 0{end} (pixels are in [0, 1]), "
                f"got {value}"
            )
        return level

    def __repr__(self) -> str:
        """Levels and, where there are several, draws."""
        draws = f", draws={self.draws}" if self.draws > 1 else ""
        return f"{type(self).__name__}({self.levels}{draws})"


class UniformNoise(Noise):
    """Independent uniform noise in [-level, level) on every value; levels in (0, 1].

    A random point of the linf ball: an attack of that radius that breaks no more than this does is
    no attack.
    """

    largest = 1.0

    def _noisy(self, x: Tensor, level: float, random: ExampleRandom) -> Tensor:
        return x + (2.0 * uniform(random, x, x.shape[1:]) - 1.0) * level


class GaussianNoise(Noise):
    """Independent normal noise of standard deviation level, before clipping; any level above 0."""

    largest = None

    def _noisy(self, x: Tensor, level: float, random: ExampleRandom) -> Tensor:
        return x + normal(random, x) * level


class SaltAndPepperNoise(Noise):
    """Each pixel turns black or white, all channels together, with probability level in (0, 1].

    One half black and one half white in expectation; the other pixels stay as they are.
    """

    largest = 1.0

    def _noisy(self, x: Tensor, level: float, random: ExampleRandom) -> Tensor:
        u = uniform(random, x, (1, *x.shape[2:]))
        return torch.where(u < level, (u >= level / 2.0).to(x), x)
