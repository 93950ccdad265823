"""Errors whose message is written for the person at the keyboard.

The command line prints their text alone, without a traceback, and exits with status 2.
Each message names the value, the expectation and the remedy.
"""


class UserError(Exception):
    """Something the user can mend: a setting, a file, a folder."""


class ConfigurationError(UserError, ValueError):
    """A setting that cannot work, found before any compute is spent."""


class DataUnavailableError(UserError, RuntimeError):
    """A data set that is missing, truncated, altered or cannot be fetched."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that is missing, damaged or belongs to another network."""


class RunDirectoryError(UserError, RuntimeError):
    """A run or results directory that is in use or cannot be written."""


class DivergedError(UserError, RuntimeError):
    """Training that produced a loss which is not finite."""
