"""CIFS, equation by equation: probe, relevance, mask, networks, losses, adaptive attacks.

A feature ``z`` is the post-activation output of a layer, ``(N, C, H, W)``, so ``z >= 0``; ``p`` are
the raw logits of a probe on it, ``(N, K)``; ``f`` the network's final logits, ``(N, K)``.

Tags name the source of a statement: [A] abstract, [S] a public summary of the paper,
[R] the official repository (HanshuYAN/CIFS) at its tip, [R0] its first code commit, with the logs
of the published runs, [B] variants that survive there as compiled files only, [C] chosen here
because nothing public settles it.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.attacks.losses import cross_entropy, hinge_margin, kl_divergence
from common.errors import ConfigurationError, check_choice
from common.modes import network_of
from common.networks.insertion import run_in_full_precision
from common.networks.parts import Part, parts_like, telling
from common.networks.preact_resnet import PreActResNet
from common.networks.resnet import ResNet, check_positive
from common.networks.wide_resnet import WideBlock, WideResNet, initialize
from common.objectives import (
    Batch,
    InnerLoss,
    LogitsAndLoss,
    Objective,
    adversarial_images,
    check_weight,
    differentiable,
)

ProbeKind = Literal["nonlinear", "linear"]
SOFTPLUS_BETA = 5.0  # sharpness of the probe's softplus [R]

PerExampleLoss = Callable[[Tensor, Tensor], Tensor]
"""(logits ``(N, K)``, labels ``(N,)``) -> loss ``(N,)``."""

# ------------------------------------------------------------------------------ probe, p = A(z)


def global_average(z: Tensor) -> Tensor:
    """Pooled feature v = GAP(z): ``(N, C, H, W)`` to ``(N, C)``."""
    return z.mean(dim=(2, 3))


class Probe(nn.Module, ABC):
    """A small classifier on the pooled feature; its prediction gives the channels' relevance."""

    output: nn.Linear

    @abstractmethod
    def forward(self, z: Tensor) -> Tensor:
        """Raw logits p = A(z), ``(N, K)``."""

    @abstractmethod
    def relevance(self, z: Tensor, selected: Tensor) -> Tensor:
        r"""Gradients of the selected logits, ``(N, k)``, by the channels: ``(N, k, C)``.

        :math:`g_{jc} = \sum_{h,w} \partial \tilde p_j / \partial z_{c,h,w} = \partial \tilde p_j /
        \partial v_c`; the paper's g is their sum over the selected j, which may occur twice. In
        closed form [C]: the sum cancels the 1/(HW) of the pooling, so no inner autograd call is
        needed. :func:`relevance_by_autograd` is the definition.
        """


