"""The commands of the Makefile, in a small copy whose paper only remembers what it was asked."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PAPER = """
import os, pathlib, signal, sys, time
words = sys.argv[1:]
stem, seed = pathlib.Path(words[2]).stem, words[4]
with open("asked", "a") as asked:
    print(stem, seed, *words[7:], sep="|", file=asked)
pathlib.Path("threads").write_text(str(os.environ.get("OMP_NUM_THREADS")))
if stem == os.environ.get("FAILS"):
    sys.exit("something broke")
if stem == os.environ.get("KILLED"):
    print("a remark", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
if stem == os.environ.get("WAITS"):
    signal.signal(signal.SIGTERM, lambda *_: print("asked to stop", flush=True))
    pathlib.Path("waiting").touch()
    signal.pause()
    sys.exit(time.sleep(0.5))
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
        *("__init__.py", "errors.py", "files.py", "limits.py", "packages.py"),
        *(f"cli/{name}.py" for name in ("__init__", "apart", "rows", "workers")),
        *(
            f"results/{name}.py"
            for name in ("__init__", "labels", "reference", "selection", "typed")
        ),
    ):
        (folder / "common" / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / "common" / name, folder / "common" / name)
    shutil.copytree(ROOT / "paper_cifs/configs", folder / "paper_cifs/configs")
    shutil.copytree(ROOT / "common/configs", folder / "common/configs")
    (folder / "paper_cifs/__init__.py").touch()
    (folder / "paper_cifs/__main__.py").write_text(PAPER)
    (folder / "paper_cifs/analysis.py").write_text(NOTE.format("analysed"))
    (folder / "common/cli/reproduction.py").write_text(NOTE.format("tabulated"))
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


CORES = str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
PAIR = "ON=digits_resnet_plain digits_resnet_cas"
"""Two experiments, and the two that they start from."""


def asked(project: Path) -> list[tuple[str, str]]:
    """Stem and seed of every row that was made since the last look."""
    path = project / "asked"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return [(line.split("|")[0], line.split("|")[1]) for line in lines]


def test_a_warm_started_row_waits_for_what_it_starts_from(project: Path) -> None:
    done = make(project, "reproduce-cifs", "SEEDS=0")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = asked(project)
    assert len(rows) == len(set(rows)) == 8
    for method in ("plain", "cas", "cifs", "aux"):
        stem = f"digits_resnet_{method}"
        assert rows.index((f"{stem}_natural", "0")) < rows.index((stem, "0"))
    assert (project / "runs/paper_cifs/results/digits_resnet_cifs-seed0.json").exists()
    assert not (project / "paper_cifs/results").exists()
    assert (project / "analysed").read_text() == "--on digits --seeds 0\n"
    assert (project / "tabulated").read_text() == "paper_cifs --on digits --seeds 0 --\n"


def test_rows_that_took_long_when_they_were_published_begin_first(project: Path) -> None:
    published = project / "paper_cifs/results"
    published.mkdir()
    took = {"aux": 5.0, "cas": 20.0, "plain": 80.0}
    for method, seconds in took.items():
        origin = {"wall_time_s": seconds / 2, "training": None}
        longer = origin | {"training": {"seconds_per_epoch": seconds / 20, "epochs": 10}}
        text = json.dumps({"provenance": {"last": longer, "selected": origin | {"wall_time_s": 0}}})
        (published / f"digits_resnet_{method}-seed0.json").write_text(text)
    (published / "digits_resnet_cifs-seed0.json").write_text('{"provenance": 3}')
    assert make(project, "reproduce-cifs", "SEEDS=0", "JOBS=1").returncode == 0
    order = [stem.removeprefix("digits_resnet_") for stem, _ in asked(project)]
    assert order[0] == "plain_natural", "what the longest chain begins with"
    long_first = [method for method in order if method in took]
    assert long_first == ["plain", "cas", "aux"]


