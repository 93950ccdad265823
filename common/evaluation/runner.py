"""Runs the steps of an evaluation, attack by attack over all examples.

Examples are attacked in chunks of a fixed size, cut from the sorted list of those a step is to
attack, and a chunk is the work of one process. So a chunk has the same examples, the same noise and
the same arithmetic on one device or eight; survivors are packed again before every step, as the
official AutoAttack packs them; and what is done is done for good, see
:mod:`common.evaluation.journal`.
"""

import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from common.attacks.randomness import ExampleRandom, Stream, seeded
from common.data.subset import lacking_classes, subset
from common.evaluation.findings import suspicions
from common.evaluation.journal import Journal
from common.evaluation.models import adapted
from common.evaluation.retries import settled
from common.evaluation.signature import (
    PROBED,
    clean_step,
    is_same,
    networks_of,
    probe_step,
)
from common.evaluation.steps import Step
from common.modes import frozen
from common.objectives import Batch
from common.results.lines import Columns, Line, Outcomes, Threat

PICTURED = 16
"""Number of examples whose adversarial images are kept."""


@dataclass(frozen=True)
class Team:
    """The processes that share the work.

    Args:
        rank: Of this one.
        size: How many there are.
        gather: Turns an object of this process into the list of all processes' objects.
    """

    rank: int = 0
    size: int = 1
    gather: Callable[[Any], list[Any]] = lambda mine: [mine]

    @classmethod
    def of_processes(cls) -> "Team":
        """All processes that ``torch.distributed`` joins, or this one alone."""
        world = torch.distributed
        if not (world.is_available() and world.is_initialized()) or world.get_world_size() == 1:
            return cls()

        def gather(mine: Any) -> list[Any]:
            parts: list[Any] = [None] * world.get_world_size()
            world.all_gather_object(parts, mine)
            return parts

        return cls(world.get_rank(), world.get_world_size(), gather)


class Progress(Protocol):
    """What receives the progress of an evaluation."""

    def begin(self, step: Step, examples: int, survivors: int) -> None:
        """A step starts on ``examples`` examples."""

    def advance(self, examples: int, survivors: int) -> None:
        """``examples`` more are done, and ``survivors`` of all are still right."""

    def end(self) -> None:
        """The step is done."""


def run_steps(
    model: nn.Module,
    examples: Batch,
    steps: Sequence[Step],
    *,
    seed: int,
    batch_size: int = 250,
    threat: Threat | None = None,
    has_gradient: bool = True,
    journal: Journal | None = None,
    team: Team | None = None,
    progress: Progress | None = None,
    remarks: Sequence[str] = (),
) -> Outcomes:
    """Run every step and put the outcomes of all examples together.

    Args:
        model: Images to logits; put into evaluation mode during the call.
        examples: All of them, in every process alike: ``x`` in [0, 1], ``y``, ``index``.
        steps: In the order they run.
        seed: With an example's index, what random starts depend on.
        batch_size: How many examples make a chunk.
        threat: The adversary of the worst case; by default that of the first attack in a ball.
        has_gradient: Whether the model can be differentiated by its images.
        journal: Where outcomes are kept.
        team: The processes that share the work.
        progress: Receives progress.
        remarks: What is known already that a reader of the figures should know.

    Returns:
        Outcomes in the order of ``index``; the same in every process.

    Raises:
        RuntimeError: If the examples are not each there once, which would falsify every figure.
    """
    examples = in_order(examples)
    y = examples["y"]
    threat = threat or next((step.threat for step in steps if step.threat), None)
    pictured = subset(y, PICTURED)
    run = _Run(
        model, examples, seed, batch_size, journal or Journal(None, {}), team or Team(), progress
    )
    run.pictured = pictured
    everything = torch.ones(len(y), dtype=torch.bool)
    parts = {
        size: torch.zeros_like(everything).index_fill(0, subset(y, size), True)
        for size in {step.examples for step in steps}
    }
    with frozen(model, "eval"), adapted(model, has_gradient=has_gradient):
        clean = run.columns(clean_step(), everything, {})
        probe = partial(run.silent, probe_step(threat, networks_of(steps)))
        signature = {"clean": clean.pop("scores")} | probe()
        run.open_journal(signature)
        fill = {"predicted": clean["predicted"]}
        is_right = clean["correct"]
        outcomes = Outcomes(y, {"clean": is_right}, {}, columns={"clean": clean}, threat=threat)
        outcomes.pictured = pictured
        run.outcomes, run.standing = outcomes, is_right
        met = everything  # by every step so far that counts
        for step in steps:
            within = parts[step.examples]
            if step.scope == "standing":
                within = within & met  # what others had not met is not cumulative
            before = {"all": everything, "clean": is_right, "standing": run.standing}[step.scope]
            if step.cumulative:
                for key, line in outcomes.lines.items():
                    if line.entry == step.entry:
                        before = before & outcomes.correct[key]
            found = run.columns(step, before & within, fill)
            outcomes.columns[step.key] = found
            if step.kind == "probe":
                continue
            outcome = before.clone()
            outcome[before & within] = found["correct"][before & within]
            line = _line(step, threat, _weakness(step, threat, found, before & within))
            outcomes.correct[step.key], outcomes.attacked[step.key] = outcome, within
            outcomes.lines[step.key] = line
            if line.counts:
                met = met & within
                run.standing = run.standing & (outcome | ~within)
        outcomes.depends_on_history = not is_same(signature, probe())
    lacking = [lacking_classes(y, part.nonzero().flatten()) for part in parts.values()]
    outcomes.remarks = [
        *remarks,
        *filter(None, lacking),
        *suspicions(outcomes),
        *filter(None, [outcomes.nonfinite()]),
    ]
    return outcomes


