"""What each channel does on natural and adversarial images, measured on a trained network.

Relevance has a row per class: class c's is W[c, :] at the penultimate feature. Tags as in
``method.py``.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.attacks.geometry import parse_radius
from common.attacks.losses import classify
from common.attacks.pgd import PGD
from common.modes import network_of
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

    def cosine(self) -> Tensor:
        """Cosine of a_nat and a_adv, ``(K,)``: 1 where the attack only rescales."""
        return F.cosine_similarity(self.natural, self.adversarial, dim=1)

    def over_activation(self) -> Tensor:
        r"""Excess on the negatively relevant channels, ``(K,)``.

        :math:`\sum_{i \in R} (a_{adv} - a_{nat})_i / \sum_i (a_{nat})_i`, with R the quarter of the
        channels that has the lowest relevance.
        """
        count = max(1, self.relevance.shape[1] // 4)
        lowest = self.relevance.argsort(dim=1, stable=True)[:, :count]
        excess = (self.adversarial - self.natural).gather(1, lowest).sum(1)
        return excess / self.natural.sum(1)

    def alignment(self) -> Tensor:
        """Pearson correlation of a_nat with the relevance, ``(K,)``."""
        return correlation(self.natural, self.relevance)

    def negative_share(self, activation: Tensor) -> Tensor:
        """Share of an activation ``(K, C)`` on channels of negative relevance, ``(K,)``."""
        return (activation * (self.relevance < 0)).sum(1) / activation.sum(1)

    def numbers(self) -> dict[str, Tensor]:
        """Everything above by name, each ``(K,)``."""
        return {
            "cosine": self.cosine(),
            "over_activation": self.over_activation(),
            "alignment": self.alignment(),
            "negative_share_natural": self.negative_share(self.natural),
            "negative_share_adversarial": self.negative_share(self.adversarial),
        }


# --------------------------------------------------------------------- from a network to them


@dataclass
class Recording:
    """What a network computes on the way to its logits.

    Attributes:
        logits: f, ``(N, K)``.
        features: Pooled features ``(N, C)``: ``penultimate``, and for the s-th CIFS module
            ``module<s>_unmasked`` and ``module<s>_masked``.
        relevance: For ``module<s>``, g of its own selection in eval mode, and for
            ``module<s>_by_class`` the relevance to the label's class, both ``(N, C)``.
    """

    logits: Tensor
    features: dict[str, Tensor]
    relevance: dict[str, Tensor]


def final_linear(model: nn.Module) -> nn.Linear:
    """The layer that turns the penultimate feature into the logits."""
    head = cast(nn.Module, network_of(model).head)
    return [module for module in head.modules() if isinstance(module, nn.Linear)][-1]


@contextmanager
def _hooked(hooks: Mapping[nn.Module, Callable[..., None]]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def record(model: nn.Module, x: Tensor, y: Tensor) -> Recording:
    """Runs a network in eval mode on images ``(N, C, H, W)`` and keeps what the figures need.

    Args:
        model: A network of this paper or a plain one, or a classifier that holds one as ``net``.
        x: Images in [0, 1].
        y: Labels, ``(N,)``; they decide which class's relevance is recorded, never a mask.
    """
    features: dict[str, Tensor] = {}
    relevance: dict[str, Tensor] = {}

    def keep_input(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        features["penultimate"] = inputs[0]

    def keep_masking(s: int) -> Callable[..., None]:
        def keep(module: CIFS, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
            z, (z_bar, p) = inputs[0], output
            features[f"module{s}_unmasked"] = global_average(z)
            features[f"module{s}_masked"] = global_average(z_bar)
            relevance[f"module{s}"] = module.relevance(z, p).sum(dim=1)  # g
            relevance[f"module{s}_by_class"] = module.probe.relevance(z, y[:, None])[:, 0]

        return keep

    hooks: dict[nn.Module, Callable[..., None]] = {final_linear(model): keep_input}
    modules = [module for module in model.modules() if isinstance(module, CIFS)]
    hooks |= {module: keep_masking(s) for s, module in enumerate(modules, start=1)}
    model.eval()
    with _hooked(hooks):
        logits, _ = joint_logits(model, x)
    return Recording(logits, features, relevance)


def _joined(parts: Sequence[Recording]) -> Recording:
    def join(pick: Callable[[Recording], dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.cat([pick(part)[name] for part in parts]) for name in pick(parts[0])}

    logits = torch.cat([part.logits for part in parts])
    return Recording(logits, join(lambda part: part.features), join(lambda part: part.relevance))


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
        return {
            "clean_acc_per_class": self.clean,
            "pgd20_acc_per_class": self.robust,
            # F2's link: are the classes whose channels are aligned the robust ones?
            "correlation_of_robustness_and_alignment": correlation(
                self.robust, self.channels["penultimate"].alignment()
            ),
            "features": {
                name: {
                    **{key: value.mean() for key, value in channels.numbers().items()},
                    "per_class": channels.numbers(),
                }
                for name, channels in self.channels.items()
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
    beta = 2 where the network has probes.

    Args:
        model: As in :func:`record`.
        x: Images in [0, 1], ``(N, C, H, W)``, on any device.
        y: Labels, ``(N,)``, with every class among them.
        num_classes: Number of classes K.
        eps: Radius, pixels in [0, 1].
        batch_size: Images at a time.
    """
    radius = parse_radius(eps)
    attack = PGD(eps=radius, step_size=radius / 10, steps=20, start="zero")
    device = next(model.parameters()).device
    model.eval()
    natural, adversarial = [], []
    for start in range(0, len(x), batch_size):
        part_x, part_y = (part[start : start + batch_size].to(device) for part in (x, y))
        x_adv = attack(AdaptiveLoss(beta=BETA)(model, {"x": part_x, "y": part_y}), part_x)
        natural.append(record(model, part_x, part_y))
        adversarial.append(record(model, x_adv, part_y))
    nat, adv, y = _joined(natural), _joined(adversarial), y.to(device)

    def channels(feature: str, relevance: Tensor) -> Channels:
        a_nat, a_adv = (class_means(part.features[feature], y, num_classes) for part in (nat, adv))
        return Channels(a_nat.cpu(), a_adv.cpu(), relevance.detach().double().cpu())

    found = {"penultimate": channels("penultimate", final_linear(model).weight)}
    for name, values in nat.relevance.items():
        module, _, kind = name.partition("_")
        for side in ("unmasked", "masked"):
            key = f"{module}_{side}"
            found[f"{key}_{kind}" if kind else key] = channels(
                key, class_means(values, y, num_classes)
            )
    is_clean = classify(nat.logits) == y
    is_robust = is_clean & (classify(adv.logits) == y)
    clean, robust = (
        class_means(right[:, None], y, num_classes)[:, 0].cpu() for right in (is_clean, is_robust)
    )
    return Measurement(clean, robust, found)
