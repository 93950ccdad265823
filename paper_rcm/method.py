"""RCM: larger feature maps from a network as it is, by its input or by its strides.

Either the input is up-sampled by m, or the first stride of 2 is replaced by 1. Neither adds a
parameter or changes the loss.

Tags name the source of a statement: [abs] the abstract, [note] a third party's reading note of the
journal version, [code] the official code (MTandHJ/rcm), [measured] obtained by running that code,
[derived] worked out here, [choice] ours, where nothing was found.
"""

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.attacks.losses import label_loss
from common.errors import ConfigurationError, check_choice
from common.modes import network_of, try_out
from common.networks.alexnet import AlexNet
from common.networks.normalize import Normalize, Statistics
from common.networks.parts import Part, parts_like, parts_of
from common.networks.preact_resnet import PreActResNet18
from common.networks.resnet import CifarResNet, Initialize, ResNet, ResNet18
from common.networks.resnet import kaiming as resnet_kaiming
from common.networks.vgg import VGG
from common.networks.vgg import kaiming as vgg_kaiming
from common.networks.wide_resnet import WideResNet
from common.objectives import Batch, InnerLoss, differentiable

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


class EnlargedNetwork(Part):
    """A network that sees its normalised input up-sampled: ``arch(enlarge((x - mean) / std, m))``.

    The order is that of the code. Attacks see ``x`` in the original resolution, and gradients pass
    through the interpolation. A wrong ``scale_factor`` or wrong strides change no shape in the
    state dict and load without an error; they belong to the configuration of a run [code].

    Args:
        arch: Any network; one of ``common.networks`` without ``mean`` and ``std``.
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
        inner = next((m for m in arch.modules() if isinstance(m, Normalize)), None)
        linear = getattr(getattr(arch, "head", None), "linear", None)
        if inner is not None and inner.mean is not None:
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
        z: Tensor = self.arch.features(self.enlarged(x))
        return z

    def pooled(self, x: Tensor) -> Tensor:
        """See :func:`pooled`."""
        return pooled(self, x)

    def own_losses(self) -> dict[str, InnerLoss]:
        """``feature``, and where the first strides can be changed, ``ce_strides``.

        The paper's specially designed attacks were not found; these are ours instead [choice].
        """
        losses: dict[str, InnerLoss] = {"feature": feature_distance} if pools_of(self) else {}
        is_fixed = any(part.has_fixed_size for part in parts_of(self.arch))
        if isinstance(self.arch, ResNet) and len(self.arch.stages) > 1 and not is_fixed:
            losses["ce_strides"] = other_strides
        return losses

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, K)`` of images ``(N, C, H, W)`` in [0, 1]."""
        logits: Tensor = self.arch(self.enlarged(x))
        return logits

    def extra_repr(self) -> str:
        """Settings, for ``print(net)``."""
        return f"scale_factor={self.scale_factor}, mode={self.mode}"


# ------------------------------------------------------- attacks through the mechanism [choice]


def pools_of(net: nn.Module) -> list[nn.Module]:
    """The modules that may be a network's global pooling."""
    kinds = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
    named = net.named_modules()
    return [m for name, m in named if name.endswith("head.pool") or isinstance(m, kinds)]


def pooled(model: Any, x: Tensor) -> Tensor:
    """The vector f that the global pooling gives to the classifier, ``(N, D)`` [choice].

    It is what the last of the pools puts out that run in a pass of the whole network.

    Raises:
        TypeError: If there is none.
    """
    net: nn.Module = network_of(model)
    if not (pools := pools_of(net)):
        raise TypeError(
            f"{type(net).__name__} has no global pooling, so its pooled feature is unknown; use a "
            "network with head.pool or an adaptive pool"
        )
    kept: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Tensor) -> None:
        kept.append(output.flatten(1))

    with ExitStack() as hooks:
        for pool in pools:
            hooks.enter_context(pool.register_forward_hook(keep))
        net(x)
    return kept[-1]


def feature_distance(model: Any, batch: Batch) -> Callable[[Tensor], Tensor]:
    """X' -> squared l2 distance of the pooled features of x' and x, ``(N,)``; no labels."""
    with torch.no_grad():
        clean = differentiable(pooled(model, batch["x"]))
    return lambda x: (pooled(model, x) - clean).square().sum(dim=1)


def other_strides(model: Any, batch: Batch) -> Callable[[Tensor], Tensor]:
    """X' -> cross-entropy of the twin with other strides, ``(N,)``: a stride-transfer attack."""
    return label_loss(with_other_strides(network_of(model)), differentiable(batch["y"]))


def with_other_strides(net: nn.Module) -> nn.Module:
    """The same weights with the second stage's stride changed from 2 to 1 or from 1 to 2.

    These are the two networks of the paper's comparison, 1222 and 1122: their state dicts fit each
    other [measured].
    """
    twin = copy.deepcopy(net).eval()
    # An EnlargedNetwork may be around another one.
    around: list[Any] = [part.arch for part in parts_like(twin, EnlargedNetwork)]
    backbone: Any = next(arch for arch in around if isinstance(arch, ResNet))
    block = backbone.stages[1][0]
    for module in block.modules():
        if isinstance(module, nn.Conv2d) and (
            module is block.conv1 or module.kernel_size == (1, 1)
        ):
            side = 1 if module.stride[0] == 2 else 2
            module.stride = (side, side)
    return twin


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


def shrink_first(net: nn.Module, image_shape: Sequence[int]) -> None:
    """Replace the first stride above 1 of any network by 1, in place: :func:`shrink` on modules.

    Convolutions and pools that stride and read maps of the same size are one operator, as a block
    and its shortcut. A pool without overlap becomes the identity. Networks that other methods put
    beside this one, such as a router, stay as they are.

    Raises:
        ConfigurationError: If nothing strides.
    """
    seen: list[tuple[str, int]] = []

    def keep(name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append((name, args[0].shape[-1]))

    sides = [side for part in parts_of(net) for side in part.side_networks()]
    beside = {module for side in sides for module in side.modules()}
    with ExitStack() as hooks:
        for name, module in net.named_modules():
            if isinstance(module, STRIDING) and _stride(module) > 1 and module not in beside:
                hooks.enter_context(module.register_forward_pre_hook(partial(keep, name)))
        try_out(net, image_shape, "give the image_shape of the images it is for")
    if not seen:
        raise ConfigurationError(
            f"{type(net).__name__} has no convolution or pool left with a stride above 1 to "
            "replace by 1"
        )
    for name in {name for name, side in seen if side == seen[0][1]}:
        found: Any = net.get_submodule(name)
        if isinstance(found, nn.Conv2d):
            found.stride = (1, 1)
            continue
        if found.kernel_size == found.stride:  # the identity; what is inserted behind it stays
            found.kernel_size, found.padding = 1, 0
        found.stride = 1


STRIDING = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)


def _stride(module: Any) -> int:
    return int(module.stride if isinstance(module.stride, int) else max(module.stride))


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
        widths: Channels of the three stages.
        **kwargs: Of :class:`~common.networks.resnet.ResNet`.
    """

    def __init__(
        self,
        strides: Sequence[int] = (2, 2, 2),
        in_channels: int = 1,
        init: Initialize | None = resnet_kaiming,
        widths: Sequence[int] = (8, 16, 32),
        **kwargs: Any,
    ) -> None:
        super().__init__(
            depths=(1, 1, 1),
            widths=widths,
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
