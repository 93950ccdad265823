"""Runs a suite of attacks on a batch and keeps the outcome of every example.

An example is robust when the network is right on it and no attack of the suite has changed that, so
the headline number is the worst case over attacks and not the lowest mean.
"""

import time
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor

from common.attacks.autoattack import AutoAttack
from common.attacks.pgd import PGD
from common.attacks.randomness import EVALUATION, ExampleRandom
from common.errors import ConfigurationError
from common.objectives import Batch, InnerLoss


@dataclass
class SuiteEntry:
    """One line of a suite: an attack, and what it maximises.

    Args:
        attack: A projected ascent, run once per loss; or AutoAttack, which brings its own losses.
        losses: Patterns (``ce_f``, ``ce_*``, ``cw_joint*``) over the losses that the model
            declares in ``adaptive_losses``, and ``model`` for the inner loss it was trained with.
            AutoAttack takes one: ``ce_f`` leaves it as it is, another steers APGD-CE and Square.
        survivors_only: Attack only what every earlier entry left standing. Outcomes are then
            cumulative: cheaper, the same worst case, but no figure of this attack alone.
        examples: Attack the first so many of the split only; ``None`` means all.
        checkpoints: Run for checkpoints of these names only (``last``, ``selected``); ``None``
            means whatever is tested.
    """

    attack: PGD | AutoAttack
    losses: list[str] = field(default_factory=lambda: ["ce_f"])
    survivors_only: bool = False
    examples: int | None = None
    checkpoints: list[str] | None = None

    def __post_init__(self) -> None:
        if not self.losses:
            raise ConfigurationError(
                "a suite entry with an empty list of losses attacks nothing; name at least one, "
                "for instance losses: [ce_f]"
            )
        if self.examples is not None and self.examples < 1:
            raise ConfigurationError(
                f"examples must be at least 1 or null for all, got {self.examples}"
            )


def resolve_losses(patterns: list[str], model: Any) -> dict[str, InnerLoss]:
    """The losses of ``model`` that match any of the patterns, in the order of the declaration.

    Raises:
        ConfigurationError: If a pattern matches nothing; the message lists what there is.
    """
    declared: dict[str, InnerLoss] = dict(model.adaptive_losses())
    if hasattr(model, "objective"):
        declared["model"] = model.objective.inner
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in declared):
            raise ConfigurationError(
                f"no loss of {type(model).__name__} matches {pattern!r}; it declares "
                f"{', '.join(declared)}"
            )
    return {
        name: loss
        for name, loss in declared.items()
        if any(fnmatchcase(name, pattern) for pattern in patterns)
    }


def check_suite(suite: Mapping[str, SuiteEntry], model: Any) -> None:
    """Find everything that would stop the suite, before the first attack.

    Raises:
        ConfigurationError: For a suite without entries, or a loss nobody declares.
    """
    if not suite:
        raise ConfigurationError(
            "evaluation.suite is empty, so there is nothing to test against; name at least one "
            "attack, or add --config common/configs/autoattack.yaml"
        )
    for name, entry in suite.items():
        if "/" in name:
            raise ConfigurationError(
                f"the suite entry {name!r} contains '/', which separates attack from loss in "
                "results; rename it"
            )
        losses = resolve_losses(entry.losses, model)
        if isinstance(entry.attack, AutoAttack) and len(losses) > 1:
            raise ConfigurationError(
                f"AutoAttack takes one loss, the suite entry {name!r} has {', '.join(losses)}; "
                "make one entry for each"
            )


