"""Wide residual networks (Zagoruyko & Komodakis, BMVC 2016) with depth and width free per stage."""

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import ConfigurationError
from common.networks.backbone import Backbone
from common.networks.normalize import Statistics
from common.networks.resnet import (
    Activation,
    Pool,
    check_drop_rates,
    check_positive,
    check_stages,
    conv1x1,
    conv3x3,
    preactivated_head,
)

WideBlockFactory = Callable[[int, int, int, Activation, float], nn.Module]
"""Makes one block from (in_channels, out_channels, stride, activation, drop_rate)."""


def initialize(module: nn.Module) -> None:
    """Starting weights of one layer, for ``net.apply(initialize)``.

    Convolutions are normal with variance ``2 / (k_h k_w out)`` (He et al., ICCV 2015, fan-out),
    batch-norms start at scale 1 and shift 0, linear layers keep PyTorch's default weight and lose
    their bias, as in the WRN code that TRADES made common.
    """
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


class WideBlock(nn.Module):
    """Pre-activation block: BN - act - conv3x3 - BN - act - [dropout] - conv3x3, plus a shortcut.

    :meth:`forward` is ``residual(a) + skip(x, a)`` with ``a = activate(x)``; the three are public
    so that a method can change what the residual branch reads and leave the shortcut alone.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        stride: Stride of the first convolution and of the shortcut.
        activation: Makes one activation.
        drop_rate: Probability of zeroing an activation between the convolutions.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        activation: Activation = nn.ReLU,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.act1 = activation()
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.act2 = activation()
        self.dropout = nn.Dropout(drop_rate) if drop_rate > 0 else nn.Identity()
        self.conv2 = conv3x3(out_channels, out_channels)
        self.changes_width = in_channels != out_channels
        self.shortcut: nn.Module = nn.Identity()
        if self.changes_width or stride != 1:
            self.shortcut = conv1x1(in_channels, out_channels, stride)

    def activate(self, x: Tensor) -> Tensor:
        """act(BN(x)), what the residual branch starts from; same shape as ``x``."""
        a: Tensor = self.act1(self.bn1(x))
        return a

    def residual(self, a: Tensor) -> Tensor:
        """The residual branch of an activated input, ``(N, out, H / stride, W / stride)``."""
        h = self.act2(self.bn2(self.conv1(a)))
        out: Tensor = self.conv2(self.dropout(h))
        return out

    def skip(self, x: Tensor, a: Tensor) -> Tensor:
        """The shortcut of input ``x`` and its activation ``a``.

        A projection that changes the width reads ``a``; one that only strides, and the identity,
        read ``x``.
        """
        out: Tensor = self.shortcut(a if self.changes_width else x)
        return out

    def forward(self, x: Tensor) -> Tensor:
        """``(N, in, H, W)`` to ``(N, out, H / stride, W / stride)``, rounded up."""
        a = self.activate(x)
        return self.residual(a) + self.skip(x, a)


class SamePaddingBlock(WideBlock):
    """A :class:`WideBlock` that pads like TensorFlow's ``SAME`` where it strides.

    A convolution of stride 2 gets a row below and a column to the right, instead of one on every
    side, as in the networks that Gowal et al. released. For images whose sides stay even.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, *args: Any) -> None:
        super().__init__(in_channels, out_channels, stride, *args)
        self.strides = stride != 1
        if self.strides:
            self.conv1.padding = (0, 0)

    def residual(self, a: Tensor) -> Tensor:
        """The residual branch of an activated input, ``(N, out, H / stride, W / stride)``."""
        return super().residual(F.pad(a, (0, 1, 0, 1)) if self.strides else a)


