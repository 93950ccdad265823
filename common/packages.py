"""Finds packages and their files: in a checkout, installed, or in the current folder."""

import difflib
import importlib.util
import os
import shlex
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from common.errors import ConfigurationError
from common.limits import read_yaml

CONFIGS = Path(__file__).parent / "configs"


def package_folder(package: str) -> Path:
    """The folder of a package, without importing it; relative if it is in the current folder.

    ``benchmarks.robustness`` is one too.

    Raises:
        ConfigurationError: If there is no such package.
    """
    is_name = all(map(str.isidentifier, package.split(".")))
    try:
        spec = importlib.util.find_spec(package) if is_name else None
    except ModuleNotFoundError:  # the package around it
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise ConfigurationError(
            f"there is no package {package!r}; there are {', '.join(papers()) or 'none'}. A paper "
            "of yours is found in the current folder"
        )
    folder = Path(next(iter(spec.submodule_search_locations)))
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder


def short_name(package: str) -> str:
    """What stands for NAME in the targets of make: ``cifs``, ``robustness``."""
    return package.removeprefix("paper_").removeprefix("benchmarks.")


def reproduction(package: str, on: str, *seeds: int | str) -> str:
    """The command that makes a selection of rows, with these seeds or with the usual ones."""
    command = f"make reproduce-{short_name(package)} ON={shlex.quote(on)}"
    return f'{command} SEEDS="{" ".join(map(str, seeds))}"' if seeds else command


def papers() -> list[str]:
    """Names of the packages of papers: those beside ``common`` and those in the current folder."""
    places = (Path(__file__).parents[1], Path.cwd())
    return sorted({path.parent.name for place in places for path in place.glob("paper_*/configs")})


def say_shadowed(*names: str) -> None:
    """Say, in a line each on standard error, which packages hide others of the same name.

    ``python -m`` looks in the current folder first. A ``common`` that is not this one is noticed
    by the packages of papers, before they import from it.
    """
    for name in names:
        folders = (Path(place or ".", name).resolve() for place in sys.path)
        found = list(dict.fromkeys(f for f in folders if (f / "__init__.py").is_file()))
        if len(found) > 1 and os.environ.get("LOCAL_RANK", "0") == "0":
            print(
                f"note: {name} is taken from {found[0]}, which comes before {found[1]}; rename it "
                "or run from another folder if that is not meant",
                file=sys.stderr,
            )


def yaml_files(folder: Path) -> dict[str, Path]:
    """The YAML files of a folder, by stem."""
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def data_sections() -> dict[str, Path]:
    """The data sections among the shared configurations, by name."""
    return {k: path for k, path in yaml_files(CONFIGS).items() if "source:" in path.read_text()}


def ready_suites() -> dict[str, Path]:
    """The shared configurations with attacks or an audit, by name."""
    return {
        name: path
        for name, path in yaml_files(CONFIGS).items()
        if {"suite", "audit"} & set((read_yaml(path) or {}).get("evaluation", ()))
    }


def file_named(name: str, known: Mapping[str, Path], what: str) -> Path:
    """A YAML file by its path, or by its name among the known ones.

    Raises:
        ConfigurationError: If there is none; it names the nearest, or all if they are few.
    """
    path = Path(name)
    if name in known and not path.is_file():
        return known[name]
    if path.exists():
        return path
    if name and path.suffix not in (".yaml", ".yml") and path.name == name:
        raise ConfigurationError(f"there is no {what} {name!r}{nearest_of(name, known)}")
    beside = [file.name for file in path.parent.glob("*.yaml")]
    near = nearest_of(path.name, beside) if beside else nearest_of(path.stem, known)
    raise ConfigurationError(f"{name} does not exist{near}")


def nearest_of(name: str, known: Iterable[str]) -> str:
    """A hint at the nearest names; at all of them where few and none is near."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if near:
        return f"; did you mean {' or '.join(near)}?"
    shown = names if len(names) <= 20 else [*names[:3], "..."]
    return f"; there are {', '.join(shown)}" if shown else ""