@torch.no_grad()
def predict(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Predicted classes ``(N,)``."""
    return model(x).argmax(dim=1)


def is_wrong(model: Callable[[Tensor], Tensor], y: Tensor, x: Tensor) -> Tensor:
    """Which examples are misclassified, bool ``(N,)``."""
    return predict(model, x) != y


class SuiteRun:
    """The outcomes of one suite on one model, batch after batch.

    Args:
        model: Images to logits; declares ``adaptive_losses``.
        suite: The attacks in the order they run.
        seed: With the example's index, what random starts depend on.

    Attributes:
        correct: For ``clean`` and for every attack, per batch, whether each example is still
            classified correctly.
        attacked: For every attack, per batch, which examples the figure is about.
        seconds: Time per attack.
    """

    def __init__(self, model: Any, suite: Mapping[str, SuiteEntry], seed: int) -> None:
        self.model = model
        self.suite = suite
        self.seed = seed
        self.correct: dict[str, list[Tensor]] = {"clean": []}
        self.attacked: dict[str, list[Tensor]] = {}
        self.index: list[Tensor] = []
        self.y: list[Tensor] = []
        self.seconds: dict[str, float] = {}

    def attack(self, batch: Batch) -> None:
        """Run every attack of the suite on a batch; the model must be in evaluation mode."""
        with torch.inference_mode(False):
            batch = {key: value.clone() for key, value in batch.items()}
            alive = predict(self.model, batch["x"]) == batch["y"]
            self.index.append(batch["index"].cpu())
            self.y.append(batch["y"].cpu())
            self._record("clean", alive, None)
            clean = alive
            for name, entry in self.suite.items():
                counted = torch.ones_like(clean)
                if entry.examples is not None:
                    counted = batch["index"] < entry.examples
                # A misclassified example is not robust whatever an attack does to it.
                for key, outcome in self._run(
                    name, entry, batch, counted, alive if entry.survivors_only else clean
                ):
                    self._record(key, outcome, counted)
                    alive = alive & (outcome | ~counted)

    def _run(
        self,
        name: str,
        entry: SuiteEntry,
        batch: Batch,
        counted: Tensor,
        standing: Tensor,
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield (attack/loss, still correct) for one entry."""
        attack = entry.attack
        losses = resolve_losses(entry.losses, self.model)
        if isinstance(attack, AutoAttack):
            yield from self._autoattack(name, attack, losses, batch, counted & standing, standing)
            return
        for loss_name, inner in losses.items():
            started = time.perf_counter()
            target = (counted & standing).nonzero().flatten()
            outcome = standing.clone()
            if len(target):
                part = {key: value[target] for key, value in batch.items()}
                # Keyed to the entry's name: what else is in the suite changes nothing.
                key = zlib.crc32(name.encode())
                random = ExampleRandom(self.seed, key, part["index"], EVALUATION)
                x_adv = attack(
                    inner(self.model, part),
                    part["x"],
                    random,
                    is_adversarial=partial(is_wrong, self.model, part["y"]),
                )
                outcome[target] = predict(self.model, x_adv) == part["y"]
            self._spent(f"{name}/{loss_name}", started)
            if entry.survivors_only:
                standing = outcome
            yield f"{name}/{loss_name}", outcome

    def _autoattack(
        self,
        name: str,
        attack: AutoAttack,
        losses: dict[str, InnerLoss],
        batch: Batch,
        target: Tensor,
        standing: Tensor,
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield (attack/step, still correct), also where nothing is left to attack."""
        if not target.any():
            classes = self.model(batch["x"][:1]).shape[1]
            yield from ((f"{name}/{step}", standing) for step in attack.planned(classes))
            return
        ((loss_name, inner),) = losses.items()

        def steered(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return self.model(x), inner(self.model, {"x": x, "y": y})(x)

        found = attack.run(
            self.model,
            batch["x"][target],
            batch["y"][target],
            seed=self.seed,
            steered=None if loss_name == "ce_f" else steered,
        )
        for step, verdict in found.correct.items():
            outcome = standing.clone()
            outcome[target] = verdict
            key = f"{name}/{step}"
            self.seconds[key] = self.seconds.get(key, 0.0) + found.seconds[step]
            yield key, outcome

    def _spent(self, key: str, started: float) -> None:
        self.seconds[key] = self.seconds.get(key, 0.0) + time.perf_counter() - started

    def _record(self, key: str, outcome: Tensor, counted: Tensor | None) -> None:
        self.correct.setdefault(key, []).append(outcome.cpu())
        if counted is not None:
            self.attacked.setdefault(key, []).append(counted.cpu())

    def gathered(self, gather: Callable[[Any], list[Any]]) -> "Outcomes":
        """Join the batches of all ranks and put the examples in the order of their index.

        Args:
            gather: Turns an object of this rank into the list of all ranks' objects.

        Raises:
            RuntimeError: If the examples are not each there once, which would falsify every figure.
        """
        mine = (
            torch.cat(self.index),
            torch.cat(self.y),
            {key: torch.cat(value) for key, value in self.correct.items()},
            {key: torch.cat(value) for key, value in self.attacked.items()},
        )
        parts = gather(mine)
        index = torch.cat([part[0] for part in parts])
        order = index.argsort()
        if not torch.equal(index[order], torch.arange(len(index))):
            raise RuntimeError(
                f"evaluated {len(index)} examples with indices {index[order].tolist()[:5]}..., "
                "expected each of 0..n-1 once; give the test loader a sampler that does not "
                "repeat examples (trainer.use_distributed_sampler: false)"
            )
        return Outcomes(
            y=torch.cat([part[1] for part in parts])[order],
            correct={
                key: torch.cat([part[2][key] for part in parts])[order] for key in self.correct
            },
            attacked={
                key: torch.cat([part[3][key] for part in parts])[order] for key in self.attacked
            },
        )


@dataclass
class Outcomes:
    """Outcomes of a whole split in the order of its examples.

    Args:
        y: Labels ``(N,)``.
        correct: Per attack (and ``clean``), whether each example is still right, ``(N,)`` bool.
        attacked: Per attack, which examples the figure is about, ``(N,)`` bool.
    """

    y: Tensor
    correct: dict[str, Tensor]
    attacked: dict[str, Tensor]

    def of(self, entries: Collection[str]) -> "Outcomes":
        """The outcomes of some entries of the suite, and on clean images."""
        kept = {name: mask for name, mask in self.attacked.items() if name.split("/")[0] in entries}
        correct = {name: self.correct[name] for name in ("clean", *kept)}
        return Outcomes(self.y, correct, kept)
