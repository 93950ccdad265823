"""Targets in MALT's order, and targeted APGD that follows it."""

import pytest
import torch
from torch import Tensor, nn

from common.attacks.autoattack import AutoAttack
from common.attacks.malt import malt_targets


@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2), ("l1", torch.inf)])
def test_targets_of_a_linear_network_are_its_nearest_boundaries(norm, dual) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(12, 8, generator=generator), torch.rand(20, 8, generator=generator)
    scores = x @ weight.T
    y = scores.argmax(dim=1)
    found = malt_targets(lambda x: x @ weight.T, x, y, 5, norm)
    for i, label in enumerate(y.tolist()):
        distance = {
            j: ((scores[i, label] - scores[i, j]) / (weight[j] - weight[label]).norm(dual)).item()
            for j in range(12)
            if j != label
        }
        assert found[i].tolist() == sorted(distance, key=distance.__getitem__)[:5]


def test_a_class_without_a_gradient_comes_last() -> None:
    class Flat(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            gap = 0.01 + 0 * x[:, 0]
            return torch.stack([x[:, 0], x[:, 1], x[:, 0] - gap, x[:, 3]], dim=1)

    x = torch.tensor([[0.9, 0.1, 0.0, 0.2]])
    assert malt_targets(Flat(), x, torch.tensor([0]), 3, "linf").tolist() == [[3, 1, 2]]


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.05), ("l2", 0.25), ("l1", 1.2)])
@pytest.mark.parametrize("classes", [2, 3, 6])
def test_apgd_follows_the_order_with_any_number_of_classes(norm, eps, classes) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, classes)).eval()
    x = torch.rand(30, 1, 6, 6)
    y = net(x).argmax(dim=1)
    attack = AutoAttack(eps, norm, version="custom", attacks=["apgd-malt"], steps=20)
    x_adv, is_right = attack.step("apgd-malt", net, x, y)
    assert 0 < int(is_right.sum()) < 30
    assert torch.equal(net(x_adv).argmax(dim=1) == y, is_right)
    order = {"linf": torch.inf, "l2": 2, "l1": 1}[norm]
    assert (x_adv - x).flatten(1).norm(order, dim=1).max() <= eps * (1 + 1e-5)
    # A linear network is robust exactly where its nearest boundary is farther than eps.
    weight, dual = net[1].weight, {"linf": 1, "l2": 2, "l1": torch.inf}[norm]
    gaps = net(x).gather(1, y.unsqueeze(1)) - net(x)
    slopes = (weight.unsqueeze(0) - weight[y].unsqueeze(1)).norm(dual, dim=2)
    distance = torch.where(slopes > 0, gaps / slopes.clamp_min(1e-9), torch.inf).amin(dim=1)
    assert is_right[distance > eps].all()
    missed = is_right & (distance < 0.7 * eps)  # the box keeps some images from the boundary
    assert int(missed.sum()) <= 3
