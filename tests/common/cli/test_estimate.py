import pytest
import torch
from torch import nn

from common.attacks.pgd import PGD
from common.callbacks.adversarial_training import AdversarialTraining
from common.classifier import RobustClassifier
from common.cli import estimate
from common.cli.estimate import Rate, Rates, Work, count_training_step, duration, estimates
from common.cli.rows import main, rows_of
from common.data.sources import FashionMNIST
from common.objectives import AT, TRADES, Natural

ROW = "fashion_small_resnet_plain"
MACS = 16 * 64 * 10
"""Of 16 images of 8x8 in a linear layer: forward, or for one of its two gradients."""


@pytest.mark.parametrize(
    ("objective", "steps", "outer_passes", "forward", "backward"),
    [
        (Natural(), None, 1, 1, 1),
        (AT(), 3, 1, 3 + 1, 3 + 1),
        (AT(), 3, 2, 3 + 2, 3 + 2),
        (TRADES(), 3, 1, 1 + 3 + 2, 3 + 2),
    ],
)
def test_the_work_of_a_step_is_that_of_its_passes(
    objective, steps, outer_passes, forward, backward
) -> None:
    with torch.device("meta"):
        module = RobustClassifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), objective)
        batch = {"x": torch.empty(16, 1, 8, 8), "y": torch.zeros(16, dtype=torch.long)}
    adversary = AdversarialTraining(PGD(0.1, steps=steps) if steps else None)
    work = count_training_step(module, batch, adversary, outer_passes)
    assert (work.forward, work.backward) == (forward * MACS, backward * MACS)
    assert work.operations > 0


def test_a_rate_is_of_both_kinds_of_passes_and_of_operations() -> None:
    assert Rate(1.0, 2.0).seconds(Work(3.0, 4.0, 1e9)) == 11.0
    assert Rate(1.0, 2.0, 0.1).seconds(Work(3.0, 4.0, 1000.0)) == 100.0


def test_rates_are_measured_and_later_those_of_the_nearest_network(monkeypatch) -> None:
    with torch.device("meta"):
        module = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    rates = Rates(torch.device("cpu"))
    first = rates.of(module, (1, 8, 8), 16, 640.0)
    assert first.forward > 0
    monkeypatch.setattr(estimate, "ALLOWED", 0.0)
    assert rates.of(module, (1, 8, 8), 16, 1e9) == first


def test_rates_on_a_cpu_are_those_of_one_thread_shared_by_all(monkeypatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    monkeypatch.setattr(estimate, "timed", lambda step, _: (6.0, 100.0))
    with torch.device("meta"):
        module = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    rate = Rates(torch.device("cpu")).of(module, (1, 8, 8), 16, 640.0)
    assert rate.forward == pytest.approx(6.0 / 4 / (16 * 640))
    assert seen == [1, 4, 1, 4]


def test_times_follow_the_settings_of_a_row(monkeypatch) -> None:
    monkeypatch.setattr(Rates, "of", lambda *_: Rate(1.0, 1.0))
    found = []
    for batches in ("10", "20"):
        options = ("--trainer.limit_train_batches", batches, "--trainer.limit_val_batches", "0")
        found += [times[0] for _, times in estimates(rows_of("paper_cifs", ROW, [0], options))]
    few, many = found
    assert many.training == pytest.approx(2 * few.training)
    assert many.evaluation == few.evaluation


@pytest.mark.parametrize("is_known", [True, False])
def test_a_plan_prints_times_once_per_config_and_does_not_fail(
    is_known, monkeypatch, capsys, tmp_path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Rates, "of", lambda *_: Rate(1e-12, 1e-12))
    if not is_known:
        monkeypatch.setattr(FashionMNIST, "sizes", {})
    assert main(["paper_cifs", "--on", ROW, "--seeds", "0 1", "--plan"]) == 0
    plan, _, table = capsys.readouterr().out.partition("at a time")
    assert plan.count(ROW) == 2
    (line,) = [line for line in table.splitlines() if line.startswith(ROW)]
    assert ("unknown" in line) is not is_known


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1, "< 1 min"), (60, "1 min"), (95 * 60, "95 min"), (7200, "2 h"), (3 * 86400, "3 days")],
)
def test_durations_are_in_the_units_people_read(seconds, text) -> None:
    assert duration(seconds) == text
