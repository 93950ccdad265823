"""``make gpu`` without a GPU: it continues, nothing ends the rest, and all of it runs on a CPU."""

import json
import os
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import loops, peak
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import autoattack, epochs, machine, papers, steps, table, waits
from benchmarks.gpu import tests as gpu_tests
from benchmarks.gpu.journal import Journal
from benchmarks.gpu.parts import Setting, run
from benchmarks.gpu.supervise import supervise
from benchmarks.loops import Task, candidate
from common.attacks.engine import network as engine
from common.attacks.engine.folding import foldable
from common.networks.resnet import DigitsResNet, ResNet
from common.versions import FAKES_CUDA

ROOT = Path(__file__).parents[2]


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "results" / "gpu-card.json")


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting("cpu", True, time.time() + 300, tmp_path)


def states(journal: Journal) -> dict[str, str]:
    return {key: row["state"] for key, row in journal.rows("steps").items()}


def test_a_call_makes_up_what_failed_and_repeats_nothing(journal, setting) -> None:
    calls: list[str] = []

    def todo(broken: bool) -> dict[str, Any]:
        def one(key: str) -> Any:
            def measure() -> dict[str, Any]:
                calls.append(key)
                assert states(journal)[key] == "running"
                if broken and key == "fails":
                    raise ValueError("no such option\nand more")
                if key == "no number":
                    return {"summary": "fine", "value": float("nan")}
                return {"summary": "fine"} | ({"state": "unfinished"} if key == "epochs" else {})

            return measure

        return {key: one(key) for key in ("first", "fails", "no number", "epochs")}

    run("steps", setting, journal, "one", lambda _: todo(broken=True))
    assert states(journal) == {
        "first": "done", "fails": "failed", "no number": "failed", "epochs": "unfinished"
    }  # fmt: skip
    assert journal.rows("steps")["fails"]["summary"] == "ValueError: no such option"
    run("steps", setting, journal, "one", lambda _: todo(broken=False))
    assert len(calls) == 4, "once a call"
    run("steps", replace(setting, until=time.time()), journal, "two", lambda _: todo(False))
    assert list(states(journal).values()) == ["done", "skipped", "skipped", "unfinished"]
    run("steps", setting, journal, "three", lambda _: todo(broken=False))
    assert calls[4:] == ["fails", "no number", "epochs"]
    assert states(journal)["fails"] == "done"
    run("steps", setting, journal, "four", lambda _: 1 / 0)
    assert "ZeroDivisionError" in journal.rows("steps")["start"]["summary"]
    run("steps", setting, journal, "five", lambda _: todo(broken=False))
    assert set(states(journal)) == {"first", "fails", "no number", "epochs"}


PART = """
import os, sys, time
from pathlib import Path
from benchmarks.gpu.journal import Journal
from benchmarks.gpu.parts import Setting, run
def measure(key):
    with open("made", "a") as file:
        file.write(key + "\\n")
    if key == "crashes":
        os.abort()
    return {"summary": "fine"}
todo = lambda _: {key: (lambda key=key: measure(key)) for key in sys.argv[1].split()}
setting = Setting("cpu", True, time.time() + 100, Path())
run("steps", setting, Journal(Path("journal.json")), "now", todo)
"""


def test_a_crash_or_a_part_that_hangs_ends_nothing_else(tmp_path: Path) -> None:
    """A new process goes on after the crash; what hangs is ended when the time is over."""
    journal = Journal(tmp_path / "journal.json")
    program = f"import os; os.chdir({str(tmp_path)!r})\n{PART}"
    words = [sys.executable, "-c", program, "first crashes last"]
    supervise(words, journal, "steps", "now", time.time() + 60, {"PYTHONPATH": str(ROOT)})
    assert (tmp_path / "made").read_text().split() == ["first", "crashes", "last"]
    assert states(journal) == {"first": "done", "crashes": "failed", "last": "done"}
    assert "-6" in journal.rows("steps")["crashes"]["summary"]
    journal.put("steps", "hangs", {"state": "running", "call": "now"})
    supervise(["sleep", "100"], journal, "steps", "now", time.time() + 0.2)
    assert states(journal)["hangs"] == "skipped"
    for part, seconds in (("papers", 0.2), ("epochs", -1.0)):  # before it says what there is
        supervise(["sleep", "100"], journal, part, "now", time.time() + seconds)
        assert journal.rows(part)["start"]["state"] == "skipped"
        journal.expect(part, ["one"])
        assert list(journal.rows(part)) == ["one"]
    supervise([sys.executable, "-c", "1/0"], journal, "waits", "now", time.time() + 60)
    assert journal.rows("waits")["start"]["state"] == "failed"


