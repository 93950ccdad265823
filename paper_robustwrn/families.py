"""The rule in other families: VGG, DenseNet, and networks of searched cells (DARTS, NASNet).

Each comes plain, with its last stage reduced to 0.4, and with the first reduced as a control. Which
reduced networks the paper trained was not found: all of :data:`NETWORKS` marked [R] are our choice.
Weights start from PyTorch's defaults [C].

Tags as in :mod:`paper_robustwrn.method`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.attacks.losses import cross_entropy
from common.errors import ConfigurationError, check_choice
from common.modes import network_of
from common.networks.normalize import Normalize, Statistics
from common.networks.resnet import check_positive, conv1x1, conv3x3, named_sequence
from common.networks.vgg import VGG
from common.objectives import Batch, Objective, adversarial_images, check_weight

# ------------------------------------------------------------------------------------ DenseNet


class Bottleneck(nn.Module):
    """BN - ReLU - conv1x1 - BN - ReLU - conv3x3; the new features come before the input [C].

    Args:
        in_channels: Channels of the input.
        growth_rate: New channels g; the 1x1 convolution has 4g.
    """

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


class DenseNet(nn.Module):
    """DenseNet for small images with the width at the entry of each stage free [C].

    A transition BN - ReLU - conv1x1 - average pool leads from stage to stage and sets the width of
    the next. Pools round up and the last is global, so any image size works; at 32x32 they are the
    official ones. By default DenseNet-121.

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
        super().__init__()
        check_positive(num_classes=num_classes, growth_rate=growth_rate)
        given = f"depths={list(depths)}, channels={list(channels)}"
        if not len(depths) == len(channels) >= 1 or min(*depths, *channels) < 1:
            raise ConfigurationError(
                f"depths and channels need one value of at least 1 for each stage, got {given}"
            )
        self.normalize = Normalize(in_channels, mean, std)
        self.stem = conv3x3(in_channels, channels[0])
        self.stages = nn.Sequential()
        width = channels[0]
        for i, depth in enumerate(depths):
            stage = nn.Sequential()
            for _ in range(depth):
                stage.append(Bottleneck(width, growth_rate))
                width += growth_rate
            if i + 1 < len(depths):
                transition = named_sequence(
                    bn=nn.BatchNorm2d(width),
                    act=nn.ReLU(),
                    conv=conv1x1(width, channels[i + 1]),
                    pool=nn.AvgPool2d(2, ceil_mode=True),
                )
                stage.add_module("transition", transition)
                width = channels[i + 1]
            self.stages.append(stage)
        self.head = named_sequence(
            norm=nn.BatchNorm2d(width),
            act=nn.ReLU(),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            linear=nn.Linear(width, num_classes),
        )

    def features(self, x: Tensor) -> Tensor:
        """What the head reads, before its norm and activation."""
        z: Tensor = self.stages(self.stem(self.normalize(x)))
        return z

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, K)`` of images ``(N, C, H, W)`` in [0, 1]."""
        logits: Tensor = self.head(self.features(x))
        return logits


# ------------------------------------------------------------------------- operations of cells


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

    Official code fails on odd sides; here the odd pixels are followed by a zero [R].

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output, half from each convolution.

    Raises:
        ConfigurationError: If ``out_channels`` is odd.
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
    """One operation that keeps the channels.

    Raises:
        ConfigurationError: If there is no such operation.
    """
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
    """Zero whole examples with a probability and scale the others up; the mean is kept.

    Args:
        x: ``(N, C, H, W)``.
        probability: Of zeroing one example.
    """
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
    """Refuse a cell with an unknown operation, or one that reads or returns a state it lacks.

    Raises:
        ConfigurationError: If it is one.
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


