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
    kaiming,
    make_head,
    make_stage,
)

WideBlockFactory = Callable[[int, int, int, Activation, float], nn.Module]
"""Makes one block from (in_channels, out_channels, stride, activation, drop_rate)."""


def initialize(module: nn.Module) -> None:
    """Starting weights of one layer, as in the WRN code that TRADES made common.

    Convolutions by :func:`~common.networks.resnet.kaiming`; linear layers lose their bias.
    """
    kaiming(module)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


class WideBlock(nn.Module):
    """Pre-activation block: BN - act - conv3x3 - BN - act - [dropout] - conv3x3, plus a shortcut.

    :meth:`forward` is ``residual(a) + skip(x, a)`` with ``a = activate(x)``; the three are public
    so that a method can change what the residual branch reads and leave the shortcut alone.
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
    """Blocks per stage of a WRN of ``depth`` layers with equal stages: 4 each for WRN-28."""
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
        depth: Layers in all, 4 and two for each block. Unused where ``depths`` is given.
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
        n = len(strides)
        depths = equal_depths(depth, n) if depths is None else depths
        widths = [16 * widen_factor * 2**i for i in range(n)] if widths is None else widths
        drop_rates = [drop_rate] * n if drop_rates is None else drop_rates
        activations = [activation] * n if activations is None else activations
        check_positive(num_classes=num_classes, stem_width=stem_width)
        check_stages(depths, widths, strides)
        for name, values in (("drop_rates", drop_rates), ("activations", activations)):
            if len(values) != n:
                raise ConfigurationError(
                    f"{name} needs one value for each of the {n} stages, got {len(values)}"
                )
        check_drop_rates(**{f"drop_rate of stage {i}": r for i, r in enumerate(drop_rates, 1)})
        self.widths = tuple(widths)
        self.stem: nn.Module = conv3x3(in_channels, stem_width)
        self.stages = nn.Sequential()
        insides = (stem_width, *widths[:-1])
        kinds = zip(activations, drop_rates, strict=True)
        for kind, *sizes in zip(kinds, insides, depths, widths, strides, strict=True):
            self.stages.append(make_stage(lambda *given, kind=kind: block(*given, *kind), *sizes))
        self.head = make_head(
            widths[-1], num_classes, pool, norm=nn.BatchNorm2d(widths[-1]), act=activation()
        )
        self.apply(initialize)
