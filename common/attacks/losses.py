"""Losses an attack climbs and an objective averages; each maps logits to one number per example.

Logits are unnormalised scores ``(N, K)``, labels integers ``(N,)`` in ``[0, K)``, results ``(N,)``.
Half-precision logits are raised to float32 first: differences of large scores need its digits.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Predict = Callable[[Tensor], Tensor]
"""Images ``(N, ...)`` -> logits ``(N, K)``."""


def full_precision(logits: Tensor) -> Tensor:
    """The same logits, in float32 if they came in half precision."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def classify(logits: Tensor) -> Tensor:
    """Predicted classes ``(N,)``; -1, which is no class, where any score is NaN or infinite."""
    return logits.argmax(dim=1).masked_fill(~torch.isfinite(logits).all(dim=1), -1)


def as_class(predicted: Tensor, y: Tensor, num_classes: int) -> Tensor:
    """The predictions of :func:`classify` with a wrong class for -1, which metrics cannot count."""
    return torch.where(predicted < 0, (y + 1) % num_classes, predicted)


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    r"""Cross-entropy, :math:`-\log \mathrm{softmax}(z)_y`, in nats.

    The inner loss of Madry et al. 2018, Eq. (2.1).
    """
    return F.cross_entropy(full_precision(logits), y, reduction="none")


def label_loss(model: Predict, y: Tensor) -> Callable[[Tensor], Tensor]:
    """The loss of the plain attack: x' ``(N, C, H, W)`` -> cross-entropy with ``y``, ``(N,)``."""
    return lambda x: cross_entropy(model(x), y)


def kl_divergence(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    r"""Kullback-Leibler divergence :math:`\sum_k p_k (\log p_k - \log q_k)`, in nats.

    The regulariser of TRADES (Zhang et al. 2019, Eq. (5)) with p the clean and q the adversarial
    prediction. Gradients reach both arguments; detach ``logits_p`` where it is a constant.
    """
    log_p = F.log_softmax(full_precision(logits_p), dim=1)
    log_q = F.log_softmax(full_precision(logits_q), dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)


def margin(logits: Tensor, y: Tensor) -> Tensor:
    r"""CW margin, :math:`\max_{j \ne y} z_j - z_y` (Carlini & Wagner 2017, f_6, untargeted).

    Positive when misclassified, negative when correct, zero at a tie.
    """
    z, true = full_precision(logits), y.unsqueeze(1)
    return z.scatter(1, true, -torch.inf).amax(dim=1) - z.gather(1, true).squeeze(1)


def hinge_margin(logits: Tensor, y: Tensor, kappa: float = 50.0) -> Tensor:
    r"""Margin with a ceiling, :math:`-\max(z_y - \max_{j \ne y} z_j + \kappa, 0)`.

    The CW-inf loss of projected-gradient codes: Carlini & Wagner 2017, f_6 with confidence
    ``kappa``, up to a constant. The gradient is zero once a wrong class leads by ``kappa``.
    """
    return (margin(logits, y) - kappa).clamp(max=0.0)


def probability_margin(logits: Tensor, y: Tensor) -> Tensor:
    r"""Margin of softmax probabilities, :math:`\max_{j \ne y} p_j - p_y`, in [-1, 1].

    The loss of PMA (Xie et al. 2025). The logits need a moderate spread: where the softmax
    saturates, its gradient vanishes.
    """
    return margin(full_precision(logits).softmax(dim=1), y)


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    r"""Difference of logits ratio, :math:`-(z_y - \max_{j \ne y} z_j) / (z_{\pi_1} - z_{\pi_3})`.

    Croce & Hein 2020 (AutoAttack), Section 4: the margin made invariant to shifts and rescaling of
    the logits; :math:`\pi` sorts them in decreasing order.

    Raises:
        ValueError: With fewer than three classes, where the third largest logit does not exist.
    """
    if logits.shape[1] < 3:
        raise ValueError(
            f"the DLR loss divides by the gap between the largest and the third largest logit and "
            f"needs at least 3 classes, got {logits.shape[1]}; use the margin instead"
        )
    z = full_precision(logits)
    top = z.topk(3, dim=1).values
    return margin(z, y) / (top[:, 0] - top[:, 2] + 1e-12)
