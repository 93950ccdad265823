"""A network's layers by its state dict, without its modules."""

from collections.abc import Callable

import pytest
import torch.nn.functional as F
from torch import Tensor, nn


class Written:
    """Layers of a network whose batch-norms have statistics and weights that matter."""

    def __init__(self, net: nn.Module) -> None:
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.running_var):
                    nn.init.uniform_(tensor, 0.5, 1.5)
                for tensor in (module.bias, module.running_mean):
                    nn.init.uniform_(tensor, -0.3, 0.3)
        self.weights = net.double().eval().state_dict()

    def conv(self, z: Tensor, name: str, stride: int = 1) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias")
        return F.conv2d(z, weight, bias, stride, padding=weight.shape[-1] // 2)

    def bn(self, z: Tensor, name: str) -> Tensor:
        keys = ("running_mean", "running_var", "weight", "bias")
        mean, var, scale, shift = (self.weights[f"{name}.{k}"][None, :, None, None] for k in keys)
        return (z - mean) / (var + 1e-5).sqrt() * scale + shift

    def linear(self, z: Tensor, name: str) -> Tensor:
        return z @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]


@pytest.fixture
def written() -> Callable[[nn.Module], Written]:
    """Makes a network double and ready for evaluation, and returns its layers."""
    return Written
