"""Writes ``batch["x_adv"]`` before every training step; by then adversarial examples are data."""

from contextlib import nullcontext

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch import Callback

from common.attacks.engine.network import AttackEngine
from common.attacks.losses import classify
from common.attacks.pgd import PGD
from common.attacks.randomness import ExampleRandom, run_seed
from common.classifier import classifier_of
from common.errors import ConfigurationError, check_choice
from common.modes import AttackMode, frozen
from common.objectives import Batch
from common.optimization import is_logged, refuse_half_precision


class AdversarialTraining(Callback):
    """The inner maximisation of adversarial training.

    Random starts are keyed to (seed, epoch, example), so neither the number of devices, nor the
    batch size, nor gradient accumulation, nor resuming changes them.

    On the steps Lightning logs (``trainer.log_every_n_steps``) two extra forward passes measure the
    inner loss before and after the attack and the accuracy on both kinds of images.

    Args:
        attack: Any projected ascent; ``None`` trains on what the loader gives.
        mode: Batch-norm mode while attacking, see :func:`common.modes.frozen`.
        engine: Computes the attack's passes; ``None`` for the plain network. In float32 a run
            differs from the plain one by rounding, which training amplifies; in bf16 by more.
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

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that attack and objective belong together.

        Raises:
            ConfigurationError: If only one of them deals with adversarial examples, if the
                precision would underflow input gradients, or if an engine is to attack in train
                mode.
        """
        if stage != "fit":
            return
        objective = classifier_of(pl_module).objective
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

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Attack the batch; only ``x_adv`` is added to it."""
        if self.attack is None:
            return
        self.attack.set_epoch(trainer.current_epoch)
        random = ExampleRandom(run_seed(), trainer.current_epoch, batch["index"])
        # Lightning enters autocast after this hook, so the precision is entered by hand.
        with frozen(pl_module, self.mode), trainer.precision_plugin.train_step_context():
            with (
                nullcontext() if self.engine is None else self.engine.applied(pl_module, batch["x"])
            ):
                loss_fn = classifier_of(pl_module).objective.inner(pl_module, batch)
                batch["x_adv"] = self.attack(
                    loss_fn,
                    batch["x"],
                    random,
                    is_adversarial=lambda x: classify(pl_module(x)) != batch["y"],
                )
            self._watch(pl_module)
            if is_logged(trainer):
                self._measure(pl_module, batch)

    def _watch(self, module: LightningModule) -> None:
        """Have the run stop where examples got no direction, when the step looks at its loss."""
        if self.attack is not None and self.attack.lost is not None:
            classifier_of(module).watch("attack", torch.where(self.attack.lost, torch.nan, 0.0))

    def _measure(self, module: LightningModule, batch: Batch) -> None:
        """Log what the attack gained: inner loss and accuracy before and after it.

        And the share of examples whose gradient was exactly zero at every step.
        """
        size = len(batch["y"])
        if self.attack is not None and self.attack.unmoved is not None:
            name, share = "train/attack_zero_gradient", self.attack.unmoved.float().mean()
            module.log(name, share, batch_size=size, on_step=True, sync_dist=True)
        with torch.no_grad(), frozen(module, "eval"):
            loss_fn = classifier_of(module).objective.inner(module, batch)
            for when, x in (("before", batch["x"]), ("after", batch["x_adv"])):
                loss = loss_fn(x).mean()
                name = f"train/inner_loss_{when}"
                module.log(name, loss, batch_size=size, on_step=True, sync_dist=True)
            for kind, x in (("clean", batch["x"]), ("robust", batch["x_adv"])):
                accuracy = (classify(module(x)) == batch["y"]).float().mean()
                name = f"train/{kind}_acc"
                module.log(
                    name, accuracy, batch_size=size, on_step=False, on_epoch=True, sync_dist=True
                )
