import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from common.analysis.report import describe
from common.classifier import RobustClassifier
from common.errors import CheckpointError, ConfigurationError
from common.evaluation import Outcomes
from common.files import read_sealed_json
from common.networks.resnet import ResNet
from common.objectives import AT
from common.results.store import checkpoint_entry, merge_result, result_path
from paper_cifs import analysis
from paper_cifs.analysis import (
    Channels,
    Measurement,
    analyse,
    class_means,
    correlation,
    draw_channels,
    evaluate_expectations,
    experiment_of,
    figure_f1,
    figure_f2,
    figure_f4,
    final_linear,
    main,
    measure,
    record,
    shown_classes,
    smoothed,
)
from paper_cifs.method import (
    CAS,
    CIFSResNet,
    global_average,
    relevance_by_autograd,
)

K, EPS = 3, 0.1
NAMES = ("zero", "one", "two")
SETTINGS = {
    "depths": (1, 1),
    "widths": (4, 8),
    "strides": (1, 2),
    "num_classes": K,
    "in_channels": 1,
}


def plain_network(seed=0):
    torch.manual_seed(seed)
    return ResNet(**SETTINGS).eval()


def cifs_network(seed=0, **settings):
    torch.manual_seed(seed)
    return CIFSResNet(**SETTINGS, hidden=5, **settings).eval()


def images(n=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 1, 8, 8, generator=generator)
    return x, torch.arange(n) % K


