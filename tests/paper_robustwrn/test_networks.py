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
    DenseNet,
    NASNet,
    TwoByTwo,
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


def test_cells_of_a_network():
    with torch.device("meta"):
        net = DARTS(auxiliary=True)
        outputs = net.outputs(torch.rand(1, 3, 32, 32))
    sides, widths = [z.shape[2] for z in outputs], [z.shape[1] for z in outputs]
    assert sides == [32] * 6 + [16] * 7 + [8] * 7
    assert widths == [144] * 6 + [288] * 7 + [576] * 7
    assert net.auxiliary_after == 13


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


@pytest.mark.parametrize("side", [1, 2, 3, 4, 7, 8, 16])
def test_pool_of_the_auxiliary_head(side):
    x = torch.rand(2, 3, side, side)
    assert TwoByTwo()(x).shape == (2, 3, 2, 2)
    if side == 8:
        assert torch.equal(TwoByTwo()(x), F.avg_pool2d(x, 5, 3))


def test_forward_returns_logits_whatever_the_mode():
    net = DARTS(**TINY, auxiliary=True)
    x = torch.rand(4, 3, 8, 8)
    for mode in (True, False):
        net.train(mode)
        logits, auxiliary = net.forward_with_auxiliary(x)
        assert torch.equal(net(x), logits)
        assert auxiliary.shape == (4, 10)
        if mode:
            (logits.square().sum() + auxiliary.square().sum()).backward()
    assert all(p.grad is not None for p in net.parameters())
    assert net.auxiliary.bn1.num_batches_tracked == 1  # only the pass that asked for it
