"""Errors whose message is written for the person at the keyboard.

The command line prints their text alone, without a traceback, and exits with status 2.
Each message names the value, the expectation and the remedy.
"""

from typing import Any, get_args


class UserError(Exception):
    """Something the user can mend: a setting, a file, a folder."""


class ConfigurationError(UserError, ValueError):
    """A setting that cannot work, found before any compute is spent."""


def check_choice(name: str, value: object, choices: Any) -> None:
    """Refuse a value that is none of a ``Literal``'s.

    Args:
        name: Of the setting.
        value: What was given.
        choices: The ``Literal``.

    Raises:
        ConfigurationError: If it is another.
    """
    known = get_args(choices)
    if not any(type(value) is type(choice) and value == choice for choice in known):
        raise ConfigurationError(
            f"{name} must be one of {', '.join(map(str, known))}, got {value!r}"
        )


class DataUnavailableError(UserError, RuntimeError):
    """A data set that is missing, truncated, altered or cannot be fetched."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that is missing, damaged or belongs to another network."""


class RunDirectoryError(UserError, RuntimeError):
    """A run or results directory that is in use or cannot be written."""


class DivergedError(UserError, RuntimeError):
    """Training that produced a loss which is not finite."""