def random_channels(classes=K, channels=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    nat, adv = torch.rand(2, classes, channels, generator=generator, dtype=torch.float64)
    relevance = torch.randn(classes, channels, generator=generator, dtype=torch.float64)
    return Channels(nat, adv, relevance)


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


def test_numbers_agree_with_a_slow_rewrite():
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


def test_an_attack_that_changes_nothing():
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


@pytest.mark.parametrize("make", [plain_network, cifs_network])
def test_the_penultimate_feature_gives_the_logits(make):
    net, (x, y) = make(), images()
    found, linear = record(net, x, y), final_linear(net)
    assert linear is net.head.linear
    assert found.features["penultimate"].shape == (12, 8)
    logits = found.features["penultimate"] @ linear.weight.T + linear.bias
    assert torch.allclose(found.logits, logits, atol=1e-6)


def test_recordings_hold_both_sides_of_each_mask_and_its_relevance():
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


def test_recording_reads_labels_for_the_relevance_alone():
    net, (x, y) = cifs_network(), images()
    first, second = record(net, x, y), record(net.train(), x, (y + 1) % K)
    assert torch.equal(first.logits, second.logits)
    assert torch.equal(first.relevance["module2"], second.relevance["module2"])
    assert not torch.equal(
        first.relevance["module2_by_class"], second.relevance["module2_by_class"]
    )


def test_recording_leaves_nothing_behind():
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


@pytest.mark.parametrize("make", [plain_network, cifs_network])
def test_measurements_are_of_images_attacked_with_pgd20(make):
    net, (x, y) = make(), images()
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


def test_an_image_that_was_wrong_before_the_attack_is_not_robust(monkeypatch):
    y = torch.tensor([0, 0, 1, 1, 2, 2])
    predicted = iter([torch.tensor([0, 1, 1, 2, 2, 2]), torch.tensor([0, 0, 0, 2, 2, 1])])

    def recording(*_):
        logits = F.one_hot(next(predicted), K).float()
        return analysis.Recording(logits, {"penultimate": torch.ones(6, 8)}, {})

    monkeypatch.setattr(analysis, "record", recording)
    found = measure(plain_network(), images(6)[0], y, K, EPS)
    assert found.clean.tolist() == [0.5, 0.5, 1.0]
    assert found.robust.tolist() == [0.5, 0.0, 0.5]


def test_relevances_of_a_measurement():
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


def test_without_a_radius_nothing_changes():
    found = measure(cifs_network(), *images(), K, 0.0)
    assert torch.equal(found.clean, found.robust)
    for channels in found.channels.values():
        assert torch.allclose(channels.cosine(), torch.ones(K, dtype=torch.float64))
        assert torch.equal(channels.natural, channels.adversarial)


def test_classifiers_are_measured_as_their_networks_are():
    net, (x, y) = plain_network(), images()
    classifier = RobustClassifier(net, AT())
    assert torch.equal(
        measure(classifier, x, y, K, EPS).channels["penultimate"].adversarial,
        measure(net, x, y, K, EPS).channels["penultimate"].adversarial,
    )
    assert not any(p.grad is not None for p in net.parameters())


def test_cas_modules_have_no_relevance_to_record():
    net = cifs_network(selections={"stages_0_0": CAS, "stages_1_0": CAS})
    assert set(measure(net, *images(), K, EPS).channels) == {"penultimate"}


def test_summaries_are_means_over_classes():
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


# ---------------------------------------------------------------------------------------- figures


def decoded(fig, tmp_path):
    path = analysis.save_figure(fig, tmp_path / "figure.png")
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")), path


def has_colour(pixels, colour, tolerance=40):
    return (np.abs(pixels.astype(int) - colour).max(axis=-1) < tolerance).mean() > 0.002


def test_smoothing_averages_three_neighbours():
    curve = torch.tensor([1.0, 4.0, 1.0, 0.0, 8.0])
    expected = [2.0, 2.0, 5 / 3, 3.0, 16 / 3]
    assert smoothed(curve).tolist() == pytest.approx(expected)


def heights(filled):
    """What a filled curve shows at 0, 1, 2, ..."""
    corners = filled.get_paths()[0].vertices
    steps = range(int(corners[:, 0].max()) + 1)
    return [max((y for x, y in corners if x == step), key=abs) for step in steps]


def test_a_panel_sorts_by_relevance_and_scales_by_the_common_maximum():
    channels = random_channels()
    fig = analysis.blank_figure(3, 3)
    top, bottom = fig.subplots(2, 1)
    draw_channels(top, bottom, channels, 1)
    order = sorted(range(16), key=lambda i: -channels.relevance[1, i])
    nat, adv = (smoothed(a[1][order]) for a in (channels.natural, channels.adversarial))
    highest = max(float(nat.max()), float(adv.max()))
    assert heights(top.collections[0]) == pytest.approx((nat / highest).tolist())
    assert heights(top.collections[1]) == pytest.approx((adv / highest).tolist())
    relevance = channels.relevance[1].numpy()[order]
    assert heights(bottom.collections[0]) == pytest.approx(relevance / np.abs(relevance).max())
    assert top.get_ylim() == (0, 1)
    assert bottom.get_ylim() == (-1, 1)
    (x, _) = bottom.lines[0].get_xdata()
    assert x == pytest.approx((relevance >= 0).sum() - 0.5)


def test_f1_compares_the_trainings(tmp_path):
    found = measure(plain_network(), *images(), K, EPS)
    fig = figure_f1({"plain_natural": found, "plain": found}, (0, 2), NAMES)
    titles = [ax.get_title() for ax in fig.axes if ax.get_title()]
    assert [title.splitlines()[0] for title in titles] == [
        "natural training, class zero",
        "adversarial training, class zero",
        "natural training, class two",
        "adversarial training, class two",
    ]
    cosine = float(found.channels["penultimate"].cosine()[2])
    assert f"cosine {cosine:.2f}" in titles[3]
    pixels, _ = decoded(fig, tmp_path)
    assert has_colour(pixels, (0, 158, 115))  # the relevance
    assert pixels.std() > 10


def test_f2_orders_classes_and_averages_seeds():
    channels = {"penultimate": random_channels()}
    seeds = [
        Measurement(torch.ones(K), torch.tensor(robust), channels)
        for robust in ([0.1, 0.5, 0.7], [0.3, 0.9, 0.5])
    ]
    fig = figure_f2(seeds, NAMES)
    top, bottom = fig.axes
    assert [label.get_text() for label in top.get_xticklabels()] == ["one", "two", "zero"]
    tops = [bar.get_height() for bar in top.patches]
    assert tops == pytest.approx([100, 100, 100, 70, 60, 20], rel=1e-5)
    alignment = channels["penultimate"].alignment()[[1, 2, 0]].tolist()
    assert [bar.get_height() for bar in bottom.patches] == pytest.approx(alignment)
    links = [float(correlation(m.robust, m.channels["penultimate"].alignment())) for m in seeds]
    assert ", ".join(f"{link:+.2f}" for link in links) in bottom.get_title()


def test_f4_shows_four_features(tmp_path):
    found = measure(cifs_network(), *images(), K, EPS)
    fig = figure_f4(found, (1, 2), NAMES)
    titles = [ax.get_title().splitlines()[0] for ax in fig.axes if ax.get_title()]
    features = [
        "module 1, unmasked",
        "module 1, masked",
        "module 2, unmasked",
        "module 2, masked (W)",
    ]
    assert titles == [f"{feature}, class {name}" for name in ("one", "two") for feature in features]
    last = [ax for ax in fig.axes if ax.get_title()][3]
    assert f"cosine {float(found.channels['penultimate'].cosine()[1]):.2f}" in last.get_title()
    pixels, path = decoded(fig, tmp_path)
    assert pixels.shape == (540, 1030, 3)
    assert path.stat().st_size < 150_000


def test_classes_shown_are_the_published_ones_or_the_extremes():
    robust = torch.tensor([0.5, 0.9, 0.1])
    assert shown_classes("digits", robust, NAMES) == (1, 2)
    assert shown_classes("cifar10", robust, ("cat", "frog", "automobile")) == (2, 0)


# ----------------------------------------------------------------------------------- expectations


def made_up(plain=0.70, cifs=0.74, aux=0.73, cas=0.90, cas_probe=0.70, seeds=(0, 1, 2)):
    metrics = {}
    for seed in seeds:
        for method, accuracy in (("plain", plain), ("cifs", cifs), ("aux", aux)):
            metrics[method, seed] = {"pgd20/ce_f": accuracy, "pgd20": accuracy - 0.01}
        metrics["cas", seed] = {
            "pgd20/ce_f": cas,
            "pgd20/ce_p1": cas_probe,
            "pgd20/ce_p2": cas_probe + 0.05,
            "pgd20/ce_joint10": 0.0,  # not a probe's
        }
    return metrics


def made_up_summaries(
    cosine=(0.66, 0.98), excess=(0.19, 0.034), share=(0.28, 0.18), seeds=(0, 1, 2)
):
    summaries = {}
    for seed in seeds:
        for i, method in enumerate(("plain_natural", "plain")):
            numbers = {"cosine": torch.tensor(cosine[i]), "over_activation": excess[i]}
            summaries[method, seed] = {"features": {"penultimate": numbers}}
        summaries["cifs", seed] = {
            "features": {
                f"module2_{side}_by_class": {"negative_share_adversarial": value}
                for side, value in zip(("unmasked", "masked"), share, strict=True)
            }
        }
    return summaries


def verdicts(metrics=None, summaries=None, seeds=(0, 1, 2)):
    metrics = made_up() if metrics is None else metrics
    summaries = made_up_summaries() if summaries is None else summaries
    return {e.id: e for e in evaluate_expectations(metrics, summaries, seeds)}


def test_expectations_hold_where_they_should():
    found = verdicts()
    assert {id_: e.holds for id_, e in found.items()} == dict.fromkeys("abcde", True)
    values = {id_: e.value for id_, e in found.items()}
    expected = {"a": 4.0, "b": 0.98, "c": 0.156, "d": 20.0, "e": 1 - 0.18 / 0.28}
    assert values == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("id_", "changes"),
    [
        ("a", {"metrics": made_up(cifs=0.70)}),
        ("a", {"metrics": made_up(cifs=0.65)}),
        ("b", {"summaries": made_up_summaries(cosine=(0.66, 0.9))}),
        ("b", {"summaries": made_up_summaries(cosine=(0.91, 0.98))}),
        ("c", {"summaries": made_up_summaries(excess=(0.03, 0.04))}),
        ("d", {"metrics": made_up(cas=0.84)}),
        ("e", {"summaries": made_up_summaries(share=(0.27, 0.19))}),
    ],
)
def test_each_expectation_can_fail(id_, changes):
    found = verdicts(**changes)
    assert found[id_].holds is False
    assert all(found[other].holds for other in set("abcde") - {id_})


