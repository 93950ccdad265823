"""Where packages are found, and what hides them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import ConfigurationError
from common.packages import package_folder, papers, say_shadowed

ROOT = Path(__file__).parents[2]


@pytest.fixture
def own(tmp_path, monkeypatch) -> Path:
    """A folder with a paper of the user's, from which commands are run."""
    (tmp_path / "paper_own/configs").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_papers_are_found_beside_common_and_in_the_current_folder(own) -> None:
    assert package_folder("paper_own") == Path("paper_own"), "short, to be read in messages"
    assert package_folder("paper_cifs") == ROOT / "paper_cifs"
    assert package_folder("benchmarks.robustness") == ROOT / "benchmarks/robustness"
    assert {"paper_own", "paper_cifs", "paper_wm"} <= set(papers())
    with pytest.raises(ConfigurationError, match=r"paper_onw.* paper_own"):
        package_folder("paper_onw")


def test_a_package_that_hides_another_is_named(own, monkeypatch, capsys) -> None:
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.syspath_prepend(own)
    say_shadowed("common", "paper_own")
    assert capsys.readouterr().err == ""
    (own / "paper_cifs").mkdir()
    (own / "paper_cifs/__init__.py").touch()
    say_shadowed("common", "paper_cifs")
    (line,) = capsys.readouterr().err.splitlines()
    assert str(own / "paper_cifs") in line
    assert str(ROOT / "paper_cifs") in line


@pytest.mark.parametrize("name", ["common/__init__.py", "common.py"])
def test_another_common_is_named_before_anything_is_imported_from_it(own, name: str) -> None:
    hiding = own / name
    hiding.parent.mkdir(exist_ok=True)
    hiding.touch()
    for paper in [*ROOT.glob("paper_*"), ROOT / "common/cli/skeleton/paper_NAME"]:
        folder = own / "papers" / paper.name
        folder.mkdir(parents=True)
        for file in paper.glob("__*__.py*"):
            (folder / file.name.removesuffix(".template")).write_text(file.read_text())
        done = subprocess.run(
            [sys.executable, "-m", paper.name],
            env=os.environ | {"PYTHONPATH": str(own / "papers")},
            capture_output=True,
            text=True,
            check=False,
        )
        (line,) = done.stderr.splitlines()
        assert str(hiding) in line
        assert done.returncode != 0
