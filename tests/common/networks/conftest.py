"""Batch-norms as after some training."""

from collections.abc import Callable

import pytest
from torch import nn


@pytest.fixture
def shaken() -> Callable[[nn.Module], nn.Module]:
    """Gives every batch-norm statistics and weights that matter."""

    def shake(net: nn.Module) -> nn.Module:
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.running_var):
                    nn.init.uniform_(tensor, 0.5, 1.5)
                for tensor in (module.bias, module.running_mean):
                    nn.init.uniform_(tensor, -0.3, 0.3)
        return net

    return shake
