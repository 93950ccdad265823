"""What the analyses of papers share: runs and results found, claims held against them.

A paper's ``analysis.py`` has a function ``analyse`` that draws figures and judges the paper's
claims on what there is, and leaves ``analysis.json`` beside the results, from which tables show the
verdicts. Whatever is missing is named there, and the rest is done without it. A claim with one
number is an ``Expectation``; one with several variants is a ``Claim``, and goes with whatever else
an analysis has to show into ``tables``: a list of title, note, header and lines of text.
"""

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

import torch
from torch import Tensor

from common.errors import UserError, check_choice
from common.evaluation.models import load_run
from common.results.bases import comparable
from common.results.store import CheckpointResult, read_result, result_path


@dataclass(frozen=True)
class Expectation:
    """A claim, what was measured, and whether the claim holds.

    Attributes:
        id: A letter.
        claim: In words.
        value: Mean over the seeds there are; ``None`` where there is none.
        threshold: What ``value`` is compared with.
        holds: The verdict; ``None`` unless every seed asked for was there.
        per_seed: ``value`` of each seed.
        beside: Means of other quantities that belong to an honest reading.
    """

    id: str
    claim: str
    value: float | None
    threshold: float
    holds: bool | None
    per_seed: dict[int, float]
    beside: dict[str, float | None]


BySeed = dict[int, float]


def by_seed(found: Mapping[tuple[str, int], Mapping[str, Any]], name: str, *keys: str) -> BySeed:
    """What lies under ``keys`` in each entry of ``name``; seeds that lack it are left out."""
    values: BySeed = {}
    for (owner, seed), entry in found.items():
        value: Any = entry if owner == name else None
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None and math.isfinite(value):
            values[seed] = float(value)
    return values


def combined(first: BySeed, second: BySeed, how: Callable[[float, float], float]) -> BySeed:
    """``how`` of two numbers, for the seeds that have both."""
    return {seed: how(first[seed], second[seed]) for seed in first if seed in second}


def mean(values: BySeed) -> float | None:
    """Mean over seeds; ``None`` if there is none."""
    return sum(values.values()) / len(values) if values else None


def conclude(
    id: str,
    claim: str,
    values: BySeed,
    seeds: Sequence[int],
    holds: Callable[[float], bool],
    threshold: float,
    beside: Mapping[str, BySeed] | None = None,
) -> Expectation:
    """An expectation whose verdict is ``holds(mean)`` once every seed is there."""
    value = mean(values)
    verdict = holds(value) if value is not None and set(values) >= set(seeds) else None
    others = {name: mean(numbers) for name, numbers in (beside or {}).items()}
    return Expectation(id, claim, value, threshold, verdict, values, others)


# --------------------------------------------------------------- claims about several variants


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences over seeds, and its standard error.

    Attributes:
        mean: In whatever the numbers are in.
        error: Standard error of the mean; infinite with fewer than two seeds.
        seeds: How many.
    """

    mean: float
    error: float
    seeds: int

    @property
    def is_up(self) -> bool:
        """Whether the mean is above zero by more than two standard errors."""
        return self.mean > 2.0 * self.error

    @property
    def is_down(self) -> bool:
        """Whether the mean is below zero by more than two standard errors."""
        return self.mean < -2.0 * self.error

    def text(self, digits: int = 1) -> str:
        """Mean ± standard error, to so many decimals; the mean alone where there is no error."""
        error = f" ± {self.error:.{digits}f}" if math.isfinite(self.error) else ""
        return f"{self.mean:+.{digits}f}{error}"


def paired_difference(first: BySeed, second: BySeed, scale: float = 1.0) -> Difference | None:
    """``first`` minus ``second`` over the seeds that have both; ``None`` if there is none."""
    values = [scale * value for value in combined(first, second, lambda a, b: a - b).values()]
    if not values:
        return None
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return Difference(fmean(values), error, len(values))


Verdict = Literal["supported", "contradicted", "undecided", "not testable here"]

VERDICTS: dict[Verdict, str] = {
    "supported": "supported",
    "contradicted": "not supported: contradicted",
    "undecided": "not supported: undecided",
    "not testable here": "not testable here",
}


@dataclass(frozen=True)
class Judgement:
    """What the results say about a claim, for one variant of a method.

    Attributes:
        verdict: One of four.
        evidence: The numbers behind it, in words.
    """

    verdict: Verdict
    evidence: str

    def __post_init__(self) -> None:
        check_choice("verdict", self.verdict, Verdict)


@dataclass(frozen=True)
class Claim:
    """A claim of a paper and its judgement for every variant, by the variant's name."""

    id: str
    claim: str
    judgements: Mapping[str, Judgement]


def verdict_table(claims: Sequence[Claim], note: str = "") -> dict[str, Any]:
    """Claims as an entry of ``tables`` in ``analysis.json``, a line for each variant."""
    lines = [
        [
            claim.id if i == 0 else "",
            claim.claim if i == 0 else "",
            variant,
            VERDICTS[judgement.verdict],
            judgement.evidence,
        ]
        for claim in claims
        for i, (variant, judgement) in enumerate(claim.judgements.items())
    ]
    header = ["", "claim", "variant", "verdict", "numbers"]
    return {"title": "Verdicts", "note": note, "header": header, "lines": lines}


# ------------------------------------------------------------------------ runs and results


Load = Callable[[Path], tuple[Any, Any]]
"""Run directory -> (classifier, data module)."""


