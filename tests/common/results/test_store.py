"""Result files: packing, metrics, merging, writing, and what is said about damaged ones."""

import copy
import json
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ConfigurationError, RunDirectoryError
from common.files import check_writable, write_json_atomically
from common.results.lines import Line, Outcomes, Threat
from common.results.outcomes import checkpoint_entry, figures, logged, outcome_bits, positions
from common.results.packing import listed, pack_outcomes, packed_bits
from common.results.schema import SCHEMA, SCHEMA_FILE, json_schema
from common.results.statistics import wilson_interval
from common.results.store import load_results, merge_result, read_result, result_path

Y = [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
CLEAN = [1, 1, 1, 1, 1, 1, 1, 1, 0, 1]
PGD_F = [1, 1, 0, 1, 1, 0, 1, 1, 0, 1]
PGD_P = [0, 1, 1, 1, 1, 0, 1, 1, 0, 1]
APGD = [1, 0, 0, 1]  # of the first four
SQUARE = [0, 0, 0, 1]
COMMITTED = sorted((Path(__file__).parents[3] / "paper_cifs" / "results").glob("*-seed*.json"))


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
        lines={
            name: Line(entry="aa", norm="linf", eps=0.1, survivors_only=True)
            for name in ("aa/apgd-ce", "aa/square")
        },
        threat=Threat("linf", "1/10"),
    )


def entry(**other: list[int]) -> Any:
    return checkpoint_entry(outcomes(**other), epoch=29, global_step=240)


AUDIT: dict[str, Any] = {
    "examples": 4,
    "checks": [
        {
            "id": "steps",
            "question": "Do more steps break no more?",
            "value": 0.5,
            "threshold": 1,
            "verdict": "pass",
            "detail": "",
        },
        {
            "id": "blackbox",
            "question": "Is a white box stronger than a black one?",
            "value": None,
            "threshold": None,
            "verdict": "not applicable",
            "detail": "no black-box attack in the suite",
        },
    ],
}


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
    assert listed(packed_bits(packed, len(bits)), len(bits)) == bits


def test_the_first_outcome_is_the_highest_bit() -> None:
    assert pack_outcomes([True] + [False] * 7) == "80"
    assert pack_outcomes(torch.tensor([True, False, True, True, False, False, False, False, True]))
    assert pack_outcomes([1, 0, 1, 1, 0, 0, 0, 0, 1]) == "b080"


@pytest.mark.parametrize(("text", "n"), [("80", 9), ("8000", 8), ("01", 7), ("zz", 8)])
def test_what_is_no_packing_is_refused(text: str, n: int) -> None:
    with pytest.raises(ValueError, match=r"hold|beyond|invalid literal"):
        listed(packed_bits(text, n), n)


def test_counts_and_the_order_of_the_suite() -> None:
    result = entry()
    assert list(result) == [
        *("epoch", "global_step", "examples", "threat", "clean", "attacks"),
        *("metrics", "intervals", "sizes", "remarks"),
    ]
    assert result["threat"] == {"norm": "linf", "eps": 0.1}
    assert list(result["attacks"]) == ["pgd20/ce_f", "pgd20/ce_p1", "aa/apgd-ce", "aa/square"]
    assert result["clean"]["per_class"] == [[4, 4], [3, 3], [2, 3]]
    assert result["attacks"]["pgd20/ce_f"] == {
        "kind": "attack",
        "norm": None,
        "eps": None,
        "counts": True,
        "at": {},
        "correct": 7,
        "examples": 10,
        "survivors_only": False,
        "per_class": [[4, 4], [3, 3], [0, 3]],
        "outcomes": pack_outcomes(PGD_F),
    }
    assert result["attacks"]["aa/square"]["examples"] == 4
    assert result["attacks"]["aa/square"]["survivors_only"]
    assert result["attacks"]["aa/square"]["eps"] == 0.1
    assert result["attacks"]["aa/square"]["per_class"] == [[1, 2], [0, 1], [0, 1]]
    assert result["attacks"]["aa/square"]["subset"] == pack_outcomes([1] * 4 + [0] * 6)
    assert result["sizes"] == dict.fromkeys(
        ("aa/apgd-ce", "aa/square", "aa", "aa_clean", "worst", "worst_clean"), 4
    )


