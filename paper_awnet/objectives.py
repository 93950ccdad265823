"""Training losses of AW-Net, of its static counterparts, and of OAT, in the order of the equations.

All of them see clean and adversarial images. An :class:`~paper_awnet.networks.AWNet` gets both in
one concatenated pass [D] and learns their types too; a static network has two passes, the
adversarial one first [M], and no types. Tags as in :mod:`paper_awnet.method`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.attacks.losses import cross_entropy, full_precision, kl_divergence
from common.attacks.randomness import ExampleRandom, Stream, run_seed
from common.errors import ConfigurationError, check_choice
from common.networks.parts import ADVERSARIAL, parts_like, parts_of
from common.objectives import (
    Batch,
    Model,
    Objective,
    adversarial_images,
    answers,
    check_weight,
    differentiable,
)
from paper_awnet.networks import (
    LAMBDAS,
    AWNet,
    OATNet,
    at_lambda,
    forced,
    require_network,
)
from paper_awnet.teachers import Teacher

Scale = Literal["classmean", "batchmean"]
Branch = Literal["soft", "adv"]


def distillation(teacher_logits: Tensor, logits: Tensor, scale: Scale = "classmean") -> Tensor:
    r"""KL(q, s), the mean of :math:`q_k \log(q_k + 10^{-5}) - q_k \log s_k` [M]; a scalar.

    Both logits are ``(N, K)``, those of the teacher constant. ``classmean`` is the code's form: the
    mean over classes as well as images, times K/10, so that its size does not depend on K.
    ``batchmean`` sums over classes, which is ten times as much, for short training [D].
    """
    check_choice("scale", scale, Scale)
    q = full_precision(teacher_logits).detach().softmax(dim=1)
    log_s = full_precision(logits).log_softmax(dim=1)
    terms = q * torch.log(q + 1e-5) - q * log_s
    if scale == "batchmean":
        return terms.sum(dim=1).mean()
    return terms.mean() * (logits.shape[1] / 10)


def balanced(w_nat: Tensor, losses: Tensor, initial: Tensor, eta: float, beta: float) -> Tensor:
    r"""The next weight of the clean loss [M].

    .. math:: r_i = (L_i / L_i(0))^\beta, \quad
              w_{nat} \leftarrow w_{nat} - \eta (w_{nat} - r_{nat} / (r_{nat} + r_{adv}))

    ``losses`` and ``initial`` are (L_nat, L_adv) of this step and of the first one.
    """
    tiny = torch.finfo(losses.dtype).tiny
    r = (losses.clamp_min(tiny) / initial.clamp_min(tiny)) ** beta
    return w_nat - eta * (w_nat - r[0] / r.sum())


def negative_entropy(probabilities: Tensor) -> Tensor:
    """h, the mean over images and classes of q log(q + 1e-5) [M]; nearer to 0 is more certain."""
    return (probabilities * torch.log(probabilities + 1e-5)).mean()


class PairedObjective(Objective, nn.Module, ABC):
    """A classification loss on both kinds of images, plus lambda_type L_type.

    A module, so that its buffers are saved with the network.

    Args:
        lambda_type: Weight of the type loss [D]; without effect on static networks.
        concat: Whether both kinds of images share one pass [D]; with two passes the router's
            batch-norms see each kind apart, which they do not in evaluation.
        branch: The function that the training attack sees: the deployed ``soft`` mixture [D], or
            every image through the ``adv`` batch-norms.
    """

    serves = frozenset({"both kinds of images"})

    def __init__(
        self, lambda_type: float = 1.0, concat: bool = True, branch: Branch = "soft"
    ) -> None:
        super().__init__()
        self.lambda_type = check_weight("lambda_type", lambda_type)
        self.concat = concat
        check_choice("branch", branch, Branch)
        self.branch: Branch = branch
        self.teachers: Mapping[str, Teacher] = {}
        self.report: dict[str, Tensor] = {}

    def attacked(self, model: Model) -> Model:
        """The function that the training attack sees."""
        is_forced = self.branch == "adv" and parts_like(model, AWNet)
        return forced(model, ADVERSARIAL) if is_forced else model

    def inner(self, model: Any, batch: Batch) -> Callable[[Tensor], Tensor]:
        """Cross-entropy with the label."""
        return super().inner(self.attacked(model), batch)

    def divergence_from(self, logits: Tensor, model: Model) -> Callable[[Tensor], Tensor]:
        """X' -> KL(p || f(x')), with p of constant logits ``(N, K)``."""
        attacked = self.attacked(model)
        return lambda x: kl_divergence(logits, attacked(x))

    def outer(self, model: Any, batch: Batch) -> Tensor:
        """The classification loss and the weighted type loss; a scalar."""
        x_adv = adversarial_images(batch)
        if parts_like(model, AWNet):
            logits, logits_adv, penalty = self._routed(model, batch)
            return self.classification(batch, logits, logits_adv) + self.lambda_type * penalty
        self.report = {}
        logits_adv = model(x_adv)
        return self.classification(batch, model(batch["x"]), logits_adv)

    @abstractmethod
    def classification(self, batch: Batch, logits: Tensor, logits_adv: Tensor) -> Tensor:
        """The loss of the logits on clean and adversarial images; a scalar."""

    def _routed(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of both kinds and the type loss, in one pass or two."""
        images = ("x", "x_adv") if self.concat else ("x_adv", "x")
        answered = answers(model, parts_of(model), batch, images, together=self.concat)
        found = dict(zip(images, answered, strict=True))
        penalty = torch.cat([own for one in answered for own in one.own]).mean()
        self.report = {"loss_type": penalty.detach(), **found["x"].report}
        return found["x"].logits, found["x_adv"].logits, penalty


