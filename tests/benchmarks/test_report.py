"""Numbers behind the tables, and the tables."""

import json
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import goals, passes, report
from benchmarks.__main__ import main as benchmark
from benchmarks.audit import __main__ as audit
from benchmarks.audit import table as audit_table
from benchmarks.gpu import table as gpu_table
from benchmarks.loops import Task, bare
from benchmarks.peak import Passes, flops_of, memory_of
from benchmarks.timing import exponent, interleaved
from common.analysis.profiling import quartiles
from common.attacks.pgd import PGD
from common.evaluation.suite import SuiteEntry
from common.networks.resnet import ResNet18
from common.results.markdown import is_current


def test_turns_alternate_and_ratios_are_within_a_round() -> None:
    calls: list[str] = []
    names = ("one", "two", "three")
    steps = {name: (lambda name=name: calls.append(name)) for name in names}
    kept: list[list[str]] = []
    found = interleaved(steps, "one", rounds=2, keep=lambda times: kept.append(list(times)))
    assert kept == [list(names)] * 2  # after every round
    assert calls == ["one", "two", "three", "one", "one", "three", "two", "one"]
    assert list(found) == list(names)
    assert found["one"].ratio == found["one"].lower == found["one"].upper == 1.0
    for base, rounds in (("four", 2), ("one", 0)):
        with pytest.raises(ValueError, match=rf"one, two, three.*{base}, {rounds}"):
            interleaved(steps, base, rounds)
    calls.clear()
    interleaved(steps, "one", rounds=9, seconds=0.0)
    assert len(calls) == 4  # one round in any case


def test_quartiles_and_exponents() -> None:
    assert quartiles([4.0]) == (4.0, 4.0, 4.0)
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)
    assert exponent({1: 3, 2: 12, 4: 48, 8: 192}) == pytest.approx(2.0)
    assert exponent({0: 3, 1: 12, 3: 48}, offset=1.0) == pytest.approx(2.0)


def test_operations_are_passes_times_twice_the_multiplications() -> None:
    net = nn.Linear(10, 4).eval()
    assert flops_of(net, torch.rand(3, 10), Passes(2, 1, 1)) == 2 * 40 * 3 * 4
    with torch.device("meta"):
        resnet, x = ResNet18().eval(), torch.empty(32, 3, 32, 32)
    assert flops_of(resnet, x, Passes(11, 11, 1)) == pytest.approx(2 * 555_422_720 * 32 * 23)


def test_memory_counts_what_is_alive_at_once() -> None:
    weight = torch.zeros(100)  # 400 bytes

    def step() -> None:
        for _ in range(3):
            a = torch.ones(1000)  # 4000 bytes
            b = a + 1
            del a, b

    assert memory_of(step) == 8000
    assert memory_of(step, weight) == 8400
    assert memory_of(lambda: weight.view(10, 10), weight) == 400


