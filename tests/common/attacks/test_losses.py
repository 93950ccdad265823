import math

import pytest
import torch
from torch import Tensor

from common.attacks.losses import (
    cross_entropy,
    dlr,
    hinge_margin,
    kl_divergence,
    margin,
    probability_margin,
)

LOSSES = [cross_entropy, margin, hinge_margin, probability_margin, dlr]


@pytest.fixture
def scores() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(12, 5, generator=generator, dtype=torch.float64)
    return logits, torch.randint(0, 5, (12,), generator=generator)


def test_losses_equal_a_rewrite_one_example_at_a_time(scores):
    logits, y = scores
    for i, (z, label) in enumerate(zip(logits.tolist(), y.tolist(), strict=True)):
        total = sum(math.exp(v) for v in z)
        descending = sorted(z, reverse=True)
        gap = max(v for j, v in enumerate(z) if j != label) - z[label]
        assert cross_entropy(logits, y)[i].item() == pytest.approx(-z[label] + math.log(total))
        assert margin(logits, y)[i].item() == pytest.approx(gap)
        assert hinge_margin(logits, y)[i].item() == pytest.approx(-max(50.0 - gap, 0.0))
        assert hinge_margin(logits, y, 1.0)[i].item() == pytest.approx(-max(1.0 - gap, 0.0))
        wrong = max(v for j, v in enumerate(z) if j != label)
        expected = (math.exp(wrong) - math.exp(z[label])) / total
        assert probability_margin(logits, y)[i].item() == pytest.approx(expected)
        expected = gap / (descending[0] - descending[2])
        assert dlr(logits, y)[i].item() == pytest.approx(expected)


def test_kl_divergence_equals_a_rewrite_and_reaches_both_arguments(scores):
    p, _ = scores
    q = p.flip(0).requires_grad_()
    p.requires_grad_()
    result = kl_divergence(p, q)
    for i, (a, b) in enumerate(zip(p.softmax(1).tolist(), q.softmax(1).tolist(), strict=True)):
        expected = sum(s * math.log(s / t) for s, t in zip(a, b, strict=True))
        assert result[i].item() == pytest.approx(expected)
    grad_p, grad_q = torch.autograd.grad(result.sum(), (p, q))
    assert grad_p.abs().min() > 0
    torch.testing.assert_close(grad_q, q.softmax(1) - p.softmax(1))  # the closed form


def test_identities(scores):
    certain, (logits, y) = torch.tensor([[200.0, -200.0, 0.0]]), scores
    assert kl_divergence(certain, certain).item() == 0.0
    assert kl_divergence(certain, certain + 7.0).item() == pytest.approx(0.0, abs=1e-6)
    assert kl_divergence(certain, -certain).item() == pytest.approx(400.0)
    assert torch.equal(margin(logits, y) > 0, logits.argmax(1) != y)
    assert 0 < (margin(logits, y) > 0).sum() < len(y)
    torch.testing.assert_close(dlr(3.7 * logits - 11.0, y), dlr(logits, y))
    led = torch.tensor([[0.0, 60.0, 1.0]], requires_grad=True)
    ceiling = hinge_margin(led, torch.tensor([0]))
    assert ceiling.item() == 0.0
    assert torch.autograd.grad(ceiling.sum(), led)[0].abs().max() == 0.0
    with pytest.raises(ValueError, match="at least 3 classes, got 2"):
        dlr(torch.zeros(1, 2), torch.tensor([0]))


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_pass_gradcheck_and_raise_half_precision(loss, scores):
    logits, y = scores
    assert loss(logits, y).shape == (12,)
    assert torch.autograd.gradcheck(lambda z: loss(z, y), logits.requires_grad_())
    half = logits.detach().to(torch.bfloat16)
    assert loss(half, y).dtype == torch.float32
    torch.testing.assert_close(loss(half, y), loss(half.float(), y))
