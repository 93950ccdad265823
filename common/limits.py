"""Text files and names of unknown origin, read within limits."""

import json
import re
import stat
from pathlib import Path
from typing import Any

import yaml
from yaml.reader import ReaderError

from common.errors import ConfigurationError

LARGEST_INTEGER = 10**18 - 1
"""Of a text; the next ones need more than 64 bits."""
LARGEST_SEED = 2**32 - 1
"""NumPy takes no larger ones."""
MOST_YAML_BYTES, MOST_YAML_VALUES, MOST_YAML_LEVELS = 2**20, 10**5, 100
MOST_JSON_BYTES = 2**26
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_LONG = re.compile(r"[-+]?(?:\d[\d_:]{18,}|0[xob][\da-fA-F_]{16,}|\d[\d_.eE+-]{99,})")


def _read_text(path: Path, most: int) -> str:
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise ValueError("it is a folder" if stat.S_ISDIR(mode) else "it is no regular file")
    if path.stat().st_size > most:
        raise ValueError(f"it has more than {most:,} bytes")
    return path.read_text(encoding="utf-8")


def read_yaml(path: str | Path) -> Any:
    """The plain values of a YAML file.

    Raises:
        ConfigurationError: If it is no readable YAML file, or exceeds the limits of
            :func:`check_yaml`.
    """
    path = Path(path)
    try:
        text = _read_text(path, MOST_YAML_BYTES)
        check_yaml(text)
        return yaml.load(text, Loader=_LOADER)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
        what = line + " ".join(filter(None, (error.context, error.problem)))
        raise ConfigurationError(f"{path} cannot be read: it is no YAML ({what})") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        problem = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        is_syntax = isinstance(error, ReaderError | UnicodeDecodeError)
        problem = f"it is no YAML ({problem})" if is_syntax else problem
        raise ConfigurationError(f"{path} cannot be read: {problem}") from error


def check_yaml(text: str) -> None:
    """Check the size, depth and numbers of a YAML text, its aliases written out, before parsing.

    Raises:
        yaml.YAMLError: If one exceeds the limits.
    """
    if len(text) > MOST_YAML_BYTES:
        raise yaml.YAMLError(f"it has more than {MOST_YAML_BYTES:,} bytes")
    known: dict[str, tuple[int, int]] = {}  # values and levels of anchors
    open_: list[tuple[str | None, int, int]] = [(None, 0, 0)]
    for event in yaml.parse(text, Loader=_LOADER):
        anchor, values, levels = getattr(event, "anchor", None), 1, 0
        if isinstance(event, yaml.CollectionStartEvent):
            known.pop(str(anchor), None)
            open_.append((anchor, 1, 0))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, values, levels = open_.pop()
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in known:
                raise yaml.YAMLError(f"the alias *{event.anchor} is within its own anchor")
            values, levels = known[event.anchor]
        elif not isinstance(event, yaml.ScalarEvent):
            continue
        elif not event.style and _LONG.fullmatch(event.value):
            raise yaml.YAMLError(f"it has a number of {len(event.value)} digits")
        if not isinstance(event, yaml.CollectionStartEvent):
            if anchor is not None and not isinstance(event, yaml.AliasEvent):
                known[anchor] = values, levels
            outer, size, depth = open_[-1]
            open_[-1] = outer, size + values, max(depth, levels + 1)
        if open_[-1][1] > MOST_YAML_VALUES:
            raise yaml.YAMLError(f"it has more than {MOST_YAML_VALUES:,} values with its aliases")
        if max(len(open_), open_[-1][2]) > MOST_YAML_LEVELS:
            raise yaml.YAMLError("it is nested too deeply")


def read_json(path: str | Path) -> Any:
    """The plain values of a JSON file.

    Raises:
        OSError, ValueError: If it is no readable JSON file, too large, nested too deeply, or has
            integers that need more than 64 bits.
    """
    text = _read_text(Path(path), MOST_JSON_BYTES)
    try:
        return json.loads(text, parse_int=_integer)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _integer(digits: str) -> int:
    if len(digits) > 19:
        raise ValueError(f"it has a number of {len(digits)} digits")
    return int(digits)


_NAME = re.compile(r"[A-Za-z0-9_+-][A-Za-z0-9._+-]{0,199}")


def check_name(name: str, what: str) -> str:
    """The name of the setting ``what``; a ConfigurationError unless it is one part of a path."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigurationError(
            f"{what} is {name!r:.200}; a name consists of letters, digits and ._+-, and does not "
            "begin with a dot"
        )
    return name


def check_label(label: str, what: str) -> str:
    """The label of the setting ``what``; a ConfigurationError unless a file's name may have it."""
    is_label = isinstance(label, str) and label.isprintable() and 0 < len(label) <= 200
    if not is_label or label[0] == "." or {"/", "\\"} & set(label):
        raise ConfigurationError(
            f"{what} is {label!r:.200}; it has to be a printable text of up to 200 characters "
            "without / and \\ that does not begin with a dot"
        )
    return label
