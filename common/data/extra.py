"""Pseudo-labelled images beside a data set: a fixed part of every training batch."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from common.attacks.randomness import ExampleRandom, Stream
from common.data.base import Arrays, ImageSpec, check_arrays
from common.data.loading import EpochSampler
from common.data.reading import check_folder, map_npz, one_line, read_pickle, whole_numbers
from common.errors import ConfigurationError, DataUnavailableError, listed
from common.files import strangeness_of


class ExtraImages:
    """Images beside a data set that a classifier or a diffusion model labelled.

    A pickle with ``data``, uint8 ``(N, 32, 32, 3)``, and ``extrapolated_targets``, ``(N,)``, such
    as the 500 K images that Carmon et al. 2019 found for CIFAR-10; or an npz file with ``image``
    and ``label``, as generated images are published (Rebuffi et al. 2021, Wang et al. 2023). An npz
    file is memory-mapped, so it may be larger than the memory.

    Args:
        root: Folder that has the file.
        name: Of the file.
    """

    ADDRESS = "https://github.com/yaircarmon/semisup-adv"
    KEYS = (("data", "extrapolated_targets"), ("image", "label"))

    def __init__(self, root: str = "data", name: str = "ti_500K_pseudo_labeled.pickle") -> None:
        self.path = Path(root).expanduser().absolute() / name

    def load(self, spec: ImageSpec) -> Arrays:
        """Images, uint8 ``(N, C, H, W)``, and pseudo-labels ``(N,)`` for a data set.

        Raises:
            DataUnavailableError: The file is missing, or does not fit ``spec``.
        """
        check_folder(self.path.parent, self.path.name)
        strangeness = strangeness_of(self.path)
        if strangeness == "missing":
            raise DataUnavailableError(
                f"{self.path} is missing, the 500,000 pseudo-labelled images of Carmon et al. 2019 "
                f"(1.5 GB, linked from {self.ADDRESS}; Tiny Images, where they come from, was "
                "withdrawn, so nothing here can fetch or rebuild them): put the file there, name "
                "its folder with --data.extra.root, or train without it, --data.extra null"
            )
        try:
            if strangeness:
                raise ValueError(f"it is {strangeness}")
            images, labels = self._read()
            found = images.transpose(0, 3, 1, 2), whole_numbers(labels)
            check_arrays(*found, spec)
            return found
        except Exception as error:  # a damaged file can fail at any depth of its reader
            raise DataUnavailableError(
                f"{self.path} is there but not a set of pseudo-labelled images for {spec.name} "
                f"({one_line(error)}): it needs data, uint8 (N, 32, 32, 3), and "
                "extrapolated_targets, (N,), in a pickle, or image and label in an npz file; fetch "
                f"it again, the former from {self.ADDRESS}"
            ) from error

    def _read(self) -> tuple[Any, Any]:
        with self.path.open("rb") as file:
            is_npz = file.read(2) == b"PK"
        content: Any = map_npz(self.path) if is_npz else read_pickle(self.path)
        for images, labels in self.KEYS:
            if images in content and labels in content:
                return content[images], content[labels]
        raise ValueError(f"it has {listed(content)}")


class MixedDataset(Dataset[dict[str, Tensor]]):
    """``n`` labelled examples, followed by extra images ``x`` with pseudo-labels ``y``."""

    def __init__(self, labelled: Dataset[dict[str, Tensor]], n: int, extra: Arrays) -> None:
        self.labelled, self.n = labelled, n
        self._x, self._y = extra

    def __len__(self) -> int:
        return self.n + len(self._y)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        index = torch.as_tensor(indices, dtype=torch.int64)
        is_extra = index >= self.n
        rows = (index[is_extra] - self.n).numpy()
        known = self.labelled.__getitems__(index[~is_extra].tolist())  # type: ignore[attr-defined]
        x = torch.empty((len(index), *self._x.shape[1:]), dtype=torch.uint8)
        y = torch.empty_like(index)
        x[is_extra] = torch.from_numpy(self._x[rows])
        y[is_extra] = torch.from_numpy(self._y[rows].astype(np.int64))
        x[~is_extra], y[~is_extra] = known["x"], known["y"]
        return {"x": x, "y": y, "index": index}


class MixedSampler(EpochSampler):
    """Batches that are partly labelled and partly extra (Carmon et al. 2019, official sampler).

    An epoch has as many batches as the labelled examples alone would fill. Each batch takes the
    next labelled ones of the epoch's permutation, at most once each, and fills up with extra ones
    drawn uniformly with replacement, in mixed order. Half and half, an epoch sees half of the
    labelled set. Every batch is full; process r of W takes every W-th example of it.

    Args:
        n: Number of labelled examples, positions ``[0, n)``.
        m: Number of extra ones, positions ``[n, n + m)``.
        batch_size: Over all processes.
        fraction: Of extra examples in a batch; rounded to whole examples.
        seed: Of the order.
        world_size: Number of processes, W.
        rank: This one, r.
    """

    def __init__(
        self,
        n: int,
        m: int,
        batch_size: int,
        fraction: float,
        seed: int,
        world_size: int = 1,
        rank: int = 0,
    ) -> None:
        self.labelled_per_batch = batch_size - round(fraction * batch_size)
        if not 0 < self.labelled_per_batch < batch_size:
            raise ConfigurationError(
                f"data.extra_fraction {fraction} leaves a batch of {batch_size} with "
                f"{self.labelled_per_batch} labelled examples; choose one nearer to 0.5, a larger "
                "data.batch_size, or data.extra: null"
            )
        self.n, self.m, self.batch_size = n, m, batch_size
        self.seed, self.world_size, self.rank = seed, world_size, rank
        self.batches = math.ceil(n / batch_size)

    def __len__(self) -> int:
        return self.batches * self.batch_size // self.world_size

    def __iter__(self) -> Iterator[int]:
        yield from self.order()[:, self.rank :: self.world_size].flatten().tolist()

    def order(self) -> Tensor:
        """The epoch over all processes, int64 ``(batches, batch_size)``."""
        shape = (self.batches, self.batch_size)
        slots = torch.arange(self.batches * self.batch_size)
        extra = self.n + self._draw(Stream.PSEUDO_LABELLED, slots) % self.m
        order = extra.view(shape)
        permutation = self._draw(Stream.LABELLED, torch.arange(self.n)).argsort(stable=True)
        # One permutation is always enough: n / batch_size batches of at most batch_size.
        used = permutation[: self.batches * self.labelled_per_batch]
        batch, place = torch.arange(len(used)) // self.labelled_per_batch, torch.arange(len(used))
        order[batch, place % self.labelled_per_batch] = used
        return order.gather(1, self._draw(Stream.PLACES, slots).view(shape).argsort(stable=True))

    def _draw(self, stream: Stream, index: Tensor) -> Tensor:
        """A uniform 53-bit number for each index, int64 ``(N,)``."""
        return ExampleRandom(self.seed, self.epoch, index, stream=stream).integers(2**53, ())
