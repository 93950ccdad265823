"""Numbers taken of trained networks: routing, signals, smoothness, and distributions of filters.

The paper compares a standard and a robust network of one architecture [A]; the quantities are ours
[D]. A filter in front of a batch-norm has a free scale, which is removed by folding the batch-norm
into it, so conclusions are drawn from folded weights. Tags as in :mod:`paper_awnet.method`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from scipy.special import rel_entr
from scipy.stats import kurtosis, wasserstein_distance
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from common.attacks.losses import classify, label_loss, margin
from common.attacks.pgd import FGSM, PGD, input_gradient
from common.attacks.randomness import ExampleRandom, Stream
from common.evaluation.measures import AttackMeasure
from common.objectives import Batch, InnerLoss
from common.results.lines import Columns
from paper_awnet.method import ADVERSARIAL, CLEAN, DynamicConv2d, MixBatchNorm2d
from paper_awnet.networks import AWNet, OATNet, forced, require_network
from paper_awnet.objectives import LAMBDAS, at_lambda, signal_statistics

BINS = 101

# ---------------------------------------------------------------------------------- the router


def attacked(model: Any, loss: InnerLoss, attack: PGD, batch: Batch, seed: int) -> Tensor:
    """Adversarial images of one loss, in evaluation mode."""
    random = ExampleRandom(seed, 0, batch["index"], Stream.EVALUATION)
    return attack(loss(model, batch), batch["x"], random)


@torch.no_grad()
def routing(net: AWNet, images: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """P_type of clean images and of each kind of adversarial ones.

    Args:
        net: In evaluation mode.
        images: By name; ``clean`` among them.

    Returns:
        By name: ``p_adv`` ``(N,)``, ``type_acc`` against the true type, ``auroc`` against the clean
        ones.
    """
    found: dict[str, dict[str, Any]] = {}
    clean = net.outputs(images["clean"]).p[:, ADVERSARIAL]
    for name, x in images.items():
        p = net.outputs(x).p[:, ADVERSARIAL]
        is_right = (p < 0.5) if name == "clean" else (p >= 0.5)
        found[name] = {"p_adv": p, "type_acc": float(is_right.float().mean())}
        if name != "clean":
            is_adversarial = np.repeat([0, 1], [len(clean), len(p)])
            found[name]["auroc"] = float(roc_auc_score(is_adversarial, torch.cat([clean, p]).cpu()))
    return found


@torch.no_grad()
def forced_accuracies(
    net: AWNet, images: Mapping[str, Tensor], y: Tensor
) -> dict[str, dict[str, float]]:
    """Accuracy by kind of images and by P_type: ``soft``, forced ``clean``, forced ``adv``."""
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "soft": net,
        "clean": forced(net, CLEAN),
        "adv": forced(net, ADVERSARIAL),
    }
    return {
        kind: {way: float((classify(f(x)) == y).float().mean()) for way, f in ways.items()}
        for kind, x in images.items()
    }


@torch.no_grad()
def signal_summary(net: AWNet, clean: Tensor, adversarial: Tensor) -> list[dict[str, Any]]:
    """By block: ``mean_clean``, ``mean_adv`` ``(S_j,)`` and the numbers of `signal_statistics`."""
    both = [net.outputs(x).signals for x in (clean, adversarial)]
    return [
        {
            "mean_clean": one.mean(dim=0),
            "mean_adv": other.mean(dim=0),
            **{name: float(value) for name, value in signal_statistics(one, other).items()},
        }
        for one, other in zip(*both, strict=True)
    ]


# ----------------------------------------------------------------------- gradient regularisation


def smoothness(model: Any, x: Tensor, y: Tensor, eps: float) -> dict[str, Tensor]:
    r"""First-order predictions against an actual step [D], per image ``(N,)``.

    The size of the loss's gradient is not comparable between models, since robust ones are less
    certain. ``reach`` is the margin over the l1 norm of its gradient, to first order the linf
    distance to the decision boundary. ``rise`` is :math:`CE(x + \delta_{FGSM}) - CE(x)` and
    ``predicted`` its first order, :math:`\epsilon \|\nabla CE\|_1`.
    """
    loss = label_loss(model, y)

    def lead(images: Tensor) -> Tensor:
        return -margin(model(images), y)

    x_adv = FGSM(eps)(loss, x)
    slope = input_gradient(lead, x).flatten(1).abs().sum(dim=1)
    predicted = eps * input_gradient(loss, x).flatten(1).abs().sum(dim=1)
    with torch.no_grad():
        return {
            "reach": lead(x) / slope.clamp_min(torch.finfo(slope.dtype).tiny),
            "rise": loss(x_adv) - loss(x),
            "predicted": predicted,
        }


class Routing(AttackMeasure):
    """Type accuracy on clean and on attacked images, and the movement of the signals.

    ``type_clean`` and ``type_adv``: 1 where the type is predicted correctly. ``omega_shift``: mean
    over all dynamic filters of the absolute change of an image's signal under the attack.
    """

    def __call__(self, model: Any, batch: Batch, random: ExampleRandom) -> Columns:
        """The three numbers of each image."""
        net, x_adv = require_network(model, AWNet), self.attacked(model, batch, random)
        with torch.no_grad():
            clean, adv = net.outputs(batch["x"]), net.outputs(x_adv)
        columns = {
            "type_clean": (classify(clean.p) == CLEAN).float(),
            "type_adv": (classify(adv.p) == ADVERSARIAL).float(),
        }
        if clean.signals:
            moved = torch.cat(adv.signals, dim=1) - torch.cat(clean.signals, dim=1)
            columns["omega_shift"] = moved.abs().mean(dim=1)
        return columns


class KnobAccuracy(AttackMeasure):
    """Accuracy of an OATNet at every lambda, of which OAT may report its best.

    ``knob_<lambda>_clean`` and ``knob_<lambda>_pgd``, with the attack run at that lambda.
    """

    def __call__(self, model: Any, batch: Batch, random: ExampleRandom) -> Columns:
        """Both for each lambda, 0 or 1 for each image."""
        net = require_network(model, OATNet)
        columns = {}
        for lam in LAMBDAS:
            x_adv = self.attack(at_lambda(lam, model, batch), batch["x"], random)
            for kind, x in (("clean", batch["x"]), ("pgd", x_adv)):
                with torch.no_grad():
                    is_right = classify(net.at(x, lam)) == batch["y"]
                columns[f"knob_{lam:g}_{kind}"] = is_right.float()
        return columns


# ------------------------------------------------------------------------------------- filters


class Filters(NamedTuple):
    """The weights of one convolution.

    Attributes:
        raw: W, ``(O, I, k, k)``.
        folded: W_o times gamma_o / sqrt(v_o + eps) of the batch-norm that reads its output, or
            ``None`` where none does directly.
    """

    raw: Tensor
    folded: Tensor | None


# -------------------------------------------------------------------------- filters of a network


def filters(
    net: nn.Module,
    image: Tensor,
    kind: str = "clean",
    scales: Mapping[str, Tensor] | None = None,
) -> dict[str, Filters]:
    """All convolutions of a network by name, without those of the side network.

    A forward pass finds which batch-norm reads which convolution.

    Args:
        net: In evaluation mode.
        image: One image, ``(C, H, W)``.
        kind: The folded one of two batch-norms: ``clean`` or ``adv``.
        scales: By name, a scale for every filter ``(O,)`` that multiplies the weights first, for
            instance mean signals.
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
            outputs.append((name, out))  # kept alive, so that the identity stays unique

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


