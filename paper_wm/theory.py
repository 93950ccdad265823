"""What follows from the definitions alone: the noise gain of a weight map [M].

It depends neither on training nor on the paper: a local mean averages white noise away, sharpening
amplifies it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import ConfigurationError
from paper_wm.method import WeightMap, reduce


def layer_noise_gain(layer: WeightMap) -> Tensor:
    r"""Output variance, ``(C, H, W)`` float64, for white noise of variance 1 at the layer's input.

    With the filter K, :math:`G_{ij} = \sum_{ab} K_{ab}^2 M_{i+a, j+b}^2`; where the filter comes
    before the map, :math:`G_{ij} = M_{ij}^2 \sum_{ab} K_{ab}^2`, the sum over positions inside.

    Raises:
        ConfigurationError: For the ``subtract`` variants, which add the unweighted input.
    """
    if layer.variant.startswith("subtract"):
        raise ConfigurationError(
            f"{layer.variant} is no filter of the weighted input; no closed form"
        )
    k = layer.kernel_size
    impulse = torch.zeros(1, 1, k, k, dtype=torch.float64)
    impulse[..., k // 2, k // 2] = 1.0
    kernel = reduce(impulse, layer.variant, k, layer.kernel_norm, layer.lam).square()
    variance = layer.map.detach().cpu().double().expand(layer.shape).square()
    is_last = layer.order == "reduce_then_weight"
    inside = torch.ones_like(variance) if is_last else variance
    filtered = F.conv2d(inside[:, None], kernel, padding=k // 2)[:, 0]
    return filtered * variance if is_last else filtered
