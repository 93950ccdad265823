"""Which figures may be set beside each other."""

from typing import Any

import torch

from common.results.bases import bases, comparable, last_of, shared_basis
from common.results.lines import Outcomes
from common.results.outcomes import checkpoint_entry

N = 20


def entry(met: int = N, n: int = N) -> Any:
    """Everybody is right; ``aa`` met the first ``met`` of ``n`` examples, of which it broke one."""
    order = torch.arange(n)
    correct = {"clean": order < n, "pgd/f": order < n, "aa/x": order > 0}
    attacked = {"pgd/f": order < n, "aa/x": order < met}
    return checkpoint_entry(Outcomes(order % 2, correct, attacked), measures={"macs": 3.0})


def test_metrics_about_other_examples_than_most_are_left_out() -> None:
    metrics, left_out = comparable({("a", 0): entry(8), ("a", 1): entry(8), ("b", 0): entry()})
    assert metrics["a", 0]["aa"] == metrics["a", 1]["worst"] == 7 / 8
    assert set(metrics["b", 0]) == {"clean_acc", "pgd/f", "pgd", "pgd_union", "macs"}
    assert "worst of b seed 0 (20 examples): measured on other examples" in " ".join(left_out)
    whole, nothing = comparable({("a", 0): entry(8)})
    assert (whole["a", 0], nothing) == (entry(8)["metrics"], [])


def test_another_split_is_another_basis() -> None:
    metrics, _ = comparable({("a", 0): entry(), ("a", 1): entry(), ("b", 0): entry(18, 18)})
    assert metrics["b", 0] == {}


def test_figures_of_one_checkpoint_share_a_basis_or_have_none() -> None:
    found = bases(entry(8))
    assert shared_basis(found, ["clean_acc", "pgd"]) == found["macs"]
    assert shared_basis(found, ["worst", "aa", "aa_clean"]) == found["worst"]
    assert (found["worst"].size, found["worst"].is_whole) == (8, False)
    assert shared_basis(found, ["clean_acc", "worst"]) is None
    assert shared_basis(found, ["clean_acc", "absent"]) is None


def test_last_checkpoints_by_experiment_and_seed() -> None:
    results: Any = [
        {"experiment": "digits_a", "seed": 1, "checkpoints": {"last": entry()}},
        {"experiment": "digits_b", "seed": 1, "checkpoints": {"selected": entry()}},
        {"experiment": "mnist_a", "seed": 1, "checkpoints": {"last": entry()}},
    ]
    assert list(last_of(results, "digits_")) == [("a", 1)]
