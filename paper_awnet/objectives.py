"""What AW-Net and its static counterparts minimise: distillation from two teachers, and the rest.

All of these see clean and adversarial images. An :class:`~paper_awnet.networks.AWNet` has them in
one concatenated pass [D] and learns their types too; a static network has two passes, the
adversarial one first [M], and no types. Tags as in :mod:`paper_awnet.method`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from common.attacks.losses import classify, cross_entropy, full_precision, kl_divergence
from common.errors import ConfigurationError, check_choice
from common.modes import network_of
from common.objectives import (
    Batch,
    Objective,
    adversarial_images,
    check_weight,
    differentiable,
)
from paper_awnet.losses import (
    Scale,
    balanced,
    distillation,
    mean_over_ranks,
    negative_entropy,
    signal_statistics,
    type_loss,
)
from paper_awnet.method import ADVERSARIAL, Outputs
from paper_awnet.networks import AWNet
from paper_awnet.teachers import Teacher

Branch = Literal["soft", "adv"]


# -------------------------------------------------------------------------------- shared by all


class PairedObjective(Objective, nn.Module, ABC):
    """A classification loss on clean and adversarial images, plus lambda_type L_type.

    A module, so that what it remembers from step to step is saved with the network.

    Args:
        lambda_type: Weight of the type loss [D]; without effect on static networks.
        concat: Whether both kinds of images share one pass [D]; with two passes the router's own
            batch-norms see each kind apart, which they do not in evaluation.
        branch: What the training attack sees: the deployed ``soft`` mixture [D], or every image
            through the ``adv`` batch-norms.

    Raises:
        ConfigurationError: If the weight is negative or the branch unknown.
    """

    def __init__(
        self, lambda_type: float = 1.0, concat: bool = True, branch: Branch = "soft"
    ) -> None:
        super().__init__()
        self.lambda_type = check_weight("lambda_type", lambda_type)
        self.concat = concat
        check_choice("branch", branch, Branch)
        self.branch: Branch = branch
        self.report: dict[str, Tensor] = {}

    @property
    def teachers(self) -> Mapping[str, Teacher]:
        """By name; none by default."""
        return {}

    def attacked(self, model: Any) -> Callable[[Tensor], Tensor]:
        """The function that the training attack sees: images to logits."""
        net = dynamic_network(model)
        if self.branch == "soft" or net is None:
            deployed: Callable[[Tensor], Tensor] = model
            return deployed
        return forced(net, ADVERSARIAL)

    def inner(self, model: Any, batch: Batch) -> Callable[[Tensor], Tensor]:
        """Cross-entropy with the label."""
        return super().inner(self.attacked(model), batch)

    def outer(self, model: Any, batch: Batch) -> Tensor:
        """The classification loss and the weighted type loss; a scalar."""
        x_adv = adversarial_images(batch)
        net = dynamic_network(model)
        if net is None:
            logits_adv: Tensor = model(x_adv)
            logits: Tensor = model(batch["x"])
            penalty = logits.new_zeros(())
            self.report = {}
        else:
            logits, logits_adv, penalty = self._routed(net, batch["x"], x_adv)
        return self.classification(batch, logits, logits_adv) + self.lambda_type * penalty

    @abstractmethod
    def classification(self, batch: Batch, logits: Tensor, logits_adv: Tensor) -> Tensor:
        """The loss of the logits on clean and adversarial images; a scalar."""

    def _routed(self, net: AWNet, x: Tensor, x_adv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of both kinds and the type loss, in one pass or two."""
        types = torch.arange(2, device=x.device).repeat_interleave(len(x))
        if self.concat:
            both = net.outputs(torch.cat([x, x_adv]), types)
        else:
            adv = net.outputs(x_adv, types[len(x) :])
            clean = net.outputs(x, types[: len(x)])
            both = joined(clean, adv)
        penalty = type_loss(both.type_logits, types)
        is_right = classify(both.type_logits.detach()) == types
        self.report = {"loss_type": penalty.detach(), "type_acc": is_right.float().mean()}
        self.report |= signal_statistics(both.signals, types)
        logits, logits_adv = torch.split(both.logits, len(x))
        return logits, logits_adv, penalty


