"""What stand-ins have in common that compute by factors instead of their weight."""

import copy
from typing import Any

import torch
from torch import Tensor, nn


class FactorConv2d(nn.Conv2d):
    """A convolution that computes by ``factors`` while they are those of its settings.

    A loss may change those: it attacks a copy with other strides, for instance. Copies are plain
    convolutions, so that they follow changes of their weights too.
    """

    planned: tuple[Any, ...] = ()
    """The settings that the factors were made for."""

    def prepared(self, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor | None]:
        """What it computes with: ``factors`` and more, and ``weight`` and ``bias`` for the rest."""
        self.planned = _settings_of(self)
        return {"weight": weight, "bias": bias} | self._made(weight, bias)

    def _made(self, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor | None]:
        raise NotImplementedError

    @property
    def is_planned(self) -> bool:
        """Whether the settings are those that the factors were made for."""
        return self.planned == _settings_of(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Conv2d:
        """A plain convolution with its weight and bias."""
        made = memo[id(self)] = nn.Conv2d.__new__(nn.Conv2d)
        plain = {name: self._parameters.get(name) for name in ("weight", "bias")}
        vars(made).update(copy.deepcopy(vars(self) | {"_parameters": plain}, memo))
        return made


def takes_factors(weight: Tensor) -> bool:
    """Whether chosen stand-ins compute by factors: on a CPU, in the weight's own type."""
    is_there = weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.float64)
    return is_there and not torch.is_autocast_enabled("cpu")


def _settings_of(conv: nn.Conv2d) -> tuple[Any, ...]:
    names = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    return tuple(getattr(conv, name) for name in names)
