"""Forward, backward and weight-gradient passes of a step, counted on its network."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass
class Passes:
    """How often the network ran."""

    forward: int = 0
    backward: int = 0
    weight_gradient: int = 0


@contextmanager
def counted(net: nn.Module) -> Iterator[Passes]:
    """Count passes through a network until the end of the block.

    Counted at its last linear layer, which every pass goes through and no attack engine replaces:
    calls, gradients of its output, and calls of ``backward`` that reach its weight.
    """
    head = [module for module in net.modules() if isinstance(module, nn.Linear)][-1]
    passes = Passes()

    def backward(_: Tensor) -> None:
        passes.backward += 1

    def weight(_: Tensor) -> None:
        passes.weight_gradient += 1

    def forward(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        passes.forward += 1
        if out.requires_grad:
            out.register_hook(backward)  # type: ignore[no-untyped-call]

    required = head.weight.requires_grad
    head.weight.requires_grad_(True)
    listening = head.weight.register_hook(weight)  # type: ignore[no-untyped-call]
    handles = [head.register_forward_hook(forward), listening]
    head.weight.requires_grad_(required)
    try:
        yield passes
    finally:
        for handle in handles:
            handle.remove()


def passes_of(net: nn.Module, step: Callable[[], object]) -> Passes:
    """Of one call of a step on a network."""
    with counted(net) as passes:
        step()
    return passes
