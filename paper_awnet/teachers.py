"""Teachers: finished networks that are asked and never trained."""

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
    """A frozen network in evaluation mode, asked without gradient.

    It is no module on purpose: whoever holds it as an attribute neither trains it, nor saves it
    with its own weights, nor switches its mode; and copies of the holder share it.

    Args:
        net: Images in [0, 1] to logits ``(N, K)``, with the classes of the student.
        experiment: The experiment that trained it, whose run directory with the same seed is looked
            up beside the student's.
        checkpoint: Which of its checkpoints: ``last`` or ``selected``.
        path: A file with its weights; goes before ``experiment``.
        as_it_is: Whether ``net`` comes with its weights already; then no file is read at all.

    Raises:
        ConfigurationError: If none of the three says where the weights come from.
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
                "the experiment that trains it or a file, or set as_it_is for a network that has "
                "them"
            )
        self.net.eval().requires_grad_(False)

    def __deepcopy__(self, memo: Any) -> "Teacher":
        return self

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Logits ``(N, K)``, constant."""
        parameter = next(self.net.parameters(), None)
        if parameter is not None and (parameter.device, parameter.dtype) != (x.device, x.dtype):
            self.net.to(x.device, x.dtype)
        logits: Tensor = self.net(x)
        return logits

    def load(self, run: str | Path, shape: Sequence[int], num_classes: int) -> None:
        """Read the weights, and try the network on a blank image.

        Args:
            run: The student's run directory.
            shape: Of an image, ``(C, H, W)``.
            num_classes: K of the student.

        Raises:
            CheckpointError: If there is no such file, or it belongs to another network.
            ConfigurationError: If the network does not fit images or classes.
        """
        if not self.as_it_is:
            load_weights(self.net, self._find(Path(run)))
        remedy = "give the network it was trained with"
        scores = try_out(self.net, shape, remedy, what=f"the teacher {self._name}").shape[1:]
        if tuple(scores) != (num_classes,):
            raise ConfigurationError(
                f"the teacher {self._name} knows {tuple(scores)} classes and the data have "
                f"{num_classes}; distillation compares class by class, so choose a teacher that "
                "was trained on these data"
            )

    @property
    def _name(self) -> str:
        if self.as_it_is:
            return type(self.net).__name__
        return str(self.path or self.experiment)

    def _find(self, run: Path) -> Path:
        if self.path is not None:
            return Path(self.path)
        path = checkpoint_beside(run, str(self.experiment), self.checkpoint)
        if not path.is_file():
            seed = path.parents[1].name.removeprefix("seed")
            raise CheckpointError(
                f"the teacher {self.experiment} has not been trained: {path} does not exist. Train "
                f"it first, python -m paper_awnet fit --config "
                f"paper_awnet/configs/{self.experiment}.yaml --seed_everything {seed}, or use "
                "make, which does so; weights that are elsewhere are given as its path"
            )
        return path
