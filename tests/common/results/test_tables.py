"""Tables: which cells there are, what is in them, and how they get into a README."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from common.errors import ConfigurationError
from common.results.front import write_front
from common.results.lines import Line, Outcomes
from common.results.markdown import BEGIN, END, write_readme
from common.results.outcomes import checkpoint_entry
from common.results.reference import read_reference
from common.results.statistics import mcnemar_exact, welch_t_test, wilson_interval
from common.results.store import merge_result, result_path
from common.results.tables import main, render_table

N = 200
REFERENCE: dict[str, Any] = {
    "title": "A paper",
    "tags": {"R": "the repository", "C": "a choice"},
    "groups": [
        {
            "id": "E1",
            "title": "E1: main",
            "note": "A note.",
            "metrics": [
                {"key": "clean_acc", "title": "Natural"},
                {"key": "pgd20", "title": "PGD-20"},
                {"key": "aa", "title": "AA"},
            ],
        },
        {
            "id": "E6",
            "title": "E6: by loss",
            "layout": "stacked",
            "metrics": [
                {"key": "pgd20/ce_f", "title": "f"},
                {"key": "pgd20/ce_p1", "title": "p1"},
            ],
        },
        {"id": "E7", "title": "E7: none", "metrics": [{"key": "clean_acc", "title": "Natural"}]},
        {"id": "E8", "title": "E8: worst", "metrics": [{"key": "worst", "title": "worst"}]},
    ],
    "rows": {
        "toy_net_plain": {
            "groups": ["E1"],
            "label": "plain |g|",
            "source": "R",
            "last": {"clean_acc": 84.56, "pgd20": [46.0, 47.0], "aa": None},
            "selected": {"clean_acc": 82.8},
        },
        "toy_net_ours": {"groups": ["E1", "E6", "E8"], "label": "ours", "source": "C"},
        "toy_net_never": {"groups": ["E1", "E7"], "label": "never", "source": "C"},
        "other_net_plain": {
            "groups": ["E6"],
            "label": "other",
            "source": "R",
            "last": {"pgd20/ce_f": 50.0},
        },
    },
}


@pytest.fixture
def paper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package ``paper_toy`` on the path, without results."""
    folder = tmp_path / "paper_toy"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "README.md").write_text(f"# Toy\n\n{BEGIN}\n{END}\n\nAfter.\n")
    write_reference(folder, REFERENCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder


def write_reference(folder: Path, reference: Any) -> None:
    (folder / "reference.yaml").write_text(yaml.safe_dump(reference, sort_keys=False))


def put(
    folder: Path,
    stem: str = "toy_net_ours",
    seed: int = 0,
    label: str = "last",
    clean: float = 0.9,
    robust: float = 0.5,
    without: str | None = None,
    audit: Any = None,
    shift: int = 0,
    labels: int = 10,
    part: slice = slice(N // 4),
    extra: str | None = None,
) -> None:
    """A result in which the first so many examples are right; ``shift`` moves those of ce_f on.

    The attack ``aa/square`` meets ``part`` alone; ``extra`` is one more attack.
    """
    few = N // 4
    right = torch.arange(N)
    correct = {
        "clean": right < round(clean * N),
        "pgd20/ce_f": (right - shift) % N < round(robust * N),
        "pgd20/ce_p1": right < round((robust + 0.1) * N),
        "aa/square": right < round(0.25 * few),
    }
    attacked = dict.fromkeys(list(correct)[1:], right < N)
    attacked["aa/square"] = torch.zeros(N, dtype=torch.bool)
    attacked["aa/square"][part] = True
    if extra is not None:
        correct[extra], attacked[extra] = right < N, right < N
    attacked.pop(without, None)  # type: ignore[arg-type]
    lines = {"aa/square": Line("aa", survivors_only=True)}
    entry = checkpoint_entry(Outcomes(right % labels, correct, attacked, lines), audit=audit)
    file_away(folder, stem, entry, seed, label)


def file_away(folder: Path, stem: str, entry: Any, seed: int = 0, label: str = "last") -> None:
    merge_result(
        result_path(folder / "results", stem, seed),
        paper="paper_toy",
        experiment=stem,
        seed=seed,
        label=label,
        entry=entry,
        provenance={"config_digest": f"of seed {seed}"},
    )


def one(percent: float, n: int = N) -> str:
    """The cell of a single seed."""
    low, high = (100 * end for end in wilson_interval(round(percent * n / 100), n))
    return f"{percent:.2f} [{low:.1f}, {high:.1f}]"


def tables(markdown: str) -> dict[str, list[dict[str, str]]]:
    """The tables of a Markdown text by their headings, each a list of rows by column."""
    found: dict[str, list[dict[str, str]]] = {}
    for section in markdown.split("### ")[1:]:
        heading, *lines = section.splitlines()
        cells = [
            [
                cell.strip().replace("\0", "|")
                for cell in line.replace("\\|", "\0").strip("|").split("|")
            ]
            for line in lines
            if line.startswith("|")
        ]
        assert len({len(row) for row in cells}) <= 1, "a ragged table"
        found[heading] = [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]
    return found


# ------------------------------------------------------------------------------------------ cells


def test_without_results_only_the_paper_speaks(paper: Path) -> None:
    report = render_table("paper_toy")
    (plain,) = tables(report.markdown)["E1: main"]
    assert plain == {
        "experiment": "plain |g| (`toy_net_plain`)",
        "Natural published": "84.56 [R]",
        "Natural published, selected": "82.80 [R]",
        "PGD-20 published": "46.00 / 47.00 [R]",
        "seeds": "",
    }
    assert "Sources of published numbers: [R] the repository." in report.markdown
    assert "Tables whose rows have not been run: 4" in report.markdown
    assert report.compact is None
    assert tables(report.markdown)["E7: none"] == []
    assert "Neither published nor measured yet: `toy_net_ours`, `toy_net_never`" in report.markdown
    assert "Rows without our result: 4 of 4" in report.markdown
    assert report.missing == [f"`{stem}`" for stem in REFERENCE["rows"]]


def test_one_seed_and_the_difference_to_the_mean_of_repeats(paper: Path) -> None:
    put(paper, "toy_net_plain", clean=0.8, robust=0.5)
    put(paper, "toy_net_plain", label="selected", clean=0.85, robust=0.55)
    rows = tables(render_table("paper_toy").markdown)["E1: main"]  # stacked: too wide otherwise
    assert [list(row.values()) for row in rows] == [
        ["plain |g| (`toy_net_plain`)", "published", "84.56 [R]", "46.00 / 47.00 [R]", "", "0"],
        ["", "last", one(80), one(50), one(24, N // 4), "0"],
        ["", "last − published", "-4.56", "+3.50", "", "0"],
        ["", "published, selected", "82.80 [R]", "", "", "0"],
        ["", "selected", one(85), one(55), one(24, N // 4), "0"],
    ]
    assert list(rows[0]) == ["experiment", "", "Natural", "PGD-20", "AA†‡", "seeds"]


def test_one_seed_by_hand(paper: Path) -> None:
    put(paper, robust=0.5)
    markdown = render_table("paper_toy").markdown
    rows = tables(markdown)["E6: by loss"]
    assert rows[0]["f"] == "50.00 [43.1, 56.9]"
    assert "the 95 % interval that the finite number of test examples leaves" in markdown


def test_a_metric_that_somebody_added_has_no_interval(paper: Path) -> None:
    put(paper)
    path = result_path(paper / "results", "toy_net_ours", 0)
    data = json.loads(path.read_text())
    data["checkpoints"]["last"]["metrics"]["drift"] = 0.25
    del data["digest"]
    path.write_text(json.dumps(data))
    group = {**REFERENCE["groups"][3], "metrics": [{"key": "drift", "title": "drift"}]}
    write_reference(paper, {**REFERENCE, "groups": [*REFERENCE["groups"][:3], group]})
    (row,) = tables(render_table("paper_toy").markdown)["E8: worst"]
    assert row["drift last"] == "25.00"


def test_several_seeds_give_mean_and_sample_deviation(paper: Path) -> None:
    for seed, robust in enumerate((0.50, 0.60, 0.55)):
        put(paper, seed=seed, robust=robust)
    rows = tables(render_table("paper_toy").markdown)["E1: main"]
    ours = next(row for row in rows if "toy_net_ours" in row["experiment"])
    assert ours["PGD-20 last"] == "55.00 ± 5.00"  # over n, not n - 1, it would be 4.08
    assert ours["Natural last"] == "90.00 ± 0.00"
    assert ours["seeds"] == "0, 1, 2"
    rows = tables(render_table("paper_toy", seeds=[1, 2]).markdown)["E1: main"]
    assert rows[1]["PGD-20 last"] == "57.50 ± 3.54"


def with_mean(**mean_of: float) -> dict[str, Any]:
    metrics = [{"key": "clean_acc", "title": "Natural"}, {"key": "pgd20/ce_f", "title": "f"}]
    weights = {key.replace("pgd20_ce_f", "pgd20/ce_f"): w for key, w in mean_of.items()}
    metrics.append({"key": "w", "title": "W", "mean_of": weights})
    group = {**REFERENCE["groups"][3], "metrics": metrics}
    return {**REFERENCE, "groups": [*REFERENCE["groups"][:3], group]}


def test_a_column_may_be_the_weighted_mean_of_others(paper: Path) -> None:
    write_reference(paper, with_mean(clean_acc=0.25, pgd20_ce_f=0.75))
    put(paper, clean=0.9, robust=0.5)
    (row,) = tables(render_table("paper_toy").markdown)["E8: worst"]
    assert row["W last"] == "60.00", "without an interval: its parts share their examples"
    for seed, robust in enumerate((0.50, 0.60, 0.55)):
        put(paper, seed=seed, clean=0.9, robust=robust)
    (row,) = tables(render_table("paper_toy").markdown)["E8: worst"]
    assert row["W last"] == "63.75 ± 3.75", "of every seed, then over seeds"


def test_a_mean_without_all_of_its_parts_is_empty(paper: Path) -> None:
    write_reference(paper, with_mean(clean_acc=0.5, pgd20_ce_f=0.5))
    put(paper, without="pgd20/ce_f")
    (row,) = tables(render_table("paper_toy").markdown)["E8: worst"]
    assert "W last" not in row
    assert row["Natural last"] == one(90.0)


@pytest.mark.parametrize(
    ("mean_of", "message"),
    [
        ({"clean_acc": 0.5, "aa": 0.5}, "w in the group E8 is a mean of 'aa', which is no column"),
        ({"clean_acc": 0.5, "w": 0.5}, "a mean of 'w', which is no column"),
        ({"clean_acc": 0.5, "pgd20_ce_f": 0.6}, "weights of at least 0 that sum to 1"),
        ({"clean_acc": 1.5, "pgd20_ce_f": -0.5}, "weights of at least 0 that sum to 1"),
        ({}, "weights of at least 0 that sum to 1"),
    ],
)
def test_a_mean_of_what_is_not_there_is_refused(
    paper: Path, mean_of: dict[str, float], message: str
) -> None:
    write_reference(paper, with_mean(**mean_of))
    with pytest.raises(ConfigurationError, match=message):
        render_table("paper_toy")


def test_stacked_tables_have_a_line_per_kind(paper: Path) -> None:
    put(paper, robust=0.5)
    put(paper, label="selected", robust=0.6)
    put(paper, "other_net_plain", robust=0.4)
    rows = tables(render_table("paper_toy").markdown)["E6: by loss"]
    assert [(row["experiment"], row[""], row["f"], row["p1"]) for row in rows] == [
        ("ours (`toy_net_ours`)", "last", one(50), one(60)),
        ("", "selected", one(60), one(70)),
        ("other (`other_net_plain`)", "published", "50.00 [R]", ""),
        ("", "last", one(40), one(50)),
        ("", "last − published", "-10.00", ""),
    ]


def test_footnotes_say_what_ours_is_about(paper: Path) -> None:
    before = render_table("paper_toy").markdown
    assert "†" not in before
    assert "‡" not in before
    put(paper)
    markdown = render_table("paper_toy").markdown
    assert "AA†‡ last" in markdown
    assert "PGD-20† " not in markdown
    assert "† Ours is cumulative" in markdown
    assert "‡ Ours on a part of the examples of the test split: AA on 50." in markdown


def test_a_worst_case_over_fewer_attacks_than_that_of_its_row_is_left_out(paper: Path) -> None:
    put(paper)
    put(paper, label="selected")
    (row,) = tables(render_table("paper_toy").markdown)["E8: worst"]
    assert row["worst‡ last"] == row["worst‡ selected"] == one(24, N // 4)
    put(paper, label="selected", without="pgd20/ce_p1")
    markdown = render_table("paper_toy").markdown
    (row,) = tables(markdown)["E8: worst"]
    assert set(row) == {"experiment", "worst‡ last", "seeds"}
    assert (
        "Left out, because measured otherwise than the rest of the column: worst, selected, other "
        "attacks than for the rest of the row: `toy_net_ours` (seed 0)" in markdown
    )


def test_cells_about_other_examples_than_their_column_are_left_out(paper: Path) -> None:
    rows = {stem: {**row, "groups": ["E1", "E8"]} for stem, row in REFERENCE["rows"].items()}
    rows["other_net_plain"] = {"groups": ["E8"], "label": "other"}
    write_reference(paper, {**REFERENCE, "rows": rows})
    put(paper, "toy_net_plain")
    put(paper, "toy_net_plain", 1)
    put(paper, "toy_net_ours")
    put(paper, "toy_net_ours", label="selected", without="aa/square")  # worst of all 200
    put(paper, "other_net_plain", part=slice(10, 60))  # as many, but others
    markdown = render_table("paper_toy").markdown
    found = {row["experiment"].split("`")[1]: row for row in tables(markdown)["E8: worst"]}
    assert found["toy_net_ours"]["worst‡ last"] == one(24, N // 4)
    assert found["other_net_plain"]["worst‡ last"] == ""
    assert "worst‡ selected" not in found["toy_net_ours"]
    assert "worst, selected, on 200 examples: `toy_net_ours` (seed 0)" in markdown
    assert "worst, last, on other 50 examples: `other_net_plain` (seed 0)" in markdown


def test_a_mean_of_figures_about_different_examples_is_left_out(paper: Path) -> None:
    metrics = [{"key": key, "title": key} for key in ("clean_acc", "aa")]
    metrics.append({"key": "w", "title": "W", "mean_of": {"clean_acc": 0.5, "aa": 0.5}})
    group = {**REFERENCE["groups"][3], "metrics": metrics}
    write_reference(paper, {**REFERENCE, "groups": [*REFERENCE["groups"][:3], group]})
    put(paper)
    markdown = render_table("paper_toy").markdown
    (row,) = tables(markdown)["E8: worst"]
    assert "W last" not in row
    assert "W, last, parts of it on different examples: `toy_net_ours` (seed 0)" in markdown


def test_which_attacks_worst_cases_are_over_is_said_where_rows_differ(paper: Path) -> None:
    rows = {stem: {**row, "groups": ["E1", "E8"]} for stem, row in REFERENCE["rows"].items()}
    write_reference(
        paper, {**REFERENCE, "rows": rows | {"other_net_plain": {"groups": ["E6"], "label": "o"}}}
    )
    put(paper, "toy_net_plain")
    put(paper)
    assert "Worst cases are over" not in render_table("paper_toy").markdown
    put(paper, "toy_net_plain", extra="own/ce_f")
    assert (
        "Worst cases are over aa, pgd20, and beside them own (`toy_net_plain`)."
        in render_table("paper_toy").markdown
    )


def test_what_is_missing_is_listed(paper: Path) -> None:
    put(paper, seed=0)
    put(paper, seed=0, label="selected")
    put(paper, seed=1)
    assert "`toy_net_ours` (selected of seed 1)" in render_table("paper_toy").missing
    missing = render_table("paper_toy", on="toy_net_o", seeds=[0, 1, 2]).missing
    assert missing == ["`toy_net_ours` (seed 2, selected of seed 1)"]
    assert render_table("paper_toy", on="toy_net_o", seeds=[0]).missing == []


def test_a_result_nobody_asked_for_is_mentioned(paper: Path) -> None:
    put(paper, "toy_net_mine")
    assert "without a row in reference.yaml: toy_net_mine" in render_table("paper_toy").markdown


def test_the_terminal_shows_one_small_table(
    paper: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(paper, "toy_net_plain", clean=0.8)
    put(paper, "toy_net_plain", seed=1, clean=0.9)
    assert main(["paper_toy"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert "E1: main" in lines[0]
    (row,) = (line.split() for line in lines if "toy_net_plain" in line)
    assert row == ["toy_net_plain", "85.00", "50.00", "24.00", "2"]
    assert "paper_toy/README.md" in " ".join(lines)


def test_further_columns_are_folded(paper: Path) -> None:
    group = {**REFERENCE["groups"][0], "first": ["pgd20"]}
    write_reference(paper, {**REFERENCE, "groups": [group, *REFERENCE["groups"][1:]]})
    put(paper)
    markdown = render_table("paper_toy", groups=["E1"]).markdown
    first, _, rest = markdown.partition("<details><summary>More columns</summary>")
    assert "PGD-20 last" in first
    assert "Natural last" not in first
    assert "Natural last" in rest.partition("</details>")[0]
    for wrong in (["absent"], ["pgd20"] * 9):
        write_reference(
            paper,
            {**REFERENCE, "groups": [{**group, "first": wrong}, *REFERENCE["groups"][1:]]},
        )
        with pytest.raises(ConfigurationError, match="first of 'E1' names at most 8"):
            render_table("paper_toy")


def test_the_front_page_has_a_summary_and_the_coverage(paper: Path) -> None:
    wanted = {"group": "E6", "metrics": ["pgd20/ce_f"], "difference": "pgd20/ce_f"}
    groups = copy.deepcopy(REFERENCE["groups"])
    groups[1]["baseline"] = "other_net_plain"
    write_reference(paper, {**REFERENCE, "groups": groups, "summary": wanted})
    front = paper.parent / "README.md"
    front.write_text("<!-- summary -->\n<!-- /summary -->\n<!-- coverage -->\n<!-- /coverage -->\n")
    for seed, robust in enumerate((0.5, 0.6)):
        put(paper, "other_net_plain", seed, robust=robust)
        put(paper, "toy_net_ours", seed, robust=robust + 0.1)
    main(["paper_toy"])
    text = front.read_text()
    assert "| ours | 65.00 ± 7.07 | +10.0 [+10.0, +10.0] | 2 |" in text
    assert "| other | 55.00 ± 7.07 |  | 2 |" in text
    assert "| `paper_toy` | 2 / 4 | toy (1), other (1) | toy (2) |" in text
    write_reference(paper, {**REFERENCE, "summary": {**wanted, "difference": "absent"}})
    with pytest.raises(ConfigurationError, match="among the columns"):
        write_front(front)


def test_tables_of_an_analysis_follow_the_results(paper: Path) -> None:
    (paper / "results").mkdir()
    path = paper / "results" / "analysis_mnist.json"
    table = {"title": "Verdicts", "note": "By a test.", "header": ["", "b"], "lines": [["x", "1"]]}
    path.write_text(json.dumps({"claims": [], "tables": [table]}))
    markdown = render_table("paper_toy").markdown
    assert "### Verdicts, mnist" in markdown
    assert "By a test." in markdown
    assert tables(markdown)["Verdicts, mnist"] == [{"": "x", "b": "1"}]
    for content, lacking in (
        ({"claims": [], "tables": [{"title": "Verdicts"}]}, "note"),
        ({"expectations": [], "tables": [table]}, "claims"),
    ):
        path.write_text(json.dumps(content))
        with pytest.raises(ConfigurationError, match=rf"analysis_mnist\.json .*{lacking}.*again"):
            render_table("paper_toy")


def test_a_paper_may_select_nothing(paper: Path) -> None:
    put(paper, "toy_net_ours")
    assert "`toy_net_ours` (selected of seed 0)" in render_table("paper_toy").missing
    write_reference(paper, REFERENCE | {"checkpoints": ["last"]})
    assert read_reference(paper / "reference.yaml").checkpoints == ("last",)
    assert not any("toy_net_ours" in gap for gap in render_table("paper_toy").missing)
    for wrong in ([], ["best"]):
        write_reference(paper, REFERENCE | {"checkpoints": wrong})
        with pytest.raises(ConfigurationError, match="name last, selected or both"):
            read_reference(paper / "reference.yaml")


# ------------------------------------------------------------------------- comparisons and audits


def compared(paper: Path, **group: Any) -> str:
    """The text of E6 and of what stands under it, with ``other_net_plain`` as its baseline."""
    groups = copy.deepcopy(REFERENCE["groups"])
    groups[1] |= {"baseline": "other_net_plain", **group}
    groups[1]["metrics"] += [{"key": "pgd20_union", "title": "union"}]
    groups[1]["metrics"] += [{"key": "clean_acc", "title": "clean"}]
    write_reference(paper, {**REFERENCE, "groups": groups})
    return render_table("paper_toy", groups=["E6"]).markdown


def test_rows_are_compared_example_by_example(paper: Path) -> None:
    for seed, shift in enumerate((0, 20, 50)):
        put(paper, "other_net_plain", seed, robust=0.5)
        put(paper, "toy_net_ours", seed, robust=0.6, shift=shift)
    put(paper, "toy_net_ours", seed=3)  # the baseline has no such seed
    put(paper, "other_net_plain", seed=4)
    markdown = compared(paper)
    assert "share their examples and are not independent" in markdown
    first, second = tables(markdown)["Paired comparison with other"]
    # 120 against 100 right; shifted by s, the first s are right for the baseline only
    p_values = [mcnemar_exact(20 + shift, shift) for shift in (0, 20, 50)]
    assert first == {
        "experiment": "ours (`toy_net_ours`)",
        "metric": "f",
        "difference": "+10.00",
        "only one right": "130 / 70",
        "p": ", ".join(f"{p:.2g}" for p in p_values),
        "p over seeds": "0",  # no seed's accuracy differs from another's
        "seeds": "0, 1, 2",
    }
    assert (second["experiment"], second["metric"]) == ("", "p1")
    assert second["only one right"] == "60 / 0"


def test_a_row_may_have_a_baseline_of_its_own(paper: Path) -> None:
    for seed, robust in enumerate((0.5, 0.52, 0.54)):
        put(paper, "other_net_plain", seed, robust=robust, without="aa/square")
        put(paper, "toy_net_ours", seed, robust=robust + 0.1, without="aa/square")
        put(paper, "toy_net_plain", seed, robust=robust, without="aa/square")
    rows = {stem: dict(row) for stem, row in REFERENCE["rows"].items()}
    rows["toy_net_ours"]["baseline"] = "other_net_plain"
    write_reference(paper, {**REFERENCE, "rows": rows})
    found = tables(render_table("paper_toy").markdown)["Paired comparison with other"]
    expected = welch_t_test([0.6, 0.62, 0.64], [0.5, 0.52, 0.54])
    assert found[0]["p over seeds"] == f"{expected:.2g}"
    rows["toy_net_ours"]["baseline"] = "nowhere"
    write_reference(paper, {**REFERENCE, "rows": rows})
    with pytest.raises(ConfigurationError, match="toy_net_ours has the baseline 'nowhere'"):
        render_table("paper_toy")


def test_what_a_network_costs_stands_beside_or_alone(paper: Path) -> None:
    metrics = [
        *REFERENCE["groups"][0]["metrics"],
        {"key": "step_time", "title": "Time", "unit": "plain"},
    ]
    groups = [{**REFERENCE["groups"][0], "metrics": metrics, "layout": "stacked"}]
    rows = {stem: {**row, "groups": ["E1"]} for stem, row in REFERENCE["rows"].items()}
    rows = {
        stem: {k: v for k, v in row.items() if k in ("groups", "label")}
        for stem, row in rows.items()
    }
    write_reference(paper, {"groups": groups, "rows": rows})
    put(paper)
    costs = {stem: {"metrics": {"step_time": 1.5}} for stem in ("toy_net_ours", "toy_net_plain")}
    (paper / "results" / "costs.json").write_text(json.dumps({"experiments": costs}))
    (table,) = (
        t for name, t in tables(render_table("paper_toy").markdown).items() if "Time" in t[0]
    )
    lines = {(line["experiment"], line[""]): line["Time"] for line in table}
    assert lines["ours (`toy_net_ours`)", "last"] == "1.50"
    assert {kind for (_, kind), time in lines.items() if time} == {"last", "network"}


def test_metrics_to_compare_can_be_named(paper: Path) -> None:
    put(paper, "other_net_plain")
    put(paper)
    listed = ["clean_acc", "pgd20_union", "pgd20", "worst", "absent"]
    rows = tables(compared(paper, compare=listed))["Paired comparison with other"]
    assert [row["metric"] for row in rows] == ["clean", "union", "worst"], "pgd20 is of two losses"
    assert {row["p"] for row in rows} == {"1"}
    assert "Paired" not in compared(paper, compare=[])


def test_other_examples_are_not_compared(paper: Path) -> None:
    put(paper, "other_net_plain")
    put(paper, labels=8)
    markdown = compared(paper)
    assert "| difference |" not in markdown
    assert (
        "Not comparable with other, because it was measured on other examples: `toy_net_ours` "
        "(seed 0)" in markdown
    )


def test_a_step_on_fewer_examples_is_not_compared(paper: Path) -> None:
    put(paper, "other_net_plain")
    put(paper)
    right = torch.arange(N) < 100
    correct = {"clean": right, "pgd20/ce_f": right, "pgd20/ce_p1": right}
    attacked = {"pgd20/ce_f": right, "pgd20/ce_p1": torch.arange(N) < N}
    file_away(
        paper, "toy_net_ours", checkpoint_entry(Outcomes(torch.arange(N) % 10, correct, attacked))
    )
    markdown = compared(paper)
    assert "`toy_net_ours` (seed 0, f: 100 against 200 examples)" in markdown
    (row,) = tables(markdown)["Paired comparison with other"]
    assert row["metric"] == "p1"


def test_without_a_baseline_to_compare_with_there_is_no_comparison(paper: Path) -> None:
    put(paper)
    assert "Paired comparison" not in compared(paper)
    put(paper, "other_net_plain", label="selected")
    assert "Paired comparison" not in compared(paper)


def check(verdict: str, **changes: Any) -> dict[str, Any]:
    return {
        "id": "steps",
        "question": "Do 200 steps break no more than 20?",
        "value": 3.14159,
        "threshold": 1,
        "verdict": verdict,
        "detail": "",
        **changes,
    }


def test_failed_audits_are_shouted_and_passed_ones_counted(paper: Path) -> None:
    assert "udit" not in render_table("paper_toy").markdown
    silent = check("fail", value=None, threshold=None, question="Is it?", detail="it is not")
    put(paper, "toy_net_plain", audit={"examples": 9, "checks": [check("pass")] * 2})
    put(paper, "toy_net_plain", 1, audit={"examples": 9, "checks": [check("not applicable")]})
    put(paper, seed=0, audit={"examples": 9, "checks": [check("pass"), check("pass")]})
    put(paper, seed=1, audit={"examples": 9, "checks": [check("pass"), check("fail"), silent]})
    report = render_table("paper_toy", groups=["E1"])
    assert (
        "\n\n⚠ audit: `toy_net_ours` seed 1, last: Do 200 steps break no more than 20? "
        "(value 3.142, threshold 1); Is it? (it is not)\n\n" in report.markdown
    )
    assert "number of checks passed and none failed: `toy_net_plain` (2)\n\n" in report.markdown
    assert report.markdown.count("⚠") == 1


def test_remarks_of_results_stand_under_the_table(paper: Path) -> None:
    right = torch.arange(N) < 100
    weak = {"pgd20/ce_f": Line("pgd20", weakness="its radius 0.001 is less than 0.2")}
    found = Outcomes(
        torch.arange(N) % 10,
        {"clean": right, "pgd20/ce_f": right},
        {"pgd20/ce_f": torch.arange(N) < N},
        weak,
    )
    file_away(paper, "toy_net_ours", checkpoint_entry(found))
    markdown = render_table("paper_toy").markdown
    assert "⚠ `toy_net_ours` seed 0, last: there is no worst case: no attack used the" in markdown
    assert "worst last" not in markdown


# -------------------------------------------------------------------------------------- reference


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": ["E9"]}, "unknown group 'E9'; there are E1, E6, E7, E8"),
        ({"last": {"fgsm": 1.0}}, "toy_net_ours has a number for 'fgsm', which none"),
        ({"lost": {}}, "lost"),
    ],
)
def test_a_row_that_fits_no_table_is_refused(
    paper: Path, change: dict[str, Any], message: str
) -> None:
    rows = {**REFERENCE["rows"], "toy_net_ours": {**REFERENCE["rows"]["toy_net_ours"], **change}}
    write_reference(paper, {**REFERENCE, "rows": rows})
    with pytest.raises(ConfigurationError, match=message):
        read_reference(paper / "reference.yaml")


@pytest.mark.parametrize("text", ["", "a: [", "groups: []", "groups: 3\nrows: {}"])
def test_a_damaged_reference_is_named(paper: Path, text: str) -> None:
    (paper / "reference.yaml").write_text(text)
    with pytest.raises(ConfigurationError, match=r"reference\.yaml cannot be read"):
        read_reference(paper / "reference.yaml")


def test_an_unknown_layout_is_refused(paper: Path) -> None:
    groups = [{**REFERENCE["groups"][0], "layout": "round"}, *REFERENCE["groups"][1:]]
    write_reference(paper, {**REFERENCE, "groups": groups})
    with pytest.raises(ConfigurationError, match="one of wide, stacked, got 'round'"):
        render_table("paper_toy")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"baseline": "toy_net"}, "group E1 has the baseline 'toy_net', which is no row"),
        ({"baseline": "toy_net_plain", "compare": "worst"}, "compare must be a list"),
    ],
)
def test_a_comparison_with_nothing_is_refused(
    paper: Path, change: dict[str, Any], message: str
) -> None:
    groups = [{**REFERENCE["groups"][0], **change}, *REFERENCE["groups"][1:]]
    write_reference(paper, {**REFERENCE, "groups": groups})
    with pytest.raises(ConfigurationError, match=message):
        render_table("paper_toy")


# ----------------------------------------------------------------------------------------- README


def test_the_readme_is_rewritten_between_its_markers_only(paper: Path) -> None:
    put(paper)
    assert main(["paper_toy"]) == 0
    text = (paper / "README.md").read_text()
    assert text.startswith(f"# Toy\n\n{BEGIN}\n\nPercent.")
    assert text.endswith(f"\n\n{END}\n\nAfter.\n")
    assert render_table("paper_toy").markdown in text
    assert main(["paper_toy"]) == 0
    assert (paper / "README.md").read_text() == text


def test_a_current_readme_is_not_touched(paper: Path) -> None:
    main(["paper_toy"])
    before = (paper / "README.md").stat()
    main(["paper_toy"])
    after = (paper / "README.md").stat()
    assert (before.st_mtime_ns, before.st_ino) == (after.st_mtime_ns, after.st_ino)


def test_a_filter_changes_what_is_printed_and_not_the_readme(
    paper: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(paper)
    put(paper, "other_net_plain")
    assert main(["paper_toy", "--on", "other"]) == 0
    printed = capsys.readouterr().out
    assert "other_net_plain" in printed
    assert "toy_net_ours" not in printed
    assert "toy_net_ours" in (paper / "README.md").read_text()


@pytest.mark.parametrize("text", ["none", BEGIN, END, f"{END} {BEGIN}", f"{BEGIN}{BEGIN}{END}"])
def test_missing_markers_are_told(paper: Path, text: str) -> None:
    (paper / "README.md").write_text(text)
    with pytest.raises(ConfigurationError, match=r"README\.md needs the lines <!-- results -->"):
        write_readme(paper / "README.md", "table")
    assert (paper / "README.md").read_text() == text


def test_a_missing_readme_is_told(paper: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"cannot read .*absent\.md"):
        write_readme(paper / "absent.md", "table")


# ----------------------------------------------------------------------------------- command line


def test_check_writes_nothing_and_notices(paper: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (paper / "README.md").read_text()
    assert main(["paper_toy", "--check"]) == 1
    assert "README.md is out of date" in capsys.readouterr().out
    assert (paper / "README.md").read_text() == before
    main(["paper_toy"])
    assert main(["paper_toy", "--check"]) == 0
    assert main(["paper_toy", "--check", "--on", "toy_net_ours"]) == 1, "it has no result"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["paper_absent"], "there is no package 'paper_absent'"),
        (["paper toy"], "there is no package 'paper toy'"),
        (["paper_toy", "--on", "mnist"], "is meant by 'mnist'; they start with other, toy"),
        (["paper_toy", "--seeds", "one"], "--seeds is 'one'"),
    ],
)
def test_mistakes_are_one_line(
    paper: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
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
