"""VGG and AlexNet: layers, configurations, starting weights."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.networks.alexnet import AlexNet
from common.networks.vgg import VGG, kaiming, stages_of

M = "M"
vgg = partial(VGG, depths=(1, 2), widths=(4, 6), strides=(2, 2))
alexnet = partial(AlexNet, widths=(4, 6, 8, 6, 5), hidden=(7, 9))


def test_vgg_equals_its_layers_written_out(written):
    net = vgg(hidden=(5,))
    w = written(net)

    def layer(z, name):
        return w.bn(w.conv(z, f"{name}.conv"), f"{name}.bn").relu()

    x = torch.rand(3, 3, 8, 8, dtype=torch.float64)
    z = F.max_pool2d(layer(x, "stages.0.0"), 2)
    z = F.max_pool2d(layer(layer(z, "stages.1.0"), "stages.1.1"), 2)
    assert torch.allclose(net.features(x), z, atol=1e-12)
    h = w.linear(z.mean((2, 3)), "head.hidden0.linear").relu()
    assert torch.allclose(net(x), w.linear(h, "head.linear"), atol=1e-12)


def test_alexnet_equals_its_layers_written_out(written):
    net = alexnet(strides=(1, 1, 2, 2))
    w = written(net)
    x = torch.rand(3, 3, 16, 16, dtype=torch.float64)
    z = F.max_pool2d(w.conv(x, "stages.0.0.conv").relu(), 2, 1)
    z = F.max_pool2d(w.conv(z, "stages.1.0.conv").relu(), 2, 2)
    for i in range(3):
        z = w.conv(z, f"stages.2.{i}.conv").relu()
    z = F.max_pool2d(z, 2, 2)
    assert torch.allclose(net.features(x), z, atol=1e-12)
    h = z.mean((2, 3))
    for i in range(2):
        h = w.linear(h, f"head.hidden{i}.linear").relu()
    assert torch.allclose(net(x), w.linear(h, "head.linear"), atol=1e-12)
    kinds = [type(m) for m in net.head.modules() if not list(m.children())]
    hidden = [nn.Dropout, nn.Linear, nn.ReLU]  # dropout stands before the hidden layers only
    assert kinds == [nn.AdaptiveAvgPool2d, nn.Flatten, *hidden, *hidden, nn.Linear]


def test_a_config_and_the_three_lists_make_the_same_network():
    listed, written = vgg(), VGG(config=[4, M, 6, 6, M])
    written.load_state_dict(listed.state_dict())
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(listed.eval()(x), written.eval()(x))
    assert stages_of([4, M, 6, 8]) == ([[4], [6, 8]], [2, 1])  # it may end without a pool
    assert VGG(config=[4, M, 6, 8]).widths == (4, 8)


def test_starting_weights_of_the_kaiming_kind():
    net = VGG(config=[64, M, 128], hidden=(256,), init=kaiming)
    conv, linear = net.stages[1][0].conv, net.head.hidden0.linear
    assert conv.weight.std().item() == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.02)
    assert linear.weight.std().item() == pytest.approx(0.01, rel=0.02)
    biases = [m.bias for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert all(bias.abs().max() == 0 for bias in biases)
