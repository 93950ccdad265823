"""What a process fetches in which order: rows of a set, its share of an epoch, the loader."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

Batch = dict[str, Tensor]


class ImageDataset(Dataset[Batch]):
    """Chosen rows of a set of images, fetched a batch at a time.

    Args:
        x: All images, uint8 ``(M, C, H, W)``; shared, not copied. Batches are on their device.
        y: All labels, int64 ``(M,)``.
        rows: Which of them this data set has, ``(N,)``.

    Attributes:
        remarks: Sentences that belong to results on this data set.
    """

    def __init__(self, x: Tensor, y: Tensor, rows: Tensor) -> None:
        self._x, self._y, self.rows = x, y, rows
        self.remarks: list[str] = []

    @property
    def y(self) -> Tensor:
        """Labels, ``(N,)``."""
        return self._y[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        return {key: value[0] for key, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> Batch:
        index = torch.as_tensor(indices, dtype=torch.int64)
        rows = self.rows[index]
        batch = {"x": self._x, "y": self._y[rows], "index": index}
        if self._x.is_cuda:  # copies from pinned memory do not wait for the device
            batch |= {key: batch[key].pin_memory() for key in ("y", "index")}
            rows = rows.pin_memory().to(self._x.device, non_blocking=True)
        batch["x"] = self._x[rows]
        return batch


class ShuffledShare(Sampler[int]):
    """This process's part of an epoch's order; the order depends on seed and epoch alone.

    Args:
        n: Number of examples.
        part: Places in the order.
        seed: Of the order.
    """

    def __init__(self, n: int, part: range, seed: int) -> None:
        self.n, self.part, self.seed, self.epoch = n, part, seed, 0

    def __len__(self) -> int:
        return len(self.part)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order; the trainer calls it."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.n, generator=generator).tolist()
        return (order[place] for place in self.part)


class TrainLoader(DataLoader[Batch]):
    """Starts an interrupted epoch where it stopped, with the order that belongs to the epoch.

    Lightning asks for the iterator before it has told the sampler the epoch, and worker processes
    begin to read at once: a resumed run would repeat the order of the first epoch. And it counts
    the batches done before the interruption without skipping them. Reading starts at the first
    ``next`` here, and skips them.

    Where a batch does not count like the others, in its optimiser step or on one of the processes,
    its examples get a ``window`` or a ``weight``, see :func:`common.objectives.weighted`.
    """

    batches_done: Callable[[], int]
    factors_of: Callable[[int], dict[str, float]]

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        for number, batch in islice(enumerate(super().__iter__()), self.batches_done(), None):
            for key, factor in self.factors_of(number).items():
                batch[key] = torch.full(batch["y"].shape, factor, dtype=torch.float64)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Nothing: epoch and progress, which Lightning keeps, determine the position."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing, as :meth:`state_dict`."""


def as_fetched(batch: Batch) -> Batch:
    """The batch itself: the data set has collated it."""
    return batch


def batches_done(trainer: Trainer | None) -> int:
    """Batches of the current epoch that a resumed run has done before; 0 otherwise."""
    if trainer is None:
        return 0
    loop = trainer.fit_loop.epoch_loop
    is_resumed = loop.restarting or getattr(loop, "has_made_up", False)
    return loop.batch_progress.current.ready if is_resumed else 0


def loss_factors(trainer: Trainer | None, sizes: list[int], number: int) -> dict[str, float]:
    """Factors of a training batch's mean loss that differ from 1.

    Args:
        trainer: The trainer, if there is one.
        sizes: Examples of each batch of the epoch, over all processes.
        number: Of the batch, from 0.

    Returns:
        ``weight``, this process's examples of the batch over the mean of all processes, and
        ``window``, the batch's examples over those of its optimiser step, times the number of
        accumulated batches that Lightning divides every loss by.
    """
    if trainer is None:
        return {}
    accumulated, limit = trainer.accumulate_grad_batches, trainer.num_training_batches
    begin = number - number % accumulated
    end = min(begin + accumulated, len(sizes), limit if number < limit else len(sizes))
    mine = len(range(trainer.global_rank, sizes[number], trainer.world_size))
    factors = {
        "weight": mine * trainer.world_size / sizes[number],
        "window": sizes[number] * accumulated / sum(sizes[begin : int(end)]),
    }
    return {key: factor for key, factor in factors.items() if factor != 1.0}
