"""OAT: lambda per image, the same in attack and loss; two batch-norms; settings."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.attacks.pgd import PGD
from common.attacks.randomness import ExampleRandom
from common.errors import ConfigurationError
from common.networks.resnet import ResNet
from paper_awnet.module import AWNetClassifier
from paper_awnet.networks import DigitsStudent
from paper_awnet.oat import LAMBDAS, OAT, KnobAccuracy, OATNet, adaptive_losses


def network(knob: float = 0.2) -> OATNet:
    torch.manual_seed(0)
    net = OATNet(DigitsStudent(widths=(4, 6, 8)), knob, hidden=3)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, std=0.5)
    return net


def moved(net: OATNet) -> OATNet:
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.3)
    return net


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    x = torch.rand(40, 1, 8, 8)
    return {
        "x": x,
        "x_adv": (x + 0.1).clamp(0, 1),
        "y": torch.randint(10, (40,)),
        "index": torch.arange(40),
    }


def test_it_begins_as_a_network_with_two_batch_norms() -> None:
    static = ResNet((1, 1), (4, 6), (1, 2), in_channels=1).eval()
    x = torch.rand(3, 1, 8, 8)
    expected = static(x)
    net = OATNet(static, 0.3).eval()
    for lam in LAMBDAS:
        torch.testing.assert_close(net.at(x, torch.full((3,), lam)), expected)


def test_each_image_has_its_own_lambda_and_the_knob_sets_that_of_deployment() -> None:
    net, x = moved(network(0.4)).eval(), torch.rand(3, 1, 8, 8)
    lam = torch.tensor([0.0, 0.4, 1.0])
    found = net.at(x, lam)
    for i in range(3):
        torch.testing.assert_close(found[i : i + 1], net.at(x[i : i + 1], lam[i : i + 1]))
    torch.testing.assert_close(net(x)[1], found[1])
    assert not torch.allclose(net(x)[0], found[0])
    assert net.route.condition is None


def test_drawn_by_image_and_epoch(batch) -> None:
    objective = OAT()
    first = objective.drawn(batch["index"])
    assert torch.equal(first, objective.drawn(batch["index"]))
    assert torch.equal(first[5:9], objective.drawn(batch["index"][5:9]))
    assert {round(v, 1) for v in first.tolist()} == set(LAMBDAS)
    objective.set_epoch(1)
    assert not torch.equal(first, objective.drawn(batch["index"]))


def test_the_loss(batch) -> None:
    net, objective = moved(network()), OAT([0.0, 0.4, 1.0])
    lam, y = objective.drawn(batch["index"]), batch["y"]
    types = torch.arange(2).repeat_interleave(40)
    out = net.at(torch.cat([batch["x"], batch["x_adv"]]), torch.cat([lam, lam]), types)
    clean = F.cross_entropy(out[:40], y, reduction="none")
    adv = F.cross_entropy(out[40:], y, reduction="none")
    expected = ((1 - lam) * clean + lam * adv).mean()
    torch.testing.assert_close(objective.outer(net, batch), expected)
    net.eval()
    found = objective.inner(net, batch)(batch["x"])
    expected = F.cross_entropy(net.at(batch["x"], lam), y, reduction="none")
    torch.testing.assert_close(found, expected)


def test_accuracy_at_every_lambda_and_attacks_at_others(batch) -> None:
    model = AWNetClassifier(moved(network()), OAT(), torch.optim.SGD).eval()
    random = ExampleRandom(0, 0, batch["index"])
    found = KnobAccuracy(PGD(0.1, 0.05, 2))(model, batch, random)
    assert len(found) == 2 * len(LAMBDAS)
    right = model.net.at(batch["x"], torch.full((40,), 0.3)).argmax(1) == batch["y"]
    assert torch.equal(found["knob_0.3_clean"], right.float())
    values = [adaptive_losses()[f"ce_knob_{v:g}"](model, batch)(batch["x"]) for v in (0.0, 1.0)]
    assert not torch.allclose(*values)


def test_refusals(batch) -> None:
    with pytest.raises(ConfigurationError, match=r"lambda in \[0, 1\], got 1.5"):
        network(1.5)
    with pytest.raises(ConfigurationError, match=r"numbers in \[0, 1\], got \[2.0\]"):
        OAT([2.0])
    with pytest.raises(ConfigurationError, match=r"OAT trains a paper_awnet.oat.OATNet"):
        OAT().outer(DigitsStudent(), batch)
    with pytest.raises(ConfigurationError, match="needs types beside lambda"):
        network()(batch["x"])
