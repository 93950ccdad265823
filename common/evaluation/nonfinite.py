"""Images with NaN or infinite scores that an attack came across and did not return."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from common.evaluation.steps import Columns, Threat, in_ball, judged
from common.objectives import Batch


def settled(
    model: nn.Module, batch: Batch, threat: Threat | None, attack: Callable[[], Columns]
) -> Columns:
    """What an attack finds, where any image with scores that are not finite is adversarial.

    An attack moves on from such an image, or is stopped there by a gradient that is NaN. If there
    were any in its forward passes, it runs a second time, which repeats it, and the first such
    image inside the ball is kept for each example that withstood the first run.

    Args:
        model: Images to logits.
        batch: The examples.
        threat: The ball; without one nothing is kept.
        attack: Runs it; the same forward passes every time.
    """
    seen = torch.zeros((), dtype=torch.bool, device=batch["x"].device)

    def notice(_: nn.Module, args: tuple[Any, ...], logits: Any) -> None:
        seen.logical_or_(~torch.isfinite(logits).all())  # nothing waits for the device here

    with _hooked(model, notice):
        columns = attack()
    if threat is None or not bool(seen) or not bool(columns["correct"].any()):
        return columns
    images, found = batch["x"].clone(), ~columns["correct"]

    def keep(_: nn.Module, args: tuple[Any, ...], logits: Any) -> None:
        x = args[0].detach()[~torch.isfinite(logits.detach()).all(dim=1)]
        if len(x) == 0 or x.shape[1:] != images.shape[1:]:
            return
        for row in (~found).nonzero().flatten().tolist():
            inside = in_ball(x, batch["x"][row], threat)
            if bool(inside.any()):
                images[row], found[row] = x[inside][0], True

    with _hooked(model, keep):
        attack()
    rows = (found & columns["correct"]).nonzero().flatten()
    if len(rows) == 0:
        return columns
    others = judged(model, {key: value[rows] for key, value in batch.items()}, images[rows], threat)
    broken = rows[~others["correct"]]
    for name, column in others.items():
        columns[name] = columns[name].index_copy(0, broken, column[~others["correct"]])
    return columns


@contextmanager
def _hooked(model: nn.Module, hook: Callable[..., None]) -> Iterator[None]:
    handle = model.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
