"""The classifier: loads teachers before training, and shows the route in TensorBoard."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from common.classifier import RobustClassifier
from common.networks.parts import ADVERSARIAL
from common.objectives import Batch
from paper_awnet.networks import AWNet
from paper_awnet.objectives import PairedObjective


class AWNetClassifier(RobustClassifier):
    """A classifier whose network may be an AW-Net and whose objective may have teachers."""

    def setup(self, stage: str) -> None:
        """Also read the teachers, if there are any, before training."""
        super().setup(stage)
        data = getattr(self.trainer, "datamodule", None)
        if stage == "fit" and isinstance(self.objective, PairedObjective) and data is not None:
            for teacher in self.objective.teachers.values():
                teacher.load(Path(self.trainer.default_root_dir), data.shape, data.num_classes)

    def log_histograms(self, add: Callable[[str, Tensor], None], batch: Batch) -> None:
        """Hand P_type and the signals on clean and adversarial images to TensorBoard."""
        if not isinstance(self.net, AWNet):
            return
        for kind in ("x", "x_adv"):
            if kind in batch:
                outputs = self.net.outputs(batch[kind])
                add(f"p_adv/{kind}", outputs.p[:, ADVERSARIAL])
                for j, omega in enumerate(outputs.signals, 1):
                    add(f"omega{j}/{kind}", omega)
