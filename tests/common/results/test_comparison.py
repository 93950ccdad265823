"""What stands under a table: comparisons with a baseline, failed audits, remarks."""

import json
from typing import Any

from common.results.statistics import mcnemar_exact, paired_t_test
from common.results.store import result_path


def compared(paper: Any, **group: Any) -> tuple[list[dict[str, str]], str]:
    """What stands under E6 with ``other_net_plain`` as its baseline, and the whole text."""
    union, clean = {"key": "pgd20_union", "title": "union"}, {"key": "clean_acc", "title": "clean"}
    change = {
        "metrics": [*paper.metrics["E6"], union, clean],
        "baseline": "other_net_plain",
        **group,
    }
    paper.write(groups={"E6": change})
    text = paper.markdown(groups=["E6"])
    return paper.tables(groups=["E6"]).get("Paired comparison with other", []), text


def test_rows_are_compared_example_by_example(paper: Any) -> None:
    for seed, shift in enumerate((0, 20, 50)):
        paper.put("other_net_plain", seed, robust=0.5)
        paper.put("toy_net_ours", seed, robust=0.6, shift=shift)
    paper.put("toy_net_ours", seed=3)  # the baseline has no such seed
    paper.put("other_net_plain", seed=4)
    (first, second), _ = compared(paper)
    # 120 against 100 right; shifted by s, the first s are right for the baseline only
    p_values = [mcnemar_exact(20 + shift, shift) for shift in (0, 20, 50)]
    assert first == {
        "experiment": "ours (`toy_net_ours`)",
        "metric": "f",
        "difference": "+10.00",
        "only one right": "130 / 70",
        "p": ", ".join(f"{p:.2g}" for p in p_values),
        "p over seeds": "",  # the difference is the same in every seed
        "seeds": "0, 1, 2",
    }
    assert (second["experiment"], second["metric"]) == ("", "p1")
    assert second["only one right"] == "60 / 0"


def test_a_row_may_have_another_baseline_and_its_seeds_are_paired(paper: Any) -> None:
    for seed, (robust, more) in enumerate(((0.5, 0.1), (0.52, 0.11), (0.54, 0.13))):
        paper.put("other_net_plain", seed, robust=robust, without="aa/square")
        paper.put("toy_net_ours", seed, robust=robust + more, without="aa/square")
    paper.write(rows={"toy_net_ours": {"baseline": "other_net_plain"}})
    found = paper.tables()["Paired comparison with other"]
    assert found[0]["p over seeds"] == f"{paired_t_test([0.1, 0.11, 0.13]).p:.2g}"


def test_metrics_to_compare_can_be_named(paper: Any) -> None:
    assert compared(paper)[0] == [], "there is nothing to compare"
    paper.put()
    paper.put("other_net_plain", label="selected")
    assert compared(paper)[0] == [], "last checkpoints alone are compared"
    paper.put("other_net_plain")
    rows, _ = compared(paper, compare=["clean_acc", "pgd20_union", "pgd20", "worst", "absent"])
    assert [row["metric"] for row in rows] == ["clean", "union", "worst"], "pgd20 is of two losses"
    assert {(row["p"], row["p over seeds"]) for row in rows} == {("1", "")}
    assert compared(paper, compare=[])[0] == []


def test_other_examples_are_not_compared(paper: Any) -> None:
    paper.put("other_net_plain")
    paper.put(labels=8)
    rows, text = compared(paper)
    assert rows == []
    assert "because it was measured on other examples or in another ball: `toy_net_ours` (s" in text
    paper.put(few="pgd20/ce_f")
    (row,), text = compared(paper)
    assert "`toy_net_ours` (seed 0, f: 100 against 200 examples)" in text
    assert row["metric"] == "p1"


