"""AW-Net itself: any residual backbone of ``common.networks`` under the direction of a router.

Tags as in :mod:`paper_awnet.method`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from common.errors import ConfigurationError, check_choice
from common.networks.normalize import Normalize
from common.networks.resnet import Initialize, ResNet, kaiming
from common.weights import check_weights_fit
from paper_awnet.method import (
    DynamicConv2d,
    MixBatchNorm2d,
    Outputs,
    Route,
    Router,
    SideNetwork,
    check_probabilities,
    rows_by_type,
    straight_through,
)

MakeSideNetwork = Callable[[int, Sequence[int]], SideNetwork]
"""Makes a side network from the images' channels and the S_j of all blocks."""

Scope = Literal["block", "last_conv"]
Mixing = Literal["soft", "hard", "clean", "adv"]


class AWNet(nn.Module):
    """A network whose filters and batch-norms follow a router.

    The backbone's weights stay where they were: ``arch`` has the same modules with the same names,
    every batch-norm has become two (``bn1.clean``, ``bn1.adv``), and convolutions of the residual
    branches scale their output. Stem, shortcuts, head and linear layer have static filters [D].

    Args:
        arch: A backbone of ``common.networks`` whose stages are made of residual blocks; it is
            changed in place.
        router: The side network: :class:`~paper_awnet.method.Router` or
            :class:`~paper_awnet.method.Detector`, with their settings.
        dynamic: Whether filters are scaled; without, omega is 1 and there are no signal heads.
        scope: Which convolutions are dynamic: all of each residual ``block`` [D], or its
            ``last_conv``, the literal reading of the figure.
        mixbn: Whether there are two batch-norms; ``None`` is yes with a router and no with a
            detector [A][F].
        mixing: How they are mixed in evaluation mode: ``soft`` by P_type [F]; ``hard``, by its
            larger part, with the gradient of the soft one so that attacks are not misled [D]; or
            always ``clean`` or ``adv``.

    Raises:
        ConfigurationError: If the backbone has no residual blocks or a choice is unknown.
    """

    def __init__(
        self,
        arch: nn.Module,
        router: MakeSideNetwork = Router,
        dynamic: bool = True,
        scope: Scope = "block",
        mixbn: bool | None = None,
        mixing: Mixing = "soft",
    ) -> None:
        super().__init__()
        for name, value, choices in (("scope", scope, Scope), ("mixing", mixing, Mixing)):
            check_choice(name, value, choices)
        self.route = Route()
        self.mixing: Mixing = mixing
        self.arch = arch
        branches = branch_convolutions(arch, scope) if dynamic else []
        self.widths = [[conv.out_channels for _, conv in branch] for branch in branches]
        normalize = getattr(arch, "normalize", None)
        channels = normalize.in_channels if isinstance(normalize, Normalize) else 3
        self.router = router(channels, [sum(widths) for widths in self.widths])
        self.has_mixbn = self.router.splits_batch_norm if mixbn is None else mixbn
        for position, (name, conv) in enumerate(pair for branch in branches for pair in branch):
            replace(arch, name, DynamicConv2d(conv, self.route, position))
        if self.has_mixbn:
            norms = [(n, m) for n, m in arch.named_modules() if isinstance(m, nn.BatchNorm2d)]
            for name, norm in norms:
                replace(arch, name, MixBatchNorm2d(norm, self.route))

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, K)`` of images ``(N, C, H, W)`` in [0, 1], in evaluation mode."""
        return self.outputs(x).logits

    def outputs(
        self,
        x: Tensor,
        types: Tensor | None = None,
        p: Tensor | None = None,
        signals: Sequence[Tensor] | None = None,
    ) -> Outputs:
        """Everything the network has to say about images.

        Args:
            x: Images in [0, 1], ``(N, C, H, W)``.
            types: 0 clean or 1 adversarial, ``(N,)``; read by two batch-norms in training mode and
                by nothing else.
            p: P_type instead of the network's own, ``(2,)`` or ``(N, 2)``: for the mixture of
                batch-norms, and for a detector's signals, which follow it.
            signals: All omega_j ``(N, S_j)`` instead of the network's own.

        Raises:
            ConfigurationError: If types are missing in training mode, ``p`` is no distribution or
                signals have other shapes.
        """
        rows = None
        if self.training and self.has_mixbn:
            if types is None:
                raise ConfigurationError(
                    "in training mode every image goes through the batch-norms of its type: call "
                    "outputs(x, types=...), or put the network into evaluation mode. An objective "
                    "of paper_awnet.objectives does so, an attack needs adversary.mode: eval"
                )
            rows = rows_by_type(types)
        z, type_logits = self.router.read(x)
        own = type_logits.softmax(dim=1)
        used = own if p is None else check_probabilities(p, len(x)).to(own)
        if signals is None:
            signals = self.router.signals(z, used)
        self._check_signals(signals, len(x))
        each = [
            part
            for omega, widths in zip(signals, self.widths, strict=True)
            for part in torch.split(omega, widths, dim=1)
        ]
        with self.route.told(each, used if p is not None else self.mixture(own), rows):
            logits = self.arch(x)
        return Outputs(logits, type_logits, used, list(signals))

    def mixture(self, p: Tensor) -> Tensor:
        """Weights of the two batch-norms in evaluation mode, ``(N, 2)``, by ``mixing``."""
        if self.mixing == "soft":
            return p
        if self.mixing == "hard":
            return straight_through(p)
        return p.new_tensor([1.0, 0.0] if self.mixing == "clean" else [0.0, 1.0]).expand_as(p)

    def _check_signals(self, signals: Sequence[Tensor], count: int) -> None:
        expected = [(count, sum(widths)) for widths in self.widths]
        if [tuple(omega.shape) for omega in signals] != expected:
            raise ConfigurationError(
                f"signals must have the shapes {expected}, one for each block, got "
                f"{[tuple(omega.shape) for omega in signals]}"
            )

    def load_static(self, weights: Mapping[str, Tensor]) -> None:
        """Copy a static network of the same backbone; each of two batch-norms gets its own copy.

        Args:
            weights: State dict of the backbone.

        Raises:
            CheckpointError: If they belong to another network.
        """
        own = self.arch.state_dict()
        plain = {name: name.replace(".clean.", ".").replace(".adv.", ".") for name in own}
        check_weights_fit({plain[name]: own[name] for name in own}, weights, "the static network")
        self.arch.load_state_dict({name: weights[plain[name]] for name in own})

    def extra_repr(self) -> str:
        """Settings, for ``print(net)``."""
        return f"mixbn={self.has_mixbn}, mixing={self.mixing}, blocks={len(self.widths)}"


def branch_convolutions(arch: nn.Module, scope: Scope) -> list[list[tuple[str, nn.Conv2d]]]:
    """By block, the convolutions of the residual branch in forward order, with their full names.

    Raises:
        ConfigurationError: If there are none, or there is no such scope.
    """
    check_choice("scope", scope, Scope)
    branches = []
    stages: Any = getattr(arch, "stages", ())
    for i, stage in enumerate(stages):
        blocks = stage if isinstance(stage, nn.Sequential) else ()
        for j, block in enumerate(blocks):
            found = [
                (f"stages.{i}.{j}.{name}", module)
                for name, module in block.named_modules()
                if isinstance(module, nn.Conv2d) and name.partition(".")[0] != "shortcut"
            ]
            if found and hasattr(block, "shortcut"):
                branches.append(found if scope == "block" else found[-1:])
    if not branches:
        raise ConfigurationError(
            f"{type(arch).__name__} has no residual blocks whose filters could be scaled; use a "
            "ResNet, WideResNet, PreActResNet or MobileNetV2 of common.networks, or set "
            "dynamic: false"
        )
    return branches


def replace(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of another."""
    parent, _, last = name.rpartition(".")
    setattr(root.get_submodule(parent), last, module)


