"""Parts that a method adds to a network: what they are told about a pass, and what they answer.

A network is a function of images alone. A part that needs more in training (labels, or whether an
image is adversarial), or has more to offer than its output (logits of its own, a loss), is told and
heard around the call of the whole network, however deep it is nested.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from torch import Tensor, nn

Need = Literal["further logits", "both kinds of images", "a trade-off for each image"]
"""What training has to give a part: a loss of its logits; clean and adversarial images; lambda."""

CLEAN, ADVERSARIAL = 0, 1
"""The two types of images."""


@dataclass(eq=False)
class Told:
    """What parts are told about one pass, and what they answer.

    Attributes:
        y: Labels ``(N,)``.
        clean: How many of the images are clean; these come first. A number, which no device has to
            be asked for.
        logits: Weights and further logits ``(N, K)``, in forward order.
        losses: Losses of the parts themselves by name, ``(N,)`` each.
        said: Other answers by name, for those who know the part.
        report: Scalars to log.
    """

    y: Tensor | None = None
    clean: int | None = None
    logits: list[tuple[float, Tensor]] = field(default_factory=list)
    losses: dict[str, Tensor] = field(default_factory=dict)
    said: dict[str, Any] = field(default_factory=dict)
    report: dict[str, Tensor] = field(default_factory=dict)


class Part(nn.Module):
    """A module that a method adds to a network or puts around it."""

    needs: frozenset[Need] = frozenset()
    """What an objective must do to train it."""

    has_fixed_size = False
    """Whether it takes features of one size only."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.told: Told | None = None

    def side_networks(self) -> list[nn.Module]:
        """Modules of its own that read the images beside the network that it is put into."""
        return []

    def own_losses(self) -> dict[str, Any]:
        """What an attacker who knows the part maximises, by name: (model, batch) -> (x' -> loss).

        ``model`` is the classifier, or the whole network.
        """
        return {}


Kind = TypeVar("Kind", bound=Part)


def parts_of(model: Any) -> list[Part]:
    """The parts of a network or classifier, outer ones first; none of a function."""
    return parts_like(model, Part)


def parts_like(model: Any, kind: type[Kind]) -> list[Kind]:
    """Those of one class."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    return [module for module in modules if isinstance(module, kind)]


@contextmanager
def telling(
    parts: Sequence[Part], y: Tensor | None = None, clean: int | None = None
) -> Iterator[Told]:
    """Tell parts about the pass that is made in the block, and collect their answers."""
    told, before = Told(y, clean), [part.told for part in parts]
    try:
        for part in parts:
            part.told = told
        yield told
    finally:
        for part, previous in zip(parts, before, strict=True):
            part.told = previous


def declared_losses(model: Any, usual: dict[str, Any]) -> dict[str, Any]:
    """The usual losses of an attacker, and those that the parts of a network declare.

    A part may declare usual ones too; the order is then its own.
    """
    declared: dict[str, Any] = {}
    for part in parts_of(model):
        declared |= part.own_losses()
    return declared if usual.keys() <= declared.keys() else usual | declared
