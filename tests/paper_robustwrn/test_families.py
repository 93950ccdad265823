"""Other families: published sizes, cells written out, drop path, the auxiliary head and loss."""

import pytest
import torch
import torch.nn.functional as F
from jsonargparse import ArgumentParser
from torch import nn

from common.attacks.pgd import PGD
from common.classifier import RobustClassifier
from common.errors import ConfigurationError
from common.objectives import AT, TRADES
from paper_robustwrn.families import (
    DARTS,
    DARTS_V2,
    NASNET,
    NETWORKS,
    Bottleneck,
    Cell,
    CellNetwork,
    DenseNet,
    FactorizedReduce,
    Genotype,
    NASNet,
    SATAuxiliary,
    TwoByTwo,
    drop_path,
    make_op,
)

TINY = {"layers": 3, "channels": (4, 2, 4, 6)}
STEM_108 = (108, 36, 72, 144)


def parameters(make, **kwargs) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in make(**kwargs).parameters())


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("vgg16", 14_728_266),
        ("vgg16-r", 9_333_646),
        ("vgg16-first", 14_652_456),
        ("densenet121", 6_956_298),
        ("densenet121-r-depth", 5_478_858),
        ("densenet121-r-width", 5_996_570),
        ("densenet121-first", 6_699_658),
        ("darts", 3_354_274),
        ("darts-r", 1_300_766),
        ("darts-r-budget", 2_793_202),
        ("darts-first", 3_197_062),
        ("nasnet", 3_835_882),
    ],
)
def test_sizes_of_named_networks(name, count):
    assert parameters(NETWORKS[name]) == count


@pytest.mark.parametrize(
    ("make", "kwargs", "count"),
    [
        (DARTS, {"auxiliary": True}, 3_830_700),
        (DARTS, {"channels": STEM_108}, 3_349_342),
        (DARTS, {"channels": STEM_108, "auxiliary": True}, 3_825_768),
        (NASNet, {"auxiliary": True}, 4_293_876),
        (DenseNet, {"depths": (6, 12, 32, 32), "channels": (64, 128, 256, 640)}, 12_493_322),
        (DenseNet, {"depths": (6, 12, 48, 32), "channels": (64, 128, 256, 896)}, 18_104_330),
        (
            DenseNet,
            {"depths": (6, 12, 36, 24), "channels": (96, 192, 384, 1056), "growth_rate": 48},
            26_482_378,
        ),
    ],
)
def test_sizes_as_published(make, kwargs, count):
    assert parameters(make, **kwargs) == count


@pytest.mark.parametrize("side", [8, 9, 13, 32])
@pytest.mark.parametrize(
    "make",
    [
        lambda: DenseNet((1, 1, 1, 1), (4, 6, 4, 6), 2, num_classes=7, in_channels=1),
        lambda: DARTS(**TINY, num_classes=7, in_channels=1),
        lambda: NASNet(**TINY, num_classes=7, in_channels=1),
        lambda: NETWORKS["vgg16-r"](num_classes=7, in_channels=1, widths=(2, 2, 2, 2, 2)),
    ],
    ids=["densenet", "darts", "nasnet", "vgg"],
)
def test_any_side_from_eight(make, side):
    assert make().eval()(torch.rand(2, 1, side, side)).shape == (2, 7)


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        ("DARTS", {"layers": 3, "channels": [4, 2, 4, 6], "auxiliary": True}),
        ("NASNet", {"layers": 3, "channels": [4, 2, 4, 6], "drop_path": 0.2}),
        ("DenseNet", {"depths": [1, 1], "channels": [4, 6], "growth_rate": 2}),
    ],
)
def test_are_made_from_configuration_files(make, arguments):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--net", type=nn.Module)
    node = {"class_path": f"paper_robustwrn.families.{make}", "init_args": arguments}
    config = parser.parse_object({"net": node})
    assert {"num_classes", "in_channels", "mean", "std"} <= set(vars(config.net.init_args))
    assert parser.instantiate(config).net(torch.rand(2, 3, 8, 8)).shape == (2, 10)


# ------------------------------------------------------------------------------------- DenseNet


