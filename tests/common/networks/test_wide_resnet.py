import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.networks.wide_resnet import SamePaddingBlock, WideBlock, WideResNet


def tiny(**kwargs) -> WideResNet:
    settings = {"depths": (1, 1, 2), "widths": (4, 4, 6), "stem_width": 4}
    return WideResNet(**{**settings, **kwargs})


def test_starting_weights():
    torch.manual_seed(0)
    net = WideResNet(10, 4)
    conv = net.stages[2][0].conv2
    assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 256)), rel=0.01)
    shortcut = net.stages[2][0].shortcut  # fan-out of a 1x1 kernel, not of the input
    assert shortcut.weight.std().item() == pytest.approx(math.sqrt(2 / 256), rel=0.02)
    linear = net.head.linear
    assert linear.bias.abs().max() == 0
    assert linear.weight.abs().max() <= 1 / math.sqrt(256)  # PyTorch's default is uniform
    assert linear.weight.std().item() == pytest.approx(1 / math.sqrt(3 * 256), rel=0.05)


def test_forward_equals_the_layers_written_out(shaken):
    torch.manual_seed(0)
    net = tiny().double().eval()
    shaken(net)
    w = net.state_dict()

    def bn_relu(z, name):
        keys = ("running_mean", "running_var", "weight", "bias")
        mean, var, scale, shift = (w[f"{name}.{k}"][None, :, None, None] for k in keys)
        return ((z - mean) / (var + 1e-5).sqrt() * scale + shift).clamp(min=0)

    def block(z, name, stride, shortcut):
        a = bn_relu(z, f"{name}.bn1")
        h = F.conv2d(a, w[f"{name}.conv1.weight"], stride=stride, padding=1)
        h = F.conv2d(bn_relu(h, f"{name}.bn2"), w[f"{name}.conv2.weight"], padding=1)
        if shortcut == "identity":
            return h + z
        source = {"raw": z, "activated": a}[shortcut]
        return h + F.conv2d(source, w[f"{name}.shortcut.weight"], stride=stride)

    x = torch.rand(3, 3, 8, 8, dtype=torch.float64)
    z = F.conv2d(x, w["stem.weight"], padding=1)
    z = block(z, "stages.0.0", 1, "identity")  # 4 -> 4
    z = block(z, "stages.1.0", 2, "raw")  # 4 -> 4 with a stride: projection of the raw input
    z = block(z, "stages.2.0", 2, "activated")  # 4 -> 6
    z = block(z, "stages.2.1", 1, "identity")
    assert torch.allclose(net.features(x), z, atol=1e-12)
    v = bn_relu(z, "head.norm").mean((2, 3))
    logits = v @ w["head.linear.weight"].T + w["head.linear.bias"]
    assert torch.allclose(net(x), logits, atol=1e-12)


def test_stagewise_lists_equal_the_uniform_network():
    torch.manual_seed(0)
    uniform = WideResNet(10, 1).eval()
    listed = WideResNet(depths=[1, 1, 1], widths=[16, 32, 64]).eval()
    listed.load_state_dict(uniform.state_dict())
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(uniform(x), listed(x))


def test_four_stages():
    net = tiny(depths=(1, 1, 1, 1), widths=(4, 4, 6, 8), strides=(1, 2, 2, 1))
    assert net(torch.rand(2, 3, 8, 8)).shape == (2, 10)


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    net, x = tiny(drop_rate=0.5), torch.rand(4, 3, 8, 8)
    assert sum(isinstance(m, nn.Dropout) for m in net.modules()) == 4
    assert not torch.equal(net(x), net(x))
    net.eval()
    assert torch.equal(net(x), net(x))


def test_stages_have_their_own_dropout_and_activation():
    net = tiny(drop_rates=[0.0, 0.2, 0.5], activations=[nn.ReLU, nn.SiLU, nn.Tanh])
    blocks = [stage[0] for stage in net.stages]
    assert [getattr(b.dropout, "p", 0.0) for b in blocks] == [0.0, 0.2, 0.5]
    assert [type(b.act1) for b in blocks] == [nn.ReLU, nn.SiLU, nn.Tanh]
    assert [type(b.act2) for b in blocks] == [nn.ReLU, nn.SiLU, nn.Tanh]
    assert isinstance(net.head.act, nn.ReLU)


def test_maximum_over_the_map():
    net, x = tiny(pool="max").eval(), torch.rand(2, 3, 8, 8)
    v = net.head.act(net.head.norm(net.features(x))).amax((2, 3))
    assert torch.equal(net(x), net.head.linear(v))


def test_block_is_its_three_parts():
    torch.manual_seed(0)
    block, x = WideBlock(4, 6, 2).eval(), torch.randn(2, 4, 8, 8)
    a = block.activate(x)
    assert torch.equal(block(x), block.residual(a) + block.skip(x, a))


def test_same_padding_adds_a_row_below_and_a_column_to_the_right():
    torch.manual_seed(0)
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
