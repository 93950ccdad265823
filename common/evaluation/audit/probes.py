"""What an audit measures on a model, example by example, beside attacking it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from common.attacks.losses import label_loss
from common.attacks.randomness import ExampleRandom
from common.attacks.settings import Budget
from common.evaluation.audit.gradients import (
    cosine,
    directional_derivatives,
    gradient_norms,
    in_double,
)
from common.evaluation.history import changed, copied, state_of
from common.objectives import Batch, InnerLoss
from common.results.lines import Columns, Threat

FINE_STEP = 1e-4  # per pixel, for derivatives
DIRECTIONS = 16
REPEATS = 8  # pairs of calls between which the state of a model is compared
BUDGETS = {
    "forward": Budget(3),
    "memory": Budget(2 * REPEATS + 4),
    "derivatives": Budget(4 * DIRECTIONS + 4, 2),  # of one loss, over both steps
    "gradient": Budget(1, 1),
}
"""Passes per image of each measurement."""
RELEVANT = 0.5  # least agreement of a loss with the cross-entropy of the logits


def _in_double(model: Any, batch: Batch, measure: Callable[[Batch], Columns]) -> Columns:
    """Measured in float64, or in float32 if the model insists on that."""
    try:
        with in_double(model):
            columns = measure(batch | {"x": batch["x"].double()})
    except RuntimeError:
        columns = measure(batch)
    return {name: column.float() for name, column in columns.items()}


def gradients(
    losses: Mapping[str, InnerLoss], threat: Threat, model: Any, batch: Batch, random: ExampleRandom
) -> Columns:
    """Size of the gradient, and its agreement with differences over a fine and a coarse step.

    The size is that of the loss with the true label, in float32. Differences use the runner-up
    class, since the cross-entropy of a certain class is too small, and images with a little noise,
    since max-pooling has kinks on flat parts.
    """
    norms = torch.stack(
        [gradient_norms(inner(model, batch), batch["x"]) for inner in losses.values()]
    )
    largest = norms.nan_to_num(-1.0).amax(dim=0)
    with torch.no_grad():
        aim = model(batch["x"]).topk(2, dim=1).indices[:, 1]
    x = batch["x"]
    draws = [random.integers(2, x.shape[1:]).to(torch.int8) for _ in range(DIRECTIONS)]
    signs = torch.stack(draws) * 2 - 1
    coarse = threat.per_pixel(x) / 4.0
    noise = coarse * random.uniform(x.shape[1:], -1.0, 1.0).to(x)
    is_inside = (x + noise >= 0.0) & (x + noise <= 1.0)
    beside = (x + torch.where(is_inside, noise, -noise)).clamp(0.0, 1.0)
    steps = {"fine": FINE_STEP, "coarse": min(max(coarse, FINE_STEP), 0.25)}

    def measure(batch: Batch) -> Columns:
        columns = {}
        batch = batch | {"y": aim}
        for name, h in steps.items():
            found, reference = [], None
            if len(losses) > 1:
                plain = label_loss(model, aim)
                reference = directional_derivatives(plain, batch["x"], signs, h)[1]
            for inner in losses.values():
                predicted, measured = directional_derivatives(
                    inner(model, batch), batch["x"], signs, h, own=name == "coarse"
                )
                agreement = cosine(predicted, measured)
                if reference is not None:
                    # A loss that has little to do with the decision proves nothing about it.
                    is_other = cosine(measured[:, :DIRECTIONS], reference) < RELEVANT
                    agreement = torch.where(is_other, 0.0, agreement)
                found.append(agreement.nan_to_num(-2.0))
            best = torch.stack(found).amax(dim=0)
            columns[name] = torch.where(best < -1.5, torch.nan, best)
        return columns

    found = _in_double(model, batch | {"x": beside}, measure)
    return {"norm": torch.where(largest < 0.0, torch.nan, largest)} | found


def forward(model: Any, batch: Batch, _: ExampleRandom) -> Columns:
    """Largest difference of probabilities between two passes, and to the image on its own."""

    def measure(batch: Batch) -> Columns:
        x = batch["x"]
        with torch.no_grad():
            once, again = model(x).softmax(dim=1), model(x).softmax(dim=1)
            try:
                alone = torch.cat([model(x[i : i + 1]).softmax(dim=1) for i in range(len(x))])
            except ValueError:  # batch-norm in training mode refuses a single value per channel
                alone = 1.0 - once
        differences = torch.stack([(once - again).abs(), (once - alone).abs()])
        return {"difference": differences.amax(dim=(0, 2)).nan_to_num(1.0)}

    return _in_double(model, batch, measure)


class MemoryProbe:
    """Compares the model in use with a copy made before the attacks (``model`` is copied now).

    Copies of that copy score new images (mirrored ones with noise), with and without a call on
    neighbouring images before. The model's state is compared between calls too; what changes in the
    first call alone, such as a table made once, is no memory.
    """

    def __init__(self, model: nn.Module, threat: Threat) -> None:
        self.fresh = copied(model)
        self.threat = threat

    def __call__(self, model: Any, batch: Batch, random: ExampleRandom) -> Columns:
        """Largest difference of probabilities, 1 where labels differ; whether the state moved."""
        x = batch["x"]
        near = self._near(x, random)
        unseen = self._near(x.flip(-1), random)
        beside = self._near(unseen, random)
        differences = [torch.zeros(len(x), device=x.device)]
        with torch.no_grad():
            model(x.clone())
            before = state_of(model)
            used = copied(self.fresh)
            used(unseen.clone())  # copies, since a model may write into what it gets
            differences.append(_difference(used(beside.clone()), self._first(beside)))
            differences += [
                _difference(model(images.clone()), self._first(images)) for images in (x, near)
            ]
            for _ in range(REPEATS):
                model(unseen.clone())
                model(beside.clone())
            model(x.clone())  # features kept of the last images are no memory
            is_moved = bool(changed(before, state_of(model)))
        return {
            "memory": torch.stack(differences).amax(dim=0),
            "moved": torch.full_like(differences[0], float(is_moved)),
        }

    def _first(self, x: Tensor) -> Tensor:
        """A fresh copy's scores in its first call."""
        scores: Tensor = copied(self.fresh)(x.clone())
        return scores

    def _near(self, x: Tensor, random: ExampleRandom) -> Tensor:
        size = self.threat.per_pixel(x)
        return (x + random.uniform(x.shape[1:], -size, size).to(x)).clamp(0.0, 1.0)


def _difference(scores: Tensor, others: Tensor) -> Tensor:
    """Largest difference of probabilities, ``(N,)``."""
    other_label = scores.argmax(dim=1) != others.argmax(dim=1)
    probabilities = (part.float().softmax(dim=1) for part in (scores, others))
    gap = torch.sub(*probabilities).abs().amax(dim=1).nan_to_num(1.0)
    return torch.where(other_label, 1.0, gap)
