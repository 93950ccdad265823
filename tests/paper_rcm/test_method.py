"""The wrapper, the stride rules, and sizes and costs of every network as they were measured."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import nn

from common.cli.main import RobustCLI
from common.errors import ConfigurationError
from common.networks.alexnet import AlexNet
from common.networks.preact_resnet import PreActResNet18
from common.networks.resnet import CifarResNet, ResNet, ResNet18
from common.networks.vit import ViT, ViTBase, ViTSmall, ViTTiny
from common.networks.wide_resnet import WideResNet
from paper_rcm.method import (
    BASE_STRIDES,
    VGG16BN,
    DigitsNet,
    EnlargedNetwork,
    cost,
    enlarge,
    format_strides,
    parse_strides,
    receptive_field,
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
@pytest.mark.parametrize("m", [2, 3, 4])
def test_order_is_normalise_then_interpolate_as_in_the_code(mode, m):
    net = EnlargedNetwork(tiny(), m, mode, mean=MEAN, std=STD).eval()
    x = torch.rand(2, 3, 8, 8)
    v = F.interpolate(net.normalize(x), scale_factor=m, mode=mode)
    assert torch.equal(net.enlarged(x), v)
    assert torch.equal(net(x), net.arch(v))


@pytest.mark.parametrize(
    ("m", "mode", "tolerance"),
    [(2, "nearest", 0), (3, "nearest", 0), (2, "bilinear", 1e-12), (1.5, "bicubic", 1e-12)],
)
def test_normalising_and_interpolating_commute(m, mode, tolerance):
    net = EnlargedNetwork(tiny(), m, mode, mean=MEAN, std=STD).double()
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    other = net.normalize(enlarge(x, m, mode))
    assert (net.enlarged(x) - other).abs().max() <= tolerance


@pytest.mark.parametrize("m", [2, 3, 4])
def test_a_pixel_gets_the_gradients_of_all_its_copies(m):
    net = EnlargedNetwork(tiny(), m).double().eval()
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    v = enlarge(x.detach(), m).requires_grad_()
    (wrapped,) = torch.autograd.grad(net(x).logsumexp(1).sum(), x)
    (copies,) = torch.autograd.grad(net.arch(v).logsumexp(1).sum(), v)
    blocks = copies.view(2, 3, 8, m, 8, m).sum((3, 5))
    assert torch.allclose(wrapped, blocks, atol=1e-14)


@pytest.mark.parametrize(
    ("m", "side", "size"), [(1.0, 8, 8), (2.0, 8, 16), (1.5, 32, 48), (1.3, 8, 10), (1.1, 8, 9)]
)
def test_sizes_are_rounded(m, side, size):
    assert enlarge(torch.rand(1, 3, side, side), m, "bilinear").shape[-2:] == (size, size)


def test_adds_no_parameter_and_no_mode_but_that_of_the_network():
    arch = tiny()
    net = EnlargedNetwork(arch, 2, mean=MEAN, std=STD)
    assert [id(p) for p in net.parameters()] == [id(p) for p in arch.parameters()]
    assert set(net.state_dict()) == {
        "normalize.mean",
        "normalize.std",
        *(f"arch.{key}" for key in arch.state_dict()),
    }


@pytest.mark.parametrize("pool", ["avg", "max"])
def test_pooled_feature_is_what_the_classifier_reads(pool):
    net = EnlargedNetwork(tiny(pool=pool), 2).eval()
    x = torch.rand(4, 3, 8, 8)
    z = net.features(x)
    assert z.shape == (4, 6, 8, 8)
    f = net.pooled(x)
    assert torch.equal(
        f, F.adaptive_avg_pool2d(z, 1).flatten(1) if pool == "avg" else z.amax((2, 3))
    )
    assert torch.equal(net(x), net.arch.head.linear(f))


@pytest.mark.parametrize(
    ("arch", "dim"),
    [
        (partial(PreActResNet18, depths=(1,), widths=(4,), strides=(1,)), 4),
        (partial(WideResNet, 10, 1), 64),
        (partial(VGG16BN, widths=(4, 4, 4, 4, 6)), 6),
        (partial(AlexNet, widths=(4, 4, 4, 4, 6)), 6),
        (partial(ViT, dim=8, depth=1), 8),
    ],
)
def test_every_backbone_has_a_pooled_feature(arch, dim):
    net, x = (
        EnlargedNetwork(arch(), 2 if arch.func is not ViT else 1).eval(),
        torch.rand(2, 3, 32, 32),
    )
    f, head = net.pooled(x), dict(net.arch.head.named_children())
    assert f.shape == (2, dim)
    behind = list(head).index("pool") + 1
    assert torch.equal(net.arch.head[behind:](f), net(x))


def test_says_when_the_pooled_feature_is_unknown():
    with pytest.raises(TypeError, match="Sequential has no 'features'"):
        EnlargedNetwork(nn.Sequential(nn.Flatten())).pooled(torch.rand(1, 3, 4, 4))


def test_compiles_in_one_graph():
    net, x = EnlargedNetwork(tiny(), 2, mean=MEAN, std=STD).eval(), torch.rand(2, 3, 8, 8)
    assert torch.equal(torch.compile(net, fullgraph=True, backend="eager")(x), net(x))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"scale_factor": 0.5}, "at least 1, got 0.5"),
        ({"scale_factor": float("inf")}, "at least 1, got inf"),
        ({"scale_factor": 1.5}, "use mode=bilinear"),
        ({"mode": "area"}, "mode must be one of nearest, bilinear, bicubic, got 'area'"),
        ({"num_classes": 7}, "num_classes is 7 and that of arch 10"),
        ({"in_channels": 1}, "in_channels is 1 and that of arch 3"),
        ({"arch": partial(tiny, mean=MEAN, std=STD)}, "none to arch"),
        ({"mean": (0.5,), "std": (0.5,)}, "each of the 3 input channels"),
    ],
)
def test_refuses_settings_that_do_not_fit(kwargs, message):
    arch = kwargs.pop("arch", tiny)()
    with pytest.raises(ConfigurationError, match=message):
        EnlargedNetwork(arch, **kwargs)


def test_a_configuration_fills_wrapper_and_network_from_the_data(tmp_path):
    net = {
        "class_path": "paper_rcm.method.EnlargedNetwork",
        "init_args": {
            "arch": {
                "class_path": "paper_rcm.method.DigitsNet",
                "init_args": {"strides": [1, 2, 2], "pool": "max"},
            },
            "scale_factor": 2,
            "mean": "data",
            "std": "data",
        },
    }
    model = {
        "class_path": "common.classifier.RobustClassifier",
        "init_args": {
            "net": net,
            "objective": {"class_path": "common.objectives.Natural"},
            "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
        },
    }
    data = {"source": {"class_path": "common.data.sources.Digits"}, "batch_size": 100}
    path = tmp_path / "digits.yaml"
    path.write_text(yaml.safe_dump({"model": model, "data": data, "adversary": {"attack": None}}))
    arguments = ["--config", str(path), "--trainer.logger", "false"]
    more = ["--model.net.arch.strides", "[1, 1, 2]", "--model.net.scale_factor", "3"]
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
    assert parse_strides("11222", stages=5) == (1, 1, 2, 2, 2)
    assert format_strides(parse_strides("1212")) == "1212"
    for text in ("", "1 2", "102", "12a"):
        with pytest.raises(ConfigurationError, match="digits from 1"):
            parse_strides(text)
    with pytest.raises(ConfigurationError, match="5 digits are needed"):
        parse_strides("2222", stages=5)


@pytest.mark.parametrize(
    ("base", "shrunk"), [("1222", "1122"), ("1122", "1112"), ("11222", "11122"), ("122", "112")]
)
def test_shrinking_replaces_the_first_two(base, shrunk):
    assert base in BASE_STRIDES.values()
    assert shrink(parse_strides(base)) == parse_strides(shrunk)


def test_nothing_is_left_to_shrink():
    with pytest.raises(ConfigurationError, match="no 2"):
        shrink((1, 1, 1))


@pytest.mark.parametrize(
    ("strides", "field"),
    [
        ("1222", 109),
        ("1221", 85),
        ("1212", 69),
        ("1122", 61),
        ("1211", 57),
        ("1121", 49),
        ("1112", 41),
        ("1111", 35),
    ],
)
def test_receptive_field(strides, field):
    assert receptive_field(parse_strides(strides)) == field


def test_receptive_field_is_where_the_gradient_is():
    net = DigitsNet((1, 2, 1)).eval().double()
    x = torch.rand(1, 1, 41, 41, dtype=torch.float64, requires_grad=True)
    z = net.features(x)[0, :, 10, 10].sum()
    rows = torch.autograd.grad(z, x)[0].abs().sum((0, 1, 2)).nonzero()
    assert rows.max() - rows.min() + 1 == receptive_field((1, 2, 1), (1, 1, 1)) == 21


@pytest.mark.parametrize("strides", ["1222", "1122", "1112", "1111"])
def test_weights_load_into_every_string_that_starts_with_one(strides):
    base = ResNet18(widths=(4, 6, 8, 10)).eval()
    other = ResNet18(widths=(4, 6, 8, 10), strides=parse_strides(strides)).eval()
    shapes = {k: v.shape for k, v in base.state_dict().items()}
    assert shapes == {k: v.shape for k, v in other.state_dict().items()}
    other.load_state_dict(base.state_dict())
    x = torch.rand(2, 3, 16, 16)
    assert torch.equal(base(x), other(x)) == (strides == "1222")


@pytest.mark.parametrize("make", [ResNet18, PreActResNet18])
def test_full_size_networks_share_their_state_dicts(make):
    states = [meta(make, s).state_dict() for s in ("1222", "1122", "1112", "1111")]
    shapes = [{k: v.shape for k, v in state.items()} for state in states]
    assert all(s == shapes[0] for s in shapes)


def test_a_digit_of_one_removes_the_pools_of_vgg_and_keeps_those_of_alexnet():
    pools = [
        sum(isinstance(m, nn.MaxPool2d) for m in meta(make, strides).modules())
        for make, strides in ((VGG16BN, "11222"), (VGG16BN, "11122"), (AlexNet, "1122"))
    ]
    assert pools == [3, 2, 3]


# ------------------------------------------------------------------------------ sizes and costs

# network, strides, m, parameters, final side, million multiply-accumulates, million activations
MEASURED = [
    (ResNet18, "1222", 1, 11_173_962, 4, 555.4, 1.23),
    (ResNet18, "1221", 1, 11_173_962, 8, 958.1, 1.47),
    (ResNet18, "1212", 1, 11_173_962, 8, 1360.7, 1.97),
    (ResNet18, "1122", 1, 11_173_962, 8, 1763.4, 2.95),
    (ResNet18, "1211", 1, 11_173_962, 16, 2971.3, 2.95),
    (ResNet18, "1121", 1, 11_173_962, 16, 3374.0, 3.93),
    (ResNet18, "1112", 1, 11_173_962, 16, 4984.6, 5.90),
    (ResNet18, "1111", 1, 11_173_962, 32, 11427.1, 9.83),
    (ResNet18, "1222", 1.5, 11_173_962, 6, 1249.7, 2.76),
    (ResNet18, "1222", 2, 11_173_962, 8, 2221.7, 4.92),
    (ResNet18, "1222", 3, 11_173_962, 12, 4998.8, 11.06),
    (ResNet18, "1222", 4, 11_173_962, 16, 8886.7, 19.66),
    (ResNet18, "2222", 1, 11_178_186, 2, None, None),
    (ResNet18, "2122", 1, 11_178_186, 4, None, None),
    (PreActResNet18, "1222", 1, 11_172_170, 4, 555.4, None),
    (PreActResNet18, "1122", 1, 11_172_170, 8, 1763.4, None),
    (PreActResNet18, "1222", 2, 11_172_170, 8, 2221.7, None),
    (VGG16BN, "22222", 1, 14_922_826, 1, 313.4, 0.55),
    (VGG16BN, "12222", 1, 14_922_826, 2, 1134.4, 1.43),
    (VGG16BN, "11222", 1, 14_922_826, 4, 3739.1, 3.34),
    (VGG16BN, "11122", 1, 14_922_826, 8, 9627.9, 6.29),
    (VGG16BN, "11112", 1, 14_922_826, 16, 15063.7, 8.65),
    (VGG16BN, "11222", 2, 14_922_826, 8, 14955.8, 13.37),
    (AlexNet, "2222", 1, 2_850_634, 2, 55.5, None),
    (AlexNet, "1222", 1, 2_850_634, 4, 220.8, None),
    (AlexNet, "1122", 1, 2_850_634, 7, 781.6, None),
    (AlexNet, "1112", 1, 2_850_634, 15, 2224.8, None),
    (AlexNet, "1111", 1, 2_850_634, 29, 2224.8, None),
    (AlexNet, "1122", 2, 2_850_634, 15, 3294.1, None),
    (WideResNet, "122", 1, 36_479_194, 8, 5243, None),
    (WideResNet, "112", 1, 36_479_194, 16, 15939, None),
    (partial(WideResNet, 34), "122", 1, 46_160_474, 8, 6659, None),
    (partial(WideResNet, 34), "112", 1, 46_160_474, 16, 20186, None),
    (partial(WideResNet, 34, 20), "122", 1, 184_531_674, 8, None, None),
    (CifarResNet, "122", 1, 272_282, 8, None, None),
    (CifarResNet, "112", 1, 272_282, 16, None, None),
    (ViTBase, None, 1, 9_523_722, 0, 615, None),
    (partial(ViTBase, image_size=64), None, 2, 9_622_026, 0, 2432, None),
    (ViTSmall, None, 1, 9_622_512, 0, 621, None),
    (partial(ViTSmall, image_size=64), None, 2, 9_720_816, 0, 2457, None),
    (ViTTiny, None, 1, 4_371_438, 0, 280.5, None),
    (partial(ViTTiny, image_size=64), None, 2, 4_469_742, 0, 1109, None),
]


@pytest.mark.parametrize(("make", "strides", "m", "parameters", "side", "mmac", "act"), MEASURED)
def test_sizes_and_costs_as_measured(make, strides, m, parameters, side, mmac, act):
    net = meta(make, strides, m)
    assert sum(p.numel() for p in net.parameters()) == parameters
    found = cost(net)
    assert found.side == side
    if mmac is not None:
        digits = 1 if isinstance(mmac, float) else 0
        assert round(found.macs / 1e6, digits) == mmac
    if act is not None:
        assert round(found.activations / 1e6, 2) == act


def test_cost_leaves_the_network_alone():
    net = EnlargedNetwork(tiny(), 2).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    cost(net, (3, 8, 8))
    assert net.training
    assert not any(m._forward_hooks for m in net.modules())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize(("classes", "parameters"), [(10, 14_922_826), (100, 14_945_956)])
def test_vgg_with_its_classifier(classes, parameters):
    net = meta(VGG16BN, num_classes=classes).arch
    assert sum(p.numel() for p in net.parameters()) == parameters
    kinds = [type(m) for m in net.head.modules() if not list(m.children())]
    hidden = [nn.Linear, nn.ReLU, nn.Dropout]
    assert kinds == [nn.AdaptiveAvgPool2d, nn.Flatten, *hidden, *hidden, nn.Linear]
    assert {m.p for m in net.modules() if isinstance(m, nn.Dropout)} == {0.5}


@pytest.mark.parametrize(
    ("strides", "m", "side"), [("222", 1, 1), ("122", 1, 2), ("112", 1, 4), ("222", 2, 2)]
)
def test_maps_of_the_digits(strides, m, side):
    net = EnlargedNetwork(DigitsNet(parse_strides(strides)), m)
    assert cost(net, (1, 8, 8)).side == side


def test_pools_are_the_same_function_on_a_map_of_one_pixel():
    avg, top = DigitsNet().eval(), DigitsNet(pool="max").eval()
    top.load_state_dict(avg.state_dict())
    x = torch.rand(4, 1, 8, 8)
    assert torch.equal(avg(x), top(x))
