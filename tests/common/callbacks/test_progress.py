"""The loss behind the progress bar is read once a second, not in every step."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from common.callbacks import progress
from common.callbacks.progress import PERIOD, ProgressBar


def test_the_loss_is_read_once_in_a_period(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [10.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    bar, found = ProgressBar(), {}
    trainer: Any = SimpleNamespace(
        training=True, callback_metrics=found, progress_bar_metrics={"val/acc": 0.5}, loggers=[]
    )

    def shown(after: float, loss: float) -> Any:
        now[0] += after
        found["train/loss"] = torch.tensor(loss)
        return bar.get_metrics(trainer, None)

    assert bar.get_metrics(trainer, None) == {"val/acc": 0.5}
    assert shown(PERIOD, 2.0) == {"val/acc": 0.5, "train/loss": 2.0}
    assert shown(PERIOD / 2, 1.0)["train/loss"] == 2.0
    assert shown(PERIOD / 2, 1.5)["train/loss"] == 1.5
    trainer.training = False
    assert shown(PERIOD, 3.0)["train/loss"] == 1.5
