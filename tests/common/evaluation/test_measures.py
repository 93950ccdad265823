"""Stability, local Lipschitz constant, FOSC and cost, against closed forms."""

import pytest
import torch
from torch import Tensor, nn

from common.attacks.pgd import PGD
from common.evaluation.measures import LocalSmoothness, Measure, cost, means, measure_steps
from common.evaluation.models import Victim
from common.evaluation.runner import run_steps
from common.results.outcomes import checkpoint_entry


class Linear(nn.Module):
    """Logits (w.x, -w.x) with w = (3, -1): everything about it is known."""

    def forward(self, x: Tensor) -> Tensor:
        score = 3 * x[:, 0, 0, 0] - x[:, 0, 0, 1]
        return torch.stack([score, -score], dim=1)


@pytest.fixture
def batch() -> dict[str, Tensor]:
    x = torch.tensor([[0.5, 0.5], [0.4, 0.9], [0.2, 0.9]]).view(3, 1, 1, 2)
    return {"x": x, "y": torch.tensor([0, 0, 1]), "index": torch.arange(3)}


def measured(measures: dict[str, Measure], batch) -> dict[str, float]:
    model = Victim(Linear(), 2)
    outcomes = run_steps(model, batch, measure_steps(measures), seed=0, batch_size=2)
    return means(outcomes, measures)


def test_smoothness_of_a_linear_network(batch) -> None:
    """PGD reaches the corner: scores 1.0, 0.3, -0.3 move by 0.4 against the label."""
    attack = PGD(0.1, 0.1, 3, start="zero")
    found = measured({"local": LocalSmoothness(attack)}, batch)
    assert found["stability"] == pytest.approx(1 / 3)
    assert found["lipschitz"] == pytest.approx(2 * 0.4 / 0.1, rel=1e-3)
    assert found["fosc"] == pytest.approx(0.0, abs=1e-6)


def test_fosc_is_zero_at_the_corner_alone(batch) -> None:
    inside = PGD(0.1, 0.05, 1, start="zero")
    assert measured({"local": LocalSmoothness(inside)}, batch)["fosc"] > 0.1


def test_without_a_perturbation_nothing_moves(batch) -> None:
    found = measured({"local": LocalSmoothness(PGD(0.0, 0.0, 1, start="zero"))}, batch)
    assert found == {"stability": 1.0, "lipschitz": 0.0, "fosc": 0.0}


def test_measures_stand_among_the_metrics_and_collide_with_none(batch) -> None:
    local = LocalSmoothness(PGD(0.1, norm="l2"))
    assert set(measured({"local": local}, batch)) == {"stability", "lipschitz"}
    with pytest.raises(ValueError, match="two measures give 'stability'"):
        measured({"one": local, "two": local}, batch)
    outcomes = run_steps(Victim(Linear(), 2), batch, [], seed=0)
    assert checkpoint_entry(outcomes, measures={"macs": 7.0})["metrics"]["macs"] == 7.0
    with pytest.raises(ValueError, match="clean_acc is a measure and an accuracy"):
        checkpoint_entry(outcomes, measures={"clean_acc": 7.0})


def test_cost_is_that_of_the_closed_form() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8), nn.Flatten(), nn.Linear(8 * 9, 10),
    ).eval()  # fmt: skip
    found = cost(net, torch.rand(3, 6, 6))
    assert found["parameters"] == 3 * 8 * 9 + 16 + 8 * 9 + 8 + 720 + 10
    assert found["macs"] == 36 * 27 * 8 + 9 * 9 * 8 + 720
