"""WM: the Weight Map layer, and how to insert it into a network. A reconstruction.

Only title pages and abstracts of the paper could be read, which do not define the operation. Tags
name the source of a statement: [P1], [P2] abstract of v1, v2; [T] front matter of the first
author's thesis; [S] second-hand and unverified; [D] decided here, each one a setting; [M] follows
from the definitions; [obs] seen in a trial run.

The names of the two variants, smoothing and unsharp, are [S]; their formulas are [D]: a map M has a
weight for every position of the feature X, and a local filter without parameters follows.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.attacks.losses import cross_entropy
from common.errors import ConfigurationError, check_choice
from common.networks.insertion import find_places
from common.networks.parts import Part
from common.objectives import Batch, InnerLoss, differentiable

Variant = Literal["smoothing", "unsharp", "highpass", "scale", "subtract", "subtract_summed"]
"""``smoothing`` and ``unsharp`` are the two variants [S]; ``scale`` is the control without a filter
and the others are further readings of the second variant, unverified [D]."""

KernelNorm = Literal["sum", "mean"]
Order = Literal["weight_then_reduce", "reduce_then_weight"]
Init = Literal["constant", "uniform", "normal"]

# ------------------------------------------------------------------------------------- the filter


class _BoxSum(torch.autograd.Function):
    """Sums over the columns of a window, then over its rows; it is its own adjoint.

    Pooling of contiguous maps on a CPU is up to six times slower, and took a quarter of the time of
    WM's small networks.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, k: int) -> Tensor:
        if k == 1 or z.device.type != "cpu" or not z.is_contiguous():
            return F.avg_pool2d(z, k, stride=1, padding=k // 2, divisor_override=1)
        z = F.pad(z, [k // 2] * 4)
        for dim in (-1, -2):
            first, second, *others = (z.narrow(dim, i, z.shape[dim] - k + 1) for i in range(k))
            z = first + second
            for other in others:
                z += other
        return z

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        ctx.k = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return box_sum(gradient, ctx.k), None


def box_sum(z: Tensor, k: int) -> Tensor:
    """B_k: sum over a k x k window, k odd, with zeros around ``z`` ``(N, C, H, W)`` [D]."""
    return cast(Tensor, _BoxSum.apply(z, k))


def box_mean(z: Tensor, k: int) -> Tensor:
    """A_k = B_k / k^2; the divisor is k^2 at the border too [D]."""
    return box_sum(z, k) / (k * k)


def reduce(
    z: Tensor, variant: Variant, k: int = 3, kernel_norm: KernelNorm = "sum", lam: float = 1.0
) -> Tensor:
    r"""The local filter of a variant, ``(N, C, H, W)`` to the same shape [D].

    ``smoothing`` is :math:`B_k z`, or :math:`A_k z` with ``kernel_norm`` ``mean``; ``highpass``
    :math:`z - A_k z`; ``unsharp`` :math:`z + \lambda (z - A_k z)`; ``scale`` :math:`z`. So
    :math:`\lambda` leads from the local mean (-1) past no filter (0) to sharpening (1) [M]. The
    ``subtract`` variants are :math:`A_k z`, which the layer takes from its input.
    """
    check_choice("variant", variant, Variant)
    check_choice("kernel_norm", kernel_norm, KernelNorm)
    if variant == "scale":
        return z
    if variant == "smoothing" and kernel_norm == "sum":
        return box_sum(z, k)
    mean = box_mean(z, k)
    if variant == "highpass":
        return z - mean
    return z + lam * (z - mean) if variant == "unsharp" else mean


# -------------------------------------------------------------------------------------- the layer


class WeightMap(Part):
    r"""Y = K(M * X): a weight for every position, then a filter without parameters [D].

    The two ``subtract`` variants are :math:`X - A_k(M X)` and :math:`X - \sum_c A_k(M_c X_c)`. The
    layer computes in float32, under autocast too: sums of nine compound where layers are stacked.

    Args:
        variant: What follows the weighting.
        shape: Of the feature, ``(C, H, W)``; another one is refused and never resized.
        kernel_size: Side k of the window, odd.
        kernel_norm: Of ``smoothing`` alone; the mean with a map of k^2 M is the sum with M [M].
        lam: Of ``unsharp`` alone; ``None`` is 1.
        order: ``reduce_then_weight`` weights what comes out of the filter instead.
        shared: One map for all channels, ``(1, H, W)``.
        init: The map starts at ``init_value`` times 1, U(0, 1) or N(1, 0.1^2).
        init_value: 1/k^2 makes the sum kernel start as the mean.
        trainable: ``False`` freezes the map at its start, the control for the filter alone.

    Raises:
        ConfigurationError: If a setting is out of range or does not apply to the variant.
    """

    has_fixed_size = True

    def __init__(
        self,
        variant: Variant,
        shape: Sequence[int],
        kernel_size: int = 3,
        kernel_norm: KernelNorm = "sum",
        lam: float | None = None,
        order: Order = "weight_then_reduce",
        shared: bool = False,
        init: Init = "constant",
        init_value: float = 1.0,
        trainable: bool = True,
    ) -> None:
        super().__init__()
        check_choice("variant", variant, Variant)
        check_choice("kernel_norm", kernel_norm, KernelNorm)
        check_choice("order", order, Order)
        check_choice("init", init, Init)
        if len(shape) != 3 or min(shape) < 1:
            raise ConfigurationError(
                f"shape must be (channels, height, width) of the feature, got {tuple(shape)}"
            )
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ConfigurationError(
                f"kernel_size must be odd, so that the window has a centre, got {kernel_size}; try "
                + (f"{kernel_size - 1} or {kernel_size + 1}" if kernel_size > 1 else "3")
            )
        if kernel_norm != "sum" and variant != "smoothing":
            raise ConfigurationError(
                f"kernel_norm={kernel_norm} applies to variant=smoothing alone, got "
                f"variant={variant}, which always uses the mean where it filters; drop kernel_norm"
            )
        if lam is not None and variant != "unsharp":
            raise ConfigurationError(
                f"lam={lam} applies to variant=unsharp alone, got variant={variant}; drop lam"
            )
        self.variant: Variant = variant
        self.shape = (shape[0], shape[1], shape[2])
        self.kernel_size = kernel_size
        self.kernel_norm: KernelNorm = kernel_norm
        self.lam = 1.0 if lam is None else lam
        self.order: Order = order
        self.shared = shared
        self.init: Init = init
        start = torch.empty(1 if shared else shape[0], *shape[1:], dtype=torch.float32)
        if init == "constant":
            start.fill_(1.0)
        elif init == "uniform":
            start.uniform_(0.0, 1.0)
        else:
            start.normal_(1.0, 0.1)
        self.map = nn.Parameter(start * init_value, requires_grad=trainable)

    def own_losses(self) -> dict[str, InnerLoss]:
        """``ce_bypass``, cross-entropy with gradients past the maps.

        The layer draws no random numbers and its gradients are exact, so the usual losses are the
        white-box attack already [M]; this one asks whether the gradients are of any use.
        """
        return {"ce_bypass": past_the_maps}

    def forward(self, x: Tensor) -> Tensor:
        """Features ``(N, C, H, W)`` to features of the same shape; float32 under autocast.

        Raises:
            ValueError: If the feature is not of the shape the map was made for.
        """
        if x.ndim != 4 or tuple(x.shape[1:]) != self.shape:
            raise ValueError(
                f"this weight map was made for features (N, {', '.join(map(str, self.shape))}), "
                f"got {tuple(x.shape)}; it belongs to positions and is not resized, so insert maps "
                "last, into the whole network, with the shape of its images"
            )
        kind = x.device.type
        is_cast = kind != "meta" and torch.is_autocast_enabled(kind)
        if not is_cast:
            return self._computed(x).to(x.dtype)
        with torch.autocast(kind, enabled=False):
            return self._computed(x)

    def _computed(self, x: Tensor) -> Tensor:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        is_last = self.order == "reduce_then_weight"
        z = x if is_last else self.map * x
        y = reduce(z, self.variant, self.kernel_size, self.kernel_norm, self.lam)
        y = self.map * y if is_last else y
        if self.variant == "subtract":
            return x - y
        return x - y.sum(dim=1, keepdim=True) if self.variant == "subtract_summed" else y

    def extra_repr(self) -> str:
        """Settings, for ``print(net)``."""
        parts = [self.variant, "x".join(map(str, self.map.shape)), f"k={self.kernel_size}"]
        if self.variant == "smoothing":
            parts.append(self.kernel_norm)
        if self.variant == "unsharp":
            parts.append(f"lam={self.lam:g}")
        if self.order != "weight_then_reduce":
            parts.append(self.order)
        return ", ".join(parts if self.map.requires_grad else [*parts, "frozen"])


# ---------------------------------------------------------------------- into any network [P1] [P2]


def insert_weight_maps(
    net: nn.Module,
    after: Sequence[str],
    example_shape: Sequence[int],
    variant: Variant,
    **settings: Any,
) -> nn.Module:
    """Put a weight map behind named modules of a network, in place, and return the network.

    The map becomes a child ``weight_map`` of the module it follows, and a forward hook applies it
    to its output. So no key of the state dict changes, and ``<module>.weight_map.map`` is new for
    each map. One forward pass of a blank image finds the sizes of the maps, on any device.

    Args:
        net: The network.
        after: Names as in ``net.named_modules()``; for a ``Sequential``, behind its last module.
        example_shape: Of one image, ``(C, H, W)``.
        variant: As in :class:`WeightMap`.
        **settings: Of :class:`WeightMap`, the same for all maps.

    Raises:
        ConfigurationError: If a module does not exist, has a map already, is run never or several
            times in a forward pass, or its output is no feature map; or a setting is refused.
    """
    check_choice("variant", variant, Variant)
    places, _ = find_places(net, after, example_shape, "a weight map")
    maps = {}
    for name, (module, output) in places.items():
        if hasattr(module, "weight_map"):
            raise ConfigurationError(
                f"there is a weight map after {name!r} already; insert maps once, into a fresh "
                "network"
            )
        maps[name] = WeightMap(variant, output.shape[1:], **settings).to(output.device)
    for name, weight_map in maps.items():
        places[name].module.add_module("weight_map", weight_map)
        places[name].module.register_forward_hook(_apply_weight_map)
    return net


def weight_maps(net: nn.Module) -> dict[str, WeightMap]:
    """The maps of a network by the name of the module they follow, in the order of the modules."""
    maps = ((name, module) for name, module in net.named_modules() if isinstance(module, WeightMap))
    return {name.removesuffix(".weight_map"): weight_map for name, weight_map in maps}


@contextmanager
def bypassed(net: nn.Module) -> Iterator[None]:
    """Let gradients pass every weight map as if it were not there; outputs do not change.

    Backward pass differentiable approximation (Athalye et al. 2018) by the identity: it is the
    stronger attack if the layer is robust only by the scale of its gradients [D].
    """

    def straight_through(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return args[0] + (output - args[0]).detach()

    with ExitStack() as hooks:
        for weight_map in weight_maps(net).values():
            hooks.enter_context(weight_map.register_forward_hook(straight_through))
        yield


def _apply_weight_map(module: Any, _: Any, output: Tensor) -> Tensor:
    """The forward hook; it finds the map on the module, so that copies use their own."""
    mapped: Tensor = module.weight_map(output)
    return mapped


def past_the_maps(model: Any, batch: Batch) -> Callable[[Tensor], Tensor]:
    """X' -> cross-entropy, ``(N,)``, whose gradient passes the maps as if they were not there."""
    y = differentiable(batch["y"])

    def loss(x: Tensor) -> Tensor:
        with bypassed(model):
            return cross_entropy(model(x), y)

    return loss
