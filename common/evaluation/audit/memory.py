"""Whether a model's answers depend on what it was asked before."""

import copy
import types
from array import array
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.attacks.randomness import ExampleRandom
from common.evaluation.audit.probes import diameter
from common.evaluation.steps import Columns, Threat
from common.objectives import Batch

REPEATS = 8
"""Queries between which a model's state is compared."""
_INTERNAL = set(vars(nn.Module())) - {"_parameters", "_buffers"}


class MemoryProbe:
    """Compares the model in use with a copy that was made before the attacks.

    Copies of that copy are asked for images nobody has asked for yet (mirrored ones with noise),
    with and without a question about a neighbouring image before. And what the model keeps
    (buffers, attributes, closures, globals of its forward pass) is compared between queries; what
    changes on the first query alone, such as a table made once, is no memory.

    Args:
        model: Images to logits; copied now.
        threat: The size of the perturbations.
    """

    def __init__(self, model: Any, threat: Threat) -> None:
        self.fresh = _copied(model)
        self.threat = threat

    def __call__(self, model: Any, batch: Batch, random: ExampleRandom) -> Columns:
        """``memory``: the largest difference of probabilities, 1 where labels differ; ``moved``.

        Both ``(N,)``; ``moved`` is 1 for every image if the state of the model moved.
        """
        x = batch["x"]
        near = self._near(x, random)
        unseen = self._near(x.flip(-1), random)
        beside = self._near(unseen, random)
        differences = [torch.zeros(len(x), device=x.device)]
        with torch.no_grad():
            model(x.clone())
            before = state_of(model)
            if self.fresh is not None:
                asked = copy.deepcopy(self.fresh)
                asked(unseen.clone())  # copies, since a model may write into what it gets
                differences.append(_difference(asked(beside.clone()), self._first(beside)))
                differences += [
                    _difference(model(images.clone()), self._first(images)) for images in (x, near)
                ]
            for _ in range(REPEATS):
                model(unseen.clone())
                model(beside.clone())
            is_moved = bool(changed(before, state_of(model)))
        return {
            "memory": torch.stack(differences).amax(dim=0),
            "moved": torch.full_like(differences[0], float(is_moved)),
        }

    def _first(self, x: Tensor) -> Tensor:
        """Scores of a fresh copy that is asked nothing else."""
        scores: Tensor = copy.deepcopy(self.fresh)(x.clone())
        return scores

    def _near(self, x: Tensor, random: ExampleRandom) -> Tensor:
        size = self.threat.radius / diameter(self.threat, x)
        return (x + random.uniform(x.shape[1:], -size, size).to(x)).clamp(0.0, 1.0)


def _copied(model: Any) -> Any:
    """A deep copy in evaluation mode; ``None`` where a model does not allow one."""
    try:
        return copy.deepcopy(model)
    except Exception:  # whatever a foreign model's attributes raise
        return None


def _difference(scores: Tensor, others: Tensor) -> Tensor:
    """Largest difference of probabilities, ``(N,)``."""
    other_label = scores.argmax(dim=1) != others.argmax(dim=1)
    probabilities = (part.float().softmax(dim=1) for part in (scores, others))
    gap = torch.sub(*probabilities).abs().amax(dim=1).nan_to_num(1.0)
    return torch.where(other_label, 1.0, gap)


# ------------------------------------------------------------------------------------------ state


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """The names of what differs."""
    return sorted(
        name for name in before.keys() | after.keys() if before.get(name) != after.get(name)
    )


def state_of(model: Any) -> dict[str, Any]:
    """What the modules of a model keep, by name, as values that can be compared."""
    if not isinstance(model, nn.Module):
        return {"": _frozen(model)}
    state = {}
    for name, module in model.named_modules():
        for key, value in _kept(module):
            state[f"{name}.{key}"] = _frozen(value)
    return state


def _kept(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Attributes of a module and its class, and the globals that its forward pass names."""
    own = vars(module)
    for key, value in own.items():
        is_lightning = key[0] == "_" and "_trainer" in own and key not in ("_buffers",)
        if key not in _INTERNAL and not is_lightning:
            yield key, value
    kind = type(module)
    if kind.__module__.partition(".")[0] in ("torch", "torchvision", "lightning"):
        return
    for key, value in vars(kind).items():
        if isinstance(value, list | dict | set | int | float | Tensor):
            yield f"class.{key}", value
    function = getattr(kind.forward, "__wrapped__", kind.forward)
    spaces = getattr(function, "__globals__", {})
    for key in _names(getattr(function, "__code__", None)):
        if isinstance(spaces.get(key), list | dict | set | int | float | Tensor):
            yield f"global.{key}", spaces[key]
    if isinstance(function, types.FunctionType):
        yield "forward", function


def _names(code: types.CodeType | None) -> set[str]:
    """What a function and those inside it look up."""
    if code is None:
        return set()
    inner = (part for part in code.co_consts if isinstance(part, types.CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _frozen(value: Any, depth: int = 5) -> Any:
    """The value as nested tuples of plain values."""
    if isinstance(value, Tensor):
        finite = value.detach().double().nan_to_num() if not value.is_complex() else value.detach()
        weights = torch.arange(1, value.numel() + 1, device=value.device, dtype=torch.float64).cos()
        return tuple(value.shape), complex((finite.flatten() * weights).sum().item())
    if isinstance(value, str | bytes | int | float | bool | None):
        return repr(value)
    if depth == 0 or isinstance(value, type | types.ModuleType | nn.Module):
        return type(value).__name__  # modules are listed by their own names
    if isinstance(value, Mapping):
        return tuple((repr(key)[:200], _frozen(part, depth - 1)) for key, part in value.items())
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        return _frozen([cells, list(value.__defaults__ or ()), vars(value)], depth - 1)
    if isinstance(value, list | tuple | set | frozenset | deque | range):
        return len(value), tuple(_frozen(part, depth - 1) for part in value)
    if isinstance(value, np.ndarray | array):
        return value.tobytes()
    if hasattr(value, "__dict__"):
        return _frozen(vars(value), depth - 1)
    return type(value).__name__


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False
