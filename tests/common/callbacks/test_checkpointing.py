from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader

from common.callbacks.checkpointing import LastCheckpoint, SelectedCheckpoint
from common.errors import ConfigurationError


class Scored(LightningModule):
    """Logs a score per epoch that was decided beforehand."""

    def __init__(self, scores: list[float]) -> None:
        super().__init__()
        self.scores = scores
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        return self.weight * batch.float().mean()

    def validation_step(self, batch: Any, _: int) -> None:
        self.log("val/score", self.scores[self.current_epoch])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def selected_epoch(folder: Path, scores: list[float], **settings: Any) -> int | None:
    loader = DataLoader(torch.arange(2))
    options = {"every": 1} | settings
    trainer = Trainer(
        max_epochs=len(scores),
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        check_val_every_n_epoch=options.pop("every"),
        callbacks=[
            SelectedCheckpoint("val/score", dirpath=str(folder), **options),
            LastCheckpoint(str(folder)),
        ],
    )
    trainer.fit(Scored(scores), loader, loader)
    assert torch.load(folder / "last.ckpt")["epoch"] == len(scores) - 1
    path = folder / "selected.ckpt"
    return torch.load(path)["epoch"] if path.exists() else None


SCORES = [0.9, 0.5, 0.7, 0.6, 0.7, 0.1]


@pytest.mark.parametrize(("first", "expected"), [(0, 0), (1, 4), (2, 4), (5, 5)])
def test_epochs_before_the_first_candidate_are_not_selected(
    tmp_path: Path, first: int, expected: int
) -> None:
    assert selected_epoch(tmp_path, SCORES, from_epoch=first) == expected


def test_nothing_is_selected_when_the_first_candidate_never_comes(tmp_path: Path) -> None:
    assert selected_epoch(tmp_path, SCORES, from_epoch=6) is None


def test_candidates_are_validated_epochs(tmp_path: Path) -> None:
    assert selected_epoch(tmp_path, SCORES, from_epoch=2, every=2) == 3
    assert selected_epoch(tmp_path / "min", SCORES, from_epoch=1, mode="min") == 5


def test_the_mean_of_clean_and_robust_accuracy_can_be_monitored(tmp_path: Path) -> None:
    robust = [0.5, 0.2, 0.4, 0.1]

    class Both(Scored):
        def validation_step(self, batch: Any, _: int) -> None:
            self.log("val/clean_acc", self.scores[self.current_epoch])
            self.log("val/robust_acc", robust[self.current_epoch])

    attacked = Callback()
    attacked.validation = "an attack"
    loader = DataLoader(torch.arange(2))
    trainer = Trainer(
        max_epochs=4,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[attacked, SelectedCheckpoint("val/mean_acc", dirpath=str(tmp_path))],
    )
    trainer.fit(Both([0.5, 0.9, 0.8, 1.0]), loader, loader)
    assert torch.load(tmp_path / "selected.ckpt")["epoch"] == 2  # 1.2 against 1.0, 1.1, 1.1
    assert trainer.checkpoint_callback.best_model_score == pytest.approx(0.6)


def test_a_mean_that_nobody_can_measure_is_refused(tmp_path: Path) -> None:
    loader = DataLoader(torch.arange(2))
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        callbacks=[SelectedCheckpoint("val/mean_acc", dirpath=str(tmp_path))],
    )
    with pytest.raises(
        ConfigurationError, match=r"val/mean_acc and evaluation\.validation is null"
    ):
        trainer.fit(Scored([0.5]), loader, loader)


def test_a_negative_first_epoch() -> None:
    with pytest.raises(ConfigurationError, match=r"from_epoch counts epochs from 0, got -1"):
        SelectedCheckpoint(from_epoch=-1)
