"""Objectives of adversarial training: what the adversary maximises and the optimiser minimises.

A batch is a dict of tensors: ``x`` images in [0, 1] ``(N, C, H, W)``, ``y`` labels ``(N,)``,
``index`` positions in the data set ``(N,)``; the adversarial-training callback adds ``x_adv``
beside ``x``. A loss is a mean over examples; see :func:`weighted` for where processes have
different numbers of them.

Clean and adversarial logits take two passes, the clean one first: in train mode batch-norm sees the
two kinds of images apart and updates twice.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from common.attacks.losses import cross_entropy, full_precision, kl_divergence
from common.errors import ConfigurationError, check_choice

Batch = dict[str, Tensor]
Model = Callable[[Tensor], Tensor]
"""Images ``(N, C, H, W)`` to logits ``(N, K)``; while training, the LightningModule itself."""

InnerLoss = Callable[[Any, Batch], Callable[[Tensor], Tensor]]
"""What :meth:`Objective.inner` is: (model, batch) -> (x' -> per-example loss)."""


class Objective:
    """Base class of objectives; everything but ``outer`` has a default.

    ``model`` maps images to logits; a paper whose loss needs more than logits may ask more of it.
    """

    needs_x_adv = True
    """Whether ``outer`` reads ``batch["x_adv"]``."""

    report: Mapping[str, Tensor] = {}
    """Parts of the last ``outer``, by name: scalars that are logged beside the loss."""

    def inner(self, model: Any, batch: Batch) -> Callable[[Tensor], Tensor]:
        """What the adversary maximises: x' ``(N, C, H, W)`` -> per-example loss ``(N,)``.

        By default the cross-entropy with the label.
        """
        return OnLogits(cross_entropy)(model, batch)

    def outer(self, model: Any, batch: Batch) -> Tensor:
        """What the optimiser minimises: a scalar."""
        raise NotImplementedError(f"{type(self).__name__} has no outer(model, batch)")

    def weight_loss(self, model: Any, batch: Batch) -> Tensor:
        """What adversarial weight perturbation climbs: a scalar, by default ``outer``."""
        return self.outer(model, batch)

    def set_epoch(self, epoch: int) -> None:
        """Tell the objective which epoch (from 0) begins."""

    def advance(self, is_step_over: bool = True) -> None:
        """Tell the objective that the loss of a batch was computed in training.

        ``is_step_over`` says whether the optimiser takes its step after this batch; not where
        gradients are accumulated and more batches follow.
        """


class Natural(Objective):
    """Training on clean images (empirical risk minimisation)."""

    needs_x_adv = False

    def outer(self, model: Model, batch: Batch) -> Tensor:
        """Mean cross-entropy of the clean images."""
        return cross_entropy(model(batch["x"]), batch["y"]).mean()


class AT(Objective):
    """Adversarial training (Madry et al. 2018, Eq. (2.1))."""

    def outer(self, model: Model, batch: Batch) -> Tensor:
        """Mean cross-entropy of the adversarial images; clean ones are not seen."""
        return cross_entropy(model(adversarial_images(batch)), batch["y"]).mean()


class TRADES(Objective):
    """Robustness traded against clean accuracy (Zhang et al. 2019, Eq. (5)).

    The official code runs the clean images twice per step, once for each term; here one pass serves
    both, so batch-norm statistics are updated twice per step instead of three times.

    Args:
        beta: Weight of the divergence (1/lambda in the paper, 6 in its experiments), at least 0.
    """

    def __init__(self, beta: float = 6.0) -> None:
        self.beta = check_weight("beta", beta)

    def inner(self, model: Model, batch: Batch) -> Callable[[Tensor], Tensor]:
        """KL(f(x) || f(x')), the clean prediction held constant and computed once."""
        with torch.inference_mode(False), torch.no_grad():
            logits = model(batch["x"])
        return lambda x: kl_divergence(logits, model(x))

    def outer(self, model: Model, batch: Batch) -> Tensor:
        """CE(f(x), y) + beta KL(f(x) || f(x_adv)), batch mean; gradients reach both predictions."""
        logits, logits_adv = clean_and_adversarial_logits(model, batch)
        divergence = kl_divergence(logits, logits_adv).mean()
        return cross_entropy(logits, batch["y"]).mean() + self.beta * divergence


MARTVariant = Literal["authors", "released"]


class MART(Objective):
    """Misclassification-aware adversarial training (Wang et al. 2020), as in its official code.

    The constants that keep the logarithms finite are that code's, and reproduce its gradients; they
    can make the loss of a perfect prediction slightly negative.

    The variant ``released`` reproduces other public code (MTandHJ/rcm): the boosting term has no
    logarithm, and the divergence is the other way round, KL(f(x_adv) || f(x)).

    Args:
        beta: Weight of the divergence (lambda in the paper, where it is 5; the official code's
            default is 6), at least 0.
        variant: ``authors`` for the official code, or ``released``.
    """

    def __init__(self, beta: float = 5.0, variant: MARTVariant = "authors") -> None:
        self.beta = check_weight("beta", beta)
        check_choice("variant", variant, MARTVariant)
        self.variant: MARTVariant = variant

    def outer(self, model: Model, batch: Batch) -> Tensor:
        """Boosted cross-entropy plus beta times the divergence weighted by 1 - p_y; batch mean."""
        logits, logits_adv = clean_and_adversarial_logits(model, batch)
        true = batch["y"].unsqueeze(1)
        # Half precision would round 1.0001 to 1 and 1e-12 to 0.
        log_p = full_precision(logits).log_softmax(dim=1)
        p, q = log_p.exp(), full_precision(logits_adv).softmax(dim=1)
        q_wrong = q.scatter(1, true, -1.0).amax(dim=1)  # the most probable class that is not y
        boosted = cross_entropy(logits_adv, batch["y"])
        if self.variant == "authors":
            boosted = boosted - torch.log(1.0001 - q_wrong + 1e-12)
            divergence = (p * (log_p - torch.log(q + 1e-12))).sum(dim=1)
        else:
            boosted = boosted - (1.0001 - q_wrong)
            divergence = kl_divergence(logits_adv, logits)
        unsure = 1.0000001 - p.gather(1, true).squeeze(1)
        return boosted.mean() + self.beta * (divergence * unsure).mean()


class ALP(Objective):
    """Adversarial logit pairing on clean and adversarial images (Kannan et al. 2018).

    Args:
        weight: Of the squared distance between paired logits, averaged over batch and classes
            (lambda in the paper), at least 0.
    """

    def __init__(self, weight: float = 0.5) -> None:
        self.weight = check_weight("weight", weight)

    def outer(self, model: Model, batch: Batch) -> Tensor:
        """CE(f(x), y) + CE(f(x_adv), y) + weight * mean (f(x) - f(x_adv))^2, batch mean."""
        logits, logits_adv = clean_and_adversarial_logits(model, batch)
        y = batch["y"]
        both = cross_entropy(logits, y).mean() + cross_entropy(logits_adv, y).mean()
        distance = (full_precision(logits) - full_precision(logits_adv)).square().mean()
        return both + self.weight * distance


@dataclass(frozen=True)
class OnLogits:
    """The inner loss that is a function of a model's logits and the labels.

    Args:
        loss: Logits ``(N, K)`` and labels ``(N,)`` to numbers ``(N,)``.
    """

    loss: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, model: Any, batch: Batch) -> Callable[[Tensor], Tensor]:
        """X' ``(N, C, H, W)`` -> the loss of each example, ``(N,)``."""
        y = differentiable(batch["y"])
        return lambda x: self.loss(model(x), y)


