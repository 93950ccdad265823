"""The file that ``predict`` writes."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from common.errors import RunDirectoryError
from common.files import check_writable, write_text_atomically

HEADER = "index,label,predicted"


class PredictionWriter(BasePredictionWriter):
    """Writes ``predictions.csv``: index, label, predicted class and class probabilities.

    The predicted class is -1 where the network's scores are not finite. With several devices each
    rank writes a ``predictions-rank<k>.csv``.
    """

    def __init__(self) -> None:
        super().__init__(write_interval="epoch")

    def setup(self, trainer: Trainer, module: Any, stage: str) -> None:
        """Check before computing that the file can be written."""
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
        self, trainer: Trainer, module: Any, predictions: Sequence[Any], *_: Any
    ) -> None:
        """Write one row per image."""
        keys = ("index", "y", "predicted", "probabilities")
        columns = [torch.cat([part[key] for part in predictions]).tolist() for key in keys]
        classes = [f"p{k}" for k in range(len(columns[-1][0]))]
        file = io.StringIO(newline="")
        writer = csv.writer(file)
        writer.writerow([*HEADER.split(","), *classes])
        for *row, probabilities in zip(*columns, strict=True):
            writer.writerow([*row, *(f"{p:.6f}" for p in probabilities)])
        write_text_atomically(predictions_path(trainer), file.getvalue())


def predictions_path(trainer: Trainer) -> Path:
    """Where this process writes its predictions."""
    rank = "" if trainer.world_size == 1 else f"-rank{trainer.global_rank}"
    return Path(trainer.default_root_dir) / f"predictions{rank}.csv"
