import math

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

from common.errors import ConfigurationError
from paper_rcm.schedules import FactorsByEpoch


def optimizer(lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)


def test_the_rates_of_friendly_training_also_when_resumed(rates) -> None:
    factors = {59: 0.1, 109: 0.005, 89: 0.01}
    expected = [0.1] * 59 + [0.01] * 30 + [0.001] * 20 + [0.0005] * 11
    first, second = (FactorsByEpoch(optimizer(0.1), factors) for _ in range(2))
    assert rates(first, 60) == pytest.approx(expected[:60])
    second.load_state_dict(first.state_dict())
    assert rates(second, 60) == pytest.approx(expected[60:])


def test_torchs_own_cosine_is_that_of_dajat(rates) -> None:
    found = rates(CosineAnnealingLR(optimizer(0.2), T_max=200), 200)
    expected = [0.1 * (1 + math.cos(math.pi * (e - 1) / 200)) for e in range(1, 201)]
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("factors", [{}, {-1: 0.1}, {3: 0.0}])
def test_factors_that_mean_nothing(factors: dict[int, float]) -> None:
    with pytest.raises(ConfigurationError, match="factors"):
        FactorsByEpoch(optimizer(0.1), factors)
