"""Groups of parameters with a learning rate or weight decay of their own."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn
from torch.optim import Optimizer

from common.errors import ConfigurationError


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that are optimised otherwise than the rest.

    Args:
        parameters: Patterns of names as in ``state_dict``, ``net.stem.*`` for instance
            (``*`` matches dots too).
        lr_mult: Their learning rate is this times that of the rest, all along the schedule.
        weight_decay: Theirs; ``None`` takes that of the rest.
        may_be_empty: Whether it is fine when no trainable parameter matches.

    Raises:
        ConfigurationError: If the factor is negative or the decay is.
    """

    parameters: list[str]
    lr_mult: float = 1.0
    weight_decay: float | None = None
    may_be_empty: bool = False

    def __post_init__(self) -> None:
        if self.lr_mult < 0.0:
            raise ConfigurationError(
                f"lr_mult must not be negative, got {self.lr_mult}; 1 is the common learning rate"
            )
        if self.weight_decay is not None and self.weight_decay < 0.0:
            raise ConfigurationError(
                f"weight_decay must not be negative, got {self.weight_decay}; 0 is none"
            )

    def matches(self, name: str) -> bool:
        """Whether a parameter of this name belongs to the group."""
        return any(fnmatchcase(name, pattern) for pattern in self.parameters)


def grouped_optimizer(
    make: Callable[[Iterable[object]], Optimizer],
    module: nn.Module,
    groups: Sequence[ParameterGroup] = (),
) -> Optimizer:
    """An optimiser over all trainable parameters, those of the groups on terms of their own.

    Args:
        make: Called with the parameters, or with the groups where there are any; the group of all
            the rest comes first.
        module: Whose parameters.
        groups: In their order; a parameter belongs to one at most.

    Raises:
        ConfigurationError: If a group matches no trainable parameter and does not say that it may,
            or two groups match the same one.
    """
    if not groups:
        return make(p for p in module.parameters() if p.requires_grad)
    rest: list[nn.Parameter] = []
    taken: list[list[nn.Parameter]] = [[] for _ in groups]
    trainable = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    for name, parameter in trainable:
        where = [i for i, group in enumerate(groups) if group.matches(name)]
        if len(where) > 1:
            raise ConfigurationError(
                f"parameter {name} belongs to several groups, {groups[where[0]].parameters} and "
                f"{groups[where[1]].parameters}; make the patterns exclude each other"
            )
        (taken[where[0]] if where else rest).append(parameter)
    for group, members in zip(groups, taken, strict=True):
        if not members and not group.may_be_empty:
            raise ConfigurationError(
                f"no trainable parameter matches {group.parameters}; the names are like "
                f"{', '.join(name for name, _ in trainable[:3])}; mend the pattern or drop the "
                "group from model.groups"
            )
    settings: list[dict[str, object]] = [{"params": rest}]
    for group, members in zip(groups, taken, strict=True):
        own = {} if group.weight_decay is None else {"weight_decay": group.weight_decay}
        settings.append({"params": members, **own})
    optimizer = make([one for one in settings if one["params"]])
    factors = [1.0, *(group.lr_mult for group in groups)]
    kept = [factor for factor, one in zip(factors, settings, strict=True) if one["params"]]
    for factor, made in zip(kept, optimizer.param_groups, strict=True):
        made["lr"] = made["lr"] * factor
    return optimizer
