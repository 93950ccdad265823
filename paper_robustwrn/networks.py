"""The rule in other families: DenseNet, and networks of searched cells (DARTS, NASNet).

Weights start from PyTorch's defaults [C]. Which reduced networks the paper trained was not found;
those of the configurations are our choice [R]. Tags as in :mod:`paper_robustwrn.method`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import ConfigurationError, check_choice
from common.networks.backbone import Backbone
from common.networks.normalize import Normalize, Statistics
from common.networks.resnet import (
    check_drop_rates,
    check_positive,
    conv1x1,
    conv3x3,
    make_head,
    named_sequence,
)

# ------------------------------------------------------------------------------------ DenseNet


class Bottleneck(nn.Module):
    """BN - ReLU - conv1x1 (4g) - BN - ReLU - conv3x3 (g); new features precede the input [C]."""

    def __init__(self, in_channels: int, growth_rate: int) -> None:
        super().__init__()
        self.new = named_sequence(
            bn1=nn.BatchNorm2d(in_channels),
            act1=nn.ReLU(),
            conv1=conv1x1(in_channels, 4 * growth_rate),
            bn2=nn.BatchNorm2d(4 * growth_rate),
            act2=nn.ReLU(),
            conv2=conv3x3(4 * growth_rate, growth_rate),
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(N, in, H, W)`` to ``(N, g + in, H, W)``."""
        return torch.cat([self.new(x), x], dim=1)


class DenseNet(Backbone):
    """DenseNet for small images, by default DenseNet-121, with the width of each stage free [C].

    A transition BN - ReLU - conv1x1 - average pool leads from stage to stage. Pools round up and
    the last is global, so any image size works.

    Args:
        depths: Bottlenecks per stage.
        channels: Channels at the entry of each stage; the stem has those of the first.
        growth_rate: Channels each bottleneck adds.
        num_classes: Number of classes K.
        in_channels: Channels of the images.
        mean: Means of :class:`~common.networks.normalize.Normalize`; ``None`` keeps the pixels.
        std: Its standard deviations.

    Raises:
        ConfigurationError: If depths and channels differ in length, or a count is below 1.
    """

    def __init__(
        self,
        depths: Sequence[int] = (6, 12, 24, 16),
        channels: Sequence[int] = (64, 128, 256, 512),
        growth_rate: int = 32,
        num_classes: int = 10,
        in_channels: int = 3,
        mean: Statistics = None,
        std: Statistics = None,
    ) -> None:
        super().__init__(in_channels, mean, std)
        check_positive(num_classes=num_classes, growth_rate=growth_rate)
        if not len(depths) == len(channels) >= 1 or min(*depths, *channels) < 1:
            raise ConfigurationError(
                "depths and channels need one value of at least 1 for each stage, got "
                f"depths={list(depths)}, channels={list(channels)}"
            )
        self.stem = conv3x3(in_channels, channels[0])
        self.stages, inside = nn.Sequential(), channels[0]
        for i, (depth, width) in enumerate(zip(depths, channels, strict=True)):
            if i > 0:
                self.stages[-1].add_module(
                    "transition",
                    named_sequence(
                        bn=nn.BatchNorm2d(inside),
                        act=nn.ReLU(),
                        conv=conv1x1(inside, width),
                        pool=nn.AvgPool2d(2, ceil_mode=True),
                    ),
                )
            inside = width + depth * growth_rate
            widths = range(width, inside, growth_rate)
            self.stages.append(nn.Sequential(*(Bottleneck(w, growth_rate) for w in widths)))
        self.head = make_head(
            inside, num_classes, "avg", norm=nn.BatchNorm2d(inside), act=nn.ReLU()
        )


# ---------------------------------------------------------------------- operations and cells


def relu_conv_bn(in_channels: int, out_channels: int) -> nn.Sequential:
    """ReLU - conv1x1 - BN."""
    conv = conv1x1(in_channels, out_channels)
    return nn.Sequential(nn.ReLU(), conv, nn.BatchNorm2d(out_channels))


