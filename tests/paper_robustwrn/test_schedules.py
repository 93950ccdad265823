import math
from functools import partial

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LRSchedulerCallable

from common.errors import ConfigurationError
from paper_robustwrn.schedules import ShiftedCosine


def optimizer(lr: float = 0.1) -> torch.optim.SGD:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)


def rates(make: LRSchedulerCallable, epochs: int) -> list[float]:
    """The learning rate of each epoch, stepped after it as Lightning does."""
    sgd = optimizer()
    scheduler = make(sgd)
    found = []
    for _ in range(epochs):
        found.append(sgd.param_groups[0]["lr"])
        sgd.step()
        scheduler.step()
    return found


def test_the_published_values_of_the_cosine() -> None:
    found = rates(partial(ShiftedCosine, epochs=400), 400)
    assert found[1] == 0.1 == max(found)
    assert found[0] == found[2] == pytest.approx(0.0999985, abs=5e-8)
    assert found[200] == pytest.approx(0.0503927, abs=5e-8)
    assert found[399] == pytest.approx(6.168e-6, rel=1e-4)
    for epoch, rate in enumerate(found):
        assert rate == pytest.approx(0.1 * 0.5 * (1 + math.cos(math.pi * (epoch - 1) / 400)))


def test_the_step_schedule_of_the_configs() -> None:
    step = partial(torch.optim.lr_scheduler.MultiStepLR, milestones=[75, 90], gamma=0.1)
    expected = [0.1] * 75 + [0.01] * 15 + [0.001] * 10
    assert rates(step, 100) == pytest.approx(expected)


@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_a_resumed_schedule_goes_on(epoch: int) -> None:
    whole = rates(partial(ShiftedCosine, epochs=10), 10)
    first = optimizer()
    schedule = ShiftedCosine(first, epochs=10)
    for _ in range(epoch):
        first.step()
        schedule.step()
    second = optimizer(lr=0.5)
    resumed = ShiftedCosine(second, epochs=99)
    resumed.load_state_dict(schedule.state_dict())
    second.load_state_dict(first.state_dict())
    found = []
    for _ in range(epoch, 10):
        found.append(second.param_groups[0]["lr"])
        second.step()
        resumed.step()
    assert found == whole[epoch:]


def test_every_group_keeps_its_share() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    sgd = torch.optim.SGD([{"params": parameters[:1], "lr": 0.3}, {"params": parameters[1:]}], 0.1)
    ShiftedCosine(sgd, epochs=4)
    one, other = (group["lr"] for group in sgd.param_groups)
    assert one == pytest.approx(3 * other)


def test_a_yaml_file_can_ask_for_it() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--scheduler", type=LRSchedulerCallable)
    name = "paper_robustwrn.schedules.ShiftedCosine"
    entry = {"class_path": name, "init_args": {"epochs": 400}}
    made = parser.instantiate(parser.parse_object({"scheduler": entry})).scheduler(optimizer())
    assert isinstance(made, ShiftedCosine)
    assert made.epochs == 400


def test_a_schedule_without_epochs() -> None:
    with pytest.raises(ConfigurationError, match="epochs must be at least 1, got 0"):
        ShiftedCosine(optimizer(), epochs=0)
