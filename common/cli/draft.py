"""The settings of a command before a parser sees them: files and options merged and checked.

Names and plain values are compared with what the classes take, as far as their source says.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, reduce
from pathlib import Path
from typing import Any

import yaml

from common.cli.declared import (
    Arguments,
    arguments_of,
    channels_of,
    classes_in,
    is_module,
    misfit,
    offered_instead,
)
from common.errors import ConfigurationError, check_in_pixels
from common.files import yaml_damage_of
from common.limits import check_yaml, read_yaml
from common.packages import CONFIGS, package_folder, papers
from common.parsing import denial
from common.settings import nearest, type_name

SECTIONS = {
    "model": "common.classifier.RobustClassifier",
    "data": "common.data.images.ImageDataModule",
    "trainer": "common.cli.trainer.Trainer",
    "warm_start": "common.callbacks.warm_start.WarmStart",
    "adversary": "common.callbacks.adversarial_training.AdversarialTraining",
    "weight_perturbation": "common.callbacks.weight_perturbation.AdversarialWeightPerturbation",
    "evaluation": "common.callbacks.robust_evaluation.RobustEvaluation",
    "monitoring": "common.callbacks.monitoring.Monitoring",
    "checkpoint": "common.callbacks.checkpointing.SelectedCheckpoint",
}
"""What the sections of a configuration are arguments of."""
PLAIN: Arguments = {
    **dict.fromkeys(("config", "print_config", "help", "verbose", "return_predictions"), ""),
    **{"seed_everything": "int", "experiment": "str | None", "runs": "str", "ckpt_path": ""},
    "attack": "str | None",
}
"""Settings that are no section, with their types."""
_META = ("class_path", "init_args", "dict_kwargs", "help")
RATES = {"lr": 0.1, "weight_decay": 5e-4, "momentum": 0.9}
"""Numbers of an optimiser that are not negative, with usual values."""
_CLASS = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)+")
_MOST_LINKS = 8
Settings = dict[str, Any]


def drafted(files: Sequence[Path], options: Sequence[tuple[str, str]]) -> Settings:
    """The settings of files and then options; later ones override earlier ones.

    Raises:
        ConfigurationError: If a file cannot be read, is damaged, or holds no settings by name.
    """
    settings: Settings = reduce(_merged, map(_read, files), {})
    for name, value in options:
        settings = _with(settings, name.removesuffix("+").split("."), _inline(value))
    return _with_sections(settings, "the command line")


def _read(path: Path) -> Settings:
    settings = read_yaml(path)
    if damage := yaml_damage_of(path):
        raise ConfigurationError(f"{path} is damaged: {damage}")
    if not isinstance(settings, dict):
        raise ConfigurationError(
            f"{path} holds no settings (sections such as model, data, trainer)"
        )
    whole = {key: _whole(value, path.parent) for key, value in settings.items()}
    return _with_sections(whole, path)


def _with_sections(settings: Settings, origin: Path | str) -> Settings:
    """The settings, after a check of the sections that no run does without."""
    for key in ("data", "trainer"):
        if not isinstance(value := settings.get(key, {}), Mapping):
            raise ConfigurationError(
                f"{origin}: {key} is {str(value)[:80]!r}, expected settings by name, or a YAML "
                "file of them"
            )
    return settings


def _whole(value: Any, folder: Path, links: int = 0) -> Any:
    """A value with the contents of the files that it refers to."""
    if isinstance(value, str) and value.endswith((".yaml", ".yml")) and links < _MOST_LINKS:
        path = folder / value
        return _whole(read_yaml(path), path.parent, links + 1) if path.is_file() else value
    if isinstance(value, Mapping):
        return {key: _whole(part, folder, links) for key, part in value.items()}
    return [_whole(part, folder, links) for part in value] if isinstance(value, list) else value


def _inline(value: str) -> Any:
    """The value of an option, which is YAML; a file of settings is read."""
    try:
        check_yaml(value)
        return _whole(yaml.safe_load(value), Path())
    except (yaml.YAMLError, ValueError):  # the second of a date that there is not
        return value


def _merged(old: Any, new: Any) -> Any:
    old = {"class_path": old} if isinstance(old, str) and _CLASS.fullmatch(old) else old
    if not isinstance(old, Mapping) or not isinstance(new, Mapping):
        return new
    if "class_path" in new and new["class_path"] != old.get("class_path"):
        return new
    return {**old, **{key: _merged(old.get(key), part) for key, part in new.items()}}


def _with(node: Any, parts: Sequence[str], value: Any) -> Any:
    """Settings in which one, by the parts of its name, has a new value."""
    if not parts:
        return _merged(node, value)
    node = {"class_path": node} if isinstance(node, str) else node
    node = dict(node) if isinstance(node, Mapping) else {}
    if "class_path" in node and parts[0] not in _META:
        parts = ("init_args", *parts)
    return {**node, parts[0]: _with(node.get(parts[0]), parts[1:], value)}


def check(settings: Settings) -> None:
    """Check names and plain values of merged settings.

    Raises:
        ConfigurationError: If a setting or class certainly does not exist, or a value has another
            type.
    """
    names = [*PLAIN, *dict(_named(settings))]
    for section, path in SECTIONS.items():
        names += [section, *(f"{section}.{name}" for name in arguments_of(path) or ())]
    for key, value in settings.items():
        if key in SECTIONS:
            node = value if isinstance(value, Mapping) else {}
            path = str(node.get("class_path", SECTIONS[key])) if key == "model" else SECTIONS[key]
            _check_node(key, path, value, names)
        elif key not in PLAIN:
            raise ConfigurationError(f"unknown option {key}{nearest(str(key), names)}")
        else:
            _check_value(key, value, PLAIN[key])
    _check_channels(settings)


def _named(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """All settings by their names on the command line."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            inner = place if key in _META else f"{place}.{key}" if place else str(key)
            yield inner, part
            yield from _named(part, inner)


