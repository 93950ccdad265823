"""The experiment graph, with a stand-in for Python that only remembers what it was asked."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

STAND_IN = """#!/bin/bash
echo "$@" >> {log}
case "$*" in
  *"reproduce --config"*"/{fails}.yaml"*) echo "something broke"; exit 1 ;;
  *"reproduce --config"*)
    config=${{5##*/}}; run=runs/paper_cifs/${{config%.yaml}}/seed$7
    mkdir -p $run; echo "{{}}" > $run/results.json ;;
esac
"""


@pytest.fixture
def project(tmp_path) -> Path:
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copytree(ROOT / "paper_cifs/configs", tmp_path / "paper_cifs/configs")
    shutil.copytree(ROOT / "common/configs", tmp_path / "common/configs")
    (tmp_path / "paper_cifs/results").mkdir()
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/.installed").touch()
    return tmp_path


def make(project: Path, *arguments: str, fails: str = "nothing") -> subprocess.CompletedProcess:
    python = project / "python"
    python.write_text(STAND_IN.format(log=project / "asked", fails=fails))
    python.chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        ["make", f"PY={python}", *arguments],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def rows_asked(project: Path) -> list[tuple[str, str]]:
    lines = [line.split() for line in (project / "asked").read_text().splitlines()]
    return [(Path(words[4]).stem, words[6]) for words in lines if words[2] == "reproduce"]


def test_a_warm_started_row_waits_for_what_it_starts_from(project) -> None:
    done = make(project, "reproduce-cifs", "SEEDS=0 1")
    assert done.returncode == 0, done.stdout + done.stderr
    asked = rows_asked(project)
    assert len(asked) == len(set(asked)) == 16
    for seed in "01":
        for method in ("plain", "cas", "cifs", "aux"):
            stem = f"digits_resnet_{method}"
            assert asked.index((f"{stem}_natural", seed)) < asked.index((stem, seed))
    assert (project / "paper_cifs/results/digits_resnet_cifs-seed1.json").exists()


def test_finished_rows_are_skipped(project) -> None:
    make(project, "reproduce-cifs", "SEEDS=0")
    (project / "asked").unlink()
    make(project, "reproduce-cifs", "SEEDS=0")
    assert rows_asked(project) == []


def test_a_row_is_made_again_when_what_its_config_refers_to_has_changed(project) -> None:
    make(project, "reproduce-cifs", "SEEDS=0")
    (project / "asked").unlink()
    later = (project / "runs/paper_cifs/digits_resnet_cas/seed0/finished").stat().st_mtime + 5
    os.utime(project / "paper_cifs/configs/shared/evaluation_digits_cas.yaml", (later, later))
    make(project, "reproduce-cifs", "SEEDS=0")
    assert rows_asked(project) == [("digits_resnet_cas", "0")]


def test_other_arguments_make_rows_again(project) -> None:
    make(project, "reproduce-cifs", "SEEDS=0")
    (project / "asked").unlink()
    make(project, "reproduce-cifs", "SEEDS=0", "ARGS=--data.batch_size 50")
    assert len(rows_asked(project)) == 8
    (project / "asked").unlink()
    make(project, "reproduce-cifs", "SEEDS=0", "ARGS=--data.batch_size 50")
    assert rows_asked(project) == []


def test_only_the_run_of_a_seed_gives_its_result(project) -> None:
    aside = project / "runs/paper_cifs/digits_resnet_cas/seed0-replaced1"
    aside.mkdir(parents=True)
    for name in ("finished", "results.json"):
        (aside / name).touch()
    make(project, "reproduce-cifs", "SEEDS=0")
    results = sorted(p.name for p in (project / "paper_cifs/results").iterdir())
    assert len(results) == 8
    assert not any("replaced" in name for name in results)


def test_a_failing_row_is_reported_and_takes_only_its_dependants_with_it(project) -> None:
    done = make(project, "reproduce-cifs", "SEEDS=0", fails="digits_resnet_cas_natural")
    assert done.returncode != 0
    assert "FAILED digits_resnet_cas_natural seed 0" in done.stdout
    assert "something broke" in done.stdout
    asked = {stem for stem, _ in rows_asked(project)}
    assert "digits_resnet_cas" not in asked
    assert {"digits_resnet_plain", "digits_resnet_cifs", "digits_resnet_aux"} <= asked
    assert "common.tables" in (project / "asked").read_text(), "the table is still rendered"
    (project / "asked").unlink()
    assert make(project, "reproduce-cifs", "SEEDS=0").returncode == 0
    assert {stem for stem, _ in rows_asked(project)} == {
        "digits_resnet_cas_natural",
        "digits_resnet_cas",
    }


def test_the_plan_is_printed_and_nothing_runs(project) -> None:
    done = make(project, "-n", "reproduce-cifs", "SEEDS=0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("-m paper_cifs reproduce --config") == 8
    assert not (project / "asked").exists()
    assert not (project / "runs").exists()


def test_commands_stand_for_themselves(project) -> None:
    """Each makes its row and what the row starts from; together they make what reproduce does."""
    arguments = ("SEEDS=0 1", "ON=digits_resnet_cas", "ARGS=--data.batch_size 50")
    listed = make(project, "-s", "commands-cifs", *arguments)
    assert listed.returncode == 0, listed.stderr
    lines = listed.stdout.splitlines()
    assert len(lines) == 4
    (line,) = [x for x in lines if "digits_resnet_cas/seed1/" in x]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    subprocess.run(f"{line} PY={project / 'python'}", shell=True, env=environment, check=True)
    assert rows_asked(project) == [("digits_resnet_cas_natural", "1"), ("digits_resnet_cas", "1")]
    assert (project / "runs/paper_cifs/digits_resnet_cas/seed1/finished").exists()
    given = (project / "runs/paper_cifs/digits_resnet_cas/seed1/args").read_text()
    assert given == "--data.batch_size 50"


def test_a_prefix_chooses_rows_and_a_wrong_one_is_named(project) -> None:
    done = make(project, "reproduce-cifs", "ON=cifar10_wrn28_10_cifs", "SEEDS=5")
    assert done.returncode == 0
    assert {stem for stem, _ in rows_asked(project)} == {
        "cifar10_wrn28_10_cifs",
        "cifar10_wrn28_10_cifs_natural",
    }
    wrong = make(project, "reproduce-cifs", "ON=imagenet")
    assert wrong.returncode != 0
    assert "no config in paper_cifs/configs begins with ON=imagenet" in wrong.stderr


def test_help_lists_the_targets(project) -> None:
    listed = make(project, "help").stdout
    for target in (
        "reproduce-%",
        "commands-%",
        "test",
        "test-slow",
        "test-faults",
        "check",
        "results",
        "tensorboard",
        "setup",
    ):
        assert f"make {target}" in listed


def test_an_interrupted_install_leaves_no_stamp(project) -> None:
    (project / ".venv/.installed").unlink()
    broken = project / "broken"
    broken.write_text('#!/bin/bash\n[ "$1" = -c ] && exit 0\nexit 1\n')
    broken.chmod(0o755)
    done = make(project, "setup", f"PYTHON={broken}")
    assert done.returncode != 0
    assert not (project / ".venv/.installed").exists()