def test_the_first_expectation_is_about_the_mean_and_shows_what_stands_beside():
    metrics = made_up()
    metrics["cifs", 2]["pgd20/ce_f"] = 0.65  # one seed may be worse
    metrics["cifs", 2]["pgd20"] = 0.50
    a = verdicts(metrics)["a"]
    assert a.holds is True
    assert a.per_seed == pytest.approx({0: 4.0, 1: 4.0, 2: -5.0})
    assert a.value == pytest.approx(1.0)
    assert a.beside == pytest.approx(
        {
            "cifs - plain, on f": 1.0,
            "cifs - plain, worst loss": (4 + 4 - 19) / 3,
            "aux - plain, on f": 3.0,
            "aux - plain, worst loss": 3.0,
            "cifs - aux, on f": -2.0,
            "cifs - aux, worst loss": (1 + 1 - 22) / 3,
        }
    )


def test_verdicts_wait_for_every_seed():
    metrics, summaries = made_up(), made_up_summaries()
    for method in ("plain", "cas"):
        del metrics[method, 1]
    del summaries["plain_natural", 0], summaries["cifs", 2]
    found = verdicts(metrics, summaries)
    assert {e.holds for e in found.values()} == {None}
    assert {id_: tuple(e.per_seed) for id_, e in found.items()} == {
        "a": (0, 2),
        "b": (1, 2),
        "c": (1, 2),
        "d": (0, 2),
        "e": (0, 1),
    }
    assert all(e.value is not None for e in found.values())


