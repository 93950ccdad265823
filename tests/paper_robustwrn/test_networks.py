"""DenseNet and networks of cells: published sizes, layers written out, the auxiliary head."""

import pytest
import torch
import torch.nn.functional as F
from jsonargparse import ArgumentParser
from torch import nn

from common.errors import ConfigurationError
from common.networks.vgg import VGG
from paper_robustwrn.networks import (
    DARTS,
    DARTS_V2,
    NASNET,
    Cell,
    DenseNet,
    FactorizedReduce,
    Genotype,
    NASNet,
    TwoByTwo,
    drop_path,
    make_op,
)

TINY = {"layers": 3, "channels": (4, 2, 4, 6)}


@pytest.mark.parametrize(
    ("make", "kwargs", "count"),
    [
        (VGG, {"widths": (64, 128, 256, 512, 204)}, 9_333_646),
        (DenseNet, {}, 6_956_298),
        (DenseNet, {"depths": (6, 12, 24, 6)}, 5_478_858),
        (DenseNet, {"channels": (64, 128, 256, 204)}, 5_996_570),
        (DenseNet, {"depths": (6, 12, 32, 32), "channels": (64, 128, 256, 640)}, 12_493_322),
        (
            DenseNet,
            {"depths": (6, 12, 36, 24), "channels": (96, 192, 384, 1056), "growth_rate": 48},
            26_482_378,
        ),
        (DARTS, {}, 3_354_274),
        (DARTS, {"auxiliary": True}, 3_830_700),
        (DARTS, {"channels": (108, 36, 72, 144), "auxiliary": True}, 3_825_768),
        (DARTS, {"channels": (144, 36, 72, 58)}, 1_300_766),
        (NASNet, {}, 3_835_882),
        (NASNet, {"auxiliary": True}, 4_293_876),
    ],
)
def test_sizes_as_published(make, kwargs, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in make(**kwargs).parameters()) == count


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        ("DARTS", {"layers": 3, "channels": [4, 2, 4, 6], "auxiliary": True}),
        ("NASNet", {"layers": 3, "channels": [4, 2, 4, 6], "drop_path": 0.2}),
        ("DenseNet", {"depths": [1, 1], "channels": [4, 6], "growth_rate": 2}),
    ],
)
def test_are_made_from_configuration_files_for_any_side_from_eight(make, arguments):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--net", type=nn.Module)
    node = {"class_path": f"paper_robustwrn.networks.{make}", "init_args": arguments}
    config = parser.parse_object({"net": node})
    assert {"num_classes", "in_channels", "mean", "std"} <= set(vars(config.net.init_args))
    net = parser.instantiate(config).net
    for side in (8, 9, 13):
        assert net(torch.rand(2, 3, side, side)).shape == (2, 10)


def test_densenet_equals_the_layers_written_out():
    net = DenseNet((1, 2), (4, 5), 2).eval()
    x = torch.rand(2, 3, 8, 8)
    stem, block = net.stem(x), net.stages[0][0].new
    new = block.conv1(F.relu(block.bn1(stem)))
    z = torch.cat([block.conv2(F.relu(block.bn2(new))), stem], dim=1)  # new features come first
    between = net.stages[0].transition
    z = F.avg_pool2d(between.conv(F.relu(between.bn(z))), 2)
    assert z.shape == (2, 5, 4, 4)
    z = F.relu(net.head.norm(net.stages[1](z)))
    logits = net.head.linear(F.avg_pool2d(z, 4).flatten(1))
    assert torch.allclose(net(x), logits, atol=1e-6)


# --------------------------------------------------------------------------- operations and cells


def make_cell(genotype, reduction, after_reduction=False):
    cell = Cell(genotype, 3, 5, 4, reduction, after_reduction).eval()
    larger = 16 if after_reduction else 8
    return cell, torch.rand(2, 3, larger, larger), torch.rand(2, 5, 8, 8)


@pytest.mark.parametrize("after_reduction", [False, True])
def test_normal_cell_of_darts_written_out(after_reduction):
    cell, x0, x1 = make_cell(DARTS_V2, False, after_reduction)
    assert isinstance(cell.input0, FactorizedReduce) == after_reduction
    s0, s1, op = cell.input0(x0), cell.input1(x1), cell.ops
    s2 = op[0](s0) + op[1](s1)
    s3 = op[2](s0) + op[3](s1)
    s4 = op[4](s1) + s0
    s5 = s0 + op[7](s2)
    assert torch.equal(cell(x0, x1), torch.cat([s2, s3, s4, s5], dim=1))
    assert cell.out_channels == 16


def test_reduction_cell_of_nasnet_written_out():
    cell, x0, x1 = make_cell(NASNET, True)
    s0, s1, op = cell.input0(x0), cell.input1(x1), cell.ops
    s2 = op[0](s1) + op[1](s0)
    s3 = F.max_pool2d(s1, 3, 2, 1) + op[3](s0)
    s4 = F.avg_pool2d(s1, 3, 2, 1, count_include_pad=False) + op[5](s0)
    s5 = s3 + F.avg_pool2d(s2, 3, 1, 1, count_include_pad=False)
    s6 = op[8](s2) + F.max_pool2d(s1, 3, 2, 1)
    assert torch.equal(cell(x0, x1), torch.cat([s4, s5, s6], dim=1))
    assert s6.shape == (2, 4, 4, 4)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("sep_conv_5x5", "ReLU 5/2 1/1 BatchNorm2d ReLU 5/1 1/1 BatchNorm2d"),
        ("dil_conv_3x3", "ReLU 3/2 1/1 BatchNorm2d"),
        ("conv_7x1_1x7", "ReLU 7/2 1/1 BatchNorm2d"),
    ],
)
def test_operations(name, layers):
    op = make_op(name, 4, 2)
    found = [
        f"{m.kernel_size[1]}/{m.stride[1]}" if isinstance(m, nn.Conv2d) else type(m).__name__
        for m in op
    ]
    assert " ".join(found) == layers
    assert all(m.bias is None for m in op if isinstance(m, nn.Conv2d))


