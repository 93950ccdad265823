"""``python -m paper_x fit|validate|test|predict|reproduce --config experiment.yaml``."""

import json
import os
import signal
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from filelock import FileLock
from jsonargparse import Namespace
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

from common.callbacks.adversarial_training import AdversarialTraining
from common.callbacks.checkpointing import LastCheckpoint, SelectedCheckpoint
from common.callbacks.monitoring import Monitoring
from common.callbacks.predictions import PredictionWriter
from common.callbacks.progress import ProgressBar
from common.callbacks.robust_evaluation import RobustEvaluation
from common.callbacks.warm_start import WarmStart
from common.callbacks.weight_perturbation import AdversarialWeightPerturbation
from common.classifier import RobustClassifier
from common.cli.messages import confirmed, one_line
from common.cli.needed import make_needed
from common.cli.parser import (
    TENSORBOARD,
    UserFriendlyParser,
    fill_from_data,
    protocol_digest,
    refusal,
    tensorboard_in,
)
from common.cli.preconditions import NAMED, check_limits, check_seed, experiment_of
from common.cli.runs import check_is_ours, latest_of, lock, set_aside_if_other
from common.cli.start import SUBCOMMANDS
from common.cli.trainer import Trainer
from common.data.images import ImageDataModule
from common.errors import ConfigurationError
from common.evaluation.presets import check_overlays, fill_threat, threat_of
from common.files import remove_leftovers, write_sealed_yaml
from common.limits import check_name
from common.optimization import optimizer_of
from common.packages import CONFIGS
from common.parsing import check_named
from common.results.identity import check_package, contents, decisive
from common.settings import class_paths, explain, plain_digest

BASE = str(CONFIGS / "base.yaml")
TRAINING = ("fit", "reproduce")
# Callbacks with arguments that the command line fills in.
FILLED_IN: tuple[tuple[type[Callback], str, set[str | int]], ...] = (
    (RobustEvaluation, "evaluation", {"experiment", "paper"}),
    (Monitoring, "monitoring", {"hyperparameters"}),
    (SelectedCheckpoint, "checkpoint", {"dirpath"}),
)


