"""A setting with a few words to choose from refuses every other, wherever it is."""

import importlib
import inspect
import pkgutil
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, get_args, get_origin
from unittest.mock import MagicMock

import pytest
import torch

from common.errors import ConfigurationError, check_choice

PACKAGES = ("common", "paper_awnet", "paper_cifs", "paper_rcm", "paper_robustwrn", "paper_wm")
# With bases elsewhere:
NOT_OURS = {"ColumnsConv2d", "FactorConv2d", "ProductConv2d", "WinogradConv2d", "SafeCheckpoint"}
PLACEHOLDER = {"mean", "std"}  # "data" beside numbers: see Normalize

ARGUMENTS: dict[str, Any] = {
    "eps": 0.1,
    "x": torch.rand(2, 1, 8, 8),
    "maps": torch.rand(2, 1, 8, 8),
    "shape": (1, 8, 8),
    "size": 8,
    "budget": 10,
    "normal": [("skip_connect", 0), ("skip_connect", 1)],
    "normal_concat": [2],
    "at": {},
    "attacks": ["square"],
    "num_classes": 3,
    "channels": 4,
    "k": 3,
    "height": 8,
    "width": 8,
    "side": 8,
    "stride": 1,
    "strides": (1, 1, 1),
    "suite": {},
    "widths": [4],
}
"""What a required argument gets by its name; any other gets a stand-in that can do everything."""


def literals(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) is Literal:
        yield annotation
    for part in get_args(annotation):
        if not isinstance(part, str | int):
            yield from literals(part)


def hints_of(target: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(target)
    except NameError:  # an annotation for type checkers alone
        return {}


def wrong(annotation: Any) -> Any:
    """A value that is no choice, in a list or in pairs where the setting is one."""
    for part in (annotation, *get_args(annotation)):
        if get_origin(part) in (list, Sequence):
            return [("nonsense", 0)] if "tuple" in str(part) else ["nonsense"]
    return "nonsense"


def settings() -> Iterator[Any]:
    """Every argument of a public class, method or function that is one of a few words."""
    for package in PACKAGES:
        root = importlib.import_module(package)
        for info in pkgutil.walk_packages(root.__path__, f"{package}."):
            if info.name.endswith("__main__"):
                continue
            for name, item in vars(importlib.import_module(info.name)).items():
                is_own = getattr(item, "__module__", None) == info.name and callable(item)
                is_left_out = name.startswith("_") or name in NOT_OURS or inspect.isabstract(item)
                is_read = info.name == "common.results.reference"  # checked with the file
                if not is_own or is_left_out or is_read:
                    continue
                target = item.__init__ if inspect.isclass(item) else item
                for argument, hint in hints_of(target).items():
                    if argument in PLACEHOLDER | {"return"} or not any(literals(hint)):
                        continue
                    yield pytest.param(item, argument, hint, id=f"{info.name}.{name}-{argument}")


def call(item: Callable[..., Any], **given: Any) -> None:
    parameters = inspect.signature(item).parameters.values()
    required = [p.name for p in parameters if p.default is p.empty and p.kind not in (2, 4)]
    stand_ins = {name: ARGUMENTS.get(name, MagicMock()) for name in required}
    for name in set(required) - given.keys():  # other choices, so that ours is the wrong one
        target = item.__init__ if inspect.isclass(item) else item  # type: ignore[misc]
        found = list(literals(typing.get_type_hints(target).get(name)))
        if found and name not in ARGUMENTS:
            stand_ins[name] = get_args(found[0])[0]
    made = item(**stand_ins | given)
    if hasattr(made, "__enter__"):
        made.__enter__()


@pytest.mark.parametrize(("item", "argument", "hint"), list(settings()))
def test_a_word_that_is_no_choice_is_refused_in_one_line(item, argument, hint) -> None:
    with pytest.raises(ConfigurationError) as caught:
        call(item, **{argument: wrong(hint)})
    assert "nonsense" in str(caught.value)
    assert "\n" not in str(caught.value)
    choices = [choice for literal in literals(hint) for choice in get_args(literal)]
    assert all(str(choice) in str(caught.value) for choice in choices)


@pytest.mark.parametrize("value", ["3", 3.0, True, None, [], "b"])
def test_a_choice_is_of_the_same_type(value) -> None:
    check_choice("setting", 3, Literal["a", 3])
    with pytest.raises(ConfigurationError, match=r"setting must be one of a, 3, got"):
        check_choice("setting", value, Literal["a", 3])
