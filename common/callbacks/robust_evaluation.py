"""Validation by one cheap attack, test by a whole suite, and the file the results go to."""

from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning import Trainer
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from PIL import Image
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from common.attacks.engine.network import AttackEngine
from common.attacks.losses import as_class
from common.attacks.pgd import PGD
from common.attacks.randomness import ExampleRandom, Stream, run_seed
from common.callbacks.resuming import WEIGHTS, run_of
from common.errors import ConfigurationError
from common.evaluation.audit.checks import Audit
from common.evaluation.measures import Measure
from common.evaluation.pipeline import Filing, run
from common.evaluation.runner import Team, in_order
from common.evaluation.steps import is_wrong, predict
from common.evaluation.suite import SuiteEntry, ball_of, check_suite, resolve_losses
from common.evaluation.transfer import Transfer
from common.modes import frozen
from common.objectives import Batch
from common.optimization import refuse_half_precision
from common.results.identity import SETTINGS, evaluated_digest
from common.results.lines import Threat
from common.results.outcomes import logged


class RobustEvaluation(Callback):
    """Measures robust accuracy: cheaply for model selection, thoroughly under ``test``.

    Outcomes are kept in ``outcomes/`` beside the results: a killed test resumes, and attacks that
    were run on the same weights already are not run again.

    Everything runs in float32 and evaluation mode, with gradients available to the attacks in
    every inference mode of the trainer, and counts every example once on any number of devices.

    Args:
        suite: Attacks of ``test``, by the names their results carry, in the order they run.
        validation: The attack behind ``val/robust_acc``; ``None`` logs clean accuracy only.
        threat: The adversary whose worst case is reported; ``None`` takes the ball of the suite's
            first attack. Attacks in larger balls or other norms are reported, and do not count.
        audit: Checks for gradient masking; ``None`` for none.
        measures: Other numbers of the network, see :mod:`common.evaluation.measures`.
        engine: Computes the passes of the suite's attacks, but not of validation; the plain
            float32 network judges their success (:mod:`common.evaluation.confirm`).
        pictures: Whether to draw curves, bars and examples beside the results and in TensorBoard.
        results: The JSON file of results; ``None`` puts ``results.json`` into the run directory.
        experiment: Name under which results are filed; the command line fills it in.
        paper: Package of the experiment; the command line fills it in.
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
        # The next two are digests, of the settings behind the checkpoint and of those of the test.
        self.config_digest = self.protocol = ""
        self.reports: list[str] = []
        """The tables of ``test``, one for each checkpoint."""
        self._weights: str | None = None
        self._accuracies: MetricCollection | None = None
        self._classes = 0
        self._examples: list[Batch] = []
        if validation is not None and not isinstance(validation.attack, PGD):
            raise ConfigurationError(
                "evaluation.validation runs after every epoch and has to be common.attacks.pgd.PGD "
                f"or one of its kind, got {type(validation.attack).__name__}; other attacks go "
                "into evaluation.suite"
            )
        for field in fields(validation) if validation is not None else ():
            is_default = getattr(validation, field.name) == field.default
            if field.name not in ("attack", "losses") and not is_default:
                raise ConfigurationError(
                    "evaluation.validation attacks every example of every batch to the last step; "
                    f"drop {field.name}, which is for entries of evaluation.suite"
                )

    # ---- set-up ------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, module: Any, stage: str) -> None:
        """Find what would fail later; a reproduction fails before it trains."""
        is_to_test = stage == "test" or (stage == "fit" and run_of(trainer).is_reproducing)
        if trainer.precision == "64-true" and is_to_test:
            raise ConfigurationError(
                "trainer.precision is 64-true; robustness is measured in float32, so test with "
                "trainer.precision 32-true"
            )
        if is_to_test:
            check_suite(self.suite, module)
            for entry in self.suite.values():
                if isinstance(entry.attack, Transfer):
                    _ = entry.attack.network  # a surrogate that is not there, or another
            if self.audit is not None and self.threat is None and ball_of(self.suite) is None:
                raise ConfigurationError(
                    "evaluation.audit needs a threat model, and no attack of the suite has a ball; "
                    "add --evaluation.threat.norm linf --evaluation.threat.eps 8/255"
                )
            filing = Filing(self.results_path(trainer), self.experiment, self.paper)
            filing.check(run_seed(), "another file with --evaluation.results")
        if stage in ("fit", "validate") and self.validation is not None:
            resolve_losses(self.validation.losses, module)
            if trainer.precision != "16-mixed":  # validation runs outside autocast, in float32
                refuse_half_precision(trainer, "the input gradients of evaluation.validation")

    def results_path(self, trainer: Trainer) -> Path:
        """Where the results of this run go."""
        return Path(self.results or Path(trainer.default_root_dir) / "results.json")

    # ---- validation --------------------------------------------------------------------------

    def on_validation_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        """Reset the validation metrics."""
        self._accuracies = None

    def on_validation_batch_start(
        self, trainer: Trainer, module: Any, batch: Batch, *_: Any
    ) -> None:
        """Attack the batch with the validation attack and leave ``x_adv`` for the monitors."""
        if self.validation is None:
            return
        attack = cast(PGD, self.validation.attack)
        with torch.inference_mode(False), frozen(module, "eval"):
            part = {key: value.clone() for key, value in batch.items()}
            worst = torch.ones_like(part["y"], dtype=torch.bool)
            predicted = part["y"].clone()
            for inner in resolve_losses(self.validation.losses, module).values():
                random = ExampleRandom(run_seed(), 0, part["index"], Stream.EVALUATION)
                x_adv = attack(
                    inner(module, part),
                    part["x"],
                    random,
                    is_adversarial=partial(is_wrong, module, part["y"]),
                )
                found = predict(module, x_adv)
                predicted = torch.where(worst, found, predicted)
                worst &= found == part["y"]
        batch["x_adv"] = x_adv
        if self._accuracies is None:
            with torch.no_grad():
                self._classes = module(batch["x"][:1]).shape[1]
            self._accuracies = MetricCollection(
                {k: MulticlassAccuracy(self._classes, average=k) for k in ("micro", "none")}
            ).to(module.device)
        self._accuracies.update(as_class(predicted, batch["y"], self._classes), batch["y"])

    def on_validation_epoch_end(self, trainer: Trainer, module: Any) -> None:
        """Log robust accuracy, overall and per class."""
        if self._accuracies is None or trainer.sanity_checking:
            return
        found = self._accuracies.compute()  # joins the ranks: sync_dist only avoids a warning
        module.log("val/robust_acc", found["micro"], prog_bar=True, sync_dist=True)
        for label, accuracy in enumerate(found["none"]):
            module.log(f"val/robust_acc_per_class/{label}", accuracy, sync_dist=True)

    # ---- test --------------------------------------------------------------------------------

    def on_load_checkpoint(self, trainer: Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        """Read which weights the checkpoint holds, and its settings."""
        self._weights = checkpoint.get(WEIGHTS)
        given = run_of(trainer).settings
        if trainer.state.fn != TrainerFn.FITTING and given is not None and SETTINGS in checkpoint:
            self.config_digest = evaluated_digest(checkpoint[SETTINGS], given)

    def on_test_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        """Begin to collect the examples."""
        self._examples = []

    def on_test_batch_start(self, trainer: Trainer, module: Any, batch: Batch, *_: Any) -> None:
        """Keep this batch; attacks run on all examples at once, after the last one."""
        self._examples.append({key: batch[key].cpu() for key in ("x", "y", "index")})

    def on_test_epoch_end(self, trainer: Trainer, module: Any) -> None:
        """Join the ranks, run the suite, log the metrics and file the results."""
        parts = [part for theirs in Team.of_processes().gather(self._examples) for part in theirs]
        self._examples = []
        data = getattr(trainer, "datamodule", None)
        label = label_of(trainer)
        suite = {
            name: entry
            for name, entry in self.suite.items()
            if entry.checkpoints is None or label in entry.checkpoints
        }
        filing = Filing(
            self.results_path(trainer),
            self.experiment,
            paper=self.paper,
            label=label,
            at=module.loaded_at,
            config_digest=self.config_digest,
            provenance={
                "precision": str(trainer.precision),
                "protocol": self.protocol,
                "weights": self._weights,
            },
            pictures=self.pictures,
        )
        with torch.inference_mode(False), frozen(module, "eval"):
            found = run(
                module,
                in_order({key: torch.cat([part[key] for part in parts]) for key in parts[0]}),
                suite,
                self.threat or ball_of(self.suite),
                audit=self.audit,
                measures=self.measures,
                engine=self.engine,
                seed=run_seed(),
                batch_size=getattr(data, "eval_batch_size", 250),
                num_classes=getattr(data, "num_classes", None),
                class_names=getattr(data, "class_names", None),
                filing=filing,
                progress=trainer.progress_bar_callback is not None,
                remarks=getattr(getattr(data, "test_set", None), "remarks", ()),
            )
        for name, value in logged(found.result).items():
            module.log(f"test/{name}", value, sync_dist=True)
        self.reports.append(f"{self.experiment}, checkpoint {label}\n{found}")
        for logger in trainer.loggers if trainer.is_global_zero else ():
            if isinstance(logger, TensorBoardLogger):
                step = found.result["global_step"]
                for name in found.pictures:
                    pixels = _pixels(filing.beside("figures") / f"{label}_{name}.png")
                    tag = f"test_{label}/{name}"
                    logger.experiment.add_image(tag, pixels, step, dataformats="HWC")


def _pixels(path: Path) -> Any:
    """A picture ``(H, W, 3)``; reading it takes a tenth of the time of drawing it again."""
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def label_of(trainer: Trainer) -> str:
    """The name under which a checkpoint's results are filed: its file's, without the ending."""
    return Path(trainer.ckpt_path).stem if trainer.ckpt_path else "untrained"