def test_a_row_is_made_again_only_when_something_that_decides_it_has_changed(project: Path) -> None:
    def remade() -> list[str]:
        assert make(project, "reproduce-cifs", "SEEDS=0", PAIR).returncode == 0
        return [stem for stem, _ in asked(project)]

    assert len(remade()) == 4
    configs = project / "paper_cifs/configs"
    for path in configs.rglob("*.yaml"):
        path.touch()  # a new date alone changes nothing
    assert remade() == []
    with (configs / "shared/evaluation_digits_cas.yaml").open("a") as part:
        part.write("# changed")
    assert remade() == ["digits_resnet_cas"]
    with (configs / "digits_resnet_cas_natural.yaml").open("a") as config:
        config.write("# changed")
    assert remade() == ["digits_resnet_cas_natural", "digits_resnet_cas"]
    with (project / "common/configs/base.yaml").open("a") as base:
        base.write("# changed")
    assert len(remade()) == 4
    runs = project / "runs/paper_cifs"
    (runs / "digits_resnet_plain/seed0/results.json").unlink()
    # as another test of the same run leaves it
    (runs / "digits_resnet_cas/seed0/results.json").write_text('{"of": "another suite"}')
    assert set(remade()) == {"digits_resnet_plain", "digits_resnet_cas"}


def test_other_arguments_make_rows_again_and_keep_their_quotes(project: Path) -> None:
    row = ("reproduce-cifs", "ON=digits_resnet_cas_natural")
    make(project, *row, "SEEDS=0 1")
    results = project / "runs/paper_cifs/results"
    assert len(list(results.iterdir())) == len(asked(project)) == 2
    arguments = ("ARGS=--data.batch_size 50 --logger.name \"a b\" --experiment 'a, b'", "SEEDS=0")
    make(project, *row, *arguments)
    options = "|--data.batch_size|50|--logger.name|a b|--experiment|a, b\n"
    assert options in (project / "asked").read_text()
    assert len(asked(project)) == 1
    assert [path.name for path in results.iterdir()] == ["digits_resnet_cas_natural-seed0.json"]
    make(project, *row, *arguments)
    assert asked(project) == []


def test_a_changed_overlay_makes_rows_again(project: Path) -> None:
    row = ("reproduce-cifs", "ON=digits_resnet_cas_natural", "SEEDS=0")
    for words, path in (
        ("--config my.yaml", project / "my.yaml"),
        ("--config=my.yaml", project / "my.yaml"),
        ("--config fast", project / "common/configs/fast.yaml"),
    ):
        path.write_text("trainer: {max_epochs: 1}\n")
        make(project, *row, f"ARGS={words}")
        assert len(asked(project)) == 1
        make(project, *row, f"ARGS={words}")
        assert asked(project) == []
        path.write_text("trainer: {max_epochs: 2}\n")
        make(project, *row, f"ARGS={words}")
        assert len(asked(project)) == 1


def test_other_rows_continue_where_a_folder_cannot_be_made(project: Path) -> None:
    (project / "runs/paper_cifs").mkdir(parents=True)
    (project / "runs/paper_cifs/digits_resnet_cas_natural").touch()
    done = make(project, "reproduce-cifs", "SEEDS=0", PAIR)
    assert done.returncode != 0
    assert "FAILED digits_resnet_cas_natural seed 0: " in done.stdout
    assert {stem for stem, _ in asked(project)} == {
        "digits_resnet_plain_natural",
        "digits_resnet_plain",
    }


def test_only_the_run_of_a_seed_gives_its_result(project: Path) -> None:
    for name in ("digits_resnet_cas/seed0-replaced1", "digits_of_old/seed0"):
        aside = project / "runs/paper_cifs" / name
        aside.mkdir(parents=True)
        for file in ("finished", "results.json"):
            (aside / file).touch()
    make(project, "reproduce-cifs", "SEEDS=0", PAIR)
    results = {path.name for path in (project / "runs/paper_cifs/results").iterdir()}
    stems = ("plain", "plain_natural", "cas", "cas_natural")
    assert results == {f"digits_resnet_{stem}-seed0.json" for stem in stems}


