"""The rule in other families: DenseNet, and networks of searched cells (DARTS, NASNet).

Weights start from PyTorch's defaults [C]. Which reduced networks the paper trained was not found;
those of the configurations are our choice [R]. Tags as in :mod:`paper_robustwrn.method`.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import ConfigurationError
from common.networks.backbone import Backbone
from common.networks.normalize import Normalize, Statistics
from common.networks.resnet import check_positive, conv1x1, conv3x3, named_sequence
from paper_robustwrn.cells import DARTS_V2, NASNET, Cell, Genotype


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

    A transition BN - ReLU - conv1x1 - average pool leads from stage to stage and sets the width of
    the next. Pools round up and the last is global, so any image size works.

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
        given = f"depths={list(depths)}, channels={list(channels)}"
        if not len(depths) == len(channels) >= 1 or min(*depths, *channels) < 1:
            raise ConfigurationError(
                f"depths and channels need one value of at least 1 for each stage, got {given}"
            )
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

    ``forward`` returns the main logits in every mode. Training with an auxiliary head calls
    :meth:`forward_with_auxiliary`, as :class:`~paper_robustwrn.objectives.SATAuxiliary` does.

    Args:
        genotype: What the cells compute.
        layers: Number of cells, at least 3.
        channels: Of the stem, and of a state in each of the three stages.
        num_classes: Number of classes K.
        in_channels: Channels of the images.
        mean: Means of :class:`~common.networks.normalize.Normalize`; ``None`` keeps the pixels.
        std: Its standard deviations.
        auxiliary: Whether there is a second classifier on two thirds of the cells.
        drop_path: Probability of dropping an operation of one example at the end of training, to
            which :meth:`set_progress` raises it.

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
        if not 0 <= drop_path < 1:
            raise ConfigurationError(f"drop_path must lie in [0, 1), got {drop_path}")
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
