"""What callbacks and classifiers ask of a trainer."""

from lightning import Trainer

from common.errors import ConfigurationError


def is_logged(trainer: Trainer) -> bool:
    """Whether Lightning logs the optimiser step that comes next."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by a connector
    return every > 0 and (trainer.global_step + 1) % every == 0


def refuse_half_precision(trainer: Trainer, what: str) -> None:
    """Gradients taken outside the optimiser's step have no loss scaling to keep them from zero.

    Args:
        trainer: Its precision is looked at.
        what: Whose gradients they are, for the message.

    Raises:
        ConfigurationError: If the trainer computes in fp16.
    """
    if trainer.precision in ("16-mixed", "16-true", "transformer-engine-float16"):
        raise ConfigurationError(
            f"trainer.precision is {trainer.precision}: fp16 underflows most of {what}, which "
            "would be zero without a word; use bf16-mixed or 32-true"
        )
