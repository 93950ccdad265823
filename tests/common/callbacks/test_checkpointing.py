"""Which epoch is selected."""

from collections.abc import Callable
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


@pytest.fixture
def selected_epoch(quiet_trainer, tmp_path) -> Callable[..., int | None]:
    """``selected_epoch(model, every=1, callback=Callback(), **settings)``."""

    def call(model: LightningModule, every: int = 1, callback: Any = None, **settings: Any) -> Any:
        loader, settings = DataLoader(torch.arange(2)), {"monitor": "val/score"} | settings
        selected = SelectedCheckpoint(dirpath=str(tmp_path), **settings)
        trainer = quiet_trainer(
            callback or Callback(), selected, LastCheckpoint(str(tmp_path)),
            max_epochs=len(model.scores), check_val_every_n_epoch=every, kind=Trainer,
        )  # fmt: skip
        trainer.fit(model, loader, loader)
        assert torch.load(tmp_path / "last.ckpt")["epoch"] == len(model.scores) - 1
        path = tmp_path / "selected.ckpt"
        return torch.load(path)["epoch"] if path.exists() else None

    return call


SCORES = [0.9, 0.5, 0.7, 0.6, 0.7, 0.1]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 0),
        ({"from_epoch": 1}, 4),
        ({"from_epoch": 5}, 5),
        ({"from_epoch": 6}, None),
        ({"from_epoch": 2, "every": 2}, 3),
        ({"from_epoch": 1, "mode": "min"}, 5),
    ],
)
def test_the_last_of_the_best_candidates_is_selected(selected_epoch, settings, expected) -> None:
    """Candidates are the validated epochs from the first one on."""
    assert selected_epoch(Scored(SCORES), **settings) == expected


def test_the_mean_of_clean_and_robust_accuracy_needs_both(selected_epoch) -> None:
    robust = [0.5, 0.2, 0.4, 0.1]

    class Both(Scored):
        def validation_step(self, batch: Any, _: int) -> None:
            self.log("val/clean_acc", self.scores[self.current_epoch])
            self.log("val/robust_acc", robust[self.current_epoch])

    model, attacked = Both([0.5, 0.9, 0.8, 1.0]), Callback()
    attacked.validation = "an attack"
    # The sums are 1.2 against 1.0, 1.1, 1.1.
    assert selected_epoch(model, callback=attacked, monitor="val/mean_acc") == 2
    with pytest.raises(
        ConfigurationError, match=r"val/mean_acc and evaluation\.validation is null"
    ):
        selected_epoch(model, monitor="val/mean_acc")


def test_a_negative_first_epoch() -> None:
    with pytest.raises(ConfigurationError, match=r"from_epoch counts epochs from 0, got -1"):
        SelectedCheckpoint(from_epoch=-1)
