"""Square (Andriushchenko et al. 2020) of the official package, with three additions.

It climbs any loss, can skip unchanged images, and in l2 and l1 takes images of any size: the
package's first perturbation there fits square images of some sizes only.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pyautoattack.square import SquareAttack
from torch import Tensor

from common.attacks.geometry import finite, norm_of, per_example, project_l1
from common.attacks.losses import margin

SteeredPredict = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(x', y) -> (logits (N, K), what to maximise (N,)), in one forward pass."""


def finite_scores(logits: Tensor) -> Tensor:
    """The logits, with zeros for every image that has a NaN or infinite score."""
    return torch.where(torch.isfinite(logits).all(dim=1, keepdim=True), logits, 0.0)


class AnyShapeSquare(SquareAttack):  # type: ignore[misc]
    """Square on any loss, optionally without queries whose answer is known.

    A square changes nothing where the image already is at that end of the ball or of [0, 1]: four
    in ten on a grey image, one in eight on a colour image.

    Args:
        official: The package's attack, whose settings are taken.
        steered: ``None`` for the package's loss.
        skips_repeats: Use the known loss for images that a square left unchanged.
    """

    def __init__(
        self, official: SquareAttack, steered: SteeredPredict | None, skips_repeats: bool
    ) -> None:
        self.__dict__.update(vars(official))
        self._steered = steered
        self._skips_repeats = skips_repeats
        self._best: _Best | None = None

    def attack_single_run(self, x: Tensor, y: Tensor) -> Any:
        """One run of all queries: their number (which the package ignores) and x'."""
        self._best = None
        if self.norm == "Linf" or _is_tiled(*x.shape[2:]):
            return super().attack_single_run(x, y)
        with torch.no_grad():
            return torch.ones(len(x), device=x.device), self._search(x, y)

    def _search(self, x: Tensor, y: Tensor) -> Tensor:
        """Algorithm 1 with the l2 proposals of Algorithm 3, in l2 or l1; x' shaped like x."""
        order = 2 if self.norm == "L2" else 1
        best = self._moved(x, self._tiles(x))
        margins, losses = self.margin_and_loss(best, y)
        for query in range(self.n_queries):
            rows = (margins > 0).nonzero().flatten()
            if len(rows) == 0:
                break
            side = self._side(query, *x.shape[2:])
            proposal = self._moved(x[rows], self._proposed(best[rows] - x[rows], side, order))
            found, loss = self.margin_and_loss(proposal, y[rows])
            improved = loss < losses[rows]
            losses[rows] = torch.where(improved, loss, losses[rows])
            taken = improved | (found <= 0)
            margins[rows] = torch.where(taken, found, margins[rows])
            best[rows] = torch.where(taken[:, None, None, None], proposal, best[rows])
        return best

    def _side(self, query: int, height: int, width: int) -> int:
        """Edge of this query's square: odd, at least 3, at most that of the image."""
        side = max(round(math.sqrt(self.p_selection(query) * height * width)), 3)
        return int(min(side + 1 - side % 2, height, width))

    def _tiles(self, x: Tensor) -> Tensor:
        """The first perturbation: a grid of bumps."""
        height, width = x.shape[2:]
        side = max(min(height, width) // 5, 1)
        delta = torch.zeros_like(x)
        for top in range(height % side // 2, height - side + 1, side):
            for left in range(width % side // 2, width - side + 1, side):
                signs = self.random_choice([*x.shape[:2], 1, 1])
                delta[:, :, top : top + side, left : left + side] = self.eta(side) * signs
        return delta

    def _proposed(self, delta: Tensor, side: int, order: int) -> Tensor:
        """Perturbations with the mass of one window, and the unused part of eps, in another."""
        height, width = delta.shape[2:]
        corners = [
            (int(self.random_int(0, height - side + 1)), int(self.random_int(0, width - side + 1)))
            for _ in range(2)
        ]
        (at, source) = ((..., slice(t, t + side), slice(u, u + side)) for t, u in corners)
        both = torch.zeros_like(delta)
        both[at] = both[source] = 1.0
        mass = _mass(delta * both, order)
        spare = (self.eps**order - norm_of(delta, order) ** order).clamp_min(0.0) / delta.shape[1]
        signs = self.random_choice([*delta.shape[:2], 1, 1])
        old = delta[at] / (_mass(delta[at], order) ** (1 / order) + 1e-12)
        bump = self.eta(side) * signs + old
        bump = bump / (_mass(bump, order) ** (1 / order) + 1e-12)
        delta = delta.clone()
        delta[source] = 0.0
        delta[at] = bump * (spare + mass) ** (1 / order)
        return delta

    def _moved(self, x: Tensor, delta: Tensor) -> Tensor:
        """Images at distance eps in the direction of delta, brought into the box."""
        if self.norm == "L1":
            return (x + project_l1((x + delta).clamp(0.0, 1.0) - x, self.eps)).clamp(0.0, 1.0)
        scale: Tensor = self.eps / (norm_of(delta, 2) + 1e-12)
        return (x + delta * scale).clamp(0.0, 1.0)

    def margin_and_loss(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Margin of the true class and what is minimised, both ``(N,)``."""
        if not self._skips_repeats:
            return self._evaluated(x, y)
        if self._best is None:  # the start
            margin, loss = self._evaluated(x, y)
            self._best = _Best(x, margin, loss).standing()
            return margin, loss
        margin, loss = self._best.margin.clone(), self._best.loss.clone()
        rows = (x != self._best.x).flatten(1).any(dim=1).nonzero().flatten()
        if len(rows) > 0:
            margin[rows], loss[rows] = self._evaluated(x[rows], y[rows])
        self._best = self._best.after(x, margin, loss)
        return margin, loss

    def _evaluated(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        if self._steered is None:
            found: tuple[Tensor, Tensor] = super().margin_and_loss(x, y)
            return found
        logits, loss = self._steered(x, y)
        return -margin(finite_scores(logits), y), -finite(loss)


def _is_tiled(height: int, width: int) -> bool:
    """Whether the package's first perturbation, rows and columns of a fifth, fits the image."""
    side = height // 5
    if not 0 < side <= width:
        return False
    begin = (height - 5 * side) // 2
    return side == 1 or all(begin + n // side * side <= n for n in (height, width))


def _mass(delta: Tensor, order: int) -> Tensor:
    """The norm of each channel to the power of its order, ``(N, C, 1, 1)``."""
    return delta.abs().pow(order).sum(dim=(-2, -1), keepdim=True)


@dataclass(frozen=True)
class _Best:
    """Images, margins and lowest losses from which Square continues, by the package's rules."""

    x: Tensor
    margin: Tensor
    loss: Tensor

    def after(self, x: Tensor, margin: Tensor, loss: Tensor) -> "_Best":
        """With the proposals that are better or misclassified, by the package's sums."""
        is_better = (loss < self.loss).float()
        is_taken = torch.max(is_better, (margin <= 0).float())
        flags = per_example(is_taken, x)
        return _Best(
            flags * x + (1.0 - flags) * self.x,
            is_taken * margin + (1.0 - is_taken) * self.margin,
            is_better * loss + (1.0 - is_better) * self.loss,
        ).standing()

    def standing(self) -> "_Best":
        """The examples that are not misclassified yet."""
        rows = self.margin > 0
        return _Best(self.x[rows], self.margin[rows], self.loss[rows])
