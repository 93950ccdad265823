"""The bound holds, is tight where it can be, and the pieces are those of linear algebra."""

import math

import pytest
import torch
from torch import nn

from common.attacks.pgd import PGD
from common.errors import ConfigurationError
from common.networks.wide_resnet import WideResNet
from paper_robustwrn.measures import batch_norm_gain, lipschitz_of, operator_norm, upper_bound
from paper_robustwrn.method import RobustWideResNet


def test_operator_norm_of_a_convolution_is_that_of_its_matrix() -> None:
    conv = nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=False).double()
    columns = [conv(e.view(1, 2, 5, 5)).flatten() for e in torch.eye(50, dtype=torch.float64)]
    exact = torch.linalg.matrix_norm(torch.stack(columns, dim=1), 2).item()
    assert exact <= operator_norm(conv, (2, 5, 5)) <= exact * 1.001


def test_gain_of_batch_norm_is_its_largest_factor() -> None:
    norm = nn.BatchNorm2d(2)
    norm.running_var = torch.tensor([4.0, 0.25])
    norm.weight.data = torch.tensor([-3.0, 0.5])
    assert batch_norm_gain(norm) == pytest.approx(1.5, rel=1e-4)
    with pytest.raises(ConfigurationError, match="running statistics"):
        batch_norm_gain(nn.BatchNorm2d(2, track_running_stats=False))


@pytest.mark.parametrize(
    "settings",
    [
        {"depths": [1, 1], "widths": [4, 8], "strides": [1, 2]},
        {"depths": [1, 1], "widths": [6, 6], "strides": [1, 2]},  # a shortcut that only strides
        {"depths": [1, 2], "widths": [8, 6], "strides": [2, 1], "mean": [0.4], "std": [0.3]},
    ],
)
def test_no_pair_of_images_is_moved_further_apart_than_the_bound(settings) -> None:
    net = WideResNet(in_channels=1, stem_width=4, **settings).eval()
    for module in net.modules():  # statistics and scales as after training, no two alike
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
            module.weight.data.uniform_(-1.5, 1.5)
            module.bias.data.normal_()
    bound = upper_bound(net, (1, 8, 8))
    total = bound.pop("total")
    assert total == pytest.approx(math.prod(bound.values()))
    x, steps = torch.rand(2, 50, 1, 8, 8)
    with torch.no_grad():
        for scale in (1e-3, 1e-1, 1.0):
            moved = (net(x + scale * steps) - net(x)).norm(dim=1)
            assert (moved / (scale * steps).flatten(1).norm(dim=1)).max() < total


def test_a_bound_that_is_made_too_small_would_be_noticed() -> None:
    """For a network without blocks that bend, the attack comes near the bound."""
    net = WideResNet(
        depths=[1], widths=[4], strides=[1], in_channels=1, stem_width=4, num_classes=2
    ).eval()
    with torch.no_grad():
        net.stages[0][0].conv2.weight.zero_()
        net.stages[0][0].bn1.bias.fill_(100.0)
        net.head.norm.bias.fill_(100.0)

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x)

    x, y = torch.rand(20, 1, 6, 6), torch.arange(20) % 2
    found = lipschitz_of(Classifier(), x, y, PGD(0.5, 0.2, 10, norm="l2"))
    assert found["bound"] == upper_bound(net, (1, 6, 6))["total"]
    assert 0.05 * found["bound"] < found["mean"] <= found["largest"] <= found["bound"]


@pytest.mark.parametrize(
    ("make", "settings"), [(WideResNet, {"activation": nn.SiLU}), (RobustWideResNet, {})]
)
def test_other_networks_are_refused(make, settings) -> None:
    net = make(depths=(1, 1, 1), widths=(1, 1, 1), **settings)
    if not settings:
        net.stem = nn.Sequential(net.stem)
    with pytest.raises(ConfigurationError, match="the bound"):
        upper_bound(net, (3, 32, 32))