def _check_node(place: str, path: str, value: Any, names: Sequence[str]) -> None:
    """Check the arguments of a class, or of something unknown if ``path`` is empty."""
    if isinstance(value, list):
        for part in value:
            _check_node(place, _class_of(part), part, names)
        return
    others = offered_instead(path) if path else None
    if others is not None:
        missing = f"{place}: there is no {path}"
        raise ConfigurationError(f"{missing}{nearest(path.rpartition('.')[2], others)}")
    if not isinstance(value, Mapping):
        return
    known = arguments_of(path) if path else None
    arguments = value.get("init_args") or {} if "class_path" in value else value
    for word, part in arguments.items() if isinstance(arguments, Mapping) else ():
        key = str(word).removesuffix("+")  # which appends to a list
        if known is not None and key not in known and key not in _META:
            candidates = names if place in SECTIONS else [f"{place}.{name}" for name in known]
            name = f"{place}.{key}"
            raise ConfigurationError(f"unknown option {name}{nearest(name, candidates)}")
        if known is not None and key in known:
            _check_value(f"{place}.{key}", part, known[key])
        kind = "" if known is None else known.get(key, "")
        _check_meaning(f"{place}.{key}", part, kind, arguments if "norm" in (known or ()) else {})
        named = _class_of(part)
        _check_node(f"{place}.{key}", named, part, names)


def _check_meaning(name: str, value: Any, kind: str, beside: Mapping[str, Any]) -> None:
    """Check what a value means.

    Args:
        name: Of the setting.
        value: Its value.
        kind: The annotation in the source, if it is known.
        beside: Arguments of the same class, if a norm is among those that it takes.
    """
    key, number = name.rpartition(".")[2], number_of(value)
    if key in RATES and number < 0:
        raise ConfigurationError(
            f"{name} is {value}, expected a number from 0 on; {RATES[key]} is usual"
        )
    if key == "eps" and beside.get("norm", "linf") == "linf":
        check_in_pixels(name, number)
    named = _class_of(value)
    is_class = isinstance(value, Mapping) or kind == "nn.Module"
    if is_class and (problem := denial(named)):
        raise ConfigurationError(f"{name}: {named} {problem}")
    if kind == "nn.Module" and named and not is_module(named):
        raise ConfigurationError(
            f"{name} is {named}, which is no network; name a class derived from "
            "torch.nn.Module, or a function that makes one"
        )
    if isinstance(value, str) and value.isidentifier() and kind.isidentifier():
        known = _own_classes()
        if kind in known and value not in known and yaml.safe_load(value) is not None:
            near = nearest(value, known.values())
            raise ConfigurationError(f"{name}: there is no class {value!r}{near}")


@cache
def _own_classes() -> dict[str, str]:
    return classes_in([CONFIGS.parent, *map(package_folder, papers())])


def _check_channels(settings: Settings) -> None:
    source = _class_of(settings.get("data", {}).get("source"))
    if source and (channels := channels_of(source)) is not None:
        for name, value in _named(settings.get("model"), "model"):
            check_channels(name, _class_of(value), source, channels)


def check_channels(name: str, network: str, source: str, channels: int) -> None:
    """Refuse a network of torchvision, which takes images of 3 channels, for other images.

    Args:
        name: Of the setting.
        network: Import path of what it names.
        source: Import path of the source of the images.
        channels: Of the images.
    """
    if network.startswith("torchvision.models.") and channels != 3:
        raise ConfigurationError(
            f"{name} is {network}, which takes images of 3 channels, and {type_name(source)} has "
            f"{channels}; choose a network of common.networks or other data"
        )


def number_of(value: Any) -> float:
    """A number, or text of one such as 1e-4, which is none in YAML; else not a number."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _class_of(value: Any) -> str:
    """The class that a setting names, empty if it names none."""
    named = value.get("class_path") if isinstance(value, Mapping) else value
    return named if isinstance(named, str) and _CLASS.fullmatch(named) else ""


def _check_value(name: str, value: Any, annotation: str) -> None:
    if expected := misfit(value, annotation):
        raise ConfigurationError(f"{name}: expected {expected}, got {str(value)[:80]}")
