"""Robust WRN: the network, its size in closed form, the rule, and the grids of networks.

``D = (D1, ..., DS)`` are residual blocks per stage, ``W = (W1, ..., WS)`` widening factors, and
``channels = (16, 16 W1, 32 W2, 64 W3, ...)``, the first entry being the stem's. ``K`` classes.

Tags name the source of a statement: [P] the paper, [C] its official code (HanxunH/RobustWRN),
[F] a follow-up study on the same networks (S. Huang et al., CVPR 2023, arXiv 2212.11005),
[R] our reconstruction where nothing public settles it.
"""

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import nn

from common.errors import ConfigurationError, check_choice
from common.evaluation.measures import cost
from common.networks.backbone import Backbone
from common.networks.insertion import given_shape
from common.networks.normalize import Statistics
from common.networks.resnet import Activation, check_positive, check_stages, conv3x3, named_sequence
from common.networks.wide_resnet import WideResNet, initialize

Measure = Literal["parameters", "macs"]
"""What a budget counts: parameters, or multiply-accumulates of convolutions and linear layer."""

STEM_WIDTH = 16

# ------------------------------------------------------------------------------------- network


def channels_of(widths: Sequence[int]) -> tuple[int, ...]:
    """Channels (16, 16 W1, 32 W2, 64 W3, ...) of widening factors W, stem first [C, F].

    Raises:
        ConfigurationError: If a factor is below 1.
    """
    if not widths or min(widths) < 1:
        raise ConfigurationError(
            f"widths are widening factors of at least 1, one for each stage, got {list(widths)}"
        )
    return (STEM_WIDTH, *(16 * 2**s * w for s, w in enumerate(widths)))


def usual_strides(stages: int) -> tuple[int, ...]:
    """Stride 1 in the first stage and 2 in each of the others, (1, 2, 2) for three [C]."""
    return (1,) + (2,) * (stages - 1)


class RobustWideResNet(WideResNet):
    """A wide residual network with depth and width free per stage; by default WRN-34-R [C].

    Where the width changes, the 1x1 shortcut reads the activated input; where only the resolution
    does, the raw input. The stem is one convolution without batch-norm or activation, or for large
    images conv7x7 (stride 2) - BN - ReLU - max-pool (stride 2) [C].

    Args:
        depths: Residual blocks per stage, D; any number of stages.
        widths: Widening factors per stage, W. Unused where ``channels`` is given.
        num_classes: Number of classes K.
        in_channels: Channels of the images.
        mean: Means of :class:`~common.networks.normalize.Normalize`; ``None`` keeps the pixels, as
            every published model does.
        std: Its standard deviations.
        channels: Channels of the stem and of each stage, one more than there are stages.
        strides: Stride of each stage's first block; ``None`` is (1, 2, 2, ...).
        stem_stride: Stride of the 3x3 stem.
        drop_rates: Dropout inside the blocks of each stage; every published configuration has 0.
        activations: Makes one activation, for each stage; ``None`` is ReLU everywhere.
        imagenet_stem: The stem for large images, instead of the 3x3 convolution.

    Raises:
        ConfigurationError: If the lists do not describe the same stages.
    """

    def __init__(
        self,
        depths: Sequence[int] = (5, 5, 5),
        widths: Sequence[int] = (20, 20, 8),
        num_classes: int = 10,
        in_channels: int = 3,
        mean: Statistics = None,
        std: Statistics = None,
        channels: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
        stem_stride: int = 1,
        drop_rates: Sequence[float] | None = None,
        activations: Sequence[Activation] | None = None,
        imagenet_stem: bool = False,
    ) -> None:
        channels = channels_of(widths) if channels is None else channels
        strides = usual_strides(len(depths)) if strides is None else strides
        check_configuration(depths, channels, strides)
        check_positive(stem_stride=stem_stride)
        super().__init__(
            num_classes=num_classes,
            in_channels=in_channels,
            mean=mean,
            std=std,
            depths=depths,
            widths=channels[1:],
            strides=strides,
            stem_width=channels[0],
            drop_rates=drop_rates,
            activations=activations,
        )
        if imagenet_stem and stem_stride != 1:
            raise ConfigurationError(
                f"stem_stride is {stem_stride} and imagenet_stem is true; that stem has its "
                "own strides, so drop one of the two"
            )
        if imagenet_stem:
            self.stem = named_sequence(
                conv=nn.Conv2d(in_channels, channels[0], 7, stride=2, padding=3, bias=False),
                bn=nn.BatchNorm2d(channels[0]),
                act=nn.ReLU(),
                pool=nn.MaxPool2d(3, stride=2, padding=1),
            ).apply(initialize)
        elif stem_stride != 1:
            self.stem = conv3x3(in_channels, channels[0], stem_stride).apply(initialize)

    def _sized(self, widths: Sequence[int]) -> dict[str, Any]:
        stem = next(m for m in self.stem.modules() if isinstance(m, nn.Conv2d))
        return {"channels": (stem.out_channels, *widths)}


