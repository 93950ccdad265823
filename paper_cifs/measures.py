"""What each channel does on natural and adversarial images, measured on a trained network.

Relevance has a row per class: class c's is W[c, :] at the penultimate feature. Tags as in
``method.py``.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.attacks.engine.network import AttackEngine
from common.attacks.geometry import parse_radius
from common.attacks.losses import classify
from common.attacks.pgd import PGD
from common.modes import frozen, network_of
from paper_cifs.method import CIFS, AdaptiveLoss, global_average, joint_logits

BETA = 2.0  # of the joint loss that PGD-20 climbs

# -------------------------------------------------------------------------- numbers per class


def class_means(feature: Tensor, y: Tensor, num_classes: int) -> Tensor:
    """Mean of ``feature`` ``(N, C)`` over the images of each class, ``(K, C)`` in float64.

    Raises:
        ValueError: If a class has no image.
    """
    counts = torch.bincount(y, minlength=num_classes)
    if (counts == 0).any():
        raise ValueError(
            f"no image of class {int(counts.argmin())} among {len(y)}; analyse them all"
        )
    sums = feature.new_zeros(num_classes, feature.shape[1], dtype=torch.float64)
    return sums.index_add(0, y, feature.double()) / counts[:, None]


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson correlation of each row of ``a`` with that of ``b``; NaN where one is constant."""
    a = a.double() - a.double().mean(dim=-1, keepdim=True)
    b = b.double() - b.double().mean(dim=-1, keepdim=True)
    return (a * b).sum(-1) / ((a * a).sum(-1) * (b * b).sum(-1)).sqrt()


