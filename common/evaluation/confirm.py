"""Attacks computed by an engine and judged by the plain network.

An example counts as broken only if the plain float32 network misclassifies it. What an attack in
reduced precision does not break is attacked again in float32 with the same random numbers, so an
engine makes no attack weaker.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from common.attacks.autoattack import AutoAttack
from common.attacks.engine.network import AttackEngine
from common.attacks.randomness import ExampleRandom
from common.evaluation.steps import is_wrong, judged
from common.objectives import Batch, InnerLoss
from common.results.lines import Columns, Threat

Crafted = tuple[Tensor, Tensor | None]
"""x' ``(N, C, H, W)`` and, from the official AutoAttack, which examples are still correct."""
Craft = Callable[[Any, Batch, ExampleRandom, AttackEngine | None], Crafted]
"""(model, batch, random numbers of its examples, engine that is applied) -> what it made."""


def attacked(
    craft: Craft,
    threat: Threat | None,
    engine: AttackEngine | None,
    model: Any,
    batch: Batch,
    random: ExampleRandom,
    idle: Callable[[], Tensor | None] = lambda: None,
) -> Columns:
    """Outcomes of an attack, see :func:`common.evaluation.steps.judged`.

    With an engine in float32, examples are attacked again through the plain network if only the
    engine's network misclassifies them. With one in reduced precision, all that the plain network
    still classifies correctly are attacked again in float32. ``idle`` is called after the attack
    and says which examples it found no direction for.
    """
    y = batch["y"]
    again = random.of(torch.arange(len(y), device=y.device))
    claimed = torch.zeros_like(y, dtype=torch.bool)
    with nullcontext() if engine is None else engine.applied(model, batch["x"]):
        x_adv, correct = craft(model, batch, random, engine)
        if engine is not None:
            claimed = is_wrong(model, y, x_adv) if correct is None else ~correct
    if engine is not None and correct is not None:
        correct = correct | ~is_wrong(model, y, x_adv)
    columns = judged(model, batch, x_adv, threat, correct, idle())
    if correct is not None:  # without success the package returns x, so the distance says nothing
        columns["moved"] = torch.ones_like(correct)
    is_reduced = engine is not None and engine.is_reduced
    rows = (columns["correct"] & (claimed | is_reduced)).nonzero().flatten()
    if engine is None or len(rows) == 0:
        return columns
    slower = engine.in_float32() if is_reduced else None
    rest = attacked(craft, threat, slower, model, part_of(batch, rows), again.of(rows), idle)
    return merged(columns, rest, rows)


def official(
    attack: AutoAttack,
    part: str,
    seed: int,
    inner: InnerLoss | None,
    model: Any,
    batch: Batch,
    _: ExampleRandom,
    engine: AttackEngine | None,
) -> Crafted:
    """One attack of the official AutoAttack, as a :data:`Craft`; ``inner`` replaces its loss."""
    steered: Callable[..., Any] | None = inner and partial(_steered, inner, model)
    if engine is not None:
        model, steered = engine.wrap(model), steered and engine.wrap(steered)
    x, y = batch["x"], batch["y"]
    return attack.step(part, model, x, y, seed, steered, skips_repeats=engine is not None)


def part_of(batch: Batch, rows: Tensor) -> Batch:
    """Some examples of a batch."""
    return {key: value[rows] for key, value in batch.items()}


def merged(columns: Columns, others: Columns, rows: Tensor) -> Columns:
    """Columns in which some rows are replaced."""
    return {name: column.index_copy(0, rows, others[name]) for name, column in columns.items()}


def _steered(inner: InnerLoss, model: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return model(x), inner(model, {"x": x, "y": y})(x)
