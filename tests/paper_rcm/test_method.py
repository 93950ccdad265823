"""The wrapper, the stride rules, and sizes and costs of every network as they were measured."""

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.cli.main import RobustCLI
from common.errors import ConfigurationError
from common.networks.alexnet import AlexNet
from common.networks.preact_resnet import PreActResNet18
from common.networks.resnet import CifarResNet, ResNet, ResNet18
from common.networks.vit import ViT
from common.networks.wide_resnet import WideResNet
from paper_rcm.method import (
    BASE_STRIDES,
    VGG16BN,
    DigitsNet,
    EnlargedNetwork,
    enlarge,
    parse_strides,
    shrink,
)

MEAN, STD = (0.4914, 0.4824, 0.4467), (0.2471, 0.2435, 0.2617)


def tiny(**kwargs) -> ResNet:
    return ResNet(**{"depths": (1, 1), "widths": (4, 6), "strides": (1, 2), **kwargs})


def meta(make, strides: str | None = None, scale_factor: float = 1, **kwargs) -> EnlargedNetwork:
    """A network of some strides behind its wrapper, without storage."""
    if strides is not None:
        kwargs["strides"] = parse_strides(strides)
    mode = "nearest" if scale_factor == int(scale_factor) else "bilinear"
    with torch.device("meta"):
        return EnlargedNetwork(make(**kwargs), scale_factor, mode, mean=MEAN, std=STD)


# --------------------------------------------------------------------------------- the wrapper


def test_factor_one_is_the_network_of_the_normalised_image_bit_for_bit():
    net = EnlargedNetwork(tiny(), mean=MEAN, std=STD).eval()
    x = torch.rand(4, 3, 8, 8)
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    assert torch.equal(net(x), net.arch((x - mean) / std))


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
@pytest.mark.parametrize("m", [2, 3])
def test_order_is_normalise_then_interpolate_as_in_the_code(mode, m):
    net = EnlargedNetwork(tiny(), m, mode, mean=MEAN, std=STD).eval()
    x = torch.rand(2, 3, 8, 8)
    v = F.interpolate(net.normalize(x), scale_factor=m, mode=mode)
    assert torch.equal(net.enlarged(x), v)
    assert torch.equal(net(x), net.arch(v))


def test_says_when_the_pooled_feature_is_unknown():
    with pytest.raises(TypeError, match="EnlargedNetwork has no global pooling"):
        EnlargedNetwork(nn.Sequential(nn.Flatten())).pooled(torch.rand(1, 3, 4, 4))


def test_compiles_in_one_graph():
    net, x = EnlargedNetwork(tiny(), 2, mean=MEAN, std=STD).eval(), torch.rand(2, 3, 8, 8)
    assert torch.equal(torch.compile(net, fullgraph=True, backend="eager")(x), net(x))


@pytest.mark.parametrize("m", [2, 3])
def test_a_pixel_gets_the_gradients_of_all_its_copies(m):
    net = EnlargedNetwork(tiny(), m).double().eval()
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    v = enlarge(x.detach(), m).requires_grad_()
    (wrapped,) = torch.autograd.grad(net(x).logsumexp(1).sum(), x)
    (copies,) = torch.autograd.grad(net.arch(v).logsumexp(1).sum(), v)
    blocks = copies.view(2, 3, 8, m, 8, m).sum((3, 5))
    assert torch.allclose(wrapped, blocks, atol=1e-14)


@pytest.mark.parametrize(("m", "side", "size"), [(1.5, 32, 48), (1.3, 8, 10), (1.1, 8, 9)])
def test_sizes_are_rounded(m, side, size):
    assert enlarge(torch.rand(1, 3, side, side), m, "bilinear").shape[-2:] == (size, size)


def test_adds_no_parameter():
    arch = tiny()
    net = EnlargedNetwork(arch, 2, mean=MEAN, std=STD)
    assert [id(p) for p in net.parameters()] == [id(p) for p in arch.parameters()]
    names = ["normalize.mean", "normalize.std", *(f"arch.{key}" for key in arch.state_dict())]
    assert list(net.state_dict()) == names


@pytest.mark.parametrize(
    ("arch", "dim"),
    [
        (tiny, 6),
        (partial(tiny, pool="max"), 6),
        (partial(PreActResNet18, depths=(1,), widths=(4,), strides=(1,)), 4),
        (partial(WideResNet, 10, 1), 64),
        (partial(VGG16BN, widths=(4, 4, 4, 4, 6)), 6),
        (partial(AlexNet, widths=(4, 4, 4, 4, 6)), 6),
        (partial(ViT, dim=8, depth=1), 8),
    ],
)
def test_the_pooled_feature_is_what_the_classifier_reads(arch, dim):
    net = EnlargedNetwork(arch()).eval()
    x = torch.rand(2, 3, 32, 32)
    f, z, head = net.pooled(x), net.features(x), net.arch.head
    assert f.shape == (2, dim)
    if isinstance(net.arch, ResNet):
        is_max = isinstance(head.pool, nn.AdaptiveMaxPool2d)
        assert torch.equal(f, z.amax((2, 3)) if is_max else F.adaptive_avg_pool2d(z, 1).flatten(1))
    behind = [name for name, _ in head.named_children()].index("pool") + 1
    assert torch.equal(head[behind:](f), net(x))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"scale_factor": 0.5}, "got 0.5"),
        ({"scale_factor": float("inf")}, "got inf"),
        ({"scale_factor": 1.5}, "mode=bilinear"),
        ({"mode": "area"}, "'area'"),
        ({"num_classes": 7}, "num_classes is 7 .* 10"),
        ({"in_channels": 1}, "in_channels is 1 .* 3"),
        ({"arch": partial(tiny, mean=MEAN, std=STD)}, "none to arch"),
        ({"mean": (0.5,), "std": (0.5,)}, "3 input channels"),
    ],
)
def test_refuses_settings_that_do_not_fit(kwargs, message):
    arch = kwargs.pop("arch", tiny)()
    with pytest.raises(ConfigurationError, match=message):
        EnlargedNetwork(arch, **kwargs)


