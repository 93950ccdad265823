"""Operations and cells of searched networks (DARTS, NASNet) [C].

Tags as in :mod:`paper_robustwrn.method`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import ConfigurationError, check_choice
from common.networks.resnet import conv1x1


def relu_conv_bn(in_channels: int, out_channels: int) -> nn.Sequential:
    """ReLU - conv1x1 - BN."""
    return nn.Sequential(
        nn.ReLU(), conv1x1(in_channels, out_channels), nn.BatchNorm2d(out_channels)
    )


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
    check_choice("an operation", name, Op)
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


# --------------------------------------------------------------------------------------- cells


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
        check_cell(self.normal, self.normal_concat)
        check_cell(self.reduce, self.reduce_concat)


def check_cell(ops: Sequence[tuple[Op, int]], concat: Sequence[int]) -> None:
    """Check a cell.

    Raises:
        ConfigurationError: If an operation is unknown, or it reads or returns a state that is not
            there.
    """
    for position, (name, state) in enumerate(ops):
        check_choice("an operation", name, Op)
        if not 0 <= state < 2 + position // 2:
            raise ConfigurationError(
                f"operation {position} of a cell reads state {state}; there are states 0 to "
                f"{1 + position // 2} before it"
            )
    if not concat or not all(0 <= state < 2 + len(ops) // 2 for state in concat):
        raise ConfigurationError(
            f"a cell of {len(ops)} operations has states 0 to {1 + len(ops) // 2} to return, got "
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
        ops: (operation, state) pairs, two for each node.
        concat: States to return, in this order.
        before_previous: Channels of the output of the cell before the previous one.
        previous: Channels of the output of the previous cell.
        channels: Channels C of every state.
        reduction: Whether operations on the two inputs halve the map.
        after_reduction: Whether the previous cell did, so that the older input is larger.
    """

    def __init__(
        self,
        ops: Sequence[tuple[Op, int]],
        concat: Sequence[int],
        before_previous: int,
        previous: int,
        channels: int,
        reduction: bool,
        after_reduction: bool,
    ) -> None:
        super().__init__()
        check_cell(ops, concat)
        adapt = FactorizedReduce if after_reduction else relu_conv_bn
        self.input0 = adapt(before_previous, channels)
        self.input1 = relu_conv_bn(previous, channels)
        self.ops = nn.ModuleList(
            make_op(name, channels, 2 if reduction and state < 2 else 1) for name, state in ops
        )
        self.reads = [state for _, state in ops]
        self.concat = tuple(concat)
        self.out_channels = len(self.concat) * channels

    def forward(self, s0: Tensor, s1: Tensor, drop_path_prob: float = 0.0) -> Tensor:
        """The two outputs before to the next, ``(N, len(concat) C, H', W')``."""
        states = [self.input0(s0), self.input1(s1)]
        results: list[Tensor] = []
        for op, state in zip(self.ops, self.reads, strict=True):
            h = op(states[state])
            if drop_path_prob > 0 and self.training and not isinstance(op, nn.Identity):
                h = drop_path(h, drop_path_prob)
            results.append(h)
            if len(results) % 2 == 0:
                states.append(results[-2] + results[-1])
        return torch.cat([states[i] for i in self.concat], dim=1)
