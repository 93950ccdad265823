"""Which commit a result records."""

import runpy
import shutil
import subprocess
from pathlib import Path

import torch

from common.results import provenance


def collected(file: Path) -> dict[str, object]:
    """What code in this file records."""
    collect = runpy.run_path(str(file))["collect"]
    found: dict[str, object] = collect(torch.device("cpu"), 1, "32", {}, "", 0.0, {})
    return found


def test_a_commit_is_recorded_only_of_the_repository_that_holds_the_code(tmp_path) -> None:
    def git(*words: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words]
        return subprocess.run(
            command, cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    installed = tmp_path / "venv/lib/common/results/provenance.py"
    installed.parent.mkdir(parents=True)
    shutil.copy(provenance.__file__, installed)
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "of another project")
    found = collected(installed)
    assert (found["commit"], found["dirty"]) == (None, None)
    git("add", ".")
    git("commit", "-q", "-m", "now it is part of it")
    found = collected(installed)
    assert (found["commit"], found["dirty"]) == (git("rev-parse", "HEAD").strip(), False)
