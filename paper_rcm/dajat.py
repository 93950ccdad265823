"""DAJAT, the defence that needs more than an objective: three views of every image [code].

Addepalli et al. 2022, "Efficient and effective augmentation strategy for adversarial training", as
the official code of RCM had it. Every image is seen three times, once plainly ('base') and twice
under AutoAugment ('auto'); the two kinds go through their own batch-norm; every view has its TRADES
loss, and the views' clean predictions are drawn together.

Tags as in :mod:`paper_rcm.method`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2

from common.attacks.losses import full_precision, kl_divergence
from common.attacks.pgd import PGD
from common.attacks.randomness import ExampleRandom
from common.data.images import Views
from common.errors import ConfigurationError, check_choice
from common.networks.resnet import ResNet18
from common.objectives import (
    Batch,
    Objective,
    adversarial_images,
    check_weight,
    differentiable,
)

Branch = Literal["base", "auto"]

# -------------------------------------------------------------------------------------- the views


class AutoAugmentViews(Views):
    """Versions of each image under the policy that AutoAugment found for CIFAR-10 [code].

    Cubuk et al. 2019; the policy as torchvision has it, which fills with black [choice]. It works
    on bytes and on the CPU, one image after the other, so that a version depends on seed, epoch and
    image alone. Crop and flip come after it and are drawn for each view by itself [choice].

    Args:
        count: How many versions.

    Raises:
        ConfigurationError: If there is to be none.
    """

    def __init__(self, count: int = 2) -> None:
        if count < 1:
            raise ConfigurationError(
                f"data.views.count must be at least 1, got {count}; for no other versions set "
                "data.views: null"
            )
        self.count = count
        self._policy = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)

    def __call__(self, x: Tensor, random: ExampleRandom) -> list[Tensor]:
        """See :class:`~common.data.images.Views`."""
        seeds = random.integers(2**31, (self.count,)).tolist()
        images = x.cpu()
        versions: list[list[Tensor]] = [[] for _ in range(self.count)]
        with torch.random.fork_rng(devices=()):
            for image, row in zip(images, seeds, strict=True):
                for version, seed in zip(versions, row, strict=True):
                    torch.default_generator.manual_seed(seed)
                    version.append(self._policy(image))
        return [torch.stack(version).to(x.device) for version in versions]


# ------------------------------------------------------------------------------------ the network


class SplitBatchNorm2d(nn.Module):
    """Two batch-norms of which one is used at a time: statistics and affine weights apart [code].

    Args:
        norm: What both are copies of.
    """

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.base = norm
        # Made anew and not copied: it must not share weights that were shared before.
        self.auto = nn.BatchNorm2d(
            norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats
        )
        self.auto.load_state_dict(norm.state_dict())
        self.branch: Branch = "base"

    def forward(self, x: Tensor) -> Tensor:
        """The batch-norm of the present branch."""
        out: Tensor = self.base(x) if self.branch == "base" else self.auto(x)
        return out

    def extra_repr(self) -> str:
        """The present branch, for ``print(net)``."""
        return f"branch={self.branch}"


def split_batch_norm(module: nn.Module) -> None:
    """Put a :class:`SplitBatchNorm2d` in the place of every batch-norm below ``module``."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, SplitBatchNorm2d(child))
        elif not isinstance(child, SplitBatchNorm2d):
            split_batch_norm(child)


@contextmanager
def branch(model: nn.Module, name: Branch) -> Iterator[None]:
    """Send images through the batch-norms of one branch for the time being; afterwards, base.

    Raises:
        ConfigurationError: If ``model`` has no batch-norm with branches, or there is no such one.
    """
    check_choice("branch", name, Branch)
    norms = [module for module in model.modules() if isinstance(module, SplitBatchNorm2d)]
    if not norms:
        raise ConfigurationError(
            f"{type(model).__name__} has no batch-norm of two branches, which DAJAT needs; take "
            "paper_rcm.dajat.SplitResNet18 as arch, or make them with split_batch_norm"
        )
    try:
        for norm in norms:
            norm.branch = name
        yield
    finally:
        for norm in norms:
            norm.branch = "base"


class SplitResNet18(ResNet18):
    """ResNet-18 with two copies of every batch-norm, 11,183,562 parameters [measured].

    The released one ends with a 4x4 pooling and cannot take the strides 1122 at all [measured];
    this one pools globally, which at 1222 is the same.

    Args:
        **kwargs: Of :class:`~common.networks.resnet.ResNet`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        split_batch_norm(self)


# ------------------------------------------------------------------------- attack and objective


class GrowingPGD(PGD):
    r"""Five steps in a ball that grows linearly, from the unclamped start of TRADES [code].

    In epoch e, from 1, of E the radius is :math:`\epsilon e / E` and the step half of it. The
    released code means to take 2, then 3, then 4 steps, but overwrites each choice: in effect there
    are always 5 [measured].

    Args:
        eps: Radius of the last epoch.
        epochs: E, what ``trainer.max_epochs`` has.
        steps: Number of steps.
        start_scale: Standard deviation of the Gaussian start.

    Raises:
        ConfigurationError: If a setting is out of range.
    """

    def __init__(
        self,
        eps: float | str,
        epochs: int = 200,
        steps: int = 5,
        start_scale: float | str = 0.001,
    ) -> None:
        if epochs < 1:
            raise ConfigurationError(
                f"epochs must be at least 1, got {epochs}; give what trainer.max_epochs has"
            )
        super().__init__(
            eps, "eps/2", steps, "gaussian", start_scale=start_scale, project_start=False
        )
        self.largest = self.eps
        self.epochs = epochs
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Take the radius of this epoch, counted from 0."""
        self.eps = self.largest * min(epoch + 1, self.epochs) / self.epochs
        self.step_size = self.eps / 2


