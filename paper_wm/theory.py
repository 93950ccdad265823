"""What follows from the definitions alone: the noise gain of a weight map [M].

It depends neither on training nor on the paper: a local mean averages white noise away, sharpening
amplifies it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from paper_wm.method import WeightMap, reduce


def layer_noise_gain(layer: WeightMap) -> Tensor:
    r"""Variance of the output for white noise of variance 1 at the layer's input.

    With the filter K, :math:`G_{ij} = \sum_{ab} K_{ab}^2 M_{i+a, j+b}^2`; where the filter comes
    before the map, :math:`G_{ij} = M_{ij}^2 \sum_{ab} K_{ab}^2`, the sum over positions inside.

    Returns:
        ``(C, H, W)``, float64.

    Raises:
        ConfigurationError: For the ``subtract`` variants, which add the unweighted input.
    """
    k = layer.kernel_size
    impulse = torch.zeros(1, 1, k, k, dtype=torch.float64)
    impulse[..., k // 2, k // 2] = 1.0
    kernel = reduce(impulse, layer.variant, k, layer.kernel_norm, layer.lam)

    def filtered(variance: Tensor) -> Tensor:
        return F.conv2d(variance[:, None], kernel.square(), padding=k // 2)[:, 0]

    variance = layer.map.detach().cpu().double().expand(layer.shape).square()
    if layer.order == "weight_then_reduce":
        return filtered(variance)
    return filtered(torch.ones_like(variance)) * variance