def test_new_features_come_first():
    block = Bottleneck(4, 3).eval()
    x = torch.rand(2, 4, 5, 5)
    out = block(x)
    assert torch.equal(out[:, 3:], x)
    new = block.new.conv1(F.relu(block.new.bn1(x)))
    assert torch.equal(out[:, :3], block.new.conv2(F.relu(block.new.bn2(new))))


def test_densenet_equals_the_layers_written_out():
    net = DenseNet((1, 2), (4, 5), 2).eval()
    x = torch.rand(2, 3, 8, 8)
    z = net.stages[0][0](net.stem(x))
    between = net.stages[0].transition
    z = F.avg_pool2d(between.conv(F.relu(between.bn(z))), 2)
    assert z.shape == (2, 5, 4, 4)
    z = F.relu(net.head.norm(net.stages[1](z)))
    logits = net.head.linear(F.avg_pool2d(z, 4).flatten(1))
    assert torch.allclose(net(x), logits, atol=1e-6)


# --------------------------------------------------------------------------------------- cells


def make_cell(genotype, reduction, after_reduction=False):
    ops, concat = (
        (genotype.reduce, genotype.reduce_concat)
        if reduction
        else (genotype.normal, genotype.normal_concat)
    )
    cell = Cell(ops, concat, 3, 5, 4, reduction, after_reduction).eval()
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


def test_cells_of_a_network():
    with torch.device("meta"):
        net = DARTS(auxiliary=True)
        outputs = net.outputs(torch.rand(1, 3, 32, 32))
    sides, widths = [z.shape[2] for z in outputs], [z.shape[1] for z in outputs]
    assert sides == [32] * 6 + [16] * 7 + [8] * 7
    assert widths == [144] * 6 + [288] * 7 + [576] * 7
    assert net.auxiliary_after == 13


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("sep_conv_5x5", "ReLU 5/2 1/1 BN ReLU 5/1 1/1 BN"),
        ("dil_conv_3x3", "ReLU 3/2 1/1 BN"),
        ("conv_7x1_1x7", "ReLU 7/2 1/1 BN"),
    ],
)
def test_operations(name, layers):
    op = make_op(name, 4, 2)
    short = {"BatchNorm2d": "BN"}
    found = [
        f"{m.kernel_size[1]}/{m.stride[1]}"
        if isinstance(m, nn.Conv2d)
        else short.get(type(m).__name__, type(m).__name__)
        for m in op
    ]
    assert " ".join(found) == layers
    assert all(m.bias is None for m in op if isinstance(m, nn.Conv2d))
    assert op(torch.rand(2, 4, 8, 8)).shape == (2, 4, 4, 4)


@pytest.mark.parametrize("name", ["sep_conv_7x7", "dil_conv_5x5", "skip_connect", "avg_pool_3x3"])
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
    with pytest.raises(ConfigurationError, match="even number"):
        FactorizedReduce(3, 5)


def test_backward_reaches_every_parameter():
    net = DARTS(**TINY, auxiliary=True)
    logits, auxiliary = net.forward_with_auxiliary(torch.rand(4, 3, 16, 16))
    (logits.square().sum() + auxiliary.square().sum()).backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"layers": 2}, "at least 3"),
        ({"channels": (4, 4, 4)}, "four|three stages"),
        ({"drop_path": 1.0}, "drop_path"),
        ({"num_classes": 0}, "num_classes"),
    ],
)
def test_cell_networks_refuse_settings_that_do_not_fit(kwargs, message):
    with pytest.raises(ConfigurationError, match=message):
        DARTS(**{**TINY, **kwargs})
    with pytest.raises(ConfigurationError, match=r"an operation must be one of .* got 'none'"):
        make_op("none", 4, 1)
    with pytest.raises(ConfigurationError, match="one value"):
        DenseNet((1, 1), (4,))


# ------------------------------------------------------------------------------------ drop path


def test_drop_path_zeroes_examples_and_keeps_the_mean():
    x = torch.ones(4000, 2, 1, 1)
    out = drop_path(x, 0.25)
    kept = out[:, 0, 0, 0] > 0
    assert torch.equal(out, (kept / 0.75).view(-1, 1, 1, 1) * x)
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.03)


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


def test_identities_are_never_dropped(monkeypatch):
    dropped = []

    def spy(x, probability):
        dropped.append(probability)
        return x

    monkeypatch.setattr("paper_robustwrn.families.drop_path", spy)
    cell, x0, x1 = make_cell(DARTS_V2, False)
    cell.train()(x0, x1, 0.5)
    assert dropped == [0.5] * 6  # eight operations, two of them identities


