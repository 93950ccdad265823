"""What a network costs, relative to a budget."""

from typing import Any

import torch

from common.attacks.geometry import check_count
from common.attacks.randomness import ExampleRandom
from common.attacks.settings import Budget
from common.evaluation.measures import Measure, cost
from common.objectives import Batch
from common.results.lines import Columns


class RelativeCost(Measure):
    """``relative_macs``: multiply-accumulates of one image by those of a budget.

    Args:
        budget: Multiply-accumulates of the backbone alone.

    Raises:
        ConfigurationError: If it is below 1.
    """

    budget = Budget(1, 0)

    def __init__(self, budget: int) -> None:
        self.macs = check_count("the budget's multiply-accumulates", budget, 1)

    def __call__(self, model: Any, batch: Batch, random: ExampleRandom) -> Columns:
        """The same number for each image, ``(N,)``."""
        x = batch["x"]
        return {"relative_macs": torch.full((len(x),), cost(model, x[0])["macs"] / self.macs)}
