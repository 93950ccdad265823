"""Attacks with and without an engine, and further attempts where an attack proves nothing.

An example counts as broken only if the plain float32 network misclassifies it. What an attack in
reduced precision does not break is attacked again in float32 with the same random numbers, so an
engine makes no attack weaker.

An example that withstands a gradient attack without a usable gradient, or with one that squashing
distorts, is attacked again: through the scores before squashing, then through what the network
detaches or rounds, and last by labels only.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from common.attacks.autoattack import AutoAttack
from common.attacks.decision import DecisionBased
from common.attacks.engine.network import AttackEngine
from common.attacks.losses import margin
from common.attacks.pgd import input_gradient
from common.attacks.randomness import ExampleRandom, seeded
from common.attacks.settings import Budget
from common.evaluation.audit.gradients import anchored, eager, straight_through, undetached
from common.evaluation.passes import hearing, makes_logits
from common.evaluation.steps import in_ball, is_wrong, judged, predict
from common.networks.parts import Part, parts_of, telling
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
    engine's network misclassifies them, or if the attack found no direction for them there. With
    one in reduced precision, all that the plain network still classifies correctly are attacked
    again in float32. ``idle`` is called after the attack and says which examples it found no
    direction for.
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
    without = idle()
    columns = judged(model, batch, x_adv, threat, correct, without)
    if correct is not None:  # without success the package returns x, so the distance says nothing
        columns["moved"] = torch.ones_like(correct)
    is_reduced = engine is not None and engine.is_reduced
    if engine is None:
        return columns
    is_open = claimed | is_reduced if without is None else claimed | is_reduced | without
    rows = (columns["correct"] & is_open).nonzero().flatten()
    if len(rows) == 0:
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


def _steered(inner: Any, model: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    batch = {"x": x, "y": y}
    if makes_logits(inner):
        both: tuple[Tensor, Tensor] = inner.with_logits(model, batch)(x)
        return both
    return model(x), inner(model, batch)(x)


Run = Callable[[AttackEngine | None, Any, Batch, ExampleRandom], Columns]
"""(engine, model, batch, random numbers) -> outcomes of an attack."""

PERSISTED = Budget(forward=2, backward=1)
"""Passes that look for a usable gradient where an attack ended, and for squashing."""
QUERIES = 500
"""Labels per example of the attack by labels only."""
SPREAD = 10.0
"""Between the largest and the smallest score that a loss gets to see; no softmax saturates."""
UNDISTORTED = 0.99
"""Least cosine of the margin's gradient before and after squashing."""


def persisted(
    run: Run,
    inner: InnerLoss,
    threat: Threat | None,
    engine: AttackEngine | None,
    is_repeatable: bool,
    model: Any,
    batch: Batch,
    random: ExampleRandom,
) -> Columns:
    """An attack that climbs ``inner``, and further ones on examples without a usable gradient.

    One that is repeatable would do the same again where the loss stays the same, up to the rounding
    of an engine.

    Adds two columns, bool ``(N,)``, for examples that withstood the first attack: ``unmoved``, the
    loss has no finite gradient other than zero at x and where the attack ended; ``distorted``,
    squashing turns the margin's gradient where it ended.
    """
    again = random.of(torch.arange(len(batch["y"]), device=batch["y"].device))
    columns = run(engine, model, batch, random)
    unmoved = torch.zeros_like(batch["y"], dtype=torch.bool)
    distorted = unmoved.clone()
    rows = columns["correct"].nonzero().flatten()
    if len(rows) > 0 and isinstance(model, nn.Module):
        part, ends = part_of(batch, rows), columns["x_adv"][rows]
        unmoved[rows] = ~_has_gradient(inner, model, part, ends)
        position = _before_squashing(model, batch["x"])
        if position is not None:
            distorted[rows] = _is_distorted(model, position, part, ends)
        if "moved" in columns:
            columns["moved"] &= ~unmoved
        rows = (unmoved | distorted).nonzero().flatten()
        would_repeat = is_repeatable and len(rows) > 0
        if not would_repeat or _calls_forward(inner, model, batch):
            columns = _attacked_again(run, inner, position, model, batch, again, columns, rows)
        rows = (unmoved & columns["correct"]).nonzero().flatten()
        if len(rows) > 0 and threat is not None:
            attack = DecisionBased(threat.radius, threat.norm, QUERIES)
            found = decided(attack, model, part_of(batch, rows), again.of(rows))
            columns = _improved(columns, found, rows)
    return columns | {"unmoved": unmoved, "distorted": distorted}


