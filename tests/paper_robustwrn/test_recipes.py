"""One training step of each recipe: how many passes, in which mode, and what they leave alone."""

import pytest
import torch

from common.attacks.pgd import PGD
from common.modes import frozen
from common.objectives import AT, MART, TRADES
from paper_robustwrn.method import RobustWideResNet
from paper_robustwrn.module import RobustWRNClassifier


@pytest.mark.parametrize(
    ("objective", "scale", "evaluated", "trained"),
    [
        pytest.param(AT(), "2/255", 10, 1, id="SAT"),
        pytest.param(TRADES(6.0), 0.001, 11, 2, id="TRADES"),
        pytest.param(MART(6.0), "2/255", 10, 2, id="MART"),
    ],
)
def test_a_step_costs_the_passes_of_the_official_code(objective, scale, evaluated, trained) -> None:
    """Section "Losses used for training" of the official code: [C], invariants 9 to 11."""
    torch.manual_seed(0)
    net = RobustWideResNet(depths=[1, 1, 1], channels=[4, 4, 8, 8], in_channels=1)
    model = RobustWRNClassifier(net, objective, torch.optim.SGD).train()
    passes = {True: 0, False: 0}

    def count(module, *_) -> None:
        passes[module.training] += 1

    net.register_forward_hook(count)
    batch = {"x": torch.rand(6, 1, 8, 8), "y": torch.arange(6), "index": torch.arange(6)}
    attack = PGD("8/255", "2/255", 10, start="gaussian", start_scale=scale, project_start=False)
    norm = net.head.norm
    before = norm.running_mean.clone()
    with frozen(model, "eval"):
        batch["x_adv"] = attack(objective.inner(model, batch), batch["x"])
    assert torch.equal(norm.running_mean, before)
    assert norm.num_batches_tracked == 0
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert model.training
    delta = (batch["x_adv"] - batch["x"]).abs().max()
    assert 0 < delta <= 8 / 255 + 1e-6
    objective.outer(model, batch).backward()
    assert passes == {False: evaluated, True: trained}
    assert norm.num_batches_tracked == trained
    assert all(p.grad is not None for p in model.parameters())
