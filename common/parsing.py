"""Parsers of configurations, and what a configuration, of unknown origin, may name.

A class or function that it names must be defined in the module that it names, which may not be of
the standard library or a part of torch or Lightning without use here. Of other installed packages
it may name networks, optimisers, schedules and the like, and functions that return them; of the
user's own modules, anything.
"""

import importlib
import inspect
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

from jsonargparse import ArgumentParser, Namespace, set_parsing_settings
from jsonargparse._loaders_dumpers import get_yaml_default_loader

from common.errors import ConfigurationError
from common.limits import LARGEST_INTEGER, check_yaml

__all__ = ["ArgumentParser", "build", "check_named", "load_named"]

_BOTH = ("accelerators", "loggers", "plugins", "strategies")
ALLOWED = (
    *("torch.nn", "torch.optim", "lightning.pytorch.cli.ReduceLROnPlateau"),
    *("lightning.pytorch.callbacks", "lightning.pytorch.profilers"),
    *(f"lightning.{package}.{part}" for package in ("pytorch", "fabric") for part in _BOTH),
)
DENIED = (
    *sorted(sys.stdlib_module_names),
    *("torch", "lightning", "pytorch_lightning", "lightning_fabric", "jsonargparse"),
    *(
        "common.cli.main",
        "common.cli.start",
        "common.files",
        "common.cli.rows",
        "common.cli.submit",
    ),
)
"""Modules of which a configuration may name only what is under one of the above."""

MUST_NOT = (
    "must not be named in a configuration, since it may run commands or reach files; name a class "
    "or function of torch.nn, torch.optim, Lightning, this project or a module of your own"
)

_PATH = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)+")
_OURS = re.compile(r"(?:common|paper_\w+)(?:\.|$)")
_KINDS = ("torch", "lightning", "common")
_LOADER: Any = get_yaml_default_loader()  # type: ignore[no-untyped-call]


def _begin(self: Any, text: str) -> None:
    """Read a text after its limits are checked."""
    check_yaml(text)
    super(_LOADER, self).__init__(text)


# Strings inside of files and options are read as YAML too, by this loader.
_LOADER.__init__ = _begin
set_parsing_settings(
    instantiate_subclass_spec_in_any=False,
    import_path_denylist=list(DENIED),
    import_path_allowlist=list(ALLOWED),
)


def build(types: Mapping[str, Any], values: Mapping[str, Any]) -> Any:
    """Build objects of the given types from plain values, by name; missing ones become ``None``.

    Raises:
        ConfigurationError: If something is named that a configuration must not name.
        ArgumentError, ValueError, TypeError: If a value is of another type.
    """
    parser = ArgumentParser(exit_on_error=False)
    for name, kind in types.items():
        parser.add_argument(f"--{name}", type=kind, default=None)
    config = parser.parse_object(dict(values))
    check_named(config)
    return parser.instantiate(config)


def check_named(config: Any, place: str = "") -> None:
    """Check every class, function and integer in a configuration before anything is built.

    Args:
        config: What a parser returned, or plain values.
        place: Its name as a setting.

    Raises:
        ConfigurationError: If a class is not defined where the configuration says or must not be
            named in one, or an integer needs more than 64 bits.
    """
    where = f"{place}: " if place else ""
    if isinstance(config, Namespace | Mapping):
        items = vars(config) if isinstance(config, Namespace) else config
        if isinstance(path := items.get("class_path"), str):
            load_named(path, where)
        for key, part in items.items():
            inner = place if key == "init_args" else f"{place}.{key}" if place else str(key)
            check_named(part, inner)
    elif isinstance(config, list | tuple):
        for number, part in enumerate(config):
            check_named(part, f"{place}[{number}]")
    elif isinstance(config, int) and abs(config) > LARGEST_INTEGER:
        raise ConfigurationError(f"{where}the number is too large: it has more than 18 digits")
    elif inspect.isclass(config) or inspect.isroutine(config):
        name = f"{config.__module__}.{config.__qualname__}"
        if problem := _origin_problem(config, name):
            raise ConfigurationError(f"{where}{name} {problem}")


def load_named(path: str, where: str = "") -> Any:
    """The class or function that a configuration names; messages begin with ``where``.

    Raises:
        ConfigurationError: If there is none, it is defined elsewhere, or must not be named.
    """
    module, _, name = path.rpartition(".")
    problem = denial(path) if _PATH.fullmatch(path) else "is no import path"
    if not problem:
        try:
            found = getattr(importlib.import_module(module), name)
            problem = _origin_problem(found, path)
        except Exception as error:  # a module can raise anything when it is imported
            problem = f"cannot be imported ({' '.join(str(error).split())[:200]})"
    if problem:
        raise ConfigurationError(f"{where}{path} {problem}")
    return found


def _origin_problem(found: Any, path: str) -> str:
    """What is wrong with an object that a configuration names; empty if nothing is."""
    module = path.rpartition(".")[0]
    home = getattr(found, "__module__", None) or module  # functions in C have none
    if not (inspect.isclass(found) or inspect.isroutine(found)):
        return "is neither a class nor a function"
    if problem := denial(f"{home}.{found.__name__}"):
        return problem
    if home != module and not home.startswith(f"{module}."):
        return f"is defined in {home}; name it {home}.{found.__qualname__}"
    if _is_installed(home) and not _is_known_kind(found):
        return (
            "is of an installed package, of which a configuration names networks, optimisers and "
            "other classes that derive from those of torch or Lightning; write it into a module "
            "of your own"
        )
    return ""


def _is_under(path: str, names: tuple[str, ...]) -> bool:
    return any(path == name or path.startswith(f"{name}.") for name in names)


def denial(path: str) -> str:
    """Why a configuration must not name a class or function, empty if it may."""
    return MUST_NOT if _is_under(path, DENIED) and not _is_under(path, ALLOWED) else ""


def _is_installed(home: str) -> bool:
    """Whether a module belongs to an installed package that the lists above do not name."""
    if _OURS.match(home) or _is_under(home, ALLOWED):
        return False
    package = sys.modules.get(home.partition(".")[0])
    places = [*getattr(package, "__path__", ()), getattr(package, "__file__", None)]
    parts = {part for place in places if place for part in Path(place).parts}
    return bool(parts & {"site-packages", "dist-packages"})


def _is_known_kind(found: Any) -> bool:
    """Whether it is, or returns, a class that derives from one of torch, Lightning or ours."""
    made = found
    if not inspect.isclass(found):
        try:
            made = get_type_hints(found).get("return")
        except Exception:  # annotations of another package need not be resolvable
            return False
    bases = inspect.getmro(made) if inspect.isclass(made) else ()
    return any(base.__module__.partition(".")[0] in _KINDS for base in bases)
