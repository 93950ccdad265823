"""Result files: their form, merging, and what is said about damaged ones."""

import copy
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import ConfigurationError
from common.files import content_digest, write_json_atomically
from common.results import store
from common.results.lines import Line, Outcomes
from common.results.outcomes import checkpoint_entry
from common.results.schema import SCHEMA, SCHEMA_FILE, json_schema
from common.results.store import load_results, merge_result, read_result, result_path

COMMITTED = sorted(Path(__file__).parents[3].glob("paper_*/results/*-seed0.json"))
CHECK = {"id": "steps", "question": "Do more break no more?", "detail": ""}
AUDIT: dict[str, Any] = {
    "examples": 4,
    "checks": [
        CHECK | {"value": 0.5, "threshold": 1, "verdict": "pass"},
        CHECK | {"value": None, "threshold": None, "verdict": "not applicable"},
    ],
}


def entry(right: int = 7, audit: Any = None) -> Any:
    """Ten examples of two classes, of which an attack on the first four leaves some."""
    order = torch.arange(10)
    return checkpoint_entry(
        Outcomes(
            order % 2,
            {"clean": order < 9, "pgd/ce": order < right, "aa/square": order < 1},
            {"pgd/ce": order < 10, "aa/square": order < 4},
            {"aa/square": Line("aa", norm="linf", eps=0.1, survivors_only=True)},
        ),
        audit=audit,
        measures={"macs": 7.0},
    )


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


# ----------------------------------------------------------------------------- writing and merging


def test_checkpoints_that_are_tested_at_once_are_all_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = store._kept
    monkeypatch.setattr(store, "_kept", lambda path: (slow(path), time.sleep(0.05))[0])
    labels = ["last", "selected", "epoch1", "epoch2"]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda label: put(tmp_path / "results.json", label), labels))
    assert set(read_result(tmp_path / "results.json")["checkpoints"]) == set(labels)


def test_the_text_does_not_depend_on_the_order_of_measurements(tmp_path: Path) -> None:
    one, other = tmp_path / "one.json", tmp_path / "other.json"
    audited = entry(audit=AUDIT)
    for label in ("last", "selected", "epoch7"):
        put(one, label, entry=audited)
    for label in ("epoch7", "selected", "last", "selected"):
        put(other, label, entry=audited)
    assert one.read_bytes() == other.read_bytes()
    result = read_result(one)
    assert list(result["checkpoints"]) == list(result["provenance"])
    assert list(result["checkpoints"]) == ["last", "selected", "epoch7"]
    assert result["checkpoints"]["last"] == audited
    text = one.read_text()
    assert json.loads(text) == result
    assert '"per_class": [[5, 5], [4, 5]],' in text, "lists stay on their line"


def test_a_new_measurement_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    put(path, "selected", digest="old")
    put(path, entry=entry(6), digest="old")
    with pytest.warns(UserWarning, match="selected of other settings"):
        merged = put(path, entry=entry(5), digest="new")
    assert merged == read_result(path)
    assert merged["checkpoints"] == {"last": entry(5)}


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
    put(path)
    torn = path.read_text()[:200]
    for number in (1, 2):
        path.write_text(torn)
        with pytest.warns(UserWarning, match=rf"kept as result\.json\.unreadable{number}"):
            put(path)
        assert (tmp_path / f"result.json.unreadable{number}").read_text() == torn
        assert list(read_result(path)["checkpoints"]) == ["last"]


@pytest.mark.parametrize("content", ["{ torn", '{"schema": 3, "mine": 1}', "my diary", "[1, 2]"])
def test_a_file_that_is_no_result_is_not_touched(tmp_path: Path, content: str) -> None:
    path = tmp_path / "result.json"
    path.write_text(content)
    with pytest.raises(ConfigurationError, match="is there and no result"):
        put(path)
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]
    assert path.read_text() == content


def test_what_is_no_number_is_not_written(tmp_path: Path) -> None:
    wrong = entry(audit=AUDIT)
    wrong["metrics"]["macs"] = float("nan")
    with pytest.raises(ConfigurationError, match=r"cannot be written: .*metrics\.macs is nan"):
        put(tmp_path / "result.json", entry=wrong)
    assert not (tmp_path / "result.json").exists()


# ----------------------------------------------------------------------------------------- reading


