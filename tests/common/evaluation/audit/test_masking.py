"""Models that hide their weakness from gradients: an audit raises an alarm on each."""

from copy import deepcopy

import pytest
import torch

from benchmarks.audit.measure import Attempt
from benchmarks.audit.table import rendered
from benchmarks.audit.zoo import ZOO

pytestmark = pytest.mark.filterwarnings("ignore")

QUICK = ("decoy shell", "counts calls")
HIDDEN = ("decoy shell", "thermometer with a table", "one class hidden", "routed to experts")
BLACK_BOX = {"gradient_free", "black_box", "transfer", "random_search"}


def cases(*quick: str, is_masked: bool):
    return [
        pytest.param(case, id=case.name, marks=() if case.name in quick else pytest.mark.slow)
        for case in ZOO
        if case.is_masked is is_masked
    ]


def failed(checks) -> set[str]:
    return {name for name, check in checks.items() if check["verdict"] == "fail"}


@pytest.mark.parametrize("case", cases(*QUICK, is_masked=True))
def test_masked_models_raise_an_alarm(lab, case) -> None:
    torch.manual_seed(0)
    model = case.make()
    # A class of ten is five images of fifty: too few to be told from chance.
    examples = 100 if case.name == "one class hidden" else 50
    x, y = (part[:examples] for part in lab.images("test"))
    attempt = Attempt(case, deepcopy(model), x, y)
    claimed, true = attempt.plain(), attempt.knowing()[0]
    assert true <= claimed - 0.05
    checks, outcomes = lab.audited(model, examples=examples)
    assert failed(checks)
    assert not case.is_stateful or "stateless" in failed(checks)
    if case.name not in HIDDEN:
        return
    assert failed(checks) & BLACK_BOX
    counted = [key for key, line in outcomes.lines.items() if line.counts]
    met = outcomes.attacked["audit_fgsm"]
    worst = torch.stack([outcomes.correct[key][met] for key in counted]).all(dim=0)
    white = outcomes.correct["audit_restarts"][met]
    assert worst.float().mean() <= 0.2  # with the few queries of a test
    assert white.float().mean() > worst.float().mean()


@pytest.mark.parametrize("case", cases("CNN, natural training", is_masked=False))
def test_honest_models_are_as_good_as_claimed(lab, case) -> None:
    torch.manual_seed(0)
    model = case.make()
    x, y = (part[:50] for part in lab.images("test"))
    attempt = Attempt(case, deepcopy(model), x, y)
    assert (attempt.labels(x) == y).float().mean() > 0.7
    # Cross-entropy alone overestimates TRADES.
    assert attempt.plain() - attempt.knowing()[0] <= 0.2
    # With fewer steps labels alone find more of the median filter than gradients do.
    assert failed(lab.audited(model, steps=40, restarts=10)[0]) == set()


def test_a_table_counts_what_was_flagged() -> None:
    def row(name, is_masked, half, failed):
        numbers = {"clean": 1.0, "claimed": 0.5, "true": 0.0, "seconds": 30.0, "examples": 100}
        about = {"name": name, "is_masked": is_masked, "half": half, "machine": "Toy"}
        return numbers | about | {"failed": failed}

    rows = [
        row("a", True, "design", ["transfer"]),
        row("b", True, "held out", []),
        row("c", False, "design", []),
    ]
    text = rendered(rows)
    assert "| 1 of 1 (21 to 100 %) | 0 of 1 (0 to 79 %) | 1 of 2 (9 to 91 %) |" in text
    assert "| 0 of 1 (0 to 79 %) |  | 0 of 1 (0 to 79 %) |" in text
    assert "| a | design | 100 | 50 | 0 | yes | transfer |" in text


def test_the_zoo_is_large_and_every_second_network_is_held_out() -> None:
    assert len({case.name for case in ZOO}) == len(ZOO)
    for is_masked, least in ((True, 20), (False, 10)):
        halves = [case.half for case in ZOO if case.is_masked is is_masked]
        assert len(halves) >= least
        assert abs(halves.count("design") - halves.count("held out")) <= 1
