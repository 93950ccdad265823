"""The settings a run was made with: written into its checkpoints, compared before those are used.

They are what :func:`decisive` takes from a configuration, with ``package``,
``experiment`` and, under ``files``, digests of the files that settings name by path.
"""

import os
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from common.checkpoints import checkpoint_beside, load_checkpoint
from common.errors import CheckpointError, ConfigurationError
from common.files import file_digest
from common.packages import papers
from common.results.provenance import weights_digest
from common.settings import nodes, plain_digest, type_name

SETTINGS = "settings"
"""Key of a checkpoint under which they are."""

HORIZON = ("max_epochs", "max_steps", "min_epochs", "min_steps", "max_time")
"""Settings of the trainer that a resumed run may change: how long it is."""

OF_EVALUATION = (
    *("package", "experiment", "seed_everything", "model", "data", "adversary"),
    "weight_perturbation",
)
"""What has to agree where a checkpoint is tested, and its results are filed under a name."""

Settings = Mapping[str, Any]


# The sections and settings that decide which weights come out of a run.
TRAINING_SECTIONS = (
    *("seed_everything", "model", "data", "adversary", "weight_perturbation"),
    *("warm_start", "checkpoint"),
)
TRAINER_SETTINGS = (
    *("max_epochs", "max_steps", "precision", "gradient_clip_val"),
    *("gradient_clip_algorithm", "accumulate_grad_batches", "callbacks", "limit_train_batches"),
    *("limit_val_batches", "overfit_batches", "check_val_every_n_epoch", "min_epochs", "min_steps"),
    *("max_time", "val_check_interval", "plugins"),
)
UNDECISIVE = (
    *("root", "dirpath", "num_workers", "eval_batch_size", "test_limit"),
    "every_n_train_steps",  # of saving: a run that can go on from more places is the same run
)
OBSERVERS = (
    *("LearningRateMonitor", "DeviceStatsMonitor", "ModelSummary", "RichModelSummary"),
    *("TQDMProgressBar", "RichProgressBar", "ThroughputMonitor"),
)
"""Callbacks that show a run and decide nothing."""


