"""Subsets: in proportion, nested, independent of the order of the data."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.data.subset import lacking_classes, subset

UNEVEN = torch.tensor([0] * 70 + [1] * 20 + [2] * 9 + [3])


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(1, 70))
def test_subsets_are_nested_ascending_and_in_proportion(labels, n) -> None:
    y = torch.tensor(labels)
    chosen = subset(y, n)
    assert len(chosen) == min(n, len(y))
    assert torch.equal(chosen, chosen.unique(sorted=True))
    assert set(chosen.tolist()) <= set(subset(y, n + 1).tolist())
    share = len(chosen) / len(y)
    for label in set(labels):
        expected = share * int((y == label).sum())
        assert abs(int((y[chosen] == label).sum()) - expected) <= len(set(labels))


def test_classes_are_in_proportion_however_the_data_are_sorted() -> None:
    for y in (UNEVEN, UNEVEN.flip(0), UNEVEN[torch.randperm(100)]):
        for n, counts in ((20, [14, 4, 2, 0]), (51, [35, 10, 5, 1]), (60, [42, 12, 5, 1])):
            assert y[subset(y, n)].bincount(minlength=4).tolist() == counts


def test_within_a_class_the_examples_are_not_the_first() -> None:
    y = torch.arange(4).repeat_interleave(250)
    chosen = subset(y, 100)
    assert y[chosen].bincount().tolist() == [25] * 4
    assert all(chosen[y[chosen] == label].float().std() > 40 for label in range(4))


def test_everything_or_no_number_takes_all() -> None:
    for n in (None, 100, 1000):
        assert torch.equal(subset(UNEVEN, n), torch.arange(100))


def test_the_numbers_are_fixed() -> None:
    """Results of different machines and versions are about the same examples."""
    assert subset(torch.arange(1000) % 10, 5).tolist() == [272, 403, 626, 759, 760]


@pytest.mark.parametrize(("n", "lost"), [(3, "7 of the 10"), (40, ""), (1, "9 of the 10")])
def test_lacking_classes_are_named(n, lost) -> None:
    y = torch.arange(1000) % 10
    said = lacking_classes(y, subset(y, n))
    assert (lost in said) if lost else said == ""
