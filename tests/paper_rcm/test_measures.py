"""Consistency, movement of the pooled feature, and how far classes lie apart."""

import torch
from torch.nn import functional as F

from common.attacks.pgd import PGD
from common.attacks.randomness import ExampleRandom
from paper_rcm.figures import features_figure
from paper_rcm.measures import (
    Consistency,
    PooledChange,
    attacked,
    embed,
    pooled_features,
    separation,
)


def random(batch) -> ExampleRandom:
    return ExampleRandom(0, 0, batch["index"])


def test_consistency_and_robustness_bound_each_other(model, digits) -> None:
    """NA + CA - 1 <= AR <= min(NA, CA) for one common x'."""
    y = digits["y"].clone()
    y[::3] = (y[::3] + 1) % 10
    attack = PGD(0.02, 0.01, 3)
    held = Consistency(attack)(model, digits, random(digits))["consistency"]
    own = model(digits["x"]).argmax(1)
    x_adv = attack(
        lambda x: F.cross_entropy(model(x), own, reduction="none"), digits["x"], random(digits)
    )
    kept = model(x_adv).argmax(1) == own
    assert torch.equal(held.bool(), kept)
    natural, consistent = (own == y).float().mean(), kept.float().mean()
    robust = (kept & (own == y)).float().mean()
    assert natural + consistent - 1 - 1e-6 <= robust <= min(natural, consistent)


def test_without_a_budget_nothing_changes(model, digits) -> None:
    still = PGD(0.0, 0.0, 1, start="zero")
    assert Consistency(still)(model, digits, random(digits))["consistency"].all()
    for name, values in PooledChange(still)(model, digits, random(digits)).items():
        assert not values.any(), name


def test_pooled_change_is_the_norm_of_the_movement(model, digits) -> None:
    attack = PGD(0.1, 0.05, 2, start="zero")
    found = PooledChange(attack)(model, digits, random(digits))
    x_adv = attack(lambda x: F.cross_entropy(model(x), digits["y"], reduction="none"), digits["x"])
    clean = model.net.pooled(digits["x"])
    expected = (model.net.pooled(x_adv) - clean).norm(dim=1)
    torch.testing.assert_close(found["pooled_change"], expected)
    torch.testing.assert_close(found["pooled_change_relative"], expected / clean.norm(dim=1))
    assert (found["pooled_change"] > found["pooled_change_noise"]).all()


def test_features_are_pooled_and_no_mode_changes(model) -> None:
    model.train()
    x = torch.rand(7, 1, 8, 8)
    found = pooled_features(model, x, batch_size=3)
    assert found.shape == (7, 32)
    assert model.training
    model.eval()
    with torch.no_grad():
        assert torch.allclose(model.net.arch.head(model.net.features(x)), model(x))
        assert torch.allclose(found, model.net.pooled(x), atol=1e-6)


def test_attacked_images_stay_in_the_ball_and_lose(model) -> None:
    x, y = torch.rand(40, 1, 8, 8), torch.randint(0, 10, (40,))
    x_adv = attacked(model, x, y, PGD(0.1, steps=5), batch_size=16)
    assert x_adv.shape == x.shape
    assert (x_adv - x).abs().max() <= 0.1 + 1e-6
    model.eval()
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy
        assert loss(model(x_adv), y) > loss(model(x), y)


def blobs(distance: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(120) % 3
    return torch.randn(120, 4, generator=generator) + distance * torch.eye(3, 4)[y], y


def test_classes_further_apart_have_larger_numbers() -> None:
    numbers = []
    for distance in (0.0, 2.0, 10.0):
        features, y = blobs(distance)
        numbers.append(separation(features, y, features))
    assert numbers[0].silhouette < numbers[1].silhouette < numbers[2].silhouette
    assert numbers[0].silhouette < 0.05
    assert numbers[2].silhouette > 0.7
    assert numbers[2].class_mean_acc == 1.0
    assert numbers[0].class_mean_acc < 0.7


def test_prototypes_are_those_of_clean_features() -> None:
    clean, y = blobs(10.0)
    swapped = clean.roll(1, dims=1)  # every class moves to another place
    assert separation(swapped, y, swapped).class_mean_acc == 1.0
    assert separation(swapped, y, clean).class_mean_acc < 0.5


def test_the_picture_has_a_panel_per_network_and_kind() -> None:
    features, y = blobs(10.0)
    one = embed(features, y)
    assert one.points.shape == (120, 2)
    figure = features_figure(
        {"a": {"clean": one, "PGD-20": one}, "b": {"clean": one, "PGD-20": one}}
    )
    assert [ax.get_title().split(":")[0] for ax in figure.axes] == [
        "a, clean", "b, clean", "a, PGD-20", "b, PGD-20",
    ]  # fmt: skip
