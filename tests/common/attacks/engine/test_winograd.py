"""Winograd's convolution: the same numbers, where it is used, and what it rounds."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.attacks.engine import winograd
from common.attacks.engine.network import AttackEngine
from common.attacks.engine.winograd import WinogradConv2d, convolve, tile_of, transformed
from common.networks.resnet import ResNet

EXACT = {"rtol": 1e-11, "atol": 1e-12}
SINGLE = {"rtol": 1e-4, "atol": 1e-5}
SIZES = [(8, 8), (7, 10), (1, 5), (3, 1)]
both_tiles = pytest.mark.parametrize("tile", [2, 4])


def drawn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


def usual(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight, padding=1)


@both_tiles
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("memory", [winograd._MEMORY, 1], ids=["at once", "image by image"])
def test_outputs_and_input_gradients_are_the_convolutions(
    size, tile, layout, memory, monkeypatch
) -> None:
    monkeypatch.setattr(winograd, "_MEMORY", memory)
    x, weight = drawn(3, 5, *size).to(memory_format=layout).requires_grad_(), drawn(7, 5, 3, 3)
    wanted, found = usual(x, weight), convolve(x, transformed(weight, tile), tile)
    torch.testing.assert_close(found, wanted, **EXACT)
    assert found.permute(2, 3, 0, 1).is_contiguous()
    towards = drawn(*wanted.shape)
    (expected,) = torch.autograd.grad(wanted, x, towards)
    (gradient,) = torch.autograd.grad(found, x, towards)
    torch.testing.assert_close(gradient, expected, **EXACT)


@both_tiles
def test_second_derivatives_are_there(tile) -> None:
    x, weight = drawn(1, 2, 4, 4), drawn(2, 2, 3, 3)
    factors, hessian = transformed(weight, tile), torch.autograd.functional.hessian
    wanted = hessian(lambda z: usual(z, weight).tanh().square().sum(), x)
    found = hessian(lambda z: convolve(z, factors, tile).tanh().square().sum(), x)
    assert wanted.abs().max() > 0.1
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-11)


@both_tiles
def test_nothing_of_the_image_is_kept_for_the_gradient(tile) -> None:
    x, factors = drawn(64, 6, 8, 8).requires_grad_(), transformed(drawn(6, 6, 3, 3), tile)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        convolve(x, factors, tile)
    largest = max(tensor.untyped_storage().nbytes() for tensor in kept)
    assert largest <= factors.nbytes < x.nbytes / 10


# ------------------------------------------------------------------------------ where it is used


@pytest.mark.parametrize(
    ("settings", "size", "wanted"),
    [
        ({}, (8, 8), 4),
        ({"out_channels": 512}, (8, 8), 2),
        ({"out_channels": 128}, (8, 8), None),
        ({"in_channels": 128}, (8, 8), None),
        ({"stride": 2}, (8, 8), None),
        ({"padding": 2, "dilation": 2}, (8, 8), None),
        ({"groups": 2}, (8, 8), None),
        ({"padding_mode": "reflect"}, (8, 8), None),
        ({"kernel_size": (3, 1), "padding": (1, 0)}, (8, 8), None),
        ({}, (64, 8), 4),
        ({}, (65, 8), None),  # transforms of so long an axis cost too much
        ({}, (6, 6), None),  # nine of sixteen pixels
        ({}, (2, 2), None),
        ({"in_channels": 512, "out_channels": 512}, (2, 2), 2),
        ({"in_channels": 512, "out_channels": 512}, (1, 1), None),
    ],
)
def test_which_tiles_suit_a_convolution(settings, size, wanted) -> None:
    usual_ones = {"in_channels": 256, "out_channels": 256, "kernel_size": 3, "padding": 1}
    with torch.device("meta"):
        assert tile_of(nn.Conv2d(**(usual_ones | settings)), size) == wanted


@pytest.fixture
def uses(monkeypatch) -> list[tuple[torch.Size, int]]:
    """What goes through Winograd's convolution: shapes and tiles."""
    seen: list[tuple[torch.Size, int]] = []

    def counted(x: Tensor, factors: Tensor, tile: int) -> Tensor:
        seen.append((x.shape, tile))
        return convolve(x, factors, tile)

    winograd._kept.cache_clear()
    monkeypatch.setattr(winograd, "convolve", counted)
    return seen


@pytest.fixture
def convs() -> tuple[nn.Conv2d, WinogradConv2d]:
    plain, made = nn.Conv2d(4, 5, 3, padding=1), WinogradConv2d(4, 5, 3, padding=1)
    made.tile = 4
    for name, value in made.prepared(plain.weight, plain.bias).items():
        setattr(made, name, nn.Parameter(value.detach(), requires_grad=False))
    return plain, made


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (1, 4, 2, 2), (4, 5, 6), (0, 4, 8, 8)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_it_stands_in_for_a_convolution(convs, uses, shape, has_bias) -> None:
    plain, made = convs
    if not has_bias:
        plain.bias = made.bias = None
    x = drawn(*shape, dtype=torch.float32)
    torch.testing.assert_close(made(x), plain(x), **SINGLE)
    assert len(uses) == 1
    made.factors, made.weight = None, plain.weight
    assert torch.equal(made(x), plain(x))
    assert len(uses) == 1


