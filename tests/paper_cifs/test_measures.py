"""Measures of channels against slow rewrites, and what recording them leaves alone."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.classifier import RobustClassifier
from common.objectives import AT
from paper_cifs import measures
from paper_cifs.measures import (
    Channels,
    Measurement,
    class_means,
    correlation,
    final_linear,
    measure,
    record,
)
from paper_cifs.method import CAS, global_average, relevance_by_autograd

K, EPS = 3, 0.1
NAMES = ("zero", "one", "two")

# ---------------------------------------------------------------------------------------- numbers


def test_class_means_are_means_over_the_images_of_a_class():
    feature, y = torch.randn(20, 5), torch.randint(K, (20,))
    slow = [feature[[i for i in range(20) if y[i] == c]].numpy().mean(axis=0) for c in range(K)]
    assert np.allclose(class_means(feature, y, K), slow, atol=1e-6)


def test_class_means_name_a_class_without_images():
    with pytest.raises(ValueError, match="class 1"):
        class_means(torch.randn(4, 2), torch.tensor([0, 0, 2, 2]), K)


def test_correlation_agrees_with_numpy():
    a, b = torch.randn(4, 9), torch.randn(4, 9)
    slow = [np.corrcoef(a[i].numpy(), b[i].numpy())[0, 1] for i in range(4)]
    assert np.allclose(correlation(a, b), slow, atol=1e-6)
    assert torch.isnan(correlation(torch.ones(9), b[0]))


def test_numbers_agree_with_a_slow_rewrite(random_channels):
    channels = random_channels()
    numbers = channels.numbers()
    for c in range(K):
        nat, adv, w = (
            t[c].tolist() for t in (channels.natural, channels.adversarial, channels.relevance)
        )
        dot = sum(a * b for a, b in zip(nat, adv, strict=True))
        lengths = math.sqrt(sum(a * a for a in nat)) * math.sqrt(sum(b * b for b in adv))
        lowest = sorted(range(16), key=lambda i: w[i])[:4]
        expected = {
            "cosine": dot / lengths,
            "over_activation": sum(adv[i] - nat[i] for i in lowest) / sum(nat),
            "alignment": np.corrcoef(nat, w)[0, 1],
            "negative_share_natural": sum(a for a, v in zip(nat, w, strict=True) if v < 0)
            / sum(nat),
            "negative_share_adversarial": sum(a for a, v in zip(adv, w, strict=True) if v < 0)
            / sum(adv),
        }
        assert set(numbers) == set(expected)
        for name, value in expected.items():
            assert float(numbers[name][c]) == pytest.approx(value, abs=1e-9), name


def test_an_attack_that_changes_nothing(random_channels):
    channels = random_channels()
    same = Channels(channels.natural, channels.natural, channels.relevance)
    assert torch.allclose(same.cosine(), torch.ones(K, dtype=torch.float64))
    assert torch.equal(same.over_activation(), torch.zeros(K, dtype=torch.float64))
    numbers = same.numbers()
    assert torch.equal(numbers["negative_share_natural"], numbers["negative_share_adversarial"])


def test_over_activation_looks_at_the_lowest_quarter_only():
    relevance = torch.tensor([[3.0, -1.0, 2.0, -5.0, 1.0, 0.0, 4.0, -3.0]])
    natural = torch.ones(1, 8)
    for channel in range(8):
        adversarial = natural.clone()
        adversarial[0, channel] += 2
        found = float(Channels(natural, adversarial, relevance).over_activation())
        assert found == pytest.approx(0.25 if channel in (3, 7) else 0.0)


def test_alignment_and_shares_of_planted_channels():
    relevance = torch.tensor([[2.0, 1.0, -1.0, -2.0]])
    aligned = Channels(relevance + 3, torch.tensor([[0.0, 0.0, 1.0, 5.0]]), relevance)
    assert float(aligned.alignment()) == pytest.approx(1.0)
    assert float(aligned.numbers()["negative_share_natural"]) == pytest.approx(3 / 12)
    assert float(aligned.numbers()["negative_share_adversarial"]) == 1.0


# ------------------------------------------------------------------------------------- recordings


@pytest.mark.parametrize("make", ["plain_network", "cifs_network"])
def test_the_penultimate_feature_gives_the_logits(make, request, images):
    net, (x, y) = request.getfixturevalue(make)(), images()
    found, linear = record(net, x, y), final_linear(net)
    assert linear is net.head.linear
    assert found.features["penultimate"].shape == (12, 8)
    logits = found.features["penultimate"] @ linear.weight.T + linear.bias
    assert torch.allclose(found.logits, logits, atol=1e-6)


def test_recordings_hold_both_sides_of_each_mask_and_its_relevance(cifs_network, images):
    net, (x, y) = cifs_network(), images()
    found = record(net, x, y)
    # A slow rewrite of the network's forward pass, with relevance by its definition.
    z = net.stem(net.normalize(x))
    for s, position in enumerate(("stages_0_0", "stages_1_0"), start=1):
        z = net.stages[s - 1][0](z)
        module = net.selections[position]
        p = module.probe(z)
        g = relevance_by_autograd(module.probe, z.detach(), p.topk(2).indices).sum(1)
        by_class = relevance_by_autograd(module.probe, z.detach(), y[:, None])[:, 0]
        assert torch.allclose(found.features[f"module{s}_unmasked"], global_average(z), atol=1e-6)
        z = z * torch.softmax(g, dim=1)[:, :, None, None]
        assert torch.allclose(found.features[f"module{s}_masked"], global_average(z), atol=1e-6)
        assert torch.allclose(found.relevance[f"module{s}"], g, atol=1e-5)
        assert torch.allclose(found.relevance[f"module{s}_by_class"], by_class, atol=1e-5)
    linear = net.selections["stages_1_0"].probe.output
    assert torch.equal(found.relevance["module2_by_class"], linear.weight[y])
    assert torch.allclose(found.features["module2_masked"], found.features["penultimate"])


def test_recording_reads_labels_for_the_relevance_alone(cifs_network, images):
    net, (x, y) = cifs_network(), images()
    first, second = record(net, x, y), record(net.train(), x, (y + 1) % K)
    assert torch.equal(first.logits, second.logits)
    assert torch.equal(first.relevance["module2"], second.relevance["module2"])
    assert not torch.equal(
        first.relevance["module2_by_class"], second.relevance["module2_by_class"]
    )


def test_recording_leaves_nothing_behind(cifs_network, images):
    net, (x, y) = cifs_network(), images()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    record(net, x, y)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert not any(module._forward_hooks for module in net.modules())
    with pytest.raises(ValueError, match="broken"):
        record(_Broken(net), x, y)
    assert not any(module._forward_hooks for module in net.modules())


class _Broken(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.inside, self.head = net, net.head

    def forward(self, x):
        raise ValueError("broken")


# ----------------------------------------------------------------------------------- measurements


def slow_pgd20(net, x, y, eps):
    x_adv = x.clone()
    for _ in range(20):
        x_adv.requires_grad_()
        output = net(x_adv)
        f, probes = output if isinstance(output, tuple) else (output, [])
        loss = F.cross_entropy(f, y, reduction="sum")
        for p in probes:
            loss = loss + 2.0 / len(probes) * F.cross_entropy(p, y, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, x_adv)
        x_adv = x_adv.detach() + eps / 10 * gradient.sign()
        x_adv = torch.min(torch.max(x_adv, x - eps), x + eps).clamp(0, 1)
    return x_adv


@pytest.mark.parametrize("make", ["plain_network", "cifs_network"])
def test_measurements_are_of_images_attacked_with_pgd20(make, request, images):
    net, (x, y) = request.getfixturevalue(make)(), images()
    x_adv = slow_pgd20(net, x, y, EPS)
    nat, adv = record(net, x, y), record(net, x_adv, y)
    found = measure(net, x, y, K, EPS, batch_size=5)
    for name in nat.features:
        channels = found.channels[name]
        assert torch.allclose(channels.natural, class_means(nat.features[name], y, K), atol=1e-5)
        assert torch.allclose(
            channels.adversarial, class_means(adv.features[name], y, K), atol=1e-4
        )
    is_clean, is_robust = ((part.logits.argmax(1) == y).double() for part in (nat, adv))
    for c in range(K):
        assert float(found.clean[c]) == pytest.approx(float(is_clean[y == c].mean()))
        both = (is_clean * is_robust)[y == c].mean()
        assert float(found.robust[c]) == pytest.approx(float(both))


def test_an_image_that_was_wrong_before_the_attack_is_not_robust(
    monkeypatch, plain_network, images
):
    y = torch.tensor([0, 0, 1, 1, 2, 2])
    predicted = iter([torch.tensor([0, 1, 1, 2, 2, 2]), torch.tensor([0, 0, 0, 2, 2, 1])])

    def recording(*_):
        logits = F.one_hot(next(predicted), K).float()
        return measures.Recording(logits, {"penultimate": torch.ones(6, 8)}, {})

    monkeypatch.setattr(measures, "record", recording)
    found = measure(plain_network(), images(6)[0], y, K, EPS)
    assert found.clean.tolist() == [0.5, 0.5, 1.0]
    assert found.robust.tolist() == [0.5, 0.0, 0.5]


def test_relevances_of_a_measurement(cifs_network, images):
    net, (x, y) = cifs_network(), images()
    nat, found = record(net, x, y), measure(net, x, y, K, EPS).channels
    assert set(found) == {
        "penultimate",
        *(f"module{s}_{side}" for s in (1, 2) for side in ("unmasked", "masked")),
        *(f"module{s}_{side}_by_class" for s in (1, 2) for side in ("unmasked", "masked")),
    }
    assert torch.equal(found["penultimate"].relevance, net.head.linear.weight.double())
    for s in (1, 2):
        g = class_means(nat.relevance[f"module{s}"], y, K)
        for side in ("unmasked", "masked"):
            assert torch.allclose(found[f"module{s}_{side}"].relevance, g, atol=1e-6)
            by_class = found[f"module{s}_{side}_by_class"]
            assert torch.equal(by_class.natural, found[f"module{s}_{side}"].natural)
    weight = net.selections["stages_1_0"].probe.output.weight
    assert torch.allclose(found["module2_masked_by_class"].relevance, weight.double())


def test_without_a_radius_nothing_changes(cifs_network, images):
    found = measure(cifs_network(), *images(), K, 0.0)
    assert torch.equal(found.clean, found.robust)
    for channels in found.channels.values():
        assert torch.allclose(channels.cosine(), torch.ones(K, dtype=torch.float64))
        assert torch.equal(channels.natural, channels.adversarial)


def test_classifiers_are_measured_as_their_networks_are(plain_network, images):
    net, (x, y) = plain_network(), images()
    classifier = RobustClassifier(net, AT())
    assert torch.equal(
        measure(classifier, x, y, K, EPS).channels["penultimate"].adversarial,
        measure(net, x, y, K, EPS).channels["penultimate"].adversarial,
    )
    assert not any(p.grad is not None for p in net.parameters())


def test_cas_modules_have_no_relevance_to_record(cifs_network, images):
    net = cifs_network(selections={"stages_0_0": CAS, "stages_1_0": CAS})
    assert set(measure(net, *images(), K, EPS).channels) == {"penultimate"}


def test_summaries_are_means_over_classes(cifs_network, images):
    found = measure(cifs_network(), *images(), K, EPS)
    summary = found.summary()
    penultimate = summary["features"]["penultimate"]
    assert float(penultimate["cosine"]) == pytest.approx(
        np.mean(found.channels["penultimate"].cosine().tolist())
    )
    assert torch.equal(penultimate["per_class"]["cosine"], found.channels["penultimate"].cosine())


def test_the_link_between_robustness_and_alignment():
    relevance = torch.tensor([[1.0, 0.0, -1.0]] * K)
    natural = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [2.0, 3.0, 2.0]])  # corr 1, -1, 0
    channels = {"penultimate": Channels(natural, natural, relevance)}
    key = "correlation_of_robustness_and_alignment"
    for robust, expected in (([0.9, 0.1, 0.5], 1.0), ([0.2, 0.6, 0.4], -1.0)):
        summary = Measurement(torch.ones(K), torch.tensor(robust), channels).summary()
        assert float(summary[key]) == pytest.approx(expected, abs=1e-6)
