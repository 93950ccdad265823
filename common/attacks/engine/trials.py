"""Trying out a network on a copy, so that nothing is seen of it afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def aside(device: torch.device) -> Iterator[None]:
    """Without gradients, autocast or inference mode, and random numbers are put back."""
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
    ):
        yield
