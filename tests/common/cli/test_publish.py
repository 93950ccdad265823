"""What is published, what is refused, and how a reproduction is compared, in a small repository."""

import json
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from common.analysis.claims import judge
from common.analysis.report import Analysis
from common.cli import publish, reproduction
from common.cli.rows import Row, collect
from common.files import write_sealed_json
from common.results.markdown import BEGIN, END
from common.results.published import SAME, difference
from common.results.store import read_costs

PGD = "pgd20/ce_f"
REFERENCE = f"""
title: Toy
checkpoints: [last]
groups: [{{id: E1, title: Main, baseline: digits_base, metrics: [{{key: {PGD}, title: PGD-20}}]}}]
rows:
  digits_base: {{groups: [E1], label: base}}
  digits_ours: {{groups: [E1], label: ours}}
"""
ANALYSIS = Analysis(
    package="paper_toy",
    claims=lambda found: [
        judge("a", "more", found.gain("ours", "base", PGD), found.seeds, above=0.0)
    ],
    accuracy=PGD,
    accuracy_label="PGD-20 accuracy",
)


class Project:
    """A checkout with one paper of two rows."""

    def __init__(self, folder: Path, file_result: Any, outcomes: Any) -> None:
        self.folder = folder
        self.paper = folder / "paper_toy"
        self.results = self.paper / "results"
        self.runs = folder / "runs/paper_toy"
        self._file_result, self._outcomes = file_result, outcomes
        (self.paper / "configs").mkdir(parents=True)
        for name, text in {
            "__init__.py": "",
            "analysis.py": "",
            "README.md": f"{BEGIN}\n{END}\n",
            "reference.yaml": REFERENCE,
            "configs/digits_base.yaml": "model: {}\n",
            "configs/digits_ours.yaml": "model: {}\n",
        }.items():
            (self.paper / name).write_text(text)
        (folder / ".gitignore").write_text("runs/\n")
        self.git("init", "-q")
        self.commit()

    def git(self, *words: str) -> str:
        name = ("-c", "user.name=A", "-c", "user.email=a@b.c")
        command = ["git", *name, *words]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, check=True)
        return done.stdout

    def commit(self) -> None:
        self.git("add", "-A")
        self.git("commit", "-qm", "all")

    def changes(self) -> list[str]:
        """Paths that ``git status`` names."""
        status = self.git("status", "--porcelain", "--untracked-files=all")
        return [line[3:] for line in status.splitlines()]

    def made(
        self,
        stem: str,
        held: int = 20,
        seed: int = 0,
        options: Sequence[str] = (),
        made: Mapping[str, Any] | None = None,
    ) -> None:
        """A finished row of which ``held`` of 50 images withstand PGD."""
        row = Row("paper_toy", stem, seed, tuple(options))
        row.run.mkdir(parents=True, exist_ok=True)
        origin = {"commit": "c0ffee", "dirty": False} if made is None else made
        folder = self.folder / "runs"
        self._file_result(folder, "paper_toy", stem, seed, self._outcomes(held), made=origin)
        (folder / row.result.name).rename(row.run / "results.json")
        row.finish(row.digest)
        collect("paper_toy", options)

    def analysed(self, seeds: Sequence[int] = (0,)) -> None:
        ANALYSIS.analyse(self.runs, self.runs / "results", "digits", seeds)

    def all_made(self) -> None:
        self.made("digits_base", 20)
        self.made("digits_ours", 30)
        self.analysed()


@pytest.fixture
def project(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    file_result: Any,
    pgd_outcomes: Any,
) -> Project:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return Project(tmp_path, file_result, pgd_outcomes)


def published(*words: str) -> int:
    return publish.main(["paper_toy", "--seeds", "0", *words])


