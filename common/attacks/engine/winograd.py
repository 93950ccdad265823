r"""3x3 convolutions with fewer multiplications: Winograd's :math:`F(m \times m, 3 \times 3)`.

16 outputs of a 3x3 filter take 144 multiplications per channel, or 36 after transforming filter and
image; 4 outputs take 36, or 16 (Winograd 1980; for networks Lavin and Gray, arXiv 1509.09308,
section 4). GPU libraries do this already. On a CPU it is faster for many channels. All steps are
linear in the image: autograd gives derivatives of any order and stores no image.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.attacks.engine.factors import FactorConv2d

POINTS = {2: (0.0, 1.0, -1.0), 4: (0.0, 2 / 3, -2 / 3, 3 / 2, -3 / 2)}
"""By the edge of a tile: where polynomials are evaluated, with infinity. For tiles of 4, reciprocal
pairs have six times the rounding error of a convolution; the usual 0, 1, -1, 2, -2 twelve times."""

_LEAST_CHANNELS = 256
_LEAST_USE = 0.7  # of the pixels of the tiles
_LARGEST_FACTORS = 4 * 2**20  # numbers, of one convolution
_MEMORY = 8 * 2**20  # bytes of transformed images at a time, which fit a processor's cache


def is_usual_3x3(conv: nn.Conv2d) -> bool:
    """Whether it is a plain 3x3 convolution: stride 1, padding 1 with zeros, one group."""
    return (
        conv.kernel_size == (3, 3)
        and conv.stride == (1, 1)
        and conv.dilation == (1, 1)
        and conv.padding in ((1, 1), "same")
        and conv.padding_mode == "zeros"
        and conv.groups == 1
    )


def tile_of(conv: nn.Conv2d, size: tuple[int, int]) -> int | None:
    """The edge of the tiles for a convolution of maps of this size, ``None`` if it is not faster.

    Tiles of 4 take four times the memory of the weights, those of 2 almost twice. Maps that do not
    fill their tiles are not faster, nor large ones, whose transforms cost as much as the products.
    """
    least = min(conv.in_channels, conv.out_channels)
    if not is_usual_3x3(conv) or least < _LEAST_CHANNELS or max(size) > least / 4:
        return None
    tile = 4 if 36 * conv.in_channels * conv.out_channels <= _LARGEST_FACTORS else 2
    height, width = size
    padded = tile**2 * -(-height // tile) * -(-width // tile)
    return tile if height * width >= _LEAST_USE * padded else None


def transformed(weight: Tensor, tile: int) -> Tensor:
    """Filters ``(out, in, 3, 3)`` as the factors ``((tile + 2)^2, out, in)`` of the products."""
    to_points = _at_points(tile, 3).to(weight)
    factors = torch.einsum("ax,by,oixy->aboi", to_points, to_points, weight)
    return factors.reshape(-1, *weight.shape[:2])


def convolve(x: Tensor, factors: Tensor, tile: int) -> Tensor:
    """The convolution with stride 1 and one zero around the image: ``(N, out, H, W)``.

    Args:
        x: Images ``(N, C, H, W)``; not copied if their memory layout is that of the result,
            ``(H, W, N, C)``.
        factors: ``((tile + 2)^2, out, C)``, of :func:`transformed`, in the type of the images.
        tile: Edge of the tiles, 2 or 4.
    """
    n, _, height, width = x.shape
    tiles = n * -(-height // tile) * -(-width // tile)
    size = len(factors) * tiles * max(factors.shape[1:]) * x.element_size()
    parts = max(1, min(-(-size // _MEMORY), n))
    pixels_first = x.permute(2, 3, 0, 1)
    done = [_convolve(part, factors, tile) for part in pixels_first.chunk(parts, 2)]
    return (done[0] if len(done) == 1 else torch.cat(done, 2)).permute(2, 3, 0, 1)


class WinogradConv2d(FactorConv2d):
    """A convolution with ``factors``; a plain one without them.

    The products are never in reduced precision, which is too coarse for the transforms.
    """

    tile: int
    factors: Tensor
    is_contiguous = False
    """Whether the output is copied to the contiguous layout."""

    def _made(self, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor | None]:
        return {"factors": transformed(weight, self.tile)}

    def forward(self, input: Tensor) -> Tensor:
        """Images ``(N, in, H, W)`` to ``(N, out, H, W)``; without ``N`` as well."""
        factors = self._parameters.get("factors")
        if factors is None or not self.is_planned:
            return super().forward(input)
        if input.ndim == 3:
            return self.forward(input[None])[0]
        if torch.is_autocast_enabled("cpu"):
            input = input.to(factors.dtype)
        with torch.autocast("cpu", enabled=False):
            y = convolve(input, factors, self.tile)
            y = y.contiguous() if self.is_contiguous else y
            return y if self.bias is None else y + self.bias.view(-1, 1, 1)


def _convolve(x: Tensor, factors: Tensor, tile: int) -> Tensor:
    """``(H, W, N, C)`` to ``(H, W, N, out)``."""
    height, width, n, channels = x.shape
    points, out = tile + 2, factors.shape[1]
    into_rows, out_of_rows = _maps(tile, height, x)
    into_columns, out_of_columns = _maps(tile, width, x)
    down, across = len(into_rows) // points, len(into_columns) // points
    z = into_rows @ x.reshape(height, width * n * channels)
    z = into_columns @ z.view(points * down, width, n * channels)
    z = z.view(points, down, points, across * n * channels).transpose(1, 2)
    y = z.reshape(points * points, down * across * n, channels) @ factors.transpose(1, 2)
    y = y.view(points, points, down, across * n * out).transpose(1, 2)
    y = out_of_columns @ y.reshape(points * down, points * across, n * out)
    y = out_of_rows @ y.view(points * down, width * n * out)
    return y.view(height, width, n, out)


def _maps(tile: int, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """The matrices from an axis of the image to its tiles' points, and back to the output."""
    if type(like) is Tensor and not torch.compiler.is_compiling():
        return _kept(tile, length, like.dtype)
    return _made(tile, length, like.dtype)


@lru_cache
def _kept(tile: int, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):
        return _made(tile, length, dtype)


def _made(tile: int, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    tiles = -(-length // tile)
    axis = torch.eye(length, dtype=torch.float64, device="cpu")
    windows = F.pad(axis, (1, tiles * tile + 1 - length)).unfold(1, tile + 2, tile)
    into = torch.einsum("ri,ltr->itl", torch.linalg.inv(_at_points(tile, tile + 2)), windows)
    outputs = F.pad(axis, (0, tiles * tile - length)).unfold(1, tile, tile)
    out_of = torch.einsum("ir,ltr->lit", _at_points(tile, tile), outputs)
    return into.reshape(-1, length).to(dtype), out_of.reshape(length, -1).to(dtype)


def _at_points(tile: int, n: int) -> Tensor:
    """From ``n`` coefficients of a polynomial to its values ``(tile + 2, n)``, infinity last."""
    points = torch.tensor(POINTS[tile], dtype=torch.float64, device="cpu")
    powers = points[:, None] ** torch.arange(n, device="cpu")
    return torch.cat([powers, torch.eye(n, dtype=torch.float64, device="cpu")[-1:]])
