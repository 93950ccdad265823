"""What ``predict`` leaves behind."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from common.errors import RunDirectoryError
from common.files import check_writable, write_text_atomically

HEADER = "index,label,predicted"


class PredictionWriter(BasePredictionWriter):
    """Writes ``predictions.csv``: index, label, predicted class and class probabilities.

    The predicted class is -1 where the network's scores are not finite.

    With several devices each rank writes its own ``predictions-rank<k>.csv``.
    """

    def __init__(self) -> None:
        super().__init__(write_interval="epoch")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find a place that cannot be written before anything is computed."""
        if stage != "predict":
            return
        path = predictions_path(trainer)
        check_writable(path)
        if path.exists() and not path.read_bytes()[:1000].startswith(HEADER.encode()):
            raise RunDirectoryError(
                f"{path} is there and was not written by predict; move it away, or choose another "
                "folder with --trainer.default_root_dir FOLDER"
            )

    def write_on_epoch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        """Write one row per image."""
        path = predictions_path(trainer)

        def joined(key: str) -> Tensor:
            return torch.cat([part[key] for part in predictions]).cpu()

        index, y, probabilities = joined("index"), joined("y"), joined("probabilities")
        predicted = joined("predicted")
        file = io.StringIO(newline="")
        writer = csv.writer(file)
        classes = [f"p{k}" for k in range(probabilities.shape[1])]
        writer.writerow([*HEADER.split(","), *classes])
        columns = (index, y, predicted, probabilities)
        for row in zip(*(column.tolist() for column in columns), strict=True):
            writer.writerow([*row[:3], *(f"{p:.6f}" for p in row[3])])
        write_text_atomically(path, file.getvalue())


def predictions_path(trainer: Trainer) -> Path:
    """Where this process writes its predictions."""
    rank = "" if trainer.world_size == 1 else f"-rank{trainer.global_rank}"
    return Path(trainer.default_root_dir) / f"predictions{rank}.csv"