def depthwise(channels: int, kernel: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    """ReLU - depthwise convolution - conv1x1 - BN."""
    padding = dilation * (kernel - 1) // 2
    each = nn.Conv2d(
        channels, channels, kernel, stride, padding, dilation, groups=channels, bias=False
    )
    return nn.Sequential(nn.ReLU(), each, conv1x1(channels, channels), nn.BatchNorm2d(channels))


class FactorizedReduce(nn.Module):
    """Halves the map: ReLU, two 1x1 convolutions on the even and the odd pixels, BN.

    The official code fails on odd sides; here the odd pixels are followed by a zero [R].

    Raises:
        ConfigurationError: If ``out_channels`` is odd, which two convolutions cannot share.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        if out_channels % 2:
            raise ConfigurationError(
                f"a reduction halves its channels, got {out_channels}; choose an even number"
            )
        self.even = conv1x1(in_channels, out_channels // 2, 2)
        self.odd = conv1x1(in_channels, out_channels // 2, 2)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, in, H, W)`` to ``(N, out, H / 2, W / 2)``, rounded up."""
        x = x.relu()
        shifted = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))[:, :, 1:, 1:]
        out: Tensor = self.bn(torch.cat([self.even(x), self.odd(shifted)], dim=1))
        return out


Op = Literal[
    "skip_connect",
    "max_pool_3x3",
    "avg_pool_3x3",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "sep_conv_7x7",
    "dil_conv_3x3",
    "dil_conv_5x5",
    "conv_7x1_1x7",
]
"""An operation of a cell, as genotypes name it."""


def make_op(name: Op, channels: int, stride: int) -> nn.Module:
    """One operation that keeps the channels."""
    check_choice("name", name, Op)
    kernel = int(name[-1]) if name[-1].isdigit() else 0
    match name:
        case "skip_connect":
            return nn.Identity() if stride == 1 else FactorizedReduce(channels, channels)
        case "max_pool_3x3":
            return nn.MaxPool2d(3, stride, padding=1)
        case "avg_pool_3x3":
            return nn.AvgPool2d(3, stride, padding=1, count_include_pad=False)
        case "sep_conv_3x3" | "sep_conv_5x5" | "sep_conv_7x7":
            return nn.Sequential(*depthwise(channels, kernel, stride), *depthwise(channels, kernel))
        case "dil_conv_3x3" | "dil_conv_5x5":
            return depthwise(channels, kernel, stride, dilation=2)
        case _:  # "conv_7x1_1x7"
            return nn.Sequential(
                nn.ReLU(),
                nn.Conv2d(channels, channels, (1, 7), (1, stride), (0, 3), bias=False),
                nn.Conv2d(channels, channels, (7, 1), (stride, 1), (3, 0), bias=False),
                nn.BatchNorm2d(channels),
            )


def drop_path(x: Tensor, probability: float) -> Tensor:
    """Zero whole examples of ``(N, C, H, W)`` and scale the others up, so that the mean is kept."""
    keep = 1.0 - probability
    return x / keep * x.new_empty(len(x), 1, 1, 1).bernoulli_(keep)


@dataclass(frozen=True)
class Genotype:
    """The two cells of a network.

    ``normal`` and ``reduce`` list (operation, state it reads): two for each node in turn, whose sum
    is the next state. States 0 and 1 are the outputs of the two cells before; ``*_concat`` are the
    states a cell returns.
    """

    normal: Sequence[tuple[Op, int]]
    normal_concat: Sequence[int]
    reduce: Sequence[tuple[Op, int]]
    reduce_concat: Sequence[int]

    def __post_init__(self) -> None:
        for ops, concat in ((self.normal, self.normal_concat), (self.reduce, self.reduce_concat)):
            known = 2 + len(ops) // 2
            for position, (name, state) in enumerate(ops):
                check_choice("an operation", name, Op)
                if not 0 <= state < 2 + position // 2:
                    raise ConfigurationError(
                        f"operation {position} of a cell reads state {state}; there are states 0 "
                        f"to {1 + position // 2} before it"
                    )
            if not concat or min(concat) < 0 or max(concat) >= known:
                raise ConfigurationError(
                    f"a cell of {len(ops)} operations has states 0 to {known - 1} to return, got "
                    f"{list(concat)}"
                )


