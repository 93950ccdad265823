"""Small networks, teachers and a batch of digits."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from paper_awnet.method import Router
from paper_awnet.networks import AWNet, DigitsStudent
from paper_awnet.teachers import Teacher

N = 6


@pytest.fixture
def digits() -> dict[str, Tensor]:
    """Six 1x8x8 images of ten classes with perturbed copies."""
    x = torch.rand(N, 1, 8, 8)
    x_adv = (x + 0.3 * torch.rand_like(x).sub(0.5).sign()).clamp(0, 1)
    y = torch.randint(10, (N,))
    return {"x": x, "x_adv": x_adv, "y": y, "index": torch.arange(N)}


@pytest.fixture
def teachers() -> dict[str, Teacher]:
    return {n: Teacher(DigitsStudent(), as_it_is=True) for n in ("clean", "robust")}


@pytest.fixture
def student() -> Callable[..., AWNet]:
    """Makes small AW-Nets: ``student(kind=Router, init="normal", **settings of AWNet)``."""

    def make(kind=Router, init="normal", **settings) -> AWNet:
        router = partial(kind, widths=(4, 6, 8), type_hidden=5, init=init)
        return AWNet(DigitsStudent(widths=(4, 6, 8)), router, **settings)

    return make


@pytest.fixture
def shake() -> Callable[[nn.Module], nn.Module]:
    """Gives every batch-norm different statistics and weights."""

    def shaken(net: nn.Module) -> nn.Module:
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.5)
                module.running_mean.normal_(std=0.3)
                module.running_var.uniform_(0.5, 2.0)
        return net

    return shaken
