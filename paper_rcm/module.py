"""The LightningModule of RCM, and the losses of adaptive attacks on it."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from common.attacks.losses import label_loss
from common.classifier import RobustClassifier
from common.networks.resnet import ResNet
from common.objectives import Batch, InnerLoss, differentiable
from paper_rcm.method import EnlargedNetwork


class RCMClassifier(RobustClassifier):
    """A classifier whose network may see its input enlarged.

    The paper's specially designed attacks were not found; there are two of ours instead [choice].
    """

    def adaptive_losses(self) -> dict[str, InnerLoss]:
        """The usual ones, and where the network has them ``feature`` and ``ce_strides``."""
        losses = super().adaptive_losses()
        if isinstance(self.net, EnlargedNetwork):
            losses["feature"] = feature_distance
            if isinstance(self.net.arch, ResNet):
                losses["ce_strides"] = other_strides
        return losses


def feature_distance(model: Any, batch: Batch) -> Callable[[Tensor], Tensor]:
    """X' -> squared l2 distance of the pooled features of x' and x, ``(N,)``; no labels."""
    with torch.no_grad():
        clean = differentiable(model.net.pooled(batch["x"]))
    return lambda x: (model.net.pooled(x) - clean).square().sum(dim=1)


def other_strides(model: Any, batch: Batch) -> Callable[[Tensor], Tensor]:
    """X' -> cross-entropy of the twin with other strides, ``(N,)``: a stride-transfer attack."""
    return label_loss(with_other_strides(model.net), differentiable(batch["y"]))


def with_other_strides(net: EnlargedNetwork) -> EnlargedNetwork:
    """The same weights with the second stage's stride changed from 2 to 1 or from 1 to 2.

    These are the two networks of the paper's comparison, 1222 and 1122: their state dicts fit each
    other [measured].
    """
    twin = copy.deepcopy(net).eval()
    block = twin.arch.stages[1][0]
    for module in block.modules():
        if isinstance(module, nn.Conv2d) and (
            module is block.conv1 or module.kernel_size == (1, 1)
        ):
            side = 1 if module.stride[0] == 2 else 2
            module.stride = (side, side)
    return twin
