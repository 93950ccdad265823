"""What stand-ins have in common that compute by factors instead of their weight."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

_OWN = ("planned", "maps", "reached", "tile", "is_contiguous")
"""What stand-ins have and convolutions have not."""


class FactorConv2d(nn.Conv2d):
    """A convolution that computes by ``factors``, a plain one with other settings than theirs.

    A deep copy is a plain convolution, which follows changes of its weights too: losses attack
    copies with other strides, for instance.
    """

    planned: tuple[Any, ...] = ()
    """The settings that the factors were made for."""

    def prepared(self, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor | None]:
        """What it computes with: ``factors`` and more, and ``weight`` and ``bias`` for the rest."""
        self.planned = geometry_of(self)
        return {"weight": weight, "bias": bias} | self._made(weight, bias)

    def _made(self, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor | None]:
        raise NotImplementedError

    @property
    def is_planned(self) -> bool:
        """Whether the settings are those that the factors were made for."""
        return self.planned == geometry_of(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Conv2d:
        """A plain convolution with its weight and bias."""
        made = memo[id(self)] = nn.Conv2d.__new__(nn.Conv2d)
        plain = {name: value for name, value in vars(self).items() if name not in _OWN}
        plain["_parameters"] = {name: self._parameters.get(name) for name in ("weight", "bias")}
        vars(made).update(copy.deepcopy(plain, memo))
        return made


def takes_factors(weight: Tensor) -> bool:
    """Whether chosen stand-ins compute by factors: on a CPU, in the weight's own type."""
    is_there = weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.float64)
    return is_there and not torch.is_autocast_enabled("cpu")


def geometry_of(conv: nn.Conv2d) -> tuple[Any, ...]:
    """Everything but the weights that determines a convolution."""
    names = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    return tuple(getattr(conv, name) for name in names)
