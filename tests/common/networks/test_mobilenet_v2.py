"""MobileNetV2 as in the CIFAR code: counts, blocks, shapes, refusals."""

import pytest
import torch
from torch import nn

from common.networks.mobilenet_v2 import InvertedResidual, MobileNetV2


@pytest.mark.parametrize(("classes", "parameters"), [(10, 2_296_922), (100, 2_412_212)])
def test_parameters(classes, parameters) -> None:
    with torch.device("meta"):
        net = MobileNetV2(num_classes=classes)
        assert sum(p.numel() for p in net.parameters()) == parameters
        assert net(torch.rand(2, 3, 32, 32)).shape == (2, classes)
        assert net.features(torch.rand(1, 3, 64, 64)).shape == (1, 320, 8, 8)
    assert sum(len(stage) for stage in net.stages) == 17
    norms = sum(2 * m.num_features for m in net.modules() if isinstance(m, nn.BatchNorm2d))
    assert norms == 35_088


def test_a_block_by_hand() -> None:
    block = InvertedResidual(3, 5, 1, 4).eval()
    x = torch.rand(2, 3, 6, 6)
    h = block.bn1(nn.functional.conv2d(x, block.conv1.weight)).relu()
    assert h.shape == (2, 12, 6, 6)
    h = nn.functional.conv2d(h, block.conv2.weight, padding=1, groups=12)
    h = block.bn3(nn.functional.conv2d(block.bn2(h).relu(), block.conv3.weight))
    shortcut = block.shortcut.bn(nn.functional.conv2d(x, block.shortcut.conv.weight))
    torch.testing.assert_close(block(x), h + shortcut)
    assert (block(x) < 0).any(), "nothing follows the sum"


@pytest.mark.parametrize(
    ("channels", "stride", "kind"), [((4, 4), 1, nn.Identity), ((4, 4), 2, type(None))]
)
def test_shortcuts(channels, stride, kind) -> None:
    block = InvertedResidual(*channels, stride)
    assert isinstance(block.shortcut, kind)
    assert block(torch.rand(2, 4, 7, 7)).shape[-1] == -(-7 // stride)
