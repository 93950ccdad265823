"""Projected gradient ascent on any per-example loss.

A loss maps images x' ``(N, ...)`` to numbers ``(N,)``. Named attacks are settings: PGD-20 is 20
steps of cross-entropy, CW-inf is the margin, an adaptive attack is the defence's own inner loss.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from common.attacks.geometry import (
    Norm,
    Random,
    as_pixels,
    check_count,
    check_number,
    finite,
    normal,
    normalised,
    parse_radius,
    parse_step,
    per_example,
    projection,
    steepest,
    uniform,
    uniform_in_ball,
)
from common.attacks.randomness import ExampleRandom
from common.attacks.settings import Budget, Settings
from common.errors import ConfigurationError, check_choice

Start = Literal["zero", "uniform", "gaussian"]
StepNoise = Literal["added", "scaled"]
LossFn = Callable[[Tensor], Tensor]
Verdict = Callable[[Tensor], Tensor]
"""x' -> whether each example is misclassified, bool ``(N,)``."""
Of = Callable[[Tensor], tuple[LossFn, Verdict | None]]
"""Rows of the batch, int64 ``(n,)`` -> their loss and, where it is known, their verdict."""


class PGD(Settings):
    r"""Projected gradient descent on the negative loss (Madry et al. 2018, Section 2.1).

    Each step moves to :math:`\Pi(x' + \alpha\, d)`, where d is the steepest direction of the norm
    (:func:`~common.attacks.geometry.steepest`). Gradient entries that are not finite count as 0.

    Args:
        eps: Radius of the ball, pixels in [0, 1]; a number or a fraction such as ``8/255``.
        step_size: Length of a step in the same norm, also as ``eps/4``; ``None`` takes ``2.5 * eps
            / steps`` (Madry et al. 2018), enough to reach the boundary from any start.
        steps: Number of steps; 0 returns the start.
        start: ``zero`` is x itself, ``uniform`` is uniform in the ball, ``gaussian`` is x plus
            ``start_scale`` times standard normal noise (TRADES, MART).
        norm: Of the ball and the step.
        momentum: Decay of the accumulated gradient, each summand divided by its l1 norm (MIM, Dong
            et al. 2018, Eq. (6)); ``None`` uses the gradient alone.
        restarts: Independent runs, of which each example keeps its best (see ``__call__``).
        start_scale: Standard deviation of the ``gaussian`` start.
        l1_density: Fraction of the coordinates an l1 step moves, at least one.
        project_start: Whether the start is projected before the first gradient; the official TRADES
            code projects only after the first step.

    Raises:
        ConfigurationError: If a setting is out of range or restarts would repeat each other.
    """

    lost: Tensor | None = None
    """Examples of the last call that had no direction at some step because gradient entries were
    not finite, bool ``(N,)`` on the device of x; ``None`` without a step."""
    unmoved: Tensor | None = None
    """Those whose gradient was zero at every step (a flat loss, or underflow)."""

    def __init__(
        self,
        eps: float | str,
        step_size: float | str | None = None,
        steps: int = 10,
        start: Start = "uniform",
        norm: Norm = "linf",
        momentum: float | None = None,
        restarts: int = 1,
        start_scale: float | str = 0.001,
        l1_density: float = 0.01,
        project_start: bool = True,
    ) -> None:
        check_choice("start", start, Start)
        self.norm: Norm = norm
        self.start: Start = start
        self.eps = parse_radius(eps, norm)
        self.steps = check_count("steps", steps, 0)
        self.restarts = check_count("restarts", restarts, 1)
        self.step_size = (
            2.5 * self.eps / max(self.steps, 1)
            if step_size is None
            else parse_step(step_size, self.eps, norm)
        )
        self.momentum = None if momentum is None else check_number("momentum", momentum)
        self.start_scale = parse_radius(start_scale, "l2", "start_scale")
        self.l1_density = check_number("l1_density", l1_density, 1.0, is_positive=True)
        self.project_start = project_start
        if self.restarts > 1 and self.start == "zero":
            raise ConfigurationError(
                f"{self.restarts} restarts from x would repeat each other; set start to uniform or "
                "gaussian, or restarts to 1"
            )

    def __call__(
        self,
        loss_fn: LossFn,
        x: Tensor,
        generator: Random = None,
        *,
        is_adversarial: Verdict | None = None,
    ) -> Tensor:
        """Climb the loss from a start in the ball around x.

        Leaves ``.grad`` of the parameters alone; works inside ``no_grad`` and inference mode.

        Args:
            loss_fn: x' ``(N, ...)`` -> loss ``(N,)``, differentiable in x'; an example's loss may
                depend on no other example.
            x: Images in [0, 1], ``(N, ...)``.
            generator: Of all noise.
            is_adversarial: With it, a restart that is adversarial is kept over one that is not.

        Returns:
            x' of the same shape, detached, in [0, 1] and in the ball around x up to rounding;
            float32, or float64 if x is. Of several restarts, the x' with the highest loss.

        Raises:
            ValueError: If ``loss_fn`` returns another shape or no gradient, or x is no float.
        """
        return self._ascent(lambda _: (loss_fn, is_adversarial), x, generator)

    @property
    def budget(self) -> Budget:
        """Passes per image; restarts are compared by loss and verdict."""
        compared = 2 if self.restarts > 1 else 0
        return Budget(self.steps + compared, self.steps).times(self.restarts)

    @property
    def reach(self) -> float:
        """The largest distance from its start that one run can move an image, in ``norm``."""
        return self.steps * self.step_size

    @property
    def idle(self) -> Tensor | None:
        """``lost`` or ``unmoved``, bool ``(N,)``; ``None`` without a step."""
        return None if self.lost is None or self.unmoved is None else self.lost | self.unmoved

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch (from 0), for attacks that change during training."""

    def _ascent(self, of: Of, x: Tensor, generator: Random, leaves: bool = False) -> Tensor:
        """The best end of all restarts; ``leaves``: examples found wrong take no further step."""
        with torch.inference_mode(False), torch.enable_grad():
            x = as_pixels(x)
            rows = torch.arange(len(x), device=x.device)
            none = torch.zeros_like(rows, dtype=torch.bool)
            self.lost, self.unmoved = (none, ~none) if self.steps > 0 else (None, None)
            for restart in range(self.restarts):
                ends, at = self._climb(of, x[rows], rows, generator, leaves)
                if self.restarts == 1:
                    return ends
                success, loss = _score(*of(rows), ends, at)
                if restart == 0:
                    x_adv, won, highest = ends, success, loss
                better = (success > won[rows]) | ((success == won[rows]) & (loss > highest[rows]))
                x_adv[rows] = torch.where(per_example(better, x), ends, x_adv[rows])
                won[rows] = torch.where(better, success, won[rows])
                highest[rows] = torch.where(better, loss, highest[rows])
                if leaves and isinstance(generator, ExampleRandom):
                    standing = success == 0
                    rows, generator = rows[standing], generator.of(standing)
                    if len(rows) == 0:
                        break
            return x_adv

    def _climb(
        self, of: Of, x: Tensor, rows: Tensor, generator: Random, leaves: bool
    ) -> tuple[Tensor, Tensor]:
        """One ascent of some rows from one start: x', and which of them climbed to the end."""
        loss_fn, is_adversarial = of(rows)
        project = projection(x, self.eps, self.norm)
        x_adv = self._start(x, project, generator)
        velocity = torch.zeros_like(x) if self.momentum is not None else None
        patience = self._patience(x, is_adversarial)
        ends, at = torch.empty_like(x), torch.arange(len(x), device=x.device)
        points = check_points(self.steps) if leaves else set()
        for step in range(1, self.steps + 1):
            if patience is not None and is_adversarial is not None:
                with torch.no_grad():
                    patience = patience - is_adversarial(x_adv).to(patience.dtype)
            direction, velocity = self._direction(loss_fn, x_adv, velocity, rows[at])
            moved = self._disturbed(x_adv.add(direction, alpha=self.step_size), generator)
            if patience is None:
                x_adv = project(moved)
            else:
                x_adv = torch.where(per_example(patience >= 0, x), project(moved), x_adv)
            if step not in points or is_adversarial is None:
                continue
            kept = ~is_adversarial(x_adv)
            if kept.all():
                continue
            ends[at[~kept]] = x_adv[~kept]
            at, x_adv = at[kept], x_adv[kept]
            if len(at) == 0:
                break
            velocity = None if velocity is None else velocity[kept]
            project = projection(x[at], self.eps, self.norm)
            loss_fn, is_adversarial = of(rows[at])
        ends[at] = x_adv
        return ends, at

    def _patience(self, x: Tensor, is_adversarial: Verdict | None) -> Tensor | None:
        """How often each example may be found wrong and still move; ``None`` for no limit."""
        return None

    def _disturbed(self, moved: Tensor, generator: Random) -> Tensor:
        return moved

    def _start(self, x: Tensor, project: Callable[[Tensor], Tensor], generator: Random) -> Tensor:
        if self.start == "zero":
            return x
        if self.start == "gaussian":
            x_adv = x + normal(generator, x) * self.start_scale
        else:
            x_adv = x + uniform_in_ball(generator, x, self.eps, self.norm)
        return project(x_adv) if self.project_start or self.steps == 0 else x_adv

    def _direction(
        self, loss_fn: LossFn, x_adv: Tensor, velocity: Tensor | None, rows: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The next step's direction, of length one in ``norm``, and the accumulated gradient."""
        raw = input_gradient(loss_fn, x_adv)
        gradient = finite(raw)
        is_zero = gradient.flatten(1).abs().amax(dim=1) == 0.0
        is_bad = ~torch.isfinite(raw.flatten(1).sum(dim=1))  # where all else is zero, exactly
        if self.lost is not None and self.unmoved is not None:  # noted without a host sync
            self.lost[rows] |= is_zero & is_bad
            self.unmoved[rows] &= is_zero & ~is_bad
        if velocity is not None and self.momentum is not None:
            velocity = velocity * self.momentum + normalised(gradient, 1)
            gradient = velocity
        return steepest(gradient, x_adv, self.norm, self.l1_density), velocity


class FGSM(PGD):
    """Fast gradient sign method (Goodfellow et al. 2015): one step of length eps from x.

    In l2 this is the fast gradient method.
    """

    def __init__(self, eps: float | str, norm: Norm = "linf") -> None:
        super().__init__(eps, step_size=eps, steps=1, start="zero", norm=norm)


class MIM(PGD):
    """Momentum iterative method (Dong et al. 2018, Algorithm 1).

    Arguments as in :class:`PGD`; ``decay`` is mu. As in the paper, ``step_size`` is by default
    ``eps / steps``.
    """

    def __init__(
        self,
        eps: float | str,
        step_size: float | str | None = None,
        steps: int = 10,
        decay: float = 1.0,
        start: Start = "zero",
        norm: Norm = "linf",
    ) -> None:
        if step_size is None:
            step_size = parse_radius(eps, norm) / max(check_count("steps", steps, 0), 1)
        super().__init__(eps, step_size, steps, start, norm, momentum=decay)


class FriendlyPGD(PGD):
    """Early-stopped PGD of friendly adversarial training (Zhang et al. 2020, Algorithm 1).

    Before each step every example is classified. One found wrong for the (tau + 1)-th time stops at
    that point. The official code also reorders the batch, stopped examples first; here examples
    keep their places. Other arguments as in :class:`PGD`.

    Args:
        tau: How many times an example may be found wrong and still move: a number, or a schedule
            ``{first epoch: number}`` such as ``{0: 0, 50: 1, 90: 2}``.
        noise: Size of the noise in every step, before projecting (omega; officially 0.001).
        noise_form: ``added`` is Gaussian noise of that standard deviation beside the step [code].
            ``scaled`` is uniform in [0, omega) times the step size, as in MTandHJ/rcm.

    Raises:
        ConfigurationError: If a setting is out of range or the schedule has no epoch 0.
    """

    def __init__(
        self,
        eps: float | str,
        step_size: float | str | None = None,
        steps: int = 10,
        start: Start = "uniform",
        norm: Norm = "linf",
        start_scale: float | str = 0.001,
        tau: int | dict[int, int] = 0,
        noise: float = 0.0,
        noise_form: StepNoise = "added",
    ) -> None:
        super().__init__(eps, step_size, steps, start, norm, start_scale=start_scale)
        schedule = tau if isinstance(tau, dict) else {0: tau}
        self.tau = {
            check_count("tau's epochs", k, 0): check_count("tau", n, 0) for k, n in schedule.items()
        }
        self.noise = parse_radius(noise, "l2", "noise")
        check_choice("noise_form", noise_form, StepNoise)
        self.noise_form: StepNoise = noise_form
        if 0 not in self.tau:
            raise ConfigurationError(
                f"tau must have an entry for epoch 0, as in {{0: 0, 50: 1, 90: 2}}, got {tau}"
            )
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Take the tau of the schedule's last entry that is not after ``epoch``."""
        self._tau = self.tau[max(first for first in self.tau if first <= epoch)]

    @property
    def budget(self) -> Budget:
        """Passes per image, which is classified before every step."""
        return super().budget.plus(Budget(forward=self.steps))

    def _patience(self, x: Tensor, is_adversarial: Verdict | None) -> Tensor:
        if is_adversarial is None:
            raise ValueError(
                "FriendlyPGD needs is_adversarial, a function from x' (N, ...) to bool (N,)"
            )
        return torch.full((len(x),), self._tau, device=x.device)

    def _disturbed(self, moved: Tensor, generator: Random) -> Tensor:
        if self.noise == 0.0:
            return moved
        if self.noise_form == "added":
            return moved.add_(normal(generator, moved), alpha=self.noise)
        inside = uniform(generator, moved, moved.shape[1:])
        return moved.add_(inside, alpha=self.step_size * self.noise)


def climb_until_broken(attack: PGD, of: Of, x: Tensor, random: ExampleRandom) -> Tensor:
    """The attack, in which examples found wrong keep their point and take no further step.

    They are classified after the steps of :func:`check_points`. The others take the steps of
    :class:`PGD`, so all that PGD breaks is broken. Not for :class:`FriendlyPGD`, which stops by
    another rule.
    """
    return attack._ascent(of, x, random, leaves=True)


def check_points(steps: int) -> set[int]:
    """After which steps examples are classified: 1, 2, 3, 4, 6, 9, 13, ..., before the last."""
    points, at = set(), 1
    while at < steps:
        points.add(at)
        at += max(1, at // 2)
    return points


def input_gradient(loss_fn: LossFn, x: Tensor) -> Tensor:
    """Gradient of each example's loss with respect to its image, shaped like x.

    Raises:
        ValueError: If the loss is not one number per example or does not depend on x.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        loss = loss_fn(x)
        if loss.shape != x.shape[:1]:
            raise ValueError(
                f"loss_fn must return shape ({len(x)},), one loss per example, got "
                f"{tuple(loss.shape)}; leave the loss unreduced"
            )
        if not loss.requires_grad:
            raise ValueError(
                "the loss carries no gradient to x'; compute it without no_grad, inference_mode "
                "or detach, from the x' that is passed in"
            )
        (gradient,) = torch.autograd.grad(loss.sum(), x)
    return gradient


def _score(
    loss_fn: LossFn, is_adversarial: Verdict | None, x_adv: Tensor, at: Tensor
) -> tuple[Tensor, Tensor]:
    """What restarts compete by, ``(N,)``: success (all that is not in ``at``), then loss."""
    with torch.no_grad():
        loss = loss_fn(x_adv)
        found = torch.zeros_like(loss) if is_adversarial is None else is_adversarial(x_adv)
    success = torch.ones_like(found, dtype=torch.int8)
    success[at] = found[at].to(torch.int8)
    return success, loss.nan_to_num(nan=-torch.inf, posinf=torch.inf)