@pytest.mark.parametrize(
    "name", ["sep_conv_7x7", "dil_conv_5x5", "conv_7x1_1x7", "skip_connect", "avg_pool_3x3"]
)
@pytest.mark.parametrize("side", [5, 6])
def test_operations_halve_the_map_rounded_up(name, side):
    assert make_op(name, 4, 1)(torch.rand(2, 4, side, side)).shape == (2, 4, side, side)
    assert make_op(name, 4, 2)(torch.rand(2, 4, side, side)).shape == (2, 4, 3, 3)


def test_factorized_reduction_reads_even_and_odd_pixels():
    op = FactorizedReduce(3, 4).eval()
    x = torch.randn(2, 3, 6, 6)
    even = torch.einsum("oc,nchw->nohw", op.even.weight[:, :, 0, 0], x.relu()[:, :, ::2, ::2])
    odd = torch.einsum("oc,nchw->nohw", op.odd.weight[:, :, 0, 0], x.relu()[:, :, 1::2, 1::2])
    assert torch.allclose(op(x), op.bn(torch.cat([even, odd], dim=1)), atol=1e-6)
    with pytest.raises(ConfigurationError, match="got 5"):
        FactorizedReduce(3, 5)


def test_drop_path_zeroes_examples_but_no_identities(monkeypatch):
    x = torch.ones(4000, 2, 1, 1)
    out = drop_path(x, 0.25)
    kept = out[:, 0, 0, 0] > 0
    assert torch.equal(out, (kept / 0.75).view(-1, 1, 1, 1) * x)
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.03)
    dropped = []

    def spy(x, probability):
        dropped.append(probability)
        return x

    monkeypatch.setattr("paper_robustwrn.networks.drop_path", spy)
    cell, x0, x1 = make_cell(DARTS_V2, False)
    cell.train()(x0, x1, 0.5)
    assert dropped == [0.5] * 6  # eight operations, two of them identities


@pytest.mark.parametrize(
    ("ops", "concat", "match"),
    [
        ([("none", 0), ("skip_connect", 0)], [2], "'none'"),
        ([("skip_connect", -1), ("skip_connect", 0)], [2], "operation 0 .* state -1"),
        ([("skip_connect", 0), ("skip_connect", 2)], [2], "operation 1 .* state 2"),
        ([("skip_connect", 0), ("skip_connect", 1)], [-1], r"got \[-1\]"),
        ([("skip_connect", 0), ("skip_connect", 1)], [3], r"got \[3\]"),
        ([("skip_connect", 0), ("skip_connect", 1)], [], r"got \[\]"),
    ],
)
def test_a_cell_has_the_states_that_it_reads_and_returns(ops, concat, match) -> None:
    with pytest.raises(ConfigurationError, match=match):
        Genotype(ops, concat, DARTS_V2.reduce, DARTS_V2.reduce_concat)


# ------------------------------------------------------------------------------ networks of cells


def test_cells_of_a_network():
    with torch.device("meta"):
        net = DARTS(layers=8, auxiliary=True)
    outputs = net.outputs(torch.rand(1, 3, 32, 32, device="meta"))
    assert [z.shape[2] for z in outputs] == [32] * 2 + [16] * 3 + [8] * 3
    assert [z.shape[1] for z in outputs] == [144] * 2 + [288] * 3 + [576] * 3
    assert net.auxiliary_after == 5


@pytest.mark.parametrize(
    ("name", "value"),
    [("layers", 2), ("channels", (4, 4, 4)), ("drop_path", 1.0), ("num_classes", 0)],
)
def test_networks_refuse_settings_that_do_not_fit(name, value):
    with pytest.raises(ConfigurationError, match=name):
        DARTS(**{**TINY, name: value})
    with pytest.raises(ConfigurationError, match=r"depths=\[1, 1\], channels=\[4\]"):
        DenseNet((1, 1), (4,))


def test_drop_path_grows_with_training_and_acts_in_training_only():
    net = DARTS(**TINY, drop_path=0.6)
    x = torch.rand(4, 3, 8, 8)
    assert net.drop_path_prob == 0
    assert torch.equal(net(x), net(x))
    net.set_progress(5 / 20)
    assert net.drop_path_prob == pytest.approx(0.15)
    net.set_progress(1.0)
    assert not torch.equal(net(x), net(x))
    net.eval()
    assert torch.equal(net(x), net(x))


@pytest.mark.parametrize("side", [1, 2, 7, 8, 16])
def test_pool_of_the_auxiliary_head(side):
    x = torch.rand(2, 3, side, side)
    assert TwoByTwo()(x).shape == (2, 3, 2, 2)
    if side == 8:
        assert torch.equal(TwoByTwo()(x), F.avg_pool2d(x, 5, 3))


@pytest.mark.parametrize("is_training", [True, False])
def test_forward_returns_logits_in_every_mode(is_training):
    net, x = DARTS(**TINY, auxiliary=True).train(is_training), torch.rand(4, 3, 8, 8)
    logits, auxiliary = net.forward_with_auxiliary(x)
    assert torch.equal(net(x), logits)
    assert auxiliary.shape == (4, 10)
    (logits.square().sum() + auxiliary.square().sum()).backward()
    assert all(p.grad is not None for p in net.parameters())
    assert net.auxiliary.bn1.num_batches_tracked == is_training  # only the pass that asked for it
