"""``make new``: the skeleton of a paper is right from the start."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from common.cli.new import make
from common.cli.start import main
from common.errors import ConfigurationError
from common.results import tables

ROOT = Path(__file__).parents[3]


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A copy of the project, as far as a new paper needs it, with the paper ``a_b``."""
    for name in ("common", "benchmarks", *(path.name for path in ROOT.glob("paper_*"))):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    make("a_b", tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path.cwd())}
    done = subprocess.run(
        [sys.executable, "-m", *words], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_new_paper_trains_is_tested_and_has_a_table(project, batch, capsys) -> None:
    for command in (("format", "--check"), ("check",)):
        run("ruff", *command, "--no-cache", "paper_a_b", "tests")
    config = "paper_a_b/configs/digits_resnet_a_b.yaml"
    quick = ["--trainer.fast_dev_run", "true", "--trainer.enable_progress_bar", "false"]
    for command in ("fit", "test"):
        main([command, "--config", config, *quick], package="paper_a_b")
    assert tables.main(["paper_a_b"]) == 0
    assert tables.main(["paper_a_b", "--check"]) == 0, capsys.readouterr().out
    its = runpy.run_path("tests/paper_a_b/test_method.py")
    its["test_the_objective_sees_adversarial_images_only"](batch)


@pytest.mark.slow
def test_a_new_paper_is_typed_and_imports_downwards(project) -> None:
    run("mypy", "--cache-dir", str(project / "cache"), "-p", "paper_a_b")
    command = "import sys; from importlinter.cli import lint_imports as f; sys.exit(f())"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "paper_a_b" in (project / "pyproject.toml").read_text()


@pytest.mark.parametrize("name", ["", "My", "../up", "class", "a_b"])
def test_a_name_that_cannot_be_a_paper_writes_nothing(project, name) -> None:
    before = sorted(project.iterdir())
    with pytest.raises(ConfigurationError, match=name or "''"):
        make(name, project)
    assert sorted(project.iterdir()) == before


def test_outside_of_a_checkout_nothing_is_written(tmp_path) -> None:
    with pytest.raises(ConfigurationError, match=r"pyproject\.toml"):
        make("mart", tmp_path)
    assert not list(tmp_path.iterdir())
