"""Objectives of adversarial training: what the adversary maximises and the optimiser minimises.

A batch is a dict of tensors: ``x`` images in [0, 1] ``(N, C, H, W)``, ``y`` labels ``(N,)``,
``index`` positions in the data set ``(N,)``; the adversarial-training callback adds ``x_adv``
beside ``x``. A loss is a mean over examples; see :func:`weighted` for where processes have
different numbers of them.

Clean and adversarial logits take two passes, the clean one first: in train mode batch-norm sees the
two kinds of images apart and updates twice. A network whose parts ask for both kinds of images gets
them in one pass.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from common.attacks.losses import cross_entropy, full_precision, kl_divergence
from common.errors import ConfigurationError, check_choice
from common.networks.parts import Need, Part, parts_of, telling

Batch = dict[str, Tensor]
Model = Callable[[Tensor], Tensor]
"""Images ``(N, C, H, W)`` to logits ``(N, K)``; while training, the LightningModule itself."""

InnerLoss = Callable[[Any, Batch], Callable[[Tensor], Tensor]]
"""What :meth:`Objective.inner` is: (model, batch) -> (x' -> per-example loss).

One whose pass has the model's own logits may have a method ``with_logits`` too, (model, batch) ->
(x' -> logits and loss): attacks that need both then make one pass.
"""
LogitsAndLoss = Callable[[Tensor], tuple[Tensor, Tensor]]


class Objective:
    """Base class of objectives; everything but ``outer`` has a default.

    ``model`` maps images to logits; a paper whose loss needs more than logits may ask more of it.
    """

    needs_x_adv = True
    """Whether ``outer`` reads ``batch["x_adv"]``."""

    serves: ClassVar[frozenset[Need]] = frozenset()
    """Which needs of a network's parts it serves."""

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

    def check_network(self, net: Any) -> None:
        """Refuse a network with parts that this objective cannot train.

        Raises:
            ConfigurationError: Naming the part and what it needs.
        """
        for part in parts_of(net):
            for need in sorted(part.needs - self.serves):
                raise ConfigurationError(
                    f"the objective {type(self).__name__} does not train {type(part).__name__}, "
                    f"which needs {need}; choose an objective that gives it: another one of "
                    "common.objectives, or the method's own"
                )

    def advance(self, is_step_over: bool = True) -> None:
        """Tell the objective that the loss of a batch was computed in training.

        ``is_step_over`` says whether the optimiser takes its step after this batch; not where
        gradients are accumulated and more batches follow.
        """


class LogitObjective(Objective):
    r"""An objective that is a function of logits, and trains any network.

    A network may offer more than its logits f: further logits p, each with a weight (the probes of
    CIFS), and losses of its own (that of AW-Net's router). The optimiser minimises

    .. math:: L(f) + \sum_p w_p L(p) + L_{own}

    and the adversary maximises the same sum without the last term. Parts learn the labels and the
    types of the images.
    """

    serves = frozenset({"further logits", "both kinds of images"})

    images: ClassVar[tuple[str, ...]] = ("x", "x_adv")
    """The images that :meth:`loss` reads logits of."""

    def loss(self, y: Tensor, *logits: Tensor) -> Tensor:
        """The scalar to minimise, from labels and one ``(N, K)`` for each of ``images``."""
        raise NotImplementedError(f"{type(self).__name__} has no loss(y, logits)")

    def inner(self, model: Any, batch: Batch) -> Callable[[Tensor], Tensor]:
        """Cross-entropy with the label, of all logits by their weights."""
        if not (parts := parts_of(model)):
            return super().inner(model, batch)
        y = differentiable(batch["y"])
        return lambda x: combined(lambda z: cross_entropy(z, y), [answer(model, parts, x, y)])

    def outer(self, model: Any, batch: Batch) -> Tensor:
        """The sum above."""
        parts = parts_of(model)
        is_paired = any("both kinds of images" in part.needs for part in parts)
        images = ("x", "x_adv") if is_paired else self.images
        y, found = batch["y"], answers(model, parts, batch, images, together=is_paired)
        groups = [found] if len(found) == len(self.images) else [[one] for one in found]
        losses = [combined(lambda *z: self.loss(y, *z), group) for group in groups]
        loss = losses[0] if len(losses) == 1 else torch.stack(losses).mean()
        self.report = {name: value for one in found for name, value in one.report.items()}
        own = [value for one in found for value in one.own]
        return loss + torch.cat(own).sum() / (len(y) * len(found)) if own else loss


class Natural(LogitObjective):
    """Training on clean images (empirical risk minimisation)."""

    needs_x_adv = False
    serves = frozenset({"further logits"})
    images = ("x",)

    def loss(self, y: Tensor, *logits: Tensor) -> Tensor:
        """Mean cross-entropy of the clean images."""
        return cross_entropy(logits[0], y).mean()


class AT(LogitObjective):
    """Adversarial training (Madry et al. 2018, Eq. (2.1)).

    Where a part needs both kinds of images (AW-Net), the loss is the mean of that of clean and of
    adversarial images.
    """

    images = ("x_adv",)

    def loss(self, y: Tensor, *logits: Tensor) -> Tensor:
        """Mean cross-entropy of the adversarial images."""
        return cross_entropy(logits[0], y).mean()


class TRADES(LogitObjective):
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
        y, parts = differentiable(batch["y"]), parts_of(model)
        with torch.inference_mode(False), torch.no_grad():
            clean = answer(model, parts, batch["x"], y, len(y))
        return lambda x: combined(kl_divergence, [clean, answer(model, parts, x, y)])

    def loss(self, y: Tensor, *logits: Tensor) -> Tensor:
        """CE(f(x), y) + beta KL(f(x) || f(x_adv)), batch mean; gradients reach both predictions."""
        clean, adversarial = logits
        divergence = kl_divergence(clean, adversarial).mean()
        return cross_entropy(clean, y).mean() + self.beta * divergence


MARTVariant = Literal["authors", "released"]


class MART(LogitObjective):
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

    def loss(self, y: Tensor, *logits: Tensor) -> Tensor:
        """Boosted cross-entropy plus beta times the divergence weighted by 1 - p_y; batch mean."""
        clean, logits_adv = logits
        true = y.unsqueeze(1)
        # Half precision would round 1.0001 to 1 and 1e-12 to 0.
        log_p = full_precision(clean).log_softmax(dim=1)
        p, q = log_p.exp(), full_precision(logits_adv).softmax(dim=1)
        q_wrong = q.scatter(1, true, -1.0).amax(dim=1)  # the most probable class that is not y
        boosted = cross_entropy(logits_adv, y)
        if self.variant == "authors":
            boosted = boosted - torch.log(1.0001 - q_wrong + 1e-12)
            divergence = (p * (log_p - torch.log(q + 1e-12))).sum(dim=1)
        else:
            boosted = boosted - (1.0001 - q_wrong)
            divergence = kl_divergence(logits_adv, clean)
        unsure = 1.0000001 - p.gather(1, true).squeeze(1)
        return boosted.mean() + self.beta * (divergence * unsure).mean()


class ALP(LogitObjective):
    """Adversarial logit pairing on clean and adversarial images (Kannan et al. 2018).

    Args:
        weight: Of the squared distance between paired logits, averaged over batch and classes
            (lambda in the paper), at least 0.
    """

    def __init__(self, weight: float = 0.5) -> None:
        self.weight = check_weight("weight", weight)

    def loss(self, y: Tensor, *logits: Tensor) -> Tensor:
        """CE(f(x), y) + CE(f(x_adv), y) + weight * mean (f(x) - f(x_adv))^2, batch mean."""
        clean, adversarial = logits
        both = cross_entropy(clean, y).mean() + cross_entropy(adversarial, y).mean()
        distance = (full_precision(clean) - full_precision(adversarial)).square().mean()
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
        both = self.with_logits(model, batch)
        return lambda x: both(x)[1]

    def with_logits(self, model: Any, batch: Batch) -> LogitsAndLoss:
        """X' -> the logits ``(N, K)`` and the loss, in one pass."""
        y = differentiable(batch["y"])

        def both(x: Tensor) -> tuple[Tensor, Tensor]:
            logits = model(x)
            return logits, self.loss(logits, y)

        return both


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


@dataclass(frozen=True)
class Answer:
    """What a network says of images: logits ``(N, K)``, and what its parts offer."""

    logits: Tensor
    further: Sequence[tuple[float, Tensor]] = ()
    own: Sequence[Tensor] = ()
    report: Mapping[str, Tensor] = field(default_factory=dict)

    def cut(self, rows: slice) -> "Answer":
        """The answer for some of the images."""
        further = [(weight, logits[rows]) for weight, logits in self.further]
        own = [value[rows] for value in self.own]
        return Answer(self.logits[rows], further, own, self.report)


def combined(loss: Callable[..., Tensor], found: Sequence[Answer]) -> Tensor:
    """A function of the logits of each answer, plus that of further logits by their weights."""
    total = loss(*(one.logits for one in found))
    for same in zip(*(one.further for one in found), strict=True):
        total = total + same[0][0] * loss(*(logits for _, logits in same))
    return total


def answer(
    model: Model,
    parts: Sequence[Part],
    x: Tensor,
    y: Tensor,
    clean: int = 0,
) -> Answer:
    """What a network with these parts says of images ``(N, C, H, W)`` with labels ``(N,)``.

    The first ``clean`` of the images are clean, the others adversarial.
    """
    if not parts:
        return Answer(model(x))
    with telling(parts, y, clean) as told:
        logits = model(x)
    return Answer(logits, told.logits, list(told.losses.values()), told.report)


def answers(
    model: Model, parts: Sequence[Part], batch: Batch, images: Sequence[str], together: bool
) -> list[Answer]:
    """What a network says of each kind of images, in one pass, or in one for each kind in turn.

    In one pass, clean images come first.
    """
    y = batch["y"]
    given = [adversarial_images(batch) if name == "x_adv" else batch[name] for name in images]
    clean = [len(y) * (name == "x") for name in images]
    if not together:
        return [answer(model, parts, x, y, n) for x, n in zip(given, clean, strict=True)]
    whole = answer(model, parts, torch.cat(given), y.repeat(len(given)), sum(clean))
    rows = range(0, len(y) * len(given), len(y))
    return [whole.cut(slice(first, first + len(y))) for first in rows]


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
