from functools import partial

import pytest
import torch
import torch.nn.functional as F
from jsonargparse import ArgumentParser
from torch import nn

from common.errors import ConfigurationError
from common.networks.preact_resnet import PreActResNet, PreActResNet18


def tiny(**kwargs) -> PreActResNet:
    settings = {"depths": (1, 1, 2), "widths": (4, 4, 6), "strides": (1, 2, 2)}
    return PreActResNet(**{**settings, **kwargs})


@pytest.mark.parametrize(
    ("make", "parameters"),
    [
        (PreActResNet18, 11_172_170),
        (partial(PreActResNet18, num_classes=100), 11_218_340),
        (partial(PreActResNet18, strides=(1, 1, 2, 2)), 11_172_170),
        (partial(PreActResNet18, strides=(1, 1, 1, 1)), 11_172_170),
    ],
)
def test_parameters_as_published(make, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in make().parameters()) == parameters


@pytest.mark.parametrize(("strides", "side"), [((1, 2, 2, 2), 4), ((1, 1, 2, 2), 8)])
def test_map_before_the_pool(strides, side):
    with torch.device("meta"):
        net = PreActResNet18(strides=strides)
        assert net.features(torch.rand(2, 3, 32, 32)).shape == (2, 512, side, side)
        assert net(torch.rand(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("pool", ["avg", "max"])
def test_forward_equals_the_layers_written_out(pool):
    net = tiny(pool=pool).double().eval()
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

    def block(z, name, stride, projected):
        a = bn_relu(z, f"{name}.bn1")
        h = F.conv2d(a, w[f"{name}.conv1.weight"], stride=stride, padding=1)
        h = F.conv2d(bn_relu(h, f"{name}.bn2"), w[f"{name}.conv2.weight"], padding=1)
        if projected:
            z = F.conv2d(a, w[f"{name}.shortcut.weight"], stride=stride)
        return h + z

    x = torch.rand(3, 3, 8, 8, dtype=torch.float64)
    z = F.conv2d(x, w["stem.weight"], padding=1)
    z = block(z, "stages.0.0", 1, projected=False)
    z = block(z, "stages.1.0", 2, projected=True)  # 4 -> 4 with a stride, of the activated input
    z = block(z, "stages.2.0", 2, projected=True)
    z = block(z, "stages.2.1", 1, projected=False)
    assert torch.allclose(net.features(x), z, atol=1e-12)
    z = bn_relu(z, "head.norm")
    v = z.mean((2, 3)) if pool == "avg" else z.amax((2, 3))
    logits = v @ w["head.linear.weight"].T + w["head.linear.bias"]
    assert torch.allclose(net(x), logits, atol=1e-12)


def test_layers_start_from_the_defaults_of_pytorch():
    torch.manual_seed(3)
    net = tiny()
    torch.manual_seed(3)
    assert torch.equal(net.stem.weight, nn.Conv2d(3, 4, 3, bias=False).weight)


def test_backward_reaches_every_parameter():
    net = tiny()
    net(torch.rand(4, 3, 8, 8)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_compiles_in_one_graph():
    net, x = tiny().eval(), torch.rand(2, 3, 8, 8)
    assert torch.equal(torch.compile(net, fullgraph=True, backend="eager")(x), net(x))


def test_is_made_from_a_configuration_file():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--net", type=nn.Module)
    path = "common.networks.preact_resnet.PreActResNet"
    arguments = {"depths": [1], "widths": [4], "strides": [1], "activation": "torch.nn.SiLU"}
    config = {"class_path": path, "init_args": {**arguments, "pool": "max"}}
    net = parser.instantiate(parser.parse_object({"net": config})).net
    assert isinstance(net.stages[0][0].act2, nn.SiLU)
    assert isinstance(net.head.pool, nn.AdaptiveMaxPool2d)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"depths": (1, 1)}, "one value for each stage"),
        ({"num_classes": 0}, "num_classes"),
        ({"pool": "mean"}, "pool must be one of avg, max, got 'mean'"),
    ],
)
def test_refuses_settings_that_do_not_fit(kwargs, message):
    with pytest.raises(ConfigurationError, match=message):
        tiny(**kwargs)
