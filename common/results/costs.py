"""Costs of training beside accuracies: one table per protocol, from the results of a folder."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from common.errors import ConfigurationError
from common.results.bases import Measured, Results, ball_text, by_experiment
from common.results.cells import spread_of
from common.results.columns import Columns
from common.results.markdown import Sheet
from common.results.outcomes import cut_from_autoattack
from common.results.reference import UNITS, Group, Metric
from common.results.schema import Provenance, Result, TrainingCost
from common.results.store import load_results

METRICS = [
    Metric("clean_acc", "clean"),
    Metric("pgd20", "PGD-20"),
    Metric("aa", "AutoAttack"),
    Metric("worst", "worst case"),
]
NOTE = (
    "Mean ± standard deviation over seeds. Seconds per epoch are of training alone, without "
    "validation; memory is that of a GPU's tensors, on a CPU what training added to the process."
)


class Protocol(NamedTuple):
    """What rows of a table share: the images and the adversary of the worst case."""

    examples: int
    data: str | None
    ball: str


def cost_sheets(folder: str | Path, label: str = "last") -> list[Sheet]:
    """The tables of a folder of results, for one of their checkpoints.

    Raises:
        ConfigurationError: If the folder has no such results, or one is damaged.
    """
    results = [result for result in load_results(folder) if label in result["checkpoints"]]
    if not results:
        raise ConfigurationError(
            f"{folder} has no result with the checkpoint {label!r}; give the results of a package, "
            "such as paper_cifs/results or runs/paper_cifs/results"
        )
    parts: dict[Protocol, list[Result]] = {}
    for result in results:
        parts.setdefault(_protocol(result, label), []).append(result)
    return [_sheet(protocol, part, label) for protocol, part in parts.items()]


def _protocol(result: Result, label: str) -> Protocol:
    entry, origin = result["checkpoints"][label], result["provenance"][label]
    threat = entry["threat"]
    ball = "no adversary" if threat is None else ball_text(threat["norm"], threat["eps"])
    return Protocol(entry["examples"], origin.get("data_digest"), ball)


def _sheet(protocol: Protocol, results: Sequence[Result], label: str) -> Sheet:
    found = {
        stem: [measured for measured in every if measured.label == label]
        for stem, every in by_experiment(results).items()
    }
    group = Group("costs", "", METRICS)
    columns = Columns(group, list(found), found)
    shown = [metric for metric in METRICS if columns.basis[metric.key] is not None]
    origins = {(r["experiment"], r["seed"]): r["provenance"][label] for r in results}
    lines = [
        _line(stem, seeds, [origins[stem, one.seed] for one in seeds], shown, columns)
        for stem, seeds in found.items()
    ]
    titles = [metric.title for metric in shown]
    parts = columns.parts(shown)
    return Sheet(
        f"{protocol.examples:,} images, {protocol.ball}",
        NOTE,
        ["experiment", "seconds per epoch", "peak memory, MB", *titles, "seeds"],
        lines,
        notes=[
            *(["; ".join(parts)] if parts else []),
            *columns.notes(),
            *_cut(found),
            *_machines(results, label),
        ],
    )


def _line(
    stem: str,
    seeds: Sequence[Measured],
    origins: Sequence[Provenance],
    metrics: Sequence[Metric],
    columns: Columns,
) -> list[str]:
    known = [cost for origin in origins if (cost := origin.get("training")) is not None]
    cells = [
        spread_of([cost["seconds_per_epoch"] for cost in known]),
        spread_of([cost["peak_memory"] / 1e6 for cost in known]),
    ]
    for metric in metrics:
        values = [columns.value(metric, measured) for measured in seeds]
        cells.append(spread_of([UNITS[metric.unit] * v for v in values if v is not None]))
    return [f"`{stem}`", *cells, str(len(seeds))]


def _cut(found: Results) -> Iterator[str]:
    """Where AutoAttack is less than its standard version, as notes."""
    where: dict[str, list[str]] = {}
    for stem, every in found.items():
        for cut in sorted({cut_from_autoattack(one.entry["attacks"]) for one in every} - {""}):
            where.setdefault(cut, []).append(f"`{stem}`")
    for cut, rows in where.items():
        yield f"AutoAttack is cut ({cut}): {', '.join(rows)}."


def _machines(results: Sequence[Result], label: str) -> Iterator[str]:
    """What the rows were trained on, as notes; and which have no costs."""
    where: dict[str, list[str]] = {}
    for result in results:
        cost = result["provenance"][label].get("training")
        words = "no costs recorded" if cost is None else _machine(cost)
        where.setdefault(words, []).append(f"`{result['experiment']}` seed {result['seed']}")
    for words, rows in where.items():
        yield f"{words[0].upper()}{words[1:]}{'' if len(where) == 1 else ': ' + ', '.join(rows)}."


def _machine(cost: TrainingCost) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in cost["versions"].items())
    return (
        f"trained on {cost['device']}, {cost['processes']} process(es) of {cost['threads']} "
        f"thread(s); {versions}"
    )