def _edit(data: Any, keys: str, value: Any) -> Any:
    data = copy.deepcopy(data)
    node = data
    *path, last = keys.split(".")
    for key in path:
        node = node[int(key) if isinstance(node, list) else key]
    if value is KeyError:
        del node[last]
    else:
        node[last] = value
    data["digest"] = content_digest({k: v for k, v in data.items() if k != "digest"})
    return data


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        ("schema", 2, "has schema 2, expected 3"),
        ("schema", KeyError, "schema is missing"),
        ("seed", True, "seed is True"),
        ("mine", 1, "mine is no known key"),
        ("checkpoints", {}, "checkpoints is {}"),
        ("provenance", {}, r"provenance is about \[\], checkpoints about \['last'\]"),
        ("checkpoints.last.examples", 10**7, "checkpoints.last.examples is 10000000"),
        ("checkpoints.last.examples", 11, "last: clean.per_class has 10 examples, not 11"),
        ("checkpoints.last.clean.correct", 8, "last: clean.correct is 8, outcomes gives 9"),
        ("checkpoints.last.clean.per_class", [[5, 5], [3, 5]], "correct is 9, per_class gives 8"),
        ("checkpoints.last.clean.per_class", [[5, 5], [3]], r"clean.per_class.1 is \[3\]"),
        ("checkpoints.last.clean.outcomes", "ff", "2 hexadecimal digits do not hold 10 outcomes"),
        ("checkpoints.last.clean.outcomes", "ffff", "outcomes beyond the first 10"),
        ("checkpoints.last.clean.outcomes", "zz80", "'zz80'"),
        ("checkpoints.last.attacks.aa/square.examples", 0, "aa/square.examples is 0"),
        ("checkpoints.last.attacks.aa/square.subset", "ff", "2 hexadecimal digits do not hold 10"),
        ("checkpoints.last.attacks.aa/square.subset", "f800", "examples is 4, its subset has 5"),
        ("checkpoints.last.attacks.aa/square.subset", KeyError, "examples is 4, its subset has 10"),
        ("checkpoints.last.attacks.aa/square.kind", "probe", "kind is 'probe'"),
        ("checkpoints.last.attacks.aa/square.at", {"eps": "1"}, "at.eps is '1'"),
        ("checkpoints.last.metrics.worst", float("nan"), "metrics.worst is nan"),
        ("checkpoints.last.intervals.aa", [0.1], r"intervals.aa is \[0.1\]"),
        ("checkpoints.last.audit.checks.0.verdict", "ok", "checks.0.verdict is 'ok'"),
    ],
)
def test_a_damaged_file_is_named_with_what_is_wrong(
    tmp_path: Path, keys: str, value: Any, message: str
) -> None:
    path = tmp_path / "result.json"
    data = put(path, entry=entry(audit=AUDIT))
    path.write_text(json.dumps(_edit(data, keys, value)))
    with pytest.raises(ConfigurationError, match=message) as caught:
        read_result(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "run the experiment's test again" in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        ("metrics.macs", 0.5, ""),
        ("metrics.pgd", 0.8, "metrics.pgd is 0.8, the outcomes give 0.7"),
        ("metrics.pgd", KeyError, "metrics.pgd is None"),
        ("intervals.aa", [0.1, 0.2], r"intervals.aa is \[0.1, 0.2\], the outcomes give"),
        ("sizes.worst", 10, "sizes.worst is 10, the outcomes give 4"),
    ],
)
def test_figures_of_an_edited_file_are_those_of_its_outcomes(
    tmp_path: Path, keys: str, value: Any, message: str
) -> None:
    path = tmp_path / "result.json"
    data = _edit(put(path), f"checkpoints.last.{keys}", value)
    path.write_text(json.dumps(data | {"digest": "0" * 64}))
    with pytest.raises(ConfigurationError, match="without taking the digest out"):
        read_result(path)
    del data["digest"]
    path.write_text(json.dumps(data))
    if not message:
        assert read_result(path) == data
        return
    with pytest.raises(ConfigurationError, match=message):
        read_result(path)


def test_a_worst_case_of_nothing_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    data = put(path)
    del data["digest"]
    for attack in data["checkpoints"]["last"]["attacks"].values():
        attack["counts"] = False
    path.write_text(json.dumps(data))
    with pytest.raises(ConfigurationError, match=r"metrics\.worst .* no attack kept to the threat"):
        read_result(path)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", "\x00\xff"])
def test_what_is_no_result_at_all_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "result.json"
    with pytest.raises(ConfigurationError, match=r"result\.json"):
        read_result(path)
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigurationError, match=r"result\.json"):
        read_result(path)


def test_a_newer_schema_asks_for_newer_code(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_json_atomically(path, {**put(path), "schema": SCHEMA + 1})
    with pytest.raises(
        ConfigurationError, match=r"schema 4, expected 3; update the code"
    ) as caught:
        read_result(path)
    assert "delete" not in str(caught.value)


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_the_results_of_the_repository_are_read(path: Path) -> None:
    for checkpoint in read_result(path)["checkpoints"].values():
        assert set(checkpoint["intervals"]) <= set(checkpoint["metrics"])


def test_the_json_schema_is_that_of_the_code() -> None:
    assert json.loads(SCHEMA_FILE.read_text()) == json_schema(), "run -m common.results.schema"


def test_a_folder_is_read_in_order(tmp_path: Path) -> None:
    for experiment, seed in (("b_net", 0), ("a_net", 10), ("a_net", 2)):
        put(result_path(tmp_path, experiment, seed), experiment=experiment, seed=seed)
    write_json_atomically(tmp_path / "analysis.json", {"expectations": []})
    found = [(result["experiment"], result["seed"]) for result in load_results(tmp_path)]
    assert found == [("a_net", 2), ("a_net", 10), ("b_net", 0)]
    assert load_results(tmp_path / "absent") == []
    put(result_path(tmp_path, "other", 0))
    with pytest.raises(ConfigurationError, match=r"belongs in digits_net_plain-seed0\.json"):
        load_results(tmp_path)
