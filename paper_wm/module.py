"""The LightningModule of WM: maps for TensorBoard."""

from collections.abc import Callable

from torch import Tensor

from common.classifier import RobustClassifier
from common.objectives import Batch
from paper_wm.method import weight_maps


class WeightMapClassifier(RobustClassifier):
    """A classifier whose network may have weight maps in it."""

    def log_histograms(self, add: Callable[[str, Tensor], None], batch: Batch) -> None:
        """Hand the values of the maps to TensorBoard."""
        for name, weight_map in weight_maps(self).items():
            add(f"maps/{name}", weight_map.map.detach())