def parts(**met: list[int]) -> Any:
    """A suite whose attacks, all right on everybody, were given these examples only."""
    n = len(Y)
    steps = {name.replace("_", "/"): positions for name, positions in met.items()}
    return checkpoint_entry(
        Outcomes(
            y=torch.tensor(Y),
            correct={name: torch.tensor(CLEAN, dtype=torch.bool) for name in ("clean", *steps)},
            attacked={
                name: torch.zeros(n, dtype=torch.bool).index_fill(0, torch.tensor(rows), True)
                for name, rows in steps.items()
            },
        )
    )


def test_a_worst_case_is_over_the_examples_that_met_every_attack() -> None:
    nested = parts(a_f=[1, 3, 5, 7, 8, 9], b_f=[3, 8])
    assert nested["metrics"]["worst"] == nested["metrics"]["worst_clean"] == 0.5
    assert nested["sizes"]["worst"] == 2
    assert positions(nested, "worst") == [3, 8]
    assert outcome_bits(nested, "worst") == [True, False]
    one = parts(a_f=list(range(10)), b_f=[4])
    assert (one["metrics"]["worst"], one["sizes"]["worst"]) == (1.0, 1)
    apart = parts(a_f=[0, 1, 2], b_f=[3, 4])
    assert "worst" not in apart["metrics"]
    assert apart["remarks"] == ["there is no worst case: no example met every attack"]


def test_losses_on_as_many_but_other_examples_have_no_common_figure() -> None:
    found = parts(a_f=[0, 1], a_g=[2, 8])
    assert not {"a", "a_union", "a_clean"} & set(found["metrics"])
    assert found["attacks"]["a/g"]["per_class"] == [[0, 0], [0, 0], [1, 2]]


def test_metrics_of_a_part_are_logged_under_another_name() -> None:
    assert set(logged(parts(a_f=[0, 1]))) == {
        *("clean_acc", "a/f_on_2", "a_on_2", "a_union_on_2"),
        *("a_clean_on_2", "worst_on_2", "worst_clean_on_2"),
    }
    assert set(logged(parts(a_f=list(range(10))))) == {"clean_acc", "a/f", "a", "a_union", "worst"}


def test_without_an_attack_that_could_break_them_examples_are_not_robust() -> None:
    weakness = "all its steps together, 0, are less than its radius 0.1"
    few = {name: replace(line, weakness=weakness) for name, line in swept_lines().items()}
    found = swept(**few)
    assert "worst" not in found["metrics"]
    assert "pgd/ce_f: all its steps together, 0, are less than its radius" in found["remarks"][0]
    one = swept(**few | {"pgd/ce_f": Line("pgd")})
    assert one["metrics"]["worst"] == swept()["metrics"]["worst"]
    assert one["remarks"] == []


def test_a_worst_case_of_0_is_right_whatever_broke_them() -> None:
    found = outcomes(**{"pgd20/ce_f": [0] * 10})
    found.lines = {name: Line(name.partition("/")[0], weakness="weak") for name in found.attacked}
    assert checkpoint_entry(found)["metrics"]["worst"] == 0.0


def test_a_step_under_the_name_of_another_entry_is_refused() -> None:
    found = outcomes()
    found.lines["aa/square"] = Line(entry="square")
    with pytest.raises(ValueError, match="aa/square belongs to the suite entry 'square'"):
        checkpoint_entry(found)


def test_distances_are_medians_over_what_the_step_broke() -> None:
    nan = float("nan")
    found = outcomes()
    columns = {
        "correct": torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 0, 0], dtype=torch.bool),
        # the ninth is wrong without an attack, the last was not run
        "linf": torch.tensor([0.1, 0.3, 0.05, 0.2, 9, 9, 9, 9, 9, nan]),
        "loss": torch.zeros(10),
    }
    found.columns["pgd20/ce_f"] = columns
    found.columns["pgd20/ce_p1"] = {"correct": torch.zeros(10), "l2": torch.full((10,), nan)}
    # four examples only
    found.columns["aa/square"] = columns | {"linf": torch.tensor([1, 2, 3, nan] + [9.0] * 6)}
    attacks = checkpoint_entry(found)["attacks"]
    assert attacks["pgd20/ce_f"]["distances"] == {"linf": 0.15}
    assert attacks["pgd20/ce_p1"]["distances"] == {"l2": None}
    assert attacks["aa/square"]["distances"] == {"linf": 2.0}
    assert "distances" not in attacks["aa/apgd-ce"]


