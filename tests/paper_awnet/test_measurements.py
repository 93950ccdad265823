"""Routing, forced accuracies, signals and smoothness, on cases with known answers."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.attacks.pgd import PGD
from common.attacks.randomness import ExampleRandom
from paper_awnet.measurements import (
    Routing,
    auroc,
    forced_accuracies,
    routing,
    signal_summary,
    smoothness,
)
from paper_awnet.method import Router
from paper_awnet.module import AWNetClassifier
from paper_awnet.networks import AWNet, DigitsStudent
from paper_awnet.objectives import HybridCE


@pytest.fixture
def model() -> AWNetClassifier:
    torch.manual_seed(0)
    router = partial(Router, widths=(4, 6, 8), type_hidden=5, init="normal")
    net = AWNet(DigitsStudent(widths=(4, 6, 8)), router)
    return AWNetClassifier(net, HybridCE(), torch.optim.SGD).eval()


def test_auroc() -> None:
    low, high = torch.tensor([0.1, 0.2, 0.4]), torch.tensor([0.3, 0.4])
    pairs = [1.0 if h > v else 0.5 if h == v else 0.0 for h in high for v in low]
    assert auroc(low, high) == pytest.approx(sum(pairs) / len(pairs))
    assert auroc(low, low + 1) == 1.0
    assert auroc(low, low) == 0.5


def test_routing_of_each_kind(model) -> None:
    images = {"clean": torch.rand(20, 1, 8, 8), "pgd": torch.rand(20, 1, 8, 8).round()}
    found = routing(model.net, images)
    for name, x in images.items():
        p = model.net.outputs(x).p[:, 1]
        assert torch.equal(found[name]["p_adv"], p)
        is_adv = (p > 0.5).float().mean().item()
        expected = is_adv if name == "pgd" else 1 - is_adv
        assert found[name]["type_acc"] == pytest.approx(expected)
    assert "auroc" not in found["clean"]
    assert 0 <= found["pgd"]["auroc"] <= 1


def test_forced_accuracies(model) -> None:
    nn.init.normal_(model.net.arch.stem.bn.adv.bias)
    x = torch.rand(30, 1, 8, 8)
    y = model.net.outputs(x, p=torch.tensor([0.0, 1.0])).logits.argmax(1)
    found = forced_accuracies(model.net, {"clean": x}, y)["clean"]
    assert found["adv"] == 1.0
    other = model.net.outputs(x, p=torch.tensor([1.0, 0.0])).logits.argmax(1)
    assert found["clean"] == pytest.approx((other == y).float().mean().item())
    assert found["soft"] == pytest.approx((model(x).argmax(1) == y).float().mean().item())


def test_signals_by_type(model) -> None:
    a, b = torch.rand(6, 1, 8, 8), torch.rand(4, 1, 8, 8)
    found = signal_summary(model.net, a, b)
    assert [len(block["mean_clean"]) for block in found] == [8, 12, 16]
    one, other = (model.net.outputs(x).signals[1] for x in (a, b))
    torch.testing.assert_close(found[1]["mean_adv"], other.mean(0).detach())
    expected = (other.mean(0) - one.mean(0)).abs().mean().item()
    assert found[1]["shift"] == pytest.approx(expected)
    assert signal_summary(model.net, a, a)[0]["shift"] == 0.0


def test_a_linear_models_distance_to_the_boundary_is_exact() -> None:
    """Margin over the l1 norm of its gradient."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    x = torch.full((5, 1, 4, 4), 0.5) + 0.01 * torch.randn(5, 1, 4, 4)
    y = net(x).argmax(1)
    found = smoothness(net, x, y, 0.01)
    w = net[1].weight
    normal = (w[0] - w[1]).abs().sum()
    gap = (net(x)[:, 0] - net(x)[:, 1]).abs()
    torch.testing.assert_close(found["reach"], (gap / normal).detach())
    # Convex in the image, so a real step gains at least its first order (invariant 13).
    assert (found["rise"] >= found["predicted"] - 1e-6).all()
    assert (found["predicted"] > 0).all()


def test_adversarial_training_of_a_linear_model_charges_the_l1_norm() -> None:
    """Invariant 13: the loss at the FGSM image is l(margin - eps |w|_1), exactly."""
    w, b = torch.randn(16, dtype=torch.float64), 0.3
    x = torch.randn(7, 16, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([1.0, -1, 1, 1, -1, -1, 1], dtype=torch.float64)
    for loss in (lambda m: F.softplus(-m), lambda m: (-m).exp(), lambda m: F.relu(1 - m)):
        (gradient,) = torch.autograd.grad(loss(y * (x @ w + b)).sum(), x)
        at = loss(y * ((x + 0.1 * gradient.sign()) @ w + b))
        expected = loss(y * (x @ w + b) - 0.1 * w.abs().sum())
        moved = gradient.abs().sum(1) > 0  # the hinge is flat where the margin is beyond 1
        torch.testing.assert_close(at[moved], expected[moved])
        first = loss(y * (x @ w + b)) + 0.1 * gradient.abs().sum(1)
        assert (expected >= first - 1e-9).all()


def test_the_measure_of_routing(model) -> None:
    batch = {
        "x": torch.rand(10, 1, 8, 8),
        "y": torch.randint(10, (10,)),
        "index": torch.arange(10),
    }
    random = ExampleRandom(0, 0, batch["index"])
    found = Routing(PGD(0.3, 0.1, 3))(model, batch, random)
    p = model.net.outputs(batch["x"]).p
    assert torch.equal(found["type_clean"], (p[:, 0] > 0.5).float())
    assert (found["omega_shift"] > 0).all()
    still = Routing(PGD(0.0, 0.0, 1, start="zero"))(model, batch, random)
    assert not still["omega_shift"].any()
    assert torch.equal(still["type_adv"], 1 - still["type_clean"])