def test_sections_are_kept_beside_each_other(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    growth = {
        "setting": "Small",
        "batch": {"seconds": {8: 0.1, 16: 0.2}, "exponent": 1.0},
        "steps": {"seconds": {1: 0.1}, "exponent": 0.9},
        "network": {"seconds": {"ResNet-18": 2.5}},
    }
    row = dict.fromkeys(("ratio", "lower", "upper"), 0.7) | {"images": 99, "robust": 20}
    row |= {"broken_here_alone": 0, "broken_there_alone": 1}
    evaluation = {"setting": "Digits"} | {
        key: {"rows": {"ours": row}, "rounds": 2} for key in ("autoattack", "pgd100")
    }
    base = {"clean": 0.98, "clean_std": 0.01, "worst": 0.61, "worst_std": 0.02}
    more = {"p": 0.8, "low": -0.01, "high": 0.012}
    tested = {f"{kind}_{name}": v for kind in ("clean", "worst") for name, v in more.items()}
    accuracy = {"setting": "Digits", "rows": {"no engine": base, "bf16": base | tested}}
    report.write("cpu", "accuracy", "cpu", accuracy)
    report.write("cpu", "growth", "cpu", growth)
    report.write("cpu", "evaluation", "cpu", evaluation)
    path = tmp_path / "results/cpu.json"
    assert set(json.loads(path.read_text())) == {"growth", "evaluation", "accuracy"}
    text = path.with_suffix(".md").read_text()
    assert text.index("## Evaluation") < text.index("## Growth")
    assert "| ours | 0.700 | 0.700 to 0.700 | 99 | 20 | 0 | 1 |" in text
    span = "-1.00 to +1.20 | 0.80"
    assert f"| bf16 | 98.00 ± 1.00 | {span} | 61.00 ± 2.00 | {span} |" in text
    assert "| batch | 8: 0.1, 16: 0.2 | 1.00 |" in text
    assert f"torch {torch.__version__.split('+')[0]}" in text


def test_an_interrupted_section_keeps_what_it_had(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    times = iter([0.5, 0.5, 0.5, 1.0, 1.0, 1.0])

    def timed(*_: object) -> tuple[float, float]:
        if (seconds := next(times, None)) is None:
            raise KeyboardInterrupt
        return seconds, seconds

    monkeypatch.setattr("benchmarks.training.timed", timed)
    with pytest.raises(KeyboardInterrupt):
        benchmark(["growth", "--name", "toy"])
    whole = json.loads((tmp_path / "results/toy.json").read_text())
    assert whole["growth"]["found"]["batch"] == {
        "seconds": {"8": 0.5, "16": 1.0},
        "exponent": pytest.approx(1.0),
    }
    assert (tmp_path / "results/toy.md").is_file()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "accuracy --device meta",
            "accuracy takes no --device; leave it out, or measure training or",
        ),
        ("overheads --rounds 3", "overheads takes no --rounds"),
        ("training accuracy --batch 8", "accuracy takes no --batch"),
        ("nothing", "no section 'nothing'; the sections are training, evaluation"),
        ("--batch 8 --examples 9", "no section takes --batch and --examples together"),
        ("--rounds 0", "at least 1, got '0'"),
        ("--device foo", "the device 'foo' cannot be used"),
    ],
)
def test_options_that_a_section_would_ignore_are_refused(words, said, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        raise SystemExit(benchmark(words.split()))
    assert said in capsys.readouterr().err


def test_sections_are_those_that_take_the_options(monkeypatch, tmp_path) -> None:
    measured: list[str] = []
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    (tmp_path / "cpu.md").touch()
    (tmp_path / "meta.md").touch()
    monkeypatch.setattr("benchmarks.__main__.measure", lambda section, *_: measured.append(section))
    for words in ([], ["--full"], ["--rounds", "2"], ["--device", "meta"]):
        assert benchmark(words) == 0
    both = [*report.SECTIONS, *report.SECTIONS]
    assert measured == [*both, "training", "evaluation", "training", "growth"]


def test_passes_of_no_run_are_refused(capsys) -> None:
    for words in (["nowhere"], ["nowhere", "--eps", "foo"]):
        assert passes.main(words) == 2
        assert capsys.readouterr().err.startswith("error: ")


def test_a_row_replaces_the_one_of_its_name(tmp_path) -> None:
    path = tmp_path / "rows.json"
    report.write_row(path, {"name": "a", "value": 1})
    report.write_row(path, {"name": "b", "value": 2})
    rows = report.write_row(path, {"name": "a", "value": 3})
    assert [(row["name"], row["value"]) for row in rows] == [("a", 3), ("b", 2)]
    assert f"torch {torch.__version__.split('+')[0]}" in report.measured_on(rows)
    assert json.loads(path.read_text())["rows"] == {row["name"]: row for row in rows}


def test_committed_numbers_are_those_of_the_tables() -> None:
    def rows(name: str) -> list[report.Row]:
        text = (report.RESULTS / f"{name}.json").read_text(encoding="utf-8")
        return list(json.loads(text)["rows"].values())

    for path in (p for p in report.RESULTS.glob("*.json") if p.stem not in ("audit", "passes")):
        whole = json.loads(path.read_text(encoding="utf-8"))
        is_gpu = path.stem.startswith("gpu-")
        text = gpu_table.rendered(whole) if is_gpu else report.rendered(path.stem, whole)
        assert path.with_suffix(".md").read_text("utf-8") == text
    found = {"curves": passes.curves(rows("passes")), "verdicts": passes.verdicts(rows("passes"))}
    for name, text in found.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        assert is_current(report.RESULTS / "passes.md", text, begin, end)
    audited = audit_table.rendered(rows("audit"))
    assert is_current(audit.README, audited, "<!-- audit -->", "<!-- /audit -->")


def test_passes_of_a_library_are_counted_and_its_images_checked() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).eval()
    x, y = torch.rand(6, 1, 2, 2), torch.randint(3, (6,))
    task = Task(net, x, y, eps=0.1, step_size=0.05, steps=3)
    held, found = passes.theirs(net, x, y, 0.1, bare(task))
    assert held.shape == y.shape
    assert (found["forward"], found["backward"]) == (18, 18)
    with pytest.raises(RuntimeError, match=r"0\.05"):
        passes.theirs(net, x, y, 0.05, bare(task))
    entry = SuiteEntry(PGD(0.1, steps=3, start="zero"))
    _, ours = passes.ours(net, x, y, 0.1, {"pgd": entry})
    assert ours["backward"] <= 18