class LinearProbe(Probe):
    """p = W GAP(z) + b, hence g_j = W[j, :] for every feature [R]."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.output = nn.Linear(channels, num_classes)

    def forward(self, z: Tensor) -> Tensor:
        """Raw logits, ``(N, K)``."""
        p: Tensor = self.output(global_average(z))
        return p

    def relevance(self, z: Tensor, selected: Tensor) -> Tensor:
        """W[selected], ``(N, k, C)``."""
        return self.output.weight[selected]


class NonlinearProbe(Probe):
    """p = W2 s(W1 GAP(z) + b1) + b2 with s the softplus of sharpness 5 [R].

    With s'(t) = sigmoid(5 t), g_j = (W2[j, :] * s'(W1 v + b1)) W1. The hidden width is 128 in
    ResNets [R] and 240 in WRN [R0].
    """

    def __init__(self, channels: int, num_classes: int, hidden: int = 128) -> None:
        super().__init__()
        self.hidden = nn.Linear(channels, hidden)
        self.output = nn.Linear(hidden, num_classes)

    def forward(self, z: Tensor) -> Tensor:
        """Raw logits, ``(N, K)``."""
        t = self.hidden(global_average(z))
        p: Tensor = self.output(F.softplus(t, beta=SOFTPLUS_BETA))
        return p

    def relevance(self, z: Tensor, selected: Tensor) -> Tensor:
        """The gradients, ``(N, k, C)``."""
        slope = torch.sigmoid(SOFTPLUS_BETA * self.hidden(global_average(z)))  # s', (N, h)
        return (self.output.weight[selected] * slope[:, None, :]) @ self.hidden.weight


def relevance_by_autograd(probe: Probe, z: Tensor, selected: Tensor) -> Tensor:
    """:meth:`Probe.relevance` by its definition, as the official code computes it; for tests [R].

    Differentiable again. Detach ``z`` to keep the mask path cut.
    """
    with torch.enable_grad():
        z = z if z.requires_grad else z.detach().requires_grad_()
        totals = probe(z).gather(1, selected).sum(dim=0)
        rows = [torch.autograd.grad(total, z, create_graph=True)[0] for total in totals]
        return torch.stack(rows, dim=1).sum(dim=(3, 4))


def select_classes(
    p: Tensor, k: int, y: Tensor | None = None, dedupe_label: bool = False
) -> Tensor:
    """Classes whose logits the relevance explains, ``(N, k)``: the k largest of ``p`` ``(N, K)``.

    With labels ``y`` ``(N,)``, as in training, the label takes rank 1 and ranks 2 to k are
    unchanged [R]: a label among these counts twice, and the strongest class is ignored.
    ``dedupe_label`` puts the strongest class in place of the duplicate [C].
    """
    top = p.topk(k, dim=1).indices
    if y is None:
        return top
    labelled = torch.cat([y[:, None], top[:, 1:]], dim=1)
    if dedupe_label:
        return torch.where((top == y[:, None]).any(dim=1, keepdim=True), top, labelled)
    return labelled


# --------------------------------------------------------------------------- mask, m = IMGF(g)


class _Described(nn.Module):
    def extra_repr(self) -> str:
        """Settings, for ``print(net)``."""
        numbers = {k: v for k, v in vars(self).items() if isinstance(v, int | float)}
        return ", ".join(f"{k}={v}" for k, v in numbers.items() if k != "training")


class ImportanceMask(_Described, ABC):
    """Importance mask generating function (IMGF): from relevance to non-negative multipliers."""

    def forward(self, relevance: Tensor) -> Tensor:
        """Mask m of shape ``(N, C)`` from the selected classes' relevances ``(N, k, C)``."""
        return self.importance(relevance.sum(dim=1))

    @abstractmethod
    def importance(self, g: Tensor) -> Tensor:
        """The same from the summed relevance, m = IMGF(g): ``(N, C)`` to ``(N, C)``."""


def _positive(name: str, value: float) -> float:
    if not (math.isfinite(value) and value > 0):
        raise ConfigurationError(f"{name} must be positive and finite, got {value}")
    return float(value)


class SoftmaxMask(ImportanceMask):
    """m = s softmax_c(g / T), the default; sums to s over the channels.

    Args:
        scale: s, positive: 1 at the repository's tip [R] and in its WRN code [R0], 2 in the ResNet
            code of [R0] and so, by inference, in the logged results; the variants use s = k [B].
        temperature: T, positive; {1/2, 1, 4, 8, 10, 12, 16, 24} were tried with s = 2 [B].
    """

    def __init__(self, scale: float = 1.0, temperature: float = 1.0) -> None:
        super().__init__()
        self.scale = _positive("scale", scale)
        self.temperature = _positive("temperature", temperature)

    def importance(self, g: Tensor) -> Tensor:
        """Positive, sums to s."""
        return torch.softmax(g / self.temperature, dim=-1) * self.scale


class SummedSoftmaxMask(SoftmaxMask):
    """m = s sum_j softmax_c(g_j / T), one softmax per selected class; sums to k s [B]."""

    def forward(self, relevance: Tensor) -> Tensor:
        """Mask ``(N, C)`` from relevances ``(N, k, C)``."""
        return self.importance(relevance).sum(dim=1)