class MTARD(PairedObjective):
    r"""Two teachers, one for each kind of image, weighted by the progress of their losses [M].

    .. math:: w_{nat} L_{nat} + w_{adv} L_{adv} + \lambda_{type} L_{type}

    with :math:`L_{nat} = KL(T_{nat}(x), f(x))` and :math:`L_{adv} = KL(T_{adv}(x'), f(x'))`.

    The weights are updated once per optimiser step, before the backward pass, by the losses over
    all processes; :meth:`advance` ends the step. Where gradients are accumulated, each batch is
    weighted by the losses so far.

    Args:
        clean: T_nat, which sees the clean images.
        robust: T_adv, which sees the adversarial ones.
        scale: See :func:`distillation`.
        eta_w: Rate of the weights.
        beta: Exponent of the relative losses.
        milestones: Epochs at which the rates are multiplied by 0.1; those of the learning rate.
        **kwargs: Of :class:`PairedObjective`.
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
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not 0.0 <= eta_w <= 1.0:
            raise ConfigurationError(f"eta_w is a rate in [0, 1], got {eta_w}; 0 keeps 0.5 each")
        if not (math.isfinite(beta) and beta > 0):
            raise ConfigurationError(f"beta is an exponent above 0, got {beta}; the code has 1")
        if list(milestones) != sorted({m for m in milestones if m >= 0}):
            raise ConfigurationError(
                f"milestones are epochs from 0 in increasing order, got {list(milestones)}; give "
                "those of the learning rate"
            )
        check_choice("scale", scale, Scale)
        self.scale: Scale = scale
        self.teachers = {"clean": clean, "robust": robust}
        self.eta_w, self.beta = eta_w, beta
        self.milestones = tuple(milestones)
        self.decay = 1.0
        self._before: Tensor | None = None  # what this optimiser step observed, without and
        self._with_this: Tensor | None = None  # with the current batch
        self.register_buffer("w_nat", torch.tensor(0.5))
        self.register_buffer("initial", torch.zeros(2))
        self.register_buffer("has_begun", torch.tensor(False))

    def set_epoch(self, epoch: int) -> None:
        """Set the factor of the rates."""
        self.decay = 0.1 ** sum(milestone <= epoch for milestone in self.milestones)

    def classification(self, batch: Batch, logits: Tensor, logits_adv: Tensor) -> Tensor:
        """w_nat L_nat + w_adv L_adv, with the weights of this step as plain numbers."""
        teachers, x_adv = self.teachers, adversarial_images(batch)
        soft = self.targets(teachers["clean"](batch["x"]), teachers["robust"](x_adv))
        loss_nat = distillation(soft[0], logits, self.scale)
        loss_adv = distillation(soft[1], logits_adv, self.scale)
        constants = {"loss_nat": loss_nat.detach(), "loss_adv": loss_adv.detach()}
        w_nat = self.w_nat
        if self.training:
            h = [negative_entropy(full_precision(z).softmax(dim=1)) for z in soft]
            self._with_this = self._observed(torch.stack([*constants.values(), *h]), len(logits))
            w_nat = self._moved(self._with_this)[0]
        self.report |= constants | {"w_nat": w_nat.clone()}
        return w_nat * loss_nat + (1 - w_nat) * loss_adv

    @torch.no_grad()
    def advance(self, is_step_over: bool = True) -> None:
        """Keep the statistics of the batch; at the end of a step, update the weights."""
        if self._with_this is None:
            return
        self._before, self._with_this = self._with_this, None
        if is_step_over:
            self.update(self._before)
            self._before = None

    def targets(self, clean: Tensor, robust: Tensor) -> tuple[Tensor, Tensor]:
        """The teachers' logits as they are distilled."""
        return clean, robust

    @torch.no_grad()
    def _observed(self, statistics: Tensor, count: int) -> Tensor:
        """Sums of means, and last the number of examples, of this step, over all processes."""
        total = count * F.pad(statistics.double(), (0, 1), value=1.0)  # float64: sums are exact
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(total)
        return total if self._before is None else self._before + total

    @torch.no_grad()
    def _moved(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """w_nat after a step with these losses, and the losses of the first step."""
        losses = (seen[:2] / seen[-1]).to(self.initial)
        initial = torch.where(self.has_begun, self.initial, losses)
        return balanced(self.w_nat, losses, initial, self.eta_w * self.decay, self.beta), initial

    def update(self, seen: Tensor) -> None:
        """Take over what a step observed: sums of L_nat, L_adv and h of both teachers, and N."""
        self.w_nat, self.initial = self._moved(seen)
        self.has_begun = torch.ones_like(self.has_begun)


class BMTARD(MTARD):
    """MTARD with temperatures that make both teachers equally certain [M].

    Each teacher's logits are divided by a temperature in [1, 10]; after each step (:meth:`advance`)
    that of the more certain teacher grows by ``rate``, which decays with the milestones, and the
    other falls. The code compares the quotient of the two entropies with 1. Here their difference
    is compared with 0: where a teacher is so certain that the constant in the logarithm makes its
    entropy negative, the quotient would give the wrong sign.
    """

    temperatures: Tensor  # (clean, robust)

    def __init__(self, clean: Teacher, robust: Teacher, rate: float = 0.001, **kwargs: Any) -> None:
        super().__init__(clean, robust, **kwargs)
        self.rate = check_weight("rate", rate)
        self.register_buffer("temperatures", torch.ones(2))

    def targets(self, clean: Tensor, robust: Tensor) -> tuple[Tensor, Tensor]:
        """The teachers' logits over their temperatures."""
        nat, adv = self.temperatures
        self.report |= {"temperature_nat": nat.clone(), "temperature_adv": adv.clone()}
        return clean / nat, robust / adv

    def update(self, seen: Tensor) -> None:
        """Also move the temperatures."""
        super().update(seen)
        h = seen[2:-1] / seen[-1]
        sign = torch.sign(h - h.flip(0)).to(self.temperatures)
        self.temperatures = (self.temperatures + self.rate * self.decay * sign).clamp(1.0, 10.0)


class HybridCE(PairedObjective):
    """Half the cross-entropy of each kind of image."""

    def classification(self, batch: Batch, logits: Tensor, logits_adv: Tensor) -> Tensor:
        """(CE(f(x), y) + CE(f(x_adv), y)) / 2."""
        y = batch["y"]
        return (cross_entropy(logits, y).mean() + cross_entropy(logits_adv, y).mean()) / 2


class RoutedTRADES(PairedObjective):
    """TRADES (Zhang et al. 2019) with types; see :class:`common.objectives.TRADES`."""

    def __init__(self, beta: float = 6.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.beta = check_weight("beta", beta)

    def inner(self, model: Any, batch: Batch) -> Callable[[Tensor], Tensor]:
        """KL(f(x) || f(x')), the clean prediction of the deployed network held constant."""
        with torch.inference_mode(False), torch.no_grad():
            logits = model(batch["x"])
        return self.divergence_from(logits, model)

    def classification(self, batch: Batch, logits: Tensor, logits_adv: Tensor) -> Tensor:
        """CE(f(x), y) + beta KL(f(x) || f(x_adv)), batch mean."""
        divergence = kl_divergence(logits, logits_adv).mean()
        return cross_entropy(logits, batch["y"]).mean() + self.beta * divergence


class RSLAD(PairedObjective):
    """Robust soft label distillation (Zi et al. 2021): one robust teacher, which sees clean images.

    For ``scale`` see :func:`distillation`.
    """

    def __init__(self, robust: Teacher, scale: Scale = "classmean", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_choice("scale", scale, Scale)
        self.scale: Scale = scale
        self.teachers = {"robust": robust}

    def inner(self, model: Any, batch: Batch) -> Callable[[Tensor], Tensor]:
        """KL(T_adv(x) || f(x'))."""
        return self.divergence_from(differentiable(self.teachers["robust"](batch["x"])), model)

    def classification(self, batch: Batch, logits: Tensor, logits_adv: Tensor) -> Tensor:
        """5/6 KL(T_adv(x), f(x_adv)) + 1/6 KL(T_adv(x), f(x))."""
        soft = self.teachers["robust"](batch["x"])
        robust = distillation(soft, logits_adv, self.scale)
        return (5 * robust + distillation(soft, logits, self.scale)) / 6


class ARD(PairedObjective):
    r"""Adversarially robust distillation (Goldblum et al. 2020): one robust teacher.

    The loss is :math:`t^2 KL(T_{adv}(x) / t, f(x_{adv}) / t)` with temperature t; the weight
    of the labels of clean images is 0. The attack climbs cross-entropy with the label. For
    ``scale`` see :func:`distillation`.
    """

    def __init__(
        self,
        robust: Teacher,
        temperature: float = 30.0,
        scale: Scale = "classmean",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not (math.isfinite(temperature) and temperature > 0):
            raise ConfigurationError(f"temperature must be above 0, got {temperature}; ARD has 30")
        check_choice("scale", scale, Scale)
        self.temperature = temperature
        self.scale: Scale = scale
        self.teachers = {"robust": robust}

    def classification(self, batch: Batch, logits: Tensor, logits_adv: Tensor) -> Tensor:
        """The divergence of the softened logits; the logits of clean images take no part."""
        t = self.temperature
        return t**2 * distillation(
            self.teachers["robust"](batch["x"]) / t, logits_adv / t, self.scale
        )


class OAT(Objective):
    """(1 - lambda) CE(f(x), y) + lambda CE(f(x_adv), y), lambda drawn for each image and epoch."""

    serves = frozenset({"a trade-off for each image"})

    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Draw new values of lambda for this epoch."""
        self.epoch = epoch

    def drawn(self, index: Tensor) -> Tensor:
        """Lambda of images by their positions ``(N,)``, the same in attack and loss."""
        random = ExampleRandom(run_seed(), self.epoch, index, Stream.CONDITION)
        which = random.integers(len(LAMBDAS), ())
        return torch.tensor(LAMBDAS, device=index.device)[which]

    def inner(self, model: Any, batch: Batch) -> Callable[[Tensor], Tensor]:
        """Cross-entropy at the drawn lambda."""
        return at_lambda(self.drawn(batch["index"]), model, batch)

    def outer(self, model: Any, batch: Batch) -> Tensor:
        """Both cross-entropies by lambda, from one pass; batch mean."""
        x_adv, x, y = adversarial_images(batch), batch["x"], batch["y"]
        lam = self.drawn(batch["index"])
        net = require_network(model, OATNet)
        both = net.at(torch.cat([x, x_adv]), torch.cat([lam, lam]), len(x))
        clean, adv = torch.split(both, len(x))
        loss: Tensor = ((1 - lam) * cross_entropy(clean, y) + lam * cross_entropy(adv, y)).mean()
        return loss
