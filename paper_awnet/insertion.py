"""Which modules of a network a router replaces."""

from collections.abc import Callable
from typing import Literal

from torch import nn

from common.attacks.engine.folding import has_hooks
from common.errors import ConfigurationError, check_choice

Scope = Literal["block", "last_conv"]
SHORTCUTS = ("shortcut", "downsample")
"""Names by which a residual block is known: ours, and those of torchvision."""


def branch_convolutions(arch: nn.Module, scope: Scope) -> list[list[tuple[str, nn.Conv2d]]]:
    """By block, the convolutions of the residual branch in forward order, with their full names.

    Raises:
        ConfigurationError: If there are none, or there is no such scope.
    """
    check_choice("scope", scope, Scope)
    branches = []
    for prefix, block in arch.named_modules():
        if not any(hasattr(block, name) for name in SHORTCUTS):
            continue
        found = [
            (f"{prefix}.{name}" if prefix else name, module)
            for name, module in block.named_modules()
            if isinstance(module, nn.Conv2d) and name.partition(".")[0] not in SHORTCUTS
        ]
        if found:
            branches.append(found if scope == "block" else found[-1:])
    if not branches:
        raise ConfigurationError(
            f"{type(arch).__name__} has no residual blocks (modules with a shortcut or downsample) "
            "whose filters could be scaled; use a residual network, or set dynamic: false"
        )
    return branches


def replace_norms(root: nn.Module, make: Callable[[nn.BatchNorm2d], nn.Module]) -> None:
    """Replace every batch-norm by what ``make`` returns for it.

    Raises:
        ConfigurationError: If there is none, or another method is inserted at one.
    """
    norms = [(name, m) for name, m in root.named_modules() if isinstance(m, nn.BatchNorm2d)]
    if not norms:
        raise ConfigurationError(
            f"{type(root).__name__} has no batch-norm to replace by two; use a network with "
            "batch-norms, or a router with mixbn: false"
        )
    for name, module in norms:
        check_free(name, module)
        root.set_submodule(name, make(module))


def check_free(name: str, module: nn.Module) -> None:
    """Refuse to replace a module whose input or output another method changes."""
    if has_hooks(module):
        raise ConfigurationError(
            f"another method is inserted at {name}, which is to be replaced; put the network with "
            "the replaced modules inside, and insert the other method into it"
        )
