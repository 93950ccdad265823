"""Starts a run from the weights of another experiment."""

from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_warn

from common.callbacks.resuming import run_of
from common.checkpoints import checkpoint_beside, load_checkpoint
from common.errors import CheckpointError, ConfigurationError
from common.limits import check_name
from common.weights import check_weights_fit


class WarmStart(Callback):
    """Loads network weights before training begins, unless the run is resumed.

    Where the weights of the experiment are missing, ``fit`` warns and starts from scratch, while
    ``reproduce``, whose results go into tables, refuses.

    Args:
        experiment: Another experiment with the same seed, whose run directory is beside this one's.
        checkpoint: Which of its checkpoints: ``selected`` or ``last``.
        path: A checkpoint file, instead of ``experiment``.
    """

    def __init__(
        self,
        experiment: str | None = None,
        checkpoint: str = "selected",
        path: str | None = None,
    ) -> None:
        if experiment is not None and path is not None:
            raise ConfigurationError(
                f"warm_start takes an experiment or a path, got both ({experiment!r}, {path!r}); "
                "drop one of them"
            )
        if experiment is not None:
            check_name(experiment, "warm_start.experiment")
        self.experiment = experiment
        self.checkpoint = checkpoint
        self.path = path
        self.started_from: str | None = None

    def setup(self, trainer: Trainer, module: Any, stage: str) -> None:
        """Load the weights."""
        if stage != "fit" or (self.experiment is None and self.path is None):
            return
        if (resumed_from := run_of(trainer).resumed_from) is not None:
            self._check_resumed(trainer, resumed_from)
            return
        path, run = self.path, trainer.default_root_dir
        if self.experiment is not None:
            path = str(checkpoint_beside(run, self.experiment, self.checkpoint))
        if self.experiment is not None and not Path(str(path)).is_file():
            missing = (
                f"this run is meant to start from the weights of {self.experiment}, and {path} "
                "does not exist; train that experiment first (fit --config "
                f"{self.experiment} with the same seed)"
            )
            if run_of(trainer).is_reproducing:
                raise CheckpointError(missing)
            rank_zero_warn(f"{missing}. Starting from scratch instead")
            return
        weights = load_checkpoint(str(path))["state_dict"]
        check_weights_fit(module.state_dict(), weights, f"the warm start {path}")
        module.load_state_dict(weights)
        self.started_from = str(self.experiment or self.path)

    def _check_resumed(self, trainer: Trainer, resumed_from: str) -> None:
        """Refuse to reproduce a run that began from scratch, because its weights were missing."""
        states = load_checkpoint(resumed_from).get("callbacks", {})
        self.load_state_dict(states.get(self.state_key, {}))
        if run_of(trainer).is_reproducing and self.started_from is None:
            raise CheckpointError(
                f"{resumed_from} belongs to a run that began from scratch and not from the "
                f"weights of {self.experiment or self.path}; move its run directory away and run "
                "again"
            )

    def state_dict(self) -> dict[str, str | None]:
        """What this run started from."""
        return {"started_from": self.started_from}

    def load_state_dict(self, state_dict: dict[str, str | None]) -> None:
        """Restore it."""
        self.started_from = state_dict.get("started_from")
