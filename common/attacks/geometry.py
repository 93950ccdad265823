"""Radii, norms, projections, step directions and random starts: what the attacks share.

Tensors hold one image per row, ``(N, ...)``; norms and balls are those of each image.
"""

import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from common.attacks.randomness import ExampleRandom
from common.errors import ConfigurationError, check_choice, check_in_pixels

Norm = Literal["linf", "l2", "l1"]
Random = torch.Generator | ExampleRandom | None
"""Where noise comes from; ``None`` is torch's global generator."""


def parse_radius(value: float | str, norm: Norm = "linf", name: str = "eps") -> float:
    """A length in pixel units: a number, or a fraction as papers print it, ``8/255``, ``0.8/255``.

    Raises:
        ConfigurationError: If it cannot be read, is negative or not finite, or, in the linf norm,
            is above 1; or if there is no such norm.
    """
    check_choice("norm", norm, Norm)
    try:
        if isinstance(value, str):
            numerator, _, denominator = value.replace(" ", "").partition("/")
            if len(value) > 100 or re.search(r"[eE][+-]?[\d_]{4}", value):
                raise ValueError  # the fraction would take all memory
            number = float(Fraction(numerator) / Fraction(denominator or 1))
        else:
            number = float(value)
    except (TypeError, ValueError, ZeroDivisionError, OverflowError):
        number = math.nan
    if not math.isfinite(number) or number < 0.0:
        raise ConfigurationError(
            f"{name} must be a number of at least 0 or a fraction such as '8/255', got "
            f"{str(value)[:80]!r}"
        )
    if norm == "linf":
        check_in_pixels(name, number)
    return number


def parse_step(value: float | str, eps: float, norm: Norm) -> float:
    """A length as :func:`parse_radius` reads it, or a part of the radius: ``eps/10``."""
    if isinstance(value, str) and value.replace(" ", "").startswith("eps/"):
        divisor = parse_radius(value.replace(" ", "")[4:], "l2", "the divisor of step_size")
        if divisor == 0.0:
            raise ConfigurationError(f"step_size divides by zero: {value!r}; write eps/10")
        return eps / divisor
    return parse_radius(value, norm, "step_size")


