"""Whether a robustness figure may come from the attacks' failure: the gradient-masking audit."""

from common.evaluation.audit.checks import Audit

__all__ = ["Audit"]
