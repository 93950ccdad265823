"""Transfer attacks: adversarial images made on another model."""

from pathlib import Path
from typing import Any, Literal

from torch import nn

from common.attacks.losses import classify, cross_entropy, hinge_margin
from common.attacks.pgd import PGD
from common.attacks.randomness import ExampleRandom
from common.attacks.settings import Settings
from common.errors import CheckpointError, ConfigurationError, check_choice
from common.evaluation.models import load_run
from common.evaluation.steps import Columns, Threat, judged
from common.modes import frozen
from common.objectives import Batch
from common.results.provenance import weights_digest

TransferLoss = Literal["cross_entropy", "margin"]

LOSSES = {"cross_entropy": cross_entropy, "margin": hinge_margin}
"""By the names that configuration files use."""


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
        self.surrogate = surrogate
        self.loss: TransferLoss = loss
        self._network: nn.Module | None = None

    @property
    def cost(self) -> int:
        """Forward and backward passes per example."""
        return self.attack.cost

    @property
    def reach(self) -> float:
        """How far from its start the attack can move an image."""
        return self.attack.reach

    @property
    def network(self) -> nn.Module:
        """The surrogate, loaded once."""
        if self._network is None:
            given = self.surrogate
            self._network = given if isinstance(given, nn.Module) else _load(Path(given))
        return self._network

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


def _load(path: Path) -> nn.Module:
    """The classifier of a run."""
    run = path.parent.parent
    if not path.is_file() or not (run / "config.yaml").is_file():
        raise CheckpointError(
            f"the surrogate {path} is not there, or {run} is not the directory of a run (no "
            "config.yaml); train it first"
        )
    return load_run(run, path.stem)[0]
