"""AW-Net's layers: the router, filters scaled for each image, and the mixture of two batch-norms.

Tags name the source of a statement: [A] an abstract, [F] the framework figure, [S] a summary by
others, [M] the same authors' released MTARD code, [R] common practice of the field, [D] our choice,
because nothing was found. There is no official code, and the paper's text was not available. What
is tagged [D] is an argument, so that it can be changed.

Shapes: images x ``(N, C, H, W)`` in [0, 1]; types t ``(N,)``, 0 clean and 1 adversarial [D]; router
features z ``(N, d)``; type logits u ``(N, 2)``; P_type = softmax(u), columns (clean, adversarial);
regulation signals omega_j ``(N, S_j)``, one number for every dynamic filter of block j.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import ConfigurationError, check_choice
from common.networks.parts import ADVERSARIAL, CLEAN
from common.networks.resnet import check_positive, conv3x3, named_sequence

SignalActivation = Literal["two_sigmoid", "one_plus_tanh", "sigmoid", "softplus", "linear"]
SignalInit = Literal["zero", "normal"]

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "two_sigmoid": lambda a: 2.0 * torch.sigmoid(a),  # in (0, 2), 1 at 0
    "one_plus_tanh": lambda a: 1.0 + torch.tanh(a / 2.0),  # the same function
    "sigmoid": torch.sigmoid,  # in (0, 1)
    "softplus": F.softplus,  # positive
    "linear": lambda a: 1.0 + a,
}
"""From the output of a signal head to the signal."""


def signal_head(features: int, size: int, init: SignalInit = "zero", std: float = 1.0) -> nn.Linear:
    """The linear layer [F] with weight A_j and bias b_j that gives the S_j signals of one block.

    With ``zero`` omega is 1 for every image, so the network starts as the static one [D]; with
    ``normal`` the entries of A_j have standard deviation ``std``, and b_j = 0.
    """
    check_choice("init", init, SignalInit)
    head = nn.Linear(features, size)
    nn.init.zeros_(head.bias)
    if init == "zero":
        nn.init.zeros_(head.weight)
    else:
        nn.init.normal_(head.weight, std=std)
    return head


class SideNetwork(nn.Module):
    """The feature extractor D, the type head, and a signal head for each block.

    D is three times conv3x3 - BN - ReLU and a global average pool [D]; its batch-norms are ordinary
    ones, because it has to predict the type. The type head has two layers [F].

    Args:
        in_channels: Channels of the images.
        sizes: S_j of each block; empty for a network whose filters are not scaled.
        widths: Channels of D's convolutions [D].
        strides: Their strides [D].
        type_hidden: Hidden units of the type head [D].
        activation: From head to signal [D].
        init: Initialisation of the signal heads [D], see :func:`signal_head`.
        init_std: Standard deviation of ``normal``.
    """

    follows_type: bool
    """Whether signals are a function of P_type, and not of the features."""

    def __init__(
        self,
        in_channels: int,
        sizes: Sequence[int],
        widths: Sequence[int] = (32, 64, 128),
        strides: Sequence[int] = (1, 2, 2),
        type_hidden: int = 64,
        activation: SignalActivation = "two_sigmoid",
        init: SignalInit = "zero",
        init_std: float = 1.0,
    ) -> None:
        super().__init__()
        check_positive(type_hidden=type_hidden, **{f"widths[{i}]": w for i, w in enumerate(widths)})
        if not len(widths) == len(strides) >= 1:
            raise ConfigurationError(
                f"the router needs one stride for each width, got widths={list(widths)} and "
                f"strides={list(strides)}"
            )
        check_choice("activation", activation, SignalActivation)
        check_choice("init", init, SignalInit)
        if not (math.isfinite(init_std) and init_std > 0):
            raise ConfigurationError(
                f"init_std is a standard deviation above 0, got {init_std}; without spread, set "
                "init: zero"
            )
        self.activation: SignalActivation = activation
        self.features = nn.Sequential()
        for width, stride in zip(widths, strides, strict=True):
            conv = conv3x3(in_channels, width, stride)
            self.features.append(named_sequence(conv=conv, bn=nn.BatchNorm2d(width), act=nn.ReLU()))
            in_channels = width
        self.features.append(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))
        self.type_head = nn.Sequential(
            nn.Linear(in_channels, type_hidden), nn.ReLU(), nn.Linear(type_hidden, 2)
        )
        read = 2 if self.follows_type else in_channels
        self.signal_heads = nn.ModuleList(signal_head(read, s, init, init_std) for s in sizes)

    def read(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features z ``(N, d)`` and type logits u ``(N, 2)`` of images."""
        z = self.features(x)
        return z, self.type_head(z)

    def signals(self, z: Tensor, p: Tensor) -> list[Tensor]:
        """All omega_j = act(A_j r + b_j), with r the features z or the type probabilities p."""
        read = p if self.follows_type else z
        return [ACTIVATIONS[self.activation](head(read)) for head in self.signal_heads]


