"""MobileNetV2 (Sandler et al., CVPR 2018) for small images."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn

from common.networks.backbone import Backbone
from common.networks.normalize import Statistics
from common.networks.resnet import (
    Activation,
    Pool,
    check_positive,
    conv1x1,
    conv3x3,
    make_head,
    make_stage,
    named_sequence,
)


class Stage(NamedTuple):
    """Blocks of the same width; inside one are ``expansion`` times the channels of its input."""

    expansion: int
    width: int
    depth: int
    stride: int


CIFAR_STAGES = tuple(
    Stage(*sizes)
    for sizes in (
        *((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2)),
        *((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
    )
)
"""The stages of common CIFAR code: 17 blocks, and three strides of 2 instead of five."""


class InvertedResidual(nn.Module):
    """conv1x1 - BN - act - depthwise conv3x3 - BN - act - conv1x1 - BN; a shortcut at stride 1.

    The shortcut is the identity, or conv1x1 - BN where the width changes; a block that strides has
    none. Nothing follows the sum. ``expansion`` times the channels of the input are inside.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        expansion: int = 6,
        activation: Activation = nn.ReLU,
    ) -> None:
        super().__init__()
        inside = expansion * in_channels
        self.conv1 = conv1x1(in_channels, inside)
        self.bn1 = nn.BatchNorm2d(inside)
        self.act1 = activation()
        self.conv2 = nn.Conv2d(inside, inside, 3, stride, padding=1, groups=inside, bias=False)
        self.bn2 = nn.BatchNorm2d(inside)
        self.act2 = activation()
        self.conv3 = conv1x1(inside, out_channels)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module | None = nn.Identity() if stride == 1 else None
        if stride == 1 and in_channels != out_channels:
            self.shortcut = named_sequence(
                conv=conv1x1(in_channels, out_channels), bn=nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """``(N, in, H, W)`` to ``(N, out, H / stride, W / stride)``, rounded up."""
        h = self.act1(self.bn1(self.conv1(x)))
        h = self.act2(self.bn2(self.conv2(h)))
        out: Tensor = self.bn3(self.conv3(h))
        return out if self.shortcut is None else out + self.shortcut(x)


class MobileNetV2(Backbone):
    """MobileNetV2 for small images: 2,296,922 parameters at 10 classes and 3 channels.

    ``stem`` is conv - bn - act, ``stages[i][j]`` is one block, ``head`` is conv - bn - act - pool -
    flatten - linear. Activations are plain ReLUs, as in common CIFAR code. The pool is global.
    Weights start from PyTorch's defaults.

    Args:
        stages: Expansion, width, number of blocks and stride of each stage.
        stem_width: Channels of the stem.
        head_width: Channels of the head's convolution.
        num_classes: Number of classes K.
        in_channels: Channels of the images.
        mean: Means of :class:`~common.networks.normalize.Normalize`; ``None`` keeps the pixels.
        std: Its standard deviations.
        activation: Makes one activation.
        pool: Of the head: average or maximum over each map.
    """

    def __init__(
        self,
        stages: Sequence[tuple[int, int, int, int]] = CIFAR_STAGES,
        stem_width: int = 32,
        head_width: int = 1280,
        num_classes: int = 10,
        in_channels: int = 3,
        mean: Statistics = None,
        std: Statistics = None,
        activation: Activation = nn.ReLU,
        pool: Pool = "avg",
    ) -> None:
        super().__init__(in_channels, mean, std)
        check_positive(num_classes=num_classes, stem_width=stem_width, head_width=head_width)
        self.stem = named_sequence(
            conv=conv3x3(in_channels, stem_width), bn=nn.BatchNorm2d(stem_width), act=activation()
        )
        self.stages = nn.Sequential()
        inside = stem_width
        for expansion, width, depth, stride in stages:
            check_positive(expansion=expansion, width=width, depth=depth, stride=stride)
            block = partial(InvertedResidual, expansion=expansion, activation=activation)
            self.stages.append(make_stage(block, inside, depth, width, stride))
            inside = width
        conv, bn = conv1x1(inside, head_width), nn.BatchNorm2d(head_width)
        self.head = make_head(head_width, num_classes, pool, conv=conv, bn=bn, act=activation())