class MagnitudeMask(SoftmaxMask):
    """m = s softmax_c(|g| / T), the control that ignores the sign of the relevance [B]."""

    def __init__(self, scale: float = 2.0, temperature: float = 1.0) -> None:
        super().__init__(scale, temperature)

    def importance(self, g: Tensor) -> Tensor:
        """Positive, sums to s, not monotone in g."""
        return super().importance(g.abs())


class SigmoidMask(ImportanceMask):
    """m = sigmoid(alpha (g - shift)), in (0, 1) [B].

    Args:
        alpha: Sharpness, positive; {0.1, 1, 5, 10, 15} were tried.
        shift: Relevance that gives 1/2; (alpha, shift) = (1, 5) and (2, 3) were tried.
    """

    def __init__(self, alpha: float = 1.0, shift: float = 0.0) -> None:
        super().__init__()
        self.alpha = _positive("alpha", alpha)
        self.shift = shift

    def importance(self, g: Tensor) -> Tensor:
        """In (0, 1)."""
        return torch.sigmoid(self.alpha * (g - self.shift))


class SoftplusMask(ImportanceMask):
    """m = (log(1 + exp(alpha g)) / alpha)^power, positive [B].

    Args:
        alpha: Sharpness, positive.
        power: Exponent, positive; (alpha, power) = (5, 1), (10, 1/2) and (20, 1/4) were tried.
    """

    def __init__(self, alpha: float = 5.0, power: float = 1.0) -> None:
        super().__init__()
        self.alpha = _positive("alpha", alpha)
        self.power = _positive("power", power)

    def importance(self, g: Tensor) -> Tensor:
        """Positive."""
        softplus = F.softplus(g, beta=self.alpha)
        # Far below zero the softplus rounds to 0, where a root's gradient is infinite.
        return softplus.clamp_min(torch.finfo(g.dtype).tiny).pow(self.power)


class ReluMask(ImportanceMask):
    """m = max(g, 0) [B]."""

    def importance(self, g: Tensor) -> Tensor:
        """Non-negative."""
        return F.relu(g)


class OnesMask(ImportanceMask):
    """m = 1, the "aux" control: probes and joint loss without a mask [C]."""

    def importance(self, g: Tensor) -> Tensor:
        """Ones."""
        return torch.ones_like(g)


# -------------------------------------------------------------- channel selection, z_bar = z * m


def autocast_off(z: Tensor) -> AbstractContextManager[Any]:
    """Autocast switched off for the device of ``z``."""
    kind = z.device.type
    return nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)


