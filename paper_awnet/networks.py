"""Networks: AW-Net on any residual network, OAT's network, and backbones.

Tags as in :mod:`paper_awnet.method`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from common.attacks.losses import classify, cross_entropy
from common.errors import ConfigurationError, check_choice
from common.modes import network_of
from common.networks.parts import ADVERSARIAL, CLEAN, Part, parts_like, telling
from common.networks.resnet import ResNet, kaiming
from common.objectives import Batch, InnerLoss, Model, differentiable
from paper_awnet.insertion import Scope, branch_convolutions, check_free, replace_norms
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
    Types,
    check_probabilities,
    rows_by_type,
    signal_statistics,
    straight_through,
)

MakeSideNetwork = Callable[[int, Sequence[int]], SideNetwork]
"""Makes a side network from the images' channels and the S_j of all blocks."""

LAMBDAS = (0.0, 0.1, 0.2, 0.3, 0.4, 1.0)
"""Values of OAT's lambda."""

Network = TypeVar("Network", bound=Part)
Mixing = Literal["soft", "hard", "clean", "adv"]


class AWNet(Part):
    """A network whose filters and batch-norms are set per image by a router.

    The modules of ``arch`` keep their names and weights; every batch-norm becomes two
    (``bn1.clean``, ``bn1.adv``), and convolutions of the residual branches scale their output.
    Stem, shortcuts, head and linear layer have static filters [D].

    In a pass that is told the types it answers with the type loss, whose weight in the objectives
    of ``common.objectives`` is 1 [D].

    Args:
        arch: A network with residual blocks, inside other networks too; it is changed in place.
        router: :class:`~paper_awnet.method.Router` or :class:`~paper_awnet.method.Detector`.
        dynamic: Whether filters are scaled; without, omega is 1 and there are no signal heads.
        scope: Dynamic convolutions: all of each residual ``block`` [D], or its ``last_conv``, the
            literal reading of the figure.
        mixbn: Whether there are two batch-norms; ``None`` is yes with a router and no with a
            detector [A][F].
        mixing: How they are mixed in evaluation mode: ``soft`` by P_type [F]; ``hard`` by its
            argmax, with the gradient of the soft mixture so that attacks are not misled [D]; or
            always ``clean`` or ``adv``.

    Raises:
        ConfigurationError: If ``arch`` has no residual blocks or a router already, or another
            method is inserted where this one replaces a module.
    """

    needs = frozenset({"both kinds of images"})

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
        check_norms_are_free(arch)
        self.route = Route()
        self.mixing: Mixing = mixing
        self.arch = arch
        self.given: dict[str, Tensor | list[Tensor]] = {}  # p and signals that replace the own
        self.is_cut = False  # whether no gradient passes the router
        branches = branch_convolutions(arch, scope) if dynamic else []
        self.widths = [[conv.out_channels for _, conv in branch] for branch in branches]
        convolutions = (conv for conv in arch.modules() if isinstance(conv, nn.Conv2d))
        channels = next((conv.in_channels for conv in convolutions), 3)
        self.router = router(channels, [sum(widths) for widths in self.widths])
        self.has_mixbn = not self.router.follows_type if mixbn is None else mixbn
        for position, (name, conv) in enumerate(pair for branch in branches for pair in branch):
            check_free(name, conv)
            arch.set_submodule(name, DynamicConv2d(conv, self.route, position))
        if self.has_mixbn:
            replace_norms(arch, lambda norm: MixBatchNorm2d(norm, self.route))

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, K)`` of images ``(N, C, H, W)`` in [0, 1]; training mode is told types."""
        told = self.told
        routing: dict[str, Any] = self.routing(x) if self.is_cut else self.given
        clean = None if told is None else told.clean
        found = self.outputs(x, clean, **routing)
        if told is not None:
            told.said |= {"p": found.p, "signals": found.signals}
            if clean is not None:
                told.losses["type"] = type_loss(found.type_logits, clean)
                if self.training and 0 < clean < len(x):
                    told.report |= route_report(found, clean)
        return found.logits

    @torch.no_grad()
    def routing(self, x: Tensor) -> dict[str, Any]:
        """Signals and mixture of images, as arguments of :meth:`outputs`, constant."""
        z, type_logits = self.router.read(x)
        p = type_logits.softmax(dim=1)
        return {"p": self.mixture(p), "signals": self.router.signals(z, p)}

    @contextmanager
    def routed(self, is_cut: bool = False, **given: Any) -> Iterator[None]:
        """Within the block, use other P_type or signals, or cut the gradient to the router."""
        self.is_cut, self.given = is_cut, given
        try:
            yield
        finally:
            self.is_cut, self.given = False, {}

    def side_networks(self) -> list[nn.Module]:
        """The router."""
        return [self.router]

    def own_losses(self) -> dict[str, InnerLoss]:
        """Attacks that know the router [D].

        ``ce_routerdetached``: the router follows the image and takes no part in the gradient (A1).
        ``ce_routerfrozen``: signals and P_type stay those of the clean image (A2).
        ``joint_clean_<w>``, ``joint_adv_<w>``: cross-entropy minus w times that of the type head
        with a type: misclassified while looking clean or adversarial (A3).
        ``ce_branchclean``, ``ce_branchadv``: the network with P_type forced (A4).
        ``misroute``: away from the type of a clean image alone (A5).

        Success is always judged on the deployed network.
        """
        losses = {"ce_routerdetached": router_detached, "ce_routerfrozen": router_frozen}
        for name, kind in (("clean", CLEAN), ("adv", ADVERSARIAL)):
            for weight in (0.1, 1, 10):
                losses[f"joint_{name}_{weight}"] = joint(kind, weight)
            losses[f"ce_branch{name}"] = forced_branch(kind)
        return losses | {"misroute": misroute}

    def outputs(
        self,
        x: Tensor,
        types: Types | None = None,
        p: Tensor | None = None,
        signals: Sequence[Tensor] | None = None,
    ) -> Outputs:
        """Logits, type logits, P_type and signals of images ``(N, C, H, W)``.

        Args:
            x: In [0, 1].
            types: 0 clean or 1 adversarial, ``(N,)``, or the number of clean images, which come
                first; read by the two batch-norms in training mode.
            p: P_type instead of the network's, ``(2,)`` or ``(N, 2)``: for the mixture of
                batch-norms, and for a detector's signals, which follow it.
            signals: All omega_j ``(N, S_j)`` instead of the network's.

        Raises:
            ConfigurationError: If one of them is missing or has another shape.
        """
        is_split = self.training and self.has_mixbn
        rows = training_rows(types, len(x), "AWNet") if is_split else None
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


def with_router(net: nn.Module, **settings: Any) -> AWNet:
    """A network with a router, for configuration files.

    Args:
        net: The base network; it is changed.
        **settings: Of :class:`AWNet`.
    """
    return AWNet(net, **settings)


def check_norms_are_free(arch: nn.Module) -> None:
    """Refuse a network whose batch-norms an :class:`AWNet` or :class:`OATNet` sets already."""
    for kind in (AWNet, OATNet):
        if parts_like(arch, kind):
            raise ConfigurationError(
                f"the network has an {kind.__name__} already; put one AWNet or OATNet into it"
            )


def training_rows(types: Types | None, count: int, network: str) -> tuple[Rows, Rows]:
    """The images of each type, which training mode needs; missing ones are an error."""
    if types is None:
        raise ConfigurationError(
            f"in training mode every image of {network} goes through the batch-norms of its type: "
            "give types=..., or put the network into evaluation mode. An objective of "
            "paper_awnet.objectives does so, an attack needs adversary.mode: eval"
        )
    return rows_by_type(types, count)


def require_network(model: Any, kind: type[Network]) -> Network:
    """The first network of a class in a classifier or in another network; none is an error."""
    net = network_of(model)
    if (found := parts_like(net, kind)) == []:
        raise ConfigurationError(
            f"this needs a paper_awnet.networks.{kind.__name__}, got {type(net).__name__}; wrap "
            "the backbone in one"
        )
    return found[0]


def types_of(u: Tensor, clean: int) -> Tensor:
    """The types ``(N,)`` of images with type logits u, the first ``clean`` of which are clean."""
    kinds = torch.full((len(u),), ADVERSARIAL, device=u.device)
    kinds[:clean] = CLEAN
    return kinds


def type_loss(u: Tensor, clean: int) -> Tensor:
    """CE(u, t) of each image ``(N,)`` [F][D], the first ``clean`` of which are clean."""
    return cross_entropy(u, types_of(u, clean))


def route_report(found: Outputs, clean: int) -> dict[str, Tensor]:
    """Accuracy of the types, and the movement of the filters of each block, to log."""
    u = found.type_logits.detach()
    right = (classify(u) == types_of(u, clean)).float().mean()
    report = {"loss_type": type_loss(u, clean).mean(), "type_acc": right}
    for j, omega in enumerate(found.signals, 1):
        statistics = signal_statistics(omega[:clean].detach(), omega[clean:].detach())
        report |= {f"omega{j}_{name}": value for name, value in statistics.items()}
    return report


# ---------------------------------------------------------------- attacks that know the router [D]


def aware(loss: Callable[[AWNet, Model, Tensor, Tensor], Tensor]) -> InnerLoss:
    """The inner loss of (AW-Net, network around it, attacked images, their labels)."""

    def inner(model: Any, batch: Batch) -> Callable[[Tensor], Tensor]:
        net, y = require_network(model, AWNet), differentiable(batch["y"])
        return lambda x: loss(net, network_of(model), x, y)

    return inner


def router_frozen(model: Any, batch: Batch) -> Callable[[Tensor], Tensor]:
    """X' -> cross-entropy with signals and P_type of the clean image (A2)."""
    net, whole, y = require_network(model, AWNet), network_of(model), differentiable(batch["y"])
    with torch.inference_mode(False), torch.no_grad(), telling([net]) as told:
        whole(differentiable(batch["x"]))
    kept = {"p": net.mixture(told.said["p"]), "signals": told.said["signals"]}

    def loss(x: Tensor) -> Tensor:
        with net.routed(**kept):
            return cross_entropy(whole(x), y)

    return loss


