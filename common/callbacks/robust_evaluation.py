"""Validation by one cheap attack, test by a whole suite, and the file the results go to.

Any LightningModule that returns logits and any loader will do; those of this project say more.
"""

from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from PIL import Image
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from common.attacks.engine.network import AttackEngine
from common.attacks.losses import as_class
from common.attacks.pgd import PGD
from common.attacks.randomness import ExampleRandom, Stream, run_seed
from common.callbacks.batches import BatchReader
from common.callbacks.costs import training_cost
from common.callbacks.resuming import WEIGHTS, run_of
from common.errors import ConfigurationError
from common.evaluation.audit.checks import Audit
from common.evaluation.measures import Measure
from common.evaluation.models import as_victim
from common.evaluation.pictures import Pictures, check_pictures
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
from common.results.schema import TrainingCost


class RobustEvaluation(Callback):
    """Measures robust accuracy: cheaply for model selection, thoroughly under ``test``.

    Outcomes are kept in ``outcomes/`` beside the results: a killed test resumes, and attacks that
    were run on the same weights already are not run again.

    Everything runs in float32 and evaluation mode, with gradients available to the attacks in
    every inference mode of the trainer, and counts every example once on any number of devices.

    Under any ``lightning.Trainer`` the module is one whose ``forward`` takes images in [0, 1] and
    returns logits. Batches are ``(x, y, ...)`` or dicts with ``x``, ``y`` and, if they have one,
    ``index``. Results of weights that no checkpoint holds are filed as ``current``.

    Args:
        suite: Attacks of ``test``, by the names their results carry, in the order they run.
        validation: The attack behind ``val/robust_acc``; ``None`` logs clean accuracy only.
        threat: The adversary whose worst case is reported; ``None`` takes the ball of the suite's
            first attack. Attacks in larger balls or other norms are reported, and do not count.
        audit: Checks for gradient masking; ``None`` for none.
        measures: Other numbers of the network, see :mod:`common.evaluation.measures`.
        engine: Computes the passes of the suite's attacks, but not of validation; the plain
            float32 network judges their success (:mod:`common.evaluation.confirm`).
        pictures: Whether to draw curves, bars and examples beside the results and in TensorBoard;
            ``examples`` for the examples alone.
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
        pictures: Pictures = True,
        results: str | None = None,
        experiment: str | None = None,
        paper: str | None = None,
    ) -> None:
        check_pictures("evaluation.pictures", pictures)
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
        self._cost: TrainingCost | None = None
        self._at: dict[str, int] = {}
        self._accuracies: MetricCollection | None = None
        self._classes = 0
        self._reader: BatchReader | None = None
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

    @property
    def ball(self) -> Threat | None:
        """The threat model, of all checkpoints: as given, or that of the suite's first attack."""
        return self.threat or ball_of(self.suite)

    def for_checkpoint(self, label: str) -> tuple[dict[str, SuiteEntry], Audit | None]:
        """The attacks and the audit of a checkpoint, by its name."""

        def is_for_it(part: SuiteEntry | Audit) -> bool:
            return part.checkpoints is None or label in part.checkpoints

        suite = {name: entry for name, entry in self.suite.items() if is_for_it(entry)}
        return suite, self.audit if self.audit is not None and is_for_it(self.audit) else None

    # ---- set-up ------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, module: Any, stage: str) -> None:
        """Find what would fail later; a reproduction fails before it trains."""
        is_to_test = stage == "test" or (stage == "fit" and run_of(trainer).is_reproducing)
        if trainer.precision == "64-true" and is_to_test:
            raise ConfigurationError(
                "trainer.precision is 64-true; robustness is measured in float32, so test with "
                "trainer.precision 32-true"
            )
        self._weights, self._cost, self._at = None, None, {}
        if type(module).forward is LightningModule.forward:
            raise ConfigurationError(
                f"{type(module).__name__} has no forward; give it one from images to logits"
            )
        victim = as_victim(module, classes_of(trainer))
        if is_to_test:
            check_suite(self.suite, victim)
            for entry in self.suite.values():
                if isinstance(entry.attack, Transfer):
                    _ = entry.attack.network  # a surrogate that is not there, or another
            if self.audit is not None and self.ball is None:
                raise ConfigurationError(
                    "evaluation.audit needs a threat model, and no attack of the suite has a ball; "
                    "add --evaluation.threat.norm linf --evaluation.threat.eps 8/255"
                )
            filing = Filing(self.results_path(trainer), self.experiment, self.paper)
            filing.check(run_seed(), "another file with --evaluation.results")
        if stage in ("fit", "validate") and self.validation is not None:
            resolve_losses(self.validation.losses, victim)
            if trainer.precision != "16-mixed":  # validation runs outside autocast, in float32
                refuse_half_precision(trainer, "the input gradients of evaluation.validation")

    def results_path(self, trainer: Trainer) -> Path:
        """Where the results of this run go."""
        return Path(self.results or Path(trainer.default_root_dir) / "results.json")

    # ---- validation --------------------------------------------------------------------------

    def on_validation_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        """Reset the validation metrics."""
        self._accuracies = self._reader = None

    def on_validation_batch_start(self, trainer: Trainer, module: Any, batch: Any, *_: Any) -> None:
        """Attack the batch with the validation attack; a dict gets ``x_adv`` for the monitors."""
        if self.validation is None:
            return
        if self._reader is None:
            self._reader = BatchReader(trainer.val_dataloaders, trainer.world_size)
        with torch.inference_mode(False), frozen(module, "eval"):
            part, is_new = self._reader.read(batch)
            part = {key: value.to(module.device, copy=True) for key, value in part.items()}
            if self._accuracies is None:
                with torch.no_grad():
                    self._classes = module(part["x"][:1]).shape[1]
                self._accuracies = MetricCollection(
                    {k: MulticlassAccuracy(self._classes, average=k) for k in ("micro", "none")}
                ).to(module.device)
            x_adv, predicted = self._validated(as_victim(module, self._classes), part)
            y = part["y"]
            if not is_new.all():
                predicted, y = predicted[is_new], y[is_new]
            if len(y):
                self._accuracies.update(as_class(predicted, y, self._classes), y)
        if isinstance(batch, dict):
            batch["x_adv"] = x_adv

    def _validated(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """The images of the last loss, and the first wrong class under any loss, ``(N,)``."""
        if self.validation is None:
            raise RuntimeError("there is no validation attack")
        attack, y = cast(PGD, self.validation.attack), batch["y"]
        worst, predicted = torch.ones_like(y, dtype=torch.bool), y.clone()
        for inner in resolve_losses(self.validation.losses, model).values():
            random = ExampleRandom(run_seed(), 0, batch["index"], Stream.EVALUATION)
            wrong = partial(is_wrong, model, y)
            x_adv = attack(inner(model, batch), batch["x"], random, is_adversarial=wrong)
            found = predict(model, x_adv)
            predicted = torch.where(worst, found, predicted)
            worst &= found == y
        return x_adv, predicted

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
        """Read which weights the checkpoint holds, when they were saved, and what they took."""
        self._weights, self._cost = checkpoint.get(WEIGHTS), training_cost(checkpoint)
        self._at = {key: checkpoint[key] for key in ("epoch", "global_step")}
        given = run_of(trainer).settings
        if trainer.state.fn != TrainerFn.FITTING and given is not None and SETTINGS in checkpoint:
            self.config_digest = evaluated_digest(checkpoint[SETTINGS], given)

    def on_test_epoch_start(self, trainer: Trainer, module: Any) -> None:
        """Begin to collect the examples; all processes get the buffers of the first one.

        Running statistics differ after training with DDP, which does the same in a forward pass.
        """
        if trainer.world_size > 1:
            mine = {name: buffer.cpu() for name, buffer in module.named_buffers()}
            for name, value in trainer.strategy.broadcast(mine).items():
                module.get_buffer(name).copy_(value)
        self._examples = []
        self._reader = BatchReader(trainer.test_dataloaders, trainer.world_size)

    def on_test_batch_start(self, trainer: Trainer, module: Any, batch: Any, *_: Any) -> None:
        """Keep this batch; attacks run on all examples at once, after the last one."""
        if self._reader is None:
            raise RuntimeError("a test epoch has to start before its batches")
        part, is_new = self._reader.read(batch)
        self._examples.append({key: part[key].cpu()[is_new] for key in ("x", "y", "index")})

    def on_test_epoch_end(self, trainer: Trainer, module: Any) -> None:
        """Join the ranks, run the suite, log the metrics and file the results."""
        if self._reader is None:
            raise RuntimeError("a test epoch has to start before it ends")
        parts = [part for theirs in Team.of_processes().gather(self._examples) for part in theirs]
        self._examples = []
        data = getattr(trainer, "datamodule", None)
        label = label_of(trainer)
        suite, audit = self.for_checkpoint(label)
        filing = self._filing(trainer)
        with torch.inference_mode(False), frozen(module, "eval"):
            found = run(
                module,
                in_order({key: torch.cat([part[key] for part in parts]) for key in parts[0]}),
                suite,
                self.ball,
                audit=audit,
                measures=self.measures,
                engine=self.engine,
                seed=run_seed(),
                batch_size=self._reader.batch_size,
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
                step = found.result.get("global_step", 0)
                for name in found.pictures:
                    pixels = _pixels(filing.beside("figures") / f"{filing.label}_{name}.png")
                    tag = f"test_{label}/{name}"
                    logger.experiment.add_image(tag, pixels, step, dataformats="HWC")

    def _filing(self, trainer: Trainer) -> Filing:
        """Where the results of the weights in use go."""
        return Filing(
            self.results_path(trainer),
            self.experiment,
            paper=self.paper,
            label=label_of(trainer),
            at=self._at if trainer.ckpt_path else _current(trainer),
            config_digest=self.config_digest,
            provenance={
                "precision": str(trainer.precision),
                "protocol": self.protocol,
                "weights": self._weights,
                **({} if self._cost is None else {"training": self._cost}),
            },
            pictures=self.pictures,
        )


def _pixels(path: Path) -> Any:
    """A picture ``(H, W, 3)``; reading it takes a tenth of the time of drawing it again."""
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def label_of(trainer: Trainer) -> str:
    """The name under which a checkpoint's results are filed: its file's, without the ending."""
    if trainer.ckpt_path:
        return Path(trainer.ckpt_path).stem
    return "current" if _current(trainer) else "untrained"


def _current(trainer: Trainer) -> dict[str, int]:
    """Epoch and step of the weights in use, as a checkpoint has them; empty before training."""
    if trainer.global_step == 0:
        return {}
    # After training the trainer counts the epochs that are over, a checkpoint the last one.
    return {"epoch": max(trainer.current_epoch - 1, 0), "global_step": trainer.global_step}


def classes_of(trainer: Trainer) -> int:
    """Number of classes that the data module states; by default enough for every loss."""
    return int(getattr(getattr(trainer, "datamodule", None), "num_classes", 3))
