"""Numbers taken of trained networks: routing, signals, smoothness, and distributions of filters.

The paper compares a standard and a robust network of one architecture [A]; the quantities are ours
[D]. A filter in front of a batch-norm has a free scale, which is removed by folding the batch-norm
into it, so conclusions are drawn from folded weights. Tags as in :mod:`paper_awnet.method`.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from scipy.special import rel_entr
from scipy.stats import kurtosis, wasserstein_distance
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from common.attacks.losses import classify, label_loss, margin
from common.attacks.pgd import FGSM, PGD, input_gradient
from common.attacks.randomness import ExampleRandom, Stream
from common.evaluation.measures import AttackMeasure
from common.networks.parts import ADVERSARIAL, CLEAN
from common.objectives import Batch
from common.results.lines import Columns
from paper_awnet.method import DynamicConv2d, MixBatchNorm2d, gain_of, signal_statistics
from paper_awnet.networks import LAMBDAS, AWNet, OATNet, at_lambda, forced, require_network

JOINT = ("joint_clean_0.1", "joint_clean_1", "joint_clean_10")
"""Attacks on class and type at once, in which the router is to be misled."""


@torch.no_grad()
def routing(net: AWNet, images: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """P_type of ``clean`` images and of each kind of adversarial ones, by name.

    ``p_adv`` ``(N,)``; ``type_acc`` against the true type; ``auroc`` against the clean ones.
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
    ways: dict[str, Callable[[Tensor], Tensor]]
    ways = {"soft": net, "clean": forced(net, CLEAN), "adv": forced(net, ADVERSARIAL)}
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


def smoothness(model: Any, x: Tensor, y: Tensor, eps: float) -> dict[str, Tensor]:
    r"""First-order predictions against an actual step [D], per image ``(N,)``.

    ``reach`` is the margin over the l1 norm of its gradient, to first order the linf distance to
    the decision boundary, which unlike a gradient of the loss can be compared between models.
    ``rise`` is :math:`CE(x + \delta_{FGSM}) - CE(x)` and ``predicted`` its first order,
    :math:`\epsilon \|\nabla CE\|_1`.
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


class Filters(NamedTuple):
    """The weights of one convolution, ``(O, I, k, k)``.

    ``folded`` is W_o times gamma_o / sqrt(v_o + eps) of the batch-norm that reads its output, or
    ``None`` where none does directly.
    """

    raw: Tensor
    folded: Tensor | None


def filters(
    net: nn.Module, image: Tensor, kind: str = "clean", signals: Sequence[Tensor] = ()
) -> dict[str, Filters]:
    """All convolutions of a network by name, without those of the side network.

    Args:
        net: In evaluation mode.
        image: One image, ``(C, H, W)``, whose forward pass finds the batch-norms.
        kind: The folded one of two batch-norms: ``clean`` or ``adv``.
        signals: An AW-Net's omega_j ``(N, S_j)``, whose means over images scale the filters first.
    """
    scales = net.by_convolution(signals) if isinstance(net, AWNet) and signals else []
    norms = readers(net, image)
    found = {}
    for name, conv in (net.arch if isinstance(net, AWNet) else net).named_modules():
        if not isinstance(conv, nn.Conv2d):
            continue
        raw = conv.weight.detach().clone()
        if scales and isinstance(conv, DynamicConv2d):
            raw = raw * scales[conv.position].mean(dim=0)[:, None, None, None]
        norm = norms.get(conv)
        if isinstance(norm, MixBatchNorm2d):
            norm = norm.get_submodule(kind)
        folded = None
        if isinstance(norm, nn.BatchNorm2d):
            folded = raw * gain_of(norm).detach()[:, None, None, None]
        found[name] = Filters(raw, folded)
    return found


@torch.no_grad()
def readers(net: nn.Module, image: Tensor) -> dict[nn.Module, nn.Module]:
    """By convolution, the batch-norm whose input is its output."""
    made: list[tuple[Tensor, nn.Module]] = []  # keeps outputs alive, so that identity is unique
    read: dict[nn.Module, nn.Module] = {}

    def after(module: nn.Module, _: Any, out: Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            made.append((out, module))

    def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if isinstance(module, MixBatchNorm2d | nn.BatchNorm2d):
            read.update({conv: module for out, conv in made if out is args[0]})

    with register_module_forward_hook(after), register_module_forward_pre_hook(before):
        net(image[None])
    return read


def histograms(first: Tensor, second: Tensor, bins: int = 101) -> tuple[Tensor, Tensor, float]:
    """Relative frequencies of two sets of weights over common equal bins on [-b, b].

    b is the larger of the two 99.9 % quantiles of the absolute values; values beyond b count in the
    outermost bins. The number of bins is odd, so that zero is the centre of the middle one: at an
    edge, rounding would decide whether pruned weights and tiny ones of either sign share a bin.

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