class Router(SideNetwork):
    """The multi-head adversarial router of version 4 [F][S]: signal heads read the features."""

    follows_type = False


class Detector(SideNetwork):
    """The adversarial detector of versions 1 and 2 [A], a reconstruction [D].

    Signals are a function of the detector's output alone, in training as well, so the filters move
    along a curve from those of a clean image, p = (1, 0), to those of an adversarial one, (0, 1).
    """

    follows_type = True


Rows = slice | Tensor
"""Which images of a batch: a slice where they stand together, else their positions."""


@dataclass(eq=False)
class Route:
    """What the dynamic layers of one network receive for the duration of one forward pass."""

    signals: Sequence[Tensor] = ()  # by dynamic convolution, (N, O)
    mixture: Tensor | None = None  # weights of the two batch-norms in evaluation mode, (N, 2)
    rows: tuple[Rows, Rows] | None = None  # images of each type, for batch-norms in training mode
    maps: Sequence[tuple[Tensor, Tensor]] = ()  # by pair of batch-norms, see :meth:`map_of`

    def __post_init__(self) -> None:
        self.pairs: list[MixBatchNorm2d] = []  # those that read this route

    def map_of(self, position: int) -> tuple[Tensor, Tensor]:
        """Scale and shift ``(N, C)`` that are the average of a pair of batch-norms.

        Those of all pairs are computed together when the first is asked for.

        Raises:
            RuntimeError: Outside a forward pass.
        """
        if self.mixture is None:
            raise RuntimeError("MixBN has P_type only in AWNet's forward pass")
        if not self.maps:
            self.maps = mixed_maps(self.pairs, self.mixture)
        return self.maps[position]

    @contextmanager
    def told(
        self,
        signals: Sequence[Tensor],
        mixture: Tensor | None,
        rows: tuple[Rows, Rows] | None = None,
        **more: Tensor,
    ) -> Iterator[None]:
        """Set the values for one pass and clear them afterwards, even after an exception."""
        vars(self).update(signals=signals, mixture=mixture, rows=rows, **more)
        try:
            yield
        finally:
            vars(self).update({field.name: field.default for field in fields(self)})


Types = int | Tensor
"""The types of a batch's images, ``(N,)``, or how many are clean, which then come first."""


def rows_by_type(types: Types, count: int) -> tuple[Rows, Rows]:
    """Where the clean and where the adversarial of ``count`` images are.

    A number is known to the host. For the values of a tensor the host waits for the device.

    Raises:
        ConfigurationError: If there are types other than 0 and 1, or not one for each image.
    """
    if isinstance(types, int):
        if not 0 <= types <= count:
            raise ConfigurationError(f"{types} of {count} images cannot be clean, 0 to {count} can")
        return slice(0, types), slice(types, count)
    if types.shape != (count,) or not ((types == CLEAN) | (types == ADVERSARIAL)).all():
        raise ConfigurationError(
            f"types must be 0 (clean) or 1 (adversarial) for each of {count} images, got "
            f"{torch.unique(types).tolist()} of shape {tuple(types.shape)}"
        )
    clean = int((types == CLEAN).sum())
    if not types[:clean].any():  # clean ones first, as in training: no copies
        return slice(0, clean), slice(clean, count)
    return (types == CLEAN).nonzero()[:, 0], (types == ADVERSARIAL).nonzero()[:, 0]


