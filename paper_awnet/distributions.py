"""How the weights of filters are distributed, and how far two distributions are apart.

The paper compares a standard and a robust network of one architecture [A]; the quantities are ours
[D]. A filter in front of a batch-norm has a free scale, which folding the batch-norm into it takes
away, so conclusions are drawn from folded weights. Tags as in :mod:`paper_awnet.method`.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from paper_awnet.method import DynamicConv2d, MixBatchNorm2d
from paper_awnet.networks import AWNet

BINS = 101


class Filters(NamedTuple):
    """The weights of one convolution.

    Attributes:
        raw: W, ``(O, I, k, k)``.
        folded: W_o times gamma_o / sqrt(v_o + eps) of the batch-norm that reads its output, or
            ``None`` where none does directly.
    """

    raw: Tensor
    folded: Tensor | None


# ----------------------------------------------------------------------------------- of a network


def filters(
    net: nn.Module,
    image: Tensor,
    kind: str = "clean",
    scales: Mapping[str, Tensor] | None = None,
) -> dict[str, Filters]:
    """All convolutions of a network by name, the side network's left out.

    Which batch-norm reads which convolution is found out by passing an image through.

    Args:
        net: In evaluation mode.
        image: One image, ``(C, H, W)``.
        kind: Of two batch-norms, the one that is folded: ``clean`` or ``adv``.
        scales: By name, a scale for every filter ``(O,)`` that multiplies the weights first: mean
            signals, for instance.
    """
    backbone = net.arch if isinstance(net, AWNet) else net
    prefix = "arch." if isinstance(net, AWNet) else ""
    norms = readers(net, image)
    found = {}
    for name, conv in backbone.named_modules():
        if not isinstance(conv, nn.Conv2d):
            continue
        raw = conv.weight.detach().clone()
        if scales is not None and name in scales:
            raw = raw * scales[name].to(raw)[:, None, None, None]
        norm = norms.get(prefix + name)
        if isinstance(norm, MixBatchNorm2d):
            norm = norm.get_submodule(kind)
        folded = None
        if isinstance(norm, nn.BatchNorm2d):
            variance = cast(Tensor, norm.running_var)
            gain = (norm.weight * torch.rsqrt(variance + norm.eps)).detach()
            folded = raw * gain[:, None, None, None]
        found[name] = Filters(raw, folded)
    return found


@torch.no_grad()
def readers(net: nn.Module, image: Tensor) -> dict[str, nn.Module]:
    """By name of a convolution, the batch-norm whose input is its output."""
    outputs: list[tuple[str, Tensor]] = []
    read: dict[str, nn.Module] = {}
    handles = []

    def made(name: str) -> object:
        def hook(_: nn.Module, __: object, out: Tensor) -> None:
            outputs.append((name, out))  # held, so that no other tensor gets its identity

        return hook

    def taken(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        for name, out in outputs:
            if out is args[0]:
                read[name] = module

    inside = [m for mix in net.modules() if isinstance(mix, MixBatchNorm2d) for m in mix.children()]
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            handles.append(module.register_forward_hook(made(name)))  # type: ignore[arg-type]
        elif isinstance(module, MixBatchNorm2d | nn.BatchNorm2d) and module not in inside:
            handles.append(module.register_forward_pre_hook(taken))
    try:
        net(image[None])
    finally:
        for handle in handles:
            handle.remove()
    return read


def mean_scales(net: AWNet, signals: Sequence[Tensor]) -> dict[str, Tensor]:
    """By name of a dynamic convolution, its filters' mean scale over images, ``(O,)``."""
    parts = [
        part.mean(dim=0)
        for omega, widths in zip(signals, net.widths, strict=True)
        for part in torch.split(omega, widths, dim=1)
    ]
    return {
        name: parts[conv.position]
        for name, conv in net.arch.named_modules()
        if isinstance(conv, DynamicConv2d)
    }


# ------------------------------------------------------------------------------- of two networks


