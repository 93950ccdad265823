"""What an audit measures on a model, example by example, beside attacking it."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from common.attacks.losses import cross_entropy
from common.attacks.randomness import ExampleRandom
from common.evaluation.audit.gradients import (
    cosine,
    directional_derivatives,
    gradient_norms,
    in_double,
    random_signs,
)
from common.evaluation.steps import Columns, Threat
from common.objectives import Batch, InnerLoss

FINE_STEP = 1e-4  # per pixel, for derivatives
DIRECTIONS = 16
RELEVANT = 0.5  # least agreement of a loss with the cross-entropy of the logits


def diameter(threat: Threat, x: Tensor) -> float:
    """Of the box of images in the norm of the threat."""
    return float(x[0].numel() ** {"linf": 0.0, "l2": 0.5, "l1": 1.0}[threat.norm])


def _in_double(model: Any, batch: Batch, measure: Callable[[Batch], Columns]) -> Columns:
    """Measured in float64, or in float32 if the model insists on that."""
    try:
        with in_double(model):
            columns = measure(batch | {"x": batch["x"].double()})
    except RuntimeError:
        columns = measure(batch)
    return {name: column.float() for name, column in columns.items()}


def gradients(
    losses: Mapping[str, InnerLoss],
    threat: Threat,
    model: Any,
    batch: Batch,
    random: ExampleRandom,
) -> Columns:
    """Size of the gradient, and its agreement with differences over a fine and a coarse step.

    The size is that of the loss with the true label, in float32. Differences aim at the runner-up
    class: the cross-entropy of a class that is certain is too small to be measured. They are taken
    a little beside the images, whose flat parts put pooling on its kinks.
    """
    norms = torch.stack(
        [gradient_norms(inner(model, batch), batch["x"]) for inner in losses.values()]
    )
    largest = norms.nan_to_num(-1.0).amax(dim=0)
    with torch.no_grad():
        aim = model(batch["x"]).topk(2, dim=1).indices[:, 1]
    signs = random_signs(batch["x"], random, DIRECTIONS)
    coarse = threat.radius / diameter(threat, batch["x"]) / 4.0
    x = batch["x"]
    noise = coarse * random.uniform(x.shape[1:], -1.0, 1.0).to(x)
    is_inside = (x + noise >= 0.0) & (x + noise <= 1.0)
    beside = (x + torch.where(is_inside, noise, -noise)).clamp(0.0, 1.0)
    steps = {"fine": FINE_STEP, "coarse": min(max(coarse, FINE_STEP), 0.25)}

    def measure(batch: Batch) -> Columns:
        columns = {}
        batch = batch | {"y": aim}
        for name, h in steps.items():
            plain = partial(_on_logits, model, aim)
            reference = directional_derivatives(plain, batch["x"], signs, h)[1]
            found = []
            for inner in losses.values():
                predicted, measured = directional_derivatives(
                    inner(model, batch), batch["x"], signs, h, own=name == "coarse"
                )
                agreement = cosine(predicted, measured)
                # A loss that has little to do with the decision proves nothing about it.
                other = cosine(measured[:, :DIRECTIONS], reference) < RELEVANT
                is_other = other & (len(losses) > 1)
                found.append(torch.where(is_other, 0.0, agreement).nan_to_num(-2.0))
            best = torch.stack(found).amax(dim=0)
            columns[name] = torch.where(best < -1.5, torch.nan, best)
        return columns

    found = _in_double(model, batch | {"x": beside}, measure)
    return {"norm": torch.where(largest < 0.0, torch.nan, largest)} | found


def _on_logits(model: Any, y: Tensor, x: Tensor) -> Tensor:
    return cross_entropy(model(x), y)


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
