"""The commands of the Makefile, in a small copy whose paper only remembers what it was asked."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PAPER = """
import os, pathlib, sys
words = sys.argv[1:]
stem, seed = pathlib.Path(words[2]).stem, words[4]
with open("asked", "a") as asked:
    print(stem, seed, *words[7:], sep="|", file=asked)
if stem == os.environ.get("FAILS"):
    sys.exit("something broke")
run = pathlib.Path("runs/paper_cifs", stem, f"seed{seed}")
if stem != os.environ.get("FORGETS"):
    (run / "results.json").write_text("{}")
"""
NOTE = "import sys; print(*sys.argv[1:], file=open('{}', 'a'))"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "a project"
    (folder / "common").mkdir(parents=True)
    for name in (
        *(
            "__init__.py",
            "errors.py",
            "files.py",
            "limits.py",
            "packages.py",
            "cli/__init__.py",
            "cli/rows.py",
        ),
        *("results/__init__.py", "results/reference.py", "results/typed.py"),
    ):
        (folder / "common" / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / "common" / name, folder / "common" / name)
    shutil.copytree(ROOT / "paper_cifs/configs", folder / "paper_cifs/configs")
    shutil.copytree(ROOT / "common/configs", folder / "common/configs")
    (folder / "paper_cifs/__init__.py").touch()
    (folder / "paper_cifs/__main__.py").write_text(PAPER)
    (folder / "paper_cifs/analysis.py").write_text(NOTE.format("analysed"))
    (folder / "common/results/tables.py").write_text(NOTE.format("tabulated"))
    shutil.copy(ROOT / "Makefile", folder)
    for name in ("pyproject.toml", "constraints.txt"):
        (folder / name).touch()
    (folder / ".venv").mkdir()
    (folder / ".venv/.installed").touch()
    return folder


def make(project: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS", "OMP"))}
    return subprocess.run(
        ["make", f"PY={sys.executable}", *arguments],
        cwd=project,
        env=kept | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def asked(project: Path) -> list[tuple[str, str]]:
    """Stem and seed of every row that was made since the last look."""
    path = project / "asked"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return [(line.split("|")[0], line.split("|")[1]) for line in lines]


def test_a_warm_started_row_waits_for_what_it_starts_from(project: Path) -> None:
    done = make(project, "reproduce-cifs", "SEEDS=0 1")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = asked(project)
    assert len(rows) == len(set(rows)) == 16
    for seed in "01":
        for method in ("plain", "cas", "cifs", "aux"):
            stem = f"digits_resnet_{method}"
            assert rows.index((f"{stem}_natural", seed)) < rows.index((stem, seed))
    assert (project / "paper_cifs/results/digits_resnet_cifs-seed1.json").exists()
    assert (project / "analysed").read_text() == "--on digits --seeds 0 1\n"
    assert (project / "tabulated").exists()


def test_a_row_is_made_again_only_when_something_that_decides_it_has_changed(project: Path) -> None:
    make(project, "reproduce-cifs", "SEEDS=0")
    assert len(asked(project)) == 8
    for path in (project / "paper_cifs/configs").rglob("*.yaml"):
        path.touch()  # a new date alone changes nothing
    make(project, "reproduce-cifs", "SEEDS=0")
    assert asked(project) == []
    with (project / "paper_cifs/configs/shared/evaluation_digits_cas.yaml").open("a") as part:
        part.write("# changed")
    make(project, "reproduce-cifs", "SEEDS=0")
    assert asked(project) == [("digits_resnet_cas", "0")]
    with (project / "paper_cifs/configs/digits_resnet_cas_natural.yaml").open("a") as config:
        config.write("# changed")
    make(project, "reproduce-cifs", "SEEDS=0")
    assert asked(project) == [("digits_resnet_cas_natural", "0"), ("digits_resnet_cas", "0")]
    (project / "runs/paper_cifs/digits_resnet_aux/seed0/results.json").unlink()
    make(project, "reproduce-cifs", "SEEDS=0")
    assert asked(project) == [("digits_resnet_aux", "0")]


def test_other_arguments_make_rows_again_and_keep_their_quotes(project: Path) -> None:
    make(project, "reproduce-cifs", "SEEDS=0")
    asked(project)
    arguments = "ARGS=--data.batch_size 50 --experiment 'a, b'"
    make(project, "reproduce-cifs", "SEEDS=0", arguments)
    assert "|--data.batch_size|50|--experiment|a, b\n" in (project / "asked").read_text()
    assert len(asked(project)) == 8
    make(project, "reproduce-cifs", "SEEDS=0", arguments)
    assert asked(project) == []


def test_only_the_run_of_a_seed_gives_its_result(project: Path) -> None:
    aside = project / "runs/paper_cifs/digits_resnet_cas/seed0-replaced1"
    aside.mkdir(parents=True)
    for name in ("finished", "results.json"):
        (aside / name).touch()
    make(project, "reproduce-cifs", "SEEDS=0")
    results = sorted(p.name for p in (project / "paper_cifs/results").iterdir())
    assert len(results) == 8
    assert not any("replaced" in name for name in results)


def test_other_rows_continue_if_one_fails(project: Path) -> None:
    done = make(project, "reproduce-cifs", "SEEDS=0", FAILS="digits_resnet_cas_natural")
    assert done.returncode != 0
    assert "FAILED digits_resnet_cas_natural seed 0: something broke" in done.stdout
    assert "FAILED digits_resnet_cas seed 0: it needs digits_resnet_cas_natural" in done.stdout
    stems = {stem for stem, _ in asked(project)}
    assert "digits_resnet_cas" not in stems
    assert {"digits_resnet_plain", "digits_resnet_cifs", "digits_resnet_aux"} <= stems
    assert (project / "tabulated").exists(), "the table is still rendered"
    assert make(project, "reproduce-cifs", "SEEDS=0").returncode == 0
    assert asked(project) == [("digits_resnet_cas_natural", "0"), ("digits_resnet_cas", "0")]


def test_a_row_without_a_result_is_not_finished(project: Path) -> None:
    done = make(project, "reproduce-cifs", "SEEDS=0", FORGETS="digits_resnet_cas")
    assert done.returncode != 0
    assert "FAILED digits_resnet_cas seed 0" in done.stdout
    asked(project)
    assert make(project, "reproduce-cifs", "SEEDS=0").returncode == 0
    assert asked(project) == [("digits_resnet_cas", "0")]


@pytest.mark.parametrize("flags", [["-n"], ["-n", "-j2"], ["-j2", "--dry-run"]])
def test_the_plan_is_printed_and_nothing_runs(project: Path, flags: list[str]) -> None:
    done = make(project, *flags, "reproduce-cifs", "SEEDS=0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("-m paper_cifs reproduce --config") == 8
    assert asked(project) == []
    assert not (project / "runs").exists()


def test_commands_stand_for_themselves(project: Path, tmp_path: Path) -> None:
    """Each makes its row and what the row starts from; together they make what reproduce does."""
    arguments = ("SEEDS=0 1", "ON=digits_resnet_cas*", "ARGS=--data.batch_size '5 0'")
    listed = make(project, "-s", "commands-cifs", *arguments)
    assert listed.returncode == 0, listed.stderr
    lines = listed.stdout.splitlines()
    assert len(lines) == 4
    (line,) = [x for x in lines if "digits_resnet_cas --seeds 1" in x]
    subprocess.run(line, shell=True, cwd=tmp_path, check=True)
    assert "digits_resnet_cas|1|--data.batch_size|5 0" in (project / "asked").read_text()
    assert asked(project) == [("digits_resnet_cas_natural", "1"), ("digits_resnet_cas", "1")]


@pytest.mark.parametrize(
    ("on", "expected"),
    [
        ("cifar10_wrn28_10_cifs", {"cifar10_wrn28_10_cifs", "cifar10_wrn28_10_cifs_natural"}),
        ("cifar10_wrn28_10_pl", {"cifar10_wrn28_10_plain"}),
        (
            "cifar10_wrn28_10_*as cifar10_wrn28_10_plain",
            {"cifar10_wrn28_10_cas", "cifar10_wrn28_10_plain"},
        ),
        ("cifar10_resnet18_cas", {"cifar10_resnet18_cas"}),
    ],
)
def test_rows_are_chosen_by_name_pattern_or_beginning(
    project: Path, on: str, expected: set[str]
) -> None:
    done = make(project, "reproduce-cifs", f"ON={on}", "SEEDS=5")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {stem for stem, _ in asked(project)} == expected


def test_a_wrong_choice_is_named(project: Path) -> None:
    wrong = make(project, "reproduce-cifs", "ON=imagenet")
    assert wrong.returncode != 0
    assert "no config in paper_cifs/configs is meant by ON='imagenet'" in wrong.stderr
    wrong = make(project, "reproduce-cfis")
    assert wrong.returncode != 0
    assert "there is no package 'paper_cfis'; there are paper_cifs" in wrong.stderr
    assert not (project / "tabulated").exists()


HOSTILE = [
    "$(touch {0})",
    "$(shell touch {0})",
    "`touch {0}`",
    "; touch {0} ;",
    "a' b; touch {0} '",
]


@pytest.mark.parametrize("command", [["-n", "reproduce-cifs"], ["reproduce-cifs"], ["help"]])
def test_names_and_texts_of_configs_run_nothing(project: Path, command: list[str]) -> None:
    """Neither a file's name, nor an experiment, nor a referenced path reaches a shell."""
    configs = project / "paper_cifs/configs"
    for number, text in enumerate(hostile.format("pwned") for hostile in HOSTILE):
        (configs / f"digits_{text}.yaml").write_text("model: {}")
        (configs / f"digits_evil{number}.yaml").write_text(
            f"data: {text!r}\nwarm_start: {{experiment: {text!r}}}\n"
        )
        (configs / f"digits_worse{number}.yaml").write_text(f"data: {text + '.yaml'!r}\n")
    chosen = [f"evil{number}" for number in range(len(HOSTILE))] + ["worse0", "worse1"]
    for on in ("digits_resnet_plain", *(f"digits_{name}" for name in chosen), "digits"):
        done = make(project, *command, "SEEDS=0", f"ON={on}")
    assert not list(project.rglob("pwned"))
    assert not (project.parent / "pwned").exists()
    assert command == ["help"] or (done.returncode != 0 and "unusual name" in done.stderr)


