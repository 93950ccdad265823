"""Where a method can be inserted into any network: behind a module that puts out feature maps."""

import difflib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from common.errors import ConfigurationError
from common.modes import try_out


class Place(NamedTuple):
    """A module, and what it puts out for one image."""

    module: nn.Module
    output: Tensor  # (1, C, H, W)


def find_places(
    net: nn.Module, after: Sequence[str], image_shape: Sequence[int], what: str
) -> tuple[dict[str, Place], Tensor]:
    """Modules by name in the order in which they run, and the network's logits ``(1, K)``.

    One forward pass of a blank image finds them, on any device; nothing is changed.

    Args:
        net: Any network.
        after: Names as in ``net.named_modules()``; a ``Sequential`` is its last module.
        image_shape: Of an image, ``(C, H, W)``.
        what: What is to be inserted, for messages.

    Raises:
        ConfigurationError: If a module does not exist, runs never or several times in a forward
            pass, or its output is no feature map.
    """
    if not after:
        raise ConfigurationError(f"no place for {what} was named; name modules, such as stem.conv")
    modules = {name: _module_after(net, name, what) for name in after}
    if len(set(map(id, modules.values()))) < len(after):
        raise ConfigurationError(
            f"two of the places {list(after)} are the same module; name each of them once"
        )
    seen: list[tuple[str, Any]] = []

    def keep(name: str, _: Any, __: Any, output: Any) -> None:
        seen.append((name, output))

    with ExitStack() as hooks:
        for name, module in modules.items():
            hooks.enter_context(module.register_forward_hook(partial(keep, name)))
        logits = try_out(net, image_shape, "give the shape of the images it is for")
    for name in after:
        outputs = [output for one, output in seen if one == name]
        if len(outputs) != 1 or not isinstance(outputs[0], Tensor) or outputs[0].ndim != 4:
            raise ConfigurationError(_misfit(name, outputs, what))
    return {name: Place(modules[name], output) for name, output in seen}, logits


def given_shape(image_shape: Sequence[int] | None, reason: str) -> Sequence[int]:
    """The shape ``(C, H, W)`` of an image, which the command line fills in; without one an error.

    Raises:
        ConfigurationError: With the reason for which it is needed.
    """
    if image_shape is None:
        raise ConfigurationError(
            f"{reason}, so image_shape must be given: (channels, height, width); the command line "
            "fills it in from the data"
        )
    return image_shape


def inside(net: nn.Module, kinds: tuple[type[nn.Module], ...]) -> tuple[str, nn.Module] | None:
    """The first network of these kinds in another one or it itself, and its prefix in names."""
    for name, module in net.named_modules():
        if isinstance(module, kinds):
            return (f"{name}." if name else ""), module
    return None


def run_in_full_precision(net: nn.Module, behind: Sequence[str]) -> None:
    """Switch autocast off in everything that is defined behind the named modules."""
    for module in {module for name in behind for module in _behind(net, name)}:
        guard = _FullPrecision()
        module.register_forward_pre_hook(guard.enter)
        module.register_forward_hook(guard.leave, always_call=True)


def _behind(net: nn.Module, name: str) -> Iterator[nn.Module]:
    """The later siblings of a module, and those of its parents."""
    path = name.split(".")
    for depth, own in enumerate(path):
        parent = net.get_submodule(".".join(path[:depth]))
        siblings = [child for child, _ in parent.named_children()]
        yield from list(parent.children())[siblings.index(own) + 1 :]


class _FullPrecision:
    """Hooks that switch autocast off while a module runs, and make its inputs float32."""

    def __init__(self) -> None:
        self.left: str | None = None  # the device whose autocast is off

    def enter(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        kinds = {arg.device.type for arg in args if isinstance(arg, Tensor)} - {"meta"}
        for kind in filter(torch.is_autocast_enabled, kinds):
            self.left = kind
            torch.set_autocast_enabled(kind, False)
        if self.left is None:
            return None
        return tuple(
            arg.float() if isinstance(arg, Tensor) and arg.is_floating_point() else arg
            for arg in args
        )

    def leave(self, *_: Any) -> None:
        if self.left is not None:
            torch.set_autocast_enabled(self.left, True)
            self.left = None


def _module_after(net: nn.Module, name: str, what: str) -> nn.Module:
    modules = {key: module for key, module in net.named_modules() if key}
    if name not in modules:
        near = difflib.get_close_matches(name, modules, n=1)
        known = [key for key, module in modules.items() if isinstance(module, nn.Conv2d)]
        hint = f"did you mean {near[0]!r}?" if near else f"convolutions are {', '.join(known[:8])}"
        raise ConfigurationError(f"the network has no module {name!r} to put {what} after; {hint}")
    module: nn.Module = modules[name]
    while isinstance(module, nn.Sequential) and len(module):
        if type(module).forward is not nn.Sequential.forward:
            raise ConfigurationError(
                f"module {name!r} is a Sequential that overrides forward, so its last "
                "module may not be the last to run; name one of its modules"
            )
        module = list(module.children())[-1]
    return module


def _misfit(name: str, seen: list[Any], what: str) -> str:
    if len(seen) == 1:
        output = tuple(seen[0].shape) if isinstance(seen[0], Tensor) else type(seen[0]).__name__
        return (
            f"module {name!r} puts out {output}, and {what} needs a feature (N, C, H, W); name a "
            "module before pooling and flattening"
        )
    times = f"{len(seen)} times" if seen else "never"
    return (
        f"module {name!r} runs {times} in a forward pass, and {what} belongs to one place; name a "
        "module that runs once"
    )