class ChannelSelection(_Described, Part, ABC):
    """Multiplies the channels of a feature by multipliers from a probe on it.

    With ``label_free`` it never looks at labels, also in train mode (for TRADES). Masked
    activations are about C times smaller, with variances near batch-norm's eps, so the module and
    what follows it in the network compute in the precision of its weights, without autocast.
    """

    needs = frozenset({"further logits"})
    weight = 1.0
    """Of its raw logits in the losses of ``common.objectives``."""

    def __init__(self, probe: Probe, label_free: bool = False) -> None:
        super().__init__()
        self.probe = probe
        self.label_free = label_free

    @abstractmethod
    def multiplier(self, z: Tensor, p: Tensor, y: Tensor | None) -> Tensor:
        """Multipliers ``(N, C)`` for feature, raw logits and, while training, labels."""

    def forward(self, z: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The masked feature z_bar, shaped like ``z``, and the raw logits p of the unmasked one.

        Raises:
            ConfigurationError: In train mode without labels ``y`` ``(N,)``, unless ``label_free``.
        """
        sees_label = self.training and not self.label_free
        if sees_label and y is None:
            raise ConfigurationError(
                f"{type(self).__name__} selects classes by the label in train mode, and got none; "
                "call joint_logits(net, x, y), or set label_free: true in each selection where the "
                "objective passes no labels (JointTRADES)"
            )
        with autocast_off(z):
            z = z.to(self.probe.output.weight.dtype)
            p: Tensor = self.probe(z)
            m = self.multiplier(z, p, y if sees_label else None)
            return z * m[:, :, None, None], p

    def in_network(self, z: Tensor) -> Tensor:
        """The masked feature, inside a network: labels are told, raw logits are answered."""
        told = self.told
        z_bar, p = self(z, None if told is None else told.y)
        if told is not None:
            told.logits.append((self.weight, p))
        masked: Tensor = z_bar
        return masked


class CIFS(ChannelSelection):
    """Channel-wise importance-based feature selection, z_bar = z * IMGF(g).

    The relevance g is taken on a detached feature: the loss reaches the probe's weights through
    the mask, but not z. So with a nonlinear probe the input gradient is not the true one;
    :func:`undetached` restores it.

    Args:
        channels: Channels C of the feature; given by the network.
        num_classes: Number of classes K; given by the network.
        probe: Kind of probe.
        hidden: Hidden width of the nonlinear probe.
        mask: From relevance to multipliers; ``SoftmaxMask()`` where none is given.
        top_k: Selected classes k.
        detach_mask_input: Cut the gradient from mask to feature [R].
        label_free: Select by the probe's ranking in train mode too.
        dedupe_label: See :func:`select_classes`.

    Raises:
        ConfigurationError: If ``top_k`` is not in 1..K, or ``hidden`` is below 1.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        probe: ProbeKind = "nonlinear",
        hidden: int = 128,
        mask: ImportanceMask | None = None,
        top_k: int = 2,
        detach_mask_input: bool = True,
        label_free: bool = False,
        dedupe_label: bool = False,
    ) -> None:
        if not 1 <= top_k <= num_classes:
            raise ConfigurationError(
                f"top_k selects among the {num_classes} classes and must lie in "
                f"[1, {num_classes}], got {top_k}"
            )
        check_positive(hidden=hidden)
        check_choice("probe", probe, ProbeKind)
        super().__init__(
            LinearProbe(channels, num_classes)
            if probe == "linear"
            else NonlinearProbe(channels, num_classes, hidden),
            label_free,
        )
        self.mask = mask if mask is not None else SoftmaxMask()
        self.top_k = top_k
        self.detach_mask_input = detach_mask_input
        self.dedupe_label = dedupe_label

    def relevance(self, z: Tensor, p: Tensor, y: Tensor | None = None) -> Tensor:
        """Relevance of the channels to each selected class, ``(N, k, C)``; g is its sum over k."""
        selected = select_classes(p.detach(), self.top_k, y, self.dedupe_label)
        return self.probe.relevance(z.detach() if self.detach_mask_input else z, selected)

    def multiplier(self, z: Tensor, p: Tensor, y: Tensor | None) -> Tensor:
        """The importance mask, m = IMGF(g)."""
        m: Tensor = self.mask(self.relevance(z, p, y))
        return m


class CAS(ChannelSelection):
    """Channel-wise activation suppression (Bai et al., ICLR 2021), as the authors of CIFS ran it.

    z_bar = z * W[c, :] with W the weight of a linear probe and c the label in training, else its
    prediction. The multiplier may be negative, and gradients reach W through it.
    """

    def __init__(self, channels: int, num_classes: int, label_free: bool = False) -> None:
        super().__init__(LinearProbe(channels, num_classes), label_free)

    def multiplier(self, z: Tensor, p: Tensor, y: Tensor | None) -> Tensor:
        """W[c, :]."""
        return self.probe.output.weight[p.argmax(dim=1) if y is None else y]


@contextmanager
def undetached(model: nn.Module) -> Iterator[None]:
    """Let gradients of forward passes made inside run through the masks of every CIFS module."""
    before = {m: m.detach_mask_input for m in model.modules() if isinstance(m, CIFS)}
    try:
        for module in before:
            module.detach_mask_input = False
        yield
    finally:
        for module, flag in before.items():
            module.detach_mask_input = flag


# ------------------------------------------------------------------------------------- networks

