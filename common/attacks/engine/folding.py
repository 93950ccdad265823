"""Finds the convolutions of a network that batch-norm can be folded into, and folds the weights.

In eval mode batch-norm is an affine map per channel, so it and the convolution before it are one
convolution. Tracing the forward methods with :mod:`torch.fx` tells which convolutions feed a norm
and nothing else; modules that cannot be traced are not folded.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

_LOG = logging.getLogger(__name__)

NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


class Pair(NamedTuple):
    """A convolution, and the batch-norm that its output goes into and nowhere else, if any."""

    conv: nn.Conv2d
    norm: Any = None


def foldable(model: nn.Module) -> list[Pair]:
    """All pairs of a model, found in the forward methods of its modules, which are not called.

    Both modules of a pair have one parent, are called once, are exactly of PyTorch's classes (a
    subclass may compute something else) and have no hooks (which would see another output).
    """
    held = Counter(
        id(child) for module in model.modules() for child in module._modules.values() if child
    )
    found: list[Pair] = []
    called: Counter[int] = Counter()
    inlined: set[int] = set()
    for module in model.modules():  # parents come before their children
        if id(module) in inlined or not any(type(part) in NORMS for part in _within(module)):
            continue
        tracer = _OneLevel()
        try:
            graph = tracer.trace(module)
        except Exception as error:  # a forward method may fail on a proxy in any way
            _LOG.debug("%s cannot be traced as a whole: %s", type(module).__name__, error)
            continue
        inlined |= tracer.inlined
        calls = [node for node in graph.nodes if node.op == "call_module"]
        called.update(id(module.get_submodule(str(node.target))) for node in calls)
        found += _pairs(module, calls)
    return [
        pair
        for pair in found
        if all(held[id(part)] == 1 and called[id(part)] == 1 for part in pair)
    ]


def folded_weights(pair: Pair) -> tuple[Tensor, Tensor | None]:
    r"""Weight and bias of the convolution that replaces both.

    .. math:: W' = \frac{\gamma}{\sqrt{\sigma^2 + \epsilon}} W, \qquad
              b' = \beta + \frac{\gamma}{\sqrt{\sigma^2 + \epsilon}} (b - \mu)

    Raises:
        ValueError: If the norm is in training mode.
    """
    conv, norm = pair.conv, pair.norm
    if norm is None:
        return conv.weight, conv.bias
    check_mode(pair)
    scale: Tensor = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    shift: Tensor = -norm.running_mean if conv.bias is None else conv.bias - norm.running_mean
    bias = scale * shift if norm.bias is None else norm.bias + scale * shift
    return conv.weight * scale.view(-1, 1, 1, 1), bias


def check_mode(pair: Pair) -> None:
    """Refuse to fold a batch-norm in training mode."""
    if pair.norm.training:
        raise ValueError(
            "a batch-norm to be folded is in training mode, where it is no affine map; call "
            "model.eval() first, or attack without an engine"
        )


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has forward or backward hooks."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind) for kind in kinds)


def settings_of(model: nn.Module) -> list[Any]:
    """Everything but tensors that determines the modules' function: flags, sizes, hooks."""
    found: list[Any] = []
    for module in model.modules():
        plain = [
            (name, value)
            for name, value in vars(module).items()
            if not name.startswith("_") and name != "training" and _is_plain(value)
        ]
        is_part = isinstance(module, (nn.Conv2d, nn.Sequential, *NORMS))  # what folding looks into
        is_script = isinstance(module, torch.jit.ScriptModule)  # whose parts cannot be replaced
        names = [] if is_script else list(module._parameters)
        own = id(vars(module).get("forward"))  # put in place of the class's
        found.append((id(module), plain, own, names, is_part and has_hooks(module)))
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return type(value) in (bool, int, str, NoneType)


@contextmanager
def aside(device: torch.device) -> Iterator[None]:
    """For trying out copies: no gradients, autocast or inference mode; the random state is kept."""
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
    ):
        yield


class _OneLevel(fx.Tracer):
    """Traces one forward method; ``nn.Sequential`` is inlined, other modules are calls."""

    def __init__(self) -> None:
        super().__init__()
        self.inlined: set[int] = set()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a call stays a call."""
        if type(m).forward is not nn.Sequential.forward or has_hooks(m):
            return True
        self.inlined.add(id(m))
        return False


def _within(module: nn.Module) -> Iterator[nn.Module]:
    """What a forward method can call itself, or through containers."""
    for child in module.children():
        yield child
        if isinstance(child, nn.Sequential | nn.ModuleList | nn.ModuleDict):
            yield from _within(child)


def _pairs(module: nn.Module, calls: list[fx.Node]) -> Iterator[Pair]:
    for node in calls:
        source: Any = node.args[0] if len(node.args) == 1 and not node.kwargs else None
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) != 1:
            continue
        norm = module.get_submodule(str(node.target))
        conv = module.get_submodule(str(source.target))
        if (
            type(conv) is nn.Conv2d
            and type(norm) in NORMS
            and norm.running_mean is not None
            and norm.running_var is not None
            and not (has_hooks(conv) or has_hooks(norm))
        ):
            yield Pair(conv, norm)
