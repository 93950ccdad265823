"""What a process fetches in which order: rows of a set, its share of an epoch, the loader."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

Batch = dict[str, Tensor]


class ImageDataset(Dataset[Batch]):
    """Rows ``(N,)`` of images uint8 ``(M, C, H, W)`` and labels int64 ``(M,)``, in batches.

    Batches are on the images' device. ``remarks`` belong to results on this data set.
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


class EpochSampler(Sampler[int]):
    """A sampler whose order depends on its seed and the epoch alone."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order; the trainer calls it."""
        self.epoch = epoch


class ShuffledShare(EpochSampler):
    """This process's part, places in the order, of ``n`` shuffled examples."""

    def __init__(self, n: int, part: range, seed: int) -> None:
        self.n, self.part, self.seed = n, part, seed

    def __len__(self) -> int:
        return len(self.part)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.n, generator=generator).tolist()
        return (order[place] for place in self.part)


class TrainLoader(DataLoader[Batch]):
    """Starts an interrupted epoch where it stopped, with the order that belongs to the epoch.

    Lightning asks for the iterator before it tells the sampler the epoch, and counts the batches
    done before an interruption without skipping them: reading starts at the first ``next`` here.
    Where a batch does not count like the others, its examples get a ``window`` or a ``weight``, see
    :func:`common.objectives.weighted`. ``sizes`` are the examples of each batch of the epoch over
    all processes.
    """

    trainer: Trainer | None
    sizes: list[int]

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        for number, batch in islice(enumerate(super().__iter__()), self._batches_done(), None):
            for key, factor in self._loss_factors(number).items():
                batch[key] = torch.full(batch["y"].shape, factor, dtype=torch.float64)
            yield batch

    def _batches_done(self) -> int:
        """Batches of the current epoch that a resumed run has done before; 0 otherwise."""
        if self.trainer is None:
            return 0
        loop = self.trainer.fit_loop.epoch_loop
        is_resumed = loop.restarting or getattr(loop, "has_made_up", False)
        return loop.batch_progress.current.ready if is_resumed else 0

    def _loss_factors(self, number: int) -> dict[str, float]:
        """Factors of the mean loss of batch ``number``, from 0, that differ from 1.

        ``weight`` is this process's examples of the batch over the mean of all processes;
        ``window`` the batch's examples over those of its optimiser step, times the number of
        accumulated batches that Lightning divides every loss by.
        """
        trainer, sizes = self.trainer, self.sizes
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

    def state_dict(self) -> dict[str, Any]:
        """Nothing: epoch and progress, which Lightning keeps, determine the position."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing, as :meth:`state_dict`."""
