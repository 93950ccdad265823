"""DAJAT, a defence with three views of every image: its views, its attack and its loss [code].

Addepalli et al. 2022, "Efficient and effective augmentation strategy for adversarial training", as
the official code of RCM has it. Each image has a plain view (``base``) and two views under
AutoAugment (``auto``). The two kinds use separate batch-norms, each view has a TRADES loss, and the
clean predictions of the views are drawn together. Tags as in :mod:`paper_rcm.method`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from common.attacks.losses import full_precision, kl_divergence
from common.attacks.pgd import PGD
from common.attacks.randomness import ExampleRandom
from common.data.images import Views
from common.errors import ConfigurationError
from common.objectives import Batch, Objective, adversarial_images, check_weight, differentiable
from paper_rcm.networks import Branch, branch


class AutoAugmentViews(Views):
    """Versions of each image under AutoAugment's policy for CIFAR-10 (Cubuk et al. 2019) [code].

    The policy is torchvision's [choice], applied to bytes on the CPU, image by image, so that a
    version depends on seed, epoch and image only. Crop and flip are drawn for each view [choice].

    Args:
        count: Number of versions.

    Raises:
        ConfigurationError: If ``count`` is below 1.
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
        seeds = random.integers(2**31, (self.count,)).T.tolist()
        with torch.random.fork_rng(devices=()):
            return [
                torch.stack(list(map(self._augmented, x.cpu(), column))).to(x.device)
                for column in seeds
            ]

    def _augmented(self, image: Tensor, seed: int) -> Tensor:
        torch.default_generator.manual_seed(seed)
        version: Tensor = self._policy(image)
        return version


class GrowingPGD(PGD):
    r"""Five steps in a ball that grows linearly, from the unclamped start of TRADES [code].

    In epoch e, from 1, of E the radius is :math:`\epsilon e / E` and the step half of it. The
    released code always takes 5 steps, since it overwrites its other settings [measured].

    Args:
        eps: Radius of the last epoch.
        epochs: E, the value of ``trainer.max_epochs``.
        steps: Number of steps.
        start_scale: Standard deviation of the Gaussian start.

    Raises:
        ConfigurationError: If a setting is out of range.
    """

    def __init__(
        self, eps: float | str, epochs: int = 200, steps: int = 5, start_scale: float | str = 0.001
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

    with :math:`p_v, p'_v` the predictions for the clean and the adversarial view in its branch. The
    V views come from ``data.views``, :class:`AutoAugmentViews`; JS is :func:`jensen_shannon`.

    Args:
        beta: Weight of the divergence of each view; 11 for ResNet-18, 10 for WRN on CIFAR-10.
        js_weight: w; 2 for ResNet-18, 3 for WRN on CIFAR-10.
        label_smoothing: Of the cross-entropy; 0.1 on CIFAR-100 only.

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
            targets = _in_branches(model, names, differentiable(batch["x"]))
        return lambda x: kl_divergence(targets, _in_branches(model, names, x))

    def outer(self, model: Any, batch: Batch) -> Tensor:
        """The loss above; gradients reach clean and adversarial predictions."""
        clean, losses = [], []
        for name, x, x_adv, y in _views(batch):
            with branch(model, name):
                clean.append(model(x))
                losses.append(self._view_loss(clean[-1], model(x_adv), y))
        return torch.stack(losses).mean() + self.js_weight * jensen_shannon(clean).mean()

    def weight_loss(self, model: Any, batch: Batch) -> Tensor:
        """What adversarial weight perturbation maximises: the part of the base view [code]."""
        name, x, x_adv, y = _views(batch)[0]
        with branch(model, name):
            return self._view_loss(model(x), model(x_adv), y)

    def _view_loss(self, logits: Tensor, logits_adv: Tensor, y: Tensor) -> Tensor:
        smoothed = F.cross_entropy(full_precision(logits), y, label_smoothing=self.label_smoothing)
        return smoothed + self.beta * kl_divergence(logits, logits_adv).mean()


def branches(batch: Batch) -> list[Branch]:
    """The branch of each view: base for the images themselves, auto for their other versions."""
    views = int(batch["view"].max()) + 1 if "view" in batch else 1
    return ["base", *["auto"] * (views - 1)]  # type: ignore[list-item]


def jensen_shannon(logits: list[Tensor]) -> Tensor:
    """Mean KL ``(N,)`` of views' predictions ``(N, K)`` from their clamped mean [code]."""
    log_p = torch.stack([full_precision(z).log_softmax(dim=1) for z in logits])
    p = log_p.exp()
    log_m = p.mean(dim=0).clamp(1e-7, 1.0).log()
    divergence: Tensor = (p * (log_p - log_m)).sum(dim=2).mean(dim=0)
    return divergence


def _views(batch: Batch) -> list[tuple[Branch, Tensor, Tensor, Tensor]]:
    """Branch, images, adversarial images and labels of each view; refuse a batch without views."""
    if "view" not in batch:
        raise ConfigurationError(
            "the batch has no views, which DAJAT compares; set data.views to "
            "paper_rcm.objectives.AutoAugmentViews"
        )
    names = branches(batch)
    parts = (batch["x"], adversarial_images(batch), batch["y"])
    return list(zip(names, *(part.chunk(len(names)) for part in parts), strict=True))


def _in_branches(model: Any, names: list[Branch], x: Tensor) -> Tensor:
    """Logits of all views, ``(V N, K)``, each through its branch."""
    found = []
    for name, part in zip(names, x.chunk(len(names)), strict=True):
        with branch(model, name):
            found.append(model(part))
    return torch.cat(found)