def test_metrics_by_hand() -> None:
    survive_all = [a & b & c for a, b, c in zip(CLEAN, PGD_F, PGD_P, strict=True)]
    # of the four examples that met every attack
    worst = [a & b & c for a, b, c in zip(survive_all[:4], APGD, SQUARE, strict=True)]
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
        "worst": sum(worst) / 4,
        "worst_clean": 1.0,
    }
    assert sum(survive_all) == 6  # the union is below every single loss
    assert sum(worst) == 1


def test_losses_on_different_examples_have_no_common_figure() -> None:
    metrics = entry(**{"pgd20/ce_p2": [1, 1, 1, 1, 1]})["metrics"]
    assert not {"pgd20", "pgd20_union", "pgd20_clean"} & set(metrics)
    assert metrics["pgd20/ce_p2"] == 1.0


def test_a_fresh_and_a_cumulative_figure_are_not_compared() -> None:
    result = entry()
    result["attacks"]["pgd20/ce_p1"]["survivors_only"] = True
    found = figures(result["clean"], result["attacks"])
    assert not {"pgd20", "pgd20_union"} & set(found)


def swept_lines() -> dict[str, Line]:
    return {
        "pgd/ce_f": Line("pgd"),
        "eps/ce_f/eps=0.1": Line("eps", at={"eps": 0.1}),
        "eps/ce_p1/eps=0.1": Line("eps", at={"eps": 0.1}),
        "eps/ce_f/eps=0.2": Line("eps", counts=False, at={"eps": 0.2}),
        "noise/level=0.2/draw=0": Line("noise", "noise", at={"level": 0.2, "draw": 0}),
        "noise/level=0.2/draw=1": Line("noise", "noise", at={"level": 0.2, "draw": 1}),
        "noise/level=0.4": Line("noise", "noise", at={"level": 0.4}),
    }


def swept(**lines: Line) -> Any:
    """A suite of steps in a sweep; each is right on as many examples as it has a number."""
    n = len(Y)
    right = {"pgd/ce_f": 8, "eps/ce_f/eps=0.1": 6, "eps/ce_p1/eps=0.1": 5, "eps/ce_f/eps=0.2": 1}
    right |= {"noise/level=0.2/draw=0": 9, "noise/level=0.2/draw=1": 6, "noise/level=0.4": 3}
    order = torch.arange(n)
    return checkpoint_entry(
        Outcomes(
            y=torch.tensor(Y),
            correct={
                "clean": order < n,
                **{name: (order + 3 * i) % n < k for i, (name, k) in enumerate(right.items())},
            },
            attacked=dict.fromkeys(right, order < n),
            lines={**swept_lines(), **lines},
        )
    )


def test_the_points_of_a_sweep_are_groups_of_their_own() -> None:
    metrics = swept()["metrics"]
    assert "eps" not in metrics
    assert metrics["eps/eps=0.1"] == 0.5
    assert metrics["eps/eps=0.1_union"] == 0.2
    assert metrics["eps/eps=0.2"] == metrics["eps/ce_f/eps=0.2"] == 0.1


def test_noise_is_a_mean_over_draws_and_no_union() -> None:
    metrics = swept()["metrics"]
    assert metrics["noise/level=0.2"] == 0.75
    assert metrics["noise/level=0.4"] == 0.3
    assert not [name for name in metrics if "noise" in name and "union" in name]


def test_a_mean_over_draws_has_no_interval_and_the_rest_has() -> None:
    found = swept()
    assert set(found["metrics"]) - set(found["intervals"]) == {"noise/level=0.2"}
    low, high = found["intervals"]["eps/eps=0.1"]
    assert (low, high) == pytest.approx(wilson_interval(5, 10), abs=1e-6)
    assert entry()["intervals"]["aa"] == pytest.approx(wilson_interval(1, 4), abs=1e-6)


