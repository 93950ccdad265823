"""How CIFS meets training: logits for everybody, probes for the losses, masks for TensorBoard."""

from collections.abc import Callable

from torch import Tensor

from common.classifier import InnerLoss, RobustClassifier
from common.objectives import Batch
from paper_cifs.method import ChannelSelection, adaptive_losses, joint_logits


class CIFSClassifier(RobustClassifier):
    """A classifier whose network may return raw logits of probes beside its logits.

    Plain networks fit too: they have no probes, and every loss falls back to the logits.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Final logits f, ``(N, K)``, of images ``(N, C, H, W)`` in [0, 1]."""
        return joint_logits(self, x)[0]

    def adaptive_losses(self) -> dict[str, InnerLoss]:
        """Losses on f, on each probe, on all joint weights, and through the un-detached mask."""
        return adaptive_losses(self)

    def log_histograms(self, add: Callable[[str, Tensor], None], batch: Batch) -> None:
        """Hand the channel masks on clean and adversarial images to TensorBoard."""
        selections = {
            name: module
            for name, module in self.net.named_modules()
            if isinstance(module, ChannelSelection)
        }
        for kind in ("x", "x_adv"):
            if kind not in batch:
                continue
            masks: dict[str, Tensor] = {}
            handles = [
                module.register_forward_hook(
                    lambda _, args, output, name=name: masks.update(
                        {name: output[0].sum(dim=(2, 3)) / args[0].sum(dim=(2, 3)).clamp(min=1e-12)}
                    )
                )
                for name, module in selections.items()
            ]
            try:
                self(batch[kind])
            finally:
                for handle in handles:
                    handle.remove()
            for name, mask in masks.items():
                add(f"masks/{name}/{kind}", mask)
