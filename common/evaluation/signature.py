"""Signatures of functions: scores on the examples, and gradients at some of them.

Weights do not determine what a model computes: a normalisation may be in a list, a closure or
another file. Its scores do. A signature holds a few random projections of them for each example
and is compared with a tolerance, since rounding differs between threads and batch sizes.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from common.attacks.losses import label_loss
from common.attacks.pgd import input_gradient
from common.attacks.randomness import ExampleRandom
from common.evaluation.audit.gradients import anchored
from common.evaluation.history import is_close
from common.evaluation.steps import Step, judged
from common.objectives import Batch
from common.results.lines import Columns, Threat

PROBED = 32
"""Number of examples, spread over all, that are also perturbed."""
TOLERANCES = {"gradient": 1e-3}
"""Largest difference in relation to the largest value; a gradient jumps where a ReLU turns."""
TOLERANCE = 2e-5


def projected(values: Tensor) -> Tensor:
    """Each example's values in four fixed random directions, ``(N, 4)`` float64."""
    flat = values.detach().flatten(1).double().cpu()
    generator = torch.Generator().manual_seed(flat.shape[1])
    return flat @ torch.randn(flat.shape[1], 4, generator=generator, dtype=torch.float64)


def clean_step() -> Step:
    """Outcomes without an attack, and projections of the scores."""

    def run(model: Any, batch: Batch, _: ExampleRandom) -> Columns:
        with torch.no_grad():
            logits = model(batch["x"])
        return judged(lambda _: logits, batch, batch["x"]) | {"scores": projected(logits)}

    return Step("clean", "clean", run, {}, scope="all", kind="probe")


def probe_step(threat: Threat | None, networks: Mapping[str, nn.Module]) -> Step:
    """Scores of perturbed images, gradients, and every loss that is declared."""
    run = partial(_probe, threat, networks)
    return Step("probe", "probe", run, {}, scope="all", kind="probe")


def _probe(
    threat: Threat | None,
    networks: Mapping[str, nn.Module],
    model: Any,
    batch: Batch,
    _: ExampleRandom,
) -> Columns:
    x, y = batch["x"], batch["y"]
    points = _perturbed(x, threat)
    columns = {}
    with torch.no_grad():
        for name, network in {"scores": model, **networks}.items():
            scores = [projected(network(point)) for point in points]
            columns[name] = torch.cat(scores, dim=1)
    loss = anchored(label_loss(model, y))
    columns["gradient"] = projected(input_gradient(loss, points[0]))
    losses = dict(getattr(model, "adaptive_losses", dict)())
    if hasattr(model, "objective"):
        losses["model"] = model.objective.inner
    for name, inner in losses.items():
        try:
            with torch.no_grad():
                value = inner(model, batch)(points[0]).detach().double().cpu()
        except Exception:  # a loss that no suite may use must not stop the evaluation
            value = torch.full((len(y),), torch.nan, dtype=torch.float64)
        columns[f"loss/{name}"] = value
    return columns


def _perturbed(x: Tensor, threat: Threat | None) -> list[Tensor]:
    """Images with fixed noise of several sizes and both signs."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(x.shape[1:], generator=generator).sign().to(x)
    size = 0.03 if threat is None else threat.per_pixel(x)
    factors = (size, -size, 4 * size, -4 * size, 0.3)
    return [(x + factor * noise).clamp(0.0, 1.0) for factor in factors]


def is_same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two signatures agree in everything that both have."""
    return all(
        is_close(one[name], other[name], TOLERANCES.get(name.rpartition("/")[2], TOLERANCE))
        for name in set(one) & set(other)
    )


def networks_of(steps: Sequence[Step]) -> dict[str, nn.Module]:
    """The other networks that steps use, by step and number."""
    return {
        f"{step.key}/{number}": network
        for step in steps
        for number, network in enumerate(step.networks)
    }
