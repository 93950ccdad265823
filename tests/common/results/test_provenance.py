"""Which commit a result records."""

import os
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


def test_asking_for_changes_never_locks_the_index(tmp_path) -> None:
    """A run that is killed meanwhile would leave the lock, and no commit would work any more."""

    def git(*words: str) -> None:
        subprocess.run(["git", *words], cwd=tmp_path, check=True, capture_output=True)

    file = tmp_path / "common/code.py"
    file.parent.mkdir()
    file.write_text("x = 1\n")
    git("init", "-q")
    git("add", ".")
    os.utime(file, (0, 0))  # git reads the file again, and would write down that it is the same
    before = (tmp_path / ".git/index").read_bytes()
    assert provenance.code_changes(tmp_path) == ["common/code.py"]
    assert (tmp_path / ".git/index").read_bytes() == before
    git("status")
    assert (tmp_path / ".git/index").read_bytes() != before


def test_processors_of_one_name_and_unlike_instruction_sets_are_told_apart(monkeypatch) -> None:
    names = set()
    for capability in ("AVX2", "AVX512"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda c=capability: c)
        names.add(provenance.device_name("cpu"))
    first, second = sorted(names)
    assert first.removesuffix("AVX2") == second.removesuffix("AVX512")
