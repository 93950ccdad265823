"""What has been measured on a device, on disk after every measurement."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from benchmarks.failures import NO_TIME
from common.errors import ConfigurationError
from common.files import write_json_atomically
from common.limits import read_json

Row = dict[str, Any]
"""``state``, ``call`` (which command measured it), ``summary`` in a line, ``seconds``, figures."""

DONE, UNFINISHED, RUNNING = "done", "unfinished", "running"
SKIPPED, FAILED = "skipped", "failed"
START = "start"
"""The row of a part that could not begin."""


class Journal:
    """The results of a device as JSON: ``{"machine": ..., "parts": {part: {key: row}}}``.

    One process writes at a time.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def whole(self) -> dict[str, Any]:
        """Everything that has been written.

        Raises:
            ConfigurationError: If the file was not written by this class, or is damaged.
        """
        if not self.path.is_file():
            return {"machine": {}, "parts": {}}
        try:
            found = read_json(self.path)
            about, parts = found["machine"], found["parts"]
            is_whole = not about or (
                about.keys() >= {"processor", "python"} and isinstance(about["versions"], dict)
            )
            rows = [row for part in parts.values() for row in part.values()]
            is_whole &= all(isinstance(row["state"], str) for row in rows)
        except OSError as error:
            raise ConfigurationError(f"{self.path} cannot be read: {error}") from error
        except (ValueError, TypeError, KeyError, AttributeError):
            is_whole = False
        if not is_whole:
            raise ConfigurationError(
                f"{self.path} is damaged or holds something else; delete it to measure again"
            )
        return cast(dict[str, Any], found)

    def describe(self, machine: dict[str, Any]) -> None:
        """Write what the figures belong to."""
        write_json_atomically(self.path, self.whole() | {"machine": machine})

    def rows(self, part: str) -> dict[str, Row]:
        """The measurements of a part by their names."""
        found: dict[str, Row] = self.whole()["parts"].get(part, {})
        return found

    def expect(self, part: str, keys: Iterable[str]) -> None:
        """Make these the measurements of a part; those that are new have had no time so far."""
        whole, rows = self.whole(), self.rows(part)
        new = {"state": SKIPPED, "summary": NO_TIME}
        whole["parts"][part] = {key: rows.get(key, new) for key in keys}
        write_json_atomically(self.path, whole)

    def put(self, part: str, key: str, row: Row) -> None:
        """Write one measurement."""
        whole = self.whole()
        whole["parts"].setdefault(part, {})[key] = row
        write_json_atomically(self.path, whole)
