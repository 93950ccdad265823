"""From pixels to the input a network was made for."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from common.errors import ConfigurationError

Statistics = Sequence[float] | Literal["data"] | None
"""One number per channel in pixel units; ``data`` is a placeholder in configuration files, where
the command line puts the statistics of the data set."""


class Normalize(nn.Module):
    """Checks a batch of images and standardises it, ``(x - mean) / std`` per channel.

    The first module of every backbone: attacks, noise and corruptions act on pixels in [0, 1].
    ``mean`` and ``std`` are buffers, so that a checkpoint brings back those it was trained with.

    Args:
        in_channels: Channels of the images.
        mean: One mean per channel, in pixel units; ``None`` leaves the pixels as they are.
        std: One standard deviation per channel, in pixel units; given exactly when ``mean`` is.
    """

    mean: Tensor | None
    std: Tensor | None

    def __init__(
        self, in_channels: int = 3, mean: Statistics = None, std: Statistics = None
    ) -> None:
        super().__init__()
        if in_channels < 1:
            raise ConfigurationError(f"in_channels must be at least 1, got {in_channels}")
        if (mean is None) != (std is None):
            raise ConfigurationError(
                f"mean and std go together, got mean={mean} and std={std}; give both or neither"
            )
        if mean == "data" or std == "data":
            raise ConfigurationError(
                f"mean={mean!r} and std={std!r}: 'data' is filled in by the command line; in "
                "Python give numbers, such as the data module's mean and std"
            )
        for name, values in (("mean", mean), ("std", std)):
            if values is not None and len(values) != in_channels:
                raise ConfigurationError(
                    f"{name} needs one value for each of the {in_channels} input channels, "
                    f"got {len(values)}: {list(values)}"
                )
        if std is not None and min(std) <= 0:
            raise ConfigurationError(f"std must be positive, got {list(std)}")
        self.in_channels = in_channels
        self.register_buffer("mean", None if mean is None else torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", None if std is None else torch.tensor(std).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Standardised images, ``(N, C, H, W)``."""
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"the network was built for images of shape (N, {self.in_channels}, H, W), got "
                f"{tuple(x.shape)}; set the network's in_channels to that of the data"
            )
        if self.mean is None or self.std is None:
            return x
        return (x - self.mean) / self.std

    def extra_repr(self) -> str:
        """Settings, for ``print(net)``."""
        given = {name: b.flatten().tolist() for name, b in self.named_buffers()}
        return f"{self.in_channels}, {given or 'pixels unchanged'}"