class DynamicConv2d(nn.Conv2d):
    r"""A convolution whose filters are scaled for each image.

    :math:`\tilde W_b[o] = \omega_b[o] W[o]` [F]. There is no bias, so scaling the filter equals
    scaling its output: one ordinary convolution and one product. ``position`` is the index of this
    convolution among the dynamic ones of the route.
    """

    def __init__(self, conv: nn.Conv2d, route: Route, position: int) -> None:
        if conv.bias is not None:
            raise ConfigurationError(
                f"dynamic convolutions need bias=False, got {conv}; use a network whose "
                "convolutions have no bias"
            )
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")
        settings: dict[str, Any] = {name: getattr(conv, name) for name in (*names, "groups")}
        super().__init__(**settings, bias=False, device="meta")
        self.weight = conv.weight
        self.route = route
        self.position = position

    def forward(self, input: Tensor) -> Tensor:
        """``(N, I, H, W)`` to ``(N, O, H', W')``."""
        if not self.route.signals:
            raise RuntimeError("a dynamic convolution has signals only in AWNet's forward pass")
        return super().forward(input) * self.route.signals[self.position][:, :, None, None]


def gain_of(norm: nn.BatchNorm2d) -> Tensor:
    """What a batch-norm multiplies each channel by in evaluation mode, ``(C,)``."""
    return norm.weight * torch.rsqrt(cast(Tensor, norm.running_var) + norm.eps)


def mixed_maps(pairs: Sequence["MixBatchNorm2d"], p: Tensor) -> list[tuple[Tensor, Tensor]]:
    r"""Scale and shift ``(N, C)`` of :math:`\sum_i P_i BN_i(h)` in evaluation mode, by pair.

    All channels of all pairs are computed at once: a network has tens of pairs, and a dozen small
    operations for each took a fifth of an attack's time.
    """
    gains, shifts = [], []
    for kind in ("clean", "adv"):
        norms = [cast(nn.BatchNorm2d, getattr(pair, kind)) for pair in pairs]
        gain = torch.cat([gain_of(norm) for norm in norms])
        mean = torch.cat([cast(Tensor, norm.running_mean) for norm in norms])
        gains.append(gain)
        shifts.append(torch.cat([norm.bias for norm in norms]) - mean * gain)
    share = p[:, :, None]  # and no product of matrices, which autocast would round
    widths = [pair.clean.num_features for pair in pairs]
    scale, shift = ((share * torch.stack(of)).sum(dim=1) for of in (gains, shifts))
    return list(zip(torch.split(scale, widths, 1), torch.split(shift, widths, 1), strict=True))


