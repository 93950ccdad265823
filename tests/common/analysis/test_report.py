"""The frame: results and runs that are there, what is missing, files and the command."""

import json
import math

import pytest
import torch
from torch import nn

from common.analysis.claims import judge
from common.analysis.report import Analysis, plain_values
from common.errors import CheckpointError, ConfigurationError
from common.files import read_sealed_json

PGD = "pgd20/ce_f"
REFERENCE = f"""
groups:
- id: other
  title: Another data set
  baseline: cifar10_base
  metrics: &pgd [{{key: {PGD}, title: PGD-20}}]
- {{id: digits, title: Digits, baseline: digits_base, metrics: *pgd}}
rows:
  cifar10_base: {{groups: [other], label: base}}
  digits_base: {{groups: [digits], label: the base}}
  digits_ours: {{groups: [digits], label: ours}}
"""


@pytest.fixture(autouse=True)
def _paper(tmp_path, monkeypatch) -> None:
    (tmp_path / "paper_toy").mkdir()
    (tmp_path / "paper_toy/reference.yaml").write_text(REFERENCE)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.fixture
def write(file_result, pgd_outcomes):
    def write(folder, stem: str, seed: int, held: int, label: str = "last") -> None:
        file_result(folder, "paper_toy", stem, seed, pgd_outcomes(held), label=label)

    return write


def measure(found) -> None:
    found.measured["runs"] = {f"{m} {s}": 1.0 for m, s in found.load_runs(["ours"])}


def toy(**changes) -> Analysis:
    arguments = {
        "package": "paper_toy",
        "claims": lambda found: [
            judge("a", "more", found.gain("ours", "base", PGD), found.seeds, above=0.0)
        ],
        "measure": measure,
        "accuracy": PGD,
        "accuracy_label": "PGD-20 accuracy",
        "needed": {"base": (PGD,)},
    }
    return Analysis(**(arguments | changes))


def load(run):
    if run.name == "seed1":
        raise CheckpointError("weights of another network")
    if run.name == "seed2":
        raise SystemExit(2)
    return nn.Linear(1, 1), None


@pytest.fixture
def results(tmp_path, write):
    for seed in (0, 1):
        write(tmp_path, "digits_base", seed, 20 + seed)
        write(tmp_path, "digits_ours", seed, 30 + 2 * seed)
    return tmp_path


def test_from_results_to_a_file_a_figure_and_a_verdict(results) -> None:
    report = toy().analyse(results / "runs", results, "digits", [0, 1])
    assert [line[2] for line in report["tables"][0]["lines"]] == ["supported"]
    written = read_sealed_json(results / "analysis.json")
    assert written["claims"][0]["judgements"][""]["per_seed"] == {"0": 20.0, "1": 22.0}
    assert len(written["missing"]) == 2, "the runs"
    assert report["figures"] == [str(results / "figures/digits_differences.png")]
    reference = results / "paper_toy/reference.yaml"
    reference.write_text(REFERENCE.replace("baseline: digits_base, ", ""))
    assert toy().analyse(results / "runs", results, "digits", [0, 1])["figures"] == []
    reference.write_text(REFERENCE)
    toy().analyse(results / "runs", results, "digits", [0, 1])
    first = (results / "analysis.json").read_bytes()
    toy().analyse(results / "runs", results, "digits", [0, 1])
    assert (results / "analysis.json").read_bytes() == first


def test_what_is_missing_is_named_and_the_rest_done(results) -> None:
    (results / "digits_base-seed2.json").write_text("{")
    for seed in (0, 1, 2):
        checkpoint = results / f"runs/digits_ours/seed{seed}/checkpoints/last.ckpt"
        checkpoint.parent.mkdir(parents=True)
        checkpoint.touch()
    report = toy().analyse(results / "runs", results, "digits", [0, 1, 2], load=load)
    missing = "\n".join(report["missing"])
    assert "digits_base-seed2.json" in missing
    assert f"{PGD} of digits_base, seed 2" in missing
    assert "digits_ours/seed1/checkpoints/last.ckpt: weights of another network" in missing
    assert "digits_ours/seed2/config.yaml is refused" in missing
    assert report["runs"] == {"ours 0": 1.0}
    assert [line[2] for line in report["tables"][0]["lines"]] == ["not run"]


def test_other_rows_have_another_file(results, write) -> None:
    write(results, "cifar10_grid_a", 0, 3)
    report = toy(measure=lambda found: None).analyse(results, results, "cifar10_grid", [0])
    assert report["path"] == str(results / "analysis_cifar10_grid.json")
    assert report["figures"] == [], "nothing to compare"


def test_the_command_fails_only_where_there_is_nothing(tmp_path, results, capsys) -> None:
    for path in results.glob("*.json"):
        (tmp_path / "runs/results").mkdir(parents=True, exist_ok=True)
        path.rename(tmp_path / "runs/results" / path.name)
    arguments = ["--runs", str(tmp_path / "runs"), "--seeds"]
    assert toy().main([*arguments, "0 1"]) == 0
    output = capsys.readouterr().out
    assert "a | more | supported" in output
    assert "missing: checkpoint" in output
    assert "runs/results/analysis.json" in output
    assert toy().main([*arguments, "4"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: nothing to analyse")
    assert "make reproduce-toy ON=digits" in message
    with pytest.raises(ConfigurationError, match="svhn"):
        toy().analyse(results, results, "svhn", [0])


STEMS = [
    "cifar100_resnet18_a",
    "cifar10_resnet18_a",
    "cifar10_resnet18_b",
    "digits_a",
    "fashion_small_a",
]


@pytest.mark.parametrize(
    ("on", "parts"),
    [
        ("cifar10", ["cifar10"]),
        ("cifar10_resnet18", ["cifar10_resnet18"]),
        ("cifar10_res*", ["cifar10_res"]),
        ("cifar*", ["cifar100", "cifar10"]),
        ("dig*", ["digits"]),
        ("fashion", ["fashion_small"]),
        ("*small*", ["fashion_small"]),
        ("digits_a fashion_small_a", ["digits", "fashion_small"]),
        ("", ["cifar100", "cifar10", "digits", "fashion_small"]),
        ("svhn", ["svhn"]),
    ],
)
def test_every_row_of_a_selection_is_in_an_analysis(on: str, parts: list[str]) -> None:
    assert list(dict.fromkeys(toy().parts(on, STEMS))) == parts


def test_a_damaged_reference_is_one_line(tmp_path, results, capsys) -> None:
    (tmp_path / "paper_toy/reference.yaml").write_text("rows: [")
    assert toy().main(["--runs", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_numbers_that_are_not_finite_become_null() -> None:
    values = {"a": torch.tensor([1.0, math.nan]), 3: [math.inf, True, None, "x"]}
    assert plain_values(values) == {"a": [1.0, None], "3": [None, True, None, "x"]}
    assert json.dumps(plain_values(values))
