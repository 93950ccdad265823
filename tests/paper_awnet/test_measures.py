"""Numbers of trained networks, on cases with known answers and against numpy."""

import numpy as np
import pytest
import torch
from torch import nn

from common.attacks.pgd import PGD
from common.attacks.randomness import ExampleRandom
from common.networks.preact_resnet import PreActResNet
from common.networks.resnet import ResNet
from paper_awnet.measures import (
    KnobAccuracy,
    Routing,
    distance,
    distances,
    filters,
    forced_accuracies,
    histograms,
    routing,
    shape_of,
    signal_summary,
    smoothness,
)
from paper_awnet.module import AWNetClassifier
from paper_awnet.networks import DigitsStudent, OATNet
from paper_awnet.objectives import LAMBDAS, OAT, HybridCE

IMAGE = torch.rand(1, 8, 8)


@pytest.fixture
def model(student) -> AWNetClassifier:
    return AWNetClassifier(student(), HybridCE(), torch.optim.SGD).eval()


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
    low, high = found["clean"]["p_adv"], found["pgd"]["p_adv"]
    share = (high[:, None] > low).float().mean().item()
    assert found["pgd"]["auroc"] == pytest.approx(share)


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


def test_the_measure_of_routing(model, digits) -> None:
    random = ExampleRandom(0, 0, digits["index"])
    found = Routing(PGD(0.3, 0.1, 3))(model, digits, random)
    p = model.net.outputs(digits["x"]).p
    assert torch.equal(found["type_clean"], (p[:, 0] > 0.5).float())
    assert (found["omega_shift"] > 0).all()
    still = Routing(PGD(0.0, 0.0, 1, start="zero"))(model, digits, random)
    assert not still["omega_shift"].any()
    assert torch.equal(still["type_adv"], 1 - still["type_clean"])


def test_accuracy_at_every_lambda(digits) -> None:
    net = OATNet(DigitsStudent(widths=(4, 6, 8)), hidden=3)
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.3)
    model = AWNetClassifier(net, OAT(), torch.optim.SGD).eval()
    random = ExampleRandom(0, 0, digits["index"])
    found = KnobAccuracy(PGD(0.1, 0.05, 2))(model, digits, random)
    assert set(found) == {f"knob_{v:g}_{kind}" for v in LAMBDAS for kind in ("clean", "pgd")}
    right = net.at(digits["x"], 0.3).argmax(1) == digits["y"]
    assert torch.equal(found["knob_0.3_clean"], right.float())


def test_histograms_count_everything_in_common_bins() -> None:
    a, b = torch.randn(4000), 3 * torch.randn(4000)
    p, q, bound = histograms(a, b)
    assert bound == pytest.approx(np.quantile(b.abs().numpy(), 0.999), rel=1e-5)
    for values, found in ((a, p), (b, q)):
        assert found.shape == (101,)
        assert found.sum().item() == pytest.approx(1.0)
        counts, _ = np.histogram(values.clamp(-bound, bound).numpy(), 101, (-bound, bound))
        assert np.abs(found.numpy() * 4000 - counts).max() <= 1  # a value on an edge
    assert min(q[0], q[-1]) > 0
    w = torch.cat([a, torch.zeros(50)])
    p, q, _ = histograms(w, -w)
    assert torch.equal(p, q.flip(0)), "negated weights have the mirrored histogram"
    p, q, bound = histograms(torch.zeros(5), torch.zeros(5), bins=3)
    assert (p.tolist(), q.tolist(), bound) == ([0, 1, 0], [0, 1, 0], 1.0)
    with pytest.raises(ValueError, match=r"odd.*40"):
        histograms(w, w, bins=40)


@pytest.mark.parametrize("tiny", [1e-12, -1e-12, 1e-38, -1e-38])
@pytest.mark.parametrize("scale", [1.0, 0.1, 1 / 3, 7e-3, 123.4])
def test_pruned_weights_are_where_tiny_ones_are(tiny: float, scale: float) -> None:
    """Half of the weights are 0 in one network and almost 0 in the other: the same network."""
    rest = torch.linspace(-1, 1, 200) * scale
    pruned, almost = (torch.cat([rest, torch.full((200,), value)]) for value in (0.0, tiny))
    p, q, _ = histograms(pruned, almost)
    assert torch.equal(p, q)
    assert p[50] >= 0.5
    assert distance(pruned, almost)["js"] == 0.0


