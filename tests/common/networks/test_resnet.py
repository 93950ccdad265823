import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from jsonargparse import ArgumentParser
from torch import nn

from common.errors import ConfigurationError
from common.networks.resnet import (
    BareShortcutBlock,
    BasicBlock,
    CifarResNet,
    DigitsResNet,
    ResNet,
    ResNet10,
    ResNet18,
    kaiming,
)


def size(net: nn.Module) -> tuple[int, int]:
    return sum(p.numel() for p in net.parameters()), sum(b.numel() for b in net.buffers())


def tiny(**kwargs) -> ResNet:
    return ResNet(**{"depths": (1, 2), "widths": (4, 6), "strides": (1, 2), **kwargs})


def shake_batchnorms(net: nn.Module) -> nn.Module:
    """Give every batch-norm statistics and weights that matter."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (module.bias, module.running_mean):
                nn.init.uniform_(tensor, -0.3, 0.3)
    return net


@pytest.mark.parametrize(
    ("make", "parameters", "buffers"),
    [
        (ResNet18, 11_173_962, 9_620),
        (partial(ResNet18, num_classes=100), 11_220_132, 9_620),
        (partial(ResNet18, num_classes=200), 11_271_432, 9_620),
        (partial(ResNet18, strides=(1, 1, 2, 2)), 11_173_962, 9_620),
        (partial(ResNet18, strides=(2, 2, 2, 2)), 11_178_186, 9_749),
        (partial(ResNet10, in_channels=1), 4_902_090, 5_772),
    ],
)
def test_sizes_as_published(make, parameters, buffers):
    with torch.device("meta"):
        assert size(make()) == (parameters, buffers)


@pytest.mark.parametrize(
    ("depth", "parameters"),
    [
        (8, 77_850),
        (20, 272_282),
        (32, 466_714),
        (44, 661_146),
        (56, 855_578),
        (110, 1_730_522),
    ],
)
def test_sizes_of_the_three_stage_family(depth, parameters):
    with torch.device("meta"):
        assert size(CifarResNet(depth))[0] == parameters
        assert size(CifarResNet(depth, strides=(1, 1, 2)))[0] == parameters


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


def test_forward_equals_the_layers_written_out():
    torch.manual_seed(0)
    net = shake_batchnorms(tiny(mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7])).double().eval()
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


@pytest.mark.parametrize("depth", [2, 18, 0])
def test_refuses_depths_that_do_not_divide(depth):
    with pytest.raises(ConfigurationError, match=f"depth={depth}"):
        CifarResNet(depth)


def test_backward_reaches_every_parameter():
    net = tiny()
    net(torch.rand(4, 3, 8, 8)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


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


def test_compiles_in_one_graph_copies_and_pickles():
    net = pickle.loads(pickle.dumps(tiny().eval()))
    x = torch.rand(2, 3, 8, 8)
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    with torch.inference_mode():
        assert torch.equal(compiled(x), net(x))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"depths": (1,)}, "one value for each stage"),
        ({"depths": (), "widths": (), "strides": ()}, "one value for each stage"),
        ({"widths": (4, 0)}, "at least 1"),
        ({"strides": (0, 1)}, "at least 1"),
        ({"num_classes": 0}, "num_classes"),
        ({"in_channels": 0}, "in_channels"),
        ({"pool": "mean"}, "pool must be one of avg, max, got 'mean'"),
    ],
)
def test_refuses_settings_that_do_not_fit(kwargs, message):
    with pytest.raises(ConfigurationError, match=message):
        tiny(**kwargs)


def test_yaml_and_command_line_reach_every_setting(tmp_path):
    config = tmp_path / "net.yaml"
    config.write_text(
        "net:\n  class_path: common.networks.resnet.DigitsResNet\n"
        "  init_args: {mean: [0.5], std: [0.25], activation: torch.nn.SiLU,\n"
        "    pool: max, init: common.networks.resnet.kaiming}\n"
    )
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_subclass_arguments(nn.Module, "net")
    net = parser.instantiate(parser.parse_args([f"--config={config}", "--net.num_classes=7"])).net
    assert isinstance(net, DigitsResNet)
    assert isinstance(net.stem.act, nn.SiLU)
    assert isinstance(net.head.pool, nn.AdaptiveMaxPool2d)
    assert net(torch.rand(2, 1, 8, 8)).shape == (2, 7)