def check_configuration(
    depths: Sequence[int], channels: Sequence[int], strides: Sequence[int]
) -> None:
    """Refuse lists that do not describe the same stages, as a ``ConfigurationError``."""
    if len(channels) != len(depths) + 1:
        raise ConfigurationError(
            f"depths={list(depths)} need as many widths, or one channel count more for the stem, "
            f"got channels={list(channels)}"
        )
    check_stages(depths, channels[1:], strides)
    check_positive(stem_width=channels[0])


# ---------------------------------------------------------------------------------------- size


def count_parameters(
    depths: Sequence[int],
    channels: Sequence[int],
    num_classes: int = 10,
    in_channels: int = 3,
    strides: Sequence[int] | None = None,
) -> int:
    r"""Parameters of a :class:`RobustWideResNet` with its 3x3 stem, in closed form [C].

    .. math:: P = 9 c_{in} c_0 + \sum_s \left[ 2a + 9ab + 2b + 9b^2 + [\text{shortcut}]\, ab
        + (D_s - 1)(4b + 18b^2) \right] + 2 c_S + (c_S + 1) K

    with :math:`a = c_{s-1}`, :math:`b = c_s`. A stage has a shortcut convolution exactly where its
    width or its resolution changes.
    """
    count = 9 * in_channels * channels[0]
    for depth, _, a, b, shortcut in _stages(depths, channels, strides):
        count += 2 * a + 9 * a * b + 2 * b + 9 * b * b + shortcut
        count += (depth - 1) * (4 * b + 18 * b * b)
    return count + 2 * channels[-1] + (channels[-1] + 1) * num_classes


