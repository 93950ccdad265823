"""Tables: which cells there are, what is in them, and how they get into READMEs."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigurationError
from common.results.markdown import BEGIN, END
from common.results.tables import main, render_table

NATURAL = {"key": "clean_acc", "title": "Natural"}


def test_without_results_only_the_paper_speaks(paper: Any) -> None:
    assert paper.lines_of("E1: main", "toy_net_plain") == {
        "published": {"Natural": "84.56 [R]", "PGD-20": "46.00 / 47.00 [M]"},
        "published, selected": {"Natural": "82.80 [R]"},
    }
    report = render_table("paper_toy")
    text = report.markdown
    assert "plain |g| (`toy_net_plain`)" in str(paper.tables()["E1: main"])
    assert "Sources of published numbers: [R] the repository; [M] measured" in text
    assert paper.tables()["E7: none"] == []
    assert "Neither published nor measured yet: `toy_net_ours`, `toy_net_never`" in text
    assert text.index("rows have not been run: 4") < text.index("E1:")
    assert "Rows without our result: 4 of 4" in text
    assert report.missing == [f"`{stem}`" for stem in paper.rows]


def test_one_seed_and_the_difference_to_the_mean_of_repeats(paper: Any) -> None:
    paper.put("toy_net_plain", clean=0.8, robust=0.5)
    paper.put("toy_net_plain", label="selected", clean=0.85, robust=0.55)
    aa = {"AA†‡": paper.one(24, paper.n // 4), "seeds": "0"}
    assert paper.lines_of("E1: main", "toy_net_plain") == {
        "published": {"Natural": "84.56 [R]", "PGD-20": "46.00 / 47.00 [M]", "seeds": "0"},
        "last": {"Natural": paper.one(80), "PGD-20": "50.00 [43.1, 56.9]", **aa},
        "last − published": {"Natural": "-4.56", "PGD-20": "+3.50", "seeds": "0"},
        "published, selected": {"Natural": "82.80 [R]", "seeds": "0"},
        "selected": {"Natural": paper.one(85), "PGD-20": paper.one(55), **aa},
    }
    text = paper.markdown()
    assert "† Ours is cumulative" in text
    assert "‡ Ours on a part of the examples of the test split: AA on 50." in text
    assert text.index("E1: main") < text.index("rows have not been run: 3")


def test_several_seeds_give_mean_and_sample_deviation(paper: Any) -> None:
    for seed, robust in enumerate((0.50, 0.60, 0.55)):
        paper.put(seed=seed, robust=robust)
    ours = paper.lines_of("E1: main", "toy_net_ours")["last"]
    assert ours["PGD-20"] == "55.00 ± 5.00"  # over n, not n - 1, it would be 4.08
    assert (ours["Natural"], ours["seeds"]) == ("90.00 ± 0.00", "0, 1, 2")
    assert (
        paper.lines_of("E1: main", "toy_net_ours", seeds=[1, 2])["last"]["PGD-20"] == "57.50 ± 3.54"
    )


def test_columns_beyond_the_eighth_are_folded(paper: Any) -> None:
    metrics = [*({"key": f"m{i}", "title": f"M{i}"} for i in range(8)), NATURAL]
    paper.put(measures={"m0": 0.25, "m7": 1.0})
    line = f"| ours (`toy_net_ours`) | last | {paper.one(90)} | 0 |"
    for first, place in ((None, 1), (["clean_acc"], 0)):
        paper.write(groups={"E8": {"metrics": metrics, "first": first}})
        parts = paper.markdown(groups=["E8"]).split("More columns")
        assert line in parts[place]
        assert "| M7 |" in parts[1 - place]
        assert "Natural" not in parts[1 - place]


def with_mean(paper: Any, mean_of: dict[str, float]) -> None:
    metrics = [NATURAL, {"key": "pgd20/ce_f", "title": "f"}, {"key": "aa", "title": "AA"}]
    mean = {"key": "w", "title": "W", "mean_of": mean_of}
    paper.write(groups={"E8": {"metrics": [*metrics, mean]}})


def test_a_column_may_be_the_weighted_mean_of_others(paper: Any) -> None:
    with_mean(paper, {"clean_acc": 0.25, "pgd20/ce_f": 0.75})
    paper.put(without="pgd20/ce_f")
    assert "W" not in paper.lines_of("E8: worst", "toy_net_ours")["last"], "a part of it is missing"
    paper.put(clean=0.9, robust=0.5)
    # without an interval: its parts share their examples
    assert paper.lines_of("E8: worst", "toy_net_ours")["last"]["W"] == "60.00"
    for seed, robust in enumerate((0.50, 0.60, 0.55)):
        paper.put(seed=seed, clean=0.9, robust=robust)
    assert paper.lines_of("E8: worst", "toy_net_ours")["last"]["W"] == "63.75 ± 3.75"
    with_mean(paper, {"clean_acc": 0.5, "aa": 0.5})
    assert "W" not in paper.lines_of("E8: worst", "toy_net_ours")["last"]
    what = "W, last, parts of it on different examples: `toy_net_ours` (seed 0, 1, 2)"
    assert what in paper.markdown()


def test_a_worst_case_over_fewer_attacks_than_that_of_its_row_is_left_out(paper: Any) -> None:
    paper.put()
    paper.put(label="selected")
    lines = paper.lines_of("E8: worst", "toy_net_ours")
    assert lines["last"]["worst‡"] == lines["selected"]["worst‡"] == paper.one(24, paper.n // 4)
    paper.put(label="selected", without="pgd20/ce_p1")
    assert set(paper.lines_of("E8: worst", "toy_net_ours")) == {"last"}
    assert (
        "Left out, because measured otherwise than the rest of the column: worst, selected, other "
        "attacks than for the rest of the row: `toy_net_ours` (seed 0)"
    ) in paper.markdown()


def test_cells_about_other_examples_than_their_column_are_left_out(paper: Any) -> None:
    both = {"groups": ["E1", "E8"]}
    other = {"groups": ["E8"], "last": {}}
    rows = {"toy_net_plain": both, "toy_net_ours": both, "other_net_plain": other}
    paper.write(rows=rows)
    paper.put("toy_net_plain")
    paper.put("toy_net_plain", 1)
    paper.put("toy_net_ours")
    paper.put("toy_net_ours", label="selected", without="aa/square")  # worst of all 200
    paper.put("other_net_plain", part=slice(10, 60))  # as many, but others
    ours = {"last": {"worst‡": paper.one(24, paper.n // 4), "seeds": "0"}}
    assert paper.lines_of("E8: worst", "toy_net_ours") == ours
    assert paper.lines_of("E8: worst", "other_net_plain") == {}
    assert "worst, selected, on 200 examples: `toy_net_ours` (seed 0)" in paper.markdown()
    assert "worst, last, on other 50 examples: `other_net_plain` (seed 0)" in paper.markdown()


def test_which_attacks_worst_cases_are_over_is_said_where_rows_differ(paper: Any) -> None:
    paper.write(rows={"toy_net_plain": {"groups": ["E1", "E8"]}})
    paper.put("toy_net_plain")
    paper.put()
    assert "Worst cases are over" not in paper.markdown()
    paper.put("toy_net_plain", extra="own/ce_f")
    expected = "Worst cases are over aa, pgd20, and beside them own (`toy_net_plain`)."
    assert expected in paper.markdown()


def test_what_is_missing_is_listed(paper: Any) -> None:
    paper.put(seed=0)
    paper.put(seed=0, label="selected")
    paper.put(seed=1)
    paper.put("toy_net_mine")
    report = render_table("paper_toy")
    assert "`toy_net_ours` (selected of seed 1)" in report.missing
    assert "Rows run: 1 of 4 configured." in report.markdown
    assert "without a row in reference.yaml: toy_net_mine" in report.markdown
    missing = render_table("paper_toy", on="toy_net_o", seeds=[0, 1, 2]).missing
    assert missing == ["`toy_net_ours` (seed 2, selected of seed 1)"]
    assert render_table("paper_toy", on="toy_net_o", seeds=[0]).missing == []
    paper.write(checkpoints=["last"])
    assert not any("toy_net_ours" in gap for gap in render_table("paper_toy").missing)


def test_what_a_network_costs_stands_beside_or_alone(paper: Any) -> None:
    time = {"key": "step_time", "title": "Time", "unit": "plain"}
    paper.write(groups={"E1": {"metrics": [*paper.metrics["E1"], time]}})
    paper.put()
    costs = {stem: {"metrics": {"step_time": 1.5}} for stem in ("toy_net_ours", "toy_net_plain")}
    (paper.folder / "results" / "costs.json").write_text(json.dumps({"experiments": costs}))
    assert paper.lines_of("E1: main", "toy_net_ours")["last"]["Time"] == "1.50"
    assert paper.lines_of("E1: main", "toy_net_plain")["network"] == {"Time": "1.50"}


def test_tables_of_an_analysis_follow_the_results(paper: Any) -> None:
    (paper.folder / "results").mkdir()
    path = paper.folder / "results" / "analysis_mnist.json"
    table = {"title": "Verdicts", "note": "By a test.", "header": ["", "b"], "lines": [["x", "1"]]}
    path.write_text(json.dumps({"claims": [], "tables": [table]}))
    assert "By a test." in paper.markdown()
    assert paper.tables()["Verdicts, mnist"] == [{"": "x", "b": "1"}]
    for content, lacking in (
        ({"claims": [], "tables": [{"title": "Verdicts"}]}, "note"),
        ({"expectations": [], "tables": [table]}, "claims"),
    ):
        path.write_text(json.dumps(content))
        with pytest.raises(ConfigurationError, match=rf"analysis_mnist\.json .*{lacking}.*again"):
            render_table("paper_toy")


# --------------------------------------------------------------------- READMEs and command line


def test_the_readme_is_rewritten_between_its_markers_only(
    paper: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    paper.put()
    readme = paper.folder / "README.md"
    before = readme.read_text()
    assert main(["paper_toy", "--check"]) == 1
    assert "README.md is out of date" in capsys.readouterr().out
    assert readme.read_text() == before
    assert main(["paper_toy"]) == 0
    assert readme.read_text() == f"# Toy\n\n{BEGIN}\n\n{paper.markdown()}\n\n{END}\n\nAfter.\n"
    written = readme.stat()
    assert main(["paper_toy"]) == main(["paper_toy", "--check"]) == 0
    assert (readme.stat().st_mtime_ns, readme.stat().st_ino) == (
        written.st_mtime_ns,
        written.st_ino,
    )


def test_the_front_page_has_a_summary_and_the_coverage(paper: Any) -> None:
    wanted = {"group": "E6", "metrics": ["pgd20/ce_f"], "difference": "pgd20/ce_f"}
    paper.write(groups={"E6": {"baseline": "other_net_plain"}}, summary=wanted)
    front = paper.folder.parent / "README.md"
    front.write_text("".join(f"<!-- {p} -->\n<!-- /{p} -->\n" for p in ("summary", "coverage")))
    for seed, robust in enumerate((0.5, 0.6)):
        paper.put("other_net_plain", seed, robust=robust)
        paper.put("toy_net_ours", seed, robust=robust + 0.1 + 0.02 * seed)
    main(["paper_toy"])
    text = front.read_text()
    assert "| ours | 66.00 ± 8.49 | +11.0 [-1.7, +23.7] | 2 |" in text
    assert "| other | 55.00 ± 7.07 |  | 2 |" in text
    assert "| `paper_toy` | 2 / 4 | toy (1), other (1) | toy (2) |" in text


def test_the_terminal_shows_one_small_table(paper: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, clean in enumerate((0.8, 0.9)):
        paper.put(seed=seed, clean=clean)
        paper.put("other_net_plain", seed=seed)
    assert main(["paper_toy"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    (row,) = (line.split() for line in lines if "toy_net_ours" in line)
    assert row == ["toy_net_ours", "85.00", "50.00", "24.00", "2"]
    assert "AA on 50 images" in " ".join(" ".join(lines).split())
    assert "paper_toy/README.md" in " ".join(lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["paper_absent"], "there is no package 'paper_absent'"),
        (["paper toy"], "there is no package 'paper toy'"),
    ],
)
def test_mistakes_are_one_line(
    paper: Any, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_tables_do_not_wait_for_torch() -> None:
    code = "import sys, common.results, common.results.tables; sys.exit('torch' in sys.modules)"
    root = Path(__file__).parents[3]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
