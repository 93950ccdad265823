"""Two processes of torch.distributed evaluate as one does, to the last digit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from common.attacks.decision import DecisionBased
from common.attacks.pgd import PGD
from common.callbacks.robust_evaluation import RobustEvaluation
from common.errors import ConfigurationError
from common.evaluation import Audit, RobustAccuracy, SuiteEntry, evaluate
from common.evaluation.progress import Progress

EPS = 0.03
SUITE = {
    "pgd": SuiteEntry(PGD(EPS, steps=3, restarts=2), ["ce_f", "cw_f"]),
    "rays": SuiteEntry(DecisionBased(EPS, queries=20), survivors_only=True),
}


class Stock(lightning.LightningModule):
    """A module as anyone writes it; it measures with the metric what the callback measures."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.BatchNorm1d(4))
        self.robust = RobustAccuracy(SUITE)
        self.worst, self.clean = self.robust["worst"], self.robust["clean"]

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, _: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, _: int) -> None:
        self.robust.update(self, *batch)
        self.log("val/worst", self.worst)
        self.log("val/clean", self.clean)

    def on_test_start(self) -> None:
        self.net[2].running_mean += self.global_rank  # as after training with DDP

    def test_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def data(count: int = 43) -> tuple[Tensor, Tensor]:
    x = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    y = Stock().eval()(x).argmax(1)
    y[::7] = (y[::7] + 1) % 4
    return x, y


def loader(count: int = 43, **settings: Any) -> DataLoader:
    return DataLoader(TensorDataset(*data(count)), batch_size=8, **settings)


def _process(rank: int, folder: Path, work: Callable[[Path], Any]) -> None:
    where = f"file://{folder}/rendezvous"
    torch.distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=2)
    torch.save(work(folder), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def both(folder: Path, work: Callable[[Path], Any]) -> list[Any]:
    """What two processes return."""
    folder.mkdir()
    torch.multiprocessing.start_processes(_process, (folder, work), nprocs=2, start_method="fork")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


class Told(Progress):
    def __init__(self) -> None:
        self.passes: list[int] = []
        self.done = 0

    def advance(self, examples: int, survivors: int) -> None:
        self.done += examples

    def foresee(self, passes: int, seconds: float) -> None:
        self.passes.append(passes)


def _evaluated(folder: Path) -> tuple[list[int], int]:
    """Inside a process group the model is often wrapped, and would wait for the other process."""
    model, told = Stock().eval(), Told()
    if torch.distributed.is_initialized():
        model = DistributedDataParallel(model)
    audit = Audit(9, None, 4, 2, square_queries=5, random_samples=5, decision_queries=20)
    settings: dict[str, Any] = {"audit": audit, "save_examples": True, "batch_size": 8}
    evaluate(model, data(), SUITE, output=folder / "out", progress=told, **settings)
    return told.passes, told.done


@pytest.mark.slow
def test_evaluate_shares_the_work_of_a_process_group(tmp_path, no_pictures) -> None:
    (first, done), (second, _) = both(tmp_path / "two", _evaluated)
    alone, done_alone = _evaluated(tmp_path / "one")
    assert done == done_alone
    assert alone[0] > first[0] > first[-1] == 0  # after two chunks there, one here
    assert second == []
    one, two = (
        json.loads((tmp_path / name / "out/results.json").read_text()) for name in ("one", "two")
    )
    assert two["checkpoints"] == one["checkpoints"]
    assert 0 < one["checkpoints"]["model"]["metrics"]["worst"] < 0.8
    for file in ("x_adv", "robust"):
        found = [np.load(tmp_path / n / f"out/adversarial/{file}.npy") for n in ("one", "two")]
        assert np.array_equal(*found), file


def _by_batches(folder: Path) -> dict[str, Tensor]:
    metric, (x, y) = RobustAccuracy(SUITE), data()
    rank, size = (0, 1), 43
    if torch.distributed.is_initialized():
        rank, size = (torch.distributed.get_rank(), 2), 5
    metric_of_rank = torch.arange(rank[0], 43, rank[1])
    for rows in metric_of_rank.split(size):
        metric.update(Stock(), x[rows], y[rows])
    found = metric.compute()
    metric.reset()
    assert metric.total == 0
    return found


def _apart(folder: Path) -> str:
    """Each process has another part of the data."""
    x, y = (part[torch.distributed.get_rank() :: 2][:20] for part in data())
    with pytest.raises(ConfigurationError) as caught:
        evaluate(Stock().eval(), (x, y), SUITE, progress=False)
    return str(caught.value)


def test_counts_of_the_metric_add_up_and_parts_of_the_data_are_refused(tmp_path) -> None:
    first, second = both(tmp_path / "two", _by_batches)
    assert first == second == _by_batches(tmp_path)
    assert 0 < first["worst"] < first["clean"] < 1
    assert all("data" in message for message in both(tmp_path / "apart", _apart))


@pytest.fixture
def in_stock_trainer(tmp_path) -> Callable[..., tuple[Any, ...]]:
    """What a stock trainer with so many processes logs in validation and files under test."""

    def call(devices: int) -> tuple[Any, ...]:
        folder = tmp_path / str(devices)
        evaluation = RobustEvaluation(SUITE, SuiteEntry(PGD(EPS, steps=2)), pictures=False)
        trainer = lightning.Trainer(
            accelerator="cpu",
            devices=devices,
            strategy="ddp_fork" if devices > 1 else "auto",
            callbacks=[evaluation],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            default_root_dir=folder,
        )
        module = Stock()
        (even,) = trainer.validate(module, loader(44), verbose=False)
        (uneven,) = trainer.validate(module, loader(), verbose=False)
        (tested,) = trainer.test(module, loader(), verbose=False)
        filed = json.loads((folder / "results.json").read_text())["checkpoints"]
        return even, uneven["val/robust_acc"], tested, filed

    return call


@pytest.mark.slow
def test_a_stock_trainer_with_two_processes_reports_what_one_does(in_stock_trainer) -> None:
    """43 images: Lightning's sampler repeats one."""
    one, two = in_stock_trainer(1), in_stock_trainer(2)
    assert one == two
    even, _, tested, filed = two
    assert filed["untrained"]["examples"] == 43
    assert 0 < even["val/worst"] <= even["val/robust_acc"] < even["val/clean"] < 1
    assert tested["test/worst"] == pytest.approx(filed["untrained"]["metrics"]["worst"])