def test_a_configuration_fills_wrapper_and_network_from_the_data():
    path = Path(__file__).parents[2] / "paper_rcm/configs/digits_122_max.yaml"
    arguments = ["--config", str(path), "--trainer.logger", "false"]
    more = ["--model.net.arch.strides", "[1, 1, 2]", "--model.net.scale_factor", "3"]
    more += ["--model.net.mean", "data", "--model.net.std", "data"]
    made = RobustCLI("paper_rcm", [*arguments, *more], run=False).model.net
    assert isinstance(made, EnlargedNetwork)
    assert made.normalize.mean.item() == pytest.approx(0.3067)
    assert made.arch.normalize.mean is None
    assert made.features(torch.rand(1, 1, 8, 8)).shape == (1, 32, 12, 12)
    assert made.scale_factor == 3
    assert isinstance(made.arch.head.pool, nn.AdaptiveMaxPool2d)


# --------------------------------------------------------------------------------- the strides


def test_strings_of_strides():
    assert parse_strides("1122") == (1, 1, 2, 2)
    for text in ("", "1 2", "102", "12a"):
        with pytest.raises(ConfigurationError, match="digits from 1"):
            parse_strides(text)


def test_shrinking_replaces_the_first_two():
    strings = {"1222": "1122", "1122": "1112", "11222": "11122", "122": "112", "222": "122"}
    assert set(BASE_STRIDES.values()) == set(strings)
    for base, shrunk in strings.items():
        assert shrink(parse_strides(base)) == parse_strides(shrunk)
    with pytest.raises(ConfigurationError, match="no 2"):
        shrink((1, 1, 1))


@pytest.mark.parametrize("strides", ["1122", "1111"])
def test_weights_load_into_every_string_that_starts_with_one(strides):
    base = ResNet18(widths=(4, 6, 8, 10)).eval()
    other = ResNet18(widths=(4, 6, 8, 10), strides=parse_strides(strides)).eval()
    other.load_state_dict(base.state_dict())
    x = torch.rand(2, 3, 16, 16)
    assert not torch.equal(base(x), other(x))


def test_a_digit_of_one_removes_the_pools_of_vgg_and_keeps_those_of_alexnet():
    pools = [
        sum(isinstance(m, nn.MaxPool2d) for m in meta(make, strides).modules())
        for make, strides in ((VGG16BN, "11222"), (VGG16BN, "11122"), (AlexNet, "1122"))
    ]
    assert pools == [3, 2, 3]


# --------------------------------------------------------------- sizes, beside those of the rows

# network, strides, m, parameters, final side
MEASURED = [
    (ResNet18, "1222", 1.5, 11_173_962, 6),
    (ResNet18, "1222", 2, 11_173_962, 8),
    (ResNet18, "1112", 1, 11_173_962, 16),
    (ResNet18, "2122", 1, 11_178_186, 4),
    (PreActResNet18, "1122", 1, 11_172_170, 8),
    (VGG16BN, "22222", 1, 14_922_826, 1),
    (VGG16BN, "11122", 1, 14_922_826, 8),
    (AlexNet, "1122", 1, 2_850_634, 7),
    (AlexNet, "1111", 1, 2_850_634, 29),
    (partial(WideResNet, 34), "112", 1, 46_160_474, 16),
    (partial(WideResNet, 34, 20), "122", 1, 184_531_674, 8),
    (CifarResNet, "112", 1, 272_282, 16),
]


@pytest.mark.parametrize(("make", "strides", "m", "parameters", "side"), MEASURED)
def test_sizes_as_measured(make, strides, m, parameters, side):
    net = meta(make, strides, m)
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert net.features(torch.empty(1, 3, 32, 32, device="meta")).shape[-1] == side


def test_vgg_with_its_classifier():
    net = meta(VGG16BN, num_classes=100).arch
    assert sum(p.numel() for p in net.parameters()) == 14_945_956
    kinds = [type(m) for m in net.head.modules() if not list(m.children())]
    hidden = [nn.Linear, nn.ReLU, nn.Dropout]
    assert kinds == [nn.AdaptiveAvgPool2d, nn.Flatten, *hidden, *hidden, nn.Linear]
    assert {m.p for m in net.modules() if isinstance(m, nn.Dropout)} == {0.5}


def test_pools_of_the_digits_are_the_same_function_on_a_map_of_one_pixel():
    avg, top = DigitsNet().eval(), DigitsNet(pool="max").eval()
    top.load_state_dict(avg.state_dict())
    x = torch.rand(4, 1, 8, 8)
    assert torch.equal(avg(x), top(x))
