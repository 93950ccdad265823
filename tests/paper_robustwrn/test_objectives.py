"""The loss with an auxiliary head."""

import pytest
import torch
import torch.nn.functional as F

from common.attacks.pgd import PGD
from common.classifier import RobustClassifier
from common.errors import ConfigurationError
from common.objectives import AT, TRADES
from paper_robustwrn.networks import DARTS, DenseNet
from paper_robustwrn.objectives import SATAuxiliary

TINY = {"layers": 3, "channels": (4, 2, 4, 6)}


def test_auxiliary_loss_written_out(batch):
    net = DARTS(**TINY, auxiliary=True)
    module = RobustClassifier(net, SATAuxiliary(0.4))
    batch["x_adv"] = batch["x"] + 0.01
    loss = module.objective.outer(module, batch)
    logits, auxiliary = net.forward_with_auxiliary(batch["x_adv"])
    main, other = (F.cross_entropy(z, batch["y"]) for z in (logits, auxiliary))
    torch.testing.assert_close(loss, main + 0.4 * other)
    assert SATAuxiliary(0.4).needs_x_adv
    plain = AT().outer(module, dict(batch))
    torch.testing.assert_close(SATAuxiliary(0.0).outer(net, batch), plain)
    assert TRADES().outer(net, batch).isfinite(), "plain losses train networks of cells too"


def test_the_attack_climbs_the_main_logits_alone(batch):
    net = DARTS(**TINY, auxiliary=True).eval()
    inner = SATAuxiliary().inner(net, batch)
    x_adv = PGD(0.1, 0.05, 2)(inner, batch["x"])
    assert torch.equal(inner(x_adv), F.cross_entropy(net(x_adv), batch["y"], reduction="none"))
    assert (x_adv - batch["x"]).abs().max() <= 0.1 + 1e-6
    assert all(p.grad is None for p in net.parameters())


def test_auxiliary_loss_says_what_is_missing(batch):
    net = DARTS(**TINY)
    with pytest.raises(ConfigurationError, match="x_adv"):
        SATAuxiliary().outer(net, batch)
    batch["x_adv"] = batch["x"]
    with pytest.raises(ConfigurationError, match=r"model\.net\.auxiliary"):
        SATAuxiliary().outer(net, batch)
    with pytest.raises(ConfigurationError, match="not DenseNet"):
        SATAuxiliary().outer(DenseNet((1,), (4,), 2), batch)
    with pytest.raises(ConfigurationError, match="weight"):
        SATAuxiliary(-1.0)
