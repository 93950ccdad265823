"""What the page says about one experiment: the numbers of its result files and their origin."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from common.packages import reproduction, short_name
from common.results.bases import Measured, ball_text
from common.results.outcomes import cut_from_autoattack, figures, is_audit
from common.results.reference import Row
from common.results.schema import AuditCheck, Result
from common.results.store import result_path


@dataclass(frozen=True)
class Number:
    """A cell with a number, or an empty one, and more about it."""

    text: str = ""
    hint: str = ""


@dataclass(frozen=True)
class Part:
    """What was measured of one checkpoint, by seed.

    Attributes:
        label: Of the checkpoint.
        about: Epoch and number of images.
        threat: The adversary of the worst case.
        seeds: In the order of the columns.
        numbers: Metrics by name, a number for each seed.
        confusion: Of the worst case, summed over the seeds that have one; empty if none has.
        audit: Checks by question, one for each seed; ``None`` where a seed lacks it.
        remarks: Warnings.
        origin: Provenance by key: a text for each seed, or one if all are the same.
    """

    label: str
    about: str
    threat: str
    seeds: list[int]
    numbers: dict[str, list[Number]]
    confusion: list[list[int]]
    audit: dict[str, list[AuditCheck | None]]
    remarks: list[str]
    origin: dict[str, list[str]]

    @property
    def titles(self) -> list[str]:
        """Of the columns."""
        return [f"seed {seed}" for seed in self.seeds]

    @property
    def verdicts(self) -> str:
        """How many checks of the audit passed and failed."""
        found = Counter(one["verdict"] for checks in self.audit.values() for one in checks if one)
        return ", ".join(f"{count} {verdict}" for verdict, count in found.items())


@dataclass(frozen=True)
class Details:
    """An experiment.

    Attributes:
        anchor: Where the page shows it.
        package: Of the paper.
        row: Its name and what was published of it.
        seeds: Those with a result.
        files: Its result files.
        command: What makes them.
        parts: Its checkpoints.
        examples: File of adversarial examples.
        columns: Cells of the table of all rows, by title.
    """

    anchor: str
    package: str
    row: Row
    seeds: list[int]
    files: list[str]
    command: str
    parts: list[Part]
    examples: Path | None
    columns: dict[str, Number] = field(default_factory=dict)

    @property
    def dataset(self) -> str:
        """The data set: what the stem begins with."""
        return self.row.stem.partition("_")[0]

    @property
    def short(self) -> str:
        """The paper's name in menus."""
        return short_name(self.package)

    @property
    def lacking(self) -> list[str]:
        """What its files do not have."""
        has = {
            "confusion": any(part.confusion for part in self.parts),
            "adversarial examples": self.examples,
            "audit": any(part.audit for part in self.parts),
        }
        return [what for what, there in has.items() if not there]


COLUMNS: Mapping[str, Sequence[str]] = {
    "Natural": ("clean_acc",),
    "PGD-20": ("pgd20", "pgd20/ce_f"),
    "AutoAttack": ("aa",),
    "worst case": ("worst",),
}
"""Columns of the table of all rows, with the metrics that may stand in them."""


def details_of(
    package: str, row: Row, found: Sequence[Result], folder: Path, anchor: str
) -> Details:
    """All about one experiment, from its result files and the figures beside them."""
    seeds = [result["seed"] for result in found]
    labels = dict.fromkeys(label for result in found for label in result["checkpoints"])
    examples = folder / "figures" / f"{row.stem}_examples.png"
    return Details(
        anchor,
        package,
        row,
        seeds,
        [result_path(folder, row.stem, seed).name for seed in seeds],
        reproduction(package, row.stem, *seeds),
        [_part(label, found) for label in labels],
        examples if examples.is_file() else None,
        dict(_columns(row, found)),
    )


def percent(share: float) -> str:
    """A share in percent."""
    return f"{100 * share:.2f}"


