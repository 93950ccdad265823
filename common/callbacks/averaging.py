"""Exponential moving averages of weights, with a decay that grows or from a later epoch on."""

from typing import Any, cast

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn

from common.errors import ConfigurationError


def averaging_of(trainer: Trainer) -> WeightAveraging | StochasticWeightAveraging | None:
    """The callback of a run that averages weights."""
    kinds = (WeightAveraging, StochasticWeightAveraging)
    found = (c for c in trainer.callbacks if isinstance(c, kinds))  # type: ignore[attr-defined]
    return next(found, None)


def weights_in_checkpoints(trainer: Trainer) -> str:
    """Which weights a checkpoint that is written now holds: ``raw``, or ``averaged by ...``."""
    callback = averaging_of(trainer)
    # Stochastic weight averaging averages when training ends.
    if callback is None or trainer.current_epoch <= getattr(callback, "swa_end", -1):
        return "raw"
    return f"averaged by {type(callback).__name__}"


class _Averaging(WeightAveraging):
    """Averages from an epoch on, beginning with the weights before it; until then copies."""

    def __init__(
        self, decay: float, device: str | None, from_epoch: int, use_buffers: bool
    ) -> None:
        if not 0.0 <= decay < 1.0:
            raise ConfigurationError(
                f"decay must lie in [0, 1), got {decay}; 0 takes the current weights, 1 would "
                "keep the first ones"
            )
        if from_epoch < 0:
            raise ConfigurationError(f"from_epoch counts epochs from 0, got {from_epoch}")
        super().__init__(device=device, use_buffers=use_buffers, multi_avg_fn=self._update)
        self.decay = decay
        self.from_epoch = from_epoch
        self._is_averaging = False

    def tau(self, step: int | Tensor) -> float:
        """Weight of the old average after optimiser step ``step``, from 1."""
        return self.decay

    def _update(self, averages: Any, currents: Any, step: Tensor | int) -> None:
        if self._is_averaging and averages[0].is_floating_point():
            torch._foreach_lerp_(averages, currents, 1.0 - self.tau(step))
        else:
            torch._foreach_copy_(averages, currents)

    def on_fit_start(self, trainer: Trainer, module: Any) -> None:
        """Move the average to the model's device."""
        if self._device is None:
            cast(nn.Module, self._average_model).to(module.device)

    def on_train_batch_start(self, trainer: Trainer, module: Any, *_: Any) -> None:
        """Start from the present weights; ``setup`` may have copied them before a warm start."""
        average = cast(Any, self._average_model)
        self._is_averaging = trainer.current_epoch >= self.from_epoch
        if self._is_averaging and average.n_averaged == 0:
            average.module.load_state_dict(module.state_dict())
            # At 0 the first update would copy. Counting from 1 makes the count the step's number.
            average.n_averaged += 1


class WarmUpAveraging(_Averaging):
    r"""Exponential moving average of the parameters with a decay that grows.

    After optimiser step t, counted from 1, :math:`\bar\theta \leftarrow \tau \bar\theta + (1 -
    \tau) \theta` with :math:`\tau = \min(\mathrm{decay}, (1 + t) / (10 + t))`, from the first
    weights on. Buffers, as batch-norm statistics, are not averaged. As with Lightning's averaging,
    validation, checkpoints and tests use the average; attacks in training and the optimiser do not.

    Args:
        decay: The largest tau, in [0, 1).
        device: Of the average; by default the model's.
    """

    def __init__(self, decay: float = 0.995, device: str | None = None) -> None:
        super().__init__(decay, device, from_epoch=0, use_buffers=False)

    def tau(self, step: int | Tensor) -> float:
        """Weight of the old average after optimiser step ``step``, from 1."""
        return min(self.decay, float((1 + step) / (10 + step)))


class LateAveraging(_Averaging):
    r"""Exponential moving average of the whole state from an epoch on.

    From the first step of that epoch :math:`\bar\theta \leftarrow \tau \bar\theta + (1 - \tau)
    \theta`, beginning with the weights before it; batch-norm statistics are averaged likewise and
    whole numbers copied. Until then the average is the model itself, which validation and
    checkpoints use; Lightning's averaging would keep the initial weights.

    Args:
        decay: The weight tau of the old average, in [0, 1).
        from_epoch: The first epoch, from 0, that is averaged over.
        device: Of the average; by default the model's.
    """

    def __init__(
        self, decay: float = 0.9996, from_epoch: int = 0, device: str | None = None
    ) -> None:
        super().__init__(decay, device, from_epoch, use_buffers=True)
