"""Which convolutions of a network are computed another way on a CPU, by the sizes of their maps."""

import logging
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from common.attacks.engine.folding import aside, has_hooks
from common.attacks.engine.products import Maps, ProductConv2d, is_pixelwise, suits_product
from common.attacks.engine.winograd import WinogradConv2d, tile_of

_LOG = logging.getLogger(__name__)

Choice = tuple[type[ProductConv2d], Maps] | tuple[type[WinogradConv2d], int]
"""The class of a stand-in, and its maps or the edge of its tiles."""


def choice_of(
    conv: nn.Conv2d, size: tuple[int, int], products: bool, winograd: bool
) -> Choice | None:
    """How a convolution of maps of this size is computed; ``None`` for as it is."""
    if products and suits_product(conv, size):
        return ProductConv2d, None if is_pixelwise(conv) else size
    tile = tile_of(conv, size) if winograd else None
    return None if tile is None else (WinogradConv2d, tile)


def choices_of(model: nn.Module, x: Tensor, products: bool, winograd: bool) -> dict[str, Choice]:
    """The convolutions that become faster on a CPU, by name, except those with hooks.

    The sizes of the maps are those in a forward pass of the first two images. Convolutions called
    with maps that need different choices are left out.
    """
    found: dict[str, set[Choice | None]] = {}
    with ExitStack() as hooks, aside(x.device):
        for name, conv in model.named_modules():
            if type(conv) is not nn.Conv2d or has_hooks(conv):
                continue
            found[name] = set()

            def see(conv: Any, args: Any, kwargs: Any, seen: set[Any] = found[name]) -> None:
                maps = args[0] if args else kwargs["input"]
                seen.add(choice_of(conv, tuple(maps.shape[-2:]), products, winograd))

            hooks.enter_context(conv.register_forward_pre_hook(see, with_kwargs=True))
        try:
            model(x[:2].clone())
        except Exception as error:  # of anybody's forward method
            _LOG.warning(
                "convolutions of %s stay as they are: their maps were not found (%s: %s)",
                type(model).__name__, type(error).__name__, error,
            )  # fmt: skip
            return {}
    alike = {name: choices.pop() for name, choices in found.items() if len(choices) == 1}
    return {name: choice for name, choice in alike.items() if choice is not None}
