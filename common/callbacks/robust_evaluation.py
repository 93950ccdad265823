"""Validation by one cheap attack, test by a whole suite, and the file the results go to."""

import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

from common.analysis.figures import save_figure
from common.attacks.engine.network import AttackEngine
from common.attacks.losses import as_class
from common.attacks.pgd import PGD
from common.attacks.randomness import EVALUATION, ExampleRandom, run_seed
from common.callbacks.resuming import WEIGHTS
from common.callbacks.run import run_of
from common.classifier import classifier_of
from common.errors import ConfigurationError
from common.evaluation.audit.checks import Audit, AuditReport
from common.evaluation.findings import with_findings
from common.evaluation.journal import Journal, identity_of
from common.evaluation.measures import Measure, cost, means, measure_steps
from common.evaluation.pictures import draw
from common.evaluation.progress import ConsoleProgress
from common.evaluation.runner import Team, in_order, run_steps
from common.evaluation.steps import Outcomes, Threat, is_wrong, predict
from common.evaluation.suite import SuiteEntry, ball_of, check_suite, resolve_losses, steps_of
from common.evaluation.transfer import Transfer
from common.modes import frozen
from common.objectives import Batch
from common.optimization import refuse_half_precision
from common.results import provenance
from common.results.identity import SETTINGS, evaluated_digest
from common.results.outcomes import logged
from common.results.store import (
    CheckpointResult,
    check_mergeable,
    check_writable,
    checkpoint_entry,
    merge_result,
)

OF_SUITES: dict[str, Any] = {
    **{"survivors_only": False, "examples": None, "checkpoints": None, "sweep": None},
    **{"eot": 1, "until_broken": False, "all_images": False},
}
"""Settings of an entry that validation does not know, and their defaults."""


