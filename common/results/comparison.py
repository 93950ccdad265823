"""What stands under a table: paired comparisons of its rows, and what audits of them found."""

from collections.abc import Mapping, Sequence
from statistics import fmean

from common.results.bases import Measured, Results
from common.results.markdown import Sheet
from common.results.outcomes import group_of
from common.results.paired import Paired, paired
from common.results.reference import Group, Row
from common.results.schema import AuditCheck
from common.results.statistics import paired_t_test

_NOTE = (
    "Last checkpoints. *difference* is this row minus {label} in points, the mean over seeds. "
    "*only one right* counts the examples that only this row / only {label} gets right, all seeds "
    "together. *p* is McNemar's exact test, two-sided, for each seed. The p values of different "
    "seeds share their examples and are not independent, and none is corrected for the number of "
    "comparisons. *p over seeds* is the paired t-test of the accuracies of the seeds, two-sided: "
    "whether another training run would show the difference too."
)


def comparison_sheet(
    group: Group, rows: Sequence[Row], baselines: Mapping[str, Row], results: Results
) -> Sheet | None:
    """Compare the rows of a table with their baselines by stem, example by example.

    Rows without a baseline, or that are their own, are compared with nothing; ``None`` where there
    is nothing to compare.
    """
    titles = {metric.key: metric.title for metric in group.metrics}
    others = [row for row in rows if baselines.get(row.stem, row).stem != row.stem]
    keys = group.compare
    if keys is None:
        keys = _own_metrics(list(titles), [*baselines.values(), *others], results)
    if not keys or not others:
        return None
    labels = {baselines[row.stem].label for row in others}
    label = labels.pop() if len(labels) == 1 else "its baseline"
    lines, strangers = [], []
    for row in others:
        baseline = baselines[row.stem]
        name = f"{row.label} (`{row.stem}`)"
        if labels:
            name += f" against {baseline.label}"
        theirs = {one.seed: one for one in _last(baseline, results)}
        pairs = [(one, theirs[one.seed]) for one in _last(row, results) if one.seed in theirs]
        strangers += [f"`{row.stem}` (seed {a.seed})" for a, b in pairs if not _is_same(a, b)]
        compared = {a.seed: paired(a.entry, b.entry) for a, b in pairs if _is_same(a, b)}
        for key in keys:
            found = {seed: of[key] for seed, of in compared.items() if key in of}
            for a, b in pairs:
                if (
                    a.seed in compared
                    and key in a.bases
                    and key in b.bases
                    and not _is_same(a, b, key)
                ):
                    sizes = f"{a.bases[key].size:,} against {b.bases[key].size:,} examples"
                    what = f"seed {a.seed}, {titles.get(key, key)}: {sizes}"
                    strangers.append(f"`{row.stem}` ({what})")
            if found:
                lines.append([name, titles.get(key, key), *_compared(found)])
                name = ""
    if not lines and not strangers:
        return None
    sheet = Sheet(f"Paired comparison with {label}", lines=lines, level=4)
    if strangers:
        sheet.notes = [
            f"Not comparable with {label}, because it was measured on other examples: "
            f"{', '.join(strangers)}"
        ]
    if lines:
        sheet.note = _NOTE.format(label=label)
        sheet.header = ["experiment", "metric", "difference", "only one right"]
        sheet.header += ["p", "p over seeds", "seeds"]
    return sheet


def _own_metrics(keys: Sequence[str], rows: Sequence[Row], results: Results) -> list[str]:
    """The metrics that are ``worst`` or about a single step of some row."""
    own = {"worst"}
    for row in rows:
        for measured in _last(row, results):
            for name, attack in measured.entry["attacks"].items():
                own |= {name, group_of(name, attack)}
    return [key for key in keys if key in own]


def _last(row: Row, results: Results) -> list[Measured]:
    return [measured for measured in results.get(row.stem, []) if measured.label == "last"]


def _is_same(a: Measured, b: Measured, key: str = "clean_acc") -> bool:
    """Whether a metric of two checkpoints is about the same examples."""
    return a.bases[key] == b.bases[key]


def _compared(found: Mapping[int, Paired]) -> list[str]:
    """The cells of one metric, given both rows for each seed."""
    differences = [pair.difference for pair in found.values()]
    only_ours = sum(len(pair.only_first) for pair in found.values())
    only_theirs = sum(len(pair.only_second) for pair in found.values())
    test = paired_t_test(differences)
    return [
        f"{fmean(differences):+.2f}",
        f"{only_ours} / {only_theirs}",
        ", ".join(f"{pair.p:.2g}" for pair in found.values()),
        "" if test is None or test.seeds == 1 else f"{test.p:.2g}",
        ", ".join(map(str, found)),
    ]


# -------------------------------------------------------------------------------------------- audit


def audit_notes(rows: Sequence[Row], results: Results) -> list[str]:
    """Warnings about failed checks and remarks, and a line about the rows that passed all."""
    warnings, passed = [], []
    remarks: dict[str, list[str]] = {}
    for row in rows:
        checks = []
        for one in results.get(row.stem, []):
            where = f"`{row.stem}` seed {one.seed}, {one.label}"
            for remark in one.entry["remarks"]:
                remarks.setdefault(remark, []).append(where)
            found = one.entry["audit"]["checks"] if "audit" in one.entry else []
            if failed := [_failure(check) for check in found if check["verdict"] == "fail"]:
                warnings.append(f"⚠ audit: {where}: {'; '.join(failed)}")
            checks += [check["verdict"] for check in found]
        if "pass" in checks and "fail" not in checks:
            passed.append(f"`{row.stem}` ({checks.count('pass')})")
    warnings += [f"⚠ {', '.join(where)}: {remark}" for remark, where in remarks.items()]
    if passed:
        warnings.append(f"Audit, number of checks passed and none failed: {', '.join(passed)}")
    return warnings


def _failure(check: AuditCheck) -> str:
    numbers = [
        f"{name} {number:.4g}"
        for name, number in (("value", check["value"]), ("threshold", check["threshold"]))
        if number is not None
    ]
    remark = ", ".join(numbers) or check["detail"]
    return f"{check['question']} ({remark})" if remark else check["question"]
