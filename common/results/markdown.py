"""Tables as Markdown, and the part of a README between two markers that holds them."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import ConfigurationError
from common.files import write_text_atomically

_NUMBER = re.compile(r"[-+]?\d\S*( ± \S+| / \d\S*\.\d\d| \[[^\]]+\])*")

BEGIN, END = "<!-- results -->", "<!-- /results -->"


@dataclass
class Sheet:
    """A table; without a header it is only its notes.

    ``note`` stands above it, ``notes`` below; ``level`` is that of the heading, and ``more`` a
    folded table of further columns.
    """

    title: str
    note: str = ""
    header: list[str] = field(default_factory=list)
    lines: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    level: int = 3
    more: "Sheet | None" = None

    def numeric(self) -> list[bool]:
        """Which columns hold only numbers, with their spread, interval or source."""
        return [
            all(cell == "" or _NUMBER.fullmatch(cell) for cell in column)
            for column in zip(*self.lines, strict=True)
        ]

    def to_markdown(self) -> str:
        """The table with its heading and notes."""
        parts = [f"{'#' * self.level} {escape(self.title)}"] if self.title else []
        if self.note:
            parts.append(_paragraph(self.note))
        if self.lines:
            ruler = ["---:" if numeric else "---" for numeric in self.numeric()]
            lines = (self.header, ruler, *self.lines)
            parts.append("\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines))
        if self.more is not None:
            more = self.more.to_markdown()
            parts.append(folded("More columns", more) if self.lines else more)
        return "\n\n".join([*parts, *map(_paragraph, self.notes)])


def escape(text: str) -> str:
    """One line of Markdown whose emphasis and code stay, without HTML, comments and links.

    Titles, labels and notes come from files that may be a stranger's.
    """
    text = re.sub(r"&(?=#?\w+;)", "&amp;", one_line(text))
    for found, harmless in {"<": "&lt;", ">": "&gt;", "](": "]\\("}.items():
        text = text.replace(found, harmless)
    return text


def one_line(text: str) -> str:
    """Printable characters alone, in one line."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _paragraph(text: str) -> str:
    """The text as a paragraph: a beginning that would start another block is escaped."""
    return re.sub(r"^(\d*)(?=#|```|~~~|\||\[|[-+*=.)] |[-=_* ]+$)", r"\1\\", escape(text))


def _cell(text: str) -> str:
    return escape(text).replace("|", "\\|")


def folded(summary: str, *parts: str) -> str:
    """Markdown that a reader opens by a click on its summary."""
    return "\n\n".join([f"<details><summary>{escape(summary)}</summary>", *parts, "</details>"])


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
