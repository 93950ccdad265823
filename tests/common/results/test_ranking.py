"""Rankings: order, places that a test supports, and what is left out."""

import json
from typing import Any

from common.results.ranking import Placed, ranking
from common.results.store import result_path
from common.results.tables import render_table

STEMS = ("toy_net_plain", "toy_net_ours", "toy_net_never")


def ranked(paper: Any) -> tuple[list[Placed], list[str]]:
    columns = [{"key": "worst", "title": "worst"}]
    rows = {stem: {"groups": ["E8"], "last": {}, "selected": {}} for stem in STEMS}
    paper.write(groups={"E8": {"metrics": columns}}, rows=rows)
    report = render_table("paper_toy")
    (group,) = (group for group in report.reference.groups if group.id == "E8")
    return ranking(group, report.reference.members(group), report.results)


def put(paper: Any, stem: str, robust: float, shift: int = 0, **more: Any) -> None:
    for seed in (0, 1):
        paper.put(stem, seed, robust=robust, shift=shift, without="aa/square", **more)


def test_rows_that_a_test_does_not_tell_apart_share_a_place(paper: Any) -> None:
    put(paper, "toy_net_plain", 0.5)
    put(paper, "toy_net_ours", 0.52, shift=1)  # 4 images more, of about 5 that differ
    put(paper, "toy_net_never", 0.3)
    placed, left_out = ranked(paper)
    assert [(one.row.stem, one.place) for one in placed] == [
        ("toy_net_ours", 1),
        ("toy_net_plain", 1),
        ("toy_net_never", 3),
    ]
    assert left_out == []
    first = placed[0]
    assert first.values() == [first.worst] * 2
    assert first.seeds == 2
    assert first.over_images[0] < first.worst < first.over_images[1]


def test_a_table_shows_its_ranking_if_it_asks_for_it(paper: Any) -> None:
    put(paper, "toy_net_plain", 0.5, measures={"macs": 1200.0})
    put(paper, "toy_net_ours", 0.7)
    first, second = (f"{100 * one.worst:.2f}" for one in ranked(paper)[0])
    assert render_table("paper_toy").boards == []
    rows = {stem: {"groups": ["E8"], "last": {}, "selected": {}} for stem in STEMS}
    columns = [{"key": "worst", "title": "worst"}]
    paper.write(groups={"E8": {"metrics": columns, "ranked": True}}, rows=rows)
    report = render_table("paper_toy")
    ((ours, plain),) = (sheet.lines for sheet in report.boards)
    assert (ours[1:3], ours[6]) == (["1", first], "")
    assert (plain[1:3], plain[6]) == (["2", second], "1,200")
    assert report.markdown.index(f"| {first} |") < report.markdown.index("<details>")


def test_a_difference_in_one_seed_alone_is_none(paper: Any) -> None:
    for seed, robust in ((0, 0.8), (1, 0.5)):
        paper.put("toy_net_ours", seed, robust=robust, without="aa/square")
        paper.put("toy_net_plain", seed, robust=0.5, without="aa/square")
    assert {one.place for one in ranked(paper)[0]} == {1}


def test_seeds_that_contradict_each_other_tell_nothing_apart(paper: Any) -> None:
    for seed, (a, b) in enumerate(((0.9, 0.4), (0.4, 0.9))):
        paper.put("toy_net_plain", seed, robust=a, without="aa/square")
        paper.put("toy_net_ours", seed, robust=b, without="aa/square")
    assert {one.place for one in ranked(paper)[0]} == {1}


def test_a_worst_case_for_another_threat_is_left_out(paper: Any) -> None:
    put(paper, "toy_net_plain", 0.5)
    put(paper, "toy_net_ours", 0.6)
    put(paper, "toy_net_never", 0.9)
    for seed in (0, 1):
        path = result_path(paper.folder / "results", "toy_net_never", seed)
        data = json.loads(path.read_text())
        del data["digest"]
        data["checkpoints"]["last"]["threat"] = {"norm": "linf", "eps": 0.01}
        path.write_text(json.dumps(data))
    placed, left_out = ranked(paper)
    assert [one.row.stem for one in placed] == ["toy_net_ours", "toy_net_plain"]
    assert len(left_out) == 2


def test_rows_measured_otherwise_are_left_out_and_named(paper: Any) -> None:
    put(paper, "toy_net_plain", 0.5)
    put(paper, "toy_net_ours", 0.6)
    put(paper, "toy_net_never", 0.9, labels=8)
    placed, left_out = ranked(paper)
    assert [one.row.stem for one in placed] == ["toy_net_ours", "toy_net_plain"]
    assert len(left_out) == 2
    assert "toy_net_never" in left_out[0]
