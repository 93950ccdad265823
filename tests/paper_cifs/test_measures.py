"""Measures of channels against slow rewrites, and what recording them leaves alone."""

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
    measure,
    record,
)
from paper_cifs.method import CAS, global_average, joint_logits, relevance_by_autograd

K, EPS = 3, 0.1


def test_class_means_are_means_over_the_images_of_a_class():
    feature, y = torch.randn(20, 5), torch.randint(K, (20,))
    slow = [feature[[i for i in range(20) if y[i] == c]].numpy().mean(axis=0) for c in range(K)]
    assert np.allclose(class_means(feature, y, K), slow, atol=1e-6)
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
            t[c].numpy() for t in (channels.natural, channels.adversarial, channels.relevance)
        )
        lowest = sorted(range(16), key=lambda i: w[i])[:4]
        expected = {
            "cosine": nat @ adv / np.sqrt((nat @ nat) * (adv @ adv)),
            "over_activation": sum(adv[i] - nat[i] for i in lowest) / sum(nat),
            "alignment": np.corrcoef(nat, w)[0, 1],
            "negative_share_natural": sum(nat[w < 0]) / sum(nat),
            "negative_share_adversarial": sum(adv[w < 0]) / sum(adv),
        }
        assert {name: float(value[c]) for name, value in numbers.items()} == pytest.approx(expected)


def test_recordings_hold_both_sides_of_each_mask_and_its_relevance(
    cifs_network, plain_network, images
):
    net, plain, (x, y) = cifs_network(), plain_network(), images()
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if k[:10] != "selections"})
    hooks = [len(module._forward_hooks) for module in net.modules()]
    state = {name: value.clone() for name, value in net.state_dict().items()}
    found = record(net.train(), x, y)  # labels must not reach the masks
    # A slow rewrite of the network's forward pass, with relevance by its definition.
    z, expected = plain.stem(x), {}
    for s, position in enumerate(("stages_0_0", "stages_1_0"), start=1):
        z, probe = plain.stages[s - 1][0](z), net.selections[position].probe
        expected[f"module{s}_unmasked"] = global_average(z)
        g = relevance_by_autograd(probe, z.detach(), probe(z).topk(2).indices).sum(1)
        by_class = relevance_by_autograd(probe, z.detach(), y[:, None])[:, 0]
        z = z * torch.softmax(g, dim=1)[:, :, None, None]
        expected |= {f"module{s}_masked": global_average(z), f"module{s}_relevance": g}
        expected[f"module{s}_by_class"] = by_class
    expected |= {"penultimate": global_average(z), "logits": net.head(z)}
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value.detach(), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert hooks == [len(module._forward_hooks) for module in net.modules()]


def test_a_pass_that_fails_leaves_no_hooks(plain_network, images):
    net = plain_network()
    net.stages[1] = nn.Linear(2, 2)
    with pytest.raises(RuntimeError):
        record(net, *images())
    assert not any(module._forward_hooks for module in net.modules())


def slow_pgd20(net, x, y, eps):
    x_adv = x.clone()
    for _ in range(20):
        x_adv.requires_grad_()
        f, probes = joint_logits(net, x_adv)
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
    nat, adv = record(net, x, y), record(net, slow_pgd20(net, x, y, EPS), y)
    found = measure(RobustClassifier(net, AT()), x, y, K, EPS, batch_size=5)
    features = [name for name in nat if name.endswith(("penultimate", "masked"))]
    for name in features:
        channels = found.channels[name]
        torch.testing.assert_close(channels.natural, class_means(nat[name], y, K))
        expected = class_means(adv[name], y, K)
        torch.testing.assert_close(channels.adversarial, expected, rtol=0, atol=1e-4)
    assert not any(p.grad is not None for p in net.parameters())
    by_class = [f"{name}_by_class" for name in features if name != "penultimate"]
    assert set(found.channels) == {*features, *by_class}
    assert torch.equal(found.channels["penultimate"].relevance, net.head.linear.weight.double())
    for name in by_class:
        module, plain = name.partition("_")[0], found.channels[name.removesuffix("_by_class")]
        torch.testing.assert_close(plain.relevance, class_means(nat[f"{module}_relevance"], y, K))
        assert torch.equal(found.channels[name].natural, plain.natural)
    if by_class:  # the second probe is linear
        weight = net.selections["stages_1_0"].probe.output.weight.double()
        torch.testing.assert_close(found.channels["module2_masked_by_class"].relevance, weight)


def test_an_image_that_was_wrong_before_the_attack_is_not_robust(
    monkeypatch, plain_network, images
):
    predicted = iter([torch.tensor([0, 1, 1, 2, 2, 2]), torch.tensor([0, 0, 0, 2, 2, 1])])

    def recording(*_):
        logits = F.one_hot(next(predicted), K).float()
        return {"logits": logits, "penultimate": torch.ones(6, 8)}

    monkeypatch.setattr(measures, "record", recording)
    found = measure(plain_network(), images(6)[0], torch.tensor([0, 0, 1, 1, 2, 2]), K, EPS)
    assert found.clean.tolist() == [0.5, 0.5, 1.0]
    assert found.robust.tolist() == [0.5, 0.0, 0.5]


def test_cas_modules_have_no_relevance_to_record(cifs_network, images):
    net = cifs_network(selections={"stages_0_0": CAS, "stages_1_0": CAS})
    assert set(record(net, *images())) == {"logits", "penultimate"}


def test_a_summary_has_means_over_classes_and_the_link_to_robustness():
    relevance = torch.tensor([[1.0, 0.0, -1.0]] * K)
    natural = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [2.0, 3.0, 2.0]])  # corr 1, -1, 0
    channels = {"penultimate": Channels(natural, natural, relevance)}
    for robust, expected in (([0.9, 0.1, 0.5], 1.0), ([0.2, 0.6, 0.4], -1.0)):
        summary = Measurement(torch.ones(K), torch.tensor(robust), channels).summary()
        link = summary["correlation_of_robustness_and_alignment"]
        assert float(link) == pytest.approx(expected, abs=1e-6)
        found = summary["features"]["penultimate"]
        assert float(found["negative_share_natural"]) == pytest.approx((1 / 6 + 3 / 6 + 2 / 7) / 3)
        assert found["per_class"]["cosine"].tolist() == pytest.approx([1.0] * K)