def distance(first: Tensor, second: Tensor) -> dict[str, float]:
    """``wasserstein`` distance, and ``js`` divergence of the histograms in nats, of two weights."""
    p, q, _ = histograms(first, second)
    middle = (p + q) / 2  # scipy's jensenshannon is NaN where rounding makes it negative
    a, b = (w.detach().flatten().double().cpu() for w in (first, second))
    return {
        "wasserstein": float(wasserstein_distance(a, b)),
        "js": float((rel_entr(p, middle) + rel_entr(q, middle)).sum()) / 2,
    }


def distances(
    first: Mapping[str, Filters], second: Mapping[str, Filters]
) -> dict[str, dict[str, float]]:
    """The distances of two networks' folded weights, by layer in front of a batch-norm."""
    pairs = {name: (one.folded, second[name].folded) for name, one in first.items()}
    return {
        name: distance(a, b) for name, (a, b) in pairs.items() if a is not None and b is not None
    }


def shape_of(weights: Tensor) -> dict[str, float]:
    """Numbers about the filters of one convolution, ``(O, I, k, k)``.

    ``kurtosis`` is the excess over a normal distribution, ``sparsity`` the share of weights below a
    hundredth of the largest; ``l1`` and ``l2`` are norms of a filter, means over filters.
    """
    per_filter = weights.detach().flatten(1).double()
    w = per_filter.flatten()
    return {
        "mean_abs": float(w.abs().mean()),
        "std": float(w.std(correction=0)),
        "kurtosis": float(kurtosis(w.cpu())),
        "sparsity": float((w.abs() < 0.01 * w.abs().max()).double().mean()),
        "l1": float(per_filter.abs().sum(dim=1).mean()),
        "l2": float(per_filter.norm(dim=1).mean()),
    }


def compare_weights(
    standard: Mapping[int, Mapping[str, Filters]],
    robust: Mapping[int, Mapping[str, Filters]],
    seeds: Sequence[int],
) -> dict[int, dict[str, Any]]:
    """C1 by seed: standard against robust, and standard against the next seed's standard [D]."""
    compared: dict[int, dict[str, Any]] = {}
    for seed, following in zip(seeds, [*seeds[1:], seeds[0]], strict=True):
        if seed not in standard or seed not in robust:
            continue
        one, other = standard[seed], robust[seed]
        between = distances(one, other)
        entry: dict[str, Any] = {"layers": len(between), "between": between}
        if len(seeds) > 1 and following in standard:
            entry["seeds"] = distances(one, standard[following])
            entry["further"] = sum(
                between[n]["wasserstein"] > entry["seeds"][n]["wasserstein"] for n in between
            )
        pairs = {n: (one[n], other[n]) for n in between}
        shapes = {n: [shape_of(cast(Tensor, f.folded)) for f in pair] for n, pair in pairs.items()}
        raw = [[shape_of(f.raw)["kurtosis"] for f in pair] for pair in pairs.values()]
        entry["smaller_l1"] = sum(b["l1"] < a["l1"] for a, b in shapes.values())
        entry["larger_kurtosis"] = sum(b > a for a, b in raw)
        compared[seed] = entry | {"shapes": shapes}
    return compared


def examine(
    model: Any, x: Tensor, y: Tensor, seed: int, eps: float
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Routing, forced accuracies, signals and effective weights of an AW-Net; signals by block."""
    net = require_network(model, AWNet)
    batch = {"x": x, "y": y, "index": torch.arange(len(y), device=y.device)}
    losses = model.adaptive_losses()

    def attack(name: str) -> Tensor:
        random = ExampleRandom(seed, 0, batch["index"], Stream.EVALUATION)
        return PGD(eps, eps / 10, 20)(losses[name](model, batch), x, random)

    images = {"clean": x, "pgd": attack("ce_f")}
    # Each of the two networks with a forced P_type is also attacked directly.
    branches = {f"pgd_{kind}": attack(f"ce_branch{kind}") for kind in ("clean", "adv")}
    found: dict[str, Any] = {
        "routing": routing(net, images | {name: attack(name) for name in JOINT}),
        "forced": forced_accuracies(net, images | branches, y),
    }
    blocks = signal_summary(net, x, images["pgd"])
    if blocks:
        found |= {f"omega_{k}": max(block[k] for block in blocks) for k in ("std", "shift")}
    with torch.no_grad():
        signals = [net.outputs(images[name]).signals for name in ("clean", "pgd")]
    kinds = zip(("clean", "adv"), signals, strict=True)
    one, other = (filters(net, x[0], kind, omega) for kind, omega in kinds)
    found["effective"] = {n: d["wasserstein"] for n, d in distances(one, other).items()}
    return found, blocks


def curves_of(run: Path) -> dict[str, list[tuple[int, float]]]:
    """What training logged, from TensorBoard's files; empty where there are none."""
    from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
        EventAccumulator,
    )

    if not run.is_dir():
        return {}
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("train/")]
    return {
        tag.removeprefix("train/"): [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags
    }
