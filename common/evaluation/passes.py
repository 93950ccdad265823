"""Counts how many images pass through a model, forwards and backwards, while it is attacked."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from common.objectives import Batch, InnerLoss, OnLogits

Heard = Callable[[Tensor, Tensor], None]
"""Images ``(N, C, H, W)``, and their scores ``(N, K)`` or losses ``(N,)``."""


@dataclass
class Passes:
    """Running totals of a model."""

    forward: int = 0
    backward: int = 0
    queries: int = 0
    heard: Heard | None = None
    """Is told of passes of losses that bypass the model's own forward."""

    def take(self) -> tuple[int, int, int]:
        """The totals since the last call."""
        found = self.forward, self.backward, self.queries
        self.forward = self.backward = self.queries = 0
        return found

    def notice(self, x: Tensor) -> None:
        """Count a forward pass of x ``(N, ...)``, and later its backward passes."""
        self.forward += len(x)
        if torch.is_grad_enabled() and x.requires_grad:
            x.register_hook(self._differentiated)  # type: ignore[no-untyped-call]
        else:
            self.queries += len(x)

    def _differentiated(self, gradient: Tensor) -> None:
        self.backward += len(gradient)


_COUNTED: WeakKeyDictionary[nn.Module, Passes] = WeakKeyDictionary()


@contextmanager
def counted(model: nn.Module) -> Iterator[Passes]:
    """Count the passes of ``model`` until the end of the block."""
    passes = _COUNTED[model] = Passes()

    def before(_: nn.Module, args: tuple[Any, ...]) -> None:
        passes.notice(args[0])

    try:
        with model.register_forward_pre_hook(before):
            yield passes
    finally:
        del _COUNTED[model]


@contextmanager
def hearing(model: nn.Module, heard: Heard) -> Iterator[None]:
    """Tell of every pass of ``model`` in the block, also of losses that bypass its forward."""
    passes = _COUNTED.get(model, Passes())

    def after(_: nn.Module, args: tuple[Any, ...], scores: Tensor) -> None:
        heard(args[0], scores)

    passes.heard = heard
    try:
        with model.register_forward_hook(after):
            yield
    finally:
        passes.heard = None


def counting(inner: InnerLoss) -> InnerLoss:
    """The loss; where it bypasses the model's own forward, each call counts as one pass."""
    if isinstance(inner, OnLogits):
        return inner
    counted_inner: Any = _counted(inner)
    if makes_logits(inner):
        counted_inner.with_logits = _counted(inner.with_logits)  # type: ignore[attr-defined]
    return cast(InnerLoss, counted_inner)


def makes_logits(inner: InnerLoss) -> bool:
    """Whether the logits come from the loss's own pass, by its ``with_logits``."""
    return hasattr(inner, "with_logits")


def _counted(made: Callable[[Any, Batch], Callable[[Tensor], Any]]) -> Any:
    def counted_made(model: Any, batch: Batch) -> Callable[[Tensor], Any]:
        function = made(model, batch)
        passes = _COUNTED.get(model) if isinstance(model, nn.Module) else None
        if passes is None:
            return function

        def counted_function(x: Tensor) -> Any:
            before = passes.forward
            values = function(x)
            if passes.forward == before:
                passes.notice(x)
                if passes.heard is not None:
                    passes.heard(x, values[0] if isinstance(values, tuple) else values)
            return values

        return counted_function

    return counted_made
