"""Robustness one can trust: suites of attacks, worst cases, the audit, for any PyTorch model."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from common.evaluation.audit.checks import Audit
    from common.evaluation.metric import RobustAccuracy
    from common.evaluation.pipeline import evaluate
    from common.evaluation.presets import load_suite
    from common.evaluation.report import Evaluation
    from common.evaluation.saved import SavedExamples, load_examples
    from common.evaluation.steps import is_wrong, predict
    from common.evaluation.suite import SuiteEntry, check_suite, resolve_losses
    from common.evaluation.transfer import Transfer
    from common.results.lines import Outcomes, Threat

_HOMES = {
    "Audit": "common.evaluation.audit.checks",
    "Evaluation": "common.evaluation.report",
    "Outcomes": "common.results.lines",
    "RobustAccuracy": "common.evaluation.metric",
    "SavedExamples": "common.evaluation.saved",
    "SuiteEntry": "common.evaluation.suite",
    "Threat": "common.results.lines",
    "Transfer": "common.evaluation.transfer",
    "check_suite": "common.evaluation.suite",
    "evaluate": "common.evaluation.pipeline",
    "is_wrong": "common.evaluation.steps",
    "load_examples": "common.evaluation.saved",
    "load_suite": "common.evaluation.presets",
    "predict": "common.evaluation.steps",
    "resolve_losses": "common.evaluation.suite",
}
__all__ = [
    "Audit",
    "Evaluation",
    "Outcomes",
    "RobustAccuracy",
    "SavedExamples",
    "SuiteEntry",
    "Threat",
    "Transfer",
    "check_suite",
    "evaluate",
    "is_wrong",
    "load_examples",
    "load_suite",
    "predict",
    "resolve_losses",
]


def __getattr__(name: str) -> Any:
    """Import what is asked for: torch takes seconds, which help and errors need not."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