class RobustCLI(LightningCLI):
    """LightningCLI that knows experiments: their names, run directories and data."""

    config: Namespace
    trainer: Trainer

    def __init__(
        self,
        package: str,
        args: Sequence[str],
        run: bool = True,
    ) -> None:
        self.package = package
        self.lock: FileLock | None = None
        self.words = list(args)
        known = self.subcommands()
        if self.words and self.words[0] in known:  # one parser instead of five saves a second
            known = {self.words[0]: known[self.words[0]]}
            self.__dict__["subcommands"] = lambda: known
        defaults: dict[str, Any] = {"default_config_files": [BASE], "allow_abbrev": False}
        whole = {"allow_abbrev": False, "prog": f"python -m {package}"}
        try:
            super().__init__(
                RobustClassifier,
                ImageDataModule,
                save_config_callback=SaveTrainingConfig,
                save_config_kwargs={"overwrite": True},
                trainer_class=Trainer,
                seed_everything_default=0,
                parser_class=UserFriendlyParser,
                parser_kwargs=whole | dict.fromkeys(known, defaults) if run else defaults,
                subclass_mode_model=True,
                args=self.words,
                run=run,
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
            )
        finally:
            if self.lock is not None:
                self.lock.release()

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's four, and ``reproduce``."""
        skipped = {k: skip | {"weights_only"} for k, skip in LightningCLI.subcommands().items()}
        return {**skipped, "reproduce": {"model", "datamodule"}}

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        """Lightning's, ours and the paper's, each with a line of help."""
        self._subcommand_parsers = {}
        listed = parser.add_subcommands()
        for name in self.subcommands():
            text = SUBCOMMANDS[name]
            given = {"description": text, **kwargs[name]}
            made = self._prepare_subcommand_parser(Trainer, name, **given)
            self._subcommand_parsers[name] = made
            listed.add_subcommand(name, made, help=text)

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The seed is always stated: Lightning could draw one at random."""
        parser.add_argument(
            "--seed_everything",
            type=int,
            default=self.seed_everything_default,
            help="of weights, order, augmentation and attacks; a whole number of at least 0",
        )

    def _set_seed(self) -> None:
        check_seed(self._get(self.config, "seed_everything"))
        super()._set_seed()

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The adversary, evaluation and the rest are sections of the configuration."""
        named = "name of the experiment; by default the stem of the first --config"
        parser.add_argument("--experiment", type=str | None, default=None, help=named)
        parser.add_argument("--runs", type=str, default="runs", help="folder of all runs")
        parser.add_lightning_class_args(WarmStart, "warm_start")
        parser.add_lightning_class_args(AdversarialTraining, "adversary")
        parser.add_lightning_class_args(AdversarialWeightPerturbation, "weight_perturbation")
        for kind, section, filled_in in FILLED_IN:
            parser.callback_keys.append(section)
            parser.add_class_arguments(
                kind, section, fail_untyped=False, sub_configs=True, skip=filled_in
            )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse a subcommand by its own parser; the one above it would parse its result again.

        Lightning would warn of other words than those that the process was started with.
        """
        its = getattr(self, "_subcommand_parsers", {}).get(args[0] if args else None)
        if its is None or any(word.startswith("--print_config") for word in args):
            self.config = parser.parse_args(args)
        else:
            parsed = {"subcommand": args[0], args[0]: its.parse_args(args[1:])}
            self.config = Namespace(parsed)  # type: ignore[no-untyped-call]

    def _parse_ckpt_path(self) -> None:
        """Keep the precedence of files and options over a checkpoint's stored settings."""

    # ---- between parsing and instantiation ---------------------------------------------------

    def before_instantiate_classes(self) -> None:
        """Check the configuration and fill in names, folders and class counts."""
        config = self.config[self.subcommand] if self.subcommand else self.config
        files = [str(path) for path in config.get("config") or []]
        check_named(config)
        if not config.experiment:
            config.experiment = experiment_of([Path(path) for path in files])
        check_name(config.experiment, "the experiment (--experiment, or the stem of its file)")
        fill_from_data(config)
        threat = threat_of(config.evaluation, config.adversary)
        check_overlays(files, threat)
        for section in (config.evaluation.suite, config.evaluation.validation):
            fill_threat(section, threat, has_defaults=True)
        # Via JSON: YAML has no enumerations, which are among Lightning's defaults.
        text = self._parser(self.subcommand).dump(
            config, skip_validation=True, skip_unset=False, format="json"
        )
        self.plain: dict[str, Any] = json.loads(text)
        check_package(self.package, class_paths(self.plain), files)
        self.settings = {
            **{"package": self.package, "experiment": config.experiment},
            **decisive(self.plain),
        }
        if self.subcommand in TRAINING:
            check_limits(self.plain["trainer"])
            is_given = config.trainer.default_root_dir is not None
            if self.subcommand == "reproduce" and not (is_given or config.trainer.fast_dev_run):
                make_needed(self.package, self.words, self.settings, self._base(config))
            self.settings["files"] = contents(self.settings, self._base(config))
        if self.subcommand:
            self._place(config)

    def _base(self, config: Namespace) -> Path:
        """The directory of the experiment's first run."""
        if config.trainer.default_root_dir is not None:
            return Path(config.trainer.default_root_dir)
        return Path(config.runs, self.package, config.experiment, f"seed{config.seed_everything}")

    def _place(self, config: Namespace) -> None:
        """Fill in the run directory and what is in it."""
        is_requeued = int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0
        last = latest_of(self._base(config))[1] / "checkpoints" / "last.ckpt"
        if self.subcommand == "fit" and is_requeued and last.exists():
            config.ckpt_path = config.get("ckpt_path") or "last"
        run = self._run_directory(config)
        config.trainer.default_root_dir = str(run)
        if (name := config.get("ckpt_path")) is not None:
            stem = "selected" if name == "best" else name
            ours = run / "checkpoints" / f"{stem}.ckpt"
            config.ckpt_path = str(ours if name in NAMED else Path(name).absolute())
        if config.trainer.logger in (None, True):
            config.trainer.logger = tensorboard_in(run)

    def _run_directory(self, config: Namespace) -> Path:
        """Where this run writes; for training locked against other processes.

        ``fit`` never changes an earlier run: it takes the next free ``seed0-v1``. ``reproduce``
        resumes ``seed0`` if that was made with the same settings, and renames it if not.
        """
        base = self._base(config)
        number, latest = latest_of(base)
        checkpoint = config.get("ckpt_path")
        is_given = config.trainer.default_root_dir is not None
        its = Path(checkpoint).parent.parent if checkpoint else None
        if is_given or its is None or Path(checkpoint).parent.name != "checkpoints":
            its = None
        if self.subcommand not in TRAINING:
            return its or latest
        run = base
        if self.subcommand == "fit":
            if checkpoint in NAMED:
                run = latest
            elif its is not None:
                run = its
            elif (base / "checkpoints" / "last.ckpt").exists():
                run = base.with_name(f"{base.name}-v{number + 1}")
        if getattr(rank_zero_only, "rank", 0) != 0:
            return Path(os.environ.get("RUN_DIRECTORY", run))
        os.environ["RUN_DIRECTORY"] = str(run)  # for the ranks that this process starts
        if config.trainer.fast_dev_run:
            return run
        check_is_ours(run)
        # An interrupted make leaves its rows running: reproduce waits for them.
        self.lock = lock(run, timeout=0 if self.subcommand == "fit" else -1)
        if self.subcommand == "reproduce":
            set_aside_if_other(run, self.settings, is_given)
        remove_leftovers(run)
        return run

    def instantiate_classes(self) -> None:
        """Build everything; an error of a class about its arguments is a user's error."""
        try:
            super().instantiate_classes()
        except Exception as error:
            if one_line(error) is not None:
                raise
            raise ConfigurationError(refusal(error, explain(str(error)))) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add the callbacks that every run has."""
        config = self._get(self.config_init, "trainer", default={})
        extra: list[Callback] = [PredictionWriter()]
        if config.get("enable_progress_bar") is not False:
            extra.append(ProgressBar())
        if config.get("logger") and not config.get("fast_dev_run"):
            extra.append(LearningRateMonitor(logging_interval="step"))
        if config.get("enable_checkpointing") is not False and not config.get("fast_dev_run"):
            saving = self._get(self.config_init, "checkpoint")
            saving.dirpath = os.path.realpath(Path(config.default_root_dir or ".", "checkpoints"))
            extra.append(LastCheckpoint(saving.dirpath, saving.every_n_steps))
        if self.subcommand in TRAINING:
            optimizer_of(self.model)  # refuses its arguments before anything starts
        self.trainer_defaults = {**self.trainer_defaults, "callbacks": extra}
        trainer = cast(Trainer, super().instantiate_trainer(**kwargs))
        trainer.run.settings = self.settings
        evaluation = self._get(self.config_init, "evaluation")
        evaluation.experiment, evaluation.paper = self.settings["experiment"], self.package
        evaluation.config_digest = plain_digest(self.settings)
        evaluation.protocol = protocol_digest(self.plain)
        self._get(self.config_init, "monitoring").hyperparameters = self._hyperparameters()
        return trainer

    def _hyperparameters(self) -> dict[str, Any]:
        """For TensorBoard's table of runs: first what differs most often."""
        plain = self.plain
        rates = (plain["model"]["init_args"].get("optimizer") or {}).get("init_args") or {}
        radii = (plain["adversary"].get("attack") or {}).get("init_args") or {}
        first = {"lr": rates.get("lr"), "eps": radii.get("eps"), "seed": plain["seed_everything"]}
        rest = {key: plain[key] for key in ("experiment", "model", "adversary")}
        return {key: value for key, value in {**first, **rest}.items() if value is not None}


