"""What is wrong with a ``reference.yaml`` is said in one line."""

from typing import Any

import pytest

from common.cli.rows import rows_of
from common.errors import ConfigurationError
from common.packages import papers
from common.results.reference import meant_by, read_reference

NATURAL, AA = {"key": "clean_acc", "title": "Natural"}, {"key": "aa", "title": "AA"}


def ours(**change: Any) -> dict[str, Any]:
    return {"rows": {"toy_net_ours": change}}


def main_table(**change: Any) -> dict[str, Any]:
    return {"groups": {"E1": change}}


def mean(**mean_of: float) -> dict[str, Any]:
    return main_table(metrics=[NATURAL, AA, {"key": "w", "title": "W", "mean_of": mean_of}])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (ours(groups=["E9"]), "groups of toy_net_ours: there is no 'E9'; there are E1, E6"),
        (ours(last={"fgsm": 1.0}), "numbers of toy_net_ours: there is no 'fgsm'; there are aa"),
        (ours(lost={}), "rows.toy_net_ours.lost is no known key"),
        (ours(baseline="x"), "baseline of toy_net_ours: there is no 'x'"),
        (main_table(baseline="x"), "baseline of the group E1: there is no 'x'"),
        (main_table(compare="worst"), r"groups.0.compare is 'worst': .* valid list"),
        (main_table(first=["x"]), "first of the group E1: there is no 'x'"),
        (main_table(first=["pgd20"] * 9), "groups.0.first .* at most 8 items"),
        (main_table(metrics=[NATURAL | {"unit": "x"}]), "unit is 'x': .*'percent', 'plain'"),
        (mean(clean_acc=0.5, pgd=0.5), "mean_of w in the group E1: there is no 'pgd'"),
        (mean(clean_acc=0.5, w=0.5), "mean_of w in the group E1: there is no 'w'"),
        (mean(clean_acc=0.5, aa=0.6), "weights of w in the group E1 must sum to 1"),
        (mean(clean_acc=1.5, aa=-0.5), "mean_of.aa is -0.5: .* greater than or equal to 0"),
        ({"checkpoints": ["best"]}, "checkpoints.0 is 'best': .*'last' or 'selected'"),
        ({"selections": {"small": "lost"}}, "lets 'small' stand for 'lost', which means no row"),
        ({"selections": {"small": "toy lost"}}, "lets 'small' stand for 'lost', which means no"),
        ({"selections": {"small": ""}}, "lets 'small' stand for '', which means no row"),
        ({"selections": {"toy": "toy_net_ours"}}, "'toy', which is no single word or already"),
        ({"selections": {"a b": "toy"}}, "'a b', which is no single word or already"),
        ({"summary": {"group": "E9", "metrics": [], "difference": "aa"}}, "there is no 'E9'"),
        ({"summary": {"group": "E1", "metrics": ["aa"], "difference": "x"}}, "there is no 'x'"),
    ],
)
def test_a_reference_that_refers_to_nothing_is_refused(
    paper: Any, change: dict[str, Any], message: str
) -> None:
    paper.write(**change)
    with pytest.raises(ConfigurationError, match=message) as caught:
        read_reference(paper.folder / "reference.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "a: [", "groups: []", "groups: 3\nrows: {}", "rows: [1]"])
def test_a_damaged_reference_is_named(paper: Any, text: str) -> None:
    (paper.folder / "reference.yaml").write_text(text)
    with pytest.raises(ConfigurationError, match=r"reference\.yaml cannot be read"):
        read_reference(paper.folder / "reference.yaml")


def test_words_of_a_selection_are_replaced_by_what_they_stand_for(paper: Any) -> None:
    assert meant_by(paper.folder.name, "toy small") == "toy small"
    paper.write(selections={"small": "toy_net_ours toy_net_plain"})
    meant = "toy toy_net_ours toy_net_plain"
    assert meant_by(paper.folder.name, "toy small") == meant
    assert meant_by(paper.folder.name, "toy small*") == meant


def test_every_paper_has_small_networks_on_fashion_mnist() -> None:
    for package in papers():
        rows = rows_of(package, "fashion_small", [0])
        assert rows
        assert all("fashion" in row.stem for row in rows)
