"""RCM: larger feature maps from a network as it is, by its input or by its strides.

Either the input is up-sampled by m, or the first stride of 2 is replaced by 1. Neither adds a
parameter or changes the loss.

Tags name the source of a statement: [abs] the abstract, [note] a third party's reading note of the
journal version, [code] the official code (MTandHJ/rcm), [measured] obtained by running that code,
[derived] worked out here, [choice] ours, where nothing was found.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import ConfigurationError, check_choice
from common.networks.alexnet import AlexNet
from common.networks.normalize import Normalize, Statistics
from common.networks.preact_resnet import PreActResNet18
from common.networks.resnet import CifarResNet, Initialize, ResNet, ResNet18
from common.networks.resnet import kaiming as resnet_kaiming
from common.networks.vgg import VGG
from common.networks.vgg import kaiming as vgg_kaiming
from common.networks.wide_resnet import WideResNet

Mode = Literal["nearest", "bilinear", "bicubic"]
"""Interpolation; the paper has the first two [note]."""

# ------------------------------------------------------------------------ up-sampling the input


def enlarge(u: Tensor, scale_factor: float, mode: Mode = "nearest") -> Tensor:
    """Images ``(N, C, H, W)`` up-sampled to ``(N, C, round(m H), round(m W))`` [code].

    A factor m of 1 returns ``u`` itself. Bilinear and bicubic do not align corners. Rounding, for
    factors that are no integers, is a [choice].
    """
    check_choice("mode", mode, Mode)
    if scale_factor == 1:
        return u
    size = [round(scale_factor * side) for side in u.shape[-2:]]
    return F.interpolate(u, size=size, mode=mode)


class EnlargedNetwork(nn.Module):
    """A network that sees its normalised input up-sampled: ``arch(enlarge((x - mean) / std, m))``.

    The order is that of the code. Attacks see ``x`` in the original resolution, and gradients pass
    through the interpolation. A wrong ``scale_factor`` or wrong strides change no shape in the
    state dict and load without an error; they belong to the configuration of a run [code].

    Args:
        arch: A backbone of ``common.networks``, without ``mean`` and ``std``.
        scale_factor: The factor m, at least 1; 2 is the paper's setting [code].
        mode: Interpolation; a factor that is no integer needs ``bilinear`` [choice] or ``bicubic``.
        num_classes: Number of classes K, which ``arch`` must have, if given.
        in_channels: Channels of the images, by default those of ``arch``.
        mean: Means of :class:`~common.networks.normalize.Normalize`; ``None`` keeps the pixels.
        std: Its standard deviations.

    Raises:
        ConfigurationError: If the factor is out of range or does not fit the mode, or ``arch`` has
            other classes or channels or normalises.
    """

    def __init__(
        self,
        arch: nn.Module,
        scale_factor: float = 1,
        mode: Mode = "nearest",
        num_classes: int | None = None,
        in_channels: int | None = None,
        mean: Statistics = None,
        std: Statistics = None,
    ) -> None:
        super().__init__()
        check_choice("mode", mode, Mode)
        if not (math.isfinite(scale_factor) and scale_factor >= 1):
            raise ConfigurationError(f"scale_factor must be at least 1, got {scale_factor}")
        if scale_factor != int(scale_factor) and mode == "nearest":
            raise ConfigurationError(
                f"scale_factor={scale_factor} is no integer, and mode=nearest would repeat pixels "
                "unevenly; use mode=bilinear, or an integer"
            )
        inner: Any = getattr(arch, "normalize", None)
        linear = getattr(getattr(arch, "head", None), "linear", None)
        if getattr(inner, "mean", None) is not None:
            raise ConfigurationError(
                f"arch has mean={inner.mean.flatten().tolist()}; give mean and std to "
                "EnlargedNetwork, which normalises before it enlarges, and none to arch"
            )
        channels = getattr(inner, "in_channels", in_channels)
        classes = getattr(linear, "out_features", num_classes)
        for name, given, own in (
            ("in_channels", in_channels, channels),
            ("num_classes", num_classes, classes),
        ):
            if given not in (None, own):
                raise ConfigurationError(
                    f"{name} is {given} and that of arch {own}; give one of the two"
                )
        self.scale_factor = scale_factor
        self.mode: Mode = mode
        self.normalize = Normalize(3 if channels is None else channels, mean, std)
        self.arch: Any = arch

    def enlarged(self, x: Tensor) -> Tensor:
        """What ``arch`` reads of images ``x`` in [0, 1], ``(N, C, round(m H), round(m W))``."""
        return enlarge(self.normalize(x), self.scale_factor, self.mode)

    def features(self, x: Tensor) -> Tensor:
        """The map before the head, ``(N, D, H', W')``; tokens ``(N, T, D)`` of a transformer."""
        z: Tensor = self._part("features")(self.enlarged(x))
        return z

    def pooled(self, x: Tensor) -> Tensor:
        """The vector f that the global pooling gives to the classifier, ``(N, D)`` [choice]."""
        z = self.features(x)
        head = self._part("head")
        names = [name for name, _ in head.named_children()]
        f: Tensor = head[: names.index("pool") + 1](z).flatten(1)
        return f

    def _part(self, name: str) -> Any:
        if not hasattr(self.arch, name):
            raise TypeError(
                f"{type(self.arch).__name__} has no {name!r}, so its pooled feature is unknown; "
                "use a backbone of common.networks, which are stem, stages and head"
            )
        return getattr(self.arch, name)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, K)`` of images ``(N, C, H, W)`` in [0, 1]."""
        logits: Tensor = self.arch(self.enlarged(x))
        return logits

    def extra_repr(self) -> str:
        """Settings, for ``print(net)``."""
        return f"scale_factor={self.scale_factor}, mode={self.mode}"


