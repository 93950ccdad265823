"""AW-Net's layers: the router, filters scaled for each image, and the mixture of two batch-norms.

There is no official code for this paper, and only its abstracts, its framework figure and a summary
by others were at hand. Tags name the source of a statement: [A] an abstract, [F] the framework
figure, [S] the summary, [M] the same authors' released MTARD code, [R] common practice of the
field, [D] a decision of ours where nothing was found. What is tagged [D] is an argument, so that it
can be changed.

Shapes: images x ``(N, C, H, W)`` in [0, 1]; types t ``(N,)``, 0 clean and 1 adversarial [D]; router
features z ``(N, d)``; type logits u ``(N, 2)``; P_type = softmax(u), columns (clean, adversarial);
regulation signals omega_j ``(N, S_j)``, one number for every dynamic filter of block j.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import ConfigurationError, check_choice
from common.networks.resnet import check_positive, conv3x3, named_sequence

CLEAN, ADVERSARIAL = 0, 1
"""The two types, and the columns of P_type [D]."""

SignalActivation = Literal["two_sigmoid", "one_plus_tanh", "sigmoid", "softplus", "linear"]
SignalInit = Literal["zero", "normal"]

# --------------------------------------------------------------- regulation signals, omega_j [F][D]

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "two_sigmoid": lambda a: 2.0 * torch.sigmoid(a),  # in (0, 2), 1 at 0
    "one_plus_tanh": lambda a: 1.0 + torch.tanh(a / 2.0),  # the same function
    "sigmoid": torch.sigmoid,  # in (0, 1)
    "softplus": F.softplus,  # positive
    "linear": lambda a: 1.0 + a,
}
"""From what a signal head computes to the signal."""


def signal_head(features: int, size: int, init: SignalInit = "zero", std: float = 1.0) -> nn.Linear:
    """One layer [F] from what it reads to the signals of one block, ``A_j`` and ``b_j``.

    Args:
        features: Numbers it reads.
        size: S_j.
        init: ``zero``, so that omega is 1 for every image and the network starts as the static one
            [D]; or ``normal``, entries of A_j with standard deviation ``std`` and b_j = 0.
        std: Of ``normal``.
    """
    check_choice("init", init, SignalInit)
    head = nn.Linear(features, size)
    nn.init.zeros_(head.bias)
    if init == "zero":
        nn.init.zeros_(head.weight)
    else:
        nn.init.normal_(head.weight, std=std)
    return head


# --------------------------------------------------------------------- the side network [F][S][D]


class SideNetwork(nn.Module, ABC):
    """The feature extractor D, the type head, and a signal head for each block.

    D is three times conv3x3 - BN - ReLU and a global average pool [D]; its batch-norms are ordinary
    ones, because the type is what it has to find out. The type head has two layers [F].

    Args:
        in_channels: Channels of the images.
        sizes: S_j of each block; empty for a network whose filters are not scaled.
        widths: Channels of D's convolutions [D].
        strides: Their strides [D].
        type_hidden: Hidden units of the type head [D].
        activation: From head to signal [D].
        init: How the signal heads begin [D].
        init_std: Standard deviation of ``normal``.

    Raises:
        ConfigurationError: If a size is below 1, widths and strides do not go together, the
            activation or the start is unknown, or the standard deviation is not positive.
    """

    splits_batch_norm: bool
    """Whether a network with this side network has two batch-norms unless told otherwise."""

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
                f"init_std is a standard deviation above 0, got {init_std}; for no spread at all "
                "set init: zero"
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
        read = self.signal_features(in_channels)
        self.signal_heads = nn.ModuleList(signal_head(read, s, init, init_std) for s in sizes)

    @staticmethod
    @abstractmethod
    def signal_features(width: int) -> int:
        """How many numbers a signal head reads, with ``width`` features."""

    @abstractmethod
    def signals(self, z: Tensor, p: Tensor) -> list[Tensor]:
        """All omega_j from features z ``(N, d)`` and type probabilities p ``(N, 2)``."""

    def read(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features z ``(N, d)`` and type logits u ``(N, 2)`` of images."""
        z = self.features(x)
        return z, self.type_head(z)

    def _omega(self, read: Tensor) -> list[Tensor]:
        activate = ACTIVATIONS[self.activation]
        return [activate(head(read)) for head in self.signal_heads]


