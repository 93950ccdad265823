"""Validation by one cheap attack, test by a whole suite, and the file the results go to."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch import Callback
from torchmetrics.classification import MulticlassAccuracy

from common import provenance
from common.attacks.autoattack import AutoAttack
from common.attacks.pgd import PGD
from common.attacks.randomness import EVALUATION, ExampleRandom, run_seed
from common.callbacks.modes import frozen
from common.errors import ConfigurationError
from common.evaluation import (
    SuiteEntry,
    SuiteRun,
    check_suite,
    is_wrong,
    predict,
    resolve_losses,
)
from common.objectives import Batch
from common.results import CheckpointResult, check_writable, checkpoint_entry, merge_result


class RobustEvaluation(Callback):
    """Measures robust accuracy: cheaply for model selection, thoroughly under ``test``.

    Where the selected checkpoint is the last one, its outcomes are not computed twice.

    Everything runs in float32 and evaluation mode, with gradients available to the attacks whatever
    the trainer's inference mode, and counts every example once on any number of devices.

    Args:
        suite: Attacks of ``test``, by the names their results carry, in the order they run.
        validation: The attack behind ``val/robust_acc``; ``None`` logs clean accuracy only.
        results: The JSON file of results; ``None`` puts ``results.json`` into the run directory.
        experiment: Name under which results are filed; the command line fills it in.
        paper: Package of the experiment; the command line fills it in.
        config_digest: Digest of the settings behind the checkpoint; the command line fills it in.
    """

    def __init__(
        self,
        suite: dict[str, SuiteEntry] | None = None,
        validation: SuiteEntry | None = None,
        results: str | None = None,
        experiment: str | None = None,
        paper: str | None = None,
        config_digest: str | None = None,
    ) -> None:
        self.suite = suite or {}
        self.validation = validation
        self.results = results
        self.experiment = experiment or "unnamed"
        self.paper = paper or "unnamed"
        self.config_digest = config_digest or ""
        self._robust: MulticlassAccuracy | None = None
        self._per_class: MulticlassAccuracy | None = None
        self._tested = ("", 0)
        self._run = SuiteRun(None, {}, run_seed())
        if validation is not None and isinstance(validation.attack, AutoAttack):
            raise ConfigurationError(
                "evaluation.validation runs after every epoch and cannot be AutoAttack; use "
                "common.attacks.pgd.PGD there and AutoAttack in evaluation.suite"
            )

    # ---- set-up ------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find what would fail after hours before anything is computed."""
        if trainer.precision in ("16-true", "bf16-true", "64-true") and stage == "test":
            raise ConfigurationError(
                f"trainer.precision is {trainer.precision}; robustness is measured in float32, "
                "so test with trainer.precision 32-true"
            )
        if stage == "test":
            check_suite(self.suite, pl_module)
            check_writable(self.results_path(trainer))
        if stage in ("fit", "validate") and self.validation is not None:
            resolve_losses(self.validation.losses, pl_module)

    def results_path(self, trainer: Trainer) -> Path:
        """Where the results of this run go."""
        return Path(self.results or Path(trainer.default_root_dir) / "results.json")

    # ---- validation --------------------------------------------------------------------------

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count anew."""
        self._per_class = self._robust = None

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Attack the batch with the validation attack and leave ``x_adv`` for the monitors."""
        if self.validation is None:
            return
        attack = cast(PGD, self.validation.attack)
        worst = torch.ones_like(batch["y"], dtype=torch.bool)
        predicted = batch["y"].clone()
        with torch.inference_mode(False), frozen(pl_module, "eval"):
            part = {key: value.clone() for key, value in batch.items()}
            for inner in resolve_losses(self.validation.losses, pl_module).values():
                random = ExampleRandom(run_seed(), 0, part["index"], EVALUATION)
                x_adv = attack(
                    inner(pl_module, part),
                    part["x"],
                    random,
                    is_adversarial=partial(is_wrong, pl_module, part["y"]),
                )
                found = predict(pl_module, x_adv)
                predicted = torch.where(worst, found, predicted)
                worst &= found == part["y"]
        batch["x_adv"] = x_adv
        if self._robust is None or self._per_class is None:
            with torch.no_grad():
                classes = pl_module(batch["x"][:1]).shape[1]
            self._per_class = MulticlassAccuracy(classes, average="none").to(pl_module.device)
            self._robust = MulticlassAccuracy(classes, average="micro").to(pl_module.device)
        self._robust.update(predicted, batch["y"])
        self._per_class.update(predicted, batch["y"])

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log robust accuracy, overall and per class."""
        if self._robust is None or self._per_class is None or trainer.sanity_checking:
            return
        # compute() has joined the ranks already, so sync_dist only confirms what is equal.
        pl_module.log("val/robust_acc", self._robust.compute(), prog_bar=True, sync_dist=True)
        for label, accuracy in enumerate(self._per_class.compute()):
            pl_module.log(f"val_robust_acc_per_class/{label}", accuracy, sync_dist=True)

    # ---- test --------------------------------------------------------------------------------

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a suite, unless these very weights and data have been through it just now."""
        self._started = time.perf_counter()
        suite = {
            name: entry
            for name, entry in self.suite.items()
            if entry.checkpoints is None or label_of(trainer) in entry.checkpoints
        }
        data = getattr(trainer, "datamodule", None)
        tested = (provenance.weights_digest(pl_module.state_dict()), id(data))
        self._is_repeat = (
            data is not None
            and tested == self._tested
            and set(suite) <= set(self._run.suite)
            # What these attack depends on the attacks before them, which may not be the same.
            and not any(entry.survivors_only for entry in suite.values())
        )
        self._tested = tested
        self._shown = set(suite)
        if not self._is_repeat:
            self._run = SuiteRun(pl_module, suite, run_seed())

    def on_test_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Run the suite on this batch."""
        if not self._is_repeat:
            with frozen(pl_module, "eval"):
                self._run.attack(batch)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Join the ranks, log the metrics and file the results."""
        if not self._is_repeat:
            self._outcomes = self._run.gathered(_gather_from(trainer))
        entry = checkpoint_entry(
            self._outcomes.of(self._shown),
            {name: self.suite[name].survivors_only for name in self._shown},
            **getattr(pl_module, "loaded_at", {}),
        )
        for name, value in entry["metrics"].items():
            pl_module.log(f"test/{name}", value, sync_dist=True)
        if trainer.is_global_zero:
            self._write(trainer, pl_module, entry)

    def _write(self, trainer: Trainer, pl_module: LightningModule, entry: CheckpointResult) -> None:
        merge_result(
            self.results_path(trainer),
            paper=self.paper,
            experiment=self.experiment,
            seed=run_seed(),
            label=label_of(trainer),
            entry=entry,
            provenance=provenance.collect(
                device=pl_module.device,
                world_size=trainer.world_size,
                precision=str(trainer.precision),
                state_dict=pl_module.state_dict(),
                config_digest=self.config_digest,
                wall_time_s=time.perf_counter() - self._started,
                attack_seconds=self._run.seconds,
            ),
        )


def label_of(trainer: Trainer) -> str:
    """The name under which a checkpoint's results are filed: its file's, without the ending."""
    return Path(trainer.ckpt_path).stem if trainer.ckpt_path else "untrained"


def _gather_from(trainer: Trainer) -> Callable[[Any], list[Any]]:
    """How objects of all ranks come together."""
    if trainer.world_size == 1:
        return lambda mine: [mine]

    def gather(mine: Any) -> list[Any]:
        parts: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(parts, mine)
        return parts

    return gather
