"""The table of costs beside accuracies, from result files alone."""

from pathlib import Path
from typing import Any

from common.results.__main__ import main

ON = {"device": "cpu (Toy)", "threads": 1, "processes": 1, "versions": {"torch": "2.15.0"}}


def trained(seconds: float, memory: int, **more: Any) -> dict[str, Any]:
    cost = {"seconds_per_epoch": seconds, "epochs": 3, "peak_memory": memory, **ON}
    return {"training": cost | more, "data_digest": "digits"}


def rows(text: str) -> dict[str, list[str]]:
    """Cells of the printed tables, by experiment."""
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines()]
    return {line[0]: line[1:] for line in cells if line and line[0].startswith("`")}


def test_rows_of_one_protocol_share_a_table(
    tmp_path: Path, capsys, file_result, pgd_outcomes
) -> None:
    for seed, seconds in enumerate((2.0, 3.0)):
        made = trained(seconds, 100_000_000)
        file_result(tmp_path, "p", "ours", seed, pgd_outcomes(30 + seed), made=made)
    made = trained(9.5, 250_000_000, device="cuda (Card)")
    file_result(tmp_path, "p", "plain", 0, pgd_outcomes(20), made=made)
    file_result(tmp_path, "p", "wide", 0, pgd_outcomes(20, eps=0.1), made={"data_digest": "digits"})
    assert main(["costs", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert rows(text) == {
        "`ours`": ["2.50 ± 0.71", "100.00", "100.00", "61.00 ± 1.41", "61.00 ± 1.41", "2"],
        "`plain`": ["9.50", "250.00", "100.00", "40.00", "40.00", "1"],
        "`wide`": ["", "", "100.00", "40.00", "40.00", "1"],
    }
    first, second = text.split("### ")[1:]
    assert set(rows(second)) == {"`wide`"}
    cards = {line for line in first.splitlines() if "Card" in line or "Toy" in line}
    assert sorted("`ours` seed 0, `ours` seed 1" in line for line in cards) == [False, True]
    assert all("2.15.0" in line for line in cards)


def test_a_folder_without_the_checkpoint_is_refused(
    tmp_path: Path, capsys, file_result, pgd_outcomes
) -> None:
    file_result(tmp_path, "p", "ours", 0, pgd_outcomes(3))
    assert main(["costs", str(tmp_path), "--checkpoint", "selected"]) == 2
    assert "'selected'" in capsys.readouterr().err
