"""Winograd's convolution: the same numbers, where it is used, and what it rounds."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.attacks.engine import winograd
from common.attacks.engine.network import AttackEngine
from common.attacks.engine.winograd import WinogradConv2d, convolve, tile_of, transformed
from common.modes import frozen
from common.networks.resnet import ResNet

TILES = [2, 4]
SIZES = [(8, 8), (4, 4), (16, 12), (7, 10), (1, 5), (3, 1), (2, 2)]


def drawn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


def usual(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight, padding=1)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("memory", [winograd._MEMORY, 1], ids=["at once", "image by image"])
def test_outputs_and_input_gradients_are_the_convolutions(size, tile, memory, monkeypatch) -> None:
    monkeypatch.setattr(winograd, "_MEMORY", memory)
    x, weight = drawn(3, 5, *size).requires_grad_(), drawn(7, 5, 3, 3)
    wanted, found = usual(x, weight), convolve(x, transformed(weight, tile), tile)
    assert transformed(weight, tile).shape == ((tile + 2) ** 2, 7, 5)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)
    towards = drawn(*wanted.shape)
    (expected,) = torch.autograd.grad(wanted, x, towards)
    (gradient,) = torch.autograd.grad(found, x, towards)
    torch.testing.assert_close(gradient, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_any_layout_comes_in_and_pixels_first_goes_out(layout) -> None:
    x, weight = drawn(2, 4, 8, 6).to(memory_format=layout), drawn(3, 4, 3, 3)
    found = convolve(x, transformed(weight, 4), 4)
    torch.testing.assert_close(found, usual(x, weight), rtol=1e-11, atol=1e-12)
    assert found.permute(2, 3, 0, 1).is_contiguous()


@pytest.mark.parametrize("tile", TILES)
def test_second_derivatives_are_there(tile) -> None:
    x, weight = drawn(1, 2, 4, 4), drawn(2, 2, 3, 3)
    loss = lambda function: lambda z: function(z).tanh().square().sum()  # noqa: E731
    factors = transformed(weight, tile)
    wanted = torch.autograd.functional.hessian(loss(lambda z: usual(z, weight)), x)
    found = torch.autograd.functional.hessian(loss(lambda z: convolve(z, factors, tile)), x)
    assert wanted.abs().max() > 0.1
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("tile", TILES)
def test_nothing_of_the_image_is_kept_for_the_gradient(tile) -> None:
    x, factors = drawn(64, 6, 8, 8).requires_grad_(), transformed(drawn(6, 6, 3, 3), tile)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        convolve(x, factors, tile)
    assert kept
    largest = max(tensor.untyped_storage().nbytes() for tensor in kept)
    assert largest <= factors.nbytes < x.nbytes / 10


@pytest.mark.parametrize(("tile", "times"), [(2, 4), (4, 7)])
def test_rounding_is_some_times_a_convolutions(tile, times) -> None:
    x, weight = drawn(4, 64, 8, 8).relu(), drawn(64, 64, 3, 3) / 24
    exact = usual(x, weight)
    single = x.float(), weight.float()
    error = lambda found: (found.double() - exact).norm() / exact.norm()  # noqa: E731
    ours = error(convolve(single[0], transformed(single[1], tile), tile))
    assert 1e-7 < ours < times * error(usual(*single))


# ------------------------------------------------------------------------------ where it is used


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, 4),
        ({"padding": "same"}, 4),
        ({"bias": False}, 4),
        ({"out_channels": 400}, 4),
        ({"out_channels": 512}, 2),
        ({"out_channels": 128}, None),
        ({"in_channels": 128}, None),
        ({"stride": 2}, None),
        ({"padding": 0}, None),
        ({"padding": "valid"}, None),
        ({"padding": 2, "dilation": 2}, None),
        ({"groups": 2}, None),
        ({"padding_mode": "reflect"}, None),
        ({"kernel_size": 5, "padding": 2}, None),
        ({"kernel_size": (3, 1), "padding": (1, 0)}, None),
    ],
)
def test_which_tiles_suit_a_convolution(settings, wanted) -> None:
    usual_ones = {"in_channels": 256, "out_channels": 256, "kernel_size": 3, "padding": 1}
    with torch.device("meta"):
        assert tile_of(nn.Conv2d(**(usual_ones | settings)), (8, 8)) == wanted


@pytest.mark.parametrize(
    ("channels", "size", "wanted"),
    [
        (256, (4, 4), 4),
        (256, (7, 7), 4),
        (256, (64, 8), 4),
        (256, (65, 8), None),  # transforms of so long an axis cost too much
        (256, (6, 6), None),  # nine of sixteen pixels
        (256, (2, 2), None),
        (512, (2, 2), 2),
        (512, (1, 1), None),
        (512, (3, 3), None),
    ],
)
def test_on_which_maps(channels, size, wanted) -> None:
    with torch.device("meta"):
        assert tile_of(nn.Conv2d(channels, channels, 3, padding=1), size) == wanted


@pytest.fixture
def uses(monkeypatch) -> list[tuple[torch.Size, int]]:
    """What goes through Winograd's convolution: shapes and tiles."""
    seen: list[tuple[torch.Size, int]] = []

    def counted(x: Tensor, factors: Tensor, tile: int) -> Tensor:
        seen.append((x.shape, tile))
        return convolve(x, factors, tile)

    monkeypatch.setattr(winograd, "convolve", counted)
    return seen


