"""What runs leave alone, and what results do not tell."""

import getpass
import json
import re
import socket
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from common.evaluation.__main__ import main as evaluation_command

ROOT = Path(__file__).parents[1]
RESULTS = sorted(
    path
    for folder in ("paper_*", "benchmarks/robustness")
    for path in ROOT.glob(f"{folder}/results/*.json")
)


def tree(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder of somebody's, with files of any name."""
    folder = tmp_path / "home"
    for name in (".notes.txt-ab12cd34.tmp", "a/.b.tmp", "a/c.ckpt.tmp", "checkpoints/best.ckpt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("precious")
    return folder


@pytest.mark.parametrize(
    "package", sorted(path.parent.name for path in ROOT.glob("paper_*/configs"))
)
def test_the_analysis_of_a_row_asked_for_by_name_is_about_it(package: str) -> None:
    scope = import_module(f"{package}.analysis").ANALYSIS.scope
    stems = [path.stem for path in (ROOT / package / "configs").glob("*.yaml")]
    assert stems
    for stem in stems:
        assert all(map(stem.startswith, scope(stem)))


def into(folder: Path) -> tuple[str, str]:
    return "--trainer.default_root_dir", str(folder)


def test_a_folder_of_somebody_keeps_its_files(tiny, home: Path) -> None:
    before = tree(home)
    for _ in range(2):  # the second time it holds a run too
        tiny("reproduce", *into(home))
        assert before.items() <= tree(home).items()
    both = tree(home)
    line = tiny.refused("reproduce", *into(home), "--seed_everything", "5")
    assert "nothing is renamed in a folder that was given" in line
    assert tree(home) == both


@pytest.mark.parametrize(
    ("command", "name"), [("fit", "config.yaml"), ("reproduce", "checkpoints/selected.ckpt")]
)
def test_files_of_our_names_that_are_not_ours_stay(
    tiny, home: Path, command: str, name: str
) -> None:
    (home / name).write_text("model: mine\n")
    before = tree(home)
    assert "was not written by a run of this program" in tiny.refused(command, *into(home))
    assert tree(home) == before


def test_a_run_directory_that_is_a_link(tiny, home: Path) -> None:
    tiny.run.parent.mkdir(parents=True)
    tiny.run.symlink_to(home)
    before = tree(home)
    tiny("reproduce")
    assert before.items() <= tree(home).items()
    assert "is a link" in tiny.refused("reproduce", "--model.optimizer.lr=0.3")
    assert before.items() <= tree(home).items()


def test_a_run_that_is_set_aside_leaves_what_is_not_ours(tiny) -> None:
    tiny("fit")
    (tiny.run / "thesis.tex").write_text("precious")
    tiny("reproduce", "--model.optimizer.lr=0.3")
    assert (tiny.run / "thesis.tex").read_text() == "precious"
    assert (tiny.run.parent / "seed0-replaced1/checkpoints/last.ckpt").is_file()
    path = tiny.run / "results.json"
    assert_discreet(path)
    assert set(tiny.result()["provenance"]["last"]) == {
        "commit", "dirty", "versions", "device", "world_size", "threads", "precision", "tf32",
        "checkpoint_digest", "config_digest", "data_digest", "wall_time_s", "attack_seconds",
        "date", "protocol", "weights",
    }  # fmt: skip


def test_nothing_is_written_over_something_else(tiny, home: Path) -> None:
    other, folder = Path("other.json"), Path("out")
    other.write_text('{"schema": 3, "mine": true}')
    tiny("fit")
    given = ("--ckpt_path", "last", "--evaluation.results", other)
    assert "is there and no result" in tiny.refused("test", *given)
    assert other.read_text() == '{"schema": 3, "mine": true}'
    assert not list(Path().glob("other.json.*"))
    folder.mkdir()
    (folder / "results.json").write_text("mine")
    given = ["--model", "common.networks.resnet:DigitsResNet", "--data", "digits"]
    assert evaluation_command([*given, "--output", "out", "--examples", "20"]) == 2
    assert (folder / "results.json").read_text() == "mine"
    (home / "predictions.csv").write_text("mine")
    tiny.refused("predict", *into(home), "--ckpt_path", tiny.last)
    assert (home / "predictions.csv").read_text() == "mine"
    target = home / "target"
    target.write_text("precious")
    (home / ".lock").symlink_to(target)
    tiny.refused("fit", *into(home))
    assert target.read_text() == "precious"


# ---------------------------------------------------------------------------------------- results

# A path on a machine: /home/..., /tmp/...; not 8/255, not the name of a step with its loss.
ABSOLUTE = re.compile(r"(?:^|[\s'\"=(,:])(?:/[A-Za-z_.][\w.-]*/[\w.-]|~/|[A-Z]:\\\\)")
SECRET = re.compile(
    r"(?i)(api[_-]?key|passw|secret|token|bearer |AKIA[0-9A-Z]{12}|BEGIN [A-Z ]*KEY)"
)


def strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [*value, *(text for part in value.values() for text in strings(part))]
    if isinstance(value, list):
        return [text for part in value for text in strings(part)]
    return [value] if isinstance(value, str) else []


def assert_discreet(path: Path) -> None:
    names = {socket.gethostname(), socket.getfqdn()} - {"localhost", ""}
    names |= {getpass.getuser()} - {"root", "user"}
    for text in strings(json.loads(path.read_text())):
        assert not ABSOLUTE.search(text), f"{path.name}: {text}"
        assert not SECRET.search(text), f"{path.name}: {text}"
        assert not any(re.search(rf"\b{re.escape(name)}\b", text) for name in names), text


def test_committed_results_name_no_machine_folder_or_secret() -> None:
    assert len(RESULTS) > 50
    for path in RESULTS:
        assert_discreet(path)


def test_the_patterns_find_what_they_look_for() -> None:
    for text in ("/home/somebody/runs", "in '/tmp/x/y'", "path=/data/cifar", "~/runs"):
        assert ABSOLUTE.search(text), text
    for text in ("8/255", "pgd20/ce_f", "eps_sweep/ce_f/eps=0.1", "1/2 of them", "and/or"):
        assert not ABSOLUTE.search(text), text