def test_steps_are_measured_and_shown_with_what_did_not_fit(setting, journal) -> None:
    named = steps.measurements(setting)
    assert len(steps.measurements(replace(setting, is_smoke=False))) == 1 + 2 * 2 * 3 * 3
    made = named["DigitsResNet, batch 4, bf16"]()
    fp32 = {
        "net": "DigitsResNet", "batch": 4, "numerics": "fp32", "state": "done", "summary": "",
        "rows": {"bare loop": {"images_per_s": 0.001, "wall_s": 0.4, "tflops": 2.0, "ratio": 1.0,
                               "peak_memory_mb": 1500.0}},
        "missing": {"ours": "out of memory"},
    }  # fmt: skip
    journal.describe(machine.described("cpu"))
    journal.put("steps", "peaks", {"state": "done", "summary": "", "gflops": {"matmul fp32": 8e3}})
    journal.put("steps", "small", fp32)
    journal.put("steps", "bf16", made | {"state": "done"})
    text = table.write(journal)
    assert journal.path.with_suffix(".md").read_text() == text
    assert "| bare loop | fp32 | 0 | 1.00 | 1.00 | 1.50 | 25 % |" in text
    assert "| ours | fp32 | out of memory |" in text
    assert all(f"| {name} | bf16 |" in text for name in made["rows"])
    ours = max(r["images_per_s"] for name, r in made["rows"].items() if name.startswith("ours"))
    assert f"≥ 3 | {ours / 0.001:.2f} | reached |" in text


def test_an_attack_that_waits_fails_and_says_where(setting, monkeypatch) -> None:
    plain = waits.cross_entropy
    monkeypatch.setattr(waits, "cross_entropy", lambda *z: plain(*z) * plain(*z).sum().item())
    with pytest.raises(RuntimeError, match=r"test_gpu\.py:\d+ \d+x"):
        waits.measurements(setting)["attacks"]()


def test_a_training_step_waits_once_to_check_its_loss(setting) -> None:
    """Nothing is read for a progress bar that is not there; SGD's state has no numbers to read."""
    (place,) = waits.measurements(setting)["digits_d1-1-3_sat"]()["places"].items()
    assert place[0].startswith("common/callbacks/finite.py:")
    assert place[1] == waits.Watched.steps


def test_cuda_is_asked_to_tell_in_the_phases_that_are_watched(monkeypatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    found = waits.Waits("cuda")
    with found.noticed():
        found.enter("step")
        warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=1)
        with found.during("attack"):
            warnings.warn("another warning", stacklevel=1)
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        found.enter("")
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
    assert modes == ["warn", "warn", "warn", "default"]
    assert found.places["step"].total() == found.places["attack"].total() == 1
    assert "tests/benchmarks/test_gpu.py" in next(iter(found.places["step"]))


def test_failures_of_the_tests_are_counted_by_name(tmp_path: Path) -> None:
    cases = ("good", ""), ("bad", "<failure/>"), ("lost", "<error/>"), ("none", "<skipped/>")
    lines = [f'<testcase classname="test_some" name="{n}">{what}</testcase>' for n, what in cases]
    report = tmp_path / "report.xml"
    report.write_text(f"<testsuites><testsuite>{''.join(lines)}</testsuite></testsuites>")
    found = gpu_tests.counted(report)
    assert (found["passed"], found["skipped"]) == (1, 1)
    assert found["failed"] == ["test_some.bad", "test_some.lost"]


class Process:
    """Ends when it is asked to, or before, or not at all."""

    def __init__(self, status: int | None, is_deaf: bool = False) -> None:
        self.exitcode, self.is_deaf = status, is_deaf

    def join(self, seconds: float | None = None) -> None:
        assert seconds is not None or self.exitcode is not None

    def terminate(self) -> None:
        self.exitcode = self.exitcode if self.is_deaf else 143

    def kill(self) -> None:
        self.exitcode = -9 if self.exitcode is None else self.exitcode


