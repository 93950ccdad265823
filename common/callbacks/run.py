"""What callbacks know of a run beyond Lightning's trainer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch import Callback


@dataclass
class Run:
    """How a run began; the defaults hold under Lightning's trainer.

    Args:
        settings: What the run is made with (:mod:`common.results.identity`).
        resumed_from: The checkpoint it continues.
        is_reproducing: Whether its results go into a table; checks are stricter then.
    """

    settings: Mapping[str, Any] | None = None
    resumed_from: str | None = None
    is_reproducing: bool = False


class RunTrainer(pl.Trainer):
    """A trainer that says which run it is."""

    callbacks: list[Callback]  # connectors of Lightning set these two
    fast_dev_run: bool | int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.run = Run()


def run_of(trainer: pl.Trainer) -> Run:
    """The run of a trainer."""
    return trainer.run if isinstance(trainer, RunTrainer) else Run()