def joined(first: Outputs, second: Outputs) -> Outputs:
    """Outputs of two batches as those of one."""
    signals = [torch.cat(pair) for pair in zip(first.signals, second.signals, strict=True)]
    logits, type_logits, p = map(torch.cat, zip(first[:3], second[:3], strict=True))
    return Outputs(logits, type_logits, p, signals)


def dynamic_network(model: Any) -> AWNet | None:
    """The AW-Net that a classifier holds as ``net`` or that the model is; ``None`` otherwise."""
    net = network_of(model)
    return net if isinstance(net, AWNet) else None


def forced(net: AWNet, kind: int) -> Callable[[Tensor], Tensor]:
    """Images to logits, every image treated as one of the given type."""

    def logits(x: Tensor) -> Tensor:
        p = torch.eye(2, device=x.device)[kind]
        return net.outputs(x, p=p).logits

    return logits


# ---------------------------------------------------------------------------------- objectives


class MTARD(PairedObjective):
    r"""Two teachers, one for each kind of image, weighted by how far each has come [M].

    .. math:: w_{nat} L_{nat} + w_{adv} L_{adv} + \lambda_{type} L_{type}

    with :math:`L_{nat} = KL(T_{nat}(x), f(x))` and :math:`L_{adv} = KL(T_{adv}(x'), f(x'))`.

    The weights move before the backward pass, by the losses of the batch over all processes, and
    once per optimiser step: :meth:`advance` ends it. Where gradients are accumulated, each batch is
    weighted by the losses so far, and the step ends with the mean over its examples.

    Args:
        clean: T_nat, which sees the clean images.
        robust: T_adv, which sees the adversarial ones.
        scale: See :func:`distillation`.
        eta_w: Rate of the weights.
        beta: Exponent of the relative losses.
        milestones: Epochs, from 0, from which the rates are a tenth of what they were, each time;
            those of the learning rate.
        lambda_type: See :class:`PairedObjective`, and so are the following.
        concat: One pass or two.
        branch: What the training attack sees.

    Raises:
        ConfigurationError: If a setting is out of range.
    """

    w_nat: Tensor
    initial: Tensor
    has_begun: Tensor

    def __init__(
        self,
        clean: Teacher,
        robust: Teacher,
        scale: Scale = "classmean",
        eta_w: float = 0.025,
        beta: float = 1.0,
        milestones: Sequence[int] = (),
        lambda_type: float = 1.0,
        concat: bool = True,
        branch: Branch = "soft",
    ) -> None:
        super().__init__(lambda_type, concat, branch)
        if not 0.0 <= eta_w <= 1.0:
            raise ConfigurationError(f"eta_w is a rate in [0, 1], got {eta_w}; 0 keeps 0.5 each")
        if not (math.isfinite(beta) and beta > 0):
            raise ConfigurationError(f"beta is an exponent above 0, got {beta}; the code has 1")
        if list(milestones) != sorted({m for m in milestones if m >= 0}):
            raise ConfigurationError(
                f"milestones are epochs from 0 in increasing order, got {list(milestones)}; give "
                "those of the learning rate"
            )
        self.clean, self.robust = clean, robust
        check_choice("scale", scale, Scale)
        self.scale: Scale = scale
        self.eta_w, self.beta = eta_w, beta
        self.milestones = tuple(milestones)
        self.decay = 1.0
        self._before: _Seen | None = None  # of the batches of this step that are done
        self._with_this: _Seen | None = None  # and of the one under way
        self.register_buffer("w_nat", torch.tensor(0.5))
        self.register_buffer("initial", torch.zeros(2))
        self.register_buffer("has_begun", torch.tensor(False))

    @property
    def teachers(self) -> Mapping[str, Teacher]:
        """Both."""
        return {"clean": self.clean, "robust": self.robust}

    def set_epoch(self, epoch: int) -> None:
        """The factor of the rates follows from the epoch alone, so a resumed run goes on."""
        self.decay = 0.1 ** sum(milestone <= epoch for milestone in self.milestones)

    def classification(self, batch: Batch, logits: Tensor, logits_adv: Tensor) -> Tensor:
        """w_nat L_nat + w_adv L_adv, with the weights of this step as plain numbers."""
        soft = self.targets(self.clean(batch["x"]), self.robust(adversarial_images(batch)))
        loss_nat = distillation(soft[0], logits, self.scale)
        loss_adv = distillation(soft[1], logits_adv, self.scale)
        w_nat = self.w_nat
        if self.training:
            losses = torch.stack([loss_nat.detach(), loss_adv.detach()])
            self._with_this = self._observed(self._statistics(losses, *soft), len(logits))
            w_nat = self._moved(self._with_this)[0]
        self.report |= {
            "loss_nat": loss_nat.detach(),
            "loss_adv": loss_adv.detach(),
            "w_nat": w_nat.clone(),
        }
        return w_nat * loss_nat + (1 - w_nat) * loss_adv

    @torch.no_grad()
    def advance(self, is_step_over: bool = True) -> None:
        """Keep what the batch showed; where the step is over, the weights move for good."""
        if self._with_this is None:
            return
        self._before, self._with_this = self._with_this, None
        if is_step_over:
            self._remember(self._before)
            self._before = None

    def targets(self, clean: Tensor, robust: Tensor) -> tuple[Tensor, Tensor]:
        """The teachers' logits as they are distilled."""
        return clean, robust

    @staticmethod
    def _statistics(losses: Tensor, clean: Tensor, robust: Tensor) -> Tensor:
        """What is to be known of a batch: L_nat, L_adv."""
        return losses

    @torch.no_grad()
    def _observed(self, statistics: Tensor, count: int) -> "_Seen":
        """Those of this step's batches so far, of all processes."""
        this = _Seen(*mean_over_ranks(statistics, count))
        return this if self._before is None else self._before.joined(this)

    @torch.no_grad()
    def _moved(self, seen: "_Seen") -> tuple[Tensor, Tensor]:
        """w_nat after a step with these losses, and those of the first step."""
        losses = seen.mean[:2].to(self.initial)
        initial = torch.where(self.has_begun, self.initial, losses)
        return balanced(self.w_nat, losses, initial, self.eta_w * self.decay, self.beta), initial

    def _remember(self, seen: "_Seen") -> None:
        self.w_nat, self.initial = self._moved(seen)
        self.has_begun = torch.ones_like(self.has_begun)


