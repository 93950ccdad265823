"""What stands under a table: paired comparisons of its rows, and what audits of them found."""

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean

from common.results.bases import bases
from common.results.markdown import Sheet
from common.results.outcomes import group_of, outcome_bits
from common.results.reference import Group, Row
from common.results.schema import AuditCheck, CheckpointResult, Result
from common.results.statistics import mcnemar_exact, welch_t_test

Results = Mapping[str, Sequence[Result]]
"""By experiment."""

_NOTE = (
    "Last checkpoints. *difference* is this row minus {label} in points, the mean over seeds. "
    "*only one right* counts the examples that only this row / only {label} gets right, all seeds "
    "together. *p* is McNemar's exact test, two-sided, for each seed. The p values of different "
    "seeds share their examples and are not independent, and none is corrected for the number of "
    "comparisons. *p over seeds* is Welch's two-sample t-test of the accuracies of the seeds, "
    "two-sided: whether another training run would show the difference too."
)

_Pair = tuple[list[bool], list[bool]]


def comparison_sheet(
    group: Group, rows: Sequence[Row], baselines: Mapping[str, Row], results: Results
) -> Sheet | None:
    """Set the rows of a table against their baselines, example by example.

    Args:
        group: The table.
        rows: Its rows; baselines may be among them.
        baselines: What each is compared with, by stem; rows that are not there or are their own
            baseline are compared with nothing.
        results: Of all experiments.

    Returns:
        ``None`` where there is nothing to compare.
    """
    titles = {metric.key: metric.title for metric in group.metrics}
    others = [row for row in rows if baselines.get(row.stem, row).stem != row.stem]
    keys = group.compare
    if keys is None:
        keys = _own_metrics(list(titles), [*baselines.values(), *others], results)
    if not keys or not others:
        return None
    labels = {baselines[row.stem].label for row in others}
    is_common = len(labels) == 1
    lines, strangers = [], []
    for row in others:
        baseline = baselines[row.stem]
        name = f"{row.label} (`{row.stem}`)"
        if not is_common:
            name += f" against {baseline.label}"
        pairs = [
            (seed, ours, theirs, bases(ours), bases(theirs))
            for seed, ours, theirs in _last_pairs(
                results.get(row.stem, []), results.get(baseline.stem, [])
            )
        ]
        others_split = [p for p in pairs if p[3]["clean_acc"] != p[4]["clean_acc"]]
        strangers += [f"`{row.stem}` (seed {seed})" for seed, *_ in others_split]
        for key in keys:
            found: dict[int, _Pair] = {}
            for seed, ours, theirs, ours_of, theirs_of in pairs:
                a, b = outcome_bits(ours, key), outcome_bits(theirs, key)
                is_same_split = ours_of["clean_acc"] == theirs_of["clean_acc"]
                if a is None or b is None or not is_same_split:
                    continue
                if ours_of[key] == theirs_of[key]:
                    found[seed] = a, b
                else:
                    sizes = f"{len(a):,} against {len(b):,} examples"
                    strangers.append(f"`{row.stem}` (seed {seed}, {titles.get(key, key)}: {sizes})")
            if found:
                lines.append([name, titles.get(key, key), *_compared(found)])
                name = ""
    label = next(iter(labels)) if is_common else "its baseline"
    notes = []
    if strangers:
        notes.append(
            f"Not comparable with {label}, because it was measured on other examples: "
            f"{', '.join(strangers)}"
        )
    if not lines and not notes:
        return None
    title = f"Paired comparison with {label}"
    if not lines:
        return Sheet(title, notes=notes, level=4)
    header = ["experiment", "metric", "difference", "only one right", "p", "p over seeds", "seeds"]
    return Sheet(title, _NOTE.format(label=label), header, lines, notes, level=4)


def _own_metrics(keys: Sequence[str], rows: Sequence[Row], results: Results) -> list[str]:
    """The metrics that are ``worst`` or about a single step of some row."""
    own = {"worst"}
    for row in rows:
        for result in results.get(row.stem, []):
            if "last" in result["checkpoints"]:
                for name, attack in result["checkpoints"]["last"]["attacks"].items():
                    own |= {name, group_of(name, attack)}
    return [key for key in keys if key in own]


def _last_pairs(
    ours: Sequence[Result], theirs: Sequence[Result]
) -> Iterator[tuple[int, CheckpointResult, CheckpointResult]]:
    """Seeds that both have a last checkpoint of."""
    last = {
        result["seed"]: result["checkpoints"]["last"]
        for result in theirs
        if "last" in result["checkpoints"]
    }
    for result in ours:
        if "last" in result["checkpoints"] and result["seed"] in last:
            yield result["seed"], result["checkpoints"]["last"], last[result["seed"]]


def _compared(found: Mapping[int, _Pair]) -> list[str]:
    """The cells of one metric, given the outcomes of both rows for each seed."""
    differences, p_values, only_ours, only_theirs = [], [], 0, 0
    for a, b in found.values():
        here = sum(x and not y for x, y in zip(a, b, strict=True))
        there = sum(y and not x for x, y in zip(a, b, strict=True))
        differences.append(100.0 * (here - there) / len(a))
        p_values.append(f"{mcnemar_exact(here, there):.2g}")
        only_ours, only_theirs = only_ours + here, only_theirs + there
    p_seeds = welch_t_test(
        *([fmean(bits) for bits in side] for side in zip(*found.values(), strict=True))
    )
    return [
        f"{fmean(differences):+.2f}",
        f"{only_ours} / {only_theirs}",
        ", ".join(p_values),
        "" if p_seeds is None else f"{p_seeds:.2g}",
        ", ".join(map(str, found)),
    ]


# -------------------------------------------------------------------------------------------- audit


def audit_notes(rows: Sequence[Row], results: Results) -> list[str]:
    """Warnings about failed checks and remarks, and a line about the rows that passed all checks.

    Args:
        rows: Of the table.
        results: Of all experiments.
    """
    warnings, passed = [], []
    remarks: dict[str, list[str]] = {}
    for row in rows:
        counts, is_sound = 0, True
        for result in results.get(row.stem, []):
            for label, checkpoint in result["checkpoints"].items():
                for remark in checkpoint["remarks"]:
                    where = f"`{row.stem}` seed {result['seed']}, {label}"
                    remarks.setdefault(remark, []).append(where)
                checks = checkpoint["audit"]["checks"] if "audit" in checkpoint else []
                counts += sum(check["verdict"] == "pass" for check in checks)
                if failed := [check for check in checks if check["verdict"] == "fail"]:
                    is_sound = False
                    warnings.append(
                        f"⚠ audit: `{row.stem}` seed {result['seed']}, {label}: "
                        f"{'; '.join(map(_failure, failed))}"
                    )
        if counts and is_sound:
            passed.append(f"`{row.stem}` ({counts})")
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