# ---------------------------------------------------------------------- filters of two networks


def histograms(first: Tensor, second: Tensor, bins: int = BINS) -> tuple[Tensor, Tensor, float]:
    """Relative frequencies of two sets of weights over common equal bins on [-b, b].

    b is the larger of the two 99.9 % quantiles of the absolute values; values beyond b count in the
    outermost bins. Zero is the centre of the middle bin: at an edge, rounding would decide whether
    pruned weights and tiny ones of either sign share a bin.

    Args:
        first: Weights of any shape.
        second: Others.
        bins: Number of bins, odd.

    Returns:
        Both histograms, ``(bins,)``, each with sum 1, and b.

    Raises:
        ValueError: If ``bins`` is even.
    """
    if bins % 2 == 0:
        raise ValueError(f"bins must be odd, so that zero is the centre of one, got {bins}")
    values = [w.detach().flatten().double() for w in (first, second)]
    bound = max(float(np.quantile(w.abs().cpu().numpy(), 0.999)) for w in values) or 1.0
    half, width = bins // 2, 2 * bound / bins
    at = [((w / width).round().clamp(-half, half) + half).long() for w in values]
    one, other = (torch.bincount(i, minlength=bins).double() / len(i) for i in at)
    return one, other, bound


def js_divergence(p: Tensor, q: Tensor) -> float:
    """Jensen-Shannon divergence of two histograms in nats, between 0 and log 2."""
    a, b = p.numpy(), q.numpy()
    middle = (a + b) / 2
    return float((rel_entr(a, middle) + rel_entr(b, middle)).sum() / 2)


def wasserstein(first: Tensor, second: Tensor) -> float:
    """1-Wasserstein distance of two sets of numbers."""
    return float(wasserstein_distance(_flat(first), _flat(second)))


def _flat(weights: Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    return weights.detach().flatten().double().cpu().numpy()


class Shape(NamedTuple):
    """Numbers about one set of weights.

    Attributes:
        mean_abs: Mean of the absolute value.
        std: Standard deviation of the population.
        kurtosis: Excess kurtosis, 0 for a normal distribution.
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
    per_filter = weights.flatten(1).double()
    return Shape(
        float(w.abs().mean()),
        float(w.std(correction=0)),
        float(kurtosis(_flat(weights))),
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
