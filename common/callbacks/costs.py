"""Seconds and memory that training takes, kept in its checkpoints."""

import resource
import statistics
import sys
import time
from importlib.metadata import version
from typing import Any, cast

import torch
from lightning import Trainer
from lightning.pytorch import Callback

from common.results.provenance import device_name
from common.results.schema import TrainingCost

COSTS = "costs"
"""Key of a checkpoint."""


class CostRecorder(Callback):
    """Measures each epoch from its start to the end of its last batch, so without validation.

    Epochs that a run was resumed in are left out. The first process measures: on a GPU the most
    bytes of tensors, on a CPU how far the peak of the process rose since training began.
    """

    def __init__(self) -> None:
        self._seconds: list[float] = []
        self._memory = self._before = 0
        self._begun: float | None = None

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        """Note what imports and data have taken of a CPU's memory."""
        device = trainer.strategy.root_device
        self._before = _peak_memory(device) if device.type == "cpu" else 0

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        """Begin to measure; Lightning does not call it where a run is resumed within an epoch."""
        if (device := trainer.strategy.root_device).type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self._begun = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        """Note the epoch's time after its last batch, before the validation that follows."""
        if self._begun is None or not trainer.is_last_batch:
            return
        if (device := trainer.strategy.root_device).type == "cuda":
            torch.cuda.synchronize(device)
        self._seconds.append(time.perf_counter() - self._begun)
        self._memory = max(self._memory, _peak_memory(device) - self._before)
        self._begun = None

    def on_save_checkpoint(self, trainer: Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        """Add what was measured so far, of one process, and on what."""
        checkpoint[COSTS] = {
            "seconds": list(self._seconds),
            "memory": self._memory,
            "device": f"{module.device.type} ({device_name(module.device)})",
            "threads": torch.get_num_threads(),
            "processes": trainer.world_size,
            "versions": {name: version(name) for name in ("torch", "lightning")},
        }

    def on_load_checkpoint(self, trainer: Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        """Continue with the epochs of an interrupted run."""
        if found := checkpoint.get(COSTS):
            self._seconds, self._memory = list(found["seconds"]), found["memory"]


def training_cost(checkpoint: dict[str, Any]) -> TrainingCost | None:
    """What a checkpoint tells of its training; ``None`` without a measured epoch."""
    found = checkpoint.get(COSTS)
    if not found or not found["seconds"]:
        return None
    made_on = {key: found[key] for key in ("device", "threads", "processes", "versions")}
    return cast(
        TrainingCost,
        {
            "seconds_per_epoch": round(statistics.median(found["seconds"]), 4),
            "epochs": len(found["seconds"]),
            "peak_memory": found["memory"],
            **made_on,
        },
    )


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
