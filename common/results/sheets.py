"""Tables of text on their way to Markdown or to a terminal."""

import re
from dataclasses import dataclass, field

from rich.table import Table
from rich.text import Text


@dataclass
class Sheet:
    """A table; without a header it is only its notes.

    Args:
        title: Heading.
        note: Text under the heading.
        header: Titles of the columns.
        lines: Cells, a list per line.
        notes: Paragraphs under the table.
        level: Of the heading.
    """

    title: str
    note: str = ""
    header: list[str] = field(default_factory=list)
    lines: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    level: int = 3

    def numeric(self) -> list[bool]:
        """Which columns hold nothing but numbers."""
        return [
            all(cell == "" or cell[0] in "+-0123456789" for cell in column)
            for column in zip(*self.lines, strict=True)
        ]

    def to_markdown(self) -> str:
        """The table with its heading and notes."""
        parts = [f"{'#' * self.level} {escape(self.title)}"]
        if self.note:
            parts.append(_paragraph(self.note))
        if self.header:
            ruler = ["---:" if numeric else "---" for numeric in self.numeric()]
            lines = (self.header, ruler, *self.lines)
            parts.append("\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines))
        return "\n\n".join([*parts, *map(_paragraph, self.notes)])

    def to_rich(self) -> Table:
        """The same for a terminal."""
        notes = Text("\n".join(self.notes))
        title = Text(self.title)
        table = Table(title=title, title_justify="left", caption_justify="left")
        if not self.header:
            table.show_header = False
            table.add_column()
            table.add_row(notes)
            return table
        table.caption = notes if self.notes else None
        for name, numeric in zip(self.header, self.numeric(), strict=True):
            table.add_column(Text(name), justify="right" if numeric else "left")
        for line in self.lines:
            table.add_row(*map(Text, line))
        return table


def escape(text: str) -> str:
    """One line of Markdown whose emphasis and code stay, without HTML, comments and links.

    Titles, labels and notes come from files that may be a stranger's.
    """
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    text = re.sub(r"&(?=#?\w+;)", "&amp;", text)
    for found, harmless in {"<": "&lt;", ">": "&gt;", "](": "]\\("}.items():
        text = text.replace(found, harmless)
    return text


def _paragraph(text: str) -> str:
    """The same as a paragraph, whatever block its beginning would make."""
    return re.sub(r"^(?=#|```|~~~|\||[-+=] |[-=]+$)", r"\\", escape(text))


def _cell(text: str) -> str:
    return escape(text).replace("|", "\\|")
