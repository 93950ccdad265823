"""Which rows and seeds a command is about."""

import pytest

from common.errors import ConfigurationError
from common.results.selection import parse_seeds, select

STEMS = (
    *("digits_a", "digits_b", "cifar10_net", "cifar10_net_mtard", "cifar10_net18_at"),
    *("cifar100_net", "cifar100_net18"),
)


@pytest.mark.parametrize(
    ("on", "expected"),
    [
        ("cifar10_net", {"cifar10_net"}),
        ("cifar10_net*", {"cifar10_net", "cifar10_net_mtard", "cifar10_net18_at"}),
        ("cifar10", {"cifar10_net", "cifar10_net_mtard", "cifar10_net18_at"}),
        ("cifar10_net1", {"cifar10_net18_at"}),
        ("digits *_a[tb]", {"digits_a", "digits_b", "cifar10_net18_at"}),
        ("cifar100_net digits_?", {"cifar100_net", "digits_a", "digits_b"}),
        ("", set(STEMS)),
        ("mnist", set()),
    ],
)
def test_rows_are_chosen_by_name_pattern_or_beginning(on: str, expected: set[str]) -> None:
    assert select(STEMS, on) == sorted(expected)


def test_seeds_are_numbers() -> None:
    assert parse_seeds("2 0, 1 2") == [2, 0, 1]
    for text in ("", "one", "-1", "0.5", f"0 {2**32}", "1" * 5000):
        with pytest.raises(ConfigurationError, match=repr(text[:80])):
            parse_seeds(text)
