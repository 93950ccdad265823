import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.networks.alexnet import AlexNet


def tiny(**kwargs) -> AlexNet:
    return AlexNet(**{"widths": (4, 6, 8, 6, 5), "hidden": (7, 9), **kwargs})


@pytest.mark.parametrize(
    ("strides", "side"),
    [
        ((2, 2, 2, 2), 2),
        ((1, 2, 2, 2), 4),
        ((1, 1, 2, 2), 7),
        ((1, 1, 1, 2), 15),
        ((1, 1, 1, 1), 29),
    ],
)
def test_map_before_the_pool(strides, side):
    with torch.device("meta"):
        net = AlexNet(strides)
        assert net.features(torch.rand(2, 3, 32, 32)).shape == (2, 256, side, side)
    assert sum(isinstance(m, nn.MaxPool2d) for m in net.modules()) == 3  # a stride of 1 keeps it


def test_smallest_image():
    assert tiny().eval()(torch.rand(2, 3, 15, 15)).shape == (2, 10)
    with pytest.raises(RuntimeError):
        tiny().eval()(torch.rand(2, 3, 14, 14))


@pytest.mark.parametrize("pool", ["avg", "max"])
def test_forward_equals_the_layers_written_out(pool):
    net = tiny(strides=(1, 1, 2, 2), pool=pool).double().eval()
    w = net.state_dict()

    def conv(z, name, padding):
        keys = (f"{name}.conv.weight", f"{name}.conv.bias")
        return F.conv2d(z, *(w[k] for k in keys), padding=padding).clamp(min=0)

    def linear(z, name):
        return z @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    x = torch.rand(3, 3, 16, 16, dtype=torch.float64)
    z = F.max_pool2d(conv(x, "stages.0.0", 2), 2, 1)
    z = F.max_pool2d(conv(z, "stages.1.0", 2), 2, 2)
    for i in range(3):
        z = conv(z, f"stages.2.{i}", 1)
    z = F.max_pool2d(z, 2, 2)
    assert torch.allclose(net.features(x), z, atol=1e-12)
    h = z.mean((2, 3)) if pool == "avg" else z.amax((2, 3))
    for i in range(2):
        h = linear(h, f"head.hidden{i}.linear").clamp(min=0)
    assert torch.allclose(net(x), linear(h, "head.linear"), atol=1e-12)


def test_dropout_stands_before_the_hidden_layers_only():
    kinds = [type(m) for m in tiny().head.modules() if not list(m.children())]
    hidden = [nn.Dropout, nn.Linear, nn.ReLU]
    assert kinds == [nn.AdaptiveAvgPool2d, nn.Flatten, *hidden, *hidden, nn.Linear]
