r"""Why a larger map is safer before average pooling and not before max pooling.

The exact theorem of the paper was not found; this is our own version [derived]. One output channel
has a kernel w, stride s and n positions; a perturbation :math:`\delta` of the image moves position
j by :math:`\zeta_j = \langle w, \delta_{patch(j)} \rangle`.

- D1. An average over positions is linear in :math:`\delta`: it moves by
  :math:`\langle w_{eff}, \delta \rangle`, under independent noise with standard deviation
  :math:`\sigma \|w_{eff}\|_2`, which falls as 1 / side; see :func:`effective_norms`.
- D2. With probability p it moves by at most :math:`b \sqrt{2 q \ln(2 / (1 - p)) / n}`, where b is
  the sub-Gaussian scale of :math:`\zeta_j` and q the number of positions that share a pixel
  (Hoeffding). The bound falls with n.
- D3. A maximum moves by at most :math:`\max_j |\zeta_j|`, which with probability p is at most
  :math:`b \sqrt{2 \ln(2 n / (1 - p))}` (union bound). It grows with n, and is tight on a flat map.
- D4. With circular padding, nearest up-sampling by m and then a convolution whose stride divides m
  has the average-pooled output :math:`(\sum w)\,\bar x` of stride 1 without up-sampling.

:func:`simulate` measures both poolings beside the prediction of D1.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import ConfigurationError
from common.networks.resnet import check_positive

POOLINGS = ("avg", "max", "predicted")


def effective_norms(weight: Tensor, side: int, stride: int = 1) -> tuple[Tensor, Tensor]:
    r"""l1 and l2 norms of :math:`w_{eff}`, the gradient of the average by the image [derived D1].

    .. math:: \|w_{eff}\|_1 = \sum_{c,r} |S_{c,r}|, \qquad
        \|w_{eff}\|_2^2 = \frac{s^2}{HW} \sum_{c,r} S_{c,r}^2

    where :math:`S_{c,r}` sums the weights of channel c at offsets congruent to r modulo s; padding
    is circular. In an l-infinity ball the average moves by at most :math:`\epsilon \|w_{eff}\|_1`,
    which does not depend on the side. Refining the stride raises neither norm.

    Args:
        weight: Kernels, ``(D, C, k, k)``; there are D norms of each kind.
        side: Height and width of the image.
        stride: Stride s.

    Raises:
        ConfigurationError: If ``stride`` does not divide ``side``.
    """
    check_positive(side=side, stride=stride)
    if side % stride != 0:
        raise ConfigurationError(
            f"the closed form needs a stride that divides the side, got {stride} and {side}"
        )
    padded = F.pad(weight, (0, -weight.shape[-1] % stride) * 2)
    times = padded.shape[-1] // stride
    sums = padded.reshape(*weight.shape[:2], times, stride, times, stride).sum((2, 4)).flatten(1)
    return sums.abs().sum(1), stride / side * sums.square().sum(1).sqrt()


@torch.no_grad()
def simulate(side: int, stride: int = 1, examples: int = 32, seed: int = 0) -> dict[str, float]:
    """Movement of the pooled features of one random convolution under uniform noise [choice].

    ``avg`` and ``max``: mean over images of the l2 norm over channels, for each pooling.
    ``predicted``: D1 for average pooling, the root mean square without border effects.

    The convolution has 64 kernels 3x3 with weights from N(0, 2/27), zero padding 1 and no bias;
    ``examples`` images of ``side`` pixels are uniform in [0, 1]; the noise is uniform in
    [-8/255, 8/255] and is not clamped. The stride divides the side.
    """
    eps = 8 / 255
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(64, 3, 3, 3, generator=generator) * math.sqrt(2 / 27)
    predicted = eps / math.sqrt(3) * float(effective_norms(weight, side, stride)[1].norm())
    norms = []
    for _ in range(examples):  # one by one: the maps of many large images would not fit a cache
        x = torch.rand(1, 3, side, side, generator=generator)
        delta = (2 * torch.rand(x.shape, generator=generator) - 1) * eps
        clean, moved = (F.conv2d(z, weight, stride=stride, padding=1) for z in (x, x + delta))
        avg = moved.mean((2, 3)) - clean.mean((2, 3))
        norms.append(torch.stack([avg.norm(), (moved.amax((2, 3)) - clean.amax((2, 3))).norm()]))
    return dict(zip(POOLINGS, [*torch.stack(norms).mean(0).tolist(), predicted], strict=True))


def simulation(
    sides: Sequence[int], strides: Sequence[int]
) -> dict[str, dict[str, dict[int, float]]]:
    """:func:`simulate` by ``side`` and by ``stride`` on 32 pixels: pooling -> place -> movement."""
    axes = {
        "side": {side: simulate(side) for side in sides},
        "stride": {stride: simulate(32, stride) for stride in strides},
    }
    return {
        axis: {key: {at: one[key] for at, one in moved.items()} for key in POOLINGS}
        for axis, moved in axes.items()
    }