def test_the_products_are_in_the_type_of_the_factors_and_on_the_processor(convs, uses) -> None:
    plain, made = convs
    x = drawn(2, 4, 8, 8, dtype=torch.float32)
    wanted = plain(x)
    with torch.device("meta"):
        torch.testing.assert_close(made(x), wanted, **SINGLE)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(made(x), wanted, **SINGLE)
        coarse = made(x.bfloat16())
    assert coarse.dtype == torch.float32
    torch.testing.assert_close(coarse, wanted, rtol=0.02, atol=0.02)
    with pytest.raises(RuntimeError, match="type Double but found Float"):
        made(x.double())


# ------------------------------------------------------------------------------------ the engine


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    net = ResNet(depths=(1,), widths=(256,), strides=(2,), in_channels=3)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return net.eval().requires_grad_(False)


X = drawn(4, 3, 16, 16).sigmoid().float()


def gradient_of(net: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(net(x)[:, ::2].tanh().sum(), x)[0]


def test_a_network_may_read_the_weight_of_what_it_replaces(net, uses) -> None:
    class Cautious(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.conv = net, net.stages[0][0].conv2

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x.to(self.conv.weight.dtype)) + self.conv.weight.norm()

    cautious = Cautious()
    wanted = cautious(X)
    with AttackEngine().applied(cautious, X):
        torch.testing.assert_close(cautious(X), wanted, rtol=1e-4, atol=1e-4)
    assert uses


@pytest.mark.parametrize(("fold", "channels_last"), [(True, False), (False, True)])
def test_an_attack_side_network_is_the_same_function(net, uses, fold, channels_last) -> None:
    net, x = net.double(), X.double()
    engine = AttackEngine(fold=fold, channels_last=channels_last)
    conv = next(
        name for name, m in net.named_modules() if isinstance(m, nn.Conv2d) and tile_of(m, (8, 8))
    )
    for times in (1, 2):  # the factors follow the weights
        for parameter in net.parameters():
            parameter.data.mul_(0.7)
        wanted = gradient_of(net, x)
        with engine.applied(net, x):
            found = gradient_of(net, x)
            assert type(net.get_submodule(conv)) is WinogradConv2d
            y = net.get_submodule(conv)(torch.rand(2, 256, 8, 8).double())
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
        assert y.is_contiguous() is not channels_last
        assert uses == times * [(torch.Size((4, 256, 8, 8)), 4), (torch.Size((2, 256, 8, 8)), 4)]
    assert type(net.get_submodule(conv)) is nn.Conv2d
    (plan,) = engine._plans.of.values()
    assert all(not conv._parameters for conv in plan._convs)


def test_under_autocast_it_computes_as_the_network_would(net, uses) -> None:
    engine = AttackEngine(fold=False)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = net(X)
        with engine.applied(net, X):
            found = net(X)
    assert uses == []
    assert found.dtype == wanted.dtype
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02)
    with torch.inference_mode(), engine.applied(net, X):  # the same plan, without it
        net(X)
    with engine.applied(net, X):
        assert gradient_of(net, X).abs().max() > 0
    assert len(uses) == 2


class Twice(nn.Module):
    """One convolution for maps of two sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(256, 256, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.repeat(1, 86, 1, 1)[:, :256]
        return (self.conv(x).mean((2, 3)) + self.conv(x[..., :1, :1]).mean((2, 3)))[:, :10]


def test_where_it_is_off(net, uses, caplog) -> None:
    engines = [AttackEngine(winograd=False), AttackEngine(precision="bf16")]
    for engine in engines:
        with engine.applied(net, X):
            net(X)
        assert "winograd" not in repr(engine)
    assert "winograd" in repr(AttackEngine())
    with torch.no_grad(), AttackEngine().applied(twice := Twice().eval(), X):
        twice(X)
    heard = copy.deepcopy(net)
    for module in heard.modules():
        module.register_forward_hook(lambda module, args, out: None)
    uncopied = copy.deepcopy(net)
    uncopied.kept = (i for i in range(3))
    for other in (heard, uncopied):
        with AttackEngine().applied(other, X):
            torch.testing.assert_close(other(X), net(X), **SINGLE)
    assert uses == []
    assert "attacks use ResNet as it is" in caplog.text


@pytest.mark.slow
def test_compiled_it_gives_the_same_gradients(net) -> None:
    wanted = gradient_of(net, X)
    with AttackEngine(compile="default").applied(net, X):
        assert any(isinstance(module, WinogradConv2d) for module in net.modules())
        found = gradient_of(net, X)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5 * wanted.abs().max().item())


@pytest.mark.parametrize(("tile", "times"), [(2, 4), (4, 7)])
def test_rounding_is_some_times_a_convolutions(tile, times) -> None:
    x, weight = drawn(4, 64, 8, 8).relu(), drawn(64, 64, 3, 3) / 24
    exact, single = usual(x, weight), (x.float(), weight.float())
    ours, theirs = (
        float((found.double() - exact).norm() / exact.norm())
        for found in (convolve(single[0], transformed(single[1], tile), tile), usual(*single))
    )
    assert 1e-7 < ours < times * theirs