def count_macs(
    depths: Sequence[int],
    channels: Sequence[int],
    num_classes: int = 10,
    in_channels: int = 3,
    strides: Sequence[int] | None = None,
    size: int = 32,
) -> int:
    r"""Multiply-accumulates of all convolutions and the linear layer for one image [C].

    .. math:: M = 9 c_{in} c_0 h^2 + \sum_s h_s^2 \left[ 9ab + 9b^2 + [\text{shortcut}]\, ab
        + (D_s - 1)\, 18b^2 \right] + c_S K

    with :math:`h` the side of the image and :math:`h_s` the side behind the stride of stage s. The
    published numbers also count batch-norm, which adds some 0.2 % [C].
    """
    count = 9 * in_channels * channels[0] * size**2
    for depth, stride, a, b, shortcut in _stages(depths, channels, strides):
        size = -(-size // stride)
        count += size**2 * (9 * a * b + 9 * b * b + (depth - 1) * 18 * b * b + shortcut)
    return count + channels[-1] * num_classes


def _stages(
    depths: Sequence[int], channels: Sequence[int], strides: Sequence[int] | None
) -> Iterator[tuple[int, int, int, int, int]]:
    """Blocks, stride, channels in and out, and weights of the shortcut of each stage."""
    strides = usual_strides(len(depths)) if strides is None else strides
    check_configuration(depths, channels, strides)
    for depth, stride, (a, b) in zip(depths, strides, itertools.pairwise(channels), strict=True):
        yield depth, stride, a, b, a * b if a != b or stride != 1 else 0


@dataclass(frozen=True)
class Configuration:
    """Depths D and widening factors W of one network, without building it."""

    depths: tuple[int, ...] = (5, 5, 5)
    widths: tuple[int, ...] = (10, 10, 10)

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of the stem and of each stage."""
        return channels_of(self.widths)

    @property
    def name(self) -> str:
        """``d5-5-4`` at W = 10 [P], ``w10-10-8`` at D = 5 [R], else both parts."""
        d, w = "d" + "-".join(map(str, self.depths)), "w" + "-".join(map(str, self.widths))
        if set(self.widths) == {10}:
            return d
        return w if set(self.depths) == {5} else f"{d}-{w}"

    def parameters(self, num_classes: int = 10, in_channels: int = 3) -> int:
        """As :func:`count_parameters`."""
        return count_parameters(self.depths, self.channels, num_classes, in_channels)

    def macs(self, num_classes: int = 10, in_channels: int = 3, size: int = 32) -> int:
        """As :func:`count_macs`."""
        return count_macs(self.depths, self.channels, num_classes, in_channels, size=size)

    def cost(self, measure: Measure, size: int = 32, **images: int) -> int:
        """Parameters or multiply-accumulates, by name."""
        check_choice("measure", measure, Measure)
        if measure == "parameters":
            return self.parameters(**images)
        return self.macs(size=size, **images)


# ---------------------------------------------------------------------------- rule and search


def robust_widths(w: int, ratio: float = 0.4, stages: int = 3) -> tuple[int, ...]:
    """The rule R(w) = (w, ..., w, ratio w): the last stage narrower, everything else as it was.

    The ratio is that of WRN-34-R = R(20) [C]; rounding to the nearest integer, ties up, is [R].

    Raises:
        ConfigurationError: If ``w`` is below 1 or ``ratio`` not positive.
    """
    check_positive(w=w, stages=stages)
    last = math.floor(check_ratio(ratio) * w + Fraction(1, 2))
    return (w,) * (stages - 1) + (max(last, 1),)


def check_ratio(ratio: float) -> Fraction:
    """The ratio in exact arithmetic: 0.29 * 50 is 14.499999999999998 as a float."""
    if not (math.isfinite(ratio) and ratio > 0):
        raise ConfigurationError(f"ratio scales the last stage and must be positive, got {ratio}")
    return Fraction(str(ratio))


def smallest_robust(
    budget: int,
    depths: Sequence[int] = (5, 5, 5),
    measure: Measure = "parameters",
    ratio: float = 0.4,
    **images: int,
) -> int:
    """The smallest w whose R(w) reaches a budget; 20 for that of WRN-34-12 [R].

    ``images`` are ``num_classes``, ``in_channels`` and ``size``, as for :func:`count_macs`.
    """
    check_positive(budget=budget)
    for w in itertools.count(1):
        rule = Configuration(tuple(depths), robust_widths(w, ratio, len(depths)))
        if rule.cost(measure, **images) >= budget:
            break
    return w


def with_budget_rule(
    net: nn.Module,
    ratio: float = 0.4,
    measure: Measure = "parameters",
    step: int = 1,
    image_shape: Sequence[int] | None = None,
) -> Backbone:
    """The rule in any staged network: its last stage narrower, the others wider, at its own budget.

    Widths are multiplied by the smallest number, and that of the last stage by ``ratio`` of it, for
    which the network costs at least as much as the given one [R]. Weights are drawn anew.

    Args:
        net: The base network, one of stages with free widths.
        ratio: Of the factor of the last stage to that of the others.
        measure: What a budget counts.
        step: The width of the first stage is a multiple of it; 16 for whole widening factors.
        image_shape: Channels, height and width of the images, for multiply-accumulates; the command
            line fills it in.

    Raises:
        ConfigurationError: If the network has no free widths, or there is no shape.
    """
    check_choice("measure", measure, Measure)
    check_positive(step=step)
    if not (isinstance(net, Backbone) and len(getattr(net, "widths", ())) > 1):
        raise ConfigurationError(
            f"{type(net).__name__} is no network of stages of common.networks, whose widths could "
            "be changed; apply the rule to the backbone, and other methods to the result"
        )
    image_shape = given_shape(image_shape, "multiply-accumulates depend on the images")
    by, base, image = check_ratio(ratio), net.widths, torch.empty(*image_shape, device="meta")

    def widths(first: int) -> list[int]:
        exact = [Fraction(first * step, base[0]) * width for width in base]
        exact[-1] *= by
        return [max(math.floor(width + Fraction(1, 2)), 1) for width in exact]

    def spent(sizes: Sequence[int]) -> float:
        with torch.device("meta"):
            made = net.resized(sizes)
        if tuple(sizes) == base and _structure(made) != _structure(net):
            raise ConfigurationError(
                f"{type(net).__name__} was changed since it was made, for instance by another "
                "method; apply the rule first, and other methods to the result"
            )
        return cost(made, image)["macs"] if measure == "macs" else _count(made)

    budget = spent(base)
    first = base[0] // step or 1
    first = max(round(first * math.sqrt(budget / spent(widths(first)))), 1)  # costs are quadratic
    while spent(widths(first)) < budget:
        first += 1
    while first > 1 and spent(widths(first - 1)) >= budget:
        first -= 1
    return net.resized(widths(first))


def _shapes(net: nn.Module) -> list[torch.Size]:
    return [parameter.shape for parameter in net.parameters()]


def _structure(net: nn.Module) -> tuple[list[torch.Size], list[tuple[Any, ...]]]:
    """Shapes of parameters, and kinds of modules with what decides the size of their maps."""
    of = ("stride", "kernel_size", "padding", "dilation")
    return _shapes(net), [
        (name, type(module), *(getattr(module, what, None) for what in of))
        for name, module in net.named_modules()
    ]


def _count(net: nn.Module) -> int:
    return sum(shape.numel() for shape in _shapes(net))


def search(
    configurations: Iterable[Configuration],
    budget: int,
    measure: Measure = "parameters",
    **images: int,
) -> Configuration:
    """The smallest of some networks that reaches a budget; the first among equals.

    Raises:
        ConfigurationError: If none of them reaches it.
    """
    check_choice("measure", measure, Measure)
    sized = [(c.cost(measure, **images), c) for c in configurations]
    large = [(cost, c) for cost, c in sized if cost >= budget]
    if not large:
        largest = max((cost for cost, _ in sized), default=0)
        raise ConfigurationError(
            f"none of the {len(sized)} networks has {budget:,} {measure}, the largest has "
            f"{largest:,}; lower the budget or widen the grid"
        )
    return min(large, key=lambda pair: pair[0])[1]


# ------------------------------------------------------------------------------ named networks


def grid(
    depths: Iterable[Sequence[int]] = ((5, 5, 5),), widths: Iterable[Sequence[int]] = ((10,) * 3,)
) -> tuple[Configuration, ...]:
    """Every combination of depth vectors and width vectors."""
    pairs = itertools.product(depths, widths)
    return tuple(Configuration(tuple(d), tuple(w)) for d, w in pairs)


def one_stage_at_a_time(usual: int, reduced: Sequence[int]) -> list[tuple[int, ...]]:
    """``(usual, usual, usual)`` with each entry in turn replaced by each reduced value."""
    return [(*(usual,) * s, value, *(usual,) * (2 - s)) for s in range(3) for value in reduced]


NETWORKS = {
    "WRN-28-10": Configuration((4, 4, 4)),
    "WRN-34-10": Configuration(),
    "WRN-34-12": Configuration(widths=(12, 12, 12)),
    "WRN-34-20": Configuration(widths=(20, 20, 20)),
    "WRN-34-R": Configuration(widths=robust_widths(20)),
}
"""The networks the paper names; WRN-34-12 has the budget of WRN-34-R [P, C]."""

DEPTH_GRID = grid(depths=itertools.product((2, 3, 4, 5, 7, 9), repeat=3))
"""All depths at W = 10, Fig. 1(b). Its labels have one digit per stage [P]; the values are [R]."""

WIDTH_GRID = grid(widths=itertools.product((4, 6, 8, 10, 12, 14, 16, 20), repeat=3))
"""All widths at D = 5; the values are those of [F]."""

STAGE_GRID = (
    Configuration(),
    *grid(widths=one_stage_at_a_time(10, (8, 6, 4, 2))),
    *grid(depths=one_stage_at_a_time(5, (4, 3, 2, 1))),
)
"""WRN-34-10, and with one stage narrower or shallower: 25 networks, the default sweep [R]."""

EQUAL_BUDGET = grid(widths=((12, 12, 12), (20, 20, 8), (10, 20, 8), (4, 10, 12), (4, 4, 13)))
"""About the parameters of WRN-34-12, uniform, by the rule, and against it [R]."""


def named(name: str) -> Configuration:
    """The network called ``WRN-34-R``, ``d5-5-4``, ``w10-10-8`` or ``d4-4-4-w11-13-6``.

    Raises:
        ConfigurationError: If the name is none of these.
    """
    if name in NETWORKS:
        return NETWORKS[name]
    numbers = r"(\d+(?:-\d+)*)"
    found = re.fullmatch(f"d{numbers}-w{numbers}|d{numbers}|w{numbers}", name)
    if found is None:
        raise ConfigurationError(
            f"there is no network {name!r}; names are {', '.join(NETWORKS)}, blocks per stage like "
            "d5-5-4, widening factors like w10-10-8, or both like d4-4-4-w11-13-6"
        )
    d, w = (
        tuple(map(int, part.split("-"))) if part else ()
        for part in (found[1] or found[3], found[2] or found[4])
    )
    depths = d or (5,) * len(w)
    widths = w or (10,) * len(depths)
    check_configuration(depths, channels_of(widths), usual_strides(len(depths)))
    return Configuration(depths, widths)
