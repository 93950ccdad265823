"""Checks for gradient masking: whether robustness may be an artefact of attacks that fail.

The checks are those that Carlini et al. 2019 ("On evaluating adversarial robustness") ask of every
evaluation, and by which Athalye, Carlini & Wagner 2018 ("Obfuscated gradients"), Uesato et al. 2018
("Adversarial risk and the dangers of evaluating against weak attacks") and Tramèr et al. 2020 ("On
adaptive attacks") found defences broken. Passing them does not prove robustness; failing one means
that accuracies under attack may be too high.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from common.attacks.autoattack import AutoAttack
from common.attacks.decision import DecisionBased
from common.attacks.geometry import check_count, norm_of, per_example
from common.attacks.losses import classify, cross_entropy
from common.attacks.pgd import FGSM, PGD, LossFn
from common.attacks.randomness import ExampleRandom
from common.attacks.settings import Budget
from common.evaluation.audit import verdicts
from common.evaluation.audit.gradients import anchored, straight_through, undetached
from common.evaluation.audit.probes import (
    BUDGETS,
    DIRECTIONS,
    FINE_STEP,
    MemoryProbe,
    forward,
    gradients,
)
from common.evaluation.confirm import decided
from common.evaluation.steps import JUDGED, Step, is_wrong, judged
from common.evaluation.suite import resolve_losses
from common.evaluation.transfer import MIXED, NOISY, DistilledTransfer, Transfer
from common.objectives import Batch, InnerLoss
from common.results.labels import Checkpoint, check_checkpoints
from common.results.lines import Columns, Outcomes, Threat
from common.results.schema import AuditResult

Run = Callable[[Any, Batch, ExampleRandom], Columns]

SCALES = {"scale=0.1": 0.1, "scale=1": 1.0, "margin=1": None}
TARGETS = 9  # classes, as many as AutoAttack aims at


class Audit:
    """What a sceptical reader would try on a robust model.

    Attacks run on the examples that are right without one. Where a model declares several losses,
    an example is broken if climbing any of them breaks it. By default an example costs about 1,200
    forward and backward passes per loss and up to 2,700 forward passes: a few minutes for a ResNet
    on a GPU.

    Args:
        examples: Number of examples, of all classes in proportion.
        losses: Patterns over the losses that the model declares; by default ``ce_*``.
        steps: Of the attacks that others are compared with.
        restarts: Most restarts of an ascent.
        square_queries: Queries of the black-box attack (Square, Andriushchenko et al. 2020).
        random_samples: Points per example of the random search.
        decision_queries: Labels per example of the decision-based attack (RayS, HopSkipJump). It
            runs on what withstood all other attacks within the threat model.
        max_eps: Where accuracy has to be at chance; by default the whole box.
        transfer: A surrogate for transfer attacks: a checkpoint of a run, or a network. ``None``
            distils one from the model's labels for the images of the audit.
        checkpoints: Run for checkpoints of these names only (``last``, ``selected``).

    Raises:
        ConfigurationError: If a number is out of range.
    """

    def __init__(
        self,
        examples: int = 200,
        losses: list[str] | None = None,
        steps: int = 40,
        restarts: int = 10,
        square_queries: int = 1000,
        random_samples: int = 500,
        decision_queries: int = 1000,
        max_eps: float | None = None,
        transfer: str | nn.Module | None = None,
        checkpoints: list[Checkpoint] | None = None,
    ) -> None:
        self.examples = check_count("the audit's examples", examples, 1)
        self.losses = losses or ["ce_*"]
        self.iterations = check_count("the audit's steps", steps, 1)
        self.restarts = check_count("the audit's restarts", restarts, 1)
        self.square_queries = check_count("the audit's square_queries", square_queries, 1)
        self.random_samples = check_count("the audit's random_samples", random_samples, 1)
        self.decision_queries = check_count("the audit's decision_queries", decision_queries, 1)
        self.max_eps = max_eps
        self.transfer = transfer
        self.checkpoints = check_checkpoints("the audit", checkpoints)

    def steps(self, model: Any, threat: Threat, num_classes: int) -> list[Step]:
        """Attacks and measurements, for :func:`common.evaluation.runner.run_steps`."""
        losses = resolve_losses(self.losses, model)
        return list(self._steps(losses, threat, num_classes, MemoryProbe(model, threat)))

    def _steps(
        self, losses: Mapping[str, InnerLoss], threat: Threat, num_classes: int, memory: MemoryProbe
    ) -> Iterator[Step]:
        eps, norm = threat.radius, threat.norm
        whole: dict[str, Any] = {
            "norm": norm,
            "eps": eps,
            "losses": list(losses),
            "num_classes": num_classes,
        }

        def step(key: str, run: Run, settings: Mapping[str, Any], **given: Any) -> Step:
            fields: dict[str, Any] = {"threat": threat, "examples": self.examples} | given
            return Step(key, key.split("/")[0], run, whole | dict(settings), **fields)

        def ascent(key: str, attack: PGD, path: str = "default", **given: Any) -> Step:
            run = _Ascent(attack, losses, given.get("threat", threat), path)
            return step(key, run, attack.settings() | {"path": path}, budget=run.budget, **given)

        plain = PGD(eps, steps=self.iterations, norm=norm)
        usual, settings = _Ascent(plain, losses, threat), plain.settings()
        yield ascent("audit_fgsm", FGSM(eps, norm=norm))
        for count in sorted(
            {1, max(self.iterations // 4, 1), self.iterations, 5 * self.iterations}
        ):
            yield ascent(f"audit_steps/steps={count}", plain.but(steps=count))
        targets = settings | {"targets": TARGETS}
        aims = min(TARGETS, num_classes - 1)
        given: dict[str, Any] = {"budget": plain.budget.plus(JUDGED).times(aims).plus(Budget(2))}
        yield step("audit_steps/targeted", usual.targeted, targets, cumulative=True, **given)
        restarted = partial(usual.restarted, self.restarts)
        given = {"budget": usual.budget.times(self.restarts).plus(JUDGED)}
        yield step("audit_restarts", restarted, settings | {"runs": self.restarts}, **given)
        for path in ("default", "undetached", "straight_through"):
            yield ascent(f"audit_path/{path}", plain, path)
        for name, scale in SCALES.items():
            run = partial(usual.rescaled, scale)
            given = {"budget": plain.budget.plus(Budget(2))}
            yield step(f"audit_scale/{name}", run, settings | {"scale": scale}, **given)
        for radius in self._radii(threat):
            given = {"threat": Threat(norm, radius), "cumulative": True, "at": {"eps": radius}}
            yield ascent(f"audit_eps/eps={radius:.6g}", plain.but(eps=radius), **given)
        yield from self._without_gradient(step, threat, num_classes)
        yield from self._measured(step, threat, losses, memory)

    def _without_gradient(
        self, step: Callable[..., Step], threat: Threat, num_classes: int
    ) -> Iterator[Step]:
        """Attacks that use no gradient of the model."""
        eps, norm = threat.radius, threat.norm
        samples = partial(_random_search, self.random_samples, threat)
        given = {"budget": Budget(self.random_samples + 2)}
        yield step("audit_random", samples, {"samples": self.random_samples}, **given)
        square = AutoAttack(eps, norm, "custom", ["square"], square_queries=self.square_queries)
        given = {"budget": square.budget("square", num_classes).plus(JUDGED)}
        yield step("audit_square", partial(_square, square, threat), square.settings(), **given)
        yield self._transferred(step, PGD(eps, steps=self.iterations, norm=norm))
        decision = DecisionBased(eps, norm, self.decision_queries)
        yield step(
            "audit_decision",
            partial(decided, decision),
            decision.settings(),
            scope="standing",
            budget=decision.budget.plus(JUDGED.times(2)),
        )

    def _measured(
        self,
        step: Callable[..., Step],
        threat: Threat,
        losses: Mapping[str, InnerLoss],
        memory: MemoryProbe,
    ) -> Iterator[Step]:
        """Measurements of the model."""
        probe: dict[str, Any] = {"kind": "probe", "scope": "all", "threat": None}
        measure = partial(gradients, losses, threat)
        directions = {"h": FINE_STEP, "directions": DIRECTIONS}
        each, other = BUDGETS["derivatives"], BUDGETS["gradient"]
        beside = int(len(losses) > 1)  # the logits, with which several losses are compared
        passes = each.times(len(losses) + beside).plus(other.times(len(losses) + 1))
        yield step("audit_gradients", measure, directions, budget=passes, **probe)
        yield step("audit_forward", forward, {}, budget=BUDGETS["forward"], **probe)
        yield step("audit_memory", memory, {}, budget=BUDGETS["memory"], **probe)

    def _transferred(self, step: Callable[..., Step], plain: PGD) -> Step:
        if self.transfer is None:
            distilled = DistilledTransfer(plain)
            given: dict[str, Any] = {"batch_size": self.examples}  # it is distilled from all
            given["budget"] = JUDGED.times(2 + NOISY + MIXED)
            return step("audit_transfer", distilled.run, distilled.settings(), **given)
        transfer = Transfer(plain, self.transfer)
        given = {"networks": (transfer.network,), "budget": JUDGED}
        return step("audit_transfer", transfer.run, transfer.settings(), **given)

    def _radii(self, threat: Threat) -> list[float]:
        """Radii from that of the threat model to the whole box, doubling."""
        # No image has a larger diameter than one of 512 x 512 x 3 pixels; see _ascent for others.
        diameter = {"linf": 1.0, "l2": 887.0, "l1": 786432.0}[threat.norm]
        last = max(self.max_eps or diameter, threat.radius)
        radii = [threat.radius]
        while radii[-1] < last:
            radii.append(min(max(2.0 * radii[-1], last / 2**20), last))
        return radii

    def report(self, outcomes: Outcomes, num_classes: int) -> AuditResult:
        """Questions, numbers and verdicts about a run of :meth:`steps`."""
        return verdicts.report(outcomes, num_classes, self.restarts)


@dataclass(frozen=True)
class _Ascent:
    """Ascents of the losses that a model declares.

    The path ``undetached`` follows gradients through what the model cuts, ``straight_through`` also
    through steps.
    """

    attack: PGD
    losses: Mapping[str, InnerLoss]
    threat: Threat
    path: str = "default"

    @property
    def budget(self) -> Budget:
        """The most passes per image."""
        compared = len(self.losses) if len(self.losses) > 1 else 0
        return self.attack.budget.times(len(self.losses)).plus(Budget(compared)).plus(JUDGED)

    def __call__(self, model: Any, batch: Batch, random: ExampleRandom) -> Columns:
        """The strongest over the losses; ``ran`` is false where a path has no backward."""
        x, y, attack = batch["x"], batch["y"], self.attack
        whole = self.threat.diameter(x)
        if attack.eps >= 2.0 * whole:  # half the radius has been the whole box already
            return judged(model, batch, x, self.threat)
        if attack.eps > whole:
            attack = attack.but(eps=whole)
        wrong = partial(is_wrong, model, y)
        ran = torch.ones(len(y), dtype=torch.bool)
        idle = torch.ones(len(y), dtype=torch.bool, device=x.device)
        found = []
        for inner in self.losses.values():
            loss = anchored(self._through(model, inner(model, batch)))
            try:
                found.append(attack(loss, x, random, is_adversarial=wrong))
                idle &= attack.idle if attack.idle is not None else idle
            except Exception as error:  # foreign code fails in any way when it is run differently
                if self.path == "default" or isinstance(error, torch.OutOfMemoryError):
                    raise
                ran[:] = False
                found.append(x)
        columns = judged(model, batch, _strongest(model, y, found), self.threat, idle=idle)
        return columns | ({} if self.path == "default" else {"ran": ran})

    def _through(self, model: Any, loss_fn: LossFn) -> LossFn:
        def loss(x: Tensor) -> Tensor:
            with ExitStack() as around:
                around.enter_context(undetached())
                if self.path == "straight_through":
                    around.enter_context(straight_through(model))
                return loss_fn(x.clone())

        return loss_fn if self.path == "default" else loss

    def restarted(self, runs: int, model: Any, batch: Batch, random: ExampleRandom) -> Columns:
        """Ascents from several starts; ``restart`` is the first successful one, or ``runs + 1``."""
        x = batch["x"]
        first = torch.full((len(x),), runs + 1.0, device=x.device)
        best = x
        for run in range(1, runs + 1):
            columns = self(model, batch, random)
            fell = ~columns["correct"] & (first > runs)
            first = first.masked_fill(fell, run)
            best = torch.where(per_example(fell, x), columns["x_adv"], best)
            if bool((first <= runs).all()):
                break
        return judged(model, batch, best, self.threat) | {"restart": first}

    def rescaled(
        self, scale: float | None, model: Any, batch: Batch, random: ExampleRandom
    ) -> Columns:
        """Cross-entropy of scaled logits; ``None`` lowers clean margins to at most 1."""
        y = batch["y"]
        factor: Tensor | float = 1.0 if scale is None else scale
        if scale is None:
            with torch.no_grad():
                top = model(batch["x"]).topk(2, dim=1).values
            factor = 1.0 / (top[:, :1] - top[:, 1:]).clamp_min(1.0)
        loss = anchored(lambda x: cross_entropy(model(x) * factor, y))
        wrong = partial(is_wrong, model, y)
        x_adv = self.attack(loss, batch["x"], random, is_adversarial=wrong)
        return judged(model, batch, x_adv, self.threat)

    def targeted(self, model: Any, batch: Batch, random: ExampleRandom) -> Columns:
        """Ascents towards the classes with the largest scores, until one succeeds."""
        x, y = batch["x"], batch["y"]
        with torch.no_grad():
            others = model(x).scatter(1, y[:, None], -torch.inf).argsort(dim=1, descending=True)
        best, standing = x, torch.ones_like(y, dtype=torch.bool)
        for target in others[:, :TARGETS].T[: others.shape[1] - 1]:

            def loss(x: Tensor, target: Tensor = target) -> Tensor:
                logits: Tensor = model(x)
                return (logits.gather(1, target[:, None]) - logits.gather(1, y[:, None])).squeeze(1)

            x_adv = self.attack(anchored(loss), x, random)
            fell = standing & is_wrong(model, y, x_adv)
            best, standing = torch.where(per_example(fell, x), x_adv, best), standing & ~fell
        return judged(model, batch, best, self.threat)


def _strongest(model: Any, y: Tensor, found: list[Tensor]) -> Tensor:
    """Of several images per example a misclassified one if there is one, then by loss."""
    if len(found) == 1:
        return found[0]
    with torch.no_grad():
        logits = [model(x_adv) for x_adv in found]
    loss = torch.stack([cross_entropy(z, y).nan_to_num(0.0) for z in logits])
    wrong = torch.stack([classify(z) != y for z in logits])
    best = loss.masked_fill(~wrong & wrong.any(dim=0), -torch.inf).argmax(dim=0)
    return torch.stack(found)[best, torch.arange(len(y), device=best.device)]


def _square(
    attack: AutoAttack, threat: Threat, model: Any, batch: Batch, random: ExampleRandom
) -> Columns:
    seed = int(random.integers(2**31, (1,))[0])
    x_adv, _ = attack.step("square", model, batch["x"], batch["y"], seed)
    # Where it does not succeed the package returns x, whose distance tells nothing.
    columns = judged(model, batch, x_adv, threat)
    return columns | {"moved": torch.ones_like(columns["correct"])}


def _random_search(
    samples: int, threat: Threat, model: Any, batch: Batch, random: ExampleRandom
) -> Columns:
    """Points of the ball, half of them extreme ones, until one is misclassified."""
    x, y = batch["x"], batch["y"]
    uniform = PGD(threat.radius, steps=0, norm=threat.norm)
    x_adv, standing = x, ~is_wrong(model, y, x)
    for i in range(samples):
        if not standing.any():
            break
        corner = (x + _extreme(x, threat, random)).clamp(0.0, 1.0)
        point = corner if i % 2 else uniform(lambda x: x.flatten(1).sum(dim=1), x, random)
        fell = standing & is_wrong(model, y, point)
        x_adv = torch.where(per_example(fell, x), point, x_adv)
        standing = standing & ~fell
    return judged(model, batch, x_adv, threat)


def _extreme(x: Tensor, threat: Threat, random: ExampleRandom) -> Tensor:
    """A corner of the cube, a point of the sphere, or one entry of the l1 ball."""
    normal = random.normal(x.shape[1:]).to(x)
    if threat.norm == "linf":
        return normal.sign() * threat.radius
    if threat.norm == "l1":
        largest = normal.abs() == norm_of(normal, math.inf)
        return normal.sign() * largest * threat.radius
    return normal / norm_of(normal, 2) * threat.radius
