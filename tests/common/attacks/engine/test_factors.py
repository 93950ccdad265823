"""Losses that change a network while it is attacked: factors are not used for anything else."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from common.attacks.engine.factors import FactorConv2d
from common.attacks.engine.network import AttackEngine
from common.attacks.engine.products import ProductConv2d
from common.attacks.engine.winograd import WinogradConv2d

NETWORKS = {
    "small maps": (ProductConv2d, lambda: nn.Conv2d(8, 8, 3, padding=1), (8, 2, 2)),
    "strided": (ProductConv2d, lambda: nn.Conv2d(8, 8, 3, stride=2, padding=1), (8, 4, 4)),
    "pixels": (ProductConv2d, lambda: nn.Conv2d(8, 16, 1, stride=2), (8, 8, 8)),
    "Winograd's": (WinogradConv2d, lambda: nn.Conv2d(256, 256, 3, padding=1), (256, 8, 8)),
}


def doubled(conv: nn.Conv2d) -> None:
    conv.weight.data *= 2.0


def other(name: str, value: object) -> Callable[[nn.Conv2d], None]:
    return lambda conv: setattr(conv, name, value)


SETTINGS = {
    "stride": other("stride", (2, 1)),
    "padding": other("padding", (2, 2)),
    "padding_mode": other("padding_mode", "circular"),
}


def attacked(name: str) -> tuple[type[FactorConv2d], nn.Module, Tensor]:
    kind, conv, shape = NETWORKS[name]
    torch.manual_seed(0)
    net = nn.Sequential(conv(), nn.ReLU()).double().eval().requires_grad_(False)
    return kind, net, torch.rand(3, *shape, dtype=torch.float64)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("change", [*SETTINGS.values(), doubled], ids=[*SETTINGS, "weight"])
def test_a_copy_follows_its_own_settings_and_weights(name, change) -> None:
    kind, net, x = attacked(name)
    wanted = copy.deepcopy(net)
    change(wanted[0])
    with AttackEngine().applied(net, x):
        assert type(net[0]) is kind
        twin = copy.deepcopy(net)
        torch.testing.assert_close(twin(x), net(x))
        change(twin[0])
        torch.testing.assert_close(twin(x), wanted(x))
    with AttackEngine().applied(twin, x):  # which is a network of its own
        torch.testing.assert_close(twin(x), wanted(x))
    for sized in (x[..., :1], torch.cat([x, x], 3)):
        with AttackEngine().applied(twin, sized):
            torch.testing.assert_close(twin(sized), wanted(sized))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("change", SETTINGS.values(), ids=SETTINGS)
def test_settings_that_change_during_an_attack_are_followed(name, change) -> None:
    kind, net, x = attacked(name)
    wanted = copy.deepcopy(net)
    change(wanted[0])
    engine, plain = AttackEngine(), copy.deepcopy(net)
    with engine.applied(net, x):
        assert type(net[0]) is kind
        change(net[0])
        torch.testing.assert_close(net(x), wanted(x))
    with engine.applied(net, x):
        assert type(net[0]) is kind
        torch.testing.assert_close(net(x), plain(x))
