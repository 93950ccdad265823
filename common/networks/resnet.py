"""CIFAR-style ResNets (He et al., CVPR 2016), and the parts other residual networks share."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from common.errors import ConfigurationError, check_choice
from common.networks.backbone import Backbone
from common.networks.normalize import Statistics

Activation = Callable[[], nn.Module]
"""Makes one activation, for example ``torch.nn.ReLU``."""

Block = Callable[[int, int, int, Activation], nn.Module]
"""Makes one residual block from (in_channels, out_channels, stride, activation)."""

Initialize = Callable[[nn.Module], None]
"""Sets the starting weights of one module, and is called with every module of a network."""

Pool = Literal["avg", "max"]
"""How the head makes one number of each map: by its average or by its maximum."""


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """3x3 convolution, padding 1, without bias."""
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)


def conv1x1(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """1x1 convolution without bias, as in projection shortcuts."""
    return nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)


def named_sequence(**modules: nn.Module) -> nn.Sequential:
    """A ``Sequential`` whose modules, and so the keys of its state dict, have the given names."""
    return nn.Sequential(OrderedDict(modules))


def make_head(
    width: int, num_classes: int, pool: Pool, hidden: Iterable[nn.Module] = (), **before: nn.Module
) -> nn.Sequential:
    """Modules before the pool, pool - flatten, hidden layers, and the linear layer of ``width``."""
    check_choice("pool", pool, Pool)
    return named_sequence(
        **before,
        pool=nn.AdaptiveAvgPool2d(1) if pool == "avg" else nn.AdaptiveMaxPool2d(1),
        flatten=nn.Flatten(),
        **{f"hidden{i}": layer for i, layer in enumerate(hidden)},
        linear=nn.Linear(width, num_classes),
    )


def kaiming(module: nn.Module) -> None:
    """Draw a convolution's weights with variance ``2 / (k_h k_w out)`` (He et al., ICCV 2015)."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def check_positive(**values: int) -> None:
    """Refuse counts below 1, by name."""
    for name, value in values.items():
        if value < 1:
            raise ConfigurationError(f"{name} must be at least 1, got {value}")


def check_drop_rates(**rates: float) -> None:
    """Refuse what is no probability below 1, by name."""
    for name, rate in rates.items():
        if not 0 <= rate < 1:
            raise ConfigurationError(f"{name} must lie in [0, 1), got {rate}")


def check_stages(depths: Sequence[int], widths: Sequence[int], strides: Sequence[int]) -> None:
    """Refuse lists that differ in length, are empty, or hold a value below 1."""
    given = f"depths={list(depths)}, widths={list(widths)}, strides={list(strides)}"
    if not len(depths) == len(widths) == len(strides) >= 1:
        raise ConfigurationError(
            f"depths, widths and strides need one value for each stage, got {given}"
        )
    if min(*depths, *widths, *strides) < 1:
        raise ConfigurationError(f"depths, widths and strides must be at least 1, got {given}")


def make_stage(
    block: Callable[[int, int, int], nn.Module], inside: int, depth: int, width: int, stride: int
) -> nn.Sequential:
    """Blocks of which the first changes width (from ``inside``) and resolution."""
    stage = nn.Sequential(block(inside, width, stride))
    for _ in range(depth - 1):
        stage.append(block(width, width, 1))
    return stage


def make_stages(
    block: Block,
    depths: Sequence[int],
    widths: Sequence[int],
    strides: Sequence[int],
    activation: Activation,
) -> nn.Sequential:
    """Stages of the same blocks, after a stem as wide as the first."""

    def make(inside: int, width: int, stride: int) -> nn.Module:
        return block(inside, width, stride, activation)

    insides = (widths[0], *widths[:-1])
    stages = zip(insides, depths, widths, strides, strict=True)
    return nn.Sequential(*(make_stage(make, *sizes) for sizes in stages))


