"""How many passes an evaluation still needs, and how long they take."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from common.attacks.settings import Budget
from common.evaluation.steps import Step
from common.results.lines import Cost


@dataclass
class Rates:
    """Seconds of a forward and of a backward pass, fitted to the costs of chunks.

    Least squares: the seconds of a chunk are its forward passes times the one plus its backward
    passes times the other, neither below zero. The fields are sums over chunks of products of
    forward passes f, backward passes b and seconds s.
    """

    ff: float = 0.0
    fb: float = 0.0
    bb: float = 0.0
    fs: float = 0.0
    bs: float = 0.0

    def add(self, cost: Cost) -> None:
        """What a chunk cost."""
        seconds, f, b, _ = cost
        self.ff, self.fb, self.bb = self.ff + f * f, self.fb + f * b, self.bb + b * b
        self.fs, self.bs = self.fs + f * seconds, self.bs + b * seconds

    def seconds(self, passes: Budget) -> float | None:
        """How long these passes take; ``None`` while a kind of them was never measured."""
        if self.ff == 0.0 or (self.bb == 0.0 and passes.backward > 0):
            return None
        forward, backward = self.fs / self.ff, 0.0
        determinant = self.ff * self.bb - self.fb**2
        if determinant > 1e-9 * self.ff * self.bb:
            forward = (self.fs * self.bb - self.bs * self.fb) / determinant
            backward = (self.bs * self.ff - self.fs * self.fb) / determinant
            if forward < 0.0:
                forward, backward = 0.0, self.bs / self.bb
            elif backward < 0.0:
                forward, backward = self.fs / self.ff, 0.0
        return forward * passes.forward + backward * passes.backward


@dataclass
class Forecast:
    """What is left of an evaluation.

    Steps count with their budgets, so this is an upper bound where attacks stop early; it falls as
    examples do. The rest of the current step counts with what its chunks needed so far. Steps with
    an unknown budget count once they run.

    Args:
        processes: Number of processes, which take the chunks of a step in turns.
        batch_size: Examples of a chunk, unless a step has its own.
        rates: Of the chunks that this process ran.
    """

    processes: int = 1
    batch_size: int = 250
    rates: Rates = field(default_factory=Rates)
    _mean: Budget = field(default_factory=Budget)
    _rest: Sequence[int] = ()
    _measured: Budget = field(default_factory=Budget)
    _seen: int = 0
    _later: Budget = field(default_factory=Budget)
    _alone: Budget = field(default_factory=Budget)

    def begin(
        self, budget: Budget | None, chunks: Sequence[int], later: Iterable[tuple[Step, int]]
    ) -> None:
        """A step starts on chunks of these sizes; ``later`` are further steps and their examples.

        The slowest process decides the time: the one with the most chunks.
        """
        self._mean, self._rest = budget or Budget(), chunks
        self._measured, self._seen = Budget(), 0
        self._later = self._alone = Budget()
        for step, examples in later:
            passes = (step.budget or Budget()).times(examples)
            count = math.ceil(examples / (step.batch_size or self.batch_size))
            self._later = self._later.plus(passes)
            if count:
                share = math.ceil(count / self.processes) / count
                self._alone = self._alone.plus(passes.times(share))

    def found(self, examples: int, cost: Cost) -> None:
        """A chunk of this step has cost this much, now or before an interruption."""
        self._measured = self._measured.plus(Budget(cost.forward, cost.backward))
        self._seen += examples
        self._mean = self._measured.times(1 / self._seen)

    def ran(self, examples: int, cost: Cost) -> None:
        """This process has run a chunk, and each of the others too."""
        self.rates.add(cost)
        self.found(examples, cost)
        self._rest = self._rest[self.processes :]

    def left(self) -> tuple[int, float] | None:
        """Passes of all processes, and seconds; ``None`` while the time of a pass is unknown."""
        mine = sum(self._rest[:: self.processes])
        seconds = self.rates.seconds(self._mean.times(mine).plus(self._alone))
        if seconds is None:
            return None
        return round(sum(self._mean.times(sum(self._rest)).plus(self._later))), seconds