def test_distances_of_weights() -> None:
    a = torch.randn(300, requires_grad=True)
    p, q, _ = histograms(a, a * 2 + 1)
    middle = (p + q) / 2
    slow = sum(torch.xlogy(h, h / middle).nansum() for h in (p, q)) / 2
    assert distance(a, a * 2 + 1)["js"] == pytest.approx(slow.item())
    assert distance(a, a + 0.5)["wasserstein"] == pytest.approx(0.5, abs=1e-6)
    assert distance(torch.zeros(4), torch.ones(4))["js"] == pytest.approx(np.log(2))


def test_shapes() -> None:
    w = torch.randn(6, 3, 3, 3) ** 3
    found = shape_of(w)
    flat = w.flatten().numpy().astype(float)
    z = (flat - flat.mean()) / flat.std()
    assert found["kurtosis"] == pytest.approx((z**4).mean() - 3, rel=1e-5)
    assert found["std"] == pytest.approx(flat.std(), rel=1e-5)
    assert found["mean_abs"] == pytest.approx(np.abs(flat).mean(), rel=1e-5)
    assert found["sparsity"] == pytest.approx((np.abs(flat) < 0.01 * np.abs(flat).max()).mean())
    assert found["l1"] == pytest.approx(np.abs(w.numpy()).reshape(6, -1).sum(1).mean(), rel=1e-5)
    assert found["l2"] == pytest.approx(np.linalg.norm(w.numpy().reshape(6, -1), axis=1).mean())


def test_every_convolution_is_folded_which_takes_the_free_scale_away(shake) -> None:
    net = shake(ResNet((1, 1), (4, 6), (1, 2), in_channels=1)).eval()
    before = filters(net, IMAGE)
    inner = {f"stages.{i}.0.conv{j}" for i in (0, 1) for j in (1, 2)}
    assert set(before) == {"stem.conv", *inner, "stages.1.0.shortcut.conv"}
    block = net.stages[1][0]
    gain = block.shortcut.bn.weight / (block.shortcut.bn.running_var + 1e-5).sqrt()
    folded = block.shortcut.conv.weight * gain[:, None, None, None]
    torch.testing.assert_close(before["stages.1.0.shortcut.conv"].folded, folded.detach())
    with torch.no_grad():  # the same function with another raw scale
        block.conv1.weight.mul_(7.0)
        block.bn1.running_mean.mul_(7.0)
        block.bn1.running_var.mul_(49.0)
    one, other = before["stages.1.0.conv1"], filters(net, IMAGE)["stages.1.0.conv1"]
    torch.testing.assert_close(one.folded, other.folded, rtol=1e-4, atol=1e-6)
    assert distance(one.raw, other.raw)["wasserstein"] > 0.1


def test_convolutions_before_a_sum_are_not_folded() -> None:
    found = filters(PreActResNet((1, 1), (4, 6), (1, 2), in_channels=1).eval(), IMAGE)
    assert found["stages.0.0.conv1"].folded is not None
    assert found["stages.0.0.conv2"].folded is None
    assert distances(found, found)["stem"] == {"wasserstein": 0.0, "js": 0.0}
    # A first block's batch-norm reads the stem; its shortcut, which does so too, is left aside.
    assert set(distances(found, found)) == {"stem", "stages.0.0.conv1", "stages.1.0.conv1"}


def test_an_awnet_is_folded_with_either_batch_norm_and_scaled_by_mean_signals(student) -> None:
    net = student().eval()
    nn.init.constant_(net.arch.stages[0][0].bn2.adv.weight, 3.0)
    signals = net.outputs(torch.rand(5, 1, 8, 8)).signals
    plain, clean, adv = (
        filters(net, IMAGE, kind, s)
        for kind, s in (("clean", ()), ("clean", signals), ("adv", signals))
    )
    name = "stages.0.0.conv2"
    assert set(plain) == set(filters(DigitsStudent().eval(), IMAGE)), "the router's are left out"
    scaled = plain[name].raw * signals[0][:, 4:].mean(0).detach()[:, None, None, None]
    torch.testing.assert_close(clean[name].raw, scaled)
    norm = net.arch.stages[0][0].bn2.adv
    gain = (3.0 / (norm.running_var + 1e-5).sqrt())[:, None, None, None]
    torch.testing.assert_close(adv[name].folded, scaled * gain)
    assert distances(clean, adv)[name]["wasserstein"] > 0