def decisive(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that decide a run's weights; not those of where and how it runs."""
    found = {key: config.get(key) for key in TRAINING_SECTIONS}
    # The attack of validation chooses the checkpoint; the suite of test changes no weights.
    found["validation"] = (config.get("evaluation") or {}).get("validation")
    trainer = config.get("trainer") or {}
    settings = {key: trainer.get(key) for key in TRAINER_SETTINGS}
    if (callbacks := settings["callbacks"]) is not None:
        listed = callbacks if isinstance(callbacks, list) else [callbacks]
        kept = [c for c in listed if type_name(str(c.get("class_path"))) not in OBSERVERS]
        settings["callbacks"] = kept or None
    found["trainer"] = settings
    kept_settings: dict[str, Any] = _without_undecisive(found)
    return kept_settings


def _without_undecisive(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _without_undecisive(v) for k, v in value.items() if k not in UNDECISIVE}
    return [_without_undecisive(v) for v in value] if isinstance(value, list) else value


class Difference(NamedTuple):
    """A setting, by its name on the command line, in a checkpoint and as it is given now."""

    name: str
    made: Any
    given: Any

    def __str__(self) -> str:
        return f"{self.name}: {_short(self.made)} in the checkpoint, {_short(self.given)} given"


def settings_in(checkpoint: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    """The settings that a checkpoint was made with.

    Raises:
        CheckpointError: If there are none in it.
    """
    found = checkpoint.get(SETTINGS)
    if not isinstance(found, dict):
        raise CheckpointError(
            f"the checkpoint {path} does not say which settings it was made with (another "
            "program or an earlier version wrote it); train again, or evaluate its weights with "
            "python -m common.evaluation --model MODULE:FACTORY --weights FILE"
        )
    return found


def check_resumed(made: Settings, given: Settings, path: str | Path) -> None:
    """Compare before training goes on; the length of the run and its schedule may differ.

    Raises:
        CheckpointError: Listing the differences.
    """
    found = list(run_differences(_without_horizon(made), _without_horizon(given)))
    _refuse(
        found,
        path,
        "Give the settings of the run (config.yaml in its directory), or begin a new run: fit "
        "without --ckpt_path",
    )


def check_evaluated(made: Settings, given: Settings, path: str | Path) -> None:
    """Compare before a network is tested, asked or rebuilt.

    Raises:
        CheckpointError: Listing the differences.
    """
    stated = [key for key in OF_EVALUATION if key in made]
    made, given = (
        _without_schedule({key: one.get(key) for key in stated}) for one in (made, given)
    )
    for one in (made, given):  # how the attacks of training were computed
        if isinstance(adversary := one.get("adversary"), dict):
            adversary.pop("engine", None)
    _refuse(
        list(differences(made, given)),
        path,
        "Give the config it was made with (config.yaml in its run directory)",
    )


def evaluated_digest(made: Settings, given: Settings) -> str:
    """Digest of the settings behind a checkpoint that is tested.

    A run may have been extended after its selected checkpoint was written: how long it is comes
    from the settings given now, so that all checkpoints of a run have one digest.
    """
    longer = {key: (given.get("trainer") or {}).get(key) for key in HORIZON}
    trainer = {**(made.get("trainer") or {}), **longer}
    whole = {**_without_schedule(made), "trainer": trainer}
    return plain_digest({**whole, "scheduler": scheduler_of(given)})


def scheduler_of(settings: Settings) -> Any:
    """The settings of the learning-rate schedule; ``None`` without one."""
    return ((settings.get("model") or {}).get("init_args") or {}).get("scheduler")


def run_differences(made: Settings, given: Settings) -> Iterator[Difference]:
    """Differences between two runs; files are compared by content, not by path."""
    before, now = made.get("files") or {}, given.get("files") or {}
    known = before.keys() & now.keys()
    same = {name for name in known if before[name] == now[name]}
    for found in differences(_without(made, "files"), _without(given, "files")):
        if found.name not in same:
            yield found
    for name in sorted(known - same):
        yield Difference(f"content of {name}", before[name], now[name])


def differences(made: Any, given: Any, name: str = "") -> Iterator[Difference]:
    """The settings in which two plain configurations differ.

    Arguments of a class that the first does not state are not compared.
    """
    if isinstance(made, Mapping) and isinstance(given, Mapping):
        if made.get("class_path") != given.get("class_path"):
            yield Difference(name, made.get("class_path"), given.get("class_path"))
            return
        for key in [*made, *(key for key in given if key not in made)]:
            if key == "init_args":
                ours, theirs = (one.get(key) or {} for one in (made, given))
                theirs = {part: value for part, value in theirs.items() if part in ours}
                yield from differences(ours, theirs, name)
            else:
                inner = f"{name}.{key}" if name else str(key)
                yield from differences(made.get(key), given.get(key), inner)
    elif _are_listed(made, given):
        for place, (one, other) in enumerate(zip(made, given, strict=True)):
            yield from differences(one, other, f"{name}.{place}")
    elif made != given:
        yield Difference(name, made, given)


def _are_listed(made: Any, given: Any) -> bool:
    both = isinstance(made, list) and isinstance(given, list) and len(made) == len(given)
    return both and all(isinstance(one, Mapping) for one in [*made, *given])


def _refuse(found: list[Difference], path: str | Path, remedy: str) -> None:
    if not found:
        return
    listed = "; ".join(map(str, found[:8]))
    more = f"; and {len(found) - 8} more" if len(found) > 8 else ""
    raise CheckpointError(
        f"the checkpoint {path} was made with other settings than those given: {listed}{more}. "
        f"{remedy}"
    )


def _short(value: Any) -> str:
    if isinstance(value, Mapping) and "class_path" in value:
        value = type_name(str(value["class_path"]))
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _without(settings: Settings, name: str) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key != name}


def _without_schedule(settings: Settings) -> dict[str, Any]:
    model = settings.get("model")
    if isinstance(model, Mapping):
        arguments = _without(model.get("init_args") or {}, "scheduler")
        settings = {**settings, "model": {**model, "init_args": arguments}}
    return {key: dict(v) if isinstance(v, Mapping) else v for key, v in settings.items()}


def _without_horizon(settings: Settings) -> dict[str, Any]:
    """Settings without the length of the run, unless more than the schedule depends on it."""
    trainer = settings.get("trainer") or {}
    names = [type_name(str(c.get("class_path"))) for c in trainer.get("callbacks") or []]
    if "StochasticWeightAveraging" in names:
        return dict(settings)
    kept = {key: value for key, value in trainer.items() if key not in HORIZON}
    return {**_without_schedule(settings), "trainer": kept}


# ------------------------------------------------------------------- files that settings name


def contents(settings: Settings, run: str | Path) -> dict[str, str]:
    """Digests of the files that settings name, by setting; a file that is not there has none.

    Checkpoints named by ``path``, or by ``experiment`` beside the run, count by their weights. The
    network that takes them has to be the one they were made for. ``run`` is the run directory, or
    any other of the same experiment and seed.

    Raises:
        CheckpointError: If a checkpoint belongs to another network or experiment.
    """
    found: dict[str, str] = {}
    sections = (nodes(value, section) for section, value in settings.items())
    for name, node in chain.from_iterable(sections):
        if "checkpoint" in node and (node.get("path") or node.get("experiment")):
            key = "path" if node.get("path") else "experiment"
            path = (
                Path(str(node["path"]))
                if node.get("path")
                else checkpoint_beside(run, str(node["experiment"]), str(node["checkpoint"]))
            )
            if path.is_file():
                found[f"{name}.{key}"] = _origin(path, name, node, settings)
            continue
        for key, value in node.items():
            if isinstance(value, str) and {".", os.sep} & set(value) and _is_file(value):
                found[f"{name}.{key}"] = file_digest(Path(value))[:16]
    return found


def _origin(path: Path, name: str, node: Mapping[str, Any], settings: Settings) -> str:
    """Digest of a checkpoint's weights, once it is known to fit the network that takes them."""
    try:
        checkpoint = load_checkpoint(path)
    except CheckpointError:
        if not node.get("path"):
            raise
        return file_digest(path)[:16]  # bare weights; who loads them says what is wrong with them
    if not node.get("path") or SETTINGS in checkpoint:
        made = settings_in(checkpoint, path)
        theirs = _network(made)
        if net := node.get("net"):
            found = list(differences(theirs, net, f"{name}.net"))
        else:  # starting weights: masks and the like may differ, and are settings of its parts
            found = list(differences(_outline(theirs), _outline(_network(settings)), "model.net"))
        if not node.get("path"):
            found += differences(made.get("experiment"), node["experiment"], f"{name}.experiment")
        _refuse(found, path, f"Give {name} the network these weights were trained with")
    return weights_digest(checkpoint["state_dict"])[:16]


def _network(settings: Settings) -> Any:
    return ((settings.get("model") or {}).get("init_args") or {}).get("net")


def _outline(net: Any) -> Any:
    """A network's class and arguments; of its arguments only the classes."""

    def classes(value: Any) -> Any:
        if isinstance(value, Mapping) and "class_path" in value:
            return value["class_path"]
        if isinstance(value, Mapping):
            return {key: classes(part) for key, part in value.items()}
        return [classes(part) for part in value] if isinstance(value, list) else value

    if not isinstance(net, Mapping):
        return net
    return {**net, "init_args": classes(net.get("init_args") or {})}


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except OSError:  # far too long for a file's name
        return False


# ------------------------------------------------------------------------------ other packages


def check_package(package: str, classes: set[str], configs: list[str]) -> None:
    """Refuse a configuration whose classes or files are those of another paper than ``package``.

    Classes of several papers may be composed, if one of them is of ``package``.

    Raises:
        ConfigurationError: Naming the other paper.
    """
    known = set(papers())
    found = {path: path.partition(".")[0] for path in sorted(classes)}
    if package in found.values():
        found = {}
    for config in configs:
        folders = [part for part in Path(config).resolve().parts if part in known]
        found[config] = folders[-1] if folders else package
    for origin, other in found.items():
        if other.startswith("paper_") and other != package and package.startswith("paper_"):
            raise ConfigurationError(
                f"{origin} belongs to {other} and this is {package}; run python -m {other}, or "
                "give a config of this paper"
            )
