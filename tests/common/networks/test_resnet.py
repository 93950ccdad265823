from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.networks.resnet import (
    BareShortcutBlock,
    BasicBlock,
    DigitsResNet,
    ResNet,
    ResNet10,
    ResNet18,
    kaiming,
)


def tiny(**kwargs) -> ResNet:
    return ResNet(**{"depths": (1, 2), "widths": (4, 6), "strides": (1, 2), **kwargs})


@pytest.mark.parametrize(
    ("net", "shape", "maps"),
    [
        (ResNet18, (3, 32, 32), [32, 32, 16, 8, 4]),
        (partial(ResNet18, strides=(1, 1, 2, 2)), (3, 32, 32), [32, 32, 32, 16, 8]),
        (partial(ResNet10, in_channels=1), (1, 28, 28), [28, 28, 14, 7, 4]),
        (DigitsResNet, (1, 8, 8), [8, 8, 4, 2, 2]),
    ],
)
def test_feature_maps(net, shape, maps):
    with torch.device("meta"):
        net = net()
        z = net.stem(net.normalize(torch.rand(2, *shape)))
        sides = [z.shape[-1]]
        for stage in net.stages:
            z = stage(z)
            sides.append(z.shape[-1])
        assert sides == maps
        assert net.head(z).shape == (2, 10)


def test_forward_equals_the_layers_written_out(shaken):
    torch.manual_seed(0)
    net = shaken(tiny(mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7])).double().eval()
    w = net.state_dict()

    def bn(z, name):
        keys = ("running_mean", "running_var", "weight", "bias")
        mean, var, scale, shift = (w[f"{name}.{k}"][None, :, None, None] for k in keys)
        return (z - mean) / (var + 1e-5).sqrt() * scale + shift

    def block(z, name, stride, projected):
        h = F.conv2d(z, w[f"{name}.conv1.weight"], stride=stride, padding=1)
        h = F.conv2d(bn(h, f"{name}.bn1").clamp(min=0), w[f"{name}.conv2.weight"], padding=1)
        if projected:
            z = bn(
                F.conv2d(z, w[f"{name}.shortcut.conv.weight"], stride=stride),
                f"{name}.shortcut.bn",
            )
        return (bn(h, f"{name}.bn2") + z).clamp(min=0)

    x = torch.rand(3, 3, 8, 8, dtype=torch.float64)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])
    z = (x - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    z = bn(F.conv2d(z, w["stem.conv.weight"], padding=1), "stem.bn").clamp(min=0)
    z = block(z, "stages.0.0", 1, projected=False)
    z = block(z, "stages.1.0", 2, projected=True)
    z = block(z, "stages.1.1", 1, projected=False)
    assert torch.allclose(net.features(x), z, atol=1e-12)
    logits = z.mean((2, 3)) @ w["head.linear.weight"].T + w["head.linear.bias"]
    assert torch.allclose(net(x), logits, atol=1e-12)


def test_strides_that_start_with_one_share_their_weights_but_not_their_function():
    torch.manual_seed(0)
    one, other = tiny(strides=(1, 2)).eval(), tiny(strides=(1, 1)).eval()
    other.load_state_dict(one.state_dict())
    x = torch.rand(2, 3, 8, 8)
    assert not torch.allclose(one(x), other(x), atol=1e-3)


@pytest.mark.parametrize("pool", ["avg", "max"])
def test_pool_of_the_head(pool):
    net, x = tiny(pool=pool).eval(), torch.rand(2, 3, 8, 8)
    z = net.features(x)
    v = z.mean((2, 3)) if pool == "avg" else z.amax((2, 3))
    assert torch.allclose(net(x), net.head.linear(v), atol=1e-6)
    assert net.state_dict().keys() == tiny().state_dict().keys()


def test_starting_weights():
    torch.manual_seed(3)
    default = ResNet(depths=(1,), widths=(64,), strides=(1,))
    torch.manual_seed(3)
    net = ResNet(depths=(1,), widths=(64,), strides=(1,), init=kaiming)
    conv = net.stages[0][0].conv1
    assert conv.weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)
    assert default.stages[0][0].conv1.weight.std().item() < 0.7 * conv.weight.std().item()
    assert torch.equal(net.head.linear.weight, default.head.linear.weight)
    assert net.stages[0][0].bn2.weight.min() == 1  # no branch starts at zero


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

    net = tiny(block=Plain, activation=nn.SiLU)
    assert not any(isinstance(m, nn.ReLU | BasicBlock) for m in net.modules())
    assert sum(isinstance(m, nn.SiLU) for m in net.modules()) == 4
    assert net(torch.rand(2, 3, 8, 8)).shape == (2, 10)
