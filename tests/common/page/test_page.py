"""The page of all results: its numbers are those of the files, and text of strangers stays text."""

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from common.files import content_digest
from common.page.__main__ import main
from common.page.site import gather, inline, picture, render
from common.results.store import load_results

ROOT = Path(__file__).parents[3]


class Page(HTMLParser):
    """What a page has: tags with their attributes, texts, tables of metrics, JSON of plots."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.plots: list[Any] = []
        self.metrics: dict[tuple[str, str], dict[str, list[str]]] = {}
        self._row, self._cells, self._kind = "", [""], ""
        self._table: dict[str, list[str]] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {key: value or "" for key, value in attrs}
        self.tags.append((tag, dict(attrs)))
        self._kind = given.get("type", "") if tag == "script" else tag
        if tag == "details" and given.get("class") == "row":
            self._row = given["id"]
        elif tag == "table":
            self._table = {}
            if "data-label" in given:
                self.metrics[self._row, given["data-label"]] = self._table
        elif tag == "tr":
            self._cells = []
        elif tag == "td":
            self._cells.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == "tr" and self._cells:
            self._table[self._cells[0]] = self._cells[1:]

    def handle_data(self, data: str) -> None:
        if self._kind == "application/json" and data.strip():
            self.plots.append(json.loads(data))
        self.texts.append(data)
        if self._cells:
            self._cells[-1] += data.strip()

    def links(self) -> set[str]:
        return {(given["href"] or "") for tag, given in self.tags if tag == "a"}

    def ids(self) -> list[str]:
        return [given["id"] or "" for _, given in self.tags if "id" in given]


def folder_of(name: str) -> Path:
    return ROOT / ("benchmarks/robustness" if name == "robustness" else name)


def test_every_number_of_every_result_is_on_the_page(everything: Any) -> None:
    page, count = Page(everything[1]), 0
    for source in everything[0]:
        anchors = {one.row.stem: one for one in source.details}
        for result in load_results(folder_of(source.name) / "results"):
            one = anchors[result["experiment"]]
            column = one.seeds.index(result["seed"])
            for label, entry in result["checkpoints"].items():
                shown = page.metrics[one.anchor, label]
                for name, value in entry["metrics"].items():
                    if name.startswith("audit") or name.endswith("_clean"):
                        continue
                    number, count = float(shown[name][column].replace(",", "")), count + 1
                    if name in entry["intervals"]:
                        assert number == pytest.approx(100 * value, abs=0.005001)
                    else:
                        assert number == pytest.approx(value, rel=5e-6) or (
                            number == pytest.approx(100 * value, abs=0.005001)
                        )
    assert count > 1000


def test_points_of_plots_are_numbers_of_the_files(everything: Any) -> None:
    for source in everything[0]:
        last = [
            result["checkpoints"]["last"]
            for result in load_results(folder_of(source.name) / "results")
        ]
        worst = {
            round(100 * one["metrics"]["worst"], 6) for one in last if "worst" in one["metrics"]
        }
        trade_offs = [plot for plot in source.plots if "trade-off" in plot.title]  # by data set
        points = [y for one in trade_offs for trace in one.figure["data"] for y in trace["y"]]
        assert points
        assert {round(y, 6) for y in points} <= worst


def test_the_page_loads_nothing_and_its_links_have_targets(everything: Any) -> None:
    page = Page(everything[1])
    assert {link[0] for link in page.links()} == {"#"}
    ids = page.ids()
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in page.links()} <= set(ids)
    for tag, given in page.tags:
        assert not given.get("src") or (given["src"] or "").startswith("data:image/webp")
        assert tag not in ("iframe", "object", "embed")
    (policy,) = (g["content"] or "" for t, g in page.tags if g.get("http-equiv"))
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy.split("script-src")[1]
    assert len(everything[1].encode()) < 11e6


def test_text_of_strangers_stays_text(hostile: tuple[str, str]) -> None:
    text, html = hostile
    page = Page(html)
    for tag, given in page.tags:
        assert not any(name.startswith("on") for name in given)
        assert tag != "img" or (given["src"] or "").startswith("data:image/webp;base64,UklGR")
    kinds = [given.get("type") for tag, given in page.tags if tag == "script"]
    assert set(kinds) == {"application/json", "application/gzip", None}
    assert kinds.count(None) == 1
    shown, wanted = (" ".join(one.split()) for one in ("".join(page.texts), text))
    assert wanted in shown
    marks = str.maketrans("", "", "`*")
    assert shown.translate(marks).count(wanted.translate(marks)) > shown.count(wanted)
    names = [trace["name"] for plot in page.plots for trace in plot["data"]]
    assert names
    assert not any("<" in name for name in names), "plotly reads names as HTML"


def test_emphasis_code_and_links_are_the_only_marks() -> None:
    links = {"digits_cifs": "cifs-digits"}
    assert inline("*p* of `digits_cifs` < `x`*2*", links) == (
        '<em>p</em> of <a href="#cifs-digits"><code>digits_<wbr>cifs</code></a> &lt; '
        "<code>x</code><em>2</em>"
    )
    assert inline("2 * 3 * 4") == "2 * 3 * 4"


def test_the_comparison_is_read_from_its_own_folder(paper: Any, capsys: Any) -> None:
    for seed in range(3):
        paper.put("toy_net_ours", seed, robust=0.8, without="aa/square")
        paper.put("toy_net_plain", seed, robust=0.3, without="aa/square")
    groups = {"E1": {"metrics": [{"key": "worst", "title": "worst"}]}}
    paper.write(groups=groups, rows={"toy_net_plain": {"last": {}, "selected": {}}})
    shutil.copytree("paper_toy", "benchmarks/robustness")
    sources = gather(["paper_toy"], Path("benchmarks/robustness"))
    assert [source.name for source in sources] == ["robustness", "paper_toy"]
    (board,) = sources[0].boards
    stems = [re.search("`(.*)`", line[0])[1] for line in board.lines]
    assert stems == ["toy_net_ours", "toy_net_plain"]
    assert main(["paper_toy"]) == 0
    assert "report/index.html" in capsys.readouterr().out
    assert 'id="robustness-toy_net_ours"' in Path("report/index.html").read_text()


def test_the_table_of_all_rows_says_whose_numbers_stand_in_it(paper: Any) -> None:
    """Others' numbers with their tag, those of selected checkpoints, a cut AutoAttack; all rows."""
    printed = {"clean_acc": 88.25, "aa": 47.5}
    row = {"last": {}, "selected": printed, "source": "M", "origin": "another framework"}
    groups = {"E1": {"metrics": [{"key": key, "title": key} for key in printed]}}
    paper.write(groups=groups, rows={"toy_net_ours": row, "toy_net_plain": {"last": {}}})
    paper.put()
    shutil.copytree("paper_toy", "benchmarks/robustness")
    sources = gather(["paper_toy"], Path("benchmarks/robustness"))
    for source in sources:
        (columns,) = (one.columns for one in source.details if one.seeds)
        assert columns["Natural, published"].text == "88.25§ [M]"
        assert columns["Natural, published"].hint == "another framework, selected"
        assert columns["AutoAttack, ours"].text.endswith("‡†")
        cut = "on 50 images; without apgd-ce, without apgd-t, without fab-t"
        assert columns["AutoAttack, ours"].hint == cut
    html = render(sources)
    assert html.count('title="another framework, selected"') == 4, "rows of the comparison as well"
    assert "paper</button>" in html
    assert ", paper</button>" not in html