def test_only_attacks_that_count_enter_the_worst_case() -> None:
    # what pgd and both losses at 0.1 leave; neither noise nor the radius beyond counts
    assert swept()["metrics"]["worst"] == 0.1
    without = {name: Line(name.partition("/")[0], counts=False) for name in swept()["attacks"]}
    assert "worst" not in swept(**without)["metrics"]


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("clean_acc", CLEAN),
        ("pgd20/ce_f", PGD_F),
        ("pgd20_union", [a & b for a, b in zip(PGD_F, PGD_P, strict=True)]),
        ("aa/square", SQUARE),
        ("aa_clean", CLEAN[:4]),
        ("worst", [0, 0, 0, 1]),
        ("fgsm", PGD_P),
        ("pgd20", None),
        ("absent", None),
    ],
)
def test_the_examples_behind_a_metric(metric: str, expected: list[int] | None) -> None:
    assert outcome_bits(entry(**{"fgsm/ce_f": PGD_P}), metric) == expected


def test_examples_behind_a_mean_over_draws_are_not_named() -> None:
    found = swept()
    assert outcome_bits(found, "noise/level=0.2") is None
    assert sum(outcome_bits(found, "noise/level=0.4") or []) == 3


def test_every_figure_is_that_of_its_examples() -> None:
    for found in (entry(), swept()):
        for name, value in found["metrics"].items():
            bits = outcome_bits(found, name)
            assert bits is None or sum(bits) / len(bits) == value


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
    with pytest.raises(RunDirectoryError, match=r"result\.json: No space left.*Make room"):
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


# --------------------------------------------------------------------------------------- reading


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
    return data


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        ("schema", 0, "has schema 0, expected 3"),
        ("schema", 2, "has schema 2, expected 3"),
        ("schema", "2", "schema is '2'"),
        ("schema", True, "schema True"),
        ("schema", KeyError, "schema is missing"),
        ("seed", "0", "seed is '0'"),
        ("seed", True, "seed is True"),
        ("paper", KeyError, "paper is missing"),
        ("checkpoints", {}, "checkpoints is {}"),
        ("checkpoints", [], r"checkpoints is \[\]"),
        ("checkpoints.last", 3, "checkpoints.last is 3"),
        ("provenance", {}, "provenance is about"),
        ("provenance.last.config_digest", KeyError, "provenance.last.config_digest is missing"),
        ("checkpoints.last.epoch", 1.5, "checkpoints.last.epoch is 1.5"),
        ("checkpoints.last.examples", 11, "per_class has 10 examples, not 11"),
        ("checkpoints.last.clean.correct", 8, "correct is 8, outcomes gives 9"),
        ("checkpoints.last.clean.per_class", [[4, 4], [2, 3], [2, 3]], "per_class gives 8"),
        ("checkpoints.last.clean.outcomes", "ff", "2 hexadecimal digits do not hold 10 outcomes"),
        ("checkpoints.last.clean.outcomes", "ffff", "outcomes beyond the first 10"),
        ("checkpoints.last.attacks.aa/square.examples", 0, "examples is 0"),
        ("checkpoints.last.attacks.aa/square.subset", "ff", "2 hexadecimal digits do not hold 10"),
        ("checkpoints.last.attacks.aa/square.subset", "f800", "examples is 4, its subset has 5"),
        ("checkpoints.last.attacks.aa/square.subset", "7800", "the outcomes give"),
        ("checkpoints.last.attacks.aa/square.subset", KeyError, "examples is 4, its subset has 10"),
        ("checkpoints.last.attacks.pgd20/ce_f.weakness", True, "weakness is True"),
        ("checkpoints.last.sizes.worst", 10, "sizes.worst is 10, the outcomes give 4"),
        ("checkpoints.last.sizes", KeyError, "sizes is missing"),
        ("checkpoints.last.remarks", "none", "remarks is 'none'"),
        ("checkpoints.last.attacks.aa/square.survivors_only", 1, "survivors_only is 1"),
        ("checkpoints.last.metrics.pgd20", 0.8, "metrics.pgd20 is 0.8, the outcomes give 0.7"),
        ("checkpoints.last.metrics.pgd20", KeyError, "metrics.pgd20 is None"),
        ("checkpoints.last.metrics.more", "much", "metrics.more is 'much'"),
        ("checkpoints.last.metrics.worst", float("nan"), "metrics.worst is nan"),
        ("checkpoints.last.threat", KeyError, "checkpoints.last.threat is missing"),
        ("checkpoints.last.threat.eps", "8/255", "threat.eps is '8/255'"),
        ("checkpoints.last.intervals", KeyError, "intervals is missing"),
        ("checkpoints.last.intervals.aa", KeyError, "intervals.aa is None, the outcomes give"),
        ("checkpoints.last.intervals.aa", [0.1], r"intervals.aa is \[0.1\]"),
        ("checkpoints.last.intervals.aa", [0.1, 0.2], "intervals.aa is .*, the outcomes give"),
        ("checkpoints.last.intervals.aa", 0.1, "intervals.aa is 0.1"),
        ("checkpoints.last.attacks.aa/square", 7, "attacks.aa/square is 7"),
        ("checkpoints.last.attacks.aa/square.kind", "probe", "kind is 'probe'"),
        ("checkpoints.last.attacks.aa/square.norm", 2, "norm is 2"),
        ("checkpoints.last.attacks.aa/square.eps", "0.1", "eps is '0.1'"),
        ("checkpoints.last.attacks.aa/square.counts", 1, "counts is 1"),
        ("checkpoints.last.attacks.aa/square.at", KeyError, "at is missing"),
        ("checkpoints.last.attacks.aa/square.at", {"eps": "1"}, "at.eps is '1'"),
        ("checkpoints.last.attacks.aa/square.distances", {"l2": "1"}, "distances.l2 is '1'"),
        ("checkpoints.last.audit.examples", None, "audit.examples is None"),
        ("checkpoints.last.audit.checks", {}, "audit.checks is {}"),
        ("checkpoints.last.audit.checks.0.verdict", "ok", "verdict is 'ok'"),
        ("checkpoints.last.audit.checks.0.value", "1", "audit.checks.0.value is '1'"),
        ("checkpoints.last.audit.checks.1.detail", KeyError, "checks.1.detail is missing"),
    ],
)
def test_a_damaged_file_is_named_with_what_is_wrong(
    tmp_path: Path, keys: str, value: Any, message: str
) -> None:
    path = tmp_path / "result.json"
    data = put(path, entry=checkpoint_entry(outcomes(), audit=AUDIT))
    del data["digest"]  # as after an edit by hand
    path.write_text(json.dumps(_edit(data, keys, value)))
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


