"""Networks of the comparison [D]: the small CNN, and any network with weight maps by position.

Which networks the paper uses is not known. Tags as in ``method.py``.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torchvision
from torch import Tensor, nn

from common.errors import ConfigurationError, check_choice
from common.networks.alexnet import AlexNet
from common.networks.insertion import given_shape, inside
from common.networks.normalize import Normalize, Statistics
from common.networks.preact_resnet import PreActResNet18
from common.networks.resnet import ResNet, ResNet18, check_positive, conv3x3, named_sequence
from common.networks.vgg import VGG
from common.networks.wide_resnet import WideResNet
from paper_wm.method import Variant, insert_weight_maps

Placement = Literal["first", "all", "stem", "stages"]
Position = Literal["pre", "post"]


class SmallCNN(nn.Module):
    """Three blocks conv3x3 - BN - ReLU, max-pooling behind the first two, a linear layer [D].

    155,626 parameters with the defaults, which PyTorch initialises.

    Args:
        widths: Channels of the three blocks.
        num_classes: Number of classes K.
        image_shape: Channels, height and width of the images.
        mean: Means of :class:`~common.networks.normalize.Normalize`; ``None`` keeps the pixels.
        std: Its standard deviations.

    Raises:
        ConfigurationError: If there are not three widths or the images cannot be halved twice.
    """

    def __init__(
        self,
        widths: Sequence[int] = (32, 64, 128),
        num_classes: int = 10,
        image_shape: Sequence[int] = (1, 28, 28),
        mean: Statistics = None,
        std: Statistics = None,
    ) -> None:
        super().__init__()
        check_positive(num_classes=num_classes)
        if len(widths) != 3 or min(widths) < 1:
            raise ConfigurationError(f"widths must be three numbers of channels, got {widths}")
        if len(image_shape) != 3 or min(image_shape) < 1 or min(image_shape[1:]) < 4:
            raise ConfigurationError(
                "image_shape must be (channels, height, width) with sides of at least 4, which are "
                f"halved twice, got {tuple(image_shape)}"
            )
        channels, height, width = image_shape
        self.normalize = Normalize(channels, mean, std)
        self.blocks = nn.Sequential()
        for i, out in enumerate(widths):
            block = named_sequence(
                conv=conv3x3(channels, out), bn=nn.BatchNorm2d(out), act=nn.ReLU()
            )
            if i < 2:
                block.add_module("pool", nn.MaxPool2d(2))
            self.blocks.append(block)
            channels = out
        inside = channels * (height // 4) * (width // 4)
        self.head = named_sequence(flatten=nn.Flatten(), linear=nn.Linear(inside, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, K)`` of images ``(N, C, H, W)`` in [0, 1]."""
        logits: Tensor = self.head(self.blocks(self.normalize(x)))
        return logits


# ------------------------------------------------------------------------- where the maps go [D]


def places(
    net: nn.Module, placement: Placement | None = None, position: Position = "pre"
) -> tuple[list[str], list[str]]:
    """Modules that maps go after: those at convolutions, and those at the outputs of stages.

    ``placement`` is ``first`` (default) or ``all`` blocks of a small CNN, ``stem`` (default) of a
    ResNet or WideResNet of ``common.networks``, or ``stages``, which is the stem and the output of
    every stage; ``position`` is ``pre``, before batch-norm, or ``post``, behind the activation and
    before pooling. These networks may be inside others.

    Raises:
        ConfigurationError: If the network does not have such places.
    """
    check_choice("position", position, Position)
    if placement is not None:
        check_choice("placement", placement, Placement)
    kind = type(net).__name__
    found = inside(net, (SmallCNN, ResNet, WideResNet))
    if found is None:
        raise ConfigurationError(
            f"where weight maps go in a {kind} is not known; name modules: after: [conv1]"
        )
    prefix, net = found
    kind = type(net).__name__
    known = ("first", "all") if isinstance(net, SmallCNN) else ("stem", "stages")
    if placement not in (*known, None):
        raise ConfigurationError(
            f"a {kind} has no place {placement!r}; placement must be {' or '.join(known)}"
        )
    if isinstance(net, SmallCNN):
        layer = "conv" if position == "pre" else "act"
        return [f"{prefix}blocks.{i}.{layer}" for i in range(3 if placement == "all" else 1)], []
    count = len(net.stages) if placement == "stages" else 0  # type: ignore[arg-type]
    stages = [f"{prefix}stages.{i}" for i in range(count)]
    if isinstance(net, ResNet):
        return [f"{prefix}stem.conv" if position == "pre" else f"{prefix}stem.act"], stages
    if position == "post":
        raise ConfigurationError(
            "the stem of a wide ResNet is one convolution, without batch-norm and activation; set "
            "position: pre"
        )
    return [f"{prefix}stem"], stages


