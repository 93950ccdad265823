"""ResNets, pre-activation and wide networks, MobileNetV2: layers, shortcuts, starting weights."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.networks.mobilenet_v2 import InvertedResidual, MobileNetV2
from common.networks.preact_resnet import PreActResNet
from common.networks.resnet import (
    BareShortcutBlock,
    BasicBlock,
    ResNet,
    kaiming,
)
from common.networks.wide_resnet import SamePaddingBlock, WideBlock, WideResNet

resnet = partial(ResNet, depths=(1, 2), widths=(4, 6), strides=(1, 2))
preact = partial(PreActResNet, depths=(1, 1, 2), widths=(4, 4, 6), strides=(1, 2, 2))
wide = partial(WideResNet, depths=(1, 1, 2), widths=(4, 4, 6), stem_width=4)


def test_resnet_equals_its_layers_written_out(written):
    net = resnet(mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7])
    w = written(net)

    def block(z, name, stride, projected):
        h = w.bn(w.conv(z, f"{name}.conv1", stride), f"{name}.bn1").relu()
        h = w.bn(w.conv(h, f"{name}.conv2"), f"{name}.bn2")
        if projected:
            z = w.bn(w.conv(z, f"{name}.shortcut.conv", stride), f"{name}.shortcut.bn")
        return (h + z).relu()

    x = torch.rand(3, 3, 8, 8, dtype=torch.float64)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])
    z = (x - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    z = w.bn(w.conv(z, "stem.conv"), "stem.bn").relu()
    z = block(z, "stages.0.0", 1, projected=False)
    z = block(z, "stages.1.0", 2, projected=True)
    z = block(z, "stages.1.1", 1, projected=False)
    assert torch.allclose(net.features(x), z, atol=1e-12)
    assert torch.allclose(net(x), w.linear(z.mean((2, 3)), "head.linear"), atol=1e-12)


@pytest.mark.parametrize("make", [preact, wide])
def test_preactivated_networks_equal_their_layers_written_out(make, written):
    net = make()
    w = written(net)

    def block(z, name, stride, shortcut):
        a = w.bn(z, f"{name}.bn1").relu()
        h = w.bn(w.conv(a, f"{name}.conv1", stride), f"{name}.bn2").relu()
        if shortcut != "identity":
            z = w.conv({"raw": z, "activated": a}[shortcut], f"{name}.shortcut", stride)
        return w.conv(h, f"{name}.conv2") + z

    x = torch.rand(3, 3, 8, 8, dtype=torch.float64)
    z = block(w.conv(x, "stem"), "stages.0.0", 1, "identity")
    # 4 -> 4 with a stride: a wide network projects the raw input
    z = block(z, "stages.1.0", 2, "raw" if make is wide else "activated")
    z = block(z, "stages.2.0", 2, "activated")  # 4 -> 6
    z = block(z, "stages.2.1", 1, "identity")
    assert torch.allclose(net.features(x), z, atol=1e-12)
    v = w.bn(z, "head.norm").relu().mean((2, 3))
    assert torch.allclose(net(x), w.linear(v, "head.linear"), atol=1e-12)


def test_starting_weights_of_a_resnet():
    torch.manual_seed(3)
    default = ResNet(depths=(1,), widths=(64,), strides=(1,))
    torch.manual_seed(3)
    net = ResNet(depths=(1,), widths=(64,), strides=(1,), init=kaiming)
    conv = net.stages[0][0].conv1
    assert conv.weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)
    assert default.stages[0][0].conv1.weight.std().item() < 0.7 * conv.weight.std().item()
    assert torch.equal(net.head.linear.weight, default.head.linear.weight)
    assert net.stages[0][0].bn2.weight.min() == 1  # no branch starts at zero
    torch.manual_seed(3)
    net = preact()
    torch.manual_seed(3)
    assert torch.equal(net.stem.weight, nn.Conv2d(3, 4, 3, bias=False).weight)


def test_starting_weights_of_a_wide_network():
    net = WideResNet(10, 4)
    conv, shortcut = net.stages[2][0].conv2, net.stages[2][0].shortcut
    assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 256)), rel=0.01)
    # fan-out of a 1x1 kernel, not of the input
    assert shortcut.weight.std().item() == pytest.approx(math.sqrt(2 / 256), rel=0.02)
    linear = net.head.linear
    assert linear.bias.abs().max() == 0
    assert linear.weight.abs().max() <= 1 / math.sqrt(256)  # PyTorch's default is uniform
    assert linear.weight.std().item() == pytest.approx(1 / math.sqrt(3 * 256), rel=0.05)


def test_a_bare_shortcut_is_the_convolution_alone():
    block, x = BareShortcutBlock(4, 6, 2).eval(), torch.randn(2, 4, 8, 8)
    residual = block.bn2(block.conv2(block.bn1(block.conv1(x)).relu()))
    shortcut = F.conv2d(x, block.shortcut.weight, stride=2)
    assert torch.equal(block(x), (residual + shortcut).relu())
    assert isinstance(BareShortcutBlock(4, 4).shortcut, nn.Identity)


def test_activation_and_block_are_used_everywhere():
    class Plain(nn.Module):
        def __init__(self, inside, out, stride, activation):
            super().__init__()
            self.conv, self.act = nn.Conv2d(inside, out, 3, stride, 1), activation()

        def forward(self, x):
            return self.act(self.conv(x))

    net = resnet(block=Plain, activation=nn.SiLU)
    assert not any(isinstance(m, nn.ReLU | BasicBlock) for m in net.modules())
    assert sum(isinstance(m, nn.SiLU) for m in net.modules()) == 4
    assert net(torch.rand(2, 3, 8, 8)).shape == (2, 10)


def test_stages_have_their_own_dropout_and_activation():
    net = wide(drop_rates=[0.0, 0.2, 0.5], activations=[nn.ReLU, nn.SiLU, nn.Tanh])
    blocks = [stage[0] for stage in net.stages]
    assert [getattr(b.dropout, "p", 0.0) for b in blocks] == [0.0, 0.2, 0.5]
    assert [type(b.act1) for b in blocks] == [nn.ReLU, nn.SiLU, nn.Tanh]
    assert [type(b.act2) for b in blocks] == [nn.ReLU, nn.SiLU, nn.Tanh]
    assert isinstance(net.head.act, nn.ReLU)


def test_same_padding_adds_a_row_below_and_a_column_to_the_right():
    block, plain = SamePaddingBlock(4, 6, 2), WideBlock(4, 6, 2)
    plain.load_state_dict(block.state_dict())
    x = torch.rand(2, 4, 8, 8)
    a = block.activate(x)
    expected = F.conv2d(F.pad(a, (0, 1, 0, 1)), block.conv1.weight, stride=2)
    h = block.act2(block.bn2(expected))
    torch.testing.assert_close(block.residual(a), block.conv2(h))
    assert block(x).shape == plain(x).shape == (2, 6, 4, 4)
    assert not torch.allclose(block.eval()(x), plain.eval()(x))
    # Without a stride it is the plain block.
    block, plain = SamePaddingBlock(4, 6).eval(), WideBlock(4, 6).eval()
    plain.load_state_dict(block.state_dict())
    assert torch.equal(block(x), plain(x))


@pytest.mark.parametrize(("classes", "parameters"), [(10, 2_296_922), (100, 2_412_212)])
def test_sizes_of_mobilenet(classes, parameters):
    with torch.device("meta"):
        net = MobileNetV2(num_classes=classes)
        assert net.features(torch.rand(1, 3, 64, 64)).shape == (1, 320, 8, 8)
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert sum(len(stage) for stage in net.stages) == 17
    norms = sum(2 * m.num_features for m in net.modules() if isinstance(m, nn.BatchNorm2d))
    assert norms == 35_088


def test_an_inverted_residual_by_hand():
    block = InvertedResidual(3, 5, 1, 4).eval()
    x = torch.rand(2, 3, 6, 6)
    h = block.bn1(F.conv2d(x, block.conv1.weight)).relu()
    assert h.shape == (2, 12, 6, 6)
    h = F.conv2d(h, block.conv2.weight, padding=1, groups=12)
    h = block.bn3(F.conv2d(block.bn2(h).relu(), block.conv3.weight))
    shortcut = block.shortcut.bn(F.conv2d(x, block.shortcut.conv.weight))
    torch.testing.assert_close(block(x), h + shortcut)
    assert (block(x) < 0).any(), "nothing follows the sum"
    assert isinstance(InvertedResidual(4, 4).shortcut, nn.Identity)
    striding = InvertedResidual(4, 4, 2)
    assert striding.shortcut is None
    assert striding(torch.rand(2, 4, 7, 7)).shape[-1] == 4