def test_a_worst_case_of_nothing_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    found = put(path)
    del found["digest"]
    for attack in found["checkpoints"]["last"]["attacks"].values():
        attack["counts"] = False
    write_json_atomically(path, found)
    with pytest.raises(ConfigurationError, match=r"metrics\.worst .* no attack kept to the threat"):
        read_result(path)


def test_figures_are_stored_and_sealed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.json"
    data = put(path)
    monkeypatch.setattr("common.results.store.figures", None)  # not computed again
    assert read_result(path) == data
    write_json_atomically(path, _edit(data, "checkpoints.last.metrics.worst", 0.5))
    with pytest.raises(ConfigurationError, match="without taking the digest out"):
        read_result(path)


def test_the_json_schema_is_that_of_the_types() -> None:
    assert json.loads(SCHEMA_FILE.read_text()) == json_schema()


def test_a_newer_schema_asks_for_newer_code(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_json_atomically(path, {**put(path), "schema": SCHEMA + 1})
    with pytest.raises(ConfigurationError, match=r"schema 4, expected 3; update the code") as e:
        read_result(path)
    assert "delete" not in str(e.value)


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_the_results_of_the_repository_are_read(path: Path) -> None:
    for checkpoint in read_result(path)["checkpoints"].values():
        assert set(checkpoint["intervals"]) == set(checkpoint["metrics"])


def test_an_audit_stays_with_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    put(path, "selected", entry=checkpoint_entry(outcomes(), audit=AUDIT))
    put(path, "last")
    checkpoints = read_result(path)["checkpoints"]
    assert checkpoints["selected"]["audit"] == AUDIT
    assert "audit" not in checkpoints["last"]


def test_an_audit_without_a_number_is_not_written(tmp_path: Path) -> None:
    audit = _edit(AUDIT, "checks.0.value", float("nan"))
    with pytest.raises(ConfigurationError, match=r"audit\.checks\.0\.value is nan"):
        put(tmp_path / "result.json", entry=checkpoint_entry(outcomes(), audit=audit))


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
