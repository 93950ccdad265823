"""Consistency, movement of the pooled feature, and how far classes lie apart."""

import torch
from torch.nn import functional as F

from common.attacks.losses import label_loss
from common.attacks.pgd import PGD
from paper_rcm.figures import features_figure
from paper_rcm.measures import (
    Consistency,
    PooledChange,
    attacked,
    embed,
    pooled_features,
    separation,
)


def test_consistency_and_robustness_bound_each_other(model, digits, random) -> None:
    """NA + CA - 1 <= AR <= min(NA, CA) for one common x'."""
    y = digits["y"].clone()
    y[::3] = (y[::3] + 1) % 10
    attack = PGD(0.02, 0.01, 3)
    held = Consistency(attack)(model, digits, random)["consistency"]
    own = model(digits["x"]).argmax(1)
    kept = model(attack(label_loss(model, own), digits["x"], random)).argmax(1) == own
    assert torch.equal(held.bool(), kept)
    natural, consistent = (own == y).float().mean(), kept.float().mean()
    robust = (kept & (own == y)).float().mean()
    assert natural + consistent - 1 - 1e-6 <= robust <= min(natural, consistent)


def test_without_a_budget_nothing_changes(model, digits, random) -> None:
    still = PGD(0.0, 0.0, 1, start="zero")
    assert Consistency(still)(model, digits, random)["consistency"].all()
    for name, values in PooledChange(still)(model, digits, random).items():
        assert not values.any(), name


def test_pooled_change_is_the_norm_of_the_movement(model, digits, random) -> None:
    attack = PGD(0.1, 0.05, 2, start="zero")
    found = PooledChange(attack)(model, digits, random)
    x_adv = attack(label_loss(model, digits["y"]), digits["x"])
    clean = model.net.pooled(digits["x"])
    expected = (model.net.pooled(x_adv) - clean).norm(dim=1)
    torch.testing.assert_close(found["pooled_change"], expected)
    torch.testing.assert_close(found["pooled_change_relative"], expected / clean.norm(dim=1))
    assert (found["pooled_change"] > found["pooled_change_noise"]).all()


def test_features_are_pooled_and_no_mode_changes(model) -> None:
    x, y = torch.rand(7, 1, 8, 8), torch.arange(7)
    model.train()
    found, x_adv = (
        pooled_features(model, x, batch_size=3),
        attacked(model, x, y, PGD(0.1), batch_size=3),
    )
    assert model.training
    model.eval()
    assert found.shape == (7, 32)
    with torch.no_grad():
        assert torch.allclose(found, model.net.pooled(x), atol=1e-6)
        assert F.cross_entropy(model(x_adv), y) > F.cross_entropy(model(x), y)
    assert 0 < (x_adv - x).abs().max() <= 0.1 + 1e-6


def blobs(distance: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(120) % 3
    return torch.randn(120, 4, generator=generator) + distance * torch.eye(3, 4)[y], y


def test_classes_further_apart_have_larger_numbers() -> None:
    near, middle, far = (
        separation(features, y, features) for features, y in map(blobs, (0.0, 2.0, 10.0))
    )
    assert near["silhouette"] < 0.05 < middle["silhouette"] < 0.7 < far["silhouette"]
    assert near["class mean"] < 0.7 < far["class mean"] == 1.0
    clean, y = blobs(10.0)
    swapped = clean.roll(1, dims=1)  # every class moves to another place
    assert separation(swapped, y, clean)["class mean"] < 0.5


def test_the_picture_has_a_panel_per_network_and_kind() -> None:
    features, y = blobs(10.0)
    points = embed(features)
    assert points.shape == (120, 2)
    names = {net: [f"{net}, {kind}" for kind in ("clean", "PGD-20")] for net in "ab"}
    figure = features_figure({net: dict.fromkeys(t, (points, y)) for net, t in names.items()})
    titles = [ax.get_title() for ax in figure.axes]
    assert titles == ["a, clean", "b, clean", "a, PGD-20", "b, PGD-20"]
