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
        words: The command line, subcommand included.
        settings: Of this run.
        run: Its run directory.

    Raises:
        SystemExit: If one fails, with its status.
    """
    place = _place_of(words, settings["experiment"])
    processes = os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or "1"
    if package not in papers() or place is None or processes != "1":
        return
    for stem, checkpoint in _named(settings):
        config = package_folder(package) / "configs" / f"{stem}.yaml"
        if checkpoint_beside(run, stem, checkpoint).is_file() or not config.is_file():
            continue
        print(f"{settings['experiment']} takes weights of {stem}, which comes first", flush=True)
        option = words[place].rpartition("=")[:2] if "=" in words[place] else ()
        its = [*words[:place], "".join([*option, str(config)]), *words[place + 1 :]]
        is_script = Path(sys.argv[0]).name == package.replace("_", "-")  # of [project.scripts]
        program = [sys.argv[0]] if is_script else ["-m", package]
        if status := subprocess.run([sys.executable, *program, *its], check=False).returncode:
            raise SystemExit(status)


def _place_of(words: Sequence[str], experiment: str) -> int | None:
    """Where the command line names the experiment's file; ``None`` if it does not."""
    for place, (before, word) in enumerate(zip(["", *words], words, strict=False)):
        option, _, value = word.rpartition("=")
        if (option or before) in ("--config", "-c") and Path(value).stem == experiment:
            return place
    return None


def _named(settings: Settings) -> Iterator[tuple[str, str]]:
    """The other experiments that settings name, each with which checkpoint of it."""
    for _, node in chain.from_iterable(map(nodes, settings.values())):
        if "checkpoint" in node and node.get("experiment") and not node.get("path"):
            yield str(node["experiment"]), str(node["checkpoint"])
