"""Pre-activation ResNets for small images (He et al., ECCV 2016)."""

from collections.abc import Sequence

from torch import Tensor, nn

from common.networks.backbone import Backbone
from common.networks.normalize import Statistics
from common.networks.resnet import (
    Activation,
    Block,
    Pool,
    check_positive,
    check_stages,
    conv3x3,
    make_head,
    make_stages,
)
from common.networks.wide_resnet import WideBlock


class PreActBlock(WideBlock):
    """BN - act - conv3x3 - BN - act - conv3x3, plus the shortcut.

    The shortcut is the raw input, or where stride or width change a 1x1 convolution of the
    activated input; a :class:`~common.networks.wide_resnet.WideBlock` that only strides convolves
    the raw input instead.
    """

    def skip(self, x: Tensor, a: Tensor) -> Tensor:
        """The shortcut of input ``x`` and its activation ``a``."""
        out: Tensor = x if isinstance(self.shortcut, nn.Identity) else self.shortcut(a)
        return out


class PreActResNet(Backbone):
    """Pre-activation ResNet: 3x3 stem without pooling or norm, stages, linear head.

    ``stem`` is one convolution, ``stages[i][j]`` is one block, ``head`` is
    norm - act - pool - flatten - linear. The pool is global, so any image size works. Weights start
    from PyTorch's defaults.

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
        block: Block = PreActBlock,
        activation: Activation = nn.ReLU,
        pool: Pool = "avg",
    ) -> None:
        super().__init__(in_channels, mean, std)
        check_positive(num_classes=num_classes)
        check_stages(depths, widths, strides)
        self.widths = tuple(widths)
        self.stem = conv3x3(in_channels, widths[0])
        self.stages = make_stages(block, depths, widths, strides, activation)
        self.head = make_head(
            widths[-1], num_classes, pool, norm=nn.BatchNorm2d(widths[-1]), act=activation()
        )


class PreActResNet18(PreActResNet):
    """Pre-activation ResNet-18: 11,172,170 parameters at 10 classes and 3 channels."""