def _weakness(step: Step, threat: Threat | None, found: Columns, ran: Tensor) -> str:
    """Why an attack that left examples standing is no evidence that they are robust."""
    if step.kind != "attack" or threat is None or not threat.covers(step.threat):
        return ""
    radius = step.threat.radius if step.threat else 0.0
    if radius < threat.radius * (1 - 1e-3):
        return f"its radius {radius:.4g} is less than {threat.radius:.4g}"
    if step.reach < radius * (1 - 1e-3):
        return f"all its steps together, {step.reach:.4g}, are less than its radius {radius:.4g}"
    if "moved" not in found or not bool(ran.any()):
        return ""
    did = (found["moved"] | ~found["correct"])[ran]
    if did.double().mean() >= 0.5:
        return ""
    return (
        f"it left {int((~did).sum()):,} of the {len(did):,} images it was run on where they were, "
        "or had no gradient to follow"
    )


def in_order(examples: Batch) -> Batch:
    """The examples sorted by index, on the CPU.

    Raises:
        RuntimeError: If they are not each there once.
    """
    index = examples["index"].cpu()
    order = index.argsort()
    if not torch.equal(index[order], torch.arange(len(index))):
        raise RuntimeError(
            f"evaluated {len(index)} examples with indices {index[order].tolist()[:5]}..., "
            "expected each of 0..n-1 once; give the test loader a sampler that does not "
            "repeat examples (trainer.use_distributed_sampler: false)"
        )
    return {key: value.detach().cpu()[order].clone() for key, value in examples.items()}


def _line(step: Step, threat: Threat | None, weakness: str) -> Line:
    return Line(
        entry=step.entry,
        kind="noise" if step.kind == "noise" else "attack",
        norm=step.threat.norm if step.threat else None,
        eps=step.threat.radius if step.threat else None,
        survivors_only=step.scope == "standing",
        counts=step.kind == "attack" and threat is not None and threat.covers(step.threat),
        at=dict(step.at),
        weakness=weakness,
    )


