"""Runs the steps of an evaluation, attack by attack over all examples.

A step's examples are cut, in their order, into chunks of a fixed size, and each chunk is attacked
by one process. So a chunk has the same examples, noise and arithmetic on any number of devices.
Survivors are packed again before every step, like in the official AutoAttack. Finished chunks are
kept, see :mod:`common.evaluation.journal`.
"""

import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from common.attacks.randomness import ExampleRandom, Stream, seeded
from common.data.subset import lacking_classes, subset
from common.errors import UserError
from common.evaluation.confirm import settled
from common.evaluation.forecast import Forecast
from common.evaluation.images import Examples
from common.evaluation.journal import (
    PROBED,
    Journal,
    clean_step,
    is_same,
    networks_of,
    probe_step,
)
from common.evaluation.models import adapted, device_of
from common.evaluation.passes import Passes, counted
from common.evaluation.progress import Progress
from common.evaluation.report import suspicions
from common.evaluation.saved import Saver
from common.evaluation.steps import Step, in_ball
from common.modes import frozen
from common.results.lines import Columns, Cost, Line, Outcomes, Threat

T = TypeVar("T")
PICTURED = 16
"""Number of examples whose adversarial images are kept."""


@dataclass(frozen=True)
class Team:
    """The processes that share the work.

    ``gather`` turns an object of this process into the list of all processes' objects.
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

    def first(self, action: Callable[[], T]) -> T | None:
        """What the action returns in the first process, ``None`` in others; all raise its error.

        That is a :class:`~common.errors.UserError`; others end the first process alone.
        """
        result = problem = None
        if self.rank == 0:
            try:
                result = action()
            except UserError as error:
                problem = error
        for found in filter(None, self.gather(problem)):
            raise found
        return result


def run_steps(
    model: nn.Module,
    examples: Examples,
    steps: Sequence[Step],
    *,
    seed: int,
    batch_size: int = 250,
    threat: Threat | None = None,
    has_gradient: bool = True,
    journal: Journal | None = None,
    saver: Saver | None = None,
    team: Team | None = None,
    progress: Progress | None = None,
    remarks: Sequence[str] = (),
) -> Outcomes:
    """Run every step and put the outcomes of all examples together, in the order of ``index``.

    ``examples`` (``x`` in [0, 1], ``y``, ``index``) and the result are equal in every process.
    Random starts depend on the seed and an example's ``key``, by default its index; ``batch_size``
    examples make a chunk.
    The worst case is that of ``threat``, by default the ball of the first attack. ``saver`` gets
    the images of the attacks that count. ``remarks`` go to the result.
    """
    examples = in_order(examples)
    y = examples["y"]
    threat = threat or next((step.threat for step in steps if step.threat), None)
    team = team or Team()
    everything = torch.ones(len(y), dtype=torch.bool)
    parts = {
        size: torch.zeros_like(everything).index_fill(0, subset(y, size), True)
        for size in {step.examples for step in steps}
    }
    run = _Run(
        model,
        examples,
        seed,
        batch_size,
        journal or Journal(),
        team,
        progress or Progress(),
        subset(y, PICTURED),
        saver,
        threat,
        parts=parts,
        met=everything,
        later=steps,
        forecast=Forecast(team.size, batch_size),
    )
    with (
        frozen(model, "eval"),
        adapted(model, has_gradient=has_gradient),
        counted(model) as run.passes,
    ):
        clean = run.columns(clean_step(), everything, {})
        if saver is not None:
            saver.fill(run.team.rank == 0)
        probe = partial(run.silent, probe_step(threat, networks_of(steps)))
        signature = {"clean": clean.pop("scores")} | probe()
        run.open_journal(signature)
        run.standing = is_right = clean["correct"]
        run.outcomes = outcomes = Outcomes(
            y,
            {"clean": is_right},
            {},
            columns={"clean": clean},
            threat=threat,
            pictured=run.pictured,
        )
        run.end()
        for number, step in enumerate(steps, start=1):
            run.later = steps[number:]
            run.step(step)
            run.end()
        outcomes.depends_on_history = not is_same(signature, probe())
    lacking = [lacking_classes(y, part.nonzero().flatten()) for part in parts.values()]
    told = [*remarks, *lacking, *suspicions(outcomes), outcomes.nonfinite()]
    outcomes.remarks = [text for text in told if text]
    return outcomes


def _weakness(step: Step, threat: Threat | None, found: Columns, ran: Tensor) -> str:
    """Why withstanding an attack is no evidence of robustness; empty if it is."""
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


def in_order(examples: Examples) -> Examples:
    """The examples sorted by index, on the CPU; a RuntimeError if one is missing or repeated.

    Images that are in order are not copied.
    """
    index = examples["index"].cpu()
    order = index.argsort()
    if not torch.equal(index[order], torch.arange(len(index))):
        raise RuntimeError(
            f"evaluated {len(index)} examples with indices {index[order].tolist()[:5]}..., "
            "expected each of 0..n-1 once; give the test loader a sampler that does not "
            "repeat examples (trainer.use_distributed_sampler: false)"
        )
    x = examples["x"].detach().cpu() if isinstance(examples["x"], Tensor) else examples["x"]
    rest = {key: value.detach().cpu()[order] for key, value in examples.items() if key != "x"}
    return {"x": x if torch.equal(order, torch.arange(len(order))) else x[order]} | rest


def _line(step: Step, threat: Threat | None, weakness: str) -> Line:
    return Line(
        entry=step.entry,
        kind="attack" if step.kind == "probe" else step.kind,
        norm=step.threat.norm if step.threat else None,
        eps=step.threat.radius if step.threat else None,
        survivors_only=step.scope == "standing",
        counts=_counts(step, threat),
        at=dict(step.at),
        weakness=weakness,
        recipe=step.recipe,
    )


def _counts(step: Step, threat: Threat | None) -> bool:
    """Whether an attack belongs to the worst case."""
    return step.kind == "attack" and threat is not None and threat.covers(step.threat)


@dataclass
class _Run:
    """What an evaluation has found so far.

    ``parts`` are the examples that steps are about, by number; ``met`` are those of all steps so
    far that count; ``later`` are the steps that follow.
    """

    model: nn.Module
    examples: Examples
    seed: int
    batch_size: int
    journal: Journal
    team: Team
    progress: Progress
    pictured: Tensor
    saver: Saver | None = None
    threat: Threat | None = None
    passes: Passes = field(default_factory=Passes)
    standing: Tensor | None = None
    outcomes: Outcomes | None = None
    parts: Mapping[int | None, Tensor] = field(default_factory=dict)
    met: Tensor = field(default_factory=lambda: torch.arange(0))
    later: Sequence[Step] = ()
    forecast: Forecast = field(default_factory=Forecast)

    def step(self, step: Step) -> None:
        """Run a step."""
        if self.standing is None or self.outcomes is None:
            raise RuntimeError("measure the clean images before the first step")
        outcomes = self.outcomes
        within, before = self._concerned(step, outcomes, self.standing)
        ran = before & within
        predicted = outcomes.columns["clean"]["predicted"]
        found = self.columns(step, ran, {"predicted": predicted})
        outcomes.columns[step.key] = found
        if step.kind == "probe":
            return
        outcome = torch.where(ran, found["correct"], before)
        line = _line(step, self.threat, _weakness(step, self.threat, found, ran))
        outcomes.correct[step.key], outcomes.attacked[step.key] = outcome, within
        outcomes.lines[step.key] = line
        if line.counts:
            self.met = self.met & within
            self.standing = self.standing & (outcome | ~within)

    def _concerned(self, step: Step, outcomes: Outcomes, standing: Tensor) -> tuple[Tensor, Tensor]:
        """Which examples a step is about, and which are correct before it."""
        is_right, within = outcomes.correct["clean"], self.parts[step.examples]
        if step.scope == "standing":
            within = within & self.met  # earlier steps ran on these: outcomes stay cumulative
        everything = torch.ones_like(is_right)
        before = {"all": everything, "clean": is_right, "standing": standing}[step.scope]
        for key, line in outcomes.lines.items() if step.cumulative else ():
            if line.entry == step.entry:
                before = before & outcomes.correct[key]
        return within, before

    def _examples_of(self, step: Step) -> int:
        """How many examples a later step would run on if it began now."""
        if self.outcomes is None or self.standing is None:
            return int(self.parts[step.examples].sum())
        within, before = self._concerned(step, self.outcomes, self.standing)
        return int((within & before).sum())

    def _foresee(self, step: Step | None = None, chunks: Sequence[int] = ()) -> None:
        """Begin the forecast of a step with these chunks to run, or that of what follows."""
        later = ((other, self._examples_of(other)) for other in self.later)
        self.forecast.begin(None if step is None else step.budget, chunks, later)

    def _tell(self) -> None:
        """Give the forecast to the progress."""
        if left := self.forecast.left():
            self.progress.foresee(*left)

    def end(self) -> None:
        """Say what follows after a step."""
        self._foresee()
        self._tell()
        self.progress.end()

    def silent(self, step: Step) -> Columns:
        """The columns of a step on a few examples, neither shown nor kept."""
        y = self.examples["y"]
        target = torch.zeros_like(y, dtype=torch.bool).index_fill(0, subset(y, PROBED), True)
        alone = replace(
            self,
            journal=Journal(),
            progress=Progress(),
            saver=None,
            outcomes=None,
            later=(),
            forecast=Forecast(),  # passes of a few images are slower
        )
        return {name: column[target] for name, column in alone.columns(step, target, {}).items()}

    def open_journal(self, signature: Columns) -> None:
        """Let the first process choose the folder for outcomes of this function."""
        chosen = self.journal.chosen(signature) if self.team.rank == 0 else None
        self.journal.open(self.team.gather(chosen)[0])

    def columns(self, step: Step, target: Tensor, fill: Columns) -> Columns:
        """The columns of a step on the target examples, from all processes together."""
        rows = target.nonzero().flatten()
        chunks = list(torch.split(rows, step.batch_size or self.batch_size)) if len(rows) else []
        # Processes share what they find in their journals, and then the remaining chunks.
        found = {i: kept for i, c in enumerate(chunks) if (kept := self.journal.read(step, c))}
        for theirs in self.team.gather(found):
            found |= theirs
        missing = [i for i in range(len(chunks)) if i not in found]
        standing = self.standing.clone() if self.standing is not None else target.clone()
        for i, (columns, _) in found.items():
            _drop(standing, chunks[i], columns)
        sizes = [len(chunks[i]) for i in missing]
        self.progress.begin(step, sum(sizes), int(standing.sum()))
        self._foresee(step, sizes)
        for i, (_, cost) in found.items():
            self.forecast.found(len(chunks[i]), cost)
        mine = self._run(step, {i: chunks[i] for i in missing}, standing)
        for theirs in self.team.gather(mine):
            found |= theirs
        for i in missing:
            _drop(standing, chunks[i], found[i][0])
        self.progress.advance(0, int(standing.sum()))
        if self.outcomes is not None:
            costs = (cost for _, cost in found.values())
            self.outcomes.costs[step.key] = reduce(Cost.plus, costs, Cost())
        return self._assembled([(chunks[i], found[i][0]) for i in sorted(found)], fill)

    def _run(
        self, step: Step, chunks: Mapping[int, Tensor], standing: Tensor
    ) -> dict[int, tuple[Columns, Cost]]:
        """Run a step on this process's share of the chunks; ``standing`` loses what it breaks."""
        mine = {}
        size, sizes = self.team.size, [len(rows) for rows in chunks.values()]
        for number, i in enumerate(list(chunks)[self.team.rank :: size]):
            rows, begun = chunks[i], time.perf_counter()
            self.passes.take()
            columns = self._attacked(step, rows)
            cost = Cost(time.perf_counter() - begun, *self.passes.take())
            mine[i] = columns, cost
            self.journal.write(step, rows, *mine[i])
            _drop(standing, rows, columns)
            done = sum(sizes[number * size : (number + 1) * size])  # others are as far
            self.progress.advance(done, int(standing.sum()))
            self.forecast.ran(len(rows), cost)
            self._tell()
        return mine

    def _attacked(self, step: Step, rows: Tensor) -> Columns:
        """Run the step on one chunk."""
        device = device_of(self.model)
        key = zlib.crc32(step.entry.encode())
        # For forward passes that draw: the same numbers on any device and after a restart.
        seed = zlib.crc32(f"{self.seed} {step.key} {rows.tolist()}".encode())
        with torch.inference_mode(False), seeded(seed, device):
            part = {name: value[rows].to(device) for name, value in self.examples.items()}

            def run() -> Columns:
                own = part.get("key", part["index"])
                random = ExampleRandom(self.seed, key, own, Stream.EVALUATION)
                with seeded(seed, device):
                    return step.run(self.model, part, random)

            is_attack = step.kind == "attack"
            columns = settled(self.model, part, step.threat, run) if is_attack else run()
        self._save(step, rows, columns, part["x"])
        columns = {name: column.detach().cpu() for name, column in columns.items()}
        if "x_adv" in columns:
            columns["x_adv"] = columns["x_adv"][torch.isin(rows, self.pictured)].clone()
        return columns

    def _save(self, step: Step, rows: Tensor, columns: Columns, x: Tensor) -> None:
        """Give the images to the saver: clean ones, then those of attacks on what still stands."""
        if self.saver is None:
            return
        if self.standing is None:
            if not self.saver.is_filled:
                self.saver.write(rows, x)
        elif _counts(step, self.threat):
            kept = self.standing[rows] & in_ball(columns["x_adv"], x, self.threat).cpu()
            self.saver.write(rows[kept], columns["x_adv"][kept.to(x.device)])

    def _assembled(self, found: list[tuple[Tensor, Columns]], fill: Columns) -> Columns:
        """Columns over all examples; where a step was not run they are ``fill``, NaN or zero."""
        total = len(self.examples["y"])
        if not found:  # no example was left to run it on
            numbers = ("loss", "linf", "l2", "l1")
            flags = {name: torch.zeros(total, dtype=torch.bool) for name in ("correct", "moved")}
            return flags | fill | {name: torch.full((total,), torch.nan) for name in numbers}
        whole: Columns = {}
        for rows, columns in found:
            for name, column in columns.items():
                at, size = rows, total
                if name == "x_adv":  # one for each of the pictured examples, in their order
                    at = torch.isin(self.pictured, rows).nonzero().flatten()
                    size = len(self.pictured)
                if name not in whole:
                    value = torch.nan if column.is_floating_point() else 0
                    empty = torch.full((size, *column.shape[1:]), value, dtype=column.dtype)
                    whole[name] = fill[name].clone() if name in fill else empty
                whole[name][at] = column
        return whole


def _drop(standing: Tensor, rows: Tensor, columns: Columns) -> None:
    """Take the examples that fell out of the standing ones."""
    if "correct" in columns:
        standing[rows] &= columns["correct"]
