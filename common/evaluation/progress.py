"""Progress of an evaluation: step, examples done, examples still correct, time left."""

import sys
import time

from rich import progress
from rich.console import Console

from common.evaluation.steps import Step


class Progress:
    """Receives the progress of an evaluation, and shows nothing."""

    def begin(self, step: Step, examples: int, survivors: int) -> None:
        """A step starts on ``examples`` examples."""

    def advance(self, examples: int, survivors: int) -> None:
        """``examples`` more are done, and ``survivors`` of all are still correct."""

    def foresee(self, passes: int, seconds: float) -> None:
        """What the evaluation still needs, see :class:`common.evaluation.forecast.Forecast`."""

    def end(self) -> None:
        """The step is done."""


class ConsoleProgress(Progress):
    """A bar in a terminal, inside ``with display``; elsewhere a line for every finished step.

    The first estimate of what is left has its own line there.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self._number = 0
        self._left = ""
        console = Console(stderr=True)
        self.display = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(bar_width=24),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[survivors]} standing"),
            progress.TimeElapsedColumn(),
            progress.TextColumn("{task.fields[left]}"),
            console=console,
            disable=not console.is_terminal,
        )

    def begin(self, step: Step, examples: int, survivors: int) -> None:
        """See :class:`Progress`."""
        self._number += 1
        self._name = f"[{self._number}/{self.total}] {step.key}"
        self._done, self._survivors, self._begun = 0, survivors, time.perf_counter()
        self._task = self.display.add_task(
            self._name, total=examples, survivors=survivors, left=self._left
        )

    def advance(self, examples: int, survivors: int) -> None:
        """See :class:`Progress`."""
        self._done, self._survivors = self._done + examples, survivors
        self.display.update(self._task, advance=examples, survivors=survivors)

    def foresee(self, passes: int, seconds: float) -> None:
        """See :class:`Progress`."""
        is_first = not self._left
        self._left = left(passes, seconds)
        self.display.update(self._task, left=self._left)
        if is_first and self._left and self.display.disable:
            print(self._left, file=sys.stderr, flush=True)

    def end(self) -> None:
        """See :class:`Progress`."""
        self.display.update(self._task, left="")
        if self.display.disable and self._done:
            seconds = time.perf_counter() - self._begun
            text = f"{self._done} examples, {self._survivors} standing, {seconds:.1f} s"
            rest = f"; {self._left}" if self._left else ""
            print(f"{self._name}: {text}{rest}", file=sys.stderr, flush=True)


def left(passes: int, seconds: float) -> str:
    """``about 1,200,000 passes left, 14 min``, in two digits; empty for no passes."""
    if passes == 0:
        return ""
    minutes = round(seconds / 60)
    if seconds < 60:
        duration = f"{max(seconds, 1):.0f} s"
    elif minutes < 60:
        duration = f"{minutes} min"
    else:
        duration = f"{minutes // 60:,} h {minutes % 60} min"
    return f"about {float(f'{passes:.2g}'):,.0f} passes left, {duration}"