def test_a_reproduction_changes_no_tracked_file_and_publishing_copies_it(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    project.all_made()
    assert reproduction.main(["paper_toy", "--seeds", "0"]) == 0
    picture = project.runs / "digits_ours/seed0/figures/last_examples.png"
    picture.parent.mkdir()
    picture.write_bytes(b"of ours")
    assert project.changes() == []
    tables = (project.runs / "tables.md").read_text()
    for text in ("ours (`digits_ours`)", "digits_differences.png", "not published"):
        assert text in tables
    assert published() == 0
    names = ("digits_base-seed0.json", "digits_ours-seed0.json", "analysis.json")
    assert (project.results / "figures/digits_ours_examples.png").read_bytes() == b"of ours"
    for name in (*names, "figures/digits_differences.png"):
        found = (project.results / name).read_bytes()
        assert found == (project.runs / "results" / name).read_bytes()
    assert "ours (`digits_ours`)" in (project.paper / "README.md").read_text()
    assert all(
        path.startswith(("paper_toy/README", "paper_toy/results/")) for path in project.changes()
    )
    capsys.readouterr()
    reproduction.main(["paper_toy", "--seeds", "0"])
    assert f"2 of 2 rows are the {SAME}" in capsys.readouterr().out


def _edit(path: str) -> Callable[[Project], None]:
    def edit(project: Project) -> None:
        (project.folder / path).write_text("changed: true")

    return edit


def _stale(project: Project) -> None:
    project.made("digits_ours", 31)


def _unfinished(project: Project) -> None:
    (project.runs / "digits_ours/seed0/finished").unlink()


def _tested_otherwise(project: Project) -> None:
    path = project.runs / "digits_ours/seed0/results.json"
    path.write_text(path.read_text() + "\n")


def _of_an_old_config(project: Project) -> None:
    _edit("paper_toy/configs/digits_ours.yaml")(project)
    project.commit()


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda p: p.made("digits_ours", options=["--model.a", "b c"]), "ARGS=\"--model.a 'b c'\""),
        (_of_an_old_config, "digits_ours seed 0 was made before its config"),
        (_unfinished, "digits_ours seed 0 is not finished"),
        (_tested_otherwise, "digits_ours seed 0 has another results.json"),
        (lambda p: p.made("digits_ours", made={"commit": "c", "dirty": True}), "uncommitted"),
        (lambda p: p.made("digits_ours", made={"commit": None, "dirty": None}), "git checkout"),
        (_edit("paper_toy/__init__.py"), "paper_toy/__init__.py has uncommitted changes"),
        (_edit("paper_toy/configs/digits_new.yaml"), "configs/digits_new.yaml has uncommitted"),
        (_stale, "digits_ours-seed0.json"),
        (
            lambda p: (p.runs / "results/analysis.json").unlink(),
            "digits_base-seed0.json, digits_ours",
        ),
    ],
)
def test_what_others_could_not_repeat_is_refused_and_nothing_is_copied(
    project: Project, capsys: pytest.CaptureFixture[str], spoil: Any, named: str
) -> None:
    project.all_made()
    spoil(project)
    assert published() == 1
    assert named in capsys.readouterr().err
    assert not project.results.exists()


