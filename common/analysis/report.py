"""The frame of every analysis: ``python -m paper_X.analysis``.

A paper's ``analysis.py`` declares an :class:`Analysis`: its claims, measures and figures. The frame
reads the results of a reproduction, keeps the rows that can be compared, draws the figures, writes
``analysis.json`` beside the results, from which tables show the verdicts, and prints. What is
missing is named, and the rest is done without it.
"""

import argparse
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from common.analysis.claims import BySeed, Claim, by_seed, minus, paired_difference, verdict_table
from common.analysis.figures import forest_plot
from common.errors import ConfigurationError, UserError
from common.evaluation.drawing import save_figure
from common.evaluation.models import load_run
from common.files import write_sealed_json
from common.packages import package_folder
from common.results.bases import comparable, last_of
from common.results.published import digests
from common.results.reference import Reference, meant_by, read_reference
from common.results.schema import Result
from common.results.selection import parse_seeds, select
from common.results.store import read_result

Load = Callable[[Path], tuple[Any, Any]]
"""Run directory -> (classifier, data module)."""


def load_last(run: Path) -> tuple[Any, Any]:
    """The classifier and the data of a run directory, at its last checkpoint."""
    return load_run(run, "last")


@dataclass
class Found:
    """What an analysis works on.

    Attributes:
        on: The rows that are analysed: with what their stems begin.
        prefix: What the frame takes off a stem to get the method's name.
        seeds: Those asked for.
        runs: Where the run directories ``<stem>/seed<k>`` are.
        folder: Where the result files are, and where the output goes.
        labels: What ``reference.yaml`` calls the rows, by stem.
        everything: All results of the seeds, of other rows too.
        results: Those of ``on``.
        metrics: Of the last checkpoints in ``results``, by (method, seed), comparable ones alone.
        missing: In words.
        measured: Sections of ``analysis.json``, filled by the paper's ``measure``.
        kept: What its ``measure`` leaves for claims and figures alone.
    """

    on: str
    prefix: str
    seeds: Sequence[int]
    runs: Path
    folder: Path
    device: str = "cpu"
    load: Load = load_last
    labels: Mapping[str, str] = field(default_factory=dict)
    everything: list[Result] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    metrics: dict[tuple[str, int], dict[str, float]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    measured: dict[str, Any] = field(default_factory=dict)
    kept: dict[str, Any] = field(default_factory=dict)

    def label(self, method: str) -> str:
        """A method in words."""
        return self.labels.get(f"{self.prefix}{method}", method.replace("_", " "))

    @property
    def is_digits(self) -> bool:
        """Whether this is the scaled-down run."""
        return self.prefix.startswith("digits_")

    def of(self, method: str, metric: str) -> BySeed:
        """A metric of a method by seed."""
        return by_seed(self.metrics, method, metric)

    def gain(self, first: str, second: str, metric: str) -> BySeed:
        """Metric of the first method minus that of the second by seed, in points."""
        return minus(self.of(first, metric), self.of(second, metric), 100.0)

    def read_results(self, needed: Mapping[str, Sequence[str]]) -> None:
        """Read every result file; name the damaged ones and the metrics that are missing."""
        for path in sorted(self.folder.glob("*-seed*.json")):
            try:
                result = read_result(path)
            except UserError as error:
                self.missing.append(f"result {error}")
                continue
            if result["seed"] in self.seeds:
                self.everything.append(result)
        chosen = select({r["experiment"] for r in self.everything}, self.on)
        self.results = [r for r in self.everything if r["experiment"] in chosen]
        self.metrics, left_out = comparable(last_of(self.results, self.prefix))
        self.missing += left_out + [
            f"{name} of {self.prefix}{method}, seed {seed}"
            for method, names in needed.items()
            for seed in self.seeds
            for name in names
            if name not in self.metrics.get((method, seed), {})
        ]

    def load_runs(self, methods: Sequence[str]) -> dict[tuple[str, int], tuple[Any, Any]]:
        """Classifier, on the device, and data of every run there is, at its last checkpoint."""
        found: dict[tuple[str, int], tuple[Any, Any]] = {}
        for method in methods:
            for seed in self.seeds:
                run = self.runs / f"{self.prefix}{method}" / f"seed{seed}"
                checkpoint = run / "checkpoints" / "last.ckpt"
                if not checkpoint.is_file():
                    self.missing.append(f"checkpoint {checkpoint}")
                    continue
                try:
                    model, data = self.load(run)
                    found[method, seed] = model.to(self.device).eval(), data
                except (UserError, RuntimeError, OSError) as error:
                    self.missing.append(f"checkpoint {checkpoint}: {error}")
                except SystemExit:  # how the option parser refuses a file, after it has said why
                    self.missing.append(
                        f"checkpoint {checkpoint}: {run / 'config.yaml'} is refused"
                    )
        return found

    def test_split(self, data: Any) -> tuple[Tensor, Tensor] | None:
        """Test images, float32 in [0, 1] ``(N, C, H, W)``, and labels ``(N,)``, on the device.

        ``None``, and named among the missing, where they cannot be had.
        """
        try:
            data.prepare_data()
            data.setup("test")
            batches = [data.on_after_batch_transfer(one, 0) for one in data.test_dataloader()]
        except (UserError, RuntimeError, OSError) as error:
            self.missing.append(f"test images of {self.on}: {error}")
            return None
        x, y = (torch.cat([batch[key] for batch in batches]).to(self.device) for key in "xy")
        return x, y


def scope_of(on: str) -> tuple[str, str]:
    """All rows of small networks on one data set, else those asked for; and the data set."""
    for small in ("digits", "fashion_small"):
        if on.startswith(small):
            return small, f"{small}_"
    return on, f"{on.partition('_')[0]}_"


@dataclass(frozen=True)
class Analysis:
    """What a paper declares.

    Attributes:
        package: Of the paper.
        claims: Results and measures to claims with verdicts.
        accuracy: Metric of the forest plot.
        accuracy_label: The same in words.
        scope: A beginning of stems to what the stems of an analysis begin with, and the prefix
            before the methods' names.
        measure: Takes the measures of trained networks and puts them into ``found``.
        figures: Figures by name; ``None`` where there is nothing to draw.
        tables: More tables under the verdicts.
        needed: Metrics by method whose absence is named.
        compared: Whether a method belongs into the forest plot.
        note: Under the verdicts, where the rule is not the usual one.
    """

    package: str
    claims: Callable[[Found], Sequence[Claim]]
    accuracy: str
    accuracy_label: str
    scope: Callable[[str], tuple[str, str]] = scope_of
    measure: Callable[[Found], None] = lambda found: None
    figures: Callable[[Found], Mapping[str, Figure | None]] = lambda found: {}
    tables: Callable[[Found], list[dict[str, Any]]] = lambda found: []
    needed: Mapping[str, Sequence[str]] = field(default_factory=dict)
    compared: Callable[[str], bool] = lambda method: True
    note: str = ""

    def analyse(
        self,
        runs: Path,
        results: Path,
        on: str,
        seeds: Sequence[int],
        device: str = "cpu",
        load: Load = load_last,
    ) -> dict[str, Any]:
        """Draw and judge what can be drawn and judged; the arguments are those of :class:`Found`.

        Returns:
            What was written, with ``figures`` and ``path`` added.

        Raises:
            ConfigurationError: If there is neither a result nor a measure to work on.
        """
        rows, prefix = self.scope(on)
        path = package_folder(self.package) / "reference.yaml"
        reference = read_reference(path) if path.is_file() else Reference([], {})
        labels = {stem: row.label for stem, row in reference.rows.items()}
        found = Found(rows, prefix, seeds, runs, results, device, load, labels)
        found.read_results(self.needed)
        self.measure(found)
        if not found.metrics and not any(found.measured.values()):
            raise ConfigurationError(
                f"nothing to analyse: no usable result {results}/{rows}*-seed*.json and no usable "
                f"checkpoint below {runs}/{rows}* for seeds {', '.join(map(str, seeds))}; run make "
                f"reproduce-{self.package.removeprefix('paper_')} ON={rows}"
            )
        claims = self.claims(found)
        verdicts = [verdict_table(claims, self.note)] if claims else []
        report: dict[str, Any] = {
            "on": rows,
            "seeds": list(seeds),
            "claims": plain_values([asdict(claim) for claim in claims]),
            "tables": [*verdicts, *self.tables(found)],
            **plain_values(found.measured),
            "missing": found.missing,
        }
        start = prefix if found.is_digits else f"{rows}_"
        pictures = {"differences": self.forest(found, reference), **self.figures(found)}
        figures = [
            save_figure(figure, results / "figures" / f"{start}{name}.png")
            for name, figure in pictures.items()
            if figure is not None
        ]
        report["figures"] = [figure.name for figure in figures]
        report["made_of"] = digests(found.everything)
        path = results / ("analysis.json" if found.is_digits else f"analysis_{rows}.json")
        write_sealed_json(path, report)
        return {**report, "figures": [str(figure) for figure in figures], "path": str(path)}

    def forest(self, found: Found, reference: Reference) -> Figure | None:
        """Differences of all rows to the baseline of their first table that has one.

        ``None`` where it has no result, or there is no other row.
        """
        methods = {f"{found.prefix}{method}": method for method, _ in found.metrics}
        named = (group.baseline for group in reference.groups)
        baseline = next((methods[stem] for stem in named if stem in methods), None)
        if baseline is None:
            return None
        base = found.of(baseline, self.accuracy)
        differences = {
            found.label(method): difference
            for method in sorted({method for method, _ in found.metrics} - {baseline})
            if self.compared(method)
            and (difference := paired_difference(found.of(method, self.accuracy), base, 100.0))
        }
        if not differences:
            return None
        ordered = dict(sorted(differences.items(), key=lambda item: -item[1].mean))
        return forest_plot(ordered, found.label(baseline), self.accuracy_label)

    def main(self, args: Sequence[str] | None = None) -> int:
        """Run the command; 0 for every outcome of the verdicts, 2 where nothing can be done."""
        parser = argparse.ArgumentParser(
            prog=f"python -m {self.package}.analysis",
            description="Figures, and verdicts on claims, from checkpoints and results.",
        )
        parser.add_argument(
            "--runs", type=Path, default=Path("runs") / self.package, help="with results/ inside"
        )
        parser.add_argument("--on", default="digits", help="exact stems, patterns or beginnings")
        parser.add_argument("--seeds", default="0 1 2", metavar='"0 1 2"')
        parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        o = parser.parse_args(args)
        results, status = o.runs / "results", 0
        stems = {path.name.rpartition("-seed")[0] for path in results.glob("*-seed*.json")}
        try:
            seeds, chosen = parse_seeds(o.seeds), meant_by(self.package, o.on)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        for on in dict.fromkeys(self.parts(chosen, stems)):
            try:
                report = self.analyse(o.runs, results, on, seeds, o.device)
                print(describe(report))
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
                status = 2
        return status

    def parts(self, on: str, stems: Iterable[str]) -> Iterator[str]:
        """The analyses that a selection is about: each of its rows is in one of them."""
        for word in on.split() or ["*"]:
            start = re.split(r"[*?[]", word)[0].rstrip("_")
            found = select(stems, word)
            yield from (self._part(stem, start) for stem in found)
            if not found:
                yield self.scope(start or word)[0]

    def _part(self, stem: str, start: str) -> str:
        """The analysis of a row: its own, else all that begins as asked for, else its data set."""
        if (own := self.scope(stem)[0]) != stem:
            return own
        for beginning in filter(None, (start, stem.partition("_")[0])):
            rows, prefix = self.scope(beginning)
            if stem.startswith(prefix) and select([stem], rows):
                return rows
        return stem


def plain_values(value: Any) -> Any:
    """Tensors and floats as JSON has them: six digits, ``None`` for what is not finite."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain_values(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain_values(inner) for inner in value]
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value


def describe(report: Mapping[str, Any]) -> str:
    """A report as text: the tables, what was missing, and the files written."""
    lines = []
    for table in report["tables"]:
        lines += [table["title"], *("    " + " | ".join(line) for line in table["lines"])]
    lines += [f"missing: {what}" for what in report["missing"]]
    lines += [f"wrote {path}" for path in (report["path"], *report["figures"])]
    return "\n".join(lines)