Selection = Callable[[int, int], ChannelSelection]
"""Makes a channel selection from (channels, num_classes), for example the class CIFS."""

BETA = 2.0
"""Weight of the probes together, beside the final logits, in the paper."""


class Selections(Part, nn.ModuleDict):
    """The selections of a network by position, in forward order; a network has one of these."""

    def own_losses(self) -> dict[str, InnerLoss]:
        """The losses a fair evaluation attacks with, by name [R0].

        ``ce_f`` and, with probes, ``ce_p1`` .. ``ce_pS`` and ``ce_joint<beta>``; each also as
        ``cw_`` with the hinge margin (the official C&W falls back to cross-entropy for single
        logits; here it does not). With a CIFS module ``ce_undetached``, joint with beta 2 through
        the masks [C].
        """
        losses: dict[str, InnerLoss] = {}
        bases: dict[str, PerExampleLoss] = {"ce": cross_entropy, "cw": hinge_margin}
        for name, base in bases.items():
            losses[f"{name}_f"] = AdaptiveLoss(base, beta=0.0)
            for s in range(1, len(self) + 1):
                losses[f"{name}_p{s}"] = AdaptiveLoss(base, probe=s)
            for beta in (0.1, 1.0, 2.0, 10.0, 100.0, 1000.0) if len(self) else ():
                losses[f"{name}_joint{beta:g}"] = AdaptiveLoss(base, beta=beta)
        if any(isinstance(selection, CIFS) for selection in self.values()):
            losses["ce_undetached"] = AdaptiveLoss(beta=2.0, through_mask=True)
        return losses


def insert_selections(
    net: nn.Module, selections: Mapping[str, ChannelSelection], beta: float = BETA
) -> None:
    """Mask the outputs of modules of a network, in place.

    The selections become ``net.selections``, named like the modules with underscores for dots;
    other keys of the state dict stay. For ``act1`` of a wide residual network's block the residual
    branch alone reads the masked feature.

    Args:
        net: The network, which is no ``Sequential``.
        selections: By the names of modules as in ``net.named_modules()``, in forward order.
        beta: Weight of the raw logits together in the losses of ``common.objectives``.

    Raises:
        ConfigurationError: If there are selections already, a name is taken, or a weight is
            refused.
    """
    check_weight("beta", beta)
    if isinstance(net, nn.Sequential):
        raise ConfigurationError(
            "a Sequential would run the selections as its last module; make it a part of a network"
        )
    if any(isinstance(module, Selections) for module in net.modules()):
        raise ConfigurationError(
            f"{type(net).__name__} has channel selections already; give all positions in one call"
        )
    keys = [name.replace(".", "_") for name in selections]
    if taken := [key for key in keys if keys.count(key) > 1 or hasattr(Selections(), key)]:
        raise ConfigurationError(
            f"a channel selection cannot be named {taken[0]!r}, which is taken; rename the module "
            "that it follows, or name another one"
        )
    if hasattr(net, "selections"):
        raise ConfigurationError(
            f"{type(net).__name__} has an attribute 'selections', where channel selections are "
            "kept; rename it"
        )
    for name, selection in selections.items():
        selection.weight = beta / len(selections)
        parent = net.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, WideBlock) and name.endswith(".act1"):
            parent.conv1.register_forward_pre_hook(partial(_mask_input, selection))
        else:
            net.get_submodule(name).register_forward_hook(partial(_mask_output, selection))
    run_in_full_precision(net, list(selections))
    net.selections = Selections(dict(zip(keys, selections.values(), strict=True)))


