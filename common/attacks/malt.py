"""MALT: the order in which a targeted attack tries its targets (Melamed, Yehudai & Shamir 2024)."""

import math

import torch
from torch import Tensor

from common.attacks.geometry import Norm, as_pixels, finite, norm_of
from common.attacks.losses import Predict, full_precision
from common.errors import check_choice

CANDIDATES = 100
"""Classes with the largest scores, among which the targets are chosen."""
_DUAL = {"linf": 1.0, "l2": 2.0, "l1": math.inf}


def malt_targets(predict: Predict, x: Tensor, y: Tensor, count: int, norm: Norm) -> Tensor:
    r"""The classes that are nearest if the network is linear, the nearest first.

    For each of the :data:`CANDIDATES` wrong classes j with the largest scores, the distance to its
    boundary is :math:`(z_y - z_j) / \|\nabla_x (z_j - z_y)\|_q`, with q dual to the ball's norm
    (Section 3). Costs one forward pass and one backward pass per candidate. Classes without a
    finite gradient other than zero come last, by their scores.

    Args:
        predict: Images to logits ``(N, K)``.
        x: Images in [0, 1], ``(N, C, H, W)``.
        y: Labels, ``(N,)``.
        count: Number of targets, at most K - 1.
        norm: Of the ball.

    Returns:
        Classes ``(N, min(count, K - 1))``, int64.

    Raises:
        ConfigurationError: If the norm is none of linf, l2 and l1.
    """
    check_choice("norm", norm, Norm)
    with torch.inference_mode(False), torch.enable_grad():
        x = as_pixels(x).requires_grad_()
        z, true = full_precision(predict(x)), y.unsqueeze(1)
        found = min(CANDIDATES, z.shape[1] - 1)
        wrong = z.detach().scatter(1, true, -torch.inf).topk(found, dim=1).indices
        gaps = z.gather(1, wrong) - z.gather(1, true)  # below 0 while y is predicted
        slopes = []
        for gap in gaps.unbind(dim=1):
            (gradient,) = torch.autograd.grad(gap.sum(), x, retain_graph=True)
            slopes.append(norm_of(finite(gradient), _DUAL[norm]).flatten())
    slope = torch.stack(slopes, dim=1)
    distance = torch.where(slope > 0.0, -gaps.detach() / slope, torch.inf)
    order = distance.argsort(dim=1, stable=True)[:, :count]
    return wrong.gather(1, order)
