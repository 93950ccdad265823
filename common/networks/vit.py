"""Vision transformers for small images (Dosovitskiy et al., ICLR 2021; Lee et al. 2021).

Shifted patch tokenisation and locality self-attention are those of S. H. Lee, S. Lee and B. C.
Song, "Vision Transformer for Small-Size Datasets", arXiv 2112.13492.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import ConfigurationError
from common.networks.backbone import Backbone
from common.networks.normalize import Statistics
from common.networks.resnet import check_drop_rates, check_positive, named_sequence


class Tokens(nn.Module):
    """One vector for each patch, a class token before them, and learned positions added.

    With ``shifted`` a patch also holds the same pixels of the image moved by one pixel to each of
    the four sides, with zeros moving in, and is layer-normalised (Lee et al. 2021, Sec. 3.2). The
    class token and the positions start from N(0, 1). ``dim`` is the length of a token.
    """

    def __init__(
        self,
        in_channels: int,
        image_size: int,
        patch: int,
        dim: int,
        drop_rate: float = 0.1,
        shifted: bool = False,
    ) -> None:
        super().__init__()
        self.image_size, self.patch, self.shifted = image_size, patch, shifted
        values = in_channels * patch**2 * (5 if shifted else 1)
        self.norm = nn.LayerNorm(values) if shifted else nn.Identity()
        self.linear = nn.Linear(values, dim)
        self.token = nn.Parameter(torch.randn(1, 1, dim))
        self.positions = nn.Parameter(torch.randn(1, (image_size // patch) ** 2 + 1, dim))
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` to ``(N, T + 1, dim)``, T patches in reading order."""
        if x.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"the positions were made for {self.image_size}x{self.image_size} pixels, got "
                f"{x.shape[-2]}x{x.shape[-1]}; set image_size to what reaches the network"
            )
        if self.shifted:
            moves = ((1, -1, 0, 0), (-1, 1, 0, 0), (0, 0, 1, -1), (0, 0, -1, 1))
            x = torch.cat([x, *(F.pad(x, move) for move in moves)], dim=1)
        patches = F.unfold(x, self.patch, stride=self.patch).transpose(1, 2)
        z = self.linear(self.norm(patches))
        z = torch.cat([self.token.expand(len(z), -1, -1), z], dim=1) + self.positions
        out: Tensor = self.drop(z)
        return out


class Attention(nn.Module):
    """Multi-head self-attention on layer-normalised tokens.

    With ``local`` the temperature is learned, one for the layer, and no token attends to itself
    (Lee et al. 2021, Sec. 3.3). It is stored as a logarithm and starts from the usual one.
    """

    def __init__(
        self, dim: int, heads: int, head_dim: int, drop_rate: float = 0.1, local: bool = False
    ) -> None:
        super().__init__()
        self.heads, self.head_dim, self.drop_rate, self.local = heads, head_dim, drop_rate, local
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * heads * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, dim)
        self.drop = nn.Dropout(drop_rate)
        if local:
            self.log_scale = nn.Parameter(torch.tensor(float(head_dim)).log() * -0.5)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, T, dim)`` to the same shape, without the residual."""
        n, t, _ = x.shape
        qkv = self.qkv(self.norm(x)).view(n, t, 3, self.heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mask, scale = None, None
        if self.local:
            mask = ~torch.eye(t, dtype=torch.bool, device=x.device)
            q, scale = q * self.log_scale.exp(), 1.0
        p = self.drop_rate if self.training else 0.0
        z = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p, scale=scale)
        out: Tensor = self.drop(self.out(z.transpose(1, 2).reshape(n, t, -1)))
        return out


class Encoder(nn.Module):
    """One pre-norm layer: attention and a two-layer perceptron, each added to its input."""

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int,
        mlp_dim: int,
        drop_rate: float = 0.1,
        local: bool = False,
    ) -> None:
        super().__init__()
        self.attention = Attention(dim, heads, head_dim, drop_rate, local)
        self.mlp = named_sequence(
            norm=nn.LayerNorm(dim),
            linear1=nn.Linear(dim, mlp_dim),
            act=nn.GELU(),
            drop1=nn.Dropout(drop_rate),
            linear2=nn.Linear(mlp_dim, dim),
            drop2=nn.Dropout(drop_rate),
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(N, T, dim)`` to the same shape."""
        x = x + self.attention(x)
        out: Tensor = x + self.mlp(x)
        return out


class MeanTokens(nn.Module):
    """Mean over the tokens, class token included."""

    def forward(self, x: Tensor) -> Tensor:
        """``(N, T, dim)`` to ``(N, dim)``."""
        return x.mean(1)


class ViT(Backbone):
    """Vision transformer: tokens, pre-norm layers, and a linear head on the mean token.

    ``stem`` makes the tokens, ``stages[i]`` is one layer, ``head`` is pool - norm - linear; the
    pool is the mean over all tokens, class token included. The image size is fixed by the learned
    positions. Apart from those and the class token, weights start from PyTorch's defaults.

    Args:
        image_size: Height and width of the images that reach this network.
        patch: Height and width of a patch.
        dim: Length of a token.
        depth: Number of layers.
        heads: Attention heads.
        head_dim: Length of a query.
        mlp_dim: Width of the perceptrons.
        drop_rate: Dropout in the layers.
        embedding_drop_rate: Dropout of the tokens before the first layer.
        shifted: Shifted patch tokenisation.
        local: Locality self-attention.
        num_classes: Number of classes K.
        in_channels: Channels of the images.
        mean: Means of :class:`~common.networks.normalize.Normalize`; ``None`` keeps the pixels.
        std: Its standard deviations.
    """

    def __init__(
        self,
        image_size: int = 32,
        patch: int = 4,
        dim: int = 512,
        depth: int = 6,
        heads: int = 8,
        head_dim: int = 64,
        mlp_dim: int = 512,
        drop_rate: float = 0.1,
        embedding_drop_rate: float = 0.1,
        shifted: bool = False,
        local: bool = False,
        num_classes: int = 10,
        in_channels: int = 3,
        mean: Statistics = None,
        std: Statistics = None,
    ) -> None:
        super().__init__(in_channels, mean, std)
        check_positive(image_size=image_size, patch=patch, dim=dim, depth=depth, heads=heads)
        check_positive(head_dim=head_dim, mlp_dim=mlp_dim, num_classes=num_classes)
        if image_size % patch != 0:
            raise ConfigurationError(
                f"patches of {patch} pixels do not tile {image_size}; choose a divisor of "
                "image_size, which is the size of the images that reach the network"
            )
        check_drop_rates(drop_rate=drop_rate, embedding_drop_rate=embedding_drop_rate)
        self.widths = (dim,)
        self.stem = Tokens(in_channels, image_size, patch, dim, embedding_drop_rate, shifted)
        self.stages = nn.Sequential(
            *(Encoder(dim, heads, head_dim, mlp_dim, drop_rate, local) for _ in range(depth))
        )
        self.head = named_sequence(
            pool=MeanTokens(), norm=nn.LayerNorm(dim), linear=nn.Linear(dim, num_classes)
        )


class ViTBase(ViT):
    """The transformer of the default sizes: 9,523,722 parameters at 32x32, 9,622,026 at 64x64."""


class ViTSmall(ViT):
    """Shifted patches and local attention: 9,622,512 parameters at 32x32 and 10 classes."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(shifted=True, local=True, **kwargs)


class ViTTiny(ViT):
    """A smaller :class:`ViTSmall`: 4,371,438 parameters at 32x32, 10 classes, 3 channels."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(depth=4, heads=6, mlp_dim=256, shifted=True, local=True, **kwargs)
