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

    def end(self) -> None:
        """The step is done."""


class ConsoleProgress(Progress):
    """A bar in a terminal, inside ``with display``; elsewhere a line for every finished step."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._number = 0
        console = Console(stderr=True)
        self.display = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(bar_width=24),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[survivors]} standing"),
            progress.TimeElapsedColumn(),
            progress.TextColumn("left"),
            progress.TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def begin(self, step: Step, examples: int, survivors: int) -> None:
        """See :class:`Progress`."""
        self._number += 1
        self._name = f"[{self._number}/{self.total}] {step.key}"
        self._done, self._survivors, self._begun = 0, survivors, time.perf_counter()
        self._task = self.display.add_task(self._name, total=examples, survivors=survivors)

    def advance(self, examples: int, survivors: int) -> None:
        """See :class:`Progress`."""
        self._done, self._survivors = self._done + examples, survivors
        self.display.update(self._task, advance=examples, survivors=survivors)

    def end(self) -> None:
        """See :class:`Progress`."""
        if self.display.disable and self._done:
            seconds = time.perf_counter() - self._begun
            text = f"{self._done} examples, {self._survivors} standing, {seconds:.1f} s"
            print(f"{self._name}: {text}", file=sys.stderr, flush=True)
