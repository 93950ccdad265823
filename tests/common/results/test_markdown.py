"""Text of strangers in Markdown tables."""

import re
from pathlib import Path

import pytest

from common.results.markdown import BEGIN, END, Sheet, write_readme

HOSTILE = [
    "<script>alert(1)</script>",
    f"note {END} {BEGIN}",
    "a | b",
    "[click](javascript:alert(1))",
    "![track](http://example.org/x.png)",
    "```\nfence",
    "# heading",
    "line\n\n# heading\n\n```",
    "&lt;b&gt; <img src=x onerror=alert(1)>",
    "\x1b[31mred\u202e",
    "| a |\n|---|",
    "~~~ \n",
    "---",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_text_stays_text(text: str, tmp_path: Path) -> None:
    sheet = Sheet(text, text, ["experiment", text], [[text, "1.0"], ["row", text]], [text])
    markdown = sheet.to_markdown()
    assert "<" not in markdown
    assert "](" not in markdown
    assert not re.search(r"^\s*(```|~~~)", markdown, re.MULTILINE)
    blocks = markdown.split("\n\n")
    assert len(blocks) == 4, "heading, note, table, note"
    assert blocks[0].startswith("### ")
    for block in (blocks[1], blocks[3]):
        assert "\n" not in block
        assert not block.startswith(("#", "|", "- ", "---"))
    assert blocks[2].count("\n") == 3
    for line in blocks[2].split("\n"):
        assert len(re.findall(r"(?<!\\)\|", line)) == 3
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\n{END}\nafter\n")
    for _ in range(2):
        write_readme(readme, markdown)
    assert readme.read_text().startswith("before\n")
    assert readme.read_text().endswith("after\n")


def test_our_own_marks_stay() -> None:
    sheet = Sheet("C&W-30", "*paper* is `x`", ["a"], [["CIFS (`digits_cifs`)"], ["+0.67"]])
    assert sheet.to_markdown().splitlines() == [
        *("### C&W-30", "", "*paper* is `x`", "", "| a |", "| --- |"),
        *("| CIFS (`digits_cifs`) |", "| +0.67 |"),
    ]
