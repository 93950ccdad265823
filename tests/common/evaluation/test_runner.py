"""Chunks, processes and the journal: the same outcomes however the work was cut up."""

import threading
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from common.attacks.autoattack import AutoAttack
from common.attacks.decision import DecisionBased
from common.attacks.noise import GaussianNoise
from common.attacks.pgd import FGSM, PGD
from common.errors import RunDirectoryError
from common.evaluation import SuiteEntry
from common.evaluation.journal import Journal, identity_of
from common.evaluation.models import Victim
from common.evaluation.progress import Progress
from common.evaluation.runner import Team, run_steps
from common.evaluation.suite import steps_of
from common.results.lines import Outcomes, Threat


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 10))
    return Victim(net, 10).eval()


@pytest.fixture
def examples(model) -> dict[str, Tensor]:
    x = torch.rand(13, 3, 8, 8)
    y = model(x).argmax(dim=1)
    y[::5] = (y[::5] + 1) % 10
    return {"x": x, "y": y, "index": torch.arange(13)}


SUITE = {
    "fgsm": SuiteEntry(FGSM(0.003), ["ce_f", "cw_f"]),
    "noise": SuiteEntry(GaussianNoise(levels=[0.1])),
    "pgd": SuiteEntry(PGD(0.006, 0.003, 3, restarts=2), survivors_only=True),
    "aa": SuiteEntry(
        AutoAttack(
            0.008, version="custom", attacks=["apgd-ce", "square"], batch_size=4, steps=3,
            square_queries=5,
        ),
        survivors_only=True,
    ),
}  # fmt: skip


def run(model, examples, suite=SUITE, folder: Path | None = None, **settings: Any) -> Outcomes:
    steps = steps_of(suite, model, 10, seed=0)
    threat = Threat("linf", 0.01)
    if folder is not None:
        settings["journal"] = Journal(folder, identity_of(model, examples, 0))
    return run_steps(model, examples, steps, seed=0, batch_size=5, threat=threat, **settings)


def assert_equal(one: Outcomes, other: Outcomes) -> None:
    assert one.lines == other.lines
    assert passes(one) == passes(other)
    for key in one.correct:
        assert torch.equal(one.correct[key], other.correct[key]), key
        for name, column in one.columns[key].items():
            torch.testing.assert_close(
                column, other.columns[key][name], rtol=0, atol=0, equal_nan=True
            )


def passes(outcomes: Outcomes) -> dict[str, tuple[int, ...]]:
    return {key: cost[1:] for key, cost in outcomes.costs.items()}


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.npz"))


def test_passes_are_those_of_the_attacks(model, examples, past_forward) -> None:
    """Counts that follow from what the attacks do, and from one more pass to judge its end."""
    fab = AutoAttack(0.002, version="custom", attacks=["fab-t"], batch_size=50, steps=2)
    suite = {
        "pgd": SuiteEntry(PGD(0.001, 0.001, 3)),
        "bypass": SuiteEntry(PGD(0.001, 0.001, 3), ["past_forward"]),
        "fab": SuiteEntry(fab),
        "labels": SuiteEntry(DecisionBased(0.001, queries=30)),
    }

    class Declaring(Victim):
        def adaptive_losses(self):
            return super().adaptive_losses() | {"past_forward": past_forward()}

    outcomes = run(Declaring(model.net, 10).eval(), examples, suite)
    found = passes(outcomes)
    keys = ("clean", "pgd/ce_f", "fab/fab-t")
    right, stood, stood_fab = (int(outcomes.correct[key].sum()) for key in keys)
    # Of those that withstood it, the gradient where it ended is computed once more.
    assert found["pgd/ce_f"][1] == found["bypass/past_forward"][1] == 3 * right + stood
    assert found["fab/fab-t"][1] == 9 * 2 * right + stood_fab  # targets, steps
    assert found["labels"][1] == 0 < found["labels"][0] <= 30 * right + 2 * right
    for forward, backward, queries in found.values():
        assert forward >= backward + queries > 0


def test_autoattack_makes_one_pass_where_the_loss_has_the_logits(
    model, examples, past_forward
) -> None:
    aa = AutoAttack(
        0.001, version="custom", attacks=["apgd-ce", "square"], steps=4, square_queries=30
    )
    found = {}
    for has_logits in (False, True):
        victim = Victim(model.net, 10).eval()
        own = past_forward(has_logits)
        victim.adaptive_losses = lambda own=own: {"own": own}
        suite = {"aa": SuiteEntry(aa, ["own"])}
        budgets = {step.key: step.budget for step in steps_of(suite, victim, 10, 0)}
        outcomes = run(victim, examples, suite)
        right = int(outcomes.correct["clean"].sum())
        for part, passes_of in (("apgd-ce", 4), ("square", 30)):
            forward, backward, _ = passes(outcomes)[f"aa/{part}"]
            found[has_logits, part] = forward
            most = right * budgets[f"aa/{part}"].forward
            assert forward <= 1.03 * most  # single images beside it
            assert forward > passes_of * right * (1 if has_logits else 2)
            assert (backward > 0) == (part == "apgd-ce")
        found[has_logits] = outcomes.correct["aa/square"]
    assert torch.equal(found[False], found[True])
    for part, steps in (("apgd-ce", 4), ("square", 30)):
        saved = found[False, part] - found[True, part]
        assert saved >= steps * int(found[False].sum())


