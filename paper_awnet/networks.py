"""Networks: AW-Net on any residual backbone, OAT's network, frozen teachers, and backbones.

Tags as in :mod:`paper_awnet.method`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from common.checkpoints import checkpoint_beside, load_weights
from common.errors import CheckpointError, ConfigurationError, check_choice
from common.modes import network_of, try_out
from common.networks.backbone import Backbone
from common.networks.resnet import ResNet, kaiming
from paper_awnet.method import (
    DynamicConv2d,
    FiLMBatchNorm2d,
    Knob,
    MixBatchNorm2d,
    Outputs,
    Route,
    Router,
    Rows,
    SideNetwork,
    check_probabilities,
    rows_by_type,
    straight_through,
)

MakeSideNetwork = Callable[[int, Sequence[int]], SideNetwork]
"""Makes a side network from the images' channels and the S_j of all blocks."""

Network = TypeVar("Network", bound=nn.Module)
Scope = Literal["block", "last_conv"]
Mixing = Literal["soft", "hard", "clean", "adv"]


class AWNet(nn.Module):
    """A network whose filters and batch-norms are set per image by a router.

    The modules of ``arch`` keep their names and weights; every batch-norm becomes two
    (``bn1.clean``, ``bn1.adv``), and convolutions of the residual branches scale their output.
    Stem, shortcuts, head and linear layer have static filters [D].

    Args:
        arch: A backbone of ``common.networks`` with residual blocks; it is changed in place.
        router: :class:`~paper_awnet.method.Router` or :class:`~paper_awnet.method.Detector`.
        dynamic: Whether filters are scaled; without, omega is 1 and there are no signal heads.
        scope: Dynamic convolutions: all of each residual ``block`` [D], or its ``last_conv``, the
            literal reading of the figure.
        mixbn: Whether there are two batch-norms; ``None`` is yes with a router and no with a
            detector [A][F].
        mixing: How they are mixed in evaluation mode: ``soft`` by P_type [F]; ``hard`` by its
            argmax, with the gradient of the soft mixture so that attacks are not misled [D]; or
            always ``clean`` or ``adv``.
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
        check_choice("scope", scope, Scope)
        check_choice("mixing", mixing, Mixing)
        self.route = Route()
        self.mixing: Mixing = mixing
        self.arch = arch
        branches = branch_convolutions(arch, scope) if dynamic else []
        self.widths = [[conv.out_channels for _, conv in branch] for branch in branches]
        channels = arch.normalize.in_channels if isinstance(arch, Backbone) else 3
        self.router = router(channels, [sum(widths) for widths in self.widths])
        self.has_mixbn = not self.router.follows_type if mixbn is None else mixbn
        for position, (name, conv) in enumerate(pair for branch in branches for pair in branch):
            arch.set_submodule(name, DynamicConv2d(conv, self.route, position))
        if self.has_mixbn:
            replace_norms(arch, lambda norm: MixBatchNorm2d(norm, self.route))

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
        """Logits, type logits, P_type and signals of images ``(N, C, H, W)``.

        Args:
            x: In [0, 1].
            types: 0 clean or 1 adversarial, ``(N,)``; read by the two batch-norms in training mode.
            p: P_type instead of the network's, ``(2,)`` or ``(N, 2)``: for the mixture of
                batch-norms, and for a detector's signals, which follow it.
            signals: All omega_j ``(N, S_j)`` instead of the network's.

        Raises:
            ConfigurationError: If one of them is missing or has another shape.
        """
        rows = training_rows(types, "AWNet") if self.training and self.has_mixbn else None
        z, type_logits = self.router.read(x)
        own = type_logits.softmax(dim=1)
        used = own if p is None else check_probabilities(p, len(x)).to(own)
        if signals is None:
            signals = self.router.signals(z, used)
        expected = [(len(x), sum(widths)) for widths in self.widths]
        if (got := [tuple(omega.shape) for omega in signals]) != expected:
            raise ConfigurationError(
                f"signals must have the shapes {expected}, one for each block, got {got}"
            )
        mixture = self.mixture(own) if p is None else used
        with self.route.told(self.by_convolution(signals), mixture, rows):
            logits = self.arch(x)
        return Outputs(logits, type_logits, used, list(signals))

    def by_convolution(self, signals: Sequence[Tensor]) -> list[Tensor]:
        """All omega_j ``(N, S_j)`` as one tensor ``(N, O)`` for each dynamic convolution."""
        blocks = zip(signals, self.widths, strict=True)
        return [part for omega, widths in blocks for part in torch.split(omega, widths, dim=1)]

    def mixture(self, p: Tensor) -> Tensor:
        """Weights of the two batch-norms in evaluation mode, ``(N, 2)``, by ``mixing``."""
        if self.mixing == "soft":
            return p
        if self.mixing == "hard":
            return straight_through(p)
        return p.new_tensor([1.0, 0.0] if self.mixing == "clean" else [0.0, 1.0]).expand_as(p)


def branch_convolutions(arch: nn.Module, scope: Scope) -> list[list[tuple[str, nn.Conv2d]]]:
    """By block, the convolutions of the residual branch in forward order, with their full names.

    Raises:
        ConfigurationError: If there are none, or there is no such scope.
    """
    check_choice("scope", scope, Scope)
    branches = []
    for i, stage in enumerate(arch.stages if isinstance(arch, Backbone) else ()):
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


def replace_norms(root: nn.Module, make: Callable[[nn.BatchNorm2d], nn.Module]) -> None:
    """Replace every batch-norm by what ``make`` returns for it."""
    for name, module in list(root.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            root.set_submodule(name, make(module))


def training_rows(types: Tensor | None, network: str) -> tuple[Rows, Rows]:
    """The images of each type, which training mode needs; missing ones are an error."""
    if types is None:
        raise ConfigurationError(
            f"in training mode every image of {network} goes through the batch-norms of its type: "
            "give types=..., or put the network into evaluation mode. An objective of "
            "paper_awnet.objectives does so, an attack needs adversary.mode: eval"
        )
    return rows_by_type(types)


def require_network(model: Any, kind: type[Network]) -> Network:
    """The network that a classifier holds or that the model is; another class is an error."""
    net = network_of(model)
    if not isinstance(net, kind):
        raise ConfigurationError(
            f"this needs a paper_awnet.networks.{kind.__name__}, got {type(net).__name__}; wrap "
            "the backbone in one"
        )
    return net


def forced(net: AWNet, kind: int) -> Callable[[Tensor], Tensor]:
    """Images to logits, with P_type forced to one type for every image."""
    return lambda x: net.outputs(x, p=torch.eye(2, device=x.device)[kind]).logits


class OATNet(nn.Module):
    """A backbone all of whose batch-norms depend on lambda; a baseline, reconstructed [D].

    Wang et al. 2020, "Once-for-All Adversarial Training": one network for all trade-offs. A number
    lambda, drawn for each image in training and set by hand in testing (``knob``), modulates the
    output of every batch-norm with ``hidden`` units [D], and there are two batch-norms, for
    lambda = 0 and for lambda > 0. The backbone is changed in place.
    """

    def __init__(self, arch: nn.Module, knob: float = 0.2, hidden: int = 64) -> None:
        super().__init__()
        if not 0.0 <= knob <= 1.0:
            raise ConfigurationError(
                f"knob is OAT's lambda in [0, 1], got {knob}; 0 asks for clean accuracy alone"
            )
        self.knob = knob
        self.route = Knob()
        self.arch = arch
        replace_norms(arch, lambda norm: FiLMBatchNorm2d(norm, self.route, hidden))

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, K)`` at the deployed lambda, in evaluation mode."""
        return self.at(x, self.knob)

    def at(self, x: Tensor, lam: float | Tensor, types: Tensor | None = None) -> Tensor:
        """Logits ``(N, K)`` at one lambda for all images or at that of each ``(N,)``.

        In training mode the types ``(N,)`` select the batch-norm, in evaluation mode lambda does.
        """
        rows = training_rows(types, "OATNet") if self.training else None
        each = lam.to(x) if isinstance(lam, Tensor) else x.new_full((len(x),), lam)
        is_adversarial = (each > 0).to(x)
        mixture = torch.stack([1 - is_adversarial, is_adversarial], dim=1)
        with self.route.told((), mixture, rows, condition=each[:, None]):
            logits: Tensor = self.arch(x)
        return logits


