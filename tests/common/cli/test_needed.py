"""``reproduce`` makes the experiments that its own starts or learns from."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from common.cli import needed

RUN = Path("runs/paper_own/last/seed1")
SETTINGS: dict[str, Any] = {
    "experiment": "last",
    "checkpoint": {"monitor": "val/clean_acc"},
    "warm_start": {"experiment": "then", "checkpoint": "selected", "path": None},
    "model": {"init_args": {"teacher": {"experiment": "first", "checkpoint": "last"}}},
}


@pytest.fixture
def configs(tmp_path, monkeypatch) -> Path:
    """Configs of a paper of the user's in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    folder = Path("paper_own/configs")
    folder.mkdir(parents=True)
    for stem in ("first", "then", "last"):
        (folder / f"{stem}.yaml").touch()
    return folder


@pytest.fixture
def asked(monkeypatch) -> list[list[str]]:
    """Commands that would have been run; the file ``status`` says how they end."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> SimpleNamespace:
        commands.append(command[3:])
        return SimpleNamespace(returncode=3 if Path("fails").exists() else 0)

    monkeypatch.setattr(needed.subprocess, "run", run)
    return commands


def test_what_is_missing_is_made_with_the_same_options(configs, asked) -> None:
    before, after = (
        ["reproduce", "--config=bf16.yaml"],
        ["--config=own.yaml", "--seed_everything=1"],
    )
    words = [*before, f"--config={configs}/last.yaml", "--experiment=last", *after]
    needed.make_needed("paper_own", words, SETTINGS, RUN)
    made = {
        stem: [*before, f"--config={configs}/{stem}.yaml", *after] for stem in ("then", "first")
    }
    assert sorted(asked) == sorted(made.values())


def test_what_is_there_or_would_be_made_by_several_processes_is_not_made(
    configs, asked, monkeypatch
) -> None:
    words = ["reproduce", f"--config={configs}/last.yaml"]
    there = RUN.parents[1] / "then/seed1/checkpoints/selected.ckpt"
    there.parent.mkdir(parents=True)
    there.touch()
    (configs / "first.yaml").unlink()  # of another paper, or a name of the user's
    needed.make_needed("paper_own", words, SETTINGS, RUN)
    there.unlink()
    needed.make_needed("paper_own", ["reproduce", "--config=last.yaml"], SETTINGS, RUN)
    monkeypatch.setenv("WORLD_SIZE", "2")
    needed.make_needed("paper_own", words, SETTINGS, RUN)
    assert asked == []
    monkeypatch.delenv("WORLD_SIZE")
    Path("fails").touch()
    with pytest.raises(SystemExit) as ended:
        needed.make_needed("paper_own", words, SETTINGS, RUN)
    assert ended.value.code == 3
    assert len(asked) == 1


@pytest.mark.slow
def test_a_chain_of_experiments_is_reproduced_by_one_command(configs, tiny_text) -> None:
    main = "from common.cli.start import main\nmain(package='paper_own')\n"
    (configs.parent / "__main__.py").write_text(main)
    (configs.parent / "__init__.py").touch()
    for stem, before in (("first", None), ("then", "first"), ("last", "then")):
        start = {"warm_start": {"experiment": before}} if before else {}
        (configs / f"{stem}.yaml").write_text(yaml.safe_dump(yaml.safe_load(tiny_text) | start))
    command = f"-m paper_own reproduce --config {configs}/last.yaml --seed_everything 1".split()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *command], env=environment, check=True)
    made = sorted(path.parts[2] for path in Path("runs/paper_own").glob("*/seed1/results.json"))
    assert made == ["first", "last", "then"]
