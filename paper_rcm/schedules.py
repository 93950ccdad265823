"""Learning rates by the epoch."""

from collections.abc import Mapping

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from common.errors import ConfigurationError


class FactorsByEpoch(LambdaLR):
    """The optimiser's rate times a factor that changes at given epochs [code].

    Friendly adversarial training goes from 0.1 to 0.01, 0.001 and 0.0005, which no single factor
    does: ``{59: 0.1, 89: 0.01, 109: 0.005}``.

    Args:
        optimizer: Whose rates are set.
        factors: First epoch, from 0, -> factor of the optimiser's rate from then on; 1 before.

    Raises:
        ConfigurationError: If there is no factor, an epoch is negative or a factor not positive.
    """

    def __init__(self, optimizer: Optimizer, factors: Mapping[int, float]) -> None:
        if not factors or min(factors) < 0 or min(factors.values()) <= 0:
            raise ConfigurationError(
                "factors are positive numbers by the epoch, from 0, where they begin, got "
                f"{dict(factors)}; for instance {{59: 0.1, 89: 0.01}}"
            )
        begins = sorted(factors.items())
        super().__init__(
            optimizer, lambda epoch: ([1.0] + [f for first, f in begins if first <= epoch])[-1]
        )
