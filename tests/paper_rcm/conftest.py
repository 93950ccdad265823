"""A small classifier on images of the digits' size."""

import pytest
import torch
from torch import Tensor

from common.attacks.randomness import ExampleRandom
from common.objectives import AT
from paper_rcm.method import DigitsNet, EnlargedNetwork
from paper_rcm.module import RCMClassifier


@pytest.fixture
def model() -> RCMClassifier:
    net = EnlargedNetwork(DigitsNet([1, 2, 2]), mean=[0.3], std=[0.37])
    return RCMClassifier(net, AT(), torch.optim.SGD).eval()


@pytest.fixture
def digits(model: RCMClassifier) -> dict[str, Tensor]:
    """Random images, each with the label that the model gives it."""
    x = torch.rand(12, 1, 8, 8)
    return {"x": x, "y": model(x).argmax(1), "index": torch.arange(12)}


@pytest.fixture
def random(digits: dict[str, Tensor]) -> ExampleRandom:
    return ExampleRandom(0, 0, digits["index"])
