"""Attacks computed by an engine and judged without it.

An example counts as broken only if the plain float32 network says so. What an attack in reduced
precision could not break so is attacked again in float32 with the same random numbers: an engine
can cost an attack time, never strength.
"""

from collections.abc import Callable
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

Craft = Callable[[Any, Batch, ExampleRandom], Tensor]
"""(model, batch, random numbers of its examples) -> x' ``(N, C, H, W)``."""


def attacked(
    craft: Craft,
    threat: Threat | None,
    engine: AttackEngine | None,
    model: Any,
    batch: Batch,
    random: ExampleRandom,
    idle: Callable[[], Tensor | None] = lambda: None,
) -> Columns:
    """What an attack achieves, see :func:`common.evaluation.steps.judged`.

    With an engine in float32 that is an attack on the same function up to rounding; an example that
    the engine's network takes for broken and the plain one does not is attacked through the plain
    one. With an engine in reduced precision an example is broken exactly if that attack's image
    fools the plain network, or, where it does not, if the float32 attack breaks it.

    Args:
        craft: The attack.
        threat: The ball it keeps to.
        engine: Computes its passes; ``None`` for the plain network.
        model: Images to logits, in evaluation mode.
        batch: The examples.
        random: Their random numbers.
        idle: Called after the attack: which examples it found no direction for.
    """
    if engine is None:
        x_adv = craft(model, batch, random)
        return judged(model, batch, x_adv, threat, idle=idle())
    again = random.of(torch.arange(len(batch["y"]), device=batch["y"].device))
    with engine.applied(model, batch["x"]):
        x_adv = craft(model, batch, random)
        claimed = is_wrong(model, batch["y"], x_adv)
    columns = judged(model, batch, x_adv, threat, idle=idle())
    left = columns["correct"] if engine.is_reduced else columns["correct"] & claimed
    rows = left.nonzero().flatten()
    if len(rows) == 0:
        return columns
    slower = engine.in_float32() if engine.is_reduced else None
    rest = attacked(craft, threat, slower, model, part_of(batch, rows), again.of(rows), idle)
    return merged(columns, rest, rows)


def autoattacked(
    attack: AutoAttack,
    part: str,
    seed: int,
    inner: InnerLoss | None,
    engine: AttackEngine | None,
    model: Any,
    batch: Batch,
    random: ExampleRandom,
) -> Columns:
    """The same for one attack of the official AutoAttack, whose noise belongs to the batch.

    The package gets the engine's network. Where it reports a success that the plain network does
    not confirm, the plain network is attacked too.

    Args:
        attack: The ensemble.
        part: Which of its attacks.
        seed: Of the package.
        inner: A loss that the defence declares.
        engine: Computes its passes; ``None`` for the plain network.
        model: Images to logits, in evaluation mode.
        batch: The examples.
        random: Unused; the package has its own.
    """
    threat = Threat(attack.norm, attack.eps)
    steered = None if inner is None else partial(_steered, inner, model)
    if engine is None:
        x_adv, correct = attack.step(part, model, batch["x"], batch["y"], seed, steered)
        return _found(judged(model, batch, x_adv, threat, correct))
    with engine.applied(model, batch["x"]):
        x_adv, correct = attack.step(
            part,
            engine.wrap(model),
            batch["x"],
            batch["y"],
            seed,
            None if steered is None else engine.wrap(steered),
            skips_repeats=True,
        )
    held = correct | ~is_wrong(model, batch["y"], x_adv)
    columns = _found(judged(model, batch, x_adv, threat, held))
    # In float32 only what the two networks see differently, one in thousands, is left to settle.
    left = (held if engine.is_reduced else held & ~correct).nonzero().flatten()
    if len(left) == 0:
        return columns
    slower = engine.in_float32() if engine.is_reduced else None
    rest = autoattacked(
        attack, part, seed, inner, slower, model, part_of(batch, left), random.of(left)
    )
    return merged(columns, rest, left)


def _found(columns: Columns) -> Columns:
    """Where it has no success the package returns x, whose distance tells nothing."""
    return columns | {"moved": torch.ones_like(columns["correct"])}


def part_of(batch: Batch, rows: Tensor) -> Batch:
    """Some examples of a batch."""
    return {key: value[rows] for key, value in batch.items()}


def merged(columns: Columns, others: Columns, rows: Tensor) -> Columns:
    """Columns in which some rows are replaced."""
    return {name: column.index_copy(0, rows, others[name]) for name, column in columns.items()}


def _steered(inner: InnerLoss, model: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return model(x), inner(model, {"x": x, "y": y})(x)
