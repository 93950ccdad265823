"""The classifier: loads teachers before training and defines the adaptive attacks."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.attacks.losses import cross_entropy
from common.classifier import RobustClassifier
from common.objectives import Batch, InnerLoss, differentiable
from paper_awnet.method import ADVERSARIAL, CLEAN
from paper_awnet.networks import AWNet, OATNet, forced, require_network
from paper_awnet.objectives import LAMBDAS, PairedObjective, at_lambda

WEIGHTS = (0.1, 1, 10)
"""Of the type loss in the joint attacks."""


class AWNetClassifier(RobustClassifier):
    """A classifier whose network may be an AW-Net and whose objective may have teachers."""

    def setup(self, stage: str) -> None:
        """Also read the teachers, if there are any, before training."""
        super().setup(stage)
        data = getattr(self.trainer, "datamodule", None)
        if stage == "fit" and isinstance(self.objective, PairedObjective) and data is not None:
            for teacher in self.objective.teachers.values():
                teacher.load(Path(self.trainer.default_root_dir), data.shape, data.num_classes)

    def adaptive_losses(self) -> dict[str, InnerLoss]:
        """The common losses and, for an AW-Net, those that know the router [D].

        ``ce_routerdetached``: the router follows the image and takes no part in the gradient (A1).
        ``ce_routerfrozen``: signals and P_type stay those of the clean image (A2).
        ``joint_clean_<w>``, ``joint_adv_<w>``: cross-entropy minus w times that of the type head
        with a type: misclassified while looking clean or adversarial (A3).
        ``ce_branchclean``, ``ce_branchadv``: the network with P_type forced (A4).
        ``misroute``: away from the type of a clean image alone (A5).

        For OAT, ``ce_knob_<lambda>``: the network at another lambda. Success is always judged on
        the deployed network.
        """
        losses = super().adaptive_losses()
        if isinstance(self.net, AWNet):
            losses |= {"ce_routerdetached": router_detached, "ce_routerfrozen": router_frozen}
            for name, kind in (("clean", CLEAN), ("adv", ADVERSARIAL)):
                for weight in WEIGHTS:
                    losses[f"joint_{name}_{weight}"] = joint(kind, weight)
                losses[f"ce_branch{name}"] = forced_branch(kind)
            losses["misroute"] = misroute
        if isinstance(self.net, OATNet):
            losses |= {f"ce_knob_{lam:g}": partial(at_lambda, lam) for lam in LAMBDAS}
        return losses

    def log_histograms(self, add: Callable[[str, Tensor], None], batch: Batch) -> None:
        """Hand P_type and the signals on clean and adversarial images to TensorBoard."""
        if not isinstance(self.net, AWNet):
            return
        for kind in ("x", "x_adv"):
            if kind in batch:
                outputs = self.net.outputs(batch[kind])
                add(f"p_adv/{kind}", outputs.p[:, ADVERSARIAL])
                for j, omega in enumerate(outputs.signals, 1):
                    add(f"omega{j}/{kind}", omega)


def aware(loss: Callable[[AWNet, Tensor, Tensor], Tensor]) -> InnerLoss:
    """The inner loss that is a function of an AW-Net, the attacked images and their labels."""

    def inner(model: Any, batch: Batch) -> Callable[[Tensor], Tensor]:
        net, y = require_network(model, AWNet), differentiable(batch["y"])
        return lambda x: loss(net, x, y)

    return inner


def router_frozen(model: Any, batch: Batch) -> Callable[[Tensor], Tensor]:
    """X' -> cross-entropy with signals and P_type of the clean image (A2)."""
    net, y = require_network(model, AWNet), differentiable(batch["y"])
    with torch.inference_mode(False):
        routing = _routing(net, differentiable(batch["x"]))
    return lambda x: cross_entropy(net.outputs(x, **routing).logits, y)


@aware
def router_detached(net: AWNet, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy; signals and P_type of x' are constants to the gradient (A1)."""
    return cross_entropy(net.outputs(x, **_routing(net, x)).logits, y)


@aware
def misroute(net: AWNet, x: Tensor, y: Tensor) -> Tensor:
    """CE(u(x'), clean), which has nothing to do with the class (A5)."""
    return cross_entropy(net.router.read(x)[1], torch.full_like(y, CLEAN))


def joint(kind: int, weight: float) -> InnerLoss:
    """CE(f(x'), y) - weight CE(u(x'), kind): wrong, and of that type (A3)."""

    def loss(net: AWNet, x: Tensor, y: Tensor) -> Tensor:
        outputs = net.outputs(x)
        looks = cross_entropy(outputs.type_logits, torch.full_like(y, kind))
        return cross_entropy(outputs.logits, y) - weight * looks

    return aware(loss)


def forced_branch(kind: int) -> InnerLoss:
    """Cross-entropy of the network with P_type forced to one type (A4)."""
    return aware(lambda net, x, y: cross_entropy(forced(net, kind)(x), y))


@torch.no_grad()
def _routing(net: AWNet, x: Tensor) -> dict[str, Any]:
    """Signals and mixture of images, as arguments of :meth:`AWNet.outputs`, constant."""
    z, type_logits = net.router.read(x)
    p = type_logits.softmax(dim=1)
    return {"p": net.mixture(p), "signals": net.router.signals(z, p)}
