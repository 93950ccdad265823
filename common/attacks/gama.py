"""GAMA-PGD: a margin attack on probabilities, first guided away from a reference prediction."""

import torch
from torch import Tensor

from common.attacks.geometry import (
    Random,
    as_pixels,
    check_count,
    check_number,
    parse_radius,
    projection,
    uniform,
)
from common.attacks.losses import Predict, full_precision, margin
from common.attacks.pgd import input_gradient
from common.attacks.settings import Budget, Settings


class GAMAPGD(Settings):
    r"""Guided Adversarial Margin Attack (Sriramanan et al. 2020), by sign steps in the linf ball.

    From a random corner :math:`x'_0 = x \pm \epsilon` of the cube, with
    :math:`P = \mathrm{softmax} f(x'_0)` held fixed and Q the softmax at x', each step climbs

    .. math:: \max_{j \ne y} Q_j - Q_y + \lambda_t \|P - Q\|_2^2,

    where :math:`\lambda_t` falls linearly from ``weight`` to 0 at step ``relaxed_steps``:
    :math:`x' \leftarrow \Pi(\mathrm{clip}_{[0,1]}(x' + \eta\, \mathrm{sign} \nabla))`. Only the
    corner itself may lie outside the box.

    In the paper P is the prediction for the clean image. Here it is that for the start, as in the
    authors' code and that of Huang et al. 2021 (RobustWRN): the first step climbs the margin alone.

    Args:
        eps: Radius of the linf ball, pixels in [0, 1]; a number or a fraction such as ``8/255``.
        step_size: The first eta; ``None`` is ``2 * eps``.
        steps: Number of steps.
        decay_at: The steps, from 0, before which eta is divided by 10.
        weight: The first lambda.
        relaxed_steps: The step at which lambda reaches 0; with 0 it is 0 throughout.
        project: Whether the last point is projected to the ball. ``False`` reproduces a defect of
            the RobustWRN code: the point may leave the ball by the last eta, so robust accuracies
            are too low.

    Raises:
        ConfigurationError: If a setting is out of range.
    """

    norm = "linf"

    def __init__(
        self,
        eps: float | str,
        step_size: float | str | None = None,
        steps: int = 100,
        decay_at: tuple[int, ...] = (60, 85),
        weight: float = 50.0,
        relaxed_steps: int = 25,
        project: bool = True,
    ) -> None:
        self.eps = parse_radius(eps)
        self.step_size = (
            2.0 * self.eps if step_size is None else parse_radius(step_size, name="step_size")
        )
        self.steps = check_count("steps", steps, 1)
        self.decay_at = tuple(check_count("decay_at's steps", step, 0) for step in decay_at)
        self.weight = check_number("weight", weight)
        self.relaxed_steps = check_count("relaxed_steps", relaxed_steps, 0)
        self.project = project

    idle: Tensor | None = None
    """Examples of the last call whose gradient was zero at every step, bool ``(N,)``."""

    @property
    def budget(self) -> Budget:
        """Passes per image."""
        return Budget(self.steps + 1, self.steps)

    @property
    def reach(self) -> float:
        """The largest linf distance from its start that the steps can move an image."""
        total, size = 0.0, self.step_size
        for step in range(self.steps):
            size /= 10.0 ** self.decay_at.count(step)
            total += size
        return total

    def __call__(self, predict: Predict, x: Tensor, y: Tensor, generator: Random = None) -> Tensor:
        """Attack images x ``(N, ...)`` with labels y ``(N,)`` by the rules of :class:`PGD`.

        The start may lie outside [0, 1] by eps; the result does not.
        """
        with torch.inference_mode(False), torch.enable_grad():
            x = as_pixels(x)
            y = y.detach().clone()
            project = projection(x, self.eps, "linf")
            sign = 2.0 * (uniform(generator, x, x.shape[1:]) >= 0.5).to(x) - 1.0
            x_adv = x + self.eps * sign
            with torch.no_grad():
                reference = _probabilities(predict(x_adv))
            step_size = self.step_size
            self.idle = torch.ones(len(x), dtype=torch.bool, device=x.device)
            for step in range(self.steps):
                step_size /= 10.0 ** self.decay_at.count(step)
                is_relaxed = step < self.relaxed_steps
                weight = self.weight * (1.0 - step / self.relaxed_steps) if is_relaxed else 0.0

                def loss(x_adv: Tensor, weight: float = weight) -> Tensor:
                    q = _probabilities(predict(x_adv))
                    return margin(q, y) + weight * (q - reference).square().sum(dim=1)

                gradient = input_gradient(loss, x_adv).nan_to_num(nan=0.0)
                self.idle &= (gradient == 0.0).flatten(1).all(dim=1)
                x_adv = (x_adv + step_size * gradient.sign()).clamp(0.0, 1.0)
                if self.project or step < self.steps - 1:
                    x_adv = project(x_adv)
        return x_adv


def _probabilities(logits: Tensor) -> Tensor:
    return full_precision(logits).softmax(dim=1)
