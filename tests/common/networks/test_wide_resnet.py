import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.errors import ConfigurationError
from common.networks.wide_resnet import SamePaddingBlock, WideBlock, WideResNet, equal_depths


def tiny(**kwargs) -> WideResNet:
    settings = {"depths": (1, 1, 2), "widths": (4, 4, 6), "stem_width": 4}
    return WideResNet(**{**settings, **kwargs})


@pytest.mark.parametrize(
    ("make", "parameters"),
    [
        (WideResNet, 36_479_194),
        (partial(WideResNet, 34), 46_160_474),
        (partial(WideResNet, 34, 12), 66_457_818),
        (partial(WideResNet, 34, 20), 184_531_674),
        (partial(WideResNet, strides=(1, 1, 2)), 36_479_194),
        (partial(WideResNet, 34, 1), 466_714),
        (partial(WideResNet, 34, widths=(320, 640, 512)), 68_116_698),
        (partial(WideResNet, 34, num_classes=100), 46_218_164),
        # equal widths with a stride: the shortcut is a projection all the same
        (partial(WideResNet, 34, widths=(320, 320, 256)), 23_812_570),
        (partial(WideResNet, depths=(5, 3, 5)), 42_471_514),
    ],
)
def test_parameters_as_published(make, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in make().parameters()) == parameters


def test_buffers_as_published():
    with torch.device("meta"):
        assert sum(b.numel() for b in WideResNet().buffers()) == 17_977


@pytest.mark.parametrize(("strides", "side"), [((1, 2, 2), 8), ((1, 1, 2), 16)])
def test_map_before_the_pool(strides, side):
    with torch.device("meta"):
        net = WideResNet(10, 1, strides=strides)
        assert net.features(torch.rand(2, 3, 32, 32)).shape == (2, 64, side, side)
        assert net(torch.rand(2, 3, 32, 32)).shape == (2, 10)


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


def test_forward_equals_the_layers_written_out():
    torch.manual_seed(0)
    net = tiny().double().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (module.bias, module.running_mean):
                nn.init.uniform_(tensor, -0.3, 0.3)
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


def test_backward_reaches_every_parameter():
    net = tiny()
    net(torch.rand(4, 3, 8, 8)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_block_is_its_three_parts():
    torch.manual_seed(0)
    block, x = WideBlock(4, 6, 2).eval(), torch.randn(2, 4, 8, 8)
    a = block.activate(x)
    assert torch.equal(block(x), block.residual(a) + block.skip(x, a))


def test_compiles_in_one_graph():
    net, x = tiny().eval(), torch.rand(2, 3, 8, 8)
    assert torch.equal(torch.compile(net, fullgraph=True, backend="eager")(x), net(x))


@pytest.mark.parametrize("depth", [4, 3, 29, 33])
def test_refuses_depths_that_do_not_divide(depth):
    with pytest.raises(ConfigurationError, match=rf"depth={depth}"):
        equal_depths(depth)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"depths": (1, 1)}, "one value for each stage"),
        ({"drop_rate": 1.0}, "drop_rate"),
        ({"drop_rates": (0.0, 0.0, -0.1)}, "drop_rate"),
        ({"drop_rates": (0.0, 0.0)}, "drop_rates needs one value for each of the 3 stages, got 2"),
        ({"activations": [nn.ReLU] * 4}, "activations needs one value"),
        ({"stem_width": 0}, "stem_width"),
        ({"num_classes": 0}, "num_classes"),
        ({"pool": "mean"}, "pool must be"),
    ],
)
def test_refuses_settings_that_do_not_fit(kwargs, message):
    with pytest.raises(ConfigurationError, match=message):
        tiny(**kwargs)


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