def check_count(name: str, value: int, least: int) -> int:
    """The value, refused if it is no whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigurationError(f"{name} must be a whole number of at least {least}, got {value}")
    return value


def check_number(
    name: str, value: float, most: float = math.inf, *, is_positive: bool = False
) -> float:
    """The value as a float, refused if negative, not finite, above ``most`` or an excluded zero."""
    is_allowed = math.isfinite(value) and (value > 0.0 if is_positive else value >= 0.0)
    if not is_allowed or value > most:
        least = "above 0" if is_positive else "of at least 0"
        end = "" if math.isinf(most) else f" and at most {most:g}"
        raise ConfigurationError(f"{name} must be a finite number {least}{end}, got {value}")
    return float(value)


def as_pixels(x: Tensor) -> Tensor:
    """A detached copy of the images in float32, or float64 if x is.

    Raises:
        ValueError: If x is not floating point.
    """
    if not x.is_floating_point():
        raise ValueError(f"x must be floating-point pixels in [0, 1], got {x.dtype}")
    return x.detach().to(torch.promote_types(x.dtype, torch.float32), copy=True)


def finite(values: Tensor) -> Tensor:
    """The values, with zeros for NaN and infinity."""
    return values.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def per_example(flags: Tensor, x: Tensor) -> Tensor:
    """``(N,)`` -> ``(N, 1, ...)`` with as many axes as x."""
    return flags.view(-1, *[1] * (x.ndim - 1))


def norm_of(x: Tensor, order: float) -> Tensor:
    """Per-example norm of order 1, 2 or inf, ``(N, 1, ...)``."""
    norms: Tensor = torch.linalg.vector_norm(x, order, tuple(range(1, x.ndim)), keepdim=True)
    return norms


def normalised(gradient: Tensor, order: float) -> Tensor:
    """Each example's gradient divided by its norm; a zero gradient stays zero.

    The division by the largest entry comes first: the squares of a confident network's gradients
    underflow in float32.
    """
    tiny = torch.finfo(gradient.dtype).tiny
    scaled = gradient / norm_of(gradient, math.inf).clamp_min(tiny)
    return scaled / norm_of(scaled, order).clamp_min(tiny)


def sparse_direction(gradient: Tensor, x_adv: Tensor, density: float) -> Tensor:
    """Sign of the largest gradients over their count (SLIDE, Tramèr & Boneh 2019, Algorithm 1).

    Pixels at the border of the box whose gradient points outwards do not count.
    """
    blocked = ((x_adv <= 0.0) & (gradient < 0.0)) | ((x_adv >= 1.0) & (gradient > 0.0))
    free = gradient.masked_fill(blocked, 0.0).flatten(1)
    largest = free.abs().topk(max(1, round(density * free.shape[1])), dim=1).indices
    sign = torch.zeros_like(free).scatter_(1, largest, free.gather(1, largest).sign())
    return (sign / norm_of(sign, 1).clamp_min(1.0)).view(x_adv.shape)


def steepest(gradient: Tensor, x_adv: Tensor, norm: Norm, l1_density: float = 0.01) -> Tensor:
    """The direction of length one in ``norm`` that increases a loss of this gradient fastest.

    The sign (linf), the normalised gradient (l2), or :func:`sparse_direction` (l1).
    """
    check_choice("norm", norm, Norm)
    if norm == "linf":
        return gradient.sign()
    return (
        normalised(gradient, 2) if norm == "l2" else sparse_direction(gradient, x_adv, l1_density)
    )


def projection(x: Tensor, eps: float, norm: Norm) -> Callable[[Tensor], Tensor]:
    """The function that brings images into the ball of radius eps around x and into [0, 1]."""
    check_choice("norm", norm, Norm)
    if norm == "linf":
        lower, upper = (x - eps).clamp_(min=0.0), (x + eps).clamp_(max=1.0)
        return lambda x_adv: x_adv.clamp(lower, upper)
    if norm == "l2":
        return lambda x_adv: (x + project_l2(x_adv - x, eps)).clamp_(0.0, 1.0)
    # Box first: soft thresholding would take from pixels the box cuts anyway. What it shrinks
    # towards a point of the box stays inside; the clamp afterwards only takes away rounding.
    return lambda x_adv: (x + project_l1(x_adv.clamp(0.0, 1.0) - x, eps)).clamp_(0, 1)


def project_l2(delta: Tensor, eps: float) -> Tensor:
    """The nearest point of the l2 ball."""
    tiny = torch.finfo(delta.dtype).tiny
    return delta * (eps / norm_of(delta, 2).clamp_min(tiny)).clamp_max(1.0)


def project_l1(delta: Tensor, eps: float) -> Tensor:
    """The nearest point of the l1 ball: soft thresholding (Duchi et al. 2008, Figure 1)."""
    size = delta.flatten(1).abs()
    descending = size.sort(dim=1, descending=True).values
    excess = descending.cumsum(dim=1) - eps
    rank = torch.arange(1, size.shape[1] + 1, device=delta.device, dtype=delta.dtype)
    kept = (descending * rank > excess).sum(dim=1, keepdim=True).clamp_min(1)
    threshold = (excess.gather(1, kept - 1) / kept).clamp_min(0.0)
    projected = delta.sign() * (size - threshold).clamp_min(0.0).view(delta.shape)
    tiny = torch.finfo(delta.dtype).tiny
    # The cumulative sum of many pixels is rounded; the ball must hold all the same.
    return projected * (eps / norm_of(projected, 1).clamp_min(tiny)).clamp_max(1.0)


def uniform_in_ball(generator: Random, x: Tensor, eps: float, norm: Norm) -> Tensor:
    """Uniform noise in the ball of radius eps, shaped like x."""
    check_choice("norm", norm, Norm)
    if norm == "linf":
        return uniform(generator, x, x.shape[1:]) * (2.0 * eps) - eps
    one = (1,) * (x.ndim - 1)
    if norm == "l2":
        radius = uniform(generator, x, one).pow(1.0 / math.prod(x.shape[1:]))
        return normalised(normal(generator, x), 2) * radius * eps
    # Exponential spacings: d of d + 1 exponentials over the sum of all are uniform in the simplex.
    spacings = -torch.log1p(-uniform(generator, x, x.shape[1:]))
    rest = -torch.log1p(-uniform(generator, x, one))
    signs = (uniform(generator, x, x.shape[1:]) - 0.5).sign()
    return eps * signs * spacings / (norm_of(spacings, 1) + rest)


def uniform(generator: Random, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Uniform in [0, 1), ``(N, *shape)``, in the type and on the device of x."""
    return _drawn("uniform", generator, x, shape)


def normal(generator: Random, x: Tensor) -> Tensor:
    """Standard normal, shaped like x, in its type and on its device."""
    return _drawn("normal", generator, x, x.shape[1:])


def _drawn(
    kind: Literal["uniform", "normal"], generator: Random, x: Tensor, shape: tuple[int, ...]
) -> Tensor:
    if isinstance(generator, ExampleRandom):
        noise: Tensor = getattr(generator, kind)(shape)
    else:
        device = x.device if generator is None else generator.device
        draw = torch.rand if kind == "uniform" else torch.randn
        noise = draw((len(x), *shape), generator=generator, device=device)
    if len(noise) != len(x):
        raise ValueError(
            f"the generator was made for {len(noise)} examples and the batch has {len(x)}; make it "
            "from this batch's index"
        )
    return noise.to(x)