def test_confusion_and_examples_are_shown(paper: Any) -> None:
    paper.put()
    path = Path("paper_toy/results/toy_net_ours-seed0.json")
    data = json.loads(path.read_text())
    del data["digest"]
    table = [[11 * i + j for j in range(10)] for i in range(10)]
    data["checkpoints"]["last"]["confusion"] = table
    data["digest"] = content_digest(data)
    path.write_text(json.dumps(data))
    (source,) = gather(["paper_toy"])
    html = render([source])
    cells = re.findall(r'<td style="--share: [\d.e-]+">(\d+)</td>', html)
    assert list(map(int, cells)) == [count for row in table for count in row]
    assert 'make reproduce-toy ON=toy_net_ours SEEDS="0"' in Page(html).texts


def test_a_picture_keeps_its_pixels(tmp_path: Path) -> None:
    path = tmp_path / "noise.png"
    noise = np.random.default_rng(0).integers(0, 256, (9, 7, 4), dtype=np.uint8)
    noise[..., 3] |= 1  # WebP may change the colours of pixels that nobody sees
    Image.fromarray(noise).save(path)
    kind, _, content = picture(path).partition(",")
    assert kind == "data:image/webp;base64"
    with Image.open(io.BytesIO(base64.b64decode(content))) as shown:
        np.testing.assert_array_equal(np.array(shown.convert("RGBA")), noise)


def test_a_damaged_picture_is_named_in_one_line(paper: Any, capsys: Any) -> None:
    paper.put()
    path = Path("paper_toy/results/figures/a.png")
    path.parent.mkdir()
    Image.new("RGB", (20, 30), "red").save(path)
    for content in (b"", path.read_bytes()[:50], path.read_bytes().replace(b"IDAT", b"IDAX")):
        path.write_bytes(content)
        assert main(["paper_toy"]) == 2
        captured = capsys.readouterr()
        assert str(path) in captured.err
        assert captured.err.count("\n") == 1
        assert not Path("report").exists()


def test_a_damaged_file_is_named_in_one_line(paper: Any, capsys: Any) -> None:
    paper.put()
    path = Path("paper_toy/results/toy_net_ours-seed0.json")
    path.write_text(path.read_text().replace("0.9", "0.8", 1))
    assert main(["paper_toy"]) == 2
    captured = capsys.readouterr()
    assert str(path) in captured.err
    assert captured.err.count("\n") == 1
    assert not Path("report").exists()