class _Seen(NamedTuple):
    """Statistics of the batches of one optimiser step: means over so many examples."""

    mean: Tensor
    examples: Tensor | int

    def joined(self, other: "_Seen") -> "_Seen":
        examples = self.examples + other.examples
        total = self.mean * self.examples + other.mean * other.examples
        return _Seen(total / examples, examples)


class BMTARD(MTARD):
    """MTARD with teachers' temperatures that make both equally certain [M].

    Each teacher's logits are divided by a temperature in [1, 10]; after each step (:meth:`advance`)
    the more certain teacher's grows by ``rate`` and the other's falls. The code compares the
    quotient of the two entropies with 1; here their difference is compared with 0, which is the
    same as long as both are positive and does not turn around where a teacher is so certain that
    the constant in the logarithm makes its entropy negative.

    Args:
        clean: T_nat.
        robust: T_adv.
        rate: Step of the temperatures; decays with the milestones.
        scale: See :class:`MTARD`, and so are the following.
        eta_w: Rate of the weights.
        beta: Exponent of the relative losses.
        milestones: When the rates decay.
        lambda_type: Weight of the type loss.
        concat: One pass or two.
        branch: What the training attack sees.

    Raises:
        ConfigurationError: If a setting is out of range.
    """

    temperatures: Tensor  # (clean, robust)

    def __init__(
        self,
        clean: Teacher,
        robust: Teacher,
        rate: float = 0.001,
        scale: Scale = "classmean",
        eta_w: float = 0.025,
        beta: float = 1.0,
        milestones: Sequence[int] = (),
        lambda_type: float = 1.0,
        concat: bool = True,
        branch: Branch = "soft",
    ) -> None:
        super().__init__(clean, robust, scale, eta_w, beta, milestones, lambda_type, concat, branch)
        self.rate = check_weight("rate", rate)
        self.register_buffer("temperatures", torch.ones(2))

    def targets(self, clean: Tensor, robust: Tensor) -> tuple[Tensor, Tensor]:
        """The teachers' logits over their temperatures."""
        self.report["temperature_nat"] = self.temperatures[0].clone()
        self.report["temperature_adv"] = self.temperatures[1].clone()
        return clean / self.temperatures[0], robust / self.temperatures[1]

    @staticmethod
    @torch.no_grad()
    def _statistics(losses: Tensor, clean: Tensor, robust: Tensor) -> Tensor:
        """L_nat, L_adv, and h of both teachers."""
        h = [negative_entropy(full_precision(z).softmax(dim=1)) for z in (clean, robust)]
        return torch.cat([losses, torch.stack(h)])

    def _remember(self, seen: _Seen) -> None:
        super()._remember(seen)
        h = seen.mean[2:]
        sign = torch.sign(h - h.flip(0)).to(self.temperatures)
        self.temperatures = (self.temperatures + self.rate * self.decay * sign).clamp(1.0, 10.0)