DARTS_V2 = Genotype(
    normal=(
        *(("sep_conv_3x3", 0), ("sep_conv_3x3", 1), ("sep_conv_3x3", 0), ("sep_conv_3x3", 1)),
        *(("sep_conv_3x3", 1), ("skip_connect", 0), ("skip_connect", 0), ("dil_conv_3x3", 2)),
    ),
    normal_concat=(2, 3, 4, 5),
    reduce=(
        *(("max_pool_3x3", 0), ("max_pool_3x3", 1), ("skip_connect", 2), ("max_pool_3x3", 1)),
        *(("max_pool_3x3", 0), ("skip_connect", 2), ("skip_connect", 2), ("max_pool_3x3", 1)),
    ),
    reduce_concat=(2, 3, 4, 5),
)
"""The cells of DARTS, second order (Liu et al., ICLR 2019), ``DARTS_ORIGINAL`` in [C]."""

NASNET = Genotype(
    normal=(
        *(("sep_conv_5x5", 1), ("sep_conv_3x3", 0), ("sep_conv_5x5", 0), ("sep_conv_3x3", 0)),
        *(("avg_pool_3x3", 1), ("skip_connect", 0), ("avg_pool_3x3", 0), ("avg_pool_3x3", 0)),
        *(("sep_conv_3x3", 1), ("skip_connect", 1)),
    ),
    normal_concat=(2, 3, 4, 5, 6),
    reduce=(
        *(("sep_conv_5x5", 1), ("sep_conv_7x7", 0), ("max_pool_3x3", 1), ("sep_conv_7x7", 0)),
        *(("avg_pool_3x3", 1), ("sep_conv_5x5", 0), ("skip_connect", 3), ("avg_pool_3x3", 2)),
        *(("sep_conv_3x3", 2), ("max_pool_3x3", 1)),
    ),
    reduce_concat=(4, 5, 6),
)
"""The cells of NASNet (Zoph et al., CVPR 2018) as [C] has them."""


class Cell(nn.Module):
    """One cell: two inputs brought to C channels, nodes, their concatenation [C].

    Args:
        genotype: What the cells of the network compute.
        before_previous: Channels of the output of the cell before the previous one.
        previous: Channels of the output of the previous cell.
        channels: Channels C of every state.
        reduction: Whether operations on the two inputs halve the map.
        after_reduction: Whether the previous cell did, so that the older input is larger.
    """

    def __init__(
        self,
        genotype: Genotype,
        before_previous: int,
        previous: int,
        channels: int,
        reduction: bool,
        after_reduction: bool,
    ) -> None:
        super().__init__()
        ops = genotype.reduce if reduction else genotype.normal
        self.concat = tuple(genotype.reduce_concat if reduction else genotype.normal_concat)
        adapt = FactorizedReduce if after_reduction else relu_conv_bn
        self.input0 = adapt(before_previous, channels)
        self.input1 = relu_conv_bn(previous, channels)
        self.ops = nn.ModuleList(
            make_op(name, channels, 2 if reduction and state < 2 else 1) for name, state in ops
        )
        self.reads = [state for _, state in ops]
        self.out_channels = len(self.concat) * channels

    def forward(self, s0: Tensor, s1: Tensor, drop_path_prob: float = 0.0) -> Tensor:
        """The two outputs before to the next, ``(N, len(concat) C, H', W')``."""
        states = [self.input0(s0), self.input1(s1)]
        for position, (op, state) in enumerate(zip(self.ops, self.reads, strict=True)):
            h: Tensor = op(states[state])
            if drop_path_prob > 0 and self.training and not isinstance(op, nn.Identity):
                h = drop_path(h, drop_path_prob)
            if position % 2 == 0:
                first = h
            else:
                states.append(first + h)
        return torch.cat([states[i] for i in self.concat], dim=1)


# ---------------------------------------------------------------------------- networks of cells


