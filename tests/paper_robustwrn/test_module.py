"""The official margin loss stands still where its batch sum is not positive; ours does not."""

import torch
from torch import Tensor, nn

from common.attacks.losses import hinge_margin
from common.attacks.pgd import PGD
from paper_robustwrn.module import coupled_margin


class Linear(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        score = 3 * x[:, 0, 0, 0] - x[:, 0, 0, 1]
        return torch.stack([score, -score], dim=1)


def batch(*pixels: tuple[float, float]) -> dict[str, Tensor]:
    x = torch.tensor(pixels).view(-1, 1, 1, 2)
    return {"x": x, "y": torch.zeros(len(x), dtype=torch.int64), "index": torch.arange(len(x))}


def test_value_and_gradient_are_those_of_the_batch_sum() -> None:
    model, b = Linear(), batch((0.5, 0.2), (0.3, 0.6), (0.6, 0.1))
    x = b["x"].clone().requires_grad_()
    ours = coupled_margin(model, b)(x).sum()
    (gradient,) = torch.autograd.grad(ours, x)
    logits = model(x)
    official = -torch.relu(logits[:, 0].sum() - logits[:, 1].sum())
    (expected,) = torch.autograd.grad(official, x)
    torch.testing.assert_close(ours, official)
    torch.testing.assert_close(gradient, expected)


def test_the_official_form_stalls_and_the_per_sample_form_does_not() -> None:
    """One image far on the wrong side silences the attack on all others (invariant 13)."""
    model, b = Linear(), batch((0.5, 0.4), (0.05, 0.9), (0.1, 0.9))
    attack = PGD(0.2, 0.05, 10, start="zero")
    stalled = attack(coupled_margin(model, b), b["x"])
    assert torch.equal(stalled, b["x"])
    moved = attack(lambda x: hinge_margin(model(x), b["y"]), b["x"])
    assert (moved - b["x"]).abs().max() > 0.19
    alone = {key: value[:1] for key, value in b.items()}
    assert not torch.equal(attack(coupled_margin(model, alone), alone["x"]), alone["x"])