def test_a_single_seed_can_be_asked_for():
    found = verdicts(made_up(seeds=[1]), made_up_summaries(seeds=[1]), seeds=[1])
    assert {e.holds for e in found.values()} == {True}


def test_nothing_measured_is_nothing_concluded():
    found = verdicts({}, {})
    assert {(e.value, e.holds) for e in found.values()} == {(None, None)}
    assert set(found["a"].beside.values()) == {None}


def test_metrics_that_lack_or_are_not_finite_do_not_count():
    metrics, summaries = made_up(), made_up_summaries()
    del metrics["cifs", 0]["pgd20/ce_f"]
    summaries["plain", 0]["features"]["penultimate"]["cosine"] = math.nan
    for name in ("pgd20/ce_p1", "pgd20/ce_p2"):
        del metrics["cas", 0][name]
    found = verdicts(metrics, summaries)
    assert [found[id_].holds for id_ in "abcde"] == [None, None, True, None, True]


# ------------------------------------------------------------------------------------ the command


@pytest.mark.parametrize(
    ("on", "expected"),
    [
        ("digits", ("digits", "resnet")),
        ("digits_resnet_cifs", ("digits", "resnet")),
        ("cifar10", ("cifar10", "resnet18")),
        ("cifar10_resnet18_cifs_beta0.1", ("cifar10", "resnet18")),
        ("cifar10_wrn28_10", ("cifar10", "wrn28_10")),
        ("cifar10_wrn28_10_plain", ("cifar10", "wrn28_10")),
        ("fashion_mnist", ("fashion_mnist", "resnet10")),
        ("fashion_mnist_resnet10_cas", ("fashion_mnist", "resnet10")),
    ],
)
def test_what_on_stands_for(on, expected):
    assert experiment_of(on) == expected


class Images:
    """A data module that has bytes in its batches, as the real one does."""

    num_classes, class_names = K, NAMES

    def __init__(self):
        x, self.y = images(24)
        self.x = (255 * x).to(torch.uint8)
        self.calls = []

    def prepare_data(self):
        self.calls.append("prepare_data")

    def setup(self, stage):
        self.calls.append(stage)

    def test_dataloader(self):
        assert self.calls == ["prepare_data", "test"]
        return [
            {"x": self.x[i : i + 9], "y": self.y[i : i + 9], "index": torch.arange(i, i + 9)[:24]}
            for i in range(0, 24, 9)
        ]

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch | {"x": batch["x"].float() / 255}


def load(run):
    seed = int(run.name.removeprefix("seed"))
    make = cifs_network if run.parent.name.endswith("cifs") else plain_network
    return RobustClassifier(make(seed), AT()), Images()


