"""Lightning's view of an image source: dict batches, a held-out split, augmentation on the device.

The whole set stays in memory as uint8, with a GPU in that of the GPU. A batch is one indexing
operation; its bytes become float32 in [0, 1] on the device.
"""

import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from common.attacks.randomness import ExampleRandom, Stream, run_seed
from common.data.base import Arrays, ImageSource, Split
from common.data.extra import ExtraImages, MixedDataset, MixedSampler
from common.data.loading import (
    Batch,
    ImageDataset,
    ShuffledShare,
    TrainLoader,
)
from common.data.sources import stratified_split
from common.data.subset import lacking_classes, subset
from common.errors import ConfigurationError, check_choice

CropPadding = Literal["zero", "reflect"]
"""What surrounds an image before it is cropped: zeros, or the image mirrored at its edge."""
ValidateOn = Literal["held-out", "test"]

_NEXT_VIEW = 2**40  # added to an image's index for each further version: above any set's size


class Views(ABC):
    """More versions of each training image, for losses that compare them."""

    @abstractmethod
    def __call__(self, x: Tensor, random: ExampleRandom) -> list[Tensor]:
        """Other versions of whole images uint8 ``(N, C, H, W)``, before crop and flip."""


def shift_and_flip(
    x: Tensor, shift: Tensor, is_flipped: Tensor, padding: int, padding_mode: CropPadding = "zero"
) -> Tensor:
    """Crops each padded image at its own place, then mirrors it or not.

    The random crop and horizontal flip of He et al. 2016 (Section 4.2), one gather for a batch.

    Args:
        x: Images, ``(N, C, H, W)``, any type.
        shift: Top and left corner of the crops, int64 in ``[0, 2 * padding]``, ``(N, 2)``.
        is_flipped: Whether the crop is mirrored left to right, bool ``(N,)``.
        padding: Pixels added on each side.
        padding_mode: ``zero``, or ``reflect`` (the pixels of the edge are not repeated), which
            needs a ``padding`` below the sides of the image.
    """
    check_choice("padding_mode", padding_mode, CropPadding)
    n, channels, height, width = x.shape
    rows = torch.arange(height, device=x.device) + shift[:, :1]
    columns = torch.arange(width, device=x.device).expand(n, width)
    columns = torch.where(is_flipped[:, None], width - 1 - columns, columns) + shift[:, 1:]
    if padding_mode == "reflect":  # by index: torch pads no bytes this way
        rows = height - 1 - (height - 1 - (rows - padding).abs()).abs()
        columns = width - 1 - (width - 1 - (columns - padding).abs()).abs()
        padding = 0
    return F.pad(x, (padding,) * 4)[
        torch.arange(n, device=x.device)[:, None, None, None],
        torch.arange(channels, device=x.device)[:, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]


@dataclass(eq=False, repr=False)
class ImageDataModule(LightningDataModule):
    """Batches ``{"x": float32 (N, C, H, W) in [0, 1], "y": int64 (N,), "index": int64 (N,)}``.

    ``index`` counts from 0 within the split. Order and augmentation depend on seed, epoch and index
    alone. No example is repeated: where devices cannot share the last training batch evenly, their
    parts of it are weighted by size. The trainer needs ``use_distributed_sampler=False``.

    Args:
        source: The data set.
        batch_size: Of training, over all devices together.
        eval_batch_size: Of validation and test, per device.
        val_size: How much of the training split is held out for validation, in equal proportions
            of the classes: a number of examples (int) or a fraction (float).
        validate_on: ``"held-out"``, or ``"test"`` to hold nothing out and use the test split.
        split_seed: Decides which examples are held out; independent of the training seed.
        crop_padding: Pixels added on each side before the random crop in training; 0 for no crop.
        crop_padding_mode: What they are: ``zero``, or ``reflect`` for the image mirrored.
        flip: Whether half of the training images are mirrored left to right.
        seed: Of order and augmentation; ``None`` for the run's own (``seed_everything``).
        train_limit: Largest number of training examples, a stratified subset; ``None`` for all.
        val_limit: The same for validation.
        test_limit: The same for test.
        num_workers: Processes that fetch batches. With 0, usually best, and without ``extra`` the
            set stays in the memory of a GPU.
        drop_last: Whether a last training batch that is not full is left out.
        extra: Pseudo-labelled images for a part of every training batch; all batches are full then.
        extra_fraction: Size of that part, between 0.0 and 1.0.
        views: More versions of each training image, which follow the images in a training batch;
            each has its own crop, the label of its image and a unique ``index``, and ``view``
            counts them from 0.
    """

    source: ImageSource
    batch_size: int = 128
    eval_batch_size: int = 250
    val_size: int | float = 0.1
    validate_on: ValidateOn = "held-out"
    split_seed: int = 0
    crop_padding: int = 0
    crop_padding_mode: CropPadding = "zero"
    flip: bool = False
    seed: int | None = None
    train_limit: int | None = None
    val_limit: int | None = None
    test_limit: int | None = None
    num_workers: int = 0
    drop_last: bool = False
    extra: ExtraImages | None = None
    extra_fraction: float = 0.5
    views: Views | None = None

    def __post_init__(self) -> None:
        super().__init__()
        self.train_set: ImageDataset | None = None
        self.val_set: ImageDataset | None = None
        self.test_set: ImageDataset | None = None
        self._loaded: dict[Split, tuple[Tensor, Tensor]] = {}
        self._extra: Arrays | None = None
        self._check_settings()

    def _check_settings(self) -> None:
        for name, least in (
            *(("batch_size", 1), ("eval_batch_size", 1), ("crop_padding", 0), ("num_workers", 0)),
            *(("train_limit", 1), ("val_limit", 1), ("test_limit", 1)),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigurationError(f"data.{name} must be at least {least}, got {value}")
        is_fraction = isinstance(self.val_size, float)
        if not (0 < self.val_size < 1 if is_fraction else self.val_size >= 1):
            raise ConfigurationError(
                "data.val_size must be a number of examples, at least 1, or a fraction between 0.0 "
                f"and 1.0, got {self.val_size!r}; to hold nothing out, set data.validate_on: test"
            )
        if not 0.0 < self.extra_fraction < 1.0:
            raise ConfigurationError(
                "data.extra_fraction must be between 0.0 and 1.0, got "
                f"{self.extra_fraction}; to train without extra images, set data.extra: null"
            )
        check_choice("data.validate_on", self.validate_on, ValidateOn)
        check_choice("data.crop_padding_mode", self.crop_padding_mode, CropPadding)
        if self.crop_padding_mode == "reflect" and self.crop_padding >= min(self.shape[1:]):
            raise ConfigurationError(
                f"data.crop_padding {self.crop_padding} is more than an image of "
                f"{'x'.join(map(str, self.shape[1:]))} has to mirror; make it smaller or "
                "set data.crop_padding_mode: zero"
            )

    @property
    def num_classes(self) -> int:
        """Number of classes; like the shape and the names, known before a file is read."""
        return self.source.spec.num_classes

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of an image, ``(C, H, W)``."""
        return self.source.spec.shape

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names in the order of the labels."""
        return self.source.spec.class_names

    @property
    def order_seed(self) -> int:
        """Seed of order and augmentation: ``seed``, or else the run's."""
        return run_seed() if self.seed is None else self.seed

    def counts(self) -> dict[str, int]:
        """Images of an epoch of training, ``train``, and of ``val`` and ``test``; reads no file.

        Versions by ``views`` are not counted. A KeyError if the source states no sizes.
        """
        train, test = self.source.sizes["train"], self.source.sizes["test"]
        held_out = self._held_out(train) if self.validate_on == "held-out" else 0
        return {
            "train": sum(self._batch_sizes(min(train - held_out, self.train_limit or train))),
            "val": min(held_out or test, self.val_limit or train),
            "test": min(test, self.test_limit or test),
        }

    def prepare_data(self) -> None:
        """Fetches and checks the files; Lightning calls it in one process per machine."""
        self.source.prepare()

    def setup(self, stage: str | None = None) -> None:
        """Loads what the stage needs (fit, validate, test, predict; None for all)."""
        self._check_devices()
        if stage in (None, "fit", "validate") and self.val_set is None:
            if self.validate_on == "test":
                self.val_set = self._dataset("test", None, self.val_limit)
            else:
                rows, held_out = self._split()
                self.train_set = self._dataset("train", rows, self.train_limit)
                self.val_set = self._dataset("train", held_out, self.val_limit)
        if stage in (None, "fit"):
            if self.train_set is None:
                self.train_set = self._dataset("train", None, self.train_limit)
            self._batch_sizes(len(self.train_set))
            if self.extra is not None and self._extra is None:
                self._extra = self.extra.load(self.source.spec)
        if stage in (None, "test", "predict") and self.test_set is None:
            self.test_set = self._dataset("test", None, self.test_limit)

    def train_dataloader(self) -> DataLoader[Batch]:
        """This process's share of the training batches; the epoch decides the order.

        The b-th batches of all processes together are the b-th batch of one process.
        """
        labelled = _ready(self.train_set, "fit")
        n, seed, rank, devices = len(labelled), self.order_seed, self._rank, self._world_size
        sizes = self._batch_sizes(n)
        dataset: Dataset[Batch] = labelled
        sampler: Sampler[int]
        if self._extra is None:
            sampler = ShuffledShare(n, range(rank, sum(sizes), devices), seed)
        else:
            dataset, m = MixedDataset(labelled, n, self._extra), len(self._extra[1])
            sampler = MixedSampler(n, m, self.batch_size, self.extra_fraction, seed, devices, rank)
        loader = TrainLoader(
            dataset,
            batch_size=self.batch_size // devices,
            sampler=sampler,
            drop_last=self.drop_last,
            **self._loader_options(),
        )
        loader.trainer, loader.sizes = self.trainer, sizes
        return loader

    def val_dataloader(self) -> DataLoader[Batch]:
        """This process's share of the validation examples, each in exactly one process."""
        return self._eval_loader(_ready(self.val_set, "validate"))

    def test_dataloader(self) -> DataLoader[Batch]:
        """This process's share of the test examples, each in exactly one process."""
        return self._eval_loader(_ready(self.test_set, "test"))

    predict_dataloader = test_dataloader

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Augments in training and scales bytes to [0, 1], as float32 or the trainer's float64."""
        if self.trainer is not None and self.trainer.training:
            if self.views is not None:
                batch |= self._with_views(self.views, batch, self.trainer.current_epoch)
            x = self.augment(batch["x"], batch["index"], self.trainer.current_epoch)
        else:
            x = batch["x"]
        # A divisor on the device: CUDA multiplies by the reciprocal of a plain number, which
        # rounds some of the 256 values differently from a CPU.
        is_double = self.trainer is not None and self.trainer.precision == "64-true"
        dtype = torch.float64 if is_double else torch.float32
        divisor = torch.full((), 255.0, dtype=dtype, device=x.device)
        batch["x"] = x.to(dtype) / divisor
        return batch

    def augment(self, x: Tensor, index: Tensor, epoch: int) -> Tensor:
        """Crops and flips images ``(N, C, H, W)`` as their index ``(N,)`` and the epoch decide."""
        if not self.crop_padding and not self.flip:
            return x
        random = ExampleRandom(self.order_seed, epoch, index, stream=Stream.AUGMENTATION)
        shift = random.integers(2 * self.crop_padding + 1, (2,))
        is_flipped = (random.integers(2, ()) == 1) & self.flip
        return shift_and_flip(x, shift, is_flipped, self.crop_padding, self.crop_padding_mode)

    def _with_views(self, views: Views, batch: Batch, epoch: int) -> Batch:
        """The images and, behind them, their other versions."""
        x, y, index = batch["x"], batch["y"], batch["index"]
        versions = [x, *views(x, ExampleRandom(self.order_seed, epoch, index, stream=Stream.VIEWS))]
        view = torch.arange(len(versions), device=index.device).repeat_interleave(len(index))
        index = index.repeat(len(versions)) + view * _NEXT_VIEW
        y = y.repeat(len(versions))
        return {"x": torch.cat(versions), "y": y, "index": index, "view": view}

    @property
    def _world_size(self) -> int:
        return 1 if self.trainer is None else self.trainer.world_size

    @property
    def _rank(self) -> int:
        return 0 if self.trainer is None else self.trainer.global_rank

    def _check_devices(self) -> None:
        devices = self._world_size
        if self.batch_size % devices:
            below = self.batch_size // devices * devices
            choices = " or ".join(str(size) for size in (below, below + devices) if size)
            raise ConfigurationError(
                f"data.batch_size {self.batch_size} is the batch over all devices and {devices} "
                f"cannot share it evenly: choose {choices}, or another number of devices"
            )
        connector = getattr(self.trainer, "_accelerator_connector", None)
        if devices > 1 and connector is not None and connector.use_distributed_sampler:
            raise ConfigurationError(
                "trainer.use_distributed_sampler is true, but the data already come divided over "
                "the devices, without repeating examples in evaluation: set it to false"
            )

    def _batch_sizes(self, n: int) -> list[int]:
        """Examples of each training batch of an epoch, over all devices."""
        full, rest = divmod(n, self.batch_size)
        if self.extra is not None:
            return [self.batch_size] * (full + (rest > 0))
        if self.drop_last and not full:
            raise ConfigurationError(
                f"data.batch_size {self.batch_size} exceeds the {n} training examples and "
                "data.drop_last leaves no batch: make batch_size smaller or set drop_last: false"
            )
        if not self.drop_last and 0 < rest < self._world_size:
            raise ConfigurationError(
                f"the last training batch has {rest} of the {n} examples, too few for "
                f"{self._world_size} devices: set data.drop_last: true, or choose another "
                "data.batch_size or fewer devices"
            )
        last = [rest] if rest and not self.drop_last else []
        return [self.batch_size] * full + last

    def _load(self, split: Split) -> tuple[Tensor, Tensor]:
        """All images of a split, on the device that batches are fetched from, and labels."""
        if split not in self._loaded:
            self._loaded[split] = self.source.load(split)
        x, y = self._loaded[split]
        if self._is_resident:
            x = x.to(self.trainer.strategy.root_device)  # type: ignore[union-attr]
            self._loaded[split] = x, y
        return x, y

    @property
    def _is_on_cuda(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"

    @property
    def _is_resident(self) -> bool:
        """Whether the images are kept in the memory of a GPU."""
        return self._is_on_cuda and self.num_workers == 0 and self.extra is None

    def _held_out(self, n: int) -> int:
        """How many of n training images are held out."""
        return self.val_size if isinstance(self.val_size, int) else max(round(self.val_size * n), 1)

    def _split(self) -> tuple[Tensor, Tensor]:
        """Rows of the training split to train on, and rows held out."""
        _, y = self._load("train")
        try:
            return stratified_split(y, self._held_out(len(y)), self.split_seed)
        except ConfigurationError as error:
            raise ConfigurationError(f"data.val_size {self.val_size}: {error}") from None

    def _dataset(self, split: Split, rows: Tensor | None, limit: int | None) -> ImageDataset:
        x, y = self._load(split)
        rows = torch.arange(len(y)) if rows is None else rows
        chosen = subset(y[rows], limit)
        dataset = ImageDataset(x, y, rows[chosen])
        if lacking := lacking_classes(y[rows], chosen):
            dataset.remarks.append(lacking)
            warnings.warn(f"{split} split: {lacking}", stacklevel=2)
        if len(dataset) < self._world_size:
            raise ConfigurationError(
                f"{len(dataset)} examples cannot be divided over {self._world_size} devices: use "
                "more examples or fewer devices"
            )
        return dataset

    def _eval_loader(self, dataset: ImageDataset) -> DataLoader[Batch]:
        sampler = UnrepeatedDistributedSampler(
            dataset, num_replicas=self._world_size, rank=self._rank, shuffle=False
        )
        return DataLoader(
            dataset, batch_size=self.eval_batch_size, sampler=sampler, **self._loader_options()
        )

    def _loader_options(self) -> dict[str, Any]:
        return {
            "collate_fn": _as_fetched,
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": self._is_on_cuda and not self._is_resident,
            # Its own generator: a loader otherwise draws from the global one at every start.
            "generator": torch.Generator(),
        }


def _ready(dataset: ImageDataset | None, stage: str) -> ImageDataset:
    if dataset is None:
        raise RuntimeError(f"call setup({stage!r}) before asking for batches")
    return dataset


def _as_fetched(batch: Batch) -> Batch:
    return batch  # the data set has collated it
