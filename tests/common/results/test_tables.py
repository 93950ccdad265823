"""Tables: which cells there are, what is in them, and how they get into READMEs."""

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
from common.results.markdown import BEGIN, END
from common.results.outcomes import checkpoint_entry
from common.results.reference import read_reference
from common.results.statistics import mcnemar_exact, welch_t_test, wilson_interval
from common.results.store import merge_result, result_path
from common.results.tables import main, render_table

N = 200
NATURAL = {"key": "clean_acc", "title": "Natural"}
REFERENCE: dict[str, Any] = {
    "title": "A paper",
    "tags": {"R": "the repository", "M": "measured"},
    "groups": [
        {
            "id": "E1",
            "title": "E1: main",
            "note": "A note.",
            "metrics": [
                NATURAL,
                {"key": "pgd20", "title": "PGD-20", "source": "M"},
                {"key": "aa", "title": "AA"},
            ],
        },
        {
            "id": "E6",
            "title": "E6: by loss",
            "metrics": [
                {"key": "pgd20/ce_f", "title": "f"},
                {"key": "pgd20/ce_p1", "title": "p1"},
            ],
        },
        {"id": "E7", "title": "E7: none", "metrics": [NATURAL]},
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
    write_reference(folder)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return folder


def write_reference(folder: Path, **changes: Any) -> None:
    text = yaml.safe_dump(copy.deepcopy(REFERENCE) | changes, sort_keys=False)
    (folder / "reference.yaml").write_text(text)


def rows_with(**changes: Any) -> dict[str, Any]:
    """The rows, with changes by stem."""
    rows = {stem: dict(row) for stem, row in REFERENCE["rows"].items()}
    for stem, change in changes.items():
        rows[stem] = {**rows.get(stem, {"label": stem}), **change}
    return rows


def groups_with(number: int, **changes: Any) -> list[dict[str, Any]]:
    """The groups, with changes of one."""
    groups: list[dict[str, Any]] = copy.deepcopy(REFERENCE["groups"])
    groups[number] |= changes
    return groups


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
    few: str | None = None,
    weakness: str = "",
    measures: Any = None,
) -> None:
    """A result in which the first so many examples are right; ``shift`` moves those of ce_f on.

    The attack ``aa/square`` meets ``part`` alone; ``extra`` is one more attack, ``few`` one that
    meets the first half of the examples.
    """
    right = torch.arange(N)
    correct = {
        "clean": right < round(clean * N),
        "pgd20/ce_f": (right - shift) % N < round(robust * N),
        "pgd20/ce_p1": right < round((robust + 0.1) * N),
        "aa/square": right < round(0.25 * (N // 4)),
    }
    attacked = dict.fromkeys(list(correct)[1:], right < N)
    attacked["aa/square"] = torch.zeros(N, dtype=torch.bool)
    attacked["aa/square"][part] = True
    if extra is not None:
        correct[extra], attacked[extra] = right < N, right < N
    if few is not None:
        attacked[few] = right < N // 2
    attacked.pop(without, None)  # type: ignore[arg-type]
    lines = {name: Line(name.partition("/")[0], weakness=weakness) for name in attacked}
    lines["aa/square"] = Line("aa", survivors_only=True, weakness=weakness)
    merge_result(
        result_path(folder / "results", stem, seed),
        paper="paper_toy",
        experiment=stem,
        seed=seed,
        label=label,
        entry=checkpoint_entry(
            Outcomes(right % labels, correct, attacked, lines), audit=audit, measures=measures
        ),
        provenance={"config_digest": f"of seed {seed}"},
    )


def one(percent: float, n: int = N) -> str:
    """The cell of a single seed."""
    low, high = (100 * end for end in wilson_interval(round(percent * n / 100), n))
    return f"{percent:.2f} [{low:.1f}, {high:.1f}]"


def tables(markdown: str) -> dict[str, list[dict[str, str]]]:
    """The tables of a Markdown text by their headings, each a list of lines by column."""
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


def lines_of(heading: str, stem: str, **options: Any) -> dict[str, dict[str, str]]:
    """The lines of a row in a table of ``paper_toy``, by what they are about."""
    found, owner = {}, ""
    for line in tables(render_table("paper_toy", **options).markdown)[heading]:
        owner = line.pop("experiment") or owner
        kind = line.pop("")
        if f"`{stem}`" in owner:
            found[kind] = {title: cell for title, cell in line.items() if cell}
    return found


# ------------------------------------------------------------------------------------------ cells


def test_without_results_only_the_paper_speaks(paper: Path) -> None:
    report = render_table("paper_toy")
    assert lines_of("E1: main", "toy_net_plain") == {
        "published": {"Natural": "84.56 [R]", "PGD-20": "46.00 / 47.00 [M]"},
        "published, selected": {"Natural": "82.80 [R]"},
    }
    assert "plain |g| (`toy_net_plain`)" in str(tables(report.markdown)["E1: main"])
    assert "Sources of published numbers: [R] the repository; [M] measured" in report.markdown
    assert tables(report.markdown)["E7: none"] == []
    assert "Neither published nor measured yet: `toy_net_ours`, `toy_net_never`" in report.markdown
    assert report.markdown.index("rows have not been run: 4") < report.markdown.index("E1:")
    assert "Rows without our result: 4 of 4" in report.markdown
    assert report.missing == [f"`{stem}`" for stem in REFERENCE["rows"]]


def test_one_seed_and_the_difference_to_the_mean_of_repeats(paper: Path) -> None:
    put(paper, "toy_net_plain", clean=0.8, robust=0.5)
    put(paper, "toy_net_plain", label="selected", clean=0.85, robust=0.55)
    aa = {"AA†‡": one(24, N // 4)}
    assert lines_of("E1: main", "toy_net_plain") == {
        "published": {"Natural": "84.56 [R]", "PGD-20": "46.00 / 47.00 [M]", "seeds": "0"},
        "last": {"Natural": one(80), "PGD-20": "50.00 [43.1, 56.9]", **aa, "seeds": "0"},
        "last − published": {"Natural": "-4.56", "PGD-20": "+3.50", "seeds": "0"},
        "published, selected": {"Natural": "82.80 [R]", "seeds": "0"},
        "selected": {"Natural": one(85), "PGD-20": one(55), **aa, "seeds": "0"},
    }
    markdown = render_table("paper_toy").markdown
    assert "† Ours is cumulative" in markdown
    assert "‡ Ours on a part of the examples of the test split: AA on 50." in markdown
    assert markdown.index("E1: main") < markdown.index("rows have not been run: 3")


def test_several_seeds_give_mean_and_sample_deviation(paper: Path) -> None:
    for seed, robust in enumerate((0.50, 0.60, 0.55)):
        put(paper, seed=seed, robust=robust)
    ours = lines_of("E1: main", "toy_net_ours")["last"]
    assert ours["PGD-20"] == "55.00 ± 5.00"  # over n, not n - 1, it would be 4.08
    assert ours["Natural"] == "90.00 ± 0.00"
    assert ours["seeds"] == "0, 1, 2"
    assert lines_of("E1: main", "toy_net_ours", seeds=[1, 2])["last"]["PGD-20"] == "57.50 ± 3.54"


def test_columns_beyond_the_eighth_are_folded(paper: Path) -> None:
    metrics = [*({"key": f"m{i}", "title": f"M{i}"} for i in range(8)), NATURAL]
    write_reference(paper, groups=groups_with(3, metrics=metrics))
    put(paper, measures={"m0": 0.25, "m7": 1.0})
    line = f"| ours (`toy_net_ours`) | last | {one(90)} | 0 |"
    first, more = render_table("paper_toy", groups=["E8"]).markdown.split("More columns")
    assert "| M7 |" in first
    assert "Natural" not in first
    assert line in more
    write_reference(paper, groups=groups_with(3, metrics=metrics, first=["clean_acc"]))
    first, more = render_table("paper_toy", groups=["E8"]).markdown.split("More columns")
    assert line in first
    assert "| M7 |" in more


MEANS = {"clean_acc": 0.25, "pgd20/ce_f": 0.75}


def with_mean(folder: Path, mean_of: dict[str, float]) -> None:
    metrics = [NATURAL, {"key": "pgd20/ce_f", "title": "f"}, {"key": "aa", "title": "AA"}]
    mean = {"key": "w", "title": "W", "mean_of": mean_of}
    write_reference(folder, groups=groups_with(3, metrics=[*metrics, mean]))


def test_a_column_may_be_the_weighted_mean_of_others(paper: Path) -> None:
    with_mean(paper, MEANS)
    put(paper, clean=0.9, robust=0.5)
    # without an interval: its parts share their examples
    assert lines_of("E8: worst", "toy_net_ours")["last"]["W"] == "60.00"
    for seed, robust in enumerate((0.50, 0.60, 0.55)):
        put(paper, seed=seed, clean=0.9, robust=robust)
    assert lines_of("E8: worst", "toy_net_ours")["last"]["W"] == "63.75 ± 3.75"


def test_a_mean_needs_all_of_its_parts_on_the_same_examples(paper: Path) -> None:
    with_mean(paper, MEANS)
    put(paper, without="pgd20/ce_f")
    assert "W" not in lines_of("E8: worst", "toy_net_ours")["last"]
    with_mean(paper, {"clean_acc": 0.5, "aa": 0.5})
    put(paper)
    assert "W" not in lines_of("E8: worst", "toy_net_ours")["last"]
    markdown = render_table("paper_toy").markdown
    assert "W, last, parts of it on different examples: `toy_net_ours` (seed 0)" in markdown


def test_a_worst_case_over_fewer_attacks_than_that_of_its_row_is_left_out(paper: Path) -> None:
    put(paper)
    put(paper, label="selected")
    lines = lines_of("E8: worst", "toy_net_ours")
    assert lines["last"]["worst‡"] == lines["selected"]["worst‡"] == one(24, N // 4)
    put(paper, label="selected", without="pgd20/ce_p1")
    assert set(lines_of("E8: worst", "toy_net_ours")) == {"last"}
    assert (
        "Left out, because measured otherwise than the rest of the column: worst, selected, other "
        "attacks than for the rest of the row: `toy_net_ours` (seed 0)"
    ) in render_table("paper_toy").markdown


def test_cells_about_other_examples_than_their_column_are_left_out(paper: Path) -> None:
    both = {"groups": ["E1", "E8"]}
    other = {"groups": ["E8"], "last": {}}
    rows = rows_with(toy_net_plain=both, toy_net_ours=both, other_net_plain=other)
    write_reference(paper, rows=rows)
    put(paper, "toy_net_plain")
    put(paper, "toy_net_plain", 1)
    put(paper, "toy_net_ours")
    put(paper, "toy_net_ours", label="selected", without="aa/square")  # worst of all 200
    put(paper, "other_net_plain", part=slice(10, 60))  # as many, but others
    ours = {"last": {"worst‡": one(24, N // 4), "seeds": "0"}}
    assert lines_of("E8: worst", "toy_net_ours") == ours
    assert lines_of("E8: worst", "other_net_plain") == {}
    markdown = render_table("paper_toy").markdown
    assert "worst, selected, on 200 examples: `toy_net_ours` (seed 0)" in markdown
    assert "worst, last, on other 50 examples: `other_net_plain` (seed 0)" in markdown


def test_which_attacks_worst_cases_are_over_is_said_where_rows_differ(paper: Path) -> None:
    write_reference(paper, rows=rows_with(toy_net_plain={"groups": ["E1", "E8"]}))
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
    put(paper, "toy_net_mine")
    report = render_table("paper_toy")
    assert "`toy_net_ours` (selected of seed 1)" in report.missing
    assert "Rows run: 1 of 4 configured." in report.markdown
    assert "without a row in reference.yaml: toy_net_mine" in report.markdown
    missing = render_table("paper_toy", on="toy_net_o", seeds=[0, 1, 2]).missing
    assert missing == ["`toy_net_ours` (seed 2, selected of seed 1)"]
    assert render_table("paper_toy", on="toy_net_o", seeds=[0]).missing == []
    write_reference(paper, checkpoints=["last"])
    assert not any("toy_net_ours" in gap for gap in render_table("paper_toy").missing)


def test_what_a_network_costs_stands_beside_or_alone(paper: Path) -> None:
    time = {"key": "step_time", "title": "Time", "unit": "plain"}
    write_reference(
        paper, groups=groups_with(0, metrics=[*REFERENCE["groups"][0]["metrics"], time])
    )
    put(paper)
    costs = {stem: {"metrics": {"step_time": 1.5}} for stem in ("toy_net_ours", "toy_net_plain")}
    (paper / "results" / "costs.json").write_text(json.dumps({"experiments": costs}))
    assert lines_of("E1: main", "toy_net_ours")["last"]["Time"] == "1.50"
    assert lines_of("E1: main", "toy_net_plain")["network"] == {"Time": "1.50"}


def test_tables_of_an_analysis_follow_the_results(paper: Path) -> None:
    (paper / "results").mkdir()
    path = paper / "results" / "analysis_mnist.json"
    table = {"title": "Verdicts", "note": "By a test.", "header": ["", "b"], "lines": [["x", "1"]]}
    path.write_text(json.dumps({"claims": [], "tables": [table]}))
    markdown = render_table("paper_toy").markdown
    assert "By a test." in markdown
    assert tables(markdown)["Verdicts, mnist"] == [{"": "x", "b": "1"}]
    for content, lacking in (
        ({"claims": [], "tables": [{"title": "Verdicts"}]}, "note"),
        ({"expectations": [], "tables": [table]}, "claims"),
    ):
        path.write_text(json.dumps(content))
        with pytest.raises(ConfigurationError, match=rf"analysis_mnist\.json .*{lacking}.*again"):
            render_table("paper_toy")


# ------------------------------------------------------------------------- comparisons and audits


def compared(paper: Path, **group: Any) -> str:
    """The text of E6 and of what stands under it, with ``other_net_plain`` as its baseline."""
    metrics = [
        *REFERENCE["groups"][1]["metrics"],
        {"key": "pgd20_union", "title": "union"},
        {"key": "clean_acc", "title": "clean"},
    ]
    groups = groups_with(1, metrics=metrics, baseline="other_net_plain", **group)
    write_reference(paper, groups=groups, main={"row": "toy_net_ours", "metric": "pgd20/ce_f"})
    return render_table("paper_toy", groups=["E6"]).markdown


def test_rows_are_compared_example_by_example(paper: Path) -> None:
    for seed, shift in enumerate((0, 20, 50)):
        put(paper, "other_net_plain", seed, robust=0.5)
        put(paper, "toy_net_ours", seed, robust=0.6, shift=shift)
    put(paper, "toy_net_ours", seed=3)  # the baseline has no such seed
    put(paper, "other_net_plain", seed=4)
    first, second = tables(compared(paper))["Paired comparison with other"]
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


def test_a_row_may_have_another_baseline(paper: Path) -> None:
    for seed, robust in enumerate((0.5, 0.52, 0.54)):
        for stem, more in (("other_net_plain", 0.0), ("toy_net_ours", 0.1), ("toy_net_plain", 0.0)):
            put(paper, stem, seed, robust=robust + more, without="aa/square")
    write_reference(paper, rows=rows_with(toy_net_ours={"baseline": "other_net_plain"}))
    found = tables(render_table("paper_toy").markdown)["Paired comparison with other"]
    expected = welch_t_test([0.6, 0.62, 0.64], [0.5, 0.52, 0.54])
    assert found[0]["p over seeds"] == f"{expected:.2g}"


def test_metrics_to_compare_can_be_named(paper: Path) -> None:
    assert "Paired" not in compared(paper), "there is nothing to compare"
    put(paper)
    put(paper, "other_net_plain", label="selected")
    assert "Paired" not in compared(paper), "last checkpoints alone are compared"
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
    put(paper, few="pgd20/ce_f")
    markdown = compared(paper)
    assert "`toy_net_ours` (seed 0, f: 100 against 200 examples)" in markdown
    (row,) = tables(markdown)["Paired comparison with other"]
    assert row["metric"] == "p1"


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


def test_failed_audits_are_shown_and_passed_ones_counted(paper: Path) -> None:
    assert "udit" not in render_table("paper_toy").markdown
    silent = check("fail", value=None, threshold=None, question="Is it?", detail="it is not")
    put(paper, "toy_net_plain", audit={"examples": 9, "checks": [check("pass")] * 2})
    put(paper, "toy_net_plain", 1, audit={"examples": 9, "checks": [check("not applicable")]})
    put(paper, seed=0, audit={"examples": 9, "checks": [check("pass"), check("pass")]})
    put(paper, seed=1, audit={"examples": 9, "checks": [check("pass"), check("fail"), silent]})
    markdown = render_table("paper_toy", groups=["E1"]).markdown
    assert (
        "\n\n⚠ audit: `toy_net_ours` seed 1, last: Do 200 steps break no more than 20? "
        "(value 3.142, threshold 1); Is it? (it is not)\n\n" in markdown
    )
    assert "number of checks passed and none failed: `toy_net_plain` (2)\n\n" in markdown
    assert markdown.count("⚠") == 1


def test_remarks_of_results_stand_under_the_table(paper: Path) -> None:
    put(paper, weakness="its radius 0.001 is less than 0.2")
    markdown = render_table("paper_toy").markdown
    assert "⚠ `toy_net_ours` seed 0, last: there is no worst case: no attack used the" in markdown
    assert lines_of("E8: worst", "toy_net_ours") == {}


# -------------------------------------------------------------------------------------- reference


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": rows_with(toy_net_ours={"groups": ["E9"]})}, "group 'E9'; there are E1, E6"),
        ({"rows": rows_with(toy_net_ours={"last": {"fgsm": 1.0}})}, "a number for 'fgsm', which"),
        ({"rows": rows_with(toy_net_ours={"lost": {}})}, "argument 'lost'"),
        ({"rows": rows_with(toy_net_ours={"baseline": "x"})}, "ours has the baseline 'x'"),
        ({"groups": groups_with(0, baseline="x")}, "group E1 has the baseline 'x'"),
        ({"groups": groups_with(0, compare="worst")}, "a list of metrics, got 'worst'"),
        ({"groups": groups_with(0, first=["x"])}, "first of 'E1' names at most 8"),
        ({"groups": groups_with(0, first=["pgd20"] * 9)}, "first of 'E1' names at most 8"),
        ({"groups": groups_with(2, metrics=[NATURAL | {"unit": "x"}])}, "unit must be one of"),
        ({"checkpoints": []}, r"checkpoints are \[\]"),
        ({"checkpoints": ["best"]}, r"checkpoints are \['best'\]"),
    ],
)
def test_a_reference_that_refers_to_nothing_is_refused(
    paper: Path, change: dict[str, Any], message: str
) -> None:
    write_reference(paper, **change)
    with pytest.raises(ConfigurationError, match=message):
        read_reference(paper / "reference.yaml")


@pytest.mark.parametrize(
    ("mean_of", "message"),
    [
        (
            {"clean_acc": 0.5, "pgd": 0.5},
            "w in the group E8 is a mean of 'pgd', which is no column",
        ),
        ({"clean_acc": 0.5, "w": 0.5}, "is a mean of 'w', which is no column"),
        ({"clean_acc": 0.5, "aa": 0.6}, "weights of at least 0 that sum to 1"),
        ({"clean_acc": 1.5, "aa": -0.5}, "weights of at least 0 that sum to 1"),
        ({}, "weights of at least 0 that sum to 1"),
    ],
)
def test_a_mean_of_what_is_not_there_is_refused(
    paper: Path, mean_of: dict[str, float], message: str
) -> None:
    with_mean(paper, mean_of)
    with pytest.raises(ConfigurationError, match=message):
        read_reference(paper / "reference.yaml")


@pytest.mark.parametrize("text", ["", "a: [", "groups: []", "groups: 3\nrows: {}", "rows: [1]"])
def test_a_damaged_reference_is_named(paper: Path, text: str) -> None:
    (paper / "reference.yaml").write_text(text)
    with pytest.raises(ConfigurationError, match=r"reference\.yaml cannot be read"):
        read_reference(paper / "reference.yaml")


# --------------------------------------------------------------------- READMEs and command line


def test_the_readme_is_rewritten_between_its_markers_only(paper: Path) -> None:
    put(paper)
    assert main(["paper_toy"]) == 0
    text = (paper / "README.md").read_text()
    assert text.startswith(f"# Toy\n\n{BEGIN}\n\nPercent.")
    assert text.endswith(f"\n\n{END}\n\nAfter.\n")
    assert render_table("paper_toy").markdown in text
    before = (paper / "README.md").stat()
    assert main(["paper_toy"]) == 0
    after = (paper / "README.md").stat()
    assert (before.st_mtime_ns, before.st_ino) == (after.st_mtime_ns, after.st_ino)


def test_the_front_page_has_a_summary_and_the_coverage(paper: Path) -> None:
    wanted = {"group": "E6", "metrics": ["pgd20/ce_f"], "difference": "pgd20/ce_f"}
    write_reference(paper, groups=groups_with(1, baseline="other_net_plain"), summary=wanted)
    front = paper.parent / "README.md"
    front.write_text("".join(f"<!-- {p} -->\n<!-- /{p} -->\n" for p in ("summary", "coverage")))
    for seed, robust in enumerate((0.5, 0.6)):
        put(paper, "other_net_plain", seed, robust=robust)
        put(paper, "toy_net_ours", seed, robust=robust + 0.1)
    main(["paper_toy"])
    text = front.read_text()
    assert "| ours | 65.00 ± 7.07 | +10.0 [+10.0, +10.0] | 2 |" in text
    assert "| other | 55.00 ± 7.07 |  | 2 |" in text
    assert "| `paper_toy` | 2 / 4 | toy (1), other (1) | toy (2) |" in text
    write_reference(paper, summary={**wanted, "difference": "absent"})
    with pytest.raises(ConfigurationError, match="among the columns"):
        write_front(front)


def test_the_terminal_shows_one_small_table(
    paper: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, clean in enumerate((0.8, 0.9)):
        put(paper, seed=seed, clean=clean)
        put(paper, "other_net_plain", seed=seed)
    assert main(["paper_toy", "--on", "other"]) == 0
    other = capsys.readouterr().out
    assert "E6: by loss" in other
    assert "toy_net_ours" not in other
    assert "toy_net_ours" in (paper / "README.md").read_text(), "it holds every row"
    assert main(["paper_toy"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    (row,) = (line.split() for line in lines if "toy_net_ours" in line)
    assert row == ["toy_net_ours", "85.00", "50.00", "24.00", "2"]
    assert "AA on 50 images" in " ".join(" ".join(lines).split())
    assert "paper_toy/README.md" in " ".join(lines)


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
