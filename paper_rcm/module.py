"""The LightningModule of RCM."""

from common.classifier import RobustClassifier


class RCMClassifier(RobustClassifier):
    """A classifier of the paper's experiments; its network declares its adaptive losses."""
