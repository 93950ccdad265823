"""Where neighbouring experiments keep their checkpoints."""

from pathlib import Path

import pytest

from common.checkpoints import checkpoint_beside


@pytest.mark.parametrize("name", ["seed3", "seed3-v2"])
def test_a_neighbour_has_the_same_seed_and_no_version(name: str) -> None:
    run = Path("runs/paper_x/mine") / name
    expected = Path("runs/paper_x/other/seed3/checkpoints")
    assert checkpoint_beside(run, "other") == expected / "selected.ckpt"
    assert checkpoint_beside(str(run), "other", "last") == expected / "last.ckpt"