def _attacked_again(
    run: Run,
    inner: InnerLoss,
    position: int | None,
    model: nn.Module,
    batch: Batch,
    random: ExampleRandom,
    columns: Columns,
    rows: Tensor,
) -> Columns:
    """The columns with those rows replaced that the attack breaks through other gradients."""
    for is_bridged in (False, True):
        if len(rows) == 0:
            break
        part = part_of(batch, rows)
        try:
            with seen_through(model, position, is_bridged):
                found = run(None, model, part, random.of(rows))
                is_flat = ~_has_gradient(inner, model, part, found["x_adv"])
        except Exception as error:  # foreign code can fail in any way when it is run differently
            if not is_bridged or isinstance(error, torch.OutOfMemoryError):
                raise
            break
        columns = _improved(columns, found, rows)
        rows = rows[found["correct"] & is_flat]
    return columns


def _calls_forward(inner: InnerLoss, model: nn.Module, batch: Batch) -> bool:
    """Whether the loss calls the model as a whole, and so meets what :func:`seen_through` does."""
    x = batch["x"][:1].detach().clone().requires_grad_()
    with seeded(0, x.device), torch.enable_grad(), seen_through(model, None, False) as seen:
        inner(model, part_of(batch, torch.zeros(1, dtype=torch.long, device=x.device)))(x)
    return bool(seen)


def _improved(columns: Columns, found: Columns, rows: Tensor) -> Columns:
    if "moved" in columns:
        columns["moved"][rows] |= found["moved"]
    fell = ~found["correct"]
    return merged(columns, part_of(found, fell), rows[fell])


def decided(attack: DecisionBased, model: Any, batch: Batch, random: ExampleRandom) -> Columns:
    """Outcomes of a decision-based attack."""
    x, threat = batch["x"], Threat(attack.norm, attack.eps)
    x_adv = attack(lambda x: predict(model, x), x, batch["y"], random)
    found = judged(model, batch, x_adv, threat)["correct"].logical_not()
    x_adv = torch.where(found.view(-1, *[1] * (x.ndim - 1)), x_adv, x)  # the nearest may be outside
    columns = judged(model, batch, x_adv, threat)
    return columns | {"moved": torch.ones_like(columns["correct"])}  # it searched the whole ball


def _has_gradient(inner: InnerLoss, model: Any, batch: Batch, ends: Tensor) -> Tensor:
    """Whether the loss has a finite gradient other than zero at x or at the ends, ``(N,)``."""
    found = torch.zeros_like(batch["y"], dtype=torch.bool)
    for x in (ends, batch["x"]):
        rows = (~found).nonzero().flatten()
        if len(rows) > 0:
            loss = anchored(inner(model, part_of(batch, rows)))
            gradient = input_gradient(loss, x[rows]).flatten(1).nan_to_num(0.0, 0.0, 0.0)
            found[rows] = gradient.abs().amax(dim=1) > 0.0
    return found


def _is_distorted(model: nn.Module, position: int, batch: Batch, x: Tensor) -> Tensor:
    """Whether squashing turns the margin's gradient, bool ``(N,)``; a vanishing one counts."""
    gradients = []
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        output, found = _recorded(model, x)
        for scores in (output, found[position]):
            value = margin(scores, batch["y"])
            gradient = torch.zeros_like(x)
            if value.requires_grad:
                (gradient,) = torch.autograd.grad(value.sum(), x, retain_graph=True)
            gradients.append(gradient.flatten(1))
    # Scaled first: the squares of a saturated gradient underflow.
    squashed, raw = (F.normalize(g, torch.inf, eps=1e-45) for g in gradients)
    cosine = F.cosine_similarity(squashed, raw)
    return ~(cosine >= UNDISTORTED) & raw.any(dim=1)


class _Recorder(TorchFunctionMode):
    """Keeps every tensor that has one number for each image and class.

    Args:
        n: Number of images.
        classes: Number of classes.
        turned: Of which of them the classes are exchanged for what follows.
    """

    def __init__(self, n: int, classes: int, turned: int | None) -> None:
        super().__init__()
        self._shape, self._turned = (n, classes), turned
        self.found: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        n, classes = self._shape
        is_score = isinstance(out, Tensor) and out.is_floating_point() and out.shape[:1] == (n,)
        if is_score and out.numel() == n * classes:
            # A copy, since what follows may overwrite it.
            self.found.append(out.reshape(n, classes).clone())
            if len(self.found) - 1 == self._turned:
                return self.found[-1].roll(1, dims=1).reshape(out.shape)
        return out


def _recorded(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    *around: AbstractContextManager[Any],
    turned: int | None = None,
    parts: Sequence[Part] = (),
) -> tuple[Tensor, list[Tensor]]:
    """Scores of a pass inside the contexts, and the tensors of their shape on the way to them.

    What ``parts`` answer in the pass of one image that finds the number of classes is dropped.
    """
    with torch.no_grad(), telling(parts):
        classes = model(x[:1]).shape[1]
    recorder = _Recorder(len(x), classes, turned)
    with ExitStack() as stack:
        for context in (eager(), *around, recorder):
            stack.enter_context(context)
        return model(x), recorder.found


