"""Convolutions as products of matrices: the same numbers, and only where they pay."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.attacks import columns, engine
from common.attacks.columns import ColumnsConv2d, convolve, suits
from common.attacks.engine.network import AttackEngine
from common.modes import frozen


def drawn(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("size", [(4, 4), (2, 3), (1, 1), (5, 2)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("has_bias", [True, False])
def test_outputs_and_input_gradients_are_the_convolutions(size, layout, has_bias) -> None:
    x = drawn(3, 5, *size).to(memory_format=layout).requires_grad_()
    weight, bias = drawn(7, 5, 3, 3).to(memory_format=layout), drawn(7) if has_bias else None
    wanted, found = F.conv2d(x, weight, bias, padding=1), convolve(x, weight, bias)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert found.is_contiguous(memory_format=torch.channels_last)
    towards = drawn(*wanted.shape)
    (expected,) = torch.autograd.grad(wanted, x, towards)
    (gradient,) = torch.autograd.grad(found, x, towards)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [({}, True), ({"out_channels": 256}, False), ({"stride": 2}, False), ({"groups": 2}, False)],
)
def test_which_convolutions_suit(settings, wanted) -> None:
    with torch.device("meta"):
        usual = {"in_channels": 512, "out_channels": 512, "kernel_size": 3, "padding": 1}
        assert suits(nn.Conv2d(**(usual | settings))) is wanted


@pytest.mark.parametrize(("shape", "is_small"), [((2, 4, 4, 4), True), ((2, 4, 5, 4), False)])
def test_small_maps_alone(shape, is_small, monkeypatch) -> None:
    seen: list[torch.Size] = []

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        seen.append(x.shape)
        return convolve(x, weight, bias)

    monkeypatch.setattr(columns, "convolve", counted)
    conv, x = ColumnsConv2d(4, 6, 3, padding=1).double(), drawn(*shape)
    torch.testing.assert_close(conv(x), nn.Conv2d.forward(conv, x), rtol=1e-12, atol=1e-12)
    assert bool(seen) is is_small


def small_maps() -> nn.Module:
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU()]
    body += [nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(128, 10)).eval()


@pytest.mark.parametrize("has_units", [True, False])
def test_an_engine_in_bfloat16_uses_them_where_the_processor_has_the_units(
    has_units, monkeypatch
) -> None:
    monkeypatch.setattr(columns, "_LEAST_CHANNELS", 8)
    monkeypatch.setattr(engine, "has_matrix_units", lambda: has_units)
    net, x = small_maps(), torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))

    def gradient() -> Tensor:
        z = x.clone().requires_grad_()
        return torch.autograd.grad(net(z).float().tanh().sum(), z)[0]

    with frozen(net):
        exact = gradient()
        with AttackEngine(precision="bf16").applied(net, x):
            assert (type(net[3]) is ColumnsConv2d) is has_units
            assert type(net[0]) is nn.Conv2d
            found = gradient()
        with AttackEngine().applied(net, x):
            assert type(net[3]) is nn.Conv2d
    assert found.dtype == torch.float32
    assert (found - exact).norm() < 0.03 * exact.norm()


def test_the_processor_is_asked() -> None:
    assert columns.has_matrix_units() is bool(torch.cpu.get_capabilities()["amx_bf16"])