@dataclass
class _Run:
    model: nn.Module
    examples: Batch
    seed: int
    batch_size: int
    journal: Journal
    team: Team
    progress: Progress | None
    standing: Tensor | None = None
    outcomes: Outcomes | None = None
    pictured: Tensor = field(default_factory=lambda: torch.arange(0))

    def silent(self, step: Step) -> Columns:
        """What a step finds out about a few examples, neither shown nor kept."""
        y = self.examples["y"]
        target = torch.zeros_like(y, dtype=torch.bool).index_fill(0, subset(y, PROBED), True)
        alone = replace(self, journal=Journal(None, {}), progress=None, outcomes=None)
        return {name: column[target] for name, column in alone.columns(step, target, {}).items()}

    def open_journal(self, signature: Columns) -> None:
        """Let the first process choose the folder for outcomes of this function."""
        chosen = self.journal.chosen(signature) if self.team.rank == 0 else None
        self.journal.open(self.team.gather(chosen)[0])

    def columns(self, step: Step, target: Tensor, fill: Columns) -> Columns:
        """What the step finds out about the target, all processes together."""
        rows = target.nonzero().flatten()
        chunks = list(torch.split(rows, step.batch_size or self.batch_size)) if len(rows) else []
        # What any process finds in its journal, all take; then they share the rest.
        found = {i: kept for i, c in enumerate(chunks) if (kept := self.journal.read(step, c))}
        for theirs in self.team.gather(found):
            found |= theirs
        missing = [i for i in range(len(chunks)) if i not in found]
        standing = self.standing.clone() if self.standing is not None else target.clone()
        for i, (columns, _) in found.items():
            _drop(standing, chunks[i], columns)
        if self.progress is not None:
            self.progress.begin(step, sum(len(chunks[i]) for i in missing), int(standing.sum()))
        mine = {}
        for i in missing[self.team.rank :: self.team.size]:
            begun = time.perf_counter()
            columns = self._attacked(step, chunks[i])
            mine[i] = columns, time.perf_counter() - begun
            self.journal.write(step, chunks[i], *mine[i])
            if self.progress is not None:
                _drop(standing, chunks[i], columns)
                done = min(len(chunks[i]) * self.team.size, len(rows))
                self.progress.advance(done, int(standing.sum()))
        for theirs in self.team.gather(mine):
            found |= theirs
        if self.progress is not None:
            self.progress.end()
        if self.outcomes is not None:
            self.outcomes.seconds[step.key] = sum(seconds for _, seconds in found.values())
        return self._assembled(chunks, {i: columns for i, (columns, _) in found.items()}, fill)

    def _attacked(self, step: Step, rows: Tensor) -> Columns:
        """Run the step on one chunk."""
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        key = zlib.crc32(step.entry.encode())
        # For forward passes that draw: the same numbers on any device and after a restart.
        seed = zlib.crc32(f"{self.seed} {step.key} {rows.tolist()}".encode())
        with torch.inference_mode(False), seeded(seed, device):
            part = {name: value[rows].to(device) for name, value in self.examples.items()}

            def run() -> Columns:
                random = ExampleRandom(self.seed, key, part["index"], Stream.EVALUATION)
                with seeded(seed, device):
                    return step.run(self.model, part, random)

            is_attack = step.kind == "attack"
            columns = settled(self.model, part, step.threat, run) if is_attack else run()
        columns = {name: column.detach().cpu() for name, column in columns.items()}
        if "x_adv" in columns:
            columns["x_adv"] = columns["x_adv"][torch.isin(rows, self.pictured)].clone()
        return columns

    def _assembled(self, chunks: list[Tensor], found: dict[int, Columns], fill: Columns) -> Columns:
        """Columns over all examples; where a step was not run they are ``fill``, NaN or zero."""
        total = len(self.examples["y"])
        whole: Columns = {}
        for i in sorted(found):
            for name, column in found[i].items():
                rows = chunks[i]
                if name == "x_adv":  # one for each of the pictured examples, in their order
                    rows = torch.isin(self.pictured, rows).nonzero().flatten()
                if name not in whole:
                    size = len(self.pictured) if name == "x_adv" else total
                    value = torch.nan if column.is_floating_point() else 0
                    whole[name] = torch.full((size, *column.shape[1:]), value, dtype=column.dtype)
                    if name in fill:
                        whole[name] = fill[name].clone()
                whole[name][rows] = column
        if not whole:  # nothing was left to run it on
            whole = {"correct": torch.zeros(total, dtype=torch.bool), **fill}
            whole["moved"] = torch.zeros(total, dtype=torch.bool)
            whole |= {
                name: torch.full((total,), torch.nan) for name in ("loss", "linf", "l2", "l1")
            }
        return whole


def _drop(standing: Tensor, rows: Tensor, columns: Columns) -> None:
    """Take those that fell out of the standing."""
    if "correct" in columns:
        standing[rows] &= columns["correct"]
