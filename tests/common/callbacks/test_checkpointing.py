from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
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


def test_a_negative_first_epoch() -> None:
    with pytest.raises(ConfigurationError, match=r"from_epoch counts epochs from 0, got -1"):
        SelectedCheckpoint(from_epoch=-1)