def histograms(first: Tensor, second: Tensor, bins: int = BINS) -> tuple[Tensor, Tensor, float]:
    """Relative frequencies of two sets of weights over common equal bins on [-b, b].

    b is the larger of the two 99.9 % quantiles of the absolute values; what is beyond counts in the
    outermost bins. Zero is the centre of the middle bin: at an edge, rounding would decide whether
    pruned weights and tiny ones of either sign are together. Negated weights give the mirror image.

    Args:
        first: Weights of any shape.
        second: Others.
        bins: How many, an odd number.

    Returns:
        Both histograms, ``(bins,)``, each with sum 1, and b.

    Raises:
        ValueError: If ``bins`` is even.
    """
    if bins % 2 == 0:
        raise ValueError(f"bins must be odd, so that zero is the centre of one, got {bins}")
    values = [w.detach().flatten().double() for w in (first, second)]
    bound = max(float(quantile(w.abs(), 0.999)) for w in values) or 1.0
    half, width = bins // 2, 2 * bound / bins
    at = [((w / width).round().clamp(-half, half) + half).long() for w in values]
    one, other = (torch.bincount(i, minlength=bins).double() / len(i) for i in at)
    return one, other, bound


def quantile(values: Tensor, q: float) -> Tensor:
    """With linear interpolation, of any number of values (torch's own stops at 16 million)."""
    ordered = values.sort().values
    position = q * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low].lerp(ordered[high], position - low)


def js_divergence(p: Tensor, q: Tensor) -> float:
    """Jensen-Shannon divergence in nats, between 0 and log 2; 0 log 0 is 0."""
    middle = (p + q) / 2
    return float(sum(torch.xlogy(a, a / middle).nan_to_num(0.0).sum() / 2 for a in (p, q)))


def wasserstein(first: Tensor, second: Tensor) -> float:
    """1-Wasserstein distance of two sets of as many numbers: mean distance of the sorted ones.

    Raises:
        ValueError: If they are not as many.
    """
    a, b = first.flatten().double().sort().values, second.flatten().double().sort().values
    if a.shape != b.shape:
        raise ValueError(
            f"distances are between equal architectures, got {len(a)} and {len(b)} weights"
        )
    return float((a - b).abs().mean())


class Shape(NamedTuple):
    """Numbers about one set of weights.

    Attributes:
        mean_abs: Mean of the absolute value.
        std: Standard deviation of the population.
        kurtosis: Fourth moment over the squared second, minus 3: 0 for a normal distribution, and
            more the more mass is near zero and far out.
        sparsity: Share of weights below a hundredth of the largest.
        l1: L1 norm of a filter, mean over filters.
        l2: L2 norm of a filter, mean over filters.
    """

    mean_abs: float
    std: float
    kurtosis: float
    sparsity: float
    l1: float
    l2: float


def shape_of(weights: Tensor) -> Shape:
    """The numbers about the filters of one convolution, ``(O, I, k, k)``."""
    w = weights.flatten().double()
    centred = w - w.mean()
    variance = centred.square().mean()
    per_filter = weights.flatten(1).double()
    return Shape(
        float(w.abs().mean()),
        float(variance.sqrt()),
        float((centred**4).mean() / variance.square() - 3),
        float((w.abs() < 0.01 * w.abs().max()).double().mean()),
        float(per_filter.abs().sum(dim=1).mean()),
        float(per_filter.norm(dim=1).mean()),
    )


def distances(
    first: Mapping[str, Filters], second: Mapping[str, Filters], folded: bool = True
) -> dict[str, dict[str, float]]:
    """By layer, ``wasserstein`` and ``js`` between two networks of one architecture.

    Args:
        first: Of one network.
        second: Of the other.
        folded: Whether of folded weights; layers without a batch-norm are left out then.
    """
    found = {}
    for name, one in first.items():
        a, b = (f.folded if folded else f.raw for f in (one, second[name]))
        if a is not None and b is not None:
            p, q, _ = histograms(a, b)
            found[name] = {"wasserstein": wasserstein(a, b), "js": js_divergence(p, q)}
    return found
