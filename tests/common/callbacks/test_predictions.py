"""Predictions under an attack of the suite, beside the clean ones."""

import csv
from typing import Any

import pytest
import torch
from torch import nn

from common.attacks.noise import GaussianNoise
from common.attacks.pgd import PGD
from common.callbacks.predictions import PredictionWriter
from common.callbacks.robust_evaluation import RobustEvaluation
from common.classifier import RobustClassifier
from common.data.images import ImageDataModule
from common.data.sources import Digits
from common.errors import ConfigurationError
from common.evaluation import SuiteEntry, evaluate
from common.objectives import AT

SUITE = {
    "noise": SuiteEntry(GaussianNoise([0.1])),
    "pgd": SuiteEntry(PGD(0.01, 0.004, 3), ["ce_f", "cw_f"]),
}


@pytest.fixture
def module() -> RobustClassifier:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 30), nn.ReLU(), nn.Linear(30, 10))
    return RobustClassifier(net, AT(), torch.optim.SGD)


@pytest.fixture
def predict(tmp_path, quiet_trainer, module):
    def predict(attack: str | None, **settings: Any) -> list[dict[str, str]]:
        callbacks = RobustEvaluation(SUITE), PredictionWriter()
        trainer = quiet_trainer(*callbacks, default_root_dir=tmp_path, **settings)
        data = ImageDataModule(Digits(), test_limit=200, eval_batch_size=90)
        trainer.predict(module, datamodule=data, attack=attack)
        return list(csv.DictReader((tmp_path / "predictions.csv").open()))

    return predict


@pytest.mark.filterwarnings("ignore:.*about chance")
def test_they_are_those_of_the_evaluation(predict, module) -> None:
    clean, rows = predict(None), predict("pgd")
    assert [{key: row[key] for key in clean[0]} for row in rows] == clean
    data = ImageDataModule(Digits(), test_limit=200)
    data.setup("predict")
    batch = data.test_set.__getitems__(range(200))
    images = batch["x"].float() / 255, batch["y"]
    found = evaluate(module.eval(), images, SUITE, eps=0.01, batch_size=90, progress=False)
    assert 0.0 < found.robust_acc < found.clean_acc
    assert [row["predicted_adv"] == row["label"] for row in rows] == found.robust.tolist()
    for row in rows:
        shares = [float(row[f"p{k}_adv"]) for k in range(10)]
        assert shares[int(row["predicted_adv"])] == max(shares)
        assert (shares == [float(row[f"p{k}"]) for k in range(10)]) == (
            row["predicted"] != row["label"]
        )


@pytest.mark.slow
def test_two_processes_write_the_file_of_one(predict) -> None:
    one, two = predict("pgd"), predict("pgd", devices=2, strategy="ddp_fork")
    assert [row["index"] for row in two] == [str(i) for i in range(200)]
    for row, other in zip(one, two, strict=True):  # six digits, of sums in batches of other sizes
        assert [*map(float, other.values())] == pytest.approx([*map(float, row.values())], abs=2e-6)


@pytest.mark.parametrize("name", ["noise", "pgd20"])
def test_only_attacks_of_the_suite(predict, name) -> None:
    with pytest.raises(ConfigurationError, match=name):
        predict(name)
