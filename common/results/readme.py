"""The part of a README that is rendered from results, between two markers."""

from pathlib import Path

from common.errors import ConfigurationError
from common.files import write_text_atomically

BEGIN, END = "<!-- results -->", "<!-- /results -->"


def write_readme(path: str | Path, markdown: str, begin: str = BEGIN, end: str = END) -> None:
    """Replace what stands between two markers of a README.

    Raises:
        ConfigurationError: If the README or its markers are missing.
        RunDirectoryError: If it cannot be written.
    """
    before, _, after = _split_readme(Path(path), begin, end)
    if not is_current(path, markdown, begin, end):
        write_text_atomically(path, f"{before}\n\n{markdown}\n\n{after}")


def is_current(path: str | Path, markdown: str, begin: str = BEGIN, end: str = END) -> bool:
    """Whether a README holds exactly these tables."""
    return _split_readme(Path(path), begin, end)[1] == f"\n\n{markdown}\n\n"


def _split_readme(path: Path, begin: str, end: str) -> tuple[str, str, str]:
    """Text up to and with the first marker, between the markers, from the second marker on."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(
            f"cannot read {path} ({error.strerror}); the tables go between the lines {begin} and "
            f"{end} of it"
        ) from error
    start, stop = text.find(begin) + len(begin), text.find(end)
    if text.count(begin) != 1 or text.count(end) != 1 or stop < start:
        raise ConfigurationError(
            f"{path} needs the lines {begin} and {end}, once each and in this order, around the "
            f"place of the tables; it has {text.count(begin)} and {text.count(end)}"
        )
    return text[:start], text[start:stop], text[stop:]
