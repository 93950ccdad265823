"""Suites: the attacks of an evaluation by name, and their steps."""

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor

from common.attacks.autoattack import AutoAttack
from common.attacks.decision import DecisionBased
from common.attacks.engine.network import AttackEngine
from common.attacks.gama import GAMAPGD
from common.attacks.geometry import parse_radius
from common.attacks.losses import cross_entropy, margin, probability_margin
from common.attacks.minimum_norm import MinimumNorm
from common.attacks.noise import Noise
from common.attacks.pgd import PGD, FriendlyPGD, LossFn, check_points, climb_until_broken
from common.attacks.randomness import ExampleRandom, Stream
from common.attacks.settings import Budget
from common.errors import ConfigurationError
from common.evaluation.confirm import (
    PERSISTED,
    QUERIES,
    Craft,
    Crafted,
    attacked,
    decided,
    official,
    part_of,
    persisted,
)
from common.evaluation.corruptions import Corruptions
from common.evaluation.passes import counting, makes_logits
from common.evaluation.saved import SavedExamples
from common.evaluation.steps import JUDGED, Step, is_wrong, judged
from common.evaluation.transfer import Transfer
from common.limits import check_label
from common.objectives import Batch, InnerLoss, OnLogits
from common.results.labels import Checkpoint, check_checkpoints
from common.results.lines import Columns, Threat

Attack = (
    PGD
    | AutoAttack
    | GAMAPGD
    | MinimumNorm
    | DecisionBased
    | Noise
    | Transfer
    | SavedExamples
    | Corruptions
)

MARGIN = OnLogits(margin)
"""The loss by which gradients of an attack with a loss on logits are judged."""

_LOG = logging.getLogger(__name__)


@dataclass
class SuiteEntry:
    """One line of a suite: an attack, and what it maximises.

    Args:
        attack: A projected ascent, run once per loss; or one that brings its own losses.
        losses: Patterns (``ce_f``, ``ce_*``, ``cw_joint*``) over the losses that the model
            declares in ``adaptive_losses``, ``model`` for the inner loss it was trained with, and
            ``pm_f`` for the margin of probabilities.
            AutoAttack takes one: ``ce_f`` leaves it as it is, another steers APGD-CE and Square.
            DeepFool, C&W, GAMA, transfer, noise, corruptions and decision-based attacks take none.
        survivors_only: Attack only examples that withstood every earlier entry. Outcomes are then
            cumulative: cheaper, the same worst case, but no accuracy under this attack alone.
        all_images: Also attack images that are misclassified without an attack, and count them as
            correct where the attack makes them so, like codes that attack whole batches. They stay
            wrong in the worst case.
        examples: Attack only this number, see :func:`common.data.subset.subset`.
        checkpoints: Run for checkpoints of these names only (``last``, ``selected``).
        sweep: Arguments of the attack and the values they take in turn, such as
            ``{eps: [2/255, 4/255, 8/255]}`` or ``{steps: [1, 10, 100]}``: a curve in the results.
        eot: Average losses over this number of forward passes (expectation over transformation,
            Athalye, Carlini & Wagner 2018, Section 4.2); for projected ascents on random networks.
        until_broken: Stop attacking an example once it is misclassified, instead of judging where
            the ascent ends: faster, and never fewer examples are broken. For projected ascents on
            deterministic networks.

    Raises:
        ConfigurationError: If a setting is out of range or does not apply to the attack.
    """

    attack: Attack
    losses: list[str] = field(default_factory=lambda: ["ce_f"])
    survivors_only: bool = False
    all_images: bool = False
    examples: int | None = None
    checkpoints: list[Checkpoint] | None = None
    sweep: dict[str, list[float | str]] | None = None
    eot: int = 1
    until_broken: bool = False

    def __post_init__(self) -> None:
        if not self.losses:
            raise ConfigurationError(
                "a suite entry with an empty list of losses attacks nothing; name at least one, "
                "for instance losses: [ce_f]"
            )
        for name, value in (("examples", self.examples), ("eot", self.eot)):
            if value is not None and value < 1:
                raise ConfigurationError(f"{name} of a suite entry must be at least 1, got {value}")
        check_checkpoints("a suite entry", self.checkpoints)
        for reason in self._unused():
            raise ConfigurationError(f"{reason} (the attack is {type(self.attack).__name__})")
        for name, values in (self.sweep or {}).items():
            if name not in self.attack.settings() or not values:
                raise ConfigurationError(
                    f"a sweep gives values for arguments of the attack, got {name}: {values}; "
                    f"{type(self.attack).__name__} takes {', '.join(self.attack.settings())}"
                )

    def _unused(self) -> Iterator[str]:
        """Settings that the attack does not use, as sentences."""
        attack = self.attack
        if self.eot > 1 and not isinstance(attack, PGD):
            yield (
                f"eot averages the losses of a projected ascent, got eot {self.eot}; drop eot "
                "(AutoAttack has version rand)"
            )
        if self.losses != ["ce_f"] and not isinstance(attack, PGD | AutoAttack):
            yield f"it climbs no loss of the model, got losses {self.losses}; drop losses"
        if self.survivors_only and (self.all_images or isinstance(attack, Noise | Corruptions)):
            yield (
                "survivors_only does not go with noise, corruptions or all_images; drop "
                "survivors_only"
            )
        if self.sweep and isinstance(attack, Corruptions):
            yield "it has a list of severities; drop sweep"
        if self.all_images and not isinstance(attack, PGD | GAMAPGD):
            yield "all_images is for projected ascents and GAMA; drop all_images"
        is_ascent = isinstance(attack, PGD) and not isinstance(attack, FriendlyPGD)
        if self.until_broken and (self.eot > 1 or not is_ascent):
            yield (
                "until_broken is for a projected ascent (PGD, MIM, FGSM) on a network without "
                f"random numbers, got eot {self.eot}; drop until_broken"
            )

    @property
    def effort(self) -> list[str]:
        """What is done beside the attack's own settings, in words."""
        words = {"until broken": self.until_broken, f"eot {self.eot}": self.eot > 1}
        return [word for word, applies in words.items() if applies]

    @property
    def uses_engine(self) -> bool:
        """Whether an engine computes the attack's passes."""
        others = Noise | Transfer | SavedExamples | DecisionBased | Corruptions
        return not isinstance(self.attack, others)

    def variants(self) -> Iterator[tuple[Any, dict[str, float]]]:
        """The attack at every point of the sweep, and the point."""
        points = []
        for values in itertools.product(*(self.sweep or {}).values()):
            changes = dict(zip(self.sweep or {}, values, strict=True))
            at = {name: parse_radius(value, "l2", name) for name, value in changes.items()}
            if at not in points:  # 4/255 and threat/2 may be the same
                points.append(at)
                yield self.attack.but(**changes) if changes else self.attack, at