def with_weight_maps(
    net: nn.Module,
    variant: Variant,
    placement: Placement | None = None,
    position: Position = "pre",
    after: list[str] | None = None,
    image_shape: Sequence[int] | None = None,
    init_value: float = 1.0,
    stage_init_value: float | None = None,
    **settings: Any,
) -> nn.Module:
    """A network with weight maps, for configuration files.

    Args:
        net: The base network; it is changed and returned.
        variant: As in :class:`~paper_wm.method.WeightMap`.
        placement: As in :func:`places`.
        position: As in :func:`places`.
        after: Names of modules, instead of ``placement`` and ``position``.
        image_shape: Channels, height and width of the images; the command line fills it in.
        init_value: As in :class:`~paper_wm.method.WeightMap`.
        stage_init_value: The same for maps at the outputs of stages. Nothing normalises the trunk
            behind them, so ``None`` is 1/k^2 where the filter is a sum: a factor of nine compounds
            [D]. Elsewhere ``None`` is ``init_value``.
        **settings: Others of :class:`~paper_wm.method.WeightMap`, the same for all maps.

    Raises:
        ConfigurationError: If there is no shape, no such place, or a setting is out of range.
    """
    check_choice("variant", variant, Variant)
    if after is not None and placement is not None:
        raise ConfigurationError(
            f"placement={placement} and after={after} both say where maps go; give one of them"
        )
    if after is not None and position != "pre":
        raise ConfigurationError(
            f"position={position} is for a placement, and after={after} names the modules; leave "
            "position out"
        )
    first, stages = (after, []) if after is not None else places(net, placement, position)
    if stage_init_value is not None and not stages:
        raise ConfigurationError(
            f"stage_init_value={stage_init_value} is for maps at the outputs of stages, which only "
            "placement: stages has; use init_value"
        )
    image_shape = given_shape(image_shape, "weight maps belong to positions")
    insert_weight_maps(net, first, image_shape, variant, init_value=init_value, **settings)
    if stages:
        is_sum = variant == "smoothing" and settings.get("kernel_norm", "sum") == "sum"
        if stage_init_value is None:
            stage_init_value = 1.0 / settings.get("kernel_size", 3) ** 2 if is_sum else init_value
        settings |= {"init_value": stage_init_value}
        insert_weight_maps(net, stages, image_shape, variant, **settings)
    return net


# ------------------------------------------------------------------------- kinds of networks, C1

ZOO: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "small CNN": (SmallCNN, (1, 28, 28)),
    "ResNet-18": (ResNet18, (3, 32, 32)),
    "PreActResNet-18": (PreActResNet18, (3, 32, 32)),
    "WRN-16-4": (lambda: WideResNet(16, 4), (3, 32, 32)),
    "VGG-16": (VGG, (3, 32, 32)),
    "AlexNet": (AlexNet, (3, 32, 32)),
    "torchvision ResNet-18": (lambda: torchvision.models.resnet18(), (3, 224, 224)),
    "torchvision MobileNetV2": (lambda: torchvision.models.mobilenet_v2(), (3, 224, 224)),
}


def try_insertions(variant: Variant) -> dict[str, bool]:
    """Whether one call puts a map behind the first convolution of each kind of network.

    It has worked if the logits keep their shape and the state dict its keys, but for a new one. On
    the meta device: shapes need no weights.
    """
    check_choice("variant", variant, Variant)
    found = {}
    for name, (make, shape) in ZOO.items():
        with torch.device("meta"):
            net, images = make().eval(), torch.empty(2, *shape)
            keys, before = set(net.state_dict()), net(images).shape
            first = next(n for n, m in net.named_modules() if isinstance(m, nn.Conv2d))
            insert_weight_maps(net, [first], shape, variant)
            kept = set(net.state_dict()) == keys | {f"{first}.weight_map.map"}
            found[name] = kept and net(images).shape == before
    return found
