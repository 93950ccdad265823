"""How far an evaluation is: attack, examples done, survivors, time left."""

import sys
import time
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from common.evaluation.steps import Step


class ConsoleProgress:
    """A bar in a terminal, a line for every finished step elsewhere.

    Args:
        total: How many steps there are, where that is known.
    """

    def __init__(self, total: int | None = None) -> None:
        self.total = total
        self.number = 0
        self._bar: Progress | None = None
        if Console(stderr=True).is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[survivors]} standing"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )

    def __enter__(self) -> Self:
        """Show the bar."""
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()

    def begin(self, step: Step, examples: int, survivors: int) -> None:
        """A step starts."""
        self.number += 1
        of = f"/{self.total}" if self.total else ""
        self._name, self._done, self._survivors = f"[{self.number}{of}] {step.key}", 0, survivors
        self._begun = time.perf_counter()
        if self._bar is not None:
            self._task = self._bar.add_task(self._name, total=examples, survivors=survivors)

    def advance(self, examples: int, survivors: int) -> None:
        """More examples are done."""
        self._done, self._survivors = self._done + examples, survivors
        if self._bar is not None:
            self._bar.update(self._task, advance=examples, survivors=survivors)

    def end(self) -> None:
        """The step is done."""
        if self._bar is None and self._done:
            seconds = time.perf_counter() - self._begun
            line = (
                f"{self._name}: {self._done} examples, {self._survivors} standing, {seconds:.1f} s"
            )
            print(line, file=sys.stderr, flush=True)