def write_checkpoints(runs, stems, seeds):
    for stem in stems:
        for seed in seeds:
            folder = runs / stem / f"seed{seed}" / "checkpoints"
            folder.mkdir(parents=True)
            (folder / "last.ckpt").touch()


def write_result(folder, stem, seed, accuracies, label="last"):
    everything = torch.ones(100, dtype=torch.bool)
    outcomes = Outcomes(
        y=torch.arange(100) % 2,
        correct={"clean": everything}
        | {name: torch.arange(100) < round(100 * acc) for name, acc in accuracies.items()},
        attacked=dict.fromkeys(accuracies, everything),
    )
    merge_result(
        result_path(folder, stem, seed),
        paper="paper_cifs",
        experiment=stem,
        seed=seed,
        label=label,
        entry=checkpoint_entry(outcomes),
        provenance={"config_digest": "x"},
    )


def write_results(folder, seeds, methods=("plain", "cifs", "aux", "cas")):
    losses = {"plain": {"pgd20/ce_f": 0.7}, "cifs": {"pgd20/ce_f": 0.75, "pgd20/ce_p1": 0.72}}
    losses |= {"aux": {"pgd20/ce_f": 0.76}, "cas": {"pgd20/ce_f": 0.9, "pgd20/ce_p1": 0.6}}
    for method in methods:
        for seed in seeds:
            write_result(folder, f"digits_resnet_{method}", seed, losses[method])


STEMS = ("digits_resnet_plain_natural", "digits_resnet_plain", "digits_resnet_cifs")


def test_the_whole_analysis(tmp_path):
    runs, results = tmp_path / "runs", tmp_path / "results"
    write_checkpoints(runs, STEMS, (0, 1))
    write_results(results, (0, 1))
    report = analyse(runs, results, "digits", [0, 1], load=load)
    written = read_sealed_json(results / "analysis.json")
    assert set(written) == {"on", "seeds", "expectations", "channels", "missing"}
    assert all(report[key] == written[key] for key in ("channels", "missing", "seeds", "on"))
    assert written["missing"] == []
    expectations = {e["id"]: e for e in written["expectations"]}
    assert all({"claim", "value", "threshold", "holds"} <= set(e) for e in expectations.values())
    assert (expectations["a"]["value"], expectations["a"]["holds"]) == (5.0, True)
    assert expectations["a"]["beside"]["cifs - plain, worst loss"] == 2.0
    assert expectations["a"]["beside"]["cifs - aux, on f"] == -1.0
    assert (expectations["d"]["value"], expectations["d"]["holds"]) == (30.0, True)

    assert set(written["channels"]) == set(STEMS)
    data = Images()
    found = measure(plain_network(1), data.x.float() / 255, data.y, K, 0.2)
    entry = written["channels"]["digits_resnet_plain"]["seed1"]
    cosine = found.channels["penultimate"].cosine()
    assert entry["features"]["penultimate"]["per_class"]["cosine"] == pytest.approx(
        cosine.tolist(), abs=1e-4
    )
    assert entry["pgd20_acc_per_class"] == pytest.approx(found.robust.tolist(), abs=1e-6)
    assert expectations["b"]["per_seed"]["1"] == pytest.approx(float(cosine.mean()), abs=1e-4)

    figures = sorted((results / "figures").iterdir())
    names = [f"digits_resnet_{name}.png" for name in ("f1_channels", "f2_classes", "f4_masks")]
    assert [figure.name for figure in figures] == names
    assert report["figures"] == [str(figure) for figure in figures]
    for figure in figures:
        assert figure.stat().st_size < 150_000
        with Image.open(figure) as picture:
            assert min(picture.size) > 300
            assert np.asarray(picture.convert("L")).std() > 10


