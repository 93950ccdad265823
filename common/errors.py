"""Errors whose message is for the user: it names the value, the expectation and the remedy.

The command line prints only the message and exits with status 2.
"""

import os
import re
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, get_args

OUT_OF_MEMORY = re.compile(
    r"out of memory|not enough memory|can(?:no|')t allocate memory|unable to (?:allocate|mmap)"
    r"|failed to allocate|DefaultCPUAllocator|bad_alloc|could not create a (?:primitive|memory)"
    r"|ALLOC_FAILED|MemoryAllocation|OUT_OF_(?:HOST_)?MEMORY|insufficient memory",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the machine has no memory left."""
    says_so = isinstance(error, RuntimeError | OSError) and OUT_OF_MEMORY.search(str(error))
    return isinstance(error, MemoryError) or bool(says_so)


def listed(names: Iterable[str], most: int = 4) -> str:
    """The first ``most`` names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


@contextmanager
def output_may_close() -> Iterator[None]:
    """Within the block, end the program silently if what reads its output, such as head, ends."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter flushes once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None


class UserError(Exception):
    """Something the user can correct: a setting, a file, a folder."""


class ConfigurationError(UserError, ValueError):
    """A setting that cannot work, found before any compute is spent."""


def check_choice(name: str, value: object, choices: Any) -> None:
    """Raise a ConfigurationError for a value that is no choice of a ``Literal``."""
    known = get_args(choices)
    if not any(type(value) is type(choice) and value == choice for choice in known):
        raise ConfigurationError(
            f"{name} must be one of {', '.join(map(str, known))}, got {value!r}"
        )


def check_in_pixels(name: str, length: float) -> None:
    """Raise a ConfigurationError for a length in the linf norm above 1, the range of pixels."""
    if length > 1.0:
        hint = f"; did you mean '{length:g}/255'?" if length <= 255.0 else ""
        raise ConfigurationError(
            f"{name} must lie in [0, 1] (pixels are in [0, 1]), got {length}{hint}"
        )


class DataUnavailableError(UserError, RuntimeError):
    """A data set that is missing, truncated, altered or cannot be fetched."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that is missing, damaged or belongs to another network."""


class RunDirectoryError(UserError, RuntimeError):
    """A run or results directory that is in use or cannot be written."""


class DivergedError(UserError, RuntimeError):
    """Training that produced a loss which is not finite."""
