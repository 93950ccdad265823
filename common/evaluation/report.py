"""The report of an evaluation: accuracies, the outcome of every example, reasons for doubt."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from common.errors import ConfigurationError
from common.evaluation.claims import Comparison
from common.results.lines import Outcomes
from common.results.markdown import one_line
from common.results.outcomes import missing_worst, outcome_bits, positions
from common.results.schema import AuditCheck, AuditResult, CheckpointResult

if TYPE_CHECKING:  # matplotlib is imported where a picture is drawn
    from matplotlib.figure import Figure


@dataclass
class Evaluation:
    """What an evaluation found.

    The properties ``robust...`` raise a ConfigurationError if there is no worst case; its message
    says why.

    Args:
        result: As in a result file: see :mod:`common.results.outcomes`.
        outcomes: Of every example.
        warnings: Reasons for doubt, as sentences.
        position: Where in the data the examples are, ``(N,)``.
        pictures: Drawn of the result, by name.
        comparisons: With a claim, the reported accuracies beside ours.
    """

    result: CheckpointResult
    outcomes: Outcomes
    warnings: list[str]
    position: Tensor
    pictures: "dict[str, Figure]" = field(default_factory=dict)
    comparisons: list[Comparison] = field(default_factory=list)

    @property
    def metrics(self) -> dict[str, float]:
        """Accuracies in [0, 1] by name: ``clean_acc``, ``worst``, and of every attack."""
        return self.result["metrics"]

    @property
    def clean_acc(self) -> float:
        """Accuracy without an attack."""
        return self.metrics["clean_acc"]

    @property
    def robust_acc(self) -> float:
        """Share of the examples :attr:`robust_index` that withstood every attack that counts."""
        return self._with_worst()["metrics"]["worst"]

    @property
    def robust(self) -> Tensor:
        """Which of the examples :attr:`robust_index` withstood everything, bool ``(M,)``."""
        return torch.tensor(outcome_bits(self._with_worst(), "worst"))

    @property
    def robust_index(self) -> Tensor:
        """Positions in the data of the examples that every such attack was run on, ``(M,)``."""
        return self.position[positions(self._with_worst(), "worst")]

    def _with_worst(self) -> CheckpointResult:
        if "worst" not in self.metrics:
            reason = missing_worst(self.result["attacks"])
            raise ConfigurationError(reason or "there is no worst case: nothing was attacked")
        return self.result

    @property
    def failed_checks(self) -> list[str]:
        """The checks of the audit that failed, as sentences."""
        checks = self.result["audit"]["checks"] if "audit" in self.result else []
        failed = [check for check in checks if check["verdict"] == "fail"]
        return [f"{check['question']} {check['detail']}" for check in failed]

    def table(self) -> Table:
        """Accuracies with their intervals, for a terminal."""
        threat = self.outcomes.threat
        about = f", {threat.norm} eps {threat.radius:.5g}" if threat else ""
        table = Table(title=f"{self.result['examples']} examples{about}")
        for title in ("attack", "examples", "accuracy %", "95 % interval"):
            table.add_column(title, justify="left" if title == "attack" else "right")
        steps = self.result["attacks"]
        shown = [name for name, step in steps.items() if step["kind"] != "corruption"]
        named = ["clean_acc", *shown, "worst"]
        for name in (name for name in named if name in self.metrics):
            low, high = self.result["intervals"][name]
            accuracy = f"{100 * self.metrics[name]:.2f}"
            size = str(self.result["sizes"].get(name, self.result["examples"]))
            interval = f"{100 * low:.2f} to {100 * high:.2f}"
            table.add_row(Text(one_line(name + self._note(name))), size, accuracy, interval)
        return table

    def corruption_tables(self) -> list[Table]:
        """Accuracies under common corruptions, for a terminal: a table for each entry."""
        points: dict[str, dict[str, dict[str, str]]] = {}
        for key, step in self.result["attacks"].items():
            if step["kind"] == "corruption":
                entry, name, severity = key.split("/")
                points.setdefault(entry, {}).setdefault(name, {})[severity] = key
        return [self._corruption_table(entry, rows) for entry, rows in points.items()]

    def _corruption_table(self, entry: str, rows: dict[str, dict[str, str]]) -> Table:
        """One row for each corruption, one column for each severity, and the means."""
        errors = {f"{entry}_mce": "mCE", f"{entry}_error": "mean corruption error"}
        caption = [
            f"{text} {self.metrics[k]:.4f}" for k, text in errors.items() if k in self.metrics
        ]
        table = Table(title=f"{entry}: accuracy %", caption=", ".join(caption))
        severities = list(next(iter(rows.values())))
        for title in ("corruption", *(s.partition("=")[2] for s in severities), "mean"):
            table.add_column(title, justify="left" if title == "corruption" else "right")
        for name, keys in rows.items():
            metrics = [*(keys[severity] for severity in severities), f"{entry}/{name}"]
            table.add_row(name, *(f"{100 * self.metrics[key]:.2f}" for key in metrics))
        metrics = [*(f"{entry}/{severity}" for severity in severities), entry]
        table.add_row("mean", *(f"{100 * self.metrics[key]:.2f}" for key in metrics))
        return table

    def claim_table(self) -> Table:
        """Reported accuracies beside ours, for a terminal."""
        table = Table(title="claim")
        table.add_column("accuracy")
        for title in ("reported %", "ours %", "difference", "95 % interval", "reported is"):
            table.add_column(title, justify="right")
        for one in self.comparisons:
            low, high = one.interval
            table.add_row(
                one.name,
                f"{100 * one.reported:.2f}",
                f"{100 * one.ours:.2f}",
                f"{100 * one.difference:+.2f}",
                f"{100 * low:.2f} to {100 * high:.2f}",
                "inside" if one.is_inside else "outside",
            )
        return table

    def _note(self, name: str) -> str:
        """Why a row does not count towards the worst case."""
        attack = self.result["attacks"].get(name)
        if attack is None or attack["counts"]:
            return ""
        if attack["kind"] == "noise":
            return " (noise)"
        if attack["norm"] is None or attack["eps"] is None:
            return " (outside: no ball)"
        return f" (outside: {attack['norm']} eps {attack['eps']:.5g})"

    def __str__(self) -> str:
        """The tables, the verdict of the audit, and reasons for doubt."""
        console = Console(width=100)
        with console.capture() as captured:
            for table in (self.table(), *self.corruption_tables()):
                console.print(table)
            if self.comparisons:
                console.print(self.claim_table())
        lines = []
        if "audit" in self.result:
            verdicts = [check["verdict"] for check in self.result["audit"]["checks"]]
            count = len(verdicts) - verdicts.count("not applicable")
            lines.append(f"audit: {verdicts.count('pass')} of {count} checks passed")
        lines += [f"warning: {text}" for text in self.warnings]
        lines += [f"warning: audit: {text}" for text in self.failed_checks]
        return captured.get() + "".join(f"{line}\n" for line in lines)


FEW = 10
"""With fewer images classified correctly it is not suspicious that none of them falls."""


def suspicions(outcomes: Outcomes) -> list[str]:
    """Reasons to doubt that the figures are those of the model, as sentences."""
    return [*_without_gradient(outcomes), *_nothing_found(outcomes)]


def _without_gradient(outcomes: Outcomes) -> Iterator[str]:
    what = {
        "unmoved": "gradients vanish or are not finite: an attack got no usable direction for",
        "distorted": "the output follows scores inside the model that have other gradients, as "
        "where it is squashed or an auxiliary head steers it: an attack may have been misled on",
    }
    for name, text in what.items():
        counts = Counter(
            {
                key: int(columns[name].sum())
                for key, columns in outcomes.columns.items()
                if name in columns
            }
        )
        if found := [f"{key} for {count}" for key, count in (+counts).most_common()]:
            rest = f" and {len(found) - 3} more attacks," if len(found) > 3 else ""
            yield (
                f"{text} examples that withstood it "
                f"({', '.join(found[:3])}{rest} of {len(outcomes.y)}). They were attacked again, "
                "through such scores, through what the model cuts or rounds, and by labels alone; "
                "an evaluation that lacks this can overestimate the model's robustness"
            )


def _nothing_found(outcomes: Outcomes) -> Iterator[str]:
    within = [key for key, line in outcomes.lines.items() if line.counts and line.kind == "attack"]
    is_right = outcomes.correct["clean"]
    met = [int((is_right & outcomes.attacked[key]).sum()) for key in within]
    fell = any(bool((is_right & ~outcomes.correct[key]).any()) for key in within)
    if not fell and max(met, default=0) >= FEW:
        yield (
            f"none of the attacks ({', '.join(within)}) found a single adversarial example among "
            f"the {int(is_right.sum())} images classified correctly; this is suspicious in itself: "
            "the radius may be too small to mean anything, or the attacks fail (gradient masking)"
        )


def with_findings(
    audit: AuditResult | None, outcomes: Outcomes, state: str, has_gradient: bool
) -> AuditResult | None:
    """An audit with failed checks for a model with a state or without a gradient.

    ``state`` says what in the model depends on earlier calls. Without an audit, the result has the
    check of the state only, or is ``None``.
    """
    if not state and outcomes.depends_on_history:
        state = "the scores for the same images changed while the model was attacked"
    checks: list[AuditCheck] = []
    if state:
        question = "Predictions should not depend on earlier calls."
        checks.append(_failed("state", question, f"But {state}."))
    if audit is not None and not has_gradient:
        detail = "It has none, so attacks that follow it say nothing about robustness."
        checks.append(_failed("gradient", "The model should have a gradient.", detail))
    if not checks:
        return audit
    examples = len(outcomes.y) if audit is None else audit["examples"]
    return {"examples": examples, "checks": [*checks, *(audit["checks"] if audit else [])]}


def _failed(name: str, question: str, detail: str) -> AuditCheck:
    return AuditCheck(
        id=name, question=question, value=None, threshold=None, verdict="fail", detail=detail
    )
