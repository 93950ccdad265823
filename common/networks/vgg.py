"""VGG for small images (Simonyan & Zisserman, ICLR 2015), its pools and batch-norm free."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

from torch import nn

from common.errors import ConfigurationError
from common.networks import resnet
from common.networks.backbone import Backbone
from common.networks.normalize import Statistics
from common.networks.resnet import (
    Activation,
    Initialize,
    Pool,
    check_drop_rates,
    check_positive,
    check_stages,
    make_head,
    named_sequence,
)

Config = Sequence[int | Literal["M"]]
"""Channels of the convolutions in order, with "M" where the maps are halved."""


def stages_of(config: Config) -> tuple[list[list[int]], list[int]]:
    """Channels of each stage of ``[64, "M", 128]``, and its stride: 2 where it ends in a pool."""
    stages: list[list[int]] = [[]]
    for entry in config:
        if entry == "M":
            stages.append([])
        elif isinstance(entry, int) and entry >= 1:
            stages[-1].append(entry)
        else:
            raise ConfigurationError(
                f'config lists channels (at least 1) and "M" for a pool, got {entry!r} in '
                f"{list(config)}"
            )
    strides = [2] * (len(stages) - 1) + [1]
    if not stages[-1]:
        del stages[-1], strides[-1]
    if not stages or not all(stages):
        raise ConfigurationError(
            f'config needs at least one convolution before every "M", got {list(config)}'
        )
    return stages, strides


def kaiming(module: nn.Module) -> None:
    """Starting weights of one layer as in torchvision's VGG: linear layers from N(0, 0.01^2).

    Convolutions by :func:`common.networks.resnet.kaiming`; both have zero bias.
    """
    resnet.kaiming(module)
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.01)
    if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


class VGG(Backbone):
    """Stages of conv3x3 - [BN] - act, each ended by a max-pool; the convolutions have a bias.

    ``stages[i][j]`` is one conv - bn - act, ``stages[i].pool`` the pool behind them, ``head`` is
    pool - flatten - linear. The last pool is global and the others round up, so any image size
    works. Weights start from PyTorch's defaults unless ``init`` is given. The stages are given as
    ``depths``, ``widths`` and ``strides`` (the default is VGG-16) or as one ``config``.

    Args:
        depths: Convolutions per stage.
        widths: Channels per stage.
        strides: Size and stride of the max-pool behind each stage; 1 for none.
        num_classes: Number of classes K.
        in_channels: Channels of the images.
        mean: Means of :class:`~common.networks.normalize.Normalize`; ``None`` keeps the pixels.
        std: Its standard deviations.
        config: Channels of all convolutions, "M" for a 2x2 max-pool; replaces the three lists.
        hidden: Widths of linear layers before the last, each linear - act - dropout.
        drop_rate: Dropout behind each hidden layer.
        activation: Makes one activation.
        pool: Of the head: average or maximum over each map.
        norm: Whether batch-norm follows each convolution.
        init: Sets starting weights, for example :func:`kaiming`; ``None`` keeps the defaults.
    """

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 3, 3, 3),
        widths: Sequence[int] = (64, 128, 256, 512, 512),
        strides: Sequence[int] = (2, 2, 2, 2, 2),
        num_classes: int = 10,
        in_channels: int = 3,
        mean: Statistics = None,
        std: Statistics = None,
        config: Config | None = None,
        hidden: Sequence[int] = (),
        drop_rate: float = 0.0,
        activation: Activation = nn.ReLU,
        pool: Pool = "avg",
        norm: bool = True,
        init: Initialize | None = None,
    ) -> None:
        super().__init__(in_channels, mean, std)
        check_positive(num_classes=num_classes, **{f"hidden[{i}]": h for i, h in enumerate(hidden)})
        check_drop_rates(drop_rate=drop_rate)
        if config is None:
            check_stages(depths, widths, strides)
            channels = [[width] * depth for depth, width in zip(depths, widths, strict=True)]
        else:
            channels, strides = stages_of(config)
        self.widths = tuple(stage[-1] for stage in channels)
        self.stem = nn.Identity()
        self.stages = nn.Sequential()
        inside = in_channels
        for counts, stride in zip(channels, strides, strict=True):
            stage = nn.Sequential()
            for out in counts:
                layer = named_sequence(conv=nn.Conv2d(inside, out, 3, padding=1))
                if norm:
                    layer.add_module("bn", nn.BatchNorm2d(out))
                layer.add_module("act", activation())
                stage.append(layer)
                inside = out
            if stride > 1:
                stage.add_module("pool", nn.MaxPool2d(stride, ceil_mode=True))
            self.stages.append(stage)
        sizes = (inside, *hidden)
        layers = [
            named_sequence(linear=nn.Linear(*pair), act=activation(), drop=nn.Dropout(drop_rate))
            for pair in pairwise(sizes)
        ]
        self.head = make_head(sizes[-1], num_classes, pool, layers)
        if init is not None:
            self.apply(init)


class VGG11(VGG):
    """VGG-11: 9,231,114 parameters at 10 classes and 3 channels."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(depths=(1, 1, 2, 2, 2), **kwargs)


class VGG13(VGG):
    """VGG-13: 9,416,010 parameters at 10 classes and 3 channels."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(depths=(2, 2, 2, 2, 2), **kwargs)


class VGG16(VGG):
    """VGG-16: 14,728,266 parameters at 10 classes and 3 channels."""


class VGG19(VGG):
    """VGG-19: 20,040,522 parameters at 10 classes and 3 channels."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(depths=(2, 2, 4, 4, 4), **kwargs)