def differentiable(tensor: Tensor) -> Tensor:
    """The same values as a tensor that autograd may save, which one of inference mode is not."""
    with torch.inference_mode(False):
        return tensor.clone() if tensor.is_inference() else tensor


def adversarial_images(batch: Batch) -> Tensor:
    """``batch["x_adv"]``, ``(N, C, H, W)``; a ConfigurationError if it is missing."""
    if "x_adv" not in batch:
        raise ConfigurationError(
            'the batch has no "x_adv": no attack ran before this step. The AdversarialTraining '
            "callback writes it; set adversary.attack (for instance common.attacks.pgd.PGD), or "
            "train on clean images with common.objectives.Natural"
        )
    return batch["x_adv"]


def clean_and_adversarial_logits(model: Model, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits of both kinds of images, ``(N, K)`` each, the clean pass first."""
    x_adv = adversarial_images(batch)  # a missing one is found before any pass
    return model(batch["x"]), model(x_adv)


def weighted(loss: Tensor, batch: Batch, key: str = "weight") -> Tensor:
    """A mean over examples times ``batch[key]``, ``(N,)`` of equal numbers, if it is there.

    ``weight``, where the processes have different numbers of examples, is this process's number
    over the mean of all processes' numbers: the mean over processes is then over examples.
    ``window``, where the batches of an accumulated step differ in size or number, is the batch's
    share of the step's examples times the number of batches that Lightning divides by: the step is
    then the mean over its examples.
    """
    if key not in batch:
        return loss
    return loss * batch[key][0].to(loss)


def check_weight(name: str, value: float) -> float:
    """The weight of a loss term; a ConfigurationError unless it is finite and at least 0."""
    if not (math.isfinite(value) and value >= 0.0):
        raise ConfigurationError(
            f"{name} weighs a term of the loss and must be finite and at least 0, got {value}; "
            "0 switches the term off"
        )
    return float(value)
