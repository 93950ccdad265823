"""Before an experiment is reproduced: those of its paper whose weights it takes."""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

from common.checkpoints import checkpoint_beside
from common.packages import package_folder, papers
from common.results.identity import Settings
from common.settings import nodes


def make_needed(package: str, words: Sequence[str], settings: Settings, run: Path) -> None:
    """Reproduce the experiments whose weights are named and not there, with the same options.

    Several processes do nothing: each would make them.

    Args:
        package: The paper.
        words: The command line, ``NAME=VALUE`` after the subcommand; it has to name an experiment
            of the paper.
        settings: Of this run.
        run: Its run directory.

    Raises:
        SystemExit: If one fails, with its status.
    """
    processes = os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or "1"
    if package not in papers() or processes != "1":
        return
    configs = package_folder(package) / "configs"
    given = (word for word in words if word.startswith("--config="))
    own = (word for word in given if _is_in(configs, word.partition("=")[2]))
    if (experiment := next(own, None)) is None:
        return
    for stem, checkpoint in _named(settings):
        config = configs / f"{stem}.yaml"
        if checkpoint_beside(run, stem, checkpoint).is_file() or not config.is_file():
            continue
        print(f"{settings['experiment']} takes weights of {stem}, which comes first", flush=True)
        its = [word for word in words if not word.startswith("--experiment=")]
        its[its.index(experiment)] = f"--config={config}"
        is_script = Path(sys.argv[0]).name == package.replace("_", "-")  # of [project.scripts]
        program = [sys.argv[0]] if is_script else ["-m", package]
        if status := subprocess.run([sys.executable, *program, *its], check=False).returncode:
            raise SystemExit(status)


def _is_in(folder: Path, file: str) -> bool:
    return Path(file).resolve().parent == folder.resolve()


def _named(settings: Settings) -> Iterator[tuple[str, str]]:
    """The other experiments that settings name, each with which checkpoint of it."""
    for _, node in chain.from_iterable(map(nodes, settings.values())):
        if "checkpoint" in node and node.get("experiment") and not node.get("path"):
            yield str(node["experiment"]), str(node["checkpoint"])