class HybridCE(PairedObjective):
    """Half the cross-entropy of each kind of image."""

    def classification(self, batch: Batch, logits: Tensor, logits_adv: Tensor) -> Tensor:
        """(CE(f(x), y) + CE(f(x_adv), y)) / 2."""
        y = batch["y"]
        return (cross_entropy(logits, y).mean() + cross_entropy(logits_adv, y).mean()) / 2


class RoutedTRADES(PairedObjective):
    """TRADES (Zhang et al. 2019) with types; see :class:`common.objectives.TRADES`.

    Args:
        beta: Weight of the divergence.
        lambda_type: See :class:`PairedObjective`, and so are the following.
        concat: One pass or two.
        branch: What the training attack sees.
    """

    def __init__(
        self,
        beta: float = 6.0,
        lambda_type: float = 1.0,
        concat: bool = True,
        branch: Branch = "soft",
    ) -> None:
        super().__init__(lambda_type, concat, branch)
        self.beta = check_weight("beta", beta)

    def inner(self, model: Any, batch: Batch) -> Callable[[Tensor], Tensor]:
        """KL(f(x) || f(x')), the clean prediction of the deployed network held constant."""
        with torch.inference_mode(False), torch.no_grad():
            logits = model(batch["x"])
        attacked = self.attacked(model)
        return lambda x: kl_divergence(logits, attacked(x))

    def classification(self, batch: Batch, logits: Tensor, logits_adv: Tensor) -> Tensor:
        """CE(f(x), y) + beta KL(f(x) || f(x_adv)), batch mean."""
        divergence = kl_divergence(logits, logits_adv).mean()
        return cross_entropy(logits, batch["y"]).mean() + self.beta * divergence


class RSLAD(PairedObjective):
    """Robust soft label distillation (Zi et al. 2021): one robust teacher, asked on clean images.

    Args:
        robust: T_adv.
        scale: See :func:`distillation`.
        lambda_type: See :class:`PairedObjective`, and so are the following.
        concat: One pass or two.
        branch: What the training attack sees.
    """

    def __init__(
        self,
        robust: Teacher,
        scale: Scale = "classmean",
        lambda_type: float = 1.0,
        concat: bool = True,
        branch: Branch = "soft",
    ) -> None:
        super().__init__(lambda_type, concat, branch)
        self.robust = robust
        check_choice("scale", scale, Scale)
        self.scale: Scale = scale

    @property
    def teachers(self) -> Mapping[str, Teacher]:
        """One."""
        return {"robust": self.robust}

    def inner(self, model: Any, batch: Batch) -> Callable[[Tensor], Tensor]:
        """KL(T_adv(x) || f(x'))."""
        soft = differentiable(self.robust(batch["x"]))
        attacked = self.attacked(model)
        return lambda x: kl_divergence(soft, attacked(x))

    def classification(self, batch: Batch, logits: Tensor, logits_adv: Tensor) -> Tensor:
        """5/6 KL(T_adv(x), f(x_adv)) + 1/6 KL(T_adv(x), f(x))."""
        soft = self.robust(batch["x"])
        robust = distillation(soft, logits_adv, self.scale)
        return (5 * robust + distillation(soft, logits, self.scale)) / 6