class DigitsStudent(ResNet):
    """The scaled-down student: three basic blocks of 8, 16, 32 channels for 8x8 digits [D].

    Args:
        in_channels: Channels of the images.
        widths: Of the blocks; the teachers' are twice these.
        init: Sets starting weights.
        **kwargs: Of :class:`~common.networks.resnet.ResNet`.
    """

    def __init__(
        self,
        in_channels: int = 1,
        widths: Sequence[int] = (8, 16, 32),
        init: Initialize | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            depths=(1, 1, 1),
            widths=widths,
            strides=(1, 2, 2),
            in_channels=in_channels,
            init=init,
            **kwargs,
        )


class ResNet56(ResNet):
    """ResNet-56 with projections by conv1x1 - BN [M]: 855,770 parameters at 10 classes.

    Weights start as in :func:`common.networks.resnet.kaiming`.

    Args:
        **kwargs: Of :class:`~common.networks.resnet.ResNet`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(
            depths=(9, 9, 9), widths=(16, 32, 64), strides=(1, 2, 2), init=kaiming, **kwargs
        )


class ResNet34(ResNet):
    """ResNet-34 for small images: 21,282,122 parameters at 10 classes.

    Args:
        **kwargs: Of :class:`~common.networks.resnet.ResNet`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(depths=(3, 4, 6, 3), **kwargs)