@dataclass(eq=False)
class Teacher:
    """A frozen network in evaluation mode, evaluated without gradient.

    It is not a module, so that an objective neither trains, saves nor switches it; copies of the
    objective share it.

    Args:
        net: Images in [0, 1] to logits ``(N, K)``, with the classes of the student.
        experiment: The experiment that trained it; its run directory with the same seed is looked
            up beside the student's.
        checkpoint: ``last`` or ``selected``.
        path: A file with its weights; takes precedence over ``experiment``.
        as_it_is: Whether ``net`` already has its weights; then no file is read.
    """

    net: nn.Module
    experiment: str | None = None
    checkpoint: str = "last"
    path: str | None = None
    as_it_is: bool = False

    def __post_init__(self) -> None:
        if self.experiment is None and self.path is None and not self.as_it_is:
            raise ConfigurationError(
                "a teacher needs weights, got experiment=None, path=None and as_it_is=False; name "
                "the experiment that trains it or a file, or set as_it_is"
            )
        self.net.eval().requires_grad_(False)

    def __deepcopy__(self, memo: Any) -> "Teacher":
        return self

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Logits ``(N, K)``, constant."""
        logits: Tensor = self.net.to(x.device, x.dtype)(x)
        return logits

    def load(self, run: str | Path, shape: Sequence[int], num_classes: int) -> None:
        """Read the weights, given the student's run directory, and try the network out.

        Raises:
            CheckpointError: If there is no such file, or it belongs to another network.
            ConfigurationError: If the network does not fit images ``(C, H, W)`` or classes.
        """
        if not self.as_it_is:
            load_weights(self.net, Path(self.path) if self.path else self._find(Path(run)))
        name = f"the teacher {self.path or self.experiment or type(self.net).__name__}"
        remedy = "give the network it was trained with"
        scores = tuple(try_out(self.net, shape, remedy, what=name).shape[1:])
        if scores != (num_classes,):
            raise ConfigurationError(
                f"{name} has {scores} classes and the data have {num_classes}; choose a teacher "
                "that was trained on these data"
            )

    def _find(self, run: Path) -> Path:
        path = checkpoint_beside(run, str(self.experiment), self.checkpoint)
        if not path.is_file():
            seed = path.parents[1].name.removeprefix("seed")
            command = f"fit --config {self.experiment}"
            raise CheckpointError(
                f"the teacher {self.experiment} has not been trained: {path} does not exist; train "
                f"it first with python -m paper_awnet {command} --seed_everything {seed}, or give "
                "a file with its weights as path"
            )
        return path


class DigitsStudent(ResNet):
    """The scaled-down student: three basic blocks of 8, 16, 32 channels for 8x8 digits [D].

    The teachers' ``widths`` are twice these.
    """

    def __init__(
        self, in_channels: int = 1, widths: Sequence[int] = (8, 16, 32), **kwargs: Any
    ) -> None:
        super().__init__(
            depths=(1, 1, 1), widths=widths, strides=(1, 2, 2), in_channels=in_channels, **kwargs
        )


class ResNet56(ResNet):
    """ResNet-56 with projections by conv1x1 - BN [M]: 855,770 parameters at 10 classes."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(
            depths=(9, 9, 9), widths=(16, 32, 64), strides=(1, 2, 2), init=kaiming, **kwargs
        )


class ResNet34(ResNet):
    """ResNet-34 for small images: 21,282,122 parameters at 10 classes."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(depths=(3, 4, 6, 3), **kwargs)