def resolve_losses(patterns: list[str], model: Any) -> dict[str, InnerLoss]:
    """The losses of ``model`` that match any of the patterns, in the order of the declaration.

    A pattern that matches nothing is refused; the message lists what there is.
    """
    declared: dict[str, InnerLoss] = {"pm_f": OnLogits(probability_margin)}
    declared |= model.adaptive_losses()
    if hasattr(model, "objective"):
        declared["model"] = model.objective.inner
    found: set[str] = set()
    for pattern in patterns:
        matches = [name for name in declared if fnmatchcase(name, pattern)]
        if not matches:
            raise ConfigurationError(
                f"no loss of {type(model).__name__} matches {pattern!r}; it declares "
                f"{', '.join(declared)}"
            )
        found.update(matches)
    return {name: counting(loss) for name, loss in declared.items() if name in found}


def check_entries(suite: Mapping[str, SuiteEntry]) -> None:
    """Refuse names that results cannot have, and values that are no entry."""
    for name, entry in suite.items():
        if not isinstance(entry, SuiteEntry):
            raise ConfigurationError(
                f"the suite entry {name!r} must be a common.evaluation.suite.SuiteEntry around an "
                f"attack, got {entry!r:.80}"
            )
        check_label(name, "the name of a suite entry")
        if name in ("clean", "worst") or name.startswith("audit"):
            raise ConfigurationError(
                f"the suite entry {name!r} has the name of another result (clean, worst, "
                "audit); rename it"
            )


def check_suite(suite: Mapping[str, SuiteEntry], model: Any) -> None:
    """Refuse a suite without entries, or with a loss or corrupted images that are not there."""
    if not suite:
        raise ConfigurationError(
            "evaluation.suite is empty, so there is nothing to test against; name at least one "
            "attack, or add --config autoattack"
        )
    check_entries(suite)
    for name, entry in suite.items():
        losses = resolve_losses(entry.losses, model)
        if isinstance(entry.attack, AutoAttack) and len(losses) > 1:
            raise ConfigurationError(
                f"AutoAttack takes one loss, the suite entry {name!r} has {', '.join(losses)}; "
                "make one entry for each"
            )
        if isinstance(entry.attack, Corruptions):
            entry.attack.check()


