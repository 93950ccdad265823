"""What pyproject.toml requires, beside constraints.txt, the imports, and what is installed."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NEEDED = [Requirement(line) for line in PROJECT["dependencies"]]
EXTRA = {
    name: [Requirement(line) for line in lines if not line.startswith(PROJECT["name"])]
    for name, lines in PROJECT["optional-dependencies"].items()
}
ALL = [*NEEDED, *EXTRA["test"], *EXTRA["dev"]]


def name_of(requirement: Requirement) -> str:
    return canonicalize_name(requirement.name)


def pins(lines: Iterable[str]) -> dict[str, str]:
    """Versions by name."""
    pairs = (line.split("==") for line in lines if "==" in line)
    return {canonicalize_name(name): version.strip() for name, version in pairs}


@pytest.fixture(scope="module")
def lowest() -> dict[str, str]:
    command = [sys.executable, ROOT / "tests/oldest.py"]
    return pins(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.parametrize("requirement", ALL, ids=lambda requirement: requirement.name)
def test_the_pinned_version_lies_within_the_bounds(requirement):
    pinned = pins((ROOT / "constraints.txt").read_text().splitlines())
    assert requirement.specifier.contains(pinned[name_of(requirement)])


def test_every_requirement_has_a_lowest_version_to_be_tested_with(lowest):
    tested = [*NEEDED, *EXTRA["test"]]
    assert lowest.keys() == {name_of(requirement) for requirement in tested}
    for requirement in tested:
        assert requirement.specifier.contains(lowest[name_of(requirement)])


def test_every_library_that_the_product_imports_is_required():
    named = {"yaml": "pyyaml", "PIL": "pillow", "sklearn": "scikit-learn"}
    optional = {"submitit"}
    ours = {"common", *(path.name for path in ROOT.glob("paper_*"))}
    imported: set[str] = set()
    for path in (path for package in ours for path in (ROOT / package).rglob("*.py")):
        if "skeleton" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(str(node.module).partition(".")[0])
    known = ours | optional | set(sys.stdlib_module_names)
    wanted = {canonicalize_name(named.get(name, name)) for name in imported - known}
    assert wanted == {name_of(requirement) for requirement in NEEDED}


def test_no_requirement_brings_packages_under_names_of_others():
    """Some attack libraries install old copies of RobustBench and AutoAttack as top-level packages.

    Packages that are installed beside the requirements do not count.
    """
    strays: list[str] = []
    waiting = [(requirement, "") for requirement in ALL]
    seen: set[tuple[str, str]] = set()
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        for wanted in ("", *requirement.extras):
            if (key := (name_of(requirement), wanted)) in seen:
                continue
            seen.add(key)
            try:
                installed = distribution(requirement.name)
            except PackageNotFoundError:  # of dev, where the tests run without it
                continue
            waiting += [(Requirement(line), wanted) for line in installed.requires or []]
            files = installed.read_text("RECORD") or ""
            strays += re.findall(r"^(?:autoattack|robustbench|torchattacks|art)/.*", files, re.M)
    assert {("numpy", ""), ("eagerpy", ""), ("jsonargparse", "signatures")} <= seen
    assert not strays