@dataclass(frozen=True)
class Channels:
    """One feature, averaged over the images of each class, and the relevance of its channels.

    Attributes:
        natural: a_nat, ``(K, C)``, non-negative.
        adversarial: a_adv, the same for the attacked images.
        relevance: Row c is the relevance of the channels to class c, ``(K, C)``.
    """

    natural: Tensor
    adversarial: Tensor
    relevance: Tensor

    def alignment(self) -> Tensor:
        """Pearson correlation of a_nat with the relevance, ``(K,)``."""
        return correlation(self.natural, self.relevance)

    def numbers(self) -> dict[str, Tensor]:
        r"""Numbers of each class by name, ``(K,)`` each.

        ``cosine`` of a_nat and a_adv; :meth:`alignment`; ``negative_share_*``, the share of an
        activation on channels of negative relevance; and ``over_activation``,
        :math:`\sum_{i \in R} (a_{adv} - a_{nat})_i / \sum_i (a_{nat})_i`, with R the quarter of the
        channels that has the lowest relevance.
        """
        nat, adv = self.natural, self.adversarial
        quarter = max(1, nat.shape[1] // 4)
        lowest = self.relevance.argsort(dim=1, stable=True)[:, :quarter]
        negative = self.relevance < 0
        return {
            "cosine": F.cosine_similarity(nat, adv, dim=1),
            "over_activation": (adv - nat).gather(1, lowest).sum(1) / nat.sum(1),
            "alignment": self.alignment(),
            "negative_share_natural": (nat * negative).sum(1) / nat.sum(1),
            "negative_share_adversarial": (adv * negative).sum(1) / adv.sum(1),
        }


# --------------------------------------------------------------------- from a network to them


def final_linear(model: nn.Module) -> nn.Linear:
    """The layer that turns the penultimate feature into the logits."""
    head = cast(nn.Module, network_of(model).head)
    return [module for module in head.modules() if isinstance(module, nn.Linear)][-1]


@torch.no_grad()
def record(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """What a network, or a classifier's, computes in eval mode on the way to its logits.

    Labels decide which class's relevance is recorded, never a mask.

    Returns:
        ``logits`` f, ``(N, K)``, and by channel ``(N, C)`` the pooled feature ``penultimate`` and,
        for the s-th CIFS module, the pooled features ``module<s>_unmasked`` and
        ``module<s>_masked``, ``module<s>_relevance`` (g of its own selection), and
        ``module<s>_by_class`` (the relevance to the label's class).
    """
    found: dict[str, Tensor] = {}

    def keep_input(_: nn.Module, inputs: tuple[Tensor, ...], __: Tensor) -> None:
        found["penultimate"] = inputs[0]

    def keep_masking(s: int) -> Callable[..., None]:
        def keep(module: CIFS, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
            z, (z_bar, p) = inputs[0], output
            found[f"module{s}_unmasked"] = global_average(z)
            found[f"module{s}_masked"] = global_average(z_bar)
            found[f"module{s}_relevance"] = module.relevance(z, p).sum(dim=1)
            found[f"module{s}_by_class"] = module.probe.relevance(z, y[:, None])[:, 0]

        return keep

    model.eval()
    with ExitStack() as hooks:
        hooks.enter_context(final_linear(model).register_forward_hook(keep_input))
        modules = [module for module in model.modules() if isinstance(module, CIFS)]
        for s, module in enumerate(modules, start=1):
            hooks.enter_context(module.register_forward_hook(keep_masking(s)))
        found["logits"] = joint_logits(model, x)[0]
    return found


@dataclass(frozen=True)
class Measurement:
    """One checkpoint.

    Attributes:
        clean: Accuracy on the natural images of each class, ``(K,)``.
        robust: The same under PGD-20; an image that was wrong before stays wrong.
        channels: By feature. The relevance is W of the final layer for ``penultimate``, the mean g
            of the class's natural images for ``module<s>_unmasked`` and ``_masked`` [C], and the
            probe's relevance to the class (W[c, :] if it is linear) for those two with
            ``_by_class`` appended.
    """

    clean: Tensor
    robust: Tensor
    channels: dict[str, Channels]

    def summary(self) -> dict[str, Any]:
        """The numbers, means over classes first; accuracies in [0, 1]."""
        numbers = {name: channels.numbers() for name, channels in self.channels.items()}
        return {
            "clean_acc_per_class": self.clean,
            "pgd20_acc_per_class": self.robust,
            # F2's link: are the classes whose channels are aligned the robust ones?
            "correlation_of_robustness_and_alignment": correlation(
                self.robust, numbers["penultimate"]["alignment"]
            ),
            "features": {
                name: {**{key: value.mean() for key, value in one.items()}, "per_class": one}
                for name, one in numbers.items()
            },
        }


def measure(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    num_classes: int,
    eps: float | str,
    batch_size: int = 350,
) -> Measurement:
    """Attacks a network with PGD-20 and compares its channels on natural and adversarial images.

    PGD-20 takes steps of eps / 10 from the image itself and climbs cross-entropy, joint with
    beta = 2 where the network has probes. Images in [0, 1] ``(N, C, H, W)`` and labels ``(N,)`` may
    be on any device, and every class must be among them.
    """
    radius = parse_radius(eps)
    attack = PGD(eps=radius, step_size=radius / 10, steps=20, start="zero")
    device = next(model.parameters()).device
    y = y.to(device)
    model.eval()
    engine = AttackEngine()
    natural, adversarial = [], []
    for part_x, part_y in zip(*(torch.split(part, batch_size) for part in (x, y)), strict=True):
        part_x = part_x.to(device)
        with frozen(model), engine.applied(model, part_x):
            x_adv = attack(AdaptiveLoss(beta=BETA)(model, {"x": part_x, "y": part_y}), part_x)
        natural.append(record(model, part_x, part_y))
        adversarial.append(record(model, x_adv, part_y))
    nat, adv = (
        {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        for parts in (natural, adversarial)
    )

    def channels(feature: str, relevance: Tensor) -> Channels:
        a_nat, a_adv = (class_means(side[feature], y, num_classes).cpu() for side in (nat, adv))
        return Channels(a_nat, a_adv, relevance.detach().double().cpu())

    found = {"penultimate": channels("penultimate", final_linear(model).weight)}
    for kind, suffix in (("relevance", ""), ("by_class", "_by_class")):
        for name in [name for name in nat if name.endswith(f"_{kind}")]:
            module, relevance = name.partition("_")[0], class_means(nat[name], y, num_classes)
            for key in (f"{module}_unmasked", f"{module}_masked"):
                found[key + suffix] = channels(key, relevance)
    is_clean = classify(nat["logits"]) == y
    is_robust = is_clean & (classify(adv["logits"]) == y)
    clean, robust = (
        class_means(right[:, None], y, num_classes)[:, 0].cpu() for right in (is_clean, is_robust)
    )
    return Measurement(clean, robust, found)