def test_training_is_asked_to_stop_when_the_time_is_over(tmp_path, monkeypatch) -> None:
    log = tmp_path / "log.txt"
    for process, is_finished in (
        (Process(0), True),
        (Process(None), False),
        (Process(None, is_deaf=True), False),
    ):
        monkeypatch.setattr(epochs, "start", lambda *_, made=process: made)
        assert epochs.ended([], log, 0.0) is is_finished
        assert process.exitcode is not None
    log.write_text("begin\nerror: no device\n")
    for module, call in (
        (epochs, lambda: epochs.ended([], log, 0.0)),
        (papers, lambda: papers.command("paper_cifs", [], log, time.time())),
    ):
        monkeypatch.setattr(module, "start", lambda *_: Process(2))
        with pytest.raises(RuntimeError, match="error: no device"):
            call()


def test_images_with_another_verdict_are_listed(file_result, pgd_outcomes, tmp_path) -> None:
    for name, held in (("one", 40), ("other", 38)):
        file_result(tmp_path / name, "paper_x", "row", 0, pgd_outcomes(held))
    one, other = (tmp_path / name / "row-seed0.json" for name in ("one", "other"))
    images, count, differing = papers.compared(one, other)
    assert (images, count) == (50, 1)
    assert differing == {"pgd20/ce_f": [38, 39], "worst": [38, 39]}
    assert papers.compared(one, one)[2] == {}


# --------------------------------------------------------------------------- what only CUDA does


def test_a_card_is_described_and_its_memory_read(monkeypatch) -> None:
    about = SimpleNamespace(total_memory=8e10, major=9, minor=0, name="NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: about)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: about.name)
    found = machine.described("cuda")
    assert (found["processor"], found["memory_gb"], found["capability"]) == (
        about.name,
        80.0,
        "9.0",
    )
    held = iter((100, 350))
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    for name in ("memory_reserved", "max_memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, held.__next__)
    assert peak.reserved_from_here()() == 250


@pytest.mark.skipif(
    not (torch.backends.cuda.is_built() and (FAKES_CUDA or torch.cuda.is_available())),
    reason="torch without CUDA",
)
@pytest.mark.parametrize("numerics", ["fp32", "tf32"])  # autocast wants a device
def test_every_candidate_makes_a_step_on_a_fake_gpu(numerics, monkeypatch) -> None:
    """All but backward passes, which want a real one."""
    zeros = lambda _, x, **__: (torch.zeros_like(x),)  # noqa: E731
    monkeypatch.setattr(torch.autograd, "grad", zeros)
    monkeypatch.setattr(torch.Tensor, "backward", lambda _: None)
    monkeypatch.setattr(engine, "_tried_out", lambda net, *_: (foldable(net), {}))
    monkeypatch.setattr(steps.peers, "available", lambda _: ({}, {}))
    # A module of such tensors can neither be copied nor converted.
    monkeypatch.setattr(loops, "copy", SimpleNamespace(deepcopy=lambda net: net))
    monkeypatch.setattr(nn.Module, "to", lambda net, **_: net)
    with FakeTensorMode(), torch.device("cuda"):
        net = ResNet(depths=(1, 1), widths=(8, 16), strides=(1, 2)).eval()
        what = Task(net, torch.rand(4, 3, 8, 8), torch.zeros(4, dtype=torch.long), steps=2)
        what = replace(what, numerics=numerics)
        for name, (task, build) in steps.eager(what)[0].items():
            if "backward" in name:
                continue
            x_adv = candidate(task, build(task))()
            assert (x_adv.device.type, x_adv.dtype) == ("cuda", torch.float32)
        assert loops.in_channels_last(what).x.is_contiguous(memory_format=torch.channels_last)


def test_a_device_that_is_not_there_or_other_versions_are_refused(
    tmp_path, monkeypatch, capsys
) -> None:
    words = ["--runs", str(tmp_path), "--output", str(tmp_path)]
    monkeypatch.setattr(command, "MACHINE", "raise RuntimeError('no driver')")
    assert command.main(words) == 2
    assert "RuntimeError: no driver" in capsys.readouterr().err
    about = {"processor": "NVIDIA H200", "python": "3.11.7", "versions": {"torch": "2.9.0"}}
    Journal(tmp_path / "gpu-nvidia-h200.json").describe(about)
    about["versions"] = {"torch": "2.15.0"}
    monkeypatch.setattr(command, "MACHINE", f"print('hello'); print({json.dumps(about)!r})")
    assert command.main(words) == 2
    assert "torch 2.9.0" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"machine": {}}', '{"machine": {"processor": "x"}, "parts": {}}',
     '{"machine": {"processor": "x", "python": "3", "versions": null}, "parts": {}}',
     '{"machine": {}, "parts": []}', '{"machine": {}, "parts": {"steps": {"a": {}}}}'],
)  # fmt: skip
def test_a_damaged_file_is_named(tmp_path, monkeypatch, capsys, text) -> None:
    about = {"processor": "card", "python": "3.11.7", "versions": {}}
    monkeypatch.setattr(command, "MACHINE", f"print({json.dumps(about)!r})")
    path = tmp_path / "gpu-card.json"
    path.write_text(text)
    assert command.main(["--runs", str(tmp_path), "--output", str(tmp_path)]) == 2
    assert f"{path} is damaged or holds something else; delete it" in capsys.readouterr().err
    assert path.read_text() == text