# --------------------------------------------------------------------- auxiliary head and loss


@pytest.mark.parametrize("side", [1, 2, 3, 4, 7, 8, 16])
def test_pool_of_the_auxiliary_head(side):
    x = torch.rand(2, 3, side, side)
    assert TwoByTwo()(x).shape == (2, 3, 2, 2)
    if side == 8:
        assert torch.equal(TwoByTwo()(x), F.avg_pool2d(x, 5, 3))


def test_forward_returns_logits_whatever_the_mode():
    net = DARTS(**TINY, auxiliary=True)
    x = torch.rand(2, 3, 8, 8)
    for mode in (True, False):
        net.train(mode)
        logits, auxiliary = net.forward_with_auxiliary(x)
        assert torch.equal(net(x), logits)
        assert auxiliary.shape == (2, 10)
    assert net.auxiliary.bn1.num_batches_tracked == 1  # only the pass that asked for it


def test_auxiliary_loss_written_out(batch):
    net = DARTS(**TINY, auxiliary=True)
    module = RobustClassifier(net, SATAuxiliary(0.4))
    batch["x_adv"] = batch["x"] + 0.01
    loss = module.objective.outer(module, batch)
    logits, auxiliary = net.forward_with_auxiliary(batch["x_adv"])
    main, other = (F.cross_entropy(z, batch["y"]) for z in (logits, auxiliary))
    torch.testing.assert_close(loss, main + 0.4 * other)
    assert SATAuxiliary(0.4).needs_x_adv
    plain = AT().outer(module, dict(batch))
    torch.testing.assert_close(SATAuxiliary(0.0).outer(net, batch), plain)


def test_the_attack_climbs_the_main_logits_alone(batch):
    net = DARTS(**TINY, auxiliary=True).eval()
    inner = SATAuxiliary().inner(net, batch)
    x_adv = PGD(0.1, 0.05, 2)(inner, batch["x"])
    assert torch.equal(inner(x_adv), F.cross_entropy(net(x_adv), batch["y"], reduction="none"))
    assert (x_adv - batch["x"]).abs().max() <= 0.1 + 1e-6
    assert all(p.grad is None for p in net.parameters())
    assert net.auxiliary.bn1.num_batches_tracked == 0


def test_auxiliary_loss_says_what_is_missing(batch):
    net = DARTS(**TINY)
    with pytest.raises(ConfigurationError, match="x_adv"):
        SATAuxiliary().outer(net, batch)
    batch["x_adv"] = batch["x"]
    with pytest.raises(ConfigurationError, match=r"model\.net\.auxiliary"):
        SATAuxiliary().outer(net, batch)
    with pytest.raises(ConfigurationError, match="not DenseNet"):
        SATAuxiliary().outer(DenseNet((1,), (4,), 2), batch)
    with pytest.raises(ConfigurationError, match="weight"):
        SATAuxiliary(-1.0)


def test_plain_losses_train_cell_networks_too(batch):
    net = CellNetwork(DARTS_V2, **TINY)
    batch["x_adv"] = batch["x"]
    assert TRADES().outer(net, batch).isfinite()


@pytest.mark.parametrize(
    ("ops", "concat", "match"),
    [
        ([("skip_connect", -1), ("skip_connect", 0)], [2], "operation 0 .* reads state -1"),
        ([("skip_connect", 0), ("skip_connect", 2)], [2], "operation 1 .* states 0 to 1 before"),
        ([("skip_connect", 0), ("skip_connect", 1)], [-1], r"0 to 2 to return, got \[-1\]"),
        ([("skip_connect", 0), ("skip_connect", 1)], [3], r"0 to 2 to return, got \[3\]"),
        ([("skip_connect", 0), ("skip_connect", 1)], [], "to return"),
    ],
)
def test_a_cell_has_the_states_that_it_reads_and_returns(ops, concat, match) -> None:
    with pytest.raises(ConfigurationError, match=match):
        Genotype(ops, concat, DARTS_V2.reduce, DARTS_V2.reduce_concat)
    with pytest.raises(ConfigurationError, match=match):
        Cell(ops, concat, 4, 4, 4, reduction=False, after_reduction=False)
