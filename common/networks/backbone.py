"""The base class of the backbones."""

from collections.abc import Sequence
from typing import Any, Self
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from common.errors import ConfigurationError
from common.networks.normalize import Normalize, Statistics

_MADE_WITH: WeakKeyDictionary[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = (
    WeakKeyDictionary()
)


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
    widths: tuple[int, ...]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Remember the arguments, for :meth:`resized`."""
        net = super().__new__(cls)
        _MADE_WITH[net] = (args, kwargs)
        return net

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

    def resized(self, widths: Sequence[int]) -> Self:
        """The same network, initialised anew, with other channels per stage.

        What was done to it since it was made is lost.

        Raises:
            ConfigurationError: If its class has no ``widths``, or they are fixed.
        """
        args, kwargs = _MADE_WITH[self]
        try:
            return type(self)(*args, **(kwargs | self._sized(widths)))
        except TypeError as error:
            raise ConfigurationError(
                f"{type(self).__name__} cannot be made with other widths ({error}); give a ResNet, "
                "PreActResNet, WideResNet, VGG or AlexNet"
            ) from error

    def _sized(self, widths: Sequence[int]) -> dict[str, Any]:
        """The arguments that give the stages these widths."""
        return {"widths": tuple(widths)}
