"""The file that ``predict`` writes."""

import csv
import io
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from common.attacks.losses import classify
from common.attacks.noise import Noise
from common.attacks.randomness import ExampleRandom, Stream, run_seed, seeded
from common.callbacks.resuming import run_of
from common.callbacks.robust_evaluation import RobustEvaluation
from common.errors import ConfigurationError, RunDirectoryError
from common.evaluation.confirm import part_of, settled
from common.evaluation.corruptions import Corruptions
from common.evaluation.models import adapted
from common.evaluation.runner import Team
from common.evaluation.suite import SuiteEntry, check_suite, steps_of
from common.files import check_writable, write_text_atomically
from common.modes import frozen
from common.objectives import Batch

HEADER = "index,label,predicted"


class PredictionWriter(BasePredictionWriter):
    """Writes ``predictions.csv``: index, label, predicted class and class probabilities.

    With :attr:`~common.callbacks.resuming.Run.attack`, an entry of the suite of the trainer's
    :class:`RobustEvaluation`, class and probabilities under this attack follow.

    The predicted class is -1 where the network's scores are not finite. Rows are in the order of
    the index; the first process writes those of all.
    """

    def __init__(self) -> None:
        super().__init__(write_interval="epoch")
        self._entry: tuple[str, SuiteEntry] | None = None

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
        name = run_of(trainer).attack
        self._entry = None if name is None else (name, _entry_of(trainer, module, name))

    def on_predict_batch_end(
        self, trainer: Trainer, module: Any, outputs: Any, batch: Batch, *args: Any
    ) -> None:
        """Predict the images of the batch under the attack too."""
        if self._entry is not None:
            x_adv = attacked(module, batch, *self._entry, seed=run_seed())
            with torch.no_grad(), trainer.precision_plugin.predict_step_context():
                found = module.predict_step({**batch, "x": x_adv}, 0)
            outputs |= {f"{key}_adv": found[key] for key in ("predicted", "probabilities")}
        super().on_predict_batch_end(trainer, module, outputs, batch, *args)

    def write_on_epoch_end(
        self, trainer: Trainer, module: Any, predictions: Sequence[Any], *_: Any
    ) -> None:
        """Write one row per image."""
        mine = [{key: value.cpu() for key, value in part.items()} for part in predictions]
        parts = [part for theirs in Team.of_processes().gather(mine) for part in theirs]
        if not trainer.is_global_zero:
            return
        found = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        order = found["index"].argsort()
        found = {key: column[order] for key, column in found.items()}
        ends = [end for end in ("", "_adv") if f"predicted{end}" in found]
        numbers = [found[key] for key in ("index", "y", *(f"predicted{end}" for end in ends))]
        shares = torch.cat([found[f"probabilities{end}"] for end in ends], dim=1)
        classes = range(found["probabilities"].shape[1])
        file = io.StringIO(newline="")
        writer = csv.writer(file)
        writer.writerow(
            [*HEADER.split(","), *(f"predicted{end}" for end in ends[1:])]
            + [f"p{k}{end}" for end in ends for k in classes]
        )
        rows = zip(*(column.tolist() for column in numbers), strict=True)
        for row, probabilities in zip(rows, shares.tolist(), strict=True):
            writer.writerow([*row, *(f"{p:.6f}" for p in probabilities)])
        write_text_atomically(predictions_path(trainer), file.getvalue())


def predictions_path(trainer: Trainer) -> Path:
    """Where the predictions go."""
    return Path(trainer.default_root_dir) / "predictions.csv"


def attacked(module: Any, batch: Batch, name: str, entry: SuiteEntry, seed: int) -> Tensor:
    """Images ``(N, C, H, W)`` under an entry of a suite, made as in an evaluation.

    Each is the one that broke the example first, else the last attempt. Images that are
    misclassified without an attack stay as they are, unless the entry is for all images.
    """
    with torch.inference_mode(False), frozen(module, "eval"), adapted(module):
        part = {key: value.clone() for key, value in batch.items()}
        x_adv, device = part["x"].clone(), part["x"].device
        with torch.no_grad():
            logits = module(part["x"])
        standing = (classify(logits) == part["y"]) | entry.all_images
        for step in steps_of({name: entry}, module, logits.shape[1], seed):
            rows = standing.nonzero().flatten()
            if not len(rows):
                break
            those = part_of(part, rows)
            index = those["index"].tolist()
            random = ExampleRandom(
                seed, zlib.crc32(name.encode()), those["index"], Stream.EVALUATION
            )
            drawn = zlib.crc32(f"{seed} {step.key} {index}".encode())
            with seeded(drawn, device):
                found = settled(
                    module, those, step.threat, partial(step.run, module, those, random)
                )
            x_adv[rows], standing[rows] = found["x_adv"], found["correct"]
    return x_adv


def _entry_of(trainer: Trainer, module: Any, name: str) -> SuiteEntry:
    """The entry of the suite with this name, which has to be an attack."""
    callbacks: Any = trainer.callbacks  # type: ignore[attr-defined]
    suites = [c.suite for c in callbacks if isinstance(c, RobustEvaluation)]
    suite: dict[str, SuiteEntry] = {key: entry for one in suites for key, entry in one.items()}
    if name not in suite:
        raise ConfigurationError(
            f"evaluation.suite has no {name!r}; it has {', '.join(suite) or 'no attacks'} (add "
            "some with --config quick)"
        )
    if isinstance(suite[name].attack, Noise | Corruptions):
        raise ConfigurationError(f"{name} of evaluation.suite is no attack; name another entry")
    check_suite({name: suite[name]}, module)
    return suite[name]
