"""Adaptive losses through the feature and through other strides."""

import pytest
import torch
from torch import nn

from common.attacks.engine.factors import FactorConv2d
from common.attacks.engine.network import AttackEngine
from common.attacks.pgd import PGD
from common.objectives import AT
from paper_rcm.method import DigitsNet, EnlargedNetwork, with_other_strides
from paper_rcm.module import RCMClassifier


def test_other_strides_have_the_same_weights_and_are_their_own_inverse(model, digits) -> None:
    x, twin = digits["x"], with_other_strides(model.net)
    assert twin.features(x).shape[-1] == 2 * model.net.features(x).shape[-1]
    assert not torch.allclose(twin(x), model(x))
    assert torch.equal(with_other_strides(twin)(x), model(x))
    wide = EnlargedNetwork(DigitsNet([1, 1, 2]), mean=[0.3], std=[0.37]).eval()
    wide.load_state_dict(model.net.state_dict())
    assert torch.allclose(twin(x), wide(x), atol=1e-6)


def test_the_feature_attack_moves_the_feature_further_than_noise(model, digits, random) -> None:
    loss = model.adaptive_losses()["feature"](model, digits)
    start = digits["x"] + 0.05 * torch.randn_like(digits["x"])
    assert torch.equal(loss(digits["x"]), torch.zeros(12))
    x_adv = PGD(0.1, 0.02, 10)(loss, digits["x"], random)
    assert (loss(x_adv) > loss(start.clamp(0, 1))).all()


@pytest.mark.parametrize("strides", [[1, 2, 2], [2, 2, 2]])
def test_adaptive_losses_are_the_same_through_the_attack_engine(strides, digits) -> None:
    net = EnlargedNetwork(DigitsNet(strides), mean=[0.3], std=[0.37])
    model = RCMClassifier(net, AT(), torch.optim.SGD).eval().requires_grad_(False)
    x = (digits["x"] + 0.1).clamp(0, 1)
    for name, inner in model.adaptive_losses().items():
        wanted = inner(model, digits)(x)
        with AttackEngine().applied(model, x):
            assert any(isinstance(module, FactorConv2d) for module in model.modules())
            found = inner(model, digits)(x)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5, msg=name)


def test_networks_without_the_mechanism_have_the_usual_losses() -> None:
    plain = RCMClassifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), AT(), torch.optim.SGD)
    assert set(plain.adaptive_losses()) == {"ce_f", "cw_f"}