@pytest.mark.parametrize(
    ("how", "said"), [("FAILS", "something broke"), ("KILLED", "the process was ended by SIGKILL")]
)
def test_other_rows_continue_if_one_fails(project: Path, how: str, said: str) -> None:
    done = make(project, "reproduce-cifs", "SEEDS=0", PAIR, **{how: "digits_resnet_cas_natural"})
    assert done.returncode != 0
    assert f"FAILED digits_resnet_cas_natural seed 0: {said}" in done.stdout
    assert "FAILED digits_resnet_cas seed 0: it needs digits_resnet_cas_natural" in done.stdout
    stems = {stem for stem, _ in asked(project)}
    assert stems == {
        "digits_resnet_cas_natural",
        "digits_resnet_plain",
        "digits_resnet_plain_natural",
    }
    assert (project / "tabulated").exists(), "the table is still rendered"
    assert make(project, "reproduce-cifs", "SEEDS=0", PAIR).returncode == 0
    assert asked(project) == [("digits_resnet_cas_natural", "0"), ("digits_resnet_cas", "0")]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_rows_are_asked_to_stop_once_and_waited_for(project: Path, signum: int) -> None:
    if signal.getsignal(signum) == signal.SIG_IGN:  # as in a job in the background
        pytest.skip("this process ignores the signal, and so would what it starts")
    row = "digits_resnet_cas_natural"
    job = subprocess.Popen(
        ["make", f"PY={sys.executable}", "reproduce-cifs", "SEEDS=0", f"ON={row}"],
        cwd=project,
        env=os.environ | {"WAITS": row},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while not (project / "waiting").exists():
        assert job.poll() is None
        time.sleep(0.01)
    os.killpg(job.pid, signum)
    assert job.wait(timeout=60) != 0
    log = project / f"runs/paper_cifs/{row}/seed0/log.txt"
    assert log.read_text() == "asked to stop\n"
    assert not (project / "tabulated").exists()


def test_a_row_without_a_result_is_not_finished(project: Path) -> None:
    row = ("reproduce-cifs", "SEEDS=0", "ON=digits_resnet_cas_natural")
    done = make(project, *row, FORGETS="digits_resnet_cas_natural")
    assert done.returncode != 0
    assert "FAILED digits_resnet_cas_natural seed 0" in done.stdout
    asked(project)
    assert make(project, *row).returncode == 0
    assert asked(project) == [("digits_resnet_cas_natural", "0")]


@pytest.mark.parametrize("words", [["plan-cifs"], ["-n", "-j2", "reproduce-cifs"]])
def test_plans_and_dry_runs_make_nothing(project: Path, words: list[str]) -> None:
    done = make(project, *words, "SEEDS=0", "ON=digits_resnet_c*")
    assert done.returncode == 0, done.stderr
    assert asked(project) == []
    assert not (project / "runs").exists()
    stems = [line.split()[0] for line in done.stdout.splitlines() if "seed 0" in line]
    names = ("cas_natural", "cifs_natural", "cas", "cifs")
    assert stems == [f"digits_resnet_{name}" for name in names]
    assert "-m paper_cifs reproduce --config" in done.stdout


def test_the_comparison_is_made_as_a_paper_is(project: Path) -> None:
    configs = project / "benchmarks/robustness/configs"
    shutil.copytree(ROOT / "benchmarks/robustness/configs", configs)
    for folder in (configs.parents[1], configs.parent):
        (folder / "__init__.py").touch()
    done = make(project, "plan-robustness", "SEEDS=0", "ON=digits_resnet_plain_a*")
    assert "2 of 2 rows would be made" in done.stdout, done.stderr
    assert "-m benchmarks.robustness reproduce --config" in done.stdout
    assert "common.cli.rows benchmarks.robustness --on" in make(project, "-n", "robustness").stdout


@pytest.mark.parametrize(
    ("words", "jobs"),
    [
        (["-j3"], "3"),
        (["ARGS=--a '-j4 b'"], CORES),
        (["ON=fashion_small_resnet_cas"], CORES),
        (["ON=cifar10_resnet18_cas"], "1"),
    ],
)
def test_how_many_rows_are_made_at_a_time(project: Path, words: list[str], jobs: str) -> None:
    done = make(project, "plan-cifs", "SEEDS=0", *words, OMP_NUM_THREADS="1")
    assert f"{jobs} at a time" in done.stdout


@pytest.mark.parametrize(
    ("words", "threads"),
    [
        (["ON=digits_resnet_cas_natural"], "1"),
        (["ON=fashion_small_resnet_cas", "JOBS=1"], "1"),
        (["ON=cifar10_resnet18_cas"], "None"),
        (["ON=cifar10_resnet18_cas", "JOBS=2"], str(max(1, int(CORES) // 2))),
    ],
)
def test_rows_made_at_a_time_share_the_cores(project, words: list[str], threads: str) -> None:
    """With a thread per core each, they would spend their time waiting for each other."""
    for seed, chosen in enumerate(({}, {"OMP_NUM_THREADS": "3"})):
        done = make(project, "reproduce-cifs", f"SEEDS={seed}", *words, **chosen)
        assert done.returncode == 0, done.stdout
        assert (project / "threads").read_text() == chosen.get("OMP_NUM_THREADS", threads)


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


def test_a_wrong_choice_is_named(project: Path) -> None:
    for words, what in (
        (("reproduce-cifs", "ON=imagenet"), "ON='imagenet'"),
        (("reproduce-cifs", "ON=digits_resnet_cas digits_resnet_csi"), "ON='digits_resnet_csi'"),
        (("reproduce-cifs", "SEEDS=one"), "'one'"),
        (("reproduce-cifs", "JOBS=0"), "'0'"),
        (("reproduce-cfis",), "'cfis' here; there are cifs"),
        (("publish-cfis",), "'cfis' here; there are cifs"),
    ):
        wrong = make(project, *words)
        assert wrong.returncode != 0
        assert what in wrong.stderr
    assert not (project / "tabulated").exists()


def test_results_that_cannot_be_collected_are_one_line(project: Path) -> None:
    folder = project / "runs/paper_cifs/results"
    folder.parent.mkdir(parents=True)
    folder.touch()
    made = make(project, "reproduce-cifs", "ON=digits_resnet_cas_natural", "SEEDS=0")
    assert made.returncode != 0
    assert "error: " in made.stderr
    assert "Traceback" not in made.stderr
    assert "end    digits_resnet_cas_natural seed 0" in made.stdout


HOSTILE = [
    "$(touch {0})",
    "$(shell touch {0})",
    "`touch {0}`",
    "; touch {0} ;",
    "a' b; touch {0} '",
]


@pytest.mark.parametrize("command", ["plan-cifs", "reproduce-cifs", "help"])
def test_names_and_texts_of_configs_run_nothing(project: Path, command: str) -> None:
    """Neither a file's name, nor an experiment, nor a referenced path reaches a shell."""
    configs = project / "paper_cifs/configs"
    for number, text in enumerate(hostile.format("pwned") for hostile in HOSTILE):
        (configs / f"digits_{text}.yaml").write_text("model: {}")
        (configs / f"digits_evil{number}.yaml").write_text(
            f"data: {text!r}\nwarm_start: {{experiment: {text!r}}}\n"
        )
        (configs / f"digits_worse{number}.yaml").write_text(f"data: {text + '.yaml'!r}\n")
    for on in ("digits_evil", "digits_worse", "digits"):
        done = make(project, command, "SEEDS=0", f"ON={on}")
    assert not list(project.rglob("pwned"))
    assert not (project.parent / "pwned").exists()
    assert command == "help" or (done.returncode != 0 and "unusual name" in done.stderr)


def test_help_lists_the_targets_first_those_for_newcomers(project: Path) -> None:
    listed = [
        line.split()[1] for line in make(project, "help").stdout.splitlines() if "make " in line
    ]
    assert listed[0] == "reproduce-NAME"
    text = (ROOT / "Makefile").read_text()
    names = re.search(r"\.PHONY: (.*?)\$", text, re.DOTALL)[1].replace("\\", "").split()
    families = re.search(r"\(foreach do,([a-z ]+),", text)[1].split()
    assert sorted(listed) == sorted([*names, *(f"{name}-NAME" for name in families)])


def test_make_3_81_understands_the_makefile() -> None:
    """It is the one of macOS; what it does not have, it ignores without a word."""
    text = re.sub(r"(?m)^#.*", "", (ROOT / "Makefile").read_text())
    newer = (
        *(
            r"\.ONESHELL",
            r"\.SHELLFLAGS",
            r"\.RECIPEPREFIX",
            r"\.EXTRA_PREREQS",
            r"\.WAIT",
            r"\.LOADED",
        ),
        *(
            r"\$[({](file|guile|let|intcmp) ",
            r"(?m)^[^\t]*(!=|::=)",
            r"(?m)^\s*(undefine|private|load) ",
        ),
        *(r"(?m)^define \S+ *\S?=", r"&:"),
    )
    assert [found[0] for pattern in newer if (found := re.search(pattern, text))] == []


def test_an_interrupted_install_leaves_no_stamp(project: Path) -> None:
    (project / ".venv/.installed").unlink()
    broken = project / "broken"
    broken.write_text('#!/bin/bash\n[ "$1" = -c ] && exit 0\nexit 1\n')
    broken.chmod(0o755)
    done = make(project, "setup", "PYTHON=./broken")
    assert done.returncode != 0
    assert not (project / ".venv/.installed").exists()


def test_a_given_python_needs_no_environment(project: Path) -> None:
    (project / ".venv/.installed").unlink()
    done = make(project, "-n", "gpu", "ARGS=--minutes 9")
    assert "-m benchmarks.gpu --minutes 9" in done.stdout
    assert "-m venv" not in done.stdout
    assert "-m venv" in make(project, "-n", "setup").stdout


@pytest.mark.parametrize("index", ["", "https://download.pytorch.org/whl/cpu"])
@pytest.mark.parametrize("target", ["setup", "test-oldest"])
def test_where_torch_is_installed_from(project: Path, target: str, index: str) -> None:
    (project / ".venv/.installed").unlink()
    (project / "tests").mkdir()
    shutil.copy(ROOT / "tests/oldest.py", project / "tests")
    python = project / "python"
    python.write_text(
        "#!/bin/bash\n"
        '[ "$2" != venv ] || { mkdir -p $3/bin; cp "$0" $3/bin/python; }\n'
        '[ "$2" != pip ] || echo "$@" >> installed\n'
    )
    python.chmod(0o755)
    options = [f"TORCH_INDEX={index}"] if index else []
    done = make(project, target, "PYTHON=./python", "PY=.venv/bin/python", *options)
    assert done.returncode == 0, done.stderr
    words = (project / "installed").read_text().split()
    assert ("--extra-index-url" in words) is bool(index)
    assert not index or words[words.index("--extra-index-url") + 1] == index


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
        for phase, (sign, longest) in PHASES.items():
            hits[phase] += killed_make(project, sign, draw.uniform(0.0, longest), draw)
        assert finished_make(project) == whole
        tables = [(p / "runs/paper_cifs/tables.md").read_text() for p in (project, undisturbed)]
        assert tables[0] == tables[1]
        assert git(project, "status", "--porcelain") == "", "no tracked file changes"
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
    (folder / ".venv").mkdir()
    (folder / ".venv/.installed").touch()
    (folder / "overlay.yaml").write_text(OVERLAY)
    (folder / ".gitignore").write_text("runs/\n.venv/\n__pycache__/\nmake.log\n")
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "-c", "user.name=A", "-c", "user.email=a@b.c", "commit", "-qm", "all")
    return folder


def git(folder: Path, *words: str) -> str:
    return subprocess.run(
        ["git", *words], cwd=folder, capture_output=True, text=True, check=True
    ).stdout


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
    files = (folder / "runs/paper_cifs/results").glob("*-seed0.json")
    return {path.name: json.loads(path.read_text())["checkpoints"] for path in files}