class BasicBlock(nn.Module):
    """conv3x3 - BN - act - conv3x3 - BN, plus the shortcut, act (He et al. 2016, Fig. 2).

    The shortcut is the identity, or conv1x1 - BN where stride or width change (option B).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        activation: Activation = nn.ReLU,
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.act1 = activation()
        self.conv2 = conv3x3(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = named_sequence(
                conv=conv1x1(in_channels, out_channels, stride), bn=nn.BatchNorm2d(out_channels)
            )
        self.act2 = activation()

    def forward(self, x: Tensor) -> Tensor:
        """``(N, in, H, W)`` to ``(N, out, H / stride, W / stride)``, rounded up."""
        residual = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        out: Tensor = self.act2(residual + self.shortcut(x))
        return out


class BareShortcutBlock(BasicBlock):
    """A :class:`BasicBlock` whose projection has no batch-norm."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, *args: Any) -> None:
        super().__init__(in_channels, out_channels, stride, *args)
        if not isinstance(self.shortcut, nn.Identity):
            self.shortcut = conv1x1(in_channels, out_channels, stride)


class ResNet(Backbone):
    """Post-activation ResNet for small images: 3x3 stem without pooling, stages, linear head.

    ``stem`` is conv - bn - act, ``stages[i][j]`` is one block, ``head`` is pool - flatten - linear.
    The pool is global, so any image size works. Weights start from PyTorch's defaults unless
    ``init`` is given.

    Args:
        depths: Blocks per stage.
        widths: Channels per stage; the stem has those of the first.
        strides: Stride of each stage's first block.
        num_classes: Number of classes K.
        in_channels: Channels of the images.
        mean: Means of :class:`~common.networks.normalize.Normalize`; ``None`` keeps the pixels.
        std: Its standard deviations.
        block: Makes one block from (in_channels, out_channels, stride, activation).
        activation: Makes one activation.
        pool: Of the head: average or maximum over each map.
        init: Sets starting weights, for example :func:`kaiming`; ``None`` keeps the defaults.
    """

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 2, 2),
        widths: Sequence[int] = (64, 128, 256, 512),
        strides: Sequence[int] = (1, 2, 2, 2),
        num_classes: int = 10,
        in_channels: int = 3,
        mean: Statistics = None,
        std: Statistics = None,
        block: Block = BasicBlock,
        activation: Activation = nn.ReLU,
        pool: Pool = "avg",
        init: Initialize | None = None,
    ) -> None:
        super().__init__(in_channels, mean, std)
        check_positive(num_classes=num_classes)
        check_stages(depths, widths, strides)
        self.widths = tuple(widths)
        self.stem = named_sequence(
            conv=conv3x3(in_channels, widths[0]), bn=nn.BatchNorm2d(widths[0]), act=activation()
        )
        self.stages = make_stages(block, depths, widths, strides, activation)
        self.head = make_head(widths[-1], num_classes, pool)
        if init is not None:
            self.apply(init)


class ResNet18(ResNet):
    """ResNet-18 for 32x32 images: 11,173,962 parameters at 10 classes and 3 channels."""


class ResNet10(ResNet):
    """ResNet-10, one block per stage: 4,902,090 parameters at 10 classes and 1 channel."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(depths=(1, 1, 1, 1), **kwargs)


class CifarResNet(ResNet):
    """ResNet-8, 20, 32, ..., 110: three stages of 16, 32, 64 channels (He et al. 2016, Sec. 4.2).

    The shortcut is a 1x1 convolution without batch-norm where stride or width change, where the
    original pads with zeros; ResNet-20 has 272,282 parameters at 10 classes and 3 channels.

    Args:
        depth: Layers in all, 2 and six for each block of a stage.
        strides: Stride of each stage's first block.
        widths: Channels of the stages.
    """

    def __init__(
        self,
        depth: int = 20,
        strides: Sequence[int] = (1, 2, 2),
        widths: Sequence[int] = (16, 32, 64),
        **kwargs: Any,
    ) -> None:
        blocks, rest = divmod(depth - 2, 6)
        if rest != 0 or blocks < 1:
            raise ConfigurationError(
                f"three equal stages have 2 + 6 n layers, got depth={depth}; try 8, 20, 32 or 110"
            )
        super().__init__(
            depths=(blocks,) * 3,
            widths=widths,
            strides=strides,
            block=BareShortcutBlock,
            **kwargs,
        )


class DigitsResNet(ResNet):
    """A ResNet for 8x8 gray digits: blocks of 16, 32, 64, 64 channels on 8, 4, 2, 2 pixels."""

    def __init__(
        self, in_channels: int = 1, widths: Sequence[int] = (16, 32, 64, 64), **kwargs: Any
    ) -> None:
        super().__init__(
            depths=(1, 1, 1, 1),
            widths=widths,
            strides=(1, 2, 2, 1),
            in_channels=in_channels,
            **kwargs,
        )