def edit(paper: Any, stem: str = "toy_net_ours", data: str | None = None, **changes: Any) -> None:
    """Change every attack of a result file, and the digest of its images."""
    path = result_path(paper.folder / "results", stem, 0)
    result = json.loads(path.read_text())
    result.pop("digest", None)
    (checkpoint,) = result["checkpoints"].values()
    for attack in checkpoint["attacks"].values():
        attack |= changes
    if data is not None:
        result["provenance"]["last"]["data_digest"] = data
    path.write_text(json.dumps(result))


def test_other_images_or_another_ball_are_not_compared(paper: Any) -> None:
    paper.put("other_net_plain")
    edit(paper, "other_net_plain", data="11")
    paper.put()
    edit(paper, data="22")
    rows, text = compared(paper)
    assert rows == []
    assert "in another ball: `toy_net_ours` (seed 0)" in text
    assert "f, last, on other images: `" in text
    paper.put()
    edit(paper, data="11", norm="linf", eps=0.05)
    rows, text = compared(paper)
    assert rows == []
    assert "`toy_net_ours` (seed 0, f: another ball of pgd20" in text
    assert "f, last, with another ball of pgd20" in text


def test_selected_checkpoints_in_another_ball_are_left_out(paper: Any) -> None:
    for stem, eps in (("other_net_plain", 0.2), ("toy_net_ours", 0.1)):
        paper.put(stem, label="selected")
        edit(paper, stem, norm="linf", eps=eps)
    text = compared(paper)[1]
    assert "f, selected, with another ball of pgd20/ce_f" in text


def test_unlike_efforts_are_named(paper: Any) -> None:
    for stem, steps in (("other_net_plain", 20), ("toy_net_ours", 1)):
        paper.put(stem)
        edit(paper, stem, recipe=f"PGD, steps {steps}")
    rows, text = compared(paper)
    assert rows != []
    assert (
        "pgd20/ce_f is PGD, steps 20 in `other_net_plain` (seed 0), and PGD, steps 1 else" in text
    )


def audit(*verdicts: str, **changes: Any) -> dict[str, Any]:
    numbers = {"value": 3.14159, "threshold": 1, "question": "Do 200 steps break no more than 20?"}
    checks = [{"id": "s", "verdict": v, "detail": "", **numbers, **changes} for v in verdicts]
    return {"examples": 9, "checks": checks}


def test_failed_audits_and_remarks_are_shown_and_passed_checks_counted(paper: Any) -> None:
    assert "udit" not in paper.markdown()
    silent = audit("fail", value=None, threshold=None, question="Is it?", detail="it is not")
    failed = audit("pass", "fail")
    failed["checks"] += silent["checks"]
    paper.put("toy_net_plain", audit=audit("pass", "pass"))
    paper.put("toy_net_plain", 1, audit=audit("not applicable"))
    paper.put(seed=0, audit=audit("pass", "pass"))
    paper.put(seed=1, audit=failed)
    text = paper.markdown(groups=["E1"])
    assert (
        "\n\n⚠ audit, failed: Do 200 steps break no more than 20? `toy_net_ours` (last of seed 1): "
        "3.142 (threshold 1)\n\n"
        "⚠ audit, failed: Is it? `toy_net_ours` (last of seed 1): it is not\n\n"
    ) in text
    assert "number of checks passed and none failed: `toy_net_plain` (2)\n\n" in text
    assert text.count("⚠") == 2
    paper.put("toy_net_plain", 2, audit=audit("fail", value=7, threshold=1.5))
    assert (
        "`toy_net_plain` (last of seed 2): 7; `toy_net_ours` (last of seed 1): 3.142 "
        "(threshold 1 to 1.5)"
    ) in paper.markdown(groups=["E1"])
    for seed in (0, 1):
        paper.put(seed=seed, weakness="its radius 0.001 is less than 0.2")
    where = "`toy_net_ours` (last of seed 0, 1)"
    assert paper.markdown().count(f"⚠ {where}: there is no worst case: no attack used the") == 1
    assert paper.lines_of("E8: worst", "toy_net_ours") == {}