def _columns(row: Row, found: Sequence[Result]) -> Iterator[tuple[str, Number]]:
    """What was published and the mean of our last checkpoints, by title."""
    last = [result["checkpoints"]["last"] for result in found if "last" in result["checkpoints"]]
    for title, keys in COLUMNS.items():
        yield f"{title}, published", _published(row, keys)
        key = next((key for key in keys if any(key in one["metrics"] for one in last)), "")
        known = [one["metrics"][key] for one in last if key in one["metrics"]]
        sizes = sorted({one["sizes"][key] for one in last if key in one["sizes"]})
        hints = [f"on {', '.join(f'{size:,}' for size in sizes)} images"] if sizes else []
        marks = "‡" * bool(hints)
        if key == "aa" and (cut := {cut_from_autoattack(one["attacks"]) for one in last} - {""}):
            hints, marks = [*hints, *sorted(cut)], f"{marks}†"
        yield (
            f"{title}, ours",
            Number(percent(fmean(known)) + marks if known else "", "; ".join(hints)),
        )


def _published(row: Row, keys: Sequence[str]) -> Number:
    """The mean of what was printed for the last checkpoint, else for a selected one."""
    for label, mark in (("last", ""), ("selected", "§")):
        for key in keys:
            if printed := row.printed(label, key):
                tag = f" [{row.source}]" if row.source else ""
                return Number(f"{fmean(printed):.2f}{mark}{tag}", f"{row.origin}, {label}")
    return Number()


def _part(label: str, found: Sequence[Result]) -> Part:
    having = {result["seed"]: result for result in found if label in result["checkpoints"]}
    entries = {seed: result["checkpoints"][label] for seed, result in having.items()}
    first = next(iter(entries.values()))
    epochs = ", ".join(dict.fromkeys(str(entry["epoch"]) for entry in entries.values()))
    threat = first["threat"]
    tables = [entry["confusion"] for entry in entries.values() if "confusion" in entry]
    tables = [table for table in tables if len(table) == len(tables[0])]
    checks = [
        {check["question"]: check for check in entry["audit"]["checks"]} if "audit" in entry else {}
        for entry in entries.values()
    ]
    origins = [dict(_origin(result["provenance"][label])) for result in having.values()]
    measured = [Measured("", seed, label, entry) for seed, entry in entries.items()]
    return Part(
        label,
        f"epoch {epochs}, {first['examples']:,} images",
        "no threat model" if threat is None else ball_text(**threat),
        list(entries),
        _numbers(measured),
        [[sum(cells) for cells in zip(*rows, strict=True)] for rows in zip(*tables, strict=True)],
        {q: [of.get(q) for of in checks] for q in dict.fromkeys(q for of in checks for q in of)},
        list(dict.fromkeys(remark for entry in entries.values() for remark in entry["remarks"])),
        {
            key: texts if len(set(texts)) > 1 else texts[:1]
            for key in dict.fromkeys(key for origin in origins for key in origin)
            if (texts := [origin.get(key, "") for origin in origins])
        },
    )


def _numbers(measured: Sequence[Measured]) -> dict[str, list[Number]]:
    """Every metric but those of audits; a share of images has its interval as a hint."""
    shares = [figures(one.entry["clean"], one.entry["attacks"]) for one in measured]
    names = dict.fromkeys(name for one in measured for name in one.entry["metrics"])
    found: dict[str, list[Number]] = {}
    for name in names:
        if is_audit(name) or re.search(r"_clean$", name):
            continue
        found[name] = []
        for one, share in zip(measured, shares, strict=True):
            value = one.entry["metrics"].get(name)
            if value is None:
                found[name].append(Number())
            elif name in share:
                found[name].append(_share(one, name, value))
            else:
                found[name].append(Number(f"{value:,.0f}" if value % 1 == 0 else f"{value:.6g}"))
    return found


def _share(one: Measured, name: str, value: float) -> Number:
    size = one.entry["sizes"].get(name, one.entry["examples"])
    hint = f"{size:,} images"
    if name in one.entry["intervals"]:
        low, high = one.entry["intervals"][name]
        hint += f", 95 %: {percent(low)} to {percent(high)}"
    return Number(percent(value), hint)


def _origin(provenance: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every entry of a provenance as text; seconds by attack are left out."""
    for key, value in provenance.items():
        if isinstance(value, Mapping):
            if key != "attack_seconds":
                yield from _origin(value, f"{prefix}{key}: ")
        else:
            yield f"{prefix}{key}", str(value)
