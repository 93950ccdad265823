"""Losses of an attacker who knows of the maps, and what TensorBoard gets."""

import pytest
import torch
from torch import nn

from common.attacks.losses import cross_entropy
from common.attacks.pgd import PGD, input_gradient
from common.objectives import Natural
from paper_wm.method import weight_maps
from paper_wm.module import WeightMapClassifier
from paper_wm.networks import SmallCNN, with_weight_maps

SHAPE = (1, 8, 8)


def model(variant: str | None = "smoothing") -> WeightMapClassifier:
    net: nn.Module = SmallCNN((4, 4, 4), image_shape=SHAPE)
    if variant is not None:
        net = with_weight_maps(net, variant, image_shape=SHAPE, placement="all")
    return WeightMapClassifier(net, Natural(), torch.optim.SGD).eval()


@pytest.fixture
def digits() -> dict[str, torch.Tensor]:
    return {"x": torch.rand(6, *SHAPE), "y": torch.arange(6)}


@pytest.mark.parametrize(
    ("variant", "start", "is_same"),
    [
        ("smoothing", 1.0, False),
        ("scale", 1.0, True),
        ("scale", -1.0, False),  # a map of other signs misleads an attack that ignores it
    ],
)
def test_the_loss_past_the_maps_has_the_value_and_not_the_gradient(
    variant, start, is_same, digits
) -> None:
    found, x = model(variant), digits["x"]
    for weight_map in weight_maps(found).values():
        weight_map.map.data.fill_(start)
    losses = found.adaptive_losses()
    assert set(losses) == {"ce_f", "cw_f", "ce_bypass"}
    usual, past = (losses[name](found, digits) for name in ("ce_f", "ce_bypass"))
    torch.testing.assert_close(past(x), cross_entropy(found(x), digits["y"]))
    assert torch.allclose(input_gradient(past, x), input_gradient(usual, x)) == is_same


def test_an_attack_climbs_it_and_leaves_no_hooks(digits) -> None:
    found = model("scale")
    loss = found.adaptive_losses()["ce_bypass"](found, digits)
    x_adv = PGD(0.1, 0.02, 5)(loss, digits["x"], torch.Generator().manual_seed(0))
    assert (loss(x_adv) > loss(digits["x"])).all()
    assert not any(m._forward_hooks for m in weight_maps(found).values())
    assert all(p.grad is None for p in found.parameters())


def test_a_network_without_maps_has_the_usual_losses() -> None:
    assert set(model(None).adaptive_losses()) == {"ce_f", "cw_f"}


def test_tensorboard_gets_every_map() -> None:
    seen = {}
    model().log_histograms(lambda name, values: seen.update({name: values}), {})
    assert set(seen) == {f"maps/net.blocks.{i}.conv" for i in range(3)}
    assert all((values == 1.0).all() for values in seen.values())