def test_help_lists_the_targets(project: Path) -> None:
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


def test_an_interrupted_install_leaves_no_stamp(project: Path) -> None:
    (project / ".venv/.installed").unlink()
    broken = project / "broken"
    broken.write_text('#!/bin/bash\n[ "$1" = -c ] && exit 0\nexit 1\n')
    broken.chmod(0o755)
    done = make(project, "setup", "PYTHON=./broken")
    assert done.returncode != 0
    assert not (project / ".venv/.installed").exists()


# ------------------------------------------------------------------------------------------ kills

PHASES = {  # what there is in runs when a phase has begun, and for how long it may go on
    "set-up": ("", 4.0),
    "fit": ("*/seed0/checkpoints/last.ckpt", 1.0),
    "checkpoint": ("*/seed0/checkpoints/.*.tmp", 0.0),
    "test": ("*/seed0/outcomes/*/*.npz", 1.0),
    "tables": ("digits_resnet_plain/seed0/finished", 8.0),
}


@pytest.mark.faults
def test_twenty_random_kills_of_make(tmp_path: Path) -> None:
    """All of it: rows that wait for rows, training, evaluation, figures, tables."""
    project, undisturbed = (copied_project(tmp_path / name) for name in ("project", "whole"))
    whole = finished_make(undisturbed)
    draw = random.Random(3)
    hits = dict.fromkeys(PHASES, 0)
    for _ in range(4):
        shutil.rmtree(project / "runs", ignore_errors=True)
        for path in (project / "paper_cifs/results").glob("*.json"):
            path.unlink()
        for phase, (sign, longest) in PHASES.items():
            hits[phase] += killed_make(project, sign, draw.uniform(0.0, longest), draw)
        assert finished_make(project) == whole
        rendered = [(p / "paper_cifs/README.md").read_text() for p in (project, undisturbed)]
        assert rendered[0] == rendered[1], "the tables too"
    assert all(hits.values()), hits
    assert sum(hits.values()) >= 15, hits