class SaveTrainingConfig(SaveConfigCallback):
    """Saves ``config.yaml`` for training only; Lightning's would overwrite it in a test."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Nothing: a resumed run may still be refused."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Write the file on rank zero, without the places that this run writes to."""
        if self.already_saved or not trainer.is_global_zero:
            return
        config = self.config.clone()
        config.pop("ckpt_path", None)
        config.update(None, "trainer.default_root_dir")
        logger = config.trainer.logger  # one, a list of them, or a truth value
        if isinstance(logger, Namespace) and logger.class_path == TENSORBOARD:
            config.update(None, "trainer.logger")
        text = self.parser.dump(config, skip_unset=False, skip_validation=True, format="json")
        text = yaml.safe_dump(json.loads(text), sort_keys=False)
        write_sealed_yaml(Path(trainer.default_root_dir) / "config.yaml", text)
        self.already_saved = True


def run(words: Sequence[str], package: str) -> int:
    """Run a subcommand whose words :mod:`common.cli.start` has checked; returns the exit status."""
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # between Lightning and torch 2.15
    try:
        cli = RobustCLI(package=package, args=words)
        if cli.trainer.is_global_zero and cli.subcommand is not None:
            print(confirmed(cli.trainer, cli.subcommand), flush=True)
    except SIGTERMException as stop:  # Lightning's own status would be 0
        return int(stop.code or 128 + signal.SIGTERM)
    return 0
