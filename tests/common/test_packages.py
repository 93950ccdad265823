"""Where packages of papers are found."""

from pathlib import Path

import pytest

from common.errors import ConfigurationError
from common.packages import package_folder, papers


@pytest.fixture
def own(tmp_path, monkeypatch) -> Path:
    """A folder with a paper of the user's, from which commands are run."""
    (tmp_path / "paper_own/configs").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_papers_are_found_beside_common_and_in_the_current_folder(own) -> None:
    assert package_folder("paper_own") == Path("paper_own"), "short, to be read in messages"
    assert package_folder("paper_cifs") == Path(__file__).parents[2] / "paper_cifs"
    assert {"paper_own", "paper_cifs", "paper_wm"} <= set(papers())
    with pytest.raises(ConfigurationError, match=r"paper_onw.* paper_own"):
        package_folder("paper_onw")
