"""What stands under a table: paired comparisons of its rows, and what audits of them found."""

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from statistics import fmean

from common.results.bases import WORST, Measured, Results, are_other_images
from common.results.markdown import Sheet
from common.results.outcomes import group_of
from common.results.paired import Paired, pairs_of
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
        compared = {a.seed: pairs_of(a.figures, b.figures) for a, b in pairs if _is_same(a, b)}
        for key in keys:
            found = {seed: of[key] for seed, of in compared.items() if key in of}
            for a, b in pairs:
                if a.seed in compared and (how := _difference(a, b, key)):
                    found.pop(a.seed, None)
                    what = f"seed {a.seed}, {titles.get(key, key)}: {how}"
                    strangers.append(f"`{row.stem}` ({what})")
            if found:
                lines.append([name, titles.get(key, key), *_compared(found)])
                name = ""
    if not lines and not strangers:
        return None
    sheet = Sheet(f"Paired comparison with {label}", lines=lines, level=4)
    if strangers:
        sheet.notes = [
            f"Not comparable with {label}, because it was measured on other examples or in another "
            f"ball: {', '.join(strangers)}"
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
    return a.bases[key] == b.bases[key] and not are_other_images(a.data, b.data)


def _difference(a: Measured, b: Measured, key: str) -> str:
    """Why a metric of two checkpoints cannot be compared; empty if it can, or one lacks it."""
    if key not in a.bases or key not in b.bases:
        return ""
    if key == WORST and a.threat != b.threat:
        return "another ball of the threat model"
    mine, its = a.efforts([key]), b.efforts([key])
    if unlike := [name for name in mine if name in its and mine[name][0] != its[name][0]]:
        return f"another ball of {', '.join(unlike)}"
    if not _is_same(a, b, key):
        return f"{a.bases[key].size:,} against {b.bases[key].size:,} examples"
    return ""


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
        "" if test is None or not test.is_tested else f"{test.p:.2g}",
        ", ".join(map(str, found)),
    ]


# -------------------------------------------------------------------------------------------- audit


def audit_notes(rows: Sequence[Row], results: Results) -> list[str]:
    """Failed checks and remarks, a line for each kind, and one about the rows that passed all."""
    failed: dict[str, list[tuple[Measured, AuditCheck]]] = {}
    remarks: dict[str, list[tuple[Measured, str]]] = {}
    passed = []
    for one in (one for row in rows for one in results.get(row.stem, [])):
        for remark in one.entry["remarks"]:
            remarks.setdefault(_BRACKETS.sub("", remark), []).append((one, remark))
        for check in _checks(one):
            if check["verdict"] == "fail":
                failed.setdefault(check["question"], []).append((one, check))
    for row in rows:
        found = [check["verdict"] for one in results.get(row.stem, []) for check in _checks(one)]
        if "pass" in found and "fail" not in found:
            passed.append(f"`{row.stem}` ({found.count('pass')})")
    notes = [
        f"⚠ audit, failed: {question} {_failures(found)}" for question, found in failed.items()
    ]
    for kind, told in remarks.items():
        texts = {remark for _, remark in told}
        text = texts.pop() if len(texts) == 1 else f"{kind} (the figures are in the result files)"
        notes.append(f"⚠ {_where(one for one, _ in told)}: {text}")
    if passed:
        notes.append(f"Audit, number of checks passed and none failed: {', '.join(passed)}")
    return notes


_BRACKETS = re.compile(r" \([^()]*\)")
"""Where a remark has its figures."""


def _checks(one: Measured) -> Sequence[AuditCheck]:
    return one.entry["audit"]["checks"] if "audit" in one.entry else []


def _failures(found: Sequence[tuple[Measured, AuditCheck]]) -> str:
    """The figures of failed checks with one question, row by row."""
    limits = sorted(check["threshold"] for _, check in found if check["threshold"] is not None)
    ends = dict.fromkeys(f"{limit:.4g}" for limit in [*limits[:1], *limits[-1:]])
    parts = []
    for _, group in groupby(found, key=lambda pair: pair[0].stem):
        told = list(group)
        values = dict.fromkeys(_value(check) for _, check in told)
        where = _where(one for one, _ in told)
        parts.append(f"{where}: {', '.join(values)}" if any(values) else where)
    return "; ".join(parts) + (f" (threshold {' to '.join(ends)})" if ends else "")


def _value(check: AuditCheck) -> str:
    return check["detail"] if check["value"] is None else f"{check['value']:.4g}"


def _where(measured: Iterable[Measured]) -> str:
    """Rows with their checkpoints and seeds; those of a row come one after the other."""
    rows = []
    for stem, found in groupby(measured, key=lambda one: one.stem):
        seeds: dict[str, list[int]] = {}
        for one in found:
            seeds.setdefault(one.label, []).append(one.seed)
        of = [f"{label} of seed {', '.join(map(str, n))}" for label, n in seeds.items()]
        rows.append(f"`{stem}` ({'; '.join(of)})")
    return ", ".join(rows)
