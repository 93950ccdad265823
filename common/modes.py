"""The network that is attacked, and its modes while it is."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
    """Let batch-norm use batch statistics without moving its running ones.

    Momentum zero keeps the running mean and variance bit for bit; the count of batches is put back.
    """
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    counts = [
        None if norm.num_batches_tracked is None else norm.num_batches_tracked.clone()
        for norm in norms
    ]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum, count in zip(norms, momenta, counts, strict=True):
            norm.momentum = momentum
            if count is not None and norm.num_batches_tracked is not None:
                norm.num_batches_tracked.copy_(count)


@contextmanager
def frozen(module: nn.Module, mode: AttackMode = "eval") -> Iterator[None]:
    """Hold a module still while it is attacked.

    Parameters take no gradients, which a compiled network needs in order not to compute them.
    Afterwards every submodule has its own mode back (``net.train()`` would wake up frozen teachers
    and dropout) and every parameter its own ``requires_grad``, even after an exception.

    Args:
        module: What is attacked.
        mode: ``eval`` uses running batch-norm statistics; ``train`` changes no mode, so batch
            statistics are used and the running ones move; ``train_frozen`` uses batch statistics
            and moves nothing.

    Raises:
        ConfigurationError: If there is no such mode.
    """
    check_choice("mode", mode, AttackMode)
    modes = [(submodule, submodule.training) for submodule in module.modules()]
    trainable = [p for p in module.parameters() if p.requires_grad]
    try:
        if mode == "eval":
            module.eval()
        for parameter in trainable:
            parameter.requires_grad_(False)
        if mode == "train_frozen":
            with batch_statistics_kept(module):
                yield
        else:
            yield
    finally:
        for submodule, training in modes:
            submodule.training = training
        for parameter in trainable:
            parameter.requires_grad_(True)


def try_out(
    net: nn.Module, shape: Sequence[int], remedy: str, count: int = 1, what: str = "the network"
) -> Any:
    """What a network returns for blank images, in evaluation mode; it draws no random numbers.

    Args:
        net: On any device, the meta device included.
        shape: Of an image, ``(C, H, W)``.
        remedy: The end of the message.
        count: Number of images.
        what: What the message calls the network.

    Raises:
        ConfigurationError: If the network cannot take such images.
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