# ----------------------------------------------------------------------------- shrinking strides


def parse_strides(text: str) -> tuple[int, ...]:
    """Strides of a string of digits, one for each down-sampling operator: (1, 1, 2, 2) of "1122".

    Raises:
        ConfigurationError: If ``text`` is no string of digits from 1.
    """
    if not text or not set(text) <= set("123456789"):
        raise ConfigurationError(
            f'strides are written as digits from 1, such as "1122", got {text!r}'
        )
    return tuple(map(int, text))


def shrink(strides: Sequence[int]) -> tuple[int, ...]:
    """Strides with the first 2 replaced by 1, so that the last map gets twice as large [code].

    Raises:
        ConfigurationError: If there is no 2.
    """
    if 2 not in strides:
        raise ConfigurationError(f"strides {list(strides)} have no 2 to replace by 1")
    first = list(strides).index(2)
    return (*strides[:first], 1, *strides[first + 1 :])


# ------------------------------------------------------------------------------ named networks


class VGG16BN(VGG):
    """VGG-16 with batch-norm and a classifier 512 - 256 - 256 - K with dropout 0.5 [code].

    14,922,826 parameters at 10 classes and 3 channels.

    Args:
        strides: Of the five max-pools; 1 leaves a pool out.
        hidden: Widths of the classifier's hidden layers.
        drop_rate: Dropout behind each.
        init: Sets starting weights.
        **kwargs: Of :class:`~common.networks.vgg.VGG`.
    """

    def __init__(
        self,
        strides: Sequence[int] = (1, 1, 2, 2, 2),
        hidden: Sequence[int] = (256, 256),
        drop_rate: float = 0.5,
        init: Initialize | None = vgg_kaiming,
        **kwargs: Any,
    ) -> None:
        super().__init__(strides=strides, hidden=hidden, drop_rate=drop_rate, init=init, **kwargs)


class DigitsNet(ResNet):
    """The scaled-down network: three basic blocks of 8, 16, 32 channels for 8x8 digits [choice].

    Args:
        strides: Of the three stages; 222 leads to a map of one pixel, 122 to 2x2.
        in_channels: Channels of the images.
        init: Sets starting weights.
        **kwargs: Of :class:`~common.networks.resnet.ResNet`.
    """

    def __init__(
        self,
        strides: Sequence[int] = (2, 2, 2),
        in_channels: int = 1,
        init: Initialize | None = resnet_kaiming,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            depths=(1, 1, 1),
            widths=(8, 16, 32),
            strides=strides,
            in_channels=in_channels,
            init=init,
            **kwargs,
        )


BASE_STRIDES: dict[type[nn.Module], str] = {
    ResNet18: "1222",
    PreActResNet18: "1222",
    AlexNet: "1122",
    VGG: "11222",
    WideResNet: "122",
    CifarResNet: "122",
    DigitsNet: "222",
}
"""Strides the paper starts from: [code] for the first four, which are not the defaults of AlexNet
(2222) and VGG (22222); [choice] for the others.

The digits are the first convolution of each residual stage, AlexNet's first convolution and its
three max-pools, and VGG's five max-pools. :func:`shrink` of these is [code] for the ResNets (1122)
and a [choice] for the others (1112, 11122, 112).
"""
