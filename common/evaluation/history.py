"""Whether a model depends on earlier calls: copies of it, and the values inside it.

A model may keep a memory in buffers, attributes, closures, class attributes or globals. It is found
by comparing the scores of a used and of a fresh copy, and the values inside them.
"""

import copy
import random
import types
from array import array
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_INTERNAL = set(vars(nn.Module()))
_LIBRARIES = ("torch", "torchvision", "lightning")
_VALUES = (list, dict, set, int, float, Tensor)
DEPTH = 6
"""Levels of containers and objects within one attribute of a module that are compared."""


def copied(model: nn.Module) -> nn.Module:
    """A copy that shares nothing with the model that can be copied."""
    try:
        with torch.no_grad():  # copies of TorchScript's weights would have a history
            return copy.deepcopy(model)
    except Exception:  # locks, tensors with a history: foreign code refuses copies in many ways
        clone: nn.Module = _cloned(model, {})
        return clone


def _cloned(value: Any, memo: dict[int, Any]) -> Any:
    """A copy of modules, tensors and plain containers; anything else is shared."""
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, nn.Module):
        memo[id(value)] = module = type(value).__new__(type(value))
        module.__dict__ = {key: _cloned(part, memo) for key, part in vars(value).items()}
        return module
    new = value
    if isinstance(value, nn.Parameter):
        new = nn.Parameter(value.detach().clone(), value.requires_grad)
    elif isinstance(value, Tensor):
        new = value.detach().clone()
    elif type(value) in (dict, OrderedDict):
        new = type(value)((key, _cloned(part, memo)) for key, part in value.items())
    elif type(value) in (list, tuple, set, deque):
        new = type(value)(_cloned(part, memo) for part in value)
    memo[id(value)] = new
    return new


def is_close(one: Tensor, other: Tensor, tolerance: float) -> bool:
    """Whether tensors differ by no more than this share of the largest value; NaN equals NaN."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not (one.is_floating_point() or one.is_complex()):
        return torch.equal(one, other)
    size = one.abs().nan_to_num(0.0, 0.0, 0.0).amax() if one.numel() else 0.0
    return torch.allclose(one, other, rtol=0.0, atol=float(size) * tolerance, equal_nan=True)


def changed(
    before: Mapping[str, Any], after: Mapping[str, Any], tolerance: float = 0.0
) -> list[str]:
    """The names of the values of :func:`state_of` that differ; tensors by :func:`is_close`."""

    def is_same(one: Any, other: Any) -> bool:
        if isinstance(one, Tensor) and isinstance(other, Tensor):
            return is_close(one, other, tolerance)
        return type(one) is type(other) and bool(one == other)

    names = dict.fromkeys([*before, *after])
    return [name for name in names if not is_same(before.get(name), after.get(name))]


def state_of(model: nn.Module) -> dict[str, Any]:
    """The values that a model holds, by name: tensors as copies, others in a form to compare."""
    found: dict[str, Any] = {}
    seen: dict[int, Any] = {}

    def add(value: Any, place: str, depth: int) -> None:
        parts = None if isinstance(value, Tensor) else _parts(value)
        if isinstance(value, Tensor):
            found[place] = value.detach().clone()
        elif depth > 0 and id(value) not in seen:
            found[place] = _plain(value) if parts is None else type(value).__name__
            if parts is None:
                return
            seen[id(value)] = value
            depth = DEPTH if isinstance(value, nn.Module) else depth - 1
            for name, part in parts:
                add(part, f"{place}{name}".removeprefix("."), depth)

    add(model, "", DEPTH)
    return found


def _parts(value: Any) -> Iterator[tuple[str, Any]] | None:
    """What an object, a container or a function holds, by name; ``None`` for plain values."""
    if isinstance(value, nn.Module):
        return _kept(value)
    if isinstance(value, Mapping):
        return ((f"[{str(key)[:200]!r}]", part) for key, part in value.items())
    if isinstance(value, list | tuple | deque):
        return ((f"[{number}]", part) for number, part in enumerate(value))
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        held = {"closure": cells, "defaults": value.__defaults__, "attributes": vars(value)}
        names, spaces = _names(value.__code__), value.__globals__
        held["global"] = {key: spaces[key] for key in names if isinstance(spaces.get(key), _VALUES)}
        return ((f".{key}", part) for key, part in held.items())
    package = type(value).__module__.partition(".")[0]
    is_opaque = package in ("torch", "builtins", "functools", "types") or isinstance(value, type)
    if is_opaque or isinstance(value, random.Random) or not hasattr(value, "__dict__"):
        return None
    return ((f".{key}", part) for key, part in vars(value).items())


def _plain(value: Any) -> Any:
    """A value without parts in a form that can be compared."""
    if isinstance(value, str | bytes | int | float | complex | None):
        return repr(value)
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    if isinstance(value, np.ndarray | array):
        return value.tobytes()
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, torch.Generator):
        return value.get_state()
    return type(value).__name__


def _kept(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Attributes of a module and its class, and its forward pass."""
    own = vars(module)
    for key in ("_parameters", "_buffers", "_modules"):
        yield from ((f".{name}", part) for name, part in own[key].items())
    for key, value in own.items():
        if key not in _INTERNAL and not (key[0] == "_" and "_trainer" in own):  # of Lightning
            yield f".{key}", value
    kind = type(module)
    if kind.__module__.partition(".")[0] in _LIBRARIES:
        return
    for key, value in vars(kind).items():
        if isinstance(value, _VALUES):
            yield f".class.{key}", value
    function = getattr(kind.forward, "__wrapped__", kind.forward)
    if isinstance(function, types.FunctionType):
        yield ".forward", function


def _names(code: types.CodeType) -> set[str]:
    """What a function and those inside it look up."""
    inner = (part for part in code.co_consts if isinstance(part, types.CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False
