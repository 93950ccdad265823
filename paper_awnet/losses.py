"""The equations of the training loss, in their order; tags as in :mod:`paper_awnet.method`."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from common.attacks.losses import cross_entropy, full_precision
from common.errors import check_choice
from paper_awnet.method import ADVERSARIAL, CLEAN

Scale = Literal["classmean", "batchmean"]


def distillation(teacher_logits: Tensor, logits: Tensor, scale: Scale = "classmean") -> Tensor:
    r"""KL(q, s), the mean of :math:`q_k \log(q_k + 10^{-5}) - q_k \log s_k` [M].

    ``classmean`` is the code's form: the mean over classes as well as images, times K/10, so that
    its size does not depend on K. ``batchmean`` sums over classes, ten times as much, for runs of
    few steps [D].

    Args:
        teacher_logits: Of q, ``(N, K)``; constant.
        logits: Of s, ``(N, K)``.
        scale: Which.

    Returns:
        A scalar.
    """
    check_choice("scale", scale, Scale)
    q = full_precision(teacher_logits).detach().softmax(dim=1)
    log_s = full_precision(logits).log_softmax(dim=1)
    terms = q * torch.log(q + 1e-5) - q * log_s
    if scale == "batchmean":
        return terms.sum(dim=1).mean()
    return terms.mean() * (logits.shape[1] / 10)


def type_loss(type_logits: Tensor, types: Tensor) -> Tensor:
    """L_type, the mean cross-entropy of u ``(N, 2)`` with the types ``(N,)`` [F][D]."""
    return cross_entropy(type_logits, types).mean()


def balanced(w_nat: Tensor, losses: Tensor, initial: Tensor, eta: float, beta: float) -> Tensor:
    r"""The next weight of the clean loss [M].

    .. math:: r_i = (L_i / L_i(0))^\beta, \quad
              w_{nat} \leftarrow w_{nat} - \eta (w_{nat} - r_{nat} / (r_{nat} + r_{adv}))

    Args:
        w_nat: The present one.
        losses: (L_nat, L_adv) of this step.
        initial: Those of the first step.
        eta: Rate.
        beta: Exponent.
    """
    tiny = torch.finfo(losses.dtype).tiny
    r = (losses.clamp_min(tiny) / initial.clamp_min(tiny)) ** beta
    return w_nat - eta * (w_nat - r[0] / r.sum())


def negative_entropy(probabilities: Tensor) -> Tensor:
    """h, the mean over images and classes of q log(q + 1e-5) [M]; nearer to 0 is more certain."""
    return (probabilities * torch.log(probabilities + 1e-5)).mean()


def signal_statistics(signals: Sequence[Tensor], types: Tensor) -> dict[str, Tensor]:
    """What tells whether the filters move at all: by block, over a batch.

    ``omega<j>_mean``, ``omega<j>_std`` (over images, mean over filters) and ``omega<j>_shift``, the
    mean over filters of the distance between the means of the two types.
    """
    found = {}
    for j, omega in enumerate(signals, 1):
        values = omega.detach()
        found[f"omega{j}_mean"] = values.mean()
        found[f"omega{j}_std"] = values.std(dim=0, correction=0).mean()
        means = [values[types == t].mean(dim=0) for t in (CLEAN, ADVERSARIAL)]
        found[f"omega{j}_shift"] = (means[1] - means[0]).abs().mean()
    return found


def mean_over_ranks(values: Tensor, count: int) -> tuple[Tensor, Tensor | int]:
    """The same in every process: means over its examples as the means over those of all.

    Args:
        values: Means, ``(M,)``.
        count: Of how many examples in this process.

    Returns:
        The means, ``(M,)``, and of how many examples in all processes.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        total = torch.cat([values.detach() * count, values.new_tensor([count])])
        torch.distributed.all_reduce(total)
        return total[:-1] / total[-1], total[-1]
    return values.detach(), count