@aware
def router_detached(net: AWNet, whole: Model, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy; signals and P_type of x' are constants to the gradient (A1)."""
    with net.routed(is_cut=True):
        return cross_entropy(whole(x), y)


@aware
def misroute(net: AWNet, whole: Model, x: Tensor, y: Tensor) -> Tensor:
    """CE(u(x'), clean), which has nothing to do with the class (A5)."""
    if whole is net:  # the backbone need not run
        return type_loss(net.router.read(x)[1], len(x))
    return looking(net, whole, x, CLEAN)[1]


def looking(net: AWNet, whole: Model, x: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    """Logits, and the cross-entropy of the type head with one type."""
    with telling([net], clean=len(x) if kind == CLEAN else 0) as told:
        logits = whole(x)
    return logits, told.losses["type"]


def joint(kind: int, weight: float) -> InnerLoss:
    """CE(f(x'), y) - weight CE(u(x'), kind): wrong, and of that type (A3)."""

    def loss(net: AWNet, whole: Model, x: Tensor, y: Tensor) -> Tensor:
        logits, looks = looking(net, whole, x, kind)
        return cross_entropy(logits, y) - weight * looks

    return aware(loss)


def forced_branch(kind: int) -> InnerLoss:
    """Cross-entropy of the network with P_type forced to one type (A4)."""
    return aware(lambda _, whole, x, y: cross_entropy(forced(whole, kind)(x), y))


def forced(model: Any, kind: int) -> Callable[[Tensor], Tensor]:
    """Images to logits of the network, with P_type forced to one type for every image."""
    net, whole = require_network(model, AWNet), network_of(model)

    def logits(x: Tensor) -> Tensor:
        with net.routed(p=torch.eye(2, device=x.device)[kind]):
            found: Tensor = whole(x)
        return found

    return logits


# -------------------------------------------------------------------------------- other networks


class OATNet(Part):
    """A backbone all of whose batch-norms depend on lambda; a baseline, reconstructed [D].

    Wang et al. 2020, "Once-for-All Adversarial Training": one network for all trade-offs. A number
    lambda, drawn for each image in training and set by hand in testing (``knob``), modulates the
    output of every batch-norm with ``hidden`` units [D], and there are two batch-norms, for
    lambda = 0 and for lambda > 0. The backbone is changed in place.
    """

    needs = frozenset({"a trade-off for each image"})

    def __init__(self, arch: nn.Module, knob: float = 0.2, hidden: int = 64) -> None:
        super().__init__()
        check_norms_are_free(arch)
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

    def own_losses(self) -> dict[str, InnerLoss]:
        """``ce_knob_<lambda>``: cross-entropy of the network at another lambda."""
        return {f"ce_knob_{lam:g}": partial(at_lambda, lam) for lam in LAMBDAS}

    def at(self, x: Tensor, lam: float | Tensor, types: Types | None = None) -> Tensor:
        """Logits ``(N, K)`` at one lambda for all images or at that of each ``(N,)``.

        In training mode the types select the batch-norm, in evaluation mode lambda does.
        """
        rows = training_rows(types, len(x), "OATNet") if self.training else None
        each = lam.to(x) if isinstance(lam, Tensor) else x.new_full((len(x),), lam)
        is_adversarial = (each > 0).to(x)
        mixture = torch.stack([1 - is_adversarial, is_adversarial], dim=1)
        with self.route.told((), mixture, rows, condition=each[:, None]):
            logits: Tensor = self.arch(x)
        return logits


def at_lambda(lam: float | Tensor, model: Any, batch: Batch) -> Callable[[Tensor], Tensor]:
    """X' -> cross-entropy of an OATNet at a given lambda, for all images or for each ``(N,)``."""
    net, y = require_network(model, OATNet), differentiable(batch["y"])
    return lambda x: cross_entropy(net.at(x, lam), y)


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

    def __init__(self, widths: Sequence[int] = (16, 32, 64), **kwargs: Any) -> None:
        super().__init__(depths=(9, 9, 9), widths=widths, strides=(1, 2, 2), init=kaiming, **kwargs)


class ResNet34(ResNet):
    """ResNet-34 for small images: 21,282,122 parameters at 10 classes."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(depths=(3, 4, 6, 3), **kwargs)