@pytest.mark.parametrize("minutes", ["0.5", "-1", "nan", "inf", "soon"])
def test_minutes_without_meaning_are_refused(minutes, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main(["--minutes", minutes])
    assert "more than 0.5 minutes" in capsys.readouterr().err


ORPHAN = """
import os, threading, time
from pathlib import Path
from benchmarks.gpu.__main__ import _end_with
first = os.getpid()
if os.fork() == 0:
    threading.Thread(target=_end_with, args=(first,), daemon=True).start()
    Path("begun").touch()
    time.sleep(30)
    print("survived")
while not Path("begun").exists():
    time.sleep(0.01)
"""


def test_a_part_ends_with_the_command_that_started_it(tmp_path) -> None:
    words = [sys.executable, "-c", ORPHAN]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.Popen(
        words, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, start_new_session=True
    )
    assert done.wait(60) == 0
    assert done.stdout.read() == b""  # the child holds the pipe as long as it lives


def test_networks_of_another_size_have_their_own_file_and_damaged_ones_are_made_again(
    setting, monkeypatch
) -> None:
    monkeypatch.setattr(autoattack, "ResNet18", DigitsResNet)
    monkeypatch.setattr(autoattack, "EPOCHS", 0)

    def weights(setting: Setting) -> dict[str, torch.Tensor]:
        autoattack._network.cache_clear()
        return autoattack.network(setting).state_dict()

    one = weights(setting)
    weights(replace(setting, is_smoke=False))
    small, whole = sorted(setting.runs.glob("*.pt"))
    assert (small.name, whole.name) == ("autoattack-small.pt", "autoattack-whole.pt")
    for damage in (small.read_bytes()[:-500], whole.read_bytes(), b""):
        small.write_bytes(damage)
        again = weights(setting)
        wanted = torch.load(whole) if damage == whole.read_bytes() else one
        assert all(torch.equal(again[name], wanted[name]) for name in one)


# ------------------------------------------------------------------------------------- the whole


@pytest.mark.slow
def test_the_command_runs_on_a_cpu_and_then_has_nothing_left_to_do(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--smoke"]
    words += ["--runs", str(tmp_path / "runs"), "--output", str(tmp_path / "results")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    (path,) = (tmp_path / "results").glob("gpu-*-smoke.json")
    whole = json.loads(path.read_text())
    rows = {
        f"{part} {key}": row for part, rows in whole["parts"].items() for key, row in rows.items()
    }
    problems = {key: row["summary"] for key, row in rows.items() if row["state"] == "failed"}
    assert (done.returncode, problems) == (0, {}), done.stderr[-2000:]
    assert set(whole["parts"]) == set(table.TITLES)
    assert {row["state"] for key, row in rows.items() if "epochs" not in key} == {"done"}
    again = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0
    assert "s left" not in again.stdout.replace("epochs", ""), "nothing is measured again"