def killed_make(folder: Path, sign: str, delay: float, draw: random.Random) -> bool:
    """Start it, and kill it so long after something is there; whether it was under way then."""
    job = start_make(folder)
    runs, until = folder / "runs/paper_cifs", time.monotonic() + 300
    while sign and job.poll() is None and not any(runs.glob(sign)):
        assert time.monotonic() < until, f"{sign} never came"
        time.sleep(0.001)
    time.sleep(delay)
    is_hit = job.poll() is None
    if is_hit:
        os.killpg(job.pid, draw.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT)))
    job.wait(timeout=300)
    return is_hit


OVERLAY = """
data: {train_limit: 100, val_limit: 50, test_limit: 60}
trainer: {max_epochs: 2, check_val_every_n_epoch: 1}
checkpoint: {every_n_train_steps: 1}
"""


def copied_project(folder: Path) -> Path:
    """What make needs; the environment is this one, the code a copy."""
    folder.mkdir()
    for name in ("common", "paper_cifs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "README.md"):
        shutil.copy(ROOT / name, folder / name)
    for path in (folder / "paper_cifs/results").glob("*.json"):
        path.unlink()
    (folder / ".venv").mkdir()
    (folder / ".venv/.installed").touch()
    (folder / "overlay.yaml").write_text(OVERLAY)
    return folder


def start_make(folder: Path) -> subprocess.Popen[bytes]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}
    arguments = ["SEEDS=0", "JOBS=2", f"PY={sys.executable}", "ON=digits_resnet_plain"]
    with (folder / "make.log").open("ab") as log:
        return subprocess.Popen(
            ["make", "reproduce-cifs", *arguments, "ARGS=--config overlay.yaml"],
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def finished_make(folder: Path) -> dict[str, object]:
    """Run it to its end; what was measured."""
    assert start_make(folder).wait(timeout=600) == 0, (folder / "make.log").read_text()[-3000:]
    found = results_of(folder)
    assert len(found) == 2
    return found


def results_of(folder: Path) -> dict[str, object]:
    """What was measured, by row."""
    files = (folder / "paper_cifs/results").glob("*-seed0.json")
    return {path.name: json.loads(path.read_text())["checkpoints"] for path in files}
