"""Attacks that look for the smallest perturbation that changes a prediction.

One run gives an upper bound on robust accuracy at every radius.
"""

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

from common.attacks.geometry import (
    Norm,
    as_pixels,
    check_count,
    check_number,
    finite,
    norm_of,
    parse_radius,
    per_example,
    projection,
)
from common.attacks.losses import Predict, classify, full_precision, margin
from common.attacks.settings import Budget, Settings
from common.errors import ConfigurationError, check_choice


class MinimumNorm(Settings, ABC):
    """An attack that looks for the nearest image of another class.

    Args:
        eps: The largest perturbation that an evaluation counts as a success, a number or a fraction
            such as ``8/255``; ``None`` for any. The search does not use it.
        norm: Of the perturbation.

    Raises:
        ConfigurationError: If a setting is out of range.
    """

    norm: Norm

    def __init__(self, eps: float | str | None, norm: Norm) -> None:
        check_choice("norm", norm, Literal["linf", "l2"])
        self.norm = norm
        self.eps = None if eps is None else parse_radius(eps, norm)

    @property
    @abstractmethod
    def budget(self) -> Budget:
        """Passes per image, at most."""

    def __call__(self, predict: Predict, x: Tensor, y: Tensor) -> Tensor:
        """The nearest adversarial image found, by the rules of :class:`~common.attacks.pgd.PGD`.

        That is x ``(N, ...)`` where none was found, or x is already not classified as y ``(N,)``.
        """
        with torch.inference_mode(False), torch.enable_grad():
            x = as_pixels(x)
            y = y.detach().clone()
            with torch.no_grad():
                logits = full_precision(predict(x))
            x_adv, found = self._search(predict, x, y, logits)
            return torch.where(per_example(found & (classify(logits) == y), x), x_adv, x)

    @abstractmethod
    def _search(
        self, predict: Predict, x: Tensor, y: Tensor, logits: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Images and whether each is adversarial, bool ``(N,)``; ``logits`` are those of x."""


class DeepFool(MinimumNorm):
    r"""Steps to the nearest boundary of the linearised classifier (Moosavi-Dezfooli et al. 2016).

    Algorithm 2: with :math:`f_k = z_k(x') - z_y(x')` and :math:`w_k` its gradient, the nearest
    boundary is the class with the least :math:`|f_k| / \|w_k\|_q`, and the step to it is that
    distance times :math:`w_k / \|w_k\|_2` (l2, q = 2) or :math:`\mathrm{sign}(w_k)` (linf, q = 1;
    Section 3.3). An example stops at its first misclassified point.

    As in foolbox 3, but not in the paper: 1e-4 is added to distances (also in the authors' code),
    the classes are those most likely at x, and each point is clamped to [0, 1].

    Args:
        eps: As in :class:`MinimumNorm`.
        norm: ``linf`` or ``l2``.
        steps: At most.
        overshoot: The summed steps are multiplied by one plus this (eta).
        candidates: Number of classes considered, including the predicted one.
        clip: Project the result to the eps-ball around x, as foolbox does; it may then be
            classified correctly again.
    """

    def __init__(
        self,
        eps: float | str | None = None,
        norm: Literal["linf", "l2"] = "linf",
        steps: int = 50,
        overshoot: float = 0.02,
        candidates: int = 10,
        clip: bool = False,
    ) -> None:
        super().__init__(eps, norm)
        self.steps = check_count("steps", steps, 1)
        self.overshoot = check_number("overshoot", overshoot)
        self.candidates = check_count("candidates", candidates, 2)
        self.clip = clip
        if clip and self.eps is None:
            raise ConfigurationError(
                "clip projects to the ball of radius eps, and eps is null; give eps or drop clip"
            )

    @property
    def budget(self) -> Budget:
        """Passes per image, at most."""
        return Budget(self.steps + 2, self.steps * (self.candidates - 1))

    def _search(
        self, predict: Predict, x: Tensor, y: Tensor, logits: Tensor
    ) -> tuple[Tensor, Tensor]:
        true = y.unsqueeze(1)
        others = logits.scatter(1, true, -math.inf)
        rivals = others.topk(min(self.candidates, logits.shape[1]) - 1, dim=1).indices
        x_adv, total = x, torch.zeros_like(x)
        for step in range(self.steps + 1):
            point = x_adv.detach().requires_grad_()
            z = _with_gradient(predict(point))
            done = classify(z) != y
            if step == self.steps or bool(done.all()):
                break
            gaps = z.gather(1, rivals) - z.gather(1, true)
            total = total + self._nearest(gaps, point)
            moved = (x + (1.0 + self.overshoot) * total).clamp(0.0, 1.0)
            x_adv = torch.where(per_example(done, x), x_adv, moved)
        if self.clip and self.eps is not None:
            x_adv = projection(x, self.eps, self.norm)(x_adv)
        return x_adv, done

    def _nearest(self, gaps: Tensor, point: Tensor) -> Tensor:
        """The step from ``point`` to the nearest linearised boundary, where a gap is zero."""
        least = torch.full_like(gaps[:, 0], math.inf)
        direction = torch.zeros_like(point)
        last = gaps.shape[1] - 1
        for k in range(last + 1):
            (slope,) = torch.autograd.grad(gaps[:, k].sum(), point, retain_graph=k < last)
            slope = finite(slope)
            # Constants as in foolbox; a class whose slope is zero is far away.
            dual = norm_of(slope, 1 if self.norm == "linf" else 2) + 1e-8
            distance = gaps[:, k].detach().abs() / dual.flatten()
            nearer = distance < least
            least = torch.where(nearer, distance, least)
            unit = slope.sign() if self.norm == "linf" else slope / dual
            direction = torch.where(per_example(nearer, point), unit, direction)
        return per_example(torch.where(least.isfinite(), least + 1e-4, 0.0), point) * direction


class CarliniWagner(MinimumNorm):
    r"""The l2 attack of Carlini & Wagner 2017 (Section VI-A, untargeted).

    Adam minimises over w, with :math:`x'(w) = (\tanh w + 1) / 2` always in the box,

    .. math:: \|x'(w) - x\|_2^2 + c\, \max(z_y(x') - \max_{j \ne y} z_j(x') + \kappa,\, 0),

    and a binary search finds each example's least c that succeeds: c grows tenfold until it does,
    then the interval is halved. The nearest adversarial point of all searches is returned. Descent
    follows the leading wrong class, so it can miss a nearer boundary of another one.

    Foolbox ends a batch when its total loss stalls; here each example stops by its own loss. For
    single examples the two agree, except that foolbox returns a black image where nothing was
    found.

    Args:
        eps: As in :class:`MinimumNorm`.
        confidence: By how much a wrong logit must lead (kappa).
        steps: Adam steps per search.
        step_size: Of Adam.
        binary_search_steps: Searches; from 10 on the last one repeats the least c that succeeded.
        initial_const: The first c.
        abort_early: End a search for an example whose loss fell by less than a ten-thousandth since
            the last of ten checks.
    """

    norm = "l2"

    def __init__(
        self,
        eps: float | str | None = None,
        confidence: float = 0.0,
        steps: int = 1000,
        step_size: float = 0.01,
        binary_search_steps: int = 9,
        initial_const: float = 1e-3,
        abort_early: bool = True,
    ) -> None:
        super().__init__(eps, "l2")
        self.confidence = check_number("confidence", confidence)
        self.steps = check_count("steps", steps, 1)
        self.step_size = check_number("step_size", step_size, is_positive=True)
        self.binary_search_steps = check_count("binary_search_steps", binary_search_steps, 1)
        self.initial_const = check_number("initial_const", initial_const, is_positive=True)
        self.abort_early = abort_early

    @property
    def budget(self) -> Budget:
        """Passes per image, at most."""
        return Budget(1).plus(Budget(self.steps, self.steps).times(self.binary_search_steps))

    def _search(
        self, predict: Predict, x: Tensor, y: Tensor, logits: Tensor
    ) -> tuple[Tensor, Tensor]:
        # atanh is infinite at 0 and 1. A distance of 0 marks examples that are not attacked.
        origin = ((2.0 * x - 1.0) * 0.999999).atanh()
        distance = torch.where(classify(logits) == y, math.inf, 0.0).to(x)
        best = x
        const = torch.full_like(distance, self.initial_const, dtype=torch.float64)
        lower, upper = torch.zeros_like(const), torch.full_like(const, math.inf)
        for search in range(self.binary_search_steps):
            if 9 <= search == self.binary_search_steps - 1:
                const = upper.clamp_max(1e10)
            found, best, distance = self._descend(predict, x, y, origin, const, best, distance)
            upper = torch.where(found, const, upper)
            lower = torch.where(found, lower, const)
            const = torch.where(upper.isinf(), const * 10.0, (lower + upper) / 2.0)
        return best, distance.isfinite()

    def _descend(
        self,
        predict: Predict,
        x: Tensor,
        y: Tensor,
        origin: Tensor,
        const: Tensor,
        best: Tensor,
        distance: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One search at ``const``: whether it found anything, and the best image and distance."""
        rounded = _to_box(origin)
        weight = const.to(x)
        # Adam (Kingma & Ba 2015, Algorithm 1) by hand: examples must not share optimiser state.
        w, first, second = origin, torch.zeros_like(x), torch.zeros_like(x)
        active = distance > 0.0
        found = torch.zeros_like(active)
        previous = torch.full_like(distance, math.inf)
        for step in range(self.steps):
            point = w.detach().requires_grad_()
            x_adv = _to_box(point)
            z = _with_gradient(predict(x_adv))
            size = (x_adv - rounded).square().flatten(1).sum(dim=1)
            loss = size + weight * (self.confidence - margin(z, y)).clamp_min(0.0)
            (gradient,) = torch.autograd.grad(loss.sum(), point)
            gradient = finite(gradient)
            first = 0.9 * first + 0.1 * gradient
            second = 0.999 * second + 0.001 * gradient.square()
            root = (second / (1.0 - 0.999 ** (step + 1))).sqrt()
            w = w - self.step_size * (first / (1.0 - 0.9 ** (step + 1))) / (root + 1e-8)
            with torch.no_grad():
                if self.abort_early and step % math.ceil(self.steps / 10) == 0:
                    active = active & (loss <= 0.9999 * previous)
                    previous = loss
                    if not bool(active.any()):
                        break
                lead = torch.full_like(z[:, :1], self.confidence)
                wrong = active & (classify(z.scatter_add(1, y.unsqueeze(1), lead)) != y)
                found = found | wrong
                reached = norm_of(x_adv - x, 2).flatten()
                nearer = wrong & (reached < distance)
                best = torch.where(per_example(nearer, x), x_adv, best)
                distance = torch.where(nearer, reached, distance)
        return found, best, distance


def _to_box(w: Tensor) -> Tensor:
    return w.tanh() * 0.5 + 0.5


def _with_gradient(logits: Tensor) -> Tensor:
    """The logits in full precision; an error if they cannot be differentiated."""
    if not logits.requires_grad:
        raise ValueError(
            "the logits carry no gradient to the images; compute them without no_grad, "
            "inference_mode or detach, from the images that are passed in"
        )
    return full_precision(logits)