def test_processes_share_the_work_and_change_nothing(model, examples) -> None:
    """Threads with a barrier stand for processes; gloo ones are in test_strategy."""
    alone, size = run(model, examples), 3
    barrier, board = threading.Barrier(size), [None] * size
    found: list[Any] = [None] * size
    lock = threading.Lock()

    def member(rank: int) -> None:
        def gather(mine: Any) -> list[Any]:
            board[rank] = mine
            lock.release()
            barrier.wait()
            parts = list(board)
            barrier.wait()
            lock.acquire()
            return parts

        with lock:  # the random state is the process's own: one at a time
            found[rank] = run(deepcopy(model), examples, team=Team(rank, size, gather))

    threads = [threading.Thread(target=member, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for outcomes in found:
        assert_equal(outcomes, alone)


def test_a_killed_run_goes_on_where_it_was(tmp_path, model, examples, monkeypatch) -> None:
    undisturbed = run(model, examples)
    written = Journal.write
    count = 0

    def write(self, *args: Any) -> None:
        nonlocal count
        if self.path(*args[:2]) is None:
            return
        count += 1
        if count == 9:
            raise KeyboardInterrupt
        written(self, *args)

    monkeypatch.setattr(Journal, "write", write)
    with pytest.raises(KeyboardInterrupt):
        run(model, examples, folder=tmp_path)
    done = files(tmp_path)
    assert len(done) == 8
    times = [path.stat().st_mtime_ns for path in done]
    resumed = run(model, examples, folder=tmp_path)
    assert_equal(resumed, undisturbed)
    assert [path.stat().st_mtime_ns for path in done] == times
    assert count == len(files(tmp_path)) + 1


def test_one_more_attack_runs_alone_on_what_survived(tmp_path, model, examples) -> None:
    first = run(model, examples, folder=tmp_path)
    before = set(files(tmp_path))
    more = SUITE | {"late": SuiteEntry(PGD(0.01, 0.003, 5), ["cw_f"], survivors_only=True)}
    run(model, examples, more, folder=tmp_path)
    new = set(files(tmp_path)) - before
    assert new
    assert all(path.name.startswith("late") for path in new)
    attacked = torch.cat([torch.from_numpy(np.load(path)["index"]) for path in new])
    survivors = first.correct["aa/square"].nonzero().flatten()
    assert attacked.sort().values.tolist() == survivors.tolist()


def test_nothing_stale_is_read(tmp_path, model, examples) -> None:
    suite = {"fgsm": SUITE["fgsm"]}

    def count(**changes: Any) -> int:
        before = len(files(tmp_path))
        run(**({"model": model, "examples": examples, "suite": suite} | changes), folder=tmp_path)
        return len(files(tmp_path)) - before

    assert count() > 0
    assert count() == 0
    assert count(suite={"fgsm": SuiteEntry(FGSM(0.0031), ["ce_f", "cw_f"])}) > 0
    model.net[3].bias.data += 1e-3
    assert count() > 0
    assert count(examples=examples | {"x": examples["x"] * 0.9}) > 0


def test_a_damaged_file_is_named_and_made_again(tmp_path, model, examples) -> None:
    undisturbed = run(model, examples, folder=tmp_path)
    victim = files(tmp_path)[3]
    whole = victim.read_bytes()
    victim.write_bytes(whole[: len(whole) // 2])
    with pytest.warns(UserWarning, match=f"{victim.name} is damaged"):
        resumed = run(model, examples, folder=tmp_path)
    assert_equal(resumed, undisturbed)
    assert np.load(victim).files == np.load(files(tmp_path)[3]).files


def test_a_folder_that_cannot_be_written_is_told_at_once(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match="cannot be kept"):
        Journal(tmp_path / "file", {})


def test_progress_tells_what_is_done_and_what_stands(model, examples) -> None:
    told: list[tuple[Any, ...]] = []

    class Listener(Progress):
        def begin(self, step, examples, survivors) -> None:
            told.append((step.key, examples, survivors))

        def advance(self, examples, survivors) -> None:
            told.append((examples, survivors))

        def end(self) -> None:
            told.append(())

    found = run(model, examples, {"fgsm": SUITE["fgsm"]}, progress=Listener())
    right = int(found.correct["clean"].sum())
    assert told[0] == ("clean", 13, 13)
    begun = told.index(("fgsm/ce_f", right, right))
    advances = told[begun + 1 : told.index((), begun)]
    assert sum(examples for examples, _ in advances) == right
    assert advances[-1][1] == int(found.correct["fgsm/ce_f"].sum())
