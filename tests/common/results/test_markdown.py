"""Text of strangers in Markdown tables, and the rendered parts of READMEs."""

import re
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from common.errors import ConfigurationError
from common.results.markdown import BEGIN, END, Sheet, write_readme

HOSTILE = [
    "<script>alert(1)</script>",
    f"note {END} {BEGIN}",
    "a | b",
    "a \\| b",
    "[click](javascript:alert(1))",
    "![track](http://example.org/x.png)",
    "[R]: javascript:alert(1)",
    "```\nfence",
    "# heading",
    "line\n\n# heading\n\n```",
    "&lt;b&gt; <img src=x onerror=alert(1)>",
    "\x1b[31mred\u202e",
    "| a |\n|---|",
    "~~~ \n",
    "---",
    "* * *",
    "___",
    "* item",
    "1. item",
    "> quote",
    "    code",
]
GFM = MarkdownIt("commonmark", {"html": True}).enable("table")


@pytest.mark.parametrize("text", HOSTILE)
def test_text_stays_text(text: str, tmp_path: Path) -> None:
    sheet = Sheet(text, text, ["experiment", text], [[text, "1.0"], ["row", text]], [text])
    markdown = sheet.to_markdown()
    rendered = GFM.render(markdown + "\n\n[R] is the source.")
    tags = re.findall(r"<(/?\w+)", rendered)
    row = ["tr", "td", "/td", "td", "/td", "/tr"]
    assert [tag for tag in tags if tag not in ("em", "/em", "code", "/code")] == [
        *("h3", "/h3", "p", "/p", "table", "thead"),
        *(tag.replace("td", "th") for tag in row),
        *("/thead", "tbody", *row, *row, "/tbody", "/table", "p", "/p", "p", "/p"),
    ]
    assert not re.search(r"[\x1b\u202e]", rendered)
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


def test_columns_of_numbers_are_aligned_to_the_right() -> None:
    cells = ["a", "9.50 ± 0.1", "84.56 / 84.60 [R, R0]", "-1.0", "5.0 [4.1, 5.9]", "0, 1, 2"]
    sheet = Sheet("", header=[*"abcdef"], lines=[cells, ["", "", "", "", "", ""]])
    assert sheet.numeric() == [False, True, True, True, True, False]


@pytest.mark.parametrize("text", ["none", BEGIN, END, f"{END} {BEGIN}", f"{BEGIN}{BEGIN}{END}"])
def test_missing_markers_are_told(tmp_path: Path, text: str) -> None:
    readme = tmp_path / "README.md"
    with pytest.raises(ConfigurationError, match=r"cannot read .*README\.md"):
        write_readme(readme, "table")
    readme.write_text(text)
    with pytest.raises(ConfigurationError, match=r"README\.md needs the lines <!-- results -->"):
        write_readme(readme, "table")
    assert readme.read_text() == text
