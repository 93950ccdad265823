"""Stability, local Lipschitz constant, FOSC and cost, against closed forms."""

import pytest
import torch
from torch import Tensor, nn

from common.attacks.pgd import PGD
from common.evaluation.measures import LocalSmoothness, cost, means, measure_steps
from common.evaluation.models import Victim
from common.evaluation.runner import run_steps
from common.results.outcomes import checkpoint_entry


class Linear(nn.Module):
    """Logits (w.x, -w.x) with w = (3, -1): everything about it is known."""

    def forward(self, x: Tensor) -> Tensor:
        score = 3 * x[:, 0, 0, 0] - x[:, 0, 0, 1]
        return torch.stack([score, -score], dim=1)


X = torch.tensor([[0.5, 0.5], [0.4, 0.9], [0.2, 0.9]]).view(3, 1, 1, 2)
BATCH = {"x": X, "y": torch.tensor([0, 0, 1]), "index": torch.arange(3)}


def measured(*attacks: PGD) -> dict[str, float]:
    measures = {f"local{i}": LocalSmoothness(attack) for i, attack in enumerate(attacks)}
    steps = measure_steps(measures)
    return means(run_steps(Victim(Linear(), 2), BATCH, steps, seed=0, batch_size=2), measures)


def test_smoothness_of_a_linear_network() -> None:
    """PGD reaches the corner: scores 1.0, 0.3, -0.3 move by 0.4 against the label."""
    found = measured(PGD(0.1, 0.1, 3, start="zero"))
    assert found["stability"] == pytest.approx(1 / 3)
    assert found["lipschitz"] == pytest.approx(2 * 0.4 / 0.1, rel=1e-3)
    assert found["fosc"] == pytest.approx(0.0, abs=1e-6)
    assert measured(PGD(0.1, 0.05, 1, start="zero"))["fosc"] > 0.1, "it is inside of the ball"
    found = measured(PGD(0.0, 0.0, 1, start="zero"))
    assert found == {"stability": 1.0, "lipschitz": 0.0, "fosc": 0.0}


def test_measures_stand_among_the_metrics_and_collide_with_none() -> None:
    l2 = PGD(0.1, norm="l2")
    assert set(measured(l2)) == {"stability", "lipschitz"}
    with pytest.raises(ValueError, match="two measures give 'stability'"):
        measured(l2, l2)
    outcomes = run_steps(Victim(Linear(), 2), BATCH, [], seed=0)
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
