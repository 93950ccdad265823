"""What the names of models and data stand for, found without torch."""

import importlib
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from common.errors import ConfigurationError, RunDirectoryError
from common.packages import data_sections, file_named, package_folder, reproduction

COLLECTIONS = {
    "robustbench": (
        "robustbench.utils",
        "git+https://github.com/RobustBench/robustbench.git, in an environment of its own (it "
        "needs old versions)",
    ),
    "timm": ("timm", "timm"),
    "torchvision": ("torchvision.models", "torchvision"),
    "hf": ("transformers", "transformers"),
}
"""Collections of models by prefix: the module that loads them, and what to install."""
TORCHVISION = "torchvision:"
"""Before the name of a class of ``torchvision.datasets``."""


def check_model_name(name: str) -> None:
    """Raise what :func:`common.evaluation.named_models.find_model` would, as far as is known."""
    place, _, rest = name.partition(":")
    if rest and place in COLLECTIONS:
        if not _is_there(COLLECTIONS[place][0].partition(".")[0]):
            raise lacking(name)
    elif run_of(name) is None:
        problem = "no factory is named behind a colon, and it is no folder of a run"
        if rest:
            problem = f"no module {place.partition('.')[0]!r} is here"
        if not rest or not _is_there(place.partition(".")[0]):
            raise no_model(name, problem)


def check_data_name(name: str) -> None:
    """Raise a ConfigurationError if neither a section nor a file nor a folder has this name."""
    if not is_stream(name):
        file_named(name, data_sections(), "data section")


def is_stream(name: str) -> bool:
    """Whether these data are a class of torchvision or a folder of images, not a data section."""
    is_folder = name not in data_sections() and Path(name).is_dir()
    return name.startswith(TORCHVISION) or is_folder


def run_of(name: str) -> Path | None:
    """The folder of a run: ``name`` itself, or what ``PACKAGE:EXPERIMENT[-seedK]`` stands for.

    ``None`` if the name is neither.

    Raises:
        RunDirectoryError: If the experiment is there, and has no run in ``runs``.
    """
    if Path(name).is_dir():
        return Path(name)
    package, _, result = name.partition(":")
    found = re.fullmatch(r"([\w.+-]+?)(?:-seed(\d+))?", result)
    if found is None:
        return None
    experiment, seed = found[1], found[2] or "0"
    try:
        configs = package_folder(package) / "configs"
    except (ConfigurationError, ValueError):  # a ValueError is about __main__
        return None
    if not (configs / f"{experiment}.yaml").is_file():
        return None
    run = Path("runs", package, experiment, f"seed{seed}")
    if not (run / "config.yaml").is_file():
        raise RunDirectoryError(
            f"{name} needs the weights of its run, and {run} holds none; make it with "
            f"{reproduction(package, experiment, seed)}"
        )
    return run


def library_of(name: str) -> ModuleType:
    """The module that loads the models of a collection.

    Raises:
        ConfigurationError: If it is not installed.
    """
    try:
        return importlib.import_module(COLLECTIONS[name.partition(":")[0]][0])
    except ImportError as error:
        raise lacking(name, error) from error


def lacking(name: str, error: ImportError | None = None) -> ConfigurationError:
    """The error for a model whose collection is not installed."""
    module, package = COLLECTIONS[name.partition(":")[0]]
    missing = (error.name if error else None) or module.partition(".")[0]
    reason = f" ({error})" if error else ""
    return ConfigurationError(
        f"{name} needs the package {missing}, which cannot be imported{reason}; "
        f"pip install {package}"
    )


def no_model(name: str, problem: object) -> ConfigurationError:
    """The error for a name that stands for no model."""
    return ConfigurationError(
        f"--model is {name!r}, expected package.module:factory, a run's folder, or "
        f"{', '.join(f'{prefix}:NAME' for prefix in COLLECTIONS)} ({problem})"
    )


def _is_there(module: str) -> bool:
    """Whether a top-level module is loaded or can be found, also in the current folder."""
    if module in sys.modules:
        return sys.modules[module] is not None
    sys.path.insert(0, "")
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False
    finally:
        sys.path.remove("")