class MixBatchNorm2d(nn.Module):
    r"""Two batch-norms: by the true type in training, mixed by P_type in evaluation.

    In training each image goes through the one of its type, with the batch statistics of the images
    of that type; P_type is not read. In evaluation the two *outputs* are averaged,
    :math:`\sum_i P_i BN_i(h)`, with running statistics [F]. Both start from ``norm``.
    """

    def __init__(self, norm: nn.BatchNorm2d, route: Route) -> None:
        super().__init__()
        self.clean = norm
        self.adv = nn.BatchNorm2d(
            norm.num_features,
            norm.eps,
            norm.momentum,
            norm.affine,
            norm.track_running_stats,
            device=norm.weight.device,
            dtype=norm.weight.dtype,
        )
        self.adv.load_state_dict(norm.state_dict())  # a deep copy needs storage
        self.route = route
        self.position = len(route.pairs)
        route.pairs.append(self)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised maps, ``(N, C, H, W)``."""
        return self._by_type(x) if self.training else self._mixed(x)

    def _mixed(self, x: Tensor) -> Tensor:
        """The average of both outputs, computed as one affine map per image."""
        scale, shift = self.route.map_of(self.position)
        return (x * scale[:, :, None, None] + shift[:, :, None, None]).to(x.dtype)

    def _by_type(self, x: Tensor) -> Tensor:
        if self.route.rows is None:
            raise RuntimeError(
                "MixBN in training mode needs the type of every image: call "
                "net.outputs(x, types=...), or put the network into evaluation mode"
            )
        out = torch.empty_like(x)
        for norm, rows in zip((self.clean, self.adv), self.route.rows, strict=True):
            part = x[rows]
            if len(part):  # else the statistics of this type stay unchanged
                out[rows] = norm(part)
        return out


@dataclass(eq=False)
class Knob(Route):
    """A route that also gives the layers OAT's lambda as ``condition``, ``(N, 1)``."""

    condition: Tensor | None = None


class FiLMBatchNorm2d(nn.Module):
    r"""Two batch-norms, then :math:`(1 + \gamma(\lambda)) h + \beta(\lambda)` by channel.

    gamma and beta come from two layers with ``hidden`` units between them. The last one starts at
    zero, so that the network starts as one with two batch-norms [D].
    """

    def __init__(self, norm: nn.BatchNorm2d, route: Knob, hidden: int) -> None:
        super().__init__()
        self.norm = MixBatchNorm2d(norm, route)
        last = signal_head(hidden, 2 * norm.num_features)
        self.film = nn.Sequential(nn.Linear(1, hidden), nn.LeakyReLU(), last)
        self.route = route

    def forward(self, x: Tensor) -> Tensor:
        """Normalised and modulated maps, ``(N, C, H, W)``."""
        gamma, beta = torch.chunk(self.film(self.route.condition), 2, dim=1)
        out: Tensor = self.norm(x) * (1 + gamma[:, :, None, None]) + beta[:, :, None, None]
        return out


class Outputs(NamedTuple):
    """The outputs of AW-Net."""

    logits: Tensor  # of the classes, (N, K)
    type_logits: Tensor  # u, (N, 2)
    p: Tensor  # P_type as used, (N, 2)
    signals: list[Tensor]  # all omega_j, (N, S_j)


def signal_statistics(clean: Tensor, adversarial: Tensor) -> dict[str, Tensor]:
    """Movement of the filters of one block, from omega_j ``(N, S_j)`` of images of both types.

    Means over filters: ``std`` over all images, and ``shift``, the absolute difference between the
    means of the two types; and ``mean``.
    """
    both = torch.cat([clean, adversarial])
    return {
        "mean": both.mean(),
        "std": both.std(dim=0, correction=0).mean(),
        "shift": (adversarial.mean(dim=0) - clean.mean(dim=0)).abs().mean(),
    }


def straight_through(p: Tensor) -> Tensor:
    """One-hot of the larger probability, with the gradient of p [D]."""
    hard = F.one_hot(p.argmax(dim=1), 2).to(p)
    return hard + p - p.detach()


def check_probabilities(p: Tensor, count: int) -> Tensor:
    """Type probabilities ``(N, 2)`` for each of ``count`` images, given so or as one pair ``(2,)``.

    Raises:
        ConfigurationError: If they are not distributions over the two types.
    """
    if p.ndim == 1:
        p = p.expand(count, -1)
    if p.shape != (count, 2) or (p < 0).any() or ((p.sum(dim=1) - 1).abs() > 1e-4).any():
        raise ConfigurationError(
            f"P_type must be a distribution over (clean, adversarial), shape ({count}, 2) or (2,), "
            f"got {p[0].tolist() if p.numel() else []} of shape {tuple(p.shape)}; for instance "
            "(0, 1) sends every image through the adversarial batch-norms"
        )
    return p
