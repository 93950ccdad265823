"""Which examples the pictures of an evaluation show."""

import pytest
import torch

from common.evaluation import pictures
from common.results.lines import Line, Outcomes, Threat


def test_examples_that_fell_within_the_threat_come_first(monkeypatch) -> None:
    """Of ten that fell far outside, the sixth and the ninth fell within it too."""
    n, fell_inside = 10, torch.tensor([5, 8])
    inside = torch.zeros(n, dtype=torch.bool)
    inside[fell_inside] = True
    y, x = torch.zeros(n, dtype=torch.long), torch.rand(n, 1, 2, 2)

    def columns(fell: torch.Tensor, distance: float) -> dict[str, torch.Tensor]:
        return {
            "predicted": fell.long(),
            "linf": torch.full((n,), distance),
            "x_adv": x + distance,
        }

    every = torch.ones(n, dtype=torch.bool)
    outcomes = Outcomes(
        y,
        correct={"clean": every, "pgd": ~inside, "wide": ~every},
        attacked={"pgd": every, "wide": every},
        lines={"pgd": Line("pgd"), "wide": Line("wide")},
        columns={"pgd": columns(inside, 0.1), "wide": columns(every, 0.2)},
        threat=Threat("linf", 0.1),
        pictured=torch.arange(n),
    )
    drawn: list[tuple[torch.Tensor, ...]] = []
    monkeypatch.setattr(pictures, "adversarial_grid", lambda *given: drawn.append(given))
    pictures._examples(outcomes, x, ["a", "b"])
    ((clean, adversarial, *_, distances),) = drawn
    assert torch.equal(clean, x[[5, 8, 0, 1, 2, 3, 4, 6]])
    assert distances["linf"].tolist() == pytest.approx([0.1] * 2 + [0.2] * 6)
    torch.testing.assert_close(adversarial - clean, distances["linf"].view(-1, 1, 1, 1) + 0 * clean)
