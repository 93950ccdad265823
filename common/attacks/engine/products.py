"""Convolutions of small maps, and strided ones of single pixels, as one matrix product.

On a map hardly larger than its filter a convolution takes most pixels into most outputs. Then a
product of whole maps with one matrix, which has zeros where the filter does not reach, is faster on
a CPU than a convolution, most of all its gradient for the image. Where a number is not finite, what
the filter does not reach is not either.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.attacks.engine.factors import FactorConv2d

_LARGEST = 4 * 2**20  # numbers in a matrix
_MOST_KEPT = 2**20  # numbers
_SMALL = 2**16  # multiplications of a convolution
_VECTOR = 8  # channels
_NARROW = 64  # channels of a 1x1 convolution

Maps = tuple[int, int] | None
"""Height and width of the maps that are multiplied as a whole; ``None`` for pixel by pixel."""


class ProductConv2d(FactorConv2d):
    """A convolution with ``factors``; a plain one without them and for maps of other sizes.

    In the layout ``NHWC`` neither the images nor the outputs are copied, but for strides of a 1x1
    filter.
    """

    maps: Maps
    reached: Tensor | None = None
    """What :meth:`_reached` keeps."""

    def _made(self, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor | None]:
        if self.maps is None:
            return {"factors": weight[:, :, 0, 0], "biases": bias}
        reached = self._reached(self.maps, weight)
        taps = reached.flatten(0, 3) @ weight.flatten(2).flatten(0, 1).T
        matrix = taps.view(*reached.shape[:4], *weight.shape[:2]).permute(0, 1, 4, 2, 3, 5)
        outputs = reached.shape[:2].numel()
        factors = matrix.reshape(outputs * self.out_channels, -1)
        return {"factors": factors, "biases": None if bias is None else bias.repeat(outputs)}

    def _reached(self, maps: tuple[int, int], weight: Tensor) -> Tensor:
        """One where a filter's entry meets a pixel: outputs, pixels, entries ``(P, Q, H, W, k)``.

        Kept from attack to attack if it is small.
        """
        if self.reached is not None and self.reached.dtype == weight.dtype:
            return self.reached
        down, across = (_met(*axis, like=weight) for axis in _axes(self, maps))
        reached = torch.einsum("hpk,wql->pqhwkl", down, across).flatten(4)
        if type(reached) is Tensor and reached.numel() <= _MOST_KEPT:
            self.reached = reached
        return reached

    def forward(self, input: Tensor) -> Tensor:
        """Images ``(N, in, H, W)`` to ``(N, out, H', W')``; without ``N`` as well."""
        suits = input.ndim == 4 and self.maps in (None, tuple(input.shape[2:])) and self.is_planned
        factors = self._parameters.get("factors") if suits else None
        if factors is None or torch.is_autocast_enabled("cpu"):
            return super().forward(input)
        pixels = input.permute(0, 2, 3, 1)
        if self.maps is None:
            pixels = pixels[:, :: self.stride[0], :: self.stride[1]]
            height, width = pixels.shape[1:3]
            rows = pixels.reshape(-1, self.in_channels)
        else:
            height, width = (_outputs(*axis) for axis in _axes(self, self.maps))
            rows = pixels.flatten(1)
        y = F.linear(rows, factors, self._parameters.get("biases"))
        return y.view(len(input), height, width, self.out_channels).permute(0, 3, 1, 2)


def suits_product(conv: nn.Conv2d, size: tuple[int, int]) -> bool:
    """Whether a convolution of maps of this size is faster as a matrix product.

    The product has the more multiplications the larger the map is beside the filter. The
    convolution fills whole vectors of channels, is half as fast with strides, and costs more to
    call than to compute if it is small.
    """
    is_plain = conv.groups == 1 and conv.dilation == (1, 1) and conv.padding_mode == "zeros"
    if not is_plain or isinstance(conv.padding, str):
        return False
    channels, is_strided = (conv.in_channels, conv.out_channels), conv.stride != (1, 1)
    if is_pixelwise(conv):
        return is_strided and min(channels) < _NARROW
    outputs = math.prod(_outputs(*axis) for axis in _axes(conv, size))
    product = math.prod((*channels, *size, outputs))
    filled = math.prod((*(max(_VECTOR, n) for n in channels), *conv.kernel_size, outputs))
    slack = 2 if is_strided or filled <= _SMALL else 1
    return 0 < product <= min(slack * filled, _LARGEST)


def is_pixelwise(conv: nn.Conv2d) -> bool:
    """Whether every output is made from one pixel."""
    return conv.kernel_size == (1, 1) and conv.padding == (0, 0)


def _axes(conv: nn.Conv2d, size: tuple[int, int]) -> list[tuple[int, int, int, int]]:
    """Length of the map, the filter's length, stride and padding, for height and width."""
    padding: Any = conv.padding
    return list(zip(size, conv.kernel_size, conv.stride, padding, strict=True))


def _outputs(length: int, kernel: int, stride: int, padding: int) -> int:
    return max(0, (length + 2 * padding - kernel) // stride + 1)


def _met(length: int, kernel: int, stride: int, padding: int, like: Tensor) -> Tensor:
    """One where a filter's entry meets a pixel: ``(pixels, outputs, entries)`` of an axis."""
    axis = torch.eye(length, dtype=like.dtype, device=like.device)
    return F.pad(axis, (padding, padding)).unfold(1, kernel, stride)