class RobustEvaluation(Callback):
    """Measures robust accuracy: cheaply for model selection, thoroughly under ``test``.

    Outcomes are kept in ``outcomes/`` beside the results as they come: a killed test goes on where
    it was, weights that were tested already are not tested again, and a suite with one more attack
    runs that attack alone.

    Everything runs in float32 and evaluation mode, with gradients available to the attacks whatever
    the trainer's inference mode, and counts every example once on any number of devices.

    Args:
        suite: Attacks of ``test``, by the names their results carry, in the order they run.
        validation: The attack behind ``val/robust_acc``; ``None`` logs clean accuracy only.
        threat: The adversary whose worst case is reported; ``None`` takes the ball of the suite's
            first attack. Attacks in larger balls or other norms are reported, and do not count.
        audit: Checks for gradient masking; ``None`` for none.
        measures: What else to find out about the network: see :mod:`common.evaluation.measures`.
        engine: Computes the passes of the suite's attacks; their success is judged by the plain
            float32 network whatever it is (:mod:`common.evaluation.confirm`). Validation, which
            chooses a checkpoint, goes without.
        pictures: Whether to draw curves, bars and examples beside the results and in TensorBoard.
        results: The JSON file of results; ``None`` puts ``results.json`` into the run directory.
        experiment: Name under which results are filed; the command line fills it in.
        paper: Package of the experiment; the command line fills it in.
        config_digest: Digest of the settings behind the checkpoint; the command line fills it in.
        protocol: Digest of the settings of the test; the command line fills it in.
    """

    def __init__(
        self,
        suite: dict[str, SuiteEntry] | None = None,
        validation: SuiteEntry | None = None,
        threat: Threat | None = None,
        audit: Audit | None = None,
        measures: dict[str, Measure] | None = None,
        engine: AttackEngine | None = None,
        pictures: bool = True,
        results: str | None = None,
        experiment: str | None = None,
        paper: str | None = None,
        config_digest: str | None = None,
        protocol: str | None = None,
    ) -> None:
        self.suite = suite or {}
        self.validation = validation
        self.threat = threat
        self.audit = audit
        self.measures = measures or {}
        self.engine = engine
        self.pictures = pictures
        self.results = results
        self.experiment = experiment or "unnamed"
        self.paper = paper or "unnamed"
        self.config_digest = config_digest or ""
        self.protocol = protocol or ""
        self._weights: str | None = None
        self._robust: MulticlassAccuracy | None = None
        self._per_class: MulticlassAccuracy | None = None
        self._examples: list[Batch] = []
        if validation is not None and not isinstance(validation.attack, PGD):
            raise ConfigurationError(
                "evaluation.validation runs after every epoch and has to be common.attacks.pgd.PGD "
                f"or one of its kind, got {type(validation.attack).__name__}; other attacks go "
                "into evaluation.suite"
            )
        unused = [
            name
            for name, value in OF_SUITES.items()
            if validation is not None and getattr(validation, name) != value
        ]
        if unused:
            raise ConfigurationError(
                "evaluation.validation attacks every example of every batch to the last step; drop "
                f"{', '.join(unused)}, which is for entries of evaluation.suite"
            )

    # ---- set-up ------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find what would fail after hours before anything is computed."""
        # Whoever reproduces a row trains it first, and is told before.
        is_to_test = stage == "test" or (stage == "fit" and run_of(trainer).is_reproducing)
        if trainer.precision == "64-true" and is_to_test:
            raise ConfigurationError(
                "trainer.precision is 64-true; robustness is measured in float32, so test with "
                "trainer.precision 32-true"
            )
        if is_to_test:
            check_suite(self.suite, pl_module)
            for entry in self.suite.values():
                if isinstance(entry.attack, Transfer):
                    _ = entry.attack.network  # a surrogate that is not there, or another
            if self.audit is not None and self.threat is None and ball_of(self.suite) is None:
                raise ConfigurationError(
                    "evaluation.audit needs a threat model, and no attack of the suite has a ball; "
                    "add --evaluation.threat.norm linf --evaluation.threat.eps 8/255"
                )
            path = self.results_path(trainer)
            self._check_places(path)
            remedy = "another file with --evaluation.results"
            check_mergeable(path, self.paper, self.experiment, run_seed(), remedy)
        if stage in ("fit", "validate") and self.validation is not None:
            resolve_losses(self.validation.losses, pl_module)
            if trainer.precision != "16-mixed":  # validation runs outside autocast, in float32
                refuse_half_precision(trainer, "the input gradients of evaluation.validation")

    def _check_places(self, results: Path) -> None:
        check_writable(results)
        for folder in (results.parent / "outcomes", results.parent / "figures"):
            if folder.exists():
                check_writable(folder / "any")

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
        with torch.inference_mode(False), frozen(pl_module, "eval"):
            part = {key: value.clone() for key, value in batch.items()}
            worst = torch.ones_like(part["y"], dtype=torch.bool)
            predicted = part["y"].clone()
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
        predicted = as_class(predicted, batch["y"], self._per_class.num_classes or 1)
        self._robust.update(predicted, batch["y"])
        self._per_class.update(predicted, batch["y"])

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log robust accuracy, overall and per class."""
        if self._robust is None or self._per_class is None or trainer.sanity_checking:
            return
        # compute() has joined the ranks already, so sync_dist only confirms what is equal.
        pl_module.log("val/robust_acc", self._robust.compute(), prog_bar=True, sync_dist=True)
        for label, accuracy in enumerate(self._per_class.compute()):
            pl_module.log(f"val/robust_acc_per_class/{label}", accuracy, sync_dist=True)

    # ---- test --------------------------------------------------------------------------------

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take over what the checkpoint says about itself."""
        self._weights = checkpoint.get(WEIGHTS)
        given = run_of(trainer).settings
        if trainer.state.fn != TrainerFn.FITTING and given is not None and SETTINGS in checkpoint:
            self.config_digest = evaluated_digest(checkpoint[SETTINGS], given)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to collect the examples."""
        self._started = time.perf_counter()
        self._examples = []

    def on_test_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep this batch; attacks go over all examples at once, after the last one."""
        self._examples.append({key: batch[key].cpu() for key in ("x", "y", "index")})

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Join the ranks, run the suite, log the metrics and file the results."""
        team = _team(trainer)
        parts = [part for theirs in team.gather(self._examples) for part in theirs]
        self._examples = []
        examples = in_order({key: torch.cat([part[key] for part in parts]) for key in parts[0]})
        outcomes, audit = self._evaluated(trainer, pl_module, examples, team)
        at = classifier_of(pl_module).loaded_at
        measured = means(outcomes, self.measures)
        with torch.inference_mode(False), frozen(pl_module, "eval"):
            measured |= cost(pl_module, examples["x"][0].clone().to(pl_module.device))
        entry = checkpoint_entry(outcomes, audit=audit, measures=measured, **at)
        for name, value in logged(entry).items():
            pl_module.log(f"test/{name}", value, sync_dist=True)
        if trainer.is_global_zero:
            for remark in entry["remarks"]:
                warnings.warn(f"test: {remark}", stacklevel=1)
            self._write(trainer, pl_module, entry, outcomes)
            self._draw(trainer, entry, outcomes, examples["x"])

    def _evaluated(
        self, trainer: Trainer, pl_module: LightningModule, examples: Batch, team: Team
    ) -> tuple[Outcomes, AuditReport | None]:
        """Outcomes of the suite and of the audit, the same on every rank."""
        suite = {
            name: entry
            for name, entry in self.suite.items()
            if entry.checkpoints is None or label_of(trainer) in entry.checkpoints
        }
        with torch.no_grad():
            classes = pl_module(examples["x"][:1].to(pl_module.device)).shape[1]
        steps = steps_of(suite, pl_module, classes, run_seed(), self.engine)
        threat = self.threat or ball_of(self.suite)
        if self.audit is not None and threat is not None:
            steps += self.audit.steps(pl_module, threat, classes)
        steps += measure_steps(self.measures)
        identity = identity_of(pl_module, examples, run_seed(), self.config_digest)
        folder = self.results_path(trainer).parent / "outcomes"
        data = getattr(trainer, "datamodule", None)
        with ConsoleProgress(len(steps) + 1) as bar:
            is_shown = trainer.is_global_zero and trainer.progress_bar_callback is not None
            outcomes = run_steps(
                pl_module,
                examples,
                steps,
                seed=run_seed(),
                batch_size=getattr(data, "eval_batch_size", 250),
                threat=threat,
                journal=Journal(folder, identity),
                team=team,
                progress=bar if is_shown else None,
                remarks=getattr(getattr(data, "test_set", None), "remarks", ()),
            )
        audit = self.audit.report(outcomes, classes) if self.audit is not None else None
        return outcomes, with_findings(audit, outcomes)

    def _write(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        entry: CheckpointResult,
        outcomes: Outcomes,
    ) -> None:
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
                attack_seconds=outcomes.seconds,
                engine=self.engine,
            )
            | {"protocol": self.protocol, "weights": self._weights},
        )

    def _draw(
        self, trainer: Trainer, entry: CheckpointResult, outcomes: Outcomes, x: Tensor
    ) -> None:
        """Pictures beside the results and in TensorBoard."""
        if not self.pictures:
            return
        names = getattr(getattr(trainer, "datamodule", None), "class_names", None)
        label = label_of(trainer)
        folder = self.results_path(trainer).parent / "figures"
        for name, figure in draw(entry, outcomes, x, names).items():
            save_figure(figure, folder / f"{label}_{name}.png")
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    step = entry["global_step"]
                    logger.experiment.add_figure(f"test_{label}/{name}", figure, step)


def label_of(trainer: Trainer) -> str:
    """The name under which a checkpoint's results are filed: its file's, without the ending."""
    return Path(trainer.ckpt_path).stem if trainer.ckpt_path else "untrained"


def _team(trainer: Trainer) -> Team:
    """All ranks of a trainer."""

    def gather(mine: Any) -> list[Any]:
        parts: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(parts, mine)
        return parts

    return (
        Team() if trainer.world_size == 1 else Team(trainer.global_rank, trainer.world_size, gather)
    )
