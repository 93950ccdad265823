"""Finds packages and their files: in a checkout, installed, or in the current folder."""

import importlib.util
from pathlib import Path

from common.errors import ConfigurationError


def package_folder(package: str) -> Path:
    """The folder of a package, without importing it; relative if it is in the current folder.

    Raises:
        ConfigurationError: If there is no such package.
    """
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ConfigurationError(
            f"there is no package {package!r}; there are {', '.join(papers()) or 'none'}. A paper "
            "of yours is found in the current folder"
        )
    folder = Path(next(iter(spec.submodule_search_locations)))
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder


def papers() -> list[str]:
    """Names of the packages of papers: those beside ``common`` and those in the current folder."""
    places = (Path(__file__).parents[1], Path.cwd())
    return sorted({path.parent.name for place in places for path in place.glob("paper_*/configs")})