def ball_of(suite: Mapping[str, SuiteEntry]) -> Threat | None:
    """The ball of the first attack that has one, at the largest radius of its sweep."""
    for entry in suite.values():
        attacks = [attack for attack, _ in entry.variants() if getattr(attack, "eps", None)]
        if attacks:
            largest = max(attacks, key=lambda attack: float(attack.eps))
            return Threat(largest.norm, largest.eps)
    return None


def steps_of(
    suite: Mapping[str, SuiteEntry],
    model: Any,
    num_classes: int,
    seed: int,
    engine: AttackEngine | None = None,
) -> list[Step]:
    """The steps of a suite on a model with ``adaptive_losses``, in their order.

    ``num_classes`` decides which attacks of AutoAttack can run; ``seed`` is that of its random
    starts.
    """
    return [
        step
        for name, entry in suite.items()
        for attack, at in entry.variants()
        for step in _Planned(name, entry, attack, at, model, num_classes, seed, engine).steps()
    ]


@dataclass
class _Planned:
    """An attack at one point of a sweep, as steps."""

    name: str
    entry: SuiteEntry
    attack: Any
    at: dict[str, float]
    model: Any
    num_classes: int
    seed: int
    engine: AttackEngine | None

    def __post_init__(self) -> None:
        # Reduced precision finds other distances, and nothing tells which are the shorter ones.
        # AutoAttack is mostly spent on what no precision breaks: attacking that twice takes longer.
        if self.engine is not None and isinstance(self.attack, AutoAttack | MinimumNorm):
            self.engine = self.engine.in_float32()
        # GAMA without projection leaves the ball: it is reported and does not count.
        eps = getattr(self.attack, "eps", None) if getattr(self.attack, "project", True) else None
        self.threat = None if eps is None else Threat(self.attack.norm, eps)

    def steps(self) -> Iterator[Step]:
        """All of them."""
        attack = self.attack
        if isinstance(attack, Noise):
            yield from self._noise(attack)
        elif isinstance(attack, Corruptions):
            yield from self._corruptions(attack)
        elif isinstance(attack, AutoAttack):
            yield from self._autoattack(attack)
        elif isinstance(attack, DecisionBased):
            yield self._step(partial(decided, attack), budget=attack.budget.plus(JUDGED.times(2)))
        elif isinstance(attack, Transfer):
            yield self._step(attack.run, networks=(attack.network,))
        elif isinstance(attack, SavedExamples):
            yield self._step(attack.run)
        elif isinstance(attack, GAMAPGD | MinimumNorm):
            run = self._crafted(partial(_on_logits, attack))
            yield self._step(run, needs_gradient=True, budget=self._budget(attack.budget))
        else:
            for name, inner in resolve_losses(self.entry.losses, self.model).items():
                craft = partial(_ascent, attack, inner, self.entry.eot)
                passes = attack.budget.times(self.entry.eot)
                if self.entry.until_broken:
                    craft = partial(_compacted, attack, inner)
                    checks = len(check_points(attack.steps)) * attack.restarts
                    passes = passes.plus(Budget(forward=checks))
                run, budget = self._crafted(craft, inner), self._budget(passes)
                yield self._step(run, name, needs_gradient=True, budget=budget)

    def _noise(self, noise: Noise) -> Iterator[Step]:
        for level, draw in itertools.product(noise.levels, range(noise.draws)):
            at = {"level": level} | ({"draw": float(draw)} if noise.draws > 1 else {})
            run = partial(_noisy, noise, level, draw)
            yield self._step(run, at=at, kind="noise", scope="all", cumulative=False)

    def _corruptions(self, attack: Corruptions) -> Iterator[Step]:
        for name, severity in attack.points:
            yield self._step(
                partial(attack.run, name, severity),
                name,
                at={"severity": float(severity)},
                settings={"images": attack.images.digest(name, severity)},
                kind="corruption",
                scope="all",
                cumulative=False,
            )

    def _autoattack(self, attack: AutoAttack) -> Iterator[Step]:
        ((name, inner),) = resolve_losses(self.entry.losses, self.model).items()
        adaptive = None if name == "ce_f" else inner
        planned = attack.planned(self.num_classes)
        left_out = [part for part in attack.planned(num_classes=10**6) if part not in planned]
        if left_out:
            _LOG.warning(
                "AutoAttack leaves out %s: its loss needs more than %d classes; the remaining "
                "attacks are %s",
                *(", ".join(left_out), self.num_classes, ", ".join(planned)),
            )
        for part in planned:
            loss = adaptive or (OnLogits(cross_entropy) if part == "apgd-ce" else MARGIN)
            craft = partial(official, attack, part, self.seed, adaptive)
            passes = attack.budget(part, self.num_classes)
            if adaptive is not None and not makes_logits(adaptive):
                passes = passes.times(2)  # logits and loss are computed apart
            yield self._step(
                self._crafted(craft, loss, is_persisted=part != "square"),
                part,
                settings={"attack": attack.settings(), "part": part, "loss": name},
                cumulative=True,
                batch_size=attack.batch_size,
                needs_gradient=part != "square",
                budget=self._budget(passes, is_persisted=part != "square"),
            )

    def _crafted(self, craft: Craft, loss: InnerLoss = MARGIN, is_persisted: bool = True) -> Any:
        """Make images, by the engine if there is one, and judge them."""
        idle = partial(getattr, self.attack, "idle", None)
        run = partial(attacked, craft, self.threat, idle=idle)
        if is_persisted:
            # AutoAttack draws for the whole batch: on some of it, it starts elsewhere.
            is_repeatable = not isinstance(self.attack, AutoAttack)
            return partial(persisted, run, loss, self.threat, self.engine, is_repeatable)
        return partial(run, self.engine)

    def _budget(self, passes: Budget, is_persisted: bool = True) -> Budget:
        """With those of :meth:`_crafted`, where an attack makes ``passes``."""
        total = passes.plus(JUDGED)
        if self.engine is not None:  # compared with the plain network
            total = total.plus(Budget(2)).times(2 if self.engine.is_reduced else 1)
        return total.plus(PERSISTED) if is_persisted else total

    def _step(
        self, run: Any, part: str = "", at: Mapping[str, float] | None = None, **fields: Any
    ) -> Step:
        entry, attack, at = self.entry, self.attack, dict(self.at if at is None else at)
        settings = {"attack": attack.settings(), "part": part, "eot": entry.eot, "at": at}
        settings = fields.pop("settings", settings) | {"last_resort": QUERIES}
        if entry.until_broken:
            settings["until_broken"] = True
        if self.engine is not None and entry.uses_engine:
            settings["engine"] = self.engine.settings()
        point = [f"{axis}={value:.6g}" for axis, value in at.items()]
        given: dict[str, Any] = {
            "scope": "standing" if entry.survivors_only else "all" if entry.all_images else "clean",
            "cumulative": entry.survivors_only,
            "examples": entry.examples,
            "threat": self.threat,
            "reach": getattr(attack, "reach", math.inf),
            "budget": JUDGED,
            "recipe": ", ".join([attack.recipe(), *entry.effort]),
        }
        key = "/".join([self.name, *filter(None, [part]), *point])
        return Step(key, self.name, run, settings, at=at, **(given | fields))


