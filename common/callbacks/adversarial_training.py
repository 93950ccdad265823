"""Writes ``batch["x_adv"]`` before every training step."""

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch import Callback

from common.attacks.engine.network import AttackEngine
from common.attacks.losses import classify
from common.attacks.pgd import PGD
from common.attacks.randomness import ExampleRandom, run_seed
from common.errors import ConfigurationError, check_choice
from common.modes import AttackMode, frozen
from common.objectives import Batch
from common.optimization import is_logged, refuse_half_precision


class AdversarialTraining(Callback):
    """The inner maximisation of adversarial training.

    Random starts are keyed to (seed, epoch, example): the number of devices, the batch size,
    gradient accumulation and resuming do not change them.

    On logged steps (``trainer.log_every_n_steps``) extra forward passes measure the inner loss
    before and after the attack and the accuracy on both kinds of images.

    Args:
        attack: Any projected ascent; ``None`` trains on clean images.
        mode: Batch-norm mode while attacking, see :func:`common.modes.frozen`.
        engine: Computes the attack's passes, which changes rounding; ``None`` for the network.
    """

    def __init__(
        self,
        attack: PGD | None = None,
        mode: AttackMode = "eval",
        engine: AttackEngine | None = None,
    ) -> None:
        check_choice("adversary.mode", mode, AttackMode)
        self.attack = attack
        self.mode = mode
        self.engine = engine

    def setup(self, trainer: Trainer, module: Any, stage: str) -> None:
        """Check that attack, objective, precision and engine fit together.

        Raises:
            ConfigurationError: If they do not.
        """
        if stage != "fit":
            return
        objective = module.objective
        name, wanted = type(objective).__name__, objective.needs_x_adv
        if wanted and self.attack is None:
            raise ConfigurationError(
                f"the objective {name} trains on adversarial examples and adversary.attack is "
                "null; set adversary.attack (for instance common.attacks.pgd.PGD) or choose a "
                "natural objective"
            )
        if not wanted and self.attack is not None:
            raise ConfigurationError(
                f"adversary.attack is {type(self.attack).__name__} and the objective {name} never "
                "reads the adversarial examples; set adversary.attack to null or choose an "
                "adversarial objective"
            )
        if self.engine is not None and self.mode != "eval":
            raise ConfigurationError(
                f"adversary.engine computes attacks in eval mode and adversary.mode is "
                f"{self.mode}; set adversary.engine to null, or adversary.mode to eval"
            )
        if self.attack is not None:
            refuse_half_precision(trainer, "the attack's input gradients")

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Batch, *_: Any) -> None:
        """Attack the batch; only ``x_adv`` is added to it."""
        if self.attack is None:
            return
        self.attack.set_epoch(trainer.current_epoch)
        random = ExampleRandom(run_seed(), trainer.current_epoch, batch["index"])
        # Lightning enters autocast after this hook, so the precision is entered here.
        with frozen(module, self.mode), trainer.precision_plugin.train_step_context():
            with nullcontext() if self.engine is None else self.engine.applied(module, batch["x"]):
                loss_fn = module.objective.inner(module, batch)
                batch["x_adv"] = self.attack(
                    loss_fn,
                    batch["x"],
                    random,
                    is_adversarial=lambda x: classify(module(x)) != batch["y"],
                )
            if (lost := self.attack.lost) is not None:  # examples without a finite gradient
                module.watch("attack", torch.where(lost, torch.nan, 0.0))
            if is_logged(trainer):
                self._measure(module, batch, self.attack.unmoved)

    def _measure(self, module: Any, batch: Batch, unmoved: torch.Tensor | None) -> None:
        """Log inner loss and accuracy before and after the attack.

        And the share of examples whose gradient was exactly zero at every step.
        """
        log = partial(module.log, batch_size=len(batch["y"]), sync_dist=True)
        if unmoved is not None:
            log("train/attack_zero_gradient", unmoved.float().mean(), on_step=True)
        with torch.no_grad(), frozen(module, "eval"):
            loss_fn = module.objective.inner(module, batch)
            for when, x in (("before", batch["x"]), ("after", batch["x_adv"])):
                log(f"train/inner_loss_{when}", loss_fn(x).mean(), on_step=True)
            for kind, x in (("clean", batch["x"]), ("robust", batch["x_adv"])):
                accuracy = (classify(module(x)) == batch["y"]).float().mean()
                log(f"train/{kind}_acc", accuracy, on_step=False, on_epoch=True)
