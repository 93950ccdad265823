import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.networks.preact_resnet import PreActResNet


def tiny(**kwargs) -> PreActResNet:
    settings = {"depths": (1, 1, 2), "widths": (4, 4, 6), "strides": (1, 2, 2)}
    return PreActResNet(**{**settings, **kwargs})


@pytest.mark.parametrize("pool", ["avg", "max"])
def test_forward_equals_the_layers_written_out(pool, shaken):
    net = tiny(pool=pool).double().eval()
    shaken(net)
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