def test_accuracy_and_passes_are_set_beside_each_other() -> None:
    def cost(robust: int, forward: int) -> dict[str, Any]:
        return {"robust": robust, "forward": forward, "backward": 100, "seconds": forward / 100}

    both = {passes.STRONG: cost(10, 200), passes.OFFICIAL: cost(12, 900)}
    row = {
        **{
            "name": "a",
            "data": "Digits",
            "eps": 0.1,
            "examples": 20,
            "clean": 18,
            "machine": "Toy",
        },
        **{"attacks": both, "missing": {"art": "not there"}},
        **{"broken_by_official_alone": [], "broken_by_strong_alone": [3, 7]},
    }
    more = row | {"name": "b", "attacks": {"ours, PGD-10": cost(15, 60), **both}}
    text = passes.curves([row, more])
    assert "**b**" in text
    assert "**a**" not in text
    order = [text.index(line) for line in ("| 75.0 | 8 | 0.6 |", "| 50.0 | 15 |", "| 60.0 | 50 |")]
    assert order == sorted(order)
    assert "not there" in text
    table = "| 20 | 18 | 12 | 10 | 0 | 2: 3, 7 | 0.30 | 0.22 |"
    assert passes.verdicts([row, more]).count(table) == 2
    assert [ax.get_title() for ax in passes.drawn([row, more]).axes] == ["b"]


def test_a_goal_is_judged_by_what_was_measured() -> None:
    rows = {"bare loop": 1.0, goals.EAGER: 0.92, goals.BF16: 0.5, "foolbox 3.3.4": 1.35}
    whole = {
        "training": {
            "machine": {"bf16_units": "none"},
            "found": {
                "rows": {
                    k: {"ratio": v, "lower": v - 0.02, "upper": v + 0.02, "memory_ratio": 1.2}
                    for k, v in rows.items()
                },
                "peaks_gflops": {"matmul bf16": 30.0, "matmul fp32": 20.0},
            },
        }
    }
    found = {(row[0], row[1]): row[2:] for row in goals.rows(whole)}
    in_fp32 = found["step in fp32 / bare loop", "≤ 0.93"]
    assert in_fp32 == ["0.920", "reached, not by both quartiles"]
    assert found["the same, compiled", "≤ 0.9"] == ["", "not measured"]
    text = "no AMX: bf16 multiplies 1.5 times as fast as fp32"
    assert found["step in bf16 / bare loop", "≤ 0.28"] == ["0.500", text]
    assert found["loops with backward() / ours in fp32", "≥ 1.6"] == ["1.467", "not reached"]
    assert found["the same, ours in bf16", "≥ 8"] == ["2.700", text]
    assert found["peak memory of a step / bare loop's", "≤ 1.1"] == ["1.200", "not reached"]
    whole["training"]["machine"]["bf16_units"] = "AMX"
    found = {(row[0], row[1]): row[2:] for row in goals.rows(whole)}
    assert found["step in bf16 / bare loop", "≤ 0.28"] == ["0.500", "not reached"]
