"""Result files: packing, metrics, merging, writing, and what is said about damaged ones."""

import copy
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ConfigurationError, RunDirectoryError
from common.evaluation import Outcomes
from common.results import (
    check_writable,
    checkpoint_entry,
    load_results,
    merge_result,
    pack_outcomes,
    read_result,
    result_path,
    summarise,
    unpack_outcomes,
    write_json_atomically,
)

Y = [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
CLEAN = [1, 1, 1, 1, 1, 1, 1, 1, 0, 1]
PGD_F = [1, 1, 0, 1, 1, 0, 1, 1, 0, 1]
PGD_P = [0, 1, 1, 1, 1, 0, 1, 1, 0, 1]
APGD = [1, 0, 0, 1]  # of the first four
SQUARE = [0, 0, 0, 1]


def outcomes(**other: list[int]) -> Outcomes:
    """Ten examples of three classes; attacks shorter than that are on the first ones."""
    attacks = {"pgd20/ce_f": PGD_F, "pgd20/ce_p1": PGD_P, "aa/apgd-ce": APGD, "aa/square": SQUARE}
    attacks |= other
    n = len(Y)
    return Outcomes(
        y=torch.tensor(Y),
        correct={
            name: torch.tensor(bits + [1] * (n - len(bits)), dtype=torch.bool)
            for name, bits in {"clean": CLEAN, **attacks}.items()
        },
        attacked={name: torch.arange(n) < len(bits) for name, bits in attacks.items()},
    )


ONLY_SURVIVORS = {"pgd20": False, "aa": True}


def entry(**other: list[int]) -> Any:
    return checkpoint_entry(outcomes(**other), ONLY_SURVIVORS, epoch=29, global_step=240)


def put(path: Path, label: str = "last", digest: str = "d", **changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "paper": "paper_x",
        "experiment": "digits_net_plain",
        "seed": 0,
        "label": label,
        "entry": entry(),
        "provenance": {"config_digest": digest, "wall_time_s": 1.5},
    }
    return merge_result(path, **{**arguments, **changes})


# ------------------------------------------------------------------------- outcomes and metrics


@given(st.lists(st.booleans(), max_size=70))
def test_packing_can_be_undone(bits: list[bool]) -> None:
    packed = pack_outcomes(bits)
    assert len(packed) == 2 * -(-len(bits) // 8)
    assert unpack_outcomes(packed, len(bits)) == bits


def test_the_first_outcome_is_the_highest_bit() -> None:
    assert pack_outcomes([True] + [False] * 7) == "80"
    assert pack_outcomes(torch.tensor([True, False, True, True, False, False, False, False, True]))
    assert pack_outcomes([1, 0, 1, 1, 0, 0, 0, 0, 1]) == "b080"


@pytest.mark.parametrize(("text", "n"), [("80", 9), ("8000", 8), ("01", 7), ("zz", 8)])
def test_what_is_no_packing_is_refused(text: str, n: int) -> None:
    with pytest.raises(ValueError, match=r"hold|beyond|invalid literal"):
        unpack_outcomes(text, n)


def test_counts_and_the_order_of_the_suite() -> None:
    result = entry()
    assert list(result) == ["epoch", "global_step", "examples", "clean", "attacks", "metrics"]
    assert list(result["attacks"]) == ["pgd20/ce_f", "pgd20/ce_p1", "aa/apgd-ce", "aa/square"]
    assert result["clean"]["per_class"] == [[4, 4], [3, 3], [2, 3]]
    assert result["attacks"]["pgd20/ce_f"] == {
        "correct": 7,
        "examples": 10,
        "survivors_only": False,
        "per_class": [[4, 4], [3, 3], [0, 3]],
        "outcomes": pack_outcomes(PGD_F),
    }
    assert result["attacks"]["aa/square"]["examples"] == 4
    assert result["attacks"]["aa/square"]["survivors_only"]
    assert result["attacks"]["aa/square"]["per_class"] == [[1, 2], [0, 1], [0, 1]]


def test_attacked_examples_that_are_not_the_first_are_refused() -> None:
    found = outcomes()
    found.attacked["aa/square"] = torch.arange(10) >= 6
    with pytest.raises(ValueError, match="aa/square attacked 4 examples that are not the first"):
        checkpoint_entry(found, ONLY_SURVIVORS)


def test_metrics_by_hand() -> None:
    survive_all = [a & b & c for a, b, c in zip(CLEAN, PGD_F, PGD_P, strict=True)]
    worst = [a & b for a, b in zip(survive_all, APGD + [1] * 6, strict=True)]
    worst = [a & b for a, b in zip(worst, SQUARE + [1] * 6, strict=True)]
    assert entry()["metrics"] == {
        "clean_acc": 0.9,
        "pgd20/ce_f": 0.7,
        "pgd20/ce_p1": 0.7,
        "aa/apgd-ce": 0.5,
        "aa/square": 0.25,
        "pgd20": 0.7,
        "pgd20_union": sum(survive_all) / 10,
        "aa": 0.25,
        "aa_clean": 1.0,
        "worst": sum(worst) / 10,
    }
    assert sum(survive_all) == 6  # the union is below every single loss
    assert sum(worst) == 5


def test_losses_on_different_examples_have_no_common_figure() -> None:
    metrics = entry(**{"pgd20/ce_p2": [1, 1, 1, 1, 1]})["metrics"]
    assert not {"pgd20", "pgd20_union", "pgd20_clean"} & set(metrics)
    assert metrics["pgd20/ce_p2"] == 1.0


def test_a_fresh_and_a_cumulative_figure_are_not_compared() -> None:
    result = entry()
    result["attacks"]["pgd20/ce_p1"]["survivors_only"] = True
    metrics = summarise(result["clean"], result["attacks"])
    assert not {"pgd20", "pgd20_union"} & set(metrics)


# --------------------------------------------------------------------------------------- writing


def test_the_text_is_the_same_whatever_the_order_and_however_often(tmp_path: Path) -> None:
    one, other = tmp_path / "one.json", tmp_path / "other.json"
    for label in ("last", "selected", "epoch7"):
        put(one, label)
    for label in ("epoch7", "selected", "last", "selected"):
        put(other, label)
    assert one.read_bytes() == other.read_bytes()
    assert list(read_result(one)["checkpoints"]) == ["last", "selected", "epoch7"]


def test_provenance_alone_may_differ(tmp_path: Path) -> None:
    one, other = tmp_path / "one.json", tmp_path / "other.json"
    put(one, provenance={"config_digest": "d", "wall_time_s": 1.0})
    put(other, provenance={"config_digest": "d", "wall_time_s": 2.0, "date": "2026-01-01"})
    checkpoints = [path.read_text().split('"provenance"')[0] for path in (one, other)]
    assert checkpoints[0] == checkpoints[1]
    assert one.read_text() != other.read_text()


def test_lists_stay_on_their_line(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    put(path)
    text = path.read_text()
    assert '"per_class": [[4, 4], [3, 3], [2, 3]],' in text
    assert text.endswith("}\n")
    assert json.loads(text) == read_result(path)


def test_a_serialiser_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_json_atomically(path, {"a": 1})
    before = path.read_bytes()
    for bad in ({"a": object()}, {"a": float("nan")}):
        with pytest.raises((TypeError, ValueError)):
            write_json_atomically(path, bad)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_half_way_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "result.json"
    write_json_atomically(path, {"a": 1})

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunDirectoryError, match=r"result\.json: No space left.*choose another"):
        write_json_atomically(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_others_may_read_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "result.json"
    previous = os.umask(0o022)
    try:
        write_json_atomically(path, {})
    finally:
        os.umask(previous)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_a_path_that_cannot_be_written_is_told_before(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path / "file" / "result.json", tmp_path):
        with pytest.raises(RunDirectoryError, match=r"cannot write .*; make"):
            check_writable(path)
    with pytest.raises(RunDirectoryError, match="cannot write"):
        write_json_atomically(tmp_path / "file" / "result.json", {})
    check_writable(tmp_path / "result.json")
    assert not (tmp_path / "result.json").exists()


# --------------------------------------------------------------------------------------- merging


def test_other_checkpoints_of_the_same_settings_stay(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    put(path, "selected")
    merged = put(path, "last")
    assert list(merged["checkpoints"]) == list(merged["provenance"]) == ["last", "selected"]
    assert merged == read_result(path)


def test_a_new_measurement_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    put(path)
    newer = entry(**{"pgd20/ce_p2": PGD_P})
    put(path, entry=newer)
    assert read_result(path)["checkpoints"]["last"] == newer


def test_checkpoints_of_other_settings_go(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    put(path, "selected", digest="old")
    assert list(put(path, "last", digest="new")["checkpoints"]) == ["last"]


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"experiment": "digits_net_other"}, {"paper": "paper_y"}]
)
def test_another_experiment_is_not_overwritten(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "result.json"
    put(path)
    before = path.read_bytes()
    with pytest.raises(ConfigurationError, match=r"choose another file with --evaluation\.results"):
        put(path, **change)
    assert path.read_bytes() == before


def test_an_unreadable_file_is_set_aside_and_not_lost(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text("{ torn")
    with pytest.warns(UserWarning, match=r"kept as result\.json\.unreadable"):
        put(path)
    assert (tmp_path / "result.json.unreadable").read_text() == "{ torn"
    assert list(read_result(path)["checkpoints"]) == ["last"]


def test_an_entry_that_contradicts_itself_is_not_written(tmp_path: Path) -> None:
    wrong = entry()
    wrong["metrics"]["worst"] = 0.99
    with pytest.raises(ConfigurationError, match=r"contradicts itself: .*metrics\.worst is 0\.99"):
        put(tmp_path / "result.json", entry=wrong)
    assert not (tmp_path / "result.json").exists()


# --------------------------------------------------------------------------------------- reading


def _edit(data: Any, keys: str, value: Any) -> Any:
    data = copy.deepcopy(data)
    node = data
    *path, last = keys.split(".")
    for key in path:
        node = node[key]
    if value is KeyError:
        del node[last]
    else:
        node[last] = value
    return data


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        ("schema", 2, "its schema is 2"),
        ("schema", KeyError, "schema is missing"),
        ("seed", "0", "seed is '0'"),
        ("seed", True, "seed is True"),
        ("paper", KeyError, "paper is missing"),
        ("checkpoints", {}, "checkpoints is empty"),
        ("checkpoints", [], "checkpoints is empty"),
        ("checkpoints.last", 3, "argument of type|subscriptable|has no attribute"),
        ("provenance", {}, "provenance is about"),
        ("provenance.last.config_digest", KeyError, "provenance.last.config_digest is missing"),
        ("checkpoints.last.epoch", 1.5, "checkpoints.last.epoch is 1.5"),
        ("checkpoints.last.examples", 11, "per_class has 10, not 11"),
        ("checkpoints.last.clean.correct", 8, "correct is 8, outcomes gives 9"),
        ("checkpoints.last.clean.per_class", [[4, 4], [2, 3], [2, 3]], "per_class gives 8"),
        ("checkpoints.last.clean.outcomes", "ff", "2 hexadecimal digits do not hold 10 outcomes"),
        ("checkpoints.last.clean.outcomes", "ffff", "outcomes beyond the first 10"),
        ("checkpoints.last.attacks.aa/square.examples", 0, "examples is 0, expected 1 to 10"),
        ("checkpoints.last.attacks.aa/square.survivors_only", 1, "survivors_only is 1"),
        ("checkpoints.last.metrics.pgd20", 0.8, "metrics.pgd20 is 0.8, the outcomes give 0.7"),
        ("checkpoints.last.metrics.pgd20", KeyError, "metrics.pgd20 is None"),
        ("checkpoints.last.metrics.more", "much", "metrics.more is 'much'"),
    ],
)
def test_a_damaged_file_is_named_with_what_is_wrong(
    tmp_path: Path, keys: str, value: Any, message: str
) -> None:
    path = tmp_path / "result.json"
    data = put(path)
    write_json_atomically(path, _edit(data, keys, value))
    with pytest.raises(ConfigurationError, match=message) as caught:
        read_result(path)
    assert str(path) in str(caught.value)
    assert "run the experiment's test again" in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", "\x00\xff"])
def test_what_is_no_result_at_all_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "result.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigurationError, match=r"result\.json"):
        read_result(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"absent\.json cannot be read"):
        read_result(tmp_path / "absent.json")


def test_further_metrics_are_welcome(tmp_path: Path) -> None:
    more = entry()
    more["metrics"]["noise15"] = 0.5
    put(tmp_path / "result.json", entry=more)
    assert read_result(tmp_path / "result.json")["checkpoints"]["last"]["metrics"]["noise15"] == 0.5


def test_a_folder_is_read_in_order(tmp_path: Path) -> None:
    for experiment, seed in (("b_net", 0), ("a_net", 10), ("a_net", 2)):
        put(result_path(tmp_path, experiment, seed), experiment=experiment, seed=seed)
    write_json_atomically(tmp_path / "analysis.json", {"expectations": []})
    found = [(result["experiment"], result["seed"]) for result in load_results(tmp_path)]
    assert found == [("a_net", 2), ("a_net", 10), ("b_net", 0)]
    assert load_results(tmp_path / "absent") == []


def test_a_file_under_a_wrong_name_is_refused(tmp_path: Path) -> None:
    put(result_path(tmp_path, "other", 0))
    with pytest.raises(ConfigurationError, match=r"belongs in digits_net_plain-seed0\.json"):
        load_results(tmp_path)