class TwoByTwo(nn.Module):
    """Average pool to 2x2, windows 5 wide and 3 apart at side 8, 5n/8 wide at other sides n [R]."""

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` to ``(N, C, 2, 2)``."""
        if min(x.shape[2:]) < 2:
            return F.adaptive_avg_pool2d(x, 2)
        window = [min(math.ceil(5 * n / 8), n - 1) for n in x.shape[2:]]
        apart = [n - k for n, k in zip(x.shape[2:], window, strict=True)]
        return F.avg_pool2d(x, window, apart)


def auxiliary_head(channels: int, num_classes: int) -> nn.Sequential:
    """The classifier on the output of the second reduction."""
    return named_sequence(
        act=nn.ReLU(),
        pool=TwoByTwo(),
        conv1=conv1x1(channels, 128),
        bn1=nn.BatchNorm2d(128),
        act1=nn.ReLU(),
        conv2=nn.Conv2d(128, 768, 2, bias=False),
        bn2=nn.BatchNorm2d(768),
        act2=nn.ReLU(),
        flatten=nn.Flatten(),
        linear=nn.Linear(768, num_classes),
    )


class CellNetwork(nn.Module):
    """A stack of searched cells; a third and two thirds of the way up a cell halves the map [C].

    Args:
        genotype: What the cells compute.
        layers: Number of cells, at least 3.
        channels: Of the stem, and of a state in each of the three stages.
        num_classes: Number of classes K.
        in_channels: Channels of the images.
        mean: Means of :class:`~common.networks.normalize.Normalize`; ``None`` keeps the pixels.
        std: Its standard deviations.
        auxiliary: Whether there is a second classifier on two thirds of the cells.
        drop_path: Probability of dropping an operation of one example at the end of training.

    Raises:
        ConfigurationError: If a setting is out of range.
    """

    def __init__(
        self,
        genotype: Genotype,
        layers: int = 20,
        channels: Sequence[int] = (144, 36, 72, 144),
        num_classes: int = 10,
        in_channels: int = 3,
        mean: Statistics = None,
        std: Statistics = None,
        auxiliary: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        check_positive(num_classes=num_classes)
        if layers < 3:
            raise ConfigurationError(f"three stages need at least 3 layers (cells), got {layers}")
        if len(channels) != 4 or min(channels) < 1:
            raise ConfigurationError(
                "channels are one count for the stem and one for each of the three stages, got "
                f"{list(channels)}"
            )
        check_drop_rates(drop_path=drop_path)
        self.drop_path = drop_path
        self.drop_path_prob = 0.0
        self.normalize = Normalize(in_channels, mean, std)
        self.stem = named_sequence(
            conv=conv3x3(in_channels, channels[0]), bn=nn.BatchNorm2d(channels[0])
        )
        reductions = (layers // 3, 2 * layers // 3)
        self.auxiliary_after = reductions[1]
        self.cells = nn.ModuleList()
        before_previous = previous = channels[0]
        for i in range(layers):
            width = channels[1 + sum(i >= r for r in reductions)]
            is_reduction, is_after = i in reductions, i - 1 in reductions
            cell = Cell(genotype, before_previous, previous, width, is_reduction, is_after)
            self.cells.append(cell)
            before_previous, previous = previous, cell.out_channels
            if auxiliary and i == self.auxiliary_after:
                self.auxiliary = auxiliary_head(previous, num_classes)
        self.head = named_sequence(
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            linear=nn.Linear(previous, num_classes),
        )

    def set_progress(self, fraction: float) -> None:
        """Use ``drop_path * fraction``, the fraction being epoch (from 0) over epochs."""
        self.drop_path_prob = self.drop_path * fraction

    def outputs(self, x: Tensor) -> list[Tensor]:
        """The output of every cell."""
        s0 = s1 = self.stem(self.normalize(x))
        outputs: list[Tensor] = []
        for cell in self.cells:
            s0, s1 = s1, cell(s0, s1, self.drop_path_prob)
            outputs.append(s1)
        return outputs

    def features(self, x: Tensor) -> Tensor:
        """What the head reads: the output of the last cell."""
        return self.outputs(x)[-1]

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, K)`` of images ``(N, C, H, W)`` in [0, 1]."""
        logits: Tensor = self.head(self.features(x))
        return logits

    def forward_with_auxiliary(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and auxiliary logits, both ``(N, K)``.

        Raises:
            ConfigurationError: If the network has no auxiliary head.
        """
        if not hasattr(self, "auxiliary"):
            raise ConfigurationError(
                "this loss needs the auxiliary head; set model.net.auxiliary to true, or train "
                "with common.objectives.AT"
            )
        outputs = self.outputs(x)
        return self.head(outputs[-1]), self.auxiliary(outputs[self.auxiliary_after])


class DARTS(CellNetwork):
    """The DARTS network: 3,354,274 parameters at 10 classes, without its auxiliary head."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(genotype=DARTS_V2, **kwargs)


class NASNet(CellNetwork):
    """The NASNet network: 3,835,882 parameters at 10 classes, without its auxiliary head."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(genotype=NASNET, **kwargs)
