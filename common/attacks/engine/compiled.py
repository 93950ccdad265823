"""The attack's passes of a network, compiled."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from common.errors import check_choice
from common.modes import network_of

CompileMode = Literal["default", "reduce-overhead", "max-autotune"]


class Compiled:
    """The model's network compiled for attacks, beside how it is otherwise called."""

    def __init__(self, model: nn.Module, mode: CompileMode | None) -> None:
        net = network_of(model)
        self._net = weakref.ref(net)
        self._call: Callable[..., Any] | None = None
        if mode is not None:
            check_choice("mode", mode, CompileMode)
            call = torch.compile(_called(weakref.WeakMethod(net._call_impl)), mode=mode)
            # CUDA graphs write over what they returned before.
            self._call = call if mode == "default" else partial(_cloned, call)
        self.is_used = self._call is not None

    @contextmanager
    def used(self) -> Iterator[None]:
        """Let the network be called through its compiled form until the end of the block."""
        net = self._net()
        if self._call is None or net is None:
            yield
            return
        import torch._dynamo  # takes a second, which only compiling needs
        import torch._functorch.config

        before = net._compiled_call_impl
        net._compiled_call_impl = self._call
        try:
            # Attacks that differentiate logit by logit go through one graph several times; and all
            # networks of a process count as one function that is compiled again and again.
            with (
                torch._functorch.config.patch(donated_buffer=False),
                torch._dynamo.config.patch(recompile_limit=64),
            ):
                yield
        finally:
            net._compiled_call_impl = before


def _called(method: "weakref.WeakMethod[Any]") -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        bound = method()
        if bound is None:
            raise ReferenceError("the compiled network is gone")
        return bound(*args, **kwargs)

    return call


def _cloned(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return tree_map_only(Tensor, Tensor.clone, call(*args, **kwargs))
