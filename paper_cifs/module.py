"""The classifier: masks for TensorBoard."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

from torch import Tensor

from common.classifier import RobustClassifier
from common.objectives import Batch
from paper_cifs.method import ChannelSelection, autocast_off


class CIFSClassifier(RobustClassifier):
    """A classifier whose network may have channel selections; without them it is a plain one."""

    def log_histograms(self, add: Callable[[str, Tensor], None], batch: Batch) -> None:
        """Hand the channel masks on clean and adversarial images to TensorBoard."""

        def tell(
            name: str,
            selection: ChannelSelection,
            args: tuple[Tensor, ...],
            output: tuple[Tensor, ...],
        ) -> None:
            p = output[1]  # masked / unmasked feature would be undefined where channels are 0
            with autocast_off(p):
                add(name, selection.multiplier(args[0].to(p.dtype), p, None))

        for kind in (kind for kind in ("x", "x_adv") if kind in batch):
            with ExitStack() as hooks:
                for name, module in self.net.named_modules():
                    if isinstance(module, ChannelSelection):
                        hook = partial(tell, f"masks/{name}/{kind}")
                        hooks.enter_context(module.register_forward_hook(hook))
                self(batch[kind])
