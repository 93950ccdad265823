"""What follows from the definitions alone: responses, noise gains, norms, gradients [M].

None of it depends on training, and none of it was read in the paper. It bounds what the layer can
do: a local mean keeps low frequencies and averages white noise away, sharpening does the opposite.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import ConfigurationError, check_choice
from paper_wm.method import KernelNorm, Variant, WeightMap


def kernel(
    variant: Variant, k: int = 3, kernel_norm: KernelNorm = "sum", lam: float = 1.0
) -> Tensor:
    """The filter of a variant as a matrix ``(k, k)``, float64.

    Raises:
        ConfigurationError: For the ``subtract`` variants, which are no filter of the weighted map.
    """
    check_choice("variant", variant, Variant)
    check_choice("kernel_norm", kernel_norm, KernelNorm)
    centre = torch.zeros(k, k, dtype=torch.float64)
    centre[k // 2, k // 2] = 1.0
    box = torch.ones(k, k, dtype=torch.float64)
    if variant == "smoothing":
        return box if kernel_norm == "sum" else box / k**2
    if variant == "scale":
        return centre
    if variant in ("highpass", "unsharp"):
        detail = centre - box / k**2
        return detail if variant == "highpass" else centre + lam * detail
    raise ConfigurationError(
        f"{variant} adds the unweighted input, so no single kernel describes it; choose smoothing, "
        "unsharp, highpass or scale"
    )


def kernel_of(layer: WeightMap) -> Tensor:
    """The filter of a layer, ``(k, k)``."""
    return kernel(layer.variant, layer.kernel_size, layer.kernel_norm, layer.lam)


def _correlate(maps: Tensor, weights: Tensor) -> Tensor:
    """Sums of neighbours with zeros around, ``(C, H, W)``."""
    k = weights.shape[0]
    return F.conv2d(maps.double()[:, None], weights[None, None], padding=k // 2)[:, 0]


def constant_response(weights: Tensor, height: int, width: int) -> Tensor:
    """What a filter makes of a map of ones, ``(H, W)``; its variance grows by the square."""
    return _correlate(torch.ones(1, height, width), weights)[0]


def noise_gain(weights: Tensor, maps: Tensor) -> Tensor:
    r"""Variance of the output for white noise of variance 1 at the layer's input.

    :math:`G_{ij} = \sum_{ab} K_{ab}^2 M_{i+a, j+b}^2`, for weights before the filter.

    Args:
        weights: The filter, ``(k, k)``.
        maps: M, ``(C, H, W)``.

    Returns:
        ``(C, H, W)``, float64.
    """
    return _correlate(maps.detach().double().square(), weights.square())


def layer_noise_gain(layer: WeightMap) -> Tensor:
    """White-noise gain of a layer as it is, ``(C, H, W)``, by the closed form.

    Raises:
        ConfigurationError: For the ``subtract`` variants.
    """
    weights = kernel_of(layer)
    maps = layer.map.detach().cpu().expand(layer.shape)
    if layer.order == "weight_then_reduce":
        return noise_gain(weights, maps)
    return noise_gain(weights, torch.ones_like(maps)) * maps.double().square()


def interior_gain(
    variant: Variant, k: int = 3, kernel_norm: KernelNorm = "sum", lam: float = 1.0
) -> float:
    """White-noise gain of a map of ones away from the border: the sum of squared weights.

    k^2 for the sum kernel; (1 + lam (1 - 1/k^2))^2 + lam^2 (k^2 - 1)/k^4 for unsharp.
    """
    return float(kernel(variant, k, kernel_norm, lam).square().sum())


def box_eigenvalues(height: int, width: int, k: int = 3) -> Tensor:
    r"""Eigenvalues of the box sum on an H x W map, ``(H, W)``, float64.

    The box is a product of two banded matrices. For k = 3 its eigenvalues are
    :math:`(1 + 2\cos\frac{p\pi}{H+1})(1 + 2\cos\frac{q\pi}{W+1})`.
    """

    def band(n: int) -> Tensor:
        if k == 3:
            steps = torch.arange(1, n + 1, dtype=torch.float64)
            return 1.0 + 2.0 * torch.cos(steps * math.pi / (n + 1))
        apart = torch.arange(n)[:, None] - torch.arange(n)[None]
        values: Tensor = torch.linalg.eigvalsh((apart.abs() <= k // 2).double())
        return values

    return torch.outer(band(height), band(width))


def operator_norm(
    variant: Variant,
    height: int,
    width: int,
    k: int = 3,
    kernel_norm: KernelNorm = "sum",
    lam: float = 1.0,
) -> float:
    """Largest factor by which the filter alone, a map of ones, stretches an H x W map in l2.

    Raises:
        ConfigurationError: For the ``subtract`` variants.
    """
    kernel(variant, k, kernel_norm)  # refuses what is no filter
    mean = box_eigenvalues(height, width, k) / k**2
    factors = {
        "smoothing": mean if kernel_norm == "mean" else mean * k**2,
        "unsharp": 1.0 + lam - lam * mean,
        "highpass": 1.0 - mean,
        "scale": torch.ones_like(mean),
    }[variant]
    return float(factors.abs().max())


def input_gradient(layer: WeightMap, upstream: Tensor) -> Tensor:
    """dL/dX = M * K(T), for weights before a filter that is its own transpose.

    Args:
        layer: Not a ``subtract`` variant, ``weight_then_reduce``.
        upstream: T = dL/dY, ``(N, C, H, W)``.
    """
    return layer.map * layer.filtered(upstream)


def map_gradient(layer: WeightMap, x: Tensor, upstream: Tensor) -> Tensor:
    """dL/dM, the sum of X * K(T) over images, and over channels where the map is shared.

    Args:
        layer: As in :func:`input_gradient`.
        x: Input features, ``(N, C, H, W)``.
        upstream: T = dL/dY, the same shape.
    """
    gradient = (x * layer.filtered(upstream)).sum(dim=0)
    return gradient.sum(dim=0, keepdim=True) if layer.shared else gradient


@torch.no_grad()
def dense_matrix(layer: WeightMap) -> Tensor:
    """The layer as a matrix ``(CHW, CHW)`` that maps flattened inputs to outputs.

    For small features: all unit inputs go through at once.
    """
    size = math.prod(layer.shape)
    units = torch.eye(size, dtype=torch.float64, device=layer.map.device)
    outputs: Tensor = layer(units.view(size, *layer.shape))
    return outputs.flatten(1).T