def equal_depths(depth: int, stages: int = 3) -> list[int]:
    """Blocks per stage of a WRN of ``depth`` layers with equal stages: 4 each for WRN-28.

    Raises:
        ConfigurationError: If ``depth - 4`` is not a positive multiple of ``2 * stages``.
    """
    blocks, rest = divmod(depth - 4, 2 * stages) if stages > 0 else (0, 0)
    if rest != 0 or blocks < 1:
        raise ConfigurationError(
            f"a WRN of {stages} equal stages has 4 + {2 * stages} n layers, got depth={depth}; "
            "choose such a depth, or give depths per stage"
        )
    return [blocks] * stages


class WideResNet(Backbone):
    """WRN-depth-widen_factor, or any stage-wise depths and widths.

    ``stem`` is one convolution, ``stages[i][j]`` is one :class:`WideBlock`, ``head`` is
    norm - act - pool - flatten - linear. The pool is global, so any image size works. Weights
    start from :func:`initialize`.

    Args:
        depth: Layers in all, 4 and two for each block; three equal stages get ``(depth - 4) / 6``
            blocks each. Unused where ``depths`` is given.
        widen_factor: Widths are 16, 32, 64, ... times it. Unused where ``widths`` is given.
        num_classes: Number of classes K.
        in_channels: Channels of the images.
        mean: Means of :class:`~common.networks.normalize.Normalize`; ``None`` keeps the pixels.
        std: Its standard deviations.
        depths: Blocks per stage.
        widths: Channels per stage (channels, not factors: 160, not 10).
        strides: Stride of each stage's first block; their number is the number of stages.
        stem_width: Channels of the stem.
        drop_rate: Dropout between the two convolutions of a block.
        activation: Makes one activation.
        block: Makes one block from (in_channels, out_channels, stride, activation, drop_rate).
        drop_rates: One ``drop_rate`` for each stage, instead of the same for all.
        activations: One ``activation`` for each stage; the head keeps ``activation``.
        pool: Of the head: average or maximum over each map.

    Raises:
        ConfigurationError: If ``depth`` does not divide into equal stages, the lists differ in
            length, a drop rate is no probability below 1, or there is no such pool.
    """

    def __init__(
        self,
        depth: int = 28,
        widen_factor: int = 10,
        num_classes: int = 10,
        in_channels: int = 3,
        mean: Statistics = None,
        std: Statistics = None,
        depths: Sequence[int] | None = None,
        widths: Sequence[int] | None = None,
        strides: Sequence[int] = (1, 2, 2),
        stem_width: int = 16,
        drop_rate: float = 0.0,
        activation: Activation = nn.ReLU,
        block: WideBlockFactory = WideBlock,
        drop_rates: Sequence[float] | None = None,
        activations: Sequence[Activation] | None = None,
        pool: Pool = "avg",
    ) -> None:
        super().__init__(in_channels, mean, std)
        if depths is None:
            depths = equal_depths(depth, len(strides))
        if widths is None:
            widths = [16 * widen_factor * 2**i for i in range(len(strides))]
        if drop_rates is None:
            drop_rates = [drop_rate] * len(strides)
        if activations is None:
            activations = [activation] * len(strides)
        check_positive(num_classes=num_classes, stem_width=stem_width)
        check_stages(depths, widths, strides)
        for name, values in (("drop_rates", drop_rates), ("activations", activations)):
            if len(values) != len(strides):
                raise ConfigurationError(
                    f"{name} needs one value for each of the {len(strides)} stages, got "
                    f"{len(values)}"
                )
        check_drop_rates(**{f"drop_rate of stage {i}": r for i, r in enumerate(drop_rates, 1)})
        self.widths = tuple(widths)
        self.stem: nn.Module = conv3x3(in_channels, stem_width)
        self.stages = nn.Sequential()
        inside, listed = stem_width, (depths, widths, strides, activations, drop_rates)
        for blocks, width, stride, act, rate in zip(*listed, strict=True):
            stage = nn.Sequential()
            for i in range(blocks):
                stage.append(block(inside, width, stride if i == 0 else 1, act, rate))
                inside = width
            self.stages.append(stage)
        self.head = preactivated_head(widths[-1], num_classes, activation, pool)
        self.apply(initialize)
