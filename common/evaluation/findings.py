"""Findings about a model that fail an evaluation, beside those of an audit."""

from common.evaluation.checks import Checked
from common.evaluation.steps import Outcomes
from common.results.schema import AuditCheck, AuditResult


def with_findings(
    audit: AuditResult | None, outcomes: Outcomes, checked: Checked | None = None
) -> AuditResult | None:
    """An audit with what else makes the figures untrustworthy; without an audit that alone.

    Args:
        audit: What an audit found.
        outcomes: Of the evaluation.
        checked: What was known of the model before it.
    """
    state = checked.state if checked is not None else ""
    if not state and outcomes.depends_on_history:
        state = "the scores for the same images changed while the model was attacked"
    checks: list[AuditCheck] = []
    if state:
        question = "Predictions should not depend on earlier calls."
        checks.append(_failed("state", question, f"But {state}."))
    if audit is not None and checked is not None and not checked.has_gradient:
        detail = "It has none, so attacks that follow it say nothing about robustness."
        checks.append(_failed("gradient", "The model should have a gradient.", detail))
    if not checks:
        return audit
    examples = len(outcomes.y) if audit is None else audit["examples"]
    return {"examples": examples, "checks": [*checks, *(audit["checks"] if audit else [])]}


def _failed(name: str, question: str, detail: str) -> AuditCheck:
    return {
        "id": name,
        "question": question,
        "value": None,
        "threshold": None,
        "verdict": "fail",
        "detail": detail,
    }
