"""What is measured on trained networks beside their accuracies: routing, signals, smoothness.

Tags as in :mod:`paper_awnet.method`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from common.attacks.losses import classify, cross_entropy, margin
from common.attacks.pgd import FGSM, PGD, input_gradient
from common.attacks.randomness import ExampleRandom, Stream
from common.evaluation.measures import Measure
from common.evaluation.steps import Columns
from common.objectives import Batch, InnerLoss
from paper_awnet.method import ADVERSARIAL, CLEAN
from paper_awnet.networks import AWNet
from paper_awnet.objectives import forced

# ---------------------------------------------------------------------------------- the router


def attacked(model: Any, loss: InnerLoss, attack: PGD, batch: Batch, seed: int) -> Tensor:
    """Adversarial images of one loss, in evaluation mode."""
    random = ExampleRandom(seed, 0, batch["index"], Stream.EVALUATION)
    return attack(loss(model, batch), batch["x"], random)


def auroc(negative: Tensor, positive: Tensor) -> float:
    """Probability that a positive scores higher than a negative, ties counting half."""
    both = torch.cat([negative, positive]).double()
    smaller = (both[:, None] > negative.double()).sum(dim=1).double()
    equal = (both[:, None] == negative.double()).sum(dim=1).double()
    return float((smaller + equal / 2)[len(negative) :].mean() / len(negative))


@torch.no_grad()
def routing(net: AWNet, images: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """How the router takes clean images and each kind of adversarial ones.

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
            found[name]["auroc"] = auroc(clean, p)
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
    """By block: mean signal of every filter for each type, their spread, and the shift between.

    ``mean_clean``, ``mean_adv`` ``(S_j,)``; ``std`` over the images of both types and ``shift``,
    both means over filters.
    """
    both = [net.outputs(x).signals for x in (clean, adversarial)]
    return [
        {
            "mean_clean": one.mean(dim=0),
            "mean_adv": other.mean(dim=0),
            "std": float(torch.cat([one, other]).std(dim=0, correction=0).mean()),
            "shift": float((other.mean(dim=0) - one.mean(dim=0)).abs().mean()),
        }
        for one, other in zip(*both, strict=True)
    ]


# ----------------------------------------------------------------------- gradient regularisation


def smoothness(model: Any, x: Tensor, y: Tensor, eps: float) -> dict[str, Tensor]:
    r"""First order against a real step [D], per image.

    The size of the loss's gradient says little between models, since robust ones are less certain.
    ``reach`` is the margin over the l1 norm of its gradient, to first order the linf distance to
    the decision boundary. ``rise`` is :math:`CE(x + \delta_{FGSM}) - CE(x)` and ``predicted`` its
    first order, :math:`\epsilon \|\nabla CE\|_1`.
    """

    def loss(images: Tensor) -> Tensor:
        return cross_entropy(model(images), y)

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


class Routing(Measure):
    """Type accuracy on clean and on attacked images, and the movement of the signals.

    ``type_clean`` and ``type_adv``: 1 where the type is found. ``omega_shift``: mean over all
    dynamic filters of the distance between an image's signal before and after the attack.

    Args:
        attack: Makes x' from cross-entropy.
    """

    def __init__(self, attack: PGD) -> None:
        self.attack = attack

    def __call__(self, model: Any, batch: Batch, random: ExampleRandom) -> Columns:
        """The three numbers of each image."""
        x, y, net = batch["x"], batch["y"], model.net
        x_adv = self.attack(lambda images: cross_entropy(model(images), y), x, random)
        with torch.no_grad():
            clean, adv = net.outputs(x), net.outputs(x_adv)
        columns = {
            "type_clean": (classify(clean.p) == CLEAN).float(),
            "type_adv": (classify(adv.p) == ADVERSARIAL).float(),
        }
        if clean.signals:
            moved = torch.cat(adv.signals, dim=1) - torch.cat(clean.signals, dim=1)
            columns["omega_shift"] = moved.abs().mean(dim=1)
        return columns