class Router(SideNetwork):
    """The multi-head adversarial router of version 4 [F][S]: signal heads read the features."""

    splits_batch_norm = True

    @staticmethod
    def signal_features(width: int) -> int:
        """All features."""
        return width

    def signals(self, z: Tensor, p: Tensor) -> list[Tensor]:
        """omega_j = act(A_j z + b_j); p is not read."""
        return self._omega(z)


class Detector(SideNetwork):
    """The adversarial detector of versions 1 and 2 [A], a reconstruction [D].

    Signals are a function of the detector's output alone, so the filters move along a curve from
    those of a clean image, p = (1, 0), to those of an adversarial one, p = (0, 1).
    """

    splits_batch_norm = False

    @staticmethod
    def signal_features(width: int) -> int:
        """The two probabilities."""
        return 2

    def signals(self, z: Tensor, p: Tensor) -> list[Tensor]:
        """omega_j = act(A_j p + b_j), p the detector's own in training as well."""
        return self._omega(p)


# ------------------------------------------------------------------ what layers are told per pass


Rows = slice | Tensor
"""Which images of a batch: a slice where they stand together, else their positions."""


class Route:
    """What the dynamic layers of one network are told, for the duration of one forward pass.

    Attributes:
        signals: By dynamic convolution, ``(N, O)``.
        mixture: Weights of the two batch-norms in evaluation mode, ``(N, 2)``.
        rows: The images of each type, for batch-norms in training mode.
    """

    def __init__(self) -> None:
        self.signals: Sequence[Tensor] = ()
        self.mixture: Tensor | None = None
        self.rows: tuple[Rows, Rows] | None = None

    @contextmanager
    def told(
        self,
        signals: Sequence[Tensor],
        mixture: Tensor | None,
        rows: tuple[Rows, Rows] | None = None,
    ) -> Iterator[None]:
        """Tell the layers, and forget it again even after an exception."""
        self.signals, self.mixture, self.rows = signals, mixture, rows
        try:
            yield
        finally:
            self.signals, self.mixture, self.rows = (), None, None


def rows_by_type(types: Tensor) -> tuple[Rows, Rows]:
    """Where the clean and where the adversarial images of a batch are.

    Args:
        types: 0 or 1, ``(N,)``.

    Raises:
        ConfigurationError: If there are other types.
    """
    if types.ndim != 1 or not ((types == CLEAN) | (types == ADVERSARIAL)).all():
        raise ConfigurationError(
            "types must be 0 (clean) or 1 (adversarial) for each image, got "
            f"{torch.unique(types).tolist()} of shape {tuple(types.shape)}"
        )
    clean = int((types == CLEAN).sum())
    if not types[:clean].any():  # clean ones first, as in training: no copies
        return slice(0, clean), slice(clean, len(types))
    return (types == CLEAN).nonzero()[:, 0], (types == ADVERSARIAL).nonzero()[:, 0]


# --------------------------------------------------------------------- dynamic convolution [A][F]


class DynamicConv2d(nn.Conv2d):
    r"""A convolution whose filters are scaled for each image.

    :math:`\tilde W_b[o] = \omega_b[o] W[o]` [F]. There is no bias, so scaling the filter is scaling
    its output: one ordinary convolution and one product.

    Args:
        conv: The convolution whose weight becomes this one's.
        route: Where the signals come from.
        position: Of this convolution among the dynamic ones.

    Raises:
        ConfigurationError: If the convolution has a bias.
    """

    def __init__(self, conv: nn.Conv2d, route: Route, position: int) -> None:
        if conv.bias is not None:
            raise ConfigurationError(
                f"scaling the filters of {conv} is not scaling its output, because it has a bias; "
                "use a network whose convolutions have none"
            )
        shape = (conv.in_channels, conv.out_channels)
        super().__init__(
            *shape,
            conv.kernel_size,  # type: ignore[arg-type]  # a tuple of as many as it takes
            conv.stride,  # type: ignore[arg-type]
            conv.padding,  # type: ignore[arg-type]
            conv.dilation,  # type: ignore[arg-type]
            conv.groups,
            bias=False,
            device="meta",
        )
        self.weight = conv.weight
        self.route = route
        self.position = position

    def forward(self, input: Tensor) -> Tensor:
        """``(N, I, H, W)`` to ``(N, O, H', W')``."""
        if not self.route.signals:
            raise RuntimeError("a dynamic convolution has no signals outside AWNet's forward pass")
        return scaled_output(super().forward(input), self.route.signals[self.position])


