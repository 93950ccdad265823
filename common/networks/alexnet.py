"""AlexNet (Krizhevsky et al., NeurIPS 2012) cut down to small images, without batch-norm."""

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from common.errors import ConfigurationError
from common.networks.backbone import Backbone
from common.networks.normalize import Statistics
from common.networks.resnet import (
    Activation,
    Pool,
    check_drop_rates,
    check_positive,
    make_head,
    named_sequence,
)


class AlexNet(Backbone):
    """Five convolutions with three 2x2 max-pools between and behind them, global pool, classifier.

    ``stages`` are conv5x5 - act - pool, conv5x5 - act - pool and three times conv3x3 - act with a
    pool behind, all with bias; ``head`` is pool - flatten - (dropout - linear - act) -
    (dropout - linear - act) - linear at the default ``hidden``, the last hidden layer without
    dropout behind it. Weights start from PyTorch's defaults. 2,850,634 parameters at 10 classes
    and 3 channels. A pool of stride 1 shrinks the map by one pixel, and pools of stride 2 round
    down: (1, 1, 2, 2) turns 32 pixels into 32, 31, 15 and 7.

    Args:
        strides: Of the first convolution and of the three max-pools.
        widths: Channels of the five convolutions.
        hidden: Widths of the linear layers before the last.
        drop_rate: Dropout before each hidden layer.
        num_classes: Number of classes K.
        in_channels: Channels of the images.
        mean: Means of :class:`~common.networks.normalize.Normalize`; ``None`` keeps the pixels.
        std: Its standard deviations.
        activation: Makes one activation.
        pool: Of the head: average or maximum over each map.
    """

    def __init__(
        self,
        strides: Sequence[int] = (2, 2, 2, 2),
        widths: Sequence[int] = (64, 192, 384, 256, 256),
        hidden: Sequence[int] = (512, 512),
        drop_rate: float = 0.5,
        num_classes: int = 10,
        in_channels: int = 3,
        mean: Statistics = None,
        std: Statistics = None,
        activation: Activation = nn.ReLU,
        pool: Pool = "avg",
    ) -> None:
        super().__init__(in_channels, mean, std)
        for name, values, what, count in (
            ("strides", strides, "the first convolution and three pools", 4),
            ("widths", widths, "each convolution", 5),
        ):
            if len(values) != count:
                raise ConfigurationError(
                    f"{name} needs {count} values, for {what}, got {list(values)}"
                )
            check_positive(**{f"{name}[{i}]": value for i, value in enumerate(values)})
        check_positive(num_classes=num_classes, **{f"hidden[{i}]": h for i, h in enumerate(hidden)})
        check_drop_rates(drop_rate=drop_rate)
        self.widths = tuple(widths)
        self.stem = nn.Identity()
        inside = (in_channels, *widths)

        def layer(i: int, kernel: int, stride: int = 1) -> nn.Sequential:
            conv = nn.Conv2d(inside[i], inside[i + 1], kernel, stride, padding=kernel // 2)
            return named_sequence(conv=conv, act=activation())

        self.stages = nn.Sequential(
            nn.Sequential(layer(0, 5, strides[0])),
            nn.Sequential(layer(1, 5)),
            nn.Sequential(layer(2, 3), layer(3, 3), layer(4, 3)),
        )
        for stage, stride in zip(self.stages.children(), strides[1:], strict=True):
            stage.add_module("pool", nn.MaxPool2d(2, stride))
        sizes = (widths[-1], *hidden)
        layers = [
            named_sequence(drop=nn.Dropout(drop_rate), linear=nn.Linear(*pair), act=activation())
            for pair in pairwise(sizes)
        ]
        self.head = make_head(sizes[-1], num_classes, pool, layers)
