"""Frozen teachers. Tags as in :mod:`paper_awnet.method`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.checkpoints import checkpoint_beside, load_weights
from common.errors import CheckpointError, ConfigurationError
from common.modes import try_out


@dataclass(eq=False)
class Teacher:
    """A frozen network in evaluation mode, evaluated without gradient.

    It is not a module, so that an objective neither trains, saves nor switches it; copies of the
    objective share it.

    Args:
        net: Images in [0, 1] to logits ``(N, K)``, with the classes of the student.
        experiment: The experiment that trained it; its run directory with the same seed is looked
            up beside the student's.
        checkpoint: ``last`` or ``selected``.
        path: A file with its weights; takes precedence over ``experiment``.
        as_it_is: Whether ``net`` already has its weights; then no file is read.
    """

    net: nn.Module
    experiment: str | None = None
    checkpoint: str = "last"
    path: str | None = None
    as_it_is: bool = False

    def __post_init__(self) -> None:
        if self.experiment is None and self.path is None and not self.as_it_is:
            raise ConfigurationError(
                "a teacher needs weights, got experiment=None, path=None and as_it_is=False; name "
                "the experiment that trains it or a file, or set as_it_is"
            )
        self.net.eval().requires_grad_(False)

    def __deepcopy__(self, memo: Any) -> "Teacher":
        return self

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Logits ``(N, K)``, constant."""
        first = next(self.net.parameters(), x)
        if (first.device, first.dtype) != (x.device, x.dtype):
            self.net.to(x.device, x.dtype)
        logits: Tensor = self.net(x)
        return logits

    def load(self, run: str | Path, shape: Sequence[int], num_classes: int) -> None:
        """Read the weights, given the student's run directory, and try the network out.

        Raises:
            CheckpointError: If there is no such file, or it belongs to another network.
            ConfigurationError: If the network does not fit images ``(C, H, W)`` or classes.
        """
        if not self.as_it_is:
            load_weights(self.net, Path(self.path) if self.path else self._find(Path(run)))
        name = f"the teacher {self.path or self.experiment or type(self.net).__name__}"
        remedy = "give the network it was trained with"
        scores = tuple(try_out(self.net, shape, remedy, what=name).shape[1:])
        if scores != (num_classes,):
            raise ConfigurationError(
                f"{name} has {scores} classes and the data have {num_classes}; choose a teacher "
                "that was trained on these data"
            )

    def _find(self, run: Path) -> Path:
        path = checkpoint_beside(run, str(self.experiment), self.checkpoint)
        if not path.is_file():
            seed = path.parents[1].name.removeprefix("seed")
            command = f"fit --config {self.experiment}"
            raise CheckpointError(
                f"the teacher {self.experiment} has not been trained: {path} does not exist; train "
                f"it first with python -m paper_awnet {command} --seed_everything {seed}, or give "
                "a file with its weights as path"
            )
        return path
