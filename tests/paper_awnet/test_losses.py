"""Distillation, balance and types against slow rewrites and known cases."""

import math

import pytest
import torch

from common.errors import ConfigurationError
from paper_awnet.losses import (
    balanced,
    distillation,
    mean_over_ranks,
    negative_entropy,
    signal_statistics,
    type_loss,
)


def slow_distillation(q_logits, s_logits, scale) -> float:
    n, k = q_logits.shape
    total = 0.0
    for a, b in zip(q_logits.double().tolist(), s_logits.double().tolist(), strict=True):
        q = [math.exp(v) / sum(map(math.exp, a)) for v in a]
        s = [math.exp(v) / sum(map(math.exp, b)) for v in b]
        total += sum(
            qk * math.log(qk + 1e-5) - qk * math.log(sk) for qk, sk in zip(q, s, strict=True)
        )
    return total / n if scale == "batchmean" else total / (n * k) * k / 10


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("scale", ["classmean", "batchmean"])
def test_distillation_is_what_it_says(scale, classes) -> None:
    q, s = torch.randn(4, classes), torch.randn(4, classes)
    found = distillation(q, s, scale).item()
    assert found == pytest.approx(slow_distillation(q, s, scale), rel=1e-4)


def test_distillation_is_nearly_the_divergence() -> None:
    """Invariant 9: the constant adds between 0 and 1e-5 to the mean over images and classes."""
    q, s = torch.randn(50, 10, dtype=torch.float64), torch.randn(50, 10, dtype=torch.float64)
    divergence = torch.nn.functional.kl_div(s.log_softmax(1), q.softmax(1), reduction="batchmean")
    extra = distillation(q, s) - divergence / 10
    assert 0 < extra <= 1e-5


def test_a_student_like_its_teacher_is_at_rest_and_the_teacher_is_constant() -> None:
    z = torch.randn(5, 10, requires_grad=True)
    teacher = z.detach().clone().requires_grad_()
    loss = distillation(teacher, z)
    grad, other = torch.autograd.grad(loss, (z, teacher), allow_unused=True)
    assert grad.abs().max() < 1e-7
    assert other is None


def test_type_loss_is_half_of_each() -> None:
    u = torch.randn(6, 2)
    log_p = u.log_softmax(1)
    expected = -(log_p[:3, 0].mean() + log_p[3:, 1].mean()) / 2
    types = torch.tensor([0, 0, 0, 1, 1, 1])
    assert torch.allclose(type_loss(u, types), expected)


def test_balance() -> None:
    """Invariant 10."""
    half, first = torch.tensor(0.5), torch.tensor([0.4, 2.0])
    assert balanced(half, first, first, 0.025, 1.0) == 0.5
    # Both have fallen to a half of what they were: a fixed point.
    assert balanced(half, first / 2, first, 0.025, 1.0) == pytest.approx(0.5)
    # The clean loss has shrunk less, so it gets the larger weight.
    w = balanced(half, torch.tensor([0.36, 1.0]), first, 0.025, 1.0)
    r = (0.9, 0.5)
    assert w.item() == pytest.approx(0.5 - 0.025 * (0.5 - r[0] / sum(r)))
    assert w > 0.5
    squared = balanced(half, torch.tensor([0.36, 1.0]), first, 0.025, 2.0)
    assert squared > w


def test_weights_stay_inside_and_finite_whatever_the_losses() -> None:
    w, first = torch.tensor(0.5), torch.tensor([1.0, 1.0])
    for losses in ([1e-30, 5.0], [0.0, 0.0], [9.0, 1e-12], [0.0, 3.0]) * 200:
        w = balanced(w, torch.tensor(losses), first, 0.025, 1.0)
        assert 0 < w < 1


def test_negative_entropy() -> None:
    flat, sharp = torch.full((3, 10), 0.1), torch.eye(10)[:3] * 0.9 + 0.01
    assert negative_entropy(flat).item() == pytest.approx(0.1 * math.log(0.1 + 1e-5))
    assert negative_entropy(flat) < negative_entropy(sharp) < 0


def test_signal_statistics() -> None:
    omega = torch.tensor([[1.0, 2.0], [1.0, 4.0], [3.0, 2.0], [3.0, 4.0]])
    found = signal_statistics([omega], torch.tensor([0, 0, 1, 1]))
    assert found["omega1_mean"] == 2.5
    assert found["omega1_std"] == 1.0
    assert found["omega1_shift"] == 1.0  # 2 for the first filter, 0 for the second


def test_one_process_has_its_own_mean() -> None:
    values = torch.tensor([1.0, 2.0], requires_grad=True)
    found, examples = mean_over_ranks(values, 3)
    assert examples == 3
    assert torch.equal(found, values)
    assert not found.requires_grad


def test_unknown_scale() -> None:
    with pytest.raises(ConfigurationError, match="classmean, batchmean, got 'mean'"):
        distillation(torch.zeros(2, 3), torch.zeros(2, 3), "mean")