class DAJAT(Objective):
    r"""Diverse augmentation-based joint adversarial training [code].

    .. math:: \frac{1}{V} \sum_v \left[ CE(f_v(x_v), y) + \beta KL(p_v \| p'_v) \right] +
              w \, JS(p_1, ..., p_V)

    with V views, :math:`p_v, p'_v` the predictions of clean and adversarial view in its own branch,
    and :math:`JS = \frac{1}{V} \sum_v KL(p_v \| m)`, m the mean of the clean predictions.

    Batches come with views: ``data.views`` is :class:`AutoAugmentViews`.

    Args:
        beta: Weight of the divergence of each view; 11 for ResNet-18, 10 for WRN on CIFAR-10.
        js_weight: w; 2 for ResNet-18, 3 for WRN on CIFAR-10.
        label_smoothing: Of the cross-entropy; 0.1 for CIFAR-100 alone.

    Raises:
        ConfigurationError: If a weight is negative or not finite, or the smoothing not in [0, 1).
    """

    def __init__(
        self, beta: float = 11.0, js_weight: float = 2.0, label_smoothing: float = 0.0
    ) -> None:
        self.beta = check_weight("beta", beta)
        self.js_weight = check_weight("js_weight", js_weight)
        if not 0.0 <= label_smoothing < 1.0:
            raise ConfigurationError(
                f"label_smoothing must lie in [0, 1), got {label_smoothing}; 0 is none"
            )
        self.label_smoothing = label_smoothing

    def inner(self, model: Any, batch: Batch) -> Callable[[Tensor], Tensor]:
        """KL(f(x) || f(x')), every view in its branch; base alone for batches without views."""
        names = branches(batch)
        with torch.inference_mode(False), torch.no_grad():
            targets = in_branches(model, names, differentiable(batch["x"]))
        return lambda x: kl_divergence(targets, in_branches(model, names, x))

    def outer(self, model: Any, batch: Batch) -> Tensor:
        """The loss above; gradients reach clean and adversarial predictions."""
        check_views(batch)
        names = branches(batch)
        parts = [x.chunk(len(names)) for x in (batch["x"], adversarial_images(batch), batch["y"])]
        clean: list[Tensor] = []
        attacked: list[Tensor] = []
        losses: list[Tensor] = []
        for name, x, x_adv, y in zip(names, *parts, strict=True):
            with branch(model, name):
                clean.append(model(x))
                attacked.append(model(x_adv))
            losses.append(self._view_loss(clean[-1], attacked[-1], y))
        return torch.stack(losses).mean() + self.js_weight * jensen_shannon(clean).mean()

    def weight_loss(self, model: Any, batch: Batch) -> Tensor:
        """What adversarial weight perturbation climbs: the base view's part alone [code]."""
        check_views(batch)
        views = len(branches(batch))
        parts = (batch["x"], adversarial_images(batch), batch["y"])
        x, x_adv, y = (part.chunk(views)[0] for part in parts)
        with branch(model, "base"):
            return self._view_loss(model(x), model(x_adv), y)

    def _view_loss(self, logits: Tensor, logits_adv: Tensor, y: Tensor) -> Tensor:
        smoothed = F.cross_entropy(full_precision(logits), y, label_smoothing=self.label_smoothing)
        return smoothed + self.beta * kl_divergence(logits, logits_adv).mean()


def branches(batch: Batch) -> list[Branch]:
    """The branch of each view: base for the images themselves, auto for their other versions."""
    views = int(batch["view"].max()) + 1 if "view" in batch else 1
    return ["base", *(["auto"] * (views - 1))]  # type: ignore[list-item]


def check_views(batch: Batch) -> None:
    """Make sure that the batch has views.

    Raises:
        ConfigurationError: If it has none.
    """
    if "view" not in batch:
        raise ConfigurationError(
            "the batch has no views, which DAJAT compares; set data.views to "
            "paper_rcm.dajat.AutoAugmentViews"
        )


def in_branches(model: Any, names: list[Branch], x: Tensor) -> Tensor:
    """Logits of all views, ``(V N, K)``, each through its branch."""
    for name in names:
        check_choice("branch", name, Branch)
    found = []
    for name, part in zip(names, x.chunk(len(names)), strict=True):
        with branch(model, name):
            found.append(model(part))
    return torch.cat(found)


def jensen_shannon(logits: list[Tensor]) -> Tensor:
    """Mean divergence of each prediction from the mean of all, ``(N,)``.

    The mean is clamped to [1e-7, 1] before the logarithm [code].

    Args:
        logits: One ``(N, K)`` per view.
    """
    log_p = [full_precision(z).log_softmax(dim=1) for z in logits]
    p = torch.stack(log_p).exp()
    log_m = p.mean(dim=0).clamp(1e-7, 1.0).log()
    divergence: Tensor = (p * (torch.stack(log_p) - log_m)).sum(dim=2).mean(dim=0)
    return divergence
