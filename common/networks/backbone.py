"""The base class of the backbones."""

from torch import Tensor, nn

from common.networks.normalize import Normalize, Statistics


class Backbone(nn.Module):
    """Normalisation, ``stem``, ``stages`` and ``head``, which a subclass sets.

    Args:
        in_channels: Channels of the images.
        mean: Means of :class:`~common.networks.normalize.Normalize`; ``None`` keeps the pixels.
        std: Its standard deviations.
    """

    stem: nn.Module
    stages: nn.Sequential
    head: nn.Sequential

    def __init__(self, in_channels: int, mean: Statistics = None, std: Statistics = None) -> None:
        super().__init__()
        self.normalize = Normalize(in_channels, mean, std)

    def features(self, x: Tensor) -> Tensor:
        """What the head reads: maps ``(N, C', H', W')``, or tokens ``(N, T, dim)`` of a ViT."""
        z: Tensor = self.stages(self.stem(self.normalize(x)))
        return z

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, K)`` of images ``(N, C, H, W)`` in [0, 1]."""
        logits: Tensor = self.head(self.features(x))
        return logits
