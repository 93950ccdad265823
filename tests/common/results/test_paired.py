"""Result files compared image by image on the command line, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from common.results.__main__ import compare, main
from common.results.outcomes import outcome_bits, positions
from common.results.paired import paired
from common.results.statistics import holm, mcnemar_exact
from common.results.store import read_result

A, B, C = (f"paper_toy/results/toy_net_ours-seed{seed}.json" for seed in range(3))


def edited(path: str, **checkpoint: Any) -> None:
    """Change parts of the last checkpoint of a file."""
    data = json.loads(Path(path).read_text())
    del data["digest"]
    data["checkpoints"]["last"] |= checkpoint
    Path(path).write_text(json.dumps(data))


def output(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["compare", *words]) == 0
    return " ".join(capsys.readouterr().out.split())


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["compare", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_the_images_that_only_one_gets_right_are_those_of_the_outcomes(paper: Any) -> None:
    paper.put(seed=0, robust=0.6, shift=13)
    paper.put(seed=1, robust=0.5)
    first, second = (read_result(path)["checkpoints"]["last"] for path in (A, B))
    found = paired(first, second)
    assert "pgd20" not in found, "the lowest of two losses has no outcome per image"
    for name, pair in found.items():
        one, other = (outcome_bits(entry, name) for entry in (first, second))
        assert one
        assert other
        where = positions(first, name)
        assert pair.only_first == [i for i, a, b in zip(where, one, other, strict=True) if a > b]
        assert pair.only_second == [i for i, a, b in zip(where, one, other, strict=True) if b > a]
        assert pair.size == len(where)
        assert pair.difference == pytest.approx(100 * (pair.first - pair.second))


def test_files_are_compared_with_the_first(paper: Any, capsys: Any) -> None:
    paper.put(seed=0, clean=0.9, robust=0.6)
    paper.put(seed=1, clean=0.8, robust=0.6, shift=3)
    p = mcnemar_exact(20, 0)
    text = output(capsys, A, B)
    assert f"clean_acc 200 90.00 80.00 +10.00 20 / 0 {p:.2g}" in text
    assert "pgd20/ce_f 200 60.00 60.00 +0.00 3 / 3 1" in text
    assert "worst, images that only A gets right: 0, 1, 2 " in text
    paper.put(seed=2, clean=0.85, robust=0.6)
    text = output(capsys, A, B, C)
    for q, adjusted in zip((p, mcnemar_exact(10, 0)), holm([p, mcnemar_exact(10, 0)]), strict=True):
        assert f"{q:.2g} {adjusted:.2g}" in text


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"threat": {"norm": "linf", "eps": 0.3}}, "linf eps 0.3"),
        ({"labels": 8}, "8 classes"),
        ({"extra": "cw/ce_f"}, "cw"),
        ({"part": slice(10, 60)}, "aa"),
    ],
)
def test_what_differs_is_refused(paper: Any, capsys: Any, change: Any, named: str) -> None:
    paper.put(seed=0)
    threat = {"threat": change.pop("threat")} if "threat" in change else {}
    paper.put(seed=1, **change)
    if threat:
        edited(B, **threat)
    assert named in refusal(capsys, A, B)


def test_other_images_with_the_same_labels_are_refused(paper: Any, capsys: Any) -> None:
    for seed, digest in enumerate(("1111", "2222")):
        paper.put(seed=seed)
        path = f"paper_toy/results/toy_net_ours-seed{seed}.json"
        data = json.loads(Path(path).read_text())
        del data["digest"]
        data["provenance"]["last"]["data_digest"] = digest
        Path(path).write_text(json.dumps(data))
    assert "1111" in refusal(capsys, A, B)


def test_one_metric_is_compared_where_suites_differ(paper: Any, capsys: Any) -> None:
    paper.put(seed=0, robust=0.6)
    paper.put(seed=1, robust=0.5, extra="cw/ce_f")
    text = output(capsys, A, B, "--metric", "pgd20/ce_f")
    assert "pgd20/ce_f 200 60.00 50.00 +10.00 20 / 0" in text
    assert "clean_acc" not in text
    assert "cw/ce_f" in output(capsys, A, B, "--metric", "worst"), "an attack that only B had"
    for name in ("pgd20", "absent"):
        assert name in refusal(capsys, A, B, "--metric", name)


def test_every_row_of_several_files_is_corrected(paper: Any, capsys: Any) -> None:
    """A metric that repeats its union beside one file alone is shown beside both."""
    for seed, robust in enumerate((0.6, 0.5, 0.4)):
        paper.put(seed=seed, robust=robust, shift=seed)
    found = [paired(*(read_result(p)["checkpoints"]["last"] for p in (A, b))) for b in (B, C)]
    tables = [part for part in compare([A, B, C]) if not isinstance(part, str)]
    names = [list(table.columns[0].cells) for table in tables]
    assert len(tables) == 2
    assert names[0] == names[1]
    for table in tables:
        assert table.columns[-1].header == "Holm"
        assert all(table.columns[-1].cells)
    assert {str(name) for name in names[0]} <= found[0].keys() & found[1].keys()


def test_checkpoints_and_files_are_chosen(paper: Any, capsys: Any) -> None:
    paper.put(seed=0)
    paper.put(seed=1, label="model")
    assert "clean_acc" in output(capsys, A, B)
    paper.put(seed=1, label="other")
    assert "model, other" in refusal(capsys, A, B)
    assert "last" in refusal(capsys, A, B, "--checkpoint", "other")
    assert A in refusal(capsys, A)
    assert f"{A} is given twice" in refusal(capsys, A, B, f"./{A}")
    assert "none.json" in refusal(capsys, A, "none.json")


def test_names_in_files_stay_text_in_a_terminal(paper: Any, capsys: Any) -> None:
    for seed in (0, 1):
        paper.put(seed=seed, extra="[red]x[/]\n\x1b[31m/ce_f")
    assert main(["compare", A, B]) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert "[red]x[/]" in text