class TwoByTwo(nn.Module):
    """Average pool to 2x2 with overlapping windows: 5 wide and 3 apart on the usual 8x8 map.

    On other sides n the windows are 5n/8 wide, rounded up [R].
    """

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` to ``(N, C, 2, 2)``."""
        if min(x.shape[2:]) < 2:
            return F.adaptive_avg_pool2d(x, 2)
        window = [min(math.ceil(5 * n / 8), n - 1) for n in x.shape[2:]]
        apart = [n - k for n, k in zip(x.shape[2:], window, strict=True)]
        return F.avg_pool2d(x, window, apart)


def auxiliary_head(channels: int, num_classes: int) -> nn.Sequential:
    """The classifier on the output of the second reduction: 2x2 pool, two convolutions, linear."""
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

    ``forward`` returns logits only, whatever the mode: attacks and evaluation read no auxiliary
    head. Training with one calls :meth:`forward_with_auxiliary`, as :class:`SATAuxiliary` does.

    Args:
        genotype: What the cells compute.
        layers: Number of cells, at least 3.
        channels: Of the stem, and of a state in each of the three stages.
        num_classes: Number of classes K.
        in_channels: Channels of the images.
        mean: Means of :class:`~common.networks.normalize.Normalize`; ``None`` keeps the pixels.
        std: Its standard deviations.
        auxiliary: Whether there is a second classifier on two thirds of the cells.
        drop_path: Probability of dropping an operation of one example at the end of training;
            :meth:`set_progress` makes it grow to there.

    Raises:
        ConfigurationError: If there are fewer than three cells, not four channel counts, or a
            probability is none.
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
        if not 0 <= drop_path < 1:
            raise ConfigurationError(f"drop_path must lie in [0, 1), got {drop_path}")
        self.drop_path = drop_path
        self.drop_path_prob = 0.0
        """The probability in force; 0 until training says how far it is."""
        self.normalize = Normalize(in_channels, mean, std)
        self.stem = named_sequence(
            conv=conv3x3(in_channels, channels[0]), bn=nn.BatchNorm2d(channels[0])
        )
        reductions = (layers // 3, 2 * layers // 3)
        self.auxiliary_after = reductions[1]
        self.cells = nn.ModuleList()
        before_previous = previous = channels[0]
        for i in range(layers):
            reduction = i in reductions
            cell = Cell(
                genotype.reduce if reduction else genotype.normal,
                genotype.reduce_concat if reduction else genotype.normal_concat,
                before_previous,
                previous,
                channels[1 + sum(i >= r for r in reductions)],
                reduction,
                after_reduction=i - 1 in reductions,
            )
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
        """Let drop path grow: ``drop_path * fraction`` from now on.

        Args:
            fraction: Epoch (from 0) over the number of epochs.
        """
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
    """The DARTS network: 3,354,274 parameters at 10 classes, without its auxiliary head.

    Args:
        **kwargs: Of :class:`CellNetwork`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(genotype=DARTS_V2, **kwargs)


class NASNet(CellNetwork):
    """The NASNet network: 3,835,882 parameters at 10 classes, without its auxiliary head.

    Args:
        **kwargs: Of :class:`CellNetwork`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(genotype=NASNET, **kwargs)


class SATAuxiliary(Objective):
    """Adversarial training of a network with an auxiliary head [C].

    Args:
        weight: Of the auxiliary head's cross-entropy.

    Raises:
        ConfigurationError: If ``weight`` is negative or not finite.
    """

    def __init__(self, weight: float = 0.4) -> None:
        self.weight = check_weight("weight", weight)

    def outer(self, model: Any, batch: Batch) -> Tensor:
        """CE(f(x_adv), y) + weight CE(f_aux(x_adv), y), batch mean.

        Raises:
            ConfigurationError: If the network has no auxiliary head, or nothing attacked the batch.
        """
        net, x_adv = network_of(model), adversarial_images(batch)
        if not hasattr(net, "forward_with_auxiliary"):
            raise ConfigurationError(
                f"SATAuxiliary trains networks of cells, not {type(net).__name__}; use "
                "common.objectives.AT"
            )
        logits, auxiliary = net.forward_with_auxiliary(x_adv)
        y = batch["y"]
        return cross_entropy(logits, y).mean() + self.weight * cross_entropy(auxiliary, y).mean()


# ------------------------------------------------------------------------------ named networks

NETWORKS: Mapping[str, Callable[..., nn.Module]] = {
    "vgg16": VGG,
    "vgg16-r": partial(VGG, widths=(64, 128, 256, 512, 204)),
    "vgg16-first": partial(VGG, widths=(26, 128, 256, 512, 512)),
    "densenet121": DenseNet,
    "densenet121-r-depth": partial(DenseNet, depths=(6, 12, 24, 6)),
    "densenet121-r-width": partial(DenseNet, channels=(64, 128, 256, 204)),
    "densenet121-first": partial(DenseNet, depths=(2, 12, 24, 16)),
    "darts": DARTS,
    "darts-r": partial(DARTS, channels=(144, 36, 72, 58)),
    "darts-r-budget": partial(DARTS, channels=(144, 54, 108, 86)),
    "darts-first": partial(DARTS, channels=(144, 14, 72, 144)),
    "nasnet": NASNet,
}
"""Plain, ``-r`` with the last stage at 0.4, ``-first`` with the first instead [R]."""
