r"""Why a larger map is safer before average pooling and not before max pooling.

The exact theorem of the paper was not found; D1 to D4 are our own version of it [derived]. One
output channel has a kernel w, stride s and n positions; a perturbation :math:`\delta` of the image
moves position j by :math:`\zeta_j = \langle w, \delta_{patch(j)} \rangle`.

D4, a statement about the two knobs: with circular padding, nearest up-sampling by m and then a
convolution whose stride divides m has the same average-pooled output, :math:`(\sum w)\,\bar x`, as
stride 1 without up-sampling, and so the same :func:`effective_kernel`.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import ConfigurationError, check_choice
from common.networks.resnet import Pool, check_positive
from paper_rcm.method import DigitsNet, EnlargedNetwork

Images = Literal["iid", "smooth", "zero"]
"""Simulated images: uniform pixels, 4x4 uniform values interpolated, or black ones."""

# ------------------------------------------------------------------------- D1: average, exactly


def averaged_convolution(
    x: Tensor, weight: Tensor, stride: int = 1, circular: bool = True
) -> Tensor:
    """Average of each map of a convolution without bias, padded by half the kernel.

    Args:
        x: Images, ``(N, C, H, W)``.
        weight: Kernels of odd side k, ``(D, C, k, k)``.
        stride: Stride s.
        circular: Whether the image continues at its opposite side; otherwise with zeros.

    Returns:
        ``(N, D)``.
    """
    p = weight.shape[-1] // 2
    x = F.pad(x, (p, p, p, p), mode="circular" if circular else "constant")
    return F.conv2d(x, weight, stride=stride).mean((2, 3))


def effective_kernel(weight: Tensor, side: int, stride: int = 1, circular: bool = True) -> Tensor:
    r""":math:`w_{eff}`, the derivative of :func:`averaged_convolution` by the image [derived D1].

    The average moves by :math:`\langle w_{eff}, \delta \rangle`: by standard deviation
    :math:`\sigma \|w_{eff}\|_2` under independent noise of standard deviation :math:`\sigma`, and
    by at most :math:`\epsilon \|w_{eff}\|_1` in an l-infinity ball.

    Args:
        weight: Kernels, ``(D, C, k, k)``.
        side: Height and width of the image.
        stride: Stride s.
        circular: As in :func:`averaged_convolution`.

    Returns:
        ``(D, C, side, side)``.
    """
    x = weight.new_zeros(1, weight.shape[1], side, side, requires_grad=True)
    moved = averaged_convolution(x, weight.detach(), stride, circular)[0]
    return torch.cat([torch.autograd.grad(y, x, retain_graph=True)[0] for y in moved])


def effective_norms(weight: Tensor, side: int, stride: int = 1) -> tuple[Tensor, Tensor]:
    r"""l1 and l2 norms of :func:`effective_kernel` with circular padding, closed [derived D1].

    .. math:: \|w_{eff}\|_1 = \sum_{c,r} |S_{c,r}|, \qquad
        \|w_{eff}\|_2^2 = \frac{s^2}{HW} \sum_{c,r} S_{c,r}^2

    where :math:`S_{c,r}` sums the weights of channel c at offsets congruent to r modulo s. So the
    l2 norm falls as 1 / side, the l1 norm does not depend on it, and refining the stride raises
    neither.

    Args:
        weight: Kernels, ``(D, C, k, k)``.
        side: Height and width of the image.
        stride: Stride s, a divisor of ``side``.

    Returns:
        The l1 and the l2 norms, ``(D,)`` each.

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


# ------------------------------------------------------------------- D2 and D3: radii, and a bound


def overlap(kernel: int, stride: int) -> int:
    """The positions ``ceil(k / s)^2`` that share a pixel; n / overlap of n are independent."""
    return math.ceil(kernel / stride) ** 2


def gamma_avg(positions: int, probability: float, bound: float = 1.0, overlap: int = 1) -> float:
    r"""Radius :math:`b \sqrt{2 q \ln(2 / (1 - p)) / n}` of an average of n responses [derived D2].

    With independent :math:`\zeta_j` of mean 0 and sub-Gaussian scale b, such as values in [-b, b],
    the average stays inside with probability at least p (Hoeffding). It falls with n.

    Args:
        positions: Number n of positions of the map.
        probability: The probability p in [0, 1).
        bound: The scale b: :math:`\epsilon \|w\|_1` for any perturbation in the l-infinity ball,
            :math:`\epsilon \|w\|_2` where its pixels are independent and of mean 0.
        overlap: The number q of :func:`overlap`.

    Raises:
        ConfigurationError: If n is below 1 or p outside [0, 1).
    """
    _check_radius(positions, probability)
    return bound * math.sqrt(2 * overlap * math.log(2 / (1 - probability)) / positions)


def gamma_max(positions: int, probability: float, bound: float = 1.0) -> float:
    r"""Radius :math:`b \sqrt{2 \ln(2 n / (1 - p))}` of a maximum of n responses [derived D3].

    By the union bound over the positions; it grows with n, and is tight on a flat map. With
    :math:`b = \epsilon \|w\|_1` it says nothing, since no response exceeds that b; it does with the
    scale :math:`\epsilon \|w\|_2` of independent pixels.

    Args:
        positions: Number n of positions of the map.
        probability: The probability p in [0, 1).
        bound: The scale b of :func:`gamma_avg`.

    Raises:
        ConfigurationError: If n is below 1 or p outside [0, 1).
    """
    _check_radius(positions, probability)
    return bound * math.sqrt(2 * math.log(2 * positions / (1 - probability)))


