"""Files that are at every moment either the old one or the new one, never half of it."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import RunDirectoryError


def write_json_atomically(path: str | Path, data: Mapping[str, Any]) -> None:
    """Write a JSON file that is at every moment either the old one or the new one.

    Raises:
        RunDirectoryError: If the file cannot be written.
        TypeError, ValueError: If ``data`` is not JSON (NaN is not); nothing is touched then.
    """
    write_text_atomically(path, _to_json(data) + "\n")


def write_text_atomically(path: str | Path, text: str) -> None:
    """As :func:`write_bytes_atomically`, in UTF-8."""
    write_bytes_atomically(path, text.encode())


def write_bytes_atomically(path: str | Path, content: bytes) -> None:
    """Write a file that is at every moment either the old one or the new one.

    Raises:
        RunDirectoryError: If it cannot be written.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # In the same folder, since a rename is atomic only within one file system.
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-", suffix=".tmp")
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp lets nobody else read
        temporary.replace(path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def check_writable(path: str | Path) -> None:
    """Make sure that a file can be written later, without touching it.

    Raises:
        RunDirectoryError: If it cannot.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        if path.is_dir():
            raise IsADirectoryError(0, "it is a folder")
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> RunDirectoryError:
    return RunDirectoryError(
        f"cannot write {path}: {error.strerror or error}; make {path.parent} a writable folder "
        "with free space, or choose another file"
    )


def _to_json(data: Any, indent: str = "") -> str:
    """JSON with a line per key and every list on one line, in the order of the keys."""
    if not isinstance(data, Mapping) or not data:
        return json.dumps(data, ensure_ascii=False, allow_nan=False)
    inner = indent + "  "
    lines = (
        f"{inner}{json.dumps(str(key), ensure_ascii=False)}: {_to_json(value, inner)}"
        for key, value in data.items()
    )
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