def load_last(run: Path) -> tuple[Any, Any]:
    """The classifier and the data of a run directory, at its last checkpoint."""
    return load_run(run, "last")


def load_test_split(datamodule: Any) -> tuple[Tensor, Tensor]:
    """Images of the test split, float32 in [0, 1] ``(N, C, H, W)``, and labels ``(N,)``."""
    datamodule.prepare_data()
    datamodule.setup("test")
    batches = [
        datamodule.on_after_batch_transfer(batch, 0) for batch in datamodule.test_dataloader()
    ]
    return torch.cat([b["x"] for b in batches]), torch.cat([b["y"] for b in batches])


def read_metrics(
    folder: Path, methods: Mapping[str, Sequence[str]], base: str, seeds: Sequence[int]
) -> tuple[dict[tuple[str, int], dict[str, float]], list[str]]:
    """The last checkpoint's metrics from every result file there is.

    Args:
        folder: Where the files are.
        methods: What stands after ``base`` in the stems, with the metrics that are needed of it.
        base: With what the stems begin.
        seeds: Which.

    Returns:
        Metrics by (method, seed), and what is missing, in words.
    """
    last: dict[tuple[str, int], CheckpointResult] = {}
    lacking: list[str] = []
    for method in methods:
        for seed in seeds:
            path = result_path(folder, f"{base}_{method}", seed)
            if not path.is_file():
                lacking.append(f"result {path}")
                continue
            try:
                checkpoints = read_result(path)["checkpoints"]
            except UserError as error:
                lacking.append(f"result {error}")
                continue
            if "last" in checkpoints:
                last[method, seed] = checkpoints["last"]
            lacking += [
                f"metric {name} of the last checkpoint in {path}"
                for name in methods[method]
                if "last" not in checkpoints or name not in checkpoints["last"]["metrics"]
            ]
    metrics, left_out = comparable(last)
    return metrics, lacking + left_out


def load_runs(
    runs: Path, methods: Sequence[str], base: str, seeds: Sequence[int], load: "Load"
) -> tuple[dict[tuple[str, int], tuple[Any, Any]], list[str]]:
    """Classifier and data of every run there is, at its last checkpoint.

    Returns:
        Both by (method, seed), and what is missing, in words.
    """
    found: dict[tuple[str, int], tuple[Any, Any]] = {}
    missing: list[str] = []
    for method in methods:
        for seed in seeds:
            run = runs / f"{base}_{method}" / f"seed{seed}"
            checkpoint = run / "checkpoints" / "last.ckpt"
            if not checkpoint.is_file():
                missing.append(f"checkpoint {checkpoint}")
                continue
            try:
                found[method, seed] = load(run)
            except (UserError, RuntimeError, OSError) as error:
                missing.append(f"checkpoint {checkpoint}: {error}")
            except SystemExit:  # how the option parser refuses a file, after it has said why
                missing.append(f"checkpoint {checkpoint}: {run / 'config.yaml'} is refused")
    return found, missing


# ------------------------------------------------------------------------------ the command


def plain_values(value: Any) -> Any:
    """Tensors and floats as JSON has them: six digits, ``None`` for what is not finite."""
    if isinstance(value, Mapping):
        return {str(key): plain_values(inner) for key, inner in value.items()}
    if isinstance(value, Tensor):
        return plain_values(value.tolist())
    if isinstance(value, list | tuple):
        return [plain_values(inner) for inner in value]
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value


def describe(report: Mapping[str, Any]) -> str:
    """A report as text: verdicts, numbers beside them, and what was missing."""
    words = {True: "holds", False: "DOES NOT HOLD", None: "undecided"}

    def number(value: float | None) -> str:
        return "missing" if value is None else f"{value:.3f}"

    lines = []
    for entry in report["expectations"]:
        seeds = "; ".join(f"seed {seed}: {number(v)}" for seed, v in entry["per_seed"].items())
        lines.append(f"({entry['id']}) {words[entry['holds']]}: {entry['claim']}")
        lines.append(
            f"    measured {number(entry['value'])} against {number(entry['threshold'])}"
            + (f" ({seeds})" if seeds else "")
        )
        lines += [f"    {name}: {number(value)}" for name, value in entry["beside"].items()]
    for table in report.get("tables", []):
        lines += [table["title"], *("    " + " | ".join(line) for line in table["lines"])]
    lines += [f"missing: {what}" for what in report["missing"]]
    lines += [f"wrote {path}" for path in (report["path"], *report["figures"])]
    return "\n".join(lines)


Analyse = Callable[[Path, Path, str, Sequence[int], str], dict[str, Any]]
"""(runs, results, on, seeds, device) -> the report that :func:`describe` shows."""


def run_analysis(package: str, analyse: Analyse, args: Sequence[str] | None = None) -> int:
    """Run ``python -m <package>.analysis``.

    Returns:
        0 whichever way the expectations turn out, 2 where nothing can be done.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {package}.analysis",
        description="Figures, and verdicts on the paper's claims, from checkpoints and results.",
    )
    parser.add_argument("--runs", type=Path, default=Path("runs") / package)
    parser.add_argument("--results", type=Path, default=Path(package) / "results")
    parser.add_argument("--on", default="digits", help="with what the stems begin")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    o = parser.parse_args(args)
    try:
        report = analyse(o.runs, o.results, o.on, o.seeds, o.device)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(describe(report))
    return 0
