"""Parameter groups: who is in which, on what terms, and what is refused."""

from functools import partial

import pytest
import torch
from torch import nn

from common.errors import ConfigurationError
from common.optimization import ParameterGroup, grouped_optimizer


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.map = nn.Parameter(torch.ones(2, 3))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)


SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=5e-4)


def test_without_groups_there_is_one_with_every_trainable_parameter() -> None:
    net = Net()
    (group,) = grouped_optimizer(SGD, net).param_groups
    assert [id(p) for p in group["params"]] == [id(net.map), *map(id, net.conv.parameters())]
    assert group["lr"] == 0.1


def test_a_group_has_its_own_terms_and_the_rest_keeps_the_common_ones() -> None:
    net = Net()
    rest, maps = grouped_optimizer(
        SGD, net, [ParameterGroup(["*map"], lr_mult=10.0, weight_decay=0.0)]
    ).param_groups
    assert [id(p) for p in maps["params"]] == [id(net.map)]
    assert {id(p) for p in rest["params"]} == set(map(id, net.conv.parameters()))
    assert (maps["lr"], maps["weight_decay"]) == (pytest.approx(1.0), 0.0)
    assert (rest["lr"], rest["weight_decay"]) == (0.1, 5e-4)
    assert maps["momentum"] == 0.9


def test_the_terms_stay_along_the_schedule_and_in_a_step() -> None:
    net = Net()
    group = ParameterGroup(["map"], lr_mult=3.0, weight_decay=0.0)
    optimizer = grouped_optimizer(SGD, net, [group])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = net.map.clone(), net.conv.weight.clone()
    for _ in range(4):
        optimizer.step()
        schedule.step()
    rest, maps = schedule.get_last_lr()
    assert 0 < rest < 0.1
    assert maps == pytest.approx(3.0 * rest)
    assert torch.equal(net.map, before[0])
    assert not torch.equal(net.conv.weight, before[1])


def test_what_is_frozen_is_left_out_and_may_be_missing() -> None:
    with pytest.raises(ConfigurationError, match=r"no trainable parameter matches .*frozen"):
        grouped_optimizer(SGD, Net(), [ParameterGroup(["frozen"])])
    optimizer = grouped_optimizer(SGD, Net(), [ParameterGroup(["frozen"], may_be_empty=True)])
    assert len(optimizer.param_groups) == 1


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigurationError, match="several groups"):
        grouped_optimizer(SGD, Net(), [ParameterGroup(["map"]), ParameterGroup(["m*"])])
    with pytest.raises(ConfigurationError, match=r"lr_mult must not be negative, got -1"):
        ParameterGroup(["map"], lr_mult=-1.0)
    with pytest.raises(ConfigurationError, match=r"weight_decay must not be negative, got -0\.1"):
        ParameterGroup(["map"], weight_decay=-0.1)
