"""Reasons to doubt an evaluation that its own outcomes give."""

from collections.abc import Iterator

from common.results.lines import Outcomes
from common.results.schema import AuditCheck, AuditResult

FEW = 10
"""With fewer images classified correctly it is not suspicious that none of them falls."""


def suspicions(outcomes: Outcomes) -> list[str]:
    """Reasons to doubt that the figures are those of the model, as sentences."""
    return [*_without_gradient(outcomes), *_nothing_found(outcomes)]


def _without_gradient(outcomes: Outcomes) -> Iterator[str]:
    what = {
        "unmoved": "gradients vanish or are not finite",
        "distorted": "the scores are squashed at the end of the model, which distorts gradients",
    }
    for name, text in what.items():
        found = [
            f"{key} for {int(columns[name].sum())}"
            for key, columns in outcomes.columns.items()
            if name in columns and bool(columns[name].any())
        ]
        if found:
            yield (
                f"{text}: an attack got no usable direction for examples that withstood it "
                f"({', '.join(found)} of {len(outcomes.y)}). They were attacked again, through the "
                "scores before squashing, through what the model cuts or rounds, and by labels "
                "alone; an evaluation that lacks this overestimates the model's robustness"
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
