"""The shifted cosine: its values, resumed, and from a configuration."""

import math

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LRSchedulerCallable

from common.errors import ConfigurationError
from paper_robustwrn.schedules import ShiftedCosine


def optimizer(lr: float = 0.1) -> torch.optim.SGD:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)


def test_the_published_values_of_the_cosine_from_a_yaml_file(rates) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--scheduler", type=LRSchedulerCallable)
    name = "paper_robustwrn.schedules.ShiftedCosine"
    entry = {"class_path": name, "init_args": {"epochs": 400}}
    made = parser.instantiate(parser.parse_object({"scheduler": entry})).scheduler(optimizer())
    found = rates(made, 400)
    assert found[1] == 0.1 == max(found)
    assert found[0] == found[2] == pytest.approx(0.0999985, abs=5e-8)
    assert found[200] == pytest.approx(0.0503927, abs=5e-8)
    assert found[399] == pytest.approx(6.168e-6, rel=1e-4)
    expected = [0.1 * 0.5 * (1 + math.cos(math.pi * (e - 1) / 400)) for e in range(400)]
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_a_resumed_schedule_goes_on(rates, epoch: int) -> None:
    whole = rates(ShiftedCosine(optimizer(), epochs=10), 10)
    first = ShiftedCosine(optimizer(), epochs=10)
    rates(first, epoch)
    second = ShiftedCosine(optimizer(lr=0.5), epochs=10)
    second.load_state_dict(first.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    assert rates(second, 10 - epoch) == whole[epoch:]


def test_a_schedule_without_epochs() -> None:
    with pytest.raises(ConfigurationError, match="got 0"):
        ShiftedCosine(optimizer(), epochs=0)