def _check_radius(positions: int, probability: float) -> None:
    check_positive(positions=positions)
    if not 0 <= probability < 1:
        raise ConfigurationError(f"probability must lie in [0, 1), got {probability}")


def max_bound(zeta: Tensor) -> Tensor:
    """``max_j |zeta_j|``, which a maximum over positions moves by at most [derived D3].

    Args:
        zeta: Movement of each position, ``(..., n)``.

    Returns:
        ``(...)``.
    """
    return zeta.abs().amax(-1)


# -------------------------------------------------------------------------------- simulation, 7.1


class Movement(NamedTuple):
    """Mean over images of the l2 norm, over channels, of how far pooled features move."""

    avg: float
    max: float


@torch.no_grad()
def simulate(
    side: int,
    stride: int = 1,
    images: Images = "iid",
    rectified: bool = False,
    examples: int = 32,
    channels: int = 64,
    eps: float = 8 / 255,
    seed: int = 0,
) -> Movement:
    """Movement of pooled features of one random convolution under uniform noise [choice].

    The convolution has ``channels`` kernels 3x3 with weights from N(0, 2/27), zero padding 1 and no
    bias; the noise is uniform in [-eps, eps] and is not clamped.

    Args:
        side: Height and width of the images, which is the side of the map at stride 1.
        stride: Stride of the convolution.
        images: What the images are.
        rectified: Whether ReLU stands between convolution and pooling.
        examples: Number of images.
        channels: Number of kernels.
        eps: Radius of the noise, in pixel units.
        seed: Of kernels, images and noise.

    Raises:
        ConfigurationError: If there are no such images, or a count is below 1.
    """
    check_choice("images", images, Images)
    check_positive(side=side, stride=stride, examples=examples, channels=channels)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(channels, 3, 3, 3, generator=generator) * math.sqrt(2 / 27)
    norms = []
    for _ in range(examples):  # one by one: the maps of many large images would not fit a cache
        if images == "smooth":
            x = torch.rand(1, 3, 4, 4, generator=generator)
            x = F.interpolate(x, size=(side, side), mode="bilinear")
        elif images == "iid":
            x = torch.rand(1, 3, side, side, generator=generator)
        else:
            x = torch.zeros(1, 3, side, side)
        delta = (2 * torch.rand(x.shape, generator=generator) - 1) * eps
        clean, moved = (F.conv2d(z, weight, stride=stride, padding=1) for z in (x, x + delta))
        if rectified:
            clean, moved = clean.relu(), moved.relu()
        avg = moved.mean((2, 3)) - clean.mean((2, 3))
        norms.append(torch.stack([avg.norm(), (moved.amax((2, 3)) - clean.amax((2, 3))).norm()]))
    return Movement(*torch.stack(norms).mean(0).tolist())


# ------------------------------------------------------------- a randomly initialised network, 9(a)


@torch.no_grad()
def movement(net: EnlargedNetwork, x: Tensor, noise: float, seed: int = 0) -> float:
    """Mean over images of ``||f(x + delta) - f(x)||_2``, f the pooled feature, uniform noise.

    The absolute norm is the claim's: relative to ``||f||`` or to its spread over images the effect
    of average pooling can hide [measured].

    Args:
        net: The network, in the mode to be measured.
        x: Images, ``(N, C, H, W)``.
        noise: Radius of the noise in pixel units; its result is not clamped.
        seed: Of the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    delta = (2 * torch.rand(x.shape, generator=generator) - 1) * noise
    moved = net.pooled(x + delta.to(x)) - net.pooled(x)
    return float(moved.norm(dim=1).mean())


def random_movement(
    x: Tensor,
    strides: Sequence[int],
    pool: Pool = "avg",
    scale_factor: float = 1,
    noise: float = 0.15,
    seeds: Iterable[int] = range(10),
    mean: Sequence[float] = (0.3,),
    std: Sequence[float] = (0.37,),
    calibration: Tensor | None = None,
) -> list[float]:
    """:func:`movement` of randomly initialised networks for digits, one for each seed [choice].

    Networks are in evaluation mode, with batch-norm statistics as they start (0 and 1) or those of
    the images ``calibration``.

    Args:
        x: Images, ``(N, 1, 8, 8)``.
        strides: Of :class:`~paper_rcm.method.DigitsNet`.
        pool: Of its head.
        scale_factor: Nearest up-sampling.
        noise: Radius of the noise.
        seeds: Of weights and noise.
        mean: Mean of the pixels.
        std: Their standard deviation.
        calibration: Images that batch-norm statistics are computed from, as one batch.
    """
    found = []
    for seed in seeds:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            arch = DigitsNet(strides, in_channels=x.shape[1], pool=pool)
        net = EnlargedNetwork(arch, scale_factor, mean=mean, std=std)
        if calibration is not None:
            for module in net.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.momentum = None  # a cumulative average: that of the one batch
            with torch.no_grad():
                net.train()(calibration)
        found.append(movement(net.eval(), x, noise, seed))
    return found
