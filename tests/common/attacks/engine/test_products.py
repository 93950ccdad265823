"""Convolutions as matrix products: the same numbers, and where they are used."""

import pytest
import torch
from torch import Tensor, nn

from common.attacks.engine.network import AttackEngine
from common.attacks.engine.products import ProductConv2d, suits_product
from common.networks.resnet import DigitsResNet

EXACT = {"rtol": 1e-11, "atol": 1e-12}


def drawn(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def both(settings: dict, maps: tuple[int, int] | None) -> tuple[nn.Conv2d, ProductConv2d]:
    """A convolution of 3 to 5 channels, and its stand-in for these maps."""
    conv, product = (
        kind(3, 5, **settings).double().requires_grad_(False) for kind in (nn.Conv2d, ProductConv2d)
    )
    product.load_state_dict(conv.state_dict())
    product.maps = maps
    for name, value in product.prepared(conv.weight, conv.bias).items():
        kept = None if value is None else nn.Parameter(value, requires_grad=False)
        product.register_parameter(name, kept)
    return conv, product


def derivatives(conv: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, the gradient of a loss, and the gradient of that."""
    x = x.detach().requires_grad_()
    y = conv(x)
    (first,) = torch.autograd.grad(y.tanh().square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    return y, first, second


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({"kernel_size": 3, "padding": 1}, (2, 2)),
        ({"kernel_size": 3, "padding": 1, "bias": False}, (4, 3)),
        ({"kernel_size": 3, "padding": 1, "stride": 2}, (4, 5)),
        ({"kernel_size": 3}, (3, 4)),
        ({"kernel_size": (1, 5), "padding": (0, 2), "stride": (1, 3)}, (2, 4)),
        ({"kernel_size": 1, "padding": 1}, (1, 2)),
    ],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_product_of_whole_maps_is_the_convolution(settings, size, layout) -> None:
    conv, product = both(settings, size)
    product.weight = None  # the product does not read it
    x = drawn(4, 3, *size).to(memory_format=layout)
    for wanted, found in zip(derivatives(conv, x), derivatives(product, x), strict=True):
        torch.testing.assert_close(found, wanted, **EXACT)
    assert product(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("stride", "size"), [((2, 2), (4, 4)), ((2, 3), (5, 7))])
def test_a_product_of_pixels_is_the_convolution(stride, size) -> None:
    conv, product = both({"kernel_size": 1, "stride": stride}, None)
    product.weight = None
    for wanted, found in zip(
        derivatives(conv, drawn(4, 3, *size)), derivatives(product, drawn(4, 3, *size)), strict=True
    ):
        torch.testing.assert_close(found, wanted, **EXACT)


def test_no_images_and_one_alone() -> None:
    for settings, maps in (({"stride": 2}, None), ({}, (2, 2))):
        conv, product = both({"kernel_size": 1} | settings, maps)
        for x in (drawn(0, 3, 2, 2), drawn(3, 2, 2)):
            torch.testing.assert_close(product(x), conv(x), **EXACT)


def test_other_maps_one_image_and_autocast_go_through_the_convolution() -> None:
    conv, product = both({"kernel_size": 3, "padding": 1}, (2, 2))
    product.factors.zero_()  # which would be seen
    for x in (drawn(4, 3, 3, 2), drawn(3, 2, 2)):
        assert torch.equal(product(x), conv(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(product(drawn(4, 3, 2, 2)), conv(drawn(4, 3, 2, 2)))
    assert not product(drawn(4, 3, 2, 2)).sub(product.bias.view(-1, 1, 1)).any()


@pytest.mark.parametrize(
    ("settings", "size", "wanted"),
    [
        ({}, (3, 3), True),
        ({}, (4, 4), False),
        ({"stride": 2}, (4, 4), True),
        ({"stride": 2}, (8, 8), False),
        ({"in_channels": 16, "out_channels": 16}, (4, 4), True),
        ({"in_channels": 16, "out_channels": 512}, (4, 4), False),
        ({"in_channels": 1}, (8, 8), True),
        ({"in_channels": 3}, (8, 8), False),
        ({"in_channels": 3, "kernel_size": 4, "stride": 4, "padding": 0}, (8, 8), True),  # patches
        ({"in_channels": 1}, (28, 28), False),
        ({"in_channels": 512, "out_channels": 512}, (2, 2), True),
        ({"in_channels": 512, "out_channels": 512}, (3, 3), False),  # the matrix is too large
        ({"padding": 0}, (2, 2), False),  # nothing comes out
        ({"padding": 0}, (3, 3), True),
        ({"padding": "same"}, (2, 2), False),
        ({"padding_mode": "reflect"}, (2, 2), False),
        ({"padding": 2, "dilation": 2}, (2, 2), False),
        ({"groups": 2}, (2, 2), False),
        ({"kernel_size": 1, "padding": 0, "stride": 2}, (32, 32), True),
        ({"kernel_size": 1, "padding": 0, "stride": 2, "in_channels": 64}, (32, 32), False),
        ({"kernel_size": 1, "padding": 0}, (2, 2), False),
    ],
)
def test_which_convolutions_are_products(settings, size, wanted) -> None:
    usual = {"in_channels": 32, "out_channels": 64, "kernel_size": 3, "padding": 1}
    with torch.device("meta"):
        assert suits_product(nn.Conv2d(**(usual | settings)), size) is wanted


# ------------------------------------------------------------------------------------ the engine


def products_of(net: nn.Module) -> set[str]:
    return {name for name, module in net.named_modules() if isinstance(module, ProductConv2d)}


def gradient_of(net: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(net(x)[:, ::2].tanh().sum(), x)[0]


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    net = DigitsResNet(in_channels=1).double().eval().requires_grad_(False)
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.running_mean, -0.2, 0.2)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return net


@pytest.mark.parametrize("fold", [True, False])
def test_an_attack_side_network_has_products_and_is_the_same_function(net, fold) -> None:
    x, engine = drawn(4, 1, 8, 8).sigmoid(), AttackEngine(fold=fold)
    for _ in range(2):  # the matrices follow the weights
        for parameter in net.parameters():
            parameter.data.mul_(0.9)
        wanted = gradient_of(net, x)
        with engine.applied(net, x):
            found, products = gradient_of(net, x), products_of(net)
            assert all(net.get_submodule(name).factors is not None for name in products)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
        assert "stem.conv" in products
        assert 5 <= len(products) < 11
    assert products_of(net) == set()
    larger = drawn(2, 1, 12, 12).sigmoid()
    with engine.applied(net, larger):  # by the same plan
        found = gradient_of(net, larger)
    torch.testing.assert_close(found, gradient_of(net, larger), rtol=1e-9, atol=1e-12)


def test_under_autocast_it_computes_as_the_network_would(net) -> None:
    net, x, engine = net.float(), drawn(2, 1, 8, 8).sigmoid().float(), AttackEngine(fold=False)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = net(x)
        with engine.applied(net, x):
            found = net(x)
            assert "factors" not in net.stem.conv._parameters
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02)


@pytest.mark.slow
def test_compiled_it_gives_the_same_gradients(net) -> None:
    net, x = net.float(), drawn(2, 1, 8, 8).sigmoid().float()
    wanted = gradient_of(net, x)
    with AttackEngine(compile="default").applied(net, x):
        assert products_of(net)
        found = gradient_of(net, x)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5 * wanted.abs().max().item())


class Named(nn.Module):
    """Calls one convolution by the name of its argument, and one in the usual way."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(input=x)).mean((2, 3))


def test_a_convolution_may_be_called_by_names() -> None:
    named, x = Named().eval().requires_grad_(False), drawn(2, 8, 2, 2).float()
    wanted = named(x)
    with AttackEngine().applied(named, x):
        found = named(x)
        assert products_of(named) == {"first", "second"}
    torch.testing.assert_close(found, wanted)


def test_nothing_is_copied_where_nothing_can_be_chosen() -> None:
    class Uncopied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.kept = nn.Linear(4, 3), (i for i in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x.flatten(1))

    net = Uncopied().eval()
    with AttackEngine().applied(net, x := drawn(2, 1, 2, 2).float()):
        assert net(x).shape == (2, 3)


@pytest.mark.parametrize("settings", [{"channels_last": False}, {"precision": "bf16"}])
def test_engines_without_products(net, settings) -> None:
    net, x = net.float(), drawn(2, 1, 8, 8).sigmoid().float()
    with AttackEngine(**settings).applied(net, x):
        net(x)
        assert products_of(net) == set()
