"""Decision-based attacks: they use predicted labels only, no gradients and no scores."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from common.attacks.geometry import (
    Norm,
    check_count,
    norm_of,
    normalised,
    parse_radius,
    per_example,
    sparse_direction,
)
from common.attacks.randomness import ExampleRandom
from common.attacks.settings import Budget, Settings

Labels = Callable[[Tensor], Tensor]
"""Images ``(N, ...)`` -> predicted classes ``(N,)``."""
_Hits = Callable[[Tensor], Tensor]

BISECTIONS = 10
"""Halvings of a segment that crosses the decision boundary."""
HALVINGS = 6
"""Of a step of HopSkipJump that leaves the adversarial region."""


class DecisionBased(Settings):
    """Looks for the nearest image with another label, by labels alone.

    In linf this is RayS (Chen & Gu 2020): directions in {-1, 1}^d whose signs are flipped block by
    block, from the whole image down to single pixels; a flip is kept if the radius at which the
    label changes gets smaller. That radius is searched downwards from the last one in growing
    steps, which takes fewer queries than bisection from zero. In l2 and l1 a quarter of the queries
    goes to RayS, from whose result HopSkipJump (Chen, Jordan & Wainwright 2020) starts: it
    estimates the normal of the boundary from labels. In l1 it moves the pixels with the largest
    entries of that normal.

    An example stops once it has an adversarial image within ``eps``.

    Args:
        eps: Radius of the ball, pixels in [0, 1]; a number or a fraction such as ``8/255``.
        norm: ``linf``, ``l2`` or ``l1``.
        queries: The most labels queried per example.

    Raises:
        ConfigurationError: If a setting is out of range.
    """

    def __init__(self, eps: float | str, norm: Norm = "linf", queries: int = 1000) -> None:
        self.norm: Norm = norm
        self.eps = parse_radius(eps, norm)
        self.queries = check_count("queries", queries, 1)
        self._first = queries if norm == "linf" else max(queries // 4, 1)

    @property
    def budget(self) -> Budget:
        """Passes per image, at most."""
        return Budget(forward=self.queries)

    @torch.no_grad()
    def __call__(self, labels: Labels, x: Tensor, y: Tensor, random: ExampleRandom) -> Tensor:
        """The nearest images found that are not classified as y, or x; not always in the ball.

        Args:
            labels: Images in [0, 1] to classes; an example's may depend on no other example.
            x: Images in [0, 1], ``(N, ...)``, classified as y.
            y: Labels, ``(N,)``.
            random: Of these examples; used in l2 and l1.
        """
        best = _Best(x.detach().clone(), x, torch.full_like(y, torch.inf, dtype=x.dtype), self.norm)
        self._rays(labels, x, y, best)
        if self.norm != "linf":
            self._hops(labels, x, y, best, random)
        return best.x_adv

    def _rays(self, labels: Labels, x: Tensor, y: Tensor, best: "_Best") -> None:
        rows = torch.arange(len(x), device=x.device)
        rays = _Rays.of_images(x)
        for query in range(1, self._first + 1):
            rays.tell(labels(rays.points(x[rows])) != y[rows])
            if query % 10 == 0 or query == self._first:  # rarely: it synchronises with the device
                best.update(rows, rays.found(x[rows]), torch.isfinite(rays.radius))
                standing = best.distance[rows] > self.eps
                rows, rays = rows[standing], rays.at(standing)
                if len(rows) == 0:
                    return

    def _hops(
        self, labels: Labels, x: Tensor, y: Tensor, best: "_Best", random: ExampleRandom
    ) -> None:
        rows = torch.arange(len(x), device=x.device)
        standing = (best.distance > self.eps) & torch.isfinite(best.distance)
        for step, draws in _schedule(self.queries - self._first):
            rows, random = rows[standing], random.of(standing)
            if len(rows) == 0:
                return
            image, label = x[rows], y[rows]

            def hits(points: Tensor, label: Tensor = label) -> Tensor:
                return labels(points) != label

            point = _bisected(hits, image, best.x_adv[rows])
            normal = _normal_at(hits, image, point, random, draws)
            jumped = _jumped(hits, image, point, normal, self.norm, step)
            for found in (point, _bisected(hits, image, jumped)):
                best.update(rows, found, hits(found))
            standing = best.distance[rows] > self.eps


@dataclass
class _Best:
    """The nearest adversarial images so far."""

    x_adv: Tensor
    x: Tensor
    distance: Tensor
    norm: Norm

    def update(self, rows: Tensor, points: Tensor, is_adversarial: Tensor) -> None:
        order = {"linf": math.inf, "l2": 2.0, "l1": 1.0}[self.norm]
        distance = norm_of(points - self.x[rows], order).flatten()
        nearer = is_adversarial & (distance < self.distance[rows])
        self.x_adv[rows[nearer]] = points[nearer]
        self.distance[rows[nearer]] = distance[nearer]


# ---------------------------------------------------------------------------------------- RayS


@dataclass
class _Rays:
    """One ray per image and the flip being tried."""

    sign: Tensor  # direction, entries 1 and -1, (n, d); the others are (n,)
    radius: Tensor  # where the label changes; infinite before a change was found
    level: Tensor  # blocks are a 2^level-th of the image
    block: Tensor  # that is flipped
    low: Tensor  # radius at which the flipped ray has the true label; negative if unknown
    high: Tensor  # radius at which it has another one; infinite if unknown
    step: Tensor  # the next one downwards from ``high``

    @classmethod
    def of_images(cls, x: Tensor) -> Self:
        zero = torch.zeros(len(x), device=x.device, dtype=x.dtype)
        count = torch.zeros_like(zero, dtype=torch.int64)
        infinite = torch.full_like(zero, torch.inf)
        sign = torch.ones_like(x.flatten(1))
        return cls(sign, infinite, count, count.clone(), zero - 1.0, infinite.clone(), zero.clone())

    def at(self, rows: Tensor) -> "_Rays":
        return _Rays(*(getattr(self, field.name)[rows] for field in fields(self)))

    def found(self, x: Tensor) -> Tensor:
        """The adversarial image on each ray."""
        return self._on(self.sign, self.radius, x)

    def points(self, x: Tensor) -> Tensor:
        """The images to query next."""
        return self._on(self._flipped(), self._asked(), x)

    def tell(self, hit: Tensor) -> None:
        """Update by whether the images queried have another label than the true one."""
        asked = self._asked()
        self.high = torch.where(hit, asked, self.high)
        self.low = torch.where(hit, self.low, asked)
        self.step = torch.where(hit & (self.low < 0.0), 2.0 * self.step, self.step)
        is_better = torch.isfinite(self.high)
        is_done = ~is_better | (self.high - self.low.clamp_min(0.0) <= self._tolerance(self.high))
        # Until a ray has found another label all flips are kept, to try many patterns.
        is_kept = is_done & (is_better | torch.isinf(self.radius))
        self.sign = torch.where(is_kept[:, None], self._flipped(), self.sign)
        self.radius = torch.where(is_done & is_better, self.high, self.radius)
        self._advance(is_done)

    def _on(self, sign: Tensor, radius: Tensor, x: Tensor) -> Tensor:
        radius = radius.clamp_max(1.0)  # no image is larger
        return (x + (radius[:, None] * sign).view_as(x)).clamp(0.0, 1.0)

    def _tolerance(self, radius: Tensor) -> Tensor:
        """A flipped block changes the radius by about its share of the image."""
        return radius * (0.5 / 2.0**self.level).clamp_max(0.01)

    def _asked(self) -> Tensor:
        """Radius of the next query: below the ray's own, further down, or halfway."""
        own = self.radius.clamp_max(1.0)
        first = torch.where(torch.isinf(self.radius), own, own - self._tolerance(own))
        down = (self.high - self.step).clamp_min(0.0)
        later = torch.where(self.low < 0.0, down, (self.low + self.high) / 2.0)
        return torch.where(torch.isinf(self.high), first, later)

    def _flipped(self) -> Tensor:
        """The direction with the block's signs changed."""
        size = self.sign.shape[1]
        width = -(-size // 2**self.level)
        position = torch.arange(size, device=self.sign.device)
        begin = (self.block * width)[:, None]
        inside = (position >= begin) & (position < begin + width[:, None])
        return torch.where(inside, -self.sign, self.sign)

    def _advance(self, is_done: Tensor) -> None:
        """To the next block, after the last one to the next level, after pixels to the first."""
        size = self.sign.shape[1]
        width = -(-size // 2**self.level)
        block = self.block + is_done
        is_over = block * width >= size
        self.block = torch.where(is_over, 0, block)
        self.level = torch.where(is_over & (width == 1), 0, self.level + is_over)
        self.low = torch.where(is_done, -1.0, self.low)
        self.high = torch.where(is_done, torch.inf, self.high)
        step = self._tolerance(self.radius.clamp_max(1.0))
        self.step = torch.where(is_done | (self.step == 0.0), step, self.step)


# --------------------------------------------------------------------------------- HopSkipJump


def _schedule(queries: int) -> Iterator[tuple[int, int]]:
    """Steps, from 1, and the number of labels each uses for its normal."""
    step = 1
    while (draws := int(30 * math.sqrt(step))) + 2 * BISECTIONS + HALVINGS + 2 <= queries:
        yield step, draws
        queries -= draws + 2 * BISECTIONS + HALVINGS + 2
        step += 1


def _bisected(hits: _Hits, x: Tensor, far: Tensor) -> Tensor:
    """The adversarial point on the segment to x that is closest to the boundary."""
    low = torch.zeros(len(x), device=x.device, dtype=x.dtype)
    high = torch.ones_like(low)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2.0
        hit = hits(x + per_example(middle, x) * (far - x))
        low, high = torch.where(hit, low, middle), torch.where(hit, middle, high)
    return x + per_example(high, x) * (far - x)


def _normal_at(hits: _Hits, x: Tensor, point: Tensor, random: ExampleRandom, draws: int) -> Tensor:
    """Direction into the adversarial region, from labels around a point of the boundary."""
    radius = 0.01 * norm_of(point - x, 2)
    total, plain = torch.zeros_like(x), torch.zeros_like(x)
    votes = torch.zeros(len(x), device=x.device, dtype=x.dtype)
    for _ in range(draws):
        direction = normalised(random.normal(x.shape[1:]).to(x), 2)
        vote = 2.0 * hits((point + radius * direction).clamp(0.0, 1.0)).to(x.dtype) - 1.0
        total, plain = total + per_example(vote, x) * direction, plain + direction
        votes = votes + vote
    mean = votes / draws  # a control variate, unless all votes agree
    mean = torch.where(mean.abs() == 1.0, 0.0, mean)
    return total - per_example(mean, x) * plain


def _jumped(hits: _Hits, x: Tensor, point: Tensor, normal: Tensor, norm: Norm, step: int) -> Tensor:
    """The farthest adversarial point along the normal, or the point itself."""
    if norm == "l2":
        direction, order = normalised(normal, 2), 2.0
    else:
        direction, order = sparse_direction(normal, point, 0.01), 1.0
    length = norm_of(point - x, order) / math.sqrt(step)
    found = point
    is_open = torch.ones(len(x), dtype=torch.bool, device=x.device)
    for _ in range(HALVINGS):
        moved = (point + length * direction).clamp(0.0, 1.0)
        hit = hits(moved) & is_open
        found = torch.where(per_example(hit, x), moved, found)
        is_open &= ~hit
        length = length / 2.0
    return found
