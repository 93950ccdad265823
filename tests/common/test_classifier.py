"""Clean metrics and predictions of a network whose scores are not finite."""

import csv
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from common.attacks.losses import as_class, classify
from common.callbacks.predictions import PredictionWriter
from common.classifier import RobustClassifier
from common.objectives import Natural

SCORES = torch.tensor([
    [2.0, 1.0, 0.0],
    [torch.nan, torch.nan, torch.nan],
    [torch.nan, 1.0, 0.0],
    [0.0, torch.inf, 1.0],
    [torch.inf, torch.inf, 0.0],
    [0.0, 1.0, -torch.inf],
])  # fmt: skip


class Fixed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return SCORES


@pytest.fixture
def model(monkeypatch) -> RobustClassifier:
    model = RobustClassifier(Fixed(), Natural())
    monkeypatch.setattr(model, "log", lambda *_, **__: None)
    return model


def test_scores_that_are_not_finite_are_no_class() -> None:
    assert classify(SCORES).tolist() == [0, -1, -1, -1, -1, -1]


@pytest.mark.parametrize("average", ["micro", "none"])
def test_for_every_label_it_is_wrong(average: str) -> None:
    for label in range(3):
        y = torch.full((6,), label)
        accuracy = MulticlassAccuracy(3, average=average)
        accuracy.update(as_class(classify(SCORES), y, 3), y)
        right = 1 / 6 if label == 0 else 0.0
        assert accuracy.compute().max() == pytest.approx(right)


def test_clean_accuracy(model) -> None:
    y = torch.tensor([0, 0, 1, 1, 0, 1])
    model.validation_step({"x": torch.zeros(6, 1), "y": y, "index": torch.arange(6)}, 0)
    assert model.accuracy.compute().item() == pytest.approx(1 / 6)


def test_predictions_have_no_class_either(model, tmp_path) -> None:
    batch = {"x": torch.zeros(6, 1), "y": torch.zeros(6), "index": torch.arange(6)}
    trainer = SimpleNamespace(is_global_zero=True, default_root_dir=tmp_path)
    PredictionWriter().write_on_epoch_end(trainer, model, [model.predict_step(batch, 0)], [])
    with (tmp_path / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["predicted"] for row in rows] == ["0", "-1", "-1", "-1", "-1", "-1"]