@torch.no_grad()
def _before_squashing(model: nn.Module, x: Tensor) -> int | None:
    """Which recorded tensor is the first that the scores come from, ranking the classes alike.

    ``None`` if that is the scores themselves, or nothing.
    """
    output, found = _recorded(model, x)
    for position, scores in enumerate(found):
        if _is_ranked_alike(scores, output):
            if torch.equal(scores, output):
                return None
            if _is_origin(model, x, position, output):
                return position
    return None


def _is_ranked_alike(scores: Tensor, output: Tensor) -> bool:
    chosen = scores.argmax(dim=1, keepdim=True)
    # Scores that saturate are tied, so the largest raw score need not be the only largest one.
    return torch.equal(output.gather(1, chosen).squeeze(1), output.amax(dim=1))


def _is_origin(model: nn.Module, x: Tensor, position: int, output: Tensor) -> bool:
    """Whether the scores come from a recorded tensor: other values there make other scores.

    An auxiliary head that ranks the classes alike and lies beside the scores is none. One that
    steers them, as the probes of CIFS do, is: attacks through it break more of CAS than those
    through its output.
    """
    return not torch.equal(_recorded(model, x, turned=position)[0], output)


@contextmanager
def seen_through(model: nn.Module, position: int | None, is_bridged: bool) -> Iterator[list[int]]:
    """Forward passes with gradients return scores that an ascent can climb.

    Those are the recorded scores at ``position`` (``None``: the output), scaled to a spread of
    :data:`SPREAD`, with the class of the output on top. Passes without gradients, by which success
    is judged, stay as they are. If bridged, gradients pass through what the model detaches or
    rounds. Yields the sizes of passes with gradients.
    """
    is_own = "forward" in vars(model)
    plain, parts, seen = model.forward, parts_of(model), list[int]()

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not (torch.is_grad_enabled() and x.requires_grad):
            return plain(x, *args, **kwargs)
        seen.append(len(x))
        bridges = (undetached(), straight_through(model)) if is_bridged else ()
        output, found = _recorded(
            lambda x: plain(x.clone(), *args, **kwargs), x, *bridges, parts=parts
        )
        recorded = [] if position is None else found[position : position + 1]
        return _climbable(recorded[0] if recorded else output, output)

    model.forward = forward
    try:
        yield seen
    finally:
        if is_own:
            model.forward = plain
        else:
            del model.forward


def _climbable(scores: Tensor, output: Tensor) -> Tensor:
    """The scores in a fixed spread; the class of the output is made the largest."""
    with torch.no_grad():
        top, bottom = scores.amax(dim=1, keepdim=True), scores.amin(dim=1, keepdim=True)
        spread = (top - bottom).clamp_min(torch.finfo(scores.dtype).tiny)
        chosen = output.argmax(dim=1, keepdim=True)
        is_top = scores.argmax(dim=1, keepdim=True) == chosen
        lift = (top - scores.gather(1, chosen) + 1e-3 * spread).masked_fill(is_top, 0.0)
        shift = torch.zeros_like(scores).scatter_(1, chosen, lift)
    return (scores + shift) * (SPREAD / spread)


def settled(
    model: nn.Module, batch: Batch, threat: Threat | None, attack: Callable[[], Columns]
) -> Columns:
    """Outcomes of an attack, where any image with scores that are not finite is adversarial.

    Attacks move on from such an image, or stop there with a NaN gradient. If a forward pass had
    one, the attack is repeated, and the first such image inside the ball is kept for each example
    that withstood the first run. Calls of ``attack`` have to make the same forward passes.
    """
    seen = torch.zeros((), dtype=torch.bool, device=batch["x"].device)

    def notice(_: Tensor, scores: Tensor) -> None:
        seen.logical_or_(~torch.isfinite(scores).all())  # without waiting for the device

    with hearing(model, notice):
        columns = attack()
    if threat is None or not bool(seen) or not bool(columns["correct"].any()):
        return columns
    images, found = batch["x"].clone(), ~columns["correct"]

    def keep(x: Tensor, scores: Tensor) -> None:
        is_finite = torch.isfinite(scores.detach()).unsqueeze(-1).flatten(1).all(dim=1)
        x = x.detach()[~is_finite]
        if len(x) == 0 or x.shape[1:] != images.shape[1:]:
            return
        for row in (~found).nonzero().flatten().tolist():
            inside = in_ball(x, batch["x"][row], threat)
            if bool(inside.any()):
                images[row], found[row] = x[inside][0], True

    with hearing(model, keep):
        attack()
    rows = (found & columns["correct"]).nonzero().flatten()
    if len(rows) == 0:
        return columns
    others = judged(model, part_of(batch, rows), images[rows], threat)
    broken = ~others["correct"]
    judged_again = {name: columns[name] for name in others}
    return columns | merged(judged_again, part_of(others, broken), rows[broken])
