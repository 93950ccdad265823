"""Transfer attacks: images made on another model, which is given or distilled from labels."""

from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from common.attacks.losses import classify, cross_entropy, hinge_margin
from common.attacks.pgd import PGD
from common.attacks.randomness import ExampleRandom
from common.attacks.settings import Settings
from common.errors import CheckpointError, ConfigurationError, check_choice
from common.evaluation.models import load_run
from common.evaluation.steps import judged, predict
from common.modes import frozen
from common.objectives import Batch
from common.results.lines import Columns, Threat
from common.results.provenance import weights_digest

TransferLoss = Literal["cross_entropy", "margin"]

NOISY, MIXED = 4, 4
"""Copies of each image that a surrogate is distilled from: with noise, and blended with another."""
SIDE = 32
"""Larger images are averaged down to this by a distilled surrogate."""

LOSSES = {"cross_entropy": cross_entropy, "margin": hinge_margin}


class Transfer(Settings):
    """Climbs a loss of a surrogate and shows the result to the model (black box).

    Args:
        attack: The ascent on the surrogate.
        surrogate: A checkpoint in the directory of a finished run
            (``runs/paper_x/experiment/seed0/checkpoints/last.ckpt``), or a network: images in
            [0, 1] to logits. It must know the same classes.
        loss: What is climbed on it: ``cross_entropy``, or the ``margin`` with its ceiling.

    Raises:
        ConfigurationError: If the surrogate is a path that does not end in ``.ckpt``, or the loss
            is another.
        CheckpointError: On first use, if there is no such checkpoint.
    """

    def __init__(
        self, attack: PGD, surrogate: str | nn.Module, loss: TransferLoss = "cross_entropy"
    ) -> None:
        check_choice("loss", loss, TransferLoss)
        if isinstance(surrogate, str) and not surrogate.endswith(".ckpt"):
            raise ConfigurationError(
                f"surrogate must be a checkpoint, RUN/checkpoints/last.ckpt, got {surrogate!r}"
            )
        self.attack = attack
        self.norm, self.eps = attack.norm, attack.eps
        self.reach = attack.reach
        self.surrogate = surrogate
        self.loss: TransferLoss = loss

    @cached_property
    def network(self) -> nn.Module:
        """The surrogate, loaded once."""
        if isinstance(self.surrogate, nn.Module):
            return self.surrogate
        path = Path(self.surrogate)
        run = path.parent.parent
        if not path.is_file() or not (run / "config.yaml").is_file():
            raise CheckpointError(
                f"the surrogate {path} is not there, or {run} is not the directory of a run (no "
                "config.yaml); train it first"
            )
        return load_run(run, path.stem)[0]

    def settings(self) -> dict[str, Any]:
        """With a digest of the surrogate's weights in its place."""
        return super().settings() | {"surrogate": weights_digest(self.network.state_dict())}

    def run(self, model: Any, batch: Batch, random: ExampleRandom) -> Columns:
        """Make the images on the surrogate and judge them by the model."""
        network = self.network.to(batch["x"].device)
        with frozen(network, "eval"):
            x_adv = self.attack(
                lambda x: LOSSES[self.loss](network(x), batch["y"]),
                batch["x"],
                random,
                is_adversarial=lambda x: classify(network(x)) != batch["y"],
            )
        return judged(model, batch, x_adv, Threat(self.norm, self.eps), idle=self.attack.idle)


class DistilledTransfer(Settings):
    """Attacks a small network that was trained on the model's own labels (Papernot et al. 2017).

    The labels are those of the images to be attacked and of perturbed copies. All images of a call
    train the surrogate, so a call has to get all of them. Weights, copies and the order of training
    come from torch's generator.

    Args:
        attack: The ascent on the surrogate.
        steps: Of training, 64 images each.
    """

    def __init__(self, attack: PGD, steps: int = 150) -> None:
        self.attack = attack
        self.steps = steps

    def run(self, model: Any, batch: Batch, random: ExampleRandom) -> Columns:
        """Train the surrogate, make the images on it and judge them by the model."""
        radius = Threat(self.attack.norm, self.attack.eps).per_pixel(batch["x"])
        with torch.inference_mode(False), torch.enable_grad():
            surrogate = _distilled(model, batch["x"].detach().clone(), radius, self.steps)
        return Transfer(self.attack, surrogate, "margin").run(model, batch, random)


def _distilled(model: Any, x: Tensor, radius: float, steps: int) -> nn.Module:
    """A network trained on the labels of the images ``(N, C, H, W)`` and of copies of them.

    Noise on the copies is up to four times as large as the radius per pixel.
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
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(SIDE) if side > SIDE else nn.Identity(),
        *(nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(512, classes)),
    )
