"""The network against its published sizes and a slow rewrite; the rule, the search, the names."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.errors import ConfigurationError
from common.evaluation.measures import cost
from common.networks.wide_resnet import WideResNet
from common.parsing import build
from paper_robustwrn.method import (
    DEPTH_GRID,
    EQUAL_BUDGET,
    NETWORKS,
    STAGE_GRID,
    WIDTH_GRID,
    Configuration,
    RobustWideResNet,
    channels_of,
    count_macs,
    count_parameters,
    grid,
    named,
    robust_widths,
    search,
    smallest_robust,
)

M10 = (16, 160, 320, 640)
# name, channels, depths, parameters, 1e9 multiply-accumulates; 10 classes, 32x32
PUBLISHED = [
    ("WRN-28-10", M10, (4, 4, 4), 36_479_194, 5.243),
    ("w1-1-1", (16, 16, 32, 64), (5, 5, 5), 466_714, 0.069),
    ("WRN-34-10", M10, (5, 5, 5), 46_160_474, 6.659),
    ("WRN-34-12", (16, 192, 384, 768), (5, 5, 5), 66_457_818, 9.582),
    ("WRN-34-20", (16, 320, 640, 1280), (5, 5, 5), 184_531_674, 26.582),
    ("WRN-34-R", (16, 320, 640, 512), (5, 5, 5), 68_116_698, 19.133),
    ("w10-10-4", (16, 160, 320, 256), (5, 5, 5), 17_050_970, 4.797),
    ("w4-10-10", (16, 64, 320, 640), (5, 5, 5), 44_094_170, 4.781),
    ("w15-15-6", (16, 240, 480, 384), (5, 5, 5), 38_331_930, 10.772),
    ("w20-10-4", (16, 320, 320, 256), (5, 5, 5), 23_812_570, 11.324),
    ("w4-4-13", (16, 64, 128, 832), (5, 5, 5), 58_915_418, 4.368),
    ("d5-5-4", M10, (5, 5, 4), 38_785_114, 6.187),
    ("d5-5-1", M10, (5, 5, 1), 16_659_034, 4.771),
    ("d7-7-1", M10, (7, 7, 1), 21_270_874, 6.659),
]


def meta(**kwargs) -> RobustWideResNet:
    with torch.device("meta"):
        return RobustWideResNet(**kwargs)


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def measured_macs(net: nn.Module, size: int, in_channels: int = 3) -> float:
    return cost(net.eval(), torch.empty(in_channels, size, size, device="meta"))["macs"]


# ---------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(("name", "channels", "depths", "count", "macs"), PUBLISHED)
def test_sizes_as_published(name, channels, depths, count, macs):
    found = named(name)
    assert (found.channels, found.depths) == (channels, depths)
    assert found.parameters() == count
    assert round(found.macs() / 1e9, 3) == macs
    assert parameters(meta(depths=depths, widths=found.widths)) == count


def test_sizes_for_a_hundred_classes():
    c = named("WRN-34-R")
    assert c.parameters(num_classes=100) == 68_162_868
    net = meta(num_classes=100)
    assert parameters(net) == 68_162_868
    assert measured_macs(net, 32) == c.macs(num_classes=100)


@pytest.mark.parametrize("size", [13, 32])
@pytest.mark.parametrize("strides", [(1, 2), (2, 1)])
@pytest.mark.parametrize("channels", [(4, 4, 6), (4, 6, 6), (3, 4, 5, 4)])
def test_closed_forms_hold_for_other_strides_sides_and_channels(channels, strides, size):
    depths, strides = (2, 3, 1)[: len(channels) - 1], (*strides, 2)[: len(channels) - 1]
    given = {"num_classes": 7, "in_channels": 2, "strides": strides}
    net = meta(depths=depths, channels=channels, **given)
    assert parameters(net) == count_parameters(depths, channels, **given)
    assert measured_macs(net, size, 2) == count_macs(depths, channels, **given, size=size)


def test_the_rule_costs_parameters_of_wrn_34_12_and_twice_its_macs():
    rule, uniform = NETWORKS["WRN-34-R"], NETWORKS["WRN-34-12"]
    assert rule.parameters() - uniform.parameters() == 1_658_880
    assert rule.macs() / uniform.macs() == pytest.approx(2.00, abs=0.005)


# -------------------------------------------------------------------------------------- network


@pytest.mark.parametrize(
    ("widths", "entries"),
    [
        ((20, 20, 8), 191),
        ((1, 1, 1), 190),  # 16 -> 16 without a stride
        ((20, 10, 4), 191),  # 320 -> 320 with one
    ],
)
def test_entries_of_the_state_dict(widths, entries):
    state = meta(widths=widths).state_dict()
    assert len(state) == entries
    assert sum(key.endswith("shortcut.weight") for key in state) == entries - 188


def test_equals_the_trades_code_written_out():
    """WRN-34-1 by its usual definition, of which a second, unused first block is left out."""
    torch.manual_seed(0)
    net = RobustWideResNet(widths=(1, 1, 1)).double().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    w = net.state_dict()

    def relu_bn(z, name):
        keys = ("running_mean", "running_var", "weight", "bias")
        return F.relu(F.batch_norm(z, *(w[f"{name}.{key}"] for key in keys)))

    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    z, planes = F.conv2d(x, w["stem.weight"], padding=1), 16
    for stage, width in enumerate((16, 32, 64)):
        for b in range(5):
            name = f"stages.{stage}.{b}"
            stride = 2 if stage and b == 0 else 1
            a = relu_bn(z, f"{name}.bn1")
            if planes != width:
                z = F.conv2d(a, w[f"{name}.shortcut.weight"], stride=stride)
            h = F.conv2d(a, w[f"{name}.conv1.weight"], stride=stride, padding=1)
            z = z + F.conv2d(relu_bn(h, f"{name}.bn2"), w[f"{name}.conv2.weight"], padding=1)
            planes = width
    pooled = F.avg_pool2d(relu_bn(z, "head.norm"), 2).flatten(1)
    logits = F.linear(pooled, w["head.linear.weight"], w["head.linear.bias"])
    assert torch.allclose(net(x), logits, atol=1e-12)
    common = WideResNet(34, 1).double().eval()
    common.load_state_dict(w)
    assert torch.equal(common(x), net(x))


@pytest.mark.parametrize(("inside", "out", "stride"), [(4, 4, 1), (4, 6, 1), (4, 6, 2), (4, 4, 2)])
def test_a_block_without_its_branch_is_its_shortcut(inside, out, stride):
    net = RobustWideResNet(depths=(1,), channels=(inside, out), strides=(stride,)).eval()
    block = net.stages[0][0]
    nn.init.zeros_(block.conv2.weight)
    nn.init.uniform_(block.bn1.running_mean, -1, 1)
    x = torch.randn(2, inside, 8, 8)
    if inside != out:
        expected = block.shortcut(F.relu(block.bn1(x)))
    elif stride == 2:
        expected = F.conv2d(x, block.shortcut.weight, stride=2)
    else:
        expected = x
    assert torch.equal(block(x), expected)


def test_stems():
    small = {"depths": (1, 1), "channels": (4, 4, 6)}
    for settings, side in (({"stem_stride": 2}, 32), ({"imagenet_stem": True}, 64)):
        net = meta(**small, **settings)
        assert net.features(torch.rand(1, 3, side, side, device="meta")).shape[2:] == (8, 8)
    assert list(net.state_dict())[:2] == ["stem.conv.weight", "stem.bn.weight"]
    assert net.stem.conv.weight.shape == (4, 3, 7, 7)
    with pytest.raises(ConfigurationError, match="imagenet_stem"):
        meta(**small, imagenet_stem=True, stem_stride=2)
    strided = RobustWideResNet(**{**small, "channels": (64, 4, 6)}, stem_stride=2)
    assert strided.stem.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 64)), rel=0.1)


def test_is_made_from_a_configuration_file():
    arguments = {
        "depths": [1, 1],
        "widths": [1, 1],
        "drop_rates": [0.0, 0.5],
        "activations": ["torch.nn.SiLU", "torch.nn.LeakyReLU"],
    }
    node = {"class_path": "paper_robustwrn.method.RobustWideResNet", "init_args": arguments}
    net = build({"net": nn.Module}, {"net": node}).net
    assert [type(stage[0].act1) for stage in net.stages] == [nn.SiLU, nn.LeakyReLU]
    assert [type(stage[0].dropout) for stage in net.stages] == [nn.Identity, nn.Dropout]
    assert type(net.head.act) is nn.ReLU


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("depths", (1, 1)),
        ("channels", (16, 16, 16)),
        ("widths", (1, 0, 1)),
        ("strides", (1, 2)),
        ("stem_stride", 0),
        ("drop_rates", (0.1,)),
    ],
)
def test_refuses_settings_that_do_not_fit(name, value):
    with pytest.raises(ConfigurationError, match=name):
        meta(**{name: value})


# ------------------------------------------------------------------------------ rule and search


def test_the_rule_rounds_to_the_nearest_and_ties_up_whatever_floats_say():
    expected = {20: (20, 20, 8), 16: (16, 16, 6), 12: (12, 12, 5), 15: (15, 15, 6), 1: (1, 1, 1)}
    assert {w: robust_widths(w) for w in expected} == expected
    assert robust_widths(5, 0.5) == (5, 5, 3)
    assert robust_widths(50, 0.29) == (50, 50, 15)  # 14.5, and 14.499999999999998 in floats
    assert robust_widths(10, 0.5, stages=4) == (10, 10, 10, 5)
    with pytest.raises(ConfigurationError, match="ratio"):
        robust_widths(10, 0)


def test_the_smallest_network_of_the_rule():
    assert smallest_robust(NETWORKS["WRN-34-12"].parameters()) == 20
    assert smallest_robust(NETWORKS["WRN-34-10"].parameters()) == 17
    assert [smallest_robust(budget) for budget in (1, 68_116_698, 68_116_699)] == [1, 20, 21]
    assert Configuration(widths=robust_widths(19)).parameters() == 63_706_138
    w = smallest_robust(NETWORKS["WRN-34-12"].macs(), measure="macs")
    at, below = (Configuration(widths=robust_widths(v)).macs() for v in (w, w - 1))
    assert below < NETWORKS["WRN-34-12"].macs() <= at


def test_search_finds_the_smallest_that_reaches_the_budget():
    for budget, measure in ((46_160_474, "parameters"), (6_000_000_000, "macs")):
        large = [size for c in WIDTH_GRID if (size := c.cost(measure)) >= budget]
        assert search(WIDTH_GRID, budget, measure).cost(measure) == min(large)
    assert search(grid(widths=[(20, 20, 8)]), 68_116_698) == NETWORKS["WRN-34-R"]
    for networks in (STAGE_GRID, []):
        with pytest.raises(ConfigurationError, match=f"none of the {len(networks)}"):
            search(networks, 10**12)


# ---------------------------------------------------------------------------------------- grids


def test_grids():
    assert (len(DEPTH_GRID), len(WIDTH_GRID)) == (216, 512)
    assert len(STAGE_GRID) == len(set(STAGE_GRID)) == 25
    names = {c.name for c in STAGE_GRID}
    assert {"d5-5-5", "d5-5-4", "d1-5-5", "w10-10-8", "w2-10-10", "w10-4-10"} <= names
    sizes = [c.parameters() / 1e6 for c in EQUAL_BUDGET]
    assert [round(s, 1) for s in sizes] == [66.5, 68.1, 60.8, 59.1, 58.9]


def test_names_lead_back_to_their_networks():
    for c in (*DEPTH_GRID, *WIDTH_GRID, *STAGE_GRID, *EQUAL_BUDGET, *NETWORKS.values()):
        assert named(c.name) == c
    assert named("w10-10-10") == named("d5-5-5") == NETWORKS["WRN-34-10"]
    both = Configuration((4, 4, 4), (11, 13, 6))
    assert both.name == "d4-4-4-w11-13-6"
    assert named(both.name) == both
    assert round(both.parameters() / 1e6, 1) == 24.5  # as the follow-up study has it
    assert channels_of((11, 13, 6)) == (16, 176, 416, 384)


@pytest.mark.parametrize(
    "name", ["", "WRN-35-10", "d5-5-", "d5-5-5w10-10-10", "d5-0-5", "w0-1-1", "d5-5-w10-10-10"]
)
def test_other_names_are_refused(name):
    with pytest.raises(ConfigurationError):
        named(name)
