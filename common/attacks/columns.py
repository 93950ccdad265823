"""3x3 convolutions of many channels on small maps as one product of matrices (im2col).

Where a processor has units for bfloat16 matrices (AMX), a product keeps them busier than a
convolution of 512 channels on 4x4 pixels does. Elsewhere the convolution is the faster one.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.attacks.engine.winograd import is_usual_3x3

_LEAST_CHANNELS = 512
_LARGEST_MAP = 16  # pixels


def has_matrix_units() -> bool:
    """Whether this processor multiplies bfloat16 matrices in units of their own."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16", False))


def suits(conv: nn.Conv2d) -> bool:
    """Whether a convolution is one that this computes, and has channels enough."""
    return is_usual_3x3(conv) and min(conv.in_channels, conv.out_channels) >= _LEAST_CHANNELS


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution with stride 1 and one zero around the image.

    Args:
        x: Images ``(N, C, H, W)``.
        weight: ``(out, C, 3, 3)``; read without a copy in the layout ``channels_last``.
        bias: ``(out,)``, or ``None``.

    Returns:
        ``(N, out, H, W)`` in the layout ``channels_last``.
    """
    height, width = x.shape[2:]
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    shifted = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    rows = weight.permute(0, 2, 3, 1).reshape(len(weight), -1)
    return F.linear(torch.cat(shifted, 3), rows, bias).permute(0, 3, 1, 2)


class ColumnsConv2d(nn.Conv2d):
    """A stand-in for a convolution that multiplies matrices where the map is small."""

    def forward(self, input: Tensor) -> Tensor:
        """Images ``(N, in, H, W)`` to ``(N, out, H, W)``; without ``N`` as well."""
        is_small = input.ndim == 4 and input.shape[-2] * input.shape[-1] <= _LARGEST_MAP
        if not is_small or input.device.type != "cpu":
            return super().forward(input)
        return convolve(input.to(self.weight.dtype), self.weight, self.bias)