def _ascent(
    attack: PGD, inner: InnerLoss, eot: int, model: Any, batch: Batch, random: ExampleRandom, _: Any
) -> Crafted:
    single = inner(model, batch)
    loss = single if eot == 1 else lambda x: torch.stack([single(x) for _ in range(eot)]).mean(0)
    wrong = partial(is_wrong, model, batch["y"])
    return attack(loss, batch["x"], random, is_adversarial=wrong), None


def _compacted(
    attack: PGD, inner: InnerLoss, model: Any, batch: Batch, random: ExampleRandom, _: Any
) -> Crafted:
    def of(rows: Tensor) -> tuple[LossFn, Callable[[Tensor], Tensor]]:
        part = part_of(batch, rows)
        return inner(model, part), partial(is_wrong, model, part["y"])

    return climb_until_broken(attack, of, batch["x"], random), None


def _on_logits(
    attack: GAMAPGD | MinimumNorm, model: Any, batch: Batch, random: ExampleRandom, _: Any
) -> Crafted:
    if isinstance(attack, GAMAPGD):
        return attack(model, batch["x"], batch["y"], random), None
    return attack(model, batch["x"], batch["y"]), None


def _noisy(
    noise: Noise, level: float, draw: int, model: Any, batch: Batch, random: ExampleRandom
) -> Columns:
    if noise.seed is not None:
        random = ExampleRandom(noise.seed, draw, batch["index"], Stream.EVALUATION)
    else:
        for _ in range(draw):
            noise.apply(batch["x"], level, random)  # the numbers of earlier draws
    return judged(model, batch, noise.apply(batch["x"], level, random))
