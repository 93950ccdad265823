"""The names of the checkpoints that a run keeps."""

from typing import Literal, get_args

from common.errors import ConfigurationError, check_choice

Checkpoint = Literal["last", "selected"]
"""In the order in which tables show them."""
LABELS: tuple[str, ...] = get_args(Checkpoint)


def check_checkpoints(part: str, names: list[Checkpoint] | None) -> list[Checkpoint] | None:
    """The checkpoints that a part of an evaluation is for; None is all.

    Raises:
        ConfigurationError: If it is for none that a run keeps: it would be left out silently.
    """
    if names == []:
        raise ConfigurationError(
            f"{part} would be for no checkpoint; name last or selected, or drop checkpoints"
        )
    for name in names or []:
        check_choice(f"each of the checkpoints of {part}", name, Checkpoint)
    return names