def test_missing_seeds_are_named_and_all_reasons_at_once(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    project.all_made()
    project.made("digits_base", options=["--a"])
    assert published("--seeds", "0 1") == 1
    refused = [line for line in capsys.readouterr().err.splitlines() if line.startswith("refused")]
    assert len(refused) == 3
    for row in ("digits_base seed 0", "digits_base seed 1", "digits_ours seed 1"):
        assert any(row in line for line in refused)
    assert not project.results.exists()


@pytest.mark.parametrize(
    "value", [None, 3, "row", [], {"row": 1}, {"options": 2}, {"options": [3]}]
)
def test_a_record_of_the_wrong_types_is_that_of_no_finished_row(
    project: Project, value: Any
) -> None:
    project.all_made()
    row = Row("paper_toy", "digits_ours", 0)
    record = json.loads((row.run / "finished").read_text())
    changed = record | value if isinstance(value, dict) else value
    (row.run / "finished").write_text(json.dumps(changed))
    assert row.problem


@pytest.mark.parametrize("key", ["on", "figures", "made_of", "missing"])
def test_an_analysis_of_the_wrong_types_is_refused(project: Project, capsys, key: str) -> None:
    project.all_made()
    path = project.runs / "results/analysis.json"
    report = {k: v for k, v in json.loads(path.read_text()).items() if k != "digest"}
    path.write_text(json.dumps(report | {key: 3}))
    assert publish.main(["paper_toy", "--seeds", "0"]) == 2
    assert f"analysis.json cannot be read (TypeError: {key} is 3)" in capsys.readouterr().err


def test_edits_of_texts_do_not_matter(project: Project) -> None:
    project.all_made()
    (project.folder / "notes.py").touch()
    (project.paper / "reference.yaml").write_text(REFERENCE.replace("Toy", "A toy"))
    assert published() == 0


def test_an_analysis_of_some_rows_does_not_replace_one_of_all(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    project.all_made()
    assert published() == 0
    before = (project.results / "analysis.json").read_bytes()
    for path in (project.runs / "digits_base/seed0").iterdir():
        path.unlink()
    collect("paper_toy")
    project.analysed()  # as on another machine, with one of the two rows
    assert published("--on", "digits_ours") == 0
    assert "digits_base-seed0.json" in capsys.readouterr().out
    assert (project.results / "analysis.json").read_bytes() == before
    project.made("digits_ours", 31)
    project.analysed()
    assert published("--on", "digits_ours") == 1
    assert "digits_base-seed0.json" in capsys.readouterr().err


def test_costs_are_put_among_the_published_ones_by_data_set(project: Project) -> None:
    def costs(folder: Path, **times: float) -> None:
        entries = {stem: {"metrics": {"step_time": time}} for stem, time in times.items()}
        write_sealed_json(folder / "costs.json", {"schema": 1, "experiments": entries})

    project.all_made()
    project.results.mkdir()
    costs(project.results, digits_base=1.0, svhn_a=1.0, svhn_b=1.0)
    costs(project.runs / "results", digits_base=2.0, digits_ours=2.0, svhn_a=2.0)
    assert published() == 0
    found = {stem: metrics["step_time"] for stem, metrics in read_costs(project.results).items()}
    assert found == {"digits_base": 2.0, "digits_ours": 2.0, "svhn_a": 1.0, "svhn_b": 1.0}
    # of rows that are not being published
    costs(project.runs / "results", digits_base=2.0, digits_ours=2.0, svhn_a=3.0, svhn_b=3.0)
    assert published() == 0
    assert read_costs(project.results)["svhn_a"]["step_time"] == 1.0


def test_what_differs_from_the_published_results_is_counted(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    project.all_made()
    assert published() == 0
    project.made("digits_ours", 27)
    capsys.readouterr()
    assert reproduction.main(["paper_toy", "--seeds", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"1 of 2 rows are the {SAME} as the published ones" in lines
    (line,) = (line for line in lines if "digits_ours seed 0" in line)
    for text in ("worst case -6.00", "clean accuracy +0.00", "3 of 50 images"):
        assert text in line
    assert reproduction.main(["paper_toy", "--seeds", "0", "--on", "digits_base"]) == 0
    assert "digits_ours" not in capsys.readouterr().out


def test_what_attacks_cost_is_no_figure() -> None:
    path = Path(__file__).parents[3] / "paper_wm/results/digits_cnn3_base-seed0.json"
    ours, published = (json.loads(path.read_text(encoding="utf-8")) for _ in range(2))
    attacks = ours["checkpoints"]["last"]["attacks"]
    for attack in attacks.values():
        attack["passes"] = {"forward": 3, "backward": 2, "queries": 1}
    assert difference(ours, published) == SAME
    next(iter(attacks.values()))["correct"] += 1
    assert difference(ours, published) != SAME