def scaled_output(maps: Tensor, omega: Tensor) -> Tensor:
    """Feature maps ``(N, O, H, W)`` with each image's channels multiplied by omega ``(N, O)``."""
    return maps * omega[:, :, None, None]


def grouped_convolution(x: Tensor, conv: nn.Conv2d, omega: Tensor) -> Tensor:
    """The same in its literal form: weights of their own for every image, as one grouped pass.

    Slow; it is what the other form is tested against.

    Args:
        x: Input, ``(N, I, H, W)``.
        conv: Settings and weight W.
        omega: Scales of its filters, ``(N, O)``.
    """
    n, channels, *size = x.shape
    weight = omega[:, :, None, None, None] * conv.weight
    out = F.conv2d(
        x.reshape(1, n * channels, *size),
        weight.flatten(0, 1),
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        groups=n * conv.groups,
    )
    return out.reshape(n, -1, *out.shape[2:])


# --------------------------------------------------------------------------------------- MixBN [F]


class MixBatchNorm2d(nn.Module):
    r"""Two batch-norms: by the true type in training, mixed by P_type in evaluation.

    In training each image goes through that of its type, with the batch statistics of the images of
    that type; P_type is not read. In evaluation the two *outputs* are averaged,
    :math:`\sum_i P_i BN_i(h)`, on running statistics [F].

    Args:
        norm: What both start as.
        route: Where types and mixture come from.
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
        self.adv.load_state_dict(norm.state_dict())
        self.route = route

    def forward(self, x: Tensor) -> Tensor:
        """Normalised maps, ``(N, C, H, W)``."""
        if self.training:
            return self._by_type(x)
        p = self.route.mixture
        if p is None:
            raise RuntimeError("MixBN has no P_type outside AWNet's forward pass")
        return self._mixed(x, p)

    def _mixed(self, x: Tensor, p: Tensor) -> Tensor:
        """The average of both outputs, as the one affine map per image that it is."""
        scales, shifts = [], []
        for norm in (self.clean, self.adv):
            mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
            scale = norm.weight * torch.rsqrt(variance + norm.eps)
            scales.append(scale)
            shifts.append(norm.bias - mean * scale)
        scale = (p[:, :, None] * torch.stack(scales)).sum(dim=1)  # no product of matrices, which
        shift = (p[:, :, None] * torch.stack(shifts)).sum(dim=1)  # autocast would round
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
            if len(part):  # without images of a type its statistics stay as they are
                out[rows] = norm(part)
        return out


class Outputs(NamedTuple):
    """What AW-Net makes of images.

    Attributes:
        logits: Of the classes, ``(N, K)``.
        type_logits: u, ``(N, 2)``.
        p: P_type as it was used, ``(N, 2)``.
        signals: All omega_j, ``(N, S_j)``.
    """

    logits: Tensor
    type_logits: Tensor
    p: Tensor
    signals: list[Tensor]


def straight_through(p: Tensor) -> Tensor:
    """One-hot of the larger probability, with the gradient of p [D]."""
    hard = F.one_hot(p.argmax(dim=1), 2).to(p)
    return hard + p - p.detach()


def check_probabilities(p: Tensor, count: int) -> Tensor:
    """Given type probabilities for each of ``count`` images, ``(N, 2)``.

    Args:
        p: One pair for all images, ``(2,)``, or one for each, ``(N, 2)``.
        count: N.

    Raises:
        ConfigurationError: If they are no distributions over the two types.
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
