"""The context in which copies of a network are tested."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def aside(device: torch.device) -> Iterator[None]:
    """No gradients, autocast or inference mode; restores the random state."""
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
    ):
        yield
