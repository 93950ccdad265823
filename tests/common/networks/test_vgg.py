import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.networks.vgg import VGG, VGG11, VGG16, kaiming, stages_of

M = "M"
VGG16_CONFIG = [64, 64, M, 128, 128, M, *[256] * 3, M, *[512] * 3, M, *[512] * 3, M]


def tiny(**kwargs) -> VGG:
    return VGG(**{"depths": (1, 2), "widths": (4, 6), "strides": (2, 2), **kwargs})


@pytest.mark.parametrize(
    ("strides", "side"),
    [
        ((2, 2, 2, 2, 2), 1),
        ((1, 2, 2, 2, 2), 2),
        ((1, 1, 2, 2, 2), 4),
        ((1, 1, 1, 2, 2), 8),
        ((1, 1, 1, 1, 2), 16),
    ],
)
def test_map_before_the_pool(strides, side):
    with torch.device("meta"):
        net = VGG16(strides=strides)
        assert net.features(torch.rand(2, 3, 32, 32)).shape == (2, 512, side, side)
    pools = sum(isinstance(m, nn.MaxPool2d) for m in net.modules())
    assert pools == strides.count(2)  # a stride of 1 leaves the pool out


@pytest.mark.parametrize("side", [1, 7, 8, 13, 33])
def test_any_image_size_survives_five_pools(side):
    net = VGG11(widths=(2, 2, 2, 2, 2)).eval()
    assert net(torch.rand(2, 3, side, side)).shape == (2, 10)


def test_forward_equals_the_layers_written_out(shaken):
    net = tiny(hidden=(5,)).double().eval()
    shaken(net)
    w = net.state_dict()

    def layer(z, name):
        z = F.conv2d(z, w[f"{name}.conv.weight"], w[f"{name}.conv.bias"], padding=1)
        keys = ("running_mean", "running_var", "weight", "bias")
        mean, var, scale, shift = (w[f"{name}.bn.{k}"][None, :, None, None] for k in keys)
        return ((z - mean) / (var + 1e-5).sqrt() * scale + shift).clamp(min=0)

    x = torch.rand(3, 3, 8, 8, dtype=torch.float64)
    z = F.max_pool2d(layer(x, "stages.0.0"), 2)
    z = F.max_pool2d(layer(layer(z, "stages.1.0"), "stages.1.1"), 2)
    assert torch.allclose(net.features(x), z, atol=1e-12)
    h = z.mean((2, 3)) @ w["head.hidden0.linear.weight"].T + w["head.hidden0.linear.bias"]
    logits = h.clamp(min=0) @ w["head.linear.weight"].T + w["head.linear.bias"]
    assert torch.allclose(net(x), logits, atol=1e-12)


def test_a_config_and_the_three_lists_make_the_same_network():
    listed, written = tiny(), VGG(config=[4, M, 6, 6, M])
    written.load_state_dict(listed.state_dict())
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(listed.eval()(x), written.eval()(x))


def test_a_config_may_end_without_a_pool():
    assert stages_of([4, M, 6, 8]) == ([[4], [6, 8]], [2, 1])
    assert VGG(config=[4, M, 6, 8]).widths == (4, 8)


def test_layers_start_from_the_defaults_of_pytorch():
    torch.manual_seed(3)
    net = VGG(config=[4], num_classes=2)
    torch.manual_seed(3)
    conv, linear = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 2)
    assert torch.equal(net.stages[0][0].conv.weight, conv.weight)
    assert torch.equal(net.stages[0][0].conv.bias, conv.bias)
    assert torch.equal(net.head.linear.weight, linear.weight)


def test_starting_weights_of_the_kaiming_kind():
    net = VGG(config=[64, M, 128], hidden=(256,), init=kaiming)
    conv, linear = net.stages[1][0].conv, net.head.hidden0.linear
    assert conv.weight.std().item() == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.02)
    assert linear.weight.std().item() == pytest.approx(0.01, rel=0.02)
    biases = [m.bias for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert all(bias.abs().max() == 0 for bias in biases)


def test_maximum_over_the_map():
    net, x = tiny(pool="max").eval(), torch.rand(2, 3, 8, 8)
    assert torch.equal(net.head[:2](net.features(x)), net.features(x).amax((2, 3)))
