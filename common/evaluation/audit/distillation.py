"""A transfer attack for models without a surrogate: one is distilled from their labels."""

from typing import Any

import torch
from torch import Tensor, nn

from common.attacks.losses import cross_entropy
from common.attacks.pgd import PGD
from common.attacks.randomness import ExampleRandom
from common.attacks.settings import Settings
from common.evaluation.steps import Columns, predict
from common.evaluation.transfer import Transfer
from common.objectives import Batch

NOISY, MIXED = 4, 4
"""Copies of each image: with noise, and blended with another image."""
SIDE = 32
"""Larger images are averaged down to this by the surrogate."""


class DistilledTransfer(Settings):
    """Attacks a small network that was trained on the model's own labels (Papernot et al. 2017).

    The labels are those for the images to be attacked and for perturbed copies of them. All images
    of a call train the surrogate, so that a call has to get all of them. Weights, copies and the
    order of training come from torch's generator.

    Args:
        attack: The ascent on the surrogate.
        steps: Of training, 64 images each.
    """

    def __init__(self, attack: PGD, steps: int = 150) -> None:
        self.attack = attack
        self.steps = steps

    def run(self, model: Any, batch: Batch, random: ExampleRandom) -> Columns:
        """Train the surrogate, make the images on it and judge them by the model."""
        radius = self.attack.eps
        if self.attack.norm != "linf":
            radius /= batch["x"][0].numel() ** (0.5 if self.attack.norm == "l2" else 1.0)
        with torch.inference_mode(False), torch.enable_grad():
            surrogate = distilled(model, batch["x"].detach().clone(), radius, self.steps)
        return Transfer(self.attack, surrogate, "margin").run(model, batch, random)


def distilled(model: Any, x: Tensor, radius: float, steps: int) -> nn.Module:
    """A network trained on the labels that a model gives to images and to copies of them.

    Args:
        model: Images to logits.
        x: Images ``(N, C, H, W)`` in [0, 1].
        radius: Size of the attack's perturbation per pixel; noise is up to four times as large.
        steps: Of training.
    """
    with torch.no_grad():
        classes = model(x[:1]).shape[1]
    images = [x]
    for _ in range(NOISY):
        size = 4.0 * radius * torch.rand(len(x), 1, 1, 1)
        images.append((x + ((2.0 * torch.rand(x.shape) - 1.0) * size).to(x)).clamp(0.0, 1.0))
    for _ in range(MIXED):
        share = torch.rand(len(x), 1, 1, 1).to(x) / 2.0
        images.append(x + share * (x[torch.randperm(len(x)).to(x.device)] - x))
    labels = torch.cat([predict(model, part) for part in images])
    pool = torch.cat(images)
    network = _network(x.shape[1], max(x.shape[2:]), classes).to(x.device)
    optimiser = torch.optim.Adam(network.parameters(), 2e-3)
    for _ in range(steps):
        rows = torch.randint(len(pool), (64,)).to(x.device)
        optimiser.zero_grad()
        loss = cross_entropy(network(pool[rows]), labels[rows]).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return network.eval()


def _network(channels: int, side: int, classes: int) -> nn.Sequential:
    shrink: nn.Module = nn.AdaptiveAvgPool2d(SIDE) if side > SIDE else nn.Identity()
    return nn.Sequential(
        shrink,
        nn.Conv2d(channels, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(512, classes),
    )
