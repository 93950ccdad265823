"""Robustness one can trust: suites of attacks, worst cases, the audit, for any PyTorch model."""

from common.evaluation.audit.checks import Audit
from common.evaluation.evaluate import evaluate
from common.evaluation.report import Evaluation
from common.evaluation.saved import SavedExamples, load_examples
from common.evaluation.steps import is_wrong, predict
from common.evaluation.suite import SuiteEntry, check_suite, resolve_losses
from common.evaluation.transfer import Transfer
from common.results.lines import Outcomes, Threat

__all__ = [
    "Audit",
    "Evaluation",
    "Outcomes",
    "SavedExamples",
    "SuiteEntry",
    "Threat",
    "Transfer",
    "check_suite",
    "evaluate",
    "is_wrong",
    "load_examples",
    "predict",
    "resolve_losses",
]
