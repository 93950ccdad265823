"""A small network, images and the labels it gives them."""

import pytest
import torch
from torch import Tensor, nn

from common.attacks.losses import cross_entropy
from common.attacks.randomness import ExampleRandom


class Task:
    """A network with batch-norm and dropout; the first image has pixels in the box's corners."""

    def __init__(self, dtype: torch.dtype = torch.float32, n: int = 6) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Flatten(),
            nn.Linear(256, 5),
        ).to(dtype)
        self.net.eval()
        with torch.no_grad():
            self.net[-1].weight *= 5
        self.x = torch.rand(n, 3, 8, 8, dtype=dtype)
        self.x[0] = (self.x[0] > 0.5).to(dtype)
        self.y = self.net(self.x).argmax(dim=1)
        self.index = torch.arange(n)

    def of(self, rows: Tensor):
        """The loss and the verdict of some rows."""
        y = self.y[rows]
        loss = lambda x: cross_entropy(self.net(x), y)  # noqa: E731
        return loss, lambda x: self.net(x).argmax(dim=1) != y

    def loss(self, x: Tensor) -> Tensor:
        return cross_entropy(self.net(x), self.y)

    def wrong(self, x: Tensor) -> Tensor:
        return self.net(x).argmax(dim=1) != self.y

    def random(self) -> ExampleRandom:
        return ExampleRandom(0, 0, self.index)


@pytest.fixture
def task() -> Task:
    return Task()


@pytest.fixture
def task64() -> Task:
    return Task(torch.float64)


@pytest.fixture
def large_task() -> Task:
    return Task(torch.float64, 40)