def _mask_input(selection: ChannelSelection, _: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (selection.in_network(args[0]),)


def _mask_output(selection: ChannelSelection, _: nn.Module, __: Any, z: Tensor) -> Tensor:
    return selection.in_network(z)


def positions_of(net: nn.Module) -> dict[str, int]:
    """Where the paper's networks have selections: names of modules, and their channels.

    Behind every block of a ResNet. In a wide or pre-activation ResNet ``stages.<i>.<j>.act1``,
    where the residual branch of a block begins, and ``head.act``, after the final activation. None
    in other networks.
    """
    found: dict[str, int] = {}
    for name, backbone in net.named_modules():
        if not isinstance(backbone, ResNet | PreActResNet | WideResNet):
            continue
        prefix = f"{name}." if name else ""
        for i, stage in enumerate(backbone.stages.children()):
            for j, block in enumerate(stage.children()):
                position = f"{prefix}stages.{i}.{j}"
                if isinstance(backbone, ResNet):
                    found[position] = backbone.widths[i]
                else:
                    found[f"{position}.act1"] = cast(WideBlock, block).conv1.in_channels
        if not isinstance(backbone, ResNet):
            found[f"{prefix}head.act"] = backbone.widths[-1]
    return found


def usual_selections(positions: Sequence[str], hidden: int) -> dict[str, Selection]:
    """CIFS at the last two positions, with a nonlinear and a linear probe [R].

    Raises:
        ConfigurationError: If there are fewer.
    """
    if len(positions) < 2:
        raise ConfigurationError(
            "CIFS sits at the last two positions, and this network has only "
            f"{', '.join(positions) or 'unknown ones'}; name modules in selections"
        )
    kinds = partial(CIFS, probe="nonlinear", hidden=hidden), partial(CIFS, probe="linear")
    return dict(zip(positions[-2:], kinds, strict=True))


def _select(
    net: nn.Module, selections: dict[str, Selection] | None, num_classes: int, hidden: int
) -> None:
    """Insert selections at known positions, which may be written with underscores."""
    positions = positions_of(net)
    known = {name.replace(".", "_"): name for name in positions}
    if selections is None:
        selections = usual_selections(list(positions), hidden)
    chosen = {name.replace(".", "_"): make for name, make in selections.items()}
    if unknown := [name for name in chosen if name not in known]:
        raise ConfigurationError(
            f"{type(net).__name__} has no position {unknown[0]!r} for a channel selection; "
            f"choose among {', '.join(known)}"
        )
    made = {
        name: chosen[key](positions[name], num_classes)
        for key, name in known.items()
        if key in chosen
    }
    insert_selections(net, made)


class CIFSResNet(ResNet):
    """ResNet with channel selections after the final activation of chosen blocks.

    A mask reaches both branches of the following block, the identity shortcut too. Its logits are
    the final ones f; :func:`joint_logits` returns the raw ones too.

    Args:
        num_classes: Number of classes K.
        selections: Position -> selection; positions are ``stages_<stage>_<block>``, from 0, with
            underscores, since dots separate levels on the command line. By default the last two get
            CIFS, with a nonlinear and a linear probe.
        hidden: Hidden width of the nonlinear probe, where ``selections`` does not say.
        **kwargs: Of :class:`~common.networks.resnet.ResNet`; ResNet-18 by default. The paper
            does not normalise its inputs.

    Raises:
        ConfigurationError: If a position does not exist.
    """

    def __init__(
        self,
        num_classes: int = 10,
        selections: dict[str, Selection] | None = None,
        hidden: int = 128,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes=num_classes, **kwargs)
        _select(self, selections, num_classes, hidden)


class CIFSResNet18(CIFSResNet):
    """ResNet-18 for 32x32 images, CIFS at stages_3_0 and stages_3_1 [R]: 11,246,046 parameters."""


class CIFSResNet10(CIFSResNet):
    """ResNet-10 for Fashion-MNIST, CIFS at stages_2_0 and stages_3_0 [R0]: 4,941,406 parameters."""

    def __init__(self, in_channels: int = 1, **kwargs: Any) -> None:
        super().__init__(depths=(1, 1, 1, 1), in_channels=in_channels, **kwargs)


class CIFSDigitsResNet(CIFSResNet):
    """The ResNet for 8x8 digits, CIFS at stages_2_0 and stages_3_0 [C]."""

    def __init__(
        self,
        in_channels: int = 1,
        hidden: int = 32,
        widths: Sequence[int] = (16, 32, 64, 64),
        **kwargs: Any,
    ) -> None:
        super().__init__(
            depths=(1, 1, 1, 1),
            widths=widths,
            strides=(1, 2, 2, 1),
            in_channels=in_channels,
            hidden=hidden,
            **kwargs,
        )


class CIFSWideResNet(WideResNet):
    """WRN with channel selections: WRN-28-10 with CIFS has 36,641,854 parameters.

    Positions are ``stages_<i>_<j>_act1``, where the residual branch of a block begins (its shortcut
    does not see the mask), and ``head_act``, after the final activation. With CAS at the last two
    the probe of the second is the "extra linear layer on the final feature" that the authors' WRN
    has: the parameter counts agree, 36,492,014 [R0].

    Args:
        num_classes: Number of classes K.
        selections: Position -> selection; by default as in :class:`CIFSResNet` [R0].
        hidden: Hidden width of the nonlinear probe, where ``selections`` does not say.
        **kwargs: Of :class:`~common.networks.wide_resnet.WideResNet`; WRN-28-10 by default.
    """

    selections: Selections

    def __init__(
        self,
        num_classes: int = 10,
        selections: dict[str, Selection] | None = None,
        hidden: int = 240,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes=num_classes, **kwargs)
        _select(self, selections, num_classes, hidden)
        self.selections.apply(initialize)  # the probes' biases start at 0 like every other [R0]


# --------------------------------------------------------------------------------------- losses


def joint_logits(model: Any, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
    """Final logits and raw logits of any network or classifier; plain ones have no raw logits."""
    net = network_of(model)
    with telling(parts_like(net, ChannelSelection), y) as told:
        f: Tensor = net(x)
    return f, [p for _, p in told.logits]


def joint_loss(
    f: Tensor,
    probes: Sequence[Tensor],
    y: Tensor,
    beta: float,
    base: PerExampleLoss = cross_entropy,
) -> Tensor:
    """L_beta = base(f, y) + (beta / S) sum_s base(p^s, y), per example, ``(N,)`` [R]."""
    loss = base(f, y)
    if not probes:
        return loss
    return loss + beta / len(probes) * torch.stack([base(p, y) for p in probes]).sum(dim=0)


def training_factor(beta: float) -> float:
    """3 / (1 + beta), by which the training script multiplies L_beta: total weight 3 [R]."""
    return 3.0 / (1.0 + beta)


class JointCrossEntropy(Objective):
    """Adversarial training with the joint loss: max_x' L_beta, then min over x_adv alone [R].

    :class:`common.objectives.AT` is the same with the weights of the network and ``rescale`` off.

    Args:
        beta: Weight of the probes; 2 in the paper. At 0 their last biases get no gradient.
        attack_beta: Weight of the probes in what the adversary maximises; ``beta`` if not given.
        rescale: Multiply the training loss by :func:`training_factor`, which is 1 at beta = 2.

    Raises:
        ConfigurationError: If a weight is negative or not finite.
    """

    serves = frozenset({"further logits"})

    def __init__(
        self, beta: float = 2.0, attack_beta: float | None = None, rescale: bool = True
    ) -> None:
        self.beta = check_weight("beta", beta)
        self.attack_beta = check_weight("attack_beta", beta if attack_beta is None else attack_beta)
        self.factor = training_factor(beta) if rescale else 1.0

    def inner(self, model: Any, batch: Batch) -> Callable[[Tensor], Tensor]:
        """L_beta with the attack's beta."""
        return AdaptiveLoss(beta=self.attack_beta)(model, batch)

    def outer(self, model: Any, batch: Batch) -> Tensor:
        """Factor times L_beta of the images trained on, batch mean."""
        x = adversarial_images(batch) if self.needs_x_adv else batch["x"]
        f, probes = joint_logits(model, x, batch["y"])
        return self.factor * joint_loss(f, probes, batch["y"], self.beta).mean()


class NaturalJointCrossEntropy(JointCrossEntropy):
    """The joint loss on clean images, for natural training and warm starts."""

    needs_x_adv = False


class JointTRADES(Objective):
    """TRADES on all logits, without showing labels to the network [C].

    The loss is L_beta(x; y) + lam D, and the adversary maximises the divergence
    D = KL(f(x) || f(x_adv)) + (beta / S) sum_s KL(p^s(x) || p^s(x_adv)). The repository logs such a
    run but not its loss; a disabled line of its networks treats a missing label as eval mode "for
    TRADES", so the selections need ``label_free: true``.

    Args:
        beta: Weight of the probes, 4 in the logged run.
        lam: Weight of the divergence, 4 in the logged run, 6 for the plain network.

    Raises:
        ConfigurationError: If a weight is negative or not finite.
    """

    serves = frozenset({"further logits"})

    def __init__(self, beta: float = 4.0, lam: float = 4.0) -> None:
        self.beta = check_weight("beta", beta)
        self.lam = check_weight("lam", lam)

    def divergence(
        self, clean: tuple[Tensor, list[Tensor]], adv: tuple[Tensor, list[Tensor]]
    ) -> Tensor:
        """D, per example, ``(N,)``."""
        (f, probes), (f_adv, probes_adv) = clean, adv
        total = kl_divergence(f, f_adv)
        for p, p_adv in zip(probes, probes_adv, strict=True):
            total = total + self.beta / len(probes) * kl_divergence(p, p_adv)
        return total

    def inner(self, model: Any, batch: Batch) -> Callable[[Tensor], Tensor]:
        """D, the clean prediction held constant and computed once."""
        with torch.inference_mode(False), torch.no_grad():
            clean = joint_logits(model, batch["x"])
        return lambda x: self.divergence(clean, joint_logits(model, x))

    def outer(self, model: Any, batch: Batch) -> Tensor:
        """L_beta of the clean images plus lam D, batch mean."""
        x_adv = adversarial_images(batch)
        clean, adv = joint_logits(model, batch["x"]), joint_logits(model, x_adv)
        loss = joint_loss(*clean, batch["y"], self.beta) + self.lam * self.divergence(clean, adv)
        return loss.mean()


# ----------------------------------------------------------------------------- adaptive attacks


@dataclass(frozen=True)
class AdaptiveLoss:
    """What an attacker who knows the defence maximises; callable like ``Objective.inner``.

    Attributes:
        base: Per-example loss of one set of logits.
        beta: Weight of the probes in the joint loss; 0 attacks f alone.
        probe: Attack this raw prediction alone, counted from 1 in forward order.
        through_mask: Differentiate through the masks too (:func:`undetached`).

    Raises:
        ConfigurationError: If ``probe`` is below 1, or, when it is called, the network has fewer.
    """

    base: PerExampleLoss = cross_entropy
    beta: float = 2.0
    probe: int | None = None
    through_mask: bool = False

    def __post_init__(self) -> None:
        if self.probe is not None:
            check_positive(probe=self.probe)

    def __call__(self, model: Any, batch: Batch) -> Callable[[Tensor], Tensor]:
        """The function from x' ``(N, C, H, W)`` to the per-example loss ``(N,)``."""
        both = self.with_logits(model, batch)
        return lambda x: both(x)[1]

    def with_logits(self, model: Any, batch: Batch) -> LogitsAndLoss:
        """X' -> the logits of f ``(N, K)`` and the loss, in one pass."""
        y = differentiable(batch["y"])

        def both(x: Tensor) -> tuple[Tensor, Tensor]:
            with undetached(model) if self.through_mask else nullcontext():
                f, probes = joint_logits(model, x, y)
            if self.probe is None:
                return f, joint_loss(f, probes, y, self.beta, self.base)
            if self.probe > len(probes):
                raise ConfigurationError(
                    f"probe {self.probe} is to be attacked and the network has {len(probes)}; "
                    "probes are counted from 1"
                )
            return f, self.base(probes[self.probe - 1], y)

        return both
