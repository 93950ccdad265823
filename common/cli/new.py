"""The skeleton of a paper: ``python -m common.cli.new NAME`` writes ``paper_NAME`` and its test."""

import argparse
import keyword
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from string import Template

from common.errors import ConfigurationError, UserError

SKELETON = Path(__file__).parent / "skeleton"


def make(name: str, root: Path) -> list[Path]:
    """Write the files of ``paper_<name>`` into a repository; returns them.

    Raises:
        ConfigurationError: If the name is no name of a package or is taken, the folder is no
            checkout, or its ``pyproject.toml`` has no lists of papers.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise ConfigurationError(
            f"a paper's name has small letters, digits and underscores, got {name!r}; for instance "
            "make new PAPER=mart"
        )
    package = f"paper_{name}"
    if (root / package).exists():
        raise ConfigurationError(f"there is a folder {package} already; choose another name")
    project = root / "pyproject.toml"
    if not project.is_file():
        raise ConfigurationError(
            f"there is no {project}; run this in the root folder of a checkout"
        )
    text = _listed(project.read_text(), package)
    title = "".join(part.capitalize() for part in name.split("_"))
    written = []
    for template in sorted(SKELETON.rglob("*.template")):
        path = str(template.relative_to(SKELETON)).removesuffix(".template")
        target = root / path.replace("NAME", name)
        target.parent.mkdir(parents=True, exist_ok=True)
        content = Template(template.read_text(encoding="utf-8"))
        target.write_text(content.substitute(name=name, title=title), encoding="utf-8")
        written.append(target)
    project.write_text(text)
    return written


def _listed(text: str, package: str) -> str:
    """The text of ``pyproject.toml`` with one more paper, which has to be named there."""
    text, roots = re.subn(r'(root_packages = \[[^\]]*"paper_\w+")', rf'\1, "{package}"', text)
    command = f'{package.replace("_", "-")} = "{package}.__main__:run"'
    text, commands = re.subn(r"(\[project\.scripts\]\n(?:\S.*\n)+)", rf"\1{command}\n", text)
    text, layers = re.subn(r"(\| paper_\w+)( \| benchmarks)", rf"\1 | {package}\2", text)
    if roots != 1 or layers < 1 or commands != 1:
        raise ConfigurationError(
            "pyproject.toml does not list the papers as it did (scripts; root_packages and layers "
            "of import-linter); enter the new one by hand"
        )
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Write the skeleton into the current folder; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m common.cli.new", description=__doc__)
    parser.add_argument("name", help="of the paper, as in paper_NAME")
    try:
        written = make(parser.parse_args(argv).name, Path())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(*written, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