@pytest.fixture
def convs() -> tuple[nn.Conv2d, WinogradConv2d]:
    plain = nn.Conv2d(4, 5, 3, padding=1)
    made = WinogradConv2d(4, 5, 3, padding=1)
    made.tile, made.bias = 4, plain.bias
    made.factors = nn.Parameter(transformed(plain.weight.detach(), 4), requires_grad=False)
    return plain, made


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (1, 4, 2, 2), (4, 5, 6), (0, 4, 8, 8)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_it_stands_in_for_a_convolution(convs, uses, shape, has_bias) -> None:
    plain, made = convs
    if not has_bias:
        plain.bias = made.bias = None
    x = drawn(*shape, dtype=torch.float32)
    torch.testing.assert_close(made(x), plain(x), rtol=1e-4, atol=1e-5)
    assert len(uses) == 1


def test_without_factors_it_is_a_convolution(convs, uses) -> None:
    plain, made = convs
    made.factors = None
    made.weight = plain.weight
    x = drawn(2, 4, 8, 8, dtype=torch.float32)
    assert torch.equal(made(x), plain(x))
    assert uses == []


def test_maps_are_made_on_the_processor_whatever_the_default() -> None:
    winograd._kept.cache_clear()
    x, weight = drawn(1, 2, 5, 5), drawn(2, 2, 3, 3)
    factors = transformed(weight, 4)
    with torch.device("meta"):
        found = convolve(x, factors, 4)
    torch.testing.assert_close(found, usual(x, weight), rtol=1e-11, atol=1e-12)


