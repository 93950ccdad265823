r"""An upper bound of a WideResNet's Lipschitz constant in l2, and the ratio measured on images.

The paper explains its rule through the Lipschitz constant; its theorem was not found. This bound is
our reconstruction [R]: the product over stem, blocks and head of

- block: :math:`\sigma(sc) + \sigma(conv_2)\, g_2\, \sigma(conv_1)\, g_1`, where
  :math:`\sigma` is the operator norm of a convolution at its real spatial size,
  :math:`g = \max_c |\gamma_c| / \sqrt{v_c + \epsilon}` that of the batch-norm in front, and
  :math:`\sigma(sc)` is 1 for the identity, :math:`\sigma(shortcut)\, g_1` where the shortcut reads
  the activated tensor, :math:`\sigma(shortcut)` where it reads the raw one;
- head: :math:`g\, \sigma(fc) / \sqrt{hw}`, the last factor from the average over h x w positions.

The constant of a rectifier is 1.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from common.attacks.pgd import PGD
from common.attacks.randomness import ExampleRandom, Stream
from common.errors import ConfigurationError
from common.evaluation.measures import AttackMeasure
from common.modes import frozen
from common.networks.wide_resnet import WideResNet
from common.objectives import Batch
from common.results.lines import Columns

SLACK = 1e-4
"""Relative; power iteration approaches an operator norm from below."""


def operator_norm(linear: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> float:
    """Largest l2 stretch of a linear map of ``(1, *shape)``, by power iteration in float64."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(1, *shape, generator=generator, dtype=torch.float64)
    size = torch.tensor(0.0, dtype=torch.float64)
    with torch.enable_grad():
        for _ in range(1000):
            v = (v / v.norm()).detach().requires_grad_()
            out = linear(v)
            (back,) = torch.autograd.grad(out, v, out.detach())
            before, size = size, out.detach().norm()
            v = back
            if (size - before).abs() <= 1e-8 * size:
                break
    return size.item() * (1.0 + SLACK)


def batch_norm_gain(norm: nn.BatchNorm2d) -> float:
    """Largest factor of a batch-norm in evaluation mode.

    Raises:
        ConfigurationError: If it keeps no running statistics.
    """
    if norm.running_var is None:
        raise ConfigurationError("the bound needs batch-norm with running statistics")
    scale = torch.ones_like(norm.running_var) if norm.weight is None else norm.weight.detach()
    return float((scale.abs() / (norm.running_var + norm.eps).sqrt()).max())


def upper_bound(net: WideResNet, shape: tuple[int, ...]) -> dict[str, float]:
    """``stem``, ``stage1``, ..., ``head`` of the bound, and their product ``total``.

    Args:
        net: A network in evaluation mode.
        shape: Of an image, ``(C, H, W)``.

    Raises:
        ConfigurationError: If the network has other activations or another stem.
    """
    for module in net.modules():
        if isinstance(module, nn.SiLU | nn.GELU | nn.Mish | nn.PReLU | nn.MaxPool2d):
            raise ConfigurationError(
                "the bound knows convolutions, batch-norm and ReLU, the network has "
                f"{type(module).__name__}"
            )
    if not isinstance(net.stem, nn.Conv2d):
        raise ConfigurationError("the bound needs the stem of CIFAR networks: one convolution")
    std = net.normalize.std
    factors = {"stem": _gain(net.stem, shape) / (1.0 if std is None else float(std.min()))}
    at = _shape_after(net.stem, shape)
    stages: Any = net.stages
    for number, stage in enumerate(stages, start=1):
        factor = 1.0
        for block in stage:
            inside, g1 = _shape_after(block.conv1, at), batch_norm_gain(block.bn1)
            branch = _gain(block.conv2, inside) * batch_norm_gain(block.bn2)
            branch *= _gain(block.conv1, at) * g1
            skip = _gain(block.shortcut, at) * (g1 if block.changes_width else 1.0)
            factor *= skip + branch
            at = inside
        factors[f"stage{number}"] = factor
    head: Any = net.head
    sigma = float(torch.linalg.matrix_norm(head.linear.weight.detach().double(), 2))
    factors["head"] = batch_norm_gain(head.norm) * sigma / math.sqrt(at[1] * at[2])
    return factors | {"total": math.prod(factors.values())}


def _gain(layer: nn.Module, shape: tuple[int, ...]) -> float:
    if isinstance(layer, nn.Identity):
        return 1.0
    return operator_norm(copy.deepcopy(layer).double().cpu(), shape)


def _shape_after(conv: nn.Conv2d, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(copy.deepcopy(conv).to("meta")(torch.empty(1, *shape, device="meta")).shape[1:])


class L2Ratio(AttackMeasure):
    r"""``l2_ratio``, :math:`\|f(x) - f(x')\|_2 / \|x - x'\|_2`, which is at most the bound."""

    def __call__(self, model: Any, batch: Batch, random: ExampleRandom) -> Columns:
        """``l2_ratio`` ``(N,)``; 0 where x' is x."""
        x, x_adv = batch["x"], self.attacked(model, batch, random)
        with torch.no_grad():
            moved = (model(x) - model(x_adv)).norm(dim=1)
        distance = (x - x_adv).flatten(1).norm(dim=1)
        return {"l2_ratio": torch.where(distance > 0, moved / distance.clamp_min(1e-12), 0.0)}


def lipschitz_of(model: Any, x: Tensor, y: Tensor, attack: PGD) -> dict[str, float]:
    """The bound, and the largest and the mean ratio on images ``x``, of a trained classifier."""
    batch = {"x": x, "y": y, "index": torch.arange(len(y))}
    random = ExampleRandom(0, 0, batch["index"], Stream.EVALUATION)
    with frozen(model, "eval"):
        ratios = L2Ratio(attack)(model, batch, random)["l2_ratio"]
        bound = upper_bound(model.net, tuple(x.shape[1:]))
    return {
        "bound": bound.pop("total"),
        "largest": ratios.max().item(),
        "mean": ratios.mean().item(),
        **{f"bound_{part}": value for part, value in bound.items()},
    }
