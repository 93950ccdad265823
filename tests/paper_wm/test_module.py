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
    torch.manual_seed(0)
    net: nn.Module = SmallCNN((4, 4, 4), image_shape=SHAPE)
    if variant is not None:
        net = with_weight_maps(net, variant, image_shape=SHAPE, placement="all")
    return WeightMapClassifier(net, Natural(), torch.optim.SGD).eval()


@pytest.fixture
def digits() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"x": torch.rand(6, *SHAPE, generator=generator), "y": torch.arange(6)}


def test_the_loss_past_the_maps_has_the_value_and_not_the_gradient(digits) -> None:
    found = model()
    losses = found.adaptive_losses()
    assert set(losses) == {"ce_f", "cw_f", "ce_bypass"}
    usual, past = (losses[name](found, digits) for name in ("ce_f", "ce_bypass"))
    x = digits["x"]
    torch.testing.assert_close(past(x), usual(x))
    torch.testing.assert_close(past(x), cross_entropy(found(x), digits["y"]))
    assert not torch.allclose(input_gradient(past, x), input_gradient(usual, x))


def test_a_scale_map_of_ones_has_nothing_to_pass(digits) -> None:
    found = model("scale")
    losses = found.adaptive_losses()
    exact, past = (
        input_gradient(losses[n](found, digits), digits["x"]) for n in ("ce_f", "ce_bypass")
    )
    torch.testing.assert_close(exact, past)
    for weight_map in weight_maps(found).values():
        weight_map.map.data.fill_(-1.0)
    exact, past = (
        input_gradient(losses[n](found, digits), digits["x"]) for n in ("ce_f", "ce_bypass")
    )
    assert not torch.allclose(exact, past), "a map turned round misleads an attack that ignores it"


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
    found = model()
    found.log_histograms(lambda name, values: seen.update({name: values}), {})
    assert set(seen) == {f"maps/net.blocks.{i}.conv" for i in range(3)}
    assert all((values == 1.0).all() for values in seen.values())
