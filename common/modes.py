"""Modes of a network while it is attacked."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from common.errors import ConfigurationError, check_choice, is_out_of_memory

AttackMode = Literal["eval", "train", "train_frozen"]


def network_of(model: Any) -> Any:
    """The network that a classifier holds as ``net``; any other model is the network itself."""
    return getattr(model, "net", model)


@contextmanager
def batch_statistics_kept(module: nn.Module) -> Iterator[None]:
    """Let batch-norm use batch statistics without changing its running ones and its count."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]
    before = [(norm.momentum, deepcopy(norm.num_batches_tracked)) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0  # keeps running mean and variance bit for bit
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum = momentum
            if count is not None and norm.num_batches_tracked is not None:
                norm.num_batches_tracked.copy_(count)


@contextmanager
def frozen(module: nn.Module, mode: AttackMode = "eval") -> Iterator[None]:
    """Switch off parameter gradients, which a compiled network would compute, and set a mode.

    Afterwards, even after an exception, every submodule has its own mode back (``net.train()``
    would change frozen teachers and dropout) and every parameter its own ``requires_grad``.

    Args:
        module: What is attacked.
        mode: ``eval`` uses running batch-norm statistics; ``train`` changes no mode, so batch
            statistics are used and the running ones are updated; ``train_frozen`` uses batch
            statistics and updates nothing.
    """
    check_choice("mode", mode, AttackMode)
    modes = [(submodule, submodule.training) for submodule in module.modules()]
    trainable = [p for p in module.parameters() if p.requires_grad]
    try:
        if mode == "eval":
            module.eval()
        for parameter in trainable:
            parameter.requires_grad_(False)
        with batch_statistics_kept(module) if mode == "train_frozen" else nullcontext():
            yield
    finally:
        for submodule, training in modes:
            submodule.training = training
        for parameter in trainable:
            parameter.requires_grad_(True)


def try_out(
    net: nn.Module, shape: Sequence[int], remedy: str, count: int = 1, what: str = "the network"
) -> Any:
    """What a network returns for blank images, in evaluation mode, with the random state kept.

    Args:
        net: On any device, the meta device included.
        shape: Of an image, ``(C, H, W)``.
        remedy: The end of the ConfigurationError that is raised if it cannot take such images.
        count: Number of images.
        what: What the message calls the network.
    """
    parameter = next(net.parameters(), torch.empty(0))
    try:
        with frozen(net), torch.no_grad(), torch.random.fork_rng(devices=[]):
            return net(parameter.new_zeros(count, *shape))
    except (RuntimeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        raise ConfigurationError(
            f"{what} cannot take images of shape {'x'.join(map(str, shape))} (channels x height x "
            f"width): {str(error).splitlines()[0]}; {remedy}"
        ) from error