def test_what_is_missing_is_named_and_the_rest_done(tmp_path):
    runs, results = tmp_path / "runs", tmp_path / "results"
    write_checkpoints(runs, STEMS[1:2], (0, 1, 2))
    write_results(results, (0,), ("plain", "cas"))
    write_result(results, "digits_resnet_cifs", 0, {"pgd20/ce_f": 0.75}, label="selected")
    (results / "digits_resnet_aux-seed0.json").write_text("{")

    def load_first_only(run):
        if run.name == "seed1":
            raise CheckpointError("weights of another network")
        if run.name == "seed2":
            raise SystemExit(2)
        return load(run)

    report = analyse(runs, results, "digits", [0, 1, 2], load=load_first_only)
    missing = "\n".join(report["missing"])
    assert f"checkpoint {runs}/{STEMS[0]}/seed0/checkpoints/last.ckpt" in report["missing"]
    assert "digits_resnet_plain/seed1/checkpoints/last.ckpt: weights of another network" in missing
    assert "digits_resnet_plain/seed2/config.yaml is refused" in missing
    assert f"checkpoint {runs}/{STEMS[2]}/seed1/checkpoints/last.ckpt" in report["missing"]
    assert f"result {results}/digits_resnet_cas-seed1.json" in report["missing"]
    assert "metric pgd20/ce_f of the last checkpoint in" in missing
    assert "digits_resnet_aux-seed0.json cannot be read" in missing
    assert {e["holds"] for e in report["expectations"]} == {None}
    assert list(report["channels"]) == [STEMS[1]]
    names = sorted(path.name for path in (results / "figures").iterdir())
    assert names == ["digits_resnet_f1_channels.png", "digits_resnet_f2_classes.png"]
    text = describe(report)
    assert all(f"missing: {what}" in text for what in report["missing"])
    assert "(d) undecided" in text


def test_cifs_alone_gives_the_fourth_figure_and_the_same_files_each_time(tmp_path):
    write_checkpoints(tmp_path / "runs", STEMS[2:], (3,))
    written = []
    for name in ("first", "second"):
        folder = tmp_path / name
        analyse(tmp_path / "runs", folder, "digits", [3], load=load)
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        assert [path.name for path in files] == ["analysis.json", "digits_resnet_f4_masks.png"]
        content = [path.read_bytes().replace(str(folder).encode(), b"") for path in files]
        content[0] = content[0].partition(b'"digest"')[0]  # of a text that names the folder
        written.append(content)
    assert written[0] == written[1]


def test_results_of_other_data_do_not_overwrite_those_of_digits(tmp_path):
    write_checkpoints(tmp_path / "runs", ["cifar10_resnet18_plain"], (0,))
    report = analyse(tmp_path / "runs", tmp_path, "cifar10", [0], load=load)
    assert report["path"] == str(tmp_path / "analysis_cifar10_resnet18.json")
    entry = report["channels"]["cifar10_resnet18_plain"]["seed0"]
    data = Images()
    found = measure(plain_network(), data.x.float() / 255, data.y, K, "8/255")
    alignment = found.channels["penultimate"].cosine().mean()
    assert entry["features"]["penultimate"]["cosine"] == pytest.approx(float(alignment), abs=1e-4)


def test_numbers_that_are_not_finite_become_null():
    values = {"a": torch.tensor([1.0, math.nan]), 3: [math.inf, True, None, "x"]}
    assert analysis.plain_values(values) == {"a": [1.0, None], "3": [None, True, None, "x"]}


def test_nothing_to_analyse_is_an_error(tmp_path, capsys):
    arguments = ["--runs", str(tmp_path / "r"), "--results", str(tmp_path / "s"), "--seeds", "4"]
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: nothing to analyse")
    assert "digits_resnet_" in message
    assert "make reproduce-cifs" in message
    assert not (tmp_path / "s").exists()
    with pytest.raises(ConfigurationError, match="cifar10_wrn28_10_"):
        analyse(tmp_path, tmp_path, "cifar10_wrn28_10", [0])


def test_the_command_reports_failed_expectations_without_failing(tmp_path, capsys):
    write_results(tmp_path, (0,))
    write_result(tmp_path, "digits_resnet_cifs", 0, {"pgd20/ce_f": 0.6})
    arguments = ["--runs", str(tmp_path / "none"), "--results", str(tmp_path), "--seeds", "0"]
    assert main(arguments) == 0
    output = capsys.readouterr().out
    assert "(a) DOES NOT HOLD" in output
    assert "measured -10.000 against 0.000 (seed 0: -10.000)" in output
    assert "(d) holds" in output
    assert "(b) undecided" in output
    assert "analysis.json" in output