def test_autocast_does_not_reach_the_products(convs) -> None:
    plain, made = convs
    x = drawn(2, 4, 8, 8, dtype=torch.float32)
    wanted = plain(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(made(x), wanted, rtol=1e-4, atol=1e-5)
        coarse = made(x.bfloat16())
    assert coarse.dtype == torch.float32
    torch.testing.assert_close(coarse, wanted, rtol=0.02, atol=0.02)


def test_images_of_another_type_are_an_error_as_ever(convs) -> None:
    with pytest.raises(RuntimeError, match="type Double but found Float"):
        convs[1](drawn(2, 4, 8, 8))


# ------------------------------------------------------------------------------------ the engine


def wide() -> nn.Module:
    torch.manual_seed(0)
    net = ResNet(depths=(1,), widths=(256,), strides=(2,), in_channels=3)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return net.eval()


def gradient_of(net: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(net(x)[:, ::2].tanh().sum(), x)[0]


@pytest.mark.parametrize(
    "options", [{}, {"channels_last": False}, {"fold": False, "channels_last": False}]
)
def test_an_attack_side_network_is_the_same_function(options, uses) -> None:
    net, x = wide().double(), drawn(4, 3, 16, 16).sigmoid()
    engine = AttackEngine(**options)
    with frozen(net):
        wanted = gradient_of(net, x)
        assert uses == []
        with engine.applied(net, x):
            found = gradient_of(net, x)
    assert uses == [(torch.Size((4, 256, 8, 8)), 4)]
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_factors_follow_the_weights(uses) -> None:
    net, x, engine = wide().double(), drawn(4, 3, 16, 16).sigmoid(), AttackEngine()
    with frozen(net):
        for _ in range(2):
            for parameter in net.parameters():
                parameter.data.mul_(0.7)
            wanted = gradient_of(net, x)
            with engine.applied(net, x):
                torch.testing.assert_close(gradient_of(net, x), wanted, rtol=1e-9, atol=1e-12)
    assert len(uses) == 2
    (plan,) = engine._plans.of.values()
    assert all(not conv._parameters for conv in plan._convs)


def test_under_autocast_it_computes_as_the_network_would(uses) -> None:
    net, x, engine = wide(), drawn(4, 3, 16, 16).sigmoid().float(), AttackEngine(fold=False)
    with frozen(net), torch.autocast("cpu", torch.bfloat16):
        wanted = net(x)
        with engine.applied(net, x):
            found = net(x)
    assert uses == []
    assert found.dtype == wanted.dtype
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02)
    with frozen(net), engine.applied(net, x):  # the same plan, without it
        net(x)
    assert len(uses) == 1


@pytest.mark.parametrize(("size", "wanted"), [((16, 16), 1), ((4, 4), 0), ((132, 8), 0)])
def test_the_size_of_the_maps_decides(size, wanted, uses) -> None:
    net, x, engine = wide(), torch.rand(2, 3, *size), AttackEngine()
    with torch.no_grad():
        with engine.applied(net, x):
            found = net(x)
        torch.testing.assert_close(found, net(x), rtol=1e-3, atol=1e-4)
    assert len(uses) == wanted


def test_a_convolution_for_maps_of_several_sizes_stays(uses) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(256, 256, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            x = x.repeat(1, 86, 1, 1)[:, :256]
            return (self.conv(x).mean((2, 3)) + self.conv(x[..., :1, :1]).mean((2, 3)))[:, :10]

    net, x = Twice().eval(), torch.rand(2, 3, 8, 8)
    with torch.no_grad(), AttackEngine().applied(net, x):
        net(x)
    assert uses == []


def test_layouts_are_those_asked_for() -> None:
    net, x = wide(), drawn(4, 3, 16, 16).sigmoid().float()
    name = next(n for n, m in net.named_modules() if type(m) is nn.Conv2d and tile_of(m, (8, 8)))
    for channels_last in (False, True):
        engine = AttackEngine(fold=False, channels_last=channels_last)
        with torch.no_grad(), engine.applied(net, x):
            conv = net.get_submodule(name)
            assert type(conv) is WinogradConv2d
            y = conv(torch.rand(2, 256, 8, 8))
            assert y.is_contiguous() is not channels_last
        assert type(net.get_submodule(name)) is nn.Conv2d


def test_a_network_that_cannot_be_copied_stays(caplog, uses) -> None:
    net, x = wide(), drawn(4, 3, 16, 16).sigmoid().float()
    net.uncopied = (i for i in range(3))
    with caplog.at_level("WARNING"), torch.no_grad(), AttackEngine().applied(net, x):
        net(x)
    assert "their maps were not found (TypeError: cannot pickle 'generator'" in caplog.text
    assert uses == []


@pytest.mark.parametrize("options", [{"winograd": False}, {"precision": "bf16"}])
def test_where_it_is_off(options, uses) -> None:
    net, x = wide(), drawn(4, 3, 16, 16).sigmoid().float()
    engine = AttackEngine(**options)
    with engine.applied(net, x):
        net(x)
    assert uses == []
    assert "winograd" not in repr(engine)
    assert "winograd" in repr(AttackEngine())


def test_a_convolution_somebody_listens_to_stays(uses) -> None:
    net, x = wide(), drawn(4, 3, 16, 16).sigmoid().float()
    convs = [m for m in net.modules() if type(m) is nn.Conv2d and tile_of(m, (8, 8))]
    heard: list[Tensor] = []
    for conv in convs:
        conv.register_forward_hook(lambda module, args, out: heard.append(out))
    with AttackEngine(fold=False).applied(net, x):
        net(x)
    assert (len(heard), uses) == (len(convs), [])
    assert convs


def test_it_works_in_inference_mode_first_and_with_gradients_later() -> None:
    winograd._kept.cache_clear()
    net, x = wide(), drawn(4, 3, 16, 16).sigmoid().float()
    engine = AttackEngine()
    with torch.inference_mode(), engine.applied(net, x):
        net(x)
    with frozen(net), engine.applied(net, x):
        assert gradient_of(net, x).abs().max() > 0


@pytest.mark.slow
def test_compiled_it_gives_the_same_gradients() -> None:
    net, x = wide(), drawn(4, 3, 16, 16).sigmoid().float()
    twin = copy.deepcopy(net)
    with frozen(net), frozen(twin):
        wanted = gradient_of(net, x)
        with AttackEngine(compile="default").applied(twin, x):
            assert any(isinstance(module, WinogradConv2d) for module in twin.modules())
            found = gradient_of(twin, x)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5 * wanted.abs().max().item())
