"""Batches of any loader as dicts, with the places of their examples in the data set."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch.overrides.distributed import (
    UnrepeatedDistributedSampler,
    UnrepeatedDistributedSamplerWrapper,
)
from torch import Tensor
from torch.utils.data import DistributedSampler

from common.errors import ConfigurationError
from common.evaluation.inputs import check_examples, pair_of
from common.objectives import Batch

KNOWN = (
    DistributedSampler,
    DistributedSamplerWrapper,
    UnrepeatedDistributedSampler,
    UnrepeatedDistributedSamplerWrapper,
)
"""Samplers that give process r of p the examples r, r + p, r + 2p and so on."""


class BatchReader:
    """Reads the batches of this process's loader, in their order.

    Args:
        loaders: One loader, or a list with one.
        world_size: Number of processes.

    Raises:
        ConfigurationError: If there are several loaders.
    """

    def __init__(self, loaders: Any, world_size: int) -> None:
        several = list(loaders) if isinstance(loaders, list | tuple | Mapping) else [loaders]
        if len(several) != 1:
            raise ConfigurationError(
                f"robustness is evaluated on one loader, got {len(several)}; give one loader, or "
                "call common.evaluation.evaluate for each"
            )
        loader = loaders[0] if isinstance(loaders, list | tuple) else loaders
        sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
        self._sampler = sampler if type(sampler) in KNOWN else None
        self._found = type(sampler).__name__
        self.batch_size: int = getattr(loader, "batch_size", None) or 250
        """Examples of a batch."""
        self._world_size = world_size
        self._taken = 0

    def read(self, batch: Any) -> tuple[Batch, Tensor]:
        """A dict with x, y and index, and which of its examples no other batch has, ``(N,)``.

        Lightning's samplers repeat examples where processes cannot share them evenly. Batches in
        our form are returned as they are; others on the CPU, with the place in the order of the
        sampler for index.
        """
        is_ours = isinstance(batch, Mapping) and {"x", "y", "index"} <= set(batch)
        x, y = (batch["x"], batch["y"]) if is_ours else pair_of(batch)
        place = self._places(len(y), is_ours)
        total = (
            len(self._sampler.dataset) if self._sampler is not None else len(place) + self._taken
        )
        self._taken += len(y)
        if is_ours:
            return dict(batch), place < total
        return {"x": check_examples(x, y), "y": y, "index": place % total}, place < total

    def _places(self, count: int, has_index: bool) -> Tensor:
        """Of the next examples in the order of the sampler; beyond its end they are repeated."""
        place = torch.arange(self._taken, self._taken + count)
        if self._sampler is not None:
            place = place * self._sampler.num_replicas + self._sampler.rank
        if self._sampler is not None or self._world_size == 1 or has_index:
            return place
        raise ConfigurationError(
            f"{self._world_size} processes evaluate batches of a loader with the sampler "
            f"{self._found}, which does not say which examples they are; leave the sampler to the "
            "trainer (use_distributed_sampler=True), or give batches as dicts with x, y and index"
        )
